"""Reader of COCO-format panoptic json files, whose PNGs hold the segment id of each pixel."""

import logging
from collections import defaultdict
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import file_name
from common.datasets.ids import find_ids
from common.datasets.index import Index, Parts, encoded
from common.datasets.readers import coco
from common.datasets.readers.coco_faults import (
    PANOPTIC_FAULT,
    add_entries,
    faulty_entries,
    first_fault,
    is_id,
    log_retyped,
    thing_fault,
)
from common.datasets.store import cached_index, is_cached
from common.datasets.stream import read_fields
from common.errors import InputError

log = logging.getLogger("concord")
CITYSCAPES = "cityscapes-panoptic"
LISTS = ("images", "annotations", "categories")


def is_panoptic(path: Path) -> bool:
    """Returns whether the first annotation has `segments_info`. Raises InputError if not json."""
    if is_cached(path, coco.CACHE_OPTIONS):
        return False
    if is_cached(path, ["panoptic", False]):
        return True
    for field, chunk in read_fields(path):
        if field == "annotations" and isinstance(chunk, list) and chunk:
            return isinstance(chunk[0], dict) and "segments_info" in chunk[0]
    return False


def read_panoptic(name: str, annotations: Path, images: Path, metric: str = "pq") -> Dataset:
    """Reads a panoptic json. No PNG is decoded.

    The PNGs are in a folder with the name of the json, in the same folder as the json or, as in
    detectron2's layout, in its parent, or beside the json (Mapillary). Images without an entry in
    `annotations` are left out and their number is logged. Raises InputError for a missing folder or
    field, and for a bad value.
    """
    places = [annotations.with_suffix(""), annotations.parent.parent / annotations.stem]
    maps = next((place for place in places if place.is_dir()), None)
    if maps is None and any(annotations.parent.glob("*.png")):
        maps = annotations.parent
    if maps is None:
        raise InputError(
            f"dataset '{name}': {places[0]}, the folder of the PNGs of {annotations.name}, does "
            "not exist; unpack it there"
        )
    try:
        options = ["panoptic", name == CITYSCAPES]
        index, facts = cached_index(
            annotations, options, lambda _: read_segments(name, annotations)
        )
        vocabulary = coco.read_vocabulary(name, annotations, facts["categories"])
        is_thing = {entry["id"]: bool(entry["isthing"]) for entry in facts["categories"]}
        vocabulary = replace(vocabulary, is_thing=tuple(is_thing[id] for id in vocabulary.ids))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        what += " in an entry; a panoptic json is needed"
        what = next(faulty_entries(annotations, PANOPTIC_FAULT), what)
        raise InputError(f"{annotations}: {what}") from None
    log_retyped(annotations, facts["retyped"])
    if facts["bare"]:
        log.info("%s: %d images without segments_info are left out", annotations, facts["bare"])
    return Dataset(name, vocabulary, index, images, metric, "panoptic", maps=maps)


