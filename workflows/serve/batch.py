"""Continuous batching for a recurrent model: sequences join and leave the running batch between two steps.

A step encodes some images, reads one piece of some prompts (reading.py), and gives every running answer its next token.
Each part is bounded, so a long prompt delays running answers by one piece at most. Padding is masked and rows do not
see each other, so a greedy answer is the same as for its prompt alone, apart from rounding. `StatePool` holds the
recurrent states.
"""

import logging

import torch
from torch import Tensor

from mlmamba.state import KeyValueState, LayerState, MambaState
from workflows.serve.detokenize import TokenText
from workflows.serve.grammar import restrict
from workflows.serve.openai import without_message
from workflows.serve.options import Limits
from workflows.serve.reading import Reader
from workflows.serve.sampling import TokenLogprob, choose, log_probabilities
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
        self.pool = StatePool(limits.max_batch, longest_sequence(model.config, limits) or 0)
        self._ended: list[Sequence] = []
        self._reader = Reader(model, limits)
        self.cache = self._reader.cache
        self._model, self._text, self._limits = model, text, limits

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
        self._reader.step(list(dict.fromkeys(sequence.reading for sequence in self.reading)))
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
        self.reading, self.running = [], []
        self.pool.clear()

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
                self.pool.remove(slot)
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
            picked = self._pick(ready, torch.stack([sequence.reading.logits for sequence in ready]))
            for sequence in ready:
                self.pool.append(sequence.reading.state, 0)
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
        """Give every running answer its next token."""
        if not self.running or all(sequence.over for sequence in self.running):
            return
        try:
            self._free()
            last = torch.tensor([[sequence.ids[-1]] for sequence in self.running], device=self._model.device)
            out = self._model(input_ids=last, cache_params=self.pool.view(), use_cache=True, logits_to_keep=1)
            self.pool.write(out.cache_params)
            for sequence in self.running:
                sequence.fed = len(sequence.ids)
            picked = self._pick(self.running, out.logits[:, -1])
        except Exception as error:  # for example when the device is out of memory
            logger.error("a step of %d answers failed: %s", len(self.running), without_message(error))
            for sequence in self.running:
                sequence.fail(error)
            return
        for sequence, (token, report, end) in zip(self.running, picked, strict=True):
            sequence.take(token, report, end)

    def _pick(self, sequences: list[Sequence], logits: Tensor) -> list[Pick]:
        """Choose each sequence's next token from its row of logits."""
        generation = self._model.generation_config
        end = generation.eos_token_id
        ends = end if isinstance(end, list) else [end]
        if generation.suppress_tokens:
            logits[:, generation.suppress_tokens] = float("-inf")
        for row, sequence in enumerate(sequences):  # as `generate` does
            if not sequence.ids and generation.begin_suppress_tokens:
                logits[row, generation.begin_suppress_tokens] = float("-inf")
            read = len(sequence.prompt.input_ids) + len(sequence.ids)
            if len(sequence.ids) < (generation.min_new_tokens or 0) or read < (generation.min_length or 0):
                logits[row, [token for token in ends if token is not None]] = float("-inf")
        tokens = choose(
            restrict(logits, [s.matcher for s in sequences]),
            [s.settings for s in sequences],
            [s.generator for s in sequences],
        )
        reports = self._reports(sequences, logits, tokens)
        return [(token, report, token in ends) for token, report in zip(tokens, reports, strict=True)]

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


class StatePool:
    """States of up to `size` sequences. Memory is allocated with the first state, which gives the shapes.

    Args:
        size: number of slots.
        limit: most tokens of a sequence, prompt and answer. Attention keeps room for so many in every slot.
    """

    def __init__(self, size: int, limit: int = 0):
        self.size, self.limit, self.used = size, limit, 0
        self._layers: list[LayerState | KeyValueState] = []

    @property
    def nbytes(self) -> int:
        """Memory held; the same from the first sequence on."""
        return MambaState(self._layers).nbytes

    def view(self) -> MambaState:
        """The states in use, not copied: a step of one token may write its new states into the slots."""
        return MambaState([slots.head(self.used) for slots in self._layers]).in_place()

    def row(self, slot: int) -> MambaState:
        """A copy of the state in a slot."""
        return self.view().select(torch.tensor([slot], device=self._layers[0].parts[0].device))

    def write(self, state: MambaState) -> None:
        """Store the states after a step, unless the step has written them into the slots itself."""
        for slots, new in zip(self._layers, state.layers, strict=True):
            slots.take(new)

    def append(self, state: MambaState, row: int) -> int:
        """Copy row `row` of a state into a free slot. Returns the slot's number.

        Raises:
            IndexError: no slot is free.
        """
        if self.used == self.size:
            raise IndexError(f"all {self.size} slots are in use")
        if not self._layers:
            self._layers = [own.slots(self.size, self.limit) for own in state.layers]
        for slots, new in zip(self._layers, state.layers, strict=True):
            slots.put(self.used, new, row)
        self.used += 1
        return self.used - 1

    def remove(self, slot: int) -> None:
        """Free a slot. The last slot in use moves to its place."""
        self.used -= 1
        for slots in self._layers:
            if slot != self.used:
                slots.put(slot, slots, self.used)
            slots.keep(self.used)

    def clear(self) -> None:
        """Free every slot."""
        self.used = 0
        for slots in self._layers:
            slots.keep(0)
