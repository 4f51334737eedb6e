"""Tokens to text while they come: nothing is shown that a later token could take back.

Held back are bytes that may become a character with the next token, the beginning of a stop string, and white space at
the end (answers are stripped). What was shown, put together, is therefore the text of the finished answer.
"""

import codecs
from functools import lru_cache

from tokenizers import decoders

_LONGEST_HOLD = 8  # tokens; no character is spread over more


def special_tokens(tokenizer) -> dict[int, str]:
    """Names of the tokens that are marks and no text, by id: those with a role, and those added as special."""
    added = {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


class TokenText:
    """What every token of a tokenizer stands for.

    Byte-level tokenizers (GPT-NeoX's, and those trained here) are read from a table; any other is asked.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
        self._known: dict[int, bytes] = {}

    def data(self, token: int) -> bytes:
        """The bytes of a token; those of a special one are its name."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def decoder(self) -> "ByteDecoder | WindowDecoder":
        """A decoder for one answer; special tokens are left out of its text."""
        return ByteDecoder(self) if self._byte_level else WindowDecoder(self._tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark and no text."""
        return token in self.special

    def _look_up(self, token: int) -> bytes:
        if not self._byte_level:
            return self._tokenizer.decode([token]).encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the embedding that no token has
            return b""
        table = _byte_of_character()
        try:
            return bytes(table[character] for character in name)
        except KeyError:  # added to the tokenizer as it stands
            return name.encode()


class ByteDecoder:
    """Text from the tokens' bytes, each looked at once."""

    def __init__(self, text: TokenText):
        self._text, self._decoder = text, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        return "" if self._text.is_special(token) else self._decoder.decode(self._text.data(token))

    def flush(self) -> str:
        """What is left at the end."""
        return self._decoder.decode(b"", True)


class WindowDecoder:
    """Text by decoding the last tokens again with each new one, for tokenizers whose tokens depend on each other."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        self._held.append(token)
        new = self._new()
        if new.endswith("\ufffd") and len(self._held) < _LONGEST_HOLD:
            return ""
        self._before, self._held = self._held, []
        return new

    def flush(self) -> str:
        """What is left at the end."""
        return self._new() if self._held else ""

    def _new(self) -> str:
        return self._decode(self._before + self._held)[len(self._decode(self._before)) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """The text of one answer, its stop strings, and how much of it may be shown.

    Args:
        text: the tokenizer's.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, text: TokenText, stop: tuple[str, ...] = ()):
        self._decoder, self._stop = text.decoder(), stop
        self._longest = max(map(len, stop), default=0)
        self._text, self._shown, self._cut = "", 0, None

    @property
    def length(self) -> int:
        """Characters so far, with those that are held back."""
        return len(self._text)

    @property
    def shown(self) -> int:
        """Up to which character the text was shown."""
        return self._shown

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._cut is not None

    def push(self, token: int) -> None:
        """Take the next token."""
        new = self._decoder.push(token)
        if new:
            self._append(new)

    def take(self, final: bool = False) -> str:
        """The text that may be shown and was not yet; all that is left when the answer is `final`."""
        if final and not self.stopped and (rest := self._decoder.flush()):
            self._append(rest)
        end = self._cut if self.stopped else len(self._text) - (0 if final else self._unsure())
        if end <= self._shown:  # else the search for white space would begin again with each token
            return ""
        begin = self._shown
        if not begin:
            begin = len(self._text) - len(self._text.lstrip())
        end = begin + len(self._text[begin:end].rstrip())
        if end <= begin:
            return ""
        self._shown = end
        return self._text[begin:end]

    def _append(self, new: str) -> None:
        searched = max(0, len(self._text) - self._longest + 1)
        self._text += new
        places = [self._text.find(stop, searched) for stop in self._stop]
        self._cut = min((place for place in places if place >= 0), default=None)

    def _unsure(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        tail = self._text[-self._longest :] if self._longest else ""
        for length in range(min(len(tail), self._longest - 1), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop):
                return length
        return 0


@lru_cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable Latin-1 stands for itself, the rest for what follows U+00FF."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
