"""The scaling probe at a published size, without a checkpoint: is reading linear in the length?

python -m tests.benchmarks.studies.evaluate_scaling [--preset 130m] [--layers 4] [--lengths 256 512 1024] [--out DIR]

The same as `mlmamba evaluate MODEL --probe scaling` on a model with random weights and a tiny encoder; --layers cuts
its depth (and the Transformer's with it), which changes every time by the same factor and no power. Prints the table;
--out also keeps it, with the plot and the numbers as JSON. Run it on a machine that does nothing else.
"""

import argparse
import sys
from pathlib import Path

import torch

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import SIZES, preset
from workflows.evaluate.probe import BATCHES, LENGTHS, probe_scaling
from workflows.evaluate.probe_report import text, write_probe


def main() -> None:
    """Build the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="130m", choices=list(SIZES))
    parser.add_argument("--layers", type=int, help="blocks of the language model; the preset's by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    text_changes = {} if a.layers is None else {"num_hidden_layers": a.layers}
    vision = {"towers": [{"model": "test_vit", "block": -2}], "image_size": 32}
    config = preset(a.preset, vision=vision, connector={"hidden_size": 64}, text=text_changes)
    model = MLMambaForConditionalGeneration(config).eval().to(a.device, getattr(torch, a.dtype))
    found = probe_scaling(
        model,
        a.lengths,
        a.batches,
        a.rounds,
        lambda done, total: print(f"{done}/{total} measurements", file=sys.stderr, flush=True),
    )
    print(text(found))
    if a.out:
        for file in write_probe(found, a.out):
            print(file)


if __name__ == "__main__":
    main()
