"""Benchmarks read from their published layouts: items, prompts, images, scores by hand, and files that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.corpora import write_files, write_zip
from tests.helpers.published_benchmarks import (
    WRITERS,
    write_gqa,
    write_pope,
    write_textvqa,
    write_vizwiz,
    write_vqav2,
    write_vsr,
)
from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.benchmarks import NAMES, Benchmark, open_benchmark
from workflows.evaluate.questions import open_store
from workflows.evaluate.scoring import score_predictions


def read(name: str, root: Path, **options) -> Benchmark:
    """A small set, of as many questions as the writer wrote."""
    return open_benchmark(name, str(root), questions=WRITERS[name](root), **options)


def edit(file: Path, change) -> None:
    """Change the JSON content of a file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", WRITERS)
def test_every_item_has_an_id_of_its_own_and_an_image_that_opens(name, tmp_path):
    benchmark = read(name, tmp_path)
    assert not benchmark.missing
    assert len({item.id for item in benchmark.items}) == len(benchmark.items)
    for item in benchmark.items:
        data = open_store(benchmark.stores[item.source]).read(item.image)
        assert data.startswith(b"\xff\xd8")  # JPEG


@pytest.mark.parametrize("name", WRITERS)
def test_another_number_of_questions_than_published_has_to_be_said(name, tmp_path):
    count = WRITERS[name](tmp_path)
    with pytest.raises(UsageError, match=f"have {count} questions, the published ones .*--questions {count}"):
        open_benchmark(name, str(tmp_path))
    assert "not the published set" in open_benchmark(name, str(tmp_path), questions=count).notes[0]
    with pytest.raises(UsageError, match=rf"have {count} questions, --questions says {count + 1}"):
        open_benchmark(name, str(tmp_path), questions=count + 1)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("vqav2", "Is it red?\nAnswer the question using a single word or phrase."),
        ("gqa", "Is it red?\nAnswer the question using a single word or phrase."),
        (
            "vizwiz",
            "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase.",
        ),
        (
            "textvqa",
            "Reference OCR token: NOKIA, A0\nWhat does it say?\nAnswer the question using a single word or phrase.",
        ),
        ("pope", "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."),
        (
            "vsr",
            'Based on the image, is this statement "True" or "False"? The cat is behind the suitcase.\n'
            'Respond with "True" or "False" directly.',
        ),
    ],
)
def test_the_protocols_prompts(name, prompt, tmp_path):
    assert read(name, tmp_path).items[0].prompt == prompt


def test_textvqa_asks_with_and_without_ocr_tokens(tmp_path):
    benchmark = read("textvqa", tmp_path)
    with_tokens, without = benchmark.items[:2]
    assert (with_tokens.id, without.id) == ("ocr/34602", "pure/34602")
    assert without.prompt == "What does it say?\nAnswer the question using a single word or phrase."
    assert benchmark.counts() == {"overall": 8, "ocr": 4, "pure": 4}


def test_llavas_file_gives_the_same_ocr_tokens(tmp_path):
    prompts = []
    for kind in ("rosetta", "llava"):
        write_textvqa(tmp_path / kind, ocr=kind)
        prompts.append([item.prompt for item in open_benchmark("textvqa", str(tmp_path / kind), questions=4).items])
    assert prompts[0] == prompts[1]
    write_textvqa(tmp_path / "none", ocr="none")
    with pytest.raises(UsageError, match="there are no OCR tokens: add TextVQA_Rosetta"):
        open_benchmark("textvqa", str(tmp_path / "none"), questions=4)


def test_ids_of_popes_splits_do_not_collide(tmp_path):
    ids = [item.id for item in read("pope", tmp_path).items]
    assert ids[0] == "random/1"
    assert ids[-1] == "adversarial/8"


def test_statements_have_the_meta_categories_of_vsrs_analysis(tmp_path):
    kinds = [item.type for item in read("vsr", tmp_path).items]
    assert kinds == ["projective", "orientation", "topological", "unallocated", "projective", "proximity"]


def test_vsr_has_two_splits(tmp_path):
    write_vsr(tmp_path, 6)
    write_vsr(tmp_path, 4, "random")
    assert open_benchmark("vsr", str(tmp_path), split="random", questions=4).title == "vsr/random"
    with pytest.raises(UsageError, match="no split 'test'; choose zeroshot or random"):
        open_benchmark("vsr", str(tmp_path), split="test")
    with pytest.raises(UsageError, match="gqa: there is no split 'val'; it has no splits"):
        open_benchmark("gqa", str(tmp_path), split="val")


