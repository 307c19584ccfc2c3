"""Metrics: box AP against pycocotools and faster-coco-eval; mIoU and PQ counts of one image.

The peers of the two counts are one-liners of numpy in the way of detectron2 (`bincount`) and of
panopticapi (`unique` of pairs, then a loop over them).
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.paired import Options, Row, fill, has_peer
from common.datasets.index import Index
from common.evaluation import evaluate_detections
from common.labels import Vocabulary
from common.segment_metrics import confusion, match_segments

CLASSES, BOXES, DETECTIONS = 80, 7, 100
SEGMENTED, SEGMENTS = 150, 40
SIZE = (512, 683)
CALLS = 5  # of a count in one round


def draw(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws (image, x1, y1, x2, y2, label), and the same with a score, of boxes and detections.

    A part of the detections are moved boxes of the truth.
    """
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (images, BOXES, 2))
    size = rng.uniform(8, 180, (images, BOXES, 2))
    boxes = np.concatenate([corner, corner + size], 2)
    labels = rng.integers(CLASSES, size=(images, BOXES, 1))
    of = rng.integers(BOXES, size=(images, DETECTIONS, 1))
    found = np.take_along_axis(boxes, of, 1) + rng.normal(0, 12, (images, DETECTIONS, 4))
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    found_labels = np.take_along_axis(labels, of, 1)
    wrong = rng.random(found_labels.shape) < 0.7
    found_labels = np.where(wrong, rng.integers(CLASSES, size=wrong.shape), found_labels)
    scores = rng.random(found_labels.shape)
    image = np.arange(images)[:, None, None]
    truth = [np.broadcast_to(image, labels.shape), boxes, labels]
    detections = [np.broadcast_to(image, scores.shape), found, found_labels, scores]
    parts = (np.concatenate(part, 2).reshape(-1, 5 + len(part) - 2) for part in (truth, detections))
    return tuple(part.astype(np.float32).astype(np.float64) for part in parts)


def concord_ap(images: int, truth: np.ndarray, found: np.ndarray) -> Callable[[], float]:
    """Returns a function that computes AP with `evaluate_detections`."""
    size = truth[:, 3:5] - truth[:, 1:3]
    index = Index.build(
        "truth.json",
        [f"{i}.jpg" for i in range(images)],
        list(range(images)),
        np.full((images, 2), 512),
        truth[:, 0],
        truth[:, 1:5],
        truth[:, 5],
        areas=size.prod(1),
        ignore=np.zeros(len(truth)),
    )
    vocabulary = Vocabulary("coco", tuple(f"class {i}" for i in range(CLASSES)))
    dataset = SimpleNamespace(
        name="coco",
        vocabulary=vocabulary,
        index=index,
        metric="coco",
        hierarchy=None,
        frequency=None,
    )
    predictions = {}
    for image, part in enumerate(np.split(torch.from_numpy(found), images)):
        boxes, labels, scores = part[:, 1:5], part[:, 5].long(), part[:, 6]
        record = {"boxes": boxes, "labels": labels, "scores": scores, "size": (512, 512)}
        predictions[image] = record
    return lambda: evaluate_detections(dataset, predictions)["AP"]


