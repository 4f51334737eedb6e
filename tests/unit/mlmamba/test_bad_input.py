"""Bad input: errors say what was given and what was expected; nothing is cut, dropped or left to chance.

What belongs to one part is tested with it: wrong numbers of images in test_modeling.py, the processor's text limits
in test_processing.py, the template's rules in test_chat_template.py.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mlmamba.images import ImageError
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.processing import MLMambaProcessor
from tests.helpers.tiny import IMAGE_ID, PER_IMAGE, SIDE, VOCABULARY, images, prompt, tiny_model

IDS = prompt(7)
SEEN = prompt(7, images=1)
WIDTH = 16


def features(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


CASES = {
    "no text": ({}, "give either input_ids or inputs_embeds"),
    "ids of one dimension": (
        {"input_ids": IDS[0]},
        r"input_ids is torch.int64 \(7,\) on cpu; expected integers \(batch",
    ),
    "float ids": ({"input_ids": IDS.float()}, r"input_ids is torch.float32 \(1, 7\) on cpu; expected integers"),
    "no token": ({"input_ids": IDS[:, :0]}, r"the prompt is empty: input_ids is torch.int64 \(1, 0\)"),
    "no row": ({"input_ids": IDS[:0]}, r"the prompt is empty: input_ids is torch.int64 \(0, 7\)"),
    "an id too large": (
        {"input_ids": IDS.clone().fill_(VOCABULARY)},
        f"holds ids from {VOCABULARY} to {VOCABULARY}; the vocabulary is 0 to {VOCABULARY - 1}",
    ),
    "a negative id": ({"input_ids": IDS - 1000}, r"holds ids from -\d+ to -\d+; the vocabulary is 0 to 263"),
    "embeddings of another width": (
        {"inputs_embeds": features(1, 7, 5)},
        r"inputs_embeds is torch.float32 \(1, 7, 5\) on cpu; expected floats \(batch, length, 16\)",
    ),
    "integer embeddings": ({"inputs_embeds": features(1, 7, WIDTH).int()}, "inputs_embeds is torch.int32"),
    "a mask of another length": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 9)},
        r"attention_mask is torch.float32 \(1, 9\) on cpu; expected \(1, 7\), one value per token of input_ids",
    ),
    "labels of another length": (
        {"input_ids": IDS, "labels": IDS[:, :5]},
        r"labels is torch.int64 \(1, 5\) on cpu; expected \(1, 7\)",
    ),
    "labels of another batch": ({"input_ids": IDS, "labels": IDS.repeat(2, 1)}, r"labels is torch.int64 \(2, 7\)"),
    "labels for the given embeddings": (
        {"inputs_embeds": features(2, 7, WIDTH), "labels": IDS},
        r"labels is torch.int64 \(1, 7\) on cpu; expected \(2, 7\), one value per token of inputs_embeds",
    ),
    "float labels": ({"input_ids": IDS, "labels": IDS.float()}, r"labels is torch.float32 .*; expected integers"),
    "boundaries of another length": ({"input_ids": IDS, "seq_idx": IDS[:, :1]}, r"seq_idx is torch.int64 \(1, 1\)"),
    "float boundaries": ({"input_ids": IDS, "seq_idx": IDS.float()}, r"seq_idx is torch.float32 .*; expected integers"),
    "images of another size": (
        {"input_ids": SEEN, "pixel_values": images(1)[..., :20]},
        r"images are torch.uint8 \(1, 3, 32, 20\); expected uint8 \(n, 3, 32, 32\)",
    ),
    "one image without its dimension": (
        {"input_ids": SEEN, "pixel_values": images(1)[0]},
        r"images are torch.uint8 \(3, 32, 32\); expected uint8 \(n, 3, 32, 32\)",
    ),
    "channels last": (
        {"input_ids": SEEN, "pixel_values": images(1).permute(0, 2, 3, 1)},
        r"\(1, 32, 32, 3\); expected uint8 \(n, 3, 32, 32\)",
    ),
    "half precision pixels": (
        {"input_ids": SEEN, "pixel_values": images(1).half()},
        r"images are torch.float16 \(1, 3, 32, 32\); expected uint8",
    ),
    "features of another width": (
        {"input_ids": SEEN, "image_features": features(1, PER_IMAGE, 5)},
        r"image_features is torch.float32 \(1, 4, 5\) on cpu; expected floats \(images, tokens, 16\)",
    ),
    "integer features": ({"input_ids": SEEN, "image_features": features(1, 4, WIDTH).int()}, "is torch.int32"),
    "features of too many dimensions": (
        {"input_ids": SEEN, "image_features": features(1, 1, 4, WIDTH)},
        "expected flo",
    ),
    "too few feature vectors": (
        {"input_ids": SEEN, "image_features": features(3, WIDTH)},
        "has 4 image placeholders but 3 feature vectors were given",
    ),
    "images twice": (
        {"input_ids": SEEN, "pixel_values": images(1), "image_features": features(1, PER_IMAGE, WIDTH)},
        "both pixel_values and image_features are given",
    ),
    "images beside embeddings": (
        {"inputs_embeds": features(1, 7, WIDTH), "pixel_values": images(1)},
        "pixel_values is given with inputs_embeds, which hold the images already",
    ),
    "ids on another device": ({"input_ids": IDS.to("meta")}, "input_ids is on meta, the model on cpu; move one"),
    "pixels on another device": (
        {"input_ids": SEEN, "pixel_values": images(1).to("meta")},
        "pixel_values is on meta",
    ),
    "labels on another device": ({"input_ids": IDS, "labels": IDS.to("meta")}, "labels is on meta, the model on cpu"),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, "has no attentions"),
    "hidden states": ({"input_ids": IDS, "output_hidden_states": True}, "returns no hidden states"),
}


@pytest.mark.parametrize(("inputs", "message"), CASES.values(), ids=CASES.keys())
def test_a_forward_pass(model, inputs, message):
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(**inputs)


def test_an_image_that_goes_on_in_the_next_row(model):
    """The sums agree: two images, eight placeholders. transformers' models would fill them across the rows."""
    ids = torch.cat([prompt(9), prompt(9)])
    ids[0, :6] = ids[1, :2] = IMAGE_ID
    with pytest.raises(ValueError, match="row 0 has 6 image placeholders, no multiple of the 4 tokens of an image"):
        model(ids, images(2))


