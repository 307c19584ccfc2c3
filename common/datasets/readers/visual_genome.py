"""Visual Genome: objects.json, and image_data.json beside it."""

import logging
from collections import defaultdict
from itertools import count
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import file_name
from common.datasets.index import Index, Parts
from common.datasets.store import cached_index
from common.datasets.stream import read_elements
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")


def read_visual_genome(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Read objects.json of visualgenome.org; `images` holds VG_100K/ and VG_100K_2/.

    A class is the word of a synset ('clock' of 'clock.n.01'), in alphabetic order; synsets of one word are one class.
    Objects without a synset are left out and counted in the log. Large files are read once, see `cached_index`.
    Note: UniDetector evaluates 7605 classes on a part of the images and publishes neither list; here the classes
    are those that occur, and the images all. Source: zhenyuw16/UniDetector#9
    Raises InputError naming the file, the field and the remedy.
    """
    places = annotations.with_name("image_data.json")
    if not places.is_file():
        raise InputError(f"{places} does not exist; put it there, from visualgenome.org")
    index, facts = cached_index(
        annotations, ["vg"], lambda _: read_index(annotations, places), [annotations, places]
    )
    if bare := facts["bare"]:
        log.info(
            "%s: %d of %d objects have no synset and are left out",
            annotations,
            bare,
            bare + len(index.labels),
        )
    return Dataset(name, Vocabulary(name, tuple(facts["names"])), index, images, metric)


def read_index(annotations: Path, places: Path) -> tuple[Index, dict]:
    row_of, file_names, sizes, bare = {}, [], [], 0
    parts, number_of = (
        Parts(image=np.int32, box=(np.float32, 4), word=np.int32),
        defaultdict(count().__next__),
    )
    path = places
    try:
        for image in read_elements(places):
            row_of[image["image_id"]] = len(row_of)
            file_names.append(file_name(places, {"coco_url": image["url"]}))  # VG_100K/1.jpg
            sizes.append((int(image["height"]), int(image["width"])))
        path = annotations
        for image in read_elements(annotations):
            if image["image_id"] not in row_of:
                raise InputError(f"{path}: the image_id {image['image_id']} is not in {places}; both files must be of "
                                 "one version")  # fmt: skip
            found = [each for each in image["objects"] if each["synsets"]]
            bare += len(image["objects"]) - len(found)
            boxes = np.array(
                [(o["x"], o["y"], o["w"], o["h"]) for o in found], dtype=np.float64
            ).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
            words = [o["synsets"][0].rsplit(".", 2)[0].replace("_", " ") for o in found]
            parts.add(
                image=[row_of[image["image_id"]]] * len(found),
                box=boxes,
                word=[number_of[word] for word in words],
            )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path}: {what} in an entry; a file of visualgenome.org is needed"
        ) from None
    if len(row_of) < len(file_names):
        raise InputError(f"{places}: an image_id comes twice; download the file again")
    names = sorted(number_of)
    label_of = np.argsort(
        [number_of[name] for name in names]
    )  # the inverse permutation: number -> label
    index = Index.build(
        source=str(annotations),
        file_names=file_names,
        image_ids=list(row_of),
        sizes=sizes,
        image_of=parts.take("image"),
        boxes=parts.take("box"),
        labels=label_of[parts.take("word")],
    )
    return index, {"names": names, "bare": bare}
