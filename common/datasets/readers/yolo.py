"""Reader of YOLO's label files, as Ultralytics, Roboflow, CVAT, labelImg and Darknet write them."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, listing, read_lines
from common.datasets.index import Index
from common.datasets.objects import Objects, as_text, boxes_or_instances
from common.datasets.readers.yolo_classes import (
    LISTS,
    YAMLS,
    Classes,
    find_yaml,
    list_classes,
    read_yaml,
    text_of,
    texts_of,
    yaml_classes,
)
from common.datasets.readers.yolo_poses import pose_shape, triples
from common.datasets.splits import SPLITS, pick, split_folders
from common.datasets.store import cached_index
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")
NO_LABELS = (*LISTS, "train.txt", "val.txt", "valid.txt", "test.txt")
SLACK = 0.01  # annotators round
# what other lines have the numbers of an outline, by its corners, if all have so many
LIKE = {3: "a box has that is followed by a confidence and a track", 4: "turned boxes have (OBB)"}
BOX = "class x_center y_center width height"


@dataclass
class Images:
    """The images of one split.

    root:      the folder that file names are relative to
    places:    folders of images, or text files that list images
    labels:    the folder of the label files; None if it follows from the folder of the images
    yaml_file: the data.yaml, if there is one
    """

    root: Path
    places: list[Path]
    labels: Path | None = None
    yaml_file: Path | None = None

    @property
    def source(self) -> Path:
        """The folder of the label files of the first place, or the list that it is."""
        first = self.places[0]
        return self.labels or (first if first.is_file() else label_folder(first))


# -- labels


def read_yolo(name: str, images: Images) -> Dataset:
    """Reads YOLO's text files, one for each image: boxes, and masks if all are polygons.

    A line is `class x_center y_center width height` or `class x1 y1 x2 y2 x3 y3 ...`, in fractions
    of the image. The classes are those of data.yaml, classes.txt or obj.names. Key points of poses
    are not read. Images without a label file have no objects. Label files without an image are left
    out. All this is in the log.
    Source: ultralytics/ultralytics:ultralytics/data/utils.py (places of the files, slack)

    Raises InputError that names the file and the line: another number of columns, a class without
    a name, coordinates that are no fractions. It also raises for lines that look like poses, if
    data.yaml has no kpt_shape.
    """
    files, labels = find_pairs(name, images)
    source = images.source
    classes = find_classes(name, images)
    if classes.points:
        log.info("%s: only the boxes of the poses in %s are read", name, source)
    options = ["yolo", len(classes.names), classes.points, *as_text(files)]

    def read(blob: BinaryIO) -> tuple[Index, dict]:
        return read_labels(source, files, labels, classes, blob)

    index, facts = cached_index(source, options, read, [path for path in labels if path])
    tell_of_corners(source, facts["corners"], len(index.labels), classes)
    names = tuple(classes.names)
    vocabulary = Vocabulary(name, names, tuple(range(len(names))), source=str(classes.source))
    return boxes_or_instances(name, vocabulary, index, facts, images.root)


def read_labels(
    source: Path, files: list[str], labels: list[Path | None], classes: Classes, blob: BinaryIO
) -> tuple[Index, dict]:
    """Returns the index and the facts that `cached_index` stores with it."""
    objects = Objects(relative=True)
    for row, path in enumerate(labels):
        for label, values in read_objects(path, classes) if path else ():
            if len(values) > 4:
                objects.add_polygon(row, label, np.array(values).reshape(-1, 2))
                continue
            x, y, width, height = values
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            objects.add_box(row, label, corners)
    sizes = np.zeros((len(files), 2))  # only the images tell
    corners = {len(mask[0]) // 2 if mask else 0 for mask in objects.masks}
    if classes.points is None:
        refuse_poses(source, [mask[0] for mask in objects.masks if mask])
    index, facts = objects.index(str(source), files, sizes, range(len(classes.names)), blob)
    return index, facts | {"corners": corners.pop() if len(corners) == 1 else 0}


def refuse_poses(source: Path, outlines: list[list[float]]) -> None:
    """Raises InputError if lines that were taken as outlines look like poses.

    outlines: the numbers of each line after the class
    """
    if len({len(outline) for outline in outlines}) != 1:  # poses have the same number
        return
    shape = pose_shape(np.array(outlines))
    if shape:
        points, numbers = shape
        raise InputError(
            f"{source}: {len(outlines)} lines look like poses, a box and {points} key points, and "
            f"no kpt_shape tells; write kpt_shape: [{points}, {numbers}] beside names: in "
            "data.yaml to read the boxes, or kpt_shape: [0, 0] if they are outlines"
        )


def tell_of_corners(source: Path, corners: int, count: int, classes: Classes) -> None:
    """Logs a warning if `count` outlines all have the same number of corners, as other lines do.

    corners: that number, 0 if they differ
    """
    if corners in LIKE:
        what = LIKE[corners]
    elif corners and count > 1 and classes.points is None:
        what = f"a box has that is followed by {corners - 2} key points"
    else:
        return
    message = "%s: each of the %d outlines has %d corners, as %s; they are taken as masks"
    log.warning(message, source, count, corners, what)


def read_objects(path: Path, classes: Classes) -> Iterator[tuple[int, list[float]]]:
    """Yields (class, four numbers of a box or those of a polygon) of each line with text.

    Raises InputError that names the line.
    """
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if not words:
            continue
        try:
            label, *values = map(float, words)
        except ValueError:
            reason = f"is '{line[:60]}'; write numbers: {BOX}"
            raise InputError(f"{path}: line {number} {reason}") from None
        if classes.points and len(values) == 4 + classes.points:
            values = values[:4]
        reason = fault(label, values, classes)
        if reason:
            raise InputError(f"{path}: line {number} {reason}")
        yield int(label), values


def fault(label: float, values: list[float], classes: Classes) -> str:
    """Returns what is wrong with a line and the remedy, "" if it is right."""
    if points := classes.points is None and triples(values):
        return (
            f"looks like a pose, a box and {points} key points; write kpt_shape: [{points}, 3] "
            "beside names: in data.yaml to read the boxes"
        )
    is_polygon = len(values) >= 6 and len(values) % 2 == 0 and not classes.points
    if len(values) != 4 and not is_polygon:
        return (
            f"has {len(values) + 1} columns; a box has 5 ({BOX}), a polygon 7, 9, ... (class x1 y1 "
            "x2 y2 x3 y3 ...)"
        )
    count = len(classes.names)
    if not (label.is_integer() and 0 <= label < count):
        return (
            f"has the class {label:g}, but {classes.source} names {count} classes, counted from 0; "
            "name it there or remove the line"
        )
    wrong = [value for value in values if not -SLACK <= value <= 1 + SLACK]
    if wrong:
        hint = ", which looks like pixels" if max(wrong) > 2 else ""
        return (
            f"has the coordinate {wrong[0]:g}{hint}; write fractions of the image's width and "
            "height, from 0 to 1"
        )
    return ""


# -- class names


def find_classes(name: str, images: Images) -> Classes:
    """Returns the classes that data.yaml names, or a list such as classes.txt near the labels.

    Raises InputError if there is none.
    """
    if images.yaml_file:
        classes = yaml_classes(images.yaml_file)
        if classes:
            return classes
    folders = class_folders(images)
    for folder in folders:
        for file in LISTS:
            if (folder / file).is_file():
                return Classes(list_classes(folder / file), folder / file)
    for folder in folders:
        file = find_yaml(folder, YAMLS)
        if file:
            return yaml_classes(file)
    raise InputError(
        f"dataset '{name}': {images.source} holds YOLO's label files, but there is no data.yaml "
        f"with names: and none of {', '.join(LISTS)}; add one that names the classes from 0"
    )


def class_folders(images: Images) -> list[Path]:
    """Returns the folders where a list of classes may be."""
    labels, root = images.source.absolute(), images.root.absolute()
    folders = (labels, *labels.parents[:2], root, root.parent)
    return list(dict.fromkeys(folders))


# -- places


def find_yolo(path: Path) -> dict[str, Images]:
    """Returns {split: images} of a folder or data.yaml; the split of a dataset without is "".

    Empty if there are no label files. Raises InputError for a data.yaml that cannot be read or
    names places that do not exist.
    """
    file = path if path.is_file() else find_yaml(path)
    return listed_splits(file) if file else usual_splits(path)


def listed_splits(path: Path) -> dict[str, Images]:
    """Returns {split: images} that a data.yaml lists, and the usual folders that it does not."""
    table = read_yaml(path)
    root = path.parent / text_of(path, table, "path")
    if not root.is_dir():  # on another machine
        root = path.parent
    found = usual_splits(root)
    listed = {split: texts_of(path, table, split) for split in SPLITS}
    listed["val"] = listed["val"] or texts_of(path, table, "valid")
    missing = []
    for split, texts in listed.items():
        places = [resolve(root, text) for text in texts]
        lost = [text for text, place in zip(texts, places) if not place.exists()]
        missing += lost
        if places and not lost:
            found.pop("", None)
            found[split] = Images(root, places)
    if missing and not found:
        raise InputError(
            f"{path} names {', '.join(missing)}, not to be found, and there are no images/ with "
            "labels/ beside it; write train: and val:, folders of images relative to the file"
        )
    for images in found.values():
        images.yaml_file = path
    return found


def usual_splits(root: Path) -> dict[str, Images]:
    """Returns {split: images} of the usual folders: images/train, train/images, train, images."""
    places = split_folders(root / "images")
    for split, folder in split_folders(root).items():
        inner = folder / "images"
        places.setdefault(split, inner if inner.is_dir() else folder)
    splits = {split: Images(root, [place]) for split, place in places.items()}
    splits = {split: images for split, images in splits.items() if has_labels(images)}
    if splits:
        return splits
    inner = root / "images"
    whole = Images(root, [inner if inner.is_dir() else root])
    return {"": whole} if has_labels(whole) else {}


def pair_of_split(name: str, labels: Path, images: Path, split: str) -> Images:
    """Returns the images of two folders, or of their folders of the split if both have some."""
    labels_of, images_of = split_folders(labels), split_folders(images)
    both = [key for key in labels_of if key in images_of]
    places = {key: Images(images, [images_of[key]], labels_of[key]) for key in both}
    whole = {"": Images(images, [images], labels)}
    _, found = pick(name, labels, places or whole, split)
    return found


def has_labels(images: Images) -> bool:
    """Returns whether there are label files. Beside images, they need a list of classes, too."""
    labels = images.source
    beside = labels == images.places[0]
    if beside:
        folders = class_folders(images)
        listed = any((folder / file).is_file() for folder in folders for file in LISTS)
        if not listed and not any(find_yaml(folder, YAMLS) for folder in folders):
            return False
    for _, _, files in os.walk(labels):
        if any(file.endswith(".txt") and file not in NO_LABELS for file in files):
            return True
        if beside:  # below it there may be millions of images in folders of classes
            return False
    return False


def resolve(base: Path, text: str) -> Path:
    """Returns the path `text` below `base`; it may be written for another machine.

    "../train/images" and "/content/train/images" are train/images if that exists.
    """
    text = text.replace("\\", "/")
    parts = [part for part in PurePosixPath(text).parts if part not in ("..", "/")]
    inner = [base.joinpath(*parts[start:]) for start in range(len(parts))]
    if len(parts) > 1 and not text.endswith(".txt"):
        inner.pop()  # one name alone can be that of another folder
    as_written = base / text
    places = [*inner, as_written] if text.startswith("..") else [as_written, *inner]
    return next((place for place in places if place.exists()), as_written)


def label_folder(images: Path) -> Path:
    """Returns the folder of the labels: the last `images` in the path is replaced by `labels`.

    If that does not exist, the labels are beside the images.
    """
    parts = list(images.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    found = Path(*parts)
    return found if found.is_dir() else images


# -- pairs of image and label file


def find_pairs(name: str, images: Images) -> tuple[list[str], list[Path | None]]:
    """Returns the images below the root, and the label file of each or None.

    Raises InputError if there are no images or none has a label file.
    """
    pairs, lost = {}, []
    for place in images.places:
        if place.is_file():
            pairs |= listed_pairs(images.root, place)
            continue
        found, labels_only = folder_pairs(name, images, place)
        pairs |= found
        lost += labels_only
    place, source = images.places[0], images.source
    if not pairs:
        raise InputError(f"dataset '{name}': {place} holds no images; add them or mend the path")
    bare = list(pairs.values()).count(None)
    if bare == len(pairs):
        raise InputError(
            f"dataset '{name}': none of the {bare} images in {place} has a YOLO label file in "
            f"{source}; name each as its image, with the ending .txt"
        )
    if bare:
        log.info("%s: %d images without a label file in %s have no objects", name, bare, source)
    if lost:
        message = "%s: %d label files in %s without an image are left out (first: %s)"
        log.warning(message, name, len(lost), source, lost[0])
    return list(pairs), list(pairs.values())


def folder_pairs(
    name: str, images: Images, folder: Path
) -> tuple[dict[str, Path | None], list[str]]:
    """Returns {image below the root: label file or None}, and the label files without an image."""
    labels = images.labels or label_folder(folder)
    image_of = listing(name, folder, IMAGES)
    label_of = listing(name, labels, (".txt",))
    below = Path(os.path.relpath(folder, images.root))
    pairs = {}
    for key, image in image_of.items():
        path = labels / label_of[key] if key in label_of else None
        pairs[(below / image).as_posix()] = path
    lost = [file for key, file in label_of.items() if key not in image_of]
    return pairs, [file for file in lost if Path(file).name not in NO_LABELS]


def listed_pairs(root: Path, path: Path) -> dict[str, Path | None]:
    """Returns {image below the root: label file or None} of a text file that lists images."""
    pairs = {}
    for line in read_lines(path):
        if line.strip():
            image = resolve(path.parent, line.strip())
            label = label_folder(image.parent) / f"{image.stem}.txt"
            file = Path(os.path.relpath(image, root)).as_posix()
            pairs[file] = label if label.is_file() else None
    return pairs
