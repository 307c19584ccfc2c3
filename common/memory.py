"""Memory of a training: how much a step takes, and the largest batch that fits (--batch-size auto).

On a CPU it is the resident memory of the process, on a GPU what torch has allocated, at their peak.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from common.process import environment_number
from common.saved import read_args

log = logging.getLogger("concord")

MEASURE = "CONCORD_MEASURE"  # set: a training ends after PROBE_STEPS steps and writes its peak
PROBE_STEPS = 4
RECORD = "measured.json"  # in the run folder of such a training
_ends: list[float] = []  # when each of its steps has ended
SHARE = 0.8  # of the memory may be taken: later images are larger, or have more objects
# variables of torchrun, which a process of its own must not have
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has had on `device`; 0 if they are not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's memory
    if device.type != "cpu" or not status.exists():
        return 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])


def total_memory(device: torch.device) -> int:
    """Returns the bytes of memory of a GPU, or of this machine; 0 if they are not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    given = limit.read_text().strip() if limit.is_file() else ""
    return min(memory, int(given)) if given.isdecimal() else memory


def refuse_huge_batch(batch_size: int, transforms: Iterable[Callable]) -> None:
    """Raises InputError if the images of one batch alone need more memory than the machine has.

    transforms: augmentations; an image counts as a square of its `size`, `low` or `crop`
    """
    side = 32  # to its multiples images are padded
    for transform in transforms:
        lengths = [getattr(transform, name, 0) for name in ("size", "low")]
        side = max(side, *lengths, *getattr(transform, "crop", ()))
    needed = 3 * side * side * batch_size
    memory = total_memory(torch.device("cpu"))
    if not memory:
        log.info("this system does not tell its memory: that a batch fits into it is not checked")
    elif needed > memory:
        raise InputError(
            f"a batch of {batch_size} images of {side} x {side} pixels takes {needed / 1e9:,.0f} "
            f"GB, but this machine has {memory / 1e9:,.0f} GB; lower --batch-size or --image-size"
        )


def tell_memory(images: int, parts: int, device: torch.device) -> None:
    """Logs how much memory the first step took, with --accumulate `parts`, of how much there is.

    images: of the step on this rank
    """
    peak, total = peak_memory(device), total_memory(device)
    if not (peak and total):
        return
    message = "a step of %d images in %s takes %.1f of %.1f GB"
    one = "one part (--accumulate 2 takes less)" if parts == 1 else f"{min(parts, images)} parts"
    log.info(message, images, one, peak / 1e9, total / 1e9)


def find_batch_size(args: Any, device: torch.device, ranks: int) -> int:
    """Returns the images per step, over all ranks, that fill the memory of `device`.

    Short trainings with two sizes of batches, as processes of their own, say what an image takes. A
    last one shows that the result fits; if it does not, fewer are tried. They see the first steps
    of the first stage alone. A run that goes on keeps its size.
    Raises InputError if not even two images fit, where memory cannot be measured, with --fsdp, and
    if the ranks cannot share the size of the run.
    """
    folder = Path(args.resume or args.output)
    if (args.resume or args.output) and (folder / "args.json").exists():
        size = read_args(folder, Path(sys.argv[0]).stem).get("batch_size")
        if isinstance(size, int) and size % ranks:
            raise InputError(f"--batch-size {size} of {folder} is not a multiple of {ranks} ranks")
        if isinstance(size, int):
            log.info("--batch-size auto: %d, as in %s", size, folder)
            return size
    if args.fsdp and ranks > 1:
        raise InputError("--batch-size auto measures one process, which --fsdp does not; give it")
    if not (peak_memory(device) or device.type == "cuda"):
        raise InputError("--batch-size auto: this system does not tell its memory; give a number")
    few, more = measured(2), measured(8)
    if few is None:
        raise InputError("--batch-size auto: not even 2 images fit; lower --image-size")
    size = 2
    if more is not None:
        per_image = max((more - few) / 6, 1e6)
        fixed = few - 2 * per_image
        # on a CPU the ranks of a machine share its memory
        local = environment_number("LOCAL_WORLD_SIZE", 1) if device.type == "cpu" else 1
        size = max(2, int((SHARE * total_memory(device) / local - fixed) / per_image))
        while size > 2 and measured(size) is None:
            size = max(2, int(0.8 * size))
    log.info("--batch-size auto: %d images on each of %d ranks", size, ranks)
    return size * ranks


def measured(size: int) -> int | None:
    """Returns the peak bytes of a training of this command with `size` images per step.

    None: the memory was not enough. Raises InputError if the training fails otherwise.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--batch-size", size, "--output", folder, "--eval-every", 0, "--workers", 0]
        command = [sys.executable, *sys.argv, *map(str, flags), "--track", ""]
        done = subprocess.run(
            command, env=environment | {MEASURE: "1"}, capture_output=True, text=True
        )
        file = Path(folder) / RECORD
        if done.returncode == 0 and file.exists():
            return json.loads(file.read_text())["peak"]
    line = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    # an error of `common.rescue`, or a kill, as for its memory
    if "the memory is not enough" in line[0] or done.returncode < 0:
        return None
    raise InputError(f"--batch-size auto: a training of {size} images failed: {line[0]}")


def end_if_measured(step: int, last: int, device: torch.device, folder: Path) -> None:
    """Writes the peak memory and ends the process, if `measured` has started this training.

    It does so after PROBE_STEPS steps, or after the last one. It also writes the seconds of that
    step, 0 if it is the only one. folder: of the run
    """
    if MEASURE not in os.environ:
        return
    _ends.append(time.perf_counter())
    if step >= min(PROBE_STEPS, last):
        seconds = _ends[-1] - _ends[-2] if len(_ends) > 1 else 0
        record = {"peak": peak_memory(device), "seconds": seconds}
        (folder / RECORD).write_text(json.dumps(record))
        raise SystemExit(0)
