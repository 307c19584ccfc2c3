"""How many training images or detections each class has, and which classes have boxes."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.datasets.dataset import Dataset
from common.errors import InputError
from common.files import atomic_path
from common.labels import LabelSpace, Vocabulary, fold

# what reading raises for a file that is missing or holds no counts
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def images_per_class(datasets: list[Dataset], label_space: LabelSpace, novel: str = "") -> Tensor:
    """Counts the images that have a box of each class of the label space: (C,) float32.

    novel: comma-separated names of classes that must have no box, or a .txt file of names. The
           novel classes of `datasets` must have none either.

    Datasets that have image labels only are skipped. Raises InputError for a novel class that has
    boxes or is unknown, and if no class has boxes.
    """
    source_of = {}  # {novel class: what declares it novel}
    for dataset in datasets:
        columns = label_space.columns(dataset.name)[list(dataset.novel)]
        source_of |= dict.fromkeys(columns.tolist(), dataset.name)
    column_of = {fold(name): column for column, name in enumerate(label_space.names)}
    for name in Vocabulary.parse(novel, source="novel classes").names if novel else ():
        if fold(name) not in column_of:
            raise InputError(
                f"novel classes: '{name}' is no class of the training datasets; mend or remove it"
            )
        source_of[column_of[fold(name)]] = "the list of novel classes"

    boxed = [dataset for dataset in datasets if dataset.supervision != "image_labels"]
    if not boxed:
        raise InputError(
            "the training datasets have image labels only; name one with boxes in --datasets, too"
        )
    total = torch.zeros(len(label_space))
    for dataset in boxed:
        columns = label_space.columns(dataset.name)
        counts = np.bincount(columns, dataset.image_counts(), len(label_space))
        wrong = [column for column in source_of if counts[column]]
        if wrong:
            first = wrong[0]
            raise InputError(
                f"class '{label_space.names[first]}' is novel by {source_of[first]}, but"
                f" '{dataset.name}' boxes it in {counts[first]:.0f} images ({len(wrong)} such"
                " classes); take out these boxes, the class or the dataset"
            )
        total += torch.from_numpy(counts).float()
    if not total.any():
        raise InputError(
            f"no box to train on in {', '.join(dataset.name for dataset in datasets)}: there are"
            " no annotations, or only crowds or novel classes; name a dataset with boxes in"
            " --datasets"
        )
    return total


def federated_counts(
    datasets: list[Dataset], label_space: LabelSpace, own: str | None = None
) -> Tensor:
    """Counts the images of federated datasets that have a box of each class: (C,) float32.

    own: the dataset of the images that are trained on; None: the images are of all datasets

    -1 stands for a class that takes no part in the sampling of the federated loss: one that only
    other datasets box, one of `own`, unless it is federated, and one of a federated dataset without
    images (@0), which is a negative of all images. Without a federated dataset, all have -1.
    """
    total = np.zeros(len(label_space))
    shared = np.zeros(len(label_space), bool)  # the classes of federated datasets
    sampled = {dataset.name for dataset in datasets if dataset.federated and len(dataset)}
    for dataset in datasets:
        if dataset.name in sampled:
            columns = label_space.columns(dataset.name).numpy()
            shared[columns] = True
            total += np.bincount(columns, dataset.image_counts(), len(label_space))
    for dataset in datasets:
        if dataset.name not in sampled and dataset.supervision != "image_labels":
            columns = label_space.columns(dataset.name).numpy()
            if dataset.name != own:
                columns = columns[~shared[columns]]
            total[columns] = -1
    if not shared.any():
        total[:] = -1
    return torch.from_numpy(total).float()


def boxed_names(images_per_class: Tensor, label_space: LabelSpace) -> list[str]:
    """Returns the names of the classes with boxes. images_per_class: (C,), 0 without a box"""
    return [label_space.names[k] for k in images_per_class.nonzero().flatten().tolist()]


def seen_and_unseen(
    vocabulary: Vocabulary, seen: Collection[str], titles: tuple[str, str]
) -> dict[str, np.ndarray]:
    """Returns {titles[0]: the classes in `seen`, titles[1]: the others}, each as (C,) bool.

    If all classes are in `seen`, the result is {}. Names are compared after `fold`.
    """
    folded = {fold(name) for name in seen}
    known = np.array([fold(name) in folded for name in vocabulary.names])
    return {} if known.all() else dict(zip(titles, (known, ~known)))


def base_and_novel(dataset: Dataset, boxed: Collection[str]) -> dict[str, np.ndarray]:
    """Returns {"base": the classes that had boxes, "novel": the others}, each as (C,) bool.

    Classes that are novel in the dataset stay so, whatever was trained. If all are base, {}.
    boxed: names of the classes that had boxes in training
    """
    vocabulary = dataset.vocabulary
    novel = {fold(vocabulary.names[label]) for label in dataset.novel}
    seen = {fold(name) for name in boxed} - novel
    return seen_and_unseen(vocabulary, seen, ("base", "novel"))


def own_and_elsewhere(dataset: Dataset, label_space: LabelSpace) -> dict[str, np.ndarray]:
    """Returns {group: (C_d,) bool}: the classes that a dataset annotates, and those of others.

    If it annotates all of its classes, the result is {}.
    """
    own = np.ones(len(dataset.vocabulary), dtype=bool)
    own[list(dataset.novel)] = False
    others = {name: v for name, v in label_space.vocabularies.items() if name != dataset.name}
    named = {fold(name) for vocabulary in others.values() for name in vocabulary.names}
    elsewhere = np.array([fold(name) in named for name in dataset.vocabulary.names])
    return {} if own.all() else {"own": own, "elsewhere": elsewhere & ~own}


def own_columns(datasets: list[Dataset], label_space: LabelSpace) -> dict[str, Tensor]:
    """Returns {dataset: (C,) bool}: L_d, the columns of the classes that each dataset annotates."""
    scopes = {}
    for dataset in datasets:
        columns = label_space.columns(dataset.name)
        annotated = [k for k in range(len(columns)) if k not in dataset.novel]
        scope = torch.zeros(len(label_space), dtype=torch.bool)
        scope[columns[annotated]] = True
        scopes[dataset.name] = scope
    return scopes


def count_classes(vocabulary: Vocabulary, predictions: dict[int, dict], path: Path) -> Tensor:
    """Returns the number n_j of detections of each class, (C,) int64.

    predictions: {image: {"labels": (N,), ...}}
    path:        the json file to which the class names and the numbers are written
    """
    labels = [torch.zeros(0, dtype=torch.long)]
    labels += [prediction["labels"] for prediction in predictions.values()]
    counts = torch.cat(labels).bincount(minlength=len(vocabulary))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"names": vocabulary.names, "counts": counts.tolist()}))
    return counts


def read_prior(path: str, vocabulary: Vocabulary | None = None) -> tuple[Vocabulary, Tensor]:
    """Reads the file of `count_classes`. Returns a vocabulary and the counts (C,) of its classes.

    vocabulary: the classes to return; None stands for those of the file
    Raises InputError if the file is missing or broken, and if it lacks a class of `vocabulary`.
    """
    try:
        record = json.loads(Path(path).read_text())
        pairs = zip(record["names"], record["counts"], strict=True)
        counts = {fold(name): float(count) for name, count in pairs}
        if not all(0 <= count <= 2**53 for count in counts.values()):
            raise ValueError("a count is no number of detections")
    except BROKEN as error:
        raise InputError(
            f"prior {path} cannot be read ({error}); give a prior-*.json of a run folder"
        ) from None
    vocabulary = vocabulary or Vocabulary("prior", tuple(record["names"]))
    lacking = [name for name in vocabulary.names if fold(name) not in counts]
    if lacking:
        raise InputError(
            f"prior {path} is of another vocabulary: it lacks '{lacking[0]}';"
            " give the prior-*.json of an evaluation with these classes, or none"
        )
    return vocabulary, torch.tensor([counts[fold(name)] for name in vocabulary.names])
