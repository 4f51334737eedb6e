"""The recipe's `data` section: where the records come from, how they are tokenized and how they are packed.

One model for each kind of source comes first, then `DataConfig`, which holds them, and `data_identity`, the digest that
names the data set of a config.
"""

import hashlib
import json
import os
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mlmamba.images import FORMATS, MAX_ASPECT, MAX_PIXELS, MOST_PIXELS, ImageLimits
from pipelines.identity import Decides, StrictModel, identity

SPLITS_TO_PACK = ("train", "validation")
SCHEMA_VERSION = 2
"""Version of the shards and the manifest. Sets of another version are made again."""


class SourceBase(StrictModel):
    """What every source has."""

    PATHS: ClassVar[tuple[str, ...]] = ()
    """Fields that hold paths."""

    name: str | None = Field(default=None, min_length=1)
    """Name in counts and tables. Default: the type. Give two sources of one type in one split different names."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first `limit` records of the source."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often the source's records are used: 0.5 keeps half of them (chosen at random, always the same half), 2 lists
    them twice, 2.5 twice and then half of them. Repeated records get ids that end in @2, @3, ..."""
    seed: int = 0
    """Another number keeps another share of a source whose weight is not whole."""
    repeated_ids: Literal["quarantine", "number"] = "quarantine"
    """`number` keeps a record whose id came before and calls it id#2, id#3, ...: LLaVA's files use the image's id for
    several conversations. Otherwise the later ones are set aside as duplicate_id."""
    links: Annotated[Literal["inside", "anywhere"], Decides.WHEN_SET] = "inside"
    """Where symbolic links in a folder of images may lead. Those that leave the folder set their record aside; with
    `anywhere` they are followed, which a cache of downloads or a folder put together of links needs."""

    @property
    def label(self) -> str:
        """The name that records of this source carry."""
        return self.name or self.type

    def absolute(self) -> "SourceBase":
        """Return the same source with its local paths made absolute, for workers that run in another folder."""
        return self.model_copy(update={field: _absolute(getattr(self, field)) for field in self.PATHS})

    def reader_fields(self) -> dict:
        """The fields that decide what a listed record contains, without those that choose which records are listed."""
        return self.model_dump(mode="json", exclude={"limit", "weight", "seed", "repeated_ids"})


class TextFields(StrictModel):
    """Where a record's text stands. Give `conversation`, or `question` and `answer`, or `caption`."""

    conversation: str | None = None
    """Field with a list of messages: {from, value} as LLaVA has them, {role, content}, or {user, assistant}."""
    question: str | None = None
    """Field with a question about the images."""
    answer: str | None = None
    """Field with its answer."""
    caption: str | None = None
    """Field with a description of the image, the answer to one of the `prompts`. Of a list of descriptions each makes a
    record, id/1, id/2 and so on."""
    prompts: list[str] = Field(default=["Describe the image."], min_length=1)
    """What the user asks for a caption. Of several, the record's id decides which."""
    no_placeholders: Literal["quarantine", "first_turn"] = "quarantine"
    """What happens to a conversation with images and no `<image>` in its text: it is set aside, or its first turn
    shows all of them. (A question and a prompt always show them.)"""
    system: Annotated[Literal["quarantine", "drop", "first_turn"], Decides.WHEN_SET] = "quarantine"
    """What happens to a conversation that begins with a system message: it is set aside, the message is left out, or
    it becomes the first paragraph of the first question, as in serving."""
    text_only: Annotated[bool, Decides.WHEN_SET] = False
    """Records without an image are wanted, as text. Otherwise they are set aside as image_missing. (An empty list of
    images beside a conversation says itself that there is none.)"""

    @model_validator(mode="after")
    def _one_text(self):
        given = [name for name in ("conversation", "question", "caption") if getattr(self, name) is not None]
        if len(given) != 1 or (self.question is None) != (self.answer is None):
            raise ValueError(
                "give conversation, or question and answer, or caption "
                f"(now {', '.join([*given, *(['answer'] if self.answer else [])]) or 'none'})"
            )
        return self


