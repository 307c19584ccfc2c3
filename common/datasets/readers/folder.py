"""Reader of class folders: one folder or tar file of images per class, as in ImageNet. No boxes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES
from common.datasets.index import Index
from common.datasets.readers.wordnet import folder_vocabulary
from common.datasets.shards import Shards, index_tar
from common.errors import InputError
from common.labels import Vocabulary, quoted

log = logging.getLogger("concord")
LISTS = ("classes.txt", "classes.csv", "words.txt")  # files that name the classes


def read_folder(name: str, root: Path) -> Dataset:
    """Reads `root`/CLASS/IMAGE, or the tar files in `root` if there are any. Skips hidden files.

    The class of an image in a tar is the label beside it (KEY.cls, KEY.json). In a tar without
    labels, the tar's name is the class. If all labels are numbers, they count the lines of
    classes.txt from 0. A class that is a WordNet id takes its name from classes.csv or words.txt in
    `root` or its parent. Classes with the same name are one. Empty folders and files that are not
    images are left out and counted in the log. Raises InputError if there are no folders or images,
    for an id or number without a name, for a class that is not text, and for a damaged tar.
    """
    if not root.is_dir():
        raise InputError(f"dataset '{name}': folder {root} does not exist; check the path")
    entries = list_visible(root)
    tars = [entry for entry in entries if entry.endswith(".tar") and os.path.isfile(root / entry)]
    if tars:
        others = len(set(entries).difference(tars, LISTS))
        log_count(root, others, "entries beside the tar files are left out")
        return read_tars(name, root, tars)
    class_folders = [entry for entry in entries if os.path.isdir(root / entry)]
    files, others = {}, 0
    for folder in class_folders:
        refuse_no_text(name, root, folder)
        found = list_visible(root / folder)
        files[folder] = [file for file in found if file.lower().endswith(IMAGES)]
        others += len(found) - len(files[folder])
    classes = [folder for folder in class_folders if files[folder]]
    if not classes:
        what = "the folders in it hold no images" if files else "it has no folders"
        raise InputError(
            f"dataset '{name}': {root} needs a folder or a tar file of images for each class, but "
            f"{what}; name the folder above or below"
        )
    log.info("%s: the classes are the names of its folders, %s", root, quoted(classes))
    entries_beside = len(set(entries).difference(class_folders, LISTS))
    log_count(root, len(files) - len(classes), "class folders without an image are left out")
    log_count(root, entries_beside, "entries beside the class folders are left out")
    log_count(root, others, "files that are no images are left out")
    file_names = [f"{folder}/{file}" for folder in classes for file in files[folder]]
    labels = np.repeat(np.arange(len(classes)), [len(files[folder]) for folder in classes])
    return labelled_images(name, root, classes, file_names, labels)


def read_tars(name: str, root: Path, tars: list[str]) -> Dataset:
    """Reads the images in the files `tars` of `root`, with the labels that `read_members` finds.

    If all labels are numbers, they are lines of classes.txt, counted from 0. Tars without an image
    and images without a label are left out and their numbers are logged.
    Raises InputError for a damaged tar, for a number without a name, and if no image has a label.
    """
    bar = tqdm(tars, "headers of tar files", unit="tar", delay=2, leave=False, disable=None)
    members = [index_tar(root / tar) for tar in bar]
    empty = sum(len(each) == 0 for each in members)
    unlabelled = sum(int((each["label"] == b"").sum()) for each in members)
    log_count(root, empty, "tar files without an image are left out")
    log_count(root, unlabelled, "images without a label are left out")
    members = [each[each["label"] != b""] for each in members]
    # sort within each tar first: together the labels can be many millions
    parts = [np.unique(each["label"], return_inverse=True) for each in members]
    texts = np.array(sorted({text for unique, _ in parts for text in unique.tolist()}))
    if not len(texts):
        raise InputError(
            f"dataset '{name}': the tar files in {root} hold no images with labels; add labels"
        )
    classes = [os.fsdecode(text) for text in texts.tolist()]
    for label in classes:
        refuse_no_text(name, root, label)
    labels = np.concatenate([np.searchsorted(texts, unique)[inverse] for unique, inverse in parts])
    if all(label.isdecimal() for label in classes):
        numbers = classes
        path = root / "classes.txt"
        if not path.is_file():
            raise InputError(
                f"dataset '{name}': the tar files in {root} have numbers for labels; name the "
                f"classes in {path}, one per line from 0"
            )
        classes = list(Vocabulary.parse(str(path), name, name).names)
        for number in numbers:
            if len(number) > 9 or int(number) >= len(classes):
                raise InputError(
                    f"dataset '{name}': the tar files in {root} have the label {number[:20]}, but "
                    f"classes.txt has {len(classes)} lines, from 0; complete it"
                )
        labels = np.array(numbers, int)[labels]
    shards = Shards(
        [root / tar for tar in tars],
        np.repeat(np.arange(len(tars), dtype=np.int32), [len(each) for each in members]),
        np.concatenate([each["offset"] for each in members]),
        np.concatenate([each["size"] for each in members]),
    )
    file_names = np.concatenate([each["name"] for each in members])
    return labelled_images(name, root, classes, file_names, labels, shards)


def labelled_images(
    name: str,
    root: Path,
    classes: list[str],
    file_names: Sequence[str | bytes],
    labels: np.ndarray,
    shards: Shards | None = None,
) -> Dataset:
    """Returns the dataset of I images with one label each: `labels` (I,), indices of `classes`."""
    vocabulary, label_of_class = folder_vocabulary(name, root, classes)
    repeated = len(classes) - len(vocabulary)
    log_count(root, repeated, "classes have the name of another; they are one class")
    total = len(file_names)
    index = Index.build(
        source=str(root),
        file_names=file_names,
        image_ids=range(total),
        sizes=np.zeros((total, 2)),  # only the images tell
        image_labels=label_of_class[labels],
        image_label_offsets=np.arange(total + 1),
    )
    return Dataset(name, vocabulary, index, root, supervision="image_labels", shards=shards)


def list_visible(folder: Path) -> list[str]:
    """Returns the sorted names of a folder's entries, without hidden ones."""
    return [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]


def log_count(root: Path, number: int, what: str) -> None:
    """Logs `number` and `what` if the number is not 0."""
    if number:
        log.info("%s: %d %s", root, number, what)


def refuse_no_text(name: str, root: Path, label: str) -> None:
    """Raises InputError for a class name with bytes that are not UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in label):
        raise InputError(
            f"dataset '{name}': {root} has the class {label!r}, which is no text; rename it"
        )
