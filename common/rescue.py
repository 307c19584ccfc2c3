"""What happens when a training ends early: its last whole step, errors in one line."""

import errno
import logging
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.averaging import swap
from common.checkpoint import save_checkpoint
from common.distributed import rank, world_size
from common.errors import InputError, SomeFailed, first_line
from common.fsdp import Sharding, whole
from common.labels import LabelSpace
from common.parts import NORM
from common.process import Process, Stop, asked
from common.verdict import Verdict

log = logging.getLogger("concord")

# devices whose fused optimizers heed `found_inf`; that for the GPU of a Mac takes and forgets it
HEEDING = ("cpu", "cuda")
LOWER = "lower --batch-size, --image-size or --workers, in a training also raise --accumulate"
# Patterns of the messages of torch and the system. WORKER is about a data loading process, PEERS
# about the connection of ranks.
MEMORY = (
    r"can(no|')t allocate memory|out of memory|not enough memory|bad_alloc|can't start new thread"
    r"|unable to allocate shared memory"
)
WORKER = r"DataLoader worker .*(killed by signal|exited unexpectedly)|insufficient shared memory"
DEVICE = r"CUDA error: (?!device-side assert)|CUDNN_STATUS|CUBLAS_STATUS"
PEERS = r"closed by peer|reset by peer|Broken pipe|Timed out waiting|gloo|NCCL|ProcessGroup"


# -- The last whole step ---------------------------------------------------------------------------


class MadeStep(NamedTuple):
    """A step whose update has run: its number, what the ranks tell of it, copies of the buffers."""

    number: int
    verdict: Verdict | None  # None: an earlier process made the step
    buffers: list[Tensor]


