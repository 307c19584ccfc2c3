"""Groups of classes of several datasets that mean the same: a table to read, edit and read back.

A group is {dataset: class name}, at most one class per dataset. A class in no group stays alone.
"""

import csv
import difflib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.errors import InputError
from common.files import atomic_path

log = logging.getLogger("concord")

Group = dict[str, str]
# the names of the datasets in the label spaces of xingyizhou/UniDet:datasets/label_spaces
OFFICIAL = {"coco": "coco", "objects365": "o365", "oid": "oid500", "mapillary": "mapillary"}


class Named(Protocol):
    """The class names of one dataset."""

    dataset: str
    names: tuple[str, ...]


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
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*datasets, "cost"])
    for group, cost in zip(groups, costs):
        rows.writerow([*(group.get(dataset, "") for dataset in datasets), f"{cost:.4f}"])
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_groups(path: str | Path, vocabularies: Sequence[Named]) -> list[Group]:
    """Reads the groups of two and more classes from a file, and logs how many there are.

    path: a csv file as `write_groups` makes it, or an official .json of UniDet. Its column "cost"
          is not read. Datasets that are not in `vocabularies` are left out, with a line
    Raises InputError for a file that cannot be read, and as `group_keys` does.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text("utf-8-sig")
        found = _official_groups(json.loads(text), vocabularies) if path.suffix == ".json" else None
        table = list(csv.DictReader(io.StringIO(text))) if found is None else []
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        raise InputError(
            f"label space {path} cannot be read ({type(error).__name__}: {error}); give a csv file"
            " with a column for each dataset and a row for each group of classes"
        ) from None
    datasets = [v.dataset for v in vocabularies]
    if found is None:
        columns = [name for name in (table[0] if table else ()) if name and name != "cost"]
        found = [{d: row[d] for d in columns if row[d]} for row in table]
    else:
        columns = sorted({dataset for group in found for dataset in group})
    if missing := [name for name in columns if name not in datasets]:
        log.warning("%s: the columns %s are of no dataset here", path, ", ".join(missing))
    groups = [{d: name for d, name in group.items() if d in datasets} for group in found]
    groups = [group for group in groups if len(group) > 1]
    keys = group_keys(vocabularies, groups, f"label space {path}")
    log.info("%s: %d classes become %d", path, len(keys), len(set(keys)))
    return groups


def _official_groups(record: dict, vocabularies: Sequence[Named]) -> list[Group]:
    """Returns the groups of a label space of UniDet: {label_map: {dataset: [unified id]}}.

    The classes of a dataset are in the order of its ids, which is ours too.
    """
    names_of = {v.dataset: v.names for v in vocabularies}
    groups: dict[int, Group] = {}
    for official, unified in record["label_map"].items():
        dataset = OFFICIAL.get(official, official)
        if dataset not in names_of:
            continue
        names = names_of[dataset]
        if len(unified) != len(names):
            raise ValueError(
                f"'{official}' has {len(unified)} classes, but '{dataset}' has {len(names)}"
            )
        for id, name in zip(unified, names):
            groups.setdefault(id, {})[dataset] = name
    return list(groups.values())
