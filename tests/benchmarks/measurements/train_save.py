"""How long a checkpoint holds the step, and how long it is written beside the training; gigabytes a second.

    python -m tests.benchmarks.measurements.train_save [--parameters 100] [--rounds 5]

One worker with ZeRO-2 on a CPU and so many million parameters: the state is copied to memory while the step waits
(train/saver.py), and a thread writes it to the disk. Beside the copy stands the fastest that there is, of as many
bytes into memory that is there already. The first save has to make its memory and is left out. From the rate follows
the hold of the paper's full stage, whose sizes are counted.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from workflows.recipe.load import load_recipe
from workflows.runtime import quiet_libraries

WORKERS = 8  # of the paper's recipe


def start(parameters: int):
    """A DeepSpeed engine over a stack of matrices with so many parameters in all."""
    from tests.helpers.toy_training import STAGE
    from workflows.recipe.train import TrainRecipe
    from workflows.train.optim import start_engine

    model = nn.ModuleDict({"connector": nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(parameters)])})
    train = TrainRecipe.model_validate({"workers": 1, "stages": [{**STAGE, "batch_rows": 1}]})
    return start_engine(model, train.stages[0], train, 1)


def holds(engine, folder: Path, rounds: int) -> tuple[int, list[float], list[float], float]:
    """Bytes of a checkpoint, for each round the seconds that the step is held and that the writing takes, and for how
    long the first save held it."""
    from workflows.storage.folder import Folder
    from workflows.train.checkpoint import CheckpointStore
    from workflows.train.saver import Saver

    done: list[float] = []
    store = CheckpointStore(Folder(str(folder)))
    saver = Saver(store, "a", 0, 1, 1, lambda step, seconds: done.append(seconds))
    held = []
    for step in range(rounds + 1):
        begin = time.perf_counter()
        saver.save(engine, step, {"zero_stage": 2, "model": "", "lowest_loss": None})
        held.append(time.perf_counter() - begin)
        assert saver.settle() == []
    return sum(store.newest().files.values()), held[1:], done[1:], held[0]


def paper() -> tuple[int, int]:
    """Bytes of the paper's full stage that one worker keeps, and rank 0 beside them: the weights, once more."""
    from workflows.plan.train import meta_model, trained_of
    from workflows.storage.folder import Folder
    from workflows.storage.layout import layout_of

    recipe = load_recipe("paper", [])
    layout = layout_of(recipe, Folder("nowhere"), 729)
    _, sizes, _ = meta_model(recipe, layout)
    trained = trained_of(recipe.train.stages[-1], sizes)
    return 12 * trained // WORKERS, 4 * trained


def main() -> None:
    """Save, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    a = parser.parse_args()
    quiet_libraries()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = start(a.parameters)
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        size, held, written, first = holds(engine, Path(folder), a.rounds)
    from_, to = torch.ones(size // 4), torch.ones(size // 4)
    best = []
    for _ in range(a.rounds):
        begin = time.perf_counter()
        to.copy_(from_)
        best.append(time.perf_counter() - begin)
    hold, write, copy = (statistics.median(times) for times in (held, written, best))
    print(
        f"{size / 1e9:.2f} GB: held {hold:.2f} s ({size / hold / 1e9:.2f} GB/s), written {write:.2f} s beside the steps"
    )
    print(f"the first save: held {first:.2f} s")
    print(f"a copy into memory that is there: {copy:.2f} s ({size / copy / 1e9:.2f} GB/s)")
    share, weights = paper()
    for name, count in (("rank 0", share + weights), ("the other ranks", share)):
        print(f"paper.yaml, full stage, {WORKERS} workers, {name}: {count / 1e9:.1f} GB, {count * hold / size:.1f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
