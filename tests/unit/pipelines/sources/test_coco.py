"""COCO's captions and VQAv2's questions, as their files are published."""

import gzip
import json

import pytest

from mlmamba.conversation import Turn
from pipelines.source_config import CocoCaptionsSource, Vqav2Source
from pipelines.sources import open_source
from pipelines.sources.coco import CocoCaptions, Vqav2
from tests.helpers.corpora import write_files
from tests.helpers.images import encoded

CAPTIONS = {
    "info": {"year": 2017},
    "images": [{"id": 9, "file_name": "000000000009.png", "height": 1}, {"id": 25, "file_name": "000000000025.png"}],
    "licenses": [],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A meal."},
        {"image_id": 25, "id": 2, "caption": "A giraffe."},
        {"image_id": 9, "id": 3, "caption": "Bread in a box."},
        {"image_id": 7, "id": 4, "caption": "Nothing."},
        {"image_id": 25, "id": 5},
    ],
}


@pytest.mark.parametrize("order", [[*CAPTIONS], [*reversed(CAPTIONS)]])
@pytest.mark.parametrize("indent", [None, 1])
def test_captions(tmp_path, order, indent):
    text = json.dumps({key: CAPTIONS[key] for key in order}, indent=indent)
    write_files(tmp_path, {"c.json.gz": gzip.compress(text.encode()), "pics/000000000009.png": encoded(9)})
    config = {"type": "coco_captions", "annotations": str(tmp_path / "c.json.gz"), "images": str(tmp_path / "pics")}
    source = open_source(CocoCaptionsSource(**config))
    one, two, three, nowhere, silent = source.records()
    assert [record.id for record in (one, two, three)] == ["1", "2", "3"]
    assert one.turns == [Turn("user", "Describe the image.", 1), Turn("assistant", "A meal.")]
    assert one.images == three.images == ["000000000009.png"]
    assert source.read_image(three.images[0]) == encoded(9)
    assert (nowhere.problem.reason, silent.problem.reason) == ("image_missing", "malformed")
    assert [record.id for record in open_source(CocoCaptionsSource(**config, limit=1)).records()] == ["1"]
    assert isinstance(source._source, CocoCaptions)


QUESTIONS = [
    {"image_id": 9, "question": "What colour?", "question_id": 9001},
    {"image_id": 9, "question": "How many?", "question_id": 9002},
    {"image_id": 25, "question": "Is it?", "question_id": 25000},
]
ANSWERS = [
    {
        "question_id": 9002,
        "multiple_choice_answer": "2",
        "answer_type": "number",
        "image_id": 9,
        "answers": [{"answer": "2"}],
    },
    {"question_id": 9001, "multiple_choice_answer": "red", "answer_type": "other", "image_id": 9},
]


def test_questions_and_their_answers(tmp_path):
    write_files(tmp_path, {"q.json": {"license": {}, "questions": QUESTIONS}, "a.json": {"annotations": ANSWERS}})
    config = {"type": "vqav2", "images": str(tmp_path), "questions": str(tmp_path / "q.json")}
    source = open_source(Vqav2Source(**config, annotations=str(tmp_path / "a.json")))
    colour, number, unanswered = source.records()
    assert (colour.id, colour.images, colour.question_types) == ("9001", ["COCO_train2014_000000000009.jpg"], ["other"])
    assert [turn.text for turn in number.turns] == ["How many?", "2"]
    assert "question 25000 has no answer" in unanswered.problem.detail
    assert isinstance(source._source, Vqav2)
    before = source.fingerprint()
    write_files(tmp_path, {"a.json": {"annotations": ANSWERS[:1]}})
    assert source.fingerprint() != before
    named = open_source(Vqav2Source(**config, annotations=str(tmp_path / "a.json"), image_name="{image_id}.png"))
    assert [record.images for record in named.records()][1] == ["9.png"]
    swapped = open_source(Vqav2Source(**(config | {"questions": str(tmp_path / "a.json")}), annotations="x"))
    with pytest.raises(ValueError, match=r"a\.json has no list 'questions', its keys are annotations"):
        list(swapped.records())
