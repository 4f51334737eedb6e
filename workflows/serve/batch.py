"""Continuous batching for a recurrent model: sequences join and leave the running batch between two steps.

A step encodes some images, reads one piece of some prompts, and gives every running answer its next token. Each part is
bounded, so a long prompt delays running answers by one piece at most. Padding is masked and rows do not see each other,
so a greedy answer is the same as for its prompt alone, apart from rounding. `StatePool` holds the recurrent states.
"""

import logging

import torch
from torch import Tensor

from mlmamba.state import KeyValueState, LayerState, MambaState
from workflows.serve.detokenize import TokenText
from workflows.serve.openai import without_message
from workflows.serve.options import Limits
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
        self._encode_images()
        self._read_prompts()
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
        self._ended += [sequence for sequence in self.reading if sequence.over]
        self.reading = [sequence for sequence in self.reading if not sequence.over]
        for slot in reversed(range(len(self.running))):
            if self.running[slot].over:
                self.pool.remove(slot)
                self._ended.append(self.running[slot])
                last = self.running.pop()
                if slot < len(self.running):
                    self.running[slot] = last

    def _encode_images(self) -> None:
        """Encode the images of the next prompts, at most `images_at_once` together (or one prompt's)."""
        group: list[Sequence] = []
        for sequence in self.reading:
            if sequence.prompt.pixels is None or sequence.features is not None or sequence.read:
                continue
            count = sum(len(s.prompt.pixels) for s in group) + len(sequence.prompt.pixels)
            if group and count > self._limits.images_at_once:
                break
            group.append(sequence)
        if group:
            self._one_by_one_if_they_fail(self._encode, group)

    def _encode(self, group: list[Sequence]) -> None:
        pixels = torch.cat([sequence.prompt.pixels for sequence in group]).to(self._model.device)
        pieces = pixels.split(self._limits.images_at_once)
        features = torch.cat([self._model.get_image_features(piece) for piece in pieces])
        counts = [len(sequence.prompt.pixels) for sequence in group]
        for sequence, own in zip(group, features.split(counts), strict=True):
            sequence.features = own.flatten(0, 1)

    def _read_prompts(self) -> None:
        """Read one piece of each of the first prompts, together at most `prefill_tokens` with their padding."""
        group: list[Sequence] = []
        longest = 0
        for sequence in self.reading:
            if sequence.over or (sequence.prompt.pixels is not None and sequence.features is None):
                continue
            longest = max(longest, self._piece(sequence))
            if group and (len(group) + 1) * longest > self._limits.prefill_tokens:
                break
            group.append(sequence)
        if group:
            self._one_by_one_if_they_fail(self._read, group)
            self.reading = [s for s in self.reading if s.read < len(s.prompt.input_ids) and not s.over]

    def _piece(self, sequence: Sequence) -> int:
        return min(len(sequence.prompt.input_ids) - sequence.read, self._limits.prefill_tokens)

    def _read(self, group: list[Sequence]) -> None:
        lengths = [self._piece(sequence) for sequence in group]
        longest = max(lengths)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)  # from lengths: the pad id is also the end token
        features: list[Tensor] = []
        for row, (sequence, length) in enumerate(zip(group, lengths, strict=True)):
            piece = sequence.prompt.input_ids[sequence.read : sequence.read + length]
            ids[row, longest - length :], mask[row, longest - length :] = piece, 1
            if sequence.features is not None:
                features.append(sequence.features[: int((piece == self._model.config.image_token_id).sum())])
        used = [len(own) for own in features]
        out = self._model(
            input_ids=ids.to(self._model.device),
            image_features=torch.cat(features) if sum(used) else None,
            attention_mask=mask.to(self._model.device),
            cache_params=stack([sequence.state for sequence in group]),
            use_cache=True,
            logits_to_keep=1,
        )
        ends = [s.read + length == len(s.prompt.input_ids) for s, length in zip(group, lengths, strict=True)]
        done = [row for row, end in enumerate(ends) if end]
        picked = self._pick([group[row] for row in done], out.logits[done, -1]) if done else []
        counts = iter(used)
        for row, (sequence, length) in enumerate(zip(group, lengths, strict=True)):
            sequence.read += length
            if sequence.features is not None:
                sequence.features = sequence.features[next(counts) :]
            if not ends[row]:
                sequence.state = out.cache_params.select(torch.tensor([row], device=out.logits.device))
                continue
            self.pool.append(out.cache_params, row)
            self.running.append(sequence)
            sequence.state = sequence.features = None
            sequence.take(*picked[done.index(row)])

    def _answer(self) -> None:
        """Give every running answer its next token."""
        if not self.running or all(sequence.over for sequence in self.running):
            return
        try:
            self._free()
            last = torch.tensor([[sequence.ids[-1]] for sequence in self.running], device=self._model.device)
            out = self._model(input_ids=last, cache_params=self.pool.view(), use_cache=True, logits_to_keep=1)
            self.pool.write(out.cache_params)
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
        tokens = choose(logits, [s.settings for s in sequences], [s.generator for s in sequences])
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

    def _one_by_one_if_they_fail(self, work, group: list[Sequence]) -> None:
        """Do the work for a group, or for each alone where that fails, so that one request cannot fail its neighbours.

        `work` must not change a sequence before the last thing that can fail.
        """
        try:
            work(group)
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
                return
            logger.error("%d prompts failed together, each is tried alone: %s", len(group), without_message(error))
            for sequence in group:
                self._one_by_one_if_they_fail(work, [sequence])


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


def stack(states: list[MambaState | None]) -> MambaState | None:
    """Stack states of one row each into one batch; None stands for a sequence that has read nothing yet."""
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    layers = []
    for i, layer in enumerate(known.layers):
        rows = [layer.start() if state is None else state.layers[i] for state in states]
        layers.append(layer.join(rows))
    return MambaState(layers)
