"""Finds what --predict names: image files, folders, patterns, and videos.

No module that it imports needs torch, whose import takes seconds.
"""

import glob
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Sequence

from common.errors import InputError
from common.files import IMAGES

log = logging.getLogger("concord")

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def find_files(names: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """Lists the files that `names` stand for, in their order, and what is wrong with the others.

    A name is a file, a folder or a pattern ("photos/**/*.jpg"); ~ is the home folder. Of a folder,
    the images and videos directly in it are taken. What else is in it is counted in the log, and so
    it is with a pattern.

    Returns paths, and the lines that say why others cannot be used, each with their number.
    """
    paths = []
    problems = Counter()
    for name in names:
        try:
            paths += _files_of(name)
        except InputError as error:
            problems[str(error)] += 1
    videos = [path for path in paths if is_video(path)]
    if videos and not importlib.util.find_spec("av"):
        needed = "needs" if len(videos) == 1 else f"and {len(videos) - 1} more need"
        problems[f"video {videos[0]} {needed} PyAV; install it: pip install av"] = len(videos)
        paths = [path for path in paths if not is_video(path)]
    return paths, problems


def is_video(path: str) -> bool:
    """Tells whether the ending of a path is that of a video."""
    return path.lower().endswith(VIDEOS)


def _files_of(name: str) -> list[str]:
    """Returns the files of `name`, a file, folder or pattern. Raises InputError if it has none."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        entries = [os.path.join(path, entry) for entry in os.listdir(path)]
        return _readable(name, entries)
    if os.path.lexists(path):
        return [path]
    if "://" in name:
        raise InputError(f"--predict {name} is an address; download the file and name its path")
    if glob.has_magic(path):
        return _readable(name, glob.glob(path, recursive=True))
    raise InputError(f"image {name} does not exist; check the path")


def _readable(name: str, entries: list[str]) -> list[str]:
    """Returns the images and videos among `entries`, sorted, and counts the others in the log."""
    found = []
    others = Counter()
    for entry in sorted(entries):
        is_hidden = os.path.basename(entry).startswith(".")
        if os.path.isdir(entry):
            others["folder"] += 1
        elif entry.lower().endswith((*IMAGES, *VIDEOS)) and not is_hidden:
            found.append(entry)
        else:
            others["other file"] += 1
    counts = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in others.items()]
    left_out = " and ".join(counts)
    if not found:
        endings = " ".join((*IMAGES, *VIDEOS))
        beside = f", but {left_out}" if left_out else ""
        raise InputError(
            f"--predict {name}: there is no image or video{beside}; it needs {endings}"
        )
    if left_out:
        log.info("%s: %d images and videos; left out: %s", name, len(found), left_out)
    return found


def check_names(names: Sequence[str]) -> None:
    """Raises InputError if `names` is a single file that cannot be used, as it looks from outside.

    Of several, the others are still to be predicted.
    """
    files, problems = find_files(names)
    if not files and problems.total() == 1:
        raise InputError(*problems)
