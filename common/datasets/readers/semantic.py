"""Semantic label maps beside images: ADE20K, Cityscapes, COCO-Stuff, Mapillary Vistas, and one's own folders."""

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


def read_semantic(name: str, maps: Path, images: Path, metric: str = "miou") -> Dataset:
    """Pair the PNGs below `maps` with the images below `images` that have their names; no map is decoded.

    ade20k:     1..150, 0 is void; in a folder annotations_detectron2: 0..149, 255 is void
    cityscapes: CITY/*_labelIds.png, else *_labelTrainIds.png, with *_leftImg8bit.png
    coco-stuff: *_labelTrainIds.png of mmsegmentation: 1..171, 0 is void; in a folder annotations_detectron2, of
                MaskFormer's prepare_coco_stuff_10k_v1.0_sem_seg.py: 0..170, 255 is void
    mapillary:  0..64, 65 is void
    others:     `read_classes`; 255 and the number of classes are void

    Images without a map are left out and counted in the log. Raises InputError for a folder without maps, maps without
    an image, two images of one name, a missing or bad list of classes.
    """
    map_ending, image_endings = ".png", IMAGES
    shifted = "annotations_detectron2" in maps.parts
    if name == "ade20k":
        vocabulary = Vocabulary.known(name)
        table = label_table(range(150) if shifted else vocabulary.ids, (255,) if shifted else (0,))
    elif name == "cityscapes":
        vocabulary, image_endings = Vocabulary.known(name), ("_leftImg8bit.png",)
        plain = any(maps.glob("*/*_gtFine_labelIds.png"))
        map_ending = "_gtFine_labelIds.png" if plain else "_gtFine_labelTrainIds.png"
        # the ids 0 to 33 of labels.py that are not evaluated, or 255
        table = label_table(
            vocabulary.ids if plain else range(19), tuple(range(34)) if plain else (255,)
        )
    elif name == "coco-stuff":
        vocabulary = Vocabulary.known(name)
        map_ending = ".png" if shifted else "_labelTrainIds.png"
        table = label_table(range(171), (255,)) if shifted else label_table(range(1, 172), (0,))
    else:
        vocabulary = Vocabulary.known(name) if name == "mapillary" else read_classes(name, maps)
        table = label_table(vocabulary.ids, (255, len(vocabulary)))
    map_of, image_of = (
        listing(name, root, e) for root, e in ((maps, (map_ending,)), (images, image_endings))
    )
    if not map_of:
        raise InputError(
            f"dataset '{name}': {maps} holds no label maps, which are files *{map_ending}; check the path"
        )
    bare = [key for key in image_of if key not in map_of]
    if bare:
        log.info(
            "%s: %d images without a label map in %s are left out (first: %s)",
            name,
            len(bare),
            maps,
            bare[0],
        )
    lost = [key for key in map_of if key not in image_of]
    if lost:
        raise InputError(f"{name}: label map {maps / map_of[lost[0]]} has no image in {images} ({len(lost)} of "
                         f"{len(map_of)} maps); add the images or remove the maps")  # fmt: skip
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


def read_classes(name: str, maps: Path) -> Vocabulary:
    """The vocabulary in classes.txt, in the folder of the label maps or beside it: one name per line, values from 0."""
    path = next(
        (p for p in (maps / "classes.txt", maps.parent / "classes.txt") if p.is_file()), None
    )
    if path is None:
        raise InputError(f"dataset '{name}': {maps / 'classes.txt'} does not exist; name the classes there, one per "
                         "line in the order of the pixel values from 0")  # fmt: skip
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    return replace(
        Vocabulary(str(path), names, tuple(range(len(names)))), dataset=name
    )  # its errors name the file
