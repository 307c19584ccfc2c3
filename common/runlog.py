"""Writes the run folder with args.json, metrics.jsonl and TensorBoard; shows progress bars."""

import dataclasses
import fcntl
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import checkpoints
from common.distributed import from_main, rank, world_size
from common.errors import InputError
from common.files import atomic_path

log = logging.getLogger("concord")

# -- Run folder ------------------------------------------------------------------------------------


def make_run_folder(args, method: str) -> Path:
    """Creates the run folder with its args.json. Returns the path, the same on all ranks.

    The folder is --resume, else --output, else runs/<method>-<time>-<process id>. An existing
    args.json is kept. Raises InputError if the folder cannot be written, if --resume has no
    checkpoint, and if the folder holds another training.
    """
    default = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(from_main(args.resume or args.output or default))
    training = not (args.eval_only or args.predict)
    if training and args.resume and not checkpoints(folder):
        raise InputError(
            f"--resume {folder} holds no checkpoint yet; start again with another --output"
        )
    if training and not args.resume and (folder / "metrics.jsonl").exists():
        raise InputError(
            f"run folder {folder} already holds a training; --resume it or choose another --output"
        )
    if rank() > 0:
        return folder
    record = dataclasses.asdict(args) | {"method": method, "environment": environment()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "args.json").exists():
            with atomic_path(folder / "args.json") as path:
                path.write_text(json.dumps(record, indent=1))
    except OSError as error:
        raise InputError(
            f"run folder {folder} cannot be written ({error.strerror}); choose another --output"
        ) from None
    return folder


def environment() -> dict[str, str | int]:
    """Returns the versions, device, git revision and number of ranks, to repeat the run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here
        revision = ""
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "revision": revision or "unknown",
        "ranks": world_size(),
    }


# -- Log of a training -----------------------------------------------------------------------------


class RunLog:
    """Writes the losses of a training to metrics.jsonl, TensorBoard and a progress bar.

    Only rank 0 writes. Lines of metrics.jsonl after step `start` are dropped, since a resumed run
    writes them again. The folder is locked until `close`. Raises InputError if another run is
    training in it.

    steps: number of steps of the whole training
    start: number of steps that are done already
    every: number of steps between two lines
    """

    def __init__(self, folder: Path, steps: int, start: int, every: int = 20):
        self.every = every
        self.active = rank() == 0
        if not self.active:
            return
        self.lock = (folder / "args.json").open("a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is training in {folder}; choose another --output"
            ) from None
        path = folder / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        written = [step_of(line) for line in lines]
        if damaged := written.count(None):
            log.warning("%s: %d damaged lines are dropped", path, damaged)
        kept = [line for line, step in zip(lines, written) if step is not None and step <= start]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept))
        self.file = path.open("a")
        self.board = tensorboard_writer(folder)
        self.bar = progress_bar("train", steps, start, "step")
        self.images = 0  # since the last line
        self.since = time.perf_counter()

    def step(
        self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str = ""
    ) -> None:
        """Counts one step. Every `every` steps and at the last, writes this step's losses.

        losses:  scalars, with their sum "loss"
        lr:      learning rate
        images:  number of images in this step, over all ranks
        dataset: name of the step's dataset, which has its own curves in TensorBoard; "": several
        """
        if not self.active:
            return
        self.bar.update()
        self.images += images
        if step % self.every and step != self.bar.total:
            return
        now = time.perf_counter()
        rate = self.images / (now - self.since)
        self.images = 0
        self.since = now
        values = {name: round(float(value), 6) for name, value in losses.items()}
        shown = {"loss": f"{values['loss']:.3f}", "lr": f"{lr:.1e}", "img/s": f"{rate:.1f}"}
        self.bar.set_postfix(shown, refresh=False)
        values |= {"lr": lr, "img_per_s": round(rate, 2)}
        place = {"step": step, "dataset": dataset} if dataset else {"step": step}
        self.file.write(json.dumps(place | values) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"{dataset}/{name}" if dataset else name, value, step)

    def close(self) -> None:
        """Closes the files and unlocks the folder."""
        if self.active:
            self.bar.close()
            self.file.close()
            self.lock.close()
            if self.board:
                self.board.close()


def step_of(line: str) -> int | None:
    """Returns the number of the step in a line of metrics.jsonl, or None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def progress_bar(title: str, total: int, initial: int = 0, unit: str = "img") -> tqdm:
    """Returns a bar of `total` units, of which `initial` are done. Only rank 0 shows it.

    It has the rate and the time left. In a log file it prints a line at most every 10 seconds.
    """
    pace = {"mininterval": 0.1 if sys.stderr.isatty() else 10, "disable": rank() > 0}
    return tqdm(desc=title, total=total, initial=initial, unit=unit, **pace)


def tensorboard_writer(folder: Path):
    """Returns a TensorBoard writer, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info(
            "TensorBoard is not installed (pip install tensorboard); see metrics.jsonl instead"
        )
        return None
    return SummaryWriter(folder)


def check_finite(losses: dict[str, Tensor], step: int) -> None:
    """Raises InputError if the sum "loss" is not finite. The error says which losses are not."""
    if not math.isfinite(losses["loss"]):
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        named = ", ".join(name for name in bad if name != "loss") or "loss"
        raise InputError(f"step {step}: {named} is not finite; lower --lr or turn --amp off")
