"""Devices, ranks and precision."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from common.compiling import Compiling
from common.errors import InputError
from common.fsdp import Sharding, set_sharding, shard
from common.memory import find_batch_size
from common.parts import Parts
from common.process import Stop, environment_number

log = logging.getLogger("concord")

# functions of torch.cpu, where torch has them
CPU_TESTS = {"AMX": "_is_amx_tile_supported", "AVX512_BF16": "_is_avx512_bf16_supported"}
WAIT = timedelta(hours=2)  # the other ranks wait while rank 0 scores a large dataset
T = TypeVar("T")


def setup_device(args: Any) -> torch.device:
    """Sets up this process as --device, --seed, --amp, --compile, --fsdp and --accumulate ask.

    Returns its device. Joins the process group under torchrun. Seeds torch with seed + rank.
    Silences the log on all ranks but 0, except for errors. `args.amp` becomes "on" or "off", for a
    training to go on with, and an `args.batch_size` of "auto" a number.

    --device is a name of torch, or "auto", see `best_device`. Under torchrun "cuda" is the GPU of
    the local rank. Raises InputError if the device cannot be used, or if the variables of torchrun
    are damaged.
    """
    device = best_device() if args.device == "auto" else args.device
    on_cuda = device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device here; use --device cpu")
    if device.startswith("mps"):
        _check_mps(device)
    if "LOCAL_RANK" in os.environ:
        _check_launch()
        if device == "cuda":
            device = f"cuda:{environment_number('LOCAL_RANK')}"
        _join("nccl" if on_cuda else "gloo")
    try:
        torch.zeros((), device=device).item()
    except RuntimeError:
        raise InputError(f"--device {device} cannot be used here; use cpu, cuda or mps") from None
    if on_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default
    torch.manual_seed(args.seed + rank())
    if rank() > 0:
        log.setLevel(logging.ERROR)
    if world_size() > 1:
        hours = WAIT.total_seconds() / 3600
        message = "%d ranks: one that waits more than %g hours for another ends with an error"
        log.info(message, world_size(), hours)
    device = torch.device(device)
    args.amp = _tell_precision(args.amp, device)
    # compiling takes minutes, which short runs and a CPU do not win back
    Compiling.on = args.compile == "on" or (args.compile == "auto" and on_cuda and not args.tiny)
    Parts.number = args.accumulate
    set_sharding(args.fsdp, world_size())
    if args.batch_size == "auto" and not (args.predict or args.eval_only):
        args.batch_size = on_main(find_batch_size, args, device, world_size())
    if Compiling.on:
        log.info("--compile on: the first steps are slow, since parts of the step are compiled")
    return device


def best_device() -> str:
    """Returns "cuda" if there is any, else "mps", the GPU of a Mac, for one process, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    alone = "LOCAL_RANK" not in os.environ
    return "mps" if alone and torch.backends.mps.is_available() else "cpu"


def _check_mps(device: str) -> None:
    """Raises InputError if there is no GPU of a Mac here, or if several ranks would share it."""
    if not torch.backends.mps.is_available():
        raise InputError(f"--device {device}: no GPU of a Mac here; use --device cpu")
    if "LOCAL_RANK" in os.environ:
        raise InputError(
            f"--device {device} is for one process; start it without torchrun, or use --device cpu"
        )


def _join(backend: str) -> None:
    """Joins the process group of torchrun.

    After a restart (--max-restarts) torchrun's store still has the addresses of the ranks before,
    which a fast rank would read. So each attempt writes below a name of its own.
    """
    store, own_rank, ranks = next(dist.rendezvous("env://", timeout=WAIT))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, timeout=WAIT, store=store, rank=own_rank, world_size=ranks)


def _check_launch() -> None:
    """Raises InputError if the variables of torchrun are incomplete, no numbers or out of range.

    Otherwise this process would wait for another one that never comes.
    """
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(f"LOCAL_RANK is set, but {name} is not; use torchrun, or unset it")
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        environment_number(name)
    ranks = environment_number("WORLD_SIZE")
    limits = {"RANK": ranks, "LOCAL_RANK": ranks, "MASTER_PORT": 1 << 16}
    for name, limit in limits.items():
        if environment_number(name) >= limit:
            raise InputError(
                f"the environment variable {name} is {os.environ[name]:.20}, and must be below "
                f"{limit}; use torchrun, or unset LOCAL_RANK"
            )


