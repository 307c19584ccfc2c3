"""Gradients accumulated over the parts of a batch (--accumulate)."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("concord")

NORM = nn.modules.batchnorm._BatchNorm  # moves its buffers in training
T = TypeVar("T")


class Parts:
    """Says in how many parts a training computes each batch."""

    number: ClassVar[int] = 1
    told: ClassVar[bool] = False  # that BatchNorm is trained


def in_parts(extract: Callable[..., T]) -> Callable[..., T]:
    """Decorator of extract(model, images, sizes, ...), which computes each image for itself.

    In training, the batch is computed in `Parts.number` parts. The activations of a part are not
    kept: the backward pass computes them again, part by part, and accumulates the gradients. So
    memory holds the activations of one part, and the results of all. What follows sees the whole
    batch: its losses, counts, samples and matchings are those of the undivided batch.

    images: (B, 3, H, W); sizes and all that follows: lists of B
    The result is made of tensors (B, ...), lists, tuples and dataclasses. Of anything else in it,
    the first part's is taken.
    """

    @functools.wraps(extract)
    def parted(model: nn.Module, images: Tensor, *lists: list) -> T:
        number = min(Parts.number, len(images))
        if number == 1 or not torch.is_grad_enabled():
            return extract(model, images, *lists)
        _tell_of_batch_norm(model)
        results = []
        start = 0
        for part in images.tensor_split(number):
            end = start + len(part)
            own = [items[start:end] for items in lists]
            results.append(checkpoint(extract, model, part, *own, use_reentrant=False))
            start = end
        return join(results)

    return parted


def _tell_of_batch_norm(model: nn.Module) -> None:
    """Logs once that a step is another one, if statistics of BatchNorm are those of the batch."""
    if not Parts.told and any(isinstance(m, NORM) and m.training for m in model.modules()):
        message = "--accumulate: BatchNorm is trained: its statistics are of one part, moved twice"
        log.warning(message)
        Parts.told = True


def join(parts: list[T]) -> T:
    """Concatenates equal structures of tensors (B, ...) along B, as `in_parts` describes them."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple) and hasattr(first, "_fields"):  # a NamedTuple
        return type(first)(*map(join, zip(*parts)))
    if isinstance(first, list | tuple):
        return type(first)(join(list(items)) for items in zip(*parts))
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        joined = {name: join([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(first, **joined)
    return first
