"""Readers, transforms and the mixture: what arrives at the model is what the files say."""

import json
import logging
import os
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image
from torch.utils.data import DataLoader

from common.batch import Sample, collate
from common.datasets import load_datasets, names
from common.datasets.dataset import Dataset
from common.datasets.files import read_image
from common.datasets.grammar import parse_datasets
from common.datasets.index import Index
from common.datasets.names import eval_entries
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary, derangement
from common.sampling import (
    ClassAwareSampler,
    Mixture,
    RatioBatchSampler,
    RepeatFactorSampler,
    Transformed,
    make_loader,
    repeat_factors,
)
from common.transforms import (
    LargeScaleJitter,
    ResizeShortest,
    SegmentationCrop,
    resize_map,
    resize_masks,
)

ALL = ("boxes", "instances", "image_labels")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")


def sample(height=40, width=60, boxes=((10.0, 5.0, 30.0, 25.0),)) -> Sample:
    """A black image whose boxes are painted white: a transform can be checked by looking at it."""
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


@pytest.mark.parametrize("size", [(40, 80), (80, 40)])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_jitter_fits_the_long_side(scale, size):
    """At a scale of 1 the image just fits into the square: nothing of it is cut off."""
    out = LargeScaleJitter(64, (scale, scale), flip=0)(sample(*size))
    assert out.size == tuple(round(scale * 64 * side / 80) for side in size)


def test_jitter_drops_what_the_crop_lost():
    torch.manual_seed(0)
    counts = {len(LargeScaleJitter(16, (4.0, 4.0))(sample()).boxes) for _ in range(40)}
    assert counts == {0, 1}


def test_masks_move_with_boxes_and_pixels():
    torch.manual_seed(0)
    one = sample(boxes=((10.0, 5.0, 30.0, 25.0), (40.0, 30.0, 58.0, 38.0)))
    one.masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    one.masks[0, 5:25, 10:30] = one.masks[1, 30:38, 40:58] = True
    seen = set()
    for _ in range(60):
        out = LargeScaleJitter(64, (0.5, 4.0))(one)
        assert out.masks.dtype == torch.bool and out.masks.shape == (len(out.boxes), *out.size)
        seen.add(tuple(out.labels.tolist()))
        for mask, box in zip(out.masks, out.boxes):
            edge = torch.tensor(bright_box(mask[None] * 255)) if mask.any() else box.round()
            assert (edge - box).abs().max() <= 1.01
        assert (
            (out.image[0] > 127) != out.masks.any(0)
        ).float().mean() < 0.06  # they differ at the edges alone
    assert seen == {(0, 1), (0,), (1,), ()}
    out = ResizeShortest(80)(one)
    assert out.masks.shape == (2, 80, 120) and bright_box(out.masks[:1] * 255) == [20, 10, 60, 50]
    assert LargeScaleJitter(64)(sample()).masks is None


def test_a_box_whose_mask_lost_its_last_pixel_stays():
    """A crop shows a part of the box without the object, or a small one is between the pixels."""
    torch.manual_seed(0)
    one = sample(40, 60, boxes=((10.0, 5.0, 50.0, 35.0),))
    one.masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    one.masks[0, 6, 11] = True
    plain = replace(one, masks=None)
    unseen = 0
    for scale in (0.2, 4.0):
        for seed in range(20):
            torch.manual_seed(seed)
            out = LargeScaleJitter(64, (scale, scale))(one)
            torch.manual_seed(seed)
            assert torch.equal(out.boxes, LargeScaleJitter(64, (scale, scale))(plain).boxes)
            assert len(out.masks) == len(out.labels) == len(out.boxes)
            unseen += int((~out.masks.flatten(1).any(1)).sum())
    assert unseen > 10


@pytest.mark.parametrize("size", [(7, 9), (3, 2), (14, 27), (11, 4)])
def test_masks_are_resized_to_the_nearest_pixel(size):
    masks = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = torch.zeros(2, *size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):  # the source pixel below the centre of this one
            expected[:, y, x] = masks[
                :, (2 * y + 1) * 7 // (2 * size[0]), (2 * x + 1) * 9 // (2 * size[1])
            ]
    assert torch.equal(resize_masks(masks, size), expected)
    window = slice(1, 3), slice(1, 2)
    assert torch.equal(resize_masks(masks, size, window, flip=True), expected[:, 1:3, 1:2].flip(2))
    assert resize_masks(masks[:0], size).shape == (0, *size)
    small = torch.zeros(3, 7, 9, dtype=torch.bool)
    small[0, 2:4, 5:8] = small[2, 6, 0] = True  # and one without a pixel
    for flip in (False, True):
        moved = [resize_map(mask, size, window, flip) for mask in small]
        assert torch.equal(resize_masks(small, size, window, flip), torch.stack(moved))


@pytest.mark.parametrize("size, expected", [((480, 640), (800, 1067)), ((300, 1000), (400, 1333))])
def test_resize_shortest_follows_detectron2(size, expected):
    assert ResizeShortest(800)(sample(*size, boxes=())).size == expected


