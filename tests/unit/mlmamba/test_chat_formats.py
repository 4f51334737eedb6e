"""Granite's chat format: written as documented, the same ids in training and inference, kept with the model."""

import logging

import pytest
from transformers import AutoTokenizer

from mlmamba.conversation import (
    FORMATS,
    GRANITE,
    IGNORE_INDEX,
    ML_MAMBA,
    Turn,
    encode,
    encode_whole,
    format_of,
    render,
    set_format,
)
from mlmamba.processing import MLMambaProcessor
from mlmamba.state_cache import Places
from pipelines.config import TokenizerConfig
from pipelines.sources.entries import with_system
from pipelines.tokenizer import TOKENIZER_FILE, WorkerTokenizer, chat_format, load_or_train, save
from pipelines.tokenizer_check import needs_whole_text
from tests.helpers.tiny import granite_tokenizer, tiny_tokenizer
from workflows.serve.messages import read_messages
from workflows.serve.openai import ChatRequest
from workflows.serve.options import Limits

END, USER, ASSISTANT = "<|end_of_text|>", GRANITE.user, GRANITE.assistant
TALK = [
    Turn("user", " one? ", images=2),
    Turn("assistant", "1"),
    Turn("user", "two\n\n?", images=1),
    Turn("assistant", "2"),
]
TEXTS = [
    "q",
    "  spaces \n",
    "two\n\nlines",
    "Gr\u00fc\u00dfe \u65e5\u672c\u8a9e \U0001f642",
    "<|user|>\n",
    "<image>q",
    "0",
    "|>",
]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Folder of a tokenizer as Granite's come."""
    folder = tmp_path_factory.mktemp("granite") / "their"
    granite_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(named, tmp_path_factory):
    """The same as a data set has it."""
    folder = tmp_path_factory.mktemp("data") / "tokenizer"
    save(load_or_train(TokenizerConfig(name=named, chat="granite"), ()), str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return MLMambaProcessor(tokenizer, image_size=32, tokens_per_image=3, max_length=1000)


def conversations() -> list[list[Turn]]:
    """Every text as question, as answer and as a later question, with and without images and a system's message."""
    for number, text in enumerate(TEXTS):
        other = TEXTS[number - 3]
        for images in (0, 2):
            turns = [Turn("user", text, images), Turn("assistant", other), Turn("user", other, images)]
            yield [*turns, Turn("assistant", text)]
            yield with_system([*turns, Turn("assistant", text)], f"Be {text} brief.")


def test_a_conversation_is_written_as_granites_documentation_says():
    assert render([Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "Why?")], END, chat=GRANITE) == (
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Ho<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    )
    system = f"<|start_of_role|>system<|end_of_role|>Be brief.{END}\n"
    (asked,) = with_system([Turn("user", " Hi ", images=1)], "Be brief.")
    assert render([asked], END, 2, GRANITE) == f"<image><image>{system}{USER}Hi{END}\n{ASSISTANT}"
    assert render([asked], "E", 1) == "<image><|user|>\nBe brief.\n\nHiE\n<|assistant|>\n"


def test_training_and_inference_have_the_same_ids(tokenizer, folder):
    worker = WorkerTokenizer((folder / TOKENIZER_FILE).read_bytes(), tokenizer.eos_token, "granite")
    for turns in conversations():
        text = render(turns, END, 3, GRANITE)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode(tokenizer, turns, 3) == encode(worker, turns, 3) == encode_whole(worker, turns, 3)
        assert encode(worker, turns, 3).input_ids == ids
        prompt = tokenizer(render(turns[:3], END, 3, GRANITE), add_special_tokens=False)["input_ids"]
        assert ids[: len(prompt)] == prompt
    assert not needs_whole_text(worker, conversations(), "granite")


def test_a_role_is_three_tokens_and_loss_falls_on_answers_and_their_end(tokenizer):
    encoded = encode(tokenizer, TALK, 3)
    learned = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == f"1{END}2{END}"
    start, end = tokenizer.convert_tokens_to_ids(list(GRANITE.marks))
    assert (encoded.input_ids.count(start), encoded.input_ids.count(end)) == (4, 4)
    assert encoded.image_positions[:2] == [0, 3]


