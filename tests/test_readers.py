"""Published layouts: VOC, ImageNet's boxes, Visual Genome, ODinW-13, COCO-Stuff and others."""

import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import REAL
from PIL import Image

from common.datasets import load_datasets, store
from common.datasets.grammar import parse_datasets
from common.datasets.names import eval_entries
from common.datasets.readers import openimages, panoptic, voc
from common.datasets.readers import visual_genome as vg
from common.errors import InputError
from common.labels import DATA, Vocabulary

ALL = ("boxes", "instances", "semantic", "panoptic", "image_labels")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")


def load(text, root="", split="val", **more):
    return load_datasets(text, split, str(root), accepts=ALL, **more)[0]


def refused(text, root="", **more):
    with pytest.raises(InputError) as error:
        load(text, root, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def photo(path, width=60, height=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "teal").save(path)


def thing(name, *corners, difficult=0):
    box = "".join(f"<{c}>{x}</{c}>" for c, x in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    parts = (
        "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>" if name == "person" else ""
    )
    fields = f"<name>{name}</name>{parts}<difficult>{difficult}</difficult>"
    return f"<object>{fields}<bndbox>{box}</bndbox></object>"


def xml(path, *things, size="<size><width>60</width><height>40</height></size>"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><folder>f</folder>{size}{''.join(things)}</annotation>")


def voc_year(year, **lists):
    """Writes xml files, images and lists. Image n has a cat whose box is n pixels high."""
    for part, ids in lists.items():
        for id in ids:
            xml(year / f"Annotations/{id}.xml", thing("cat", 1, 1, 60, int(id[-1])))
            photo(year / f"JPEGImages/{id}.jpg")
        (year / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (year / f"ImageSets/Main/{part}.txt").write_text("".join(f"{id}\n" for id in ids))


# -- Pascal VOC


@pytest.mark.parametrize("base", ["VOCdevkit", "."])
def test_voc_trains_on_both_years_and_is_tested_on_2007(tmp_path, base):
    devkit = tmp_path / base
    voc_year(
        devkit / "VOC2007",
        trainval=["000005", "000007"],
        train=["000005"],
        val=["000007"],
        test=["000001"],
    )
    voc_year(
        devkit / "VOC2012", trainval=["2008_000002"], train=["2008_000002"], val=["2008_000003"]
    )
    ids = {
        s: list(load("voc", tmp_path, s).index.image_ids)
        for s in ("train", "val", "train2007", "val2012")
    }
    assert ids == {
        "train": ["000005", "000007", "2008_000002"],
        "val": ["000001"],
        "train2007": ["000005"],
        "val2012": ["2008_000003"],
    }
    dataset = load("voc", tmp_path, "train")
    assert dataset.load(2).boxes.tolist() == [[0, 0, 60, 2]]  # the image of its own year
    assert [dataset.vocabulary.names[k] for k in dataset.load(2).labels] == ["cat"]
    assert dataset.vocabulary == Vocabulary.known("voc") and dataset.metric == "coco"


def test_voc_boxes_are_pixel_edges_and_difficult_objects_are_ignored(tmp_path):
    voc_year(tmp_path / "VOCdevkit/VOC2007", test=["000001"])
    xml(
        tmp_path / "VOCdevkit/VOC2007/Annotations/000001.xml",
        thing("person", 1, 1, 60, 40),
        thing("dog", "10.", "20.5", 30, 40, difficult=1),
        thing("tvmonitor", 7, 9, 7, 9),
    )
    dataset = load("voc", tmp_path)
    sample, whole = dataset.load(0), dataset.load(0, keep_ignored=True)
    assert sample.boxes.tolist() == [[0, 0, 60, 40], [6, 8, 7, 9]]  # the second is one pixel
    assert whole.boxes.tolist()[1] == [9, 19.5, 30, 40] and dataset.index.ignore.tolist() == [
        False,
        True,
        False,
    ]
    assert dataset.index.sizes.tolist() == [[40, 60]] and dataset.index.areas.tolist() == [
        2400,
        2.0**40,
        1,
    ]
    assert [dataset.vocabulary.ids[k] for k in whole.labels] == [
        15,
        12,
        20,
    ]  # the values in SegmentationClass


def test_own_xml_files(tmp_path, caplog):
    xml(tmp_path / "ann/b.xml", thing("zebra", 2, 2, 9, 9), size="")
    xml(tmp_path / "ann/deep/a.xml", thing("ant", 2, 2, 9, 9), thing("zebra", 5, 5, 9, 9))
    xml(tmp_path / "ann/none.xml")
    for name in ("b.png", "deep/a.JPG", "none.jpg", "unmarked.jpg"):
        photo(tmp_path / "img" / name)
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load(f"my={tmp_path}/ann:{tmp_path}/img/")
    assert "1 images without an xml file" in caplog.text
    assert dataset.vocabulary.names == ("ant", "zebra") and dataset.supervision == "boxes"
    found = {dataset.index.file_name(i): dataset.load(i).labels.tolist() for i in range(3)}
    assert found == {"b.png": [1], "deep/a.JPG": [0, 1], "none.jpg": []}
    assert dataset.index.sizes[0].tolist() == [0, 0]  # that file does not tell
    assert eval_entries("", f"my={tmp_path}/ann:{tmp_path}/img/") != ""


def test_xml_files_beside_their_images(tmp_path):
    xml(tmp_path / "a_jpg.rf.1.xml", thing("ant", 2, 2, 9, 9))
    photo(tmp_path / "a_jpg.rf.1.png")
    dataset = load(f"my={tmp_path}/:{tmp_path}/")
    assert dataset.index.file_name(0) == "a_jpg.rf.1.png" and dataset.load(0).boxes.tolist() == [
        [1, 1, 9, 9]
    ]


def test_own_list_of_xml_files(tmp_path):
    voc_year(tmp_path, trainval=["000001", "000002"], val=["000002"])
    dataset = load(f"my={tmp_path}/ImageSets/Main/val.txt:{tmp_path}/JPEGImages")
    assert list(dataset.index.image_ids) == ["000002"] and dataset.load(0).boxes.tolist() == [
        [0, 0, 60, 2]
    ]
    assert len(load(f"my={tmp_path}/ImageSets/Main/trainval.txt:{tmp_path}/JPEGImages")) == 2


def test_a_folder_of_label_maps_stays_one(tmp_path):
    photo(tmp_path / "img/a.jpg", 2, 1)
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.array([[0, 1]], np.uint8)).save(tmp_path / "maps/a.png")
    (tmp_path / "maps/classes.txt").write_text("cat\ndog")
    xml(tmp_path / "maps/a.xml", thing("cat", 1, 1, 2, 1))
    assert load(f"my={tmp_path}/maps:{tmp_path}/img").supervision == "semantic"


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")
)  # a thousand million "ha"


@pytest.mark.parametrize(
    "text, words",
    [
        ("<annotation><object>", ["no element found"]),
        ("", ["no element found"]),
        ("<svg></svg>", ["<svg>", "<annotation>"]),
        ("<annotation><size><width>wide</width></size></annotation>", ["'wide'"]),
        (f"{LAUGHS}]><annotation>&j;</annotation>", ["DOCTYPE"]),
        (
            f'<?xml version="1.0" encoding="utf-16"?>{LAUGHS}]><annotation>&j;</annotation>',
            ["DOCTYPE"],
        ),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', ["DOCTYPE"]),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            ["object 1 ('cat')", "bndbox", "has none"],
        ),
        (
            f"<annotation>{thing('cat', 1, 2, 3)}</annotation>",
            ["bndbox", "xmax, ymax", "'xmax': '3'}"],
        ),
        (f"<annotation>{thing('cat', 1, 2, 3, 'four')}</annotation>", ["object 1", "four"]),
        (f"<annotation>{thing(' ', 1, 2, 3, 4)}</annotation>", ["object 1 has no name"]),
        (f"<annotation>{thing('fat' + chr(10) + 'cat', 1, 2, 3, 4)}</annotation>", ["'fat cat'"]),
        (
            f"<annotation>{thing('yak', 1, 2, 3, 4)}</annotation>",
            ["'yak'", "not one of 'voc'", "my=ANNOTATIONS/:"],
        ),
        (
            f"<annotation>{thing('cat', 'nan', 2, 3, 4)}</annotation>",
            ["000001.jpg", "nan", "NaN or negative size"],
        ),
        (
            f"<annotation>{thing('cat', 30, 2, 3, 4)}</annotation>",
            ["000001.jpg", "[29.0, 1.0, 3.0, 4.0]"],
        ),
    ],
)
def test_bad_xml_gets_one_line(tmp_path, text, words):
    voc_year(tmp_path / "VOCdevkit/VOC2007", test=["000001"])
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000001.xml"
    path.write_text(text, encoding="utf-16" if "utf-16" in text else "utf-8")
    start = time.perf_counter()
    line = refused("voc", tmp_path)
    assert time.perf_counter() - start < 2
    # Index.build checks the boxes of all files at once and names the list
    assert (str(path) in line or "ImageSets/Main/test.txt" in line) and all(
        word in line for word in words
    ), line


def test_missing_files_get_one_line(tmp_path):
    voc_year(tmp_path / "VOCdevkit/VOC2007", test=["000001", "000002"])
    year = tmp_path / "VOCdevkit/VOC2007"
    assert "VOC2012/ImageSets/Main/val.txt does not exist" in refused("voc:val2012", tmp_path)
    (year / "JPEGImages/000002.jpg").unlink()
    line = refused("voc", tmp_path)
    assert "VOC2007/JPEGImages/000002.jpg is missing (1 of 2" in line
    line = refused(f"my={year}/Annotations:{year}/JPEGImages")
    assert "000002.xml has no image" in line and "(1 of 2 xml files)" in line
    (year / "Annotations/000001.xml").unlink()
    assert "000001.xml cannot be read (No such file" in refused("voc", tmp_path)
    (year / "ImageSets/Main/test.txt").write_text("\n")
    assert "test.txt: none of its 0 xml files has an object" in refused("voc", tmp_path)
    (tmp_path / "list.txt").write_text("000001")  # not in ImageSets/Main
    assert "Annotations/000001.xml cannot be read" in refused(f"my={tmp_path}/list.txt:{tmp_path}")


def test_no_generated_stand_in_gets_one_line():
    for name in ("voc", "vg", "in-boxes", "odinw13", "mapillary", "coco-stuff"):
        line = refused(name, tiny=32)
        assert re.search(
            rf"no generated dataset '({name}|odinw-AerialMaritimeDrone)'; there are coco", line
        )
        assert "leave out --tiny" in line


@needs_real
@pytest.mark.parametrize(
    "folder, list, images, boxes, classes",
    [
        ("bccd", "", 90, 1431, ("Platelets", "RBC", "WBC")),
        ("bccd", "train", 60, 1001, ("Platelets", "RBC", "WBC")),
        ("bccd", "val", 30, 430, ("Platelets", "RBC", "WBC")),
        ("voc/labelme_voc2011", "", 3, 9, ("bus", "car", "person")),
        ("voc/VOC2007", "", 1, 4, ("chair", "diningtable", "person")),
    ],
)
def test_real_xml_files(folder, list, images, boxes, classes):
    root = REAL / folder
    source = root / f"ImageSets/Main/{list}.txt" if list else root / "Annotations"
    dataset = load(f"my={source}:{root / 'JPEGImages'}")
    assert (len(dataset), len(dataset.index.labels), dataset.vocabulary.names) == (
        images,
        boxes,
        classes,
    )
    assert not dataset.index.outside().any()
    for i in range(len(dataset)):
        sample = dataset.load(i, keep_ignored=True)
        assert len(sample.boxes) == dataset.index.offsets[i + 1] - dataset.index.offsets[i]
        assert sample.original_size == tuple(dataset.index.sizes[i])


@needs_real
def test_the_real_record_of_voc(tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    year = tmp_path / "VOCdevkit/VOC2007"
    (year / "ImageSets/Main").mkdir(parents=True)
    (year / "ImageSets/Main/test.txt").write_text("000085\n")
    for folder in ("Annotations", "JPEGImages"):
        (year / folder).symlink_to((REAL / "voc/VOC2007" / folder).resolve())
    dataset = load("voc", tmp_path)
    sample = dataset.load(0)  # its table and the man behind it are difficult
    assert [dataset.vocabulary.names[k] for k in sample.labels] == ["chair", "person"]
    assert sample.boxes.tolist() == [[5, 103, 218, 278], [21, 69, 254, 327]]


def test_what_is_no_file_is_refused(tmp_path):
    voc_year(tmp_path / "VOC2007", test=["000001"])
    (tmp_path / "VOC2007/Annotations/000001.xml").unlink()
    os.mkfifo(tmp_path / "VOC2007/Annotations/000001.xml")
    assert "000001.xml is no regular file, but a device or pipe" in refused("voc", tmp_path)
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_bytes(b"1\0\n")
    assert "test.txt: file_name '1\\x00' (2 letters) can be no file's" in refused("voc", tmp_path)
    (tmp_path / "VOC2007/Annotations/000001.xml").unlink()
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_text("000001\n")
    size = "<size><width>2147483648</width><height>5</height></size>"
    xml(tmp_path / "VOC2007/Annotations/000001.xml", thing("cat", 1, 1, 2, 2), size=size)
    assert "VOC2007/JPEGImages/000001.jpg' has the size [5.0, 2147483648.0]" in refused(
        "voc", tmp_path
    )


# -- ImageNet's boxes


def imagenet(
    root,
    *wnids,
    words="n02084071\tdog, domestic dog\nn02012849\tcrane\nn03126707\tcrane, derrick\n",
):
    for i, wnid in enumerate(wnids):
        size = "<size><width>30</width><height>20</height></size>"  # half of the image's
        things = thing(wnid, 3, 2, 21, 10), thing("Scottish_deerhound", 15, 10, 0, 0)
        xml(root / f"imagenet/Annotation/{wnid}/{wnid}_{i}.xml", *things, size=size)
        photo(root / f"imagenet/ImageNet-21K/{wnid}/{wnid}_{i}.JPEG")
        photo(root / f"imagenet/ImageNet-21K/{wnid}/{wnid}_99.JPEG")  # without boxes, as most are
    (root / "imagenet/words.txt").write_text(words)


def test_imagenet_boxes(tmp_path):
    imagenet(tmp_path, "n03126707", "n02084071", "n02012849")
    dataset = load("in-boxes", tmp_path)
    assert dataset.vocabulary.names == ("crane", "dog")  # the bird and the machine have one name
    assert dataset.vocabulary.ids == ("n02012849", "n02084071") and len(dataset) == 3
    labels = {dataset.index.file_name(i): dataset.load(i).labels.tolist() for i in range(3)}
    assert labels == {
        "n02012849/n02012849_2.JPEG": [0, 0],
        "n02084071/n02084071_1.JPEG": [1, 1],
        "n03126707/n03126707_0.JPEG": [0, 0],
    }
    expected = [[6, 4, 42, 20], [0, 0, 30, 20]]
    assert dataset.load(0).boxes.tolist() == [pytest.approx(box, abs=1e-5) for box in expected]
    dataset.load(0)
    assert not dataset.warned  # that the image has another size is as it should be
    xml(
        tmp_path / "imagenet/Annotation/n02084071/n02084071_1.xml",
        thing("n02084071", 1, 1, 9, 9),
        size="",
    )
    assert "n02084071_1.xml does not tell the size" in refused("in-boxes", tmp_path)


def test_imagenet_boxes_without_a_name_or_an_image(tmp_path):
    imagenet(tmp_path, "n02084071", "n09999999")
    line = refused("in-boxes", tmp_path)
    assert "n09999999 is a WordNet id without a name" in line and "words.txt" in line
    imagenet(tmp_path, "n02084071", "n02012849")
    (tmp_path / "imagenet/Annotation/n09999999/n09999999_1.xml").unlink()
    (tmp_path / "imagenet/ImageNet-21K/n02084071/n02084071_0.JPEG").unlink()
    assert "n02084071_0.JPEG is missing (1 of 2" in refused("in-boxes", tmp_path)


# -- Visual Genome


def visual_genome(root, **changes):
    """Two images of the two folders; `changes` of the first object."""
    folder = root / "vg"
    images = [
        {
            "image_id": id,
            "url": f"https://cs.stanford.edu/people/rak248/{place}/{id}.jpg",
            "width": 60,
            "height": 40,
            "coco_id": None,
            "flickr_id": None,
        }
        for id, place in ((1, "VG_100K_2"), (2317993, "VG_100K"))
    ]
    things = [
        {
            "synsets": ["clock.n.01"],
            "h": 30,
            "object_id": 5,
            "merged_object_ids": [],
            "names": ["clock"],
            "w": 10,
            "y": 4,
            "x": 3,
        }
        | changes,
        {"synsets": [], "h": 9, "object_id": 6, "names": ["thingy"], "w": 9, "y": 4, "x": 3},
        {
            "synsets": ["street_sign.n.01", "sign.n.02"],
            "h": 1,
            "object_id": 7,
            "names": ["sign"],
            "w": 2,
            "y": 0,
            "x": 0,
        },
    ]
    for image in images:
        photo(folder / image["url"].split("rak248/")[1])
    more = [
        {
            "synsets": ["clock.n.02"],
            "h": 9,
            "object_id": 8,
            "names": ["clocks"],
            "w": 9,
            "y": 4,
            "x": 3,
        }
    ]
    objects = [
        {"image_id": 2317993, "objects": things, "image_url": "u"},
        {"image_id": 1, "objects": more},
    ]
    (folder / "image_data.json").write_text(json.dumps(images))
    (folder / "objects.json").write_text(json.dumps(objects))
    return folder


def test_visual_genome(tmp_path, caplog):
    visual_genome(tmp_path)
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load("vg", tmp_path)
    assert "1 of 4 objects have no synset and are left out" in caplog.text
    assert dataset.vocabulary.names == (
        "clock",
        "street sign",
    )  # two synsets of one word are one class
    assert [dataset.index.file_name(i) for i in (0, 1)] == [
        "VG_100K_2/1.jpg",
        "VG_100K/2317993.jpg",
    ]
    assert (
        list(dataset.index.image_ids) == [1, 2317993]
        and dataset.index.sizes.tolist() == [[40, 60]] * 2
    )
    sample = dataset.load(1)
    assert sample.boxes.tolist() == [[3, 4, 13, 34], [0, 0, 2, 1]] and sample.labels.tolist() == [
        0,
        1,
    ]
    assert dataset.load(0).labels.tolist() == [0] and len(load("vg", tmp_path, "train")) == 2


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("image_data.json", None, ["image_data.json does not exist", "visualgenome.org"]),
        ("objects.json", "[{", ["objects.json is not valid json"]),
        ("objects.json", '{"images": []}', ["objects.json holds a json object; a list is needed"]),
        ("objects.json", '[{"image_id": 9, "objects": []}]', ["image_id 9", "image_data.json"]),
        ("objects.json", '[{"image_id": 1}]', ["objects.json: field 'objects' is missing"]),
        ("objects.json", "[7]", ["objects.json: ", "in an entry"]),
        ("image_data.json", '[{"image_id": 1}]', ["image_data.json: field 'url' is missing"]),
        (
            "image_data.json",
            '[{"image_id": 1, "url": "a/b.jpg", "width": null, "height": 1}]',
            ["image_data.json: int()"],
        ),
        (
            "image_data.json",
            '[{"image_id": 1, "url": "a/../b.jpg", "width": 1, "height": 1}]',
            ["leaves the image"],
        ),
    ],
)
def test_bad_visual_genome_gets_one_line(tmp_path, file, text, words):
    path = visual_genome(tmp_path) / file
    path.unlink() if text is None else path.write_text(text)
    line = refused("vg", tmp_path)
    assert all(word in line for word in words), line