def test_a_pinned_batch_moves_with_one_copy_for_each_field(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs CUDA
    few, many = sample(8, 8, boxes=((1.0, 1.0, 4.0, 5.0),)), sample(8, 8)
    few.masks = torch.rand(1, 8, 8) > 0.5
    plain = collate([few, many, few]).to(torch.device("cpu"))
    pinned = collate([few, many, few]).pin_memory()
    assert set(pinned.joined) == {"boxes", "labels", "masks"}
    pinned.to(torch.device("cpu"))
    for one, other in zip(plain.samples, pinned.samples, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
        assert one.labels.dtype == other.labels.dtype and other.segments is None
        assert one.masks is other.masks is None or torch.equal(one.masks, other.masks)
    start = pinned.samples[0].boxes.untyped_storage().data_ptr()
    assert all(s.boxes.untyped_storage().data_ptr() == start for s in pinned.samples)


def samples_of_a_batch():
    few, many = sample(8, 8, boxes=((1.0, 1.0, 4.0, 5.0),)), sample(9, 8)
    few.masks = torch.rand(1, 8, 8) > 0.5
    many.captions = ("a cat",)
    return [few, many, few]


def test_a_worker_sends_one_tensor_for_each_field():
    sent = collate(samples_of_a_batch())
    got = pickle.loads(pickle.dumps(sent))
    assert set(got.joined) == {"boxes", "labels", "masks"}
    assert torch.equal(got.images, sent.images) and got.sizes == sent.sizes
    for one, other in zip(got.samples, sent.samples, strict=True):
        assert torch.equal(one.image, other.image) and one.captions == other.captions
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
        assert one.masks is other.masks is None or torch.equal(one.masks, other.masks)
    images, boxes = got.images.data_ptr(), got.joined["boxes"].data_ptr()
    assert got.samples[0].image.data_ptr() == images and got.samples[0].boxes.data_ptr() == boxes
    assert all(one.masks is not None for one in sent.samples[::2])  # what was sent is as it was
    assert torch.equal(got.to(torch.device("cpu")).samples[2].boxes, sent.samples[2].boxes)


def test_a_worker_collates_into_memory_that_it_shares(monkeypatch):
    assert not collate(samples_of_a_batch()).images.is_shared()
    monkeypatch.setattr("common.batch.get_worker_info", lambda: 1)
    batch = collate(samples_of_a_batch())
    assert batch.images.is_shared() and batch.joined["masks"].is_shared()
    assert torch.equal(batch.joined["masks"].view(2, 8, 8)[1:], batch.samples[2].masks)
    monkeypatch.undo()
    assert torch.equal(batch.images, collate(samples_of_a_batch()).images)


def test_batches_of_a_worker_are_those_without_one():
    samples = samples_of_a_batch()
    here = collate(samples)
    [sent] = DataLoader(samples, 3, num_workers=1, collate_fn=collate)
    assert torch.equal(sent.images, here.images) and sent.images.is_shared()
    for ours, theirs in zip(sent.samples, here.samples, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.image, theirs.image)
    assert torch.equal(sent.samples[2].masks, samples[2].masks)


@pytest.mark.parametrize("of_masks", [False, True])
def test_a_lack_of_shared_memory_is_an_error_and_no_hang(monkeypatch, of_masks):
    """The thread of a worker that sends a batch prints its errors, and the main process waits."""
    new_shared = torch.UntypedStorage._new_shared

    def lack(size):
        if of_masks and size != 2 * 8 * 8:
            return new_shared(size)
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", lack)
    samples = samples_of_a_batch()
    loader = DataLoader(samples, 3, num_workers=1, collate_fn=collate, timeout=10)
    with pytest.raises(RuntimeError, match="unable to allocate shared memory"):
        list(loader)


def test_a_worker_sends_images_without_boxes():
    samples = [sample(9, 8, boxes=()), sample(8, 8, boxes=())]
    [sent] = DataLoader(samples, 2, num_workers=1, collate_fn=collate)
    assert [one.boxes.shape for one in sent.samples] == [(0, 4), (0, 4)]
    assert sent.samples[0].labels.dtype == torch.int64 and sent.samples[0].masks is None


@pytest.mark.parametrize("interleaved", [False, True])
def test_collate_copies_images_of_either_layout(interleaved):
    one = sample(33, 20)
    one.image = torch.randint(0, 256, (3, 33, 20), dtype=torch.uint8)
    expected = one.image.clone()
    if interleaved:
        one.image = one.image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    batch = collate([one, sample(40, 60)])
    assert torch.equal(batch.samples[0].image, expected) and batch.images.is_contiguous()


def test_collate_pads_and_remembers_sizes():
    batch = collate([sample(40, 60), sample(33, 20, boxes=((1.0, 1.0, 9.0, 9.0),))])
    assert batch.images.shape == (2, 3, 64, 64) and batch.sizes == [(40, 60), (33, 20)]
    assert batch.images[1, :, 33:].sum() == 0 and batch.images[1, :, :, 20:].sum() == 0
    assert collate([sample(40, 60)], least={"d": (96, 96)}).images.shape[-2:] == (96, 96)


def test_label_space_keeps_datasets_apart():
    space = LabelSpace([Vocabulary("a", ("cat", "dog")), Vocabulary("b", ("dog", "cow", "cat"))])
    assert space.names == ("cat", "dog", "dog", "cow", "cat") and space.scope("b") == slice(2, 5)
    assert space.to_global("b", torch.tensor([0, 2])).tolist() == [2, 4]
    assert space.dataset_of_label.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(InputError, match="'c' is not part of this label space; nearest: "):
        space.to_global("c", torch.tensor([0]))
    with pytest.raises(InputError, match="twice"):
        LabelSpace([Vocabulary("a", ("cat",)), Vocabulary("a", ("dog",))])


def test_datasets_grammar():
    assert parse_datasets("coco, openimages:val,my=a/b.json:im/", "train") == [
        ("coco", "train", None),
        ("oid", "val", None),
        ("my", "train", ("a/b.json", "im/")),
    ]
    assert eval_entries("", "coco:val,my=a.json:b") == "coco,my=a.json:b"
    assert parse_datasets("my=folder/", "train") == [("my", "train", ("folder/", "folder/"))]


def test_image_labels_are_not_evaluated():
    assert eval_entries("", "coco-base,in21k") == "coco-base"
    assert (
        eval_entries("", "lvis-base:train, openimages,in-l,cc,my=dir/,own=a.json:b")
        == "lvis-base,oid,own=a.json:b"
    )
    assert eval_entries("", "in21k:train,my=dir/") == ""
    with pytest.raises(InputError, match="no split 'val', only train"):
        load_datasets("in21k", "val", accepts=ALL)


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
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 4], "iscrowd": crowd}
            for crowd in (0, 1)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    (dataset,) = load_datasets(f"my={tmp_path}/a.json:{tmp_path}", "train")
    assert len(dataset.load(0).boxes) == 1 and len(dataset.load(0, keep_ignored=True).boxes) == 2
    assert dataset.image_counts().tolist() == [1] and dataset.vocabulary.ids == (3,)


