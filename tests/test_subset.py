"""--classes and --rename: other classes than those of the annotations."""

import importlib
import json
import tarfile
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import METHODS, small_runs
from PIL import Image

import detic
from common.datasets import evaluation_datasets, training_datasets
from common.datasets.names import load_datasets
from common.datasets.subset import drop_empty, edit_classes, read_renames, refuse_without_boxes
from common.errors import InputError
from common.labels import LabelSpace


@pytest.fixture
def boxes(tmp_path):
    """The entry of a dataset of three classes, four boxes and two images."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    names = ["cat", "dog", "traffic cone"]
    record = {
        "images": [
            {"id": i, "file_name": name, "width": 40, "height": 40}
            for i, name in enumerate(["a.png", "b.png"])
        ],
        "categories": [{"id": 10 * i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": k, "image_id": image, "category_id": category, "bbox": [1, 2, 10, 10 + k]}
            for k, (image, category) in enumerate([(0, 0), (0, 10), (0, 20), (1, 10)])
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    return f"mine={tmp_path}/a.json:{tmp_path}"


def test_a_subset_of_the_classes(boxes, caplog):
    caplog.set_level("INFO", "concord")
    (dataset,) = edit_classes(load_datasets(boxes, "train"), "Traffic_Cone, cat", "", "train")
    assert dataset.vocabulary.names == ("cat", "traffic cone")
    assert dataset.vocabulary.ids == (0, 20)
    assert dataset.index.labels.tolist() == [0, 1]
    assert dataset.index.boxes[:, 3].tolist() == [12, 14]
    sample = dataset.load(0)
    assert sample.labels.tolist() == [0, 1] and len(dataset.load(1).labels) == 0
    assert "keeps 2 of 3 classes, 2 of 4 annotations" in caplog.text


@pytest.fixture
def sparse(tmp_path):
    """The entry of six images: one with a box, none, a crowd; two small ones; one with both."""
    images = []
    for i, (height, width) in enumerate([(40, 40), (40, 40), (40, 40), (20, 20), (40, 31), (0, 0)]):
        Image.new("RGB", (width or 40, height or 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
    annotations = [
        {"id": k, "image_id": image, "category_id": 1, "bbox": [1, 2, 9, 9 + k], "iscrowd": crowd}
        for k, (image, crowd) in enumerate([(0, 0), (2, 1), (3, 0), (4, 0), (5, 1), (5, 0)])
    ]
    record = {"images": images, "annotations": annotations}
    record["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (tmp_path / "sparse.json").write_text(json.dumps(record))
    return f"sparse={tmp_path}/sparse.json:{tmp_path}"


@pytest.mark.parametrize(
    "side, rows, line",
    [
        (0, [0, 3, 4, 5], "2 of 6 images are not trained on (2 without a box)"),
        (32, [0, 5], "4 of 6 images are not trained on (2 without a box, 2 with a side below 32"),
    ],
)
def test_images_without_a_box_are_left_out(sparse, caplog, side, rows, line):
    caplog.set_level("INFO", "concord")
    (dataset,) = load_datasets(sparse, "train")
    kept = drop_empty(dataset, side)
    assert line in caplog.text
    samples = [kept.load(i) for i in range(len(kept))]
    assert [int(s.image[0, 0, 0]) for s in samples] == [s.image_id for s in samples] == rows
    assert [s.boxes[:, 3].tolist() for s in samples] == [
        dataset.load(row).boxes[:, 3].tolist() for row in rows
    ]
    assert drop_empty(kept, side) is kept
    assert kept.image_counts().tolist() == [len(rows), 0]


def test_a_dataset_without_an_image_left_is_refused(sparse):
    (dataset,) = load_datasets(sparse, "train")
    crowds = replace(dataset, index=dataset.index.keep(dataset.index.ignore))
    for refuse in (drop_empty, lambda dataset: refuse_without_boxes([dataset])):
        with pytest.raises(InputError, match="sparse: no image has a box to train on"):
            refuse(crowds)
    refuse_without_boxes([dataset, dataset.select(np.zeros(len(dataset), bool))])


@pytest.mark.parametrize(
    "method, images", [("scaledet", 4), ("detic", 4), ("unidetector", 2), ("category_extended", 6)]
)
def test_detectors_train_on_images_with_boxes(sparse, tmp_path, call, monkeypatch, method, images):
    """UniDetector leaves out small ones, too; the category-extended detector mines in all."""
    trained = []

    def train(args, datasets, *others):
        trained.extend(datasets)
        raise InputError("enough")

    monkeypatch.setattr(importlib.import_module(method), "train", train)
    folder = str(tmp_path / "run")
    flags = ["--output", folder]
    if method != "category_extended":  # it has no text
        flags += ["--text-encoder", "minilm", "--prompts", "name"]
    with pytest.raises(InputError, match="enough"):
        call("--datasets", sparse, *flags, "--eval-datasets", sparse, method=method)
    assert [len(dataset) for dataset in trained] == [images]


def test_detic_keeps_images_without_a_box_beside_image_labels(sparse, tmp_path, call, monkeypatch):
    folder = tmp_path / "labelled" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    trained = []

    def train(args, datasets, *others):
        trained.extend(datasets)
        raise InputError("enough")

    monkeypatch.setattr(detic, "train", train)
    flags = ["--text-encoder", "minilm", "--prompts", "name", "--device", "cpu"]
    entries = f"{sparse},labelled={folder.parent}/"
    with pytest.raises(InputError, match="enough"):
        call("--datasets", entries, *flags, "--output", tmp_path / "run", method="detic")
    assert [len(dataset) for dataset in trained] == [6, 1]


def content(dataset, i: int) -> tuple:
    """What image i of the dataset holds, to be compared."""
    sample = dataset.load(i)
    parts = [sample.image, sample.labels, sample.boxes]
    parts += [getattr(sample, name) for name in ("image_labels", "segments")]
    listed = [None if part is None else part.tolist() for part in parts]
    return (sample.image_id, sample.captions, *listed)


@pytest.mark.parametrize("name", ["coco", "lvis", "in21k", "ade20k", "coco-panoptic", "o365"])
def test_a_part_of_the_images_is_drawn_as_by_the_official_script(name, tiny_root, caplog):
    kinds = ("boxes", "instances", "image_labels", "semantic", "panoptic")
    whole, part, share, same = (
        load_datasets(f"{name}{limit}", "train", str(tiny_root), accepts=kinds)[0]
        for limit in ("", "@5", "@49.9%", "@12")
    )
    assert (len(whole), len(part), len(share), len(same)) == (12, 5, 5, 12)
    order = np.arange(12)
    np.random.RandomState(1).shuffle(order)  # the official script: np.random.seed(1)
    for i, row in enumerate(sorted(order[:5])):
        assert content(part, i)[0] == content(whole, row)[0]
        assert content(part, i) == content(share, i) == content(whole, row)
    if part.image_counts() is not None:
        assert part.image_counts().sum() < whole.image_counts().sum()


def test_a_part_of_images_in_tar_files(tmp_path):
    folder = tmp_path / "labelled"
    folder.mkdir()
    for k, name in enumerate(("cat", "dog")):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(4):
                path = tmp_path / f"{i}.png"
                Image.new("RGB", (8, 8), (10 * i, k, 0)).save(path)
                tar.add(path, path.name)
    entry = f"labelled={folder}/"
    whole, part = (
        load_datasets(e, "train", accepts=("image_labels",))[0]
        for e in (entry, entry.replace("=", "@3="))
    )
    pictures = [content(whole, i) for i in range(8)]
    found = [content(part, i) for i in range(3)]
    assert len(part) == 3 and all(one in pictures for one in found)
    assert "3 images" in part.summary()


def test_a_part_is_not_larger_than_the_whole(boxes, caplog):
    caplog.set_level("INFO", "concord")
    (one,) = load_datasets(boxes.replace("=", "@1="), "train")
    assert len(one) == 1 and "mine: 1 of 2 images, drawn at random" in caplog.text
    for limit, count in (("3", 3), ("0%", 0), ("1%", 0)):
        with pytest.raises(InputError, match=f"mine@{limit} are {count} images of 2; write 1 to 2"):
            load_datasets(boxes.replace("=", f"@{limit}="), "train")


OTHERS = {"detic": "oid", "oneformer": "coco-panoptic"}  # for methods that train on one dataset
OWN = ["--neg-scope", "own"]
TAKE_NAMES_ALONE = {"scaledet", "category_extended", "groupsoftmax"}


@pytest.mark.parametrize("method, more", [*((m, []) for m in METHODS), ("scaledet", OWN)], ids=str)
def test_classes_without_images_are_taken_or_refused(method, more, train_here, tiny_root, tmp_path):
    flags = small_runs(method, tmp_path, tiny_root, steps=1)[0]
    place = flags.index("--datasets") + 1
    names = flags[place].split(",")
    if len(names) == 1:
        names.append(OTHERS[method])
    flags[place] = ",".join(names) + "@0"
    taken = method in TAKE_NAMES_ALONE and not more
    refusal = pytest.raises(InputError, match=r"a dataset of the training has no images \(@0\)")
    with nullcontext() if taken else refusal:
        train_here(method, [*flags, *more])


def test_names_are_mapped_before_they_are_selected(boxes, tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    (tmp_path / "names.txt").write_text("Dog = hound\n\nzebra=horse\n", "utf-8-sig")
    datasets = load_datasets(boxes, "train")
    (dataset,) = edit_classes(datasets, "hound", str(tmp_path / "names.txt"), "train")
    assert dataset.vocabulary.names == ("hound",)
    assert dataset.index.labels.tolist() == [0, 0]
    assert "1 of 2 names occur" in caplog.text


def test_renames_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{"Couch ": "sofa"}')
    assert read_renames(str(tmp_path / "a.json")) == {"couch": "sofa"}


@pytest.mark.parametrize("text", ["cat\n", "= dog\n", "cat =\n"])
def test_a_broken_file_of_names_is_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match="lacks a name"):
        read_renames(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["none.txt", "list.json"])
def test_a_file_of_names_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="write lines 'old name = new name'"):
        read_renames(str(tmp_path / name))


def test_two_classes_cannot_get_one_name(boxes, tmp_path):
    (tmp_path / "names.txt").write_text("dog = cat")
    with pytest.raises(InputError, match=r"after --rename.*'cat' twice"):
        edit_classes(load_datasets(boxes, "train"), "", str(tmp_path / "names.txt"), "train")


def test_an_unknown_class_is_named_with_the_nearest(boxes):
    datasets = load_datasets(boxes, "train")
    with pytest.raises(InputError, match="no training dataset has a class 'catt'; nearest: cat"):
        edit_classes(datasets, "catt", "", "train")
    with pytest.raises(InputError, match="'mine' has none of the --classes zebra; leave it out"):
        edit_classes(datasets, "zebra", "", "val")


def test_lists_of_labels_follow(tiny_root):
    (lvis,) = load_datasets("lvis", "train", str(tiny_root))
    names = ", ".join(lvis.vocabulary.names[i] for i in (3, 5))
    (part,) = edit_classes([lvis], names, "", "val")
    assert part.frequency == lvis.frequency[3] + lvis.frequency[5]
    for before, after in zip(lvis.index.negatives, part.index.negatives, strict=True):
        assert after == [{3: 0, 5: 1}[label] for label in before if label in (3, 5)]


def test_image_labels_follow(tiny_root):
    (whole,) = load_datasets("in21k", "train", str(tiny_root), accepts=("image_labels",))
    name = whole.vocabulary.names[2]
    (part,) = edit_classes([whole], name, "", "train")
    with_label = [2 in whole.load(i).image_labels for i in range(len(whole))]
    assert [part.load(i).image_labels.tolist() == [0] for i in range(len(part))] == with_label
    assert part.image_counts().tolist() == [sum(with_label)]


@pytest.mark.parametrize(("name", "kind"), [("ade20k", "semantic"), ("coco-panoptic", "panoptic")])
def test_pixels_of_other_classes_are_void(tiny_root, name, kind):
    (whole,) = load_datasets(name, "val", str(tiny_root), accepts=(kind,))
    before = whole.load(0)
    label = int(before.labels[1])
    (part,) = edit_classes([whole], whole.vocabulary.names[label], "", "val")
    for keep_ignored in (False, True):
        before, after = whole.load(0, keep_ignored), part.load(0, keep_ignored)
        same = before.labels == label
        assert after.labels.tolist() == [0] * int(same.sum())
        shown = np.isin(before.segments, same.nonzero().flatten())
        assert np.array_equal(after.segments >= 0, shown) and shown.any() and not shown.all()


def test_training_and_evaluation_have_the_same_classes(boxes, tmp_path):
    args = detic.Args(datasets=boxes, eval_datasets="mine", classes="dog")
    (trained,) = training_datasets(args, 0)
    space = LabelSpace([trained.vocabulary], lambda names, dataset: torch.eye(len(names), 4))
    (evaluated,) = evaluation_datasets(args, space, 0)
    assert trained.vocabulary.names == evaluated.vocabulary.names == ("dog",)
    args.predict, args.vocabulary = ("a.png",), "dog"
    assert evaluation_datasets(args, space, 0) == []
