"""Annotations of other conventions, which a run could learn nothing from without a word."""

import json
import logging
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

import dataseg
from common.batch import Sample, collate
from common.cascade import MaskHead, StageOutput
from common.datasets import load_datasets
from common.datasets.exif import TURNS, turn_boxes, turn_pixels
from common.datasets.readers.coco import read_coco
from common.errors import InputError
from common.evaluation import evaluate_detections
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import MaskOutput
from common.masks import crop_masks, encode_masks, mask_of
from common.segment_metrics import warn_of_absent
from common.targets import RegionTargets, Targets
from common.transforms import move

ALL = ("boxes", "instances", "semantic", "panoptic", "image_labels")
SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def coco(root, annotations, size=(20, 30), files=("0.jpg",), **lists):
    """Writes a.json and black images of `size`. An annotation gets defaults for what it lacks."""
    height, width = size
    images = []
    for i, file in enumerate(files):
        images.append({"id": i, "file_name": file, "height": height, "width": width})
        (root / "im").mkdir(exist_ok=True)
        Image.new("RGB", (width, height)).save(root / f"im/{i}.jpg")
    default = {"image_id": 0, "category_id": 1, "bbox": [2, 2, 6, 6]}
    record = {
        "images": images,
        "annotations": [{"id": k} | default | entry for k, entry in enumerate(annotations)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (root / "a.json").write_text(json.dumps(record | lists))
    return f"mine={root}/a.json:{root}/im"


def load(text, split="train", **more):
    return load_datasets(text, split, accepts=ALL, masks=True, **more)[0]


def refused(text, **more):
    with pytest.raises(InputError) as error:
        load(text, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- boxes without a mask


@pytest.mark.parametrize("segmentation", [[], None, [[]], [[3, 3, 5, 5]], [[], [1, 1]]])
def test_what_is_no_mask(segmentation):
    assert mask_of({"segmentation": segmentation}) is mask_of({}) is None


@pytest.mark.parametrize("segmentation", [SQUARE, [[], SQUARE[0]], {"size": [1, 1]}, "x", [1, 2]])
def test_what_is_a_mask_or_an_error_later(segmentation):
    assert mask_of({"segmentation": segmentation}) == segmentation


@pytest.mark.parametrize("segmentation", [[], None, [[]], [[3, 3, 5, 5]]])
def test_boxes_with_empty_masks_are_boxes(tmp_path, caplog, segmentation):
    dataset = load(coco(tmp_path, [{"segmentation": segmentation}] * 3))
    sample = dataset.load(0)
    assert dataset.supervision == "boxes" and sample.masks is None and len(sample.boxes) == 3
    assert not caplog.records


def test_masks_are_used_for_the_boxes_that_have_one(tmp_path, caplog):
    empty = {"size": [20, 30], "counts": [600]}  # an RLE without a pixel
    masks = [{"segmentation": SQUARE}, {"segmentation": []}, {}, {"segmentation": empty}]
    dataset = load(coco(tmp_path, masks))
    assert "a.json: 2 of 4 boxes have a mask; the others are trained on as boxes" in caplog.text
    assert dataset.supervision == "instances"
    assert dataset.index.has_mask.tolist() == [True, False, False, True]
    sample = dataset.load(0)
    assert sample.masks.flatten(1).sum(1).tolist() == [36, 0, 0, 0]
    assert Targets(sample.boxes, sample.labels, masks=sample.masks).has_mask.tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_the_cache_keeps_which_boxes_have_a_mask(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("common.datasets.store.LARGE", 0)
    coco(tmp_path, [{"segmentation": []}, {"segmentation": SQUARE}, {"bbox": [0, 0, 0, 3]}])
    for folder in (False, True):
        index = read_coco("mine", tmp_path / "a.json", tmp_path / "im", "coco").index
        assert list(index.segmentations) == [None, SQUARE, None]
        assert index.has_mask.tolist() == [False, True, False]
        assert (index.num_empty, index.num_trainable, index.doubts) == (1, 2, [])
        assert (index.folder is not None) or not folder


def sample_of(masks, boxes):
    sample = Sample.unlabelled(torch.zeros(3, 20, 20, dtype=torch.uint8), "a", 0, 0)
    sample.masks, sample.boxes = masks, torch.tensor(boxes, dtype=torch.float32)
    sample.labels = torch.arange(len(masks))
    return sample


def test_a_crop_drops_an_object_by_its_mask_only_if_it_has_one():
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[1, :3, :3] = True  # its box reaches into the crop, its mask does not
    boxes = [[0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 4, 4]]
    moved = move(sample_of(masks, boxes), (20, 20), window=(10, 10, 8, 8), by_mask=True)
    assert moved.labels.tolist() == [0] and moved.boxes.tolist() == [[0, 0, 8, 8]]
    assert moved.masks.shape == (1, 8, 8) and not moved.masks.any()


def test_the_mask_head_learns_from_regions_with_a_mask_alone():
    torch.manual_seed(0)
    head = MaskHead(8, 1)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[1, 10:40, 10:40] = True
    boxes = torch.tensor([[0.0, 0, 30, 30], [10, 10, 40, 40]])
    labels = torch.zeros(2, dtype=torch.long)
    features = [torch.randn(1, 8, 64 // s, 64 // s) for s in (8, 16, 32)]
    matched = RegionTargets(boxes, labels, torch.arange(2))
    stage = StageOutput(0, [boxes], torch.zeros(2, 1), torch.zeros(2, 4), [matched])
    both = head.loss(features, stage, [Targets(boxes, labels, masks=masks)])
    logits = head(features, [boxes[1:]])
    truth = crop_masks(masks[1:], boxes[1:], 28).float()
    assert torch.equal(both, F.binary_cross_entropy_with_logits(logits, truth))
    none = head.loss(features, stage, [Targets(boxes, labels, masks=torch.zeros_like(masks))])
    assert none.item() == 0 and none.requires_grad


def output_of(queries=6, images=1):
    torch.manual_seed(1)
    return MaskOutput(
        torch.randn(2, images, queries, 3, requires_grad=True),
        torch.randn(2, images, queries, 4, requires_grad=True),
        torch.randn(images, 4, 16, 16, requires_grad=True),
    )


def test_one_image_has_objects_with_a_mask_and_objects_with_a_box():
    args = dataseg.Args(points=64)
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, 4:20, 4:20] = masks[2, 30:60, 30:60] = True
    boxes = torch.tensor([[4.0, 4, 20, 20], [0, 40, 20, 60], [30, 30, 60, 60]])
    labels = torch.tensor([0, 1, 0])
    merged = torch.zeros(2, dtype=torch.bool)
    terms = []
    for targets in (
        [Targets(boxes[[0, 2, 1]], labels[[0, 2, 1]], masks=masks[[0, 2]])],
        [Targets(boxes[[0, 2]], labels[[0, 2]], masks=masks[[0, 2]])],
        [Targets(boxes[[1]], labels[[1]])],
        [Targets(boxes, labels)],
    ):
        losses = dataseg.compute_losses(args, output_of(), targets, merged)
        losses["loss"].backward()
        terms.append(losses.keys())
    mask_terms = {"loss_mask", "loss_dice"}
    assert terms[0] >= mask_terms | {"loss_projection"}
    assert terms[1] >= mask_terms and "loss_projection" not in terms[1]
    assert "loss_projection" in terms[2] and not terms[2] & mask_terms
    assert not terms[3] & mask_terms


def test_a_box_without_a_mask_costs_its_projection():
    """The costs of each object are those that it has alone."""
    args = dataseg.Args(points=64)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 4:20, 4:20] = True
    boxes = torch.tensor([[4.0, 4, 20, 20], [0, 40, 20, 60]])
    labels = torch.tensor([0, 1])
    costs = []

    def keep(found):
        costs.extend(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataseg, "assign", keep)
        for rows in ([0, 1], [0], [1]):
            given = masks[[0]] if 0 in rows else None
            torch.manual_seed(0)
            target = Targets(boxes[rows], labels[rows], masks=given)
            output = output_of()
            torch.manual_seed(0)
            dataseg.match(args, output, [target])
    both, masked, boxed = costs
    torch.testing.assert_close(both, torch.cat([masked, boxed], -1))


def test_dataseg_gives_targets_their_boxes():
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[1, 5:9, 5:9] = True
    sample = sample_of(masks, [[0, 0, 4, 4], [5, 5, 9, 9]])
    sample.supervision = "instances"
    (target,) = dataseg.prepare_targets(collate([sample]), torch.zeros(2, dtype=torch.bool))
    assert target.masks.shape == (1, 32, 32) and target.masks.any()
    assert target.boxes.tolist() == [[5, 5, 9, 9], [0, 0, 4, 4]]  # the one without a mask is last
    assert target.labels.tolist() == [1, 0]


def detections(boxes, masks, scores):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.zeros(len(boxes), dtype=torch.long),
        "scores": torch.tensor(scores),
        "size": (20, 30),
        "segmentations": encode_masks(masks),
    }


def test_mask_ap_ignores_boxes_without_a_mask(tmp_path):
    entries = [{"segmentation": SQUARE}, {"bbox": [12, 2, 8, 8], "segmentation": []}]
    dataset = load(coco(tmp_path, entries))
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 2:8, 2:8] = masks[1, 2:9, 12:18] = masks[2, 4:6, 14:16] = True
    boxes = [[2, 2, 8, 8], [12, 2, 20, 10], [14, 4, 16, 6]]
    found = detections(boxes, masks, [0.5, 0.9, 0.8])
    results = evaluate_detections(dataset, {0: found})
    assert results["mask AP"] == pytest.approx(1)
    assert results["AP"] == pytest.approx((1 + 2 / 3) / 2, abs=0.01)  # the third box is wrong
    missed = {name: value[:1] for name, value in found.items() if name != "size"}
    results = evaluate_detections(dataset, {0: missed | {"size": (20, 30)}})
    assert results["mask AP"] == pytest.approx(1) and results["AP"] < 0.6


# -- nothing to train on


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"iscrowd": 1}, "of 3 there are 3 crowd, group or difficult"),
        ({"bbox": [2, 2, 0, 5]}, "of 3 there are 3 without an area"),
        ({"bbox": [90, 90, 5, 5]}, "of 3 there are 3 outside their image"),
    ],
)
def test_a_dataset_without_a_box_to_train_on_is_refused(tmp_path, entry, words):
    text = coco(tmp_path, [entry] * 3)
    line = refused(text)
    assert f"{tmp_path}/a.json has no box to train on: {words}; mend" in line
    assert len(load(text, "val").index.labels) == 3  # it can be evaluated
    assert len(load(coco(tmp_path, [entry] * 3 + [{}])).load(0).boxes) == 1


