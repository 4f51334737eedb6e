"""The whole preparation: tokenizer, pass 1 (tokenize), what is removed, pass 2 (pack), manifest. In its folder:

    tokenizer/                files of the transformers tokenizer
    shards/train-00000.arrow  packed rows (schema.PACKED); validation-00000.arrow and so on beside them
    quarantine.arrow          the records that were set aside (schema.QUARANTINE)
    manifest.json             written last: without it the folder is not a data set
    work/                     what a killed run continues from; removed at the end

A second call with the same recipe touches nothing of a finished data set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from mlmamba.image_colours import PIXELS
from mlmamba.image_layout import ImageLayout, TokensPerImage
from pipelines import storage, tokenizer
from pipelines.alike import find_alike
from pipelines.config import SPLITS_TO_PACK, DataConfig, data_identity
from pipelines.dedup import REMOVED, find_removals
from pipelines.exclusion import ExclusionError, read_excluded
from pipelines.execution import ensure_ray, quiet_ray_data
from pipelines.finished import find_finished, fingerprints
from pipelines.fragments import SourceCut, cut_sources, partitions
from pipelines.losses import Losses
from pipelines.manifest import MANIFEST_FILE, Manifest, ShardInfo, split_info
from pipelines.pack import pack, shard_number
from pipelines.plan import plan_shards, read_bad, settle_groups
from pipelines.progress import Progress, ProgressMeter
from pipelines.quarantine import QUARANTINE_FILE, Tally, allowed, none_left, over_limit, settle, write_quarantine
from pipelines.records import Group, groups_of, list_records
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
    tokens_per_image: TokensPerImage,
    seed: int,
    on_progress: OnProgress = lambda progress: None,
) -> Manifest:
    """Make the data set of a config, or return the finished one, or continue a killed run.

    Another recipe's data set in `out` is replaced; its manifest goes first, so that no reader sees a mixture.

    Args:
        config: sources, tokenizer and sizes.
        out: folder, path or URI. Every Ray node must see it under this name.
        tokens_per_image: tokens that one image takes in a row, or what decides them (`ImageLayout.of`).
        seed: of the packing plan.
        on_progress: called with every event; drawing it is the caller's business.

    Raises:
        PrepareError: `out` cannot be written, too many records were set aside, none is left, or an evaluation set whose
            images are kept out cannot be read.
        ValueError: the tokenizer cannot be used, an image does not fit into a row, or an annotations file is broken.
        FileNotFoundError, ModuleNotFoundError: a source is not there.
    """
    if config.max_tokens <= (most := ImageLayout.of(tokens_per_image).most):
        takes = f"{most}" if isinstance(tokens_per_image, int) else f"up to {most}"
        raise ValueError(
            f"an image takes {takes} tokens and a row has {config.max_tokens}: "
            "raise data.max_tokens or choose an encoder, a connector or sizes of images with fewer tokens"
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
        cuts = _cut(config, work, on_progress)
        counts, losses = _tokenize(config, cuts, settings, out, work, on_progress)
        groups = {split: list(groups_of(split, count.partitions)) for split, count in counts.items()}
        tallies, excluded = _remove(config, cuts, groups, counts, out, work, on_progress)
        shards = _pack(config, groups, tallies, seed, out, work, on_progress)

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


def _make_tokenizer(
    config: DataConfig, out: str, tokens_per_image: TokensPerImage, on_progress: OnProgress
) -> TokenizeSettings:
    meter = ProgressMeter("tokenizer", "records", on_progress)
    texts = (turn.text for record in meter.count(list_records(config.train)) for turn in record.turns)
    chosen = tokenizer.load_or_train(config.tokenizer, texts)
    folder = storage.join(out, "tokenizer")
    digest = tokenizer.save(chosen, folder)
    data, chat = storage.read_bytes(storage.join(folder, TOKENIZER_FILE)), config.tokenizer.chat
    worker = tokenizer.WorkerTokenizer(data, chosen.eos_token, chat)
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
        chat,
        looks=config.compares_looks,
    )


@dataclass
class Count:
    """What a split is made of."""

    partitions: int = 0
    records: int = 0
    known: bool = True
    """Whether `records` is known before the records are read."""


def _cut(config: DataConfig, work: str, on_progress: OnProgress) -> dict[str, SourceCut]:
    """The fragments of all sources, by "SPLIT-NUMBER", and of the evaluation sets, by their names."""
    on_progress(Progress("records", 0, None, "records"))
    sources = {f"{split}-{i}": source for split in SPLITS_TO_PACK for i, source in enumerate(getattr(config, split))}
    sources |= {f"excluded-{i}": source for i, source in enumerate(config.evaluation_sets().values())}
    cuts = cut_sources(sources, config.partition_records, work)
    total = sum(cut.records or 0 for cut in cuts.values())
    on_progress(Progress("records", total, None, "records"))
    return cuts


def _cuts_of(cuts: dict[str, SourceCut], split: str) -> list[SourceCut]:
    own = [cut for name, cut in cuts.items() if name.rpartition("-")[0] == split]
    return own + [cut for cut in _cuts_of(cuts, "train") if cut.config.validation] if split == "validation" else own


def _tokenize(
    config: DataConfig,
    cuts: dict[str, SourceCut],
    settings: TokenizeSettings,
    out: str,
    work: str,
    on_progress: OnProgress,
) -> tuple[dict[str, Count], Losses]:
    """Pass 1."""
    digest = settings.digest()
    counts = {split: Count() for split in SPLITS_TO_PACK if config.sources(split)}
    for split, count in counts.items():
        for partition in partitions(split, _cuts_of(cuts, split), digest):
            count.partitions += 1
            count.records += partition.records or 0
            count.known = count.known and partition.records is not None
    known = all(count.known for count in counts.values())
    total = sum(count.records for count in counts.values()) if known else None
    every = sum(count.partitions for count in counts.values())
    for count in counts.values():
        count.records = 0
    meter = ProgressMeter("tokenize", "records", on_progress, total)
    done: dict[str, list[str]] = {split: [] for split in counts}
    losses, sources = Losses(), {split: config.sources(split) for split in SPLITS_TO_PACK}
    work_list = chain.from_iterable(partitions(split, _cuts_of(cuts, split), digest) for split in counts)
    for result in tokenize(work_list, sources, settings, work):
        done[result["split"]].append(result["name"])
        counts[result["split"]].records += result["records"]
        bad = sum(result["quarantined"].values())
        meter.add(result["records"], quarantined=bad, skipped=result["records"] if result["skipped"] else 0)
        for loss in result["losses"]:
            losses.add(result["split"], result["source"], *loss)
        if too_much := losses.over(config.max_quarantined):
            raise PrepareError(too_much)
        # Not only at the end: with a wrong folder the first partitions show it, hours before the last.
        expected = total
        if total is None:  # twice what the partitions so far let expect: the others may be larger
            expected = 2 * meter.done * every // sum(map(len, done.values()))
        if meter.quarantined > allowed(config.max_quarantined, expected):
            raise PrepareError(_too_many(config, done, expected, out, work))
    if meter.skipped < meter.done:
        # Shards of an earlier, killed run may hold images that have been repaired since under the same names.
        storage.delete_folder(storage.join(work, "packed"))
    return counts, losses


def _too_many(config: DataConfig, done: dict[str, list[str]], total: int, out: str, work: str) -> str:
    """The message that too many records are bad, with the table of those of the partitions done so far."""
    settled = {split: settle(split, 0, sorted(names), work, REMOVED.empty_table()) for split, names in done.items()}
    write_quarantine(storage.join(out, QUARANTINE_FILE), (own.bad for own in settled.values()))
    return over_limit(config.max_quarantined, total, {split: own.tally for split, own in settled.items()}, out)


def _remove(
    config: DataConfig,
    cuts: dict[str, SourceCut],
    groups: dict[str, list[Group]],
    counts: dict[str, Count],
    out: str,
    work: str,
    on_progress: OnProgress,
) -> tuple[dict[str, Tally], dict[str, int]]:
    """Find the records that are not used, and write the table of all that are set aside.

    Returns:
        Counts by split, and images kept out by evaluation set.
    """

    def names(split: str) -> Iterator[str]:
        return (name for group in groups.get(split, ()) for name in group.names)

    sets = dict(zip(config.evaluation_sets(), _cuts_of(cuts, "excluded"), strict=True))
    try:
        excluded = read_excluded(config, names("validation"), sets, work, on_progress)
    except ExclusionError as error:
        raise PrepareError(str(error)) from error
    records = {split: count.records for split, count in counts.items()}
    total = sum(records.values())
    meter = ProgressMeter("deduplicate", "records", on_progress, total)
    near = None
    if config.compares_looks:
        least = config.similar_evaluation_images
        near = find_alike(names("train"), records["train"], work, excluded, least, on_progress)
    search = find_removals(groups, records, work, excluded, config.deduplicate, near)
    tallies = settle_groups(groups, search, work)
    write_quarantine(storage.join(out, QUARANTINE_FILE), read_bad(groups, work))
    meter.add(total, quarantined=sum(tally.quarantined.total() for tally in tallies.values()))
    if sum(tally.bad for tally in tallies.values()) > allowed(config.max_quarantined, total):
        raise PrepareError(over_limit(config.max_quarantined, total, tallies, out))
    for split, tally in tallies.items():
        if tally.records == tally.quarantined.total():
            raise PrepareError(none_left(split, tally))
    return tallies, excluded.counts


def _pack(
    config: DataConfig,
    groups: dict[str, list[Group]],
    tallies: dict[str, Tally],
    seed: int,
    out: str,
    work: str,
    on_progress: OnProgress,
) -> dict[str, list[ShardInfo]]:
    """Pass 2. Returns each split's shards in row order."""
    samples = {split: tally.records - tally.quarantined.total() for split, tally in tallies.items()}
    planned = plan_shards(groups, samples, config.max_tokens, config.shard_rows, seed, work)
    meter = ProgressMeter("pack", "rows", on_progress, sum(shard.rows for own in planned.values() for shard in own))
    shards: dict[str, dict[str, ShardInfo]] = {split: {} for split in planned}
    for split, shard, skipped in pack(planned, work, out):
        shards[split][shard.path] = shard
        meter.add(shard.rows, skipped=shard.rows if skipped else 0)
    return {split: [own[path] for path in sorted(own, key=shard_number)] for split, own in shards.items()}


def _remove_strays(out: str, manifest: Manifest) -> None:
    """Delete shards that an earlier recipe or a killed write left, so that a glob finds only this data set's."""
    listed = {shard.path for shard in manifest.shards}
    for name in storage.list_names(storage.join(out, "shards")):
        if f"shards/{name}" not in listed:
            storage.delete(storage.join(out, "shards", name))
