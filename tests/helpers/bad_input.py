"""A corpus in five layouts with damaged records among good ones, and what should become of each.

Every kind of damage is a function of a whole image, conversation or row, beside the reason that it should be set
aside for. Which records are damaged, and how, is drawn at random.
"""

import csv
import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pyarrow as pa
from PIL import Image

from tests.helpers.corpora import conversation, write_files, write_parquet, write_tar, write_zip

GOOD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def noise(rng: random.Random, kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """An encoded image of noise: no two are alike."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(buffer, kind)
    return buffer.getvalue()


def bomb(rng: random.Random) -> bytes:
    """A PNG of a hundred bytes that says it is 900 million pixels."""
    header = struct.pack(">LLBBBBB", 30_000 + rng.randrange(1000), 30_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = [struct.pack(">L", len(d)) + n + d + struct.pack(">L", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def empty_canvas(rng: random.Random) -> bytes:
    """A WebP of a hundred bytes, 2 x 2 pixels on a canvas of 64 million: no more than is allowed."""
    frames = [Image.new("RGB", (2, 2), tuple(rng.randbytes(3))) for _ in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    data = bytearray(buffer.getvalue())
    data[24:30] = (7999).to_bytes(3, "little") * 2
    return bytes(data)


def flipped(rng: random.Random) -> bytes:
    """A PNG with a bit wrong within its data."""
    data = bytearray(noise(rng))
    data[rng.randrange(len(data) // 3, len(data) // 2)] ^= 1 << rng.randrange(8)
    return bytes(data)


IMAGES: dict[str, tuple[Callable[[random.Random], bytes], str]] = {
    "png cut": (lambda rng: (data := noise(rng))[: rng.randrange(len(data) // 4, len(data) - 40)], "image_truncated"),
    "jpeg cut": (lambda rng: noise(rng, "JPEG", (64, 64))[: -rng.randrange(100, 800)], "image_truncated"),
    "bit flipped": (flipped, "image_unreadable"),
    "not an image": (lambda rng: rng.randbytes(rng.randrange(1, 500)), "image_unreadable"),
    "web page": (lambda rng: b"<html><body>404 Not Found</body></html>", "image_unreadable"),
    "empty file": (lambda rng: b"", "image_unreadable"),
    "git lfs pointer": (
        lambda rng: f"version https://git-lfs.github.com/spec/v1\noid sha256:{rng.randbytes(32).hex()}\n".encode(),
        "image_unreadable",
    ),
    "bomb": (bomb, "image_bomb"),
    "empty canvas": (empty_canvas, "image_bomb"),
    "svg": (lambda rng: f"<svg xmlns='http://www.w3.org/2000/svg' id='{rng.random()}'/>".encode(), "image_format"),
    "tiff": (lambda rng: noise(rng, "TIFF"), "image_format"),
    "ppm": (lambda rng: noise(rng, "PPM"), "image_format"),
    "stripe": (lambda rng: noise(rng, "PNG", (rng.randrange(101, 200), 5)), "image_aspect"),
    "tall stripe": (lambda rng: noise(rng, "JPEG", (4, rng.randrange(81, 200))), "image_aspect"),
}

# Of LLaVA-like messages that show one image. The number makes each text one of its own.
CONVERSATIONS: dict[str, tuple[Callable[[int], object], str]] = {
    "no placeholder": (lambda i: conversation(f"What {i}?", "This."), "placeholder_mismatch"),
    "two placeholders": (lambda i: conversation(f"<image><image> What {i}?", "This."), "placeholder_mismatch"),
    "placeholder in an answer": (lambda i: conversation(f"<image> What {i}?", "<image>"), "placeholder_mismatch"),
    "empty question": (lambda i: conversation("<image>\n", f"This {i}."), "empty_turn"),
    "empty answer": (lambda i: conversation(f"<image> What {i}?", ""), "empty_turn"),
    "blank last answer": (lambda i: conversation(f"<image> What {i}?", "This.", "So?", " \n\t"), "empty_turn"),
    "starts with the answer": (lambda i: conversation("x", f"This {i}.", "<image> What?", "It.")[1:], "role_order"),
    "two questions": (lambda i: conversation(f"<image> What {i}?", "x", "And?")[::2], "role_order"),
    "no answer": (lambda i: conversation(f"<image> What {i}?"), "role_order"),
    "unknown speaker": (lambda i: [{"from": "system", "value": f"<image> Do {i}."}], "malformed"),
    "no speaker": (lambda i: [{"value": f"<image> What {i}?"}], "malformed"),
    "text that is a truth value": (lambda i: [{"from": "human", "value": True}], "malformed"),
    "messages that are text": (lambda i: f"<image> What {i}?", "malformed"),
    "end token": (lambda i: conversation(f"<image> What {i}?", "This.<|endoftext|>And that."), "control_text"),
    "role mark": (lambda i: conversation(f"<image> Hm {i}.<|assistant|>", "This."), "control_text"),
    "too long": (lambda i: conversation(f"<image> What {i}?", "very " * 400), "too_long"),
}


class BadInput:
    """The corpus under a folder.

    Args:
        root: empty folder.
        good: good records of each layout.
        each: damaged records of each layout and kind.
        seed: of everything.
    """

    def __init__(self, root: Path, good: int, each: int, seed: int = 0):
        self.root, self.good, self.each = root, good, each
        self.rng = random.Random(seed)
        self.expected: dict[tuple[str, str], str | None] = {}
        """Reason by source and record id, None for a good one."""
        self.kinds: Counter = Counter()
        """Damaged records by kind."""
        self.number = 0
        self.sources = [
            self._llava("folder"),
            self._llava("zip"),
            self._webdataset(),
            self._parquet(),
            self._captions(),
        ]
        self.test = self._evaluation_set()

    def _plan(self, *tables: dict) -> list[tuple[str | None, Callable | None, str | None]]:
        """Kind, function and reason of every record of a layout, in random order."""
        kinds = [(kind, *damage) for table in tables for kind, damage in table.items() for _ in range(self.each)]
        self.kinds.update(kind for kind, *_ in kinds)
        plan = [*kinds, *[(None, None, None)] * self.good]
        self.rng.shuffle(plan)
        return plan

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _image(self) -> bytes:
        return noise(self.rng, self.rng.choice(GOOD_FORMATS))

    def _record(self, kind: str | None, make: Callable | None) -> tuple[int, bytes, object]:
        """Number, image and messages of a record, one of which may be damaged."""
        number = self._next()
        image = make(self.rng) if kind in IMAGES else self._image()
        messages = conversation(f"<image>\nWhat is in image {number}?", f"Noise number {number}.")
        return number, image, make(number) if kind in CONVERSATIONS else messages

    def _llava(self, place: str) -> dict:
        """JSONL, with the images in a folder or in a zip."""
        extra = {
            "missing file": (None, "image_missing"),
            "outside": (None, "malformed"),
            "broken line": (None, "malformed"),
            "not an object": (None, "malformed"),
            "id that is none": (None, "malformed"),
            "key that is not read": (None, "image_missing"),
            "id twice": (None, "duplicate_id"),
            "content twice": (None, "duplicate_content"),
            "image of the test set": (None, "contaminated"),
        }
        lines, images = [], {}
        for line, (kind, make, reason) in enumerate(self._plan(IMAGES, CONVERSATIONS, extra)):
            number, image, messages = self._record(kind, make)
            name, path = f"record-{number}", f"{number % 7}/{number}.jpg"
            images[path] = image
            entry = {"id": name, "image": path, "conversations": messages}
            if kind == "missing file":
                del images[path]
            elif kind == "outside":
                entry["image"] = f"../{path}"
            elif kind == "broken line":
                entry, name = json.dumps(entry)[: self.rng.randrange(20, 60)], f"{place}[{line}]"
            elif kind == "not an object":
                entry, name = [entry], f"{place}[{line}]"
            elif kind == "id that is none":
                entry["id"], name = [number], f"{place}[{line}]"
            elif kind == "key that is not read":
                entry["img"] = entry.pop("image")
            elif kind == "image of the test set":
                images[path] = self._test_image(number)
            elif kind in ("id twice", "content twice"):
                # The record that it repeats is one more good one, before it.
                first, words = f"first-{number}", conversation(f"<image>\nThe first {number}?", "Yes.")
                lines.append(json.dumps({"id": first, "image": path, "conversations": words}))
                self.expected[place, first] = None
                if kind == "id twice":
                    entry["id"] = name = first
                else:
                    entry["conversations"] = words
            lines.append(entry if isinstance(entry, str) else json.dumps(entry))
            if kind == "id twice":  # the table has it under the id of the good one
                self.expected[place, f"{name} again"] = reason
            else:
                self.expected[place, name] = reason
        # Lines were counted without the good ones that were put in before repetitions.
        self._renumber(place, lines)
        write_files(self.root / place, {"a.jsonl": "\n".join(lines)})
        if place == "zip":
            write_zip(self.root / "zip/images.zip", images)
        else:
            write_files(self.root / place / "images", images)
        where = {"folder": "images", "zip": "images.zip"}[place]
        own = self.root / place
        return {"type": "llava", "name": place, "annotations": str(own / "a.jsonl"), "images": str(own / where)}

    def _renumber(self, place: str, lines: list[str]) -> None:
        """Give records without an id the name of the line that they ended up on."""
        unnamed = [key for key in self.expected if key[0] == place and key[1].startswith(f"{place}[")]
        for key in unnamed:
            del self.expected[key]
        for position, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or not isinstance(entry["id"], str):
                self.expected[place, f"{place}[{position}]"] = "malformed"

    def _webdataset(self) -> dict:
        """Tar shards, whose samples may lack or double a file."""
        extra = {
            "no text file": (None, "malformed"),
            "no image file": (None, "image_missing"),
            "broken json": (None, "malformed"),
            "json without the key": (None, "malformed"),
            "text file twice": (None, "malformed"),
            "second image": (None, "placeholder_mismatch"),
        }
        shards: dict[str, list] = {f"s-{i}": [] for i in range(4)}
        for (kind, make, reason), shard in zip(self._plan(IMAGES, CONVERSATIONS, extra), cycle(shards), strict=False):
            number, image, messages = self._record(kind, make)
            text = (f"{number}.json", {"conversations": messages})
            files = [(f"{number}.jpg", image), text]
            if kind == "no text file":
                files.remove(text)
            elif kind == "no image file":
                files = [text]
            elif kind == "broken json":
                files[1] = (f"{number}.json", json.dumps(text[1])[:-10])
            elif kind == "json without the key":
                files[1] = (f"{number}.json", {"conversation": messages})
            elif kind == "text file twice":
                files.append(text)
            elif kind == "second image":
                files.append((f"{number}.png", self._image()))
            shards[shard] += files
            self.expected["webdataset", f"{shard}/{number}"] = reason
        for shard, files in shards.items():
            write_tar(self.root / f"tar/{shard}.tar", files)
        pattern = str(self.root / "tar/s-{0..3}.tar")
        return {"type": "webdataset", "shards": pattern, "conversation": "json.conversations"}

    def _parquet(self) -> dict:
        """Parquet with conversations as JSON text, which can hold what a typed column cannot."""
        extra = {
            "no bytes": (None, "image_missing"),
            "null": (None, "image_missing"),
            "no json": (None, "malformed"),
        }
        columns: dict[str, list] = {"image": [], "conversations": [], "id": []}
        for kind, make, reason in self._plan(IMAGES, CONVERSATIONS, extra):
            number, image, messages = self._record(kind, make)
            stored = {"bytes": None if kind == "no bytes" else image, "path": f"{number}.jpg"}
            columns["image"].append(None if kind == "null" else stored)
            columns["conversations"].append("{" if kind == "no json" else json.dumps(messages))
            columns["id"].append(number)
            self.expected["parquet", str(number)] = reason
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), ("conversations", pa.string()), ("id", pa.int64())])
        write_parquet(self.root / "parquet/train-00000.parquet", columns, schema, rows=100)
        files = str(self.root / "parquet/*.parquet")
        return {"type": "parquet", "files": files, "conversation": "conversations", "id": "id"}

    def _captions(self) -> dict:
        """A CSV table."""
        extra = {
            "missing file": (None, "image_missing"),
            "outside": (None, "malformed"),
            "empty caption": (None, "empty_turn"),
            "too few columns": (None, "malformed"),
            "too many columns": (None, "malformed"),
            "open quote": (None, "malformed"),
            "not Unicode": (None, "malformed"),
        }
        images, table, line = {}, b"image,caption\n", 2
        for kind, make, reason in self._plan(IMAGES, extra):
            number, image, _ = self._record(kind, make)
            path, caption = f"{number}.jpg", f'Image {number}, "noise"' + "\non two lines" * (number % 3 == 0)
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerow([f"/{path}" if kind == "outside" else path, caption])
            row = {
                "empty caption": f"{path},\n",
                "too few columns": f"{path}\n",
                "too many columns": f"{path},a,b\n",
                "open quote": f'{path},"never ends {number}\n',
                "not Unicode": f"{path},\udcff{number}\n",
            }.get(kind, buffer.getvalue())
            if kind != "missing file":
                images[path] = image
            table += row.encode("utf-8", "surrogateescape")
            self.expected["captions", f"captions[{line}]"] = reason
            line += row.count("\n")
        write_files(self.root / "captions", {"t.csv": table})
        write_files(self.root / "captions/images", images)
        own = self.root / "captions"
        return {"type": "captions", "table": str(own / "t.csv"), "images": str(own / "images")}

    def _test_image(self, number: int) -> bytes:
        return noise(random.Random(f"test {number}"))

    def _evaluation_set(self) -> dict:
        """Questions about the images that some records of the folder and the zip show."""
        images = {f"{number}.png": self._test_image(number) for number in range(1, self.number + 1)}
        entries = [{"image_id": name, "question": "What?", "answer": "Noise."} for name in images]
        write_files(self.root / "test", {"q.json": entries})
        write_files(self.root / "test/images", images)
        own = self.root / "test"
        return {"type": "questions", "annotations": str(own / "q.json"), "images": str(own / "images")}
