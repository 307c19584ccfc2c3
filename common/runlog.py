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
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from common.batch import Batch
from common.checkpoint import BROKEN, checkpoint_step, checkpoints, rng_states, stored_names
from common.distributed import (
    from_main,
    gather_on_main,
    largest_of_ranks,
    on_main,
    rank,
    world_size,
)
from common.errors import InputError
from common.files import atomic_path, sweep
from common.labels import LabelSpace
from common.rescue import LastStep, Stop, asked, check_asked

log = logging.getLogger("concord")

EVERY = 20  # steps between two lines of metrics.jsonl

# -- Run folder ------------------------------------------------------------------------------------


# settings that say how a training starts, not how it goes on
OF_A_START = {"resume", "output", "eval_only", "predict"}
# settings that a training may go on with another value of; so may the numbers of steps and the
# learning rates of its stages
CHANGEABLE = {"datasets", "eval_datasets", "data_root", "vocabulary", "score_threshold"}
CHANGEABLE |= {"checkpoint_every", "keep", "skip_bad", "workers", "amp", "compile", "device"}
CHANGEABLE |= {"batch_size", "image_size", "ranks"}
CHANGEABLE_ENDS = ("steps", "lr")


def make_run_folder(args, method: str, label_space: LabelSpace) -> Path:
    """Creates the run folder with its args.json. Returns the path, the same on all ranks.

    The folder is --resume, else --output, else runs/<method>-<time>-<process id>. `args.output`
    becomes its path. A training locks it until the command ends, and goes on from what it holds.
    Settings that changed since are written to args.json, whose "history" keeps the old ones.
    Raises InputError on every rank if the folder cannot be used, if another run is training in it,
    if a setting changed that must not, and if `label_space` is another.
    """
    default = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(from_main(args.resume or args.output or default))
    on_main(_prepare, folder, args, method, label_space)
    if not (args.eval_only or args.predict):
        args.output = str(folder)
    return folder


def _prepare(folder: Path, args, method: str, label_space: LabelSpace) -> None:
    record = dataclasses.asdict(args) | {"method": method, "environment": environment()}
    file = folder / "args.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.eval_only or args.predict:
            if not file.exists():
                _write_record(file, record)
            return
        _lock(folder)
        sweep(folder, ("checkpoint-", "weights-", "args-", "metrics-"))
        if checkpoints(folder) or (folder / "metrics.jsonl").exists():
            record = _go_on(folder, record, method, label_space)
        if record:
            _write_record(file, record)
    except OSError as error:
        raise InputError(
            f"run folder {folder} cannot be written ({error.strerror}); choose another --output"
        ) from None


def _write_record(file: Path, record: dict) -> None:
    with atomic_path(file, durable=True) as path:
        path.write_text(json.dumps(record, indent=1))


LOCKS: dict[Path, TextIO] = {}  # of the run folders that this process has locked


def _lock(folder: Path) -> None:
    """Locks the folder until this process ends. Raises InputError if another process has it.

    The lock is not inherited by data loading processes, which may outlive this one by seconds.
    """
    path = (folder / "run.lock").resolve()
    if path in LOCKS:
        return
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is training in {folder}; choose another --output") from None
    LOCKS[path] = file  # closing it, or another file object of it, would unlock it


def unlock() -> None:
    """Unlocks all run folders that this process has locked."""
    for path in list(LOCKS):
        LOCKS.pop(path).close()


def read_args(folder: Path, method: str) -> dict:
    """Reads args.json of a run folder. Raises InputError if broken or of another method."""
    path = folder / "args.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--resume: {path} cannot be read ({error}); name the run folder of a training"
        ) from None
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise InputError(
            f"--resume: {path} is not of a {method} training; name the run folder of one"
        )
    for name, kind in (("environment", dict), ("history", list)):
        if not isinstance(saved.get(name, kind()), kind):
            raise InputError(f"--resume: {path}: {name} is damaged; remove it from the file")
    return saved


