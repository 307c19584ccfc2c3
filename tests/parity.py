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

import common.cascade

FOLDER = Path(os.environ.get("CONCORD_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity"))
WORST: dict[str, float] = {}


def case(name: str):
    """(tensors, record) of one recorded case; skips where it is absent."""
    if not (FOLDER / f"{name}.safetensors").is_file():
        pytest.skip(f"no {name}.safetensors in {FOLDER}; CONCORD_PARITY names the folder of recorded tensors")
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())


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
    for (boxes, scores, classes), (others, other_scores, other_classes) in ((ours, official), (official, ours)):
        box = (boxes[:, None] - others).abs().amax(-1) / length
        error = torch.maximum(box, (scores[:, None] - other_scores).abs())
        error = error.masked_fill(classes[:, None] != other_classes, torch.inf).amin(1).masked_fill(scores <= last, 0)
        WORST[quantity] = max(WORST.get(quantity, 0), float(error.max()))
        assert error.max() <= 1e-4, f"{quantity}: {int((error > 1e-4).sum())} of {len(error)} have no partner"


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
    names = [key for key in tensors if key.startswith(tuple(f"{HEAD}{kind}_" for kind in ("box", "mask")))]
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
    assert (official[:, -1] == bias).all()  # background has no embedding: nothing is lost with its column
    check(f"cascade {variant}: box deltas", output.deltas, tensors[f"{variant}.stage{k}.box_deltas"])


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
            fg = targets.labels >= 0
            masks = targets.masks  # of the foreground
            masks = masks if masks is None else masks[(fg.cumsum(0) - 1)[order[fg[order]]]]
            boxes = boxes[order]
            targets = replace(targets, boxes=targets.boxes[order], labels=targets.labels[order], masks=masks)
        return boxes, targets

    def recorded_classes(labels, frequency):
        appeared = tensors[f"{variant}.stage{next(stages)}.fed_appeared"]
        assert set(labels[labels >= 0].tolist()) <= set(appeared.tolist())
        return torch.zeros(len(frequency) + 1).index_fill(0, appeared, 1)[:-1]  # the last one is background

    monkeypatch.setattr(common.cascade, "match_regions", recorded_match)
    monkeypatch.setattr(method, "sample_federated", recorded_classes)
