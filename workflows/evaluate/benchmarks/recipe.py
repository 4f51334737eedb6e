"""The test sources of a recipe as a benchmark."""

from workflows.config import Recipe
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks.base import Item
from workflows.evaluate.benchmarks.own_data import OwnData
from workflows.evaluate.questions import majority_answer


class TestSources(OwnData):
    """`data.test` of a recipe. The majority answer is that of its training sources.

    Raises:
        WorkflowError: there are no test sources, or a record cannot be asked.
    """

    __test__ = False  # not a test of pytest's, whatever its name
    name = "recipe"

    def __init__(self, recipe: Recipe):
        if not recipe.data.test:
            raise WorkflowError(f"recipe {recipe.name} has no data.test sources to evaluate on")
        self._recipe = recipe
        self.max_new_tokens = recipe.evaluate.max_new_tokens
        super().__init__(recipe.name)

    @property
    def title(self) -> str:
        return self._recipe.name

    def read(self, data: str, images: str | None) -> list[Item]:
        return self.from_sources(self._recipe.data.test)

    def majority(self) -> str:
        return majority_answer(self._recipe.data.train)
