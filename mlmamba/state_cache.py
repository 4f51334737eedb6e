"""Recurrent states kept in host memory, so that what was read once is not read again.

A recurrent state is exact at any token and knows all that came before it. It is found again by a digest of exactly
that: the token ids and the images as the model sees them. A cache belongs to one loaded model, and every state to one
owner.

Out goes first what costs least to make again for each byte that it holds, and of equals what was not used for longest
(GreedyDual-Size; Cao and Irani 1997, "Cost-aware WWW proxy caching algorithms"). A state that goes leaves its cost to
those that were read on from it: to make them again, more would have to be read.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from mlmamba.conversation import IMAGE_TOKEN, Turn, clean, format_of
from mlmamba.state import MambaState

_TENSOR_BYTES, _ENTRY_BYTES = 512, 2048  # what Python and torch hold for a tensor and for an entry, about
_LONG = 32  # tokens of instructions that are worth a pause in reading
Key = tuple[str, bytes]  # owner, and digest of what was read


@dataclass(frozen=True)
class Place:
    """A place in a prompt at which a state may be kept: how many tokens come before it, and their digest with that of
    their images. At a `cut` the reading of the prompt pauses, so that there is a state."""

    length: int
    digest: bytes
    cut: bool = False


@dataclass
class Kept:
    """A state of one sequence in host memory, to which nobody may write, and the logits (V,) that followed if known."""

    state: MambaState
    logits: Tensor | None
    cost: float
    nbytes: int
    parent: Key | None
    clock: float = 0.0
    """The cache's clock when the state was used last."""
    used: int = 0
    """The number of that use, counted over all states."""
    children: set[Key] = field(default_factory=set)

    @property
    def rank(self) -> tuple[float, int]:
        """What it is worth: least first out."""
        return self.clock + self.cost / self.nbytes, self.used


class StateCache:
    """States of prompts by what was read. Not for several threads at once.

    Args:
        limit: most bytes to hold, with an estimate of Python's own for each state; 0 keeps nothing.
    """

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._kept: dict[Key, Kept] = {}
        self._heap: list[tuple[tuple[float, int], Key]] = []  # also ranks of before, which are passed over
        self._clock, self._uses = 0.0, 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, owner: str, places: Sequence[Place], whole: int) -> Place | None:
        """The longest of the places (in ascending order) at which there is a state of this owner.

        Args:
            whole: tokens of the prompt; a state at its end serves only with the logits that follow.
        """
        for place in reversed(places):
            kept = self._kept.get((owner, place.digest))
            if kept is not None and (place.length < whole or kept.logits is not None):
                return place
        return None

    def use(self, owner: str, place: Place) -> Kept:
        """The state at a place that `longest` gave. It is worth keeping for longer from now on."""
        kept = self._kept[owner, place.digest]
        self._rate(kept, (owner, place.digest))
        return kept

    def keep(
        self,
        owner: str,
        digest: bytes,
        state: MambaState,
        cost: float,
        after: bytes | None = None,
        logits: Tensor | None = None,
    ) -> bool:
        """Keep a state of one sequence. It is copied to host memory, but for one that lies there already: nobody may
        write to that afterwards.

        Args:
            digest: of what it has read.
            cost: of making it again from the state before, in any unit that is the same for all.
            after: digest of the state that it was read on from.
            logits: (V,) that followed on its last token.

        Returns:
            Whether it is there; False where the limit is smaller than this one state.
        """
        key, parent = (owner, digest), None if after is None else (owner, after)
        if (known := self._kept.get(key)) is not None and (logits is None or known.logits is not None):
            self._rate(known, key)
            return True
        if known is not None:
            self._remove(key, known)
        nbytes = size_of(state, logits)
        if nbytes > self.limit:
            return False
        self._make_room(nbytes)
        logits = None if logits is None else logits.cpu()
        above = self._kept.get(parent) if parent else None
        kept = self._kept[key] = Kept(state.to("cpu"), logits, cost, nbytes, parent if above else None)
        if above is not None:
            above.children.add(key)
        self.nbytes += nbytes
        self._rate(kept, key)
        return True

    def close(self) -> None:
        """Forget everything, and keep nothing from now on."""
        self.limit = self.nbytes = 0
        self._kept, self._heap = {}, []

    def _rate(self, kept: Kept, key: Key) -> None:
        self._uses += 1
        kept.clock, kept.used = self._clock, self._uses
        self._push(kept, key)

    def _push(self, kept: Kept, key: Key) -> None:
        heapq.heappush(self._heap, (kept.rank, key))
        if len(self._heap) > 4 * len(self._kept) + 64:
            self._heap = [(own.rank, own_key) for own_key, own in self._kept.items()]
            heapq.heapify(self._heap)

    def _make_room(self, nbytes: int) -> None:
        while self.nbytes + nbytes > self.limit:
            rank, key = heapq.heappop(self._heap)
            kept = self._kept.get(key)
            if kept is None or kept.rank != rank:
                continue
            self._clock = rank[0]
            self._remove(key, kept)

    def _remove(self, key: Key, kept: Kept) -> None:
        del self._kept[key]
        self.nbytes -= kept.nbytes
        above = self._kept.get(kept.parent) if kept.parent else None
        if above is not None:
            above.children.discard(key)
            above.children |= kept.children
        for child_key in kept.children:
            child = self._kept[child_key]
            child.cost, child.parent = child.cost + kept.cost, kept.parent
            self._push(child, child_key)


