"""What makes annotations look like those of another convention than the one they are read by."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from common.datasets.index import Index

MANY = 0.2  # share of boxes beyond their image from which on they are doubted
ALMOST_ALL = 0.95  # share of boxes that must fit the other convention
LITTLE = 0.01  # by which a fraction may leave 0..1
SLACK = 1  # pixels by which a box may end outside: annotators round


def box_doubts(index: "Index") -> list[str]:
    """Returns lines about boxes of an `Index` that look like fractions, or like two corners.

    Each line has a count and an example. Boxes that are fractions by their format, and those of
    segments, are not doubted.
    """
    if index.relative or index.map_names is not None or not len(index.boxes):
        return []
    found = (_like_fractions(index), _like_corners(index))
    return [line for line in found if line]


def _like_fractions(index: "Index") -> str:
    """Tells if no number of a bbox is above 1, and some are no whole numbers."""
    boxes = index.boxes
    starts, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    largest = max(starts.max(), sides.max())
    uneven = (boxes != boxes.round()).any(axis=1)
    if boxes.min() < -LITTLE or largest > 1 + LITTLE or not uneven.any():
        return ""
    row = int(uneven.argmax())
    return (
        f"all numbers of the {len(boxes)} boxes of {index.source} are at most 1, "
        f"{_example(index, row)}; they look like fractions of the image; write x, y, width, height "
        "in pixels"
    )


def _like_corners(index: "Index") -> str:
    """Tells if many boxes reach beyond their image, and almost all would fit as x1, y1, x2, y2."""
    starts, ends = index.boxes[:, :2], index.boxes[:, 2:]
    sizes = index.sizes[index.image_of]
    known = (sizes > 0).all(axis=1)
    limits = sizes[:, ::-1] + SLACK  # (A, 2) width, height
    beyond = (ends > limits).any(axis=1)
    beyond &= known
    if not known.any() or beyond.sum() < MANY * known.sum():
        return ""
    corners = ends - starts  # what was read as width and height
    fits = (corners > starts).all(axis=1)
    fits &= (corners <= limits).all(axis=1)
    fits &= known
    if fits.sum() < ALMOST_ALL * known.sum():
        return ""
    row = int(beyond.argmax())
    return (
        f"{beyond.sum()} of {len(beyond)} boxes of {index.source} reach beyond their image, "
        f"{_example(index, row)}, and {fits.sum()} would fit as x1, y1, x2, y2; the bbox of a COCO "
        "json is x, y, width, height in pixels"
    )


def _example(index: "Index", row: int) -> str:
    """Describes a box as it is in a COCO json."""
    x1, y1, x2, y2 = index.boxes[row].tolist()
    box = ", ".join(f"{value:.4g}" for value in (x1, y1, x2 - x1, y2 - y1))
    image = int(np.searchsorted(index.offsets, row, side="right")) - 1
    height, width = index.sizes[image].tolist()
    return f"such as [{box}] in image '{index.file_name(image)}' ({width} x {height} pixels)"


def numbered_doubt(path: Path, names: Sequence[str]) -> str:
    """Returns a line if all names in a list of classes begin with a number, as "0 cat", else ""."""
    if not names or not all(re.match(r"\d+\W+\w", name) for name in names):
        return ""
    return (
        f"{path}: all class names begin with a number, such as '{names[0]}', which becomes part of "
        "their text; write the names alone, in the order of the numbers"
    )
