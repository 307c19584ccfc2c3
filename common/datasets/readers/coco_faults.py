"""What is wrong with single entries of a COCO json, in words that name the entry and the field."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from common.datasets.ids import find_ids
from common.datasets.stream import read_fields
from common.errors import InputError

log = logging.getLogger("concord")
NUMBERS = (int, float)
AN_ID = "a number below 2^63 or a text"
# Lists of category ids that an image may have: two in LVIS, one in Detic's files
ID_LISTS = ("neg_category_ids", "not_exhaustive_category_ids", "pos_category_ids")

COUNTED = {  # the facts that are logged if they are not 0
    "left_out": "boxes without a mask are left out",
    "marked": "boxes have ignore: 1; as crowds, they are not trained on",
    "never_there": "images that were never published are left out",
}


def log_facts(path: Path, facts: dict, boxes: int) -> None:
    """Logs what a reader of a COCO json has left out or taken in another way.

    facts: as `read_index` returns them; boxes: the number of boxes
    """
    log_retyped(path, facts["retyped"])
    if facts["of_size_0"]:
        message = "%s: %d images have the height or width 0, which is taken as unknown"
        log.warning(message, path, facts["of_size_0"])
    for root in facts["roots"]:
        message = (
            "%s: the category '%s' is left out: it has no annotation and stands for all others"
        )
        log.info(message, path, root)
    if facts["some_masks"]:
        message = "%s: %d of %d boxes have a mask; the others are trained on as boxes"
        log.warning(message, path, facts["some_masks"], boxes)
    for fact, what in COUNTED.items():
        if facts[fact]:
            log.info("%s: %d %s", path, facts[fact], what)


def log_retyped(path: Path, retyped: dict[str, int]) -> None:
    """Logs how many ids of each field are listed as another type."""
    for field, times in retyped.items():
        message = "%s: %d times the %s is a text where it is listed as a number, or the reverse; "
        log.info(message + "both are taken as one id", path, times, field)


def is_id(value: object) -> bool:
    """Returns whether a value can be an id. Whole numbers of more than 64 bits are read inexactly.

    They come as floats, and several may become one.
    """
    return isinstance(value, (int, str)) or (isinstance(value, float) and abs(value) < 2**63)


def is_id_list(value: object) -> bool:
    """Returns whether a field of an image is a list of ids; null counts as an empty one."""
    is_list = isinstance(value, list | None)
    return is_list and all(is_id(id) for id in value or ())


def image_fault(entry: object) -> str:
    """Returns what is wrong with an element of 'images'; "" for nothing."""
    if not isinstance(entry, dict):
        return f"an element of 'images' is {entry!r:.60}; an object with id and file_name is needed"
    name = entry.get("file_name", entry.get("coco_url"))
    if not is_id(entry.get("id")):
        return f"image {name!r} has {_value(entry, 'id')}; give each image {AN_ID}"
    if not isinstance(name, str):
        field = "coco_url" if "coco_url" in entry else "file_name"
        return f"image {entry['id']!r} has {_value(entry, field)}; write its path below the folder"
    for field in ("height", "width"):
        value = entry.get(field, 0)
        try:
            valid = 0 <= int(value) < 1 << 31
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            return (
                f"image {entry['id']!r} has {_value(entry, field)}; write its pixels or leave the "
                "field out"
            )
    for field in ID_LISTS:
        if not is_id_list(entry.get(field)):
            return f"image {entry['id']!r} has {_value(entry, field)}; a list of ids is needed"
    return ""


def annotation_fault(entry: object) -> str:
    """Returns what is wrong with an element of 'annotations'; "" for nothing."""
    if not isinstance(entry, dict):
        return f"an element of 'annotations' is {entry!r:.60}; an object is needed"
    start = f"annotation {entry.get('id')!r} has"
    for field, listed_in in (("image_id", "images"), ("category_id", "categories")):
        if not is_id(entry.get(field)):
            return f"{start} {_value(entry, field)}; write one of the ids in '{listed_in}'"
    box = entry.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(value, NUMBERS) for value in box):
        return f"{start} {_value(entry, 'bbox')}; four numbers needed: x, y, width, height"
    if box[2] < 0 or box[3] < 0:
        return f"{start} {_value(entry, 'bbox')}; its width or height is negative"
    area = entry.get("area", 0)
    if not isinstance(area, NUMBERS) or not 0 <= area < 1e38:
        return f"{start} {_value(entry, 'area')}; write its square pixels or leave the field out"
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"{start} {_value(entry, 'iscrowd')}; write the number 0 or 1"
    return ""


def category_fault(entry: object) -> str:
    """Returns what is wrong with an element of 'categories'; "" for nothing."""
    if not isinstance(entry, dict):
        return f"an element of 'categories' is {entry!r:.60}; an object with id and name is needed"
    if not is_id(entry.get("id")):
        return f"category {entry.get('name')!r} has {_value(entry, 'id')}; write {AN_ID}"
    if not is_id(entry.get("name")):
        return f"category {entry['id']!r} has {_value(entry, 'name')}; write a text"
    return ""


def thing_fault(entry: object) -> str:
    """Returns what is wrong with an element of a panoptic json's 'categories'; "" for nothing."""
    fault = category_fault(entry)
    if not fault and entry.get("isthing") not in (0, 1):
        return f"category {entry['id']!r} has {_value(entry, 'isthing')}; write the number 0 or 1"
    return fault


