"""The class names of one dataset, and the label space that several datasets make together."""

import difflib
import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError
from common.files import DATA
from common.merges import group_keys

log = logging.getLogger("concord")
EQUAL = 0.99  # cosine from which on two texts are taken as one
COMPARED = 8000  # classes above which texts are not compared: it would take seconds
SAID: set[tuple] = set()  # vocabularies that `warn_of_equal_text` has compared
NO_LISTS = (".csv", ".json", ".yaml", ".yml", ".xml", ".tsv")  # files that tools keep names in


def fold(name: str) -> str:
    """Returns the name in lower case, trimmed, with one space per run of spaces or underscores."""
    words = name.replace("_", " ").lower().split()
    return " ".join(words)


def quoted(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names in quotes, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def warn_of_equal_text(dataset: str, names: tuple[str, ...], text: Tensor) -> None:
    """Logs, once for a vocabulary, which of its classes cannot be told apart by their text.

    They are names that `fold` makes one, and other names whose embeddings have a cosine above
    EQUAL. names: C; text: (C, D) of unit norm
    """
    if (dataset, names) in SAID or len(names) > COMPARED:
        return
    SAID.add((dataset, names))
    spellings = defaultdict(list)
    for row, name in enumerate(names):
        spellings[fold(name)].append(row)
    alike = [rows for rows in spellings.values() if len(rows) > 1]
    if alike:
        pairs = ", ".join(f"'{names[rows[0]]}' and '{names[rows[1]]}'" for rows in alike[:3])
        message = (
            "%s: %d class names differ from others only by case, spaces or underscores (%s); they "
            "have one text, which cannot tell them apart; make them one class"
        )
        log.warning(message, dataset, sum(map(len, alike)) - len(alike), pairs)
    firsts = [rows[0] for rows in spellings.values()]
    rows = text[firsts]
    equal = (rows @ rows.T).triu(1) > EQUAL
    twins = equal.any(0).nonzero().flatten().tolist()
    if twins:
        originals = [int(equal[:, row].nonzero()[0]) for row in twins[:3]]
        pairs = ", ".join(
            f"'{names[firsts[a]]}' and '{names[firsts[b]]}'" for a, b in zip(originals, twins)
        )
        message = (
            "%s: the text embeddings of %d classes equal those of others (%s): the encoder does "
            "not know these names or letters, and both classes get one score; choose another "
            "--text-encoder, or other names"
        )
        log.warning(message, dataset, len(twins), pairs)


@dataclass(frozen=True)
class Vocabulary:
    """The class names of one dataset, in the order of its label indices.

    dataset:      the name of the dataset (`Sample.dataset`)
    names:        C class names
    ids:          C original category ids (COCO 1..90, OpenImages "/m/01g317"); default 1..C
    image_counts: C numbers of training images that show the class, or None if none are published
    is_thing:     C bools, True for things and False for stuff; None if the dataset does not tell
    text:         (C, D) text embeddings of the names, or None; `with_text` adds them
    source:       the file or flag that the names come from, for error messages

    Raises InputError for an empty vocabulary, an empty or repeated name, a repeated id, and ids,
    is_thing or text whose number differs from that of the names.
    """

    dataset: str
    names: tuple[str, ...]
    ids: tuple[int | str, ...] = ()
    image_counts: tuple[int, ...] | None = None
    is_thing: tuple[bool, ...] | None = None
    text: Tensor | None = field(default=None, compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self):
        if not self.ids:
            ids = range(1, len(self.names) + 1)
            object.__setattr__(self, "ids", tuple(ids))
        origin = self.source or self.dataset
        title = f"vocabulary of '{origin}'"
        if not self.names:
            raise InputError(f"{title} is empty; give at least one class name")
        if not all(name.strip() for name in self.names):
            raise InputError(f"{title} has an empty class name; remove or name it")
        count = len(self.names)
        if len(self.ids) != count:
            raise InputError(f"{title} has {count} names but {len(self.ids)} ids")
        for what, values in (("class name", self.names), ("category id", self.ids)):
            seen = set()
            for value in values:
                if value in seen:
                    raise InputError(f"{title} has the {what} '{value!s:.60}' twice; keep one")
                seen.add(value)
        if self.is_thing is not None and len(self.is_thing) != count:
            raise InputError(f"{title} has {count} names but {len(self.is_thing)} in is_thing")
        if self.text is None:
            return
        if self.text.ndim != 2 or len(self.text) != count:
            shape = tuple(self.text.shape)
            raise InputError(
                f"{title} has {count} names but text embeddings {shape}; give one row for each name"
            )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def index_of_id(self) -> dict[int | str, int]:
        """Maps each original category id to its label index."""
        return {id: index for index, id in enumerate(self.ids)}

    @classmethod
    def known(cls, dataset: str) -> "Vocabulary":
        """Reads data/vocabularies/<dataset>.json. The file's field 'origin' names its source."""
        file = DATA / "vocabularies" / f"{dataset}.json"
        record = json.loads(file.read_text())
        fields = {}
        for field_name in ("names", "ids", "image_counts", "is_thing"):
            if field_name in record:
                fields[field_name] = tuple(record[field_name])
        return cls(dataset, **fields)

    @classmethod
    def parse(
        cls, names: str, dataset: str = "vocabulary", source: str = "--vocabulary"
    ) -> "Vocabulary":
        """Makes a vocabulary of comma-separated names, or of a text file with one name per line.

        names: "cat, traffic cone", or the path of the text file, which ends in .txt or .names
        Raises InputError for a file that is missing, is not UTF-8 or has another ending, and as the
        class does.
        """
        file = Path(os.path.expanduser(names))
        is_list = file.suffix in (".txt", ".names")
        exists = os.path.isfile(file)  # false for many names, which are no file's
        if not is_list and (exists or file.suffix in NO_LISTS):
            raise InputError(
                f"{source}: {names} is no list of names; give a .txt file with one name per line,"
                " or the names, by commas"
            )
        if not is_list:
            if ";" in names:
                raise InputError(f"{source} {names}: separate the names by commas")
            # an empty name between commas is kept, so that it is refused
            entries = names.split(",") if names.strip() else []
            stripped = [entry.strip() for entry in entries]
            return cls(dataset, tuple(stripped), source=source)
        if not exists:
            raise InputError(
                f"{source}: {names:.200} does not exist;"
                " give a text file with one name per line, or names"
            )
        try:
            lines = file.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{source}: {names} cannot be read ({error}); save it as UTF-8 text"
            ) from None
        stripped = [line.strip() for line in lines]
        filled = [line for line in stripped if line]
        return cls(dataset, tuple(filled), source=f"{source} {names}")

    def with_text(self, embed: Callable[..., Tensor]) -> "Vocabulary":
        """Returns a copy whose text is `embed(names, dataset=dataset)`."""
        return replace(self, text=embed(self.names, dataset=self.dataset))

    def with_things(self) -> "Vocabulary":
        """Returns a copy with `is_thing` filled in, or the vocabulary itself if it has `is_thing`.

        A name is stuff if some known dataset lists it as stuff and none lists it as a thing. All
        other names are things.
        """
        if self.is_thing is not None:
            return self
        kinds: dict[str, bool] = {}
        for file in (DATA / "vocabularies").glob("*.json"):
            record = json.loads(file.read_text())
            known = zip(record["names"], record.get("is_thing", ()))
            for name, thing in known:
                key = fold(name)
                kinds[key] = kinds.get(key, False) or thing
        is_thing = [kinds.get(fold(name), True) for name in self.names]
        return replace(self, is_thing=tuple(is_thing))


