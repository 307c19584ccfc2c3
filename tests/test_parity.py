"""CenterNet2 and the cascade against tensors recorded from the official implementations.

CONCORD_PARITY names the folder. Every size, constant and name is read from it, so any recording of the same cases will
do. `pytest -s` prints the worst relative error of each quantity.
"""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

import common.boxes
import common.centernet
import scaledet
from common.batch import Batch, Sample
from common.boxes import pool_rois
from common.centernet import CenterNet, CenterNetHead, Grid
from common.labels import Vocabulary

FOLDER = Path(os.environ.get("CONCORD_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))
WORST: dict[str, float] = {}


def case(name: str):
    """(tensors, record) of one recorded case; skips where it is absent."""
    if not (FOLDER / f"{name}.safetensors").is_file():
        pytest.skip(f"no {name}.safetensors in {FOLDER}; CONCORD_PARITY names the folder of recorded tensors")
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    for quantity, error in WORST.items():
        print(f"\n{error:8.1e}  {quantity}", end="")


def check(quantity: str, ours, official, tolerance: float = 1e-4, floor: float = 1e-9) -> None:
    """max |ours - official| within `tolerance` of max |official| (of `floor`, where that is larger)."""
    ours, official = (torch.as_tensor(x).detach().double() for x in (ours, official))
    assert ours.shape == official.shape, quantity
    if official.numel():
        error = float((ours - official).abs().max() / official.abs().max().clamp(min=floor))
        WORST[quantity] = max(WORST.get(quantity, 0), error)
        assert error <= tolerance, f"{quantity}: relative error {error:.1e}"


def check_gradients(quantity: str, ours: dict, official: dict) -> None:
    """Gradients by official name; those that are 0 up to rounding are measured against the others."""
    floor = 1e-3 * max(float(g.abs().max()) for g in official.values())
    for name, gradient in official.items():
        got = torch.zeros_like(gradient) if ours[name].grad is None else ours[name].grad
        check(quantity, got, gradient, 1e-3, floor)


def check_sets(quantity: str, ours: list, official: list, length: float) -> None:
    """Rows (boxes, scores, classes) as sets: each has its partner, except within rounding of the last score.

    length: pixels that box errors are relative to
    """
    last = max(float(ours[1].min()), float(official[1].min())) + 1e-5
    for (boxes, scores, classes), (others, other_scores, other_classes) in ((ours, official), (official, ours)):
        box = (boxes[:, None] - others).abs().amax(-1) / length
        error = torch.maximum(box, (scores[:, None] - other_scores).abs())
        error = error.masked_fill(classes[:, None] != other_classes, torch.inf).amin(1).masked_fill(scores <= last, 0)
        WORST[quantity] = max(WORST.get(quantity, 0), float(error.max()))
        assert error.max() <= 1e-4, f"{quantity}: {int((error > 1e-4).sum())} of {len(error)} have no partner"


# -- CenterNet ---------------------------------------------------------------------------------------------------------

LOSSES = {"loss_centernet_pos": "agn_pos", "loss_centernet_neg": "agn_neg", "loss_centernet_loc": "loc"}


def centernet_case(variant: str = "train"):
    """The network with the recorded weights and settings, features, boxes, tensors, record."""
    tensors, record = case("centernet2_proposal")
    c = record["config"] | record.get(variant, {}).get("overrides", {})
    c["IGNORE_HIGH_FP"] = c.get("ignore_high_fp", c["IGNORE_HIGH_FP"])
    pre_nms = (c["PRE_NMS_TOPK_TRAIN"], c["PRE_NMS_TOPK_TEST"])
    net = CenterNet(
        c["feature_channels"], c["FPN_STRIDES"], pre_nms, (c["POST_NMS_TOPK_TRAIN"], c["POST_NMS_TOPK_TEST"])
    )
    net.centernet_head = CenterNetHead(c["feature_channels"], len(c["FPN_STRIDES"]), c["NUM_BOX_CONVS"])
    net.size_ranges, net.min_overlap, net.min_radius = c["SOI"], c["HM_MIN_OVERLAP"], c["MIN_RADIUS"]
    net.pos_weight, net.neg_weight = c["POS_WEIGHT"], c["NEG_WEIGHT"]
    net.alpha, net.gamma, net.beta = c["HM_FOCAL_ALPHA"], c["LOSS_GAMMA"], c["HM_FOCAL_BETA"]
    net.ignore_high_fp = c["IGNORE_HIGH_FP"] if c["IGNORE_HIGH_FP"] > 0 else torch.inf
    net.score_threshold = c["INFERENCE_TH"]
    net.train(variant != "infer")
    net.nms_threshold = c["NMS_TH_TRAIN"] if net.training else c["NMS_TH_TEST"]
    prefix = "proposal_generator."
    net.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    features = [tensors[f"features.{level}"].requires_grad_() for level in c["IN_FEATURES"]]
    boxes = [tensors[f"gt{i}.boxes"] for i in range(len(features[0]))]
    return net, features, boxes, tensors, record


def test_parity_centernet_head_and_grid():
    net, features, _, tensors, record = centernet_case()
    grid = Grid.of(features, net.strides)
    parts = [h * w for h, w in grid.shapes]
    logits, ltrb = net.centernet_head(features)
    levels = zip(
        record["config"]["IN_FEATURES"], logits.split(parts, 1), ltrb.split(parts, 1), grid.points.split(parts)
    )
    for level, level_logits, level_ltrb, points in levels:
        check("centernet head: objectness logits", level_logits, tensors[f"head.agn_hm.{level}"].flatten(1))
        official = tensors[f"head.reg.{level}"].flatten(2).transpose(1, 2)
        check("centernet head: distances", level_ltrb, official)
        assert torch.equal(points, tensors[f"grids.{level}"])


def test_parity_centernet_targets():
    net, features, boxes, tensors, _ = centernet_case()
    grid = Grid.of(features, net.strides)
    heatmaps, ltrb, centres = zip(*(net.targets(grid, b) for b in boxes))
    parts = [h * w for h, w in grid.shapes]

    def flat(per_image):  # B times (M, ...) -> level by level, inside a level image by image
        return torch.cat([part.flatten(0, 1) for part in torch.stack(per_image).split(parts, 1)])

    numbers = torch.arange(len(boxes) * sum(parts)).view(len(boxes), -1)
    place = flat(list(numbers)).argsort().view(numbers.shape)  # (B, M) flat position
    pos_inds = torch.cat([place[i, c] for i, c in enumerate(centres)])
    assert torch.equal(pos_inds.sort().values, tensors["target.pos_inds"].sort().values)
    check("centernet targets: heat map", flat(heatmaps), tensors["target.heatmap"][:, 0])
    regressed = tensors["target.reg"].amin(1) >= 0
    assert torch.equal(flat(ltrb).amin(1) >= 0, regressed)
    check("centernet targets: distances", flat(ltrb)[regressed], tensors["target.reg"][regressed])


@pytest.mark.parametrize("variant", ["train", "train_no_ignore"])
def test_parity_centernet_losses_and_gradients(variant):
    net, features, boxes, tensors, record = centernet_case(variant)
    _, losses = net(features, boxes)
    for ours, official in LOSSES.items():
        check(f"centernet {variant}: {ours}", losses[ours], record[variant]["losses"][f"loss_centernet_{official}"])
    sum(losses.values()).backward()
    ours = {f"proposal_generator.{name}": p for name, p in net.named_parameters()}
    ours |= {f"features.{level}": f for level, f in zip(record["config"]["IN_FEATURES"], features)}
    prefix = f"{variant}.grad."
    stored = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    assert stored.keys() <= ours.keys() and sum(name.startswith("features.") for name in stored) == len(features)
    check_gradients(f"centernet {variant}: gradients", ours, stored)
    for name, norm in record[variant]["grad_norms"].items():
        got = ours[f"proposal_generator.{name}"].grad.norm()
        check(
            f"centernet {variant}: gradient norms", got, norm, 1e-3, 1e-3 * max(record[variant]["grad_norms"].values())
        )


def test_parity_centernet_losses_without_boxes():
    net, features, boxes, _, record = centernet_case("train_empty")
    _, losses = net(features, [b[:0] for b in boxes])
    for ours, official in LOSSES.items():
        expected = record["train_empty"]["losses"][f"loss_centernet_{official}"]
        check(f"centernet train_empty: {ours}", losses[ours], expected)


@pytest.mark.parametrize("variant", ["train", "train_no_ignore", "infer"])
def test_parity_centernet_proposals(variant, monkeypatch):
    net, features, boxes, tensors, record = centernet_case(variant)
    candidates, nms = [], common.centernet.nms

    def recording_nms(*arguments):
        candidates.append(arguments[:2])
        return nms(*arguments)

    monkeypatch.setattr(common.centernet, "nms", recording_nms)
    proposals, _ = net(features, boxes)
    longest = max(max(size) for size in record["config"]["image_sizes_hw"])

    def compare(what, ours, name):
        official = (tensors[f"{variant}.{name}.boxes"], tensors[f"{variant}.{name}.scores"])
        ours, official = ((b, s, torch.zeros(len(s))) for b, s in (ours, official))
        check_sets(f"centernet {variant}: {what}", ours, official, longest)
        return len(ours[1]), len(official[1])

    for i, (found, before) in enumerate(zip(proposals, candidates)):
        assert (found[1].diff() <= 0).all()
        ours, official = compare("proposals", found, f"proposals{i}")
        assert ours == min(official, net.post_nms[not net.training])  # theirs keeps all that tie with the last
        if variant == "infer":
            ours, official = compare("candidates before NMS", before, f"pre_nms{i}")
            assert ours == official


# -- cascade -----------------------------------------------------------------------------------------------------------

HEAD, LAYERS = "roi_heads.", {"fc1": "box_head.1", "fc2": "box_head.3", "linear": "embedding"}


def own_name(key: str) -> str:
    """roi_heads.box_predictor.2.cls_score.linear.bias -> stages.2.embedding.bias"""
    kind, stage, *rest = key.removeprefix(HEAD).split(".")
    assert kind in ("box_head", "box_predictor")
    rest = [LAYERS.get(part, part) for part in rest if part != "cls_score"]
    return ".".join(["stages", stage, *rest])


def trained(tensors: dict) -> list[str]:
    """The recorded names of all that box heads and predictors learn."""
    names = [key for key in tensors if key.startswith((f"{HEAD}box_head.", f"{HEAD}box_predictor."))]
    return [name for name in names if not name.endswith("zs_weight")]


class Cascade(scaledet.Model):
    """The model with the recorded features and proposals in the place of backbone and CenterNet."""

    def __init__(self, args, tensors, record):
        nn.Module.__init__(self)
        sizes = record["config"]["image_sizes_hw"]
        self.args = args
        self.register_buffer("text", text := F.normalize(tensors["zs_weight_raw"]), persistent=False)
        self.stages = nn.ModuleList(
            scaledet.CascadeStage(args.channels, args.fc_dim, text.shape[1], args.tau, args.cls_bias) for _ in self.ious
        )
        self.load_state_dict({own_name(key): tensors[key] for key in trained(tensors)})
        self.features = [tensors[f"features.{level}"].requires_grad_() for level in record["config"]["feature_strides"]]
        self.proposals = [(tensors[f"proposals{i}.boxes"], tensors[f"proposals{i}.scores"]) for i in range(len(sizes))]
        self.sizes = [tuple(size) for size in sizes]
        self.images = torch.zeros(len(sizes), 3, *record["config"]["padded_hw"], dtype=torch.uint8)

    def forward(self, images, sizes, ground_truth=None):
        boxes, scores = (list(column) for column in zip(*self.proposals))
        return scores, self.cascade(self.features, boxes, sizes, ground_truth), {}


def cascade_case(monkeypatch, **changes):
    tensors, record = case("detic_roi")
    config = {key.rpartition(".")[2]: value for key, value in record["config"].items()}
    monkeypatch.setattr(scaledet.Model, "ious", config["IOUS"])
    monkeypatch.setattr(scaledet.Model, "box_weights", config["BBOX_REG_WEIGHTS"])
    monkeypatch.setattr(scaledet, "STRIDES", list(config["feature_strides"].values()))
    args = scaledet.Args(
        tau=1 / config["NORM_TEMP"], cls_bias=config["USE_BIAS"], channels=config["feature_channels"],
        fc_dim=config["FC_DIM"], rois_per_image=config["BATCH_SIZE_PER_IMAGE"], lam=0, ignore_dup=False, amp="off",
        **changes,
    )  # fmt: skip
    return Cascade(args, tensors, record), tensors, record, config


def check_stage(variant: str, k: int, output, tensors: dict) -> None:
    for i, boxes in enumerate(output.boxes):
        check(f"cascade {variant}: boxes", boxes, tensors[f"{variant}.stage{k}.image{i}.boxes"])
    official = tensors[f"{variant}.stage{k}.cls_logits"]
    check(f"cascade {variant}: logits", output.logits, official[:, :-1])
    bias = tensors.get(f"{HEAD}box_predictor.{k}.cls_score.cls_bias", torch.zeros(1))
    assert (official[:, -1] == bias).all()  # background has no embedding: nothing is lost with its column
    check(f"cascade {variant}: box deltas", output.deltas, tensors[f"{variant}.stage{k}.box_deltas"])


def mask_loss(features: list, tensors: dict, variant: str, config: dict):
    """The official mask head, which ScaleDet lacks, as it shares the features' gradients."""
    count = len(features[0])
    boxes = [tensors.get(f"{variant}.mask.image{i}.boxes", torch.zeros(0, 4)) for i in range(count)]
    targets = torch.cat([tensors[f"{variant}.mask.image{i}.targets"] for i in range(count) if len(boxes[i])]).float()
    prefix = f"{HEAD}mask_head."
    weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    x = pool_rois(features, list(config["feature_strides"].values()), boxes, targets.shape[-1] // 2)
    for n in range(1, config["NUM_CONV"] + 1):
        x = F.conv2d(x, weights[f"mask_fcn{n}.weight"], weights[f"mask_fcn{n}.bias"], padding=1).relu()
    x = F.conv_transpose2d(x, weights["deconv.weight"], weights["deconv.bias"], stride=2).relu()
    x = F.conv2d(x, weights["predictor.weight"], weights["predictor.bias"])[:, 0]
    return config["MASK_WEIGHT"] * F.binary_cross_entropy_with_logits(x, targets)


def feed_recorded_draws(monkeypatch, tensors: dict, variant: str) -> None:
    """Sampled regions come in the recorded order (the budget is not reached: all are drawn), classes as recorded."""
    images, stages = itertools.count(), itertools.count()
    assign = scaledet.assign_targets

    def recorded_assign(boxes, truth, iou, sample):
        boxes, targets = assign(boxes, truth, iou, sample)
        if sample:
            wanted = tensors[f"{variant}.sampled{next(images)}.boxes"]
            assert sorted(boxes.tolist()) == sorted(wanted.tolist())
            order = (wanted[:, None] - boxes).abs().amax(-1).argmin(1)
            boxes = boxes[order]
            targets = scaledet.Targets(targets.boxes[order], targets.labels[order], targets.scope)
        return boxes, targets

    def recorded_classes(labels, frequency):
        appeared = tensors[f"{variant}.stage{next(stages)}.fed_appeared"]
        assert set(labels[labels >= 0].tolist()) <= set(appeared.tolist())
        return torch.zeros(len(frequency) + 1).index_fill(0, appeared, 1)[:-1]  # the last one is background

    monkeypatch.setattr(scaledet, "assign_targets", recorded_assign)
    monkeypatch.setattr(scaledet, "sample_federated", recorded_classes)


@pytest.mark.parametrize("variant", ["train_plain", "train_fed"])
def test_parity_cascade_training(variant, monkeypatch):
    model, tensors, record, config = cascade_case(monkeypatch, fed_loss=variant == "train_fed")
    num_classes, num_images = len(model.text), len(model.sizes)
    feed_recorded_draws(monkeypatch, tensors, variant)
    truth = [
        scaledet.Targets(tensors[f"gt{i}.boxes"], tensors[f"gt{i}.classes"], (0, num_classes))
        for i in range(num_images)
    ]
    _, outputs, proposal_losses = model.train()(model.images, model.sizes, truth)
    for k, output in enumerate(outputs):
        check_stage(variant, k, output, tensors)
        for i, targets in enumerate(output.targets):
            prefix = f"{variant}.stage{k}.image{i}"
            classes = tensors[f"{prefix}.gt_classes"]
            fg = classes < num_classes
            assert torch.equal(targets.labels, classes.masked_fill(~fg, -1))
            if fg.any():
                assert torch.equal(targets.boxes[fg], tensors[f"{prefix}.gt_boxes"][fg])

    tables = scaledet.LabelTables.of(model.args, model.text, tensors["freq_image_count"])
    losses = scaledet.compute_losses(model.args, outputs, proposal_losses, tables)
    official = record[variant]["losses"]
    masks = mask_loss(model.features, tensors, variant, config)
    for k in range(len(outputs)):
        check(f"cascade {variant}: classification loss", losses[f"loss_hard_stage{k}"], official[f"loss_cls_stage{k}"])
        check(f"cascade {variant}: box loss", losses[f"loss_box_reg_stage{k}"], official[f"loss_box_reg_stage{k}"])
    check(f"cascade {variant}: mask loss (head of this test)", masks, official["loss_mask"])
    check(f"cascade {variant}: total", losses["loss"] + masks, record[variant]["total"])

    (losses["loss"] + masks).backward()
    own = dict(model.named_parameters())
    prefix = f"{variant}.grad."
    stored = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    features = dict(zip((f"features.{level}" for level in config["feature_strides"]), model.features))
    heads = {key: stored[key] for key in trained(stored)}
    check_gradients(f"cascade {variant}: gradients of the heads", {key: own[own_name(key)] for key in heads}, heads)
    maps = {key: stored[key] for key in features}
    check_gradients(f"cascade {variant}: gradients of the features", features, maps)
    norms = {key: norm for key, norm in record[variant]["grad_norms"].items() if not key.startswith("mask_head")}
    assert {own_name(HEAD + key) for key in norms} == own.keys()
    for key, norm in norms.items():
        check(f"cascade {variant}: gradient norms", own[own_name(HEAD + key)].grad.norm(), norm, 1e-3)


@pytest.mark.parametrize("variant", ["infer", "infer_one_class"])
def test_parity_cascade_inference(variant, monkeypatch):
    model, tensors, record, config = cascade_case(monkeypatch, one_class_per_proposal=variant == "infer_one_class")
    config |= {key.rpartition(".")[2]: value for key, value in zip(*[iter(record[variant]["overrides"])] * 2)}
    assert config.get("ONE_CLASS_PER_PROPOSAL", False) == model.args.one_class_per_proposal
    given, select = [], scaledet.select_detections

    def recording_select(boxes, scores, one_class):
        given.append((boxes, scores))
        return select(boxes, scores, one_class, config["SCORE_THRESH_TEST"], config["DETECTIONS_PER_IMAGE"])

    monkeypatch.setattr(scaledet, "select_detections", recording_select)
    monkeypatch.setattr(common.boxes, "batched_nms", lambda *a: batched_nms(*a[:3], config["NMS_THRESH_TEST"]))
    samples = [Sample.unlabelled(image[:, :h, :w], "any", 0, 0) for image, (h, w) in zip(model.images, model.sizes)]
    vocabulary = Vocabulary("any", tuple(map(str, range(len(model.text)))))
    found = scaledet.predict(model, Batch(model.images, model.sizes, samples), vocabulary)
    with torch.no_grad():
        objectness, outputs, _ = model(model.images, model.sizes)
    for k, output in enumerate(outputs):
        check_stage(variant, k, output, tensors)
    assert all(torch.equal(o, tensors[f"proposals{i}.scores"]) for i, o in enumerate(objectness))
    for i, ((boxes, scores), detections) in enumerate(zip(given, found)):
        official = {key: tensors[f"{variant}.image{i}.{key}"] for key in ("boxes", "scores", "classes")}
        unclipped, all_scores = (tensors[f"{variant}.image{i}.{key}"] for key in ("all_boxes", "all_scores"))
        check(f"cascade {variant}: final boxes", boxes, clip_boxes_to_image(unclipped, model.sizes[i]))
        all_scores = all_scores[:, :-1]
        if model.args.one_class_per_proposal:  # recorded after the choice of one class, ours before it
            assert torch.equal(scores.argmax(1), all_scores.argmax(1))
            scores, all_scores = scores.amax(1), all_scores.amax(1)
        check(f"cascade {variant}: scores", scores, all_scores)
        assert len(detections["scores"]) == record[variant]["num_detections"][i]
        assert (detections["scores"].diff() <= 0).all()
        ours = [detections[key] for key in ("boxes", "scores", "labels")]
        check_sets(f"cascade {variant}: detections", ours, list(official.values()), max(model.sizes[i]))