class LastStep:
    """The last whole step of a training.

    A step is made when its update has run. It is whole when `settle` has found its losses finite.

    folder, model, optimizer, metadata, keep: as in `save_checkpoint`
    label_space: as there, or a function that returns it, if training changes its text
    step: number of steps that are done; if it is above 0, a checkpoint holds them

    The model keeps the weights of the last whole step until the next update begins. A forward pass
    already changes the random states and the buffers, such as the statistics of BatchNorm, so both
    are copied in each step. Rank 0 has the random states of all ranks, since another rank may be
    killed.

    The update of a step whose loss is not finite is left out, on the device. The host learns that
    one step late. Until then the step before is the last whole one.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        label_space: LabelSpace,
        optimizer: Optimizer,
        metadata: dict,
        keep: int,
    ):
        self.folder = folder
        self.saved = step
        self.content = (model, label_space, optimizer, metadata)
        self.keep = keep
        self.in_update = False  # True while the weights change
        self.in_loop = True  # False during an evaluation and after the last step
        # a frozen BatchNorm is in eval mode, and its statistics do not change
        modules = [m for m in model.modules() if m.training or not isinstance(m, NORM)]
        self.buffers = [buffer for m in modules for buffer in m.buffers(recurse=False)]
        self.whole = self.made = MadeStep(step, None, [])  # which is saved already
        Process.training = self

    @property
    def is_busy(self) -> bool:
        """Whether a signal has to wait: in an update, and in the loop if there are other ranks."""
        return self.in_update or (self.in_loop and world_size() > 1)

    def begin_update(self, verdict: Verdict) -> None:
        """Notes that the weights are about to change, unless a loss of the step is not finite.

        The update changes no random states, since it uses no random numbers. Where it cannot be
        left out on the device, the host waits, and this raises InputError for the step itself.
        """
        if verdict.found_inf.device.type not in HEEDING and not verdict.is_finite():
            self._refuse(verdict)
        self.in_update = True
        self.verdict = verdict
        optimizer = self.content[2]
        optimizer.found_inf = verdict.found_inf
        if Process.heeding and hasattr(signal, "SIGCHLD"):  # Windows has none
            # PyTorch's handler raises as soon as a data loading process dies, even in an update.
            # Without it the loader notices that within five seconds, between two steps.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def note(self, step: int) -> None:
        """Notes that `step` is made, with a copy of its buffers."""
        self.made = MadeStep(step, self.verdict, [buffer.clone() for buffer in self.buffers])

    def settle(self) -> None:
        """Waits until it is known whether the step that is made is whole.

        If a loss of it is not finite, it writes failed-step-<step>.json and raises InputError, on
        every rank.
        """
        made = self.made
        if made is self.whole or made.verdict.is_finite():
            self.whole = made
            return
        self.made = self.whole  # the weights are those of this step
        self._refuse(made.verdict)

    def _refuse(self, verdict: Verdict) -> NoReturn:
        """Writes failed-step-<step>.json, and raises InputError."""
        verdict.write_record(self.folder)
        raise verdict.error()

    def check_asked(self) -> None:
        """Raises `Stop` on every rank if a signal had asked one to end in the last whole step."""
        verdict = self.whole.verdict
        if verdict and verdict.signal():
            raise Stop(verdict.signal())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager in which the model has the means of --ema as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self.in_update = True  # a signal waits
        swap(self.content[2])
        self.in_update = False

    def has_finite_weights(self) -> bool:
        """Returns whether all weights are finite numbers."""
        model, *_ = self.content
        return all(bool(weight.isfinite().all()) for weight in model.parameters())

    def save(self, spare: int = 0) -> None:
        """Writes a checkpoint of the last whole step. Rank 0 calls it; with --fsdp every rank.

        spare: how many checkpoints to keep beyond `keep`
        """
        step, verdict, buffers = self.whole
        with torch.no_grad():
            for buffer, noted in zip(self.buffers, buffers):
                buffer.copy_(noted)
        model, label_space, *others = self.content
        with whole(model):
            if callable(label_space):
                label_space = label_space()
            content = (verdict.rng_states(), model, label_space, *others)
            save_checkpoint(self.folder, step, *content, keep=self.keep + spare)
        self.saved = step

    @contextmanager
    def saving_together(self) -> Iterator[None]:
        """Context manager for an error that all ranks raise: with --fsdp they save before it ends.

        A rank that fails alone has a share of the weights, and `rescue` can save nothing.
        """
        try:
            yield
        except (InputError, Stop):
            if Sharding.on and self.whole.number > self.saved and self.has_finite_weights():
                self.save(spare=1)
            raise


def rescue() -> str:
    """Saves the last whole step of this process's training, unless it is saved already.

    Rank 0 writes it. It calls no other rank, but waits until its device has done the last step.
    Nothing is written during an update, and no weights that are not finite. Returns a line that
    says which step is kept and how to go on; "" if there is no training.
    """
    training = Process.training
    if training is None:
        return ""
    folder = training.folder
    again = f"the same command, or --resume {folder},"
    trouble = ""
    if not training.in_update:
        try:
            training.settle()
        except Exception as error:  # a loss that is not finite, or a lost GPU
            trouble = f"{first_line(error)}; "
    step = training.whole.number
    if training.in_update:
        trouble = f"step {step + 1} was half done, so no more can be saved; "
    elif step > training.saved and Sharding.on:
        trouble += f"with --fsdp one rank cannot save step {step} alone; "
    elif step > training.saved and rank() == 0 and training.made is training.whole:
        try:
            if training.has_finite_weights():
                training.save(spare=1)
            else:
                trouble += f"the weights of step {step} are not finite, so they are not saved; "
        except Exception as error:  # a full disk, a lost GPU: the line that follows matters more
            trouble += f"step {step} cannot be saved ({first_line(error)}); "
    if not training.saved:
        return f"{trouble}no step is saved; {again} starts from nothing"
    checkpoint = folder / f"checkpoint-{training.saved:07d}"
    return f"{trouble}step {training.saved} is kept in {checkpoint}; {again} goes on from it"


# -- Errors ----------------------------------------------------------------------------------------


def explain(error: BaseException) -> tuple[str, int]:
    """Returns one line that explains an error, "" for an unknown error; also the exit code.

    The code is 128 + the number of a signal, 2 for what the user can correct, 1 otherwise.
    """
    if isinstance(error, KeyboardInterrupt):
        error = Stop(signal.SIGINT)
    if isinstance(error, Stop):
        return f"stopped by {error}", 128 + error.number
    text = str(error)
    if isinstance(error, InputError):
        return text, 2
    if isinstance(error, SomeFailed):
        return text, 1
    line = _explain_machine(error, text)
    if line and asked():  # the signal ended the data loading processes and other ranks, too
        return explain(Stop(asked()))
    if line:
        return line, 1
    if isinstance(error, OSError) and error.errno is not None:
        place = error.filename or "writing"
        remedy = "see to the disk or folder, or choose another --output or CONCORD_CACHE"
        return f"{place}: {error.strerror}; {remedy}", 2
    return "", 1


def _explain_machine(error: BaseException, text: str) -> str:
    """Returns one line for an error of memory, a process, the GPU or a rank; "" for any other."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOMEM):
        return ""  # an error of a file, for which `explain` has a line
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(MEMORY, text):
        return f"the memory is not enough ({first_line(error)}); {LOWER}, or make the model smaller"
    if _says(WORKER, text):
        reason = "the system does that when memory runs out"
        return f"a data loading process was killed ({reason}); {LOWER}"
    if _says(DEVICE, text):
        return f"the GPU failed ({first_line(error)}); see nvidia-smi, or name another by --device"
    if world_size() > 1 and isinstance(error, RuntimeError) and _says(PEERS, text):
        return f"another rank ended or does not answer ({first_line(error)}); its message says why"
    return ""


def _says(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None
