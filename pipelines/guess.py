"""What a corpus looks like: the source entry of a recipe that reads it, or why none does.

The first records alone are looked at. What is found is tried: the entry's reader lists them, and reads an image or two.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipelines import storage
from pipelines.source_config import SourceConfig
from pipelines.sources import open_source
from pipelines.sources.files import FileSet
from pipelines.sources.images import open_images
from pipelines.sources.json_stream import object_keys, parse_json, read_entries, read_member
from pipelines.sources.llava import COMPLETION, IMAGES, MESSAGES, PROMPT
from pipelines.sources.parquet_bounds import no_images
from pipelines.sources.tar_members import TarDamage, members
from pipelines.validate import check_record, read_images

_IMAGE = ("image", "images", "image_path", "image_id", "img", "file_name", "filename", "file", "filepath", "path")
_CAPTION = ("caption", "captions", "text", "txt", "description", "title", "comment", "alt_text")
_QUESTION, _ANSWER = ("question", "query", "q"), ("answer", "multiple_choice_answer", "response", "a")
_KINDS = {".tar": "webdataset", ".parquet": "parquet", ".csv": "captions", ".tsv": "captions", ".arrow": "arrow"}
_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_LOOK, _TRY, _IMAGES = 200, 100, 3  # entries that are looked at, records that are listed, images that are read


class Unknown(Exception):
    """Nothing reads the files; the message says why."""


@dataclass
class Guess:
    """What reads a corpus."""

    source: dict
    """Entry of a recipe's `data.train`."""
    listed: int = 0
    good: int = 0
    """Of the first `listed` records, those that would be used as far as their text tells."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of it, the first thing wrong among others."""


def guess(paths: list[str]) -> Guess:
    """The source entry that reads some files.

    Args:
        paths: files of one corpus, and folders or zips of its images, in any order; also a folder of all of it.

    Raises:
        Unknown: nothing reads them.
        OSError, ValueError: a file is not there or cannot be read.
    """
    files = [file for path in paths for file in _expand(path)]
    by_kind: dict[str, list[str]] = {}
    for file in files:
        by_kind.setdefault(_kind(file), []).append(file)
    places = [path for path in paths if path.endswith(".zip") or os.path.isdir(path)]
    if "arrow" in by_kind:
        raise Unknown(
            f"{by_kind['arrow'][0]} is an Arrow file, as datasets.save_to_disk writes it: load it with "
            "datasets.load_from_disk and write it with to_parquet, which is read by type: parquet"
        )
    makers = {"parquet": _parquet, "webdataset": _webdataset, "captions": _table, "json": _json}
    for kind, make in makers.items():
        if kind in by_kind:
            return _tried(make(by_kind[kind], places))
    endings = ", ".join(sorted({Path(file).suffix or file for file in files})[:10]) or "nothing"
    raise Unknown(
        f"no annotations among the files (there are {endings}); sources read {', '.join([*_KINDS][:4])}, .json"
    )


