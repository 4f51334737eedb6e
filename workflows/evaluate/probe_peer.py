"""A Transformer of the same size, from transformers, to hold the language model against."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def same_size_transformer(config, longest: int, parameters: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same vocabulary and width, and about the same number of parameters.

    One Transformer layer (attention and MLP) stands for two Mamba-2 layers, as Mamba's authors count (Gu and Dao 2023,
    section 3.4), and the MLP's width then makes the sizes equal; it comes out near Llama's own 8/3 of the width.
    Attention has heads as wide as the Mamba-2's, or the next narrower that divide the width, and is the fastest that
    transformers has on the device (sdpa).

    Args:
        config: the Mamba-2 language model's config.
        longest: positions that it must take.
        parameters: size to match.

    Raises:
        ValueError: no such Transformer has about this size.
    """
    width, layers = config.hidden_size, (config.num_hidden_layers + 1) // 2
    head = max(d for d in range(2, min(config.head_dim, width) + 1, 2) if width % d == 0)
    tied = config.tie_word_embeddings
    fixed = config.vocab_size * width * (1 if tied else 2) + width + layers * (4 * width**2 + 2 * width)
    inner = round((parameters - fixed) / (3 * width * layers))
    if inner < 1:
        raise ValueError(f"no Transformer of width {width} and {layers} layers has only {parameters:,} parameters")
    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        max_position_embeddings=longest,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(sizes).eval()


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of the modules, those that are shared once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())
