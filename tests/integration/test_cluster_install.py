"""The install steps of images and launchers, run. There is no container engine here, so the RUN lines of the Dockerfile
run in a fresh virtual environment, on a folder that holds what its COPY lines bring and nothing else."""

import ast
import json
import os
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers.manifests import CLUSTER, PROJECT, versions
from tests.unit.cluster.test_container_images import steps

KERNEL = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; } void launch(float* x) { twice<<<1, 32>>>(x); }\n"
SETUP = """
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension

setup(
    name="tiny-kernel",
    version="1",
    ext_modules=[CUDAExtension("tiny_kernel", ["tiny.cu"], extra_compile_args={"nvcc": ["-arch=sm_90"]})],
    cmdclass={"build_ext": BuildExtension},
)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The image's environment and its working folder, made by the Dockerfile's own lines."""
    root = tmp_path_factory.mktemp("image")
    code = root / "code"
    code.mkdir()
    venv.create(root / "venv", with_pip=True)
    environment = clean(root / "venv") | versions()
    for name, text in steps("cpu"):
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                place = code / target / ("" if (PROJECT / source).is_dir() else source)
                copy = shutil.copytree if (PROJECT / source).is_dir() else shutil.copy
                copy(PROJECT / source, place)
        elif name == "RUN" and "apt-get" not in text:
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", text], cwd=code, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"RUN {text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return root


def clean(environment: Path) -> dict[str, str]:
    """This process's environment as a shell would have it in which that virtual environment is active."""
    left_out = ("PYTHON", "VIRTUAL_ENV", "MLFLOW", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"PATH": f"{environment / 'bin'}:{kept['PATH']}", "VIRTUAL_ENV": str(environment)}


@pytest.mark.slow
def test_the_images_lines_make_an_environment_that_runs_the_command(installed, tmp_path):
    shown = subprocess.run(
        ["mlmamba", "doctor", "--json"], cwd=tmp_path, env=clean(installed / "venv"), capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    findings = json.loads(shown.stdout)["findings"]
    assert not [finding for finding in findings if finding["state"] == "missing"]
    where = "import workflows, mlmamba; print(workflows.__file__, mlmamba.__file__)"
    done = subprocess.run(
        ["python", "-c", where], cwd=tmp_path, env=clean(installed / "venv"), capture_output=True, text=True, check=True
    )
    assert all("site-packages" in path for path in done.stdout.split())  # not this checkout
    (site,) = (installed / "venv").glob("lib/*/site-packages")
    for package in ("mlmamba", "pipelines", "workflows"):  # recipes, pages and templates travel too
        files = [path.relative_to(PROJECT) for path in (PROJECT / package).rglob("*") if path.is_file()]
        sent = [path for path in files if "__pycache__" not in path.parts]
        assert not [str(path) for path in sent if not (site / path).exists()]


@pytest.mark.slow
def test_a_launchers_set_up_finds_it_done_and_installs_the_code_again(installed, tmp_path):
    code = tmp_path / "code"
    ignored = shutil.ignore_patterns(".git", ".venv", "storage", "__pycache__", "*.egg-info", "build")
    shutil.copytree(PROJECT, code, ignore=ignored)
    (code / "mlmamba" / "sent.py").write_text("SENT = True\n")
    command = ["bash", code / "cluster" / "ray" / "setup.sh", code, installed / "venv"]
    for _ in range(2):
        done = subprocess.run(command, env=clean(installed / "venv"), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "torch" not in done.stdout  # the second time, no list of packages is gone through
    assert list((installed / "venv").glob(".cpu-*")), "no mark is left"
    subprocess.run(["python", "-c", "import mlmamba.sent"], cwd=tmp_path, env=clean(installed / "venv"), check=True)


IMPORT = """
from mlmamba.ops import kernel, kernel_problem
from mlmamba.ops.cuda import load_block, load_scan, load_step, loads
load_scan()
print({name: loads(name) for name in ("mamba_ssm", "step", "norm", "triton_convolution", "causal_conv1d")})
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_mamba_ssm_is_built_with_the_scripts_switches_and_its_kernels_import(tmp_path):
    """The image's kernel parts, as far as they can be made without an hour of CUDA's compiler: mamba_ssm by the script
    itself. causal_conv1d's extension is left out, and that our own convolution takes its place is what is looked at."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    site = next(environment.glob("lib/*/site-packages"))
    (site / "ours.pth").write_text(f"{Path(torch.__file__).parent.parent}\n{PROJECT}")  # for its torch, and our code
    command = ["bash", CLUSTER / "kernels.sh", tmp_path / "wheels", "mamba-ssm>=2.3.2"]
    hidden = clean(environment) | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    hidden.pop("CUDA_HOME", None)
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = (tmp_path / "wheels").glob("mamba_ssm-*.whl")
    install = ["python", "-m", "pip", "install", "--no-deps", wheel]
    subprocess.run(install, env=hidden, check=True, capture_output=True, timeout=300)
    shown = subprocess.run(["python", "-c", IMPORT], env=hidden, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr[-3000:]
    found = ast.literal_eval(shown.stdout.strip().splitlines()[-1])
    missing = {name: problem for name, problem in found.items() if problem}
    assert missing.keys() <= {"causal_conv1d"}, f"does not import: {missing}"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_kernels_are_compiled_and_linked_without_a_gpu_and_without_cuda(tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    site = next(environment.glob("lib/*/site-packages"))
    (site / "ours.pth").write_text(str(Path(torch.__file__).parent.parent))  # for its torch
    package = tmp_path / "tiny"
    package.mkdir()
    (package / "tiny.cu").write_text(KERNEL)
    (package / "setup.py").write_text(SETUP)
    command = ["bash", CLUSTER / "kernels.sh", tmp_path / "wheels", package]
    hidden = clean(environment) | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    hidden.pop("CUDA_HOME", None)
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = (tmp_path / "wheels").glob("tiny_kernel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extract(library, tmp_path)
    needed = subprocess.run(["readelf", "-d", tmp_path / library], capture_output=True, text=True, check=True).stdout
    assert f"libcudart.so.{torch.version.cuda.split('.')[0]}" in needed
    assert b"sm_90" in (tmp_path / library).read_bytes()
