"""Detic against tensors recorded from the official implementation.

These are of its image-label losses, its heads and the whole model. CONCORD_PARITY names the folder.
Every size, constant and name is read from it. `pytest -s` prints the worst relative error of each
quantity.
"""

from dataclasses import replace

import pytest
import torch
from parity import (
    case,
    check,
    check_cascade_gradients,
    check_inference,
    check_sets,
    check_stage,
    check_targets,
    drawn_weights,
    feed_recorded_samples,
    final_rows,
    recorded_model,
    report,  # noqa: F401 (a fixture)
)
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

import detic
from common.batch import Sample, collate
from common.boxes import have_area, select_detections
from common.command import parse_args
from common.image_label_losses import RIVALS, Bag, mean_over_bags
from common.masks import decode_masks
from common.targets import Targets

# -- losses of image labels ------------------------------------------------------------------------

LOSSES = {"max_size": detic.loss_max_size, **RIVALS}

# Neither max_size_softmax nor train_softmax: detic.py has no softmax over classes, as no released
# model does.


def image_label_case(suffix: str = ""):
    """Leaves of logits and ranks, bags of images, labels, tensors, record.

    suffix: of another recording of the logits
    """
    tensors, record = case("detic_image_labels")
    config, logits = record["config"], tensors[f"{suffix}cls_logits"].requires_grad_()
    ranks = tensors["prop_logits"].requires_grad_()
    counts = config["num_proposals"]
    boxes = [tensors[f"proposals{i}.boxes"] for i in range(len(counts))]
    bags = [Bag(*parts) for parts in zip(boxes, logits.split(counts), ranks.split(counts))]
    return (
        logits,
        ranks,
        bags,
        [torch.tensor(labels) for labels in config["labels"]],
        tensors,
        record,
    )


@pytest.mark.parametrize("variant", LOSSES)
def test_parity_image_label_losses(variant):
    logits, ranks, bags, labels, tensors, record = image_label_case()
    loss, official = LOSSES[variant], record[variant]
    each = [(bag, label, loss(bag, label)) for bag, own in zip(bags, labels) for label in own]
    check(
        f"image labels {variant}: of each label",
        torch.stack([term for *_, term in each]),
        official["per_label_loss"],
    )
    if variant != "wsddn":  # all proposals take part there
        for (bag, _, term), row in zip(each, official["selected_proposal"], strict=True):
            (gradient,) = torch.autograd.grad(term, bag.logits, retain_graph=True)
            assert gradient.any(1).nonzero().flatten().tolist() == [row]
    total = record["config"]["image_loss_weight"] * mean_over_bags(loss, bags, labels)
    check(f"image labels {variant}: loss", total, official["image_loss"])
    total.backward()
    check(
        f"image labels {variant}: gradients",
        logits.grad,
        tensors[f"{variant}.grad_cls_logits"],
        1e-3,
    )
    if f"{variant}.grad_prop_logits" in tensors:
        check(
            f"image labels {variant}: gradients",
            ranks.grad,
            tensors[f"{variant}.grad_prop_logits"],
            1e-3,
        )
    else:
        assert ranks.grad is None


def test_parity_image_label_loss_of_a_single_proposal():
    logits, _, bags, _, tensors, record = image_label_case()
    bag = Bag(bags[0].boxes[:1], bags[0].logits[:1])
    labels = [torch.tensor(record["single_proposal"]["labels"])]
    total = record["config"]["image_loss_weight"] * mean_over_bags(
        detic.loss_max_size, [bag], labels
    )
    check("image labels single_proposal: loss", total, record["single_proposal"]["image_loss"])
    total.backward()
    check(
        "image labels single_proposal: gradients",
        logits.grad[:1],
        tensors["single_proposal.grad_cls_logits"],
        1e-3,
    )
    assert not logits.grad[1:].any()


def test_parity_image_label_loss_of_drawn_classes():
    logits, _, bags, labels, tensors, record = image_label_case("dynamic.")
    labels = [tensors["dynamic.cls_id_map"][own] for own in labels]
    total = record["config"]["image_loss_weight"] * mean_over_bags(
        detic.loss_max_size, bags, labels
    )
    check("image labels dynamic: loss", total, record["dynamic"]["image_loss"])
    total.backward()
    check("image labels dynamic: gradients", logits.grad, tensors["dynamic.grad_cls_logits"], 1e-3)


