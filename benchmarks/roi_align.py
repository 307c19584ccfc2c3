"""Speed of RoIAlign on the CPU, alone and in a training step of scaledet.py, against torchvision's.

Alone: forward and backward of 512 regions an image from maps of strides 8, 16 and 32 with 256
channels. The sides of the boxes are log-uniform between 16 pixels and the image's. A step is
forward, matching, losses, backward, clipping and AdamW of the detector with its default settings,
random weights and images of noise. The peer is torchvision's roi_align, level by level, with a
rearrangement in the order of the boxes. The two take turns in one process; ratios are those of
medians. CPU seconds are those of all threads of this process: others on the machine change them
less. `load` is the machine's load average before and after.

    python benchmarks/roi_align.py           # writes benchmarks/roi_align-<device>.json
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common.boxes
from benchmarks.detectors import random_boxes, scaledet_step
from benchmarks.paired import Setting, compare, cpu_name, load, record_path, write_json
from common.boxes import pool_rois
from common.roi_align import roi_align

STRIDES = [8, 16, 32]
CHANNELS, REGIONS = 256, 512


def native(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    resolution: int,
) -> Tensor:
    """Does what `common.roi_align.roi_align` does, by torchvision's kernel."""
    rois = torch.cat([image[:, None].to(boxes), boxes], 1)  # (R, 5)
    rows = [(level == i).nonzero().squeeze(1) for i in range(len(features))]
    pooled = [
        torchvision.ops.roi_align(feature, rois[row], resolution, 1 / stride, aligned=True)
        for feature, stride, row in zip(features, strides, rows)
    ]
    order = torch.cat(rows).argsort()
    return torch.cat(pooled)[order]


KERNELS = {"concord": roi_align, "torchvision": native}


def pooling(side: int, batch: int) -> Callable[[], float]:
    """Returns a function that pools forward and backward, and returns a gradient's norm."""
    features = [torch.randn(batch, CHANNELS, side // s, side // s) for s in STRIDES]
    features = [feature.requires_grad_() for feature in features]
    boxes = [random_boxes(REGIONS, side) for _ in range(batch)]
    cotangent = torch.randn(batch * REGIONS, CHANNELS, 7, 7)

    def step() -> float:
        pooled = pool_rois(features, STRIDES, boxes, 7)
        first, *_ = torch.autograd.grad(pooled, features, cotangent)
        return first.norm().item()

    return step


def with_kernel(name: str, step: Callable[[], float], results: dict) -> Callable[[], None]:
    """Returns a function that takes `step` with a kernel and keeps its result."""

    def run() -> None:
        with patch.object(common.boxes, "roi_align", KERNELS[name]):
            results[name] = step()

    return run


def measure(step: Callable[[], float], repeats: int) -> dict:
    """Times `step` with each kernel in turn."""
    results = {}
    before = load()
    functions = {name: with_kernel(name, step, results) for name in KERNELS}
    taken = compare(functions, repeats, limit=math.inf)
    record = {"result": results, "load": [before, load()]}
    times = {}
    for clock in ("seconds", "CPU seconds"):
        times[clock] = {name: [round(x, 4) for x in taken[name][clock]] for name in KERNELS}
        medians = {name: statistics.median(values) for name, values in times[clock].items()}
        ratio = medians["torchvision"] / medians["concord"]
        record[f"median {clock}"] = medians
        record[f"ratio of {clock}"] = round(ratio, 2)
    return record | times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[320, 640], help="sides of the images, pixels"
    )
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--classes", type=int, default=446, help="classes of the detector")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each alone")
    parser.add_argument("--steps", type=int, default=5, help="timed training steps of each")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = cpu_name()
    record = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        **vars(args),
        "results": {},
    }
    for side in args.sizes:
        alone = measure(pooling(side, args.batch), args.repeats)
        step = measure(scaledet_step(Setting(side, args.batch, args.classes)), args.steps)
        record["results"][side] = {"alone": alone, "training step": step}
        print(side, json.dumps(record["results"][side], indent=1), flush=True)
    path = record_path("roi_align", device)
    write_json(path, record)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
