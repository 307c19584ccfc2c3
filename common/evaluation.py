"""Box and mask AP as the benchmarks define them: COCO, LVIS (federated) and OpenImages.

`evaluate_detections` serves all three. COCO and LVIS numbers come from hotcoco; the tests compare
them with pycocotools. The OpenImages protocol is written out in `_open_images`.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import hotcoco
import numpy as np
import torch

from common.datasets.exif import upright
from common.datasets.index import BEYOND, Index
from common.errors import InputError
from common.label_accuracy import label_accuracy
from common.labels import Vocabulary
from common.masks import annotated_rles
from common.tables import Columns, Evidence, Scores, mean_of_known

_COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {"coco": _COCO, "lvis": (*_COCO, "APr", "APc", "APf"), "oid": ("AP50",)}
MASK_METRICS = {"coco": ("AP", "AP50"), "lvis": ("AP", "AP50", "APr", "APc", "APf"), "oid": ()}
Predictions = dict[int, dict[str, Any]]  # row of the index -> fields, see evaluate_detections
Results = dict[str, float]  # metric -> value
Table = Columns  # of length A


class Evaluated(Protocol):
    """The attributes that a dataset needs for its evaluation."""

    name: str
    vocabulary: Vocabulary
    index: Index
    metric: Literal["coco", "lvis", "oid"]
    hierarchy: dict | None  # oid: the official json tree (LabelName, Subcategory, Part)
    frequency: str | None  # lvis: one letter of "rcf" per class


def evaluate_detections(
    dataset: Evaluated,
    predictions: Predictions,
    groups: dict[str, np.ndarray] | None = None,
    control: bool = False,
) -> Scores:
    """Computes the metrics of `dataset.metric` over all images of the dataset, in 0..1.

    predictions: for each row of `dataset.index` a dict with `boxes` (N, 4) xyxy in pixels of the
                 original image, `labels` (N,) in the dataset's vocabulary, `scores` (N,), `size`
                 (height, width), and optionally `segmentations`, N RLEs
    groups:      name -> (C,) bool, the classes of the group, for example the novel ones
    control:     whether the result is a baseline: its mistakes are not drawn

    Returns METRICS[dataset.metric]. If dataset and predictions have segmentations, MASK_METRICS
    are added with the prefix "mask "; a box without a mask is neither hit nor miss in them, and
    detections in it are ignored. Each group adds "AP50 <name>", the mean box AP50 of its classes. A
    metric without ground truth is NaN, where pycocotools has -1.

    Its `classes` have AP, AP50 and AR (the recall with the most detections of the metric, averaged
    over the IoU thresholds), for masks too, but AP50 alone for "oid"; and "images" and "boxes", the
    numbers of the ground truth without crowds. AP and AP50 are the means of their columns.

    A dataset of image-level labels has `label_accuracy` instead.

    Raises InputError if an image has no prediction (zero boxes are one) or if an annotated
    segmentation is broken, ValueError for a label outside the vocabulary.
    """
    _check_complete(dataset, predictions)
    if dataset.index.image_labels is not None:
        return label_accuracy(dataset.index, dataset.vocabulary, predictions, groups)
    # a copy: a caller may fill its own again
    evidence = None if control else Evidence(dataset, dict(predictions))
    dataset = as_predicted(dataset, predictions)
    truth = truth_table(dataset.index, predictions)
    found = prediction_table(dataset, predictions)
    if dataset.metric == "oid":
        classes = _open_images(dataset, truth, found)
        results = {"AP50": mean_of_known(classes["AP50"])}
    else:
        results, classes = _hotcoco(dataset, truth, found, predictions)
    for name, members in (groups or {}).items():
        results[f"AP50 {name}"] = mean_of_known(classes["AP50"][np.asarray(members)])
    return Scores(results, {"class": dataset.vocabulary.names} | classes, evidence)


def recall(
    dataset: Evaluated, proposals: Predictions, limits: tuple[int, ...] = (10, 100, 1000)
) -> Results:
    """Computes COCO's average recall at each limit, with all classes as one: {"AR@<limit>": value}.

    AR@limit is the share of ground truth boxes that are found among the best `limit` boxes of each
    image, averaged over the IoU thresholds 0.5, 0.55 ... 0.95. Crowds and group-of boxes are left
    out. AR@limit is NaN if there is no ground truth box.

    proposals: as `predictions` in `evaluate_detections`, without labels; limits: in rising order
    Raises InputError if an image has no proposals (zero boxes are allowed).
    """
    _check_complete(dataset, proposals)
    if not len(dataset.index.labels):
        return {f"AR@{limit}": math.nan for limit in limits}
    dataset = as_predicted(dataset, proposals)
    records = {}
    for row, proposal in proposals.items():
        records[row] = proposal | {"labels": torch.zeros(len(proposal["scores"]))}
    truth = truth_table(dataset.index, records)
    found = prediction_table(dataset, records)
    tables = hotcoco_tables(dataset, truth, found, records, np.arange(len(dataset.vocabulary)))
    evaluator = hotcoco.COCOeval(*tables, "bbox")
    evaluator.params.use_cats = False
    evaluator.params.max_dets = list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    shares = evaluator.eval["recall"][:, 0, 0]  # (10, limits): the one class, objects of all sizes
    return {f"AR@{limit}": mean_of_known(share) for limit, share in zip(limits, shares.T)}


def _check_complete(dataset: Evaluated, predictions: Predictions) -> None:
    """Raises InputError if an image has no prediction."""
    index = dataset.index
    missing = [row for row in range(len(index)) if row not in predictions]
    if missing:
        first = repr(index.image_ids[missing[0]])
        lack = f"{len(missing)} of {len(index)} images have no prediction, the first is {first}"
        raise InputError(f"{dataset.name}: {lack}; predict every image, if with zero boxes")


def as_predicted(dataset: Evaluated, predictions: Predictions) -> Evaluated:
    """Turns the annotations of photographs that were made before their EXIF tag turned them."""
    return upright(dataset, [tuple(predictions[row]["size"]) for row in range(len(dataset.index))])


def truth_table(index: Index, predictions: Predictions) -> Table:
    """Returns the ground truth: image (index row), label, ignore, boxes (A, 4) xyxy, area."""
    table = {"image": index.image_of, "label": index.labels, "ignore": index.ignore}
    boxes = index.boxes.astype(np.float64)
    area = index.areas.astype(np.float64)
    if index.relative and len(boxes):  # only the predictions know the size of these images
        sizes = [tuple(predictions[row]["size"]) for row in range(len(index))]
        sizes = np.array(sizes, dtype=np.float64)  # (I, 2)
        height, width = sizes[table["image"]].T
        boxes = boxes * np.stack([width, height, width, height], axis=1)
        area = area * width * height
    return table | {"boxes": boxes, "area": area}


def prediction_table(dataset: Evaluated, predictions: Predictions) -> Table:
    """Returns the detections: image (index row), label, score, boxes (A, 4) xyxy.

    Raises ValueError for a label outside the vocabulary.
    """
    records = [predictions[row] for row in range(len(dataset.index))]
    counts = [len(record["scores"]) for record in records]

    def column(field: str) -> np.ndarray:
        parts = [torch.zeros(0), *(record[field] for record in records)]
        return torch.cat(parts).double().numpy()

    label = column("labels")
    classes = len(dataset.vocabulary)
    wrong = set(label.tolist()).difference(range(classes))
    if wrong:
        raise ValueError(
            f"{dataset.name} has {classes} classes, but label {min(wrong):.0f} was predicted"
        )
    return {
        "image": np.repeat(np.arange(len(records)), counts),
        "label": label.astype(np.int64),
        "boxes": column("boxes").reshape(-1, 4),
        "score": column("scores"),
    }


def _count(truth: Table, num_classes: int) -> Table:
    """Returns for each class how many images have a box of it (C,), and how many boxes (C,)."""
    label = truth["label"].astype(np.int64)
    pairs = np.unique(truth["image"].astype(np.int64) * num_classes + label)
    images = np.bincount(pairs % num_classes, minlength=num_classes)
    return {"images": images, "boxes": np.bincount(label, minlength=num_classes)}


def take(table: Table, rows: np.ndarray) -> Table:
    """Returns the table with the given rows."""
    return {name: column[rows] for name, column in table.items()}


def xywh(boxes: np.ndarray) -> np.ndarray:
    """Converts boxes (A, 4) from xyxy to x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _hotcoco(
    dataset: Evaluated, truth: Table, found: Table, predictions: Predictions
) -> tuple[Results, Table]:
    """Returns the metrics, and the columns of the classes; NaN for a class without ground truth.

    hotcoco makes 24,000 numbers for each class and limit of detections. So limits that METRICS does
    not have are left out, and classes without ground truth, but for LVIS, whose limit is of images.
    """
    lvis_style = dataset.metric == "lvis"
    count = len(dataset.vocabulary)
    labels = np.arange(count)
    if len(truth["label"]) and not lvis_style:
        labels = np.unique(truth["label"])
    counts = _count(take(truth, ~truth["ignore"]), count)
    tables = hotcoco_tables(dataset, truth, found, predictions, labels)

    def run(kind: str) -> tuple[Results, Table]:
        evaluator = hotcoco.COCOeval(*tables, kind, lvis_style=lvis_style)
        evaluator.params.max_dets = evaluator.params.max_dets[-1:]
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the limits that are left out
            evaluator.run()  # it has no silent summary
        values = {}
        for name, value in evaluator.get_results().items():
            values[name] = value if value >= 0 else math.nan
        # all sizes, most detections: (10, 101, C) IoU thresholds, recall points, classes; (10, C)
        arrays = evaluator.eval
        precision = arrays["precision"][:, :, :, 0, -1]
        recalls = arrays["recall"][:, :, 0, -1]
        means = {"AP": precision.mean(axis=(0, 1))}
        means["AP50"] = precision[0].mean(axis=0)
        means["AR"] = recalls.mean(axis=0)
        columns = {}
        for name, mean in means.items():
            columns[name] = np.full(count, math.nan)
            columns[name][labels] = np.where(mean < 0, math.nan, mean)
        return values, columns

    values, classes = run("bbox")
    results = {name: values[name] for name in METRICS[dataset.metric]}
    if _have_masks(dataset, predictions):
        maskless = ~dataset.index.has_mask
        if maskless.any():  # each is an ignored region: its box, of which all detections may be
            truth = truth | {"ignore": truth["ignore"] | maskless}
            tables = hotcoco_tables(dataset, truth, found, predictions, labels)
        values, of_masks = run("segm")
        results |= {f"mask {name}": values[name] for name in MASK_METRICS[dataset.metric]}
        classes |= {f"mask {name}": column for name, column in of_masks.items()}
    return results, classes | counts


