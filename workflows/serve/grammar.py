"""Grammars of answers: which tokens may come at each step, by llguidance. structured.py makes their text from requests.

A grammar is compiled once per tokenizer and form. Compiling takes whatever time and memory a schema asks for and cannot
be stopped, so it is tried in a process of its own first, under limits; what passes there is compiled here. Shapes: n
rows, V vocabulary.
"""

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Of one grammar and step; all are counts of work, so that the same request is answered alike on every machine.
_PARSER = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_MOST_SECONDS = 1.0  # of CPU that the masks of one answer may take; those of a common schema take 0.03 ms a token
_TRIAL_SECONDS, _TRIAL_BYTES, _TRIAL_WAIT = 2, 64 << 20, 20
_KEPT = 32  # grammars


class GrammarError(ValueError):
    """A form that no answer can be made in. `param` is the field of the request that is meant."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Form:
    """The form of an answer, as the text of a grammar, and the field of the request that gave it."""

    grammar: str
    param: str = field(compare=False)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one model, as the compiler knows them, and what it must not choose."""

    compiled: Any
    special: Tensor
    """Tokens that are no text, bool (V,): the end tokens, the placeholder of images, and whatever else is a mark."""
    special_but_ends: Tensor
    of_byte: dict[int, int]
    """A token for each byte that text in UTF-8 consists of."""


class Matcher:
    """Where one answer is in its grammar. Used by the engine's thread alone.

    Attributes:
        error: why no token was allowed at the last step, where that is the grammar's fault.
    """

    def __init__(self, matcher, vocabulary: Vocabulary):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._spent = 0.0
        self.error: GrammarError | None = None

    @property
    def accepts(self) -> bool:
        """Whether the answer may end here."""
        return self.error is None and self._matcher.is_accepting()

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool (V,); none after an error."""
        began = time.thread_time()
        bias = bytearray(self._matcher.compute_logit_bias())
        try:
            self._check(began)
        except GrammarError as error:
            self.error = error
            return torch.zeros_like(self._vocabulary.special)
        known = self._vocabulary
        tokens = torch.frombuffer(bias, dtype=torch.uint8) != 0
        tokens &= ~(known.special_but_ends if self._matcher.is_accepting() else known.special)
        # Text that must come is given as the tokenizer would read it, so "<|endoftext|>" in a schema as the end token.
        if not tokens.any() and (forced := self._matcher.compute_ff_bytes()):
            tokens[known.of_byte[forced[0]]] = True
        return tokens

    def take(self, token: int) -> bool:
        """Take an allowed token. Returns whether the answer is whole: nothing may follow. Raises GrammarError."""
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._check(began)
        return self._matcher.is_stopped()

    def _check(self, began: float) -> None:
        self._spent += time.thread_time() - began
        if self._matcher.is_error():
            raise GrammarError(f"the form became too complex on the way ({_first_line(self._matcher.get_error())})")
        if self._spent > _MOST_SECONDS:
            raise GrammarError(f"the form took over {_MOST_SECONDS:g} s of work for one answer; simplify it")


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled form; each answer has a matcher of its own."""

    compiled: Any
    vocabulary: Vocabulary

    def matcher(self) -> Matcher:
        """One that stands at the beginning of an answer."""
        return Matcher(self.compiled.deep_copy(), self.vocabulary)


