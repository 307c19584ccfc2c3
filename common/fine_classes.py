"""Classes of several datasets that cut the world differently: a table to read, edit and read back.

A row of the table is a fine class. Its cell of a dataset is the class that the dataset gives to
such objects; the rows of a coarse class have the same cell. An empty cell: the dataset does not
annotate these objects. "-": it does, and has none, so that every region is a negative.
"""

import csv
import difflib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.evaluation import ancestors
from common.labels import LabelSpace, Vocabulary, fold, quoted
from common.merges import write_csv

log = logging.getLogger("concord")
ALL = "all"  # the vocabulary of the fine classes
NAME = "class"  # the heading of the fine classes' names
NONE = "-"


@dataclass
class FineClasses:
    """The table. names: C fine classes; cells: {dataset: C classes of it, "" or "-"}."""

    names: tuple[str, ...]
    cells: dict[str, tuple[str, ...]]

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[int]]:
        """The rows of each (dataset, cell), and those of (ALL, folded name)."""
        rows = defaultdict(list)
        for row, name in enumerate(self.names):
            rows[ALL, fold(name)].append(row)
            for dataset, column in self.cells.items():
                rows[dataset, column[row]].append(row)
        return rows

    def rows_of(self, dataset: str, name: str) -> list[int]:
        """Returns the fine classes that a class stands for; [] if there are none.

        dataset: one of the table, or any other, whose class stands for the fine class of its name
        """
        key = (dataset, name) if dataset in self.cells else (ALL, fold(name))
        return self._rows.get(key, [])

    def coarse(self, dataset: str) -> set[str]:
        """Returns the classes of a dataset that stand for several fine classes."""
        counts = Counter(self.cells[dataset])
        return {cell for cell, rows in counts.items() if rows > 1 and cell not in ("", NONE)}

    def all_annotated(self) -> "FineClasses":
        """Returns a copy with "-" in the empty cells: what a dataset lacks is a negative."""
        cells = {d: tuple(cell or NONE for cell in column) for d, column in self.cells.items()}
        return FineClasses(self.names, cells)

    def log_counts(self) -> None:
        """Logs how many fine classes there are, and how many classes stand for several of them."""
        counts = []
        for dataset, column in self.cells.items():
            named = {cell for cell in column if cell not in ("", NONE)}
            rows = sum(cell in named for cell in column)
            coarse = len(self.coarse(dataset))
            counts.append(f"{dataset} has {len(named)} for {rows}, {coarse} coarse")
        log.info("%d fine classes; %s", len(self.names), "; ".join(counts))


