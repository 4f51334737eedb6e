"""The history of an alias, and what it says about where a rollback goes."""

import pytest

from workflows.registry.history import Move, history, holders


def moves(*steps):
    """("promote", to, was) and so on, with rising stamps."""
    return [Move("champion", i, kind, to, was, "a@b") for i, (kind, to, was) in enumerate(steps)]


ONE_TWO_THREE = [("promote", "1", None), ("promote", "2", "1"), ("promote", "3", "2")]


@pytest.mark.parametrize(
    ("steps", "now", "expected"),
    [
        ([], None, []),
        ([], "4", ["4"]),
        (ONE_TWO_THREE, "3", ["1", "2", "3"]),
        ([*ONE_TWO_THREE, ("rollback", "2", "3")], "2", ["1", "2"]),
        ([*ONE_TWO_THREE, ("rollback", "2", "3"), ("rollback", "1", "2")], "1", ["1"]),
        ([*ONE_TWO_THREE, ("rollback", "2", "3"), ("promote", "4", "2")], "4", ["1", "2", "4"]),
        ([*ONE_TWO_THREE, ("promote", "1", "3"), ("rollback", "3", "1")], "3", ["1", "2", "3"]),
        # announced and not made: by what the registry says now, or by what the next move found
        ([*ONE_TWO_THREE, ("promote", "4", "3")], "3", ["1", "2", "3"]),
        ([*ONE_TWO_THREE, ("rollback", "2", "3")], "3", ["1", "2", "3"]),
        ([*ONE_TWO_THREE, ("promote", "4", "3"), ("promote", "5", "3")], "5", ["1", "2", "3", "5"]),
        ([*ONE_TWO_THREE, ("rollback", "2", "3"), ("promote", "5", "3")], "5", ["1", "2", "3", "5"]),
        # moved by other means
        (ONE_TWO_THREE, "7", ["1", "2", "3", "7"]),
        ([*ONE_TWO_THREE, ("promote", "8", "7")], "8", ["1", "2", "3", "7", "8"]),
    ],
)
def test_what_a_rollback_can_go_back_to(steps, now, expected):
    assert holders(moves(*steps), now) == expected


def test_a_move_survives_its_tag_and_the_history_is_in_order():
    later = Move("champion", 200, "promote", "2", "1", "a@b", "because", forced=True)
    sooner = Move("champion", 100, "promote", "1", None, "a@b")
    other = Move("candidate", 150, "promote", "3", None, "a@b")
    tags = dict(move.tag() for move in (later, sooner, other)) | {"mlmamba.claim.champion.1": "{}", "owner": "me"}
    assert history(tags, "champion") == [sooner, later]
    assert history(tags) == [sooner, other, later]


def test_a_long_reason_is_cut_to_what_a_tag_holds():
    move = Move("champion", 1, "promote", "1", None, "a@b", "x" * 100_000)
    key, value = move.tag()
    assert len(value) < 5000
    assert history({key: value})[0].why == "x" * 2000
