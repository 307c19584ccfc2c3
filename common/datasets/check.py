"""Finds all that is wrong with the files of a dataset whose annotations can be read."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.datasets.dataset import Dataset
from common.datasets.doubts import box_doubts
from common.datasets.exif import TURNS, is_swapped, read_tag
from common.datasets.files import read_size
from common.datasets.start import map_doubts, palette_doubts, present_values, refuse_nothing
from common.errors import InputError
from common.labels import fold
from common.masks import have_pixels

CHUNK = 64  # images that a process takes at a time
SHOWN = 3  # names that are printed of each kind of problem
# annotators round: a box may end a pixel, or a thousandth of an image, outside
SLACK, RELATIVE_SLACK = 1, 1e-3


def check_dataset(dataset: Dataset, quick: bool, train: bool) -> bool:
    """Prints a table of problems with the first names of each kind. Returns whether there are any.

    quick: read only the headers of images, and neither masks nor label maps
    train: a dataset on which nothing can be trained is a problem
    """
    names_of_files = check_names(dataset)
    problems, sizes, seen = check_images(dataset, quick, names_of_files)
    problems |= check_annotations(dataset, sizes)
    if train:
        problems["nothing to train on"] = untrainable(dataset)
    print(f"{dataset.name}: {dataset.index.source}\n  {dataset.summary().partition(': ')[2]}")
    if dataset.pixel_labels is not None and not quick:
        print(f"  {len(seen)} classes occur in the label maps")
    print_problems(problems)
    return any(problems.values())


def print_problems(problems: dict[str, list[str]]) -> None:
    """Prints the number of problems of each kind that there is, and the first names."""
    if not any(problems.values()):
        print(f"  none of {len(problems)} kinds of problems")
    for kind, found in problems.items():
        if not found:
            continue
        print(f"  {kind:<40}{len(found):>9}")
        for name in found[:SHOWN]:
            print(f"      {name}")
        if len(found) > SHOWN:
            print("      ...")


def check_names(dataset: Dataset) -> dict[str, list[str]]:
    """Looks for the images and label maps; returns {kind of problem: names}."""
    index = dataset.index
    problems = {
        "images listed twice": repeated(map(index.file_name, range(len(index)))),
        "image ids given twice": repeated(index.image_ids),
        "class names alike but for case or spaces": alike(dataset.vocabulary.names),
    }
    for kind, _, found in dataset.find_files():
        problems[f"missing {kind}s"] = found.missing
        pairs = [f"{name}: {file}" for name, file in found.respelt.items()]
        problems[f"{kind}s whose name is spelt otherwise"] = pairs
    return problems


def check_images(
    dataset: Dataset, quick: bool, problems: dict[str, list[str]]
) -> tuple[dict[str, list[str]], np.ndarray, set[int]]:
    """Reads each image that exists, with its masks or label map. If `quick`, only its header.

    problems: {kind: names} that `check_names` found. Files that it lists as missing are not read

    Returns three values. The first is `problems` and those found here, {kind: names or messages}.
    The second is the height and width of each image, (I, 2), 0 if it was not read. The third is
    the set of labels that occur, empty if `quick`.
    """
    index = dataset.index
    rows = range(len(dataset))
    for kind, name_of in (("images", index.file_name), ("label maps", index.map_name)):
        missing = set(problems.get(f"missing {kind}", ()))
        rows = [row for row in rows if not missing or name_of(row) not in missing]
    broken = problems["broken images, masks or label maps"] = []
    resized = problems["images of another size than annotated"] = []
    turned, bare = [], []
    if dataset.maps is None:
        problems["images annotated before their EXIF turn"] = turned
    if index.segmentations is not None:
        problems["boxes without a mask beside others"] = bare
    seen = set()
    maps = MapValues(dataset)
    sizes = np.zeros((len(index), 2), np.int32)
    dataset.warned.fill_(True)  # this module prints every problem, so the log needs no warning
    dataset.told_turned.fill_(True)
    workers = min(os.cpu_count() or 1, len(rows) // CHUNK)
    chunks = DataLoader(Examined(dataset, rows, quick), CHUNK, num_workers=workers, collate_fn=list)
    results = tqdm(chain.from_iterable(chunks), dataset.name, len(rows), leave=False, disable=None)
    for i, image in zip(rows, results):
        name = index.file_name(i)
        annotated = tuple(index.sizes[i].tolist())
        if image.error:
            broken.append(image.error)
        elif image.turned:
            turned.append(name)
        elif annotated not in (image.size, (0, 0)):
            found = f"{image.size[0]} x {image.size[1]} (height, width)"
            resized.append(f"{name}: {found}, not {annotated[0]} x {annotated[1]}")
        bare += [name] * image.bare
        sizes[i] = annotated if image.turned else image.size
        seen.update(image.labels)
        maps.add(name, image.values)
    return problems | maps.problems(), sizes, seen


class MapValues:
    """Counts in how many label maps of a dataset each pixel value occurs, and finds problems."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.maps_with = np.zeros(1 << 16, np.int64)  # number of maps with each pixel value
        self.looked = 0  # number of maps
        self.void = []  # images whose map has void alone

    def add(self, name: str, values: np.ndarray | None) -> None:
        """Adds the distinct values of the map of image `name`; None if it was not read."""
        if values is None:
            return
        self.maps_with[values] += 1
        self.looked += 1
        if (self.dataset.pixel_labels[values] < 0).all():
            self.void.append(name)

    def problems(self) -> dict[str, list[str]]:
        """Returns {kind of problem: names or lines}."""
        if not self.looked:
            return {}
        doubts = map_doubts(self.dataset, self.maps_with, self.looked)
        doubts += palette_doubts(self.dataset)
        return {"label maps of void alone": self.void, "doubts about the label maps": doubts}


