"""FSDP2 (--fsdp): each rank keeps a share of the weights, gradients and moments, not all of them.

The blocks of the timm model gather their weights when they compute, one after the other. All other
weights are gathered for the whole step.
"""

import copy
import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import InputError
from common.parts import NORM

log = logging.getLogger("concord")


@dataclass
class Sharded:
    """What is known of a model whose parameters are sharded.

    plain: the model as it was, with parameters that have no memory
    used:  whether this rank's step has used a parameter; empty if each step uses all
    """

    plain: nn.Module
    used: dict[str, bool] = field(default_factory=dict)


class Sharding:
    """Says whether trainings of this process shard their models, and which models are sharded."""

    on: ClassVar[bool] = False  # `setup_device` sets it
    models: ClassVar[WeakKeyDictionary[nn.Module, Sharded]] = WeakKeyDictionary()


def set_sharding(wanted: bool, ranks: int) -> None:
    """Turns --fsdp on or off. Raises InputError if this torch lacks what it needs."""
    Sharding.on = wanted and ranks > 1
    if wanted and ranks == 1:
        log.info("--fsdp has no effect on one rank")
    if Sharding.on:
        try:
            from torch.distributed.checkpoint import HuggingFaceStorageWriter  # noqa: F401
            from torch.distributed.fsdp import fully_shard  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--fsdp needs a newer torch than {torch.__version__} ({error}); pip install -U"
                " torch torchvision"
            ) from None
        log.info("--fsdp: weights, gradients and moments are shared out over %d ranks", ranks)


# -- A step ----------------------------------------------------------------------------------------


