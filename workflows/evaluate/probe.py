"""`mlmamba evaluate MODEL --probe scaling`: speed and memory against sequence length and batch size.

The model's language part and a Transformer of the same size from transformers read random prompts and
go on from them, in one process and in turns, so that a busy machine hits both. For every length and batch:

    prefill   the prompt is read at once: seconds, and the most memory taken beside weights and what was there before
    decode    further tokens one at a time: seconds a token, and the bytes of what is kept of the prompt

A power of the length is fitted to each (least squares on logarithms): 1 is linear, 2 quadratic, 0 constant. Fixed costs
hide the power at short lengths, so the power over the last three lengths stands beside it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from workflows.runtime import release_freed

OURS, PEER = "ML-Mamba", "Transformer"
PREFILL, DECODE = "prefill", "decode"
LENGTHS, BATCHES = (256, 512, 1024, 2048, 4096), (1, 4)
_TOKENS = 8  # decoded in one measurement


@dataclass(frozen=True)
class Measurement:
    """One model, phase, batch and length; the quickest of the rounds, as whatever else runs can only slow it down."""

    model: str
    phase: str
    batch: int
    length: int
    seconds: float
    """Of the whole prompt (prefill) or of one token for all rows of the batch (decode)."""
    tokens_per_second: float
    kept_bytes: int
    """State or key-value cache of the batch after the prompt."""
    peak_bytes: int | None
    """Most memory during prefill beside what was in use before; None for decode and where it cannot be told."""


@dataclass(frozen=True)
class Power:
    """Seconds or bytes grow as length to this power, for one model, phase and batch."""

    model: str
    phase: str
    batch: int
    quantity: str
    power: float
    last: float
    """Over the last three lengths alone."""


@dataclass(frozen=True)
class Scaling:
    """What the probe found."""

    device: str
    threads: int
    parameters: dict[str, int]
    measurements: list[Measurement]
    powers: list[Power]
    image_tokens: int
    image_seconds: float
    """Encoders and connector, one image: a cost that does not grow with the text."""

    def as_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


def probe_scaling(
    model: nn.Module,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scaling:
    """Measure an MLMambaForConditionalGeneration against a Transformer of its language model's size.

    Args:
        model: in evaluation mode, on the device to measure.
        lengths: prompt lengths in tokens, at least two.
        batches: prompts at once.
        rounds: measurements of each, of which the quickest counts.
        on_progress: called with measurements done and in total.

    Raises:
        ValueError: there are fewer than two lengths, or a number is not positive.
    """
    lengths, batches = sorted(set(lengths)), sorted(set(batches))
    if len(lengths) < 2 or min(*lengths, *batches, rounds) < 1:
        raise ValueError(f"lengths {lengths}, batches {batches}, rounds {rounds}: give two lengths or more, all over 0")
    config, device = model.config.text_config, model.device
    size = count_parameters(model.language_model)
    peer = same_size_transformer(config, lengths[-1] + _TOKENS, size).to(device, model.dtype)
    models = {OURS: model, PEER: peer}
    settings = [(batch, length) for batch in batches for length in lengths]
    found: dict[tuple, list[tuple]] = {}
    # Round by round over all lengths, not length by length: a machine that is slow for a minute bends no curve.
    for round_number in range(rounds + 1):
        for number, (batch, length) in enumerate(settings):
            on_progress(round_number * len(settings) + number, (rounds + 1) * len(settings))
            ids = _prompt(config.vocab_size, model.config.image_token_id, batch, length).to(device)
            gc.collect()
            for name, one in models.items():
                measured = _measure(one, ids)
                if round_number:  # the first is the warm-up
                    found.setdefault((name, batch, length), []).append(measured)
    on_progress((rounds + 1) * len(settings), (rounds + 1) * len(settings))
    measurements = [
        m
        for batch, length in settings
        for name in models
        for m in _best(name, batch, length, found[name, batch, length])
    ]
    tokens, seconds = _image(model, rounds)
    sizes = {OURS: size, PEER: count_parameters(peer)}
    powers = fit_powers(measurements)
    return Scaling(str(device), torch.get_num_threads(), sizes, measurements, powers, tokens, seconds)


def fit_powers(measurements: Sequence[Measurement]) -> list[Power]:
    """The powers of length of everything measured, see `Power`."""
    groups: dict[tuple, list[tuple[int, float]]] = {}
    for m in measurements:
        groups.setdefault((m.model, m.phase, m.batch, "seconds"), []).append((m.length, m.seconds))
        if m.phase == PREFILL:
            groups.setdefault((m.model, m.phase, m.batch, "kept bytes"), []).append((m.length, m.kept_bytes))
            if m.peak_bytes:
                groups.setdefault((m.model, m.phase, m.batch, "peak bytes"), []).append((m.length, m.peak_bytes))
    return [
        Power(*key, power=power_of(points), last=power_of(points[-3:]))
        for key, points in groups.items()
        if len(points) > 1
    ]


def power_of(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x for points (x, y)."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


def _prompt(vocabulary: int, image_token: int, batch: int, length: int) -> torch.Tensor:
    """Random text (batch, length): no placeholder of an image."""
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))
    return ids.masked_fill(ids == image_token, (image_token + 1) % vocabulary)


@torch.inference_mode()
def _measure(model: nn.Module, ids: torch.Tensor) -> tuple[float, float, int, int | None]:
    """Seconds of the prompt and of a token, bytes kept and most bytes in use."""
    cache_name = "cache_params" if hasattr(model, "language_model") else "past_key_values"
    with PeakMemory(ids.device) as memory:
        start = _now(ids.device)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = _now(ids.device) - start
    cache = output[cache_name]
    kept = cache.nbytes if hasattr(cache, "nbytes") else sum(t.nbytes for t in _tensors(cache))
    token = ids[:, -1:]  # not the likeliest one, which may be an image's placeholder
    start = _now(ids.device)
    for _ in range(_TOKENS):
        output = model(input_ids=token, use_cache=True, logits_to_keep=1, **{cache_name: cache})
        cache = output[cache_name]
    decode = (_now(ids.device) - start) / _TOKENS
    return prefill, decode, kept, memory.bytes


def _tensors(cache) -> list[torch.Tensor]:
    """Keys and values of a transformers cache."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _best(model: str, batch: int, length: int, rows: list[tuple]) -> list[Measurement]:
    prefill, decode, kept, peak = zip(*rows, strict=True)
    whole, token = min(prefill), min(decode)
    most = None if None in peak else int(statistics.median(peak))
    return [
        Measurement(model, PREFILL, batch, length, whole, batch * length / whole, kept[0], most),
        Measurement(model, DECODE, batch, length, token, batch / token, kept[0], None),
    ]


