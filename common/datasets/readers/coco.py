"""Reader of COCO-format json files: COCO, LVIS, Objects365 and custom datasets."""

import logging
import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import file_name
from common.datasets.index import Index, JsonRows, Parts
from common.datasets.store import cached_index
from common.datasets.stream import read_fields
from common.errors import InputError
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")
CACHE_OPTIONS = ["coco"]
# Objects365 v2 lists these images but never published them.
# Source: open-mmlab/mmdetection:mmdet/datasets/objects365.py
NEVER_PUBLISHED = (
    b"patch16/objects365_v2_00908726.jpg",
    b"patch6/objects365_v1_00320532.jpg",
    b"patch6/objects365_v1_00320534.jpg",
)
# Lists that an image may have: two in LVIS, two in Detic's files
NEGATIVES, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"
IMAGE_LABELS, CAPTIONS = "pos_category_ids", "captions"


def read_coco(
    name: str, annotations: Path, images: Path, metric: str, only_masks: bool = False
) -> Dataset:
    """Reads a COCO, LVIS or Objects365 json.

    The classes are the file's categories, sorted by id. A dataset with a list in data/vocabularies
    takes the names from there, because Objects365 misspells some. Images without annotations may
    have `pos_category_ids` (image-level labels) and `captions`, as in Detic's files.

    only_masks: leave out boxes without a mask and log their number
    Raises InputError naming the file, the field and the remedy.
    """
    # Objects365 in the folders that its file names show, instead of in patch folders
    as_written = (images / "images").is_dir()
    options = list(CACHE_OPTIONS)
    if only_masks:
        options.append("only masks")
    if as_written:
        options.append("as written")
    read = partial(read_index, name, annotations, only_masks, as_written)
    frequency = None
    try:
        index, facts = cached_index(annotations, options, read)
        vocabulary = read_vocabulary(name, annotations, facts["categories"])
        if metric == "lvis":
            frequency = read_frequency(annotations, facts["categories"], vocabulary)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{annotations}: {what} in an entry; a COCO json is needed") from None
    if facts["left_out"]:
        log.info("%s: %d boxes without a mask are left out", annotations, facts["left_out"])
    if facts["some_masks"]:
        message = "%s: only %d of %d annotations have a segmentation, so none is used"
        log.warning(message, annotations, facts["some_masks"], len(index.labels))
    if facts["never_there"]:
        message = "%s: %d images that were never published are left out"
        log.info(message, annotations, facts["never_there"])
    if index.image_labels is not None:
        supervision = "image_labels"
    else:
        supervision = "boxes" if index.segmentations is None else "instances"
    return Dataset(name, vocabulary, index, images, metric, supervision, frequency=frequency)


