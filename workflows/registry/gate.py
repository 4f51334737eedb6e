"""Whether a version may be promoted: its scores against the gate's thresholds and against the present holder's."""

from collections.abc import Mapping

from workflows.configs.gate import Gate


def gate_failures(
    gate: Gate, scores: Mapping[str, float], holder: Mapping[str, float] | None = None, same_questions: bool = True
) -> list[str]:
    """What keeps a version from promotion, one line for each; none when the gate holds.

    Args:
        scores: the version's, by name.
        holder: scores of the version that holds the alias now; None when none does. A score that it lacks, because its
            evaluation did not have it yet, is not compared.
        same_questions: whether both were scored on the same questions.
    """
    failures = []
    for name, least in gate.least.items():
        value = scores.get(name)
        if value is None:
            failures.append(f"{name} was not measured, at least {least:.6g} is wanted")
        elif not value >= least:  # also when it is not a number
            failures.append(f"{name} is {value:.6g}, at least {least:.6g} is wanted")
    for name, most in gate.most.items():
        value = scores.get(name)
        if value is None:
            failures.append(f"{name} was not measured, at most {most:.6g} is wanted")
        elif not value <= most:
            failures.append(f"{name} is {value:.6g}, at most {most:.6g} is wanted")
    if holder is None or not gate.margin:
        return failures
    if not same_questions:
        return [*failures, "the present holder was scored on other questions, so the margins say nothing"]
    return failures + _regressions(gate, scores, holder)


def _regressions(gate: Gate, scores: Mapping[str, float], holder: Mapping[str, float]) -> list[str]:
    failures = []
    for name, allowed in gate.margin.items():
        value, reference = scores.get(name), holder.get(name)
        if reference is None:
            continue
        if value is None:
            failures.append(f"{name} was not measured, the present holder has {reference:.6g}")
            continue
        worse = value - reference if name in gate.most else reference - value
        if not worse <= allowed + 1e-9:  # 0.91 - 0.90 is a little over 0.01
            failures.append(
                f"{name} is {value:.6g}, the present holder has {reference:.6g}: {worse:.4g} worse, "
                f"at most {allowed:.6g} is allowed"
            )
    return failures
