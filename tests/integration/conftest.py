"""Fixtures that several integration tests share."""

import pytest
import ray


@pytest.fixture(scope="module")
def two_cpus():
    """A Ray of this module's own with two CPUs, whatever cluster runs on the machine besides."""
    ray.shutdown()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
