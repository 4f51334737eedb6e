"""What one replica accepts. Every limit is reported to the client that meets it."""

from typing import ClassVar

from pydantic import ConfigDict, Field

from mlmamba.images import MAX_PIXELS
from pipelines.config import StrictModel

ROOT_PATH = "(/[^/?# ]+)*"
"""What a path under which a proxy offers the service looks like."""


class Limits(StrictModel):
    """Limits of one replica."""

    model_config = ConfigDict(frozen=True)
    RENAMED: ClassVar[dict[str, str]] = {
        "pictures": "images",
        "pictures_at_once": "images_at_once",
        "picture_bytes": "image_bytes",
        "picture_pixels": "image_pixels",
    }

    max_batch: int = Field(32, gt=0)
    """Answers that are made together: the number of slots, each as large as the model's recurrent state. Those of a
    hybrid have room for the keys and values of its longest sequence too."""
    max_waiting: int = Field(64, gt=0)
    """Requests that wait for their turn; one more is told to come back later (429)."""
    prefill_tokens: int = Field(512, gt=0)
    """Prompt tokens that are read between two steps of the running answers; a longer prompt is read in pieces."""
    busy_prefill_tokens: int | None = Field(None, gt=0)
    """At most so many of these while answers are running, whose next tokens wait meanwhile; absent: 128 on a CPU, and
    on a GPU no fewer."""
    images_at_once: int = Field(4, gt=0)
    """Images that are encoded together between two steps of the running answers; on a CPU one, while there are any."""
    state_cache_bytes: int = Field(2**30, ge=0)
    """Host memory for states that are kept after images, prompts and answers, so that what comes after them is all that
    need be read. Each key holder (without keys: each address) finds only what it asked itself. 0 keeps none."""
    deadline_seconds: float = Field(300, gt=0)
    """Longest time from a request's arrival in the queue to the end of its answer (504)."""
    max_tokens: int = Field(1024, gt=0)
    """Longest answer that a request may ask for."""
    max_model_len: int | None = Field(None, gt=0)
    """Longest prompt in tokens, placeholders of images included; absent, and at most: what the model was made for."""
    default_tokens: int = Field(256, gt=0)
    """Longest answer of a request that does not say; at most max_tokens counts."""
    max_choices: int = Field(8, gt=0)
    """Most answers to one request (`n`)."""
    body_bytes: int = Field(48 * 2**20, gt=0)
    """Largest request body (413)."""
    body_seconds: float = Field(60, gt=0)
    """Longest time that a request's body may take to arrive (408)."""
    arriving: int = Field(64, gt=0)
    """Bodies that may be on their way at once; where one more comes, the one that stands still is given up (408)."""
    held_bytes: int = Field(512 * 2**20, gt=0)
    """Bodies held at once, together; one more byte is told to come back later (429)."""
    text_bytes: int = Field(64 * 2**10, gt=0)
    """Longest text of a request, all its messages together, in UTF-8."""
    messages: int = Field(1024, gt=0)
    """Most messages of a request, and most parts of all of them together."""
    schema_bytes: int = Field(16 * 2**10, gt=0)
    """Largest JSON schema, or list of words to choose from, that gives an answer its form."""
    images: int = Field(16, gt=0)
    """Most images of one request, where its prompt has room for them."""
    image_bytes: int = Field(20 * 2**20, gt=0)
    """Largest encoded image."""
    image_pixels: int = Field(MAX_PIXELS, gt=0)
    """Most pixels of an image, as its file declares them."""
    request_pixels: int = Field(2 * MAX_PIXELS, gt=0)
    """Most pixels of a request's images together."""
    fetch_seconds: float = Field(10, gt=0)
    """Longest time to fetch one image from an allowed address."""
