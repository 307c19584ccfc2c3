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
from common.datasets.files import missing_files, read_size
from common.errors import InputError

CHUNK = 64  # images that a process takes at a time
SHOWN = 3  # names that are printed of each kind of problem
# annotators round: a box may end a pixel, or a thousandth of an image, outside
SLACK, RELATIVE_SLACK = 1, 1e-3


def check_dataset(dataset: Dataset, quick: bool) -> bool:
    """Prints a table of problems with the first names of each kind. Returns whether there are any.

    quick: read only the headers of images, and neither masks nor label maps
    """
    problems, sizes, seen = check_images(dataset, quick)
    problems |= check_annotations(dataset, sizes)
    print(f"{dataset.name}: {dataset.index.source}\n  {dataset.summary().partition(': ')[2]}")
    if dataset.pixel_labels is not None and not quick:
        print(f"  {len(seen)} classes occur in the label maps")
    for kind, found in problems.items():
        print(f"  {kind:<40}{len(found):>9}")
        for name in found[:SHOWN]:
            print(f"      {name}")
        if len(found) > SHOWN:
            print("      ...")
    return any(problems.values())


def check_images(
    dataset: Dataset, quick: bool
) -> tuple[dict[str, list[str]], np.ndarray, set[int]]:
    """Reads all images, and all masks and label maps unless `quick`.

    Returns {kind of problem: names or messages}; (I, 2) height and width of the images, 0 for an
    image that cannot be read; the labels of all boxes and segments, none if `quick`.
    """
    index = dataset.index
    rows = range(len(dataset))
    names = [index.file_name(i) for i in rows]
    problems = {
        "images listed twice": repeated(names),
        "image ids given twice": repeated(index.image_ids),
    }
    places = {}
    if not dataset.shards:  # the tar files were found when they were listed
        places["missing images"] = (dataset.images, names)
    if dataset.maps is not None:
        places["missing label maps"] = (dataset.maps, [index.map_name(i) for i in rows])
    for kind, (root, files) in places.items():
        problems[kind] = missing_files(root, files)
        missing = set(problems[kind])
        rows = [i for i in rows if files[i] not in missing]
    broken = problems["broken images, masks or label maps"] = []
    resized = problems["images of another size than annotated"] = []
    seen = set()
    sizes = np.zeros((len(index), 2), np.int32)
    dataset.warned.fill_(True)  # they are all printed here: no warning in the log
    workers = min(os.cpu_count() or 1, len(rows) // CHUNK)
    chunks = DataLoader(Examined(dataset, rows, quick), CHUNK, num_workers=workers, collate_fn=list)
    results = tqdm(chain.from_iterable(chunks), dataset.name, len(rows), leave=False, disable=None)
    for i, (size, error, labels) in zip(rows, results):
        annotated = tuple(index.sizes[i].tolist())
        if error:
            broken.append(error)
        elif annotated not in (size, (0, 0)):
            expected = f"{annotated[0]} x {annotated[1]}"
            resized.append(f"{names[i]}: {size[0]} x {size[1]} (height, width), not {expected}")
        sizes[i] = size
        seen.update(labels)
    return problems, sizes, seen


@dataclass
class Examined(torch.utils.data.Dataset):
    """The results of loading some rows of a dataset."""

    dataset: Dataset
    rows: Sequence[int]
    quick: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[tuple[int, int], str, list[int]]:
        """Returns height and width, the error message or "", the labels."""
        row = self.rows[i]
        try:
            if self.quick:
                return read_size(*self.dataset.image_file(row)), "", []
            sample = self.dataset.load(row)
        except InputError as error:
            return (0, 0), str(error), []
        return sample.original_size, "", sample.labels.unique().tolist()


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
        "boxes without an area": (ends <= starts).any(axis=1),
        "boxes given twice": twice,
    }
    return {kind: [index.file_name(i) for i in image_of[where]] for kind, where in found.items()}
