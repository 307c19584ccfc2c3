"""Finds and reads what --predict names: image files, folders, patterns, and videos."""

import glob
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common.datasets.files import IMAGES, decode_image
from common.datasets.pixels import Decoded
from common.errors import InputError
from common.files import refuse_pipe

log = logging.getLogger("concord")

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
CONTAINERS = "mov,mp4,avi,matroska,webm"  # FFmpeg's names of what it may take a video for
MAX_PIXELS = 2**27  # of a frame, 134 megapixels


# -- Names to files --------------------------------------------------------------------------------


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


# -- Files to images -------------------------------------------------------------------------------


def read_file(path: str) -> Iterator[tuple[int | None, Decoded]]:
    """Yields (None, the image) of an image file, or (number, frame) of all frames of a video.

    Frames count from 0. Raises InputError for a file that cannot be read, also after some frames.
    """
    if is_video(path):
        yield from video_frames(path)
    else:
        yield None, decode_image(Path(path), reduce=True)


def video_frames(path: str) -> Iterator[tuple[int, Decoded]]:
    """Yields (number, frame) of a video, upright. Needs PyAV.

    FFmpeg gets an open file, and may take it for CONTAINERS alone: a playlist that is named .mp4
    would make it open other files and addresses. Raises InputError for a file that cannot be read.
    """
    import av

    refuse_pipe(Path(path), "video")
    number = -1
    limits = {"format_whitelist": CONTAINERS}
    try:
        with open(path, "rb") as file, av.open(file, container_options=limits) as container:
            if not container.streams.video:
                raise InputError(f"video {path} has sound alone; give one with pictures")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            for number, frame in enumerate(container.decode(stream)):
                yield number, _upright(frame)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"video {path} cannot be decoded after {number + 1} frames ({error}); replace it"
        ) from None
    if number < 0:
        raise InputError(f"video {path} has no frame that can be decoded; replace it")


def _upright(frame) -> Decoded:
    """Converts a frame of PyAV, turned as its video says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90)
    pixels = np.rot90(pixels, quarters)  # counterclockwise, as the rotation
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return Decoded(image, tuple(image.shape[-2:]))
