"""The whole preparation: tokenizer, pass 1 (tokenize), pass 2 (pack), manifest. In the data set's folder:

    tokenizer/                files of the transformers tokenizer
    shards/train-00000.arrow  packed rows (schema.PACKED); validation-00000.arrow and so on beside them
    quarantine.arrow          the records that were set aside (schema.QUARANTINE)
    manifest.json             written last: without it the folder is not a data set
    work/                     what a killed run continues from; removed at the end

A second call with the same recipe touches nothing of a finished data set.
"""

from collections import Counter
from collections.abc import Callable

from pipelines import storage, tokenizer
from pipelines.config import SPLITS_TO_PACK, DataConfig
from pipelines.execution import ensure_ray, quiet_ray_data
from pipelines.manifest import MANIFEST_FILE, Manifest, ShardInfo, split_info
from pipelines.pack import pack, shard_tasks
from pipelines.progress import Progress, ProgressMeter
from pipelines.quarantine import over_limit, write_quarantine
from pipelines.recipe import find_finished, fingerprints, recipe_digest
from pipelines.records import Partition, cut, list_records
from pipelines.tokenize import TokenizeSettings, tokenize

OnProgress = Callable[[Progress], None]


class PrepareError(RuntimeError):
    """The data set cannot be made; the message says why and what to do."""


def prepare(
    config: DataConfig,
    out: str,
    tokens_per_image: int,
    seed: int,
    on_progress: OnProgress = lambda progress: None,
) -> Manifest:
    """Make the data set of a config, or return the finished one, or continue a killed run.

    Another recipe's data set in `out` is replaced; its manifest goes first, so that no reader sees a mixture.

    Args:
        config: sources, tokenizer and sizes.
        out: folder, path or URI. Every Ray node must see it under this name.
        tokens_per_image: tokens that one picture takes in a row.
        seed: of the packing plan.
        on_progress: called with every event; drawing it is the caller's business.

    Raises:
        PrepareError: `out` cannot be written, too many records were set aside, or none is left.
        ValueError: the tokenizer cannot be used, a picture does not fit into a row, or an annotations file is broken.
        FileNotFoundError, ModuleNotFoundError: a source is not there.
    """
    if not 1 <= tokens_per_image < config.max_tokens:
        raise ValueError(
            f"a picture takes {tokens_per_image} tokens and a row has {config.max_tokens}: "
            "raise max_tokens or choose an encoder or connector with fewer tokens"
        )
    recipe = recipe_digest(config, tokens_per_image, seed)
    manifest = find_finished(config, out, recipe)
    if manifest:
        on_progress(Progress("finished", manifest.rows, manifest.rows, "rows", skipped=manifest.rows))
        return manifest
    _claim(out)
    work = storage.join(out, "work")
    source_digests = fingerprints(config)  # before the records are read: a change from here on is noticed next time
    settings = _make_tokenizer(config, out, tokens_per_image, on_progress)

    ensure_ray()
    with quiet_ray_data():
        partitions = _cut(config, work, settings.digest(), on_progress)
        statistics = _tokenize(config, partitions, settings, out, work, on_progress)
        write_quarantine(out, work, partitions)
        shards = _pack(config, partitions, seed, out, work, on_progress)

    manifest = Manifest(
        digest="",
        tokenizer_digest=settings.tokenizer_digest,
        recipe_digest=recipe,
        sources=source_digests,
        max_tokens=config.max_tokens,
        tokens_per_image=tokens_per_image,
        splits={
            split: split_info(shards[split], config.max_tokens, **_sum(statistics, partitions, split))
            for split in shards
        },
    )
    manifest.digest = manifest.content_digest()
    _remove_strays(out, manifest)
    manifest.save(out)
    storage.delete_folder(work)
    on_progress(Progress("finished", manifest.rows, manifest.rows, "rows"))
    return manifest


def _claim(out: str) -> None:
    """See that `out` can be written, and take away the manifest of what was there."""
    probe = storage.join(out, "work", "writable")
    try:
        storage.write_atomic(probe, b"")
        storage.delete(probe)
        storage.delete(storage.join(out, MANIFEST_FILE))
    except OSError as error:
        raise PrepareError(
            f"cannot write to {storage.shown(out)}: {error}; choose another folder or fix its permissions"
        ) from error