@pytest.mark.parametrize("variant", ["caption", "captiontag"])
def test_parity_captions(variant):
    logits, _, bags, labels, tensors, record = image_label_case()
    captions, config = tensors["caption_logits"].requires_grad_(), record["config"]
    own = list(range(captions.shape[1]))
    loss = detic.loss_captions(captions.split(config["num_proposals"]), own, 1.0)
    total = config["caption_weight"] * loss  # ours is always 1, the official default
    total = total + mean_over_bags(detic.loss_max_size, bags, labels) * (variant == "captiontag")
    total = config["image_loss_weight"] * total
    check(f"captions {variant}: loss", total, record[variant]["image_loss"])
    total.backward()
    check(
        f"captions {variant}: gradients",
        torch.cat([logits.grad, captions.grad], 1),
        tensors[f"{variant}.grad_logits"],
        1e-3,
    )


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["train_plain", "train_fed", "train_ignore_zero", "train_dynamic"]
)
def test_parity_box_supervision(variant, monkeypatch):
    config = case("detic_roi")[1]["config"]
    dynamic = config["MODEL.NUM_SAMPLE_CATS"] if variant == "train_dynamic" else 0
    model, label_space, tensors, record, config = recorded_model(
        monkeypatch,
        detic,
        fed_loss=variant == "train_fed",
        ignore_zero=variant == "train_ignore_zero",
        dynamic_classifier=dynamic,
    )
    feed_recorded_samples(monkeypatch, detic, tensors, variant)
    frequency = tensors["freq_image_count"].float()
    truth = [
        Targets(
            tensors[f"gt{i}.boxes"], tensors[f"gt{i}.classes"], masks=tensors[f"gt{i}.masks"] > 0
        )
        for i in range(len(model.sizes))
    ]
    text, places = label_space.text, torch.arange(len(label_space) + 1)
    if dynamic:
        sampled = tensors[f"{variant}.sampled_classes"]
        mask = torch.zeros_like(frequency).index_fill(0, sampled, 1)
        monkeypatch.setattr(detic, "sample_federated", lambda *_: mask)
        classes, truth = detic.sample_classifier(truth, frequency, dynamic)
        assert torch.equal(classes, sampled.sort().values)  # ours are in the order of the classes
        order = torch.cat([sampled.argsort(), torch.tensor([len(sampled)])])
        text, frequency = text[classes], frequency[classes]
        official = tensors[f"{variant}.classifier"][order]
        check(f"cascade {variant}: classifier", F.pad(text, (0, 0, 0, 1)), official)
        logits = {
            key: t[:, order]
            for key, t in tensors.items()
            if key.startswith(variant) and "cls_logits" in key
        }
        tensors, places = tensors | logits, order.argsort()[tensors[f"{variant}.cls_id_map"]]

    stages, predictions, losses = model.train()(model.images, model.sizes, truth, text)
    for k, (stage, prediction) in enumerate(zip(stages, predictions, strict=True)):
        check_stage(variant, k, stage, prediction.scores.logits(), tensors)
    check_targets(variant, stages, truth, tensors, len(text), places)
    given = (losses, truth, frequency, frequency)
    losses = detic.compute_losses(model.args, stages, predictions, *given)
    official = record[variant]["losses"]
    assert losses.keys() == official.keys() | {"loss"} and config["MASK_WEIGHT"] == 1
    for name, value in official.items():
        check(f"cascade {variant}: losses", losses[name], value)
    check(f"cascade {variant}: total", losses["loss"], record[variant]["total"])
    losses["loss"].backward()
    check_cascade_gradients(variant, model, tensors, record)


@pytest.mark.parametrize("variant", ["image_max_size", "image_max_size_with_box"])
def test_parity_image_label_supervision(variant, monkeypatch):
    weight = case("detic_roi")[1]["config"]["MODEL.ROI_BOX_HEAD.IMAGE_LOSS_WEIGHT"]
    model, label_space, tensors, record, _ = recorded_model(
        monkeypatch, detic, image_label_weight=weight
    )
    with_box = variant == "image_max_size_with_box"
    proposals = len(tensors[f"{variant}.stage0.image0.boxes"]) - with_box
    model.args = replace(model.args, image_label_proposals=proposals)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    caption = "appends the box of the image" if with_box else ""
    truth = [
        Targets(*nothing, image_labels=torch.tensor(own), caption=caption)
        for own in record[variant]["labels"]
    ]
    outputs = model.train()(model.images, model.sizes, truth, label_space.text)
    stages, predictions, losses = outputs
    assert not losses
    for k, (stage, prediction) in enumerate(zip(stages, predictions, strict=True)):
        for i, boxes in enumerate(stage.boxes):
            check(f"cascade {variant}: boxes", boxes, tensors[f"{variant}.stage{k}.image{i}.boxes"])
        # with the column of background, whose logit is the bias
        official = tensors[f"{variant}.stage{k}.cls_logits"]
        check(f"cascade {variant}: logits", prediction.scores.logits(), official)
    frequency = torch.ones(len(label_space))
    given = (losses, truth, frequency, frequency)
    losses = detic.compute_losses(model.args, stages, predictions, *given)
    official = record[variant]["losses"]
    assert losses.keys() == {"loss"} | {f"loss_image_labels_stage{k}" for k in range(len(stages))}
    for name, value in official.items():
        ours = losses.get(name.replace("image_loss", "loss_image_labels"), torch.zeros(()))
        check(f"cascade {variant}: losses", ours, value)
    losses["loss"].backward()
    check_cascade_gradients(variant, model, tensors, record)
    for name, parameter in model.named_parameters():
        learns = "classifiers" in name or "box_head" in name
        assert parameter.grad is not None if learns else parameter.grad is None, name


@pytest.mark.parametrize("variant", ["infer", "infer_one_class"])
def test_parity_inference(variant, monkeypatch):
    check_inference(monkeypatch, detic, variant)


