"""Requests with which one client tries to silence a service: each looks for work or room that has no bound.

`ATTACKS` holds them by name. An attack sends once when it is called with the service's port and the headers of its
client, and returns the status it got (or "closed"); tests/benchmarks/drills/serve_attacks.py calls it again and again.
"""

import base64
import contextlib
import functools
import gzip
import io
import itertools
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable

from PIL import Image

CHAT = "/v1/chat/completions"
HALF = 140
"""Connections of an attack that sends half of a request on each."""


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def head(headers: str, length: int, path: str = CHAT) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"{headers}Content-Length: {length}\r\n\r\n"
    ).encode()


def post(port: int, headers: str, body: bytes, path: str = CHAT) -> int | str:
    """Status of a request, "closed" where the connection ends before."""
    with connect(port) as connection:
        with contextlib.suppress(OSError):  # refused before the end
            connection.sendall(head(headers, len(body), path) + body)
        return status(connection)


def status(connection: socket.socket) -> int | str:
    try:
        first = connection.recv(100).split(b" ")
        return int(first[1]) if len(first) > 1 else "closed"
    except TimeoutError:
        return "timeout"
    except OSError:
        return "closed"


def half(port: int, headers: str, sent: bytes, length: int, seconds: float, path: str = CHAT) -> str:
    """Announce a body, send its beginning on many connections, and wait."""
    held = []
    for _ in range(HALF):
        connection = connect(port)
        connection.sendall(head(headers, length, path) + sent)
        held.append(connection)
    time.sleep(seconds)
    for connection in held:
        connection.close()
    return "half"


def drip(port: int, headers: str) -> str:
    """Bodies that come byte by byte, on sixty connections."""
    held = [connect(port) for _ in range(60)]
    for connection in held:
        connection.sendall(head(headers, 1000))
    for _ in range(40):
        for connection in held:
            with contextlib.suppress(OSError):
                connection.sendall(b" ")
        time.sleep(0.1)
    for connection in held:
        connection.close()
    return "half"


def leave(port: int, headers: str, body: bytes) -> str:
    """Ask and hang up, twenty times."""
    for _ in range(20):
        with connect(port) as connection:
            connection.sendall(head(headers, len(body)) + body)
    return "left"


def unread(port: int, headers: str) -> str:
    """Streams that nobody reads."""
    body = json.dumps({"messages": words("tell me"), "stream": True, "max_tokens": 200, "n": 8}).encode()
    held = []
    for _ in range(8):
        connection = connect(port)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(headers, len(body)) + body)
        held.append(connection)
    time.sleep(3)
    for connection in held:
        connection.close()
    return "left"


def unsigned() -> str:
    """Headers of a webhook with a signature that is wrong."""
    return f"x-mlflow-timestamp: {int(time.time())}\r\nx-mlflow-signature: v1,x\r\n"


