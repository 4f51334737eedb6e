"""Where a version comes from: shards -> run -> model."""

import json

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.manifest import Manifest
from workflows.registry.errors import reachable
from workflows.registry.find import Reference, get_model, get_version, row


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
    data = [{**entry, "state": _state(entry)} for entry in json.loads(version.tags.get("mlmamba.data", "[]"))]
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
