"""The registered model as MLflow loads and serves it: rows with and without an image, and what is said of a bad one."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from tests.helpers.swap_models import QUESTION, answer_of, write_model
from workflows.registry import pyfunc
from workflows.registry.register import carried


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("model") / "6", 6)  # one whose answer the image changes


@pytest.fixture(scope="module")
def package(folder, tmp_path_factory) -> Path:
    """The package as registration writes it."""
    package = tmp_path_factory.mktemp("package") / "model"
    mlflow.pyfunc.save_model(
        package,
        python_model=pyfunc.__file__,
        artifacts={"model": str(folder)},
        signature=pyfunc.SIGNATURE,
        model_config=pyfunc.OPTIONS,
        **carried(),
    )
    return package


@pytest.fixture(scope="module")
def model(package):
    """The package loaded by MLflow."""
    return mlflow.pyfunc.load_model(str(package))


@pytest.fixture(scope="module")
def client(model):
    with TestClient(scoring_server.init(model), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def expected(folder, image) -> tuple[str, str]:
    """The answers with the image and without."""
    found = answer_of(folder, QUESTION, image, 64), answer_of(folder, QUESTION, None, 64)
    assert found[0] != found[1]
    return found


_ALONE = """
import sys
sys.path.append(sys.argv[1])  # the packages, without what makes an editable checkout importable
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[2])
print(model.predict(pandas.DataFrame({"question": [sys.argv[3]]})))
import mlmamba
print(mlmamba.__file__)
print([name for name in sys.modules if name.split(".")[0] in ("workflows", "pipelines", "ray", "deepspeed")])
"""


def test_a_version_is_loaded_where_there_is_no_checkout(package, expected, tmp_path):
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-I", "-S", "-c", _ALONE, packages, str(package), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, place, others = done.stdout.splitlines()[-3:]
    assert answer == str([expected[1]])
    assert Path(place).is_relative_to(package)
    assert others == "[]"


def test_it_asks_for_versions_of_what_it_imports_and_for_no_package_of_ours(package):
    wanted = dict(line.split("==") for line in (package / "requirements.txt").read_text().splitlines())
    assert "mlmamba" not in wanted
    assert all(re.fullmatch(r"[\d.]+\w*", version) for version in wanted.values()), wanted
    files = [package / "pyfunc.py", *(package / "code" / "mlmamba").rglob("*.py")]
    assert len(files) > 40
    imported = {name.split(".")[0] for file in files for name in _imports(ast.parse(file.read_text()))}
    known = {"pillow": "PIL", "huggingface-hub": "huggingface_hub"}
    available = {known.get(name, name) for name in wanted} | sys.stdlib_module_names | {"mlmamba"}
    # On a GPU, where they are installed; and for `mlmamba convert`, which a version is not asked for.
    assert imported - available == {"mamba_ssm", "causal_conv1d", "triton"} | {"gguf"}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("nothing", [None, np.nan, float("nan"), pd.NA, pd.NaT], ids=repr)
def test_a_row_without_an_image_asks_about_text_alone(model, image, expected, nothing):
    frame = pd.DataFrame({"image": pd.Series([image, nothing], dtype=object), "question": [QUESTION] * 2})
    assert model.predict(frame) == list(expected)


def test_a_frame_without_the_column_and_an_empty_one_are_answered(model, expected):
    assert model.predict(pd.DataFrame({"question": [QUESTION]})) == [expected[1]]
    assert model.predict(pd.DataFrame({"question": pd.Series([], dtype=str)})) == []


def test_bytes_and_their_base64_are_the_same_image(model, image, expected):
    text = base64.b64encode(image).decode()
    given = [image, bytearray(image), text, base64.encodebytes(image).decode(), f"data:image/png;base64,{text}"]
    assert model.predict(pd.DataFrame({"image": given, "question": QUESTION})) == [expected[0]] * 5


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", b"no image", r"row 33: .*image"),
        ("image", b"", r"row 33: "),
        ("image", "not base64!", "row 33: image is a text that is not base64"),
        ("image", 5, "row 33: image is of type (int|float)"),
        ("image", [1, 2], "row 33: image is of type list"),
        ("question", None, "row 33: there is no question"),
        ("question", "", "row 33: "),
        ("question", "word " * 400, "row 33: .*over the limit"),
    ],
)
def test_an_error_names_its_row(model, image, column, value, message):
    rows = [{"image": None, "question": QUESTION} for _ in range(35)]
    rows[33][column] = value
    with pytest.raises(MlflowException, match=message):
        model.predict(pd.DataFrame(rows))


@pytest.mark.parametrize("key", ["dataframe_records", "dataframe_split", "instances", "inputs"])
@pytest.mark.parametrize("rows", ["without the column", "null", "both"])
def test_the_scoring_server_answers_text_and_images(client, image, expected, key, rows):
    text = base64.b64encode(image).decode()
    column = {"without the column": None, "null": [None, None], "both": [text, None]}[rows]
    frame = pd.DataFrame({"question": [QUESTION] * 2} | ({} if column is None else {"image": column}), dtype=object)
    orient = {"dataframe_split": "split", "inputs": "list"}.get(key, "records")
    body = {key: json.loads(json.dumps(frame.to_dict(orient)))}
    answer = client.post("/invocations", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"] == [expected[0] if rows == "both" else expected[1], expected[1]]


def test_the_scoring_server_says_which_row_is_wrong(client):
    rows = [{"question": QUESTION}, {"question": QUESTION, "image": "bm8gaW1hZ2U="}]
    answer = client.post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 400
    assert "row 1: " in answer.text


def test_whoever_loads_it_chooses_what_it_computes_in(package, model, image):
    small = mlflow.pyfunc.load_model(str(package), model_config={"precision": "int8"})
    prepared = [loaded.unwrap_python_model()._answerer.model.prepared for loaded in (model, small)]
    assert [one.precision for one in prepared] == ["fp32", "int8"]
    assert len(small.predict(pd.DataFrame({"question": [QUESTION], "image": [image]}))) == 1
