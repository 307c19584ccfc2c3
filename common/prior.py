"""How often each class is detected, as a file of a run folder, so that single images can be calibrated with it."""

import json
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError
from common.labels import Vocabulary, fold
from common.paths import atomic_path


def count_classes(vocabulary: Vocabulary, predictions: dict[int, dict], path: Path) -> Tensor:
    """n_j (C,): the number of detections of each class in the predictions of all images, also written to `path`."""
    labels = torch.cat([torch.zeros(0, dtype=torch.long), *(found["labels"] for found in predictions.values())])
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
        counts = {fold(name): float(count) for name, count in zip(saved["names"], saved["counts"], strict=True)}
        if not all(0 <= count <= 2**53 for count in counts.values()):
            raise ValueError("a count is no number of detections")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"--prior {path} cannot be read ({error}); give a prior-*.json of a run folder") from None
    vocabulary = vocabulary or Vocabulary("prior", tuple(saved["names"]))
    if lacking := [name for name in vocabulary.names if fold(name) not in counts]:
        raise InputError(f"--prior {path} is of another vocabulary: it lacks '{lacking[0]}'; give the prior-*.json of "
                         "an evaluation with these classes, or none")  # fmt: skip
    return vocabulary, torch.tensor([counts[fold(name)] for name in vocabulary.names])
