"""Scores, baselines, and the batches that training workers answer."""

import json

import pytest

from pipelines.source_config import EasyVQASource
from workflows.evaluate.benchmarks.base import normalise
from workflows.evaluate.collect import AnswerJob
from workflows.evaluate.questions import load_questions, majority_answer
from workflows.evaluate.results import table

pytest.importorskip("easy_vqa")


def test_answers_compare_without_case_space_and_a_last_full_stop():
    assert [normalise(text) for text in ("Yes.", " RED ", "3.5", "..")] == ["yes", "red", "3.5", ""]


def test_the_ids_of_several_sources_do_not_collide():
    """Two sources of the same records: their names stand before the ids."""
    sources = [EasyVQASource(type="easy_vqa", split="test", limit=2, name=name) for name in ("one", "two")]
    ids = [key for image in load_questions(sources) for key in image.ids]
    assert len(set(ids)) == len(ids)
    assert {key.partition("/")[0] for key in ids} == {"one", "two"}


def test_the_official_test_split_is_whole_and_typed():
    images = load_questions([EasyVQASource(type="easy_vqa", split="test")])
    assert len(images) == 1000
    types = [kind for image in images for kind in image.types]
    assert {kind: types.count(kind) for kind in set(types)} == {"yes/no": 7136, "colour": 1280, "shape": 1257}
    ids = [key for image in images for key in image.ids]
    assert len(set(ids)) == len(ids) == 9673


def test_training_never_sees_a_test_or_validation_image():
    images = {
        split: {p.location for p in load_questions([EasyVQASource(type="easy_vqa", split=split)])}
        for split in ("train", "validation", "test")
    }
    assert [len(images[split]) for split in ("train", "validation", "test")] == [3700, 300, 1000]
    assert len(set.union(*images.values())) == 5000


def test_the_majority_answer_comes_from_the_training_split():
    assert majority_answer([EasyVQASource(type="easy_vqa", split="train")]) == "yes"


RESULT = {
    "scores": {"overall": 0.9, "colour": 0.8, "f1": 0.7, "f1/colour": 0.6, "margin_over_blind": 0.4, "pope/f1": 0.5},
    "blind": {"overall": 0.5, "colour": 0.1, "f1": 0.2, "f1/colour": 0.2},
    "majority": {"overall": 0.4, "colour": 0.0, "f1": 0.0, "f1/colour": 0.0},
    "majority_answer": "yes",
    "questions": {"overall": 1234, "colour": 200},
}


def test_the_table_shows_each_score_beside_its_baselines():
    lines = table(RESULT).splitlines()
    assert lines[1].split() == ["overall", "1,234", "90.0%", "50.0%", "40.0%"]
    assert lines[2].split() == ["colour", "200", "80.0%", "10.0%", "0.0%"]
    assert lines[3].split() == ["f1", "70.0%", "20.0%", "0.0%"]
    assert lines[4:] == ["blind: the same model, another image"]


def test_the_table_says_that_a_score_is_partial_and_has_no_blind_score():
    part = {
        "complete": False,
        "missing": {"count": 7, "ids": ["a", "b"], "reasons": {}},
        "notes": ["2 answers are empty"],
    }
    lines = table(RESULT | {"blind": {}} | part).splitlines()
    assert lines[1].split() == ["overall", "1,234", "90.0%", "40.0%"]
    assert lines[-2] == "2 answers are empty"
    assert lines[-1].startswith("PARTIAL: 7 items are missing (a, b")


def test_a_training_worker_that_cannot_answer_tells_why_and_one_without_a_share_loads_nothing(tmp_path):
    """An error would be a failed training to Ray Train, which would start its workers again."""
    setup = {"model": str(tmp_path / "nowhere"), "stores": [], "max_new_tokens": 1, "threads": 1, "choices": None}
    setup = json.dumps(setup | {"batch_questions": 1, "precision": "fp32", "exact": False})
    job = AnswerJob(setup, (json.dumps({"mode": "seeing", "file": str(tmp_path / "part"), "images": []}),), workers=1)
    told = []
    assert "nowhere" in job.run(0, 2, told.append)["failed"]
    assert job.run(1, 2, told.append) == {}
    assert told == []


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (2, 2), (3, 2), (2, 5)])
def test_every_batch_is_some_training_workers(world, workers):
    job = AnswerJob("", tuple(map(str, range(7))), workers)
    shares = [job.share(rank, world) for rank in range(world)]
    assert sorted(task for share in shares for task in share) == list(job.tasks)
    assert all(not share for share in shares[workers:])
