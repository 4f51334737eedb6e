"""The metrics of a stage between two reports, and the check for a loss that has diverged."""

import math
import resource
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Meter:
    """Sum losses, tokens and time since the last report.

    Args:
        positions_per_step: tokens that one step has room for, over all ranks.
    """

    def __init__(self, positions_per_step: int):
        self._positions = positions_per_step
        self._reset()

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens = 0
        self._aside = 0.0
        self._start = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        """Count a step: this rank's share of its loss, and this rank's tokens without padding."""
        self._losses.append(loss)
        self._tokens += tokens

    @contextmanager
    def aside(self):
        """Leave the time inside out of the rates, because validation and samples are not training."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def read(self, engine, step: int, steps: int) -> dict:
        """Return the metrics since the last read, and begin again. A collective call: losses are summed over ranks.

        Values are read from the device only here, so that no step has to wait for it.
        """
        local = torch.stack([torch.stack(self._losses).sum(), torch.tensor(float(self._tokens), device=engine.device)])
        local = local.double()
        dist.all_reduce(local)
        loss, tokens = local.tolist()
        seconds, count = time.perf_counter() - self._start - self._aside, len(self._losses)
        metrics = {
            "event": "metrics",
            "step": step,
            "steps": steps,
            "loss": loss / count,
            **learning_rates(engine),
            "grad_norm": grad_norm(engine),
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / count,
            "useful_token_share": tokens / (count * self._positions),
            "worker_peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if engine.device.type == "cuda":
            metrics["gpu_peak_memory_gib"] = torch.cuda.max_memory_allocated(engine.device) / 2**30
        self._reset()
        return metrics


def learning_rates(engine) -> dict[str, float]:
    """Return `learning_rate`, the highest, and one per part where the parts differ."""
    groups = engine.optimizer.param_groups
    rates = {group["part"]: float(group["lr"]) for group in groups}
    each = {f"learning_rate_{part}": rate for part, rate in rates.items()} if len(set(rates.values())) > 1 else {}
    return {"learning_rate": max(rates.values()), **each}


def grad_norm(engine) -> float:
    """Global gradient norm of the last step before clipping; infinite when it overflowed."""
    return float(engine.get_global_grad_norm() or 0.0)


class LossWatch:
    """Decide from the mean loss of each report whether a stage has diverged.

    Args:
        rise: a mean that lies more than this many nats per token over the lowest so far has diverged; None: only a loss
            that is not finite has.
        lowest: the lowest mean so far, from the checkpoint that the stage resumes from.
    """

    def __init__(self, rise: float | None, lowest: float | None = None):
        self.lowest = lowest
        self._rise = rise

    def diverged(self, loss: float) -> str:
        """Check a mean loss. Returns why it has diverged, or "" when it has not."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        lowest = self.lowest
        if self._rise is not None and lowest is not None and loss > lowest + self._rise:
            return f"the loss has risen to {loss:.3f} from {lowest:.3f} (train.max_loss_rise is {self._rise:g})"
        self.lowest = loss if lowest is None else min(loss, lowest)
        return ""
