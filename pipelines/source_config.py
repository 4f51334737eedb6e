"""A model for each kind of source that a recipe's `data` lists, and what all of them have."""

import os
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.identity import Decides, StrictModel


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
    validation: Annotated[float, Decides.WHEN_SET] = Field(default=0.0, ge=0, lt=1)
    """Of a source of `train`: about this share of its images, with every record that shows one first, goes to the
    validation split and not to training. The digest of the image's file decides, so that an image is on one side
    whatever it is called and however the corpus grows; records without an image go by their text. The validation split
    has each record once, whatever the weight. To find them the source is listed, and its images are read, twice."""
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
        return self.model_dump(mode="json", exclude={"limit", "weight", "seed", "repeated_ids", "validation"})


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
    question_type: Annotated[str | None, Decides.WHEN_SET] = None
    """Field of a record that names the kind of its questions, or a list with one for each: evaluation reports
    accuracy by it."""


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


def _absolute(path: str | list[str] | None) -> str | list[str] | None:
    if path is None:
        return None
    if isinstance(path, list):
        return [_absolute(one) for one in path]
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
