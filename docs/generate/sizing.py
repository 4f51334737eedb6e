"""The sizing page: what `--dry-run` says of the paper's recipe and of ten times its data, and a table of it."""

import shlex
from dataclasses import dataclass
from functools import cache

from docs.generate.schema import GENERATED, table
from workflows.cli import parse
from workflows.console import duration
from workflows.plan.train import GIB
from workflows.recipe.load import load_recipe

STORAGE = "/storage"
PUBLISHED = {"llava-558k": 558_128, "llava-665k": 665_298}
"""Records of the recipe's sources."""
POOL_GPUS = 8
"""GPUs of one machine of the GPU pools in cluster/."""

CAUTIOUS = 0.1
"""Share of the peak for the second column of hours; what the paper's own hours come to (how-to/size-a-cluster.md)."""

_INTRODUCTION = """\
What `mlmamba prepare --dry-run` and `mlmamba train --dry-run` say of [the paper's
recipe](recipe.md#shipped-recipes), and of the same with ten times the records. Nothing was run at this size here: these
are the formulas' figures. [Size a cluster](../how-to/size-a-cluster.md) has the formulas, which of them were measured,
and how to get these figures for a recipe of your own."""


@dataclass(frozen=True)
class Scale:
    """One amount of data and one number of training workers."""

    title: str
    times: int
    workers: int

    @property
    def options(self) -> list[str]:
        """Of the command line, for the amount of data."""
        if self.times == 1:
            return []
        return [word for name, count in PUBLISHED.items() for word in ("--records", f"{name}={self.times * count}")]

    def command(self, verb: str) -> list[str]:
        """The command line after `mlmamba`."""
        changes = []
        if verb == "train" and self.workers != POOL_GPUS:  # a step has as many rows, so each worker runs fewer at once
            rows = [stage.micro_batch_rows * POOL_GPUS // self.workers for stage in load_recipe("paper").train.stages]
            changes = [f"train.workers={self.workers}"]
            changes += [f"train.stages.{i}.micro_batch_rows={count}" for i, count in enumerate(rows)]
        sets = [word for change in changes for word in ("--set", change)]
        return [verb, "paper", "--dry-run", "--storage", STORAGE, *sets, *self.options]

    def plan(self, verb: str) -> dict:
        """What the command returns."""
        return _planned(tuple(self.command(verb)))


SCALES = (
    Scale("the paper's data", 1, POOL_GPUS),
    Scale("ten times its data", 10, POOL_GPUS),
    Scale("ten times its data, two GPU machines", 10, 2 * POOL_GPUS),
)


GRANITE = {
    "all of the language model, 8 GPUs of 80 GB": ["granite-h"],
    "all of the language model, one GPU of 24 GB": [
        *("granite-h", "--set", "train.workers=1", "--set", "train.zero_stage=0"),
        *("--set", "train.stages.0.micro_batch_rows=2", "--set", "train.stages.1.micro_batch_rows=2"),
    ],
    "LoRA, one GPU of 24 GB": ["granite-h-lora"],
}
"""What is said of a hybrid with images at their own size."""
_SMALL = ["--gpu-memory", "24", "--peak-tflops", "165"]


def _granite() -> list[str]:
    parts = [
        "## Granite-4.0-H-350m with images at their own size",
        "[granite-h and granite-h-lora](recipe.md#shipped-recipes): SigLIP 2 at 64 to 1,024 tokens an image, on\n"
        "LLaVA's data, whose images are taken for the sizes that workflows/plan/data.py says. Not run here; 24 GB is\n"
        "reckoned with 165 TFLOP/s in bf16, the peak of an RTX 4090.",
    ]
    for title, words in GRANITE.items():
        command = ["train", words[0], "--dry-run", "--storage", STORAGE, *words[1:]]
        command += _SMALL if "24 GB" in title else []
        text, shown = _planned(tuple(command))["text"], shlex.join(["mlmamba", *command])
        for option in (" --set", " --gpu-memory"):
            shown = shown.replace(option, " \\\n   " + option)
        parts += [f"### {title[0].upper()}{title[1:]}", f"```sh\n{shown}\n```", f"```text\n{text}\n```"]
    return parts


def sizing_page() -> str:
    """The whole page."""
    amounts = [scale for scale in SCALES if scale.workers == POOL_GPUS]
    parts = [GENERATED, "# Sizing", _INTRODUCTION, "## By stage", _preparations(amounts), _stages(), _storages(amounts)]
    for verb, scales in (("prepare", amounts), ("train", SCALES)):
        for scale in scales:
            command = shlex.join(["mlmamba", *scale.command(verb)]).replace(" --records", " \\\n    --records")
            parts += [
                f"## {verb.capitalize()}: {scale.title}",
                f"```sh\n{command}\n```",
                f"```text\n{scale.plan(verb)['text']}\n```",
            ]
    return "\n\n".join([*parts, *_granite()]) + "\n"


def _preparations(scales: list[Scale]) -> str:
    head = ["prepare", "samples", "storage while it works", "afterwards", "memory of a node"]
    rows, counts = [], []
    for scale in scales:
        for name, data in zip(PUBLISHED, sorted(scale.plan("prepare")["data"], key=_samples), strict=True):
            nodes = data["nodes"]
            counts = [node["nodes"] for node in nodes]
            rows.append(
                [
                    f"{name}, {scale.title}",
                    f"{data['rows']['samples']:,}",
                    _gib(data["disk"]["total"]),
                    _gib(data["disk"]["shards"]),
                    _gib(nodes[0]["node_memory"]),
                    *(duration(3600 * node["hours"]) for node in nodes),
                ]
            )
    return table([*head, *(f"{count} node{'s' * (count > 1)}" for count in counts)], rows)


def _samples(data: dict) -> int:
    return data["rows"]["samples"]


def _stages() -> str:
    head = ["train", "GPUs", "machines", "steps", "operations", "memory of a GPU", "a checkpoint"]
    share = parse(SCALES[0].command("train")).mfu
    rows = []
    for scale in SCALES:
        plan = scale.plan("train")
        for stage in plan["stages"]:
            (state,) = [s for s in stage["memory"]["zero"] if s["zero_stage"] == plan["zero_stage"]]
            rows.append(
                [
                    f"{stage['stage']}, {scale.title}",
                    str(scale.workers),
                    str(scale.workers // POOL_GPUS),
                    f"{stage['steps']:,}",
                    f"{stage['flops']:.1e}",
                    _gib(state["with_activations"]),
                    _gib(stage["checkpoint_bytes"]),
                    duration(3600 * stage["hours"]),
                    duration(3600 * stage["hours"] * share / CAUTIOUS),
                ]
            )
    return table([*head, f"time at {share:.0%} of the peak", f"at {CAUTIOUS:.0%}"], rows)


def _storages(scales: list[Scale]) -> str:
    names = ("data", "models", "checkpoints", "registered", "total")
    rows = [[scale.title, *(_gib(scale.plan("train")["disk"][name]) for name in names)] for scale in scales]
    return table(["storage", *names], rows)


def _gib(size: int) -> str:
    return f"{size / GIB:,.0f} GiB"


@cache
def _planned(command: tuple[str, ...]) -> dict:
    arguments = parse([*command])
    return arguments.run(arguments)
