"""Opening a saved model folder, for answers."""

import logging
from pathlib import Path

import torch

from mlmamba.decoding import pack
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.ops.packed import has_bf16, packs
from mlmamba.processing import MLMambaProcessor

logger = logging.getLogger(__name__)
PRECISIONS = ("auto", "bf16", "fp32", "int8")
"""What weights and activations are kept in. `auto` is bf16 on a GPU that computes in it, elsewhere as the weights were
saved: float32 after a training. `int8` is for a CPU: the language model's weights in whole numbers with a scale for
each output channel; images, norms, the scan and its state stay as they were."""


def load_model(folder: str | Path, device: str | None = None, precision: str = "auto", exact: bool = False):
    """Model in evaluation mode and its processor, from a folder or a hub name.

    Args:
        device: where to put it; a GPU when there is one, by default.
        precision: one of PRECISIONS. In all of them A_log, D, dt_bias, the recurrent state and the logits stay float32.
            What the device lacks is logged with what is taken in its place: int8 on a GPU is bf16, bf16 where nothing
            computes in it float32. A model in int8 is for answers alone; it cannot be trained.
        exact: when it is prepared for answers (`decoding.prepare`), it gives them the same bits whatever is in a batch
            with them, in whatever pieces prompts are read and whether from kept states: a pure Mamba-2 on a CPU with
            compiled code. `model.prepared` says whether that could be had.

    Raises:
        FileNotFoundError: there is no model there.
        ValueError: the precision is not known.
    """
    if Path(folder).exists() and not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked, precision = precision, _possible(precision, torch.device(device))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, "auto")
    model = MLMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
    if precision == "int8":
        pack(model.language_model, "int8")
    model.exact, model.lacking = exact, "" if asked in ("auto", precision) else asked
    return model, MLMambaProcessor.from_pretrained(folder)


def _possible(precision: str, device: torch.device) -> str:
    """The precision, or the next best one where the device does not compute in it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "int8":
            logger.warning("precision int8 is for CPUs: the model computes in %s", "bf16" if half else "float32")
        elif precision != "fp32" and not half:
            logger.warning("%s has no bf16: the model computes in float32", torch.cuda.get_device_name(device))
        return "fp32" if precision == "fp32" or not half else "bf16"
    if precision == "int8" and (problem := packs()):
        logger.warning("precision int8 cannot be had: %s; the model computes as it was saved", problem)
        return "auto"
    if precision == "bf16" and device.type == "cpu" and not has_bf16():
        logger.warning("this processor has no bf16: the model computes in float32; int8 may be faster")
        return "fp32"
    return precision
