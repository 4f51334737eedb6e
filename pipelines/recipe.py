"""Whether a finished data set is the one that a config asks for."""

from contextlib import suppress

from pipelines import storage
from pipelines.config import SPLITS_TO_PACK, DataConfig, SourceConfig
from pipelines.manifest import MANIFEST_FILE, Manifest
from pipelines.sources import open_source


def fingerprints(config: DataConfig) -> dict[str, str]:
    """Digest of the list of records of each source that is packed or kept out, by split/name. Pictures are not read."""
    return {key: open_source(source).fingerprint() for key, source in _sources(config).items()}


def find_finished(config: DataConfig, out: str, recipe: str) -> Manifest | None:
    """The finished data set in `out`, if it is of this recipe and its sources still list the same records."""
    if not storage.exists(storage.join(out, MANIFEST_FILE)):
        return None
    try:
        manifest = Manifest.load(out)
    except ValueError:  # of another schema version: made again
        return None
    if manifest.recipe_digest != recipe:
        return None
    for key, source in _sources(config).items():
        # A finished data set stays good when its raw corpus has been cleared away.
        with suppress(OSError, ImportError):
            if open_source(source).fingerprint() != manifest.sources.get(key):
                return None
    return manifest


def _sources(config: DataConfig) -> dict[str, SourceConfig]:
    packed = {f"{split}/{source.label}": source for split in SPLITS_TO_PACK for source in getattr(config, split)}
    return packed | config.evaluation_sets()
