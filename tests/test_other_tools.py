"""Folders as other tools write them: YOLO, labelme, CVAT, Roboflow, and what is none of them."""

import json
import logging
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.command import run_command
from common.datasets import __main__ as tool
from common.datasets import load_datasets, store, warn_of_overlap
from common.datasets.names import eval_entries
from common.datasets.readers.yolo_poses import pose_shape
from common.errors import InputError
from common.evaluation import evaluate_detections
from common.masks import encode_masks

ALL = ("boxes", "instances", "semantic", "panoptic", "image_labels")
WIDTH, HEIGHT = 40, 20
BOX = "0 0.5 0.5 0.5 0.5\n"  # the pixels 10 to 30, 5 to 15


def load(text, split="train", **more):
    return load_datasets(str(text), split, accepts=ALL, masks=True, **more)[0]


def refused(text, split="train", **more):
    with pytest.raises(InputError) as error:
        load(text, split, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def photos(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "teal").save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def files(dataset):
    return [dataset.index.file_name(i) for i in range(len(dataset))]


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "concord")
    return caplog


# -- YOLO


def yolo(root, images, labels, *names, text=BOX):
    for name in names:
        photos(root / images, f"{name}.jpg")
        write(root / labels / f"{name}.txt", text)


def test_boxes_of_yolo(tmp_path, told):
    yolo(
        tmp_path, "images", "labels", "a", "deep/b", text="\ufeff1 0.5 0.5 0.5 0.5\n\n0 0 0 1 1\r\n"
    )
    photos(tmp_path / "images", "c.png")
    write(tmp_path / "labels/lost.txt", BOX)
    write(tmp_path / "labels/classes.txt", "cat\nbig dog\n")
    dataset = load(f"mine={tmp_path}/")
    assert files(dataset) == ["images/a.jpg", "images/c.png", "images/deep/b.jpg"]
    assert dataset.vocabulary.names == ("cat", "big dog") and dataset.supervision == "boxes"
    sample = dataset.load(0)
    assert sample.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 20, 10]]
    assert sample.labels.tolist() == [1, 0] and len(dataset.load(1).labels) == 0
    assert f"mine: YOLO, 3 images of {tmp_path}" in told.text
    assert "1 images without a label file" in told.text
    assert "1 label files" in told.text and "lost.txt" in told.text
    assert "classes.txt" not in told.text


@pytest.mark.parametrize(
    "names",
    [
        "names: ['no', 2]",
        "names:\n- no\n- 2  # comment",
        "names:\n  0: no\n  1: '2'\nnc: 2",
        'nc: 2\nnames: {1: 2, 0: "no"}',
    ],
)
def test_names_in_data_yaml(tmp_path, names):
    yolo(tmp_path, "images", "labels", "a")
    write(tmp_path / "my set.yml", names)
    for entry in (f"mine={tmp_path}", f"mine={tmp_path}/my set.yml"):
        assert load(entry).vocabulary.names == ("no", "2")


