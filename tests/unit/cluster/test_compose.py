"""The compose file: the published schema, variables that are all given, no secret in it, services that wait in turn."""

import copy
import re

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from tests.helpers.manifests import CLUSTER, PROJECT, find, versions

FOLDER = CLUSTER / "compose"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
EXAMPLE = dict(line.split("=", 1) for line in (FOLDER / "mlflow.env.example").read_text().splitlines() if "=" in line)


def test_it_follows_the_compose_specification():
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(COMPOSE, schema)
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["mlflow"]["health_check"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_every_variable_is_given_and_a_missing_one_stops_it():
    used = dict(re.findall(r"\$\{(\w+)(:[?-])?", TEXT))
    assert set(used) <= set(versions()) | set(EXAMPLE)
    for name in used:
        assert re.search(rf"\$\{{{name}:[?-]", TEXT), f"{name} may be absent without a word"
    for name, value in EXAMPLE.items():
        assert (value == "") == bool(re.search("PASSWORD|KEY", name)), f"{name}={value}"
        assert name in used


def test_services_tell_how_they_are_and_wait_for_each_other():
    services = COMPOSE["services"]
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert "no-new-privileges:true" in service["security_opt"]
    wanted = {name: {"condition": "service_healthy"} for name in services if name != "mlflow"}
    assert services["mlflow"]["depends_on"] == wanted
    assert {name for name in services if "outside" in services[name]["networks"]} == {"mlflow"}
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "store"):
        assert "ports" not in services[name]
        (volume,) = services[name]["volumes"]
        assert volume.split(":")[0] in COMPOSE["volumes"]


def test_the_server_is_built_from_our_dockerfile():
    build = COMPOSE["services"]["mlflow"]["build"]
    assert (FOLDER / build["context"]).resolve() == PROJECT
    assert (PROJECT / build["dockerfile"]).is_file()


def test_it_gives_the_server_what_kubernetes_gives_it():
    (container,) = find("kubernetes", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    given = COMPOSE["services"]["mlflow"]["environment"]
    assert set(given) == {variable["name"] for variable in container["env"]}
    code = compile((CLUSTER / "docker" / "mlflow_server.py").read_text(), "mlflow_server.py", "exec")
    content: dict = {"__name__": "mlflow_server"}
    exec(code, content)
    assert set(content["NEEDED"]) <= set(given)
    assert content["database"]({**given, "POSTGRES_PASSWORD": "p@s/s"}) == (
        "postgresql+psycopg2://mlflow:p%40s%2Fs@postgres:5432/mlflow"
    )
