"""A corpus and a recipe small enough for tests: coloured squares in LLaVA layout, a tiny random encoder, few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.helpers.processes import finish

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def write_corpus(root: Path, count: int = 48) -> None:
    """Annotations `train.json` and `test.json` and their images under `root`; one training image is damaged."""
    rng = np.random.default_rng(0)
    for split, size in (("train", count), ("test", 12)):
        folder = root / split
        folder.mkdir(parents=True)
        entries = []
        for i in range(size):
            colour = list(COLOURS)[i % 3]
            pixels = np.full((32, 32, 3), COLOURS[colour]) + rng.integers(-20, 20, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
            turns = [("What colour is it?", colour), (f"Is it {colour}?", "yes"), ("Is it round?", "no")]
            conversation = []
            for number, (question, answer) in enumerate(turns):
                conversation.append({"from": "human", "value": ("<image>\n" if not number else "") + question})
                conversation.append({"from": "gpt", "value": answer})
            entries.append({"id": f"{split}-{i}", "image": f"{i}.png", "conversations": conversation})
        (root / f"{split}.json").write_text(json.dumps(entries))
    damaged = root / "train" / "5.png"
    damaged.write_bytes(damaged.read_bytes()[:100])


def recipe(root: Path, **changes) -> dict:
    """A whole recipe as plain data. `changes` replace top-level keys."""
    source = {"type": "llava", "images": str(root / "train"), "annotations": str(root / "train.json")}
    test = {"type": "llava", "images": str(root / "test"), "annotations": str(root / "test.json")}
    stage = {"learning_rate": 0.003, "batch_rows": 2, "warmup": 0.1}
    content = {
        "name": "tiny",
        "data": {
            "train": [source],
            "test": [test],
            "tokenizer": {"train_vocab_size": 300},
            "max_tokens": 256,
            "partition_records": 16,
            "shard_rows": 8,
            "max_quarantined": 0.1,
        },
        "model": {
            "vision": {
                "towers": [{"model": "test_efficientnet", "stages": [0, 2], "weights": "random"}],
                "image_size": 32,
                "grid": 2,
            },
            "connector": {"hidden_size": 32, "head_dim": 8, "state_size": 8, "chunk_size": 16},
            "text": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "state_size": 8,
                "head_dim": 16,
                "chunk_size": 16,
            },
        },
        "train": {
            "workers": 2,
            "save_every": 4,
            "log_every": 4,
            "stages": [
                {"name": "connector", "trains": ["connector"], "steps": 2, **stage},
                {"name": "full", "trains": ["connector", "language_model"], "steps": 40, **stage},
            ],
        },
        "evaluate": {"max_new_tokens": 4, "batch_images": 4},
        "register_as": {"name": "tiny"},
    }
    return content | changes


def write_recipe(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def start(*arguments: str | Path) -> subprocess.Popen:
    """The command line as a process group of its own."""
    command = [sys.executable, "-m", "workflows.cli", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )


def mlmamba(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    process = start(*arguments)
    return finish(process, timeout)
