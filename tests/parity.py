"""What the tests against tensors recorded from official implementations share.

These are the recordings and their comparison. CONCORD_PARITY names the folder.
"""

import itertools
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

import common.boxes
import common.cascade
from common.batch import Batch, Sample
from common.boxes import have_area, select_detections
from common.cascade import Cascade, MaskHead
from common.labels import LabelSpace, Vocabulary
from common.masks import crop_masks
from common.targets import RegionTargets

FOLDER = Path(
    os.environ.get("CONCORD_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity")
)
WORST: dict[str, float] = {}


def restore(mask_logits, padded, size, original):
    """Resizes mask logits (Q, h, w) as Mask2Former does: to the input, cut, and to the file."""
    full = F.interpolate(mask_logits[None].float(), padded, mode="bilinear", align_corners=False)
    cut = full[..., : size[0], : size[1]]
    return F.interpolate(cut, original, mode="bilinear", align_corners=False)[0]


def case(name: str):
    """(tensors, record) of one recorded case; skips where it is absent."""
    file = FOLDER / f"{name}.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}; CONCORD_PARITY names the folder of recorded tensors")
    return load_file(file), json.loads(file.with_suffix(".json").read_text())


def listings(file: str) -> list:
    """Returns a parameter for each recorded list of official keys, or one that is skipped.

    A list maps the key of each tensor to its facts: `shape`, `dtype` and `kind`.
    """
    path = FOLDER / file
    if not path.is_file():
        reason = f"no {path}; CONCORD_PARITY names the folder of recorded tensors"
        return [pytest.param({}, marks=pytest.mark.skip(reason=reason))]
    record = json.loads(path.read_text())
    return [pytest.param(facts, id=Path(title).stem) for title, facts in record.items()]


def without_data(listing: dict) -> dict:
    """Returns the tensors of a list of official keys. They have shapes alone."""
    return {key: torch.empty(facts["shape"], device="meta") for key, facts in listing.items()}


@pytest.fixture(scope="module", autouse=True)
def report():
    """Prints the worst error of each quantity; a test module only needs to import it."""
    yield
    for quantity, error in WORST.items():
        print(f"\n{error:8.1e}  {quantity}", end="")
    WORST.clear()


def check(quantity: str, ours, official, tolerance: float = 1e-4, floor: float = 1e-9) -> None:
    """max |ours - official| is within `tolerance` of max |official|.

    floor: what takes the place of max |official| if that is smaller
    """
    ours, official = (torch.as_tensor(x).detach().double() for x in (ours, official))
    assert ours.shape == official.shape, quantity
    if official.numel():
        error = float((ours - official).abs().max() / official.abs().max().clamp(min=floor))
        WORST[quantity] = max(WORST.get(quantity, 0), error)
        assert error <= tolerance, f"{quantity}: relative error {error:.1e}"


def check_gradients(quantity: str, ours: dict, official: dict) -> None:
    """Gradients by official name. Those that are 0 up to rounding are measured by the others."""
    floor = 1e-3 * max(float(g.abs().max()) for g in official.values())
    for name, gradient in official.items():
        got = torch.zeros_like(gradient) if ours[name].grad is None else ours[name].grad
        check(quantity, got, gradient, 1e-3, floor)


