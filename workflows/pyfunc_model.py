"""The registered model as an MLflow pyfunc (models from code): a frame of pictures and questions in, answers out."""

import mlflow
from mlflow.pyfunc import PythonModel

from workflows.evaluate.answer import Answerer, Asked


class MLMambaPyfunc(PythonModel):
    """predict takes columns `image` (encoded bytes, or None) and `question`; returns a list of answers."""

    def load_context(self, context) -> None:
        self._answerer = Answerer(context.artifacts["model"], max_new_tokens=64)

    def predict(self, context, model_input, params=None) -> list[str]:
        asked = [Asked(row.image, [row.question]) for row in model_input.itertuples()]
        return [answers[0] for answers in self._answerer.answer(asked)]


mlflow.models.set_model(MLMambaPyfunc())
