"""A client that waits for a service that is not there for a moment: a replica was killed, or is being replaced.

Asking again is safe: a chat completion changes nothing, and a greedy or seeded one gives the same answer each time.
"""

import random
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar

from workflows.serve.client import ServiceError, request

T = TypeVar("T")
_AGAIN = (408, 429, 500, 502, 503)  # not 504: what took too long would take too long again
_LONGEST = 10.0  # seconds between two tries


def ask_again(call: Callable[[], T], patience: float = 120, on_retry: Callable[[Exception], None] | None = None) -> T:
    """The result of `call`, tried again while the service cannot answer.

    Args:
        call: asks once; raises ServiceError, or OSError or HTTPException when the connection fails.
        patience: seconds after which the last error is raised.
        on_retry: told about each error that is tried again.

    Raises:
        ServiceError, OSError, HTTPException: an error that asking again does not mend, or patience has run out.
    """
    end = time.monotonic() + patience
    pause = 0.1
    while True:
        try:
            return call()
        except (ServiceError, OSError, HTTPException) as error:
            mends = not isinstance(error, ServiceError) or error.status in _AGAIN
            wait = random.uniform(0.5, 1) * pause
            if not mends or time.monotonic() + wait > end:
                raise
            if on_retry is not None:
                on_retry(error)
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST)


def request_again(url: str, path: str, body: Any = None, patience: float = 120, timeout: float = 300) -> dict:
    """`request` of workflows/serve/client.py, patiently."""
    return ask_again(lambda: request(url, path, body, timeout), patience)
