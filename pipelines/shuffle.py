"""Shuffles that stay the same on every machine and with every version of numpy.

numpy does not promise that its generators give the same stream in the next version; packing plans and the order of
training rows must not change when a library is upgraded in the middle of a run. So the order here is that of the
indices' SplitMix64 hashes, which is arithmetic only.
"""

import hashlib

import numpy as np


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A pseudo-random order of range(n), int64 of shape (n,), that depends on n and the key alone."""
    return np.argsort(hashes(0, n, *key), kind="stable")


def hashes(start: int, stop: int, *key: int | str) -> np.ndarray:
    """The numbers by which `permutation` orders the indices from `start` to `stop`, uint64 (stop - start,)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    z = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(
        digest, dtype="<u8"
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
