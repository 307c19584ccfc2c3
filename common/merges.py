"""Groups of classes of several datasets that mean the same: a table to read, edit and read back.

A group is {dataset: class name}, at most one class per dataset. A class in no group stays alone.
"""

import csv
import difflib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from common.errors import InputError
from common.files import atomic_path

log = logging.getLogger("concord")

Group = dict[str, str]
# our datasets and their columns in xingyizhou/UniDet:datasets/label_spaces
OFFICIAL = {"oid500": 1, "oid": 1, "o365": 3, "coco": 4, "mapillary": 5}


class Named(Protocol):
    """The class names of one dataset, and their ids."""

    dataset: str
    names: tuple[str, ...]
    ids: tuple[int | str, ...]


def group_keys(
    vocabularies: Sequence[Named], groups: list[Group], source: str = "label space"
) -> list[int]:
    """Returns a number for each class, vocabulary after vocabulary. Classes of a group share it.

    source: the file of the groups, for messages
    Raises InputError for a class or dataset that does not exist, with the nearest name, and for a
    class in two groups.
    """
    names_of = {v.dataset: v.names for v in vocabularies}
    row_of = {}
    for vocabulary in vocabularies:
        for name in vocabulary.names:
            row_of[vocabulary.dataset, name] = len(row_of)
    keys = list(range(len(row_of)))
    grouped = set()
    for group in groups:
        for dataset, name in group.items():
            if (dataset, name) not in row_of:
                known = names_of.get(dataset, ())
                near = difflib.get_close_matches(name, known, 1) or list(names_of)
                raise InputError(
                    f"{source}: '{dataset}' has no class '{name}'; nearest: {', '.join(near)}"
                )
            if (dataset, name) in grouped:
                raise InputError(
                    f"{source}: class '{name}' of '{dataset}' is in two groups; keep one"
                )
            grouped.add((dataset, name))
        rows = [row_of[member] for member in group.items()]
        for row in rows:
            keys[row] = rows[0]
    return keys


def write_groups(path: Path, datasets: list[str], groups: list[Group], costs: list[float]) -> None:
    """Writes a csv file: a row for each group, with its class of each dataset and its cost."""
    rows = [[*datasets, "cost"]]
    for group, cost in zip(groups, costs):
        rows.append([*(group.get(dataset, "") for dataset in datasets), f"{cost:.4f}"])
    write_csv(path, rows)


def write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Writes the rows of a table, the first of which is its header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_groups(path: str | Path, vocabularies: Sequence[Named]) -> list[Group]:
    """Reads the groups of two and more classes from a file, and logs how many there are.

    path: a csv file as `write_groups` makes it, or an official .json or .csv of UniDet. Its column
          "cost" is not read. Datasets that are not in `vocabularies` are left out, with a line
    Raises InputError for a file that cannot be read, and as `group_keys` does.
    """
    path = Path(path).expanduser()
    try:
        table = _read_table(path)
        header, *rows = table or [[]]
        if header[1:2] == ["oid_freebase"]:
            groups = _official_groups(rows, vocabularies, path)
        else:
            groups = _named_groups(header, rows, vocabularies, path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(
            f"label space {path} cannot be read ({type(error).__name__}: {error}); give a csv file"
            " with a column for each dataset and a row for each group of classes"
        ) from None
    groups = [group for group in groups if len(group) > 1]
    keys = group_keys(vocabularies, groups, f"label space {path}")
    log.info("%s: %d classes become %d", path, len(keys), len(set(keys)))
    return groups


def _read_table(path: Path) -> list[list[str]]:
    """Returns the rows of a csv file, or of the table that an official .json has as "raw_data"."""
    text = path.read_text("utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)["raw_data"]
    return [row for row in csv.reader(io.StringIO(text)) if row]


def _named_groups(
    header: list[str], rows: list[list[str]], vocabularies: Sequence[Named], path: Path
) -> list[Group]:
    """Returns the groups of a table whose header has the names of the datasets."""
    datasets = [v.dataset for v in vocabularies]
    if missing := [name for name in header if name not in (*datasets, "cost", "")]:
        log.warning("%s: the columns %s are of no dataset here", path, ", ".join(missing))
    groups = []
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        groups.append({d: cells[d] for d in datasets if cells.get(d)})
    return groups


def _official_groups(
    rows: list[list[str]], vocabularies: Sequence[Named], path: Path
) -> list[Group]:
    """Returns the groups of an official table. It has lower-case names, and ids of OpenImages.

    The number of a class is not used: Objects365 was numbered in another order in 2019. Classes
    that have no name here stay alone, with a line.
    Source: xingyizhou/UniDet:tools/create_unified_label_json_4datasets.py
    """
    known = {}
    for vocabulary in vocabularies:
        lower = {name.lower(): name for name in vocabulary.names}
        ids = {str(id): name for id, name in zip(vocabulary.ids, vocabulary.names)}
        known[vocabulary.dataset] = ids | lower
    groups = []
    unknown = []
    for row in rows:
        group = {}
        for dataset in known.keys() & OFFICIAL.keys():
            cells = row[OFFICIAL[dataset] :]
            cell = cells[0].strip() if cells else ""
            name = known[dataset].get(cell) or known[dataset].get(cell.lower())
            if name:
                group[dataset] = name
            elif cell:
                unknown.append(f"'{cell}' of {dataset}")
        groups.append(group)
    if unknown:
        message = "%s: %d classes are not known by this name here, and stay alone: %s"
        log.warning(message, path, len(unknown), ", ".join(sorted(unknown)[:5]))
    return groups
