"""Speed of multi-scale deformable attention, as in Mask2Former's pixel decoder, against peers.

The peers are the formula in PyTorch (`formula`), the formula under torch.compile, and the function
of Hugging Face transformers. Every pixel of strides 32, 16 and 8 is a query, with 8 heads of 32
channels and 4 points. Times are medians of runs that take turns. On a GPU, values are bfloat16 and
the cache is flushed before each run. The floor is the time of the memory traffic that no
implementation avoids (each input read once, each output written once), at the speed of a plain
copy on this device. A peer that cannot run is skipped with a printed line.

    python benchmarks/msda.py                        # writes benchmarks/msda-<device>.json
    python benchmarks/msda.py --sizes 320 --repeats 5
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.paired import device_name, record_path, write_json
from common.msda import formula, msda, triton

HEADS, CHANNELS, POINTS = 8, 32, 4


def sample_inputs(side: int, batch: int, spread: float, device: torch.device) -> tuple:
    """Returns value, shapes, offsets, logits and the centres (S, 2) of all pixels.

    Offsets are normal with a standard deviation of `spread` pixels.
    """
    shapes = tuple((side // stride, side // stride) for stride in (32, 16, 8))
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centres.append(torch.stack([x / width, y / height], -1).flatten(0, 1))
    centres = torch.cat(centres).to(device)  # (S, 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = (batch, len(centres), HEADS)
    value = torch.randn(*size, CHANNELS, device=device, dtype=dtype)
    offsets = torch.randn(*size, len(shapes), POINTS, 2, device=device) * spread
    logits = torch.randn(*size, len(shapes) * POINTS, device=device)
    for tensor in (value, offsets, logits):
        tensor.requires_grad_()
    return value, shapes, offsets, logits, centres


def transformers_msda() -> Callable:
    """Returns Hugging Face's function with our signature. Raises ImportError if it is missing."""
    from transformers.models.mask2former import modeling_mask2former

    def call(
        value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, centres: Tensor
    ) -> Tensor:
        size = torch.tensor([(width, height) for height, width in shapes], device=value.device)
        where = centres[:, None, None, None] + offsets / size[:, None]  # (B, Q, M, L, P, 2)
        weights = logits.softmax(-1).unflatten(-1, (len(shapes), POINTS))
        where = where.to(value.dtype)
        weights = weights.to(value.dtype)
        attend = modeling_mask2former.multi_scale_deformable_attention
        return attend(value, shapes, where, weights)

    return call


def megabytes(
    value: Tensor, offsets: Tensor, logits: Tensor, centres: Tensor
) -> tuple[float, float]:
    """Returns the unavoidable traffic in MB of forward, and of forward and backward.

    `out` and its gradient are float32. The gradient of value has the size of value.
    """
    out = value.numel() * 4 / 1e6
    samples = (offsets.nbytes + logits.nbytes) / 1e6
    inputs = value.nbytes / 1e6 + samples + centres.nbytes / 1e6
    forward = inputs + out
    # reads the inputs, out and its gradient; writes the gradients of value and of the samples
    backward = inputs + 2 * out + value.nbytes / 1e6 + samples
    return forward, forward + backward


def clock(step: Callable, device: torch.device, flush: Tensor) -> float:
    """Returns the seconds that one call of `step` takes. On a GPU, `flush` is overwritten first."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    # empties the cache, and takes so long that the kernels of `step` are queued when it ends
    flush.zero_()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def working_functions(functions: dict[str, Callable], run: Callable, title: str) -> dict:
    """Returns the functions that `run` can run. The others are skipped with a printed line.

    Each is run three times, to compile it and to warm up.
    """
    working = {}
    for label, function in functions.items():
        try:
            for _ in range(3):
                run(function)
            working[label] = function
        except (RuntimeError, NotImplementedError) as error:  # no compiler, memory or such dtype
            print(f"{label}: {title} skipped, {str(error).splitlines()[0]}")
    return working


def copy_speed(device: torch.device, flush: Tensor) -> float:
    """Returns the traffic of a plain copy in MB/s, reading and writing."""
    half, other = flush.chunk(2)
    seconds = min(clock(partial(half.copy_, other), device, flush) for _ in range(5))
    return flush.nbytes / 1e6 / seconds


def measure(side: int, args: argparse.Namespace, device: torch.device, flush: Tensor) -> dict:
    """Returns {pass: {"floor, ms": ..., implementation: {"median, ms": ...}}} of one image size."""
    inputs = sample_inputs(side, args.batch, args.spread, device)
    value, shapes, offsets, logits, centres = inputs
    cotangent = torch.randn(*value.shape[:2], HEADS * CHANNELS, device=device)
    cotangents = {dtype: cotangent.to(dtype) for dtype in (torch.float32, value.dtype)}
    functions = {"concord": msda, "formula": formula}
    if not args.no_compile:
        functions["formula, compiled"] = torch.compile(formula, dynamic=False)
    try:
        functions["transformers"] = transformers_msda()
    except ImportError as error:
        print(f"transformers: skipped, {error}")

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(*inputs)

    def both(function: Callable) -> None:
        out = function(*inputs)
        torch.autograd.grad(out, (value, offsets, logits), cotangents[out.dtype])

    speed = copy_speed(device, flush)
    result = {"shapes": shapes, "copy, GB/s": round(speed / 1e3, 1)}
    traffic = megabytes(value, offsets, logits, centres)
    for title, run, floor in zip(("forward", "forward + backward"), (forward, both), traffic):
        working = working_functions(functions, run, title)
        times = {label: [] for label in working}
        for _ in range(args.repeats):  # in turns, as the machine may be busy at times
            for label, function in working.items():
                times[label].append(clock(partial(run, function), device, flush))
        floor_ms = floor / speed * 1e3
        setting = f"{side} x {side}, {args.batch} images, {title}"
        print(f"{setting}: floor {floor:.0f} MB, {floor_ms:.3f} ms")
        result[title] = {"floor, MB": round(floor, 1), "floor, ms": round(floor_ms, 4)}
        for label, seconds in times.items():
            median = statistics.median(seconds)
            slower = median / statistics.median(times["concord"])
            rate = floor / median / 1e3
            print(f"  {label:20s} {median * 1e3:9.3f} ms {rate:8.1f} GB/s {slower:7.2f} x concord")
            result[title][label] = {
                "median, ms": round(median * 1e3, 3),
                "min, ms": round(min(seconds) * 1e3, 3),
                "GB/s": round(rate, 3),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[512, 640, 1024] if cuda else [320, 512]
    )
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument(
        "--repeats", type=int, default=100 if cuda else 5, help="timed runs of each"
    )
    parser.add_argument(
        "--spread", type=float, default=3, help="standard deviation of offsets, pixels"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    name = device_name(device)
    flush = torch.zeros(2**30 if cuda else 2**28, dtype=torch.uint8, device=device)
    report = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        **vars(args),
        "threads": None if cuda else torch.get_num_threads(),
    }
    report["results"] = {side: measure(side, args, device, flush) for side in args.sizes}
    path = record_path("msda", name)
    write_json(path, report)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
