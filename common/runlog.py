"""Writes the run folder with args.json, metrics.jsonl, results.json and TensorBoard; shows bars."""

import dataclasses
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from common.averaging import keep_mean, swap
from common.batch import Batch
from common.checkpoint import checkpoint_step, checkpoints, copy_weights, save_weights, stored_names
from common.class_colors import assign_colors
from common.console import progress_bar
from common.curves import draw_training
from common.datasets.dataset import Dataset
from common.distributed import from_main, leaving_together, on_main, rank, ranks_without, world_size
from common.errors import InputError
from common.files import atomic_path, sweep, temporary_path
from common.fsdp import Sharding, leave_out_unused, make_whole, whole
from common.labels import LabelSpace
from common.memory import end_if_measured, tell_memory
from common.mistakes import write_mistakes
from common.preview import draw_first_images, items_of_datasets, tell_mixture
from common.process import check_asked, lock
from common.replay import compare, read_record
from common.rescue import LastStep
from common.settings import go_on
from common.tables import flat, format_table, write_class_tables
from common.track import tensorboard_writer, tracker
from common.validation import (
    Results,
    is_recorded,
    keep_lines,
    record_evaluation,
    undisturbed,
    without_nan,
)
from common.verdict import Verdict

log = logging.getLogger("concord")

# the endings of the files in a run folder
WRITTEN = {".json", ".jsonl", ".lock", ".safetensors", ".md", ".txt", ".png", ".jpg"}
EVERY = 20  # steps between two lines of metrics.jsonl

# -- Run folder ------------------------------------------------------------------------------------


def make_run_folder(args: Any, method: str, label_space: LabelSpace) -> Path:
    """Creates the run folder with its args.json. Returns the path, the same on all ranks.

    Gives each class of `label_space`, that of the training, its colour in pictures.

    The folder is --resume, else --output, else runs/<method>-<time>-<process id>. `args.output`
    becomes its path. A training locks it until the command ends, and goes on from what it holds.
    Settings that changed since are written to args.json, whose "history" keeps the old ones.
    Raises InputError on every rank if the folder cannot be used, if another run is training in it,
    if a setting changed that must not, and if `label_space` is another.
    """
    for vocabulary in label_space.vocabularies.values():
        assign_colors(vocabulary.names)
    default = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(from_main(args.resume or args.output or default))
    mark = on_main(_prepare, folder, args, method, label_space)
    if mark:
        args.output = str(folder)
        _tell_of_machines(folder, mark)
    return folder


def _tell_of_machines(folder: Path, mark: Path) -> None:
    """Logs which ranks do not see the run folder of rank 0, in which `mark` is. Removes the mark.

    Raises InputError on every rank if there are such ranks, with --fsdp.
    """
    blind = ", ".join(map(str, ranks_without(mark)))
    if rank() == 0:
        mark.unlink()
    if blind and Sharding.on:
        raise InputError(
            f"the ranks {blind} do not see {folder} of rank 0, where with --fsdp each rank writes"
            " its part of a checkpoint; put --output on a disk that all machines share"
        )
    if blind:
        message = "the ranks %s do not see %s: before a later start, copy it to their machines"
        log.info(message, blind, folder)


def _prepare(folder: Path, args: Any, method: str, label_space: LabelSpace) -> Path | None:
    """Prepares the run folder. Returns a new file in it, None if nothing is trained."""
    record = dataclasses.asdict(args) | {"method": method, "environment": environment()}
    file = folder / "args.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_others(folder)
        if args.eval_only or args.predict:
            if not file.exists():
                _write_record(file, record)
            return None
        lock(folder)
        sweep(folder)
        if checkpoints(folder) or (folder / "metrics.jsonl").exists():
            record = go_on(folder, record, method, label_space)
        elif args.replay:
            raise InputError(f"--replay {args.replay}: no training began in {folder}")
        if record:
            _write_record(file, record)
        mark = temporary_path(folder / "mark")
        mark.touch()
        return mark
    except OSError as error:
        raise InputError(
            f"run folder {folder} cannot be written ({error.strerror}); choose another --output"
        ) from None


