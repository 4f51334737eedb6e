"""Conversations: the ids of training are the ids of inference, and loss falls on answers only.

Training tokenizes turn by turn, inference the whole string; that both agree is a property of the tokenizer, so it is
tested on the real GPT-NeoX one. The rules of the format are tested on a tokenizer of bytes, where ids are readable.
"""

import random

import pytest

from mlmamba.conversation import IGNORE_INDEX, IMAGE_TOKEN, Turn, check_turns, clean, encode, render

MESSAGES = [
    "What is in the image?",
    "  leading and trailing  ",
    "\n\tnewline and tab around\n\n",
    "Two lines\nof text",
    "an empty line\n\ninside",
    "many\n\n\n\nempty   lines   and    runs     of spaces",
    "windows\r\nlines\r\n\r\nend",
    "12345 6.78e-9, 1/3 = 0.333; 2026-11-21",
    "Grüße, naïve façade: cafe\u0301 against caf\u00e9",
    "日本語の質問。これは何ですか\uff1f",
    "שלום עולם, مرحبا",
    "🙂 emoji joined \U0001f469\u200d\U0001f467 and coloured \U0001f3f3\ufe0f\u200d\U0001f308",
    "\u200bzero width\u200b",
    "no-break\u00a0space\u3000wide\u2028separator",
    "\u0301starts with a combining mark",
    ">starts like the end of a tag<",
    "|a|b|\n|-|-|\n|1|2|",
    "def f(x):\n    return x  # code\n",
    "<|user|> and <|assistant|> as text",
    "punctuation... !!! ?? -- __init__",
    "0",
    "'s",
    "a",
]


def whole(tokenizer, turns, per_image: int = 3) -> list[int]:
    return tokenizer(render(turns, tokenizer.eos_token, per_image), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("message", MESSAGES)
def test_turn_by_turn_equals_the_whole_string(neox, message, images):
    """Every message as question, as answer, and as a later question; every other message as its neighbour."""
    other = MESSAGES[(MESSAGES.index(message) + 7) % len(MESSAGES)]
    turns = [
        Turn("user", message, images),
        Turn("assistant", message),
        Turn("user", other, images),
        Turn("assistant", message),
        Turn("user", message),
        Turn("assistant", other),
    ]
    encoded = encode(neox, turns, 3)
    assert encoded.input_ids == whole(neox, turns)
    assert encoded.input_ids.count(neox.convert_tokens_to_ids(IMAGE_TOKEN)) == 6 * images


def test_every_pair_of_messages_meets(neox):
    for first in MESSAGES:
        for second in MESSAGES:
            turns = [Turn("user", first), Turn("assistant", second)]
            assert encode(neox, turns, 3).input_ids == whole(neox, turns), (first, second)


def test_the_placeholder_is_the_first_unused_row_of_gpt_neox(neox):
    assert neox.convert_tokens_to_ids(IMAGE_TOKEN) == 50277
    assert (neox.eos_token_id, neox.pad_token_id) == (0, 0)


TURNS = [Turn("user", "q1", images=2), Turn("assistant", "a1"), Turn("user", "q2", images=1), Turn("assistant", "a2")]


def test_the_format_is_that_of_the_released_model():
    assert render(TURNS[:2], "END", 1) == "<image><image><|user|>\nq1END\n<|assistant|>\na1END"
    assert render(TURNS, "END", 1).endswith("END\n<image><|user|>\nq2END\n<|assistant|>\na2END")


def test_loss_falls_on_answers_and_their_end_only(tokenizer):
    encoded = encode(tokenizer, TURNS, 4)
    assert len(encoded.labels) == len(encoded.input_ids)
    learned = [i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    assert [encoded.labels[i] for i in learned] == [encoded.input_ids[i] for i in learned]
    assert tokenizer.decode([encoded.labels[i] for i in learned]) == "a1<|endoftext|>a2<|endoftext|>"


def test_image_positions_are_where_the_runs_start(tokenizer):
    encoded = encode(tokenizer, TURNS, 4)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert encoded.image_positions[:2] == [0, 4]
    for start in encoded.image_positions:
        assert encoded.input_ids[start : start + 4] == [image] * 4
    assert encoded.input_ids.count(image) == 12


def test_turn_ends_are_where_a_conversation_may_be_cut(tokenizer):
    encoded = encode(tokenizer, TURNS, 4)
    assert encoded.turn_ends[-1] == len(encoded.input_ids)
    cut = encoded.turn_ends[0]
    assert encoded.input_ids[:cut] == encode(tokenizer, TURNS[:2], 4).input_ids
    assert encoded.labels[:cut] == encode(tokenizer, TURNS[:2], 4).labels


def test_a_conversation_without_an_answer_teaches_nothing(tokenizer):
    encoded = encode(tokenizer, TURNS[:1], 4)
    assert set(encoded.labels) == {IGNORE_INDEX}
    assert encoded.turn_ends == []


@pytest.mark.parametrize("text", ["<image>q", "q\n<image>", "<im<image>age>q", "<ima<im<image>age>ge> q"])
def test_placeholders_in_a_message_are_taken_out(tokenizer, text):
    encoded = encode(tokenizer, [Turn("user", text, images=1), Turn("assistant", "a<image>")], 2)
    assert encoded.input_ids == encode(tokenizer, [Turn("user", "q", images=1), Turn("assistant", "a")], 2).input_ids


def taken_out_until_none_is_left(text: str) -> str:
    while IMAGE_TOKEN in text:
        text = text.replace(IMAGE_TOKEN, "")
    return text.strip()


def test_nested_placeholders_leave_what_taking_them_out_one_after_the_other_leaves():
    rng = random.Random(0)
    parts = ["<image>", "<ima", "ge>", "<", ">", "<image", "image>", "a", " ", "\n", "é"]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 30)))
        assert clean(text) == taken_out_until_none_is_left(text), text


