"""The images of the evaluation sets, which no training record may show: their digests, taken on Ray.

The images of the `validation` split are known from pass 1; those of the other sets are read here, once: a killed run
goes on where it was. Every one must be readable, because an image that is not compared is not kept out.
"""

import pyarrow as pa
import pyarrow.compute as pc

from mlmamba.images import WIDEST, open_image
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.execution import run_tasks
from pipelines.looks import all_fields, keys
from pipelines.progress import ProgressMeter
from pipelines.records import Partition, cut, read_records
from pipelines.schema import IMAGES, IMAGES_WITH_LOOKS, WORK_VERSION, digest
from pipelines.tokenize import iter_outcomes, worker_source

_DIGEST_KEY = b"mlmamba.digest"


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

    def find(self, images: pa.Array) -> list[tuple[int, int]]:
        """Places within an array of digests that are in a set, and the set's place in `counts`."""
        found = enumerate(map(self._set_of.get, images.to_pylist()))
        return [(place, number) for place, number in found if number is not None]


def read_excluded(config: DataConfig, partitions: list[Partition], work: str, on_progress) -> Excluded:
    """The digests of all evaluation sets of a config.

    Args:
        config: of the data set.
        partitions: of all its splits, tokenized.
        work: folder of the partitions' files.
        on_progress: as for `prepare`.

    Raises:
        ExclusionError: a set has records or images that cannot be read.
        FileNotFoundError: a set is not there.
    """
    excluded = Excluded()
    if config.exclude_evaluation_images:
        validation = [partition for partition in partitions if partition.split == "validation"]
        columns = ["record_id", "looks"] if config.compares_looks else []
        for _, outcomes in iter_outcomes(validation, work, ["source", "digests", *columns]):
            for source in outcomes["source"].unique().to_pylist():
                own = outcomes.filter(pc.equal(outcomes["source"], source))
                excluded.add(f"validation/{source}", own["digests"].combine_chunks().flatten())
                if columns:
                    shown = zip(own["record_id"].to_pylist(), own["looks"].to_pylist(), strict=True)
                    pairs = [(key, name) for name, found in shown for key in found or ()]
                    excluded.add_looks(
                        f"validation/{source}", *map(list, zip(*pairs, strict=True) if pairs else ([], []))
                    )
    sets = config.evaluation_sets()
    settings = f"{WORK_VERSION} looks" if config.compares_looks else str(WORK_VERSION)
    names, tasks = {}, []
    for number, (name, source) in enumerate(sets.items()):
        for partition in cut(f"excluded{number}", [source], config.partition_records, work, settings):
            names[partition.name] = name
            tasks.append(
                {
                    "name": partition.name,
                    "digest": partition.digest,
                    "size": partition.records,
                    "records": partition.records_file(work),
                    "images": storage.join(work, "images", f"{partition.name}.arrow"),
                    "source": source.absolute().model_dump_json(),
                    "looks": config.compares_looks,
                }
            )
    if not tasks:
        return excluded
    meter = ProgressMeter("exclude", "records", on_progress, sum(task["size"] for task in tasks))
    files = {}
    for result in run_tasks(digest_images, tasks):
        if result["problem"]:
            raise ExclusionError(
                f"{names[result['name']]}: {result['problem']}. Its images must all be read to keep them out of "
                "training: repair it, or leave the set out (exclude_evaluation_images: false, exclude_images_of)"
            )
        files[result["name"]] = result["images"]
        meter.add(result["size"], skipped=result["size"] if result["skipped"] else 0)
    for task in tasks:
        table = storage.open_arrow(files[task["name"]]).read_all()
        excluded.add(names[task["name"]], table["image"])
        if task["looks"]:
            excluded.add_looks(names[task["name"]], table["looks"].to_pylist(), table["name"].to_pylist())
    return excluded


def digest_images(task: dict) -> dict:
    """Write the digests of the images of a partition of an evaluation set. Runs inside a Ray task."""
    result = {"name": task["name"], "size": task["size"], "images": task["images"], "problem": None}
    metadata = {_DIGEST_KEY: task["digest"]}
    if storage.exists(task["images"]):
        written = storage.open_arrow(task["images"]).schema.metadata or {}
        if written.get(_DIGEST_KEY) == task["digest"].encode():
            return result | {"skipped": True}
    source, rows = worker_source(task["source"]), []
    for record in read_records(task["records"]):
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
    schema = (IMAGES_WITH_LOOKS if task["looks"] else IMAGES).with_metadata(metadata)
    storage.write_table(task["images"], pa.Table.from_pylist(rows, schema))
    return result | {"skipped": False}
