"""The pages: links lead somewhere, commands are commands, code is code, recipes load. What is run is in
tests/integration/test_docs_commands.py.
"""

import os
import re
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml

from pipelines.config import DataConfig
from pipelines.source_config import SourceConfig
from tests.helpers.documents import (
    LANGUAGES,
    NOT_RUN,
    ROOT,
    Block,
    blocks,
    commands,
    headings,
    lines,
    links,
    not_run,
    pages,
    story,
)
from tests.helpers.manifests import objects
from workflows.cli import parse
from workflows.errors import UsageError
from workflows.recipe.load import load_any

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
BLOCKS = [block for page in pages() for block in blocks(page)]
COMMANDS = [
    pytest.param(block, words, id=f"{block.page.name}: {' '.join(words)[:70]}")
    for block in BLOCKS
    if block.language == "sh"
    for words in commands(block)
]
ELSEWHERE = {"curl", "docker", "helm"}
"""Tools that this project does not install: there is nothing to check their arguments with."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    broken = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (part and part not in headings(file)):
            broken.append(target)
    assert not broken


def test_the_index_leads_to_every_page():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert not {page for page in index.parent.rglob("*.md") if page != index} - linked


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_a_block_is_what_it_says(block):
    assert block.language in LANGUAGES, "say the language of the block"
    if block.language == "python":
        compile(block.text, block.id, "exec")
    if block.language == "yaml":
        assert yaml.safe_load(block.text)


def test_every_command_is_run_by_a_test_or_has_a_reason_not_to_be():
    told = {line for _, line in story()}
    every = [line for block in BLOCKS if block.language == "sh" and not block.run for line in lines(block)]
    assert not [line for line in every if line not in told and not_run(line) is None]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in every)], "reasons left over"
    for reason in NOT_RUN.values():
        assert not [name for name in re.findall(r"tests/\S+?\.py", reason) if not (ROOT / name).exists()]


def test_the_sources_of_the_page_are_ones_that_there_are():
    """The YAML that is no file's is the data part of a recipe, less what its text is not about."""
    page = ROOT / "docs" / "how-to" / "own-corpus.md"
    (block,) = [block for block in blocks(page) if block.language == "yaml" and not block.file]
    content = yaml.safe_load(block.text)["data"] | {"tokenizer": {"name": "x"}, "max_tokens": 4096}
    config = DataConfig.model_validate(content)
    table = set(re.findall(r"^\| `(\w+)` \|", page.read_text(), re.M))
    assert {source.type for source in (*config.train, *config.test)} <= table
    assert table == {
        get_args(model.model_fields["type"].annotation)[0] for model in get_args(get_args(SourceConfig)[0])
    }


@pytest.mark.parametrize(("block", "words"), COMMANDS)
def test_a_command_is_one_that_there_is(block, words, tmp_path, monkeypatch):
    name, *rest = words
    name = name.removeprefix(".venv/bin/")
    if name in ELSEWHERE:
        return
    assert name in _CHECKS, f"{name} is no command that the pages may name without a check"
    _write_files(block, tmp_path)
    monkeypatch.chdir(tmp_path)
    _CHECKS[name](rest)


def _write_files(block: Block, folder) -> None:
    """The files that the block's page has described."""
    for other in blocks(block.page):
        if other.file and other.language == "yaml":
            (folder / other.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / other.file).write_text(other.text)


def _mlmamba(words: list[str]) -> None:
    words = [*_without_metavariables(words)]
    arguments = parse(words)
    if getattr(arguments, "recipe", None):
        load_any(arguments.recipe, getattr(arguments, "set", []))


def _without_metavariables(words: list[str]):
    """Words in capitals stand for something of the reader's own."""
    for word in words:
        yield "quickstart" if word == "RECIPE" else word


def _make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    assert targets
    assert set(targets) <= MAKE


def _python(words: list[str]) -> None:
    assert words[0] == "-m"
    spec = find_spec(words[1])
    if spec is None:  # a file that the page tells the reader to write
        assert words[1] in {_module(block.file) for block in BLOCKS if block.file}
        return
    source = (ROOT / os.path.relpath(spec.origin, ROOT)).read_text()
    if spec.submodule_search_locations:
        source = find_spec(f"{words[1]}.__main__").loader.get_source(f"{words[1]}.__main__")
    assert not [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]