def refuse_others(folder: Path) -> None:
    """Raises InputError if a name in `folder` is that of a file, but something else has it.

    Such a folder or pipe would stop the training at its end, when the file is written.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in WRITTEN and path.exists() and not path.is_file():
            raise InputError(
                f"{path} is a folder, a pipe or a device, and a file may be written there; move it,"
                " or choose another --output"
            )


def _write_record(file: Path, record: dict) -> None:
    with atomic_path(file, durable=True) as path:
        path.write_text(json.dumps(record, indent=1))


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
    """Follows a training: metrics.jsonl, TensorBoard, a progress bar, checkpoints, evaluations.

    Only rank 0 writes. Lines of metrics.jsonl after step `start` are dropped, since a resumed run
    writes them again. If the process ends early, `common.rescue` saves the last whole step. With
    --replay nothing is written, and `check_finite` ends the process.

    args:  --checkpoint-every, --keep, --eval-every, --ema, --replay and --seed
    steps: number of steps of the whole training
    start: number of steps that are done already
    model, label_space, optimizer, metadata: the content of a checkpoint, see `LastStep`
    """

    def __init__(
        self,
        args: Any,
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
        self.start = start
        self.content = (model, label_space, optimizer, metadata)
        if args.replay:
            self._begin_replay()
            return
        if args.ema:
            log.info("--ema %g: a running mean of the weights is saved (no paper has it)", args.ema)
            keep_mean(optimizer, args.ema)
        self.last = LastStep(folder, start, *self.content, keep=args.keep)
        self.active = rank() == 0
        if not self.active:
            return
        path = folder / "metrics.jsonl"
        keep_lines(path, start)
        keep_lines(folder / "evaluations.jsonl", start)
        self.file = path.open("a")
        self.board = tensorboard_writer(folder)
        self.tracker = tracker(args.track, folder, metadata.get("args", {}))
        self.bar = progress_bar("train", steps, start, "step")
        self.images = 0  # since the last line
        self.since = time.perf_counter()

    def _begin_replay(self) -> None:
        """Says which weights the failed step is computed with. Raises InputError without steps."""
        replay = self.args.replay
        if self.start >= self.steps:
            raise InputError(f"--replay {replay} is beyond the {self.steps} steps of this training")
        exact = "as it was" if self.start == replay - 1 else f"though step {replay - 1} was before"
        message = "step %d is computed with the weights of step %d, %s"
        log.info(message, replay, self.start, exact)

    def batches(
        self, loader: DataLoader, evaluate: Callable[..., Results], evaluated: Sequence[Dataset]
    ) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) for all steps that are left, with the batches of `loader`.

        First it logs what is seen of each dataset, and draws first_batch.jpg if there is none. If
        the run goes on from a step whose evaluation was cut off, it evaluates at once. Every rank
        calls it.

        evaluate:  called as evaluate(args, model, label_space, evaluated, folder), every
                   --eval-every steps
        evaluated: datasets; none for a training that is not evaluated on the way
        """
        self.evaluate = evaluate
        self.evaluated = evaluated
        if self.args.eval_every and not evaluated:
            log.info("--eval-every has no effect in the steps to %d", self.steps)
        stage_goes_on = bool(self.content[2].state)  # of the optimizer
        if stage_goes_on and not from_main(is_recorded(self.folder, self.start)):
            self._evaluate(self.start)
        if rank() == 0 and not self.args.replay and self.start < self.steps:
            mixture = loader.dataset
            items, count = items_of_datasets(loader.batch_sampler, mixture.starts)
            tell_mixture(mixture.datasets, items, count, world_size())
            picture = self.folder / "first_batch.jpg"
            if not picture.exists():
                draw_first_images(mixture.__getitem__, mixture.datasets, items, picture)
        yield from zip(range(self.start + 1, self.steps + 1), loader)

    def check_finite(self, losses: dict[str, Tensor], step: int, batch: Batch) -> dict[str, Tensor]:
        """Returns the losses without gradients. Every rank calls it before the update.

        If the sum "loss" of a rank is not finite, the update that follows changes nothing. The host
        does not wait for the losses of `step`, and raises for the step before: InputError on every
        rank if a loss was not finite, `Stop` if a signal has asked a rank to end. The error names
        the losses that are not finite. The images of that step are in failed-step-<step>.json.

        With --replay it compares the losses with the recorded ones, and ends the process.
        """
        losses = {name: value.detach() for name, value in losses.items()}
        if self.args.replay:
            self._end_replay(losses, batch)
        leave_out_unused(self.content[0])
        with leaving_together(losses["loss"].device), self.last.saving_together():
            self.last.settle()
            self.last.check_asked()
        self.last.begin_update(Verdict(step, losses, batch, self.args.seed))
        return losses

    def _end_replay(self, losses: dict[str, Tensor], batch: Batch) -> NoReturn:
        """Logs each loss as it was recorded and as it is now, and ends the process.

        It ends with InputError if a loss is not finite again, else with code 0.
        """
        step = self.args.replay
        compare(read_record(self.folder, step), losses)
        verdict = Verdict(step, losses, batch, self.args.seed)
        if not verdict.is_finite():
            raise verdict.error()
        log.info("step %d: all losses are finite this time", step)
        raise SystemExit(0)

    def step(
        self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str = ""
    ) -> None:
        """Counts one step, whose update is done. Writes a line every `EVERY` steps and at the end.

        Saves a checkpoint every --checkpoint-every steps and at the end, and evaluates every
        --eval-every steps but the last. Before any of these it raises InputError on every rank if
        the loss of a rank is not finite. Raises `Stop` if a signal has asked this process to end,
        or a rank in the last whole step.

        losses:  scalars, with their sum "loss"
        lr:      learning rate
        images:  number of images in this step, on this rank
        dataset: name of the step's dataset, which has its own curves in TensorBoard; "": several
        """
        self.last.note(step)
        try:
            if self._is_due(step):
                with leaving_together(losses["loss"].device), self.last.saving_together():
                    self.last.settle()
            if self.active:
                self._write(step, losses, lr, images, dataset)
                if step == self.start + 1:
                    tell_memory(images, self.args.accumulate, losses["loss"].device)
        finally:  # the step is made, also if the disk is full
            self.last.in_update = False
        end_if_measured(step, self.steps, losses["loss"].device, self.folder)
        if world_size() == 1:
            check_asked()
        with leaving_together(losses["loss"].device), self.last.saving_together():
            self.last.check_asked()
        if step == self.steps or step % self.args.checkpoint_every == 0:
            if self.active or Sharding.on:
                self.last.save()
            self.last.saved = step  # on the other ranks, too
        self._evaluate(step)
        self.last.in_loop = step < self.steps

    def _is_due(self, step: int) -> bool:
        """Returns whether a line, a checkpoint or an evaluation follows `step`."""
        periods = (EVERY, self.args.checkpoint_every, self.args.eval_every)
        return step == self.steps or any(every and step % every == 0 for every in periods)

    def _write(
        self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str
    ) -> None:
        self.bar.update()
        self.images += images * world_size()
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
        named = {f"{dataset}/{name}" if dataset else name: x for name, x in values.items()}
        if self.board:
            for name, value in named.items():
                self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(named, step)

    def _evaluate(self, step: int) -> None:
        """Evaluates the model of `step` if it is due, and keeps the best weights.

        The training does not change by it. A signal ends it at once: all of `step` is whole.
        """
        every = self.args.eval_every
        if not (every and self.evaluated) or step % every or step >= self.steps:
            return
        began = time.perf_counter()
        self.last.in_loop = False
        model, label_space, _, metadata = self.content
        with undisturbed(model), self.last.averaged(), whole(model):
            label_space = label_space() if callable(label_space) else label_space
            results = self.evaluate(self.args, model, label_space, self.evaluated, self.folder)
            if self.active:

                def save(path: Path, about: dict) -> None:
                    save_weights(path, model, label_space, metadata | about)

                record_evaluation(self.folder, step, results, label_space.datasets, save)
                if self.tracker:
                    self.tracker.log(flat(results), step)
                self.since += time.perf_counter() - began
        self.last.in_loop = True

    def finish(self) -> LabelSpace:
        """Does what `close` does, writes weights.safetensors, returns the trained label space."""
        self.close()
        model, label_space, _, metadata = self.content
        label_space = label_space() if callable(label_space) else label_space
        save_weights(self.folder / "weights.safetensors", model, label_space, metadata)
        return label_space

    def close(self) -> None:
        """Closes the files, and draws curves.png of them. With --ema the model gets the means."""
        self.last.in_loop = False
        swap(self.content[2])
        make_whole(self.content[0])
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()
            if self.tracker:
                self.tracker.finish()
            draw_training(self.folder)


