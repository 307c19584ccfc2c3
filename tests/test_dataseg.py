"""DaTaSeg: losses and merges, invariants, BoxInst's recording, the command line.

Losses and merges are compared with loops over floats.
"""

import itertools
import json
import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import case, check, listings, report, restore, without_data  # noqa: F401
from PIL import Image
from safetensors.torch import load_file
from test_official_mask2former import BASE_KEYS, official_base
from test_scaledet import bce, random_boxes, sigmoid, unit_rows
from torch import nn

import common.backbone
import common.point_matching
import common.rescue
import dataseg
from common import mask_losses
from common.batch import Batch, Sample, collate
from common.checkpoint import save_tensors
from common.command import parse_args
from common.datasets import load_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import MaskOutput
from common.masks import rasterise
from common.official_mask2former import convert_mask2former_base
from common.point_matching import Pairs, point_sample
from common.segment_map import SegmentMap
from common.segments import FullMasks
from common.targets import Targets
from common.transformer import sine_position

SMALL = dataseg.Args(
    backbone="resnet18",
    text_encoder="minilm",
    channels=32,
    queries=6,
    points=64,
    encoder_layers=1,
    decoder_layers=2,
    amp="off",
    workers=0,
)
CPU = torch.device("cpu")
NAMES = "ade20k,coco-panoptic,o365"
CELL = torch.ones(4, 4, dtype=torch.bool)  # of pixels


