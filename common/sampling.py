"""Sampling of images from several datasets.

A sampler yields an endless stream of (row, draw). `row` numbers the images of all datasets end to
end. `draw` differs for each element of the stream. The stream depends on the seed alone, so that a
resumed run continues it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.batch import Sample, collate
from common.command import per_dataset
from common.compiling import Compiling
from common.datasets.dataset import Dataset
from common.errors import InputError
from common.memory import refuse_huge_batch
from common.replay import read_record, recorded_rows
from common.unreadable import NONE, Skips, load_patiently


@dataclass
class Mixture(torch.utils.data.Dataset):
    """Joins several datasets end to end and augments their images. An item is mixture[row, draw].

    `row` counts the images of all datasets. `draw` counts the elements of the sampler's stream, so
    that it differs each time an image is drawn. The random numbers of an augmentation depend on the
    seed and on `draw` alone, not on the number of workers. So does the image of the same dataset
    that takes the place of an unreadable one, as far as `skips` allows.
    transforms: {dataset: augmentation}
    """

    datasets: list[Dataset]
    transforms: dict[str, Callable[[Sample], Sample]]
    seed: int
    skips: Skips = NONE

    def __post_init__(self):
        self.starts = first_rows(self.datasets)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        row, draw = item
        d = int(np.searchsorted(self.starts, row, side="right")) - 1
        sample = self._load(d, row - int(self.starts[d]), draw)
        transform = self.transforms[sample.dataset]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would take 0.1 ms, and seed the GPUs too, whose state is not kept
            torch.default_generator.manual_seed(self.seed * 1_000_003 + draw)
            transformed = transform(sample)
        name = self.datasets[d].index.file_name(sample.index)
        return replace(transformed, draw=draw, file_name=name)

    def _load(self, d: int, row: int, draw: int) -> Sample:
        """Returns image `row` of dataset d, or another one of it if that is unreadable."""
        dataset = self.datasets[d]
        rng = np.random.default_rng([self.seed, draw])
        for _ in range(100):
            try:
                return load_patiently(dataset, row)
            except InputError as error:
                name = f"{dataset.name}: {dataset.index.file_name(row)}"
                if not self.skips.admits(name, error):
                    raise
            row = int(rng.integers(len(dataset)))
        raise InputError(
            f"{dataset.name}: none of 100 images can be read, and --skip-bad lets others take their"
            " place; see to the disk, or leave the dataset out"
        )


@dataclass
class Transformed(torch.utils.data.Dataset):
    """The images `rows` of one dataset, transformed, in the order of `rows`, for evaluation."""

    dataset: Dataset
    transform: Callable[[Sample], Sample]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        sample = load_patiently(self.dataset, self.rows[i])
        return self.transform(sample)


def first_rows(parts: Sequence) -> np.ndarray:
    """Returns (P + 1,): the first row of each of P parts laid end to end, then the total length."""
    lengths = [len(part) for part in parts]
    return np.cumsum([0, *lengths])


def refuse_empty(parts: Sequence) -> None:
    """Raises InputError if a dataset has no image, where no image of another trains its classes.

    parts: of each dataset something of the length of its images
    """
    if not all(map(len, parts)):
        raise InputError(
            "a dataset of the training has no images (@0), so that its classes are negatives of"
            " others; but here no image of another dataset trains them; leave it out"
        )


def image_ratios(
    args: Any, datasets: list[Dataset], own: dict[str, float] | None = None
) -> dict[str, float] | None:
    """Returns {dataset: images sampled, relative to the others}, by --dataset-ratios, else `own`.

    A dataset that the flag does not name has the ratio 1. With "auto" it has the root of its number
    of images. Raises InputError as `per_dataset` does.
    """
    if args.dataset_ratios == "auto":
        return {d.name: len(d) ** 0.5 for d in datasets}
    return per_dataset(args, "dataset_ratios", datasets, 1) if args.dataset_ratios else own


def repeat_factors(
    datasets: list[Dataset], threshold: float, ratios: dict[str, float] | None = None
) -> np.ndarray:
    """Returns (I,): how often each of the I images of all datasets is to be seen per epoch.

    The factor of an image is the maximum over its classes c of max(1, sqrt(threshold / f_c)), where
    f_c is the fraction of the I images that contain c. An image without a class has the factor 1.
    Equal names in two datasets are two classes.

    ratios: {dataset: images sampled, relative to the others}. The factors of each dataset are
            multiplied by a number to follow them, so that the epoch stays as long
    Source: LVIS (arXiv 1908.03195, Sec. B); detectron2's RepeatFactorTrainingSampler.
    """
    total = sum(len(dataset) for dataset in datasets)
    factors = []
    for dataset in datasets:
        image_counts = np.maximum(dataset.image_counts(), 1)  # (C_d,)
        frequency = image_counts / max(total, 1)
        of_class = np.sqrt(threshold / frequency)
        of_class = np.maximum(1, of_class)
        of_image = np.ones(len(dataset))
        images, counts = dataset.index.by_label
        ends = np.cumsum(counts)
        images_of_class = np.split(images, ends[:-1])
        for rows, factor in zip(images_of_class, of_class):
            of_image[rows] = np.maximum(of_image[rows], factor)
        factors.append(of_image)
    if ratios:
        length = sum(own.sum() for own in factors)
        shares = [ratios[d.name] / sum(ratios.values()) for d in datasets]
        factors = [own * share * length / own.sum() for own, share in zip(factors, shares)]
    return np.concatenate(factors)


def endless(
    epoch: Callable[[int], np.ndarray], start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, int]]:
    """Yields (row, draw) endlessly: the rows of epoch(0), epoch(1), ..., numbered by `draw`.

    Of w ranks, rank r yields the elements with draw % w = r. Elements with draw < start are left
    out; a resumed run has seen them.
    """
    draw = 0
    number = 0
    while True:
        rows = epoch(number)
        for i in range(max(0, start - draw), len(rows)):
            if (draw + i) % world_size == rank:
                yield int(rows[i]), draw + i
        draw += len(rows)
        number += 1


@dataclass
class RepeatFactorSampler:
    """Yields (row, draw) endlessly. An epoch has image i floor(f_i) or ceil(f_i) times, shuffled.

    factors: (I,) repeat factors f_i, all 1 for a plain shuffle
    start, rank, world_size: as in `endless`
    """

    factors: np.ndarray
    seed: int | tuple
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def epoch(self, number: int) -> np.ndarray:
        """Returns the rows of epoch `number`. Rounds each factor up or down at random."""
        rng = np.random.default_rng([self.seed, number])
        count = len(self.factors)
        repeats = np.floor(self.factors + rng.random(count))
        repeats = repeats.astype(np.int64)
        rows = np.repeat(np.arange(count), repeats)
        return rng.permutation(rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return endless(self.epoch, self.start, self.rank, self.world_size)


class ClassAwareSampler:
    """Yields (row, draw) endlessly. Samples a class of any dataset, then an image of this class.

    Both are sampled uniformly. Classes without an image and images without a class are left out.
    ratios: {dataset: images sampled, relative to the others}; the classes of a dataset share them.
            None: all classes are alike
    start, rank, world_size: as in `endless`. Raises InputError if no image has a class.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ratios: dict[str, float] | None = None,
    ):
        self.seed = seed
        self.position = (start, rank, world_size)
        self.first_row = first_rows(datasets)
        # per dataset: (X_d,) its images of class 0, class 1, ..., and (C_d,) how many of each
        by_label = [dataset.index.by_label for dataset in datasets]
        self.images, counts = zip(*by_label)
        self.ends = first_rows(self.images)
        shares = []  # of each class
        for dataset, own in zip(datasets, counts):
            seen = own > 0
            number = max(1, seen.sum())
            shares.append(seen * (ratios[dataset.name] if ratios else number) / number)
        counts = np.concatenate(counts)
        self.counts = counts[counts > 0]  # (C,)
        self.class_ends = np.cumsum(np.concatenate(shares)[counts > 0])  # (C,)
        self.firsts = np.cumsum(self.counts) - self.counts  # (C,)
        if not len(self.counts):
            names = ", ".join(dataset.name for dataset in datasets)
            raise InputError(f"no image of {names} has a class; check the annotations")

    def epoch(self, number: int) -> np.ndarray:
        """Samples the rows of epoch `number` with replacement, as many as there are images."""
        rng = np.random.default_rng([self.seed, number])
        size = int(self.first_row[-1])
        places = rng.random(size) * self.class_ends[-1]
        classes = np.searchsorted(self.class_ends, places, side="right")
        within = rng.integers(self.counts[classes])
        picked = self.firsts[classes] + within
        rows = np.empty(size, np.int64)
        for d, images in enumerate(self.images):  # never joined: they may be mapped from files
            start, end = self.ends[d : d + 2]
            own = (picked >= start) & (picked < end)
            image = images[picked[own] - start]
            rows[own] = self.first_row[d] + image
        return rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return endless(self.epoch, *self.position)


