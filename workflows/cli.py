"""The `mlmamba` command: one flat table of verbs, each a thin call (workflows/verbs).

Results go to stdout (JSON with --json), progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 bad usage or
recipe. Heavy libraries are imported by the verb that needs them, so that --help is quick.
"""

import argparse
import gc
import json
import os
import sys
import threading
from contextlib import suppress

from workflows.errors import UsageError, WorkflowError
from workflows.runtime import quiet_libraries
from workflows.verbs.evaluate import EVALUATE
from workflows.verbs.models import MODELS
from workflows.verbs.serve import CHAT, SERVE
from workflows.verbs.submit import SUBMIT
from workflows.verbs.tools import CONVERT, DATA, DOCTOR
from workflows.verbs.verb import Verb
from workflows.verbs.workflow import PREPARE, RESHARD, RUN, TRAIN

VERBS: dict[str, Verb] = {
    "run": RUN,
    "prepare": PREPARE,
    "data": DATA,
    "train": TRAIN,
    "reshard": RESHARD,
    "evaluate": EVALUATE,
    "models": MODELS,
    "serve": SERVE,
    "chat": CHAT,
    "submit": SUBMIT,
    "convert": CONVERT,
    "doctor": DOCTOR,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and print its result. Returns the exit code."""
    quiet_libraries()
    arguments = parse(argv)
    code, result = execute(arguments)
    if result is None:
        return code
    if arguments.json:
        print(json.dumps(without_text(result), indent=2))
    else:
        print(result["text"])
    return code


def execute(arguments: argparse.Namespace) -> tuple[int, dict | list | None]:
    """Run a verb. Returns the exit code and the result; errors are told on stderr and have none."""
    gc.set_threshold(
        100_000, 20, 20
    )  # a fifth of importing torch and its like is looking for garbage that is not there
    try:
        result = arguments.run(arguments)
    except UsageError as error:
        print(f"mlmamba: {error}", file=sys.stderr)
        return 2, None
    except WorkflowError as error:
        print(f"mlmamba: {error}", file=sys.stderr)
        return 1, None
    except (KeyboardInterrupt, SystemExit):  # the latter: Ray Train's answer to Ctrl-C
        print("\nmlmamba: stopped; run the same command again to go on", file=sys.stderr, flush=True)
        if any(thread.name == "workers" and thread.is_alive() for thread in threading.enumerate()):
            # Of train/trainer.py. It is within Ray, where Ray's and Python's own clean-up would crash.
            import psutil

            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(1)
        return 1, None
    failed = isinstance(result, dict) and result.pop("failed", False)
    return int(bool(failed)), result


def without_text(result: dict | list) -> dict | list:
    """The result for machines: without the text for a person."""
    return {k: v for k, v in result.items() if k != "text"} if isinstance(result, dict) else result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line; a wrong one ends the process with code 2, as argparse does."""
    parser = argparse.ArgumentParser(prog="mlmamba", description="ML-Mamba from corpus to served model, on Ray.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.run.__doc__, description=verb.run.__doc__)
        verb.arguments(sub)
        sub.add_argument("--json", action="store_true", help="machine-readable result on stdout")
        sub.set_defaults(run=verb.run)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
