"""Panoptic segmentation: COCO's panoptic json with a folder of PNGs that number the segments of each image."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.datasets.base import Dataset
from common.datasets.coco import OPTIONS, file_name, read_vocabulary
from common.datasets.index import Index, encoded
from common.datasets.store import find_columns
from common.datasets.stream import read_fields, read_json
from common.errors import InputError

log = logging.getLogger("concord")


def is_panoptic(path: Path) -> bool:
    """Whether the first annotation in a json lists segments. Raises InputError for no json."""
    if find_columns(path, OPTIONS):  # only boxes and image labels are kept there
        return False
    runs = (run for field, run in read_fields(path) if field == "annotations" and isinstance(run, list) and run)
    first = next(runs, [None])[0]
    return isinstance(first, dict) and "segments_info" in first


def read_panoptic(name: str, annotations: Path, images: Path, metric: str = "pq") -> Dataset:
    """Read a panoptic json; no PNG is decoded.

    The PNGs lie in a folder of the json's name, beside it or, as in the layout of detectron2, one level above.
    Images without an entry are left out and counted in the log. Raises InputError naming the file, the field and the
    remedy.
    """
    record = read_json(annotations)
    for field in ("images", "annotations", "categories"):
        if not isinstance(record.get(field), list):
            raise InputError(
                f"{annotations}: the list '{field}' is missing; a panoptic json of COCO's format is needed"
            )
    places = [annotations.with_suffix(""), annotations.parent.parent / annotations.stem]
    maps = next((place for place in places if place.is_dir()), None)
    if maps is None:
        raise InputError(f"dataset '{name}': {places[0]}, the folder of the PNGs of {annotations.name}, does not "
                         "exist; unpack it there")  # fmt: skip
    try:
        vocabulary = read_vocabulary(name, annotations, record["categories"])
        is_thing = {c["id"]: c["isthing"] for c in record["categories"]}
        if not all(thing in (0, 1) for thing in is_thing.values()):
            raise ValueError("an isthing that is not 0 or 1")
        vocabulary = replace(vocabulary, is_thing=tuple(bool(is_thing[id]) for id in vocabulary.ids))
        index = read_index(name, annotations, record, vocabulary.index_of_id)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{annotations}: {what} in an entry; a panoptic json of COCO's format is needed") from None
    return Dataset(name, vocabulary, index, images, metric, "panoptic", maps=maps)


def read_index(name: str, path: Path, record: dict, label_of: dict[int, int]) -> Index:
    entries = {entry["image_id"]: entry for entry in record["annotations"]}
    images = [image for image in record["images"] if image["id"] in entries]
    if len(entries) < len(record["annotations"]) or len(images) != len({image["id"] for image in images}):
        raise InputError(f"{path}: an image comes twice in 'images' or 'annotations'; keep one")
    if len(images) < len(entries):
        unknown = min(entries.keys() - {image["id"] for image in images})
        raise InputError(f"{path}: an annotation has the unknown image_id {unknown}; list it in 'images' or remove it")
    if bare := len(record["images"]) - len(images):
        log.info("%s: %d images without segments_info are left out", path, bare)
    entries = [entries[image["id"]] for image in images]
    segments = [segment for entry in entries for segment in entry["segments_info"]]
    for entry in entries:
        ids = [segment["id"] for segment in entry["segments_info"]]
        if len(set(ids)) < len(ids) or not all(isinstance(id, int) and 0 < id < 1 << 24 for id in ids):
            raise InputError(f"{path}: image {entry['image_id']} has the segment ids {ids}; each is a number of its "
                             "own, from 1 to 16777215")  # fmt: skip
        for segment in entry["segments_info"]:
            if segment["category_id"] not in label_of:
                raise InputError(f"{path}: image {entry['image_id']} has the unknown category_id "
                                 f"{segment['category_id']}; list it in 'categories' or remove it")  # fmt: skip
    for segment in segments:
        if segment.get("iscrowd", 0) not in (0, 1) or not isinstance(segment.get("area", 0), int | float):
            raise ValueError("an iscrowd that is not 0 or 1, or an area that is no number")
    boxes = np.array([segment.get("bbox", (0, 0, 0, 0)) for segment in segments], dtype=np.float64)
    if segments and boxes.shape != (len(segments), 4):
        raise ValueError("a bbox that is not x, y, width, height")
    boxes = boxes.reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    # Index.build sorts by image, and these are sorted: segment_ids stay in step
    return Index.build(
        source=str(path),
        file_names=[image_name(name, path, image) for image in images],
        image_ids=[image["id"] for image in images],
        sizes=[(image.get("height", 0), image.get("width", 0)) for image in images],
        image_of=np.repeat(np.arange(len(images)), [len(entry["segments_info"]) for entry in entries]),
        boxes=boxes,
        labels=[label_of[segment["category_id"]] for segment in segments],
        areas=[segment.get("area", 0) for segment in segments],
        ignore=[segment.get("iscrowd", 0) for segment in segments],
        map_names=encoded(file_name(path, {"file_name": entry["file_name"]}) for entry in entries),
        segment_ids=np.array([segment["id"] for segment in segments], dtype=np.int64),
    )


def image_name(name: str, path: Path, image: dict) -> str:
    """The image's path below its folder. The file_name that Cityscapes' createPanopticImgs.py writes does not exist."""
    if name != "cityscapes-panoptic":
        return file_name(path, image)
    city, *_ = image["id"].split("_")
    return file_name(path, {"file_name": f"{city}/{image['id']}_leftImg8bit.png"})
