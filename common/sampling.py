"""How datasets are mixed: one endless, seeded stream of images that ranks share and a resumed run re-enters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.batch import Sample
from common.datasets.base import Dataset


class Mixture(torch.utils.data.Dataset):
    """Several datasets end to end. An item is asked for by (row, draw): `draw` alone decides its augmentation.

    So an augmentation depends neither on the number of workers nor on what was drawn before it.
    """

    def __init__(self, datasets: list[Dataset], transforms: dict[str, Callable[[Sample], Sample]], seed: int):
        self.datasets, self.transforms, self.seed = datasets, transforms, seed
        self.starts = np.cumsum([0] + [len(d) for d in datasets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        row, draw = item
        d = int(np.searchsorted(self.starts, row, side="right")) - 1
        sample = self.datasets[d].load(row - int(self.starts[d]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + draw)
            return self.transforms[sample.dataset](sample)


@dataclass
class Transformed(torch.utils.data.Dataset):
    """The given rows of one dataset in their order, for evaluation."""

    dataset: Dataset
    transform: Callable[[Sample], Sample]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        return self.transform(self.dataset.load(self.rows[i]))


def repeat_factors(datasets: list[Dataset], threshold: float) -> np.ndarray:
    """(I,) how often each image of the union is to be seen per epoch: max over its classes of max(1, sqrt(t / f_c)).

    f_c is the fraction of all I images that contain class c of the concatenated label space.
    Source: LVIS (arXiv 1908.03195, Sec. B); detectron2's RepeatFactorTrainingSampler.
    """
    total = sum(len(d) for d in datasets)
    factors = []
    for dataset in datasets:
        frequency = np.maximum(dataset.image_counts(), 1) / total
        of_class = np.maximum(1, np.sqrt(threshold / frequency))  # (C_d,)
        of_image = np.ones(len(dataset))
        kept = ~dataset.index.ignore
        np.maximum.at(of_image, dataset.index.image_of[kept], of_class[dataset.index.labels[kept]])
        factors.append(of_image)
    return np.concatenate(factors)


class RepeatFactorSampler:
    """Endless stream of (row, draw) over epochs in which image i comes floor(rf_i) or ceil(rf_i) times, shuffled.

    Rank r of w takes every w-th element; `start` elements of the whole stream are skipped, so that a resumed run sees
    exactly the images that it would have seen.
    """

    def __init__(self, factors: np.ndarray, seed: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.factors, self.seed, self.start, self.rank, self.world_size = factors, seed, start, rank, world_size

    def epoch(self, number: int) -> np.ndarray:
        """The rows of epoch `number`, a function of the seed alone; fractional parts are decided by a coin."""
        rng = np.random.default_rng([self.seed, number])
        repeats = np.floor(self.factors + rng.random(len(self.factors))).astype(np.int64)
        return rng.permutation(np.repeat(np.arange(len(self.factors)), repeats))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw, epoch = 0, 0
        while True:
            rows = self.epoch(epoch)
            for i in range(max(0, self.start - draw), len(rows)):
                if (draw + i) % self.world_size == self.rank:
                    yield int(rows[i]), draw + i
            draw, epoch = draw + len(rows), epoch + 1


def shard(length: int, rank: int, world_size: int) -> range:
    """The rows that this rank evaluates: every row of `length` belongs to exactly one rank."""
    return range(rank, length, world_size)


def derangement(length: int, seed: int) -> torch.Tensor:
    """A random order (length,) in which nothing keeps its place, for controls; a single item has no other place."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))
