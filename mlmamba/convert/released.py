"""The released ML-Mamba checkpoint (paper.md 2.3 and 8.1) as a model folder of this library.

The file is a torch dict: {"model": {"llm_backbone": ..., "mlp": ..., "bidirectional_mamba": ..., "projector": ...}},
each the state dict of one module. It holds no vision tower: both were frozen at timm's weights. A "vision_backbone" is
used where there is one. Sizes are read off the tensors; they need the connector's "released" layout.
"""

import re
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from mlmamba.configuration import MLMambaConfig
from mlmamba.connector import tokens_per_image
from mlmamba.conversation import IMAGE_TOKEN
from mlmamba.convert.folders import new_folder
from mlmamba.convert.language import EMBEDDING, HEAD, complete_names
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import LONGEST
from mlmamba.processing import MLMambaProcessor
from mlmamba.tensor_files import check_tensors, read_checkpoint
from mlmamba.vision import VisionEncoder, measure
from mlmamba.vision_weights import load_tower_weights, put_weights

GROUPS = ("llm_backbone", "mlp", "bidirectional_mamba", "projector")
TOWERS = ("dino_featurizer.", "siglip_featurizer.")


def convert_released(
    file: str | Path,
    destination: str | Path,
    tokenizer: str,
    vision: dict,
    vision_weights: list[str] | None = None,
) -> int:
    """Write a released checkpoint as a model folder, whole or not at all.

    Args:
        tokenizer: folder or hub name of the tokenizer that it was trained with; gets an `<image>` entry if it has none.
        vision: fields of the VisionConfig whose features it was trained on.
        vision_weights: for each tower "hub" or a file. By default the checkpoint's own, or else the hub's.

    Returns:
        Number of parameters.

    Raises:
        FileNotFoundError: there is no such file, or a tower's weights are not there.
        FileExistsError: something is at `destination` already.
        ValueError: tensors are missing or unexpected, or encoders or tokenizer do not fit.
    """
    with new_folder(destination) as partial:
        groups = read_groups(file)
        config = config_of(groups, vision, str(file))
        processor = _processor(tokenizer, config)
        tensors = {f"connector.{name}": value for name, value in connector_tensors(groups).items()}
        text = language_tensors(groups)
        if not torch.equal(text[HEAD], text[EMBEDDING]):
            raise ValueError(f"{file}: the released model ties {HEAD} to the embedding, but here they differ")
        tensors |= {f"language_model.{name}": value for name, value in text.items()}
        encoder = _vision(config.vision_config, groups.get("vision_backbone"), vision_weights, str(file))
        tensors |= {f"vision.{name}": value for name, value in encoder.state_dict().items()}
        with torch.device("meta"):
            model = MLMambaForConditionalGeneration(config)
        expected = model.state_dict()
        check_tensors(tensors, expected, str(file))
        model.load_state_dict(tensors, assign=True)
        model.language_model.lm_head.weight = model.language_model.backbone.embeddings.weight
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return sum(parameter.numel() for parameter in model.parameters())


def read_groups(file: str | Path) -> dict[str, dict[str, Tensor]]:
    """The module state dicts of a released checkpoint.

    Raises:
        FileNotFoundError, ValueError: the file is not there, cannot be read, or lacks one of the four modules.
    """
    content = read_checkpoint(file).get("model")
    found = list(content) if isinstance(content, dict) else []
    missing, unexpected = [g for g in GROUPS if g not in found], sorted(set(found) - {*GROUPS, "vision_backbone"})
    if missing or unexpected:
        raise ValueError(
            f"{file} is not a released ML-Mamba checkpoint: its entry 'model' should hold {', '.join(GROUPS)}; "
            f"missing {missing}, unexpected {unexpected}"
        )
    return {name: dict(tensors) for name, tensors in content.items()}


