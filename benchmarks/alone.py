"""Builds a step in this process alone, takes it twice, and prints the peak memory in GB.

    python -m benchmarks.alone benchmarks.detectors:scaledet_step '{"side": 320}'

`benchmarks.paired.peak_memory` starts it.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.paired import Setting


def main() -> None:
    module, name = sys.argv[1].split(":")
    setting = Setting(**json.loads(sys.argv[2]))
    torch.manual_seed(0)
    step = getattr(importlib.import_module(module), name)(setting)
    for _ in range(2):
        step()
    if torch.device(setting.device).type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
        return
    # ru_maxrss would begin with the memory of the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    print(int(fields["VmHWM"].split()[0]) / 2**20)


if __name__ == "__main__":
    main()
