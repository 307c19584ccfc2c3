"""A dataset: an index of annotations, a vocabulary, and images that are decoded on demand."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from common.batch import Sample, Supervision
from common.datasets.index import Index
from common.errors import InputError
from common.labels import Vocabulary


@dataclass
class Dataset:
    """One split of one dataset.

    name:      its key in label spaces and results
    metric:    the protocol that scores it
    hierarchy: the class tree of OpenImages; frequency: one of r, c, f per class of LVIS
    """

    name: str
    vocabulary: Vocabulary
    index: Index
    images: Path
    metric: str = "coco"
    supervision: Supervision = "boxes"
    hierarchy: dict | None = None
    frequency: str | None = None

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Image `i` with its boxes, untransformed; crowd and group-of boxes are left out unless asked for."""
        image = read_image(self.images / self.index.file_names[i])
        rows = np.arange(self.index.offsets[i], self.index.offsets[i + 1])
        if not keep_ignored:
            rows = rows[~self.index.ignore[rows]]
        height, width = image.shape[-2:]
        boxes = torch.from_numpy(self.index.boxes[rows]).view(-1, 4)
        if self.index.relative:
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        return Sample(
            image=image,
            dataset=self.name,
            supervision=self.supervision,
            image_id=self.index.image_ids[i],
            index=i,
            original_size=(height, width),
            boxes=boxes,
            labels=torch.from_numpy(self.index.labels[rows].astype(np.int64)),
        )

    def image_counts(self) -> np.ndarray:
        """(C,) number of images of this split that contain each class; crowds do not count."""
        kept = ~self.index.ignore
        pairs = np.unique(self.index.image_of[kept] * len(self.vocabulary) + self.index.labels[kept])
        return np.bincount(pairs % len(self.vocabulary), minlength=len(self.vocabulary))

    def summary(self) -> str:
        """One line for the log: how much there is to learn from."""
        boxes, crowds = len(self.index.labels), int(self.index.ignore.sum())
        empty = int((np.diff(self.index.offsets) == 0).sum())
        return (
            f"{self.name}: {len(self)} images ({empty} without a box), {boxes} boxes ({crowds} crowd or group, not "
            f"trained on), {len(self.vocabulary)} classes ({int((self.image_counts() > 0).sum())} with boxes)"
        )

    def check_images(self) -> None:
        """Raises InputError naming the first missing image and how many are missing; one directory listing each."""
        listings: dict[str, set[str]] = {}
        missing = []
        for name in self.index.file_names:
            folder, _, base = str(name).rpartition("/")
            if folder not in listings:
                path = self.images / folder
                listings[folder] = set(os.listdir(path)) if path.is_dir() else set()
            if base not in listings[folder]:
                missing.append(name)
        if missing:
            raise InputError(
                f"{self.name}: image {self.images / missing[0]} is missing ({len(missing)} of {len(self)} that "
                f"{self.index.source} lists); add the images or take them out of the annotations"
            )


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB, upright according to its EXIF tag. Raises InputError for a missing or broken image."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels; save it with 8 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return pil_to_tensor(image.convert("RGB"))
    except IsADirectoryError:
        raise InputError(f"image {path} is a folder; give image files") from None
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist; check the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be decoded ({error}); replace it or remove its entry") from None
