"""The category-extended detector: each equation against loops over floats, mining, both trainings.

Here the classes of A are columns 0 and 1, and those of B are columns 1 and 2.
"""

import json
import math

import numpy as np
import pytest
import torch
from conftest import small_flags
from test_data import labelled

import category_extended as method
from common import pseudo_boxes, retinanet
from common.batch import Batch, Sample
from common.class_counts import own_and_elsewhere, own_columns
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.pseudo_boxes import PseudoBoxes, are_complete, mine_boxes, with_pseudo_boxes
from common.targets import Targets
from common.transforms import ResizeShortest

A, B = Vocabulary("a", ("cat", "dog")), Vocabulary("b", ("Dog", "bird"))
SPACE = LabelSpace([A, B], merge=True)
SCOPE = torch.tensor([True, True, False])  # of A


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(*places: tuple[float, float, float]) -> torch.Tensor:
    """(N, 4) squares with the given left, top and side."""
    rows = [[x, y, x + side, y + side] for x, y, side in places]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def iou(one, other) -> float:
    """IoU of two boxes, by floats."""
    (a, b, c, d), (e, f, g, h) = (list(map(float, box)) for box in (one, other))
    shared = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
    return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)


# -- RetinaNet -------------------------------------------------------------------------------------


def test_anchors_have_three_sizes_and_ratios_and_are_not_rounded():
    boxes = retinanet.base_anchors(16)
    row = 0
    for ratio in (0.5, 1, 2):
        for i in range(3):
            side = 64 * 2 ** (i / 3)
            width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
            expected = [-width / 2, -height / 2, width / 2, height / 2]
            assert boxes[row].tolist() == pytest.approx(expected, rel=1e-5)
            row += 1
    assert len(boxes) == row


def test_grid_of_anchors_and_those_inside_an_image():
    maps = [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)]
    levels = retinanet.grid_anchors(maps, [8, 16])
    assert [len(level) for level in levels] == [54, 18]
    centres = (levels[0][:, :2] + levels[0][:, 2:]) / 2
    expected = [(8 * x, 8 * y) for y in range(2) for x in range(3) for _ in range(9)]
    assert torch.allclose(centres, torch.tensor(expected).float(), atol=1e-4)
    inside = retinanet.inside_image(maps, [8, 16], (8, 17))
    # x * stride < 17 and y * stride < 8: all of the first row, and both cells of the second level
    assert inside.tolist() == [True] * 27 + [False] * 27 + [True] * 18


def test_corners_are_moved_in_units_of_the_sides():
    anchors = torch.tensor([[10.0, 20, 14, 28], [0, 0, 2, 2]])
    boxes = torch.tensor([[12.0, 16, 13, 36], [1, 1, 5, 9]])
    deltas = retinanet.encode_corners(boxes, anchors)
    for row in range(2):
        left, top, right, bottom = anchors[row].tolist()
        unit = [right - left, bottom - top] * 2
        for k in range(4):
            moved = (float(boxes[row, k]) - float(anchors[row, k])) / unit[k]
            assert deltas[row, k] == pytest.approx(moved)
    assert torch.allclose(retinanet.decode_corners(deltas, anchors), boxes)


def test_head_orders_anchors_by_level_cell_and_shape():
    head = retinanet.RetinaHead(4, 3, num_convs=1)
    maps = [seeded(2, 4, 2, 3), seeded(2, 4, 1, 1, seed=1)]
    logits, deltas = head(maps)
    assert logits.shape == (2, 63, 3) and deltas.shape == (2, 63, 4)
    of_classes, _ = head.towers(maps)[0]
    raw = head.cls_logits(of_classes)  # (2, 27, 2, 3)
    assert logits[1, (1 * 3 + 2) * 9 + 4, 2] == raw[1, 4 * 3 + 2, 1, 2]
    assert torch.allclose(head.cls_logits.bias.sigmoid(), torch.tensor(0.01))
    assert not head.box_deltas.bias.any()


