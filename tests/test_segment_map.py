"""Masks that do not overlap, as one map."""

import pytest
import torch
from torch.nn import functional as F

from common.point_matching import point_sample, sample_masks
from common.segment_map import SegmentMap, merge_rows


@pytest.fixture
def segments() -> SegmentMap:
    torch.manual_seed(0)
    return SegmentMap(torch.randint(-1, 4, (8, 12)).short(), 5)  # the last one has no pixel


def test_masks(segments):
    masks = segments.stack()
    assert len(segments) == len(masks) == 5 and masks.dtype == torch.bool
    for n, mask in enumerate(segments):
        assert torch.equal(mask, segments.rows == n) and torch.equal(mask, masks[n])
    assert not masks[4].any()


def test_samples_are_those_of_the_masks(segments):
    points = 1.2 * torch.rand(1, 200, 2) - 0.1  # also outside
    sampled = sample_masks(segments, points)
    torch.testing.assert_close(sampled, point_sample(segments.stack(), points))
    assert sampled.any(1).tolist() == [True] * 4 + [False]


def test_areas_are_those_of_the_masks(segments):
    masks = segments.stack()[:, None].float()
    wanted = F.interpolate(masks, (2, 4), mode="area")[:, 0]
    torch.testing.assert_close(segments.areas((2, 4)), wanted)


def test_merged_segments(segments):
    labels = torch.tensor([2, 0, 1, 2, 2])
    new_rows, count = merge_rows(labels, torch.tensor([False, False, True]))
    assert new_rows.tolist() == [2, 0, 1, 2, 2] and count == 3
    masks = segments.stack()
    wanted = torch.stack([masks[1], masks[2], masks[[0, 3, 4]].any(0)])
    merged = segments.merged(new_rows, 3)
    assert torch.equal(merged.stack(), wanted) and merged.rows.dtype == segments.rows.dtype


def test_merged_classes_are_ordered_and_come_last():
    labels = torch.tensor([3, 1, 0, 1, 2])
    new_rows, count = merge_rows(labels, torch.tensor([False, True, False, True]))
    assert new_rows.tolist() == [3, 2, 0, 2, 1] and count == 4
    empty, none = merge_rows(labels[:0], torch.ones(4, dtype=torch.bool))
    assert len(empty) == 0 and none == 0
