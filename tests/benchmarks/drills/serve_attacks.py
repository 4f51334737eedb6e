"""One client that tries to silence the service, eight good ones beside it: how long these wait, and the memory.

    python -m tests.benchmarks.drills.serve_attacks [--seconds 8] [--only WORD] [--at-once 4]

A tiny model is served by Ray Serve with API keys, as `mlmamba serve` does. Each attack of tests/helpers/attacks.py is
sent four at a time under one key for some seconds, by a process that yields the cores to the others (they stand for
other machines), while eight clients of another key ask short questions and one asks for /healthz. Printed: the good
clients' p50 and p99, the latter as a ratio to that without an attack just before, and memory as a ratio to that before
all attacks: the most during the attack, and what is left four seconds after it. Memory is that of the replica and the
proxy; the object store, through which Ray hands over bodies and whose size is fixed, is printed at the end. Exits 1
unless p99 stays within 3 times that (or 1 s), the memory that is left within 20%, every health check answers within
1 s, no good request fails, and no attack gets a 5xx. Measure alone: nothing else may run.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.attacks import ATTACKS
from tests.helpers.serve_client import ServiceError, ask, request
from tests.helpers.serving import save_tiny

GOOD_CLIENTS, LONGEST, SLOWER, LARGER = 8, 1.0, 3.0, 1.2
PROCESSES = ("ray::ServeReplica", "ray::ProxyActor")


@dataclass
class Seen:
    """What the good clients and the health check saw."""

    seconds: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    failed: Counter = field(default_factory=Counter)
    megabytes: float = 0.0

    def at(self, share: float) -> float:
        """A percentile of the good clients' times."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


def attacker(asked, answered) -> None:
    """A process of its own: runs one attack after the other, and puts the counts of what each was answered."""
    os.nice(15)
    answered.put(Counter())  # it is there, with all that it imports
    while (order := asked.get()) is not None:
        name, port, at_once, seconds = order
        counts, end = Counter(), time.monotonic() + seconds

        def work(name=name, port=port, counts=counts, end=end) -> None:
            while time.monotonic() < end:
                counts[ATTACKS[name](port, "Authorization: Bearer bad\r\n")] += 1

        threads = [threading.Thread(target=work) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answered.put(counts)


def watch(url: str, seconds: float) -> Seen:
    """Good clients for some seconds."""
    seen, end = Seen(), time.monotonic() + seconds

    def good() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                ask(url, "what is shown?", max_tokens=8, api_key="good")
                seen.seconds.append(time.monotonic() - began)
            except ServiceError as error:
                seen.failed[error.status] += 1
            except OSError as error:
                seen.failed[type(error).__name__] += 1

    def healthy() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                request(url, "/healthz", timeout=30)
                seen.health.append(time.monotonic() - began)
            except (ServiceError, OSError) as error:
                seen.failed[f"health {type(error).__name__}"] += 1
            seen.megabytes = max(seen.megabytes, sum(memory().values()))
            time.sleep(0.1)

    work = [good] * GOOD_CLIENTS + [healthy]
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()
    return seen


def memory(*kinds: str) -> dict[str, float]:
    """MB of replica and proxy, of these kinds of resident memory as Linux names them; by default what is their own."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if name := next(filter(line.startswith, PROCESSES), None):
            status = dict(row.split(":", 1) for row in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            sizes = (int(status[kind].split()[0]) for kind in kinds or ("RssAnon", "RssFile"))
            found[name] = sum(sizes) / 2**10
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--port", type=int, default=18431)
    a = parser.parse_args()
    os.environ |= {"MLMAMBA_API_KEYS": "good,bad", "MLMAMBA_WEBHOOK_SECRET": "secret"}
    from workflows.serve.start import serve_model

    failed = []
    spawn = multiprocessing.get_context("spawn")
    asked, answered = spawn.SimpleQueue(), spawn.SimpleQueue()
    spawn.Process(target=attacker, args=(asked, answered), daemon=True).start()
    answered.get()
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny(Path(folder) / "tiny")
        with serve_model(str(model), Path(folder), port=a.port, block=False) as server:
            watch(server.url, 3)  # warm
            before = memory()
            print(f"{'':42}{'p50':>8}{'p99':>8}{'ratio':>8}{'most':>7}{'left':>7}{'health':>8}  answered", flush=True)
            for name in ATTACKS:
                if a.only not in name:
                    continue
                calm = watch(server.url, a.seconds / 2)
                asked.put((name, a.port, a.at_once, a.seconds + 0.5))
                time.sleep(0.5)
                seen, counts = watch(server.url, a.seconds), answered.get()
                time.sleep(4)
                whole = sum(before.values())
                slower, most, larger = (
                    seen.at(0.99) / calm.at(0.99),
                    seen.megabytes / whole,
                    sum(memory().values()) / whole,
                )
                health = max(seen.health, default=float("inf"))
                bad = (slower > SLOWER and seen.at(0.99) > LONGEST) or larger > LARGER or health > LONGEST
                bad = bad or bool(seen.failed) or any(str(status)[0] == "5" for status in counts)
                print(
                    f"{name:42}{seen.at(0.5):>7.2f}s{seen.at(0.99):>7.2f}s{slower:>8.1f}{most:>7.2f}{larger:>7.2f}"
                    f"{health:>7.2f}s  {dict(counts)} {dict(seen.failed) or ''} {'FAILED' if bad else ''}",
                    flush=True,
                )
                failed += [name] * bad
            for process, size in memory().items():
                print(f"{process}: {before[process]:.0f} MB before, {size:.0f} after")
            print(f"object store: {max(memory('RssShmem').values()):.0f} MB")
    asked.put(None)
    print(f"{len(failed)} of the attacks did harm: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
