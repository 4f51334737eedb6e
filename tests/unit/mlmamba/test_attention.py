"""Attention of hybrids: packed, padded, in pieces and step by step it is what it is at once and alone."""

import pytest
import torch

from mlmamba.attention import Attention
from mlmamba.state import KeyValueState, MambaState
from tests.helpers.tiny import HYBRID, images, pad, prompt, tiny_config, tiny_model

TOLERANCE = 5e-5
ROWS = [prompt(9, 1, 1), prompt(14, 1, 2), prompt(5, 1, 3)]
IMAGES = images(3)


def close(ours: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=["rotary", "no positions", "one head a group"])
def model(request):
    changes = {"rotary": {"partial_rotary_factor": 0.5}, "no positions": {"rope_theta": None}}
    return tiny_model(HYBRID | changes.get(request.param, {"num_key_value_heads": 4}))


@pytest.fixture(scope="module")
def alone(model):
    """Logits of each row by itself."""
    with torch.no_grad():
        return [model(row, IMAGES[i : i + 1]).logits[0] for i, row in enumerate(ROWS)]


def test_attention_is_what_is_written_out():
    """Softmax of scaled products over what came before, head by head; positions turn pairs of channels."""
    config = tiny_config(HYBRID | {"attention_multiplier": 0.3}).text_config
    torch.manual_seed(0)
    layer, x = Attention(config), torch.randn(1, 6, config.hidden_size)
    q, k, v = (layer.in_proj.weight @ x[0].T).T.split([32, 16, 16], -1)
    out = torch.zeros(6, 32)
    for head in range(4):
        own, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        for t in range(6):
            scores = torch.stack([turned(q[t, own], t) @ turned(k[s, group], s) for s in range(t + 1)]) * 0.3
            out[t, own] = scores.softmax(0) @ v[: t + 1, group]
    close(layer(x)[0][0], out @ layer.out_proj.weight.T)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """Channels i and i + 4 of 8 as a complex number, turned by position / 10000 ** (i / 4)."""
    angles = position / 10_000 ** (torch.arange(4) / 4)
    whole = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4), angles)
    return torch.cat([whole.real, whole.imag])


def kv(state: MambaState) -> list[KeyValueState]:
    return [layer for layer in state.layers if isinstance(layer, KeyValueState)]