@dataclass
class Image:
    """What was found in one image and its annotations.

    size:   height and width, (0, 0) if the image cannot be read
    error:  why it cannot be read, or ""
    turned: its annotations belong to the stored pixels; its EXIF tag turns these by 90 degrees
    bare:   number of boxes without a mask, if other boxes of the dataset have masks
    labels: the labels of its boxes or segments, each once
    values: the distinct pixel values of its label map, None if the map was not read
    """

    size: tuple[int, int] = (0, 0)
    error: str = ""
    turned: bool = False
    bare: int = 0
    labels: Sequence[int] = ()
    values: np.ndarray | None = None


@dataclass
class Examined(torch.utils.data.Dataset):
    """The results of loading some rows of a dataset."""

    dataset: Dataset
    rows: Sequence[int]
    quick: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Image:
        """Returns what is found in an image."""
        row = self.rows[i]
        try:
            return self.header(row) if self.quick else self.whole(row)
        except InputError as error:
            return Image(error=str(error))

    def header(self, row: int) -> Image:
        """Returns what is found in the header of an image, and in the annotations."""
        index = self.dataset.index
        size = read_size(*self.dataset.image_file(row))
        bare = 0
        if index.segmentations is not None:
            bare = int((~index.has_mask[index.rows(row)]).sum())
        return Image(size, turned=self.is_turned(row, size), bare=bare)

    def whole(self, row: int) -> Image:
        """Returns what is found in an image, its masks and its label map."""
        sample = self.dataset.load(row)
        found = Image(sample.original_size, turned=self.is_turned(row, sample.original_size))
        found.labels = sample.labels.unique().tolist()
        if sample.masks is not None:
            found.bare = int((~have_pixels(sample.masks)).sum())
        if self.dataset.pixel_labels is not None:
            found.values = present_values(self.dataset, row)
        return found

    def is_turned(self, row: int, size: tuple[int, int]) -> bool:
        """Tells if an image is annotated as stored. size: height and width, upright"""
        index = self.dataset.index
        if index.relative or self.dataset.maps is not None:
            return False
        if not is_swapped(index.sizes[row], np.array(size)):
            return False
        tag, _ = read_tag(*self.dataset.image_file(row))
        return tag in TURNS


def alike(names: Sequence[str]) -> list[str]:
    """Returns the names that `fold` makes equal to one before them."""
    folded = {}
    for name in names:
        folded.setdefault(fold(name), []).append(name)
    return [f"{same[0]!r} and {name!r}" for same in folded.values() for name in same[1:]]


def repeated(values: Iterable) -> list[str]:
    """Returns the values that occur more than once, as text."""
    return [str(value) for value, count in Counter(values).items() if count > 1]


def check_annotations(dataset: Dataset, sizes: np.ndarray) -> dict[str, list[str]]:
    """Returns {kind of problem: names of images, once for each box}.

    Boxes of segments are not checked, since their label maps are used instead.
    sizes: (I, 2) height and width of the images as read, 0 if unknown
    """
    if dataset.maps is not None or dataset.supervision == "image_labels":
        return {}
    index = replace(dataset.index, sizes=np.where(sizes > 0, sizes, dataset.index.sizes))
    image_of = index.image_of
    starts, ends = index.boxes[:, :2], index.boxes[:, 2:]
    limits = index.sizes[image_of][:, ::-1]  # (A, 2) width, height
    slack = SLACK
    if index.relative:
        limits = np.ones((len(index.boxes), 2))
        slack = RELATIVE_SLACK
    beyond = ((starts < -slack) | (ends > limits + slack)).any(axis=1)
    beyond &= (limits > 0).all(axis=1)
    wholly = index.outside()
    rows = np.column_stack([image_of, index.labels, index.boxes])
    _, first = np.unique(rows, axis=0, return_index=True)
    twice = np.ones(len(rows), bool)
    twice[first] = False
    found = {
        "boxes partly outside their image": beyond & ~wholly,
        "boxes wholly outside their image": wholly,
        "boxes without an area": index.empty(),
        "boxes given twice": twice,
    }
    names = {kind: [index.file_name(i) for i in image_of[where]] for kind, where in found.items()}
    return names | {"doubts about the boxes": box_doubts(index)}


def untrainable(dataset: Dataset) -> list[str]:
    """Returns the line with which a training would refuse the annotations, if it would."""
    try:
        refuse_nothing(dataset)
    except InputError as error:
        return [str(error)]
    return []
