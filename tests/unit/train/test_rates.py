"""What a ramp of learning rates suggests."""

import math

import pytest

from workflows.train.rates import Ramp


def ramp(losses: list[float]) -> Ramp:
    return Ramp([10 ** (-6 + 6 * i / (len(losses) - 1)) for i in range(len(losses))], losses)


def test_a_tenth_of_the_rate_with_the_lowest_loss():
    """Falls from 1e-4 on and rises after 1e-2."""
    exponents = [-6 + 6 * i / 99 for i in range(100)]
    found = ramp([4 - 3 * max(0, min(1, (e + 4) / 2)) + 9 * max(0, e + 2) for e in exponents])
    assert found.suggestion == pytest.approx(1e-3, rel=0.6)
    said = found.told("full", 5e-4)
    assert said.startswith("stage full: the loss is lowest at a rate of ")
    assert said.endswith(f"learning_rate: {found.suggestion:.1e} (now 5.0e-04)")


def test_a_loss_that_never_falls_suggests_nothing():
    assert ramp([2.0] * 30).suggestion is None
    assert (
        ramp([2.0 + i for i in range(30)])
        .told("full", 1e-3)
        .startswith("stage full: the loss fell at no rate from 1e-06")
    )
    assert Ramp([], []).suggestion is None


def test_smoothing_has_no_start_that_is_too_low():
    assert ramp([3.0] * 10).smoothed == pytest.approx([3.0] * 10)


def test_a_plot_is_written(tmp_path):
    ramp([math.exp(-i / 9) for i in range(30)]).draw(tmp_path / "made" / "plot.png", "full")
    assert (tmp_path / "made" / "plot.png").read_bytes().startswith(b"\x89PNG")
