"""The bodies of responses, whole and as events of a stream, in OpenAI's form."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

from workflows.registry import ResolvedModel
from workflows.serve.generation import Answer, Delta, TokenLogprob

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI sends this


def model_id(source: ResolvedModel) -> str:
    """The name under which clients ask for a model; stays the same from version to version."""
    return source.name or source.folder.name


def model_entry(source: ResolvedModel, since: int, name: str | None = None) -> dict[str, Any]:
    """An entry of /v1/models."""
    entry = {"id": name or model_id(source), "object": "model", "created": since, "owned_by": "mlmamba"}
    return entry | {"version": source.version, "run_id": source.run_id, "label": source.label}


class Completion:
    """One chat completion: what its response, or every event of its stream, has in common.

    `system_fingerprint` is the label (name/version) of the model that answers.
    """

    def __init__(self, source: ResolvedModel, reports: bool):
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._source, self._reports = source, reports

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """The response body. finish_reason is "stop" where the model or a stop string ended the answer, "length" where
        max_tokens did."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs or ()),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self._common("chat.completion") | {"choices": choices, "usage": usage(answers)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first event of a choice."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """An event with more of a choice."""
        return self._chunk(index, {"content": delta.text}, None, delta.logprobs)

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """The last event of a choice."""
        return self._chunk(index, {}, answer.finish_reason)

    def totals(self, answers: list[Answer]) -> dict[str, Any]:
        """The last event of a stream with `include_usage`."""
        return self._common("chat.completion.chunk") | {"choices": [], "usage": usage(answers)}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, reports: Iterable[TokenLogprob] = ()
    ) -> dict[str, Any]:
        logprobs = self._logprobs(reports) if reports else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._common("chat.completion.chunk") | {"choices": [choice]}

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": model_id(self._source),
            "system_fingerprint": self._source.label,
        }

    def _logprobs(self, reports: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._reports:
            return None
        entries = []
        for report in reports:
            top = [_entry(data, logprob) for data, logprob in report.top]
            entries.append(_entry(report.data, report.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}


def usage(answers: list[Answer]) -> dict[str, int]:
    """Token counts of the answers to one prompt; a picture counts with all its placeholders, an answer with its end."""
    prompt, made = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    token = data.decode("utf-8", "replace")
    return {"token": token, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}
