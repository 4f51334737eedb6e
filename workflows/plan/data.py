"""How many packed rows a data set has: read from its manifest where it is prepared, else estimated from counts.

Estimates say where their counts come from. Counts of published sets are those of their files; tokens of text per record
are rounded means with the GPT-NeoX tokenizer's granularity (a token is about four letters) and may be off by a fifth.

The plan of a preparation stands on them: samples, rows, shards, bytes, and hours and memory by the number of nodes.
"""

import json
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean

from mlmamba.image_layout import ImageLayout, TokensPerImage
from mlmamba.images import WIDEST, image_size
from pipelines.config import DataConfig
from pipelines.manifest import Manifest
from pipelines.packed import PackedDataset
from pipelines.source_config import SourceBase
from pipelines.sources import open_source
from workflows.errors import UsageError
from workflows.recipe.schema import DataRecipe, Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import data_folder, layout_of
from workflows.train.initial import image_tokens

FILL = 0.97
"""Share of a packed row that is no padding, as pipelines/planner.py reaches it on lengths like LLaVA's."""


@dataclass(frozen=True)
class Published:
    """What is known of a source of records."""

    records: int
    images: float
    """Images per record."""
    text: int
    """Tokens of text per record, prompts and marks of the turns included."""
    loss: int
    """Of these, tokens with loss."""
    bytes: int = 100_000
    """Of one encoded image."""
    sizes: tuple[tuple[int, int], ...] = ((480, 640),)
    """Heights and widths of images, as many of each."""


# By the name of the file of records. blip_laion_cc_sbu_558k.json has 558,128 captions; llava_v1_5_mix665k.json has
# 665,298 conversations, 40,688 of them (ShareGPT's) without an image; LVIS-Instruct4V has 222,697. Bytes of an image:
# the size of the published archives over their files. Sizes of images are taken for those of the sets that they come
# from, and not counted: COCO's 640 x 480 for six of ten of the 665K, Visual Genome's 500 x 375 for three, a cover of a
# book for one; 448 x 336 for the 558K.
_MIXED = ((480, 640),) * 6 + ((375, 500),) * 3 + ((500, 325),)
PUBLISHED: dict[str, Published] = {
    "blip_laion_cc_sbu_558k.json": Published(558_128, 1.0, 32, 14, 48_000, ((336, 448),)),
    "llava_v1_5_mix665k.json": Published(665_298, 624_610 / 665_298, 330, 215, 150_000, _MIXED),
    "lvis_instruct4v_220k.json": Published(222_697, 1.0, 330, 280, 160_000),
}
LOOKING, _SIZES, _ROWS = 5.0, 32, 16
"""Seconds that a local corpus is looked at for, images whose size is, and rows of a prepared set whose images are."""
EASY_VQA = {"train": (4000, 38_575), "test": (1000, 9_673)}
"""Images and questions of the easy-vqa package, by split."""


@dataclass(frozen=True)
class Rows:
    """The training rows of one data set. `None` where nothing is known."""

    rows: int | None
    samples: int | None
    images: int | None
    tokens: int | None
    """Without padding."""
    loss_tokens: int | None
    bytes: int | None
    """Of the shards, which hold the encoded images."""
    estimated: bool
    how: str
    image_tokens: int = 0
    """Of one image, in the mean."""

    def as_dict(self) -> dict:
        return asdict(self)


def count_rows(
    data: DataConfig, folder: Path, tokens_per_image: TokensPerImage, given: dict[str, tuple[int, int | None]]
) -> Rows:
    """Rows of the training split.

    Args:
        folder: where the data set is or will be.
        given: records, and tokens of text per record if known, by the source's label; from --records.
    """
    layout = ImageLayout.of(tokens_per_image)
    with suppress(FileNotFoundError, ValueError):  # there is none, or one that will be made anew
        split = Manifest.load(str(folder)).splits["train"]
        size = sum(shard.bytes for shard in split.shards)
        counts = (split.rows, split.samples, split.images, split.tokens, split.loss_tokens, size)
        return Rows(*counts, False, "prepared", layout.fixed or _image_tokens(folder, layout))
    parts = [(source, _published(source, given.get(source.label)) or _look(source)) for source in data.train]
    missing = [source.label for source, part in parts if part is None]
    if missing:
        advice = f"--records {missing[0]}=COUNT, or prepare the data first"
        return Rows(None, None, None, None, None, None, True, f"nothing is known of {', '.join(missing)}: {advice}")
    samples = images = tokens = loss = size = shown = 0.0
    for source, part in parts:
        records = min(part.records, source.limit or part.records) * source.weight
        records *= 1 - source.validation
        of_image = layout.fixed or mean(layout.count(*sides) for sides in part.sizes)
        length = min(part.text + part.images * of_image, data.max_tokens)
        shown += records * part.images * of_image
        samples, images, tokens = samples + records, images + records * part.images, tokens + records * length
        loss, size = loss + records * part.loss, size + records * part.images * part.bytes
    rows = math.ceil(tokens / (data.max_tokens * FILL))
    size += 16 * rows * data.max_tokens  # ids, labels and boundaries
    how = ", ".join(f"{source.label} {part.records:,} records of {part.text} tokens of text" for source, part in parts)
    counts = (round(count) for count in (samples, images, tokens, loss, size))
    each = round(shown / images) if images else layout.fewest
    if layout.fixed is None:
        how += f", and images of {each} tokens"
    return Rows(rows, *counts, True, f"estimated from {how}", each)


