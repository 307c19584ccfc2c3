"""What an exported file computes, for each kind of model: images in, detections or maps out.

A kind is known by its parts. Each function runs the parts of a model on images (B, 3, H, W) uint8
of one size, within `common.export_parts.exportable`.

Shapes: B images, Q queries or boxes of an image, C classes, N detections of an image, H W pixels,
h w pixels of a mask.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common import retinanet
from common.backbone import STRIDES
from common.boxes import decode_boxes, to_pixels
from common.cascade import Cascade
from common.deformable import Encoder
from common.errors import InputError
from common.export_parts import at_rows, best_rows, nms, select, soft_nms, split_pairs
from common.labels import LabelSpace
from common.pixel_decoder import PixelDecoder

DETECTIONS = {
    "boxes": "(B, N, 4) xyxy in pixels of the input",
    "scores": "(B, N) falling; 0 fills up",
    "labels": "(B, N) rows of class_names",
}
QUERIES = {
    "probabilities": "(B, Q, C + 1) softmax of each query; the last column is no class",
    "masks": "(B, Q, h, w) mask logits of the padded input; h and w are a quarter of its sides",
}
SEMANTIC = {"semantic": "(B, H, W) row of class_names at each pixel"}


@dataclass
class Kind:
    """A kind of models.

    run:     called as run(model, images, label space, text); returns the outputs in order
    outputs: {name of an output: what it is}
    least:   a detection is only there if its score is above
    score:   what a score means
    least_side: pixels; a smaller image has a map of a single cell, or fewer cells than queries
    """

    run: Callable[..., tuple[Tensor, ...]]
    outputs: dict[str, str]
    least: float = 0.0
    score: str = ""
    least_side: int = 129


class Exported(nn.Module):
    """A model with its label space, as it is exported. The text (C, D) is an input if it is given.

    Raises InputError for a model that cannot be exported.
    """

    def __init__(self, model: nn.Module, space: LabelSpace):
        super().__init__()
        self.model = model
        self.space = space
        self.kind = kind_of(model, space)
        self.register_buffer("text", space.text, persistent=False)

    def forward(self, images: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns the outputs of the kind. images: (B, 3, H, W) uint8"""
        return self.kind.run(self.model, images, self.space, self.text if text is None else text)


def kind_of(model: nn.Module, space: LabelSpace) -> Kind:
    """Returns the kind of a model with its classes. Raises InputError if there is none for it."""
    if isinstance(getattr(model, "pixel_decoder", None), PixelDecoder):
        outputs = QUERIES if model.args.task == "instance" else SEMANTIC | QUERIES
        if model.args.task == "semantic":
            outputs = SEMANTIC
        score = "probability of the class of a query"
        return Kind(run_segmenter, outputs, 0.0, score, 33)
    if isinstance(getattr(model, "cascade", None), Cascade):
        masks = {"masks": "(B, N, 28, 28) mask probabilities on a grid over each box"}
        outputs = DETECTIONS | (masks if getattr(model, "mask_head", None) else {})
        return Kind(run_cascade, outputs, 0.02, "score of the cascade, 0.02..1")
    if isinstance(getattr(model, "head", None), retinanet.RetinaHead):
        return Kind(run_retinanet, DETECTIONS, 0.05, "sigmoid of the class, 0.05..1")
    if hasattr(model, "localizer") and len(model.classifiers):
        return Kind(run_regions, DETECTIONS, 0.0, "p^beta eta^(1 - beta), before calibration")
    if isinstance(getattr(model, "encoder", None), Encoder):
        run = next(run for part, run in QUERY_KINDS.items() if hasattr(model, part))
        if run is run_one_task:
            run = partial(run, dataset=model.dataset_of(space))
        number = getattr(model.args, "queries_per_class", None) or model.args.queries
        least_side = max(65, 8 * math.ceil(math.sqrt(number)) + 1)  # so many cells of 8 x 8 pixels
        return Kind(run, DETECTIONS, 0.0, "sigmoid of the query's class", least_side)
    raise InputError(f"{type(model).__module__} cannot be exported: it has no detector")


def text_rows(model: nn.Module) -> tuple[int, int]:
    """Returns the least and the largest number of classes whose text may be an input."""
    if hasattr(model, "extraction"):  # it keeps some of the classes, and reads 100 at once
        return max(model.args.classes_kept, 2), 100
    if hasattr(model, "task_encoder"):
        return 2, max(model.args.task_size, 2)
    return 2, 100_000


def constants(model: nn.Module) -> ModuleType:
    """Returns the module of the model's class, which holds the functions of its inference."""
    return sys.modules[type(model).__module__]


def size_of(images: Tensor) -> list[tuple[int, int]]:
    """Returns the (height, width) of all images, as the one entry of a list."""
    return [tuple(images.shape[-2:])]


# -- detectors of regions --------------------------------------------------------------------------