def test_towers_with_and_without_a_norm():
    """The norm also takes maps of one cell, and channels that 32 groups do not divide."""
    for norm, count in (("none", 0), ("group", 4)):
        head = retinanet.RetinaHead(12, 3, num_convs=2, norm=norm)
        norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert len(norms) == count and {m.num_groups for m in norms} <= {4}
        logits, deltas = head([seeded(1, 12, 1, 1)])
        assert logits.isfinite().all() and deltas.isfinite().all()


def test_a_frozen_backbone_still_trains_the_pyramid_and_the_head():
    args = method.Args(backbone="resnet10t", channels=8, frozen="all", amp="off")
    model = method.Model(args, SPACE, pretrained=False).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.body") for name in trained)
    assert {"backbone.fpn.layer_blocks.0.0.weight", "head.cls_logits.weight"} <= trained


def test_stem_and_first_stage_are_frozen_as_in_the_official_configurations(model):
    model.backbone.frozen_norm.fill_(True)  # as after loading published weights
    model.train()
    frozen = {name for name, p in model.backbone.body.named_parameters() if not p.requires_grad}
    assert {"conv1.0.weight", "layer1.0.conv1.weight"} <= frozen
    assert not {name for name in frozen if name.startswith("layer2.0.conv")}


def test_best_anchors_are_those_of_each_level():
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.3], [0.8, 0.1], [0.1, 0.2], [0.3, 0.1]])
    assert retinanet.best_of_levels(scores, [3, 2], 1).tolist() == [0, 4]
    assert retinanet.best_of_levels(scores, [3, 2], 2).tolist() == [0, 2, 4, 3]


# -- Losses ----------------------------------------------------------------------------------------


def found(labels: list[int], strict: list[bool], overlap: list[float]) -> method.Assignment:
    boxes = torch.zeros(len(labels), 4)
    return method.Assignment(
        torch.tensor(labels), boxes, torch.tensor(strict), torch.tensor(overlap)
    )


LABELS = [0, 1, -1, -2, -1]
STRICT = [True, False, False, False, False]
OVERLAP = [0.95, 0.6, 0.38, 0.45, 0.1]
ASSIGNED = found(LABELS, STRICT, OVERLAP)


def test_weights_of_negatives():
    """On own columns always 1; on the other column as each rule says."""
    expected = {
        "plain": [1, 1, 1, 1, 1],
        "dataset_aware": [1, 1, 0, 0, 0],
        "conflict_free": [1, 0, 0, 0, 0],
        "weighted": [1, *(math.exp(-10_000 * math.exp(-25 * u)) for u in OVERLAP[1:])],
    }
    assert expected.keys() == method.NEGATIVES.keys()
    for name, of_other in expected.items():
        weight = method.NEGATIVES[name](ASSIGNED, SCOPE)
        assert weight[:, :2].tolist() == [[1, 1]] * 5
        assert weight[:, 2].tolist() == pytest.approx(of_other, rel=1e-3, abs=1e-9), name
    assert 0.4 < expected["weighted"][2] < 0.6 and expected["weighted"][1] > 0.99


def test_trust_grows_with_the_overlap():
    overlap = [i / 50 for i in range(51)]
    many = found([-1] * 51, [False] * 51, overlap)
    trust = method.negatives_weighted(many, SCOPE)[:, 2]
    assert (trust.diff() >= 0).all() and trust[15] < 0.01 and trust[30] > 0.99


def focal(logit: float, target: int) -> float:
    p = 1 / (1 + math.exp(-logit))
    if target:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def test_focal_loss_of_weighted_entries():
    logits = seeded(5, 3).requires_grad_()
    weight = seeded(5, 3, seed=1).abs()
    loss = method.loss_classes(logits, torch.tensor(LABELS), weight, torch.tensor(4.0))
    total = 0.0
    for a, label in enumerate(LABELS):
        for c in range(3):
            if label > -2:
                total += float(weight[a, c]) * focal(float(logits[a, c].detach()), c == label)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    loss.backward()
    assert not logits.grad[3].any() and logits.grad[[0, 1, 2, 4]].all()


