"""A small corpus that nobody drew for this: does the recipe for small corpora learn what its encoder's features hold?

    python -m tests.benchmarks.studies.emoji FOLDER [--seeds 0 1 2] [--set FIELD=VALUE ...]

1,250 emoji as Google draws them are for training and the same as Twitter draws them for testing, at 64 px, in seven
categories. `npm pack` fetches both (npm packages emoji-datasource-google and -twitter, 16.0.0) into FOLDER, once. Each
seed is a whole `mlmamba run small-corpus`, without a held-out tenth. Printed: exact match on the test drawings, blind
and majority, and linear probes on the same frozen features (logistic regression, its decay chosen on a tenth, then
fitted on all), on all cells and on their mean. Model and probes learn from the same drawings.
"""

import argparse
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn import functional as F

from mlmamba.images import load_pixels
from mlmamba.loading import load_model

VERSION, TRAIN, TEST = "16.0.0", "google", "twitter"
KINDS = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Objects": "objects",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
QUESTION = f"Which kind of thing is this: {', '.join(list(KINDS.values())[:-1])} or travel?"
DECAYS = (1e-3, 1e-2, 1e-1)


def fetch(folder: Path, drawer: str) -> Path:
    """The drawings and list of one drawer as a corpus of type `questions`. Returns its list."""
    listed, images = folder / f"{drawer}.json", folder / drawer
    if listed.exists():
        return listed
    images.mkdir(parents=True, exist_ok=True)
    package = f"emoji-datasource-{drawer}@{VERSION}"
    packed = subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True, check=True).stdout
    archive = folder / packed.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        emoji = json.load(tar.extractfile("package/emoji.json"))
        chosen = [one for one in emoji if one["category"] in KINDS and one[f"has_img_{drawer}"]]
        for one in chosen:
            content = tar.extractfile(f"package/img/{drawer}/64/{one['image']}").read()
            (images / one["image"]).write_bytes(content)
    archive.unlink()
    entries = [
        {"image": one["image"], "question": QUESTION, "answer": KINDS[one["category"]], "kind": KINDS[one["category"]]}
        for one in chosen
    ]
    listed.write_text(json.dumps(entries))
    return listed


def data_recipe(folder: Path) -> Path:
    """A data recipe of both drawers."""

    def source(drawer: str, **options) -> dict:
        listed = str(fetch(folder, drawer))
        return {"type": "questions", "annotations": listed, "images": str(folder / drawer), "image": "image"} | options

    content = {
        "name": "emoji",
        "tokens_per_image": 16,
        "data": {
            "train": [source(TRAIN)],
            "test": [source(TEST, question_type="kind")],
            "tokenizer": {"train_vocab_size": 512},
            "max_tokens": 768,
            "partition_records": 500,
        },
    }
    file = folder / "emoji.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def run(folder: Path, seed: int, changes: list[str]) -> dict:
    """The summary of a workflow."""
    sets = [f"data={data_recipe(folder)}", "name=emoji", "register_as.name=emoji", f"seed={seed}"]
    sets += ["train.validate_every=null", *changes]
    command = [sys.executable, "-m", "workflows.cli", "run", "small-corpus", "--json"]
    command += ["--storage", str(folder / "storage")]
    command += [part for one in sets for part in ("--set", one)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@torch.no_grad()
def features(model, folder: Path, drawer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the frozen encoder (n, cells, channels), and categories (n,)."""
    entries = json.loads(fetch(folder, drawer).read_text())
    size, names, found = model.config.vision_config.image_size, list(KINDS.values()), []
    for first in range(0, len(entries), 32):
        files = [(folder / drawer / entry["image"]).read_bytes() for entry in entries[first : first + 32]]
        found.append(model.vision(torch.from_numpy(np.stack([load_pixels(file, size) for file in files]))))
    return torch.cat(found), torch.tensor([names.index(entry["answer"]) for entry in entries])


def probe(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Accuracy of logistic regression on features (n, d)."""
    (x, y), (x_test, y_test) = train, test
    mean, spread = x.mean(0), x.std(0) + 1e-3
    x, x_test = (x - mean) / spread, (x_test - mean) / spread
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(x) // 10], order[len(x) // 10 :]
    scores = {decay: accuracy(fit(x[rest], y[rest], decay), x[held], y[held]) for decay in DECAYS}
    return accuracy(fit(x, y, max(scores, key=scores.get)), x_test, y_test)


def fit(x: torch.Tensor, y: torch.Tensor, decay: float) -> torch.Tensor:
    """Weights (d + 1, categories) that minimise cross entropy and decay x squares."""
    weights = torch.zeros(x.shape[1] + 1, len(KINDS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + decay * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def accuracy(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of rows whose category has the highest score."""
    return ((x @ weights[:-1] + weights[-1]).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=["train.stages.0.augment.flip=true"], dest="changes")
    options = parser.parse_args()
    folder = options.folder.absolute()
    summary = {}
    for seed in options.seeds:
        summary = run(folder, seed, options.changes)
        print(f"seed {seed}: {json.dumps(summary['evaluation'])}", flush=True)
    model, _ = load_model(summary["model"]["folder"])
    sides = [features(model, folder, drawer) for drawer in (TRAIN, TEST)]
    print(f"linear probe on all cells: {probe(*((x.flatten(1), y) for x, y in sides)):.1%}")
    print(f"linear probe on their mean: {probe(*((x.mean(1), y) for x, y in sides)):.1%}")


if __name__ == "__main__":
    main()
