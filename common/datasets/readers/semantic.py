"""Reader of label maps: ADE20K, Cityscapes, COCO-Stuff, Mapillary Vistas, custom folders."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.doubts import numbered_doubt
from common.datasets.files import IMAGES, listing
from common.datasets.index import Index, encoded
from common.datasets.maps import label_table
from common.datasets.tools import name_folder, name_masks
from common.errors import InputError
from common.labels import Vocabulary, fold

log = logging.getLogger("concord")
NO_CLASS = "-"  # the line of a value that is void
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
LEFT_IMAGES = ("_leftImg8bit.png",)
# Columns: pixel values of the classes (None: their ids in the vocabulary); void values; ending of
# a map's file name; endings of an image's file name.
# detectron2: the maps are in a folder annotations_detectron2. For COCO-Stuff, MaskFormer's
# prepare_coco_stuff_10k_v1.0_sem_seg.py writes them; mmsegmentation writes *_labelTrainIds.png.
# train ids: the folder has no *_labelIds.png.
FORMATS = {
    "ade20k": (None, (0,), ".png", IMAGES),
    "ade20k detectron2": (range(150), (255,), ".png", IMAGES),
    "cityscapes": (None, range(34), "_gtFine_labelIds.png", LEFT_IMAGES),
    "cityscapes train ids": (range(19), (255,), "_gtFine_labelTrainIds.png", LEFT_IMAGES),
    "coco-stuff": (range(1, 172), (0,), "_labelTrainIds.png", IMAGES),
    "coco-stuff detectron2": (range(171), (255,), ".png", IMAGES),
    "mapillary": (None, (65, 255), ".png", IMAGES),
}


def read_semantic(name: str, maps: Path, images: Path, metric: str = "miou") -> Dataset:
    """Reads a folder of label maps: pairs each PNG with the image of the same name.

    File names are compared without the endings in FORMATS. No map is decoded. A custom dataset
    needs a list of classes, see `read_map_classes`; the other values of its maps that are void are
    those of `void_values`. Images without a map are left out and their number is logged.
    Raises InputError for a folder without maps, a map without an image, two images with the same
    name, a missing or bad list of classes.
    """
    variant = name
    if name == "cityscapes" and not any(maps.glob("*/*_gtFine_labelIds.png")):
        variant = "cityscapes train ids"
    elif name in ("ade20k", "coco-stuff") and "annotations_detectron2" in maps.parts:
        variant = f"{name} detectron2"
    if variant in FORMATS:
        vocabulary = Vocabulary.known(name)
        values, void, map_ending, image_endings = FORMATS[variant]
    else:
        vocabulary = read_map_classes(name, maps)
        values, void, map_ending, image_endings = None, void_values(vocabulary), ".png", IMAGES
    table = label_table(values or vocabulary.ids, void)
    map_of = listing(name, maps, (map_ending,))
    image_of = listing(name, images, image_endings)
    if not map_of:
        raise InputError(
            f"dataset '{name}': {maps} holds no label maps, files *{map_ending}; check the path, "
            "and save maps of other formats as PNG (JPEG changes their values)"
        )
    bare = [key for key in image_of if key not in map_of]
    if bare:
        message = "%s: %d images without a label map in %s are left out (first: %s)"
        log.info(message, name, len(bare), maps, bare[0])
    lost = [key for key in map_of if key not in image_of]
    if lost:
        if told := name_masks(maps):
            raise InputError(f"dataset '{name}': {maps} {told}")
        raise InputError(
            f"{name}: label map {maps / map_of[lost[0]]} has no image in {images} ({len(lost)} of "
            f"{len(map_of)} maps); name each map as its image, add the images or remove the maps"
        )
    index = Index.build(
        source=str(maps),
        file_names=[image_of[key] for key in map_of],
        image_ids=list(map_of),
        sizes=np.zeros((len(map_of), 2)),  # only the images tell
        map_names=encoded(map_of.values()),
    )
    vocabulary = replace(vocabulary, is_thing=None)  # all pixels of a class are one segment
    return Dataset(
        name, vocabulary, index, images, metric, "semantic", maps=maps, pixel_labels=table
    )


def void_values(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Returns the void values of one's own maps: 255, the one after the last class, and those of
    lines without a class. A class may have one of them nevertheless.
    """
    after = max(vocabulary.ids) + 1
    return (255, *set(range(after + 1)).difference(vocabulary.ids))


def read_map_classes(name: str, maps: Path) -> Vocabulary:
    """Reads classes.txt in `maps` or its parent. The class in line i, from 0, has pixel value i.

    A line that is a hyphen names no class: its value is void.
    """
    places = (maps / "classes.txt", maps.parent / "classes.txt")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        for folder in (maps, maps.parent):
            if told := name_folder(folder):
                raise InputError(f"dataset '{name}': {folder} {told}")
        raise InputError(
            f"dataset '{name}': {places[0]} does not exist; name the classes there, one per line "
            "in the order of the pixel values from 0"
        )
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    values = [value for value, line in enumerate(names) if line != NO_CLASS]
    for value in values:
        if fold(names[value]) in VOID_NAMES:
            message = "%s: '%s' is trained on as a class; write - in its line to make it void"
            log.info(message, path, names[value])
    names = tuple(names[value] for value in values)
    if doubt := numbered_doubt(path, names):
        log.warning(doubt)
    return Vocabulary(name, names, tuple(values), source=str(path))
