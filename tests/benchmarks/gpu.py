"""Everything there is to know of a GPU, as one table: kernels, decoding, prompts, a training step.

python -m tests.benchmarks.gpu                 # under ten minutes on a data centre GPU
python -m tests.benchmarks.gpu --tiny          # seconds; on a CPU too, to see that it runs

Nothing is downloaded: weights are random. Beside ours stand mamba_ssm's own `generate` with CUDA graphs, of a language
model of the same size, and the machine's limits, which are measured here: the rate of a copy, of which each token needs
the weights and the states once, and the rate of a matrix product. What cannot run is named with its reason.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlmamba import ops
from mlmamba.decoding import Decoder, prepare
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.ops import naive
from mlmamba.positions import find_positions
from mlmamba.presets import preset
from tests.helpers.closeness import gradients, relative_error
from tests.helpers.ops_inputs import conv_inputs, ssd_inputs
from workflows.plan.cost import forward_flops, training_flops


@dataclass(frozen=True)
class Size:
    """What is measured, and how much of it."""

    decoding: str
    batches: tuple[int, ...]
    new_tokens: int
    training: tuple[str, ...]
    length: int
    copied: int
    product: int
    matrix: int = 64
    """Head size and state of the kernels' inputs."""
    repeats: int = 3


FULL = Size("2.7b", (1, 8, 32), 256, ("130m", "1.3b"), 2048, 2**32, 8192)
TINY = Size("tiny", (2,), 2, ("tiny",), 32, 2**20, 64, matrix=16, repeats=1)
TRAINS = ["connector", "language_model"]
Row = tuple[str, str, str]


