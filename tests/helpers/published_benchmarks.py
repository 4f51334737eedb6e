"""Small sets in the layouts in which the benchmarks are published, for tests.

Every writer makes the files of one benchmark under a folder and returns how many questions they have. Every
image has another colour.
"""

import json
from pathlib import Path

from tests.helpers.images import encoded

PEOPLE = 10


def write_vqav2(root: Path, images: int = 3, per_image: int = 4) -> int:
    """VQAv2's val split: questions and annotations apart, images called as COCO calls them."""
    kinds = [
        ("Is it red?", "yes", "yes/no"),
        ("How many are there?", "2", "number"),
        ("What is it?", "square", "other"),
    ]
    questions, annotations = [], []
    for i in range(images):
        image = 42 + 31 * i
        _image(root / f"val2014/COCO_val2014_{image:012d}.jpg", i)
        for j in range(per_image):
            text, answer, kind = kinds[(i + j) % len(kinds)]
            number = image * 1000 + j
            questions.append({"image_id": image, "question": text, "question_id": number})
            annotations.append(
                {
                    "question_type": text.partition(" ")[0].lower(),
                    "multiple_choice_answer": answer,
                    "answers": _people([answer] * 8 + ["no"] * 2),
                    "image_id": image,
                    "answer_type": kind,
                    "question_id": number,
                }
            )
    info = {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017}
    head = {"info": info, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    _json(
        root / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    _json(root / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    return len(questions)


def write_gqa(root: Path, images: int = 3, per_image: int = 4) -> int:
    """GQA's balanced test-dev split: one object, questions about an image scattered over it."""
    kinds = [
        ("Is it red?", "yes", "verify"),
        ("What colour is it?", "red", "query"),
        ("Red or blue?", "red", "choose"),
    ]
    content = {}
    for j in range(per_image):
        for i in range(images):
            text, answer, kind = kinds[(i + j) % len(kinds)]
            content[f"20{i:04d}{j:03d}"] = {
                "imageId": f"n{100 + i}",
                "question": text,
                "answer": answer,
                "fullAnswer": f"It is {answer}.",
                "isBalanced": True,
                "types": {"structural": kind, "semantic": "attr", "detailed": "verifyAttr"},
            }
    for i in range(images):
        _image(root / f"images/n{100 + i}.jpg", i)
    _json(root / "testdev_balanced_questions.json", content)
    return len(content)


def write_vizwiz(root: Path, count: int = 6) -> int:
    """VizWiz's val split: one list; every third question cannot be answered."""
    entries = []
    for i in range(count):
        answer = "unanswerable" if i % 3 == 2 else ["red", "a square"][i % 2]
        people = [{"answer": said, "answer_confidence": "yes"} for said in [answer] * 7 + ["blue"] * 3]
        name = f"VizWiz_val_{i:08d}.jpg"
        kind = "unanswerable" if i % 3 == 2 else "other"
        entries.append(
            {
                "image": name,
                "question": "What is this?",
                "answers": people,
                "answer_type": kind,
                "answerable": int(i % 3 != 2),
            }
        )
        _image(root / "val" / name, i)
    _json(root / "val.json", entries)
    return count


def write_textvqa(root: Path, count: int = 4, ocr: str = "rosetta") -> int:
    """TextVQA 0.5.1's val split.

    Args:
        ocr: where the tokens are: "rosetta", "llava" or "none".
    """
    data, rosetta, llava = [], [], []
    for i in range(count):
        image, question = f"{i:016x}", "what brand is it?" if i % 2 else "What does it say?"
        data.append(
            {
                "question": question,
                "image_id": image,
                "question_id": 34602 + i,
                "answers": ["nokia"] * 5 + ["Nokia", "a nokia", "samsung", "stop", "nokia phone"],
                "set_name": "val",
            }
        )
        words = ["NOKIA", f"A{i}"]
        rosetta.append({"image_id": image, "ocr_info": [{"word": word, "bounding_box": {}} for word in words]})
        text = (
            f"{question}\nReference OCR token: {', '.join(words)}\nAnswer the question using a single word or phrase."
        )
        llava.append({"question_id": image, "image": f"{image}.jpg", "text": text})
        _image(root / f"train_images/{image}.jpg", i)
    _json(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": data})
    if ocr == "rosetta":
        _json(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_version": "0.2", "data": rosetta})
    elif ocr == "llava":
        _lines(root / "llava_textvqa_val_v051_ocr.jsonl", llava)
    return count


def write_pope(root: Path, images: int = 2, per_image: int = 4) -> int:
    """POPE on COCO: three files of JSON lines, whose question ids begin anew in each."""
    names = [f"COCO_val2014_{310196 + i:012d}.jpg" for i in range(images)]
    for i, name in enumerate(names):
        _image(root / "val2014" / name, i)
    for number, split in enumerate(("random", "popular", "adversarial")):
        things = ("snowboard", "dining table", "person", "car")
        lines = [
            {
                "question_id": i * per_image + j + 1,
                "image": name,
                "text": f"Is there a {things[(j + number) % len(things)]} in the image?",
                "label": "yes" if j % 2 == 0 else "no",
            }
            for i, name in enumerate(names)
            for j in range(per_image)
        ]
        _lines(root / f"coco_pope_{split}.json", lines)
    return 3 * images * per_image


def write_vsr(root: Path, count: int = 6, split: str = "zeroshot") -> int:
    """A test split of VSR; two statements about each image."""
    relations = ["behind", "facing", "touching", "next to", "right of", "near"]
    lines = []
    for i in range(count):
        name = f"{50403 + i // 2:012d}.jpg"
        _image(root / "images" / name, i // 2)
        relation = relations[i % len(relations)]
        lines.append(
            {
                "image": name,
                "image_link": f"http://images.cocodataset.org/train2017/{name}",
                "caption": f"The cat is {relation} the suitcase.",
                "label": int(i % 3 != 0),
                "relation": relation,
                "annotator_id": 2,
            }
        )
    _lines(root / split / "test.jsonl", lines)
    return count


WRITERS = {
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "vizwiz": write_vizwiz,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "vsr": write_vsr,
}


def _people(answers: list[str]) -> list[dict]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, start=1)]


def _image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, "JPEG", (32, 32)))


def _json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _lines(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
