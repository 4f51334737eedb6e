"""Registration with transformers' Auto classes, as `import mlmamba` does it: without importing transformers or torch.

After `import mlmamba`, a saved model opens with AutoConfig, AutoProcessor, AutoModelForImageTextToText and
`pipeline("image-text-to-text", model=folder)`. Importing those from transformers, before or after, is what triggers the
registration; the model class itself, which needs timm, is imported when one is loaded.

transformers' modules import each other in circles, and importing one of ours in the middle of that would fail. So the
registration waits until the outermost import of a module of transformers or mlmamba is done
(tests/unit/mlmamba/test_auto.py).
"""

import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

_WATCHED = ("transformers.", "mlmamba.")


def _register_config() -> None:
    from transformers import AutoConfig

    from mlmamba.configuration import MLMambaConfig

    AutoConfig.register(MLMambaConfig.model_type, MLMambaConfig, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from mlmamba.configuration import MLMambaConfig
    from mlmamba.processing import MLMambaProcessor

    AutoProcessor.register(MLMambaConfig, MLMambaProcessor, exist_ok=True)


def _register_model() -> None:
    if "mlmamba.modeling" in sys.modules:
        return  # it registers itself
    from transformers import AutoModelForImageTextToText

    from mlmamba.configuration import MLMambaConfig

    class MLMambaForConditionalGeneration:
        """Stands for the model class until mlmamba.modeling is imported, which puts the real one in its place."""

        config_class = MLMambaConfig

        @staticmethod
        def from_pretrained(*args, **kwargs):
            from mlmamba.modeling import MLMambaForConditionalGeneration

            return MLMambaForConditionalGeneration.from_pretrained(*args, **kwargs)

        @staticmethod
        def _from_config(*args, **kwargs):
            from mlmamba.modeling import MLMambaForConditionalGeneration

            return MLMambaForConditionalGeneration._from_config(*args, **kwargs)

    AutoModelForImageTextToText.register(MLMambaConfig, MLMambaForConditionalGeneration, exist_ok=True)


class _Registrar(MetaPathFinder):
    """Finds modules as Python does, and registers what the imported ones ask for when the outermost is done."""

    def __init__(self):
        self._depth = threading.local()
        self._pending: dict[str, Callable[[], None]] = {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_model,
            "transformers.models.auto.processing_auto": _register_processor,
        }

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if not self._pending or not fullname.startswith(_WATCHED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader.exec_module = self._counted(spec.loader.exec_module)
        return spec

    def _counted(self, exec_module: Callable) -> Callable:
        def run(module) -> None:
            with self:
                exec_module(module)

        return run

    def __enter__(self):
        self._depth.value = getattr(self._depth, "value", 0) + 1

    def __exit__(self, error, *_) -> None:
        if self._depth.value == 1 and error is None:
            self.register()
        self._depth.value -= 1

    def register(self) -> None:
        """Do what is pending for the modules of transformers that are loaded by now."""
        while ready := [name for name in self._pending if name in sys.modules]:
            for name in ready:
                self._pending.pop(name)()
        if not self._pending and self in sys.meta_path:
            sys.meta_path.remove(self)


def register_when_imported() -> None:
    """Register now with what is imported of transformers, and later with the rest. Called once, by `import mlmamba`."""
    registrar = _Registrar()
    sys.meta_path.insert(0, registrar)
    with registrar:  # the end of an import of nothing: registers with what is there already
        pass
