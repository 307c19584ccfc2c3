"""How many training images, or detections, each class has."""

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


def images_per_class(datasets: list[Dataset], label_space: LabelSpace, novel: str = "") -> Tensor:
    """Returns (C,) the number of training images that have a box of each class.

    novel: names, or a .txt file, of classes that no dataset may box, in addition to the novel
           classes of the datasets themselves

    Raises InputError for a novel class that has boxes or is unknown, and if there is no box at all.
    """
    declared: dict[int, str] = {}  # column of a novel class: who says so
    for dataset in datasets:
        for k in label_space.columns(dataset.name)[list(dataset.novel)].tolist():
            declared[k] = dataset.name
    column_of = {fold(name): k for k, name in enumerate(label_space.names)}
    for name in Vocabulary.parse(novel, source="novel classes").names if novel else ():
        if fold(name) not in column_of:
            raise InputError(
                f"novel classes: '{name}' is no class of the training datasets; mend or remove it"
            )
        declared[column_of[fold(name)]] = "the list of novel classes"

    total = torch.zeros(len(label_space))
    for dataset in datasets:
        if dataset.supervision == "image_labels":
            continue
        columns = label_space.columns(dataset.name)
        counts = np.bincount(columns, dataset.image_counts(), len(label_space))
        if boxed := [k for k in declared if counts[k]]:
            raise InputError(
                f"class '{label_space.names[boxed[0]]}' is novel by {declared[boxed[0]]}, but"
                f" '{dataset.name}' boxes it in {counts[boxed[0]]:.0f} images ({len(boxed)} such"
                " classes); take out these boxes, the class or the dataset"
            )
        total += torch.from_numpy(counts).float()
    if all(dataset.supervision == "image_labels" for dataset in datasets):
        raise InputError(
            "the training datasets have image-level labels only; name one with boxes in --datasets"
        )
    if not total.any():
        names = ", ".join(dataset.name for dataset in datasets)
        raise InputError(
            f"no box to train on in {names}: there are no annotations, or only crowds or novel"
            " classes; name a dataset with boxes in --datasets"
        )
    return total


def boxed_names(images: Tensor, label_space: LabelSpace) -> list[str]:
    """Returns the names of the classes that have boxes, by `images_per_class` (C,)."""
    return [label_space.names[k] for k in images.nonzero().squeeze(1).tolist()]


def seen_and_unseen(
    vocabulary: Vocabulary, seen: Collection[str], titles: tuple[str, str]
) -> dict[str, np.ndarray]:
    """Splits the classes into those named in `seen` and the others: two titles, (C,) bool each.

    Returns {} if all are seen.
    """
    names = {fold(name) for name in seen}
    is_seen = np.array([fold(name) in names for name in vocabulary.names])
    return {} if is_seen.all() else dict(zip(titles, (is_seen, ~is_seen)))


def count_classes(vocabulary: Vocabulary, predictions: dict[int, dict], path: Path) -> Tensor:
    """Returns (C,) the number of detections of each class, and writes them to `path`."""
    labels = [torch.zeros(0, dtype=torch.long), *(p["labels"] for p in predictions.values())]
    counts = torch.cat(labels).bincount(minlength=len(vocabulary))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"names": vocabulary.names, "counts": counts.tolist()}))
    return counts


def read_prior(path: str, vocabulary: Vocabulary | None = None) -> tuple[Vocabulary, Tensor]:
    """Reads what `count_classes` wrote: a vocabulary, by default the file's, and its counts (C,).

    Raises InputError for a file that is missing or broken, and for a class that it does not have.
    """
    try:
        saved = json.loads(Path(path).read_text())
        pairs = zip(saved["names"], saved["counts"], strict=True)
        counts = {fold(name): float(count) for name, count in pairs}
        if not all(0 <= count <= 2**53 for count in counts.values()):
            raise ValueError("a count is no number of detections")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError(
            f"prior {path} cannot be read ({error}); give a prior-*.json of a run folder"
        ) from None
    vocabulary = vocabulary or Vocabulary("prior", tuple(saved["names"]))
    if lacking := [name for name in vocabulary.names if fold(name) not in counts]:
        raise InputError(
            f"prior {path} is of another vocabulary: it lacks '{lacking[0]}'; give the prior-*.json"
            " of an evaluation with these classes, or none"
        )
    return vocabulary, torch.tensor([counts[fold(name)] for name in vocabulary.names])
