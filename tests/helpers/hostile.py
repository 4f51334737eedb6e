"""Requests that no service wants: malformed, oversized, slow, or meant to do harm. Seeded: a run can be repeated.

Each is a `Hostile`: its kind, and the pieces of bytes that a client sends, with pauses between them. Shared by
tests/integration/test_serve_hostile.py and tests/benchmarks/drills/serve_hostile.py.
"""

import base64
import contextlib
import copy
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from tests.helpers.images import encoded

CHAT = "/v1/chat/completions"
CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
)


@dataclass(frozen=True)
class Hostile:
    """What a client sends: (bytes, seconds to pause afterwards).

    `reads` is False where it never looks at the answer, `ends` True where it says that nothing more will come.
    """

    kind: str
    pieces: tuple[tuple[bytes, float], ...]
    reads: bool = True
    ends: bool = False


def hostile(seed: int, pause: float) -> Hostile:
    """One request; every seed gives another, and consecutive seeds go through the kinds.

    Args:
        pause: how long the slow ones wait in the middle, in seconds.
    """
    chance = random.Random(seed)
    kind, make = KINDS[seed % len(KINDS)]
    made = make(chance, pause)
    return made if isinstance(made, Hostile) else Hostile(kind, ((made, 0.0),))


def send(host: str, port: int, request: Hostile, timeout: float = 60) -> int | str:
    """The status that a request gets, "closed" where the server hangs up, "gone" where the client does."""
    with socket.create_connection((host, port), timeout=timeout) as connection:
        try:
            for data, pause in request.pieces:
                connection.sendall(data)
                time.sleep(pause)
        except OSError:
            pass  # refused before the end: the answer is there already
        if not request.reads:
            return "gone"
        if request.ends:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        head = b""
        try:
            while b"\r\n" not in head and (data := connection.recv(4096)):
                head += data
        except TimeoutError:
            return "timeout"
        except OSError:
            return "closed"
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1][:3].isdigit() else "closed"


def post(body: bytes, path: str = CHAT, extra: str = "", length: object = None) -> bytes:
    """A POST as bytes."""
    length = len(body) if length is None else length
    if "Content-Type" not in extra:
        extra = f"Content-Type: application/json\r\n{extra}"
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n"
    return head.encode("latin-1") + body


def image_request(data: bytes, count: int = 1, head: str = "data:image/png;base64,") -> bytes:
    """A question about encoded images."""
    part = {"type": "image_url", "image_url": {"url": head + base64.b64encode(data).decode()}}
    return post(json.dumps(question([part] * count)).encode())


