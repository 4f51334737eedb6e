"""The first script of a submitted job: looks whether the cluster can run the workflow, then runs it.

It runs on whatever Python the cluster's head has, before any package is known to be there: standard library only, and
nothing that a Python older than the project's cannot read.
"""

import json
import os
import runpy
import sys
from importlib import metadata


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "submission.json")) as file:
        wanted = json.load(file)
    version = sys.version.split()[0]
    if sys.version_info < tuple(int(part) for part in wanted["python"].split(".")):
        stop(
            f"the cluster's head runs Python {version} ({sys.executable}), this code needs {wanted['python']} or "
            "newer: choose another with --python, or change the cluster's image"
        )
    missing, others = look(wanted["packages"])
    if missing:
        stop(
            f"the cluster's head lacks {', '.join(missing)} in {sys.executable} (Python {version}): install the "
            "project's packages in the cluster's image, or choose another Python with --python"
        )
    if others:
        say(f"note: the cluster has other versions than the client: {', '.join(others)}")
    os.environ.setdefault("MLMAMBA_GIT", wanted["git"])
    sys.path[0] = os.path.dirname(here)  # the shipped code comes before an installed one
    runpy.run_module("workflows.__main__", run_name="__main__")


def look(packages: dict) -> tuple:
    """Names of packages that are not installed, and those of another version, as text."""
    missing, others = [], []
    for name in sorted(packages):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != packages[name]:
            others.append(f"{name} {found} (client: {packages[name]})")
    return missing, others


def say(text: str) -> None:
    print(f"mlmamba: {text}", file=sys.stderr, flush=True)


def stop(text: str) -> None:
    say(text)
    sys.exit(1)


if __name__ == "__main__":
    main()
