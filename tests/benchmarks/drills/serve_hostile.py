"""Hostile requests by the hundred, and good ones beside them: counts by kind and status.

    python -m tests.benchmarks.drills.serve_hostile [--requests 1000] [--clients 16] [--seed 0] [--url http://127.0.0.1:8000]

Without --url it serves a tiny model itself. Exits 1 when a hostile request gets a 5xx, when a good one gets another
answer than alone (or none), or when the service does not answer in the end. A 429 for a good one is asked again.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from tests.helpers.hostile import hostile, send
from tests.helpers.images import encoded
from tests.helpers.serve_client import ServiceError, ask
from tests.helpers.serving import load_tiny, running, serve
from workflows.serve.options import Limits

LIMITS = Limits(
    max_batch=8, max_waiting=32, body_bytes=2 * 2**20, image_bytes=10**6, image_pixels=10**7, body_seconds=2
)


class GoodClient:
    """Asks one question again and again, and compares the answers with the one it got before all began."""

    def __init__(self, url: str):
        self.url, self.asked, self.wrong = url, 0, []
        self.expected = self._ask()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "GoodClient":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> str:
        return ask(self.url, "what is shown?", encoded(7), max_tokens=16)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._ask()
            except ServiceError as error:
                if error.status == 429:
                    time.sleep(0.2)
                    continue
                answer = f"{error.status}: {error}"
            except OSError as error:
                answer = f"{type(error).__name__}: {error}"
            self.asked += 1
            if answer != self.expected:
                self.wrong.append(answer)


def attack(url: str, seeds: range, clients: int, pause: float) -> tuple[Counter, GoodClient]:
    """Send the hostile requests of some seeds, with two good clients beside them. Returns counts of (kind, status)."""
    parts = urlsplit(url)

    def one(seed: int) -> tuple[str, int | str]:
        request = hostile(seed, pause)
        return request.kind, send(parts.hostname, parts.port, request)

    with GoodClient(url) as good, ThreadPoolExecutor(clients) as pool:
        counts = Counter(pool.map(one, seeds))
    return counts, good


def failures(counts: Counter) -> Counter:
    """What must not be: server errors, and answers that never came."""
    bad = {key: n for key, n in counts.items() if key[1] == "timeout" or (key[1] != "gone" and str(key[1])[0] == "5")}
    return Counter(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url")
    a = parser.parse_args()
    with ExitStack() as stack:
        url = a.url
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            service = serve(load_tiny(folder / "tiny"), LIMITS)
            stack.callback(service.served.engine.close)
            url = stack.enter_context(running(service))
        begun = time.monotonic()
        counts, good = attack(url, range(a.seed, a.seed + a.requests), a.clients, pause=3.0)
        final = ask(url, "what is shown?", encoded(7), max_tokens=16)
    statuses = sorted({status for _, status in counts}, key=str)
    print(f"{'':10}" + "".join(f"{status!s:>8}" for status in statuses))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:10}" + "".join(f"{counts[kind, status] or '':>8}" for status in statuses))
    print(f"{'all':10}" + "".join(f"{sum(n for (_, s), n in counts.items() if s == t):>8}" for t in statuses))
    bad = failures(counts)
    seconds = time.monotonic() - begun
    print(f"{sum(counts.values())} hostile requests in {seconds:.0f} s; server errors: {sum(bad.values())}")
    print(f"good requests beside them: {good.asked}, answered otherwise than alone: {len(good.wrong)}")
    return int(bool(bad or good.wrong or not good.asked or final != good.expected))


if __name__ == "__main__":
    sys.exit(main())
