"""The category-extended detector against tensors recorded from the official implementation.

CONCORD_PARITY names the folder. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error.
"""

import pytest
import torch
from parity import (
    Recorded,
    case,
    check,
    check_sets,
    report,  # noqa: F401 (a fixture)
)
from torchvision.ops import clip_boxes_to_image

import category_extended as method
import common.boxes
from common import retinanet
from common.batch import Batch, Sample
from common.boxes import decode_boxes, encode_boxes, select_detections
from common.labels import LabelSpace, Vocabulary
from common.targets import Targets

# the official strategies, with their names here; pos_safeneg is left out
STRATEGIES = {
    "one.plain": "plain",
    "one.dataset_aware": "dataset_aware",
    "one.conflict_free": "conflict_free",
    "two.as_full": "plain",
    "two.pos_only": "conflict_free",
    "two.pos_weightedneg": "weighted",
}


def head_weights(tensors: dict, layers: int) -> dict:
    """The recorded weights of the head, under our names."""
    names = {"retina_cls": "cls_logits", "retina_reg": "box_deltas"}
    for i in range(layers):
        names[f"cls_convs.{i}.conv"] = f"cls_tower.{2 * i}"
        names[f"reg_convs.{i}.conv"] = f"box_tower.{2 * i}"
    kinds = ("weight", "bias")
    return {f"{n}.{kind}": tensors[f"head.{o}.{kind}"] for o, n in names.items() for kind in kinds}


def recorded_retinanet(monkeypatch):
    """(model, label space, recording) of the case `retinanet_base`; the backbone is recorded."""
    tensors, record = case("retinanet_base")
    config = record["config"]
    features = [tensors[key] for key in sorted(tensors) if key.startswith("features.")]
    monkeypatch.setattr(method, "STRIDES", config["strides"])
    monkeypatch.setattr(method, "Backbone", lambda *_, **__: Recorded(features))
    names = tuple(map(str, range(config["num_classes"])))
    label_space = LabelSpace([Vocabulary("any", names)], merge=True)
    args = method.Args(channels=config["channels"], amp="off")
    model = method.Model(args, label_space, pretrained=False)
    layers = config["stacked_convs"]
    model.head = retinanet.RetinaHead(config["channels"], config["num_classes"], layers)
    model.head.load_state_dict(head_weights(tensors, layers))
    return model, label_space, tensors, config


def test_anchors_and_head(monkeypatch):
    model, _, tensors, config = recorded_retinanet(monkeypatch)
    assert config["scales_per_octave"] == retinanet.SCALES_PER_OCTAVE
    assert config["octave_base_scale"] == retinanet.SCALE
    assert config["ratios"] == list(retinanet.RATIOS)
    levels = [key.partition(".")[2] for key in sorted(tensors) if key.startswith("anchors.")]
    sizes = config["image_sizes_hw"]
    logits, deltas, anchors, _ = model(torch.zeros(len(sizes), 3, 1, 1), sizes)
    for stride, level in zip(config["strides"], levels):
        assert torch.equal(retinanet.base_anchors(stride), tensors[f"base_anchors.{level}"])
    assert torch.equal(anchors, torch.cat([tensors[f"anchors.{level}"] for level in levels]))
    for name, ours in (("cls_map", logits), ("reg_map", deltas)):
        maps = [tensors[f"{name}.{level}"].permute(0, 2, 3, 1) for level in levels]
        flat = [m.reshape(len(m), -1, ours.shape[-1]) for m in maps]
        check(name, ours, torch.cat(flat, 1))


def test_box_codes():
    tensors, record = case("retinanet_base")
    padded = tuple(record["config"]["padded_hw"])
    code = {key.removeprefix("coder.xyxy."): tensor for key, tensor in tensors.items()}
    encoded = retinanet.encode_corners(code["gt"], code["anchors"])
    check("corners encoded", encoded, code["encoded"])
    decoded = retinanet.decode_corners(code["deltas"], code["anchors"])
    check("corners decoded", decoded, code["decoded"])
    check("corners clipped", clip_boxes_to_image(decoded, padded), code["decoded_clipped"])
    anchors, gt = tensors["coder.xywh.anchors"], tensors["coder.xywh.gt"]
    encoded = encode_boxes(anchors, gt, (1, 1, 1, 1))
    check("centres and sides encoded", encoded, tensors["coder.xywh.encoded"])
    check("centres and sides decoded", decode_boxes(anchors, encoded, (1, 1, 1, 1)), gt)


