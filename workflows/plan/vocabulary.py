"""The size of a vocabulary before there is a tokenizer: what the model's config needs of one, and no more."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import DataConfig

# Entries with `<image>` added: GPT-NeoX-20B has 50,277 (paper, section 1.5 of its code: rows 50,288 after rounding up).
KNOWN = {"EleutherAI/gpt-neox-20b": 50_278}


@dataclass(frozen=True)
class Vocabulary:
    """Stands for a tokenizer where only its size counts."""

    size: int
    eos_token_id: int = 0
    pad_token_id: int = 0

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, token: str) -> int:
        """The last id, which `<image>` has when it was added."""
        return self.size - 1


def vocabulary_of(data: DataConfig, folder: Path) -> tuple[Vocabulary, str]:
    """The vocabulary of a data set, and where its size comes from.

    Args:
        folder: the data set's; its tokenizer counts if it is prepared.
    """
    for file, origin in ((folder / "tokenizer" / "tokenizer.json", "prepared"), (_local(data), "tokenizer.json")):
        if file is not None and file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            ids = [*content["model"]["vocab"].values(), *(entry["id"] for entry in content.get("added_tokens", ()))]
            entries = len(set(ids))
            image = any(entry["content"] == "<image>" for entry in content.get("added_tokens", ()))
            return Vocabulary(entries if image else entries + 1), origin
    name = data.tokenizer.name
    if name in KNOWN:
        return Vocabulary(KNOWN[name]), f"known size of {name}"
    if name is None:
        return Vocabulary(data.tokenizer.train_vocab_size), "train_vocab_size; a small corpus gives fewer"
    return Vocabulary(KNOWN["EleutherAI/gpt-neox-20b"]), f"taken for GPT-NeoX's, because {name} is not prepared yet"


def _local(data: DataConfig) -> Path | None:
    return Path(data.tokenizer.name, "tokenizer.json") if data.tokenizer.name else None
