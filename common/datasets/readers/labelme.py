"""Reader of labelme's json files, one for each image."""

import logging
import posixpath
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, listing, read_lines
from common.datasets.index import Index
from common.datasets.objects import Objects, as_text, boxes_or_instances, ellipse
from common.datasets.splits import split_folders
from common.datasets.store import cached_index
from common.datasets.tools import name_tool
from common.errors import InputError
from common.files import refuse_pipe
from common.labels import Vocabulary

log = logging.getLogger("concord")
NO_CLASSES = ("__ignore__", "_background_")  # in labelme's labels.txt
FEWEST = {"polygon": 3, "rectangle": 2, "circle": 2}  # points; other shapes are not read
LARGEST = 1 << 26  # bytes of a json file, with its image inside; larger ones are COCO's
FEW = 20  # folders that are looked into; folders of classes can be thousands


def find_labelme(path: Path) -> dict[str, Path]:
    """Returns {split: folder} of labelme's json files; without splits {"": path}, or {}."""
    if is_labelme(path):
        return {"": path}
    splits = {split: place for split, place in split_folders(path).items() if is_labelme(place)}
    if splits:
        return splits
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir()]
    inner = len(folders) <= FEW and any(is_labelme(folder) for folder in folders)
    return {"": path} if inner else {}


def is_labelme(folder: Path) -> bool:
    """Returns whether the first json file in a folder is one of labelme's."""
    files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
    if not files or not files[0].is_file() or files[0].stat().st_size > LARGEST:
        return False
    try:
        record = orjson.loads(files[0].read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return False
    return isinstance(record, dict) and "shapes" in record


def read_labelme(name: str, annotations: Path, images: Path | None = None) -> Dataset:
    """Reads the json files below a folder: boxes, and masks if no object is a rectangle.

    Polygons, circles and rectangles are read; lines, points and others are counted in the log.
    Polygons and circles of one label and group_id in an image are one object.
    The classes are the labels that occur, sorted, or the lines of labels.txt in the folder or
    above.
    An image is found by imagePath, relative to the json file, or else by its name or the name of
    the json file. Images without a json file are left out and counted in the log.

    Source: wkentaro/labelme:examples/instance_segmentation/labelme2coco.py (groups)

    images: the folder of the images; by default `annotations`
    Raises InputError naming the json file and the remedy: no file of labelme's, a shape without a
    label or points, a label that labels.txt does not list, a missing image.
    """
    root = images or annotations
    json_of = listing(name, annotations, (".json",))
    paths = [annotations / file for file in json_of.values()]
    listed = read_labels(annotations)
    image_of = listing(name, root, IMAGES)

    def read(blob: BinaryIO) -> tuple[Index, dict]:
        return read_jsons(annotations, list(json_of.values()), image_of, listed, blob)

    options = ["labelme", listed, str(root), *as_text(image_of.values())]
    index, facts = cached_index(annotations, options, read, paths)
    bare = len(image_of) - len(index)
    if bare:
        log.info("%s: %d images without a json file in %s are left out", name, bare, annotations)
    if facts["joined"]:
        message = "%s: %d outlines are parts of others of their group_id, one object for a group"
        log.info(message, annotations, facts["joined"])
    if facts["renamed"]:
        message = "%s: %d images are not at their imagePath and were found by name"
        log.info(message, name, facts["renamed"])
    vocabulary = Vocabulary(name, tuple(facts["classes"]), source=str(annotations))
    return boxes_or_instances(name, vocabulary, index, facts, root)


def read_jsons(
    root: Path, jsons: list[str], image_of: dict[str, str], listed: list[str], blob: BinaryIO
) -> tuple[Index, dict]:
    """Returns the index and the facts that `cached_index` stores with it."""
    objects = Objects()
    known = set(image_of.values())
    files, sizes, renamed, joined = [], [], 0, 0
    for row, file in enumerate(jsons):
        path = root / file
        record = read_record(path)
        image, as_written = find_image(path, file, record, image_of, known)
        renamed += not as_written
        files.append(image)
        sizes.append([side_of(path, record, side) for side in ("imageHeight", "imageWidth")])
        groups = {}
        for number, shape in enumerate(record["shapes"], 1):
            where = f"{path}: shape {number}"
            joined += add_shape(objects, row, shape, listed, groups, where)
    classes = listed or sorted(set(objects.classes))
    if not classes:
        raise InputError(
            f"{root}: none of its {len(jsons)} json files, labelme's, has a polygon, rectangle or "
            "circle; use another"
        )
    index, facts = objects.index(str(root), files, sizes, classes, blob)
    return index, facts | {"classes": classes, "renamed": renamed, "joined": joined}


def read_record(path: Path) -> dict:
    """Reads a json file. Raises InputError if it is none of labelme's."""
    refuse_pipe(path, "json file")
    try:
        record = orjson.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path} is not valid json ({error}); save it again") from None
    if not isinstance(record, dict) or not isinstance(record.get("shapes"), list):
        what = "has no list 'shapes', so it is no json file of labelme's; move it elsewhere"
        own = isinstance(record, dict) and "shapes" in record
        raise InputError(f"{path} {what if own else name_tool(path) or what}")
    return record


