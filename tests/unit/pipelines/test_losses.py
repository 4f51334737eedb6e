"""What is lost and cannot be counted is judged by bytes."""

from pipelines.losses import Losses, told
from pipelines.sources import Problem, Record


def lost(source: str, lost: int, of: int, repeat: int = 1) -> Record:
    return Record("x", source, problem=Problem("shard_damaged", f"s.tar at {lost}", lost, of), repeat=repeat)


def test_shares_by_source_and_split():
    losses = Losses()
    for record in (lost("a", 10, 1000), lost("a", 20, 900), lost("a", 500, 1000, repeat=2), lost("b", 1, 1000)):
        losses.add("train", record)
    losses.add("train", Record("y", "c"))
    losses.add("validation", lost("a", 7, 7))
    assert losses.shares("train") == {"a": 0.03, "b": 0.001}
    assert losses.shares("validation") == {"a": 1.0}
    assert losses.over(1) is None
    assert (
        "source 'a' (train) lost 3.00% of its bytes, more than max_quarantined = 0.01 allows: s.tar at 10"
        in losses.over(0.01)
    )
    assert "source 'a' (validation) lost an unknown part of its bytes" in losses.over(0.03)
    assert told("a", 0.03) == "source 'a' lost 3.00% of its bytes: see shard_damaged in the quarantine"
