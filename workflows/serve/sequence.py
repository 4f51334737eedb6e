"""One request on its way through the engine: waiting, being read, being answered, and its end."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

from workflows.serve.detokenize import TextStream, TokenText
from workflows.serve.grammar import GrammarError, Matcher
from workflows.serve.metrics import Metrics
from workflows.serve.reading import Reading
from workflows.serve.sampling import Answer, Delta, FinishReason, Prompt, Settings, Timing, TokenLogprob, generator_of


class DeadlineExceeded(Exception):
    """The answer was not finished in time."""

    def __init__(self, seconds: float, tokens: int):
        done = f"{tokens} tokens of the answer were made" if tokens else "the answer was not begun"
        super().__init__(f"the answer took longer than this server's {seconds:g} s ({done}); ask for fewer tokens")


class NoNumbers(Exception):
    """The model's output is not finite: its weights or its precision are at fault."""

    def __init__(self):
        super().__init__("the model's output is not a number")


class Sequence:
    """One request.

    The future stays cancellable to the end: the engine looks at it before each step and gives up a cancelled request.

    Args:
        reading: of the prompt; shared with other answers to it.
        settings: how to answer.
        text: of the model's tokenizer.
        deadline: seconds that the answer may take from now on.
        on_delta: called in the engine's thread with each piece of the answer, before the future is done.
        client: who asks.
    """

    def __init__(
        self,
        reading: Reading,
        settings: Settings,
        text: TokenText,
        deadline: float,
        on_delta: Callable[[Delta], None] | None = None,
        client: str = "",
    ):
        self.reading, self.settings, self.client = reading, settings, client
        self.future: Future[Answer] = Future()
        self._left = False  # whether it needs its reading no longer
        self.ids: list[int] = []
        self.fed = 0  # of these, tokens that the state in its slot has read
        self.generator = generator_of(settings)
        self.matcher: Matcher | None = settings.grammar and settings.grammar.matcher()
        self.metrics: Metrics | None = None  # as they were when it came: a version's trial is not counted as its work
        self.began: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.answered = False
        self.arrived = time.monotonic()
        self._text, self._stream = text, TextStream(text, settings.stop)
        self._deadline, self._on_delta = deadline, on_delta
        self._parts: list[str] = []
        self._reports: list[TokenLogprob] = []
        self._starts: list[int] = []  # where in the text the token of each report begins
        self._reported = 0

    @property
    def prompt(self) -> Prompt:
        """What is asked."""
        return self.reading.prompt

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do: answered, failed or given up by the client."""
        return self.ended is not None or self.future.done()

    def leave_reading(self) -> None:
        """Its prompt is read and the state in a slot, or it has ended before."""
        if not self._left:
            self._left = True
            self.reading.leave()

    def check_deadline(self, now: float) -> None:
        """Fail if there is no time left."""
        if now - self.arrived > self._deadline:
            self.fail(DeadlineExceeded(self._deadline, len(self.ids)))

    def take(self, token: int | None, report: TokenLogprob | None, is_end: bool) -> None:
        """The next token of the answer, None where the model gave no number or its grammar allows no token; its report,
        if one was asked for; and whether it is an end token."""
        if token is None:
            self._without_token()
            return
        if self.first is None:
            self.first = time.monotonic()
        self.ids.append(token)
        reason: FinishReason | None = None
        if is_end:
            reason = "stop"
        else:
            if report is not None:
                self._reports.append(report)
                self._starts.append(self._stream.length)
            self._stream.push(token)
            try:
                whole = self.matcher is not None and self.matcher.take(token)
            except GrammarError as error:
                self.fail(error)
                return
            if self._stream.stopped or whole:
                reason = "stop"
            elif len(self.ids) >= self.settings.max_tokens:
                reason = "length"
        self._show(final=reason is not None)
        if reason is not None:
            self._finish(reason)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._end(lambda: self.future.set_exception(error))

    def _without_token(self) -> None:
        """End, as no token was chosen: whole where the answer may end here and the model has no token to say so."""
        if self.matcher is None:
            self.fail(NoNumbers())
        elif self.matcher.accepts:
            self._show(final=True)
            self._finish("stop")
        else:
            self.fail(self.matcher.error or NoNumbers())

    def _show(self, final: bool) -> None:
        if not final and self._on_delta is None and not self.settings.stop:
            return  # nobody looks before the end
        text = self._stream.take(final)
        first = self._reported
        while self._reported < len(self._starts) and self._starts[self._reported] < self._stream.shown:
            self._reported += 1
        reports = tuple(self._reports[first : self._reported])
        if text:
            self._parts.append(text)
        if self._on_delta is not None and (text or reports):
            try:
                self._on_delta(Delta(text, reports))
            except RuntimeError:  # the event loop that listened is closed: nobody is there any more
                self.future.cancel()

    def _finish(self, reason: FinishReason) -> None:
        now = time.monotonic()
        timing = Timing((self.began or now) - self.arrived, (self.first or now) - self.arrived, now - self.arrived)
        answer = Answer(
            "".join(self._parts),
            reason,
            len(self.prompt.input_ids),
            len(self.ids),
            tuple(self.ids),
            tuple(self._reports[: self._reported]) if self.settings.logprobs is not None else None,
            timing,
            self.reading.cached,
        )
        self._end(lambda: self.future.set_result(answer))
        self.answered = True

    def _end(self, settle: Callable[[], None]) -> None:
        if self.ended is None:
            self.ended = time.monotonic()
            self.leave_reading()
            with contextlib.suppress(InvalidStateError):  # cancelled at this moment
                settle()
