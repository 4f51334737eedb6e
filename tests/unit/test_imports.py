"""Who may import what: workflows -> pipelines -> mlmamba, and mlmamba works where the heavy packages are not installed.

The first half reads the source, so that an import inside a function counts as well; the second half imports every
module in a fresh interpreter in which those packages cannot be found.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlmamba

ROOT = Path(mlmamba.__file__).parent.parent
FORBIDDEN = {
    "mlmamba": {"pipelines", "workflows", "ray", "deepspeed", "mlflow"},
    "pipelines": {"workflows", "deepspeed", "mlflow"},
}
ABSENT = ("ray", "deepspeed", "mlflow", "mamba_ssm", "causal_conv1d")
KERNELS = "mlmamba.ops.triton_convolution"  # imported only when a kernel is asked for: torch may come without Triton


def imported(file: Path) -> set[str]:
    """Top-level names of everything a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_nothing_above_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): sorted(imported(file) & FORBIDDEN[package]) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_only_the_cuda_path_imports_the_kernels():
    files = (ROOT / "mlmamba").rglob("*.py")
    users = {file.relative_to(ROOT).as_posix() for file in files if imported(file) & {"mamba_ssm", "causal_conv1d"}}
    assert users == {"mlmamba/ops/cuda.py"}


PROBE = '''
import importlib, json, pkgutil, sys

class Without:
    """A finder that finds all but the absent packages: for transformers, too, they are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

ABSENT, KERNELS = json.loads(sys.argv[1]), sys.argv[2]
sys.meta_path[:] = map(Without, sys.meta_path)
import mlmamba
light = "torch" not in sys.modules
names = [m.name for m in pkgutil.walk_packages(mlmamba.__path__, "mlmamba.") if m.name != KERNELS]
for name in names:
    importlib.import_module(name)
for name in mlmamba.__all__:
    getattr(mlmamba, name)
print(json.dumps({"light": light, "names": names, "loaded": [n for n in ABSENT if n in sys.modules]}))
'''


@pytest.fixture(scope="module")
def bare() -> dict:
    """What a fresh interpreter reports in which the packages in ABSENT cannot be found."""
    command = [sys.executable, "-c", PROBE, json.dumps(ABSENT), KERNELS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_without_the_heavy_packages(bare):
    assert bare["loaded"] == []
    assert {"mlmamba.modeling", "mlmamba.processing", "mlmamba.images", "mlmamba.ops.naive"} <= set(bare["names"])


def test_importing_the_package_alone_does_not_import_torch(bare):
    assert bare["light"]


def test_the_public_names_are_these():
    assert mlmamba.__all__ == [
        "ConnectorConfig",
        "MLMambaConfig",
        "MLMambaForConditionalGeneration",
        "MLMambaProcessor",
        "Mamba2TextConfig",
        "VisionConfig",
        "load_model",
        "ops",
    ]
    assert all(getattr(mlmamba, name) is not None for name in mlmamba.__all__)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'Mamba3'; it exports ConnectorConfig, MLMambaConfig"):
        mlmamba.Mamba3  # noqa: B018
