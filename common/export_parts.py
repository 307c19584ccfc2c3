"""Parts of the models in the form that an exported graph can hold.

The graph has no loop over images, and no result whose length depends on the image: the numbers of
proposals and of detections are fixed, and rows that are not used have the score 0. All images of a
batch have one size. So their regions stand in one list (R = B Q), as if they were of one image.

Shapes: B images, Q boxes of an image, R boxes of all images, C classes, L levels, S cells of all
levels, K pairs of a box and a class, N detections of an image, H W pixels, h w cells.
"""

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common import boxes as box_functions
from common import deformable, oln, pixel_decoder
from common.backbone import Backbone
from common.boxes import decode_boxes
from common.centernet import CenterNet, Grid
from common.clip_resnet import CLIPResNetC4
from common.rpn import RPN, WEIGHTS, Anchors, object_score

DIVISOR = 32  # of the height and the width of what the backbone sees
MOST_PAIRS = 10_000  # pairs of a box and a class that NMS sees, as in `select_detections`


# -- NMS -------------------------------------------------------------------------------------------


def greedy_nms(boxes: Tensor, scores: Tensor, iou: float, least: float) -> Tensor:
    """Says for each class which of the boxes greedy NMS keeps. Returns (B, C, Q) bool.

    boxes: (B, Q, 4); scores: (B, C, Q); least: only scores above it take part

    One call of NMS serves all images and classes: the boxes of each are shifted to a place of their
    own. The shift is in float64, which does not round the boxes.

    A graph of torch cannot hold a result of fewer than two boxes. So two boxes with the highest
    score are added, at two more places. Boxes that take no part lie under the first of these.
    """
    images, classes, number = scores.shape
    flat = scores.flatten(1)  # (B, C Q)
    if not isinstance(classes, int) or classes * number > MOST_PAIRS:
        flat, pairs = best_rows(flat, MOST_PAIRS)
    else:
        pairs = torch.arange(classes * number).expand_as(flat)
    image = torch.arange(images)[:, None]
    passing = flat > least  # (B, K)
    group = torch.where(passing, image * classes + pairs // number, -1).flatten()
    place = (image * (classes * number) + pairs).flatten()
    chosen = at_rows(boxes, pairs % number) * passing[..., None]
    apart = (boxes.amax() - boxes.amin()).double() + 2
    group = torch.cat([torch.tensor([-1, -2]), group])
    chosen = torch.cat([boxes.new_zeros(2, 4), chosen.flatten(0, 1)]).double()
    corner = torch.tensor([0.0, 0.0, 1.0, 1.0])  # gives the added boxes a size
    chosen = chosen + (group < 0)[:, None] * corner + (group * apart)[:, None]
    flat = torch.cat([flat.amax().expand(2) + 1, flat.flatten()])
    kept = torchvision.ops.nms(chosen, flat.double(), iou)
    total = images * classes * number
    mask = scores.new_zeros(total + 1, dtype=torch.bool)
    place = torch.cat([torch.full((2,), total), place])
    mask = mask.index_fill(0, place[kept], True)
    return mask[:total].view_as(scores)


@torch.library.custom_op("concord::nms", mutates_args=())
def nms_operator(boxes: Tensor, scores: Tensor, iou: float, least: float) -> Tensor:
    """Is `greedy_nms` as an operator, which ONNX has under another name (`onnx_nms`)."""
    return greedy_nms(boxes, scores, iou, least)


@nms_operator.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, least: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def onnx_nms() -> Callable:
    """Returns what writes `nms_operator` as ONNX's NonMaxSuppression."""
    from onnxscript import opset18 as op

    def nms(boxes: Any, scores: Any, iou: float, least: float) -> Any:
        most = op.Gather(op.Shape(scores), op.Constant(value_ints=[2]))
        limits = [op.Constant(value_floats=[x]) for x in (iou, least)]
        kept = op.NonMaxSuppression(boxes, scores, most, *limits)  # (K, 3)
        count = op.Gather(op.Shape(kept), op.Constant(value_ints=[0]))
        ones = op.Expand(op.Constant(value_floats=[1.0]), count)
        mask = op.Mul(scores, op.Constant(value_floats=[0.0]))
        return op.Greater(op.ScatterND(mask, kept, ones), op.Constant(value_float=0.5))

    return nms


class Form:
    """What the graph is written for."""

    nms = greedy_nms  # or `nms_operator`


def nms(boxes: Tensor, scores: Tensor, iou: float, least: float) -> Tensor:
    """Returns which scores NMS keeps, as `greedy_nms`, in the form of the graph.

    A box whose corners have changed places overlaps no other: ONNX would turn it round.
    """
    low, high = boxes.chunk(2, 2)
    inverted = (high < low).any(2, keepdim=True)
    boxes = torch.cat([low, torch.where(inverted, low, high)], 2)
    return Form.nms(boxes, scores, iou, least)


def best_rows(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Returns the `number` highest scores (B, number) of (B, S), and their rows.

    If there are fewer, the rest has the score 0 and the row 0. No score is below 0.
    """
    best, rows = F.pad(scores, (0, number)).topk(number)
    return best, rows.where(best > 0, 0)


def split_pairs(pairs: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Returns quotient and remainder of indices by a number, which may be a symbol of the graph."""
    quotient = pairs // number
    return quotient, pairs - quotient * number


def at_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Returns the values (B, S, X) at `rows` (B, Q): (B, Q, X)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def select(
    boxes: Tensor, scores: Tensor, one_class: bool, threshold: float = 0.02, limit: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Is `common.boxes.select_detections` of a batch, filled up with detections of score 0.

    Returns boxes (B, N, 4), scores (B, N) and labels (B, N), by falling score. N is `limit`.
    boxes: (B, Q, 4); scores: (B, Q, C)
    """
    if one_class:
        scores = scores * (scores >= scores.amax(2, keepdim=True))
    scores = scores.mT  # (B, C, Q)
    kept = nms(boxes, scores, 0.5, threshold)
    number = boxes.shape[1]
    scores, pairs = best_rows((scores * kept).flatten(1), limit)
    labels, rows = split_pairs(pairs, number)
    chosen = at_rows(boxes, rows) * (scores > 0)[..., None]
    return chosen, scores, labels


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float = 0.5, min_score: float = 1e-3) -> Tensor:
    """Is `common.boxes.soft_nms` of a batch, as a loop in the graph: scores (B, Q, C) -> the same.

    boxes: (B, Q, 4)
    """
    low, high = boxes.chunk(2, 2)
    area = (high - low).prod(2)  # (B, Q)
    overlap = torch.minimum(high[:, :, None], high[:, None])
    overlap = (overlap - torch.maximum(low[:, :, None], low[:, None])).clamp(min=0)
    shared = overlap.prod(3)  # (B, Q, Q)
    union = area[:, :, None] + area[:, None] - shared
    decay = torch.exp(-((shared / union.clamp(min=1e-9)) ** 2) / sigma)
    remaining = scores.mT.contiguous()  # (B, C, Q)
    state = (remaining, torch.zeros_like(remaining), decay)

    def goes_on(remaining: Tensor, final: Tensor, decay: Tensor) -> Tensor:
        return remaining.max() >= min_score

    def lower(remaining: Tensor, final: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
        best, row = remaining.max(2, keepdim=True)  # (B, C, 1)
        chosen = torch.arange(decay.shape[2]) == row  # (B, C, Q)
        kept = best * (best >= min_score)
        final = torch.maximum(final, chosen * kept)
        rows = row.expand(-1, -1, decay.shape[2])
        remaining = remaining * decay.gather(1, rows) * ~chosen
        return remaining, final, decay.clone()

    _, final, _ = while_loop(goes_on, lower, state)
    return final.mT


# -- parts of detectors ----------------------------------------------------------------------------


def padded_side(side: int) -> int:
    """Returns the side of an image after its padding to the DIVISOR."""
    return (side + DIVISOR - 1) // DIVISOR * DIVISOR


def normalise(self: Any, images: Tensor, sizes: list) -> Tensor:
    """Is `Backbone.normalise` of images (B, 3, H, W) of one size, which it pads to the DIVISOR."""
    images = (images - self.mean) / self.std
    height, width = map(padded_side, images.shape[-2:])
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))


def pad_same(
    x: Tensor, kernel: list[int], stride: list[int], dilation: list[int] = (1, 1), value: float = 0
) -> Tensor:
    """Is timm's padding of TensorFlow's convolutions, for sides that the stride divides."""
    padding = []
    for k, s, d in zip(kernel, stride, dilation):
        total = max((k - 1) * d + 1 - s, 0)
        padding = [total // 2, total - total // 2, *padding]  # the last axis first
    return F.pad(x, padding, value=value)


def centre_proposals(
    self: CenterNet, grid: Grid, p: Tensor, ltrb: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Is `CenterNet.proposals`, a fixed number for each image: boxes (B Q, 4) and scores (B Q,)."""
    limit, most = self.pre_nms[1], self.post_nms[1]
    ltrb = ltrb * grid.strides[:, None]  # (B, S, 4) in pixels
    before, after = ltrb.chunk(2, 2)
    low = grid.points - before
    high = torch.maximum(grid.points + after, low + 0.01)
    every = torch.cat([low, high], 2)
    found, boxes = [], []
    start = 0
    for height, width in grid.shapes:
        end = start + height * width
        scores, rows = best_rows(p[:, start:end], limit)
        found.append(scores)
        boxes.append(at_rows(every[:, start:end], rows))
        start = end
    p = torch.cat(found, 1)
    boxes = torch.cat(boxes, 1)  # (B, K, 4)
    kept = nms(boxes, p[:, None], self.nms_threshold, self.score_threshold)
    p, rows = best_rows(p * kept[:, 0], most)
    return [(at_rows(boxes, rows).flatten(0, 1), p.sqrt().flatten())]


def rpn_forward(
    self: RPN, features: list[Tensor], sizes: list[tuple[int, int]], targets: None = None
) -> tuple[list[tuple[Tensor, Tensor]], Anchors | None]:
    """Is `RPN.forward` at test time, with a fixed number of proposals as `centre_proposals`."""
    limit, most = self.pre_nms[1], self.post_nms[1]
    logits, deltas = self.head(features)
    found, boxes = [], []
    for anchors, level, moves in zip(self.anchors(features), logits, deltas):
        scores, rows = best_rows(object_score(level), limit)
        of_level = anchors[rows].flatten(0, 1)
        of_rows = at_rows(moves, rows).flatten(0, 1)
        moved = decode_boxes(of_level, of_rows, WEIGHTS)
        moved = clip_boxes_to_image(moved, sizes[0]).view(-1, limit, 4)
        low, high = moved.chunk(2, 2)
        has_area = (high > low).all(2)
        scores = scores * has_area
        kept = nms(moved, scores[:, None], self.nms_threshold, 0.0)
        found.append(scores * kept[:, 0])
        boxes.append(moved)
    scores, rows = best_rows(torch.cat(found, 1), most)
    boxes = at_rows(torch.cat(boxes, 1), rows)
    return [(boxes.flatten(0, 1), scores.flatten())], None


def anchor_proposals(
    self: oln.RPN, features: list[Tensor], sizes: list[tuple[int, int]], gt_boxes: None = None
) -> tuple[list[tuple[Tensor, Tensor]], dict]:
    """Is `oln.RPN.forward` at test time, with a fixed number of proposals as `centre_proposals`."""
    tblr, logits = self.head(features)
    found, boxes = [], []
    for anchors, distances, level in zip(self.anchors(features), tblr, logits):
        scores, rows = best_rows(level.sigmoid(), self.pre_nms)
        of_level = anchors[rows].flatten(0, 1)
        of_rows = at_rows(distances, rows).flatten(0, 1)
        moved = oln.decode_tblr(of_level, of_rows)
        moved = clip_boxes_to_image(moved, sizes[0]).view(-1, self.pre_nms, 4)
        low, high = moved.chunk(2, 2)
        has_area = (high > low).all(2)
        found.append(scores * has_area)
        boxes.append(moved)
    boxes = torch.cat(boxes, 1)
    scores = torch.cat(found, 1)
    return [(boxes.flatten(0, 1), scores.flatten())], {}


def roi_align(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    resolution: int,
) -> Tensor:
    """Is `common.roi_align.roi_align` of B Q regions, as a sum over the levels.

    On a level that is not its own, a region has no size, no samples, and so the value 0.
    """
    count = boxes.shape[0] // features[0].shape[0]  # Q
    image = torch.arange(boxes.shape[0], device=boxes.device) // count
    pooled = 0
    for i, (feature, stride) in enumerate(zip(features, strides)):
        own = boxes.nan_to_num(0) * (level == i)[:, None]
        rois = torch.cat([image[:, None].to(boxes), own], 1)  # (R, 5)
        size = (resolution, resolution)
        pooled = pooled + torchvision.ops.roi_align(feature, rois, size, 1 / stride, aligned=True)
    return pooled


def best_cells(boxes: Tensor, scores: Tensor, number: int) -> Tensor:
    """Is `deformable.best_cells` of images that have at least `number` cells."""
    nothing = (boxes == 1).all(-1)
    return scores.masked_fill(nothing, -torch.inf).topk(number, 1).indices


# -- attention -------------------------------------------------------------------------------------


def msda(
    value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, reference: Tensor
) -> Tensor:
    """Is `common.msda.msda` by bilinear sampling of whole maps, an operator of ONNX."""
    batch, _, heads, width = value.shape
    queries = offsets.shape[1]
    points = offsets.shape[4]
    weights = logits.softmax(-1)  # (B, Q, M, L P)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    if reference.dim() < 4:
        reference = reference.unsqueeze(-2)  # (B or 1, Q, 1, 2)
    if reference.dim() < 4:
        reference = reference[None]
    reference = reference.expand(-1, -1, len(shapes), -1)
    sampled = []
    start = 0
    for i, (h, w) in enumerate(shapes):
        level = value[:, start : start + h * w]
        start = start + h * w
        level = level.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        x, y = offsets[:, :, :, i].unbind(-1)  # (B, Q, M, P)
        centre = reference[:, :, None, i]  # (B, Q, 1, 2)
        x = centre[..., :1] + x / w
        y = centre[..., 1:] + y / h
        place = torch.stack([x, y], -1) * 2 - 1
        place = place.transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled.append(F.grid_sample(level, place, align_corners=False))  # (B M, d, Q, P)
    sampled = torch.cat(sampled, -1)
    out = (sampled * weights).sum(-1)  # (B M, d, Q)
    return out.view(batch, heads * width, queries).transpose(1, 2)


def attend(
    self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Is torch's attention by products of matrices: the exporter cannot lay out the fused one."""
    return plain_attention(self, query, key, value, **(settings | {"need_weights": True}))


plain_attention = nn.MultiheadAttention.forward


def memory_of(maps: list[Tensor], sizes: list, size: tuple[int, int]) -> deformable.Memory:
    """Is `Memory.of` for a batch of images of one size, which `normalise` pads."""
    height, width = size
    tall, wide = map(padded_side, size)
    images = maps[0].shape[0]
    cells, whole, centres, padding = [], [], [], []
    for level in maps:
        h, w = level.shape[-2:]
        columns = torch.arange(w, device=level.device)
        rows = torch.arange(h, device=level.device)
        columns_inside = (columns * wide < width * w).sum()
        rows_inside = (rows * tall < height * h).sum()
        ends = torch.stack([columns_inside, rows_inside]).float()  # (2,)
        cells.append(ends)
        column, row = columns.max(), rows.max()
        last = torch.stack([column, row])
        whole.append(last + 1.0)
        x = columns + 0.5
        y = rows + 0.5
        grid = torch.meshgrid(x, y, indexing="xy")
        grid = torch.stack(grid, -1).flatten(0, 1)  # (h w, 2)
        centres.append(grid / ends)
        outside = grid > ends
        padding.append(outside.any(-1))
    cells = torch.stack(cells)  # (L, 2)
    ratios = cells / torch.stack(whole)
    flat = [deformable.tokens(level).float() for level in maps]
    return deformable.Memory(
        tokens=torch.cat(flat, 1),
        shapes=tuple(tuple(level.shape[-2:]) for level in maps),
        cells=cells.expand(images, -1, -1),
        ratios=ratios.expand(images, -1, -1),
        centres=torch.cat(centres).expand(images, -1, -1),
        padding=torch.cat(padding).expand(images, -1),
    )


# -- all of them -----------------------------------------------------------------------------------

SUBSTITUTES = (
    (Backbone, "normalise", normalise),
    (CLIPResNetC4, "normalise", normalise),
    (CenterNet, "proposals", centre_proposals),
    (RPN, "forward", rpn_forward),
    (oln.RPN, "forward", anchor_proposals),
    (sys.modules["timm.layers.conv2d_same"], "pad_same", pad_same),
    (box_functions, "roi_align", roi_align),
    (pixel_decoder, "msda", msda),
    (nn.MultiheadAttention, "forward", attend),
    (deformable.Memory, "of", staticmethod(memory_of)),
    (deformable, "best_cells", best_cells),
)


def symbolic_len(value: Any) -> Any:
    """Is len(), but gives the symbol of a tensor's length. torch does the same with max and min."""
    return value.shape[0] if isinstance(value, Tensor) else original_len(value)


original_len = builtins.len


@contextlib.contextmanager
def exportable(operator: bool, module: ModuleType | None = None) -> Iterator[None]:
    """Context manager in which models are made of the parts above, for the time of a trace.

    operator: NMS is an operator of ONNX, instead of torchvision's
    module:   of the model; a function of common/ that it has imported is replaced there, too
    """
    with contextlib.ExitStack() as stack:
        if hasattr(module, "best_cells"):
            stack.enter_context(mock.patch.object(module, "best_cells", best_cells))
        for owner, name, part in SUBSTITUTES:
            stack.enter_context(mock.patch.object(owner, name, part))
        form = nms_operator if operator else greedy_nms
        stack.enter_context(mock.patch.object(Form, "nms", staticmethod(form)))
        stack.enter_context(mock.patch.object(builtins, "len", symbolic_len))
        yield
