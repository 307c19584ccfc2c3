"""What all measurements share: rounds in turns, the machine, and records.

Functions take turns in one process, A, B, A, B, so that others on the machine disturb both alike.
The first round warms up and is not counted. Ratios are those of medians.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path

import torch

from common.files import atomic_path

HERE = Path(__file__).resolve().parent
FLAGS = ("avx512_bf16", "amx_bf16")  # of a CPU that computes in bfloat16
PACKAGES = ("torch", "torchvision", "transformers", "pycocotools", "faster-coco-eval", "hotcoco")
Clocks = dict[str, list[float]]  # "seconds" and "CPU seconds" of each counted round


@dataclass(frozen=True)
class Setting:
    """What a function that is timed works on.

    side:    of the square images, in pixels
    batch:   images
    classes: of the label space
    mode:    eager and compiled compute in float32, bf16 under autocast
    """

    side: int = 320
    batch: int = 2
    classes: int = 446
    mode: str = "eager"
    device: str = "cpu"

    @property
    def amp(self) -> str:
        """The setting of --amp."""
        return "on" if self.mode == "bf16" else "off"

    def autocast(self) -> AbstractContextManager:
        """Returns the context in which a peer computes."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.mode == "bf16")


@dataclass(frozen=True)
class Options:
    """How to measure.

    rounds: counted rounds, at most
    limit:  seconds of the counted rounds of one comparison, after which there are no more than two
    quick:  the smallest sizes, to see that all works
    """

    rounds: int = 3
    limit: float = 25.0
    quick: bool = False
    device: str = "cpu"
    modes: tuple[str, ...] = ("eager", "bf16")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the images, in pixels."""
        if self.quick:
            return (96,)
        return (512, 1024) if self.on_gpu else (320, 640)

    @property
    def on_gpu(self) -> bool:
        """Tells if the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    def modes_of(self, side: int) -> tuple[str, ...]:
        """Returns the modes of a size. Only models for the smallest one are compiled."""
        smallest = side == self.sides[0]
        return tuple(mode for mode in self.modes if smallest or mode != "compiled")

    def setting(self, side: int, classes: int, mode: str = "eager") -> Setting:
        """Returns the setting of a comparison."""
        return Setting(side, 8 if self.on_gpu else 2, classes, mode, self.device)


@dataclass
class Row:
    """One comparison. A ratio is that of the peer's median and ours: above 1, we are better.

    ours, peer: names of what is compared
    mode:       as in `Setting`, "" where nothing is computed in it
    goal:       the least ratio, None if there is no goal
    note:       why there is no value, or what else is to say
    values:     {name: the values of all rounds, in `unit`}
    cpu:        {name: CPU seconds of all rounds}
    """

    section: str
    what: str
    ours: str
    peer: str
    mode: str = ""
    unit: str = "s"
    goal: float | None = None
    note: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, of: str = "values") -> float | None:
        """Returns the ratio of the medians of `values`, or of `cpu`. None if not measured."""
        table = getattr(self, of)
        if self.ours not in table or self.peer not in table:
            return None
        ours, peer = (statistics.median(table[name]) for name in (self.ours, self.peer))
        return peer / ours if ours else None

    @property
    def holds(self) -> bool | None:
        """Tells if the goal is reached. None without a goal or a ratio."""
        ratio = self.ratio()
        return None if ratio is None or self.goal is None else ratio >= self.goal

    def record(self) -> dict:
        """Returns the row for the json file, with its ratios."""
        ratios = {"ratio": self.ratio(), "ratio of CPU seconds": self.ratio("cpu")}
        rounded = {name: value and round(value, 3) for name, value in ratios.items()}
        return asdict(self) | rounded

    @classmethod
    def of(cls, record: dict) -> "Row":
        """Reads what `record` returned."""
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in record.items() if name in known})


