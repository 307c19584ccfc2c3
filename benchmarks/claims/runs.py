"""Trains a variant in a process of its own, and keeps its record."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.claims.study import Study
from common.errors import InputError
from common.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """One training: a variant of a study with a seed."""

    study: Study
    variant: str
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.variant, self.seed

    def __str__(self) -> str:
        return f"{self.study.name}/{self.variant}-{self.seed}"


def command_of(run: Run, work: Path) -> list[str]:
    """Returns the arguments of `python`: the command of the variant, for its seed and folder."""
    needed = [Run(run.study, variant, run.seed) for variant in run.study.needs(run.variant)]
    folders = {other.variant: shlex.quote(str(work / str(other))) for other in needed}
    parts = shlex.split(run.study.command(run.variant).format(**folders))
    return [*parts, "--tiny", "--seed", str(run.seed), "--output", str(work / str(run))]


def execute(run: Run, work: Path) -> dict:
    """Runs the command and returns its record. Raises InputError if it fails.

    A training that was stopped goes on from its last checkpoint. Its record then has the time and
    memory of the last part.
    """
    folder = work / str(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    used = start(command_of(run, work), folder.with_name(f"{folder.name}.log"))
    return {
        "variant": run.variant,
        "seed": run.seed,
        "command": run.study.command(run.variant),
        **used,
        "img_per_s": speed_of(folder / "metrics.jsonl"),
        "args": json.loads((folder / "args.json").read_text()),
        "metrics": json.loads((folder / "results.json").read_text()),
    }


def start(command: list[str], log: Path) -> dict[str, Any]:
    """Runs `python COMMAND`, which writes to `log`. Returns the time and memory that it took."""
    begin = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()  # it writes a checkpoint
            process.wait()
            raise
    if code := os.waitstatus_to_exitcode(status):
        raise InputError(f"{shlex.join(['python', *command])}: exit code {code}, see {log}")
    return {
        "seconds": round(time.monotonic() - begin),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def speed_of(metrics: Path) -> float | None:
    """Returns the median images per second of a training; None if there was none."""
    if not metrics.exists():
        return None
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [line["img_per_s"] for line in lines if "img_per_s" in line]
    return round(median(speeds), 2) if speeds else None


def is_whole(run: Run, work: Path) -> bool:
    """Tells if the folder of a run is there, and the run has ended."""
    return (work / str(run) / "results.json").exists()


# -- Records ---------------------------------------------------------------------------------------


def read_records(study: Study, folder: Path) -> dict[tuple[str, int], dict]:
    """Returns {(variant, seed): record} of a study. Those of other commands are left out."""
    file = folder / f"{study.name}.json"
    records = json.loads(file.read_text()) if file.exists() else []
    kept = {}
    for record in records:
        if record["command"] == study.variants.get(record["variant"], ("", ""))[1]:
            kept[record["variant"], record["seed"]] = record
    if len(kept) < len(records):
        print(f"{file}: {len(records) - len(kept)} runs are of commands that the study has no more")
    return kept


def write_records(study: Study, records: dict[tuple[str, int], dict], folder: Path) -> None:
    """Writes the records of a study, a line each, in the order of its variants."""
    order = list(study.variants)
    rows = sorted(records.values(), key=lambda row: (order.index(row["variant"]), row["seed"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    with atomic_path(folder / f"{study.name}.json") as path:
        path.write_text(f"[\n{lines}\n]\n")
