"""Evaluations during a training: they change nothing of it, and the best weights are kept."""

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.checkpoint import BROKEN
from common.files import atomic_path

log = logging.getLogger("concord")

RECORD = "evaluations.jsonl"  # of a run folder: a line per evaluation
BEST = "best.safetensors"  # the weights with the best main metric
Results = dict[str, dict[str, float]]  # dataset, or a control of it -> metric -> value


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context manager after which the random states and each module's mode are as before."""
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode  # train() would not: frozen layers stay in eval mode


def main_metric(results: Results, trained: Collection[str]) -> tuple[float, str]:
    """Returns the number by which weights are compared, and what it is: "mean of a AP, b PQ".

    It is the mean of the first metric of each evaluated dataset that was trained on, or of each
    evaluated dataset if none was. Left out are controls, whose titles end with a bracket, and a
    metric without ground truth (NaN). The number is NaN if nothing is left.

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
    """Returns results for JSON, which has no NaN: null in its place."""
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

    The best ones have the highest `main_metric`, and the lowest step of equal ones. The log says in
    a line which they are. Lines of this step and of later ones are replaced. Only rank 0 calls it.

    save: called as save(path, metadata); writes the weights, with this added to their metadata
    """
    value, what = main_metric(results, trained)
    file = folder / BEST
    best = read_best(file)
    if best and what and best["of"] != what:
        message = "%s was the best by %s; now the %s counts, and the best is sought anew"
        log.info(message, file, best["of"], what)
        best = {}
    if what and not (best and best["value"] >= value):
        best = {"value": value, "of": what, "step": step}
        save(file, {"step": step, "best": best})
    if what:
        message = "step %d: %s %.3f; the best so far is %.3f of step %d, kept in %s"
        log.info(message, step, what, value, best["value"], best["step"], file)
    line = {"step": step, "main": value if what else None, "of": what}
    keep_lines(folder / RECORD, step - 1)
    with (folder / RECORD).open("a") as record:
        record.write(json.dumps(line | {"results": without_nan(results)}) + "\n")


def read_best(file: Path) -> dict:
    """Returns the value, the name ("of") and the step of the best weights, {} if there are none."""
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
    file = folder / RECORD
    return file.exists() and step in map(step_of, file.read_text(errors="replace").splitlines())


def keep_lines(path: Path, step: int) -> None:
    """Drops the lines after `step`, and damaged ones, from a file of one JSON object a line.

    Does nothing if there is no such file. Says in the log how many lines are damaged.
    """
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    steps = [step_of(line) for line in lines]
    if damaged := steps.count(None):
        log.warning("%s: %d damaged lines are dropped", path, damaged)
    kept = [line for line, own in zip(lines, steps) if own is not None and own <= step]
    if len(kept) < len(lines):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept))


def step_of(line: str) -> int | None:
    """Returns the number of the step in a line of JSON, or None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except BROKEN:
        return None
