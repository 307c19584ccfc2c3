"""Photographs that an EXIF tag turns, but whose annotations were made on the pixels as stored."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image

from common.datasets.files import open_image
from common.masks import decode_masks, encode_masks

if TYPE_CHECKING:
    from common.datasets.dataset import Dataset

UPRIGHT = 1
TURNS = (5, 6, 7, 8)  # tags that swap height and width


def read_tag(path: Path, data: bytes | None = None) -> tuple[int, tuple[int, int]]:
    """Returns the EXIF orientation (1 to 8) of an image, and its stored (height, width).

    Reads only the header. data: as in `read_image`. Raises InputError for a broken image.
    """
    with open_image(path, data) as image:
        exif = Image.Image.getexif(image)  # the getexif of PNG images would decode the image
        tag = exif.get(ExifTags.Base.Orientation, UPRIGHT)
        is_tag = isinstance(tag, int) and 1 <= tag <= 8
        return (tag if is_tag else UPRIGHT), image.size[::-1]


def turn_boxes(boxes: np.ndarray, size: tuple[int, int], tag: int) -> np.ndarray:
    """Turns boxes (N, 4) xyxy with their image. size: its stored (height, width); tag: in TURNS."""
    height, width = size
    x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]  # (N, 2) each
    new_x = height - y if tag in (6, 7) else y
    new_y = width - x if tag in (7, 8) else x
    new_x = np.sort(new_x, axis=1)
    new_y = np.sort(new_y, axis=1)
    return np.stack([new_x[:, 0], new_y[:, 0], new_x[:, 1], new_y[:, 1]], axis=1)


def turn_pixels(pixels: np.ndarray, tag: int) -> np.ndarray:
    """Turns masks (..., H, W) with their image, as Pillow's exif_transpose. tag: in TURNS."""
    turned = pixels.swapaxes(-1, -2)
    if tag in (6, 7):
        turned = turned[..., ::-1]
    if tag in (7, 8):
        turned = turned[..., ::-1, :]
    return np.ascontiguousarray(turned)


def is_swapped(annotated: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Tells where the annotated (..., 2) height and width are the width and height of `sizes`."""
    swapped = (annotated == sizes[..., ::-1]).all(axis=-1)
    return swapped & (annotated != sizes).any(axis=-1)


def upright(dataset: "Dataset", sizes: list[tuple[int, int]]) -> "Dataset":
    """Returns the dataset with the boxes of photographs annotated as stored turned upright.

    Only the headers of images of swapped size are read.
    sizes: (height, width) of each image, upright
    """
    tags = turned_tags(dataset, sizes)
    if not tags:
        return dataset
    index = dataset.index
    boxes = index.boxes.copy()
    segmentations = index.segmentations and list(index.segmentations)
    for image, tag in tags.items():
        size = tuple(index.sizes[image].tolist())
        rows = index.rows(image)
        boxes[rows] = turn_boxes(boxes[rows], size, tag)
        if segmentations:
            segmentations[rows] = _turn_segmentations(segmentations[rows], size, tag)
    dataset = copy.copy(dataset)
    dataset.index = replace(index, boxes=boxes, segmentations=segmentations)
    return dataset


def _turn_segmentations(segmentations: list, size: tuple[int, int], tag: int) -> list:
    """Turns COCO segmentations of an image of stored `size`, as RLEs; None stays None."""
    try:
        masks = decode_masks(segmentations, size)
    except ValueError:
        return segmentations  # who reads them names what is broken
    turned = encode_masks(torch.from_numpy(turn_pixels(masks.numpy(), tag)))
    return [rle if given is not None else None for given, rle in zip(segmentations, turned)]


def turned_tags(dataset: "Dataset", sizes: list[tuple[int, int]]) -> dict[int, int]:
    """Returns {image: tag} of the photographs that are annotated as stored. sizes: as `upright`."""
    found = {}
    if not len(dataset.index) or dataset.index.relative:
        return found
    swapped = is_swapped(dataset.index.sizes, np.array(sizes))
    for image in np.flatnonzero(swapped).tolist():
        tag, _ = read_tag(*dataset.image_file(image))
        if tag in TURNS:
            found[image] = tag
    return found
