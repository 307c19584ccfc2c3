"""Finds the files of names that another machine or program has spelt otherwise."""

import difflib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

COMPARED = 20_000  # files among which the nearest one is looked for


@dataclass
class Lookup:
    """The files of some names.

    respelt: {name: file} of those that are there in another spelling
    missing: the names without a file
    nearest: the file whose name is most like that of the first missing one, "" if none is
    """

    respelt: dict[str, str]
    missing: list[str]
    nearest: str = ""


def look_up(root: Path, missing: Collection[str], present: Collection[str]) -> Lookup:
    """Looks below `root` for files that the names `missing` may mean.

    A name may have backslashes, %20 and the like, a leading ./, letters of another case or another
    Unicode form, and folders before those below `root`, as an absolute path of another machine. A
    file is used if it is the only one that fits a name, and if no other name is that of the file.

    present: the names that are files
    """
    files = _list_files(root)
    by_base = defaultdict(list)
    for file in files:
        parts = _parts(file)
        by_base[parts[-1]].append((parts, file))
    found = {}
    for name in missing:
        parts = _parts(unquote(name))
        fitting = {
            file
            for file_parts, file in by_base.get(parts[-1] if parts else "", ())
            if parts[-len(file_parts) :] == file_parts
        }
        if len(fitting) == 1:
            found[name] = fitting.pop()
    times = Counter(found.values())
    taken = set(present)
    found = {name: file for name, file in found.items() if times[file] == 1 and file not in taken}
    lost = [name for name in missing if name not in found]
    return Lookup(found, lost, _nearest(lost[0], files) if lost else "")


def _list_files(root: Path) -> list[str]:
    """Returns the paths of all files below `root`."""
    files = []
    for folder, _, names in os.walk(root):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        files += [prefix + name for name in sorted(names)]
    return files


def _parts(path: str) -> list[str]:
    """Splits a path into parts of one case and Unicode form, without "." and empty ones."""
    path = unicodedata.normalize("NFC", path).casefold()
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def _nearest(name: str, files: list[str]) -> str:
    """Returns the file with the most similar name; "" if none is similar. Its folder is ignored."""
    base = name.replace("\\", "/").rpartition("/")[2]
    bases = {file.rpartition("/")[2]: file for file in files[:COMPARED]}
    near = difflib.get_close_matches(base, bases, n=1, cutoff=0.6) if base else []
    return bases[near[0]] if near else ""
