"""Box and mask AP as the benchmarks define them: COCO, LVIS (federated) and OpenImages, one function for all.

COCO and LVIS numbers come from hotcoco; pycocotools is the oracle of its tests. The OpenImages protocol is written out
in `_open_images`.
"""

import contextlib
import io
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal, Protocol

import hotcoco
import numpy as np
import torch

from common.datasets.index import BEYOND, Index
from common.errors import InputError
from common.files import atomic_path
from common.labels import Vocabulary
from common.masks import to_rle

log = logging.getLogger("concord")

_COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {"coco": _COCO, "lvis": (*_COCO, "APr", "APc", "APf"), "oid": ("AP50",)}
MASK_METRICS = {"coco": ("AP", "AP50"), "lvis": ("AP", "AP50", "APr", "APc", "APf"), "oid": ()}
Predictions = dict[int, dict[str, Any]]


class Evaluated(Protocol):
    """What a dataset must have to be evaluated."""

    name: str
    vocabulary: Vocabulary
    index: Index
    metric: Literal["coco", "lvis", "oid"]
    hierarchy: dict | None  # oid: the official json tree (LabelName, Subcategory, Part)
    frequency: str | None  # lvis: one letter of "rcf" per class


def evaluate_detections(
    dataset: Evaluated, predictions: Predictions, groups: dict[str, np.ndarray] | None = None
) -> dict[str, float]:
    """The metrics of `dataset.metric` for all images of the dataset, values in 0..1.

    predictions: for each row of `dataset.index` a dict with `boxes` (N, 4) xyxy in pixels of the original image,
                 `labels` (N,) in the dataset's own vocabulary, `scores` (N,), `size` (height, width) of the image and
                 perhaps `segmentations`, N RLEs
    groups:      for each name a (C,) bool of classes, say of the novel ones

    Returns the names in METRICS; "mask " and those in MASK_METRICS if predictions and dataset have segmentations;
    "AP50 " and each group's name, the mean of the box AP50 of its classes. What has no ground truth (no small object)
    is NaN, where pycocotools has -1. Raises InputError if an image has no prediction (zero boxes are one) or if an
    annotated segmentation is not one, ValueError for a label outside the vocabulary.
    """
    _check_complete(dataset, predictions)
    truth, found = _truth_table(dataset.index, predictions), _prediction_table(dataset, predictions)
    if dataset.metric == "oid":
        class_ap50 = _open_images(dataset, truth, found)
        results = {"AP50": _mean(class_ap50)}
    else:
        results, class_ap50 = _hotcoco(dataset, truth, found, predictions)
    return results | {
        f"AP50 {name}": _mean(class_ap50[np.asarray(members)])
        for name, members in (groups or {}).items()
    }


def recall(
    dataset: Evaluated, proposals: Predictions, limits: tuple[int, ...] = (10, 100, 1000)
) -> dict[str, float]:
    """AR@limit for each limit: COCO's average recall with all classes as one, by the best `limit` boxes per image.

    proposals: as in `evaluate_detections`, without labels
    limits:    rising

    The recall is the share of boxes that are found, its mean over IoU 0.5, 0.55 ... 0.95; crowds and groups are left
    out. NaN without any box. Raises InputError if an image has no proposals (zero boxes are some).
    """
    _check_complete(dataset, proposals)
    records = {
        row: found | {"labels": torch.zeros(len(found["scores"]))}
        for row, found in proposals.items()
    }
    truth, found = _truth_table(dataset.index, records), _prediction_table(dataset, records)
    evaluator = hotcoco.COCOeval(*_hotcoco_tables(dataset, truth, found, records), "bbox")
    evaluator.params.use_cats, evaluator.params.max_dets = False, list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    shares = evaluator.eval["recall"][:, 0, 0]  # (10, limits): the one class, objects of all sizes
    return {f"AR@{limit}": _mean(share) for limit, share in zip(limits, shares.T)}


def _check_complete(dataset: Evaluated, predictions: Predictions) -> None:
    index = dataset.index
    if missing := [row for row in range(len(index)) if row not in predictions]:
        lack = f"{len(missing)} of {len(index)} images have no prediction, the first is {index.image_ids[missing[0]]!r}"
        raise InputError(f"{dataset.name}: {lack}; predict every image, if with zero boxes")


