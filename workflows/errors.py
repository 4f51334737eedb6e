"""Errors that a person can act on: the command line prints their message alone, without a traceback."""


class UsageError(Exception):
    """The command or the recipe is wrong; nothing was started. Exit code 2."""


class WorkflowError(Exception):
    """The work was started and could not be finished. Exit code 1."""
