"""Fetching images: only from allowed addresses, never from private ones, in bounds.

A real server on loopback answers; the check of addresses is the real one except where a test says that loopback is
allowed.
"""

import http.server
import json
import socket
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from tests.helpers.images import encoded
from workflows.serve.messages import read_messages
from workflows.serve.openai import ApiError, parse_request
from workflows.serve.options import Limits
from workflows.serve.remote_images import Fetcher, FetchError, UrlPattern, is_public

IMAGE = encoded(1)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; `asked` counts."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Host"), self.headers.get("Authorization")))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path.startswith("/ok"):
            self._body(IMAGE)
        elif self.path == "/large":
            self._body(b"x" * 5000)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b"x" * 100)
        elif self.path == "/drip":  # every read in time, the whole never
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/drip-head":
            for character in b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 100:
                self.wfile.write(bytes([character]))
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/nonsense":
            self.wfile.write(b"\x00\x01 hello\r\n\r\n")
        else:
            self.send_error(404)

    def _body(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.daemon_threads = [], True
    server.handle_error = lambda *_: None  # clients hang up on purpose
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    port = server.server_port
    yield SimpleNamespace(port=port, url=f"http://images.test:{port}", asked=server.asked)
    server.shutdown()
    server.server_close()
    thread.join()


def resolver(*addresses):
    """A name server with one answer for everything."""
    return lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]


def fetcher(site, *patterns, allowed=lambda address: address == "127.0.0.1", seconds=5.0, **options):
    patterns = patterns or (f"{site.url}/*",)
    return Fetcher(patterns, 4000, seconds, allowed, options.pop("resolve", resolver("127.0.0.1")), **options)


def refused(fetcher, url):
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(url)
    return caught.value.code


def test_an_image_from_an_allowed_address(site):
    assert fetcher(site).fetch(f"{site.url}/ok.png?size=1") == IMAGE
    assert site.asked[-1] == ("/ok.png?size=1", f"images.test:{site.port}", None)


def test_the_name_is_resolved_once_and_the_connection_goes_there(site):
    """A name server that says something else the second time changes nothing."""
    answers = [resolver("127.0.0.1"), resolver("127.0.0.2")]
    asked = []

    def resolve(host, port, **options):
        asked.append(host)
        return answers[len(asked) - 1](host, port, **options)

    assert fetcher(site, resolve=resolve).fetch(f"{site.url}/ok") == IMAGE
    assert asked == ["images.test"]


def test_private_addresses_are_never_connected_to(site):
    before = len(site.asked)
    patterns = (f"http://127.0.0.1:{site.port}/*", f"http://localhost:{site.port}/*", f"{site.url}/*")
    real = Fetcher(patterns, 4000, 5.0)
    assert refused(real, f"http://127.0.0.1:{site.port}/ok") == "image_forbidden"
    assert refused(real, f"http://localhost:{site.port}/ok") == "image_forbidden"
    mixed = Fetcher(patterns, 4000, 5.0, resolve=resolver("93.184.216.34", "127.0.0.1"))
    assert refused(mixed, f"{site.url}/ok") == "image_forbidden"
    assert len(site.asked) == before


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.9.1",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.3.4",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *(
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "192.0.2.1",
            "240.0.0.1",
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
        ),
        *(
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
        ),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:0:1:2:3:4:5:6", "2001:db8::1"),
        *(
            "fec0::1",
            "feff::1",
            "3fff:0:0::1",
            "192.88.99.1",
            "::ffff:192.88.99.1",
            "5f00::1",
            "100.64.0.1",
            "198.18.0.1",
        ),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("pattern", "url", "right"),
    [
        ("https://a.example/p/*", "https://a.example/p/x/y.png", True),
        ("https://a.example/p/*", "https://a.example:443/p/x", True),
        ("https://a.example/p/*", "https://A.EXAMPLE/p/x", True),
        ("https://a.example/p/*", "http://a.example/p/x", False),
        ("https://a.example/p/*", "https://a.example:8443/p/x", False),
        ("https://a.example/p/*", "https://a.example/q/x", False),
        ("https://a.example/p/*", "https://a.example.evil.test/p/x", False),
        ("https://a.example/p/*", "https://evil-a.example/p/x", False),
        ("https://a.example/*.png", "https://a.example/x.png", True),
        ("https://a.example/*.png", "https://a.example/x.jpg", False),
        ("https://a.example/[x]", "https://a.example/x", False),
        ("https://a.example", "https://a.example", True),
        ("https://*.a.example/*", "https://b.c.a.example/x", True),
        ("https://*.a.example/*", "https://a.example/x", False),
        ("https://*.a.example/*", "https://xa.example/x", False),
        ("http://a.example:81/*", "http://a.example:81/x", True),
    ],
)
def test_patterns(pattern, url, right):
    assert UrlPattern.parse(pattern).matches(urlsplit(url)) is right


