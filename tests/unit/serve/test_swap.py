"""Replacing the model of a service: real engines with tiny models, without Ray and without a registry."""

import ast
import asyncio
import gc
import json
import re
import shutil
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.swap_models import QUESTION, TOKENS, answer_of, drawn_example, write_model, write_spoiled
from workflows.registry import ResolvedModel
from workflows.serve import swap
from workflows.serve.options import Limits
from workflows.serve.service import Service
from workflows.serve.swap import Refused, SwapOptions, Swapper, largest_gap, load

LIMITS = Limits(max_batch=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    folders = {str(number): write_model(root / str(number), number) for number in (1, 2)}
    return folders | {how: write_spoiled(root / how, folders["1"], how) for how in ("cut", "not finite")}


def source(folders, version, example=None):
    return ResolvedModel(folders[version], "shapes", version, None, example)


@pytest.fixture
def service():
    service = Service(LIMITS)
    yield service
    if service.served:
        service.served.engine.close()


@pytest.fixture
def swapper(folders, service):
    service.served = load(source(folders, "1"), LIMITS, 1)
    told = []
    swapper = Swapper(
        service,
        SwapOptions(retry_seconds=1000),
        lambda version: load(source(folders, version), LIMITS, 1, quiet=True),
        on_taken=lambda served: told.append(("taken", served.source.version)),
        on_refused=lambda refusal: told.append(("refused", refusal.version)),
    )
    swapper.told = told
    yield swapper
    swapper.wait_for_drains()


def ask(service, tokens=TOKENS):
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens}).encode()

    async def run():
        return await (await service.begin(body)).whole()

    reply = asyncio.run(run())
    return reply["system_fingerprint"], reply["choices"][0]["message"]["content"]


def test_a_version_takes_over_and_the_old_one_ends_and_is_freed(folders, service, swapper):
    before = service.served
    weights = weakref.ref(before.engine._model)
    assert ask(service) == ("shapes/1", answer_of(folders["1"]))
    assert swapper.offer("2")
    assert ask(service) == ("shapes/2", answer_of(folders["2"]))
    swapper.wait_for_drains()
    assert not before.engine.alive
    del before
    gc.collect()
    assert weights() is None
    assert swapper.offer("1")
    assert ask(service) == ("shapes/1", answer_of(folders["1"]))
    assert swapper.told == [("taken", "2"), ("taken", "1")]


def test_answers_that_were_begun_are_finished_by_the_old_version(folders, service, swapper):
    """The swap comes while eight long answers wait or run; every one is the old model's."""
    expected = answer_of(folders["1"], tokens=150)
    before, answers = service.served, []
    threads = [threading.Thread(target=lambda: answers.append(ask(service, 150))) for _ in range(8)]
    for thread in threads:
        thread.start()
    while sum(before.engine.load) < 8:
        time.sleep(0.001)
    swapper.offer("2")
    for thread in threads:
        thread.join()
    assert answers == [("shapes/1", expected)] * 8


@pytest.mark.parametrize(
    ("version", "reason"),
    [("cut", "SafetensorError"), ("not finite", "logits of a question without an image are not finite")],
)
def test_a_version_that_cannot_be_served_is_refused_and_not_tried_again_at_once(
    folders, service, swapper, version, reason
):
    before = service.served
    assert not swapper.offer(version)
    assert re.search(reason, swapper.refusal.reason), swapper.refusal
    assert service.served is before
    assert ask(service)[0] == "shapes/1"
    assert not swapper.offer(version)  # within retry_seconds
    assert swapper.told == [("refused", version)]
    assert swapper.as_dict()["refused"]["version"] == version
    assert swapper.offer("1")  # the alias was moved back
    assert swapper.refusal is None
    swapper.offer(version)  # and on again, which tries at once
    assert swapper.told == [("refused", version)] * 2


def test_tries_become_rarer(folders, service):
    swapper = Swapper(service, SwapOptions(retry_seconds=10, retry_most_seconds=35), lambda version: None)
    waits = []
    for _ in range(4):
        swapper.refuse("7", "broken")
        waits.append(round(swapper.refusal.next_try - swapper.refusal.when))
    assert waits == [10, 20, 35, 35]


