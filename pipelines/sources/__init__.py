"""Sources of records. One file per kind; `open_source` maps a config to its reader."""

from pipelines.sources.open import open_source
from pipelines.sources.source import Fragment, Problem, Record, Source

__all__ = ["Fragment", "Problem", "Record", "Source", "open_source"]