class Enough(Exception):
    """Ends a run where a test has seen enough of it."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def softmax(row: list[float]) -> list[float]:
    return [math.exp(x) / sum(map(math.exp, row)) for x in row]


def dice(s: list[float], t: list[float]) -> float:
    """Of Mask2Former, for one mask at its points."""
    return 1 - (2 * sum(a * b for a, b in zip(s, t)) + 1) / (sum(s) + sum(t) + 1)


def soft_bce(logit: float, truth: float) -> float:
    return truth * bce(logit, True) + (1 - truth) * bce(logit, False)


def projection(mask: list[list[float]], *sides: list[float]) -> float:
    """Of BoxInst, for the logits of one mask and the rows and columns of its box."""
    total = 0.0
    for lines, t in zip((mask, zip(*mask)), sides):
        x = [max(map(sigmoid, line)) for line in lines]
        total += 1 - 2 * sum(a * b for a, b in zip(x, t)) / (
            sum(a * a for a in x) + sum(b * b for b in t) + 1e-5
        )
    return total


def random_output(
    depths: int = 2, images: int = 2, queries: int = 4, classes: int = 3, size=(6, 8)
) -> MaskOutput:
    logits, embed = (
        torch.randn(depths, images, queries, classes + 1),
        torch.randn(depths, images, queries, 8),
    )
    return MaskOutput(
        *(x.requires_grad_() for x in (2 * logits, embed, torch.randn(images, 8, *size)))
    )


def all_masks(output: MaskOutput):
    """(Z, B, Q, h, w)"""
    return torch.einsum("zbqc,bchw->zbqhw", output.mask_embed, output.mask_features)


def free(masks, logits) -> MaskOutput:
    """The masks (B, Q, h, w) themselves, in one depth; logits (B, Q, K + 1)."""
    queries = masks.shape[1]
    return MaskOutput(logits[None], torch.eye(queries).expand(1, len(masks), -1, -1), masks)


def blocks(cells):
    """Masks (N, h, w) of cells -> (N, 4 h, 4 w) of pixels."""
    return torch.kron(cells, CELL)


def map_of(rows, count) -> SegmentMap:
    """Segments (h, w) of cells -> a map of pixels."""
    return SegmentMap(torch.kron(rows.short(), CELL.short()), count)


def masks_of(*labels: list[int], size=(6, 8)) -> list[Targets]:
    """Random masks of so many images."""
    cells = [torch.rand(len(own), *size) > 0.5 for own in labels]
    return [
        Targets(torch.zeros(0, 4), torch.tensor(own), masks=blocks(c))
        for own, c in zip(labels, cells)
    ]


def boxes_of(*labels: list[int], side: float = 24) -> list[Targets]:
    return [
        Targets(random_boxes(len(own), side, 4), torch.tensor(own, dtype=torch.long))
        for own in labels
    ]


TARGETS = {"masks": masks_of, "boxes": boxes_of}
NOTHING = {
    "masks": Targets(torch.zeros(0, 4), torch.zeros(0).long(), masks=torch.zeros(0, 24, 32).bool())
}
NOTHING["boxes"] = Targets(torch.zeros(0, 4), torch.zeros(0).long())
ALONE = torch.zeros(3, dtype=torch.bool)


# -- losses ----------------------------------------------------------------------------------------


def test_class_loss_is_the_sum_over_depths_of_weighted_means():
    logits, classes = 3 * torch.randn(3, 2, 4, 6), torch.randint(6, (3, 2, 4))
    classes[0], classes[1, 0] = 5, torch.tensor([0, 5, 2, 5])  # a depth of background alone
    matched = (classes < 5) & (torch.rand(3, 2, 4) < 0.7)  # others of a class join its union
    assert (matched != (classes < 5)).any() and matched.any()
    expected = 0.0
    for depth in range(3):
        loss = weights = 0.0
        for image, query in itertools.product(range(2), range(4)):
            label = classes[depth, image, query].item()
            weight = 1.0 if matched[depth, image, query] else 0.1
            loss -= weight * math.log(softmax(logits[depth, image, query].tolist())[label])
            weights += weight
        expected += loss / weights
    found = dataseg.loss_class(logits, classes, matched)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_mask_losses_at_points():
    logits = 3 * torch.randn(5, 7)
    truth = torch.rand(5, 7)  # between pixels the truth is between 0 and 1
    pairs = list(zip(logits.tolist(), truth.tolist()))
    expected = sum(sum(map(soft_bce, x, t)) / 7 for x, t in pairs) / 2.5
    assert mask_losses.loss_mask(logits, truth, 2.5).item() == pytest.approx(expected, rel=1e-5)
    expected = sum(dice(list(map(sigmoid, x)), t) for x, t in pairs) / 2.5
    assert mask_losses.loss_dice(logits, truth, 2.5).item() == pytest.approx(expected, rel=1e-5)


def test_projection_loss():
    masks, rows, columns = (
        2 * torch.randn(3, 4, 5),
        torch.rand(3, 4).round(),
        torch.rand(3, 5).round(),
    )
    expected = sum(map(projection, masks.tolist(), rows.tolist(), columns.tolist())) / 1.5
    assert dataseg.loss_projection(masks, rows, columns, 1.5).item() == pytest.approx(
        expected, rel=1e-5
    )
    nothing = dataseg.loss_projection(
        torch.full((1, 4, 5), -1e4), torch.zeros(1, 4), torch.zeros(1, 5), 1
    )
    assert nothing == 2  # and no division by 0


def test_projections_of_a_filled_box_and_of_all_that_spans_it():
    box = torch.zeros(8, 10, dtype=torch.bool)
    box[2:6, 3:8] = True
    line = torch.zeros_like(box)
    line[[2, 3, 4, 5, 5], [3, 4, 5, 6, 7]] = True
    sides = box.any(1)[None].float(), box.any(0)[None].float()
    for mask in (box, line):  # boxes cannot tell them apart
        assert dataseg.loss_projection(torch.where(mask, 20.0, -20.0)[None], *sides, 1).abs() < 1e-5
    wider, hollow = box.clone(), box.clone()
    wider[2:6, 8] = True
    hollow[4] = False
    for mask in (wider, hollow):
        assert dataseg.loss_projection(torch.where(mask, 20.0, -20.0)[None], *sides, 1) > 0.05


def test_cells_of_boxes_are_those_whose_centre_is_inside():
    boxes = torch.cat(
        [random_boxes(30, 34, 0.1), torch.tensor([[4.0, 8, 6, 10], [4.0, 8, 5.9, 9.9]])]
    )
    sides = rasterise(boxes, (9, 11))
    assert [side.shape for side in sides] == [(32, 9), (32, 11)]
    for box, *lines in zip(boxes.tolist(), *(side.tolist() for side in sides)):
        for line, low, high in zip(lines, (box[1], box[0]), (box[3], box[2])):
            inside = [
                float(math.floor(low) <= 4 * i + 2 < math.floor(high + 1)) for i in range(len(line))
            ]
            assert line == inside or (not any(inside) and sum(line) == 1)


@pytest.mark.parametrize(
    "box, rows, columns",
    [
        ([0, 0, 20, 16], [0, 1, 2, 3], [0, 1, 2, 3, 4]),  # all of the image
        ([4, 0, 6, 16], [0, 1, 2, 3], [1]),  # pixel 6 is the centre of a cell and at the edge
        ([2.9, 4.5, 5.9, 5.5], [1], [0]),  # from pixel 2 to pixel 5; no row's centre: the nearest
        ([3, 9, 4, 9.5], [2], [0]),  # no centre at all: the nearest of both
        ([19.5, 15.5, 20, 16], [3], [4]),  # in the corner
        ([19, 0, 20, 0.5], [0], [4]),
    ],
)
def test_every_box_has_a_cell(box, rows, columns):
    found = rasterise(torch.tensor([[0.0, 0, 9, 9], box]), (4, 5))
    assert [side[1].nonzero().flatten().tolist() for side in found] == [rows, columns]
    assert all(side.dtype == torch.float32 and side.max() == 1 for side in found)


# -- matching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
def test_matching_is_the_cheapest_by_the_costs_of_the_losses(kind, monkeypatch):
    output, targets, costs = random_output(), TARGETS[kind]([2, 0, 2], [1]), []
    assign = dataseg.assign
    monkeypatch.setattr(dataseg, "assign", lambda found: costs.extend(found) or assign(found))
    args, masks = replace(SMALL, points=30), all_masks(output)
    torch.manual_seed(3)
    pairs = dataseg.match(args, output, targets)
    torch.manual_seed(3)
    for i, (t, cost, (depths, queries, columns, counts)) in enumerate(
        zip(targets, costs, pairs, strict=True)
    ):
        points = torch.rand(1, 30, 2)  # the same for all queries and depths
        for z in range(2):
            for q, n in itertools.product(range(4), range(len(t.labels))):
                expected = -2 * softmax(output.logits[z, i, q].tolist())[t.labels[n]]
                if kind == "masks":
                    x = point_sample(masks[z, i, q][None], points)[0].tolist()
                    truth = point_sample(t.masks[n][None], points)[0].tolist()
                    expected += 5 * sum(map(soft_bce, x, truth)) / 30 + 5 * dice(
                        list(map(sigmoid, x)), truth
                    )
                else:
                    sides = (side[n].tolist() for side in rasterise(t.boxes, (6, 8)))
                    expected += 5 * projection(masks[z, i, q].tolist(), *sides)
                assert cost[z, q, n].item() == pytest.approx(expected, rel=1e-4)
            all_ways = itertools.permutations(range(4), len(t.labels))
            best = min(
                all_ways, key=lambda way: sum(cost[z, q, n].item() for n, q in enumerate(way))
            )
            here = depths == z
            assert dict(zip(columns[here].tolist(), queries[here].tolist())) == dict(
                enumerate(best)
            )
        assert (columns.diff() >= 0).all() and not cost.requires_grad
        assert counts == columns.bincount(minlength=len(t.labels)).tolist()


@pytest.mark.parametrize("kind", TARGETS)
def test_matching_of_none_and_of_more_than_there_are_queries(kind):
    output = random_output(depths=3, queries=4)
    [one, many] = dataseg.match(SMALL, output, [NOTHING[kind], *TARGETS[kind]([0, 1, 2] * 3)])
    assert [len(part) for part in one] == [0, 0, 0, 0]
    depth, query, target, counts = many
    assert counts == target.bincount(minlength=9).tolist()
    assert sorted(zip(depth.tolist(), query.tolist())) == list(
        itertools.product(range(3), range(4))
    )
    assert len(set(zip(depth.tolist(), target.tolist()))) == 12


# -- the sum ---------------------------------------------------------------------------------------


@pytest.fixture
def cells(monkeypatch):
    """The points of the losses are the centres of the 6 x 8 cells.

    There masks and targets have the values of the cells.
    """
    y, x = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(8) + 0.5) / 8, indexing="ij")

    def centres(logits, num):
        assert num == SMALL.points and not logits.requires_grad
        return torch.stack([x, y], -1).view(1, -1, 2).expand(len(logits), -1, -1)

    monkeypatch.setattr(common.point_matching, "uncertain_points", centres)


@pytest.mark.parametrize("kind", TARGETS)
def test_loss_of_all_depths_and_images(kind, cells, monkeypatch):
    output, targets = random_output(depths=3), TARGETS[kind]([2, 0, 2], [1])
    masks, pairs = all_masks(output), dataseg.match(SMALL, output, targets)
    monkeypatch.setattr(dataseg, "match", lambda *_: pairs)
    monkeypatch.setattr(mask_losses, "mean_over_ranks", lambda count: count * 1.5)
    labels, expected = (
        torch.full((3, 2, 4), 3),
        dict.fromkeys(("loss_mask", "loss_dice", "loss_projection"), 0.0),
    )
    for i, (t, matched) in enumerate(zip(targets, pairs)):
        for z, q, n in zip(*(part.tolist() for part in matched[:3])):
            labels[z, i, q] = t.labels[n]
            if kind == "masks":
                x, truth = (
                    masks[z, i, q].flatten().tolist(),
                    t.masks[n, 2::4, 2::4].flatten().float().tolist(),
                )
                # 4 targets here, 8 on another rank
                expected["loss_mask"] += 5 * sum(map(soft_bce, x, truth)) / 48 / 6
                expected["loss_dice"] += 5 * dice(list(map(sigmoid, x)), truth) / 6
            else:
                sides = (side[n].tolist() for side in rasterise(t.boxes, (6, 8)))
                expected["loss_projection"] += 5 * projection(masks[z, i, q].tolist(), *sides) / 6
    expected = {name: value for name, value in expected.items() if value}
    expected["loss_class"] = 2 * dataseg.loss_class(output.logits, labels, labels < 3).item()
    losses = dataseg.compute_losses(SMALL, output, targets, ALONE)
    assert losses.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-4)
    losses["loss"].backward()  # every depth is supervised
    assert output.logits.grad.any(-1).all() and output.mask_embed.grad.any(-1).any(-1).all()
    monkeypatch.setattr(mask_losses, "mean_over_ranks", lambda count: count * 0.1)
    few = dataseg.compute_losses(SMALL, output, targets, ALONE)
    for name in expected.keys() - {"loss_class"}:
        # at least one target
        assert few[name].item() == pytest.approx(6 * losses[name].item(), rel=1e-4)


@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("kind", TARGETS)
def test_an_image_without_targets_beside_another(kind, merging):
    output, (some,) = random_output(), TARGETS[kind]([2, 0])
    losses = dataseg.compute_losses(
        replace(SMALL, merge_in_training=merging), output, [NOTHING[kind], some], ~ALONE
    )
    losses["loss"].backward()
    assert (
        losses["loss"].isfinite()
        and output.mask_features.grad[1].any()
        and not output.mask_features.grad[0].any()
    )
    assert output.logits.grad.any(-1).all()


def test_boxes_alone_teach_rectangles():
    """Free mask logits, positive in the beginning, become the boxes that they are matched with."""
    targets = [Targets(torch.tensor([[8.0, 12, 40, 36], [36, 4, 60, 60]]), torch.tensor([2, 0]))]
    masks, logits = (
        (1 + 0.1 * torch.randn(1, 4, 16, 16)).requires_grad_(),
        torch.zeros(1, 4, 4, requires_grad=True),
    )
    optimizer = torch.optim.Adam([masks, logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        dataseg.compute_losses(SMALL, free(masks, logits), targets, ALONE)["loss"].backward()
        optimizer.step()
    for n, (label, box) in enumerate(zip((2, 0), ((2, 3, 10, 9), (9, 1, 15, 15)))):
        (query,) = (logits[0].argmax(-1) == label).nonzero()[0].tolist()
        found, wanted = masks[0, query] > 0, torch.zeros(16, 16, dtype=torch.bool)
        wanted[box[1] : box[3], box[0] : box[2]] = True
        assert (found & wanted).sum() / (found | wanted).sum() > 0.97, n


# -- merge -----------------------------------------------------------------------------------------

KINDS = Vocabulary("a", ("cat", "grass", "sky"), is_thing=(True, False, False))


def test_merged_classes_of_the_tasks():
    classes = LabelSpace([KINDS])
    merged = {
        task: dataseg.merged_classes(classes, task).tolist()
        for task in ("semantic", "panoptic", "instance")
    }
    assert merged == {
        "semantic": [True] * 3,
        "panoptic": [False, True, True],
        "instance": [False] * 3,
    }
    # what is not known to be stuff is left alone
    plain = LabelSpace([replace(KINDS, is_thing=None)])
    merged = {task: dataseg.merged_classes(plain, task).tolist() for task in merged}
    assert merged == {"semantic": [True] * 3, "panoptic": [False] * 3, "instance": [False] * 3}


def test_merged_targets_are_unions():
    rows, labels = torch.randint(-1, 6, (5, 7)).short(), torch.tensor([1, 0, 2, 1, 0, 1])

    def merged(rows, labels, classes):
        target = Targets(torch.zeros(0, 4), labels, masks=SegmentMap(rows, len(labels)))
        dataseg.merge_targets([target], classes)
        return target.masks, target.labels

    found, classes = merged(rows, labels, torch.tensor([False, True, True]))
    assert classes.tolist() == [0, 0, 1, 2] and len(found) == 4
    for mask, members in zip(found.stack().tolist(), ([1], [4], [0, 3, 5], [2])):
        for y, x in itertools.product(range(5), range(7)):
            assert mask[y][x] == (rows[y, x].item() in members)
    same = merged(rows, labels, ALONE)
    assert torch.equal(same[0].rows, rows) and torch.equal(same[1], labels)
    nothing, none = merged(torch.full_like(rows, -1), labels[:0], ~ALONE)
    assert nothing.stack().shape == (0, 5, 7) and none.shape == (0,)


def pixels(size=(20, 24)):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8)


def labelled(dataset: str, supervision: str, labels: list[int], size=(20, 24)) -> Sample:
    """An image whose ground truth is of that kind, with some pixels of no segment."""
    sample = replace(Sample.unlabelled(pixels(size), dataset, 0, 0), supervision=supervision)
    sample = replace(sample, labels=torch.tensor(labels, dtype=torch.long))
    if supervision in ("semantic", "panoptic"):
        return replace(sample, segments=torch.randint(-1, len(labels), size).short())
    sample = replace(sample, boxes=random_boxes(len(labels), min(size)))
    return (
        sample
        if supervision == "boxes"
        else replace(sample, masks=torch.rand(len(labels), *size) > 0.5)
    )


def test_targets_of_each_supervision():
    kinds = {
        "semantic": [2, 0, 1],
        "panoptic": [1, 0, 2, 1, 0],
        "instances": [1, 1],
        "boxes": [0, 1],
    }
    samples = [labelled("a", kind, labels) for kind, labels in kinds.items()]
    batch, targets = collate(samples), []
    for i, kind in enumerate(kinds):
        merged = dataseg.merged_classes(LabelSpace([KINDS]), dataseg.TASKS[kind])
        targets.append(
            dataseg.prepare_targets(replace(batch, samples=[batch.samples[i]]), merged)[0]
        )
    *targets, boxes = targets
    assert [t.labels.tolist() for t in targets] == [[0, 1, 2], [0, 0, 1, 2], [1, 1]]
    # rows of the sample, in the order of the targets
    members = [[[1], [2], [0]], [[1], [4], [0, 3], [2]], [[0], [1]]]
    for t, sample, rows in zip(targets, samples, members):
        own = (
            sample.masks
            if sample.segments is None
            else sample.segments == torch.arange(5)[:, None, None]
        )
        wanted = torch.zeros(len(rows), 32, 32, dtype=torch.bool)  # padded as the batch
        wanted[:, :20, :24] = torch.stack([own[parts].any(0) for parts in rows])
        masks = t.masks if sample.segments is None else t.masks.stack()
        assert torch.equal(masks, wanted)
    assert (
        boxes.masks is None
        and torch.equal(boxes.boxes, samples[3].boxes)
        and boxes.labels.tolist() == [0, 1]
    )


def test_free_queries_join_the_target_of_their_class_in_which_they_lie():
    output = random_output(depths=3, queries=12)
    labels, merged = torch.tensor([1, 0, 2]), torch.tensor([False, True, True])
    rows = torch.where(torch.rand(6, 8) > 0.4, 2, torch.randint(-1, 2, (6, 8)))
    cells = rows == torch.arange(3)[:, None, None]
    t = Targets(torch.zeros(0, 4), labels, masks=map_of(rows, 3))
    both = dataseg.match(SMALL, output, [t] * 2)
    pairs = both[1][:3]
    _, (owner, query) = dataseg.join_members(output, both, [t] * 2, merged)
    said = output.logits[:, 1].argmax(-1).tolist()
    masks = (all_masks(output)[:, 1] > 0).tolist()
    matched = [set(pairs[1][pairs[0] == z].tolist()) for z in range(3)]
    expected, elsewhere = [], 0
    for row, (z, _, n) in enumerate(zip(*(part.tolist() for part in pairs))):
        for q in range(12):
            if q in matched[z] or said[z][q] != labels[n] or not merged[labels[n]]:
                continue
            own, truth = (itertools.chain(*cells) for cells in (masks[z][q], cells[n].tolist()))
            inside = [there for here, there in zip(own, truth) if here]
            if 2 * sum(inside) > len(inside):
                expected.append((z, q, n, row))
            else:
                elsewhere += 1
    members = (pairs[0][owner], query, pairs[2][owner], owner)
    found = zip(*(part.tolist() for part in members))
    assert sorted(found) == sorted(expected) and len(expected) > 3 and elsewhere > 3


def test_joined_queries_are_supervised_as_one_mask(cells, monkeypatch):
    """The merged logit is the largest. Its gradient reaches the member that has it.

    All members learn the class. Another one that lies elsewhere learns background.
    """
    # queries 0 to 2 and 5 predict the second class
    logits = 9 * torch.eye(4)[[1, 1, 1, 0, 3, 1]][None]
    rows = torch.where(torch.rand(6, 8) > 0.2, 1, torch.randint(-1, 1, (6, 8)))
    masks, truth = torch.randn(1, 6, 6, 8), rows == torch.arange(2)[:, None, None]
    masks[0, 5] = torch.where(truth[1], -1.0, 1.0)
    masks.requires_grad_()
    targets = [Targets(torch.zeros(0, 4), torch.tensor([0, 1]), masks=map_of(rows, 2))]
    pairs = Pairs(*map(torch.tensor, ([0, 0], [3, 1], [0, 1])), [1, 1])
    classes, loss_class = [], dataseg.loss_class
    monkeypatch.setattr(dataseg, "match", lambda *_: [pairs])
    monkeypatch.setattr(
        dataseg,
        "loss_class",
        lambda x, own, matched: (
            classes.append((own[0, 0].tolist(), matched[0, 0].tolist()))
            or loss_class(x, own, matched)
        ),
    )
    for on, members in ((True, [0, 1, 2]), (False, [1])):
        args, masks.grad = replace(SMALL, merge_in_training=on), None
        losses = dataseg.compute_losses(
            args, free(masks, logits), targets, torch.tensor([False, True, False])
        )
        loss_mask = loss_dice = 0.0
        for x, t in ((masks[0, 3], truth[0]), (masks[0, members].amax(0), truth[1])):
            x, t = x.flatten().tolist(), t.flatten().float().tolist()
            loss_mask += 5 * sum(map(soft_bce, x, t)) / 48 / 2
            loss_dice += 5 * dice(list(map(sigmoid, x)), t) / 2
        assert losses["loss_mask"].item() == pytest.approx(loss_mask, rel=1e-4)
        assert losses["loss_dice"].item() == pytest.approx(loss_dice, rel=1e-4)
        losses["loss"].backward()
        reached = masks.grad[0].abs() > 1e-4
        best = torch.tensor(members)[masks[0, members].argmax(0)]  # (h, w)
        assert all(torch.equal(reached[q], (best == q) & (q in members)) for q in (0, 1, 2))
        assert reached[3].all() and not reached[4:].any()
    matched = [False, True, False, True, False, False]  # members are not, and weigh less
    assert classes == [([1, 1, 1, 0, 3, 3], matched), ([3, 1, 3, 0, 3, 3], matched)]


def merged(masks, probabilities, classes):
    """`dataseg.merge` of masks (Q, H, W) that are not resized."""
    sizes = [tuple(masks.shape[1:])] * 3
    found, rows = dataseg.merge(FullMasks(masks, *sizes), probabilities, classes)
    return torch.cat(list(found.strips()), 1), rows


def test_two_halves_are_the_whole():
    whole, noise = torch.where(torch.rand(6, 8) > 0.5, 5.0, -5.0), torch.randn(3, 6, 8)
    left = torch.arange(8) < 4
    masks = torch.stack(
        [noise[0], whole.where(left, -5), noise[1], whole.where(~left, -5), noise[2], whole]
    )
    p = (
        torch.tensor(
            [[6.0, 2, 1, 1], [1, 5, 2, 2], [0, 1, 0, 9], [1, 6, 1, 2], [7, 1, 1, 1], [1, 2, 6, 1]]
        )
        / 10
    )
    found, rows = merged(masks, p, torch.tensor([False, True, False]))
    assert torch.equal(found, torch.stack([noise[0], noise[1], noise[2], whole, whole]))
    assert torch.equal(rows, p[[0, 2, 4, 5, 3]])  # of the two the surest
    for part, given in zip(merged(masks, p, ALONE), (masks, p)):  # instances
        assert torch.equal(part, given)
    found, rows = merged(masks, p, ~ALONE)
    assert rows.tolist() == p[[2, 4, 3, 5]].tolist() and torch.equal(
        found[1], torch.maximum(noise[0], noise[2])
    )


# -- predictions -----------------------------------------------------------------------------------


class Says:
    """Takes the place of a model.

    probabilities: (B, Q, K + 1) of its last depth; masks: (B, Q, h, w), its mask logits
    """

    def __init__(self, probabilities, masks, **changes):
        self.args, last = replace(SMALL, **changes), free(masks, probabilities.log())
        logits, embed = (
            torch.cat([torch.randn_like(x), x]) for x in (last.logits, last.mask_embed)
        )
        self.output, self.ready = MaskOutput(logits, embed, masks), False

    def eval(self):
        self.ready = True

    def parameters(self):
        yield self.output.logits

    def __call__(self, images, sizes, text):
        assert torch.equal(text, CLASSES.text) and self.ready
        return self.output


CLASSES = LabelSpace([KINDS], lambda names, dataset: torch.eye(3, 384))


def images_of(*sizes: tuple[tuple[int, int], tuple[int, int]]) -> Batch:
    """Images of the first size, of files of the second."""
    return collate(
        [
            replace(Sample.unlabelled(pixels(s), "a", 0, 0), original_size=original)
            for s, original in sizes
        ]
    )


def test_semantic_maps_are_sums_over_all_proposals():
    batch = images_of(((20, 30), (9, 7)), ((28, 17), (12, 14)))
    p, masks = torch.randn(2, 5, 4).softmax(-1), 3 * torch.randn(2, 5, 8, 8)
    classes = LabelSpace([replace(KINDS, is_thing=None, text=CLASSES.text)])
    found = dataseg.predict(Says(p, masks, merge="sum"), batch, classes, "semantic")
    for i, (size, original) in enumerate((((20, 30), (9, 7)), ((28, 17), (12, 14)))):
        assert (
            found[i].keys() == {"class_names", "size", "semantic"} and found[i]["size"] == original
        )
        assert found[i]["class_names"] == KINDS.names and found[i]["semantic"].shape == original
        s = restore(masks[i], (32, 32), size, original).sigmoid()
        for y, x in itertools.product(*map(range, original)):
            score = [sum(p[i, q, k].item() * s[q, y, x].item() for q in range(5)) for k in range(3)]
            assert found[i]["semantic"][y, x].item() == score.index(max(score))


def test_union_and_sum_disagree_where_many_are_unsure():
    # 0.3 + 0.3 against 0.45
    p = torch.tensor([[[0.6, 0, 0, 0.4], [0.6, 0, 0, 0.4], [0, 0.9, 0, 0.1]]])
    batch, masks = images_of(((32, 32), (8, 8))), torch.zeros(1, 3, 8, 8)
    for task in ("semantic", "panoptic"):
        maps = [
            dataseg.predict(Says(p, masks, merge=m), batch, CLASSES, task)[0]["semantic"]
            for m in ("sum", "max")
        ]
        assert (maps[0] == 0).all() and (maps[1] == 1).all()


def test_union_of_a_class_votes_for_no_other():
    """A proposal of background has no vote, nor has the second class of one that is merged."""
    p = torch.tensor([[[0.5, 0.45, 0, 0.05], [0, 0.3, 0, 0.7]]])
    batch, masks = images_of(((32, 32), (8, 8))), torch.full((1, 2, 8, 8), 9.0)
    maps = [
        dataseg.predict(Says(p, masks, merge=m), batch, CLASSES, "semantic")[0]["semantic"]
        for m in ("sum", "max")
    ]
    assert (maps[0] == 1).all() and (maps[1] == 0).all()


def region(*parts: tuple[slice, slice]):
    """(8, 8) logits, positive in the parts."""
    mask = torch.full((8, 8), -20.0)
    for part in parts:
        mask[part] = 20.0
    return mask


def test_panoptic_maps():
    """Halves of stuff are one segment, things are not.

    Improbable and overlapped proposals are left out.
    """
    s, top = slice, slice(0, 3)
    proposals = [
        # 1: a cat
        ([0.9, 0, 0, 0.1], region((top, s(0, 4)))),
        # 2: another; the first wins 2 of 14 cells
        ([0.85, 0, 0, 0.15], region((top, s(4, 8)), (s(0, 2), s(3, 4)))),
        # only 3 of 4 cells are left
        ([0.82, 0, 0, 0.18], region((s(3, 4), s(0, 3)), (s(2, 3), s(0, 1)))),
        # 3: grass, the more probable part
        ([0, 0.95, 0.05, 0], region((s(4, 7), s(0, 6)))),
        # more grass, of which less than 0.8 is left
        ([0, 0.9, 0.1, 0], region((s(4, 7), s(2, 8)))),
        # sky
        ([0, 0, 0.7, 0.3], region((s(7, 8), s(0, 8)))),
        # unsure of grass: it must not join the more probable part
        ([0, 0.35, 0.33, 0.32], region((s(7, 8), s(0, 8)))),
        # nothing
        ([0.05, 0, 0, 0.95], region((s(0, 8), s(0, 8)))),
    ]
    p, masks = (torch.stack([torch.as_tensor(x) for x in part])[None] for part in zip(*proposals))
    batch, expected = images_of(((32, 32), (8, 8))), torch.zeros(8, 8, dtype=torch.int32)
    for number, part in enumerate([(top, s(0, 4)), (top, s(4, 8)), (s(4, 7), s(0, 8))], 1):
        expected[part] = number
    (found,) = dataseg.predict(Says(p, masks), batch, CLASSES, "panoptic")
    assert found.keys() == {"class_names", "size", "semantic", "panoptic", "segments_info"}
    assert found["panoptic"].tolist() == expected.tolist()
    kinds = {"id": [1, 2, 3], "label": [0, 0, 1], "isthing": [True, True, False]}
    assert {key: [info[key] for info in found["segments_info"]] for key in kinds} == kinds
    assert [info["score"] for info in found["segments_info"]] == pytest.approx([0.9, 0.85, 0.95])
    (found,) = dataseg.predict(Says(p, masks, object_threshold=0.6), batch, CLASSES, "panoptic")
    expected[7] = 4
    assert (
        found["panoptic"].tolist() == expected.tolist() and found["segments_info"][3]["label"] == 2
    )


def test_instances_are_not_merged():
    p, masks, original = torch.randn(1, 5, 4).softmax(-1), 3 * torch.randn(1, 5, 8, 8), (9, 7)
    (found,) = dataseg.predict(Says(p, masks), images_of(((20, 30), original)), CLASSES, "instance")
    assert found.keys() == {"class_names", "size", "boxes", "labels", "scores", "masks"}
    assert len(found["boxes"]) == 15 and found["masks"].shape == (15, *original)
    logits, expected = restore(masks[0], (32, 32), (20, 30), original), []
    for q, k in itertools.product(range(5), range(3)):
        inside = [sigmoid(x) for x in logits[q].flatten().tolist() if x > 0]
        expected.append((p[0, q, k].item() * sum(inside) / len(inside), k, q))
    expected.sort(reverse=True)
    assert found["scores"].tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-4)
    assert found["class_names"] == [KINDS.names[k] for _, k, _ in expected]
    assert torch.equal(found["masks"], logits[[q for _, _, q in expected]] > 0)


# -- model -----------------------------------------------------------------------------------------


def small_model(
    vocabularies: list[Vocabulary] | None = None, **changes
) -> tuple[dataseg.Model, LabelSpace]:
    args = replace(SMALL, **changes)
    label_space = dataseg.build_label_space(args, vocabularies or [KINDS])
    return dataseg.Model(args, label_space, pretrained=False), label_space


def test_classes_are_cosines_and_background_is_the_last():
    model, _ = small_model()
    model.class_embed, text, e = nn.Identity(), unit_rows(4, 384), 5 * torch.randn(2, 3, 384)
    for scale in (20.0, 100.0):
        model.logit_scale.data.fill_(math.log(scale))
        model.background.data = 3 * torch.randn(384)
        logits = model.classify(e, text)
        assert logits.shape == (2, 3, 5)
        rows = [*text.tolist(), model.background.tolist()]
        for b, q, k in itertools.product(range(2), range(3), range(5)):
            one, other = e[b, q].tolist(), rows[k]
            lengths = math.sqrt(sum(x * x for x in one) * sum(x * x for x in other))
            expected = scale * sum(x * y for x, y in zip(one, other)) / lengths
            assert logits[b, q, k].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def random_maps(batch: int = 2, channels: int = 32):
    maps = [torch.randn(batch, channels, 2 * 2**i, 3 * 2**i) for i in range(3)]  # strides 32, 16, 8
    return torch.randn(batch, channels, 16, 24), maps


def test_queries_look_at_one_level_after_the_other_and_each_answer_counts():
    (model, label_space), (mask_features, maps) = small_model(decoder_layers=4), random_maps()
    output = model.decode(mask_features, maps, label_space.text)
    q, expected = model.query_feat.expand(2, -1, -1), []
    for i in range(5):
        z, mask_embed = model.head(q)
        expected.append((z, mask_embed, torch.einsum("bqc,bchw->bqhw", mask_embed, mask_features)))
        if i < 4:
            feature, layer = maps[i % 3], model.layers[i]
            blocked = (
                nn.functional.interpolate(
                    expected[-1][2], feature.shape[-2:], mode="bilinear"
                ).flatten(2)
                < 0
            )
            blocked &= ~blocked.all(2, keepdim=True)
            position = sine_position(*feature.shape[-2:], 32).flatten(2).transpose(1, 2)
            memory = feature.flatten(2).transpose(1, 2) + model.level_embed[i % 3]
            q = layer.cross_attend(q, model.query_embed, memory, position, blocked)
            q = layer.feed_forward(layer.self_attend(q, model.query_embed))
    z, mask_embed, masks = map(torch.stack, zip(*expected))
    torch.testing.assert_close(output.mask_embed, mask_embed)
    torch.testing.assert_close(output.logits, model.classify(z, label_space.text))
    depth, query = torch.tensor([0, 4, 4]), torch.tensor([5, 0, 5])
    torch.testing.assert_close(output.masks(depth, 1, query), masks[depth, 1, query])
    torch.testing.assert_close(output.masks(-1, 0), masks[4, 0])


def test_permuted_queries_give_permuted_outputs():
    (model, label_space), maps, order = small_model(), random_maps(), torch.randperm(6)
    one = model.decode(*maps, label_space.text)
    model.query_feat.data, model.query_embed.data = (
        model.query_feat[order],
        model.query_embed[order],
    )
    other = model.decode(*maps, label_space.text)
    torch.testing.assert_close(other.logits, one.logits[:, :, order])
    torch.testing.assert_close(other.mask_embed, one.mask_embed[:, :, order])


def test_model_as_it_starts():
    model, _ = small_model(queries=200)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.background.std().item() == pytest.approx(0.02, rel=0.2)
    for embedding in (model.query_feat, model.query_embed, model.level_embed):
        assert embedding.std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("listing", listings(BASE_KEYS))
def test_base_has_the_shapes_of_the_official_one(listing):
    tensors, metadata = convert_mask2former_base(without_data(listing))
    args = dataseg.Args(**metadata["args"])
    with torch.device("meta"):
        label_space = LabelSpace([KINDS], lambda names, dataset: torch.zeros(len(names), 768))
        own = dataseg.Model(args, label_space, pretrained=False).state_dict()
    base = {key: t.shape for key, t in tensors.items()}
    assert base == {key: t.shape for key, t in own.items() if key in base}
    rest = {"class_embed.weight", "class_embed.bias", "background", "logit_scale"}
    assert own.keys() - base.keys() == rest


def test_swapping_the_vocabulary_changes_the_columns_alone():
    model, label_space = small_model()
    maps = random_maps()
    one = model.decode(*maps, label_space.text)
    names = ("dog", *reversed(KINDS.names))
    other_space = label_space.swap(", ".join(names))
    assert other_space.names == names
    assert torch.equal(other_space.text[1:], label_space.text.flip(0))
    other = model.decode(*maps, other_space.text)
    assert torch.equal(one.mask_embed, other.mask_embed) and other.logits.shape[-1] == 5
    torch.testing.assert_close(other.logits[..., [3, 2, 1, 4]], one.logits)
    message = "512 dimensions, this model needs 384; use the --text-encoder"
    with pytest.raises(InputError, match=message):
        label_space.swap(Vocabulary("b", ("x", "y", "z"), text=unit_rows(3, 512)))


DATA = {"ade": "semantic", "pan": "panoptic", "ins": "instances", "box": "boxes"}
SPACE = [replace(KINDS, dataset=name) for name in DATA]


def test_names_of_datasets_make_no_difference():
    model, label_space = small_model(SPACE)
    assert label_space.text.shape == (12, 384)
    outputs, losses = [], []
    for name in ("ade", "box"):
        torch.manual_seed(5)
        batch = collate(
            [
                labelled(name, "instances", [0, 1], (64, 64)),
                labelled(name, "instances", [2], (64, 64)),
            ]
        )
        output = model.eval()(batch.images, batch.sizes, label_space.part(name).text)
        outputs.append(output)
        losses.append(
            dataseg.compute_losses(SMALL, output, dataseg.prepare_targets(batch, ALONE), ALONE)[
                "loss"
            ]
        )
    assert all(
        torch.equal(one, other)
        for one, other in zip(vars(outputs[0]).values(), vars(outputs[1]).values())
    )
    assert losses[0] == losses[1]


@pytest.mark.parametrize("labels", [([0, 1, 2], [1, 2]), ([], [])], ids=["targets", "none"])
@pytest.mark.parametrize("name", DATA)
def test_every_batch_teaches_everything_but_texts(name, labels):
    """DistributedDataParallel waits for the gradient of every parameter."""
    model, label_space = small_model(SPACE)
    batch = collate([labelled(name, DATA[name], own, (64, 64)) for own in labels])
    output = model.train()(batch.images, batch.sizes, label_space.part(name).text)
    losses = dataseg.compute_losses(
        model.args, output, dataseg.prepare_targets(batch, ALONE), ALONE
    )
    losses["loss"].backward()
    assert losses["loss"].isfinite() and losses["loss_class"] > 0
    lacking = [
        key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not lacking and model.background.grad.any() and model.logit_scale.grad.any()
    assert label_space.text.grad is None and not label_space.text.requires_grad
    of_masks = {"loss_projection"} if name == "box" else {"loss_mask", "loss_dice"}
    assert losses.keys() == {"loss", "loss_class"} | of_masks
    assert all((losses[key] > 0) == bool(labels[0]) for key in of_masks)


def test_images_of_a_batch_do_not_mix():
    model, label_space = small_model()
    batch = collate([Sample.unlabelled(pixels(size), "a", 0, 0) for size in ((96, 64), (70, 96))])
    model.eval()
    both, alone = (model(batch.images[i:], batch.sizes[i:], label_space.text) for i in range(2))
    torch.testing.assert_close(both.logits[:, 1:], alone.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(all_masks(both)[:, 1:], all_masks(alone), rtol=1e-3, atol=1e-3)


# -- recordings of official code -------------------------------------------------------------------


def test_parity_projection_loss():
    """BoxInst's."""
    tensors, record = case("boxinst_projection")
    logits = tensors["mask_logits"][:, 0].requires_grad_()
    count, stride = len(logits), record["config"]["mask_out_stride"]
    images = range(len(record["config"]["num_gt"]))
    boxes, masks = (
        torch.cat([tensors[f"gt{i}.{kind}"] for i in images]) for kind in ("boxes", "box_masks")
    )
    rows, columns = rasterise(boxes, logits.shape[-2:], stride)
    assert torch.equal(rows[:, :, None] * columns[:, None], masks)
    loss = dataseg.loss_projection(logits, rows, columns, count)
    check("projection: loss", loss, record["loss_project"])
    loss.backward()
    check("projection: gradient", logits.grad, tensors["project.grad_logits"][:, 0], 1e-3)
    x, t = logits.detach().sigmoid().flatten(1), masks.flatten(1)
    dice = dataseg.projection_dice((x * t).sum(1), x, t)
    check("projection: dice of whole masks", dice, tensors["dice.per_instance"])


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets(tiny_root):
    return load_datasets(NAMES, "train", str(tiny_root), masks=True, accepts=dataseg.SUPERVISION)