class LabelSpace:
    """The classes of several datasets, as the columns of the class scores, and their text.

    By default the vocabularies are concatenated: class k of dataset d is column offset(d) + k. With
    `merge`, classes share one column, which has the spelling and the text of the first dataset.

    vocabularies: one Vocabulary per dataset; the attribute is {dataset: Vocabulary}
    embed:        makes the text (C_d, D) of a vocabulary without text: `embed(names, dataset=...)`
    merge:        True: classes share a column if their names are equal after `fold` ("person",
                  "Person"). Or the groups of classes that share one, each {dataset: class name}
    names:        C class names
    text:         (C, D) text embeddings of unit norm, or None for a method without text

    No argument takes text apart from its names, so that names cannot get the text of other names.

    Raises InputError if a dataset is named twice, if the text of two datasets differs in width, and
    for a group with an unknown class or with a class of another group.
    """

    def __init__(
        self,
        vocabularies: list[Vocabulary],
        embed: Callable[..., Tensor] | None = None,
        merge: bool | list[dict[str, str]] = False,
    ):
        self.embed = embed
        self.merge = merge
        if embed:
            vocabularies = [v if v.text is not None else v.with_text(embed) for v in vocabularies]
            for vocabulary in vocabularies:
                warn_of_equal_text(vocabulary.dataset, vocabulary.names, vocabulary.text)
        self.vocabularies = {v.dataset: v for v in vocabularies}
        if len(self.vocabularies) < len(vocabularies):
            raise InputError("a dataset is named twice in one label space; name each once")

        widths = {0 if v.text is None else v.text.shape[1] for v in vocabularies}
        if len(widths) > 1:
            raise InputError(
                f"the text embeddings of {', '.join(self.vocabularies)} have the dimensions"
                f" {sorted(widths)}; use one --text-encoder for all of them"
            )

        all_names = [name for vocabulary in vocabularies for name in vocabulary.names]
        by_name = [fold(name) for name in all_names]
        keys = by_name if merge is True else group_keys(vocabularies, merge or [])
        columns = []  # the column of each name
        rows = []  # the first name of each column
        column_of = {}
        for row, key in enumerate(keys):
            if key not in column_of:
                column_of[key] = len(rows)
                rows.append(row)
            columns.append(column_of[key])
        self.names = tuple(all_names[row] for row in rows)
        self.text = torch.cat([v.text for v in vocabularies])[rows] if any(widths) else None
        sizes = [len(v) for v in vocabularies]
        parts = torch.tensor(columns).split(sizes)
        self._columns = dict(zip(self.vocabularies, parts))
        self._columns_on = {}  # (dataset, device): its columns there
        ends = itertools.accumulate(sizes)
        scopes = (slice(end - size, end) for size, end in zip(sizes, ends))
        self._scopes = dict(zip(self.vocabularies, scopes))  # unless names are merged

    def __len__(self) -> int:
        return len(self.names)

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets, in the order of their columns."""
        return list(self.vocabularies)

    @property
    def width(self) -> int:
        """D, the width of the text embeddings; 0 without text."""
        return 0 if self.text is None else self.text.shape[1]

    @property
    def is_thing(self) -> tuple[bool, ...]:
        """C bools, True for things and False for stuff. A class of unknown kind is a thing.

        If datasets that share a column disagree, the first one that has `is_thing` decides.
        """
        is_thing = [True] * len(self)
        for vocabulary in reversed(self.vocabularies.values()):  # the first decides
            columns = self._columns[vocabulary.dataset].tolist()
            kinds = vocabulary.is_thing or ()
            for column, value in zip(columns, kinds):
                is_thing[column] = value
        return tuple(is_thing)

    @cached_property
    def dataset_of_label(self) -> Tensor:
        """(C,) int64: the position in `datasets` of each column's dataset. Wrong with `merge`."""
        sizes = [len(v) for v in self.vocabularies.values()]
        return torch.repeat_interleave(torch.tensor(sizes))

    def columns(self, dataset: str) -> Tensor:
        """Returns (C_d,) int64: the column of each class of `dataset`.

        Raises InputError, which suggests similar names, if the label space lacks `dataset`.
        """
        if dataset not in self._columns:
            near = difflib.get_close_matches(dataset, self.datasets, cutoff=0.4)
            nearest = ", ".join(near or self.datasets)
            raise InputError(
                f"dataset '{dataset}' is not part of this label space; nearest: {nearest}"
            )
        return self._columns[dataset]

    def scope(self, dataset: str) -> slice:
        """Returns the slice of columns that an image of `dataset` may train.

        In a concatenation they are the columns of `dataset`. With `merge` they are all columns.
        """
        self.columns(dataset)  # raises
        return slice(0, len(self)) if self.merge else self._scopes[dataset]

    def to_global(self, dataset: str, labels: Tensor) -> Tensor:
        """Maps label indices (N,) of `dataset` to columns (N,) of the label space."""
        place = dataset, labels.device
        if place not in self._columns_on:  # a copy to the device at every call would be a wait
            self._columns_on[place] = self.columns(dataset).to(labels.device)
        return self._columns_on[place][labels]

    def part(self, dataset: str) -> "LabelSpace":
        """Returns the label space of `dataset` alone. Raises InputError as `columns` does."""
        self.columns(dataset)
        return LabelSpace([self.vocabularies[dataset]], self.embed)

    def unique(self) -> "LabelSpace":
        """Returns a label space of one vocabulary, named "all", that has each name once.

        Of the names that are equal after `fold`, the first is kept with its text. Without text the
        method returns the label space itself.
        """
        if self.text is None:
            return self
        column_of: dict[str, int] = {}
        for column, name in enumerate(self.names):
            column_of.setdefault(fold(name), column)
        rows = list(column_of.values())
        names = tuple(self.names[row] for row in rows)
        vocabulary = Vocabulary("all", names, text=self.text[rows])
        return LabelSpace([vocabulary], self.embed)

    def swap(self, vocabulary: Vocabulary | str) -> "LabelSpace":
        """Returns a label space of other classes for the same model.

        vocabulary: a Vocabulary, names such as "cat, traffic cone", or a .txt file with one name a
                    line; "" stands for all classes of this label space (`unique`)

        A vocabulary with text keeps it. Without, it gets the text that this label space has for its
        names. If one of the names is new, `embed` makes the text of all.
        If this label space has no text, `vocabulary` must be one of its datasets, with the same
        classes, or the name of one.
        Raises InputError for any other vocabulary in that case, for a name without an embedding,
        and for text of another width.
        """
        if vocabulary == "":
            return self.unique()
        if self.text is None:
            return self._swap_without_text(vocabulary)
        if isinstance(vocabulary, str):
            vocabulary = Vocabulary.parse(vocabulary)
        if vocabulary.text is None:
            vocabulary = replace(vocabulary, text=self.known_text(vocabulary))
        swapped = LabelSpace([vocabulary], self.embed)
        if swapped.width != self.width:
            raise InputError(
                f"text embeddings have {swapped.width} dimensions, this model needs {self.width};"
                " use the --text-encoder it was trained with"
            )
        return swapped.to(self.text.device)

    def _swap_without_text(self, vocabulary: Vocabulary | str) -> "LabelSpace":
        """Returns the label space of one dataset of this one. Raises InputError for any other."""
        dataset = vocabulary if isinstance(vocabulary, str) else vocabulary.dataset
        if dataset not in self.vocabularies:
            raise InputError(
                f"this model classifies without text and knows no dataset '{dataset}'; it was"
                f" trained on {', '.join(self.datasets)}"
            )
        known = self.vocabularies[dataset]
        if isinstance(vocabulary, str):
            vocabulary = known
        names = [fold(name) for name in vocabulary.names]
        if names != [fold(name) for name in known.names]:
            raise InputError(
                "this model classifies without text, so it knows only the classes that"
                f" '{dataset}' had in training ({quoted(known.names)}), in this order; evaluate it"
                f" on these, not on {quoted(vocabulary.names)}"
            )
        return LabelSpace([vocabulary])

    def known_text(self, vocabulary: Vocabulary) -> Tensor | None:
        """Returns the text that this label space has for the names; None if it lacks a name."""
        # a dataset of this label space has its own text, as one name may have a row per dataset
        known = self.vocabularies.get(vocabulary.dataset, self)
        row_of: dict[str, int] = {}
        for row, name in enumerate(known.names):
            row_of.setdefault(fold(name), row)
        rows = [row_of.get(fold(name)) for name in vocabulary.names]
        return None if None in rows else known.text[rows]

    def shuffled(self, seed: int) -> "LabelSpace":
        """Returns a copy in which each name has the text of another name, chosen at random.

        It is a control for zero-shot evaluation. The label space must be that of one dataset.
        """
        if self.text is None or len(self.vocabularies) != 1:
            raise InputError("only a label space of one dataset, with text, can be shuffled")
        (vocabulary,) = self.vocabularies.values()
        order = derangement(len(self), seed)
        shuffled = replace(vocabulary, text=self.text[order])
        return LabelSpace([shuffled])

    def with_things(self) -> "LabelSpace":
        """Returns a copy in which `Vocabulary.with_things` has filled in `is_thing`."""
        vocabularies = [v.with_things() for v in self.vocabularies.values()]
        return LabelSpace(vocabularies, self.embed, self.merge)

    def to(self, device: torch.device | str) -> "LabelSpace":
        """Returns a copy with its text on `device`; the label space itself if it has no text."""
        if self.text is None:
            return self
        vocabularies = []
        for vocabulary in self.vocabularies.values():
            text = vocabulary.text.to(device)
            vocabularies.append(replace(vocabulary, text=text))
        return LabelSpace(vocabularies, self.embed, self.merge)


def derangement(length: int, seed: int) -> Tensor:
    """Returns a random permutation (length,) without fixed points. For length 1 it is [0]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(length, generator=generator)
    following = torch.empty_like(order)
    following[order] = order.roll(1)
    return following