def question(parts: list) -> dict:
    """A request with these parts and a text."""
    content = [*parts, {"type": "text", "text": "what is shown?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


def _valid() -> dict:
    url = "data:image/png;base64," + base64.b64encode(encoded(1)).decode()
    request = question([{"type": "image_url", "image_url": {"url": url}}])
    return request | {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "n": 1, "stream": False}


JUNK = [
    None, True, False, 0, -1, 2**31, 2**63, 10**400, -0.0, 1e308, 1.5, "", " ", "\x00", "a" * 5000, "\ud800", "🙂", [],
    {}, [[]], [None], {"": {}}, {"url": 5}, "NaN", "<|endoftext|>", "<image>", ["stop"] * 5, [1, "a", None], "../etc",
    "data:", "data:image/png;base64,", "user", "assistant", "system", {"type": "text"}, "text", "image_url",
]  # fmt: skip


def _places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


def _mutated(chance: random.Random, _) -> bytes:
    request = _valid()
    for _ in range(chance.randrange(1, 4)):
        path = chance.choice([p for p in _places(request) if p])
        target = request
        for step in path[:-1]:
            target = target[step]
        action = chance.random()
        if action < 0.15:
            del target[path[-1]]
        elif action < 0.3 and isinstance(target, list):
            target.extend([copy.deepcopy(target[path[-1]])] * chance.randrange(1, 40))
        elif action < 0.4 and isinstance(target, dict):
            target[chance.choice(["", "role", "content", "logprobs", "top_logprobs", "n", "tools"])] = chance.choice(
                JUNK
            )
        else:
            target[path[-1]] = chance.choice(JUNK)
    return post(json.dumps(request).encode("utf-8", "surrogatepass"))


def _bytes_changed(chance: random.Random, _) -> bytes:
    body = bytearray(json.dumps(_valid()).encode())
    for _ in range(chance.randrange(1, 20)):
        action, place = chance.random(), chance.randrange(len(body))
        if action < 0.4:
            body[place] = chance.randrange(256)
        elif action < 0.7:
            body[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        else:
            del body[place : place + chance.randrange(1, 50)]
    return post(bytes(body))


def _cut(chance: random.Random, _) -> bytes:
    body = json.dumps(_valid()).encode()
    return post(body[: chance.randrange(len(body))])


def _odd_json(chance: random.Random, _) -> bytes:
    depth = chance.choice([100, 1000, 100_000])
    text = '{"messages":[{"role":"user","content":"a"}],'
    many = [{"type": "text", "text": "a"}] * 50_000
    bodies = [
        *(b"[" * depth, b'{"a":' * depth, b'{"messages":' * depth + b"[]" + b"}" * depth),
        f'{text}"seed":{"9" * chance.choice([20, 400, 50_000])}}}',
        f'{text}"temperature":1e{"9" * chance.choice([3, 300])}}}',
        f'{text}"max_tokens":-{"9" * 30}}}',
        f'{text}"temperature":NaN,"top_p":Infinity}}',
        f'{text}"messages":5,"messages":[]}}',
        f'{text}"n":1}}'.encode("utf-8-sig"),
        f'{text}"n":1}}'.encode("utf-16"),
        b'{"messages":[{"role":"user","content":"\xed\xa0\x80\xff\xc0\x80"}]}',
        b'{"messages":[{"role":"user","content":"\\ud83d\\ud83d"}]}',
        *(b"\x00" * 1000, b"null", b"[]", b'"a"', b"7", b"", b"{}"),
        f'{text}"stop":{json.dumps(["a" * 100_000] * 4)}}}',
        f'{text}"stop":{json.dumps([chr(0)] * 4)},"logprobs":true,"top_logprobs":20,"max_tokens":3}}',
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 20_000}),
        json.dumps({"messages": [{"role": "user", "content": many}]}),
    ]
    body = chance.choice(bodies)
    return post(body if isinstance(body, bytes) else body.encode())


def _bad_image(chance: random.Random, _) -> bytes:
    data = bytearray(encoded(chance.randrange(99), chance.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])))
    action = chance.random()
    if action < 0.4:
        for _ in range(chance.randrange(1, 30)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif action < 0.6:
        del data[chance.randrange(len(data)) :]
    elif action < 0.7:
        data = bytearray(chance.randbytes(2000))
    elif action < 0.8:
        data = bytearray(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run")
    else:
        return post(json.dumps(question([{"type": "image_url", "image_url": {"url": _bad_uri(chance)}}])).encode())
    return image_request(bytes(data))


def _bad_uri(chance: random.Random) -> str:
    png = "data:image/png;base64,"
    uris = [
        *(f"{png}@@@@", f"{png}AAA", png + "A" * 100_003, "data:image/png,abc", "data:image/png;base64", "data:,"),
        *("data:text/html;base64,AA==", "data:image/svg+xml;base64,PHN2Zy8+", "file:///etc/passwd", "", "javascript:1"),
        *("http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:1/", "http://[::1]/", "http://0x7f.1/"),
        *("https://a@b/", "ftp://x/y", "gopher://x", "\\\\host\\share", "http://[", "https://\x00/"),
    ]
    return chance.choice(uris)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb(chance: random.Random, _) -> bytes:
    side = chance.choice([9_000, 60_000, 2**31 - 1])
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n"
    small = _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    text = _chunk(b"iTXt", b"a\x00\x01\x00\x00\x00" + zlib.compress(b"x" * 30_000_000))
    flat = io.BytesIO()
    Image.new("L", (3000, 3000)).save(flat, "PNG")
    gif = (
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00"
        + b"\x00" * 6
        + b",\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02\x4c\x01\x00;"
    )
    data, count = chance.choice(
        [
            (png + header + _chunk(b"IDAT", zlib.compress(b"\x00" * 30_000_000)) + _chunk(b"IEND", b""), 1),
            (png + small + text + _chunk(b"IDAT", zlib.compress(b"\x00" * 200)) + _chunk(b"IEND", b""), 1),
            (png + small + _chunk(b"IDAT", zlib.compress(b"\x00" * 30_000_000)) + _chunk(b"IEND", b""), 1),
            (flat.getvalue(), chance.choice([1, 8, 500])),
            (gif, 1),
        ]
    )
    return image_request(data, count)


def _too_much(chance: random.Random, _) -> Hostile | bytes:
    block = b"x" * 100_000
    choice = chance.randrange(4)
    if choice == 0:
        return post(b"", length=10**12)
    if choice == 1:  # announced as little, sent as much
        return post(block, length=10)
    if choice == 2:
        head = CHUNKED
        piece = f"{len(block):x}\r\n".encode() + block + b"\r\n"
        return Hostile("too much", ((head, 0.0), *[(piece, 0.0)] * 40))
    return image_request(chance.randbytes(1_500_000))


def _slow(chance: random.Random, pause: float) -> Hostile:
    body = post(json.dumps(_valid()).encode())
    place = chance.randrange(1, len(body))
    streamed = json.dumps(_valid() | {"stream": True, "max_tokens": 30}).encode()
    return chance.choice(
        [
            Hostile("slow", ((body[:place], pause), (body[place:], 0.0))),
            Hostile("slow", ((body[:place], 0.0),), reads=False),
            Hostile(
                "slow", tuple((body[i : i + 1], pause / 40) for i in range(len(body) - 40, len(body))), reads=False
            ),
            Hostile("slow", ((body[:-1], pause),)),
            Hostile("slow", ((body, 0.0),), reads=False),
            Hostile("slow", ((post(streamed), 0.05),), reads=False),
        ]
    )


def _odd_http(chance: random.Random, _) -> Hostile:
    body = json.dumps(_valid()).encode()
    odd = [
        *(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500), b"GET\r\n\r\n", b"\r\n\r\n\r\n"),
        *(b"POST / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"G" * 100_000),
        b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET /v1/models/%00%ff/../..//etc/passwd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"DELETE /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n",
        *(post(body, length=length) for length in (-5, "abc", "", "5, 6", "\xb2", "+7")),
        *(
            post(body, extra=f"{line}\r\n")
            for line in ("Content-Length: 3", "Transfer-Encoding: gzip", "A: \x00", "a b")
        ),
        *(post(body, extra=f"{line}\r\n") for line in ("Content-Type: text/xml", "Expect: 100-continue")),
        post(zlib.compress(body), extra="Content-Encoding: deflate\r\n"),
        post(body, extra="Upgrade: websocket\r\nConnection: Upgrade\r\n"),
        *(post(body, path=path) for path in ("/v1//chat/completions", "/healthz", "/v1/chat/completions/../models")),
        CHUNKED + b"ZZ\r\nabc\r\n",
    ]
    data = chance.choice(odd)
    return Hostile("http", ((data, 0.0),), ends=b"Connection: close" not in data)


KINDS: list[tuple[str, Callable]] = [
    ("fields", _mutated),
    ("bytes", _bytes_changed),
    ("image", _bad_image),
    ("json", _odd_json),
    ("fields", _mutated),
    ("bomb", _bomb),
    ("cut", _cut),
    ("slow", _slow),
    ("http", _odd_http),
    ("too much", _too_much),
]
