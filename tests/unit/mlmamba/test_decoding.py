"""A model made ready to answer, and the step of one token over a pool: same answers, no waiting, nothing that moves."""

import copy
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlmamba import choosing, decoding
from mlmamba.decoding import Decoder, pack, prepare
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.ops import compiled, step
from mlmamba.ops.packed import PACKED, PackedLinear, has_bf16, quantized
from mlmamba.state import LayerState, MambaState
from mlmamba.state_pool import StatePool
from tests.helpers.closeness import assert_close
from tests.helpers.fake_gpu import FakeGPU
from tests.helpers.host_reads import HostRead, no_host_reads
from tests.helpers.tiny import HYBRID, images, prompt, tiny_config, tiny_model
from workflows.serve.sampling import Settings, choose, generator_of

ROOT = Path(__file__).parents[3]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LARGER = {"hidden_size": 128, "head_dim": 32, "num_heads": 8, "state_size": 256, "num_hidden_layers": 3}
"""So large that weights are packed and the step is compiled."""


@pytest.fixture
def larger():
    return tiny_model(LARGER)


@torch.inference_mode()
def answers(model, new: int = 8) -> list[list[int]]:
    """Greedy ones to three prompts of one image, each alone and all together by one state."""
    found = []
    for count in (1, 3):
        ids = torch.cat([prompt(9, 1, seed=i) for i in range(count)])
        out = model.generate(ids, pixel_values=images(count), max_new_tokens=new, do_sample=False)
        found += out[:, ids.shape[1] :].tolist()
    return found


@torch.inference_mode()
def states(model, rows: int) -> MambaState:
    ids = torch.cat([prompt(9, 1, seed=i) for i in range(rows)])
    return model(ids, pixel_values=images(rows), use_cache=True).cache_params


def moving(decoder: Decoder) -> list[torch.Tensor]:
    """All that a captured step would read and write."""
    own = [t for layer in decoder.pool.layers for t in layer.parts]
    return [*own, *(value for value in vars(decoder).values() if isinstance(value, torch.Tensor))]


def test_a_prepared_model_gives_the_same_answers(larger):
    before = answers(larger)
    way = prepare(larger, make=False)
    assert (way.precision, way.packed) == ("fp32", "packed")
    assert prepare(larger) is way  # once
    packed = [name for name, module in larger.named_modules() if isinstance(module, PackedLinear)]
    assert packed == [f"language_model.backbone.layers.{i}.mixer.in_proj" for i in range(3)]  # the large ones
    assert answers(larger) == before


@pytest.mark.parametrize("factors", [{}, {"ssm_multipliers": [0.5, 1.0, 1.0, 2.0, 1.0], "ssm_out_multiplier": 0.5}])
@pytest.mark.parametrize("norm", ["gated", "before_gate", "none"])
def test_a_prepared_hybrid_gives_the_same_answers(factors, norm, monkeypatch):
    """Each kind of block has a step of its own; a mixer of another norm takes its ordinary way."""
    monkeypatch.setattr(decoding, "WORTH_PACKING", 0)
    model = tiny_model(HYBRID | factors | {"mixer_norm": norm})
    before = answers(model)
    way = prepare(model, make=False)
    assert way.decoding.startswith("torch: the states are small" if norm == "gated" else "torch: the mixer's norm is")
    assert answers(model) == before
    assert not Decoder(model, 2, ahead=True).ahead  # attention's keys and values grow, so nothing is captured


def test_its_weights_can_still_be_saved(larger, tmp_path):
    weights = {name: t.clone() for name, t in larger.state_dict().items()}
    prepare(larger, make=False)
    assert any(isinstance(module, PackedLinear) for module in larger.modules())
    found = larger.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], t) for name, t in weights.items())


