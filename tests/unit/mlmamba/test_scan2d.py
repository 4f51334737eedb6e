"""Scan orders: written out by hand on small grids, and undone by the merge on any grid."""

import random

import pytest
import torch

from mlmamba.scan2d import MERGES, SCANS, merge, orders


def test_bsm_reads_rows_forward_and_backward():
    # 0 1 2
    # 3 4 5
    # 6 7 8
    assert orders("bsm", 3, 3).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1, 0]]


def test_csm_reads_rows_and_columns_and_both_reversed():
    assert orders("csm", 3, 3).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 3, 6, 1, 4, 7, 2, 5, 8],
        [8, 7, 6, 5, 4, 3, 2, 1, 0],
        [8, 5, 2, 7, 4, 1, 6, 3, 0],
    ]


def test_orders_of_a_grid_wider_than_high():
    # 0 1 2
    # 3 4 5
    assert orders("bsm", 2, 3).tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert orders("csm", 2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_orders_of_a_grid_higher_than_wide():
    # 0 1
    # 2 3
    # 4 5
    assert orders("bsm", 3, 2).tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert orders("csm", 3, 2).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 2, 4, 1, 3, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 3, 1, 4, 2, 0],
    ]


@pytest.mark.parametrize("scan", SCANS)
def test_merging_what_was_only_reordered_returns_the_grid(scan):
    rng = random.Random(0)
    for height, width in [(1, 1), (1, 7), (5, 1), *((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(20))]:
        order = orders(scan, height, width)
        patches = torch.randn(2, height * width, 3)
        scanned = [patches[:, permutation] for permutation in order]
        assert torch.equal(merge(scanned, order), patches)
        assert torch.equal(merge(scanned, order, "sum"), len(order) * patches)
        for one, permutation in zip(scanned, order, strict=True):
            assert torch.equal(merge([one], permutation[None]), patches)


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_reads_every_patch_once(scan):
    for permutation in orders(scan, 4, 6):
        assert permutation.sort().values.tolist() == list(range(24))


def test_the_merge_is_the_mean_or_the_sum_at_each_place():
    order = orders("bsm", 1, 3)
    forward, backward = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[[10.0], [20.0], [30.0]]])
    assert merge([forward, backward], order).flatten().tolist() == [15.5, 11.0, 6.5]
    assert merge([forward, backward], order, "sum").flatten().tolist() == [31.0, 22.0, 13.0]


def test_unknown_scans_are_refused():
    with pytest.raises(ValueError, match="unknown scan 'zigzag'; choose one of bsm, csm"):
        orders("zigzag", 3, 3)


def test_unknown_merges_are_refused():
    assert MERGES == ("mean", "sum")
    with pytest.raises(ValueError, match="unknown merge 'max'; choose one of mean, sum"):
        merge([torch.zeros(1, 9, 1)], orders("bsm", 3, 3)[:1], "max")
