"""Workers with a GPU keep the model in an actor. Ray is told of GPUs that are not there, so it runs anywhere."""

import pytest
import ray

from mlmamba.processing import MLMambaProcessor
from tests.helpers.published_benchmarks import write_gqa
from tests.helpers.tiny import PER_IMAGE, SIDE, tiny_model, tiny_tokenizer
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks import open_benchmark
from workflows.evaluate.collect import Workers
from workflows.evaluate.results import read_answers
from workflows.evaluate.run import evaluate_benchmark


@pytest.fixture
def two_gpus():
    ray.shutdown()
    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_workers_with_gpus_give_the_same_answers(two_gpus, tmp_path):
    count = write_gqa(tmp_path / "gqa")
    model = tmp_path / "model"
    tiny_model(max_position_embeddings=200).save_pretrained(model)
    processor = MLMambaProcessor(tiny_tokenizer(), image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=200)
    processor.save_pretrained(model)
    found = {}
    for gpus in (0, 1):
        benchmark = open_benchmark("gqa", str(tmp_path / "gqa"), questions=count)
        how = Workers(workers=2, gpus_per_worker=gpus, batch_images=1)
        evaluate_benchmark(benchmark, model, tmp_path / str(gpus), how, max_new_tokens=3)
        found[gpus] = {row.id: (row.prediction, row.blind_prediction) for row in read_answers(tmp_path / str(gpus))}
    assert found[0] == found[1]
    (model / "model.safetensors").unlink()
    with pytest.raises(WorkflowError, match=r"gqa: a worker failed: .*run again to go on"):
        evaluate_benchmark(benchmark, model, tmp_path / "broken", Workers(), max_new_tokens=3)
