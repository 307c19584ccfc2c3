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
from common.datasets.ids import find_ids, other_type
from common.datasets.index import Index, JsonRows, Parts
from common.datasets.readers.coco_faults import (
    FAULT,
    add_entries,
    annotation_fault,
    faulty_entries,
    first_fault,
    is_id,
    is_id_list,
    log_facts,
    refuse_faulty,
    unknown_id,
)
from common.datasets.store import cached_index
from common.datasets.stream import read_fields
from common.datasets.tools import name_tool
from common.errors import InputError
from common.labels import DATA, Vocabulary
from common.masks import mask_of

log = logging.getLogger("concord")
CACHE_OPTIONS = ["coco"]
# Objects365 v2 lists these images but never published them.
# Source: open-mmlab/mmdetection:mmdet/datasets/objects365.py
NEVER_PUBLISHED = (
    b"patch16/objects365_v2_00908726.jpg",
    b"patch6/objects365_v1_00320532.jpg",
    b"patch6/objects365_v1_00320534.jpg",
)
# The fields of an annotation that hold ids of another list, by the column that holds their rows
LISTED_IN = {"image": ("image_id", "images"), "label": ("category_id", "categories")}
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
        what = next(
            faulty_entries(annotations, FAULT), f"{what} in an entry; a COCO json is needed"
        )
        raise InputError(f"{annotations}: {what}") from None
    log_facts(annotations, facts, len(index.labels))
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
            add_entries(path, FAULT[field], value, add[field])
        elif field == "annotations" and value:
            broken = True
    labelled = images.lists[IMAGE_LABELS] or images.lists[CAPTIONS]
    image_level = labelled and not boxes.count and not broken
    for field in add:
        if field not in found and not (image_level and field == "annotations"):
            if told := name_tool(path):
                raise InputError(f"{path} {told}")
            raise InputError(f"{path}: the list '{field}' is missing; a COCO-format json is needed")
    used = set(boxes.index_of_category_id) | images.used_categories()
    categories, roots = without_root(path, categories, used)
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
        "retyped": boxes.retyped,
        "roots": roots,
        "left_out": boxes.left_out,
        "never_there": int(unpublished.sum()),
        "of_size_0": images.of_size_0,
        "some_masks": boxes.num_masks if boxes.num_masks < boxes.count else 0,
        "marked": boxes.num_marked,
    }


def without_root(path: Path, categories: list[dict], used: set) -> tuple[list[dict], list[str]]:
    """Takes out the category that Roboflow's exports have above all others.

    It has the supercategory "none" and no annotation, and is the supercategory of others or the
    only one with the id 0 and that supercategory. Returns the rest, and the names of those left
    out. used: the ids in annotations
    """
    refuse_faulty(path, categories)
    tops = [category for category in categories if category.get("supercategory") == "none"]
    above = {str(category.get("supercategory")) for category in categories}
    roots = []
    for category in tops:
        is_above = str(category["name"]) in above
        alone = category["id"] in (0, "0") and len(tops) == 1 < len(categories)
        is_used = category["id"] in used or other_type(category["id"]) in used
        if (is_above or alone) and not is_used:
            roots.append(category)
    rest = [category for category in categories if category not in roots]
    return rest, [category["name"] for category in roots]


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
        self.of_size_0 = 0  # images that have such a height or width in the file
        self.sizes = [np.zeros((0, 2), np.int32)]  # (height, width), one array for each chunk
        self.lists = {NEGATIVES: {}, NOT_EXHAUSTIVE: {}, IMAGE_LABELS: {}, CAPTIONS: {}}

    def add(self, chunk: list[dict]) -> None:
        """Adds the next entries of the list."""
        for row, image in enumerate(chunk, len(self.ids)):
            for key, list_of_row in self.lists.items():
                if key not in image:
                    continue
                if key != CAPTIONS and not is_id_list(image[key]):
                    raise ValueError(f"{key} that are no list of ids")
                list_of_row[row] = image[key]
        ids = [image["id"] for image in chunk]
        if not set(map(type, ids)) <= {int, str} and not all(map(is_id, ids)):
            raise ValueError("an image without an id")
        self.ids += ids
        self.names += [file_name(self.path, image, self.as_written, True) for image in chunk]
        sizes = [(image.get("height", 0), image.get("width", 0)) for image in chunk]
        self.sizes.append(np.array(sizes, dtype=np.int32).reshape(-1, 2))
        for row in np.flatnonzero((self.sizes[-1] == 0).any(1)):
            self.of_size_0 += "height" in chunk[row] or "width" in chunk[row]

    def labels(self, key: str, vocabulary: Vocabulary) -> JsonRows | None:
        """Returns each image's list of category ids as labels, None if all lists are empty."""
        ids_of_row = [self.lists[key].get(row) or () for row in range(len(self.ids))]
        if not any(ids_of_row):
            return None
        return JsonRows.of(
            [self.known_labels(row, key, vocabulary) for row in range(len(self.ids))]
        )

    def known_labels(self, row: int, key: str, vocabulary: Vocabulary) -> list[int]:
        """Returns the list `key` of image `row` as labels. Raises InputError for an unknown id."""
        ids = self.lists[key].get(row) or ()
        known = vocabulary.index_of_id
        if all(id in known for id in ids):  # millions of images have such a list
            return [known[id] for id in ids]
        rows, _ = find_ids(ids, known)
        for id, label in zip(ids, rows):
            if label < 0:
                raise InputError(
                    f"{self.path}: image {self.ids[row]!r} has the unknown id {id!r} in {key}; "
                    "list it in 'categories' or remove it"
                )
        return rows.tolist()

    def used_categories(self) -> set:
        """Returns the category ids in the lists of image-level labels and of absent classes."""
        keys = (NEGATIVES, NOT_EXHAUSTIVE, IMAGE_LABELS)
        return {id for key in keys for ids in self.lists[key].values() for id in ids or ()}


