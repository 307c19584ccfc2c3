"""Masks: the pixels of pycocotools, and the crops and pastes that detectron2 makes."""

import json
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import torch
from conftest import REAL
from parity import case, final_rows, report  # noqa: F401 (a fixture)
from torch.nn import functional as F

from common.batch import Sample
from common.inference import draw_predictions, predict_dataset, predict_files
from common.labels import LabelSpace, Vocabulary
from common.masks import area_of, crop_masks, decode_masks, encode_masks, paste_masks, share_inside
from common.visualize import save_image

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools


def pixels_of_pycocotools(segmentation, height, width):
    """Returns the mask (H, W) bool that pycocotools decodes."""
    rle = segmentation
    if isinstance(segmentation, list):
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = pycocotools.mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(pycocotools.mask.decode(rle)).bool()


def random_polygons(rng, height, width):
    """Returns one to three polygons, some partly outside of the image."""
    sides = [[width, height] * rng.integers(3, 10) for _ in range(rng.integers(1, 4))]
    polygons = []
    for side in sides:
        polygon = rng.uniform(-0.2, 1.2, len(side)) * side
        polygons.append(polygon.round(2).tolist())
    return polygons


def uncompressed(mask):
    """Returns the uncompressed RLE of a mask (H, W)."""
    pixels = mask.numpy().T.ravel()
    flat = np.concatenate([[0], pixels, [1 - int(mask[-1, -1])]]).astype(int)
    ends = np.flatnonzero(np.diff(flat) != 0)
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


@pytest.mark.parametrize("seed", range(3))
def test_decode_equals_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 120, 2).tolist()
    polygons = [random_polygons(rng, height, width) for _ in range(8)]
    expected = torch.stack([pixels_of_pycocotools(p, height, width) for p in polygons])
    assert 0.02 < expected.float().mean() < 0.9
    runs = [uncompressed(mask) for mask in expected]
    for segmentations in (polygons, encode_masks(expected), runs):
        decoded = decode_masks(segmentations, (height, width))
        assert decoded.dtype == torch.bool
        assert torch.equal(decoded, expected)
        for mask, segmentation in zip(decoded, segmentations):
            assert torch.equal(mask, pixels_of_pycocotools(segmentation, height, width))


def test_encode_equals_pycocotools():
    density = torch.tensor([0, 0.1, 0.5, 0.9, 1]).view(5, 1, 1)
    masks = torch.rand(5, 33, 47) < density
    for mask, rle in zip(masks, encode_masks(masks)):
        oracle = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert area_of(rle) == mask.sum()
        assert rle == {"size": [33, 47], "counts": oracle["counts"].decode()}
    written = json.dumps(encode_masks(masks))
    assert torch.equal(decode_masks(json.loads(written), (33, 47)), masks)


def test_nothing():
    assert decode_masks([], (4, 5)).shape == (0, 4, 5)
    masks = torch.zeros(0, 4, 5, dtype=torch.bool)
    boxes = torch.zeros(0, 4)
    assert encode_masks(masks) == []
    assert crop_masks(masks, boxes, 7).shape == (0, 7, 7)
    assert paste_masks(torch.zeros(0, 7, 7), boxes, (4, 5)).shape == (0, 4, 5)
    no_polygon, line = [], [[1.0, 1.0, 3.0, 3.0]]
    assert not decode_masks([no_polygon, line], (4, 5)).any()


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
        ("x", "x is neither"),
    ],
)
def test_wrong_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_masks([segmentation], (4, 5))


def test_one_pixel():
    rles = [{"size": [1, 1], "counts": counts} for counts in ([1], [0, 1], "1")]
    assert decode_masks(rles, (1, 1)).sum() == 1