def test_bad_boxes_of_visual_genome_get_one_line(tmp_path):
    visual_genome(tmp_path, w=-4)
    assert "VG_100K/2317993.jpg" in refused("vg", tmp_path)
    visual_genome(tmp_path, x="left")
    assert "objects.json: " in refused("vg", tmp_path)
    folder = visual_genome(tmp_path)
    images = json.loads((folder / "image_data.json").read_text())
    (folder / "image_data.json").write_text(json.dumps(images + images[:1]))
    assert "an image_id comes twice" in refused("vg", tmp_path)
    visual_genome(tmp_path)
    (folder / "VG_100K/2317993.jpg").unlink()
    assert "VG_100K/2317993.jpg is missing (1 of 2" in refused("vg", tmp_path)


# -- ODinW-13

# test.ann_file of microsoft/GLIP:configs/odinw_13/*.yaml, val's where there is no test
ODINW = [
    "AerialMaritimeDrone/large/test/",
    "Aquarium/Aquarium Combined.v2-raw-1024.coco/test/",
    "CottontailRabbits/test/",
    "EgoHands/generic/test/",
    "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco/test/",
    "Packages/Raw/test/",
    "PascalVOC/valid/",
    "pistols/export/test_",
    "pothole/test/",
    "Raccoon/Raccoon.v2-raw.coco/test/",
    "ShellfishOpenImages/raw/test/",
    "thermalDogsAndPeople/test/",
    "VehiclesOpenImages/416x416/test/",
]


