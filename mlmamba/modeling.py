"""MLMambaForConditionalGeneration: images and text in, text out (ML-Mamba equation 9), as a transformers model.

Placeholders `image_token_id` in `input_ids` are replaced by connector outputs, in order. The recurrent state is
constant in size and passes between calls as `cache_params`, so a prompt may be read in pieces and one prefix may start
many continuations. Shapes: b batch, l length, n images, N tokens per image, d width.
"""

import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import ModelOutput

from mlmamba.checks import check_device, check_images, check_places, check_state, check_text
from mlmamba.configuration import MLMambaConfig
from mlmamba.connector import build_connector, image_layout
from mlmamba.generation import MLMambaGenerationMixin
from mlmamba.image_layout import ImageLayout
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.positions import Positions, label_mask
from mlmamba.state import MambaState
from mlmamba.vision import VisionEncoder

# While it loads, transformers replaces methods of its classes and of torch; two loads at once can leave them replaced,
# and from then on no model of the process has its tied weights.
_LOADING = threading.RLock()


@dataclass
class MLMambaOutput(ModelOutput):
    """`loss` (mean over labels), `logits` (b, l, vocabulary) in float32, and the state after the last position.

    Outside training, given `positions`, also `correct` (m,): whether greedy decoding would choose each target.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: MambaState | None = None
    correct: Tensor | None = None

    @property
    def past_key_values(self) -> MambaState | None:
        """The state, by the name that caches have elsewhere."""
        return self.cache_params


class MLMambaForConditionalGeneration(PreTrainedModel, MLMambaGenerationMixin):
    """ML-Mamba. Build with random weights from a config, or load with `from_pretrained`.

    `import mlmamba` registers it with transformers' Auto classes (mlmamba/auto.py). Its parts are `vision`, `connector`
    and `language_model`; LoRA goes on `language_model.*(in_proj|out_proj)`.
    """

    config_class = MLMambaConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    exact = False
    """Whether answers shall have, and once it is prepared have, the same bits in any company (mlmamba/decoding.py)."""
    lacking = ""
    """The precision that it was loaded for and that its device does not compute in."""
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]  # noqa: RUF012 - the form that transformers reads

    def __init__(self, config: MLMambaConfig):
        super().__init__(config)
        self.vision = VisionEncoder(config.vision_config)
        self.connector = build_connector(self.vision.channels, config.text_config.hidden_size, config.connector_config)
        self.language_model = Mamba2LanguageModel(config.text_config)
        # What a device map must not divide: some of their parts are called by other ways than their forward.
        self._no_split_modules = ["Mamba2Block", "VisionEncoder", type(self.connector).__name__]
        if config.text_config.tie_word_embeddings:
            self._tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embeddings.weight"}
        self.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder is input only
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a saved model, strictly. In addition to transformers' errors:

        Raises:
            ValueError: the checkpoint lacks tensors, has tensors that the model does not, or tensors of other shapes;
                transformers would leave what is missing as whatever was in memory, and drop what is unexpected. Or the
                device map offloads parts to the CPU or to disk.
        """
        source = pretrained_model_name_or_path
        kwargs["ignore_mismatched_sizes"] = True  # so that the error below can name them
        with _LOADING:
            model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        problems = []
        if missing := sorted(info["missing_keys"]):
            problems.append(f"lacks {len(missing)} tensors of the model, first {missing[:3]}")
        if unexpected := sorted(info["unexpected_keys"]):
            problems.append(f"holds {len(unexpected)} tensors that the model does not have, first {unexpected[:3]}")
        if mismatched := sorted(info["mismatched_keys"]):
            name, found, expected = mismatched[0]
            problems.append(
                f"holds {len(mismatched)} tensors of another shape, first {name}: {tuple(found)} in the checkpoint, "
                f"{tuple(expected)} in the model"
            )
        if problems:
            raise ValueError(f"{source} {'; it '.join(problems)}. Is it of another configuration?")
        placed = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if "disk" in placed or ("cpu" in placed and len(placed) > 1):
            raise ValueError(
                f"the device map puts parts on {', '.join(sorted(placed))}, which offloads some; the scans read "
                "weights where offloading does not see it. Give a map of accelerators only, or one device for all"
            )
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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options) -> None:
        """Keep only the input of every language block for the backward pass, which runs the block again.

        Raises:
            ValueError: an option of transformers' that the blocks do not have (every_n_layers, offload).
        """
        defaults = {"every_n_layers": 1, "offload": False}
        unknown = {name: value for name, value in options.items() if value != defaults.get(name)}
        if unknown:
            raise ValueError(f"gradient checkpointing wraps every language block; it has no option {unknown}")
        with _old_name():
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        with _old_name():
            super().gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        with _old_name():
            return super().is_gradient_checkpointing

    @property
    def image_layout(self) -> ImageLayout:
        """How images are cut for it, and how many placeholders each takes."""
        patch = self.vision.patch
        return image_layout(self.config, (patch, patch) if patch else self.vision.grid)

    def get_image_features(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
        """Images uint8 (n, 3, s, s) -> language embeddings (n, N, d); or, native, patches (P, 3 p p) with the images'
        `spatial_shapes` (n, 2) -> (T, d), those of all images one after the other. Raises ValueError on other images.

        Without an image a black one goes through and is dropped: not every encoder takes none, and under ZeRO-3 the
        other workers wait until this one has gathered the same weights.
        """
        if not len(pixel_values) and pixel_values.ndim == (2 if self.vision.patch else 4):
            shapes = None
            if self.vision.patch:
                side = self.vision.merge * self.connector.pool
                shapes = torch.full((1, 2), side)
                blank = pixel_values.new_zeros(side**2, pixel_values.shape[1])
            else:
                blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            return self.get_image_features(blank, shapes)[:0]
        if self.exact:
            return self._one_by_one(pixel_values, spatial_shapes)
        return self._image_features(pixel_values, spatial_shapes)

    def _one_by_one(self, pixel_values: Tensor, spatial_shapes: Tensor | None) -> Tensor:
        """Each image alone: torch's sums go in an order that depends on how many there are."""
        if spatial_shapes is None:
            return torch.cat([self._image_features(one, None) for one in pixel_values.split(1)])
        parts = pixel_values.split(spatial_shapes.prod(1).tolist())
        return torch.cat([self._image_features(*one) for one in zip(parts, spatial_shapes.split(1), strict=True)])

    def _image_features(self, pixel_values: Tensor, spatial_shapes: Tensor | None) -> Tensor:
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.vision(pixel_values, spatial_shapes)
        embeds = self.connector(features, self.vision.grids(spatial_shapes))
        return embeds[0] if self.vision.patch else embeds

    def _from_vision(self, features: Tensor) -> Tensor:
        """The same of what the encoders gave, (n, N, d_v). Raises ValueError on another shape."""
        cells = self.vision.grid[0] * self.vision.grid[1]
        if features.ndim != 3 or tuple(features.shape[1:]) != (cells, self.vision.channels):
            raise ValueError(
                f"vision_features is {tuple(features.shape)}; expected (images, {cells}, {self.vision.channels})"
            )
        shown = features if len(features) else features.new_zeros(1, *features.shape[1:])
        weight = next(self.connector.parameters())
        return self.connector(shown.to(weight.dtype), self.vision.grid)[: len(features)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Positions | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: MambaState | None = None,
        spatial_shapes: Tensor | None = None,
        vision_features: Tensor | None = None,
    ) -> MLMambaOutput:
        """Run the model.

        Args:
            input_ids: (b, l).
            pixel_values: uint8 (n, 3, s, s), all images of the batch in reading order. Of images at their own size,
                their patches (P, 3 p p); of tiled ones, all their squares.
            spatial_shapes: (n, 2) heights and widths in patches, of images at their own size. Best on the CPU, where
                its values are needed.
            image_features: (n, N, d) from `get_image_features`, in place of `pixel_values`; or (k, d), one vector for
                each placeholder, for a piece of a prompt that begins or ends within an image.
            attention_mask: (b, l), 0 at padding on either side.
            seq_idx: (b, l) integers marking the sequences of packed rows; state and loss do not cross them.
            labels: (b, l) like input_ids, IGNORE_INDEX where there is no loss. Shifted inside.
            positions: of the batch's labels and placeholders (mlmamba/positions.py), in place of `labels`. The batch is
                then taken as checked, and nothing is read back from the device. Not with `attention_mask`.
            inputs_embeds: (b, l, d), in place of input_ids.
            cache_params: state to go on from; also as `past_key_values`.
            use_cache: return the state; True by default outside training.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels, for accumulation
                weighted by loss tokens.
            vision_features: (n, N, d_v) from the encoders, `model.vision`, in place of `pixel_values`.
            output_attentions, output_hidden_states: accepted because tools pass them; True is an error, in the
                config too.

        Raises:
            ValueError: the placeholders and the images do not match, neither or both inputs are given, or a tensor is
                of the wrong shape, dtype or device (mlmamba/checks.py).
            TypeError: `cache_params` is no MambaState.
        """
        wanted = (output_attentions, output_hidden_states)
        asked = (self.config.output_attentions, self.config.output_hidden_states)
        if any(own if one is None else one for one, own in zip(wanted, asked, strict=True)):
            raise ValueError("ML-Mamba has no attentions and returns no hidden states of its blocks")
        if past_key_values is not None:
            if cache_params is not None:
                raise ValueError("the state is given twice, as cache_params and as past_key_values")
            cache_params = past_key_values
        if positions is not None and (labels is not None or attention_mask is not None or input_ids is None):
            raise ValueError("positions go with input_ids, in place of labels, and without an attention_mask")
        per_token = {"attention_mask": attention_mask, "seq_idx": seq_idx, "labels": labels}
        rows, _ = check_text(input_ids, inputs_embeds, per_token, self.config, values=positions is None)
        check_images(input_ids, pixel_values, image_features, self.config, vision_features)
        check_state(cache_params, rows, self.config)
        if not self._weights_are_managed():
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "pixel_values": pixel_values}
            images = {"image_features": image_features, "vision_features": vision_features}
            inputs["positions"] = None if positions is None else positions.targets
            check_device(self.device, cache_params, {**inputs, **images, **per_token})
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values, spatial_shapes)
            if vision_features is not None:
                image_features = self._from_vision(vision_features)
            if positions is None:
                each = () if pixel_values is None or spatial_shapes is None else self._image_tokens(spatial_shapes)
                inputs_embeds = self._place_images(input_ids, inputs_embeds, image_features, each)
            else:
                inputs_embeds = self._place_at(inputs_embeds, image_features, positions.images)
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and bool(mask.all()):
            mask = None
        keep_state = use_cache if use_cache is not None else not self.training
        hidden, state = self.language_model.backbone(inputs_embeds, cache_params, mask, seq_idx, keep_state)
        loss = correct = None
        if labels is not None:
            loss = self._loss(hidden, labels, seq_idx, num_items_in_batch)
        elif positions is not None:
            picked = self.language_model.lm_head(hidden.flatten(0, 1).index_select(0, positions.labelled)).float()
            loss = self._cross_entropy(picked, positions.targets, num_items_in_batch, positions.weights)
            correct = None if self.training else self._chosen(picked) == positions.targets
        logits = self.language_model.lm_head(hidden[:, -logits_to_keep:]).float()
        output = MLMambaOutput(loss=loss, logits=logits, cache_params=state, correct=correct)
        return output if return_dict is not False else output.to_tuple()

    def _weights_are_managed(self) -> bool:
        """Whether accelerate moves the inputs to the weights, or ZeRO-3 brings the weights to the inputs."""
        return hasattr(self, "hf_device_map") or hasattr(next(self.parameters()), "ds_id")

    def _image_tokens(self, spatial_shapes: Tensor) -> list[int]:
        """Tokens of each image of these shapes."""
        return [self.connector.tokens(grid) for grid in self.vision.grids(spatial_shapes)]

    def _place_images(
        self, input_ids: Tensor, embeds: Tensor, features: Tensor | None, each: Sequence[int] = ()
    ) -> Tensor:
        places = self.image_places(input_ids, features, each)
        if features is None:
            return embeds
        return embeds.masked_scatter(places[..., None], features.to(embeds).flatten(0, -2))

    def image_places(self, input_ids: Tensor, features: Tensor | None, each: Sequence[int] = ()) -> Tensor:
        """Where the placeholders of images are in input_ids (b, l): a mask (b, l).

        Args:
            features: (n, N, d) or (k, d), see `forward`, or None where there are no images.
            each: of (k, d), how many vectors each image has, where that is known.

        Raises:
            ValueError: the features do not fill the placeholders exactly, or an image would be split over two rows.
        """
        places = input_ids == self.config.image_token_id
        check_places(places.sum(1).tolist(), None if features is None else tuple(features.shape[:-1]), each)
        return places

    def _place_at(self, embeds: Tensor, features: Tensor | None, places: Tensor) -> Tensor:
        """`_place_images` at positions (k,) that whoever found them has checked: the device is not waited for."""
        given = 0 if features is None else features.shape[:-1].numel()
        if given != len(places):
            raise ValueError(f"the positions are of {len(places)} image placeholders, {given} embeddings were given")
        if not given:
            return embeds
        return embeds.flatten(0, 1).index_copy(0, places, features.to(embeds).flatten(0, -2)).view_as(embeds)

    def _loss(self, hidden: Tensor, labels: Tensor, seq_idx: Tensor | None, count: Tensor | int | None) -> Tensor:
        """Cross entropy of the next token. Only positions with a label reach the vocabulary projection."""
        keep = label_mask(labels, seq_idx)
        logits = self.language_model.lm_head(hidden[:, :-1][keep]).float()
        return self._cross_entropy(logits, labels[:, 1:][keep], count)

    def _cross_entropy(
        self, logits: Tensor, targets: Tensor, count: Tensor | int | None, weights: Tensor | None = None
    ) -> Tensor:
        """Summed over targets (m,), times their weights (m,), given logits (m, vocabulary), and divided by `count`, or
        by m."""
        if weights is None:
            total = F.cross_entropy(logits, targets, reduction="sum")
        else:
            total = F.cross_entropy(logits, targets, reduction="none") @ weights
        return total / (max(1, len(targets)) if count is None else count)

    def _chosen(self, logits: Tensor) -> Tensor:
        """The most likely tokens (m,) given logits (m, vocabulary); a placeholder is input only."""
        never = torch.tensor([self.config.image_token_id], device=logits.device)
        return logits.index_fill(-1, never, -torch.inf).argmax(-1)


@contextmanager
def _old_name():
    """No warning where transformers has a newer name for a method: what calls ours (peft, recipes) has the old one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


AutoModelForImageTextToText.register(MLMambaConfig, MLMambaForConditionalGeneration, exist_ok=True)