def test_later_tokens_change_nothing_before_them(model):
    ids = prompt(20)
    with torch.no_grad():
        whole = model(ids).logits
        ids[:, 12:] = 7
        close(model(ids).logits[:, :12], whole[:, :12])
        assert not torch.allclose(model(ids).logits[:, 12:], whole[:, 12:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_is_not_kept(model, alone, side):
    ids, mask = pad(ROWS, side)
    with torch.no_grad():
        out = model(ids, IMAGES, attention_mask=mask)
        next_token = torch.full((3, 1), 9)
        after = model(next_token, cache_params=out.cache_params)
        for i, row in enumerate(ROWS):
            close(out.logits[i][mask[i].bool()], alone[i])
            whole = model(torch.cat([row, next_token[:1]], 1), IMAGES[i : i + 1]).logits
            close(after.logits[i, 0], whole[0, -1])
    for layer in kv(out.cache_params):
        assert layer.lengths.tolist() == [9, 14, 5]
        assert layer.longest == layer.keys.shape[2] == 14


def test_sequences_of_a_packed_row_do_not_see_each_other(model, alone):
    row = torch.cat(ROWS, 1)
    marks = torch.tensor([[8] * 9 + [3] * 14 + [8] * 5])  # an id that comes back is another sequence
    with torch.no_grad():
        out = model(row, IMAGES, seq_idx=marks)
        for i, own in enumerate(out.logits[0].split([9, 14, 5])):
            close(own, alone[i])
        after = model(torch.tensor([[9]]), cache_params=out.cache_params).logits
        close(after, model(torch.cat([ROWS[2], torch.tensor([[9]])], 1), IMAGES[2:]).logits[:, -1:])
    assert [layer.lengths.tolist() for layer in kv(out.cache_params)] == [[5], [5]]


def test_packed_rows_give_the_gradients_of_their_sequences(model):
    row, marks = torch.cat(ROWS, 1), torch.tensor([[0] * 9 + [1] * 14 + [2] * 5])
    labels = row.masked_fill(row == 1, -100)
    weights = [p for name, p in model.named_parameters() if "language_model.backbone.layers" in name]
    packed = torch.autograd.grad(model(row, IMAGES, seq_idx=marks, labels=labels, num_items_in_batch=1).loss, weights)
    single = [torch.zeros_like(p) for p in weights]
    for i, own in enumerate(ROWS):
        loss = model(own, IMAGES[i : i + 1], labels=own.masked_fill(own == 1, -100), num_items_in_batch=1).loss
        for total, grad in zip(single, torch.autograd.grad(loss, weights), strict=True):
            total += grad
    for ours, truth in zip(packed, single, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


@pytest.mark.parametrize("pieces", [[1, 22], [11, 4, 8], [20, 1, 1, 1]])
def test_a_prompt_in_pieces_is_the_prompt_at_once(model, pieces):
    """Rows of unequal length, each piece padded on the left."""
    rows = [prompt(sum(pieces), 0, 4), prompt(sum(pieces) - 3, 0, 5)]
    with torch.no_grad():
        whole = [model(row).logits[0, -1] for row in rows]
        state, at = None, [0, 0]
        for i, piece in enumerate(pieces):
            count = [piece, piece - 3 if i == pieces.index(max(pieces)) else piece]
            ids, mask = pad([row[:, a : a + n] for row, a, n in zip(rows, at, count, strict=True)], "left")
            out = model(ids, attention_mask=mask, cache_params=state)
            state, at = out.cache_params, [a + n for a, n in zip(at, count, strict=True)]
    for i in range(2):
        close(out.logits[i, -1], whole[i])


def test_a_packed_row_goes_on_from_a_state(model):
    """Its first sequence does; the others start anew, and only the last is kept."""
    first, second = prompt(12, 0, 6), prompt(7, 0, 7)
    marks = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        state = model(first[:, :7]).cache_params
        out = model(torch.cat([first[:, 7:], second], 1), seq_idx=marks, cache_params=state)
        close(out.logits[:, :5], model(first).logits[:, 7:])
        close(out.logits[:, 5:], model(second).logits)
    assert [layer.lengths.tolist() for layer in kv(out.cache_params)] == [[7], [7]]


def test_steps_of_one_token_are_the_sequence_at_once(model, alone):
    """With the state copied at each step, and written over."""
    with torch.no_grad():
        for own in (False, True):
            state = model(ROWS[1][:, :6], IMAGES[1:2]).cache_params
            for t in range(6, 14):
                out = model(ROWS[1][:, t : t + 1], cache_params=state.in_place() if own else state)
                close(out.logits[0, 0], alone[1][t])
                state = out.cache_params


def test_a_state_that_is_not_owned_stays_as_it_was(model):
    """Two continuations of one prefix; the state has free places behind its tokens, which each could take."""
    with torch.no_grad():
        state = model(prompt(6)).cache_params
        state = model(torch.tensor([[5]]), cache_params=state).cache_params
        assert all(layer.keys.shape[2] > layer.longest for layer in kv(state))
        one = model(torch.tensor([[6]]), cache_params=state).cache_params
        two = model(torch.tensor([[8]]), cache_params=state).cache_params
        fresh = model(torch.cat([prompt(6), torch.tensor([[5, 6]])], 1)).cache_params
    assert [layer.lengths.tolist() for layer in kv(state)] == [[7], [7]]
    for ours, other, truth in zip(kv(one), kv(two), kv(fresh), strict=True):
        close(ours.keys[:, :, :8], truth.keys)
        assert not torch.allclose(other.keys[:, :, 7], truth.keys[:, :, 7])


def test_an_owned_state_is_written_where_it_lies(model):
    with torch.no_grad():
        state = model(torch.tensor([[4]]), cache_params=model(prompt(6)).cache_params).cache_params.in_place()
        places = [t.data_ptr() for layer in state.layers for t in layer.parts]
        for token in range(2, 11):
            state = model(torch.tensor([[token]]), cache_params=state.in_place()).cache_params
    assert [t.data_ptr() for layer in state.layers for t in layer.parts] == places


def test_rows_are_chosen_and_joined(model):
    ids, mask = pad(ROWS, "right")
    with torch.no_grad():
        state = model(ids, IMAGES, attention_mask=mask).cache_params
        chosen = state.select(torch.tensor([2, 0, 2]))
        single = [state.select(torch.tensor([i])) for i in range(3)]
        joined = MambaState([layer[0].join(list(layer)) for layer in zip(*(s.layers for s in single), strict=True)])
        token = torch.full((3, 1), 9)
        expected = model(token, cache_params=state).logits
        close(model(token, cache_params=joined).logits, expected)
        close(model(token, cache_params=chosen).logits, expected[[2, 0, 2]])
    assert single[2].nbytes < single[1].nbytes < state.nbytes


def test_a_state_of_another_kind_of_model_is_an_error(model):
    other = tiny_model({"num_hidden_layers": 4})
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="attention in 0 of 4 layers or in others; this one has it in 2"),
    ):
        model(prompt(1), cache_params=other(prompt(4)).cache_params)


def test_a_sequence_longer_than_the_maximum_is_an_error(model):
    message = "a sequence of 97 tokens is over the 96 for which attention has room"
    with torch.no_grad():
        state = model(prompt(96)).cache_params
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[5]]), cache_params=state)
        with pytest.raises(ValueError, match=message):
            model(prompt(97))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["mamba2", "lstm"], "num_hidden_layers": 2}, "layers holds 'lstm'; a block is one of mamba2, att"),
        ({"layers": [], "num_hidden_layers": 0}, "layers is empty; list what each block is"),
        ({"num_hidden_layers": 4}, "layers lists 5 blocks, num_hidden_layers is 4"),
        ({"mlp_size": 0}, "layers has mlp blocks, and mlp_size is 0; give their inner width"),
        ({"num_key_value_heads": 3}, "layers has attention, with 4 heads in 3 groups of 8 channels"),
        ({"attention_head_dim": 0}, "layers has attention, with 4 heads in 2 groups of 0 channels"),
        ({"max_position_embeddings": None}, "layers has attention, and max_position_embeddings is not given"),
        ({"attention_head_dim": 5}, "rotary positions turn pairs of a head's 5 channels; .* which turns 5"),
    ],
)
def test_a_config_that_describes_no_model_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(HYBRID | changes)


def test_a_pure_model_remembers_as_much_after_a_thousand_tokens_as_after_two():
    model = tiny_model()
    with torch.no_grad():
        few, many = (model(prompt(length)).cache_params.nbytes for length in (2, 1000))
        assert few == many
        few, many = (tiny_model(HYBRID)(prompt(length)).cache_params.nbytes for length in (2, 96))
        assert few < many