def check_sets(quantity: str, ours: list, official: list, length: float) -> None:
    """Rows (boxes, scores, classes) as sets: each has its partner.

    A row within rounding of the last score may lack one.
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


def drawn_weights(record: dict, tensors: dict | None = None) -> dict:
    """Returns the official state dict that the recipe of a whole model describes.

    Unused tensors have their names alone. tensors: the recording, for those that it stores
    """
    state = {}
    for key, recipe in record["weights"].items():
        if recipe.get("stored_as"):
            state[key] = tensors[recipe["stored_as"]]
        elif recipe.get("ignored") or ".base.fc." in key:
            state[key] = torch.tensor(0)
        else:
            shape = recipe["shape"]
            draws = np.random.RandomState(recipe["seed"]).standard_normal(int(np.prod(shape)))
            values = (recipe["offset"] + recipe["scale"] * draws).astype(np.float32)
            state[key] = torch.from_numpy(values.reshape(shape))
    for key, first in record["first_values_check"].items():
        assert state[key].flatten()[: len(first)].tolist() == first
    return state


def final_rows(tensors: dict, image: int) -> torch.Tensor:
    """Returns the rows of detections that detectron2 keeps in the end: boxes that have area."""
    return have_area(tensors[f"det{image}.boxes"]).nonzero().flatten()


# -- cascade ---------------------------------------------------------------------------------------

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


def check_stage(variant: str, k: int, stage, logits, tensors: dict) -> None:
    """The regions and the outputs of stage k. logits: (R, C)"""
    for i, boxes in enumerate(stage.boxes):
        check(f"cascade {variant}: boxes", boxes, tensors[f"{variant}.stage{k}.image{i}.boxes"])
    official = tensors[f"{variant}.stage{k}.cls_logits"]
    check(f"cascade {variant}: logits", logits, official[:, :-1])
    bias = tensors.get(f"{HEAD}box_predictor.{k}.cls_score.cls_bias", torch.zeros(1))
    # background has no embedding: nothing is lost with its column
    assert (official[:, -1] == bias).all()
    deltas = tensors[f"{variant}.stage{k}.box_deltas"]
    check(f"cascade {variant}: box deltas", stage.deltas, deltas)


def feed_recorded_samples(monkeypatch, method, tensors: dict, variant: str) -> None:
    """Feeds the recorded samples of regions and classes.

    Regions come in the recorded order; there are fewer than may be sampled, so that all are.

    method: the module whose `sample_federated` is replaced
    """
    stages = itertools.count()
    match = common.cascade.match_regions

    def recorded_match(boxes, truth, iou, num_samples):
        regions, matched = match(boxes, truth, iou, num_samples)
        if num_samples:
            for i, (boxes, targets) in enumerate(zip(regions, matched)):
                wanted = tensors[f"{variant}.sampled{i}.boxes"]
                assert sorted(boxes.tolist()) == sorted(wanted.tolist())
                order = (wanted[:, None] - boxes).abs().amax(-1).argmin(1)
                regions[i] = boxes[order]
                matched[i] = RegionTargets(
                    targets.boxes[order], targets.labels[order], targets.gt_index[order]
                )
        return regions, matched

    def recorded_classes(labels, frequency):
        appeared = tensors[f"{variant}.stage{next(stages)}.fed_appeared"]
        assert set(labels[labels >= 0].tolist()) <= set(appeared.tolist())
        mask = torch.zeros(len(frequency) + 1).index_fill(0, appeared, 1)
        return mask[:-1]  # the last one is background

    monkeypatch.setattr(common.cascade, "match_regions", recorded_match)
    monkeypatch.setattr(method, "sample_federated", recorded_classes)


def recorded_model(monkeypatch, method, **changes):
    """The Model of `method` with the recorded weights, its label space, and the recording.

    The model sees the recorded features and proposals. It also holds the features, images and
    sizes, and the mask head even where the method has none.
    method: a method file; changes: to its Args
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
    mask_head = partial(MaskHead, num_convs=config["NUM_CONV"])
    monkeypatch.setattr(method, "MaskHead", mask_head, raising=False)
    args = method.Args(
        tau=1 / config["NORM_TEMP"],
        cls_bias=config["USE_BIAS"],
        channels=config["feature_channels"],
        fc_dim=config["FC_DIM"],
        rois_per_image=config["BATCH_SIZE_PER_IMAGE"],
        amp="off",
        **changes,
    )
    text = F.normalize(tensors["zs_weight_raw"])
    names = tuple(map(str, range(len(text))))
    label_space = LabelSpace([Vocabulary("any", names, text=text)])
    model = method.Model(args, label_space, pretrained=False)
    if not hasattr(model, "mask_head"):
        model.mask_head = mask_head(args.channels)
    model.load_state_dict({own_name(key): tensors[key] for key in trained(tensors)})
    model.features, model.sizes = features, sizes
    model.images = torch.zeros(len(sizes), 3, *config["padded_hw"], dtype=torch.uint8)
    return model, label_space, tensors, record, config


def check_targets(
    variant: str, stages: list, truth: list, tensors: dict, num_classes: int, places: torch.Tensor
) -> None:
    """What supervises the regions.

    truth:  the ground truth of each image
    places: (recorded classes + 1,) label of each class, num_classes of background
    """
    for k, stage in enumerate(stages):
        for i, targets in enumerate(stage.targets):
            prefix = f"{variant}.stage{k}.image{i}"
            labels = places[tensors[f"{prefix}.gt_classes"]]
            fg = labels < num_classes
            assert torch.equal(targets.labels, labels.masked_fill(~fg, -1))
            if fg.any():
                assert torch.equal(targets.boxes[fg], tensors[f"{prefix}.gt_boxes"][fg])
                assert torch.equal(truth[i].boxes[targets.gt_index[fg]], targets.boxes[fg])
    for i, (boxes, targets) in enumerate(zip(stages[0].boxes, stages[0].targets)):
        fg, prefix = boxes[targets.labels >= 0], f"{variant}.mask.image{i}"
        check(f"cascade {variant}: boxes with masks", fg, tensors[f"{prefix}.boxes"])
        if f"{prefix}.targets" not in tensors:  # an image without ground truth
            assert not len(truth[i].labels) and not len(fg)
            continue
        wanted = tensors[f"{prefix}.targets"].bool()
        rows = targets.gt_index[targets.labels >= 0]
        assert torch.equal(crop_masks(truth[i].masks, fg, wanted.shape[-1], rows), wanted)


def check_cascade_gradients(variant: str, model, tensors: dict, record: dict) -> None:
    """After backward(): gradients of heads and features, and their norms, if they were recorded."""
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
    """`predict` of a method file on what was recorded.

    Compares stages, boxes, scores, detections and their masks.
    """
    one_class = variant == "infer_one_class"
    model, label_space, tensors, record, config = recorded_model(
        monkeypatch, method, one_class_per_proposal=one_class
    )
    overrides = iter(record[variant]["overrides"])
    config |= {key.rpartition(".")[2]: value for key, value in zip(overrides, overrides)}
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
    batch = Batch(model.images, model.sizes, samples)
    found = method.predict(model, batch, label_space)
    with torch.no_grad():
        proposals, _ = model.centernet()
        stages = model.cascade(model.features, [boxes for boxes, _ in proposals], model.sizes)
        for k, stage in enumerate(stages):
            logits = model.classifiers[k](stage.hidden, label_space.text).logits()
            check_stage(variant, k, stage, logits, tensors)
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