def test_augmentation_depends_on_the_draw_alone(tiny_root, monkeypatch):
    (dataset,) = load_datasets("coco", "train", str(tiny_root))
    # it would seed all GPUs, whose numbers nobody restores
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    mixture = Mixture([dataset], {"coco": LargeScaleJitter(64)}, seed=3)
    torch.default_generator.manual_seed(5)
    before = torch.rand(1)
    torch.default_generator.manual_seed(5)
    one = mixture[4, 17]
    assert torch.equal(torch.rand(1), before)  # the caller's random numbers are untouched
    assert torch.equal(mixture[4, 17].image, one.image)
    assert mixture[4, 18].image.shape != one.image.shape or not torch.equal(
        mixture[4, 18].image, one.image
    )


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


def labelled(name: str, labels: list[list[int]], classes: int) -> Dataset:
    """A dataset of image labels without images."""
    index = Index.build(
        name,
        file_names=[f"{i}.jpg" for i in range(len(labels))],
        image_ids=range(len(labels)),
        sizes=np.zeros((len(labels), 2)),
        image_labels=np.array([k for each in labels for k in each], dtype=np.int32),
        image_label_offsets=np.cumsum([0, *map(len, labels)]),
    )
    vocabulary = Vocabulary(name, tuple(f"{name}{c}" for c in range(classes)))
    return Dataset(name, vocabulary, index, None, supervision="image_labels")


def test_repeat_factors_of_image_labels():
    dataset = labelled("a", [[0], [0, 1], [], [0]], 3)
    assert dataset.image_counts().tolist() == [3, 1, 0]
    assert repeat_factors([dataset], 0.75) == pytest.approx([1, 3**0.5, 1, 1])
    both = repeat_factors(
        [dataset, labelled("b", [[], [], [], []], 3)], 0.75
    )  # the same classes in twice as many images
    assert both == pytest.approx([2**0.5, 6**0.5, 1, 2**0.5, 1, 1, 1, 1])


A, B = labelled("a", [[0], [0, 1], [], [0]], 3), labelled("b", [[1]] * 5, 2)
FACTORS = [np.array([1.0, 2.5, 1.2, 1.0]), np.ones(5)]


@pytest.mark.parametrize(
    "make",
    [
        lambda seed, *at: RepeatFactorSampler(FACTORS[0], seed, *at),
        lambda seed, *at: ClassAwareSampler([A, B], seed, *at),
    ],
)
def test_samplers_of_images_resume_and_are_shared_by_ranks(make):
    whole = list(islice(make(1), 60))
    assert [draw for _, draw in whole] == list(range(60))
    for start in (0, 1, 17):
        assert list(islice(make(1, start), 60 - start)) == whole[start:]
        for rank in (0, 1):  # an element is that of rank draw % 2, wherever a run starts
            assert (
                list(islice(make(1, start, rank, 2), 15))
                == [x for x in whole[start:] if x[1] % 2 == rank][:15]
            )
    assert list(islice(make(2), 60)) != whole


def test_sampler_of_batches_resumes_and_is_shared_by_ranks():
    def make(*at):
        return RatioBatchSampler(FACTORS, (1, 3), (2, 4), *at)

    whole = list(islice(make(1), 60))
    for start in (0, 1, 17):
        assert list(islice(make(1, start), 60 - start)) == whole[start:]
        shares = [islice(make(1, start, rank, 2), 30) for rank in (0, 1)]
        for batch, *parts in zip(whole[start:], *shares):
            assert len(parts[0]) == len(parts[1]) == len(batch) / 2 and sorted(
                parts[0] + parts[1]
            ) == sorted(batch)
    assert list(islice(make(2), 60)) != whole
    uneven = RatioBatchSampler(FACTORS, (1, 1), (5, 3), 0, world_size=2)
    assert {len(batch) for batch in islice(uneven, 20)} == {2, 1}


@pytest.mark.parametrize(
    "ratios, sizes, share",
    [((1, 4), (8, 32), 0.5), ((1, 16), (8, 32), 0.8), ((2, 1), (4, 4), 1 / 3)],
)
def test_ratio_counts_images_and_each_batch_has_one_dataset(ratios, sizes, share):
    batches = list(
        islice(RatioBatchSampler([np.ones(50), np.ones(300)], ratios, sizes, seed=0), 2000)
    )
    second = [batch[0][0] >= 50 for batch in batches]
    assert np.mean(second) == pytest.approx(share, abs=0.04)
    for batch, is_second in zip(batches, second):
        assert len(batch) == sizes[is_second]
        assert all((row >= 50) == is_second and row < 350 for row, _ in batch)
    draws = [draw for batch in batches for _, draw in batch]
    assert len(set(draws)) == len(draws)  # no two images share an augmentation
    rows = [row for batch in batches for row, _ in batch if row < 50]
    assert (
        sorted(rows[:50]) == list(range(50)) and rows[:50] != rows[50:100]
    )  # one epoch, then another


def test_ratio_batches_repeat_rare_images():
    stream = islice(
        RatioBatchSampler([np.array([1.0, 3.0, 1.0]), np.ones(4)], (1, 1), (5, 2), seed=0), 400
    )
    rows = [row for batch in stream for row, _ in batch]
    assert rows.count(1) / rows.count(0) == pytest.approx(3, rel=0.05)