LAYOUTS = {
    "ultralytics": (
        "images/train",
        "images/val",
        "path: ../nowhere\ntrain: images/train\nval: images/val",
    ),
    "roboflow": ("train/images", "valid/images", "train: ../train/images\nval: ../valid/images"),
    "from a notebook": (
        "train/images",
        "valid/images",
        "train: /content/x/train/images\nval: C:\\x\\valid\\images",
    ),
    "by name": ("images/train2017", "images/val2017", ""),
    "roboflow by name": ("train/images", "valid/images", "train:\nval:"),
    "lists": ("images/train", "images/val", "train: [images/train]\nval: val.txt"),
    "cvat": ("obj_train_data", "obj_valid_data", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_of_yolo(tmp_path, told, layout):
    train, val, table = LAYOUTS[layout]
    yolo(tmp_path, train, train.replace("images", "labels"), "a", "b")
    yolo(tmp_path, val, val.replace("images", "labels"), "c")
    write(tmp_path / "val.txt", f"data/{val}/c.jpg\n")
    write(tmp_path / "obj.names", "cat\n")
    if table:
        write(tmp_path / "data.yaml", f"{table}\nnames: [cat]\n")
    trained, evaluated = load(f"mine={tmp_path}"), load(f"mine={tmp_path}", "val")
    assert files(trained) == [f"{train}/a.jpg", f"{train}/b.jpg"]
    assert files(evaluated) == [f"{val}/c.jpg"] and len(evaluated.load(0).boxes) == 1
    assert f"2 images of the split train of {tmp_path}" in told.text
    assert f"1 images of the split val of {tmp_path}" in told.text
    assert files(load(f"mine:val={tmp_path}")) == files(evaluated)
    warn_of_overlap([trained], [evaluated])
    assert "TRAINING" not in told.text
    assert "has no split 'test', only " in refused(f"mine:test={tmp_path}")


def test_a_missing_val_is_test_or_train(tmp_path, told):
    yolo(tmp_path, "train/images", "train/labels", "a")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: ../train/images\nval: ../valid/images")
    trained, evaluated = load(f"mine={tmp_path}"), load(f"mine={tmp_path}", "val")
    assert "1 images of the split train" in told.text and files(evaluated) == files(trained)
    warn_of_overlap([trained], [evaluated])
    assert "TRAINING" in told.text and evaluated.trained_on
    yolo(tmp_path, "test/images", "test/labels", "b")
    assert files(load(f"mine={tmp_path}", "val")) == ["test/images/b.jpg"]


def test_one_folder_of_a_split(tmp_path):
    yolo(tmp_path, "train/images", "train/labels", "a")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: ../train/images")
    assert load(f"mine={tmp_path}/train").vocabulary.names == ("cat",)
    assert len(load(f"mine={tmp_path}/train/labels:{tmp_path}/train/images").load(0).boxes) == 1


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    yolo(tmp_path, "images", "labels", name)
    write(tmp_path / "classes.txt", "cat")
    dataset = load(f"mine={tmp_path}")
    assert files(dataset) == [f"images/{name}.jpg"] and len(dataset.load(0).boxes) == 1


def test_two_folders_of_yolo_keep_their_splits(tmp_path):
    for split in ("train", "val"):
        yolo(tmp_path, f"images/{split}", f"labels/{split}", f"{split} 1")
    write(tmp_path / "labels/classes.txt", "cat")
    entry = f"mine={tmp_path}/labels:{tmp_path}/images"
    assert files(load(entry)) == ["train/train 1.jpg"] and files(load(entry, "val")) == [
        "val/val 1.jpg"
    ]


def test_labels_beside_their_images(tmp_path):
    yolo(tmp_path, ".", ".", "a")
    assert "holds 1 images, 1 txt files" in refused(f"mine={tmp_path}")  # they could be captions
    write(tmp_path / "classes.txt", "cat")
    assert len(load(f"mine={tmp_path}").load(0).boxes) == 1


TRIANGLE = "0.25 0 0.75 0 0.5 1"


def test_polygons_of_yolo_are_masks(tmp_path):
    yolo(tmp_path, "images", "labels", "a", text=f"1 {TRIANGLE}\n0 0 0 1 0 1 1 0 1\n")
    write(tmp_path / "classes.txt", "cat\ndog")
    dataset = load(f"mine={tmp_path}")
    sample = dataset.load(0)
    assert dataset.supervision == "instances"
    assert sample.boxes.tolist() == [[10, 0, 30, 20], [0, 0, 40, 20]]
    assert sample.masks.sum(dim=(1, 2)).tolist() == [200, 800]
    assert not sample.masks[0, :, :10].any() and sample.masks[0, 0, 10:30].all()
    found = {"boxes": sample.boxes, "labels": sample.labels, "scores": sample.labels + 1.0}
    found |= {"size": (HEIGHT, WIDTH), "segmentations": encode_masks(sample.masks)}
    results = evaluate_detections(dataset, {0: found})
    assert (results["AP"], results["mask AP"]) == pytest.approx((1, 1))


def test_the_size_of_a_polygon_is_that_of_its_mask(tmp_path):
    yolo(tmp_path, "images", "labels", "a", text=f"0 {TRIANGLE}\n")
    write(tmp_path / "classes.txt", "cat")
    index = load(f"mine={tmp_path}").index
    assert index.areas.tolist() == [0.25]  # of the image, half of its box
    found = {"boxes": torch.tensor([[100.0, 0, 300, 200]]), "labels": torch.tensor([0])}
    found |= {"scores": torch.ones(1), "size": (200, 400)}
    results = evaluate_detections(load(f"mine={tmp_path}"), {0: found})
    assert results["APl"] == pytest.approx(1)
    found |= {"boxes": torch.tensor([[10.0, 0, 30, 80]]), "size": (80, 40)}  # 800 of 1600 pixels
    results = evaluate_detections(load(f"mine={tmp_path}"), {0: found})
    assert results["APs"] == pytest.approx(1) and np.isnan(results["APm"])


def test_boxes_and_polygons_of_yolo(tmp_path, told):
    yolo(tmp_path, "images", "labels", "a", text=f"{BOX}0 {TRIANGLE}\n")
    write(tmp_path / "classes.txt", "cat")
    dataset = load(f"mine={tmp_path}")
    assert dataset.load(0).boxes.tolist() == [[10, 5, 30, 15], [10, 0, 30, 20]]
    assert dataset.supervision == "boxes" and "only 1 of 2 objects have an outline" in told.text


def test_poses_are_boxes(tmp_path, told):
    yolo(tmp_path, "images", "labels", "a", text="0 0.5 0.5 0.5 0.5 0.1 0.2 2 0 0 0\n")
    write(tmp_path / "data.yaml", "names: [cat]\nkpt_shape: [2, 3]")
    assert load(f"mine={tmp_path}").load(0).boxes.tolist() == [[10, 5, 30, 15]]
    assert "only the boxes of the poses" in told.text


@pytest.mark.parametrize("numbers", [2, 3])
def test_poses_are_told_from_outlines_with_as_many_corners(numbers):
    rng = np.random.default_rng(0)
    size = rng.uniform(0.1, 0.4, (40, 2))
    centre = size / 2 + rng.uniform(0, 1, (40, 2)) * (1 - size)
    points = centre[:, None] + rng.uniform(-0.5, 0.5, (40, 6, 2)) * size[:, None]
    poses = points
    if numbers == 3:
        seen = rng.integers(0, 2, (40, 6, 1))
        poses = np.concatenate([points * seen, seen], 2)  # 0 0 0 for those out of sight
    lines = np.concatenate([centre, size, poses.reshape(40, -1)], 1)
    assert pose_shape(lines) == (6, numbers)
    assert pose_shape(lines[:2]) is None  # too few
    outlines = np.concatenate([points, points[:, :2]], 1).reshape(40, -1)  # corners
    assert pose_shape(outlines) is None


@pytest.mark.parametrize(
    "line, words",
    [
        ("2 0.5 0.5 0.2 0.2", "has the class 2, but"),
        ("0.5 0.5 0.5 0.2 0.2", "has the class 0.5"),
        ("0 20 10 5 300", "has the coordinate 20, which looks like pixels"),
        ("0 0.5 -0.2 0.1 0.1", "has the coordinate -0.2; write fractions"),
        ("0 nan 0.2 0.1 0.1", "has the coordinate nan"),
        ("0 0.5 0.5 0.2", "has 4 columns; a box has 5"),
        ("0 0.5 0.5 0.2 0.2 0.9", "has 6 columns"),
        ("0,0.5,0.5,0.2,0.2", "is '0,0.5,0.5,0.2,0.2'; write numbers"),
        ("cat 0.5 0.5 0.2 0.2", "write numbers"),
    ],
)
def test_broken_lines_of_yolo(tmp_path, line, words):
    yolo(tmp_path, "images", "labels", "a", text=f"{BOX}\n{line}\n")
    write(tmp_path / "classes.txt", "cat\ndog")
    told = refused(f"mine={tmp_path}")
    assert told.startswith(f"{tmp_path}/labels/a.txt: line 3 ") and words in told


@pytest.mark.parametrize(
    "table, words",
    [
        ("names: [cat", "is not valid yaml"),
        ("names: {0: cat, 2: dog}", "count from 0"),
        ("names: cat", "is no list of names"),
        ("names: [cat]\nnc: 2", "nc: is 2, but names: has 1"),
        ("names: [cat, cat]", "class name 'cat' twice"),
        ("names: [cat]\nkpt_shape: 3", "kpt_shape: is 3"),
        ("just text", "holds no fields"),
        ("nc: 1", "there is no data.yaml with names:"),
    ],
)
def test_a_broken_data_yaml(tmp_path, table, words):
    yolo(tmp_path, "images", "labels", "a")
    write(tmp_path / "data.yaml", table)
    told = refused(f"mine={tmp_path}/")
    assert words in told and str(tmp_path) in told


def test_yolo_without_its_parts(tmp_path):
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: ../train/images")
    assert "names ../train/images, not to be found" in refused(f"mine={tmp_path}")
    photos(tmp_path / "train/images", "a.jpg")
    assert "none of the 1 images" in refused(f"mine={tmp_path}")
    (tmp_path / "train/images/a.jpg").unlink()
    assert "holds no images" in refused(f"mine={tmp_path}")


def test_yolo_is_cached(tmp_path, monkeypatch, told):
    monkeypatch.setattr(store, "LARGE", 1)
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    yolo(tmp_path / "x", "images", "labels", "a", text=f"0 {TRIANGLE}\n")
    write(tmp_path / "x/classes.txt", "cat")
    for _ in range(2):
        assert load(f"mine={tmp_path}/x").load(0).masks.sum() == 200
    assert told.text.count("is read once") == 1
    write(tmp_path / "x/labels/a.txt", f"{BOX}{BOX}")
    assert len(load(f"mine={tmp_path}/x").load(0).boxes) == 2


# -- labelme


def labelme(path, *shapes, image=None, **more):
    record = {"version": "5.4.1", "imagePath": image or f"{path.stem}.jpg", "imageData": None}
    record |= {"imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": list(shapes)}
    write(path, record | more)


def shape(label, kind, *points):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}


RECTANGLE = shape("dog", "rectangle", [30, 15], [10, 5])
POLYGON = shape("cat", "polygon", [0, 0], [40, 0], [40, 20], [0, 20])


def test_a_folder_of_coco_files_is_none_of_labelme(tmp_path):
    write(tmp_path / "train.json", '{"info": {}, "images": [], "annotations": []}')
    write(tmp_path / "images/a.png", "")
    line = refused(f"mine={tmp_path}/:{tmp_path}/images/")
    assert f"name one of them: mine={tmp_path}/train.json:{tmp_path}/images/" in line


def test_labelme(tmp_path, told):
    photos(tmp_path, "a.jpg", "b.jpg", "bare.jpg")
    labelme(tmp_path / "a.json", RECTANGLE, POLYGON, shape("ant", "point", [1, 1]))
    labelme(tmp_path / "b.json", shape("cat", "polygon", [1, 1], [2, 2]))
    dataset = load(f"mine={tmp_path}/")
    assert dataset.vocabulary.names == ("cat", "dog") and dataset.supervision == "boxes"
    sample = dataset.load(0)
    assert sample.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 40, 20]]
    assert sample.labels.tolist() == [1, 0] and len(dataset.load(1).boxes) == 0
    assert "2 shapes are neither boxes nor areas: 1 point, 1 polygon of 2 points" in told.text
    assert "only 1 of 2 objects have an outline" in told.text
    assert "1 images without a json file" in told.text
    assert f"mine: labelme, 2 images of {tmp_path}" in told.text


