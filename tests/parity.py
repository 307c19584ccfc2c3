"""What the tests against tensors recorded from official implementations share: the recordings and their comparison.

CONCORD_PARITY names the folder.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

import common.boxes
import common.cascade
from common.batch import Batch, Sample
from common.boxes import select_detections
from common.cascade import Cascade, MaskHead
from common.labels import Vocabulary
from common.masks import crop_masks

FOLDER = Path(
    os.environ.get("CONCORD_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity")
)
WORST: dict[str, float] = {}


def case(name: str):
    """(tensors, record) of one recorded case; skips where it is absent."""
    if not (FOLDER / f"{name}.safetensors").is_file():
        pytest.skip(
            f"no {name}.safetensors in {FOLDER}; CONCORD_PARITY names the folder of recorded tensors"
        )
    return load_file(FOLDER / f"{name}.safetensors"), json.loads(
        (FOLDER / f"{name}.json").read_text()
    )


@pytest.fixture(scope="module", autouse=True)
def report():
    """Prints the worst error of each quantity; a test module only needs to import it."""
    yield
    for quantity, error in WORST.items():
        print(f"\n{error:8.1e}  {quantity}", end="")
    WORST.clear()


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
    for (boxes, scores, classes), (others, other_scores, other_classes) in (
        (ours, official),
        (official, ours),
    ):
        box = (boxes[:, None] - others).abs().amax(-1) / length
        error = torch.maximum(box, (scores[:, None] - other_scores).abs())
        error = (
            error.masked_fill(classes[:, None] != other_classes, torch.inf)
            .amin(1)
            .masked_fill(scores <= last, 0)
        )
        WORST[quantity] = max(WORST.get(quantity, 0), float(error.max()))
        assert error.max() <= 1e-4, (
            f"{quantity}: {int((error > 1e-4).sum())} of {len(error)} have no partner"
        )


# -- cascade -----------------------------------------------------------------------------------------------------------

HEAD, LAYERS = "roi_heads.", {"fc1": "1", "fc2": "3", "linear": "embedding"}


def own_name(key: str) -> str:
    """roi_heads.box_predictor.2.cls_score.linear.bias -> classifiers.2.embedding.bias"""
    kind, stage, *rest = key.removeprefix(HEAD).split(".")
    if kind == "mask_head":
        return ".".join([kind, stage, *rest])
    assert kind in ("box_head", "box_predictor")
    path = ["classifiers", stage] if "cls_score" in rest else ["cascade", "stages", stage]
    path += ["box_head"] if kind == "box_head" else []
    return ".".join(path + [LAYERS.get(part, part) for part in rest if part != "cls_score"])


def trained(tensors: dict) -> list[str]:
    """The recorded names of all that box heads, predictors and mask head learn."""
    names = [
        key
        for key in tensors
        if key.startswith(tuple(f"{HEAD}{kind}_" for kind in ("box", "mask")))
    ]
    return [name for name in names if not name.endswith("zs_weight")]


class Recorded(nn.Module):
    """In the place of a backbone or a CenterNet: what was recorded of it, whatever the images."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def normalise(self, images, sizes):
        return images

    def forward(self, *_):
        return self.result


def check_stage(variant: str, k: int, output, tensors: dict) -> None:
    for i, boxes in enumerate(output.boxes):
        check(f"cascade {variant}: boxes", boxes, tensors[f"{variant}.stage{k}.image{i}.boxes"])
    official = tensors[f"{variant}.stage{k}.cls_logits"]
    check(f"cascade {variant}: logits", output.logits, official[:, :-1])
    bias = tensors.get(f"{HEAD}box_predictor.{k}.cls_score.cls_bias", torch.zeros(1))
    assert (
        official[:, -1] == bias
    ).all()  # background has no embedding: nothing is lost with its column
    check(
        f"cascade {variant}: box deltas", output.deltas, tensors[f"{variant}.stage{k}.box_deltas"]
    )


