"""Evaluations during a training. They do not change the training; the best weights are kept."""

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from common.checkpoint import BROKEN, rng_states, set_rng_states
from common.files import atomic_path

log = logging.getLogger("concord")

EVALUATIONS = "evaluations.jsonl"  # in a run folder: a line per evaluation
BEST = "best.safetensors"  # in a run folder: the weights with the best main metric
# {title: {metric: value}}; a title is a dataset's name, or "NAME (...)" for a control on it
Results = dict[str, dict[str, float]]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the random states and the mode of each module at its end."""
    modes = {module: module.training for module in model.modules()}
    states = rng_states()
    try:
        yield
    finally:
        set_rng_states(states)
        for module, mode in modes.items():
            module.training = mode  # train() would not: frozen layers stay in eval mode


def main_metric(results: Results, trained: Collection[str]) -> tuple[float, str]:
    """Returns the number by which weights are compared, and its name, like "mean of a AP, b PQ".

    It is the mean over the evaluated datasets that were trained on, or over all evaluated datasets
    if none was. Of each dataset the first metric counts. Controls, whose titles end with a bracket,
    are left out. So is a metric without ground truth (NaN). If nothing is left, the number is NaN
    and its name "".

    trained: names of the datasets of the training
    """
    titles = [title for title in results if title in trained]
    titles = titles or [title for title in results if not title.endswith(")")]
    firsts = {title: next(iter(results[title].items())) for title in titles}
    firsts = {title: first for title, first in firsts.items() if not math.isnan(first[1])}
    if not firsts:
        return math.nan, ""
    values = [value for _, value in firsts.values()]
    names = ", ".join(f"{title} {metric}" for title, (metric, _) in firsts.items())
    return sum(values) / len(values), f"mean of {names}" if len(firsts) > 1 else names


def without_nan(results: Results) -> dict[str, dict[str, float | None]]:
    """Returns the results with None for NaN, which JSON does not have."""
    return {
        title: {name: None if math.isnan(x) else x for name, x in row.items()}
        for title, row in results.items()
    }


def record_evaluation(
    folder: Path,
    step: int,
    results: Results,
    trained: Collection[str],
    save: Callable[[Path, dict], None],
) -> None:
    """Adds a line to evaluations.jsonl, and keeps the weights of `step` if they are the best.

    The best weights have the highest `main_metric`. Of equal ones, the earlier stay. Weights whose
    metric has another name do not count. The log says which weights are the best. Lines of this
    step and of later ones are replaced. Only rank 0 calls it.

    trained: names of the datasets of the training
    save:    save(path, metadata) writes the weights; `metadata` is added to theirs
    """
    value, name = main_metric(results, trained)
    file = folder / BEST
    best = read_best(file)
    if best and name and best["of"] != name:
        message = "%s was the best by %s; now the %s counts, and the best is sought anew"
        log.info(message, file, best["of"], name)
        best = {}
    if name and not (best and best["value"] >= value):
        best = {"value": value, "of": name, "step": step}
        save(file, {"step": step, "best": best})
    if name:
        message = "step %d: %s %.3f; the best so far is %.3f of step %d, kept in %s"
        log.info(message, step, name, value, best["value"], best["step"], file)
    line = {"step": step, "main": value if name else None, "of": name}
    line["results"] = without_nan(results)
    keep_lines(folder / EVALUATIONS, step - 1)
    with (folder / EVALUATIONS).open("a") as evaluations:
        evaluations.write(json.dumps(line) + "\n")


def read_best(file: Path) -> dict:
    """Returns the metric of the best weights, its name ("of") and their step; {} without a file.

    A file that cannot be read counts as none. A warning says so.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            best = json.loads(opened.metadata()["best"])
        return {"value": float(best["value"]), "of": str(best["of"]), "step": int(best["step"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("%s cannot be read (%s): the best weights are sought anew", file, error)
        return {}


def is_recorded(folder: Path, step: int) -> bool:
    """Returns whether evaluations.jsonl has a line of `step`."""
    file = folder / EVALUATIONS
    return file.exists() and step in map(step_of, file.read_text(errors="replace").splitlines())


def keep_lines(path: Path, step: int) -> None:
    """Drops the lines of steps after `step` and damaged lines from a file of JSON lines.

    Does nothing if the file does not exist. Logs how many lines are damaged.
    """
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    steps = [step_of(line) for line in lines]
    if damaged := steps.count(None):
        log.warning("%s: %d damaged lines are dropped", path, damaged)
    kept = [line for line, at in zip(lines, steps) if at is not None and at <= step]
    if len(kept) < len(lines):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept))


def step_of(line: str) -> int | None:
    """Returns the number of the step in a line of JSON, or None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except BROKEN:
        return None
