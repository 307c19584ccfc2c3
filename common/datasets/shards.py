"""Reads images from tar files. The members of each are indexed once, and read by seek."""

import gzip
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import orjson
from filelock import FileLock
from tqdm import tqdm

from common.datasets.files import IMAGES
from common.datasets.index import encoded
from common.datasets.store import waiting
from common.errors import InputError
from common.files import NO_ARRAY, atomic_path, cache_dir

log = logging.getLogger("concord")

# bounds of what a member may take in memory; real ones are far below
LARGEST_IMAGE = 2**28  # bytes
LARGEST_LABEL = 2**20
LABELS = (".cls", ".json")  # endings
TOO_LARGE = f"an image of more than {LARGEST_IMAGE >> 20} MiB"


@dataclass
class Shards:
    """Reads I images that are members of tar files.

    tars:    the paths of the tar files
    tar_of:  (I,) int32, for each image the index of its tar file; -1: it is in none
    offsets: (I,) int64, the byte of the tar file at which the image begins
    sizes:   (I,) int64, the number of bytes of the image
    """

    tars: Sequence[Path]
    tar_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, i: int) -> bytes:
        """Returns the content of the image file `i`.

        Some files of ImageNet-21K are gzip files that are named .JPEG: they are unzipped.
        The tar file is opened for each image. That takes 20 microseconds (decoding a small image
        takes 700), and no open file has to be shared between processes.
        Raises InputError for a tar file that cannot be read, for an image that is in none, and for
        one that has more than LARGEST_IMAGE bytes unzipped.
        Source: facebookresearch/Detic:detic/data/tar_dataset.py (gzip).
        """
        if self.tar_of[i] < 0:
            raise InputError(f"image {i} is in none of the tar files {self.tars[0]}, ...; add it")
        path = self.tars[self.tar_of[i]]
        try:
            with path.open("rb") as file:
                file.seek(self.offsets[i])
                data = file.read(self.sizes[i])
            return _unzipped(data) if data.startswith(b"\x1f\x8b") else data
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"shard {path} cannot be read at byte {self.offsets[i]} ({error}); copy or "
                "download it again"
            ) from None

    def select(self, images: np.ndarray) -> "Shards":
        """Returns only the images where `images` (I,) bool is true, or those with these numbers."""
        columns = (self.tar_of, self.offsets, self.sizes)
        return Shards(self.tars, *(column[images] for column in columns))