def space_of(args, datasets) -> LabelSpace:
    return dataseg.build_label_space(args, [d.vocabulary for d in datasets])


def test_settings_of_the_paper_and_its_base():
    args = dataseg.Args()
    assert (args.lr, args.batch_size, args.base_batch_size, args.steps) == (1e-4, 16, 16, 368_750)
    assert (args.queries, args.points, args.channels, args.encoder_layers) == (100, 12_544, 256, 6)
    assert (args.decoder_layers, args.image_size, args.semantic_size, args.test_size) == (
        9,
        1024,
        640,
        800,
    )
    assert (args.jitter, args.semantic_jitter, args.object_threshold) == (
        (0.1, 2.0),
        (0.5, 2.0),
        0.8,
    )
    assert (args.backbone, args.text_encoder, args.prompts) == (
        "resnet50.tv_in1k",
        "ViT-L-14/openai",
        "auto",
    )
    assert (args.merge, args.merge_in_training, args.task) == ("max", True, "panoptic")


def test_recipe(datasets, tmp_path, monkeypatch):
    """AdamW and clipping are Mask2Former's. The poly schedule's rate is scaled with the batch."""
    adamw, clip, parameter_groups = (
        torch.optim.AdamW,
        nn.utils.clip_grad_norm_,
        dataseg.parameter_groups,
    )
    seen, backward = SimpleNamespace(rates=[]), torch.Tensor.backward

    def spy_backward(loss):
        # no gradient of the step before
        assert all(p.grad is None for p in seen.model.parameters())
        backward(loss)

    def spy_groups(model, *settings):
        seen.model = model
        return parameter_groups(model, *settings)

    def spy_adamw(groups, **settings):
        seen.settings, seen.optimizer = settings, adamw(groups, **settings)
        return seen.optimizer

    def spy_clip(parameters, norm):
        assert norm == 0.01 and list(map(id, parameters)) == list(map(id, seen.model.parameters()))
        seen.rates.append(
            [(group["lr"], group["lr_factor"]) for group in seen.optimizer.param_groups]
        )
        return clip(seen.model.parameters(), norm)

    monkeypatch.setattr(torch.Tensor, "backward", spy_backward)
    monkeypatch.setattr(dataseg, "parameter_groups", spy_groups)
    monkeypatch.setattr(torch.optim, "AdamW", spy_adamw)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(common.rescue, "save_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: False)
    args = replace(
        SMALL, image_size=64, semantic_size=64, batch_size=2, base_batch_size=4, lr=1e-3, steps=3
    )
    (tmp_path / "args.json").touch()  # of the run folder
    dataseg.train(args, datasets, space_of(args, datasets), tmp_path, CPU)
    assert seen.settings == {"lr": 5e-4, "fused": True} and len(seen.rates) == 3
    for step, rates in enumerate(seen.rates):
        for rate, factor in rates:
            assert rate == pytest.approx(factor * 5e-4 * (1 - step / 3) ** 0.9)
    place = {
        id(p): (g["lr_factor"], g["weight_decay"])
        for g in seen.optimizer.param_groups
        for p in g["params"]
    }
    found = {key: place[id(p)] for key, p in seen.model.named_parameters()}
    body, free = (
        "backbone.body.",
        ("query_feat", "query_embed", "level_embed", "background", "logit_scale"),
    )
    expected = {
        f"{body}conv1.weight": (0.1, 0.05),
        f"{body}bn1.weight": (0.1, 0),
        "class_embed.bias": (1, 0.05),
    }
    expected |= {
        "layers.1.linear1.weight": (1, 0.05),
        "layers.0.cross_norm.bias": (1, 0),
    } | dict.fromkeys(free, (1, 0))
    assert expected.items() <= found.items() and found["pixel_decoder.output.1.weight"] == (1, 0)
    assert all((factor == 0.1) == key.startswith(body) for key, (factor, _) in found.items())


def test_a_step_knows_the_classes_of_its_dataset(datasets, tmp_path, monkeypatch):
    by_size, seen, forward = {len(d.vocabulary): d for d in datasets}, set(), dataseg.Model.forward
    tasks = {"ade20k": "semantic", "coco-panoptic": "panoptic, things", "o365": "instance"}

    def spy_forward(model, images, sizes, text):
        assert torch.equal(text, dataseg.embed(by_size[len(text)].vocabulary.names, "minilm"))
        return forward(model, images, sizes, text)

    def spy_losses(args, output, targets, merged):
        dataset = by_size[output.logits.shape[-1] - 1]
        own = LabelSpace([dataset.vocabulary])
        assert torch.equal(merged, dataseg.merged_classes(own, tasks[dataset.name]))
        seen.add(dataset.name)
        if len(seen) == 3:
            raise Enough
        return {"loss": output.logits.sum()}

    monkeypatch.setattr(dataseg.Model, "forward", spy_forward)
    monkeypatch.setattr(dataseg, "compute_losses", spy_losses)
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: False)
    args = replace(SMALL, image_size=64, semantic_size=64, batch_size=2, steps=40)
    (tmp_path / "args.json").touch()
    with pytest.raises(Enough):
        dataseg.train(args, datasets, space_of(args, datasets), tmp_path, CPU)


