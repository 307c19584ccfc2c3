"""What a model gets wrong: which classes it confuses, TIDE's errors, and its worst images."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import hotcoco
import numpy as np

from common.datasets.dataset import Dataset
from common.evaluation import (
    Predictions,
    Table,
    as_predicted,
    hotcoco_tables,
    prediction_table,
    rows_by_image,
    take,
    truth_table,
    xywh,
)
from common.files import atomic_path
from common.heat_map import HeatMap, draw_heat_map
from common.inference import PICTURED, picture_rows
from common.tables import Evidence, Scores, format_table
from common.visualize import save_image

log = logging.getLogger("concord")

SHOWN = 24  # classes of the picture of a confusion matrix
PAIRS = 20  # lines of errors.txt for a dataset
KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")  # TIDE's names of what is wrong
BACKGROUND = "(background)"


@dataclass
class Mistakes:
    """What a model got wrong in one dataset.

    names:  K classes; of boxes those that the ground truth or a detection has, then BACKGROUND
    counts: (K, K) of each true class (row) and predicted class (column)
    of:     what is counted, for titles
    tide:   {"AP50": value} and how much it would rise without each of KINDS; {} for segments
    worst:  {row of the index: (score, score in words)} of the images with mistakes, lowest first
    """

    names: list[str]
    counts: np.ndarray
    of: str
    tide: dict[str, float]
    worst: dict[int, tuple[float, str]]


def write_mistakes(results: dict[str, dict], folder: Path, min_score: float) -> None:
    """Writes what each dataset's `Evidence` shows: pictures, errors.json and errors.txt.

    confusion_<dataset>.png is its confusion matrix, worst_<dataset>.jpg its worst images.
    Does nothing for controls, and for results that come without evidence.
    min_score: of the boxes that count
    """
    records, texts, tide = {}, [], {}
    for scores in results.values():
        evidence = scores.evidence if isinstance(scores, Scores) else None
        if evidence is None:
            continue
        dataset = evidence.dataset
        found = _of_segments(evidence) if evidence.scores else box_mistakes(evidence, min_score)
        if found is None:
            continue
        if found.counts.any():
            draw_confusion(dataset.name, found, folder / f"confusion_{dataset.name}.png")
        if found.worst:
            rows = list(found.worst)
            files = [Path(dataset.index.file_name(row)).name for row in rows]
            captions = [f"{found.worst[row][1]}  {file}" for row, file in zip(rows, files)]
            picture = picture_rows(dataset, evidence.predictions, rows, captions, min_score)
            save_image(picture, folder / f"worst_{dataset.name}.jpg")
        records[dataset.name] = _record(dataset, found)
        texts.append(_format_pairs(dataset.name, found))
        if found.tide:
            tide[dataset.name] = found.tide
    if not records:
        return
    if tide:
        heading = "AP50, and how much it would rise if no error of a kind were made (TIDE):\n"
        texts.insert(0, f"{heading}{format_table(tide)}")
    with atomic_path(folder / "errors.json") as path:
        path.write_text(json.dumps(records, indent=1))
    with atomic_path(folder / "errors.txt") as path:
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8", errors="replace")


# -- Boxes -----------------------------------------------------------------------------------------


def box_mistakes(evidence: Evidence, min_score: float) -> Mistakes | None:
    """Compares boxes with the ground truth at IoU 0.5, through hotcoco. None without a true box.

    In the confusion matrix and the scores of images only detections of `min_score` or more count,
    in TIDE's errors all. Crowds are neither found nor missed, and detections in them do not count.
    An image of a federated dataset tells of some classes alone. So its detections of other classes
    are wrong only where they stand on an object, and the row of the background is left out.
    The score of an image is the F1 of its boxes. Of equal ones, that with more mistakes is worse.
    """
    predictions = evidence.predictions
    dataset = as_predicted(evidence.dataset, predictions)
    truth = truth_table(dataset.index, predictions)
    if truth["ignore"].all():
        return None
    found = prediction_table(dataset, predictions)
    known = _known(dataset, truth, found)
    every = np.arange(len(dataset.vocabulary))
    is_lvis = dataset.metric == "lvis"
    labels = every if is_lvis else np.unique(truth["label"])
    evaluator = _evaluator(dataset, truth, take(found, known), predictions, labels)
    evaluator.evaluate()
    errors = evaluator.tide_errors()
    tide = {"AP50": errors["ap_base"]} | {kind: errors["delta_ap"][kind] for kind in KINDS}

    likely = found["score"] >= min_score
    shown = take(found, likely & _outside_crowds(truth, found))
    labels = np.union1d(truth["label"], shown["label"]).astype(np.int64)
    counts = _evaluator(dataset, truth, shown, predictions, labels).confusion_matrix(0.5)["matrix"]
    counts = counts.astype(np.int64)
    if not known.all():
        counts[-1] = 0
    evaluator = _evaluator(dataset, truth, take(found, likely & known), predictions, labels)
    evaluator.evaluate()
    order = sorted(range(len(dataset.index)), key=dataset.index.image_ids.__getitem__)
    images = evaluator.image_diagnostics(0.5)["img_summary"]
    keys = {order[id]: (image["f1"], -image["fp"] - image["fn"]) for id, image in images.items()}
    rows = sorted((row for row, key in keys.items() if key[1]), key=lambda row: (*keys[row], row))
    worst = {row: (keys[row][0], f"F1 {keys[row][0]:.2f}") for row in rows[:PICTURED]}
    names = [dataset.vocabulary.names[label] for label in labels.tolist()]
    of = f"boxes with a score of {min_score:g} or more, at IoU 0.5"
    if not known.all():
        of += "; objects that the dataset does not annotate are left out"
    return Mistakes([*names, BACKGROUND], counts, of, tide, worst)


def _evaluator(
    dataset: Dataset, truth: Table, found: Table, predictions: Predictions, labels: np.ndarray
) -> hotcoco.COCOeval:
    """Returns hotcoco's evaluator of boxes, at IoU 0.5 and with the most detections alone."""
    sizes = {row: {"size": record["size"]} for row, record in predictions.items()}  # no masks
    tables = hotcoco_tables(dataset, truth, found, sizes, labels)
    evaluator = hotcoco.COCOeval(*tables, "bbox", lvis_style=dataset.metric == "lvis")
    evaluator.params.max_dets = evaluator.params.max_dets[-1:]
    evaluator.params.iou_thrs = [0.5]
    return evaluator


