"""What is wrong with the files of a dataset whose annotations can be read, all of it and not the first alone."""

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

CHUNK, SHOWN = 64, 3  # images that a process takes at a time; names that are printed of each kind
# annotators round: a box may end a pixel, or a thousandth of an image, beyond it
SLACK, RELATIVE_SLACK = 1, 1e-3


def check_dataset(dataset: Dataset, quick: bool) -> bool:
    """Print a table of problems and the first names of each kind; whether there are any.

    quick: open images without decoding their pixels, and neither masks nor label maps
    """
    problems, sizes, seen = check_images(dataset, quick)
    problems |= check_annotations(dataset, sizes)
    print(f"{dataset.name}: {dataset.index.source}\n  {dataset.summary().partition(': ')[2]}")
    if dataset.pixel_labels is not None and not quick:
        print(f"  {len(seen)} classes occur in the label maps")
    for kind, found in problems.items():
        print(f"  {kind:<40}{len(found):>9}")
        print(
            "".join(f"      {name}\n" for name in found[:SHOWN])
            + "      ...\n" * (len(found) > SHOWN),
            end="",
        )
    return any(problems.values())


def check_images(
    dataset: Dataset, quick: bool
) -> tuple[dict[str, list[str]], np.ndarray, set[int]]:
    """{kind of problem: names or lines}, (I, 2) height and width of the images, the labels seen.

    The size is 0 for an image that cannot be read; labels are those of boxes and segments, none if `quick`.
    """
    index, rows = dataset.index, range(len(dataset))
    names = [index.file_name(i) for i in rows]
    problems = {
        "images listed twice": repeated(names),
        "image ids given twice": repeated(index.image_ids),
    }
    places = (
        {} if dataset.shards else {"missing images": (dataset.images, names)}
    )  # a tar was there when it was listed
    if dataset.maps is not None:
        places["missing label maps"] = dataset.maps, [index.map_name(i) for i in rows]
    for kind, (root, files) in places.items():
        problems[kind] = missing_files(root, files)
        missing = set(problems[kind])
        rows = [i for i in rows if files[i] not in missing]
    broken = problems["broken images, masks or label maps"] = []
    odd = problems["images of another size than annotated"] = []
    seen, sizes = set(), np.zeros((len(index), 2), np.int32)
    dataset.warned.fill_(True)  # the log would name one of those of another size
    workers = min(os.cpu_count() or 1, len(rows) // CHUNK)
    chunks = DataLoader(Examined(dataset, rows, quick), CHUNK, num_workers=workers, collate_fn=list)
    results = chain.from_iterable(chunks)
    for i, (size, line, labels) in zip(
        rows, tqdm(results, dataset.name, len(rows), leave=False, disable=None)
    ):
        annotated = tuple(index.sizes[i].tolist())
        if line:
            broken.append(line)
        elif annotated not in (size, (0, 0)):
            odd.append(
                f"{names[i]}: {size[0]} x {size[1]} (height, width), not {annotated[0]} x {annotated[1]}"
            )
        sizes[i] = size
        seen.update(labels)
    return problems, sizes, seen


@dataclass
class Examined(torch.utils.data.Dataset):
    """What loading the given rows of a dataset tells."""

    dataset: Dataset
    rows: Sequence[int]
    quick: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[tuple[int, int], str, list[int]]:
        """Height and width, "" or the line that says what is broken, the labels."""
        row = self.rows[i]
        try:
            if self.quick:
                return read_size(*self.dataset.image_file(row)), "", []
            sample = self.dataset.load(row)
        except InputError as error:
            return (0, 0), str(error), []
        return sample.original_size, "", sample.labels.unique().tolist()


def repeated(values: Iterable) -> list[str]:
    return [str(value) for value, count in Counter(values).items() if count > 1]


def check_annotations(dataset: Dataset, sizes: np.ndarray) -> dict[str, list[str]]:
    """{kind of problem: names of images, once for each box}; `sizes` (I, 2) are the images' own, 0 where unknown.

    Boxes of segments are not looked at: their maps are what counts.
    """
    if dataset.maps is not None or dataset.supervision == "image_labels":
        return {}
    index = replace(dataset.index, sizes=np.where(sizes > 0, sizes, dataset.index.sizes))
    image_of, boxes = index.image_of, index.boxes
    limits = (
        np.ones((len(boxes), 2)) if index.relative else index.sizes[image_of][:, ::-1]
    )  # (A, 2) width, height
    slack = RELATIVE_SLACK if index.relative else SLACK
    beyond = ((boxes[:, :2] < -slack) | (boxes[:, 2:] > limits + slack)).any(axis=1) & (
        limits > 0
    ).all(axis=1)
    wholly = index.outside()
    rows = np.column_stack([image_of, index.labels, boxes])
    twice = np.ones(len(boxes), bool)
    twice[np.unique(rows, axis=0, return_index=True)[1]] = False
    found = {
        "boxes partly outside their image": beyond & ~wholly,
        "boxes wholly outside their image": wholly,
        "boxes without an area": (boxes[:, 2:] <= boxes[:, :2]).any(axis=1),
        "boxes given twice": twice,
    }
    return {kind: [index.file_name(i) for i in image_of[which]] for kind, which in found.items()}
