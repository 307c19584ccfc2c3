"""Readers, transforms and the mixture: what arrives at the model is what the files say."""

import json

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image

from common.batch import Sample, collate
from common.datasets import default_eval, load_datasets
from common.datasets.base import read_image
from common.datasets.registry import parse_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.sampling import Mixture, RepeatFactorSampler, derangement
from common.transforms import LargeScaleJitter, ResizeShortest

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")


def sample(height=40, width=60, boxes=((10.0, 5.0, 30.0, 25.0),)) -> Sample:
    """A black image whose boxes are painted white, so that a transform can be checked by looking."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, int(y1) : int(y2), int(x1) : int(x2)] = 255
    boxes = torch.tensor(boxes).view(-1, 4)
    return Sample(image, "d", "boxes", 0, 0, (height, width), boxes, torch.arange(len(boxes)))


def bright_box(image: torch.Tensor) -> list[int]:
    rows, columns = (image[0] > 127).nonzero().T
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def test_jitter_moves_boxes_with_their_pixels():
    torch.manual_seed(0)
    seen = 0
    for _ in range(60):
        out = LargeScaleJitter(64, (0.5, 2.0))(sample())
        assert max(out.size) <= 64
        assert out.boxes.shape == (len(out.labels), 4)
        if len(out.boxes):
            seen += 1
            assert torch.tensor(bright_box(out.image)).sub(out.boxes[0]).abs().max() <= 1.01
    assert seen > 30


def test_jitter_drops_what_the_crop_lost():
    torch.manual_seed(0)
    counts = {len(LargeScaleJitter(16, (4.0, 4.0))(sample()).boxes) for _ in range(40)}
    assert counts == {0, 1}


@pytest.mark.parametrize("size, expected", [((480, 640), (800, 1067)), ((300, 1000), (400, 1333))])
def test_resize_shortest_follows_detectron2(size, expected):
    assert ResizeShortest(800)(sample(*size, boxes=())).size == expected


def test_collate_pads_and_remembers_sizes():
    batch = collate([sample(40, 60), sample(33, 20, boxes=((1.0, 1.0, 9.0, 9.0),))])
    assert batch.images.shape == (2, 3, 64, 64) and batch.sizes == [(40, 60), (33, 20)]
    assert batch.images[1, :, 33:].sum() == 0 and batch.images[1, :, :, 20:].sum() == 0
    assert collate([sample(40, 60)], square={"d": 96}).images.shape[-2:] == (96, 96)


def test_label_space_keeps_datasets_apart():
    space = LabelSpace([Vocabulary("a", ("cat", "dog")), Vocabulary("b", ("dog", "cow", "cat"))])
    assert space.names == ("cat", "dog", "dog", "cow", "cat") and space.slice("b") == slice(2, 5)
    assert space.to_global("b", torch.tensor([0, 2])).tolist() == [2, 4]
    assert space.dataset_of_label.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(KeyError):
        space.to_global("c", torch.tensor([0]))
    with pytest.raises(InputError, match="twice"):
        LabelSpace([Vocabulary("a", ("cat",)), Vocabulary("a", ("dog",))])


def test_datasets_grammar():
    assert parse_datasets("coco, openimages:val,my=a/b.json:im/", "train") == [
        ("coco", "train", None),
        ("oid", "val", None),
        ("my", "train", ("a/b.json", "im/")),
    ]
    assert default_eval("coco:val,my=a.json:b") == "coco,my=a.json:b"


def test_every_generated_dataset_loads(tiny_root):
    for dataset in load_datasets("coco,o365,lvis,oid,lineart", "val", str(tiny_root)):
        item = dataset.load(0)
        assert item.image.shape == (3, 96, 96) and len(item.boxes) == len(item.labels) > 0
        assert item.boxes.min() >= 0 and item.boxes.max() <= 96
        assert item.labels.max() < len(dataset.vocabulary)
        assert dataset.name in dataset.summary()


def test_crowds_are_not_trained_on(tmp_path):
    record = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 9, "width": 9}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 4], "iscrowd": crowd} for crowd in (0, 1)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    (dataset,) = load_datasets(f"my={tmp_path}/a.json:{tmp_path}", "train")
    assert len(dataset.load(0).boxes) == 1 and len(dataset.load(0, keep_ignored=True).boxes) == 2
    assert dataset.image_counts().tolist() == [1] and dataset.vocabulary.ids == (3,)


def test_augmentation_depends_on_the_draw_alone(tiny_root):
    (dataset,) = load_datasets("coco", "train", str(tiny_root))
    mixture = Mixture([dataset], {"coco": LargeScaleJitter(64)}, seed=3)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one = mixture[4, 17]
    assert torch.equal(torch.rand(1), before)  # the caller's random numbers are untouched
    assert torch.equal(mixture[4, 17].image, one.image)
    assert mixture[4, 18].image.shape != one.image.shape or not torch.equal(mixture[4, 18].image, one.image)


def test_mixture_finds_each_dataset(tiny_root):
    datasets = load_datasets("coco,o365", "train", str(tiny_root))
    mixture = Mixture(datasets, {name: lambda s: s for name in ("coco", "o365")}, seed=0)
    assert [mixture[row, 0].dataset for row in (0, 11, 12, 23)] == ["coco", "coco", "o365", "o365"]


def test_sampler_skips_whole_epochs_when_it_resumes():
    factors = np.array([1.0, 2.5, 1.2, 1.0])
    stream = iter(RepeatFactorSampler(factors, seed=1))
    whole = [next(stream) for _ in range(50)]
    later = iter(RepeatFactorSampler(factors, seed=1, start=31))
    assert [next(later) for _ in range(19)] == whole[31:]


def test_derangement_keeps_nothing_in_place():
    for length in (2, 3, 50):
        order = derangement(length, seed=0)
        assert sorted(order.tolist()) == list(range(length)) and (order != torch.arange(length)).all()


@needs_real
def test_real_coco_and_openimages_counts():
    coco, oid = load_datasets("coco,openimages", "train", str(REAL))
    assert (len(coco), len(coco.index.labels), int(coco.index.ignore.sum()), len(coco.vocabulary)) == (96, 710, 6, 80)
    assert (len(oid), len(oid.index.labels), int(oid.index.ignore.sum()), len(oid.vocabulary)) == (16, 105, 3, 601)
    for dataset in (coco, oid):
        for row in range(0, len(dataset), 5):
            item = dataset.load(row)
            height, width = item.size
            assert (item.boxes >= -0.01).all()
            assert (item.boxes <= torch.tensor([width, height, width, height]) + 1).all()


def test_sixteen_bit_images_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((4, 5), 128 * 257, dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").unique().tolist() == [128]
