"""Any data set in LLaVA's layout: a JSON or JSONL file of conversations, and pictures beside it."""

from pipelines import storage
from pipelines.config import LlavaSource
from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import Item
from workflows.evaluate.benchmarks.own_data import OwnData

_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


class Llava(OwnData):
    """Every question of every conversation, asked alone. `data` is the file, or a folder with one such file."""

    name = "llava"

    def read(self, data: str, images: str | None) -> list[Item]:
        file, folder = self._find(data)
        return self.from_sources([LlavaSource(type="llava", annotations=file, images=images or folder)])

    def _find(self, data: str) -> tuple[str, str]:
        """The annotations and the folder they are in."""
        if storage.size(data) is not None:
            base, mark, query = data.partition("?") if "://" in data else (data, "", "")
            return data, (base.rpartition("/")[0] or ".") + mark + query
        names = [name for name in storage.list_names(data) if name.endswith(_ENDINGS)]
        if len(names) != 1:
            found = f"several ({', '.join(names)}): name one" if names else "none"
            raise UsageError(f"{self.name}: {storage.shown(data)} should hold one .json or .jsonl file, found {found}")
        return storage.join(data, names[0]), data
