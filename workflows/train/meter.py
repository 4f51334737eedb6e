"""What a stage measures between two reports, and when its loss says that it has diverged."""

import math
import resource
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Meter:
    """Sums what happened since the last report.

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
        """Count a step: this rank's share of its loss, and this rank's tokens that are no padding."""
        self._losses.append(loss)
        self._tokens += tokens

    @contextmanager
    def aside(self):
        """Leave what happens inside out of the rates: validation and samples are no training."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def read(self, engine, step: int, steps: int) -> dict:
        """Metrics since the last read; a collective call, because losses are summed over ranks.

        All that is read from the device is read here, so that a step waits for nothing.
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
    """`learning_rate`, the highest, and one by part where the parts differ."""
    groups = engine.optimizer.param_groups
    rates = {group["part"]: float(group["lr"]) for group in groups}
    each = {f"learning_rate_{part}": rate for part, rate in rates.items()} if len(set(rates.values())) > 1 else {}
    return {"learning_rate": max(rates.values()), **each}


def grad_norm(engine) -> float:
    """Global gradient norm of the last step before clipping; infinite when that step had none that is finite."""
    return float(engine.get_global_grad_norm() or 0.0)


class LossWatch:
    """Decides from the mean losses between two logs whether a stage has diverged.

    Args:
        rise: nats per token over the lowest mean so far that mean divergence; None: only what is not finite does.
        lowest: the lowest mean so far, from the checkpoint that the stage goes on from.
    """

    def __init__(self, rise: float | None, lowest: float | None = None):
        self.lowest = lowest
        self._rise = rise

    def diverged(self, loss: float) -> str:
        """What is wrong with a mean loss, or "" when nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        lowest = self.lowest
        if self._rise is not None and lowest is not None and loss > lowest + self._rise:
            return f"the loss has risen to {loss:.3f} from {lowest:.3f} (train.max_loss_rise is {self._rise:g})"
        self.lowest = loss if lowest is None else min(loss, lowest)
        return ""
