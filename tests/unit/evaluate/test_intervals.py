"""Bootstrap intervals: coverage on simulated studies, known distributions, images as the unit, extremes."""

import numpy as np
import pytest
import scipy.stats

from workflows.evaluate.statistics import bootstrap, number, ratios


def accuracy(scores, images, **options):
    scores = np.asarray(scores, dtype=float)[:, None]
    index = number(images)
    [interval] = bootstrap(ratios(scores, np.ones_like(scores), index), int(index.max()) + 1, **options)
    return interval


def study(rng, images=80, questions=4, mean=0.85, spread=0.35):
    """Answers of a model that finds some images harder than others: questions about one image go together.

    Its true accuracy is `mean`: the chance of a right answer is Beta distributed over images.
    """
    size = mean * (1 - mean) / (spread * mean * (1 - mean)) - 1
    chance = rng.beta(mean * size, (1 - mean) * size, size=images)
    right = rng.random((images, questions)) < chance[:, None]
    return right.astype(float).ravel(), np.repeat(np.arange(images), questions)


def test_intervals_hold_the_true_score_as_often_as_they_say():
    rng, studies = np.random.default_rng(0), 400
    held = 0
    alone = 0
    for seed in range(studies):
        scores, images = study(rng)
        interval = accuracy(scores, images, resamples=400, seed=seed)
        held += interval.low <= 0.85 <= interval.high
        single = accuracy(scores, range(len(scores)), resamples=400, seed=seed)
        alone += single.low <= 0.85 <= single.high
    # 95% over 400 studies has a standard error of 1.1 points; a bootstrap of 80 images is known to be a little narrow
    assert 0.915 <= held / studies <= 0.98
    assert alone / studies < 0.88, "questions drawn one by one are too sure, or the simulation is no test"


def test_the_interval_of_a_share_is_as_wide_as_the_binomials():
    right = (np.arange(1000) < 900).astype(float)
    interval = accuracy(right, range(1000))
    exact = scipy.stats.binomtest(900, 1000).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high), abs=3e-3)


def test_a_type_that_some_draws_leave_out_has_an_interval():
    """Three of thirty images hold the type: about one draw in 23 has none of them, and its score is undefined."""
    asked = np.r_[np.ones(3), np.zeros(27)][:, None]
    right = asked * np.r_[1, 1, 0, np.zeros(27)][:, None]
    [interval] = bootstrap(ratios(right, asked, np.arange(30)), 30, counted=[3])
    assert interval.value == pytest.approx(2 / 3)
    assert interval.low < interval.value < interval.high


def test_a_single_question_says_next_to_nothing():
    right, wrong = accuracy([1], ["a"]), accuracy([0], ["a"])
    assert (right.low, right.high) == pytest.approx((0.025, 1.0))
    assert (wrong.low, wrong.high) == pytest.approx((0.0, 0.975))


def test_a_perfect_score_is_not_certain():
    interval = accuracy(np.ones(20), range(20))
    assert interval.high == 1.0
    assert interval.low == pytest.approx(scipy.stats.binomtest(20, 20).proportion_ci(method="exact").low)
    nothing = accuracy(np.zeros(20), range(20))
    assert (nothing.low, nothing.high) == pytest.approx((0.0, 1 - interval.low))


def test_a_score_that_only_loses_its_meaning_in_some_draws_is_not_certain_either():
    """Precision 1 of three claims: a draw without any of them says 0, which is no spread of the precision."""
    claimed = np.r_[np.ones(3), np.zeros(27)]

    def precision(counts):
        return np.where(counts @ claimed > 0, 1.0, 0.0)[:, None]

    [interval] = bootstrap(precision, 30, counted=[3])
    assert interval.low < 0.5
    assert interval.high == 1.0


def test_one_image_says_next_to_nothing():
    interval = accuracy([1, 1, 1, 1, 1], ["a"] * 5)
    assert interval.images == 1
    assert interval.low < 0.05


def test_the_seed_decides_and_names_do_not():
    scores, images = study(np.random.default_rng(1))
    first = accuracy(scores, images)
    assert first == accuracy(scores, [f"image-{999 - i}" for i in images])
    assert first != accuracy(scores, images, seed=8)


def test_several_scores_share_the_draws_and_an_undefined_one_is_nan():
    scores = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    asked = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = bootstrap(ratios(scores, asked, np.arange(4)), 4, counted=[4, 2, 0])
    assert [interval.value for interval in found[:2]] == [0.75, 0.5]
    assert np.isnan([found[2].value, found[2].low, found[2].high]).all()


def test_no_images_no_interval():
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap(lambda counts: counts, 0)
