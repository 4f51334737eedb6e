"""Whether the pretrained weights that a recipe names are there, asked before the data is prepared: names and sizes."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download

from workflows.build import locate
from workflows.configs.model import ModelRecipe
from workflows.errors import UsageError

_TOWER_FROM_TIMM = ("hub", "random")


def check_weights(model: ModelRecipe) -> None:
    """Raise UsageError when a file, folder or hub name is not there, or the language model has another size.

    Of a model on the hub only its config.json is fetched.
    """
    for i, tower in enumerate(model.vision.towers):
        if tower.weights not in _TOWER_FROM_TIMM and not Path(locate(tower.weights)).exists():
            raise UsageError(f"model.vision.towers.{i}.weights: there is no file {tower.weights}")
    weights = model.text.weights
    if weights == "random":
        return
    config = _config(weights)
    own = config.get("text_config", config)
    for name, other in (("hidden_size", "d_model"), ("num_hidden_layers", "n_layer")):
        found, wanted = own.get(name, own.get(other)), getattr(model.text, name)
        if found is None:
            raise UsageError(
                f"model.text.weights: {weights} is no Mamba-2 language model: it has no {name} and no {other}"
            )
        if found != wanted:
            raise UsageError(
                f"model.text: {weights} has {name} {found}, the recipe says {wanted}; set it to the checkpoint's, or "
                "model.preset to its size"
            )


def _config(weights: str) -> dict:
    """config.json of a folder or hub name."""
    try:
        local = Path(weights).is_dir() or Path(weights).is_absolute() or len(Path(weights).parts) > 2
        file = Path(weights) / "config.json" if local else Path(hf_hub_download(weights, "config.json"))
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"model.text.weights: cannot load {weights}: give a folder with config.json, or the name of a model that "
            f"the hub has and this machine reaches ({reason[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"model.text.weights: {weights}: config.json is not a mapping")
    return content