def test_share_of_masks_inside_their_truth():
    """A cell counts as much of itself as is in the truth."""
    truth = torch.zeros(3, 2, 3)
    truth[0, :, :2] = torch.tensor([1, 0.5])
    truth[1] = 1
    masks = torch.zeros(5, 2, 3, dtype=torch.bool)
    masks[0, 0, 1] = masks[1, 0] = masks[2, 0] = masks[3, :, 2] = True
    shares = share_inside(masks, truth, torch.tensor([0, 0, 1, 0, 1]))
    assert shares.tolist() == [0.5, 0.5, 1, 0, 0]
    assert share_inside(masks[:0], truth[:0], torch.zeros(0).long()).shape == (0,)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data samples are not here")
def test_decode_real_coco():
    record = json.loads((REAL / "coco/annotations/instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in record["images"]}
    for annotation in record["annotations"]:
        segmentation = annotation["segmentation"]
        size = sizes[annotation["image_id"]]
        [mask] = decode_masks([segmentation], size)
        assert torch.equal(mask, pixels_of_pycocotools(segmentation, *size))


# -- Crops and pastes ------------------------------------------------------------------------------


def test_crop_of_whole_pixels():
    mask = torch.rand(1, 8, 8) < 0.5
    whole = torch.tensor([[0.0, 0, 8, 8]])
    part = torch.tensor([[2.0, 1, 6, 5]])
    assert torch.equal(crop_masks(mask, whole, 8), mask)
    assert torch.equal(crop_masks(mask, part, 4), mask[:, 1:5, 2:6])


@pytest.mark.parametrize("columns, inside", [(9, False), (10, True), (11, True)])
def test_crop_is_inside_from_half_a_cell_on(columns, inside):
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[:, :, :columns] = True
    whole = torch.tensor([[0.0, 0, 20, 20]])
    assert crop_masks(mask, whole, 1).tolist() == [[[inside]]]


def test_crop_of_shared_masks():
    masks = torch.rand(3, 20, 30) < 0.5
    rows = torch.tensor([2, 0, 0, 1])
    boxes = torch.tensor([[1.5, 2, 20, 11], [0, 0, 30, 20], [-4, 3, 9, 25], [3, 3, 3, 3]])
    assert torch.equal(crop_masks(masks, boxes, 7, rows), crop_masks(masks[rows], boxes, 7))


def paste_on_the_whole_image(probability, box, height, width):
    """Returns the mask (H, W) bool of one box, sampled at every pixel of the image."""
    x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([x, y], -1)
    values = F.grid_sample(probability[None, None], points[None], align_corners=False)
    return values[0, 0] >= 0.5


def test_paste_equals_sampling_the_whole_image():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, generator=generator) * torch.tensor([90.0, 60.0]) - 15
    sides = torch.rand(40, 2, generator=generator) * 60 + 0.1
    boxes = torch.cat([corners, corners + sides], 1)
    probabilities = torch.rand(40, 14, 14, generator=generator)
    pasted = paste_masks(probabilities, boxes, (50, 70))
    expected = [paste_on_the_whole_image(p, b, 50, 70) for p, b in zip(probabilities, boxes)]
    assert pasted.dtype == torch.bool
    assert torch.equal(pasted, torch.stack(expected))
    assert pasted.any()


def test_paste_of_broken_boxes():
    boxes = torch.tensor(
        [[float("nan")] * 4, [5, 5, 5, 5], [9, 9, 2, 2], [-9, -9, -1, -1], [99, 0, 120, 9]]
    )
    assert not paste_masks(torch.ones(5, 7, 7), boxes, (10, 20)).any()


def test_paste_threshold():
    probabilities = torch.full((1, 4, 4), 0.7)
    box = torch.tensor([[2.0, 2, 10, 10]])
    pasted = paste_masks(probabilities, box, (12, 12), 0.6)
    assert pasted[:, 4:8, 4:8].all()  # away from the border, where the values fade
    assert not paste_masks(probabilities, box, (12, 12), 0.8).any()


@pytest.mark.parametrize("variant", ["train_plain", "train_fed", "train_dynamic"])
def test_parity_crop_masks(variant):
    tensors, record = case("detic_roi")
    num_classes = len(tensors["zs_weight_raw"])
    images = range(len(record["config"]["image_sizes_hw"]))
    for image in images:
        sampled = f"{variant}.sampled{image}"
        fg = tensors[f"{sampled}.gt_classes"] < num_classes
        if not len(tensors[f"gt{image}.boxes"]):
            assert not fg.any()
            continue
        gt_boxes = tensors[f"{sampled}.gt_boxes"][fg]
        same = (gt_boxes[:, None] == tensors[f"gt{image}.boxes"]).all(2)
        rows = same.int().argmax(1)
        boxes = tensors[f"{variant}.mask.image{image}.boxes"]
        targets = tensors[f"{variant}.mask.image{image}.targets"]
        assert torch.equal(boxes, tensors[f"{sampled}.boxes"][fg])
        masks = tensors[f"gt{image}.masks"].bool()
        assert torch.equal(crop_masks(masks, boxes, targets.shape[-1], rows), targets.bool())


def test_parity_paste_masks():
    tensors, record = case("detic_whole_model")
    for image in range(len(record["config"]["image_sizes_hw"])):
        masks = tensors[f"post{image}.masks"].bool()
        kept = final_rows(tensors, image)[: len(masks)]
        probabilities = tensors[f"det{image}.masks28"][kept, 0]
        boxes = tensors[f"post{image}.boxes"][: len(masks)]
        assert torch.equal(paste_masks(probabilities, boxes, masks.shape[1:]), masks)


# -- Inference -------------------------------------------------------------------------------------

VOCABULARY = Vocabulary("hand", ("cat", "dog"), (17, 18))
MASKS = torch.zeros(2, 40, 60, dtype=torch.bool)
MASKS[0, 5:20, 10:30] = True
MASKS[1, 30:35, 40:55] = True


class Hand:
    """A dataset of two grey images."""

    name = "hand"
    vocabulary = VOCABULARY

    def __len__(self):
        return 2

    def load(self, i, keep_ignored=False):
        grey = torch.full((3, 40, 60), 128, dtype=torch.uint8)
        return Sample.unlabelled(grey, "hand", i, i)


def detect(batch):
    """Detects a cat and a dog in every image. The boxes do not fit the masks."""
    boxes = torch.tensor([[10.0, 5, 30, 20], [40.0, 30, 59, 39]])
    found = {
        "boxes": boxes,
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.9, 0.1]),
        "masks": MASKS,
    }
    found["class_names"] = ["cat", "dog"]
    return [found | {"size": sample.original_size} for sample in batch.samples]