def test_the_format_stays_with_tokenizer_and_model(folder, tokenizer, processor, tmp_path):
    assert format_of(tokenizer) is chat_format(str(folder)) is GRANITE
    processor.save_pretrained(tmp_path)
    again = MLMambaProcessor.from_pretrained(tmp_path)
    assert format_of(again.tokenizer) is GRANITE
    assert again.prompt(TALK[:1]) == processor.prompt(TALK[:1]) == render(TALK[:1], END, chat=GRANITE)
    assert format_of(granite_tokenizer()) is ML_MAMBA


def test_the_exported_templates_write_what_the_model_was_trained_on(tokenizer, processor):
    """The tokenizer's own, for tools that know text alone, and the processor's."""
    for turns in conversations():
        for shown in (turns, turns[:3]):
            ready = shown[-1].role == "user"
            chat = [
                {
                    "role": t.role,
                    "content": [{"type": "image"}] * t.images + [{"type": "text", "text": t.text[t.instructions :]}],
                }
                for t in shown
            ]
            if instructions := shown[0].text[: shown[0].instructions]:
                chat.insert(0, {"role": "system", "content": instructions})
            expected = render(shown, END, chat=GRANITE)
            assert processor.apply_chat_template(chat, add_generation_prompt=ready) == expected
            assert tokenizer.apply_chat_template(chat, add_generation_prompt=ready, tokenize=False) == expected
            if instructions and not shown[0].images and "<image>" not in shown[0].text:
                request = [
                    m | {"content": "".join(p.get("text", "") for p in m["content"])} for m in chat[1:] if m["content"]
                ]
                sent = ChatRequest(model="m", messages=[chat[0], *request]).messages
                if ready and not any(t.images for t in shown):
                    assert processor.prompt(read_messages(sent, Limits(), 8)[0]) == expected


def test_kept_states_are_found_after_images_instructions_and_where_answers_begin_and_end(processor):
    places, tokenizer = Places(processor), processor.tokenizer
    (first,) = with_system([Turn("user", "Hi", images=1)], "Be brief and kind, and say what you see. " * 2)
    turns = [first, Turn("assistant", "Ho"), Turn("user", "Why?")]
    text = processor.prompt(turns)
    ids = processor.tokenize([text])["input_ids"][0].tolist()
    found = {place.length for place in places.of(ids, [b"image"], first)}
    texts = {tokenizer.decode(ids[3:length]) for length in found}
    system = f"{GRANITE.system}{first.text[: first.instructions].strip()}"
    asked = f"{system}{END}\n{USER}Hi{END}\n{ASSISTANT}"
    assert {"", system, asked, f"{asked}Ho", f"{asked}Ho{END}", text.removeprefix("<image>")} <= texts


def test_a_tokenizer_without_the_marks_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^the chat format 'granite' needs <\|start_of_role\|> and .* lacks .*; choose"
    ):
        load_or_train(TokenizerConfig(name=str(tmp_path), chat="granite"), ())
    with pytest.raises(ValueError, match="chat is 'granite', and a tokenizer that is trained here has no such marks"):
        TokenizerConfig(train_vocab_size=300, chat="granite")
    other = tiny_tokenizer()
    other.init_kwargs["chat_format"] = "llama"
    with pytest.raises(ValueError, match="is for the chat format 'llama'; known are ml-mamba, granite"):
        MLMambaProcessor(other, tokens_per_image=3)
    set_format(tiny_tokenizer(), FORMATS["ml-mamba"])


def test_marks_that_are_not_used_are_pointed_out_and_the_template_is_that_of_training(named, caplog):
    with caplog.at_level(logging.WARNING, "mlmamba"):
        plain = load_or_train(TokenizerConfig(name=named), ())
    assert "has the marks of the chat format granite; data.tokenizer.chat: granite would use them" in caplog.text
    chat = [{"role": "user", "content": "Hi"}]
    written = plain.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert written == render([Turn("user", "Hi")], END)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlmamba"):
        load_or_train(TokenizerConfig(name=named, chat="granite"), ())
    assert not caplog.text
