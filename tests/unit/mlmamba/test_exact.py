"""Exact answers have the same bits in any company: products, images, prompts in pieces; and what cannot be exact."""

import copy
from types import SimpleNamespace

import pytest
import torch

from mlmamba.answering import Answerer, Asked
from mlmamba.decoding import pack, prepare
from mlmamba.loading import load_model
from mlmamba.ops import compiled
from mlmamba.ops.packed import PackedLinear, panels, quantized
from tests.helpers.closeness import assert_close
from tests.helpers.images import encoded
from tests.helpers.serving import save_tiny
from tests.helpers.tiny import HYBRID, NATIVE, images, prompt, tiny_model


@pytest.fixture
def own(compiled_cache, monkeypatch):
    monkeypatch.setenv("MLMAMBA_CACHE", str(compiled_cache))
    return compiled.operators(make=False)


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


SHAPES = [(1, 1), (33, 17), (64, 64), (65, 768), (200, 5000), (130, 3)]


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_has_the_same_bits_whatever_rows_stand_beside_it_on_however_many_threads(form, shape, own, threads):
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=shape[0] % 2 == 1)
    packed = PackedLinear(layer, form, own)
    if form == "int8":
        packed.use(own, always=True)
    x = torch.randn(150, shape[1])
    with torch.no_grad():
        truth = layer(x)
        threads(1)
        whole = packed(x)
        assert_close(whole, truth, 1e-5 if form == "fp32" else 0.03)
        for rows in (1, 2, 3, 5, 6, 7, 13, 97, 149):
            threads(1 + rows % 2)
            assert torch.equal(packed(x[:rows]), whole[:rows])
            assert torch.equal(packed(x[-rows:]), whole[-rows:])
        assert packed(x[:0]).shape == (0, shape[0])
        dense = packed.dense()
        assert dense.shape == layer.weight.shape
        assert_close(dense.float(), layer.weight, 0 if form == "fp32" else 0.02)


def test_products_refuse_what_does_not_fit(own):
    weights = panels(torch.randn(70, 8))
    for x, outs in ((torch.randn(2, 7), 70), (torch.randn(2, 8), 129), (torch.randn(2, 8), 64)):
        with pytest.raises(RuntimeError, match="linear: sizes do not go together"):
            own.linear(x, weights, outs)
    with pytest.raises(RuntimeError, match="of one kind"):
        own.linear(torch.randn(2, 8).bfloat16(), weights, 70)
    with pytest.raises(RuntimeError, match="int8_linear takes"):
        own.int8_linear(torch.randn(1, 8).double(), *quantized(torch.randn(3, 8)))


def exact(text: dict | None = None, form: str = "fp32", **changes):
    model = tiny_model(text, **changes)
    if form == "bf16":
        model = model.bfloat16()
    if form == "int8":
        pack(model.language_model, form)
    model.exact = True
    assert prepare(model).exact == "exact"
    assert str(model.prepared).endswith(", exact")
    return model


@torch.inference_mode()
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_a_prompt_has_the_same_bits_alone_in_a_batch_in_pieces_and_token_by_token(form, own):
    model = exact(form=form)
    ids = torch.cat([prompt(30, 1, seed=i) for i in range(5)])
    shown = images(5)
    mask = torch.ones_like(ids)
    mask[3, 22:] = 0
    together = model(ids, pixel_values=shown, attention_mask=mask, use_cache=True)
    for row in range(5):
        length = int(mask[row].sum())
        own_ids = ids[row : row + 1, :length]
        for cuts in ([length], [4, 9, length - 13], [4, *[1] * (length - 4)]):
            state, logits, given = None, [], {"pixel_values": shown[row : row + 1]}
            for piece in own_ids.split(cuts, 1):
                state = state and (state.in_place() if piece.shape[1] == 1 else state)
                out = model(piece, cache_params=state, use_cache=True, **given)
                state, given = out.cache_params, {}
                logits.append(out.logits)
            assert torch.equal(torch.cat(logits, 1)[0], together.logits[row, :length])
            for one, all_rows in zip(state.layers, together.cache_params.layers, strict=True):
                assert all(torch.equal(a[0], b[row]) for a, b in zip(one.parts, all_rows.parts, strict=True))


