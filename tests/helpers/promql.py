"""Expressions of the dashboards and alert rules, and the metrics that they read."""

import json
from pathlib import Path

import promql_parser
import yaml

from tests.helpers.manifests import CLUSTER

FOLDER = CLUSTER / "monitoring"


def dashboards() -> list[tuple[Path, dict]]:
    """Every Grafana dashboard."""
    return [(path, json.loads(path.read_text())) for path in sorted(FOLDER.glob("grafana-*.json"))]


def expressions() -> list[tuple[str, str]]:
    """Where each expression stands, and the expression; Grafana's variables are filled in."""
    found = []
    for path, content in dashboards():
        for panel in content["panels"]:
            found += [(f"{path.stem}: {panel['title']}", t["expr"].replace("$session", ".*")) for t in panel["targets"]]
        for variable in content["templating"]["list"]:
            if variable["type"] == "query":
                found.append((f"{path.stem}: {variable['name']}", variable["query"].split("(")[1].split(",")[0]))
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        found += [(rule["alert"], rule["expr"]) for rule in group["rules"]]
    return found


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics that an expression reads. Raises ValueError when it is none."""
    names: set[str] = set()

    def visit(node) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
        elif isinstance(node, promql_parser.MatrixSelector):
            names.add(node.vector_selector.name)
        return True

    promql_parser.walk(promql_parser.parse(expression), pre_visit=visit)
    return names
