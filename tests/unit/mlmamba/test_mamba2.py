"""The language backbone's promises about state: padding, packing and reading in pieces change no row's result.

That the numbers are those of Mamba-2 is tests/parity/test_transformers_mamba2.py; here a row alone is the truth.
"""

import pytest
import torch
from transformers import Mamba2Config

from mlmamba.mamba2 import Mamba2Backbone
from mlmamba.selective_scan import RMSNorm, SelectiveScan
from mlmamba.state import MambaState
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import TEXT, pad, prompt

ROWS = [prompt(n, seed=n) for n in (13, 6, 2, 1)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def backbone() -> Mamba2Backbone:
    torch.manual_seed(0)
    backbone = Mamba2Backbone(Mamba2Config(**{**TEXT, "n_groups": 2})).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return backbone


def read(backbone, ids, state=None, mask=None, seq_idx=None):
    with torch.no_grad():
        return backbone(backbone.embeddings(ids), state, None if mask is None else mask.bool(), seq_idx)


def assert_same_state(ours: MambaState, truth: MambaState, tolerance: float = TOLERANCE) -> None:
    for a, b in zip(ours.layers, truth.layers, strict=True):
        assert_close(a.ssm, b.ssm, tolerance, "SSM state")
        assert_close(a.conv, b.conv, tolerance, "convolution state")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gets_what_it_gets_alone(backbone, side):
    ids, mask = pad(ROWS, side)
    hidden, state = read(backbone, ids, mask=mask)
    for i, row in enumerate(ROWS):
        alone, own = read(backbone, row)
        assert_close(hidden[i, mask[i].bool()], alone[0], TOLERANCE)
        assert_same_state(state.select(torch.tensor([i])), own)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_padding_goes_on_as_alone(backbone, side):
    ids, mask = pad(ROWS, side)
    _, state = read(backbone, ids, mask=mask)
    following = prompt(4 * 3, seed=9).view(4, 3)
    for t in range(3):
        hidden, state = read(backbone, following[:, t : t + 1], state)
    for i, row in enumerate(ROWS):
        alone, _ = read(backbone, torch.cat([row, following[i : i + 1]], dim=1))
        assert_close(hidden[i, -1], alone[0, -1], TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_goes_on_from_a_state(backbone, side):
    """Questions of different length about one image start from the state after the image."""
    prefix = prompt(7, seed=20)
    _, start = read(backbone, prefix)
    ids, mask = pad(ROWS, side)
    hidden, state = read(backbone, ids, start.select(torch.zeros(4, dtype=torch.long)), mask)
    for i, row in enumerate(ROWS):
        alone, own = read(backbone, torch.cat([prefix, row], dim=1))
        assert_close(hidden[i, mask[i].bool()], alone[0, 7:], TOLERANCE)
        assert_same_state(state.select(torch.tensor([i])), own)


def test_padding_within_a_row_is_skipped(backbone):
    row = prompt(6, seed=3)
    ids, mask = torch.zeros(1, 9, dtype=torch.long), torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1]])
    ids[mask.bool()] = row[0]
    hidden, state = read(backbone, ids, mask=mask)
    alone, own = read(backbone, row)
    assert_close(hidden[mask.bool()], alone[0], TOLERANCE)
    assert_same_state(state, own)


