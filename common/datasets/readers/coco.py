"""COCO-format json: COCO, LVIS, Objects365 and anyone's own file."""

import logging
import re
from collections import defaultdict
from dataclasses import replace
from itertools import chain, count, islice
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
OPTIONS = ["coco"]  # of the cache
NEVER_THERE = (  # of Objects365 v2. Source: open-mmlab/mmdetection:mmdet/datasets/objects365.py
    *(b"patch16/objects365_v2_00908726.jpg", b"patch6/objects365_v1_00320532.jpg"),
    b"patch6/objects365_v1_00320534.jpg",
)
PER_IMAGE = {"negatives": "neg_category_ids", "not_exhaustive": "not_exhaustive_category_ids"}
TAGS = ("pos_category_ids", "captions")


def read_coco(
    name: str, annotations: Path, images: Path, metric: str, only_masks: bool = False
) -> Dataset:
    """Read a COCO, LVIS or Objects365 json.

    Classes are the file's categories in the order of their ids; a dataset with a list in data/vocabularies takes its
    names from there (Objects365 publishes some misspelt). Without annotations, the `pos_category_ids` and `captions` of
    its images are read, as in Detic's files of tagged images. A large file is read once and kept as columns in the
    cache, see `cached_index`.
    only_masks: boxes without a mask are left out, with their count in the log
    Raises InputError naming the file, the field and the remedy.
    """

    as_written = (
        images / "images"
    ).is_dir()  # Objects365 in the tree that its file names show, not in patch folders

    def read(blob: BinaryIO) -> tuple[Index, dict]:
        return read_index(name, annotations, only_masks, as_written, blob)

    try:
        options = [*OPTIONS, *["only masks"] * only_masks, *["as written"] * as_written]
        index, facts = cached_index(annotations, options, read)
        categories = facts["categories"]
        vocabulary = read_vocabulary(name, annotations, categories)
        by_id = {c["id"]: c["frequency"] for c in categories} if metric == "lvis" else {}
        if odd := [id for id, frequency in by_id.items() if frequency not in ("r", "c", "f")]:
            raise InputError(
                f"{annotations}: category {odd[0]} has the frequency {by_id[odd[0]]!r}; write r, c or f"
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{annotations}: {what} in an entry; a COCO-format json is needed"
        ) from None
    if facts["left_out"]:
        log.info("%s: %d boxes without a mask are left out", annotations, facts["left_out"])
    if facts["some_masks"]:
        log.warning("%s: only %d of %d annotations have a segmentation, so none is used", annotations,
                    facts["some_masks"], len(index.labels))  # fmt: skip
    if facts["never_there"]:
        log.info(
            "%s: %d images that were never published are left out",
            annotations,
            facts["never_there"],
        )
    tagged = index.image_labels is not None
    supervision = (
        "image_labels" if tagged else "boxes" if index.segmentations is None else "instances"
    )
    frequency = "".join(by_id[id] for id in vocabulary.ids) if by_id else None
    return Dataset(name, vocabulary, index, images, metric, supervision, frequency=frequency)


