"""Promotion, rollback and their history on a real MLflow registry in SQLite, and the command line over it."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.registry_server import add_version
from workflows.cli import main
from workflows.errors import UsageError, WorkflowError
from workflows.recipe.evaluate import Gate
from workflows.recipe.load import load_recipe
from workflows.registry import get_version, holder, promote, resolve_model, rollback, rolled_back, show_model
from workflows.registry.claim import EXPIRES, claim
from workflows.tracking.tracker import connect

NAME = "shapes"
GATE = Gate(least={"overall": 0.5}, margin={"overall": 0.01})


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A storage folder with an empty registry: making the database takes seconds, so tests copy it."""
    storage = tmp_path_factory.mktemp("registry")
    connect(storage).search_registered_models()
    return storage / "mlflow.db"


@pytest.fixture
def storage(database, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(database.read_bytes())
    return tmp_path


@pytest.fixture
def client(storage):
    """Versions 1 to 4 of `shapes`; 3 is worse than the others by more than the margin, 4 is under the threshold."""
    client = connect(storage)
    for overall in (0.80, 0.90, 0.85, 0.40):
        add_version(client, NAME, str(storage), {"overall": overall}, GATE)
    return client


def cli(storage, capsys, *arguments):
    """Exit code, JSON of stdout or None, and stderr."""
    code = main(["models", *arguments, "--storage", str(storage), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_the_alias_moves_only_when_the_gate_holds(client):
    assert promote(client, NAME, "1").moved
    assert promote(client, NAME, "2").moved
    worse = promote(client, NAME, "3")
    assert (worse.moved, worse.holds) == (False, False)
    assert worse.gate_failures == [
        "overall is 0.85, the present holder has 0.9: 0.05 worse, at most 0.01 is allowed",
    ]
    low = promote(client, NAME, "4")
    assert low.gate_failures[0] == "overall is 0.4, at least 0.5 is wanted"
    assert holder(client, NAME, "champion") == "2"
    again = promote(client, NAME, "2")
    assert (again.moved, again.holds) == (False, True)
    assert len(show_model(client, NAME)["moves"]) == 2


def test_force_records_who_when_why_and_what_was_passed_over(client):
    promote(client, NAME, "2")
    with pytest.raises(UsageError, match="--reason"):
        promote(client, NAME, "4", force=True, reason=" ")
    assert holder(client, NAME, "champion") == "2"
    done = promote(client, NAME, "4", force=True, reason="the test set is wrong")
    assert done.moved
    assert done.forced
    record = json.loads(get_version(client, f"{NAME}/4").tags["mlmamba.forced.champion"])
    assert record["why"] == "the test set is wrong"
    assert "@" in record["who"]
    assert record["when"].endswith("Z")
    assert len(record["gate_failures"]) == 2
    assert show_model(client, NAME)["moves"][-1]["forced"]


def test_a_version_without_a_gate_and_one_scored_on_other_questions_need_force(client, storage):
    bare = str(client.create_model_version(NAME, source=str(storage)).version)
    assert "carries no gate" in promote(client, NAME, bare).gate_failures[0]
    ours = {"mlmamba.evaluation": "aaaa"}
    other = {"mlmamba.evaluation": "bbbb"}
    first = add_version(client, NAME, str(storage), {"overall": 0.6}, GATE, **ours)
    second = add_version(client, NAME, str(storage), {"overall": 0.9}, GATE, **other)
    assert promote(client, NAME, first).moved
    assert "other questions" in promote(client, NAME, second).gate_failures[0]


def test_rollbacks_go_one_further_back_each_and_never_to_what_was_rolled_back_from(client, storage):
    five = add_version(client, NAME, str(storage), {"overall": 0.95}, GATE)
    for version in ("1", "2", five):
        promote(client, NAME, version)
    assert rollback(client, NAME).version == "2"
    assert rolled_back(client, NAME, five, "champion").to == "2"
    assert rollback(client, NAME, reason="also bad").version == "1"
    with pytest.raises(WorkflowError, match="no version of shapes was @champion before version 1"):
        rollback(client, NAME)
    assert holder(client, NAME, "champion") == "1"
    promote(client, NAME, five)
    assert rolled_back(client, NAME, five, "champion") is None
    assert rollback(client, NAME).version == "1"
    assert show_model(client, NAME)["moves"][4]["why"] == "also bad"


def test_a_deleted_version_is_passed_over_and_aliases_have_their_own_history(client, storage):
    five = add_version(client, NAME, str(storage), {"overall": 0.95}, GATE)
    for version in ("1", "2", five):
        promote(client, NAME, version)
    promote(client, NAME, "2", "candidate")
    client.delete_model_version(NAME, "2")
    assert rollback(client, NAME).version == "1"
    with pytest.raises(WorkflowError, match="nothing to roll back from"):
        rollback(client, NAME, "candidate")  # went with its version


def test_a_move_by_other_means_is_part_of_the_history(client):
    promote(client, NAME, "1")
    client.set_registered_model_alias(NAME, "champion", "3")  # as MLflow's page does
    assert rollback(client, NAME).version == "1"


KILLED = """
import os, signal, sys
from pathlib import Path
from workflows.registry import promote
from workflows.tracking.tracker import connect

for folder, write, when in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    child = os.fork()
    if child == 0:
        client = connect(Path(folder))
        real = getattr(client, write)
        def killed(*arguments):
            if when == "after":
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(client, write, killed)
        promote(client, "shapes", "2")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_killed_between_any_two_writes_the_next_command_finds_it_in_order(client, storage, monkeypatch):
    """The writes of a promotion: the claim, the move in the history, the alias."""
    promote(client, NAME, "1")
    cases = {
        "claimed": ("set_registered_model_tag", "after", "1"),
        "announced": ("set_registered_model_alias", "before", "1"),
        "made": ("set_registered_model_alias", "after", "2"),
    }
    arguments = []
    for case, (write, when, _) in cases.items():
        (storage / case).mkdir()
        (storage / case / "mlflow.db").write_bytes((storage / "mlflow.db").read_bytes())
        arguments += [str(storage / case), write, when]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=240, check=True)
    monkeypatch.setattr("workflows.registry.claim.EXPIRES", 0.5)  # of the claims that were left behind
    for case, (_, _, held) in cases.items():
        after = connect(storage / case)
        assert any("claim" in tag for tag in after.get_registered_model(NAME).tags), case
        assert holder(after, NAME, "champion") == held, case
        assert promote(after, NAME, "2").holds, case
        assert rollback(after, NAME).version == "1", case
        with pytest.raises(WorkflowError, match="before version 1"):
            rollback(after, NAME)
        assert not any("claim" in tag for tag in after.get_registered_model(NAME).tags), case


def test_two_who_promote_at_once_go_one_after_the_other(client, storage):
    """Each sees the other's result: with a margin of 0 the worse one cannot win whatever the order."""
    gate = Gate(margin={"overall": 0.0})
    scores = [0.51, 0.52, 0.53, 0.54]
    versions = [add_version(client, "race", str(storage), {"overall": score}, gate) for score in scores]
    results = {}

    def run(version):
        results[version] = promote(connect(storage), "race", version)

    threads = [threading.Thread(target=run, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert holder(client, "race", "champion") == versions[-1]
    moves = show_model(client, "race")["moves"]
    assert [move["was"] for move in moves] == [None, *(move["to"] for move in moves[:-1])]
    assert [m["to"] for m in moves] == sorted((m["to"] for m in moves), key=int)
    assert {version for version, result in results.items() if result.moved} == {move["to"] for move in moves}
    assert not [tag for tag in client.get_registered_model("race").tags if "claim" in tag]


def test_a_claim_holds_others_back_until_it_is_given_up_or_expires(client):
    refused = pytest.raises(WorkflowError, match=r"shapes@champion is being moved by .*@")
    with claim(client, NAME, "champion"), refused, claim(client, NAME, "champion", wait=0):
        pass
    with claim(client, NAME, "champion", wait=0), claim(client, NAME, "candidate", wait=0):
        pass
    old = time.time_ns() - int((EXPIRES + 5) * 1e9)
    client.set_registered_model_tag(NAME, f"mlmamba.claim.champion.{old:020d}-dead", "{}")
    with claim(client, NAME, "champion", wait=0):
        pass
    assert not [tag for tag in client.get_registered_model(NAME).tags if "claim" in tag]


def test_the_command_line_moves_and_shows(client, storage, capsys):
    code, done, _ = cli(storage, capsys, "promote", f"{NAME}/1", "--reason", "first")
    assert (code, done["moved"], done["previous"]) == (0, True, None)
    code, done, _ = cli(storage, capsys, "promote", f"models:/{NAME}/4")
    assert (code, done["holds"], len(done["gate_failures"])) == (1, False, 2)
    code, done, _ = cli(storage, capsys, "promote", f"{NAME}/2", "--alias", "candidate")
    assert (code, done["alias"]) == (0, "candidate")
    code, done, _ = cli(storage, capsys, "promote", f"{NAME}@candidate")
    assert (done["version"], done["moved"]) == ("2", True)
    code, done, _ = cli(storage, capsys, "rollback", NAME)
    assert (code, done["version"], done["previous"]) == (0, "1", "2")
    _, rows, _ = cli(storage, capsys, "list")
    assert [row["aliases"] for row in rows] == [["champion"], ["candidate"], [], []]
    _, shown, _ = cli(storage, capsys, "show", NAME)
    assert [(move["kind"], move["to"]) for move in shown["moves"]] == [
        ("promote", "1"),
        ("promote", "2"),
        ("promote", "2"),
        ("rollback", "1"),
    ]
    _, shown, _ = cli(storage, capsys, "show", f"{NAME}@champion")
    assert (shown["version"], shown["scores"], shown["gate"]["least"]) == ("1", {"overall": 0.8}, {"overall": 0.5})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "circles"], 1, "there is no model circles .* registered: shapes"),
        (["promote", f"{NAME}/9"], 1, "model shapes has no version 9; it has 1, 2, 3, 4"),
        (["lineage", f"{NAME}@champion"], 1, r"model shapes has no alias @champion; it has @best \(version 2\)"),
        (["promote", NAME], 2, "say which version, as shapes/VERSION or shapes@ALIAS"),
        (["promote", "a/b/c"], 2, "write NAME, NAME/VERSION"),
        (["promote", f"{NAME}/1", "--force"], 2, "--force needs --reason TEXT"),
        (["promote"], 2, "models promote needs a model"),
        (["list", NAME], 2, "models show shapes"),
        (["rollback", f"{NAME}/2"], 2, "the version follows from history"),
        (["rollback", "circles"], 1, "there is no model circles"),
        (["show", NAME, "--force"], 2, "models show takes no --force"),
    ],
)
def test_errors_name_what_there_is(client, storage, capsys, arguments, code, message):
    client.set_registered_model_alias(NAME, "best", "2")
    assert main(["models", *arguments, "--storage", str(storage)]) == code
    error = capsys.readouterr().err
    assert re.search(message, error), error


NOT_OURS = [
    "",
    "{",
    "null",
    "5",
    "[]",
    '{"overall": "high"}',
    "\x1b[31mred",
    "[" * 3000,
    '{"alias": 1}',
    "\ud83d".encode("utf-8", "replace").decode(),
]


@pytest.mark.parametrize("value", NOT_OURS, ids=range(len(NOT_OURS)))
def test_whatever_one_tag_says_listing_showing_and_rolling_back_work(client, storage, capsys, value):
    """The emergency brake must hold: a tag can be anybody's."""
    for version in ("1", "2"):
        promote(client, NAME, version)
    for tag in ("scores", "gate", "forced.champion", "refused"):
        client.set_model_version_tag(NAME, "2", f"mlmamba.{tag}", value)
    client.set_registered_model_tag(NAME, "mlmamba.move.champion.99999999999999999999", value)
    client.set_registered_model_tag(NAME, "mlmamba.claim.champion.x", value)
    for arguments in (["list"], ["show", NAME], ["show", f"{NAME}/2"]):
        assert main(["models", *arguments, "--storage", str(storage)]) == 0
        out = capsys.readouterr().out
        assert (
            "unreadable: mlmamba.gate" in out
            or "mlmamba.gate cannot be read" in out
            or "unreadable: mlmamba.scores" in out
        )
        assert "\x1b" not in out
    code, done, _ = cli(storage, capsys, "promote", f"{NAME}/2", "--alias", "candidate")
    assert (code, done["moved"]) == (1, False)
    assert "the tag mlmamba." in done["gate_failures"][0]
    code, done, _ = cli(storage, capsys, "rollback", NAME)
    assert (code, done["version"], holder(client, NAME, "champion")) == (0, "1", "1")


def test_a_version_whose_files_are_gone_or_not_ours_says_so(client, storage):
    with pytest.raises(WorkflowError, match="not a model that mlmamba registered"):
        resolve_model(f"models:/{NAME}/1", storage)
    gone = add_version(client, NAME, str(storage / "nowhere"))
    with pytest.raises(WorkflowError, match="its files are not at"):
        resolve_model(f"models:/{NAME}/{gone}", storage)


def test_a_package_cannot_point_outside_of_itself(client, storage):
    package = storage / "package"
    package.mkdir()
    (package / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n"
        "    artifacts: {model: {path: ../../../etc, uri: x}}\n"
    )
    version = add_version(client, NAME, str(package))
    with pytest.raises(WorkflowError, match="outside of it"):
        resolve_model(f"models:/{NAME}/{version}", storage)


def test_text_for_a_person(client, storage, capsys):
    for arguments in (["promote", f"{NAME}/2"], ["promote", f"{NAME}/4", "--force", "--reason", "why not"]):
        assert main(["models", *arguments, "--storage", str(storage)]) == 0
    assert "the gate was passed over:" in capsys.readouterr().out
    assert main(["models", "promote", f"{NAME}/3", "--storage", str(storage), "--alias", "champion"]) == 0
    main(["models", "rollback", NAME, "--storage", str(storage)])
    assert "shapes/4 is now @champion (was version 3)" in capsys.readouterr().out
    main(["models", "show", NAME, "--storage", str(storage)])
    text = capsys.readouterr().out
    assert "rollback @champion to 4 (was 3)" in text
    assert "FORCED: why not" in text
    main(["models", "lineage", f"{NAME}/4", "--storage", str(storage)])
    text = capsys.readouterr().out
    assert "forced   @champion" in text
    assert "not recorded" in text


@pytest.mark.parametrize("name", ["a b", "größer  2", "it's", "[x]", "a-1-0123456789"])
def test_a_name_that_others_gave_a_model_works_in_every_command(storage, client, capsys, name):
    for _ in range(2):
        add_version(client, name, str(storage), {"overall": 0.8}, GATE)
    assert cli(storage, capsys, "promote", f"{name}/1")[1]["moved"]
    assert cli(storage, capsys, "promote", f"models:/{name}/2")[1]["previous"] == "1"
    assert cli(storage, capsys, "show", name)[1]["aliases"] == {"champion": "2"}
    assert cli(storage, capsys, "rollback", name)[1]["version"] == "1"
    assert str(get_version(client, f"{name}@champion").version) == "1"
    assert name in {row["name"] for row in cli(storage, capsys, "list")[1]}


@pytest.mark.parametrize(
    "reference", [" a/1", "a /1", " ", "", "a\nb/1", "a\x1b[2J/1", "a/b", "a:b/1", "a/٣", "a@b@c", "a/1/2"]
)
def test_what_is_no_name_is_refused(storage, capsys, reference):
    code, _, told = cli(storage, capsys, "promote", reference)
    assert code == 2
    assert "is not a registered model" in told


@pytest.mark.parametrize("name", ["a b", " a", "a/b", "a'b", ""])
def test_a_recipe_names_its_model_without_spaces(name):
    with pytest.raises(UsageError, match=r"register_as\.name: .*(should match pattern|at least)"):
        load_recipe("quickstart", [f'register_as.name="{name}"'])
