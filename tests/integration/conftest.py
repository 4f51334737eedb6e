"""Fixtures that several integration tests share."""

import os
import sys

import pytest

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # read by the import: threads of an ended Ray start no other one
import ray

from tests.helpers.toy_training import Workers, make_toy

os.environ.setdefault("RAY_ADDRESS", "local")  # no test joins a cluster that happens to run, another test's own least
_status = pytest.StashKey[int]()


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[_status] = int(exitstatus)


def pytest_collection_modifyitems(items):
    """The longest file first: where files run side by side, none is left with it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_workflow.py")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End at once, with pytest's own status. The native threads of Ray, Arrow and gRPC outlive their last test, and one
    was seen to crash while the interpreter was taken down, after everything had passed."""
    if _status in config.stash and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_status])


@pytest.fixture(scope="module")
def two_cpus():
    """A Ray of this module's own with two CPUs, whatever cluster runs on the machine besides."""
    ray.shutdown()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A prepared data set and an untrained model, both tiny (tests/helpers/toy_training.py)."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def workers():
    """Two training workers joined by gloo."""
    group = Workers(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def undisturbed(toy, workers, tmp_path_factory):
    """Function from a ZeRO stage to the outcome of the toy's stage when nothing happens to it; made once each."""
    made = {}

    def get(zero_stage: int):
        if zero_stage not in made:
            made[zero_stage] = workers.train(toy.job(tmp_path_factory.mktemp("undisturbed"), zero_stage=zero_stage))
        return made[zero_stage]

    return get
