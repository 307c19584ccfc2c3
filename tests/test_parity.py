"""CenterNet2 and the cascade against tensors recorded from the official implementations.

CONCORD_PARITY names the folder. Every size, constant and name is read from it, so that any
recording of the same cases will do. `pytest -s` prints the worst relative error of each quantity.
"""

import pytest
import torch
from parity import (
    case,
    check,
    check_cascade_gradients,
    check_gradients,
    check_inference,
    check_sets,
    check_stage,
    check_targets,
    feed_recorded_samples,
    recorded_model,
    report,  # noqa: F401 (a fixture)
)

import common.centernet
import scaledet
from common.centernet import CenterNet, CenterNetHead, Grid
from common.targets import Targets

# -- CenterNet -------------------------------------------------------------------------------------

LOSSES = {
    "loss_centernet_pos": "agn_pos",
    "loss_centernet_neg": "agn_neg",
    "loss_centernet_loc": "loc",
}


def centernet_case(variant: str = "train"):
    """The network with the recorded weights and settings, features, boxes, tensors, record."""
    tensors, record = case("centernet2_proposal")
    c = record["config"] | record.get(variant, {}).get("overrides", {})
    c["IGNORE_HIGH_FP"] = c.get("ignore_high_fp", c["IGNORE_HIGH_FP"])
    pre_nms = (c["PRE_NMS_TOPK_TRAIN"], c["PRE_NMS_TOPK_TEST"])
    net = CenterNet(
        c["feature_channels"],
        c["FPN_STRIDES"],
        pre_nms,
        (c["POST_NMS_TOPK_TRAIN"], c["POST_NMS_TOPK_TEST"]),
    )
    net.centernet_head = CenterNetHead(
        c["feature_channels"], len(c["FPN_STRIDES"]), c["NUM_BOX_CONVS"]
    )
    net.size_ranges, net.min_overlap, net.min_radius = (
        c["SOI"],
        c["HM_MIN_OVERLAP"],
        c["MIN_RADIUS"],
    )
    net.pos_weight, net.neg_weight = c["POS_WEIGHT"], c["NEG_WEIGHT"]
    net.alpha, net.gamma, net.beta = c["HM_FOCAL_ALPHA"], c["LOSS_GAMMA"], c["HM_FOCAL_BETA"]
    net.ignore_high_fp = c["IGNORE_HIGH_FP"] if c["IGNORE_HIGH_FP"] > 0 else torch.inf
    net.score_threshold = c["INFERENCE_TH"]
    net.train(variant != "infer")
    net.nms_threshold = c["NMS_TH_TRAIN"] if net.training else c["NMS_TH_TEST"]
    prefix = "proposal_generator."
    net.load_state_dict(
        {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    )
    features = [tensors[f"features.{level}"].requires_grad_() for level in c["IN_FEATURES"]]
    boxes = [tensors[f"gt{i}.boxes"] for i in range(len(features[0]))]
    return net, features, boxes, tensors, record


def test_parity_centernet_head_and_grid():
    net, features, _, tensors, record = centernet_case()
    grid = Grid.of(features, net.strides)
    parts = [h * w for h, w in grid.shapes]
    logits, ltrb = net.centernet_head(features)
    levels = zip(
        record["config"]["IN_FEATURES"],
        logits.split(parts, 1),
        ltrb.split(parts, 1),
        grid.points.split(parts),
    )
    for level, level_logits, level_ltrb, points in levels:
        check(
            "centernet head: objectness logits",
            level_logits,
            tensors[f"head.agn_hm.{level}"].flatten(1),
        )
        official = tensors[f"head.reg.{level}"].flatten(2).transpose(1, 2)
        check("centernet head: distances", level_ltrb, official)
        assert torch.equal(points, tensors[f"grids.{level}"])


def test_parity_centernet_targets():
    net, features, boxes, tensors, _ = centernet_case()
    grid = Grid.of(features, net.strides)
    heatmaps, ltrb, centred = zip(*(net.targets(grid, b) for b in boxes))
    parts = [h * w for h, w in grid.shapes]

    def flat(per_image):  # B times (M, ...) -> level by level, inside a level image by image
        return torch.cat([part.flatten(0, 1) for part in torch.stack(per_image).split(parts, 1)])

    numbers = torch.arange(len(boxes) * sum(parts)).view(len(boxes), -1)
    place = flat(list(numbers)).argsort().view(numbers.shape)  # (B, M) flat position
    number = torch.stack(centred).long().flatten()
    pos_inds = place.flatten().repeat_interleave(number)
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
        check(
            f"centernet {variant}: {ours}",
            losses[ours],
            record[variant]["losses"][f"loss_centernet_{official}"],
        )
    sum(losses.values()).backward()
    ours = {f"proposal_generator.{name}": p for name, p in net.named_parameters()}
    ours |= {f"features.{level}": f for level, f in zip(record["config"]["IN_FEATURES"], features)}
    prefix = f"{variant}.grad."
    stored = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    assert stored.keys() <= ours.keys() and sum(
        name.startswith("features.") for name in stored
    ) == len(features)
    check_gradients(f"centernet {variant}: gradients", ours, stored)
    for name, norm in record[variant]["grad_norms"].items():
        got = ours[f"proposal_generator.{name}"].grad.norm()
        check(
            f"centernet {variant}: gradient norms",
            got,
            norm,
            1e-3,
            1e-3 * max(record[variant]["grad_norms"].values()),
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
        assert ours == min(
            official, net.post_nms[not net.training]
        )  # theirs keeps all that tie with the last
        if variant == "infer":
            ours, official = compare("candidates before NMS", before, f"pre_nms{i}")
            assert ours == official


# -- cascade ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["train_plain", "train_fed"])
def test_parity_cascade_training(variant, monkeypatch):
    model, label_space, tensors, record, config = recorded_model(
        monkeypatch, scaledet, fed_loss=variant == "train_fed", lam=0, ignore_dup=False
    )
    num_classes, num_images = len(label_space), len(model.sizes)
    feed_recorded_samples(monkeypatch, scaledet, tensors, variant)
    truth = [
        Targets(
            tensors[f"gt{i}.boxes"],
            tensors[f"gt{i}.classes"],
            slice(0, num_classes),
            tensors[f"gt{i}.masks"] > 0,
        )
        for i in range(num_images)
    ]
    outputs = model.train()(model.images, model.sizes, truth, label_space.text)
    stages, predictions, losses = outputs
    for k, (stage, prediction) in enumerate(zip(stages, predictions, strict=True)):
        logits = prediction.logits()
        check_stage(variant, k, stage, logits, tensors)
    check_targets(variant, stages, truth, tensors, num_classes, torch.arange(num_classes + 1))
    tables = scaledet.LabelTables.of(model.args, label_space.text, tensors["freq_image_count"])
    losses = scaledet.compute_losses(model.args, stages, predictions, losses, truth, tables)
    official = record[variant]["losses"]
    masks = config["MASK_WEIGHT"] * model.mask_head.loss(model.features, stages[0], truth)
    for k in range(len(stages)):
        check(
            f"cascade {variant}: classification loss",
            losses[f"loss_hard_stage{k}"],
            official[f"loss_cls_stage{k}"],
        )
        check(
            f"cascade {variant}: box loss",
            losses[f"loss_box_reg_stage{k}"],
            official[f"loss_box_reg_stage{k}"],
        )
    check(f"cascade {variant}: mask loss", masks, official["loss_mask"])
    check(f"cascade {variant}: total", losses["loss"] + masks, record[variant]["total"])

    (losses["loss"] + masks).backward()
    check_cascade_gradients(variant, model, tensors, record)


@pytest.mark.parametrize("variant", ["infer", "infer_one_class"])
def test_parity_cascade_inference(variant, monkeypatch):
    check_inference(monkeypatch, scaledet, variant)
