"""What travels to the cluster: this code, the recipe, and the small files of the working folder, as one zip.

The code is that of the client's own packages, so the cluster runs what the client has, whatever is installed there. Of
the working folder travels what git would take, or else everything, but never: names that begin with a dot (.git, .venv,
.env), the storage folder, caches, files over `LARGEST`, and what the user excludes. The same content gives the same zip
to the byte, which the cluster then has already.
"""

import fnmatch
import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import workflows
from workflows.errors import UsageError

CODE = Path(workflows.__file__).parent.parent
PACKAGES = ("mlmamba", "pipelines", "workflows")
SKIPPED = ("storage", "__pycache__", "node_modules", "build", "dist", "venv", "mlruns", "*.egg-info", "*.pyc")
LARGEST = 10 << 20
"""Bytes of a file of the working folder; larger ones stay here."""
MOST = 90 << 20
"""Bytes of the zip: Ray's job server takes 100 MiB."""
MOST_FILES = 20_000
JOB_FOLDER = "_job"
"""Folder within the zip of what is made for the job: the recipe, its first script, what it has to check."""


@dataclass
class Package:
    """A zip file and what is in it."""

    file: Path
    files: int = 0
    size: int = 0
    """Bytes of the zip."""
    left: dict[str, int] = field(default_factory=dict)
    """Files of the working folder that were too large to travel, with their bytes."""

    def describe(self) -> str:
        """One line for a person."""
        text = f"{self.files:,} files, {mebibytes(self.size)} zipped"
        largest = sorted(self.left.items(), key=lambda item: -item[1])[:5]
        left = ", ".join(f"{name} ({mebibytes(size)})" for name, size in largest)
        return text + (f"; {len(self.left)} large files stay here: {left}" if left else "")


def pack(out: Path, folder: Path, storage: str, made: dict[str, str], excludes: list[str]) -> Package:
    """Write the zip.

    Args:
        out: where.
        folder: the working folder.
        storage: the workflow's storage, which does not travel if it lies within.
        made: text files for the job, by name within `JOB_FOLDER`.
        excludes: more names or patterns of the working folder that stay here.

    Raises:
        UsageError: it would be too large, or the working folder has too many files.
    """
    chosen: dict[str, Path] = {}
    package = Package(out)
    for name, path in _working_files(folder, Path(storage), excludes):
        if len(chosen) >= MOST_FILES:
            raise UsageError(
                f"{folder} has over {MOST_FILES:,} files: start in the project's folder, or --exclude some"
            )
        size = path.stat().st_size
        if size > LARGEST:
            package.left[name] = size
        else:
            chosen[name] = path
    for name in PACKAGES:  # last: a folder called workflows of another project does not stand in for ours
        chosen |= {f"{name}/{inside}": path for inside, path in _all_files(CODE / name)}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(chosen):
            archive.writestr(_entry(name), chosen[name].read_bytes())
        for name in sorted(made):
            archive.writestr(_entry(f"{JOB_FOLDER}/{name}"), made[name].encode())
    package.files, package.size = len(chosen) + len(made), out.stat().st_size
    if package.size > MOST:
        raise UsageError(
            f"the working folder {folder} is {mebibytes(package.size)} zipped, a job takes {mebibytes(MOST)}; largest: "
            f"{_largest(chosen)}. --exclude what the workflow does not need, and put data where the cluster sees it"
        )
    return package


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _working_files(folder: Path, storage: Path, excludes: list[str]) -> Iterator[tuple[str, Path]]:
    """Name below `folder` and path of each file that may travel."""
    patterns = [*SKIPPED, *excludes]
    listed = _git_files(folder)
    for name, path in _all_files(folder, patterns) if listed is None else listed:
        parts = Path(name).parts
        beginnings = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(_matches(part, beginning, patterns) for part, beginning in zip(parts, beginnings, strict=True)):
            continue
        if path.is_file() and not path.resolve().is_relative_to(storage):
            yield name, path


def _matches(part: str, beginning: str, patterns: list[str] | tuple[str, ...]) -> bool:
    """Whether a file or folder stays: `part` is its name, `beginning` its path below the working folder."""
    if part.startswith("."):
        return True
    return any(fnmatch.fnmatch(part, p) or fnmatch.fnmatch(beginning, p.rstrip("/")) for p in patterns)


def _git_files(folder: Path) -> list[tuple[str, Path]] | None:
    """Files that git has or would take, or None outside a checkout."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = {os.fsdecode(name) for name in out.split(b"\0") if name}
    return [(name, folder / name) for name in sorted(names)]


def _all_files(folder: Path, patterns: list[str] | tuple[str, ...] = SKIPPED) -> Iterator[tuple[str, Path]]:
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        folders[:] = sorted(f for f in folders if not _matches(f, (inside / f).as_posix(), patterns))
        for name in sorted(names):
            if not _matches(name, (inside / name).as_posix(), patterns):
                yield (inside / name).as_posix(), Path(root, name)


def _entry(name: str) -> zipfile.ZipInfo:
    """Of one date and mode, so that equal content is an equal zip."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
    return entry


def _largest(chosen: dict[str, Path]) -> str:
    """The five largest top folders or files."""
    sizes = Counter()
    for name, path in chosen.items():
        sizes[Path(name).parts[0]] += path.stat().st_size
    return ", ".join(f"{name} ({mebibytes(size)})" for name, size in sizes.most_common(5))
