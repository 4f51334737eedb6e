"""The precision of a model that answers: which weights stay float32, and what the answers are then."""

import pytest
import torch

from mlmamba import loading
from mlmamba.conversation import Turn
from mlmamba.decoding import prepare
from mlmamba.loading import load_model
from mlmamba.ops.packed import PackedLinear
from tests.helpers.images import encoded, image
from tests.helpers.serving import save_tiny
from workflows.evaluate.collect import Workers
from workflows.serve.engine import Engine
from workflows.serve.sampling import Settings

KEPT = ("A_log", "D", "dt_bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("precision") / "tiny")


def test_in_bf16_what_decides_how_a_state_decays_stays_float32(folder):
    whole, _ = load_model(folder, precision="fp32")
    model, _ = load_model(folder, precision="bf16")
    exact = dict(whole.named_parameters())
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    kept = {name for name, kind in kinds.items() if kind == torch.float32}
    assert kept == {name for name in kinds if name.rpartition(".")[2] in KEPT}
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, exact[name])  # and was not rounded on the way
        else:
            assert parameter.dtype == torch.bfloat16


@torch.inference_mode()
def test_in_bf16_state_and_logits_are_float32_and_close(folder):
    outputs = []
    for precision in ("fp32", "bf16"):
        model, processor = load_model(folder, precision=precision)
        turns = [Turn("user", "what is shown?", images=1)]
        outputs.append(model(**processor(images=image(1), text=processor.prompt(turns)), use_cache=True))
    exact, rounded = (output.logits for output in outputs)
    assert rounded.dtype == torch.float32
    assert all(layer.ssm.dtype == torch.float32 for layer in outputs[1].cache_params.layers)
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_the_engine_answers_in_bf16(folder):
    model, processor = load_model(folder, precision="bf16")
    engine = Engine(model, processor, threads=1)
    turns = [Turn("user", "what is shown?", images=1)]
    prompt = engine.prepare(turns, [image(1)])
    answers = [engine.submit(prompt, Settings(8)).result(60).ids for _ in range(2)]
    engine.close()
    with torch.inference_mode():
        inputs = processor(images=encoded(1), text=processor.prompt(turns))
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answers[0] == answers[1] == tuple(ids.tolist())


def test_auto_on_a_cpu_is_as_the_weights_were_saved(folder, tmp_path):
    assert load_model(folder)[0].dtype == torch.float32
    model, processor = load_model(folder, precision="bf16")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, precision="fp32")[0].dtype == torch.float32


def test_another_precision_is_refused(folder):
    with pytest.raises(ValueError, match="precision is 'int4'; expected one of auto, bf16, fp32, int8"):
        load_model(folder, precision="int4")


@pytest.mark.parametrize(
    ("precision", "gpus", "expected"),
    [
        ("auto", 0, "fp32"),
        ("auto", 0.5, "bf16"),
        ("bf16", 0, "bf16"),
        ("fp32", 1, "fp32"),
        ("int8", 0, "int8"),
        ("int8", 1, "bf16"),
    ],
)
def test_what_an_evaluation_computes_in_follows_its_workers(precision, gpus, expected):
    assert Workers(gpus_per_worker=gpus, precision=precision).computes_in == expected
    exact = Workers(gpus_per_worker=gpus, precision=precision, exact=True)  # other bits: an evaluation of its own
    assert (exact.taken_precision, exact.computes_in) == (expected, f"{expected}, exact")


def test_in_int8_only_the_language_model_s_products_change(folder):
    whole, processor = load_model(folder, precision="fp32")
    model, _ = load_model(folder, precision="int8")
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {
        name
        for name, module in whole.language_model.named_modules(prefix="language_model")
        if isinstance(module, torch.nn.Linear)
    }
    kept = dict(model.named_parameters())
    exact = {name: p for name, p in whole.named_parameters() if name.removesuffix(".weight") not in packed}
    assert kept.keys() == exact.keys()
    assert all(torch.equal(kept[name], p) for name, p in exact.items())
    inputs = processor(images=image(1), text=processor.prompt([Turn("user", "what is shown?", images=1)]))
    with torch.inference_mode():
        found, truth = model(**inputs), whole(**inputs)
    assert found.logits.dtype == torch.float32
    assert all(layer.ssm.dtype == torch.float32 for layer in found.cache_params.layers)
    assert (found.logits - truth.logits).norm() < 0.05 * truth.logits.norm()


def test_the_engine_answers_in_int8_and_says_so(folder):
    model, processor = load_model(folder, precision="int8")
    engine = Engine(model, processor, threads=1)
    prompt = engine.prepare([Turn("user", "what is shown?", images=1)], [image(1)])
    answers = [engine.submit(prompt, Settings(8)).result(60).ids for _ in range(2)]
    engine.close()
    assert answers[0] == answers[1]
    assert str(engine.prepared).startswith("int8, decoding torch: the states are small")


def test_a_precision_that_the_device_lacks_is_replaced_by_the_next_best_and_said(folder, monkeypatch, caplog):
    monkeypatch.setattr(loading, "has_bf16", lambda: False)
    model = load_model(folder, "cpu", "bf16")[0]
    assert model.dtype == torch.float32
    assert str(prepare(model)).startswith("fp32 in place of bf16, which there is not here, decoding ")
    assert "this processor has no bf16: the model computes in float32" in caplog.text
    monkeypatch.setattr(loading, "packs", lambda: "this torch was built without oneDNN")
    assert load_model(folder, "cpu", "int8")[0].dtype == torch.float32
    assert "precision int8 cannot be had: this torch was built without oneDNN" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for half, asked, taken in ((True, "int8", "bf16"), (False, "bf16", "fp32"), (False, "int8", "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, half=half: half)
        caplog.clear()
        assert loading._possible(asked, torch.device("cuda")) == taken
        assert len(caplog.records) == 1