def test_classes_are_drawn_uniformly_and_their_images_too():
    a, b = labelled("a", [[0]] * 6 + [[0, 1], []], 3), labelled("b", [[0]], 1)
    rows = [row for row, _ in islice(ClassAwareSampler([a, b], seed=0), 9000)]
    share = np.bincount(rows, minlength=9) / 9000
    assert share == pytest.approx([1 / 21] * 6 + [1 / 21 + 1 / 3, 0, 1 / 3], abs=0.02)


@pytest.mark.parametrize(
    "ratios, sizes, ranks, words",
    [
        ((1,), (2, 2), 1, r"ratios \[1\] for 2 datasets"),
        ((1, 1), (2, 0), 1, "batch sizes .* above 0"),
        ((1, -1), (2, 2), 1, "ratios .* above 0"),
        ((1, 1), (4, 2), 4, "2 images is too small for 4 processes"),
    ],
)
def test_bad_ratios(ratios, sizes, ranks, words):
    with pytest.raises(InputError, match=words):
        RatioBatchSampler(FACTORS, ratios, sizes, 0, world_size=ranks)


@pytest.mark.parametrize(
    "transform", [LargeScaleJitter(640), SegmentationCrop((512,), (400, 640), 2048)]
)
def test_a_batch_beyond_the_memory_is_refused_before_it_is_loaded(transform):
    mixture = Mixture([labelled("a", [[0], []], 2)], {"a": transform}, 0)
    args = SimpleNamespace(workers=0, skip_bad=0, output=".", replay="")
    words = r"1000000000 images of 640 x 640 pixels takes 1,228,800 GB.*lower --batch-size"
    with pytest.raises(InputError, match=words):
        make_loader(mixture, args, batch_size=10**9, sampler=[])
    sampler = RatioBatchSampler([np.ones(2)], [1], [10**9], 0)
    with pytest.raises(InputError, match=words):
        make_loader(mixture, args, batch_sampler=sampler)
    assert make_loader(mixture, args, batch_size=64, sampler=[]).batch_size == 64


def test_class_aware_sampling_needs_a_class():
    with pytest.raises(InputError, match="no image of a has a class"):
        ClassAwareSampler([labelled("a", [[], []], 2)], 0)


def test_derangement_keeps_nothing_in_place():
    for length in (2, 3, 50):
        order = derangement(length, seed=0)
        assert (
            sorted(order.tolist()) == list(range(length)) and (order != torch.arange(length)).all()
        )


@needs_real
def test_real_coco_and_openimages_counts():
    coco, oid = load_datasets("coco,openimages", "train", str(REAL))
    assert (
        len(coco),
        len(coco.index.labels),
        int(coco.index.ignore.sum()),
        len(coco.vocabulary),
    ) == (96, 710, 6, 80)
    assert (len(oid), len(oid.index.labels), int(oid.index.ignore.sum()), len(oid.vocabulary)) == (
        16,
        105,
        3,
        601,
    )
    for dataset in (coco, oid):
        for row in range(0, len(dataset), 5):
            item = dataset.load(row)
            height, width = item.size
            assert (item.boxes >= -0.01).all()
            assert (item.boxes <= torch.tensor([width, height, width, height]) + 1).all()


def test_sixteen_bit_images_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((4, 5), 128 * 257, dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").unique().tolist() == [128]


# -- masks


def polygon_file(folder, **annotation):
    """Two images of 8 x 6 pixels; the first has a polygon and a crowd."""
    square = [[1, 1, 5, 1, 5, 4, 1, 4]]
    crowd = {"size": [6, 8], "counts": [0, 12, 36]}  # the first two columns
    record = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 6, "width": 8} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 3], "segmentation": square}
            | annotation,
            {
                "id": 2,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 2, 6],
                "segmentation": crowd,
                "iscrowd": 1,
            },
        ],
    }
    (folder / "a.json").write_text(json.dumps(record))
    for i in (1, 2):
        Image.new("RGB", (8, 6)).save(folder / f"{i}.png")
    return f"my={folder}/a.json:{folder}"


def test_masks_of_the_boxes_that_are_kept(tmp_path):
    (dataset,) = load_datasets(polygon_file(tmp_path), "train", masks=True)
    item = dataset.load(0)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 1:5] = True
    assert dataset.supervision == "instances" and torch.equal(item.masks, expected[None])
    both = dataset.load(0, keep_ignored=True)
    assert (
        both.masks.shape == (2, 6, 8) and both.masks[1].sum() == 12 and both.masks[1, :, :2].all()
    )
    assert dataset.load(1).masks.shape == (0, 6, 8)
    (dataset,) = load_datasets(polygon_file(tmp_path), "train")
    assert dataset.load(0).masks is None


def test_a_mask_of_another_size_is_named(tmp_path):
    text = polygon_file(tmp_path, segmentation={"size": [9, 9], "counts": [81]})
    with pytest.raises(InputError, match=r"a\.json: image '1\.png' has an RLE of size \[9, 9\]"):
        load_datasets(text, "train", masks=True)[0].load(0)


def test_boxes_are_clipped_and_those_outside_are_left_out(tmp_path, caplog):
    (dataset,) = load_datasets(
        polygon_file(tmp_path, bbox=[-1e9, -1e9, 2e9, 2e9]), "train", masks=True
    )
    assert dataset.load(0).boxes.tolist() == [[0, 0, 8, 6]] and "outside" not in dataset.summary()
    assert dataset.index.boxes[0].tolist() == [-1e9, -1e9, 1e9, 1e9]  # evaluated as annotated
    for bbox, outside in (([8, 1, 4, 4], True), ([-9, 0, 8, 4], True), ([1, 1, 0, 4], False)):
        (dataset,) = load_datasets(polygon_file(tmp_path, bbox=bbox), "val", masks=True)
        assert ("; 1 outside their image)" in dataset.summary()) == outside
        assert ("; 1 without an area)" in dataset.summary()) != outside
        item = dataset.load(0, keep_ignored=True)
        assert item.boxes.tolist() == [[0, 0, 2, 6]] and item.labels.tolist() == [0]
        assert item.masks.shape == (1, 6, 8) and item.masks[0, :, :2].all()
        assert dataset.load(0).boxes.shape == (0, 4) and dataset.load(0).masks.shape == (0, 6, 8)
    assert not caplog.records


