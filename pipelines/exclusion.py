"""The images of the evaluation sets, which no training record may show: their digests, taken on Ray.

The images of the `validation` split are known from pass 1; those of the other sets are read here, once: a killed run
goes on where it was. Every one must be readable, because an image that is not compared is not kept out.
"""

import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from mlmamba.images import WIDEST, open_image
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.execution import run_tasks
from pipelines.fragments import SourceCut, partitions
from pipelines.looks import all_fields, keys
from pipelines.progress import ProgressMeter
from pipelines.records import Partition
from pipelines.schema import IMAGES, IMAGES_WITH_LOOKS, WORK_VERSION, digest
from pipelines.tokenize import iter_outcomes, worker_source

_DIGEST_KEY, _RECORDS_KEY, _SETS_KEY = b"mlmamba.digest", b"mlmamba.records", b"mlmamba.sets"


class ExclusionError(RuntimeError):
    """An evaluation set cannot be compared with; the message says why and what to do."""


class Excluded:
    """Digests of the images of evaluation sets."""

    def __init__(self):
        self._set_of: dict[bytes, int] = {}
        self.counts: dict[str, int] = {}
        """Images by evaluation set, each counted once."""
        self.keys: list[bytes] = []
        """What images look like (looks.py), where they are compared by it."""
        self.twins: list[tuple[int, str]] = []
        """Of each of `keys`: place of its set in `counts`, and the image's name."""

    def __bool__(self) -> bool:
        return bool(self._set_of)

    def add(self, name: str, images: pa.Array | pa.ChunkedArray) -> None:
        """Add digests of a set. An image of several sets counts for the first."""
        self.counts.setdefault(name, 0)
        number = list(self.counts).index(name)
        for image in images.unique().to_pylist():
            if image not in self._set_of:
                self._set_of[image] = number
                self.counts[name] += 1

    def add_looks(self, name: str, looks: list[bytes], names: list[str]) -> None:
        """Add what images of a set look like, after `add`; those without contrast are left out."""
        number = list(self.counts).index(name)
        known = [(key, (number, twin)) for key, twin in zip(looks, names, strict=True) if key]
        self.keys += [key for key, _ in known]
        self.twins += [twin for _, twin in known]

    def twin(self, place: int) -> tuple[str, str]:
        """The name of an image of `keys`, and its set."""
        number, name = self.twins[place]
        return name, list(self.counts)[number]

    def find(self, images: pa.Array) -> list[tuple[int, str]]:
        """Places within an array of digests that are in a set, and that set."""
        names = list(self.counts)
        found = enumerate(map(self._set_of.get, images.to_pylist()))
        return [(place, names[number]) for place, number in found if number is not None]

    def save(self, uri: str) -> None:
        """Write the digests, for `load`."""
        columns = [pa.array(self._set_of, IMAGES.field("image").type), pa.array(self._set_of.values(), pa.int32())]
        schema = IMAGES.append(pa.field("set", pa.int32())).with_metadata({_SETS_KEY: json.dumps(list(self.counts))})
        storage.write_table(uri, pa.Table.from_arrays(columns, schema=schema))

    @classmethod
    def load(cls, uri: str) -> "Excluded":
        """The digests that `save` wrote, without looks."""
        table, excluded = storage.open_arrow(uri).read_all(), cls()
        excluded.counts = dict.fromkeys(json.loads(table.schema.metadata[_SETS_KEY]), 0)
        excluded._set_of = dict(zip(table["image"].to_pylist(), table["set"].to_pylist(), strict=True))
        return excluded


