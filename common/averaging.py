"""A running mean of the weights (--ema), kept in the optimizer's state, and so in a checkpoint."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

MEAN = "mean"  # name of the mean in the state of a parameter


def keep_mean(optimizer: Optimizer, decay: float) -> None:
    """Makes each update also move the means: mean <- decay mean + (1 - decay) weights.

    The mean of a parameter begins with its first update. An update that `found_inf` leaves out
    moves nothing.
    """

    @torch.no_grad()
    def move(optimizer: Optimizer, *_) -> None:
        for weight, state in trained(optimizer):
            if MEAN not in state:
                state[MEAN] = weight.clone()
                continue
            share = 1 - decay
            left_out = getattr(optimizer, "found_inf", None)
            if left_out is not None:
                share = share * (1 - left_out)
            state[MEAN].lerp_(weight, share)

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