def wait(device: str) -> None:
    """Waits until a GPU has done all that is queued."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    functions: dict[str, Callable], rounds: int, limit: float = 25.0, device: str = "cpu"
) -> dict[str, Clocks]:
    """Times functions in turns. Returns the clocks of each: {"seconds": [...], "CPU seconds": ...}.

    Each function starts with the same random numbers in each round. CPU seconds are those of all
    threads of this process. limit: as in `Options`
    """
    taken = {name: {"seconds": [], "CPU seconds": []} for name in functions}
    began = 0.0
    for i in range(rounds + 1):
        if i == 1:
            began = time.perf_counter()
        if i > 2 and time.perf_counter() - began > limit:
            break
        for name, function in functions.items():
            torch.manual_seed(0)
            wait(device)
            start, busy = time.perf_counter(), time.process_time()
            function()
            wait(device)
            if i:
                taken[name]["seconds"].append(time.perf_counter() - start)
                taken[name]["CPU seconds"].append(time.process_time() - busy)
    return taken


def fill(
    rows: list[Row], functions: dict[str, Callable], options: Options, count: int = 1
) -> list[Row]:
    """Times the functions that rows name, and returns the rows with the values.

    count: pieces of work in one call; a value is that of one of them. Units are s and ms.
    A function that cannot be compiled becomes a note.
    """
    try:
        taken = compare(functions, options.rounds, options.limit, options.device)
    except torch._dynamo.exc.TorchDynamoException as error:
        for row in rows:
            row.note = f"cannot be compiled here: {str(error).strip().splitlines()[0]}"
        return rows
    for row in rows:
        factor = {"s": 1, "ms": 1000}[row.unit] / count
        for name in (row.ours, row.peer):
            clocks = taken[name]
            row.values[name] = [round(x * factor, 5) for x in clocks["seconds"]]
            row.cpu[name] = [round(x / count, 6) for x in clocks["CPU seconds"]]
    return rows


def peak_memory(maker: str, setting: Setting) -> float:
    """Returns the peak GB of a process that builds a step and takes it twice.

    maker: MODULE:FUNCTION that returns the step for a Setting. Resident memory, on a GPU its own.
    """
    command = [sys.executable, "-m", "benchmarks.alone", maker, json.dumps(asdict(setting))]
    return float(run(command).splitlines()[-1])


def run(command: list[str], **environment: str) -> str:
    """Runs a command in the repository with our number of threads. Returns what it prints.

    Raises RuntimeError with the end of its errors if it fails.
    """
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": threads, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def has_peer(package: str) -> bool:
    """Tells if a peer is installed. If not, one line says how to install it."""
    if util.find_spec(package.replace("-", "_")):
        return True
    print(f"{package} is not installed, and its rows are left out: pip install {package}")
    return False


def cpu_name() -> str:
    """Returns the model of the CPU."""
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, "")


def device_name(device: str | torch.device) -> str:
    """Returns the name of a GPU, or of the CPU."""
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else cpu_name()


def load() -> float:
    """Returns the load average of the last minute, that of others included."""
    return round(os.getloadavg()[0], 1)


def machine(device: str) -> dict:
    """Describes the machine, the versions and the revision of the repository."""
    flags = _cpuinfo("flags").split()
    versions = {}
    for package in PACKAGES:
        if util.find_spec(package.replace("-", "_")):
            versions[package] = metadata.version(package)
    return {
        "device": device_name(device),
        "CPU": cpu_name(),
        "CPU flags": [flag for flag in FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "versions": versions,
        "revision": revision(),
    }


def revision(*results: str) -> str:
    """Returns the commit, with + if files differ from it; "" outside a git repository.

    results: patterns of files from the root of the repository that may differ, and be new. Without
             them, new files do not count
    """
    commit = _git("describe", "--always", "--exclude=*")
    new = "normal" if results else "no"
    ignored = [f":!{pattern}" for pattern in results]
    changed = _git("status", "--porcelain", f"--untracked-files={new}", "--", ".", *ignored)
    return commit + ("+" if changed else "")


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=HERE.parent, capture_output=True, text=True)
    return done.stdout.strip()


def record_path(benchmark: str, device: str) -> Path:
    """Returns the json file in this folder that keeps what `benchmark` measured on a device."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return HERE / f"{benchmark}-{name}.json"


def write_json(path: Path, record: dict) -> None:
    """Writes a record to a json file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
