"""Run folder, metrics log, progress bar."""

import contextlib
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


def make_run_folder(args, method: str) -> Path:
    """`--resume FOLDER`, `--output FOLDER` or runs/<method>-<time>, the same on all ranks; args.json is written to it.

    Raises InputError if the folder cannot be written.
    """
    name = (
        args.resume
        or args.output
        or f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    )
    folder = Path(from_main(name))
    if args.resume and not (args.eval_only or args.predict or checkpoints(folder)):
        raise InputError(
            f"--resume {folder} holds no checkpoint yet; start again with another --output"
        )
    if (folder / "metrics.jsonl").exists() and not (args.resume or args.eval_only or args.predict):
        raise InputError(
            f"run folder {folder} already holds a training; --resume it or choose another --output"
        )
    record = dataclasses.asdict(args) | {"method": method, "environment": environment()}
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (
                folder / "args.json"
            ).exists():  # those of the training stay: --resume repeats them
                with atomic_path(folder / "args.json") as path:
                    path.write_text(json.dumps(record, indent=1))
        except OSError as error:
            raise InputError(
                f"run folder {folder} cannot be written ({error.strerror}); choose another --output"
            ) from None
    return folder


def environment() -> dict[str, str | int]:
    """Versions and revision of this run, so that it can be repeated."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "revision": revision or "unknown",
        "ranks": world_size(),
    }


class RunLog:
    """metrics.jsonl, TensorBoard (if installed) and a progress bar with loss, img/s and time left; rank 0 only."""

    def __init__(self, folder: Path, steps: int, start: int, every: int = 20):
        self.every, self.active = every, rank() == 0
        if not self.active:
            return
        self.lock = (folder / "args.json").open("a")  # held until the training ends
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
        with atomic_path(
            path
        ) as temporary:  # a resumed run writes the steps after its checkpoint again
            temporary.write_text("".join(kept))
        self.file = path.open("a")
        self.board = tensorboard_writer(folder)
        self.bar = progress_bar("train", steps, start, "step")
        self.images, self.since = 0, time.perf_counter()

    def step(
        self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str = ""
    ) -> None:
        """Count one step of so many images; every `every` steps write its losses and the images per second.

        dataset: of a step that is of one alone; losses of different datasets are not comparable and get own curves
        """
        if not self.active:
            return
        self.bar.update()
        self.images += images
        if step % self.every and step != self.bar.total:
            return
        now = time.perf_counter()
        rate, self.images, self.since = self.images / (now - self.since), 0, now
        values = {name: round(float(value), 6) for name, value in losses.items()}
        shown = {"loss": f"{values['loss']:.3f}", "lr": f"{lr:.1e}", "img/s": f"{rate:.1f}"}
        self.bar.set_postfix(shown, refresh=False)
        of = {"dataset": dataset} if dataset else {}
        self.write({"step": step, **of, **values, "lr": lr, "img_per_s": round(rate, 2)})

    def write(self, record: dict) -> None:
        if not self.active:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            folder = f"{record['dataset']}/" if "dataset" in record else ""
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(folder + name, value, record.get("step", 0))

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self.lock.close()
            if self.board:
                self.board.close()


def step_of(line: str) -> int | None:
    """The step of a line of metrics.jsonl; None if it is damaged, as a killed run may leave its last."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def progress_bar(title: str, total: int, initial: int = 0, unit: str = "img") -> tqdm:
    """A bar with rate and time left; alive in a terminal, a line now and then in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        desc=title,
        total=total,
        initial=initial,
        unit=unit,
        mininterval=interval,
        disable=rank() > 0,
    )


def tensorboard_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info(
            "TensorBoard is not installed (pip install tensorboard); metrics.jsonl has the same numbers"
        )
        return None
    return SummaryWriter(folder)


def check_finite(losses: dict[str, Tensor], step: int) -> None:
    """Stop at the first loss that is not finite and name it."""
    if math.isfinite(float(losses["loss"])):
        return
    bad = [
        name for name, value in losses.items() if name != "loss" and not math.isfinite(float(value))
    ]
    raise InputError(
        f"step {step}: {', '.join(bad) or 'loss'} is not finite; lower --lr or turn --amp off"
    )
