"""Benchmarks by name, each a class in a file of its own that reads the published files and scores by the protocol."""

from importlib import import_module

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import Benchmark, Item

__all__ = ["NAMES", "Benchmark", "Item", "benchmark_class", "open_benchmark"]

# name -> (module, class). Imported on use.
_CLASSES = {
    "vqav2": ("vqav2", "VQAv2"),
    "gqa": ("gqa", "GQA"),
    "vizwiz": ("vqav2", "VizWiz"),
    "textvqa": ("textvqa", "TextVQA"),
    "pope": ("pope", "POPE"),
    "vsr": ("vsr", "VSR"),
    "llava": ("own_data", "Llava"),
    "shards": ("own_data", "Shards"),
    "recipe": ("own_data", "TestSources"),
}
NAMES = tuple(name for name in _CLASSES if name != "recipe")
"""What --benchmark takes."""


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a benchmark.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _CLASSES:
        raise UsageError(f"there is no benchmark {name!r}; choose one of {', '.join(NAMES)}")
    module, found = _CLASSES[name]
    return getattr(import_module(f"workflows.evaluate.benchmarks.{module}"), found)


def open_benchmark(
    name: str, data: str, images: str | None = None, split: str | None = None, questions: int | None = None
) -> Benchmark:
    """Read a benchmark's files.

    Args:
        name: one of NAMES.
        data: its folder, path or URI.
        images: where its images are, if not in a usual place below `data`: a folder or a zip.
        split: for benchmarks that have several.
        questions: how many questions the files have, where that is not what was published.

    Raises:
        UsageError: the name or the split is unknown, a file is missing or of another version.
        WorkflowError: question ids repeat, or questions and answers do not belong together.
    """
    if name not in NAMES:
        raise UsageError(f"there is no benchmark {name!r}; choose one of {', '.join(NAMES)}")
    return benchmark_class(name)(data, images, split, questions)