def _have_masks(dataset: Evaluated, predictions: Predictions) -> bool:
    """Tells if the dataset has segmentations and every prediction has them, too."""
    if dataset.index.segmentations is None:
        return False
    return all("segmentations" in record for record in predictions.values())


def hotcoco_tables(
    dataset: Evaluated, truth: Table, found: Table, predictions: Predictions, labels: np.ndarray
) -> tuple[hotcoco.COCO, hotcoco.COCO]:
    """Returns ground truth and detections of the classes `labels`, with masks if both have them."""
    index = dataset.index
    names = dataset.vocabulary.names
    # equal scores are ranked in the order of the dataset's own ids, as in pycocotools
    number = np.argsort(sorted(range(len(index)), key=index.image_ids.__getitem__))
    absent = index.negatives or [()] * len(index)
    incomplete = index.not_exhaustive or [()] * len(index)
    images = []
    for row, image_id in enumerate(number.tolist()):
        image = {
            "id": image_id,
            "neg_category_ids": list(absent[row]),
            "not_exhaustive_category_ids": list(incomplete[row]),
        }
        images.append(image)
    letters = dataset.frequency or "-" * len(names)
    categories = []
    for label in labels.tolist():
        categories.append({"id": label, "name": names[label], "frequency": letters[label]})
    kept = np.isin(found["label"], labels)
    found = take(found, kept)
    annotated = detected = None
    if _have_masks(dataset, predictions):
        sizes = [tuple(predictions[row]["size"]) for row in range(len(index))]
        annotated = annotated_rles(index, sizes)
        rles = [rle for row in range(len(index)) for rle in predictions[row]["segmentations"]]
        detected = [rle for rle, is_kept in zip(rles, kept) if is_kept]
    gt = hotcoco.COCO.from_arrays(
        images,
        categories,
        number[truth["image"]],
        truth["label"],
        xywh(truth["boxes"]),
        area=truth["area"],
        iscrowd=truth["ignore"] & (truth["area"] < BEYOND),  # the others are ignored by their area
        segmentation=annotated,
    )
    boxes = xywh(found["boxes"])
    columns = (number[found["image"]], *boxes.T, found["score"], found["label"])
    return gt, gt.load_res(np.stack(columns, axis=1), segmentation=detected)


