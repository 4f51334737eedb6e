"""The request model: what clients send passes, and everything else is a 400 that names the field."""

import json

import pytest

from workflows.serve.openai import ApiError, parse_request

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields):
    return parse_request(json.dumps({"messages": HELLO, **fields}).encode())


def test_a_minimal_request():
    request = parse()
    assert request.messages[0].role == "user"
    assert [part.text for part in request.messages[0].content] == ["hello"]
    assert request.model is request.temperature is request.stop is None


def test_a_request_as_clients_send_it():
    request = parse(
        model="shapes",
        messages=[
            {"role": "system", "content": "Be brief.", "name": "x"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "high"}},
                    {"type": "text", "text": "what?"},
                ],
            },
            {"role": "assistant", "content": "a circle", "tool_calls": None},
            {"role": "user", "content": "sure?"},
        ],
        max_completion_tokens=5,
        temperature=1,
        top_p=0.9,
        seed=3,
        stop="\n",
        n=1,
        stream=False,
        stream_options=None,
        tools=[],
        tool_choice="none",
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        top_k=-1,
        repetition_penalty=1.0,
        user="someone",
        metadata={"a": "b"},
        store=False,
        unknown_to_all=[1, 2],
    )
    assert (request.max_completion_tokens, request.temperature, request.top_p, request.seed) == (5, 1.0, 0.9, 3)
    assert request.stop == ["\n"]
    assert request.messages[1].content[0].image_url.url.startswith("data:")


def test_null_asks_for_nothing():
    names = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "tools", "logit_bias")
    assert parse(**dict.fromkeys(names)) == parse()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream": True, "stream_options": 3}, "stream_options", "object"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream set to true"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "valid integer"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"5": -100}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"top_k": 40}, "top_k", "not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
        ({"min_tokens": 5}, "min_tokens", "not supported"),
        ({"messages": None}, "messages", "valid array"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"messages": [7]}, "messages[0]", "object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a list"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages[0].content", "string or a list"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", "object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user' or 'assistant'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", "valid integer"),
        ({"seed": True}, "seed", "valid integer"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stop": 3}, "stop", "valid array"),
        ({"stop": "a" * 257}, "stop[0]", "at most 256"),
        ({"model": 3}, "model", "valid string"),
    ],
)
def test_a_wrong_field_is_named(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        ({"type": "text"}, "", "needs the field text"),
        ({"type": "text", "text": 5}, ".text", "valid string"),
        ({"type": "image_url"}, "", "needs the field image_url"),
        ({"type": "image_url", "image_url": "data:..."}, ".image_url", "object"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url", "required"),
        ({"type": "input_audio", "input_audio": {}}, "", "'input_audio' are not supported"),
        ({"text": "x"}, ".type", "required"),
    ],
)
def test_a_wrong_part_is_named(part, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert (caught.value.status, caught.value.param) == (400, f"messages[0].content[1]{param}")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b'{"messages": [',
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [], "seed": 1' + b"0" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b"[]",
        b"null",
        b'"hello"',
        b"7",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_no_request(body):
    with pytest.raises(ApiError) as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_an_error_never_repeats_the_request():
    with pytest.raises(ApiError) as caught:
        parse(messages=[{"role": "user", "content": ["a secret"]}], temperature="a secret")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.body()["error"].keys() == {"message", "type", "param", "code"}
