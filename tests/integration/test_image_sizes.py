"""Images at their own size from a corpus to an answer over HTTP: Ray Data, Ray Train, evaluation and Ray Serve, tiny.

The corpus has images of many sizes, strange ones among them, and a tokenizer with the marks of Granite's chat format.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlmamba.answering import Answerer, Asked
from mlmamba.conversation import GRANITE, IGNORE_INDEX, Turn, format_of
from mlmamba.images import WIDEST, image_size
from pipelines.manifest import Manifest
from pipelines.packed import PackedDataset
from pipelines.quarantine import QUARANTINE_FILE
from pipelines.storage import open_arrow
from tests.helpers.corpora import conversation
from tests.helpers.images import encoded
from tests.helpers.processes import free_port
from tests.helpers.serve_client import ServiceError, data_uri, request
from tests.helpers.tiny import granite_tokenizer
from tests.helpers.toy_workflow import mlmamba, recipe, write_recipe
from workflows.serve.start import serve_model

SIZES = [(16, 16), (60, 40), (40, 60), (33, 17), (90, 20), (1, 1), (300, 200), (64, 64)]
SYSTEM, QUESTION, TOKENS = "Be brief.", "What is it?", 6
WAYS = {"native": {"min_tokens": 2, "max_tokens": 12}, "tiles": {"tiles": 4, "image_size": 32}}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def strange() -> dict[str, bytes]:
    """Of 16 bits, transparent, with a palette, and grey; all are accepted."""
    deep = np.random.default_rng(0).integers(0, 65535, (30, 70), dtype=np.uint16)
    see_through = np.dstack([np.full((50, 20, 3), 200, np.uint8), np.zeros((50, 20), np.uint8)])
    return {
        "deep.png": png(deep),
        "clear.png": png(see_through),
        "palette.png": encoded(1, "PNG", (31, 47), "P"),
        "grey.jpg": encoded(2, "JPEG", (70, 30), "L"),
    }


def write(root: Path, split: str, images: dict[str, bytes]) -> dict:
    """A split in LLaVA's layout and its source."""
    (root / split).mkdir(parents=True)
    entries = []
    for number, (name, data) in enumerate(images.items()):
        (root / split / name).write_bytes(data)
        turns = conversation("<image>\n" + QUESTION, "wide" if number % 2 else "tall", "Sure?", "yes")
        entries.append({"id": f"{split}-{name}", "image": name, "conversations": turns})
    (root / f"{split}.json").write_text(json.dumps(entries))
    return {"type": "llava", "images": str(root / split), "annotations": str(root / f"{split}.json")}


