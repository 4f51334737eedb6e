"""The released ML-Mamba layout: a checkpoint of it becomes a model that computes what the release computes.

`Released` is the released connector written out step by step from paper.md 1.4, on the checkpoint's own names.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Mamba2ForCausalLM

from mlmamba.convert import convert
from mlmamba.convert.released import config_of, connector_tensors, convert_released, language_tensors
from mlmamba.loading import load_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import PRESETS
from mlmamba.tensor_files import check_tensors
from mlmamba.vision import VisionEncoder
from tests.helpers.checkpoints import meta, random, released
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import images, prompt, tiny_tokenizer
from workflows.cli import main

VISION = PRESETS["tiny"]["vision"]
CHANNELS, D, ROWS, STATE, HEAD = 64, 16, 264, 8, 8


@pytest.fixture
def files(tmp_path):
    """A released checkpoint, its tokenizer and its encoder's weights, as arguments of `convert`."""
    groups = released(random(), CHANNELS, D, 2, ROWS, STATE, HEAD)
    torch.save({"model": groups}, tmp_path / "latest-checkpoint.pt")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(3)
    vision = VisionEncoder(config_of(groups, VISION, "here").vision_config)
    save_file(vision.towers[0].model.state_dict(), tmp_path / "vit.safetensors")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "preset": "tiny"}
    return groups, tmp_path / "latest-checkpoint.pt", {**options, "vision_weights": [str(tmp_path / "vit.safetensors")]}


class Released:
    """The released connector on features (N, channels) of one image."""

    def __init__(self, groups: dict):
        self.mlp, self.scan, self.projector = (groups[n] for n in ("mlp", "bidirectional_mamba", "projector"))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(F.linear(x, self.mlp["0.weight"], self.mlp["0.bias"]))
        for i in range(2):
            p = {n.removeprefix(f"layers.{i}."): t for n, t in self.scan.items() if n.startswith(f"layers.{i}.")}
            zxbcdt = h @ p["mixer.in_proj.weight"].T
            both = self.direction(p, zxbcdt, "") + self.direction(p, zxbcdt.flip(0), "_b").flip(0)
            h = h + both / 2 @ p["mixer.out_proj.weight"].T
            n = F.layer_norm(h, (D,), p["norm.weight"], p["norm.bias"])
            gated = F.silu(self.linear(p, "w1", n)) * self.linear(p, "w2", n)
            h = h + self.linear(p, "w3", gated)
        h = F.layer_norm(h, (D,), self.scan["norm_f.weight"], self.scan["norm_f.bias"])
        for layer in (0, 2, 4):
            h = F.linear(h, self.projector[f"projector.{layer}.weight"], self.projector[f"projector.{layer}.bias"])
            h = F.gelu(h) if layer < 4 else h
        return h

    @staticmethod
    def linear(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, p[f"mlp.{name}.weight"], p[f"mlp.{name}.bias"])

    @staticmethod
    def direction(p: dict, zxbcdt: torch.Tensor, suffix: str) -> torch.Tensor:
        inner, heads = 2 * D, 2 * D // HEAD
        z, xbc, dt = zxbcdt.split([inner, inner + 2 * STATE, heads], dim=-1)
        dt = F.softplus(dt + p[f"mixer.dt_bias{suffix}"])
        a, skip = -p[f"mixer.A_log{suffix}"].exp(), p[f"mixer.D{suffix}"]
        weight, bias = p[f"mixer.conv1d{suffix}.weight"][:, 0], p[f"mixer.conv1d{suffix}.bias"]
        memory, outputs = torch.zeros(heads, HEAD, STATE), []
        for t in range(len(xbc)):
            window = torch.cat([torch.zeros(3, xbc.shape[1]), xbc[: t + 1]])[-4:]
            x, b, c = F.silu((window * weight.T).sum(0) + bias).split([inner, STATE, STATE])
            x = x.view(heads, HEAD)
            decay = (dt[t] * a).exp()[:, None, None]
            memory = memory * decay + (dt[t][:, None] * x)[..., None] * b
            y = (memory @ c + skip[:, None] * x).flatten() * F.silu(z[t])
            outputs.append(y * torch.rsqrt(y.square().mean() + 1e-5) * p["mixer.norm.weight"])
        return torch.stack(outputs)


@torch.no_grad()
def test_a_released_checkpoint_becomes_a_model_that_computes_the_same(tmp_path, files):
    groups, file, options = files
    done = convert(file, tmp_path / "out", **options)
    assert (done.source_layout, done.layout) == ("released", "mlmamba")
    model, processor = load_model(tmp_path / "out", "cpu")
    assert done.parameters == model.num_parameters()

    features = torch.randn(2, 4, CHANNELS)
    expected = torch.stack([Released(groups)(image) for image in features])
    assert_close(model.connector(features, (2, 2)), expected, 1e-4, "connector")

    language = Mamba2ForCausalLM(model.config.text_config).eval()
    language.load_state_dict(groups["llm_backbone"])
    ids = prompt(9)
    assert_close(model(ids).logits, language(ids).logits, 1e-4, "language model")

    assert (processor.image_token_id, processor.tokens_per_image, processor.max_length) == (1, 4, 2777)
    assert model.config.image_token_id == 1
    assert model.config.connector_config.layout == "released"
    assert model(prompt(9, images=1), images(1)).logits.shape == (1, 9, ROWS)


@torch.no_grad()
def test_the_encoder_has_the_weights_of_its_file(tmp_path, files):
    _, file, options = files
    convert(file, tmp_path / "out", **options)
    model, _ = load_model(tmp_path / "out", "cpu")
    own = model.vision.towers[0].model.state_dict()
    assert all(torch.equal(own[name], t) for name, t in load_file(options["vision_weights"][0]).items())


