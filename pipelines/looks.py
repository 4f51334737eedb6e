"""What an image looks like, as 64 bytes that stay nearly the same when it is re-encoded, resized or made grey.

The luminance on 32 x 32 fields, each field's distance from the median cut off at two median deviations (so that a
caption printed over the image does not decide), and of that the lowest 8 x 8 coefficients of a discrete cosine
transform without the mean, those of finer detail weighted up by their frequency. The key is that vector, as int8. How
much two images look alike is the cosine of the angle between their keys. This goes back to the perceptual hash of
Zauner ("Implementation and benchmarking of perceptual image hash functions", 2010), with the coefficients kept in place
of their signs: one number decides, and a crop can be told from another image.

Mirroring turns the sign of every odd coefficient across. A crop moves everything, so an image that is looked for gets a
key for each of 17 windows, the whole and 16 of 0.9 of its sides. An image without contrast has no key: any other one
without it looks the same.
"""

import numpy as np
from PIL import Image

LOOK_BYTES = 64
WINDOWS = [(1.0, 0.0, 0.0), *((0.9, x / 3, y / 3) for x in range(4) for y in range(4))]
"""Of an image that is looked for: share of the sides, and where the rest is cut off (0: at the right, or below)."""
_SIDE, _KEPT = 32, 8
_FLAT = 10.0  # standard deviation of the luminance, of 255, from which an image has contrast
_CUT = 2.0  # median deviations
_GRID = np.arange(_KEPT)
_COSINES = np.cos(np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * _GRID[:, None]).astype(np.float32)
_COSINES *= np.sqrt(np.where(_GRID == 0, 1, 2) / _SIDE).astype(np.float32)[:, None]
_WEIGHTS = np.hypot(_GRID[:, None], _GRID[None, :]).astype(np.float32)
_MIRRORED = np.tile((-1.0) ** _GRID, _KEPT).astype(np.float32)


def fields(image: Image.Image, window: tuple[float, float, float] = WINDOWS[0]) -> bytes:
    """The luminance of an image, or of one of its `WINDOWS`, on 32 x 32 fields: what `keys` takes.

    Args:
        image: RGB or grey, of any size: an eighth of the real one is enough, as validation decodes a JPEG.
        window: share of the sides, and the place.
    """
    side, right, below = window
    width, height = image.size
    left, top = width * (1 - side) * right, height * (1 - side) * below
    box = (left, top, left + width * side, top + height * side)
    return image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX, box).tobytes()


def all_fields(image: Image.Image) -> bytes:
    """The fields of all `WINDOWS` of an image that is looked for, one after the other."""
    grey = image.convert("L")
    return b"".join(fields(grey, window) for window in WINDOWS)


def keys(every: list[bytes]) -> list[bytes]:
    """The keys of images, from `fields` or `all_fields`; b"" for what has no contrast. Many at once are quick."""
    counts = [len(one) // _SIDE**2 for one in every]
    whole = np.frombuffer(b"".join(every), dtype=np.uint8).reshape(-1, _SIDE**2)
    made = [key for start in range(0, len(whole), _AT_ONCE) for key in _keys(whole[start : start + _AT_ONCE])]
    ends = np.cumsum(counts).tolist()
    return [b"".join(made[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def _keys(whole: np.ndarray) -> list[bytes]:
    flat = whole.astype(np.float32)
    contrast = flat.std(axis=1) >= _FLAT
    flat -= _middle(flat)
    most = np.maximum(_CUT * _middle(np.abs(flat)), 1e-3)
    np.maximum(np.minimum(flat, most, out=flat), -most, out=flat)
    made = (_COSINES @ flat.reshape(-1, _SIDE, _SIDE) @ _COSINES.T * _WEIGHTS).reshape(-1, LOOK_BYTES)
    greatest = np.abs(made).max(axis=1, keepdims=True)
    made = np.rint(made * (127 / np.maximum(greatest, 1e-9))).astype(np.int8)
    there = contrast & made.any(axis=1)
    return [made[i].tobytes() if there[i] else b"" for i in range(len(made))]


def _middle(flat: np.ndarray) -> np.ndarray:
    """The median of each row, (n, 1); of an even number the upper one of two, which takes half the time."""
    place = flat.shape[1] // 2
    return np.partition(flat, place, axis=1)[:, place : place + 1]


def vectors(keys: bytes) -> np.ndarray:
    """Keys as unit vectors (n, 64), float32."""
    found = np.frombuffer(keys, dtype=np.int8).reshape(-1, LOOK_BYTES).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


class Wanted:
    """Images that are looked for among others.

    Args:
        known: the keys of each, of `all_fields`. It takes 4.4 kilobytes of memory an image.
    """

    def __init__(self, known: list[bytes]):
        self._owner = np.repeat(np.arange(len(known)), [len(key) // LOOK_BYTES for key in known])
        self._vectors = vectors(b"".join(known))

    def find(self, asked: list[bytes], least: float) -> list[tuple[int, int, float]]:
        """The images that look like one that is looked for: place in `asked`, place of the other, how much alike.

        Args:
            asked: the keys of others, of `fields`; b"" for none.
            least: how much alike they must be, up to 1.
        """
        places = [place for place, key in enumerate(asked) if key]
        found = []
        if not len(self._owner):
            return found
        for start in range(0, len(places), _AT_ONCE):
            part = places[start : start + _AT_ONCE]
            own = vectors(b"".join(asked[place] for place in part))
            alike = np.maximum(own @ self._vectors.T, (own * _MIRRORED) @ self._vectors.T)
            best = alike.argmax(axis=1)
            found += [
                (place, int(self._owner[one]), float(alike[row, one]))
                for row, (place, one) in enumerate(zip(part, best, strict=True))
                if alike[row, one] >= least
            ]
        return found


_AT_ONCE = 64  # images compared together: with 10,000 that are looked for, 90 MB
