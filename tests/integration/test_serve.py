"""The service as users meet it: `serve_model` on a real Ray Serve, asked over real HTTP on a free loopback port."""

import base64
import http.client
import json
import os
import shlex
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
import ray
import torch

from mlmamba.answering import Answerer, Asked
from mlmamba.conversation import Turn
from mlmamba.images import open_image
from mlmamba.loading import load_model
from tests.helpers.images import encoded
from tests.helpers.processes import free_port
from tests.helpers.serve_client import ask, data_uri, request
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from workflows.errors import UsageError, WorkflowError
from workflows.registry import pyfunc
from workflows.serve.proxy import CALLBACK, VARIABLE
from workflows.serve.start import check_port, serve_model
from workflows.tracking.tracker import connect
from workflows.train.initial import save

CHAT = "/v1/chat/completions"
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serve") / "model"
    save(tiny_model({"tie_word_embeddings": False}, max_position_embeddings=300), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def registered(folder, tmp_path_factory):
    """A storage folder whose registry has the model as version 1 (champion) of `shapes`, and the run that made it."""
    storage = tmp_path_factory.mktemp("storage")
    client = connect(storage)
    experiment = client.create_experiment("shapes", artifact_location=(storage / "mlflow").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        code = Path(pyfunc.__file__)
        info = mlflow.pyfunc.log_model(
            name="model", python_model=str(code), artifacts={"model": str(folder)}, pip_requirements=["mlmamba"]
        )
    client.create_registered_model("shapes")
    client.create_model_version("shapes", info.model_uri, run.info.run_id, model_id=info.model_id)
    client.set_registered_model_alias("shapes", "champion", "1")
    return storage, run.info.run_id


@pytest.fixture(scope="module")
def url(registered):
    storage, _ = registered
    started_here = not ray.is_initialized()
    with serve_model("models:/shapes@champion", storage, port=free_port(), threads=1, block=False) as server:
        assert os.environ[VARIABLE] == CALLBACK  # what Ray Serve's proxy of the Ray that was started here has read
        yield server.url
    assert ray.is_initialized() != started_here
    with pytest.raises(urllib.error.URLError):
        request(server.url, "/healthz")


def post(url, body):
    """Status and JSON of a chat completion request, whatever its status."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = urllib.request.Request(url + CHAT, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_answers_are_those_of_the_model(url, folder):
    asked = [Asked(encoded(1), ["what is shown?", "is it red?"]), Asked(encoded(2, "JPEG"), ["what is shown?"])]
    asked.append(Asked(None, ["say something"]))
    expected = [text for texts in Answerer(folder, TOKENS).answer(asked) for text in texts]
    answers = [ask(url, q, item.image, max_tokens=TOKENS) for item in asked for q in item.questions]
    assert answers == expected
    assert len(set(answers)) == len(answers)


def test_eight_at_once_get_the_answers_they_get_alone(url):
    questions = ["what?", "what is shown in this image?", "a " * 20 + "b", "is it red?"] * 2
    images = [None if i % 3 == 0 else encoded(i) for i in range(8)]
    alone = [ask(url, q, p, max_tokens=TOKENS + i) for i, (q, p) in enumerate(zip(questions, images, strict=True))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: ask(url, questions[i], images[i], max_tokens=TOKENS + i), range(8)))
    assert together == alone
    assert len(set(alone)) == 8


def test_a_conversation_with_several_images_and_a_system_message(url, folder):
    shown = [{"type": "image_url", "image_url": {"url": data_uri(encoded(seed))}} for seed in (3, 4)]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "which is larger?"}, *shown]},
        {"role": "assistant", "content": "the first"},
        {"role": "user", "content": [shown[0], {"type": "text", "text": "sure?"}]},
    ]
    status, content = post(url, {"messages": messages, "max_tokens": TOKENS})
    assert status == 200
    model, processor = load_model(folder)
    turns = [Turn("user", "Be brief.\n\nwhich is larger?", 2), Turn("assistant", "the first"), Turn("user", "sure?", 1)]
    inputs = processor([open_image(encoded(seed)) for seed in (3, 4, 3)], processor.prompt(turns))
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert content["choices"][0]["message"]["content"] == expected
    assert content["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert content["usage"]["completion_tokens"] == len(ids)


BAD_IMAGE = {"type": "image_url", "image_url": {"url": data_uri(encoded(1)[:60])}}
MALFORMED = {
    "empty": b"",
    "not JSON": b"{messages: hello}",
    "not UTF-8": b'{"messages": "\xff"}',
    "deep": b"[" * 50_000,
    "not an object": b"[1, 2]",
    "no messages": {},
    "no turns": {"messages": []},
    "wrong type": {"messages": [{"role": "user", "content": 5}]},
    "wrong role": {"messages": [{"role": "robot", "content": "hello"}]},
    "wrong order": {"messages": [{"role": "assistant", "content": "hello"}]},
    "no text": {"messages": [{"role": "user", "content": ""}]},
    "too long": {"messages": [{"role": "user", "content": "hello " * 500}]},
    "tools": {"messages": [{"role": "user", "content": "hello"}], "tools": [{"type": "function"}]},
    "max_tokens": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10**9},
    "temperature": {"messages": [{"role": "user", "content": "hello"}], "temperature": "hot"},
    "damaged image": {"messages": [{"role": "user", "content": [BAD_IMAGE, {"type": "text", "text": "what?"}]}]},
    "remote image": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}},
                    {"type": "text", "text": "what?"},
                ],
            }
        ]
    },
}


def test_malformed_requests_are_400_and_the_service_goes_on(url):
    before = ask(url, "what?", encoded(1), max_tokens=TOKENS)
    for name, body in MALFORMED.items():
        status, content = post(url, body)
        assert status == 400, (name, content)
        assert content["error"].keys() == {"message", "type", "param", "code"}, name
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", "500")
    connection.endheaders(b'{"messages": [')  # and hangs up in the middle
    connection.close()
    assert ask(url, "what?", encoded(1), max_tokens=TOKENS) == before


def test_models_and_health(url, registered):
    (entry,) = request(url, "/v1/models")["data"]
    assert (entry["id"], entry["version"], entry["run_id"]) == ("shapes", "1", registered[1])
    assert request(url, "/healthz") == {"status": "alive"}
    assert request(url, "/readyz") == {"status": "ready"}


def test_every_response_says_which_version_gave_it(url, registered):
    ok, refused = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, {"messages": []}
    for path, body in ((CHAT, ok), (CHAT, refused), ("/v1/models", None), ("/readyz", None), ("/nowhere", None)):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request(
            "POST" if body else "GET", path, json.dumps(body) if body else None, {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        assert (reply.headers["x-model-version"], reply.headers["x-model-run-id"]) == ("shapes/1", registered[1])
        connection.close()
    assert post(url, ok)[1]["system_fingerprint"] == "shapes/1"


def test_the_announced_command_works(url, tmp_path):
    from workflows.registry import ResolvedModel
    from workflows.serve.start import _announcement

    text = _announcement(url, ResolvedModel(tmp_path), 1)
    command = text[text.index("curl") :].replace("image.png", shlex.quote(str(tmp_path / "a.png")))
    (tmp_path / "a.png").write_bytes(encoded(5))
    reply = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout)
    assert reply["choices"][0]["message"]["content"] == ask(url, "what is shown?", encoded(5))


def test_the_openai_wire_format(url):
    """The fields that OpenAI's client reads, by name and type."""
    _, content = post(url, {"model": "shapes", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3})
    assert content["id"].startswith("chatcmpl-")
    assert isinstance(content["created"], int)
    (choice,) = content["choices"]
    assert (choice["index"], choice["message"]["role"]) == (0, "assistant")
    assert choice["finish_reason"] in ("stop", "length")
    assert base64.b64encode(choice["message"]["content"].encode())


def test_a_port_in_use_is_said_before_anything_starts(url, folder, tmp_path):
    port = int(url.rpartition(":")[2])
    with pytest.raises(UsageError, match=f"--port {port}: 127.0.0.1:{port} is in use"):
        serve_model(str(folder), tmp_path, port=port)
    with pytest.raises(UsageError, match="--port 70000"):
        check_port("127.0.0.1", 70_000)
    with pytest.raises(UsageError, match="--host 192"):
        check_port("192.0.2.77", free_port())


def test_a_second_service_on_one_ray_is_refused_and_the_first_goes_on(url, folder, tmp_path):
    with pytest.raises(WorkflowError, match="already runs on this Ray cluster"):
        serve_model(str(folder), tmp_path, port=free_port(), block=False)
    assert request(url, "/readyz") == {"status": "ready"}


def test_more_replicas_than_cores_are_refused(url, folder, tmp_path):
    with pytest.raises(UsageError, match="--replicas 999"):
        serve_model(str(folder), tmp_path, port=free_port(), replicas=999)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(WorkflowError, match="neither a model folder"):
        serve_model(str(tmp_path), tmp_path, port=free_port())


def test_nothing_that_was_asked_is_logged(url):
    secret = f"secret-{os.getpid()}-question"
    ask(url, secret, max_tokens=2)
    post(url, {"messages": [{"role": "user", "content": secret}], "temperature": secret})
    logs = ray._private.worker._global_node.get_logs_dir_path()
    found = subprocess.run(["grep", "-rl", secret, logs], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
