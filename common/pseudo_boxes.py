"""Pseudo boxes: objects of classes that a dataset does not annotate, as a model has found them.

They are written in COCO's format, a file per dataset, which any reader of COCO's json can show. The
file is replaced as a whole after each part of the images, so that a killed run goes on behind it.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.batch import Batch, Sample
from common.checkpoint import BROKEN
from common.datasets.dataset import Dataset
from common.distributed import from_main, on_main, rank
from common.errors import InputError
from common.files import atomic_path
from common.inference import predict_dataset
from common.labels import LabelSpace, Vocabulary, fold
from common.unreadable import Readable, Skips

log = logging.getLogger("concord")

BLOCK = 5000  # images after which the file is replaced
FACTS = ("score", "iou_mean", "freq")  # what is known of each box


def pseudo_file(folder: Path, dataset: str) -> Path:
    """Returns the file of a dataset's pseudo boxes."""
    return folder / f"pseudo-{dataset}.json"


def read_record(path: Path, dataset: Dataset, names: tuple[str, ...]) -> dict:
    """Reads a file of pseudo boxes, COCO's {images, categories, annotations}.

    Its images are the first ones of the dataset, or all. Without a file it is one without images.
    names: of the classes
    Raises InputError for a file that cannot be read, or that is of other images or classes.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    if not path.exists():
        return {"images": [], "categories": categories, "annotations": []}
    try:
        record = json.loads(path.read_text())
        found = [image["id"] for image in record["images"]]
        known = [category["name"] for category in record["categories"]]
        for box in record["annotations"]:
            numbers = [*box["bbox"], *(box[fact] for fact in FACTS)]
            if not (np.isfinite(numbers).all() and 1 <= box["category_id"] <= len(known)):
                raise ValueError("a box has no sound numbers")
    except (*BROKEN, OSError) as error:
        raise InputError(
            f"pseudo boxes {path} cannot be read ({type(error).__name__}: {error}); delete the"
            " file to mine them again"
        ) from None
    own = [dataset.index.image_ids[row] for row in range(min(len(found), len(dataset)))]
    of_boxes = {box["image_id"] for box in record["annotations"]}
    if found != own or known != list(names) or not of_boxes <= set(own):
        raise InputError(
            f"pseudo boxes {path} are of other images or classes than those of '{dataset.name}';"
            " delete the file to mine them again, or name the --datasets that they were mined in"
        )
    return record


def are_complete(folder: Path, datasets: list[Dataset], label_space: LabelSpace) -> bool:
    """Returns whether the pseudo boxes of all images are there. Raises as `read_record` does."""

    def missing(dataset: Dataset) -> int:
        record = read_record(pseudo_file(folder, dataset.name), dataset, label_space.names)
        return len(dataset) - len(record["images"])

    return not any(map(missing, datasets))


def mine_boxes(
    locate: Callable[..., list[dict]],
    dataset: Dataset,
    label_space: LabelSpace,
    resize: Callable[[Sample], Sample],
    folder: Path,
    args: Any,
) -> None:
    """Writes the pseudo boxes of all images of a dataset, or of those that the file lacks.

    locate: called as locate(batch, first=row), with the row of the first image of its part of the
            dataset. Returns a dictionary per image: `boxes` (N, 4) in pixels of the original image,
            `facts` (N, 3), see FACTS, `labels` (N,), columns of the label space, and `size`
    resize: transforms each sample before `locate` gets the batch
    args:   --workers and --skip-bad; an unreadable image that may be skipped has no boxes

    Every rank must call it. Each locates a part of the images, and rank 0 writes.
    """
    path = pseudo_file(folder, dataset.name)
    record = on_main(read_record, path, dataset, label_space.names)
    for start in range(len(record["images"]), len(dataset), BLOCK):
        chosen = np.zeros(len(dataset), dtype=bool)
        chosen[start : start + BLOCK] = True
        part = dataset.select(chosen)
        readable = Readable(**vars(part), skips=Skips(args.skip_bad, folder))
        title = f"{dataset.name}: pseudo boxes"
        locate_part = partial(_locate_or_skip, partial(locate, first=start))
        found = predict_dataset(locate_part, readable, resize, args.workers, title)
        if rank() == 0:
            for row in range(len(part)):
                _add_image(record, part, row, found[row])
            with atomic_path(path, durable=True) as temporary:
                temporary.write_text(json.dumps(record))
    if rank() == 0:
        message = "%s: %d pseudo boxes in %d images, %s"
        log.info(message, dataset.name, len(record["annotations"]), len(dataset), path)
    from_main(None)  # the others wait until the file is written


def _locate_or_skip(locate: Callable[[Batch], list[dict]], batch: Batch) -> list[dict]:
    """Returns what `locate` finds; nothing in a black image, which stands for an unreadable one."""
    (sample,) = batch.samples
    if sample.image.any():
        return locate(batch)
    nothing = {"boxes": torch.zeros(0, 4), "facts": torch.zeros(0, 3), "labels": torch.zeros(0)}
    return [nothing | {"size": sample.original_size}]


def _add_image(record: dict, dataset: Dataset, row: int, found: dict) -> None:
    """Adds image `row` and its boxes to the record, in place."""
    height, width = found["size"]
    image_id = dataset.index.image_ids[row]
    name = dataset.index.file_name(row)
    image = {"id": image_id, "file_name": name, "height": int(height), "width": int(width)}
    record["images"].append(image)
    columns = (found[field].tolist() for field in ("boxes", "labels", "facts"))
    for box, label, values in zip(*columns):
        left, top, right, bottom = (round(edge, 2) for edge in box)
        entry = {
            "id": len(record["annotations"]) + 1,
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
        }
        entry |= {fact: round(value, 5) for fact, value in zip(FACTS, values)}
        record["annotations"].append(entry)


@dataclass
class PseudoBoxes:
    """Pseudo boxes of a dataset, sorted by image.

    images: (P,) row of the image; boxes: (P, 4) float32 xyxy in pixels; labels: (P,) int64
    facts:  {score, iou_mean, freq: (P,)}
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    facts: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path, dataset: Dataset, names: tuple[str, ...]) -> "PseudoBoxes":
        """Reads the file of a dataset; labels are rows of `names`. Raises as `read_record` does."""
        record = read_record(pseudo_file(folder, dataset.name), dataset, names)
        row_of = {image["id"]: row for row, image in enumerate(record["images"])}
        found = sorted(record["annotations"], key=lambda box: row_of[box["image_id"]])
        boxes = np.array([box["bbox"] for box in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        images = np.array([row_of[box["image_id"]] for box in found], np.int64)
        labels = np.array([box["category_id"] - 1 for box in found], np.int64)
        facts = {fact: np.array([box[fact] for box in found], np.float64) for fact in FACTS}
        return cls(images, boxes, labels, facts)

    def take(self, rows: np.ndarray) -> "PseudoBoxes":
        """Returns the boxes `rows`, (P,) bool."""
        facts = {name: values[rows] for name, values in self.facts.items()}
        return PseudoBoxes(self.images[rows], self.boxes[rows], self.labels[rows], facts)


@dataclass
class WithPseudoBoxes(Dataset):
    """Adds pseudo boxes to the annotated boxes of a dataset's samples.

    Its vocabulary has the classes of the dataset, and then all others of the label space.
    """

    found: PseudoBoxes | None = None

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Loads image `i` as `Dataset.load` does. The pseudo boxes follow the annotated ones."""
        sample = super().load(i, keep_ignored)
        start, end = np.searchsorted(self.found.images, [i, i + 1])
        boxes = torch.from_numpy(self.found.boxes[start:end])
        labels = torch.from_numpy(self.found.labels[start:end])
        boxes = torch.cat([sample.boxes, boxes])
        return replace(sample, boxes=boxes, labels=torch.cat([sample.labels, labels]))


def extended(vocabulary: Vocabulary, names: tuple[str, ...]) -> Vocabulary:
    """Returns a dataset's vocabulary, followed by those of `names` that it lacks."""
    own = {fold(name) for name in vocabulary.names}
    others = tuple(name for name in names if fold(name) not in own)
    return Vocabulary(vocabulary.dataset, (*vocabulary.names, *others))


def with_pseudo_boxes(
    dataset: Dataset,
    folder: Path,
    label_space: LabelSpace,
    confidence: Callable[..., np.ndarray],
    least: float,
) -> WithPseudoBoxes:
    """Returns a copy of the dataset that loads the confident boxes of its file in `folder`.

    Rank 0 reads the file. Every rank calls it.
    confidence: called with all FACTS of P boxes, (P,) each, by name; returns (P,)
    least:      the boxes whose confidence is above it are loaded; the log says how many
    """
    found = on_main(PseudoBoxes.read, folder, dataset, label_space.names)
    kept = confidence(**found.facts) > least
    message = "%s: trains on %d of %d pseudo boxes"
    log.info(message, dataset.name, kept.sum(), len(kept))
    vocabulary = extended(dataset.vocabulary, label_space.names)
    label_of = {fold(name): label for label, name in reversed([*enumerate(vocabulary.names)])}
    labels = np.array([label_of[fold(name)] for name in label_space.names], np.int64)
    found = replace(found, labels=labels[found.labels]).take(kept)
    fields = vars(dataset) | {"vocabulary": vocabulary}
    return WithPseudoBoxes(**fields, found=found)