def _open_images(dataset: Evaluated, truth: Table, found: Table) -> Table:
    """Computes the AP (C,) of each class at IoU 0.5 as the OpenImages Challenge does, as "AP50".

    It is NaN for a class without a box. Boxes and their images are counted as rule 1 has them.
    https://storage.googleapis.com/openimages/web/evaluation.html
    1. A box of a class is also a box of the class's ancestors, in ground truth and predictions.
    2. In an image, only verified classes count: those with a box in the image, and those of its
       image-level labels. The ancestors of a present class are present. The descendants of an
       absent class are absent.
    3. A detection is compared only with the box that it overlaps most, as in PASCAL VOC. COCO would
       try the next one.
    4. A group-of box is one object. It is found if at least half of some detection lies in it.
       Further such detections are ignored.

    hotcoco's OpenImages mode lacks rules 2 and 3, and has rule 1 only for classes with one parent.
    """
    upward = ancestors(dataset.vocabulary, dataset.hierarchy)
    verified = np.zeros((len(dataset.index), len(dataset.vocabulary)), dtype=bool)
    truth = _expand(truth, upward, ~verified)
    for row, labels in enumerate(dataset.index.negatives or ()):
        verified[row] = upward[:, labels].any(axis=1)
    for row, labels in enumerate(dataset.index.verified or ()):
        verified[row] |= upward[labels].any(axis=0)
    verified[truth["image"], truth["label"]] = True
    found = _expand(found, upward, verified)
    found = take(found, np.argsort(-found["score"], kind="stable"))
    precisions = np.full(len(upward), math.nan)
    for label in np.unique(truth["label"]):
        truth_of_class = take(truth, truth["label"] == label)
        found_of_class = take(found, found["label"] == label)
        precisions[label] = _class_ap(truth_of_class, found_of_class)
    return {"AP50": precisions} | _count(truth, len(upward))


