"""The registered model as an MLflow pyfunc (models from code): a frame of images and questions in, answers out.

`image` is of any type, because MLflow's scoring server decodes a binary column itself and fails at a row without one.
"""

import base64
import binascii
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import AnyType, ColSpec, Schema

from mlmamba.answering import Answerer, Asked

ROWS = 32  # answered together, so that the memory taken does not grow with the frame
OPTIONS = {"precision": "auto"}
"""Of the package; MLflow lets whoever loads it change those that are there."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image", required=False), ColSpec("string", "question")]),
    outputs=Schema([ColSpec("string")]),
)


class MLMambaPyfunc(PythonModel):
    """predict takes a frame with the column `question` and, where there are images, `image`; one answer per row.

    An image is an encoded file: its bytes, or their base64 as text, which is what JSON holds, also as a data: URI.
    A row with None, NaN or NA for one, and a frame without the column, ask about text alone. What it computes in is
    `mlflow.pyfunc.load_model(..., model_config={"precision": "int8"})`, or another of mlmamba/loading.py.
    """

    def load_context(self, context) -> None:
        precision = (context.model_config or {}).get("precision", "auto")  # None in versions of before it
        self._answerer = Answerer(context.artifacts["model"], max_new_tokens=64, precision=precision)

    def predict(self, context, model_input: pd.DataFrame, params=None) -> list[str]:
        """Answers in the order of the rows. Raises MlflowException that names the first row that cannot be answered."""
        if "question" not in model_input:
            raise _refusal(
                f"there is no column question; there are {', '.join(map(str, model_input.columns)) or 'none'}"
            )
        questions = list(model_input["question"])
        images = list(model_input["image"]) if "image" in model_input else [None] * len(questions)
        asked = [_asked(row, *given) for row, given in enumerate(zip(images, questions, strict=True))]
        pieces = (range(first, min(first + ROWS, len(asked))) for first in range(0, len(asked), ROWS))
        return [answer for piece in pieces for answer in self._answer(piece, asked)]

    def _answer(self, rows: range, asked: list[Asked]) -> list[str]:
        try:
            return [answers[0] for answers in self._answerer.answer([asked[row] for row in rows])]
        except ValueError:  # of an image or a prompt; alone it says which row's
            for row in rows:
                try:
                    self._answerer.check(asked[row])
                except ValueError as error:
                    raise _refusal(f"row {row}: {error}") from error
            raise


def _asked(row: int, image: Any, question: Any) -> Asked:
    if _nothing(question):
        raise _refusal(f"row {row}: there is no question")
    if not isinstance(question, str):
        raise _refusal(f"row {row}: question is {question!r}; expected text")
    if _nothing(image):
        return Asked(None, [question])
    if isinstance(image, str):
        text = image.partition(",")[2] if image.startswith("data:") else image
        try:
            image = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refusal(f"row {row}: image is a text that is not base64 ({error}); give a file's bytes") from error
    if not isinstance(image, bytes | bytearray | memoryview):
        raise _refusal(f"row {row}: image is of type {type(image).__name__}; give a file's bytes, or None for no image")
    return Asked(bytes(image), [question])


def _nothing(value: Any) -> bool:
    """Whether it is None, NaN, NaT or NA."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _refusal(message: str) -> MlflowException:
    return MlflowException(message, INVALID_PARAMETER_VALUE)


mlflow.models.set_model(MLMambaPyfunc())
