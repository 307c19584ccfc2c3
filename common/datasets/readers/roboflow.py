"""Reader of Roboflow's semantic masks: x.jpg, x_mask.png and _classes.csv in one folder."""

import logging
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, listing, read_rows
from common.datasets.index import Index, encoded
from common.datasets.maps import label_table
from common.datasets.splits import in_folders
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")
CLASSES, MASK, VOID = "_classes.csv", "_mask.png", 255
HEADER = ["pixel value", "class"]


def find_masks(path: Path) -> dict[str, Path]:
    """Returns {split: folder} of the folders with masks; without splits {"": path}, or {}."""
    return in_folders(path, holds_masks)


def holds_masks(folder: Path) -> bool:
    """Returns whether the folder has a _classes.csv of masks; that of image labels is another."""
    path = folder / CLASSES
    return path.is_file() and header(next(read_rows(path), [])) == HEADER


def header(row: list[str]) -> list[str]:
    """Returns the names of columns in lower case."""
    return [name.strip().lower() for name in row]


def read_masks(name: str, folder: Path) -> Dataset:
    """Reads label maps x_mask.png beside their images. No map is decoded.

    The classes and their pixel values are the rows of _classes.csv. 255 is void if it has no row.
    Images without a mask are left out and counted in the log.
    Raises InputError for a bad row, no masks, a mask without an image.
    """
    names, values = read_classes(folder / CLASSES)
    table = label_table(values, () if VOID in values else (VOID,))
    map_of = listing(name, folder, (MASK,))
    others = listing(name, folder, IMAGES)  # among them the masks
    image_of = {key: file for key, file in others.items() if not file.endswith(MASK)}
    if not map_of:
        raise InputError(f"dataset '{name}': {folder} holds no masks *{MASK}; export it again")
    lost = [key for key in map_of if key not in image_of]
    if lost:
        raise InputError(
            f"dataset '{name}': {folder / map_of[lost[0]]} has no image beside it ({len(lost)} of "
            f"{len(map_of)} masks); add the images or remove the masks"
        )
    bare = len(image_of) - len(map_of)
    if bare:
        log.info("%s: %d images without a mask in %s are left out", name, bare, folder)
    index = Index.build(
        source=str(folder),
        file_names=[image_of[key] for key in map_of],
        image_ids=list(map_of),
        sizes=np.zeros((len(map_of), 2)),  # only the images tell
        map_names=encoded(map_of.values()),
    )
    vocabulary = Vocabulary(name, names, values, source=str(folder / CLASSES))
    return Dataset(
        name, vocabulary, index, folder, "miou", "semantic", maps=folder, pixel_labels=table
    )


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the class names and their pixel values. Raises InputError for a bad row."""
    _, *rows = read_rows(path)
    names, values = [], []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        value = row[0].strip()
        if len(row) != 2 or not value.isdecimal() or len(value) > 3 or int(value) > VOID:
            raise InputError(
                f"{path}: line {number} is '{','.join(row):.60}'; write a pixel value from 0 to "
                "255 and a class"
            )
        names.append(row[1].strip())
        values.append(int(value))
    return tuple(names), tuple(values)
