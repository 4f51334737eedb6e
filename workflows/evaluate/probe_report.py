"""The scaling probe as a table for a person and as a figure."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pipelines.storage import write_atomic
from workflows.evaluate.plots import saved
from workflows.evaluate.probe import DECODE, OURS, PEER, PREFILL, Power, Scaling

_COLOURS, _MARKERS = {OURS: "#0072B2", PEER: "#D55E00"}, {OURS: "o", PEER: "s"}
_LINEAR = 1.15  # powers up to this are called linear: what remains is the machine's noise and its caches


def verdict(scaling: Scaling) -> str:
    """Whether each model reads a prompt in time that grows linearly, in one sentence."""
    found = []
    for model in (OURS, PEER):
        powers = [p for p in scaling.powers if (p.model, p.phase, p.quantity) == (model, PREFILL, "seconds")]
        worst = max(power.last for power in powers)
        word = "linear" if worst <= _LINEAR else "more than linear"
        found.append(f"{model} {word} (power {worst:.2f} over the last three lengths)")
    return "prefill time over length: " + ", ".join(found)


def text(scaling: Scaling) -> str:
    """A table for a person: both models side by side, then the powers."""
    by_key = {(m.model, m.phase, m.batch, m.length): m for m in scaling.measurements}
    sizes = ", ".join(f"{name} {count:,} parameters" for name, count in scaling.parameters.items())
    lines = [
        f"{scaling.device}, {scaling.threads} threads; {sizes}, same vocabulary",
        f"an image: {scaling.image_tokens} tokens, {1000 * scaling.image_seconds:.1f} ms in encoder and connector",
        "",
        f"{'':18}{'prefill, ms':>22}{'':9}{'decode, ms a token':>22}{'':9}{'kept, MB':>18}{'peak, MB':>20}",
        f"{'batch':>6}{'length':>8}    {OURS:>10}{PEER:>12}{'ratio':>8} {OURS:>11}{PEER:>12}{'ratio':>8}"
        f"{OURS:>11}{PEER:>12}{OURS:>11}{PEER:>12}",
    ]
    for batch, length in sorted({(m.batch, m.length) for m in scaling.measurements}):
        a, b = (by_key[model, PREFILL, batch, length] for model in (OURS, PEER))
        c, d = (by_key[model, DECODE, batch, length] for model in (OURS, PEER))
        lines.append(
            f"{batch:>6}{length:>8,}    {1000 * a.seconds:>10.1f}{1000 * b.seconds:>12.1f}"
            f"{b.seconds / a.seconds:>7.2f}x {1000 * c.seconds:>11.2f}{1000 * d.seconds:>12.2f}"
            f"{d.seconds / c.seconds:>7.2f}x"
            f"{_mega(a.kept_bytes)}{_mega(b.kept_bytes, 12)}{_mega(a.peak_bytes)}{_mega(b.peak_bytes, 12)}"
        )
    lines += ["", "grows as length to the power (in brackets: over the last three lengths)"]
    for phase, quantity in (
        (PREFILL, "seconds"),
        (DECODE, "seconds"),
        (PREFILL, "kept bytes"),
        (PREFILL, "peak bytes"),
    ):
        for batch in sorted({m.batch for m in scaling.measurements}):
            powers = [_power(scaling.powers, model, phase, batch, quantity) for model in (OURS, PEER)]
            if any(powers):
                shown = "   ".join(f"{m} {_shown(p)}" for m, p in zip((OURS, PEER), powers, strict=True))
                lines.append(f"{phase} {quantity}, batch {batch:<4} {shown}")
    return "\n".join([*lines, "", verdict(scaling), "ratio: Transformer over ML-Mamba; over 1 ML-Mamba is quicker"])


def draw(scaling: Scaling) -> bytes:
    """PNG: prefill and decode time, what is kept of a prompt and peak memory, over length, on logarithmic axes."""
    figure = Figure(figsize=(10, 7.6))
    panels = [
        ("prefill: ms", PREFILL, lambda m: 1000 * m.seconds),
        ("decode: ms a token", DECODE, lambda m: 1000 * m.seconds),
        ("state or key-value cache: MB", PREFILL, lambda m: m.kept_bytes / 1e6),
        ("peak memory of prefill beside the weights: MB", PREFILL, lambda m: (m.peak_bytes or 0) / 1e6),
    ]
    batches = sorted({m.batch for m in scaling.measurements})
    for axis, (title, phase, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for model in (OURS, PEER):
            for shade, batch in enumerate(batches):
                chosen = [m for m in scaling.measurements if (m.model, m.phase, m.batch) == (model, phase, batch)]
                points = [(m.length, value(m)) for m in chosen if value(m) > 0]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        marker=_MARKERS[model],
                        color=_COLOURS[model],
                        linestyle=("-", "--", ":", "-.")[shade % 4],
                        label=f"{model}, batch {batch}",
                        markersize=5,
                    )
        axis.set_title(title, fontsize=10.5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _frame(axis)
        ticks = sorted({m.length for m in scaling.measurements})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.grid(color="#dfe2e6")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8.5)
    for axis in figure.axes[2:]:
        axis.set_xlabel("prompt length, tokens")
    sizes = " against ".join(f"{name} ({count / 1e6:,.1f} M parameters)" for name, count in scaling.parameters.items())
    figure.suptitle(f"{sizes}\n{scaling.device}, {scaling.threads} threads; thin grey: linear", fontsize=11)
    figure.tight_layout()
    return saved(figure, dpi=130)


def write_probe(scaling: Scaling, out: Path) -> list[Path]:
    """Write scaling.json, scaling.png and scaling.txt into a folder. Returns the files."""
    contents = {
        "scaling.json": json.dumps(scaling.as_dict(), indent=2),
        "scaling.png": draw(scaling),
        "scaling.txt": text(scaling) + "\n",
    }
    for name, content in contents.items():
        write_atomic(out / name, content)
    return [out / name for name in contents]


def _frame(axis) -> None:
    """Plain numbers on an axis of a decade or more, and a line of slope one from the first point, to compare with."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    middle = (low * high) ** 0.5
    low, high = min(low, middle / 10**0.5), max(high, middle * 10**0.5)
    for line in axis.get_lines()[:1]:
        x, y = line.get_xdata()[0], line.get_ydata()[0]
        axis.plot([left, right], [y * left / x, y * right / x], color="#b5bac1", linewidth=0.8, zorder=0)
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _power(powers: Sequence[Power], model: str, phase: str, batch: int, quantity: str) -> Power | None:
    key = (model, phase, batch, quantity)
    return next((p for p in powers if (p.model, p.phase, p.batch, p.quantity) == key), None)


def _shown(power: Power | None) -> str:
    return "-" if power is None else f"{power.power:5.2f} ({power.last:.2f})"


def _mega(count: int | None, width: int = 11) -> str:
    return f"{'-' if count is None else f'{count / 1e6:,.2f}':>{width}}"
