"""The data set's tokenizer: an existing one, or a byte-level BPE trained on the corpus.

Both end up with the three things the rest relies on: an end-of-text token that also pads, one id for `<image>`, and
nothing added around a text. GPT-NeoX-20B has 50,277 entries, so `<image>` becomes id 50277; the released Mamba-2
checkpoints pad their embedding to 50,288 rows, so it fits without resizing.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlmamba.chat_template import template_of
from mlmamba.conversation import (
    CHAT_FORMAT,
    FORMATS,
    IMAGE_TOKEN,
    ML_MAMBA,
    ChatFormat,
    format_named,
    missing_marks,
    set_format,
)
from pipelines import storage
from pipelines.config import TokenizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_TOKEN = "<|endoftext|>"
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_log = logging.getLogger("mlmamba")


def load_or_train(config: TokenizerConfig, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The tokenizer that a config asks for.

    Args:
        config: names one or gives the size of a new one.
        texts: the train split's messages; read only to train.

    Returns:
        A transformers tokenizer. A new one has `<|endoftext|>` at id 0 (end and padding), `<|user|>`, `<|assistant|>`
        and `<image>` at 1 to 3. The same texts give the same tokenizer, to the byte.

    Raises:
        ValueError: the named tokenizer cannot be loaded, or has no end token to use, or lacks the marks of the chat
            format.
    """
    if not config.name:
        return _train(config.train_vocab_size, texts)
    tokenizer, chat = _load(config.name), FORMATS[config.chat]
    set_format(tokenizer, chat)
    tokenizer.chat_template = template_of(chat)  # its own would not be how conversations are written here
    fits = [one.name for one in FORMATS.values() if one.reserved and not missing_marks(tokenizer, one)]
    if fits and chat.name not in fits:
        _log.warning(
            "the tokenizer %s has the marks of the chat format %s; data.tokenizer.chat: %s would use them, it is %s",
            *(config.name, fits[0], fits[0], chat.name),
        )
    return tokenizer


def chat_format(uri: str) -> ChatFormat:
    """The chat format that a tokenizer in a folder was prepared for. Raises ValueError where it is not known."""
    content = json.loads(storage.read_bytes(storage.join(uri, CONFIG_FILE)))
    return format_named(content.get(CHAT_FORMAT, ML_MAMBA.name))


def save(tokenizer: "PreTrainedTokenizerFast", uri: str) -> str:
    """Write a tokenizer's files into a folder and return its digest (see `digest`)."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            storage.write_atomic(storage.join(uri, file.name), file.read_bytes())
    return digest(uri)


def digest(uri: str) -> str:
    """sha256 of the tokenizer.json in a folder, which alone decides how text becomes ids."""
    return hashlib.sha256(storage.read_bytes(storage.join(uri, TOKENIZER_FILE))).hexdigest()


class WorkerTokenizer:
    """What `mlmamba.conversation.encode` needs of a tokenizer, without transformers.

    It gives the ids of the transformers tokenizer that wrote the file, a few times faster, and spares each worker the
    import of transformers (tests/unit/pipelines/test_tokenizer.py compares the two).
    """

    def __init__(self, data: bytes, eos_token: str, chat: str = ML_MAMBA.name):
        """Take the bytes of a tokenizer.json, and what its tokenizer_config.json says."""
        self._tokenizer = Tokenizer.from_buffer(data)
        self._tokenizer.no_truncation()  # a saved tokenizer may carry both as settings
        self._tokenizer.no_padding()
        self.eos_token, self.init_kwargs = eos_token, {CHAT_FORMAT: chat}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`{"input_ids": [...]}` of one text."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def with_offsets(self, text: str) -> list[tuple[int, int]]:
        """Id and first character of every token of a text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    @cached_property
    def special_tokens(self) -> list[str]:
        """Every special token but the placeholder of images, which may stand in a message."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return sorted({token.content for token in added if token.special} - {IMAGE_TOKEN})

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token, None when there is no such token."""
        return self._tokenizer.token_to_id(token)


def _train(vocab_size: int, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast  # not at the top: workers do without it

    special = [END_TOKEN, *ML_MAMBA.marks, IMAGE_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be written, seen in training or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        extra_special_tokens=special[1:],
        clean_up_tokenization_spaces=False,
    )


def _load(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer {name!r}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer {name!r} has no tokenizer.json; use one with a fast version")
    if tokenizer.eos_token is None:
        if END_TOKEN not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer {name!r} has neither an eos token nor {END_TOKEN}; use one with an end token"
            )
        tokenizer.eos_token = END_TOKEN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [image]}, replace_extra_special_tokens=False)
    return tokenizer
