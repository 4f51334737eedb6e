"""cluster/serve/nginx.conf with a real nginx before the service: HTTPS, a path, large requests and streams."""

import http.client
import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.helpers.certificates import certificate
from tests.helpers.images import encoded
from tests.helpers.processes import free_port, wait_for
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import load_tiny, running, serve
from workflows.serve.auth import Access
from workflows.serve.http import build_app
from workflows.serve.options import Limits

CONFIG = Path(__file__).parents[2] / "cluster" / "serve" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not NGINX or not shutil.which("openssl"), reason="nginx or openssl is not installed")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    """The client's address, a context that trusts its certificate, and the service's engine."""
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "keys").write_text("one-key\n")
    limits = Limits(max_tokens=10_000, default_tokens=8)
    service = serve(load_tiny(folder / "tiny"), limits, Access(api_keys_file=str(folder / "keys")))
    certificate(folder)
    port = free_port()
    with running(service, application=build_app(service, "/llm")) as url:
        server = CONFIG.read_text().replace("/etc/nginx", str(folder)).replace("listen 443", f"listen 127.0.0.1:{port}")
        server = server.replace("http://127.0.0.1:8000/", url + "/")
        assert server.count(url) == 1
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers cannot write below `folder`
        whole = f"{user}daemon off;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n"
        (folder / "nginx.conf").write_text(f"{whole}{temporary}{server}\n}}\n")
        with subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder)]) as process:
            try:
                trusting = ssl.create_default_context(cafile=str(folder / "llm.crt"))
                base = f"https://localhost:{port}/llm"
                wait_for(lambda: process.poll() is not None or answers(base, trusting))
                yield base, trusting, service.served.engine
            finally:
                process.terminate()
    service.served.engine.close()


def answers(base: str, trusting: ssl.SSLContext) -> bool:
    try:
        return urllib.request.urlopen(base + "/healthz", context=trusting, timeout=5).status == 200
    except OSError:
        time.sleep(0.05)
        return False


def get(base: str, trusting: ssl.SSLContext, path: str) -> bytes:
    call = urllib.request.Request(base + path, headers={"Authorization": "Bearer one-key"})
    with urllib.request.urlopen(call, context=trusting, timeout=60) as reply:
        return reply.read()


def test_every_route_is_below_the_path_and_keys_are_asked_for(proxied):
    base, trusting, _ = proxied
    assert json.loads(get(base, trusting, "/v1/models"))["data"][0]["id"] == "shapes"
    assert json.loads(get(base, trusting, "/openapi.json"))["servers"] == [{"url": "/llm"}]
    assert b'fetch("v1/chat/completions"' in get(base, trusting, "/")  # the page asks below its own address
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(base + "/v1/models", context=trusting)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(base.removesuffix("/llm"), trusting, "/v1/models")


def test_openais_client_asks_with_a_large_image_and_gets_a_stream(proxied, monkeypatch):
    base, trusting, engine = proxied
    monkeypatch.setattr(engine._model.generation_config, "eos_token_id", 10**6)
    client = openai.OpenAI(
        base_url=base + "/v1", api_key="one-key", max_retries=0, http_client=openai.DefaultHttpxClient(verify=trusting)
    )
    with client:
        image = {"type": "image_url", "image_url": {"url": data_uri(encoded(1, "BMP", (1200, 1200)))}}
        shown = [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}]
        assert client.chat.completions.create(model="shapes", messages=shown).choices[0].message.content is not None
        stream = client.chat.completions.create(model="shapes", messages=HELLO, max_tokens=9_000, stream=True)
        seen = [next(stream) for _ in range(5)]
        assert engine.load == (0, 1)  # the first pieces are here before the last are made
        assert any(chunk.choices[0].delta.content for chunk in seen)
        stream.close()
        wait_for(lambda: engine.load == (0, 0))


def test_a_body_over_the_limit_is_refused_by_the_proxy(proxied):
    base, trusting, _ = proxied
    host, path = base.removeprefix("https://").split("/", 1)
    connection = http.client.HTTPSConnection(host, context=trusting, timeout=60)
    connection.putrequest("POST", f"/{path}/v1/chat/completions")
    connection.putheader("Content-Length", str(60 * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_flood_from_one_address_is_refused_by_the_proxy(proxied):
    base, trusting, _ = proxied
    host, path = base.removeprefix("https://").split("/", 1)
    connection, seen = http.client.HTTPSConnection(host, context=trusting, timeout=60), []
    for _ in range(400):
        connection.request("GET", f"/{path}/healthz")
        reply = connection.getresponse()
        reply.read()
        seen.append(reply.status)
    connection.close()
    assert set(seen) == {200, 429}
    assert seen.count(200) >= 50
