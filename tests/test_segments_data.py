"""Semantic and panoptic datasets: each pixel gets the label in the files, and keeps it."""

import json
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image

import common.transforms
from common.batch import Batch, Sample, collate
from common.datasets import load_datasets
from common.datasets.maps import label_table, read_label_map
from common.datasets.tiny import scene
from common.datasets.tiny.maps import LAYOUTS, stuff
from common.errors import InputError
from common.labels import Vocabulary
from common.masks import drop_unseen
from common.segment_map import padded_masks
from common.transforms import (
    DetrCrop,
    LargeScaleJitter,
    ResizeShortest,
    SegmentationCrop,
    jitter_colors,
    move,
)

ALL = ("boxes", "instances", "semantic", "panoptic", "image_labels")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")


def save(path, pixels):
    """Saves a list or array as a picture: one number per pixel, or three as a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def load(text, root="", split="val", **more):
    return load_datasets(text, split, str(root), accepts=ALL, **more)[0]


def refused(text, root="", load_first=False):
    with pytest.raises(InputError) as error:
        dataset = load(text, root)
        dataset.load(0)
    assert "\n" not in str(error.value)
    return str(error.value)


def of_pixels(sample):
    """(H, W): the label of each pixel, -1 void."""
    return np.append(sample.labels.numpy(), -1)[sample.segments.numpy()]


# -- samples


def segmented(height=4, width=6):
    """Three segments of the labels 5, 7, 5 and a void column, each in a colour of its own."""
    segments = torch.full((height, width), 1, dtype=torch.int16)
    segments[:, : width // 3], segments[: height // 2, width // 2 :], segments[:, -1] = 0, 2, -1
    image = torch.stack([segments * 40 + 50, segments * 60 + 70, 200 - segments * 50]).byte()
    none = torch.zeros(0, 4)
    return Sample(
        image,
        "d",
        "panoptic",
        0,
        0,
        (height, width),
        none,
        torch.tensor([5, 7, 5]),
        segments=segments,
    )


def test_masks_of_segments():
    sample = segmented()
    masks = padded_masks(sample, (5, 7)).stack()
    assert masks.dtype == torch.bool and masks.shape == (3, 5, 7)
    assert masks.sum(dim=(1, 2)).tolist() == [8, 8, 4] and not masks[:, :, 5:].any()
    sample.masks, sample.segments = masks[:, :4, :6], None
    assert torch.equal(padded_masks(sample, (5, 7)), masks)
    sample.masks = None
    with pytest.raises(ValueError, match="image '0' of d has no masks"):
        padded_masks(sample, (5, 7))


def test_rows_without_a_pixel_are_dropped():
    segments = torch.tensor([[3, 3, -1], [1, -1, 3]], dtype=torch.int16)
    rows, labels = drop_unseen(segments, torch.tensor([10, 11, 12, 13, 14]))
    assert (
        rows.tolist() == [[1, 1, -1], [0, -1, 1]]
        and labels.tolist() == [11, 13]
        and rows.dtype == torch.int16
    )
    rows, labels = drop_unseen(torch.full((2, 2), -1, dtype=torch.int16), torch.tensor([4]))
    assert len(labels) == 0 and (rows == -1).all()


def test_batches_keep_segments():
    batch = collate([segmented(), segmented(6, 9)], divisor=4, least={"d": (20, 20)})
    assert batch.images.shape == (2, 3, 20, 20) and [s.segments.shape for s in batch.samples] == [
        (4, 6),
        (6, 9),
    ]
    moved = Batch(batch.images, batch.sizes, batch.samples).to(torch.device("meta")).samples[0]
    assert moved.segments.is_meta and moved.labels.is_meta


# -- semantic label maps


def ade(root, maps="annotations", values=((0, 1, 150), (3, 3, 1)), split="validation"):
    base = root / "ADEChallengeData2016"
    for name in ("ADE_val_1", "ADE_val_2"):
        save(base / f"images/{split}/{name}.jpg", np.zeros((2, 3, 3)))
        save(base / f"{maps}/{split}/{name}.png", values)
    return base


def test_ade20k(tmp_path):
    ade(tmp_path)
    dataset = load("ade", tmp_path)
    assert (dataset.name, dataset.metric, dataset.supervision, len(dataset)) == (
        "ade20k",
        "miou",
        "semantic",
        2,
    )
    assert len(dataset.vocabulary) == 150 and dataset.vocabulary.is_thing is None
    sample = dataset.load(1)
    assert sample.labels.tolist() == [0, 2, 149] and sample.labels.dtype == torch.int64
    assert (
        sample.segments.tolist() == [[-1, 0, 2], [1, 1, 0]] and sample.segments.dtype == torch.int16
    )
    assert sample.boxes.shape == (0, 4) and sample.masks is None and sample.original_size == (2, 3)
    assert (sample.image_id, sample.supervision) == ("ADE_val_2", "semantic")
    assert dataset.image_counts() is None and dataset.index.positives()[0].size == 0
    assert dataset.summary().startswith("ade20k: 2 images with label maps, 150 classes")


def test_ade20k_as_detectron2_prepares_it(tmp_path):
    ade(tmp_path / "ade20k", "annotations_detectron2", [[255, 0, 149], [2, 2, 0]])
    assert of_pixels(load("ade20k", tmp_path).load(0)).tolist() == [[-1, 0, 149], [2, 2, 0]]


def test_start_up_decodes_no_map(tmp_path):
    base = ade(tmp_path)
    (base / "annotations/validation/ADE_val_1.png").write_bytes(b"")
    dataset = load("ade20k", tmp_path)
    dataset.summary()
    with pytest.raises(InputError, match=r"label map .*ADE_val_1\.png cannot be decoded"):
        dataset.load(0)
    assert len(dataset.load(1).labels) == 3


@pytest.mark.parametrize(
    "kinds, values",
    [
        (["labelIds", "labelTrainIds"], [[9, 7, 33], [14, 11, 8]]),
        (["labelTrainIds"], [[255, 0, 18], [255, 2, 1]]),
    ],
)
def test_cityscapes(tmp_path, kinds, values):
    for kind in kinds:
        save(tmp_path / f"cityscapes/gtFine/val/ulm/ulm_000001_gtFine_{kind}.png", values)
    save(tmp_path / "cityscapes/gtFine/val/ulm/ulm_000001_gtFine_color.png", np.zeros((2, 3, 3)))
    save(
        tmp_path / "cityscapes/leftImg8bit/val/ulm/ulm_000001_leftImg8bit.png", np.zeros((2, 3, 3))
    )
    dataset = load("cityscapes", tmp_path)
    assert (len(dataset), len(dataset.vocabulary), dataset.metric) == (1, 19, "miou")
    assert of_pixels(dataset.load(0)).tolist() == [[-1, 0, 18], [-1, 2, 1]]


def own(root, classes="sky\nroad\ncar\n\n", values=((0, 1, 2), (3, 255, 0)), place="classes.txt"):
    for name in ("a", "b/c"):
        save(root / f"images/{name}.jpg", np.zeros((2, 3, 3)))
        save(root / f"maps/{name}.png", values)
    (root / place).write_text(classes)
    return f"my={root}/maps/:{root}/images/"


@pytest.mark.parametrize("place", ["classes.txt", "maps/classes.txt"])
def test_own_label_maps(tmp_path, caplog, place):
    text = own(tmp_path, place=place)
    save(tmp_path / "images/no map.png", np.zeros((2, 3, 3)))
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load(text)
    assert "my: 1 images without a label map" in caplog.text and "first: no map" in caplog.text
    assert (
        dataset.vocabulary == Vocabulary("my", ("sky", "road", "car"), (0, 1, 2))
        and dataset.metric == "miou"
    )
    assert list(dataset.index.image_ids) == ["a", "b/c"]
    assert of_pixels(dataset.load(1)).tolist() == [[0, 1, 2], [-1, -1, 0]]


def test_label_maps_of_one_and_of_sixteen_bits(tmp_path):
    text = own(tmp_path, "\n".join(f"c{i}" for i in range(300)))
    Image.fromarray(np.array([[255, 299, 300]] * 2, np.uint16)).save(tmp_path / "maps/a.png")
    Image.fromarray(np.array([[0, 1, 1]] * 2, bool)).save(tmp_path / "maps/b/c.png")
    dataset = load(text)
    assert of_pixels(dataset.load(0))[0].tolist() == [255, 299, -1]
    assert of_pixels(dataset.load(1))[0].tolist() == [0, 1, 1]


def test_bad_label_maps(tmp_path):
    text, path = own(tmp_path), tmp_path / "maps/a.png"
    save(path, np.zeros((2, 4)))
    line = refused(text)
    assert (
        f"label map {path} has 2 x 4 pixels" in line
        and f"{tmp_path}/images/a.jpg has 2 x 3" in line
    )
    save(path, [[0, 0, 0], [0, 9, 4]])
    assert f"label map {path} has the value 9 at x = 1, y = 1" in (line := refused(text))
    assert "the values are 0 to 3, 255" in line
    save(path, np.zeros((2, 3, 3)))
    assert f"label map {path} is a picture of mode RGB" in refused(text)
    path.write_bytes(b"")
    assert f"label map {path} cannot be decoded" in refused(text)
    save(path, np.zeros((2, 3)))
    (tmp_path / "images/a.jpg").write_bytes(b"")
    assert f"image {tmp_path}/images/a.jpg cannot be decoded" in refused(text)


def test_bad_folders_of_label_maps(tmp_path):
    text = own(tmp_path)
    save(tmp_path / "maps/lost.png", [[0]])
    assert f"label map {tmp_path}/maps/lost.png has no image in" in refused(text)
    (tmp_path / "maps/lost.png").unlink()
    save(tmp_path / "images/a.png", np.zeros((2, 3, 3)))
    assert "a.png and a.jpg have one name" in refused(text)
    (tmp_path / "images/a.png").unlink()
    shutil.rmtree(tmp_path / "maps")
    assert "annotations" in refused(text) and "do not exist" in refused(text)
    (tmp_path / "maps").mkdir()
    assert f"{tmp_path}/maps holds no label maps" in refused(text)


@pytest.mark.parametrize(
    "classes, words",
    [
        ("sky\nroad\nsky", "class name 'sky' twice"),
        ("sky\n\nroad", "empty class name"),
        ("", "empty class name"),
    ],
)
def test_bad_lists_of_classes(tmp_path, classes, words):
    line = refused(own(tmp_path, classes))
    assert f"{tmp_path}/classes.txt" in line and words in line
    (tmp_path / "classes.txt").unlink()
    assert f"{tmp_path}/maps/classes.txt does not exist" in refused(
        own(tmp_path, place="other.txt")
    )


@needs_real
def test_real_ade20k():
    dataset = load("ade20k", REAL)
    assert len(dataset) == 3
    for i in range(3):
        sample = dataset.load(i)
        values = np.asarray(Image.open(dataset.maps / dataset.index.map_name(i))).astype(int)
        assert np.array_equal(of_pixels(sample), values - 1)  # 0 is void
        assert (
            np.array_equal(sample.labels + 1, np.setdiff1d(values, [0]))
            and sample.segments.shape == sample.size
        )
    names = [dataset.vocabulary.names[label] for label in dataset.load(0).labels]
    assert names == ["wall", "building", "sky", "tree", "road", "grass", "plant"]


@needs_real
def test_real_camvid():
    dataset = load(f"camvid={REAL}/camvid/trainannot:{REAL}/camvid/train")
    assert (len(dataset), len(dataset.vocabulary), dataset.vocabulary.names[9]) == (
        5,
        11,
        "pedestrian",
    )
    sample = dataset.load(4)
    values = np.asarray(Image.open(dataset.maps / dataset.index.map_name(4))).astype(int)
    assert (
        np.array_equal(of_pixels(sample), np.where(values == 11, -1, values))
        and (values == 11).any()
    )


@needs_real
def test_real_format_of_cityscapes(tmp_path):
    shutil.copytree(REAL / "cityscapes_format/gtFine", tmp_path / "cityscapes/gtFine")
    size = Image.open(REAL / "cityscapes_format/gtFine/val/highway/higway_gtFine_labelIds.png").size
    (tmp_path / "cityscapes/leftImg8bit/val/highway").mkdir(parents=True)
    Image.new("RGB", size).save(
        tmp_path / "cityscapes/leftImg8bit/val/highway/higway_leftImg8bit.png"
    )
    dataset = load("cityscapes", tmp_path)
    labels = dataset.load(0).labels
    assert [dataset.vocabulary.names[label] for label in labels] == ["road", "pole", "sky"]


# -- panoptic


IDS = {"cat": 5, "sky": 260, "crowd": 70_000}
CATEGORIES = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
PIXELS = [[5, 5, 260, 0], [5, 70_000, 260, 260]]


def colours(ids):
    ids = np.asarray(ids)
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)


def panoptic(
    root, pixels=PIXELS, images=None, annotations=None, categories=None, maps="panoptic", **change
):
    segments = [
        {"id": IDS["cat"], "category_id": 7, "area": 3, "bbox": [0, 0, 2, 2], "iscrowd": 0},
        {"id": IDS["sky"], "category_id": 2, "area": 3, "bbox": [2, 0, 2, 2], "iscrowd": 0},
        {"id": IDS["crowd"], "category_id": 7, "area": 1, "bbox": [1, 1, 1, 1], "iscrowd": 1}
        | change,
    ]
    record = {
        "images": images or [{"id": 3, "file_name": "x.jpg", "height": 2, "width": 4}],
        "annotations": annotations
        or [{"image_id": 3, "file_name": "x.png", "segments_info": segments}],
        "categories": categories or CATEGORIES,
    }
    (root / "ann").mkdir(exist_ok=True)
    (root / "ann/panoptic.json").write_text(json.dumps(record))
    save(root / maps / "x.png", colours(pixels))
    save(root / "img/x.jpg", np.zeros((2, 4, 3)))
    return f"my={root}/ann/panoptic.json:{root}/img"


@pytest.mark.parametrize("maps", ["panoptic", "ann/panoptic"])
def test_panoptic(tmp_path, maps):
    dataset = load(panoptic(tmp_path, maps=maps))
    assert (dataset.metric, dataset.supervision, dataset.name) == ("pq", "panoptic", "my")
    assert dataset.vocabulary == Vocabulary("my", ("sky", "cat"), (2, 7), is_thing=(False, True))
    sample = dataset.load(0)
    assert sample.labels.tolist() == [1, 0] and sample.boxes.shape == (0, 4)
    assert sample.segments.tolist() == [[0, 0, 1, -1], [0, -1, 1, 1]]
    whole = dataset.load(0, keep_ignored=True)
    assert whole.labels.tolist() == [1, 0, 1] and whole.segments.tolist() == [
        [0, 0, 1, -1],
        [0, 2, 1, 1],
    ]
    assert dataset.index.ignore[dataset.index.rows(0)].tolist() == [False, False, True]
    assert dataset.image_counts().tolist() == [1, 1]
    assert dataset.summary() == (
        "my: 1 images, 3 segments (1 crowd, not trained on), 2 classes (2 with segments)"
    )


def test_segments_that_others_cover_have_no_row(tmp_path):
    """As in ADE20K's panoptic maps, where things are painted over stuff."""
    dataset = load(panoptic(tmp_path, [[260] * 4, [0] * 4]))
    assert (
        dataset.load(0).labels.tolist() == [0] and dataset.load(0).segments[0].tolist() == [0] * 4
    )
    assert dataset.load(0, keep_ignored=True).labels.tolist() == [
        1,
        0,
        1,
    ]  # missed by every prediction


