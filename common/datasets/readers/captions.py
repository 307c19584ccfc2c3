"""Reader of images with captions, whose classes become image-level labels."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, file_name, listing, missing_files
from common.datasets.index import Index
from common.datasets.readers.coco import read_coco
from common.errors import InputError
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")
PUNCTUATION = str.maketrans({mark: f" {mark} " for mark in '.,;:!?"()'})


def read_captions(name: str, annotations: Path, images: Path, metric: str = "coco") -> Dataset:
    """Reads a text file whose lines are a caption, a tab, and a URL or a path below `images`.

    `read_coco` reads a .json file instead. If line N has a URL, its image is N.jpg in `images`.
    If none of the images exists, or `annotations` is not a file, reads what img2dataset wrote to
    `images`: FOLDER/KEY.jpg with the caption in FOLDER/KEY.txt.
    The image-level labels are the LVIS classes that the caption names (`class_finder`). Missing
    images and images whose caption names no class are left out. Their numbers are logged.
    Source: facebookresearch/Detic:tools/download_cc.py, tools/get_cc_tags.py
    Raises InputError for a line that is not two columns, for a path that leaves the folder, for
    text that is not UTF-8, and if there is no image or no image with a class.
    """
    if annotations.suffix == ".json":
        return read_coco(name, annotations, images, metric)
    pairs = read_lines(annotations, images) if annotations.is_file() else []
    if not pairs:
        pairs = read_text_files(name, images)
    if not pairs:
        raise InputError(
            f"dataset '{name}': no image of {annotations} is in {images}; download them as "
            "LINE.jpg, or with img2dataset as FOLDER/KEY.jpg beside KEY.txt"
        )
    find_classes = class_finder()
    labelled = [(file, caption, find_classes(caption)) for file, caption in pairs]
    labelled = [entry for entry in labelled if entry[2]]
    if not labelled:
        raise InputError(
            f"'{name}': none of the {len(pairs)} captions of {annotations} names a class of LVIS"
        )
    bare = len(pairs) - len(labelled)
    if bare:
        log.info("%s: %d images whose caption names no class are left out", annotations, bare)
    files, captions, labels = zip(*labelled)
    index = Index.build(
        source=str(annotations),
        file_names=files,
        image_ids=range(len(files)),
        sizes=np.zeros((len(files), 2)),  # only the images tell
        image_labels=np.concatenate(labels).astype(np.int32),
        image_label_offsets=np.cumsum([0, *map(len, labels)], dtype=np.int64),
        captions=[(caption,) for caption in captions],
    )
    vocabulary = replace(Vocabulary.known("lvis"), dataset=name, image_counts=None)
    return Dataset(name, vocabulary, index, images, metric, "image_labels")


def class_finder() -> Callable[[str], list[int]]:
    """Returns a function that maps a caption to the sorted labels of the LVIS classes it names.

    A caption names a class if it has a synonym of the class as whole words. Case is ignored.
    A part of a synonym in parentheses is ignored. Punctuation marks count as words, as in
    Conceptual Captions, where spaces surround them.
    """
    record = json.loads((DATA / "vocabularies" / "lvis.json").read_text())
    # first word -> synonyms that start with it, between spaces, with their labels
    starting: dict[str, list[tuple[str, int]]] = {}
    for label, synonyms in enumerate(record["synonyms"]):
        for synonym in synonyms:
            words = synonym.partition("(")[0].replace("_", " ").lower().split()
            starting.setdefault(words[0], []).append((f" {' '.join(words)} ", label))

    def find_classes(caption: str) -> list[int]:
        words = caption.lower().translate(PUNCTUATION).split()
        text = f" {' '.join(words)} "
        labels = set()
        for word in set(words):
            labels |= {label for synonym, label in starting.get(word, ()) if synonym in text}
        return sorted(labels)

    return find_classes


def read_lines(path: Path, images: Path) -> list[tuple[str, str]]:
    """Returns (file name below `images`, caption) of each line of `path` whose image exists."""
    pairs = []
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                columns = line.strip("\r\n").split("\t")
                if len(columns) != 2:
                    raise InputError(
                        f"{path}: line {number} has {len(columns)} columns; write the caption, a "
                        "tab and the URL or path of the image"
                    )
                caption, place = columns
                is_url = "://" in place
                image = f"{number}.jpg" if is_url else file_name(path, {"file_name": place})
                pairs.append((image, caption))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    missing = set(missing_files(images, (image for image, _ in pairs)))
    if missing:
        message = "%s: %d of %d images are not in %s and left out"
        log.info(message, path, len(missing), len(pairs), images)
    return [(image, caption) for image, caption in pairs if image not in missing]


def read_text_files(name: str, images: Path) -> list[tuple[str, str]]:
    """Returns (image file, caption) of each image with a text file of the same name, sorted.

    Images have one of the endings IMAGES, text files have .txt. An image file is a path below the
    folder `images`. Other images are left out, and their number is logged.
    name: the dataset, for messages. Raises InputError for a text file that is not UTF-8.
    """
    texts = listing(name, images, (".txt",))
    files = listing(name, images, IMAGES)
    bare = len(files.keys() - texts.keys())
    if bare:
        log.info("%s: %d images without a text file beside them are left out", images, bare)
    pairs = []
    for key in files.keys() & texts.keys():
        path = images / texts[key]
        try:
            pairs.append((files[key], path.read_text("utf-8-sig").strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    return sorted(pairs)
