"""Images: the linter, what the builds are given, and agreement with the versions that the project is tested with."""

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.helpers.manifests import CLUSTER, PROJECT, find, objects, versions

DOCKER = CLUSTER / "docker"
KINDS = ("cpu", "gpu", "mlflow")
HADOLINT = Path(sys.executable).with_name("hadolint")


def steps(kind: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile and their arguments, continued lines joined, comments left out."""
    lines = [line for line in (DOCKER / f"Dockerfile.{kind}").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def lint(path: Path) -> list[str]:
    done = subprocess.run([HADOLINT, "--format", "json", path], capture_output=True, text=True, timeout=60)
    return [f"{found['code']} line {found['line']}: {found['message']}" for found in json.loads(done.stdout)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_linter_finds_nothing(kind):
    assert lint(DOCKER / f"Dockerfile.{kind}") == []


def test_the_linter_would_find_something(tmp_path):
    text = (DOCKER / "Dockerfile.cpu").read_text()
    (tmp_path / "Dockerfile").write_text(text.replace("USER 1000\nWORKDIR /home/ray", "USER root\nRUN cd /tmp"))
    assert {found.split()[0] for found in lint(tmp_path / "Dockerfile")} >= {"DL3002", "DL3003"}


@pytest.mark.parametrize("kind", KINDS)
def test_images_run_as_a_user_and_hold_no_secret(kind):
    assert [text for name, text in steps(kind) if name == "USER"] == ["1000"]
    for name, text in steps(kind):
        assert name not in ("ARG", "ENV") or not re.search(r"TOKEN|PASSWORD|SECRET|KEY", text, re.I)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_exists_and_nothing_else_is_sent(kind):
    ignore = (DOCKER / f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    sent = [line.removeprefix("!") for line in patterns if line.startswith("!")]
    copies = [text.split()[:-1] for name, text in steps(kind) if name == "COPY" and not text.startswith("--from")]
    sources = {source for copied in copies for source in copied}
    assert patterns[0] == "**"
    for source in sources:
        assert (PROJECT / source).exists()
        assert any(fnmatch.fnmatch(f"{source}/x" if (PROJECT / source).is_dir() else source, p) for p in sent), source
    assert {pattern.removesuffix("/**") for pattern in sent} == sources


def test_torch_goes_first_everywhere():
    for kind in ("cpu", "gpu"):
        runs = [text for name, text in steps(kind) if name == "RUN" and "pip install" in text]
        assert runs[0] == "pip install -c constraints.txt torch setuptools wheel" or "torch torchvision" in runs[0]
    script = (CLUSTER / "ray" / "setup.sh").read_text()
    assert script.index("-c constraints.txt torch") < script.index("'.[quickstart]'")


@pytest.mark.parametrize("kind", KINDS)
def test_builds_are_given_every_version(kind):
    command = [DOCKER / "build.sh", kind, "--pull"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DOCKER": "echo"}, timeout=30)
    assert done.returncode == 0, done.stderr
    given = dict(re.findall(r"--build-arg (\w+)=(\S+)", done.stdout))
    assert given == versions()
    wanted = {text.split("=")[0] for name, text in steps(kind) if name == "ARG" and "=" not in text}
    assert wanted <= set(given)
    assert f"--file cluster/docker/Dockerfile.{kind} " in done.stdout
    tag = re.search(r"--tag (\S+)", done.stdout)[1]
    folder = "kubernetes" if kind == "mlflow" else "kuberay"
    assert f'"{tag}"' in json.dumps(objects(folder)), f"no manifest runs {tag}"


def test_builds_refuse_what_there_is_not():
    done = subprocess.run([DOCKER / "build.sh", "tpu"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "there is no image tpu" in done.stderr


def test_versions_are_those_that_the_project_is_tested_with():
    named = versions()
    constraints = dict(
        line.split("==") for line in (PROJECT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert named["MLFLOW_VERSION"] == constraints["mlflow"] == metadata.version("mlflow")
    assert named["RAY_VERSION"] == constraints["ray"] == metadata.version("ray")
    least = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert named["PYTHON_VERSION"] == least
    if torch.version.cuda is not None:
        assert named["CUDA_VERSION"] == torch.version.cuda
    image = find("kubernetes", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"mlmamba-mlflow:{named['MLFLOW_VERSION']}"


@pytest.mark.parametrize("script", sorted(CLUSTER.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_ones_that_bash_reads_and_can_be_run(script):
    assert subprocess.run(["bash", "-n", script], timeout=30).returncode == 0
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
