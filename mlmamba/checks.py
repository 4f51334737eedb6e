"""Checks of what the model is given: every error says what came and what was expected; nothing is cut or ignored.

Shapes: b batch, l length, n images, N tokens per image, d language width.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mlmamba.state import KeyValueState, MambaState


def describe(value: Tensor) -> str:
    """Dtype, shape and device of a tensor, for error messages: `torch.int64 (2, 7) on cpu`."""
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"


def check_text(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    per_token: dict[str, Tensor | None],
    config,
    values: bool = True,
) -> tuple[int, int]:
    """Check the sequence inputs of a forward pass.

    Args:
        input_ids: (b, l) integers below the vocabulary size, or None.
        inputs_embeds: (b, l, d) floats, or None. Exactly one of the two is given.
        per_token: by name, what has one integer per token (labels, seq_idx) or is a mask; None where not given.
        config: MLMambaConfig.
        values: whether to look at the ids too, which reads them from their device.

    Returns:
        b and l.

    Raises:
        ValueError: a tensor is missing, empty, or of another shape or dtype than it should be.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is not None:
        name, sequence, width = "input_ids", input_ids, ()
        if input_ids.ndim != 2 or not _whole(input_ids):
            raise ValueError(f"input_ids is {describe(input_ids)}; expected integers (batch, length)")
    else:
        name, sequence, width = "inputs_embeds", inputs_embeds, (config.text_config.hidden_size,)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2:] != width or not inputs_embeds.is_floating_point():
            raise ValueError(f"inputs_embeds is {describe(inputs_embeds)}; expected floats (batch, length, {width[0]})")
    rows, length = sequence.shape[:2]
    if not rows or not length:
        raise ValueError(f"the prompt is empty: {name} is {describe(sequence)}; give at least one token")
    for other, value in per_token.items():
        if value is None:
            continue
        if tuple(value.shape) != (rows, length):
            raise ValueError(
                f"{other} is {describe(value)}; expected ({rows}, {length}), one value per token of {name}"
            )
        if other != "attention_mask" and not _whole(value):
            raise ValueError(f"{other} is {describe(value)}; expected integers")
    if values and input_ids is not None and length > 1 and input_ids.device.type != "meta":
        check_ids(input_ids, config.text_config.vocab_size)
    return rows, length


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Check that all ids are in the vocabulary; reads them from their device. Raises ValueError."""
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids holds ids from {low} to {high}; the vocabulary is 0 to {vocabulary - 1}")


def check_places(found: list[int], features: tuple[int, ...] | None, each: Sequence[int] = ()) -> None:
    """Check that images fill the placeholders of a batch exactly.

    Args:
        found: placeholders in each row.
        features: (n, N), images and tokens of each; (k,), single vectors; None for no images.
        each: of single vectors, how many each image has, where that is known.

    Raises:
        ValueError: there are more or fewer, or an image would be split over two rows.
    """
    if features is None:
        expected, given = 0, "no images were given"
    elif len(features) == 1:
        expected, given = features[0], f"{features[0]} feature vectors were given"
        if each:
            given = f"{len(each)} images of {min(each)} to {max(each)} tokens were given ({expected} expected)"
    else:
        expected = features[0] * features[1]
        given = f"{features[0]} images of {features[1]} tokens were given ({expected} expected)"
    if sum(found) != expected:
        raise ValueError(
            f"the prompt has {sum(found)} image placeholders but {given}; expand each <image> with "
            "MLMambaProcessor and pass every image"
        )
    if each and (within := set(accumulate(found)) - {0, *accumulate(each)}):
        row = list(accumulate(found)).index(min(within))
        raise ValueError(f"row {row} ends within an image; an image does not go on in the next row")
    if features is not None and len(features) == 2:
        for row, count in enumerate(found):
            if count % features[1]:
                raise ValueError(
                    f"row {row} has {count} image placeholders, no multiple of the {features[1]} tokens of "
                    "an image; an image does not go on in the next row"
                )


def check_images(
    input_ids: Tensor | None,
    pixel_values: Tensor | None,
    image_features: Tensor | None,
    config,
    vision_features: Tensor | None = None,
) -> None:
    """Check the image inputs, but for the pixels themselves, which the encoder checks.

    Raises:
        ValueError: images are given twice or beside embeddings, or the features are not (n, N, d) or (k, d).
    """
    ways = (("pixel_values", pixel_values), ("image_features", image_features), ("vision_features", vision_features))
    given = [name for name, t in ways if t is not None]
    if len(given) > 1:
        raise ValueError(f"both {given[0]} and {given[1]} are given; give the images one way")
    if given and input_ids is None:
        raise ValueError(f"{given[0]} is given with inputs_embeds, which hold the images already; give input_ids")
    if image_features is None:
        return
    width = config.text_config.hidden_size
    fits = image_features.ndim in (2, 3) and image_features.shape[-1] == width and image_features.is_floating_point()
    if not fits:
        raise ValueError(
            f"image_features is {describe(image_features)}; expected floats (images, tokens, {width}) "
            f"as from get_image_features, or (placeholders, {width})"
        )


def check_state(state: MambaState | None, rows: int, config) -> None:
    """Check a state that a forward pass is to go on from.

    Raises:
        TypeError: it is no MambaState.
        ValueError: it is of another number of sequences or layers.
    """
    if state is None:
        return
    if not isinstance(state, MambaState):
        raise TypeError(f"cache_params is a {type(state).__name__}; expected the MambaState of an earlier call")
    if not state.layers:
        return
    expected = len(config.text_config.keeps)
    if len(state.layers) != expected:
        raise ValueError(f"the state (cache_params) has {len(state.layers)} layers, the model {expected}")
    keeps = [isinstance(layer, KeyValueState) for layer in state.layers]
    if keeps != config.text_config.keeps:
        raise ValueError(
            f"the state (cache_params) is of a model with attention in {sum(keeps)} of {expected} layers or in others; "
            f"this one has it in {sum(config.text_config.keeps)}"
        )
    if state.rows != rows:
        raise ValueError(
            f"the state (cache_params) is of {state.rows} sequences, the input of {rows}; choose rows with "
            "MambaState.select"
        )


def check_device(device: torch.device, state: MambaState | None, tensors: dict[str, Tensor | None]) -> None:
    """Check that all inputs lie on the model's device. Raises ValueError."""
    if state is not None and state.layers:
        tensors = {**tensors, "cache_params": state.layers[0].parts[0]}
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device}, the model on {device}; move one to the other with .to()")


