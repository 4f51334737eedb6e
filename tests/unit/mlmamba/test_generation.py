"""`generate`: each prompt of a batch gets what it gets alone, however it is padded, repeated, split or streamed."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from tests.helpers.tiny import IMAGE_ID, PER_IMAGE, images, pad, prompt

ROWS = [prompt(12, images=1, seed=1), prompt(7, images=1, seed=2), prompt(2, seed=3), prompt(15, images=2, seed=4)]
IMAGES = images(4)
SEEN = [IMAGES[:1], IMAGES[1:2], None, IMAGES[2:]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
BEAMS = {**GREEDY, "num_beams": 3}
SAMPLES = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 3, "num_beams": 1}


def alone(model, **options) -> list[torch.Tensor]:
    """New tokens (answers, n) of each prompt by itself."""
    return [
        model.generate(row, pixel_values=seen, **options)[:, row.shape[1] :]
        for row, seen in zip(ROWS, SEEN, strict=True)
    ]


def together(model, side: str = "left", **options) -> torch.Tensor:
    ids, mask = pad(ROWS, side)
    out = model.generate(ids, attention_mask=mask, pixel_values=IMAGES, **options)
    return out[:, ids.shape[1] :]


def test_the_answers_differ(model):
    """Else the tests below would prove nothing."""
    answers = {tuple(row.tolist()) for row in together(model, **GREEDY)}
    assert len(answers) == 4
    other = model.generate(ROWS[0], pixel_values=IMAGES[1:2], **GREEDY)[0, 12:].tolist()
    assert tuple(other) not in answers


@pytest.mark.parametrize(
    "options",
    [GREEDY, BEAMS, {**BEAMS, "num_return_sequences": 2}],
    ids=["greedy", "beams", "two answers of three beams"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unequal_prompts_equals_each_alone(model, options, side):
    assert torch.equal(together(model, side, **options), torch.cat(alone(model, **options)))


def test_rows_padded_on_the_right_come_back_padded_on_the_left(model):
    """So that the new tokens follow the prompt. transformers' warning of wrong results would be false here."""
    (ids, mask), (left, _) = pad(ROWS, "right"), pad(ROWS, "left")
    assert torch.equal(model.generate(ids, attention_mask=mask, pixel_values=IMAGES, **GREEDY)[:, : ids.shape[1]], left)


def test_decoding_equals_reading_everything_again(model):
    row = ROWS[0]
    for token in alone(model, **GREEDY)[0][0]:
        with torch.no_grad():
            logits = model(row, IMAGES[:1]).logits[0, -1]
        logits[IMAGE_ID] = float("-inf")
        assert token == logits.argmax()
        row = torch.cat([row, token.view(1, 1)], dim=1)


def test_several_samples_of_a_prompt_see_its_images(model):
    """With one likely token left per step, every sample is the greedy answer."""
    sampled = together(model, **SAMPLES)
    assert torch.equal(sampled, together(model, **GREEDY).repeat_interleave(3, dim=0))


@pytest.mark.parametrize("options", [{**BEAMS, "num_return_sequences": 2}, SAMPLES])
def test_a_prompt_is_read_once_for_all_its_answers(model, options):
    shapes = []
    hook = model.language_model.backbone.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
    try:
        ids, mask = pad([*ROWS, prompt(1)], "left")  # of one token, nothing is read before
        out = model.generate(ids, attention_mask=mask, pixel_values=IMAGES, **options)
    finally:
        hook.remove()
    times = max(options["num_beams"], options["num_return_sequences"])
    assert shapes[0] == (len(ids), ids.shape[1] - 1)
    assert set(shapes[1:]) == {(times * len(ids), 1)}
    single = model.generate(prompt(1), **options)[:, 1:]
    each = options["num_return_sequences"]
    assert torch.equal(out[-each:, ids.shape[1] :][:, : single.shape[1]], single)


