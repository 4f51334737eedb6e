"""A recipe made ready to travel, and every mistake that is told before anything is sent."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from tests.helpers.toy_workflow import recipe, write_recipe
from workflows.cli import main
from workflows.errors import UsageError
from workflows.recipe.load import RECIPES, load_any, load_recipe
from workflows.storage.layout import run_name
from workflows.submit.bundle import _text, make_shipment

SHIPPED = sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


def ship(file, *overrides, storage="/shared", verb="run", root=None, env=()):
    return make_shipment(str(file), list(overrides), storage, verb, root, list(env))


@pytest.fixture
def file(tmp_path):
    return write_recipe(tmp_path / "tiny.yaml", recipe(tmp_path))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_in_one_piece_is_the_same_recipe(name, tmp_path):
    loaded = load_any(name)
    (tmp_path / "recipe.yaml").write_text(_text(loaded))
    again = load_any(str(tmp_path / "recipe.yaml"))
    assert again.model_dump() == loaded.model_dump()  # all but the name of the preset, whose parts are written out


def test_overrides_and_named_data_travel_within_the_recipe(file):
    shipment = ship(file, "train.stages.1.steps=7")
    content = yaml.safe_load(shipment.made["recipe.yaml"])
    assert content["train"]["stages"][1]["steps"] == 7
    assert shipment.arguments == ["run", "_job/recipe.yaml", "--storage", "/shared"]
    assert shipment.submission.run == run_name(load_recipe(str(file), ["train.stages.1.steps=7"]))


def test_storage_may_be_an_object_store_but_not_with_a_password(file):
    uri = "s3://bucket/lab?region=us-east-1&scheme=http"
    assert ship(file, storage=uri).arguments[-1] == uri
    assert ship(file, storage=uri).submission.prefix != ship(file).submission.prefix
    with pytest.raises(UsageError, match=r"s3://bucket/lab: leave the user and password out") as told:
        ship(file, storage="s3://key:hidden@bucket/lab")
    assert "hidden" not in str(told.value)


def test_a_workflow_is_known_by_its_recipe_and_storage(file):
    one = ship(file).submission
    assert ship(file, "train.log_every=9").submission == one  # how it is run is not what it is
    assert ship(file, "seed=8").submission.prefix != one.prefix
    assert ship(file, storage="/other").submission.prefix != one.prefix


def test_what_the_job_looks_for_is_what_the_project_declares(file):
    wanted = json.loads(ship(file).made["submission.json"])
    assert {"torch", "ray", "deepspeed", "mlflow"} <= wanted["packages"].keys()
    assert not {"mamba-ssm", "pytest"} & wanted["packages"].keys()  # extras
    assert wanted["python"] == "3.11"


def test_relative_data_needs_the_folder_where_the_nodes_see_it(tmp_path):
    content = recipe(tmp_path)
    content["data"]["train"][0] |= {"annotations": "my/train.json", "images": "my/images"}
    file = write_recipe(tmp_path / "r.yaml", content)
    with pytest.raises(UsageError, match=r"2 paths .*data.train.0.annotations: my/train.json.*--data-root"):
        ship(file)
    with pytest.raises(UsageError, match="--data-root there: give an absolute path"):
        ship(file, root="there")
    placed = yaml.safe_load(ship(file, root="/data").made["recipe.yaml"])["data"]["train"][0]
    assert (placed["annotations"], placed["images"]) == ("/data/my/train.json", "/data/my/images")
    placed = yaml.safe_load(ship(file, root="s3://bucket/x").made["recipe.yaml"])["data"]["train"][0]
    assert placed["annotations"] == "s3://bucket/x/my/train.json"


def test_the_papers_recipe_ships_with_a_data_root():
    shipment = ship("paper", root="/mnt")
    text = shipment.made["recipe.yaml"]
    assert "/mnt/data/LLaVA-Pretrain/images.zip" in text
    assert "state-spaces/mamba2-2.7b" in text  # a hub name stays one


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RECIPE", "--storage", "/s"], 2, "--address is missing"),
        (["RECIPE", "--address", "http://127.0.0.1:1"], 2, "--storage is missing"),
        (["RECIPE", "--address", "http://127.0.0.1:1", "--storage", "storage"], 2, "give an absolute path"),
        (["RECIPE", "--address", "ray://head:10001", "--storage", "/s"], 2, "give the dashboard's of the head node"),
        (
            ["RECIPE", "--address", "http://127.0.0.1:1", "--storage", "/s"],
            1,
            "cannot reach a Ray cluster at http://127",
        ),
        (["RECIPE", "--address", "A", "--storage", "/s", "--set", "train.worker=1"], 2, "did you mean 'workers'?"),
        (["RECIPE", "--address", "A", "--storage", "/s", "--env", "NOT_THERE"], 2, "there is no such variable"),
        (["RECIPE", "--stop", "x", "--address", "A"], 2, "either a RECIPE, or one of"),
        (["--address", "A"], 2, "either a RECIPE, or one of"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(arguments, code, message, file, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", *(str(file) if a == "RECIPE" else a for a in arguments)]) == code
    assert message in capsys.readouterr().err


def test_a_password_in_the_tracking_address_is_not_shown_to_the_cluster(file, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@host")
    with pytest.raises(UsageError, match="holds a password") as error:
        ship(file)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://host")
    assert ship(file).env == {"MLFLOW_TRACKING_URI": "https://host"}


@pytest.fixture
def something_else():
    """An HTTP server that answers every question alike: what a cluster of another version, or no cluster, says."""
    answer = {"body": b"", "code": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["code"])
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield answer, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (200, b'{"ray_version": "2.9.0"}', "runs Ray 2.9.0, this code was tested with"),
        (200, b"<html>hello</html>", "is no Ray cluster's dashboard"),
        (200, b"[]", "is no Ray cluster's dashboard"),
        (401, b"", "wants a token"),
        (403, b"", "wants a token"),
    ],
)
def test_what_is_no_cluster_of_ours_is_told(code, body, message, something_else, file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token-here"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    answer, address = something_else
    answer |= {"code": code, "body": body}
    assert main(["submit", str(file), "--address", address, "--storage", "/s"]) == 1
    assert message in capsys.readouterr().err
