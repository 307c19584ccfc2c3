"""One folder of images per class: ImageNet's layout and anyone's own. Image labels, no boxes."""

import logging
import os
import re
from pathlib import Path

import numpy as np

from common.datasets.base import Dataset
from common.datasets.index import Index
from common.datasets.openimages import read_table
from common.errors import InputError
from common.labels import Vocabulary

log = logging.getLogger("concord")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
WNID = re.compile(r"n\d{8}")


def read_folder(name: str, root: Path) -> Dataset:
    """Read `root`/CLASS/IMAGE; folders and files come in sorted order, hidden ones are ignored.

    A folder named by a WordNet id takes its name from classes.csv or words.txt in `root` or above; ids of one name are
    one class. Empty folders, what is no folder and files that are no images are left out and counted in the log.
    Raises InputError for no folder, no image in any, an id without a name, a name that is no text.
    """
    if not root.is_dir():
        raise InputError(f"dataset '{name}': folder {root} does not exist; check the path")
    files, others = {}, 0
    entries = [name for name in sorted(os.listdir(root)) if not name.startswith(".")]
    class_folders = [name for name in entries if os.path.isdir(root / name)]  # False for a link that leads nowhere
    for folder in class_folders:
        if any("\ud800" <= letter <= "\udfff" for letter in folder):  # bytes that are no UTF-8
            raise InputError(f"dataset '{name}': {root} has the class folder {folder!r}, which is no text; rename it")
        found = [file for file in sorted(os.listdir(root / folder)) if not file.startswith(".")]
        files[folder] = [file for file in found if file.lower().endswith(IMAGES)]
        others += len(found) - len(files[folder])
    folders = [folder for folder in files if files[folder]]
    if not folders:
        what = "the folders in it hold no images" if files else "it has no folders"
        raise InputError(f"dataset '{name}': {root} needs a folder of images for each class, but {what}; unpack .tar "
                         "files, or name the folder above or below")  # fmt: skip
    names = class_names(root, folders)
    label_of = {label: i for i, label in enumerate(dict.fromkeys(names))}
    counts = [len(files[folder]) for folder in folders]
    for count, what in (
        (len(files) - len(folders), "class folders without an image are left out"),
        (len(entries) - len(class_folders), "entries beside the class folders are left out"),
        (others, "files that are no images are left out"),
        (len(folders) - len(label_of), "class folders have the name of another; they are one class"),
    ):
        if count:
            log.info("%s: %d %s", root, count, what)
    total = sum(counts)
    index = Index.build(
        source=str(root),
        file_names=[f"{folder}/{file}" for folder in folders for file in files[folder]],
        image_ids=range(total),
        sizes=np.zeros((total, 2)),  # only the images tell
        image_of=[],
        boxes=[],
        labels=[],
        areas=[],
        ignore=[],
        image_labels=np.repeat([label_of[label] for label in names], counts).astype(np.int32),
        image_label_offsets=np.arange(total + 1),
    )
    ids = dict(zip(reversed(names), reversed(folders)))  # the first folder of each class
    vocabulary = Vocabulary(name, tuple(label_of), tuple(ids[label] for label in label_of))
    return Dataset(name, vocabulary, index, root, supervision="image_labels")


def class_names(root: Path, folders: list[str]) -> list[str]:
    """The class name of each folder. Raises InputError for a WordNet id that no file names."""
    if not any(WNID.fullmatch(folder) for folder in folders):
        return folders
    known = {}
    for place in (root.parent, root):  # the nearer one decides
        if (file := place / "words.txt").is_file():
            known |= read_words(file)
        if (file := place / "classes.csv").is_file():
            known |= {wnid: name.strip() for _, (wnid, name) in read_table(file, ["wnid", "name"])}
    unnamed = [folder for folder in folders if WNID.fullmatch(folder) and not known.get(folder)]
    if unnamed:
        raise InputError(
            f"{root / unnamed[0]} is a WordNet id without a name ({len(unnamed)} such folders); list it in "
            f"{root / 'classes.csv'} (columns wnid,name) or words.txt (id, tab, synonyms)"
        )
    return [known[folder] if WNID.fullmatch(folder) else folder for folder in folders]


def read_words(path: Path) -> dict[str, str]:
    """WordNet id -> the first of its synonyms, from lines such as 'n01440764<tab>tench, Tinca tinca'."""
    try:
        rows = [line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); it should be lines of id, tab, synonyms") from None
    return {wnid.strip(): synonyms.split(",")[0].strip() for wnid, _, synonyms in rows}