def read_o365_instances(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Reads Objects365 with masks. Leaves out boxes without a mask and logs their number."""
    dataset = read_coco("o365", annotations, images, metric, only_masks=True)
    return replace(dataset, name=name, vocabulary=replace(dataset.vocabulary, dataset=name))


def read_index(
    name: str, path: Path, only_masks: bool, as_written: bool, blob: BinaryIO
) -> tuple[Index, dict]:
    """Returns the index and the facts that `cached_index` stores with it."""
    images, boxes = Images(path, as_written), Boxes(path, only_masks, blob)
    categories = []
    add = {"images": images.add, "annotations": boxes.add, "categories": categories.extend}
    found, broken = set(), False
    for field, value in read_fields(path):
        if field in add and isinstance(value, list):
            found.add(field)
            add[field](value)
        elif field == "annotations" and value:
            broken = True
    labelled = images.lists[IMAGE_LABELS] or images.lists[CAPTIONS]
    image_level = labelled and not boxes.count and not broken
    for field in add:
        if field not in found and not (image_level and field == "annotations"):
            raise InputError(f"{path}: the list '{field}' is missing; a COCO-format json is needed")
    vocabulary = read_vocabulary(name, path, categories)
    index = to_index(path, images, boxes, vocabulary)
    if image_level:
        index = replace(index, **read_image_labels(path, images, vocabulary))
    if index.segmentations is None:
        blob.truncate(0)
    file_names = index.file_names.tolist()
    unpublished = np.array([file.endswith(NEVER_PUBLISHED) for file in file_names], dtype=bool)
    if unpublished.any():
        index = index.select(~unpublished)
    keys = ("id", "name", "frequency")
    return index, {
        "categories": [{key: entry[key] for key in keys if key in entry} for entry in categories],
        "left_out": boxes.left_out,
        "never_there": int(unpublished.sum()),
        "some_masks": boxes.num_masks if boxes.num_masks < boxes.count else 0,
    }


class Images:
    """Collects the entries of the json list `images`. `add` takes the next chunk of them.

    as_written: as in `file_name`
    lists:      {key: {row: list}}, the keys NEGATIVES, NOT_EXHAUSTIVE, IMAGE_LABELS and CAPTIONS.
                A row is the position of an image in `images`. It is there only if its image has the
                key.
    """

    def __init__(self, path: Path, as_written: bool):
        self.path = path
        self.as_written = as_written
        self.ids, self.names = [], []
        self.sizes = [np.zeros((0, 2), np.int32)]  # (height, width), one array for each chunk
        self.lists = {NEGATIVES: {}, NOT_EXHAUSTIVE: {}, IMAGE_LABELS: {}, CAPTIONS: {}}

    def add(self, chunk: list[dict]) -> None:
        """Adds the next entries of the list."""
        for row, image in enumerate(chunk, len(self.ids)):
            for key, list_of_row in self.lists.items():
                if key in image:
                    list_of_row[row] = image[key]
        self.ids += [image["id"] for image in chunk]
        self.names += [file_name(self.path, image, self.as_written) for image in chunk]
        sizes = [(image.get("height", 0), image.get("width", 0)) for image in chunk]
        self.sizes.append(np.array(sizes, dtype=np.int32).reshape(-1, 2))

    def labels(self, key: str, vocabulary: Vocabulary) -> JsonRows | None:
        """Returns each image's list of category ids as labels, None if all lists are empty."""
        ids_of_row = [self.lists[key].get(row) or () for row in range(len(self.ids))]
        if not any(ids_of_row):
            return None
        return JsonRows.of([[vocabulary.index_of_id[id] for id in ids] for ids in ids_of_row])


class Boxes:
    """Collects the entries of the json list `annotations`, chunk by chunk. Writes masks to `blob`.

    index_of_image_id, index_of_category_id: dict, id -> 0, 1, 2, ... in the order in which the
        annotations mention the ids. The lists `images` and `categories` may come later in the file.
    """

    def __init__(self, path: Path, only_masks: bool, blob: BinaryIO):
        self.path = path
        self.only_masks = only_masks
        self.blob = blob
        self.index_of_image_id = defaultdict(count().__next__)
        self.index_of_category_id = defaultdict(count().__next__)
        self.count = self.left_out = self.num_masks = 0
        self.parts = Parts(
            image=np.int32,
            label=np.int32,
            box=(np.float32, 4),
            area=np.float32,
            ignore=bool,
            mask_length=np.int64,
        )

    def add(self, chunk: list[dict]) -> None:
        """Adds the next entries of the list. Raises InputError for a wrong box or iscrowd."""
        chunk = self.kept(chunk)
        self.count += len(chunk)
        if not chunk:
            return
        columns = {
            "image": [self.index_of_image_id[entry["image_id"]] for entry in chunk],
            "label": [self.index_of_category_id[entry["category_id"]] for entry in chunk],
            "box": self.read_boxes(chunk),
            "area": [e["area"] if "area" in e else e["bbox"][2] * e["bbox"][3] for e in chunk],
        }
        ignore = [entry.get("iscrowd", 0) for entry in chunk]
        if ignore.count(0) + ignore.count(1) < len(chunk):  # false and true count as 0 and 1
            wrong = next(row for row, value in enumerate(ignore) if value not in (0, 1))
            raise InputError(
                f"{self.path}: annotation {chunk[wrong].get('id')} has the iscrowd "
                f"{ignore[wrong]!r}; write the number 0 or 1"
            )
        self.num_masks += sum("segmentation" in entry for entry in chunk)
        if self.num_masks == self.count:  # each annotation so far has one
            masks = JsonRows.of([entry["segmentation"] for entry in chunk])
            self.blob.write(masks.text)
            columns["mask_length"] = masks.ends - masks.starts
        self.parts.add(ignore=ignore, **columns)

    def kept(self, chunk: list[dict]) -> list[dict]:
        """Returns the entries with a mask if `only_masks`, otherwise all. Counts the others."""
        if not self.only_masks:
            return chunk
        kept = [e for e in chunk if not isinstance(e, dict) or e.get("segmentation")]
        self.left_out += len(chunk) - len(kept)
        return kept

    def read_boxes(self, chunk: list[dict]) -> np.ndarray:
        """Returns (N, 4) xyxy. Raises InputError if a bbox is not four numbers."""
        values = [entry["bbox"] for entry in chunk]
        try:
            boxes = np.array(values)
        except ValueError:  # their lengths differ
            boxes = np.zeros(0)
        if boxes.shape != (len(chunk), 4) or boxes.dtype.kind not in "biuf":
            for entry, box in zip(chunk, values):
                if len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
                    raise InputError(
                        f"{self.path}: annotation {entry.get('id')} has the bbox {box}; four "
                        "numbers needed: x, y, width, height"
                    )
        boxes = boxes.astype(np.float64, copy=False)
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        return boxes

    def entry(self, position: int) -> dict:
        """Reads the annotation at `position` again, for an error message."""
        chunks = (chunk for field, chunk in read_fields(self.path) if field == "annotations")
        entries = (entry for chunk in chunks for entry in self.kept(chunk))
        return next(islice(entries, position, None))


def to_index(path: Path, images: Images, boxes: Boxes, vocabulary: Vocabulary) -> Index:
    """Returns the index. Raises InputError for a repeated image id, an unknown id or a bad area."""
    row_of_id = {id: row for row, id in enumerate(images.ids)}
    if len(row_of_id) < len(images.ids):
        raise InputError(f"{path}: two images share an id; give each its own")
    row_of = [row_of_id.get(id, -1) for id in boxes.index_of_image_id]
    label_of = [vocabulary.index_of_id.get(id, -1) for id in boxes.index_of_category_id]
    image_of = np.array(row_of, dtype=np.int64)[boxes.parts.take("image")]
    labels = np.array(label_of, dtype=np.int32)[boxes.parts.take("label")]
    for rows, field, listed_in in (
        (image_of, "image_id", "images"),
        (labels, "category_id", "categories"),
    ):
        unknown = rows < 0
        if unknown.any():
            entry = boxes.entry(int(np.argmax(unknown)))
            raise InputError(
                f"{path}: annotation {entry.get('id')} has the unknown {field} {entry[field]}; "
                f"list it in '{listed_in}' or remove the annotation ({unknown.sum()} in the file)"
            )
    areas = boxes.parts.take("area")
    bad = ~(np.isfinite(areas) & (areas >= 0))
    if bad.any():
        entry = boxes.entry(int(np.argmax(bad)))
        if "area" in entry:  # otherwise the box is wrong, which Index.build reports
            raise InputError(
                f"{path}: annotation {entry.get('id')} has the area {entry['area']}; write its "
                "square pixels or leave the field out"
            )
    segmentations = None
    if boxes.count and boxes.num_masks == boxes.count:
        lengths = boxes.parts.take("mask_length")
        ends = np.cumsum(lengths)
        segmentations = JsonRows(ends[:0], ends - lengths, ends)  # their text is in the blob
    return Index.build(
        source=str(path),
        file_names=images.names,
        image_ids=JsonRows.of(images.ids),
        sizes=np.concatenate(images.sizes),
        image_of=image_of,
        boxes=boxes.parts.take("box"),
        labels=labels,
        areas=areas,
        ignore=boxes.parts.take("ignore"),
        segmentations=segmentations,
        negatives=images.labels(NEGATIVES, vocabulary),
        not_exhaustive=images.labels(NOT_EXHAUSTIVE, vocabulary),
    )


def read_image_labels(path: Path, images: Images, vocabulary: Vocabulary) -> dict:
    """Returns the Index fields `image_labels`, `image_label_offsets` and `captions`."""
    labels, captions = [], []
    for row, image_id in enumerate(images.ids):
        ids = images.lists[IMAGE_LABELS].get(row) or ()
        texts = images.lists[CAPTIONS].get(row) or []
        for id in ids:
            if id not in vocabulary.index_of_id:
                raise InputError(
                    f"{path}: image {image_id} has the unknown id {id} in {IMAGE_LABELS}; list it "
                    "in 'categories' or remove it"
                )
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{path}: image {image_id} has captions that are no list of strings; mend them"
            )
        labels.append(sorted({vocabulary.index_of_id[id] for id in ids}))
        captions.append(tuple(texts))
    return {
        "image_labels": np.array([label for each in labels for label in each], dtype=np.int32),
        "image_label_offsets": np.cumsum([0, *map(len, labels)], dtype=np.int64),
        "captions": JsonRows.of(captions) if any(captions) else None,
    }


