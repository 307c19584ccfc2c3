"""Other classes and images than those of the annotations.

--rename maps names, --classes takes a subset of them. A part of the images may be drawn, and those
without a box left out.
"""

import difflib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.index import Index
from common.errors import InputError
from common.labels import Vocabulary, fold

log = logging.getLogger("concord")
NO_BOX = "%s: no image has a box to train on; take the dataset out"


def edit_classes(datasets: list[Dataset], classes: str, rename: str, split: str) -> list[Dataset]:
    """Returns the datasets with renamed classes, and only with those that `classes` names.

    classes: names such as "car, bus", or a .txt file with a name per line; "" keeps all
    rename:  a file that `read_renames` reads; "" for none. `classes` are the names after it.

    Names are compared by `fold`. Raises InputError for a class that no dataset has (if `split` is
    "train"), for a dataset that has none of the classes, and where `read_renames` does.
    """
    if rename:
        renames = read_renames(rename)
        known = {fold(old) for dataset in datasets for old in dataset.vocabulary.names}
        used = renames.keys() & known
        log.info("--rename %s: %d of %d names occur", rename, len(used), len(renames))
        datasets = [rename_classes(dataset, renames, rename) for dataset in datasets]
    if not classes:
        return datasets
    wanted = Vocabulary.parse(classes, source="--classes").names
    names = {fold(name) for dataset in datasets for name in dataset.vocabulary.names}
    for name in wanted:
        if split == "train" and fold(name) not in names:
            near = difflib.get_close_matches(fold(name), names, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(f"--classes: no training dataset has a class '{name}'{hint}")
    selected = [select_classes(dataset, wanted) for dataset in datasets]
    if split == "train" and not any(map(_can_teach, selected)):
        raise InputError(f"--classes {classes}: no training dataset has an object of these classes")
    return selected


def _can_teach(dataset: Dataset) -> bool:
    """Tells whether the dataset has a box, a segment, a label of an image, or label maps."""
    index = dataset.index
    labelled = index.image_labels is not None and len(index.image_labels) > 0
    return dataset.pixel_labels is not None or len(index.labels) > 0 or labelled


def draw_images(dataset: Dataset, limit: str, split: str) -> Dataset:
    """Returns the dataset with a part of its images, drawn at random; logs how many.

    limit: a number, "35000", or a percentage of the images, "3.5%", rounded down. To train, "0"
           leaves the classes alone, as negatives for the images of other datasets
    The draw depends on the numbers of images alone, so that each run has the same images.
    Raises InputError if the dataset has fewer images, and for none at all.
    Source: zhenyuw16/UniDetector:scripts/extract_random_images.py, with its seed 1.
    """
    total = len(dataset)
    count = int(float(limit[:-1]) / 100 * total) if limit.endswith("%") else int(limit)
    if limit == "0" and split == "train":
        log.info("%s: none of its images, but its classes, as negatives", dataset.name)
        return dataset.select(np.zeros(total, bool))
    if not 0 < count <= total:
        raise InputError(
            f"--datasets {dataset.name}@{limit} are {count} images of {total}; write 1 to {total}"
        )
    drawn = np.zeros(total, bool)
    drawn[np.random.RandomState(1).permutation(total)[:count]] = True
    log.info("%s: %d of %d images, drawn at random (seed 1)", dataset.name, count, total)
    return dataset.select(drawn)


def drop_empty(dataset: Dataset, least_side: int = 0) -> Dataset:
    """Returns a dataset with boxes without the images that have none to train on; logs how many.

    A crowd is no box to train on. Images with a side below `least_side` pixels are left out, too.
    Raises InputError if no image is left.
    Source: facebookresearch/detectron2:detectron2/data/build.py (FILTER_EMPTY_ANNOTATIONS),
    mmdetection:mmdet/datasets/coco.py (_filter_imgs; there an image with crowds alone stays).
    """
    index = dataset.index
    boxed = np.zeros(len(index), bool)
    boxed[index.image_of[~index.ignore]] = True
    shorter = index.sizes.min(1)
    small = (shorter > 0) & (shorter < least_side)  # 0: the annotations do not tell
    kept = boxed & ~small
    if kept.all():
        return dataset
    if not kept.any():
        raise InputError(NO_BOX % dataset.name)
    reasons = f"{(~boxed).sum()} without a box"
    if least_side:
        reasons += f", {small.sum()} with a side below {least_side} pixels"
    message = "%s: %d of %d images are not trained on (%s)"
    log.info(message, dataset.name, (~kept).sum(), len(kept), reasons)
    return dataset.select(kept)


def refuse_without_boxes(datasets: list[Dataset]) -> None:
    """Raises InputError if a dataset has images, and none of them has a box to train on."""
    for dataset in datasets:
        if len(dataset) and dataset.index.ignore.all():
            raise InputError(NO_BOX % dataset.name)


def read_renames(path: str) -> dict[str, str]:
    """Reads a json object {"old name": "new name"}, or a text file of lines old name = new name.

    Returns {folded old name: new name}. Raises InputError for a file that cannot be read, and for
    a line or a value of another form.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text("utf-8-sig")
        if path.endswith(".json"):
            pairs = json.loads(text, object_pairs_hook=tuple)  # with names that come twice
            if not isinstance(pairs, tuple):
                raise ValueError("it holds no json object")
        else:
            lines = [line.strip() for line in text.splitlines()]
            pairs = [line.partition("=")[::2] for line in lines if line]
        pairs = [(old.strip(), new.strip()) for old, new in pairs]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"--rename {path} cannot be read ({error}); write lines 'old name = new name', or a"
            " json object"
        ) from None
    renames = {}
    for old, new in pairs:
        if not old or not new:
            raise InputError(f"--rename {path}: '{old:.60} = {new:.60}' lacks a name; write both")
        if renames.setdefault(fold(old), new) != new:
            raise InputError(f"--rename {path}: '{old:.60}' has two new names; keep one")
    return renames


def rename_classes(dataset: Dataset, renames: dict[str, str], path: str) -> Dataset:
    """Returns the dataset with other class names, which are from the file at `path`.

    Raises InputError if two of them become equal.
    """
    vocabulary = dataset.vocabulary
    names = tuple(renames.get(fold(name), name) for name in vocabulary.names)
    renamed = replace(vocabulary, names=names, source=f"{dataset.name} after --rename {path}")
    return replace(dataset, vocabulary=renamed)


def select_classes(dataset: Dataset, wanted: tuple[str, ...]) -> Dataset:
    """Returns the dataset with only the classes `wanted`, in its own order.

    Boxes, image-level labels and segments of other classes are left out, and their number is
    logged. The images stay. In label maps, the pixels of other classes are void.
    Raises InputError if the dataset has none of the classes.
    """
    folded = {fold(name) for name in wanted}
    vocabulary = dataset.vocabulary
    kept = [i for i, name in enumerate(vocabulary.names) if fold(name) in folded]
    if not kept:
        raise InputError(
            f"dataset '{dataset.name}' has none of the --classes {', '.join(wanted)}; leave it out"
        )
    label_of = np.full(len(vocabulary), -1, np.int32)  # old label -> new label, or -1
    label_of[kept] = np.arange(len(kept))
    index = _select_labels(dataset.index, label_of)
    log.info(
        "%s: --classes keeps %d of %d classes, %d of %d annotations",
        dataset.name,
        len(kept),
        len(vocabulary),
        len(index.labels),
        len(dataset.index.labels),
    )
    pixel_labels = dataset.pixel_labels
    if pixel_labels is not None:
        pixel_labels = np.where(pixel_labels < 0, pixel_labels, label_of[pixel_labels])
        pixel_labels = pixel_labels.astype(np.int16)
    frequency = dataset.frequency
    return replace(
        dataset,
        vocabulary=_select_names(vocabulary, kept),
        index=index,
        frequency=frequency and "".join(frequency[i] for i in kept),
        novel=tuple(int(label_of[label]) for label in dataset.novel if label_of[label] >= 0),
        pixel_labels=pixel_labels,
        partial=True,
    )


def _select_names(vocabulary: Vocabulary, kept: list[int]) -> Vocabulary:
    """Returns the vocabulary of the classes `kept`."""
    columns = {}
    for field in ("names", "ids", "image_counts", "is_thing"):
        values = getattr(vocabulary, field)
        columns[field] = None if values is None else tuple(values[i] for i in kept)
    return replace(vocabulary, **columns)


def _select_labels(index: Index, label_of: np.ndarray) -> Index:
    """Returns the index with new labels and without the annotations whose new label is -1."""
    labels = label_of[index.labels]
    kept = labels >= 0
    changes = {}
    for field in ("negatives", "not_exhaustive", "verified"):
        rows = getattr(index, field)
        if rows is not None:
            new = [[int(label_of[label]) for label in row] for row in rows]
            changes[field] = [[label for label in row if label >= 0] for row in new]
    if index.image_labels is not None:
        image_labels = label_of[index.image_labels]
        kept_labels = image_labels >= 0
        count = np.concatenate([[0], np.cumsum(kept_labels)])
        changes["image_labels"] = image_labels[kept_labels]
        changes["image_label_offsets"] = count[index.image_label_offsets]
    return replace(index.keep(kept), labels=labels[kept], folder=None, **changes)
