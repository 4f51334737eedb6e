"""The client of a cluster's job server: submit a workflow as a job, follow its log and read its result.

A workflow has one running job at a time; its jobs are found again by the workflow's name in their ids.
"""

import asyncio
import logging
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from workflows.console import printable
from workflows.errors import UsageError, WorkflowError
from workflows.submit.bundle import Submission
from workflows.submit.log import MARK, STARTED, Reader, for_terminal
from workflows.submit.package import JOB_FOLDER

_TIMEOUT = 10
"""Seconds that the first question to an address may take."""
STOP_SECONDS = 60
"""Seconds that a stopped job has to put its work in order before it is killed."""
RUN, STORAGE = "mlmamba.run", "mlmamba.storage"  # metadata of a job
_POLL = 1.0
"""Seconds between two questions for a job's status."""
_POLL_ALL = 5.0
"""Seconds between two reads of the whole log, where it cannot be streamed."""
_GIVE_UP = 300.0
"""Seconds without an answer from the cluster after which the client gives up; the job goes on."""


class Cluster:
    """A cluster's job server. The errors of its methods are WorkflowErrors."""

    def __init__(self, address: str, any_version: bool = False):
        """Connect, and check that the cluster runs the client's version of Ray.

        Args:
            address: http://HEAD:8265, the dashboard's.
            any_version: accept another version of Ray.

        Raises:
            UsageError: it is not such an address.
            WorkflowError: nothing answers there, something else does, or the cluster runs another Ray.
        """
        self.address = _http(address)
        headers = self._check(any_version)
        with _our_address(), _workflow_errors(self.address):
            self.jobs = JobSubmissionClient(self.address, headers=headers)
        for name in ("dashboard_sdk", "job.sdk"):  # the console reports what they would log
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    def submit(
        self, submission: Submission, package: Path, arguments: list[str], python: str, env: dict, about: dict
    ) -> str:
        """Start the workflow's job. Returns its id.

        Args:
            package: zip of the files that the job needs.
            arguments: of the command.
            python: command that starts Python on the cluster's head.
            env: environment variables of the job and its workers.
            about: more about the job, for people.

        Raises:
            WorkflowError: a job of this workflow is running already.
        """
        earlier = self.of(submission)
        self._refuse_if_running(earlier)
        numbers = [job.submission_id.removeprefix(submission.prefix) for job in earlier]
        name = f"{submission.prefix}{max((int(n) for n in numbers if n.isdecimal()), default=0) + 1}"
        mark = secrets.token_hex(8)
        with _workflow_errors(self.address):
            try:
                return self.jobs.submit_job(
                    entrypoint=f"exec {python} {JOB_FOLDER}/start.py {shlex.join(arguments)}",
                    submission_id=name,
                    runtime_env={
                        "working_dir": str(package),
                        "env_vars": {
                            **{"MLMAMBA_JOB": name, MARK: mark, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                            **env,
                        },
                    },
                    metadata={RUN: submission.run, STORAGE: submission.storage, MARK: mark, **about},
                )
            except RuntimeError:
                self._refuse_if_running(
                    self.of(submission)
                )  # another client submitted the same workflow a moment earlier
                raise

    def of(self, submission: Submission) -> list[JobDetails]:
        """The jobs of a workflow, ended ones included."""
        return [job for job in self.workflows() if job.submission_id.startswith(submission.prefix)]

    def workflows(self) -> list[JobDetails]:
        """All submitted workflows, the latest last."""
        with _workflow_errors(self.address):
            found = [job for job in self.jobs.list_jobs() if job.submission_id and RUN in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0)

    def info(self, job_id: str) -> JobDetails:
        """One job. Raises WorkflowError with the known ones when there is none of this id."""
        with _workflow_errors(self.address):
            try:
                return self.jobs.get_job_info(job_id)
            except RuntimeError as error:
                if "404" not in str(error):
                    raise
        known = ", ".join(job.submission_id for job in self.workflows()[-5:])
        raise WorkflowError(f"{self.address} knows no job {job_id}; the latest are: {known or 'none'}")

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; returns False when it had ended before."""
        if self.info(job_id).status.is_terminal():
            return False
        with _workflow_errors(self.address):
            return self.jobs.stop_job(job_id)

    def log(self, job_id: str) -> str:
        """Return a job's whole log."""
        with _workflow_errors(self.address):
            return self.jobs.get_job_logs(job_id)

    def _refuse_if_running(self, jobs: list[JobDetails]) -> None:
        running = [job.submission_id for job in jobs if not job.status.is_terminal()]
        if running:
            raise WorkflowError(
                f"this recipe is under way already on this storage, as job {running[0]}: follow it with `mlmamba "
                f"submit --follow {running[0]} --address {self.address}`, or end it with --stop"
            )

    def _check(self, any_version: bool) -> dict[str, str]:
        """Ask the cluster for its version. Returns the headers that it wants."""
        headers: dict[str, str] = {}
        with _workflow_errors(self.address):
            answer = requests.get(f"{self.address}/api/version", timeout=_TIMEOUT)
            if answer.status_code == 401 and (token := _token()):  # not before it is asked for
                headers = {"Authorization": f"Bearer {token}"}
                answer = requests.get(f"{self.address}/api/version", timeout=_TIMEOUT, headers=headers)
        if answer.status_code in (401, 403):
            what = "does not take this machine's token" if headers else "wants a token"
            raise WorkflowError(
                f"the cluster at {self.address} {what}: put the one that `ray get-auth-token` prints on its head into "
                "RAY_AUTH_TOKEN, or its file's name into RAY_AUTH_TOKEN_PATH"
            )
        try:
            version = answer.json()["ray_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise WorkflowError(
                f"{self.address} answers, but is no Ray cluster's dashboard: give http://HEAD:8265 of the head node"
            ) from error
        if version != ray.__version__ and not any_version:
            raise WorkflowError(
                f"the cluster at {self.address} runs Ray {version}, this code was tested with {ray.__version__}: give "
                f"the cluster's image ray=={ray.__version__}, or try with --any-ray"
            )
        return headers


def _token() -> str | None:
    """Read the cluster's token from where Ray itself reads it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() if file.is_file() else None


def _http(address: str) -> str:
    """Return the address with its scheme. Raises UsageError when it is not a dashboard's."""
    scheme, mark, rest = address.rstrip("/").rpartition("://")
    if (mark and scheme not in ("http", "https")) or not rest or (not mark and ":" not in rest):
        raise UsageError(
            f"--address {address}: give the dashboard's of the head node, http://HEAD:8265; ray:// and the port of "
            "`ray start --head` are for other things"
        )
    return f"{scheme or 'http'}://{rest}"


@contextmanager
def _our_address() -> Iterator[None]:
    """Hide the variables that Ray prefers to the address that it is given."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _workflow_errors(address: str) -> Iterator[None]:
    """Raise errors of the connection and of the job server as WorkflowErrors."""
    try:
        yield
    except AuthenticationError as error:
        raise WorkflowError(f"{address} refuses the token: {error}") from error
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError) as error:
        raise WorkflowError(
            f"cannot reach a Ray cluster at {address}: is its dashboard up (ray start --head --dashboard-host ...), "
            "and may this machine connect to that port?"
        ) from error
    except (requests.exceptions.RequestException, RuntimeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkflowError(f"the job server at {address} refuses: {printable(text[-1])[:500]}") from error


@dataclass(frozen=True)
class End:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    result: dict | None
    """What the command printed as JSON."""
    message: str
    """Ray's message about a job that failed."""


def follow_job(cluster: Cluster, job_id: str, show: Callable[[str], None]) -> End:
    """Show a job's log from its beginning, and return when the job has ended.

    Raises:
        WorkflowError: there is no such job, or the cluster does not answer any more.
    """
    reader, last, given = Reader(show, _mark(cluster.info(job_id))), time.monotonic(), 0
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
    """Read a job's status and result as they are now, without waiting for its end."""
    info = cluster.info(job_id)
    reader = Reader(lambda line: None, _mark(info))
    reader.feed(cluster.log(job_id))
    reader.close()
    return End(str(info.status), reader.result, _reason(info.message))


def _reason(message: str | None) -> str:
    """Return Ray's message about a job, which ends with the log's last lines, without the line about its start."""
    return "\n".join(for_terminal(line) for line in (message or "").splitlines() if not line.startswith(STARTED))


def _mark(info: JobDetails) -> dict[str, str]:
    return info.metadata or {}


def _tail(cluster: Cluster, job_id: str, given: int) -> Iterator[str]:
    """Stream the log from character `given` on, until the connection or the job ends."""
    with asyncio.Runner() as runner:
        stream = aiter(cluster.jobs.tail_job_logs(job_id))
        skip = given  # every connection streams from the log's beginning
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
