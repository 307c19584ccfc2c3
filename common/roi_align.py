"""RoIAlign (Mask R-CNN, arXiv 1703.06870) of regions that lie on several feature maps.

`roi_align` splits a region into r x r bins. The value of a bin is the mean of bilinear samples on a
grid that is adapted to the size of the bin. On the CPU, each bin is a weighted sum of cells, the
pixels of a map: a bilinear weight is a product of one weight per axis, and samples that share a
cell add their weights. Other devices run torchvision's kernel, which is slow on the CPU: it has one
thread. Both keep only the boxes for the backward pass.

Shapes: L levels, B images, F channels, maps of h x w cells, R regions, r x r bins.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from common.targets import true_rows

MOST_ENTRIES = 2**20  # of bins and cells that are held at once, about 50 bytes each


# The schemas are written out: torch 2.6 does not read them from list[Tensor] and list[int].
@torch.library.custom_op(
    "concord::roi_align",
    mutates_args=(),
    schema="(Tensor[] features, int[] strides, Tensor boxes, Tensor image, Tensor level,"
    " int resolution) -> Tensor",
)
def roi_align(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    resolution: int,
) -> Tensor:
    """Pools each region from the map of its image and level: (R, F, r, r), r is `resolution`.

    The result is that of torchvision's roi_align with aligned=True and sampling_ratio=0. It has the
    data type of the features and is computed in float32, or in float64 if they are. On the CPU, it
    is laid out channels last and must not be changed in place. A box that is empty or not finite
    gives 0. Boxes get no gradient.
    features: L maps (B, F, h, w); strides: L numbers
    boxes:    (R, 4) in image pixels; they may reach beyond the image
    image:    (R,), index of the image; level: (R,), index of the map
    """
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    forward = _forward_cpu if boxes.is_cpu else _forward_native
    out = forward(features, strides, boxes.to(dtype), image, level, resolution)
    return out.to(features[0].dtype)


# -- CPU -------------------------------------------------------------------------------------------


class _Bins(NamedTuple):
    """Holds the weights of the cells below each bin along one axis, r bins a region.

    first:   (R, r), the first cell
    number:  (R, r), number of cells from the first to the last
    start:   (R, r), place of the first cell's weight in `weights`
    weights: the weights of all bins; those of a bin inside the map add up to 1
    """

    first: Tensor
    number: Tensor
    start: Tensor
    weights: Tensor


def _expand(number: Tensor) -> tuple[Tensor, Tensor]:
    """Lists `number` (N,) members of each owner: the owner's index and the member's rank."""
    owner = torch.repeat_interleave(number)
    start = number.cumsum(0) - number
    rank = torch.arange(len(owner)) - start[owner]
    return owner, rank


def _bins(low: Tensor, high: Tensor, size: Tensor, resolution: int) -> _Bins:
    """Merges the samples of each bin along one axis to weights of cells.

    low, high: (R,), ends of the region in cells, where 0 is the centre of the first cell
    size:      (R,), cells of the axis
    """
    number, owner, position, share = _samples(low, high, size, resolution)
    last = size[owner // resolution] - 1
    below = position.floor()
    above = (below + 1).minimum(last)
    upper = position - below
    lower = 1 - upper
    below = below.long()
    above = above.long()
    # the cells from that below the first sample to that above the last one
    filled = number > 0
    end = number.cumsum(0)[filled]
    first = torch.zeros_like(number)
    first[filled] = below[end - number[filled]]
    cells = torch.zeros_like(number)
    cells[filled] = above[end - 1] + 1 - first[filled]
    start = cells.cumsum(0) - cells
    shift = (start - first)[owner]
    weights = position.new_zeros(int(cells.sum()))
    weights.index_add_(0, below + shift, lower * share)
    weights.index_add_(0, above + shift, upper * share)
    first, cells, start = (x.view(-1, resolution) for x in (first, cells, start))
    return _Bins(first, cells, start, weights)


def _samples(
    low: Tensor, high: Tensor, size: Tensor, resolution: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists the samples along one axis by rising position, with the rounding of torchvision.

    Returns the number of samples of each bin (R r,), and of each sample its bin, its position in
    0..size - 1, and its share of the mean. The share is 0 more than one cell outside the map.
    """
    length = high - low
    step = length / resolution
    grid = step.ceil()  # samples of a bin
    edge = low[:, None] + torch.arange(resolution) * step[:, None]  # (R, r)
    skipped, number = _near_samples(edge, step / grid, grid, size)
    number = number.flatten()
    owner, rank = _expand(number)
    region = owner // resolution
    order = skipped.flatten()[owner] + rank + 0.5
    position = edge.flatten()[owner] + order * step[region] / grid[region]
    size = size[region]
    inside = (position >= -1) & (position <= size)
    share = inside / grid[region]
    position = position.clamp(min=0).minimum(size - 1)
    return number, owner, position, share


