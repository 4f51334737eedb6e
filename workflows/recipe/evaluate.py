"""The recipe's evaluation and the gate before promotion."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.config import StrictModel
from pipelines.identity import Decides


class Gate(StrictModel):
    """Conditions on scores by name: "overall", a question type, "margin_over_blind", or another score of the
    evaluation. All must hold. The gate is stored with the version, so promotion needs no recipe."""

    least: dict[str, float] = Field(default_factory=dict)
    """Least value."""
    most: dict[str, float] = Field(default_factory=dict)
    """Greatest value, for scores where less is better."""
    margin: dict[str, float] = Field(default_factory=dict)
    """How much worse than the version that holds the alias the score may be: 0.01 allows 0.90 where it has 0.91, 0
    allows no loss. Nothing is compared while no version holds the alias."""

    @model_validator(mode="before")
    @classmethod
    def _say_where_thresholds_go(cls, content):
        flat = {k: v for k, v in content.items() if k not in cls.model_fields} if isinstance(content, dict) else {}
        if flat:
            names = ", ".join(f"{name}: {value}" for name, value in flat.items())
            raise ValueError(f"thresholds go under least: write gate: {{least: {{{names}}}}}")
        return content

    @model_validator(mode="after")
    def _possible(self):
        for name, allowed in self.margin.items():
            if allowed < 0:
                raise ValueError(f"margin.{name} = {allowed}: how much worse a score may be is 0 or more")
        for name in self.least.keys() & self.most.keys():
            if self.least[name] > self.most[name]:
                raise ValueError(f"{name}: least = {self.least[name]} is over most = {self.most[name]}")
        return self


class RegisterRecipe(StrictModel):
    """Where the finished model goes in the MLflow registry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Registered model name."""
    alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]*$")
    """Alias that moves to the new version when the gate holds."""


class BenchmarkRecipe(StrictModel):
    """One published benchmark, as `mlmamba evaluate --benchmark` takes it."""

    name: Literal["vqav2", "gqa", "vizwiz", "textvqa", "pope", "vsr", "llava", "shards"]
    """Its name."""
    data: str
    """Folder of its published files, path or URI."""
    images: str | None = None
    """Folder or zip of its images, where they are not in a usual place below `data`."""
    split: str | None = None
    """For benchmarks with several: vsr's zeroshot or random, the validation or train of shards."""
    questions: int | None = Field(None, gt=0)
    """How many questions the files have, where that is not what was published."""


class EvaluateRecipe(StrictModel):
    """How the test sources are scored."""

    RENAMED: ClassVar[dict[str, str]] = {"batch_pictures": "batch_images"}

    workers: int = Field(1, gt=0)
    """Processes that answer questions."""
    cpus_per_worker: int = Field(1, gt=0)
    """CPU cores, and torch threads, of one process."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of one process; a half lets two share one."""
    batch_images: int = Field(16, gt=0)
    """Images in one batch, with all their questions. Changes speed only."""
    batch_questions: int = Field(64, gt=0)
    """Most questions in one forward pass. Changes speed and memory only."""
    precision: Annotated[Literal["auto", "bf16", "fp32", "int8"], Decides.WHEN_SET] = "auto"
    """What the answering model computes in: bf16, fp32 or, on a CPU, int8; `auto` is bf16 where `gpus_per_worker` gives
    it a GPU."""
    exact: Annotated[bool, Decides.WHEN_SET] = False
    """Answers have the same bits whatever the batches, and as those of a service that is exact: a pure Mamba-2 model on
    CPUs with a C++ compiler; elsewhere the log says that they are not."""
    max_new_tokens: int = Field(8, gt=0)
    """Longest answer to the test sources in tokens; benchmarks have their own."""
    benchmarks: list[BenchmarkRecipe] = Field(default=[])
    """Published benchmarks to score besides `data.test`. Their scores are called "pope/overall", "gqa/overall", ..."""
    gate: Gate = Gate()
    """Conditions for promotion."""
