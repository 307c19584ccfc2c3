"""Image-label losses of earlier work. They differ in the proposals that get an image-level label.

They are the rivals in Table 1 of Detic (arXiv 2201.02605). Each takes the proposals of one image
and one of its labels, a scalar tensor, and returns the loss of that label, a scalar.
Source: facebookresearch/Detic:detic/modeling/roi_heads/detic_fast_rcnn.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: n proposals of the image, C classes and a background column.


@dataclass
class Bag:
    """Holds the proposals of an image with image-level labels: a bag of multiple-instance learning.

    The proposals are sorted by objectness, the highest first. `loss_image` takes the last one as
    the whole image.
    """

    boxes: Tensor  # (n, 4)
    logits: Tensor  # (n, C + 1), the last column is background
    prop_logits: Tensor | None = None  # (n, C + 1), logits of WSDDN's second branch

    @classmethod
    def split(cls, boxes: list[Tensor], logits: Tensor, prop_logits: Tensor | None) -> list["Bag"]:
        """Splits the logits of all R proposals into one bag per image.

        boxes: B tensors (n, 4); logits and prop_logits: (R, C + 1), image by image
        """
        sizes = [len(b) for b in boxes]
        branch = [None] * len(boxes) if prop_logits is None else prop_logits.split(sizes)
        return [cls(*parts) for parts in zip(boxes, logits.split(sizes), branch)]


def label_bce(logits: Tensor, label: Tensor) -> Tensor:
    """Returns sum_c BCE(sigmoid(s_c), y_c) over the C + 1 columns: (...).

    logits: (..., C + 1), s; label: scalar, the column where y is 1; y is 0 elsewhere
    """
    target = F.one_hot(label, logits.shape[-1]).to(logits).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def loss_first(bag: Bag, label: Tensor) -> Tensor:
    """Max-object-score: sum_c BCE(sigmoid(s_jc), y_c), with j the first proposal.

    The first proposal has the highest objectness. s is `bag.logits` and y is the one-hot `label`.
    """
    return label_bce(bag.logits[0], label)


def loss_image(bag: Bag, label: Tensor) -> Tensor:
    """Image-box: sum_c BCE(sigmoid(s_jc), y_c), with j the last proposal, the whole image.

    s is `bag.logits` and y is the one-hot `label`.
    """
    return label_bce(bag.logits[-1], label)


def loss_max_score(bag: Bag, label: Tensor) -> Tensor:
    """Prediction-based (YOLO9000): sum_c BCE(sigmoid(s_jc), y_c), with j = argmax_j s_jl.

    l is the label. s is `bag.logits` and y is the one-hot `label`.
    """
    return label_bce(bag.logits[bag.logits[:, label].argmax()], label)


def loss_min_loss(bag: Bag, label: Tensor) -> Tensor:
    """An alternative in Detic's code: min_j sum_c BCE(sigmoid(s_jc), y_c), over all proposals j.

    s is `bag.logits` and y is the one-hot `label`.
    """
    return label_bce(bag.logits, label).min()


def loss_wsddn(bag: Bag, label: Tensor) -> Tensor:
    """WSDDN (arXiv 1511.02853): mean_c BCE(p_c, y_c), p_c = sum_j sigmoid(s_jc) softmax_j(r_jc).

    s is `logits` and r is `prop_logits`. The sum and the softmax run over the proposals j. y is the
    one-hot `label`. p is clamped to [1e-10, 1 - 1e-10]. This loss is a mean over the C + 1 columns
    c, whereas the other losses are sums.
    """
    p = (bag.logits.sigmoid() * bag.prop_logits.softmax(0)).sum(0)  # (C + 1,)
    p = p.clamp(1e-10, 1 - 1e-10)
    return F.binary_cross_entropy(p, F.one_hot(label, len(p)).to(p))


RIVALS = {
    "max_score": loss_max_score,
    "first": loss_first,
    "image": loss_image,
    "min_loss": loss_min_loss,
    "wsddn": loss_wsddn,
}


def mean_over_bags(
    loss: Callable[[Bag, Tensor], Tensor], bags: list[Bag], image_labels: list[Tensor]
) -> Tensor:
    """L_im = 1/B sum_i 1/|Y_i| sum_{y in Y_i} loss(bag_i, y) of B images with labels Y_i (K,).

    An image without a label or without a proposal adds 0.
    loss: maps a bag and a label to a scalar; bags: B, at least one; image_labels: B tensors (K,)
    """
    terms = [bags[0].logits.sum() * 0]  # a gradient even if there is no other term
    for bag, labels in zip(bags, image_labels):
        if len(bag.boxes):
            terms += [loss(bag, label) / len(labels) for label in labels]
    return torch.stack(terms).sum() / len(bags)
