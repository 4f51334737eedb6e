"""A model made ready to answer: its weights packed, its step of one token the fast one, over a pool of states.

`prepare` is for a model that from then on only answers. `Decoder` gives every sequence of its pool the next token. On a
GPU the whole step (embeddings, blocks, head, choice) reads and writes buffers that never move, so that it is captured
as CUDA graphs, and the host, which waits for no token, learns them one step later. Elsewhere the pool's states are
handed to the model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlmamba import choosing
from mlmamba.ops import compiled
from mlmamba.ops.linear import Linear
from mlmamba.ops.packed import PackedLinear, has_tiles, packs
from mlmamba.state import MambaState
from mlmamba.state_pool import StatePool

logger = logging.getLogger(__name__)
GRAPHS = (1, 2, 4, 8, 16, 32)
"""Batch sizes that are captured; a batch between two runs as the larger."""
WORTH_PACKING = 2**16  # weights of a layer; fewer are read from the cache anyway
_FORMS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Prepared:
    """How a prepared model computes."""

    precision: str
    """fp32, bf16, fp16 or int8."""
    decoding: str
    """"kernels", "compiled", or "torch: " and why it is not one of these."""
    packed: str
    """"packed", or why the weights are not."""
    exact: str = ""
    """"exact" where answers have the same bits in any company; "not exact: " and why, where that was wanted and cannot
    be had; else ""."""
    lacking: str = ""
    """The precision that was asked for, where the device has it not."""

    def __str__(self) -> str:
        exact = self.exact and f", {self.exact}"
        lacking = self.lacking and f" in place of {self.lacking}, which there is not here"
        return f"{self.precision}{lacking}, decoding {self.decoding}, weights {self.packed}{exact}"


def prepare(model, make: bool = True) -> Prepared:
    """Make a model ready for answers, once: on a CPU its weights are packed, which it does not come back from.

    Args:
        model: MLMambaForConditionalGeneration in evaluation mode, on its device. It must not be trained afterwards.
        make: compile the decoding step for this processor where that was not done yet; else use what is there.

    Returns:
        How it computes now, also as `model.prepared`.
    """
    if (done := getattr(model, "prepared", None)) is not None:
        return done
    language, wanted = model.language_model, getattr(model, "exact", False)
    dtype = language.backbone.embeddings.weight.dtype
    whole = not any(isinstance(module, PackedLinear) for module in language.modules())  # else it was loaded as int8
    if hasattr(model, "hf_device_map"):
        way = "torch: the model is on several devices"
    else:
        way = language.backbone.prepare_decoding(make, wanted)
    own = compiled.operators(make=False) if way == "compiled" else None
    trouble = wanted and _why_not_exact(model, way)
    model.exact = exact = bool(wanted and not trouble)
    problem = _packing_problem(model, dtype, own)
    if whole and not problem:
        fitting = own if exact or dtype == torch.float32 or not has_tiles() else None
        pack(language, _FORMS[dtype], fitting, 0 if exact else WORTH_PACKING)
    elif own is not None:
        for module in language.modules():
            if isinstance(module, PackedLinear):
                module.use(own, always=exact)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    packed = "packed" if not whole else problem or "packed"
    told = "" if not wanted else "exact" if exact else f"not exact: {trouble}"
    model.prepared = Prepared(names[dtype] if whole else "int8", way, packed, told, getattr(model, "lacking", ""))
    level = logging.WARNING if trouble or (make and "compiler" in way.lower()) else logging.INFO
    logger.log(level, "the model computes in %s", model.prepared)
    return model.prepared


def pack(model: nn.Module, form: str, own: Any = None, least: int = WORTH_PACKING) -> None:
    """Put packed layers in the place of a model's linear ones.

    Args:
        form, own: as of `PackedLinear`.
        least: weights from which a layer is worth it, but for int8, which all become.
    """
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) in (Linear, nn.Linear) and (form == "int8" or child.weight.numel() >= least):
                setattr(module, name, PackedLinear(child, form, own))


def _packing_problem(model, dtype: torch.dtype, own: Any) -> str:
    if hasattr(model, "hf_device_map"):
        return "not packed: accelerate places them"
    if model.device.type != "cpu":
        return f"as they are on {model.device.type}"
    if dtype not in _FORMS:
        return "not packed: their precision has no form for it"
    return "" if own is not None else packs()


def _why_not_exact(model, way: str) -> str:
    """Why a model's answers would not have the same bits in any company, or ""."""
    if model.device.type != "cpu":
        return f"on {model.device.type} sums depend on the batch, serve and evaluate on a CPU"
    if any(layer.kind != "mamba2" for layer in model.language_model.backbone.layers):
        return "attention and MLP blocks round by the batch"
    return "" if way == "compiled" else way.removeprefix("torch: ")