def test_a_state_of_something_else(model):
    with torch.no_grad():
        two = model(prompt(4).repeat(2, 1)).cache_params
        shallow = tiny_model({"num_hidden_layers": 1})(prompt(4)).cache_params
    with pytest.raises(ValueError, match=r"the state \(cache_params\) is of 2 sequences, the input of 1; choose rows"):
        model(prompt(3), cache_params=two)
    with pytest.raises(ValueError, match=r"the state \(cache_params\) has 1 layers, the model 2"):
        model(prompt(3), cache_params=shallow)
    with pytest.raises(TypeError, match="cache_params is a list; expected the MambaState of an earlier call"):
        model(prompt(3), cache_params=[])
    with pytest.raises(ValueError, match="is of 2 sequences, the input of 1"):
        model.generate(prompt(3), cache_params=two, max_new_tokens=2)


LIMIT = 64
PROMPTS = {
    "nothing": ({}, "generate needs input_ids"),
    "embeddings": ({"inputs_embeds": features(1, 3, WIDTH)}, "generate needs input_ids"),
    "no token": ({"input_ids": IDS[:, :0]}, r"the prompt is empty: input_ids is torch.int64 \(1, 0\) on cpu"),
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids is torch.int64 \(7,\) on cpu; expected integers"),
    "twice": ({"inputs": IDS, "input_ids": IDS}, "the prompts are given twice"),
    "over the limit": (
        {"input_ids": prompt(LIMIT + 1)},
        f"prompt 0 is {LIMIT + 1} tokens long, over the limit of {LIMIT} \\(max_position_embeddings\\); shorten it",
    ),
    "a row of nothing but padding": (
        {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1] * 7, [0] * 7])},
        "prompt 1 is empty: its attention_mask has no 1",
    ),
    "a mask of another shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3)},
        r"attention_mask is torch.float32 \(1, 3\) on cpu; expected \(1, 7\), as input_ids",
    ),
    "assisted by a model": (
        {"input_ids": IDS, "assistant_model": torch.nn.Identity()},
        "cannot use assistant_model: as",
    ),
    "prompt lookup": (
        {"input_ids": IDS, "prompt_lookup_num_tokens": 1},
        "cannot use prompt_lookup_num_tokens: assisted",
    ),
    "contrastive search": (
        {"input_ids": IDS, "penalty_alpha": 0.6, "top_k": 4},
        "cannot use penalty_alpha: contrastive",
    ),
    "DoLa": ({"input_ids": IDS, "dola_layers": "high"}, "cannot use dola_layers: DoLa"),
    "diverse beams": ({"input_ids": IDS, "num_beams": 4, "num_beam_groups": 2}, "cannot use num_beam_groups: diverse"),
    "prefill in chunks": ({"input_ids": IDS, "prefill_chunk_size": 3}, "cannot use prefill_chunk_size: call the model"),
}