def _mean(values: np.ndarray) -> float:
    """The mean of those there are: neither NaN nor -1, hotcoco's sign of no ground truth."""
    there = values[values >= 0]
    return float(there.mean()) if len(there) else math.nan


def _truth_table(index: Index, predictions: Predictions) -> dict[str, np.ndarray]:
    """Columns image, the row in the index, label, area, ignore, all (A,), and boxes (A, 4) xyxy in pixels."""
    image = index.image_of
    boxes, area = index.boxes.astype(np.float64), index.areas.astype(np.float64)
    if index.relative and len(boxes):  # only the predictions know the size of these images
        sizes = np.array(
            [tuple(predictions[row]["size"]) for row in range(len(index))], dtype=np.float64
        )[image]
        boxes = boxes * sizes[:, [1, 0, 1, 0]]
        area = _xywh(boxes)[:, 2:].prod(axis=1)
    return {
        "image": image,
        "label": index.labels,
        "boxes": boxes,
        "area": area,
        "ignore": index.ignore,
    }


def _prediction_table(dataset: Evaluated, predictions: Predictions) -> dict[str, np.ndarray]:
    """Columns image, label, score, all (A,), and boxes (A, 4)."""
    records, classes = (
        [predictions[row] for row in range(len(dataset.index))],
        len(dataset.vocabulary),
    )
    image = np.repeat(np.arange(len(records)), [len(record["scores"]) for record in records])
    columns = [
        [torch.zeros(0), *(record[field] for record in records)]
        for field in ("labels", "boxes", "scores")
    ]
    label, boxes, score = (torch.cat(column).double().numpy() for column in columns)
    if wrong := set(label.tolist()) - set(range(classes)):
        raise ValueError(
            f"{dataset.name} has {classes} classes, but label {min(wrong):.0f} was predicted"
        )
    return {
        "image": image,
        "label": label.astype(np.int64),
        "boxes": boxes.reshape(-1, 4),
        "score": score,
    }


def _take(table: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in table.items()}


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _hotcoco(
    dataset: Evaluated, truth: dict, found: dict, predictions: Predictions
) -> tuple[dict, np.ndarray]:
    """(the metrics, the box AP50 of each class (C,), -1 where it has no ground truth)."""
    tables = _hotcoco_tables(dataset, truth, found, predictions)

    def run(kind: str) -> tuple[dict, np.ndarray]:
        evaluator = hotcoco.COCOeval(*tables, kind, lvis_style=dataset.metric == "lvis")
        with contextlib.redirect_stdout(io.StringIO()):  # it has no silent summary
            evaluator.run()
        values = {
            name: value if value >= 0 else math.nan
            for name, value in evaluator.get_results().items()
        }
        return values, evaluator.eval["precision"][0, :, :, 0, -1].mean(
            axis=0
        )  # IoU 0.5, all sizes, most detections

    values, class_ap50 = run("bbox")
    results = {name: values[name] for name in METRICS[dataset.metric]}
    if _have_masks(dataset, predictions):
        values, _ = run("segm")
        results |= {f"mask {name}": values[name] for name in MASK_METRICS[dataset.metric]}
    return results, class_ap50


def _have_masks(dataset: Evaluated, predictions: Predictions) -> bool:
    return dataset.index.segmentations is not None and all(
        "segmentations" in p for p in predictions.values()
    )