@torch.inference_mode()
def test_an_image_has_the_same_features_alone_and_among_others_at_its_own_size_too(own):
    model, shown = exact(), images(5)
    together = model.get_image_features(shown)
    assert all(torch.equal(model.get_image_features(shown[i : i + 1])[0], together[i]) for i in range(5))
    model = exact(vision_config=NATIVE)
    shapes = torch.tensor([[1, 2], [3, 3], [2, 6]])
    lengths = shapes.prod(1).tolist()
    patches = torch.randint(0, 256, (sum(lengths), 3 * 16 * 16), dtype=torch.uint8)
    alone = [
        model.get_image_features(part, shape[None]) for part, shape in zip(patches.split(lengths), shapes, strict=True)
    ]
    assert torch.equal(model.get_image_features(patches, shapes), torch.cat(alone))
    assert model.get_image_features(patches[:0], shapes[:0]).shape[0] == 0


@torch.inference_mode()
def test_exact_answers_are_close_to_those_of_the_model_as_it_is(own):
    plain = tiny_model()
    ids, shown = prompt(30, 1), images(1)
    assert_close(exact()(ids, pixel_values=shown).logits, plain(ids, pixel_values=shown).logits, 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_probabilities_are_the_same_bits_in_batches_of_any_size(precision, own, tmp_path):
    folder = save_tiny(tmp_path / "model")
    asked = [Asked(encoded(i), ["what is it?", f"is it {i}?", "where " * (i % 7 + 1)]) for i in range(12)]
    asked.append(Asked(None, ["two and two?"]))
    found = []
    for batch_images, batch_questions in ((1, 1), (16, 16), (5, 64)):
        answerer = Answerer(folder, 6, None, ("Yes", "No"), batch_questions, precision, exact=True)
        assert answerer.model.prepared.exact == "exact"
        groups = [asked[i : i + batch_images] for i in range(0, len(asked), batch_images)]
        replies = [reply for group in groups for own_replies in answerer.reply(group) for reply in own_replies]
        found.append([(reply.text, reply.p_first) for reply in replies])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 20


def why(model, caplog) -> str:
    model.exact = True
    caplog.clear()
    way = prepare(model)
    assert not model.exact
    assert way.exact.startswith("not exact: ")
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert way.exact in said
    assert "\n" not in said
    return way.exact


def test_what_cannot_be_exact_says_why_in_a_line_and_answers_as_ever(own, tmp_path, monkeypatch, caplog):
    assert "attention and MLP blocks round by the batch" in why(tiny_model(HYBRID), caplog)
    assert "norm is of another kind" in why(tiny_model({"mixer_norm": "none"}), caplog)
    assert "nothing is compiled for float16" in why(tiny_model().half(), caplog)
    spread = tiny_model()
    spread.hf_device_map = {"": "cpu"}
    assert "the model is on several devices" in why(spread, caplog)
    elsewhere = SimpleNamespace(language_model=copy.deepcopy(tiny_model()).language_model, device=torch.device("meta"))
    assert "on meta sums depend on the batch, serve and evaluate on a CPU" in why(elsewhere, caplog)
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    model = tiny_model()
    before = model.generate(prompt(9), max_new_tokens=4, do_sample=False)
    assert "compiler" in why(model, caplog).lower()
    assert torch.equal(model.generate(prompt(9), max_new_tokens=4, do_sample=False), before)


def test_a_model_that_is_not_asked_to_be_exact_says_nothing_of_it(tmp_path, own):
    model, _ = load_model(save_tiny(tmp_path / "model"))
    assert "exact" not in str(prepare(model))
