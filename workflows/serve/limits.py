"""What one replica accepts. Every limit is reported to the client that meets it."""

from pydantic import ConfigDict, Field

from mlmamba.pictures import MAX_PIXELS
from pipelines.config import StrictModel


class Limits(StrictModel):
    """Limits of one replica."""

    model_config = ConfigDict(frozen=True)

    max_batch: int = Field(8, gt=0)
    """Requests that are answered together."""
    max_waiting: int = Field(64, gt=0)
    """Requests that wait for their turn; one more is told to come back later (429)."""
    max_tokens: int = Field(1024, gt=0)
    """Longest answer that a request may ask for."""
    default_tokens: int = Field(256, gt=0)
    """Longest answer of a request that does not say; at most max_tokens counts."""
    body_bytes: int = Field(48 * 2**20, gt=0)
    """Largest request body (413)."""
    picture_bytes: int = Field(20 * 2**20, gt=0)
    """Largest encoded picture."""
    picture_pixels: int = Field(MAX_PIXELS, gt=0)
    """Most pixels of a decoded picture."""