def keep_stage(
    folder: Path,
    args: Any,
    model: nn.Module,
    label_space: LabelSpace,
    metadata: dict,
    evaluate: Callable[..., Results],
    datasets: Sequence[Dataset],
) -> None:
    """Writes the weights of a stage that is not the last, and its results, to a folder of its own.

    The folder is in the run folder. The other arguments are as in `RunLog`. Every rank calls it.
    """
    on_main(sweep, folder)
    save_weights(folder / "weights.safetensors", model, label_space, metadata)
    log.info("%s:", folder.name)
    report(evaluate(args, model, label_space, datasets, folder), folder, args, run=folder.parent)


def report(results: Results, folder: Path, args: Any, run: Path | None = None) -> None:
    """Writes results.json, tables of classes and the mistakes to `folder`, the results to the log.

    Does nothing without results. After a training with --eval-every it also does what
    `record_evaluation` says, and draws curves.png again with this evaluation. After one with
    --track it sends the results there.
    run: the run folder, if `folder` is only a part of it
    """
    if not results:
        return
    with atomic_path(folder / "results.json") as path:
        path.write_text(json.dumps(without_nan(results), indent=1))
    write_class_tables(results, folder)
    write_mistakes(results, folder, args.score_threshold)
    log.info("\n" + format_table(results))
    run = run or folder
    step = max(map(checkpoint_step, checkpoints(run)), default=0)
    if args.eval_every and not args.eval_only:
        weights = folder / "weights.safetensors"
        trained = stored_names(weights) or {}
        save = partial(copy_weights, weights)
        record_evaluation(run, step, results, trained, save)
        draw_training(run)
    sent = None if args.eval_only else tracker(args.track, run, vars(args))
    if sent:
        sent.log(flat(results), step)
        sent.finish()
    log.info("results and pictures: %s/", folder)
