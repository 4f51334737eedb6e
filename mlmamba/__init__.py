"""mlmamba: the ML-Mamba model library (arXiv 2407.19832) on torch, transformers and timm.

Importing this package needs none of ray, deepspeed, mlflow, mamba_ssm or CUDA; tests/unit/test_imports.py keeps it so.
Names are loaded on first use, so that the command line starts without importing torch.
"""

from importlib import import_module

_HOME = {
    "MLMambaConfig": "configuration",
    "MLMambaForConditionalGeneration": "modeling",
    "MLMambaProcessor": "processing",
    "Mamba2TextConfig": "configuration",
    "VisionConfig": "configuration",
    "ConnectorConfig": "configuration",
    "ops": "ops",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mlmamba' has no attribute {name!r}; it exports {', '.join(__all__)}")
    module = import_module(f"mlmamba.{_HOME[name]}")
    return module if name == "ops" else getattr(module, name)