@pytest.mark.parametrize(("inputs", "message"), PROMPTS.values(), ids=PROMPTS.keys())
def test_generation(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)


def test_the_limit_counts_tokens_and_not_padding(model):
    long = torch.cat([torch.zeros(1, 20, dtype=torch.long), prompt(LIMIT)], dim=1)
    mask = torch.cat([torch.zeros(1, 20), torch.ones(1, LIMIT)], dim=1).long()
    out = model.generate(long, attention_mask=mask, max_new_tokens=2, do_sample=False, eos_token_id=None)
    alone = model.generate(prompt(LIMIT), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert torch.equal(out[:, -2:], alone[:, -2:])


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def spoil(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "connector.projector.0.bias"
CHECKPOINTS = {
    "missing": (lambda tensors: tensors.pop(NAME), rf"lacks 1 tensors of the model, first \['{NAME}'\]"),
    "unexpected": (
        lambda tensors: tensors.update({"connector.extra": torch.zeros(2)}),
        r"holds 1 tensors that the model does not have, first \['connector.extra'\]",
    ),
    "another shape": (
        lambda tensors: tensors.update({NAME: torch.zeros(3)}),
        rf"holds 1 tensors of another shape, first {NAME}: \(3,\) in the checkpoint, \(16,\) in the model",
    ),
    "renamed": (
        lambda tensors: tensors.update({"projector.bias": tensors.pop(NAME)}),
        rf"lacks 1 tensors of the model, first \['{NAME}'\]; it holds 1 tensors that the model does not have",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_checkpoint(folder, change, message):
    spoil(folder, change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))} {message}.* Is it of another configuration"):
        MLMambaForConditionalGeneration.from_pretrained(folder)


def test_a_checkpoint_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|not cover|safetensors"):
        MLMambaForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tokenizer) -> MLMambaProcessor:
    return MLMambaProcessor(tokenizer, image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=40)


RED = Image.new("RGB", (8, 8), (255, 0, 0))
CALLS = {
    "nothing": ({}, ValueError, "neither text nor images were given"),
    "no prompt": ({"text": []}, ValueError, "no prompt was given"),
    "an empty prompt": ({"text": ["a", ""]}, ValueError, "prompt 1 is empty"),
    "tokens as text": ({"text": [["a", "b"]]}, ValueError, "text is a list of list; expected a prompt or a list"),
    "images in other rows": (
        {"text": ["<image>a", "<image>b"], "images": [[RED, RED], []]},
        ValueError,
        "prompt 0 has 1 <image> but 2 images were given",
    ),
    "lists of images for fewer prompts": (
        {"text": ["<image>a", "<image>b"], "images": [[RED, RED]]},
        ValueError,
        "2 prompts but 1 lists of images were given",
    ),
    "truncation": ({"text": "a", "truncation": True}, ValueError, "truncation=True: prompts are never cut"),
    "a length to cut to": ({"text": "a", "max_length": 3}, TypeError, "has no option max_length"),
    "padding to a length": (
        {"text": "a", "padding": "max_length"},
        ValueError,
        "padding is 'max_length'; expected True",
    ),
    "no padding": (
        {"text": ["a", "bcd"], "padding": False},
        ValueError,
        "prompts of 1 to 3 tokens do not fit one tensor",
    ),
    "a side": ({"text": "a", "padding_side": "top"}, ValueError, "padding_side is 'top'; expected 'left' or 'right'"),
    "numpy": ({"text": "a", "return_tensors": "np"}, ValueError, "return_tensors is 'np'; the processor gives torch"),
    "a video": ({"text": "a", "videos": [RED]}, TypeError, "has no option videos"),
    "float values": (
        {"text": "<image>", "images": np.zeros((8, 8, 3))},
        ImageError,
        r"an image is float64 values of shape \(8, 8, 3\); expected a Pillow image, .* or uint8 \(h, w, 3\)",
    ),
    "grey values": ({"text": "<image>", "images": np.zeros((8, 8), np.uint8)}, ImageError, r"of shape \(8, 8\)"),
    "a number": ({"text": "<image>", "images": 3}, ImageError, "an image is a int; expected"),
    "a missing file": (
        {"text": "<image>", "images": "/no/such/image.png"},
        ImageError,
        "no image at /no/such/imag",
    ),
    "bytes of no image": ({"text": "<image>", "images": b"no"}, ImageError, "not an image but text: 'no'"),
    "an empty image": ({"text": "<image>", "images": Image.new("RGB", (0, 4))}, ImageError, "is empty: 0 x 4 pixels"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), CALLS.values(), ids=CALLS.keys())
def test_the_processor(processor, inputs, error, message):
    with pytest.raises(error, match=message):
        processor(**inputs)
