"""What a micro batch is made of, and that running one makes the host wait for the device nowhere."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from mlmamba.conversation import IGNORE_INDEX
from pipelines.augment import Augmentation
from pipelines.packed import PackedRow
from tests.helpers.fake_gpu import FakeGPU, gradients
from tests.helpers.host_reads import HostRead, no_host_reads
from tests.helpers.images import encoded
from tests.helpers.tiny import HYBRID, IMAGE_ID, PER_IMAGE, prompt, tiny_model
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.train.job import StageError
from workflows.train.optim import adamw_options, parameter_groups, schedule
from workflows.train.stage import accumulation
from workflows.train.step import MicroBatch, Notice, batch_maker, memory_advice, refuse_device, share_of

LENGTH = 24


def row(seed: int) -> PackedRow:
    ids = torch.cat([prompt(9, 1, seed=seed), prompt(7, seed=seed + 1)], 1)[0].numpy().astype(np.int32)
    labels = np.where(ids == IMAGE_ID, IGNORE_INDEX, ids)
    seq_idx = np.array([0] * 9 + [1] * 7, dtype=np.int32)
    return PackedRow(["a", "b"], ids, labels, seq_idx, [encoded(seed)], np.array([0], dtype=np.int32), ["s", "s"])


def rows() -> SimpleNamespace:
    """Only what `batch_maker` takes of a data set."""
    return SimpleNamespace(
        rows=lambda indices: [row(int(i)) for i in indices], manifest=SimpleNamespace(max_tokens=LENGTH)
    )


@pytest.fixture
def micro_batches(model) -> list[MicroBatch]:
    return batch_maker(rows(), 2, model)(np.arange(4))


def test_a_micro_batch_holds_what_its_values_decide(micro_batches):
    assert len(micro_batches) == 2
    batch = micro_batches[1]
    assert set(batch.inputs) == {"input_ids", "seq_idx", "pixel_values", "positions"}
    assert (batch.tokens, batch.labels) == (2 * 16, 2 * 12)
    positions = batch.inputs["positions"]
    assert positions.images.tolist() == [*range(PER_IMAGE), *range(LENGTH, LENGTH + PER_IMAGE)]
    assert batch.predicted == 2 * (5 + 6)  # the label at the start of the second sequence is predicted by nothing
    assert torch.equal(batch.inputs["input_ids"].flatten()[positions.labelled + 1], positions.targets)


def test_rows_that_do_not_count_have_no_labels(model, micro_batches):
    (first, second) = batch_maker(rows(), 2, model)(np.arange(4), [True, True, True, False])
    assert torch.equal(first.inputs["positions"].labelled, micro_batches[0].inputs["positions"].labelled)
    assert second.predicted == 11
    assert second.inputs["positions"].labelled.max() < LENGTH
    assert second.tokens == 16  # of the row that counts


def test_images_are_changed_by_seed_step_and_row_however_the_step_is_cut(model):
    def pixels(indices, step, seed=7, micro=2) -> dict[int, torch.Tensor]:
        made = batch_maker(rows(), micro, model, augment=Augmentation(crop=0.4, flip=True, colour=0.3), seed=seed)
        batches = made(np.array(indices), step=step)
        return dict(zip(indices, torch.cat([b.inputs["pixel_values"] for b in batches]), strict=True))

    whole = pixels([0, 1, 2, 3], step=5)
    alone = pixels([2], step=5, micro=1) | pixels([3, 0], step=5)
    assert all(torch.equal(alone[row], whole[row]) for row in alone)
    for other in (pixels([0, 1, 2, 3], step=6), pixels([0, 1, 2, 3], step=5, seed=8)):
        assert not any(torch.equal(other[row], whole[row]) for row in whole)
    plain = torch.cat([b.inputs["pixel_values"] for b in batch_maker(rows(), 2, model)(np.arange(4))])
    assert not any(torch.equal(plain[row], whole[row]) for row in whole)


@pytest.mark.parametrize("text", [{}, HYBRID], ids=["pure", "hybrid"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_read_nothing_on_the_host(micro_batches, checkpointing, text):
    model = tiny_model(text).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    count = torch.tensor(20.0)
    for batch in micro_batches:
        with no_host_reads():
            out = model(**batch.inputs, num_items_in_batch=count, logits_to_keep=1, use_cache=False)
            out.loss.backward()
        assert out.loss.isfinite()
        assert out.cache_params is None


def test_a_host_read_would_be_found(micro_batches):
    """With labels in place of positions the model looks for them itself."""
    model, inputs = tiny_model().train(), dict(micro_batches[0].inputs)
    inputs.pop("positions")
    with pytest.raises(HostRead), no_host_reads():
        model(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize(("path", "text"), [("torch", {}), ("", {}), ("torch", HYBRID)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_on_a_faked_gpu_no_tensor_is_left_behind_and_none_is_float64(micro_batches, precision, path, text, monkeypatch):
    """The whole step on torch's fake CUDA tensors: mixed devices and reads of values fail there. Without a forced path
    the convolution is our Triton kernels, of which all but the launch is traced."""
    monkeypatch.setenv("MLMAMBA_OPS", path)
    if not path:
        kernels = pytest.importorskip("mlmamba.ops.triton_convolution", exc_type=ImportError)
        monkeypatch.setattr(kernels, "_launch", lambda *arguments: None)
    model, gpu = tiny_model(text), FakeGPU()
    model.vision.requires_grad_(False)  # as in most stages; its last block, which is not read, has no gradient
    model.train()
    weights, inputs = gpu.weights(model), dict(micro_batches[0].inputs)
    inputs["positions"] = inputs["positions"]._each(gpu.move)
    inputs = gpu.move(inputs)
    with gpu():
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            out = functional_call(model, weights, kwargs={**inputs, "logits_to_keep": 1, "use_cache": False})
        found = gradients(out.loss)
    assert (out.loss.device.type, out.loss.dtype) == ("cuda", torch.float32)
    assert gpu.float64 == set()
    trained = {name: found.get(id(weight)) for name, weight in weights.items() if weight.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    assert {(g.device.type, g.dtype) for g in trained.values()} == {("cuda", torch.float32)}


@pytest.mark.parametrize("text", [{}, HYBRID])
def test_on_a_faked_gpu_the_optimizer_stays_there_and_in_float32(text):
    """AdamW as `start_engine` makes it, from the second step on too: fused, without a read of the host."""
    train = TrainRecipe(workers=1, gpus_per_worker=1, stages=[stage := StageRecipe(**STAGE)])
    gpu = FakeGPU()
    weights = gpu.weights(tiny_model(text))
    groups = parameter_groups(SimpleNamespace(named_parameters=weights.items), stage)
    trained = [weight for group in groups for weight in group["params"]]
    with gpu():
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(groups, **adamw_options(stage, train))
        rates = schedule(stage, optimizer, 10)
        for _ in range(2):
            optimizer.step()
            rates.step()
    assert len(groups) == 2 * len({group["part"] for group in groups})  # with decay and without
    assert gpu.float64 == set()
    for weight in trained:
        held = {**optimizer.state[weight], "weight": weight}
        assert {(t.device.type, t.dtype) for t in held.values()} == {("cuda", torch.float32)}, held


STAGE = {"name": "full", "trains": ["language_model"], "steps": 1, "learning_rate": 1e-3, "batch_rows": 4}


@pytest.mark.parametrize(
    ("changes", "rows", "advice"),
    [
        ({}, 4, "lower micro_batch_rows of stage full (4), or set train.activation_checkpointing=true, or raise "),
        ({"precision": "bf16", "zero_stage": 3, "activation_checkpointing": True}, 1, "lower the data's max_tokens"),
    ],
)
def test_a_gpu_that_is_out_of_memory_says_what_takes_less(changes, rows, advice):
    stage = StageRecipe(**STAGE, micro_batch_rows=rows)
    train = TrainRecipe(workers=1, stages=[stage], **changes)
    with pytest.raises(StageError) as failed, memory_advice(stage, train, 7):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    assert str(failed.value).startswith(f"the GPU's memory was used up in step 7: {advice}")
    assert "\n" not in str(failed.value)


def test_a_gpu_without_bf16_is_refused_before_the_first_step(monkeypatch):
    stage = StageRecipe(**STAGE)
    train = TrainRecipe(workers=1, stages=[stage], precision="bf16", gpus_per_worker=1)
    refuse_device(train)  # here is no GPU at all, which the preflight says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(StageError, match=r"train\.precision is bf16, and Tesla T4 does not compute in it"):
        refuse_device(train)
    refuse_device(train.model_copy(update={"precision": "fp32"}))


@pytest.mark.parametrize("batch_rows", [1, 4, 6, 12])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_step_has_the_same_rows_with_any_number_of_workers(batch_rows, micro):
    stage = StageRecipe(name="full", trains=["connector"], steps=1, learning_rate=1, batch_rows=batch_rows,
                        micro_batch_rows=micro)  # fmt: skip
    rows = np.random.default_rng(0).permutation(100)[:batch_rows]
    for world in range(1, 9):
        shares = [share_of(rows, rank, world, stage) for rank in range(world)]
        counted = [own if counts is None else own[counts] for own, counts in shares]
        assert np.concatenate(counted).tolist() == rows.tolist()
        assert {len(own) for own, _ in shares} == {accumulation(stage, world) * micro}
        if batch_rows % (world * micro) == 0:
            assert all(counts is None for _, counts in shares)


def test_rows_that_do_not_count_are_no_tokens_either(model):
    made = batch_maker(rows(), 2, model)
    (whole,), (half,) = made(np.array([1, 2])), made(np.array([1, 2]), [True, False])
    assert (half.tokens, half.labels) == (whole.tokens // 2, whole.labels // 2)


def test_a_notice_is_heard_when_any_worker_was_told():
    told = [False]
    notice = Notice(lambda: told[0])
    assert (notice.said(), notice.heard()) == (0.0, False)
    notice.take(torch.tensor(0.0))
    assert not notice.heard()
    told[0] = True
    assert notice.said() == 1.0
    notice.take(torch.tensor(1.0))  # of the sum over all
    assert notice.heard()
