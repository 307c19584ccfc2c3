"""Names classes by their folders, which are WordNet ids, as in ImageNet, or plain names."""

import re
from pathlib import Path

import numpy as np

from common.datasets.files import read_table
from common.errors import InputError
from common.labels import Vocabulary

WNID = re.compile(r"n\d{8}")


def folder_vocabulary(
    dataset: str, root: Path, folders: list[str]
) -> tuple[Vocabulary, np.ndarray]:
    """Returns the vocabulary of the class `folders` in `root`, and the label of each folder, int32.

    Folders with the same class name are one class. Its id is the first of these folders.
    """
    names = class_names(root, folders)
    id_of = dict(zip(reversed(names), reversed(folders)))
    label_of = {name: label for label, name in enumerate(dict.fromkeys(names))}
    ids = tuple(id_of[name] for name in label_of)
    vocabulary = Vocabulary(dataset, tuple(label_of), ids, source=str(root))
    return vocabulary, np.array([label_of[name] for name in names], dtype=np.int32)


def class_names(root: Path, folders: list[str]) -> list[str]:
    """Returns the class name of each folder: the name of its WordNet id, or else the folder's own.

    The names of ids are read from words.txt and classes.csv in `root` and its parent.
    Raises InputError for a WordNet id without a name.
    """
    ids = [folder for folder in folders if WNID.fullmatch(folder)]
    if not ids:
        return folders
    known = {}
    for place in (root.parent, root):  # names in `root` replace those in its parent
        words, table = place / "words.txt", place / "classes.csv"
        if words.is_file():
            known |= read_words(words)
        if table.is_file():
            known |= {wnid: name.strip() for _, (wnid, name) in read_table(table, ["wnid", "name"])}
    unnamed = [wnid for wnid in ids if not known.get(wnid)]
    if unnamed:
        raise InputError(
            f"{root / unnamed[0]} is a WordNet id without a name ({len(unnamed)} such folders); "
            f"list it in {root / 'classes.csv'} (columns wnid,name) or words.txt (id, tab, names)"
        )
    return [known[folder] if WNID.fullmatch(folder) else folder for folder in folders]


def read_words(path: Path) -> dict[str, str]:
    """Returns {WordNet id: first synonym} of lines like 'n01440764<tab>tench, Tinca tinca'."""
    try:
        rows = [line.partition("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    return {wnid.strip(): synonyms.split(",")[0].strip() for wnid, _, synonyms in rows}
