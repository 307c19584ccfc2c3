"""Draws the curves of a training, from the files of its run folder alone."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_path
from common.fonts import families, plain
from common.validation import EVALUATIONS, step_of

MOST = 12  # entries of a legend
WIDE = 100  # times the lowest value, from which on an axis of losses is logarithmic


@dataclass(eq=False)
class Curve:
    """A line of a panel: values (S,) at steps (S,), NaN for a gap. bold: of a total or a mean"""

    label: str
    steps: np.ndarray
    values: np.ndarray
    bold: bool = False


Panels = dict[str, list[Curve]]  # title -> curves


def draw_training(folder: Path) -> None:
    """Draws metrics.jsonl and evaluations.jsonl of a run folder to its curves.png.

    Draws nothing of fewer than two steps: they make no curve. It takes half a second.
    """
    records = read_steps(folder / "metrics.jsonl")
    panels = training_panels(records, read_steps(folder / EVALUATIONS))
    if len(records) < 2 or not panels:
        return
    figure = draw_panels(panels)
    with atomic_path(folder / "curves.png") as path, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that no font has
        figure.savefig(path)


def read_steps(path: Path) -> list[dict]:
    """Returns the sound lines of a file of JSON lines by step; of equal steps the last.

    It is [] for a missing file.
    """
    records = {}
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        step = step_of(line)
        if step is not None:
            records[step] = json.loads(line)
    return [records[step] for step in sorted(records)]


def training_panels(records: list[dict], evaluations: list[dict]) -> Panels:
    """Returns the panels that have a value to show, each with at most MOST curves.

    records: lines of metrics.jsonl; evaluations: lines of evaluations.jsonl
    """
    steps = np.array([record["step"] for record in records])
    rates = _column([record.get("lr") for record in records])
    panels = {
        "losses": loss_curves(records, steps),
        "loss of each dataset": dataset_curves(records, steps),
        "learning rate": [Curve("lr", steps, rates)],
        "metrics": metric_curves(evaluations),
    }
    shown = {}
    for title, curves in panels.items():
        curves = [curve for curve in curves if np.isfinite(curve.values).any()]
        if curves:
            shown[title] = curves
    return shown


def _column(values: list[float | None]) -> np.ndarray:
    """Returns the values (S,), NaN for None and for infinity."""
    column = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(column), column, np.nan)


def loss_curves(records: list[dict], steps: np.ndarray) -> list[Curve]:
    """Returns the total and each term that is not always 0, the highest first.

    Of datasets that alternate, a point is the mean of the last value of each dataset: otherwise
    each line would jump between them. Where there are too many terms, the lowest are one sum.
    """
    rows = []
    latest: dict[str, dict] = {}  # of each dataset
    for record in records:
        latest[record.get("dataset", "")] = record
        values: dict[str, list] = {}
        for last in latest.values():
            for name, value in last.items():
                if name.startswith("loss"):
                    values.setdefault(name, []).append(value)
        rows.append({name: _column(parts).mean() for name, parts in values.items()})
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    total = columns.pop("loss", _column([None] * len(rows)))
    sizes = {name: np.nansum(np.abs(column)) for name, column in columns.items()}
    order = sorted(filter(sizes.get, sizes), key=sizes.get, reverse=True)
    curves = [Curve("loss", steps, total, bold=True)]
    kept = order if len(order) < MOST else order[: MOST - 2]
    curves += [Curve(name, steps, columns[name]) for name in kept]
    if rest := order[len(kept) :]:
        values = np.nansum([columns[name] for name in rest], axis=0)
        curves.append(Curve(f"{len(rest)} lower terms", steps, values))
    return curves


def dataset_curves(records: list[dict], steps: np.ndarray) -> list[Curve]:
    """Returns the total loss in the steps of each dataset; [] if none alternate.

    Of more than MOST datasets, the last ones share a curve.
    """
    datasets = [record.get("dataset", "") for record in records]
    names = sorted(set(datasets))
    if len(names) < 2:
        return []
    losses = _column([record.get("loss") for record in records])
    groups = {f"loss of {name}": [name] for name in names}
    if len(names) > MOST:
        shown = list(groups.items())[: MOST - 1]
        rest = names[MOST - 1 :]
        groups = dict(shown) | {f"loss of {len(rest)} others": rest}
    curves = []
    for label, members in groups.items():
        own = np.isin(datasets, members)
        curves.append(Curve(label, steps[own], losses[own]))
    return curves


def metric_curves(evaluations: list[dict]) -> list[Curve]:
    """Returns the main metric, by which weights are compared, and the first ones of each dataset.

    The fewer datasets are evaluated, the more metrics of each.
    """
    steps = np.array([line["step"] for line in evaluations])
    main = _column([line.get("main") for line in evaluations])
    names = [line["of"] for line in evaluations if line.get("of")]
    curves = [Curve(names[-1] if names else "", steps, main, bold=True)]
    results = [line["results"] for line in evaluations]
    titles = list(dict.fromkeys(title for result in results for title in result))[: MOST - 1]
    for title in titles:
        rows = [result.get(title, {}) for result in results]
        metrics = list(dict.fromkeys(name for row in rows for name in row))
        for metric in metrics[: (MOST - 1) // len(titles)]:
            label = f"{title} {metric}"
            if label not in names:  # it is the main metric itself
                curves.append(Curve(label, steps, _column([row.get(metric) for row in rows])))
    return curves


def draw_panels(panels: Panels) -> Any:
    """Returns matplotlib's figure, 1200 pixels wide, its panels over the same steps."""
    # Imported here because it takes half a second. Without pyplot, matplotlib draws with Agg.
    from matplotlib.figure import Figure

    count = len(panels)
    figure = Figure(figsize=(12, 0.5 + 3 * count), dpi=100, layout="constrained")
    rows = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves) in zip(rows, panels.items()):
        _draw(axes, title, curves)
    rows[-1].set_xlabel("step")
    return figure


def _draw(axes: Any, title: str, curves: list[Curve]) -> None:
    """Draws a panel. Its legend is at the right, where it covers no line."""
    lines = []
    thin = [curve for curve in curves if not curve.bold]
    for curve in curves:
        style = {"color": "black", "linewidth": 2.5, "zorder": 3}
        if not curve.bold:
            number = thin.index(curve)
            style = {"color": f"C{number % 10}", "linewidth": 1.3}
            style["linestyle"] = "-" if number < 10 else "--"
        style["marker"] = "o" if len(curve.steps) <= 30 else ""  # a single point has no line
        lines += axes.plot(curve.steps, curve.values, markersize=4, **style)
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    if title.startswith("loss") and is_wide(values):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8 * max(values[values > 0].min(), values.max() / 1e5))
    elif values.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.3)
    if len(curves) == 1 and not curves[0].bold:
        return
    labels = [plain(curve.label)[:40] for curve in curves]
    style = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    legend = axes.legend(lines, labels, prop={"size": 9, "family": families(labels)}, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)  # $ is a letter


def is_wide(values: np.ndarray) -> bool:
    """Returns whether values (N,) need a logarithmic axis; those that are 0 do not count."""
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        return False
    return positive.max() / positive.min() >= WIDE