def _expand(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    found = sorted(str(file) for file in Path(path).iterdir() if file.is_file())
    return [file for file in found if _kind(file) != "other"]


def _kind(file: str) -> str:
    if file.partition("?")[0].endswith(_JSON) and Path(file).name not in ("state.json", "dataset_info.json"):
        return "json"
    return _KINDS.get(Path(file.partition("?")[0].removesuffix(".gz")).suffix, "other")


def _first(names, keys) -> str | None:
    return next((name for name in names if name in keys), None)


def _texts(keys, prefix: str = "") -> dict | None:
    """Text fields of a Parquet or WebDataset source that some keys allow."""
    conversation = _first(MESSAGES, keys)
    if conversation:
        return {"conversation": prefix + conversation}
    question, answer = _first(_QUESTION, keys), _first(_ANSWER, keys)
    if question and answer:
        return {"question": prefix + question, "answer": prefix + answer}
    caption = _first(_CAPTION, keys)
    return {"caption": prefix + caption} if caption else None


def _parquet(files: list[str], places: list[str]) -> Guess:
    found = FileSet(files)
    with storage.open_input(found.filesystem, found.path(found.names()[0])) as file:
        schema = pq.read_schema(file)
    texts = _texts(schema.names)
    if texts is None:
        raise Unknown(f"{files[0]} has no column of text that is known, its columns are {', '.join(schema.names)}")
    fits = [column.name for column in schema if no_images(column.type) is None and column.name not in texts.values()]
    image = _first(_IMAGE, fits) or next(iter(fits), None)
    named = _first(_IMAGE, schema.names)
    if image is None and named:
        raise Unknown(
            f"column {named} of {files[0]} holds {no_images(schema.field(named).type)}: embed the images in it"
        )
    return Guess({"type": "parquet", "files": _one(files), "image": image, **texts})


def _webdataset(files: list[str], places: list[str]) -> Guess:
    found = FileSet(files)
    endings: dict[str, object] = {}
    with storage.open_input(found.filesystem, found.path(found.names()[0])) as raw:
        stream = io.BufferedReader(raw)
        try:
            for member in islice(members(stream, raw.size()), _LOOK):
                ending = member.name.rpartition("/")[2].partition(".")[2].lower()
                if ending.endswith("json") and ending not in endings:
                    stream.seek(member.offset)
                    endings[ending] = parse_json(stream.read(min(member.size, 1 << 24)).decode("utf-8", "replace"))
                endings.setdefault(ending, None)
        except TarDamage:
            pass
    for ending, content in endings.items():
        texts = _texts(content, f"{ending}.") if isinstance(content, dict) else None
        if texts and "caption" not in texts:
            return Guess({"type": "webdataset", "shards": _one(files), **texts})
    texts = _texts([ending for ending in endings if ending in _CAPTION])
    for ending, content in endings.items():
        texts = texts or (_texts(content, f"{ending}.") if isinstance(content, dict) else None)
    if texts is None:
        raise Unknown(f"{files[0]} has no text that is known, its files end in {', '.join(endings)}")
    return Guess({"type": "webdataset", "shards": _one(files), **texts})


def _table(files: list[str], places: list[str]) -> Guess:
    if len(files) > 1:
        raise Unknown(f"{len(files)} tables: a source of type captions reads one; ask for each alone")
    tab = "\t" if ".tsv" in files[0] else ","
    with _opened(files[0]) as text:
        columns = [name.strip().strip('"') for name in text.readline(1 << 16).rstrip("\r\n").split(tab)]
        row = text.readline(1 << 16).rstrip("\r\n").split(tab)
    image, caption = _first(_IMAGE, columns), _first(_CAPTION, columns)
    if not image or not caption:
        raise Unknown(
            f"the first line of {files[0]} names no image and caption that is known, but {columns}; a table without a "
            "header needs `columns`, and columns are separated by commas (.csv) or tabs (.tsv)"
        )
    path = row[columns.index(image)].strip('"') if len(row) > columns.index(image) else None
    where = {"images": _place(files[0], places, path)}
    return Guess({"type": "captions", "table": files[0], **where, "image": image, "caption": caption})


def _json(files: list[str], places: list[str]) -> Guess:
    keys = {file: _object_keys(file) for file in files}
    coco = next((file for file in files if {"images", "annotations"} <= keys[file]), None)
    questions = next((file for file in files if "questions" in keys[file]), None)
    answers = next((file for file in files if "annotations" in keys[file]), None)
    if questions:
        if not answers:
            raise Unknown(f"{questions} has VQAv2's questions; give the file of their annotations as well")
        number = _member(questions, "questions").get("image_id")
        name = f"COCO_train2014_{number:012d}.jpg" if isinstance(number, int) else None
        lists = {"questions": questions, "annotations": answers, "images": _place(questions, places, name)}
        return Guess({"type": "vqav2", **lists})
    if coco:
        place = _place(coco, places, _member(coco, "images").get("file_name"))
        return Guess({"type": "coco_captions", "annotations": coco, "images": place})
    if len(files) > 1:
        raise Unknown(f"{len(files)} JSON files: a source reads one; ask for each alone")
    if keys[files[0]]:
        has = ", ".join(sorted(keys[files[0]]))
        raise Unknown(f"{files[0]} is one JSON object with keys {has}: write a list of entries or an entry per line")
    with _opened(files[0]) as text:
        entries = [entry for entry in islice(read_entries(text, files[0]), _LOOK) if isinstance(entry, dict)]
    found = list(dict.fromkeys(key for entry in entries for key in entry))
    if _first(MESSAGES, found) or {PROMPT, COMPLETION} <= {*found}:
        return _llava(files[0], entries, places)
    question, answer, image = _first(_QUESTION, found), _first(_ANSWER, found), _first(_IMAGE, found)
    if not (question and answer):
        what = "image and caption, which is read as a CSV table" if _first(_CAPTION, found) else ", ".join(found)
        raise Unknown(f"the entries of {files[0]} have {what or 'nothing'}: no source reads them")
    source = {"type": "questions", "annotations": files[0]}
    if image is None:
        return Guess({**source, "images": ".", "question": question, "answer": answer, "text_only": True})
    path = next((str(entry[image]) for entry in entries if entry.get(image) is not None), None)
    source |= {"images": _place(files[0], places, path), "image": image, "question": question, "answer": answer}
    if path and not Path(path).suffix:
        source["image_suffix"] = _suffix(source["images"], path)
    names = [entry.get(image) for entry in entries]
    own = _first(("question_id", "id"), found)
    return Guess(
        source | ({"id": own} if own else {"repeated_ids": "number"} if len({*map(str, names)}) < len(names) else {})
    )


def _llava(file: str, entries: list[dict], places: list[str]) -> Guess:
    source, notes = {"type": "llava", "annotations": file}, []
    paths = [entry[name] for entry in entries for name in IMAGES if entry.get(name)]
    paths = [path[0] if isinstance(path, list) else path for path in paths]
    text = repr([entry.get(name) for entry in entries for name in (*MESSAGES, PROMPT)])
    if paths or "'image" in text:
        named = next((path for path in paths if isinstance(path, str)), None)
        if paths or "data:image" not in text:
            source["images"] = _place(file, places, named)
    if paths and "<image>" not in text and "'type': 'image" not in text:
        source["no_placeholders"] = "first_turn"
        notes.append("no text has <image>: the first turn shows all images")
    if "'system'" in text or any(entry.get("system") for entry in entries):
        source["system"] = "first_turn"
        notes.append("system texts are put before the first question; system: drop leaves them out")
    return Guess(source, notes=notes)


def _object_keys(file: str) -> set[str]:
    with _opened(file) as text:
        keys = object_keys(text, file)
    return set() if {*keys} & {*MESSAGES, PROMPT, *_QUESTION, *_IMAGE[:1]} else {*keys}


def _member(file: str, name: str) -> dict:
    """The first object of a list within an object."""
    with _opened(file) as text:
        return next((entry for entry in read_member(text, file, name) if isinstance(entry, dict)), {})


def _opened(file: str) -> io.TextIOWrapper:
    stream = storage.open_input(*storage.open_fs(file), stream=True)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")


def _place(file: str, places: list[str], path: str | None) -> str:
    """Where the images are: of the places that were named and those beside the file, the first that has one."""
    beside = Path(file).parent
    if "://" not in file:
        near = sorted(str(one) for one in beside.iterdir() if one.is_dir() or one.suffix == ".zip")
        places = [*places, *near, str(beside)]
    for place in places:
        if path is None or _has(place, path):
            return place
    return places[0] if places else "FOLDER OR ZIP OF THE IMAGES"


def _has(place: str, path: str) -> bool:
    if not place.endswith(".zip"):
        return any(os.path.exists(os.path.join(place, path + suffix)) for suffix in ("", ".jpg", ".png", ".jpeg"))
    return open_images(place).locate(path) is not None


def _suffix(place: str, path: str) -> str:
    found = (suffix for suffix in (".jpg", ".png", ".jpeg") if os.path.exists(os.path.join(place, path + suffix)))
    return next(found, ".jpg")


def _one(files: list[str]) -> str | list[str]:
    return files[0] if len(files) == 1 else files


def _tried(found: Guess) -> Guess:
    """The guess with what its reader makes of the first records."""
    source = open_source(TypeAdapter(SourceConfig).validate_python(found.source | {"limit": _TRY}))
    images = 0
    for record in _records(source, found):
        problem = check_record(record)
        if problem is None and record.images and images < _IMAGES:
            images += 1
            problem = read_images(record, source)[1]
        found.listed, found.good = found.listed + 1, found.good + (problem is None)
        if problem and found.listed == found.good + 1:
            found.notes.append(f"first problem: record {record.id}: {problem.reason}: {problem.detail}")
    return found


def _records(source, found: Guess) -> Iterator:
    try:
        yield from source.records()
    except (OSError, ValueError) as error:
        found.notes.append(f"the list ends there: {error}")