def test_each_step_has_one_dataset_on_all_ranks(datasets, monkeypatch):
    own = {
        "dataset_batches": "o365=8",
        "dataset_ratios": "coco-panoptic=2,o365=4",
        "dataset_sizes": "o365=32",
    }
    args = replace(SMALL, batch_size=4, image_size=96, semantic_size=64, **own)
    monkeypatch.setattr(dataseg, "world_size", lambda: 2)
    streams, loaders = [], []
    for rank in range(2):
        monkeypatch.setattr(dataseg, "rank", lambda rank=rank: rank)
        loaders.append(dataseg.build_dataloader(args, datasets, 0))
        streams.append(list(islice(loaders[-1].batch_sampler, 2000)))
    starts, sampled = loaders[0].dataset.starts, np.zeros(3)
    for batches in zip(*streams):
        kinds = {
            int(starts.searchsorted(row, "right")) - 1 for batch in batches for row, _ in batch
        }
        draws = [draw for batch in batches for _, draw in batch]
        # one dataset, and no rank sees another's images
        assert len(kinds) == 1 and len(set(draws)) == len(draws)
        assert len(batches[0]) == len(batches[1]) == (4 if kinds == {2} else 2)
        sampled[kinds.pop()] += len(draws)
    assert (sampled / sampled.sum()).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.03)
    later = dataseg.build_dataloader(args, datasets, 7)  # of the last rank
    assert list(islice(later.batch_sampler, 50)) == streams[1][7:57]
    longest = {"ade20k": 64, "coco-panoptic": 96, "o365": 32}
    for batch in islice(loaders[0], 12):
        (name,) = {sample.dataset for sample in batch.samples}
        assert max(max(size) for size in batch.sizes) <= longest[name]
    transforms = loaders[0].dataset.transforms
    assert {name: t.size for name, t in transforms.items()} == longest
    assert [t.scale for t in transforms.values()] == [(0.5, 2), (0.1, 2), (0.1, 2)]


