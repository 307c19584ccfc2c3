"""The class names of YOLO's label files: data.yaml, or a list such as classes.txt."""

import logging
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.datasets.doubts import numbered_doubt
from common.datasets.files import read_lines
from common.errors import InputError
from common.files import refuse_pipe

log = logging.getLogger("concord")
YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
LISTS = ("classes.txt", "obj.names", "_darknet.labels")  # class names, one a line


@dataclass
class Classes:
    """The class names of a dataset.

    source: the file that names them
    points: number of key point values after a box in a line, 0 if the labels are no poses; None if
            no kpt_shape tells
    """

    names: list[str]
    source: Path
    points: int | None = None


def list_classes(path: Path) -> list[str]:
    """Returns the lines of a list of classes; those that are empty may only be at its end.

    Raises InputError for an empty line before a name: it would shift the numbers of the rest.
    """
    names = [line.strip() for line in read_lines(path)]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        row = names.index("")
        raise InputError(
            f"{path}: line {row + 1} is empty; name the class {row} there, or remove the line if "
            "the labels do not count it"
        )
    if doubt := numbered_doubt(path, names):
        log.warning(doubt)
    return names


def yaml_classes(path: Path) -> Classes | None:
    """Returns the classes of a data.yaml, None if it has no names.

    Raises InputError if the names are not numbered from 0, or are not as many as `nc`.
    """
    table = read_yaml(path)
    names = table.get("names")
    if not names:
        return None
    if isinstance(names, dict):
        rows = [str(row) for row in range(len(names))]
        if sorted(names) != sorted(rows):
            numbers = ", ".join(names)
            raise InputError(f"{path}: names: has the numbers {numbers:.60}; count from 0")
        names = [names[row] for row in rows]
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise InputError(f"{path}: names: is no list of names; write names: [cat, dog]")
    count = text_of(path, table, "nc") or str(len(names))
    if count != str(len(names)):
        raise InputError(f"{path}: nc: is {count}, but names: has {len(names)}; mend one of them")
    return Classes([" ".join(each.split()) for each in names], path, key_points(path, table))


def key_points(path: Path, table: dict) -> int | None:
    """Returns how many numbers of key points follow a box, None if the table does not tell.

    Raises InputError for a bad shape.
    """
    shape = table.get("kpt_shape")
    if not shape:
        return None
    points = -1
    if isinstance(shape, list) and len(shape) == 2:
        with suppress(ValueError, TypeError):
            points = int(shape[0]) * int(shape[1])
    if points < 0:
        raise InputError(f"{path}: kpt_shape: is {shown(shape)}; write [points, 2 or 3]")
    return points


def find_yaml(folder: Path, usual: tuple[str, ...] = ()) -> Path | None:
    """Returns the yaml file in a folder that has names:, of the `usual` names if some are given."""
    found = [file for file in sorted(folder.glob("*.y*ml")) if file.suffix in (".yaml", ".yml")]
    found.sort(key=lambda file: file.name not in YAMLS)
    for file in found:
        refuse_pipe(file, "yaml file")
        if file.name in YAMLS and read_yaml(file).get("names"):
            return file
        if not usual and b"names:" in file.read_bytes() and read_yaml(file).get("names"):
            return file
    return None


def shown(value: object) -> str:
    """Returns the start of a value of yaml, whose aliases may stand for billions of texts."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text[:60]


def text_of(path: Path, table: dict, field: str) -> str:
    """Returns the text of a field, "" without one. Raises InputError for a list or a table."""
    value = table.get(field) or ""
    if not isinstance(value, str):
        raise InputError(f"{path}: {field}: is {shown(value)}; write one value")
    return value


def texts_of(path: Path, table: dict, field: str) -> list[str]:
    """Returns a field, one text or a list of them, as a list. Raises InputError for other types."""
    value = table.get(field) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{path}: {field}: is {shown(value)}; write a folder, or a list of folders"
        )
    return texts


def read_yaml(path: Path) -> dict:
    """Reads a yaml file; all its values are text. Raises InputError if it is no yaml table."""
    try:
        table = yaml.load("\n".join(read_lines(path)), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid yaml ({reason}); mend it") from None
    if not isinstance(table, dict):
        raise InputError(f"{path} holds no fields such as train: and names:; write them")
    return table
