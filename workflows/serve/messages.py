"""Messages of a request to what the model knows: alternating turns, and their images in reading order.

The model's format has no system prompt, so the text of leading system messages becomes the first paragraphs of the
first user turn. Images stand before their turn's text, wherever among its parts they were sent.
"""

import base64
import binascii
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import cached_property

from PIL import Image

from mlmamba.conversation import Turn
from mlmamba.images import ImageError, ImageLimits, image_size, open_image
from workflows.serve.openai import ApiError, Message, bad_request
from workflows.serve.options import Limits
from workflows.serve.remote_images import Fetcher, FetchError

SYSTEM_ROLES = ("system", "developer")
_LARGE_PIXELS = 16_000_000
_one_large_image = threading.Lock()  # each takes from 64 MB to half a GB until it has been resized


def read_messages(
    messages: list[Message],
    limits: Limits,
    max_images: int,
    fetcher: Fetcher | None = None,
    gone: Callable[[], bool] = lambda: False,
) -> "tuple[list[Turn], SentImages]":
    """Turns of a request, and its images, each decoded when it is asked for: together they could fill the memory.

    Args:
        messages: as sent.
        limits: the image limits.
        max_images: as many as a prompt may show.
        fetcher: for images that are not sent along; None refuses them.
        gone: whether the client has left; asked between two images.

    Raises:
        ApiError: 400; roles are out of order, a turn is empty, or (while the images are taken) an image cannot be
            used.
    """
    turns = _turns(messages)
    count = sum(turn.images for turn in turns)
    if count > max_images:  # before any is decoded
        raise bad_request(
            f"the messages show {count} images, the model has room for {max_images}",
            "messages",
            "too_many_images",
        )
    return turns, SentImages(messages, limits, fetcher, gone)


class SentImages:
    """The images of a request. All are read and their declared sizes looked at before the first is decoded, which takes
    time and memory. Iterating over them decodes one after the other."""

    def __init__(self, messages: list[Message], limits: Limits, fetcher: Fetcher | None, gone: Callable[[], bool]):
        self._messages, self._limits, self._fetcher, self._gone = messages, limits, fetcher, gone

    @cached_property
    def _read(self) -> list[tuple[str, bytes, tuple[int, int]]]:
        read, pixels, limits = [], 0, self._limits
        for i, message in enumerate(self._messages):
            for j, part in enumerate(message.content):
                if part.image_url is not None and part.type == "image_url":
                    param = f"messages[{i}].content[{j}].image_url.url"
                    _check_there(self._gone)
                    data = _data(part.image_url.url, limits, self._fetcher, param)
                    size = _declared_size(data, limits, param)
                    pixels += size[0] * size[1]
                    read.append((param, data, size))
        if pixels > limits.request_pixels:
            raise bad_request(
                f"the images have {pixels:,} pixels together, over the limit of {limits.request_pixels:,}; send "
                "smaller",
                "messages",
                "images_too_large",
            )
        return read

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height that each declares. Raises ApiError."""
        return [size for _, _, size in self._read]

    def __iter__(self) -> Iterator[Image.Image]:
        for param, data, (width, height) in self._read:
            with _one_large_image if width * height > _LARGE_PIXELS else contextlib.nullcontext():
                _check_there(self._gone)
                yield _decode(data, self._limits, param)


def _check_there(gone: Callable[[], bool]) -> None:
    if gone():
        raise ApiError(499, "the client has left")


def _turns(messages: list[Message]) -> list[Turn]:
    system = [message for message in messages if message.role in SYSTEM_ROLES]
    if messages[: len(system)] != system:
        raise bad_request("system messages must come before all others", "messages", "role_order")
    preface = [_text(message) for message in system]
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        shown = sum(part.type == "image_url" for part in message.content)
        if shown and message.role != "user":
            raise bad_request(f"messages[{i}]: only user messages may show images", f"messages[{i}].content")
        if i < len(system):
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if message.role != expected:
            raise bad_request(
                f"messages[{i}] has role {message.role!r}, expected {expected!r}: user and assistant take turns",
                f"messages[{i}].role",
                "role_order",
            )
        text = _text(message)
        if not text and not shown and message.role == "user":
            raise bad_request(f"messages[{i}] has neither text nor image", f"messages[{i}].content", "empty_message")
        own = "" if turns else "\n\n".join(filter(None, preface))
        turns.append(Turn(message.role, f"{own}\n\n{text}" if own else text, shown, len(own)))
    if not turns or turns[-1].role != "user":
        raise bad_request("the last message must be the user's", "messages", "role_order")
    return turns


def _text(message: Message) -> str:
    return "\n".join(part.text for part in message.content if part.type == "text" and part.text).strip()


def _data(url: str, limits: Limits, fetcher: Fetcher | None, param: str) -> bytes:
    """Encoded image behind a data: URI, or an address where fetching is allowed."""
    if url[:5].lower() == "data:":
        return _embedded(url, limits, param)
    if not fetcher or not url.lower().startswith(("http://", "https://")):
        raise bad_request(
            f"{param}: images are not fetched from the network; send a data: URI (data:image/png;base64,...)",
            param,
            "remote_image",
        )
    try:
        return fetcher.fetch(url)
    except FetchError as error:
        raise bad_request(f"{param}: {error}", param, error.code) from error


def _embedded(url: str, limits: Limits, param: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise bad_request(f"{param}: not of the form data:image/TYPE;base64,DATA", param, "invalid_data_uri")
    if len(body) * 3 // 4 > limits.image_bytes + 2:
        raise bad_request(
            f"{param}: the image has about {len(body) * 3 // 4:,} bytes, over the limit of {limits.image_bytes:,}",
            param,
            "image_too_large",
        )
    try:
        return base64.b64decode("".join(body.split()), validate=True)  # line breaks are what `base64` writes
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{param}: the data is not base64 ({error})", param, "invalid_base64") from error


def _declared_size(data: bytes, limits: Limits, param: str) -> tuple[int, int]:
    """Width and height of an encoded image as its header declares them."""
    try:
        return image_size(data, ImageLimits(max_pixels=limits.image_pixels))
    except ImageError as error:
        raise bad_request(f"{param}: {error}", param, error.reason) from error


def _decode(data: bytes, limits: Limits, param: str) -> Image.Image:
    try:
        return open_image(data, ImageLimits(max_pixels=limits.image_pixels))
    except ImageError as error:
        raise bad_request(f"{param}: {error}", param, error.reason) from error
