"""How `generate` drives the model: state in place of a key-value cache, images that belong to their row, any padding.

Greedy search, sampling and beam search work, with several answers per prompt. What would have to take tokens back is
refused: a recurrent state cannot return to an earlier position. Shapes: b batch, l length, n images.
"""

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from mlmamba.checks import check_prompts, check_room
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
    "output_hidden_states": "the model returns no hidden states of its blocks",
    "output_attentions": "the model has no attentions",
    "prefill_chunk_size": "call the model with the pieces of the prompt, and generate with the last and cache_params",
}


def new_part(ids: Tensor, kwargs: dict, read: list[list[int]], image: int) -> tuple[Tensor, dict]:
    """What of the prompts a state has not read, where they are whole conversations; else the prompts as they are.

    Args:
        ids: (b, l), padded on the left if at all.
        kwargs: of `generate`.
        read: tokens that the state of each row has read.
        image: id of the placeholder of images.

    Returns:
        ids (b, m) and kwargs of the new part: its mask, and its images.

    Raises:
        ValueError: there is nothing new.
    """
    mask = kwargs.get("attention_mask")
    rows = [row.tolist() if mask is None else row[mask[i].bool()].tolist() for i, row in enumerate(ids)]
    if len(rows) != len(read) or any(row[: len(old)] != old for row, old in zip(rows, read, strict=True)):
        return ids, kwargs
    fresh = [row[len(old) :] for row, old in zip(rows, read, strict=True)]
    if not all(fresh):
        raise ValueError(f"prompt {fresh.index([])} is what the state has read already; give the next turn too")
    longest = max(map(len, fresh))
    out, seen = ids.new_zeros(len(fresh), longest), torch.zeros(len(fresh), longest, dtype=torch.long)
    for i, row in enumerate(fresh):
        out[i, longest - len(row) :] = ids.new_tensor(row)
        seen[i, longest - len(row) :] = 1
    kwargs = kwargs | {"attention_mask": seen.to(ids.device)}
    for name in ("pixel_values", "image_features"):
        if (given := kwargs.get(name)) is not None:
            kwargs[name] = _new_images(given, [row.count(image) for row in rows], [old.count(image) for old in read])
    return out, kwargs