def test_odinw_in_its_official_layout(tmp_path):
    for number, place in enumerate(ODINW, 1):
        record = {
            "images": [{"id": 0, "file_name": "a.jpg", "width": 60, "height": 40}],
            "categories": [
                {"id": k, "name": f"class {k}", "supercategory": "x"} for k in range(1, number + 1)
            ],
            "annotations": [
                {"id": 0, "image_id": 0, "category_id": number, "bbox": [1, 2, 3, 4], "iscrowd": 0}
            ],
        }
        path = tmp_path / "odinw" / f"{place}annotations_without_background.json"
        photo(path.parent / "a.jpg")
        path.write_text(json.dumps(record))
    datasets = load_datasets("odinw13:test", "train", str(tmp_path))
    assert [d.name for d in datasets] == [f"odinw-{place.split('/')[0]}" for place in ODINW]
    assert [len(d.vocabulary) for d in datasets] == list(range(1, 14))  # each its own
    assert all(d.load(0).boxes.tolist() == [[1, 2, 4, 6]] for d in datasets)
    assert load("odinw-PascalVOC", tmp_path).index.source.endswith(
        "valid/annotations_without_background.json"
    )
    assert "pistols/export/val_annotations" in refused("odinw-pistols", tmp_path)
    assert "pothole/train/annotations" in refused("odinw-pothole", tmp_path, split="train")


