"""Devices, ranks and precision."""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import InputError

log = logging.getLogger("concord")


def setup_device(device: str, seed: int) -> torch.device:
    """Join the process group if torchrun started us, pick the device, seed every generator."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device here; use --device cpu")
    if "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        # the other ranks wait while rank 0 scores a large dataset
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2)
        )
    try:
        torch.zeros((), device=device).item()
    except RuntimeError:
        raise InputError(f"--device {device} cannot be used here; use cpu or cuda") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default
    torch.manual_seed(seed + rank())
    if rank() > 0:
        log.setLevel(logging.ERROR)
    return torch.device(device)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The scalar averaged over all ranks; itself in a single process. Not differentiable."""
    value = value.detach()
    if world_size() > 1:
        dist.all_reduce(value := value.clone())
    return value / world_size()


def from_main(value):
    """Rank 0's value, on every rank."""
    if world_size() > 1:
        dist.broadcast_object_list(box := [value])
        return box[0]
    return value


def gather_on_main(value) -> list:
    """The objects of all ranks, in rank order; only rank 0 may use the result."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []


def gather_rows(rows: Tensor) -> Tensor:
    """(N, ...) of every rank, as many on each, in rank order: (N * world_size, ...). Not differentiable."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def amp_context(amp: str, device: torch.device):
    """`auto` is bfloat16 on CUDA and float32 elsewhere; `on` forces bfloat16, `off` float32."""
    enabled = amp == "on" or (amp == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def should_compile(choice: str, device: torch.device) -> bool:
    """`auto` compiles on CUDA only: on a CPU compiling takes longer than a short run saves."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")
