"""Deformable attention, forward and backward, against the peers of benchmarks/msda.py."""

import argparse
from collections.abc import Iterator

import torch

from benchmarks.msda import measure
from benchmarks.paired import Options, Row


def rows(options: Options) -> Iterator[Row]:
    """Yields a row for each size, pass and peer, in ms."""
    compiled = "compiled" in options.modes
    repeats = 2 if options.quick else 100 if options.on_gpu else 5
    settings = argparse.Namespace(batch=2, spread=3, repeats=repeats, no_compile=not compiled)
    device = torch.device(options.device)
    flush = torch.zeros(2**30 if options.on_gpu else 2**20, dtype=torch.uint8, device=device)
    for side in options.sides:
        result = measure(side, settings, device, flush)
        for title in ("forward", "forward + backward"):
            times = {}
            for name, value in result[title].items():
                if isinstance(value, dict):
                    times[name] = [value["median, ms"]]
            for peer in times.keys() - {"concord"}:
                what = f"{title}, {side} px, {peer}"
                row = Row("attention", what, "concord", peer, unit="ms", goal=1)
                row.values = {name: times[name] for name in ("concord", peer)}
                yield row