def _go_on(folder: Path, record: dict, method: str, label_space: LabelSpace) -> dict | None:
    """Compares the settings `record` with those in the folder, where a training began.

    Returns the new content of args.json, or None if no setting is another. Raises InputError if
    one may not be another.
    """
    saved = read_args(folder, method)
    others = _differences(saved, record)
    fixed = {
        name: values
        for name, values in others.items()
        if name not in CHANGEABLE and not name.endswith(CHANGEABLE_ENDS)
    }
    if fixed:
        listed = ", ".join(
            f"{_flag(name)} {old} is now {new}" for name, (old, new) in fixed.items()
        )
        raise InputError(
            f"the training in {folder} has other settings: {listed}; give the same, or choose"
            " another --output"
        )
    _check_label_space(folder, label_space)
    done = [checkpoint_step(path) for path in checkpoints(folder)]
    if not done:
        log.info("%s has no checkpoint yet: the training starts again from nothing", folder)
    if not others:
        return None
    listed = ", ".join(
        f"{_flag(name)} {new} instead of {old}" for name, (old, new) in others.items()
    )
    log.info("%s goes on with %s; args.json keeps both", folder, listed)
    change = {"after_step": max(done, default=0), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    change["changes"] = others
    return saved | record | {"history": [*saved.get("history", []), change]}


def _differences(saved: dict, record: dict) -> dict[str, list]:
    """Returns {setting: [old, new]} of those that differ. What `saved` lacks has its default."""
    new = json.loads(json.dumps(record))
    names = [name for name in new if name in saved]
    names = [n for n in names if n not in OF_A_START | {"method", "environment"}]
    found = {name: [saved[name], new[name]] for name in names if saved[name] != new[name]}
    ranks = [content.get("environment", {}).get("ranks", 1) for content in (saved, new)]
    return found | ({"ranks": ranks} if ranks[0] != ranks[1] else {})


def _flag(name: str) -> str:
    return name if name == "ranks" else "--" + name.replace("_", "-")


def _check_label_space(folder: Path, label_space: LabelSpace) -> None:
    """Raises InputError if the newest checkpoint was trained on other datasets or class names."""
    own = {v.dataset: list(v.names) for v in label_space.vocabularies.values()}
    for checkpoint in reversed(checkpoints(folder)):
        stored = stored_names(checkpoint)
        if stored is None:  # damaged, as `last_checkpoint` will find
            continue
        if list(stored) != list(own):
            difference = f"was trained on {', '.join(stored)}, not on {', '.join(own)}"
        elif stored != own:
            name = next(name for name in own if own[name] != stored[name])
            difference = f"was trained on other class names of '{name}'"
        else:
            return
        raise InputError(
            f"{checkpoint} {difference}; give the same --datasets, or start another training with"
            f" --weights {folder} and another --output"
        )


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
    """Follows a training: metrics.jsonl, TensorBoard, a progress bar, and checkpoints.

    Only rank 0 writes. Lines of metrics.jsonl after step `start` are dropped, since a resumed run
    writes them again. If the process ends early, `common.rescue` saves the last whole step.

    args:  --checkpoint-every, --keep and --seed
    steps: number of steps of the whole training
    start: number of steps that are done already
    model, label_space, optimizer, metadata: the content of a checkpoint, see `LastStep`
    """

    def __init__(
        self,
        args,
        folder: Path,
        steps: int,
        start: int,
        model: nn.Module,
        label_space: LabelSpace | Callable[[], LabelSpace],
        optimizer: Optimizer,
        metadata: dict,
    ):
        self.args = args
        self.folder = folder
        self.steps = steps
        content = (model, label_space, optimizer, metadata)
        self.last = LastStep(folder, start, *content, keep=args.keep)
        self.active = rank() == 0
        if not self.active:
            return
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

    def check_finite(self, losses: dict[str, Tensor], step: int, batch: Batch) -> None:
        """Raises InputError on every rank if the sum "loss" of one is not finite.

        It names the losses that are not, and writes what `batch` holds to failed-step-<step>.json.
        No rank returns before all have called it, and the weights may change after it. Raises
        `Stop` if a signal has asked a rank to end.
        """
        failed = not math.isfinite(losses["loss"])
        state = [int(failed), asked()]
        any_failed, number = largest_of_ranks(state, losses["loss"].device)
        if number:
            raise Stop(number)
        if any_failed:
            self._write_batch(losses, step, batch)
        if failed:
            bad = [name for name, value in losses.items() if not math.isfinite(value)]
            named = ", ".join(name for name in bad if name != "loss") or "loss"
            raise InputError(f"step {step}: {named} is not finite; lower --lr or turn --amp off")
        if any_failed:
            raise InputError(f"step {step}: the loss of another rank is not finite; it says which")
        self.last.begin_update()

    def _write_batch(self, losses: dict[str, Tensor], step: int, batch: Batch) -> None:
        fields = ("dataset", "image_id", "file_name", "draw")
        samples = [{name: getattr(sample, name) for name in fields} for sample in batch.samples]
        values = {name: float(value) for name, value in losses.items()}
        record = {"step": step, "seed": self.args.seed, "losses": values, "samples": samples}
        end = f"-rank{rank()}" if world_size() > 1 else ""
        path = self.folder / f"failed-step-{step:07d}{end}.json"
        path.write_text(json.dumps(record, indent=1, default=str))
        log.error("the images of step %d are listed in %s", step, path)

    def step(
        self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str = ""
    ) -> None:
        """Counts one step, whose update is done. Writes a line every `EVERY` steps and at the end.

        Saves a checkpoint every --checkpoint-every steps and at the end. Raises `Stop` if a signal
        has asked this process to end.

        losses:  scalars, with their sum "loss"
        lr:      learning rate
        images:  number of images in this step, over all ranks
        dataset: name of the step's dataset, which has its own curves in TensorBoard; "": several
        """
        self.last.note(step)
        if self.active:
            self._write(step, losses, lr, images, dataset)
        self.last.in_update = False
        if world_size() == 1:
            check_asked()
        if step == self.steps or step % self.args.checkpoint_every == 0:
            states = gather_on_main(rng_states())
            if self.active:
                self.last.save(states)
            self.last.saved = step  # on the other ranks, too
        self.last.in_loop = step < self.steps

    def _write(
        self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str
    ) -> None:
        self.bar.update()
        self.images += images
        if step % EVERY and step != self.steps:
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
        """Closes the files."""
        self.last.in_loop = False
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()


def step_of(line: str) -> int | None:
    """Returns the number of the step in a line of metrics.jsonl, or None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except BROKEN:
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