def test_outlines_of_labelme_are_masks(tmp_path):
    photos(tmp_path, "a.jpg")
    old = {key: value for key, value in POLYGON.items() if key != "shape_type"}
    labelme(tmp_path / "a.json", old, shape("cat", "circle", [20, 10], [26, 18]))
    dataset = load(f"mine={tmp_path}/")
    sample = dataset.load(0)
    assert dataset.supervision == "instances" and sample.boxes.tolist()[1] == [10, 0, 30, 20]
    full, circle = sample.masks.sum(dim=(1, 2)).tolist()
    assert full == 800 and circle == pytest.approx(np.pi * 100, rel=0.05)


def test_images_of_labelme(tmp_path, told):
    photos(tmp_path, "images/a b.jpg", "images/c.png", "json/d.jpg", "json/new.jpg")
    labelme(tmp_path / "json/a.json", RECTANGLE, image="..\\images\\a b.jpg")
    labelme(tmp_path / "json/c.json", RECTANGLE, image="../images/c.png")
    labelme(tmp_path / "json/d.json", RECTANGLE, image="/home/me/d.jpg")
    labelme(tmp_path / "json/new.json", RECTANGLE, image="old.jpg")
    dataset = load(f"mine={tmp_path}/")
    assert files(dataset) == ["images/a b.jpg", "images/c.png", "json/d.jpg", "json/new.jpg"]
    assert "2 images are not at their imagePath and were found by name" in told.text
    (tmp_path / "json/d.json").unlink()
    (tmp_path / "json/new.json").unlink()
    assert files(load(f"mine={tmp_path}/json:{tmp_path}/images")) == ["a b.jpg", "c.png"]
    labelme(tmp_path / "json/e.json", RECTANGLE)
    assert "json/e.json: its image 'e.jpg' is missing" in refused(f"mine={tmp_path}/")


