"""Errors that a person can act on: the command line prints their message alone, without a traceback."""

import re

_TWO_STOPS = re.compile(r"""(?<=[\w)\]'"`>])\.(?:\.(?=\s|$)|(?=;\s))""")


def one_stop(text: str) -> str:
    """A message that goes on after another's full stop ("... refused.. Run again", "... refused.; and") with one mark.

    Three full stops, and paths that begin with two, stay.
    """
    return _TWO_STOPS.sub(lambda found: found[0][:-1], text)


class _Told(Exception):
    def __str__(self) -> str:
        return one_stop(super().__str__())


class UsageError(_Told):
    """The command or the recipe is wrong; nothing was started. Exit code 2."""


class WorkflowError(_Told):
    """The work was started and could not be finished. Exit code 1."""