def _known(dataset: Dataset, truth: Table, found: Table) -> np.ndarray:
    """Returns (A,) bool: the detections of a class that their image's annotations tell of.

    These are the classes of its boxes, and those that are verified present or absent.
    """
    known = np.ones(len(found["label"]), dtype=bool)
    index = dataset.index
    if index.negatives is None and index.verified is None:
        return known
    told = np.zeros((len(index), len(dataset.vocabulary)), dtype=bool)
    told[truth["image"], truth["label"]] = True
    for labels_of_images in (index.negatives, index.verified):
        for row, labels in enumerate(labels_of_images or ()):
            told[row, labels] = True
    return told[found["image"], found["label"]]


def _outside_crowds(truth: Table, found: Table) -> np.ndarray:
    """Returns (A,) bool: False for detections half in a crowd that fit no other true box."""
    kept = np.ones(len(found["label"]), dtype=bool)
    found_rows, true_rows = rows_by_image(found), rows_by_image(truth)
    for image in np.unique(truth["image"][truth["ignore"]]).tolist():
        if image not in found_rows:
            continue
        rows, own = found_rows[image], true_rows[image]
        crowd = truth["ignore"][own]
        boxes, true_boxes = xywh(found["boxes"][rows]), xywh(truth["boxes"][own])
        # IoU, but of crowds the share of the detection
        fits = np.asarray(hotcoco.mask.bbox_iou(boxes, true_boxes, crowd)) >= 0.5
        kept[rows] = fits[:, ~crowd].any(axis=1) | ~fits[:, crowd].any(axis=1)
    return kept


# -- Segments --------------------------------------------------------------------------------------


def _of_segments(evidence: Evidence) -> Mistakes:
    """Returns what was counted while segments were predicted: pixels, and the worst images."""
    names = list(evidence.dataset.vocabulary.names)
    counts = evidence.pixels
    metric = "mIoU"
    if counts is None:
        counts, metric = np.zeros((len(names), len(names)), np.int64), "PQ"
    scores = evidence.scores
    order = sorted(scores, key=lambda row: (scores[row], row))
    worst = {row: (scores[row], f"{metric} {scores[row]:.2f}") for row in order if scores[row] < 1}
    return Mistakes(names, counts, "pixels", {}, worst)


# -- Files -----------------------------------------------------------------------------------------


