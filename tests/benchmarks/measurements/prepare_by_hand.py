"""The peer of prepare_throughput: preparing a LLaVA-layout corpus in a plain multiprocessing loop, without Ray.

    python -m tests.benchmarks.measurements.prepare_by_hand CORPUS TOKENIZER.JSON OUT PROCESSES [--prepares-check]

It reads each image, checks format, size and shape and decodes it with Pillow as such loops do (with --prepares-check:
as the pipeline does, which spares half the decoding), tokenizes the conversation with the model's own function, packs
each chunk's samples into rows first-come, and writes an Arrow file per chunk. Prints its seconds as JSON.
"""

import io
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image
from tokenizers import Tokenizer

from mlmamba.conversation import Turn, encode
from mlmamba.images import FORMATS, MAX_ASPECT, MAX_PIXELS
from pipelines.schema import PACKED, one_row
from pipelines.validate import check_image

TOKENS_PER_IMAGE, MAX_TOKENS, CHUNK = 729, 4096, 250
_ROLES = {"human": "user", "gpt": "assistant"}


def main() -> None:
    """Run the loop once."""
    root, tokenizer, out, processes = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    out.mkdir()
    begin = time.perf_counter()
    with multiprocessing.Pool(processes, _open_worker, (tokenizer, sys.argv[5:] == ["--prepares-check"])) as pool:
        pool.map(_nothing, range(4 * processes))
        ready = time.perf_counter()
        entries = json.loads((root / "records.json").read_text())
        chunks = [
            (out / f"{start:07d}.arrow", entries[start : start + CHUNK], root / "images")
            for start in range(0, len(entries), CHUNK)
        ]
        assert sum(pool.imap_unordered(_chunk, chunks)) == len(entries)
    print(json.dumps({"startup": ready - begin, "work": time.perf_counter() - ready}))


class HandTokenizer:
    """What `encode` asks of a tokenizer, on a tokenizer.json."""

    eos_token = "<|endoftext|>"
    init_kwargs: ClassVar[dict] = {}

    def __init__(self, file: str):
        self._tokenizer = Tokenizer.from_file(file)

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        """`{"input_ids": [...]}`."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of a token."""
        return self._tokenizer.token_to_id(token)


def _open_worker(tokenizer: str, prepares_check: bool) -> None:
    global _tokenizer, _check
    _tokenizer = HandTokenizer(tokenizer)
    _check = check_image if prepares_check else _check_by_hand


def _check_by_hand(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        assert image.format in FORMATS
        assert width * height <= MAX_PIXELS
        assert max(width, height) <= MAX_ASPECT * min(width, height)
        image.convert("RGB")


def _nothing(number: int) -> int:
    return number


def _chunk(task: tuple[Path, list[dict], Path]) -> int:
    file, entries, images = task
    row, room = [], MAX_TOKENS
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, PACKED) as writer:
        for entry in entries:
            turns = [
                Turn(_ROLES[turn["from"]], turn["value"], turn["value"].count("<image>"))
                for turn in entry["conversations"]
            ]
            encoded_images = []
            if "image" in entry:
                encoded_images.append((images / entry["image"]).read_bytes())
                assert _check(encoded_images[0]) is None
            encoded = encode(_tokenizer, turns, TOKENS_PER_IMAGE)
            if len(encoded.input_ids) > room:
                writer.write_batch(_join(row))
                row, room = [], MAX_TOKENS
            row.append((entry["id"], encoded, encoded_images))
            room -= len(encoded.input_ids)
        writer.write_batch(_join(row))
    return len(entries)


def _join(row: list) -> pa.RecordBatch:
    lengths = [len(sample.input_ids) for _, sample, _ in row]
    starts = np.cumsum([0, *lengths])
    columns = {
        "sample_ids": [name for name, _, _ in row],
        "input_ids": np.concatenate([np.array(sample.input_ids, np.int32) for _, sample, _ in row]),
        "labels": np.concatenate([np.array(sample.labels, np.int32) for _, sample, _ in row]),
        "seq_idx": np.repeat(np.arange(len(row), dtype=np.int32), lengths),
        "images": [image for _, _, images in row for image in images],
        "image_positions": [int(starts[i]) + p for i, (_, sample, _) in enumerate(row) for p in sample.image_positions],
        "source": ["llava"] * len(row),
    }
    return one_row(PACKED, columns)


if __name__ == "__main__":
    main()