def test_box_loss_of_positive_anchors():
    deltas = seeded(3, 4)
    anchors = squares((0, 0, 10), (20, 0, 8), (5, 5, 5))
    truth = squares((1, 2, 9), (0, 0, 1), (4, 4, 6))
    ours = method.Assignment(torch.tensor([1, -1, 0]), truth, torch.zeros(3), torch.zeros(3))
    loss = method.loss_boxes(deltas, anchors, ours, torch.tensor(5.0))
    total = 0.0
    for a in (0, 2):
        side = float(anchors[a, 2] - anchors[a, 0])
        for k in range(4):
            target = (float(truth[a, k]) - float(anchors[a, k])) / side
            total += abs(float(deltas[a, k]) - target)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_anchors_are_assigned_twice():
    """0: exact; 1: IoU .6; 2: IoU .43, between; 3: IoU .37; 4: the best one of the second box."""
    anchors = torch.tensor(
        [[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4.3], [0, 0, 10, 3.7], [50, 0, 60, 3]]
    )
    truth = Targets(squares((0, 0, 10), (50, 0, 10)), torch.tensor([7, 8]))
    ours = method.assign(anchors, truth)
    assert ours.labels.tolist() == [7, 7, -2, -1, 8]
    assert ours.strict.tolist() == [True, False, False, False, True]
    assert ours.overlap.tolist() == pytest.approx([1, 0.6, 0.43, 0.37, 0.3])
    assert torch.equal(ours.boxes[[0, 1, 4]], truth.boxes[[0, 0, 1]])
    assert ((ours.labels >= 0) | ~ours.strict).all()


def images(scopes: list[torch.Tensor]):
    """Outputs of a model for images of 32 x 32 pixels, of which the first one is smaller."""
    maps = [torch.zeros(1, 1, 4, 4)]
    (anchors,) = retinanet.grid_anchors(maps, [8])
    sizes = [(32, 20)] + [(32, 32)] * (len(scopes) - 1)
    inside = [retinanet.inside_image(maps, [8], size) for size in sizes]
    boxes = squares((4, 4, 30), (0, 10, 20))
    targets = [Targets(boxes, torch.tensor([0, 1]), scope=scope) for scope in scopes]
    logits = seeded(len(scopes), len(anchors), 3).requires_grad_()
    deltas = seeded(len(scopes), len(anchors), 4).requires_grad_()
    return (logits, deltas, anchors, inside), targets


@pytest.mark.parametrize("negatives", method.NEGATIVES)
def test_losses_of_a_batch(negatives):
    (logits, deltas, anchors, inside), targets = images([SCOPE, SCOPE.flip(0)])
    targets[1] = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), scope=SCOPE.flip(0))
    normaliser = torch.tensor(20.0)
    losses = method.compute_losses(negatives, logits, deltas, anchors, inside, targets, normaliser)
    total, boxes, positives = 0.0, 0.0, 0
    assigned = [method.assign(anchors[rows], t) for rows, t in zip(inside, targets)]
    for image in assigned:
        positives += max(int((image.labels >= 0).sum()), 1)
    n = 0.9 * 20 + 0.1 * positives
    for i, image in enumerate(assigned):
        weight = method.NEGATIVES[negatives](image, targets[i].scope)
        for row, a in enumerate(inside[i].nonzero().flatten().tolist()):
            label = int(image.labels[row])
            for c in range(3):
                entry = focal(float(logits[i, a, c].detach()), c == label) if label > -2 else 0
                total += float(weight[row, c]) * entry
            if label >= 0:
                target = retinanet.encode_corners(image.boxes[row : row + 1], anchors[a : a + 1])
                boxes += float((deltas[i, a].detach() - target[0]).abs().sum())
    assert float(normaliser) == pytest.approx(n)
    assert losses["loss_class"].item() == pytest.approx(total / n, rel=1e-4)
    assert losses["loss_box"].item() == pytest.approx(boxes / n, rel=1e-4)
    assert losses["loss"].item() == pytest.approx((total + boxes) / n, rel=1e-4)
    losses["loss"].backward()
    assert not logits.grad[0][~inside[0]].any() and not deltas.grad[0][~inside[0]].any()


