"""One folder or tar file of images per class: ImageNet's layout and anyone's own. Image labels, no boxes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES
from common.datasets.index import Index
from common.datasets.readers.wordnet import class_names
from common.datasets.shards import Shards, index_tar
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")
LISTS = ("classes.txt", "classes.csv", "words.txt")  # name the classes


def read_folder(name: str, root: Path) -> Dataset:
    """Read `root`/CLASS/IMAGE or, where there are any, the tar files in `root`; sorted, without the hidden ones.

    A folder named by a WordNet id takes its name from classes.csv or words.txt in `root` or above; ids of one name are
    one class. Empty folders, what is no folder and files that are no images are left out and counted in the log.
    Raises InputError for no folder, no image in any, an id without a name, a name that is no text.
    """
    if not root.is_dir():
        raise InputError(f"dataset '{name}': folder {root} does not exist; check the path")
    entries = [name for name in sorted(os.listdir(root)) if not name.startswith(".")]
    if tars := [name for name in entries if name.endswith(".tar") and os.path.isfile(root / name)]:
        log_count(
            root,
            len(set(entries).difference(tars, LISTS)),
            "entries beside the tar files are left out",
        )
        return read_tars(name, root, tars)
    files, others = {}, 0
    class_folders = [
        name for name in entries if os.path.isdir(root / name)
    ]  # False for a link that leads nowhere
    for folder in class_folders:
        refuse_no_text(name, root, folder)
        found = [file for file in sorted(os.listdir(root / folder)) if not file.startswith(".")]
        files[folder] = [file for file in found if file.lower().endswith(IMAGES)]
        others += len(found) - len(files[folder])
    folders = [folder for folder in files if files[folder]]
    if not folders:
        what = "the folders in it hold no images" if files else "it has no folders"
        raise InputError(f"dataset '{name}': {root} needs a folder or a tar file of images for each class, but {what}; "
                         "name the folder above or below")  # fmt: skip
    log_count(root, len(files) - len(folders), "class folders without an image are left out")
    log_count(
        root,
        len(set(entries).difference(class_folders, LISTS)),
        "entries beside the class folders are left out",
    )
    log_count(root, others, "files that are no images are left out")
    file_names = [f"{folder}/{file}" for folder in folders for file in files[folder]]
    labels = np.repeat(np.arange(len(folders)), [len(files[folder]) for folder in folders])
    return labelled_images(name, root, folders, file_names, labels)


def read_tars(name: str, root: Path, tars: list[str]) -> Dataset:
    """Read the images in `tars`, below `root`, whose labels are as `read_members` says.

    Labels that are all numbers are lines of classes.txt, from 0. Tars without an image and images without a label are
    left out and counted in the log. Raises InputError for a damaged tar, no image in any, a number without a name.
    """
    bar = tqdm(tars, "headers of tar files", unit="tar", delay=2, leave=False, disable=None)
    members = [index_tar(root / tar) for tar in bar]
    log_count(
        root, sum(len(each) == 0 for each in members), "tar files without an image are left out"
    )
    log_count(
        root,
        sum(int((each["label"] == b"").sum()) for each in members),
        "images without a label are left out",
    )
    members = [each[each["label"] != b""] for each in members]
    # sorted for each tar first: together they can be many millions
    parts = [np.unique(each["label"], return_inverse=True) for each in members]
    texts = np.array(sorted({text for unique, _ in parts for text in unique.tolist()}))
    if not len(texts):
        raise InputError(
            f"dataset '{name}': the tar files in {root} hold no images with labels; name another folder"
        )
    classes = [os.fsdecode(text) for text in texts.tolist()]
    for label in classes:
        refuse_no_text(name, root, label)
    labels = np.concatenate([np.searchsorted(texts, unique)[inverse] for unique, inverse in parts])
    if all(label.isdecimal() for label in classes):
        numbers, classes = classes, read_class_list(name, root)
        for number in numbers:
            if len(number) > 9 or int(number) >= len(classes):
                raise InputError(f"dataset '{name}': the tar files in {root} have the label {number[:20]}, but "
                                 f"classes.txt has {len(classes)} lines, from 0; complete it")  # fmt: skip
        labels = np.array(numbers, int)[labels]
    tar_of = np.repeat(np.arange(len(tars), dtype=np.int32), [len(each) for each in members])
    offsets, sizes = (
        np.concatenate([each[column] for each in members]) for column in ("offset", "size")
    )
    shards = Shards([root / tar for tar in tars], tar_of, offsets, sizes)
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
    """The dataset of images with one label each: `labels` (I,) index `classes`, of which those of one name are one."""
    names = class_names(root, classes)
    label_of = {label: i for i, label in enumerate(dict.fromkeys(names))}
    log_count(
        root, len(names) - len(label_of), "classes have the name of another; they are one class"
    )
    total = len(file_names)
    index = Index.build(
        source=str(root),
        file_names=file_names,
        image_ids=range(total),
        sizes=np.zeros((total, 2)),  # only the images tell
        image_labels=np.array([label_of[label] for label in names], dtype=np.int32)[labels],
        image_label_offsets=np.arange(total + 1),
    )
    ids = dict(zip(reversed(names), reversed(classes)))  # the first folder of each class
    vocabulary = Vocabulary(name, tuple(label_of), tuple(ids[label] for label in label_of))
    return Dataset(name, vocabulary, index, root, supervision="image_labels", shards=shards)


def log_count(root: Path, number: int, what: str) -> None:
    if number:
        log.info("%s: %d %s", root, number, what)


def refuse_no_text(name: str, root: Path, label: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in label):  # bytes that are no UTF-8
        raise InputError(
            f"dataset '{name}': {root} has the class {label!r}, which is no text; rename it"
        )


def read_class_list(name: str, root: Path) -> list[str]:
    path = root / "classes.txt"
    if not path.is_file():
        raise InputError(f"dataset '{name}': the tar files in {root} have numbers for labels; name the classes in "
                         f"{path}, one per line from 0")  # fmt: skip
    return list(Vocabulary.parse(str(path), name, f"dataset '{name}'").names)
