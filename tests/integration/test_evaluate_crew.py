"""Training workers that are there already answer an evaluation as workers of its own would, and may die at it."""

import psutil
import pytest

from mlmamba.processing import MLMambaProcessor
from tests.helpers.published_benchmarks import write_gqa
from tests.helpers.tiny import PER_IMAGE, SIDE, tiny_model, tiny_tokenizer
from tests.helpers.toy_stage import training_workers
from tests.helpers.toy_training import STAGE
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks import open_benchmark
from workflows.evaluate.collect import AnswerJob, Workers
from workflows.evaluate.results import read_answers
from workflows.evaluate.run import evaluate_benchmark
from workflows.recipe.train import TrainRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.train.trainer import Crew

HOW = Workers(workers=2, batch_images=1)


def answers(folder) -> dict:
    return {row.id: (row.prediction, row.blind_prediction) for row in read_answers(folder)}


@pytest.mark.usefixtures("two_cpus")
def test_training_workers_give_the_same_answers_and_their_death_costs_none(tmp_path):
    count, model = write_gqa(tmp_path / "gqa"), tmp_path / "model"
    tiny_model(max_position_embeddings=200).save_pretrained(model)
    processor = MLMambaProcessor(tiny_tokenizer(), image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=200)
    processor.save_pretrained(model)

    def evaluate(name: str, crew: Crew | None, progress=lambda done, total: None) -> dict:
        benchmark = open_benchmark("gqa", str(tmp_path / "gqa"), questions=count)
        out = tmp_path / name
        evaluate_benchmark(benchmark, model, out, HOW, max_new_tokens=3, on_progress=progress, crew=crew)
        return answers(out)

    def kill_one(done: int, total: int) -> None:
        if done == 1 and not killed:
            killed.append(training_workers(psutil.Process())[0])
            killed[0].kill()

    train, killed = TrainRecipe(workers=2, stages=[STAGE]), []
    with Crew(train, Layout(Folder(tmp_path), {}, Folder(tmp_path))) as crew:
        assert crew.run(AnswerJob("", (), 1), "a start", lambda event: None) == {}
        assert crew.suits(2, 1, 0)
        assert not crew.suits(3, 1, 0)
        assert not crew.suits(1, 2, 0)
        assert not crew.suits(1, 1, 0.5)
        asked = evaluate("crew", crew)
        weights = model / "model.safetensors"
        weights.rename(tmp_path / "aside")
        with pytest.raises(WorkflowError, match=r"gqa: a worker failed: .*run again to go on"):
            evaluate("broken", crew)
        (tmp_path / "aside").rename(weights)
        assert crew.started
        assert evaluate("killed", crew, kill_one) == asked
    assert killed
    assert evaluate("own", None) == asked