def test_bad_panoptic_files(tmp_path, caplog):
    path = tmp_path / "panoptic/x.png"
    assert f"{path} has the id 9 at x = 3, y = 1" in refused(
        panoptic(tmp_path, [[5, 5, 260, 0], [5, 5, 5, 9]])
    )
    assert f"label map {path} has 1 x 4 pixels" in refused(panoptic(tmp_path, [[5, 5, 260, 0]]))
    text = panoptic(tmp_path)
    save(path, np.zeros((2, 4)))
    assert f"label map {path} is a picture of mode L" in refused(text)
    path.unlink()
    assert f"my: label map {path} is missing (1 of 1" in refused(text)
    path.parent.rmdir()
    assert (
        f"{tmp_path}/ann/panoptic, the folder of the PNGs of panoptic.json, does not exist"
        in refused(text)
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"id": 5}, "image 3 has the segment ids [5, 260, 5]"),
        ({"id": 0}, "image 3 has the segment ids"),
        ({"category_id": 9}, "image 3 has the unknown category_id 9"),
        ({"images": [{"id": 4, "file_name": "x.jpg"}]}, "unknown image_id 3"),
        ({"images": [{"id": 3, "file_name": "x.jpg"}] * 2}, "an image comes twice"),
        ({"images": [{"id": 3, "file_name": "../x.jpg"}]}, "leaves the image folder"),
        ({"annotations": [{"image_id": 3, "segments_info": []}]}, "image 3 has no file_name"),
        (
            {"categories": [{"id": 7, "name": "cat", "isthing": "0"}]},
            "category 7 has the isthing '0'; write the number 0 or 1",
        ),
        (
            {"annotations": [{"image_id": 3, "file_name": "x.png", "segments_info": [{"id": 1}]}]},
            "image 3: segment 1 has no category_id",
        ),
    ],
)
def test_bad_panoptic_json(tmp_path, change, words):
    line = refused(panoptic(tmp_path, **change))
    assert words in line and "panoptic.json" in line


