"""Models and tokenizers small enough for every test: random weights, two layers, images of 32 pixels."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlmamba.configuration import MLMambaConfig
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import PRESETS

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "gpt-neox-20b" / "tokenizer.json"
NEOX = Path(os.environ.get("MLMAMBA_TEST_TOKENIZER") or _BESIDE)
"""tokenizer.json of GPT-NeoX-20B."""
NO_NEOX = (
    f"no GPT-NeoX tokenizer at {NEOX}: download tokenizer.json of EleutherAI/gpt-neox-20b and set "
    "MLMAMBA_TEST_TOKENIZER to its path"
)
IMAGE_ID, VOCABULARY, PER_IMAGE, SIDE = 1, 264, 4, 32

TINY = PRESETS["tiny"]
TEXT = {
    **TINY["text"],
    "vocab_size": VOCABULARY,
    "num_heads": 4,
    "expand": 2,
    "n_groups": 1,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

HYBRID = {
    "layers": ["mamba2", "mlp", "attention", "mlp", "both"],
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 8,
    "max_position_embeddings": 96,
    "rope_theta": 10_000.0,
    "mlp_size": 24,
}
"""What `tiny_model` takes as `text` for a hybrid of every kind of block."""


NATIVE = {"towers": TINY["vision"]["towers"], "min_tokens": 2, "max_tokens": 12}
"""What `tiny_model` takes as `vision_config` to read images at their own size, in patches of 16 pixels."""


def tiny_config(text: dict | None = None, **changes) -> MLMambaConfig:
    parts = {
        "text_config": TEXT | (text or {}),
        "vision_config": TINY["vision"],
        "connector_config": TINY["connector"],
        "image_token_id": IMAGE_ID,
        "max_position_embeddings": 64,
    }
    return MLMambaConfig(**{**parts, **changes})


def tiny_model(text: dict | None = None, **changes) -> MLMambaForConditionalGeneration:
    """In evaluation mode; weights large enough that what was read and seen decides what comes next."""
    torch.manual_seed(0)
    model = MLMambaForConditionalGeneration(tiny_config(text, **changes)).eval()
    with torch.no_grad():
        for parameter in (*model.connector.parameters(), *model.language_model.parameters()):
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, end and padding token 0, <image> 1: like GPT-NeoX in all but size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<|endoftext|>", "<image>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def granite_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte behind special tokens that Granite 4.0's have, with an end that does not pad; no <image>."""
    special = ["<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>"]
    core = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[0], pad_token=special[1])
    tokenizer.chat_template = "{{ 'their own' }}"
    return tokenizer


def prompt(length: int, images: int = 0, seed: int = 0) -> torch.Tensor:
    """(1, length) random ids that open with the placeholders of some images."""
    ids = torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[:, : images * PER_IMAGE] = IMAGE_ID
    return ids


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, longest) ids, filled up with 0, and their mask."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask
