"""Label maps: PNG files with a number for each pixel, decoded when an image is loaded."""

from pathlib import Path

import numpy as np

from common.datasets.files import open_image
from common.errors import InputError

VOID = -1  # the label of pixels that are not trained on
UNKNOWN = -2  # of values that no class has


def label_table(ids: list[int] | tuple[int, ...], void: tuple[int, ...]) -> np.ndarray:
    """Returns (65536,) int16, the label of each pixel value.

    The label of ids[c] is c. The label of the values in `void` is VOID, of all others UNKNOWN.
    """
    if len(ids) >= 1 << 15:
        raise InputError(f"a label map with {len(ids)} classes; 32767 is the most")
    table = np.full(1 << 16, UNKNOWN, np.int16)
    void_values = [value for value in void if value < len(table)]
    table[void_values] = VOID
    table[list(ids)] = np.arange(len(ids))
    return table


def read_values(path: Path) -> np.ndarray:
    """Reads the numbers (H, W) of a PNG with one channel. Raises InputError as `read_label_map`."""
    modes = ("1", "L", "P", "I;16", "I")
    needed = "has one number for each pixel, and not colours; write that of the class in each"
    return _read(path, modes, needed)


def read_palette(path: Path) -> dict[int, tuple[int, ...]]:
    """Returns {value: colour} of the palette of a PNG, {} without one. Raises as `read_label_map`.

    Only the header is read.
    """
    with open_image(path, kind="label map") as image:
        if image.mode != "P" or not image.palette:
            return {}
        return {value: colour[:3] for colour, value in image.palette.colors.items()}


def read_label_map(path: Path, table: np.ndarray) -> np.ndarray:
    """Reads the labels (H, W) int16 of a PNG with one channel; `table` is from `label_table`.

    Raises InputError for a file that cannot be decoded, a colour image, a value that is no class.
    """
    values = read_values(path)
    rows = values.astype(np.int64).clip(-1, len(table))
    labels = np.append(table, UNKNOWN)[rows]  # -1 and len(table) are UNKNOWN
    if labels.min() == UNKNOWN:
        y, x = np.argwhere(labels == UNKNOWN)[0]
        known = np.flatnonzero(table > UNKNOWN)
        gaps = np.flatnonzero(np.diff(known) > 1)
        ranges = []
        for run in np.split(known, gaps + 1):
            first, last = run[0], run[-1]
            ranges.append(f"{first}" if first == last else f"{first} to {last}")
        raise InputError(
            f"label map {path} has the value {values[y, x]} at x = {x}, y = {y}, which is no "
            f"class; the values are {', '.join(ranges)}"
        )
    return labels


def read_segment_map(path: Path, ids: np.ndarray, partial: bool = False) -> np.ndarray:
    """Reads the segments (H, W) int16 of a colour PNG, where id = R + 256 G + 65536 B.

    A pixel of segment ids[n] has the number n; a pixel of id 0 has VOID.
    ids: (N,); partial: pixels of other ids have VOID, too
    Raises InputError for a file that cannot be decoded or has no colours, and unless `partial` for
    an id that is not listed.
    """
    colours = _read(path, ("RGB",), "has three channels, id = R + 256 G + 65536 B")
    red, green, blue = np.moveaxis(colours, -1, 0)
    values = red + green * np.int32(256) + blue * np.int32(65536)
    listed = np.append(ids, 0)
    order = np.argsort(listed)
    places = np.searchsorted(listed[order], values)
    row = order[places.clip(max=len(ids))]
    unlisted = listed[row] != values
    if unlisted.any() and not partial:
        y, x = np.argwhere(unlisted)[0]
        raise InputError(
            f"segment map {path} has the id {values[y, x]} at x = {x}, y = {y}, which the panoptic "
            "json does not list for its image; mend one of them"
        )
    is_void = (row == len(ids)) | unlisted
    return np.where(is_void, VOID, row).astype(np.int16)


def _read(path: Path, modes: tuple[str, ...], needed: str) -> np.ndarray:
    """Reads the values of an image of one of Pillow's `modes`. `needed` says what a map has."""
    with open_image(path, kind="label map") as image:
        if image.mode not in modes:
            raise InputError(f"label map {path} is a picture of mode {image.mode}; a map {needed}")
        return np.asarray(image)