class EasyVQASource(SourceBase):
    """The easy-vqa package: 4,000 + 1,000 rendered shapes with 48,248 questions."""

    type: Literal["easy_vqa"]
    """Kind of source."""
    split: Literal["train", "validation", "test"]
    """`validation` is taken out of the package's train split, `test` is the official test split."""
    validation_images: int = Field(default=300, ge=0, lt=4000)
    """Images of the package's train split that `validation` gets and `train` lacks."""


class LlavaSource(SourceBase):
    """Records in LLaVA's conversation format, and their images in a folder or a zip."""

    PATHS = ("annotations", "images")

    type: Literal["llava"]
    """Kind of source."""
    annotations: str
    """Path or URI of the JSON (one list) or JSONL file, also gzipped (.gz). Messages stand under `conversations` or
    `messages`; an entry without an `id` gets its number."""
    images: str | None = None
    """Folder or .zip file, path or URI, that the records' `image` (or `images`) paths are relative to. A zip is not
    unpacked. Not needed where the messages hold their images as data: URIs."""
    no_placeholders: Literal["quarantine", "first_turn"] = "quarantine"
    """What happens to a record with images and no `<image>` in its text: it is set aside, or its first turn shows all
    of them."""
    system: Annotated[Literal["quarantine", "drop", "first_turn"], Decides.WHEN_SET] = "quarantine"
    """What happens to a conversation that begins with a system message: it is set aside, the message is left out, or
    it becomes the first paragraph of the first question, as in serving."""
    prompts: Annotated[list[str], Decides.WHEN_SET] = Field(default=[])
    """What the user asks where a message is `<image>` alone; of several, the record's id decides which. Without any,
    such records are set aside as empty_turn."""
    text_only: Annotated[bool, Decides.WHEN_SET] = False
    """Records that name an image or video under a key that is not read, or have null for one, are wanted as text.
    Otherwise they are set aside as image_missing. Records without any such key are text in either case."""


class QuestionsSource(SourceBase):
    """One question about one image per entry, in JSON; LRV-Instruct is published so."""

    PATHS = ("annotations", "images")

    type: Literal["questions"]
    """Kind of source."""
    annotations: str
    """Path or URI of the JSON (one list) or JSONL file, also gzipped (.gz)."""
    images: str
    """Folder or .zip file, path or URI."""
    image: str = "image_id"
    """Field that names the image. An entry without it is set aside as image_missing, unless `text_only` is true."""
    image_suffix: str = ""
    """What the name lacks to be a file's, for example .jpg."""
    question: str = "question"
    """Field with the question."""
    answer: str = "answer"
    """Field with the answer."""
    question_type: str | None = None
    """Field with the kind of question, which evaluation reports accuracy by."""
    id: str | None = None
    """Field with the record's id. Default: the image's name."""
    text_only: Annotated[bool, Decides.WHEN_SET] = False
    """Entries without an image are wanted, as text."""


class CocoCaptionsSource(SourceBase):
    """COCO's captions: a JSON object with the lists `images` and `annotations`. Each caption is a record."""

    PATHS = ("annotations", "images")

    type: Literal["coco_captions"]
    """Kind of source."""
    annotations: str
    """Path or URI of the file, for example captions_train2017.json, also gzipped (.gz)."""
    images: str
    """Folder or .zip file, path or URI, that holds the `file_name` of each image."""
    prompts: list[str] = Field(default=["Describe the image."], min_length=1)
    """What the user asks. Of several, the record's id decides which."""


class Vqav2Source(SourceBase):
    """VQAv2: questions and, in another file, their annotations. The most frequent answer is learned."""

    PATHS = ("questions", "annotations", "images")

    type: Literal["vqav2"]
    """Kind of source."""
    questions: str
    """Path or URI of the file of questions, also gzipped (.gz)."""
    annotations: str
    """Path or URI of the file of annotations, also gzipped (.gz)."""
    images: str
    """Folder or .zip file, path or URI."""
    image_name: str = "COCO_train2014_{image_id:012d}.jpg"
    """Name of an image, as a Python format of its number."""

    @model_validator(mode="after")
    def _a_format(self):
        try:
            self.image_name.format(image_id=1)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"image_name is {self.image_name!r}, expected a name with {{image_id}} in it, as {{image_id:012d}}.jpg"
            ) from error
        return self


