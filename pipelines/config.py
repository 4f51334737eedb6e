"""Typed description of a data set: where the records come from, how they are tokenized and packed.

A new kind of source adds one model here, its name in `SourceConfig`, and one file in pipelines/sources.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SPLITS_TO_PACK = ("train", "validation")


class StrictModel(BaseModel):
    """Base of all config models: unknown keys are errors, and the string under a field documents it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class SourceBase(StrictModel):
    """What every source has."""

    name: str | None = Field(default=None, min_length=1)
    """Name in counts and tables. Default: the type. Give two sources of one type in one split different names."""

    @property
    def label(self) -> str:
        """The name that records of this source carry."""
        return self.name or self.type


class EasyVQASource(SourceBase):
    """The easy-vqa package: 4,000 + 1,000 rendered shapes with 48,248 questions."""

    type: Literal["easy_vqa"]
    """Kind of source."""
    split: Literal["train", "validation", "test"]
    """`validation` is taken out of the package's train split, `test` is the official test split."""
    validation_images: int = Field(default=300, ge=0, lt=4000)
    """Pictures of the package's train split that `validation` gets and `train` lacks."""


class LlavaSource(SourceBase):
    """Records in LLaVA's conversation format and a folder of pictures."""

    type: Literal["llava"]
    """Kind of source."""
    annotations: str
    """Path or URI of the JSON (one list) or JSONL file, also gzipped (.gz)."""
    images: str
    """Folder, path or URI, that the records' `image` paths are relative to."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first `limit` records of the file."""
    repeated_ids: Literal["quarantine", "number"] = "quarantine"
    """`number` keeps a record whose id came before and calls it id#2, id#3, ...: LLaVA-Instruct-150K uses the
    picture's id for up to three different conversations."""


SourceConfig = Annotated[EasyVQASource | LlavaSource, Field(discriminator="type")]


class TokenizerConfig(StrictModel):
    """Either an existing tokenizer or a new one trained on the train split."""

    name: str | None = Field(default=None, min_length=1)
    """transformers tokenizer name or folder, for example EleutherAI/gpt-neox-20b."""
    train_vocab_size: int | None = Field(default=None, ge=260, le=1_000_000)
    """Entries of a byte-level BPE trained on the train split's text (256 bytes and 4 special tokens are the least).
    A small corpus may run out of pairs to merge and give fewer: read the size from the tokenizer."""

    @model_validator(mode="after")
    def _exactly_one(self):
        if (self.name is None) == (self.train_vocab_size is None):
            raise ValueError(
                f"give exactly one of name (now {self.name!r}) and train_vocab_size (now {self.train_vocab_size!r})"
            )
        return self


class DataConfig(StrictModel):
    """One data set."""

    train: list[SourceConfig] = Field(min_length=1)
    """Sources of the training rows."""
    validation: list[SourceConfig] = []
    """Sources of the rows for the held-out loss. Empty: no such rows."""
    test: list[SourceConfig] = []
    """Sources that evaluation asks questions from. Never tokenized or packed here."""
    tokenizer: TokenizerConfig
    """How text becomes ids."""
    max_tokens: int = Field(ge=2)
    """Length of a packed row in tokens, image tokens included."""
    partition_records: int = Field(default=1000, ge=1)
    """Records in one unit of tokenizing work, which is what a killed run repeats at most (per CPU)."""
    shard_rows: int = Field(default=256, ge=1)
    """Packed rows in one shard, which is what one packing task holds in memory (encoded pictures included)."""
    max_quarantined: float = Field(default=0.01, ge=0, le=1)
    """Share of all records that may be set aside before the run fails."""
    too_long: Literal["cut", "quarantine"] = "cut"
    """What happens to a conversation over `max_tokens`: cut after the last answer that fits, or set aside."""

    @model_validator(mode="after")
    def _distinct_names(self):
        for split in ("train", "validation", "test"):
            labels = [source.label for source in getattr(self, split)]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"{split} has two sources called {twice[0]!r}: set a different `name` on each")
        return self
