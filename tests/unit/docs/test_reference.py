"""docs/reference is what the typed recipe, the parsers and the request schema give now, and says all of it."""

import re
from typing import Literal

import pytest
from pydantic import Field

from docs.generate.__main__ import FOLDER, PAGES, main, out_of_date
from docs.generate.schema import anchor, reachable, section, table
from pipelines.config import StrictModel
from workflows.cli import VERBS, parse
from workflows.cli import main as run_command
from workflows.recipe.schema import Recipe


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_the_generated_one(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "run python -m docs.generate"


def test_a_page_that_differs_or_is_missing_is_out_of_date(tmp_path):
    assert out_of_date(tmp_path) == [*PAGES]
    for name, page in PAGES.items():
        (tmp_path / name).write_text(page())
    assert out_of_date(tmp_path) == []
    (tmp_path / "cli.md").write_text("edited by hand")
    assert out_of_date(tmp_path) == ["cli.md"]


def test_the_check_writes_nothing_and_tells(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("docs.generate.__main__.FOLDER", tmp_path)
    monkeypatch.setattr("docs.generate.__main__.out_of_date", lambda: out_of_date(tmp_path))
    assert main(["--check"]) == 1
    assert not list(tmp_path.iterdir())
    assert "cli.md: out of date" in capsys.readouterr().out
    assert main([]) == 0
    assert main(["--check"]) == 0


@pytest.mark.parametrize("model", reachable(Recipe), ids=lambda model: model.__name__)
def test_every_field_of_a_recipe_is_explained(model):
    assert not [name for name, field in model.model_fields.items() if not (field.description or "").strip()]
    heading = f"\n## {model.__name__}\n"
    text = (FOLDER / "recipe.md").read_text()
    assert heading in text
    own = text.split(heading)[1].split("\n## ")[0]
    missing = [name for name in model.model_fields if name in model.__annotations__ and f"| `{name}` |" not in own]
    assert not missing


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_the_help_is_on_the_page(verb, capsys):
    with pytest.raises(SystemExit):
        parse([verb, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help", "--json"}
    text = (FOLDER / "cli.md").read_text()
    own = text.split(f"\n## mlmamba {verb}\n")[1]
    assert not [option for option in options if option not in own]


def test_the_sizing_page_has_what_the_commands_print(capsys):
    """The page calls the verbs; here the command line is run as a person would."""
    text = (FOLDER / "sizing.md").read_text()
    command = re.search(r"^mlmamba (prepare paper --dry-run --storage /storage)$", text, re.M)[1]
    assert run_command(command.split()) == 0
    assert f"```text\n{capsys.readouterr().out}```" in text


class _Part(StrictModel):
    """A part."""

    kind: Literal["a", "b|c"] = "a"
    """Which."""


class _Whole(StrictModel):
    """A whole."""

    parts: list[_Part] = Field(min_length=1)
    """Its parts."""
    share: float | None = Field(None, gt=0, le=1)
    """How much."""


def test_a_model_becomes_a_table_of_types_limits_and_defaults():
    assert reachable(_Whole) == {_Whole: [], _Part: ["parts[]"]}
    assert section(_Whole).splitlines()[4:] == [
        "| field | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `parts` | list of [_Part](#_part), 1 or longer | required | Its parts. |",
        "| `share` | number, more than 0, at most 1 | none | How much. |",
    ]
    assert "| `kind` | one of `a`, `b\\|c` | `a` | Which. |" in section(_Part, "At `parts[]`.")


def test_anchors_are_those_of_the_hosting_sites():
    assert anchor("mlmamba run: what `it` does") == "mlmamba-run-what-it-does"
    assert table(["a"], [["b\nc"]]).splitlines()[-1] == "| b c |"
