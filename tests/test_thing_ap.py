"""AP of the things of a panoptic dataset: against its own segments, and the published instances."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import load_datasets
from common.inference import evaluate_dataset
from common.tables import Scores
from common.thing_ap import instances_of, thing_masks, things_of

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 2, "name": "bicycle", "isthing": 1},
    {"id": 199, "name": "wall-other-merged", "isthing": 0},
]


def box_of(left: int, right: int) -> np.ndarray:
    """(20, 40) bool: the columns from left to right."""
    mask = np.zeros((20, 40), bool)
    mask[5:15, left:right] = True
    return mask


THINGS = {(1, 10): (0, 12), (1, 20): (2, 10), (2, 10): (20, 36)}  # (image, segment): columns


@pytest.fixture
def root(tmp_path):
    """Two images of COCO: wall with people (1) and a bicycle (2); image 2 has one person."""
    folder = tmp_path / "coco/annotations/panoptic_val2017"
    folder.mkdir(parents=True)
    (tmp_path / "coco/val2017").mkdir()
    images, panoptic = [], []
    for number in (1, 2):
        colours = np.full((20, 40), 5)
        segments = [{"id": 5, "category_id": 199, "bbox": [0, 0, 40, 20], "area": 800}]
        for (image, id), (left, right) in THINGS.items():
            if image == number:
                colours[box_of(left, right)] = id
                part = {"id": id, "category_id": 1 + (id == 20), "area": 10 * (right - left)}
                segments.append(part | {"bbox": [left, 5, right - left, 10], "iscrowd": 0})
        pixels = np.stack([colours, 0 * colours, 0 * colours], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(pixels).save(tmp_path / f"coco/val2017/{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 20, "width": 40})
        entry = {"image_id": number, "file_name": f"{number}.png"}
        panoptic.append(entry | {"segments_info": segments})
    record = {"images": images, "annotations": panoptic, "categories": CATEGORIES}
    (folder.parent / "panoptic_val2017.json").write_text(json.dumps(record))
    return tmp_path


def write_instances(root, images: int = 2, classes: int = 2) -> None:
    """The instances overlap: the first person of image 1 goes on behind the bicycle."""
    annotations = []
    for (image, id), (left, right) in THINGS.items():
        corners = [left, 5, right, 5, right, 15, left, 15]
        part = {"id": len(annotations) + 1, "image_id": image, "category_id": 1 + (id == 20)}
        part |= {"segmentation": [corners], "area": 10 * (right - left), "iscrowd": 0}
        annotations.append(part | {"bbox": [left, 5, right - left, 10]})
    rows = [{"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 40} for i in (2, 1)]
    record = {"images": rows[-images:], "annotations": annotations}
    record["annotations"] = [a for a in annotations if a["image_id"] in (1, 2)[:images]]
    record["categories"] = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES[:classes]]
    file = root / "coco/annotations/instances_val2017.json"
    file.write_text(json.dumps(record))


def load(root):
    return load_datasets("coco-panoptic", "val", str(root), accepts=("panoptic",))[0]


def scores_of(root, tmp_path, masks: dict) -> Scores:
    """The scores of predictions. masks: {(image, label): (20, 40) mask}, of score 0.9"""
    dataset = load(root)

    def predict(batch):
        sample = batch.samples[0]
        own = {label: m for (image, label), m in masks.items() if image == sample.image_id}
        things = {
            "boxes": torch.zeros(len(own), 4),
            "labels": torch.tensor(list(own), dtype=torch.long),
            "scores": torch.full((len(own),), 0.9),
            "masks": torch.from_numpy(np.array(list(own.values()), bool).reshape(-1, 20, 40)),
        }
        empty = torch.zeros(20, 40, dtype=torch.int32)
        found = {"semantic": empty, "panoptic": empty, "segments_info": [], "things": things}
        return [found | {"size": (20, 40)}]

    class Args:
        workers, data_root, score_threshold = 0, str(root), 0.3

    results = evaluate_dataset(predict, dataset, lambda sample: sample, Args, tmp_path)
    return results["coco-panoptic"]


def evaluated(root, tmp_path, masks: dict) -> float:
    """AP things of the predictions of `scores_of`."""
    return scores_of(root, tmp_path, masks)["AP things"]


BEHIND = box_of(0, 12)  # the person without the hole that the bicycle makes
HOLE = box_of(0, 12) & ~box_of(2, 10)
BICYCLE = box_of(2, 10)
SECOND = box_of(20, 36)


def test_against_the_segments_themselves(root, tmp_path):
    perfect = {(1, 0): HOLE, (1, 1): BICYCLE, (2, 0): SECOND}
    assert evaluated(root, tmp_path, perfect) == pytest.approx(1)
    whole = perfect | {(1, 0): BEHIND}  # IoU 1/3 with the segment
    # it comes before the other person: half the precision at half the recall
    assert evaluated(root, tmp_path, whole) == pytest.approx((0.5 * 51 / 101 + 1) / 2)


def test_each_thing_has_its_ap(root, tmp_path):
    """The bicycle is not found; stuff has none."""
    scores = scores_of(root, tmp_path, {(1, 0): HOLE, (2, 0): SECOND})
    column = scores.classes["mask AP"]
    assert column == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert np.nanmean(column) == pytest.approx(scores["AP things"])


def test_against_the_published_instances(root, tmp_path, caplog):
    """They overlap, and their images are in another order."""
    write_instances(root)
    assert instances_of(load(root), str(root)).name == "coco"
    perfect = {(1, 0): BEHIND, (1, 1): BICYCLE, (2, 0): SECOND}
    assert evaluated(root, tmp_path, perfect) == pytest.approx(1)
    assert evaluated(root, tmp_path, perfect | {(1, 0): HOLE}) < 0.9


def test_instances_of_other_images_or_classes_are_not_taken(root):
    assert instances_of(load(root), str(root)) is None  # there are none
    write_instances(root, images=1)
    assert instances_of(load(root), str(root)) is None
    write_instances(root, classes=1)
    with pytest.raises(Exception, match="category_id 2"):
        instances_of(load(root), str(root))
    write_instances(root)
    own = replace(load(root), name="mine")
    assert instances_of(own, str(root)) is None


def test_things_and_their_masks(root):
    dataset = load(root)
    assert things_of(dataset).ids == (1, 2)
    truth = dataset.load(0, keep_ignored=True)
    masks = thing_masks(truth, dataset.vocabulary.is_thing)
    assert [mask is not None for mask in masks] == [False, True, True]


def test_no_things_no_ap(root, tmp_path):
    file = root / "coco/annotations/panoptic_val2017.json"
    record = json.loads(file.read_text())
    for category in record["categories"]:
        category["isthing"] = 0
    file.write_text(json.dumps(record))
    with pytest.raises(KeyError, match="AP things"):
        evaluated(root, tmp_path, {})
