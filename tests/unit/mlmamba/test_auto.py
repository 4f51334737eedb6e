"""transformers' Auto classes open what mlmamba saves, whichever of the two is imported first.

What an import does is seen in fresh interpreters; loading is tested here.
"""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import mlmamba
from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.helpers.tiny import PER_IMAGE, SIDE, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its processor, and an image beside them."""
    path = tmp_path_factory.mktemp("auto")
    tiny_model(max_position_embeddings=200).save_pretrained(path / "model-folder")
    processor = mlmamba.MLMambaProcessor(tiny_tokenizer(), image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=200)
    processor.save_pretrained(path / "model-folder")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(path / "image.png")
    return path / "model-folder"


def test_every_auto_class_opens_the_folder(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is mlmamba.MLMambaConfig
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is mlmamba.MLMambaProcessor
    assert (processor.image_size, processor.tokens_per_image, processor.max_length) == (SIDE, PER_IMAGE, 200)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is MLMambaForConditionalGeneration
    assert not model.training
    assert (
        AutoTokenizer.from_pretrained(folder)("a<image>")["input_ids"] == processor.tokenizer("a<image>")["input_ids"]
    )


def test_the_tokenizer_alone_knows_the_template(folder):
    chat = [{"role": "user", "content": "q"}]
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == processor.apply_chat_template(chat)


def test_a_model_is_built_from_a_config():
    model = AutoModelForImageTextToText.from_config(tiny_config(), dtype=torch.bfloat16)
    assert type(model) is MLMambaForConditionalGeneration
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.language_model.backbone.layers[0].mixer.A_log.dtype == torch.float32


PROBE = """
import json, sys
loaded = lambda: [name for name in ("transformers", "torch", "timm", "mlmamba.modeling") if name in sys.modules]
seen = {}
for step in sys.argv[2:]:
    exec(step)
    seen[step] = loaded()
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
built = AutoModelForImageTextToText.from_config(config)
from mlmamba.modeling import MLMambaForConditionalGeneration as real
same = AutoModelForImageTextToText._model_mapping[type(config)] is real
watching = any(type(finder).__module__ == "mlmamba.auto" for finder in sys.meta_path)
names = [type(o).__name__ for o in (config, processor, model, built)]
print(json.dumps({"seen": seen, "names": names, "same": same, "watching": watching}))
"""


def probe(folder, *steps: str) -> dict:
    command = [sys.executable, "-c", PROBE, str(folder), *steps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("steps", "light"),
    [
        (("import mlmamba", "from transformers import AutoTokenizer", "from transformers import pipeline"), True),
        (("from transformers import AutoProcessor, AutoModelForImageTextToText", "import mlmamba"), True),
        (("import mlmamba.modeling",), False),
    ],
    ids=["mlmamba first", "transformers first", "the model alone"],
)
def test_the_classes_are_registered_in_any_order_of_imports(folder, steps, light):
    found = probe(folder, *steps)
    model = "MLMambaForConditionalGeneration"
    assert found["names"] == ["MLMambaConfig", "MLMambaProcessor", model, model]
    assert found["same"]
    assert not found["watching"], "the import hook takes itself out when all is registered"
    if steps[0] == "import mlmamba":
        assert found["seen"]["import mlmamba"] == []
    if light:  # the model class, and timm with it, comes when a model is loaded
        assert "timm" not in found["seen"][steps[-1]]
        assert "mlmamba.modeling" not in found["seen"][steps[-1]]


def test_the_example_of_the_package_runs(folder, monkeypatch, capsys):
    lines = inspect.getdoc(mlmamba).split("\n")
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    "))
    assert "load_model" in code
    monkeypatch.chdir(folder.parent)
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
