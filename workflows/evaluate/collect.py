"""Asking a model every item on Ray workers, with its own image (seeing) and with another one (blind).

Answers are written per batch under the items' ids, so a killed evaluation goes on where it stopped, with whatever batch
size or number of workers. Items about one image are asked together: the model reads the image once.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import ray
import ray.data
from ray.exceptions import RayError

from mlmamba.conversation import Turn, clean
from mlmamba.images import WIDEST, ImageError, open_image
from mlmamba.processing import MLMambaProcessor, PromptTooLong
from pipelines.execution import ensure_ray, quiet_ray_data
from pipelines.storage import write_atomic
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, Item, ids_text
from workflows.evaluate.questions import open_store
from workflows.train.trainer import Crew, CrewLost

OnProgress = Callable[[int, int], None]
SEEING, BLIND = "seeing", "blind"


@dataclass(frozen=True)
class Workers:
    """How questions are spread, which changes speed only, and how they are answered."""

    workers: int = 1
    """Processes, each with a copy of the model."""
    cpus_per_worker: int = 1
    """CPU cores, and torch threads, of one process."""
    gpus_per_worker: float = 0
    """GPUs of one process."""
    batch_images: int = 16
    """Images in one batch, with all their questions."""
    batch_questions: int = 64
    """Most questions in one forward pass."""
    precision: str = "auto"
    """As `load_model` takes it (mlmamba/loading.py)."""
    exact: bool = False
    """The same bits whatever the batches, as `load_model` takes it."""

    @property
    def taken_precision(self) -> str:
        """The precision of the answers: `auto` is bf16 where the workers have GPUs."""
        if self.precision == "auto" or (self.precision == "int8" and self.gpus_per_worker):
            return "bf16" if self.gpus_per_worker else "fp32"
        return self.precision

    @property
    def computes_in(self) -> str:
        """What decides the bits of answers: their precision, and whether they are exact."""
        return f"{self.taken_precision}, exact" if self.exact else self.taken_precision


def collect(
    benchmark: Benchmark,
    model: Path,
    folder: Path,
    how: Workers,
    max_new_tokens: int,
    others: dict[str, tuple[int, str]],
    progress: OnProgress,
    crew: Crew | None = None,
) -> dict[str, dict[str, dict]]:
    """Ask what was not asked before. Returns, by mode and item id, the reply, or {"error": why there is none}.

    Args:
        folder: for the parts; the same for the same model, items, other images and length of answers only.
        others: from `blind_images`.
        progress: called with batches done and in all.
        crew: training workers that are there already, and can answer as they are.

    Raises:
        WorkflowError: an item was answered twice, by runs at the same time; or a worker failed.
    """
    known = read_parts(folder)
    askable = [item for item in benchmark.items if item.id not in benchmark.missing]
    wanted = {
        SEEING: {item: (item.source, item.image) for item in askable},
        BLIND: {item: others[item.id] for item in askable if item.id in others},
    }
    tasks = []
    for mode, shown in wanted.items():
        todo = {item: at for item, at in shown.items() if "text" not in known.get((mode, item.id, *at), {})}
        tasks += _tasks(mode, todo, folder, how.batch_images)
    progress(0, len(tasks))
    if tasks:
        _run(tasks, str(model), benchmark, how, max_new_tokens, progress, crew)
        known = read_parts(folder)
    return {
        mode: {item.id: reply for item, at in shown.items() if (reply := known.get((mode, item.id, *at)))}
        for mode, shown in wanted.items()
    }


def _run(
    tasks: list[dict],
    model: str,
    benchmark: Benchmark,
    how: Workers,
    max_new_tokens: int,
    progress: OnProgress,
    crew: Crew | None,
) -> None:
    setup = json.dumps(
        {
            "model": model,
            "stores": benchmark.stores,
            "max_new_tokens": max_new_tokens,
            "threads": how.cpus_per_worker,
            "choices": benchmark.choices,
            "batch_questions": how.batch_questions,
            "precision": how.taken_precision,
            "exact": how.exact,
        }
    )
    try:
        done = _run_on_crew(tasks, setup, how, progress, crew) if crew is not None and crew.started else set()
        if left := [task for task in tasks if task["file"] not in done]:
            _run_on_ray_data(left, setup, how, progress)
    except (RayError, _Failed) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise WorkflowError(
            f"{benchmark.name}: a worker failed: {reason}. What was answered is kept: run again to go on"
        ) from error


def _run_on_ray_data(tasks: list[dict], setup: str, how: Workers, progress: OnProgress) -> None:
    # Ray ends a task's process after each task that has a GPU, so there the model is an actor's. Elsewhere tasks do,
    # and leave the CPUs to others between batches.
    ways = {"fn": _Worker, "fn_constructor_args": (setup,)} if how.gpus_per_worker else {"fn": _answer_part}
    ensure_ray()
    with quiet_ray_data():
        rows = [{"task": json.dumps(task), "setup": setup} for task in tasks]
        finished = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            **ways,
            num_cpus=how.cpus_per_worker,
            num_gpus=how.gpus_per_worker or None,
            concurrency=min(how.workers, len(tasks)),
        )
        progress(0, len(tasks))  # the first answer comes after Ray's workers have loaded the model
        for done, _ in enumerate(finished.iter_rows(), start=1):
            progress(done, len(tasks))


class _Failed(Exception):
    """A training worker could not answer."""


def _run_on_crew(tasks: list[dict], setup: str, how: Workers, progress: OnProgress, crew: Crew) -> set[str]:
    """Let training workers answer. Returns the files of what they did: what a crew that died leaves, others can do."""
    answered: set[str] = set()

    def count(event: dict) -> None:
        if event["event"] == "answered":
            answered.add(event["file"])
            progress(len(answered), len(tasks))

    texts = tuple(json.dumps(task) for task in tasks)
    try:
        outcome = crew.run(AnswerJob(setup, texts, how.workers), "the evaluation", count, again=False)
    except CrewLost:
        return answered
    if "failed" in outcome:
        raise _Failed(outcome["failed"])
    return {task["file"] for task in tasks}


@dataclass(frozen=True)
class AnswerJob:
    """Batches for training workers: each takes every so many-th, and loads the model from its folder for them."""

    setup: str
    tasks: tuple[str, ...]
    workers: int
    """How many of them answer at most."""

    def run(self, rank: int, world: int, tell: Callable[[dict], object]) -> dict:
        """Answer this worker's share.

        An error is told and not raised: Ray Train would take it for a failed training and start anew.
        """
        share = self.share(rank, world)
        try:
            worker = _Worker(self.setup) if share else None
            for task in share:
                worker({"task": task})
                tell({"event": "answered", "file": json.loads(task)["file"]})
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}
        return {}

    def share(self, rank: int, world: int) -> tuple[str, ...]:
        """The batches that a worker answers."""
        return self.tasks[rank :: min(world, self.workers)] if rank < self.workers else ()


def read_parts(folder: Path) -> dict[tuple, dict]:
    """What has been asked, by mode, item id, and source and location of the image that was shown.

    Raises:
        WorkflowError: an item has two different answers to one image.
    """
    found: dict[tuple, dict] = {}
    twice: list[str] = []
    for file in sorted((folder / "parts").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            reply = json.loads(line)
            key = tuple(reply.pop(name) for name in ("mode", "id", "source", "image"))
            before = found.get(key, {})
            # Equal answers are no harm: a batch of a stopped evaluation may still end while the next one asks.
            if "text" in before and "text" in reply and before["text"] != reply["text"]:
                twice.append(key[1])
            found[key] = before if "text" in before else reply
    if twice:
        raise WorkflowError(
            f"{ids_text(twice, 'items')} were answered twice, and differently: two evaluations ran into {folder} at "
            "the same time; delete it and run one"
        )
    return found


def blind_images(items: Iterable[Item], seed: int) -> dict[str, tuple[int, str]]:
    """For each item with an image, another image of the benchmark: (source, location) by id.

    The choice depends on the images and the seed, not on the order of the items. Empty for a single image.
    """
    items = [item for item in items if item.image is not None]
    images = sorted({(item.source, item.image) for item in items})
    if len(images) < 2:
        return {}
    other = {images[i]: images[j] for i, j in enumerate(derangement(len(images), seed))}
    return {item.id: other[item.source, item.image] for item in items}


def derangement(count: int, seed: int) -> list[int]:
    """A permutation that leaves nothing in place, so that every blind question gets another image."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    place = {value: i for i, value in enumerate(order)}
    return [order[(place[i] + 1) % count] for i in range(count)]