def read_excluded(
    config: DataConfig, validation: Iterable[str], cuts: dict[str, SourceCut], work: str, on_progress
) -> Excluded:
    """The digests of all evaluation sets of a config.

    Args:
        config: of the data set.
        validation: names of the partitions of its validation split, tokenized.
        cuts: of the evaluation sets, by their names.
        work: folder of the partitions' files.
        on_progress: as for `prepare`.

    Raises:
        ExclusionError: a set has records or images that cannot be read.
        FileNotFoundError: a set is not there.
    """
    excluded = Excluded()
    split = {source.label for source in config.train if source.validation}  # never on both sides
    if config.exclude_evaluation_images or split:
        columns = ["record_id", "looks"] if config.compares_looks else []
        for _, outcomes in iter_outcomes(validation, work, ["source", "digests", *columns]):
            for source in outcomes["source"].unique().to_pylist():
                if not config.exclude_evaluation_images and source not in split:
                    continue
                own = outcomes.filter(pc.equal(outcomes["source"], source))
                excluded.add(f"validation/{source}", own["digests"].combine_chunks().flatten())
                if columns:
                    shown = zip(own["record_id"].to_pylist(), own["looks"].to_pylist(), strict=True)
                    pairs = [(key, name) for name, found in shown for key in found or ()]
                    excluded.add_looks(
                        f"validation/{source}", *map(list, zip(*pairs, strict=True) if pairs else ([], []))
                    )
    settings = f"{WORK_VERSION} looks" if config.compares_looks else str(WORK_VERSION)
    names, tasks, size = {}, [], 0
    for number, (name, cut) in enumerate(cuts.items()):
        for partition in partitions(f"excluded{number}", [cut], settings):
            names[partition.name] = name
            size += partition.records or 0
            tasks.append(
                {
                    "partition": partition.to_json(),
                    "images": storage.join(work, "images", f"{partition.name}.arrow"),
                    "source": cut.config.absolute().model_dump_json(),
                    "looks": config.compares_looks,
                }
            )
    if not tasks:
        return excluded
    known = all(cut.records is not None for cut in cuts.values())
    meter = ProgressMeter("exclude", "records", on_progress, size if known else None)
    for result in run_tasks(digest_images, tasks, "Exclude"):
        if result["problem"]:
            raise ExclusionError(
                f"{names[result['name']]}: {result['problem']}. Its images must all be read to keep them out of "
                "training: repair it, or leave the set out (exclude_evaluation_images: false, exclude_images_of)"
            )
        meter.add(result["size"], skipped=result["size"] if result["skipped"] else 0)
    for name, task in zip(names.values(), tasks, strict=True):
        table = storage.open_arrow(task["images"]).read_all()
        excluded.add(name, table["image"])
        if task["looks"]:
            excluded.add_looks(name, table["looks"].to_pylist(), table["name"].to_pylist())
    return excluded


def digest_images(task: dict) -> dict:
    """Write the digests of the images of a partition of an evaluation set. Runs inside a Ray task."""
    partition = Partition.from_json(task["partition"])
    result = {"name": partition.name, "size": 0, "problem": None}
    metadata = {_DIGEST_KEY: partition.digest}
    if storage.exists(task["images"]):
        written = storage.open_arrow(task["images"]).schema.metadata or {}
        if written.get(_DIGEST_KEY) == partition.digest.encode():
            return result | {"size": int(written[_RECORDS_KEY]), "skipped": True}
    source, rows = worker_source(task["source"]), []
    for record in partition.read(source):
        result["size"] += 1
        if record.problem:
            return result | {"problem": f"record {record.id}: {record.problem.reason}: {record.problem.detail}"}
        for location in record.images:
            try:
                data = source.read_image(location)
                row = {"image": digest(data)}
                if task["looks"]:
                    row |= {"looks": all_fields(open_image(data, WIDEST, reduced=True)), "name": record.id}
                rows.append(row)
            except (OSError, ValueError) as error:
                return result | {"problem": f"record {record.id}: {location}: {error}"}
    if task["looks"]:
        rows = [row | {"looks": key} for row, key in zip(rows, keys([row["looks"] for row in rows]), strict=True)]
    metadata[_RECORDS_KEY] = str(result["size"])
    schema = (IMAGES_WITH_LOOKS if task["looks"] else IMAGES).with_metadata(metadata)
    storage.write_table(task["images"], pa.Table.from_pylist(rows, schema))
    return result | {"skipped": False}