def feed_recorded_draws(monkeypatch, method, tensors: dict, variant: str) -> None:
    """Sampled regions come in the recorded order (the budget is not reached: all are drawn), classes as recorded.

    method: the module whose `sample_federated` is replaced
    """
    images, stages = itertools.count(), itertools.count()
    match = common.cascade.match_regions

    def recorded_match(boxes, truth, iou, sample):
        boxes, targets = match(boxes, truth, iou, sample)
        if sample:
            wanted = tensors[f"{variant}.sampled{next(images)}.boxes"]
            assert sorted(boxes.tolist()) == sorted(wanted.tolist())
            order = (wanted[:, None] - boxes).abs().amax(-1).argmin(1)
            boxes = boxes[order]
            owner = targets.owner if targets.owner is None else targets.owner[order]
            targets = replace(
                targets, boxes=targets.boxes[order], labels=targets.labels[order], owner=owner
            )
        return boxes, targets

    def recorded_classes(labels, frequency):
        appeared = tensors[f"{variant}.stage{next(stages)}.fed_appeared"]
        assert set(labels[labels >= 0].tolist()) <= set(appeared.tolist())
        return torch.zeros(len(frequency) + 1).index_fill(0, appeared, 1)[
            :-1
        ]  # the last one is background

    monkeypatch.setattr(common.cascade, "match_regions", recorded_match)
    monkeypatch.setattr(method, "sample_federated", recorded_classes)


def recorded_model(monkeypatch, method, **changes):
    """`method`'s own Model with the recorded weights, on the recorded features and proposals; the recording.

    method: a method file; changes: to its Args. The model also holds the features, images and sizes, and the mask head
    even where the method has none.
    """
    tensors, record = case("detic_roi")
    config = {key.rpartition(".")[2]: value for key, value in record["config"].items()}
    monkeypatch.setattr(Cascade, "ious", config["IOUS"])
    monkeypatch.setattr(Cascade, "box_weights", config["BBOX_REG_WEIGHTS"])
    monkeypatch.setattr(Cascade, "strides", list(config["feature_strides"].values()))
    features = [
        tensors[f"features.{level}"].requires_grad_() for level in config["feature_strides"]
    ]
    sizes = [tuple(size) for size in config["image_sizes_hw"]]
    proposals = [
        (tensors[f"proposals{i}.boxes"], tensors[f"proposals{i}.scores"]) for i in range(len(sizes))
    ]
    monkeypatch.setattr(method, "Backbone", lambda *_: Recorded(features))
    monkeypatch.setattr(method, "CenterNet", lambda *_, **__: Recorded((proposals, {})))
    monkeypatch.setattr(
        method, "MaskHead", lambda channels: MaskHead(channels, config["NUM_CONV"]), raising=False
    )
    args = method.Args(
        tau=1 / config["NORM_TEMP"], cls_bias=config["USE_BIAS"], channels=config["feature_channels"],
        fc_dim=config["FC_DIM"], rois_per_image=config["BATCH_SIZE_PER_IMAGE"], amp="off", **changes,
    )  # fmt: skip
    text = F.normalize(tensors["zs_weight_raw"])
    model = method.Model(args, text, pretrained=False)
    if not hasattr(model, "mask_head"):
        model.mask_head = MaskHead(args.channels, config["NUM_CONV"])
    model.load_state_dict(
        {own_name(key): tensors[key] for key in trained(tensors)} | {"text": text}
    )
    model.features, model.sizes = features, sizes
    model.images = torch.zeros(len(sizes), 3, *config["padded_hw"], dtype=torch.uint8)
    return model, tensors, record, config


def check_targets(
    variant: str, outputs: list, tensors: dict, num_classes: int, places: torch.Tensor
) -> None:
    """What supervises the regions. places: (recorded classes + 1,) label of each class, num_classes of background."""
    for k, output in enumerate(outputs):
        for i, targets in enumerate(output.targets):
            prefix = f"{variant}.stage{k}.image{i}"
            labels = places[tensors[f"{prefix}.gt_classes"]]
            fg = labels < num_classes
            assert torch.equal(targets.labels, labels.masked_fill(~fg, -1))
            if fg.any():
                assert torch.equal(targets.boxes[fg], tensors[f"{prefix}.gt_boxes"][fg])
    for i, (boxes, targets) in enumerate(zip(outputs[0].boxes, outputs[0].targets)):
        fg, prefix = boxes[targets.labels >= 0], f"{variant}.mask.image{i}"
        check(f"cascade {variant}: boxes with masks", fg, tensors[f"{prefix}.boxes"])
        wanted = tensors[f"{prefix}.targets"].bool()
        owner = targets.owner[targets.labels >= 0]
        assert torch.equal(crop_masks(targets.masks, fg, wanted.shape[-1], owner), wanted)


