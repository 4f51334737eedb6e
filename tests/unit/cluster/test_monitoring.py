"""Dashboards and alert rules: expressions that Prometheus can parse, over metrics that Ray and the service export, and
rules that fire when they should (Prometheus' own promtool, where it is installed)."""

import shutil
import subprocess

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from tests.helpers.manifests import CLUSTER
from tests.helpers.promql import dashboards, expressions, metrics_of
from workflows.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS

FOLDER = CLUSTER / "monitoring"
EXPORTED = (CLUSTER.parent / "tests" / "data" / "ray_metrics.txt").read_text().splitlines()
OURS = {*COUNTERS, *GAUGES, *(f"{name}_bucket" for name in HISTOGRAMS)}
GPU = {f"ray_{name}" for name in METRICS_GAUGES if "gpu" in name or "gram" in name}  # absent on a node without one
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)"
)


def test_there_is_a_dashboard_for_each_part():
    assert [path.name for path, _ in dashboards()] == [
        "grafana-preparation.json",
        "grafana-serving.json",
        "grafana-training.json",
    ]
    assert len({content["uid"] for _, content in dashboards()}) == 3


@pytest.mark.parametrize("content", [pytest.param(c, id=path.stem) for path, c in dashboards()])
def test_dashboards_can_be_imported_and_their_panels_do_not_overlap(content):
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(content)
    variables = {variable["name"]: variable for variable in content["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            assert "$session" in target["expr"]  # one cluster among several
            assert target["legendFormat"]
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
    assert len({panel["title"] for panel in content["panels"]}) == len(content["panels"])


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_expressions_parse_and_their_metrics_are_exported(where, expression):
    for name in metrics_of(expression):
        if name.startswith("ray_mlmamba_"):
            assert name.removeprefix("ray_") in OURS
        else:
            assert name in EXPORTED or name in GPU


def test_the_check_finds_metrics_that_there_are_not():
    assert metrics_of("sum(rate(ray_mlmamba_request_total[5m])) / on() ray_nodes") == {
        "ray_mlmamba_request_total",
        "ray_nodes",
    }
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        metrics_of("sum(rate(x[5m])")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_rules_say_how_urgent_they_are_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "action"}


def test_every_rule_has_a_test_in_which_it_fires():
    content = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())
    fires = {case["alertname"] for test in content["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fires == {rule["alert"] for rule in RULES}


@needs_promtool
def test_rules_fire_when_they_should():
    for arguments in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_config(tmp_path):
    content = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    for job in content["scrape_configs"]:
        if job.pop("kubernetes_sd_configs", None):  # Debian's Prometheus is built without it
            job["static_configs"] = [{"targets": ["localhost:8080"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(FOLDER / "alerts.yaml", tmp_path)
    command = ["promtool", "check", "config", "prometheus.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
