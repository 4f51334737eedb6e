"""Clients that ask a service all the time, each its next question as soon as the last is answered."""

import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException

from tests.helpers.serve_client import ServiceError, ask_again, request

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Asked:
    """One request and what became of it. Times are of the monotonic clock."""

    question: str
    began: float
    ended: float
    header: str = ""
    fingerprint: str = ""
    answer: str = ""
    error: str = ""
    tries: int = 1

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Clients:
    """Some clients in threads, from `with` until its end; `asked` has every request then.

    Args:
        url: the service.
        count: of clients.
        questions: asked in turn.
        tokens: longest answer.
        patience: seconds for which a failed request is tried again; 0 for never.
    """

    def __init__(self, url: str, count: int, questions: list[str], tokens: int, patience: float = 0):
        self._url, self._questions, self._tokens, self._patience = url, questions, tokens, patience
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        self.asked: list[Asked] = []

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[Asked]:
        """Requests without an answer."""
        return [asked for asked in self.asked if asked.error]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            question = self._questions[number % len(self._questions)]
            self.asked.append(self._ask(question))
            number += 1
            if self.asked[-1].error:
                time.sleep(0.05)  # a refused connection takes no time, and would be counted a thousand times

    def _ask(self, question: str) -> Asked:
        began, tries = time.monotonic(), []

        def call() -> tuple[str, dict]:
            tries.append(time.monotonic())
            return post(self._url, question, self._tokens)

        try:
            header, content = ask_again(call, self._patience) if self._patience else call()
        except (ServiceError, OSError, HTTPException, ValueError) as error:
            status = f"{error.status} " if isinstance(error, ServiceError) else ""
            text = f"{status}{type(error).__name__}: {error}"[:200]
            return Asked(question, began, time.monotonic(), error=text, tries=len(tries))
        answer = content["choices"][0]["message"]["content"]
        ended = time.monotonic()
        return Asked(question, began, ended, header, content["system_fingerprint"], answer, tries=len(tries))


def post(url: str, question: str, tokens: int) -> tuple[str, dict]:
    """The version in the response's header, and its body."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    call = urllib.request.Request(url + PATH, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=120) as reply:
            return reply.headers["x-model-version"], json.load(reply)
    except urllib.error.HTTPError as error:
        raise ServiceError(error.code, error.read().decode(errors="replace")[:200], None) from None


def states(url: str, enough: int = 30) -> dict[int, dict]:
    """What the replicas say of themselves, by process; each is met in so many requests."""
    found = [request(url, "/v1/swap") for _ in range(enough)]
    return {state["pid"]: state for state in found}


def wait_until_all_serve(url: str, label: str, replicas: int, seconds: float = 120) -> float:
    """Return the seconds until every replica was seen to serve a version."""
    began = time.monotonic()
    while True:
        seen = states(url, 10 * replicas)
        if len(seen) >= replicas and {state["serving"] for state in seen.values()} == {label}:
            return time.monotonic() - began
        assert time.monotonic() - began < seconds, seen
        time.sleep(0.1)


def longest_silence(asked: list[Asked]) -> float:
    """Longest time, in seconds, in which no request of any client was answered."""
    ends = sorted(one.ended for one in asked if not one.error)
    return max((later - sooner for sooner, later in itertools.pairwise(ends)), default=float("inf"))


def quantile(asked: list[Asked], share: float) -> float:
    """A quantile of the answered requests' seconds."""
    seconds = sorted(one.seconds for one in asked if not one.error)
    return seconds[min(len(seconds) - 1, int(share * len(seconds)))]