class Bench:
    """The device, its limits, and the rows of the table as they come."""

    def __init__(self, size: Size):
        self.size = size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        source = torch.empty(size.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * size.copied / self.seconds(lambda: target.copy_(source))
        a = torch.randn(size.product, size.product, device=self.device, dtype=self.half)
        self.peak = 2 * size.product**3 / self.seconds(lambda: a @ a)

    def seconds(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """The shortest of some runs, after one that compiles and warms up; at the tiny size, of one."""
        times, warm = [], self.size.repeats > 1
        for _ in range((repeats or self.size.repeats) + warm):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times[warm:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rows(self) -> Iterator[Row]:
        """Every measurement; one that fails is a row with its reason."""
        yield "limits", "copy, matrix product", f"{self.bandwidth / 1e9:,.0f} GB/s, {self.peak / 1e12:,.1f} TFLOP/s"
        for part in (self.kernels, self.decode, self.train):
            try:
                yield from part()
            except (ImportError, RuntimeError) as error:  # out of memory is a RuntimeError
                yield part.__name__, "stopped", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def kernels(self) -> Iterator[Row]:
        """Worst error of outputs, states and gradients against the recurrence, which is the limit of float32's TF32."""
        for operator in ops.OPERATORS:
            runs, problem = ops.kernel(operator) or "the torch path", ops.kernel_problem(operator)
            yield f"operator {operator}", "runs on", runs + (f" ({problem})" if problem else "")
        m, device = self.size.matrix, self.device.type
        for dtype in (torch.float32, torch.bfloat16):
            scan = ssd_inputs(2 * m + 2, 1, True, True, dtype, device, head_dim=m, state=m)
            yield "scan", str(dtype), _worst(ops.ssd(**scan, chunk_size=m), naive.ssd(**scan), scan)
            for state, packed in ((True, False), (False, True), (True, True)):
                inputs = conv_inputs(m + 1, state, packed, dtype, device, channels=64)
                what = " and ".join(["state"] * state + ["boundaries"] * packed)
                ours, truth = ops.causal_conv1d(**inputs), naive.causal_conv1d(**inputs)
                yield f"convolution with {what}", str(dtype), _worst(ours, truth, inputs)

    def decode(self) -> Iterator[Row]:
        """Prompts of one image and 16 tokens, then new tokens, greedily, as the service makes them."""
        model = self._model(self.size.decoding).to(self.half).eval()
        yield "decoding", self.size.decoding, str(prepare(model, make=False))
        weights = sum(p.nbytes for p in model.language_model.parameters())
        per_image, new = model.connector.tokens(model.vision.grid), self.size.new_tokens
        for batch in self.size.batches:
            image = torch.randn(batch, per_image, model.config.text_config.hidden_size).to(self.device, self.half)
            ids = torch.full((batch, per_image + 16), 5, device=self.device)
            ids[:, :per_image] = model.config.image_token_id
            with torch.inference_mode():
                read = lambda ids=ids, image=image: model(ids, image_features=image, logits_to_keep=1)  # noqa: E731
                prefill, state = self.seconds(read), read().cache_params
                decoder = Decoder(model, batch, ahead=True)
                for row in range(batch):
                    decoder.add(state, row, 5, None)
                whole = self.seconds(lambda decoder=decoder, batch=batch: _steps(decoder, batch, new))
            limit = self.bandwidth / (weights + 2 * state.nbytes) * batch
            yield f"prompt, batch {batch}", self.size.decoding, f"{ids.numel() / prefill:,.0f} tokens/s"
            rate = new * batch / whole
            found = f"{rate:,.0f} tokens/s, {rate / limit:.0%} of the memory's limit of {limit:,.0f}"
            captured = f"{len(decoder._graphs)} graphs" if decoder._graphs else "no graphs"
            yield f"decoding, batch {batch}", captured, found
            yield f"decoding, batch {batch}", "mamba_ssm, graphs", self._mamba_ssm(model, ids, new)

    def _mamba_ssm(self, model, ids: Tensor, new: int) -> str:
        """mamba_ssm's own `generate`, of a language model of the same size and a prompt as long."""
        if self.device.type != "cuda":
            return "not run: it captures CUDA graphs"
        try:
            from mamba_ssm.models.config_mamba import MambaConfig
            from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        except Exception as error:  # an extension of another torch fails in more ways than ImportError
            return f"not run: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        text = model.config.text_config
        layer = {"layer": "Mamba2", "d_state": text.state_size, "headdim": text.head_dim}
        config = MambaConfig(text.hidden_size, 0, text.num_hidden_layers, text.vocab_size, ssm_cfg=layer)
        if not hasattr(self, "_peer"):
            self._peer = MambaLMHeadModel(config, device=self.device, dtype=self.half).eval()
        prompt, rates = ids.clamp(max=5), []
        for length in (1, new):
            call = lambda length=length: self._peer.generate(prompt, prompt.shape[1] + length, cg=True)  # noqa: E731
            rates.append(self.seconds(call, 1))
        return f"{(new - 1) * len(ids) / max(rates[1] - rates[0], 1e-9):,.0f} tokens/s"

    def train(self) -> Iterator[Row]:
        """One packed row with one image: forward, backward and AdamW, in bf16 over float32 weights on a GPU."""
        self.__dict__.pop("_peer", None)
        for name in self.size.training:
            model = self._model(name)
            model.vision.requires_grad_(False)
            model.train()
            cuda = self.device.type == "cuda"
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=cuda)
            inputs, labels, images = self._row(model)

            def step(model=model, optimizer=optimizer, inputs=inputs, cuda=cuda):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
                    loss = model(**inputs, logits_to_keep=1, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            if cuda:
                torch.cuda.reset_peak_memory_stats()
            took = self.seconds(step)
            with torch.device("meta"):
                weightless = MLMambaForConditionalGeneration(model.config)
            work = (TRAINS, self.size.length, labels, images)
            flops, _ = training_flops(forward_flops(weightless), *work, recompute=False)
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:,.1f} GiB" if cuda else "memory not counted"
            share = flops / took / self.peak
            rate = f"{self.size.length / took:,.0f} tokens/s, {share:.0%} of a matrix product's rate, {memory}"
            yield "training step", name, rate

    def _row(self, model) -> tuple[dict, int, int]:
        """A row of two samples, the first with an image; the number of its labels and images."""
        config, length = model.config, self.size.length
        tokens, side = model.connector.tokens(model.vision.grid), config.vision_config.image_size
        ids = torch.randint(2, config.text_config.vocab_size, (1, length))
        ids[ids == config.image_token_id] = 5
        ids[0, :tokens] = config.image_token_id
        labels = ids.masked_fill(ids == config.image_token_id, -100)
        seq_idx = (torch.arange(length) >= (tokens + length) // 2).long()[None]
        positions = find_positions(ids, labels, seq_idx, [tokens], config).to(self.device)
        pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        inputs = {"input_ids": ids, "seq_idx": seq_idx, "pixel_values": pixels}
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        return {**moved, "positions": positions}, len(positions.targets), 1

    def _model(self, name: str) -> MLMambaForConditionalGeneration:
        torch.manual_seed(0)
        with self.device:
            return MLMambaForConditionalGeneration(preset(name))


def _steps(decoder: Decoder, batch: int, new: int) -> None:
    """New tokens, each step begun before the tokens of the last one are here."""
    last = None
    for _ in range(new):
        now = decoder.step([0.0] * batch)
        if last is not None:
            last.get()
        last = now
    last.get()


def _worst(ours: tuple, truth: tuple, inputs: dict) -> str:
    leaves = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    expected, found = gradients(truth, leaves), gradients(ours, leaves)
    outputs = max(relative_error(a, b) for a, b in zip(ours, truth, strict=True))
    return f"outputs {outputs:.0e}, gradients {max(relative_error(found[n], expected[n], 1.0) for n in leaves):.0e}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    tiny = parser.parse_args(arguments).tiny
    if not (tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA GPU here; --tiny runs on a CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    for what, how, figure in Bench(TINY if tiny else FULL).rows():
        print(f"{what:<40}{how:<24}{figure}", flush=True)


if __name__ == "__main__":
    main()
