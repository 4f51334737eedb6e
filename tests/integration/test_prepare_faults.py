"""A preparation while a worker, a node and the driver are killed (SIGKILL), on a real Ray cluster of two nodes.

One kill of each kind here; tests/benchmarks/drills/prepare_faults.py does it at random moments as often as one likes.
"""

import pytest
import ray

from tests.benchmarks.drills.prepare_faults import KINDS, Faults, FaultyCluster


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    ray.shutdown()
    with FaultyCluster() as cluster:
        yield Faults(cluster, tmp_path_factory.mktemp("faults"), records=480)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_in_the_same_data_set_after_at_most_one_rerun(faults, kind):
    for _ in range(4):
        trial = faults.trial(kind)
        assert trial.wrong == "", trial
        if trial.victim:  # else the run was over before the kill
            break
    assert trial.victim
    if kind == "driver":
        assert trial.reruns == 1
