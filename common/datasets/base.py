"""A dataset: an index of annotations, a vocabulary, and images that are decoded on demand."""

import logging
import os
from dataclasses import dataclass, field
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
from common.masks import decode_masks

log = logging.getLogger("concord")


@dataclass
class Dataset:
    """One split of one dataset.

    name:      its key in label spaces and results
    metric:    the protocol that scores it
    hierarchy: the class tree of OpenImages; frequency: one of r, c, f per class of LVIS
    novel:     labels that have no boxes to train on, so that an evaluation can show what was learned without
    masks:     `load` decodes the instance masks, where there are any
    warned:    (1,) bool, shared with the workers: an image of another size than annotated was in the log
    """

    name: str
    vocabulary: Vocabulary
    index: Index
    images: Path
    metric: str = "coco"
    supervision: Supervision = "boxes"
    hierarchy: dict | None = None
    frequency: str | None = None
    novel: tuple[int, ...] = ()
    masks: bool = False
    warned: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.bool).share_memory_(), repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Image `i` with its boxes, untransformed; crowd and group-of boxes are left out unless asked for.

        Boxes are clipped to the image; those without an area in it are left out, with their labels and masks.
        Raises InputError for an image that cannot be decoded, or a mask that is not of its size.
        """
        index = self.index
        image = read_image(self.images / index.file_name(i))
        rows = np.arange(index.offsets[i], index.offsets[i + 1])
        if not keep_ignored:
            rows = rows[~index.ignore[rows]]
        height, width = image.shape[-2:]
        self._compare_size(i, (height, width))
        boxes = torch.from_numpy(index.boxes[rows]).view(-1, 4)
        limits = boxes.new_tensor([width, height, width, height])
        boxes = (boxes * limits if index.relative else boxes).clamp(min=0).minimum(limits)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        rows, boxes = rows[inside.numpy()], boxes[inside]
        return Sample(
            image=image,
            dataset=self.name,
            supervision=self.supervision,
            image_id=index.image_ids[i],
            index=i,
            original_size=(height, width),
            boxes=boxes,
            labels=torch.from_numpy(index.labels[rows].astype(np.int64)),
            masks=self._masks(i, rows, (height, width)) if self.masks and index.segmentations is not None else None,
            image_labels=None
            if index.image_labels is None
            else torch.from_numpy(index.image_labels[index.image_label_rows(i)].astype(np.int64)),
            captions=index.captions[i] if index.captions else (),
        )

    def _compare_size(self, i: int, size: tuple[int, int]) -> None:
        """Say in the log, once for the dataset, that image `i` of `size` (H, W) is not what the annotations say."""
        annotated = tuple(self.index.sizes[i].tolist())
        if annotated not in (size, (0, 0)) and not self.warned:
            self.warned.fill_(True)
            log.warning("%s: image '%s' has %d x %d pixels (height, width), but %d x %d in %s; do its boxes fit? "
                        "(other such images are not named)", self.name, self.index.file_name(i), *size, *annotated,
                        self.index.source)  # fmt: skip

    def _masks(self, i: int, rows: np.ndarray, size: tuple[int, int]) -> Tensor:
        try:
            return decode_masks([self.index.segmentations[row] for row in rows], size)
        except ValueError as error:
            where = f"{self.index.source}: image '{self.index.file_name(i)}'"
            raise InputError(f"{where} has {error}; mend or remove the annotation") from None

    def image_counts(self) -> np.ndarray:
        """(C,) number of images of this split that contain each class, by box or image label; crowds do not count."""
        images, labels = self.index.positives()
        pairs = np.unique(images * len(self.vocabulary) + labels)
        return np.bincount(pairs % len(self.vocabulary), minlength=len(self.vocabulary))

    def summary(self) -> str:
        """One line for the log: how much there is to learn from."""
        index, classes = self.index, len(self.vocabulary)
        seen = int((self.image_counts() > 0).sum())
        if index.image_labels is None:
            crowds, empty = int(index.ignore.sum()), int((np.diff(index.offsets) == 0).sum())
            outside = int(index.outside().sum())
            lost = f"; {outside} outside their image" if outside else ""
            return (
                f"{self.name}: {len(self)} images ({empty} without a box), {len(index.labels)} boxes ({crowds} crowd "
                f"or group, not trained on{lost}), {classes} classes ({seen} with boxes)"
            )
        captions = np.array([len(texts) for texts in index.captions]) if index.captions else np.zeros(1, int)
        bare = int(((np.diff(index.image_label_offsets) == 0) & (captions == 0)).sum())
        return (
            f"{self.name}: {len(self)} images ({bare} without label and caption), {len(index.image_labels)} image "
            f"labels, {captions.sum()} captions, no boxes, {classes} classes ({seen} with images)"
        )

    def check_images(self) -> None:
        """Raises InputError naming the first missing image and how many are missing; one directory listing each."""
        listings: dict[str, set[str]] = {}
        missing = []
        for name in map(self.index.file_name, range(len(self))):
            folder, _, base = name.rpartition("/")
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
        if not path.is_file() and path.exists() and not path.is_dir():
            raise InputError(f"image {path} is no regular file, but a device or pipe; give image files")
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
