"""The engine: answers in a batch are the answers alone, each row ends for its own reason, and the queue is bounded."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mlmamba.conversation import Turn
from mlmamba.loading import load_model
from tests.tiny import PER_IMAGE, tiny_model, tiny_tokenizer
from workflows.build import save
from workflows.serve.engine import Engine, EngineClosed, QueueFull
from workflows.serve.generation import Prompt, Settings, generate
from workflows.serve.limits import Limits

QUESTIONS = [
    "what is shown?",
    "is there a red circle in the image? say it",
    "a",
    "what is the shape? " * 4,
    "no",
    "yes",
]


def save_tiny_model(out):
    """A model folder. Its answers are noise that depends on every word and picture."""
    model = tiny_model({"tie_word_embeddings": False}, max_position_embeddings=300)
    save(model, tiny_tokenizer(), out)
    return out


def picture(seed=0, size=(48, 40)):
    """A few large random blocks: noise would be all alike to the encoder."""
    pixels = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    torch.set_num_threads(1)
    return load_model(save_tiny_model(tmp_path_factory.mktemp("serve") / "tiny"))


@pytest.fixture
def engine(loaded):
    engine = Engine(*loaded, Limits(max_batch=4, max_waiting=6), threads=1)
    yield engine
    engine.close()


@pytest.fixture
def gate(loaded, monkeypatch):
    """Holds the model back until it is opened, and records the size of every batch."""
    opened, begun, sizes, original = threading.Event(), threading.Event(), [], loaded[0].generate

    def generate_when_open(input_ids, **kwargs):
        sizes.append(len(input_ids))
        begun.set()
        assert opened.wait(30)
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded[0], "generate", generate_when_open)
    return SimpleNamespace(open=opened.set, begun=begun, sizes=sizes)


def prompts(engine):
    """Different lengths, some with a picture or two."""
    shown = [i % 3 for i in range(len(QUESTIONS))]
    pictures = [[picture(10 * i + j) for j in range(n)] for i, n in enumerate(shown)]
    return [engine.prepare([Turn("user", q, len(p))], p) for q, p in zip(QUESTIONS, pictures, strict=True)]


def test_an_answer_in_a_batch_is_the_answer_alone(engine, loaded):
    asked = prompts(engine)
    settings = [Settings(max_tokens=4 + 5 * i) for i in range(len(asked))]
    alone = [generate(*loaded, [p], [s])[0] for p, s in zip(asked, settings, strict=True)]
    assert generate(*loaded, asked, settings) == alone
    assert len({answer.text for answer in alone}) == len(alone)
    lengths = zip(alone, settings, strict=True)
    assert all((a.completion_tokens == s.max_tokens) == (a.finish_reason == "length") for a, s in lengths)
    assert [a.prompt_tokens for a in alone] == [len(p.input_ids) for p in asked]


def test_pictures_go_to_their_own_prompts(engine, loaded):
    asked = [engine.prepare([Turn("user", "what?", 1)], [picture(seed)]) for seed in range(4)]
    answers = generate(*loaded, asked, [Settings(max_tokens=20)] * 4)
    assert len({answer.text for answer in answers}) > 1  # else the model does not look, and this shows nothing
    reverse = generate(*loaded, asked[::-1], [Settings(max_tokens=20)] * 4)
    assert reverse == answers[::-1]


def test_the_answer_is_what_the_model_generates(engine, loaded):
    model, processor = loaded
    inputs = processor(images=[picture(5)], text=processor.prompt([Turn("user", "what?", 1)]))
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    expected = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    prompt = engine.prepare([Turn("user", "what?", 1)], [picture(5)])
    assert engine.submit(prompt, Settings(max_tokens=20)).result(30).text == expected


def test_rows_end_by_stop_string_and_length(engine, loaded):
    asked = prompts(engine)[:3]
    free = generate(*loaded, asked, [Settings(12)] * 3)
    stop = free[1].text[3:6]
    settings = [Settings(12), Settings(12, stop=("never seen", stop)), Settings(7)]
    ended = generate(*loaded, asked, settings)
    assert ended[0] == free[0]
    assert (ended[1].text, ended[1].finish_reason) == (free[1].text[: free[1].text.index(stop)].strip(), "stop")
    assert ended[1].completion_tokens < 12
    assert (ended[2].completion_tokens, ended[2].finish_reason) == (7, "length")
    assert free[2].text.startswith(ended[2].text)


def test_rows_end_by_the_end_token(engine, loaded, monkeypatch):
    model, asked = loaded[0], prompts(engine)[:3]
    with torch.inference_mode():
        ids = model.generate(input_ids=asked[0].input_ids[None], max_new_tokens=12, do_sample=False)[0]
    new = ids[len(asked[0].input_ids) :].tolist()
    monkeypatch.setattr(model.generation_config, "eos_token_id", new[4])
    ended = generate(*loaded, asked, [Settings(12)] * 3)
    assert (ended[0].finish_reason, ended[0].completion_tokens) == ("stop", new.index(new[4]) + 1)
    assert ended == [generate(*loaded, [p], [Settings(12)])[0] for p in asked]
    assert len({answer.completion_tokens for answer in ended}) > 1


def test_a_seed_decides_a_sampled_answer(engine):
    prompt = engine.prepare([Turn("user", "what?")], [])
    sampled = [Settings(16, temperature=1.5, top_p=0.95, seed=seed) for seed in (1, 1, 2)]
    before = torch.random.get_rng_state()
    futures = [engine.submit(prompt, s) for s in (sampled[0], Settings(16), sampled[1], Settings(16), sampled[2])]
    first, greedy, again, greedy_again, other = (future.result(30).text for future in futures)
    assert first == again != other
    assert greedy == greedy_again != first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_answers_vary(engine):
    prompt = engine.prepare([Turn("user", "what?")], [])
    futures = [engine.submit(prompt, Settings(16, temperature=2.0)) for _ in range(3)]
    assert len({future.result(30).text for future in futures}) > 1


def test_a_vanishing_temperature_is_greedy():
    assert Settings(4, temperature=1e-9).greedy
    assert not Settings(4, temperature=0.1).greedy


def test_those_that_wait_are_answered_together(engine, gate):
    prompt = engine.prepare([Turn("user", "what?")], [])
    first = engine.submit(prompt, Settings(2))
    assert gate.begun.wait(30)
    waiting = [engine.submit(prompt, Settings(2)) for _ in range(3)]
    waiting.append(engine.submit(prompt, Settings(2, temperature=1.0)))
    waiting += [engine.submit(prompt, Settings(2)) for _ in range(2)]
    gate.open()
    for future in (first, *waiting):
        future.result(30)
    assert gate.sizes == [1, 4, 1, 1]  # max_batch greedy ones, the sampled one, the greedy one left over


def test_the_queue_is_bounded_and_cancelling_frees_a_place(engine, gate):
    prompt = engine.prepare([Turn("user", "what?")], [])
    running = engine.submit(prompt, Settings(2))
    assert gate.begun.wait(30)
    waiting = [engine.submit(prompt, Settings(2)) for _ in range(6)]
    with pytest.raises(QueueFull) as full:
        engine.submit(prompt, Settings(2))
    assert 1 <= full.value.retry_after <= 60
    assert waiting[2].cancel()
    replacement = engine.submit(prompt, Settings(2))
    gate.open()
    for future in (running, *waiting[:2], *waiting[3:], replacement):
        future.result(30)


def test_one_bad_prompt_does_not_fail_its_neighbours(engine, gate):
    good = engine.prepare([Turn("user", "what?", 1)], [picture()])
    bad = Prompt(good.input_ids, None)  # placeholders and no picture: only the model itself can notice
    first = engine.submit(good, Settings(4))
    assert gate.begun.wait(30)
    futures = [engine.submit(p, Settings(4)) for p in (good, bad, good)]
    gate.open()
    assert futures[0].result(30) == futures[2].result(30) == first.result(30)
    with pytest.raises(ValueError, match="placeholders"):
        futures[1].result(30)
    assert engine.alive


def test_closing_answers_those_that_wait(loaded):
    engine = Engine(*loaded, Limits(max_batch=2))
    engine.warm_up()
    prompt = engine.prepare([Turn("user", "what?")], [])
    futures = [engine.submit(prompt, Settings(4)) for _ in range(5)]
    engine.close()
    assert all(future.done() for future in futures)
    assert not engine.alive
    with pytest.raises(EngineClosed):
        engine.submit(prompt, Settings(4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("long " * 300, "over the limit of 300"),
        ("<image>", "empty"),
    ],
)
def test_prompts_that_cannot_be(engine, text, message):
    with pytest.raises(ValueError, match=message):
        engine.prepare([Turn("user", text)], [])


def test_room_for_pictures(engine):
    assert engine.max_pictures == 300 // PER_IMAGE