def test_padding_does_not_depend_on_compilation(datasets):
    """The points of the losses are drawn in the padded image."""
    for compiled in ("on", "off"):
        args = replace(SMALL, image_size=96, semantic_size=64, compile=compiled)
        seen = set()
        for batch in islice(dataseg.build_dataloader(args, datasets, 0), 12):
            name = batch.samples[0].dataset
            side = 64 if name == "ade20k" else 96
            assert batch.images.shape[-2:] == (side, side)
            seen.add(name)
        assert len(seen) > 1


@pytest.mark.parametrize("names", ["ade20k", NAMES])
def test_tiny_mixes_any_datasets(names, datasets):
    flags = ["--tiny", "--datasets", names]
    args = parse_args(
        dataseg.Args, "dataseg", dataseg.TINY, dataseg.MODEL_FIELDS, dataseg.OFFICIAL, flags
    )
    dataseg.build_dataloader(args, [d for d in datasets if d.name in names.split(",")], 0)


def test_each_dataset_is_evaluated_by_its_own_task(tiny_root, tmp_path, monkeypatch):
    evaluated, (model, label_space) = {}, small_model()

    def spy(segment, dataset, *_):
        evaluated[dataset.name] = segment.keywords["task"]
        classes = segment.keywords["label_space"]
        assert segment.func is dataseg.predict and segment.args == (model,)
        assert classes.vocabularies == {dataset.name: dataset.vocabulary}
        assert torch.equal(classes.text, dataseg.embed(dataset.vocabulary.names, "minilm"))
        return {dataset.name: {}}

    monkeypatch.setattr(dataseg, "evaluate_dataset", spy)
    names = "ade20k,ade20k-panoptic,coco-panoptic,o365-instances,coco,lvis,oid"
    found = load_datasets(names, "val", str(tiny_root), accepts=dataseg.SUPERVISION)
    results = dataseg.evaluate(SMALL, model, label_space, found, tmp_path)
    assert list(results) == names.split(",")
    assert list(evaluated.values()) == ["semantic", *["panoptic, things"] * 2, *["instance"] * 4]