def test_what_cannot_be_trained_on_is_counted(tmp_path):
    entries = [{}, {"iscrowd": 1}, {"bbox": [2, 2, 0, 5]}, {"bbox": [90, 90, 5, 5]}]
    assert (
        "4 boxes (1 crowd or group, not trained on; 1 without an area; 1 outside their image)"
        in load(coco(tmp_path, entries)).summary()
    )


# -- boxes of another convention


def test_fractions_are_named(tmp_path, caplog):
    load(coco(tmp_path, [{"bbox": [0.1, 0.2, 0.5, 0.6]}, {"bbox": [0.8, 0.8, 1, 1]}]))
    (record,) = caplog.records
    assert (
        "mine: all numbers of the 2 boxes of" in record.message
        and "such as [0.1, 0.2, 0.5, 0.6] in image '0.jpg' (30 x 20 pixels); they look like "
        "fractions"
        in record.message
    )
    caplog.clear()
    load(coco(tmp_path, [{"bbox": [0, 0, 1, 1]}]))  # one pixel
    load(coco(tmp_path, [{"bbox": [0.1, 0.2, 0.5, 0.6]}, {}]))
    assert not caplog.records


def test_corners_are_named(tmp_path, caplog):
    corners = [[20, 10, 29, 19], [1, 2, 9, 8], [15, 3, 25, 9]]
    load(coco(tmp_path, [{"bbox": box} for box in corners]))
    (record,) = caplog.records
    assert "2 of 3 boxes of" in record.message and "reach beyond their image" in record.message
    assert "3 would fit as x1, y1, x2, y2" in record.message
    caplog.clear()
    # one of them reaches beyond its image, but they are no corners
    load(coco(tmp_path, [{"bbox": [20, 10, 29, 19]}, {"bbox": [8, 8, 2, 2]}]))
    assert not caplog.records


