"""Kubernetes manifests, built by the real kustomize: valid by the published schemas, of one Ray version, with jobs that
are command lines of the command and pools that hold the recipe's workers."""

import copy
import functools
import json
import re
import shlex
import tomllib

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.helpers.manifests import (
    CLUSTER,
    PROJECT,
    cluster_specs,
    entrypoints,
    find,
    kuberay_schema,
    objects,
    pod_templates,
    versions,
)
from workflows.cli import parse
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks import NAMES
from workflows.preflight import check_fit
from workflows.recipe.load import load_any, load_recipe
from workflows.serve.deployment import ServeOptions

KUBERNETES = ("1.31", "1.37")  # the oldest release that KubeRay 1.7 is used with here, and the newest schema
OURS = {f"{o['kind']}/{o['metadata']['name']}": o for folder in ("kuberay", "kubernetes") for o in objects(folder)}
RAY = {name: o for name, o in OURS.items() if o["apiVersion"] == "ray.io/v1"}


def validate(content: dict) -> None:
    """Raise when the object is not one that Kubernetes or KubeRay would take, misspelt fields included."""
    validate_text(json.dumps(content, sort_keys=True))


@functools.cache  # most pods are copies of a few
def validate_text(text: str) -> None:
    content = json.loads(text)
    if content["apiVersion"] == "ray.io/v1":
        jsonschema.validate(content, kuberay_schema())
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(content, version, strict=True)


