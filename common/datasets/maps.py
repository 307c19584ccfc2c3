"""Label maps: PNG files with a number for each pixel, decoded when an image is loaded."""

from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError
from common.files import refuse_pipe

VOID, UNKNOWN = -1, -2


def label_table(ids: list[int] | tuple[int, ...], void: tuple[int, ...]) -> np.ndarray:
    """(65536,) int16: the label of each pixel value, the row of `ids`; VOID for `void`, UNKNOWN for all others."""
    if len(ids) >= 1 << 15:
        raise InputError(f"a label map with {len(ids)} classes; 32767 is the most")
    table = np.full(1 << 16, UNKNOWN, np.int16)
    table[[value for value in void if value < len(table)]] = VOID
    table[list(ids)] = np.arange(len(ids))
    return table


def read_label_map(path: Path, table: np.ndarray) -> np.ndarray:
    """(H, W) int16 labels of a PNG with one channel; `table` is that of `label_table`.

    Raises InputError for a file that cannot be decoded, a colour picture, a value that is no class.
    """
    values = _read(
        path, ("1", "L", "P", "I;16", "I"), "has one number for each pixel, and not colours"
    )
    labels = np.append(table, UNKNOWN)[values.astype(np.int64).clip(-1, len(table))]
    if labels.min() == UNKNOWN:
        y, x = np.argwhere(labels == UNKNOWN)[0]
        known = np.flatnonzero(table > UNKNOWN)
        runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
        text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
        raise InputError(f"label map {path} has the value {values[y, x]} at x = {x}, y = {y}, which is no class; "
                         f"the values are {text}")  # fmt: skip
    return labels


def read_segment_map(path: Path, ids: np.ndarray) -> np.ndarray:
    """(H, W) int16: the row of `ids` (N,) that each pixel of a colour PNG names, VOID for 0; id = R + 256 G + 65536 B.

    Raises InputError for a file that cannot be decoded or has no colours, an id that is not listed.
    """
    colours = _read(path, ("RGB",), "has three channels, id = R + 256 G + 65536 B")
    values = colours[..., 0] + colours[..., 1] * np.int32(256) + colours[..., 2] * np.int32(65536)
    listed = np.append(ids, 0)
    order = np.argsort(listed)
    row = order[np.searchsorted(listed[order], values).clip(max=len(ids))]
    if (unlisted := listed[row] != values).any():
        y, x = np.argwhere(unlisted)[0]
        raise InputError(f"segment map {path} has the id {values[y, x]} at x = {x}, y = {y}, which the panoptic json "
                         "does not list for its image; mend one of them")  # fmt: skip
    return np.where(row == len(ids), VOID, row).astype(np.int16)


def _read(path: Path, modes: tuple[str, ...], what: str) -> np.ndarray:
    try:
        refuse_pipe(path, "label map")
        with Image.open(path) as image:
            if image.mode not in modes:
                raise InputError(
                    f"label map {path} is a picture of mode {image.mode}; a map {what}"
                )
            return np.asarray(image)
    except FileNotFoundError:
        raise InputError(f"label map {path} does not exist; check the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"label map {path} cannot be decoded ({error}); replace it or remove its image"
        ) from None
