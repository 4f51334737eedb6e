"""Hybrids in the engine: attention's keys and values lie in slots of a stated size, and answers are those alone."""

import random
import time

import pytest
import torch

from mlmamba.conversation import Turn
from mlmamba.image_layout import join
from mlmamba.loading import load_model
from tests.helpers.images import image
from tests.helpers.processes import wait_for
from tests.helpers.serving import resolved
from tests.helpers.tiny import HYBRID, tiny_model, tiny_tokenizer
from workflows.serve.engine import Engine
from workflows.serve.options import Limits
from workflows.serve.sampling import Settings
from workflows.serve.service import Served
from workflows.train.initial import save

LIMITS = Limits(max_batch=4, max_waiting=6, prefill_tokens=16, images_at_once=1, max_tokens=40)
QUESTIONS = ["what is shown?", "is there a red circle in the image? say it", "a", "what is the shape? " * 4, "no"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Prompts of up to 200 tokens, sequences of up to 220."""
    torch.set_num_threads(1)
    text = HYBRID | {"tie_word_embeddings": False, "max_position_embeddings": 220}
    folder = tmp_path_factory.mktemp("serve") / "hybrid"
    save(tiny_model(text, max_position_embeddings=200), tiny_tokenizer(), folder)
    return load_model(folder)


@pytest.fixture
def engine(loaded):
    engine = Engine(*loaded, LIMITS, threads=1)
    yield engine
    engine.close()


def generated(loaded, prompt, count):
    images = join(prompt.shown) if prompt.shown else {}
    with torch.inference_mode():
        ids = loaded[0].generate(input_ids=prompt.input_ids[None], **images, max_new_tokens=count, do_sample=False)
    return tuple(ids[0, len(prompt.input_ids) :].tolist())


def test_answers_are_those_of_generate_whoever_joins_and_leaves(engine, loaded):
    """Thirty requests of many lengths at random times over four slots, prompts read in pieces of sixteen tokens."""
    chance = random.Random(0)
    shown = [[image(10 * i + j) for j in range(i % 3)] for i in range(len(QUESTIONS))]
    prompts = [engine.prepare([Turn("user", q, len(p))], p) for q, p in zip(QUESTIONS, shown, strict=True)]
    asked = [(chance.choice(prompts), chance.randrange(1, 30)) for _ in range(30)]
    futures = []
    for prompt, count in asked:
        wait_for(lambda: engine.load[0] < LIMITS.max_waiting)
        futures.append(engine.submit(prompt, Settings(count)))
        time.sleep(chance.choice([0, 0, 0.002, 0.01]))
    answers = [future.result(60) for future in futures]
    expected = {}
    for (prompt, count), answer in zip(asked, answers, strict=True):
        key = (id(prompt.input_ids), count)
        expected[key] = expected.get(key) or generated(loaded, prompt, count)
        assert answer.ids == expected[key]
    assert len({answer.ids for answer in answers}) > 15


def test_an_answer_ends_where_the_state_is_full(engine, loaded):
    """A prompt of 200 tokens leaves room for 20 read ones; the last of an answer is not read."""
    prompt = engine.prepare([Turn("user", "x" * 170)], [])
    assert 181 < len(prompt.input_ids) <= 200
    room = 220 - len(prompt.input_ids) + 1
    answer = engine.submit(prompt, Settings(40)).result(60)
    assert answer.ids == generated(loaded, prompt, room)
    assert answer.finish_reason == "length" or answer.ids[-1] == 0
    with pytest.raises(
        ValueError, match=r"a prompt of \d+ tokens and 40 new ones are over the 220 for which attention"
    ):
        generated(loaded, prompt, 40)
    full = [engine.submit(prompt, Settings(40)) for _ in range(4)]
    assert {future.result(60).ids for future in full} == {answer.ids}


def test_memory_is_that_of_the_slots_from_the_first_answer_on(engine):
    prompt = engine.prepare([Turn("user", "a")], [])
    held = set()
    for _ in range(3):
        for future in [engine.submit(prompt, Settings(12)) for _ in range(4)]:
            future.result(60)
        held.add(engine._batch.pool.nbytes)
    layers, groups, width = 2, 2, 8
    keys_and_values = 2 * layers * 4 * groups * 220 * width * 4
    assert len(held) == 1
    assert keys_and_values < held.pop() < 2 * keys_and_values


def test_the_limit_stands_in_the_list_of_models(engine):
    entry = Served(engine, resolved("3")).entry(0)
    assert (entry["max_model_len"], entry["max_sequence_len"]) == (200, 220)
    assert engine.max_sequence == 220