def test_conflicts_have_no_gradient():
    """Only plain negatives push down the column of a class that the dataset does not annotate."""
    for negatives in ("plain", "dataset_aware", "conflict_free"):
        (logits, deltas, anchors, inside), targets = images([SCOPE])
        given = (logits, deltas, anchors, inside, targets, torch.tensor(100.0))
        method.compute_losses(negatives, *given)["loss_class"].backward()
        image = method.assign(anchors[inside[0]], targets[0])
        pushed = logits.grad[0, inside[0], 2] != 0
        trained = {
            "plain": image.labels > -2,
            "dataset_aware": image.labels >= 0,
            "conflict_free": image.strict,
        }
        assert torch.equal(pushed, trained[negatives])
        assert (logits.grad[0, inside[0]][:, :2] != 0).all(1).equal(image.labels > -2)


def test_a_dataset_with_all_classes_is_plain_retinanet():
    every = torch.ones(3, dtype=torch.bool)
    (outputs, targets) = images([every])
    losses = [
        method.compute_losses(name, *outputs, targets, torch.tensor(100.0))["loss"].item()
        for name in method.NEGATIVES
    ]
    assert losses == [losses[0]] * 4


def test_normaliser_is_at_least_one():
    (outputs, targets) = images([SCOPE])
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), scope=SCOPE)
    one = method.compute_losses("plain", *outputs, [none], torch.tensor(0.0))["loss"]
    other = method.compute_losses("plain", *outputs, [none], torch.tensor(1.0))["loss"]
    assert torch.equal(one, other)
    assert targets[0].scope is SCOPE


def test_labels_and_scopes_of_targets():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    sample = Sample.unlabelled(image, "b", 0, 0)
    sample.boxes, sample.labels = squares((0, 0, 2), (1, 1, 2)), torch.tensor([0, 1])
    scopes = own_columns([labelled("a", [[0]], 2), labelled("b", [[0]], 2)], SPACE)
    [target] = method.prepare_targets(Batch(image[None], [(4, 4)], [sample]), SPACE, scopes)
    assert target.labels.tolist() == [1, 2] and target.scope.tolist() == [False, True, True]


def test_novel_classes_are_not_annotated():
    dataset = labelled("a", [[0]], 2)
    dataset.novel = (1,)
    dataset.vocabulary = A
    both = LabelSpace([A, Vocabulary("b", ("Dog", "cat"))], merge=True)
    assert own_and_elsewhere(dataset, both)["elsewhere"].tolist() == [False, True]
    assert own_columns([dataset], SPACE)["a"].tolist() == [True, False, False]
    groups = own_and_elsewhere(dataset, SPACE)
    assert {name: list(rows) for name, rows in groups.items()} == {
        "own": [True, False],
        "elsewhere": [False, True],
    }
    assert not own_and_elsewhere(dataset, LabelSpace([A]))["elsewhere"].any()
    dataset.novel = ()
    assert own_and_elsewhere(dataset, SPACE) == {}


# -- Mining ----------------------------------------------------------------------------------------


def test_clusters_against_loops():
    generator = torch.Generator().manual_seed(3)
    boxes = squares((0, 0, 20), (30, 0, 16), (3, 3, 20)).repeat(8, 1)
    boxes = boxes + 5 * torch.rand(boxes.shape, generator=generator)
    expected = []
    for row, box in enumerate(boxes):
        least = [min(iou(box, boxes[other]) for other in members) for members in expected]
        if least and max(least) > 0.5:
            expected[least.index(max(least))].append(row)
        else:
            expected.append([row])
    assert method.cluster(boxes) == expected
    assert 3 <= len(expected) < len(boxes)


