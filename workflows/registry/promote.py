"""Move an alias: forwards when the gate holds, or back to the version before; and the gate itself.

The order of writes makes a crash harmless: first the tag that says why the gate was overridden, then the move in the
history, then the alias, which alone decides what is served. A crash before the last write leaves a move in the history
that was not made; the history tells such moves apart (history.py), and the same command makes it.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from workflows.errors import UsageError, WorkflowError
from workflows.recipe.evaluate import Gate
from workflows.registry.claim import Claim, claim
from workflows.registry.history import Move, UnreadableTag, history, holders, read_tag, who_runs_this
from workflows.registry.models import Reference, absent, get_model, get_version, reachable


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion or rollback."""

    name: str
    alias: str
    version: str
    """The version that was asked for."""
    previous: str | None
    """The version that held it before."""
    moved: bool
    """Whether the alias was moved; False when the gate failed, or when the version held it already."""
    gate_failures: list[str] = field(default_factory=list)
    """What the gate found wrong: why the alias was not moved, or what force has overridden."""
    forced: bool = False

    @property
    def holds(self) -> bool:
        """Whether the version holds the alias now."""
        return self.moved or self.previous == self.version

    def as_dict(self) -> dict:
        """Plain data."""
        return asdict(self) | {"holds": self.holds}


def promote(
    client: MlflowClient,
    name: str,
    version: str,
    alias: str = "champion",
    *,
    force: bool = False,
    reason: str | None = None,
) -> Promotion:
    """Move the alias to a version if the version's gate holds.

    Args:
        force: move it even if the gate fails. Who, when and why become the tag `mlmamba.forced.ALIAS` of the
            version.
        reason: why, for the history; required with force.

    Raises:
        UsageError: force without a reason.
        WorkflowError: no such model or version, someone else is moving the alias, or the registry does not answer.
    """
    if force and not (reason or "").strip():
        raise UsageError("--force needs --reason TEXT: it is kept with the version")
    found = get_version(client, Reference(name, version))
    with claim(client, name, alias) as held, reachable():
        model = get_model(client, name)
        now = _version(model.aliases.get(alias))
        if now == version:
            return Promotion(name, alias, version, now, moved=False)
        failures = _failures(client, found, now)
        forced = bool(failures) and force
        if failures and not force:
            return Promotion(name, alias, version, now, moved=False, gate_failures=failures)
        move = Move(alias, _stamp(model.tags), "promote", version, now, who_runs_this(), reason, forced)
        if forced:
            record = {"who": move.who, "when": _when(move.stamp), "why": reason, "gate_failures": failures}
            client.set_model_version_tag(name, version, f"mlmamba.forced.{alias}", json.dumps(record))
        _move(client, name, move, held)
    return Promotion(name, alias, version, now, moved=True, gate_failures=failures, forced=forced)


def rollback(client: MlflowClient, name: str, alias: str = "champion", reason: str | None = None) -> Promotion:
    """Move the alias back to the version that held it before the present one.

    Each rollback goes one version further back: after promotions of 1, 2 and 3, two rollbacks end at 1. None returns to
    a version that was itself rolled back: after 1, 2, 3, a rollback to 2, and 4, the next one goes to 2. A rollback
    skips versions that were deleted, and it does not ask the gate.

    Raises:
        WorkflowError: there is nothing to go back to, and as `promote` does.
    """
    get_model(client, name)
    with claim(client, name, alias) as held, reachable():
        model = get_model(client, name)
        now = _version(model.aliases.get(alias))
        if now is None:
            raise WorkflowError(f"no version of {name} is @{alias}: there is nothing to roll back from")
        earlier = [v for v in holders(history(model.tags, alias), now)[:-1] if v != now]
        target = next((v for v in reversed(earlier) if _exists(client, name, v)), None)
        if target is None:
            raise WorkflowError(
                f"no version of {name} was @{alias} before version {now}; "
                f"`mlmamba models promote {name}/VERSION` moves it to one that you choose"
            )
        move = Move(alias, _stamp(model.tags), "rollback", target, now, who_runs_this(), reason)
        _move(client, name, move, held)
    return Promotion(name, alias, target, now, moved=True)


def rolled_back(client: MlflowClient, name: str, version: str, alias: str) -> Move | None:
    """Return the rollback that took the alias from a version, or None if the version was promoted again since."""
    about = [m for m in history(get_model(client, name).tags, alias) if version in (m.to, m.was)]
    last = about[-1] if about else None
    return last if last is not None and last.kind == "rollback" and last.was == version else None


def _move(client: MlflowClient, name: str, move: Move, held: Claim) -> None:
    """Write the move to the history, set the alias, and see that nobody else set it. Raises WorkflowError."""
    client.set_registered_model_tag(name, *move.tag())
    held.check()
    client.set_registered_model_alias(name, move.alias, move.to)
    found = _version(client.get_registered_model(name).aliases.get(move.alias))
    if found != move.to:
        raise WorkflowError(f"{name}@{move.alias} was moved to {found} by other means at the same moment")


def _failures(client: MlflowClient, version: ModelVersion, now: str | None) -> list[str]:
    stored = version.tags.get("mlmamba.gate")
    if stored is None:
        return ["the version carries no gate: mlmamba did not register it, or an older one did"]
    present, same = None, True
    try:
        gate, mine = read_tag(version.tags, "mlmamba.gate", Gate), _scores(version)
        if now is not None:
            other = client.get_model_version(version.name, now)
            present = _scores(other)
            questions = [v.tags.get("mlmamba.evaluation") for v in (version, other)]
            same = None in questions or questions[0] == questions[1]
    except UnreadableTag as error:
        return [str(error)]
    return gate_failures(gate, mine, present, same)


def _scores(version: ModelVersion) -> dict[str, float]:
    try:
        return read_tag(version.tags, "mlmamba.scores", dict[str, float], {})
    except UnreadableTag as error:
        raise UnreadableTag(f"version {version.version}: {error}") from error


def _exists(client: MlflowClient, name: str, version: str) -> bool:
    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        if absent(error):
            return False
        raise
    return True


def _stamp(tags: dict[str, str]) -> int:
    """Nanoseconds since 1970, made larger than the last move's where that machine's clock is ahead."""
    return max([time.time_ns(), *(move.stamp + 1 for move in history(tags))])


def _when(stamp: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stamp / 1e9))


def _version(version) -> str | None:
    """MLflow gives a version as a string or a number."""
    return None if version is None else str(version)


def gate_failures(
    gate: Gate, scores: Mapping[str, float], holder: Mapping[str, float] | None = None, same_questions: bool = True
) -> list[str]:
    """Compare scores with a gate. Returns one line for each reason against promotion, none when the gate holds.

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
