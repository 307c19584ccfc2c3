"""Vocabularies of single datasets and the label space that concatenates them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError

DATA = Path(__file__).resolve().parent.parent / "data"


def fold(name: str) -> str:
    """Lower case, underscores to spaces, single spaces: 'arctic_(type_of_shoe)' -> 'arctic (type of shoe)'."""
    return " ".join(name.replace("_", " ").lower().split())


@dataclass(frozen=True)
class Vocabulary:
    """The class names of one dataset, in the order of its label indices.

    dataset:      the name under which its samples arrive (`Sample.dataset`)
    names:        C class names
    ids:          C original category ids (COCO 1..90, OpenImages "/m/01g317", ...); default 1..C
    image_counts: C numbers of training images that contain the class, where the dataset publishes them

    Raises InputError for an empty vocabulary, an empty or repeated name, a repeated id.
    """

    dataset: str
    names: tuple[str, ...]
    ids: tuple[int | str, ...] = ()
    image_counts: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(1, len(self.names) + 1)))
        if not self.names:
            raise InputError(f"vocabulary of '{self.dataset}' is empty; give at least one class name")
        if any(not name.strip() for name in self.names):
            raise InputError(f"vocabulary of '{self.dataset}' has an empty class name; remove or name it")
        if len(self.ids) != len(self.names):
            raise InputError(f"vocabulary of '{self.dataset}' has {len(self.names)} names but {len(self.ids)} ids")
        for what, values in (("class name", self.names), ("category id", self.ids)):
            if len(set(values)) < len(values):
                twice = next(v for i, v in enumerate(values) if v in values[:i])
                raise InputError(f"vocabulary of '{self.dataset}' has the {what} '{twice}' twice; keep one")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def index_of_id(self) -> dict[int | str, int]:
        return {id: index for index, id in enumerate(self.ids)}

    @classmethod
    def known(cls, dataset: str) -> "Vocabulary":
        """The vocabulary kept in data/vocabularies/<dataset>.json; its 'origin' field says where it is from."""
        record = json.loads((DATA / "vocabularies" / f"{dataset}.json").read_text())
        counts = record.get("image_counts")
        return cls(dataset, tuple(record["names"]), tuple(record["ids"]), tuple(counts) if counts else None)

    @classmethod
    def parse(cls, text: str, dataset: str = "vocabulary") -> "Vocabulary":
        """`--vocabulary`: comma-separated names, or a text file with one name per line."""
        is_file = text.endswith(".txt")
        if is_file and not Path(text).is_file():
            raise InputError(f"--vocabulary: {text} does not exist; give a text file with one name per line, or names")
        try:
            entries = Path(text).read_text("utf-8-sig").splitlines() if is_file else text.split(",")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--vocabulary: {text} cannot be read ({error}); save it as UTF-8 text") from None
        if not is_file and text.strip():
            return cls(dataset, tuple(entry.strip() for entry in entries))
        return cls(dataset, tuple(entry.strip() for entry in entries if entry.strip()))


class LabelSpace:
    """The plain concatenation of vocabularies: label k of dataset d becomes offset(d) + k; nothing is merged.

    Raises InputError if a dataset name comes twice.
    """

    def __init__(self, vocabularies: list[Vocabulary]):
        self.vocabularies = {v.dataset: v for v in vocabularies}
        if len(self.vocabularies) < len(vocabularies):
            raise InputError("a dataset is named twice in one label space; name each once")
        self._slices, start = {}, 0
        for vocabulary in vocabularies:
            self._slices[vocabulary.dataset] = slice(start, start + len(vocabulary))
            start += len(vocabulary)

    def __len__(self) -> int:
        return sum(len(v) for v in self.vocabularies.values())

    @property
    def datasets(self) -> list[str]:
        return list(self.vocabularies)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for v in self.vocabularies.values() for name in v.names)

    def distinct(self) -> tuple[Vocabulary, list[int]]:
        """One vocabulary without repeats ("person" and "Person" are one name), and the row of each of its names."""
        rows: dict[str, int] = {}
        for row, name in enumerate(self.names):
            rows.setdefault(fold(name), row)
        return Vocabulary("all", tuple(self.names[row] for row in rows.values())), list(rows.values())

    def slice(self, dataset: str) -> slice:
        """Where the labels of `dataset` lie in the concatenation. KeyError for a dataset that is not part of it."""
        return self._slices[dataset]

    def to_global(self, dataset: str, labels: Tensor) -> Tensor:
        """(N,) indices in the dataset's own vocabulary -> (N,) indices in the concatenation."""
        return labels + self.slice(dataset).start

    @cached_property
    def dataset_of_label(self) -> Tensor:
        """(C,) int64: the position of the dataset that each label of the concatenation comes from."""
        sizes = torch.tensor([len(v) for v in self.vocabularies.values()])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)
