"""`mlmamba train RECIPE --find-lr`: a short ramp of the learning rate, and what its losses suggest.

From the model that the stage starts from, each step takes a higher rate than the one before (Smith 2017), over the
stage's own rows, batch and parts, until the loss leaves. Nothing is kept of what is learned.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from workflows.train.job import StageJob

STEPS, LOWEST, HIGHEST = 120, 1e-6, 1.0
_SMOOTH = 0.9  # of the mean of the losses so far that stays, a step
_LEFT = 1.5  # a smoothed loss over so many times the lowest has left


@dataclass(frozen=True)
class Ramp:
    """Rates and their losses, step by step."""

    rates: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> list[float]:
        """Exponential mean of the losses, as large at its start as later."""
        mean, found = 0.0, []
        for step, loss in enumerate(self.losses, 1):
            mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
            found.append(mean / (1 - _SMOOTH**step))
        return found

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate with the lowest smoothed loss, of two digits; None where the loss never fell."""
        smoothed = self.smoothed
        if not smoothed or min(smoothed) > 0.98 * smoothed[0]:
            return None
        return float(f"{self.rates[smoothed.index(min(smoothed))] / 10:.1e}")

    def told(self, stage: str, now: float) -> str:
        """For people."""
        if self.suggestion is None:
            return f"stage {stage}: the loss fell at no rate from {self.rates[0]:.0e} to {self.rates[-1]:.0e}"
        smoothed = self.smoothed
        lowest = self.rates[smoothed.index(min(smoothed))]
        return (
            f"stage {stage}: the loss is lowest at a rate of {lowest:.1e}; a tenth of it is a good peak for the whole "
            f"stage: learning_rate: {self.suggestion:.1e} (now {now:.1e})"
        )

    def draw(self, path: Path, stage: str) -> None:
        """A PNG of the losses over the rates."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="0.8", label="a step")
        axes.plot(self.rates, self.smoothed, color="#0072B2", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="#D55E00", linestyle="--", label=f"suggested: {self.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title=f"stage {stage}")
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class RateSearch:
    """The job of the workers; see Crew.run.

    Attributes:
        job: of the stage, with a folder for checkpoints of which there are none.
    """

    job: StageJob

    def run(self, rank: int, world: int, tell: Callable[[dict], None]) -> dict:
        """Take the ramp's steps on this worker. Returns its rates and losses, or {"stopped": why}."""
        import torch.distributed as dist

        from pipelines.reader import prefetch, step_indices
        from workflows.train.job import StageError
        from workflows.train.loop import Worker
        from workflows.train.step import seed_step, take_step

        stage = self.job.stage.model_copy(
            update={"steps": STEPS, "epochs": None, "best": None, "keep_features": "never"}
        )
        train = self.job.train.model_copy(update={"validate_every": None, "sample_every": None})
        try:
            worker = Worker(replace(self.job, stage=stage, train=train), rank, world)
        except StageError as error:
            return {"stopped": str(error)}
        engine, rates, losses, lowest, mean = worker.engine, [], [], math.inf, 0.0
        base = [
            group["lr"] / max(g["lr"] for g in engine.optimizer.param_groups) for group in engine.optimizer.param_groups
        ]
        order = step_indices(worker.dataset, self.job.seed, stage.batch_rows, 0, 1)
        stream = prefetch(worker.read, zip(count(1), order, strict=False), self.job.threads)
        engine.train()
        try:
            for step, micro_batches in zip(range(1, STEPS + 1), stream, strict=False):
                rate = LOWEST * (HIGHEST / LOWEST) ** ((step - 1) / (STEPS - 1))
                for group, share in zip(engine.optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * share
                seed_step(self.job.seed, step, rank)
                loss, _ = take_step(engine, micro_batches, world)
                dist.all_reduce(loss)
                rates, losses = [*rates, rate], [*losses, loss.item()]
                mean = _SMOOTH * mean + (1 - _SMOOTH) * losses[-1]
                smoothed = mean / (1 - _SMOOTH**step)
                lowest = min(lowest, smoothed)
                if not math.isfinite(losses[-1]) or smoothed > _LEFT * lowest:
                    break
                if rank == 0 and step % 20 == 0:
                    tell({"event": "note", "text": f"step {step}: rate {rate:.1e}, loss {losses[-1]:.3f}"})
        finally:
            stream.close()
            worker.close()
        finite = [pair for pair in zip(rates, losses, strict=True) if math.isfinite(pair[1])]
        return {"rates": [rate for rate, _ in finite], "losses": [loss for _, loss in finite]}
