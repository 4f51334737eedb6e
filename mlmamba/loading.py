"""Opening a saved model folder, for answers."""

import logging
from pathlib import Path

import torch

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.processing import MLMambaProcessor

PRECISIONS = ("auto", "bf16", "fp32")
"""What weights and activations are kept in. `auto` is bf16 on a GPU that computes in it, elsewhere as the weights were
saved: float32 after a training."""


def load_model(folder: str | Path, device: str | None = None, precision: str = "auto"):
    """Model in evaluation mode and its processor, from a folder or a hub name.

    Args:
        device: where to put it; a GPU when there is one, by default.
        precision: one of PRECISIONS. In bf16 A_log, D, dt_bias, the recurrent state and the logits stay float32.

    Raises:
        FileNotFoundError: there is no model there.
        ValueError: the precision is not known, or the GPU has no bf16.
    """
    if Path(folder).exists() and not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(precision, torch.device(device))
    model = MLMambaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
    return model, MLMambaProcessor.from_pretrained(folder)


def _dtype(precision: str, device: torch.device) -> torch.dtype | str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return torch.float32
    if precision == "auto" and device.type != "cuda":
        return "auto"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        if precision == "bf16":
            raise ValueError(f"precision is bf16, and {name} does not compute in it; choose fp32")
        logging.getLogger(__name__).warning("%s has no bf16: the model computes in float32", name)
        return torch.float32
    return torch.bfloat16
