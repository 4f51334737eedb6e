"""What starting costs: CPU seconds of the whole process tree of a tiny workflow, before and after a change.

    python -m tests.benchmarks.measurements.start --before COMMIT [--rounds 3]

The commit is checked out beside, and both run in turns: the tiny workflow of the tests into a fresh storage (all of it,
and up to the first step that is logged), the same again with nothing left to do, and the commands that need no torch.
CPU seconds, not time: most of a small run is importing, in a dozen processes at once, and the machine may do other
things. Counted by looking at the tree every 50 ms, so a process loses what it did after the last look.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe

FIRST_STEP = "   step "


class Tree:
    """A command that runs, and the CPU seconds of all processes that it ever had.

    Attributes:
        first: CPU seconds when the first line of stderr that begins so appeared.
    """

    def __init__(self, command: list[str], root: Path, mark: str = FIRST_STEP):
        self._seen: dict[psutil.Process, float] = {}
        self.first: float | None = None
        environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
        environment |= {"PYTHONPATH": str(root)}
        self._process = psutil.Popen(
            command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._mark, self._said = mark, []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stderr:
            self._said.append(line)
            if self.first is None and line.startswith(self._mark):
                self.first = self.used()

    def used(self) -> float:
        """CPU seconds until now."""
        return sum(self._seen.values())

    def wait(self) -> float:
        """CPU seconds of all, when the command and what it left behind have ended."""
        while self._look() or self._process.poll() is None:
            time.sleep(0.05)
        self._reader.join(5)
        if self._process.returncode:
            raise SystemExit("".join(self._said[-20:]))
        return self.used()

    def _look(self) -> bool:
        """Take the times of all processes there are. Returns whether any is left."""
        alive = False
        known = [process for process in self._seen if process.is_running()]
        for process in {self._process, *known}:
            try:
                family = [process, *process.children(recursive=True)]
            except psutil.Error:
                continue
            for member in family:
                try:
                    times = member.cpu_times()
                    alive |= member.status() != psutil.STATUS_ZOMBIE
                except psutil.Error:
                    continue
                key = psutil.Process(member.pid) if member is self._process else member
                self._seen[key] = max(self._seen.get(key, 0.0), times.user + times.system)
        return alive


def measure(root: Path, recipe_file: Path, storage: Path) -> dict[str, float]:
    """CPU seconds of each kind of start, of the code in `root`."""
    mlmamba = [sys.executable, "-m", "workflows.cli"]
    run = [*mlmamba, "run", str(recipe_file), "--storage", str(storage)]
    tree = Tree(run, root)
    found = {"tiny workflow": tree.wait(), "to the first step": tree.first}
    found["rerun"] = Tree(run, root).wait()
    found["models list"] = Tree([*mlmamba, "models", "list", "--storage", str(storage)], root).wait()
    found["doctor"] = Tree([*mlmamba, "doctor"], root).wait()
    found["--help"] = Tree([*mlmamba, "--help"], root).wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, metavar="COMMIT", help="what to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    here = Path(__file__).parents[3]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        before = work / "before"
        subprocess.run(["git", "-C", str(here), "worktree", "add", "-q", "--detach", str(before), a.before], check=True)
        try:
            write_corpus(work / "corpus")
            file = write_recipe(work / "tiny.yaml", recipe(work / "corpus"))
            rounds = []
            for number in range(a.rounds):
                rounds.append([measure(root, file, work / f"{name}-{number}") for name, root in
                               (("old", before), ("new", here))])  # fmt: skip
        finally:
            subprocess.run(["git", "-C", str(here), "worktree", "remove", "--force", str(before)], check=True)
    print(f"{'CPU s':<20}{'before':>8}{'after':>8}{'ratio':>8}   (medians of {a.rounds} rounds)")
    for name in rounds[0][0]:
        old, new = (statistics.median(pair[i][name] for pair in rounds) for i in (0, 1))
        ratio = statistics.median(pair[1][name] / pair[0][name] for pair in rounds)
        print(f"{name:<20}{old:>8.2f}{new:>8.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
