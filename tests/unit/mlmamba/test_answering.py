"""Answers of a model, asked in batches, beside the model run on one prompt at a time."""

import json

import pytest
import torch

from mlmamba.answering import Answerer, Asked, answer_length, first_tokens
from mlmamba.conversation import Turn
from mlmamba.images import ImageError, load_pixels
from mlmamba.processing import MLMambaProcessor, PromptTooLong
from tests.helpers.images import encoded
from tests.helpers.tiny import NATIVE, PER_IMAGE, SIDE, tiny_model, tiny_tokenizer
from workflows.evaluate.benchmarks.base import Item
from workflows.evaluate.collect import SEEING, _Worker, bad_prompts, read_parts
from workflows.train.initial import save

TOKENS = 3
IMAGES = [encoded(i, "PNG", (20, 12)) for i in range(3)]
ASKED = [
    Asked(IMAGES[0], ["What is it?", "Is it red? Say yes or no."]),
    Asked(None, ["What is two and two?"]),
    Asked(IMAGES[1], ["What is it?"]),
    Asked(IMAGES[2], ["?", "What is it?", "A longer question about this image, is it not?"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=160).save_pretrained(path)
    processor = MLMambaProcessor(tiny_tokenizer(), image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=160)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def answerer(folder):
    return Answerer(folder, TOKENS, choices=("Yes", "No"))


@torch.inference_mode()
def alone(answerer: Answerer, image: bytes | None, question: str) -> tuple[str, float]:
    """Answer and probability of Yes, from one whole prompt without a state and without padding."""
    model, processor = answerer.model, answerer.processor
    inputs = processor.tokenize([processor.prompt([Turn("user", question, images=int(image is not None))])])
    if image is not None:
        inputs["pixel_values"] = torch.from_numpy(load_pixels(image, SIDE)[None])
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    logits = model(**inputs).logits[0, -1]
    yes, no = (processor.tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    return text.strip(), float(logits[[yes, no]].softmax(-1)[0])


def test_answers_and_probabilities_are_those_of_one_prompt_at_a_time(answerer):
    for item, replies in zip(ASKED, answerer.reply(ASKED), strict=True):
        for question, reply in zip(item.questions, replies, strict=True):
            text, chance = alone(answerer, item.image, question)
            assert reply.text == text
            assert reply.p_first == pytest.approx(chance, abs=1e-4)


def test_the_image_decides(answerer):
    first, _, second, third = (replies[0] for replies in answerer.reply(ASKED))
    assert len({round(reply.p_first, 3) for reply in (first, second)}) == 2
    assert first.prompt_tokens == second.prompt_tokens == third.prompt_tokens + len("What is it?") - len("?")


@pytest.mark.parametrize("batch_questions", [1, 3])
def test_the_size_of_a_batch_changes_nothing(folder, answerer, batch_questions):
    other = Answerer(folder, TOKENS, choices=("Yes", "No"), batch_questions=batch_questions)
    expected = [[reply.text for reply in replies] for replies in answerer.reply(ASKED)]
    assert other.answer(ASKED) == expected
    assert [other.answer([item])[0] for item in ASKED] == expected


def test_lengths(answerer):
    (reply,) = answerer.reply([ASKED[1]])[0]
    prompt = answerer.processor.prompt([Turn("user", "What is two and two?")])
    assert reply.prompt_tokens == len(answerer.processor.tokenizer(prompt)["input_ids"])
    assert (reply.answer_tokens, reply.cut) == (TOKENS, True)
    assert reply.seconds > 0
    assert answer_length([5, 6, 0, 0], end=0) == (3, False)
    assert answer_length([0], end=0) == (1, False)
    assert answer_length([5, 6], end=0) == (2, True)


def test_two_choices_that_begin_alike_are_refused():
    with pytest.raises(ValueError, match="begins 'Yes' and 'Yesterday' with the same token"):
        first_tokens(tiny_tokenizer(), ("Yes", "Yesterday"))


def test_prompts_that_cannot_be_asked_are_named(answerer):
    def item(key: str, question: str, image: str | None = None) -> Item:
        return Item(key, question, f"{question}\nSay it.", ["yes"], "yes", "all", image)

    frame = len(answerer.processor.prompt([Turn("user", "x")])) - 1 - len("<|endoftext|>") + 1
    fits = 160 - frame - len("\nSay it.")
    items = [
        item("a", "x" * fits),
        item("b", "x" * (fits + 1)),
        item("c", "x" * fits, "image"),
        item("d", "x" * (fits - PER_IMAGE), "image"),
        item("e", "  "),
        item("f", "<image>"),
    ]
    bad = bad_prompts(answerer.processor, items)
    assert set(bad) == {"b", "c", "e", "f"}
    assert bad["b"] == "the prompt has 161 tokens, over the model's 160"
    assert bad["e"] == "the question is empty"


def test_an_image_that_cannot_be_decoded_is_an_error(answerer):
    with pytest.raises(ValueError, match="not an image"):
        answerer.reply([Asked(b"no image", ["What is it?"])])


@pytest.fixture(scope="module")
def own_size(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "model"
    save(tiny_model(vision_config=NATIVE | {"max_tokens": 40}, max_position_embeddings=80), tiny_tokenizer(), path)
    return Answerer(path, TOKENS)


def test_what_does_not_fit_with_its_image_is_refused_by_its_size(own_size):
    """The files end behind their headers: whoever decoded them would say so."""
    small, large = (encoded(0, "PNG", size)[:100] for size in ((40, 30), (400, 300)))
    frame = len(own_size.processor.prompt([Turn("user", "x")])) - 1 - len("<|endoftext|>") + 1
    questions = ["x" * (40 - frame), "x" * (41 - frame)]
    assert own_size.too_long(Asked(small, questions)) == {}
    (found,) = own_size.too_long(Asked(large, questions)).items()
    assert (found[0], "81 tokens long, of which its image takes 40 (400 x 300 takes 40)" in str(found[1])) == (1, True)
    for refuse in (own_size.check, lambda asked: own_size.reply([ASKED[0], asked])):
        with pytest.raises(PromptTooLong, match="400 x 300 takes 40"):
            refuse(Asked(large, questions))
        with pytest.raises(ImageError, match="the image ends before its data does"):
            refuse(Asked(large, questions[:1]))


def test_evaluation_asks_what_fits_and_says_of_the_rest_why(own_size, tmp_path, folder):
    """What is too long is known from the image that is shown: the same question fits with another one."""
    own_size.model.save_pretrained(tmp_path / "model")
    own_size.processor.save_pretrained(tmp_path / "model")
    images = {"small.png": encoded(0, "PNG", (40, 30)), "large.png": encoded(1, "PNG", (400, 300)), "bad.png": b"no"}
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    frame = len(own_size.processor.prompt([Turn("user", "x")])) - 1 - len("<|endoftext|>") + 1
    prompts = ["x" * (40 - frame), "x" * (41 - frame)]
    setup = {"model": str(tmp_path / "model"), "stores": [{"kind": "folder", "uri": str(tmp_path)}]}
    setup |= {
        "max_new_tokens": TOKENS,
        "threads": 1,
        "choices": None,
        "batch_questions": None,
        "precision": "auto",
        "exact": False,
    }
    shown = [{"source": 0, "image": name, "ids": [f"{name}{i}" for i in (0, 1)], "prompts": prompts} for name in images]
    task = {"mode": SEEING, "file": str(tmp_path / "parts" / "seeing-0.jsonl"), "images": shown}
    _Worker(json.dumps(setup))({"task": json.dumps(task)})
    replies = {key[1]: reply for key, reply in read_parts(tmp_path).items()}
    assert set(replies) == {f"{name}{i}" for name in images for i in (0, 1)}
    assert {key for key, reply in replies.items() if "text" in reply} == {"small.png0", "small.png1", "large.png0"}
    assert "81 tokens long, of which its image takes 40" in replies["large.png1"]["error"]
    assert "not an image" in replies["bad.png0"]["error"]
