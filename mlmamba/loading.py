"""Opening a saved model folder."""

from pathlib import Path

import torch

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.processing import MLMambaProcessor


def load_model(folder: str | Path, device: str | None = None):
    """Model in evaluation mode and its processor, from a folder or a hub name.

    Args:
        device: where to put it; a GPU when there is one, by default.

    Raises:
        FileNotFoundError: there is no model there.
    """
    if Path(folder).exists() and not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = MLMambaForConditionalGeneration.from_pretrained(folder).eval().to(device)
    return model, MLMambaProcessor.from_pretrained(folder)
