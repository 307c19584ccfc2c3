"""The class Dataset: annotations of one split, their vocabulary, and images decoded on demand."""

import hashlib
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.batch import Sample, Supervision
from common.datasets.exif import TURNS, UPRIGHT, read_tag, turn_boxes, turn_pixels
from common.datasets.files import decode_image, missing_files
from common.datasets.index import Index, encoded
from common.datasets.lookup import Lookup, look_up
from common.datasets.maps import VOID, read_label_map, read_segment_map
from common.datasets.pixels import Decoded
from common.datasets.shards import Shards
from common.errors import InputError
from common.labels import Vocabulary
from common.masks import decode_masks, drop_unseen

log = logging.getLogger("concord")


def _shared_flag() -> Tensor:
    """Returns (1,) bool, False, that worker processes share."""
    return torch.zeros(1, dtype=torch.bool).share_memory_()


@dataclass
class Dataset:
    """One split of one dataset.

    name:         its key in label spaces and results
    metric:       the protocol that scores it
    hierarchy:    the class tree of OpenImages
    frequency:    one of r, c, f per class of LVIS
    federated:    an image is annotated for some of the classes, and nothing is known of the others
    novel:        labels without training boxes; they are evaluated to show what is learned without
    masks:        `load` decodes the instance masks, where there are any
    maps:         folder of the label maps of a semantic or panoptic dataset
    pixel_labels: (65536,) int16, the label of each value in semantic label maps, see `label_table`
    trained_on:   its annotations are those of the training, which the log says beside its results
    partial:      segments of other classes were taken out of the annotations; their pixels are void
    shards:       the tar files that hold the images, if they are in tar files
    warned:       (1,) bool, shared with the workers: a warning of an image with another size than
                  annotated is in the log
    told_turned:  the same for an image that was annotated before its EXIF tag turned it
    told_deep, told_clear, told_frames: the same for deep pixels, transparent ones and frames that
                  are not seen, `Decoded.notes`
    """

    name: str
    vocabulary: Vocabulary
    index: Index
    images: Path
    metric: str = "coco"
    supervision: Supervision = "boxes"
    hierarchy: dict | None = None
    frequency: str | None = None
    federated: bool = False
    novel: tuple[int, ...] = ()
    masks: bool = False
    maps: Path | None = None
    pixel_labels: np.ndarray | None = None
    trained_on: bool = False
    partial: bool = False
    shards: Shards | None = None
    warned: Tensor = field(default_factory=_shared_flag, repr=False)
    told_turned: Tensor = field(default_factory=_shared_flag, repr=False)
    told_deep: Tensor = field(default_factory=_shared_flag, repr=False)
    told_clear: Tensor = field(default_factory=_shared_flag, repr=False)
    told_frames: Tensor = field(default_factory=_shared_flag, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def load(self, i: int, keep_ignored: bool = False) -> Sample:
        """Returns image `i` with its boxes or segments, untransformed.

        Boxes are clipped to the image. Boxes without an area in it and segments without a pixel are
        left out. So are crowds and group-of boxes, unless `keep_ignored`; then every segment that a
        panoptic json lists has a row, in its order.
        Raises InputError for an image or label map that cannot be decoded, and for a map or mask of
        another size than its image.
        """
        index = self.index
        decoded = decode_image(*self.image_file(i))
        self._tell_of_pixels(i, decoded)
        image = decoded.image
        height, width = image.shape[-2:]
        tag = self._turned_by(i, (height, width))
        if self.maps is not None:
            sample = Sample.unlabelled(image, self.name, index.image_ids[i], i)
            segments, labels = self._segments(i, (height, width), keep_ignored)
            return replace(sample, supervision=self.supervision, segments=segments, labels=labels)
        rows = np.arange(index.offsets[i], index.offsets[i + 1])
        if not keep_ignored:
            rows = rows[~index.ignore[rows]]
        stored = index.boxes[rows]
        if tag != UPRIGHT:
            stored = turn_boxes(stored, (width, height), tag)
        boxes = torch.from_numpy(stored).view(-1, 4)
        limits = boxes.new_tensor([width, height, width, height])
        if index.relative:
            boxes = boxes * limits
        boxes = boxes.clamp(min=0).minimum(limits)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        rows = rows[inside.numpy()]
        masks = image_labels = None
        if self.masks and index.segmentations is not None:
            masks = self._masks(i, rows, (height, width), tag)
        if index.image_labels is not None:
            labels = index.image_labels[index.image_label_rows(i)]
            image_labels = torch.from_numpy(labels.astype(np.int64))
        return Sample(
            image=image,
            dataset=self.name,
            supervision=self.supervision,
            image_id=index.image_ids[i],
            index=i,
            original_size=(height, width),
            boxes=boxes[inside],
            labels=torch.from_numpy(index.labels[rows].astype(np.int64)),
            masks=masks,
            image_labels=image_labels,
            captions=tuple(index.captions[i]) if index.captions else (),
        )

    def image_file(self, i: int) -> tuple[Path, bytes | None]:
        """Returns the path of image `i`, and its bytes if it is a member of a tar file.

        Raises InputError for a tar file that cannot be read.
        """
        data = self.shards.read(i) if self.shards else None
        return self.images / self.index.file_name(i), data

    def _tell_of_pixels(self, i: int, decoded: Decoded) -> None:
        """Logs, once for the dataset, each of the `Decoded.notes` of image `i`."""
        flags = (self.told_deep, self.told_clear, self.told_frames)
        for told, note in zip(flags, decoded.notes):
            if note and not told:
                told.fill_(True)
                name = self.index.file_name(i)
                message = "%s: image '%s' has %s (other such images are not named)"
                log.info(message, self.name, name, note)

    def _turned_by(self, i: int, size: tuple[int, int]) -> int:
        """Returns the EXIF tag that turns image `i`, if it is annotated as stored; else UPRIGHT.

        size: (H, W), upright. Logs, once for the dataset, an image of another size than annotated
        and one that its tag turns.
        """
        annotated = tuple(self.index.sizes[i].tolist())
        if annotated in (size, (0, 0)):
            return UPRIGHT
        tag, _ = read_tag(*self.image_file(i))
        name = self.index.file_name(i)
        if tag in TURNS and annotated == size[::-1] and self.maps is None:
            if not self.told_turned:
                self.told_turned.fill_(True)
                message = (
                    "%s: image '%s' is annotated as it is stored, before its EXIF orientation %d "
                    "turns it; its boxes are turned with it (other such images are not named)"
                )
                log.warning(message, self.name, name, tag)
            return tag
        if not self.warned:
            self.warned.fill_(True)
            turned = "" if tag == UPRIGHT else f" (turned by its EXIF orientation {tag})"
            message = (
                "%s: image '%s' has %d x %d pixels (height, width)%s, but %d x %d in %s; do its "
                "boxes fit? (other such images are not named)"
            )
            log.warning(message, self.name, name, *size, turned, *annotated, self.index.source)
        return UPRIGHT

    def _masks(self, i: int, rows: np.ndarray, size: tuple[int, int], tag: int) -> Tensor:
        """Returns the masks (N, H, W) bool of the annotations `rows` (N,) of image `i`.

        size: (H, W), upright; tag: the EXIF tag that turns the image if it is annotated as stored
        """
        stored = size if tag == UPRIGHT else size[::-1]
        segmentations = [self.index.segmentations[row] for row in rows]
        try:
            masks = decode_masks(segmentations, stored, self.index.relative)
        except ValueError as error:
            where = f"{self.index.source}: image '{self.index.file_name(i)}'"
            raise InputError(f"{where} has {error}; mend or remove the annotation") from None
        return masks if tag == UPRIGHT else torch.from_numpy(turn_pixels(masks.numpy(), tag))

    def _segments(self, i: int, size: tuple[int, int], keep_ignored: bool) -> tuple[Tensor, Tensor]:
        """Returns the segments (H, W) int16 of image `i` of `size`, and their labels (N,) int64."""
        index = self.index
        path = self.maps / index.map_name(i)
        if self.pixel_labels is not None:
            segments = read_label_map(path, self.pixel_labels)
            labels = np.arange(len(self.vocabulary))
        else:
            rows = index.rows(i)
            segments = read_segment_map(path, index.segment_ids[rows], self.partial)
            labels = index.labels[rows].astype(np.int64)
            ignore = index.ignore[rows]
            if ignore.any() and not keep_ignored:
                row_of = np.where(ignore, VOID, np.arange(len(labels)))
                row_of = np.append(row_of, VOID)  # VOID is -1: it indexes the last element
                segments = row_of.astype(np.int16)[segments]
        if segments.shape != size:
            height, width = segments.shape
            tag, _ = read_tag(*self.image_file(i))
            turned, remedy = "", "replace one of them"
            if tag in TURNS:
                turned = f" as its EXIF orientation {tag} turns it"
                remedy = "turn the map with it, or save the image without the tag"
            raise InputError(
                f"label map {path} has {height} x {width} pixels (height, width), but its image "
                f"{self.images / index.file_name(i)} has {size[0]} x {size[1]}{turned}; {remedy}"
            )
        sample = torch.from_numpy(segments), torch.from_numpy(labels)
        keeps_all = keep_ignored and self.pixel_labels is None
        return sample if keeps_all else drop_unseen(*sample)

    def image_counts(self) -> np.ndarray | None:
        """Returns (C,): the number of images that contain each class.

        Boxes, segments and image-level labels count, crowds do not. None for semantic label maps:
        all of them would have to be decoded.
        """
        if self.pixel_labels is not None:
            return None
        _, counts = self.index.by_label
        return np.pad(counts, (0, len(self.vocabulary) - len(counts)))

    def select(self, images: np.ndarray) -> "Dataset":
        """Returns the dataset with only the images where `images` (I,) bool is true."""
        shards = self.shards and self.shards.select(images)
        return replace(self, index=self.index.select(images), shards=shards)

    def summary(self) -> str:
        """Returns one line for the log: the numbers of images, annotations and classes."""
        index = self.index
        start = f"{self.name}: {len(self)} images"
        classes = f"{len(self.vocabulary)} classes"
        if self.pixel_labels is not None:
            return f"{start} with label maps, {classes} (only the maps tell which of them occur)"
        seen = int((self.image_counts() > 0).sum())
        crowds = int(index.ignore.sum())
        if self.maps is not None:
            return (
                f"{start}, {len(index.labels)} segments ({crowds} crowd, not trained on), "
                f"{classes} ({seen} with segments)"
            )
        if index.image_labels is None:
            empty = int((np.diff(index.offsets) == 0).sum())
            bare = f"; {index.num_empty} without an area" if index.num_empty else ""
            outside = f"; {index.num_outside} outside their image" if index.num_outside else ""
            return (
                f"{start} ({empty} without a box), {len(index.labels)} boxes ({crowds} crowd or "
                f"group, not trained on{bare}{outside}), {classes} ({seen} with boxes)"
            )
        captions = np.zeros(1, int)
        if index.captions:
            captions = np.array([len(texts) for texts in index.captions])
        unlabelled = np.diff(index.image_label_offsets) == 0
        bare = int((unlabelled & (captions == 0)).sum())
        return (
            f"{start} ({bare} without label and caption), {len(index.image_labels)} image labels, "
            f"{captions.sum()} captions, no boxes, {classes} ({seen} with images)"
        )

    def check_images(self) -> None:
        """Raises InputError that names the first missing image or label map, and their number."""
        for kind, root, found in self.find_files():
            if found.respelt:
                first = next(iter(found.respelt))
                message = "%s: %d of %d %ss have other names in %s, such as '%s' for '%s'"
                counts = (len(found.respelt), len(self), kind)
                log.warning(message, self.name, *counts, root, found.respelt[first], first)
            if found.missing:
                like = f"; nearest there: {found.nearest}" if found.nearest else ""
                raise InputError(
                    f"{self.name}: {kind} {root / found.missing[0]} is missing "
                    f"({len(found.missing)} of {len(self)} that {self.index.source} lists{like}); "
                    f"add the {kind}s or take them out of the annotations"
                )

    def find_files(self) -> list[tuple[str, Path, Lookup]]:
        """Looks for the images and label maps; returns kind of file, folder and what was found.

        A name that fits one file in another spelling is replaced by it in the index.
        """
        kinds = [] if self.shards else [("image", self.images, "file_names")]
        if self.maps is not None:
            kinds.append(("label map", self.maps, "map_names"))
        found = []
        if self.shards:
            missing = map(self.index.file_name, np.flatnonzero(self.shards.tar_of < 0))
            found.append(("image", self.images, Lookup({}, list(missing))))
        for kind, root, column in kinds:
            memo = None
            if self.index.folder:
                digest = hashlib.sha256(f"{kind} {root.absolute()}".encode()).hexdigest()
                memo = self.index.folder / f"listed-{digest[:16]}.json"
            names = map(os.fsdecode, map(bytes, getattr(self.index, column)))
            missing = missing_files(root, names, memo)
            found.append((kind, root, self._respell(root, column, missing)))
        return found

    def _respell(self, root: Path, column: str, missing: list[str]) -> Lookup:
        """Looks for missing files in other spellings, and puts those found into the index."""
        if not missing:
            return Lookup({}, [])
        names = [os.fsdecode(bytes(name)) for name in getattr(self.index, column)]
        found = look_up(root, missing, set(names).difference(missing))
        if found.respelt:
            names = [found.respelt.get(name, name) for name in names]
            setattr(self.index, column, encoded(names))  # what is cached of the index stays
        return found