def ancestors(vocabulary: Vocabulary, tree: dict | None) -> np.ndarray:
    """Returns (C, C) bool: [a, b] is True if class b is class a or its ancestor.

    tree: as `Evaluated.hierarchy`. A `Part` of a class is not its descendant.
    """
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


def _expand(table: Table, upward: np.ndarray, verified: np.ndarray) -> Table:
    """Repeats each row for every ancestor of its class, and drops rows that do not count.

    upward:   (C, C) of `ancestors`
    verified: (I, C) bool, the classes that count in each image

    Rows stay in the given order, since the first of equal overlaps is taken as the best.
    """
    rows = []
    labels = []
    for label, ancestors in enumerate(upward):
        own = np.flatnonzero(table["label"] == label)
        for ancestor in np.flatnonzero(ancestors):
            kept = own[verified[table["image"][own], ancestor]]
            rows.append(kept)
            labels.append(np.full(len(kept), ancestor))
    rows = np.concatenate(rows)
    order = np.argsort(rows, kind="stable")
    return take(table, rows[order]) | {"label": np.concatenate(labels)[order]}


def _class_ap(truth: Table, found: Table) -> float:
    """Computes the all-point AP of one class over all images. found: sorted by falling score"""
    hit = np.zeros_like(found["score"], dtype=bool)
    ignored = np.zeros_like(hit)
    found_rows = rows_by_image(found)
    truth_rows = rows_by_image(truth)
    for image in found_rows.keys() & truth_rows.keys():
        rows = found_rows[image]
        own = take(truth, truth_rows[image])
        hit[rows], ignored[rows] = _match(found["boxes"][rows], own["boxes"], own["ignore"])
    hit = hit[~ignored]
    rank = np.arange(1, len(hit) + 1)
    precision = np.cumsum(hit) / rank
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall
    return float(envelope[hit].sum() / len(truth["label"]))


def rows_by_image(table: Table) -> dict[int, np.ndarray]:
    """Returns {image: the rows of its entries in the table, in rising order}."""
    order = np.argsort(table["image"], kind="stable")
    images, starts = np.unique(table["image"][order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, starts[1:])))


def _match(
    boxes: np.ndarray, truth: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matches detections of one class in one image. Returns (hit, ignored), each (D,) bool.

    boxes: (D, 4) xyxy by falling score; truth: (G, 4) xyxy; group: (G,) bool, is a group-of box
    """
    hit = np.zeros(len(boxes), dtype=bool)
    ignored = np.zeros_like(hit)
    taken = set()
    # (D, G): IoU, but the share of the detection's own area for groups
    overlaps = hotcoco.mask.bbox_iou(xywh(boxes), xywh(truth), group)
    for eligible in (~group, group):  # groups get what single boxes left over
        overlap = np.where(eligible, overlaps, -1)
        best = overlap.argmax(axis=1)
        found = overlap.max(axis=1) >= 0.5
        for row in np.flatnonzero(~hit & found):
            box = best[row]
            hit[row] = box not in taken
            ignored[row] = group[box] and not hit[row]
            taken.add(box)
    return hit, ignored


def to_coco_json(ids: Sequence, predictions: Predictions, image_ids: Sequence) -> list[dict]:
    """Returns COCO results: dicts of image_id, category_id, bbox (x, y, w, h in pixels) and score.

    image_id is image_ids[row], category_id is ids[label]. RLEs, if any, become `segmentation`.
    """
    results = []
    for row, found in predictions.items():
        boxes = xywh(found["boxes"].double().numpy())
        labels = found["labels"].tolist()
        scores = found["scores"].tolist()
        rles = found.get("segmentations")
        for i, box in enumerate(boxes.tolist()):
            entry = {
                "image_id": image_ids[row],
                "category_id": ids[labels[i]],
                "bbox": box,
                "score": scores[i],
            }
            if rles is not None:
                entry["segmentation"] = rles[i]
            results.append(entry)
    return results
