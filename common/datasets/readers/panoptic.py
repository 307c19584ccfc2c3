"""Panoptic segmentation: COCO's panoptic json with a folder of PNGs that number the segments of each image."""

import logging
from collections import defaultdict
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import file_name
from common.datasets.index import Index, Parts, encoded
from common.datasets.readers.coco import OPTIONS as COCO_OPTIONS
from common.datasets.readers.coco import read_vocabulary
from common.datasets.store import cached_index, is_cached
from common.datasets.stream import read_fields
from common.errors import InputError

log = logging.getLogger("concord")
CITYSCAPES = "cityscapes-panoptic"


def is_panoptic(path: Path) -> bool:
    """Whether the first annotation in a json lists segments. Raises InputError for no json."""
    if is_cached(path, COCO_OPTIONS):
        return False
    if is_cached(path, options("")):
        return True
    runs = (
        run
        for field, run in read_fields(path)
        if field == "annotations" and isinstance(run, list) and run
    )
    first = next(runs, [None])[0]
    return isinstance(first, dict) and "segments_info" in first


def options(name: str) -> list:
    """Of the cache."""
    return ["panoptic", name == CITYSCAPES]


def read_panoptic(name: str, annotations: Path, images: Path, metric: str = "pq") -> Dataset:
    """Read a panoptic json; no PNG is decoded.

    The PNGs lie in a folder of the json's name, beside it or, as in the layout of detectron2, one level above.
    Images without an entry are left out and counted in the log. A large file is read once and kept as columns in the
    cache, see `cached_index`. Raises InputError naming the file, the field and the remedy.
    """
    places = [annotations.with_suffix(""), annotations.parent.parent / annotations.stem]
    maps = next((place for place in places if place.is_dir()), None)
    if maps is None:
        raise InputError(f"dataset '{name}': {places[0]}, the folder of the PNGs of {annotations.name}, does not "
                         "exist; unpack it there")  # fmt: skip
    try:
        index, facts = cached_index(
            annotations, options(name), lambda _: read_index(name, annotations)
        )
        vocabulary = read_vocabulary(name, annotations, facts["categories"])
        is_thing = {c["id"]: bool(c["isthing"]) for c in facts["categories"]}
        vocabulary = replace(vocabulary, is_thing=tuple(is_thing[id] for id in vocabulary.ids))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{annotations}: {what} in an entry; a panoptic json of COCO's format is needed"
        ) from None
    if facts["bare"]:
        log.info("%s: %d images without segments_info are left out", annotations, facts["bare"])
    return Dataset(name, vocabulary, index, images, metric, "panoptic", maps=maps)


def read_index(name: str, path: Path) -> tuple[Index, dict]:
    """The images that have an entry, and the facts beside it."""
    images, segments, categories, found = [], Segments(path), [], set()
    for field, run in read_fields(path):
        if field not in ("images", "annotations", "categories") or not isinstance(run, list):
            continue
        found.add(field)
        if field == "images":
            images += [
                (e["id"], image_name(name, path, e), e.get("height", 0), e.get("width", 0))
                for e in run
            ]
        elif field == "annotations":
            segments.add(run)
        else:
            categories += run
    for field in ("images", "annotations", "categories"):
        if field not in found:
            raise InputError(
                f"{path}: the list '{field}' is missing; a panoptic json of COCO's format is needed"
            )
    if not all(category["isthing"] in (0, 1) for category in categories):
        raise ValueError("an isthing that is not 0 or 1")
    listed, number_of = len(images), segments.number_of_image
    images = [image for image in images if image[0] in number_of]
    ids, names, heights, widths = zip(*images) if images else ((),) * 4
    row_of = {id: row for row, id in enumerate(ids)}
    if len(number_of) < len(segments.maps) or len(row_of) < len(ids):
        raise InputError(f"{path}: an image comes twice in 'images' or 'annotations'; keep one")
    if len(row_of) < len(number_of):
        unknown = min(number_of.keys() - row_of.keys())
        raise InputError(
            f"{path}: an annotation has the unknown image_id {unknown}; list it in 'images' or remove it"
        )
    label_of = read_vocabulary(name, path, categories).index_of_id
    numbers, labels = segments.parts.take("image"), segments.parts.take("category")
    labels = np.array([label_of.get(id, -1) for id in segments.number_of_category], dtype=np.int32)[
        labels
    ]
    if (labels < 0).any():
        image = list(number_of)[numbers[np.argmax(labels < 0)]]
        unknown = next(id for id in segments.number_of_category if id not in label_of)
        raise InputError(f"{path}: image {image} has the unknown category_id {unknown}; list it in 'categories' or "
                         "remove it")  # fmt: skip
    index = Index.build(
        source=str(path),
        file_names=names,
        image_ids=ids,
        sizes=np.stack([heights, widths], axis=1),
        image_of=np.array([row_of[id] for id in number_of], dtype=np.int64)[numbers],
        boxes=segments.parts.take("box"),
        labels=labels,
        areas=segments.parts.take("area"),
        ignore=segments.parts.take("crowd"),
        map_names=encoded(segments.maps[number_of[id]] for id in ids),
        segment_ids=segments.parts.take("id"),
    )
    kept = [{key: c[key] for key in ("id", "name", "isthing")} for c in categories]
    return index, {"categories": kept, "bare": listed - len(images)}


class Segments:
    """The list `annotations`, gathered run by run.

    number_of_image, number_of_category: number the ids as they come
    maps: file name of each entry's PNG
    """

    def __init__(self, path: Path):
        self.path, self.maps = path, []
        self.number_of_image, self.number_of_category = (
            defaultdict(count().__next__) for _ in range(2)
        )
        self.parts = Parts(
            image=np.int32,
            id=np.int64,
            category=np.int32,
            box=(np.float32, 4),
            area=np.float32,
            crowd=bool,
        )

    def add(self, run: list[dict]) -> None:
        image_of, segments = [], []
        for entry in run:
            found = entry["segments_info"]
            ids = [segment["id"] for segment in found]
            if len(set(ids)) < len(ids) or not all(
                isinstance(id, int) and 0 < id < 1 << 24 for id in ids
            ):
                raise InputError(f"{self.path}: image {entry['image_id']} has the segment ids {ids}; each is a number "
                                 "of its own, from 1 to 16777215")  # fmt: skip
            self.maps.append(file_name(self.path, {"file_name": entry["file_name"]}))
            image_of += [self.number_of_image[entry["image_id"]]] * len(found)
            segments += found
        for segment in segments:
            if segment.get("iscrowd", 0) not in (0, 1) or not isinstance(
                segment.get("area", 0), int | float
            ):
                raise ValueError("an iscrowd that is not 0 or 1, or an area that is no number")
        boxes = np.array(
            [segment.get("bbox", (0, 0, 0, 0)) for segment in segments], dtype=np.float64
        )
        if segments and boxes.shape != (len(segments), 4):
            raise ValueError("a bbox that is not x, y, width, height")
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        self.parts.add(
            image=image_of,
            id=[segment["id"] for segment in segments],
            category=[self.number_of_category[segment["category_id"]] for segment in segments],
            box=boxes,
            area=[segment.get("area", 0) for segment in segments],
            crowd=[segment.get("iscrowd", 0) for segment in segments],
        )


def image_name(name: str, path: Path, image: dict) -> str:
    """The image's path below its folder. The file_name that Cityscapes' createPanopticImgs.py writes does not exist."""
    if name != CITYSCAPES:
        return file_name(path, image)
    city, *_ = image["id"].split("_")
    return file_name(path, {"file_name": f"{city}/{image['id']}_leftImg8bit.png"})
