"""The whole preparation: tokenizer, pass 1 (tokenize), what is removed, pass 2 (pack), manifest. In its folder:

    tokenizer/                files of the transformers tokenizer
    shards/train-00000.arrow  packed rows (schema.PACKED); validation-00000.arrow and so on beside them
    quarantine.arrow          the records that were set aside (schema.QUARANTINE)
    manifest.json             written last: without it the folder is not a data set
    work/                     what a killed run continues from; removed at the end

A second call with the same recipe touches nothing of a finished data set.
"""

from collections.abc import Callable
from itertools import islice

from mlmamba.image_colours import PIXELS
from pipelines import storage, tokenizer
from pipelines.alike import find_alike
from pipelines.config import SPLITS_TO_PACK, DataConfig, data_identity
from pipelines.dedup import Removals, find_removals
from pipelines.exclusion import ExclusionError, read_excluded
from pipelines.execution import ensure_ray, quiet_ray_data
from pipelines.finished import find_finished, fingerprints
from pipelines.losses import Losses
from pipelines.manifest import MANIFEST_FILE, Manifest, ShardInfo, split_info
from pipelines.pack import pack, shard_tasks
from pipelines.progress import Progress, ProgressMeter
from pipelines.quarantine import QUARANTINE_FILE, Tally, allowed, none_left, over_limit, write_quarantine
from pipelines.records import Partition, cut, list_records
from pipelines.tokenize import TokenizeSettings, tokenize
from pipelines.tokenizer import TOKENIZER_FILE
from pipelines.tokenizer_check import CONVERSATIONS, needs_whole_text
from pipelines.validate import check_record

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
        tokens_per_image: tokens that one image takes in a row.
        seed: of the packing plan.
        on_progress: called with every event; drawing it is the caller's business.

    Raises:
        PrepareError: `out` cannot be written, too many records were set aside, none is left, or an evaluation set whose
            images are kept out cannot be read.
        ValueError: the tokenizer cannot be used, an image does not fit into a row, or an annotations file is broken.
        FileNotFoundError, ModuleNotFoundError: a source is not there.
    """
    if not 1 <= tokens_per_image < config.max_tokens:
        raise ValueError(
            f"an image takes {tokens_per_image} tokens and a row has {config.max_tokens}: "
            "raise max_tokens or choose an encoder or connector with fewer tokens"
        )
    recipe = data_identity(config, tokens_per_image, seed)
    manifest = find_finished(config, out, recipe)
    if manifest:
        on_progress(Progress("finished", manifest.rows, manifest.rows, "rows", skipped=manifest.rows))
        return manifest
    _claim(out)
    work = storage.join(out, "work")
    source_digests = fingerprints(config)  # before the records are read: a change from here on is noticed next time
    settings = _make_tokenizer(config, out, tokens_per_image, on_progress)

    ensure_ray(say=lambda text: on_progress(Progress(text, 0, None, "")))
    with quiet_ray_data():
        partitions, losses = _cut(config, work, settings.digest(), on_progress)
        _tokenize(config, partitions, settings, out, work, on_progress)
        removals, tallies, excluded = _remove(config, partitions, out, work, on_progress)
        shards = _pack(config, partitions, removals, seed, out, work, on_progress)

    manifest = Manifest(
        digest="",
        tokenizer_digest=settings.tokenizer_digest,
        recipe_digest=recipe,
        sources=source_digests,
        excluded=excluded,
        max_tokens=config.max_tokens,
        tokens_per_image=tokens_per_image,
        pixels=PIXELS,
        quarantine_sha256=storage.checksum(storage.join(out, QUARANTINE_FILE))[1],
        splits={
            split: split_info(
                shards[split],
                config.max_tokens,
                records=tally.records,
                quarantined=tally.by_reason(),
                quarantined_by_source=tally.by_source(),
                cut=tally.cut,
                cut_turns=tally.cut_turns,
                without_images=tally.without_images,
                lost=losses.shares(split),
            )
            for split, tally in tallies.items()
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
    worker = tokenizer.WorkerTokenizer(storage.read_bytes(storage.join(folder, TOKENIZER_FILE)), chosen.eos_token)
    usable = (record.turns for record in list_records(config.train) if check_record(record) is None)
    named = config.tokenizer.name
    sample = islice(usable, CONVERSATIONS) if named else ()
    whole = needs_whole_text(worker, sample, named or "trained here")
    sizes, limits = (config.max_tokens, tokens_per_image), config.images.limits()
    return TokenizeSettings(
        folder,
        digest,
        chosen.eos_token,
        *sizes,
        config.too_long,
        limits,
        whole,
        worker.special_tokens,
        looks=config.compares_looks,
    )


def _cut(config: DataConfig, work: str, settings: str, on_progress: OnProgress) -> tuple[list[Partition], Losses]:
    meter = ProgressMeter("records", "records", on_progress)
    partitions, losses = [], Losses()
    for split in SPLITS_TO_PACK:
        for partition in cut(split, getattr(config, split), config.partition_records, work, settings, losses):
            partitions.append(partition)
            meter.add(partition.records)
    too_much = losses.over(config.max_quarantined)
    if too_much:
        raise PrepareError(too_much)
    return partitions, losses


def _tokenize(
    config: DataConfig,
    partitions: list[Partition],
    settings: TokenizeSettings,
    out: str,
    work: str,
    on_progress: OnProgress,
) -> None:
    """Pass 1."""
    total = sum(partition.records for partition in partitions)
    meter = ProgressMeter("tokenize", "records", on_progress, total)
    done = set()
    sources = {split: getattr(config, split) for split in SPLITS_TO_PACK}
    for result in tokenize(partitions, sources, settings, work):
        done.add(result["name"])
        bad = sum(result["quarantined"].values())
        meter.add(result["records"], quarantined=bad, skipped=result["records"] if result["skipped"] else 0)
        # Not only at the end: with a wrong folder the first partitions show it, hours before the last.
        if meter.quarantined > allowed(config.max_quarantined, total):
            own = [partition for partition in partitions if partition.name in done]
            tallies = write_quarantine(out, work, own, Removals())
            raise PrepareError(over_limit(config.max_quarantined, total, tallies, out))
    if meter.skipped < meter.done:
        # Shards of an earlier, killed run may hold images that have been repaired since under the same names.
        storage.delete_folder(storage.join(work, "packed"))


def _remove(
    config: DataConfig, partitions: list[Partition], out: str, work: str, on_progress: OnProgress
) -> tuple[Removals, dict[str, Tally], dict[str, int]]:
    """Find the records that are not used, and write the table of all that are set aside.

    Returns:
        The tokenized records that are not used, counts by split, and images kept out by evaluation set.
    """
    try:
        excluded = read_excluded(config, partitions, work, on_progress)
    except ExclusionError as error:
        raise PrepareError(str(error)) from error
    total = sum(partition.records for partition in partitions)
    meter = ProgressMeter("deduplicate", "records", on_progress, total)
    alike = None
    if config.compares_looks:
        train = [partition for partition in partitions if partition.split == "train"]
        alike = find_alike(train, work, excluded.keys, config.similar_evaluation_images, on_progress)
    removals = find_removals(partitions, work, excluded, config.deduplicate, alike)
    tallies = write_quarantine(out, work, partitions, removals)
    meter.add(total, quarantined=sum(tally.quarantined.total() for tally in tallies.values()))
    if sum(tally.bad for tally in tallies.values()) > allowed(config.max_quarantined, total):
        raise PrepareError(over_limit(config.max_quarantined, total, tallies, out))
    for split in SPLITS_TO_PACK:
        tally = tallies.get(split, Tally())
        if getattr(config, split) and tally.records == tally.quarantined.total():
            raise PrepareError(none_left(split, tally))
    return removals, tallies, excluded.counts


def _pack(
    config: DataConfig,
    partitions: list[Partition],
    removals: Removals,
    seed: int,
    out: str,
    work: str,
    on_progress: OnProgress,
) -> dict[str, list[ShardInfo]]:
    """Pass 2. Returns each split's shards in row order."""
    tasks = {}
    for split in dict.fromkeys(partition.split for partition in partitions):
        own = [partition for partition in partitions if partition.split == split]
        tasks[split] = shard_tasks(own, config.max_tokens, config.shard_rows, seed, work, out, removals)
    every = [task for own in tasks.values() for task in own]
    meter = ProgressMeter("pack", "rows", on_progress, sum(len(task["rows"]) for task in every))
    shards: dict[str, ShardInfo] = {}
    for shard, skipped in pack(every):
        shards[shard.path] = shard
        meter.add(shard.rows, skipped=shard.rows if skipped else 0)
    return {split: [shards[task["path"]] for task in own] for split, own in tasks.items()}


def _remove_strays(out: str, manifest: Manifest) -> None:
    """Delete shards that an earlier recipe or a killed write left, so that a glob finds only this data set's."""
    listed = {shard.path for shard in manifest.shards}
    for name in storage.list_names(storage.join(out, "shards")):
        if f"shards/{name}" not in listed:
            storage.delete(storage.join(out, "shards", name))
