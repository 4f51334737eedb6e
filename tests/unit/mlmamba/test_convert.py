"""Language models between the layouts of state-spaces, transformers and ours: every bit, strictly, whole or not at all.

What transformers computes with the results is in tests/parity/test_convert_transformers.py; the released ML-Mamba
layout in test_convert_released.py.
"""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from mlmamba.convert import convert, load_language_model, read_language_model
from mlmamba.convert.layouts import from_state_spaces, to_state_spaces
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.presets import SIZES, preset
from tests.helpers.checkpoints import STATE_SPACES, language, meta, write_state_spaces
from tests.helpers.tiny import tiny_model
from workflows.cli import main

EMBEDDING, SINGULAR, HEAD = "backbone.embeddings.weight", "backbone.embedding.weight", "lm_head.weight"


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], value) and ours[name].dtype == value.dtype for name, value in theirs.items()
    )


def by_transformers_names(tensors: dict) -> dict:
    return {EMBEDDING if name == SINGULAR else name: t for name, t in tensors.items() if name != HEAD}


def published(blocks: int, width: int) -> dict:
    """config.json of a published size."""
    return STATE_SPACES | {
        "d_model": width,
        "n_layer": blocks,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
    }


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes_are_our_presets_tensor_by_tensor(name):
    config = from_state_spaces(published(*SIZES[name]))
    ours = preset(name).text_config
    for field in (
        "vocab_size",
        "hidden_size",
        "num_heads",
        "head_dim",
        "state_size",
        "expand",
        "n_groups",
        "conv_kernel",
    ):
        assert getattr(config, field) == getattr(ours, field), field
    theirs = language(meta, SIZES[name][1], SIZES[name][0], 50_288, 128, 64)
    theirs[EMBEDDING] = theirs.pop(SINGULAR)
    with torch.device("meta"):
        own = Mamba2LanguageModel(config).state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs.items()}
    if name == "2.7b":
        assert sum(t.numel() for n, t in theirs.items() if n != HEAD) == 2_702_599_680


@pytest.mark.parametrize("name", SIZES)
def test_a_published_config_comes_back_with_its_padded_vocabulary(name):
    original = published(*SIZES[name])
    assert to_state_spaces(from_state_spaces(original)) == original | {"vocab_size": 50_288}