def test_the_group_in_the_grammar():
    names = [f"odinw-{place.split('/')[0]}" for place in ODINW]
    assert parse_datasets("coco,odinw13:test", "val") == [
        ("coco", "val", None),
        *((n, "test", None) for n in names),
    ]
    assert eval_entries("", "odinw13:train,coco") == ",".join([*names, "coco"])
    with pytest.raises(InputError, match="'odinw-pothole' is named twice"):
        parse_datasets("odinw13,odinw-pothole", "val")
    with pytest.raises(InputError, match="nearest: odinw13"):
        parse_datasets("odinw-13", "val")


# -- label maps


def pair(maps, images, key, values, ending=".png", palette=False):
    photo(images / f"{key}.jpg", len(values), 1)
    maps.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array([values], np.uint8), "P" if palette else "L")
    if palette:
        image.putpalette(list(range(255, 255 - 198, -1)) + [7] * 570)
    image.save(maps / f"{key}{ending}")


def classes(dataset):
    """The original id at each pixel of the only image, None where it is void."""
    sample = dataset.load(0)
    ids = [dataset.vocabulary.ids[k] for k in sample.labels]
    return [ids[k] if k >= 0 else None for k in sample.segments[0].tolist()]


@pytest.mark.parametrize("labels", ["labels", "v1.2/labels"])
def test_mapillary(tmp_path, labels):
    folder = tmp_path / "mapillary_vistas/validation"
    pair(folder / labels, folder / "images", "-0C1J9", [0, 64, 65, 13], palette=True)
    dataset = load("mapillary", tmp_path)
    assert classes(dataset) == [0, 64, None, 13] and dataset.metric == "miou"
    assert dataset.vocabulary.names[13] == "Road" and len(dataset.vocabulary) == 65
    pair(folder / labels, folder / "images", "-0C1J9", [0, 66], palette=True)  # as in v2.0
    with pytest.raises(InputError, match="has the value 66"):
        load("mapillary", tmp_path).load(0)


