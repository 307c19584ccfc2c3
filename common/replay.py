"""The batch of a step whose loss was not finite: its record, and the same batch again (--replay).

What an image shows depends on the seed and on its draw alone, so the record holds no pixels.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from common.batch import Batch
from common.datasets.dataset import Dataset
from common.distributed import rank, world_size
from common.errors import InputError
from common.files import atomic_path

log = logging.getLogger("concord")

LARGEST = 2**53  # of an index and a draw; random numbers are seeded with a draw
WRITTEN = "it must be as the training wrote it; get that file again"
# fields of a sample and their types; `draw` is its number in the stream of the sampler
FIELDS = {
    "dataset": str,
    "index": int,
    "image_id": (str, int, float),
    "file_name": str,
    "draw": int,
}
FIELDS_OF_RECORD = {"seed": int, "losses": dict, "samples": list}


def described(batch: Batch) -> list[dict]:
    """Returns the FIELDS of each sample, without pixels."""
    return [{name: getattr(sample, name) for name in FIELDS} for sample in batch.samples]


def write_record(
    folder: Path, step: int, seed: int, losses: dict[str, Tensor], samples: list[dict]
) -> None:
    """Writes the samples, as `described`, and the losses of this rank to a file in the run folder.

    Logs the flags that compute the step again.
    """
    values = {name: float(value) for name, value in losses.items()}
    record = {"step": step, "seed": seed, "losses": values, "samples": samples}
    path = _record_file(folder, step)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, default=str))
    except OSError as error:  # the ranks have to go on together
        log.error("step %d: %s cannot be written (%s)", step, path, error)
        return
    message = "step %d: %s lists its images; --resume %s --replay %d computes it again"
    log.error(message, step, path, folder, step)


def _record_file(folder: Path, step: int) -> Path:
    """Returns the path of the record of this rank."""
    end = f"-rank{rank()}" if world_size() > 1 else ""
    return folder / f"failed-step-{step:07d}{end}.json"


def read_record(folder: Path, step: int) -> dict:
    """Returns the seed, the losses and the samples of a failed step of this rank.

    A process without other ranks takes the first rank whose loss was not finite. Raises InputError
    if there is no record, or if it is damaged.
    """
    paths = [_record_file(folder, step)]
    if world_size() == 1 and not paths[0].exists():
        paths = sorted(folder.glob(f"{paths[0].stem}-rank*.json"))
    records = [_read(path) for path in paths if path.exists()]
    if not records:
        found = sorted(path.stem for path in folder.glob("failed-step-*.json"))
        raise InputError(
            f"--replay {step}: {folder} has no record of this step for {world_size()} ranks, but of"
            f" {', '.join(found) or 'none'}; name a step of these, with as many ranks or one"
        )
    failed = [record for record in records if not math.isfinite(record["losses"]["loss"])]
    return (failed or records)[0]


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--replay: {path} cannot be read ({error}); {WRITTEN}") from None
    if fault := _fault(record):
        raise InputError(f"--replay: {path}: {fault}; {WRITTEN}")
    return record | {"path": path}


def _fault(record: object) -> str:
    """Returns what is wrong with a record; "" for nothing."""
    if fault := _wrong_field(record, FIELDS_OF_RECORD):
        return fault
    losses = record["losses"]
    if fault := _wrong_field(losses, dict.fromkeys([*losses, "loss"], float)):
        return f"in losses {fault}"
    if not record["samples"]:
        return "samples is empty"
    for number, sample in enumerate(record["samples"]):
        if fault := _wrong_field(sample, FIELDS):
            return f"in sample {number} {fault}"
        for name in ("index", "draw"):
            if not 0 <= sample[name] < LARGEST:
                return f"in sample {number} the {name} {sample[name]!s:.30} is out of range"
    return ""


def _wrong_field(entry: object, fields: dict) -> str:
    """Returns which of `fields`, {name: types}, an object lacks or has of another type; or ""."""
    if not isinstance(entry, dict):
        return f"{entry!r:.60} is no object"
    for name, types in fields.items():
        value = entry.get(name)
        if not isinstance(value, types) or isinstance(value, bool):
            return f"the field {name} is missing or wrong ({value!r:.60})"
    return ""


def recorded_rows(
    record: dict, datasets: Sequence[Dataset], starts: Sequence[int], seed: int
) -> list[tuple[int, int]]:
    """Returns the (row, draw) of each recorded sample, as a sampler yields them.

    starts: the first row of each dataset; seed: that of the training
    Raises InputError if the datasets or the seed are others than those of the record.
    """
    if seed != record["seed"]:
        raise InputError(f"{record['path']} is of --seed {record['seed']}, not {seed}; give that")
    first = {dataset.name: (dataset, int(start)) for dataset, start in zip(datasets, starts)}
    rows = []
    for sample in record["samples"]:
        name, index = sample["dataset"], sample["index"]
        dataset, start = first.get(name, ([], 0))
        if not index < len(dataset) or dataset.index.file_name(index) != sample["file_name"]:
            raise InputError(
                f"{record['path']}: image {index} of dataset '{name}' is no longer"
                f" '{sample['file_name']}'; give the same datasets as they were"
            )
        rows.append((start + index, sample["draw"]))
        log.info("  %s: %s, draw %d", name, sample["file_name"], sample["draw"])
    return rows


def compare(record: dict, losses: dict[str, Tensor]) -> None:
    """Logs each term as it was recorded and as it is now."""
    before = record["losses"]
    terms = [*before, *(losses.keys() - before.keys())]
    width = max(map(len, terms))
    log.info("%s  %14s  %14s", "term".ljust(width), "recorded", "now")
    for term in terms:
        now = float(losses.get(term, math.nan))
        cells = [f"{before.get(term, math.nan):.8g}", f"{now:.8g}"]
        log.info("%s  %14s  %14s", term.ljust(width), *cells)
    if losses.keys() != before.keys():
        log.warning("the terms are others: the weights are of another part of the training")
