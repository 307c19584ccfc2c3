"""The operations that take most time in a training step of each method, by torch.profiler."""

import json
import sys

from torch.profiler import ProfilerActivity, profile

from benchmarks import detectors, segmenters
from benchmarks.paired import HERE, Options, run, wait
from benchmarks.report import markdown_row, markdown_table
from benchmarks.small_step import longest

TOP = 10
SMALL_TOP = 5
STEPS = {
    "scaledet": (detectors.scaledet_step, 446),
    "detic": (detectors.detic_step, 446),
    "dataseg": (segmenters.dataseg_step, 150),
    "lmseg": (segmenters.lmseg_step, 150),
}


def top_operations(name: str, options: Options) -> list[tuple[str, int, float]]:
    """Returns (operation, calls, share of the device's time) of a step, the longest first."""
    make, classes = STEPS[name]
    step = make(options.setting(options.sides[0], classes, options.modes[0]))
    step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * options.on_gpu
    with profile(activities=kinds) as profiler:
        step()
        wait(options.device)
    field = "self_device_time_total" if options.on_gpu else "self_cpu_time_total"
    return longest(profiler, field, TOP)


def cell(key: str, calls: float, share: float) -> str:
    """Returns what a table says of an operation."""
    key = key.removeprefix("aten::")[:48].replace("|", "/")
    return f"{key} ({calls:g}) {share:.1%}"


def profiles(options: Options) -> str:
    """Returns a markdown table of the top operations of four methods, side by side."""
    columns = {name: top_operations(name, options) for name in STEPS}
    lines = []
    for of_methods in zip(*columns.values()):
        lines.append(markdown_row(cell(*operation) for operation in of_methods))
    return markdown_table(columns, lines)


def small_profiles() -> str:
    """Returns a markdown table of the top operations of all methods with --tiny, a row each."""
    lines = []
    for path in sorted(HERE.parent.glob("*.py")):
        if "\nDEMO = " in path.read_text():
            module = "benchmarks.small_step"
            command = [sys.executable, "-m", module, path.stem, str(SMALL_TOP)]
            output = run(command).splitlines()[-1]
            cells = [cell(*operation) for operation in json.loads(output)]
            lines.append(markdown_row([path.stem, ", ".join(cells)]))
    return markdown_table(["method", "operations"], lines)