def test_a_row_of_nothing_but_padding_keeps_its_state(backbone):
    _, start = read(backbone, torch.cat([prompt(5, seed=1), prompt(5, seed=2)]))
    ids, mask = torch.cat([prompt(3, seed=4), prompt(3, seed=5)]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    _, state = read(backbone, ids, start, mask)
    row = torch.tensor([0])
    assert_same_state(state.select(row), start.select(row), 0.0)


@pytest.mark.parametrize("pieces", [(1,) * 14, (4, 4, 4, 2), (5, 1, 8), (2, 12)])
def test_a_prompt_in_pieces_equals_the_prompt_at_once(backbone, pieces):
    ids = torch.cat([prompt(14, seed=1), prompt(14, seed=2)])
    whole, end = read(backbone, ids)
    state, parts = None, []
    for piece in ids.split(pieces, dim=1):
        hidden, state = read(backbone, piece, state)
        parts.append(hidden)
    assert_close(torch.cat(parts, dim=1), whole, TOLERANCE)
    assert_same_state(state, end)


@pytest.mark.parametrize("numbers", [(0, 1, 2), (7, 7 - 1, 7)], ids=["counted", "a number that comes back"])
def test_a_packed_row_equals_its_sequences_alone(backbone, numbers):
    parts = [prompt(n, seed=n) for n in (5, 3, 6)]
    seq_idx = torch.repeat_interleave(torch.tensor(numbers), torch.tensor([5, 3, 6]))[None]
    hidden, state = read(backbone, torch.cat(parts, dim=1), seq_idx=seq_idx)
    alone = [read(backbone, part) for part in parts]
    assert_close(hidden, torch.cat([h for h, _ in alone], dim=1), TOLERANCE)
    assert_same_state(state, alone[-1][1])


def test_padding_of_a_packed_row_does_not_end_its_last_sequence(backbone):
    parts = [prompt(5, seed=5), prompt(2, seed=2)]
    ids = torch.cat([*parts, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    seq_idx = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4])
    hidden, state = read(backbone, ids, mask=seq_idx < 2, seq_idx=seq_idx)
    alone, own = read(backbone, parts[1])
    assert_close(hidden[:, 5:7], alone, TOLERANCE)
    assert_same_state(state, own)


def test_a_packed_row_goes_on_from_a_state_in_its_first_sequence(backbone):
    first, second = prompt(9, seed=1), prompt(4, seed=2)
    _, start = read(backbone, first[:, :5])
    seq_idx = torch.tensor([[3] * 4 + [4] * 4])
    hidden, _ = read(backbone, torch.cat([first[:, 5:], second], dim=1), start, seq_idx=seq_idx)
    assert_close(hidden[:, :4], read(backbone, first)[0][:, 5:], TOLERANCE)
    assert_close(hidden[:, 4:], read(backbone, second)[0], TOLERANCE)


def test_the_size_of_the_state_does_not_depend_on_what_was_read(backbone):
    sizes = {read(backbone, prompt(n))[1].nbytes for n in (1, 2, 30)}
    inner, groups_and_state = 32, 2 * 2 * 8
    assert sizes == {2 * 4 * (3 * (inner + groups_and_state) + inner * 8)}  # layers x bytes x (convolution + SSM)


def test_select_takes_rows_in_order_and_repeated(backbone):
    _, state = read(backbone, torch.cat([prompt(5, seed=s) for s in range(3)]))
    chosen = state.select(torch.tensor([2, 0, 2]))
    for before, after in zip(state.layers, chosen.layers, strict=True):
        assert torch.equal(after.ssm, before.ssm[[2, 0, 2]])
        assert torch.equal(after.conv, before.conv[[2, 0, 2]])


def test_reordering_is_a_selection_in_place(backbone):
    _, state = read(backbone, torch.cat([prompt(5, seed=s) for s in range(2)]))
    expected = state.select(torch.tensor([1, 1]))
    state.reorder_cache(torch.tensor([1, 1]))
    assert_same_state(state, expected, 0.0)
    expected = state.select(torch.tensor([0, 0, 1, 1]))
    state.batch_repeat_interleave(2)
    assert_same_state(state, expected, 0.0)


def test_a_state_can_start_many_continuations(backbone):
    """Reading on makes a new state; the old one stays what it was."""
    _, start = read(backbone, prompt(5))
    before = [layer.ssm.clone() for layer in start.layers]
    read(backbone, prompt(1, seed=1), start)
    read(backbone, prompt(6, seed=2), start)
    assert all(torch.equal(layer.ssm, old) for layer, old in zip(start.layers, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_place_give_the_same_in_the_same_memory(backbone, dtype):
    model = Mamba2Backbone(Mamba2Config(**{**TEXT, "n_groups": 2})).eval()
    model.load_state_dict(backbone.state_dict())
    model.to(dtype)
    _, state = read(model, torch.cat([prompt(5, seed=s) for s in range(2)]))
    own = state.select(torch.tensor([0, 1])).in_place()
    memory = [(layer.conv.data_ptr(), layer.ssm.data_ptr()) for layer in own.layers]
    for step in range(3):
        token = torch.cat([prompt(1, seed=step), prompt(1, seed=9 + step)])
        expected, state = read(model, token, state)
        hidden, own = read(model, token, own)
        assert torch.equal(hidden, expected)
        assert_same_state(own, state, 0.0)
    assert [(layer.conv.data_ptr(), layer.ssm.data_ptr()) for layer in own.layers] == memory
    read(model, prompt(2).expand(2, -1), own)  # several tokens: a new state
    assert_same_state(own, state, 0.0)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casts_leave_the_scan_parameters_in_float32(cast):
    scan = SelectiveScan(8, 2, 4, 1, 4, 4)
    exact = scan.A_log.detach().clone()
    scan.to(cast)
    assert {name: p.dtype for name, p in scan.named_parameters(recurse=False)} == dict.fromkeys(
        ("A_log", "dt_bias", "D"), torch.float32
    )
    assert torch.equal(scan.A_log, exact)
    assert scan.conv1d.weight.dtype == cast
    assert scan.double().A_log.dtype == torch.float64


def test_the_state_is_float32_under_bfloat16(backbone):
    half = Mamba2Backbone(Mamba2Config(**{**TEXT, "n_groups": 2})).eval()
    half.load_state_dict(backbone.state_dict())
    half.to(torch.bfloat16)
    hidden, state = read(half, prompt(6))
    hidden, state = read(half, prompt(1), state)
    assert hidden.dtype == torch.bfloat16
    assert {layer.ssm.dtype for layer in state.layers} == {torch.float32}
    truth, _ = read(backbone, torch.cat([prompt(6), prompt(1)], dim=1))
    assert_close(hidden[:, -1].float(), truth[:, -1], 0.1)


def test_the_norm_of_groups_is_the_norm_of_each():
    norm, x = RMSNorm(8, 1e-5, groups=2), torch.randn(3, 8)
    halves = torch.cat([RMSNorm(4, 1e-5)(part) for part in x.split(4, dim=1)], dim=1)
    assert_close(norm(x), halves, 1e-6)
