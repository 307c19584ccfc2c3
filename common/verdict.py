"""Whether the loss of a step is finite: the device knows it at once, the host one step later."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.batch import Batch
from common.checkpoint import rng_states
from common.distributed import rank, rows_of_ranks
from common.errors import InputError
from common.process import asked
from common.replay import described, write_record


class Verdict:
    """What all ranks tell of a step after its backward pass. Every rank makes one.

    Each rank tells whether its loss is finite, which signal has asked it to end, and its random
    states, in a row of bytes. The rows are gathered on the device. The host waits for them only
    when it reads them: `LastStep` does so a step later, when the device has come to them.

    losses:    scalars without gradients, with their sum "loss"
    seed:      --seed, without which nobody can load the images of `batch` again
    found_inf: scalar on the device, 1.0 if the loss of a rank is not finite, else 0.0. An optimizer
               with fused=True that has it as its attribute leaves out its update for a 1.0
    """

    def __init__(self, step: int, losses: dict[str, Tensor], batch: Batch, seed: int):
        self.step = step
        self.seed = seed
        self.losses = losses
        self.samples = described(batch)  # without pixels, so that no memory of a device is held
        loss = losses["loss"]
        states = rng_states()
        self.sizes = [len(state) for state in states]
        told = torch.cat([torch.full((1,), asked(), dtype=torch.uint8), *states])
        if loss.is_cuda:
            told = told.pin_memory()
        failed = loss.isfinite().logical_not().to(torch.uint8)
        row = torch.cat([failed.view(1), told.to(loss.device, non_blocking=True)])
        rows = rows_of_ranks(row)  # (R, N)
        self.found_inf = rows[:, 0].amax().float()
        self.rows = rows.to("cpu", non_blocking=loss.is_cuda)
        self.arrival = None
        if loss.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def read(self) -> np.ndarray:
        """Returns the rows (R, N) of all ranks. Waits until the device has come to them."""
        if self.arrival:
            self.arrival.synchronize()
        return self.rows.numpy()

    def is_finite(self) -> bool:
        """Returns whether the losses of all ranks are finite."""
        return not self.read()[:, 0].any()

    def signal(self) -> int:
        """Returns the largest number of a signal that has asked a rank to end, or 0."""
        return int(self.read()[:, 1].max())

    def rng_states(self) -> list[list[Tensor]]:
        """Returns the random states of each rank, as `rng_states` returns those of this one."""
        rows = torch.from_numpy(self.read()[:, 2:])
        return [[part.clone() for part in row.split(self.sizes)] for row in rows]

    def error(self) -> InputError:
        """Returns what this rank raises if a loss is not finite, with the step and the losses."""
        if not self.read()[rank(), 0]:
            reason = "the loss of another rank is not finite; it says which"
            return InputError(f"step {self.step}: {reason}")
        bad = [name for name, value in self.losses.items() if not math.isfinite(value)]
        named = ", ".join(name for name in bad if name != "loss") or "loss"
        return InputError(f"step {self.step}: {named} is not finite; lower --lr or turn --amp off")

    def write_record(self, folder: Path) -> None:
        """Writes the images and the losses of the step to failed-step-<step>.json in `folder`."""
        write_record(folder, self.step, self.seed, self.losses, self.samples)
