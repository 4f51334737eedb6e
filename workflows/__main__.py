"""The job: the same command as on a laptop, its result on one marked line that the client tells from progress."""

import json
import os
import sys

from workflows.submit.log import result_prefix


def main(argv: list[str]) -> int:
    """Run a command line. Returns its exit code."""
    from workflows.cli import execute, parse
    from workflows.runtime import quiet_libraries

    quiet_libraries()
    code, result = execute(parse(argv))
    if result is not None:
        print(result_prefix(os.environ) + json.dumps(result), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
