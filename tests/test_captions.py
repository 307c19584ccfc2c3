"""Conceptual Captions without tags: the classes are those that the captions name."""

import json
import logging

import pytest
from PIL import Image

from common.datasets import load_datasets
from common.datasets.readers.captions import class_finder
from common.errors import InputError
from common.labels import DATA, Vocabulary

LVIS = Vocabulary.known("lvis").names


def lines(path, *rows: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def pictures(folder, *files: str):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(folder / file)


def load(text, root=""):
    return load_datasets(text, "train", str(root), accepts=("image_labels",))[0]


def content(dataset) -> list[tuple[str, tuple[str, ...], list[str]]]:
    """File, captions and class names of each image."""
    items = [dataset.load(i) for i in range(len(dataset))]
    names = [[LVIS[label] for label in item.image_labels.tolist()] for item in items]
    return [(dataset.index.file_name(i), item.captions, names[i]) for i, item in enumerate(items)]


@pytest.mark.parametrize(
    "caption, names",
    [
        ("a Dog beside the cat", ["cat", "dog"]),
        ("dog", ["dog"]),
        ("dogs and hotdogs", []),
        (
            "an aeroplane over the cocktail table , at night",
            ["airplane", "coffee_table", "table"],
        ),  # synonyms
        ("a cocktail, table", ["table"]),
        ("(the t-shirt).", ["jersey"]),
        ("a doll's house", ["dollhouse"]),
        (
            "fish",
            ["fish", "fish_(food)"],
        ),  # as in the original: the parentheses are no part of the name
        ("", []),
    ],
)
def test_classes_in_a_caption(caption, names):
    assert [LVIS[label] for label in class_finder()(caption)] == names


def test_the_finder_agrees_with_a_search_for_every_name():
    record = json.loads((DATA / "vocabularies/lvis.json").read_text())
    assert len(record["synonyms"]) == len(LVIS) and all(record["synonyms"])
    caption = (
        "the cat on a cocktail table near an alarm clock , traffic light and toy animal "
        "with a polo shirt"
    )
    expected = []
    for label, names in enumerate(record["synonyms"]):
        plain = [f" {name.replace('_', ' ').split('(')[0].strip().lower()} " for name in names]
        if any(name in f" {caption} " for name in plain):
            expected.append(label)
    assert class_finder()(caption) == expected and len(expected) >= 5


def test_the_published_lines_with_numbered_images(tmp_path, caplog):
    rows = (
        "a cat\thttp://x/1",
        "a dog\thttps://y/p.png?a=b",
        "nothing known\thttp://z",
        "the dog's cat\thttp://w",
    )
    lines(tmp_path / "cc3m/Train_GCC-training.tsv", *rows)
    pictures(tmp_path / "cc3m/training", "1.jpg", "3.jpg", "4.jpg")
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load("cc", tmp_path)
    assert content(dataset) == [
        ("1.jpg", ("a cat",), ["cat"]),
        ("4.jpg", ("the dog's cat",), ["cat"]),
    ]
    assert (
        "1 of 4 images are not in" in caplog.text
        and "1 images whose caption names no class" in caplog.text
    )
    assert dataset.name == dataset.vocabulary.dataset == "cc" and dataset.vocabulary.names == LVIS
    assert "2 images (0 without label and caption), 2 image labels, 2 captions" in dataset.summary()


@pytest.mark.parametrize("with_lines", [True, False])
def test_what_img2dataset_writes(tmp_path, caplog, with_lines):
    if with_lines:
        lines(tmp_path / "cc3m/GCC-training.tsv", "a cat\thttp://x/1", "a dog\thttp://x/2")
    folder = tmp_path / "cc3m/training"
    pictures(folder, "00000/000000012.jpg", "00001/000010003.jpg", "00001/000010004.jpg")
    lines(folder / "00000/000000012.txt", "a red Bicycle ")
    lines(folder / "00001/000010003.txt", "two dogs")
    lines(folder / "00001/000010009.txt", "a cat that failed to download")
    (folder / "00001/000010003.json").write_text("{}")
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load("cc", tmp_path)
    assert content(dataset) == [("00000/000000012.jpg", ("a red Bicycle",), ["bicycle"])]
    assert "1 images whose caption names no class" in caplog.text


def test_own_lines_of_caption_and_path(tmp_path):
    lines(tmp_path / "a.tsv", "ein Bär, a bear\tb/ü.png", "a cat\tb/gone.png")
    pictures(tmp_path / "images", "b/ü.png")
    dataset = load(f"my={tmp_path}/a.tsv:{tmp_path}/images/")
    assert (
        content(dataset) == [("b/ü.png", ("ein Bär, a bear",), ["bear"])] and dataset.name == "my"
    )


@pytest.mark.parametrize(
    "rows, words",
    [
        (["a cat\t1.png", "a dog"], "a.tsv: line 2 has 1 columns; write the caption, a tab"),
        (["a cat\t1.png\tmore"], "line 1 has 3 columns"),
        (["a cat\t../1.png"], r"'\.\./1\.png' leaves the image folder"),
        (["a cat\t/1.png"], "leaves the image folder"),
        (["a cat\thttp://x"], r"no image of .*a\.tsv is in .*images; download them as LINE\.jpg"),
        (["nothing\t1.png"], r"none of the 1 captions of .*a\.tsv names a class"),
        ([], "no image of"),
    ],
)
def test_bad_lines(tmp_path, rows, words):
    lines(tmp_path / "a.tsv", *rows)
    pictures(tmp_path / "images", "1.png")
    with pytest.raises(InputError, match=words):
        load(f"my={tmp_path}/a.tsv:{tmp_path}/images/")


def test_captions_that_are_no_text(tmp_path):
    pictures(tmp_path / "cc3m/training", "0/1.jpg")
    (tmp_path / "cc3m/training/0/1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"0/1\.txt cannot be read"):
        load("cc", tmp_path)
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"a\.tsv cannot be read"):
        load(f"my={tmp_path}/a.tsv:{tmp_path}")
