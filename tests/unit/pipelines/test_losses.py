"""What is lost and cannot be counted is judged by bytes."""

from pipelines.losses import Losses, told


def test_shares_by_source_and_split():
    losses = Losses()
    for source, lost, of in (("a", 10, 1000), ("a", 20, 900), ("b", 1, 1000)):
        losses.add("train", source, lost, of, f"s.tar at {lost}")
    losses.add("validation", "a", 7, 7, "s.tar at 7")
    assert losses.shares("train") == {"a": 0.03, "b": 0.001}
    assert losses.shares("validation") == {"a": 1.0}
    assert losses.over(1) is None
    assert (
        "source 'a' (train) lost 3.00% of its bytes, more than max_quarantined = 0.01 allows: s.tar at 10"
        in losses.over(0.01)
    )
    assert "source 'a' (validation) lost an unknown part of its bytes" in losses.over(0.03)
    assert told("a", 0.03) == "source 'a' lost 3.00% of its bytes: see shard_damaged in the quarantine"