def make_sampler(
    kind: str,
    datasets: list[Dataset],
    ratios: dict[str, float] | None,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
) -> RepeatFactorSampler | ClassAwareSampler:
    """Returns the sampler `kind` of the images of all datasets.

    kind: "random" (a plain shuffle), "class-aware", or "repeat-factor" with the threshold of LVIS
    ratios: {dataset: images sampled, relative to the others}, or None
    start, rank, world_size: as in `endless`
    """
    if kind == "class-aware":
        return ClassAwareSampler(datasets, seed, start, rank, world_size, ratios)
    threshold = 0.001 if kind == "repeat-factor" else 0.0  # 0: all factors are 1
    factors = repeat_factors(datasets, threshold, ratios)
    return RepeatFactorSampler(factors, seed, start, rank, world_size)


@dataclass
class RatioBatchSampler:
    """Yields batches endlessly: lists of (row, draw). All images of a batch are of one dataset.

    factors:     per dataset the repeat factors (I_d,) of its images, all 1 for a plain shuffle
    ratios:      per dataset the number of images sampled from it, relative to the others
    batch_sizes: per dataset the images per step over all ranks; each rank gets its share, rounded
                 down
    start:       number of steps that are skipped; a resumed run has made them
    apart:       each rank samples a dataset of its own, instead of the same one on all ranks

    The probability of dataset d is proportional to ratio_d / batch_size_d, so that the numbers of
    images follow the ratios. Wide and high images share batches: a square crop needs the same
    padding for both. Raises InputError unless each dataset has a ratio and a batch size above 0,
    and for a batch size below `world_size`.
    Source: facebookresearch/Detic:detic/data/custom_dataset_dataloader.py, which samples with
    replacement; here the images of a dataset are sampled in epochs.
    """

    factors: list[np.ndarray]
    ratios: Sequence[float]
    batch_sizes: Sequence[int]
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    apart: bool = False

    def __post_init__(self):
        refuse_empty(self.factors)
        count = len(self.factors)
        for what, values in (("ratios", self.ratios), ("batch sizes", self.batch_sizes)):
            if len(values) != count or min(values) <= 0:
                raise InputError(
                    f"{what} {list(values)} for {count} datasets; give each one above 0"
                )
        least = min(self.batch_sizes)
        if least < self.world_size:
            raise InputError(
                f"a batch of {least} images is too small for {self.world_size} processes"
            )
        self.sizes = np.array(self.batch_sizes) // self.world_size  # (D,) images per rank
        shares = np.array(self.ratios) / self.sizes
        # (D - 1,) where the interval [0, 1] is cut into one part per dataset
        self.edges = np.cumsum(shares / shares.sum())[:-1]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = [self.seed, 0]
        if self.apart:
            seed.append(self.rank)
        rng = np.random.default_rng(seed)
        count = len(self.factors)
        numbers = rng.random(self.start)
        skipped = self.edges.searchsorted(numbers, "right")  # a dataset per step
        steps = np.bincount(skipped, minlength=count)  # (D,)
        streams = []
        for d, factors in enumerate(self.factors):
            seed = (self.seed, d + 1)
            start = int(steps[d] * self.sizes[d] * self.world_size)
            sampler = RepeatFactorSampler(factors, seed, start, self.rank, self.world_size)
            streams.append(iter(sampler))
        starts = first_rows(self.factors)
        while True:
            d = int(self.edges.searchsorted(rng.random(), "right"))
            images = islice(streams[d], int(self.sizes[d]))
            # `draw` decides the augmentation, so it must differ between the datasets
            yield [(int(starts[d]) + row, draw * count + d) for row, draw in images]