def words(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat(text: str, **fields) -> bytes:
    return json.dumps({"messages": words(text), "max_tokens": 4, **fields}).encode()


def shows(data: bytes, count: int = 1, kind: str = "png") -> bytes:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}] * count + [{"type": "text", "text": "what?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 2}).encode()


@functools.cache
def flat(kind: str, side: int, mode: str = "L", **options) -> bytes:
    """A large image of one colour, which is small as a file."""
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def of_form(schema: dict, **fields) -> bytes:
    """A question whose answer has a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat("tell me", response_format=form, **{"max_tokens": 200, **fields})


def nested(levels: int, *, wide: bool = False) -> dict:
    """A schema of lists in lists; `wide`: of lists or objects, so that it doubles with each level."""
    schema = {"type": "integer"}
    for _ in range(levels):
        inner = {"type": "array", "items": schema}
        schema = {"anyOf": [inner, {"type": "object", "properties": {"a": schema}}]} if wide else inner
    return schema


def chain(levels: int, word: str) -> dict:
    """References that each stand for the next one twice."""
    twice = {f"d{n}": {word: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": twice | {f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


_numbers = itertools.count()


def fresh(port: int, headers: str) -> int | str:
    """A schema that nobody sent before."""
    names = {f"n{next(_numbers)}": {"type": "integer"} for _ in range(40)}
    return post(port, headers, of_form({"type": "object", "properties": names, "required": list(names)}))


def zipped(make: Callable[[], bytes], path: str = CHAT) -> Callable[[int, str], int | str]:
    made = functools.cache(lambda: gzip.compress(make()))
    return lambda port, headers: post(port, headers + "Content-Encoding: gzip\r\n", made(), path)


def _body(make: Callable[[], bytes], path: str = CHAT) -> Callable[[int, str], int | str]:
    made = functools.cache(make)
    return lambda port, headers: post(port, headers, made(), path)


MB = 2**20
_CONTENT = b'{"messages":[{"role":"user","content":%s}]}'
ATTACKS: dict[str, Callable[[int, str], int | str]] = {
    # What is built from JSON.
    "1 MB of numbers as content": _body(lambda: _CONTENT % (b"[" + b"1," * (MB // 2) + b"1]")),
    "12 MB of numbers as content": _body(lambda: _CONTENT % (b"[" + b"1," * (6 * MB) + b"1]")),
    "12 MB of numbers as messages": _body(lambda: b'{"messages":[' + b"1," * (6 * MB) + b"1]}"),
    "40 MB of numbers in an unknown field": _body(lambda: b'{"x":[' + b"1," * (20 * MB) + b'1],"messages":[]}'),
    "40 MB of empty lists": _body(lambda: b'{"x":[' + b"[]," * (13 * MB) + b'1],"messages":[]}'),
    "objects as parts": _body(lambda: _CONTENT % (b"[" + b"{}," * MB + b"{}]")),
    "parts without text": _body(lambda: _CONTENT % (b"[" + b'{"type":"text","text":""},' * 100_000 + b"{}]")),
    "messages by the hundred thousand": _body(
        lambda: b'{"messages":[' + b'{"role":"system","content":"a"},' * 100_000 + b"{}]}"
    ),
    "keys by the hundred thousand": _body(
        lambda: b"{" + b"".join(b'"k%d":1,' % n for n in range(500_000)) + b'"messages":[]}'
    ),
    "nested a million deep": _body(lambda: b'{"messages":' + b"[" * MB + b"]" * MB + b"}"),
    "a number of a million digits": _body(lambda: b'{"seed":' + b"9" * MB + b',"messages":[]}'),
    # Text.
    "nested placeholders, 1 MB": _body(lambda: chat("<ima" * 150_000 + "<image>" + "ge>" * 150_000)),
    "nested placeholders within the limit": _body(lambda: chat("<ima" * 35_000 + "<image>" + "ge>" * 35_000)),
    "5 MB of words": _body(lambda: chat("word " * MB)),
    "20 MB of one letter": _body(lambda: chat("a" * (20 * MB))),
    "250 kB of one letter": _body(lambda: chat("a" * 250_000)),
    "250 kB of combining marks": _body(lambda: chat("e" + "\u0301" * 120_000)),
    "stop strings of 256 characters": _body(lambda: chat("go on", stop=["x" * 255 + c for c in "abcd"], max_tokens=64)),
    "20 logprobs of 8 answers": _body(lambda: chat("go on", logprobs=True, top_logprobs=20, n=8, max_tokens=64)),
    # Forms of answers.
    "a schema 100 deep": _body(lambda: of_form(nested(100))),
    "a schema 190 deep": _body(lambda: of_form(nested(190))),
    "a schema that doubles eight times": _body(lambda: of_form(nested(8, wide=True))),
    "references in a circle": _body(
        lambda: of_form({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
    ),
    "a schema that is its own part": _body(lambda: of_form({"type": "array", "items": {"$ref": "#"}, "minItems": 1})),
    "anyOf of anyOf, 25 deep": _body(lambda: of_form(chain(25, "anyOf"))),
    "allOf of allOf, 25 deep": _body(lambda: of_form(chain(25, "allOf"))),
    "a multiple of two large primes": _body(
        lambda: of_form({"allOf": [{"type": "integer", "multipleOf": n} for n in (99_991, 99_989)]})
    ),
    "multiples of a prime": _body(lambda: of_form({"type": "integer", "multipleOf": 9_973}, n=8)),
    "a pattern of repeated repeats": _body(lambda: of_form({"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$"})),
    "a pattern that remembers 20 characters": _body(lambda: of_form({"type": "string", "pattern": ".*a.{20}$"}, n=8)),
    "patterns that must all hold": _body(
        lambda: of_form({"allOf": [{"type": "string", "pattern": f"^(.{{{n}}})*$"} for n in (97, 89, 83)]})
    ),
    "a billion of items": _body(lambda: of_form({"type": "array", "items": {}, "minItems": 10**9}, n=8)),
    "an enumeration of 1 MB": _body(lambda: of_form({"enum": [f"word{n:06}" for n in range(80_000)]})),
    "one word of 1 MB": _body(lambda: of_form({"const": "x" * MB})),
    "900 fields that may be left out": _body(lambda: of_form({"properties": {f"p{n}": {} for n in range(900)}})),
    "an ambiguous schema": _body(
        lambda: of_form(
            {
                "$defs": {"n": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}] * 40}},
                "$ref": "#/$defs/n",
            },
            n=8,
        )
    ),
    "what nothing satisfies": _body(lambda: of_form({"type": "integer", "minimum": 5, "maximum": 3})),
    "types that there are not": _body(lambda: of_form({"type": [1, None], "properties": [], "$ref": {}})),
    "a limit of 4,000 digits": _body(lambda: of_form({"type": "integer", "maximum": 10**4_000})),
    "a choice of 10,000 words": _body(lambda: chat("say", guided_choice=[f"word{n}" for n in range(10_000)])),
    "a choice of 2,500 words": _body(lambda: chat("say", guided_choice=[f"w{n}" for n in range(2_500)], n=8)),
    "a choice of every script": _body(lambda: chat("say", guided_choice=[chr(n) for n in range(0x4E00, 0x5E00)], n=8)),
    "numbers as words": _body(lambda: chat("say", guided_choice=[1] * 50_000)),
    "another schema each time": fresh,
    # Compressed.
    "a gzip bomb": zipped(lambda: b" " * (200 * MB)),
    "40 MB of spaces in 40 kB": zipped(lambda: b'{"messages":' + b" " * (40 * MB)),
    "40 MB of numbers in 40 kB": zipped(lambda: _CONTENT % (b"[" + b"1," * (20 * MB) + b"1]")),
    "a gzip bomb for /tokenize": zipped(lambda: b'{"prompt":"' + b"a" * (40 * MB) + b'"}', "/tokenize"),
    # Tokens.
    "20 MB to tokenize": _body(lambda: json.dumps({"prompt": "word " * (4 * MB)}).encode(), "/tokenize"),
    "60 kB to tokenize": _body(lambda: json.dumps({"prompt": "a" * 60_000}).encode(), "/tokenize"),
    "images to tokenize": _body(lambda: shows(flat("PNG", 8000), 16), "/tokenize"),
    "70,000 tokens to detokenize": _body(lambda: json.dumps({"tokens": [5] * 70_000}).encode(), "/detokenize"),
    # Images.
    "16 flat PNGs of 8000 x 8000": _body(lambda: shows(flat("PNG", 8000), 16)),
    "one flat PNG of 8000 x 8000": _body(lambda: shows(flat("PNG", 8000))),
    "a PNG that declares 30000 x 30000": _body(lambda: shows(png(30_000, 30_000, chunk(b"IDAT", b"")))),
    "a flat WebP of 8000 x 8000": _body(lambda: shows(flat("WEBP", 8000, "RGB"), 4, "webp")),
    "a progressive JPEG of 8000 x 8000": _body(lambda: shows(flat("JPEG", 8000, progressive=True), 2, "jpeg")),
    "a flat GIF of 8000 x 8000": _body(lambda: shows(flat("GIF", 8000), 4, "gif")),
    "text of 60 MB in a PNG": _body(
        lambda: shows(
            png(8, 8, chunk(b"iTXt", b"a\x00\x01\x00\x00\x00" + zlib.compress(b"x" * 60 * MB)), chunk(b"IEND", b""))
        )
    ),
    "40 MB that are no image": _body(lambda: shows(b"\x89PNG" + b"\x00" * (14 * MB), 2)),
    # Bodies and connections.
    "half-sent bodies": lambda port, headers: half(port, headers, b'{"messages"', 500, 4),
    "half-sent large bodies": lambda port, headers: half(port, headers, b"x" * 100_000, 40 * MB, 4),
    "half-sent heads": lambda port, headers: half(port, headers, b"", 500, 4),
    "byte by byte": drip,
    "half-sent webhooks": lambda port, headers: half(port, "", b"{", 500, 4, "/webhooks/mlflow"),
    "webhooks with a signature": lambda port, headers: half(
        port,
        f"x-mlflow-timestamp: {int(time.time())}\r\nx-mlflow-signature: v1,x\r\n",
        b"{",
        500,
        4,
        "/webhooks/mlflow",
    ),
    "questions nobody waits for": lambda port, headers: leave(port, headers, chat("go on", max_tokens=1000)),
    "streams that nobody reads": unread,
    "long answers by the dozen": _body(lambda: chat("go on", max_tokens=1000, n=8, temperature=1.0)),
}
