"""Ray that cannot be started or reached: an error that says so, and nothing left behind."""

import pytest
import ray

from pipelines.execution import ensure_ray


def test_a_ray_that_does_not_start_says_why(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null")  # no folder can be made in it
    with pytest.raises(ConnectionError, match="Ray did not start: NotADirectoryError.*run again"):
        ensure_ray()
    assert not ray.is_initialized()