def test_a_model_in_half_precision_or_int8_is_close(larger):
    with torch.inference_mode():
        ids = prompt(40, 1)
        exact = larger(ids, pixel_values=images(1)).logits
        for form, limit in (("bf16", 0.05), ("int8", 0.05)):
            other = copy.deepcopy(larger)
            if form == "int8":
                pack(other.language_model, form)
            else:
                other = other.bfloat16()
            assert prepare(other, make=False).precision == form
            found = other(ids, pixel_values=images(1)).logits
            assert found.dtype == torch.float32
            assert (found - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 33), (31, 64), (100, 7), (5, 1000), (129, 128)])
def test_a_packed_layer_takes_any_shape(form, shape):
    """torch's int8 kernel does not, and would read beyond the end of the weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=shape[0] % 2 == 1)
    packed = PackedLinear(layer, form)
    with torch.no_grad():
        for rows in ((1,), (2, 3), (40,), (0,), (2, 0)):
            x = torch.randn(*rows, shape[1])
            found, truth = packed(x), layer(x)
            assert (found.shape, found.dtype) == (truth.shape, truth.dtype)
            assert (found - truth).norm() <= (1e-5 if form == "fp32" else 0.03) * (truth.norm() + 1)
        layer.weight.zero_()
        assert torch.equal(PackedLinear(layer, form).dense(), torch.zeros(shape))


def test_a_form_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="weights cannot be packed as 'int4'; expected one of fp32, bf16, int8"):
        PackedLinear(torch.nn.Linear(2, 2), "int4")


@pytest.fixture
def cache(compiled_cache) -> Path:
    return compiled_cache


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_compiled_decoding_equals_decoding_and_is_kept(form, larger, cache, tmp_path, monkeypatch):
    larger = larger.bfloat16() if form == "bf16" else larger
    if form == "int8":
        pack(larger.language_model, form)
    fresh = copy.deepcopy(larger)
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path))
    assert prepare(fresh, make=False).decoding.startswith("torch: nothing was compiled")
    monkeypatch.setenv("MLMAMBA_CACHE", str(cache))
    monkeypatch.setattr(compiled, "_compile", None)  # what is there needs no compiler
    assert prepare(larger).decoding == "compiled"
    if form == "fp32":
        assert answers(larger) == answers(fresh)
    state, pooled = states(fresh, 3), []
    with torch.inference_mode():
        for model in (larger, fresh):
            own = state.select(torch.arange(3)).in_place()
            out = model(torch.tensor([[5], [6], [7]]), cache_params=own)
            pooled.append((out.logits, *(t for layer in out.cache_params.layers for t in layer.parts)))
    for ours, truth in zip(*pooled, strict=True):
        assert (ours - truth).norm() <= (1e-5 if form == "fp32" else 0.02) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "head_dim", "state_size", "groups", "taps", "limit"),
    [
        (24, 64, 128, 1, 4, (0.0, math.inf)),
        (4, 8, 8, 2, 3, (0.0, 0.1)),
        (6, 5, 19, 3, 2, (0.5, 0.7)),
        (2, 3, 1, 1, 1, (0.0, 1.0)),
    ],
)
def test_the_compiled_step_is_the_step(dtype, heads, head_dim, state_size, groups, taps, limit, cache, monkeypatch):
    """In float32, which it computes in, whatever tensors are kept in; of slots only the first rows."""
    monkeypatch.setenv("MLMAMBA_CACHE", str(cache))
    torch.manual_seed(0)
    inner, rows = heads * head_dim, 3
    channels = inner + 2 * groups * state_size
    made = [torch.randn(taps, channels), torch.randn(channels), -torch.rand(heads), *torch.randn(2, heads) * 10]
    made.append(torch.randn(inner))
    rest = (1e-5, groups, groups, state_size, limit)
    kept = [t.to(dtype) if i in (0, 1, 5) else t for i, t in enumerate(made)]
    own = step.Between(*kept, *rest)
    truth = step.Between(*(t.float() for t in kept), *rest)
    own.compiled = compiled.operators(make=False).block
    given = torch.randn(rows, inner + channels + heads).to(dtype)
    conv, ssm = torch.randn(rows + 2, taps - 1, channels).to(dtype), torch.randn(rows + 2, heads, head_dim, state_size)
    wide = conv[:rows].float().clone(), ssm[:rows].clone()
    spare = conv[rows:].clone(), ssm[rows:].clone()
    expected = truth(given.float(), *wide)
    found = own(given, conv, ssm)
    assert found.dtype == dtype
    assert_close(found.float(), expected, 1e-5 if dtype == torch.float32 else 1e-2)
    assert_close(ssm[:rows], wide[1], 1e-5)
    assert torch.equal(conv[:rows].float(), wide[0])
    assert torch.equal(conv[rows:], spare[0])
    assert torch.equal(ssm[rows:], spare[1])


@torch.inference_mode()
def test_a_prompt_read_by_the_compiled_step_has_the_same_state_and_bits_however_it_is_cut(larger, cache, monkeypatch):
    plain = copy.deepcopy(larger)
    monkeypatch.setenv("MLMAMBA_CACHE", str(cache))
    assert prepare(larger).decoding == "compiled"
    ids = torch.cat([prompt(30, seed=i) for i in range(3)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, 20:] = 0
    found, truth = (model(ids, attention_mask=mask, use_cache=True) for model in (larger, plain))
    assert_close(found.logits[mask.bool()], truth.logits[mask.bool()], 1e-5)
    mixer = larger.language_model.backbone.layers[1].mixer
    given = torch.randn(3, 30, mixer.in_proj.out_features)
    whole, state = (
        mixer.between.read,
        [t[:1].repeat(3, *[1] * (t.ndim - 1)) for t in found.cache_params.layers[1].parts],
    )
    once = [t.clone() for t in state]
    y = whole(given, *once, mask.bool().sort(1, descending=True).values)
    for row in range(3):
        length, own = int(mask[row].sum()), [t[row : row + 1].clone() for t in state]
        pieces = [whole(piece, *own, None) for piece in given[row : row + 1, :length].split(7, 1)]
        assert torch.equal(torch.cat(pieces, 1), y[row : row + 1, :length])
        assert all(torch.equal(t, one[row : row + 1]) for t, one in zip(own, once, strict=True))


def test_compiled_sums_norms_and_int8_products_take_any_shape_and_refuse_what_does_not_fit(cache, monkeypatch):
    monkeypatch.setenv("MLMAMBA_CACHE", str(cache))
    own = compiled.operators(make=False)
    for dtype, wide, rows, width in (
        (torch.float32, True, 3, 770),
        (torch.bfloat16, True, 1, 5),
        (torch.bfloat16, False, 2, 64),
    ):
        y, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
        for residual in (None, torch.randn(rows, width).to(torch.float32 if wide else dtype)):
            for ours, truth in zip(
                own.add_norm(y, residual, weight, 1e-5, wide),
                step.add_norm(y, residual, weight, 1e-5, wide),
                strict=True,
            ):
                assert ours.dtype == truth.dtype
                assert_close(ours.float(), truth.float(), 1e-5 if dtype == torch.float32 else 1e-2)
    for rows, ins, outs in (
        (1, 768, 50),
        (3, 33, 17),
        (5, 64, 30),
        (33, 1536, 16),
        (7, 7, 3),
        (4, 1, 1),
        (9, 20_000, 33),
    ):
        weight, scale = quantized(torch.randn(outs, ins))
        for x in (torch.randn(rows, ins), torch.ones(rows, ins), torch.zeros(rows, ins)):  # ones: the largest sums
            truth = x.double() @ (weight.double() * scale.double()[:, None]).t()
            assert_close(own.int8_linear(x, weight, scale.float()).double(), truth, 1e-3)
    with pytest.raises(RuntimeError, match="sizes do not go together"):
        own.int8_linear(torch.randn(1, 4), weight, scale.float())
    with pytest.raises(RuntimeError, match="of one kind"):
        own.add_norm(torch.randn(1, 4).half(), None, torch.ones(4).half(), 1e-5, True)
    tensors = torch.ones(1, 1, 7), torch.ones(1, 1, 3), torch.ones(1, 1, 1, 1), None, torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="block: sizes do not go together"):
        own.block(*tensors, *[torch.ones(3)] * 5, 1e-5, 1, 1, 0.0, 1.0)


def test_without_a_compiler_decoding_runs_in_torch_and_says_why(larger, tmp_path, monkeypatch):
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    before = answers(larger)
    way = prepare(larger).decoding
    assert way.startswith("torch: ")
    assert "compiler" in way.lower()
    assert "\n" not in way
    assert answers(larger) == before


def test_a_cache_that_cannot_be_written_or_is_damaged_is_no_error(larger, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path / "file" / "below"))
    assert prepare(copy.deepcopy(larger)).decoding.startswith("torch: ")
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path))
    compiled.library().write_bytes(b"no library")
    # A process that has the operators already would not look.
    look = [sys.executable, "-c", "from mlmamba.ops import compiled; compiled.operators(make=False)"]
    assert "does not load, and is removed" in subprocess.run(look, capture_output=True, text=True, cwd=ROOT).stderr
    assert not compiled.library().exists()


def test_a_user_without_a_home_decodes_in_torch(larger, monkeypatch):
    """As in containers that run under any number."""

    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("MLMAMBA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert prepare(copy.deepcopy(larger)).decoding.endswith("set MLMAMBA_CACHE")


def test_a_pool_that_moves_nothing_keeps_each_state_where_it_is():
    def state(*values: float) -> MambaState:
        shape = (len(values), 1, 2, 2)
        own = torch.tensor(values)[:, None, None, None].expand(shape).clone()
        return MambaState([LayerState(own[:, 0] + 10, own)])

    pool = StatePool(3, moves=False)
    assert [pool.append(state(1.0, 2.0, 3.0), row) for row in range(3)] == [0, 1, 2]
    assert pool.layers[0].ssm.shape[0] == 4  # one more, for what only fills a batch
    pool.remove(0)
    assert (pool.order[:2], pool.used) == ([2, 1], 2)
    assert [float(pool.row(row).layers[0].ssm.mean()) for row in range(2)] == [3.0, 2.0]
    assert pool.append(state(7.0), 0) == 2
    assert [float(pool.row(row).layers[0].ssm.mean()) for row in range(3)] == [3.0, 2.0, 7.0]
    with pytest.raises(IndexError, match="all 3 slots are in use"):
        pool.append(state(8.0), 0)


ASKED = [None, (0.8, 1.0), (1.3, 0.6), None, (0.5, 0.95)]


@torch.inference_mode()
def test_steps_on_the_device_choose_what_the_host_would():
    """Rows of all kinds, which leave one by one; the host's own way beside it, with the same seeds."""
    model = tiny_model()
    prepare(model, make=False)
    settings = [Settings(9, *(one or (0.0, 1.0)), seed=i) for i, one in enumerate(ASKED)]
    device, host = Decoder(model, 5, ahead=True), Decoder(model, 5, ahead=False)
    state, generators = states(model, 5), [[generator_of(s) for s in settings] for _ in range(2)]
    last = list(range(5, 10))
    for row in range(5):
        device.add(state, row, last[row], ASKED[row])
        host.add(state, row, last[row], ASKED[row])
    left = list(range(5))
    for _ in range(4):
        for _ in range(3):
            mine = [generators[0][row] for row in left]
            draws = [0.0 if g is None else float(torch.rand((), dtype=torch.float64, generator=g)) for g in mine]
            found = device.step(draws).get()
            logits = host.logits([last[row] for row in left])
            expected = choose(logits, [settings[row] for row in left], [generators[1][row] for row in left])
            assert found == expected
            last = dict(zip(left, expected, strict=True))
        device.remove(1)
        host.remove(1)
        left[1] = left[-1]
        left.pop()


