"""The CUDA path on a CPU: mlmamba/ops/cuda.py as it is, on mamba_ssm's own kernels in Triton's interpreter.

What is real: mlmamba/ops/cuda.py and all that calls it, mamba_ssm's Triton code and autograd functions, causal_conv1d's
Python layer and its registered operators. What stands in: causal_conv1d's compiled extension (by torch, with the
conditions that its C++ checks: tests/helpers/convolution_extension.py), and what belongs to a device
(tests/helpers/triton_interpreter.py). What these tests cannot show: that the kernels compile for a GPU, races, TF32
rounding, speed, and what the real convolution kernel computes; tests/parity/test_cuda_kernels.py does, where a GPU is.

Triton reads TRITON_INTERPRET when it is imported, so these tests run alone in their process:

    make kernels && TRITON_INTERPRET=1 pytest tests/interpreter

The kernel packages lie in a folder of their own, kernels/ in the environment's folder (`make kernels` makes it; or
MLMAMBA_TEST_KERNELS names another), which only these tests put on the path. Inside the environment, the Python part of
causal_conv1d without its extension would be found as a broken package by `mlmamba doctor`, and transformers would take
its own kernel path.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = Path(os.environ.get("MLMAMBA_TEST_KERNELS") or Path(sys.prefix, "kernels"))
_problem = pytest.StashKey[str]()


def pytest_configure(config):
    problem = _not_alone(config) or _not_installed()
    if not problem:
        os.environ["TRITON_INTERPRET"] = "1"
        _install()
    elif os.environ.get("MLMAMBA_TEST_KERNELS_REQUIRED") and not _not_alone(config):
        raise pytest.UsageError(f"tests/interpreter must run here, and cannot: {problem}")
    config.stash[_problem] = problem


def pytest_collection_modifyitems(config, items):
    if problem := config.stash[_problem]:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=problem))


def _not_alone(config) -> str:
    """Why Triton cannot be made to interpret here, or "" when only these tests run."""
    named = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    if not all(HERE in (path, *path.parents) for path in named) or (
        "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        return "interpreted kernels need a process of their own: TRITON_INTERPRET=1 pytest tests/interpreter"
    return ""


def _not_installed() -> str:
    """Which package is missing and what installs it, or ""."""
    sys.path.insert(0, str(KERNELS))
    missing = [package for package in ("mamba_ssm", "causal_conv1d", "triton") if not find_spec(package)]
    if not missing:
        return ""
    sys.path.remove(str(KERNELS))
    return f"{', '.join(missing)} not installed in {KERNELS}: make kernels"


def _install() -> None:
    from tests.helpers import convolution_extension, triton_interpreter

    triton_interpreter.install()
    convolution_extension.install()


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
