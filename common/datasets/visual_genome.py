"""Visual Genome: objects.json, and image_data.json beside it."""

import logging
from pathlib import Path

import numpy as np
import orjson

from common.datasets.base import Dataset
from common.datasets.coco import file_name
from common.datasets.index import Index
from common.datasets.stream import not_json
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")


def read_visual_genome(name: str, annotations: Path, images: Path, metric: str) -> Dataset:
    """Read objects.json of visualgenome.org; `images` holds VG_100K/ and VG_100K_2/.

    A class is the word of a synset ('clock' of 'clock.n.01'), in alphabetic order; synsets of one word are one class.
    Objects without a synset are left out and counted in the log.
    Note: UniDetector evaluates 7605 classes on a part of the images and publishes neither list; here the classes
    are those that occur, and the images all. Source: zhenyuw16/UniDetector#9
    Raises InputError naming the file, the field and the remedy.
    """
    places = annotations.with_name("image_data.json")
    row_of, file_names, sizes = {}, [], []
    image_of, boxes, synsets, bare = [], [], [], 0
    path = places
    try:
        for image in read_list(places):
            row_of[image["image_id"]] = len(row_of)
            file_names.append(file_name(places, {"coco_url": image["url"]}))  # VG_100K/1.jpg
            sizes.append((image["height"], image["width"]))
        path = annotations
        for image in read_list(annotations):
            if image["image_id"] not in row_of:
                raise InputError(f"{path}: the image_id {image['image_id']} is not in {places}; both files must be of "
                                 "one version")  # fmt: skip
            for each in image["objects"]:
                if not each["synsets"]:
                    bare += 1
                    continue
                image_of.append(row_of[image["image_id"]])
                boxes.append((each["x"], each["y"], each["w"], each["h"]))
                synsets.append(each["synsets"][0])
        words = [synset.rsplit(".", 2)[0].replace("_", " ") for synset in synsets]
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: {what} in an entry; a file of visualgenome.org is needed") from None
    if len(row_of) < len(file_names):
        raise InputError(f"{places}: an image_id comes twice; download the file again")
    if bare:
        log.info("%s: %d of %d objects have no synset and are left out", annotations, bare, bare + len(synsets))
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    names = sorted(set(words))
    label_of = {word: label for label, word in enumerate(names)}
    index = Index.build(
        source=str(annotations),
        file_names=file_names,
        image_ids=list(row_of),
        sizes=sizes,
        image_of=image_of,
        boxes=boxes,
        labels=[label_of[word] for word in words],
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        ignore=np.zeros(len(boxes), bool),
    )
    return Dataset(name, Vocabulary(name, tuple(names)), index, images, metric)


def read_list(path: Path) -> list:
    try:
        entries = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise not_json(path, error) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); put it there, from visualgenome.org") from None
    if not isinstance(entries, list):
        raise InputError(f"{path} holds a json {type(entries).__name__}; a list from visualgenome.org is needed")
    return entries
