"""OpenImages csv files: boxes in fractions of the image, group-of boxes, verified image labels, the class tree."""

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import read_rows, read_table
from common.datasets.index import Index, Parts
from common.datasets.store import cached_index
from common.datasets.stream import read_json
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")
CLASSES = "class-descriptions-boxable.csv"
TREES = ("bbox_labels_600_hierarchy.json", "challenge-2019-label500-hierarchy.json")
RUN = 100_000  # rows that are Python objects at a time


def read_openimages(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Read `*-annotations-bbox.csv` or the challenge's; class list, tree, verified labels are beside it or above.

    Of a validation file, images without a box that have a verified label are listed too: what is found there is wrong.
    Source: tensorflow/models:research/object_detection/metrics/oid_challenge_evaluation.py.
    Large files are read once and kept as columns in the cache, see `cached_index`.
    Raises InputError naming the file, the row and the remedy.
    """
    classes = beside(annotations, CLASSES)
    if classes:
        pairs = [
            row for row in read_rows(classes) if row and row[0] != "LabelName"
        ]  # V7 has a header
        if any(len(row) != 2 for row in pairs):
            raise InputError(
                f"{classes}: a line is not ID,NAME; was the file cut off? download it again"
            )
        listed = Vocabulary(name, tuple(p[1] for p in pairs), tuple(p[0] for p in pairs))
    else:
        listed = Vocabulary.known("oid")
    vocabulary = Vocabulary.known(name) if name == "oid500" else listed
    tree = beside(annotations, *TREES)
    labels = [
        annotations.name.replace("bbox", f"human-imagelabels{ending}")
        for ending in ("-boxable", "")
    ]
    verified = beside(annotations, *labels)
    if "train" not in annotations.name and not (tree and verified):
        lost = labels[0] if tree else TREES[0]
        log.warning(
            "%s: there is no %s beside it, so the AP50 will not be the official one",
            annotations,
            lost,
        )

    def read(_: BinaryIO) -> tuple[Index, dict]:
        absent, present = read_verified(verified, vocabulary) if verified else ({}, {})
        evaluated = absent | present if "validation" in annotations.name else ()
        index, left_out = read_index(annotations, listed, vocabulary, evaluated)
        if verified:
            index.negatives, index.verified = (
                [of.get(id, []) for id in index.image_ids] for of in (absent, present)
            )
        return index, {"left_out": left_out}

    files = [path for path in (annotations, verified) if path]
    index, facts = cached_index(annotations, ["oid", listed.ids, vocabulary.ids], read, files)
    if facts["left_out"]:
        log.info("%s: %d boxes of classes that are not among the %d are left out", annotations, facts["left_out"],
                 len(vocabulary))  # fmt: skip
    return Dataset(
        name, vocabulary, index, images, metric, hierarchy=read_json(tree) if tree else None
    )


def beside(annotations: Path, *names: str) -> Path | None:
    """The first of the files that exists in the folder of the annotations or the one above."""
    places = [
        folder / name
        for name in names
        for folder in (annotations.parent, annotations.parent.parent)
    ]
    return next((place for place in places if place.is_file()), None)


def read_index(
    path: Path, listed: Vocabulary, vocabulary: Vocabulary, without_box: Iterable[str] = ()
) -> tuple[Index, int]:
    """And the number of boxes of classes that are `listed` but not in `vocabulary`, which are left out.

    without_box: images to list, too; with a box or not
    """
    row_of: dict[str, int] = {}
    parts, left_out = Parts(image=np.int32, box=(np.float32, 4), label=np.int32, group=bool), 0
    rows = read_table(path, ["ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf"])
    while run := list(islice(rows, RUN)):
        image_of, boxes, labels, group = [], [], [], []
        for line, (image, mid, *corners, group_of) in run:
            if mid not in listed.index_of_id:
                raise InputError(
                    f"{path}: line {line} has the unknown LabelName '{mid}'; {CLASSES} must list it"
                )
            if mid not in vocabulary.index_of_id:
                left_out += 1
                continue
            refuse_path(path, line, image)
            try:
                boxes.append([float(c) for c in corners])
            except ValueError:
                raise InputError(
                    f"{path}: line {line} has a box that is no number ({', '.join(corners)})"
                ) from None
            image_of.append(row_of.setdefault(image, len(row_of)))
            labels.append(vocabulary.index_of_id[mid])
            group.append(group_of == "1")
        parts.add(image=image_of, box=np.reshape(boxes, (-1, 4)), label=labels, group=group)
    for image in without_box:
        row_of.setdefault(image, len(row_of))
    index = Index.build(
        source=str(path),
        file_names=[f"{image}.jpg" for image in row_of],
        image_ids=list(row_of),
        sizes=np.zeros((len(row_of), 2)),  # the csv does not tell
        image_of=parts.take("image"),
        boxes=parts.take("box"),
        labels=parts.take("label"),
        ignore=parts.take("group"),
        relative=True,
    )
    return index, left_out


def read_verified(
    path: Path, vocabulary: Vocabulary
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """For each image that has some, the labels that people verified to be absent; and those to be present."""
    absent, present = {}, {}
    for line, (image, mid, confidence) in read_table(path, ["ImageID", "LabelName", "Confidence"]):
        of = absent if confidence.strip() in ("0", "0.0") else present
        if mid in vocabulary.index_of_id:
            refuse_path(path, line, image)
            of.setdefault(image, []).append(vocabulary.index_of_id[mid])
    return absent, present


def refuse_path(path: Path, line: int, image: str) -> None:
    if "/" in image or image.startswith("."):
        raise InputError(
            f"{path}: line {line} has the ImageID '{image}', which leaves the image folder"
        )
