"""Reader of label maps: ADE20K, Cityscapes, COCO-Stuff, Mapillary Vistas, custom folders."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, listing
from common.datasets.index import Index, encoded
from common.datasets.maps import label_table
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")


CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LEFT_IMAGES = ("_leftImg8bit.png",)
# Pixel values of the C classes, in the order of the vocabulary; void values; ending of the maps'
# names; endings of the images' names. What precedes the endings is the same for map and image.
# "detectron2": maps in a folder annotations_detectron2, which detectron2's and MaskFormer's scripts
# write. "train ids": Cityscapes without *_labelIds.png. COCO-Stuff's other maps: mmsegmentation.
FORMATS = {
    "ade20k": (range(1, 151), (0,), ".png", IMAGES),
    "ade20k detectron2": (range(150), (255,), ".png", IMAGES),
    "cityscapes": (CITYSCAPES_IDS, range(34), "_gtFine_labelIds.png", LEFT_IMAGES),
    "cityscapes train ids": (range(19), (255,), "_gtFine_labelTrainIds.png", LEFT_IMAGES),
    "coco-stuff": (range(1, 172), (0,), "_labelTrainIds.png", IMAGES),
    "coco-stuff detectron2": (range(171), (255,), ".png", IMAGES),
    "mapillary": (range(65), (65, 255), ".png", IMAGES),
}


def read_semantic(name: str, maps: Path, images: Path, metric: str = "miou") -> Dataset:
    """Pairs the PNGs below `maps` with the images of the same names below `images`.

    No map is decoded. FORMATS lists the known datasets. Other datasets need a list of classes, see
    `read_map_classes`; in their maps, 255 and the number of classes are void.
    Images without a map are left out and their number is logged.
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
        values, void = vocabulary.ids, (255, len(vocabulary))
        map_ending, image_endings = ".png", IMAGES
    table = label_table(values, void)
    map_of = listing(name, maps, (map_ending,))
    image_of = listing(name, images, image_endings)
    if not map_of:
        raise InputError(
            f"dataset '{name}': {maps} holds no label maps, files *{map_ending}; check the path"
        )
    bare = [key for key in image_of if key not in map_of]
    if bare:
        message = "%s: %d images without a label map in %s are left out (first: %s)"
        log.info(message, name, len(bare), maps, bare[0])
    lost = [key for key in map_of if key not in image_of]
    if lost:
        raise InputError(
            f"{name}: label map {maps / map_of[lost[0]]} has no image in {images} ({len(lost)} of "
            f"{len(map_of)} maps); add the images or remove the maps"
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


def read_map_classes(name: str, maps: Path) -> Vocabulary:
    """Reads classes.txt in `maps` or its parent. The class in line i, from 0, has pixel value i."""
    places = (maps / "classes.txt", maps.parent / "classes.txt")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(
            f"dataset '{name}': {places[0]} does not exist; name the classes there, one per line "
            "in the order of the pixel values from 0"
        )
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    # the errors of Vocabulary name the file
    vocabulary = Vocabulary(str(path), names, tuple(range(len(names))))
    return replace(vocabulary, dataset=name)
