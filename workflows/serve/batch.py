"""Continuous batching for a recurrent model: sequences join and leave the running batch between two steps.

A step encodes some images, reads one piece of some prompts (reading.py), and gives every running answer its next token.
Each part is bounded, so a long prompt delays running answers by one piece at most. Padding is masked and rows do not
see each other, so a greedy answer is the same as for its prompt alone, apart from rounding. `Decoder` holds the
recurrent states.
"""

import logging

import torch
from torch import Tensor

from mlmamba.decoding import Decoder, Tokens
from mlmamba.state_pool import StatePool
from workflows.serve.detokenize import TokenText
from workflows.serve.grammar import restrict
from workflows.serve.openai import without_message
from workflows.serve.options import Limits
from workflows.serve.reading import Reader
from workflows.serve.sampling import TokenLogprob, choose, draw_of, log_probabilities
from workflows.serve.sequence import Sequence

logger = logging.getLogger(__name__)
Pick = tuple[int | None, TokenLogprob | None, bool]  # token, its report, whether it is an end token


class Batch:
    """The sequences in work: `reading` their prompts, or `running`, in the order of the slots.

    Args:
        model: in evaluation mode, on its device.
        text: of its tokenizer.
        limits: the sizes of batch and pieces.
    """

    def __init__(self, model, text: TokenText, limits: Limits):
        self.reading: list[Sequence] = []
        self.running: list[Sequence] = []
        self._ended: list[Sequence] = []
        self._reader = Reader(model, limits)
        self.cache = self._reader.cache
        self._model, self._text, self._limits = model, text, limits
        self._decoder = Decoder(model, limits.max_batch, longest_sequence(model.config, limits) or 0)
        self._on_its_way: tuple[list[Sequence], Tokens] | None = None

    @property
    def pool(self) -> StatePool:
        """The states of the running answers."""
        return self._decoder.pool

    @property
    def keeping_problem(self) -> str:
        """Why no states are kept, where some should be."""
        return self._reader.problem

    def __len__(self) -> int:
        return len(self.reading) + len(self.running)

    @property
    def room(self) -> int:
        """Sequences that can be added."""
        return self._limits.max_batch - len(self)

    def add(self, sequence: Sequence) -> None:
        """Begin to read a prompt."""
        self.reading.append(sequence)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one step: encode images, read prompts, give every running answer a token, drop what has ended."""
        self._free()
        readings = list(dict.fromkeys(sequence.reading for sequence in self.reading))
        self._reader.step(readings, busy=bool(self.running))
        self._begin_answers()
        self._answer()
        self._free()

    def take_ended(self) -> list[Sequence]:
        """The sequences that have left the batch since the last call, answered or not."""
        ended, self._ended = self._ended, []
        return ended

    def fail_all(self, error: Exception) -> None:
        """End every sequence with an error."""
        for sequence in (*self.reading, *self.running):
            sequence.fail(error)
        self.reading, self.running, self._on_its_way = [], [], None
        self._decoder.clear()

    def _free(self) -> None:
        """Take ended sequences out of the batch, and free their slots."""
        for sequence in self.reading:
            if sequence.over:  # also one that its client gave up
                sequence.leave_reading()
                self._ended.append(sequence)
        self.reading = [sequence for sequence in self.reading if not sequence.over]
        for slot in reversed(range(len(self.running))):
            sequence = self.running[slot]
            if sequence.over:
                if sequence.answered:
                    read = sequence.ids[: sequence.fed]
                    self._reader.keep_answer(sequence.reading, read, lambda slot=slot: self.pool.row(slot))
                self._decoder.remove(slot)
                self._ended.append(self.running[slot])
                last = self.running.pop()
                if slot < len(self.running):
                    self.running[slot] = last

    def _begin_answers(self) -> None:
        """Put the sequences whose prompts are whole into slots, each with the first token of its answer."""
        for sequence in self.reading:
            if sequence.reading.error is not None:
                sequence.fail(sequence.reading.error)
        ready = [sequence for sequence in self.reading if sequence.reading.over and not sequence.over]
        if not ready:
            return
        self.reading = [sequence for sequence in self.reading if sequence not in ready]
        try:
            logits = torch.stack([sequence.reading.logits for sequence in ready])
            picked = self._pick(ready, self._decoder.suppress(logits))
            for sequence, (token, _, _) in zip(ready, picked, strict=True):
                self._decoder.add(sequence.reading.state, 0, token or 0, sequence.settings.sampled)
                self.running.append(sequence)
        except Exception as error:  # for example when the device is out of memory for the slots
            logger.error("%d answers could not begin: %s", len(ready), without_message(error))
            for sequence in ready:
                sequence.fail(error)
            self._ended += [sequence for sequence in ready if sequence not in self.running]
            return
        for sequence, (token, report, end) in zip(ready, picked, strict=True):
            sequence.leave_reading()
            sequence.take(token, report, end)

    def _answer(self) -> None:
        """Give every running answer its next token.

        Where the device makes steps on its own, a step begins before the tokens of the last one are here: an answer
        that they end has then been given one token too many, which nobody sees.
        """
        self._free()
        try:
            if self._decoder.ahead and not any(map(self._on_host, self.running)):
                self._answer_ahead()
                return
            self._settle()
            self._free()
            if not self.running:
                return
            logits = self._decoder.logits([s.ids[-1] for s in self.running])
            for sequence in self.running:
                sequence.fed = len(sequence.ids)
            picked = self._pick(self.running, logits)
        except Exception as error:
            self._fail_running(error)
            return
        for sequence, choice in zip(self.running, picked, strict=True):
            sequence.take(*choice)

    def _answer_ahead(self) -> None:
        last, self._on_its_way = self._on_its_way, None
        if self.running:
            draws = [0.0 if s.generator is None else draw_of(s.generator) for s in self.running]
            known = None if last else [s.ids[-1] for s in self.running]
            for sequence in self.running:  # what its state has read when this step is done
                sequence.fed = len(sequence.ids) + bool(last and sequence in last[0])
            self._on_its_way = [*self.running], self._decoder.step(draws, known)
        self._deliver(last)

    def _settle(self) -> None:
        """Wait for the tokens that are on their way."""
        last, self._on_its_way = self._on_its_way, None
        self._deliver(last)

    def _deliver(self, made: tuple[list[Sequence], Tokens] | None) -> None:
        ends = self._ends
        for sequence, token in zip(made[0], made[1].get(), strict=True) if made else ():
            if not sequence.over:
                sequence.take(token, None, token in ends)

    def _fail_running(self, error: Exception) -> None:
        """End the running answers, of which no state is whole any more; their slots are free again."""
        if isinstance(error, torch.OutOfMemoryError):
            limits = f"max_batch = {self._limits.max_batch} or prefill_tokens = {self._limits.prefill_tokens}"
            message = f"the GPU's memory is used up: lower limits.{limits}, or serve in bf16"
        else:
            message = without_message(error)
        logger.error("a step of %d answers failed: %s", len(self.running), message)
        self._on_its_way = None
        for sequence in self.running:
            sequence.fail(error)

    def _pick(self, sequences: list[Sequence], logits: Tensor) -> list[Pick]:
        """Choose each sequence's next token from its row of logits."""
        self._forbid(sequences, logits)
        allowed = restrict(logits, [s.matcher for s in sequences])
        tokens = choose(allowed, [s.settings for s in sequences], [s.generator for s in sequences])
        reports = self._reports(sequences, logits, tokens)
        ends = self._ends
        return [(token, report, token in ends) for token, report in zip(tokens, reports, strict=True)]

    def _forbid(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Make impossible what a sequence must not say now. Whatever is decided here is decided on the host, for each
        token anew, so `_on_host` is true of the sequence."""
        generation = self._model.generation_config
        for row, sequence in enumerate(sequences):  # as `generate` does
            if not sequence.ids and generation.begin_suppress_tokens:
                logits[row, generation.begin_suppress_tokens] = float("-inf")
            if self._cannot_end_yet(sequence):
                logits[row, self._ends] = float("-inf")

    def _on_host(self, sequence: Sequence) -> bool:
        """Whether the host has a part in a sequence's next token: it reports logits, or forbids what depends on those
        before, as a grammar does."""
        logprobs, matcher = sequence.settings.logprobs, sequence.matcher
        return logprobs is not None or matcher is not None or self._cannot_end_yet(sequence)

    def _cannot_end_yet(self, sequence: Sequence) -> bool:
        generation = self._model.generation_config
        read = len(sequence.prompt.input_ids) + len(sequence.ids)
        return len(sequence.ids) < (generation.min_new_tokens or 0) or read < (generation.min_length or 0)

    @property
    def _ends(self) -> list[int]:
        end = self._model.generation_config.eos_token_id
        return [token for token in (end if isinstance(end, list) else [end]) if token is not None]

    def _reports(
        self, sequences: list[Sequence], logits: Tensor, tokens: list[int | None]
    ) -> list[TokenLogprob | None]:
        reports: list[TokenLogprob | None] = [None] * len(sequences)
        wanted = [row for row, s in enumerate(sequences) if s.settings.logprobs is not None and tokens[row] is not None]
        if wanted:
            most = max(sequences[row].settings.logprobs for row in wanted)
            found = log_probabilities(logits[wanted], [tokens[row] for row in wanted], most)
            for row, (logprob, top) in zip(wanted, found, strict=True):
                top = [(self._text.data(token), value) for token, value in top[: sequences[row].settings.logprobs]]
                reports[row] = TokenLogprob(self._text.data(tokens[row]), logprob, tuple(top))
        return reports


def longest_sequence(config, limits: Limits) -> int | None:
    """Most tokens of a sequence, prompt and answer; None for a model whose state does not grow."""
    room = config.text_config.room
    return None if room is None else min(room, config.max_position_embeddings + limits.max_tokens)
