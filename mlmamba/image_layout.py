"""How an image becomes tokens: from its height and width alone, in plain arithmetic.

Three ways. The square, ML-Mamba's own: every image is resized to one square. Tiles (AnyRes; Liu et al. 2024,
LLaVA-NeXT): the square as a thumbnail, and beside it as many tiles of its size as the image fills, its aspect kept.
Native (NaFlex; Tschannen et al. 2025, arXiv 2502.14786): the image at its own size and aspect, in patches, between a
least and a largest number of tokens. Counts do not depend on whether an image lies on its side, so that what a file's
header declares is enough to know them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mlmamba.image_colours import PIXELS
from mlmamba.images import WIDEST, open_image, to_pixels

TokensPerImage = int | dict[str, int]
"""What decides the tokens of an image: their number, for the square, or the fields of an `ImageLayout` that counts."""
_TILED, _NATIVE = ("image_size", "tokens", "tiles"), ("patch", "merge", "pool", "min_tokens", "max_tokens")


@dataclass(frozen=True)
class CutImage:
    """One image as the encoder reads it."""

    pixels: np.ndarray
    """uint8 (u, 3, s, s), its squares; or, native, (u, 3 p p), its patches as timm's NaFlex encoders take them."""
    grid: tuple[int, int]
    """Height and width in tiles, or in patches."""
    tokens: int

    @property
    def squares(self) -> int:
        """Squares that it is cut into; 1 where it is read at its own size."""
        return len(self.pixels) if self.pixels.ndim == 4 else 1


