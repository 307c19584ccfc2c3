"""Boxes and outlines of many images, collected one by one: what readers of other tools share."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.index import Index, JsonRows
from common.labels import Vocabulary

log = logging.getLogger("concord")
ELLIPSE_POINTS = 64  # a circle's area is then 0.2% too small


class Objects:
    """The objects of a dataset.

    relative: their coordinates are fractions of the image, not pixels
    skipped:  {kind of shape: number} of the shapes that are neither boxes nor areas
    """

    def __init__(self, relative: bool = False):
        self.relative = relative
        self.images, self.classes, self.boxes, self.areas, self.masks = [], [], [], [], []
        self.skipped = Counter()

    def add_box(self, image: int, name: str | int, box: Sequence[float]) -> None:
        """Adds a box, xyxy, of the class `name` in the image of row `image`."""
        x1, y1, x2, y2 = box
        self.add(image, name, box, (x2 - x1) * (y2 - y1), None)

    def add_polygon(self, image: int, name: str | int, points: np.ndarray) -> None:
        """Adds an object whose outline is a polygon with the corners `points` (P, 2)."""
        box = (*points.min(axis=0), *points.max(axis=0))
        outline = np.round(points, 6 if self.relative else 2).ravel()
        self.add(image, name, box, polygon_area(points), [outline.tolist()])

    def add_part(self, at: int, points: np.ndarray) -> None:
        """Adds another polygon with the corners `points` (P, 2) to the outline of object `at`."""
        box = (*points.min(axis=0), *points.max(axis=0))
        whole = np.array([self.boxes[at], box])
        self.boxes[at] = (*whole[:, :2].min(axis=0), *whole[:, 2:].max(axis=0))
        self.areas[at] += polygon_area(points)
        self.masks[at].append(np.round(points, 6 if self.relative else 2).ravel().tolist())

    def add(
        self,
        image: int,
        name: str | int,
        box: Sequence[float],
        area: float,
        mask: list | dict | None,
    ) -> None:
        """Adds an object; `mask` is a segmentation of COCO's format, if there is one."""
        self.images.append(image)
        self.classes.append(name)
        self.boxes.append(box)
        self.areas.append(area)
        self.masks.append(mask)

    def index(
        self,
        source: str,
        files: Sequence[str],
        sizes: np.ndarray | Sequence,
        classes: Sequence[str | int],
        blob: BinaryIO,
    ) -> tuple[Index, dict]:
        """Returns the index and the facts that `cached_index` stores with it.

        files:   the I images, whose ids are their paths without the ending
        sizes:   (I, 2) height, width, 0 if unknown
        classes: the labels are rows of it
        blob:    gets the masks, if every object has one
        """
        label_of = {name: label for label, name in enumerate(classes)}
        with_mask = sum(mask is not None for mask in self.masks)
        masks = None
        if self.masks and with_mask == len(self.masks):
            masks = JsonRows.of(self.masks)
            blob.write(masks.text)
            masks = JsonRows(masks.text[:0], masks.starts, masks.ends)  # their text is in the blob
        index = Index.build(
            source=source,
            file_names=files,
            image_ids=[file.rpartition(".")[0] for file in as_text(files)],
            sizes=sizes,
            image_of=self.images,
            boxes=self.boxes,
            labels=[label_of[name] for name in self.classes],
            areas=self.areas,
            segmentations=masks,
            relative=self.relative,
        )
        some_masks = with_mask if masks is None else 0
        return index, {"some_masks": some_masks, "skipped": dict(self.skipped)}


def boxes_or_instances(
    name: str, vocabulary: Vocabulary, index: Index, facts: dict, images: Path
) -> Dataset:
    """Returns the dataset of an index that `Objects` made; logs what was not read."""
    if facts["skipped"]:
        total = sum(facts["skipped"].values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(facts["skipped"].items()))
        log.warning("%s: %d shapes are neither boxes nor areas: %s", index.source, total, kinds)
    if facts["some_masks"]:
        message = "%s: only %d of %d objects have an outline, so none is used"
        log.warning(message, index.source, facts["some_masks"], len(index.labels))
    supervision = "boxes" if index.segmentations is None else "instances"
    return Dataset(name, vocabulary, index, images, supervision=supervision)


def as_text(names: Iterable[str]) -> list[str]:
    """Returns file names as text that json can express: other bytes than UTF-8 are replaced."""
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def polygon_area(points: np.ndarray) -> float:
    """Returns the area of the polygon with the corners `points` (P, 2)."""
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def turned(points: np.ndarray, degrees: float, centre: Sequence[float]) -> np.ndarray:
    """Returns `points` (P, 2) turned clockwise, as seen on the screen, about `centre`."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    return (points - centre) @ rotation + centre


def ellipse(
    x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0
) -> np.ndarray:
    """Returns points (P, 2) on an ellipse that is turned clockwise."""
    angles = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    points = np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)
    return turned(points, degrees, (x, y))