def test_labels_txt_gives_the_classes(tmp_path):
    photos(tmp_path, "a.jpg")
    labelme(tmp_path / "a.json", RECTANGLE)
    write(tmp_path / "labels.txt", "__ignore__\n_background_\nzebra\ndog\n")
    dataset = load(f"mine={tmp_path}/")
    assert dataset.vocabulary.names == ("zebra", "dog") and dataset.load(0).labels.tolist() == [1]
    write(tmp_path / "labels.txt", "zebra")
    assert "shape 1 has the label 'dog', which labels.txt does not" in refused(f"mine={tmp_path}/")


@pytest.mark.parametrize(
    "shapes, words",
    [
        ([{"label": "cat", "points": [[1, 2, 3]]}], "b.json: shape 1 needs a label and a list"),
        ([shape("cat", "polygon", ["x", 1])], "b.json: shape 1 needs"),
        ([RECTANGLE, {"points": []}], "b.json: shape 2 needs"),
        ([shape(" ", "rectangle", [1, 1], [2, 2])], "b.json: shape 1 has no label"),
        ({}, "b.json has no list 'shapes'"),
        ([shape("cat", "rectangle", [1, 1], [2, float("nan")])], "not valid json"),
    ],
)
def test_broken_files_of_labelme(tmp_path, shapes, words):
    photos(tmp_path, "a.jpg", "b.jpg")
    labelme(tmp_path / "a.json", RECTANGLE)
    labelme(tmp_path / "b.json")
    record = json.loads((tmp_path / "b.json").read_text())
    write(tmp_path / "b.json", record | {"shapes": shapes})
    assert words in refused(f"mine={tmp_path}/")


