"""One line of JSON for each request, without what was asked or answered."""

import json
import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflows.serve.transport import routed_path

if TYPE_CHECKING:
    from workflows.serve.service import Conversation, Served

LOGGER = "mlmamba.requests"
_PATHS = ("/", "/healthz", "/readyz", "/openapi.json", "/v1/models", "/v1/chat/completions", "/webhooks/mlflow")
"""Paths that are written down; others could say anything."""
_QUIET = ("/healthz", "/readyz")  # asked every few seconds


@dataclass
class Record:
    """What is remembered about a request until its end."""

    client: str
    """Whose turn it is when several wait: a digest of the API key, or the address where there are no keys."""
    conversation: "Conversation | None" = None

    @property
    def served(self) -> "Served | None":
        """The model that answers it, once that is decided."""
        return None if self.conversation is None else self.conversation.served


class RequestLog:
    """Writes to the logger `mlmamba.requests`, which goes to stderr unless it was set up otherwise."""

    def __init__(self):
        self._logger = logging.getLogger(LOGGER)
        if not self._logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(handler)
            self._logger.propagate = False
            self._logger.setLevel(logging.INFO)

    def write(self, record: Record, scope: dict, status: int, seconds: float, version: str) -> None:
        """Write a request's line. `status` is 499 where the client left before an answer."""
        path = routed_path(scope)
        path = path if path in _PATHS else "other"
        if path in _QUIET and status == 200:
            return
        line = {
            "time": round(time.time(), 3),
            "event": "request",
            "method": scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            "version": version,
        }
        if record.conversation is not None:
            line |= _details(record.conversation)
        self._logger.info(json.dumps(line))


def _details(conversation: "Conversation") -> dict:
    answers = conversation.answers
    details = {"id": conversation.id, "stream": conversation.streams, "images": conversation.images}
    if not answers:
        return details | {"finish_reason": None}
    first = answers[0]
    return details | {
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
        "finish_reason": first.finish_reason,
        "queue_seconds": round(first.timing.queued, 4),
        "first_token_seconds": round(first.timing.first_token, 4),
    }