def _hotcoco_tables(
    dataset: Evaluated, truth: dict, found: dict, predictions: Predictions
) -> tuple[hotcoco.COCO, hotcoco.COCO]:
    """(ground truth, detections), with masks if both have them."""
    index, names = dataset.index, dataset.vocabulary.names
    # equal scores are ranked in the order of the dataset's own ids, as in pycocotools
    number = np.argsort(sorted(range(len(index)), key=index.image_ids.__getitem__))
    known = {
        "neg_category_ids": index.negatives,
        "not_exhaustive_category_ids": index.not_exhaustive,
    }
    lists = [
        {key: list(of[row]) if of else [] for key, of in known.items()} for row in range(len(index))
    ]
    images = [{"id": int(i), **fields} for i, fields in zip(number, lists)]
    letters = getattr(dataset, "frequency", None) or "-" * len(names)
    categories = [
        {"id": i, "name": n, "frequency": f}
        for i, (n, f) in enumerate(zip(names, letters, strict=True))
    ]
    annotated = detected = None
    if _have_masks(dataset, predictions):
        annotated = _true_segmentations(index, predictions)
        detected = [rle for row in range(len(index)) for rle in predictions[row]["segmentations"]]
    where, label, boxes = number[truth["image"]], truth["label"], _xywh(truth["boxes"])
    crowd = truth["ignore"] & (truth["area"] < BEYOND)  # the others are ignored by their area
    columns = {"area": truth["area"], "iscrowd": crowd, "segmentation": annotated}
    gt = hotcoco.COCO.from_arrays(images, categories, where, label, boxes, **columns)
    columns = (number[found["image"]], *_xywh(found["boxes"]).T, found["score"], found["label"])
    return gt, gt.load_res(np.stack(columns, 1), segmentation=detected)


def _true_segmentations(index: Index, predictions: Predictions) -> list[dict]:
    rles = []
    for image, segmentation in zip(index.image_of.tolist(), index.segmentations):
        try:
            rles.append(to_rle(segmentation, tuple(predictions[image]["size"])))
        except ValueError as error:
            raise InputError(
                f"{index.source}: image {index.image_ids[image]!r} has {error}; mend it"
            ) from None
    return rles


def _open_images(dataset: Evaluated, truth: dict, found: dict) -> np.ndarray:
    """(C,) AP at IoU 0.5 of each class, NaN where there is no box, as in the OpenImages Challenge.

    https://storage.googleapis.com/openimages/web/evaluation.html

    1. A box of a class is a box of its ancestors too, in the ground truth and in the predictions.
    2. Only classes with a box in the image, or verified present in or absent from it, count there; what is present has
       ancestors, what is absent has no descendants.
    3. A detection is compared with the one box that it overlaps most (PASCAL VOC; COCO would try the next).
    4. A group-of box is one object: found if at least half of some detection lies in it; further such are ignored.

    hotcoco has 1 for trees alone (some classes have two parents) and neither 2 nor 3.
    """
    upward = _ancestors(dataset.vocabulary, getattr(dataset, "hierarchy", None))
    verified = np.zeros((len(dataset.index), len(dataset.vocabulary)), dtype=bool)
    truth = _expand(truth, upward, ~verified)
    for row, labels in enumerate(dataset.index.negatives or ()):
        verified[row] = upward[:, labels].any(axis=1)
    for row, labels in enumerate(dataset.index.verified or ()):
        verified[row] |= upward[labels].any(axis=0)
    verified[truth["image"], truth["label"]] = True
    found = _expand(found, upward, verified)
    found = _take(found, np.argsort(-found["score"], kind="stable"))
    precisions = np.full(len(upward), math.nan)
    for label in np.unique(truth["label"]):
        precisions[label] = _class_ap(
            _take(truth, truth["label"] == label), _take(found, found["label"] == label)
        )
    return precisions


def _ancestors(vocabulary: Vocabulary, tree: dict | None) -> np.ndarray:
    """(C, C) bool: [a, b] is class b equal to a or an ancestor of it. A `Part` is no kind of the whole."""
    upward = np.eye(len(vocabulary), dtype=bool)

    def walk(node: dict, above: list[int]) -> None:
        label = vocabulary.index_of_id.get(node.get("LabelName"))
        if label is not None:
            upward[label, above] = True
            above = [*above, label]
        for child in node.get("Subcategory", ()):
            walk(child, above)

    walk(tree or {}, [])
    return upward


def _expand(table: dict, upward: np.ndarray, verified: np.ndarray) -> dict:
    """Repeat every row under its ancestors, and leave only what is `verified` (I, C) in its image, in the given order.

    The order decides which of equal overlaps is the best.
    """
    parts = []
    for label, ancestors in enumerate(upward):
        rows = np.flatnonzero(table["label"] == label)
        for ancestor in np.flatnonzero(ancestors):
            kept = rows[verified[table["image"][rows], ancestor]]
            parts.append(_take(table, kept) | {"label": np.full(len(kept), ancestor), "row": kept})
    expanded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _take(expanded, np.argsort(expanded.pop("row"), kind="stable"))


