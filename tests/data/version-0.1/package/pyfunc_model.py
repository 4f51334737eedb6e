"""The registered model as an MLflow pyfunc (models from code): a frame of pictures and questions in, answers out."""

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import ColSpec, Schema

from workflows.evaluate.answer import Answerer, Asked

ROWS = 32  # answered together, so that the memory taken does not grow with the frame
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image", required=False), ColSpec("string", "question")]),
    outputs=Schema([ColSpec("string")]),
)


class MLMambaPyfunc(PythonModel):
    """predict takes columns `image` (encoded bytes, or None) and `question`; returns one answer per row."""

    def load_context(self, context) -> None:
        self._answerer = Answerer(context.artifacts["model"], max_new_tokens=64)

    def predict(self, context, model_input: pd.DataFrame, params=None) -> list[str]:
        asked = [Asked(row.image, [row.question]) for row in model_input.itertuples()]
        pieces = (asked[first : first + ROWS] for first in range(0, len(asked), ROWS))
        return [answers[0] for piece in pieces for answers in self._answerer.answer(piece)]


mlflow.models.set_model(MLMambaPyfunc())