class CaptionsSource(SourceBase):
    """A CSV or TSV table of images and their captions."""

    PATHS = ("table", "images")

    type: Literal["captions"]
    """Kind of source."""
    table: str
    """Path or URI of the .csv or .tsv file, also gzipped (.gz). In a .tsv a quotation mark is a character like any
    other, in a .csv it quotes."""
    images: str
    """Folder or .zip file, path or URI, that the table's paths are relative to."""
    columns: list[str] | None = None
    """Names of the columns of a table whose first line is not a header."""
    image: str = "image"
    """Column with the image's path."""
    caption: str = "caption"
    """Column with the caption."""
    id: str | None = None
    """Column with the record's id. Default: the number of its line."""
    prompts: list[str] = Field(default=["Describe the image."], min_length=1)
    """What the user asks. Of several, the record's id decides which."""


class WebDatasetSource(SourceBase, TextFields):
    """Tar shards as the webdataset package writes them: files with one name before the first dot are one sample.

    Files with an image's ending are the sample's images (k.jpg, or k.0.jpg, k.1.jpg, ...). Text fields are named by
    the file's ending (`caption: txt`) and, within a JSON file, the key (`conversation: json.conversations`).
    """

    PATHS = ("shards",)

    type: Literal["webdataset"]
    """Kind of source."""
    shards: str | list[str]
    """Paths or URIs of uncompressed .tar files, with {000..123}, {a,b}, * and ? as in a shell."""


class ParquetSource(SourceBase, TextFields):
    """Parquet files with images inside, as Hugging Face datasets writes them."""

    PATHS = ("files",)

    type: Literal["parquet"]
    """Kind of source."""
    files: str | list[str]
    """Paths or URIs of .parquet files, with {000..123}, {a,b}, * and ? as in a shell."""
    image: str | None = "image"
    """Column with the encoded image: {bytes, path}, binary, or a list of either. null for text only."""
    id: str | None = None
    """Column with the record's id. Default: file and number of the row."""


SourceConfig = Annotated[
    EasyVQASource
    | LlavaSource
    | QuestionsSource
    | CaptionsSource
    | CocoCaptionsSource
    | Vqav2Source
    | WebDatasetSource
    | ParquetSource,
    Field(discriminator="type"),
]


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
    """Sources of the rows for the held-out loss. Empty: no such rows."""
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
    """Records in one unit of tokenizing work, which is what a killed run repeats at most (per CPU)."""
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
            labels = [source.label for source in getattr(self, split)]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"{split} has two sources called {twice[0]!r}: set a different `name` on each")
        return self

    @property
    def compares_looks(self) -> bool:
        """Whether training images are compared with those of evaluation sets by what they look like."""
        own = self.exclude_evaluation_images and (self.validation or self.test)
        return self.similar_evaluation_images is not None and bool(own or self.exclude_images_of)

    def evaluation_sets(self) -> dict[str, SourceConfig]:
        """The sources besides `validation` whose images training must not show, by a name for people."""
        own = {f"test/{source.label}": source for source in self.test} if self.exclude_evaluation_images else {}
        more = {f"exclude_images_of.{i}/{source.label}": source for i, source in enumerate(self.exclude_images_of)}
        return own | more


def data_identity(config: DataConfig, tokens_per_image: int, seed: int) -> str:
    """Return the sha256, in hex, of everything that decides a data set's content.

    It names the data set's folder and stands in its manifest. The test sources count only because their images are kept
    out of training, so they do not count when `exclude_evaluation_images` is off.
    """
    content = identity(config, Decides.RUN)
    excluded = {name: identity(source) for name, source in config.evaluation_sets().items()}
    text = json.dumps([SCHEMA_VERSION, tokens_per_image, seed, content, excluded], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _absolute(path: str | list[str] | None) -> str | list[str] | None:
    if path is None:
        return None
    if isinstance(path, list):
        return [_absolute(one) for one in path]
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
