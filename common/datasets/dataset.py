"""A dataset: an index of annotations, a vocabulary, and images that are decoded on demand."""

import hashlib
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.batch import Sample, Supervision
from common.datasets.files import missing_files, read_image
from common.datasets.index import Index
from common.datasets.maps import VOID, read_label_map, read_segment_map
from common.datasets.shards import Shards
from common.errors import InputError
from common.labels import Vocabulary
from common.masks import decode_masks, drop_unseen

log = logging.getLogger("concord")


@dataclass
class Dataset:
    """One split of one dataset.

    name:      its key in label spaces and results
    metric:    the protocol that scores it
    hierarchy: the class tree of OpenImages; frequency: one of r, c, f per class of LVIS
    novel:     labels that have no boxes to train on, so that an evaluation can show what was learned without
    masks:     `load` decodes the instance masks, where there are any
    maps:      folder of the label maps, of semantic and panoptic datasets
    pixel_labels: (65536,) int16, what the values of semantic label maps mean, as `label_table` makes it
    shards:    where the images lie inside of tar files, if they do
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
    maps: Path | None = None
    pixel_labels: np.ndarray | None = None
    shards: Shards | None = None
    warned: Tensor = field(
        default_factory=lambda: torch.zeros(1, dtype=torch.bool).share_memory_(), repr=False
    )

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Image `i` with its boxes or segments, untransformed; crowds and group-of boxes are left out unless asked for.

        Boxes are clipped to the image; those without an area in it are left out, with their labels and masks. So are
        segments without a pixel; but with `keep_ignored`, all that a panoptic json lists have a row, in its order.
        Raises InputError for an image or label map that cannot be decoded, a map or mask that is not of its size.
        """
        index = self.index
        image = read_image(*self.image_file(i))
        height, width = image.shape[-2:]
        self._compare_size(i, (height, width))
        if self.maps is not None:
            sample = Sample.unlabelled(image, self.name, index.image_ids[i], i)
            segments, labels = self._segments(i, (height, width), keep_ignored)
            return replace(sample, supervision=self.supervision, segments=segments, labels=labels)
        rows = np.arange(index.offsets[i], index.offsets[i + 1])
        if not keep_ignored:
            rows = rows[~index.ignore[rows]]
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
            masks=self._masks(i, rows, (height, width))
            if self.masks and index.segmentations is not None
            else None,
            image_labels=None
            if index.image_labels is None
            else torch.from_numpy(index.image_labels[index.image_label_rows(i)].astype(np.int64)),
            captions=tuple(index.captions[i]) if index.captions else (),
        )

    def image_file(self, i: int) -> tuple[Path, bytes | None]:
        """The path of image `i`, and its bytes if it is a member of a tar file. Raises InputError for a lost tar."""
        return self.images / self.index.file_name(i), self.shards.read(i) if self.shards else None

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

    def _segments(self, i: int, size: tuple[int, int], keep_ignored: bool) -> tuple[Tensor, Tensor]:
        """(H, W) int16 segments of image `i`, which has that size, and their labels (N,) int64."""
        index, path = self.index, self.maps / self.index.map_name(i)
        if self.pixel_labels is not None:
            segments, labels = (
                read_label_map(path, self.pixel_labels),
                np.arange(len(self.vocabulary)),
            )
        else:
            rows = index.rows(i)
            segments = read_segment_map(path, index.segment_ids[rows])
            labels, ignore = index.labels[rows].astype(np.int64), index.ignore[rows]
            if ignore.any() and not keep_ignored:
                segments = np.append(np.where(ignore, VOID, np.arange(len(labels))), VOID).astype(
                    np.int16
                )[segments]
        if segments.shape != size:
            raise InputError(f"label map {path} has {segments.shape[0]} x {segments.shape[1]} pixels (height, width), "
                             f"but its image {self.images / index.file_name(i)} has {size[0]} x {size[1]}; replace one "
                             "of them")  # fmt: skip
        segments, labels = torch.from_numpy(segments), torch.from_numpy(labels)
        whole = keep_ignored and self.pixel_labels is None
        return (segments, labels) if whole else drop_unseen(segments, labels)

    def image_counts(self) -> np.ndarray | None:
        """(C,) number of images of this split that contain each class, by annotation or image label; not by crowds.

        None for semantic label maps: only decoding all of them would tell.
        """
        if self.pixel_labels is not None:
            return None
        _, counts = self.index.by_label
        return np.pad(counts, (0, len(self.vocabulary) - len(counts)))

    def summary(self) -> str:
        """One line for the log: how much there is to learn from."""
        index, classes = self.index, len(self.vocabulary)
        if self.pixel_labels is not None:
            return f"{self.name}: {len(self)} images with label maps, {classes} classes (which occur, the maps alone tell)"
        seen = int((self.image_counts() > 0).sum())
        if self.maps is not None:
            return (
                f"{self.name}: {len(self)} images, {len(index.labels)} segments ({index.ignore.sum()} crowd, not "
                f"trained on), {classes} classes ({seen} with segments)"
            )
        if index.image_labels is None:
            crowds, empty = int(index.ignore.sum()), int((np.diff(index.offsets) == 0).sum())
            lost = f"; {index.num_outside} outside their image" if index.num_outside else ""
            return (
                f"{self.name}: {len(self)} images ({empty} without a box), {len(index.labels)} boxes ({crowds} crowd "
                f"or group, not trained on{lost}), {classes} classes ({seen} with boxes)"
            )
        captions = (
            np.array([len(texts) for texts in index.captions])
            if index.captions
            else np.zeros(1, int)
        )
        bare = int(((np.diff(index.image_label_offsets) == 0) & (captions == 0)).sum())
        return (
            f"{self.name}: {len(self)} images ({bare} without label and caption), {len(index.image_labels)} image "
            f"labels, {captions.sum()} captions, no boxes, {classes} classes ({seen} with images)"
        )

    def check_images(self) -> None:
        """Raises InputError naming the first missing image or label map and how many are missing."""
        index = self.index
        kinds = [("image", self.images, index.file_name)]
        kinds += [("label map", self.maps, index.map_name)] if self.maps is not None else []
        for kind, root, name in kinds:
            place = hashlib.sha256(f"{kind} {root.absolute()}".encode()).hexdigest()[:16]
            memo = index.folder and index.folder / f"listed-{place}.json"
            if missing := missing_files(root, map(name, range(len(self))), memo):
                raise InputError(
                    f"{self.name}: {kind} {root / missing[0]} is missing ({len(missing)} of {len(self)} that "
                    f"{index.source} lists); add the {kind}s or take them out of the annotations"
                )
