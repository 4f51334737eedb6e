"""Prepare a process for a verb: quiet the libraries, connect to Ray, and end in order on SIGTERM."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from workflows.errors import WorkflowError

REQUIRED = ("torch", "timm", "transformers", "tokenizers", "pyarrow", "ray", "deepspeed", "mlflow", "safetensors")
"""Packages that every installation must have; `mlmamba doctor` looks for them."""
QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_USAGE_DISABLED": "1",  # else an actor, and its start, for statistics that nobody is sent
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives a Ray, as Ray Data's may, must not start another one
    "RAY_worker_niceness": "0",  # Ray's 15 lets anything else on the machine starve training
}


_DEVICES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "nvgpu", "kfd")  # a GPU, WSL's, two of Jetson's, ROCm's


def accelerators() -> list[Path]:
    """The devices of this machine through which torch may reach a GPU."""
    return [found for name in _DEVICES for found in Path("/dev").glob(name)]


def quiet_libraries() -> None:
    """Keep the libraries' own messages below errors off the terminal. Call before importing them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not accelerators():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed logs its search for an accelerator
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="mlflow")
    for name in ("DeepSpeed", "deepspeed", "mlflow", "alembic", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect_ray(verbose: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start Ray on this machine; nothing when already connected.

    Args:
        verbose: show the workers' own output.
        say: told what is being started before it takes its time.

    Raises:
        WorkflowError: nothing answers at RAY_ADDRESS, or Ray does not start on this machine.
    """
    import ray

    from pipelines.execution import ensure_ray

    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ensure_ray(verbose, lambda text: say(f"{text} ..."))
        except ConnectionError as error:
            raise WorkflowError(str(error)) from error
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own handler would end the process at once
        logging.getLogger("ray").setLevel(logging.ERROR)


_KEPT_FREE = 32 * 2**20
_LOOK = 2.0  # seconds


class FreedMemory:
    """Gives freed memory of a service back to the system. The C library itself returns the end of its heap alone, so a
    process would stay as large as its largest request made it."""

    def __init__(self):
        self._started_with, self._coming = _resident(), False

    def give_back_soon(self) -> None:
        """Two seconds from now, in a thread, give back what is free where the process has grown by 32 MiB or more: some
        5 ms each time. Called on an event loop, after a request."""
        if not self._coming:
            self._coming = True
            loop = asyncio.get_running_loop()
            loop.call_later(_LOOK, loop.run_in_executor, None, self._give_back)

    def _give_back(self) -> None:
        self._coming = False
        if _resident() - self._started_with >= _KEPT_FREE:
            release_freed()


def release_freed() -> None:
    """Give all freed memory back to the system, where the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where Linux does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def stop_on_sigterm() -> None:
    """Treat SIGTERM, with which a cluster stops a job, as Ctrl-C: clean up and mark the run KILLED."""

    def interrupt(signum, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the cleaning up
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
