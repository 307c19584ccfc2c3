"""Profiles training steps of a method's demonstration, and prints the longest operations as json.

    python -m benchmarks.small_step metr 5

`benchmarks.operations.small_profiles` starts it: two trainings in one process would share state.
"""

import importlib
import json
import sys
import tempfile

from torch.profiler import ProfilerActivity, profile

from common.command import run_command
from common.demo import commands
from common.runlog import RunLog

FIRST, LAST = 3, 7  # steps between whose ends is measured


def longest(profiler: profile, field: str, count: int) -> list[tuple[str, int, float]]:
    """Returns (operation, calls, share of all time) of the longest. field: of profiler events"""
    events = sorted(profiler.key_averages(), key=lambda e: getattr(e, field), reverse=True)
    total = sum(getattr(event, field) for event in events)
    return [(event.key, event.count, getattr(event, field) / total) for event in events[:count]]


def main() -> None:
    method, count = sys.argv[1], int(sys.argv[2])
    profiler = profile(activities=[ProfilerActivity.CPU])
    log_step = RunLog.step

    def step(self, number: int, *given) -> None:
        log_step(self, number, *given)
        if number == FIRST:
            profiler.start()
        if number == LAST:
            profiler.stop()
            operations = longest(profiler, "self_cpu_time_total", count)
            rows = [(name, calls / (LAST - FIRST), share) for name, calls, share in operations]
            print(json.dumps(rows))
            sys.exit()

    RunLog.step = step
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", str(LAST + 1), "--device", "cpu", "--output", f"{folder}/run"]
        runs = commands(method, flags)
        # the last training, the method itself, of those that need no earlier one
        flags = [run for run in runs if sum(folder in flag for flag in run) == 1][-1]
        sys.argv = [method, *flags]
        module = importlib.import_module(method)
        run_command(module.main)


if __name__ == "__main__":
    main()