def test_focal_loss():
    tensors, _ = case("retinanet_base")
    logits = tensors["focal.logits"].clone().requires_grad_()
    labels = tensors["focal.labels"]
    labels = torch.where(labels == logits.shape[1], -1, labels)
    weight, one = torch.ones_like(logits), torch.ones(())
    loss = method.loss_classes(logits, labels, weight, one)
    loss.backward()
    check("focal loss", loss, tensors["focal.loss"].sum())
    check("focal gradient", logits.grad, tensors["focal.grad"], 1e-3)
    for row in range(len(labels)):
        rows = slice(row, row + 1)
        ours = method.loss_classes(logits[rows], labels[rows], weight[rows], one)
        check("focal loss of a row", ours, tensors["focal.loss"][row].sum())


def test_detections(monkeypatch):
    model, label_space, tensors, config = recorded_retinanet(monkeypatch)
    test = config["test"]

    best_of_levels = retinanet.best_of_levels

    def recorded_best(scores, counts, most):
        return best_of_levels(scores, counts, test["nms_pre"])

    def recorded_select(boxes, scores, one_class, threshold, limit):
        assert threshold == test["score_thr"]
        return select_detections(boxes, scores, one_class, threshold, test["max_per_img"])

    batched_nms = common.boxes.batched_nms
    monkeypatch.setattr(retinanet, "best_of_levels", recorded_best)
    monkeypatch.setattr(method, "select_detections", recorded_select)
    monkeypatch.setattr(
        common.boxes, "batched_nms", lambda *a: batched_nms(*a[:3], test["nms"]["iou_thr"])
    )
    sizes = [tuple(size) for size in config["image_sizes_hw"]]
    images = torch.zeros(len(sizes), 3, *config["padded_hw"], dtype=torch.uint8)
    samples = [
        Sample.unlabelled(image[:, :h, :w], "any", 0, 0) for image, (h, w) in zip(images, sizes)
    ]
    found = method.predict(model, Batch(images, sizes, samples), label_space)
    for i, detections in enumerate(found):
        ours = [detections[key] for key in ("boxes", "scores", "labels")]
        official = [tensors[f"xyxy.image{i}.{key}"] for key in ("boxes", "scores", "classes")]
        assert len(ours[0]) == len(official[0])
        check_sets("detections", ours, official, max(config["padded_hw"]))


def truth(tensors: dict, config: dict, image: int, variant: str, threshold: float) -> Targets:
    """The boxes of an image with a confidence above `threshold`; in round one the annotations."""
    confidences = tensors[f"image{image}.confidences"]
    kept = confidences == 1 if variant.startswith("one.") else confidences > threshold
    first, end = config["class_splits"]["AB".index(config["set_of_image"][image])]
    scope = torch.zeros(config["num_classes"], dtype=torch.bool)
    scope[first:end] = True
    boxes, labels = (tensors[f"image{image}.{name}"][kept] for name in ("boxes", "classes"))
    return Targets(boxes, labels, scope=scope)


@pytest.mark.parametrize("variant", STRATEGIES)
def test_losses(variant):
    tensors, record = case("catex_loss")
    config, result = record["config"], record["results"][variant]
    negatives = STRATEGIES[variant]
    maps = [torch.zeros(1, 1, *shape) for shape in config["level_shapes_hw"]]
    anchors = torch.cat(retinanet.grid_anchors(maps, config["strides"]))
    assert torch.equal(anchors, tensors["anchors"])
    sizes = config["image_sizes_hw"]
    inside = [retinanet.inside_image(maps, config["strides"], size) for size in sizes]
    targets = [truth(tensors, config, i, variant, result["norm_thre"]) for i in range(len(inside))]
    logits = tensors["cls_logits"].clone().requires_grad_()
    deltas = tensors["box_deltas"].clone().requires_grad_()
    normaliser = torch.tensor(float(config["normalizer_start"]))
    outputs = (logits, deltas, anchors, inside)
    losses = method.compute_losses(negatives, *outputs, targets, normaliser)
    losses["loss"].backward()
    check("normaliser", normaliser, result["normalizer"])
    check("loss_class", losses["loss_class"], result["loss_cls"])
    check("loss_box", losses["loss_box"], result["loss_bbox"])
    check("gradient of logits", logits.grad, tensors[f"{variant}.grad_logits"], 1e-3)
    if f"{variant}.grad_deltas" in tensors:
        check("gradient of deltas", deltas.grad, tensors[f"{variant}.grad_deltas"], 1e-3)
    for i, rows in enumerate(inside):
        found = method.assign(anchors[rows], targets[i])
        weight = method.NEGATIVES[negatives](found, targets[i].scope)
        ours = torch.zeros_like(tensors[f"{variant}.weights"][i])
        ours[rows] = weight * (found.labels > -2)[:, None]
        check("weights", ours, tensors[f"{variant}.weights"][i])
        if f"{variant}.labels_aux" in tensors:
            recorded = {
                name: tensors[f"{variant}.{name}"][i][rows]
                for name in ("labels", "labels_aux", "label_weights", "max_overlaps", "box_targets")
            }
            compare_assignment(found, anchors[rows], recorded, config["num_classes"])


