"""torch.compile for the parts of a training step, as --compile asks."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor

log = logging.getLogger("concord")


class Compiling:
    """What this process compiles, and how."""

    on = False  # `setup_device` sets it
    few_shapes = False  # whether batches have two shapes at most; `make_loader` sets it


def compilable(function: Callable | None = None, *, of_images: bool = False) -> Callable:
    """Decorator of a function or method that a training step runs compiled, with --compile.

    All sizes are symbols in its graph, so that one graph serves any number of regions, boxes or
    masks. The function runs as it is in three cases. Its first tensor has fewer than two rows:
    torch would make another graph for 0 and for 1. A decoder with one image a rank is such a case.
    Gradients are off: predictions are of images of many sizes. It cannot be compiled: the log says
    so. An error in the compilation of the backward pass ends the training; --compile off helps.

    of_images: the sizes are those of a batch of images. They are constants, with a graph for each
               shape, if the batches of the training have two shapes at most.
    """
    if function is None:
        return functools.partial(compilable, of_images=of_images)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        runs_compiled = Compiling.on and torch.is_grad_enabled()
        if not runs_compiled or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if of_images:
            return _run(function, not Compiling.few_shapes, args, kwargs)
        first = next(x for x in args if isinstance(x, Tensor))
        if len(first) < 2:
            return function(*args, **kwargs)
        return _run(function, True, args, kwargs)

    return call


def _run(function: Callable, dynamic: bool, args: tuple, kwargs: dict) -> Any:
    from torch._dynamo.exc import TorchDynamoException  # late: it takes seconds to import

    if function in _refused:
        return function(*args, **kwargs)
    try:
        return _compiled(function, dynamic)(*args, **kwargs)
    except TorchDynamoException as error:
        _refused.add(function)
        reason = " ".join(str(error).split()[:20])
        log.warning("%s runs uncompiled: %s", function.__qualname__, reason)
        return function(*args, **kwargs)


_refused: set[Callable] = set()  # functions that cannot be compiled here


@functools.cache
def _compiled(function: Callable, dynamic: bool) -> Callable:
    # otherwise torch takes sizes that are equal in the first call for one symbol, and compiles
    # again when they differ; this holds for the whole process
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(function, dynamic=dynamic)
