"""Which classes have boxes in training, and the check that novel ones have none."""

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


def box_frequency(datasets: list[Dataset], label_space: LabelSpace, novel: str = "") -> Tensor:
    """(C,) how many training images have a box of each class of the joint label space.

    novel: class names, or a .txt file, that no dataset may box, besides those that a base split declares

    Raises InputError for a novel class that has boxes or is unknown, and if no dataset has any box.
    """
    declared = {
        k: d.name for d in datasets for k in label_space.columns(d.name)[list(d.novel)].tolist()
    }
    known = {fold(name): k for k, name in enumerate(label_space.names)}
    for name in Vocabulary.parse(novel, flag="--novel").names if novel else ():
        if fold(name) not in known:
            raise InputError(
                f"--novel: '{name}' is no class of the training datasets; mend or remove it"
            )
        declared[known[fold(name)]] = "--novel"
    frequency = torch.zeros(len(label_space))
    for dataset in datasets:
        if dataset.supervision == "image_labels":
            continue
        counts = np.bincount(
            label_space.columns(dataset.name), dataset.image_counts(), len(label_space)
        )
        if boxed := [k for k in declared if counts[k]]:
            name, where = label_space.names[boxed[0]], declared[boxed[0]]
            raise InputError(f"class '{name}' is novel by {where}, but '{dataset.name}' boxes it in "
                             f"{counts[boxed[0]]:.0f} images ({len(boxed)} such classes); take out these boxes, the "
                             "class or the dataset")  # fmt: skip
        frequency += torch.from_numpy(counts).float()
    if all(dataset.supervision == "image_labels" for dataset in datasets):
        raise InputError(
            "the training datasets have image labels only; name one with boxes in --datasets, too"
        )
    if not frequency.any():
        names = ", ".join(dataset.name for dataset in datasets)
        raise InputError(f"no box to train on in {names}: there are no annotations, or only crowds or novel classes; "
                         "name a dataset with boxes in --datasets")  # fmt: skip
    return frequency


def boxed_names(frequency: Tensor, label_space: LabelSpace) -> list[str]:
    """The names of the classes that have boxes."""
    return [label_space.names[k] for k in frequency.nonzero().squeeze(1).tolist()]


def seen_and_unseen(
    vocabulary: Vocabulary, seen: Collection[str], titles: tuple[str, str]
) -> dict[str, np.ndarray]:
    """Under two titles (C,) bool each: the classes whose names are among `seen`, and the others; {} if all are."""
    names = {fold(name) for name in seen}
    known = np.array([fold(name) in names for name in vocabulary.names])
    return {} if known.all() else dict(zip(titles, (known, ~known)))


def count_classes(vocabulary: Vocabulary, predictions: dict[int, dict], path: Path) -> Tensor:
    """n_j (C,): the number of detections of each class in the predictions of all images, also written to `path`."""
    labels = torch.cat(
        [torch.zeros(0, dtype=torch.long), *(found["labels"] for found in predictions.values())]
    )
    counts = labels.bincount(minlength=len(vocabulary))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"names": vocabulary.names, "counts": counts.tolist()}))
    return counts


def read_prior(path: str, vocabulary: Vocabulary | None = None) -> tuple[Vocabulary, Tensor]:
    """A vocabulary, by default the file's own, and the counts (C,) of its classes.

    Raises InputError for a file that is missing or broken, and for a class that it does not have.
    """
    try:
        saved = json.loads(Path(path).read_text())
        counts = {
            fold(name): float(count)
            for name, count in zip(saved["names"], saved["counts"], strict=True)
        }
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
            f"--prior {path} cannot be read ({error}); give a prior-*.json of a run folder"
        ) from None
    vocabulary = vocabulary or Vocabulary("prior", tuple(saved["names"]))
    if lacking := [name for name in vocabulary.names if fold(name) not in counts]:
        raise InputError(f"--prior {path} is of another vocabulary: it lacks '{lacking[0]}'; give the prior-*.json of "
                         "an evaluation with these classes, or none")  # fmt: skip
    return vocabulary, torch.tensor([counts[fold(name)] for name in vocabulary.names])
