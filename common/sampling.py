"""How datasets are mixed: endless, seeded streams of images that ranks share and a resumed run re-enters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.batch import Sample, collate
from common.datasets.dataset import Dataset
from common.errors import InputError


class Mixture(torch.utils.data.Dataset):
    """Several datasets end to end. An item is asked for by (row, draw): `draw` alone decides its augmentation.

    So an augmentation depends neither on the number of workers nor on what was drawn before it.
    """

    def __init__(
        self, datasets: list[Dataset], transforms: dict[str, Callable[[Sample], Sample]], seed: int
    ):
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
        images, counts = dataset.index.by_label
        for rows, factor in zip(np.split(images, np.cumsum(counts)[:-1]), of_class):
            of_image[rows] = np.maximum(of_image[rows], factor)
        factors.append(of_image)
    return np.concatenate(factors)


def endless(
    epoch: Callable[[int], np.ndarray], start: int, rank: int, world_size: int
) -> Iterator[tuple[int, int]]:
    """Endless stream of (row, draw), `epoch(0)`, `epoch(1)`, ... end to end; `draw` counts the elements of the whole.

    Rank r of w takes every w-th element; `start` elements of the whole stream are skipped, so that a resumed run sees
    exactly the images that it would have seen.
    """
    draw, number = 0, 0
    while True:
        rows = epoch(number)
        for i in range(max(0, start - draw), len(rows)):
            if (draw + i) % world_size == rank:
                yield int(rows[i]), draw + i
        draw, number = draw + len(rows), number + 1


class RepeatFactorSampler:
    """Endless stream of (row, draw) over epochs in which image i comes floor(rf_i) or ceil(rf_i) times, shuffled.

    factors: (I,) rf_i, all 1 for a plain shuffle; the other arguments are those of `endless`
    """

    def __init__(
        self,
        factors: np.ndarray,
        seed: int | tuple,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.factors, self.seed, self.place = factors, seed, (start, rank, world_size)

    def epoch(self, number: int) -> np.ndarray:
        """The rows of epoch `number`, a function of the seed alone; fractional parts are decided by a coin."""
        rng = np.random.default_rng([self.seed, number])
        repeats = np.floor(self.factors + rng.random(len(self.factors))).astype(np.int64)
        return rng.permutation(np.repeat(np.arange(len(self.factors)), repeats))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return endless(self.epoch, *self.place)


class ClassAwareSampler:
    """Endless stream of (row, draw): a class of any dataset drawn uniformly, then one of its images uniformly.

    Classes without an image are left out, and so are images without a class; the other arguments are those of
    `endless`. Raises InputError if no image has a class.
    """

    def __init__(
        self, datasets: list[Dataset], seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.seed, self.place, self.total = (
            seed,
            (start, rank, world_size),
            sum(len(d) for d in datasets),
        )
        self.images, counts = zip(
            *(d.index.by_label for d in datasets)
        )  # per dataset (X_d,), (C_d,)
        self.first_row = np.cumsum([0] + [len(d) for d in datasets])
        self.ends = np.cumsum(
            [0] + [len(images) for images in self.images]
        )  # of each dataset's part of all images
        self.counts = np.concatenate(counts)  # (C,); an image of five dogs is one of the dog's
        self.counts = self.counts[self.counts > 0]
        self.firsts = np.cumsum(self.counts) - self.counts  # (C,)
        if not len(self.counts):
            names = ", ".join(d.name for d in datasets)
            raise InputError(
                f"no image of {names} has a class, so none can be drawn by class; check the annotations"
            )

    def epoch(self, number: int) -> np.ndarray:
        """(I,) independent draws."""
        rng = np.random.default_rng([self.seed, number])
        classes = rng.integers(len(self.counts), size=self.total)
        picked = self.firsts[classes] + rng.integers(self.counts[classes])
        rows = np.empty(self.total, np.int64)
        for d, images in enumerate(self.images):  # never joined: they may be mapped from files
            own = (picked >= self.ends[d]) & (picked < self.ends[d + 1])
            rows[own] = self.first_row[d] + images[picked[own] - self.ends[d]]
        return rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return endless(self.epoch, *self.place)


class RatioBatchSampler:
    """Endless stream of batches, lists of (row of the Mixture, draw), each of one dataset.

    factors:     per dataset the repeat factors (I_d,) of its images, all 1 for a plain shuffle
    ratios:      images drawn from each dataset, relative to the others
    batch_sizes: images per step over all ranks; each rank gets its share, rounded down
    start:       steps to skip, so that a resumed run sees exactly the batches that it would have seen
    apart:       each rank draws its own dataset, instead of the same one on all

    A step goes to dataset d with a probability in proportion to ratio_d / batch_size_d, so that images are drawn in the
    ratios. Within a dataset they come in epochs, where Detic draws them with replacement; and Detic keeps wide and high
    images apart, which spares padding only without its large-scale jitter, whose crops fit into one square.
    Source: facebookresearch/Detic:detic/data/custom_dataset_dataloader.py.
    Raises InputError for numbers that do not fit the datasets or the ranks.
    """

    def __init__(
        self,
        factors: list[np.ndarray],
        ratios: Sequence[float],
        batch_sizes: Sequence[int],
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        apart: bool = False,
    ):
        for what, values in (("ratios", ratios), ("batch sizes", batch_sizes)):
            if len(values) != len(factors) or min(values) <= 0:
                raise InputError(
                    f"{what} {list(values)} for {len(factors)} datasets; give each one above 0"
                )
        if min(batch_sizes) < world_size:
            raise InputError(
                f"a batch of {min(batch_sizes)} images is too small for {world_size} processes"
            )
        self.factors, self.seed, self.start, self.rank, self.world_size = (
            factors,
            seed,
            start,
            rank,
            world_size,
        )
        self.sizes = np.array(batch_sizes) // world_size  # (D,) images per rank
        self.step_seed = [seed, 0, rank] if apart else [seed, 0]
        shares = np.array(ratios) / self.sizes
        self.edges = np.cumsum(shares / shares.sum())[
            :-1
        ]  # (D - 1,) where [0, 1] is cut into the datasets' parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng, count = np.random.default_rng(self.step_seed), len(self.factors)
        skipped = np.bincount(
            self.edges.searchsorted(rng.random(self.start), "right"), minlength=count
        )
        firsts = np.cumsum([0] + [len(f) for f in self.factors])
        streams = [
            iter(
                RepeatFactorSampler(
                    f, (self.seed, d + 1), n * self.world_size, self.rank, self.world_size
                )
            )
            for d, (f, n) in enumerate(zip(self.factors, skipped * self.sizes))
        ]
        while True:
            d = int(self.edges.searchsorted(rng.random(), "right"))
            # draws of different datasets must differ too: they decide the augmentation
            yield [
                (int(firsts[d]) + row, draw * count + d)
                for row, draw in islice(streams[d], int(self.sizes[d]))
            ]


def shard(length: int, rank: int, world_size: int) -> range:
    """The rows that this rank evaluates: every row of `length` belongs to exactly one rank."""
    return range(rank, length, world_size)


def make_loader(
    mixture: Mixture, workers: int, square: dict[str, int] | None = None, **sampling
) -> DataLoader:
    """Returns the loader of a training.

    square:   pads the images of each dataset to one shape, as `collate`
    sampling: DataLoader's sampler and batch_size, or its batch_sampler
    """
    return DataLoader(
        mixture,
        collate_fn=partial(collate, square=square),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: it must not disturb the run's random numbers
        **sampling,
    )