def test_images_without_segments_are_counted(tmp_path, caplog):
    images = [{"id": i, "file_name": "x.jpg"} for i in (1, 3)]
    with caplog.at_level(logging.INFO, "concord"):
        assert len(load(panoptic(tmp_path, images=images))) == 1
    assert "panoptic.json: 1 images without segments_info are left out" in caplog.text


def test_panoptic_maps_beside_their_json(tmp_path):
    """Mapillary's layout."""
    folder = tmp_path / "mapillary_vistas/validation"
    save(folder / "panoptic/a.png", np.full((2, 3, 3), (1, 0, 0)))
    save(folder / "images/a.jpg", np.zeros((2, 3, 3)))
    segment = {"id": 1, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6, "iscrowd": 0}
    record = {
        "images": [{"id": "a", "file_name": "a.jpg", "height": 2, "width": 3}],
        "annotations": [{"image_id": "a", "file_name": "a.png", "segments_info": [segment]}],
        "categories": [{"id": 1, "name": "Bird", "isthing": 1}],
    }
    (folder / "panoptic/panoptic_2018.json").write_text(json.dumps(record))
    dataset = load("mapillary-panoptic", tmp_path)
    assert dataset.maps == folder / "panoptic"
    assert of_pixels(dataset.load(0)).tolist() == [[0] * 3] * 2