class Places:
    """Where in prompts of the chat format (mlmamba/conversation.py) a state is worth finding: after each run of images,
    after long instructions, where an answer begins, and where it ends.

    Token ids are compared, never text. An answer that a client sends back as text may come out as other tokens than
    those that were made; the conversation then goes on from its question.

    Args:
        processor: the model's MLMambaProcessor.
    """

    def __init__(self, processor):
        tokenizer = self._tokenizer = processor.tokenizer
        self._image_id, self._end_id = processor.image_token_id, tokenizer.eos_token_id
        self._chat = format_of(tokenizer)
        ids = tokenizer(f"{tokenizer.eos_token}\n{self._chat.assistant}", add_special_tokens=False)["input_ids"]
        self._opening = ids[ids.index(self._end_id) + 1 :] if self._end_id in ids else []

    def of(
        self,
        ids: Sequence[int],
        images: Sequence[bytes],
        first: Turn | None = None,
        image_tokens: Sequence[int] = (),
    ) -> tuple[Place, ...]:
        """The places of a prompt, in ascending order; the last is its end.

        Args:
            ids: (l,).
            images: digests of its images, in reading order.
            first: its first turn, where that may hold instructions.
            image_tokens: placeholders of each image; all have equally many where it is not given.
        """
        cuts = {i + 1 for i, (one, after) in enumerate(pairwise(ids)) if one == self._image_id != after} | {len(ids)}
        if first is not None and first.instructions:
            cuts |= self._after_instructions(ids, first)
        found = set(cuts)
        for end in (i for i, token in enumerate(ids) if token == self._end_id):
            if list(ids[end + 1 : (begin := end + 1 + len(self._opening))]) == self._opening:
                found.add(begin)
            else:  # of an answer, whose last token its state has read or not
                found |= {end - 1, end, end + 1}
        lengths = sorted(found - {0})
        both = zip(lengths, digests(ids, lengths, images, self._image_id, image_tokens), strict=True)
        return tuple(Place(length, digest, length in cuts) for length, digest in both)

    def _after_instructions(self, ids: Sequence[int], first: Turn) -> set[int]:
        """Where the instructions end, up to the first token that what follows changes; none where they are short."""
        shown = sum(token == self._image_id for token in ids[: ids.index(self._end_id)]) if first.images else 0
        opening = f"{IMAGE_TOKEN * shown}{self._chat.opening(clean(first.text[: first.instructions]))}"
        own = self._tokenizer(opening, add_special_tokens=False)["input_ids"]
        same = next((i for i, (one, other) in enumerate(zip(own, ids, strict=False)) if one != other), len(own))
        return {same} if same - shown >= _LONG else set()


def size_of(state: MambaState, logits: Tensor | None = None) -> int:
    """Bytes that a kept state takes, with an estimate of what Python and torch hold for it."""
    tensors = sum(len(layer.parts) for layer in state.layers) + (logits is not None)
    return state.nbytes + (0 if logits is None else logits.nbytes) + tensors * _TENSOR_BYTES + _ENTRY_BYTES


def image_digest(pixels: np.ndarray, grid: tuple[int, int] = (1, 1)) -> bytes:
    """Digest of one image as the model sees it (a `CutImage`)."""
    found = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=32)
    found.update(f"{pixels.shape} {grid}".encode())
    return found.digest()


def digests(
    ids: Sequence[int], lengths: Sequence[int], images: Sequence[bytes], image_id: int, image_tokens: Sequence[int] = ()
) -> list[bytes]:
    """Digests of the beginnings of a prompt.

    Args:
        ids: (l,) its tokens.
        lengths: tokens of each beginning, in ascending order; none ends within an image.
        images: digests of its images, in reading order.
        image_id: id of the placeholder.
        image_tokens: placeholders of each image; all have equally many where it is not given.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    seen = np.concatenate([[0], np.cumsum(tokens == image_id)])
    each = image_tokens or [max(int(seen[-1]) // max(len(images), 1), 1)] * len(images)
    whole = np.searchsorted(np.cumsum(each), seen, side="right")  # images that have been seen to their ends
    text, shown, found = hashlib.blake2b(digest_size=32), hashlib.blake2b(digest_size=32), []
    before = 0
    for length in lengths:
        text.update(tokens[before:length].tobytes())
        if images:
            shown.update(b"".join(images[int(whole[before]) : int(whole[length])]))
        before = length
        found.append(hashlib.blake2b(text.digest() + shown.digest(), digest_size=32).digest())
    return found
