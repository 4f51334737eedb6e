"""The recipe's evaluation and the gate before promotion."""

from typing import Literal

from pydantic import Field

from pipelines.config import StrictModel
from workflows.configs.gate import Gate


class BenchmarkRecipe(StrictModel):
    """One published benchmark, as `mlmamba evaluate --benchmark` takes it."""

    name: Literal["vqav2", "gqa", "vizwiz", "textvqa", "pope", "vsr", "llava", "shards"]
    """Its name."""
    data: str
    """Folder of its published files, path or URI."""
    images: str | None = None
    """Folder or zip of its pictures, where they are not in a usual place below `data`."""
    split: str | None = None
    """For benchmarks with several: vsr's zeroshot or random, the validation or train of shards."""
    questions: int | None = Field(None, gt=0)
    """How many questions the files have, where that is not what was published."""


class EvaluateRecipe(StrictModel):
    """How the test sources are scored."""

    workers: int = Field(1, gt=0)
    """Processes that answer questions."""
    cpus_per_worker: int = Field(1, gt=0)
    """CPU cores, and torch threads, of one process."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of one process; a half lets two share one."""
    batch_pictures: int = Field(16, gt=0)
    """Pictures in one batch, with all their questions. Changes speed only."""
    batch_questions: int = Field(64, gt=0)
    """Most questions in one forward pass. Changes speed and memory only."""
    max_new_tokens: int = Field(8, gt=0)
    """Longest answer to the test sources in tokens; benchmarks have their own."""
    benchmarks: list[BenchmarkRecipe] = Field(default=[])
    """Published benchmarks to score besides `data.test`. Their scores are called "pope/overall", "gqa/overall", ..."""
    gate: Gate = Gate()
    """Conditions for promotion."""
