"""Reader of OpenImages csv files: boxes, verified image-level labels, the class tree."""

import logging
import reprlib
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
GROUPS = {"0": False, "1": True, "-1": False}  # -1 is unknown
CONFIDENCES = {"0": False, "0.0": False, "1": True, "1.0": True}
DEEPEST = 100  # levels of the class tree; the official one has 6
LONGEST_NAME = 250  # letters; more can be no file's
LARGEST = 2  # fractions of the image; those published end at 1
CHUNK = 100_000  # rows that are Python objects at one time


def read_openimages(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Reads `*-annotations-bbox.csv` of OpenImages or of the OpenImages Challenge.

    Looks for the class list, the class tree and the image-level labels in the same folder, then in
    its parent. If the tree or the labels are missing, AP50 is not the official one. A warning says
    so, unless the file name contains `train`.
    If the file name contains `validation`, the dataset also has the images with image-level labels
    but without a box. Every detection of a verified class is a false positive in them. In all
    images, detections of classes that are not verified are ignored.
    Source: tensorflow/models:research/object_detection/metrics/oid_challenge_evaluation.py
    Raises InputError for a file or a row that cannot be used, with its name and the remedy.
    """
    class_list = find_file(annotations, CLASSES)
    listed = read_class_csv(name, class_list) if class_list else Vocabulary.known("oid")
    vocabulary = Vocabulary.known(name) if name == "oid500" else listed
    tree = find_file(annotations, *TREES)
    boxable = annotations.name.replace("bbox", "human-imagelabels-boxable")
    complete = annotations.name.replace("bbox", "human-imagelabels")
    verified = find_file(annotations, boxable, complete)
    if "train" not in annotations.name and not (tree and verified):
        message = "%s: there is no %s beside it, so the AP50 will not be the official one"
        log.warning(message, annotations, boxable if tree else TREES[0])

    def read(_: BinaryIO) -> tuple[Index, dict]:
        absent, present = read_verified(verified, vocabulary) if verified else ({}, {})
        evaluated = absent | present if "validation" in annotations.name else ()
        index, left_out = read_box_csv(annotations, listed, vocabulary, evaluated)
        if verified:
            index.negatives = [absent.get(id, []) for id in index.image_ids]
            index.verified = [present.get(id, []) for id in index.image_ids]
        return index, {"left_out": left_out}

    files = [annotations, verified] if verified else [annotations]
    index, facts = cached_index(annotations, ["oid", listed.ids, vocabulary.ids], read, files)
    if facts["left_out"]:
        message = "%s: %d boxes of classes that are not among the %d are left out"
        log.info(message, annotations, facts["left_out"], len(vocabulary))
    hierarchy = read_tree(tree) if tree else None
    return Dataset(name, vocabulary, index, images, metric, hierarchy=hierarchy)


def find_file(annotations: Path, *names: str) -> Path | None:
    """Returns the first of `names` that exists beside `annotations` or one folder up, or None."""
    for name in names:
        for folder in (annotations.parent, annotations.parent.parent):
            if (folder / name).is_file():
                return folder / name
    return None


def read_tree(path: Path) -> dict:
    """Reads the class tree, nodes of LabelName and Subcategory.

    Raises InputError for a node of another form; else the evaluation would find it, too late.
    """
    tree = read_json(path)
    nodes = [(tree, 0)]
    while nodes:
        node, depth = nodes.pop()
        children = node.get("Subcategory", []) if isinstance(node, dict) else None
        is_named = children is not None and isinstance(node.get("LabelName", ""), str)
        if not is_named or not isinstance(children, list) or depth > DEEPEST:
            raise InputError(
                f"{path}: {reprlib.repr(node):.60} is no node with a LabelName and a list "
                "Subcategory; download it again"
            )
        nodes += [(child, depth + 1) for child in children]
    return tree


def read_class_csv(name: str, path: Path) -> Vocabulary:
    """Returns the classes in a csv file of ID,NAME. Raises InputError for any other line."""
    rows = [row for row in read_rows(path) if row and row[0] != "LabelName"]  # V7 has a header
    if any(len(row) != 2 for row in rows):
        raise InputError(f"{path}: a line is not ID,NAME; was the file cut off? download it again")
    names, ids = [row[1] for row in rows], [row[0] for row in rows]
    return Vocabulary(name, tuple(names), tuple(ids), source=str(path))


def read_box_csv(
    path: Path, listed: Vocabulary, vocabulary: Vocabulary, without_box: Iterable[str]
) -> tuple[Index, int]:
    """Returns the index, with boxes xyxy in 0..1, and the number of boxes that are left out.

    Boxes of classes that are in `listed` but not in `vocabulary` are left out.
    without_box: ids of images that the index lists even if they have no box
    Raises InputError for a class that is not in `listed`, a bad box or a bad image id.
    """
    row_of: dict[str, int] = {}
    parts = Parts(image=np.int32, box=(np.float32, 4), label=np.int32, group=bool)
    left_out = 0
    rows = read_table(path, ["ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf"])
    while chunk := list(islice(rows, CHUNK)):
        image_of, boxes, labels, group = [], [], [], []
        for line, (image, class_id, *corners, group_of) in chunk:
            if class_id not in listed.index_of_id:
                raise InputError(
                    f"{path}: line {line} has unknown LabelName '{class_id}'; add it to {CLASSES}"
                )
            if class_id not in vocabulary.index_of_id:
                left_out += 1
                continue
            refuse_path(path, line, image)
            try:
                boxes.append([float(corner) for corner in corners])
            except ValueError:
                raise InputError(
                    f"{path}: line {line} has a box that is no number ({', '.join(corners)})"
                ) from None
            image_of.append(row_of.setdefault(image, len(row_of)))
            labels.append(vocabulary.index_of_id[class_id])
            group.append(read_group(path, line, group_of))
        refuse_pixels(path, boxes)
        parts.add(image=image_of, box=np.reshape(boxes, (-1, 4)), label=labels, group=group)
    for image in without_box:
        row_of.setdefault(image, len(row_of))
    index = Index.build(
        source=str(path),
        file_names=[f"{image}.jpg" for image in row_of],
        image_ids=list(row_of),
        sizes=np.zeros((len(row_of), 2)),  # the csv does not give them
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
    """Returns {image id: labels verified to be absent} and {image id: labels verified present}."""
    absent, present = {}, {}
    rows = read_table(path, ["ImageID", "LabelName", "Confidence"])
    for line, (image, class_id, confidence) in rows:
        if class_id in vocabulary.index_of_id:
            refuse_path(path, line, image)
            if confidence.strip() not in CONFIDENCES:
                raise InputError(
                    f"{path}: line {line} has the Confidence '{confidence:.60}'; write 0 or 1"
                )
            labels_of = present if CONFIDENCES[confidence.strip()] else absent
            labels_of.setdefault(image, []).append(vocabulary.index_of_id[class_id])
    return absent, present


def read_group(path: Path, line: int, text: str) -> bool:
    """Returns whether a box is of a group. Raises InputError for a text that is none of GROUPS."""
    if text not in GROUPS:
        raise InputError(f"{path}: line {line} has the IsGroupOf '{text:.60}'; write 0 or 1")
    return GROUPS[text]


def refuse_pixels(path: Path, boxes: list[list[float]]) -> None:
    """Raises InputError for a corner that is no fraction. NaN and infinity are left to Index."""
    corners = np.array(boxes)
    bad = corners[(abs(corners) > LARGEST) & np.isfinite(corners)]
    if len(bad):
        raise InputError(
            f"{path}: a box has the corner {bad[0]:g}, which looks like pixels ({len(bad)} such "
            "corners); write fractions of the image"
        )


def refuse_path(path: Path, line: int, image: str) -> None:
    """Raises InputError for an image id that is no file's, or leads out of the image folder."""
    if "/" in image or image.startswith("."):
        raise InputError(f"{path}: line {line}: ImageID '{image:.60}' leaves the image folder")
    if not image or "\0" in image or len(image) > LONGEST_NAME:
        raise InputError(
            f"{path}: line {line}: ImageID {image[:60]!r} ({len(image)} letters) can be no file's"
        )
