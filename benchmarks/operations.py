"""The operations that take most time in a training step of each method, by torch.profiler."""

from torch.profiler import ProfilerActivity, profile

from benchmarks import detectors, segmenters
from benchmarks.paired import Options, wait

TOP = 10
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
    events = sorted(profiler.key_averages(), key=lambda e: getattr(e, field), reverse=True)
    total = sum(getattr(event, field) for event in events)
    return [(event.key, event.count, getattr(event, field) / total) for event in events[:TOP]]


def profiles(options: Options) -> str:
    """Returns a markdown table of the top operations of all methods, side by side."""
    columns = {name: top_operations(name, options) for name in STEPS}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for of_methods in zip(*columns.values()):
        cells = []
        for key, count, share in of_methods:
            key = key.removeprefix("aten::")[:48].replace("|", "/")
            cells.append(f"{key} ({count}) {share:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
