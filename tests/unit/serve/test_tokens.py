"""/tokenize and /detokenize over HTTP: what they say is what a chat completion reads."""

import pytest

from tests.helpers.images import encoded
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import load_tiny, raw, running, serve
from tests.helpers.tiny import IMAGE_ID, PER_IMAGE
from workflows.serve.options import Limits
from workflows.serve.tokens import detokenize, tokenize

LIMITS = Limits(max_tokens=32, text_bytes=2_000)
HELLO = [{"role": "user", "content": "hello"}]
SHOWN = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_uri(encoded(1))}},
            {"type": "text", "text": "what?"},
        ],
    }
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    service = serve(load_tiny(tmp_path_factory.mktemp("tokens") / "tiny"), LIMITS)
    with running(service) as url:
        yield url
    service.served.engine.close()


def post(url, path, **body):
    status, _, content = raw(url, path, body)
    return content if status == 200 else (status, content["error"])


@pytest.mark.parametrize("messages", [HELLO, SHOWN])
def test_messages_are_counted_as_a_completion_counts_them(url, messages):
    found = post(url, "/tokenize", messages=messages, model="shapes", add_generation_prompt=True)
    usage = post(url, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"]
    assert (found["count"], len(found["tokens"])) == (usage["prompt_tokens"],) * 2
    assert (found["max_model_len"], found["token_strs"]) == (300, None)
    assert found["tokens"].count(IMAGE_ID) == PER_IMAGE * (messages is SHOWN)


def test_a_text_and_back(url):
    text = "a caf\u00e9,\n \U0001f600 <|endoftext|>"
    found = post(url, "/tokenize", prompt=text, return_token_strs=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert post(url, "/detokenize", tokens=found["tokens"]) == {"prompt": text}
    assert post(url, "/detokenize", tokens=[]) == {"prompt": ""}
    assert post(url, "/tokenize", prompt="")["tokens"] == []


def test_a_prompt_over_the_models_limit_is_still_counted(url):
    assert post(url, "/tokenize", messages=[{"role": "user", "content": "long " * 100}])["count"] > 300


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("/tokenize", {}, 400, "prompt", "either prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt", "either prompt"),
        ("/tokenize", {"prompt": "a" * 3_000}, 400, "prompt", "over the limit of 2,000"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt", "valid string"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 3_000}]}, 400, "messages", "over the limit"),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, 400, "chat_template", "not supported"),
        ("/tokenize", {"messages": HELLO, "add_generation_prompt": False}, 400, "add_generation_prompt", "not support"),
        ("/tokenize", {"messages": [{"role": "user", "content": "<|user|>"}]}, 400, "messages", "mark"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model", "ask for 'shapes'"),
        ("/detokenize", {"tokens": [1, 264]}, 400, "tokens[1]", "none of the model's 258"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]", "-1"),
        ("/detokenize", {"tokens": [1.0]}, 400, "tokens", "whole numbers"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens", "list of token ids"),
        ("/detokenize", {}, 400, "tokens", "required"),
        ("/detokenize", {"tokens": [1] * 30_000}, 400, "messages", "more than"),
    ],
)
def test_what_cannot_be_tokenized_is_named(url, path, body, status, param, message):
    answered, error = post(url, path, **body)
    assert (answered, error["param"]) == (status, param)
    assert message in error["message"]


def test_both_are_functions_of_a_model_and_a_request():
    assert tokenize.__module__ == detokenize.__module__ == "workflows.serve.tokens"
