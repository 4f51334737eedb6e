"""The recipe's `data` section: where the records come from, how they are tokenized and how they are packed.

`DataConfig` holds it all, the sources among it (source_config.py); `data_identity` is the digest that names the data
set of a config.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlmamba.image_layout import TokensPerImage
from mlmamba.images import FORMATS, MAX_ASPECT, MAX_PIXELS, MOST_PIXELS, ImageLimits
from pipelines.identity import Decides, StrictModel, identity
from pipelines.source_config import SourceConfig

SPLITS_TO_PACK = ("train", "validation")
SCHEMA_VERSION = 2
"""Version of the shards and the manifest. Sets of another version are made again."""


class TokenizerConfig(StrictModel):
    """Either an existing tokenizer or a new one trained on the train split."""

    name: str | None = Field(default=None, min_length=1)
    """transformers tokenizer name or folder, for example EleutherAI/gpt-neox-20b."""
    train_vocab_size: int | None = Field(default=None, ge=260, le=1_000_000)
    """Entries of a byte-level BPE trained on the train split's text (256 bytes and 4 special tokens are the least).
    A small corpus may run out of pairs to merge and give fewer: read the size from the tokenizer."""
    chat: Annotated[Literal["ml-mamba", "granite"], Decides.WHEN_SET] = "ml-mamba"
    """How conversations are written: as the released ML-Mamba has them, or as Granite 4.0 does, for its tokenizers,
    which have its marks as special tokens. Models that are trained on the data set are asked in the same way."""

    @model_validator(mode="after")
    def _exactly_one(self):
        if (self.name is None) == (self.train_vocab_size is None):
            raise ValueError(
                f"give exactly one of name (now {self.name!r}) and train_vocab_size (now {self.train_vocab_size!r})"
            )
        if self.name is None and self.chat != "ml-mamba":
            raise ValueError(
                f"chat is {self.chat!r}, and a tokenizer that is trained here has no such marks: give name"
            )
        return self


class ImageRules(StrictModel):
    """Which images are accepted. A record that shows another one is set aside."""

    formats: list[Literal["PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF"]] = Field(
        default=list(FORMATS), min_length=1
    )
    """Formats. Others are `image_format`. MPO is JPEG with several images; the first one counts."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MOST_PIXELS)
    """Most pixels, by the size that the file declares. More are `image_bomb`. Decoding takes some 8 bytes a pixel."""
    max_aspect: float = Field(default=MAX_ASPECT, ge=1)
    """The longer side over the shorter one, at most: models see a square. More is `image_aspect`."""

    def limits(self) -> ImageLimits:
        """The same for the gate that images go through."""
        return ImageLimits(tuple(self.formats), self.max_pixels, self.max_aspect)


class DataConfig(StrictModel):
    """One data set."""

    name: Annotated[str | None, Decides.RUN] = Field(default=None, pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Name of the data set's folder. Default: the recipe's name."""
    train: list[SourceConfig] = Field(min_length=1)
    """Sources of the training rows."""
    validation: list[SourceConfig] = Field(default=[])
    """Sources of the rows for the held-out loss and score, besides the share of training sources that is split off by
    their own `validation`. Without either there are no such rows."""
    test: Annotated[list[SourceConfig], Decides.RUN] = Field(default=[])
    """Sources that evaluation asks questions from. Never tokenized or packed here."""
    deduplicate: bool = True
    """Set aside every record whose images and text are, to the byte, those of an earlier record of its split, of
    whatever source. Repeats that a source's `weight` asks for stay."""
    exclude_evaluation_images: bool = True
    """Set aside every training record that shows an image of the recipe's own `validation` or `test` sources (the same
    file, to the byte)."""
    similar_evaluation_images: Annotated[float | None, Decides.WHEN_SET] = Field(default=None, ge=0.5, le=1)
    """Also set aside every training record with an image that looks like one of those that are kept out: re-encoded,
    resized, cropped by a tenth, grey, mirrored or with text on it. How much alike counts, up to 1; 0.85 is a start for
    photographs, see [how far it reaches](../explanation/near-duplicates.md). Without it only equal files count. It is
    not for drawings or rendered scenes, which look alike and are not the same."""
    exclude_images_of: list[SourceConfig] = Field(default=[])
    """More evaluation sets whose images training must not show. Only their images count, not their text."""
    tokenizer: TokenizerConfig
    """How text becomes ids."""
    max_tokens: int = Field(ge=2)
    """Length of a packed row in tokens, image tokens included."""
    partition_records: Annotated[int, Decides.RUN] = Field(default=1000, ge=1)
    """Records in one unit of tokenizing work, which is what a killed run repeats at most (per CPU). A tar is one unit
    whatever it holds, and a text that can be read from its start alone (.gz, CSV, COCO's and VQAv2's lists) is at most
    16."""
    shard_rows: int = Field(default=256, ge=1)
    """Packed rows in one shard, which is what one packing task holds in memory (encoded images included)."""
    max_quarantined: Annotated[float, Decides.RUN] = Field(default=0.01, ge=0, le=1)
    """Share of all records that may be set aside before the run fails. Duplicates and records that show an image of an
    evaluation set do not count: nothing is wrong with them."""
    too_long: Literal["cut", "quarantine"] = "cut"
    """What happens to a conversation over `max_tokens`: cut after the last answer that fits, or set aside."""
    images: Annotated[ImageRules, Decides.WHEN_SET] = ImageRules()
    """Which images are accepted for training. Evaluation asks about every image that can be decoded."""

    @model_validator(mode="after")
    def _distinct_names(self):
        for split in ("train", "validation", "test"):
            labels = [source.label for source in self.sources(split)]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"{split} has two sources called {twice[0]!r}: set a different `name` on each")
        return self

    @model_validator(mode="after")
    def _only_training_is_split(self):
        for field in ("validation", "test", "exclude_images_of"):
            for number, source in enumerate(getattr(self, field)):
                if source.validation:
                    raise ValueError(
                        f"{field}.{number}.validation is {source.validation:g}: only a source of train is split"
                    )
        return self

    def sources(self, split: str) -> list[SourceConfig]:
        """What a split's records come from: its own sources, and for validation those of train that are split, too."""
        own = list(getattr(self, split))
        return own + [source for source in self.train if source.validation] if split == "validation" else own

    @property
    def compares_looks(self) -> bool:
        """Whether training images are compared with those of evaluation sets by what they look like."""
        own = self.exclude_evaluation_images and (self.sources("validation") or self.test)
        return self.similar_evaluation_images is not None and bool(own or self.exclude_images_of)

    def evaluation_sets(self) -> dict[str, SourceConfig]:
        """The sources besides `validation` whose images training must not show, by a name for people."""
        own = {f"test/{source.label}": source for source in self.test} if self.exclude_evaluation_images else {}
        more = {f"exclude_images_of.{i}/{source.label}": source for i, source in enumerate(self.exclude_images_of)}
        return own | more


def data_identity(config: DataConfig, tokens_per_image: TokensPerImage, seed: int) -> str:
    """Return the sha256, in hex, of everything that decides a data set's content.

    It names the data set's folder and stands in its manifest. The test sources count only because their images are kept
    out of training, so they do not count when `exclude_evaluation_images` is off.
    """
    content = identity(config, Decides.RUN)
    excluded = {name: identity(source) for name, source in config.evaluation_sets().items()}
    text = json.dumps([SCHEMA_VERSION, tokens_per_image, seed, content, excluded], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
