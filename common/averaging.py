"""A running mean of the weights (--ema), kept in the optimizer's state, and so in a checkpoint."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

MEAN = "mean"  # name of the mean in the state of a parameter


def keep_mean(optimizer: Optimizer, decay: float) -> None:
    """Makes each update also move the means: mean <- d mean + (1 - d) weights.

    In update t, d is min(decay, (1 + t) / (10 + t)), so that the first weights do not last. The
    mean of a parameter begins with its first update. An update that `found_inf` leaves out moves
    nothing. Buffers, such as the statistics of BatchNorm, have no mean.
    """

    @torch.no_grad()
    def move(optimizer: Optimizer, *_) -> None:
        first = optimizer.param_groups[0]
        updates = first["updates"] = first.get("updates", 0) + 1  # kept in a checkpoint
        share = 1 - min(decay, (1 + updates) / (10 + updates))
        for weight, state in trained(optimizer):
            if MEAN not in state:
                state[MEAN] = weight.clone()
                continue
            left_out = getattr(optimizer, "found_inf", None)
            step = share if left_out is None else share * (1 - left_out)
            state[MEAN].lerp_(weight, step)

    optimizer.register_step_post_hook(move)


def trained(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict]]:
    """Yields (parameter, its state) for all parameters that have had an update."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                yield parameter, state


@torch.no_grad()
def swap(optimizer: Optimizer) -> None:
    """Exchanges the weights and their means, in place. Without --ema it changes nothing."""
    for weight, state in trained(optimizer):
        if MEAN in state:
            other = state[MEAN].clone()
            state[MEAN].copy_(weight)
            weight.copy_(other)
