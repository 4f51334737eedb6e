"""llama.cpp computes from our GGUF files what the model computes: tokens of a text, and what may follow a prompt.

Its own process, by `tests.helpers.llama`: a Python with xllamacpp, this one or MLMAMBA_TEST_LLAMA.
"""

import json
import urllib.request

import pytest
import torch

from mlmamba.conversation import Turn
from mlmamba.convert import convert
from mlmamba.loading import load_model
from tests.helpers.llama import interpreter, llama_server
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from workflows.train.initial import save

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not interpreter(), reason="no interpreter with xllamacpp (MLMAMBA_TEST_LLAMA)"),
]
TEXT = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 32}


def post(url: str, path: str, **body) -> dict:
    call = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as reply:
        return json.load(reply)


@pytest.mark.parametrize("text", [TEXT, TEXT | {"n_groups": 2}, TEXT | {"tie_word_embeddings": False}])
@pytest.mark.parametrize(("form", "close"), [("fp32", 1e-5), ("bf16", 0.1), ("q8_0", 0.2)])
def test_llama_cpp_gives_the_models_probabilities(tmp_path, text, form, close):
    save(tiny_model(text), tiny_tokenizer(), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.gguf", precision=form)
    model, processor = load_model(tmp_path / "model", "cpu", "fp32")
    ids = torch.randint(2, 258, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    letter = processor.tokenizer("a")["input_ids"][0]  # is what it says: half a character would be held back
    with llama_server(interpreter(), tmp_path / "model.gguf", 1) as (url, _):
        for length in (1, 2, 40):
            asked = {
                "prompt": ids[0, :length].tolist(),
                "n_predict": 1,
                "logit_bias": [[letter, 1000.0]],
                "n_probs": 50,
            }
            (made,) = post(url, "/completion", **asked)["completion_probabilities"]
            assert len(made["top_logprobs"]) == 50
            own = expected[length - 1, [entry["id"] for entry in made["top_logprobs"]]]
            theirs = torch.tensor([entry["logprob"] for entry in made["top_logprobs"]])
            assert ((own - theirs).square().mean().sqrt() / own.std()).item() < close
        reply = post(url, "/tokenize", content="a b  c\n\u00e9 12")
        question = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
        prompt = post(url, "/apply-template", messages=question)["prompt"]
    assert reply["tokens"] == processor.tokenizer("a b  c\n\u00e9 12")["input_ids"]
    assert prompt == processor.prompt([Turn("user", "s\n\nhello")])
