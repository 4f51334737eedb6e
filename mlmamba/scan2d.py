"""Orders in which a grid of patches is read: plain index functions, and the merge that undoes them.

A grid of height H and width W is stored row-major, patch (r, c) at index r * W + c. `orders(name, H, W)` returns one
permutation per scan; reading patch order[i] at step i and writing the result back to order[i] returns every patch to
its place (tests/unit/mlmamba/test_scan2d.py).

BSM, bidirectional (ML-Mamba figure 3; the released code): forward and backward over the rows.
CSM, cross-scan (ML-Mamba figure 3; never released, so this follows VMamba's cross scan, which VL-Mamba names as its
base): rows, columns, and both reversed. ML-Mamba's paper does not say how scans are merged. The default is the mean, as
in its released code: it keeps the scale of a single scan and avoids overflow in half precision. VMamba sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SCANS = ("bsm", "csm")
MERGES = ("mean", "sum")


def orders(scan: str, height: int, width: int) -> Tensor:
    """Permutations (k, height * width), int64: k = 2 for "bsm", 4 for "csm".

    Raises:
        ValueError: unknown scan name.
    """
    rows = torch.arange(height * width)
    if scan == "bsm":
        return torch.stack([rows, rows.flip(0)])
    if scan == "csm":
        columns = rows.view(height, width).T.flatten()
        return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
    raise ValueError(f"unknown scan {scan!r}; choose one of {', '.join(SCANS)}")


def orders_of(scan: str, grid: tuple[int, int] | Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """`orders` of a grid; or of several, whose patches stand one after the other in one row.

    Returns:
        Permutations (k, N), and of several grids the number of that which each place belongs to, int32 (N,), in every
        order the same; else None.
    """
    if isinstance(grid, tuple):
        return orders(scan, *grid), None
    sizes = torch.tensor([height * width for height, width in grid])
    starts = (sizes.cumsum(0) - sizes).tolist()
    each = [start + orders(scan, *own) for start, own in zip(starts, grid, strict=True)]
    return torch.cat(each, dim=1), torch.arange(len(grid), dtype=torch.int32).repeat_interleave(sizes)


def merge(scanned: list[Tensor], order: Tensor, how: str = "mean") -> Tensor:
    """Mean or sum of k scans, each (b, H*W, d) in its own order, put back in row-major order.

    Raises:
        ValueError: `how` is neither "mean" nor "sum".
    """
    total = 0
    for y, permutation in zip(scanned, order, strict=True):
        total = total + y.index_select(1, torch.argsort(permutation))
    return total / len(scanned) if check_merge(how) == "mean" else total


def check_merge(how: str) -> str:
    """The same name, or a ValueError."""
    if how not in MERGES:
        raise ValueError(f"unknown merge {how!r}; choose one of {', '.join(MERGES)}")
    return how