def _make_tokenizer(config: DataConfig, out: str, tokens_per_image: int, on_progress: OnProgress) -> TokenizeSettings:
    meter = ProgressMeter("tokenizer", "records", on_progress)
    texts = (turn.text for record in meter.count(list_records(config.train)) for turn in record.turns)
    chosen = tokenizer.load_or_train(config.tokenizer, texts)
    folder = storage.join(out, "tokenizer")
    digest = tokenizer.save(chosen, folder)
    return TokenizeSettings(folder, digest, chosen.eos_token, config.max_tokens, tokens_per_image, config.too_long)


def _cut(config: DataConfig, work: str, settings: str, on_progress: OnProgress) -> list[Partition]:
    meter = ProgressMeter("records", "records", on_progress)
    partitions = []
    for split in SPLITS_TO_PACK:
        for partition in cut(split, getattr(config, split), config.partition_records, work, settings):
            partitions.append(partition)
            meter.add(partition.records)
    return partitions


def _tokenize(
    config: DataConfig,
    partitions: list[Partition],
    settings: TokenizeSettings,
    out: str,
    work: str,
    on_progress: OnProgress,
) -> dict[str, dict]:
    """Pass 1. Returns the statistics by partition name."""
    total = sum(partition.records for partition in partitions)
    meter = ProgressMeter("tokenize", "records", on_progress, total)
    statistics: dict[str, dict] = {}
    sources = {split: getattr(config, split) for split in SPLITS_TO_PACK}
    for result in tokenize(partitions, sources, settings, work):
        statistics[result["name"]] = result
        bad = sum(result["quarantined"].values())
        meter.add(result["records"], quarantined=bad, skipped=result["records"] if result["skipped"] else 0)
        # Not only at the end: with a wrong folder the first partitions show it, hours before the last.
        if meter.quarantined > config.max_quarantined * total:
            raise PrepareError(over_limit(config.max_quarantined, total, statistics, partitions, out, work))
    if any(not result["skipped"] for result in statistics.values()):
        # Shards of an earlier, killed run may hold pictures that have been repaired since under the same names.
        storage.delete_folder(storage.join(work, "packed"))
    for split in SPLITS_TO_PACK:
        totals = _sum(statistics, partitions, split)
        if getattr(config, split) and totals["records"] == sum(totals["quarantined"].values()):
            raise PrepareError(
                f"no records are left in the {split} split: {totals['records']} were read and {totals['quarantined']} "
                f"set aside; check data.{split}"
            )
    return statistics


def _pack(
    config: DataConfig, partitions: list[Partition], seed: int, out: str, work: str, on_progress: OnProgress
) -> dict[str, list[ShardInfo]]:
    """Pass 2. Returns each split's shards in row order."""
    tasks = {}
    for split in dict.fromkeys(partition.split for partition in partitions):
        own = [partition for partition in partitions if partition.split == split]
        tasks[split] = shard_tasks(own, config.max_tokens, config.shard_rows, seed, work, out)
    every = [task for own in tasks.values() for task in own]
    meter = ProgressMeter("pack", "rows", on_progress, sum(len(task["rows"]) for task in every))
    shards: dict[str, ShardInfo] = {}
    for shard, skipped in pack(every):
        shards[shard.path] = shard
        meter.add(shard.rows, skipped=shard.rows if skipped else 0)
    return {split: [shards[task["path"]] for task in own] for split, own in tasks.items()}


def _sum(statistics: dict[str, dict], partitions: list[Partition], split: str) -> dict:
    own = [statistics[partition.name] for partition in partitions if partition.split == split]
    quarantined = Counter()
    for result in own:
        quarantined.update(result["quarantined"])
    return {
        "records": sum(result["records"] for result in own),
        "cut": sum(result["cut"] for result in own),
        "quarantined": dict(quarantined),
    }


def _remove_strays(out: str, manifest: Manifest) -> None:
    """Delete shards that an earlier recipe or a killed write left, so that a glob finds only this data set's."""
    listed = {shard.path for shard in manifest.shards}
    for name in storage.list_names(storage.join(out, "shards")):
        if f"shards/{name}" not in listed:
            storage.delete(storage.join(out, "shards", name))
