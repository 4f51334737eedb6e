"""OpenAI's own client, unchanged, against the service over HTTP. test_serve.py has Ray Serve around it."""

import asyncio
import http.client
import json
import math
from typing import Annotated, Literal

import openai
import pydantic
import pytest
import torch

from mlmamba.conversation import Turn
from tests.helpers.images import encoded
from tests.helpers.processes import wait_for
from tests.helpers.serve_client import ask, data_uri
from tests.helpers.serving import load_tiny, raw, resolved, running, serve
from workflows.serve.auth import Access
from workflows.serve.engine import Engine
from workflows.serve.options import Limits
from workflows.serve.service import Served

LIMITS = Limits(max_batch=4, max_waiting=20, max_tokens=100_000, default_tokens=12, prefill_tokens=32)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def service(loaded):
    service = serve(loaded, LIMITS)
    yield service
    service.served.engine.close()


@pytest.fixture(scope="module")
def url(service):
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def endless(loaded, monkeypatch):
    """Answers that only max_tokens ends, so that who is done early was given up."""
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", 10**6)


def shown(*seeds):
    return [{"type": "image_url", "image_url": {"url": data_uri(encoded(seed))}} for seed in seeds]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "which is larger?"}, *shown(3, 4)]},
    {"role": "assistant", "content": "the first"},
    {"role": "user", "content": [*shown(5), {"type": "text", "text": "sure?"}]},
]


def create(client, messages=HELLO, **options):
    return client.chat.completions.create(model="shapes", messages=messages, **options)


def streamed(client, messages=HELLO, **options):
    return list(create(client, messages, stream=True, **options))


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_conversation_with_several_images_is_what_generate_answers(client, loaded):
    answer = create(client, CONVERSATION, max_tokens=30)
    model, processor = loaded
    from mlmamba.images import open_image

    turns = [Turn("user", "Be brief.\n\nwhich is larger?", 2), Turn("assistant", "the first"), Turn("user", "sure?", 1)]
    inputs = processor([open_image(encoded(seed)) for seed in (3, 4, 5)], processor.prompt(turns))
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (choice,) = answer.choices
    assert choice.message.content == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (inputs["input_ids"].shape[1], len(ids))
    assert (answer.model, answer.system_fingerprint, answer.object) == ("shapes", "shapes/3", "chat.completion")


def test_a_streamed_answer_is_the_whole_answer(client):
    whole = create(client, CONVERSATION, max_tokens=40)
    chunks = streamed(client, CONVERSATION, max_tokens=40, stream_options={"include_usage": True})
    assert text_of(chunks) == whole.choices[0].message.content
    assert len(chunks) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], whole.usage.total_tokens)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens  # it was read before
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {(chunk.id, chunk.system_fingerprint, chunk.object) for chunk in chunks} == {
        (chunks[0].id, "shapes/3", "chat.completion.chunk")
    }
    assert streamed(client, max_tokens=3)[-1].choices  # no usage unless asked for


def test_the_first_words_come_before_the_last(client, service, endless):
    stream = create(client, max_tokens=3000, stream=True)
    seen = [next(stream) for _ in range(4)]
    assert text_of(seen)
    assert service.served.engine.load == (0, 1)
    stream.close()
    wait_for(lambda: service.served.engine.load == (0, 0))


def test_many_at_once_get_the_answers_they_get_alone(url, client):
    asked = [
        {"messages": CONVERSATION if i % 3 else HELLO, "max_tokens": 5 + 3 * i, "temperature": (i % 4) / 2, "seed": i}
        for i in range(12)
    ]
    alone = [create(client, **options).choices[0].message.content for options in asked]

    async def together():
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as many:

            async def one(i):
                made = await many.chat.completions.create(model="shapes", stream=bool(i % 2), **asked[i])
                return text_of([chunk async for chunk in made]) if i % 2 else made.choices[0].message.content

            return await asyncio.gather(*map(one, range(12)))

    assert asyncio.run(together()) == alone
    assert len(set(alone)) > 8


