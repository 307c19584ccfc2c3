"""first_batch.jpg: datasets that the first batch lacks are added when they come."""

import pytest
import torch

from common import first_batch
from common.batch import Sample, collate
from common.first_batch import EACH, FirstBatch
from common.labels import LabelSpace, Vocabulary

SPACE = LabelSpace([Vocabulary(name, ("cat", "dog")) for name in ("coco", "two", "o365")])


def batch_of(*kinds):
    """kinds: dataset or dataset/supervision of each image"""
    samples = []
    for i, kind in enumerate(kinds):
        name, _, supervision = kind.partition("/")
        sample = Sample.unlabelled(torch.full((3, 60, 60), 90, dtype=torch.uint8), name, i, i)
        sample.supervision = supervision or "boxes"
        samples.append(sample)
    return collate(samples)


@pytest.fixture
def drawn(monkeypatch):
    """The (dataset, supervision) of the images of each picture that is drawn."""
    found = []

    def sample_grid(samples, vocabularies):
        found.append([(sample.dataset, sample.supervision) for sample in samples])
        return torch.zeros(3, 9, 9, dtype=torch.uint8)

    monkeypatch.setattr(first_batch, "sample_grid", sample_grid)
    return found


def test_later_datasets_are_added(tmp_path, drawn):
    first = FirstBatch("coco,two=a.json:b,objects365@9", tmp_path, SPACE)
    first.note(1, batch_of(*["coco"] * 9))
    assert not drawn  # the training draws the batch of step 1
    first.note(2, batch_of("coco", "coco"))
    assert not drawn
    first.note(3, batch_of("coco", "two/image_labels", "two/image_labels"))
    assert drawn == [[("coco", "boxes")] * EACH + [("two", "image_labels")] * 2]
    assert (tmp_path / "first_batch.jpg").is_file() and not first.done
    first.note(4, batch_of("o365"))
    assert drawn[1][-1] == ("o365", "boxes") and first.done
    first.note(5, batch_of("o365/instances"))
    assert len(drawn) == 2


def test_a_dataset_that_does_not_come(tmp_path, drawn, caplog):
    caplog.set_level("INFO", "concord")
    first = FirstBatch("coco,two=a.json:b", tmp_path, lambda: SPACE)
    for step in range(1, first_batch.STEPS + 3):
        first.note(step, batch_of("coco"))
    assert not drawn and first.done
    assert caplog.text.count("no image of two: none came in the first 100 steps") == 1


def test_a_picture_of_three_datasets(tmp_path):
    first = FirstBatch("coco,two=a.json:b", tmp_path, SPACE)
    first.note(1, batch_of("coco", "coco"))
    first.note(2, batch_of("two"))
    assert (tmp_path / "first_batch.jpg").stat().st_size > 1000
