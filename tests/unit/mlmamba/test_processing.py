"""The processor: prompts and images in, model inputs out; what does not fit is an error and never cut."""

from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlmamba.conversation import Turn
from mlmamba.images import to_pixels
from mlmamba.processing import MLMambaProcessor, PromptTooLong
from tests.helpers.images import image
from tests.helpers.tiny import IMAGE_ID, PER_IMAGE, SIDE


@pytest.fixture(scope="module")
def processor(tokenizer) -> MLMambaProcessor:
    return MLMambaProcessor(tokenizer, image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=40)


def test_a_prompt_is_rendered_ready_for_an_answer(processor):
    turns = [Turn("user", "one?", images=1), Turn("assistant", "1"), Turn("user", "two?")]
    end = "<|endoftext|>"
    assert processor.prompt(turns) == (
        f"<image><|user|>\none?{end}\n<|assistant|>\n1{end}\n<|user|>\ntwo?{end}\n<|assistant|>\n"
    )
    with pytest.raises(ValueError, match="a prompt ends with a user turn"):
        processor.prompt(turns[:2])
    with pytest.raises(ValueError, match="has no turns"):
        processor.prompt([])


def test_each_placeholder_becomes_one_run(processor):
    batch = processor(images=[image(0), image(1)], text="<image>a<image>")
    run = [IMAGE_ID] * PER_IMAGE
    a = processor.tokenizer("a")["input_ids"]
    assert batch["input_ids"].tolist() == [[*run, *a, *run]]
    assert batch["attention_mask"].tolist() == [[1] * 9]


def test_images_are_stacked_in_reading_order(processor):
    images = [image(seed) for seed in range(3)]
    batch = processor(images=images, text=["<image>a<image>", "<image>b"])
    assert (batch["pixel_values"].dtype, batch["pixel_values"].shape) == (torch.uint8, (3, 3, SIDE, SIDE))
    for ours, one in zip(batch["pixel_values"], images, strict=True):
        assert np.array_equal(ours, to_pixels(one, SIDE))


def test_a_single_image_needs_no_list(processor):
    assert torch.equal(
        processor(images=image(), text="<image>")["pixel_values"],
        processor(images=[image()], text=["<image>"])["pixel_values"],
    )


def test_images_come_as_one_list_or_one_for_each_prompt(processor):
    shown, texts = [image(seed) for seed in range(3)], ["<image>a<image>", "b", "<image>c"]
    flat = processor(images=shown, text=texts)
    grouped = processor(images=[shown[:2], [], shown[2:]], text=texts)
    assert torch.equal(flat["pixel_values"], grouped["pixel_values"])
    assert torch.equal(flat["input_ids"], grouped["input_ids"])
    assert "pixel_values" not in processor(images=[[]], text="no image")


def test_images_alone_need_no_text(processor):
    batch = processor(images=[image(0), image(1)])
    assert set(batch) == {"pixel_values"}
    assert torch.equal(processor.image_processor([image(0), image(1)])["pixel_values"], batch["pixel_values"])
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]


def test_text_alone_needs_no_images(processor):
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("text", "count"), [("<image>", 0), ("no image", 1), (["<image>", "<image>"], 1)])
def test_placeholders_and_images_must_match(processor, text, count):
    with pytest.raises(ValueError, match=rf"have \d <image> but {count} images were given"):
        processor(images=[image()] * count, text=text)


def test_a_prompt_over_the_limit_is_an_error(processor):
    assert processor(text="a" * 40)["input_ids"].shape == (1, 40)
    with pytest.raises(ValueError, match="a prompt is 41 tokens long, over the limit of 40"):
        processor(text=["short", "a" * 41])
    with pytest.raises(ValueError, match="a prompt is 41 tokens long"):
        processor(images=[image()], text="<image>" + "a" * 37)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_come_from_lengths_although_padding_is_the_end_token(processor, side):
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id == 0
    batch = processor(text=[f"{end}a{end}", "long text"], padding_side=side)
    ids = [0, *processor.tokenizer("a")["input_ids"], 0]
    fill = [0] * 6
    assert batch["input_ids"][0].tolist() == (fill + ids if side == "left" else ids + fill)
    assert batch["attention_mask"][0].tolist() == ([0] * 6 + [1] * 3 if side == "left" else [1] * 3 + [0] * 6)
    assert batch["attention_mask"][1].tolist() == [1] * 9


def test_padding_is_left_unless_asked_otherwise(processor):
    assert processor(text=["a", "long"])["attention_mask"][0].tolist() == [0, 0, 0, 1]


def test_a_saved_processor_gives_the_same_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = MLMambaProcessor.from_pretrained(tmp_path)
    settings = ("image_size", "tokens_per_image", "max_length", "image_token_id")
    assert all(getattr(loaded, name) == getattr(processor, name) for name in settings)
    inputs = {"images": [image()], "text": ["<image>what?", "é\n"]}
    ours, theirs = processor(**inputs), loaded(**inputs)
    assert set(ours) == set(theirs) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_a_tokenizer_without_a_placeholder_is_refused(unknown):
    """GPT-NeoX would give <image> the id of its unknown token, which is also the end token."""
    core = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token=unknown)
    with pytest.raises(ValueError, match="the tokenizer has no id for <image>"):
        MLMambaProcessor(tokenizer)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("channels_first", [False, True])