def test_a_version_that_is_no_longer_wanted_when_it_is_loaded_is_not_served(folders, service, swapper):
    swapper._wanted = lambda: "1"
    assert not swapper.offer("2")
    assert service.served.source.version == "1"
    swapper.wait_for_drains()
    assert swapper.told == []


def test_with_two_copies_a_new_model_waits_until_the_old_one_has_finished(folders, service, swapper):
    swapper._options = SwapOptions(copies=2)
    alive_at_load = []
    before, load_version = service.served, swapper._load

    def load_and_note(version):
        alive_at_load.append(before.engine.alive or before.engine._worker.is_alive())
        return load_version(version)

    swapper._load = load_and_note
    thread = threading.Thread(target=ask, args=(service, 200))
    thread.start()
    while not sum(before.engine.load):
        time.sleep(0.001)
    swapper.offer("2")
    swapper.offer("1")
    thread.join()
    assert alive_at_load == [True, False]


def test_the_stored_example_is_asked_and_its_answer_can_be_required(folders, tmp_path, caplog, monkeypatch):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    drawn_example("a lighthouse").save(wrong)
    with pytest.raises(Refused, match="a lighthouse"):
        load(source(folders, "1", wrong), LIMITS, 1)
    monkeypatch.setattr(swap, "_ROUNDING", 1000)  # as if it were nearly as likely
    with caplog.at_level("WARNING"):
        served = load(source(folders, "1", wrong), LIMITS, 1)
    served.engine.close()
    said = caplog.records[-1].message
    assert "'a lighthouse' when it was registered" in said
    answer = said.split("stored image is ")[1].split(", it was")[0]
    with pytest.raises(Refused, match="a lighthouse"):
        load(source(folders, "1", wrong), LIMITS, 1, same_answer=True)
    drawn_example(ast.literal_eval(answer)).save(right)
    load(source(folders, "1", right), LIMITS, 1, same_answer=True).engine.close()
    with pytest.raises(Refused, match="its answer to the stored image"):
        load(source(folders, "2", right), LIMITS, 1, same_answer=True)
    (right / "image").write_bytes(b"not an image")
    with pytest.raises(Refused, match="its stored example cannot be read"):
        load(source(folders, "1", right), LIMITS, 1)


def zero(folders, tmp_path, *names) -> ResolvedModel:
    """Version 1 with zeros in all weights whose names begin with one of `names`, and no stored example."""
    folder = shutil.copytree(folders["1"], tmp_path / "zero")
    weights = load_file(folder / "model.safetensors")
    chosen = [name for name in weights if name.startswith(names)]
    assert chosen
    save_file(
        {name: torch.zeros_like(value) if name in chosen else value for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return ResolvedModel(folder, "shapes", "zero", None, None)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("",), "do not depend on the text"),
        (("language_model",), "do not depend on the text"),
        (("lm_head", "language_model.lm_head"), "do not depend on the text"),
        (("connector",), "do not depend on the image"),
        (("vision", "connector"), "do not depend on the image"),
    ],
)
def test_a_version_with_dead_weights_is_refused_without_any_example(folders, tmp_path, names, reason):
    with pytest.raises(Refused, match=reason):
        load(zero(folders, tmp_path, *names), LIMITS, 1)


def test_a_stored_answer_that_is_as_likely_as_another_is_near():
    logits = torch.tensor([[0.0, 10.0, 9.9, -10.0], [5.0, 0.0, 0.0, -5.0]])
    assert largest_gap(logits, torch.tensor([1, 0])) == 0
    assert 0 < largest_gap(logits, torch.tensor([2, 0])) < 0.02
    assert largest_gap(logits, torch.tensor([2, 1])) > 1


def test_only_safetensors_are_loaded(folders, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(Refused, match="no safetensors"):
        load(ResolvedModel(tmp_path), LIMITS, 1)