def pod(template: dict) -> dict:
    """A pod template as an object of its own."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}


@pytest.mark.parametrize("name", OURS)
def test_objects_follow_the_schemas(name):
    validate(OURS[name])
    assert OURS[name]["metadata"].get("namespace", "mlmamba") == "mlmamba"


@pytest.mark.parametrize("name", pod_templates())
def test_pods_follow_the_schema_and_are_not_root(name):
    template = pod_templates()[name]
    validate(pod(template))
    security = template["spec"]["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] > 0
    for container in template["spec"]["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("RayJob/mlmamba-train", ("backOffLimit",), 3),
        ("RayJob/mlmamba-train", ("submissionMode",), "HttpMode"),
        ("RayJob/mlmamba-train", ("rayClusterSpec", "workerGroupSpecs", 0, "maxreplicas"), 1),
        ("RayService/mlmamba-serve", ("upgradeStrategy", "type"), "RollingUpdate"),
        ("RayCronJob/mlmamba-prepare-nightly", ("schedule",), "nightly"),
        ("Deployment/mlflow", ("template", "spec", "containers", 0, "imagee"), "x"),
    ],
)
def test_the_check_finds_mistakes(name, path, value):
    content = copy.deepcopy(OURS[name])
    *parents, last = path
    node = content["spec"]
    for part in parents:
        node = node[part]
    node[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(content)


def test_what_was_asked_for_is_there():
    jobs = {f"RayJob/mlmamba-{name}" for name in ("workflow", "prepare", "train", "evaluate")}
    assert {"RayCluster/mlmamba", "RayService/mlmamba-serve", "RayCronJob/mlmamba-prepare-nightly", *jobs} == set(RAY)


def test_services_that_the_operator_makes_have_names_of_their_own():
    # It names them after the object: NAME-head-svc for a cluster and for a service alike.
    names = [name.partition("/")[2] for name in RAY if name.startswith(("RayCluster", "RayService"))]
    assert len(set(names)) == len(names)


def test_one_version_of_ray():
    wanted = versions()["RAY_VERSION"]
    dependencies = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = [d.partition("==")[2] for d in dependencies if d.startswith("ray[")]
    assert pins == [wanted] == [ray.__version__]
    assert f"ray=={wanted}" in (PROJECT / "constraints.txt").read_text().splitlines()
    for name, spec in cluster_specs().items():
        assert spec["rayVersion"] == wanted, name
    images = [c["image"] for name, t in pod_templates().items() if "Ray" in name for c in t["spec"]["containers"]]
    assert {image.partition(":")[2] for image in images} == {wanted}
    assert {image.partition(":")[0] for image in images} == {"mlmamba-ray-cpu", "mlmamba-ray-gpu"}


def test_versions_are_named_in_one_place():
    values = {name: value for name, value in versions().items() if "." in value and name.endswith("_VERSION")}
    for file in [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".json")]:
        if file.name in ("versions.env", "README.md"):
            continue
        text = file.read_text()
        for name, value in values.items():
            named = re.search(rf"(?<![\d.]){re.escape(value.removeprefix('v'))}(?!\.?\d)", text)
            assert not named or name == "PYTHON_VERSION", f"{file.name} names {name} {value}"


def test_the_written_down_fields_are_those_of_the_named_kuberay():
    assert kuberay_schema()["version"] == versions()["KUBERAY_VERSION"]


@pytest.mark.parametrize("name", cluster_specs())
def test_groups_are_what_the_operator_takes(name):
    spec = cluster_specs()[name]
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "restartPolicy" not in group["template"]["spec"]  # autoscaler v2 takes no other than Never


@pytest.mark.parametrize("name", entrypoints())
def test_entry_points_are_command_lines(name):
    program, *arguments = shlex.split(entrypoints()[name])
    assert program == "mlmamba"
    parsed = parse(arguments)
    assert parsed.storage == mount_of_storage(name)
    if parsed.recipe:
        load_any(parsed.recipe, parsed.set)
    else:
        assert parsed.benchmark in NAMES


@pytest.mark.parametrize("name", ["RayCluster/mlmamba", "RayJob/mlmamba-workflow", "RayJob/mlmamba-train"])
def test_pools_hold_the_workers(name):
    train, nodes = load_recipe("paper").train, list(nodes_of(cluster_specs()[name]))
    check_fit(train, nodes)
    train.workers += 1
    with pytest.raises(WorkflowError):
        check_fit(train, nodes)


def test_the_pool_holds_the_processes_of_the_evaluation():
    arguments = parse(shlex.split(entrypoints()["RayJob/mlmamba-evaluate"])[1:])
    (node,) = nodes_of(cluster_specs()["RayJob/mlmamba-evaluate"])
    assert arguments.workers * arguments.gpus_per_worker == node["GPU"]
    assert arguments.workers * arguments.cpus_per_worker <= node["CPU"]


def nodes_of(spec: dict):
    """Resources of the nodes that a cluster has at its start."""
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for _ in range(group["minReplicas"]):
            yield {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}


def mount_of_storage(name: str) -> str:
    """Where the shared volume is mounted on every node; the same place, and the working folder, on all."""
    found = set()
    for key, template in pod_templates().items():
        if key.startswith(f"{name}/"):
            (claim,) = [v["name"] for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v]
            (container,) = template["spec"]["containers"]
            (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == claim]
            assert container["workingDir"] == mount
            found.add(mount)
    (path,) = found
    return path


def test_the_nightly_job_is_the_one_that_prepares():
    nightly = find("kuberay", "RayCronJob")["spec"]["jobTemplate"]
    assert nightly == find("kuberay", "RayJob", "mlmamba-prepare")["spec"]


def test_the_service_has_a_config_that_ray_serve_and_the_application_take():
    service = find("kuberay", "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config == yaml.safe_load((CLUSTER / "serve" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "workflows.serve.deployment:application"
    options = ServeOptions.model_validate(application.args)
    assert options.storage == mount_of_storage("RayService/mlmamba-serve")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    most = options.autoscaling.max_replicas
    assert most * options.gpus <= group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert most * options.threads <= group["maxReplicas"] * int(limits["cpu"])


def test_what_is_referred_to_is_there():
    claims = {o["metadata"]["name"] for o in OURS.values() if o["kind"] == "PersistentVolumeClaim"}
    maps = {o["metadata"]["name"] for o in OURS.values() if o["kind"] == "ConfigMap"}
    secrets = {o["metadata"]["name"]: set(o["data"]) for o in OURS.values() if o["kind"] == "Secret"}
    for name, template in pod_templates().items():
        spec = template["spec"]
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                assert source.get("configMapRef", source.get("secretRef"))["name"] in maps | {"mlmamba-secrets"}
                assert "configMapRef" in source or source["secretRef"]["optional"]
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or reference["key"] in secrets[reference["name"]], name
    for content in OURS.values():
        if content["kind"] == "Service":
            labels = [t["metadata"].get("labels", {}) for t in pod_templates().values() if "metadata" in t]
            assert any(content["spec"]["selector"].items() <= have.items() for have in labels)


def test_the_registry_of_the_jobs_is_the_server_beside_them():
    uri = find("kuberay", "ConfigMap", "mlmamba-environment")["data"]["MLFLOW_TRACKING_URI"]
    service = find("kubernetes", "Service", "mlflow")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert uri == f"http://{address}"
    (container,) = find("kubernetes", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    allowed = next(v["value"] for v in container["env"] if v["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS")
    assert address in allowed.split(",")


def test_no_pod_gets_variables_named_after_services():
    # A service called mlflow would set MLFLOW_PORT=tcp://..., which MLflow's server takes for its own.
    for name, template in pod_templates().items():
        takes_own = "Ray" in name or "mlflow" in name
        assert not takes_own or template["spec"]["enableServiceLinks"] is False, name


def test_no_secret_is_committed():
    for example in CLUSTER.rglob("*.env.example"):
        for line in example.read_text().splitlines():
            if re.match(r"\w*(PASSWORD|KEY)\w*=", line):
                assert line.endswith("="), f"{example.name}: {line}"
    ignored = (CLUSTER / ".gitignore").read_text().split()
    assert {path.name.removesuffix(".example") for path in CLUSTER.rglob("*.env.example")} <= set(ignored)
