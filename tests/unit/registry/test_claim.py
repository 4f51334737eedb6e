"""Tags that look like claims on an alias: which count, and what of them reaches a message."""

import time

import pytest

from workflows.registry.claim import _expired, _owner


@pytest.mark.parametrize("stamp", ["", "x", "-1", "0", "9" * 20, "9" * 5000, "٣" * 19], ids=range(7))
def test_a_claim_of_no_time_keeps_nobody_waiting(stamp):
    assert _expired(stamp)


def test_a_claim_of_a_time_to_come_keeps_nobody_waiting():
    assert _expired(f"{time.time_ns() * 2}")


def test_a_claim_of_a_moment_ago_counts():
    assert not _expired(f"{time.time_ns():020d}")
    assert not _expired(f"{time.time_ns() + 5 * 10**9:020d}")  # another machine's clock


@pytest.mark.parametrize("value", ["5", "null", "", "[" * 100_000, '{"who": "a\\u001b[2J"}'], ids=range(5))
def test_an_owner_is_told_as_text(value):
    assert _owner(value) in ("another", r"a\x1b[2J")
