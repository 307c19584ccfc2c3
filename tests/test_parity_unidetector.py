"""UniDetector's localizer and classifier against tensors recorded from the official implementation.

CONCORD_PARITY names the folder. Every size, constant and sample is read from it. `pytest -s` prints
the worst errors.
"""

import pytest
import torch
from parity import case, check, check_gradients, report  # noqa: F401 (a fixture)
from torch import nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

import common.clip_resnet
import common.oln
import unidetector
from common.boxes import decode_boxes, have_area, two_layers
from common.clip_resnet import AttentionPool, RegionOutput
from common.labels import LabelSpace, Vocabulary
from common.oln import BOX_WEIGHTS, OLN, RPN
from common.targets import RegionTargets, Targets, match_anchors

ATTENTION = "bbox_head.attnpool."


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def recorded():
    return case("unidetector_calibration")


def part(tensors: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def own_labels(labels, background: int):
    """The official background index -> -1."""
    return labels.masked_fill(labels == background, -1)


# -- classifier ------------------------------------------------------------------------------------


class RecordedRegions(nn.Module):
    """The official head on the recorded features, whatever the images and boxes."""

    def __init__(self, tensors, config):
        super().__init__()
        self.features = tensors["roi.features"]
        self.attnpool = AttentionPool(
            self.features.shape[-1],
            config["attnpool_dim"],
            config["attnpool_heads"],
            config["embed_dim"],
        )
        self.attnpool.load_state_dict(part(tensors, ATTENTION))

    def normalise(self, images, sizes):
        return images

    def forward(self, images, boxes):
        return self.attnpool(self.features)


def classifier_case(monkeypatch, **changes):
    """Returns a model whose classifier is the recorded one, its label space, tensors, record."""
    tensors, record = recorded()
    c = record["config"]
    text = F.normalize(tensors["zs_weight_raw"])
    label_space = LabelSpace([Vocabulary("any", tuple(map(str, range(len(text)))), text=text)])
    args = unidetector.Args(tau=1 / c["temperature"], amp="off", **changes)
    regions = RecordedRegions(tensors, c)
    monkeypatch.setattr(common.clip_resnet, "region_features", lambda *_: regions)
    monkeypatch.setattr(unidetector, "OLN", lambda *_: nn.Identity())
    model = unidetector.Model(args, label_space)
    model.classifiers[0].fc_reg.load_state_dict(part(tensors, "bbox_head.fc_reg."))
    return model, label_space, tensors, record


def test_parity_attention_pool_logits_and_boxes(monkeypatch):
    model, label_space, tensors, record = classifier_case(monkeypatch)
    classifier = model.classifiers[0]
    check("attention pooling", classifier.regions(None, None), tensors["roi.pooled"])
    x, deltas = classifier(torch.zeros(1, 3, 1, 1), [(1, 1)], [tensors["roi.boxes"]])
    official = tensors["roi.cls_logits"]
    logits = unidetector.compare(x, label_space.text, model.args.tau)
    check("classifier: logits", logits, official[:, :-1])
    assert not official[:, -1].any()  # background has no embedding: nothing is lost with its column
    check("classifier: box deltas", deltas, tensors["roi.box_deltas"])
    boxes = clip_boxes_to_image(
        decode_boxes(tensors["roi.boxes"], deltas, BOX_WEIGHTS), record["config"]["image_hw"]
    )
    check("classifier: decoded boxes", boxes, tensors["roi.decoded_boxes"])


@pytest.mark.parametrize("variant", ["plain", "calibrated", "calibrated_g03"])
def test_parity_inference(variant, monkeypatch):
    _, record = recorded()
    c = record[f"inference.{variant}"]
    settings = {"beta": c["beta"], "gamma": c["gamma"] or 0.0}
    model, label_space, tensors, record = classifier_case(monkeypatch, **settings)
    prior = tensors["calibration.class_counts"] if c["calibrated"] else None
    official = tensors[f"inference.{variant}.scores"]
    eta, p = tensors["roi.proposal_scores"], tensors["roi.cls_logits"].sigmoid()
    ours = p[:, :-1]
    if prior is not None:
        ours = unidetector.calibrate(ours, prior, model.args.gamma)
    check(f"inference {variant}: scores", unidetector.fuse(ours, eta, c["beta"]), official[:, :-1])
    background = unidetector.fuse(p[:, -1:], eta, c["beta"])
    check(f"inference {variant}: background", background, official[:, -1:])

    given = {}
    monkeypatch.setattr(
        unidetector, "soft_nms", lambda boxes, scores: given.setdefault("scores", scores)
    )
    regions = {
        "boxes": tensors["roi.boxes"],
        "embeddings": F.normalize(tensors["roi.pooled"]),
        "eta": eta,
        "size": (1, 1),
    }
    found = unidetector.classify(model, regions, label_space, prior, 300)
    check(f"inference {variant}: scores of classify", given["scores"], official[:, :-1])
    assert found["scores"][0] == given["scores"].max()


def with_targets(deltas):
    """(R, 4) boxes and ground truth whose regression targets are the recorded ones."""
    boxes = torch.tensor([10.0, 20, 60, 50]).expand(len(deltas), 4)
    return boxes, decode_boxes(boxes, deltas, BOX_WEIGHTS)


def classifier_output(logits, deltas, labels, bbox_targets, counts: list) -> RegionOutput:
    boxes, gt_boxes = with_targets(bbox_targets)
    parts = zip(gt_boxes.split(counts), labels.split(counts))
    targets = [RegionTargets(*part, torch.zeros(len(part[1])).long()) for part in parts]
    return RegionOutput(list(boxes.split(counts)), logits, deltas, targets)


def with_scopes(scopes: list[slice]) -> list[Targets]:
    """Returns the targets of images of these scopes; no more of them is used."""
    return [Targets(torch.zeros(0, 4), torch.zeros(0).long(), scope) for scope in scopes]


def feed_samples(monkeypatch, samples: list, sizes: list) -> None:
    """Makes `sample_classes` return recorded indices.

    The one after the last class is background.
    """
    masks = [
        torch.zeros(n + 1, dtype=torch.bool).index_fill(0, sampled, True)[:-1]
        for sampled, n in zip(samples, sizes)
    ]
    answers = iter(masks)
    monkeypatch.setattr(unidetector, "sample_classes", lambda *_: next(answers))


@pytest.mark.parametrize("variant", ["freq", "no_freq"])
def test_parity_federated_loss(variant, monkeypatch):
    tensors, record = recorded()
    t, c = part(tensors, f"train.{variant}."), record[f"train.{variant}"]
    num = len(tensors["zs_weight_raw"])
    logits, deltas = (
        tensors[f"roi.{name}"].clone().requires_grad_() for name in ("cls_logits", "box_deltas")
    )
    labels = own_labels(tensors["train.labels"], num)
    assert torch.equal(tensors["train.bbox_weights"].amax(1) > 0, labels >= 0)
    assert len(t["appeared"]) == c["fed_loss_num_cat"]
    assert set(labels.unique().tolist()) - {-1} <= set(t["appeared"].tolist())
    count = tensors["train.freq_image_count"] if variant == "freq" else torch.ones(num)
    sampled = t["appeared"][~torch.isin(t["appeared"], labels) & (t["appeared"] < num)]
    assert (count[sampled] > 0).all()
    feed_samples(monkeypatch, [t["appeared"]], [num])
    output = classifier_output(
        logits[:, :-1], deltas, labels, tensors["train.bbox_targets"], [len(labels)]
    )
    losses = unidetector.compute_losses(output, with_scopes([slice(0, num)]), {}, count)
    check(f"federated {variant}: classification", losses["loss_classification"], c["loss_cls"])
    check(f"federated {variant}: box", losses["loss_box"], c["loss_bbox"])
    losses["loss"].backward()
    official = {"logits": t["grad_cls_logits"], "deltas": t["grad_box_deltas"]}
    check_gradients(
        f"federated {variant}: gradients", {"logits": logits, "deltas": deltas}, official
    )


def test_parity_partitioned_loss(monkeypatch):
    tensors, record = recorded()
    t, c = part(tensors, "partitioned."), record["partitioned"]
    counts, owners = c["rois_per_image"], c["dataset_id_per_image"]
    both = [t[f"cls_logits_{d}"].clone().requires_grad_() for d in range(2)]
    sizes = [logits.shape[1] - 1 for logits in both]
    starts = [0, sizes[0]]
    deltas = tensors["roi.box_deltas"].clone().requires_grad_()
    own_columns = zip(t["labels"].split(counts), owners)
    labels = [
        torch.where(own == c["background_label"], -1, own + starts[d]) for own, d in own_columns
    ]
    labels = torch.cat(labels)
    assert torch.equal(t["bbox_weights"].amax(1) > 0, labels >= 0)
    samples = [t[f"image{i}.appeared"] for i in range(len(owners))]
    feed_samples(monkeypatch, samples, [sizes[d] for d in owners])
    targets = with_scopes([slice(starts[d], starts[d] + sizes[d]) for d in owners])
    joint = torch.cat(
        [logits[:, :-1] for logits in both], 1
    )  # the concatenation, as Model makes it
    output = classifier_output(joint, deltas, labels, tensors["train.bbox_targets"], counts)
    losses = unidetector.compute_losses(output, targets, {}, torch.ones(sum(sizes)))
    check("partitioned: classification", losses["loss_classification"], c["loss_cls"])
    check("partitioned: box", losses["loss_box"], c["loss_bbox"])
    losses["loss"].backward()
    ours = {"cls_logits_0": both[0], "cls_logits_1": both[1], "box_deltas": deltas}
    check_gradients("partitioned: gradients", ours, {name: t[f"grad_{name}"] for name in ours})


# -- localizer, second stage -----------------------------------------------------------------------


def test_parity_localizer_regions():
    tensors, record = recorded()
    t, state = part(tensors, "cln.roi."), part(tensors, "cln.roi_head.")
    channels, width = t["features"].shape[1], len(state["shared_fcs.0.bias"])
    box_head = two_layers(channels, width)
    box_head.load_state_dict(
        {
            f"{layer}.{kind}": state[f"shared_fcs.{i}.{kind}"]
            for i, layer in enumerate((1, 3))
            for kind in ("weight", "bias")
        }
    )
    head = nn.ModuleDict(
        {
            "fc_cls": nn.Linear(width, 2),
            "fc_reg": nn.Linear(width, 4),
            "fc_iou": nn.Linear(width, 1),
        }
    )
    head.load_state_dict(
        {k.replace("fc_bbox_score", "fc_iou"): v for k, v in state.items() if k.startswith("fc_")}
    )
    x = box_head(t["features"])
    logits, deltas, iou = (
        head[name](x).detach().requires_grad_() for name in ("fc_cls", "fc_reg", "fc_iou")
    )
    check("localizer: class logits", logits, t["cls_logits"])
    check("localizer: box deltas", deltas, t["box_deltas"])
    check("localizer: IoU logits", iou, t["iou_logits"])
    eta = unidetector.objectness(
        logits.softmax(1)[:, 0], t["rpn_score"][:, 0], iou[:, 0].sigmoid(), record["cln.alpha"]
    )
    check("localizer: eta", eta, t["scores"][:, 0])
    boxes = clip_boxes_to_image(
        decode_boxes(tensors["roi.boxes"], deltas, BOX_WEIGHTS), record["config"]["image_hw"]
    )
    check("localizer: decoded boxes", boxes, t["decoded_boxes"])


def test_parity_localizer_region_losses(monkeypatch):
    tensors, record = recorded()
    t = part(tensors, "cln.roi.")
    logits, deltas, iou = (
        t[name].clone().requires_grad_() for name in ("cls_logits", "box_deltas", "iou_logits")
    )
    labels = t["labels"].neg()  # 0 is foreground, 1 background
    monkeypatch.setattr(common.oln, "paired_iou", lambda *_: t["iou_targets"][labels >= 0])
    boxes, gt_boxes = with_targets(t["bbox_targets"])
    own = RegionTargets(gt_boxes, labels, torch.zeros_like(labels))
    losses = OLN.losses(None, (logits, deltas, iou[:, 0]), [boxes], [own])
    names = {
        "loss_roi_cls": "loss_cls",
        "loss_roi_box": "loss_bbox",
        "loss_roi_iou": "loss_bbox_score",
    }
    for ours, official in names.items():
        check(f"localizer: {ours}", losses[ours], record["cln.roi.losses"][official])
    sum(losses.values()).backward()
    ours = {"cls_logits": logits, "box_deltas": deltas, "iou_logits": iou}
    check_gradients(
        "localizer: gradients of the second stage", ours, {name: t[f"grad_{name}"] for name in ours}
    )


# -- localizer, first stage ------------------------------------------------------------------------


def rpn_case():
    """The network with the recorded weights, whose settings are ours; features, tensors, record."""
    tensors, record = recorded()
    t, c = part(tensors, "cln.rpn."), record["config"]["cln"]
    official = c["train"]
    assert c["strides"] == common.oln.STRIDES and (RPN.scale, RPN.sampled) == (
        c["anchor_scale"],
        official["num"],
    )
    assert RPN.box_match[:2] == (official["pos_iou"], official["neg_iou"])
    assert RPN.centre_match[:2] == (official["obj_pos_iou"], official["obj_neg_iou"])
    assert (RPN.box_fraction, RPN.centre_fraction) == (
        official["pos_fraction"],
        official["objectness_pos_fraction"],
    )
    features = [t[f"feature{i}"].requires_grad_() for i in range(len(c["strides"]))]
    rpn = RPN(features[0].shape[1])
    rpn.pre_nms = c["nms_pre"]  # fewer than ours
    rpn.load_state_dict(
        {k: v for k, v in part(tensors, "cln.rpn_head.").items() if not k.startswith("rpn_cls")}
    )
    return rpn, features, t, record


def level_cat(t: dict, name: str, count: int):
    return torch.cat([t[f"{name}.{i}"][0] for i in range(count)])


def test_parity_rpn_head_anchors_and_proposals():
    rpn, features, t, record = rpn_case()
    for i, (anchors, tblr, logits) in enumerate(zip(rpn.anchors(features), *rpn.head(features))):
        assert torch.equal(anchors, t[f"anchors.{i}"])
        check("rpn: distances", tblr, t[f"box.{i}"].flatten(2).transpose(1, 2))
        check("rpn: objectness logits", logits, t[f"objectness.{i}"].flatten(1))
    [(boxes, scores)], _ = rpn(features, [tuple(record["config"]["image_hw"])])
    parts = [min(rpn.pre_nms, len(anchors)) for anchors in rpn.anchors(features)]
    # the order inside a level that is kept whole is not by score there, and empty boxes stay
    official = torch.cat(
        [rows[rows[:, 4].argsort(descending=True)] for rows in t["proposals"].split(parts)]
    )
    official = official[have_area(official[:, :4])]
    check("rpn: proposals", boxes, official[:, :4])
    check("rpn: scores of proposals", scores, official[:, 4])


def test_parity_rpn_targets():
    """Sampling is random: the assignment must allow every recorded sample, with its target."""
    rpn, features, t, record = rpn_case()
    levels, size = len(features), tuple(record["config"]["image_hw"])
    anchors, gt_boxes = torch.cat(rpn.anchors(features)), t["gt_boxes"]
    height, width = size
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
    matched = torch.full((len(anchors),), -2)

    matched[inside] = match_anchors(anchors[inside], gt_boxes, *rpn.box_match)
    fg = level_cat(t, "target.box_weights", levels) > 0
    sampled = level_cat(t, "target.label_weights", levels) > 0
    assert torch.equal(fg, matched >= 0)  # too few for the half of the sample: all are sampled
    assert (matched[sampled] > -2).all() and int(sampled.sum()) == sum(
        record["cln.rpn.num_samples"]
    )
    check("rpn: boxes to regress", gt_boxes[matched[fg]], level_cat(t, "target.boxes", levels)[fg])

    matched[inside] = match_anchors(anchors[inside], gt_boxes, *rpn.centre_match)
    sampled = level_cat(t, "target.objectness_weights", levels) > 0
    official = level_cat(t, "target.objectness", levels)
    assert (matched[sampled] > -2).all() and not official[~sampled].any()
    fg = sampled & (matched >= 0)
    assert int(fg.sum()) == min(int((matched >= 0).sum()), int(rpn.sampled * rpn.centre_fraction))
    assert not official[sampled & (matched < 0)].any()
    check(
        "rpn: centreness", common.oln.centreness(anchors[fg], gt_boxes[matched[fg]]), official[fg]
    )

    rows, boxes, count, scored, scores = rpn.targets(anchors, gt_boxes, size)
    assert torch.equal(
        rows.sort().values, (level_cat(t, "target.box_weights", levels) > 0).nonzero()[:, 0]
    )
    assert count == sum(record["cln.rpn.num_samples"]) and len(scored) == int(sampled.sum())
    assert inside[scored].all() and len(boxes) == len(rows) and len(scores) == len(scored)


def test_parity_rpn_losses_and_gradients(monkeypatch):
    rpn, features, t, record = rpn_case()
    levels = len(features)
    count = sum(record["cln.rpn.num_samples"])
    official, total = record["cln.rpn.losses_per_level"], 0
    for i, (anchors, tblr, logits) in enumerate(zip(rpn.anchors(features), *rpn.head(features))):
        fg, scored = (
            t[f"target.{name}.{i}"][0] > 0 for name in ("box_weights", "objectness_weights")
        )
        box = (
            common.oln.loss_rpn_box(anchors[fg], tblr[0, fg], t[f"target.boxes.{i}"][0, fg]) / count
        )
        centre = (
            common.oln.loss_rpn_objectness(
                logits[0, scored], t[f"target.objectness.{i}"][0, scored]
            )
            / count
        )
        check("rpn: box loss", box, official["loss_rpn_bbox"][i])
        check("rpn: objectness loss", centre, official["loss_rpn_obj"][i])
        total = total + box + centre

    sampled = (
        level_cat(t, "target.box_weights", levels) > 0,
        level_cat(t, "target.objectness_weights", levels) > 0,
    )
    targets = (sampled[0].nonzero()[:, 0], level_cat(t, "target.boxes", levels)[sampled[0]], count)
    targets += (sampled[1].nonzero()[:, 0], level_cat(t, "target.objectness", levels)[sampled[1]])
    monkeypatch.setattr(rpn, "targets", lambda *_: targets)
    _, losses = rpn(features, [tuple(record["config"]["image_hw"])], [t["gt_boxes"]])
    check("rpn: total", sum(losses.values()), total)
    sum(losses.values()).backward()
    ours = dict(enumerate(features))
    check_gradients(
        "rpn: gradients of the features", ours, {i: t[f"grad_feature{i}"] for i in ours}
    )
