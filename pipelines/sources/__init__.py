"""Sources of records. One file per kind; `open_source` maps a config to its reader."""

from pipelines.sources.base import Problem, Record, Source, open_source

__all__ = ["Problem", "Record", "Source", "open_source"]