def read_vocabulary(name: str, path: Path, categories: list[dict]) -> Vocabulary:
    """Returns the classes of the list `categories`, sorted by id.

    A dataset with a list in data/vocabularies takes the names from there.
    Raises InputError if an id comes twice, a name is not text, or the ids or most of the names are
    not those of the list.
    """
    for category in categories:
        if not isinstance(category["name"], str | int | float):
            raise InputError(
                f"{path}: category {category['id']} has the name {category['name']!r}; write a text"
            )
    categories = sorted(categories, key=lambda category: category["id"])
    names = {category["id"]: str(category["name"]) for category in categories}
    if len(names) < len(categories):
        raise InputError(f"{path}: two categories share an id; give each its own")
    if not (DATA / "vocabularies" / f"{name}.json").is_file():
        return Vocabulary(name, tuple(names.values()), tuple(names))
    known = Vocabulary.known(name)
    listed = dict(zip(known.ids, known.names))
    remedy = "is it another dataset's file? then name it: --datasets my=ANN.json:IMAGES/"
    for id in names:
        if id not in listed:
            raise InputError(f"{path}: id {id} ('{names[id]}') is not one of '{name}'; {remedy}")
    other = [id for id in names if simplified(names[id]) != simplified(listed[id])]
    if len(other) > 0.5 * len(names):  # a few names are spelt differently
        id = other[0]
        raise InputError(
            f"{path}: category id {id} is '{names[id]}', but '{listed[id]}' in '{name}'; {remedy}"
        )
    return Vocabulary(name, tuple(listed[id] for id in names), tuple(names))


def simplified(name: str) -> str:
    """Returns the class name in lower case, without parentheses, spaces and punctuation."""
    return re.sub(r"\(.*?\)|[^a-z0-9]", "", name.lower())


def read_frequency(path: Path, categories: list[dict], vocabulary: Vocabulary) -> str:
    """Returns LVIS's frequency group of each class, r, c or f, as a string of C letters."""
    frequency_of = {category["id"]: category["frequency"] for category in categories}
    for id, group in frequency_of.items():
        if group not in ("r", "c", "f"):
            raise InputError(f"{path}: category {id} has the frequency {group!r}; write r, c or f")
    return "".join(frequency_of[id] for id in vocabulary.ids)
