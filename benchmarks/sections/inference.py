"""Predictions, with all post-processing: detectors against torchvision, segmenters against HF's."""

from collections.abc import Iterator

import detic
import scaledet
from benchmarks import segmenters
from benchmarks.detectors import peer_predictor, predictor
from benchmarks.paired import Options, Row, fill, has_peer

CLASSES, SEGMENTED = 446, 150
PEER = "transformers"


def rows(options: Options) -> Iterator[Row]:
    """Yields a row for each method, size, task and mode. A prediction is never compiled."""
    modes = [mode for mode in options.modes if mode != "compiled"]
    for side in options.sides:
        for mode in modes:
            yield from detector_rows(options, side, mode)
    if not has_peer(PEER):
        return
    for side in options.sides if options.on_gpu else options.sides[:1]:
        for mode in modes:
            for task in segmenters.TASKS:
                yield from segmenter_rows(options, side, mode, task)


def detector_rows(options: Options, side: int, mode: str) -> Iterator[Row]:
    """Yields the rows of both detectors. Detic's is there with 300 detections, and 100."""
    setting = options.setting(side, CLASSES, mode)
    size = f"{side} px, batch {setting.batch}"
    functions = {
        "scaledet": predictor(scaledet, setting),
        "fasterrcnn_v2": peer_predictor("fasterrcnn_resnet50_fpn_v2", setting),
    }
    row = Row("inference", f"scaledet, {size}", *functions, mode, goal=3)
    yield from fill([row], functions, options)
    functions = {
        "detic": predictor(detic, setting),
        "detic, 100": predictor(detic, setting, limit=100),
        "maskrcnn_v2": peer_predictor("maskrcnn_resnet50_fpn_v2", setting),
    }
    found = []
    for ours, count in (("detic", 300), ("detic, 100", 100)):
        what = f"detic with masks, {count} detections, {size}"
        found.append(Row("inference", what, ours, "maskrcnn_v2", mode, goal=1.2))
    yield from fill(found, functions, options)


def segmenter_rows(options: Options, side: int, mode: str, task: str) -> list[Row]:
    """Returns the rows of both segmenters for a task of `segmenters.TASKS`."""
    setting = options.setting(side, SEGMENTED, mode)
    functions = {
        "dataseg": segmenters.dataseg_predictor(setting, task),
        "lmseg": segmenters.lmseg_predictor(setting, task),
        PEER: segmenters.transformers_predictor(setting, task),
    }
    found = []
    for ours in ("dataseg", "lmseg"):
        what = f"{ours} {task}, {side} px, batch {setting.batch}"
        found.append(Row("inference", what, ours, PEER, mode, goal=2))
    return fill(found, functions, options)
