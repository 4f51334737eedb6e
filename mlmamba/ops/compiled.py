"""Our C++ for models that answer (decoding.cpp with its headers), compiled for the processor that it runs on, and kept.

Compiling takes some ten seconds and a C++ compiler, once for a machine and a build of torch, whatever the model;
loading what was compiled takes milliseconds and no compiler. So it is done by a process of its own, which holds up
nobody, into a folder of the user's cache, and all processes of a machine share it.
"""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

SECONDS = 300
"""Longest time for compiling."""
SOURCE = Path(__file__).with_name("decoding.cpp")
DTYPES = (torch.float32, torch.bfloat16)
"""Of the tensors that the operators take."""


_failed: dict[Path, str] = {}
"""Why a file could not be made; it is not tried again by this process."""


class NotCompiled(Exception):
    """Why there is no compiled code, in one line."""


def folder() -> Path:
    """Where compiled code is kept: MLMAMBA_CACHE, or mlmamba in the user's cache folder.

    Raises:
        NotCompiled: the user has no home, as in containers that run under any number.
    """
    if own := os.environ.get("MLMAMBA_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlmamba"
    except RuntimeError as error:
        raise NotCompiled("the user has no home folder to keep compiled code in; set MLMAMBA_CACHE") from error


def operators(make: bool):
    """The operators `block`, `add_norm`, `linear` and `int8_linear`.

    Args:
        make: compile them where they are not there yet; else they are only looked for.

    Raises:
        NotCompiled: there is no compiler, it failed, or there is nothing yet and none is to be made.
    """
    path = library()
    if not path.exists():
        if path in _failed:  # every layer asks
            raise NotCompiled(_failed[path])
        if not make:
            raise NotCompiled(f"nothing was compiled for this processor yet (in {folder()})")
        try:
            _compile(path)
        except NotCompiled as error:
            _failed[path] = str(error)
            raise
    return _loaded(path)


def library() -> Path:
    """The file that the operators are in, once they are compiled."""
    return folder() / f"decoding-{_digest()}.so"


@cache
def _loaded(path: Path):
    if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
        raise NotCompiled(f"{path} belongs to another user")
    if not hasattr(torch.ops.mlmamba, "int8_linear"):  # a process registers them once, from whatever folder
        try:
            torch.ops.load_library(str(path))
        except Exception as error:  # a damaged file, or one of another build of torch
            path.unlink(missing_ok=True)
            raise NotCompiled(f"{path} does not load, and is removed: {_first_line(error)}") from error
    return torch.ops.mlmamba


def _compile(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{path}.lock", timeout=SECONDS):
            if path.exists():  # another process was quicker
                return
            command = [sys.executable, "-m", "mlmamba.ops.compiled", str(path)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except (OSError, TimeoutError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(_first_line(error)) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no reason"
        )
        raise NotCompiled(reason[:300])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _digest() -> str:
    """Of all that decides the code: source, flags, torch and the processor's instructions."""
    sources = (SOURCE, *sorted(SOURCE.parent.glob("*.h")), Path(__file__))
    parts = [*(source.read_text() for source in sources), torch.__version__, _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        found = [platform.processor()]
    return "\n".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *found])


def _main(path: Path) -> None:
    """Compile and write, the file whole or not at all, with the compiler and the settings that torch's own has."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    os.nice(10)
    get_cpp_compiler()  # raises at once where there is none
    flags = ("-ftree-loop-vectorize", "-w", "-lc10")
    options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False, extra_flags=flags)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        builder = CppBuilder("decoding", [str(SOURCE)], options, work)
        builder.build()
        Path(builder.get_target_file_path()).replace(path)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
