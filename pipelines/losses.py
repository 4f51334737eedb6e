"""What sources could not read and nobody can count: a tar cut off, a Parquet file without its end.

One record stands for it in the quarantine, whatever it held; so it is judged by its share of the source's bytes.
"""

from dataclasses import dataclass, field


@dataclass
class Losses:
    """Bytes lost of the sources of all splits."""

    _lost: dict[tuple[str, str], int] = field(default_factory=dict)
    _of: dict[tuple[str, str], int] = field(default_factory=dict)
    _first: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, split: str, source: str, lost: int, of: int, detail: str) -> None:
        """Count bytes that a source lost, of those that it should have."""
        key = split, source
        self._lost[key] = self._lost.get(key, 0) + lost
        self._of[key] = max(self._of.get(key, 0), of)
        self._first.setdefault(key, detail)

    def shares(self, split: str) -> dict[str, float]:
        """Share of its bytes that each source of a split lost, for those that lost any."""
        return {name: self._share((own, name)) for own, name in self._lost if own == split}

    def over(self, limit: float) -> str | None:
        """The message that a source lost more than the recipe's `max_quarantined`, or None."""
        for split, name in self._lost:
            share = self._share((split, name))
            if share > limit:
                return (
                    f"source {name!r} ({split}) lost {_percent(share)} of its bytes, more than max_quarantined = "
                    f"{limit:g} allows: {self._first[split, name]}. Then run again, or raise max_quarantined to go on "
                    "without it"
                )
        return None

    def _share(self, key: tuple[str, str]) -> float:
        return round(min(self._lost[key] / self._of[key], 1), 6)


def told(name: str, share: float) -> str:
    """The line about a source's loss for the end of a preparation."""
    return f"source {name!r} lost {_percent(share)} of its bytes: see shard_damaged in the quarantine"


def _percent(share: float) -> str:
    return "an unknown part" if share == 1 else f"{share:.2%}"
