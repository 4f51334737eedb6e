"""Following a job: its progress line by line, through lost connections, to its end and its result."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import aiohttp

from workflows.errors import WorkflowError
from workflows.submit.client import Cluster
from workflows.submit.job import RESULT

_STARTED = "Running entrypoint for job "
"""Begins the log's line that Ray writes when the job itself starts. Ray flushes it after it has started the job's
process, so what a quick process says may stand before it."""
_RAYS = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+[A-Z]+ \w+\.py:\d+ -- ")
"""Begins Ray's own lines about the job's environment, which come before."""
_POLL = 1.0
_POLL_ALL = 5.0
"""Seconds between looks at the whole log, where it cannot be streamed."""
_GIVE_UP = 300.0
"""Seconds without an answer from the cluster after which the client ends (the job does not)."""


@dataclass(frozen=True)
class End:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    result: dict | None
    """What the command printed as JSON."""
    message: str
    """Ray's word on a job that failed."""


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None]) -> End:
    """Show a job's progress from its beginning and return when it has ended.

    Raises:
        WorkflowError: there is no such job, or the cluster does not answer any more.
    """
    reader, last, given = Reader(show), time.monotonic(), 0
    cluster.info(job_id)
    while True:
        try:
            try:
                for text in _tail(cluster, job_id, given):
                    given, last = given + len(text), time.monotonic()
                    reader.feed(text)
            except (aiohttp.ClientError, RuntimeError, OSError):  # lost, or a proxy that lets no websockets through
                text = cluster.log(job_id)[given:]
                given += len(text)
                reader.feed(text)
                time.sleep(_POLL_ALL)
            info = cluster.info(job_id)
            last = time.monotonic()
            if info.status.is_terminal():
                reader.feed(cluster.log(job_id)[given:])
                reader.close()
                return End(str(info.status), reader.result, _reason(info.message))
        except WorkflowError as error:
            if time.monotonic() - last > _GIVE_UP:
                raise WorkflowError(f"no answer from {cluster.address} for {_GIVE_UP:.0f} s: {error}") from error
        time.sleep(_POLL)


def read_end(cluster: Cluster, job_id: str) -> End:
    """How a job has ended, or stands: its status now, without a wait."""
    info, reader = cluster.info(job_id), Reader(lambda line: None)
    reader.feed(cluster.log(job_id))
    reader.close()
    return End(str(info.status), reader.result, _reason(info.message))


def _reason(message: str | None) -> str:
    """Ray's word on a job, which ends with the last lines of its log, without the line about its start."""
    return "\n".join(line for line in (message or "").splitlines() if not line.startswith(_STARTED))


class Reader:
    """Turns pieces of a log into lines of progress, and keeps the result apart.

    What comes before the job's start is held back until then, and Ray's lines in it are left out.
    """

    def __init__(self, show: Callable[[str], None]):
        self._show, self._rest = show, ""
        self._before: list[str] | None = []
        self.result: dict | None = None

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        """Take what is left as the log's end."""
        if self._rest:
            self._line(self._rest)
        self._rest = ""
        self._begin()

    def _line(self, line: str) -> None:
        if line.startswith(_STARTED):
            self._begin()
        elif line.startswith(RESULT):
            self.result = json.loads(line.removeprefix(RESULT))
        elif self._before is not None:
            self._before.append(line)
        else:
            self._show(line)

    def _begin(self) -> None:
        for line in self._before or ():
            if not _RAYS.match(line):
                self._show(line)
        self._before = None


def _tail(cluster: Cluster, job_id: str, given: int) -> Iterator[str]:
    """Pieces of the log from character `given` on, as they are written, until the connection or the job ends."""
    with asyncio.Runner() as runner:
        stream = aiter(cluster.jobs.tail_job_logs(job_id))
        skip = given  # every connection begins at the beginning
        try:
            while True:
                text = runner.run(_next(stream))
                if text is None:
                    return
                fresh, skip = text[skip:], max(0, skip - len(text))
                if fresh:
                    yield fresh
        finally:
            runner.run(stream.aclose())


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)
