"""Compares the results of runs, for example before and after a training.

    python -m common.compare runs/before runs/after [--metrics AP50]

Prints a row for each dataset and metric, with a column per run and the change from the first run to
the last one. Above it stand the settings in which the runs differ.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from common.effects import flag
from common.errors import InputError, tell

# settings of the machine, and those that name a run
NOT_COMPARED = {"environment", "history", "output", "resume", "device", "workers", "replay"}
Results = dict[str, dict[str, float | None]]


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders with a results.json, or such files"""
    metrics: tuple[str, ...] = field(default=())
    """metrics to show; by default the first one of each dataset"""


def read_json(path: Path) -> dict:
    """Reads a json object. Raises InputError if it is missing or broken."""
    if not path.exists():
        raise InputError(f"{path} does not exist; name a run that has ended")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); name a run that has ended") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a json object; name a run folder")
    return content


def read_run(path: Path) -> tuple[Results, dict]:
    """Returns the results of a run, and its settings, {} if it has no args.json."""
    file = path / "results.json" if path.is_dir() else path
    results = read_json(file)
    if not all(isinstance(row, dict) for row in results.values()):
        raise InputError(f"{file} has no metrics of datasets; name a run folder")
    settings = file.parent / "args.json"
    return results, read_json(settings) if settings.exists() else {}


def rows(runs: list[Results], metrics: tuple[str, ...]) -> list[list[str]]:
    """Returns the cells of the table: dataset, metric, a value per run, and the change."""
    found = []
    for title in dict.fromkeys(title for results in runs for title in results):
        known = dict.fromkeys(name for results in runs for name in results.get(title, {}))
        for metric in [m for m in metrics if m in known] if metrics else list(known)[:1]:
            values = [results.get(title, {}).get(metric) for results in runs]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            first, last = values[0], values[-1]
            change = "-" if None in (first, last) else f"{last - first:+.3f}"
            found.append([title, metric, *cells, change])
    return found


def differences(settings: list[dict]) -> list[str]:
    """Returns a line for each setting in which the runs differ."""
    settings = [args for args in settings if args]  # a results.json alone has none
    names = dict.fromkeys(name for args in settings for name in args if name not in NOT_COMPARED)
    lines = []
    for name in names:
        values = [json.dumps(args.get(name)) for args in settings]
        if len(set(values)) > 1:
            lines.append(f"{flag(name)}: {' | '.join(values)}")
    return lines


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if not args.runs:
            raise InputError("name the run folders to compare: runs/before runs/after")
        results, settings = zip(*map(read_run, args.runs))
        table = rows(list(results), args.metrics)
        if not table and not args.metrics:
            raise InputError("no run has results of a dataset")
        for metric in args.metrics:
            if metric not in {row[1] for row in table}:
                raise InputError(f"no run has the metric {metric}")
    except InputError as error:
        tell(str(error))
        sys.exit(2)
    for line in differences(list(settings)):
        print(line)
    heading = ["dataset", "metric", *map(str, args.runs), "change"]
    columns = list(zip(heading, *table))
    widths = [max(map(len, column)) for column in columns]
    for row in [heading, *table]:
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        print("  ".join([*texts, *numbers]))


if __name__ == "__main__":
    main()