def _unzipped(data: bytes) -> bytes:
    """Unzips gzip data. Raises OSError if the result has more than LARGEST_IMAGE bytes."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        image = file.read(LARGEST_IMAGE + 1)
    if len(image) > LARGEST_IMAGE:
        raise OSError(TOO_LARGE)
    return image


def find_tars(place: Path) -> list[Path]:
    """Returns the tar files at `place`: it is one, or the folder that holds them, or has braces.

    In shards-{000..012}.tar the braces stand for each number. A folder counts if it holds tar files
    and neither folders nor images. Returns [] for any other place.
    """
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", str(place)):
        first, last = braces.groups()
        numbers = range(int(first), int(last) + 1)
        start, end = str(place)[: braces.start()], str(place)[braces.end() :]
        return [Path(f"{start}{number:0{len(first)}d}{end}") for number in numbers]
    if place.suffix == ".tar":
        return [place]
    if not os.path.isdir(place):
        return []
    tars = []
    with os.scandir(place) as inside:
        for entry in inside:
            if entry.name.lower().endswith(IMAGES) or entry.is_dir():
                return []
            if entry.name.endswith(".tar") and not entry.name.startswith("."):
                tars.append(place / entry.name)
    return sorted(tars)


def images_in_tars(names: np.ndarray, tars: Sequence[Path]) -> tuple[Shards, int]:
    """Finds the images `names` (I,) bytes in tar files; also returns how many others are there.

    A name is the path of a member. One that is none is looked for by its last part, if no other
    name and no other member has that. Raises InputError for a tar file that is missing or damaged,
    and for a path that two members have.
    """
    for path in tars:
        if not path.is_file():
            raise InputError(
                f"shard {path} does not exist; check the path, or the numbers in braces"
            )
    bar = tqdm(tars, "headers of tar files", unit="tar", delay=2, leave=False, disable=None)
    members = [index_tar(path, labelled=False) for path in bar]
    paths = encoded([name for each in members for name in each["name"].tolist()])
    unique, counts = np.unique(paths, return_counts=True)
    if (counts > 1).any():
        twice = os.fsdecode(unique[counts > 1][0])
        raise InputError(f"shards {tars[0]}, ...: two members are '{twice}'; keep one of them")
    found = _places(names, paths)
    left = np.flatnonzero(found < 0)
    if len(left) and len(paths):
        last_parts = encoded([name.rpartition(b"/")[2] for name in paths.tolist()])
        wanted = encoded([name.rpartition(b"/")[2] for name in names[left].tolist()])
        known, counts = np.unique(last_parts, return_counts=True)
        asked, times = np.unique(wanted, return_counts=True)
        clear = np.isin(wanted, known[counts == 1]) & np.isin(wanted, asked[times == 1])
        rows = _places(wanted, last_parts)
        clear &= ~np.isin(rows, found)
        found[left[clear]] = rows[clear]
    shards = Shards(
        tars,
        np.repeat(np.arange(len(tars), dtype=np.int32), [len(each) for each in members]),
        np.concatenate([each["offset"] for each in members]),
        np.concatenate([each["size"] for each in members]),
    )
    if not len(paths):
        none = np.full(len(names), -1, np.int32)
        return Shards(tars, none, none.astype(np.int64), none.astype(np.int64)), 0
    shards = shards.select(found)
    shards.tar_of[found < 0] = -1
    return shards, len(paths) - int((found >= 0).sum())


def _places(names: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """Returns (I,) the place of each of `names` (I,) in `paths` (M,), -1 if it is not there."""
    if not len(paths):
        return np.full(len(names), -1)
    order = np.argsort(paths)
    place = np.searchsorted(paths, names, sorter=order).clip(max=len(paths) - 1)
    return np.where(paths[order[place]] == names, order[place], -1)


def index_tar(path: Path, labelled: bool = True) -> np.ndarray:
    """Lists the images of a tar file, from a cache until its size or time changes.

    One process reads the headers, others wait.
    labelled: as `read_members`; else as `read_images`
    """
    stat = path.stat()
    kind = "members" if labelled else "images"
    key = json.dumps([kind, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(key.encode()).hexdigest()
    cached = cache_dir() / "shards" / f"{digest[:32]}.npy"
    read = read_members if labelled else read_images
    try:
        return np.load(cached, allow_pickle=False)
    except NO_ARRAY:
        pass
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with waiting(FileLock(cached.with_suffix(".lock")), path):
            try:
                return np.load(cached, allow_pickle=False)
            except NO_ARRAY:
                members = read(path)
            with atomic_path(cached) as temporary:
                np.save(temporary, members)
            return members
    except OSError as error:
        message = "%s cannot be written, so the headers of %s are read at each start (%s)"
        log.warning(message, cached, path, error)
    return read(path)


def read_images(path: Path) -> np.ndarray:
    """Returns an array (M,) of records name, offset, size: the images in a tar file.

    A name is the path of the member, in bytes. Raises InputError as `read_members`, but for labels.
    """
    images, _, num_others = _read_headers(path, labelled=False)
    if num_others:
        log.info("%s: %d members that are no images are left out", path, num_others)
    rows = [(os.fsencode(name), offset, size) for _, name, offset, size in images]
    width = max((len(name) for name, *_ in rows), default=1)
    return np.array(rows, dtype=[("name", f"S{width}"), ("offset", "i8"), ("size", "i8")])


def read_members(path: Path) -> np.ndarray:
    """Returns an array (M,) of records name, label, offset, size: the images in a tar file.

    Names and labels are bytes. A name is TAR/MEMBER. The label of KEY.jpg is the text of KEY.cls or
    the field "label" of KEY.json, or else b"". If the tar file has no labels, all its images have
    its name without .tar as their label.
    Raises InputError for a tar file that is damaged or compressed, for a member outside of its
    folder, sparse or too long, for a label that is neither a name nor a number, and for a tar file
    without labels whose name is a number.
    """
    images, labels, num_others = _read_headers(path)
    if images and not labels and path.stem.isdigit():
        raise InputError(
            f"shard {path}: a number is no class, and the images have no label beside them; add "
            "KEY.cls or KEY.json with a 'label', or name the tar by its class"
        )
    if labels:  # pairs KEY.jpg and KEY.cls; a KEY.mask.png is another part of the sample
        plain = [
            (key, name, *span) for key, name, *span in images if name[len(key) :].lower() in IMAGES
        ]
        num_others += len(images) - len(plain)
        images = plain
    else:
        labels = dict.fromkeys((key for key, *_ in images), os.fsencode(path.stem))
    if num_others:
        log.info("%s: %d members that are neither images nor labels are left out", path, num_others)
    rows = []
    for key, name, offset, size in images:
        rows.append((os.fsencode(f"{path.name}/{name}"), labels.get(key, b""), offset, size))
    name_width = max((len(name) for name, *_ in rows), default=1)
    label_width = max((len(label) for _, label, *_ in rows), default=1)
    columns = [("name", f"S{name_width}"), ("label", f"S{max(label_width, 1)}")]
    return np.array(rows, dtype=[*columns, ("offset", "i8"), ("size", "i8")])


def _read_headers(path: Path, labelled: bool = True) -> tuple[list[tuple], dict[str, bytes], int]:
    """Returns the images and the labels in a tar file, and the number of its other files.

    If not `labelled`, no label is read.
    images: (key, path of the member, offset, size); the key is the path without all its endings
    labels: {key: label}
    """
    images, labels, num_others = [], {}, 0
    try:
        with tarfile.open(path, "r:") as tar:  # the colon: a compressed file has no offsets
            # at the end of an empty tar file, tarfile of Python 3.10 cannot read on
            for member in iter(tar.next, None) if tar.offset else ():
                tar.members = []  # otherwise the headers of all images stay in memory
                place = PurePosixPath(member.name)
                _check_member(path, member)
                if not member.isfile() or place.name.startswith("."):
                    continue
                key = str(place.with_name(place.name.partition(".")[0]))
                if place.suffix.lower() in IMAGES:
                    images.append((key, str(place), member.offset_data, member.size))
                elif labelled and place.suffix in LABELS:
                    label = _read_label(path, member.name, tar.extractfile(member).read())
                    if label and (place.suffix == ".cls" or key not in labels):
                        labels[key] = label
                else:
                    num_others += 1
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
            if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
    except (OSError, ValueError, OverflowError, MemoryError, tarfile.TarError) as error:
        raise InputError(
            f"shard {path} is no whole tar file, or a compressed one ({error}); unzip or download "
            "it again"
        ) from None
    return images, labels, num_others


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raises InputError for a member outside its folder, a sparse one, or one too long to read."""
    place = PurePosixPath(member.name)
    shard = f"shard {path}: member '{member.name}'"
    if place.is_absolute() or ".." in place.parts:
        raise InputError(f"{shard} leaves the folder; pack it anew")
    if member.isfile() and member.issparse():  # a few bytes may stand for terabytes
        raise InputError(f"{shard} is sparse; pack it without --sparse")
    limit = LARGEST_LABEL if place.suffix in LABELS else LARGEST_IMAGE
    if place.suffix in (*LABELS, *IMAGES) and member.size > limit:
        raise InputError(f"{shard} has {member.size} bytes, and {limit} are the most; leave it out")


def _read_label(path: Path, name: str, data: bytes) -> bytes:
    """Returns the label in the .cls or .json member `name`; b"" for a json without one.

    Raises InputError for a label that is neither a name nor a number.
    """
    try:
        record = {"label": data.decode()} if name.endswith(".cls") else orjson.loads(data)
        label = record.get("label", "") if isinstance(record, dict) else ""
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError(label)
    except ValueError as error:
        raise InputError(
            f"shard {path}: member '{name}' holds no label, a name or a number ({error}); mend it "
            "and pack the tar anew"
        ) from None
    return str(label).strip().encode()
