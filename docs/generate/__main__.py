"""`python -m docs.generate` writes docs/reference; `--check` only says which pages are out of date (exit 1).

Nothing on these pages is written by hand: change the string under a recipe's field, or the help of an argument, and
run this again. tests/unit/docs/test_reference.py fails until it has been.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs.generate.pages import command_page, http_page, recipe_page
from docs.generate.sizing import sizing_page
from pipelines.storage import write_atomic

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "recipe.md": recipe_page,
    "cli.md": command_page,
    "http.md": http_page,
    "sizing.md": sizing_page,
}


def out_of_date(folder: Path = FOLDER) -> list[str]:
    """Names of the pages that are missing or differ from what the code gives now."""
    return [name for name, page in PAGES.items() if _read(folder / name) != page()]


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or check them. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    check = parser.parse_args(argv).check
    old = out_of_date()
    for name in old:
        if not check:
            write_atomic(FOLDER / name, PAGES[name]())
        print(f"{name}: {'out of date, run python -m docs.generate' if check else 'written'}")
    return int(check and bool(old))


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


if __name__ == "__main__":
    sys.exit(main())
