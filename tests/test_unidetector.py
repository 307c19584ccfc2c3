"""UniDetector: equations against loops over floats, invariants, the command line."""

import inspect
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAST
from PIL import Image
from safetensors.torch import load_file
from test_scaledet import bce, iou, random_boxes, unit_rows
from torch import nn
from torchvision.ops import box_iou, roi_align

import common.clip_resnet
import common.oln
import common.proposals
import unidetector
from common import targets as targets_module
from common.batch import Batch, Sample, collate
from common.boxes import box_delta_loss, paired_iou, soft_nms
from common.class_counts import count_classes, read_prior
from common.clip_resnet import CLIPResNetC4, RegionOutput, load_by_prefix
from common.datasets import Dataset, load_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.oln import BOX_WEIGHTS, OLN, RPN, centreness, decode_tblr, loss_roi_cls, loss_roi_iou
from common.optim import stepped_learning_rate
from common.proposals import fingerprint, with_proposals
from common.targets import RegionTargets, Targets, match_anchors, match_by_iou, match_regions
from common.transforms import ResizeShortestRange
from common.weight_files import read_tensors

SMALL = {
    **dict.fromkeys(("backbone", "classifier_backbone"), "resnet18"),
    "text_encoder": "minilm",
    "amp": "off",
}
SMALL |= {"channels": 32, "fc_dim": 32, "rois_per_image": 16, "rpn_proposals": 20, "tau": 0.05}
QUICK = [arg for arg in FAST if arg not in ("--cls-bias", "-4.6")]
QUICK += [
    "--classifier-backbone",
    "tf_efficientnet_lite0",
    "--classifier-steps",
    "4",
    "--classifier-lr",
    "1e-4",
]
QUICK += ["--steps", "4", "--rpn-proposals", "20", "--tau", "0.05"]


