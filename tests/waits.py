"""Counts where a training step on a GPU would wait for it.

An operation waits if its result has a size, or a number, that the host must know. The counts are
made on the CPU, where the same operations run. To read the verdict of a step before costs no wait,
since the device has long come to it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import roi_align
from common.verdict import Verdict

WAITING = (
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.bincount",
    "aten._local_scalar_dense",
    "aten.lift_fresh",  # torch.tensor(list, device) copies from memory that is not pinned
    "torchvision.nms",
)
READING = ("tolist", "cpu")  # methods that copy to the host
ON_CPU = "concord.msda"  # the operation whose CPU kernel may read what it likes


class Waits(TorchDispatchMode):
    """Counts the operations that wait, by their names, in `found`."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.in_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if name == "concord.roi_align.default":
            with self:
                return roi_align._forward_native(*args)
        if name == "concord.roi_align_backward.default":
            gradient, sizes, *others = args
            shapes = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]
            with self:
                return roi_align._backward_native(gradient, shapes, *others)
        if self.waits(name, args, kwargs):
            self.found[name] += 1
        self.in_kernel = name.startswith(ON_CPU)
        try:
            return func(*args, **kwargs)
        finally:
            self.in_kernel = False

    @staticmethod
    def waits(name: str, args: tuple, kwargs: dict) -> bool:
        if name.startswith(("aten.index.", "aten.index_put")):
            indices = [x for x in args[1] if x is not None]
            return any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        if name == "aten.repeat_interleave.Tensor":
            return kwargs.get("output_size") is None
        return name.startswith(WAITING)


@contextmanager
def count_waits() -> Iterator[Counter]:
    """Yields a counter of the waits within a `with` block."""
    mode = Waits()

    def reading(name):
        plain = getattr(Tensor, name)

        def read(tensor, *args):
            mode.found[f"Tensor.{name}"] += not mode.in_kernel
            return plain(tensor, *args)

        return mock.patch.object(Tensor, name, read)

    made, make, read = [], Verdict.__init__, Verdict.read

    def make_now(verdict, *given):
        made.append(verdict)
        make(verdict, *given)

    def read_now(verdict):
        mode.found["Verdict.read"] += any(verdict is one for one in made)
        return read(verdict)

    patches = [reading(name) for name in READING]
    patches.append(mock.patch.object(Verdict, "__init__", make_now))
    patches.append(mock.patch.object(Verdict, "read", read_now))
    for patch in patches:
        patch.start()
    try:
        with mode:
            yield mode.found
    finally:
        for patch in patches:
            patch.stop()