def side_of(path: Path, record: dict, field: str) -> float:
    """Returns a side of the image in pixels, 0 without one; raises InputError for anything else."""
    side = record.get(field) or 0
    if not isinstance(side, int | float) or not 0 <= side < 1 << 31:
        raise InputError(f"{path}: {field} is {side!r:.60}; write its pixels or leave it out")
    return side


def find_image(
    path: Path, file: str, record: dict, image_of: dict[str, str], known: set[str]
) -> tuple[str, bool]:
    """Returns the image of a json `file`, and whether it is at its imagePath.

    Raises InputError if there is none.
    """
    written = str(record.get("imagePath") or "").replace("\\", "/")
    folder = posixpath.dirname(file)
    base = posixpath.basename(written)
    places = [posixpath.join(folder, written), posixpath.join(folder, base), base]
    for place in map(posixpath.normpath, places):
        if place in known:
            return place, place == posixpath.normpath(places[0])
    key = file.removesuffix(".json")
    if key in image_of:
        return image_of[key], False
    raise InputError(
        f"{path}: its image '{written}' is missing; add it beside the json file, or name the "
        "folder of the images, NAME=JSONS/:IMAGES/"
    )


def add_shape(
    objects: Objects, row: int, shape: dict, listed: list[str], groups: dict, where: str
) -> bool:
    """Adds a shape, or counts it. Returns whether it is a part of another one of its group.

    groups: {(label, group_id): its place in `objects`} of the outlines of the image; is updated
    Raises InputError, which starts with `where`, if the shape is broken.
    """
    try:
        kind = shape.get("shape_type") or "polygon"  # old files do not tell
        label = shape["label"]
        points = np.array(shape["points"], dtype=np.float64).reshape(-1, 2)
        named = isinstance(kind, str) and isinstance(label, str | int | float)
        if not named or not np.isfinite(points).all():
            raise ValueError
        label = " ".join(str(label).split())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{where} needs a label and a list of points [x, y]; mend or remove it"
        ) from None
    if kind not in FEWEST:
        objects.skipped[kind] += 1
        return False
    if len(points) < FEWEST[kind]:
        objects.skipped[f"{kind} of {len(points)} points"] += 1
        return False
    if not label:
        raise InputError(f"{where} has no label; name its class or remove it")
    if listed and label not in listed:
        raise InputError(f"{where} has the label '{label}', which labels.txt does not list; add it")
    if kind == "rectangle":
        objects.add_box(row, label, (*points.min(axis=0), *points.max(axis=0)))
        return False
    if kind == "circle":
        centre, edge = points[:2]
        radius = float(np.hypot(*(edge - centre)))
        points = ellipse(*centre, radius, radius)
    return add_outline(objects, row, label, points, shape.get("group_id"), groups)


def add_outline(
    objects: Objects, row: int, label: str, points: np.ndarray, group: object, groups: dict
) -> bool:
    """Adds an outline, or joins it to the one of its label and group; returns whether it did.

    group: a number or a text, anything else for none; groups: as in `add_shape`
    """
    if isinstance(group, int | str) and (label, group) in groups:
        objects.add_part(groups[label, group], points)
        return True
    if isinstance(group, int | str):
        groups[label, group] = len(objects.masks)
    objects.add_polygon(row, label, points)
    return False


def read_labels(folder: Path) -> list[str]:
    """Returns the classes in labels.txt of the folder or its parent; [] if there is none."""
    for place in (folder, folder.parent):
        path = place / "labels.txt"
        if path.is_file():
            lines = [" ".join(line.split()) for line in read_lines(path)]
            return [line for line in lines if line and line not in NO_CLASSES]
    return []
