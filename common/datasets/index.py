"""All annotations of one dataset as flat arrays: small, shareable, and enough for every sampler and metric."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson

from common.errors import InputError


def encoded(names: Iterable[str]) -> np.ndarray:
    """(I,) bytes: names of files, whatever their letters."""
    return np.array([os.fsencode(name) for name in names], dtype=bytes)


BEYOND = 2.0**40  # square pixels; the largest range of COCO's metric ends at 1e10


class JsonRows(Sequence):
    """Values as compact json in one array of bytes; each is parsed when it is asked for.

    text: (T,) uint8; row i is text[starts[i]:ends[i]], both (N,) int64
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.text, self.starts, self.ends = text, starts, ends

    @classmethod
    def of(cls, values: Sequence) -> "JsonRows":
        text, offsets = bytearray(), np.zeros(len(values) + 1, np.int64)
        for row, value in enumerate(values, 1):
            text += orjson.dumps(
                value
            )  # copied at once: orjson gives even a number the memory of a kilobyte
            offsets[row] = len(text)
        return cls(np.frombuffer(text, np.uint8), offsets[:-1], offsets[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int):
        return orjson.loads(self.text[self.starts[row] : self.ends[row]].data)

    def take(self, rows: np.ndarray) -> "JsonRows":
        return JsonRows(self.text, self.starts[rows], self.ends[rows])


class Parts:
    """Columns that grow run by run, each of its type: np.int32, or (np.float32, 4) for rows of four."""

    def __init__(self, **types):
        self.parts = {name: [np.zeros(0, type)] for name, type in types.items()}

    def add(self, **runs: Sequence) -> None:
        for name, values in runs.items():
            self.parts[name].append(np.array(values, dtype=self.parts[name][0].dtype))

    def take(self, name: str) -> np.ndarray:
        """The whole column, which is forgotten here."""
        return np.concatenate(self.parts.pop(name))


@dataclass
class Index:
    """I images and A annotations; the annotations of image i are rows offsets[i]:offsets[i + 1].

    source:     the annotation file, for messages
    file_names: (I,) bytes, a quarter of the size of str; relative to the image folder; `file_name` decodes them
    image_ids:  (I,) the dataset's own ids, int or str
    sizes:      (I, 2) int32 height, width; 0 where the format does not tell
    offsets:    (I + 1,) int64
    boxes:      (A, 4) float32 xyxy in pixels, or in fractions of the image where `relative`
    labels:     (A,) int32 index into the dataset's vocabulary
    areas:      (A,) float32 square pixels as annotated (COCO: of the mask), for the metrics' size ranges; BEYOND all of
                them for what is ignored but no crowd: that overlaps as objects do, and is found once
    ignore:     (A,) bool: crowd, group-of or difficult; never trained on, neither hit nor miss in the metric
    segmentations: A COCO polygons or RLEs, or None; JsonRows where a file gave them
    negatives, not_exhaustive: the labels of each image that are verified absent, and those annotated in part (LVIS,
                OpenImages); None where the format has none
    verified:   the labels of each image that are verified present, with a box or without (OpenImages); None without
    image_labels: (P,) int32 labels of whole images, without boxes; None for box data
    image_label_offsets: (I + 1,) int64; the image labels of image i are rows offsets[i]:offsets[i + 1]
    captions:   the sentences of each image, or None
    map_names:  (I,) bytes, the label maps as `file_names`, below a folder of their own; None without
    segment_ids: (A,) int64, the numbers of the annotations in their maps, where each annotation is a segment
    folder:     the cache folder that the arrays are mapped from, if they are; they cannot be written to, then
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
    def image_of(self) -> np.ndarray:
        """(A,) the image of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def file_name(self, image: int) -> str:
        return os.fsdecode(bytes(self.file_names[image]))

    def map_name(self, image: int) -> str:
        return os.fsdecode(bytes(self.map_names[image]))

    def rows(self, image: int) -> slice:
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    def image_label_rows(self, image: int) -> slice:
        return slice(int(self.image_label_offsets[image]), int(self.image_label_offsets[image + 1]))

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """(X,) image and (X,) label of each image label, or of each box that is trained on."""
        if self.image_labels is not None:
            return np.repeat(
                np.arange(len(self)), np.diff(self.image_label_offsets)
            ), self.image_labels
        return self.image_of[~self.ignore], self.labels[~self.ignore]

    @cached_property
    def by_label(self) -> tuple[np.ndarray, np.ndarray]:
        """(X,) int32 images that contain label 0, then 1, ..., each once and rising; (L,) int64 how many of each.

        By box or image label, not by crowds. Labels above the last that occurs are left out.
        """
        images, labels = self.positives()
        pairs = np.sort(labels.astype(np.int64) * len(self) + images)
        pairs = pairs[
            np.flatnonzero(np.diff(pairs, prepend=-1))
        ]  # each once, faster than np.unique
        return (pairs % len(self)).astype(np.int32), np.bincount(pairs // len(self))

    @cached_property
    def num_outside(self) -> int:
        """How many boxes lie wholly outside their image."""
        return int(self.outside().sum())

    def outside(self) -> np.ndarray:
        """(A,) bool: the boxes that lie wholly outside their image; False where its size is not known."""
        limits = (
            np.ones((1, 2), np.int32) if self.relative else self.sizes[self.image_of][:, ::-1]
        )  # width, height
        beyond = (self.boxes[:, :2] >= limits) | (self.boxes[:, 2:] <= 0)
        return beyond.any(axis=1) & (limits > 0).all(axis=1)

    def keep(self, kept: np.ndarray) -> "Index":
        """The same images with only the boxes where `kept` (A,) bool; what is verified absent stays so."""
        count = np.concatenate([[0], np.cumsum(kept)])
        return replace(
            self,
            offsets=count[self.offsets],
            boxes=self.boxes[kept],
            labels=self.labels[kept],
            areas=self.areas[kept],
            ignore=self.ignore[kept],
            segmentations=_take(self.segmentations, np.flatnonzero(kept)),
            segment_ids=_take(self.segment_ids, np.flatnonzero(kept)),
        )

    def select(self, images: np.ndarray) -> "Index":
        """Only the images where `images` (I,) bool, of data without image labels."""
        kept, rows = self.keep(images[self.image_of]), np.flatnonzero(images)
        names = (
            "file_names",
            "map_names",
            "image_ids",
            "sizes",
            "negatives",
            "not_exhaustive",
            "verified",
            "captions",
        )
        per_image = {name: _take(getattr(self, name), rows) for name in names}
        offsets = np.concatenate([[0], np.cumsum(np.diff(kept.offsets)[rows])])
        return replace(kept, offsets=offsets, folder=None, **per_image)

    @classmethod
    def build(
        cls,
        source,
        file_names,
        image_ids,
        sizes,
        image_of=(),
        boxes=(),
        labels=(),
        areas=None,
        ignore=None,
        **extra,
    ) -> "Index":
        """Sort A annotations, none by default, by `image_of` (A,) into an Index; checks every box.

        areas: those of the boxes, if there are no others; ignore: none, by default
        Raises InputError naming `source` and the image for a box with NaN or negative size.
        """
        image_of = np.asarray(image_of, dtype=np.int64)
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{source}: image '{file_names[image_of[row]]}' has the box {boxes[row].tolist()} (x1, y1, x2, y2), "
                f"with NaN or negative size ({int(bad.sum())} such boxes in the file); mend or remove it"
            )
        areas = (
            (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            if areas is None
            else np.asarray(areas, dtype=np.float32)
        )
        ignore = np.zeros(len(boxes), bool) if ignore is None else np.asarray(ignore, dtype=bool)
        sizes = np.array(sizes, dtype=np.float64).reshape(-1, 2)
        if (odd := ~((sizes >= 0) & (sizes < 1 << 31)).all(axis=1)).any():
            row = int(np.argmax(odd))
            raise InputError(f"{source}: image '{file_names[row]}' has the size {sizes[row].tolist()} (height, width); "
                             "write its pixels")  # fmt: skip
        order = np.argsort(image_of, kind="stable")
        offsets = np.concatenate(
            [[0], np.cumsum(np.bincount(image_of, minlength=len(file_names)))]
        ).astype(np.int64)
        for field in ("segmentations", "segment_ids"):  # the others of `extra` are of images
            extra[field] = _take(extra.get(field), order)
        return cls(
            source=source,
            file_names=encoded(file_names),
            image_ids=image_ids,
            sizes=sizes.astype(np.int32),
            offsets=offsets,
            boxes=boxes[order],
            labels=np.asarray(labels, dtype=np.int32)[order],
            areas=areas[order],
            ignore=ignore[order],
            **extra,
        )


def _take(values: Sequence | None, rows: np.ndarray) -> Sequence | None:
    if isinstance(values, JsonRows):
        return values.take(rows)
    if isinstance(values, np.ndarray):
        return values[rows]
    return None if values is None else [values[row] for row in rows]
