"""Proposals of a frozen localizer for all training images, stored in the run folder.

They are stored in blocks of a few hundred images. A rank computes blocks of its own and writes each
as soon as it is whole. So no rank holds many, a killed run goes on with the missing blocks, on any
number of ranks, and the training maps the files into memory.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from common.batch import Batch, Sample, collate
from common.console import progress_bar
from common.datasets.dataset import Dataset
from common.distributed import from_main, gather_on_main, on_main, rank, ranks_without, world_size
from common.errors import InputError
from common.files import NO_ARRAY, atomic_path, sweep
from common.sampling import Transformed
from common.unreadable import Readable, Skips

log = logging.getLogger("concord")

# coordinates are stored as fractions of the image's sides, in uint16: right to 0.02 pixels
UNIT = 65535
BLOCK = 256  # images


@dataclass
class WithProposals(Dataset):
    """Adds `proposals` to the samples of a dataset.

    blocks: folder of the files of `block_file`; each holds (n, Q, 4) uint16, the xyxy boxes of n
            images, as fractions of the image's sides times 65535; rows of zeros pad each image to Q
    """

    blocks: Path = Path()

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Loads image `i` as `Dataset.load` does, plus proposals (Q, 4) xyxy in its pixels."""
        sample = super().load(i, keep_ignored)
        table = np.load(block_file(self.blocks, i // BLOCK), mmap_mode="r")
        rows = table[i % BLOCK]  # (Q, 4)
        rows = rows[rows[:, 2] > 0]  # without the padding
        fractions = torch.from_numpy(rows.astype(np.float32)) / UNIT
        height, width = sample.original_size
        scale = fractions.new_tensor([width, height, width, height])
        return replace(sample, proposals=fractions * scale)


def block_file(folder: Path, block: int) -> Path:
    """Returns the file with the proposals of the images from row block * BLOCK on."""
    return folder / f"block-{block:06d}.npy"


def fingerprint(localizer: nn.Module, *settings: object) -> str:
    """Returns a hash (12 hex digits) of the localizer's weights and of `settings`.

    The hash is part of the name of the folder of proposals, so that other weights do not read it.
    settings: values that change the proposals; their repr is hashed
    """
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in localizer.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def missing_blocks(folder: Path, count: int) -> list[int]:
    """Returns the blocks of `count` images whose files are missing or damaged; logs what is there.

    Removes what killed writes left. No other process may write there meanwhile.
    """
    sweep(folder)
    missing = []
    for block, start in enumerate(range(0, count, BLOCK)):
        try:
            table = np.load(block_file(folder, block), mmap_mode="r", allow_pickle=False)
            form = (table.dtype, *table.shape[:1], *table.shape[2:])
        except NO_ARRAY:
            form = ()
        if form != (np.uint16, min(BLOCK, count - start), 4):
            missing.append(block)
    there = count - sum(min(BLOCK, count - block * BLOCK) for block in missing)
    if there:
        log.info("%s: the proposals of %d of %d images are there", folder.name, there, count)
    return missing


def with_proposals(
    locate: Callable[[Batch], list[dict]],
    datasets: list[Dataset],
    resize: Callable[[Sample], Sample],
    folder: Path,
    key: str,
    args: Any,
) -> list[WithProposals]:
    """Returns copies of the datasets, in order, that load proposals. Computes those missing.

    locate: takes a batch and returns one dictionary per image. Its entry "proposals" has "boxes"
            (Q, 4) in pixels of the original image, and "size", its (height, width)
    resize: transforms each sample before `locate` gets the batch
    folder: where the folders of proposals lie, or are made
    key:    `fingerprint` of the localizer, part of their names
    args:   --workers and --skip-bad; an unreadable image that may be skipped has no proposals

    Every rank must call it. Each computes and writes its own part of the blocks.
    """
    extended = []
    for dataset in datasets:
        images = hashlib.sha256(dataset.index.file_names.tobytes()).hexdigest()[:6]
        blocks = folder / f"proposals-{dataset.name}-{key}{images}"
        missing = on_main(missing_blocks, blocks, len(dataset))
        if blind := ranks_without(folder / "run.lock"):
            raise InputError(
                f"the ranks {', '.join(map(str, blind))} do not see {folder} of rank 0, where all"
                " write proposals and read them; put --output on a disk that all machines share"
            )
        readable = Readable(**vars(dataset), skips=Skips(args.skip_bad, folder))
        own = missing[rank() :: world_size()]
        write_blocks(locate, readable, resize, blocks, own, args.workers)
        gather_on_main(None)  # rank 0 waits for the others
        from_main(None)  # and they for it
        extended.append(WithProposals(**vars(dataset), blocks=blocks))  # all of its fields
    return extended


def write_blocks(
    locate: Callable[[Batch], list[dict]],
    dataset: Dataset,
    resize: Callable[[Sample], Sample],
    folder: Path,
    blocks: list[int],
    workers: int,
) -> None:
    """Computes the proposals of these blocks of images. Writes each block when it is whole."""
    if not blocks:
        return
    rows = [range(len(dataset))[block * BLOCK : (block + 1) * BLOCK] for block in blocks]
    flat = [row for part in rows for row in part]
    transformed = Transformed(dataset, resize, flat)
    loader = iter(DataLoader(transformed, batch_size=1, collate_fn=collate, num_workers=workers))
    title = f"{dataset.name}: proposals to train on"
    with progress_bar(title, len(flat)) as bar:
        for block, part in zip(blocks, rows):
            found = []
            for _ in part:
                found.append(compact(locate, next(loader)))
                bar.update()
            most = max(map(len, found))
            table = np.zeros((len(part), most, 4), np.uint16)
            for image, boxes in zip(table, found):
                image[: len(boxes)] = boxes
            with atomic_path(block_file(folder, block), durable=True) as temporary:
                np.save(temporary, table)


def compact(locate: Callable[[Batch], list[dict]], batch: Batch) -> np.ndarray:
    """Returns the proposals (Q, 4) of the one image of a batch, as they are stored.

    A black image stands for one that cannot be read, and has none.
    """
    (sample,) = batch.samples
    if not sample.image.any():
        return np.zeros((0, 4), np.uint16)
    (image,) = locate(batch)
    found = image["proposals"]
    height, width = found["size"]
    scale = np.array([width, height, width, height])
    fractions = found["boxes"].cpu().numpy() / scale
    return np.round(fractions.clip(0, 1) * UNIT).astype(np.uint16)
