"""Names of scores, where a question's type is called as one of ours.

An evaluation's scores are flat, {name: number}: "overall", each type of question, "overall/low" and "overall/high" for
the ends of an interval, "margin_over_blind"; MLflow has the blind and the majority's under "blind/..." and
"majority/...". A gate names them. So a type that is called "overall", or "x/low" beside a type x, must not take the
place of what a gate means: it is scored as "type/overall".
"""

from collections.abc import Iterable

MARGIN = "margin_over_blind"
OVERALL = "overall"
_FIRST = ("", OVERALL, MARGIN, "blind", "majority", "partial", "type")
_LAST = ("", "low", "high")
_ENDING = "score"


def type_name(kind: str, taken: Iterable[str] = ()) -> str:
    """The name that a type of question is scored under: its own, or "type/KIND" where that could be a name of ours.

    Two types never have the same one: what begins with "type/" already gets another, and "/score" is set behind
    what would end as an interval does ("type/x/low/score").

    Args:
        taken: first parts of names that the benchmark gives scores of its own ("script").
    """
    first, last = kind.split("/")[0], kind.split("/")[-1]
    ends = "/" in kind and last in _LAST
    if first not in _FIRST and first not in taken and not ends:
        return kind
    return f"type/{kind}/{_ENDING}" if ends or (last == _ENDING and "/" in kind) else f"type/{kind}"