def run_cascade(
    model: nn.Module, images: Tensor, space: LabelSpace, text: Tensor | None
) -> tuple[Tensor, ...]:
    """Returns boxes (B, N, 4), scores (B, N), labels (B, N) and, with a mask head, its masks."""
    sizes = size_of(images)
    features = model.extract(images, sizes)
    if text is not None:
        classes = text
    elif hasattr(model, "members_of"):
        classes = model.members_of(space)
    else:
        classes = model.columns_of(space)
    [boxes], [scores] = model.detect(features, sizes, classes)
    batch = images.shape[0]
    boxes = boxes.view(batch, -1, 4)
    scores = scores.view(batch, -1, scores.shape[-1])
    found = select(boxes, scores, model.args.one_class_per_proposal)
    if getattr(model, "mask_head", None) is None:
        return found
    masks = model.mask_head(features, [found[0].flatten(0, 1)]).sigmoid()
    return *found, masks.view(batch, -1, *masks.shape[1:])


def run_retinanet(
    model: nn.Module, images: Tensor, space: LabelSpace, text: None
) -> tuple[Tensor, ...]:
    """Returns boxes (B, N, 4), scores (B, N) and labels (B, N) of anchors."""
    sizes = size_of(images)
    features = model.extract(images, sizes)
    logits, deltas = model.head(features)
    scores = logits.sigmoid()  # (B, A, C)
    kept, chosen = [], []
    start = 0
    for anchors in retinanet.grid_anchors(features, STRIDES):
        end = start + anchors.shape[0]
        best, rows = best_rows(scores[:, start:end].amax(2), 1000)
        of_level = anchors[rows].flatten(0, 1)
        moves = at_rows(deltas[:, start:end], rows).flatten(0, 1)
        boxes = clip_boxes_to_image(retinanet.decode_corners(moves, of_level), sizes[0])
        chosen.append(boxes.view(-1, 1000, 4))
        kept.append(at_rows(scores[:, start:end], rows) * (best > 0)[..., None])
        start = end
    scores = torch.cat(kept, 1)[:, :, model.columns_of(space)]
    return select(torch.cat(chosen, 1), scores, False, 0.05, 100)


def run_regions(
    model: nn.Module, images: Tensor, space: LabelSpace, text: Tensor
) -> tuple[Tensor, ...]:
    """Returns boxes (B, N, 4), scores (B, N) and labels (B, N) of a localizer and classifiers."""
    args = model.args
    module = constants(model)
    sizes = size_of(images)
    batch = images.shape[0]
    [(boxes, *scores)] = model.localizer(images, sizes)
    there = scores[1] > 0  # of the proposals that only fill up
    eta = (module.objectness(*scores, args.alpha) * there).view(batch, -1)
    boxes = boxes.view(batch, -1, 4)
    kept = nms(boxes, eta[:, None], 0.9, 0.0)
    eta, rows = best_rows(eta * kept[:, 0], args.test_proposals)
    best = at_rows(boxes, rows).flatten(0, 1)  # (R, 4)
    found = []
    embedded = []
    for classifier in model.classifiers:
        x, deltas = classifier(images, sizes, [best])  # (R, D), (R, 4)
        moved = clip_boxes_to_image(decode_boxes(best, deltas, module.BOX_WEIGHTS), sizes[0])
        found.append(moved.view(batch, -1, 4))
        embedded.append(x.half().float().view(batch, -1, x.shape[1]))
    boxes = torch.cat(found, 1)
    eta = eta.repeat(1, len(found))  # (B, Q)
    p = module.compare(torch.cat(embedded, 1), text, args.tau).sigmoid()  # (B, Q, C)
    eta = eta[..., None]
    scores = p**args.beta * eta ** (1 - args.beta) * (eta > 0)
    scores = soft_nms(boxes, scores)  # (B, Q, C)
    classes = scores.shape[2]
    scores, pairs = best_rows(scores.flatten(1), 100)
    rows, labels = split_pairs(pairs, classes)
    return at_rows(boxes, rows) * (scores > 0)[..., None], scores, labels


# -- detectors of queries --------------------------------------------------------------------------


