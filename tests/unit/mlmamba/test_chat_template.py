"""The chat template renders what mlmamba/conversation.py renders, so that training and serving see the same tokens."""

import random

import pytest
from jinja2 import TemplateError
from PIL import Image

from mlmamba.conversation import IGNORE_INDEX, Turn, encode, render
from mlmamba.processing import MLMambaProcessor
from tests.helpers.tiny import PER_IMAGE, SIDE
from workflows.serve.messages import read_messages
from workflows.serve.openai import ChatRequest
from workflows.serve.options import Limits

TEXTS = [
    "What is in the image?",
    "  leading and trailing \n",
    "Two lines\n\nof text",
    "<image>q",
    "q <im<image>age> q\n<ima<im<image>age>ge>",
    "{{ messages }} {% raw %} {# no comment #}",
    "<|user|>\nquotes ' and \" and \\n & <b>",
    "Grüße 日本語 🙂 \u3000wide\u3000",
    "0",
]
IMAGE = {"type": "image", "image": Image.new("RGB", (SIDE, SIDE))}


@pytest.fixture(scope="module")
def processor(tokenizer) -> MLMambaProcessor:
    return MLMambaProcessor(tokenizer, image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=2000)


def messages(turns: list[Turn]) -> list[dict]:
    """Turns as a chat: content as a string where there are no images, else as parts, images before the text."""
    return [
        {"role": t.role, "content": [IMAGE] * t.images + [{"type": "text", "text": t.text}] if t.images else t.text}
        for t in turns
    ]


def conversations() -> list[list[Turn]]:
    """Every text alone, and many random conversations of one to six turns."""
    chance = random.Random(0)
    random_ones = [
        [
            Turn("assistant" if i % 2 else "user", chance.choice(TEXTS), 0 if i % 2 else chance.randrange(3))
            for i in range(length)
        ]
        for length in range(1, 7)
        for _ in range(20)
    ]
    return [[Turn("user", text, images)] for text in TEXTS for images in (0, 2)] + random_ones


def test_the_template_renders_as_render_does(processor):
    chats = conversations()
    assert len(chats) > 100
    for turns in chats:
        ready = turns[-1].role == "user"
        ours = processor.apply_chat_template(messages(turns), add_generation_prompt=ready)
        assert ours == render(turns, processor.tokenizer.eos_token), turns


def test_a_chat_gives_the_tokens_of_training(processor):
    """Question and answer as one text, images expanded: the ids that `encode` gives for training."""
    for turns in conversations()[::7]:
        inputs = processor.apply_chat_template(
            messages(turns), add_generation_prompt=turns[-1].role == "user", tokenize=True, return_dict=True
        )
        assert inputs["input_ids"].tolist() == [encode(processor.tokenizer, turns, PER_IMAGE).input_ids]
        shown = sum(turn.images for turn in turns)
        assert len(inputs.get("pixel_values", [])) == shown


def test_the_mask_of_answers_is_where_the_labels_are(processor):
    """What other trainers ask for to learn from answers only."""
    turns = [Turn("user", "q1", 2), Turn("assistant", "a1 <image>"), Turn("user", "q2", 1), Turn("assistant", "a2")]
    inputs = processor.apply_chat_template(
        messages(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = encode(processor.tokenizer, turns, PER_IMAGE).labels
    assert inputs["assistant_masks"] == [[int(label != IGNORE_INDEX) for label in labels]]
    assert sum(inputs["assistant_masks"][0]) == len("a1") + len("a2") + 2


def test_content_may_be_a_string_or_parts(processor):
    parts = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
    string = [{"role": "user", "content": "what?"}]
    rendered = processor.apply_chat_template(parts, add_generation_prompt=True)
    assert rendered == processor.apply_chat_template(string, add_generation_prompt=True)
    assert rendered == "<|user|>\nwhat?<|endoftext|>\n<|assistant|>\n"


def test_images_stand_before_their_turn_wherever_they_are_shown(processor):
    text = {"type": "text", "text": "q"}
    orders = [[IMAGE, IMAGE, text], [IMAGE, text, IMAGE], [text, IMAGE, IMAGE]]
    rendered = {processor.apply_chat_template([{"role": "user", "content": order}]) for order in orders}
    assert rendered == {"<image><image><|user|>\nq<|endoftext|>\n"}


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": " Be short. "}, {"role": "user", "content": "q"}],
        [
            {"role": "system", "content": "One."},
            {"role": "developer", "content": [{"type": "text", "text": "Two."}, {"type": "text", "text": "Three."}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "more"},
        ],
        [{"role": "system", "content": ""}, {"role": "user", "content": "q"}],
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "s"},
        ],
    ],
)
def test_system_messages_and_several_texts_are_read_as_the_server_reads_them(processor, chat):
    turns, _ = read_messages(ChatRequest(model="m", messages=chat).messages, Limits(), 8)
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered == render(turns, processor.tokenizer.eos_token)


def test_the_start_of_an_answer_can_be_given(processor):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is "}]
    rendered = processor.apply_chat_template(chat, continue_final_message=True)
    assert rendered == "<|user|>\nq<|endoftext|>\n<|assistant|>\nIt is"


def test_without_the_generation_prompt_a_question_ends_where_an_answer_would_begin(processor):
    question = [{"role": "user", "content": "q"}]
    start, whole = (processor.apply_chat_template(question, add_generation_prompt=add) for add in (False, True))
    assert whole == start + "<|assistant|>\n"
    answered = processor.apply_chat_template([*question, {"role": "assistant", "content": "a"}])
    assert answered.startswith(whole)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "assistant", "content": "hi"}], "turn 0 has role assistant, expected user"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "turn 1 has role user"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "turn 1 has role system"),
        ([{"role": "system", "content": "a"}], "has no turn of the user"),
        ([{"role": "user", "content": " <image>"}], r"turn 0 \(user\) is empty"),
        ([{"role": "user", "content": []}], r"turn 0 \(user\) is empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [IMAGE]}], "only users show images"),
        ([{"role": "system", "content": [IMAGE]}, {"role": "user", "content": "a"}], "only users show images"),
        ([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "part of type video, expected text or image"),
        ([{"role": "user", "content": "<ima" * 500 + "<image>" + "ge>" * 500 + "q"}], "<image> within <image>"),
    ],
)
def test_what_the_format_has_no_place_for_is_an_error(processor, chat, message):
    with pytest.raises(TemplateError, match=message):
        processor.apply_chat_template(chat)


def test_a_prompt_ends_with_a_question_and_takes_no_tools(processor):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(TemplateError, match="a prompt ends with a user turn"):
        processor.apply_chat_template(chat, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="tools were given"):
        processor.apply_chat_template(chat[:1], tools=[{"type": "function", "function": {"name": "f"}}])


def test_the_template_is_saved_with_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
    own = MLMambaProcessor(processor.tokenizer, chat_template="{{ messages[0]['content'] }}!")
    own.save_pretrained(tmp_path)
    loaded = MLMambaProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"
