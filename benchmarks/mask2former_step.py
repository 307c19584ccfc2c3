"""A training step of Mask2Former, the base of dataseg.py and lmseg.py, against transformers'.

Both have timm's ResNet-50 with frozen BatchNorm, 6 + 9 layers of 256 channels, 100 queries, 12544
points, the same images and segments. A step is forward, matching, losses, backward, clipping and
AdamW. Steps alternate in one process; the ratio is that of medians. Peak memory is that of a
process of each alone. Needs `pip install transformers`.

    python benchmarks/mask2former_step.py    # writes benchmarks/mask2former_step-<device>.json
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataseg
from common.batch import Sample, collate
from common.labels import LabelSpace, Vocabulary

CLASSES, SEGMENTS = 150, 8


def data(side: int, batch: int) -> list[Sample]:
    """Images of noise, each with a grid of SEGMENTS segments of random classes."""
    samples = []
    for i in range(batch):
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        sample = Sample.unlabelled(image, "ade20k", i, i)
        sample.supervision, sample.labels = "semantic", torch.randperm(CLASSES)[:SEGMENTS]
        cell = torch.arange(side) * 4 // side
        sample.segments = (cell[:, None] // 2 * 4 + cell).short()
        samples.append(sample)
    return samples


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def embed_at_random(names: tuple[str, ...], dataset: str) -> torch.Tensor:
    """Random text embeddings (C, 512) of unit norm."""
    return nn.functional.normalize(torch.randn(len(names), 512))


def ours(side: int, batch: int, device: torch.device) -> Callable[[], float]:
    """Returns a function that takes one step and returns the loss."""
    args = dataseg.Args(merge_in_training=False)  # one proposal per target, as Mask2Former
    vocabulary = Vocabulary("ade20k", tuple(f"class {i}" for i in range(CLASSES)))
    label_space = LabelSpace([vocabulary], embed_at_random).to(device)
    model = dataseg.Model(args, label_space, pretrained=False).to(device)
    model.train()
    freeze_norms(model)
    inputs = collate(data(side, batch)).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
    )
    merged = torch.ones(CLASSES, dtype=torch.bool, device=device)

    def step() -> float:
        output = model(inputs.images, inputs.sizes, label_space.text)
        targets = dataseg.prepare_targets(inputs, merged)
        losses = dataseg.compute_losses(args, output, targets, merged)
        return update(model, optimizer, losses["loss"])

    return step


def theirs(side: int, batch: int, device: torch.device) -> Callable[[], float]:
    """Returns the same step of Hugging Face's model."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        TimmBackboneConfig,
    )

    backbone = TimmBackboneConfig(
        backbone="resnet50", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)
    model = Mask2FormerForUniversalSegmentation(config).to(device)
    model.train()
    freeze_norms(model)
    samples = data(side, batch)
    images = torch.stack([s.image for s in samples]).to(device)
    masks = [
        (s.segments == torch.arange(SEGMENTS)[:, None, None]).float().to(device) for s in samples
    ]
    classes = [s.labels.to(device) for s in samples]
    mean, std = (
        torch.tensor(x, device=device).view(3, 1, 1)
        for x in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
    )

    def step() -> float:
        loss = model(
            pixel_values=(images - mean) / std, mask_labels=masks, class_labels=classes
        ).loss
        return update(model, optimizer, loss)

    return step


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return loss.item()  # waits for the device


SIDES = {"concord": ours, "transformers": theirs}


def peak_memory(side: int, batch: int, name: str) -> float:
    """GB of resident memory of a process that takes three steps."""
    command = [
        sys.executable,
        __file__,
        "--size",
        str(side),
        "--batch",
        str(batch),
        "--alone",
        name,
    ]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=320, help="side of the square images, pixels")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each")
    parser.add_argument(
        "--alone", choices=SIDES, help="three steps of one of them, then its peak memory in GB"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if args.alone:
        step = SIDES[args.alone](args.size, args.batch, device)
        for _ in range(3):
            step()
        # ru_maxrss would begin with the memory of the parent process
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        on_host = int(status["VmHWM"].split()[0]) / 2**20
        print(torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else on_host)
        return
    steps = {name: make(args.size, args.batch, device) for name, make in SIDES.items()}
    seconds = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):  # the first warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    import transformers

    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "images": [args.batch, 3, args.size, args.size],
        "classes": CLASSES,
        "median seconds per step": medians,
        "ratio": round(medians["transformers"] / medians["concord"], 2),
        "peak memory, GB": {
            name: round(peak_memory(args.size, args.batch, name), 2) for name in steps
        },
        "seconds": {name: [round(t, 3) for t in times] for name, times in seconds.items()},
    }
    print(json.dumps(record, indent=1))
    path = record_path("mask2former_step", record["device"])
    path.write_text(json.dumps(record, indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def record_path(benchmark: str, device: str) -> Path:
    """The json file beside this one that keeps what `benchmark` measured on a device."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return Path(__file__).parent / f"{benchmark}-{name}.json"


if __name__ == "__main__":
    main()
