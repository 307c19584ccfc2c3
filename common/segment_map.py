"""The masks of segments that do not overlap, as one map: at each pixel the row of its segment.

A stack of masks needs a byte a pixel for each segment, and four where points are sampled.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batch import Sample

# Shapes: N segments, P points, H W pixels.


@dataclass
class SegmentMap:
    """N masks that do not overlap. It has what mask losses ask of a stack (N, H, W).

    rows:  (H, W) int16, the segment of each pixel, or -1
    count: N
    """

    rows: Tensor
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the N masks (H, W) bool."""
        return (self.rows == n for n in range(self.count))

    def stack(self) -> Tensor:
        """Returns the masks (N, H, W) bool."""
        segments = torch.arange(self.count, dtype=self.rows.dtype, device=self.rows.device)
        return self.rows == segments[:, None, None]

    def merged(self, new_rows: Tensor, count: int) -> "SegmentMap":
        """Returns a map in which segment n is new_rows[n], so that several may become one.

        new_rows: (N,); count: number of the new segments
        """
        table = F.pad(new_rows, (0, 1), value=-1)  # of row -1, which is the last one
        rows = table[self.rows.long()]
        return SegmentMap(rows.to(self.rows), count)

    def sample(self, points: Tensor) -> Tensor:
        """Samples all masks bilinearly at points (P, 2), x and y in 0..1: (N, P) float32.

        The result is that of `point_sample`, but for rounding.
        """
        height, width = self.rows.shape
        x = points[:, 0] * width - 0.5
        y = points[:, 1] * height - 0.5
        sampled = points.new_zeros(self.count + 1, len(points))  # the last one is of row -1
        padded = F.pad(self.rows, (1, 1, 1, 1), value=-1)  # points outside are in no segment
        for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):
            column = x.floor() + right
            row = y.floor() + below
            near_x = 1 - (column - x).abs()
            near_y = 1 - (row - y).abs()
            weight = near_x * near_y
            column = column.clamp(-1, width) + 1
            row = row.clamp(-1, height) + 1
            segment = self._known(padded[row.long(), column.long()])
            sampled.scatter_add_(0, segment[None], weight[None])
        return sampled[:-1]

    def _known(self, rows: Tensor) -> Tensor:
        """Returns rows as int64, with N in place of -1."""
        rows = rows.long()
        return torch.where(rows < 0, self.count, rows)

    def areas(self, size: tuple[int, int]) -> Tensor:
        """Returns the masks resized by area to (h, w): (N, h, w) float32, shares of each cell.

        H and W are multiples of h and w.
        """
        down = self.rows.shape[0] // size[0]
        across = self.rows.shape[1] // size[1]
        cells = self.rows.unfold(0, down, down)
        cells = cells.unfold(1, across, across)  # (h, w, down, across)
        segments = self._known(cells.reshape(-1, down * across))
        pixels = torch.zeros(len(segments), self.count + 1, device=segments.device)
        one = torch.ones((), device=segments.device).expand_as(segments)
        pixels.scatter_add_(1, segments, one)
        shares = pixels[:, :-1] / (down * across)
        return shares.T.reshape(-1, *size)


def padded_masks(sample: Sample, size: tuple[int, int]) -> Tensor | SegmentMap:
    """Returns the masks of the N labels of a sample, padded at the right and at the bottom.

    They are a map if the sample has segments, otherwise a stack (N, H, W) bool.
    size: (H, W), of the batch. Raises ValueError if the sample has neither segments nor masks.
    """
    height, width = sample.size
    right = size[1] - width
    below = size[0] - height
    padding = (0, right, 0, below)
    if sample.segments is not None:
        rows = F.pad(sample.segments, padding, value=-1)
        return SegmentMap(rows, len(sample.labels))
    if sample.masks is None:
        raise ValueError(f"image '{sample.image_id}' of {sample.dataset} has no masks")
    return F.pad(sample.masks, padding)


def merge_rows(labels: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the new row of each segment if those of each merged class become one: (N,).

    The others keep their order, and the merged ones come last, ordered by class. Also returns the
    number of new rows, a scalar. labels: (N,); merged: (K,) bool
    """
    number = len(labels)
    alone = torch.arange(number, device=labels.device)
    key = torch.where(merged[labels], number + labels, alone)
    present = labels.new_zeros(number + len(merged))
    present.index_fill_(0, key, 1)
    places = present.cumsum(0) - 1
    return places[key], present.sum()
