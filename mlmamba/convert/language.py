"""Mamba-2 language models in three layouts: state-spaces, transformers, and inside an ML-Mamba model folder.

Tensors keep the dtype and every bit that they have in the file.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Mamba2Config

from mlmamba.configuration import MLMambaConfig
from mlmamba.convert.families import FAMILIES, from_family, from_family_names
from mlmamba.convert.folders import copy_tokenizer, find_folder, new_folder
from mlmamba.convert.layouts import check_supported, from_state_spaces, to_state_spaces
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.tensor_files import check_tensors, read_folder

EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
_STATE_SPACES_EMBEDDING = "backbone.embedding.weight"
_OURS = "language_model."


@dataclass
class LanguageModel:
    """A Mamba-2 language model at rest.

    Attributes:
        config: as transformers has it; `vocab_size` is the number of rows of the embedding.
        tensors: by transformers' names, complete and of the right shapes. A tied head is not among them.
        layout: where it comes from: "state-spaces", "transformers", "mlmamba", or a hybrid's model_type.
        folder: the folder it was read from.
    """

    config: Mamba2Config
    tensors: dict[str, Tensor]
    layout: str
    folder: Path

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.tensors.values())


def read_language_model(source: str | Path) -> LanguageModel:
    """Read a language model from a folder or hub repository of any of the three layouts, told by its config.json.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it holds no config.json or no weights.
        ValueError: it is another kind of model, or its tensors are not exactly those that its config describes.
    """
    folder = find_folder(source)
    layout, config = _read_config(folder)
    found = read_folder(folder)
    if layout == "mlmamba":
        found = {name.removeprefix(_OURS): value for name, value in found.items() if name.startswith(_OURS)}
    elif layout in FAMILIES:
        found = from_family_names(found, layout)
    return LanguageModel(config, _complete(found, config, str(source)), layout, folder)


def write_language_model(model: LanguageModel, destination: str | Path, layout: str, torch_file: bool = False) -> None:
    """Write a language model as a folder of config.json and model.safetensors, whole or not at all.

    Args:
        layout: "transformers" or "state-spaces".
        torch_file: write pytorch_model.bin as well, the only file that mamba_ssm's own `from_pretrained` opens.

    Raises:
        FileExistsError: something is at `destination` already.
        ValueError: the layout cannot express the model, or there is no such layout.
    """
    if layout not in ("transformers", "state-spaces"):
        raise ValueError(f"a language model is written as transformers or state-spaces, not {layout!r}")
    if getattr(model.config, "layers", None) is not None:
        raise ValueError(
            f"{model.folder} is a hybrid, of {', '.join(sorted({*model.config.layers}))} blocks; only a pure Mamba-2 "
            f"is written as {layout}"
        )
    tensors, tied = dict(model.tensors), model.config.tie_word_embeddings
    with new_folder(destination) as partial:
        if layout == "state-spaces":
            config = to_state_spaces(model.config)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            tensors[_STATE_SPACES_EMBEDDING] = tensors.pop(EMBEDDING)
            if tied:  # mamba_ssm loads strictly and wants both
                tensors[HEAD] = tensors[_STATE_SPACES_EMBEDDING]
        else:
            config = Mamba2Config.from_dict(model.config.to_dict())
            config.architectures = ["Mamba2ForCausalLM"]
            config.dtype = tensors[EMBEDDING].dtype
            config.save_pretrained(partial)
        save_tensors(tensors, partial / "model.safetensors")
        if torch_file:
            torch.save(tensors, partial / "pytorch_model.bin")
        copy_tokenizer(model.folder, partial)


def load_language_model(module: Mamba2LanguageModel, model: LanguageModel) -> None:
    """Put a language model's weights into a module of the same sizes, whose vocabulary may be larger.

    Raises:
        ValueError: the sizes differ, the module's vocabulary is smaller, or it has no head where the weights have one.
    """
    own, tensors = module.state_dict(), dict(model.tensors)
    tied = module.lm_head.weight is module.backbone.embeddings.weight
    if model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    elif tied:
        raise ValueError(f"{model.folder} has a language head of its own, and the model ties it to the embedding")
    rows = model.config.vocab_size
    if rows > len(own[EMBEDDING]):
        raise ValueError(
            f"{model.folder} has a vocabulary of {rows:,} rows, more than the model's {len(own[EMBEDDING]):,}: they do "
            "not share a tokenizer, or the model needs more rows"
        )
    for name in (EMBEDDING, HEAD):
        if tensors[name].shape[1:] == own[name].shape[1:]:
            tensors[name] = torch.cat([tensors[name].to(own[name]), own[name][rows:]])
    check_tensors(tensors, own, str(model.folder))
    module.load_state_dict(tensors)


def complete_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, the embedding under transformers' name."""
    return {EMBEDDING if name == _STATE_SPACES_EMBEDDING else name: value for name, value in tensors.items()}


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that transformers opens, and see it on the disk. It holds no two views of one tensor."""
    seen, whole = set(), {}
    for name, value in tensors.items():
        shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        whole[name] = value.clone() if shared else value.contiguous()
    save_file(whole, file, metadata={"format": "pt"})
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _read_config(folder: Path) -> tuple[str, Mamba2Config]:
    """Layout and language config of a model folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    try:
        if kind == "mlmamba":
            return "mlmamba", MLMambaConfig.from_pretrained(folder).text_config
        if kind == "mamba2":
            config = AutoConfig.from_pretrained(folder)
            check_supported(config)
            return "transformers", config
        if kind in FAMILIES:
            return kind, from_family(file)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    if isinstance(raw, dict) and {"d_model", "n_layer", "vocab_size"} <= raw.keys():
        return "state-spaces", from_state_spaces(raw)
    raise ValueError(
        f"{file} describes no Mamba-2 language model: model_type is {kind!r}. Known are transformers' (mamba2, "
        f"{', '.join(FAMILIES)}), mlmamba's, and state-spaces' (without a model_type, with d_model and n_layer)"
    )


def _complete(found: dict[str, Tensor], config: Mamba2Config, source: str) -> dict[str, Tensor]:
    """The tensors under transformers' names, a tied head left out; ValueError unless they are exactly the config's."""
    found = complete_names(found)
    with torch.device("meta"):
        expected = Mamba2LanguageModel(config).state_dict()
    if config.tie_word_embeddings:
        if HEAD in found and EMBEDDING in found and not torch.equal(found[HEAD], found[EMBEDDING]):
            raise ValueError(f"{source}: the config ties {HEAD} to {EMBEDDING}, but they differ")
        found.pop(HEAD, None)
        expected.pop(HEAD)
    check_tensors(found, expected, source)
    return found