def test_every_field_of_ssm_cfg_goes_to_transformers_and_back():
    ssm = {"layer": "Mamba2", "d_state": 16, "d_conv": 3, "expand": 4, "headdim": 8, "ngroups": 2, "chunk_size": 8}
    ssm |= {"bias": True, "conv_bias": False, "dt_limit": [0.01, 0.5], "dt_min": 0.01, "dt_max": 0.2}
    ssm |= {"dt_init_floor": 1e-3}
    original = STATE_SPACES | {"ssm_cfg": ssm, "vocab_size": 256, "residual_in_fp32": False, "tie_embeddings": False}
    config = from_state_spaces(original)
    assert (config.num_heads, config.n_groups, config.time_step_limit) == (8, 2, (0.01, 0.5))
    assert to_state_spaces(config) == original


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_state_spaces_to_transformers_and_back_keeps_every_bit(tmp_path, dtype):
    tensors = write_state_spaces(tmp_path / "a", dtype)
    done = convert(tmp_path / "a", tmp_path / "b")
    assert (done.source_layout, done.layout) == ("state-spaces", "transformers")
    assert done.parameters == sum(t.numel() for name, t in tensors.items() if name != HEAD)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["dtype"]) == ("mamba2", 256, str(dtype)[6:])
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert equal(found, by_transformers_names(tensors))

    convert(tmp_path / "b", tmp_path / "c", "state-spaces", torch_file=True)
    assert equal(load_file(tmp_path / "c" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == STATE_SPACES | {"vocab_size": 256}
    by_torch = torch.load(tmp_path / "c" / "pytorch_model.bin", weights_only=True)
    assert equal(by_torch, tensors)
    assert by_torch[HEAD].data_ptr() == by_torch[SINGULAR].data_ptr()


@pytest.mark.parametrize("form", ["bin", "safetensors", "safetensors without the head", "sharded bin"])
def test_every_form_of_a_state_spaces_checkpoint_is_read(tmp_path, form):
    tensors = write_state_spaces(tmp_path)
    if form != "bin":
        (tmp_path / "pytorch_model.bin").unlink()
    if form.startswith("safetensors"):
        tensors[HEAD] = tensors[HEAD].clone()
        if form.endswith("head"):
            del tensors[HEAD]
        save_file(tensors, tmp_path / "model.safetensors")
    if form == "sharded bin":
        names = sorted(tensors)
        places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({n: tensors[n] for n in names if places[n] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    model = read_language_model(tmp_path)
    assert equal(model.tensors, by_transformers_names(tensors))


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_of_a_model_folder_is_taken_out(tmp_path, tied):
    model = tiny_model({"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "out")
    assert (done.source_layout, done.layout) == ("mlmamba", "transformers")
    own = {name: t for name, t in model.language_model.state_dict().items() if not (tied and name == HEAD)}
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), own)
    convert(tmp_path / "ours", tmp_path / "ss", "state-spaces")
    assert equal(read_language_model(tmp_path / "ss").tensors, own)


def test_weights_go_into_a_model_whose_vocabulary_is_larger(tmp_path):
    tensors = write_state_spaces(tmp_path)
    model = tiny_model()  # 264 rows
    before = model.get_input_embeddings().weight.detach().clone()
    load_language_model(model.language_model, read_language_model(tmp_path))
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:256], tensors[SINGULAR])
    assert torch.equal(after[256:], before[256:])
    assert model.get_output_embeddings().weight is after
    name = "backbone.layers.1.mixer.A_log"
    assert torch.equal(model.language_model.state_dict()[name], tensors[name])


def test_weights_do_not_go_into_a_model_that_they_do_not_fit(tmp_path):
    write_state_spaces(tmp_path / "a")
    source = read_language_model(tmp_path / "a")
    with pytest.raises(ValueError, match="has a vocabulary of 256 rows, more than the model's 128"):
        load_language_model(tiny_model({"vocab_size": 128}).language_model, source)
    with pytest.raises(ValueError, match=r"does not fit: 9 of 30 tensors are missing, first \['backbone.layers.2"):
        load_language_model(tiny_model({"num_hidden_layers": 3}).language_model, source)
    write_state_spaces(tmp_path / "b", tie_embeddings=False)
    with pytest.raises(ValueError, match="has a language head of its own, and the model ties it"):
        load_language_model(tiny_model().language_model, read_language_model(tmp_path / "b"))


def test_missing_unexpected_and_misshapen_tensors_are_named_and_nothing_is_written(tmp_path):
    tensors = write_state_spaces(tmp_path / "a")
    del tensors["backbone.layers.1.mixer.D"], tensors["backbone.layers.0.norm.weight"]
    tensors["backbone.layers.1.mixer.A_log"] = torch.zeros(5)
    tensors["backbone.layers.0.mixer.x_proj.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "a" / "pytorch_model.bin")
    message = (
        r"2 of 20 tensors are missing, first \['backbone.layers.0.norm.weight', 'backbone.layers.1.mixer.D'\]; "
        r"1 are unexpected, first \['backbone.layers.0.mixer.x_proj.weight'\]; 1 of another shape, first "
        r"backbone.layers.1.mixer.A_log is \(5,\), not \(4,\)"
    )
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a", tmp_path / "b")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(tmp_path):
    tensors = write_state_spaces(tmp_path)
    torch.save({**tensors, HEAD: tensors[HEAD] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"the config ties lm_head.weight to backbone.embeddings.weight, but they differ"
    ):
        read_language_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {}}, "layer is 'Mamba1'; this library's Mamba-2 has 'Mamba2' only"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_stat": 8}}, r"ssm_cfg has 1 fields that are not known, first \['d_stat'\]"),
        ({"attn_layer_idx": [3, 9]}, r"attn_layer_idx is \[3, 9\]"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"bidirectional": True}, r"1 fields that are not known, first \['bidirectional'\]"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, message):
    write_state_spaces(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_language_model(tmp_path)


def test_a_transformers_model_that_ours_cannot_follow_is_refused(tmp_path):
    Mamba2Config(hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        read_language_model(tmp_path)
    config = from_state_spaces(STATE_SPACES)
    config.layer_norm_epsilon = 1e-6
    with pytest.raises(ValueError, match="layer_norm_epsilon is 1e-06; mamba_ssm has 1e-05 built in"):
        to_state_spaces(config)


def test_what_is_no_language_model_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_language_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model: there is no config\.json"):
        read_language_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="describes no Mamba-2 language model: model_type is 'llama'"):
        read_language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(STATE_SPACES))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_language_model(tmp_path)


def test_what_is_at_the_destination_stays(tmp_path):
    write_state_spaces(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("data")
    with pytest.raises(FileExistsError, match="exists already; delete it or choose another place"):
        convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "precious").read_text() == "data"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


def test_a_tokenizer_goes_along(tmp_path):
    write_state_spaces(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"


def test_a_hub_name_is_looked_up_in_the_hubs_cache(tmp_path, monkeypatch):
    """What a download leaves behind, without the download."""
    repository = tmp_path / "models--state-spaces--mamba2-tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    tensors = write_state_spaces(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = read_language_model("state-spaces/mamba2-tiny")
    assert torch.equal(model.tensors[EMBEDDING], tensors[SINGULAR])
    with pytest.raises(
        FileNotFoundError, match="state-spaces/mamba2-none is neither a folder nor a model that the hub"
    ):
        read_language_model("state-spaces/mamba2-none")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("mlmamba", "an ML-Mamba also needs encoders and a connector: name it in a recipe as model.text.weights"),
        ("onnx", "unknown layout 'onnx'; choose one of mlmamba, transformers, state-spaces, gguf"),
    ],
)
def test_conversions_that_do_not_exist_are_refused(tmp_path, to, message):
    write_state_spaces(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a", tmp_path / "b", to)


def test_the_command(tmp_path, capsys):
    write_state_spaces(tmp_path / "a")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["convert", a, b, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"source_layout": "state-spaces", "layout": "transformers", "parameters": 8424, "folder": b}
    assert isinstance(Mamba2ForCausalLM.from_pretrained(b), Mamba2ForCausalLM)
    assert main(["convert", b, c, "--to", "state-spaces"]) == 0
    assert capsys.readouterr().out == f"{c}: state-spaces, 8,424 parameters (from transformers)\n"
    assert main(["convert", b, c]) == 1
    assert "convert: " + c + " exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["convert", a, c, "--to", "onnx"])
    assert stop.value.code == 2