def read_segments(name: str, path: Path) -> tuple[Index, dict]:
    """Returns the index, and the facts "categories" and "bare", the number of images left out."""
    images, categories, found = [], [], set()
    segments = Segments(path)

    def add_images(chunk: list[dict]) -> None:
        for image in chunk:
            if not is_id(image["id"]):
                raise ValueError("an image without an id")
            id, file = image["id"], image_name(name, path, image)
            images.append((id, file, (image.get("height", 0), image.get("width", 0))))

    add = {"images": add_images, "annotations": segments.add, "categories": categories.extend}
    for field, chunk in read_fields(path):
        if field not in LISTS or not isinstance(chunk, list):
            continue
        found.add(field)
        add_entries(path, PANOPTIC_FAULT[field], chunk, add[field])
    for field in LISTS:
        if field not in found:
            raise InputError(f"{path}: the list '{field}' is missing; a panoptic json is needed")
    if fault := first_fault(thing_fault, categories):
        raise InputError(f"{path}: {fault}")
    index_of = segments.index_of_image_id
    listed = {id: row for row, (id, _, _) in enumerate(images)}
    rows, retyped_images = find_ids(index_of, listed)
    if (rows < 0).any():
        unknown = list(index_of)[int(np.argmin(rows))]
        raise InputError(
            f"{path}: an annotation has the unknown image_id {unknown!r}; list it in 'images'"
        )
    entry_of = {images[row][0]: entry for entry, row in enumerate(rows)}
    kept = [image for image in images if image[0] in entry_of]
    ids = [id for id, _, _ in kept]
    row_of = {entry_of[id]: row for row, id in enumerate(ids)}  # {entry: row of its image}
    if not len(row_of) == len(ids) == len(segments.maps):
        raise InputError(f"{path}: an image comes twice in 'images' or 'annotations'; keep one")
    vocabulary = coco.read_vocabulary(name, path, categories)
    label_of, retyped = find_ids(segments.index_of_category_id, vocabulary.index_of_id)
    category_of = segments.parts.take("category")
    labels = label_of[category_of]
    image_of = segments.parts.take("image")
    if (labels < 0).any():
        image_id = list(index_of)[image_of[np.argmax(labels < 0)]]
        id = list(segments.index_of_category_id)[int(np.argmin(label_of))]
        raise InputError(
            f"{path}: image {image_id!r} has the unknown category_id {id!r}; list it in "
            "'categories'"
        )
    counts = {"image_id": retyped_images.sum(), "category_id": retyped[category_of].sum()}
    index = Index.build(
        source=str(path),
        file_names=[file for _, file, _ in kept],
        image_ids=ids,
        sizes=[size for _, _, size in kept],
        image_of=np.array([row_of[entry] for entry in range(len(rows))], dtype=np.int64)[image_of],
        boxes=segments.parts.take("box"),
        labels=labels,
        areas=segments.parts.take("area"),
        ignore=segments.parts.take("crowd"),
        map_names=encoded(segments.maps[entry_of[id]] for id in ids),
        segment_ids=segments.parts.take("id"),
    )
    keys = ("id", "name", "isthing")
    categories = [{key: category[key] for key in keys} for category in categories]
    return index, {
        "categories": categories,
        "bare": len(images) - len(kept),
        "retyped": {field: int(count) for field, count in counts.items() if count},
    }


class Segments:
    """Collects the entries of the json list `annotations`, chunk by chunk.

    index_of_image_id, index_of_category_id: id -> 0, 1, 2, ... in the order of the entries
    maps:  the file name of each entry's PNG
    parts: image and category (by these indices), id, box xyxy, area and crowd of each segment
    """

    def __init__(self, path: Path):
        self.path = path
        self.maps = []
        self.index_of_image_id = defaultdict(count().__next__)
        self.index_of_category_id = defaultdict(count().__next__)
        self.parts = Parts(
            image=np.int32,
            id=np.int64,
            category=np.int32,
            box=(np.float32, 4),
            area=np.float32,
            crowd=bool,
        )

    def add(self, chunk: list[dict]) -> None:
        """Adds the next entries. Raises InputError or ValueError for a wrong segment."""
        image_of, segments = [], []
        for entry in chunk:
            found = entry["segments_info"]
            ids = [segment["id"] for segment in found]
            valid = all(isinstance(id, int) and 0 < id < 1 << 24 for id in ids)
            if len(set(ids)) < len(ids) or not valid:
                raise InputError(
                    f"{self.path}: image {entry['image_id']} has the segment ids {ids}; each is a "
                    "number of its own, from 1 to 16777215"
                )
            named = {"file_name": entry["file_name"]}
            self.maps.append(file_name(self.path, named, looked_up=True))
            image_of += [self.index_of_image_id[entry["image_id"]]] * len(found)
            segments += found
        crowd = [segment.get("iscrowd", 0) for segment in segments]
        areas = [segment.get("area", 0) for segment in segments]
        if any(value not in (0, 1) for value in crowd) or not all(
            isinstance(area, int | float) and 0 <= area < 1e38 for area in areas
        ):
            raise ValueError("an iscrowd that is not 0 or 1, or an area that is no number")
        xywh = [segment.get("bbox", (0, 0, 0, 0)) for segment in segments]
        boxes = np.array(xywh, dtype=np.float64)
        if segments and boxes.shape != (len(segments), 4):
            raise ValueError("a bbox that is not x, y, width, height")
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        self.parts.add(
            image=image_of,
            id=[segment["id"] for segment in segments],
            category=[self.index_of_category_id[segment["category_id"]] for segment in segments],
            box=boxes,
            area=areas,
            crowd=crowd,
        )


def image_name(name: str, path: Path, image: dict) -> str:
    """Returns the path of an entry of `images`, relative to the image folder."""
    if name != CITYSCAPES:
        return file_name(path, image, looked_up=True)
    # Cityscapes' createPanopticImgs.py writes a file_name that does not exist
    city, *_ = image["id"].split("_")
    return file_name(path, {"file_name": f"{city}/{image['id']}_leftImg8bit.png"})
