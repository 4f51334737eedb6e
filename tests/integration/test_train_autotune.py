"""Stages that measure how much runs at once learn what others learn, and go on after a stop as they began."""

import json

import pytest

from tests.helpers.toy_training import Workers, difference, same
from workflows.train.autotune import FILE

AUTO = {"micro_batch_rows": "auto"}
CHUNKS = {"measured_chunks": ("connector", "language_model")}


def a_job(toy, folder, chosen: dict | None = None, **train):
    job = toy.job(folder, AUTO, **train)
    if chosen:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / FILE).write_text(json.dumps(chosen))
    return type(job)(**{**job.__dict__, **CHUNKS})


def test_the_same_losses_but_for_rounding_and_the_choice_is_with_the_model(toy, workers, undisturbed, tmp_path):
    measured = workers.train(a_job(toy, tmp_path / "measured"))
    plain = undisturbed(2)
    assert measured.losses == pytest.approx(plain.losses, abs=1e-5)
    assert difference(measured.weights, plain.weights) < 1e-3
    (chosen,) = measured.of("chosen")
    assert chosen["values"].keys() == {"micro_batch_rows", "chunk_size.connector", "chunk_size.language_model"}
    assert json.loads((tmp_path / "measured" / "model" / "stage.json").read_text())["chosen"] == chosen["values"]


def test_a_stopped_stage_goes_on_with_what_was_chosen_to_the_last_bit(toy, workers, tmp_path):
    """Each of the choices, whatever is fastest on this machine."""
    results = []
    for rows, chunk in ((1, 16), (2, 64)):
        chosen = {"micro_batch_rows": rows, "chunks": {"connector": 16, "language_model": chunk}}
        whole = workers.train(a_job(toy, tmp_path / f"whole{rows}", chosen))
        job = a_job(toy, tmp_path / f"stopped{rows}", chosen, save_every=2)
        workers.train(job, stop_after=5)
        resumed = workers.train(job)
        assert resumed.of("start")[0]["step"] == 4
        assert same(resumed.weights, whole.weights)
        assert resumed.of("chosen")[0]["values"]["chunk_size.language_model"] == chunk
        results.append(whole.weights)
    assert not same(*results)  # so that the choice does decide the last bits


@pytest.mark.slow
def test_another_number_of_workers_goes_on_with_it(toy, workers, tmp_path):
    job = a_job(toy, tmp_path / "two", save_every=2)
    begun = workers.train(job, stop_after=5)
    alone = Workers(1)
    try:
        resumed = alone.train(job)
    finally:
        alone.close()
    assert resumed.of("chosen") == begun.of("chosen")
    plain = workers.train(toy.job(tmp_path / "plain"))
    assert resumed.losses[-1] == pytest.approx(plain.losses[-1], abs=1e-5)
