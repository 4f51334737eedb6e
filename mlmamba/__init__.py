"""mlmamba: the ML-Mamba model library (arXiv 2407.19832) on torch, transformers and timm.

To ask a saved model about an image:

    import mlmamba

    model, processor = mlmamba.load_model("model-folder")
    question = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is in the image?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=20)
    print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

After `import mlmamba`, transformers' own AutoModelForImageTextToText, AutoProcessor and
pipeline("image-text-to-text", model="model-folder") open the folder as well.

Importing this package needs none of ray, deepspeed, mlflow, mamba_ssm or CUDA; tests/unit/test_imports.py keeps it so.
Names are loaded on first use, so that the command line starts without importing torch.
"""

from importlib import import_module

from mlmamba.auto import register_when_imported

_HOME = {
    "MLMambaConfig": "configuration",
    "MLMambaForConditionalGeneration": "modeling",
    "MLMambaProcessor": "processing",
    "Mamba2TextConfig": "configuration",
    "VisionConfig": "configuration",
    "ConnectorConfig": "configuration",
    "load_model": "loading",
    "ops": "ops",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mlmamba' has no attribute {name!r}; it exports {', '.join(__all__)}")
    module = import_module(f"mlmamba.{_HOME[name]}")
    return module if name == "ops" else getattr(module, name)


register_when_imported()