# -- command line ----------------------------------------------------------------------------------

FLAGS = [
    *[
        "--backbone",
        "tf_efficientnet_lite0",
        "--text-encoder",
        "minilm",
        "--channels",
        "32",
        "--queries",
        "10",
    ],
    *[
        "--points",
        "128",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "2",
        "--image-size",
        "96",
        "--semantic-size",
    ],
    *[
        "96",
        "--test-size",
        "96",
        "--batch-size",
        "2",
        "--base-batch-size",
        "2",
        "--steps",
        "4",
        "--workers",
        "0",
    ],
    *["--device", "cpu"],
]
RESULTS = {"ade20k": {"mIoU", "pACC"}}
RESULTS |= {"coco-panoptic": {"PQ", "PQ things", "PQ stuff", "mIoU", "AP things"}}
RESULTS |= {"o365-instances": {"AP", "mask AP", "mask AP50"}}
RESULTS |= {"ade20k-panoptic": {"PQ", "AP things"}}  # never trained on


@pytest.fixture(scope="module")
def data(tiny_root):
    return ["--datasets", NAMES, "--data-root", tiny_root, *FLAGS]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, call):
    """Run folder of a training on all kinds of supervision."""
    folder = tmp_path_factory.mktemp("dataseg") / "run"
    call(*data, "--output", folder, "--checkpoint-every", 1, method="dataseg")
    return folder