def test_panoptic_cityscapes_finds_its_images(tmp_path):
    """The id gives the image, since createPanopticImgs.py writes file names that do not exist."""
    base = tmp_path / "cityscapes/gtFine"
    known, id = Vocabulary.known("cityscapes"), "ulm_000001_000019"
    classes = zip(known.ids, known.names, known.is_thing)
    save(tmp_path / f"cityscapes/leftImg8bit/val/ulm/{id}_leftImg8bit.png", np.zeros((1, 3, 3)))
    save(base / f"cityscapes_panoptic_val/{id}_gtFine_panoptic.png", colours([[7, 24001, 24]]))
    segments = [(7, 7, 0), (24001, 24, 0), (24, 24, 1)]
    record = {
        "images": [
            {"id": id, "file_name": f"{id}_gtFine_leftImg8bit.png", "height": 1, "width": 3}
        ],
        "annotations": [
            {
                "image_id": id,
                "file_name": f"{id}_gtFine_panoptic.png",
                "segments_info": [
                    {"id": s, "category_id": c, "iscrowd": crowd} for s, c, crowd in segments
                ],
            }
        ],
        "categories": [
            {"id": i, "name": name, "isthing": int(thing)} for i, name, thing in classes
        ],
    }
    (base / "cityscapes_panoptic_val.json").write_text(json.dumps(record))
    dataset = load("cityscapes-panoptic", tmp_path)
    assert (
        of_pixels(dataset.load(0)).tolist() == [[0, 11, -1]]
        and sum(dataset.vocabulary.is_thing) == 8
    )


