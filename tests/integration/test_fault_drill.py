"""The whole workflow on a head and three workers while a node is killed in the preparation, the client after it and a
node in the training: it ends by itself in what it ends in undisturbed. tests/benchmarks/drills/cluster_drill.py is
the drill.
"""

import pytest

from tests.benchmarks.drills.cluster_drill import WORKERS, Drill
from tests.helpers.ray_cluster import RayCluster


@pytest.mark.slow
def test_two_lost_nodes_and_a_lost_client_change_nothing(tmp_path):
    with RayCluster(WORKERS) as cluster:
        drill = Drill(cluster, tmp_path)
        whole, disturbed = drill.undisturbed(), drill.disturbed("disturbed")
    assert whole.promoted
    assert disturbed.promoted
    assert disturbed.digest == whole.digest
    assert disturbed.weights == whole.weights
    assert disturbed.went_on, "training began anew"
