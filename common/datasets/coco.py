"""COCO-format json: COCO, LVIS, Objects365 and anyone's own file."""

import logging
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import orjson

from common.datasets.base import Dataset
from common.datasets.index import Index
from common.errors import InputError
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")


def read_coco(name: str, annotations: Path, images: Path, metric: str, record: dict | None = None) -> Dataset:
    """Read a COCO, LVIS or Objects365 json, or the `record` that was read from it.

    Classes are the file's categories in the order of their ids; a dataset with a list in data/vocabularies takes its
    names from there (Objects365 publishes some misspelt). Without annotations, the `pos_category_ids` and `captions` of
    its images are read, as in Detic's files of tagged images. Raises InputError naming the file, the field and the
    remedy.
    """
    record = record or read_json(annotations)
    tagged = is_tagged(record)
    if tagged:
        record["annotations"] = []
    for field in ("images", "annotations", "categories"):
        if not isinstance(record.get(field), list):
            raise InputError(f"{annotations}: the list '{field}' is missing; a COCO-format json is needed")
    try:
        vocabulary = read_vocabulary(name, annotations, record["categories"])
        index = read_index(annotations, record, vocabulary)
        if tagged:
            index = replace(index, **read_tags(annotations, record["images"], vocabulary))
        by_id = {c["id"]: str(c["frequency"]) for c in record["categories"]} if metric == "lvis" else {}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{annotations}: {what} in an entry; a COCO-format json is needed") from None
    supervision = "image_labels" if tagged else "boxes" if index.segmentations is None else "instances"
    frequency = "".join(by_id[id] for id in vocabulary.ids) if by_id else None
    return Dataset(name, vocabulary, index, images, metric, supervision, frequency=frequency)


def read_o365_instances(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Objects365's images with masks; boxes whose mask the raters skipped are left out, with their count in the log."""
    record = read_json(annotations)
    if isinstance(boxes := record.get("annotations"), list):
        record["annotations"] = [box for box in boxes if not isinstance(box, dict) or box.get("segmentation")]
        log.info("%s: %d boxes without a mask are left out", annotations, len(boxes) - len(record["annotations"]))
    dataset = read_coco("o365", annotations, images, metric, record)
    return replace(dataset, name=name, vocabulary=replace(dataset.vocabulary, dataset=name))


def read_json(path: Path) -> dict:
    try:
        record = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path} is not valid json ({error}); was it cut off, or does it hold NaN? mend it, copy or "
                         "download it again") from None  # fmt: skip
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a json {type(record).__name__}; a COCO-format json object is needed")
    return record


def is_tagged(record: dict) -> bool:
    """Whether the file labels whole images: no annotations, but classes or captions of its images."""
    images = record.get("images")
    return (
        not record.get("annotations")
        and isinstance(images, list)
        and any(isinstance(image, dict) and image.keys() & {"pos_category_ids", "captions"} for image in images)
    )


def read_tags(path: Path, images: list[dict], vocabulary: Vocabulary) -> dict:
    """The fields `image_labels`, `image_label_offsets` and `captions` of an Index."""
    labels, captions = [], []
    for image in images:
        ids, texts = image.get("pos_category_ids") or (), image.get("captions") or []
        for id in ids:
            if id not in vocabulary.index_of_id:
                raise InputError(f"{path}: image {image['id']} has the unknown id {id} in pos_category_ids; "
                                 "list it in 'categories' or remove it")  # fmt: skip
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: image {image['id']} has captions that are no list of strings; mend them")
        labels.append(sorted({vocabulary.index_of_id[id] for id in ids}))
        captions.append(tuple(texts))
    return {
        "image_labels": np.array([label for each in labels for label in each], dtype=np.int32),
        "image_label_offsets": np.cumsum([0, *map(len, labels)], dtype=np.int64),
        "captions": captions if any(captions) else None,
    }


def read_vocabulary(name: str, path: Path, categories: list[dict]) -> Vocabulary:
    names = {c["id"]: str(c["name"]) for c in sorted(categories, key=lambda c: c["id"])}
    if len(names) < len(categories):
        raise InputError(f"{path}: two categories share an id; give each its own")
    if (DATA / "vocabularies" / f"{name}.json").is_file():
        known = Vocabulary.known(name)
        for id, given in names.items():
            if id not in known.index_of_id:
                raise InputError(f"{path}: category id {id} ('{given}') is not one of '{name}'; is it another "
                                 "dataset's file? then name it: --datasets my=ANN.json:IMAGES/")  # fmt: skip
        names = {id: known.names[known.index_of_id[id]] for id in names}
    return Vocabulary(name, tuple(names.values()), tuple(names))


def read_index(path: Path, record: dict, vocabulary: Vocabulary) -> Index:
    images = record["images"]
    row_of = {image["id"]: row for row, image in enumerate(images)}
    if len(row_of) < len(images):
        raise InputError(f"{path}: two images share an id; give each its own")
    entries = record["annotations"]
    for entry in entries:
        if entry["image_id"] not in row_of:
            raise InputError(f"{path}: annotation {entry.get('id')} has the unknown image_id {entry['image_id']}; "
                             "list it in 'images' or remove the annotation")  # fmt: skip
        if entry["category_id"] not in vocabulary.index_of_id:
            raise InputError(f"{path}: annotation {entry.get('id')} has the unknown category_id "
                             f"{entry['category_id']}; list it in 'categories' or remove the annotation")  # fmt: skip
        if len(entry["bbox"]) != 4 or not all(isinstance(x, (int, float)) for x in entry["bbox"]):
            raise InputError(f"{path}: annotation {entry.get('id')} has the bbox {entry['bbox']}; four numbers needed: "
                             "x, y, width, height")  # fmt: skip
        if entry.get("iscrowd", 0) not in (0, 1):  # true and false are among them
            raise InputError(f"{path}: annotation {entry.get('id')} has the iscrowd {entry['iscrowd']!r}; write the "
                             "number 0 or 1")  # fmt: skip
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    per_image = {"neg_category_ids": {}, "not_exhaustive_category_ids": {}}
    for field, found in per_image.items():
        for row, image in enumerate(images):
            if image.get(field):
                found[row] = [vocabulary.index_of_id[id] for id in image[field]]
    return Index.build(
        source=str(path),
        file_names=[file_name(path, image) for image in images],
        image_ids=[image["id"] for image in images],
        sizes=[(image.get("height", 0), image.get("width", 0)) for image in images],
        image_of=[row_of[entry["image_id"]] for entry in entries],
        boxes=boxes,
        labels=[vocabulary.index_of_id[entry["category_id"]] for entry in entries],
        areas=[entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in entries],
        ignore=[entry.get("iscrowd", 0) for entry in entries],
        segmentations=[e["segmentation"] for e in entries]
        if entries and all("segmentation" in e for e in entries)
        else None,
        negatives=per_image["neg_category_ids"],
        not_exhaustive=per_image["not_exhaustive_category_ids"],
    )


def file_name(path: Path, image: dict) -> str:
    """The image's path below its folder: LVIS gives `coco_url`, Objects365 images/v2/patch3/x.jpg for patch3/x.jpg.

    Raises InputError for a name that leaves the image folder.
    """
    name = str(image["file_name"] if "file_name" in image else image["coco_url"])
    if "file_name" not in image or name.startswith(("images/v1/", "images/v2/")):
        name = "/".join(name.split("/")[-2:])
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InputError(f"{path}: file_name '{name}' leaves the image folder; give a path below it")
    return name