class Tokens:
    """The tokens of a step, on their way to the host."""

    def __init__(self, tokens: Tensor):
        self._event = None
        if tokens.is_cuda:
            self._there = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._there.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._there = tokens.clone()

    def get(self) -> list[int | None]:
        """Wait for them; None where a row's logits were not finite."""
        if self._event is not None:
            self._event.synchronize()
        return [None if token < 0 else token for token in self._there.tolist()]


class Decoder:
    """The sequences in work and their steps.

    Args:
        model: prepared, in evaluation mode.
        size: most sequences.
        limit: as of `StatePool`.
        ahead: whether steps are made on the device from buffers that do not move; None for where kernels can.
    """

    def __init__(self, model, size: int, limit: int = 0, ahead: bool | None = None):
        self._model, self.size = model, size
        way = getattr(getattr(model, "prepared", None), "decoding", "")
        self.ahead = way == "kernels" and model.device.type == "cuda" if ahead is None else ahead
        mixers = [layer.mixer for layer in model.language_model.backbone.layers]
        self.ahead = self.ahead and all(getattr(mixer, "between", None) is not None for mixer in mixers)
        self.pool = StatePool(size, limit, moves=not self.ahead)
        self._sizes = [n for n in GRAPHS if n < size] + [size]
        self._asked: list[tuple[float, float] | None] = []  # of each row: temperature and top_p, None for greedy
        self._changed = True
        self._graphs: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
        self._captures = model.device.type == "cuda" and torch.cuda.is_available()
        suppressed = model.generation_config.suppress_tokens
        self.suppressed = torch.tensor(suppressed).to(model.device) if suppressed else None
        if self.ahead:
            self._allocate(size, model.config.text_config.vocab_size, model.device)

    def _allocate(self, size: int, vocabulary: int, device: torch.device) -> None:
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._slots = torch.zeros(size, dtype=torch.int32, device=device)
        self._sampled = torch.zeros(size, dtype=torch.bool, device=device)
        self._temperature, self._top_p = (torch.ones(size, device=device) for _ in range(2))
        self._draws = torch.zeros(size, dtype=torch.float64, device=device)
        self._logits = torch.zeros(size, vocabulary, device=device)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)

    def add(self, state: MambaState, row: int, token: int, asked: tuple[float, float] | None) -> None:
        """Take up a sequence whose prompt is read.

        Args:
            state: of several; its own is copied.
            row: which of them.
            token: first of its answer.
            asked: temperature and top_p; None for greedy answers.
        """
        own = self.pool.append(state, row)
        self._asked.append(asked)
        if self.ahead:
            self._ids[own].fill_(token)
            self._changed = True
            if self._captures and not self._graphs:
                for rows in self._sizes:
                    self._graph(rows, "logits", self._forward)
                    self._graph(rows, "greedy", self._choose)

    def remove(self, row: int) -> None:
        """Give a sequence up. The last takes its row."""
        self.pool.remove(row)
        last = self._asked.pop()
        if row < len(self._asked):
            self._asked[row] = last
            if self.ahead:
                self._ids[row].copy_(self._ids[self.pool.used])
        self._changed = True

    def clear(self) -> None:
        """Give all up."""
        self.pool.clear()
        self._asked, self._changed = [], True

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Give every row its token and return what may follow: (n, V) float32, to be written over. The tokens that the
        model must never say are not possible already."""
        if not self.ahead:
            given = torch.tensor(ids, device=self._model.device)[:, None]
            out = self._model(input_ids=given, cache_params=self.pool.view(), use_cache=True, logits_to_keep=1)
            self.pool.write(out.cache_params)
            return self.suppress(out.logits[:, -1])
        put(self._ids, ids)
        self._update()
        rows = self._rows()
        self._run(rows, "logits", self._forward)
        return self._logits[: len(ids)]

    def step(self, draws: Sequence[float], ids: Sequence[int] | None = None) -> Tokens:
        """Choose every row's next token on the device, which goes on from it: only where `ahead`.

        Args:
            draws: of each row, in [0, 1); 0 for greedy ones.
            ids: each row's last token, where the device does not have them from the last step.
        """
        if ids is not None:
            put(self._ids, ids)
        self._update()
        rows, kind = self._rows(), "greedy"
        if any(self._asked):
            put(self._draws, draws)
            kind = "cut" if any(one and one[1] < 1 for one in self._asked) else "whole"
        self._run(rows, "logits", self._forward)
        self._run(rows, kind, self._choose)
        return Tokens(self._tokens[: self.pool.used])

    def _rows(self) -> int:
        return next(size for size in self._sizes if size >= self.pool.used)

    def _update(self) -> None:
        """Tell the device what has changed since the last step."""
        if not self._changed:
            return
        spare = [self.size] * (self.size - self.pool.used)  # rows that only fill a graph write there
        put(self._slots, self.pool.order[: self.pool.used] + spare)
        asked = self._asked + [None] * len(spare)
        put(self._sampled, [one is not None for one in asked])
        put(self._temperature, [one[0] if one else 1.0 for one in asked])
        put(self._top_p, [one[1] if one else 1.0 for one in asked])
        self._changed = False

    def _forward(self, rows: int, _kind: str) -> None:
        language = self._model.language_model
        embeds = language.backbone.embeddings(self._ids[:rows])
        x, _ = language.backbone.decode(embeds, self.pool.layers, self._slots[:rows])
        self._logits[:rows].copy_(self.suppress(language.lm_head(x).float()))

    def suppress(self, logits: Tensor) -> Tensor:
        """Make the tokens impossible, in place, that the model must never say."""
        return logits if self.suppressed is None else logits.index_fill_(-1, self.suppressed, float("-inf"))

    def _choose(self, rows: int, kind: str) -> None:
        logits = self._logits[:rows]
        if kind == "greedy":
            tokens = choosing.greedy(logits)
        else:
            settings = (self._sampled, self._temperature, self._top_p, self._draws)
            tokens = choosing.choose(logits, *(t[:rows] for t in settings), cut=kind == "cut")
        self._tokens[:rows].copy_(tokens)
        self._ids[:rows].copy_(tokens.clamp(min=0))  # a row without numbers goes on from anything

    def _run(self, rows: int, kind: str, work) -> None:
        graph = self._graph(rows, kind, work)
        work(rows, kind) if graph is None else graph.replay()

    def _graph(self, rows: int, kind: str, work) -> torch.cuda.CUDAGraph | None:
        """The captured work, captured now where it is not yet; None where it cannot be."""
        if (rows, kind) in self._graphs or not self._captures:
            return self._graphs.get((rows, kind))
        ids, graph = self._ids.clone(), None
        self._slots.fill_(self.size)  # what compiles and warms up must change no sequence
        try:
            work(rows, kind)
            torch.cuda.synchronize()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            graph = torch.cuda.CUDAGraph()
            # Another thread may be loading the next version.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work(rows, kind)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("decoding is not captured as CUDA graphs, and slower: %s", reason)
            self._captures, graph = False, None
        self._ids.copy_(ids)
        self._changed = True
        self._update()
        if graph is not None:
            self._graphs[rows, kind] = graph
        return graph


def put(buffer: Tensor, values: Sequence) -> None:
    """Write values over the first of a buffer, without waiting for its device."""
    given = torch.tensor(values, dtype=buffer.dtype)
    given = given.pin_memory() if buffer.is_cuda and torch.cuda.is_available() else given
    buffer[: len(values)].copy_(given, non_blocking=True)
