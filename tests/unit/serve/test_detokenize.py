"""Text while it comes: shown pieces put together are the answer, and no piece shows what a later token takes back."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import VOCABULARY
from workflows.serve.detokenize import TextStream, TokenText


def shown(text, ids, stop=()):
    """What is shown with each token, and at the end."""
    stream = TextStream(text, stop)
    pieces = []
    for token in ids:
        stream.push(token)
        if stream.stopped:
            break
        pieces.append(stream.take())
    return [*pieces, stream.take(final=True)]


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def test_random_bytes_decode_as_the_tokenizer_decodes_them(tokenizer):
    """All ids, also invalid UTF-8, special tokens, and rows of the embedding that no token has."""
    text, chance = TokenText(tokenizer), random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 60))]
        assert "".join(shown(text, ids)) == whole(tokenizer, ids)
    assert text.data(VOCABULARY - 1) == b""


def test_real_text_in_many_scripts(neox):
    text = TokenText(neox)
    for sample in (
        "Grüße 日本語 🙂👩‍👩‍👧 done",
        "  spaces    inside  \n\n and out \n",
        "Ω≈ç√∫µ≤",
        "\U0001f1e9\U0001f1ea a \u200d b",
    ):
        ids = neox(sample, add_special_tokens=False)["input_ids"]
        pieces = shown(text, ids)
        assert "".join(pieces) == whole(neox, ids) == sample.strip()
        assert not any("\ufffd" in piece for piece in pieces)
        assert b"".join(map(text.data, ids)).decode() == sample


def test_random_tokens_of_a_real_tokenizer(neox):
    text, chance = TokenText(neox), random.Random(1)
    for _ in range(100):
        ids = [chance.randrange(len(neox)) for _ in range(40)]
        assert "".join(shown(text, ids)) == whole(neox, ids)


def test_a_tokenizer_of_another_kind_is_asked():
    """A sentencepiece-like one: a word's first token carries the space, which the first of a text loses."""
    vocabulary = {
        piece: i
        for i, piece in enumerate(["<e>", "\u2581red", "\u2581circle", "s", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    pieces = shown(TokenText(tokenizer), [1, 2, 3, 4, 5, 6, 7, 1])
    assert "".join(pieces) == "red circles\U0001f642 red"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("sample", "stop", "expected"),
    [
        ("one two three", ("two",), "one"),
        ("one two three", ("o t", "ne t"), "o"),
        ("one two three", ("never", "three"), "one two"),
        ("one twot three", ("twt",), "one twot three"),
        ("aaaab", ("aab",), "aa"),
        ("abcabd", ("abd",), "abc"),
        ("stop", ("stop",), ""),
        ("  stop here", ("here",), "stop"),
        ("ends with st", ("stop",), "ends with st"),
        ("über straße", ("ß",), "über stra"),
        ("x\n\nUser:", ("\n\nUser:",), "x"),
        ("first, then", (", ", "first"), ""),
    ],
)
def test_stop_strings(tokenizer, neox, sample, stop, expected):
    """With a token per byte, every stop string spans several tokens; with real tokens, tokens span stop strings."""
    for kind in (tokenizer, neox):
        ids = kind(sample, add_special_tokens=False)["input_ids"]
        pieces = shown(TokenText(kind), ids, stop)
        assert "".join(pieces) == expected
        so_far = ""
        for piece in pieces:
            so_far += piece
            assert expected.startswith(so_far)


def test_random_stop_strings_never_show(tokenizer):
    text, chance = TokenText(tokenizer), random.Random(2)
    for _ in range(500):
        sample = "".join(chance.choice("ab ") for _ in range(30))
        stop = tuple("".join(chance.choice("ab ") for _ in range(chance.randrange(1, 6))) for _ in range(2))
        places = [end for end in range(31) if any(sample[:end].endswith(s) for s in stop)]
        cut = min((sample[: places[0]].find(s) for s in stop if s in sample[: places[0]]), default=30) if places else 30
        pieces = shown(text, tokenizer(sample, add_special_tokens=False)["input_ids"], stop)
        assert "".join(pieces) == sample[:cut].strip()


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer):
    ids = tokenizer("a b  stx", add_special_tokens=False)["input_ids"]
    assert shown(TokenText(tokenizer), ids, ("stop",)) == ["a", "", " b", "", "", "", "", "  stx", ""]