def test_dataset_predictions_keep_rles(tmp_path):
    predictions = predict_dataset(detect, Hand(), lambda sample: sample, 0, "hand")
    assert sorted(predictions) == [0, 1]
    for found in predictions.values():
        assert "masks" not in found
    assert torch.equal(decode_masks(predictions[1]["segmentations"], (40, 60)), MASKS)
    assert predictions[0]["class_names"] == ["cat", "dog"]
    draw_predictions(Hand(), predictions, tmp_path, "a set", 0.5)
    assert (tmp_path / "predictions-a-set.jpg").is_file()


@pytest.mark.parametrize("masked", [True, False])
def test_file_predictions_have_masks(tmp_path, masked):
    def predict(batch, label_space):
        detections = detect(batch)
        for found in detections:
            if not masked:
                del found["masks"]
        return detections

    path = tmp_path / "in.png"
    save_image(Hand().load(0).image, path)
    args = SimpleNamespace(predict=(str(path),), score_threshold=0.5)
    predict_files(predict, args, LabelSpace([VOCABULARY]), lambda sample: sample, tmp_path)
    cat, dog = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    assert [cat["category_id"], dog["category_id"]] == [17, 18]
    assert [cat["area"], dog["area"]] == ([300, 75] if masked else [300, 171])
    assert ("segmentation" in dog) == masked
    if masked:
        segmentations = [cat["segmentation"], dog["segmentation"]]
        assert torch.equal(decode_masks(segmentations, (40, 60)), MASKS)
    assert (tmp_path / "in-0.jpg").is_file()
