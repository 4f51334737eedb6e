"""Tokenizers whose ids depend on where a text begins: training gets the ids of inference, or they are refused."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlmamba.conversation import IGNORE_INDEX, Turn, encode, encode_whole, render
from pipelines.config import TokenizerConfig
from pipelines.sources import Record
from pipelines.tokenize import TokenizeSettings, encode_record
from pipelines.tokenizer import TOKENIZER_FILE, WorkerTokenizer, load_or_train, save
from pipelines.tokenizer_check import needs_whole_text
from tests.helpers.tiny import NEOX, NO_NEOX

TEXTS = ["What is in the image? A dog on the grass.", "yes no", "the red circle\nis blue"] * 50
TALK = [
    Turn("user", "What is in the image?", images=2),
    Turn("assistant", "A dog."),
    Turn("user", "the red circle\n\nis it?", images=1),
    Turn("assistant", "yes"),
]


def like_llama(joins: bool = False) -> Tokenizer:
    """BPE with a mark before the first word, as SentencePiece has it; with `joins`, tokens cross line ends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not joins:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    alphabet = [*map(chr, range(33, 127)), "▁", "\n", "é", "犬"]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"\n<|assistant|>\n{text}" for text in TEXTS] if joins else TEXTS, trainer)
    return tokenizer


def loaded(core: Tokenizer, folder) -> WorkerTokenizer:
    """What workers get of a named tokenizer."""
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder / "named")
    tokenizer = load_or_train(TokenizerConfig(name=str(folder / "named")), iter(()))
    save(tokenizer, str(folder / "saved"))
    return WorkerTokenizer((folder / "saved" / TOKENIZER_FILE).read_bytes(), tokenizer.eos_token)


def test_a_tokenizer_that_marks_beginnings_is_given_whole_texts(tmp_path):
    tokenizer = loaded(like_llama(), tmp_path)
    inference = tokenizer(render(TALK, "</s>", 3), add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, TALK, 3).input_ids != inference
    assert needs_whole_text(tokenizer, [TALK], "llama") is True
    encoded = encode_whole(tokenizer, TALK, 3)
    assert encoded.input_ids == inference
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert [encoded.input_ids[at : at + 3] for at in encoded.image_positions] == [[image] * 3] * 3
    prompt = tokenizer(render(TALK[:1], "</s>", 3), add_special_tokens=False)["input_ids"]
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert first == len(prompt)
    cut = encoded.turn_ends[0]
    assert encode_whole(tokenizer, TALK[:2], 3).input_ids == encoded.input_ids[:cut]
    assert encoded.turn_ends[-1] == len(encoded.input_ids)


def test_both_ways_are_one_for_a_tokenizer_that_does_not(tmp_path):
    trained = load_or_train(TokenizerConfig(train_vocab_size=300), iter(TEXTS))
    save(trained, str(tmp_path))
    tokenizer = WorkerTokenizer((tmp_path / TOKENIZER_FILE).read_bytes(), trained.eos_token)
    assert needs_whole_text(tokenizer, [TALK], "trained") is False
    assert encode_whole(tokenizer, TALK, 3) == encode(tokenizer, TALK, 3)


@pytest.mark.skipif(not NEOX.is_file(), reason=NO_NEOX)
def test_gpt_neox_is_taken_turn_by_turn(tmp_path):
    named = load_or_train(TokenizerConfig(name=str(NEOX.parent)), iter(()))
    save(named, str(tmp_path))
    tokenizer = WorkerTokenizer((tmp_path / TOKENIZER_FILE).read_bytes(), named.eos_token)
    assert needs_whole_text(tokenizer, [TALK], "neox") is False
    assert encode_whole(tokenizer, TALK, 3) == encode(tokenizer, TALK, 3)
    assert tokenizer.special_tokens == ["<|endoftext|>", "<|padding|>"]


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(tmp_path):
    tokenizer = loaded(like_llama(joins=True), tmp_path)
    with pytest.raises(ValueError, match="'joiner' joins the end of a prompt with the answer that follows"):
        needs_whole_text(tokenizer, [[Turn("user", "So?"), Turn("assistant", TEXTS[0])]], "joiner")


def test_every_special_token_in_a_message_is_control_text(tmp_path):
    tokenizer = loaded(like_llama(), tmp_path)
    assert tokenizer.special_tokens == ["</s>", "<s>", "<unk>"]
    settings = TokenizeSettings("", "", "</s>", 100, 3, "cut", whole_text=True, special_tokens=tokenizer.special_tokens)
    for mark in ("<s>", "</s>", "<unk>", "<|user|>"):
        record = Record("a", "s", [], [Turn("user", f"What is {mark}?"), Turn("assistant", "A mark.")])
        problem = encode_record(record, None, tokenizer, settings)
        assert (problem.reason, problem.detail) == ("control_text", f"turn 0 (user) holds {mark}")
    record = Record("a", "s", [], [Turn("user", "What is it?"), Turn("assistant", "A dog.")])
    encoded, images, cut = encode_record(record, None, tokenizer, settings)
    assert encoded == encode_whole(tokenizer, record.turns, 3)
    assert (images, cut) == ([], 0)
