"""What a save keeps in memory: a copy that later steps do not change, in the memory of the save before."""

import torch

from workflows.train.saver import MemoryEngine


def saved(engine: MemoryEngine, state: dict) -> dict:
    engine.create(None)
    engine.save(state, "/nowhere/rank0.pt")
    return engine.files["rank0.pt"]


def test_a_copy_is_not_changed_by_later_steps_and_shapes_stay_shapes():
    weight = torch.ones(3)
    kept = saved(MemoryEngine(), {"groups": [(weight, torch.Size([3]))], "step": 4, "none": None})
    weight += 1
    tensor, shape = kept["groups"][0]
    assert tensor.tolist() == [1, 1, 1]
    assert shape == torch.Size([3])
    assert isinstance(shape, torch.Size)
    assert (kept["step"], kept["none"]) == (4, None)


def test_the_next_copy_takes_the_same_memory():
    engine, weight = MemoryEngine(), torch.ones(3)
    first = saved(engine, {"a": weight, "b": weight})
    weight += 1
    second = saved(engine, {"a": weight, "b": weight})
    assert [second[name].data_ptr() for name in "ab"] == [first[name].data_ptr() for name in "ab"]
    assert second["a"].data_ptr() != second["b"].data_ptr()
    assert second["a"].tolist() == [2, 2, 2]


def test_what_has_another_shape_or_type_gets_memory_of_its_own():
    engine = MemoryEngine()
    assert saved(engine, {"a": torch.ones(3)})["a"].shape == (3,)
    assert saved(engine, {"a": torch.zeros(4)})["a"].tolist() == [0, 0, 0, 0]
    assert saved(engine, {"a": torch.zeros(4, dtype=torch.int64)})["a"].dtype == torch.int64
    assert saved(engine, {"a": {"b": torch.ones(1)}})["a"]["b"].item() == 1
