"""What a benchmark is: items to ask, a rule that scores one answer, and the scores of a set of answers.

A benchmark of ours is a small class: it reads the published files into items (`read`), says how an answer is scored
(`score`) and which numbers the protocol reports (`measure`). What is wrong with the files is an error before anything
is asked; what is missing of the images stands in `missing`. `Files` and `ImageFolder` read the published files.
"""

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from pyarrow import fs

from pipelines import storage
from pipelines.sources.images import open_images
from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.results import OVERALL, type_name
from workflows.evaluate.statistics import mean, means_by_type

SHORT_ANSWER = "Answer the question using a single word or phrase."
_SHOWN = 5  # ids in a message


class Files:
    """The files of one benchmark.

    Args:
        benchmark: its name, for errors.
        data: folder, path or URI.
    """

    def __init__(self, benchmark: str, data: str):
        self.benchmark, self.data = benchmark, absolute(data)
        self._digest = hashlib.sha256()
        if not storage.exists(data):
            raise UsageError(f"{benchmark}: there is no folder {storage.shown(data)}; --data names the benchmark's")

    @property
    def digest(self) -> str:
        """Ten hex digits that change with the content of the files read so far."""
        return self._digest.hexdigest()[:10]

    def find(self, *places: str) -> str | None:
        """The first of these paths below the folder where there is a file."""
        uris = [storage.join(self.data, place) for place in places]
        return next((uri for uri in uris if storage.size(uri) is not None), None)

    def json(self, *places: str) -> object:
        """The content of the first of these files.

        Raises:
            UsageError: none is there, or it is not JSON.
        """
        uri = self._need(places)
        try:
            return json.loads(self._read(uri))
        except ValueError as error:
            raise UsageError(f"{storage.shown(uri)} is not JSON: {error}; fetch it again") from error

    def json_lines(self, *places: str) -> list[dict]:
        """The entries of the first of these files, which has one a line (or is one list).

        Raises:
            UsageError: none is there, or a line is not a JSON object.
        """
        uri = self._need(places)
        data = self._read(uri)
        try:
            if data.lstrip()[:1] == b"[":
                return [self.object(uri, entry) for entry in json.loads(data)]
            lines = enumerate(data.splitlines(), start=1)
            return [self.object(f"{uri}, line {i}", json.loads(line)) for i, line in lines if line.strip()]
        except ValueError as error:
            raise UsageError(f"{storage.shown(uri)} is not JSON lines: {error}; fetch it again") from error

    def object(self, name: str, entry: object) -> dict:
        """The entry if it is a JSON object. Raises UsageError."""
        if not isinstance(entry, dict):
            raise UsageError(f"{storage.shown(name)}: expected an object, found {type(entry).__name__}")
        return entry

    def images(self, images: str | None, *places: str) -> list["ImageFolder"]:
        """Where images may be: `images` if given, else those of the places below the folder that exist.

        Raises:
            UsageError: there is none.
        """
        uris = [images] if images else [storage.join(self.data, place) for place in places]
        found = [ImageFolder(uri) for uri in uris if storage.exists(uri)]
        if not found:
            looked = ", ".join(storage.shown(uri) for uri in uris)
            raise UsageError(f"{self.benchmark}: no images at {looked}; say where they are with --images")
        return found

    def _need(self, places: tuple[str, ...]) -> str:
        uri = self.find(*places)
        if uri is None:
            raise UsageError(
                f"{self.benchmark}: {storage.shown(self.data)} has no {' nor '.join(places)}; --data names the folder "
                "with the benchmark's files as they are published"
            )
        return uri

    def _read(self, uri: str) -> bytes:
        data = storage.read_bytes(uri)
        self._digest.update(hashlib.sha256(data).digest())
        return data


class ImageFolder:
    """A folder or zip of images whose names are listed once."""

    def __init__(self, uri: str):
        self.description = {"kind": "folder", "uri": absolute(uri)}
        filesystem, path = storage.open_fs(uri)
        self._archive = open_images(uri) if path.endswith(".zip") else None
        self._stem = posixpath.basename(path).removesuffix(".zip")
        self._names = set() if self._archive else _names(filesystem, path)

    def locate(self, name: str) -> str | None:
        """Location of the image with this name, or None. In val2014.zip it may also be val2014/NAME."""
        if self._archive is None:
            return name if name in self._names else None
        return self._archive.locate(name) or self._archive.locate(f"{self._stem}/{name}")


def absolute(uri: str) -> str:
    """A local path made absolute: workers run in another folder."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _names(filesystem: fs.FileSystem, folder: str) -> set[str]:
    """Paths of the files below a folder, relative to it."""
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    skip = len(folder.rstrip("/")) + 1
    return {info.path[skip:] for info in infos if info.type == fs.FileType.File}


@dataclass(frozen=True, eq=False)
class Item:
    """One question to ask."""

    id: str
    """Unique in the benchmark."""
    question: str
    """As published."""
    prompt: str
    """What the model is asked: the question and the protocol's instructions."""
    answers: list[str]
    """Reference answers, as published."""
    answer: str
    """The one to show."""
    type: str
    image: str | None = None
    """Location of the image, None for text alone."""
    source: int = 0
    """Which of the benchmark's `stores` the image is in."""
    details: dict = field(default_factory=dict)
    """Numbers that `measure` needs besides the score; the same names in every item."""


@dataclass(frozen=True)
class Score:
    """How one answer did; the fields are those of results.Answered."""

    score: float
    text_score: float | None = None
    text_yes: float | None = None


