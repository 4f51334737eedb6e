"""The files that travel with a submitted workflow: what is chosen of the working folder, what stays and why, the zip.

Everyone who may use the cluster can read them, so no secret travels, and nothing that a link fetches from outside the
folder. Private keys, passwords and tokens are known by their names or by what stands in them, whatever their place or
the case of their names. Hidden files stay anyway; their names are here for `ray up`, whose manifests leave out the
same.
"""

import fnmatch
import os
import re
import stat
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import workflows
from workflows.console import printable
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
_TOLD = 12
"""Names, of what travels and of what stays, that are told before a job is sent; `--dry-run` tells all."""


@dataclass(frozen=True)
class Kept:
    """A file or folder that stays here."""

    name: str
    reason: str
    """Why, after its name."""
    size: int = 0
    """Bytes of one that is too large."""

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


@dataclass
class Package:
    """A zip file, what is in it and what is not."""

    file: Path
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file in it."""
    kept: list[Kept] = field(default_factory=list)
    size: int = 0
    """Bytes of the zip."""

    def describe(self) -> str:
        """One line for a person."""
        return f"{len(self.sizes):,} files, {mebibytes(self.size)} zipped"

    def travelling(self, every: bool = False) -> list[str]:
        """A line for each folder and file at the top of the zip, the largest first; or for every file."""
        if every:
            return [f"{printable(name)} ({mebibytes(size)})" for name, size in sorted(self.sizes.items())]
        sizes, files = Counter(), Counter()
        for name, size in self.sizes.items():
            top, *inside = name.split("/", 1)
            sizes[top + "/" * bool(inside)] += size
            files[top + "/" * bool(inside)] += 1
        lines = [
            f"{printable(top)} ({f'{files[top]:,} files, ' * top.endswith('/')}{mebibytes(size)})"
            for top, size in sizes.most_common()
        ]
        return _first(lines)

    def staying(self, every: bool = False) -> list[str]:
        """A line for each file or folder that stays here, with the reason; secrets first."""
        lines = [str(one) for one in sorted(self.kept, key=lambda one: ("secret" not in one.reason, -one.size))]
        return lines if every else _first(lines)


def pack(out: Path, folder: Path, storage: str, made: dict[str, str], excludes: list[str]) -> Package:
    """Write the zip.

    Args:
        out: where.
        folder: the working folder.
        storage: the workflow's storage, which does not travel if it lies within.
        made: text files for the job, by name within `JOB_FOLDER`.
        excludes: more names or patterns of the working folder that stay here.

    Raises:
        UsageError: it would be too large, or the working folder has too many files or one that cannot be read.
    """
    package = Package(out)
    chosen: dict[str, bytes] = {}
    for name, path in _listed(folder, [*SKIPPED, *excludes], package.kept):
        content = _take(name, path, folder, Path(storage), [*SKIPPED, *excludes])
        if isinstance(content, Kept):
            package.kept.append(content)
            continue
        chosen[name] = content
        if len(chosen) > MOST_FILES:
            raise UsageError(
                f"{folder} has over {MOST_FILES:,} files: start in the project's folder, or --exclude some"
            )
    for name in PACKAGES:  # last: a folder called workflows of another project does not stand in for ours
        for inside, path in _all_files(CODE / name, SKIPPED, []):
            if secret_name(inside) is None:
                chosen[f"{name}/{inside}"] = path.read_bytes()
    package.kept = [one for one in package.kept if one.name not in chosen]
    chosen |= {f"{JOB_FOLDER}/{name}": text.encode() for name, text in made.items()}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(chosen):
            archive.writestr(_entry(name), chosen[name])
    package.sizes = {name: len(content) for name, content in chosen.items()}
    package.size = out.stat().st_size
    if package.size > MOST:
        raise UsageError(
            f"the working folder {folder} is {mebibytes(package.size)} zipped, a job takes {mebibytes(MOST)}; largest: "
            f"{', '.join(package.travelling()[:5])}. --exclude what the workflow does not need, and put data where the "
            "cluster sees it"
        )
    return package


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 100 << 10 else f"{size / 2**10:.1f} KiB"


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - _TOLD
    return lines if more <= 0 else [*lines[:_TOLD], f"and {more:,} more, which --dry-run lists"]


def _take(name: str, path: Path, folder: Path, storage: Path, patterns: list[str]) -> bytes | Kept:
    """The content of a file that may travel, or why it stays."""
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        return Kept(name, "a link out of the folder")
    if real.is_relative_to(storage):
        return Kept(name, "in the storage")
    inside = real.relative_to(folder.resolve()).as_posix()  # a link is what it leads to
    for each in dict.fromkeys((name, inside)):
        if reason := _stays(each, patterns):
            return Kept(name, reason if each == name else f"a link to {inside}: {reason}")
    try:
        with open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                return Kept(name, "neither a file nor a folder" if not real.is_dir() else "a link to a folder")
            if state.st_size > LARGEST:
                return Kept(name, f"{mebibytes(state.st_size)}, over {mebibytes(LARGEST)}", state.st_size)
            content = file.read(LARGEST + 1)
    except FileNotFoundError:  # git still lists a file that was deleted, and a link may lead nowhere
        return Kept(name, "not there")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; --exclude it, or make it readable") from error
    if reason := secret_content(content):
        return Kept(name, f"secret: it {reason}")
    return content


def _stays(name: str, patterns: list[str]) -> str | None:
    """Why a file or folder stays, from its path below the working folder alone."""
    if reason := secret_name(name):
        return f"secret: {reason}"
    parts = name.split("/")
    beginnings = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    if any(part.startswith(".") for part in parts):
        return "hidden"
    for pattern in patterns:
        for part, beginning in zip(parts, beginnings, strict=True):
            if fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(beginning, pattern.rstrip("/")):
                return f"excluded by {pattern}"
    return None


def _listed(folder: Path, patterns: list[str], kept: list[Kept]) -> Iterator[tuple[str, Path]]:
    """Name below `folder` and path of each file that is looked at; what git ignores is not."""
    listed = _git_files(folder)
    if listed is None:
        yield from _all_files(folder, patterns, kept)
    else:
        yield from listed


def _git_files(folder: Path) -> list[tuple[str, Path]] | None:
    """Files that git has or would take, or None outside a checkout."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = {os.fsdecode(name) for name in out.split(b"\0") if name}
    return [(name, folder / name) for name in sorted(names)]


