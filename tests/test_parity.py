"""CenterNet2 and the cascade against tensors recorded from the official implementations.

CONCORD_PARITY names the folder. Every size, constant and name is read from it, so any recording of the same cases will
do. `pytest -s` prints the worst relative error of each quantity.
"""

import pytest
import torch
from parity import (
    HEAD,
    Recorded,
    case,
    check,
    check_gradients,
    check_sets,
    check_stage,
    feed_recorded_draws,
    own_name,
    report,  # noqa: F401 (a fixture)
    trained,
)
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

import common.boxes
import common.centernet
import scaledet
from common.batch import Batch, Sample
from common.cascade import Cascade, MaskHead, Targets
from common.centernet import CenterNet, CenterNetHead, Grid
from common.labels import Vocabulary
from common.masks import crop_masks

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


class RecordedModel(scaledet.Model):
    """The model on the recorded features and proposals, with the mask head that ScaleDet lacks."""

    def __init__(self, args, tensors, record, mask_convs):
        nn.Module.__init__(self)
        sizes = record["config"]["image_sizes_hw"]
        self.args = args
        self.register_buffer("text", text := F.normalize(tensors["zs_weight_raw"]))
        self.cascade = Cascade(args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            scaledet.TextClassifier(args.fc_dim, text.shape[1], args.tau, args.cls_bias) for _ in self.cascade.stages
        )
        self.mask_head = MaskHead(args.channels, mask_convs)
        self.load_state_dict({own_name(key): tensors[key] for key in trained(tensors)} | {"text": text})
        self.features = [tensors[f"features.{level}"].requires_grad_() for level in record["config"]["feature_strides"]]
        self.backbone = Recorded(self.features)
        proposals = [(tensors[f"proposals{i}.boxes"], tensors[f"proposals{i}.scores"]) for i in range(len(sizes))]
        self.centernet = Recorded((proposals, {}))
        self.sizes = [tuple(size) for size in sizes]
        self.images = torch.zeros(len(sizes), 3, *record["config"]["padded_hw"], dtype=torch.uint8)


def cascade_case(monkeypatch, **changes):
    tensors, record = case("detic_roi")
    config = {key.rpartition(".")[2]: value for key, value in record["config"].items()}
    monkeypatch.setattr(Cascade, "ious", config["IOUS"])
    monkeypatch.setattr(Cascade, "box_weights", config["BBOX_REG_WEIGHTS"])
    monkeypatch.setattr(Cascade, "strides", list(config["feature_strides"].values()))
    args = scaledet.Args(
        tau=1 / config["NORM_TEMP"], cls_bias=config["USE_BIAS"], channels=config["feature_channels"],
        fc_dim=config["FC_DIM"], rois_per_image=config["BATCH_SIZE_PER_IMAGE"], lam=0, ignore_dup=False, amp="off",
        **changes,
    )  # fmt: skip
    return RecordedModel(args, tensors, record, config["NUM_CONV"]), tensors, record, config


@pytest.mark.parametrize("variant", ["train_plain", "train_fed"])
def test_parity_cascade_training(variant, monkeypatch):
    model, tensors, record, config = cascade_case(monkeypatch, fed_loss=variant == "train_fed")
    num_classes, num_images = len(model.text), len(model.sizes)
    feed_recorded_draws(monkeypatch, scaledet, tensors, variant)
    truth = [
        Targets(tensors[f"gt{i}.boxes"], tensors[f"gt{i}.classes"], (0, num_classes), tensors[f"gt{i}.masks"] > 0)
        for i in range(num_images)
    ]
    outputs, proposal_losses = model.train()(model.images, model.sizes, truth)
    for k, output in enumerate(outputs):
        check_stage(variant, k, output, tensors)
        for i, targets in enumerate(output.targets):
            prefix = f"{variant}.stage{k}.image{i}"
            classes = tensors[f"{prefix}.gt_classes"]
            fg = classes < num_classes
            assert torch.equal(targets.labels, classes.masked_fill(~fg, -1))
            if fg.any():
                assert torch.equal(targets.boxes[fg], tensors[f"{prefix}.gt_boxes"][fg])

    for i, (boxes, targets) in enumerate(zip(outputs[0].boxes, outputs[0].targets)):
        fg, prefix = boxes[targets.labels >= 0], f"{variant}.mask.image{i}"
        check(f"cascade {variant}: boxes with masks", fg, tensors[f"{prefix}.boxes"])
        wanted = tensors[f"{prefix}.targets"].bool()
        assert torch.equal(crop_masks(targets.masks, fg, wanted.shape[-1]), wanted)

    tables = scaledet.LabelTables.of(model.args, model.text, tensors["freq_image_count"])
    losses = scaledet.compute_losses(model.args, outputs, proposal_losses, tables)
    official = record[variant]["losses"]
    masks = config["MASK_WEIGHT"] * model.mask_head.loss(model.features, outputs[0])
    for k in range(len(outputs)):
        check(f"cascade {variant}: classification loss", losses[f"loss_hard_stage{k}"], official[f"loss_cls_stage{k}"])
        check(f"cascade {variant}: box loss", losses[f"loss_box_reg_stage{k}"], official[f"loss_box_reg_stage{k}"])
    check(f"cascade {variant}: mask loss", masks, official["loss_mask"])
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
    norms = record[variant]["grad_norms"]
    assert {own_name(HEAD + key) for key in norms} == own.keys()
    assert {name for name in own if name.startswith("mask_head.")} == {
        own_name(key) for key in heads if key.startswith(f"{HEAD}mask_head.")
    }
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
        proposals, _ = model.centernet()
        outputs = model.cascade(model.features, [boxes for boxes, _ in proposals], model.sizes, None, 0)
        for k, output in enumerate(outputs):
            output.logits = model.classifiers[k](output.hidden, model.text)[1]
            check_stage(variant, k, output, tensors)
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
        masks = model.mask_head([f[i : i + 1] for f in model.features], [official["boxes"]]).sigmoid()
        check(f"cascade {variant}: masks of the final boxes", masks, tensors[f"{variant}.image{i}.masks28"][:, 0])
        check_sets(f"cascade {variant}: detections", ours, list(official.values()), max(model.sizes[i]))