@pytest.fixture(scope="module", params=["native", pytest.param("tiles", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory):
    """Summary of a whole run, and its corpus."""
    root = tmp_path_factory.mktemp(request.param)
    plain = {f"{i}.png": encoded(i, "PNG", size) for i, size in enumerate(SIZES * 4)}
    refused = {"tall.png": encoded(5, "PNG", (5, 4000)), "broken.png": encoded(6)[:60]}
    tests = strange() | {"tall.png": encoded(7, "PNG", (5, 4000)), "wide.png": encoded(8, "PNG", (4000, 5))}
    granite_tokenizer().save_pretrained(root / "granite")
    content = recipe(root)
    content["data"] |= {
        "train": [write(root, "train", plain | strange() | refused)],
        "test": [write(root, "test", tests)],
        "tokenizer": {"name": str(root / "granite"), "chat": "granite"},
        "exclude_evaluation_images": False,
    }
    content["model"]["vision"] = {"towers": [{"model": "test_vit", "block": -2, "weights": "random"}]} | WAYS[
        request.param
    ]
    content["model"]["text"] |= {"layers": ["mamba2", "attention"], "num_attention_heads": 2, "num_key_value_heads": 1}
    content["model"]["text"] |= {"attention_head_dim": 16, "max_position_embeddings": 256}
    del content["model"]["text"]["num_hidden_layers"]
    content["train"] |= {"stages": [content["train"]["stages"][1] | {"steps": 6}], "save_every": 100, "workers": 1}
    content["data"]["max_quarantined"] = 0.2
    done = mlmamba("run", write_recipe(root / "tiny.yaml", content), "--storage", root / "storage", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"root": root, "images": plain | strange(), "tests": tests}


@pytest.fixture(scope="module")
def answerer(finished):
    return Answerer(finished["model"]["folder"], TOKENS, threads=1)


def test_images_of_many_sizes_share_rows_and_what_cannot_be_read_is_set_aside(finished, answerer):
    data = finished["data"]["folders"][0]
    manifest, rows = Manifest.load(data), PackedDataset(data, "train")
    quarantine = open_arrow(f"{data}/{QUARANTINE_FILE}").read_all()
    reasons = zip(*(quarantine[name].to_pylist() for name in ("record_id", "reason")), strict=True)
    assert dict(reasons) == {"train-tall.png": "image_aspect", "train-broken.png": "image_truncated"}
    mixed = 0
    for row in rows:
        counts = [manifest.layout.count(*image_size(image, WIDEST)[::-1]) for image in row.images]
        assert sum(counts) == (row.input_ids == answerer.processor.image_token_id).sum()
        mixed += len(set(counts)) > 1
    assert mixed


def test_training_has_the_ids_that_inference_has(finished, answerer):
    processor, rows = answerer.processor, PackedDataset(finished["data"]["folders"][0], "train")
    assert format_of(processor.tokenizer) is GRANITE
    seen = set()
    for row in rows:
        for sample, record in enumerate(row.sample_ids):
            ids, labels = (part[row.seq_idx == sample] for part in (row.input_ids, row.labels))
            data = finished["images"][record.removeprefix("train-")]
            first = int((labels != IGNORE_INDEX).argmax())
            prompt = processor.prompt([Turn("user", QUESTION, images=1)])
            assert ids[:first].tolist() == processor.ids([prompt], [image_size(data, WIDEST)])[0]
            seen.add(first)
    assert len(seen) > 2


def test_every_question_is_asked_whatever_its_image(finished):
    assert finished["evaluation"]["questions"]["overall"] == 2 * len(finished["tests"])


def test_a_service_answers_as_the_model_does_and_refuses_by_size(finished, answerer):
    images = [finished["images"][name] for name in ("0.png", "1.png", "5.png", "6.png", "deep.png", "clear.png")]
    expected = answerer.reply([Asked(image, [QUESTION]) for image in images])
    with serve_model(
        str(finished["model"]["folder"]), finished["root"], port=free_port(), threads=1, block=False
    ) as server:

        def asked(images: list[bytes], *before: dict):
            shown = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
            messages = [*before, {"role": "user", "content": [*shown, {"type": "text", "text": QUESTION}]}]
            return request(server.url, "/v1/chat/completions", {"messages": messages, "max_tokens": TOKENS})

        for image, (reply,) in zip(images, expected, strict=True):
            got = asked([image])
            assert got["choices"][0]["message"]["content"] == reply.text
            assert got["usage"]["prompt_tokens"] == reply.prompt_tokens
        system = asked(images[:2], {"role": "system", "content": SYSTEM})
        turn = Turn("user", f"{SYSTEM}\n\n{QUESTION}", 2, len(SYSTEM))
        sizes = [image_size(image) for image in images[:2]]
        (length,) = answerer.processor.lengths([answerer.processor.prompt([turn])], sizes)
        assert system["usage"]["prompt_tokens"] == length
        with pytest.raises(
            ServiceError, match=r"of which its 16 images take \d+ \(300 x 200 takes \d+, .* limit of 256"
        ):
            asked([images[3]] * 16, {"role": "system", "content": SYSTEM * 9})
        with pytest.raises(ServiceError, match="5 x 4000 pixels, at most 20:1"):
            asked([finished["tests"]["tall.png"]])