def language_tensors(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The language model under our names, its tied head included. Files saved under DDP prefix names with "llm."."""
    tensors = complete_names({name.removeprefix("llm."): value for name, value in groups["llm_backbone"].items()})
    if EMBEDDING in tensors:
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    return tensors


def connector_tensors(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The three connector modules under our names: the backward scan's `conv1d_b`, `A_log_b`, ... become scan 1."""
    tensors = {f"mlp.{name}": value for name, value in groups["mlp"].items()}
    tensors |= groups["projector"]  # its names begin with "projector."
    for name, value in groups["bidirectional_mamba"].items():
        match = re.fullmatch(r"(layers\.\d+\.mixer\.)(conv1d|dt_bias|A_log|D)(_b)?((?:\..*)?)", name)
        if match:
            mixer, parameter, backward, rest = match.groups()
            name = f"{mixer}scans.{1 if backward else 0}.{parameter}{rest}"
        tensors[name] = value
    return tensors


def config_of(groups: dict[str, dict[str, Tensor]], vision: dict, source: str) -> MLMambaConfig:
    """The configuration that the tensors' shapes tell.

    Raises:
        ValueError: the tensors that tell it are missing, or the encoders have another width than the connector takes.
    """
    text, connector = language_tensors(groups), connector_tensors(groups)
    try:
        rows, width = text[EMBEDDING].shape
        channels = connector["mlp.0.weight"].shape[1]
        hidden = connector["projector.0.weight"].shape[0]
        sizes = _mixer_sizes(text, "backbone.layers.0.mixer.", "", width)
        scan = _mixer_sizes(connector, "layers.0.mixer.", "scans.0.", width)
    except KeyError as error:
        raise ValueError(f"{source} is not a released ML-Mamba checkpoint: it has no {error.args[0]!r}") from error
    config = MLMambaConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": width,
            "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in text if n.startswith("backbone.layers.")),
            "num_heads": width * sizes["expand"] // sizes["head_dim"],
            "n_groups": 1,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **sizes,
        },
        vision_config=vision,
        connector_config={"name": "msc_advanced", "scan": "bsm", "layout": "released", "hidden_size": hidden, **scan},
        max_position_embeddings=LONGEST,
    )
    given = measure(config.vision_config)[0]
    if given != channels:
        raise ValueError(f"{source} takes {channels} vision channels; the encoders {vision['towers']} give {given}")
    return config


def _mixer_sizes(tensors: dict[str, Tensor], mixer: str, scan: str, width: int) -> dict[str, int]:
    """Sizes of a Mamba-2 mixer with one group, as all released ones have."""
    inner, heads = tensors[f"{mixer}out_proj.weight"].shape[1], len(tensors[f"{mixer}{scan}A_log"])
    conv_dim, _, kernel = tensors[f"{mixer}{scan}conv1d.weight"].shape
    return {
        "expand": inner // width,
        "head_dim": inner // heads,
        "state_size": (conv_dim - inner) // 2,
        "conv_kernel": kernel,
    }


def _vision(config, own: dict[str, Tensor] | None, weights: list[str] | None, source: str) -> VisionEncoder:
    """The encoders with their weights: from the files given, the checkpoint's own, or the hub's."""
    encoder = VisionEncoder(config)
    names = [tower.name for tower in encoder.towers]
    if weights and len(weights) != len(names):
        raise ValueError(f"{len(weights)} files of vision weights were given for {len(names)} encoders {names}")
    for i, tower in enumerate(encoder.towers):
        if own and not weights:
            prefix = TOWERS[i]
            part = {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
            put_weights(tower, tower.name, part, f"{source}: {prefix}*")
        else:
            load_tower_weights(tower, tower.name, weights[i] if weights else "hub")
    return encoder


def _processor(name: str, config: MLMambaConfig) -> MLMambaProcessor:
    """The processor of a config; sets its `image_token_id` to the tokenizer's."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer {name}: {error}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [image]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer {name} has {len(tokenizer):,} entries with {IMAGE_TOKEN}, the model {rows:,}")
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return MLMambaProcessor(
        tokenizer,
        image_size=config.vision_config.image_size,
        tokens_per_image=tokens_per_image(config),
        max_length=config.max_position_embeddings,
    )
