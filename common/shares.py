"""Batches of single datasets: by weights of the images, or by shares that follow the losses."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from common.datasets.dataset import Dataset
from common.datasets.known import ALIASES
from common.distributed import same_on_ranks
from common.errors import InputError
from common.sampling import endless, first_rows, refuse_empty

# Shapes: K datasets, I_s images of dataset s.


def trained_names(flag: str, text: str, default: str, datasets: list[Dataset]) -> list[str]:
    """Returns the names of datasets in `text`, by commas, which is the value of a flag.

    Raises InputError for one that is not trained on. The `default` may have such names.
    """
    names = [ALIASES.get(name, name) for name in map(str.strip, text.split(","))]
    trained = [dataset.name for dataset in datasets]
    for name in names if text != default else ():
        if name and name not in trained:
            raise InputError(
                f"{flag} {name}: no dataset '{name}' is trained on; there are {', '.join(trained)}"
            )
    return names


def image_weights(
    datasets: list[Dataset], ratios: dict[str, float], class_aware: Sequence[str]
) -> np.ndarray:
    """Returns (I,): how often each image of all datasets is sampled, relative to the others.

    The datasets are sampled by `ratios`. Within one, images are alike, or, if `class_aware` names
    it, proportional to the sum over their classes of 1 / (images with the class), so that all
    classes are seen equally often; an image without a class is never sampled.
    Source: xingyizhou/UniDet:unidet/data/multi_dataset_dataloader.py
    """
    refuse_empty(datasets)
    weights = []
    for dataset in datasets:
        own = np.ones(len(dataset))
        if dataset.name in class_aware:
            images, counts = dataset.index.by_label
            shares = np.repeat(1 / np.maximum(counts, 1), counts)
            own = np.bincount(images, shares, minlength=len(dataset))
        weights.append(own / own.sum() * ratios[dataset.name])
    return np.concatenate(weights)


@dataclass
class BucketBatchSampler:
    """Yields batches endlessly: lists of (row, draw). All images of a batch are of one bucket.

    Images are sampled with replacement. A bucket that is full becomes a batch at once.
    weights:    (I,) probability of each image, relative to the others
    buckets:    (I,) bucket of each image, such as its dataset
    batch_size: images of a batch on this rank
    start:      number of steps that are skipped; a resumed run has made them
    Source: xingyizhou/UniDet:unidet/data/multi_dataset_dataloader.py
    """

    weights: np.ndarray
    buckets: np.ndarray
    batch_size: int
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def sizes(self) -> list[int]:
        """The largest size of a batch, as `RatioBatchSampler` has those of its datasets."""
        return [self.batch_size]

    def epoch(self, number: int) -> np.ndarray:
        """Samples 65536 rows."""
        rng = np.random.default_rng([self.seed, number])
        ends = np.cumsum(self.weights)
        return np.searchsorted(ends, rng.random(65536) * ends[-1], side="right")

    def batches(self, items: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Yields the batches of a stream of (row, draw)."""
        waiting: dict[int, list] = {}
        for row, draw in items:
            bucket = waiting.setdefault(int(self.buckets[row]), [])
            bucket.append((row, draw))
            if len(bucket) == self.batch_size:
                yield bucket.copy()
                bucket.clear()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        items = endless(self.epoch, 0, self.rank, self.world_size)
        return islice(self.batches(items), self.start, None)


@dataclass
class ShareBatchSampler:
    """Yields batches endlessly: lists of (row, draw). A batch is of one dataset.

    Each rank draws a dataset, and its images with replacement. A batch depends on the seed, the
    ranks, the number of its step and the shares alone, so that a resumed run continues the stream.
    weights:    per dataset (I_s,), how often each image is sampled, relative to the others of it
    batch_size: images per step over all ranks
    period:     steps for which the shares stay the same
    start:      number of steps that are skipped; a resumed run has made them
    shares:     {period: (K,) probability of each dataset}. Periods without an entry have that of
                the last one before. A batch may be drawn some steps ahead: add entries in time

    Raises InputError for a batch size below `world_size`.
    """

    weights: list[np.ndarray]
    batch_size: int
    period: int
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    shares: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        refuse_empty(self.weights)
        self.size = self.batch_size // self.world_size  # images per rank
        if self.size < 1:
            raise InputError(
                f"a batch of {self.batch_size} images is too small for {self.world_size} processes"
            )

    @property
    def sizes(self) -> list[int]:
        """The size of a batch on this rank, as `RatioBatchSampler` has those of its datasets."""
        return [self.size]

    def shares_at(self, step: int) -> np.ndarray:
        """Returns the probability of each dataset (K,) in a step, counted from 0."""
        period = step // self.period
        newest = max(p for p in self.shares if p <= period)
        return self.shares[newest]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ends = [np.cumsum(weights) for weights in self.weights]
        starts = first_rows(self.weights)
        step = self.start
        while True:
            rng = np.random.default_rng([self.seed, step])
            # the images of all ranks first, so that their number does not change them
            places = rng.random((self.world_size, self.size))[self.rank]
            chosen = rng.random(self.world_size)[self.rank]
            edges = np.cumsum(self.shares_at(step))
            d = int(np.searchsorted(edges[:-1], chosen * edges[-1], side="right"))
            rows = np.searchsorted(ends[d], places * ends[d][-1], side="right")
            draw = (step * self.world_size + self.rank) * self.size
            yield [(int(starts[d] + row), draw + i) for i, row in enumerate(rows)]
            step += 1


class Hardness(nn.Module):
    """Keeps the box losses of each dataset, as buffers that the weights bring along.

    means: (2, K), the mean losses that decide the sampling of this period and of the next one;
           0 where nothing is known
    """

    def __init__(self, datasets: int):
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, datasets))  # losses and their number
        self.register_buffer("means", torch.zeros(2, datasets))

    def add(self, dataset: int, loss: Tensor) -> None:
        """Counts the box loss of a batch."""
        self.sums[0, dataset] += loss
        self.sums[1, dataset] += 1

    def end_period(self) -> np.ndarray:
        """Returns the mean losses (K,) that decide the period after the next. Counts anew.

        A dataset without a batch keeps its mean. On all ranks they are those of rank 0.
        """
        same_on_ranks(self)
        total, count = self.sums
        newest = torch.where(count > 0, total / count.clamp(min=1), self.means[1])
        self.means.copy_(torch.stack([self.means[1], newest]))
        self.sums.zero_()
        return newest.cpu().numpy()
