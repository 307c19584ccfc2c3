"""Proposals of a frozen localizer for all training images, stored in the run folder."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.batch import Batch, Sample
from common.datasets.dataset import Dataset
from common.distributed import from_main, rank
from common.files import NO_ARRAY, atomic_path
from common.inference import predict_dataset
from common.unreadable import Readable, Skips

# coordinates are stored as fractions of the image's sides, in uint16: right to 0.02 pixels
UNIT = 65535


@dataclass
class WithProposals(Dataset):
    """Adds `proposals` to the samples of a dataset.

    proposal_file: .npy file (I, Q, 4) uint16: xyxy boxes of each of I images, as fractions of the
                   image's sides times 65535; rows of zeros pad each image to Q boxes
    """

    proposal_file: Path = Path()

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Loads image `i` as `Dataset.load` does, plus proposals (Q, 4) xyxy in its pixels."""
        sample = super().load(i, keep_ignored)
        rows = np.load(self.proposal_file, mmap_mode="r")[i]  # (Q, 4)
        rows = rows[rows[:, 2] > 0]  # without the padding
        fractions = torch.from_numpy(rows.astype(np.float32)) / UNIT
        height, width = sample.original_size
        scale = fractions.new_tensor([width, height, width, height])
        return replace(sample, proposals=fractions * scale)


def fingerprint(localizer: nn.Module, *settings) -> str:
    """Returns a hash (12 hex digits) of the localizer's weights and of `settings`.

    The hash is part of the name of a proposal file, so that other weights do not read that file.
    settings: values that change the proposals; their repr is hashed
    """
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in localizer.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def intact(path: Path, count: int) -> bool:
    """Returns whether the file holds proposals of `count` images; False if missing or damaged."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        shaped = table.shape[:1] + table.shape[2:] == (count, 4)
        return table.dtype == np.uint16 and shaped and bool(table.any())
    except (*NO_ARRAY, AttributeError):
        return False


def with_proposals(
    locate: Callable[[Batch], list[dict]],
    datasets: list[Dataset],
    resize: Callable[[Sample], Sample],
    folder: Path,
    key: str,
    args,
) -> list[WithProposals]:
    """Returns copies of the datasets, in order, that load proposals. Computes the missing files.

    locate: takes a batch and returns one dictionary per image. Its entry "proposals" has "boxes"
            (Q, 4) in pixels of the original image, and "size", its (height, width)
    resize: transforms each sample before `locate` gets the batch
    folder: where the proposal files lie, or are written
    key:    `fingerprint` of the localizer, part of the file names
    args:   --workers and --skip-bad; an unreadable image that may be skipped has no proposals

    Every rank must call it, since all ranks compute and rank 0 writes.
    """

    def compact(batch: Batch) -> list[dict]:
        stored = []
        for sample, image in zip(batch.samples, locate(batch)):
            found = image["proposals"]
            height, width = found["size"]
            scale = np.array([width, height, width, height])
            fractions = found["boxes"].cpu().numpy() / scale
            fractions *= bool(sample.image.any())  # boxes of size 0 are padding
            stored.append({"boxes": np.round(fractions.clip(0, 1) * UNIT).astype(np.uint16)})
        return stored

    extended = []
    for dataset in datasets:
        images = hashlib.sha256(dataset.index.file_names.tobytes()).hexdigest()[:6]
        path = folder / f"proposals-{dataset.name}-{key}{images}.npy"
        if not from_main(intact(path, len(dataset))):
            title = f"{dataset.name}: proposals to train on"
            readable = Readable(**vars(dataset), skips=Skips(args.skip_bad, folder))
            found = predict_dataset(compact, readable, resize, args.workers, title)
            if rank() == 0:
                most = max(len(image["boxes"]) for image in found.values())
                table = np.zeros((len(dataset), most, 4), np.uint16)
                for row, image in found.items():
                    table[row, : len(image["boxes"])] = image["boxes"]
                with atomic_path(path) as temporary:
                    np.save(temporary, table)
            from_main(None)  # the other ranks wait for the file
        extended.append(WithProposals(**vars(dataset), proposal_file=path))  # all of its fields
    return extended