class Searched(str):
    """A text that counts how often it, or what is left of it, is searched as a whole."""

    searches = 0

    def __contains__(self, part):
        Searched.searches += 1
        return super().__contains__(part)

    def replace(self, *arguments):
        return Searched(super().replace(*arguments))


def test_nested_placeholders_take_one_pass_over_the_text():
    def nested(depth: int) -> str:
        return "<ima" * depth + "<image>" + "ge>" * depth

    clean(Searched(nested(1000)))
    assert Searched.searches == 1  # taking them out round by round would search 1,002 times
    assert clean(nested(100_000)) == ""
    assert clean("a" + nested(1000) + "> b") == "a> b"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "has no turns"),
        ([Turn("assistant", "hi")], "turn 0 has role 'assistant', expected 'user'"),
        ([Turn("user", "a"), Turn("user", "b")], "turn 1 has role 'user', expected 'assistant'"),
        ([Turn("system", "a")], "turn 0 has role 'system'"),
        ([Turn("user", " \n")], r"turn 0 \(user\) is empty"),
        ([Turn("user", "<image>", images=1)], r"turn 0 \(user\) is empty"),
        ([Turn("user", "a"), Turn("assistant", "")], r"turn 1 \(assistant\) is empty"),
        ([Turn("user", "a"), Turn("assistant", "b", images=1)], "only users show images"),
    ],
)
def test_bad_turns_are_refused(tokenizer, turns, message):
    with pytest.raises(ValueError, match=message):
        check_turns(turns)
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, turns, 4)


def test_a_prompt_may_hold_an_image_alone_and_an_empty_answer():
    turns = [Turn("user", "", images=1), Turn("assistant", ""), Turn("user", "q")]
    check_turns(turns, asking=True)
    assert render(turns, "<e>") == "<image><|user|>\n<e>\n<|assistant|>\n<e>\n<|user|>\nq<e>\n<|assistant|>\n"
    with pytest.raises(ValueError, match="turn 0"):
        check_turns([Turn("user", "")], asking=True)