def test_splits_of_labelme(tmp_path):
    for split in ("train", "val"):
        photos(tmp_path / split, f"{split}.jpg")
        labelme(tmp_path / split / f"{split}.json", RECTANGLE)
    assert files(load(f"mine={tmp_path}")) == ["train.jpg"]
    assert files(load(f"mine={tmp_path}", "val")) == ["val.jpg"]


# -- CVAT

LABELS = ("dog", "rectangle"), ("cat", "polygon"), ("good frame", "tag"), ("wheel", "points")


def cvat(path, *images, labels=LABELS, subsets=""):
    """Each image is (attributes, shapes)."""
    listed = "".join(f"<label><name>{n}</name><type>{t}</type></label>" for n, t in labels)
    meta = f"<meta><project><labels>{listed}</labels><subsets>{subsets}</subsets></project></meta>"
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    body = "".join(f'<image id="0" {text} {size}>{shapes}</image>' for text, shapes in images)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    write(path, f"{head}<annotations><version>1.1</version>{meta}{body}</annotations>")


CVAT_BOX = '<box label="dog" xtl="10.00" ytl="5.00" xbr="30.00" ybr="15.00" z_order="0"></box>'
CVAT_POLYGON = (
    '<polygon label="cat" points="0,0;40,0;40,20;0,20"><attribute name="a">b</attribute></polygon>'
)
CVAT_MASK = '<mask label="cow" rle="1, 2, 1, 2" left="3" top="4" width="3" height="2"></mask>'


