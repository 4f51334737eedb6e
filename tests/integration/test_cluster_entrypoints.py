"""What the manifests start, started: the jobs' command lines as jobs of a Ray cluster of processes, and the service by
its config through the interface that KubeRay's operator uses, both on MLflow's server with a real PostgreSQL and a real
object store. Only names of places, the recipe and the sizes are replaced. Then the metrics that dashboards and alert
rules read are looked for on the nodes."""

import json
import shlex
import time
import urllib.request
from pathlib import Path

import pytest
import requests
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.helpers.manifests import CLUSTER, entrypoints
from tests.helpers.postgres import mlflow_on, programs, running_postgres
from tests.helpers.processes import free_port
from tests.helpers.promql import expressions, metrics_of
from tests.helpers.ray_cluster import RayCluster
from tests.helpers.s3 import running_s3
from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian's package postgresql)"),
]
ORDER = ("prepare", "train", "workflow", "evaluate")
WAIT = 1200  # seconds
KEY = "key-of-this-test"
ONLY_WHEN_IT_HAPPENS = {
    "ray_node_gpus_utilization",  # no GPU here
    "ray_node_gram_used",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, a recipe and the storage folder."""
    root = tmp_path_factory.mktemp("place")
    write_corpus(root)
    write_recipe(root / "toy.yaml", recipe(root))
    return root


@pytest.fixture(scope="module")
def stores():
    with running_postgres() as postgres, running_s3() as s3:
        yield postgres, s3


@pytest.fixture(scope="module")
def registry(stores, tmp_path_factory):
    with mlflow_on(*stores, tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture(scope="module")
def cluster(registry):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLMAMBA_API_KEYS", KEY)  # as the Secret of the manifests gives it to every node
        with RayCluster(workers=2, cpus=2) as running:
            yield running


@pytest.fixture(scope="module")
def scraped(cluster):
    """Names of metrics seen so far; filled while the jobs run."""
    return set()


@pytest.fixture(scope="module")
def jobs(cluster, registry, place, scraped):
    """Every job's command line, run to its end in the order of the work. Returns status and log by name."""
    client, outcomes = JobSubmissionClient(cluster.address, headers=cluster.headers), {}
    for name in ORDER:
        command = adapted(entrypoints()[f"RayJob/mlmamba-{name}"], place)
        job = client.submit_job(entrypoint=command, runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": registry}})
        deadline = time.monotonic() + WAIT
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(2)
            scraped |= scrape(cluster)
        outcomes[name] = (client.get_job_status(job), client.get_job_logs(job))
    return outcomes


@pytest.fixture(scope="module")
def service(cluster, registry, place, jobs):
    """URL of the service, deployed by the config of the RayService."""
    config = yaml.safe_load((CLUSTER / "serve" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    config["proxy_location"] = "HeadOnly"  # the nodes are on one machine, so their proxies would want one port
    arguments = config["applications"][0]["args"]
    arguments |= {"model": "models:/tiny@champion", "storage": str(place / "storage"), "registry": registry}
    arguments |= {"replicas": 1, "autoscaling": {"max_replicas": 2}, "threads": 1, "gpus": 0}
    answer = requests.put(
        f"{cluster.address}/api/serve/applications/", json=config, headers=cluster.headers, timeout=60
    )
    assert answer.ok, answer.text
    deadline, status = time.monotonic() + WAIT, {}
    while status.get("status") not in ("RUNNING", "DEPLOY_FAILED") and time.monotonic() < deadline:
        time.sleep(2)
        status = cluster.get("/api/serve/applications/").json()["applications"].get("mlmamba", {})
    assert status["status"] == "RUNNING", status
    return f"http://127.0.0.1:{config['http_options']['port']}"


def adapted(command: str, place: Path) -> str:
    """A manifest's command line for the toy's recipe, model, storage and size."""
    words = shlex.split(command)
    replaced = {
        "paper": str(place / "toy.yaml"),
        "/storage": str(place / "storage"),
        "models:/ml-mamba@champion": "models:/tiny@champion",
        "--benchmark": "--recipe",
        "gqa": str(place / "toy.yaml"),
    }
    kept = []
    while words:
        word = words.pop(0)
        if word in ("--data", "--workers", "--gpus-per-worker", "--cpus-per-worker"):  # GQA's files and the GPU pool
            words.pop(0)
        else:
            kept.append(replaced.get(word, word))
    return shlex.join(kept)


def scrape(cluster) -> set[str]:
    """Names of the metrics on all nodes now, found as Prometheus finds them."""
    found = set()
    for listing in cluster.folder.rglob("prom_metrics_service_discovery.json"):
        for target in [target for entry in json.loads(listing.read_text()) for target in entry["targets"]]:
            try:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
                    lines = response.read().decode().splitlines()
            except OSError:  # a node that is about to answer
                continue
            found |= {line.split("{")[0].split(" ")[0] for line in lines if line and not line.startswith("#")}
    return found


def ask(service: str, **headers: str) -> requests.Response:
    """A question without an image."""
    body = {"messages": [{"role": "user", "content": "is it red?"}], "max_tokens": 4}
    return requests.post(f"{service}/v1/chat/completions", json=body, headers=headers, timeout=120)


@pytest.mark.parametrize("name", ORDER)
def test_a_jobs_command_line_runs_to_its_end(jobs, name):
    status, log = jobs[name]
    assert status == JobStatus.SUCCEEDED, log[-3000:]


def test_each_job_did_its_part(jobs, place):
    assert "training rows" in jobs["prepare"][1]
    assert "train full" in jobs["train"][1]
    assert jobs["workflow"][1].count("done before, skipped") == 3  # the data and both stages
    assert "is now champion" in jobs["workflow"][1]
    assert "overall" in jobs["evaluate"][1]


def test_the_model_is_in_the_database_and_in_the_object_store(jobs, stores):
    postgres, _ = stores
    assert postgres.rows("SELECT name, alias, version FROM registered_model_aliases") == [("tiny", "champion", 1)]
    ((source,),) = postgres.rows("SELECT storage_location FROM model_versions")
    assert source.startswith("mlflow-artifacts:")


def test_the_service_follows_the_alias_and_wants_a_key(service):
    assert ask(service).status_code == 401
    answer = ask(service, Authorization=f"Bearer {KEY}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == "tiny/1"


def test_every_metric_that_we_watch_is_exported(cluster, service, scraped):
    wanted = {name for _, expression in expressions() for name in metrics_of(expression)} - ONLY_WHEN_IT_HAPPENS
    deadline = time.monotonic() + 120
    while wanted - scraped and time.monotonic() < deadline:
        ask(service, Authorization=f"Bearer {KEY}")
        time.sleep(2)
        scraped |= scrape(cluster)
    assert not wanted - scraped
