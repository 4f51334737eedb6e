"""Prompts that go on from kept states: only what is new is read, and the answers are those without any."""

import logging
import threading
from dataclasses import replace
from string import ascii_letters

import pytest
import torch

from mlmamba.conversation import Turn
from mlmamba.loading import load_model
from mlmamba.state import MambaState
from tests.helpers.images import image
from tests.helpers.processes import wait_for
from tests.helpers.tiny import HYBRID, PER_IMAGE, VOCABULARY, tiny_model, tiny_tokenizer
from workflows.serve.engine import Engine, QueueFull
from workflows.serve.options import Limits
from workflows.serve.reading import Reading
from workflows.serve.sampling import Prompt, Settings
from workflows.train.initial import save

LIMITS = Limits(max_batch=4, max_waiting=20, prefill_tokens=16, images_at_once=1)
REPORTED = Settings(12, logprobs=5)


@pytest.fixture(scope="module", params=["mamba2", "hybrid"])
def loaded(request, tmp_path_factory):
    """Answers are letters alone, so that they come out of the tokenizer as they went in, and end by their length."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reading") / request.param
    hybrid = HYBRID | {"max_position_embeddings": 600} if request.param == "hybrid" else {}
    model = tiny_model(hybrid | {"tie_word_embeddings": False}, max_position_embeddings=300)
    save(model, tiny_tokenizer(), folder)
    model, processor = load_model(folder)
    names = processor.tokenizer.get_vocab().items()
    letters = {token for name, token in names if len(name) == 1 and name in ascii_letters}
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in letters]
    return model, processor


@pytest.fixture
def start(loaded):
    """Starts engines, and closes them in the end."""
    engines = []

    def engine(limits=LIMITS):
        engines.append(Engine(*loaded, limits, threads=1))
        return engines[-1]

    yield engine
    for engine in engines:
        engine.close()


@pytest.fixture
def work(loaded, monkeypatch):
    """Lists what the model does: the shapes of what it reads, and how many images it encodes."""
    model, done = loaded[0], []
    forward, encode = model.forward, model.get_image_features

    def listed_forward(input_ids, **kwargs):
        if input_ids.shape[1] > 1:
            done.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    def listed_encode(pixels):
        done.append(f"{len(pixels)} images")
        return encode(pixels)

    monkeypatch.setattr(model, "forward", listed_forward)
    monkeypatch.setattr(model, "get_image_features", listed_encode)
    return done


def ask(engine, turns, images=(), settings=REPORTED, client="a"):
    return engine.submit(engine.prepare(turns, images), settings, client=client).result(30)


def about(engine, question, shown=0, **given):
    return ask(engine, [Turn("user", question, 1)], [image(shown)], **given)


def test_the_second_question_about_an_image_costs_its_words(start, work):
    engine = start()
    assert about(engine, "what?").cached_tokens == 0
    assert work[:2] == ["1 images", (1, PER_IMAGE)]
    work.clear()
    answer = about(engine, "x")
    assert answer.cached_tokens == PER_IMAGE
    rest = answer.prompt_tokens - PER_IMAGE
    assert work == [(1, min(16, rest - done)) for done in range(0, rest, 16)]  # and no image


@pytest.mark.parametrize("question", ["", "a", "a b"])
def test_every_later_question_finds_the_image_however_short_it_is(start, question):
    engine = start()
    about(engine, "what is shown in the image?")
    assert about(engine, question).cached_tokens == PER_IMAGE


def test_a_conversation_goes_on_from_its_last_answer(start, work):
    engine = start()
    turns, images = [Turn("user", "what?", 1)], [image(1)]
    for question in ("and now?", "sure?", "why?"):
        answer = ask(engine, turns, images)
        assert len(answer.text) == 12
        turns += [Turn("assistant", answer.text), Turn("user", question)]
        work.clear()
        ids = engine.prepare(turns, images).input_ids
        following = ask(engine, turns, images)
        assert following.cached_tokens == answer.prompt_tokens + answer.completion_tokens - 1
        new = len(ids) - following.cached_tokens
        assert sum(length for _, length in work) == new - (new % 16 == 1)  # a piece of one token is not listed


def test_an_answer_that_ended_by_itself_is_gone_on_from_too(start, loaded, monkeypatch):
    engine, turns = start(), [Turn("user", "what?")]
    free = ask(engine, turns)
    config = loaded[0].generation_config
    end = loaded[1].tokenizer.eos_token_id
    monkeypatch.setattr(config, "suppress_tokens", [t for t in config.suppress_tokens if t != end])
    monkeypatch.setattr(config, "min_new_tokens", 3)
    assert end == config.eos_token_id
    head = loaded[0].language_model.lm_head.weight
    with torch.no_grad():  # the end is likelier than any letter, from the fourth token on
        before = head[end].clone()
        head[end] = head[free.ids[3]] * 3
    try:
        engine = start()
        ended = ask(engine, turns)
        assert ended.finish_reason == "stop"
        after = [*turns, Turn("assistant", ended.text), Turn("user", "and?")]
        assert ask(engine, after).cached_tokens == ended.prompt_tokens + ended.completion_tokens - 1
    finally:
        with torch.no_grad():
            head[end] = before


def test_a_conversation_whose_answer_was_changed_goes_on_from_its_question(start):
    engine, turns = start(), [Turn("user", "what?", 1)]
    answer = ask(engine, turns, [image()])
    changed = [*turns, Turn("assistant", answer.text[:-3]), Turn("user", "sure?")]
    assert ask(engine, changed, [image()]).cached_tokens == answer.prompt_tokens


def test_only_the_new_image_of_a_conversation_is_encoded(start, work):
    engine, turns = start(), [Turn("user", "what?", 2)]
    answer = ask(engine, turns, [image(1), image(2)])
    work.clear()
    turns += [Turn("assistant", answer.text), Turn("user", "and here?", 1)]
    ask(engine, turns, [image(1), image(2), image(3)])
    assert work[0] == "1 images"
    assert work.count("1 images") == 1
    work.clear()
    ask(engine, turns, [image(1), image(4), image(3)])  # another second image: all is new
    assert work[:3] == ["1 images", "1 images", "1 images"]


def test_instructions_are_read_once_for_all_questions_after_them(start, work):
    engine, text = start(), "You are a careful observer. Answer with one word."
    for question, cached in (("what is it?", False), ("where?", True), ("x", True)):
        work.clear()
        answer = ask(engine, [Turn("user", f"{text}\n\n{question}", 0, len(text))])
        assert answer.cached_tokens == cached * len(f"<|user|>\n{text}")


def test_the_same_question_again_reads_nothing_and_can_be_answered_otherwise(start, work):
    engine = start()
    first = about(engine, "what?")
    work.clear()
    again = about(engine, "what?")
    assert (again, again.cached_tokens, work) == (first, first.prompt_tokens, [])
    drawn = [about(engine, "what?", settings=Settings(12, temperature=2.0, seed=seed)).ids for seed in range(3)]
    assert len({*drawn}) == 3


def test_answers_are_those_without_kept_states_to_the_last_bit(start):
    """Asked one after the other, so that neither the batch nor its padding rounds differently."""
    with_states, without = start(), start(LIMITS.model_copy(update={"state_cache_bytes": 0}))
    asked = [(question, shown) for shown in (0, 1) for question in ("what?", "is it red? say it", "a", "what?")]
    found = []
    for question, shown in asked:
        one, other = about(with_states, question, shown), about(without, question, shown)
        assert one == other  # with the probabilities of every token
        assert other.cached_tokens == 0
        found.append(one.cached_tokens > 0)
    assert found == [False, True, True, True] * 2


def test_answers_in_a_conversation_are_those_without_but_for_rounding(start):
    """A state after an answer was made token by token, and not in pieces."""
    with_states, without = start(), start(LIMITS.model_copy(update={"state_cache_bytes": 0}))
    turns = [Turn("user", "what?", 1)]
    for question in ("and now?", "sure?", "why?"):
        one, other = (ask(engine, turns, [image(1)]) for engine in (with_states, without))
        assert one.ids == other.ids
        for report, expected in zip(one.logprobs, other.logprobs, strict=True):
            assert report.logprob == pytest.approx(expected.logprob, abs=1e-4)
        turns += [Turn("assistant", one.text), Turn("user", question)]


def test_nobody_finds_what_another_has_asked(start, work):
    engine = start()
    about(engine, "what?", client="a")
    work.clear()
    assert about(engine, "what?", client="b").cached_tokens == 0
    assert "1 images" in work
    assert about(engine, "what?", client="a").cached_tokens > 0
    assert about(engine, "what?", client="").cached_tokens == 0  # the service itself, whose questions are not kept
    assert about(engine, "what?", client="").cached_tokens == 0


@pytest.mark.parametrize("piece", [1, 16])
def test_kept_states_are_never_written_to(start, piece):
    """Also where they are read on from by single tokens, which may write over a state that is their own."""
    engine = start(LIMITS.model_copy(update={"prefill_tokens": piece}))
    turns = [Turn("user", "what?", 1)]
    answer = ask(engine, turns, [image()])
    kept = engine._batch.cache._kept
    wait_for(lambda: len(kept) == 3)  # after the image, the question and the answer
    before = {key: [t.clone() for layer in one.state.layers for t in layer.parts] for key, one in kept.items()}
    about(engine, "more?", settings=Settings(30))
    about(engine, "what?", settings=Settings(30, temperature=1.0))
    ask(engine, [*turns, Turn("assistant", answer.text), Turn("user", "and?")], [image()], Settings(30))
    futures = [engine.submit(engine.prepare(turns, [image()]), Settings(20), client="a") for _ in range(4)]
    assert len({future.result(30).ids for future in futures}) == 1
    for key, tensors in before.items():
        after = [t for layer in kept[key].state.layers for t in layer.parts]
        assert all(torch.equal(one, other) for one, other in zip(tensors, after, strict=True))


@pytest.mark.parametrize("kept", [0, 2**20])
def test_a_prompt_is_read_once_for_all_its_answers(start, work, kept):
    engine = start(LIMITS.model_copy(update={"state_cache_bytes": kept, "max_batch": 3}))
    prompt = engine.prepare([Turn("user", "what is shown?", 1)], [image()])
    settings = [Settings(10, temperature=1.0, seed=seed) for seed in range(8)]
    together = [future.result(30) for future in engine.submit_all(prompt, [(own, None) for own in settings], "a")]
    assert work.count("1 images") == 1
    read = [shape for shape in work if shape != "1 images"]
    assert sum(rows * length for rows, length in read) == len(prompt.input_ids)
    assert [engine.submit(prompt, own).result(30).ids for own in settings] == [answer.ids for answer in together]
    assert len({answer.ids for answer in together}) > 4
    wait_for(lambda: engine.load == (0, 0))


def test_an_answer_that_is_given_up_leaves_the_others_their_prompt(start, loaded, monkeypatch):
    engine = start(LIMITS.model_copy(update={"max_batch": 2}))
    held, begun, forward = threading.Event(), threading.Event(), loaded[0].forward

    def wait(input_ids, **kwargs):
        begun.set()
        assert held.wait(30)
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded[0], "forward", wait)
    prompt = engine.prepare([Turn("user", "what?", 1)], [image()])
    futures = engine.submit_all(prompt, [(Settings(5), None)] * 4, "a")
    assert begun.wait(30)
    assert futures[0].cancel()
    assert futures[3].cancel()
    held.set()
    assert futures[1].result(30).ids == futures[2].result(30).ids


def test_where_the_queue_has_no_room_for_all_answers_none_is_queued(start):
    engine = start(LIMITS.model_copy(update={"max_batch": 1, "max_waiting": 3}))
    with pytest.raises(QueueFull):
        engine.submit_all(engine.prepare([Turn("user", "what?")], []), [(Settings(50), None)] * 8)
    wait_for(lambda: engine.load == (0, 0))
    assert ask(engine, [Turn("user", "what?")]).ids


def test_questions_about_one_image_that_come_together_read_it_once(start, work):
    engine = start()
    prompts = [
        engine.prepare([Turn("user", question, 1)], [image()]) for question in ("what?", "who?", "where?", "why?")
    ]
    futures = [engine.submit(prompt, Settings(5), client="a") for prompt in prompts]
    cached = [future.result(30).cached_tokens for future in futures]
    assert cached[1:] == [PER_IMAGE] * 3
    assert work.count("1 images") == 1


def test_where_the_first_of_them_fails_the_others_are_read_all_the_same(start):
    engine = start()
    good = engine.prepare([Turn("user", "what?", 1)], [image()])
    narrow = replace(good.shown[0], pixels=good.shown[0].pixels[..., :8])
    bad = Prompt(good.input_ids, (narrow,), good.images, good.places)
    futures = [engine.submit(prompt, Settings(5), client="a") for prompt in (bad, good, good)]
    with pytest.raises(Exception, match="8"):
        futures[0].result(30)
    assert futures[1].result(30) == futures[2].result(30)


def test_a_reading_frees_its_memory_with_the_last_answer_that_needs_it(start):
    prompt = start().prepare([Turn("user", "what?", 1)], [image()])
    reading = Reading(prompt, answers=2)
    reading.state, reading.logits = MambaState(), torch.zeros(4)
    assert (reading.pause, reading.over) == (PER_IMAGE, True)
    reading.leave()
    assert reading.state is not None
    reading.leave()
    assert (reading.state, reading.logits) == (None, None)


def test_a_closed_engine_keeps_nothing(start):
    engine = start()
    about(engine, "what?")
    assert engine._batch.cache.nbytes > 0
    engine.close()
    assert (engine._batch.cache.nbytes, len(engine._batch.cache)) == (0, 0)


def test_a_limit_under_one_state_is_said_once_and_the_answers_come(start, caplog):
    engine = start(LIMITS.model_copy(update={"state_cache_bytes": 100}))
    with caplog.at_level(logging.WARNING):
        engine.warm_up()
        assert engine.state_cache_bytes == 0
        assert about(engine, "what?").ids == about(engine, "what?").ids
    (said,) = [record.message for record in caplog.records if "state_cache_bytes" in record.message]
    assert "state_cache_bytes = 100 is less than one state" in said
    assert said.startswith(engine.keeping_problem)
    assert about(engine, "what?").cached_tokens == 0


def test_memory_for_kept_states_that_is_not_there_costs_no_answer(start, monkeypatch, caplog):
    engine = start()
    monkeypatch.setattr(engine._batch.cache, "keep", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert about(engine, "what?").ids == about(engine, "what?").ids
    assert [record.message for record in caplog.records if "no states are kept" in record.message]
    assert engine.keeping_problem == "there is no memory for them (RuntimeError)"


def test_an_image_of_another_size_finds_no_state_of_the_one_that_it_was(start):
    """Its pixels, as the model sees them, are others."""
    engine, turns = start(), [Turn("user", "what?", 1)]
    ask(engine, turns, [image()])
    assert ask(engine, turns, [image()]).cached_tokens > 0
    assert ask(engine, turns, [image(size=(300, 20))]).cached_tokens == 0


@pytest.mark.parametrize("loaded", ["mamba2"], indirect=True)
@pytest.mark.parametrize(("limits", "piece"), [({}, 128), ({"busy_prefill_tokens": 300}, 300)])
def test_a_prompt_of_four_thousand_tokens_delays_running_answers_by_one_piece(loaded, limits, piece, monkeypatch):
    """Between two pieces of it every running answer has its next token; alone it would be read 512 tokens at a time."""
    model, processor = loaded
    shapes, original = [], model.forward

    def listed(input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", listed)
    monkeypatch.setattr(processor, "max_length", 5000)
    engine = Engine(model, processor, Limits(max_batch=8, **limits))
    running = [engine.submit(engine.prepare([Turn("user", text)], []), Settings(200), client="a") for text in "abc"]
    wait_for(lambda: (3, 1) in shapes)
    long = engine.prepare([Turn("user", "x " * 2000)], [])
    late = engine.submit(long, Settings(2), client="b").result(60)
    assert late.prompt_tokens == len(long.input_ids) > 4000
    assert all(len(future.result(60).ids) == 200 for future in running)
    engine.close()
    pieces = [i for i, (rows, length) in enumerate(shapes) if rows == 1 and length > 100]
    assert len(pieces) > 10
    assert {shapes[i][1] for i in pieces[:-1]} == {piece}
    assert all(shapes[i + 1] in ((3, 1), (4, 1)) for i in pieces)


@pytest.mark.parametrize("loaded", ["mamba2"], indirect=True)
def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(loaded, monkeypatch):
    monkeypatch.setattr(loaded[1], "max_length", 5000)
    lengths, asked, forward = [], threading.Event(), loaded[0].forward

    def held(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        assert asked.wait(30)
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded[0], "forward", held)
    engine = Engine(*loaded, Limits(max_batch=8))
    futures = [engine.submit(engine.prepare([Turn("user", "x " * 2000)], []), Settings(1))]
    wait_for(lambda: lengths)
    futures += [engine.submit(engine.prepare([Turn("user", text)], []), Settings(1)) for text in ("what?", "who?")]
    asked.set()
    assert all(future.result(60).ids for future in futures)
    engine.close()
    assert lengths.count(512) == 7
    assert next(i for i, length in enumerate(lengths) if length < 100) <= 2


def test_prompts_of_unlike_lengths_are_not_padded_to_twice_their_tokens(start, work):
    engine = start(LIMITS.model_copy(update={"prefill_tokens": 512, "max_batch": 8}))
    hold = engine.submit(engine.prepare([Turn("user", "x")], []), Settings(40))
    futures = [engine.submit(engine.prepare([Turn("user", "x" * n)], []), Settings(2)) for n in (1, 150, 2, 3, 140, 4)]
    read = sum(future.result(30).prompt_tokens for future in (hold, *futures))
    assert sum(rows * length for rows, length in work) <= 2 * read
