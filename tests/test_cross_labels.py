"""The labels that objects of one dataset get from another, against cases by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import cross_labels
from common.batch import Sample
from common.cross_labels import (
    Entry,
    choose,
    count_labels,
    cross_counts,
    entries_of,
    format_entries,
    load_method,
    name_boxes,
    strongest,
    write,
)
from common.datasets import load_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])


def found_of(boxes, labels, scores):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores),
    }


def truth_of(labels, **fields):
    sample = Sample.unlabelled(torch.zeros(3, 40, 60, dtype=torch.uint8), "a", 0, 0)
    sample.labels = torch.tensor(labels)
    for name, value in fields.items():
        setattr(sample, name, value)
    return sample


def test_boxes_name_objects():
    found = found_of(
        # IoU 0.9 and 1 with the first; 0.5 and 0.48 with the second
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 5], [20, 0, 30, 4.8]],
        [7, 8, 5, 6],
        [0.9, 0.8, 0.3, 0.95],
    )
    assert name_boxes(BOXES, **found).tolist() == [7, 5, -1]
    assert name_boxes(BOXES[:0], **found).tolist() == []
    assert name_boxes(BOXES, **found_of([], [], [])).tolist() == [-1] * 3


def test_a_box_names_one_object():
    near = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    found = found_of([[0, 0, 10, 9], [0, 0, 10, 9.5]], [3, 4], [0.9, 0.5])
    assert name_boxes(near, **found).tolist() == [4, 3]


def test_counts_of_boxes():
    found = found_of(BOXES[:2].tolist(), [1, 0], [0.9, 0.04])
    truth = truth_of([0, 0, 1], boxes=BOXES)
    assert count_labels(truth, found, (2, 2), 0.05).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert count_labels(truth, found, (2, 2), 0.0).tolist() == [[1, 1, 0], [0, 0, 1]]


def test_counts_of_pixels_and_image_labels():
    segments = torch.tensor([[0, 0, 1], [1, -1, -1]], dtype=torch.int16)
    truth = truth_of([2, 0], segments=segments)
    semantic = torch.tensor([[1, 0, 1], [1, 0, 0]])
    counts = count_labels(truth, {"semantic": semantic}, (3, 2), 0.5)
    assert counts.tolist() == [[0, 2, 0], [0, 0, 0], [1, 1, 0]]
    panoptic = {"panoptic": torch.tensor([[5, 0, 5], [5, 5, 5]]), "size": (2, 3)}
    panoptic["segments_info"] = [{"id": 5, "label": 1, "isthing": True, "score": 0.9}]
    counts = count_labels(truth, panoptic, (3, 2), 0.5)
    assert counts.tolist() == [[0, 2, 0], [0, 0, 0], [0, 1, 1]]  # a pixel without a segment
    labelled = truth_of([], image_labels=torch.tensor([2, 0]))
    best = found_of(BOXES.tolist(), [0, 1, 0], [0.3, 0.6, 0.5])
    assert count_labels(labelled, best, (3, 2), 0.2).tolist() == [[0, 1, 0], [0] * 3, [0, 1, 0]]
    assert count_labels(labelled, best, (3, 2), 0.7).tolist() == [[0, 0, 1], [0] * 3, [0, 0, 1]]


COUNTS = {
    ("a", "a"): np.array([[8, 0, 2], [0, 1, 0]]),
    ("a", "b"): np.array([[6, 2, 2], [0, 1, 0]]),
}
NAMES = {"a": ("car", "cat"), "b": ("Van", "Kitty")}


def test_strongest_pairs():
    entries = entries_of(COUNTS, {"a": NAMES["a"]}, NAMES)
    assert entries[0].share == 1 and entries[-1].share == 0.2 and len(entries) == 7
    assert Entry("a", "car", "b", "Van", 6, 10) in entries
    lines = format_entries(entries, 5).splitlines()
    assert lines[1:3] == [
        " 0.60  0.80          10  a: car -> b: Van",
        " 0.20  0.80          10  a: car -> b: Kitty",
    ]
    assert (
        lines[3] == "1 pairs of classes with less than 5 objects are left out" and len(lines) == 4
    )
    line = format_entries(entries, 1).splitlines()[1]
    assert line == " 1.00  1.00           1  a: cat -> b: Kitty"
    unknown = entries_of({("a", "b"): COUNTS["a", "b"]}, {"a": NAMES["a"]}, NAMES)
    assert format_entries(unknown, 5).splitlines()[1].split()[:3] == ["0.60", "-", "10"]
    assert strongest(entries, 5) == ([("a", "car")], [("b", "Van"), ("b", "Kitty")])


def test_the_picture_has_so_many_classes(monkeypatch):
    monkeypatch.setattr(cross_labels, "SIDE", 1)
    entries = entries_of(COUNTS, {"a": NAMES["a"]}, NAMES)
    assert strongest(entries, 1) == ([("a", "cat")], [("b", "Kitty")])


def boxes_of(folder):
    (folder / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (60, 40)).save(folder / "images" / f"{i}.png")
    box = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
    record = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(4)],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "cat"}],
        "annotations": [box | {"id": 1}, box | {"id": 2, "image_id": 1, "category_id": 2}],
    }
    (folder / "a.json").write_text(json.dumps(record))
    return load_datasets(f"a={folder}/a.json:{folder}/images", "val")[0]


def test_each_dataset_gives_its_labels(tmp_path):
    dataset = boxes_of(tmp_path)
    asked = []

    def predict_images(model, images, label_space):
        asked.append(label_space.datasets)
        return [found_of([[0, 0, 10, 10]], [len(asked) % 2], [0.9])]

    method = SimpleNamespace(predict_images=predict_images)
    model = SimpleNamespace(args=SimpleNamespace(task="panoptic"))
    space = LabelSpace([Vocabulary(name, names) for name, names in NAMES.items()])
    counts = cross_counts(method, model, space, dataset, 0.5)
    assert asked == [["a"], ["b"]] * 4 and model.args.task == "instance"
    assert counts["a"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert counts["b"].tolist() == [[1, 0, 0], [1, 0, 0]]
    pairs = {("a", name): matrix for name, matrix in counts.items()}
    write(pairs, [dataset], space, 1, tmp_path)
    record = json.loads((tmp_path / "cross_labels.json").read_text())
    assert record["a"]["images"] == 4 and record["a"]["counted"] == "boxes"
    expected = {"true": "cat", "dataset": "b", "label": "Van", "count": 1, "share": 1.0}
    assert expected in record["a"]["labels"]
    assert "a: cat -> b: Van" in (tmp_path / "cross_labels.txt").read_text()
    assert (tmp_path / "cross_labels.png").is_file()


def test_images_are_drawn_at_random(tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    dataset = boxes_of(tmp_path)
    assert choose(dataset, 4, 0) is dataset
    kept = choose(dataset, 2, 0)
    again = choose(dataset, 2, 0)
    assert len(kept) == 2 and list(kept.index.image_ids) == list(again.index.image_ids)
    assert "a: 2 of 4 images, drawn at random" in caplog.text


def test_weights_of_no_method(monkeypatch):
    record = {"method": "painter", "args": {}, "vocabularies": {}, "file": "x"}
    monkeypatch.setattr(cross_labels, "read_metadata", lambda path: record)
    with pytest.raises(InputError, match=r"there is no method file painter.py"):
        load_method("x")
