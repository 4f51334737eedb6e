"""What the registry holds, for a person."""

import time

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.manifest import Manifest
from workflows.registry.history import read_tag
from workflows.registry.models import Reference, get_model, get_version, reachable, row
from workflows.registry.promote import Promotion


def version_lines(rows: list[dict]) -> list[str]:
    """One line for each version: name/version, aliases, scores."""
    lines = []
    for version in rows:
        aliases = ",".join(version["aliases"]) or "-"
        marks = [text for key, text in (("forced", " forced"), ("refused", " refused by serving")) if key in version]
        marks += [f" unreadable: {tag}" for tag in version.get("unreadable", ())]
        lines.append(
            f"{version['name']}/{version['version']:<4} {aliases:<12} {_scores(version['scores'])}{''.join(marks)}"
        )
    return lines


def model_text(content: dict) -> str:
    """One model: versions, then moves of its aliases, newest last."""
    moves = [f"  {_move_line(move)}" for move in content["moves"]]
    return "\n".join([*version_lines(content["versions"]), "", "moves", *(moves or ["  none by mlmamba"])])


def version_text(row: dict) -> str:
    """One version in full."""
    gate = row["gate"] or {}
    conditions = [f"{kind} {name} {value:g}" for kind, values in gate.items() for name, value in values.items()]
    lines = [
        f"model    {row['name']}/{row['version']}" + "".join(f" @{alias}" for alias in row["aliases"]),
        f"scores   {_scores(row['scores']) or '-'}",
        f"gate     {', '.join(conditions) or ('none' if row['gate'] is None else 'no conditions')}",
        f"data     {row['data_digest'] or '-'}",
        f"recipe   {row['recipe'] or '-'}" + (f" (runs:/{row['run_id']}/recipe.yaml)" if row["run_id"] else ""),
        f"git      {row['git'] or '-'}",
        f"run      {row['run_id'] or '-'}",
        f"created  {_time(row['registered'] / 1e3)}",
    ]
    for alias, record in row.get("forced", {}).items():
        lines.append(f"forced   @{alias} {record['when']} by {record['who']}: {record['why']}")
        lines += [f"           {failure}" for failure in record["gate_failures"]]
    if "refused" in row:
        refused = row["refused"]
        lines.append(f"refused  {refused['when']} by {refused['who']}: {refused['why']}")
    lines += [f"tag      {tag} cannot be read" for tag in row.get("unreadable", ())]
    return "\n".join(lines)


def promotion_text(done: Promotion) -> str:
    """What a promotion or rollback did."""
    name = f"{done.name}/{done.version}"
    if not done.holds:
        failures = "\n".join(f"  {failure}" for failure in done.gate_failures)
        holder = f"version {done.previous} stays" if done.previous else "no version holds it"
        return (
            f"{name} is not promoted to @{done.alias} ({holder}); the gate:\n{failures}\n"
            "to promote it all the same: --force --reason TEXT"
        )
    if not done.moved:
        return f"{name} is @{done.alias} already"
    text = f"{name} is now @{done.alias}" + (f" (was version {done.previous})" if done.previous else "")
    if done.forced:
        text += "\nthe gate was passed over:" + "".join(f"\n  {failure}" for failure in done.gate_failures)
    return text


def lineage_text(content: dict) -> str:
    """Shards -> run -> model."""
    run, model = content["run"], content["model"]
    lines = ["shards"]
    for data in content["data"]:
        lines += [
            f"  {data['name']}: {data['rows']:,} rows, {data['tokens']:,} tokens in {data['shards']} shards"
            f" (stages {', '.join(data['stages'])})",
            f"    {data['digest']}",
            f"    {data['folder']} ({_STATES[data['state']]})",
        ]
    if not content["data"]:
        lines.append("  not recorded")
    lines.append("run")
    if run is None:
        lines.append("  not recorded")
    else:
        lines.append(f"  {run['run_id']} {run['name']}, {run['status'].lower()}, started {_time(run['started'] / 1e3)}")
        lines.append(f"    recipe {run['recipe']}, git {run['git']}")
        lines += [f"    {text}" for text in run["stages"].values()]
    lines.append("model")
    lines += [f"  {line}" for line in version_text(model).splitlines()]
    lines.append(f"  key      {model['key'] or '-'}")
    return "\n".join(lines)


_STATES = {"there": "still there, unchanged", "changed": "CHANGED since", "gone": "gone"}


def _scores(scores: dict[str, float]) -> str:
    """Without the ends of intervals, which are scores too."""
    shown = {
        name: f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"
        for name, value in scores.items()
        if not name.endswith(("/low", "/high"))
    }
    return " ".join(f"{name} {value}" for name, value in shown.items())


def _move_line(move: dict) -> str:
    was = f" (was {move['was']})" if move["was"] else ""
    why = f": {move['why']}" if move["why"] else ""
    forced = " FORCED" if move["forced"] else ""
    what = f"{move['kind']} @{move['alias']} to {move['to']}"
    return f"{_time(move['stamp'] / 1e9)} {what}{was} by {move['who']}{forced}{why}"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def lineage(client: MlflowClient, reference: str | Reference) -> dict:
    """Data sets, run and model behind NAME@ALIAS or NAME/VERSION.

    Returns:
        {"data": [...], "run": {...} or None, "model": {...}}. A data set's `state` says whether its folder still holds
        what was trained on: "there", "changed" or "gone".

    Raises:
        UsageError, WorkflowError: as get_version does.
    """
    version = get_version(client, reference)
    aliases = [
        a for a, number in get_model(client, version.name).aliases.items() if str(number) == str(version.version)
    ]
    data = [{**entry, "state": _state(entry)} for entry in read_tag(version.tags, "mlmamba.data", list[dict], [])]
    model = row(version, aliases) | {"key": version.tags.get("mlmamba.model"), "source": version.source}
    return {"data": data, "run": _run(client, version.run_id), "model": model}


def _state(entry: dict) -> str:
    try:
        return "there" if Manifest.load(entry["folder"]).digest == entry["digest"] else "changed"
    except (FileNotFoundError, ValueError):
        return "gone"


def _run(client: MlflowClient, run_id: str | None) -> dict | None:
    if not run_id:
        return None
    try:
        with reachable():
            run = client.get_run(run_id)
    except MlflowException:  # deleted
        return None
    tags = run.data.tags
    prefix = "mlmamba.stage."
    return {
        "run_id": run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "git": tags.get("mlmamba.git"),
        "recipe": tags.get("mlmamba.recipe"),
        "stages": {key.removeprefix(prefix): tags[key] for key in tags if key.startswith(prefix)},
        "started": run.info.start_time,
    }