def test_coco_stuff_in_both_layouts(tmp_path):
    key = "COCO_train2014_000000000077"
    for part, split in (("train", "train"), ("test", "val")):
        base = tmp_path / "mmseg/coco_stuff10k"
        pair(
            base / f"annotations/{part}2014",
            base / f"images/{part}2014",
            key,
            [0, 1, 12, 171],
            "_labelTrainIds.png",
        )
        base = tmp_path / "maskformer/coco/coco_stuff_10k"
        maps, images = base / f"annotations_detectron2/{part}", base / f"images_detectron2/{part}"
        pair(maps, images, key, [255, 0, 11, 170])
        for root in ("mmseg", "maskformer"):
            dataset = load("coco-stuff", tmp_path / root, split)
            assert classes(dataset) == [None, 1, 13, 182]  # person, stop sign, wood
    pair(maps, images, key, [171])
    with pytest.raises(InputError, match="has the value 171"):
        load("coco-stuff", tmp_path / "maskformer").load(0)


# -- vocabularies


def test_facts_of_the_vocabularies():
    voc, stuff, coco = (Vocabulary.known(name) for name in ("voc", "coco-stuff", "coco"))
    assert voc.names == tuple(sorted(voc.names)) and voc.ids == tuple(range(1, 21))
    assert stuff.names[:80] == coco.names and stuff.ids[:80] == coco.ids
    assert stuff.ids[80:] == tuple(range(92, 183))
    assert Vocabulary.known("mapillary").ids == tuple(range(65))
    for file in (DATA / "vocabularies").glob("*.json"):
        assert json.loads(file.read_text())["origin"], file


