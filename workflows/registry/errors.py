"""MLflow's errors as messages for a person, and which of them mean that the registry cannot be reached."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException

from workflows.errors import WorkflowError

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter: no such alias, or version "abc"


class RegistryUnreachable(WorkflowError):
    """The registry does not answer; what it holds is unknown."""


def absent(error: MlflowException) -> bool:
    """Whether the registry answered that there is no such thing."""
    return error.error_code in _ABSENT


def registry_address() -> str:
    """Where the registry is, without a password."""
    return re.sub(r"//[^/@]*@", "//", mlflow.get_registry_uri())


@contextmanager
def reachable() -> Iterator[None]:
    """Turn MLflow's failures to reach the registry into RegistryUnreachable; "no such thing" passes as it is."""
    try:
        yield
    except MlflowException as error:
        if absent(error):
            raise
        reason = re.sub(r"//[^/@\s]*@", "//", str(error)).strip().splitlines()[0][:300]
        raise RegistryUnreachable(f"the registry at {registry_address()} does not answer: {reason}") from error
