"""Names of WordNet ids, ImageNet's class folders."""

import re
from pathlib import Path

from common.datasets.files import read_table
from common.errors import InputError

WNID = re.compile(r"n\d{8}")


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
        raise InputError(
            f"{path} cannot be read ({error}); it should be lines of id, tab, synonyms"
        ) from None
    return {wnid.strip(): synonyms.split(",")[0].strip() for wnid, _, synonyms in rows}
