"""Masks: the pixels of pycocotools, and the crops and pastes that detectron2 makes."""

import json
import os
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from conftest import REAL
from safetensors.torch import load_file
from torch.nn import functional as F

from common.batch import Sample
from common.inference import draw_predictions, predict_dataset, predict_files
from common.labels import Vocabulary
from common.masks import area_of, crop_masks, decode_masks, encode_masks, paste_masks
from common.visualize import save_image

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools
PARITY = Path(
    os.environ.get("CONCORD_PARITY", Path(__file__).resolve().parents[2] / "shared" / "parity")
)


def recorded(name: str) -> dict:
    if not (PARITY / f"{name}.safetensors").is_file():
        pytest.skip(
            f"no {name}.safetensors in {PARITY}; CONCORD_PARITY names the folder of recorded tensors"
        )
    return load_file(PARITY / f"{name}.safetensors")


def pixels_of_pycocotools(segmentation, height, width):
    rle = segmentation
    if isinstance(segmentation, list):
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = pycocotools.mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(pycocotools.mask.decode(rle)).bool()


def random_polygons(rng, height, width):
    """One to three polygons, some partly outside."""
    sides = [[width, height] * rng.integers(3, 10) for _ in range(rng.integers(1, 4))]
    return [(rng.uniform(-0.2, 1.2, len(side)) * side).round(2).tolist() for side in sides]


def uncompressed(mask):
    flat = np.concatenate([[0], mask.numpy().T.ravel(), [1 - int(mask[-1, -1])]]).astype(int)
    ends = np.flatnonzero(np.diff(flat) != 0)
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


@pytest.mark.parametrize("seed", range(3))
def test_decode_equals_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 120, 2).tolist()
    polygons = [random_polygons(rng, height, width) for _ in range(8)]
    expected = torch.stack([pixels_of_pycocotools(p, height, width) for p in polygons])
    assert 0.02 < expected.float().mean() < 0.9
    for kind in (polygons, encode_masks(expected), [uncompressed(mask) for mask in expected]):
        decoded = decode_masks(kind, (height, width))
        assert decoded.dtype == torch.bool and torch.equal(decoded, expected)
        assert all(
            torch.equal(decoded[i], pixels_of_pycocotools(s, height, width))
            for i, s in enumerate(kind)
        )


def test_encode_equals_pycocotools():
    masks = torch.rand(5, 33, 47) < torch.tensor([0, 0.1, 0.5, 0.9, 1]).view(5, 1, 1)
    for mask, rle in zip(masks, encode_masks(masks)):
        oracle = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert area_of(rle) == mask.sum()
        assert rle == {"size": [33, 47], "counts": oracle["counts"].decode()}
    assert torch.equal(decode_masks(json.loads(json.dumps(encode_masks(masks))), (33, 47)), masks)


def test_nothing():
    assert decode_masks([], (4, 5)).shape == (0, 4, 5)
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []
    assert crop_masks(torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(0, 4), 7).shape == (
        0,
        7,
        7,
    )
    assert paste_masks(torch.zeros(0, 7, 7), torch.zeros(0, 4), (4, 5)).shape == (0, 4, 5)
    assert not decode_masks([[], [[1.0, 1.0, 3.0, 3.0]]], (4, 5)).any()  # no polygon, a line


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 4], "counts": "0"}, r"an RLE of size \[5, 4\] for an image of \[4, 5\]"),
        ({"size": [4, 5], "counts": [10, 20]}, "exceed"),
        ({"size": [4, 5], "counts": [10, 9]}, "sum to less than 4 x 5 pixels"),
        ({"size": [4, 5], "counts": "!!!\x7fabc"}, "invalid RLE"),
        ({"size": [4, 5], "counts": "PPP"}, "sum to less"),
        ({"size": [4, 5], "counts": "o0"}, "exceed"),
        ([[[1, 1], [3, 1], [3, 3]]], "neither .* flat list of numbers"),
        ([[[1, 1]] * 6], "neither"),
        ({"counts": "0"}, "neither a list of polygons nor an RLE"),
        ([1, 2, 3, 4, 5, 6], r"\[1, 2, 3, 4, 5, 6\] is neither"),
        ([["a"] * 6], "neither"),
        (None, "None is neither"),
    ],
)
def test_wrong_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_masks([segmentation], (4, 5))