def _image_tokens(folder: Path, layout: ImageLayout) -> int:
    """Tokens of an image of a prepared set, in the mean of its first rows."""
    dataset = PackedDataset(str(folder))
    shown = [image for row in range(min(_ROWS, len(dataset))) for image in dataset[row].images]
    sizes = (image_size(data, WIDEST) for data in shown)
    return round(mean(layout.count(height, width) for width, height in sizes)) if shown else layout.fewest


def parse_records(options: list[str]) -> dict[str, tuple[int, int | None]]:
    """--records LABEL=COUNT or LABEL=COUNTxTOKENS. Raises UsageError."""
    given = {}
    for option in options:
        label, mark, numbers = option.partition("=")
        count, _, tokens = numbers.partition("x")
        if not mark or not count.isdigit() or (tokens and not tokens.isdigit()) or not int(count):
            raise UsageError(
                f"--records {option}: write SOURCE=COUNT, or SOURCE=COUNTxTOKENS with the tokens of text per record"
            )
        given[label] = (int(count), int(tokens) if tokens else None)
    return given


def check_labels(given: dict[str, tuple[int, int | None]], sets: list[DataConfig]) -> None:
    """Raise UsageError when --records names a source that no data set has."""
    labels = {source.label for data in sets for source in data.train}
    if unknown := sorted(given.keys() - labels):
        raise UsageError(f"--records {unknown[0]}: the recipe's training sources are {', '.join(sorted(labels))}")


def _published(source: SourceBase, given: tuple[int, int | None] | None) -> Published | None:
    """What is known of a source: what the user gives, else what is published."""
    known = _known(source)
    if given is None:
        return known
    base = known or Published(0, 1.0, 100, 60)
    text = given[1] or base.text
    return Published(given[0], base.images, text, round(base.loss * text / base.text), base.bytes, base.sizes)


def _known(source: SourceBase) -> Published | None:
    if source.type == "easy_vqa":
        images, questions = EASY_VQA["test" if source.split == "test" else "train"]
        share = source.validation_images / images
        part = {"train": 1 - share, "validation": share, "test": 1.0}[source.split]
        each = questions / images  # a record is an image with all its questions, of 16 tokens with the answer
        return Published(round(images * part), 1.0, round(each * 16), round(each * 2), 2_000)
    file = getattr(source, "annotations", None) or getattr(source, "table", None) or ""
    return PUBLISHED.get(Path(str(file)).name)


def _look(source: SourceBase) -> Published | None:
    """The counts of a corpus of one's own, listed here; None where its files are far away, missing or many."""
    paths = [getattr(source, name) for name in source.PATHS]
    paths = [path for given in paths if given for path in (given if isinstance(given, list) else [given])]
    if not paths or any("://" in path for path in paths):
        return None
    return _listed(type(source), source.model_copy(update={"limit": None, "weight": 1.0}).model_dump_json())


@lru_cache
def _listed(kind: type[SourceBase], fields: str) -> Published | None:
    config = kind.model_validate_json(fields)
    until, records, images, letters, said, turns, sizes, sides = time.monotonic() + LOOKING, 0, 0, 0, 0, 0, [], []
    try:
        source = open_source(config)
        for record in source.records():
            if time.monotonic() > until:
                return None
            if record.problem:
                continue
            records, images, turns = records + 1, images + len(record.images), turns + len(record.turns)
            letters += sum(len(turn.text) for turn in record.turns)
            said += sum(len(turn.text) for turn in record.turns if turn.role == "assistant")
            with suppress(OSError, ValueError):  # a missing image is the preparation's to tell
                for name in record.images[: _SIZES - len(sizes)]:
                    data = source.read_image(name)
                    sizes.append(len(data))
                    sides.append(image_size(data, WIDEST)[::-1])
    except (OSError, ValueError):
        return None
    if not records:
        return None
    text, loss = (letters / 4 + 3 * turns) / records, (said / 4 + turns / 2) / records
    size = round(mean(sizes or [Published.bytes]))
    seen = tuple(sides) or Published.sizes
    return Published(records, images / records, math.ceil(text), math.ceil(loss), size, seen)


# Entries with `<image>` added: GPT-NeoX-20B has 50,277 (paper, section 1.5 of its code: rows 50,288 after rounding up).
# Granite's 100,352 are those of its checkpoints' embedding, so that `<image>` is the first row behind them.
KNOWN = {"EleutherAI/gpt-neox-20b": 50_278, "ibm-granite/granite-4.0-h-350m": 100_353}


