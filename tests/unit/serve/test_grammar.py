"""Answers of a form, made by a tiny model whose weights are random: what it says is noise, so only the grammar can be
the reason that an answer is JSON. Also what a hostile schema may not do."""

import json

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlmamba.conversation import Turn
from tests.helpers.schemas import random_schema
from tests.helpers.serving import load_tiny
from tests.helpers.tiny import NEOX, NO_NEOX, VOCABULARY
from workflows.serve import grammar
from workflows.serve.engine import Engine
from workflows.serve.grammar import GrammarError, Grammars, restrict
from workflows.serve.options import Limits
from workflows.serve.sampling import Settings
from workflows.serve.structured import choice_form, json_form

LIMITS = Limits(max_batch=16, max_waiting=200, max_tokens=2000)
END, IMAGE = 0, 1
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 9}},
    "required": ["x", "s"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("grammar") / "tiny")


@pytest.fixture(scope="module")
def engine(loaded):
    engine = Engine(*loaded, LIMITS, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompt(engine):
    return engine.prepare([Turn("user", "hello")], [])


def of_json(schema):
    return json_form(schema, "response_format", 16_384)


def of_words(*words):
    return choice_form(list(words), "guided_choice", 16_384)


def ask(engine, prompt, form, tokens=2000, **settings):
    return engine.submit(prompt, Settings(tokens, grammar=engine.grammars.compile(form), **settings)).result(60)


@pytest.fixture
def speak(loaded, monkeypatch):
    """Make the model say a text whose bytes are all different, and then end."""
    model, processor = loaded
    forward = model.forward

    def saying(text):
        ids = [*processor.tokenizer(text)["input_ids"], END]
        after = dict(zip([processor.tokenizer("\n")["input_ids"][-1], *ids], ids, strict=False))

        def spoken(**inputs):
            out = forward(**inputs)
            for row, last in enumerate(inputs["input_ids"][:, -1].tolist()):
                if last in after:
                    out.logits[row, -1, after[last]] = 1e4
            return out

        monkeypatch.setattr(model, "forward", spoken)

    return saying


def test_every_answer_of_random_schemas_is_json_that_satisfies_them(engine, prompt):
    schemas = [random_schema(seed) for seed in range(40)]
    compiled = [engine.grammars.compile(of_json(schema)) for schema in schemas]
    settings = [Settings(2000, temperature=1.0, seed=i, grammar=one) for i, one in enumerate(compiled)]
    answers = [future.result(60) for future in [engine.submit(prompt, one) for one in settings]]
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)
    assert len({answer.text for answer in answers}) > 30


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_one_of_the_words_is_answered(engine, prompt, temperature):
    words = ["yes", "no", "a/b", "ca(f\u00e9)", "\U0001f600", "say <|endoftext|>", "two\nlines", "[a-z]+", "yes, but"]
    for seed in range(6):
        answer = ask(engine, prompt, of_words(*words), temperature=temperature, seed=seed)
        assert answer.text in words
        assert answer.finish_reason == "stop"


def test_rows_with_and_without_a_form_share_a_batch(engine, prompt):
    asked = [Settings(40, grammar=engine.grammars.compile(of_json(POINT))), Settings(40), Settings(40, 1.0, seed=3)]
    asked += [Settings(40, 1.0, seed=3, grammar=engine.grammars.compile(of_words("yes", "no")))]
    alone = [engine.submit(prompt, one).result(60) for one in asked]
    together = [future.result(60) for future in [engine.submit(prompt, one) for one in asked * 3]]
    assert together == alone * 3


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("[12,3]", of_json({"type": "array", "items": {"type": "integer"}})),
        ("yes", of_words("no", "yes", "yes, but")),
        (" [4\t]", of_json({})),
        ("-3.5e7", of_json({"type": "number"})),
    ],
)
def test_an_answer_that_has_the_form_anyway_is_the_same_with_it(engine, prompt, speak, said, form):
    speak(said)
    free = engine.submit(prompt, Settings(30, logprobs=2)).result(60)
    held = ask(engine, prompt, form, 30, logprobs=2)
    assert free.text == held.text == said.strip()
    assert held.logprobs == free.logprobs  # the model's own, not those among what is allowed