def test_a_box_joins_by_its_smallest_overlap():
    """The third box overlaps the second enough, but not the first of the same cluster."""
    chain = squares((0, 0, 10), (2, 0, 10), (4.5, 0, 10))
    assert iou(chain[1], chain[2]) > 0.5 > iou(chain[0], chain[2])
    assert method.cluster(chain) == [[0, 1], [2]]
    assert method.cluster(chain[:0]) == []
    apart = squares((0, 0, 10), (3.5, 0, 10))  # IoU 0.48
    assert method.cluster(apart) == [[0], [1]] and method.cluster(apart, 0.4) == [[0, 1]]


def test_summary_of_a_cluster():
    boxes, scores = squares((0, 0, 10), (1, 0, 10), (0, 2, 12)), torch.tensor([0.9, 0.5, 0.1])
    row = method.summarise(boxes, scores, 20)
    pairs = [iou(one, other) for one in boxes for other in boxes]
    mean = [sum(float(box[k]) for box in boxes) / 3 for k in range(4)]
    assert row.tolist() == pytest.approx([*mean, 0.5, sum(pairs) / 9, 3 / 20], rel=1e-5)
    assert method.summarise(boxes[:1], scores[:1], 20)[5] == 1


def test_confidence_combines_class_and_place():
    ours = method.confidence(
        score=np.array([0.8, 0.8, 0.8]),
        iou_mean=np.array([0.9, 0.5, 0.9]),
        freq=np.array([1, 0.5, 0.45]),
    )
    assert ours == pytest.approx([0.72, 0.4, 0.36])


def test_dropout_keeps_the_mean_and_depends_on_the_seed():
    ones = torch.ones(20_000)
    dropped = retinanet.drop(ones, 0.2, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0, 1.25}
    assert (dropped == 0).float().mean() == pytest.approx(0.2, abs=0.01)
    again = retinanet.drop(ones, 0.2, torch.Generator().manual_seed(0))
    other = retinanet.drop(ones, 0.2, torch.Generator().manual_seed(1))
    assert torch.equal(dropped, again) and not torch.equal(dropped, other)


@pytest.fixture(scope="module")
def model() -> method.Model:
    """A model that finds something everywhere."""
    args = method.Args(backbone="resnet10t", channels=8, dropout_runs=3, amp="off")
    torch.manual_seed(0)
    model = method.Model(args, SPACE, pretrained=False)
    for layer in (model.head.cls_logits, model.head.box_deltas):
        torch.nn.init.normal_(layer.weight, std=3.0)
    torch.nn.init.zeros_(model.head.cls_logits.bias)
    return model


def one_image(dataset: str = "a") -> Batch:
    image = torch.randint(
        1, 255, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sample = Sample.unlabelled(image, dataset, 5, 2)
    sample.original_size = (32, 128)
    return Batch(image[None], [(64, 64)], [sample])


def test_mining_is_of_unannotated_classes_and_repeats(model):
    wanted = ~SCOPE
    [first] = method.mine_image(model, one_image(), wanted)
    [again] = method.mine_image(model, one_image(), wanted)
    [other] = method.mine_image(model, one_image(), wanted, first=1)
    assert len(first["boxes"]) and set(first["labels"].tolist()) == {2}
    assert first["size"] == (32, 128)
    assert first["boxes"][:, 2].max() <= 128 and first["boxes"][:, 3].max() <= 32
    assert first["boxes"][:, 2].max() > 64
    assert torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["boxes"][:1], other["boxes"][:1])
    score, iou_mean, freq = first["facts"].T
    assert (score >= 0.1).all() and (iou_mean <= 1).all() and (freq * 3 >= 0.99).all()
    assert (
        method.mine_image(model, one_image(), torch.zeros(3, dtype=torch.bool))[0][
            "labels"
        ].tolist()
        == []
    )


def test_clusters_of_low_score_are_not_kept(model, monkeypatch):
    """Scores of 0.09 and 0.11 in all runs."""
    boxes, scores = squares((0, 0, 9), (30, 30, 9)), torch.tensor([0.09, 0.11])
    run = (boxes, scores, torch.tensor([2, 2]))
    monkeypatch.setattr(method, "select_detections", lambda *_: run)
    [found] = method.mine_image(model, one_image(), ~SCOPE)
    assert found["facts"].flatten().tolist() == pytest.approx([0.11, 1, 1])
    assert found["boxes"].flatten().tolist() == pytest.approx([60, 15, 78, 19.5])


