"""Pretrained weights for the vision towers, from timm's hub or from a file."""

import timm
from timm.layers import resample_abs_pos_embed
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from torch import Tensor, nn

from mlmamba.tensor_files import read_tensors
from mlmamba.vision import VisionTower


def load_tower_weights(tower: VisionTower, name: str, weights: str) -> None:
    """Put pretrained weights into a tower; whatever else the source holds (a classifier, say) is not used.

    Args:
        name: the timm model name.
        weights: "hub" to let timm fetch them, or a safetensors or torch checkpoint file in timm's key layout or in
            that of the lukemelas EfficientNet packages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, lacks tensors that the tower needs, or has them in another shape.
    """
    if weights == "hub":
        state = timm.create_model(name, pretrained=True).state_dict()
    else:
        try:
            state = read_tensors(weights)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no weights for {name} at {weights}") from error
        if "_conv_stem.weight" in state:
            state = _from_lukemelas(state, timm.create_model(name, num_classes=1000))
    put_weights(tower, name, state, weights)


def put_weights(tower: VisionTower, name: str, state: dict[str, Tensor], source: str) -> None:
    """Put tensors in timm's key layout into a tower. Position embeddings are resampled to the tower's grid.

    Raises:
        ValueError: `state` lacks tensors that the tower needs, or has them in another shape. It names `source`.
    """
    if isinstance(tower.model, NaFlexVit):  # which also reads what plain vision transformers have
        own = {key.removeprefix("model."): value for key, value in state.items()}
        own |= {
            key: value.clone() for key, value in own.items() if key.endswith("_token")
        }  # which timm adds to in place
        state = checkpoint_filter_fn(own, tower.model)
    own = tower.model.state_dict()
    wanted = {key: _find(state, key) for key in own}
    for key, value in wanted.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "pos_embed" and value is not None and value.shape != own[key].shape:
            wanted[key] = _fit_positions(value, tower.model.get_submodule(module))
    missing = [key for key, value in wanted.items() if value is None and "num_batches_tracked" not in key]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of the {len(own)} tensors of {name}, first {missing[:3]}")
    given = {key: value for key, value in wanted.items() if value is not None}
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{source}: {key} is {tuple(value.shape)}, {name} needs {tuple(own[key].shape)}")
    tower.model.load_state_dict(given, strict=False)


def _fit_positions(embedding: Tensor, model: nn.Module) -> Tensor:
    """Position embeddings (1, prefix + N, channels) for the model's grid: DINOv2's are for 37x37, we use 27x27."""
    if not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        return embedding  # no plain vision transformer; another shape is an error when it is loaded
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    return resample_abs_pos_embed(embedding, list(model.patch_embed.grid_size), num_prefix_tokens=prefix)


def _find(state: dict[str, Tensor], key: str) -> Tensor | None:
    """timm's feature extractors prefix `model.` or write `stages.0` as `stages_0`, by family; accept all three."""
    names = (key, key.removeprefix("model."), key.replace("_", ".", 1))
    return next((state[name] for name in names if name in state), None)


def _from_lukemelas(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a lukemelas EfficientNet checkpoint to timm's keys.

    Both list stem, blocks, head and classifier in the order of the computation, so tensors pair up in order; the
    shapes are checked pair by pair.
    """
    source = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    target = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    if len(source) != len(target):
        raise ValueError(f"the checkpoint has {len(source)} tensors, {type(model).__name__} has {len(target)}")
    renamed = {}
    for (old, value), (new, own) in zip(source.items(), target.items(), strict=True):
        if value.shape != own.shape:
            raise ValueError(f"{old} {tuple(value.shape)} does not fit {new} {tuple(own.shape)}")
        renamed[new] = value
    return renamed
