"""Images with captions: Conceptual Captions and anyone's own. The classes that a caption names are image labels."""

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
    """Read lines of caption, tab, URL or path below `images`; a json goes to `read_coco`.

    The image of the URL in line N is N.jpg or, if there are none of these, what img2dataset wrote: FOLDER/KEY.jpg with
    its caption in KEY.txt; these are also read where `annotations` is no file. The classes are those of LVIS, found by
    `class_finder`. Images that are not there or whose caption names no class are left out and counted in the log.
    Raises InputError for a line that is not two columns, a path that leaves the folder, text that is not UTF-8, no
    image or none with a class.
    Source: facebookresearch/Detic:tools/download_cc.py, tools/get_cc_tags.py.
    """
    if annotations.suffix == ".json":
        return read_coco(name, annotations, images, metric)
    pairs = (read_lines(annotations, images) if annotations.is_file() else []) or read_beside(
        name, images
    )
    if not pairs:
        raise InputError(f"dataset '{name}': no image of {annotations} is in {images}; download them as LINE.jpg, or "
                         "with img2dataset as FOLDER/KEY.jpg beside KEY.txt")  # fmt: skip
    classes_in = class_finder()
    found = [(file, caption, labels) for file, caption in pairs if (labels := classes_in(caption))]
    if not found:
        raise InputError(
            f"dataset '{name}': none of the {len(pairs)} captions of {annotations} names a class of LVIS"
        )
    if bare := len(pairs) - len(found):
        log.info("%s: %d images whose caption names no class are left out", annotations, bare)
    files, captions, labels = zip(*found)
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
    """A function from a caption to the labels of the LVIS classes in it: one of their synonyms, word by word.

    Case does not matter; what a name has in parentheses is no part of it. Punctuation is a word of its own, as in
    Conceptual Captions, where it stands between spaces.
    """
    synonyms = json.loads((DATA / "vocabularies" / "lvis.json").read_text())["synonyms"]
    starting: dict[
        str, list[tuple[str, int]]
    ] = {}  # first word -> names between spaces, with their labels
    for label, names in enumerate(synonyms):
        for name in names:
            words = name.partition("(")[0].replace("_", " ").lower().split()
            starting.setdefault(words[0], []).append((f" {' '.join(words)} ", label))

    def classes_in(caption: str) -> list[int]:
        words = caption.lower().translate(PUNCTUATION).split()
        text = f" {' '.join(words)} "
        return sorted(
            {label for word in set(words) for name, label in starting.get(word, ()) if name in text}
        )

    return classes_in


def read_lines(path: Path, images: Path) -> list[tuple[str, str]]:
    """File name below `images` and caption of each line whose image is there."""
    pairs = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                columns = line.strip("\r\n").split("\t")
                if len(columns) != 2:
                    raise InputError(f"{path}: line {number} has {len(columns)} columns; write the caption, a tab and "
                                     "the URL or path of the image")  # fmt: skip
                caption, place = columns
                pairs.append(
                    (
                        f"{number}.jpg"
                        if "://" in place
                        else file_name(path, {"file_name": place}),
                        caption,
                    )
                )
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    missing = set(missing_files(images, (file for file, _ in pairs)))
    if missing:
        log.info(
            "%s: %d of %d images are not in %s and left out", path, len(missing), len(pairs), images
        )
    return [pair for pair in pairs if pair[0] not in missing]


def read_beside(name: str, images: Path) -> list[tuple[str, str]]:
    """File name below `images` and caption of each image that has a text file of its name beside it."""
    texts, files, pairs = listing(name, images, (".txt",)), listing(name, images, IMAGES), []
    if bare := len(files.keys() - texts.keys()):
        log.info("%s: %d images without a text file beside them are left out", images, bare)
    for key in files.keys() & texts.keys():
        try:
            pairs.append((files[key], (images / texts[key]).read_text("utf-8").strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{images / texts[key]} cannot be read ({error}); save it as UTF-8 text"
            ) from None
    return sorted(pairs)