def read_o365_instances(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Objects365's images with masks; boxes whose mask the raters skipped are left out, with their count in the log."""
    dataset = read_coco("o365", annotations, images, metric, only_masks=True)
    return replace(dataset, name=name, vocabulary=replace(dataset.vocabulary, dataset=name))


def read_index(
    name: str, path: Path, only_masks: bool, as_written: bool, blob: BinaryIO
) -> tuple[Index, dict]:
    """The index and the facts beside it, as `cached_index` wants them."""
    images = Images(path, as_written)
    boxes, categories = Boxes(path, images.number_of_id, only_masks, blob), []
    add = {"images": images.add, "annotations": boxes.add, "categories": categories.extend}
    found, broken = set(), False
    for field, value in read_fields(path):
        if field in add and isinstance(value, list):
            found.add(field)
            add[field](value)
        elif field == "annotations" and value:
            broken = True
    tagged = bool(images.tags) and not boxes.count and not broken
    for field in add:
        if field not in found and not (tagged and field == "annotations"):
            raise InputError(f"{path}: the list '{field}' is missing; a COCO-format json is needed")
    vocabulary = read_vocabulary(name, path, categories)
    index = to_index(path, images, boxes, vocabulary)
    if tagged:
        index = replace(
            index,
            **read_tags(path, [images.tags.get(i, {}) for i in range(len(index))], vocabulary),
        )
    if index.segmentations is None:
        blob.truncate(0)
    never_there = np.array(
        [name.endswith(NEVER_THERE) for name in index.file_names.tolist()], dtype=bool
    )
    if never_there.any():
        index = index.select(~never_there)
    kept = [{key: c[key] for key in ("id", "name", "frequency") if key in c} for c in categories]
    return index, {
        "categories": kept,
        "left_out": boxes.left_out,
        "never_there": int(never_there.sum()),
        "some_masks": boxes.num_masks * (not boxes.has_masks),
    }


class Images:
    """The list `images`, gathered run by run.

    number_of_id: numbers the ids as the annotations bring them
    tags:         of the images that have any, by row: their id and what labels them as a whole
    """

    def __init__(self, path: Path, as_written: bool):
        self.path, self.as_written, self.number_of_id = (
            path,
            as_written,
            defaultdict(count().__next__),
        )
        self.ids, self.names, self.sizes = [], [], [np.zeros((0, 2), np.int32)]
        self.known, self.tags = {field: {} for field in PER_IMAGE}, {}

    def add(self, run: list[dict]) -> None:
        for row, image in enumerate(run, len(self.ids)):
            for field, key in PER_IMAGE.items():
                if image.get(key):
                    self.known[field][row] = image[key]
            if not image.keys().isdisjoint(TAGS):
                self.tags[row] = {key: image[key] for key in ("id", *TAGS) if key in image}
        self.ids += [image["id"] for image in run]
        self.names += [file_name(self.path, image, self.as_written) for image in run]
        sizes = [(image.get("height", 0), image.get("width", 0)) for image in run]
        self.sizes.append(np.array(sizes, dtype=np.int32).reshape(-1, 2))


class Boxes:
    """The list `annotations`, gathered run by run; masks are written to `blob`. Images and classes have numbers yet."""

    def __init__(self, path: Path, number_of_image: dict, only_masks: bool, blob: BinaryIO):
        self.path, self.number_of_image, self.only_masks, self.blob = (
            path,
            number_of_image,
            only_masks,
            blob,
        )
        self.number_of_class = defaultdict(count().__next__)
        self.count, self.left_out, self.num_masks = 0, 0, 0
        self.parts = Parts(
            image=np.int32,
            label=np.int32,
            box=(np.float32, 4),
            area=np.float32,
            ignore=bool,
            mask_length=np.int64,
        )

    def add(self, run: list[dict]) -> None:
        run = self.kept(run)
        self.count += len(run)
        if not run:
            return
        columns = {
            "image": [self.number_of_image[entry["image_id"]] for entry in run],
            "label": [self.number_of_class[entry["category_id"]] for entry in run],
            "box": self.read_boxes(run),
            "area": [e["area"] if "area" in e else e["bbox"][2] * e["bbox"][3] for e in run],
            "ignore": [entry.get("iscrowd", 0) for entry in run],
        }
        if columns["ignore"].count(0) + columns["ignore"].count(1) < len(
            run
        ):  # true and false are among them
            entry = next(entry for entry in run if entry.get("iscrowd", 0) not in (0, 1))
            raise InputError(f"{self.path}: annotation {entry.get('id')} has the iscrowd {entry['iscrowd']!r}; write "
                             "the number 0 or 1")  # fmt: skip
        self.num_masks += sum("segmentation" in entry for entry in run)
        if self.has_masks:
            masks = JsonRows.of([entry["segmentation"] for entry in run])
            self.blob.write(masks.text)
            columns["mask_length"] = masks.ends - masks.starts
        self.parts.add(**columns)

    @property
    def has_masks(self) -> bool:
        """Whether each annotation so far has one."""
        return self.num_masks == self.count

    def kept(self, run: list[dict]) -> list[dict]:
        if not self.only_masks:
            return run
        kept = [entry for entry in run if not isinstance(entry, dict) or entry.get("segmentation")]
        self.left_out += len(run) - len(kept)
        return kept

    def read_boxes(self, run: list[dict]) -> np.ndarray:
        """(N, 4) xyxy. Raises InputError for what is not four numbers."""
        values = [entry["bbox"] for entry in run]
        try:
            boxes = np.array(values)
        except ValueError:  # of different lengths
            boxes = np.zeros(0)
        if boxes.shape != (len(run), 4) or boxes.dtype.kind not in "biuf":
            for entry in run:
                if len(entry["bbox"]) != 4 or not all(
                    isinstance(x, (int, float)) for x in entry["bbox"]
                ):
                    raise InputError(f"{self.path}: annotation {entry.get('id')} has the bbox {entry['bbox']}; four "
                                     "numbers needed: x, y, width, height")  # fmt: skip
        boxes = np.array(values, dtype=np.float64) if boxes.dtype != np.float64 else boxes
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    def entry(self, position: int) -> dict:
        """Read again, for a message."""
        runs = (run for field, run in read_fields(self.path) if field == "annotations")
        return next(islice(chain.from_iterable(map(self.kept, runs)), position, None))


def to_index(path: Path, images: Images, boxes: Boxes, vocabulary: Vocabulary) -> Index:
    numbers = [images.number_of_id[id] for id in images.ids]  # those without a box get theirs here
    row_of = np.full(len(images.number_of_id), -1)
    row_of[numbers] = np.arange(len(numbers))
    if (row_of >= 0).sum() < len(images.ids):
        raise InputError(f"{path}: two images share an id; give each its own")
    label_of = np.array(
        [vocabulary.index_of_id.get(id, -1) for id in boxes.number_of_class], dtype=np.int32
    )
    image_of, labels = row_of[boxes.parts.take("image")], label_of[boxes.parts.take("label")]
    for rows, field, place in (
        (image_of, "image_id", "images"),
        (labels, "category_id", "categories"),
    ):
        if (rows < 0).any():
            entry = boxes.entry(int(np.argmax(rows < 0)))
            raise InputError(f"{path}: annotation {entry.get('id')} has the unknown {field} {entry[field]}; list it in "
                             f"'{place}' or remove the annotation ({(rows < 0).sum()} such in the file)")  # fmt: skip
    areas = boxes.parts.take("area")
    odd = ~(np.isfinite(areas) & (areas >= 0))
    if odd.any() and "area" in (
        entry := boxes.entry(int(np.argmax(odd)))
    ):  # else its box is what is wrong
        raise InputError(f"{path}: annotation {entry.get('id')} has the area {entry['area']}; write its square pixels "
                         "or leave the field out")  # fmt: skip
    lengths = boxes.parts.take("mask_length")
    ends = np.cumsum(lengths)
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
        segmentations=JsonRows(ends[:0], ends - lengths, ends)
        if boxes.has_masks and boxes.count
        else None,
        **{
            field: JsonRows.of(
                [
                    [vocabulary.index_of_id[id] for id in known.get(row, ())]
                    for row in range(len(numbers))
                ]
            )
            for field, known in images.known.items()
            if known
        },
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
            raise InputError(
                f"{path}: image {image['id']} has captions that are no list of strings; mend them"
            )
        labels.append(sorted({vocabulary.index_of_id[id] for id in ids}))
        captions.append(tuple(texts))
    return {
        "image_labels": np.array([label for each in labels for label in each], dtype=np.int32),
        "image_label_offsets": np.cumsum([0, *map(len, labels)], dtype=np.int64),
        "captions": JsonRows.of(captions) if any(captions) else None,
    }


def read_vocabulary(name: str, path: Path, categories: list[dict]) -> Vocabulary:
    if odd := next((c for c in categories if not isinstance(c["name"], str | int | float)), None):
        raise InputError(f"{path}: category {odd['id']} has the name {odd['name']!r}; write a text")
    names = {c["id"]: str(c["name"]) for c in sorted(categories, key=lambda c: c["id"])}
    if len(names) < len(categories):
        raise InputError(f"{path}: two categories share an id; give each its own")
    if (DATA / "vocabularies" / f"{name}.json").is_file():
        known = Vocabulary.known(name)
        for id, given in names.items():
            if id not in known.index_of_id:
                raise InputError(f"{path}: category id {id} ('{given}') is not one of '{name}'; is it another "
                                 "dataset's file? then name it: --datasets my=ANN.json:IMAGES/")  # fmt: skip
        listed = {id: known.names[known.index_of_id[id]] for id in names}
        other = [id for id in names if simple(names[id]) != simple(listed[id])]
        if len(other) > 0.5 * len(names):  # some are spelt otherwise
            raise InputError(
                f"{path}: category id {other[0]} is '{names[other[0]]}', but '{listed[other[0]]}' in "
                f"'{name}'; is it another dataset's file? then name it: --datasets my=ANN.json:IMAGES/"
            )
        names = listed
    return Vocabulary(name, tuple(names.values()), tuple(names))


def simple(name: str) -> str:
    """Without what spellings of a class name differ in."""
    return re.sub(r"\(.*?\)|[^a-z0-9]", "", name.lower())
