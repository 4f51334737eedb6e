"""MLMambaForConditionalGeneration: pictures and text in, text out (ML-Mamba equation 9), as a transformers model.

Placeholders `image_token_id` in `input_ids` are replaced by connector outputs, in order. The recurrent state is
constant in size and passes between calls as `cache_params`, so a prompt may be read in pieces and one prefix may start
many continuations. Shapes: b batch, l length, n pictures, N tokens per picture, d width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from mlmamba.configuration import MLMambaConfig
from mlmamba.connector import build_connector
from mlmamba.conversation import IGNORE_INDEX
from mlmamba.mamba2 import Mamba2LanguageModel, MambaState
from mlmamba.vision import VisionEncoder


@dataclass
class MLMambaOutput(ModelOutput):
    """`loss` (mean over labels), `logits` (b, l, vocabulary) in float32, and the state after the last position."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: MambaState | None = None


class MLMambaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """ML-Mamba. Build with random weights from a config, or load with `from_pretrained`."""

    config_class = MLMambaConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Mamba2Block"]  # noqa: RUF012 - the form that transformers reads
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]  # noqa: RUF012

    def __init__(self, config: MLMambaConfig):
        super().__init__(config)
        self.vision = VisionEncoder(config.vision_config)
        self.connector = build_connector(self.vision.channels, config.text_config.hidden_size, config.connector_config)
        self.language_model = Mamba2LanguageModel(config.text_config)
        if config.text_config.tie_word_embeddings:
            self._tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embeddings.weight"}
        self.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder is input only
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a saved model. In addition to transformers' errors:

        Raises:
            ValueError: the checkpoint lacks tensors; transformers would leave them as whatever was in memory.
        """
        source = pretrained_model_name_or_path
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{source} lacks {len(missing)} tensors of the model, first {missing[:3]}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Only buffers that are not saved: every module initialises itself when built, encoders by timm's rules."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.backbone.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.backbone.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.language_model.lm_head = value

    def train(self, mode: bool = True) -> "MLMambaForConditionalGeneration":
        """Training mode; an encoder whose weights are all frozen stays in evaluation mode, its statistics fixed."""
        super().train(mode)
        if not any(p.requires_grad for p in self.vision.parameters()):
            self.vision.eval()
        return self

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures uint8 (n, 3, s, s) -> language embeddings (n, N, d)."""
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.vision(pixel_values)
        return self.connector(features, self.vision.grid)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> MLMambaOutput:
        """Run the model.

        Args:
            input_ids: (b, l).
            pixel_values: uint8 (n, 3, s, s), all pictures of the batch in reading order.
            image_features: (n, N, d) from `get_image_features`, in place of `pixel_values`.
            attention_mask: (b, l), 0 at padding on either side.
            seq_idx: (b, l) integers marking the sequences of packed rows; state and loss do not cross them.
            labels: (b, l) like input_ids, IGNORE_INDEX where there is no loss. Shifted inside.
            inputs_embeds: (b, l, d), in place of input_ids.
            cache_params: state to go on from.
            use_cache: return the state; True by default outside training.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels, for accumulation
                weighted by loss tokens.

        Raises:
            ValueError: the placeholders and the pictures do not match, or neither or both inputs are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and image_features is None:
                image_features = self.get_image_features(pixel_values)
            inputs_embeds = self._place_images(input_ids, inputs_embeds, image_features)
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and bool(mask.all()):
            mask = None
        hidden, state = self.language_model.backbone(inputs_embeds, cache_params, mask, seq_idx)
        loss = None
        if labels is not None:
            loss = self._loss(hidden, labels, seq_idx, num_items_in_batch)
        logits = self.language_model.lm_head(hidden[:, -logits_to_keep:]).float()
        keep_state = use_cache if use_cache is not None else not self.training
        output = MLMambaOutput(loss=loss, logits=logits, cache_params=state if keep_state else None)
        return output if return_dict is not False else output.to_tuple()

    def _place_images(self, input_ids: Tensor, embeds: Tensor, features: Tensor | None) -> Tensor:
        places = self._image_places(input_ids, features)
        if features is None:
            return embeds
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype).flatten(0, 1))

    def _image_places(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Where the placeholders are, (b, l). Raises ValueError unless the features fill them exactly."""
        places = input_ids == self.config.image_token_id
        found, per_image = int(places.sum()), self.vision.grid[0] * self.vision.grid[1]
        pictures = 0 if features is None else features.shape[0]
        expected = 0 if features is None else features.shape[0] * features.shape[1]
        if found != expected:
            raise ValueError(
                f"the prompt has {found} image placeholders but {pictures} pictures of {per_image} tokens were given "
                f"({expected} expected); expand each <image> with MLMambaProcessor and pass every picture"
            )
        return places

    def _loss(self, hidden: Tensor, labels: Tensor, seq_idx: Tensor | None, count: Tensor | int | None) -> Tensor:
        """Cross entropy of the next token. Only positions with a label reach the vocabulary projection."""
        targets = labels[:, 1:]
        keep = targets != IGNORE_INDEX
        if seq_idx is not None:
            keep = keep & (seq_idx[:, 1:] == seq_idx[:, :-1])
        logits = self.language_model.lm_head(hidden[:, :-1][keep]).float()
        total = F.cross_entropy(logits, targets[keep], reduction="sum")
        return total / (keep.sum().clamp(min=1) if count is None else count)

    def _supports_default_dynamic_cache(self) -> bool:
        return False  # the state is a MambaState, made by the first forward

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, dict]:
        """Repeat every row with all its pictures and its state, for several answers or beams per prompt.

        transformers repeats picture by picture, which mixes up the pictures of a prompt that has more than one, and
        does not know the state. Pictures are encoded once, before they are repeated.
        """
        if expand_size == 1:
            return input_ids, kwargs
        pixels, features = kwargs.pop("pixel_values", None), kwargs.pop("image_features", None)
        state = kwargs.pop("cache_params", None)
        if features is None and pixels is not None:
            features = self.get_image_features(pixels)
        places = self._image_places(input_ids, features)
        if features is not None:
            pictures = places.sum(1) // features.shape[1]
            rows = torch.arange(len(features), device=features.device).split(pictures.tolist())
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
        return {"input_ids": input_ids[:, -1:], "cache_params": cache_params, "use_cache": True, "logits_to_keep": 1}