@needs_real
def test_the_vocabularies_are_those_published():
    published = json.loads((REAL / "label_spaces/mapillary_v1.1_config.json").read_text())["labels"]
    mapillary = Vocabulary.known("mapillary")
    assert [label["readable"] for label in published if label["evaluate"]] == list(mapillary.names)
    assert [label["instances"] for label in published if label["evaluate"]] == list(
        mapillary.is_thing
    )
    assert [label["evaluate"] for label in published] == [True] * 65 + [False]  # 65: unlabelled


# -- OpenImages

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def openimages_files(
    root,
    box="{part}-annotations-bbox.csv",
    label="{part}-annotations-human-imagelabels-boxable.csv",
):
    """Image a has an infant bed (one of the 500) and a toothbrush (one of the 601 only).

    Image b has a verified label and no box.
    """
    folder = root / "oid/annotations"
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation"):
        bed, brush = (
            "a,xclick,/m/061hd_,1,0.1,0.5,0.2,0.6,0,0,1,0,0",
            "a,xclick,/m/012xff,1,0,1,0,1,0,0,0,0,0",
        )
        (folder / box.format(part=part)).write_text("\n".join([HEADER, bed, brush, ""]))
        labels = [
            "ImageID,Source,LabelName,Confidence",
            "a,verification,/m/061hd_,1",
            "b,verification,/m/061hd_,0",
        ]
        (folder / label.format(part=part)).write_text("\n".join([*labels, ""]))
        photo(root / f"oid/images/{part}/a.jpg")
        photo(root / f"oid/images/{part}/b.jpg")