def _class_ap(truth: dict, found: dict) -> float:
    """All-point AP of one class over all images; `found` by falling score."""
    hit, ignored = np.zeros((2, len(found["score"])), dtype=bool)
    rows, here = _rows_by_image(found), _rows_by_image(truth)
    for i in rows.keys() & here.keys():
        boxes, group = truth["boxes"][here[i]], truth["ignore"][here[i]]
        hit[rows[i]], ignored[rows[i]] = _match(found["boxes"][rows[i]], boxes, group)
    hit = hit[~ignored]
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][hit].sum() / len(truth["label"]))


def _rows_by_image(table: dict) -> dict[int, np.ndarray]:
    order = np.argsort(table["image"], kind="stable")
    images, starts = np.unique(table["image"][order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, starts[1:])))


def _match(
    boxes: np.ndarray, truth: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(D, 4) by falling score, (G, 4), (G,) bool group-of -> (D,) bool hits, (D,) bool neither hit nor miss."""
    (hit, ignored), taken = np.zeros((2, len(boxes)), dtype=bool), set()
    overlaps = hotcoco.mask.bbox_iou(
        _xywh(boxes), _xywh(truth), group
    )  # (D, G); groups: of the detection's own area
    for eligible in (~group, group):  # groups get what single boxes left over
        overlap = np.where(eligible, overlaps, -1)
        best = overlap.argmax(axis=1)
        for row in np.flatnonzero(~hit & (overlap.max(axis=1) >= 0.5)):
            hit[row] = best[row] not in taken
            ignored[row] = group[best[row]] and not hit[row]
            taken.add(best[row])
    return hit, ignored


def report(results: dict[str, dict[str, float]], folder: Path) -> None:
    """Write results.json, and the table to the log; on rank 0, which has the results."""
    if results:
        with atomic_path(folder / "results.json") as path:
            values = {
                k: {m: None if math.isnan(v) else v for m, v in row.items()}
                for k, row in results.items()
            }
            path.write_text(json.dumps(values, indent=1))
        log.info("\n" + format_table(results))


def format_table(results: dict[str, dict[str, float]], width: int = 120) -> str:
    """One row per dataset, one column per metric in order of appearance; '-' where there is no such value.

    Rows that share no metric stand in tables of their own, and so do the columns beyond `width` letters.
    """
    tables: list[dict] = []
    for name, values in results.items():
        table = next(
            (t for t in tables if any(row.keys() & values.keys() for row in t.values())), None
        )
        if table is None:
            tables.append(table := {})
        table[name] = values
    return "\n\n".join(_format_table(table, width) for table in tables)


def _format_table(results: dict[str, dict[str, float]], width: int) -> str:
    metrics = list(dict.fromkeys(name for values in results.values() for name in values))
    cells = [
        [m, *(f"{row.get(m, math.nan):.3f}".replace("nan", "-") for row in results.values())]
        for m in metrics
    ]
    cells = [[cell.rjust(max(map(len, column))) for cell in column] for column in cells]
    first = [name.ljust(max(map(len, ["dataset", *results]))) for name in ("dataset", *results)]
    blocks = [[first]]
    for column in cells:
        if sum(len(c[0]) + 2 for c in [*blocks[-1], column]) - 2 > width and len(blocks[-1]) > 1:
            blocks.append([first])
        blocks[-1].append(column)
    return "\n\n".join("\n".join(map("  ".join, zip(*block))) for block in blocks)


def to_coco_json(
    source: Evaluated | Vocabulary, predictions: Predictions, image_ids: list
) -> list[dict]:
    """COCO results: image_id = image_ids[row], original category_id, bbox (x, y, w, h in pixels), score.

    With `segmentation` where the prediction has segmentations.
    """
    category_ids, results = getattr(source, "vocabulary", source).ids, []
    for row, found in predictions.items():
        boxes, labels = _xywh(found["boxes"].double().numpy()).tolist(), found["labels"].tolist()
        entries = [
            {
                "image_id": image_ids[row],
                "category_id": category_ids[label],
                "bbox": box,
                "score": score,
            }
            for box, label, score in zip(boxes, labels, found["scores"].tolist())
        ]
        for entry, rle in zip(entries, found.get("segmentations", ())):
            entry["segmentation"] = rle
        results += entries
    return results
