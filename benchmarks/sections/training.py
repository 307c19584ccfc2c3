"""Training steps: detectors against torchvision, segmenters against Hugging Face transformers."""

from collections.abc import Iterator

from benchmarks import detectors, segmenters
from benchmarks.paired import Options, Row, fill, has_peer

CLASSES, SEGMENTED = 446, 150
PAIRS = [
    ("scaledet", detectors.scaledet_step, "fasterrcnn_v2", detectors.fasterrcnn_step),
    ("detic", detectors.detic_step, "maskrcnn_v2", detectors.maskrcnn_step),
]
PEER = "transformers"
# least ratios
DETECTORS = {"eager": 1.5, "compiled": 1.5, "bf16": 1.8}
SEGMENTERS = {"eager": 1.7, "compiled": 1.7, "bf16": 1.5}


def rows(options: Options) -> Iterator[Row]:
    """Yields a row for each method, size and mode."""
    for side in options.sides:
        for mode in options.modes_of(side):
            setting = options.setting(side, CLASSES, mode)
            for ours, make, peer, make_peer in PAIRS:
                what = f"{ours}, {side} px, batch {setting.batch}"
                row = Row("training", what, ours, peer, mode, goal=DETECTORS[mode])
                functions = {ours: make(setting), peer: make_peer(setting)}
                yield from fill([row], functions, options)
    if not has_peer(PEER):
        return
    for side in options.sides if options.on_gpu else options.sides[:1]:
        for mode in options.modes_of(side):
            yield from segmenter_rows(options, side, mode)


def segmenter_rows(options: Options, side: int, mode: str) -> list[Row]:
    """Returns the rows of both segmenters, which take turns with one peer."""
    setting = options.setting(side, SEGMENTED, mode)
    functions = {
        "dataseg": segmenters.dataseg_step(setting),
        "lmseg": segmenters.lmseg_step(setting),
        PEER: segmenters.transformers_step(setting),
    }
    found = []
    for ours in ("dataseg", "lmseg"):
        what = f"{ours}, {side} px, batch {setting.batch}"
        found.append(Row("training", what, ours, PEER, mode, goal=SEGMENTERS[mode]))
    return fill(found, functions, options)