def test_objects365_with_masks(tmp_path, caplog):
    boxes = [
        {"id": k, "image_id": 1, "category_id": 2, "bbox": [0, 0, 2, 2], "iscrowd": 0, "area": 4}
        for k in (1, 2)
    ]
    record = {
        "images": [{"id": 1, "file_name": "images/v1/patch8/a.jpg", "height": 4, "width": 4}],
        "annotations": [boxes[0] | {"segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}, boxes[1]],
        "categories": [{"id": 2, "name": "Sneakers"}],
    }
    save(tmp_path / "objects365/val/patch8/a.jpg", np.zeros((4, 4, 3)))
    (tmp_path / "objects365/o365_instance_seg_val.json").write_text(json.dumps(record))
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load("o365-instances", tmp_path, masks=True)
    assert "1 boxes without a mask are left out" in caplog.text
    assert dataset.name == dataset.vocabulary.dataset == dataset.load(0).dataset == "o365-instances"
    assert (
        dataset.load(0).masks.sum() == 4
        and dataset.supervision == "instances"
        and dataset.metric == "coco"
    )


@needs_real
@pytest.mark.parametrize(
    "split, images, segments, crowds", [("train", 96, 1060, 6), ("val", 32, 327, 2)]
)
def test_real_coco_panoptic(split, images, segments, crowds):
    dataset = load("coco-panoptic", REAL, split)
    index = dataset.index
    assert (len(dataset), len(index.labels), int(index.ignore.sum())) == (images, segments, crowds)
    assert len(dataset.vocabulary) == 133 and sum(dataset.vocabulary.is_thing) == 80
    for i in range(0, len(dataset), 8):
        sample, rows = dataset.load(i, keep_ignored=True), index.rows(i)
        counts = np.bincount(sample.segments.numpy().ravel() + 1, minlength=len(sample.labels) + 1)[
            1:
        ]
        assert counts.tolist() == index.areas[rows].tolist()  # as the json says
        assert (
            np.array_equal(sample.labels, index.labels[rows])
            and sample.segments.shape == sample.size
        )
    crowded = int(np.flatnonzero(np.add.reduceat(index.ignore, index.offsets[:-1]))[0])
    sample, rows = dataset.load(crowded), index.rows(crowded)
    assert (sample.segments < 0).sum() >= index.areas[rows][index.ignore[rows]].sum() > 0
    assert sample.labels.tolist() == index.labels[rows][~index.ignore[rows]].tolist()


# -- what methods accept


def test_detectors_refuse_maps_before_anything_is_read():
    for name, words in (("ade20k", "semantic label maps"), ("coco-panoptic", "panoptic segments")):
        with pytest.raises(
            InputError, match=f"'{name}' has {words} only; this method needs boxes or instances"
        ):
            load_datasets(name, "train", tiny=64)


# -- the embedded datasets


PANOPTIC = {
    "coco-panoptic": "coco",
    "ade20k-panoptic": "ade20k",
    "cityscapes-panoptic": "cityscapes",
}


def test_every_texture_has_a_real_name():
    for name, layout in LAYOUTS.items():
        assert set(stuff(name).values()) <= set(Vocabulary.known(layout.vocabulary).names)
        assert set(stuff(name)) <= {*scene.TEXTURES, "wood wall"}
    assert "snow" in stuff("coco") and "snow" not in stuff("ade20k")  # ADE20K has no such class


@pytest.mark.parametrize("name", PANOPTIC)
@pytest.mark.parametrize("split", ["train", "val"])
def test_generated_panoptic_maps(tiny_root, name, split):
    dataset = load(name, tiny_root, split)
    known = Vocabulary.known(LAYOUTS[PANOPTIC[name]].vocabulary)
    assert dataset.vocabulary.names == known.names and dataset.vocabulary.is_thing == known.is_thing
    unlabelled = 0
    for i in range(len(dataset)):
        sample, rows = dataset.load(i, keep_ignored=True), dataset.index.rows(i)
        masks = padded_masks(sample, sample.size).stack()
        assert masks.sum(dim=(1, 2)).tolist() == dataset.index.areas[rows].tolist()
        boxes = [scene.tight_box(mask) for mask in masks.numpy()]
        assert [[x, y, x + w, y + h] for x, y, w, h in boxes] == dataset.index.boxes[rows].tolist()
        regions = [label for label in sample.labels.tolist() if not known.is_thing[label]]
        assert len(set(regions)) == len(regions) > 0  # stuff is one segment for each class
        unlabelled += int((sample.segments < 0).sum())
    if split == "train":  # the other has too few images
        assert (unlabelled > 0) == (name == "ade20k-panoptic")


def test_generated_panoptic_and_instances_agree(tiny_root):
    maps, objects = load("coco-panoptic", tiny_root), load("coco", tiny_root, masks=True)
    assert list(maps.index.image_ids) == list(objects.index.image_ids)
    for i in range(len(maps)):
        sample, truth = maps.load(i), objects.load(i)
        assert torch.equal(sample.image, truth.image)
        thing = torch.tensor([maps.vocabulary.is_thing[label] for label in sample.labels])
        assert torch.equal(padded_masks(sample, sample.size).stack()[thing], truth.masks)
        names = [maps.vocabulary.names[label] for label in sample.labels[thing]]
        assert names == [objects.vocabulary.names[label] for label in truth.labels]


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_generated_semantic_and_panoptic_agree(tiny_root, name):
    semantic, maps = load(name, tiny_root, "train"), load(f"{name}-panoptic", tiny_root, "train")
    assert semantic.vocabulary.names == maps.vocabulary.names
    for i in range(len(maps)):
        assert np.array_equal(of_pixels(semantic.load(i)), of_pixels(maps.load(i)))


def test_generated_masks_of_objects365(tiny_root):
    boxes, masks = load("o365", tiny_root), load("o365-instances", tiny_root, masks=True)
    assert (
        torch.equal(boxes.load(0).boxes, masks.load(0).boxes)
        and masks.vocabulary.names == boxes.vocabulary.names
    )
    for mask, (x1, y1, x2, y2) in zip(masks.load(0).masks, masks.load(0).boxes.int().tolist()):
        assert scene.tight_box(mask.numpy()) == [x1, y1, x2 - x1, y2 - y1]


# -- transforms


def striped(height, width):
    """Returns an image of nine segments, in which the colour of a pixel tells its segment."""
    rows, columns = torch.meshgrid(
        torch.arange(height) * 3 // height, torch.arange(width) * 3 // width, indexing="ij"
    )
    segments = (rows * 3 + columns).short()
    image = torch.stack([segments * 20 + 30] * 3).byte()
    none = torch.zeros(0, 4)
    return Sample(
        image,
        "d",
        "panoptic",
        0,
        0,
        (height, width),
        none,
        torch.arange(9) + 100,
        segments=segments,
    )


TRANSFORMS = {
    "jitter": LargeScaleJitter(64, (0.5, 4.0)),
    "crop": SegmentationCrop((30, 60, 90), (40, 50), 140, color_jitter=False),
    "detr": DetrCrop(64),
    "test": ResizeShortest(50),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_segments_follow_their_pixels(name):
    torch.manual_seed(0)
    sizes, flips, counts = set(), set(), set()
    for _ in range(40):
        out = TRANSFORMS[name](striped(60, 80))
        assert out.segments.shape == out.size and out.segments.dtype == torch.int16
        expected = (out.labels - 100) * 20 + 30
        wrong = (expected[out.segments.long()] - out.image[0].long()).abs() > 10
        assert wrong.float().mean() < 0.12  # only where the image blends two segments
        assert out.segments.unique().tolist() == list(range(len(out.labels)))  # none is empty
        (
            sizes.add(out.size),
            counts.add(len(out.labels)),
            flips.add(bool(out.image[0, 0, 0] > out.image[0, 0, -1])),
        )
    if name == "test":
        assert sizes == {(50, 67)} and counts == {9} and flips == {False}
    else:
        assert len(sizes) > 1 and len(counts) > 1 and flips == {False, True}


def test_semantic_crop_follows_its_settings():
    torch.manual_seed(0)
    shapes = {
        SegmentationCrop((30, 60), (40, 200), 70, False)(striped(60, 80)).size for _ in range(20)
    }
    assert shapes == {
        (30, 40),
        (40, 70),
    }  # 60 x 80 would have a side above 70: it is 52 x 70, cut to 40 x 70


def test_detr_crop_follows_its_settings():
    torch.manual_seed(0)
    sizes = [DetrCrop(200)(striped(60, 80)).size for _ in range(150)]
    assert {min(size) for size in sizes} == set(range(120, 201, 8))
    whole = sum(abs(w / h - 4 / 3) < 0.02 for h, w in sizes)
    assert 40 < whole < 110 and max(max(size) for size in sizes) <= 333


def test_boxes_and_masks_follow_detr_crop():
    torch.manual_seed(0)
    sample = striped(60, 80)
    sample.masks, sample.segments = padded_masks(sample, sample.size).stack(), None
    sample.boxes = torch.tensor(
        [[x1, y1, x1 + w, y1 + h] for x1, y1, w, h in map(scene.tight_box, sample.masks.numpy())]
    )
    sample.boxes = sample.boxes.float()
    for _ in range(20):
        out = DetrCrop(64)(sample)
        assert len(out.boxes) == len(out.labels) == len(out.masks) > 0
        for mask, box in zip(out.masks, out.boxes):
            x, y, w, h = scene.tight_box(mask.numpy())
            assert (torch.tensor([x, y, x + w, y + h]) - box).abs().max() <= 2


def test_instances_whose_mask_is_cut_off_are_dropped():
    sample = Sample.unlabelled(torch.zeros(3, 20, 20, dtype=torch.uint8), "a", 0, 0)
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, :, 15:], masks[0, 0], masks[1, 8:12, 8:12] = (
        True,
        True,
        True,
    )  # an L whose box covers everything
    sample = replace(
        sample,
        boxes=torch.tensor([[0.0, 0, 20, 20], [8, 8, 12, 12]]),
        labels=torch.tensor([4, 5]),
        masks=masks,
    )
    seen = move(sample, (20, 20), (5, 0, 10, 10), by_mask=True)
    assert seen.labels.tolist() == [5] and seen.boxes.tolist() == [[8, 3, 10, 7]]
    assert seen.masks.shape == (1, 10, 10) and seen.masks.sum() == 8


def test_colour_jitter():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 8, 9), dtype=torch.uint8)
    grey, results = image[:1].expand(3, 8, 9), [jitter_colors(image) for _ in range(200)]
    assert all(r.dtype == torch.uint8 and r.shape == image.shape for r in results)
    same = sum(torch.equal(r, image) for r in results)
    assert 3 <= same <= 30  # one of 16: nothing was drawn
    for _ in range(20):  # hue and saturation leave grey alone
        out = jitter_colors(grey).int()
        assert (out.amax(0) - out.amin(0)).max() <= 1
    plain = [r.float().mean() / image.float().mean() for r in results]
    assert 0.4 < min(plain) < 0.8 and 1.1 < max(plain) < 1.6


