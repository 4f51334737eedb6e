"""cluster/README.md: its tables name what lies in the folder, all of it and nothing else."""

import re

from tests.helpers.manifests import CLUSTER, find, objects, pod_templates
from workflows.recipe.load import load_recipe

TEXT = (CLUSTER / "README.md").read_text()
COMPONENT = "app.kubernetes.io/component"


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, its own head left out."""
    part = TEXT.split(f"\n## {heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", part, re.M)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_components_are_the_labels_of_the_manifests():
    named = {name for row in rows("KubeRay") for name in re.findall(r"`(\w+)`", row[0])}
    there = {o["metadata"].get("labels", {}).get(COMPONENT) for o in objects("kuberay")}
    assert named == there - {"base"}  # which the lines above the table apply


def test_every_file_is_said_to_be_run_or_checked():
    patterns = [
        name for row in rows("What was run, and what was only checked") for name in re.findall(r"`([^`]+)`", row[0])
    ]
    known = {path for pattern in patterns for path in CLUSTER.rglob(pattern.rstrip("/"))}
    covered = known | {path for folder in known if folder.is_dir() for path in folder.rglob("*")}
    files = {path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    parts_of_others = re.compile(r"README.md|\.gitignore|versions\.env|kustomization\.yaml|.*\.(example|dockerignore)")
    assert not [str(path) for path in sorted(files - covered) if not parts_of_others.fullmatch(path.name)]
    assert not [pattern for pattern in patterns if not list(CLUSTER.rglob(pattern.rstrip("/")))]


def test_the_pools_and_the_retries_are_as_told():
    train = load_recipe("paper").train
    told = re.search(r"(\d+) workers with (\d+) cores and a GPU each", TEXT)
    assert (int(told[1]), int(told[2]), 1) == (train.workers, train.cpus_per_worker, train.gpus_per_worker)
    assert "up to three times" in TEXT
    jobs = [o for o in objects("kuberay") if o["kind"] == "RayJob"]
    assert {job["spec"]["backoffLimit"] for job in jobs} == {3}
    assert find("kuberay", "RayCronJob")["spec"]["jobTemplate"]["backoffLimit"] == 3
    cluster = find("kuberay", "RayCluster")["spec"]
    limits = {group["groupName"]: (group["minReplicas"], group["maxReplicas"]) for group in cluster["workerGroupSpecs"]}
    assert limits["gpu"][0] == limits["gpu"][1] > 0  # of a fixed size
    assert limits["cpu"][0] == 0 < limits["cpu"][1]  # grows with the work


def test_the_storage_is_where_the_page_says_on_every_node():
    mounts = {
        mount["mountPath"]
        for name, template in pod_templates().items()
        if name.startswith("Ray")
        for container in template["spec"]["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == "storage"
    }
    assert mounts == {"/storage"}
    assert "`/storage`" in TEXT
