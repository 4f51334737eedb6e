"""The order of the rooms inside workflows/, and that no two files of the product import each other in a circle.

Imports inside functions count as well, so that a circle cannot hide in one.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import workflows

ROOT = Path(workflows.__file__).parents[1]
ROOMS = (
    "errors",
    "console",
    "runtime",
    "recipe",
    "storage",
    "tracking",
    "train",
    "plan",
    "registry",
    "evaluate",
    "preflight",
    "rerun",
    "run",
    "serve",
    "submit",
    "verbs",
    "cli",
    "__main__",
)
"""From the bottom up: each imports only from those before it."""


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    files = [file for package in ("mlmamba", "pipelines", "workflows") for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules among `known` that a file imports, anywhere in it. Packages' own __init__ files are left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known.keys()


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_list_names_every_room():
    found = {room(name) for name in modules() if name.startswith("workflows.") and room(name) != "__init__"}
    assert found == set(ROOMS)


def test_each_room_imports_only_from_rooms_below_it():
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, file in known.items()
        if name.startswith("workflows.") and room(name) in ROOMS
        for other in imports(file, known)
        if other.startswith("workflows.") and ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    known = {name: file for name, file in modules().items() if not name.endswith("__init__")}
    try:
        TopologicalSorter({name: imports(file, known) - {name} for name, file in known.items()}).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