@pytest.mark.parametrize(
    "text", ["*", "a.example/*", "ftp://a/*", "https://*/x", "https://a.*/x", "https://u@a/x", "https://a:b/x"]
)
def test_patterns_that_say_nothing_or_everything(text):
    with pytest.raises(ValueError, match="image_urls"):
        UrlPattern.parse(text)


@pytest.mark.parametrize(
    "url",
    [
        "http://user@{host}/ok",
        "http://user:word@{host}/ok",
        "http://{host}@evil.test/ok",
        "http://{host}/../ok",
        "http://{host}/a/%2e%2e/ok",
        "http://{host}/a\\..\\ok",
        "http://{host}/a b",
        "http://{host}/ok\r\nX-Evil: 1",
        "http://{host}x/ok",
        "http://evil.test/ok",
        "http://{host}/ü",
        "http://[::1/ok",
        "file:///etc/passwd",
        "http:///ok",
        "",
    ],
)
def test_addresses_that_are_not_allowed(site, url):
    assert refused(fetcher(site), url.format(host=f"images.test:{site.port}")) == "image_forbidden"


def test_redirects_pass_the_same_checks(site):
    assert fetcher(site).fetch(f"{site.url}/to//ok") == IMAGE
    before = len(site.asked)
    assert refused(fetcher(site), f"{site.url}/to/http://127.0.0.1:{site.port}/ok") == "image_forbidden"
    assert refused(fetcher(site), f"{site.url}/to/file:///etc/passwd") == "image_forbidden"
    assert len(site.asked) == before + 2
    many = f"{site.url}/" + "to//" * 5 + "ok"
    assert refused(fetcher(site), many) == "image_unavailable"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/large", "image_too_large"),
        ("/endless", "image_too_large"),
        ("/missing", "image_unavailable"),
        ("/nonsense", "image_unavailable"),
        ("/drip", "image_slow"),
        ("/drip-head", "image_slow"),
    ],
)
def test_servers_that_misbehave(site, path, code):
    begun = time.monotonic()
    assert refused(fetcher(site, seconds=0.6), f"{site.url}{path}") == code
    assert time.monotonic() - begun < 4  # of /drip, all takes five


def test_a_server_that_is_not_there(site):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    gone = fetcher(site, f"http://images.test:{port}/*")
    assert refused(gone, f"http://images.test:{port}/ok") == "image_unavailable"
    assert refused(fetcher(site, resolve=resolver()), f"{site.url}/ok") == "image_forbidden"

    def unknown(*_, **__):
        raise socket.gaierror

    assert refused(fetcher(site, resolve=unknown), f"{site.url}/ok") == "image_unavailable"


def test_a_request_with_a_remote_image(site):
    content = [{"type": "image_url", "image_url": {"url": f"{site.url}/ok"}}, {"type": "text", "text": "what?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    messages = parse_request(body).messages
    _, images = read_messages(messages, Limits(), 4, fetcher(site))
    assert [image.size for image in images] == [(40, 30)]
    for off in (None, Fetcher((), 1, 1)):
        with pytest.raises(ApiError, match="not fetched from the network"):
            list(read_messages(messages, Limits(), 4, off)[1])
    with pytest.raises(ApiError, match="does not fetch images from that address") as caught:
        list(read_messages(messages, Limits(), 4, fetcher(site, "https://other.test/*"))[1])
    assert (caught.value.status, caught.value.code) == (400, "image_forbidden")