def test_fractions_outside_are_counted():
    boxes = [[0.2, 0.2, 1.4, 0.5], [1.0, 0, 1.2, 1], [0, -0.5, 1, 0]]
    index = Index.build(
        "s", ["a"], [0], [(0, 0)], [0] * 3, boxes, [0] * 3, areas=[1] * 3, ignore=[0] * 3
    )
    assert index.outside().tolist() == [False] * 3  # pixels of an image whose size is not known
    index.relative = True
    assert index.outside().tolist() == [False, True, True]


def test_images_of_another_size_are_told_once(tmp_path, caplog):
    text = polygon_file(tmp_path)
    for i in (1, 2):
        Image.new("RGB", (16, 6)).save(tmp_path / f"{i}.png")
    (dataset,) = load_datasets(text, "train")
    dataset.load(1), dataset.load(0), dataset.load(1)
    (record,) = caplog.records
    assert (
        "my: image '2.png' has 6 x 16 pixels (height, width), but 6 x 8 in" in record.getMessage()
    )
    caplog.clear()
    (dataset,) = load_datasets(text, "train")
    rows = Transformed(dataset, lambda sample: sample.index, [0, 1])
    assert list(torch.utils.data.DataLoader(rows, None, num_workers=1)) == [0, 1]
    assert dataset.warned.item()  # by the worker


@pytest.mark.parametrize(
    "annotation, words",
    [
        ({"iscrowd": "0"}, "a.json: annotation 1 has the iscrowd '0'; write the number 0 or 1"),
        ({"iscrowd": None}, "iscrowd None"),
        (
            {"bbox": [0, 0, float("nan"), 1]},
            "not valid json .* was it cut off, or does it hold NaN",
        ),
    ],
)
def test_bad_annotations(tmp_path, annotation, words):
    with pytest.raises(InputError, match=words):
        load_datasets(polygon_file(tmp_path, **annotation), "train")
    for crowd in (True, False, 0, 1):
        (dataset,) = load_datasets(polygon_file(tmp_path, iscrowd=crowd), "val")
        assert dataset.index.ignore.tolist() == [crowd, True]


def test_boxes_without_masks_stay_without(tiny_root):
    coco, o365 = load_datasets("coco,o365", "train", str(tiny_root), masks=True)
    assert (
        coco.load(0).masks.shape == (len(coco.load(0).boxes), 96, 96) and o365.load(0).masks is None
    )


# -- image labels


def image_folder(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file.lower().endswith((".jpeg", ".jpg", ".png")):
            Image.new("RGB", (5, 4)).save(root / file)
        else:
            (root / file).write_text("")
    return root


def load_folder(root, accepts=ALL):
    return load_datasets(f"mine={root}/", "train", accepts=accepts)[0]


def test_own_image_folder(tmp_path, caplog):
    image_folder(
        tmp_path, "b cat/2.JPEG", "b cat/1.png", "a dog/x.jpg", "b cat/notes.txt", "top.jpg"
    )
    image_folder(tmp_path, "b cat/.hidden.jpg", ".git/y.jpg")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load_folder(tmp_path)
    assert (
        "1 class folders without an image" in caplog.text
        and "1 files that are no images" in caplog.text
    )
    assert dataset.vocabulary.names == dataset.vocabulary.ids == ("a dog", "b cat")
    assert [dataset.index.file_name(i) for i in range(3)] == [
        "a dog/x.jpg",
        "b cat/1.png",
        "b cat/2.JPEG",
    ]
    item = dataset.load(2)
    assert (item.supervision, item.dataset, item.image_labels.tolist()) == (
        "image_labels",
        "mine",
        [1],
    )
    assert (
        item.image.shape == (3, 4, 5)
        and item.boxes.shape == (0, 4)
        and item.image_labels.dtype == torch.int64
    )
    assert LargeScaleJitter(8)(item).image_labels.tolist() == [1]
    assert dataset.image_counts().tolist() == [1, 2]
    assert dataset.summary().startswith("mine: 3 images") and "3 image labels" in dataset.summary()


def test_wordnet_ids_are_named(tmp_path, caplog):
    root = tmp_path / "imagenet" / "ImageNet-21K"
    image_folder(
        root,
        "n00000001/a.JPEG",
        "n00000002/b.JPEG",
        "n00000003/c.JPEG",
        "n00000004/d.JPEG",
        "extra/e.JPEG",
    )
    (root.parent / "words.txt").write_text(
        "n00000001\ttench, Tinca tinca\nn00000002\tcrane\nn00000003\tcrane\n"
        "n00000004\tlion, Panthera leo\n"
    )
    (root / "classes.csv").write_text("index,wnid,name\n0,n00000001,tench (fish)\n")
    with caplog.at_level(logging.INFO, "concord"):
        (dataset,) = load_datasets("in21k", "train", str(tmp_path), accepts=ALL)
    assert "1 classes have the name of another" in caplog.text
    assert dataset.vocabulary.names == ("extra", "tench (fish)", "crane", "lion")
    assert dataset.vocabulary.ids == ("extra", "n00000001", "n00000002", "n00000004")
    assert [dataset.load(i).image_labels.item() for i in range(5)] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "files, words",
    [
        ([], ["does not exist"]),
        (["a.jpg"], ["holds 1 images", "for each class"]),
        (["deep/cat/a.jpg"], ["holds 1 folders (deep)"]),
        (["JPEGImages/a.jpg", "val/a.jpg"], ["holds 2 folders (JPEGImages, val)"]),
        (["train/a.jpg", "trainannot/a.png"], ["holds 2 folders (train, trainannot)"]),
        (["cat/notes.txt"], ["holds 1 folders (cat)"]),
        (["n00000001.tar", "cat/notes.txt"], ["n00000001.tar is no whole tar file"]),
        (
            ["n00000001/a.jpg", "cat/a.jpg"],
            ["n00000001 is a WordNet id without a name", "classes.csv"],
        ),
        (
            ["cat/a.jpg", "n00000001/a.jpg", "classes.csv"],
            ["classes.csv", "column 'wnid' is missing"],
        ),
    ],
)
def test_bad_image_folders(tmp_path, files, words):
    with pytest.raises(InputError) as error:
        load_folder(image_folder(tmp_path / "images", *files))
    assert all(word in str(error.value) for word in words) and str(tmp_path / "images") in str(
        error.value
    )


