"""The most memory that a piece of work takes beside what was in use before it."""

import contextlib
import ctypes
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): writing 5 resets the peak resident set size


class PeakMemory:
    """Context whose `bytes` is, after it, the most memory used inside beside what was used at its start.

    On CUDA it is the allocator's. On the CPU it is the process's resident memory, which Linux keeps the peak of; what
    the process freed before is given back first, so that it is not used again unseen. Elsewhere `bytes` is None.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _reset()
        return self

    def __exit__(self, *_) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._before is not None:
            self.bytes = max(0, _status("VmHWM") - self._before)


def _reset() -> int | None:
    """Resident memory now, with the peak reset to it; None where that cannot be done."""
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
