"""llama.cpp's server as a process of its own, and an interpreter that has it."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def interpreter() -> str | None:
    """A Python with xllamacpp: MLMAMBA_TEST_LLAMA, or this one where it has it."""
    own = sys.executable if importlib.util.find_spec("xllamacpp") else None
    return os.environ.get("MLMAMBA_TEST_LLAMA") or own


@contextmanager
def llama_server(python: str, file: Path, threads: int, slots: int = 1) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of the server on a GGUF file.

    Raises:
        RuntimeError: it did not start.
    """
    script = Path(__file__).with_name("llama_server.py")
    command = [python, str(script), str(file), str(threads), str(slots)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            line = next((line for line in process.stdout if line.startswith("{")), None)
            if line is None:
                log.seek(0)
                raise RuntimeError(f"llama.cpp does not start: {log.read()[-500:]}")
            yield json.loads(line)["url"], psutil.Process(process.pid)
        finally:
            process.kill()