# -- EXIF


def tagged(path, tag, size=(20, 30)):
    """Saves a photograph of stored `size` (height, width) with a bright box; returns its pixels."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[3:9, 4:20] = 255
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("tag", TURNS)
def test_boxes_and_pixels_turn_as_pillow_turns_them(tmp_path, tag):
    pixels = tagged(tmp_path / "a.png", tag)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(turn_pixels(pixels[..., 0], tag), upright[..., 0])
    (box,) = turn_boxes(np.array([[4, 3, 20, 9]], np.float32), (20, 30), tag)
    y, x = np.nonzero(upright[..., 0])
    assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("tag", TURNS)
def test_annotations_of_the_stored_photograph_are_turned_with_it(tmp_path, caplog, tag):
    ring = [[4, 3, 20, 3, 20, 9, 4, 9]]
    entry = {"bbox": [4, 3, 16, 6], "segmentation": ring}
    text = coco(tmp_path, [entry, entry | {"segmentation": []}], files=("0.png",))
    tagged(tmp_path / "im/0.png", tag)
    dataset = load(text)
    lines = [r.message for r in caplog.records if "EXIF" in r.message]
    assert len(lines) == 1 and "mine: 1 of 1 images looked at are annotated as they" in lines[0]
    sample = dataset.load(0)
    assert sample.size == (30, 20) and len(caplog.records) == 2  # nothing new
    bright = sample.image[0] > 127
    assert torch.equal(sample.masks[0], bright) and not sample.masks[1].any()
    y, x = bright.nonzero().T
    expected = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert sample.boxes.tolist() == [[int(v) for v in expected]] * 2
    found = {
        "boxes": sample.boxes[:1],
        "labels": sample.labels[:1],
        "scores": torch.ones(1),
        "size": sample.size,
        "segmentations": encode_masks(bright[None]),
    }
    results = evaluate_detections(dataset, {0: found})
    assert results["mask AP"] == pytest.approx(1) and results["AP"] > 0.5  # one of two boxes


def test_upright_annotations_stay(tmp_path, caplog):
    text = coco(tmp_path, [{}], size=(30, 20), files=("0.png",))
    tagged(tmp_path / "im/0.png", 6)
    assert load(text).load(0).boxes.tolist() == [[2, 2, 8, 8]] and not caplog.records


def test_an_exif_tag_whose_side_is_unknown_is_named(tmp_path, caplog):
    text = coco(tmp_path, [{}], files=("0.png",))
    tagged(tmp_path / "im/0.png", 3)
    assert load(text).load(0).boxes.tolist() == [[2, 2, 8, 8]]
    (record,) = caplog.records
    assert "1 of 1 images looked at are turned or mirrored by their EXIF orientation" in (
        record.message
    )


def test_fractions_of_a_turned_photograph_are_those_after_its_turn(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("names: [cat]")
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 0.5 0.2")
    tagged(tmp_path / "images/0.png", 6)
    sample = load(f"mine={tmp_path}").load(0)
    assert sample.size == (30, 20) and sample.boxes.tolist() == [[5, 12, 15, 18]]
    (line,) = [r.message for r in caplog.records if "EXIF" in r.message]
    assert "mine: 1 of 1 images looked at are turned or mirrored" in line
    assert "taken as made after it; if boxes in first_batch.jpg miss their objects, remove" in line


def test_another_size_names_the_tag(tmp_path, caplog):
    text = coco(tmp_path, [{}], size=(7, 9), files=("0.png",))
    tagged(tmp_path / "im/0.png", 6)
    load(text, "val").load(0)
    (record,) = caplog.records
    assert "has 30 x 20 pixels (height, width) (turned by its EXIF orientation 6)" in record.message


def test_a_turned_image_that_was_not_looked_at_is_said_once(tmp_path, caplog):
    text = coco(tmp_path, [{}], files=("0.png",))
    tagged(tmp_path / "im/0.png", 6)
    dataset = load(text, "val")
    assert not caplog.records
    dataset.load(0), dataset.load(0)
    (record,) = caplog.records
    assert "image '0.png' is annotated as it is stored, before its EXIF orientation 6" in (
        record.message
    )


# -- label maps


def maps(root, values, classes):
    """Writes label maps of 4 x 4 pixels; `values` has the rows of each."""
    for folder in ("maps", "im"):
        (root / folder).mkdir(exist_ok=True)
    for i, rows in enumerate(values):
        pixels = np.resize(np.array(rows, np.uint8), (4, 4))
        Image.fromarray(pixels).save(root / f"maps/{i}.png")
        Image.new("RGB", (4, 4)).save(root / f"im/{i}.jpg")
    (root / "maps/classes.txt").write_text(classes)
    return f"mine={root}/maps:{root}/im"


def test_binary_masks_of_0_and_255_are_named(tmp_path, caplog):
    load(maps(tmp_path, [[0, 255], [0, 0]], "sky\nperson"))
    first, second = [record.message for record in caplog.records]
    assert "mine: the 2 label maps looked at have the values 0 and 255 alone" in first
    assert "'person'" in first
    assert "1 of 2 classes have no pixel in the 2 label maps looked at: 'person'" in second


def test_maps_that_count_from_one_are_named(tmp_path, caplog):
    load(maps(tmp_path, [[0, 1], [2, 3]], "cat\ndog\ncar"))
    (record,) = caplog.records
    assert "1 of 2 label maps looked at have the value 3, which is void as the" in record.message
    assert "write - as the first line of" in record.message and "classes.txt" in record.message
    caplog.clear()
    load(maps(tmp_path, [[1, 2], [2, 2]], "cat\ndog"))
    assert "have the value 2, which is void as the number of classes, and none has 0" in caplog.text
    caplog.clear()
    load(maps(tmp_path, [[0, 1], [255, 1]], "cat\ndog"))
    assert not caplog.records


def test_a_hyphen_makes_a_value_void(tmp_path, caplog):
    dataset = load(maps(tmp_path, [[0, 1, 2, 3]] * 2, "-\ncat\ndog\ncar"))
    sample = dataset.load(0)
    assert dataset.vocabulary.names == ("cat", "dog", "car") and not caplog.records
    assert sample.labels.tolist() == [0, 1, 2] and sample.segments[0].tolist() == [-1, 0, 1, 2]


def test_a_class_named_void_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "concord"):
        load(maps(tmp_path, [[0, 1]], "Void\ncat"))
    assert "'Void' is trained on as a class; write - in its line" in caplog.text


def test_maps_of_void_alone_are_refused(tmp_path, monkeypatch, caplog):
    text = maps(tmp_path, [[255], [255], [255]], "cat\ndog")
    assert "mine: 3 of 3 label maps in" in refused(text) and "void alone" in refused(text)
    assert len(load(text, "val")) == 3
    monkeypatch.setattr("common.datasets.start.DEEPER", 2)
    monkeypatch.setattr("common.datasets.start.LOOKED_AT", 1)
    load(text)
    assert "2 of 3 label maps in" in caplog.text and "void alone" in caplog.text


def test_a_broken_map_is_left_to_the_loading(tmp_path, caplog):
    text = maps(tmp_path, [[0, 1], [0, 1]], "cat\ndog")
    (tmp_path / "maps/0.png").write_text("no image")
    load(text)
    assert not caplog.records


def test_the_evaluation_names_classes_without_a_pixel(caplog):
    counts = {"semantic": np.diag([3, 0, 0])}
    warn_of_absent("mine", counts, ("sky", "cat", "dog"))
    assert (
        "mine: 2 of 3 classes have no pixel in the ground truth, so that the means are over the "
        "other 1: 'cat', 'dog'" in caplog.text
    )
    caplog.clear()
    warn_of_absent("mine", {"semantic": np.eye(3)}, ("sky", "cat", "dog"))
    warn_of_absent("mine", {}, ("sky", "cat", "dog"))
    assert not caplog.records


# -- text


def one_row_each(rows):
    """An encoder that gives each name the row of its position in `rows`."""
    return lambda names, dataset: F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_different_names_of_one_embedding_are_named_once(caplog):
    space = LabelSpace(
        [Vocabulary("unknown letters", ("猫", "狗", "bird"))],
        one_row_each([[1, 0], [1, 0.01], [0, 1]]),
    )
    (record,) = caplog.records
    assert "unknown letters: the text embeddings of 1 classes equal those" in record.message
    assert "('猫' and '狗')" in record.message and "--text-encoder" in record.message
    space.part("unknown letters"), space.to("cpu")
    assert len(caplog.records) == 1


def test_names_of_another_case_are_named(caplog):
    LabelSpace(
        [Vocabulary("cases", ("cat", "Cat ", "dog"))], one_row_each([[1, 0], [1, 0], [0, 1]])
    )
    (record,) = caplog.records
    assert "cases: 1 class names differ from others only by case, spaces" in record.message
    assert "('cat' and 'Cat ')" in record.message


# -- files


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    text = coco(tmp_path, [{}])
    data = (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + data)
    assert len(load(text).index.labels) == 1


@pytest.mark.parametrize(
    "encoding, words",
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("gbk", "no UTF-8 text (byte 0x")],
)
def test_other_encodings_are_named(tmp_path, encoding, words):
    text = coco(tmp_path, [{}], categories=[{"id": 1, "name": "x"}])
    content = (tmp_path / "a.json").read_text().replace('"x"', '"狗"')
    (tmp_path / "a.json").write_bytes(content.encode(encoding))
    line = refused(text)
    assert words in line and "save it as UTF-8" in line and "cut off" not in line


def test_ids_of_both_types_are_one(tmp_path, caplog):
    entries = [{"image_id": "0", "category_id": "2"}, {"image_id": 0, "category_id": "1"}, {}]
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load(coco(tmp_path, entries))
    assert dataset.index.labels.tolist() == [1, 0, 0]
    assert "a.json: 1 times the image_id is a text where it is listed as a number" in caplog.text
    assert "a.json: 2 times the category_id is a text where" in caplog.text


def test_ids_of_both_types_in_lists_of_labels(tmp_path):
    images = [{"id": 0, "file_name": "0.jpg", "pos_category_ids": ["2", 1]}]
    dataset = load(coco(tmp_path, [], images=images))
    assert dataset.supervision == "image_labels" and dataset.load(0).image_labels.tolist() == [0, 1]
    images[0]["pos_category_ids"] = ["3"]
    assert "image 0 has the unknown id '3' in pos_category_ids; list it" in refused(
        coco(tmp_path, [], images=images)
    )


def test_ids_of_both_types_in_panoptic_files(tmp_path, caplog):
    Image.new("RGB", (30, 20), (5, 0, 0)).save(tmp_path / "0.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "a/0.png")
    segments = [{"id": 5, "category_id": "2"}]
    entries = [{"image_id": "0", "file_name": "0.png", "segments_info": segments}]
    categories = [{"id": k, "name": f"c{k}", "isthing": 1} for k in (1, 2)]
    text = coco(tmp_path, [])
    record = json.loads((tmp_path / "a.json").read_text())
    record |= {"annotations": entries, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(record))
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load(text)
    assert dataset.load(0).labels.tolist() == [1] and dataset.load(0).segments.unique() == 0
    assert "1 times the image_id is a text" in caplog.text
    assert "1 times the category_id is a text" in caplog.text
    segments[0]["iscrowd"] = 1
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert "has no segment to train on: of 1 there are 1 crowd" in refused(text)
    segments[0]["bbox"] = None
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert "image '0': segment 5 has the bbox None; four numbers needed" in refused(text)


def test_ids_that_are_listed_in_both_types_are_two(tmp_path):
    images = [{"id": id, "file_name": f"{k}.jpg"} for k, id in enumerate((0, "0"))]
    text = coco(tmp_path, [{"image_id": "0"}, {"image_id": 0}], files="ab", images=images)
    assert load(text).index.image_of.tolist() == [0, 1]
    assert "unknown image_id '9'; list it in 'images'" in refused(
        coco(tmp_path, [{}, {"image_id": "9"}])
    )


def test_category_ids_of_both_types_are_refused(tmp_path):
    categories = [{"id": 1, "name": "cat"}, {"id": "a", "name": "dog"}]
    assert "are texts and numbers, such as 'a' and 1; write all" in refused(
        coco(tmp_path, [{}], categories=categories)
    )
    assert "an element of 'categories' is 'cat'; an object" in refused(
        coco(tmp_path, [{}], categories=["cat"])
    )


ROOT = {"id": 0, "name": "cat", "supercategory": "none"}


@pytest.mark.parametrize("below", ["cat", "animals"])
def test_the_root_of_roboflow_is_left_out(tmp_path, caplog, below):
    categories = [
        ROOT,
        {"id": 1, "name": "cat" if below == "cat" else "dog", "supercategory": below},
    ]
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load(coco(tmp_path, [{}], categories=categories))
    assert dataset.vocabulary.ids == (1,) and dataset.load(0).labels.tolist() == [0]
    assert "the category 'cat' is left out: it has no annotation and stands for all" in caplog.text


def test_a_category_that_is_no_root_stays(tmp_path):
    flat = [ROOT, {"id": 1, "name": "dog", "supercategory": "none"}]  # it only does not occur
    assert len(load(coco(tmp_path, [{}], categories=flat)).vocabulary) == 2
    used = [ROOT, {"id": 1, "name": "dog", "supercategory": "cat"}]
    assert len(load(coco(tmp_path, [{"category_id": 0}], categories=used)).vocabulary) == 2


@pytest.mark.parametrize(
    "name",
    [
        "im\\sub\\é x.jpg",
        "sub/%C3%A9%20x.jpg",
        "./sub/é x.jpg",
        "im/sub/é x.jpg",
        "sub/É X.JPG",
        unicodedata.normalize("NFD", "sub/é x.jpg"),
        "/home/me/data/im/sub/é x.jpg",
        "C:\\data\\im\\sub\\é x.jpg",
    ],
)
def test_file_names_in_another_spelling_are_found(tmp_path, caplog, name):
    text = coco(tmp_path, [{}], files=(name,))
    (tmp_path / "im/sub").mkdir()
    (tmp_path / "im/0.jpg").rename(tmp_path / "im/sub" / unicodedata.normalize("NFC", "é x.jpg"))
    dataset = load(text)
    assert dataset.load(0).size == (20, 30)
    if name != "./sub/é x.jpg":  # the file system understands that
        assert "mine: 1 of 1 images have other names in" in caplog.text


def test_a_file_that_does_not_fit_alone_is_missing(tmp_path):
    text = coco(tmp_path, [{}, {"image_id": 1}], files=("x/0.jpg", "y/0.jpg"))  # one for two names
    assert "x/0.jpg is missing (2 of 2 that" in refused(text)
    text = coco(tmp_path, [{}, {"image_id": 1}], files=("x/0.jpg", "0.jpg"))  # that of another
    assert "x/0.jpg is missing (1 of 2 that" in refused(text)
    line = refused(coco(tmp_path, [{}], files=("0a.jpg",)))
    assert "0a.jpg is missing" in line and "nearest there: 0.jpg" in line
    assert "leaves the image folder" in refused(coco(tmp_path, [{}], files=("../0.jpg",)))


def test_an_entry_is_named_with_its_field(tmp_path):
    for entry, words in (
        ({"bbox": None}, "annotation 1 has the bbox None; four numbers needed"),
        ({"bbox": "[1, 2, 3, 4]"}, "annotation 1 has the bbox '[1, 2, 3, 4]'"),
        ({"area": "big"}, "annotation 1 has the area 'big'"),
        ({"iscrowd": None}, "annotation 1 has the iscrowd None"),
        ({"category_id": None}, "annotation 1 has the unknown category_id None"),
    ):
        assert words in refused(coco(tmp_path, [{}, entry])), entry
    text = coco(tmp_path, [{}, {}])
    record = json.loads((tmp_path / "a.json").read_text())
    del record["annotations"][1]["bbox"]
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert "annotation 1 has no bbox; four numbers needed" in refused(text)
