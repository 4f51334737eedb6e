"""Memory of a service that is used without a pause: resident size over the minutes, which should stay flat.

    python -m tests.benchmarks.drills.serve_soak [--minutes 10] [--clients 8] [--slack 0.03] [--images 9]

A tiny model behind the whole HTTP interface, in a process of its own; clients here ask in every way: streamed or whole,
with none to three images of several sizes, several turns, sampled with stop strings, malformed, given up half way.
States are kept within 8 MiB, which more than a few images of `--images` fill.
Prints the resident size once a minute. Exits 1 when the mean of the last quarter is more than `--slack` above that of
the second quarter (the first fills caches), when a good request failed, or when slots are in use in the end.
"""

import argparse
import http.client
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.helpers.images import encoded
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import load_tiny, running, serve
from workflows.serve.options import Limits

LIMITS = Limits(max_batch=8, max_waiting=64, default_tokens=24, state_cache_bytes=8 * 2**20)
SIZES = [(64, 48), (640, 480), (1600, 1200)]


def server(pipe) -> None:
    """Serve until told to stop; answers "load" with the requests that wait and run."""
    with tempfile.TemporaryDirectory() as folder:
        service = serve(load_tiny(Path(folder) / "tiny"), LIMITS)
        with running(service) as url:
            pipe.send(url)
            engine = service.served.engine
            while pipe.recv() == "load":
                pipe.send((engine.load, engine.kept_bytes))
        engine.close()


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def body(chance: random.Random, images: int) -> dict:
    """A request of any kind; every eighth is refused."""
    shown = [chance.randrange(images) for _ in range(chance.randrange(4))]
    images = [data_uri(encoded(number, "JPEG", chance.choice(SIZES))) for number in shown]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    text = " ".join(
        chance.choice(["what", "is", "red", "\u00fcber", "\U0001f642"]) for _ in range(chance.randrange(1, 20))
    )
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if chance.random() < 0.3:
        messages += [{"role": "assistant", "content": "a circle"}, {"role": "user", "content": "sure?"}]
    asked = {"messages": messages, "stream": chance.random() < 0.5, "max_tokens": chance.randrange(1, 60)}
    if chance.random() < 0.5:
        asked |= {"temperature": 1.0, "top_p": 0.9, "stop": ["xy", "stop"], "logprobs": True, "top_logprobs": 3}
    if chance.random() < 0.125:
        asked |= chance.choice([{"temperature": "hot"}, {"messages": []}, {"max_tokens": 10**9}, {"model": "other"}])
    return asked


def client(address: str, seed: int, end: float, counts: Counter, images: int) -> None:
    """Ask until `end`."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        connection = http.client.HTTPConnection(address, timeout=120)
        try:
            content = json.dumps(body(chance, images))
            connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
            if chance.random() < 0.1:
                counts["given up"] += 1
                time.sleep(chance.random() * 0.1)
                continue
            reply = connection.getresponse()
            reply.read(60 if chance.random() < 0.1 else None)
            counts[reply.status] += 1
        except OSError as error:
            counts[type(error).__name__] += 1
        finally:
            connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slack", type=float, default=0.03)
    parser.add_argument("--images", type=int, default=9, help="that are asked about")
    a = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=server, args=(other,), daemon=True)
    process.start()
    address = pipe.recv().removeprefix("http://")
    counts: Counter = Counter()
    begun = time.monotonic()
    end = begun + 60 * a.minutes
    clients = [threading.Thread(target=client, args=(address, i, end, counts, a.images)) for i in range(a.clients)]
    for thread in clients:
        thread.start()
    sizes = []
    while time.monotonic() < end:
        time.sleep(min(max(1.0, a.minutes * 60 / 200), max(0.1, end - time.monotonic())))
        before = len(sizes) * a.minutes // 200
        sizes.append(resident(process.pid) / 2**20)
        if len(sizes) == 1 or len(sizes) * a.minutes // 200 > before:
            print(
                f"{(time.monotonic() - begun) / 60:6.1f} min  {sizes[-1]:8.1f} MiB  {sum(counts.values()):7} requests"
            )
    for thread in clients:
        thread.join()
    load, kept = (1, 1), 0
    for _ in range(100):
        pipe.send("load")
        load, kept = pipe.recv()
        if load == (0, 0):
            break
        time.sleep(0.1)
    pipe.send("stop")
    process.join()
    quarter = max(1, len(sizes) // 4)
    second, last = sizes[quarter : 2 * quarter] or sizes, sizes[-quarter:]
    growth = (sum(last) / len(last)) / (sum(second) / len(second)) - 1
    print(f"resident MiB: {sizes[0]:.1f} first, {sizes[len(sizes) // 2]:.1f} half way, {sizes[-1]:.1f} last")
    print(f"last quarter against second: {growth:+.2%}; slots in use in the end: {load[1]}")
    print(f"kept states: {kept / 2**20:.1f} MiB of {LIMITS.state_cache_bytes / 2**20:.1f}")
    print("by status: " + ", ".join(f"{status} {count}" for status, count in sorted(counts.items(), key=str)))
    bad = {status: count for status, count in counts.items() if status not in (200, 400, 404, "given up")}
    return int(growth > a.slack or load != (0, 0) or bool(bad))


if __name__ == "__main__":
    sys.exit(main())