def check_cascade_gradients(variant: str, model, tensors: dict, record: dict) -> None:
    """After backward(): gradients of heads and features, and their norms, where they were recorded."""
    own, prefix = dict(model.named_parameters()), f"{variant}.grad."
    stored = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    features = dict(
        zip((f"features.{level}" for level in record["config"]["feature_strides"]), model.features)
    )
    heads = {key: stored[key] for key in trained(stored)}
    if heads:
        ours = {key: own[own_name(key)] for key in heads}
        check_gradients(f"cascade {variant}: gradients of the heads", ours, heads)
    maps = {key: stored[key] for key in features}
    check_gradients(f"cascade {variant}: gradients of the features", features, maps)
    assert stored.keys() == heads.keys() | maps.keys()
    norms = record[variant].get("grad_norms", {})
    assert not norms or {own_name(HEAD + key) for key in norms} == own.keys()
    for key, norm in norms.items():
        check(
            f"cascade {variant}: gradient norms", own[own_name(HEAD + key)].grad.norm(), norm, 1e-3
        )


def check_inference(monkeypatch, method, variant: str) -> None:
    """`predict` of a method file on what was recorded: stages, boxes, scores, detections, their masks."""
    one_class = variant == "infer_one_class"
    model, tensors, record, config = recorded_model(
        monkeypatch, method, one_class_per_proposal=one_class
    )
    config |= {
        key.rpartition(".")[2]: value
        for key, value in zip(*[iter(record[variant]["overrides"])] * 2)
    }
    assert config.get("ONE_CLASS_PER_PROPOSAL", False) == one_class
    given = []

    def recording_select(boxes, scores, one_class):
        given.append((boxes, scores))
        return select_detections(
            boxes, scores, one_class, config["SCORE_THRESH_TEST"], config["DETECTIONS_PER_IMAGE"]
        )

    monkeypatch.setattr(method, "select_detections", recording_select)
    monkeypatch.setattr(
        common.boxes, "batched_nms", lambda *a: batched_nms(*a[:3], config["NMS_THRESH_TEST"])
    )
    samples = [
        Sample.unlabelled(image[:, :h, :w], "any", 0, 0)
        for image, (h, w) in zip(model.images, model.sizes)
    ]
    vocabulary = Vocabulary("any", tuple(map(str, range(len(model.text)))))
    found = method.predict(model, Batch(model.images, model.sizes, samples), vocabulary)
    with torch.no_grad():
        proposals, _ = model.centernet()
        outputs = model.cascade(
            model.features, [boxes for boxes, _ in proposals], model.sizes, None, 0
        )
        for k, output in enumerate(outputs):
            output.logits = model.classifiers[k](output.hidden, model.text)[1]
            check_stage(variant, k, output, tensors)
    for i, ((boxes, scores), detections) in enumerate(zip(given, found, strict=True)):
        official = {
            key: tensors[f"{variant}.image{i}.{key}"] for key in ("boxes", "scores", "classes")
        }
        unclipped, all_scores = (
            tensors[f"{variant}.image{i}.{key}"] for key in ("all_boxes", "all_scores")
        )
        check(
            f"cascade {variant}: final boxes", boxes, clip_boxes_to_image(unclipped, model.sizes[i])
        )
        all_scores = all_scores[:, :-1]
        if one_class:  # recorded after the choice of one class, ours before it
            assert torch.equal(scores.argmax(1), all_scores.argmax(1))
            scores, all_scores = scores.amax(1), all_scores.amax(1)
        check(f"cascade {variant}: scores", scores, all_scores)
        assert len(detections["scores"]) == record[variant]["num_detections"][i]
        assert (detections["scores"].diff() <= 0).all()
        ours = [detections[key] for key in ("boxes", "scores", "labels")]
        masks = model.mask_head(
            [f[i : i + 1] for f in model.features], [official["boxes"]]
        ).sigmoid()
        check(
            f"cascade {variant}: masks of the final boxes",
            masks,
            tensors[f"{variant}.image{i}.masks28"][:, 0],
        )
        check_sets(
            f"cascade {variant}: detections", ours, list(official.values()), max(model.sizes[i])
        )
