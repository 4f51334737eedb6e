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

from docs.generate.schema import anchor

ROOT = Path(__file__).parents[2]
LANGUAGES = ("sh", "python", "yaml", "text", "json", "mermaid")
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run|file: (?P<file>\S+)) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_INDENTED = re.compile(r"(?:^|\n\n)((?:    .*(?:\n|$)|\n(?=    ))+)")
_LINK = re.compile(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)")
_COMMAND = re.compile(
    r"^(\.venv/bin/)?(mlmamba|make|python|pip|pytest|mlflow|ray|export|pre-commit|curl|docker|kubectl|"
    r"cluster/docker/build\.sh) "
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


STORY = ("docs/tutorial.md", "README.md", "docs/how-to/resume.md", "docs/how-to/roll-back.md")
"""Pages whose commands tests/integration/test_docs_story.py runs first, in this order, on one storage."""
NOT_RUN = {
    "make quickstart": "makes an environment of 7 GB; the story runs its last line, `mlmamba run quickstart`",
    "make": "what runs these tests, and the lines of the Makefile that make their environment",
    "export MAMBA_FORCE_BUILD": "the line after it is run by `make kernels`, into a folder of its own",
    "pip install": "tests/integration/test_cluster_install.py installs the package in an environment of its own",
    "pytest": "these tests",
    "python -m tests.benchmarks": "figures for people, minutes long; tests run their parts small",
    "python -m docs.generate": "writes into this folder; tests/unit/docs/test_reference.py runs it on another",
    "mlmamba submit": "tests/integration/test_submit_cluster.py runs it on a cluster of its own",
    "mlmamba reshard": "tests/integration/test_train_reshard.py reshards checkpoints of its own",
    "ray drain-node": "drains the node that it runs on; test_train_elastic.py drains nodes of its own by the same call",
    "export RAY_ADDRESS": "would join whatever cluster runs on the machine; the line after it is run without",
    "cluster/docker/build.sh": "no container engine; test_container_images.py runs it up to the engine",
    "kubectl": "no cluster; tests/unit/cluster/test_kubernetes.py builds the folders and checks the labels",
}
"""Commands that no test runs as they stand on a page, by how they begin, and what is tested in their place."""


def lines(block: Block) -> list[str]:
    """The lines of a shell block that are commands, as they stand there."""
    every = (line.strip() for line in block.text.replace("\\\n", " ").splitlines())
    return [line.removeprefix(".venv/bin/") for line in every if line and not line.startswith("#")]


def not_run(line: str) -> str | None:
    """Why no test runs a command, or None when one does."""
    return next((reason for start, reason in NOT_RUN.items() if line.startswith(start)), None)


def story() -> list[tuple[Block, str]]:
    """Every command that the story runs, in its order, with its block."""
    first = [ROOT / page for page in STORY]
    return [
        (block, line)
        for page in [*first, *(page for page in pages() if page not in first)]
        for block in blocks(page)
        if block.language == "sh" and not block.run
        for line in lines(block)
        if not_run(line) is None
    ]
