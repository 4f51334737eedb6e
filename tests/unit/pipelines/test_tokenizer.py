"""The tokenizer: trained ones are reproducible, named ones are completed, and workers get the same ids."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlmamba.conversation import Turn, encode, render
from pipelines.config import TokenizerConfig
from pipelines.tokenizer import END_TOKEN, TOKENIZER_FILE, WorkerTokenizer, digest, load_or_train, save
from tests.helpers.tiny import NEOX, NO_NEOX

TEXTS = ["what is the blue shape?", "a rectangle", "is there a red circle in the image?", "yes", "no"] * 20
TURNS = [
    Turn("user", "what is the blue shape?", images=2),
    Turn("assistant", "a rectangle, é\U0001f600"),
    Turn("user", "is there a\n\nred circle?", images=1),
    Turn("assistant", "yes"),
]


def trained(texts=TEXTS) -> PreTrainedTokenizerFast:
    return load_or_train(TokenizerConfig(train_vocab_size=300), iter(texts))


def worker(folder, tokenizer) -> WorkerTokenizer:
    return WorkerTokenizer((Path(folder) / TOKENIZER_FILE).read_bytes(), tokenizer.eos_token)


def test_a_trained_tokenizer(tmp_path):
    tokenizer = trained()
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)
    assert 260 < len(tokenizer) <= 300
    text = "unseen: Ünïcode \U0001f600\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    assert save(tokenizer, str(tmp_path / "a")) == save(trained(), str(tmp_path / "b")) == digest(str(tmp_path / "a"))
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert {TOKENIZER_FILE, "tokenizer_config.json"} <= names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("what<image>")["input_ids"][-1] == 3


def test_training_and_inference_agree():
    tokenizer = trained()
    whole = tokenizer(render(TURNS, tokenizer.eos_token, 4), add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, TURNS, 4).input_ids == whole


def test_workers_get_the_ids_that_transformers_gives(tmp_path):
    tokenizer = trained()
    save(tokenizer, str(tmp_path))
    assert encode(worker(tmp_path, tokenizer), TURNS, 4) == encode(tokenizer, TURNS, 4)


def test_a_named_tokenizer_gets_what_it_lacks(tmp_path):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens([END_TOKEN])
    core.add_tokens(sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.enable_truncation(5)  # a setting that a saved file may carry, and that must not cut a corpus
    PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=["a"]).save_pretrained(tmp_path / "bare")

    tokenizer = load_or_train(TokenizerConfig(name=str(tmp_path / "bare")), iter(()))
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END_TOKEN, END_TOKEN)
    assert tokenizer.convert_tokens_to_ids("<image>") == 257
    assert "a" in tokenizer.all_special_tokens
    save(tokenizer, str(tmp_path / "saved"))
    ours, theirs = worker(tmp_path / "saved", tokenizer), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert encode(ours, TURNS, 4) == encode(theirs, TURNS, 4) == encode(tokenizer, TURNS, 4)


@pytest.mark.skipif(not NEOX.is_file(), reason=NO_NEOX)
def test_gpt_neox(tmp_path):
    tokenizer = load_or_train(TokenizerConfig(name=str(NEOX.parent)), iter(()))
    assert tokenizer.convert_tokens_to_ids("<image>") == 50277
    assert len(tokenizer) <= 50288
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    save(tokenizer, str(tmp_path))
    assert encode(worker(tmp_path, tokenizer), TURNS, 4) == encode(tokenizer, TURNS, 4)


def test_names_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_or_train(TokenizerConfig(name=str(tmp_path / "nothing")), iter(()))
    core = Tokenizer(models.BPE())
    core.add_tokens(["a", "b"])
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"has neither an eos token nor <\|endoftext\|>"):
        load_or_train(TokenizerConfig(name=str(tmp_path / "endless")), iter(()))
