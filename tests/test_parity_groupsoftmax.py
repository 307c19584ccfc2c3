"""GroupSoftmax against tensors recorded from the official implementation.

CONCORD_PARITY names the folder. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error.
"""

import pytest
import torch
from parity import (
    case,
    check,
    report,  # noqa: F401 (a fixture)
)
from torch import Tensor
from torch.nn import functional as F

import groupsoftmax
from common.fine_classes import FineClasses
from common.rpn import assign_anchors, object_score


def last(columns: Tensor) -> Tensor:
    """(..., C) with the official background, column 0, as the last column."""
    return columns.roll(-1, -1)


def recorded_table(config: dict) -> FineClasses:
    """The table of fine classes that the recorded group tables say."""
    count = config["num_classes_with_background"] - 1
    cells = {}
    for dataset, numbers in config["box_groups"].items():
        cells[dataset] = tuple(f"{dataset} {n}" if n else "" for n in numbers[1:])
    return FineClasses(tuple(f"fine {row}" for row in range(count)), cells)


def test_groups_of_regions_and_proposals():
    tensors, record = case("groupsoftmax_loss")
    config = record["config"]
    table = recorded_table(config)
    class_of = groupsoftmax.proposal_classes(table)
    official = torch.tensor(config["class_to_rpn_class"][1:]) - 1
    assert equal_partition(class_of, official)
    for dataset in table.cells:
        boxes = groupsoftmax.group_vector(table, dataset)
        assert equal_partition(boxes, last(tensors[f"group.box.{dataset}"]))
        groups = groupsoftmax.proposal_groups(boxes, class_of)
        theirs = last(tensors[f"group.rpn.{dataset}"])
        of_fine = [with_background(classes) for classes in (class_of, official)]
        assert equal_partition(groups[of_fine[0]], theirs[of_fine[1]])


def with_background(classes: Tensor) -> Tensor:
    return F.pad(classes, (0, 1), value=-1)


def equal_partition(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two lists of numbers have equal numbers at the same places."""
    return torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_loss_of_regions():
    tensors, record = case("groupsoftmax_loss")
    config, results = record["config"], record["results"]["box"]
    logits = last(tensors["box.logits"]).clone().requires_grad_()
    labels = tensors["box.labels"] - 1
    groups = {d: last(tensors[f"group.box.{d}"]) for d in config["box_groups"]}
    counts = tensors["box.image_of_row"].bincount().tolist()
    rows = groupsoftmax.rows_of_groups(groups, config["dataset_of_image"], counts)
    loss = groupsoftmax.loss_group(logits, labels, rows)
    loss.backward()
    check("loss", loss, results["loss_mean"])
    check("gradient", logits.grad, last(tensors["box.grad_exact"]), 1e-3)
    same = rows == rows.gather(1, labels[:, None] % rows.shape[1])
    p = (tensors["box.prob"].roll(-1, 1) * same).sum(1, keepdim=True)
    damped = torch.where(same, p / (p + config["gradient_epsilon"]), 1)
    check("operator", logits.grad * damped, last(tensors["box.grad"]), 1e-3)
    for row in range(len(labels)):
        one = slice(row, row + 1)
        loss = groupsoftmax.loss_group(logits[one], labels[one], rows[one])
        check("loss of a row", loss, tensors["box.loss_per_row"][row])


def test_loss_of_proposals():
    tensors, record = case("groupsoftmax_loss")
    config = record["config"]
    logits = tensors["rpn.logits"].movedim(1, -1)  # (B, anchors, P + 1)
    check("objectness", object_score(last(logits)), tensors["rpn.proposal_score"])
    valid = tensors["rpn.labels"] >= 0
    leaf = last(logits).clone().requires_grad_()
    groups = {d: last(tensors[f"group.rpn.{d}"]) for d in config["rpn_groups"]}
    counts = valid.sum(1).tolist()
    assert sum(counts) == record["results"]["rpn"]["normaliser"]
    rows = groupsoftmax.rows_of_groups(groups, config["dataset_of_image"], counts)
    loss = groupsoftmax.loss_group(leaf[valid], tensors["rpn.labels"][valid] - 1, rows)
    loss.backward()
    check("RPN loss", loss, record["results"]["rpn"]["loss_mean"])
    check("RPN gradient", leaf.grad, last(tensors["rpn.grad_exact"].movedim(1, -1)), 1e-3)


def test_labels_of_anchors():
    tensors, record = case("groupsoftmax_loss")
    config = record["config"]["assign"]
    assert (config["pos"], config["neg"]) == (pytest.approx(0.7), pytest.approx(0.3))
    pixels = torch.tensor([0, 0, 1, 1])  # there, a box from 3 to 5 is three pixels wide
    anchors, boxes = tensors["assign.anchors"] + pixels, tensors["assign.boxes"] + pixels
    matched = assign_anchors(anchors, boxes)
    labels = tensors["assign.rpn_classes"][matched.clamp(min=0)]
    labels[matched == -1] = 0
    labels[matched == -2] = record["config"]["ignore_label"]
    assert torch.equal(labels, tensors["assign.labels"])
