"""What a finished evaluation gets besides its scores, and where it is kept: intervals, report, MLflow."""

import json
import math
import time
from pathlib import Path

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from workflows.evaluate.intervals import find_intervals
from workflows.evaluate.report import write_report
from workflows.evaluate.results import SCORES, read_answers, read_scores, write_scores
from workflows.layout import write_atomic

REPORT = "report"
_AT_ONCE = 500  # metrics in one request
_KEPT = "mlmamba.scores"  # the tag of a version that promotion reads


def finish(folder: Path, facts: dict[str, str]) -> dict:
    """Add intervals to scores.json and write the report, unless they are there. Returns the content of scores.json.

    Args:
        folder: of a finished evaluation.
        facts: for the report's head, by name.
    """
    result, intervals = read_scores(folder), None
    if "intervals" not in result:
        intervals = find_intervals(result, read_answers(folder))
        result["intervals"] = intervals.flat()
        write_scores(folder, result)
    if not (folder / REPORT / "done").exists():
        write_report(folder, folder / REPORT, facts, intervals)
        write_atomic(folder / REPORT / "done", "")
    return result


def flat_scores(result: dict, prefix: str = "") -> dict[str, float]:
    """All numbers of an evaluation under flat names, as a gate takes them: scores, and the ends of their intervals.

    Blind scores are called "blind/overall", ..., the majority's "majority/overall", ...
    """
    found = {**result["scores"], **result.get("intervals", {})}
    for part in ("blind", "majority"):
        found |= {f"{part}/{name}": value for name, value in result[part].items()}
    return {f"{prefix}{name}": value for name, value in found.items() if math.isfinite(value)}


def log_evaluation(client: MlflowClient, run_id: str, name: str, folder: Path, result: dict) -> None:
    """Log an evaluation to a run: its numbers under NAME/..., its files under evaluation/NAME.

    Args:
        name: of the benchmark; metrics of a partial one are called NAME/partial/...
    """
    prefix = f"{name}/" if result.get("complete", True) else f"{name}/partial/"
    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, 0) for key, value in flat_scores(result, prefix).items()]
    for first in range(0, len(metrics), _AT_ONCE):
        client.log_batch(run_id, metrics=metrics[first : first + _AT_ONCE])
    client.log_artifact(run_id, str(folder / SCORES), f"evaluation/{name}")
    for file in sorted((folder / REPORT).glob("*")):
        if file.suffix in (".html", ".png"):
            client.log_artifact(run_id, str(file), f"evaluation/{name}")


def log_to_version(client: MlflowClient, name: str, version: str, benchmark: str, folder: Path, result: dict) -> None:
    """Log an evaluation to the run of a model version, and add its scores to those that promotion looks at.

    A partial evaluation is logged, but never a reason to promote.
    """
    found = client.get_model_version(name, version)
    log_evaluation(client, found.run_id, benchmark, folder, result)
    if result.get("complete", True):
        kept = result["scores"] | result.get("intervals", {})
        known = json.loads(found.tags.get(_KEPT, "{}"))
        known |= {f"{benchmark}/{key}": value for key, value in kept.items()}
        client.set_model_version_tag(name, version, _KEPT, json.dumps(known))
