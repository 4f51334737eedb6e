"""GGUF files: what is in them, and what cannot be written. What llama.cpp computes from them is in tests/parity."""

import json

import numpy as np
import pytest
import torch

from mlmamba.convert import convert
from mlmamba.convert.gguf_file import FORMS, write_gguf
from mlmamba.convert.language import read_language_model
from tests.helpers.checkpoints import STATE_SPACES, write_state_spaces
from tests.helpers.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from workflows.cli import main
from workflows.train.initial import save

gguf = pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path):
    save(tiny_model({"hidden_size": 32, "num_heads": 8}), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def read(file) -> tuple[dict, dict]:
    """Fields and tensors of a file, as llama.cpp computes with them."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize(("form", "close"), [("fp32", 0), ("bf16", 2**-8), ("q8_0", 2**-6)])
def test_the_language_model_of_a_model_folder_is_in_the_file_with_its_tokenizer(folder, tmp_path, form, close):
    arguments = [] if form == "fp32" else ["--precision", form]
    assert main(["convert", str(folder), str(tmp_path / "out.gguf"), *arguments]) == 0
    fields, tensors = read(tmp_path / "out.gguf")
    model, own = read_language_model(folder), tiny_tokenizer()
    assert fields["general.architecture"] == "mamba2"
    assert fields["mamba2.ssm.time_step_rank"] == model.config.num_heads
    assert len(fields["tokenizer.ggml.tokens"]) == model.config.vocab_size == VOCABULARY
    assert fields["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "<image>"]
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == (1 if len(own) == VOCABULARY else 5)
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert "generation -%" not in fields["tokenizer.chat_template"]
    expected = model.tensors["backbone.layers.0.mixer.in_proj.weight"].numpy()
    found = tensors["blk.0.ssm_in.weight"]
    assert np.abs(found - expected).max() <= close * np.abs(expected).max()
    for name, part in (("ssm_d", "D"), ("ssm_dt.bias", "dt_bias")):
        assert (tensors[f"blk.1.{name}"].flatten() == model.tensors[f"backbone.layers.1.mixer.{part}"].numpy()).all()
    a = model.tensors["backbone.layers.1.mixer.A_log"]
    assert np.allclose(tensors["blk.1.ssm_a"][:, 0], -torch.exp(a).numpy())


def test_a_state_spaces_checkpoint_takes_a_tokenizer_that_is_named(tmp_path, capsys):
    write_state_spaces(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--tokenizer", str(tmp_path)]) == 1
    assert "cannot load the tokenizer" in capsys.readouterr().err
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(arguments) == 1  # 258 tokens and 256 rows
    assert "has the id 257, the model 256 rows" in capsys.readouterr().err
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["vocab_size"] == STATE_SPACES["vocab_size"]
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob(".*.partial")]


@pytest.mark.parametrize(
    ("fields", "form", "message"),
    [
        ({"use_bias": True}, "fp32", "biases in its projections"),
        ({"time_step_limit": (0.0, 0.5)}, "fp32", "limits its time steps"),
        ({}, "int4", "expected one of fp32, bf16, q8_0"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_one_line(folder, tmp_path, fields, form, message):
    model = read_language_model(folder)
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        write_gguf(model, tmp_path / "out.gguf", form)
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob(".*.partial")]


def test_rows_of_q8_0_are_multiples_of_32(tmp_path):
    write_state_spaces(tmp_path / "a")  # of width 16
    with pytest.raises(ValueError, match="has rows of 16 weights, and q8_0 takes 32"):
        convert(tmp_path / "a", tmp_path / "a.gguf", precision="q8_0")


def test_other_tokenizers_and_a_precision_elsewhere_are_one_line(folder, tmp_path):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="GPT-2's kind only"):
        convert(folder, tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="for gguf files only"):
        convert(folder, tmp_path / "out", precision="bf16")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(folder, tmp_path / "there.gguf")
    assert set(FORMS) == {"fp32", "bf16", "q8_0"}
