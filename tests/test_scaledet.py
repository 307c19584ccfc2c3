"""ScaleDet: each equation, and what it builds on, against loops over floats.

The loops are written from the papers.
"""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common.cascade
import scaledet
from common.backbone import GroupNorm
from common.batch import Sample, collate
from common.boxes import decode_boxes, pool_rois
from common.cascade import BoxStage, Cascade, MaskHead, StageOutput, loss_box_reg, sample_federated
from common.centernet import CenterNet, CenterNetHead, Grid
from common.datasets import load_datasets
from common.datasets.dataset import Dataset
from common.datasets.index import Index
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.sampling import RepeatFactorSampler, repeat_factors
from common.targets import RegionTargets, Targets, match_regions, sample_fg_bg, true_rows
from common.text import embed
from common.text_classifier import TextClassifier, TextScores
from common.transforms import LargeScaleJitter
from scaledet import Args, LabelTables, Model

SMALL = Args(
    backbone="resnet18",
    text_encoder="minilm",
    channels=64,
    fc_dim=32,
    rois_per_image=16,
    ignore_dup=False,
    amp="off",
)


NOTHING = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unit_rows(count: int, width: int = 6):
    return F.normalize(torch.randn(count, width))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(logit: float, positive: bool) -> float:
    return math.log1p(math.exp(-logit if positive else logit))


def iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def region_targets(boxes, labels) -> RegionTargets:
    return RegionTargets(boxes, labels, torch.zeros_like(labels))


def random_boxes(count: int, side: float = 200, least: float = 8):
    corner = torch.rand(count, 2) * side / 2
    return torch.cat([corner, corner + least + torch.rand(count, 2) * side / 2], 1)


# -- label similarity and the losses of the label space --------------------------------------------


def whole_similarity(text, sim_norm: str):
    """S (C, C) of all labels, as a training has its rows."""
    tables = LabelTables.of(replace(SMALL, sim_norm=sim_norm), text, torch.ones(len(text)))
    return scaledet.label_similarity(all_cosines(text), tables.lowest)


def all_cosines(text):
    return scaledet.label_cosines(text, torch.arange(len(text)))


def test_scaledet_label_similarity_is_the_cosine_rescaled():
    text = unit_rows(5)
    text = torch.cat([text, text[1:2]])  # label 5 has the text of label 1
    cosine = [[sum(a * b for a, b in zip(s, t)) for t in text.tolist()] for s in text.tolist()]
    low = min(min(row) for row in cosine)
    raw, scaled = (whole_similarity(text, norm) for norm in ("none", "minmax"))
    for i, j in itertools.product(range(6), range(6)):
        assert raw[i, j] == pytest.approx(cosine[i][j], abs=1e-6)
        assert scaled[i, j] == pytest.approx((cosine[i][j] - low) / (1 - low), abs=1e-6)
    for similarity in (raw, scaled):
        torch.testing.assert_close(similarity, similarity.T)
        assert (similarity.diagonal() == 1).all()
        torch.testing.assert_close(similarity[1], similarity[5])
    assert abs(scaled.min()) < 1e-6 and scaled.max() == 1


def test_scaledet_lowest_cosine_is_that_of_all_blocks():
    text = unit_rows(2500)
    assert scaledet.lowest_cosine(text) == pytest.approx(float((text @ text.T).min()), abs=1e-6)


@pytest.mark.parametrize("norm", ["none", "minmax"])
def test_scaledet_label_similarity_of_one_label(norm):
    assert whole_similarity(unit_rows(1), norm).tolist() == [[1]]
    twice = whole_similarity(unit_rows(1).expand(2, -1), norm)
    assert (twice.diagonal() == 1).all()
    torch.testing.assert_close(twice, torch.ones(2, 2), rtol=0, atol=1e-6)


