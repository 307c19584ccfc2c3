"""What is looked at once, before a dataset is trained on: is there anything to learn from?"""

import logging
import time
from collections.abc import Iterator

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.exif import TURNS, UPRIGHT, is_swapped, read_tag
from common.datasets.maps import VOID, read_palette, read_values
from common.errors import InputError
from common.labels import quoted

log = logging.getLogger("concord")
LOOKED_AT = 50  # images or label maps, spread over the dataset
DEEPER = 500  # label maps, if those have void alone
SECONDS = 3.0  # after which no further one is read


def check_training(dataset: Dataset) -> None:
    """Logs what looks wrong with a dataset that is to be trained on.

    Raises InputError if there is nothing to learn from: no box but crowds, boxes without an area
    and boxes outside of their image, no segment, no label, label maps of void alone.
    """
    refuse_nothing(dataset)
    for line in dataset.index.doubts:
        log.warning("%s: %s", dataset.name, line)
    if dataset.pixel_labels is not None:
        look_at_maps(dataset)
    if dataset.maps is not None:
        look_at_mirrored(dataset)
    elif dataset.supervision in ("boxes", "instances"):
        look_at_headers(dataset)


def refuse_nothing(dataset: Dataset) -> None:
    """Raises InputError if no annotation can be trained on. Label maps are not read."""
    index = dataset.index
    if dataset.pixel_labels is not None:
        return
    if dataset.supervision == "image_labels":
        if not len(index.image_labels) and not any(index.captions or ()):
            raise InputError(
                f"{index.source} has no image label to learn from; add labels or take it out"
            )
        return
    what = "segment" if dataset.maps is not None else "box"
    if dataset.novel and not len(index.labels):
        return  # all its boxes are of novel classes; the method counts the base classes
    if not len(index.labels):
        raise InputError(
            f"{index.source} has no {what} to learn from; add annotations or, for image labels, "
            "pos_category_ids"
        )
    if not index.num_trainable:
        kinds = {"crowd, group or difficult": int(index.ignore.sum())}
        if what == "box":
            kinds |= {"without an area": index.num_empty, "outside their image": index.num_outside}
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        raise InputError(
            f"{index.source} has no {what} to train on: of {len(index.labels)} there are {counts}; "
            "mend the annotations (iscrowd is 0 for a single object) or take the dataset out"
        )


# -- images ----------------------------------------------------------------------------------------


def look_at_headers(dataset: Dataset) -> None:
    """Logs how many of some images have an EXIF tag that their annotations do not follow.

    Boxes of an image whose annotated size is the stored one are turned with it by `Dataset.load`.
    Where the size tells nothing, they are taken as annotated upright; so are fractions of an image.
    Source: ultralytics/ultralytics:ultralytics/data/utils.py (exif_size: YOLO's fractions)
    """
    looked, turned, upright, unclear = 0, [], [], []
    for row, tag, stored in read_tags(dataset):
        looked += 1
        if tag == UPRIGHT:
            continue
        group = unclear
        if tag in TURNS and dataset.index.sizes[row].any():
            stored = np.array(stored)
            annotated = dataset.index.sizes[row]
            if is_swapped(annotated, stored):
                group = upright
            elif is_swapped(annotated, stored[::-1]):
                group = turned
        group.append(dataset.index.file_name(row))
    if turned:
        dataset.told_turned.fill_(True)
        message = (
            "%s: %d of %d images looked at are annotated as they are stored, before their EXIF "
            "orientation turns them (first: '%s'); boxes and masks are turned with such images"
        )
        log.warning(message, dataset.name, len(turned), looked, turned[0])
    if unclear and not upright:  # those that are clear show how all were annotated
        message = (
            "%s: %d of %d images looked at are turned or mirrored by their EXIF orientation, and "
            "their annotations do not tell if the boxes were made before (first: '%s'); they are "
            "taken as made after it; if boxes in first_batch.jpg miss their objects, remove the tag"
        )
        log.warning(message, dataset.name, len(unclear), looked, unclear[0])


def look_at_mirrored(dataset: Dataset) -> None:
    """Logs how many of some images with label maps an EXIF tag mirrors or turns by 180 degrees.

    Their maps have the same size before and after. Those of other tags are refused if they do not
    fit.
    """
    looked, found = 0, []
    for row, tag, _ in read_tags(dataset):
        looked += 1
        if tag not in (UPRIGHT, *TURNS):
            found.append(dataset.index.file_name(row))
    if found:
        message = (
            "%s: %d of %d images looked at are mirrored or turned by 180 degrees by their EXIF "
            "orientation (first: '%s'); their label maps are taken as made after it; see "
            "first_batch.jpg"
        )
        log.warning(message, dataset.name, len(found), looked, found[0])