def test_images_may_stay_in_their_zip(tmp_path):
    count = write_vqav2(tmp_path)
    folder = tmp_path / "val2014"
    write_zip(tmp_path / "val2014.zip", {f"val2014/{file.name}": file.read_bytes() for file in folder.iterdir()})
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    zipped = open_benchmark("vqav2", str(tmp_path), questions=count)
    assert not zipped.missing
    for item in zipped.items:
        assert open_store(zipped.stores[0]).read(item.image) == files[f"COCO_val2014_{int(item.id) // 1000:012d}.jpg"]


def test_images_may_lie_elsewhere(tmp_path):
    count = write_gqa(tmp_path / "gqa")
    (tmp_path / "gqa/images").rename(tmp_path / "images")
    with pytest.raises(UsageError, match=r"gqa: no images at .*images.*--images"):
        open_benchmark("gqa", str(tmp_path / "gqa"), questions=count)
    assert not open_benchmark("gqa", str(tmp_path / "gqa"), str(tmp_path / "images"), questions=count).missing


def test_missing_images_are_named_by_the_questions_that_need_them(tmp_path):
    count = write_vqav2(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000073.jpg").unlink()
    benchmark = open_benchmark("vqav2", str(tmp_path), questions=count)
    assert benchmark.missing == {f"7300{i}": "there is no image COCO_val2014_000000000073.jpg" for i in range(4)}


def _double(entries):
    entries.append(entries[0])


def test_question_ids_that_come_twice(tmp_path):
    count = write_vizwiz(tmp_path)
    edit(tmp_path / "val.json", _double)
    with pytest.raises(WorkflowError, match=r"1 question ids \(VizWiz_val_00000000.jpg\) come more than once"):
        open_benchmark("vizwiz", str(tmp_path), questions=count + 1)


def test_questions_and_annotations_of_different_files(tmp_path):
    count = write_vqav2(tmp_path)
    edit(tmp_path / "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][0].update(question_id=99))
    with pytest.raises(
        WorkflowError, match=r"1 questions \(42000\) have no answers, 1 annotations \(99\) are of unknown"
    ):
        open_benchmark("vqav2", str(tmp_path), questions=count)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        (
            "vqav2",
            "v2_OpenEnded_mscoco_val2014_questions.json",
            lambda c: c["info"].update(version="1.0"),
            "version 1.0",
        ),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c.update(dataset_version="0.5"), "'0.5', expected '0.5.1'"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda c: c["200000000"].update(isBalanced=False),
            "not of the balanced",
        ),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda c: c["200000000"].pop("answer"),
            "question 200000000 has answer = None",
        ),
        ("vizwiz", "val.json", lambda c: c[2].pop("answerable"), "VizWiz_val_00000002.jpg has answerable = None"),
        (
            "vizwiz",
            "val.json",
            lambda c: c[2]["answers"].pop(),
            "question VizWiz_val_00000002.jpg has 9 answers, expected 10",
        ),
    ],
)
def test_files_of_another_version(name, file, change, message, tmp_path):
    count = WRITERS[name](tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises((UsageError, WorkflowError), match=message):
        open_benchmark(name, str(tmp_path), questions=count)


def test_files_that_are_not_there_or_no_json(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        open_benchmark("gqa", str(tmp_path / "no"))
    with pytest.raises(UsageError, match=r"has no testdev_balanced_questions.json nor questions/testdev"):
        open_benchmark("gqa", str(tmp_path))
    write_pope(tmp_path)
    (tmp_path / "coco_pope_popular.json").write_text("<html>")
    with pytest.raises(UsageError, match=r"coco_pope_popular.json is not JSON lines"):
        open_benchmark("pope", str(tmp_path))
    with pytest.raises(UsageError, match="no benchmark 'vqa'; choose one of vqav2, gqa"):
        open_benchmark("vqa", str(tmp_path))
    with pytest.raises(UsageError, match="no benchmark 'recipe'"):
        open_benchmark("recipe", str(tmp_path))
    assert set(WRITERS) | {"llava", "shards"} == set(NAMES)


def test_popes_scores_by_hand(tmp_path):
    """Labels are yes, no, yes, no, ...; the model says yes to the first six of eight in every split.

    Right: yes at 0, 2, 4 and no at 7. Accuracy 4 / 8 + the one at 6 wrong: rows 0 to 5 hold 3 yes (right) and 3 no
    (wrong), row 6 is a yes (wrong), row 7 a no (right): 4 / 8. Precision 3 / 6, recall 3 / 4, F1 0.6, yes-rate 6 / 8.
    """
    benchmark = read("pope", tmp_path)
    said = {item.id: "Yes" if int(item.id.split("/")[1]) <= 6 else "No" for item in benchmark.items}
    scores = score_predictions(benchmark, said, tmp_path / "out", "test")["scores"]
    for kind in ("", "/random", "/popular", "/adversarial"):
        assert scores[f"text/f1{kind}"] == pytest.approx(0.6)
        assert scores[f"text/precision{kind}"] == pytest.approx(0.5)
        assert scores[f"text/recall{kind}"] == pytest.approx(0.75)
        assert scores[f"text/yes_rate{kind}"] == pytest.approx(0.75)
    assert scores["overall"] == scores["random"] == scores["text/overall"] == 0.5


def test_vizwizs_scores_by_hand(tmp_path):
    """Questions 2 and 5 cannot be answered. Said unanswerable: 1, 2. The seven agree, so a right answer scores 1."""
    benchmark = read("vizwiz", tmp_path)
    said = dict(
        zip([i.id for i in benchmark.items], ["red", "unanswerable", "Unanswerable.", "x", "Red", "no"], strict=True)
    )
    scores = score_predictions(benchmark, said, tmp_path / "out", "test")["scores"]
    assert scores["overall"] == pytest.approx(3 / 6)  # 0, 2, 4; of blue three people: 0.9 is said nowhere
    assert scores["answerable_only"] == pytest.approx(2 / 4)
    assert scores["unanswerable_only"] == pytest.approx(1 / 2)
    assert scores["unanswerability/f1"] == pytest.approx(1 / 2)
    # Thresholds: claimed (1 of 2 right, recall 1/2), then all (2 of 6, recall 1).
    assert scores["unanswerability/ap"] == pytest.approx(0.5 * 0.5 + 0.5 * 2 / 6)


def test_vqav2_scores_by_answer_type_and_as_the_script_does(tmp_path):
    benchmark = read("vqav2", tmp_path)
    said = {item.id: "No" for item in benchmark.items}  # two of ten people said no: 0.6
    result = score_predictions(benchmark, said, tmp_path / "out", "test")
    assert result["scores"] == pytest.approx(dict.fromkeys(("overall", "yes/no", "number", "other", "script"), 0.6))
    assert result["majority_answer"] == "yes"
    assert result["majority"]["yes/no"] == 1.0


def test_vsr_reports_the_share_of_true_statements(tmp_path):
    benchmark = read("vsr", tmp_path)
    result = score_predictions(benchmark, {i.id: "False" for i in benchmark.items}, tmp_path / "out", "test")
    assert result["scores"]["always_true"] == pytest.approx(4 / 6)
    assert result["scores"]["text/overall"] == pytest.approx(2 / 6)
    assert result["scores"]["text/yes_rate"] == 0.0
    assert result["majority"]["overall"] == pytest.approx(4 / 6)


def test_llava_data_of_ones_own(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red"}]
    turns += [{"from": "human", "value": "Is it round?"}, {"from": "gpt", "value": "no"}]
    write_files(tmp_path, {"test.json": [{"id": "a", "image": "a.png", "conversations": turns}]})
    assert set(open_benchmark("llava", str(tmp_path)).missing) == {"a/0", "a/1"}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for data in (tmp_path, tmp_path / "test.json"):
        benchmark = open_benchmark("llava", str(data))
        assert not benchmark.missing
    result = score_predictions(benchmark, {"a/0": " red. ", "a/1": "yes"}, tmp_path / "out", "test")
    assert result["scores"]["overall"] == 0.5
    write_files(tmp_path, {"more.json": []})
    with pytest.raises(UsageError, match=r"several \(more.json, test.json\): name one"):
        open_benchmark("llava", str(tmp_path))
    write_files(tmp_path, {"bad.json": [{"id": "b", "image": "../b.png", "conversations": turns}]})
    with pytest.raises(WorkflowError, match=r"b: malformed: image '../b.png' leaves"):
        open_benchmark("llava", str(tmp_path / "bad.json"))
