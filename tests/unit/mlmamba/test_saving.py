"""Saving and loading: bit for bit in safetensors, whole or sharded, in every dtype and to every device map."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mlmamba.loading import load_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import images, prompt, tiny_config, tiny_model

IDS = torch.cat([prompt(14, images=1, seed=1), prompt(14, images=1, seed=2)])
HALF = (torch.bfloat16, torch.float16)
EXACT = ("A_log", "dt_bias", "D")  # float32 whatever the dtype


def assert_equal_weights(ours, theirs) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, images(2)).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_for_bit(tmp_path, tied):
    model = tiny_model({"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path)
    assert_equal_weights(loaded, model)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("language_model.lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.to_dict() == MLMambaForConditionalGeneration.from_pretrained(tmp_path).config.to_dict()


def test_a_sharded_model_loads_bit_for_bit(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path)
    assert_equal_weights(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_models_that_are_loaded_at_once_have_their_tied_weights(tmp_path):
    """A service loads the next version in a thread; transformers' own loading is not made for two at a time."""
    tiny_model({"tie_word_embeddings": True}).save_pretrained(tmp_path)
    tie = PreTrainedModel.tie_weights
    try:
        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(MLMambaForConditionalGeneration.from_pretrained, tmp_path) for _ in range(12)]
            models = [load.result() for load in loads]
        assert PreTrainedModel.tie_weights is tie
    finally:
        PreTrainedModel.tie_weights = tie
    assert all(model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in models)


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_of_half_precision_loads_bit_for_bit(tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path)
    assert_equal_weights(loaded, model)
    assert loaded.dtype == dtype


def test_an_encoder_with_buffers_that_are_not_saved_loads_too(tmp_path):
    """DINOv3's rotary frequencies are computed, not saved; transformers would leave them empty."""
    vision = {"towers": [{"model": "vit_small_patch16_dinov3", "block": 1}], "image_size": 32}
    model = tiny_model(vision_config=vision)
    assert any("rope" in name for name, _ in model.named_non_persistent_buffers())
    model.save_pretrained(tmp_path)
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.vision(images(1)), model.vision(images(1)))


def reduced(how: str, dtype: torch.dtype, folder):
    """A model of half precision, made in one of the ways there are."""
    if how == "loaded":
        tiny_model().save_pretrained(folder)
        return MLMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    if how == "loaded by name":
        tiny_model().save_pretrained(folder)
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=str(dtype).removeprefix("torch."))
    if how == "cast":
        return tiny_model().to(dtype)
    return tiny_model().bfloat16() if dtype == torch.bfloat16 else tiny_model().half()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["loaded", "loaded by name", "cast", "method"])
def test_in_half_precision_the_scan_parameters_and_the_state_stay_float32(tmp_path, how, dtype):
    model, half = tiny_model(), reduced(how, dtype, tmp_path)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    exact = {name for name, found in dtypes.items() if found == torch.float32}
    assert set(dtypes.values()) == {torch.float32, dtype}
    assert exact == {name for name in dtypes if name.rsplit(".")[-1] in EXACT}
    assert all(torch.equal(half.get_parameter(name), model.get_parameter(name)) for name in exact)
    if dtype == torch.float16:
        return  # float16 has no kernel for some encoders on a CPU
    with torch.no_grad():
        output = half(IDS, images(2))
        assert {layer.ssm.dtype for layer in output.cache_params.layers} == {torch.float32}
        assert output.logits.dtype == torch.float32
        assert_close(output.logits, logits(model), 0.1)


def test_features_of_another_float_dtype_are_taken(tmp_path):
    half = tiny_model().bfloat16()
    with torch.no_grad():
        features = half.get_image_features(images(2))
        assert torch.equal(half(IDS, image_features=features.float()).logits, logits(half))


@pytest.mark.parametrize(
    "where", ["cpu", "auto", {"": "cpu"}, {"vision": "cpu", "connector": "cpu", "language_model": "cpu"}], ids=str
)
def test_a_device_map_places_the_model(tmp_path, where):
    pytest.importorskip("accelerate")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path, device_map=where)
    assert torch.equal(logits(loaded), logits(model))
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, pixel_values=images(2), **options)
    assert torch.equal(loaded.generate(IDS, pixel_values=images(2), **options), expected)


def test_offloading_is_refused(tmp_path):
    """accelerate brings offloaded weights when a module's forward is called; the scans read them elsewhere."""
    pytest.importorskip("accelerate")
    tiny_model().save_pretrained(tmp_path)
    where = {"vision": "cpu", "connector": "cpu", "language_model": "disk"}
    with pytest.raises(ValueError, match="the device map puts parts on cpu, disk, which offloads some"):
        MLMambaForConditionalGeneration.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "off")


def divided(model, classes: list[str]) -> set[str]:
    """Which parts some device map divides, over many sizes of the first of two devices."""
    accelerate = pytest.importorskip("accelerate")
    parts = ("vision", "connector", "language_model.backbone.layers.0", "language_model.backbone.layers.1")
    total, found = sum(p.nbytes for p in model.parameters()), set()
    for tenth in range(1, 20):
        sizes = {0: total * tenth // 20, 1: 10 * total}
        placed = accelerate.infer_auto_device_map(model, sizes, no_split_module_classes=classes)
        found |= {part for part in parts if any(name.startswith(f"{part}.") for name in placed)}
    return found


def test_a_device_map_divides_no_block():
    model = tiny_model()
    assert divided(model, []) >= {"vision", "connector"}
    assert divided(model, list(model._no_split_modules)) == set()


def test_a_model_is_sized_on_the_meta_device():
    with torch.device("meta"):
        model = MLMambaForConditionalGeneration(tiny_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.num_parameters() == tiny_model().num_parameters()


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: there is no config\.json in it"):
        load_model(tmp_path)
