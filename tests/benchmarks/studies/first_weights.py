"""First weights of a connector: how much of what differs between images passes, and how fast the quickstart learns.

    python -m tests.benchmarks.studies.first_weights --data storage/data/quickstart-... [--steps 400] [--seeds 0 1 2]

DATA is the quickstart's prepared data set. First the share of the embeddings' energy that differs between 200 images,
for each connector, as torch draws its weights and balanced (`model.connector.init`). Then the quickstart's model learns
for some steps of two rows, connector and language model together, from the same rows and the same other weights: the
mean loss of the last 50 steps, every 100. One thread; a seed takes about two minutes.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from mlmamba.configuration import ConnectorConfig
from mlmamba.connector import CONNECTORS, build_connector
from mlmamba.modeling import MLMambaForConditionalGeneration
from pipelines.packed import PackedDataset
from workflows.recipe.load import load_recipe
from workflows.train.initial import build_initial
from workflows.train.step import batch_maker

INITS = ("torch", "balanced")


def share(x: torch.Tensor) -> float:
    """Share of the energy of x (images, ...) that is not common to all images."""
    return ((x - x.mean(0)).square().sum() / x.square().sum()).item()


def build(data: Path, init: str, seed: int) -> MLMambaForConditionalGeneration:
    recipe = load_recipe("quickstart", [f"seed={seed}", f"model.connector.init={init}"])
    with tempfile.TemporaryDirectory() as folder:
        build_initial(recipe, data, Path(folder) / "initial")
        model = MLMambaForConditionalGeneration.from_pretrained(Path(folder) / "initial")
    model.vision.requires_grad_(False)
    return model.train()


@torch.no_grad()
def print_shares(model, dataset: PackedDataset, seeds: list[int]) -> None:
    batches = batch_maker(dataset, 2, model)(list(range(48)))
    features = torch.cat([model.vision(batch.inputs["pixel_values"]) for batch in batches])[:200]
    print(f"share of the energy that differs between images: {share(features):.2f} in the features")
    sizes = load_recipe("quickstart").model.connector.sizes()
    for name in CONNECTORS:
        row = []
        for init in INITS if name != "vss_l2" else INITS[:1]:
            shares = []
            for seed in seeds:
                torch.manual_seed(seed)
                config = ConnectorConfig(**sizes | {"name": name})
                connector = build_connector(features.shape[-1], 128, config)
                if init == "balanced":
                    connector.balance(0.1)
                shares.append(share(connector(features, model.vision.grid)))
            row.append(f"{init} " + " ".join(f"{one:.2f}" for one in shares))
        print(f"  {name:<13}{'   '.join(row)}")


def print_losses(data: Path, dataset: PackedDataset, init: str, seed: int, steps: int) -> None:
    model = build(data, init, seed)
    make = batch_maker(dataset, 2, model)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20)
        (batch,) = make([order[(2 * step + i) % len(order)] for i in range(2)])
        loss = model(**batch.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    means = "  ".join(f"{sum(losses[end - 50 : end]) / 50:.3f}" for end in range(100, steps + 1, 100))
    print(f"  seed {seed}  {init:<9}{means}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    a = parser.parse_args()
    torch.set_num_threads(1)
    dataset = PackedDataset(str(a.data))
    print_shares(build(a.data, "torch", 0), dataset, a.seeds)
    print(f"mean loss of 50 steps, every 100 until {a.steps}")
    for seed in a.seeds:
        for init in INITS:
            print_losses(a.data, dataset, init, seed, a.steps)


if __name__ == "__main__":
    main()