def check_room(lengths: list[int], state: MambaState | None, new: int | None, config) -> None:
    """Check that attention has room for prompts of these lengths, what was read before and `new` tokens of an answer.

    Raises:
        ValueError: it has not, and generation would end in an error.
    """
    room, read = config.text_config.room, 0 if state is None else state.longest
    if room is not None and new is not None and max(lengths) + read + new - 1 > room:
        raise ValueError(
            f"a prompt of {max(lengths) + read} tokens and {new} new ones are over the {room} for which attention has "
            "room (text_config.max_position_embeddings); lower max_new_tokens"
        )


def check_prompts(input_ids: Tensor | None, attention_mask: Tensor | None, limit: int) -> list[int]:
    """Check the prompts that `generate` is given, and count their tokens.

    Args:
        input_ids: (b, l).
        attention_mask: (b, l), 0 at padding, or None.
        limit: longest prompt in tokens.

    Raises:
        ValueError: there is no prompt, one is empty, or one is over the limit.
    """
    if input_ids is None:
        raise ValueError("generate needs input_ids, with the images as pixel_values or image_features")
    if input_ids.ndim != 2 or not _whole(input_ids):
        raise ValueError(f"input_ids is {describe(input_ids)}; expected integers (batch, length)")
    if not input_ids.numel():
        raise ValueError(f"the prompt is empty: input_ids is {describe(input_ids)}; give at least one token")
    lengths = [input_ids.shape[1]] * len(input_ids)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {describe(attention_mask)}; expected {tuple(input_ids.shape)}, as input_ids"
            )
        lengths = attention_mask.bool().sum(1).tolist()
    for row, length in enumerate(lengths):
        if not length:
            raise ValueError(f"prompt {row} is empty: its attention_mask has no 1")
        if length > limit:
            raise ValueError(
                f"prompt {row} is {length} tokens long, over the limit of {limit} (max_position_embeddings); shorten it"
            )
    return lengths


def _whole(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
