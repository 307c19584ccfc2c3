"""UniDetector: its equations against loops over floats, its invariants, and the command line from end to end."""

import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAST, REPO
from PIL import Image
from safetensors.torch import load_file
from test_equations import bce, iou, random_boxes, unit_rows
from torch import nn

import common.clip_resnet
import unidetector
from common.batch import Batch, Sample, collate
from common.boxes import paired_iou, soft_nms
from common.clip_resnet import CLIPResNetC4, load_by_prefix, read_tensors
from common.errors import InputError
from common.labels import Vocabulary
from common.matcher import match_anchors
from common.oln import RPN, centreness, decode_tblr, loss_roi_box, loss_roi_cls, loss_roi_iou
from common.prior import count_classes, read_prior
from common.proposals import fingerprint, take_proposals, with_proposals
from common.training import stepped_learning_rate
from common.transforms import ResizeShortestRange

SMALL = {**dict.fromkeys(("backbone", "classifier_backbone"), "resnet18"), "text_encoder": "minilm", "amp": "off"}
SMALL |= {"channels": 32, "fc_dim": 32, "rois_per_image": 16, "rpn_proposals": 20, "tau": 0.05}
QUICK = [arg for arg in FAST if arg not in ("--cls-bias", "-4.6")]
QUICK += ["--classifier-backbone", "tf_efficientnet_lite0", "--classifier-steps", "4", "--classifier-lr", "1e-4"]
QUICK += ["--steps", "4", "--rpn-proposals", "20", "--tau", "0.05"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- equations ---------------------------------------------------------------------------------------------------------


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
        assert fused[i, j].item() == pytest.approx(p[i, j].item() ** 0.3 * eta[i].item() ** 0.7, rel=1e-5)


def test_unidetector_classification_loss():
    logits, labels = torch.randn(5, 4) * 3, torch.tensor([2, -1, 0, -1, 3])
    chosen = torch.tensor([True, False, True, True])
    expected = sum(
        bce(logits[r, j].item(), labels[r] == j) / 5 for r, j in itertools.product(range(5), range(4)) if chosen[j]
    )
    assert unidetector.loss_classification(logits, labels, chosen).item() == pytest.approx(expected, rel=1e-5)
    assert unidetector.loss_classification(logits[:0], labels[:0], chosen) == 0


@pytest.mark.parametrize("labels", [[3, 3, -1, 7], [3, 7], [-1, -1]])
def test_unidetector_chosen_classes(labels):
    labels, count = torch.tensor(labels), torch.ones(60)
    count[[5, 9]] = 0
    seen = torch.zeros(60)
    for _ in range(200):
        chosen = unidetector.sample_classes(labels, count)
        assert chosen[labels[labels >= 0]].all() and not chosen[[5, 9]].any()
        # background counts as one of the 50, whether it is present or drawn
        assert int(chosen.sum()) in ({49} if -1 in labels else {49, 50})
        seen += chosen
    rest = [j for j in range(60) if count[j] and j not in labels]
    assert (seen[rest] > 0).all() and seen[rest].std() < 0.15 * seen[rest].mean()  # uniform


def test_unidetector_chosen_classes_of_a_small_vocabulary():
    labels, count = torch.tensor([0, -1]), torch.tensor([4, 0, 2])
    assert unidetector.sample_classes(labels, count).tolist() == [True, False, True]
    assert unidetector.sample_classes(torch.tensor([1]), count).tolist() == [True, True, True]  # it is there after all


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
            wanted = [10 * ((u1 + u2) / 2 - (x1 + x2) / 2) / w, 10 * ((v1 + v2) / 2 - (y1 + y2) / 2) / h]
            wanted += [5 * math.log((u2 - u1) / w), 5 * math.log((v2 - v1) / h)]
            l1 += sum(abs(d - t) for d, t in zip(deltas[r].tolist(), wanted)) / 5
            rating += abs(1 / (1 + math.exp(-quality[r].item())) - iou(boxes[r].tolist(), gt_boxes[r].tolist())) / 5
    assert loss_roi_cls(logits, labels).item() == pytest.approx(cross_entropy, rel=1e-5)
    assert loss_roi_box(deltas, labels, boxes, gt_boxes).item() == pytest.approx(l1, rel=1e-4)
    assert loss_roi_iou(quality, labels, boxes, gt_boxes).item() == pytest.approx(rating, rel=1e-4)


def test_oln_boxes_and_centreness():
    anchors = torch.tensor([[0.0, 0, 32, 32], [16, 0, 48, 32]])
    boxes = decode_tblr(anchors, torch.tensor([[0.25, 0.5, 0.125, 1.0], [0, 0, 0, 0]]))  # top, bottom, left, right
    assert boxes.tolist() == [[12, 8, 48, 32], [32, 16, 32, 16]]
    expected = math.sqrt(min(8, 16) / max(8, 16) * min(4, 32) / max(4, 32))
    assert centreness(anchors[:1], boxes[:1]).item() == pytest.approx(expected)
    assert centreness(anchors[:1], torch.tensor([[20.0, 0, 40, 40]])).item() == 0  # the centre is outside


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


def test_rpn_without_boxes_scores_background_only():
    rpn = RPN(8)
    features = [torch.randn(1, 8, 32 // 2**i, 32 // 2**i).requires_grad_() for i in range(5)]
    proposals, losses = rpn(features, [(128, 128)], [torch.zeros(0, 4)])
    assert losses["loss_rpn_box"] == 0 and losses["loss_rpn_objectness"] > 0
    sum(losses.values()).backward()
    assert all(f.grad is None or f.grad.isfinite().all() for f in features)
    boxes, scores = proposals[0]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 128 and len(boxes) == len(scores)


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
    rates = [stepped_learning_rate(step, 1.0, 1200, 50, 0.001) for step in (0, 25, 50, 799, 800, 1099, 1100)]
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
        assert out.size == (short, min(2 * short, 133)) and 40 <= short <= 67  # 80 * 1333 / 800 = 133
        assert [x1, y1, x2, y2] == pytest.approx([150, 20, 190, 60] if flipped else [10, 20, 50, 60], abs=2)
        sides.add(short)
        flips.add(flipped)
    assert len(sides) > 15 and flips == {True, False}


# -- label spaces ------------------------------------------------------------------------------------------------------


def two_datasets():
    return [Vocabulary("a", ("cat", "dog", "sofa")), Vocabulary("b", ("Dog", "car"))]


def batch_of(*datasets: str, boxes: int = 2) -> Batch:
    samples = []
    for i, dataset in enumerate(datasets):
        image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
        labels = torch.arange(boxes) % 2
        samples.append(Sample(image, dataset, "boxes", i, i, (96, 96), random_boxes(boxes, 90), labels))
    return collate(samples)


def small_model(structure: str = "partitioned", vocabularies=None):
    args = unidetector.Args(**SMALL, structure=structure)
    label_space, text = unidetector.build_label_space(args, vocabularies or two_datasets())
    return unidetector.Model(args, text, len(label_space.datasets)), label_space


def train_step(model, label_space, batch, owners=None):
    """Outputs and losses of the classifiers on random proposals."""
    proposals = [random_boxes(12, 90) for _ in batch.samples]
    targets = unidetector.assign_targets(batch, label_space)
    outputs, losses = model(batch.images, batch.sizes, targets, proposals, owners or [0] * len(batch))
    outputs.logits.retain_grad()
    return outputs, unidetector.compute_losses(outputs, losses, torch.ones(len(label_space)))


def test_label_spaces_of_the_structures():
    for structure, names in {"partitioned": 5, "separate": 5, "unified": 4}.items():
        label_space, text = unidetector.build_label_space(
            unidetector.Args(**SMALL, structure=structure), two_datasets()
        )
        assert len(label_space) == len(text) == names
        targets = unidetector.assign_targets(batch_of("a", "b"), label_space)
        dog = {"unified": 1}.get(structure, 3)
        assert targets[1].labels.tolist() == [dog, {"unified": 3}.get(structure, 4)]
        assert targets[1].scope == ((0, 4) if structure == "unified" else (3, 5))


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
    assert all(p.grad is None for p in first.parameters()) and second.fc_reg.weight.grad.abs().sum() > 0
    torch.manual_seed(2)
    mixed, _ = train_step(model, label_space, batch_of("a", "b", "a"), [0, 1, 0])
    assert len(mixed.logits) == sum(len(b) for b in mixed.boxes) == len(mixed.deltas)


def test_regions_stay_in_the_order_of_their_images():
    model, label_space = small_model("separate")
    model.classifiers[1].load_state_dict(model.classifiers[0].state_dict())
    results = []
    for owners in ([0, 0, 0], [1, 0, 1]):
        torch.manual_seed(3)
        outputs, _ = train_step(model.eval(), label_space, batch_of("a", "b", "a"), owners)
        results.append(outputs.logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_adding_classes_leaves_the_others_alone():
    model, _ = small_model()
    regions = {"boxes": random_boxes(1), "embeddings": unit_rows(1, 384), "eta": torch.tensor([0.9]), "size": (9, 9)}
    text = unit_rows(6, 384)
    scores = []
    for classes in (4, 6):
        model.set_vocabulary(text[:classes])
        found = unidetector.classify(model, regions, Vocabulary("v", tuple("abcdef"[:classes])))
        scores.append(dict(zip(found["class_names"], found["scores"].tolist())))
    assert scores[0].items() <= scores[1].items() and len(scores[1]) == 6


def test_an_image_without_boxes_or_proposals():
    model, label_space = small_model()
    batch = batch_of("a", "b", boxes=0)
    targets = unidetector.assign_targets(batch, label_space)
    none = [torch.zeros(0, 4), random_boxes(5, 90)]
    outputs, losses = model(batch.images, batch.sizes, targets, none, [0, 0])
    losses = unidetector.compute_losses(outputs, losses, torch.ones(5))
    assert losses["loss_box"] == 0 and losses["loss_classification"] > 0 and losses["loss"].isfinite()
    _, losses = model(batch.images, batch.sizes, targets)
    losses = unidetector.compute_losses(None, losses, torch.ones(5))
    assert losses["loss"].isfinite() and losses["loss_roi_box"] == losses["loss_rpn_box"] == 0


def test_what_is_frozen():
    model, _ = small_model()
    body = model.localizer.backbone
    body.frozen_norm.fill_(True)
    model.localizer.requires_grad_(True).train()
    names = {name.split(".")[0] for name, p in body.body.named_parameters() if p.requires_grad}
    assert names == {"layer2", "layer3", "layer4"}
    assert not any(m.training for m in body.modules() if isinstance(m, nn.BatchNorm2d))


# -- CLIP's ResNet -----------------------------------------------------------------------------------------------------


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


LAYOUTS = {
    "open_clip": {"": "visual."},
    "RegionCLIP": {"": "backbone."},
    "UniDetector": {"": "backbone.", "layer4": "roi_head.shared_head.", "attnpool": "roi_head.bbox_head."},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_weights_load_from_every_layout(layout, small_clip, tmp_path, caplog):
    source, target = small_clip(), small_clip()
    own = {k: t for k, t in source.state_dict().items() if k != "frozen_norm"}
    prefixes = LAYOUTS[layout]
    tensors = {prefixes.get(k.split(".")[0], prefixes[""]) + k: t for k, t in own.items()}
    tensors |= {"lang_encoder.positional_embedding": torch.zeros(2), "roi_head.bbox_head.fc_reg.weight": torch.zeros(3)}
    path = tmp_path / "weights.pth"
    torch.save({"model" if layout == "RegionCLIP" else "state_dict": tensors, "meta": {"epoch": 12}}, path)
    with caplog.at_level("INFO", "concord"):
        assert common.clip_resnet.load_pretrained(target, f"RN50/{path}")
    assert all(torch.equal(t, own[k]) for k, t in target.state_dict().items() if k != "frozen_norm")
    assert "text tower" in caplog.text and "box head of another label space" in caplog.text


def test_clip_weights_that_do_not_fit(small_clip, tmp_path):
    model, state = small_clip(), {k: t for k, t in small_clip().state_dict().items() if k != "frozen_norm"}
    lacking = {k: t for k, t in state.items() if k != "attnpool.c_proj.bias"}
    for tensors, message in [
        (lacking, "lacks 'attnpool.c_proj.bias'"),
        (state | {"conv1.weight": torch.zeros(3)}, r"'conv1.weight' has the shape \[3\]"),
        (state | {"layer3.5.bn1.bias": torch.zeros(3)}, "'layer3.5.bn1.bias' is not of this CLIP ResNet"),
    ]:
        with pytest.raises(InputError, match=message):
            load_by_prefix(model, tensors, "weights.pth")
    script, code, broken = (tmp_path / f"{name}.pt" for name in ("script", "code", "broken"))
    torch.jit.script(nn.Linear(2, 2)).save(script)
    torch.save(SimpleNamespace(a=1), code)
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="TorchScript archive"):
        read_tensors(script)
    for path in (code, broken, tmp_path / "missing.pt"):
        with pytest.raises(InputError, match="cannot be read"):
            read_tensors(path)


def test_clip_frozen_parts(small_clip):
    model = small_clip()
    model.frozen_norm.fill_(True)
    model.train()
    learned = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {"layer2", "layer3", "layer4", "attnpool"}
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_clip_width_must_be_that_of_the_texts(small_clip):
    with pytest.raises(InputError, match="24 dimensions, the text encoder names in 384"):
        unidetector.Model(unidetector.Args(**SMALL | {"classifier_backbone": "RN50/openai"}), unit_rows(3, 384), 1)


# -- proposals and prior -----------------------------------------------------------------------------------------------


def test_proposals_are_kept_and_given_with_the_samples(tiny_root, tmp_path):
    from common.datasets import load_datasets

    [dataset] = load_datasets("coco", "train", str(tiny_root))
    boxes, calls = {}, []

    def locate(batch):
        sample = batch.samples[0]
        height, width = sample.original_size
        calls.append(sample.index)
        boxes[sample.index] = random_boxes(1 + sample.index % 3) / 200 * torch.tensor([width, height] * 2)
        return [{"boxes": boxes[sample.index], "size": (height, width)}]

    [extended] = with_proposals(locate, [dataset], ResizeShortestRange(96, 96), tmp_path, "key", 0)
    assert sorted(calls) == list(range(len(dataset))) and len(extended) == len(dataset)
    for i in range(len(dataset)):
        batch = collate([extended.load(i)])
        [proposals] = take_proposals(batch)
        torch.testing.assert_close(proposals, boxes[i], atol=0.01, rtol=0)
        plain = dataset.load(i)
        assert torch.equal(batch.samples[0].boxes, plain.boxes) and torch.equal(batch.samples[0].labels, plain.labels)
    with_proposals(locate, [dataset], None, tmp_path, "key", 0)
    assert len(calls) == len(dataset)  # a second call reads the file
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint(one, 1) == fingerprint(one, 1)
    assert len({fingerprint(one, 1), fingerprint(other, 1), fingerprint(one, 2)}) == 3


def test_prior_round_trip_and_bad_files(tmp_path):
    vocabulary, path = Vocabulary("a", ("cat", "Traffic Light", "dog")), tmp_path / "prior.json"
    counts = count_classes(
        vocabulary, {0: {"labels": torch.tensor([2, 2, 0])}, 1: {"labels": torch.zeros(0).long()}}, path
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
    ):
        path.write_text(content)
        with pytest.raises(InputError, match="cannot be read"):
            read_prior(str(path))


def test_set_vocabulary_of_another_width():
    model, _ = small_model()
    with pytest.raises(InputError, match="512 dimensions, this model needs 384"):
        model.set_vocabulary(unit_rows(3, 512))


# -- command line ------------------------------------------------------------------------------------------------------


def start(*args, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "unidetector.py", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory):
    """Run folder of both stages on two datasets, evaluated on one of them and on one never trained on."""
    folder = tmp_path_factory.mktemp("unidetector") / "run"
    data = ["--datasets", "coco,o365", "--eval-datasets", "coco,lineart", "--data-root", tiny_root]
    done = start(*data, *QUICK, "--output", folder, "--checkpoint-every", 2)
    assert done.returncode == 0, done.stderr
    return folder


def test_both_stages_leave_everything(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"weights.safetensors", "prior-coco.json", "prior-lineart.json", "predictions-lineart.jpg"} <= names
    assert sum(name.startswith("proposals-") for name in names) == 2
    results = json.loads((trained / "results.json").read_text())
    assert list(results) == [
        *["coco (proposals)", "coco (no calibration)", "coco"],
        *[f"lineart{note}" for note in (" (proposals)", " (no calibration)", "", " (shuffled text)")],
    ]
    assert list(results["coco (proposals)"]) == ["AR@10", "AR@100", "AR@1000"]
    assert {"AP", "AP50 known", "AP50 unknown"} <= results["lineart"].keys()
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 8 and {"loss_classification", "loss_box"} <= steps[-1].keys()


def test_one_image_with_the_prior_of_an_evaluation(trained, tmp_path):
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)).save(image)
    found = {}
    for gamma in (0.0, 0.6):
        out = tmp_path / str(gamma)
        prior = ["--prior", trained / "prior-coco.json", "--gamma", gamma]
        done = start("--predict", image, "--weights", trained, "--output", out, *prior)
        assert done.returncode == 0, done.stderr
        found[gamma] = json.loads((out / "predictions.json").read_text())
    names = json.loads((trained / "prior-coco.json").read_text())["names"]
    assert [c["name"] for c in found[0.6]["categories"]] == names
    assert found[0.0]["annotations"] != found[0.6]["annotations"]
    done = start(
        "--predict", image, "--weights", trained, "--prior", trained / "prior-coco.json", "--vocabulary", "zeppelin"
    )
    assert done.returncode == 2 and "another vocabulary: it lacks 'zeppelin'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_evaluation_with_a_given_prior_is_the_same(trained, tiny_root, tmp_path):
    data = ["--eval-only", "--weights", trained, "--eval-datasets", "coco", "--data-root", tiny_root, "--workers", 0]
    done = start(*data, "--prior", trained / "prior-coco.json", "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["coco"] == json.loads((trained / "results.json").read_text())["coco"]


@pytest.mark.parametrize("checkpoint", [4, 6])
def test_resume_ends_with_the_same_weights(checkpoint, trained, tiny_root, tmp_path):
    """Stopped between the stages or in the second one: every bit of the weights is that of the uninterrupted run."""
    folder, stop = tmp_path / "run", checkpoint + 1
    data = ["--datasets", "coco,o365", "--eval-datasets", "coco", "--data-root", tiny_root, "--checkpoint-every", 2]
    script = (
        "import sys, unidetector as u\n"
        "check = u.check_finite\n"
        f"u.check_finite = lambda losses, step: sys.exit(3) if step == {stop} else check(losses, step)\n"
        "u.main()"
    )
    command = [sys.executable, "-c", script, *map(str, data), *QUICK, "--output", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    done = start("--resume", folder)
    assert done.returncode == 0, done.stderr
    ours, whole = (load_file(path / "weights.safetensors") for path in (folder, trained))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)


@pytest.mark.parametrize("structure, sampler", [("unified", "class-aware"), ("separate", "repeat-factor")])
def test_classifier_stage_of_each_structure_and_sampler(structure, sampler, trained, tiny_root, tmp_path):
    data = [
        "--datasets",
        "coco,o365",
        "--eval-datasets",
        "coco",
        "--data-root",
        tiny_root,
        "--output",
        tmp_path / "run",
    ]
    stage = ["--stage", "classifier", "--weights", trained, "--structure", structure, "--sampler", sampler]
    done = start(*data, *QUICK, *stage)
    assert done.returncode == 0, done.stderr
    ours, source = (load_file(path / "weights.safetensors") for path in (tmp_path / "run", trained))
    frozen = [key for key in source if key.startswith("localizer.")]
    assert frozen and all(torch.equal(ours[key], source[key]) for key in frozen)
    heads = {key.split(".")[1] for key in ours if key.startswith("classifiers.")}
    assert heads == ({"0", "1"} if structure == "separate" else {"0"})
    done = start(
        "--eval-only", "--weights", tmp_path / "run", *data[2:6], "--workers", 0, "--output", tmp_path / "again"
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "again")]
    assert results[0] == results[1]


def test_localizer_stage_alone(tiny_root, tmp_path):
    data = ["--datasets", "coco", "--eval-datasets", "coco", "--data-root", tiny_root]
    done = start(*data, *QUICK, "--stage", "localizer", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["coco (proposals)"]
    assert not any(key.startswith("classifiers.") for key in load_file(tmp_path / "run" / "weights.safetensors"))
    done = start("--predict", "x.jpg", "--weights", tmp_path / "run")
    assert done.returncode == 2 and "hold a localizer alone" in done.stderr and done.stderr.count("\n") == 1


def test_two_ranks_train_both_stages(tiny_root, tmp_path):
    data = ["--datasets", "coco,o365", "--eval-datasets", "coco", "--data-root", tiny_root]
    steps = ["--steps", 1, "--classifier-steps", 1, "--structure", "separate"]
    done = start(*data, *QUICK, *steps, "--output", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "coco" in json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--datasets", "coco", "--stage", "classifier"], "--stage classifier needs --weights"),
        (["--datasets", "coco", "--gamma", "-1"], "--gamma -1.0 must be between 0"),
        (["--datasets", "coco", "--classifier-lr", "0"], "--classifier-lr 0.0 must be greater than 0"),
        (["--datasets", "coco", "--classifier-backbone", "RN7/openai"], "no CLIP ResNet 'RN7'"),
        (["--datasets", "coco", "--classifier-backbone", "RN50/nothing"], "no weights 'nothing' for RN50"),
        (
            ["--datasets", "coco", "--classifier-backbone", "missing.pth"],
            "missing.pth cannot be read: it does not exist",
        ),
        (["--datasets", "coco", "--classifier-backbone", "resnet5"], "resnet5 is not a timm model"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message, tiny_root, tmp_path):
    flags = [flag for pair in zip(*[iter(QUICK)] * 2) if pair[0] not in arguments for flag in pair]
    done = start(*flags, *arguments, "--data-root", tiny_root, "--output", tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_text_of_another_width(trained, tiny_root, tmp_path):
    np.save(tmp_path / "text.npy", np.eye(1, 512, dtype=np.float32))
    other = ["--text-encoder", tmp_path / "text.npy", "--weights", trained]
    done = start("--predict", "x.jpg", "--vocabulary", "cat", *other, "--output", tmp_path / "o")
    assert done.returncode == 2 and "text embeddings have 512 dimensions, this model needs 384" in done.stderr
    assert done.stderr.count("\n") == 1
