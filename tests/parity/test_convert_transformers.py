"""Converted language models in transformers itself: the same logits, bit for bit, there and back.

transformers' Mamba2ForCausalLM is the judge: it loads what we write, and reads state-spaces' names on its own.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from mlmamba.convert import convert, load_language_model, read_language_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.helpers.checkpoints import write_state_spaces
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import TEXT, prompt, tiny_model

IDS = torch.cat([prompt(13, seed=1), prompt(13, seed=2)])
CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "two groups": {"n_groups": 2},
    "biased": {"use_bias": True, "use_conv_bias": False},
    "other sizes": {"conv_kernel": 5, "state_size": 16, "expand": 4, "num_heads": 8, "time_step_limit": (0.01, 0.5)},
}


def theirs(folder, shard: str = "1GB", **changes) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**{**TEXT, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
@pytest.mark.parametrize("shard", ["1GB", "4KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_to_ours_to_transformers_gives_the_same_logits(tmp_path, changes, shard):
    before = theirs(tmp_path / "theirs", shard, **changes)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() is (shard == "4KB")
    ours = tiny_model(changes)
    load_language_model(ours.language_model, read_language_model(tmp_path / "theirs"))
    assert_close(ours(IDS).logits, before(IDS).logits, 1e-4, "our logits")
    ours.save_pretrained(tmp_path / "ours")
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(loaded(IDS).logits, ours(IDS).logits)

    convert(tmp_path / "ours", tmp_path / "back")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(after(IDS).logits, before(IDS).logits)
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in after.state_dict().items())


@torch.no_grad()
def test_a_state_spaces_checkpoint_gives_what_transformers_reads_in_it(tmp_path):
    tensors = write_state_spaces(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    model, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    direct = Mamba2ForCausalLM(model.config).eval()
    direct.load_state_dict(tensors)  # by transformers' own renaming of `embedding`
    expected = direct(IDS % 256).logits
    assert torch.equal(model.eval()(IDS % 256).logits, expected)
    ours = tiny_model({"vocab_size": 256})
    load_language_model(ours.language_model, read_language_model(tmp_path / "a"))
    ours.config.image_token_id = 999  # id 1 is a word here
    assert_close(ours(IDS % 256).logits, expected, 1e-4)


@torch.no_grad()
def test_by_way_of_state_spaces_nothing_changes(tmp_path):
    before = theirs(tmp_path / "a", n_groups=2)
    convert(tmp_path / "a", tmp_path / "b", "state-spaces")
    convert(tmp_path / "b", tmp_path / "c", "transformers")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert torch.equal(after(IDS).logits, before(IDS).logits)