def test_boxes_without_an_area_are_not_mined(model, monkeypatch):
    """Clipping to the image leaves some; their IoU would be 0 / 0, and the file unreadable."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 30, 0], [64, 5, 64, 9]])
    run = (boxes, torch.full((3,), 0.9), torch.full((3,), 2))
    monkeypatch.setattr(method, "select_detections", lambda *_: run)
    [found] = method.mine_image(model, one_image(), ~SCOPE)
    assert found["facts"].flatten().tolist() == pytest.approx([0.9, 1, 1])


def test_settings_of_detection_and_mining(model, monkeypatch):
    """Dropout of 0.2 on each map that the last layers read; the test settings otherwise."""
    seen = {"drop": [], "select": [], "best": []}
    drop, select, best = retinanet.drop, method.select_detections, retinanet.best_of_levels

    def spy_drop(feature, probability, generator):
        seen["drop"].append(probability)
        return drop(feature, probability, generator)

    def spy_select(boxes, scores, *settings):
        assert boxes.min() >= 0 and boxes.max() <= 64  # within the image
        seen["select"].append(settings)
        return select(boxes, scores, *settings)

    def spy_best(scores, counts, most):
        seen["best"].append(most)
        return best(scores, counts, most)

    monkeypatch.setattr(retinanet, "drop", spy_drop)
    monkeypatch.setattr(method, "select_detections", spy_select)
    monkeypatch.setattr(retinanet, "best_of_levels", spy_best)
    method.predict(model, one_image(), SPACE.swap("b"))
    method.mine_image(model, one_image(), ~SCOPE)
    assert seen["drop"] == [0.2] * (3 * 5 * 2)  # runs, levels, towers
    assert seen["select"] == [(False, 0.05, 100)] * 4
    assert seen["best"] == [1000] * 4
    assert float(model.normaliser) == 100


def test_prediction_has_the_columns_of_the_label_space(model):
    [detections] = method.predict(model, one_image(), SPACE.swap("b"))
    assert set(detections["class_names"]) <= {"Dog", "bird"}
    assert (detections["scores"] > 0.05).all() and len(detections["scores"]) <= 100
    with pytest.raises(InputError, match="was trained on a, b"):
        model.columns_of(LabelSpace([Vocabulary("c", ("cat",))]))


# -- Files of pseudo boxes -------------------------------------------------------------------------


class Flags:
    workers, skip_bad = 0, 0


def photos(tmp_path, name: str, vocabulary: Vocabulary, count: int = 5):
    """A dataset of `count` images of 16 x 16 pixels on the disk, with a box in each."""
    from PIL import Image

    dataset = labelled(name, [[0]] * count, len(vocabulary))
    dataset.vocabulary, dataset.images = vocabulary, tmp_path
    for row in range(count):
        path = tmp_path / dataset.index.file_name(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (row + 1, 9, 9)).save(path, "png")
    return dataset


def fake(calls: list):
    """A stand-in for `mine_image`: a box of "bird" in each second image. Notes its calls."""

    def locate(batch, first):
        row = first + batch.samples[0].index
        calls.append(row)
        count = row % 2
        return [
            {
                "boxes": squares((row, 1, 4)).repeat(count, 1),
                "facts": torch.tensor([[0.9, 0.8, 1.0]]).repeat(count, 1),
                "labels": torch.tensor([2] * count),
                "size": (16, 16),
            }
        ]

    return locate


def test_pseudo_boxes_are_written_read_and_loaded(tmp_path):
    dataset, calls = photos(tmp_path, "a", A), []
    assert not are_complete(tmp_path, [dataset], SPACE)
    mine_boxes(fake(calls), dataset, SPACE, ResizeShortest(16), tmp_path, Flags)
    assert calls == list(range(5)) and are_complete(tmp_path, [dataset], SPACE)
    record = json.loads((tmp_path / "pseudo-a.json").read_text())
    assert [c["name"] for c in record["categories"]] == ["cat", "dog", "bird"]
    assert record["annotations"][0] == {
        "id": 1,
        "image_id": dataset.index.image_ids[1],
        "category_id": 3,
        "bbox": [1.0, 1.0, 4.0, 4.0],
        "score": 0.9,
        "iou_mean": 0.8,
        "freq": 1.0,
    }
    read = PseudoBoxes.read(tmp_path, dataset, SPACE.names)
    assert read.images.tolist() == [1, 3] and read.labels.tolist() == [2, 2]
    assert read.boxes.tolist() == squares((1, 1, 4), (3, 1, 4)).tolist()
    record["annotations"].reverse()  # as another tool may order them
    (tmp_path / "pseudo-a.json").write_text(json.dumps(record))
    assert PseudoBoxes.read(tmp_path, dataset, SPACE.names).images.tolist() == [1, 3]

    extended = with_pseudo_boxes(dataset, tmp_path, SPACE, method.confidence, 0.7)
    assert extended.vocabulary.names == ("cat", "dog", "bird")
    counts = [len(extended.load(row).boxes) - len(dataset.load(row).boxes) for row in range(5)]
    assert counts == [0, 1, 0, 1, 0]
    sample = extended.load(3)
    assert sample.labels.tolist()[-1] == 2
    assert sample.boxes[-1].tolist() == squares((3, 1, 4))[0].tolist()
    none = with_pseudo_boxes(dataset, tmp_path, SPACE, method.confidence, 0.73)
    assert len(none.load(3).boxes) == len(dataset.load(3).boxes)


def test_labels_of_pseudo_boxes_are_columns_of_the_same_label_space(tmp_path):
    """A novel class keeps its own label; columns do not change."""
    dataset = photos(tmp_path, "b", B)
    mine_boxes(fake([]), dataset, SPACE, ResizeShortest(16), tmp_path, Flags)
    extended = with_pseudo_boxes(dataset, tmp_path, SPACE, method.confidence, 0)
    assert extended.vocabulary.names == ("Dog", "bird", "cat")
    assert extended.load(1).labels.tolist()[-1] == 1
    other = with_pseudo_boxes(dataset, tmp_path, SPACE, method.confidence, 1).vocabulary
    a = pseudo_boxes.extended(A, SPACE.names)
    space = LabelSpace([a, other], merge=True)
    assert space.names == SPACE.names
    assert space.to_global("b", torch.tensor([0, 1, 2])).tolist() == [1, 2, 0]
    assert own_columns([extended], SPACE)["b"].tolist() == [False, True, True]


def test_a_killed_mining_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_boxes, "BLOCK", 2)
    dataset, calls = photos(tmp_path, "a", A), []

    def killed(batch, first):
        if first == 4:
            raise KeyboardInterrupt
        return fake(calls)(batch, first)

    with pytest.raises(KeyboardInterrupt):
        mine_boxes(killed, dataset, SPACE, ResizeShortest(16), tmp_path, Flags)
    assert calls == [0, 1, 2, 3] and not are_complete(tmp_path, [dataset], SPACE)
    mine_boxes(fake(calls), dataset, SPACE, ResizeShortest(16), tmp_path, Flags)
    assert calls == [0, 1, 2, 3, 4] and are_complete(tmp_path, [dataset], SPACE)
    assert PseudoBoxes.read(tmp_path, dataset, SPACE.names).images.tolist() == [1, 3]


def test_an_unreadable_image_that_may_be_skipped_has_no_pseudo_boxes(tmp_path):
    dataset, calls = photos(tmp_path, "a", A), []
    (tmp_path / dataset.index.file_name(3)).write_bytes(b"no image")
    flags = Flags()
    flags.skip_bad = 1
    mine_boxes(fake(calls), dataset, SPACE, ResizeShortest(16), tmp_path, flags)
    assert calls == [0, 1, 2, 4]
    assert PseudoBoxes.read(tmp_path, dataset, SPACE.names).images.tolist() == [1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda record: "{", "cannot be read"),
        (lambda record: "[]", "cannot be read"),
        (lambda record: record | {"images": [{"id": "other"}]}, "of other images or classes"),
        (lambda record: record | {"categories": []}, "cannot be read"),
        (lambda record: record | {"images": record["images"] * 2}, "of other images or classes"),
        (lambda record: record["annotations"][0].update(score=math.nan) or record, "no sound"),
        (lambda record: record["annotations"][0].update(image_id="x") or record, "of other images"),
    ],
)
def test_bad_files_of_pseudo_boxes_are_refused(tmp_path, damage, words):
    dataset = photos(tmp_path, "a", A)
    mine_boxes(fake([]), dataset, SPACE, ResizeShortest(16), tmp_path, Flags)
    path = tmp_path / "pseudo-a.json"
    damaged = damage(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(InputError, match=f"pseudo-a.json .*{words}"):
        are_complete(tmp_path, [dataset], SPACE)


# -- Stages ----------------------------------------------------------------------------------------


def test_a_second_training_whose_pseudo_boxes_are_gone_is_refused(tmp_path, monkeypatch):
    datasets = [photos(tmp_path, "a", A), photos(tmp_path, "b", B)]
    begun = tmp_path / "checkpoint-0000003"  # of a first training of two steps
    monkeypatch.setattr(method, "last_checkpoint", lambda folder, after: after < 3 and begun)
    with pytest.raises(InputError, match="lacks pseudo boxes of a, b"):
        method.train(method.Args(steps=2), datasets, SPACE, tmp_path, torch.device("cpu"))


def test_stages_start_from_files(tiny_root, tmp_path, call, fails, monkeypatch, caplog):
    """The second training alone, on boxes that a stage of its own has mined."""
    flags = ["--datasets", "coco-base@4,o365@4", "--data-root", tiny_root]
    flags += ["--eval-datasets", "coco-base@2", *small_flags("category_extended", 1)]
    name = {"method": "category_extended"}
    assert "needs --weights" in fails(*flags, "--stage", "mine", "--output", tmp_path / "m", **name)
    line = fails(*flags, "--stage", "second", "--output", tmp_path / "s", **name)
    assert "lacks pseudo boxes of coco-base, o365" in line

    call(*flags, "--stage", "first", "--output", tmp_path / "first", **name)
    assert not list((tmp_path / "first").glob("pseudo-*"))
    seen = []

    def mined(model, batch, wanted, first):
        [label, *_] = wanted.nonzero().flatten().tolist()
        boxes, facts = squares((20, 20, 40)), torch.tensor([[0.9, 0.9, 1.0]])
        record = {"boxes": boxes, "facts": facts, "labels": torch.tensor([label])}
        return [record | {"size": batch.samples[0].original_size}]

    def recorded(negatives, logits, deltas, anchors, inside, targets, normaliser):
        seen.append((negatives, targets))
        return losses(negatives, logits, deltas, anchors, inside, targets, normaliser)

    losses = method.compute_losses
    monkeypatch.setattr(method, "mine_image", mined)
    monkeypatch.setattr(method, "compute_losses", recorded)
    monkeypatch.setattr(method, "evaluate", lambda *_: {})
    mine = ["--weights", tmp_path / "first", "--output", tmp_path / "mine"]
    call(*flags, "--stage", "mine", *mine, **name)
    assert sorted(path.name for path in (tmp_path / "mine").glob("pseudo-*")) == [
        "pseudo-coco-base.json",
        "pseudo-o365.json",
    ]
    assert not seen
    with caplog.at_level("INFO", "concord"):
        second = ["--pseudo-boxes", tmp_path / "mine", "--output", tmp_path / "second"]
        call(*flags, "--stage", "second", *second, **name)
    assert "trains on 4 of 4 pseudo boxes" in caplog.text
    [(negatives, targets)] = seen
    assert negatives == "weighted"
    for target in targets:
        assert not target.scope[target.labels[-1]]
        assert target.scope[target.labels[:-1]].all()
    assert (tmp_path / "second" / "weights.safetensors").exists()
