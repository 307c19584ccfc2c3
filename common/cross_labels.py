"""Which labels of which datasets a model gives to the objects of each dataset.

    python -m common.cross_labels --weights runs/x
    python -m common.cross_labels --weights runs/x --datasets coco,mine=val.json:images/

The images of a dataset are predicted with the labels of each dataset of the training in turn. Each
true object takes the label of the best box that fits it (IoU 0.5), each pixel of a label map that
of its segment, and each image label that of the best box of its image. So a row of the matrix says
that of the cars of coco .62 are Car of o365, .1 are Van, and .2 nothing. It shows classes that two
datasets call by different names, and those that they divide in different ways.

It writes cross_labels.txt, the pairs of different datasets with the largest shares;
cross_labels.png, their matrix; and cross_labels.json, all numbers. A pair is what the model says,
right or wrong. So cross_labels.txt also has the share of the class's objects that get their own
class, with the labels of their own dataset: where that is low, the model does not know the class.
"""

import importlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torchvision.ops import box_iou

from common.batch import Sample
from common.command import COUNT, Range, check_ranges, run_command, saved_args
from common.console import progress_bar
from common.datasets import Dataset, evaluation_datasets
from common.datasets.names import ROOT
from common.errors import InputError
from common.files import atomic_path
from common.fonts import tell_of_squares
from common.heat_map import HeatMap, draw_heat_map
from common.label_accuracy import best_classes
from common.labels import LabelSpace
from common.saved import own_weights, read_metadata
from common.segments import segment_rows

# Shapes: N objects of an image, M of its predictions, K classes of a dataset, L labels of another.

log = logging.getLogger("concord")
KINDS = ("boxes", "instances", "semantic", "panoptic", "image_labels")
TASKS = {"boxes": "instance", "instances": "instance", "semantic": "semantic"}
TASKS |= {"panoptic": "semantic", "image_labels": "instance"}
LINES = 100  # of cross_labels.txt
SIDE = 30  # rows and columns of the picture, so that each cell has its number
Pair = tuple[str, str]  # the dataset of the objects, and that of the labels


@dataclass
class Args:
    weights: str = ""
    """run folder or .safetensors file of a training on several datasets"""
    datasets: str = ""
    """datasets whose objects get labels, as in --eval-datasets; empty: those of the training"""
    data_root: str = ""
    """folder of the datasets; empty: that of the training"""
    output: str = ""
    """folder of the three files; empty: that of --weights"""
    images: Annotated[int, Range(1)] = 200
    """images of each dataset, drawn at random if it has more"""
    score_threshold: Annotated[float, Range(0)] = 0.05
    """lowest score of a box that gives a label"""
    least: Annotated[int, Range(1)] = 5
    """objects of a class below which it is left out of cross_labels.txt and .png"""
    seed: Annotated[int, COUNT] = 0
    """seed of the images drawn"""


# -- Counts ----------------------------------------------------------------------------------------


def count_labels(truth: Sample, found: dict, size: tuple[int, int], min_score: float) -> np.ndarray:
    """Counts which labels the objects of one image get. Returns (K, L + 1); the last is "nothing".

    truth:     objects of the K classes of their own dataset
    found:     what the model predicts for the image with the L labels of another dataset
    size:      (K, L)
    min_score: boxes below it give no label
    """
    num_classes, num_labels = size
    if truth.segments is not None:
        labels = np.append(truth.labels.numpy(), -1)  # pixels without a segment have row -1
        true = labels[truth.segments.numpy()]
        rows = segment_rows(found)
        given = np.append(rows["labels"].cpu().numpy(), num_labels)
        named = given[rows["segments"].cpu().numpy()]
        true, named = true[true >= 0], named[true >= 0]
    elif truth.image_labels is not None:
        kept = found["scores"] >= min_score
        found = {name: found[name][kept] for name in ("labels", "scores")}
        best = best_classes(found, 1) or [num_labels]
        true = truth.image_labels.numpy()
        named = np.full(len(true), best[0])
    else:
        kept = found["scores"] >= min_score
        boxes, labels, scores = (found[name][kept] for name in ("boxes", "labels", "scores"))
        true = truth.labels.numpy()
        named = name_boxes(truth.boxes, boxes, labels, scores).numpy()
        named = np.where(named < 0, num_labels, named)
    flat = true.astype(np.int64) * (num_labels + 1) + named
    counts = np.bincount(flat, minlength=num_classes * (num_labels + 1))
    return counts.reshape(num_classes, num_labels + 1)


