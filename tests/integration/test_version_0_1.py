"""What version 0.1 left behind still loads: a data set, a checkpoint, a registered package and an evaluation.

tests/data/version-0.1 is what its tiny workflow made, with the paths of the machine replaced by /lab.
"""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mlmamba.answering import Answerer, Asked
from pipelines.manifest import Manifest
from pipelines.reader import PackedDataset
from pipelines.verify import verify
from workflows.evaluate.report import write_report
from workflows.evaluate.results import read_answers, read_image, read_scores
from workflows.registry.models import open_package
from workflows.registry.register import Example
from workflows.storage.folder import Folder
from workflows.train.checkpoint import CheckpointStore

KEPT = Path(__file__).parents[1] / "data" / "version-0.1"


@pytest.fixture
def kept(tmp_path) -> Path:
    """A copy, so that nothing can write into what is kept."""
    return shutil.copytree(KEPT, tmp_path / "kept")


def test_the_data_set(kept):
    manifest = Manifest.load(str(kept / "data-set"))
    assert manifest.digest == manifest.content_digest()
    assert verify(str(kept / "data-set")) == []
    assert len(PackedDataset(str(kept / "data-set"))) == 10


def test_the_registered_package_and_its_example(kept):
    model, example = open_package(kept / "package")
    shown = Example.load(example)
    assert Image.open(io.BytesIO(shown.image)).size == (32, 32)
    ((answer,),) = Answerer(model, shown.max_tokens).answer([Asked(shown.image, [shown.question])])
    assert answer == shown.answer


def test_its_pyfunc_finds_its_answerer_in_a_fresh_process(kept):
    code = f"""
import mlflow, pandas
model = mlflow.pyfunc.load_model({str(kept / "package")!r})
image = open({str(kept / "package/artifacts/example/picture")!r}, "rb").read()
print(model.predict(pandas.DataFrame({{"image": [image, None], "question": ["What colour is it?", "Hello?"]}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("[")


def test_the_evaluation_and_a_report_of_it(kept, tmp_path):
    folder = kept / "evaluation"
    scores, rows = read_scores(folder), read_answers(folder)
    assert len(rows) == scores["questions"]["overall"] == 36
    with pytest.raises((OSError, ValueError)):  # the images are not kept; what names them is understood
        read_image(scores, rows[0])
    write_report(folder, tmp_path / "report", {"recipe": "tiny"}, None)
    assert "tiny" in (tmp_path / "report" / "report.html").read_text()


def test_the_checkpoint_of_an_unfinished_stage(kept):
    """Found, whole by its sizes, kept by a sweep, and its tensors can be read."""
    store = CheckpointStore(Folder(str(kept / "checkpoints")))
    store.sweep()
    found = store.newest()
    assert (found.step, found.workers, found.zero_stage, found.model) == (4, 2, 2, "86d54c4818")
    state = torch.load(kept / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt", weights_only=False)
    assert any(name.startswith("connector") for name in state["module"])