def test_a_class_folder_whose_name_is_no_text(tmp_path):
    image_folder(tmp_path, "cat/a.jpg", os.fsdecode(b"\xff\xfe/a.jpg"))
    with pytest.raises(InputError, match=r"class '\\udcff\\udcfe', which is no text; rename it"):
        load_folder(tmp_path)


def test_links_that_lead_nowhere_are_left_out(tmp_path, caplog):
    image_folder(tmp_path, "cat/a.jpg")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    with caplog.at_level(logging.INFO, "concord"):
        assert load_folder(tmp_path).vocabulary.names == ("cat", "dog")
    assert "2 entries beside the class folders are left out" in caplog.text


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert read_image(tmp_path / "link.png").shape == (3, 4, 5)
    for path, words in (
        (tmp_path / "pipe.jpg", "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "gone.png", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(InputError, match=f"image {path} {words}"):
            read_image(path)


def test_a_words_file_that_is_no_text(tmp_path):
    image_folder(tmp_path, "n00000001/a.jpg")
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"words\.txt cannot be read"):
        load_folder(tmp_path)


@pytest.mark.parametrize("text", ["my=", "my=ann.json", "my=:images/"])
def test_own_data_needs_a_path(text):
    with pytest.raises(InputError, match=r"NAME=ANNOTATIONS\.json:IMAGE_FOLDER/, or NAME=FOLDER/"):
        load_datasets(text, "train")


@pytest.mark.parametrize("name", ["/", "../x", "a/b", "", ".", ".a", "a b", "a\\b"])
def test_names_of_own_data_can_name_files(name):
    with pytest.raises(InputError, match="letters, digits and"):
        parse_datasets(f"{name}=ok.json:img/", "train")
    assert parse_datasets("my-data_2.0=ok.json:img/", "train")[0][0] == "my-data_2.0"


def test_a_method_for_boxes_refuses_image_labels(tmp_path, monkeypatch):
    image_folder(tmp_path, "cat/a.jpg", "my/1.png", "imagenet/ImageNet-21K/cat/a.jpg")
    with pytest.raises(
        InputError, match="'mine' has image labels only; this method needs boxes or instances"
    ):
        load_datasets(f"mine={tmp_path}", "train")
    with pytest.raises(InputError, match=r"'my' has image labels only.*--eval-datasets"):
        load_datasets(tagged(tmp_path), "val")
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1]}
    with pytest.raises(InputError, match="'my' has boxes only; this method needs image labels"):
        load_datasets(tagged(tmp_path, annotations=[box]), "train", accepts=("image_labels",))
    monkeypatch.setattr(
        names, "read_folder", None
    )  # a refusal comes before millions of files are listed
    with pytest.raises(InputError, match="'in21k' has image labels only"):
        load_datasets("in21k", "train", str(tmp_path))


def tagged(folder, file="a.json", below="", **fields):
    """A file such as Detic's tools make of Conceptual Captions."""
    record = {
        "images": [
            {
                "id": 1,
                "file_name": "1.png",
                "pos_category_ids": [9, 7, 9],
                "captions": ["a cat", "a dog and a cat"],
            },
            {"id": 2, "file_name": "2.png", "pos_category_ids": []},
            {"id": 3, "file_name": "3.png", "captions": ["nothing known"]},
        ],
        "categories": [
            {"id": 9, "name": "dog"},
            {"id": 7, "name": "cat"},
            {"id": 8, "name": "cow"},
        ],
        "annotations": [],
    } | fields
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(
        json.dumps({key: value for key, value in record.items() if value is not None})
    )
    image_folder(folder / below, "1.png", "2.png", "3.png")
    return f"my={folder / file}:{folder / below}"


@pytest.mark.parametrize("annotations", [[], None])
def test_tagged_images(tmp_path, annotations):
    (dataset,) = load_datasets(tagged(tmp_path, annotations=annotations), "train", accepts=ALL)
    items = [dataset.load(i) for i in range(3)]
    assert [item.image_labels.tolist() for item in items] == [
        [0, 2],
        [],
        [],
    ] and dataset.vocabulary.ids == (7, 8, 9)
    assert [item.captions for item in items] == [
        ("a cat", "a dog and a cat"),
        (),
        ("nothing known",),
    ]
    assert all(item.supervision == "image_labels" and item.boxes.shape == (0, 4) for item in items)
    assert dataset.image_counts().tolist() == [1, 0, 1]
    assert (
        "3 images (1 without label and caption), 2 image labels, 3 captions, no boxes"
        in dataset.summary()
    )


def test_conceptual_captions_and_imagenet_lvis_in_the_layout_of_detic(tmp_path):
    listed = "imagenet/annotations/imagenet_lvis_image_info.json"
    tagged(tmp_path, "cc3m/train_image_info_tags.json", "cc3m/training")
    tagged(tmp_path, listed, "imagenet/ImageNet-LVIS")
    cc, imagenet = load_datasets("cc,in-l", "train", str(tmp_path), accepts=ALL)
    assert (
        cc.name == "cc"
        and imagenet.name == "in-l"
        and cc.vocabulary.names == imagenet.vocabulary.names
    )
    (tmp_path / listed).unlink()
    image_folder(tmp_path / "imagenet/ImageNet-LVIS", "cat/a.jpg")
    assert load_datasets("in-l", "train", str(tmp_path), accepts=ALL)[0].vocabulary.names == (
        "cat",
    )


