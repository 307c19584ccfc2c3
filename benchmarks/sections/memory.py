"""Peak memory of a process that trains one model for two steps."""

from collections.abc import Iterator

from benchmarks.paired import Options, Row, has_peer, peak_memory
from benchmarks.sections.training import CLASSES, PEER, SEGMENTED

DETECTORS = [("scaledet", "fasterrcnn"), ("detic", "maskrcnn")]


def rows(options: Options) -> Iterator[Row]:
    """Yields a row for each method: detectors at the largest size, segmenters at the smallest."""
    setting = options.setting(options.sides[-1], CLASSES)
    for ours, peer in DETECTORS:
        row = Row(
            "memory", f"{ours} training, {setting.side} px", ours, peer, "eager", unit="GB", goal=1
        )
        for name in (ours, peer):
            row.values[name] = [peak_memory(f"benchmarks.detectors:{name}_step", setting)]
        yield row
    if not has_peer(PEER):
        return
    setting = options.setting(options.sides[0], SEGMENTED)
    peaks = {}
    for name in ("dataseg", "lmseg", PEER):
        peaks[name] = [peak_memory(f"benchmarks.segmenters:{name}_step", setting)]
    for ours in ("dataseg", "lmseg"):
        row = Row(
            "memory", f"{ours} training, {setting.side} px", ours, PEER, "eager", unit="GB", goal=1
        )
        row.values = {name: peaks[name] for name in (ours, PEER)}
        yield row