def name_boxes(truth: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Returns the label (N,) of each true box (N, 4), -1 for none.

    Box after box, the best first, names the free true box that it overlaps most, with an IoU of 0.5
    or more. boxes (M, 4), labels (M,), scores (M,)
    """
    named = torch.full((len(truth),), -1)
    if not len(truth):
        return named
    overlaps = box_iou(boxes.float(), truth.float())  # (M, N)
    for row in scores.argsort(descending=True, stable=True).tolist():
        free = overlaps[row].masked_fill(named >= 0, -1)
        best = int(free.argmax())
        if free[best] >= 0.5:
            named[best] = labels[row]
    return named


def cross_counts(
    method: ModuleType, model: Any, label_space: LabelSpace, dataset: Dataset, min_score: float
) -> dict[str, np.ndarray]:
    """Returns {dataset of the training: (K, L + 1) counts} over all images of `dataset`."""
    if hasattr(model.args, "task"):  # of a segmenter: what it predicts
        model.args.task = TASKS[dataset.supervision]
    vocabularies = label_space.vocabularies
    spaces = {name: label_space.swap(vocabularies[name]) for name in label_space.datasets}
    total = dict.fromkeys(spaces, 0)
    with progress_bar(f"labels of {dataset.name}", len(dataset)) as bar:
        for row in range(len(dataset)):
            truth = dataset.load(row)
            for name, space in spaces.items():
                (found,) = method.predict_images(model, [truth.image], space)
                size = len(dataset.vocabulary), len(vocabularies[name])
                total[name] = total[name] + count_labels(truth, found, size, min_score)
            bar.update()
    return total


# -- Files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A share of the objects of a class that get a label; `label` "" stands for nothing."""

    dataset: str
    true: str
    other: str
    label: str
    count: int
    of: int

    @property
    def share(self) -> float:
        return self.count / self.of


def entries_of(
    counts: dict[Pair, np.ndarray], names: dict[str, tuple], others: dict[str, tuple]
) -> list[Entry]:
    """Returns all counts that are not 0, the highest share first, then the most objects.

    names, others: the class names of the datasets of the objects and of the labels
    """
    found = []
    for (dataset, other), matrix in counts.items():
        totals = matrix.sum(axis=1)
        labels = (*others[other], "")
        for row, column in np.argwhere(matrix).tolist():
            numbers = int(matrix[row, column]), int(totals[row])
            found.append(Entry(dataset, names[dataset][row], other, labels[column], *numbers))
    return sorted(found, key=lambda entry: (-entry.share, -entry.of))


def format_entries(entries: list[Entry], least: int) -> str:
    """Formats the largest shares between datasets, of classes with `least` objects.

    "own" is the share that gets its own class; "-" for datasets that were not trained.
    """
    between = [e for e in entries if e.dataset != e.other and e.label]
    shown = [entry for entry in between if entry.of >= least]
    trained = {entry.other for entry in entries}
    same = [e for e in entries if (e.other, e.label) == (e.dataset, e.true)]
    own = {(entry.dataset, entry.true): entry.share for entry in same}
    lines = ["share   own  of objects  dataset: class -> dataset: label"]
    for entry in shown[:LINES]:
        pair = f"{entry.dataset}: {entry.true} -> {entry.other}: {entry.label}"
        known = f"{own.get((entry.dataset, entry.true), 0.0):.2f}"
        known = known if entry.dataset in trained else "-"
        lines.append(f"{entry.share:5.2f}  {known:>4}  {entry.of:>10}  {pair}")
    if len(shown) > LINES:
        lines.append(f"and {len(shown) - LINES} more, see cross_labels.json")
    if few := len(between) - len(shown):
        lines.append(f"{few} pairs of classes with less than {least} objects are left out")
    return "\n".join(lines) + "\n"


def strongest(entries: list[Entry], least: int) -> tuple[list[Pair], list[Pair]]:
    """Returns at most SIDE classes, and SIDE labels of other datasets that they get most.

    They are (dataset, name), grouped by dataset.
    """
    rows, columns = {}, {}
    for entry in entries:
        if entry.dataset == entry.other or not entry.label or entry.of < least:
            continue
        row, column = (entry.dataset, entry.true), (entry.other, entry.label)
        fits = len(rows.keys() | {row}) <= SIDE and len(columns.keys() | {column}) <= SIDE
        if fits:
            rows[row] = columns[column] = True
    of_dataset = {name: i for i, name in enumerate(dict.fromkeys(d for d, _ in [*rows, *columns]))}
    return tuple(sorted(side, key=lambda pair: of_dataset[pair[0]]) for side in (rows, columns))


def draw_matrix(entries: list[Entry], least: int, path: Path) -> None:
    """Draws the shares of the `strongest` classes and labels. Draws nothing if there are none."""
    rows, columns = strongest(entries, least)
    if not rows:
        log.info("no class with %d objects gets a label of another dataset: no picture", least)
        return
    values = np.zeros((len(rows), len(columns)))
    for entry in entries:
        row, column = (entry.dataset, entry.true), (entry.other, entry.label)
        if row in rows and column in columns:
            values[rows.index(row), columns.index(column)] = entry.share
    every = {(entry.dataset, entry.true) for entry in entries}
    tell_of_squares([name for _, name in rows + columns])
    heat_map = HeatMap(
        values,
        [name for _, name in rows],
        [name for _, name in columns],
        title=f"Labels that objects get, {len(rows)} of {len(every)} classes",
        scale="share of the objects of the class",
        row_groups=[dataset for dataset, _ in rows],
        column_groups=[dataset for dataset, _ in columns],
        row_axis="true class",
        column_axis="predicted label",
        blank=True,
    )
    draw_heat_map(heat_map, path)


def write(
    counts: dict[Pair, np.ndarray],
    datasets: list[Dataset],
    label_space: LabelSpace,
    least: int,
    folder: Path,
) -> None:
    """Writes cross_labels.json, .txt and .png."""
    names = {dataset.name: dataset.vocabulary.names for dataset in datasets}
    others = {name: v.names for name, v in label_space.vocabularies.items()}
    entries = entries_of(counts, names, others)
    kinds = {"semantic": "pixels", "panoptic": "pixels", "image_labels": "image labels"}
    record = {}
    for dataset in datasets:
        own = [entry for entry in entries if entry.dataset == dataset.name]
        rows = [
            {"true": e.true, "dataset": e.other, "label": e.label or None, "count": e.count}
            | {"share": round(e.share, 4)}
            for e in own
        ]
        counted = kinds.get(dataset.supervision, "boxes")
        record[dataset.name] = {"images": len(dataset), "counted": counted, "labels": rows}
    with atomic_path(folder / "cross_labels.json") as path:
        path.write_text(json.dumps(record, indent=1))
    with atomic_path(folder / "cross_labels.txt") as path:
        text = format_entries(entries, least)
        path.write_text(text, encoding="utf-8", errors="replace")
    draw_matrix(entries, least, folder / "cross_labels.png")
    log.info("\n" + "\n".join(text.splitlines()[:20]))
    log.info("cross labels: %s/cross_labels.txt, .png and .json", folder)


# -- Command ---------------------------------------------------------------------------------------


def load_method(weights: str) -> tuple[ModuleType, Any]:
    """Returns the method that trained the weights, a module, and its settings of the training.

    Raises InputError for weights that are not of a method of this project.
    """
    metadata = read_metadata(weights)
    name = str(metadata["method"])
    if not (ROOT / f"{name}.py").is_file():
        raise InputError(f"--weights {weights}: there is no method file {name:.60}.py")
    method = importlib.import_module(name)
    return method, saved_args(method.Args, metadata)


def generated_size(method: ModuleType, settings: Any) -> int:
    """Returns the side of the images that a --tiny run generated."""
    if hasattr(method, "test_transform"):
        return method.test_transform(settings, "coco-panoptic").size
    return settings.image_size


def choose(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Returns the dataset with `count` of its images, drawn at random; all if it has no more."""
    total = len(dataset)
    if total <= count:
        log.info("%s: all %d images", dataset.name, total)
        return dataset
    kept = np.zeros(total, dtype=bool)
    kept[np.random.default_rng(seed).choice(total, count, replace=False)] = True
    log.info("%s: %d of %d images, drawn at random (--images)", dataset.name, count, total)
    return dataset.select(kept)


def main() -> None:
    """Predicts the images of each dataset with the labels of each, and writes what comes of it."""
    args = tyro.cli(Args, prog="python -m common.cross_labels", description=__doc__)
    check_ranges(args)
    if not args.weights:
        raise InputError("name --weights: the run folder of a training on several datasets")
    weights = str(own_weights(args.weights) or args.weights)
    method, settings = load_method(weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, label_space = method.load(weights, device=device)
    settings = replace(
        settings,
        weights=weights,
        eval_only=True,
        eval_datasets=args.datasets or settings.eval_datasets,
        data_root=args.data_root or settings.data_root,
    )
    size = generated_size(method, settings) if settings.tiny else 0
    datasets = evaluation_datasets(settings, label_space, size, accepts=KINDS)
    if all(dataset.name == name for dataset in datasets for name in label_space.datasets):
        raise InputError(
            f"--weights {args.weights}: it was trained on {', '.join(label_space.datasets)} alone;"
            " name --datasets others, or weights of several"
        )
    folder = Path(args.output or weights)
    folder = folder.parent if folder.is_file() else folder
    counts = {}
    datasets = [choose(dataset, args.images, args.seed) for dataset in datasets]
    for dataset in datasets:
        found = cross_counts(method, model, label_space, dataset, args.score_threshold)
        counts |= {(dataset.name, other): matrix for other, matrix in found.items()}
    write(counts, datasets, label_space, args.least, folder)


if __name__ == "__main__":
    run_command(main)