def test_openimages_with_500_and_601_classes(tmp_path, caplog):
    openimages_files(tmp_path)
    with caplog.at_level(logging.INFO, "concord"):
        all_classes = load("oid", tmp_path, "train")
        challenge = load("oid500", tmp_path, "train", check=False)  # its one box is a group
    assert "1 boxes of classes that are not among the 500 are left out" in caplog.text
    assert (len(all_classes.vocabulary), len(challenge.vocabulary)) == (601, 500) and len(
        all_classes
    ) == 1
    assert [all_classes.vocabulary.names[k] for k in all_classes.index.labels] == [
        "Infant bed",
        "Toothbrush",
    ]
    assert challenge.index.boxes.tolist() == [
        pytest.approx([0.1, 0.2, 0.5, 0.6])
    ]  # x, y, x, y; the file has x, x, y, y
    assert all_classes.index.ignore.tolist() == [True, False]  # a group


def test_what_is_verified_absent_is_evaluated_without_a_box(tmp_path):
    openimages_files(tmp_path)
    dataset = load("oid500", tmp_path)
    assert list(dataset.index.verified) == [[dataset.vocabulary.index_of_id["/m/061hd_"]], []]
    assert [dataset.index.file_name(i) for i in range(2)] == ["a.jpg", "b.jpg"]
    assert list(dataset.index.negatives) == [[], [dataset.vocabulary.index_of_id["/m/061hd_"]]]
    assert len(dataset.load(1).boxes) == 0


def test_openimages_without_what_its_metric_needs_says_so(tmp_path, caplog):
    openimages_files(tmp_path)
    load("oid", tmp_path, "train")
    assert not caplog.text
    load("oid", tmp_path)
    assert (
        "there is no bbox_labels_600_hierarchy.json beside it, so the AP50 will not be"
        in caplog.text
    )
    (tmp_path / "oid/bbox_labels_600_hierarchy.json").write_text("{}")
    (tmp_path / "oid/annotations/validation-annotations-human-imagelabels-boxable.csv").unlink()
    load("oid", tmp_path)
    assert (
        "there is no validation-annotations-human-imagelabels-boxable.csv beside it" in caplog.text
    )


def test_the_list_of_classes_may_have_a_header(tmp_path):
    openimages_files(tmp_path)
    (tmp_path / "oid/class-descriptions-boxable.csv").write_text(
        "LabelName,DisplayName\n/m/012xff,Toothbrush\n/m/061hd_,Infant bed\n"
    )
    assert load("oid", tmp_path).vocabulary.names == ("Toothbrush", "Infant bed")