def test_one_pixel():
    assert (
        decode_masks(
            [{"size": [1, 1], "counts": counts} for counts in ([1], [0, 1], "1")], (1, 1)
        ).sum()
        == 1
    )


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data samples are not here")
def test_decode_real_coco():
    record = json.loads((REAL / "coco/annotations/instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in record["images"]}
    for a in record["annotations"]:
        mask = decode_masks([a["segmentation"]], sizes[a["image_id"]])[0]
        assert torch.equal(mask, pixels_of_pycocotools(a["segmentation"], *sizes[a["image_id"]]))


# ------------------------------------------------------------------------------------------------- crops and pastes


def test_crop_of_whole_pixels():
    mask = torch.rand(1, 8, 8) < 0.5
    assert torch.equal(crop_masks(mask, torch.tensor([[0.0, 0, 8, 8]]), 8), mask)
    assert torch.equal(crop_masks(mask, torch.tensor([[2.0, 1, 6, 5]]), 4), mask[:, 1:5, 2:6])


def test_crop_of_shared_masks():
    masks, rows = torch.rand(3, 20, 30) < 0.5, torch.tensor([2, 0, 0, 1])
    boxes = torch.tensor([[1.5, 2, 20, 11], [0, 0, 30, 20], [-4, 3, 9, 25], [3, 3, 3, 3]])
    assert torch.equal(crop_masks(masks, boxes, 7, rows), crop_masks(masks[rows], boxes, 7))


def paste_on_the_whole_image(probability, box, height, width):
    x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    points = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    return F.grid_sample(probability[None, None], points[None], align_corners=False)[0, 0] >= 0.5


def test_paste_equals_sampling_the_whole_image():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, generator=generator) * torch.tensor([90.0, 60.0]) - 15
    boxes = torch.cat([corners, corners + torch.rand(40, 2, generator=generator) * 60 + 0.1], dim=1)
    probabilities = torch.rand(40, 14, 14, generator=generator)
    pasted = paste_masks(probabilities, boxes, (50, 70))
    expected = [paste_on_the_whole_image(p, b, 50, 70) for p, b in zip(probabilities, boxes)]
    assert (
        pasted.dtype == torch.bool and torch.equal(pasted, torch.stack(expected)) and pasted.any()
    )


def test_paste_of_broken_boxes():
    boxes = torch.tensor(
        [[float("nan")] * 4, [5, 5, 5, 5], [9, 9, 2, 2], [-9, -9, -1, -1], [99, 0, 120, 9]]
    )
    assert not paste_masks(torch.ones(5, 7, 7), boxes, (10, 20)).any()


def test_paste_threshold():
    probabilities = torch.full((1, 4, 4), 0.7)
    inside = (slice(None), slice(4, 8), slice(4, 8))  # away from the border, where the values fade
    assert paste_masks(probabilities, torch.tensor([[2.0, 2, 10, 10]]), (12, 12), 0.6)[inside].all()
    assert not paste_masks(probabilities, torch.tensor([[2.0, 2, 10, 10]]), (12, 12), 0.8).any()


@pytest.mark.parametrize("variant", ["train_plain", "train_fed", "train_dynamic"])
def test_parity_crop_masks(variant):
    tensors, image = recorded("detic_roi"), 0
    while f"gt{image}.masks" in tensors:
        sampled = f"{variant}.sampled{image}"
        foreground = tensors[f"{sampled}.gt_classes"] < len(tensors["zs_weight_raw"])
        truth = tensors[f"{sampled}.gt_boxes"][foreground]
        rows = (truth[:, None] == tensors[f"gt{image}.boxes"]).all(dim=2).int().argmax(dim=1)
        boxes, targets = (
            tensors[f"{variant}.mask.image{image}.{name}"] for name in ("boxes", "targets")
        )
        assert torch.equal(boxes, tensors[f"{sampled}.boxes"][foreground])
        ours = crop_masks(tensors[f"gt{image}.masks"].bool(), boxes, targets.shape[-1], rows)
        assert torch.equal(ours, targets.bool())
        image += 1
    assert image


def test_parity_paste_masks():
    tensors = recorded("detic_whole_model")
    masks = tensors["post0.masks"].bool()
    probabilities, boxes = (
        tensors["det0.masks28"][: len(masks), 0],
        tensors["post0.boxes"][: len(masks)],
    )
    assert torch.equal(paste_masks(probabilities, boxes, masks.shape[1:]), masks)


# ---------------------------------------------------------------------------------------------------------- inference

VOCABULARY = Vocabulary("hand", ("cat", "dog"), (17, 18))
MASKS = torch.zeros(2, 40, 60, dtype=torch.bool)
MASKS[0, 5:20, 10:30], MASKS[1, 30:35, 40:55] = True, True


class Hand:
    """Two images with both masks each."""

    name, vocabulary = "hand", VOCABULARY

    def __len__(self):
        return 2

    def load(self, i):
        return Sample.unlabelled(torch.full((3, 40, 60), 128, dtype=torch.uint8), "hand", i, i)


def detect(batch):
    """Everything is a cat and a dog; the boxes are not those of the masks."""
    boxes = torch.tensor([[10.0, 5, 30, 20], [40.0, 30, 59, 39]])
    found = {
        "boxes": boxes,
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.9, 0.1]),
        "masks": MASKS,
    }
    return [found | {"class_names": ["cat", "dog"], "size": s.original_size} for s in batch.samples]


def test_dataset_predictions_keep_rles(tmp_path):
    predictions = predict_dataset(detect, Hand(), lambda sample: sample, 0, "hand")
    assert sorted(predictions) == [0, 1] and all(
        "masks" not in found for found in predictions.values()
    )
    assert torch.equal(decode_masks(predictions[1]["segmentations"], (40, 60)), MASKS)
    assert predictions[0]["class_names"] == ["cat", "dog"]
    draw_predictions(Hand(), predictions, tmp_path, "a set", 0.5)
    assert (tmp_path / "predictions-a-set.jpg").is_file()


@pytest.mark.parametrize("masked", [True, False])
def test_file_predictions_have_masks(tmp_path, masked):
    def predict(batch):
        return [
            {k: v for k, v in found.items() if masked or k != "masks"} for found in detect(batch)
        ]

    save_image(Hand().load(0).image, tmp_path / "in.png")
    predict_files(
        predict, (str(tmp_path / "in.png"),), VOCABULARY, lambda sample: sample, tmp_path, 0.5
    )
    cat, dog = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    assert [cat["category_id"], dog["category_id"]] == [17, 18]
    assert [cat["area"], dog["area"]] == ([300, 75] if masked else [300, 171]) and (
        "segmentation" in dog
    ) == masked
    if masked:
        assert torch.equal(
            decode_masks([cat["segmentation"], dog["segmentation"]], (40, 60)), MASKS
        )
    assert (tmp_path / "in-0.jpg").is_file()