class FineLabelSpace(LabelSpace):
    """The label space of datasets and of their fine classes, which are the vocabulary "all".

    It has no text. Any fine classes are a vocabulary for the same model.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary], table: FineClasses):
        super().__init__([*vocabularies, Vocabulary(ALL, table.names)])
        self.table = table
        self.told: set[str] = set()  # datasets whose unknown classes are in the log

    def unique(self) -> LabelSpace:
        """Returns the label space of the fine classes alone."""
        return self.part(ALL)

    def swap(self, vocabulary: Vocabulary | str) -> LabelSpace:
        """Returns a label space of one dataset of the training, or of fine classes.

        vocabulary: as in `LabelSpace.swap`. Of another dataset, it may also have classes that are
        no fine classes. Raises InputError if it has no other, and for names that are none.
        """
        if vocabulary == "" or getattr(vocabulary, "dataset", vocabulary) in self.vocabularies:
            return super().swap(vocabulary)
        typed = isinstance(vocabulary, str)
        if typed:
            vocabulary = Vocabulary.parse(vocabulary)
        fine = {fold(name) for name in self.table.names}
        unknown = [name for name in vocabulary.names if fold(name) not in fine]
        if len(unknown) == len(vocabulary) or (typed and unknown):
            near = difflib.get_close_matches(unknown[0], self.table.names, 3) or self.datasets
            raise InputError(
                f"this model classifies without text and has no class {quoted(unknown)};"
                f" nearest: {', '.join(near)}"
            )
        if unknown and vocabulary.dataset not in self.told:
            self.told.add(vocabulary.dataset)
            message = "%s: %d of %d classes are no fine classes of this model and are never found"
            log.info(message, vocabulary.dataset, len(unknown), len(vocabulary))
        return LabelSpace([vocabulary])

    def told_apart(self, classes: LabelSpace, trees: Mapping[str, dict]) -> np.ndarray:
        """Returns (K,) bool: the classes of a label space that some dataset has as one with others.

        That is so by the table, or by names and `trees`, as in `derive_table`: so that a table
        without groups is judged on the same classes. Classes that stand for several are none.
        """
        own = [v for v in self.vocabularies.values() if v.dataset != ALL]
        shared = set()
        coarse = set()
        for table in (self.table, derive_table(own, trees)):
            for dataset, column in table.cells.items():
                several = table.coarse(dataset)
                coarse |= {(dataset, name) for name in several}
                members = [name for name, cell in zip(table.names, column) if cell in several]
                shared |= set(map(fold, members))
        apart = []
        for dataset, vocabulary in classes.vocabularies.items():
            for name in vocabulary.names:
                rows = self.table.rows_of(dataset, name)
                fine = {fold(self.table.names[row]) for row in rows}
                apart.append(bool(fine & shared) and (dataset, name) not in coarse)
        return np.array(apart)


def derive_table(vocabularies: Sequence[Vocabulary], trees: Mapping[str, dict]) -> FineClasses:
    """Derives the table from the names and from the class trees of datasets.

    Equal names (`fold`) are one fine class. A class of a dataset that a tree has above a fine class
    stands for it, too, if the dataset has no class of that name; of several, the nearest. A class
    that stands for others, and that only its own dataset has, is no fine class itself.

    trees: {dataset: json tree of OpenImages}; see `Evaluated.hierarchy`
    """
    names: dict[str, str] = {}
    for vocabulary in vocabularies:
        for name in vocabulary.names:
            names.setdefault(fold(name), name)
    own = {v.dataset: {fold(name): name for name in v.names} for v in vocabularies}
    cells = {d: {key: known.get(key, "") for key in names} for d, known in own.items()}
    for vocabulary in vocabularies:
        if vocabulary.dataset in trees:
            above = names_above(vocabulary, trees[vocabulary.dataset])
            for dataset, column in cells.items():
                for key in names:
                    coarser = [b for b in above.get(key, ()) if b in own[dataset]]
                    if coarser and not column[key]:
                        column[key] = own[dataset][coarser[0]]
    kept = [key for key in names if not _is_only_coarse(key, cells)]
    columns = {d: tuple(column[key] for key in kept) for d, column in cells.items()}
    return FineClasses(tuple(names[key] for key in kept), columns)


def _is_only_coarse(key: str, cells: dict[str, dict[str, str]]) -> bool:
    """Tells whether the class that `key` names stands for others, and one dataset alone has it."""
    having = [column for column in cells.values() if column[key]]
    (first, *others) = having
    return not others and list(first.values()).count(first[key]) > 1


def names_above(vocabulary: Vocabulary, tree: dict) -> dict[str, list[str]]:
    """Returns {folded name: the folded names above it, the nearest first} of a class tree.

    The names of ids that the vocabulary lacks are those of OpenImages.
    """
    nodes = Vocabulary.known("oid")
    own = dict(zip(vocabulary.ids, vocabulary.names))
    names = [fold(own.get(id, name)) for id, name in zip(nodes.ids, nodes.names)]
    upward = ancestors(nodes, tree)
    depth = upward.sum(1)
    found = {}
    for row, name in enumerate(names):
        above = [b for b in upward[row].nonzero()[0] if b != row]
        above.sort(key=lambda b: -depth[b])
        found[name] = [names[b] for b in above]
    return found


def write_table(path: Path, table: FineClasses) -> None:
    """Writes a csv file: a row for each fine class, with its cell of each dataset."""
    write_csv(path, [[NAME, *table.cells], *zip(table.names, *table.cells.values())])


def read_table(path: str | Path, vocabularies: Sequence[Vocabulary]) -> FineClasses:
    """Reads the table from a csv file as `write_table` makes it.

    Classes in no row become fine classes by their names, as in `derive_table`. Columns of other
    datasets, and rows that have none left, are not read.
    Raises InputError for a file that cannot be read, for a class that does not exist, with the
    nearest name, and for a fine class without a name or of one that two rows have.
    """
    path = Path(path).expanduser()
    try:
        table = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig")), restval=""))
        heads = list(table[0])
        if NAME not in heads or None in heads:
            raise ValueError(f"its columns are {', '.join(map(str, heads))}")
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise InputError(
            f"table {path} cannot be read ({type(error).__name__}: {error}); give a csv file with"
            f" the columns '{NAME}' and one for each dataset, and a row for each fine class"
        ) from None
    datasets = [v.dataset for v in vocabularies]
    if others := [head for head in heads if head not in (NAME, *datasets)]:
        log.warning("%s: the columns %s are of no dataset here", path, ", ".join(others))
    rows = [{head: (row.get(head) or "").strip() for head in (NAME, *datasets)} for row in table]
    _check_rows(path, rows, vocabularies)
    filled = [row for row in rows if any(row[d] not in ("", NONE) for d in datasets)]
    if len(filled) < len(rows):
        message = "%s: %d of %d rows have a class of no dataset here and are left out"
        log.info(message, path, len(rows) - len(filled), len(rows))
    rows = filled
    _add_missing(path, rows, vocabularies)
    names = tuple(row[NAME] for row in rows)
    return FineClasses(names, {d: tuple(row[d] for row in rows) for d in datasets})


def _check_rows(path: Path, rows: list[dict], vocabularies: Sequence[Vocabulary]) -> None:
    """Raises InputError for a row that cannot be, and for a class that does not exist."""
    seen = set()
    for number, row in enumerate(rows, 2):
        key = fold(row[NAME])
        if not key or key in seen:
            fault = f"the class '{row[NAME]}' is there twice" if key else "the class has no name"
            raise InputError(f"table {path}, row {number}: {fault}; give each row its own name")
        seen.add(key)
        for vocabulary in vocabularies:
            cell = row[vocabulary.dataset]
            if cell not in ("", NONE, *vocabulary.names):
                near = difflib.get_close_matches(cell, vocabulary.names, 3)
                raise InputError(
                    f"table {path}, row {number}: '{vocabulary.dataset}' has no class '{cell}';"
                    f" nearest: {', '.join(near or vocabulary.names[:3])}"
                )


def _add_missing(path: Path, rows: list[dict], vocabularies: Sequence[Vocabulary]) -> None:
    """Adds the classes that are in no row: to the row of this name, or as a row. Logs how many."""
    row_of = {fold(row[NAME]): row for row in rows}
    for vocabulary in vocabularies:
        dataset = vocabulary.dataset
        named = {row[dataset] for row in rows}
        missing = [name for name in vocabulary.names if name not in named]
        if missing:
            message = "%s: %d classes of %s are in no row and keep their names: %s"
            log.info(message, path, len(missing), dataset, quoted(missing))
        for name in missing:
            row = row_of.get(fold(name))
            if row is None:
                row = dict.fromkeys((v.dataset for v in vocabularies), "") | {NAME: name}
                row_of[fold(name)] = row
                rows.append(row)
            if row[dataset]:
                raise InputError(
                    f"table {path}: the row '{row[NAME]}' has '{row[dataset]}' of '{dataset}',"
                    f" whose class '{name}' is in no row; give it one"
                )
            row[dataset] = name