def results_of(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_folder_has_everything(trained):
    results = results_of(trained)
    assert list(results) == list(RESULTS) and all(
        results[name].keys() >= own for name, own in RESULTS.items()
    )
    names = {path.name for path in trained.iterdir()}
    pictures = {f"predictions-{name}.jpg" for name in RESULTS} | {"first_batch.jpg"}
    assert pictures | {"weights.safetensors", "metrics.jsonl", "args.json"} <= names
    record = json.loads((trained / "metrics.jsonl").read_text())
    assert (
        record["step"] == 4
        and record["lr"] == pytest.approx(1e-4 * 0.25**0.9)
        and record["dataset"] in NAMES
    )


def test_evaluation_alone_gives_the_same(trained, tiny_root, tmp_path, call):
    given = [
        "--eval-only",
        "--weights",
        trained,
        "--datasets",
        NAMES,
        "--data-root",
        tiny_root,
        "--device",
        "cpu",
    ]
    call(*given, "--workers", 0, "--output", tmp_path / "again", method="dataseg")
    assert results_of(tmp_path / "again") == results_of(trained)


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("merge", ["sum", "max"])
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_predictions_of_each_task(task, merge, trained, photo, tmp_path, call):
    flags = [
        "--predict",
        photo,
        "--weights",
        trained,
        "--task",
        task,
        "--merge",
        merge,
        "--object-threshold",
        0,
    ]
    call(
        *flags,
        "--vocabulary",
        "cat, grass, sky",
        "--output",
        tmp_path / "o",
        "--device",
        "cpu",
        method="dataseg",
    )
    folder, names = tmp_path / "o", ["cat", "grass", "sky"]
    assert (folder / "photo-0.jpg").is_file()
    kinds = {"predictions.json", "panoptic.json", "panoptic", "semantic"} & {
        path.name for path in folder.iterdir()
    }
    if task == "instance":
        assert kinds == {"predictions.json"}
        record = json.loads((folder / "predictions.json").read_text())
        assert len(record["annotations"]) == 30  # 10 queries, 3 classes
        assert all(found["segmentation"]["size"] == [60, 90] for found in record["annotations"])
        assert [category["name"] for category in record["categories"]] == names
        return
    classes = np.asarray(Image.open(folder / "semantic" / "photo-0.png"))
    assert classes.shape == (60, 90) and classes.max() < 3
    assert (folder / "semantic" / "classes.txt").read_text().split() == names
    assert kinds == (
        {"semantic"} if task == "semantic" else {"semantic", "panoptic", "panoptic.json"}
    )
    if task == "panoptic":
        record = json.loads((folder / "panoptic.json").read_text())
        things = {category["name"]: category["isthing"] for category in record["categories"]}
        assert things == {"cat": 1, "grass": 0, "sky": 0}  # by name
        ids = np.asarray(Image.open(folder / "panoptic" / "photo-0.png"))[..., 0]
        infos = record["annotations"][0]["segments_info"]
        assert infos and {info["id"] for info in infos} == set(np.unique(ids)) - {0}


def test_evaluation_set_has_the_text_of_its_dataset(tmp_path):
    """The names of "o365-instances" are those of "o365", so they have the rows of its file."""
    np.save(tmp_path / "o365.npy", np.eye(3, 5))
    args = dataseg.Args(text_encoder=f"ade20k=none.npy,o365={tmp_path / 'o365.npy'}")
    label_space = dataseg.build_label_space(args, [replace(KINDS, dataset="o365")])
    classes = label_space.swap(replace(KINDS, dataset="o365-instances"))
    assert classes.text.tolist() == np.eye(3, 5).tolist()


def test_scale_stays_at_most_100(data, tmp_path, call, monkeypatch):
    def large(*args, **settings):
        model = dataseg_model(*args, **settings)
        model.logit_scale.data.fill_(9.0)
        return model

    dataseg_model = dataseg.Model
    monkeypatch.setattr(dataseg, "Model", large)
    call(
        *data,
        "--steps",
        1,
        "--eval-datasets",
        "ade20k",
        "--output",
        tmp_path / "run",
        method="dataseg",
    )
    assert load_file(tmp_path / "run" / "weights.safetensors")[
        "logit_scale"
    ].exp().item() == pytest.approx(100)


def test_two_ranks_train(data, tmp_path, run):
    more = ["--steps", 3, "--eval-datasets", "coco-panoptic", "--output", tmp_path / "run"]
    done = run(*data, *more, method="dataseg", ranks=2)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "run")["coco-panoptic"].keys() >= RESULTS["coco-panoptic"]
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(tmp_path / "run" / "weights.safetensors").values()
    )