def test_scaledet_eq6_hard_label():
    logits, labels = torch.randn(5, 4) * 3, torch.tensor([2, -1, 0, -1, 3])
    mask = torch.rand(5, 4)
    expected = 0.0
    for r, j in itertools.product(range(5), range(4)):
        expected += mask[r, j].item() * bce(logits[r, j].item(), labels[r] == j) / 5
    loss = scaledet.loss_hard_label(logits, labels, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_scaledet_eq7_soft_label():
    similarity = whole_similarity(unit_rows(4), "minmax")
    cosine, labels = torch.rand(5, 4) * 2 - 1, torch.tensor([2, -1, 0, -1, 3])
    cosine.requires_grad_()
    expected, gradient = 0.0, torch.zeros(5, 4)
    for r, j in itertools.product((0, 2, 4), range(4)):  # foreground
        error = cosine[r, j].item() - similarity[labels[r], j].item()
        expected += error**2 / 4 / 3
        gradient[r, j] = 2 * error / 4 / 3
    loss = scaledet.loss_soft_label(cosine[[0, 2, 4]], similarity[labels[[0, 2, 4]]])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(cosine.grad, gradient)


def test_scaledet_losses_of_background_alone():
    cosine = torch.rand(3, 4).requires_grad_()
    deltas = torch.randn(3, 4).requires_grad_()
    labels = torch.full((3,), -1)
    targets = [region_targets(torch.zeros(3, 4), labels)]
    soft = scaledet.loss_soft_label(cosine[:0], torch.zeros(0, 4))
    box = loss_box_reg(StageOutput(0, [torch.zeros(3, 4)], cosine, deltas, targets))
    hard = scaledet.loss_hard_label(cosine / 0.02, labels, torch.ones(3, 4))
    assert soft == 0 and box == 0
    assert hard.item() == pytest.approx(
        sum(bce(c / 0.02, False) for c in cosine.flatten().tolist()) / 3, rel=1e-4
    )
    (soft + box + hard).backward()
    assert cosine.grad.isfinite().all() and cosine.grad.abs().sum() > 0
    assert (deltas.grad == 0).all()


def test_scaledet_losses_without_regions_are_zero():
    none, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert scaledet.loss_hard_label(none, labels, none) == 0
    assert scaledet.loss_soft_label(none, none) == 0
    assert loss_box_reg(StageOutput(0, [none], none, none, [region_targets(none, labels)])) == 0


def test_scaledet_scale_check_of_hard_and_soft_gradients():
    """How strongly a negative feels Eq. 6 and Eq. 7.

    At c = -0.1 it is a hundred to one. At c = -0.2 the two are equal.
    """
    num_labels, regions, foreground = 2148, 8, 2
    labels = torch.tensor([0] * foreground + [-1] * (regions - foreground))
    # CLIP's cosine of unrelated nouns
    similarity = torch.full((foreground, num_labels), 0.7)
    similarity[:, 0] = 1

    def gradients(c):
        cosine = torch.full((regions, num_labels), c).requires_grad_()
        hard = scaledet.loss_hard_label(cosine / Args.tau, labels, torch.ones(regions, num_labels))
        soft = Args.lam * scaledet.loss_soft_label(cosine[:foreground], similarity)
        return [
            float(torch.autograd.grad(loss, cosine)[0][0, 1]) * regions for loss in (hard, soft)
        ]

    assert gradients(-0.1) == [pytest.approx(0.33, rel=0.02), pytest.approx(-3e-3, rel=0.02)]
    hard, soft = gradients(-0.2)
    assert 0.5 < hard / -soft < 2


def test_scaledet_class_mask():
    """neg_scope and ignore_dup, on regions of two images from different datasets.

    Labels 1 and 3 have the same text.
    """
    text = unit_rows(5)
    text[3] = text[1]
    scopes = [slice(0, 2), slice(2, 5)]
    image_labels = [torch.tensor([1, -1, 0]), torch.tensor([3, 2, -1, 4])]
    boxes = [torch.zeros(len(x), 4) for x in image_labels]
    targets = [Targets(*NOTHING, scope) for scope in scopes]
    matched = [region_targets(*pair) for pair in zip(boxes, image_labels)]
    stage = StageOutput(0, boxes, None, None, matched)
    labels = torch.cat(image_labels)
    for own, ignore_dup in itertools.product((False, True), (False, True)):
        args = replace(SMALL, neg_scope="own" if own else "all", ignore_dup=ignore_dup)
        fg = (labels >= 0).nonzero()[:, 0]
        between = scaledet.label_cosines(text, labels[fg])
        mask = scaledet.class_mask(args, stage, targets, slice(None), fg, between)
        assert mask.shape == (7, 5)
        some = scaledet.class_mask(args, stage, targets, torch.tensor([3, 0]), fg, between)
        assert torch.equal(some, mask[:, [3, 0]])
        for r, j in itertools.product(range(len(labels)), range(5)):
            scope = scopes[0 if r < 3 else 1]
            expected = scope.start <= j < scope.stop or not own
            if ignore_dup and {int(labels[r]), j} == {1, 3}:
                expected = False
            assert mask[r, j] == expected, (own, ignore_dup, r, j)


def test_scaledet_duplicates_are_judged_before_the_rescaling():
    text = F.normalize(torch.tensor([[1.0, 0.12, 0], [1, 0, 0], [1, 0.12, 0.04], [1, 0.16, 0]]))
    labels, boxes = torch.arange(4), torch.zeros(4, 4)
    stage = StageOutput(0, [boxes], None, None, [region_targets(boxes, labels)])
    between = all_cosines(text)
    truth = whole_scope(text)[:1]
    mask = scaledet.class_mask(Args(), stage, truth, slice(None), labels, between)
    expected = [[i != j and float(text[i] @ text[j]) > 0.99 for j in range(4)] for i in range(4)]
    assert (mask == 0).tolist() == expected
    assert any(map(any, expected)) and not expected[1][3]


def test_scaledet_fed_loss_fills_up_to_fifty_classes():
    frequency = torch.arange(120.0)
    frequency[100:] = 0
    for labels, background in ([3, 3, 110, 7], 0), ([-1, 3, 110, 7], 1), ([-1], 1):
        for _ in range(20):
            sampled = sample_federated(torch.tensor(labels), frequency).nonzero().flatten().tolist()
            assert len(sampled) == 50 - background
            assert {label for label in labels if label >= 0} <= set(sampled)
            assert all(frequency[c] > 0 for c in sampled if c not in labels)


def test_scaledet_fed_loss_where_classes_are_few_or_many():
    frequency = torch.tensor([5.0, 0, 3, 9])
    assert sample_federated(torch.tensor([1]), frequency).tolist() == [1, 1, 1, 1]
    assert sample_federated(torch.tensor([-1, 0]), frequency).tolist() == [1, 0, 1, 1]
    everything = torch.arange(80)  # more than 50 classes in the batch: all of them, and no other
    sampled = sample_federated(everything, torch.ones(200)).nonzero().flatten()
    assert torch.equal(sampled, everything)


def test_scaledet_fed_loss_samples_by_the_root_of_the_frequency():
    frequency = torch.tensor([1.0, 4, 16, 100])
    background = torch.tensor([-1])
    share = sum(sample_federated(background, frequency, num=2) for _ in range(3000)) / 3000
    expected = torch.tensor([1.0, 2, 4, 10]) / 17
    assert (share - expected).abs().max() < 0.04


def test_scaledet_fed_loss_acts_on_the_hard_loss_alone():
    args = replace(SMALL, fed_loss=True, lam=2.0)
    text, labels = unit_rows(60), torch.tensor([3, -1, 40])
    stages, predictions = three_stages(text, labels)
    tables = LabelTables.of(args, text, (torch.arange(60) < 30).float())
    losses = scaledet.compute_losses(args, stages, predictions, {}, whole_scope(text), tables)
    own = torch.zeros(60)
    own[:30] = own[40] = 1  # 30 classes have images: all are sampled
    cosine, logits = predictions[1].cosine(), predictions[1].logits()
    expected = scaledet.loss_hard_label(logits, labels, own.expand(3, 60))
    torch.testing.assert_close(losses["loss_hard_stage1"], expected)
    similarity = whole_similarity(text, args.sim_norm)[labels[[0, 2]]]
    expected = 2 * scaledet.loss_soft_label(cosine[[0, 2]], similarity)
    torch.testing.assert_close(losses["loss_soft_stage1"], expected)


def test_scaledet_fed_loss_samples_among_the_classes_of_lvis_alone(tiny_root):
    coco, lvis = load_datasets("coco,lvis", "train", str(tiny_root))
    label_space = LabelSpace([coco.vocabulary, lvis.vocabulary])
    federated = scaledet.federated_counts([coco, lvis], label_space)
    assert (federated[: len(coco.vocabulary)] == -1).all()
    assert federated[len(coco.vocabulary) :].tolist() == lvis.image_counts().tolist()
    sampled = sample_federated(torch.tensor([0, len(coco.vocabulary) + 2, -1]), federated)
    assert sampled[: len(coco.vocabulary)].all() and sampled[len(coco.vocabulary) + 2] == 1
    # background, which COCO's region is here, counts as one of the 50
    seen = int((federated[len(coco.vocabulary) :] > 0).sum())
    assert sampled[len(coco.vocabulary) :].sum() == min(49, seen) < len(lvis.vocabulary)


def naive_box_reg(output: StageOutput, weights: tuple) -> float:
    boxes, gt_boxes = (
        torch.cat(output.boxes).tolist(),
        torch.cat([t.boxes for t in output.targets]).tolist(),
    )
    labels, total = torch.cat([t.labels for t in output.targets]).tolist(), 0.0
    for (x1, y1, x2, y2), (u1, v1, u2, v2), label, deltas in zip(
        boxes, gt_boxes, labels, output.deltas.tolist()
    ):
        wanted = (
            ((u1 + u2) / 2 - (x1 + x2) / 2) / (x2 - x1),
            ((v1 + v2) / 2 - (y1 + y2) / 2) / (y2 - y1),
            math.log((u2 - u1) / (x2 - x1)),
            math.log((v2 - v1) / (y2 - y1)),
        )
        total += (
            sum(abs(d - w * t) for d, w, t in zip(deltas, weights, wanted)) if label >= 0 else 0
        )
    return total / len(boxes)


def test_scaledet_box_regression(monkeypatch):
    monkeypatch.setattr(Cascade, "box_weights", (None, (30.0, 20.0, 15.0, 5.0)))
    boxes = list(random_boxes(5).split([2, 3]))
    labels = torch.tensor([2, -1, 0, -1, 3]).split([2, 3])
    targets = [region_targets(random_boxes(len(x)), x) for x in labels]
    output = StageOutput(1, boxes, None, torch.randn(5, 4), targets)
    assert output.labels.tolist() == [2, -1, 0, -1, 3]
    expected = naive_box_reg(output, (30.0, 20.0, 15.0, 5.0))
    assert loss_box_reg(output).item() == pytest.approx(expected, rel=1e-5)


def test_scaledet_decoded_boxes():
    deltas, weights = torch.tensor([[5.0, -10, 2, 100], [0, 0, 0, 0]]), (10.0, 10.0, 5.0, 5.0)
    (box, same) = decode_boxes(
        torch.tensor([[10.0, 20, 30, 60], [1, 2, 3, 4]]), deltas, weights
    ).tolist()
    width, height = 20 * math.exp(0.4), 40 * 1000 / 16  # growth is capped
    centre = (20 + 0.5 * 20, 40 - 1.0 * 40)
    expected = (
        centre[0] - width / 2,
        centre[1] - height / 2,
        centre[0] + width / 2,
        centre[1] + height / 2,
    )
    assert box == pytest.approx(expected, rel=1e-5)
    assert same == [1, 2, 3, 4]


def three_stages(text, labels) -> tuple[list[StageOutput], list]:
    """Three stages that saw random regions of two images, and what their classifiers predict."""
    stages, predictions = [], []
    split = [len(labels) // 2, len(labels) - len(labels) // 2]
    for k in range(3):
        stage, classifier = BoxStage(2, 8), TextClassifier(8, text.shape[1], Args.tau, 0.0)
        boxes = random_boxes(len(labels)).split(split)
        targets = [region_targets(random_boxes(len(x)), x) for x in labels.split(split)]
        hidden, deltas = stage(torch.randn(len(labels), 2, 7, 7) * (k + 1))
        stages.append(StageOutput(len(stages), list(boxes), hidden, deltas, targets))
        predictions.append(classifier(hidden, text))
    return stages, predictions


def whole_scope(text) -> list[Targets]:
    """The ground truth of two images of one dataset, which has all labels."""
    return [Targets(*NOTHING, slice(0, len(text)))] * 2


@pytest.mark.parametrize("sim_norm", ["minmax", "none"])
def test_scaledet_total_is_the_weighted_sum_of_every_stage(sim_norm):
    args = replace(SMALL, lam=0.7, sim_norm=sim_norm)
    text, labels = unit_rows(6), torch.tensor([3, -1, 4, 0])
    stages, predictions = three_stages(text, labels)
    tables = LabelTables.of(args, text, torch.ones(6))
    similarity = whole_similarity(text, sim_norm)[labels[[0, 2, 3]]]
    proposal_losses = {
        "loss_centernet_pos": torch.tensor(0.25),
        "loss_centernet_loc": torch.tensor(0.5),
    }
    truth = whole_scope(text)
    losses = scaledet.compute_losses(args, stages, predictions, proposal_losses, truth, tables)
    weights = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    expected = dict(proposal_losses)
    for k, (stage, prediction) in enumerate(zip(stages, predictions)):
        cosine, logits = prediction.cosine(), prediction.logits()
        hard = scaledet.loss_hard_label(logits, labels, torch.ones(4, 6))
        soft = scaledet.loss_soft_label(cosine[[0, 2, 3]], similarity)
        expected[f"loss_hard_stage{k}"] = hard
        expected[f"loss_soft_stage{k}"] = 0.7 * soft
        expected[f"loss_box_reg_stage{k}"] = torch.tensor(naive_box_reg(stage, weights[k]))
    expected["loss"] = sum(expected.values())
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_scaledet_each_stage_samples_its_own_classes(monkeypatch):
    text, labels = unit_rows(6), torch.tensor([3, -1, 4, 0])
    stages, predictions = three_stages(text, labels)
    drawn = []

    def sample(*_):
        mask = torch.zeros(6).index_fill(0, torch.tensor([len(drawn)]), 1)
        drawn.append(mask)
        return mask

    monkeypatch.setattr(scaledet, "sample_federated", sample)
    args = replace(SMALL, fed_loss=True)
    tables = LabelTables.of(args, text, torch.ones(6))
    losses = scaledet.compute_losses(args, stages, predictions, {}, whole_scope(text), tables)
    assert len(drawn) == 3
    for k, (prediction, mask) in enumerate(zip(predictions, drawn)):
        expected = scaledet.loss_hard_label(prediction.logits(), labels, mask.expand(4, 6))
        torch.testing.assert_close(losses[f"loss_hard_stage{k}"], expected)


def test_scaledet_without_soft_loss_is_detic_without_federated_mask():
    """z = 50 norm(W f) . norm(T), as Detic's zero-shot classifier has it.

    The BCE is summed over the classes; it is the mean over the regions.
    """
    args = replace(SMALL, lam=0.0)
    raw_text = torch.randn(7, 5) * 3
    stage, classifier = BoxStage(2, 8), TextClassifier(8, 5, args.tau, args.cls_bias)
    pooled, labels = torch.randn(4, 2, 7, 7), torch.tensor([6, -1, 2, -1])
    linear = classifier.embedding
    expected = 0.0
    for r, f in enumerate(stage.box_head(pooled).tolist()):
        v = [
            sum(w * x for w, x in zip(row, f)) + b
            for row, b in zip(linear.weight.tolist(), linear.bias.tolist())
        ]
        for j, t in enumerate(raw_text.tolist()):
            dot = sum(a * b for a, b in zip(v, t))
            expected += bce(50 * dot / math.hypot(*v) / math.hypot(*t), labels[r] == j) / 4
    text = F.normalize(raw_text)
    hidden, deltas = stage(pooled)
    targets = [region_targets(torch.ones(4, 4), labels)]
    output = StageOutput(0, [random_boxes(4)], hidden, deltas, targets)
    tables = LabelTables.of(args, text, torch.ones(7))
    predictions = [classifier(hidden, text)]
    truth = whole_scope(text)[:1]
    losses = scaledet.compute_losses(args, [output], predictions, {}, truth, tables)
    assert losses["loss_hard_stage0"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_soft_stage0"] == 0


def test_scaledet_scores_of_some_rows_and_columns_are_those_of_all():
    text, hidden = unit_rows(6), torch.randn(4, 8)
    scores = TextClassifier(8, text.shape[1], 0.05, -4.6)(hidden, text)
    columns = torch.tensor([5, 0, 3])
    torch.testing.assert_close(scores.logits(columns), scores.logits()[:, columns])
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(scores.cosine(rows), scores.cosine()[rows])
    labels = torch.tensor([3, -1, 1, 5])
    assert scores.places(labels, columns).tolist() == [2, -1, -1, 0]
    assert scores.places(labels) is labels


def test_scaledet_class_bias_moves_the_logits_and_not_the_cosine():
    classifier, hidden, text = TextClassifier(8, 6, 0.05, -4.6), torch.randn(3, 8), unit_rows(4)
    scores = classifier(hidden, text)
    cosine, logits = scores.cosine(), scores.logits()
    torch.testing.assert_close(
        cosine, F.normalize(F.linear(hidden, *classifier.embedding.parameters())) @ text.T
    )
    torch.testing.assert_close(logits, cosine / 0.05 - 4.6)
    assert classifier.cls_bias.requires_grad and cosine.abs().max() <= 1


# -- the label space -------------------------------------------------------------------------------


def test_scaledet_appending_a_dataset_changes_no_row_before_it():
    first, second = Vocabulary("a", ("cat", "dog", "car")), Vocabulary("b", ("Cat", "sofa"))
    alone = scaledet.build_label_space(SMALL, [first])
    union = scaledet.build_label_space(SMALL, [first, second])
    assert len(alone) == 3 and union.names == ("cat", "dog", "car", "Cat", "sofa")
    assert torch.equal(union.text[:3], alone.text)
    assert torch.equal(union.text[3:], embed(second.names, "minilm"))
    for norm, exact in (("none", True), ("minmax", False)):
        s, longer = (whole_similarity(t, norm) for t in (alone.text, union.text))
        longer = longer[:3, :3]
        if not exact:  # up to the rescaling: the same after undoing it
            s, longer = ((x - x.min()) / (1 - x.min()) for x in (s, longer))
        torch.testing.assert_close(longer, s)


def test_scaledet_ground_truth_is_offset_by_the_dataset():
    space = LabelSpace([Vocabulary("a", ("x", "y", "z")), Vocabulary("b", ("u", "v"))])
    samples = [
        sample("b", [[1, 2, 20, 30]], [1]),
        sample("a", [[1, 2, 20, 30]] * 2, [0, 2]),
        sample("b", [], []),
    ]
    truth = scaledet.prepare_targets(collate(samples), space)
    assert [t.labels.tolist() for t in truth] == [[4], [0, 2], []]
    assert [t.scope for t in truth] == [slice(3, 5), slice(0, 3), slice(3, 5)]


@pytest.mark.parametrize("ignore_dup", [True, False])
def test_scaledet_shared_label_of_two_datasets_can_be_confident(ignore_dup):
    """A positive and its duplicate negative lie on one number.

    Without ignore_dup its probability ends at 1/2.
    """
    vocabularies = [Vocabulary("a", ("person", "car")), Vocabulary("b", ("Person", "car"))]
    args = replace(SMALL, ignore_dup=ignore_dup, lam=0.0)
    text = scaledet.build_label_space(args, vocabularies).text
    labels = torch.tensor([2])
    boxes = torch.zeros(1, 4)
    stage = StageOutput(0, [boxes], None, None, [region_targets(boxes, labels)])
    targets, between = [Targets(boxes, labels, slice(2, 4))], scaledet.label_cosines(text, labels)
    mask = scaledet.class_mask(args, stage, targets, slice(None), torch.tensor([0]), between)
    embedding = nn.Parameter(torch.randn(1, text.shape[1]))
    optimizer = torch.optim.Adam([embedding], lr=0.05)
    for _ in range(200):
        logits = F.normalize(embedding) @ text.T / args.tau
        optimizer.zero_grad()
        scaledet.loss_hard_label(logits, labels, mask).backward()
        optimizer.step()
    p = logits.sigmoid()[0].tolist()
    assert p[0] == pytest.approx(p[2], abs=1e-4)  # "person" and "Person" are one text
    assert p[0] > 0.95 if ignore_dup else p[0] == pytest.approx(0.5, abs=0.02)


# -- regions, scores and detections ----------------------------------------------------------------


def test_scaledet_matched_regions():
    truth = Targets(random_boxes(4), torch.tensor([7, 0, 3, 5]))
    boxes = torch.cat([random_boxes(30), truth.boxes + torch.randn(4, 4) * 3])
    for threshold in Cascade.ious:
        (kept,), (targets,) = match_regions([boxes], [truth], threshold, 0)
        assert torch.equal(kept, boxes)
        for box, label, target in zip(
            boxes.tolist(), targets.labels.tolist(), targets.boxes.tolist()
        ):
            overlaps = [iou(box, gt) for gt in truth.boxes.tolist()]
            best = max(range(4), key=overlaps.__getitem__)
            assert label == (truth.labels[best] if overlaps[best] >= threshold else -1)
            assert label == -1 or target == truth.boxes[best].tolist()
        assert torch.equal(targets.boxes, truth.boxes[targets.gt_index])
        assert -1 in targets.labels and (targets.labels >= 0).any()


def test_scaledet_an_overlap_of_exactly_the_threshold_is_foreground():
    truth = Targets(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([1]))
    _, (targets,) = match_regions([torch.tensor([[0.0, 0, 2, 4]])], [truth], 0.5, 0)
    assert targets.labels.tolist() == [1]


def test_scaledet_first_stage_samples_a_quarter_of_foreground():
    gt_boxes = torch.tensor([[0.0, 0, 50, 50], [100, 100, 150, 150]])
    truth = Targets(gt_boxes, torch.tensor([4, 6]))
    proposals = torch.cat(
        [
            truth.boxes.repeat(10, 1) + 1,
            torch.rand(100, 2).repeat(1, 2) + torch.tensor([0, 0, 9, 9]),
        ]
    )
    (boxes,), (targets,) = match_regions([proposals], [truth], 0.6, 32)
    assert len(boxes) == 32 and (targets.labels >= 0).sum() == 8
    # there are fewer than 512: all, and the truth
    (boxes,), (targets,) = match_regions([proposals], [truth], 0.6, 512)
    assert len(boxes) == 122 and (targets.labels >= 0).sum() == 22
    assert all((boxes == gt).all(1).any() for gt in truth.boxes)
    _, (targets,) = match_regions([proposals], [truth], 0.6, 64)
    assert (targets.labels >= 0).sum() == 16


def test_regions_of_each_image_are_sampled_uniformly():
    matched = [torch.arange(20) % 4 == 0, torch.ones(3, dtype=torch.bool)]
    assert [rows.tolist() for rows in true_rows(matched)] == [[0, 4, 8, 12, 16], [0, 1, 2]]
    drawn = torch.zeros(20)
    for _ in range(400):
        first, second = sample_fg_bg(matched, 8, 0.25)
        assert matched[0][first].tolist() == [True] * 2 + [False] * 6
        assert len(first.unique()) == 8 and len(second.unique()) == 2 == len(second)
        drawn[first] += 1
    share = torch.where(matched[0], 2 / 5, 6 / 15)
    assert ((drawn / 400 - share).abs() < 0.13).all()  # five standard deviations


def test_scaledet_image_without_boxes_is_background():
    for num_samples, count in ((0, 40), (16, 16)):
        nothing = [Targets(*NOTHING)]
        (boxes,), (targets,) = match_regions([random_boxes(40)], nothing, 0.6, num_samples)
        assert len(boxes) == len(targets.boxes) == count and (targets.labels == -1).all()
        assert torch.equal(boxes, targets.boxes) and not targets.gt_index.any()


def naive_detections(boxes: list, scores: list, one_class: bool) -> list[tuple]:
    """(score, label, row), the best 300 first.

    Threshold 0.02, greedy NMS per class at IoU 0.5.
    """
    candidates = []
    for q, row in enumerate(scores):
        for label, score in enumerate(row):
            if score > 0.02 and (not one_class or score == max(row)):
                candidates.append((score, label, q))
    kept = []
    for score, label, q in sorted(candidates, reverse=True):
        if all(label != other or iou(boxes[q], boxes[p]) <= 0.5 for _, other, p in kept):
            kept.append((score, label, q))
    return kept[:300]


@pytest.mark.parametrize("one_class", [False, True])
def test_scaledet_selected_detections(one_class):
    boxes, scores = random_boxes(120, 160, 25), torch.rand(120, 9) * 0.1
    expected = naive_detections(boxes.tolist(), scores.tolist(), one_class)
    got_boxes, got_scores, got_labels = scaledet.select_detections(boxes, scores, one_class)
    assert len(expected) == 300 or one_class
    assert got_scores.tolist() == [score for score, _, _ in expected]
    assert got_labels.tolist() == [label for _, label, _ in expected]
    assert torch.equal(got_boxes, boxes[[q for _, _, q in expected]])


class TwoStages(Model):
    """A Model whose two stages found three regions."""

    def __init__(self, logits, objectness, boxes):
        nn.Module.__init__(self)
        self.args, self.weight = SMALL, nn.Parameter(torch.zeros(()))
        self.centernet = lambda features: ([(boxes, objectness)], {})
        self.cascade = FoundRegions([SimpleNamespace(hidden=x) for x in logits], boxes)
        self.classifiers = [lambda hidden, text: TextScores(hidden, torch.eye(2))] * 2

    def extract(self, images, sizes):
        return [images]


class FoundRegions:
    def __init__(self, outputs, boxes):
        self.outputs, self.boxes = outputs, boxes

    def __call__(self, *_):
        return self.outputs

    def refine(self, output, sizes):
        return [self.boxes] if output == self.outputs[1] else None


def test_scaledet_scores_and_boxes_of_predictions():
    """score = sqrt(mean over stages of sigmoid(c / tau) * objectness).

    Boxes are in pixels of the original image.
    """
    logits, objectness = torch.randn(2, 3, 2), torch.tensor([0.9, 0.4, 0.2])
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 32]])
    picture = replace(sample("a", [], []), original_size=(128, 192))  # the model saw 64 x 64
    classes = LabelSpace([Vocabulary("a", ("cat", "dog"), text=torch.zeros(2, 6))])
    model = TwoStages(logits, objectness, boxes)
    (found,) = scaledet.predict(model, collate([picture]), classes)
    expected = []
    for q, label in itertools.product(range(3), range(2)):
        p = (sigmoid(logits[0, q, label].item()) + sigmoid(logits[1, q, label].item())) / 2
        expected.append((math.sqrt(p * objectness[q].item()), label, q))
    expected.sort(reverse=True)
    assert found["scores"].tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-5)
    assert found["class_names"] == [classes.names[label] for _, label, _ in expected]
    assert torch.equal(
        found["boxes"],
        torch.stack([boxes[q] for _, _, q in expected]) * torch.tensor([3.0, 2, 3, 2]),
    )
    assert found["size"] == (128, 192)


