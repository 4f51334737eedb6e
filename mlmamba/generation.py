"""How `generate` drives the model: state in place of a key-value cache, images that belong to their row, any padding.

Greedy search, sampling and beam search work, with several answers per prompt. What would have to take tokens back is
refused: a recurrent state cannot return to an earlier position. Shapes: b batch, l length, n images.
"""

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from mlmamba.checks import check_prompts
from mlmamba.state import MambaState

_REFUSED = {
    "assistant_model": "assisted generation takes tokens back",
    "prompt_lookup_num_tokens": "assisted generation takes tokens back",
    "assistant_early_exit": "assisted generation takes tokens back",
    "use_mtp": "assisted generation takes tokens back",
    "penalty_alpha": "contrastive search reads every candidate and takes it back",
    "dola_layers": "DoLa needs the logits of inner layers",
    "num_beam_groups": "diverse beam search is not implemented",
    "constraints": "constrained beam search is not implemented",
    "force_words_ids": "constrained beam search is not implemented",
    "prefill_chunk_size": "call the model with the pieces of the prompt, and generate with the last and cache_params",
}


class MLMambaGenerationMixin(GenerationMixin):
    """The part of MLMambaForConditionalGeneration that transformers' `generate` calls."""

    _is_stateful = True
    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )

    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """transformers' `generate`, for prompts of unequal length padded on either side.

        Args:
            inputs: the prompts (b, l), or as `input_ids`. Rows that are padded on the right come back padded on the
                left, so that the new tokens follow the prompt: `out[:, l:]` are the new tokens of every row.
            generation_config, kwargs: as in transformers; besides `attention_mask` (b, l), `pixel_values` or
                `image_features`, and `cache_params`, a state to go on from (the prompts are then the new part only).

        Raises:
            ValueError: a prompt is empty or over `max_position_embeddings`, images and placeholders do not match, or
                a way of decoding is asked for that a recurrent model cannot do.
        """
        for name, reason in _REFUSED.items():
            value = kwargs.get(name, getattr(generation_config or self.generation_config, name, None))
            if value and not (name == "num_beam_groups" and value == 1):
                raise ValueError(
                    f"generate cannot use {name}: {reason}; greedy search, sampling and beam search are there"
                )
        if inputs is not None and "input_ids" in kwargs:
            raise ValueError("the prompts are given twice, as inputs and as input_ids")
        ids, mask = kwargs.pop("input_ids", inputs), kwargs.get("attention_mask")
        check_prompts(ids, mask, self.config.max_position_embeddings)
        if mask is not None and bool((mask[:, 1:].bool() < mask[:, :-1].bool()).any()):
            order = torch.argsort(mask.bool().int(), dim=1, stable=True)
            ids, kwargs["attention_mask"] = ids.gather(1, order), mask.gather(1, order)
        return super().generate(ids, generation_config, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        return False  # the state is a MambaState, made by the first forward

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict]:
        """Repeat every row with all its images and its state, for several answers or beams per prompt.

        transformers repeats image by image, which mixes up the images of a prompt that has more than one, and
        does not know the state. Images are encoded once, before they are repeated.
        """
        if expand_size == 1:
            return input_ids, kwargs
        pixels, features = kwargs.pop("pixel_values", None), kwargs.pop("image_features", None)
        state = kwargs.pop("cache_params", None)
        if features is None and pixels is not None:
            features = self.get_image_features(pixels)
        places = self.image_places(input_ids, features)
        if features is not None:
            taken = places.sum(1) if features.ndim == 2 else places.sum(1) // features.shape[1]
            rows = torch.arange(len(features), device=features.device).split(taken.tolist())
            features = features[torch.cat([row.repeat(expand_size) for row in rows])]
        if state is not None:
            rows = torch.arange(len(input_ids), device=input_ids.device)
            state = state.select(rows.repeat_interleave(expand_size))
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        expanded = {"image_features": features, "cache_params": state}
        return input_ids, kwargs | {name: value for name, value in expanded.items() if value is not None}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_params: MambaState | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict:
        """Inputs of one step of `generate`: the whole prompt first, then one token and the state.

        Passing a `cache_params` to `generate` goes on from it; the given ids are then the new part only.
        """
        if is_first_iteration or cache_params is None:
            return {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "pixel_values": pixel_values,
                "image_features": image_features,
                "cache_params": cache_params,
                "use_cache": True,
                "logits_to_keep": 1,
            }
        # From the second step on the state is one that `generate` made itself.
        own = cache_params.in_place()
        return {"input_ids": input_ids[:, -1:], "cache_params": own, "use_cache": True, "logits_to_keep": 1}