def test_the_end_comes_when_the_form_allows_it_and_no_special_token_ever(engine, prompt, loaded, monkeypatch):
    forward = loaded[0].forward

    def ending(**inputs):
        out = forward(**inputs)
        out.logits[:, -1, [END, IMAGE]] = 1e4
        return out

    monkeypatch.setattr(loaded[0], "forward", ending)
    monkeypatch.setattr(loaded[0].generation_config, "suppress_tokens", None)
    answer = ask(engine, prompt, of_json(POINT), temperature=1.0, seed=1)
    jsonschema.validate(json.loads(answer.text), POINT)
    assert not {END, IMAGE} & set(answer.ids)
    short = ask(engine, prompt, of_words("yes", "yes, but"))
    assert (short.text, short.ids[-1]) == ("yes", END)


def test_a_model_without_an_end_token_still_ends(engine, prompt, loaded, monkeypatch):
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", 10**6)
    own = Engine(*loaded, LIMITS, threads=1)
    assert ask(own, prompt, of_json({"enum": [[1, 2]]})).finish_reason == "stop"
    own.close()


def test_an_answer_that_is_cut_says_so(engine, prompt):
    answer = ask(engine, prompt, of_json({"type": "string", "minLength": 50}), 10)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 10)


def test_a_stop_string_ends_it_before_the_form_does(engine, prompt):
    answer = ask(engine, prompt, of_words("one two", "one three"), stop=(" t",))
    assert (answer.text, answer.finish_reason) == ("one", "stop")


def test_streamed_pieces_are_the_answer(engine, prompt):
    pieces = []
    settings = Settings(500, 1.0, seed=5, grammar=engine.grammars.compile(of_json(POINT)))
    answer = engine.submit(prompt, settings, pieces.append).result(60)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert len(pieces) > 3


def test_a_form_is_compiled_once(engine):
    forms = of_json(POINT), json_form(dict(POINT), "guided_json", 16_384)
    assert engine.grammars.compile(forms[0]) is engine.grammars.compile(forms[1])
    assert engine.grammars.find(of_words("never", "asked")) is None


def _deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]},
            "over 2 s or 64",
        ),
        ({"type": "integer", "multipleOf": 99_999_989}, "over 2 s or 64"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "strng"}, "strng"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "unsatisfiable"),
        ({"$ref": "http://127.0.0.1/schema"}, "fetch"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"allOf": [{"type": "string", "pattern": f"^(.{{{n}}})*$"} for n in (97, 89, 83)]}, "too many expressions"),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(900)}}, "items"),
        (_deep(150), "recursion limit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_that_asks_for_too_much_is_refused_and_the_service_goes_on(engine, prompt, schema, message):
    with pytest.raises(GrammarError, match=message) as caught:
        engine.grammars.compile(of_json(schema))
    assert len(str(caught.value)) < 500
    assert ask(engine, prompt, of_words("yes")).text == "yes"


def test_the_process_that_tries_grammars_may_be_killed(engine, prompt):
    engine.grammars.compile(of_words("before"))
    grammar._trials._process.kill()
    grammar._trials._process.wait()
    assert ask(engine, prompt, of_words("after")).text == "after"


def test_a_form_that_takes_too_long_on_the_way_fails_alone(engine, prompt, monkeypatch):
    made = engine.grammars.compile(of_json({"type": "array", "items": {"type": "integer"}, "minItems": 50}))
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "_MOST_SECONDS", 0.0)
        with pytest.raises(GrammarError, match="simplify it"):
            engine.submit(prompt, Settings(500, grammar=made)).result(60)
    assert engine.submit(prompt, Settings(5)).result(60).completion_tokens <= 5
    assert ask(engine, prompt, of_words("yes")).text == "yes"


def test_a_tokenizer_that_lacks_bytes_is_refused_by_name():
    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != "y"]
    names = ["<|endoftext|>", "<image>", *letters]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(names[:2])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=names[0])
    with pytest.raises(GrammarError, match="no token for the byte 0x79"):
        Grammars(tokenizer, len(names), [0]).compile(of_words("yes"))


@pytest.mark.skipif(not NEOX.exists(), reason=NO_NEOX)
def test_gpt_neox_writes_json_in_its_own_tokens():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NEOX), eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    matcher = Grammars(tokenizer, 50_304, [0]).compile(of_json(POINT)).matcher()
    for token in tokenizer('{"x": 42, "s": "caf\u00e9"}')["input_ids"]:
        allowed = matcher.allowed()
        assert allowed.shape == (50_304,)
        assert allowed[token]
        assert not allowed[[0, image]].any()
        assert not allowed[len(tokenizer) :].any()
        whole = matcher.take(token)
    assert whole
    assert matcher.accepts


def test_logits_without_a_grammar_are_not_touched():
    logits = torch.randn(3, VOCABULARY)
    assert restrict(logits, [None] * 3) is logits