@torch.inference_mode()
@pytest.mark.parametrize("asked", ASKED[:3])
def test_a_step_on_the_device_reads_nothing_back_and_moves_nothing(asked):
    model = tiny_model()
    prepare(model, make=False)
    decoder, state = Decoder(model, 6, ahead=True), states(model, 3)
    for row in range(3):
        decoder.add(state, row, 5, asked)
    decoder.step([0.3] * 3)
    before = [t.data_ptr() for t in moving(decoder)]
    with no_host_reads():
        tokens = [decoder.step([0.3] * 3) for _ in range(2)]
        decoder.remove(0)
        decoder.add(state, 1, 6, None)
        tokens.append(decoder.step([0.3] * 3))
    assert [t.data_ptr() for t in moving(decoder)] == before
    assert all(len(step.get()) == 3 for step in tokens)


def test_the_host_s_own_choice_would_wait():
    """Which shows that the test above can fail."""
    settings = Settings(1, temperature=1.0, top_p=0.5)
    with pytest.raises(HostRead), no_host_reads():
        choose(torch.randn(1, 9), [settings], [generator_of(settings)])


def test_a_row_without_numbers_gives_no_token_and_ends_no_other():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("-inf")] * 2])
    assert choosing.greedy(logits).tolist() == [1, -1, -1]
    three = torch.tensor([True] * 3), *(torch.ones(3) for _ in range(2)), torch.full((3,), 0.9, dtype=torch.float64)
    assert choosing.choose(logits, *three, cut=False).tolist() == [1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_faked_gpu_the_step_is_all_there(dtype, monkeypatch):
    """Mixed devices and reads of values fail there. Only the choice is made in float64, as on the host."""
    monkeypatch.setenv("MLMAMBA_OPS", "torch")
    gpu = FakeGPU()
    with gpu(), torch.no_grad():
        config = tiny_config()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                model = SimpleNamespace(language_model=Mamba2LanguageModel(config.text_config).eval())
        finally:
            torch.set_default_dtype(torch.float32)
        model.device, model.config = torch.device("cuda"), config
        model.generation_config = SimpleNamespace(suppress_tokens=[1])
        found = prepare(model, make=False)
        assert (found.precision, found.packed) == (NAMES[dtype], "as they are on cuda")
        decoder, text = Decoder(model, 4, ahead=True), config.text_config
        channels = text.num_heads * text.head_dim + 2 * text.n_groups * text.state_size
        conv = torch.zeros(1, 3, channels, dtype=dtype, device="cuda")
        ssm = torch.zeros(1, text.num_heads, text.head_dim, text.state_size, device="cuda")
        for asked in ASKED[:3]:
            decoder.add(MambaState([LayerState(conv, ssm)] * 2), 0, 5, asked)
        decoder._update()
        gpu.float64.clear()  # draws are float64
        decoder._forward(4, "logits")
        assert gpu.float64 == set()
        assert {t.device.type for t in moving(decoder)} == {"cuda"}
        assert {layer.ssm.dtype for layer in decoder.pool.layers} == {torch.float32}
        for kind in ("greedy", "whole", "cut"):
            decoder._choose(4, kind)


def test_a_capture_that_fails_is_said_once_and_decoding_goes_on(caplog):
    """There is no GPU here, so capturing fails."""
    model = tiny_model()
    prepare(model, make=False)
    decoder = Decoder(model, 2, ahead=True)
    decoder._captures = True
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        decoder.add(states(model, 1), 0, 5, None)
        assert len(decoder.step([0.0]).get()) == 1
    assert caplog.text.count("decoding is not captured as CUDA graphs, and slower") == 1


def test_the_processor_is_asked_for_bf16():
    assert isinstance(has_bf16(), bool)
