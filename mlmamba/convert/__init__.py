"""Checkpoints of state-spaces/mamba2-*, of transformers' Mamba2 and of the ML-Mamba release into ours, and back.

Into: a language model of any of the three layouts is read by `read_language_model` and put into an ML-Mamba by
`load_language_model`; recipes name one as `model.text.weights`. A released ML-Mamba becomes a whole model folder. Back:
the language model of a model folder is written in the layout of transformers or of state-spaces, or as a GGUF file for
llama.cpp.
Missing and unexpected tensors are errors, and nothing is written unless all of it is.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from mlmamba.convert.gguf_file import FORMS, write_gguf
from mlmamba.convert.language import (
    LanguageModel,
    load_language_model,
    read_language_model,
    write_language_model,
)
from mlmamba.convert.released import convert_released
from mlmamba.presets import PRESETS, with_preset

LAYOUTS = ("mlmamba", "transformers", "state-spaces", "gguf")
TOKENIZER = "EleutherAI/gpt-neox-20b"

__all__ = [
    "FORMS",
    "LAYOUTS",
    "TOKENIZER",
    "Conversion",
    "LanguageModel",
    "convert",
    "load_language_model",
    "read_language_model",
    "write_language_model",
]


@dataclass
class Conversion:
    """What was converted: the layouts, the number of parameters and the folder (of gguf, the file)."""

    source_layout: str
    layout: str
    parameters: int
    folder: str

    def as_dict(self) -> dict:
        return asdict(self)


def convert(
    source: str | Path,
    destination: str | Path,
    to: str | None = None,
    *,
    tokenizer: str = TOKENIZER,
    preset: str = "2.7b",
    vision_weights: list[str] | None = None,
    torch_file: bool = False,
    precision: str | None = None,
) -> Conversion:
    """Convert one checkpoint.

    Args:
        source: the file of a released ML-Mamba checkpoint, or folder or hub name of a language model or model folder.
        destination: the folder to write, or the .gguf file; nothing may be there.
        to: "mlmamba" for a released checkpoint, "transformers", "state-spaces" or "gguf" for a language model. By
            default the first for a file, and for a folder what the destination's name says: "gguf" or "transformers".
        tokenizer: of a released checkpoint; to gguf, for a language model whose folder holds none.
        preset, vision_weights: of a released checkpoint: the preset whose encoders it was trained with, and their
            weights ("hub" or a file for each).
        torch_file: to state-spaces: write pytorch_model.bin too, which mamba_ssm opens.
        precision: to gguf: "fp32" (the default), "bf16" or "q8_0". Other layouts keep every bit.

    Raises:
        FileNotFoundError, FileExistsError: of `source` and `destination`.
        ImportError: to gguf, without the gguf library.
        ValueError: the checkpoint is not what its layout says, or cannot become what `to` says.
    """
    if to not in (None, *LAYOUTS):
        raise ValueError(f"unknown layout {to!r}; choose one of {', '.join(LAYOUTS)}")
    if to is None and Path(destination).suffix == ".gguf":
        to = "gguf"
    if precision is not None and to != "gguf":
        raise ValueError(f"a precision ({precision}) is chosen for gguf files only; other layouts keep every bit")
    if Path(source).is_file():
        if to not in (None, "mlmamba"):
            raise ValueError(
                f"{source} is a file, a released ML-Mamba checkpoint, which becomes mlmamba; convert it to that first "
                f"and the folder to {to} then"
            )
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        vision = with_preset(preset, {})["vision"]
        count = convert_released(source, destination, tokenizer, vision, vision_weights)
        return Conversion("released", "mlmamba", count, str(destination))
    if to == "mlmamba":
        raise ValueError(
            f"{source} is a language model, and an ML-Mamba also needs encoders and a connector: name it in a recipe "
            "as model.text.weights"
        )
    to = to or "transformers"
    model = read_language_model(source)
    if to == "gguf":
        write_gguf(model, destination, precision or "fp32", tokenizer)
        return Conversion(model.layout, to, model.parameters, str(destination))
    write_language_model(model, destination, to, torch_file)
    return Conversion(model.layout, to, model.parameters, str(destination))