@dataclass(frozen=True)
class Vocabulary:
    """Stands for a tokenizer where only its size counts."""

    size: int
    eos_token_id: int = 0
    pad_token_id: int = 0

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, token: str) -> int:
        """The last id, which `<image>` has when it was added."""
        return self.size - 1


def vocabulary_of(data: DataConfig, folder: Path) -> tuple[Vocabulary, str]:
    """The vocabulary of a data set, and where its size comes from.

    Args:
        folder: the data set's; its tokenizer counts if it is prepared.
    """
    for file, origin in ((folder / "tokenizer" / "tokenizer.json", "prepared"), (_local(data), "tokenizer.json")):
        if file is not None and file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            ids = [*content["model"]["vocab"].values(), *(entry["id"] for entry in content.get("added_tokens", ()))]
            entries = len(set(ids))
            image = any(entry["content"] == "<image>" for entry in content.get("added_tokens", ()))
            return Vocabulary(entries if image else entries + 1), origin
    name = data.tokenizer.name
    if name in KNOWN:
        return Vocabulary(KNOWN[name]), f"known size of {name}"
    if name is None:
        return Vocabulary(data.tokenizer.train_vocab_size), "train_vocab_size; a small corpus gives fewer"
    return Vocabulary(KNOWN["EleutherAI/gpt-neox-20b"]), f"taken for GPT-NeoX's, because {name} is not prepared yet"


def _local(data: DataConfig) -> Path | None:
    return Path(data.tokenizer.name, "tokenizer.json") if data.tokenizer.name else None


def plan_data(
    recipe: Recipe | DataRecipe, storage: Folder, given: dict[str, tuple[int, int | None]], node_cpus: int
) -> dict:
    """One entry per data set, as JSON-able data.

    Args:
        given: counts by source, see `count_rows`.
        node_cpus: CPUs of one node.

    Raises:
        UsageError: a number makes no sense.
    """
    if node_cpus < 1:
        raise UsageError(f"--node-cpus {node_cpus} must be 1 or more")
    if isinstance(recipe, DataRecipe):
        tokens = recipe.tokens_per_image
        sets = {data_folder(storage, recipe.data, recipe.name, tokens, recipe.seed): recipe.data}
    else:
        tokens = image_tokens(recipe.model)
        layout = layout_of(recipe, storage, tokens)
        sets = {layout.data[stage.name]: recipe.data_of(stage) for stage in recipe.train.stages}
    check_labels(given, list(sets.values()))
    return {"data": [_plan_one(folder, data, tokens, given, node_cpus) for folder, data in sets.items()]}


def _plan_one(
    folder: Folder, data: DataConfig, tokens: TokensPerImage, given: dict[str, tuple[int, int | None]], node_cpus: int
) -> dict:
    rows = count_rows(data, folder.local, tokens, given)
    plan = {"folder": folder.shown, "rows": rows.as_dict(), "max_tokens": data.max_tokens, "shards": None}
    if rows.rows is not None:
        # A packing task holds the rows of one shard, images included (DataConfig.shard_rows).
        task = rows.bytes // rows.rows * min(data.shard_rows, rows.rows)
        plan |= {"shards": math.ceil(rows.rows / data.shard_rows), "task_bytes": task}
        # The tokenized records lie in the work folder, with their images, until the shards are whole.
        plan |= {"disk": {"shards": rows.bytes, "work": rows.bytes, "total": 2 * rows.bytes}}
        plan |= {"node_cpus": node_cpus, "nodes": plan_nodes(rows, task, node_cpus)}
    return plan


NODES = (1, 2, 4, 8, 16)
"""Numbers of nodes that a plan has a line for; the pools of cluster/ grow to the last."""
DRIVER_SECONDS = 15e-6
"""A record, in one process: 4 µs in the driver, 7 in the task that cuts a list, 4 in the one that plans a million."""
RECORD_SECONDS = 2.3e-3
BYTE_SECONDS = 12e-9
WORKER_BYTES = 256 << 20
TASK_FACTOR = 2.0
PASSES = 4


def plan_nodes(rows: Rows, shard_bytes: int, cpus: int) -> list[dict]:
    """One entry for each number of nodes, as JSON-able data.

    Args:
        rows: what is prepared; its counts are known.
        shard_bytes: of the largest shard.
        cpus: of one node.
    """
    driver = DRIVER_SECONDS * rows.samples
    workers = RECORD_SECONDS * rows.samples + BYTE_SECONDS * rows.bytes
    memory = cpus * (WORKER_BYTES + round(TASK_FACTOR * shard_bytes))
    plans = []
    for nodes in NODES:
        seconds = driver + workers / (nodes * cpus)
        traffic = PASSES * rows.bytes / seconds
        plans.append({"nodes": nodes, "hours": seconds / 3600, "node_memory": memory, "bytes_per_second": traffic})
    return plans
