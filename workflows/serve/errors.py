"""Errors that a client sees, in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

import traceback


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what is wrong and what to do about it.
        param: the field of the request that is meant, such as `messages[1].content`.
        code: short stable name of the error.
        retry_after: seconds after which to try again.
        extra: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        extra: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.extra = extra or {}

    @property
    def type(self) -> str:
        """OpenAI's name for the kind of error, from the status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict:
        """The response body."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers beside it."""
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**retry, **self.extra}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param, code)


def without_message(error: BaseException) -> str:
    """An error for the log: its type and where it was raised. Its message could repeat what was asked."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