def test_an_array_of_images_is_a_list_of_them(processor, kind, channels_first):
    stack = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    expected = processor(images=list(stack), text="<image>a<image><image>")["pixel_values"]
    given = kind(np.ascontiguousarray(stack.transpose(0, 3, 1, 2)) if channels_first else stack)
    assert torch.equal(processor(images=given, text="<image>a<image><image>")["pixel_values"], expected)
    assert torch.equal(
        processor(images=[given[:2], given[2:]], text=["<image><image>", "<image>"])["pixel_values"], expected
    )
    assert torch.equal(processor.image_processor(given)["pixel_values"], expected)
    with pytest.raises(ValueError, match="has 1 <image> but 2 images"):
        processor(images=[given[:2], given[2:]], text=["<image>", "<image><image>"])


@pytest.fixture(scope="module")
def own_size(tokenizer) -> MLMambaProcessor:
    sizes = {"patch": 16, "merge": 1, "min_tokens": 2, "max_tokens": 12}
    return MLMambaProcessor(tokenizer, tokens_per_image=sizes, max_length=60)


def test_an_image_at_its_own_size_has_as_many_placeholders_as_tokens(own_size, tmp_path):
    batch = own_size(images=[image(0, (32, 32)), image(1, (80, 48))], text=["<image>a", "b<image>"])
    assert [int((row == IMAGE_ID).sum()) for row in batch["input_ids"]] == [4, 12]
    assert batch["spatial_shapes"].tolist() == [[2, 2], [3, 4]]
    assert set(own_size.model_input_names) == set(batch)
    own_size.save_pretrained(tmp_path)
    again = MLMambaProcessor.from_pretrained(tmp_path)
    assert again.layout == own_size.layout
    more = again(images=[image(0, (32, 32)), image(1, (80, 48))], text=["<image>a", "b<image>"])
    assert all(torch.equal(more[name], batch[name]) for name in batch)


def test_text_without_sizes_cannot_be_expanded(own_size):
    with pytest.raises(ValueError, match="the prompts show 1 images, and the sizes of none were given"):
        own_size.tokenize(["<image>a"])
    with pytest.raises(ValueError, match="the prompts show 1 images, and the sizes of 2 were given"):
        own_size.tokenize(["<image>a"], image_sizes=[(16, 32), (16, 48)])
    with pytest.raises(ValueError, match="at least 9 tokens"):
        MLMambaProcessor(own_size.tokenizer, tokens_per_image={"patch": 16, "min_tokens": 9, "max_tokens": 8})


def test_a_prompt_that_is_too_long_says_what_its_images_take(own_size, processor):
    sizes = [(32, 32), (5000, 4)]
    texts = ["<image>" + "a" * 56, "<image>" + "a" * 48]
    assert own_size.lengths(texts, sizes) == [len(row) for row in own_size.ids(texts, sizes)] == [60, 60]
    own_size.check_lengths(texts, sizes)
    assert own_size.tokenize(texts, image_sizes=sizes)["input_ids"].shape == (2, 60)
    for refuse in (own_size.check_lengths, partial(own_size.tokenize, image_sizes=sizes)):
        given = () if isinstance(refuse, partial) else (sizes,)
        with pytest.raises(
            PromptTooLong,
            match=r"^a prompt is 61 tokens long, of which its image takes 12 \(5000 x 4 takes 12\), over the limit of "
            "60; send fewer or smaller images, or a shorter text$",
        ):
            refuse([texts[0], texts[1] + "a"], *given)
    with pytest.raises(PromptTooLong, match=r"of which its 6 images take 72 \(9 x 999 takes 12, .* takes 12\), over"):
        own_size.tokenize(["<image>" * 6], image_sizes=[(9, 999)] * 6)
    with pytest.raises(PromptTooLong, match=r"its 70 images take 280, over the limit of \d+; send fewer images, or a"):
        processor.tokenize(["<image>" * 70], max_length=200)  # of a square, the size does not matter
    with pytest.raises(PromptTooLong, match=r"^a prompt is 61 tokens long, over the limit of 60; shorten it$"):
        own_size.tokenize(["a" * 61])


def test_a_tiled_image_has_its_thumbnail_and_its_tiles(tokenizer):
    tiled = MLMambaProcessor(tokenizer, SIDE, {"image_size": SIDE, "tokens": PER_IMAGE, "tiles": 4}, max_length=60)
    batch = tiled(images=[image(0, (SIDE, SIDE)), image(1, (2 * SIDE, 2 * SIDE))], text="<image>a<image>")
    assert batch["pixel_values"].shape == (6, 3, SIDE, SIDE)
    assert int((batch["input_ids"] == IMAGE_ID).sum()) == 6 * PER_IMAGE
    assert np.array_equal(batch["pixel_values"][1], to_pixels(image(1, (2 * SIDE, 2 * SIDE)), SIDE))
