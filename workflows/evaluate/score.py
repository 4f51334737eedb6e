"""Scores by question type, beside the two baselines that say whether the model looks at the picture."""

from collections import defaultdict

OVERALL = "overall"
MARGIN = "margin_over_blind"


def normalise(answer: str) -> str:
    """Answers compare without case, surrounding space and a final full stop."""
    return answer.strip().rstrip(".").strip().lower()


def accuracy_by_type(predictions: list[str], answers: list[str], types: list[str]) -> dict[str, float]:
    """Share of exact answers, overall and per type.

    Raises:
        ValueError: the lists differ in length: a score of an incomplete set is no score.
    """
    if not len(predictions) == len(answers) == len(types):
        raise ValueError(f"{len(predictions)} predictions, {len(answers)} answers and {len(types)} types do not match")
    right: dict[str, list[bool]] = defaultdict(list)
    for prediction, answer, kind in zip(predictions, answers, types, strict=True):
        hit = normalise(prediction) == normalise(answer)
        right[OVERALL].append(hit)
        right[kind].append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def table(result: dict) -> str:
    """Accuracy by type beside the baselines, for a person."""
    majority = f"majority ({result['majority_answer']})"
    lines = [f"{'':<12}{'questions':>10}{'accuracy':>10}{'blind':>8}{majority:>18}"]
    lines += [
        f"{kind:<12}{count:>10,}{result['scores'][kind]:>10.1%}{result['blind'][kind]:>8.1%}"
        f"{result['majority'][kind]:>18.1%}"
        for kind, count in result["questions"].items()
    ]
    return "\n".join([*lines, "blind: the same model, another picture"])