@torch.inference_mode()
def _image(model: nn.Module, rounds: int) -> tuple[int, float]:
    """Tokens of an image, and seconds to make them."""
    layout = model.image_layout
    shown = layout.cut(Image.new("RGB", (layout.image_size, layout.image_size)))
    inputs = {name: t.to(model.device) for name, t in layout.batch([shown]).items()}
    model.get_image_features(**inputs)
    seconds = []
    for _ in range(rounds):
        start = _now(model.device)
        model.get_image_features(**inputs)
        seconds.append(_now(model.device) - start)
    return shown.tokens, min(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): writing 5 resets the peak resident set size


class PeakMemory:
    """Context whose `bytes` is, after it, the most memory used inside beside what was used at its start.

    On CUDA it is the allocator's. On the CPU it is the process's resident memory, which Linux keeps the peak of; what
    the process freed before is given back first, so that it is not used again unseen. Elsewhere `bytes` is None.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _reset()
        return self

    def __exit__(self, *_) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._before is not None:
            self.bytes = max(0, _status("VmHWM") - self._before)


def _reset() -> int | None:
    """Resident memory now, with the peak reset to it; None where that cannot be done."""
    release_freed()
    try:
        _CLEAR.write_text(_RESET_PEAK)
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def same_size_transformer(config, longest: int, parameters: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same vocabulary and width, and about the same number of parameters.

    One Transformer layer (attention and MLP) stands for two Mamba-2 layers, as Mamba's authors count (Gu and Dao 2023,
    section 3.4), and the MLP's width then makes the sizes equal; it comes out near Llama's own 8/3 of the width.
    Attention has heads as wide as the Mamba-2's, or the next narrower that divide the width, and is the fastest that
    transformers has on the device (sdpa).

    Args:
        config: the Mamba-2 language model's config.
        longest: positions that it must take.
        parameters: size to match.

    Raises:
        ValueError: no such Transformer has about this size.
    """
    width, layers = config.hidden_size, (config.num_hidden_layers + 1) // 2
    head = max(d for d in range(2, min(config.head_dim, width) + 1, 2) if width % d == 0)
    tied = config.tie_word_embeddings
    fixed = config.vocab_size * width * (1 if tied else 2) + width + layers * (4 * width**2 + 2 * width)
    inner = round((parameters - fixed) / (3 * width * layers))
    if inner < 1:
        raise ValueError(f"no Transformer of width {width} and {layers} layers has only {parameters:,} parameters")
    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        max_position_embeddings=longest,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(sizes).eval()


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of the modules, those that are shared once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())
