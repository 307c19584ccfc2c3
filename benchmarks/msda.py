"""Multi-scale deformable attention as in Mask2Former's pixel decoder, against three other ways to compute it.

The formula in PyTorch (`reference`), the formula under torch.compile, and the function of Hugging Face transformers.
Every pixel of strides 32, 16 and 8 is a query; 8 heads of 32 channels, 4 points. Medians of runs that take turns; on a
GPU bfloat16 values and a flushed cache. The floor is the traffic that no implementation avoids (each input read once,
each output written once) at the speed of a plain copy on this device. A printed line says what could not run.

    python benchmarks/msda.py                        # writes benchmarks/msda-<device>.json
    python benchmarks/msda.py --sizes 320 --repeats 5
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.msda import msda, reference, triton

HEADS, CHANNELS, POINTS = 8, 32, 4


def draw(side: int, batch: int, spread: float, device: torch.device) -> tuple:
    """value, shapes, offsets, logits, centres of all pixels; offsets from N(0, spread) pixels."""
    shapes = tuple((side // stride, side // stride) for stride in (32, 16, 8))
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centres.append(torch.stack([x / width, y / height], -1).flatten(0, 1))
    centres = torch.cat(centres).to(device)  # (S, 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = batch, len(centres), HEADS
    value = torch.randn(*size, CHANNELS, device=device, dtype=dtype)
    offsets = torch.randn(*size, len(shapes), POINTS, 2, device=device) * spread
    logits = torch.randn(*size, len(shapes) * POINTS, device=device)
    return (
        value.requires_grad_(),
        shapes,
        offsets.requires_grad_(),
        logits.requires_grad_(),
        centres,
    )


def transformers_msda() -> Callable:
    """Hugging Face's function behind our signature. ImportError without transformers."""
    from transformers.models.mask2former.modeling_mask2former import (
        multi_scale_deformable_attention,
    )

    def call(
        value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, centres: Tensor
    ) -> Tensor:
        size = torch.tensor([(width, height) for height, width in shapes], device=value.device)
        where = centres[:, None, None, None] + offsets / size[:, None]  # (B, Q, M, L, P, 2)
        weights = logits.softmax(-1).unflatten(-1, (len(shapes), POINTS))
        return multi_scale_deformable_attention(
            value, shapes, where.to(value.dtype), weights.to(value.dtype)
        )

    return call


def megabytes(
    value: Tensor, offsets: Tensor, logits: Tensor, centres: Tensor
) -> tuple[float, float]:
    """Compulsory traffic of forward, and of forward and backward. `value` also stands for out and its gradient."""
    v, samples, c = (
        sum(x.nbytes for x in xs) / 1e6 for xs in ([value], [offsets, logits], [centres])
    )
    forward = 2 * v + samples + c
    backward = (
        3 * v + samples + c + samples + v
    )  # value, gradient, out, samples -> gradients of samples, of value
    return forward, forward + backward


def clock(step: Callable, device: torch.device, flush: Tensor) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()  # empties the cache, and takes so long that the kernels of `step` are queued when it ends
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(side: int, args: argparse.Namespace, device: torch.device, flush: Tensor) -> dict:
    """{"floor": ..., implementation: {"forward": {...}, "forward + backward": {...}}} of one image size."""
    value, shapes, offsets, logits, centres = inputs = draw(side, args.batch, args.spread, device)
    cotangent = torch.randn(*value.shape[:2], HEADS * CHANNELS, device=device, dtype=value.dtype)
    functions = {"concord": msda, "reference": reference}
    if not args.no_compile:
        functions["reference, compiled"] = torch.compile(reference, dynamic=False)
    try:
        functions["transformers"] = transformers_msda()
    except ImportError as error:
        print(f"transformers: skipped, {error}")

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(*inputs)

    def both(function: Callable) -> None:
        torch.autograd.grad(function(*inputs), (value, offsets, logits), cotangent)

    half, other = flush.chunk(2)
    speed = (
        flush.nbytes / 1e6 / min(clock(partial(half.copy_, other), device, flush) for _ in range(5))
    )  # MB/s
    result = {"shapes": shapes, "copy, GB/s": round(speed / 1e3, 1)}
    traffic = megabytes(value, offsets, logits, centres)
    for name, pass_, floor in zip(("forward", "forward + backward"), (forward, both), traffic):
        working, times = dict(functions), {}
        for label, function in functions.items():  # warm up; compile
            try:
                for _ in range(3):
                    pass_(function)
            except (
                RuntimeError,
                NotImplementedError,
            ) as error:  # no compiler, no memory, no such dtype
                print(f"{label}: {name} skipped, {str(error).splitlines()[0]}")
                del working[label]
        for _ in range(args.repeats):  # in turns, as the machine may be busy at times
            for label, function in working.items():
                times.setdefault(label, []).append(clock(partial(pass_, function), device, flush))
        print(
            f"{side} x {side}, {args.batch} images, {name}: floor {floor:.0f} MB, {floor / speed * 1e3:.3f} ms"
        )
        result[name] = {"floor, MB": round(floor, 1), "floor, ms": round(floor / speed * 1e3, 4)}
        for label, seconds in times.items():
            median = statistics.median(seconds)
            slower = median / statistics.median(times["concord"])
            print(
                f"  {label:20s} {median * 1e3:9.3f} ms {floor / median / 1e3:8.1f} GB/s {slower:7.2f} x concord"
            )
            figures = {
                "median, ms": median * 1e3,
                "min, ms": min(seconds) * 1e3,
                "GB/s": floor / median / 1e3,
            }
            result[name][label] = {key: round(number, 3) for key, number in figures.items()}
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
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    flush = torch.zeros(2**30 if cuda else 2**28, dtype=torch.uint8, device=device)
    report = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        **vars(args),
    }
    report["threads"] = None if cuda else torch.get_num_threads()
    report["results"] = {side: measure(side, args, device, flush) for side in args.sizes}
    path = Path(__file__).parent / f"msda-{name.replace(' ', '-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