def coco_ap(package: str, images: int, truth: np.ndarray, found: np.ndarray) -> Callable:
    """Returns a function that computes AP with a peer. It starts from arrays, as ours does."""
    if package == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    annotations = []
    for i, (image, x1, y1, x2, y2, label) in enumerate(truth.tolist(), 1):
        size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        entry = {"id": i, "image_id": int(image), "category_id": int(label) + 1, "iscrowd": 0}
        annotations.append(entry | size)
    sizes = [{"id": i, "width": 512, "height": 512} for i in range(images)]
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)]
    coco = COCO()
    coco.dataset = {"images": sizes, "annotations": annotations, "categories": categories}
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent:
        coco.createIndex()

    def evaluate() -> float:
        table = np.column_stack(
            [
                found[:, 0],
                found[:, 1:3],
                found[:, 3:5] - found[:, 1:3],
                found[:, 6],
                found[:, 5] + 1,
            ]
        )
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval(coco, coco.loadRes(table), "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return evaluator.stats[0]

    return evaluate


def label_maps() -> tuple[np.ndarray, np.ndarray]:
    """Draws two maps of segments (H, W), which agree for the most part; -1 is void."""
    rng = np.random.default_rng(0)
    cells = rng.integers(-1, SEGMENTS, (16, 16))
    rows, columns = (np.arange(side) * 16 // side for side in SIZE)
    truth = cells[rows][:, columns]
    found = np.roll(truth, (5, 7), (0, 1))
    return truth, np.where(found < 0, 0, found)


def bincount_confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Counts pairs of classes as detectron2 does: void is a class of its own."""
    counts = np.bincount(
        (classes + 1) * found.ravel() + truth.ravel(), minlength=(classes + 1) ** 2
    )
    return counts.reshape(classes + 1, classes + 1)


def unique_pairs(truth: np.ndarray, found: np.ndarray, labels: np.ndarray) -> int:
    """Counts matched segments as panopticapi does: `unique` of pairs, and a loop over these."""
    ids, pixels = np.unique((truth + 1) * 65536 + found, return_counts=True)
    area = dict(zip(*np.unique(truth, return_counts=True)))
    found_area = dict(zip(*np.unique(found, return_counts=True)))
    overlap = dict(zip(ids.tolist(), pixels.tolist()))
    matched = 0
    for pair, both in overlap.items():
        t, f = pair // 65536 - 1, pair % 65536
        if t >= 0 and labels[t] == labels[f]:
            union = area[t] + found_area[f] - both - overlap.get(f, 0)
            matched += both / union > 0.5
    return matched


def count_rows(options: Options) -> Iterator[Row]:
    """Yields the rows of the counts of mIoU and PQ, in ms an image."""
    truth, found = label_maps()
    labels = np.random.default_rng(0).integers(SEGMENTED, size=SEGMENTS)
    crowd = np.zeros(SEGMENTS, bool)
    classes, predicted = np.append(labels, -1)[truth], labels[found]
    void = np.where(classes < 0, SEGMENTED, classes)
    given = (truth, labels, crowd, found, labels, SEGMENTED)
    pairs = [
        ("mIoU", lambda: confusion(classes, predicted, SEGMENTED)),
        ("PQ", lambda: match_segments(*given)),
    ]
    peers = [
        ("as detectron2", lambda: bincount_confusion(void, predicted, SEGMENTED)),
        ("as panopticapi", lambda: unique_pairs(truth, found, labels)),
    ]
    for (metric, ours), (name, peer) in zip(pairs, peers):
        what = f"{metric} counts, {SIZE[0]} x {SIZE[1]} px"
        row = Row("evaluation", what, "concord", name, unit="ms", goal=1)
        functions = {"concord": repeated(ours), name: repeated(peer)}
        yield from fill([row], functions, options, CALLS)


def repeated(function: Callable) -> Callable:
    """Returns a function that calls another CALLS times."""
    return lambda: [function() for _ in range(CALLS)]


def rows(options: Options) -> Iterator[Row]:
    """Yields a row for each peer of box AP, whose result must equal ours, and those of counts."""
    images = 10 if options.quick else 1000
    truth, found = draw(images)
    functions = {"concord": concord_ap(images, truth, found)}
    for package in ("pycocotools", "faster-coco-eval"):
        if has_peer(package):
            functions[package] = coco_ap(package, images, truth, found)
    values, timed = {}, {}

    def kept(name: str) -> Callable:
        return lambda: values.update({name: functions[name]()})

    found_rows = []
    for name in functions:
        timed[name] = kept(name)
        if name != "concord":
            what = f"box AP, {images} images x {DETECTIONS} detections, {name}"
            found_rows.append(Row("evaluation", what, "concord", name, goal=1))
    for row in fill(found_rows, timed, options) if found_rows else []:
        difference = abs(values["concord"] - values[row.peer])
        if not difference < 1e-6:
            row.note = f"AP {values['concord']:.6f}, but {values[row.peer]:.6f} by {row.peer}"
        yield row
    yield from count_rows(options)