def rank() -> int:
    """Returns the rank of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def in_parallel(model: nn.Module, unused: bool = False) -> nn.Module:
    """Returns the model for a training's forward passes, whose gradients are means over the ranks.

    With --fsdp the model gets other parameters, so an optimizer is made afterwards.
    unused: steps may leave out parameters
    """
    if world_size() == 1:
        return model
    if Sharding.on:
        same_on_ranks(model)
        return shard(model, unused)
    return DistributedDataParallel(model, find_unused_parameters=unused)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of the scalar `value` over all ranks, without a gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def from_main(value: T) -> T:
    """Returns rank 0's `value`, any object that can be pickled, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def same_on_ranks(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0, in place. Every rank calls it."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def on_main(function: Callable[..., T], *given: object) -> T:
    """Returns, on every rank, what `function` returns on rank 0, the only one that calls it.

    An InputError that it raises is raised on every rank, so that none waits for the others.
    """
    result = error = None
    if rank() == 0:
        try:
            result = function(*given)
        except InputError as raised:
            error = raised
    result, error = from_main((result, error))
    if error:
        raise error
    return result


def ranks_without(path: Path) -> list[int]:
    """Returns the ranks that do not see the file or folder `path` of rank 0.

    They may be on other machines. Every rank calls it.
    """
    path = from_main(path)
    seen = [True]
    if world_size() > 1:
        seen = [None] * world_size()
        dist.all_gather_object(seen, path.exists())
    return [number for number, sees in enumerate(seen) if not sees]


def rows_of_ranks(row: Tensor) -> Tensor:
    """Returns the rows (R, N) of all ranks in rank order. `row` (N,) is as long on every rank.

    The host does not wait for a GPU. Every rank must call it.
    """
    if world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


@contextmanager
def leaving_together(device: torch.device) -> Iterator[None]:
    """Context manager. If every rank raises an error in it, none leaves before all have raised it.

    A rank that ended at once would leave others waiting for its gradients.
    """
    try:
        yield
    except (InputError, OSError, Stop):  # any other error may be of one rank alone
        if world_size() > 1:
            mean_over_ranks(torch.zeros((), device=device)).item()  # waits for all ranks
        raise


def gather_on_main(value: T) -> list[T]:
    """Returns the values of all ranks in rank order on rank 0, and [] on the other ranks."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []


def gather(rows: Tensor | None) -> Tensor | None:
    """Concatenates rows (N, ...) of all ranks, those of this rank first. They have no gradient.

    N may differ. A rank without rows gives None and gets None. Every rank must call it.
    """
    if world_size() == 1:
        return rows
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows)
    if rows is None:
        return None
    del parts[rank()]
    others = [part for part in parts if part is not None]
    return torch.cat([rows, *others])


def all_rows(rows: Tensor) -> Tensor:
    """Returns rows (B, ...) of all ranks, in rank order and with their gradients.

    All ranks have as many rows. Every rank must call it.
    """
    return rows if world_size() == 1 else torch.cat(all_gather(rows.contiguous()))


def amp_context(amp: str, device: torch.device) -> torch.autocast:
    """Returns the autocast context: bfloat16 for "on", float32 for "off".

    "auto" is "on" for a device that `built_for_bfloat16`. Convolutions, linear layers and other
    products of matrices take part. The modules of common/ return float32 all the same, so that
    losses and boxes are computed in it.
    """
    enabled = amp == "on" or (amp == "auto" and bool(built_for_bfloat16(device)))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def built_for_bfloat16(device: torch.device) -> str:
    """Returns what makes bfloat16 fast on a device, like "this CPU has AMX"; "" for nothing."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has it"
    for name, test in CPU_TESTS.items():
        if device.type == "cpu" and getattr(torch.cpu, test, bool)():  # bool() is False
            return f"this CPU has {name}"
    return ""


def _tell_precision(amp: str, device: torch.device) -> str:
    """Returns "on" or "off" for --amp, the same on every rank, and logs why."""
    reason = from_main(built_for_bfloat16(device))
    if amp != "auto":
        log.info("%s: --amp %s", "bfloat16" if amp == "on" else "float32", amp)
        return amp
    if reason:
        log.info("bfloat16: %s (--amp off for float32)", reason)
        return "on"
    if device.type == "mps":
        log.info("float32: whether this GPU is fast in bfloat16 is not known (try --amp on)")
    else:
        log.info("float32: this %s is not built for bfloat16", device.type.upper())
    return "off"