@pytest.mark.parametrize("beams", [1, 3])
def test_sampling_is_reproducible_with_a_seed(model, beams):
    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2, "num_beams": beams}
        return together(model, max_new_tokens=8, eos_token_id=None, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("options", [GREEDY, {**BEAMS, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_features_can_be_given_in_place_of_images(model, options):
    with torch.no_grad():
        features = model.get_image_features(IMAGES)
    ids, mask = pad(ROWS, "left")
    out = model.generate(ids, attention_mask=mask, image_features=features, **options)
    assert torch.equal(out[:, ids.shape[1] :], together(model, **options))


@pytest.mark.parametrize("options", [GREEDY, {**BEAMS, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generation_goes_on_from_a_state(model, options):
    """One image is read once; questions of different length about it are answered in one batch."""
    prefix = prompt(6, images=1, seed=5)
    questions = [prompt(n, seed=n) for n in (5, 1, 3)]
    with torch.no_grad():
        state = model(prefix, IMAGES[:1]).cache_params
    before = [layer.ssm.clone() for layer in state.layers]
    ids, mask = pad(questions, "left")
    rows = torch.zeros(3, dtype=torch.long)
    out = model.generate(ids, attention_mask=mask, cache_params=state.select(rows), **options)[:, ids.shape[1] :]
    expected = [
        model.generate(torch.cat([prefix, q], dim=1), pixel_values=IMAGES[:1], **options)[:, 6 + q.shape[1] :]
        for q in questions
    ]
    assert torch.equal(out, torch.cat(expected))
    single = model.generate(questions[0], cache_params=state, **options)[:, 5:]
    assert torch.equal(single, expected[0])
    assert torch.equal(model.generate(questions[1], cache_params=state, **options)[:, 1:], expected[1])
    assert all(torch.equal(layer.ssm, old) for layer, old in zip(state.layers, before, strict=True))


def test_generation_stops_at_the_end_token_and_pads(model):
    answers = alone(model, **GREEDY)
    end = int(answers[0][0, 2])
    out = together(model, **{**GREEDY, "eos_token_id": end})
    for row, answer in zip(out, answers, strict=True):
        answer = answer[0].tolist()
        kept = answer[: answer.index(end) + 1] if end in answer else answer
        assert row.tolist() == (kept + [0] * 6)[: len(row)]


def test_a_placeholder_is_never_generated(model):
    scores = model.generate(ROWS[2], return_dict_in_generate=True, output_scores=True, **GREEDY).scores
    assert all(score[0, IMAGE_ID] == float("-inf") for score in scores)


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_wrong_number_of_images_is_an_error(model, options, given):
    with pytest.raises(ValueError, match=rf"has {2 * PER_IMAGE} image placeholders but {given or 'no'} images"):
        model.generate(ROWS[3], pixel_values=IMAGES[:given] if given else None, **options)


def test_beams_do_not_stream(model, tokenizer):
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        model.generate(ROWS[2], streamer=TextStreamer(tokenizer), **BEAMS)


def test_tokens_stream_as_they_come(model, tokenizer, capsys):
    expected = tokenizer.decode(alone(model, **GREEDY)[0][0])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    options = {"pixel_values": IMAGES[:1], "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=model.generate, args=(ROWS[0],), kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected

    model.generate(ROWS[0], pixel_values=IMAGES[:1], streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out == expected + "\n"


TURNS = [prompt(9, images=1, seed=11), prompt(4, seed=12), prompt(9, images=1, seed=13)]
"""What a user says; the first and last show an image."""


@pytest.mark.parametrize("name", ["cache_params", "past_key_values"])
@pytest.mark.parametrize("form", ["new part", "whole conversation"])
@pytest.mark.parametrize("options", [GREEDY, {**GREEDY, "eos_token_id": 0}], ids=["to the length", "with an end"])
def test_the_state_of_an_answer_starts_the_next_turn(model, name, form, options):
    options = {**options, "return_dict_in_generate": True}
    whole, state = torch.zeros(1, 0, dtype=torch.long), {}
    for turn, shown in zip(TURNS, (IMAGES[:1], IMAGES[:1], IMAGES[:2]), strict=True):
        whole = torch.cat([whole, turn], 1)
        expected = model.generate(whole, pixel_values=shown, **options).sequences
        seen = shown if form == "whole conversation" or not state else shown[1:]
        out = model.generate(
            whole if form == "whole conversation" else turn,
            pixel_values=seen if len(seen) else None,
            **state,
            **options,
        )
        assert torch.equal(out.sequences[:, -6:], expected[:, -6:])
        if form == "whole conversation":
            assert torch.equal(out.sequences, expected)
        assert out.cache_params is out.past_key_values
        whole, state = expected, {name: out.past_key_values}
        with torch.no_grad():
            read = model(whole, IMAGES[:1] if len(shown) == 1 else shown).cache_params
        for ours, theirs in zip(out.cache_params.layers, read.layers, strict=True):
            torch.testing.assert_close(ours.ssm, theirs.ssm, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.conv, theirs.conv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {**BEAMS, "num_return_sequences": 2},
        {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "samples"],
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["new part", "whole conversation"])
def test_the_states_of_a_batch_start_its_next_turns(model, options, side, form):
    """Answers of unequal length, whose state must not have read the padding behind the shorter ones."""
    ids, mask = pad(ROWS, side)
    end = int(alone(model, **GREEDY)[0][0, 2])
    options = {**options, "eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, pixel_values=IMAGES, **options)
    each = len(first.sequences) // 4
    plain = {**GREEDY, "return_dict_in_generate": True}
    next_turns = [prompt(3 + i, seed=20 + i) for i in range(len(first.sequences))]
    answers = first.sequences[:, ids.shape[1] :].tolist()
    answers = [row[: row.index(end) + 1] if end in row else row for row in answers]
    assert len({len(row) for row in answers}) > 1
    talks = [
        torch.cat([ROWS[i // each], torch.tensor([answer]), turn], 1)
        for i, (answer, turn) in enumerate(zip(answers, next_turns, strict=True))
    ]
    expected = [
        model.generate(talk, pixel_values=SEEN[i // each], **plain).sequences[:, talk.shape[1] :]
        for i, talk in enumerate(talks)
    ]
    given, given_mask = pad(talks if form == "whole conversation" else next_turns, side)
    shown = None
    if form == "whole conversation":
        shown = torch.cat([SEEN[i // each] for i in range(len(talks)) if SEEN[i // each] is not None])
    out = model.generate(given, attention_mask=given_mask, pixel_values=shown, cache_params=first.cache_params, **plain)
    assert torch.equal(out.sequences[:, given.shape[1] :], torch.cat(expected))


def test_a_state_is_given_once_and_with_something_new(model):
    out = model.generate(ROWS[2], return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="given twice"):
        model.generate(ROWS[2], cache_params=out.cache_params, past_key_values=out.cache_params, **GREEDY)
    with pytest.raises(ValueError, match="given twice"):
        model(ROWS[2], cache_params=out.cache_params, past_key_values=out.cache_params)
    with pytest.raises(ValueError, match="prompt 0 is what the state has read already"):
        model.generate(out.sequences, past_key_values=out.past_key_values, **GREEDY)
    with torch.no_grad():
        ours = model(ROWS[2], past_key_values=out.cache_params)
        theirs = model(torch.cat([out.sequences, ROWS[2]], 1))
    torch.testing.assert_close(ours.logits[:, -1], theirs.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert ours.past_key_values is ours.cache_params


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_the_model_does_not_return_is_refused_by_every_way_to_ask(model, name, monkeypatch):
    with pytest.raises(ValueError, match=f"cannot use {name}"):
        model.generate(ROWS[2], return_dict_in_generate=True, **{name: True}, **GREEDY)
    monkeypatch.setattr(model.config, name, True)
    with pytest.raises(ValueError, match="returns no hidden states"):
        model(ROWS[2])
    model(ROWS[2], **{name: False})
