"""The splits of a folder that another tool wrote: train, val and test, by their usual names."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from common.errors import InputError

SPLITS = ("train", "val", "test")
Place = TypeVar("Place")
NAMES = {
    "train": r"train(ing)?\d*|obj_train_data",
    "val": r"val(id|idation)?\d*|dev|obj_val(id|idation)?_data",
    "test": r"test(ing)?\d*|obj_test_data",
}
# what is read instead of a split that is not there
ORDER = {"train": ("train",), "val": ("val", "test", "train"), "test": ("test",)}


def split_of(folder: str) -> str:
    """Returns train, val or test for the usual names of their folders, "" for other names."""
    for split, pattern in NAMES.items():
        if re.fullmatch(pattern, folder.lower()):
            return split
    return ""


def split_folders(folder: Path) -> dict[str, Path]:
    """Returns {split: folder} of the folders in `folder` that are named as a split."""
    found = {}
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            split = split_of(entry.name)
            if split and entry.is_dir():
                found.setdefault(split, entry)
    return found


def in_folders(folder: Path, holds: Callable[[Path], bool]) -> dict[str, Path]:
    """Returns {"": folder} if it `holds` a dataset, else {split: folder} of its splits that do."""
    if holds(folder):
        return {"": folder}
    return {split: place for split, place in split_folders(folder).items() if holds(place)}


def pick(name: str, path: Path, found: Mapping[str, Place], split: str) -> tuple[str, Place]:
    """Returns (split that is read, its place) for the `split` that is asked for.

    A dataset without splits, whose only key is "", is read whole. Val may be replaced by test, or
    by train if there is no other.
    Raises InputError that names what there is instead.
    """
    for key in (*ORDER[split], ""):
        if key in found:
            return key, found[key]
    raise InputError(
        f"dataset '{name}': {path} has no split '{split}', only {', '.join(found)}; add it, or "
        f"name another, {name}:SPLIT={path}"
    )