def _near_samples(
    edge: Tensor, spacing: Tensor, grid: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Finds the samples of each bin that may lie in the map, so that huge regions cost no more.

    A bin has several samples only where they are at least half a cell apart.

    edge: (R, r), where the bin begins; spacing, grid, size: (R,)
    Returns how many samples are skipped, and the number of those that follow, (R, r) each.
    """
    spacing = spacing[:, None]
    size = size[:, None]
    # at least one sample too many on both sides, because of rounding
    skipped = ((-1 - edge) / spacing - 1.5).floor().clamp(min=0)
    end = ((size - edge) / spacing + 1.5).ceil().minimum(grid[:, None])
    number = (end - skipped).nan_to_num(0).clamp(min=0)  # none if the region is empty or broken
    return skipped, number.long()


def _entries(
    rows: _Bins, columns: _Bins, base: Tensor, width: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the cells below each bin and their weights, region by region and bin by bin.

    rows, columns: bins along y and x; base: (R,), the first cell of the region's map
    width:         (R,), cells in a line of the map

    Returns cells (E,), weights (E,), and the number of cells below each bin (R r r,).
    """
    resolution = rows.number.shape[1]
    lines = rows.number[:, :, None].expand(-1, -1, resolution)  # of cells, below each bin
    owner, rank = _expand(lines.flatten())
    row = owner // resolution
    region = row // resolution
    column = region * resolution + owner % resolution
    y = rows.first.flatten()[row] + rank
    down = rows.weights[rows.start.flatten()[row] + rank]
    first = base[region] + y * width[region] + columns.first.flatten()[column]
    start = columns.start.flatten()[column]
    line, rank = _expand(columns.number.flatten()[column])
    across = columns.weights[start[line] + rank]
    cells = first[line] + rank
    number = rows.number[:, :, None] * columns.number[:, None]
    return cells, across * down[line], number.flatten()


def _parts(
    shapes: Tensor, strides: list[int], boxes: Tensor, image: Tensor, level: Tensor, resolution: int
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """Yields slices of the regions, each with its `_entries`, so that memory is bounded.

    shapes: (L, 3), images, height and width of each map
    """
    areas = shapes.prod(1)
    starts = areas.cumsum(0) - areas
    _, height, width = shapes[level].unbind(1)
    base = starts[level] + image * height * width
    scale = 1 / torch.tensor(strides, dtype=boxes.dtype)
    corners = boxes * scale[level, None] - 0.5
    left, top, right, bottom = corners.unbind(1)
    columns = _bins(left, right, width.to(boxes), resolution)
    rows = _bins(top, bottom, height.to(boxes), resolution)
    entries = rows.number.sum(1) * columns.number.sum(1)
    part = entries.cumsum(0) // MOST_ENTRIES
    _, counts = part.unique_consecutive(return_counts=True)
    start = 0
    for count in counts.tolist() or [0]:
        of = slice(start, start + count)
        part_rows = _Bins(*(x[of] for x in rows[:3]), rows.weights)
        part_columns = _Bins(*(x[of] for x in columns[:3]), columns.weights)
        yield of, _entries(part_rows, part_columns, base[of], width[of])
        start += count


def _forward_cpu(features, strides, boxes, image, level, resolution):
    """Returns the pooled regions: sums the weighted cells below each bin."""
    channels = features[0].shape[1]
    shapes = torch.tensor([(len(f), *f.shape[2:]) for f in features])
    table = [f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features]
    table = torch.cat(table).to(boxes.dtype)  # (cells of all maps, F)
    parts = []
    for _, entries in _parts(shapes, strides, boxes, image, level, resolution):
        cells, weights, number = entries
        start = number.cumsum(0) - number
        part = F.embedding_bag(cells, table, start, mode="sum", per_sample_weights=weights)
        parts.append(part)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)  # cat would copy a single one
    out = out.view(-1, resolution, resolution, channels)
    return out.permute(0, 3, 1, 2)


def _backward_cpu(gradient, shapes, strides, boxes, image, level, resolution):
    """Returns the gradients of the features, one a level: sums the weighted bins above each cell.

    gradient: (R, F, r, r); shapes: L shapes (B, F, h, w)
    """
    # in an image with image-level labels, only one region in a hundred has a gradient
    with_gradient = gradient.flatten(1).any(1)
    if not with_gradient.all():  # the copy takes a third of the time
        regions = (gradient, boxes, image, level)
        gradient, boxes, image, level = (x[with_gradient] for x in regions)
    channels = gradient.shape[1]
    maps = torch.tensor([(batch, height, width) for batch, _, height, width in shapes])
    areas = maps.prod(1).tolist()
    bins = gradient.permute(0, 2, 3, 1).reshape(-1, channels)  # (R r r, F)
    all_cells = torch.arange(sum(areas), dtype=torch.int32)

    def sum_bins(of: slice, entries: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        cells, weights, number = entries
        owner = torch.repeat_interleave(number) + of.start * resolution**2
        keys, order = cells.int().sort(stable=True)
        start = torch.searchsorted(keys, all_cells)
        weights = weights[order]
        return F.embedding_bag(owner[order], bins, start, mode="sum", per_sample_weights=weights)

    parts = _parts(maps, strides, boxes, image, level, resolution)
    sums = (sum_bins(of, entries) for of, entries in parts)
    of_cells = functools.reduce(torch.add, sums)  # (cells of all maps, F)
    gradients = []
    for part, (batch, _, height, width) in zip(of_cells.split(areas), shapes):
        part = part.view(batch, height, width, channels)
        part = part.permute(0, 3, 1, 2)
        gradients.append(part.clone(memory_format=torch.contiguous_format))
    return gradients


# -- other devices ---------------------------------------------------------------------------------


def _forward_native(features, strides, boxes, image, level, resolution):
    """Returns the pooled regions, level by level."""
    rois = torch.cat([image[:, None].to(boxes), boxes], 1)  # (R, 5)
    rows = true_rows([level == i for i in range(len(features))])
    out = boxes.new_empty(len(rois), features[0].shape[1], resolution, resolution)
    for feature, stride, row in zip(features, strides, rows):
        of_level = feature.to(boxes.dtype), rois[row], resolution, 1 / stride
        out[row] = torchvision.ops.roi_align(*of_level, aligned=True)
    return out


def _backward_native(gradient, shapes, strides, boxes, image, level, resolution):
    """Returns the gradients of the features, one a level."""
    rois = torch.cat([image[:, None].to(boxes), boxes], 1)  # (R, 5)
    backward = torch.ops.torchvision._roi_align_backward
    # in an image with image-level labels, only one region in a hundred has a gradient
    with_gradient = gradient.flatten(1).any(1)
    rows = true_rows([(level == i) & with_gradient for i in range(len(shapes))])
    gradients = []
    for shape, stride, row in zip(shapes, strides, rows):
        settings = (1 / stride, resolution, resolution, *shape)
        gradients.append(backward(gradient[row], rois[row], *settings, 0, True))
    return gradients


# -- as an operator --------------------------------------------------------------------------------


@roi_align.register_fake
def _(features, strides, boxes, image, level, resolution):
    channels = features[0].shape[1]
    if boxes.is_cpu:
        out = features[0].new_empty(len(boxes), resolution, resolution, channels)
        return out.permute(0, 3, 1, 2)
    return features[0].new_empty(len(boxes), channels, resolution, resolution)


@torch.library.custom_op(
    "concord::roi_align_backward",
    mutates_args=(),
    schema="(Tensor gradient, int[] sizes, int[] strides, Tensor boxes, Tensor image, Tensor level,"
    " int resolution) -> Tensor[]",
)
def _roi_align_backward(
    gradient: Tensor,
    sizes: list[int],
    strides: list[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    resolution: int,
) -> list[Tensor]:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    shapes = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]
    backward = _backward_cpu if boxes.is_cpu else _backward_native
    gradients = backward(
        gradient.to(dtype), shapes, strides, boxes.to(dtype), image, level, resolution
    )
    return [x.to(gradient.dtype) for x in gradients]


@_roi_align_backward.register_fake
def _(gradient, sizes, strides, boxes, image, level, resolution):
    shapes = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]
    return [gradient.new_empty(shape) for shape in shapes]


def _setup_context(ctx, inputs, output):
    features, ctx.strides, boxes, image, level, ctx.resolution = inputs
    ctx.sizes = [side for feature in features for side in feature.shape]
    ctx.save_for_backward(boxes, image, level)


def _backward(ctx, gradient):
    gradients = _roi_align_backward(
        gradient, ctx.sizes, ctx.strides, *ctx.saved_tensors, ctx.resolution
    )
    return gradients, None, None, None, None, None


roi_align.register_autograd(_backward, setup_context=_setup_context)
