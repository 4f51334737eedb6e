"""The documentation as the tests see it: blocks of code, the commands in them, headings and links.

A fenced block says its language. A comment line right before a block says what the tests do with it beyond checking it:

    <!-- run -->            it is run, in a folder of the page's own
    <!-- file: PATH -->     it is the content of this file there

Blocks that are only indented (the README has them) are commands, Python, YAML or output, by their first line.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from workflows.reference.markdown import anchor

ROOT = Path(__file__).parent.parent
LANGUAGES = ("sh", "python", "yaml", "text", "json")
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run|file: (?P<file>\S+)) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_INDENTED = re.compile(r"(?:^|\n\n)((?:    .*(?:\n|$)|\n(?=    ))+)")
_LINK = re.compile(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)")
_COMMAND = re.compile(
    r"^(\.venv/bin/)?(mlmamba|make|python|pip|pytest|mlflow|ray|export|pre-commit|curl|docker|kubectl) "
)


@dataclass(frozen=True)
class Block:
    """One block of code in a page."""

    page: Path
    language: str
    text: str
    run: bool = False
    file: str | None = None
    """The file that it is the content of."""

    @property
    def id(self) -> str:
        """For a test's name."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.text.strip().splitlines()[0][:50]}"


def pages() -> list[Path]:
    """Every page that is written for people."""
    found = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("notebooks/*.md"),
        *ROOT.glob("cluster/**/*.md"),
    ]
    return sorted([*found, ROOT / "tests" / "benchmarks" / "README.md"])


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        found.append(
            Block(page, match["language"], match["text"], match["mark"] == "run", match["file"])  # "" has no language
        )
    for match in _INDENTED.finditer(_FENCE.sub("", text)):
        content = "\n".join(line.removeprefix("    ") for line in match[1].strip("\n").splitlines())
        found.append(Block(page, _guess(content), content))
    return found


def _guess(text: str) -> str:
    first = text.strip().splitlines()[0]
    if _COMMAND.match(first + " "):
        return "sh"
    if re.match(r"(from \S+ )?import ", first):
        return "python"
    return "yaml" if re.match(r"\w+:$", first) else "text"


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as words; lines that end in a backslash go on, comments are left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)) for line in re.findall(r"^#+ +(.*)$", text, re.M)}


def links(page: Path) -> list[str]:
    """The targets of a page's links, those within code left out."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", text))