def test_the_challenge_has_files_of_its_own(tmp_path):
    openimages_files(
        tmp_path,
        *(
            f"challenge-2019-{{part}}-detection-{kind}.csv"
            for kind in ("bbox", "human-imagelabels")
        ),
    )
    tree = {"LabelName": "/m/0bl9f", "Subcategory": [{"LabelName": "/m/061hd_"}]}
    (tmp_path / "oid/annotations/challenge-2019-label500-hierarchy.json").write_text(
        json.dumps(tree)
    )
    dataset = load("oid500", tmp_path)
    assert (
        dataset.hierarchy == tree
        and len(dataset) == 2
        and len(load("oid500", tmp_path, "train", check=False)) == 1
    )
    assert "validation-annotations-bbox.csv does not exist" in refused("oid", tmp_path)


# -- what large files are kept as


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """The readers that had to read their files, which are kept whatever their size."""
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LARGE", 0)
    done = []
    readers = (
        (openimages, "read_box_csv"),
        (panoptic, "read_segments"),
        (vg, "read_objects"),
        (voc, "read_xmls"),
    )
    for module, function in readers:
        title, read = module.__name__.rpartition(".")[2], getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *args, t=title, r=read: done.append(t) or r(*args)
        )
    return done


def columns(dataset):
    index = dataset.index
    arrays = [getattr(index, field) for field in (*store.ARRAYS, *store.ROWS)]
    return [None if a is None else list(map(str, a)) for a in arrays] + [
        dataset.vocabulary,
        dataset.summary(),
    ]


@pytest.mark.parametrize("name", ["oid", "coco-panoptic", "cityscapes-panoptic", "vg", "voc"])
def test_every_format_is_read_once(tmp_path, tiny_root, reads, monkeypatch, name):
    root = tmp_path if name in ("vg", "voc") else tiny_root
    visual_genome(tmp_path)
    voc_year(tmp_path / "VOCdevkit/VOC2007", trainval=["000001"], test=["000002", "000003"])
    monkeypatch.setattr(store, "LARGE", 1 << 30)
    plain = load(name, root)
    assert plain.index.folder is None and len(reads) == 1
    monkeypatch.setattr(store, "LARGE", 0)
    first, second = load(name, root), load(name, root)
    assert len(reads) == 2 and first.index.folder == second.index.folder
    assert columns(plain) == columns(first) == columns(second)
    assert all((a == b).all() for a, b in zip(plain.index.by_label, second.index.by_label))
    for i in range(len(plain)):
        a, b = plain.load(i), second.load(i)
        assert a.labels.tolist() == b.labels.tolist() and (
            a.boxes is None or a.boxes.tolist() == b.boxes.tolist()
        )


def test_a_change_of_any_file_is_seen(tmp_path, reads):
    voc_year(tmp_path / "VOC2007", test=["000002", "000003"])
    assert load("voc", tmp_path).index.labels.tolist() == [7, 7] and load("voc", tmp_path)
    xml(tmp_path / "VOC2007/Annotations/000003.xml", thing("dog", 1, 1, 9, 3))
    assert load("voc", tmp_path).index.labels.tolist() == [7, 11] and len(reads) == 2
    xml(tmp_path / "VOC2007/Annotations/000003.xml", thing("cow", 1, 1, 9, 3))  # of the same size
    assert load("voc", tmp_path).index.labels.tolist() == [7, 9] and len(reads) == 3
    xml(tmp_path / "VOC2007/Annotations/000003.xml", thing("cub", 1, 1, 9, 3))
    for _ in range(2):  # the class is not known, whether the file was read just now or not
        assert "000003.xml: the class 'cub'" in refused("voc", tmp_path)
    (tmp_path / "VOC2007/Annotations/000003.xml").unlink()
    assert "000003.xml cannot be read" in refused("voc", tmp_path)
    folder = visual_genome(tmp_path)
    load("vg", tmp_path)
    images = json.loads((folder / "image_data.json").read_text())
    (folder / "image_data.json").write_text(json.dumps([image | {"width": 61} for image in images]))
    assert load("vg", tmp_path).index.sizes.tolist() == [[40, 61]] * 2


def test_ones_own_panoptic_file_is_told_from_the_cache(tmp_path, tiny_root, reads, monkeypatch):
    entry = f"my={tiny_root}/coco/annotations/panoptic_val2017.json:{tiny_root}/coco/val2017"
    load(entry)
    monkeypatch.setattr(panoptic, "read_fields", None)
    assert load(entry).supervision == "panoptic" and len(reads) == 1


def test_processes_that_start_at_once_read_once(tmp_path, reads):
    visual_genome(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: load("vg", tmp_path), range(4)))
    assert len(reads) == 1 and len({dataset.index.folder for dataset in datasets}) == 1