@pytest.mark.parametrize("last", [True, False])
def test_contrast_is_a_factor_before_or_after_the_others(last, monkeypatch):
    """In front, bright pixels are cut off at 255 before the brightness of HSV is read."""
    image = torch.tensor([[40, 200], [20, 100], [10, 180]], dtype=torch.uint8).view(3, 1, 2)
    draws = iter([False, True, last, True, False])  # brightness, contrast, last, saturation, hue
    factors = iter([1.5, 0.5])  # of contrast and saturation
    monkeypatch.setattr(common.transforms, "coin", lambda _: next(draws))
    monkeypatch.setattr(common.transforms, "uniform", lambda *_: next(factors))
    found = jitter_colors(image).flatten(1).T.tolist()
    for pixel, ours in zip(image.flatten(1).T.tolist(), found):
        if not last:
            pixel = [min(255, 1.5 * value) for value in pixel]
        pixel = [max(pixel) - (max(pixel) - value) * 0.5 for value in pixel]
        if last:
            pixel = [min(255, 1.5 * value) for value in pixel]
        assert ours == pytest.approx(pixel, abs=1)


def test_numbers_too_large_for_a_label_map(tmp_path):
    Image.fromarray(np.full((4, 4), 65_537, np.int32)).save(tmp_path / "map.tiff")
    table = label_table((0, 1), (255,))
    with pytest.raises(InputError, match="has the value 65537"):
        read_label_map(tmp_path / "map.tiff", table)
    with pytest.raises(InputError, match="32767 is the most"):
        label_table(range(70_000), ())
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe.png is no regular file"):
        read_label_map(tmp_path / "pipe.png", table)