@pytest.mark.parametrize(
    "image, words",
    [
        ({"pos_category_ids": [7, 5]}, ["image 4", "unknown id 5", "categories"]),
        ({"pos_category_ids": 7}, ["image 4", "pos_category_ids"]),
        ({"captions": "a cat"}, ["image 4", "captions", "list of strings"]),
        ({"captions": [1]}, ["image 4", "captions", "list of strings"]),
    ],
)
def test_bad_tags(tmp_path, image, words):
    text = tagged(
        tmp_path, images=[{"id": 4, "file_name": "1.png", "pos_category_ids": [7]} | image]
    )
    with pytest.raises(InputError) as error:
        load_datasets(text, "train", accepts=ALL)
    assert all(word in str(error.value) for word in ["a.json", *words])


def test_a_file_without_annotations_and_tags_is_broken(tmp_path):
    text = tagged(tmp_path, annotations=None, images=[{"id": 1, "file_name": "1.png"}])
    with pytest.raises(InputError, match="'annotations' is missing"):
        load_datasets(text, "train", accepts=ALL)


# -- open-vocabulary splits


def boxes_file(path, categories, images, per_image, **fields):
    """`per_image` category ids of each image; x and area of a box are its category id."""
    annotations = [
        {
            "image_id": i,
            "category_id": c,
            "bbox": [c, 0, 1, 1],
            "segmentation": [[c, 0, c + 1, 0, c + 1, 1]],
            "area": c,
        }
        for i, each in enumerate(per_image)
        for c in each
    ]
    record = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 9, "width": 99} | fields
            for i in range(len(per_image))
        ],
        "annotations": [
            annotation | {"id": id} for id, annotation in enumerate(reversed(annotations))
        ],
        "categories": categories,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    image_folder(images, *(image["file_name"] for image in record["images"]))


def ids_per_image(dataset):
    """The category ids of each image; boxes, areas and segmentations must still belong to them."""
    index = dataset.index
    ids = [dataset.vocabulary.ids[label] for label in index.labels]
    assert (
        ids
        == index.boxes[:, 0].tolist()
        == index.areas.tolist()
        == [s[0][0] for s in index.segmentations]
    )
    return [sorted(ids[index.rows(i)]) for i in range(len(index))]


def test_coco_base(tmp_path, caplog):
    known = Vocabulary.known("coco")
    categories = [{"id": id, "name": name} for id, name in zip(known.ids, known.names)]
    per_image = [[1, 5, 10], [], [17, 17], [90, 1, 90]]  # 5 and 17 are novel, 10 is in neither
    for split in ("train", "val"):
        path = tmp_path / f"coco/annotations/instances_{split}2017.json"
        boxes_file(path, categories, tmp_path / f"coco/{split}2017", per_image)
    with caplog.at_level(logging.INFO, "concord"):
        (train,), (val,) = (
            load_datasets("coco-base", split, str(tmp_path)) for split in ("train", "val")
        )
    assert "coco-base: 4 of 8 train boxes are left out; 48 base and 17 novel classes" in caplog.text
    assert "coco-base: 2 of 4 train images without a box are left out" in caplog.text
    assert ids_per_image(train) == [[1], [1, 90, 90]] and list(train.index.image_ids) == [0, 3]
    assert ids_per_image(val) == [[1, 5], [17, 17], [1, 90, 90]] and list(val.index.image_ids) == [
        0,
        2,
        3,
    ]
    assert [val.index.file_name(i) for i in range(3)] == ["0.png", "2.png", "3.png"]
    assert train.name == train.vocabulary.dataset == train.load(0).dataset == "coco-base"
    assert train.vocabulary == val.vocabulary and len(train.vocabulary) == 65
    assert (
        list(train.vocabulary.ids) == sorted(train.vocabulary.ids)
        and 10 not in train.vocabulary.ids
    )
    assert train.metric == "coco" and train.supervision == "instances"
    names = [train.vocabulary.names[label] for label in train.novel]
    assert (
        train.novel == val.novel
        and len(names) == 17
        and {"airplane", "cat", "scissors"} < set(names)
    )


