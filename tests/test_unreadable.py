"""Images that cannot be read: --skip-bad, and file systems that fail for a moment."""

import errno
import json
import os
import shutil

import pytest
import torch
from conftest import FAST
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import common.unreadable
import scaledet
from common.batch import collate
from common.datasets import load_datasets
from common.errors import InputError
from common.inference import predict_dataset
from common.process import unlock
from common.sampling import Mixture, RepeatFactorSampler, repeat_factors
from common.transforms import LargeScaleJitter
from common.unreadable import Readable, Skips, load_patiently

BROKEN = 4  # of the 12 images


@pytest.fixture
def broken(tiny_root, tmp_path) -> str:
    """The argument of --datasets for a copy of tiny coco's train split with broken images."""
    shutil.copytree(tiny_root / "coco/train2017", tmp_path / "images")
    annotations = tiny_root / "coco/annotations/instances_train2017.json"
    shutil.copy(annotations, tmp_path / "ann.json")
    record = json.loads(annotations.read_text())
    for image in record["images"][:BROKEN]:
        (tmp_path / "images" / image["file_name"]).write_text("this is no image")
    return f"my={tmp_path / 'ann.json'}:{tmp_path / 'images'}"


def draws(spec: str, skips: Skips, workers: int, count: int, start: int = 0) -> list:
    """The images `start` to `count` of a training, as (image_id, draw, file_name, pixels)."""
    (dataset,) = load_datasets(spec, "train", ".")
    sampler = RepeatFactorSampler(repeat_factors([dataset], 0.0), 0, start)
    mixture = Mixture([dataset], {"my": LargeScaleJitter(64, (0.5, 1.0))}, 0, skips)
    loader = DataLoader(
        mixture, sampler=sampler, batch_size=1, collate_fn=collate, num_workers=workers
    )
    samples = [batch.samples[0] for _, batch in zip(range(start, count), loader)]
    return [(s.image_id, s.draw, s.file_name, s.image.sum().item()) for s in samples]


def test_unreadable_images_are_replaced_alike_with_any_workers_and_later(broken, tmp_path, caplog):
    """Each is named in one line, also by several processes, and in a file."""
    whole = draws(broken, Skips(BROKEN, tmp_path), 0, 30)
    lines = [line for line in caplog.messages if "another image takes its place" in line]
    assert len(lines) == BROKEN and f"({BROKEN} of --skip-bad {BROKEN})" in lines[-1]
    assert "cannot be decoded" in lines[0] and str(tmp_path / "images") in lines[0]
    listed = (tmp_path / "skipped-images.txt").read_text().splitlines()
    assert len(listed) == BROKEN and all(name.startswith("my: ") for name in listed)
    assert [draw for _, draw, *_ in whole] == list(range(30))
    assert not {name for *_, name, _ in whole} & {name.removeprefix("my: ") for name in listed}
    assert draws(broken, Skips(BROKEN, tmp_path), 0, 30, start=13) == whole[13:]
    other = tmp_path / "other"
    other.mkdir()
    assert draws(broken, Skips(BROKEN, other), 2, 30) == whole
    assert sorted((other / "skipped-images.txt").read_text().splitlines()) == sorted(listed)


@pytest.mark.parametrize("limit", [0, BROKEN - 1])
def test_more_than_may_be_skipped_is_an_error(broken, tmp_path, limit):
    with pytest.raises(InputError, match="cannot be decoded"):
        draws(broken, Skips(limit, tmp_path), 0, 30)
    listed = tmp_path / "skipped-images.txt"
    assert (len(listed.read_text().splitlines()) if limit else listed.exists()) == limit


def test_nothing_readable_is_an_error_that_names_the_flag(broken, tmp_path):
    for path in (tmp_path / "images").iterdir():
        path.write_text("this is no image")
    with pytest.raises(InputError, match="my: none of 100 images can be read, and --skip-bad"):
        draws(broken, Skips(99, tmp_path), 0, 1)


def test_a_training_goes_on_without_unreadable_images(broken, tmp_path, call, monkeypatch, caplog):
    """Without and with data loading processes: to the same bits."""
    monkeypatch.setattr(scaledet, "evaluate", lambda *given: {})
    monkeypatch.setattr(scaledet, "report_label_space", lambda *given: None)
    flags = ["--datasets", broken, "--eval-datasets", broken, *FAST, "--batch-size", 2]
    flags += ["--skip-bad", BROKEN, "--steps", 3]
    for workers in (0, 2):
        call(*flags, "--workers", workers, "--output", tmp_path / str(workers))
        unlock()
    assert "another image takes its place" in caplog.text
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in "02")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_unreadable_image_has_no_proposals(broken, tmp_path):
    """A pass over all images in order gets a black image in its place."""
    (dataset,) = load_datasets(broken, "train", ".")
    readable = Readable(**vars(dataset), skips=Skips(BROKEN, tmp_path))
    seen = predict_dataset(
        lambda batch: [{"sum": int(batch.images.sum())}], readable, lambda s: s, 0, "title"
    )
    assert [row for row, found in seen.items() if not found["sum"]] == list(range(BROKEN))
    few = Readable(**vars(dataset), skips=Skips(BROKEN - 1, tmp_path / "images"))
    with pytest.raises(InputError, match="cannot be decoded"):
        [few.load(row) for row in range(BROKEN)]


# -- file systems that fail for a moment -----------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """failing(number, times): the next `times` images that are opened fail with this errno."""
    monkeypatch.setattr(common.unreadable, "PAUSES", (0, 0))
    opened = Image.open

    def start(number: int, times: int) -> None:
        left = [times]

        def fails(*given, **more):
            if left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), "a.jpg")
            return opened(*given, **more)

        monkeypatch.setattr(Image, "open", fails)

    return start


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_a_file_system_that_fails_gets_three_tries(tiny_root, failing, number, caplog):
    (dataset,) = load_datasets("coco", "val", str(tiny_root))
    failing(number, 2)
    assert load_patiently(dataset, 3).image_id == dataset.index.image_ids[3]
    assert len([line for line in caplog.messages if "tried again in" in line]) == 2
    assert os.strerror(number) in caplog.text
    failing(number, 3)
    with pytest.raises(InputError, match="cannot be decoded"):
        load_patiently(dataset, 3)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_lasting_error_is_not_tried_again(tiny_root, failing, number, caplog):
    (dataset,) = load_datasets("coco", "val", str(tiny_root))
    failing(number, 1)
    with pytest.raises(InputError):
        load_patiently(dataset, 3)
    assert not caplog.messages


def test_a_broken_image_is_not_tried_again(broken, monkeypatch):
    (dataset,) = load_datasets(broken, "train", ".")
    monkeypatch.setattr(common.unreadable.time, "sleep", lambda _: pytest.fail("waits"))
    with pytest.raises(InputError, match="cannot be decoded"):
        load_patiently(dataset, 0)


@pytest.mark.parametrize("name", ["coco", "ade20k", "coco-panoptic"])
def test_an_evaluation_is_as_patient(tiny_root, failing, name):
    """Of boxes and of maps, whose label maps are images, too."""
    accepts = ("instances", "semantic", "panoptic")
    (dataset,) = load_datasets(name, "val", str(tiny_root), accepts=accepts)
    failing(errno.EIO, 2)
    found = predict_dataset(
        lambda batch: [{"id": batch.samples[0].image_id}], dataset, lambda s: s, 0, "title"
    )
    assert [found[row]["id"] for row in range(len(dataset))] == list(dataset.index.image_ids)
