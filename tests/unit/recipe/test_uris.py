"""Secrets in URIs are found, and a recipe that has one is refused without repeating it."""

import pytest
import yaml

from tests.helpers.toy_workflow import recipe, write_recipe
from workflows.cli import main
from workflows.errors import UsageError
from workflows.recipe.load import load_any, secret_in, without_secrets
from workflows.submit.bundle import make_shipment

WITH = [
    "s3://AKIA:HIDDEN@bucket/a.json",
    "s3://AKIA:HID/DEN@bucket/a.json",
    "s3://HIDDEN@bucket/a",
    "S3://AKIA:HIDDEN@bucket",
    "https://user:HIDDEN@host/x",
    "https://user:HIDDEN@host:8443/x",
    "https://HIDDEN@host/x",
    "https://:HIDDEN@host/x",
    "abfss://container:HIDDEN@account.dfs.core.windows.net/x",
    "zip::s3://AKIA:HIDDEN@bucket/a.zip",
    "s3://bucket/a?access_key=AKIA&secret_key=HIDDEN",
    "s3://bucket/a?region=x&secretKey=HIDDEN",
    "s3://bucket/a?AWS-Secret-Access-Key=HIDDEN",
    "https://host/x?X-Amz-Signature=HIDDEN",
    "https://host/x?sv=1&sig=HIDDEN",
    "https://host/x#access_token=HIDDEN",
    "gs://bucket/x?json_credentials=HIDDEN",
]
WITHOUT = [
    "s3://bucket/a?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9000",
    "http://127.0.0.1:9000/a@2.json",
    "http://[::1]:9000/a@2.json",
    "gs://anonymous@bucket/x",
    "abfss://container@account.dfs.core.windows.net/x",
    "hdfs://user@name:8020/x",
    "/mnt/a:b@c/x",
    "state-spaces/mamba2-2.7b",
    "https://host/x?tokens=5&keyboard=1&design=2",
]
FIELDS = [
    ("data.train.0", "{{type: llava, annotations: '{}', images: /i}}"),
    ("data.test.0", "{{type: llava, annotations: /a, images: '{}'}}"),
    ("data.train.0", "{{type: parquet, files: [/a, '{}'], caption: b}}"),
    ("data.train.0", "{{type: shards, shards: '{}', caption: txt}}"),
    ("data.exclude_images_of.0", "{{type: llava, annotations: '{}', images: /i}}"),
    ("data.tokenizer.name", "'{}'"),
    ("model.text.weights", "'{}'"),
    ("model.vision.towers.0.weights", "'{}'"),
    ("evaluate.benchmarks", "[{{name: pope, data: '{}'}}]"),
    ("train.nonsense", "'{}'"),
    ("register_as.name", "'{}'"),
    ("data", "'{}'"),
]


@pytest.mark.parametrize("uri", WITH)
def test_a_secret_in_a_uri_is_found_and_not_repeated(uri):
    assert secret_in(uri.removeprefix("zip::"))
    assert "HIDDEN" not in without_secrets(f"cannot open {uri}: no")
    assert "DEN@" not in without_secrets(uri)


@pytest.mark.parametrize("uri", WITHOUT)
def test_what_is_no_secret_is_left_alone(uri):
    assert secret_in(uri) is None
    assert without_secrets(uri) == uri


@pytest.mark.parametrize("uri", [WITH[0], WITH[4], WITH[10]])
@pytest.mark.parametrize(("field", "value"), FIELDS)
@pytest.mark.parametrize("in_file", [False, True])
def test_no_field_of_a_recipe_takes_one(field, value, uri, in_file, tmp_path, capsys):
    content = recipe(tmp_path)
    arguments = ["--set", f"{field}={value.format(uri)}"]
    if in_file:
        *parents, last = field.split(".")
        node = content
        for part, after in zip(parents, field.split(".")[1:], strict=True):
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, [] if after.isdigit() else {})
        value = yaml.safe_load(value.format(uri))
        if isinstance(node, list):
            node.insert(int(last), value)
        else:
            node[last] = value
        arguments = []
    file = write_recipe(tmp_path / "r.yaml", content)
    assert main(["run", str(file), "--dry-run", "--storage", str(tmp_path), *arguments]) == 2
    said = "".join(capsys.readouterr())
    assert "HIDDEN" not in said
    assert "AKIA" not in said
    assert "credentials come from the environment" in said


def test_what_is_wrong_with_a_file_is_told_without_its_lines(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: x\ndata: {train: s3://k:HIDDEN@b/x: y: }}\n")
    with pytest.raises(UsageError, match=r"is not valid YAML: .* in line 2, column") as told:
        load_any(str(file))
    assert "HIDDEN" not in str(told.value)


def test_neither_root_nor_storage_of_a_job_holds_one(tmp_path):
    content = recipe(tmp_path)
    content["data"]["train"][0] |= {"annotations": "my/train.json"}
    file = str(write_recipe(tmp_path / "r.yaml", content))
    for storage, root in (("/s", WITH[0]), ("/s", WITH[10]), (WITH[0], "/d"), (WITH[10], "/d")):
        with pytest.raises(UsageError, match="environment") as told:
            make_shipment(file, [], storage, "run", root, [])
        assert "HIDDEN" not in str(told.value)
