"""Vocabularies of single datasets and the label space that concatenates them."""

import json
from dataclasses import dataclass, replace
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
    is_thing:     C bools: instances of the class can be counted; None where the dataset does not tell things from stuff

    Raises InputError for an empty vocabulary, an empty or repeated name, a repeated id.
    """

    dataset: str
    names: tuple[str, ...]
    ids: tuple[int | str, ...] = ()
    image_counts: tuple[int, ...] | None = None
    is_thing: tuple[bool, ...] | None = None

    def __post_init__(self):
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(1, len(self.names) + 1)))
        if not self.names:
            raise InputError(
                f"vocabulary of '{self.dataset}' is empty; give at least one class name"
            )
        if any(not name.strip() for name in self.names):
            raise InputError(
                f"vocabulary of '{self.dataset}' has an empty class name; remove or name it"
            )
        if len(self.ids) != len(self.names):
            raise InputError(
                f"vocabulary of '{self.dataset}' has {len(self.names)} names but {len(self.ids)} ids"
            )
        for what, values in (("class name", self.names), ("category id", self.ids)):
            if len(set(values)) < len(values):
                twice = next(v for i, v in enumerate(values) if v in values[:i])
                raise InputError(
                    f"vocabulary of '{self.dataset}' has the {what} '{twice}' twice; keep one"
                )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def index_of_id(self) -> dict[int | str, int]:
        return {id: index for index, id in enumerate(self.ids)}

    @classmethod
    def known(cls, dataset: str) -> "Vocabulary":
        """The vocabulary kept in data/vocabularies/<dataset>.json; its 'origin' field says where it is from."""
        record = json.loads((DATA / "vocabularies" / f"{dataset}.json").read_text())
        counts, is_thing = (
            tuple(record[key]) if key in record else None for key in ("image_counts", "is_thing")
        )
        return cls(dataset, tuple(record["names"]), tuple(record["ids"]), counts, is_thing)

    def with_things(self) -> "Vocabulary":
        """Things told from stuff by their names: stuff is what a known dataset calls so, and none a thing."""
        kinds: dict[str, bool] = {}
        for file in (DATA / "vocabularies").glob("*.json"):
            record = json.loads(file.read_text())
            for name, thing in zip(record["names"], record.get("is_thing", ())):
                kinds[fold(name)] = kinds.get(fold(name), False) or thing
        return replace(self, is_thing=tuple(kinds.get(fold(name), True) for name in self.names))

    @classmethod
    def parse(
        cls, text: str, dataset: str = "vocabulary", flag: str = "--vocabulary"
    ) -> "Vocabulary":
        """Comma-separated names, or a text file with one name per line; errors name the `flag` they are from."""
        is_file = text.endswith(".txt")
        if is_file and not Path(text).is_file():
            raise InputError(
                f"{flag}: {text} does not exist; give a text file with one name per line, or names"
            )
        try:
            entries = Path(text).read_text("utf-8-sig").splitlines() if is_file else text.split(",")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{flag}: {text} cannot be read ({error}); save it as UTF-8 text"
            ) from None
        keep_empty = not is_file and text.strip()  # to refuse them
        names = tuple(entry.strip() for entry in entries if keep_empty or entry.strip())
        return replace(cls(flag, names), dataset=dataset)


class LabelSpace:
    """The joint label space of several vocabularies; `to_global` is the one way into it.

    By default the plain concatenation: label k of dataset d becomes offset(d) + k; nothing is merged. With `merge`,
    classes whose names fold to the same text ("person", "Person") are one, spelled as in the first dataset.

    Raises InputError if a dataset name comes twice.
    """

    def __init__(self, vocabularies: list[Vocabulary], merge: bool = False):
        self.vocabularies = {v.dataset: v for v in vocabularies}
        if len(self.vocabularies) < len(vocabularies):
            raise InputError("a dataset is named twice in one label space; name each once")
        names, self._rows, seen = [], {}, {}
        for vocabulary in vocabularies:
            own = []
            for name in vocabulary.names:
                key = fold(name) if merge else len(names)
                if seen.setdefault(key, len(names)) == len(names):
                    names.append(name)
                own.append(seen[key])
            self._rows[vocabulary.dataset] = torch.tensor(own)
        self.names, self.merged = tuple(names), merge

    def __len__(self) -> int:
        return len(self.names)

    @property
    def datasets(self) -> list[str]:
        return list(self.vocabularies)

    def distinct(self) -> tuple[Vocabulary, list[int]]:
        """One vocabulary without repeats ("person" and "Person" are one name), and the row of each of its names."""
        rows: dict[str, int] = {}
        for row, name in enumerate(self.names):
            rows.setdefault(fold(name), row)
        return Vocabulary("all", tuple(self.names[row] for row in rows.values())), list(
            rows.values()
        )

    def rows(self, dataset: str) -> Tensor:
        """(C_d,) int64: where the labels of `dataset` lie. KeyError for a dataset that is not part of it."""
        return self._rows[dataset]

    def slice(self, dataset: str) -> slice:
        """`rows` of a concatenation, which are consecutive."""
        rows = self.rows(dataset)
        return slice(int(rows[0]), int(rows[-1]) + 1)

    def to_global(self, dataset: str, labels: Tensor) -> Tensor:
        """(N,) indices in the dataset's own vocabulary -> (N,) indices in the joint label space."""
        return self.rows(dataset).to(labels.device)[labels]

    @cached_property
    def dataset_of_label(self) -> Tensor:
        """(C,) int64: the position of the dataset that each label of a concatenation comes from."""
        sizes = torch.tensor([len(v) for v in self.vocabularies.values()])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)
