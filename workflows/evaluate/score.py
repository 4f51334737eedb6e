"""Exact match, and scores beside the two baselines that say whether the model looks at the picture, for a person."""

OVERALL = "overall"
MARGIN = "margin_over_blind"
_WIDE, _SHOWN = 14, 5


def normalise(answer: str) -> str:
    """Answers compare without case, surrounding space and a final full stop."""
    return answer.strip().rstrip(".").strip().lower()


def table(result: dict) -> str:
    """The content of scores.json as text: by type with the baselines beside, then the protocol's other scores.

    Of those, the ones of a single type are left to scores.json.
    """
    kinds = [kind for kind in result["questions"] if kind in result["scores"]]
    measured = [name for name in result["scores"] if name in result["majority"]]
    others = [name for name in measured if not any(name == kind or name.endswith(f"/{kind}") for kind in kinds[1:])][1:]
    width = max(_WIDE, *(len(name) + 2 for name in [*kinds, *others]))
    majority = f"majority ({result['majority_answer']})"
    column = len(majority) + 2
    lines = [f"{'':<{width}}{'questions':>10}{'score':>10}{'blind':>8}{majority:>{column}}"]
    for name in [*kinds, *others]:
        count = f"{result['questions'][name]:,}" if name in kinds else ""
        values = (result[part].get(name) for part in ("scores", "blind", "majority"))
        score, blind, constant = ("" if value is None else f"{value:.1%}" for value in values)
        lines.append(f"{name:<{width}}{count:>10}{score:>10}{blind:>8}{constant:>{column}}".rstrip())
    lines.append("blind: the same model, another picture")
    lines += result.get("notes", [])
    if not result.get("complete", True):
        missing = result["missing"]
        shown = ", ".join(missing["ids"][:_SHOWN]) + (", ..." if missing["count"] > _SHOWN else "")
        lines.append(f"PARTIAL: {missing['count']:,} items are missing ({shown}); this is not the benchmark's score")
    return "\n".join(lines)
