"""A frozen localizer's boxes for all training images: computed once, kept in the run folder, given with the samples."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.batch import Batch, Sample
from common.datasets.dataset import Dataset
from common.distributed import from_main, rank
from common.files import atomic_path
from common.inference import predict_dataset

UNIT = 65535  # proposals are kept as uint16 fractions of the image's sides: 8 bytes a box, right to 0.02 pixels


@dataclass
class WithProposals(Dataset):
    """A dataset whose samples carry the proposals of `proposals`, a file, as further boxes with the label -1."""

    proposals: Path = Path()

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        sample = super().load(i, keep_ignored)
        rows = np.load(self.proposals, mmap_mode="r")[
            i
        ]  # (Q, 4), what is left over at the end is 0
        boxes = torch.from_numpy(rows[rows[:, 2] > 0].astype(np.float32)) / UNIT
        boxes = boxes * boxes.new_tensor(sample.original_size)[[1, 0, 1, 0]]
        labels = F.pad(sample.labels, (0, len(boxes)), value=-1)
        return replace(sample, boxes=torch.cat([sample.boxes, boxes]), labels=labels, masks=None)


def take_proposals(batch: Batch) -> list[Tensor]:
    """B times (Q, 4): the boxes of label -1, which are taken out of the samples."""
    proposals = [s.boxes[s.labels < 0] for s in batch.samples]
    for sample in batch.samples:
        sample.boxes, sample.labels = (
            sample.boxes[sample.labels >= 0],
            sample.labels[sample.labels >= 0],
        )
    return proposals


def fingerprint(localizer: nn.Module, *settings) -> str:
    """Twelve letters that change with the weights and the settings, so that other weights have other files."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in localizer.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def intact(path: Path, count: int) -> bool:
    """Whether `path` holds the proposals of so many images; a damaged file is as good as none."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return (
        table.dtype == np.uint16
        and table.shape[:1] + table.shape[2:] == (count, 4)
        and bool(table.any())
    )


def with_proposals(
    locate: Callable[[Batch], list[dict]],
    datasets: list[Dataset],
    resize,
    folder: Path,
    key: str,
    workers: int,
) -> list[WithProposals]:
    """The datasets with proposals in `folder`, from an earlier call with this `key` or else from `locate`.

    locate: batch -> for each image `boxes` (Q, 4) in pixels of the original image, and its `size`
    """

    def compact(batch: Batch) -> list[dict]:
        fractions = [
            f["boxes"].cpu().numpy() / np.array(f["size"])[[1, 0, 1, 0]] for f in locate(batch)
        ]
        return [{"boxes": np.round(f.clip(0, 1) * UNIT).astype(np.uint16)} for f in fractions]

    extended = []
    for dataset in datasets:
        images = hashlib.sha256(dataset.index.file_names.tobytes()).hexdigest()[:6]
        path = folder / f"proposals-{dataset.name}-{key}{images}.npy"
        if not from_main(intact(path, len(dataset))):
            found = predict_dataset(
                compact, dataset, resize, workers, f"{dataset.name}: proposals to train on"
            )
            if rank() == 0:
                table = np.zeros(
                    (len(dataset), max(len(f["boxes"]) for f in found.values()), 4), np.uint16
                )
                for row, f in found.items():
                    table[row, : len(f["boxes"])] = f["boxes"]
                with atomic_path(path) as temporary:
                    np.save(temporary, table)
            from_main(None)  # the other ranks wait for the file
        extended.append(WithProposals(**vars(dataset), proposals=path))
    return extended