def compare_assignment(found, anchors, recorded: dict, background: int) -> None:
    """What the anchors inside an image are assigned to."""
    labels = torch.where(found.labels >= 0, found.labels, background)
    assert torch.equal(labels, recorded["labels"])
    assert torch.equal(found.labels > -2, recorded["label_weights"] > 0)
    assert torch.equal(found.strict, recorded["labels_aux"] != background)
    check("overlap", found.overlap, recorded["max_overlaps"])
    fg = found.labels >= 0
    moved = retinanet.encode_corners(found.boxes[fg], anchors[fg])
    check("box targets", moved, recorded["box_targets"][fg])


def test_constants_that_the_recording_names():
    _, record = case("catex_loss")
    assert record["config"]["weighted_neg"] == {"a": 1, "b": 10_000, "c": 25}
    assert record["results"]["two.pos_weightedneg"]["norm_thre"] == method.Args().least_confidence
    _, record = case("catex_mining")
    assert record["config"]["test_runs"] == method.Args().dropout_runs


def test_clusters_and_confidence():
    tensors, record = case("catex_mining")
    config = record["config"]
    for label in range(config["num_classes"]):
        rows = tensors["labels"] == label
        boxes, scores = tensors["detections"][rows].split([4, 1], 1)
        scores = scores.flatten()
        found = []
        for members in method.cluster(boxes, config["cluster_iou"]):
            found.append(method.summarise(boxes[members], scores[members], config["test_runs"]))
        found = torch.stack(found)
        check("clusters", found, tensors[f"clusters.class{label}"])
        confidence = method.confidence(*found[:, 4:].double().T.numpy())
        check("confidence", torch.from_numpy(confidence), tensors[f"confidence.class{label}"])


def test_mined_image_of_recorded_runs(monkeypatch):
    """`mine_image` on the recorded detections: their clusters, without those of own classes."""
    tensors, record = case("catex_mining")
    config = record["config"]
    names = tuple(map(str, range(config["num_classes"])))
    args = method.Args(backbone="resnet10t", channels=8, dropout_runs=config["test_runs"])
    model = method.Model(args, LabelSpace([Vocabulary("any", names)], merge=True), False)
    runs = iter(range(config["test_runs"]))

    def recorded_run(*_):
        rows = tensors["run"] == next(runs)
        found = tensors["detections"][rows]
        return found[:, :4], found[:, 4], tensors["labels"][rows]

    monkeypatch.setattr(method, "select_detections", recorded_run)
    image = torch.ones(3, 64, 96, dtype=torch.uint8)
    batch = Batch(image[None], [(64, 96)], [Sample.unlabelled(image, "any", 0, 0)])
    own = 1
    wanted = torch.arange(config["num_classes"]) != own
    [found] = method.mine_image(model, batch, wanted)
    kept, labels = [], []
    for label in wanted.nonzero().flatten().tolist():
        clusters = tensors[f"clusters.class{label}"]
        kept.append(clusters[clusters[:, 4] >= config["file_score_thr"]])
        labels += [label] * record["results"][f"class{label}"]["num_kept_for_file"]
    check("mined boxes", torch.cat([found["boxes"], found["facts"]], 1), torch.cat(kept))
    assert found["labels"].tolist() == labels