class Enough(Exception):
    """Ends a run where a test has seen enough of it."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- equations -------------------------------------------------------------------------------------


def test_unidetector_objectness():
    c, r1, r2 = torch.rand(3, 6)
    for alpha in (0.0, 0.3, 1.0):
        eta = unidetector.objectness(c, r1, r2, alpha)
        for i in range(6):
            expected = c[i].item() ** alpha * (r1[i].item() * r2[i].item()) ** (1 - alpha)
            assert eta[i].item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(unidetector.objectness(c, r1, r2, 0.0), r1 * r2)  # OLN
    assert torch.equal(unidetector.objectness(c, r1, r2, 1.0), c)  # a binary classifier


def test_unidetector_calibration():
    p, counts, gamma = torch.rand(4, 5), torch.tensor([0.0, 1, 7, 300, 12]), 0.6
    weights = [max(n, 1) ** -gamma for n in counts.tolist()]
    calibrated = unidetector.calibrate(p, counts, gamma)
    for i, j in itertools.product(range(4), range(5)):
        expected = p[i, j].item() * weights[j] / (sum(weights) / 5)
        assert calibrated[i, j].item() == pytest.approx(expected, rel=1e-5)


def test_unidetector_classes_found_more_often_score_lower_and_none_is_lost():
    p, counts = torch.full((1, 5), 0.5), torch.tensor([0.0, 1, 2, 50, 10_000])
    calibrated = unidetector.calibrate(p, counts, 0.6)[0]
    assert calibrated.isfinite().all()
    assert calibrated[0] == calibrated[1] and (calibrated[1:].diff() < 0).all()
    assert unidetector.calibrate(p, torch.zeros(5), 0.6).tolist() == p.tolist()


def test_unidetector_gamma_0_is_no_calibration():
    p = torch.rand(4, 5)
    torch.testing.assert_close(unidetector.calibrate(p, torch.tensor([0.0, 1, 7, 300, 12]), 0.0), p)


def test_unidetector_fusion():
    p, eta = torch.rand(3, 4), torch.rand(3)
    fused = unidetector.fuse(p, eta, 0.3)
    for i, j in itertools.product(range(3), range(4)):
        assert fused[i, j].item() == pytest.approx(
            p[i, j].item() ** 0.3 * eta[i].item() ** 0.7, rel=1e-5
        )


def test_unidetector_classification_loss():
    logits, labels = torch.randn(5, 4) * 3, torch.tensor([2, -1, 0, -1, 3])
    sampled = torch.tensor([True, False, True, True])
    expected = sum(
        bce(logits[r, j].item(), labels[r] == j) / 5
        for r, j in itertools.product(range(5), range(4))
        if sampled[j]
    )
    loss = unidetector.loss_classification(logits, labels, sampled)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert unidetector.loss_classification(logits[:0], labels[:0], sampled) == 0


def region_output(boxes, logits, deltas, gt_boxes, labels, counts: list[int]) -> RegionOutput:
    """Returns the output for regions of images with so many of them, with their targets."""
    parts = zip(gt_boxes.split(counts), labels.split(counts))
    targets = [RegionTargets(*part, torch.zeros(len(part[1])).long()) for part in parts]
    return RegionOutput(list(boxes.split(counts)), logits, deltas, targets)


def test_unidetector_classification_loss_is_the_mean_over_images():
    counts, scopes = [3, 7], [slice(0, 3), slice(3, 5)]
    labels = torch.tensor([2, -1, 0, 4, -1, -1, 3, 3, -1, 4])
    logits, deltas = torch.randn(10, 5), torch.randn(10, 4)
    boxes, gt_boxes = random_boxes(10), random_boxes(10)
    none = torch.zeros(0, 4), torch.zeros(0).long()
    targets = [Targets(*none, scope) for scope in scopes]
    output = region_output(boxes, logits, deltas, gt_boxes, labels, counts)
    losses = unidetector.compute_losses(output, targets, {}, torch.ones(5))
    expected, first = 0.0, 0
    for count, scope in zip(counts, scopes):
        for r, j in itertools.product(range(first, first + count), range(scope.start, scope.stop)):
            expected += bce(logits[r, j].item(), labels[r] == j) / count / 2
        first += count
    assert losses["loss_classification"].item() == pytest.approx(expected, rel=1e-5)
    # over the regions of all images
    box = box_delta_loss(deltas, labels, boxes, gt_boxes, BOX_WEIGHTS)
    assert losses["loss_box"] == box and losses["loss"] == losses["loss_classification"] + box


@pytest.mark.parametrize("labels", [[3, 3, -1, 7], [3, 7], [-1, -1]])
def test_unidetector_sampled_classes(labels):
    labels, count = torch.tensor(labels), torch.ones(60)
    count[[5, 9]] = 0
    seen, sizes = torch.zeros(60), set()
    for _ in range(200):
        sampled = unidetector.sample_classes(labels, count)
        assert sampled.dtype == torch.bool and sampled.shape == (60,)
        assert sampled[labels[labels >= 0]].all() and not sampled[[5, 9]].any()
        sizes.add(int(sampled.sum()))
        seen += sampled
    # background is one of the 50, whether present or sampled
    assert sizes == ({49} if -1 in labels else {49, 50})
    rest = [j for j in range(60) if count[j] and j not in labels]
    assert (seen[rest] > 0).all() and seen[rest].std() < 0.15 * seen[rest].mean()  # uniform


def test_unidetector_sampled_classes_of_a_small_vocabulary():
    labels, count = torch.tensor([0, -1]), torch.tensor([4, 0, 2])
    assert unidetector.sample_classes(labels, count).tolist() == [True, False, True]
    # it is there after all
    assert unidetector.sample_classes(torch.tensor([1]), count).tolist() == [True, True, True]


def test_oln_losses_of_the_second_stage():
    boxes, gt_boxes = random_boxes(5), random_boxes(5)
    logits, deltas, quality = torch.randn(5, 2), torch.randn(5, 4), torch.randn(5)
    labels = torch.tensor([4, -1, 0, -1, 1])
    cross_entropy = l1 = rating = 0.0
    for r in range(5):
        own = logits[r, 0 if labels[r] >= 0 else 1]
        cross_entropy += math.log(sum(math.exp(z) for z in logits[r].tolist())) / 5 - own.item() / 5
        if labels[r] >= 0:
            (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes[r].tolist(), gt_boxes[r].tolist()
            w, h = x2 - x1, y2 - y1
            wanted = [
                10 * ((u1 + u2) / 2 - (x1 + x2) / 2) / w,
                10 * ((v1 + v2) / 2 - (y1 + y2) / 2) / h,
            ]
            wanted += [5 * math.log((u2 - u1) / w), 5 * math.log((v2 - v1) / h)]
            l1 += sum(abs(d - t) for d, t in zip(deltas[r].tolist(), wanted)) / 5
            rating += (
                abs(
                    1 / (1 + math.exp(-quality[r].item()))
                    - iou(boxes[r].tolist(), gt_boxes[r].tolist())
                )
                / 5
            )
    assert loss_roi_cls(logits, labels).item() == pytest.approx(cross_entropy, rel=1e-5)
    assert box_delta_loss(deltas, labels, boxes, gt_boxes, BOX_WEIGHTS).item() == pytest.approx(
        l1, rel=1e-4
    )
    assert loss_roi_iou(quality, labels, boxes, gt_boxes).item() == pytest.approx(rating, rel=1e-4)


def test_oln_boxes_and_centreness():
    anchors = torch.tensor([[0.0, 0, 32, 32], [16, 0, 48, 32]])
    tblr = torch.tensor([[0.25, 0.5, 0.125, 1.0], [0, 0, 0, 0]])  # top, bottom, left, right
    boxes = decode_tblr(anchors, tblr)
    assert boxes.tolist() == [[12, 8, 48, 32], [32, 16, 32, 16]]
    expected = math.sqrt(min(8, 16) / max(8, 16) * min(4, 32) / max(4, 32))
    assert centreness(anchors[:1], boxes[:1]).item() == pytest.approx(expected)
    # the centre is outside
    assert centreness(anchors[:1], torch.tensor([[20.0, 0, 40, 40]])).item() == 0


def test_paired_iou():
    boxes, others = random_boxes(20), random_boxes(20)
    for value, a, b in zip(paired_iou(boxes, others).tolist(), boxes.tolist(), others.tolist()):
        assert value == pytest.approx(iou(a, b), abs=1e-6)


def test_anchors_are_matched_with_low_quality_matches():
    anchors, gt_boxes = random_boxes(40), random_boxes(4)
    matched = match_anchors(anchors, gt_boxes, 0.7, 0.3, 0.3).tolist()
    table = [[iou(a, g) for g in gt_boxes.tolist()] for a in anchors.tolist()]
    expected = []
    for row in table:
        best = max(row)
        expected.append(row.index(best) if best >= 0.7 else -1 if best < 0.3 else -2)
    for g in range(4):
        top = max(row[g] for row in table)
        for a, row in enumerate(table):
            if top >= 0.3 and row[g] > top - 1e-6:
                expected[a] = g
    assert matched == expected and min(matched) == -2
    assert match_anchors(anchors, gt_boxes[:0], 0.7, 0.3, 0.3).tolist() == [-1] * 40


def test_matching_in_parts_is_the_same(monkeypatch):
    """With thousands of boxes in an image, the matrix of all IoUs is never whole."""
    draw = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 60, (260, 2), generator=draw).float()
    sides = torch.randint(1, 30, (260, 2), generator=draw).float()
    boxes = torch.cat([corners, corners + sides], 1)
    gt_boxes, others = boxes[:53], boxes[53:]
    whole = match_anchors(others, gt_boxes, 0.7, 0.3, 0.2), match_by_iou(others, gt_boxes, 0.5)
    sizes = []

    def spy(first, second):
        sizes.append(len(first) * len(second))
        return box_iou(first, second)

    monkeypatch.setattr(targets_module, "box_iou", spy)
    monkeypatch.setattr(targets_module, "PAIRS", 600)
    parts = match_anchors(others, gt_boxes, 0.7, 0.3, 0.2), match_by_iou(others, gt_boxes, 0.5)
    assert max(sizes) <= 600 and len(sizes) > 40
    assert torch.equal(parts[0], whole[0]) and (whole[0] >= 0).sum() > 10
    assert torch.equal(parts[1][0], whole[1][0]) and torch.equal(parts[1][1], whole[1][1])


def test_rpn_head_sees_directions_alone():
    rpn, feature = RPN(8), torch.randn(1, 8, 3, 5)
    [tblr], [logits] = rpn.head([feature])
    hidden = rpn.rpn_conv(feature).relu()[0].flatten(1)  # (8, 15)
    weight = torch.cat([rpn.rpn_reg.weight, rpn.rpn_obj.weight]).flatten(1).tolist()
    for cell in range(15):
        x = hidden[:, cell].tolist()
        length = math.sqrt(sum(value**2 for value in x))
        expected = [sum(a * b for a, b in zip(row, x)) / length for row in weight]
        assert [*tblr[0, cell].tolist(), logits[0, cell].item()] == pytest.approx(
            expected, abs=1e-6
        )


def test_rpn_losses():
    rpn, sizes = RPN(8), [(128, 128), (96, 128)]
    anchors = torch.cat(
        rpn.anchors([torch.zeros(1, 8, 128 // s, 128 // s) for s in common.oln.STRIDES])
    )
    gt_boxes = [random_boxes(3, 120, 24), random_boxes(2, 90, 24)]
    tblr, logits = torch.rand(2, len(anchors), 4), torch.randn(2, len(anchors))
    torch.manual_seed(5)
    targets = [rpn.targets(anchors, *each) for each in zip(gt_boxes, sizes)]
    torch.manual_seed(5)
    losses = rpn.losses(anchors, tblr, logits, gt_boxes, sizes)
    box = objectness = count = 0.0
    for i, (rows, wanted, sampled, scored, scores) in enumerate(targets):
        (height, width), count = sizes[i], count + sampled
        assert 0 < len(rows) <= 128 and len(rows) < sampled <= 256 and 0 < len(scored) <= 256
        for row, gt_box in zip(rows.tolist(), wanted.tolist()):
            (x1, y1, x2, y2), (top, bottom, left, right) = (
                anchors[row].tolist(),
                tblr[i, row].tolist(),
            )
            x, y, side = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1
            assert x1 >= 0 and y1 >= 0 and x2 < width and y2 < height
            box += 10 * (
                1
                - iou(
                    [x - left * side, y - top * side, x + right * side, y + bottom * side], gt_box
                )
            )
        for row, score in zip(scored.tolist(), scores.tolist()):
            objectness += abs(1 / (1 + math.exp(-logits[i, row].item())) - score)
    assert losses["loss_rpn_box"].item() == pytest.approx(box / count, rel=1e-4)
    assert losses["loss_rpn_objectness"].item() == pytest.approx(objectness / count, rel=1e-4)


def test_rpn_without_boxes_scores_background_only():
    rpn = RPN(8)
    features = [torch.randn(1, 8, 32 // 2**i, 32 // 2**i).requires_grad_() for i in range(5)]
    proposals, losses = rpn(features, [(128, 128)], [torch.zeros(0, 4)])
    assert losses["loss_rpn_box"] == 0 and losses["loss_rpn_objectness"] > 0
    sum(losses.values()).backward()
    assert all(f.grad is None or f.grad.isfinite().all() for f in features)
    boxes, scores = proposals[0]
    assert (
        (boxes[:, 2:] > boxes[:, :2]).all()
        and boxes.min() >= 0
        and boxes.max() <= 128
        and len(boxes) == len(scores)
    )


def test_soft_nms():
    boxes, scores = random_boxes(30), torch.rand(30, 4) ** 4
    scores[:, 3] = 0
    scores[7, 3] = 0.5
    expected = torch.zeros(30, 4)
    for c in range(4):
        left = {i: scores[i, c].item() for i in range(30)}
        while left:
            best = max(left, key=left.get)
            if left[best] < 1e-3:
                break
            expected[best, c] = left.pop(best)
            for i in left:
                left[i] *= math.exp(-(iou(boxes[best].tolist(), boxes[i].tolist()) ** 2) / 0.5)
    torch.testing.assert_close(soft_nms(boxes, scores), expected)
    assert soft_nms(boxes[:0], scores[:0]).shape == (0, 4)


def test_stepped_learning_rate():
    rates = [
        stepped_learning_rate(step, 1.0, 1200, 50, 0.001)
        for step in (0, 25, 50, 799, 800, 1099, 1100)
    ]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    assert stepped_learning_rate(0, 1.0, 5, 50, 0.001) == 1  # a run too short to warm up


def test_multi_scale_resize():
    image, boxes = torch.zeros(3, 100, 200, dtype=torch.uint8), torch.tensor([[10.0, 20, 50, 60]])
    sample = Sample(image, "a", "boxes", 1, 0, (100, 200), boxes, torch.zeros(1).long())
    sides, flips = set(), set()
    for _ in range(60):
        out = ResizeShortestRange(40, 80)(sample)
        short = out.size[0]
        x1, y1, x2, y2 = (out.boxes[0] * 100 / short).tolist()
        flipped = x1 > 100
        # 80 * 1333 / 800 = 133
        assert out.size == (short, min(2 * short, 133)) and 40 <= short <= 67
        assert [x1, y1, x2, y2] == pytest.approx(
            [150, 20, 190, 60] if flipped else [10, 20, 50, 60], abs=2
        )
        sides.add(short)
        flips.add(flipped)
    assert len(sides) > 15 and flips == {True, False}


# -- settings --------------------------------------------------------------------------------------


def test_unidetector_settings_of_the_paper():
    args = unidetector.Args()
    assert (args.alpha, args.beta, args.gamma, args.tau) == (0.3, 0.3, 0.6, 0.01)
    assert (args.optimizer, args.lr, args.classifier_lr, args.warmup_steps) == (
        "sgd",
        0.02,
        0.002,
        500,
    )
    assert (args.batch_size, args.base_batch_size, args.steps, args.classifier_steps) == (
        16,
        16,
        None,
        None,
    )
    assert (args.image_size, args.test_size, args.sampler, args.structure) == (
        800,
        800,
        "random",
        "partitioned",
    )
    assert (args.rois_per_image, args.rpn_proposals, args.test_proposals) == (512, 2000, 100)
    assert (args.classifier_backbone, args.text_encoder, args.prompts) == (
        "RN50/openai",
        "RN50/openai",
        "auto",
    )
    assert (RPN.scale, RPN.sampled, RPN(8).pre_nms, common.oln.STRIDES) == (
        8,
        256,
        2000,
        [4, 8, 16, 32, 64],
    )
    assert (RPN.box_match, RPN.box_fraction) == ((0.7, 0.3, 0.3), 0.5)
    assert (RPN.centre_match, RPN.centre_fraction) == ((0.3, 0.1, 0.3), 1.0)
    assert (OLN.iou, BOX_WEIGHTS) == (0.5, (10, 10, 5, 5))
    defaults = inspect.signature(OLN).parameters
    assert [defaults[key].default for key in ("rois_per_image", "rpn_proposals")] == [512, 2000]
    assert (
        CLIPResNetC4.stride,
        common.clip_resnet.architecture("RN50/openai")["image_size"] // 32 * 2,
    ) == (16, 14)
    truth = Targets(random_boxes(3), torch.zeros(3).long())
    _, (targets,) = match_regions([random_boxes(900)], [truth], 0.0, 512)
    assert (targets.labels >= 0).sum() == 128  # a quarter of the regions
    classes, suppression = (
        inspect.signature(f).parameters for f in (unidetector.sample_classes, soft_nms)
    )
    assert (
        classes["num"].default,
        suppression["sigma"].default,
        suppression["min_score"].default,
    ) == (50, 0.5, 1e-3)


def test_recipe_of_unidetector(tiny_root, tmp_path, monkeypatch):
    """SGD has momentum 0.9 and weight decay 1e-4; 500 steps of warmup start at 1e-3.

    The gradients of the classifier are clipped.
    """
    seen = []
    sgd, clip, schedule = (
        torch.optim.SGD,
        nn.utils.clip_grad_norm_,
        unidetector.stepped_learning_rate,
    )

    def spy_sgd(parameters, lr, **settings):
        seen.append((lr, settings))
        return sgd(parameters, lr, **settings)

    def spy_clip(parameters, norm):
        seen.append(("clip", norm))
        return clip(parameters, norm)

    def spy_schedule(*settings):
        seen.append(settings)
        return schedule(*settings)

    monkeypatch.setattr(torch.optim, "SGD", spy_sgd)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(unidetector, "stepped_learning_rate", spy_schedule)
    args = unidetector.Args(
        **SMALL, batch_size=2, base_batch_size=4, image_size=64, test_size=64, workers=0
    )
    [dataset] = load_datasets("coco", "train", str(tiny_root))
    label_space = unidetector.build_label_space(args, [dataset.vocabulary])
    given = ([dataset], label_space, tmp_path, torch.device("cpu"))
    once = replace(args, steps=1, classifier_steps=1)
    unidetector.train(once, *given)
    settings = {"momentum": 0.9, "weight_decay": 1e-4, "fused": True}
    localizer, classifier = ([(lr, settings), (0, lr, 1, 500, 1e-3)] for lr in (0.01, 0.001))
    assert seen == [*localizer, *classifier, ("clip", 35.0)]
    # 12 epochs of each network
    epochs, ranges = 12 * len(dataset) // 2, []
    monkeypatch.setattr(unidetector, "train_stage", lambda *stage: ranges.append(stage[3]))
    monkeypatch.setattr(unidetector, "with_proposals", lambda *_: [dataset])
    unidetector.train(args, *given[:2], tmp_path / "other", torch.device("cpu"))
    assert ranges == [range(epochs), range(epochs, 2 * epochs)]


# -- label spaces ----------------------------------------------------------------------------------


def two_datasets():
    return [Vocabulary("a", ("cat", "dog", "sofa")), Vocabulary("b", ("Dog", "car"))]


def batch_of(*datasets: str, boxes: int = 2) -> Batch:
    samples = []
    for i, dataset in enumerate(datasets):
        image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
        labels = torch.arange(boxes) % 2
        samples.append(
            Sample(image, dataset, "boxes", i, i, (96, 96), random_boxes(boxes, 90), labels)
        )
    return collate(samples)


def small_model(structure: str = "partitioned", vocabularies=None):
    args = unidetector.Args(**SMALL, structure=structure)
    label_space = unidetector.build_label_space(args, vocabularies or two_datasets())
    return unidetector.Model(args, label_space), label_space


def train_step(model, label_space, batch, owners=None):
    """Outputs and losses of the classifiers on random proposals."""
    proposals = [random_boxes(12, 90) for _ in batch.samples]
    targets = unidetector.prepare_targets(batch, label_space)
    owners = owners or [0] * len(batch)
    given = (batch.images, batch.sizes, targets, label_space.text)
    outputs, losses = model(*given, proposals, owners)
    outputs.logits.retain_grad()
    frequency = torch.ones(len(label_space))
    return outputs, unidetector.compute_losses(outputs, targets, losses, frequency)


def test_label_spaces_of_the_structures():
    for structure, names in {"partitioned": 5, "separate": 5, "unified": 4}.items():
        args = unidetector.Args(**SMALL, structure=structure)
        label_space = unidetector.build_label_space(args, two_datasets())
        assert len(label_space) == len(label_space.text) == names
        targets = unidetector.prepare_targets(batch_of("a", "b"), label_space)
        dog = {"unified": 1}.get(structure, 3)
        assert targets[1].labels.tolist() == [dog, {"unified": 3}.get(structure, 4)]
        assert targets[1].scope == (slice(0, 4) if structure == "unified" else slice(3, 5))


def test_an_image_leaves_the_columns_of_other_datasets_alone():
    model, label_space = small_model()
    outputs, losses = train_step(model, label_space, batch_of("a", "b"))
    losses["loss"].backward()
    first, second = outputs.logits.grad.split([len(b) for b in outputs.boxes])
    assert first[:, :3].abs().sum() > 0 and (first[:, 3:] == 0).all()
    assert second[:, 3:].abs().sum() > 0 and (second[:, :3] == 0).all()
    model, label_space = small_model("unified")
    outputs, losses = train_step(model, label_space, batch_of("a", "b"))
    losses["loss"].backward()
    assert (outputs.logits.grad != 0).any(0).all()


def test_one_partition_is_a_single_head():
    results = []
    for structure in ("partitioned", "unified", "separate"):
        torch.manual_seed(1)
        model, label_space = small_model(structure, two_datasets()[:1])
        outputs, losses = train_step(model, label_space, batch_of("a", "a"))
        results.append(torch.cat([outputs.logits.flatten(), losses["loss"][None]]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_separate_classifiers_learn_from_their_own_images():
    model, label_space = small_model("separate")
    _, losses = train_step(model, label_space, batch_of("b", "b"), [1, 1])
    losses["loss"].backward()
    first, second = model.classifiers
    assert (
        all(p.grad is None for p in first.parameters())
        and second.fc_reg.weight.grad.abs().sum() > 0
    )
    torch.manual_seed(2)
    mixed, _ = train_step(model, label_space, batch_of("a", "b", "a"), [0, 1, 0])
    assert len(mixed.logits) == sum(len(b) for b in mixed.boxes) == len(mixed.deltas)


def test_regions_are_foreground_from_half_an_overlap_on():
    model, label_space = small_model()
    batch = batch_of("a", boxes=0)
    truth = torch.tensor([[10.0, 10, 60, 60]])
    targets = [Targets(truth, torch.tensor([1]), slice(0, 3))]
    # as wide as the truth, and this part of its height: so much is the IoU
    parts = torch.tensor([0.45, 0.49, 0.51, 0.55])
    proposals = truth.repeat(4, 1)
    proposals[:, 3] = 10 + 50 * parts
    outputs, _ = model(batch.images, batch.sizes, targets, label_space.text, [proposals], [0])
    labels = {
        tuple(box): label for box, label in zip(outputs.boxes[0].tolist(), labels_of(outputs))
    }
    assert [labels[tuple(box)] for box in proposals.tolist()] == [-1, -1, 1, 1]


def labels_of(outputs: RegionOutput) -> list[int]:
    return outputs.targets[0].labels.tolist()


def test_regions_stay_in_the_order_of_their_images():
    model, label_space = small_model("separate")
    model.classifiers[1].load_state_dict(model.classifiers[0].state_dict())
    results = []
    for owners in ([0, 0, 0], [1, 0, 1]):
        torch.manual_seed(3)
        outputs, _ = train_step(model.eval(), label_space, batch_of("a", "b", "a"), owners)
        results.append(outputs.logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def moved(box: list[float], deltas: list[float], size: tuple[int, int]) -> list[float]:
    (x1, y1, x2, y2), (height, width) = box, size
    dx, dy, dw, dh = (d / weight for d, weight in zip(deltas, (10, 10, 5, 5)))
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    w, h = (x2 - x1) * math.exp(dw) / 2, (y2 - y1) * math.exp(dh) / 2
    return [
        min(max(value, 0), side)
        for value, side in zip((x - w, y - h, x + w, y + h), (width, height) * 2)
    ]


@pytest.mark.parametrize("structure", ["partitioned", "separate"])
def test_regions_of_an_image(structure, monkeypatch):
    """From what the heads say to proposals and regions in pixels of the original image."""
    model, _ = small_model(structure)
    sizes, originals, limit = [(96, 128), (96, 64)], [(48, 64), (192, 192)], 5
    anchors = [random_boxes(12, 100).repeat(3, 1), random_boxes(10, 80).repeat(3, 1)]
    proposals = [
        (boxes + torch.rand(len(boxes), 4) / 2, torch.rand(len(boxes))) for boxes in anchors
    ]
    logits, deltas, quality = torch.randn(66, 2), torch.randn(66, 4) * 0.1, torch.randn(66)
    answers = [(unit_rows(2 * limit, 384), torch.randn(2 * limit, 4)) for _ in model.classifiers]
    monkeypatch.setattr(model.localizer, "head", lambda *_: (logits, deltas, quality))
    monkeypatch.setattr(model.localizer.rpn, "forward", lambda *_: (proposals, {}))
    for classifier, answer in zip(model.classifiers, answers):
        monkeypatch.setattr(
            classifier, "forward", lambda images, sizes, boxes, answer=answer: answer
        )
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    none = torch.zeros(0, 4), torch.zeros(0).long()
    batch = collate(
        [Sample(image, "a", "boxes", 0, 0, size, *none) for image, size in zip(images, originals)]
    )
    found, first = unidetector.embed_regions(model, batch, limit), 0
    for i, ((boxes, centred), size, original) in enumerate(zip(proposals, sizes, originals)):
        candidates = []
        for q, (box, s_r1) in enumerate(zip(boxes.tolist(), centred.tolist()), first):
            (inside, outside), s_r2 = logits[q].tolist(), 1 / (1 + math.exp(-quality[q].item()))
            s_c = math.exp(inside) / (math.exp(inside) + math.exp(outside))
            candidates.append(
                (s_c**0.3 * (s_r1 * s_r2) ** 0.7, moved(box, deltas[q].tolist(), size))
            )
        first += len(boxes)
        best = []
        for eta, box in sorted(candidates, reverse=True):
            if all(iou(box, other) <= 0.9 for _, other in best):
                best.append((eta, box))
        assert len(best) < len(candidates)
        scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
        assert found[i]["size"] == found[i]["proposals"]["size"] == original
        assert found[i]["proposals"]["scores"].tolist() == pytest.approx(
            [eta for eta, _ in best], rel=1e-4
        )
        expected = torch.tensor([box for _, box in best]) * scale
        torch.testing.assert_close(found[i]["proposals"]["boxes"], expected, rtol=1e-4, atol=1e-3)
        rows = slice(i * limit, (i + 1) * limit)
        regions = [
            moved(box, d, size)
            for _, move in answers
            for (_, box), d in zip(best, move[rows].tolist())
        ]
        torch.testing.assert_close(
            found[i]["boxes"], torch.tensor(regions) * scale, rtol=1e-4, atol=1e-3
        )
        assert found[i]["eta"].tolist() == found[i]["proposals"]["scores"][:limit].tolist() * len(
            answers
        )
        assert torch.equal(found[i]["embeddings"], torch.cat([x[rows] for x, _ in answers]).half())


def test_passes_of_the_evaluation(tiny_root, tmp_path, monkeypatch):
    """Plain, calibrated by the detections of that, and with shuffled text.

    There are 300 detections per image on LVIS, and 100 elsewhere.
    """
    model, label_space = small_model(vocabularies=[Vocabulary.known("coco")])
    corner = torch.arange(20.0)[:, None] * 4 * torch.ones(1, 2)
    regions = {
        "boxes": torch.cat([corner, corner + 4], 1),
        "embeddings": unit_rows(20, 384),
        "eta": torch.rand(20),
    }
    regions |= {"proposals": {}, "size": (96, 96)}
    calls, evaluated, controls, classify = [], [], [], unidetector.classify

    def spy_classify(of_model, given, classes, prior, limit):
        assert of_model is model and given is regions
        calls.append((classes, prior))
        return classify(of_model, given, classes, prior, limit)

    def spy_evaluation(dataset, found, groups, control):
        evaluated.append(dict(found))
        controls.append(control)
        return {}

    for name in ("recall", "draw_predictions"):
        monkeypatch.setattr(unidetector, name, lambda *_: {})
    monkeypatch.setattr(unidetector, "predict_dataset", lambda *_: {0: regions, 1: regions})
    monkeypatch.setattr(unidetector, "classify", spy_classify)
    monkeypatch.setattr(unidetector, "evaluate_detections", spy_evaluation)
    datasets = load_datasets("coco,lvis", "val", str(tiny_root))
    results = unidetector.evaluate(model.args, model, label_space, datasets, tmp_path)
    titles = [title for title in results if "proposals" not in title]
    assert titles == [
        "coco (no calibration)",
        "coco",
        "lvis (no calibration)",
        "lvis",
        "lvis (shuffled text)",
    ]
    assert controls == [True, False, True, False, True]  # their mistakes are not drawn
    assert [len(found[0]["scores"]) for found in evaluated] == [100, 100, 300, 300, 300]
    calls = calls[::2]  # of the first image
    for plain, calibrated in ((0, 1), (2, 3)):
        (classes, nothing), (same, counts) = calls[plain], calls[calibrated]
        assert nothing is None and torch.equal(classes.text, same.text)
        labels = torch.cat([found["labels"] for found in evaluated[plain].values()])
        assert counts.tolist() == [int((labels == c).sum()) for c in range(len(classes))]
        assert evaluated[plain][0]["scores"].tolist() != evaluated[calibrated][0]["scores"].tolist()
    (classes, _), (shuffled, counts) = calls[2], calls[4]
    assert classes.vocabularies == shuffled.vocabularies == {"lvis": datasets[1].vocabulary}
    text, other = classes.text, shuffled.text
    assert counts is None and sorted(text[:, 0].tolist()) == sorted(other[:, 0].tolist())
    assert not (text == other).all(1).any()


def test_adding_classes_leaves_the_others_alone():
    model, _ = small_model()
    regions = {
        "boxes": random_boxes(1),
        "embeddings": unit_rows(1, 384),
        "eta": torch.tensor([0.9]),
        "size": (9, 9),
    }
    text = unit_rows(6, 384)
    scores = []
    for classes in (4, 6):
        vocabulary = Vocabulary("v", tuple("abcdef"[:classes]), text=text[:classes])
        found = unidetector.classify(model, regions, LabelSpace([vocabulary]))
        scores.append(dict(zip(found["class_names"], found["scores"].tolist())))
    assert scores[0].items() <= scores[1].items() and len(scores[1]) == 6


def test_an_image_without_boxes_or_proposals():
    model, label_space = small_model()
    batch = batch_of("a", "b", boxes=0)
    targets = unidetector.prepare_targets(batch, label_space)
    none = [torch.zeros(0, 4), random_boxes(5, 90)]
    given = (batch.images, batch.sizes, targets, label_space.text)
    outputs, losses = model(*given, none, [0, 0])
    losses = unidetector.compute_losses(outputs, targets, losses, torch.ones(5))
    assert (
        losses["loss_box"] == 0 and losses["loss_classification"] > 0 and losses["loss"].isfinite()
    )
    outputs, losses = model(*given)
    assert outputs is None
    losses = unidetector.compute_losses(None, targets, losses, torch.ones(5))
    assert losses["loss"].isfinite() and losses["loss_roi_box"] == losses["loss_rpn_box"] == 0


def test_what_is_frozen():
    model, _ = small_model()
    body = model.localizer.backbone
    body.frozen_norm.fill_(True)
    model.localizer.requires_grad_(True).train()
    names = {name.split(".")[0] for name, p in body.body.named_parameters() if p.requires_grad}
    assert names == {"layer2", "layer3", "layer4"}
    assert not any(m.training for m in body.modules() if isinstance(m, nn.BatchNorm2d))


# -- CLIP's ResNet ---------------------------------------------------------------------------------


@pytest.fixture
def small_clip(monkeypatch):
    config = {"width": 8, "layers": [1, 2, 1, 1], "image_size": 64, "embed_dim": 24}
    monkeypatch.setattr(common.clip_resnet, "architecture", lambda name: config)
    return lambda: CLIPResNetC4("RN50/openai", pretrained=False)


def test_clip_resnet_is_open_clips(small_clip):
    from open_clip.modified_resnet import ModifiedResNet

    theirs = ModifiedResNet([1, 2, 1, 1], output_dim=24, heads=4, image_size=64, width=8).eval()
    for module in theirs.modules():  # its last norms start at 0, which would hide a mistake
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    ours = small_clip().eval()
    load_by_prefix(ours, {f"visual.{k}": t for k, t in theirs.state_dict().items()}, "test")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.attnpool(ours.layer4(ours.trunk(images))), theirs(images))
    boxes = [torch.tensor([[0.0, 0, 64, 64], [10, 10, 40, 30]]), torch.zeros(0, 4)]
    assert ours(images, boxes).shape == (2, 24)


def test_clip_pixels_and_regions(small_clip):
    model, images = small_clip().eval(), torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    x = model.normalise(images, [(64, 96), (50, 70)])
    mean, std = (122.771, 116.746, 104.094), (68.501, 66.632, 70.323)
    for c, row, column in itertools.product(range(3), (0, 33, 49), (0, 50, 69)):
        expected = (images[1, c, row, column].item() - mean[c]) / std[c]
        assert x[1, c, row, column].item() == pytest.approx(expected, abs=1e-4)
    assert not x[1, :, 50:].any() and not x[1, :, :, 70:].any() and x[0, :, 50:].any()
    boxes = [torch.tensor([[3.0, 5, 61, 37], [20, 9, 90, 64]]), torch.tensor([[0.0, 0, 70, 50]])]
    with torch.no_grad():
        pooled = roi_align(model.trunk(x), boxes, 4, 1 / 16, aligned=True)
        torch.testing.assert_close(model(x, boxes), model.attnpool(model.layer4(pooled)))


LAYOUTS = {
    "open_clip": {"": "visual."},
    "RegionCLIP": {"": "backbone."},
    "UniDetector": {
        "": "backbone.",
        "layer4": "roi_head.shared_head.",
        "attnpool": "roi_head.bbox_head.",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_weights_load_from_every_layout(layout, small_clip, tmp_path, caplog):
    source, target = small_clip(), small_clip()
    own = {k: t for k, t in source.state_dict().items() if k != "frozen_norm"}
    prefixes = LAYOUTS[layout]
    tensors = {prefixes.get(k.split(".")[0], prefixes[""]) + k: t for k, t in own.items()}
    tensors |= {
        "lang_encoder.positional_embedding": torch.zeros(2),
        "roi_head.bbox_head.fc_reg.weight": torch.zeros(3),
    }
    path = tmp_path / "weights.pth"
    torch.save(
        {"model" if layout == "RegionCLIP" else "state_dict": tensors, "meta": {"epoch": 12}}, path
    )
    with caplog.at_level("INFO", "concord"):
        assert common.clip_resnet.load_pretrained(target, f"RN50/{path}")
    assert all(torch.equal(t, own[k]) for k, t in target.state_dict().items() if k != "frozen_norm")
    assert "text tower" in caplog.text and "box head of another label space" in caplog.text


def test_clip_weights_that_do_not_fit(small_clip, tmp_path):
    model, state = (
        small_clip(),
        {k: t for k, t in small_clip().state_dict().items() if k != "frozen_norm"},
    )
    lacking = {k: t for k, t in state.items() if k != "attnpool.c_proj.bias"}
    for tensors, message in [
        (lacking, "lacks 'attnpool.c_proj.bias'"),
        (state | {"conv1.weight": torch.zeros(3)}, r"'conv1.weight' has the shape \[3\]"),
        (
            state | {"layer3.5.bn1.bias": torch.zeros(3)},
            "'layer3.5.bn1.bias' is not of this CLIP ResNet",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            load_by_prefix(model, tensors, "weights.pth")
    script, code, broken = (tmp_path / f"{name}.pt" for name in ("script", "code", "broken"))
    torch.jit.script(nn.Linear(2, 2)).save(script)
    torch.save(SimpleNamespace(a=1), code)
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="TorchScript archive"):
        read_tensors(script, "weights")
    for path in (code, broken, tmp_path / "missing.pt"):
        with pytest.raises(InputError, match="cannot be read"):
            read_tensors(path, "weights")


def test_clip_frozen_parts(small_clip):
    model = small_clip()
    model.frozen_norm.fill_(True)
    model.train()
    learned = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {"layer2", "layer3", "layer4", "attnpool"}
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_clip_width_must_be_that_of_the_texts(small_clip):
    args = unidetector.Args(**SMALL | {"classifier_backbone": "RN50/openai"})
    label_space = unidetector.build_label_space(args, two_datasets())
    with pytest.raises(InputError, match="24 dimensions, the text encoder names in 384"):
        unidetector.Model(args, label_space)


# -- proposals and prior ---------------------------------------------------------------------------


class Locator:
    """Finds random boxes, the same each time, and notes the images that it has seen."""

    def __init__(self, dataset: Dataset, folder, fails_at: int = -1):
        self.dataset, self.folder, self.fails_at = dataset, folder, fails_at
        self.seen = []

    def boxes(self, row: int) -> torch.Tensor:
        height, width = self.dataset.load(row).original_size
        generator = torch.Generator().manual_seed(row)
        corners = torch.rand(1 + row % 3, 2, 2, generator=generator).sort(1).values
        return corners.flatten(1) * torch.tensor([width, height] * 2)

    def __call__(self, batch) -> list[dict]:
        (sample,) = batch.samples
        if sample.index == self.fails_at:
            raise KeyboardInterrupt
        self.seen.append(sample.index)
        found = {"boxes": self.boxes(sample.index), "size": sample.original_size}
        return [{"proposals": found}]

    def run(self) -> Dataset:
        args = SimpleNamespace(skip_bad=0, workers=0)
        self.seen.clear()
        resize = ResizeShortestRange(96, 96)
        [extended] = with_proposals(self, [self.dataset], resize, self.folder, "key", args)
        return extended


@pytest.fixture
def locator(tiny_root, tmp_path, monkeypatch) -> Locator:
    """Of 12 images, in blocks of 5, 5 and 2."""
    monkeypatch.setattr(common.proposals, "BLOCK", 5)
    [dataset] = load_datasets("coco", "train", str(tiny_root))
    return Locator(dataset, tmp_path)


def test_proposals_are_stored_and_come_with_the_samples(locator):
    extended = locator.run()
    assert locator.seen == list(range(12)) and len(extended) == 12
    for i in range(12):
        (sample,) = collate([extended.load(i)]).samples
        torch.testing.assert_close(sample.proposals, locator.boxes(i), atol=0.01, rtol=0)
        plain = locator.dataset.load(i)
        assert plain.proposals is None
        assert torch.equal(sample.boxes, plain.boxes) and torch.equal(sample.labels, plain.labels)
    locator.run()
    assert not locator.seen  # a second call reads the files


def test_proposals_go_on_after_a_kill(locator, caplog):
    """At image 11 of 12 the whole blocks are kept, and what was half written goes."""
    caplog.set_level("INFO", "concord")
    locator.fails_at = 11
    with pytest.raises(KeyboardInterrupt):
        locator.run()
    [folder] = locator.folder.glob("proposals-coco-*")
    left = folder / ".block-000002-1-0123abcd.npy"
    left.write_bytes(b"half")
    locator.fails_at = -1
    extended = locator.run()
    assert locator.seen == [10, 11] and not left.exists()
    assert "the proposals of 10 of 12 images are there" in caplog.text
    torch.testing.assert_close(extended.load(11).proposals, locator.boxes(11), atol=0.01, rtol=0)


def test_a_damaged_block_of_proposals_is_computed_again(locator):
    locator.run()
    [folder] = locator.folder.glob("proposals-coco-*")
    file = folder / "block-000001.npy"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 500, None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        locator.run()
        assert locator.seen == [5, 6, 7, 8, 9] and file.read_bytes() == whole
    for wrong in (np.ones((2, 3, 4), np.uint16), np.ones((5, 3, 4)), np.ones(5), np.ones(())):
        np.save(file, wrong)
        locator.run()
        assert locator.seen == [5, 6, 7, 8, 9] and file.read_bytes() == whole


def test_ranks_share_the_blocks_of_proposals(locator, monkeypatch):
    monkeypatch.setattr(common.proposals, "world_size", lambda: 2)
    for rank, rows in ((1, [5, 6, 7, 8, 9]), (0, [0, 1, 2, 3, 4])):
        monkeypatch.setattr(common.proposals, "rank", lambda rank=rank: rank)
        locator.run()  # the last block is left, as the other rank did not run beside it
        assert locator.seen == rows
    monkeypatch.undo()
    monkeypatch.setattr(common.proposals, "BLOCK", 5)
    locator.run()
    assert locator.seen == [10, 11]


def test_the_key_of_proposals_tells_localizers_apart():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint(one, 1) == fingerprint(one, 1)
    assert len({fingerprint(one, 1), fingerprint(other, 1), fingerprint(one, 2)}) == 3


def test_prior_round_trip_and_bad_files(tmp_path):
    vocabulary, path = Vocabulary("a", ("cat", "Traffic Light", "dog")), tmp_path / "prior.json"
    counts = count_classes(
        vocabulary,
        {0: {"labels": torch.tensor([2, 2, 0])}, 1: {"labels": torch.zeros(0).long()}},
        path,
    )
    assert counts.tolist() == [1, 0, 2]
    own, read = read_prior(str(path))
    assert own.names == vocabulary.names and read.tolist() == [1, 0, 2]
    assert read_prior(str(path), Vocabulary("b", ("dog", "traffic_light")))[1].tolist() == [2, 0]
    with pytest.raises(InputError, match="another vocabulary: it lacks 'bird'"):
        read_prior(str(path), Vocabulary("b", ("dog", "bird")))
    for content in (
        "{",
        "[]",
        '{"names": ["a"]}',
        '{"names": ["a"], "counts": [1, 2]}',
        '{"names": ["a"], "counts": [-1]}',
        '{"names": ["a"], "counts": [1e300]}',
        '{"names": ["a"], "counts": [1' + 400 * "0" + "]}",
        100_000 * "[",
    ):
        path.write_text(content)
        with pytest.raises(InputError, match="cannot be read"):
            read_prior(str(path))


def test_best_proposals_are_kept(monkeypatch):
    """NMS with a threshold of 0.9 leaves at most 1500, of the highest eta."""
    model, _ = small_model()
    x, y = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    corners = torch.stack([x.flatten(), y.flatten()], 1)
    boxes = 10 * torch.cat([corners, corners + 0.9], 1)  # 1600 that do not overlap
    scores = torch.rand(1600, 3)
    twice = torch.cat([boxes, boxes + 0.1])  # the IoU is greater than 0.9
    lower = torch.cat([scores, scores / 2])
    monkeypatch.setattr(model.localizer, "forward", lambda *_: [(twice, *lower.T)])
    [(kept, eta)] = unidetector.propose(model, batch_of("a"))
    expected = unidetector.objectness(*scores.T, 0.3).sort(descending=True)
    assert torch.equal(eta, expected.values[:1500])
    assert torch.equal(kept, boxes[expected.indices[:1500]])


def test_text_of_another_width_is_refused():
    _, label_space = small_model()
    vocabulary = Vocabulary("v", ("x", "y", "z"), text=unit_rows(3, 512))
    with pytest.raises(InputError, match="512 dimensions, this model needs 384"):
        label_space.swap(vocabulary)


# -- command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory, call):
    """Run folder of both stages on two datasets.

    It is evaluated on one of them and on one never trained on.
    """
    folder = tmp_path_factory.mktemp("unidetector") / "run"
    data = ["--datasets", "coco,o365", "--eval-datasets", "coco,lineart", "--data-root", tiny_root]
    call(*data, *QUICK, "--output", folder, "--checkpoint-every", 2, method="unidetector")
    return folder


def test_both_stages_leave_everything(trained):
    names = {path.name for path in trained.iterdir()}
    assert {
        "weights.safetensors",
        "prior-coco.json",
        "prior-lineart.json",
        "predictions-lineart.jpg",
    } <= names
    assert sum(name.startswith("proposals-") for name in names) == 2
    results = json.loads((trained / "results.json").read_text())
    assert list(results) == [
        *["coco (proposals)", "coco (no calibration)", "coco"],
        *[
            f"lineart{note}"
            for note in (" (proposals)", " (no calibration)", "", " (shuffled text)")
        ],
    ]
    assert list(results["coco (proposals)"]) == ["AR@10", "AR@100", "AR@1000"]
    assert {"AP", "AP50 known", "AP50 unknown"} <= results["lineart"].keys()
    for name in ("coco", "lineart"):
        counts = json.loads((trained / f"prior-{name}.json").read_text())["counts"]
        assert 0 < sum(counts) <= 12 * 100 and max(counts) > min(counts)
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 8 and {"loss_classification", "loss_box"} <= steps[-1].keys()


def test_one_image_with_the_prior_of_an_evaluation(trained, tmp_path, call, fails):
    image, prior = tmp_path / "photo.png", trained / "prior-coco.json"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)).save(
        image
    )
    given, found = ["--predict", image, "--weights", trained, "--prior", prior], {}
    for gamma in (0.0, 0.6):
        call(*given, "--output", tmp_path / str(gamma), "--gamma", gamma, method="unidetector")
        found[gamma] = json.loads((tmp_path / str(gamma) / "predictions.json").read_text())
    assert [c["name"] for c in found[0.6]["categories"]] == json.loads(prior.read_text())["names"]
    assert found[0.0]["annotations"] != found[0.6]["annotations"]
    line = fails(
        *given, "--vocabulary", "alligator", "--output", tmp_path / "o", method="unidetector"
    )
    assert "another vocabulary: it lacks 'alligator'" in line


def test_evaluation_with_a_given_prior_is_the_same(trained, tiny_root, tmp_path, call):
    data = [
        "--eval-only",
        "--weights",
        trained,
        "--eval-datasets",
        "coco",
        "--data-root",
        tiny_root,
        "--workers",
        0,
    ]
    prior = ["--prior", trained / "prior-coco.json"]
    call(*data, *prior, "--output", tmp_path / "again", method="unidetector")
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["coco"] == json.loads((trained / "results.json").read_text())["coco"]


def test_a_bad_prior_fails_before_the_training(trained, tiny_root, tmp_path, fails):
    (tmp_path / "other.json").write_text('{"names": ["cat"], "counts": [1]}')
    data = ["--datasets", "coco", "--data-root", tiny_root, "--output", tmp_path / "run", *QUICK]
    for name, words in (
        ("gone.json", "cannot be read"),
        ("other.json", "another vocabulary: it lacks"),
    ):
        assert words in fails(*data, "--prior", tmp_path / name, method="unidetector")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpoint", [4, 6])
def test_resume_ends_with_the_same_weights(
    checkpoint, trained, tiny_root, tmp_path, monkeypatch, call
):
    """The run is stopped between the stages or in the second one.

    Every bit of the weights is that of the uninterrupted run.
    """
    data = [
        "--datasets",
        "coco,o365",
        "--eval-datasets",
        "coco",
        "--data-root",
        tiny_root,
        "--checkpoint-every",
        2,
    ]

    def check(run_log, losses, step, batch):
        if step == checkpoint + 1:
            raise Enough
        return finite(run_log, losses, step, batch)

    finite = unidetector.RunLog.check_finite
    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(unidetector.RunLog, "check_finite", check)
        call(*data, *QUICK, "--output", tmp_path / "run", method="unidetector")
    call("--resume", tmp_path / "run", method="unidetector")
    ours, whole = (load_file(path / "weights.safetensors") for path in (tmp_path / "run", trained))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)


@pytest.mark.parametrize(
    "structure, sampler", [("unified", "class-aware"), ("separate", "repeat-factor")]
)
def test_classifier_stage_of_each_structure_and_sampler(
    structure, sampler, trained, tiny_root, tmp_path, call
):
    data = ["--eval-datasets", "coco", "--data-root", tiny_root]
    stage = [
        "--stage",
        "classifier",
        "--weights",
        trained,
        "--structure",
        structure,
        "--sampler",
        sampler,
    ]
    call(
        *data,
        "--datasets",
        "coco,o365",
        *QUICK,
        *stage,
        "--output",
        tmp_path / "run",
        method="unidetector",
    )
    ours, source = (load_file(path / "weights.safetensors") for path in (tmp_path / "run", trained))
    frozen = [key for key in source if key.startswith("localizer.")]
    assert frozen and all(torch.equal(ours[key], source[key]) for key in frozen)
    heads = {key.split(".")[1] for key in ours if key.startswith("classifiers.")}
    assert heads == ({"0", "1"} if structure == "separate" else {"0"})
    again = [
        "--eval-only",
        "--weights",
        tmp_path / "run",
        "--workers",
        0,
        "--output",
        tmp_path / "again",
    ]
    call(*again, *data, method="unidetector")
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "again")
    ]
    assert results[0] == results[1]


def test_localizer_stage_alone(tiny_root, tmp_path, call, fails):
    data = ["--datasets", "coco", "--eval-datasets", "coco", "--data-root", tiny_root]
    call(*data, *QUICK, "--stage", "localizer", "--output", tmp_path / "run", method="unidetector")
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["coco (proposals)"]
    assert not any(
        key.startswith("classifiers.")
        for key in load_file(tmp_path / "run" / "weights.safetensors")
    )
    line = fails("--predict", "x.jpg", "--weights", tmp_path / "run", method="unidetector")
    assert "hold a localizer alone" in line


def test_without_a_step_the_ranks_get_one_localizer(tiny_root, tmp_path, call, monkeypatch):
    """DistributedDataParallel, which makes ranks alike, is of the part that is trained."""
    monkeypatch.setattr(unidetector, "evaluate", lambda *given: {})
    shared = []
    monkeypatch.setattr(unidetector, "same_on_ranks", shared.append)
    data = ["--datasets", "coco", "--eval-datasets", "coco", "--data-root", tiny_root]
    steps = ["--steps", 0, "--classifier-steps", 0, "--output", tmp_path / "run"]
    call(*data, *QUICK, *steps, method="unidetector")
    [model] = shared
    assert hasattr(model, "localizer") and (tmp_path / "run/weights.safetensors").exists()


def test_two_ranks_train_both_stages(tiny_root, tmp_path, run):
    data = ["--datasets", "coco,o365", "--eval-datasets", "coco", "--data-root", tiny_root]
    steps = ["--steps", 1, "--classifier-steps", 1, "--structure", "separate"]
    done = run(*data, *QUICK, *steps, "--output", tmp_path / "run", method="unidetector", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "coco" in json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--datasets", "coco", "--stage", "classifier"], "--stage classifier needs --weights"),
        (["--datasets", "coco", "--gamma", "-1"], "--gamma -1.0 must be between 0"),
        (
            ["--datasets", "coco", "--classifier-lr", "0"],
            "--classifier-lr 0.0 must be greater than 0",
        ),
        (["--datasets", "coco", "--classifier-backbone", "RN7/openai"], "no CLIP ResNet 'RN7'"),
        (
            ["--datasets", "coco", "--classifier-backbone", "RN50/nothing"],
            "no weights 'nothing' for RN50",
        ),
        (
            ["--datasets", "coco", "--classifier-backbone", "missing.pth"],
            "missing.pth cannot be read: it does not exist",
        ),
        (["--datasets", "coco", "--classifier-backbone", "resnet5"], "resnet5 is not a timm model"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message, tiny_root, tmp_path, fails):
    flags = [flag for pair in zip(*[iter(QUICK)] * 2) if pair[0] not in arguments for flag in pair]
    data = ["--data-root", tiny_root, "--output", tmp_path / "run"]
    assert message in fails(*flags, *arguments, *data, method="unidetector")


def test_text_of_another_width(trained, tmp_path, fails):
    np.save(tmp_path / "text.npy", np.eye(1, 512, dtype=np.float32))
    other = [
        "--text-encoder",
        tmp_path / "text.npy",
        "--weights",
        trained,
        "--output",
        tmp_path / "o",
    ]
    other += ["--output", tmp_path / "run"]
    line = fails("--predict", "x.jpg", "--vocabulary", "dragon", *other, method="unidetector")
    assert "text embeddings have 512 dimensions, this model needs 384" in line