def shard(length: int, rank: int, world_size: int) -> range:
    """Returns the rows that this rank evaluates. Each of `length` rows belongs to one rank."""
    return range(rank, length, world_size)


def make_loader(
    mixture: Mixture, args: Any, least: dict[str, tuple[int, int]] | None = None, **sampling: Any
) -> DataLoader:
    """Returns the DataLoader of a training, which makes batches with `collate`.

    args:     --workers, --skip-bad, --replay, and --output, the run folder
    least:    {dataset: (height, width)}, the least size of its batches; None: as large as they need
    sampling: DataLoader's arguments sampler and batch_size, or batch_sampler
    With --replay it has one batch, that of the record. Raises InputError if a batch cannot fit into
    memory.
    """
    batches = sampling.get("batch_sampler")
    sizes = batches.sizes if batches else [sampling["batch_size"]]
    refuse_huge_batch(int(max(sizes)), mixture.transforms.values())
    # the shapes of batches: a size of the images, and how many; one number may stand for all
    shapes = {*zip(least.values(), cycle(sizes))} if least else {}
    Compiling.few_shapes = 0 < len(shapes) <= 2
    mixture.skips = Skips(args.skip_bad, Path(args.output))
    if args.replay:
        record = read_record(Path(args.output), args.replay)
        rows = recorded_rows(record, mixture.datasets, mixture.starts, args.seed)
        sampling = {"batch_sampler": [rows]}
    return DataLoader(
        mixture,
        collate_fn=partial(collate, least=least),
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: it must not disturb the run's random numbers
        **sampling,
    )