def _all_files(folder: Path, patterns: list[str] | tuple[str, ...], kept: list[Kept]) -> Iterator[tuple[str, Path]]:
    """As `_listed` where there is no git. Folders that stay are entered in `kept` and not gone into."""
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        for name in sorted(folders):
            below = (inside / name).as_posix()
            if Path(root, name).is_symlink():
                kept.append(Kept(below, "a link to a folder"))
            elif reason := _stays(below, list(patterns)):
                kept.append(Kept(below, reason))
            else:
                continue
            folders.remove(name)
        folders.sort()
        for name in sorted(names):
            below = (inside / name).as_posix()
            if reason := _stays(below, list(patterns)):
                kept.append(Kept(below, reason))
            else:
                yield below, Path(root, name)


def _entry(name: str) -> zipfile.ZipInfo:
    """Of one date and mode, so that equal content is an equal zip."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
    return entry


SECRET_NAMES = {
    "a private key": [
        *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "id_xmss*", "*_rsa", "*_dsa", "*_ecdsa", "*_ed25519"),
        *("*.pem", "*.key", "*.p12", "*.pfx", "*.p8", "*.ppk", "*.jks", "*.keystore", "*.kdbx", ".ssh", ".gnupg"),
    ],
    "the access to a cluster": ["kubeconfig", "kubeconfig.*", "kubeconfig-*", "*.kubeconfig", ".kube"],
    "credentials": [
        *("credentials", "credentials.*", "*credentials.json", "*credentials.csv", "*_accessKeys.csv"),
        *("client_secret*", "*service[-_]account*.json", ".aws", ".gcloud", ".azure", ".boto"),
        *(".git-credentials", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", "htpasswd", ".docker"),
        *("auth_token", "token", "token.txt", "*.token", "kaggle.json", "rclone.conf", ".s3cfg", "*.tfstate*"),
        "*.tfvars",
    ],
    "secrets": [
        *(".env", ".env.*", "*.env", "*.env.*", "secret", "secrets", "secret.txt", "secrets.txt"),
        *(f"*{name}.{end}" for name in ("secret", "secrets") for end in ("yaml", "yml", "json", "toml", "ini", "conf")),
    ],
}
"""Names or patterns of files and folders by what they hold."""
_PUBLIC = (".pub", ".example", ".sample", ".template")
"""Ends of names of public halves of keys and of files to be filled in, which are no secrets."""
_CONTENTS = {
    "holds a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:\\r|\\n|\s)+[A-Za-z0-9+/=]{6}",
    "holds a key of a cluster": rb"client-key-data:\s*[\"']?[A-Za-z0-9+/=]{16}",
    "holds a key of an object store": rb"(?i)aws_secret_access_key[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/]{30}",
    "holds a password in a URI of an object store": rb"\b(?:s3|s3a|gs|abfss?)://[^\s:/@\"']+:[^\s@\"']+@",
    "is a key file of PuTTY": rb"\APuTTY-User-Key-File-",
}
_PATTERNS = [(kind, pattern.lower()) for kind, patterns in SECRET_NAMES.items() for pattern in patterns]
_READERS = [(kind, re.compile(pattern)) for kind, pattern in _CONTENTS.items()]


def secret_name(path: str) -> str | None:
    """What a file holds by the names in its path, `/` between them, or None where they say nothing of a secret."""
    for part in path.lower().split("/"):
        if part.endswith(_PUBLIC):
            continue
        for kind, pattern in _PATTERNS:
            if fnmatch.fnmatchcase(part, pattern):
                return f"{part} is named like {kind}"
    return None


def secret_content(content: bytes) -> str | None:
    """What secret stands in a file, or None."""
    return next((kind for kind, pattern in _READERS if pattern.search(content)), None)