def _module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = {name for word in words for part in re.findall(r"\[(.*?)\]", word) for name in part.split(",")}
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).exists()


def _pytest(words: list[str]) -> None:
    assert not [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
    markers = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    used = re.findall(r"\w+", words[words.index("-m") + 1]) if "-m" in words else []
    assert set(used) - {"not", "and", "or"} <= markers


def _click(module: str, attribute: str):
    """A check by the parser of a command that is made with click; nothing is run."""

    def check(words: list[str]) -> None:
        from importlib import import_module

        group = getattr(import_module(module), attribute)
        name, command, rest = group.resolve_command(group.make_context(attribute, [*words]), [*words])
        command.make_context(name, rest)

    return check


def _export(words: list[str]) -> None:
    assert all(re.fullmatch(r"[A-Z_]+=.*", word) for word in words)


def _build(words: list[str]) -> None:
    assert [word for word in words if (ROOT / "cluster" / "docker" / f"Dockerfile.{word}").exists()] == words


def _kubectl(words: list[str]) -> None:
    if words[0] != "apply":
        return
    folder = Path(words[words.index("-k") + 1])
    made = objects(str(folder.relative_to("cluster")))
    if "-l" in words:
        key, _, value = words[words.index("-l") + 1].partition("=")
        assert [o for o in made if o["metadata"].get("labels", {}).get(key) == value], "nothing has this label"


_CHECKS = {
    "cluster/docker/build.sh": _build,
    "kubectl": _kubectl,
    "mlmamba": _mlmamba,
    "make": _make,
    "python": _python,
    "pip": _pip,
    "pytest": _pytest,
    "mlflow": _click("mlflow.cli", "cli"),
    "ray": _click("ray.scripts.scripts", "cli"),
    "export": _export,
}


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        ("mlmamba", ["run", "quickstart", "--stages", "full"], SystemExit),
        ("mlmamba", ["run", "quickstart", "--set", "train.worker=1"], UsageError),
        ("make", ["quickstrat"], AssertionError),
        ("python", ["-m", "tests.benchmarks.measurements.mamba2", "--compiled"], AssertionError),
        ("python", ["-m", "tests.benchmarks.mamba3"], AssertionError),
        ("pip", ["install", ".[gpus]"], AssertionError),
        ("pytest", ["tests/unit/test_none.py"], AssertionError),
        ("pytest", ["-m", "not slwo"], AssertionError),
        ("mlflow", ["ui", "--backend-store", "x"], click.UsageError),
        ("ray", ["strat"], click.UsageError),
        ("export", ["path"], AssertionError),
        ("cluster/docker/build.sh", ["tpu"], AssertionError),
        ("kubectl", ["apply", "-k", "cluster/kuberay", "-l", "app.kubernetes.io/component=trian"], AssertionError),
    ],
)
def test_a_wrong_command_is_found(name, words, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        _CHECKS[name](words)


def test_every_recipe_in_the_readme_is_shipped():
    names = re.findall(r"mlmamba (?:run|prepare|train) ([a-z][\w/-]+)", (ROOT / "README.md").read_text())
    assert names
    for name in names:
        load_any(name)


def test_the_commit_hooks_are_those_of_the_lint_target():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}, "a hook from elsewhere would be fetched from the network"
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert all(" ".join(entry.split()[:2]) in lint for entry in entries)
    assert shutil.which("ruff") or find_spec("ruff")


def test_a_field_that_a_page_names_exists():
    """`data.x`, `train.x` and the like in code marks are fields of the recipe."""
    from docs.generate.schema import reachable
    from workflows.recipe.schema import Recipe

    known = {place: set(model.model_fields) for model, places in reachable(Recipe).items() for place in places}
    known["train.stages"] = known["train.stages[]"]
    unknown = []
    for page in pages():
        if "reference" in page.parts:
            continue
        text = page.read_text()
        for name in re.findall(r"`((?:data|model|train|evaluate|register_as)(?:\.[a-z_]+)+)`", text):
            parent, _, field = name.rpartition(".")
            if field not in known.get(parent, known.get(f"{parent}[]", set())):
                unknown.append(f"{page.name}: {name}")
    assert not unknown
