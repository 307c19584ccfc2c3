"""What more classes cost: a training step with thousands of classes against the same with 80.

The loss is LVIS's federated one, so that a step trains 50 of the classes.
"""

from collections.abc import Iterator

from benchmarks import detectors
from benchmarks.paired import Options, Row, fill, peak_memory

COUNTS, FEW = (80, 1203, 22_000), (80, 200)
GOAL = 1 / 1.15  # at most 15 % slower


def rows(options: Options) -> Iterator[Row]:
    """Yields, for each detector and number of classes, a row of time and one of peak memory."""
    first, *more = FEW if options.quick else COUNTS
    base = f"{first} classes"
    for method in ("scaledet", "detic"):
        settings = {}
        for count in (first, *more):
            settings[f"{count} classes"] = options.setting(options.sides[0], count)
        make = getattr(detectors, f"federated_{method}_step")
        functions = {name: make(setting) for name, setting in settings.items()}
        found = []
        for name in functions.keys() - {base}:
            found.append(Row("classes", f"{method} step, {name}", name, base, "eager", goal=GOAL))
        found.sort(key=lambda row: settings[row.ours].classes)
        yield from fill(found, functions, options)
        functions.clear()
        maker = f"benchmarks.detectors:federated_{method}_step"
        peaks = {name: [peak_memory(maker, setting)] for name, setting in settings.items()}
        for timed in found:
            row = Row(
                "classes", f"{method} memory, {timed.ours}", timed.ours, base, "eager", unit="GB"
            )
            row.values = {name: peaks[name] for name in (row.ours, base)}
            yield row