def test_a_vision_tower_in_the_checkpoint_is_used(tmp_path, files):
    """As after full fine-tuning: one state dict for both encoders."""
    _, _, options = files
    vision = {"towers": [{"model": "test_vit", "block": -2}, {"model": "test_vit2", "block": -2}], "image_size": 32}
    groups = released(random(), 2 * CHANNELS, D, 1, ROWS, STATE, HEAD)
    torch.manual_seed(5)
    towers = VisionEncoder(config_of(groups, vision, "here").vision_config).towers
    groups["vision_backbone"] = {
        f"{prefix}{name}": value
        for prefix, tower in zip(("dino_featurizer.", "siglip_featurizer."), towers, strict=True)
        for name, value in tower.model.state_dict().items()
    }
    torch.save({"model": groups, "optimizer": {"step": 3}}, tmp_path / "c.pt")
    convert_released(tmp_path / "c.pt", tmp_path / "out", options["tokenizer"], vision)
    model, _ = load_model(tmp_path / "out", "cpu")
    for ours, theirs in zip(model.vision.towers, towers, strict=True):
        assert all(torch.equal(ours.model.state_dict()[n], t) for n, t in theirs.model.state_dict().items())


def test_the_published_sizes_fit_exactly():
    """On the meta device: 184.4M in the connector and 2702.6M in the language model."""
    groups = released(meta, 2176, 2560, 64, 50_288, 128, 64)
    config = config_of(groups, PRESETS["2.7b"]["vision"], "here")
    assert (config.text_config.num_heads, config.text_config.num_hidden_layers) == (80, 64)
    with torch.device("meta"):
        model = MLMambaForConditionalGeneration(config)
    check_tensors(connector_tensors(groups), model.connector.state_dict(), "connector")
    check_tensors(language_tensors(groups), model.language_model.state_dict(), "language model")
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.connector, model.language_model)]
    assert sizes == [184_405_440, 2_702_599_680]


def drop(group: str, *names: str):
    return lambda groups: [groups[group].pop(name) for name in names]


def add(group: str, name: str):
    return lambda groups: groups[group].update({name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("mlp"), r"'model' should hold llm_backbone, .*; missing \['mlp'\], unexpected \[\]"),
        (lambda g: g.update(lora={}), r"missing \[\], unexpected \['lora'\]"),
        (drop("bidirectional_mamba", "layers.1.mixer.D_b", "norm_f.bias"), r"2 of \d+ tensors are missing, first "),
        (drop("mlp", "0.weight"), r"it has no 'mlp.0.weight'"),
        (drop("llm_backbone", "backbone.embedding.weight"), "it has no 'backbone.embeddings.weight'"),
        (add("projector", "projector.lora"), r"1 are unexpected, first \['connector.projector.lora'\]"),
        (add("bidirectional_mamba", "layers.2.mixer.D"), r"first \['connector.layers.2.mixer.scans.0.D'\]"),
        (lambda g: g["mlp"].update({"0.weight": torch.zeros(D, 65)}), "takes 65 vision channels; .* give 64"),
        (lambda g: g["llm_backbone"].update({"lm_head.weight": torch.zeros(ROWS, D)}), "but here they differ"),
        (lambda g: g["llm_backbone"].update({"backbone.embedding.weight": torch.zeros(50, D)}), "has 258 entries"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, files, change, message):
    groups, file, options = files
    if "258" in message:
        groups["llm_backbone"]["lm_head.weight"] = torch.zeros(50, D)
    change(groups)
    torch.save({"model": groups}, file)
    before = sorted(f.name for f in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "out", **options)
    assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_names_with_the_prefix_of_ddp_are_read_too(files):
    groups, *_ = files
    prefixed = {**groups, "llm_backbone": {f"llm.{name}": t for name, t in groups["llm_backbone"].items()}}
    assert language_tensors(prefixed).keys() == language_tensors(groups).keys()


def test_other_files_and_arguments_are_refused(tmp_path, files):
    _, file, options = files
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a released ML-Mamba checkpoint"):
        convert(tmp_path / "other.pt", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="which becomes mlmamba; convert it to that first"):
        convert(file, tmp_path / "out", "transformers", **options)
    with pytest.raises(ValueError, match=r"2 files of vision weights were given for 1 encoders \['test_vit'\]"):
        convert(file, tmp_path / "out", **{**options, "vision_weights": ["a", "b"]})
    with pytest.raises(FileNotFoundError, match="no weights for test_vit at nowhere"):
        convert(file, tmp_path / "out", **{**options, "vision_weights": ["nowhere"]})
    with pytest.raises(ValueError, match="unknown preset '3b'"):
        convert(file, tmp_path / "out", **{**options, "preset": "3b"})
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        convert(file, tmp_path / "out", **{**options, "tokenizer": str(tmp_path)})


def test_the_command_and_its_way_on_to_transformers(tmp_path, files, capsys):
    groups, file, options = files
    out = str(tmp_path / "out")
    arguments = [
        "--tokenizer",
        options["tokenizer"],
        "--preset",
        "tiny",
        "--vision-weights",
        options["vision_weights"][0],
    ]
    assert main(["convert", str(file), out, *arguments]) == 0, capsys.readouterr().err
    assert f"{out}: mlmamba, " in capsys.readouterr().out
    assert main(["convert", out, str(tmp_path / "lm")]) == 0
    language = Mamba2ForCausalLM.from_pretrained(tmp_path / "lm")
    assert torch.equal(language.lm_head.weight, groups["llm_backbone"]["lm_head.weight"])
    assert (tmp_path / "lm" / "tokenizer.json").exists()
