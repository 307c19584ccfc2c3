"""Results as tables: a row per dataset, and the files with a row per class."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_path
from common.fonts import plain

Columns = dict[str, np.ndarray]  # columns of one length
# what tells that the ground truth has nothing of a class, by the column that is 0
NOTHING = {"boxes": "no box", "segments": "no segment", "share": "no pixel", "images": "no image"}


@dataclass
class Evidence:
    """What an evaluation predicted, from which `common.mistakes` draws at the end of a run.

    dataset:     the evaluated one
    predictions: {row: prediction}; of boxes all images, of segments the worst
    scores:      {row: score of the image}, of segments alone, for the rows of `predictions`
    pixels:      (K, K) counts of pixels of each true and predicted class; None without any
    """

    dataset: Any
    predictions: dict[int, dict]
    scores: dict[int, float] = field(default_factory=dict)
    pixels: np.ndarray | None = None


class Scores(dict):
    """{metric: value} of one dataset, with the values of each class in `classes`.

    classes:  columns (C,): "class", the names; then metrics, NaN where the ground truth has
              nothing; then how much of each class it has. {}: not known
    evidence: of what the mistakes are drawn; None: nothing
    """

    def __init__(
        self, values: dict[str, float], classes: Columns, evidence: Evidence | None = None
    ):
        super().__init__(values)
        self.classes = classes
        self.evidence = evidence


def mean_of_known(values: np.ndarray) -> float:
    """Returns the mean of the values, without NaN and -1 (no ground truth); NaN if none is left."""
    known = values[values >= 0]
    return float(known.mean()) if len(known) else math.nan


def flat(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns {"dataset/metric": value} of all metrics that are numbers."""
    found = {}
    for title, row in results.items():
        for metric, value in row.items():
            if not math.isnan(value):
                found[f"{title}/{metric}"] = value
    return found


def write_class_tables(results: dict[str, dict[str, float]], folder: Path) -> None:
    """Writes per_class.json and per_class.txt to `folder`, of the results that are `Scores`.

    The json file has {title: rows}, a row per class in the order of the vocabulary, None for NaN.
    It is a file of its own, since results.json is read as {title: {metric: value}}.
    """
    tables = {title: row.classes for title, row in results.items() if isinstance(row, Scores)}
    if not tables:
        return
    rows = {title: _rows(columns) for title, columns in tables.items()}
    texts = [format_classes(title, columns) for title, columns in tables.items()]
    with atomic_path(folder / "per_class.json") as path:
        path.write_text(json.dumps(rows, indent=1))
    with atomic_path(folder / "per_class.txt") as path:
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8", errors="replace")


def _rows(columns: Columns) -> list[dict]:
    """Returns a dictionary per class. NaN becomes None, since JSON does not have it."""
    lists = [np.asarray(column).tolist() for column in columns.values()]
    rows = []
    for values in zip(*lists):
        known = [None if value != value else value for value in values]
        rows.append(dict(zip(columns, known)))
    return rows


def format_classes(title: str, columns: Columns) -> str:
    """Formats a line per class, the highest first metric first, below a line with the title.

    Names come last, since letters of some languages are wider than others. A class that the ground
    truth does not have says so, and is '-' where its metric is NaN.
    """
    names, *metrics = columns
    order = np.argsort(-columns[metrics[0]], kind="stable")  # NaN last
    amount = next(name for name in NOTHING if name in metrics)
    cells = []
    for name in metrics:
        values = columns[name][order].tolist()
        texts = [name, *map(_cell, values)]
        width = max(map(len, texts))
        cells.append([text.rjust(width) for text in texts])
    labels = [names]
    for row in order.tolist():
        note = "" if columns[amount][row] else f"  ({NOTHING[amount]})"
        labels.append(plain(columns[names][row]) + note)
    absent = int((columns[amount] == 0).sum())
    heading = f"{title}: {len(order)} classes by {metrics[0]}"
    if absent:
        heading += f", {absent} of them with {NOTHING[amount]}"
    return "\n".join([heading, *map("  ".join, zip(*cells, labels))])


def _cell(value: float) -> str:
    """Formats a count, or a value with three digits; '-' for NaN."""
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


def format_table(results: dict[str, dict[str, float]], width: int = 120) -> str:
    """Formats one row per dataset and one column per metric; '-' for a missing value or NaN.

    Metrics are in the order of their first appearance. Datasets that share no metric get separate
    tables. A table wider than `width` characters is split into several.
    """
    tables: list[dict] = []
    for name, values in results.items():
        for table in tables:
            if any(row.keys() & values for row in table.values()):
                table[name] = values
                break
        else:
            tables.append({name: values})
    return "\n\n".join(_format_table(table, width) for table in tables)


def _format_table(results: dict[str, dict[str, float]], width: int) -> str:
    """Formats a table of datasets that share metrics; see `format_table`."""
    metrics = dict.fromkeys(name for values in results.values() for name in values)
    names = ["dataset", *results]
    letters = max(map(len, names))
    first = [name.ljust(letters) for name in names]
    blocks = [[first]]  # each a list of columns
    used = letters
    for metric in metrics:
        values = [row.get(metric, math.nan) for row in results.values()]
        cells = [metric, *("-" if math.isnan(x) else f"{x:.3f}" for x in values)]
        letters = max(map(len, cells))
        used += 2 + letters
        if used > width and len(blocks[-1]) > 1:
            blocks.append([first])
            used = len(first[0]) + 2 + letters
        blocks[-1].append([cell.rjust(letters) for cell in cells])
    return "\n\n".join("\n".join(map("  ".join, zip(*block))) for block in blocks)