def best_pairs(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], limit: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Is `common.deformable.best_detections` of a batch, filled up with detections of score 0.

    logits: (B, Q, C); boxes: (B, Q, 4) boxes_cxcywh
    """
    scores, pairs = best_rows(logits.sigmoid().flatten(1), limit)
    rows, labels = split_pairs(pairs, logits.shape[2])
    chosen = at_rows(boxes, rows)
    pixels = clip_boxes_to_image(to_pixels(chosen.flatten(0, 1), size), size)
    return pixels.view(-1, limit, 4) * (scores > 0)[..., None], scores, labels


def run_one_task(
    model: nn.Module, images: Tensor, space: LabelSpace, text: Tensor | None, dataset: int
) -> tuple[Tensor, ...]:
    """Returns the detections of a model whose queries are those of a dataset, a row of it."""
    classes = SimpleNamespace(text=text, datasets=space.datasets)
    sizes = size_of(images)
    output = model(images, sizes, dataset, classes)
    return best_pairs(output.logits[-1], output.boxes[-1], sizes[0])


def run_tasks(
    model: nn.Module, images: Tensor, space: LabelSpace, text: Tensor
) -> tuple[Tensor, ...]:
    """Returns the detections of a model that is asked for some classes after others."""
    module = constants(model)
    sizes = size_of(images)
    encoded = model.encode(images, sizes)
    groups = [slice(None)]
    if isinstance(text.shape[0], int):
        groups = module.task_groups(text.shape[0], model.args.task_size)
    found, blocks = [], []
    for group in groups:
        output = model.detect(encoded, text[group])
        found.append(output.boxes[-1])  # (B, q, 4)
        blocks.append(output.logits[-1].sigmoid().mT)  # (B, c, q)
    # a class has the scores of the queries of its own task alone
    number = len(blocks)
    rows = []
    for i, block in enumerate(blocks):
        others = [torch.zeros_like(block)] * number
        others[i] = block
        rows.append(torch.cat(others, 2))
    scores = torch.cat(rows, 1)  # (B, C, Q)
    best, pairs = best_rows(scores.flatten(1), module.CANDIDATES)
    flat = torch.zeros_like(scores.flatten(1)).scatter_add(1, pairs, best)
    boxes = torch.cat(found, 1)
    pixels = clip_boxes_to_image(to_pixels(boxes.flatten(0, 1), sizes[0]), sizes[0])
    scores = flat.view_as(scores).mT
    return select(pixels.view(boxes.shape), scores, False, 0.0)


def run_kept_classes(
    model: nn.Module, images: Tensor, space: LabelSpace, text: Tensor
) -> tuple[Tensor, ...]:
    """Returns the detections of a model whose queries are of single classes."""
    sizes = size_of(images)
    output = model(images, sizes, text)
    scores, rows = best_rows(output.logits[-1].sigmoid(), 300)
    chosen = at_rows(output.boxes[-1], rows)
    pixels = clip_boxes_to_image(to_pixels(chosen.flatten(0, 1), sizes[0]), sizes[0])
    labels = output.query_classes().gather(1, rows)
    return pixels.view(-1, 300, 4) * (scores > 0)[..., None], scores, labels


# a part that one kind of the query detectors has
QUERY_KINDS = {"composer": run_one_task, "task_encoder": run_tasks, "extraction": run_kept_classes}


# -- segmenters ------------------------------------------------------------------------------------


def queries(
    model: nn.Module, images: Tensor, sizes: list, space: LabelSpace, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the probabilities (B, Q, C + 1) and mask logits (B, Q, h, w) of the queries."""
    features = model.extract(images, sizes)
    if hasattr(model, "task_embedding"):
        task = model.task_embedding([model.args.task])
        output = model.decode(*features, space, task.expand(images.shape[0], -1))
    elif hasattr(model, "heads"):
        rows = None if text is None else torch.cat([text, model.background[None]])
        output = model.decode(*features, space, rows)
    else:
        output = model.decode(*features, text)
    masks = torch.einsum("bqc,bchw->bqhw", output.mask_embed[-1], output.mask_features)
    return output.logits[-1].softmax(-1), masks


def run_segmenter(
    model: nn.Module, images: Tensor, space: LabelSpace, text: Tensor | None
) -> tuple[Tensor, ...]:
    """Returns the outputs that --task asks for: of SEMANTIC, of QUERIES, or of both."""
    probabilities, masks = queries(model, images, size_of(images), space, text)
    if model.args.task == "instance":
        return probabilities, masks
    height, width = images.shape[-2:]
    padded = [side * 4 for side in masks.shape[-2:]]
    full = F.interpolate(masks, padded, mode="bilinear", align_corners=False)
    full = full.sigmoid()  # (B, Q, H, W) with the padding
    if getattr(model.args, "merge", "sum") == "sum":
        scores = torch.einsum("bqk,bqhw->bkhw", probabilities[..., :-1], full)
        semantic = scores.argmax(1)
    else:
        semantic = best_unions(probabilities, full)
    # a slice would ask torch whether there is padding, and the file would hold the answer
    semantic = semantic.index_select(1, torch.arange(height)).index_select(2, torch.arange(width))
    return (semantic,) if model.args.task == "semantic" else (semantic, probabilities, masks)


def best_unions(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Returns the class of the best union of masks at each pixel, (B, H, W); 0 if there is none.

    A union is of the masks of one class. It has the probability of its most probable mask, times
    the highest mask probability at a pixel.
    probabilities: (B, Q, C + 1); masks: (B, Q, H, W) in 0..1
    """
    best, labels = probabilities.max(2)  # (B, Q)
    same = labels[:, :, None] == labels[:, None]  # (B, Q, Q)
    best = (best[:, None] * same).amax(2) * (labels < probabilities.shape[2] - 1)
    winner = (best[..., None, None] * masks).argmax(1)  # (B, H, W)
    labels = labels * (best > 0)
    return labels.gather(1, winner.flatten(1)).view_as(winner)
