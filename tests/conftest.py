"""Fixtures that many tests use."""

import pytest


@pytest.fixture(scope="session")
def model():
    """A tiny model in evaluation mode. Tests only read it; one that changes a model builds its own."""
    from tests.helpers.tiny import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    from tests.helpers.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def neox():
    """The real GPT-NeoX-20B tokenizer, with <image> and padding as a model has them."""
    from transformers import PreTrainedTokenizerFast

    from tests.helpers.tiny import NEOX, NO_NEOX

    if not NEOX.is_file():
        pytest.skip(NO_NEOX)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NEOX), eos_token=end, pad_token=end, unk_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory):
    """A folder in which the operators are compiled, which takes half a minute. Tests set MLMAMBA_CACHE to it."""
    from mlmamba.ops import compiled

    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLMAMBA_CACHE", str(place))
        compiled.operators(make=True)
    return place


@pytest.fixture(scope="module")
def process_group():
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
