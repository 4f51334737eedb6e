"""The files for Ray's cluster launcher: Ray's own validator, Ray's own command line, the recipe's workers."""

import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from tests.helpers.manifests import CLUSTER
from workflows.preflight import check_fit
from workflows.recipe.load import load_recipe

FILES = sorted((CLUSTER / "ray").glob("*.yaml"))
GPU_MACHINES = {"p4d.24xlarge": {"CPU": 96, "GPU": 8}}
"""What a machine of EC2 has (Amazon's table of accelerated instances); Ray asks EC2 for it."""


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text())


def test_there_is_one_for_each_kind_of_place():
    assert [file.stem for file in FILES] == ["aws", "gcp", "on-premise"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_takes_it(file):
    config = prepare_config(read(file))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"setup_command": []})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_start_commands_are_those_of_ray_and_of_the_installed_environment(file):
    config = read(file)
    for part, first in (("head_start_ray_commands", "--head"), ("worker_start_ray_commands", "--address=")):
        stop, start = config[part]
        assert stop.endswith("/mlmamba-venv/bin/ray stop")
        before, _, options = start.partition(" ray start ")
        assert "cd /storage" in before
        assert "PATH=$HOME/mlmamba-venv/bin" in before
        assert options.startswith(first)
        scripts.start.make_context("start", shlex.split(options))  # raises for an option that there is not
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nodes_are_set_up_by_the_script_that_travels_with_the_code(file):
    config = read(file)
    (command,) = config["setup_commands"]
    program, script, folder = shlex.split(command)
    assert (program, config["file_mounts"]) == ("bash", {folder: "."})
    assert CLUSTER.parent.joinpath(Path(script).relative_to(folder)).stat().st_mode & 0o111
    assert {".git", ".venv", "storage"} <= set(config["rsync_exclude"])


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_there_is_a_pool_for_preparation_and_one_that_holds_the_papers_workers(name):
    types = read(CLUSTER / "ray" / f"{name}.yaml")["available_node_types"]
    assert types["cpu"]["min_workers"] == 0 < types["cpu"]["max_workers"]
    assert types["gpu"]["min_workers"] == types["gpu"]["max_workers"]  # a workflow refuses a cluster that lacks them
    resources = types["gpu"]["resources"] or GPU_MACHINES[types["gpu"]["node_config"]["InstanceType"]]
    check_fit(load_recipe("paper").train, [resources] * types["gpu"]["min_workers"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_has_to_be_changed_says_so(file):
    text = file.read_text()
    header = text[: text.index("cluster_name")]
    assert "CHANGE-ME" in header
    assert not re.search(r"ami-[0-9a-f]{8}|fs-[0-9a-f]{8}|\d+\.\d+\.\d+\.\d+(?<!127\.0\.0\.1)", text)