class Grammars:
    """Compiled forms of one model, the least recently used given up first. `compile` may be called from any thread.

    Args:
        tokenizer: the model's, a fast one.
        size: V, the columns of its logits.
        ends: its end tokens. No other special token is ever allowed, nor is the placeholder of images.
    """

    def __init__(self, tokenizer, size: int, ends: list[int]):
        self._given = tokenizer, size, [token for token in ends if 0 <= token < size]
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._known: OrderedDict[Form, Grammar] = OrderedDict()

    def find(self, form: Form) -> Grammar | None:
        """A form that was compiled already, else None."""
        with self._lock:
            if (found := self._known.get(form)) is not None:
                self._known.move_to_end(form)
            return found

    def compile(self, form: Form) -> Grammar:
        """Compile a form, or find it compiled.

        Raises:
            GrammarError: it is wrong, cannot be satisfied, needs what the compiler has not, or takes too much.
        """
        if (found := self.find(form)) is not None:
            return found
        vocabulary = self._read_vocabulary(form.param)
        if problem := _trials.problem(form.grammar):
            raise GrammarError(f"{form.param}: it cannot be used: {problem}", form.param)
        made = Grammar(self._compile(form, vocabulary), vocabulary)
        with self._lock:
            self._known[form] = made
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return made

    def _compile(self, form: Form, vocabulary: Vocabulary) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(vocabulary.compiled, form.grammar, log_level=0, limits=LLParserLimits(**_PARSER))
        first = matcher.deep_copy()
        first.compute_logit_bias()  # some limits are met at the first step
        for one in (matcher, first):
            if one.is_error():
                raise GrammarError(f"{form.param}: it cannot be used: {_first_line(one.get_error())}", form.param)
        return matcher

    def _read_vocabulary(self, param: str) -> Vocabulary:
        """The vocabulary in the compiler's form, made once: it takes 0.3 s for the 50,000 tokens of GPT-NeoX."""
        with self._preparing:
            if self._vocabulary is not None:
                return self._vocabulary
            from llguidance.hf import from_tokenizer

            tokenizer, size, ends = self._given
            try:
                compiled = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends or None)
            except ValueError as error:
                raise GrammarError(f"{param}: not available with this model's tokenizer ({error})", param) from error
            special = [compiled.is_special_token(token) for token in range(size)]
            written = {compiled.decode_bytes([token]): token for token, mark in enumerate(special) if not mark}
            if missing := [byte for byte in _BYTES if bytes([byte]) not in written]:
                reason = f"no token for the byte {missing[0]:#04x}"
                raise GrammarError(f"{param}: not available, as this model's tokenizer has {reason}", param)
            inner = [mark and token not in ends for token, mark in enumerate(special)]
            of_byte = {byte: written[bytes([byte])] for byte in _BYTES}
            self._vocabulary = Vocabulary(compiled, torch.tensor(special), torch.tensor(inner), of_byte)
            return self._vocabulary


def restrict(logits: Tensor, matchers: list[Matcher | None]) -> Tensor:
    """Logits (n, V) with -inf where a row's grammar does not allow the token; the same tensor where no row has one."""
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return logits
    allowed = torch.stack([matchers[row].allowed() for row in rows])
    limited = logits.clone()
    limited[rows] = logits[rows].masked_fill(~allowed.to(logits.device), float("-inf"))
    return limited


# A schema of a hundred bytes can ask for gigabytes (two `multipleOf` in an `allOf`), and a failed allocation ends the
# process. The vocabulary of bytes is enough to see it: what a grammar costs hardly depends on it. Some limits are met
# only on the way, so some tokens are taken as well. Each grammar is tried in a fork of one process, which starts once.
_TRIALS = """
import json, os, random, resource, signal, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
limits, seconds, room, wait = json.loads(sys.argv[1])
vocabulary = LLTokenizer("byte")
pages = int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 2**18

def attempt(grammar):
    for name, most in (("CORE", 0), ("CPU", seconds), ("AS", pages * resource.getpagesize() + room)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    signal.alarm(wait)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(**limits))
    draw = random.Random(0)
    for _ in range(64):
        tokens = [token for token, value in enumerate(matcher.compute_logit_bias()[:256]) if value]
        if matcher.is_error() or not tokens:
            break
        matcher.consume_token(draw.choice(tokens))
    return matcher.get_error() if matcher.is_error() else ""

for line in sys.stdin:
    out, into = os.pipe()
    if not os.fork():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(into, json.dumps(attempt(json.loads(line))[:4000]).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        answer = pipe.read()
    os.wait()
    print(answer or "null", flush=True)
"""


class _Trials:
    """Says what is wrong with a grammar, found in a process that may die of it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def problem(self, grammar: str) -> str | None:
        """What is wrong, None where nothing is. Raises OSError or ValueError where it cannot be found out."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                given = json.dumps([_PARSER, _TRIAL_SECONDS, _TRIAL_BYTES, _TRIAL_WAIT])
                command = [sys.executable, "-P", "-c", _TRIALS, given]  # it ends with its standard input
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            print(json.dumps(grammar), file=self._process.stdin, flush=True)
            found = json.loads(self._process.stdout.readline())
        return _TOO_MUCH if found is None else _first_line(found) or None


_trials = _Trials()
_TOO_MUCH = f"compiling it takes over {_TRIAL_SECONDS} s or {_TRIAL_BYTES >> 20} MiB; simplify it"


def _first_line(error: str) -> str:
    """What llguidance says, without where in the text of our grammar it found it."""
    line = next(iter(error.strip().splitlines()), "")
    line = line.partition("failed to compile JSON schema: ")[2] or line
    return line[:300]


_BYTES = [0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF5)]
"""Those of which text in UTF-8 consists."""