def test_logprobs_are_the_models(client, loaded):
    answer = create(client, max_tokens=20, logprobs=True, top_logprobs=3, temperature=0)
    entries = answer.choices[0].logprobs.content
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode(errors="replace").strip() == answer.choices[0].message.content
    model, processor = loaded
    ids = processor.tokenize([processor.prompt([Turn("user", "hello")])])["input_ids"]
    for entry in entries[:5]:
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -1].clone()
            logits[model.config.image_token_id] = -torch.inf
            logs = torch.log_softmax(logits, -1)
        token = int(logs.argmax())
        assert entry.logprob == pytest.approx(float(logs[token]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(logs.topk(3).values.tolist(), abs=1e-4)
        assert entry.top_logprobs[0].bytes == entry.bytes
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_streamed_logprobs_and_those_of_a_sampled_answer(client):
    options = {"max_tokens": 30, "logprobs": True, "temperature": 1.2, "seed": 4, "top_logprobs": 2}
    whole = create(client, **options).choices[0]
    chunks = streamed(client, **options)
    entries = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [(e.bytes, e.logprob) for e in entries] == [(e.bytes, e.logprob) for e in whole.logprobs.content]
    assert all(e.logprob <= 0 and len(e.top_logprobs) == 2 for e in entries)
    assert math.exp(sum(e.logprob for e in entries)) < 0.01
    bare = create(client, max_tokens=3, logprobs=True).choices[0].logprobs.content
    assert bare
    assert all(entry.top_logprobs == [] for entry in bare)


def test_several_answers_to_one_request(client):
    options = {"max_tokens": 15, "temperature": 1.5}
    three = create(client, n=3, seed=10, **options)
    singles = [create(client, seed=10 + i, **options) for i in range(3)]
    assert [c.message.content for c in three.choices] == [s.choices[0].message.content for s in singles]
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert three.usage.completion_tokens == sum(s.usage.completion_tokens for s in singles)
    chunks = streamed(client, n=3, seed=10, **options)
    assert [text_of(chunks, i) for i in range(3)] == [c.message.content for c in three.choices]
    assert len({c.message.content for c in create(client, n=3, **options).choices}) > 1


def test_stop_strings_are_never_seen_in_part(client):
    free = create(client, CONVERSATION, max_tokens=40).choices[0].message.content
    stop = free[10:14]
    expected = free[: free.index(stop)].strip()
    whole = create(client, CONVERSATION, max_tokens=40, stop=[stop, "never"]).choices[0]
    assert (whole.message.content, whole.finish_reason) == (expected, "stop")
    chunks = streamed(client, CONVERSATION, max_tokens=40, stop=stop)
    for i in range(len(chunks)):
        assert expected.startswith(text_of(chunks[:i]))
    assert text_of(chunks) == expected


class Shape(pydantic.BaseModel):
    name: Literal["circle", "square"]
    sides: int = pydantic.Field(ge=0, le=9)
    colours: list[Annotated[str, pydantic.Field(pattern="^[a-z]{1,9}$")]] = pydantic.Field(max_length=2)


def test_an_answer_is_read_as_a_class_of_the_client(client):
    options = {"model": "shapes", "messages": CONVERSATION, "max_tokens": 900, "temperature": 1.0, "seed": 2}
    made = client.chat.completions.parse(response_format=Shape, n=3, **options)
    assert [type(choice.message.parsed) for choice in made.choices] == [Shape] * 3
    assert [choice.finish_reason for choice in made.choices] == ["stop"] * 3
    with client.chat.completions.stream(response_format=Shape, **options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == made.choices[0].message.content
    free = client.chat.completions.create(response_format={"type": "json_object"}, **options)
    assert isinstance(json.loads(free.choices[0].message.content), dict)


def test_one_of_several_words(client):
    asked = {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}, "logprobs": True, "top_logprobs": 2}
    answer = create(client, CONVERSATION, **asked)
    assert answer.choices[0].message.content in ("yes", "no")
    assert text_of(streamed(client, CONVERSATION, **asked)) == answer.choices[0].message.content
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError, match="it cannot be used: Unimplemented keys") as caught:
        create(client, response_format=form)
    assert (caught.value.code, caught.value.param) == ("invalid_schema", "response_format")


def test_models(client):
    (entry,) = client.models.list().data
    assert (entry.id, entry.object, entry.owned_by) == ("shapes", "model", "mlmamba")
    assert client.models.retrieve("shapes").id == "shapes"
    assert client.models.retrieve("shapes/3").id == "shapes/3"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("shapes/4")
    with pytest.raises(openai.NotFoundError, match="ask for 'shapes'"):
        client.chat.completions.create(model="gpt", messages=HELLO)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": "a<|endoftext|>b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_clients_own_errors(client, fields, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **{"messages": HELLO, "stream": stream, **fields})
    assert caught.value.param == param
    assert caught.value.response.headers["x-model-version"] == "shapes/3"


def test_headers_of_every_kind_of_response(client, url):
    reply = client.chat.completions.with_raw_response.create(model="shapes", messages=HELLO, max_tokens=2)
    assert (reply.headers["x-model-version"], reply.headers["x-model-run-id"]) == ("shapes/3", "run0123")
    with client.chat.completions.with_streaming_response.create(
        model="shapes", messages=HELLO, max_tokens=2, stream=True
    ) as reply:
        assert reply.headers["x-model-version"] == "shapes/3"
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert list(reply.iter_lines())[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(url, service, endless, stream):
    """Cut off in the middle, with an answer before it that would take hours."""
    engine = service.served.engine
    body = json.dumps({"messages": HELLO, "max_tokens": 100_000, "stream": stream, "n": 2})
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    wait_for(lambda: engine.load == (0, 2))
    if stream:
        connection.getresponse().read(50)
    connection.sock.close() if connection.sock else None
    connection.close()
    wait_for(lambda: engine.load == (0, 0), 10)


def test_a_client_that_times_out_and_one_that_waits_in_the_queue(url, service, endless):
    engine = service.served.engine
    hasty = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=0.5)
    with hasty, pytest.raises(openai.APITimeoutError):
        create(hasty, max_tokens=100_000, n=6)  # four run, two wait
    wait_for(lambda: engine.load == (0, 0), 10)


def test_a_running_answer_keeps_its_version_and_the_next_gets_the_new(client, service, loaded, endless):
    old = service.served
    stream = create(client, max_tokens=60, stream=True)
    first = next(stream)
    service.served = Served(Engine(*loaded, LIMITS, threads=1), resolved("4"))
    try:
        assert create(client, max_tokens=2).system_fingerprint == "shapes/4"
        assert {chunk.system_fingerprint for chunk in [first, *stream]} == {"shapes/3"}
    finally:
        new, service.served = service.served, old
        new.engine.close()


def test_a_request_read_while_the_model_is_replaced_is_answered_by_the_new_one(client, service, loaded, monkeypatch):
    """The old engine closes after the request was prepared for it and before it is queued."""
    old = service.served
    closing = Served(Engine(*loaded, LIMITS, threads=1), resolved("1"))
    prepare = closing.engine.prepare

    def prepare_and_lose_the_race(*args):
        prompt = prepare(*args)
        service.served = old
        closing.engine.close()
        return prompt

    monkeypatch.setattr(closing.engine, "prepare", prepare_and_lose_the_race)
    service.served = closing
    reply = client.chat.completions.with_raw_response.create(model="shapes", messages=HELLO, max_tokens=2)
    assert reply.parse().system_fingerprint == reply.headers["x-model-version"] == "shapes/3"


def test_a_deadline_is_an_error_that_is_not_tried_again(loaded, endless):
    limits = LIMITS.model_copy(update={"deadline_seconds": 0.3})
    service = serve(loaded, limits)
    with running(service) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=5) as client:
        with pytest.raises(openai.InternalServerError, match="longer than this server's") as caught:
            create(client, max_tokens=100_000)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError, match="longer than this server's"):
            streamed(client, max_tokens=100_000)
    service.served.engine.close()
    total = sum(value for (name, _), value in service.metrics.values.items() if name == "mlmamba_requests_total")
    assert total == 2


def test_keys(loaded, monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("# ours\nfile-key\n")
    monkeypatch.setenv("MLMAMBA_API_KEYS", "one-key, other-key")
    service = serve(loaded, LIMITS, Access(api_keys_file=str(tmp_path / "keys")))
    with running(service) as url:
        for key in ("one-key", "other-key", "file-key"):
            assert create(openai.OpenAI(base_url=url + "/v1", api_key=key), max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError, match="not one of this server's") as caught:
            create(openai.OpenAI(base_url=url + "/v1", api_key="one-kex", max_retries=0))
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert isinstance(ask(url, "hello", api_key="file-key", max_tokens=1), str)
        status, headers, content = raw(url, "/v1/models")
        assert (status, content["error"]["code"], headers["x-model-version"]) == (401, "no_api_key", "shapes/3")
        assert raw(url, "/v1/models", headers={"Authorization": "Basic one-key"})[0] == 401
        assert raw(url, "/healthz")[0] == raw(url, "/readyz")[0] == 200
    service.served.engine.close()