def segments_fault(entry: object) -> str:
    """Returns what is wrong with an element of a panoptic json's 'annotations'; "" for nothing."""
    if not isinstance(entry, dict):
        return f"an element of 'annotations' is {entry!r:.60}; an object is needed"
    if not is_id(entry.get("image_id")):
        return (
            f"an element of 'annotations' has {_value(entry, 'image_id')}; write that of an image"
        )
    start = f"image {entry['image_id']!r} has"
    if not isinstance(entry.get("file_name"), str):
        return f"{start} {_value(entry, 'file_name')} in 'annotations'; name its PNG"
    segments = entry.get("segments_info")
    if not isinstance(segments, list):
        return f"{start} {_value(entry, 'segments_info')}; a list of segments is needed"
    for segment in segments:
        if not isinstance(segment, dict) or not isinstance(segment.get("id"), int):
            return f"{start} the segment {segment!r:.60}; an object with a number as id is needed"
        fault = annotation_fault({"image_id": 0, "bbox": [0, 0, 0, 0]} | segment)
        if fault:
            return f"image {entry['image_id']!r}: {fault.replace('annotation', 'segment', 1)}"
    return ""


FAULT = {"images": image_fault, "annotations": annotation_fault, "categories": category_fault}
PANOPTIC_FAULT = FAULT | {"annotations": segments_fault, "categories": thing_fault}


def add_entries(
    path: Path, fault_of: Callable[[object], str], entries: list, add: Callable[[list], None]
) -> None:
    """Calls `add` with elements of a list in a json file.

    fault_of: returns what is wrong with an element, "" for nothing
    Raises InputError that names the first faulty one, if `add` fails for its sake.
    """
    try:
        add(entries)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        fault = first_fault(fault_of, entries)
        if not fault:
            raise
        raise InputError(f"{path}: {fault}") from None


def first_fault(fault_of: Callable[[object], str], entries: list) -> str:
    """Returns what is wrong with the first faulty element of a list; "" for nothing."""
    return next(filter(None, map(fault_of, entries)), "")


def refuse_faulty(path: Path, categories: list) -> None:
    """Raises InputError that names the first category without an id or a name."""
    if fault := first_fault(category_fault, categories):
        raise InputError(f"{path}: {fault}")


def faulty_entries(path: Path, fault_of: dict[str, Callable[[object], str]]) -> Iterator[str]:
    """Yields what is wrong with each faulty entry of a json file. fault_of: FAULT or the like."""
    for field, entries in _runs(path):
        yield from filter(None, map(fault_of[field], entries))


def list_faults(path: Path) -> Iterator[str]:
    """Yields what is wrong with each faulty entry of a json file, unknown ids too.

    Raises InputError if the file is not json.
    """
    listed = {"images": {}, "categories": {}}
    for field, entries in _runs(path):
        for entry in entries:
            if fault := FAULT[field](entry):
                yield fault
            has_id = isinstance(entry, dict) and is_id(entry.get("id"))
            if field in listed and has_id:
                listed[field].setdefault(entry["id"], len(listed[field]))
    for field, entries in _runs(path):
        if field != "annotations":
            continue
        for entry in entries:
            if not annotation_fault(entry):
                yield from _unknown_ids(entry, listed)


def _runs(path: Path) -> Iterator[tuple[str, list]]:
    """Yields the runs of the lists that FAULT knows."""
    for field, entries in read_fields(path):
        if field in FAULT and isinstance(entries, list):
            yield field, entries


def _unknown_ids(entry: dict, listed: dict[str, dict]) -> Iterator[str]:
    """Yields a line for each id of an annotation that is not listed."""
    for field, listed_in in (("image_id", "images"), ("category_id", "categories")):
        rows, _ = find_ids([entry[field]], listed[listed_in])
        if rows[0] < 0:
            yield unknown_id(f"annotation {entry.get('id')!r}", field, entry[field], listed_in)


def unknown_id(who: str, field: str, id: object, listed_in: str) -> str:
    """Returns the line about an id that is not listed."""
    return (
        f"{who} has the unknown {field} {id!r}; list it in '{listed_in}' or remove the annotation"
    )


def _value(entry: dict, field: str) -> str:
    """Describes a field: "the bbox None", or "no bbox"."""
    return f"the {field} {entry[field]!r:.200}" if field in entry else f"no {field}"