def named(path, names, image="a.jpg", **category):
    """A file with one image and no box; `names` by id."""
    record = {
        "images": [{"id": 1, "file_name": image, "height": 4, "width": 5}],
        "categories": [{"id": id, "name": name} | category for id, name in names.items()],
        "annotations": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_names_of_known_datasets(tmp_path):
    """Objects365 publishes some misspelt; a file whose names are others is another dataset's."""
    path = tmp_path / "objects365/annotations/zhiyuan_objv2_val.json"
    image_folder(tmp_path / "objects365/val", "patch6/a.jpg", "images/v1/patch6/b.jpg")
    (tmp_path / "objects365/val/images").rename(tmp_path / "images")
    known = Vocabulary.known("o365").names
    assert known[2:4] == ("Chair", "Other Shoes") and known[166] == "Cutting/chopping Board"
    named(path, {1: "Person", 3: "chair", 167: "Cuting board"}, "images/v1/patch6/a.jpg")
    (dataset,) = load_datasets("o365", "val", str(tmp_path))
    assert dataset.vocabulary.names == ("Person", "Chair", "Cutting/chopping Board")
    assert dataset.index.file_name(0) == "patch6/a.jpg"
    (tmp_path / "images").rename(
        tmp_path / "objects365/val/images"
    )  # in the tree of the file names
    named(path, {1: "Person"}, "images/v1/patch6/b.jpg")
    assert (
        load_datasets("o365", "val", str(tmp_path))[0].index.file_name(0)
        == "images/v1/patch6/b.jpg"
    )
    named(path, {1: "human", 2: "sneakers", 3: "chair", 4: "hat", 5: "lamp"})  # Objects365 v1
    with pytest.raises(
        InputError,
        match="category id 1 is 'human', but 'Person' in 'o365'; is it another dataset's",
    ):
        load_datasets("o365", "val", str(tmp_path))


def test_images_that_objects365_never_had_are_left_out(tmp_path, caplog):
    path = tmp_path / "objects365/annotations/zhiyuan_objv2_train.json"
    boxes_file(
        path, [{"id": 1, "name": "Person"}], tmp_path / "objects365/train", [[1], [1, 1], []]
    )
    record = json.loads(path.read_text())
    record["images"][0]["file_name"] = "images/v1/patch6/objects365_v1_00320532.jpg"
    path.write_text(json.dumps(record))
    with caplog.at_level(logging.INFO, "concord"):
        (dataset,) = load_datasets("o365", "train", str(tmp_path))
    assert "1 images that were never published are left out" in caplog.text
    assert ids_per_image(dataset) == [[1, 1], []] and list(dataset.index.image_ids) == [1, 2]


@pytest.mark.parametrize("name", ["a\0.jpg", "a\nb.jpg", "a/" * 3000 + "a.jpg"])
def test_names_that_no_file_has(tmp_path, name):
    named(tmp_path / "a.json", {1: "cat"}, name)
    with pytest.raises(InputError, match=r"a\.json: file_name '.*can be no file's") as error:
        load_datasets(f"my={tmp_path}/a.json:{tmp_path}", "train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_training_needs_a_box(tmp_path):
    named(tmp_path / "a.json", {1: "cat"})
    image_folder(tmp_path, "a.jpg")
    with pytest.raises(
        InputError, match=r"a\.json has no box to learn from; add annotations or, for image labels"
    ):
        load_datasets(f"my={tmp_path}/a.json:{tmp_path}", "train")
    assert len(load_datasets(f"my={tmp_path}/a.json:{tmp_path}", "val")[0]) == 1


def test_bad_categories_and_sizes(tmp_path):
    text, path = f"my={tmp_path}/a.json:{tmp_path}", tmp_path / "a.json"
    named(path, {1: None})
    with pytest.raises(InputError, match="category 1 has the name None; write a text"):
        load_datasets(text, "train")
    image_folder(tmp_path / "coco", "a.jpg")
    for frequency in ("rare", None, ""):
        named(tmp_path / "lvis/lvis_v1_val.json", {1: "aerosol can"}, frequency=frequency)
        with pytest.raises(
            InputError, match=f"category 1 has the frequency {frequency!r}; write r, c or f"
        ):
            load_datasets("lvis", "val", str(tmp_path))
    image_folder(tmp_path, "a.jpg")
    for height in (2**31, -1):
        record = {"images": [{"id": 1, "file_name": "a.jpg", "height": height, "width": 5}]}
        record |= {"annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "b.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=rf"b\.json: .*({height}|out of bounds)"):
            load_datasets(f"my={tmp_path}/b.json:{tmp_path}", "train")


def test_a_data_root_that_is_not_read_is_said(tiny_root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(names, "generate", lambda *_: tiny_root)
    load_datasets("coco", "val", tiny=96)
    assert "stand-in" not in caplog.text
    load_datasets("coco", "val", str(tmp_path), tiny=96)
    assert f"--tiny draws a stand-in for 'coco'; {tmp_path} is not read for it" in caplog.text


def test_lvis_base(tmp_path):
    classes = ((1, "aerosol_can", "c"), (2, "air_conditioner", "f"), (5, "alcohol", "r"))
    categories = [
        {"id": id, "name": name, "frequency": frequency} for id, name, frequency in classes
    ]
    fields = {"neg_category_ids": [5], "not_exhaustive_category_ids": [2]}
    for split in ("train", "val"):
        path = tmp_path / f"lvis/lvis_v1_{split}.json"
        boxes_file(path, categories, tmp_path / "coco", [[5], [1, 5, 2, 5]], **fields)
    (train,), (val,) = (
        load_datasets("lvis-base", split, str(tmp_path)) for split in ("train", "val")
    )
    assert ids_per_image(train) == [[], [1, 2]] and ids_per_image(val) == [[5], [1, 2, 5, 5]]
    assert train.vocabulary.names == tuple(
        name for _, name, _ in classes
    ) and train.novel == val.novel == (2,)
    assert (
        train.metric == "lvis"
        and train.frequency == "cfr"
        and list(train.index.negatives) == [[2], [2]]
    )
    assert list(train.index.not_exhaustive) == [[1], [1]]
    assert train.name == train.vocabulary.dataset == train.load(0).dataset == "lvis-base"
    assert repeat_factors([train], 2.0) == pytest.approx([1, 2])  # the empty image is still there


@needs_real
def test_real_image_folders():
    imagenet, clothing = (
        load_folder(REAL / name) for name in ("imagenet_folder", "clothing_folder/train")
    )
    assert (len(imagenet), len(imagenet.vocabulary)) == (200, 200) and imagenet.vocabulary.names[
        0
    ] == "tench"
    assert imagenet.vocabulary.ids[0] == "n01440764" and imagenet.load(0).image.shape[0] == 3
    assert (len(clothing), clothing.vocabulary.names[:2]) == (160, ("dress", "hat"))
    assert clothing.image_counts().tolist() == [16] * 10


@needs_real
def test_real_masks_fill_their_boxes():
    (coco,) = load_datasets("coco-base", "train", str(REAL), masks=True)
    for row in range(0, len(coco), 8):
        item = coco.load(row)
        assert item.masks.shape == (len(item.boxes), *item.size)
        for mask, box in zip(item.masks, item.boxes):
            assert (torch.tensor(bright_box(mask[None] * 255)) - box).abs().max() <= 2