def test_cvat(tmp_path, told):
    photos(tmp_path / "images", "a.jpg", "deep/b.jpg")
    turned = CVAT_BOX.replace("z_order", 'rotation="90.00" z_order')
    parts = (
        '<skeleton label="dog"><points label="1" points="1,1"/></skeleton><tag label="good frame"/>'
    )
    cvat(
        tmp_path / "annotations.xml",
        ('name="a.jpg"', CVAT_BOX + CVAT_POLYGON + turned + parts),
        ('name="deep/b.jpg"', ""),
    )
    for entry in (f"mine={tmp_path}", f"mine={tmp_path}/annotations.xml"):
        dataset = load(entry)
        assert files(dataset) == ["a.jpg", "deep/b.jpg"] and dataset.supervision == "boxes"
        assert dataset.vocabulary.names == ("dog", "cat")
        sample = dataset.load(0)
        assert sample.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 40, 20], [15, 0, 25, 20]]
        assert sample.labels.tolist() == [0, 1, 0]
        assert dataset.index.sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    assert "2 shapes are neither boxes nor areas: 1 skeleton, 1 tag" in told.text
    assert "1 boxes are turned" in told.text and "mine: CVAT, 2 images" in told.text


def test_outlines_of_cvat_are_masks(tmp_path):
    photos(tmp_path, "a.jpg")
    oval = '<ellipse label="cat" cx="20" cy="10" rx="10" ry="5" rotation="90"/>'
    cvat(tmp_path / "x.xml", ('name="a.jpg"', CVAT_MASK + CVAT_POLYGON + oval), labels=())
    dataset = load(f"mine={tmp_path}/x.xml")
    assert dataset.vocabulary.names == ("cat", "cow") and dataset.supervision == "instances"
    mask, polygon, ellipse = dataset.load(0).masks
    assert mask.nonzero().tolist() == [[4, 4], [4, 5], [5, 4], [5, 5]] and polygon.sum() == 800
    assert dataset.load(0).boxes.tolist()[0] == [3, 4, 6, 6]
    assert dataset.load(0).boxes[2].tolist() == pytest.approx([15, 0, 25, 20])
    assert ellipse.sum() == pytest.approx(np.pi * 50, rel=0.05)


def test_subsets_of_cvat_are_splits(tmp_path, told):
    photos(tmp_path / "images", "Train/a.jpg", "Validation/a.jpg")
    cvat(
        tmp_path / "annotations.xml",
        ('name="a.jpg" subset="Train"', CVAT_BOX),
        ('name="a.jpg" subset="Validation"', CVAT_BOX),
        subsets="Train\nValidation",
    )
    trained, evaluated = load(f"mine={tmp_path}"), load(f"mine={tmp_path}", "val")
    assert files(trained) == ["Train/a.jpg"] and files(evaluated) == ["Validation/a.jpg"]
    warn_of_overlap([trained], [evaluated])
    assert "TRAINING" not in told.text


def test_frames_of_a_video_and_images_elsewhere(tmp_path):
    photos(tmp_path / "frames", "frame_000000.PNG")
    cvat(tmp_path / "x/annotations.xml", ('name="frame_000000"', CVAT_BOX))
    entry = f"mine={tmp_path}/x/annotations.xml:{tmp_path}/frames"
    assert files(load(entry)) == ["frame_000000.PNG"]
    assert "is missing (1 of 1" in refused(f"mine={tmp_path}/x")


@pytest.mark.parametrize(
    "shapes, words",
    [
        ('<box xtl="1" ytl="1" xbr="2" ybr="2"/>', "image 'a.jpg' has a box without a label"),
        ('<box label="dog" xtl="1" ytl="1" xbr="2"/>', "a box of 'dog' with no 'ybr'"),
        ('<polygon label="cat" points="1,1;2,2"/>', "with fewer than three corners"),
        ('<polygon label="cat" points="1,x;2,2;3,3"/>', "a polygon of 'cat' with could not"),
        (CVAT_MASK.replace("1, 2, 1, 2", "1, 2"), "a mask of 'cow' with runs that do not fill"),
        (CVAT_MASK.replace('left="3"', 'left="39"'), "a box that leaves the image"),
        ("<box", "is no xml file of 'CVAT for images 1.1'"),
    ],
)
def test_broken_files_of_cvat(tmp_path, shapes, words):
    photos(tmp_path / "images", "a.jpg")
    cvat(tmp_path / "annotations.xml", ('name="a.jpg"', shapes))
    told = refused(f"mine={tmp_path}")
    assert words in told and f"{tmp_path}/annotations.xml" in told