@dataclass(frozen=True)
class ImageLayout:
    """How images of any size are cut, and how many tokens each becomes.

    Args:
        tokens: of one square.
        image_size: side of the square in pixels.
        tiles: most squares of an image besides its thumbnail; 1 for the thumbnail alone.
        patch: native: side of a patch in pixels. The fields above do not count then.
        merge, pool: sides in patches, and in merged patches, of what becomes one token.
        min_tokens, max_tokens: of a native image. It is made smaller where it has more, larger where it has fewer. The
            largest number is never passed; the least may be missed where the other is below twice as many.

    Raises:
        ValueError: the fields do not go together.
    """

    tokens: int = 1
    image_size: int = 384
    tiles: int = 1
    patch: int | None = None
    merge: int = 1
    pool: int = 1
    min_tokens: int = 1
    max_tokens: int = 1

    def __post_init__(self):
        for name in (*_TILED, *_NATIVE):
            value = getattr(self, name)
            if not (value is None and name == "patch") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} of an image is {value!r}; expected a whole number of at least 1")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"an image has at least {self.min_tokens} tokens (min_tokens) and at most {self.max_tokens} "
                "(max_tokens): lower one or raise the other"
            )

    @classmethod
    def of(cls, tokens_per_image: TokensPerImage, image_size: int = 384) -> "ImageLayout":
        """What `tokens_per_image`, as data sets and processors keep it, stands for.

        Raises:
            ValueError: it stands for nothing.
        """
        if not isinstance(tokens_per_image, Mapping):
            return cls(tokens_per_image, image_size)
        known = _NATIVE if "patch" in tokens_per_image else _TILED
        if (unknown := sorted(set(tokens_per_image) - set(known))) or len(tokens_per_image) < 3:
            what = f"has no {unknown[0]!r}" if unknown else f"is not said by {', '.join(tokens_per_image) or 'nothing'}"
            raise ValueError(
                f"tokens of an image {what}: give a number; or patch, merge, min_tokens and max_tokens (native); or "
                "image_size, tokens and tiles"
            )
        return cls(**tokens_per_image)

    @cached_property
    def per_image(self) -> TokensPerImage:
        """What `of` takes."""
        if self.fixed is not None:
            return self.fixed
        names = _NATIVE if self.patch else _TILED
        return {name: getattr(self, name) for name in names if name != "pool" or self.pool > 1}

    @property
    def fixed(self) -> int | None:
        """Tokens of every image; None where its size decides."""
        return self.tokens if self.patch is None and self.tiles == 1 else None

    @property
    def fewest(self) -> int:
        """Tokens of the image that has fewest."""
        return min(self.min_tokens, max(1, self.max_tokens // 2)) if self.patch else self.tokens

    @property
    def most(self) -> int:
        """Tokens of the image that has most."""
        return self.max_tokens if self.patch else self.tokens * _squares(self.tiles)

    def __str__(self) -> str:
        """How many tokens an image takes, for people."""
        if self.fixed is not None:
            return f"{self.fixed:,}"
        if self.patch:
            side = self.patch * self.merge * self.pool
            return f"{self.min_tokens:,} to {self.max_tokens:,}, one for each {side} x {side} pixels"
        return f"{self.tokens:,}, and as many for each of up to {self.tiles} tiles of {self.image_size} pixels"

    def count(self, height: int, width: int) -> int:
        """Tokens of an image of so many pixels."""
        if self.fixed is not None:
            return self.fixed
        rows, columns = self.grid(height, width)
        return self._tokens(rows, columns)

    def counts(self, pixel_values, spatial_shapes=None) -> list[int]:
        """Tokens of each image of a batch, as the model takes it; of each square of tiled ones."""
        if spatial_shapes is None:
            return [self.tokens] * len(pixel_values)
        return [self._tokens(rows, columns) for rows, columns in spatial_shapes.tolist()]

    def _tokens(self, rows: int, columns: int) -> int:
        if self.patch:
            return rows * columns // (self.merge * self.pool) ** 2
        return self.tokens * _squares(rows * columns)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image in tiles, or, native, in patches."""
        short, long = sorted((height, width))
        rows, columns = self._native(short, long) if self.patch else self._tiled(short, long)
        return (rows, columns) if height <= width else (columns, rows)

    def _native(self, short: int, long: int) -> tuple[int, int]:
        side = self.merge * self.pool
        high, wide = short / (side * self.patch), long / (side * self.patch)  # in tokens
        rows, columns = max(1, round(high)), max(1, round(wide))
        if not self.min_tokens <= rows * columns <= self.max_tokens:
            few, aspect = rows * columns < self.min_tokens, wide / high
            scale = math.sqrt((self.min_tokens if few else self.max_tokens) / (high * wide))
            low, left = (max(1, int(x * scale + 1e-9)) for x in (high, wide))
            near = [(r, c) for r in (low, low + 1) for c in (left, left + 1, self.max_tokens // r)]
            fits = [(r, c) for r, c in near if c and r * c <= self.max_tokens]
            enough = [(r, c) for r, c in fits if r * c >= self.min_tokens]
            # Of those beside the exact size, the nearest number of tokens; of equals, the nearest aspect.
            best = min if few and enough else max
            count = best(r * c for r, c in (enough if few and enough else fits))
            rows, columns = min(
                (grid for grid in fits if grid[0] * grid[1] == count),
                key=lambda grid: abs(math.log(grid[1] / grid[0] / aspect)),
            )
        return rows * side, columns * side

    def _tiled(self, short: int, long: int) -> tuple[int, int]:
        """The tiles that show most of the image's pixels, and of these the fewest."""
        size = self.image_size
        every = [
            (rows, columns) for columns in range(1, self.tiles + 1) for rows in range(1, self.tiles // columns + 1)
        ]

        def worth(tiles: tuple[int, int]) -> tuple:
            scale = min(tiles[0] * size / short, tiles[1] * size / long, 1.0)
            return round(scale, 9), -tiles[0] * tiles[1], tiles[1]

        return max(every, key=worth)

    def cut(self, image: Image.Image, pixels: int = PIXELS, grid: tuple[int, int] | None = None) -> CutImage:
        """An RGB image as the encoder reads it.

        Args:
            pixels: version of the rules of colour.
            grid: where it is not the image's own, of another image that this one is a part of.
        """
        grid = grid or self.grid(image.height, image.width)
        if self.patch:
            return CutImage(self._patches(image, pixels, grid), grid, self._tokens(*grid))
        squares = [to_pixels(image, self.image_size, pixels)]
        if grid != (1, 1):
            squares += self._tiles(image, pixels, grid)
        return CutImage(np.stack(squares), grid, self._tokens(*grid))

    def load(self, data: bytes, pixels: int = PIXELS) -> CutImage:
        """`cut` of an encoded image of a data set or test set. Raises ImageError."""
        return self.cut(open_image(data, WIDEST, pixels), pixels)

    def _patches(self, image: Image.Image, pixels: int, grid: tuple[int, int]) -> np.ndarray:
        """(u, p p 3), row by row."""
        (rows, columns), p = grid, self.patch
        values = to_pixels(image, (rows * p, columns * p), pixels).reshape(3, rows, p, columns, p)
        return np.ascontiguousarray(values.transpose(1, 3, 2, 4, 0).reshape(rows * columns, p * p * 3))

    def _tiles(self, image: Image.Image, pixels: int, grid: tuple[int, int]) -> list[np.ndarray]:
        """Tiles in reading order: the image as large as fits them, in the middle, black around it."""
        size = self.image_size
        height, width = grid[0] * size, grid[1] * size
        scale = min(height / image.height, width / image.width)
        inner = max(1, round(image.height * scale)), max(1, round(image.width * scale))
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        canvas = np.zeros((3, height, width), dtype=np.uint8)
        canvas[:, top : top + inner[0], left : left + inner[1]] = to_pixels(image, inner, pixels)
        return [
            canvas[:, row : row + size, column : column + size]
            for row in range(0, height, size)
            for column in range(0, width, size)
        ]

    def picture(self, image: CutImage) -> Image.Image:
        """What the encoder reads of an image, put together again; of a tiled one, its tiles without the thumbnail."""
        (rows, columns), p = image.grid, self.patch
        if p:
            blocks = image.pixels.reshape(rows, columns, p, p, 3).transpose(0, 2, 1, 3, 4)
            return Image.fromarray(np.ascontiguousarray(blocks.reshape(rows * p, columns * p, 3)))
        tiles = image.pixels[-rows * columns :].reshape(rows, columns, 3, self.image_size, self.image_size)
        whole = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * self.image_size, columns * self.image_size, 3)
        return Image.fromarray(np.ascontiguousarray(whole))

    def batch(self, images: Sequence[CutImage]) -> dict:
        """Images, or none, as the model takes them: `pixel_values` and, native, `spatial_shapes`, as tensors."""
        if images:
            return join(images)
        if self.patch:
            return join([CutImage(np.zeros((0, 3 * self.patch**2), np.uint8), (0, 0), 0)], 0)
        return join([CutImage(np.zeros((0, 3, self.image_size, self.image_size), np.uint8), (0, 0), 0)], 0)


def join(images: Sequence[CutImage], count: int | None = None) -> dict:
    """Images of one layout as the model takes them, see `ImageLayout.batch`; of these the first `count`."""
    import torch  # here, because preparation counts only, and its workers can do without

    batch = {"pixel_values": torch.from_numpy(np.concatenate([image.pixels for image in images]))}
    if images[0].pixels.ndim == 2:
        batch["spatial_shapes"] = torch.tensor([image.grid for image in images[:count]], dtype=torch.int64).view(-1, 2)
    return batch


def _squares(tiles: int) -> int:
    """Squares of an image of so many tiles: one tile is the thumbnail itself."""
    return 1 if tiles == 1 else 1 + tiles


def check_image_fields(vision) -> None:
    """Check how a VisionConfig, or a recipe's vision section, has images cut.

    Raises:
        ValueError: the fields do not go together.
    """
    if vision.max_tokens is None and vision.min_tokens != 1:
        raise ValueError(f"min_tokens is {vision.min_tokens} without max_tokens: give the largest number of tokens too")
    if vision.max_tokens is not None and vision.tiles > 1:
        raise ValueError(
            f"tiles is {vision.tiles} and max_tokens {vision.max_tokens}: an image is either tiled or read at its own "
            "size; leave one out"
        )
    if vision.max_tokens is not None and vision.grid is not None:
        raise ValueError(f"grid is {vision.grid} and max_tokens {vision.max_tokens}: each image has a grid of its own")
    most = 1 if vision.max_tokens is None else vision.max_tokens
    ImageLayout(1, vision.image_size, vision.tiles, None, vision.merge, 1, vision.min_tokens, most)
