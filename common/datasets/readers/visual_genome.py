"""Reader of Visual Genome: objects.json, with image_data.json in the same folder."""

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
    """Reads objects.json of visualgenome.org. `images` holds VG_100K/ and VG_100K_2/.

    The class of an object is the word of its first synset ('clock' of 'clock.n.01'). Synsets with
    the same word are one class. Objects without a synset are left out and their number is logged.
    Note: UniDetector evaluates 7605 classes on some of the images, and lists neither. Here, all
    images are used, and all classes that occur, sorted. Source: zhenyuw16/UniDetector#9
    Raises InputError for a missing file or field, and for an unknown or repeated image id.
    """
    image_data = annotations.with_name("image_data.json")
    if not image_data.is_file():
        raise InputError(f"{image_data} does not exist; put it there, from visualgenome.org")
    files = [annotations, image_data]
    index, facts = cached_index(annotations, ["vg"], lambda _: read_objects(*files), files)
    if facts["bare"]:
        message = "%s: %d of %d objects have no synset and are left out"
        log.info(message, annotations, facts["bare"], facts["bare"] + len(index.labels))
    vocabulary = Vocabulary(name, tuple(facts["names"]), source=str(annotations))
    return Dataset(name, vocabulary, index, images, metric)


def read_objects(annotations: Path, image_data: Path) -> tuple[Index, dict]:
    """Returns the index, and the facts "names" and "bare", the number of objects left out."""
    row_of, file_names, sizes = {}, [], []
    parts = Parts(image=np.int32, box=(np.float32, 4), word=np.int32)
    index_of_word = defaultdict(count().__next__)  # in the order of the objects
    bare = 0
    path = image_data
    try:
        for image in read_elements(image_data):
            row_of[image["image_id"]] = len(row_of)
            file_names.append(file_name(image_data, {"coco_url": image["url"]}))  # VG_100K/1.jpg
            sizes.append((int(image["height"]), int(image["width"])))
        path = annotations
        for image in read_elements(annotations):
            if image["image_id"] not in row_of:
                raise InputError(
                    f"{path}: image_id {image['image_id']} is not in {image_data}; use one version"
                )
            named = [each for each in image["objects"] if each["synsets"]]
            bare += len(image["objects"]) - len(named)
            xywh = [(each["x"], each["y"], each["w"], each["h"]) for each in named]
            boxes = np.array(xywh, dtype=np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
            synsets = [each["synsets"][0].rsplit(".", 2)[0] for each in named]
            parts.add(
                image=[row_of[image["image_id"]]] * len(named),
                box=boxes,
                word=[index_of_word[synset.replace("_", " ")] for synset in synsets],
            )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: {what} in an entry; download the file again") from None
    if len(row_of) < len(file_names):
        raise InputError(f"{image_data}: an image_id comes twice; download the file again")
    names = sorted(index_of_word)
    # argsort inverts the permutation: index of a word -> label
    label_of = np.argsort([index_of_word[name] for name in names])
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