def test_other_xml_files_of_cvat(tmp_path):
    path = tmp_path / "annotations.xml"
    write(path, '<annotations><track id="0" label="dog"><box frame="0"/></track></annotations>')
    assert "tracks of a video; export it as 'CVAT for images 1.1'" in refused(f"mine={path}")
    write(path, '<!DOCTYPE a [<!ENTITY a "ha">]><annotations></annotations>')
    assert "it has a DOCTYPE" in refused(f"mine={tmp_path}")
    write(path, "<annotations></annotations>")
    assert "has no label and no box" in refused(f"mine={tmp_path}")


# -- Roboflow


def coco(path, name):
    photos(path.parent, name)
    record = {
        "images": [{"id": 1, "file_name": name, "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 10]}],
    }
    write(path, record)


def test_coco_of_roboflow(tmp_path, told):
    coco(tmp_path / "train/_annotations.coco.json", "a.jpg")
    coco(tmp_path / "test/_annotations.coco.json", "b.jpg")
    assert files(load(f"mine={tmp_path}/")) == ["a.jpg"]
    assert files(load(f"mine={tmp_path}/", "val")) == ["b.jpg"]
    assert f"mine: COCO, 1 images of the split test of {tmp_path}" in told.text
    for entry in ("train/", "train", "train/_annotations.coco.json"):
        assert files(load(f"mine={tmp_path}/{entry}")) == ["a.jpg"]


def test_errors_of_coco_name_the_file(tmp_path):
    path = tmp_path / "_annotations.coco.json"
    coco(path, "a.jpg")
    write(path, json.loads(path.read_text()) | {"categories": []})
    assert str(path) in refused(f"mine={tmp_path}")


def masks(folder, name, values, rows="0, sky\n2, cat\n"):
    photos(folder, f"{name}.jpg")
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[0, : len(values)] = values
    Image.fromarray(pixels).save(folder / f"{name}_mask.png")
    write(folder / "_classes.csv", f"Pixel Value, Class\n{rows}")


def test_masks_of_roboflow(tmp_path, told):
    masks(tmp_path / "train", "a", [2, 2, 255])
    masks(tmp_path / "valid", "b", [2])
    photos(tmp_path / "train", "bare.jpg")
    dataset = load(f"mine={tmp_path}/")
    assert files(dataset) == ["a.jpg"] and dataset.vocabulary.names == ("sky", "cat")
    sample = dataset.load(0)
    assert dataset.supervision == "semantic" and sample.labels.tolist() == [0, 1]
    assert sample.segments[0, :4].tolist() == [1, 1, -1, 0]
    assert "1 images without a mask" in told.text and "mine: Roboflow's masks" in told.text
    assert files(load(f"mine={tmp_path}/", "val")) == ["b.jpg"]
    masks(tmp_path / "valid", "b", [2], rows="0, sky\ncat\n")
    assert "_classes.csv: line 3 is 'cat'" in refused(f"mine={tmp_path}/valid")
    (tmp_path / "train/a.jpg").unlink()
    assert "a_mask.png has no image beside it" in refused(f"mine={tmp_path}/")


def xml_file(path):
    box = "<xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>15</ymax>"
    thing = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
    write(path, f"<annotation>{thing}</annotation>")


def test_voc_in_folders(tmp_path):
    for split, name in (("train", "a"), ("valid", "b")):
        photos(tmp_path / split, f"{name}.jpg")
        xml_file(tmp_path / split / f"{name}.xml")
    assert files(load(f"mine={tmp_path}/")) == ["a.jpg"]
    assert files(load(f"mine={tmp_path}/", "val")) == ["b.jpg"]
    year = tmp_path / "VOC"
    photos(year / "JPEGImages", "a.jpg", "b.jpg")
    xml_file(year / "Annotations/a.xml")
    xml_file(year / "Annotations/b.xml")
    assert files(load(f"mine={year}/")) == ["a.jpg", "b.jpg"]
    write(year / "ImageSets/Main/val.txt", "b\n")
    write(year / "ImageSets/Main/train.txt", "a\n")
    assert files(load(f"mine={year}/")) == ["a.jpg"]
    assert files(load(f"mine={year}/", "val")) == ["b.jpg"]


def test_class_folders_of_a_split(tmp_path):
    photos(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "valid/cat/c.jpg")
    assert files(load(f"mine={tmp_path}/")) == ["cat/a.jpg", "dog/b.jpg"]
    photos(tmp_path, "bus/d.jpg", "train/e.jpg")  # a train beside a bus is a class
    assert load(f"mine={tmp_path}/").vocabulary.names == ("bus", "train")


# -- which format


def test_what_is_evaluated_by_default(tmp_path):
    yolo(tmp_path / "boxes", "images", "labels", "a")
    write(tmp_path / "boxes/classes.txt", "cat")
    photos(tmp_path / "labels", "cat/a.jpg")
    text = f"one:train={tmp_path}/boxes,two={tmp_path}/labels,three:val=a.json:b"
    assert eval_entries("", text) == f"one={tmp_path}/boxes,three=a.json:b"
    assert "write a split train, val, test, not 'valid'" in refused(f"one:valid={tmp_path}/boxes")


def test_unknown_formats_are_described(tmp_path):
    for name in ("a.csv", "b.csv", "x.jpg"):
        write(tmp_path / name, "x")
    (tmp_path / "tables").mkdir()
    told = refused(f"mine={tmp_path}/")
    assert f"{tmp_path} holds 2 csv files, 1 images, 1 folders (tables), in no known" in told
    assert "YOLO" in told and "labelme" in told and "CVAT" in told
    coco(tmp_path / "annotations/instances.json", "a.jpg")
    assert f"mine={tmp_path}/annotations/instances.json:IMAGES/" in refused(f"mine={tmp_path}/")
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in refused(f"mine={tmp_path}/empty")
    assert "does not exist" in refused(f"mine={tmp_path}/nowhere")


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.zip", "is an archive; unpack it"),
        ("a.tar", "a.tar"),
        ("a.csv", "is a csv file"),
        ("data.yaml", "YOLO's data.yaml"),
    ],
)
def test_files_of_no_format(tmp_path, name, words):
    write(tmp_path / name, "names: [cat]\n")
    for entry in (f"mine={tmp_path}/{name}", f"mine={tmp_path}/{name}:{tmp_path}"):
        assert words in refused(entry)