class Benchmark:
    """A benchmark, read from its files. Arguments and errors: see `open_benchmark`."""

    name: ClassVar[str]
    max_new_tokens: ClassVar[int] = 128
    """Longest answer, by the protocol."""
    choices: ClassVar[tuple[str, str] | None] = None
    """Two answers whose probability as first token is asked for; the first is the positive class."""
    splits: ClassVar[tuple[str, ...]] = ()
    """Splits to choose from, the default first."""
    twice: ClassVar[str] = "mend the file"
    """What to do about ids that come more than once."""
    published: ClassVar[tuple[int, ...]] = ()
    """The numbers of questions that were published. Empty: there is no such number."""
    taken: ClassVar[tuple[str, ...]] = ()
    """Names that `measure` gives besides "overall" and the types; of "a/b" the part before the slash."""

    def __init__(self, data: str, images: str | None = None, split: str | None = None, questions: int | None = None):
        if split is not None and split not in self.splits:
            has = f"choose {' or '.join(self.splits)}" if self.splits else "it has no splits to choose from"
            raise UsageError(f"{self.name}: there is no split {split!r}; {has}")
        self.split = split or (self.splits[0] if self.splits else None)
        self.stores: list[dict] = []
        """Descriptions of where the images are (workflows/evaluate/questions.py)."""
        self.missing: dict[str, str] = {}
        """What can not be asked, by id: why."""
        self.notes: list[str] = []
        """Lines for a person about the files."""
        self.items = self._keep_apart(self.read(data, images))
        self._check(questions)

    digest: str
    """Changes with the content of the files."""

    def read(self, data: str, images: str | None) -> list[Item]:
        """The items, in the order of the files. Sets `digest` and `stores`."""
        raise NotImplementedError

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        """The score of an answer."""
        raise NotImplementedError

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        """The flat scores, see results.measure. By default the mean, overall and by type."""
        return {OVERALL: mean(table["score"], weights), **means_by_type(table, weights)}

    def majority(self) -> str:
        """The constant answer to compare with: the most frequent reference answer of the questions asked here."""
        return Counter(item.answer for item in self.items).most_common(1)[0][0]

    def counts(self) -> dict[str, int]:
        """Questions overall and by type."""
        return {OVERALL: len(self.items), **Counter(item.type for item in self.items)}

    def place(self, items: Iterable[tuple[Item, str]], folders: list[ImageFolder]) -> list[Item]:
        """Items with the locations of their images, given by name; those that are nowhere go to `missing`."""
        self.stores = [folder.description for folder in folders]
        placed = []
        for item, name in items:
            spots = ((number, folder.locate(name)) for number, folder in enumerate(folders))
            source, location = next(((n, spot) for n, spot in spots if spot is not None), (0, None))
            if location is None:
                self.missing[item.id] = f"there is no image {name}"
            placed.append(replace(item, image=location, source=source))
        return placed

    def need(self, entry: dict, key: str, kind: type | tuple[type, ...], where: str) -> object:
        """A field of an entry. Raises UsageError when it is not there or of another kind."""
        value = entry.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in _tuple(kind)):
            raise UsageError(
                f"{self.name}: {where} has {key} = {value!r:.60}; is the file of another version of the benchmark?"
            )
        return value

    def _keep_apart(self, items: list[Item]) -> list[Item]:
        """Items whose types are called as no other score is; a note says which are not called as in the files."""
        names = {item.type: type_name(item.type, self.taken) for item in items}
        if other := [f"{kind!r} as {name}" for kind, name in sorted(names.items()) if kind != name]:
            self.notes.append(f"types of question that are called as other scores are: {', '.join(other)} here")
        return [item if names[item.type] == item.type else replace(item, type=names[item.type]) for item in items]

    def _check(self, questions: int | None) -> None:
        """Ids are unique, and the number of questions is a published one, or the one that was announced."""
        twice = [key for key, times in Counter(item.id for item in self.items).items() if times > 1]
        if twice:
            raise WorkflowError(f"{self.name}: {ids_text(twice, 'question ids')} come more than once; {self.twice}")
        if not self.items:
            raise UsageError(f"{self.name}: the files have no questions")
        found, known = self.questions(), self.published
        if questions is not None and found != questions:
            raise UsageError(f"{self.name}: the files have {found:,} questions, --questions says {questions:,}")
        if known and found not in known:
            expected = " or ".join(f"{count:,}" for count in known)
            if questions is None:
                raise UsageError(
                    f"{self.name}: the files have {found:,} questions, the published ones {expected}: another version, "
                    f"or a part. Pass --questions {found} to score them all the same; the scores then say so"
                )
            self.notes.append(f"not the published set: {found:,} questions, the published one has {expected}")

    @property
    def title(self) -> str:
        """What a person calls it: the name, and the split where there are several."""
        return f"{self.name}/{self.split}" if self.split else self.name

    def questions(self) -> int:
        """Questions in the files; an item may be a question asked in another way."""
        return len(self.items)


def ids_text(ids: Iterable[str], what: str) -> str:
    """How many there are, and the first of them."""
    ids = list(ids)
    more = ", ..." if len(ids) > _SHOWN else ""
    return f"{len(ids):,} {what} ({', '.join(ids[:_SHOWN])}{more})"


def _tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def normalise(answer: str) -> str:
    """Answers compare without case, surrounding space and a final full stop."""
    return answer.strip().rstrip(".").strip().lower()
