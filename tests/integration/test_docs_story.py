"""Every command of the pages, run as it stands there, on one storage: from the first run to rolling back.

The recipe `quickstart` is a file of that name in the folder, which the commands take before the shipped one: the same
recipe on few images and steps. Ports are free ones. What is not run, and why, is in tests/helpers/documents.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.helpers.documents import ROOT, Block, blocks, story
from tests.helpers.processes import free_port
from tests.helpers.ray_cluster import listen_to_interrupts
from tests.integration.test_docs_commands import write
from workflows.recipe.load import RECIPES

pytestmark = pytest.mark.slow
SERVERS = ("mlflow ui", "mlmamba serve")
_TIMEOUT = 900  # seconds of one command


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small recipe, an image and the files that pages have described."""
    folder = tmp_path_factory.mktemp("story")
    content = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    for split, limit in (("train", 80), ("validation", 10), ("test", 10)):
        content["data"][split][0]["limit"] = limit
    content["train"]["stages"][0]["steps"] = 4
    content["train"]["stages"][1] |= {"epochs": 1}
    content["evaluate"]["gate"] = {}  # so few steps learn nothing
    (folder / "quickstart").write_text(yaml.safe_dump(content))
    for name in ("IMAGE.png", "image.png"):
        Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def said(place) -> dict[str, str]:
    """What every command printed, by the command."""
    outputs = {"mlmamba run quickstart": run("mlmamba run quickstart", place)}
    (model,) = (place / "storage" / "runs").glob("quickstart-*/stages/full")
    (place / "model-folder").symlink_to(model)
    run("mlmamba run quickstart --set train.stages.1.learning_rate=5e-4", place)  # a second version, to roll back from
    described = set()
    for block, line in story():
        if block.page not in described:
            described.add(block.page)
            prepare(block, place)
        if line.startswith(SERVERS):
            outputs[line] = outputs.get(line, "") + serve(block, line, place)  # several pages have the same line
        elif line not in outputs:
            outputs[line] = run(line, place)
    return outputs


def prepare(block: Block, folder: Path) -> None:
    """Write and run what the page describes and marks to be run."""
    for other in blocks(block.page):
        if other.file and other.language == "yaml":
            write(other, folder)
        elif other.run and other.language == "python":
            run_python(other.text, folder)


def environment() -> dict[str, str]:
    left_out = ("MLFLOW_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    # One worker: uvicorn takes several for dead when a busy machine lets them wait.
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "MLFLOW_WORKERS": "1"}


def run(line: str, folder: Path) -> str:
    """Run one command to its end, with this folder's storage for a shared one. Returns all that it printed."""
    line = line.replace("/shared/storage", str(folder / "storage"))
    done = subprocess.run(
        ["bash", "-euc", line], cwd=folder, env=environment(), capture_output=True, text=True, timeout=_TIMEOUT
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_python(text: str, folder: Path) -> str:
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=_TIMEOUT)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def serve(block: Block, line: str, folder: Path) -> str:
    """Start a server on a free port, run the Python that its page has for it, and stop it. Returns what was printed."""
    port = free_port()
    line = f"{re.sub(r' --port [0-9]+', '', line.partition('#')[0])} --port {port}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-euc", f"exec {line}"],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=listen_to_interrupts,
        )
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(1)
        clients = [other.text for other in blocks(block.page) if "http://127.0.0.1:8000" in other.text]
        asked = [text for text in clients if line.startswith("mlmamba serve") and "import" in text]
        return "".join(run_python(text.replace(":8000", f":{port}"), folder) for text in asked)
    finally:
        for number, seconds in ((signal.SIGINT, 60), (signal.SIGKILL, 10)):  # the latter for what the first leaves
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(seconds)


def answers(port: int) -> bool:
    """Whether a web server is up on a port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def test_every_command_of_the_pages_runs(said, place):
    assert {line for _, line in story()} <= set(said)
    assert "mlmamba-quickstart version 1" in said["mlmamba run quickstart"]
    assert (place / "sheet.png").stat().st_size > 10_000
    assert "ZeRO 3" in said["mlmamba run paper --dry-run"]
    (plain,) = [text for line, text in said.items() if "name=plain" in line]
    assert plain.count("done before, skipped") == 1, "the tutorial says that the shards are not made again"
    assert said["mlmamba run quickstart --set train.workers=1"].count("done before, skipped") == 4


def test_the_pages_python_opens_the_model_and_asks_the_service(said, place):
    page = ROOT / "docs" / "how-to" / "model-in-python.md"
    (block,) = [block for block in blocks(page) if block.language == "python"]
    assert run_python(block.text, place).strip()
    asked = [text for line, text in said.items() if line.startswith("mlmamba serve") and text]
    assert asked, "no page asks its service"


def test_rolling_back_ends_at_the_first_version(said):
    (rolled,) = [text for line, text in said.items() if line.startswith("mlmamba models rollback")]
    assert "mlmamba-quickstart/1" in rolled