def test_swapped_paths(tmp_path):
    photos(tmp_path, "images/a.jpg")
    xml_file(tmp_path / "annotations/a.xml")
    told = refused(f"mine={tmp_path}/images:{tmp_path}/annotations")
    assert "holds no xml files, but" in told
    assert f"swapped? write mine={tmp_path}/annotations:{tmp_path}/images" in told


def check(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["datasets", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        run_command(tool.main)
    return exit.value.code, capsys.readouterr().out


def test_all_splits_of_a_folder_are_checked(tmp_path, monkeypatch, capsys):
    yolo(tmp_path, "train/images", "train/labels", "a")
    yolo(tmp_path, "valid/images", "valid/labels", "b", text=f"{BOX}{BOX}")
    write(tmp_path / "data.yaml", "names: [cat]")
    code, out = check(monkeypatch, capsys, f"mine={tmp_path}")
    assert code == 1 and "train/labels" in out and "valid/labels" in out
    assert "valid/images/b.jpg" in out.split("boxes given twice")[1]
    code, out = check(monkeypatch, capsys, f"mine:train={tmp_path}")
    assert code == 0 and "valid" not in out
    (tmp_path / "train/images/a.jpg").write_bytes(b"broken")
    code, out = check(monkeypatch, capsys, f"mine:train={tmp_path}")
    assert code == 1 and "cannot be decoded" in out
