"""Seconds that a command takes to answer, against the import of torch and torchvision alone."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import scaledet
from benchmarks.paired import HERE, Options, Row, fill
from common.datasets.tiny.generate import generate

IMPORTS = "import torch, torchvision"
PEER = "imports of torch"
# ends the process when the first batch has been read and the model is there
FIRST_BATCH = """
import os, runpy
import common.visualize
common.visualize.training_grid = lambda *given: os._exit(0)
runpy.run_path("scaledet.py", run_name="__main__")
"""


def tiny_flags(root: Path, output: Path) -> list[str]:
    """Returns flags of a training with the settings of --tiny on a generated dataset."""
    flags = ["--datasets", "coco", "--device", "cpu"]
    flags += ["--data-root", str(root), "--output", str(output)]
    for name, value in scaledet.TINY.items():
        values = value if isinstance(value, tuple) else [value]
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


def command(*parts: str, code: int = 0) -> Callable[[], None]:
    """Returns a function that runs Python with `parts`. It raises RuntimeError for another code."""

    def run() -> None:
        done = subprocess.run([sys.executable, *parts], cwd=HERE.parent, capture_output=True)
        if done.returncode != code:
            raise RuntimeError(f"{parts}: {done.stderr.decode()[-2000:]}")

    return run


def rows(options: Options) -> Iterator[Row]:
    """Yields the rows of --help, a list of datasets, a wrong flag, and the first training batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = tiny_flags(generate("coco", folder, limit=16), folder / "run")
        functions = {
            "scaledet.py --help": command("scaledet.py", "--help"),
            "common.datasets list": command("-m", "common.datasets", "list"),
            "scaledet.py with a wrong flag": command("scaledet.py", "--stps", "3", code=2),
            "first batch": command("-c", FIRST_BATCH, *flags),
            PEER: command("-c", IMPORTS),
        }
        found = []
        for what in functions.keys() - {PEER}:
            goal = None if what == "first batch" else 1  # it needs the imports, and more
            found.append(Row("startup", what, what, PEER, goal=goal))
        found.sort(key=lambda row: [*functions].index(row.ours))
        for row in fill(found, functions, options):
            row.cpu = {}  # other processes work
            yield row
