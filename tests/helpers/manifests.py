"""What the files of cluster/ say, read as their own tools read them: kustomize builds, versions, entry points."""

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
PROJECT = CLUSTER.parent
KUBERAY_FIELDS = Path(__file__).parents[1] / "data" / "kuberay.json"
KUBECTL = Path(sys.executable).with_name("kubectl")


def versions() -> dict[str, str]:
    """The versions that cluster/ names, by name."""
    lines = (CLUSTER / "versions" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@functools.cache
def built(folder: str) -> str:
    """YAML that `kubectl kustomize` makes of cluster/FOLDER, with the examples of secrets filled in."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "cluster"
        shutil.copytree(CLUSTER, copy)
        for example in copy.rglob("secrets.env.example"):
            names = [line for line in example.read_text().splitlines() if line.endswith("=")]
            example.with_name("secrets.env").write_text("".join(f"{name}some-secret\n" for name in names))
        command = [str(KUBECTL), "kustomize", str(copy / folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def objects(folder: str) -> tuple[dict, ...]:
    """Every object of cluster/FOLDER as it would be applied. They are shared: copy before a change."""
    return tuple(content for content in yaml.load_all(built(folder), yaml.CSafeLoader) if content)


def find(folder: str, kind: str, name: str | None = None) -> dict:
    """The one object of a kind (and a name)."""
    found = [o for o in objects(folder) if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, [o["metadata"]["name"] for o in found]
    return found[0]


def cluster_specs() -> dict[str, dict]:
    """Every description of a Ray cluster, by the object that holds it."""
    specs = {}
    for content in objects("kuberay"):
        spec, name = content.get("spec", {}), f"{content['kind']}/{content['metadata']['name']}"
        if content["kind"] == "RayCluster":
            specs[name] = spec
        elif content["kind"] == "RayService":
            specs[name] = spec["rayClusterConfig"]
        elif content["kind"] in ("RayJob", "RayCronJob"):
            specs[name] = spec.get("jobTemplate", spec)["rayClusterSpec"]
    return specs


def entrypoints() -> dict[str, str]:
    """Command lines of the jobs, by the object that holds them."""
    jobs = [o for o in objects("kuberay") if o["kind"] in ("RayJob", "RayCronJob")]
    return {
        f"{job['kind']}/{job['metadata']['name']}": job["spec"].get("jobTemplate", job["spec"])["entrypoint"]
        for job in jobs
    }


def pod_templates() -> dict[str, dict]:
    """Every pod that any manifest starts, by the object and group that holds it."""
    found = {}
    for name, spec in cluster_specs().items():
        found[f"{name}/head"] = spec["headGroupSpec"]["template"]
        found |= {f"{name}/{group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    for content in objects("kubernetes"):
        if content["kind"] in ("Deployment", "StatefulSet"):
            found[f"{content['kind']}/{content['metadata']['name']}"] = content["spec"]["template"]
    return found


def kuberay_schema() -> dict:
    """JSON Schema of the fields that we use of KubeRay's resources."""
    return json.loads(KUBERAY_FIELDS.read_text())
