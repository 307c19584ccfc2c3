"""All annotations of one dataset as flat arrays, which are small and can be memory-mapped."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike

from common.datasets.doubts import box_doubts
from common.errors import InputError

BEYOND = 2.0**40  # square pixels; the largest size range of COCO's metric ends at 1e10


def encoded(names: Iterable[str]) -> np.ndarray:
    """Returns file names as an array (I,) of bytes. A name may have letters of any encoding."""
    return np.array([os.fsencode(name) for name in names], dtype=bytes)


@dataclass
class TwoTexts:
    """Two arrays of bytes end to end, which may stay in their files. A slice is of one of them."""

    first: np.ndarray
    second: np.ndarray

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, part: slice) -> np.ndarray:
        shift = len(self.first)
        if part.stop <= shift:
            return self.first[part]
        return self.second[part.start - shift : part.stop - shift]


class JsonRows(Sequence):
    """A sequence of N values, stored as compact json in one array; a value is parsed when read.

    text: (T,) uint8
    starts, ends: (N,) int64; value i is text[starts[i]:ends[i]], None if that is empty
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.text, self.starts, self.ends = text, starts, ends

    @classmethod
    def of(cls, values: Sequence) -> "JsonRows":
        """Stores `values`. Each is None or a value that json can express."""
        text = bytearray()
        offsets = np.zeros(len(values) + 1, np.int64)
        for row, value in enumerate(values, 1):
            if value is not None:
                # orjson returns a kilobyte of memory even for a number, so its bytes are copied
                text += orjson.dumps(value)
            offsets[row] = len(text)
        return cls(np.frombuffer(text, np.uint8), offsets[:-1], offsets[1:])

    @classmethod
    def none(cls, count: int) -> "JsonRows":
        """Returns `count` values None."""
        ends = np.zeros(count, np.int64)
        return cls(np.zeros(0, np.uint8), ends, ends)

    @classmethod
    def join(cls, first: "JsonRows", second: "JsonRows") -> "JsonRows":
        """Returns the values of both, one after the other. Their text is not copied."""
        shift = len(first.text)
        starts = np.concatenate([first.starts, second.starts + shift])
        ends = np.concatenate([first.ends, second.ends + shift])
        return cls(TwoTexts(first.text, second.text), starts, ends)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int):
        """Parses value `row`."""
        text = self.text[self.starts[row] : self.ends[row]]
        return orjson.loads(text.data) if len(text) else None

    @property
    def filled(self) -> np.ndarray:
        """(N,) bool: the values that are not None."""
        return self.ends > self.starts

    def take(self, rows: np.ndarray) -> "JsonRows":
        """Returns the values `rows`; shares the text."""
        return JsonRows(self.text, self.starts[rows], self.ends[rows])


class Parts:
    """Columns that grow chunk by chunk.

    types: of each column, np.int32 or, for rows of four, (np.float32, 4)
    """

    def __init__(self, **types: Any):
        self.parts = {name: [np.zeros(0, type)] for name, type in types.items()}

    def add(self, **chunks: Sequence) -> None:
        """Appends a chunk to each column named."""
        for name, values in chunks.items():
            column = self.parts[name]
            column.append(np.array(values, dtype=column[0].dtype))

    def take(self, name: str) -> np.ndarray:
        """Returns a whole column and forgets it."""
        return np.concatenate(self.parts.pop(name))


