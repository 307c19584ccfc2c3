"""What a training sees of each of its datasets: a line each, and a picture of the first images."""

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from common.batch import Sample
from common.datasets.dataset import Dataset
from common.visualize import sample_grid, save_image

log = logging.getLogger("concord")

LIMIT = 9  # images of the picture, if there are not more datasets
AHEAD = 1000  # batches that are counted


def items_of_datasets(
    batches: Iterable[list[tuple[int, int]]], starts: np.ndarray
) -> tuple[list[list[tuple[int, int]]], int]:
    """Returns the items (row, draw) of each dataset in the first batches, and how many these are.

    starts: (D + 1,) first row of each dataset, and the number of all rows
    """
    items = []
    count = 0
    for batch in islice(batches, AHEAD):
        items += batch
        count += 1
    rows = np.array([row for row, _ in items])
    of_dataset = np.searchsorted(starts, rows, side="right") - 1
    found = [[] for _ in starts[1:]]
    for d, item in zip(of_dataset, items):
        found[d].append(item)
    return found, count


def tell_mixture(datasets: list[Dataset], items: list[list], batches: int, ranks: int) -> None:
    """Logs for each dataset its content, its share of the images, and how often it sees an image.

    items: of each dataset in the first `batches` batches, as `items_of_datasets` returns them
    """
    total = sum(map(len, items))
    for dataset, own in zip(datasets, items):
        line = dataset.summary()
        if own:
            steps = max(1, round(len(dataset) * batches / (len(own) * ranks)))
            line += f"; {len(own) / total:.0%} of all that is seen"
            line += f", each image about once in {steps} steps"
        else:
            line += f"; NONE of it is seen in the first {batches} steps"
        log.info("%s", line)


def draw_first_images(
    load: Callable[[tuple[int, int]], Sample],
    datasets: list[Dataset],
    items: list[list[tuple[int, int]]],
    path: Path,
) -> None:
    """Draws the first images of each dataset, augmented and with their annotations.

    load:  returns an item (row, draw) of the training's `Mixture`
    items: of each dataset, in the order in which the training takes them
    """
    each = max(1, LIMIT // len(datasets))
    samples = [load(item) for own in items for item in own[:each]]
    vocabularies = {dataset.name: dataset.vocabulary for dataset in datasets}
    save_image(sample_grid(samples, vocabularies), path)
