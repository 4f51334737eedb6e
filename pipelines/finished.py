"""Whether a folder already holds the data set of a recipe, whole: nothing of it is then done again.

Only sizes are looked at here, in one listing. pipelines/verify.py reads everything, and pipelines/shard_check.py reads
each shard once before training does.
"""

import logging

from pipelines import storage
from pipelines.config import SPLITS_TO_PACK, DataConfig
from pipelines.manifest import MANIFEST_FILE, TOKENIZER_PATH, Manifest, ShardInfo
from pipelines.source_config import SourceConfig
from pipelines.sources import open_source

_log = logging.getLogger("mlmamba")


def fingerprints(config: DataConfig) -> dict[str, str]:
    """Digest the list of records of each source that is packed or kept out, by split/name. No images are read."""
    return {key: open_source(source).fingerprint() for key, source in _sources(config).items()}


def find_finished(config: DataConfig, out: str, recipe: str) -> Manifest | None:
    """Return the manifest in `out` if it is of this recipe, its sources still list the same records, and its files are
    there in their sizes; else None. A line in the log says why a finished set is made again.

    Raises:
        ValueError: files are missing or cut off, and so is a source that they could be made again from.
    """
    if not storage.exists(storage.join(out, MANIFEST_FILE)):
        return None
    try:
        manifest = Manifest.load(out)
    except ValueError:  # of another schema version: made again
        return None
    if manifest.recipe_digest != recipe:
        return None
    gone = []
    for key, source in _sources(config).items():
        try:
            if open_source(source).fingerprint() != manifest.sources.get(key):
                return None
        except (OSError, ImportError) as error:  # a finished data set stays valid after its raw corpus was deleted
            gone.append(f"{key} ({error})")
    found = damage(out, manifest)
    if found and gone:
        raise ValueError(
            f"the data set {storage.shown(out)} is not whole: {found[0]}{_more(found)}. It cannot be made again, "
            f"because a source is gone: {gone[0]}{_more(gone)}. Put back the one or the other"
        )
    if found:
        _log.warning("%s is made again: %s%s", storage.shown(out), found[0], _more(found))
        return None
    if manifest.pixels < 2:
        _log.warning(
            "%s was prepared by an earlier version: images in it that are transparent or have 16 bits are read as "
            "then; to have them read as evaluation and serving do, delete its %s and prepare it again",
            storage.shown(out),
            MANIFEST_FILE,
        )
    return manifest


def damage(uri: str, manifest: Manifest) -> list[str]:
    """One sentence for each shard of a finished set that is missing or has another size, and for its tokenizer."""
    sizes = storage.sizes(storage.join(uri, "shards"))
    found = [wrong_size(shard, sizes.get(shard.path.removeprefix("shards/"))) for shard in manifest.shards]
    try:
        if storage.checksum(storage.join(uri, TOKENIZER_PATH))[1] != manifest.tokenizer_digest:
            found.append(f"{TOKENIZER_PATH} is not the one that the set was made with")
    except FileNotFoundError:
        found.append(f"{TOKENIZER_PATH} is missing")
    return [problem for problem in found if problem]


def wrong_size(shard: ShardInfo, size: int | None) -> str:
    """What is wrong with a shard of so many bytes, None where there is none of its name; "" when nothing is."""
    if size is None:
        return f"{shard.path} is missing"
    if size == shard.bytes:
        return ""
    what = "cut off" if size < shard.bytes else "too long"
    return f"{shard.path} is {what}: it has {size} bytes, the manifest says {shard.bytes}"


def changed_sources(config: DataConfig, manifest: Manifest) -> list[str]:
    """One sentence for each source that lists other records than when a set was made. Those that are gone are none."""
    found = []
    for key, source in _sources(config).items():
        try:
            same = open_source(source).fingerprint() == manifest.sources.get(key)
        except (OSError, ImportError):
            continue
        if not same:
            found.append(f"the source {key} has changed since the data set was made from it")
    return found


def _more(found: list[str]) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""


def _sources(config: DataConfig) -> dict[str, SourceConfig]:
    packed = {f"{split}/{source.label}": source for split in SPLITS_TO_PACK for source in getattr(config, split)}
    return packed | config.evaluation_sets()