@pytest.mark.parametrize(
    "flags", [["--backbone", "vit_tiny_patch16_224"], ["--no-merge-in-training"]]
)
def test_other_trainings(flags, data, tmp_path, call, monkeypatch):
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: False)
    call(
        *data,
        *flags,
        "--steps",
        2,
        "--eval-datasets",
        "ade20k",
        "--output",
        tmp_path / "run",
        method="dataseg",
    )
    assert results_of(tmp_path / "run")["ade20k"].keys() >= RESULTS["ade20k"]


@pytest.fixture
def official(tmp_path, monkeypatch):
    """An official Mask2Former of random numbers, and the model that it was made of."""
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    source, _ = small_model(backbone="resnet50")
    del source.class_embed, source.background, source.logit_scale
    torch.save({"model": official_base(source), "iteration": 9}, tmp_path / "official.pth")
    return tmp_path / "official.pth", source


def test_training_starts_from_an_official_mask2former(official, data, tmp_path, call, monkeypatch):
    (file, source), models, parameter_groups = official, [], dataseg.parameter_groups

    def enough(run_log, losses, step, batch):
        assert losses["loss"].isfinite()
        raise Enough  # before the optimiser's first step

    monkeypatch.setattr(
        dataseg, "parameter_groups", lambda m, *k: models.append(m) or parameter_groups(m, *k)
    )
    monkeypatch.setattr(dataseg.RunLog, "check_finite", enough)
    # the weights tell them
    sizes = {"--backbone", "--channels", "--queries", "--encoder-layers", "--decoder-layers"}
    flags = [flag for pair in zip(*[iter(data)] * 2) if pair[0] not in sizes for flag in pair]
    with pytest.raises(Enough):
        call(*flags, "--weights", file, "--output", tmp_path / "run", method="dataseg")
    own, kept = models[0].state_dict(), source.state_dict()
    assert all(torch.equal(own[key], t) for key, t in kept.items() if key != "backbone.frozen_norm")
    new = {"class_embed.weight", "class_embed.bias", "background", "logit_scale"}
    assert own.keys() - kept.keys() == new
    assert not models[0].backbone.body.bn1.training and models[0].class_embed.weight.any()


@pytest.mark.parametrize("flags", [["--predict", "a.jpg"], ["--eval-only", "--datasets", "o365"]])
def test_an_official_mask2former_knows_no_classes(flags, official, tiny_root, fails):
    line = fails(*flags, "--weights", official[0], "--data-root", tiny_root, method="dataseg")
    assert "are those of a base model without classes: only a training can start from them" in line


@pytest.mark.parametrize(
    "given, evaluated",
    [
        (NAMES, "ade20k,coco-panoptic,o365-instances"),
        ("objects365:train", "o365-instances"),
        ("coco", "coco"),
    ],
)
def test_what_is_evaluated(given, evaluated, monkeypatch, call):
    def load(names, split, *_, **__):
        if split == "val":
            raise Enough(names)
        return []

    monkeypatch.setattr("common.datasets.runs.load_datasets", load)
    with pytest.raises(Enough, match=f"^{evaluated}$"):
        call("--datasets", given, method="dataseg")


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--datasets", "ade20k,in21k"],
            ["'in21k' has image labels only", "leave it out of --datasets"],
        ),
        (["--eval-datasets", "in21k"], ["in21k", "no split 'val'"]),
        (
            ["--dataset-ratios", "coco=4"],
            ["--dataset-ratios coco=4", "ade20k, coco-panoptic, o365"],
        ),
        (["--dataset-ratios", "o365=0"], ["--dataset-ratios o365=0", "NAME=NUMBER"]),
        (["--queries", "0"], ["--queries 0"]),
        (["--points", "0"], ["--points 0"]),
        (["--decoder-layers", "-1"], ["--decoder-layers -1"]),
        (["--channels", "48"], ["--channels 48"]),
        (["--semantic-size", "0"], ["--semantic-size 0"]),
        (["--semantic-jitter", "2", "0.1"], ["--semantic-jitter 2.0 0.1"]),
    ],
)
def test_bad_flags(flags, words, data, tmp_path, fails):
    line = fails(*data, *flags, "--output", tmp_path / "run", method="dataseg")
    assert all(word in line for word in words), line


def test_weights_of_others(trained, data, photo, tmp_path, fails):
    settings = {"method": "lmseg", "args": {}, "vocabularies": {"a": {"names": ["cat"]}}}
    tensors = {"label_space.a": torch.ones(1, 384)}
    save_tensors(tmp_path / "lmseg.safetensors", tensors, settings)
    line = fails("--predict", photo, "--weights", tmp_path / "lmseg.safetensors", method="dataseg")
    assert "are not of dataseg.py but of lmseg.py; use that" in line
    line = fails(
        *data, "--weights", trained, "--queries", 12, "--output", tmp_path / "run", method="dataseg"
    )
    assert "'query_embed' has the shape [10, 32], this model needs [12, 32]" in line
    np.save(tmp_path / "text.npy", np.eye(1, 512, dtype=np.float32))
    flags = [
        "--text-encoder",
        tmp_path / "text.npy",
        "--weights",
        trained,
        "--output",
        tmp_path / "o",
    ]
    line = fails("--predict", photo, "--vocabulary", "dragon", *flags, method="dataseg")
    assert "text embeddings have 512 dimensions, this model needs 384" in line