class Boxes:
    """Collects the entries of the json list `annotations`, chunk by chunk. Writes masks to `blob`.

    index_of_image_id, index_of_category_id: dict, id -> 0, 1, 2, ... in the order in which the
        annotations mention the ids. The lists `images` and `categories` may come later in the file.
    num_marked: annotations with ignore: 1, as other trainings leave them out
    retyped: {field: annotations whose id is listed as a text instead of a number, or vice versa}
    """

    def __init__(self, path: Path, only_masks: bool, blob: BinaryIO):
        self.path = path
        self.only_masks = only_masks
        self.blob = blob
        self.index_of_image_id = defaultdict(count().__next__)
        self.index_of_category_id = defaultdict(count().__next__)
        self.count = self.left_out = self.num_masks = self.num_marked = 0
        self.retyped = {}
        self.parts = Parts(
            image=np.int32,
            label=np.int32,
            box=(np.float32, 4),
            area=np.float32,
            ignore=bool,
            mask_length=np.int64,
        )

    def add(self, chunk: list[dict]) -> None:
        """Adds the next entries of the list. Raises ValueError or the like for a wrong one."""
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
        crowds = [entry.get("iscrowd", 0) for entry in chunk]
        if crowds.count(0) + crowds.count(1) < len(chunk):  # false and true count as 0 and 1
            raise ValueError("an iscrowd that is not 0 or 1")
        marked = [entry.get("ignore") in (1, "1") for entry in chunk]
        ignore = [bool(crowd or mark) for crowd, mark in zip(crowds, marked)]
        self.num_marked += sum(ignore) - crowds.count(1)
        lengths = np.zeros(len(chunk), np.int64)
        masks = [mask_of(entry) for entry in chunk]
        if any(masks):
            rows = JsonRows.of(masks)
            self.blob.write(rows.text)
            self.num_masks += int(rows.filled.sum())
            lengths = rows.ends - rows.starts
        self.parts.add(ignore=ignore, mask_length=lengths, **columns)

    def kept(self, chunk: list[dict]) -> list[dict]:
        """Returns the entries with a mask if `only_masks`, otherwise all. Counts the others."""
        if not self.only_masks:
            return chunk
        kept = [e for e in chunk if not isinstance(e, dict) or mask_of(e) is not None]
        self.left_out += len(chunk) - len(kept)
        return kept

    def read_boxes(self, chunk: list[dict]) -> np.ndarray:
        """Returns (N, 4) xyxy. Raises ValueError if a bbox is not four numbers."""
        values = [entry["bbox"] for entry in chunk]
        try:
            boxes = np.array(values)
        except ValueError:  # their lengths differ
            boxes = np.zeros(0)
        odd = boxes.shape != (len(chunk), 4) or boxes.dtype.kind not in "biuf"
        if odd and first_fault(annotation_fault, chunk):
            raise ValueError("a bbox that is not four numbers")
        boxes = boxes.astype(np.float64, copy=False)
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        return boxes

    def rows(self, column: str, index_of_id: dict, listed: dict) -> np.ndarray:
        """Returns (A,) the rows in `listed`, {id: row}, of the ids in a column.

        Counts in `retyped` those that are listed as another type. Raises InputError for an id that
        is not listed.
        """
        field, listed_in = LISTED_IN[column]
        rows_of, retyped = find_ids(index_of_id, listed)
        positions = self.parts.take(column)
        rows = rows_of[positions]
        if count := int(retyped[positions].sum()):
            self.retyped[field] = count
        unknown = rows < 0
        if unknown.any():
            entry = self.entry(int(np.argmax(unknown)))
            who = f"{self.path}: annotation {entry.get('id')!r}"
            line = unknown_id(who, field, entry[field], listed_in)
            raise InputError(f"{line} ({unknown.sum()} in the file)")
        return rows

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
    image_of = boxes.rows("image", boxes.index_of_image_id, row_of_id)
    labels = boxes.rows("label", boxes.index_of_category_id, vocabulary.index_of_id)
    areas = boxes.parts.take("area")
    bad = ~(np.isfinite(areas) & (areas >= 0))
    if bad.any():
        entry = boxes.entry(int(np.argmax(bad)))
        if "area" in entry:  # otherwise the box is wrong, which Index.build reports
            raise InputError(
                f"{path}: annotation {entry.get('id')!r} has the area {entry['area']}; write its "
                "square pixels or leave the field out"
            )
    segmentations = None
    if boxes.num_masks:
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
        labels=labels.astype(np.int32),
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
        known = images.known_labels(row, IMAGE_LABELS, vocabulary)
        texts = images.lists[CAPTIONS].get(row) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{path}: image {image_id} has captions that are no list of strings; mend them"
            )
        labels.append(sorted(set(known)))
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
    refuse_faulty(path, categories)
    kinds = {isinstance(category["id"], str): category["id"] for category in categories}
    if len(kinds) > 1:
        raise InputError(
            f"{path}: the ids of 'categories' are texts and numbers, such as {kinds[True]!r} and "
            f"{kinds[False]!r}; write all as numbers or all as texts"
        )
    categories = sorted(categories, key=lambda category: category["id"])
    names = {category["id"]: str(category["name"]) for category in categories}
    if len(names) < len(categories):
        raise InputError(f"{path}: two categories share an id; give each its own")
    if not (DATA / "vocabularies" / f"{name}.json").is_file():
        return Vocabulary(name, tuple(names.values()), tuple(names), source=str(path))
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
