"""The papers' claim on this machine: how much sooner than a Transformer of its size the language model has answered.

python -m tests.benchmarks.measurements.paper_claim [--prompts 1000 4000 16000] [--batches 1 8 32] [--new 256]
        [--rounds 3] [--threads 1] [--preset 130m] [--forms bf16 int8]

The papers say 4 to 6 times, with an image of 729 tokens and 256 new ones, which is about the first prompt. Both have
random weights. The Transformer has as many parameters: half as many layers of attention and a gated MLP three times its
width, with keys and values kept in place, from this library, its weights packed in the same way (`prepare`). Of each
prompt and batch the better of the forms counts, on either side. An answer is reckoned as the batch's prompts, read one
after the other (measured once), and the new tokens, by the time of one in the middle of the
answer, after a prompt of made-up keys and values or a state; `--rounds` of these give the median, and the
lowest and highest ratio. CPU seconds. Where the Transformer's keys and values would take over `--memory` bytes nothing
is measured. The encoder, which is the same for both, is left out.

Mind that torch's attention of one query reads keys and values at a fraction of the memory's rate on a CPU, most of all
in bfloat16: what this prints for long prompts and large batches says as much of that as of Transformers.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch

from mlmamba.configuration import Mamba2TextConfig
from mlmamba.decoding import pack, prepare
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.ops import compiled
from mlmamba.presets import preset
from mlmamba.state import KeyValueState, LayerState, MambaState

PIECE = 2048  # tokens of a prompt that ours reads at once


def transformer_of(config) -> Mamba2TextConfig:
    """A Transformer of about as many parameters: 12 d^2 in two blocks, as in two of Mamba-2."""
    pairs, width = config.num_hidden_layers // 2, config.hidden_size
    changes = {"layers": ["attention", "mlp"] * pairs, "num_hidden_layers": 2 * pairs, "mlp_size": 8 * width // 3}
    changes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "attention_head_dim": 64}
    changes |= {"max_position_embeddings": 2**17, "rope_theta": 10_000.0}
    return Mamba2TextConfig(**(config.to_dict() | changes))


def made(config, form: str) -> Mamba2LanguageModel:
    language = Mamba2LanguageModel(config).eval()
    language = language.bfloat16() if form == "bf16" else language
    # A Transformer has no step that is compiled, but the same products.
    pack(language, form, compiled.operators(make=True))
    prepare(SimpleNamespace(language_model=language, device=torch.device("cpu")))
    return language


def state_of(language: Mamba2LanguageModel, batch: int, length: int, room: int) -> MambaState:
    """What so many rows would have kept of a prompt; its numbers are random."""
    backbone, layers = language.backbone, []
    for own in backbone(backbone.embeddings(torch.zeros(1, 4, dtype=torch.long)))[1].layers:
        if isinstance(own, KeyValueState):
            keys, values = (torch.randn_like(own.keys[:1, :, :1]).repeat(batch, 1, room, 1) for _ in range(2))
            layers.append(KeyValueState(keys, values, torch.full((batch,), length), length))
        else:
            layers.append(LayerState(*(t[:1].repeat(batch, *[1] * (t.ndim - 1)) for t in own.parts)))
    return MambaState(layers).in_place()


def read(language: Mamba2LanguageModel, length: int) -> float:
    """CPU seconds of one prompt: a Transformer's at once, ours in pieces."""
    ids, state = torch.randint(5, language.backbone.embeddings.num_embeddings, (1, length)), None
    pieces = ids.split(PIECE, 1) if language.backbone.layers[0].kind == "mamba2" else [ids]
    begun = time.process_time()
    for piece in pieces:
        hidden, state = language.backbone(language.backbone.embeddings(piece), state)
    language.lm_head(hidden[:, -1:])
    return time.process_time() - begun


def tokens(language: Mamba2LanguageModel, state: MambaState, count: int) -> tuple[float, MambaState]:
    """CPU seconds of a step, and the state after."""
    ids, backbone = torch.full((state.rows, 1), 5), language.backbone
    begun = time.process_time()
    for _ in range(count):
        hidden, state = backbone(backbone.embeddings(ids), state)
        state = state.in_place()
        language.lm_head(hidden)
    return (time.process_time() - begun) / count, state


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", nargs="+", type=int, default=(1000, 4000, 16_000))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--forms", nargs="+", choices=("fp32", "bf16", "int8"), default=("bf16", "int8"))
    parser.add_argument("--memory", type=int, default=6 * 2**30)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    config = preset(a.preset).text_config
    peer = transformer_of(config)
    counts = [sum(p.numel() for p in Mamba2LanguageModel(c).parameters()) for c in (config, peer)]
    print(f"{counts[0]:,} parameters, the Transformer {counts[1]:,}; {a.threads} threads, {a.rounds} rounds")
    ours, theirs = ({form: made(c, form) for form in a.forms} for c in (config, peer))
    for length in a.prompts:
        prompts = [min(read(own, length) for own in side.values()) for side in (ours, theirs)]
        print(f"\nprompt of {length:,}: {prompts[0]:.2f} s, Transformer {prompts[1]:.2f} s", flush=True)
        for batch in a.batches:
            room, width = length + a.new, peer.num_attention_heads * peer.attention_head_dim
            kept = {"fp32": 4, "bf16": 2, "int8": 4}
            forms = [f for f in a.forms if len(peer.layers) * width * kept[f] * room * batch < a.memory]
            if not forms:
                print(f"  {batch:>2} rows: the Transformer's keys and values are over {a.memory / 2**30:.0f} GiB")
                continue
            found = steps(ours, {form: theirs[form] for form in forms}, batch, length, a)
            ratios = [(batch * prompts[1] + a.new * other) / (batch * prompts[0] + a.new * own) for own, other in found]
            own, other = (statistics.median(step) for step in zip(*found, strict=True))
            print(
                f"  {batch:>2} rows: a token {1000 * own:.1f} ms, Transformer {1000 * other:.1f} ms "
                f"({other / own:.2f} times); prompt and {a.new} tokens {statistics.median(ratios):.2f} times as fast "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def steps(ours: dict, theirs: dict, batch: int, length: int, a: argparse.Namespace) -> list[tuple[float, float]]:
    """Of each round, the CPU seconds of a step in the middle of the answer, of either side's better form."""
    taken: list[list[list[float]]] = [[[] for _ in range(a.rounds)] for _ in range(2)]
    for side, models in enumerate((ours, theirs)):
        for language in models.values():  # one state at a time: the Transformer's is large
            state = state_of(language, batch, length + a.new // 2, length + a.new)
            _, state = tokens(language, state, 1)
            for own in taken[side]:
                seconds, state = tokens(language, state, 1 + 4 // batch)
                own.append(seconds)
            del state
    return [(min(own), min(other)) for own, other in zip(*taken, strict=True)]


if __name__ == "__main__":
    main()