def read_tags(dataset: Dataset) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yields the row of some images, and what `read_tag` returns; broken images are left out."""
    for row in spread(len(dataset), LOOKED_AT):
        try:
            tag, stored = read_tag(*dataset.image_file(row))
        except InputError:  # it is named when it is loaded
            continue
        yield row, tag, stored


def spread(count: int, most: int) -> Iterator[int]:
    """Yields at most `most` of the numbers below `count`, evenly spread, until SECONDS are over."""
    end = time.monotonic() + SECONDS
    for row in np.linspace(0, count - 1, min(count, most)).round():  # distinct, as most <= count
        yield int(row)
        if time.monotonic() > end:
            return


# -- label maps ------------------------------------------------------------------------------------


def look_at_maps(dataset: Dataset) -> None:
    """Reads some label maps and logs `map_doubts` about them.

    Raises InputError if all maps of the dataset were read and have void alone.
    """
    maps_with, looked = count_values(dataset, LOOKED_AT)
    if looked and not seen_labels(dataset, maps_with).any():
        maps_with, looked = count_values(dataset, DEEPER)
    for line in (*map_doubts(dataset, maps_with, looked), *palette_doubts(dataset)):
        log.warning("%s: %s", dataset.name, line)
    if seen_labels(dataset, maps_with).any() or not looked:
        return
    nothing = f"{dataset.name}: {looked} of {len(dataset)} label maps in {dataset.maps} were read"
    nothing += " and have void alone, which is not trained on"
    if looked == len(dataset):
        raise InputError(f"{nothing}; mend the maps, or the list of classes")
    log.warning(nothing)


def count_values(dataset: Dataset, most: int) -> tuple[np.ndarray, int]:
    """Returns (65536,) how many of some label maps have each value, and how many were read."""
    maps_with = np.zeros(len(dataset.pixel_labels), np.int64)
    looked = 0
    for row in spread(len(dataset), most):
        try:
            values = present_values(dataset, row)
        except InputError:  # it is named when it is loaded
            continue
        maps_with[values] += 1
        looked += 1
    return maps_with, looked


def present_values(dataset: Dataset, row: int) -> np.ndarray:
    """Returns the values that occur in a label map. Raises InputError if it cannot be read."""
    values = read_values(dataset.maps / dataset.index.map_name(row)).ravel()
    if values.dtype.kind == "i":  # the others have no more than 16 bits
        values = values[(values >= 0) & (values < len(dataset.pixel_labels))]
    return np.flatnonzero(np.bincount(values))  # much faster than np.unique


def seen_labels(dataset: Dataset, maps_with: np.ndarray) -> np.ndarray:
    """Returns (C,) bool: the classes with a pixel. maps_with: (65536,) of `count_values`"""
    labels = dataset.pixel_labels[maps_with > 0]
    return np.isin(np.arange(len(dataset.vocabulary)), labels)


def map_doubts(dataset: Dataset, maps_with: np.ndarray, looked: int) -> list[str]:
    """Returns lines about values that look like another convention, and classes that never occur.

    Known datasets are not doubted, for their values are in the program: only a list of classes.
    maps_with: (65536,) number of maps with each value, of `looked` maps
    """
    names = dataset.vocabulary.names
    if not dataset.vocabulary.source or not looked:
        return []
    present = np.flatnonzero(maps_with).tolist()
    lines = []
    unseen = [name for name, seen in zip(names, seen_labels(dataset, maps_with)) if not seen]
    if 255 in present and set(present) <= {0, 255} and unseen:
        lines.append(
            f"the {looked} label maps looked at have the values 0 and 255 alone, and 255 is void; "
            f"write the masks of '{unseen[0]}' with the value of its line in the list of classes"
        )
    after = max(dataset.vocabulary.ids) + 1  # void, as it is the number of classes
    if after < 255 and after in present and dataset.pixel_labels[after] == VOID:
        none = "" if 0 in present else ", and none has 0"
        lines.append(
            f"{maps_with[after]} of {looked} label maps looked at have the value {after}, which is "
            f"void as the number of classes{none}; if 1 stands for '{names[0]}' and 0 for "
            f"unlabelled, write - as the first line of {dataset.vocabulary.source}"
        )
    if unseen:
        lines.append(
            f"{len(unseen)} of {len(names)} classes have no pixel in the {looked} label maps "
            f"looked at: {quoted(unseen)}"
        )
    return lines


def palette_doubts(dataset: Dataset) -> list[str]:
    """Returns a line if a value has another colour in one label map than in another.

    A program that saves a picture with fewer colours numbers them for each picture anew, so that
    the numbers are no classes. Values that are void are not compared.
    """
    seen = {}  # {value: (colour, file)}
    for row in spread(len(dataset), LOOKED_AT):
        file = dataset.index.map_name(row)
        try:
            palette = read_palette(dataset.maps / file)
            values = present_values(dataset, row).tolist() if palette else []
        except InputError:  # it is named when it is loaded
            continue
        for value in values:
            colour = palette.get(value)
            first, where = seen.setdefault(value, (colour, file))
            if colour != first and dataset.pixel_labels[value] != VOID:
                return [
                    f"the value {value} has the colour {first} in the label map '{where}', but "
                    f"{colour} in '{file}'; were they colours, reduced for each map anew? write "
                    "the number of the class in each pixel"
                ]
    return []
