"""Prompts are read into states: from the longest kept state on, in pieces, several prompts together.

A prompt is read once for all answers to it. Its pieces end where the meaning changes (after images, and at its end),
and a state is kept there. They are the same pieces whether a kept state was found or not, so that finding one does not
change an answer: a prompt that is read alone has the same state to the last bit.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mlmamba.image_layout import CutImage, join
from mlmamba.state import MambaState
from mlmamba.state_cache import Place, StateCache, digests, size_of
from workflows.serve.openai import without_message
from workflows.serve.options import Limits
from workflows.serve.sampling import Prompt

logger = logging.getLogger(__name__)
_BUSY_TOKENS = 128  # that a CPU reads between two steps of running answers: some tenths of a second at 130m


class Reading:
    """How far a prompt has been read. All answers to it share this, and each begins when it is whole.

    Args:
        prompt: what is read.
        owner: whose states may be found, and whose the new ones are; empty where none are kept.
        answers: how many begin from it.
    """

    def __init__(self, prompt: Prompt, owner: str = "", answers: int = 1):
        self.prompt, self.owner = prompt, owner
        self.read = 0  # tokens that the state has seen
        self.cached = 0  # of these, tokens whose state was kept from an earlier prompt
        self.begun = False
        self.shown = 0  # images in the kept state that it goes on from
        self.features: Tensor | None = None  # one vector for each placeholder of the prompt that is still to be read
        self.state: MambaState | None = None  # of one sequence; others may hold it too, so nobody writes to it
        self.logits: Tensor | None = None  # (V,) on the last token, once that is read
        self.error: Exception | None = None
        self.kept: Place | None = None  # the last place whose state is in the cache
        self._answers = answers

    @property
    def over(self) -> bool:
        """Whether it is whole, or has failed."""
        return self.logits is not None or self.error is not None

    @property
    def pause(self) -> int:
        """Tokens of the prompt up to where the reading pauses next."""
        cuts = (place.length for place in self.prompt.places if place.cut and place.length > self.read)
        return next(cuts, len(self.prompt.input_ids))

    @property
    def waits_for_images(self) -> bool:
        """Whether images of it must be encoded before it can be read."""
        return self.features is None and self.shown < len(self.prompt.shown)

    def leave(self) -> None:
        """An answer has begun, or will not. With the last one the memory is freed."""
        self._answers -= 1
        if self._answers == 0:
            self.features = self.state = self.logits = None


class Reader:
    """Reads prompts with a model.

    Args:
        model: in evaluation mode, on its device.
        limits: the sizes of pieces and of what is kept.
    """

    def __init__(self, model, limits: Limits):
        self.cache = StateCache(limits.state_cache_bytes)
        self._model, self._limits = model, limits
        self._image_id = model.config.image_token_id
        self.problem = ""
        """Why no states are kept, where some should be."""
        self._checked, self._shortest_first = False, True
        slow = model.device.type == "cpu"
        tokens = limits.busy_prefill_tokens or (_BUSY_TOKENS if slow else limits.prefill_tokens)
        self._alone = limits.prefill_tokens, limits.images_at_once
        self._beside = min(tokens, limits.prefill_tokens), 1 if slow else limits.images_at_once
        self._tokens, self._images = self._alone  # most of a step

    def step(self, readings: list[Reading], busy: bool = False) -> None:
        """Encode some images and read one piece of some of the prompts, the first ones first.

        Args:
            busy: whether answers wait meanwhile for their next tokens.
        """
        self._tokens, self._images = self._beside if busy else self._alone
        readings = [reading for reading in readings if not reading.over]
        self._begin(readings)
        readings = [reading for reading in readings if reading.begun and not reading.over]
        self._encode_images(readings)
        self._read_pieces([reading for reading in readings if not (reading.over or reading.waits_for_images)])

    def keep_answer(self, reading: Reading, ids: list[int], state: Callable[[], MambaState]) -> None:
        """Keep the state of one sequence that has read a prompt and an answer's tokens: the conversation may go on.

        Args:
            state: copies it from its slot; called where it is to be kept.
        """
        prompt = reading.prompt
        if ids and reading.owner and self.cache.limit and prompt.places:
            whole = [*prompt.input_ids.tolist(), *ids]
            (digest,) = digests(whole, [len(whole)], prompt.images, self._image_id, tokens_of(prompt.shown))
            self._keep(reading, digest, state(), len(ids))

    def _begin(self, readings: list[Reading]) -> None:
        """Find the kept states that prompts go on from. A prompt whose beginning another of the same owner is just
        reading waits for that."""
        coming: set[tuple[str, bytes]] = set()
        for reading in readings:
            if not reading.begun:
                found = self._find(reading)
                length = found.length if found else 0
                later = [place for place in reading.prompt.places if place.length > length]
                if any((reading.owner, place.digest) in coming for place in later):
                    continue
                self._go_on_from(reading, found)
            if reading.owner and self.cache.limit:
                ahead = (place for place in reading.prompt.places if place.cut and place.length > reading.read)
                coming |= {(reading.owner, place.digest) for place in ahead}

    def _find(self, reading: Reading) -> Place | None:
        if not reading.owner or not self.cache.limit:
            return None
        return self.cache.longest(reading.owner, reading.prompt.places, len(reading.prompt.input_ids))

    def _go_on_from(self, reading: Reading, found: Place | None) -> None:
        reading.begun = True
        if found is None:
            return
        kept = self.cache.use(reading.owner, found)
        reading.read = reading.cached = found.length
        reading.kept = found
        read = int((reading.prompt.input_ids[: found.length] == self._image_id).sum())
        reading.shown = sum(end <= read for end in accumulate(tokens_of(reading.prompt.shown)))
        reading.state = kept.state.to(self._model.device)
        if found.length == len(reading.prompt.input_ids):
            reading.logits = kept.logits.to(self._model.device)

    def _encode_images(self, readings: list[Reading]) -> None:
        """Encode the images of the next prompts, at most as many as this step may (or one prompt's)."""
        group: list[Reading] = []
        count = 0
        for reading in readings:
            if reading.waits_for_images:
                count += sum(image.squares for image in reading.prompt.shown[reading.shown :])
                if group and count > self._images:
                    break
                group.append(reading)
        if group:
            _one_by_one_if_they_fail(self._encode, group)

    def _encode(self, group: list[Reading]) -> None:
        left = [reading.prompt.shown[reading.shown :] for reading in group]
        flat, most = [image for own in left for image in own], self._limits.images_at_once
        if flat[0].pixels.ndim == 2:  # patches
            pieces = [join(flat[first : first + most]) for first in range(0, len(flat), most)]
        else:
            pieces = [{"pixel_values": piece} for piece in join(flat)["pixel_values"].split(most)]
        # The shapes of patches stay where their values are needed.
        features = [
            self._model.get_image_features(piece.pop("pixel_values").to(self._model.device), **piece)
            for piece in pieces
        ]
        features = torch.cat([own if own.ndim == 2 else own.flatten(0, 1) for own in features])
        for reading, own in zip(group, features.split([sum(tokens_of(own)) for own in left]), strict=True):
            reading.features = own

    def _read_pieces(self, readings: list[Reading]) -> None:
        """Read one piece of some prompts each, together at most as many tokens as this step may, with their padding,
        which is at most half of it. In every other step the shortest come first: none waits for all of a long one."""
        self._shortest_first = not self._shortest_first
        if self._shortest_first:
            readings = sorted(readings, key=lambda reading: len(reading.prompt.input_ids) - reading.read)
        group: list[Reading] = []
        lengths: list[int] = []
        for reading in readings:
            joined = [*lengths, self._piece(reading)]
            padded = len(joined) * max(joined)
            if group and (padded > self._tokens or padded > 2 * sum(joined)):
                continue
            group.append(reading)
            lengths = joined
        if group:
            _one_by_one_if_they_fail(self._read, group)
        for reading in group:
            if reading.error is None:
                if not self._checked:
                    self._check_limit(reading.state)
                self._keep_place(reading)

    def _piece(self, reading: Reading) -> int:
        return min(reading.pause - reading.read, self._tokens)

    def _read(self, group: list[Reading]) -> None:
        lengths = [self._piece(reading) for reading in group]
        longest = max(lengths)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)  # from lengths: the pad id is also the end token
        features: list[Tensor] = []
        for row, (reading, length) in enumerate(zip(group, lengths, strict=True)):
            piece = reading.prompt.input_ids[reading.read : reading.read + length]
            ids[row, longest - length :], mask[row, longest - length :] = piece, 1
            if reading.features is not None:
                features.append(reading.features[: int((piece == self._image_id).sum())])
        used = [len(own) for own in features]
        out = self._model(
            input_ids=ids.to(self._model.device),
            image_features=torch.cat(features) if sum(used) else None,
            attention_mask=mask.to(self._model.device),
            cache_params=stack([reading.state for reading in group]),
            use_cache=True,
            logits_to_keep=1,
        )
        states = [out.cache_params.select(torch.tensor([row], device=out.logits.device)) for row in range(len(group))]
        counts = iter(used)
        for row, (reading, length) in enumerate(zip(group, lengths, strict=True)):
            reading.read += length
            reading.state = states[row]
            if reading.features is not None:
                reading.features = reading.features[next(counts) :]
            if reading.read == len(reading.prompt.input_ids):
                reading.logits = out.logits[row, -1].clone()

    def _keep_place(self, reading: Reading) -> None:
        """Keep the state where the reading has paused for that."""
        if not reading.owner or not self.cache.limit:
            return
        place = next((p for p in reading.prompt.places if p.cut and p.length == reading.read), None)
        if place is not None:
            new = reading.prompt.input_ids[reading.kept.length if reading.kept else 0 : reading.read]
            # An image costs about as much to encode as to read (ViT-B/16 beside a language model of 130m).
            if self._keep(reading, place.digest, reading.state, len(new) + int((new == self._image_id).sum())):
                reading.kept = place

    def _keep(self, reading: Reading, digest: bytes, state: MambaState, cost: float) -> bool:
        after = reading.kept.digest if reading.kept else None
        logits = reading.logits if state is reading.state else None
        try:
            return self.cache.keep(reading.owner, digest, state, cost, after, logits)
        except (MemoryError, RuntimeError) as error:  # torch has no memory for the copy
            self.problem = f"there is no memory for them ({type(error).__name__})"
            logger.error("no states are kept from now on: %s", without_message(error))
            self.cache.close()
            return False

    def _check_limit(self, state: MambaState) -> None:
        """Say so, once, where not one state can be kept."""
        self._checked = True
        if 0 < self.cache.limit < (size := size_of(state)):
            limit = f"limits.state_cache_bytes = {self.cache.limit:,}"
            self.problem = f"{limit} is less than one state of this model ({size:,} bytes)"
            logger.warning(
                "%s: none is kept, and every prompt is read from its beginning; raise it, or set 0", self.problem
            )
            self.cache.close()


def _one_by_one_if_they_fail(work: Callable[[list[Reading]], None], group: list[Reading]) -> None:
    """Do the work for a group, or for each alone where that fails, so that one prompt cannot fail its neighbours.

    `work` must not change a reading before the last thing that can fail.
    """
    try:
        work(group)
    except Exception as error:
        if len(group) == 1:
            group[0].error = error
            return
        logger.error("%d prompts failed together, each is tried alone: %s", len(group), without_message(error))
        for reading in group:
            _one_by_one_if_they_fail(work, [reading])


def tokens_of(images: Sequence[CutImage]) -> list[int]:
    """Placeholders of each image."""
    return [image.tokens for image in images]


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
