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
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mask2former_step import cpu_name, embed_at_random, record_path

import common.boxes
import scaledet
from common.batch import Sample, collate
from common.boxes import pool_rois
from common.labels import LabelSpace, Vocabulary
from common.roi_align import roi_align

STRIDES = [8, 16, 32]
CHANNELS, REGIONS, BOXES = 256, 512, 8


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


def random_boxes(count: int, side: int) -> Tensor:
    """Returns boxes (count, 4) inside an image of side x side pixels."""
    logarithm = torch.rand(count, 2) * torch.tensor(side / 16).log()
    half = 8 * logarithm.exp()
    centre = torch.rand(count, 2) * side
    return torch.cat([centre - half, centre + half], 1).clamp(0, side)


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


def training(side: int, batch: int, classes: int) -> Callable[[], float]:
    """Returns a function that takes one training step and returns the loss."""
    args = scaledet.Args(amp="off")
    vocabulary = Vocabulary("lvis", tuple(f"class {i}" for i in range(classes)))
    label_space = LabelSpace([vocabulary], embed_at_random)
    federated = torch.full((classes,), -1.0)
    tables = scaledet.LabelTables.of(args, label_space.text, federated)
    model = scaledet.Model(args, label_space, pretrained=False)
    model.train()
    samples = []
    for i in range(batch):
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        sample = Sample.unlabelled(image, "lvis", i, i)
        sample.boxes = random_boxes(BOXES, side)
        sample.labels = torch.randperm(classes)[:BOXES]
        samples.append(sample)
    inputs = collate(samples)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-4)  # all steps are the same

    def step() -> float:
        targets = scaledet.prepare_targets(inputs, label_space)
        outputs = model(inputs.images, inputs.sizes, targets, label_space.text)
        losses = scaledet.compute_losses(args, *outputs, targets, tables)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        return losses["loss"].item()

    return step


def compare(step: Callable[[], float], repeats: int) -> dict:
    """Times `step` with each kernel in turn. The first round warms up and is not counted."""
    clocks = {"seconds": time.perf_counter, "CPU seconds": time.process_time}
    times = {clock: {name: [] for name in KERNELS} for clock in clocks}
    results = {}
    load = os.getloadavg()[0]
    for repeat in range(repeats + 1):
        for name, kernel in KERNELS.items():
            common.boxes.roi_align = kernel
            torch.manual_seed(0)  # the same regions are sampled
            start = {clock: read() for clock, read in clocks.items()}
            results[name] = step()
            if repeat:
                for clock, read in clocks.items():
                    times[clock][name].append(round(read() - start[clock], 4))
    record = {"result": results, "load": [round(load, 1), round(os.getloadavg()[0], 1)]}
    for clock, of_kernels in times.items():
        medians = {name: statistics.median(taken) for name, taken in of_kernels.items()}
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
        alone = compare(pooling(side, args.batch), args.repeats)
        step = compare(training(side, args.batch, args.classes), args.steps)
        record["results"][side] = {"alone": alone, "training step": step}
        print(side, json.dumps(record["results"][side], indent=1), flush=True)
    path = record_path("roi_align", device)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