def shares(counts: np.ndarray) -> np.ndarray:
    """Divides each row of counts (R, C) by its sum; a row without counts is 0."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def most_confused(found: Mistakes) -> list[int]:
    """Returns SHOWN classes with the most wrong labels, in the order of the names.

    Of equal ones, those that are mixed up with the background most. The background is none of them.
    """
    wrong = found.counts * (1 - np.eye(len(found.names), dtype=np.int64))
    classes = [i for i, name in enumerate(found.names) if name != BACKGROUND]
    among = wrong[np.ix_(classes, classes)]
    mixed = among.sum(axis=0) + among.sum(axis=1)
    every = wrong.sum(axis=0) + wrong.sum(axis=1)
    order = sorted(range(len(classes)), key=lambda i: (-mixed[i], -every[classes[i]], i))
    return sorted(classes[i] for i in order[:SHOWN])


def draw_confusion(title: str, found: Mistakes, path: Path) -> None:
    """Draws the shares of each true class for the most confused classes and the background."""
    rows = most_confused(found)
    count = len(found.names)
    last = [count - 1] if found.names[-1] == BACKGROUND else []
    left_out = count - len(last) - len(rows)
    which = f"all {len(rows)} classes that occur"
    if left_out:
        which = f"the {len(rows)} most confused classes, {left_out} others left out"
    kept = rows + last
    values = shares(found.counts)[np.ix_(kept, kept)]
    names = [found.names[row] for row in kept]
    predicted = true = names
    if last:
        without = found.counts[-1].sum()
        true = [*names[:-1], f"(no object): {without} boxes" if without else "(no object)"]
        predicted = [*names[:-1], "(no box)"]
    heat_map = HeatMap(
        values,
        true,
        predicted,
        title=f"{title}: confusion of {found.of}\n{which}",
        scale="share of the true class",
        row_axis="true class",
        column_axis="predicted class",
        blank=True,
    )
    draw_heat_map(heat_map, path)


def _wrong_pairs(found: Mistakes) -> list[tuple[int, int]]:
    """Returns the true and predicted classes that differ, the most frequent pair first."""
    rows, columns = np.nonzero(found.counts)
    pairs = [(i, j) for i, j in zip(rows.tolist(), columns.tolist()) if i != j]
    return sorted(pairs, key=lambda pair: -found.counts[pair])


def _format_pairs(title: str, found: Mistakes) -> str:
    """Formats the pairs that are confused most, background apart, with their counts and shares."""
    of_true = shares(found.counts)
    pairs = [
        pair for pair in _wrong_pairs(found) if BACKGROUND not in map(found.names.__getitem__, pair)
    ]
    lines = [f"{title}: {found.of}; true class -> predicted class, number, share of the true class"]
    if found.names[-1] == BACKGROUND:
        lines.append(_recall(found.counts))
    for true, predicted in pairs[:PAIRS]:
        number = f"{found.counts[true, predicted]:>10}  {of_true[true, predicted]:.3f}"
        lines.append(f"{number}  {found.names[true]} -> {found.names[predicted]}")
    if len(pairs) > PAIRS:
        lines.append(f"and {len(pairs) - PAIRS} more pairs, see errors.json")
    if not pairs:
        lines.append("no class is taken for another")
    return "\n".join(lines)


def _recall(counts: np.ndarray) -> str:
    """Says how many objects have a box of their class; counts (K, K), the last is BACKGROUND."""
    objects, without = counts[:-1], int(counts[-1].sum())
    total, right, missed = int(objects.sum()), int(objects.trace()), int(objects[:, -1].sum())
    words = f"of {total} objects {right} have a box of their class, "
    words += f"{total - right - missed} one of another class, {missed} none"
    return f"{words}; {without} boxes have no object" if without else words


def _record(dataset: Dataset, found: Mistakes) -> dict:
    """Returns the numbers for errors.json: all counts that are not 0, TIDE, the worst images."""
    diagonal = [(i, i) for i in np.flatnonzero(found.counts.diagonal()).tolist()]
    confusion = []
    for true, predicted in diagonal + _wrong_pairs(found):
        names = {"true": found.names[true], "predicted": found.names[predicted]}
        confusion.append(names | {"count": int(found.counts[true, predicted])})
    tide = {kind: None if math.isnan(value) else value for kind, value in found.tide.items()}
    worst = [
        {"file": dataset.index.file_name(row), "score": score}
        for row, (score, _) in found.worst.items()
    ]
    return {"of": found.of, "confusion": confusion, "tide": tide, "worst": worst}
