"""What the recipe's test sources, LLaVA files and the project's shards share: one answer, exact match."""

from collections.abc import Iterable

from pipelines.config import SourceConfig
from pipelines.identity import digest
from pipelines.sources import open_source
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, Item, Score
from workflows.evaluate.benchmarks.files import PictureFolder
from workflows.evaluate.questions import Picture, load_questions
from workflows.evaluate.score import normalise


class OwnData(Benchmark):
    """Share of exact answers (without case, outer space and a last full stop), overall and by type of question."""

    twice = "give every record an id of its own, or, in a recipe, the source `repeated_ids: number`"

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        return Score(float(normalise(prediction) == normalise(item.answer)))

    def from_sources(self, sources: list[SourceConfig]) -> list[Item]:
        """The questions of some sources; pictures that are known not to be there go to `missing`.

        Raises:
            WorkflowError: a record cannot be asked.
        """
        self.stores = [{"kind": "source", "config": config.absolute().model_dump(mode="json")} for config in sources]
        try:
            pictures = load_questions(sources)
            readers = [open_source(config) for config in sources]
            self.digest = digest([[config.reader_fields() for config in sources], [r.fingerprint() for r in readers]])
        except (ValueError, OSError) as error:
            raise WorkflowError(str(error)) from error
        self.missing |= _not_there(sources, pictures)
        return [
            Item(key, question, question, [answer], answer, kind, picture.location, picture.source)
            for picture in pictures
            for key, question, answer, kind in zip(
                picture.ids, picture.questions, picture.answers, picture.types, strict=True
            )
        ]


def _not_there(sources: list[SourceConfig], pictures: Iterable[Picture]) -> dict[str, str]:
    """Questions whose picture's file is not in its source's folder. A zip's members are checked when it is listed."""
    roots = [getattr(config, "images", None) for config in sources]
    folders = [PictureFolder(root) if root and not root.endswith(".zip") else None for root in roots]
    return {
        key: f"there is no picture {picture.location}"
        for picture in pictures
        if picture.location is not None
        and (folder := folders[picture.source]) is not None
        and folder.locate(picture.location) is None
        for key in picture.ids
    }
