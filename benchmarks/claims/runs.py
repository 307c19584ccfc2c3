"""Trains a variant in a process of its own, and keeps its record."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.claims.study import ROOT, Study
from benchmarks.paired import cpu_name
from common.curves import read_steps
from common.errors import InputError
from common.files import atomic_path

Records = dict[tuple[str, int], dict]  # of a study: {(variant, seed): record}
_children: set[subprocess.Popen] = set()  # the trainings that go on
_stopping = threading.Event()  # no training begins any more
_lock = threading.Lock()  # of both


@dataclass(frozen=True)
class Run:
    """One training: a variant of a study with a seed."""

    study: Study
    variant: str
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.variant, self.seed

    @property
    def parents(self) -> list["Run"]:
        """The runs whose folders it starts from."""
        return [Run(self.study, name, self.seed) for name in self.study.parents(self.variant)]

    def __str__(self) -> str:
        return f"{self.study.name}/{self.variant}-{self.seed}"

    def folder(self, work: Path) -> Path:
        """Returns the run folder. Its name has the digest."""
        return work / f"{self}-{self.study.digest(self.variant)}"

    def has_ended(self, work: Path) -> bool:
        return (self.folder(work) / "results.json").exists()


def command_of(run: Run, work: Path) -> list[str]:
    """Returns the arguments of `python`: the command of the variant, for its seed and folder."""
    named = {parent.variant: shlex.quote(str(parent.folder(work))) for parent in run.parents}
    if run.study.make:
        named |= run.study.make(work)
    parts = shlex.split(run.study.command(run.variant).format(**named))
    return [*parts, "--tiny", "--seed", str(run.seed), "--output", str(run.folder(work))]


def execute(run: Run, work: Path, revision: str, jobs: int) -> dict:
    """Runs the command and returns its record. Raises InputError if it fails.

    A training that was stopped goes on from its last checkpoint. The record then says "resumed":
    its commit, time, speed and memory are those of the last part.

    revision: the commit; jobs: the number of trainings at once, which shapes the speed
    """
    folder = run.folder(work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "variant": run.variant,
        "seed": run.seed,
        "command": run.study.command(run.variant),
        "digest": run.study.digest(run.variant),
        "revision": revision,
        "resumed": any(folder.glob("checkpoint-*")),
        "jobs": jobs,
    }
    used = start(command_of(run, work), folder.with_name(f"{folder.name}.log"))
    if not run.has_ended(work):
        raise InputError(f"{folder} has no results.json: the command evaluates nothing")
    settings = (folder / "args.json").read_text().replace(f"{work}{os.sep}", "")  # of any machine
    return {
        **head,
        "cpu": cpu_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        **used,
        "img_per_s": speed_of(folder / "metrics.jsonl"),
        "args": json.loads(settings),
        "metrics": json.loads((folder / "results.json").read_text()),
    }


def start(command: list[str], log: Path) -> dict[str, Any]:
    """Runs `python COMMAND`, which writes to `log`. Returns the time and memory that it took.

    Raises InputError if the command fails, KeyboardInterrupt after `stop_all`.
    """
    begin = time.monotonic()
    with log.open("a") as file:
        with _lock:
            if _stopping.is_set():
                raise KeyboardInterrupt
            options = {"cwd": ROOT, "stdout": file, "stderr": file}
            process = subprocess.Popen([sys.executable, *command], **options)
            _children.add(process)
        # until it is waited for below, its number belongs to no other process
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with _lock:
            _children.discard(process)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = shlex.join(["python", *command])
        raise InputError(f"{text}: exit code {process.returncode}, see {log}")
    return {
        "seconds": round(time.monotonic() - begin),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def stop_all() -> None:
    """Asks all trainings to stop: each writes a checkpoint. None begins any more."""
    with _lock:
        _stopping.set()
        for process in _children:
            os.kill(process.pid, signal.SIGTERM)


def speed_of(metrics: Path) -> float | None:
    """Returns the median images per second of a training; None if there was none."""
    speeds = [line["img_per_s"] for line in read_steps(metrics) if "img_per_s" in line]
    return round(median(speeds), 2) if speeds else None


# -- Records ---------------------------------------------------------------------------------------


def read_records(study: Study, folder: Path) -> Records:
    """Returns the records of a study, without those of variants or settings that have changed."""
    file = folder / f"{study.name}.json"
    records = json.loads(file.read_text()) if file.exists() else []
    kept = {}
    for record in records:
        variant = record["variant"]
        if variant in study.variants and record["digest"] == study.digest(variant):
            kept[variant, record["seed"]] = record
    if len(kept) < len(records):
        print(
            f"{file}: {len(records) - len(kept)} records are left out, and dropped when a run ends:"
            " their variant, command or --tiny settings have changed"
        )
    return kept


def write_records(study: Study, records: Records, folder: Path) -> None:
    """Writes the records of a study, a line each, in the order of its variants."""
    order = list(study.variants)
    rows = sorted(records.values(), key=lambda row: (order.index(row["variant"]), row["seed"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    with atomic_path(folder / f"{study.name}.json") as path:
        path.write_text(f"[\n{lines}\n]\n")