def test_scaledet_pooled_level_by_the_size_of_the_box():
    features = [torch.full((2, 1, 1024 // s, 1024 // s), float(s)) for s in (8, 16, 32)]
    sides, strides = [5.0, 100, 223, 225, 447, 449, 1000], [8, 8, 8, 16, 16, 32, 32]
    boxes = torch.tensor([[1.0, 2, 1 + side, 2 + side] for side in sides])
    pooled = pool_rois(features, [8, 16, 32], [boxes, boxes[:2]], 7)
    assert pooled.shape == (9, 1, 7, 7)
    assert pooled[:, 0, 3, 3].tolist() == pytest.approx(strides + strides[:2])


def test_scaledet_pooled_values_are_those_of_the_pixels_below():
    """On a feature that holds the x of its cells' centres, a bin holds the x of its own centre."""
    ramp = (torch.arange(64.0) * 8 + 4).expand(1, 1, 64, 64)
    box = torch.tensor([[100.0, 90, 240, 230]])
    pooled = pool_rois([ramp], [8], [box], 7)
    assert pooled[0, 0, 0].tolist() == pytest.approx([100 + 20 * i + 10 for i in range(7)])


# -- sampling --------------------------------------------------------------------------------------


def random_dataset(name: str, images: int, classes: int, rng) -> Dataset:
    """Skewed classes, some annotations ignored, the first image empty."""
    image_of = rng.integers(1, images, 4 * images)
    labels = np.minimum(rng.geometric(0.35, len(image_of)) - 1, classes - 1)
    boxes = np.tile([0.0, 0, 9, 9], (len(image_of), 1))
    index = Index.build(
        "x.json",
        [f"{i}.jpg" for i in range(images)],
        range(images),
        np.full((images, 2), 9),
        image_of,
        boxes,
        labels,
        areas=np.full(len(labels), 81.0),
        ignore=rng.random(len(labels)) < 0.2,
    )
    return Dataset(name, Vocabulary(name, tuple(f"{name}{c}" for c in range(classes))), index, None)


def test_scaledet_repeat_factors_over_the_union():
    rng = np.random.default_rng(0)
    datasets = [random_dataset("a", 40, 12, rng), random_dataset("b", 25, 9, rng)]
    space = LabelSpace([d.vocabulary for d in datasets])
    threshold, images = 0.3, []
    for dataset in datasets:
        offset = space.scope(dataset.name).start
        for i in range(len(dataset)):
            rows = range(dataset.index.offsets[i], dataset.index.offsets[i + 1])
            images.append(
                {offset + int(dataset.index.labels[r]) for r in rows if not dataset.index.ignore[r]}
            )
    expected = []
    for present in images:
        fractions = [sum(c in other for other in images) / len(images) for c in present]
        expected.append(max([1.0] + [math.sqrt(threshold / f) for f in fractions]))
    factors = repeat_factors(datasets, threshold)
    assert factors.tolist() == pytest.approx(expected)
    assert expected[0] == 1 and len(set(expected)) > 5


def take(count: int, *args) -> list:
    return list(itertools.islice(RepeatFactorSampler(*args), count))


def test_scaledet_sampler_repeats_each_image_as_often_as_its_factor():
    factors = np.array([1.0, 1.3, 2.5, 4.0, 1.9])
    sampler = RepeatFactorSampler(factors, 0)
    counts = np.stack([np.bincount(sampler.epoch(e), minlength=5) for e in range(2000)])
    assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
    assert np.abs(counts.mean(0) - factors).max() < 0.05
    assert (
        sampler.epoch(0).tolist()
        != sampler.epoch(1).tolist()
        != RepeatFactorSampler(factors, 1).epoch(1).tolist()
    )
    stream = [row for row, _ in take(len(sampler.epoch(0)) + len(sampler.epoch(1)), factors, 0)]
    assert stream == [*sampler.epoch(0).tolist(), *sampler.epoch(1).tolist()]


def test_scaledet_sampler_shares_one_stream_among_ranks_and_resumes_it():
    factors = np.random.default_rng(0).uniform(1, 3, 37)
    whole = take(600, factors, 5)
    assert [position for _, position in whole] == list(range(600))
    for world in (2, 3):
        for rank in range(world):
            assert take(200, factors, 5, 0, rank, world) == whole[rank : 200 * world : world]
    for start in (6, 72, 300):  # within the first epoch and beyond it
        assert take(90, factors, 5, start) == whole[start : start + 90]
        assert take(30, factors, 5, start, 1, 3) == whole[start + 1 : start + 90 : 3]


# -- the whole model -------------------------------------------------------------------------------


def sample(dataset: str, boxes: list, labels: list, side: int = 64) -> Sample:
    image = torch.randint(256, (3, side, side), dtype=torch.uint8)
    boxes, labels = (
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.long),
    )
    return Sample(image, dataset, "boxes", 0, 0, (side, side), boxes, labels)


@pytest.fixture(scope="module")
def space() -> LabelSpace:
    vocabularies = [Vocabulary("a", ("cat", "car")), Vocabulary("b", ("Cat", "sofa", "fox"))]
    return scaledet.build_label_space(SMALL, vocabularies)


def train_losses(model, samples, space) -> tuple[list[StageOutput], dict]:
    batch = collate(samples)
    targets = scaledet.prepare_targets(batch, space)
    outputs = model.train()(batch.images, batch.sizes, targets, space.text)
    stages, predictions, losses = outputs
    for stage, prediction in zip(stages, predictions):
        assert prediction.cosine().shape == prediction.logits().shape == (len(stage.hidden), 5)
    tables = LabelTables.of(model.args, space.text, torch.ones(len(space)))
    return stages, scaledet.compute_losses(model.args, stages, predictions, losses, targets, tables)


def check_gradients_reach_everything(model, losses) -> None:
    """Every parameter needs one, if zero: DistributedDataParallel waits for it."""
    assert all(value.isfinite() for value in losses.values())
    losses["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("objectness", [-4.6, -20.0], ids=["with proposals", "without a proposal"])
def test_scaledet_batch_without_objects(space, objectness):
    model = Model(replace(SMALL, cls_bias=-4.6), space, pretrained=False)
    nn.init.constant_(model.centernet.centernet_head.agn_hm.bias, objectness)
    stages, losses = train_losses(model, [sample("a", [], []), sample("b", [], [])], space)
    assert (len(stages[0].hidden) > 0) == (objectness > -10)
    for name in (
        "loss_soft_stage0",
        "loss_box_reg_stage1",
        "loss_centernet_pos",
        "loss_centernet_loc",
    ):
        assert losses[name] == 0
    check_gradients_reach_everything(model, losses)
    (found,) = scaledet.predict(model, collate([sample("a", [], [])]), space)
    assert len(found["boxes"]) == len(found["scores"]) == len(found["class_names"])


def test_scaledet_image_whose_crop_left_no_boxes_beside_one_with_boxes(space):
    far = sample("b", [[250, 250, 255, 255]], [1], side=256)
    cropped = next(
        s for s in (LargeScaleJitter(64, (1.9, 2.0))(far) for _ in range(50)) if len(s.boxes) == 0
    )
    seen = sample("a", [[8, 8, 40, 40], [30, 20, 60, 62]], [1, 0])
    model = Model(SMALL, space, pretrained=False)
    stages, losses = train_losses(model, [cropped, seen], space)
    background, mixed = (t.labels for t in stages[0].targets)
    assert (background == -1).all() and len(background) > 0 and {0, 1} <= set(mixed.tolist())
    assert losses["loss_soft_stage0"] > 0 and losses["loss_centernet_loc"] > 0
    check_gradients_reach_everything(model, losses)


def test_scaledet_other_classes_change_the_width_of_the_scores_alone(space):
    model = Model(SMALL, space, pretrained=False).eval()
    parameters = {name: p.clone() for name, p in model.state_dict().items()}
    batch = collate([sample("a", [], [])])
    rows = torch.cat([space.text[3:4], unit_rows(6, space.width)])
    other = LabelSpace([Vocabulary("c", ("sofa", *"abcdef"), text=rows)])
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        (boxes,), (before,) = model.detect(features, batch.sizes, space.text)
        (same,), (after,) = model.detect(features, batch.sizes, other.text)
    assert torch.equal(boxes, same) and parameters.keys() == model.state_dict().keys()
    assert all(torch.equal(p, parameters[name]) for name, p in model.state_dict().items())
    assert before.shape == (len(boxes), 5) and after.shape == (len(boxes), 7)
    torch.testing.assert_close(after[:, 0], before[:, 3])
    narrow = LabelSpace(list(space.vocabularies.values()), lambda names, dataset: unit_rows(3, 7))
    with pytest.raises(InputError, match=f"7 dimensions, this model needs {space.width}"):
        narrow.swap("x, y, z")


def test_scaledet_later_stages_see_the_refined_boxes_without_gradient(space):
    """Decoded with the weights of their stage, clipped to the image, without the empty ones."""
    model = Model(SMALL, space, pretrained=False)
    for stage in model.cascade.stages:
        nn.init.normal_(stage.bbox_pred[2].weight, std=10)
    outputs, _ = train_losses(model, [sample("a", [[8, 8, 40, 40]], [1])], space)
    for k, weights in enumerate([(10, 10, 5, 5), (20, 20, 10, 10)]):
        boxes = decode_boxes(outputs[k].boxes[0], outputs[k].deltas, weights).clamp(0, 64)
        kept = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
        assert k > 0 or 0 < len(kept) < len(boxes)
        torch.testing.assert_close(outputs[k + 1].boxes[0], kept.detach())
        assert not outputs[k + 1].boxes[0].requires_grad


def random_features():
    return [torch.randn(1, 64, s, s, requires_grad=True) for s in (8, 4, 2)]


def test_scaledet_each_stage_asks_for_more_overlap(space):
    model = Model(SMALL, space, pretrained=False)
    for stage in model.cascade.stages:
        nn.init.zeros_(stage.bbox_pred[2].weight)  # boxes stay where they are
    boxes = torch.tensor([[0.0, 0, 40, 22], [0, 0, 40, 26], [0, 0, 40, 30]])  # IoU 0.55, 0.65, 0.75
    truth = Targets(torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([3]))
    outputs = model.cascade(random_features(), [boxes], [(64, 64)], [truth], 16)
    found = [
        {int(box[3]) for box, label in zip(o.boxes[0], o.targets[0].labels) if label == 3}
        for o in outputs
    ]
    assert found == [{26, 30, 40}, {30, 40}, {40}]
    assert all(len(o.boxes[0]) == 4 for o in outputs)


def test_scaledet_regions_are_pooled_from_three_levels(space, monkeypatch):
    model, seen = Model(SMALL, space, pretrained=False).eval(), []

    def spy(features, strides, *rest):
        seen.append(([tuple(f.shape) for f in features], list(strides)))
        return pool_rois(features, strides, *rest)

    monkeypatch.setattr(common.cascade, "pool_rois", spy)
    batch = collate([sample("a", [], [])])
    model.detect(model.extract(batch.images, batch.sizes), batch.sizes, space.text)
    MaskHead(64)(
        random_features() + [torch.zeros(1, 64, 1, 1)] * 2, [torch.tensor([[3.0, 3, 40, 50]])]
    )
    assert seen == [([(1, 64, 8, 8), (1, 64, 4, 4), (1, 64, 2, 2)], [8, 16, 32])] * 4


def test_scaledet_stages_share_the_gradient_of_the_features(space):
    model = Model(SMALL, space, pretrained=False)
    features = random_features()
    boxes = [torch.tensor([[3.0, 3, 40, 50]])]
    weight = torch.randn(1, len(space))
    (first, *_) = model.cascade(features, boxes, [(64, 64)], None, 16)
    (model.classifiers[0](first.hidden, space.text).cosine() * weight).sum().backward()
    pooled = pool_rois([f.detach().requires_grad_() for f in features], [8, 16, 32], boxes, 7)
    hidden, _ = model.cascade.stages[0](pooled)
    (gradient,) = torch.autograd.grad(
        (model.classifiers[0](hidden, space.text).cosine() * weight).sum(), pooled
    )
    assert float(features[0].grad.sum()) == pytest.approx(
        float(gradient.sum()) / 3, rel=1e-3, abs=1e-5
    )


def test_scaledet_settings_of_centernet2(space):
    """Constants of facebookresearch/Detic:configs/Base-C2_L_R5021k_640b64_4x.yaml."""
    model = Model(SMALL, space, pretrained=False)
    assert model.cascade.ious == (0.6, 0.7, 0.8)
    assert model.cascade.box_weights == ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
    assert model.centernet.strides == [8, 16, 32, 64, 128]
    assert (model.centernet.pre_nms, model.centernet.post_nms) == ((4000, 1000), (2000, 256))
    assert (Args.tau, Args.lam, Args.rois_per_image, Args.repeat_threshold) == (
        0.02,
        1.0,
        512,
        0.001,
    )
    assert list(model.centernet.size_ranges) == SOI
    head = model.centernet.centernet_head
    assert (head.bbox_pred.bias == 8).all() and head.agn_hm.bias.item() == pytest.approx(
        -math.log(99)
    )


# -- CenterNet -------------------------------------------------------------------------------------

STRIDES = [8, 16, 32, 64, 128]
SOI = [(0, 80), (64, 160), (128, 320), (256, 640), (512, 1e7)]
BOXES = [
    [10, 20, 110, 120],
    [60, 70, 100, 95],
    [0, 0, 250, 240],
    [64, 64, 72, 200],
    [33, 41, 36, 43],
    [8, 8, 24, 24],
]


def centernet(pre_nms=(4000, 1000), post_nms=(2000, 256), side=256):
    net = CenterNet(32, STRIDES, pre_nms, post_nms)
    return net, Grid.of([torch.zeros(1, 1, -(-side // s), -(-side // s)) for s in STRIDES], STRIDES)


def naive_locations(side=256):
    """(level, stride, x, y) of every location."""
    for level, stride in enumerate(STRIDES):
        cells = -(-side // stride)
        for row, column in itertools.product(range(cells), range(cells)):
            yield level, stride, column * stride + stride // 2, row * stride + stride // 2


def naive_targets(boxes: list) -> tuple[list, list, list]:
    heatmap, distances, centres = [], [], []
    delta = (1 - 0.8) / (1 + 0.8)
    for m, (level, stride, x, y) in enumerate(naive_locations()):
        heat, best, chosen = 0.0, math.inf, None
        for x1, y1, x2, y2 in boxes:
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            columns, rows = (
                x // stride - cx // stride,
                y // stride - cy // stride,
            )  # cells to the centre's
            d2 = 0 if columns == rows == 0 else (x - cx) ** 2 + (y - cy) ** 2
            weighted = d2 / max(2 * delta**2 * (x2 - x1) * (y2 - y1), 4**2)
            heat = max(heat, math.exp(-weighted))
            low, high = SOI[level]
            assigned = low <= math.hypot(x2 - x1, y2 - y1) / 2 <= high
            if assigned and columns == rows == 0:
                centres.append(m)
            inside = x1 < x < x2 and y1 < y < y2
            if assigned and inside and abs(columns) <= 1 and abs(rows) <= 1 and weighted < best:
                best, chosen = (
                    weighted,
                    [(x - x1) / stride, (y - y1) / stride, (x2 - x) / stride, (y2 - y) / stride],
                )
        heatmap.append(heat if heat >= 1e-4 else 0.0)
        distances.append(chosen)
    return heatmap, distances, centres


def test_scaledet_centernet_targets():
    net, grid = centernet()
    heatmap, distances, centres = naive_targets(BOXES)
    got_heatmap, got_distances, centred = net.targets(
        grid, torch.tensor(BOXES, dtype=torch.float32)
    )
    assert grid.points.tolist() == [[x, y] for _, _, x, y in naive_locations()]
    torch.testing.assert_close(got_heatmap, torch.tensor(heatmap), rtol=1e-4, atol=1e-6)
    assert centred.tolist() == [centres.count(m) for m in range(len(centred))]
    for got, expected in zip(got_distances.tolist(), distances):
        assert min(got) < 0 if expected is None else got == pytest.approx(expected)
    _, _, centred = net.targets(grid, torch.tensor([[10.0, 20, 110, 120]]))
    assert grid.levels[centred > 0].tolist() == [
        0,
        1,
    ]  # half its diagonal, 71 pixels, lies in two ranges


def test_scaledet_centernet_ranges_are_closed():
    net, grid = centernet()
    net.ranges = torch.tensor([(0, 80), (80, 160), (160, 161), (161, 162), (162, 163)])
    _, _, centred = net.targets(grid, torch.tensor([[10.0, 20, 106, 148]]))
    assert grid.levels[centred > 0].tolist() == [0, 1]  # half of its diagonal is 80 pixels


def naive_giou(pred: list, target: list) -> float:
    area = lambda d: (d[0] + d[2]) * (d[1] + d[3])  # noqa: E731
    shared = area([min(p, t) for p, t in zip(pred, target)])
    hull, union = (
        area([max(p, t) for p, t in zip(pred, target)]),
        area(pred) + area(target) - shared,
    )
    return (shared + 1) / (union + 1) - (hull - union) / hull


def test_scaledet_centernet_losses():
    net, grid = centernet()
    images = [BOXES, [], BOXES[:1]]
    count = len(grid.points)
    logits, ltrb = torch.randn(3, count) * 3, torch.rand(3, count, 4) * 6
    logits[0, :3] = torch.tensor([30.0, -30, 1.75])  # both ends of the clamp; just above 0.85
    pos = neg = loc = positives = regressed = 0
    for i, boxes in enumerate(images):
        heatmap, distances, centres = naive_targets(boxes)
        p = [min(max(sigmoid(z), 1e-4), 1 - 1e-4) for z in logits[i].tolist()]
        positives += len(centres)
        pos += sum(-math.log(p[m]) * (1 - p[m]) ** 2 for m in centres)
        neg += sum(-math.log(1 - q) * q**2 * (1 - h) ** 4 for q, h in zip(p, heatmap) if q < 0.85)
        for d, target in zip(ltrb[i].tolist(), distances):
            regressed += target is not None
            loc += 0 if target is None else 1 - naive_giou(d, target)
    losses = net.losses(
        grid, logits, ltrb, [torch.tensor(b, dtype=torch.float32).view(-1, 4) for b in images]
    )
    assert losses["loss_centernet_pos"].item() == pytest.approx(
        0.5 * 0.25 * pos / positives, rel=1e-4
    )
    assert losses["loss_centernet_neg"].item() == pytest.approx(
        0.5 * 0.75 * neg / positives, rel=1e-4
    )
    assert losses["loss_centernet_loc"].item() == pytest.approx(loc / regressed, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_scaledet_centernet_proposals(training):
    pre_nms, post_nms = (60, 40), (50, 300)
    net, grid = centernet(pre_nms, post_nms)
    net.train(training)
    p, ltrb = torch.rand(len(grid.points)) * 0.5, torch.rand(len(grid.points), 4) * 2
    p[grid.levels == 2] *= 3e-4  # most of a level below the threshold, 1e-4
    ltrb[0], p[0] = 0, 0.99  # an empty box is given 0.01 pixels
    ltrb[1:5] = torch.tensor([1.5, 0.5, 0.5, 0.5])  # from x = 0 to 16, y = 0 to 8
    ltrb[2:5, 0] += torch.arange(1, 4)  # the same box seen from the next locations
    ltrb[2:5, 2] -= torch.arange(1, 4)
    ltrb[3:5, 2] -= torch.tensor([0.4, 0.14])  # of 0.8 and 0.93 of its width
    p[1:5] = torch.tensor([0.98, 0.97, 0.96, 0.95])
    candidates = []
    for level in range(len(STRIDES)):
        rows = [m for m, found in enumerate(naive_locations()) if found[0] == level and p[m] > 1e-4]
        candidates += sorted(rows, key=lambda m: -p[m])[: pre_nms[not training]]
    locations, boxes = list(naive_locations()), {}
    for m in candidates:
        _, s, x, y = locations[m]
        left, top, right, bottom = ltrb[m].tolist()
        x1, y1 = x - left * s, y - top * s
        boxes[m] = [x1, y1, max(x + right * s, x1 + 0.01), max(y + bottom * s, y1 + 0.01)]
    kept = []
    for m in sorted(candidates, key=lambda m: -p[m]):
        if all(iou(boxes[m], boxes[other]) <= 0.9 for other in kept):
            kept.append(m)
    kept = kept[: post_nms[not training]]
    few = torch.zeros_like(p)
    few[:3] = 0.5
    ((got_boxes, got_scores), (other_boxes, _)) = net.proposals(
        grid, torch.stack([p, few]), torch.stack([ltrb, ltrb])
    )
    assert len(other_boxes) == 2  # what passes in one image does not depend on the others
    assert kept[:3] == [0, 1, 3] and not {2, 4} & set(kept)
    assert training or p[kept[-1]] < 2e-4
    assert got_scores.tolist() == pytest.approx([math.sqrt(p[m]) for m in kept], rel=1e-5)
    torch.testing.assert_close(
        got_boxes, torch.tensor([boxes[m] for m in kept]), rtol=1e-4, atol=1e-3
    )


def test_a_group_of_one_number_becomes_the_bias():
    norm = GroupNorm(32, 32)
    nn.init.normal_(norm.bias)
    alone = norm(torch.randn(1, 32, 1, 1)).flatten()
    assert torch.allclose(alone, norm.bias, atol=1e-3)
    x = torch.randn(2, 32, 3, 4)
    assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))


def test_scaledet_centernet_head_layer_by_layer():
    """4 x [conv, GroupNorm(32), ReLU], shared by the levels.

    Distances are scaled per level, then rectified.
    """
    torch.manual_seed(0)
    head = CenterNetHead(64, num_levels=2)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    features = [torch.randn(2, 64, 4, 5), torch.randn(2, 64, 2, 3)]
    logits, ltrb = [], []
    for level, x in enumerate(features):
        for i in range(4):
            conv, norm = head.bbox_tower[3 * i], head.bbox_tower[3 * i + 1]
            x = F.conv2d(x, conv.weight, conv.bias, padding=1)
            x = F.group_norm(x, 32, norm.weight, norm.bias).clamp(min=0)
        logits.append(F.conv2d(x, head.agn_hm.weight, head.agn_hm.bias, padding=1).reshape(2, -1))
        distances = (
            F.conv2d(x, head.bbox_pred.weight, head.bbox_pred.bias, padding=1)
            * head.scales[level].scale
        )
        ltrb.append(distances.clamp(min=0).permute(0, 2, 3, 1).reshape(2, -1, 4))
    ours = head(features)
    assert torch.allclose(ours[0], torch.cat(logits, 1), atol=1e-5)
    assert torch.allclose(ours[1], torch.cat(ltrb, 1), atol=1e-5)
    assert (ours[1] == 0).any() and (ours[1] > 0).any()
