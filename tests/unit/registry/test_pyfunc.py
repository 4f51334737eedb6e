"""The registered model as MLflow loads and serves it: rows with and without an image, and what is said of a bad one."""

import base64
import io
import json

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("model") / "6", 6)  # one whose answer the image changes


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """The package as registration writes it, loaded by MLflow."""
    package = tmp_path_factory.mktemp("package") / "model"
    mlflow.pyfunc.save_model(
        package,
        python_model=pyfunc.__file__,
        artifacts={"model": str(folder)},
        signature=pyfunc.SIGNATURE,
        pip_requirements=["mlmamba"],
    )
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
