"""Draws a matrix as a heat map: of the similarity of labels, and of which are confused."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_path
from common.fonts import families, plain

FEW = 32  # rows and columns up to which each cell has its number
DPI = 130  # so that a map of FEW columns has less than 2000 pixels


@dataclass
class HeatMap:
    """A matrix with names.

    values:        (R, C)
    rows, columns: R and C names
    title, scale:  what is shown, and what its colours mean
    low:           the value of the darkest colour; 1 is the brightest
    row_groups, column_groups: the dataset of each row and column, in runs; (): none are marked
    row_axis, column_axis:     what the rows and the columns are; "": the names say it
    blank:         cells that are 0 have no number
    """

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    scale: str
    low: float = 0.0
    row_groups: Sequence[str] = ()
    column_groups: Sequence[str] = ()
    row_axis: str = ""
    column_axis: str = ""
    blank: bool = False


def draw_heat_map(heat_map: HeatMap, path: Path | str) -> None:
    """Saves a heat map to `path`."""
    figure = figure_of(heat_map)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of each square, and of tight places
        figure.savefig(temporary, dpi=DPI)


def figure_of(heat_map: HeatMap) -> Any:
    """Returns matplotlib's figure. Cells of a small map have their numbers."""
    # Imported here because it takes half a second. Without pyplot, matplotlib draws with Agg.
    from matplotlib.figure import Figure

    height, width = heat_map.values.shape
    small = max(height, width) <= FEW
    cell = 0.3 if small else 0.16
    size = (5.3 + cell * width, 4.5 + cell * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    colors = axes.imshow(heat_map.values, cmap="viridis", vmin=heat_map.low, vmax=1)
    figure.colorbar(colors, ax=axes, label=heat_map.scale, shrink=0.6, pad=0.06)
    names = [[plain(name)[:60] for name in side] for side in (heat_map.rows, heat_map.columns)]
    style = {"fontsize": 7, "fontfamily": families([*names[0], *names[1]])}
    style["parse_math"] = False  # $ is a letter
    axes.set_yticks(range(height), labels=names[0], **style)
    axes.set_xticks(range(width), labels=names[1], rotation=90, **style)
    axes.set_ylabel(heat_map.row_axis)
    axes.set_xlabel(heat_map.column_axis)
    _mark_groups(axes, heat_map)
    if small:
        _write_numbers(axes, heat_map)
    axes.set_title(heat_map.title, pad=24, fontsize=10, parse_math=False)
    return figure


def _write_numbers(axes: Any, heat_map: HeatMap) -> None:
    """Writes two digits into each cell, dark ones where the cell is bright."""
    middle = (heat_map.low + 1) / 2
    for (row, column), value in np.ndenumerate(heat_map.values):
        if np.isnan(value) or (heat_map.blank and value == 0):
            continue
        text = f"{value:.2f}".replace("0.", ".", 1)
        color = "black" if value > middle else "white"
        axes.text(column, row, text, color=color, fontsize=7, ha="center", va="center")


def _mark_groups(axes: Any, heat_map: HeatMap) -> None:
    """Writes the groups at the top and the right, and draws lines between them."""
    end = heat_map.values.shape[1] - 0.5
    style = {"textcoords": "offset points", "weight": "bold", "parse_math": False}
    line = {"color": "white", "linewidth": 1.5}
    for name, first, last in _runs(heat_map.column_groups):
        axes.annotate(name, ((first + last) / 2, -0.5), (0, 6), ha="center", **style)
        if first:
            axes.axvline(first - 0.5, **line)
    for name, first, last in _runs(heat_map.row_groups):
        middle = (first + last) / 2
        axes.annotate(name, (end, middle), (6, 0), va="center", rotation=270, **style)
        if first:
            axes.axhline(first - 0.5, **line)


def _runs(groups: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns the name, the first and the last place of each run of equal groups."""
    found = []
    for name, places in groupby(range(len(groups)), groups.__getitem__):
        places = list(places)
        found.append((name, places[0], places[-1]))
    return found