@dataclass
class Index:
    """I images and A annotations. The annotations of image i are rows offsets[i]:offsets[i + 1].

    source:     the annotation file, for messages
    file_names: (I,) bytes, relative to the image folder; a quarter of the size of str. `file_name`
                decodes them
    image_ids:  (I,) the dataset's own ids, int or str
    sizes:      (I, 2) int32 height, width; 0 if the format does not tell
    offsets:    (I + 1,) int64
    boxes:      (A, 4) float32 xyxy in pixels, or in fractions of the image if `relative`
    labels:     (A,) int32 index into the dataset's vocabulary
    areas:      (A,) float32 square pixels as annotated (COCO: of the mask), for the size ranges of
                the metrics; parts of the image if `relative`. An ignored object that is no crowd
                (VOC: difficult) has BEYOND, which is in no range: one detection matches it by IoU,
                any number match a crowd
    ignore:     (A,) bool: crowd, group-of or difficult. Not trained on, neither hit nor miss in the
                metrics
    segmentations: A COCO polygons or RLEs, None for a box without a mask; JsonRows if they come
                from a file. None if no box has a mask. If `relative`, they are polygons in
                fractions of the image
    negatives:  the labels that are verified absent, per image (LVIS, OpenImages), or None
    not_exhaustive: the labels of which some objects have no annotation, per image (LVIS), or None
    verified:   the labels that are verified present, with a box or without, per image (OpenImages),
                or None
    image_labels: (P,) int32 image-level labels, or None for box data
    image_label_offsets: (I + 1,) int64; those of image i are rows offsets[i]:offsets[i + 1]
    captions:   the sentences about each image, or None
    map_names:  (I,) bytes, the label maps, relative to a folder of their own, or None
    segment_ids: (A,) int64, the ids of the annotations in their label maps if they are segments
    folder:     the cache folder that the arrays are memory-mapped from, read-only, or None
    """

    source: str
    file_names: np.ndarray
    image_ids: Sequence
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignore: np.ndarray
    relative: bool = False
    segmentations: Sequence | None = None
    negatives: Sequence[Sequence[int]] | None = None
    not_exhaustive: Sequence[Sequence[int]] | None = None
    verified: Sequence[Sequence[int]] | None = None
    image_labels: np.ndarray | None = None
    image_label_offsets: np.ndarray | None = None
    captions: Sequence[Sequence[str]] | None = None
    map_names: np.ndarray | None = None
    segment_ids: np.ndarray | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.file_names)

    @property
    def has_mask(self) -> np.ndarray:
        """(A,) bool: the annotations with a mask."""
        masks = self.segmentations
        if isinstance(masks, JsonRows):
            return masks.filled
        masks = masks or [None] * len(self.labels)
        return np.array([mask is not None for mask in masks], dtype=bool)

    @property
    def image_of(self) -> np.ndarray:
        """(A,) the image of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def file_name(self, image: int) -> str:
        """Returns the path of an image, relative to the image folder."""
        return os.fsdecode(bytes(self.file_names[image]))

    def map_name(self, image: int) -> str:
        """Returns the path of the label map of an image, relative to the folder of maps."""
        return os.fsdecode(bytes(self.map_names[image]))

    def rows(self, image: int) -> slice:
        """Returns the rows of the annotations of an image."""
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    def image_label_rows(self, image: int) -> slice:
        """Returns the rows of the image-level labels of an image."""
        return slice(int(self.image_label_offsets[image]), int(self.image_label_offsets[image + 1]))

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (X,) rows of images and (X,) labels, one pair per image-level label.

        Without image-level labels, there is one pair per box. Ignored boxes are left out.
        """
        if self.image_labels is not None:
            counts = np.diff(self.image_label_offsets)
            return np.repeat(np.arange(len(self)), counts), self.image_labels
        return self.image_of[~self.ignore], self.labels[~self.ignore]

    @cached_property
    def by_label(self) -> tuple[np.ndarray, np.ndarray]:
        """The images that contain each label, by box or image-level label; crowds do not count.

        (X,) int32 images of label 0, then of label 1, ..., each once and in ascending order.
        (L,) int64 number of images of each label. L ends at the last label that occurs.
        """
        images, labels = self.positives()
        pairs = np.sort(labels.astype(np.int64) * len(self) + images)
        changes = np.diff(pairs, prepend=-1)
        pairs = pairs[np.flatnonzero(changes)]  # faster than np.unique
        return (pairs % len(self)).astype(np.int32), np.bincount(pairs // len(self))

    @cached_property
    def num_outside(self) -> int:
        """The number of boxes that are wholly outside their image."""
        return int(self.outside().sum())

    @cached_property
    def num_empty(self) -> int:
        """The number of boxes without an area."""
        return int(self.empty().sum())

    @cached_property
    def num_trainable(self) -> int:
        """The number of boxes or segments that are not ignored; a box also has an area inside."""
        kept = ~self.ignore
        if self.map_names is None:  # the boxes of segments are not used
            kept &= ~self.empty() & ~self.outside()
        return int(kept.sum())

    @cached_property
    def doubts(self) -> list[str]:
        """What makes the boxes look like those of another convention, in lines for the log."""
        return box_doubts(self)

    def empty(self) -> np.ndarray:
        """Returns (A,) bool: the box has no area."""
        return (self.boxes[:, 2:] <= self.boxes[:, :2]).any(axis=1)

    def outside(self) -> np.ndarray:
        """Returns (A,) bool: the box is wholly outside its image; False if its size is unknown."""
        limits = np.ones((1, 2), np.int32)
        if not self.relative:
            limits = self.sizes[self.image_of][:, ::-1]  # width, height
        beyond = (self.boxes[:, :2] >= limits) | (self.boxes[:, 2:] <= 0)
        return beyond.any(axis=1) & (limits > 0).all(axis=1)

    def keep(self, kept: np.ndarray) -> "Index":
        """Returns the same images with only the boxes where `kept` (A,) bool is true."""
        rows = np.flatnonzero(kept)
        count = np.concatenate([[0], np.cumsum(kept)])
        columns = ("boxes", "labels", "areas", "ignore", "segmentations", "segment_ids")
        kept_columns = {name: _take(getattr(self, name), rows) for name in columns}
        return replace(self, offsets=count[self.offsets], **kept_columns)

    def select(self, images: np.ndarray) -> "Index":
        """Returns an index of only the images where `images` (I,) bool is true."""
        kept = self.keep(images[self.image_of])
        if self.image_labels is not None:
            counts = np.diff(self.image_label_offsets)
            image_labels = self.image_labels[np.repeat(images, counts)]
            offsets = np.concatenate([[0], np.cumsum(counts[images])])
            kept = replace(kept, image_labels=image_labels, image_label_offsets=offsets)
        rows = np.flatnonzero(images)
        columns = ("file_names", "map_names", "image_ids", "sizes")
        columns += ("negatives", "not_exhaustive", "verified", "captions")
        per_image = {name: _take(getattr(self, name), rows) for name in columns}
        offsets = np.concatenate([[0], np.cumsum(np.diff(kept.offsets)[rows])])
        return replace(kept, offsets=offsets, folder=None, **per_image)

    @classmethod
    def build(
        cls,
        source: str,
        file_names: Sequence[str],
        image_ids: Sequence[int | str],
        sizes: ArrayLike,
        image_of: ArrayLike = (),
        boxes: ArrayLike = (),
        labels: ArrayLike = (),
        *,
        areas: ArrayLike | None = None,
        ignore: ArrayLike | None = None,
        **extra: Any,
    ) -> "Index":
        """Returns the Index of A annotations, sorted by `image_of` (A,); by default there are none.

        areas:  by default those of the boxes
        ignore: by default all False
        extra:  further fields
        Raises InputError that names `source` and the image for a box with NaN or negative size, and
        for an image without a size in pixels.
        """
        image_of = np.asarray(image_of, dtype=np.int64)
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"{source}: image '{file_names[image_of[row]]}' has the box {boxes[row].tolist()} "
                f"(x1, y1, x2, y2), with NaN or negative size ({int(bad.sum())} such boxes in the "
                "file); mend or remove it"
            )
        if areas is None:
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        if ignore is None:
            ignore = np.zeros(len(boxes), bool)
        sizes = np.array(sizes, dtype=np.float64).reshape(-1, 2)
        bad = ~((sizes >= 0) & (sizes < 1 << 31)).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"{source}: image '{file_names[row]}' has the size {sizes[row].tolist()} (height, "
                "width); write its pixels"
            )
        order = np.argsort(image_of, kind="stable")
        counts = np.bincount(image_of, minlength=len(file_names))
        for field in ("segmentations", "segment_ids"):  # the others in `extra` are per image
            extra[field] = _take(extra.get(field), order)
        return cls(
            source=source,
            file_names=encoded(file_names),
            image_ids=image_ids,
            sizes=sizes.astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=boxes[order],
            labels=np.asarray(labels, dtype=np.int32)[order],
            areas=np.asarray(areas, dtype=np.float32)[order],
            ignore=np.asarray(ignore, dtype=bool)[order],
            **extra,
        )


def _take(values: Sequence | None, rows: np.ndarray) -> Sequence | None:
    """Returns the rows of an array, JsonRows or list; None if there are no values."""
    if isinstance(values, JsonRows):
        return values.take(rows)
    if isinstance(values, np.ndarray):
        return values[rows]
    return None if values is None else [values[row] for row in rows]