def _tasks(mode: str, shown: dict[Item, tuple], folder: Path, batch_images: int) -> Iterator[dict]:
    """Descriptions of batches: the items of some images, in the order in which the images first come."""
    groups: dict[tuple, list[Item]] = {}
    for item, shown_image in shown.items():
        groups.setdefault(shown_image if shown_image[1] is not None else (*shown_image, item.id), []).append(item)
    images = list(groups.items())
    for first in range(0, len(images), batch_images):
        batch = [
            {"source": source, "image": image, "ids": [i.id for i in asked], "prompts": [i.prompt for i in asked]}
            for (source, image, *_), asked in images[first : first + batch_images]
        ]
        name = hashlib.sha256(json.dumps([(one["image"], one["ids"]) for one in batch]).encode()).hexdigest()[:24]
        yield {"mode": mode, "file": str(folder / "parts" / f"{mode}-{name}.jsonl"), "images": batch}


class _Worker:
    """What one process answers with: the model and the places of the images, opened once."""

    def __init__(self, setup: str):
        from mlmamba.answering import Answerer  # torch, which the driver does without

        content = json.loads(setup)
        self._stores = [open_store(store) for store in content["stores"]]
        self._answerer = Answerer(
            content["model"],
            content["max_new_tokens"],
            content["threads"],
            content["choices"] and tuple(content["choices"]),
            content["batch_questions"],
            content["precision"],
            content["exact"],
        )

    def __call__(self, row: dict) -> dict:
        """Answers one batch and writes it, whole or not at all. An image that cannot be used is no answer."""
        task = json.loads(row["task"])
        lines: list[dict] = []
        loaded = [(one, data) for one in task["images"] if (data := self._load(one, lines)) is not _BAD]
        try:
            groups = self._reply(loaded)
        except (ImageError, PromptTooLong):  # rare, so images are read once more only to find which
            loaded = [(fits, data) for one, data in loaded if (fits := self._askable(one, data, lines))]
            groups = self._reply(loaded)
        for (one, _), group in zip(loaded, groups, strict=True):
            lines += [_line(one, key, **asdict(reply)) for key, reply in zip(one["ids"], group, strict=True)]
        text = "".join(json.dumps({"mode": task["mode"], **line}, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(Path(task["file"]), text)
        return {"answered": len(lines)}

    def _load(self, one: dict, lines: list[dict]) -> bytes | None:
        """The image's file; None for text alone, _BAD when it cannot be read, which goes to `lines`."""
        try:
            return None if one["image"] is None else self._stores[one["source"]].read(one["image"])
        except (OSError, ValueError) as error:
            lines += _unread(one, error)
            return _BAD

    def _askable(self, one: dict, data: bytes | None, lines: list[dict]) -> dict | None:
        """What can be asked about an image, None where that is nothing; why the rest cannot goes to `lines`."""
        from mlmamba.answering import Asked

        try:
            bad = self._answerer.too_long(Asked(data, one["prompts"]))
            if data is not None:
                open_image(data, WIDEST)
        except ImageError as error:
            lines += _unread(one, error)
            return None
        lines += [_line(one, one["ids"][number], error=str(error)) for number, error in bad.items()]
        fits = [number for number in range(len(one["ids"])) if number not in bad]
        return one | {name: [one[name][number] for number in fits] for name in ("ids", "prompts")} if fits else None

    def _reply(self, loaded: list[tuple[dict, bytes | None]]) -> list:
        from mlmamba.answering import Asked

        return self._answerer.reply([Asked(data, one["prompts"]) for one, data in loaded]) if loaded else []


def _answer_part(row: dict) -> dict:
    """Ray Data task: answers one batch."""
    return _open_worker(row["setup"])(row)


@lru_cache(maxsize=1)
def _open_worker(setup: str) -> _Worker:
    """This process's worker, made by its first task."""
    return _Worker(setup)


_BAD = b"cannot be read"


def _unread(one: dict, error: Exception) -> list[dict]:
    return [_line(one, key, error=f"image {one['image']}: {error}") for key in one["ids"]]


def _line(one: dict, key: str, **reply) -> dict:
    return {"id": key, "source": one["source"], "image": one["image"], **reply}


_AT_ONCE = 1000


def bad_prompts(processor: MLMambaProcessor, items: Sequence[Item]) -> dict[str, str]:
    """Why items cannot be asked, by id: the prompt is empty, or longer than the model takes even with the smallest
    image. Whoever asks has the image, and looks at its size (`Answerer.too_long`)."""
    bad = {item.id: "the question is empty" for item in items if not clean(item.question)}
    fine = [item for item in items if item.id not in bad]
    for first in range(0, len(fine), _AT_ONCE):
        some = fine[first : first + _AT_ONCE]
        texts = [processor.prompt([Turn("user", i.prompt, images=int(i.image is not None))]) for i in some]
        rows = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for item, row in zip(some, rows, strict=True):
            length = len(row) + (item.image is not None) * (processor.layout.fewest - 1)
            if length > processor.max_length:
                bad[item.id] = f"the prompt has {length:,} tokens, over the model's {processor.max_length:,}"
    return bad
