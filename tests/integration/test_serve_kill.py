"""kill -9 of a replica under load: answers go on, plain clients lose at most what was in flight, patient ones none."""

import time

import pytest
import torch

from tests.benchmarks.drills.serve_kill import failed_though_asked_later, kill_one
from tests.helpers.processes import free_port
from tests.helpers.serve_load import Clients, states, wait_until_all_serve
from tests.helpers.swap_models import answer_of, register_models, write_model, write_spoiled
from workflows.registry import promote
from workflows.serve.start import serve_model
from workflows.serve.swap import SwapOptions
from workflows.tracking.tracker import connect

pytestmark = [pytest.mark.usefixtures("two_cpus"), pytest.mark.slow]
QUESTIONS, TOKENS = ["what is shown?", "is it round?"], 16


def test_a_killed_replica_is_replaced_and_only_requests_in_flight_are_lost(tmp_path):
    """The second kill comes while the alias names a version that cannot be loaded: the new replica starts with the one
    that is served."""
    torch.set_num_threads(1)
    folders = [write_model(tmp_path / "1", 1)]
    folders.append(write_spoiled(tmp_path / "2", folders[0], "cut"))
    expected = {question: answer_of(folders[0], question, tokens=TOKENS) for question in QUESTIONS}
    client = connect(tmp_path)
    register_models(client, "shapes", folders, tmp_path / "packages")
    options = {"replicas": 2, "threads": 1, "swap": SwapOptions(poll_seconds=0.5), "block": False}
    with serve_model("models:/shapes@champion", tmp_path, port=free_port(), **options) as server:
        wait_until_all_serve(server.url, "shapes/1", 2)
        with (
            Clients(server.url, 4, QUESTIONS, TOKENS) as plain,
            Clients(server.url, 4, QUESTIONS, TOKENS, patience=300) as patient,
        ):
            time.sleep(1)
            kills = [kill_one(server.url, 2)]
            promote(client, "shapes", "2")
            while not all(state["refused"] for state in states(server.url).values()):
                time.sleep(0.2)
            kills.append(kill_one(server.url, 2))
            after = time.monotonic()
            time.sleep(1)
        for state in states(server.url).values():
            assert (state["serving"], state["refused"]["version"]) == ("shapes/1", "2")
    assert patient.failed == []
    assert failed_though_asked_later(plain, kills) == 0, plain.failed
    assert len(plain.failed) <= 4 * len(kills)
    answered = [asked for asked in plain.asked + patient.asked if not asked.error]
    assert all(asked.answer == expected[asked.question] for asked in answered)
    assert any(asked.began > after for asked in answered)