# -- whole model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    """Returns the model from an official checkpoint, its label space, the batch, the recording."""
    tensors, record = case("detic_whole_model")
    folder = tmp_path_factory.mktemp("official")
    file = folder / "official.pth"
    torch.save({"model": drawn_weights(record, tensors)}, file)
    flags = ["--weights", str(file), "--device", "cpu", "--amp", "off"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCORD_CACHE", str(folder))
        args = parse_args(
            detic.Args, detic.METHOD, detic.TINY, detic.MODEL_FIELDS, detic.OFFICIAL, flags
        )
        model, label_space = detic.load(args.weights, args)
    file.unlink()
    samples = []
    for i, size in enumerate(record["config"]["output_sizes_hw"]):
        sample = Sample.unlabelled(tensors[f"image{i}"], "any", i, i)
        samples.append(replace(sample, original_size=tuple(size)))
    return model.eval(), label_space, collate(samples), tensors, record["config"]


@torch.no_grad()
def test_parity_whole_model_features(whole_model):
    model, label_space, batch, tensors, config = whole_model
    assert len(label_space) == config["num_classes"]
    check("whole model: tau", model.args.tau, 1 / config["NORM_TEMP"])
    assert batch.sizes == [tuple(size) for size in config["image_sizes_hw"]]
    images = model.backbone.normalise(batch.images, batch.sizes)
    check("whole model: padded input", images, tensors["padded_input"])
    layers = [f for i, f in enumerate(model.backbone.body(images)) if i in model.backbone.used]
    step = config["bottom_up.layer3_channel_stride"]
    for name, layer in zip(("layer3", "layer4", "layer5"), layers, strict=True):
        layer = layer[:, ::step] if name == "layer3" else layer
        check(f"whole model: backbone {name}", layer, tensors[f"bottom_up.{name}"])
    features = model.extract(batch.images, batch.sizes)
    for level, feature in zip(config["CENTERNET"]["IN_FEATURES"], features, strict=True):
        check(f"whole model: {level}", feature, tensors[f"fpn.{level}"])


@torch.no_grad()
def test_parity_whole_model_detections(whole_model):
    model, label_space, batch, tensors, config = whole_model
    features = model.extract(batch.images, batch.sizes)
    proposals, _ = model.centernet(features)
    detected = model.detect(features, batch.sizes, label_space.text)
    for i, ((boxes, objectness), final, scores) in enumerate(zip(proposals, *detected)):
        length = max(batch.sizes[i])
        official = [tensors[f"proposals{i}.{key}"] for key in ("boxes", "scores")]
        theirs = [*official, torch.zeros(len(official[0]))]
        ours = [boxes, objectness, torch.zeros(len(boxes))]
        check_sets("whole model: proposals", ours, theirs, length)
        distance, row = torch.cdist(official[0], boxes, p=torch.inf).min(1)
        same = distance < 1e-4 * length  # at most the one proposal at the cut has no partner
        assert (~same).sum() <= 1
        row = row[same]
        wanted = clip_boxes_to_image(tensors[f"det{i}.all_boxes"][same], batch.sizes[i])
        check("whole model: boxes of the last stage", final[row], wanted)
        all_scores = tensors[f"det{i}.all_scores"]
        check("whole model: scores", scores[row], all_scores[same, :-1])
        # the logit of background is 0, so that nothing is lost with its column
        check("whole model: scores of background", (official[1] / 2).sqrt(), all_scores[:, -1])
        limits = (config["SCORE_THRESH_TEST"], config["DETECTIONS_PER_IMAGE"])
        found = select_detections(final, scores, False, *limits)
        detections = [tensors[f"det{i}.{key}"] for key in ("boxes", "scores", "classes")]
        check_sets("whole model: detections", list(found), detections, length)
        masks28 = tensors[f"det{i}.masks28"][:, 0]
        own = [feature[i : i + 1] for feature in features]
        masks = model.mask_head(own, [detections[0][: len(masks28)]]).sigmoid()
        check("whole model: masks", masks, masks28)


def test_parity_whole_model_predictions(whole_model):
    model, label_space, batch, tensors, _ = whole_model
    for i, found in enumerate(detic.predict(model, batch, label_space)):
        size = batch.samples[i].original_size
        assert found["size"] == size
        kept = have_area(found["boxes"])
        ours = [found[key][kept] for key in ("boxes", "scores", "labels")]
        official = [tensors[f"post{i}.{key}"] for key in ("boxes", "scores", "classes")]
        assert len(official[0]) == len(final_rows(tensors, i))
        check_sets("whole model: boxes in the image", ours, official, max(size))
        pasted = tensors[f"post{i}.masks"].bool()
        rows = kept.nonzero().flatten()
        for mask, box, label in zip(pasted, official[0], official[2]):
            far = (ours[0] - box).abs().amax(1).masked_fill(ours[2] != label, torch.inf)
            row = int(rows[far.argmin()])
            own = decode_masks([found["segmentations"][row]], size)[0]
            wrong = (own ^ mask).sum() / mask.sum()
            check("whole model: pasted masks, pixels that differ", wrong, 0.0, 1e-3, floor=1)