def _new_images(given: Tensor, total: list[int], read: list[int]) -> Tensor | None:
    """Images (n, ...) without those whose placeholders were read, as counted by row; as they are if only new ones."""
    each = sum(total) // max(len(given), 1)
    if not each or any(count % each for count in read):
        return given
    first, kept = 0, []
    for count, old in zip(total, read, strict=True):
        kept += range(first + old // each, first + count // each)
        first += count // each
    return given[kept] if kept else None


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
            generation_config, kwargs: as in transformers; besides `attention_mask` (b, l), `pixel_values` (with
                their `spatial_shapes`) or `image_features`, and `cache_params`, a state to go on from, also as
                `past_key_values`. The prompts are then the new part only, with its images; after a state that
                `generate` returned they may also be the whole conversation with all images, of which only the new part
                is read.

        Returns:
            As transformers' `generate`. With `return_dict_in_generate` the state is there by both names, and it has
            read each row's answer to its end: the last token and the end token too, and no padding after it.

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
        if (state := kwargs.pop("past_key_values", None)) is not None:
            if kwargs.get("cache_params") is not None:
                raise ValueError("the state is given twice, as cache_params and as past_key_values")
            kwargs["cache_params"] = state
        if (shapes := kwargs.pop("spatial_shapes", None)) is not None and kwargs.get("pixel_values") is not None:
            kwargs["image_features"] = self.get_image_features(kwargs.pop("pixel_values"), shapes)
        ids, mask = kwargs.pop("input_ids", inputs), kwargs.get("attention_mask")
        lengths = check_prompts(ids, mask, self.config.max_position_embeddings)
        new = kwargs.get("max_new_tokens", (generation_config or self.generation_config).max_new_tokens)
        if mask is not None and bool((mask[:, 1:].bool() < mask[:, :-1].bool()).any()):
            order = torch.argsort(mask.bool().int(), dim=1, stable=True)
            ids, kwargs["attention_mask"] = ids.gather(1, order), mask.gather(1, order)
        whole, read = ids, getattr(kwargs.get("cache_params"), "read", None)
        if read is not None:
            ids, kwargs = new_part(ids, kwargs, read, self.config.image_token_id)
            lengths = [max(ids.shape[1], 1)]
        check_room(lengths, kwargs.get("cache_params"), new, self.config)
        out = super().generate(ids, generation_config, **kwargs)
        sequences = out if isinstance(out, Tensor) else out.sequences
        if sequences.shape[1] > ids.shape[1] and not isinstance(out, Tensor) and out.past_key_values is not None:
            config = generation_config or self.generation_config
            ends = kwargs.get("eos_token_id", config.eos_token_id)
            out["past_key_values"] = out["cache_params"] = self._state_after(out, ids, kwargs, ends)
        if whole is not ids:
            rows = whole.repeat_interleave(len(sequences) // len(whole), 0)
            sequences = torch.cat([rows, sequences[:, ids.shape[1] :]], 1)
            if isinstance(out, Tensor):
                return sequences
            out["sequences"] = sequences
        return out

    @torch.inference_mode()
    def _state_after(self, out, ids: Tensor, kwargs: dict, ends: int | list[int] | None) -> MambaState:
        """State after every row's answer, the token that was chosen last included.

        Args:
            out: of transformers' `generate`, whose state lacks that token, has read the padding behind answers that
                ended before others, and is of other rows where beams were searched.
            ids, kwargs: what it was given.
            ends: tokens that end an answer, if any do.
        """
        sequences, start = out.sequences, kwargs.get("cache_params")
        new = sequences[:, ids.shape[1] :]
        ends = torch.tensor([] if ends is None else ends, dtype=new.dtype, device=new.device)
        ended = torch.isin(new, ends)
        keep = ended.cumsum(1) - ended.int() == 0  # up to and with the first end
        each = len(sequences) // len(ids)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        mask = torch.cat([mask.repeat_interleave(each, 0).to(keep.dtype), keep], 1)
        if "beam_indices" in type(out).__dataclass_fields__ or not bool(keep.all()):
            given = {name: kwargs.get(name) for name in ("pixel_values", "image_features", "cache_params")}
            given = self._repeated(each, ids, **given)
            read = self(input_ids=sequences, attention_mask=mask.long(), use_cache=True, logits_to_keep=1, **given)
        else:
            own = out.past_key_values.in_place()
            read = self(input_ids=new[:, -1:], cache_params=own, use_cache=True, logits_to_keep=1)
        state = MambaState([layer.own(in_place=False) for layer in read.cache_params.layers])
        before = getattr(start, "read", None) if start is not None else [[]] * len(ids)
        if before is not None:
            rows = [row[kept].tolist() for row, kept in zip(sequences, mask.bool(), strict=True)]
            state.read = [before[i // each] + row for i, row in enumerate(rows)]
        return state

    def _supports_default_dynamic_cache(self) -> bool:
        return False  # the state is a MambaState, made by the first forward

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict]:
        """Repeat every row with its state, for several answers or beams per prompt, which is read before, once, up to
        its last token. (transformers repeats image by image, and does not know the state.)"""
        if expand_size == 1:
            return input_ids, kwargs
        given = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features", "cache_params")}
        if input_ids.shape[1] > 1 and not bool((input_ids[:, -1] == self.config.image_token_id).any()):
            mask = kwargs.get("attention_mask")
            given["attention_mask"] = None if mask is None else mask[:, :-1]
            state = self(input_ids=input_ids[:, :-1], use_cache=True, logits_to_keep=1, **given).cache_params
            given = {"cache_params": state}
            kwargs["prompts_are_read"] = True
        repeated = self._repeated(expand_size, input_ids, **given)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | repeated

    def _repeated(
        self,
        times: int,
        ids: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        cache_params: MambaState | None = None,
    ) -> dict:
        """Images, encoded once, and state of the rows of ids (b, l), of each row so many times."""
        found = {}
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        if image_features is not None:
            places = self.image_places(ids, image_features)
            taken = places.sum(1) if image_features.ndim == 2 else places.sum(1) // image_features.shape[1]
            rows = torch.arange(len(image_features), device=ids.device).split(taken.tolist())
            found["image_features"] = image_features[torch.cat([row.repeat(times) for row in rows])]
        if cache_params is not None:
            rows = torch.arange(len(ids), device=ids.device)
            found["cache_params"] = cache_params.select(rows.repeat_interleave(times))
        return found

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache_params: MambaState | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        is_first_iteration: bool = False,
        prompts_are_read: bool = False,
        **kwargs,
    ) -> dict:
        """Inputs of one step of `generate`: the whole prompt first, then one token and the state.

        Passing a `cache_params` to `generate` goes on from it; the given ids are then the new part only. Prompts that
        were repeated are read already, but for their last token.
        """
        if (is_first_iteration or cache_params is None) and not prompts_are_read:
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