class Root(nn.Module):
    """What FSDP2 sees of a model: a forward pass that returns all tensors of the output in a list.

    FSDP2 does something before the backward pass of each, and finds none in a dataclass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs = []

    def forward(self, *given: Any) -> list[Tensor]:
        """Keeps the output of the model, and returns its tensors."""
        output = self.model(*given)
        self.outputs.append(output)
        return list(tensors_in(output))


def shard(model: nn.Module, unused: bool) -> nn.Module:
    """Shards the parameters of a model over all ranks, in place.

    The ranks have the same weights. Returns the module for the forward passes of the training,
    whose gradients become means over the ranks. In each step all ranks get the buffers of rank 0,
    as with DistributedDataParallel.
    unused: steps may leave out parameters outside the timm models
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = Sharding.models[model] = Sharded(_without_memory(model))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.dim():  # FSDP2 refuses scalars
                row = nn.Parameter(parameter.detach().view(1), parameter.requires_grad)
                setattr(module, name, row)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    root = Root(model)
    for module in [*blocks(model), root]:
        fully_shard(module, mesh=mesh)
    root.register_forward_pre_hook(lambda *_: _begin_step(model, sharded, unused))
    root.register_forward_hook(lambda *_: root.outputs.pop())
    return root


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of the timm models in `model`, each of which `Backbone` calls its body.

    A block is an element of a list of modules. It consists of modules that have parameters, and no
    other block is in it.
    """
    bodies = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "body"]
    found = {}
    for body in bodies:
        for module in body.modules():
            if isinstance(module, nn.Sequential | nn.ModuleList):
                for element in module.children():
                    if any(list(part.parameters()) for part in element.children()):
                        found[element] = None
    return [m for m in found if not any(other in found for other in list(m.modules())[1:])]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
        return
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for part in value:
        yield from tensors_in(part)


def _begin_step(model: nn.Module, sharded: Sharded, unused: bool) -> None:
    """Prepares a training step, when the weights outside the blocks are gathered."""
    if not torch.is_grad_enabled():
        return
    for module in model.modules():
        if module.training or not isinstance(module, NORM):  # a frozen one does not change
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, 0)
    if not unused:
        return
    # Ranks that use different parameters would wait for each other's gradients. So each has a
    # gradient from the start, and `leave_out_unused` removes those that no rank has used.
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or not parameter.requires_grad:
            continue  # of a block, or frozen
        if name not in sharded.used:

            def note(_: Tensor, name: str = name) -> None:
                sharded.used[name] = True

            parameter.register_post_accumulate_grad_hook(note)
        sharded.used[name] = False
        parameter.grad = torch.zeros_like(parameter)


def leave_out_unused(model: nn.Module) -> None:
    """Removes the gradients of parameters that no rank has used in this step, as without --fsdp."""
    used = Sharding.models[model].used if model in Sharding.models else {}
    if not used:
        return
    parameters = dict(model.named_parameters())
    flags = torch.tensor(list(used.values()), dtype=torch.uint8)
    flags = flags.to(next(model.parameters()).device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    for name, flag in zip(used, flags.tolist()):
        if not flag:
            parameters[name].grad = None


# -- The whole model -------------------------------------------------------------------------------


def _without_memory(model: nn.Module) -> nn.Module:
    """Returns a copy of a model without its parameters' values."""
    memo = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def make_whole(model: nn.Module) -> None:
    """Gives a sharded model all of its weights on each rank, in place. Every rank calls it.

    It is a plain model again, whose training is over. Any other model stays as it is.
    """
    sharded = Sharding.models.pop(model, None)
    if sharded is None:
        return
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    memo = {}
    for name, empty in sharded.plain.named_parameters():
        full = own[name].detach().full_tensor().view(empty.shape)
        memo[id(empty)] = nn.Parameter(full, empty.requires_grad)
    for name, buffer in sharded.plain.named_buffers():
        memo[id(buffer)] = own[name]
    plain = copy.deepcopy(sharded.plain, memo)
    attributes = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    object.__setattr__(model, "__dict__", vars(plain) | attributes)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model is as `make_whole` makes it. Every rank enters it."""
    sharded = Sharding.models.get(model)
    content = vars(model)
    make_whole(model)
    try:
        yield
    finally:
        if sharded:
            object.__setattr__(model, "__dict__", content)
            Sharding.models[model] = sharded


# -- The optimizer's state in a checkpoint ---------------------------------------------------------


def split_state(state: dict) -> tuple[dict, dict[str, Tensor]]:
    """Splits `optimizer.state_dict()` into what all ranks have alike and what is sharded.

    Returns the state without its sharded tensors, and these by "<parameter>.<name>".
    """
    alike, sharded = {}, {}
    for index, values in state["state"].items():
        alike[index] = {}
        for name, value in values.items():
            if hasattr(value, "placements"):
                sharded[f"{index}.{name}"] = value
            else:
                alike[index][name] = value
    return state | {"state": alike}, sharded


def write_shards(folder: Path, sharded: dict[str, Tensor]) -> None:
    """Writes sharded tensors to a new folder: each rank its part, as safetensors.

    Every rank calls it. If one fails, all raise OSError.
    """
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(sharded, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        reason = "; ".join(f"rank {rank}: {told[0]}" for rank, told in error.failures.items())
        message = f"a checkpoint cannot be written ({reason[:150]})"
        raise OSError(errno.ENOSPC, message, str(folder.parent)) from None


def join_state(state: dict, folder: Path, optimizer: Optimizer) -> dict:
    """Returns the state of `split_state` with the tensors of `write_shards`, for this optimizer.

    The number of ranks may be another one, and the training one without --fsdp, or the other way
    round. Every rank calls it. Raises ValueError for damaged files.
    """
    from torch.distributed import checkpoint
    from torch.distributed.tensor import distribute_tensor

    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    if not folder.exists() and not any(hasattr(p, "placements") for p in parameters):
        return state
    joined = {index: dict(values) for index, values in state["state"].items()}
    if folder.exists():
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        loaded = {}
        for key, stored in reader.read_metadata().state_dict_metadata.items():
            parameter = parameters[int(key.partition(".")[0])]
            kind = stored.properties.dtype
            if hasattr(parameter, "placements"):
                loaded[key] = torch.empty_like(parameter, dtype=kind)
            else:
                loaded[key] = torch.empty(stored.size, dtype=kind)
        alone = not dist.is_initialized()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # says that there is one process
                checkpoint.load(loaded, storage_reader=reader, no_dist=alone)
        except checkpoint.CheckpointException as error:
            raise ValueError(str(error)) from None
        for key, value in loaded.items():
            index, _, name = key.partition(".")
            joined[int(index)][name] = value
    for index, values in joined.items():
        parameter = parameters[index]
        for name, value in values.items():
            if name == "step" or hasattr(value, "placements"):
                continue
            if value.numel() == parameter.numel() == 1:  # scalars are rows with --fsdp
                value = value.view(parameter.shape)
            if hasattr(parameter, "placements"):
                place = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value.to(parameter.device), *place, src_data_rank=None)
            values[name] = value
    return state | {"state": joined}
