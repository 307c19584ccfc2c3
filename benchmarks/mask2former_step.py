"""A training step of Mask2Former, the base of dataseg.py and lmseg.py, against transformers'.

Both have timm's ResNet-50 with frozen BatchNorm, 6 + 9 layers of 256 channels, 100 queries, 12544
points, the same images and segments. A step is forward, matching, losses, backward, clipping and
AdamW. Steps alternate in one process; the ratio is that of medians. Peak memory is that of a
process of each alone. Needs `pip install transformers`.

    python benchmarks/mask2former_step.py    # writes benchmarks/mask2former_step-<device>.json
"""

import argparse
import json
import math
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import paired
from benchmarks.paired import Setting
from benchmarks.segmenters import dataseg_step, transformers_step

STEPS = {"concord": dataseg_step, "transformers": transformers_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=320, help="side of the square images, pixels")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    setting = Setting(args.size, args.batch, classes=150, device=device)
    steps = {name: make(setting) for name, make in STEPS.items()}
    taken = paired.compare(steps, args.repeats, math.inf, device)
    seconds = {name: clocks["seconds"] for name, clocks in taken.items()}
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    memory = {}
    for name, make in STEPS.items():
        peak = paired.peak_memory(f"{make.__module__}:{make.__name__}", setting)
        memory[name] = round(peak, 2)
    record = {
        "device": paired.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "images": [args.batch, 3, args.size, args.size],
        "classes": setting.classes,
        "median seconds per step": medians,
        "ratio": round(medians["transformers"] / medians["concord"], 2),
        "peak memory, GB": memory,
        "seconds": {name: [round(t, 3) for t in times] for name, times in seconds.items()},
    }
    print(json.dumps(record, indent=1))
    paired.write_json(paired.record_path("mask2former_step", record["device"]), record)


if __name__ == "__main__":
    main()
