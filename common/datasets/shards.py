"""Images inside of tar files: an index of the members, made once for each tar, and reading by seek."""

import gzip
import hashlib
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import orjson

from common.datasets.files import IMAGES
from common.errors import InputError
from common.files import NO_ARRAY, atomic_path, cache_dir

log = logging.getLogger("concord")


@dataclass
class Shards:
    """I images that are members of tar files.

    tars:    their paths
    tar_of:  (I,) int32, which of them
    offsets, sizes: (I,) int64 bytes
    """

    tars: Sequence[Path]
    tar_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, i: int) -> bytes:
        """The file that image `i` was; unzipped, as ImageNet-21K has some gzip files that are named .JPEG.

        The tar is opened anew each time: that takes 20 microseconds, while decoding a small image takes 700, and there
        is no open file to share between processes or to run out of. Raises InputError for a tar that cannot be read.
        Source: facebookresearch/Detic:detic/data/tar_dataset.py (gzip).
        """
        path = self.tars[self.tar_of[i]]
        try:
            with path.open("rb") as file:
                file.seek(self.offsets[i])
                data = file.read(self.sizes[i])
            return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"shard {path} cannot be read at byte {self.offsets[i]} ({error}); "
                             "copy or download it again") from None  # fmt: skip


def index_tar(path: Path) -> np.ndarray:
    """(M,) records name, label, offset, size of the images in a tar file; kept in the cache until the tar changes.

    Names and labels are bytes; a name starts with that of the tar. Raises InputError as `read_members` does.
    """
    stat = path.stat()
    key = json.dumps(["members", str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    cached = cache_dir() / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    try:
        return np.load(cached, allow_pickle=False)
    except NO_ARRAY:
        members = read_members(path)
    try:
        with atomic_path(cached) as temporary:
            np.save(temporary, members)
    except OSError as error:
        log.warning(
            "%s cannot be written, so the headers of %s are read at each start (%s)",
            cached,
            path,
            error,
        )
    return members


def read_members(path: Path) -> np.ndarray:
    """As `index_tar`, from the headers of the tar and the labels beside its images.

    The label of KEY.jpg is the text of KEY.cls or the field "label" of KEY.json, b"" if it has none but others do; if
    no image has one, the tar is a class and its name the label. Raises InputError for a tar that is damaged or
    compressed, a member outside of the folder, a label that is no text, a number as the name of a class.
    """
    images, labels, others = [], {}, 0
    try:
        with tarfile.open(path, "r:") as tar:  # the colon: not compressed, else there is no seeking
            for member in iter(tar.next, None):
                tar.members = []  # else the headers of all images stay in memory
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts:
                    raise InputError(
                        f"shard {path}: member '{member.name}' leaves the folder; pack it anew"
                    )
                if not member.isfile() or place.name.startswith("."):
                    continue
                key = str(place.with_name(place.name.partition(".")[0]))
                if place.suffix.lower() in IMAGES:
                    images.append((key, str(place), member.offset_data, member.size))
                elif place.suffix in (".cls", ".json"):
                    label = read_label(path, member.name, tar.extractfile(member).read())
                    if label and (place.suffix == ".cls" or key not in labels):
                        labels[key] = label
                else:
                    others += 1
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(
                tarfile.BLOCKSIZE
            ):  # tarfile itself ends in silence
                raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise InputError(f"shard {path} is no whole tar file, or a compressed one ({error}); unzip or download it "
                         "again") from None  # fmt: skip
    if images and not labels and path.stem.isdigit():
        raise InputError(f"shard {path}: a number is no class, and the images have no label beside them; add "
                         "KEY.cls or KEY.json with a 'label', or name the tar by its class")  # fmt: skip
    if labels:  # pairs KEY.jpg and KEY.cls; a KEY.mask.png is another part of the sample
        plain = [
            image
            for image in images
            if "." + PurePosixPath(image[1]).name.partition(".")[2].lower() in IMAGES
        ]
        images, others = plain, others + len(images) - len(plain)
    if others:
        log.info("%s: %d members that are neither images nor labels are left out", path, others)
    if not labels:
        labels = dict.fromkeys((key for key, *_ in images), os.fsencode(path.stem))
    rows = [
        (os.fsencode(f"{path.name}/{name}"), labels.get(key, b""), *span)
        for key, name, *span in images
    ]
    widths = [max((len(row[column]) for row in rows), default=1) for column in (0, 1)]
    columns = [
        ("name", f"S{widths[0]}"),
        ("label", f"S{max(widths[1], 1)}"),
        ("offset", "i8"),
        ("size", "i8"),
    ]
    return np.array(rows, dtype=columns)


def read_label(path: Path, name: str, data: bytes) -> bytes:
    """The label in the .cls or .json member `name`; b"" for a json without one. Raises InputError for what is none."""
    try:
        record = {"label": data.decode()} if name.endswith(".cls") else orjson.loads(data)
        label = record.get("label", "") if isinstance(record, dict) else ""
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError(label)
    except ValueError as error:
        raise InputError(f"shard {path}: member '{name}' holds no label, a name or a number ({error}); mend it and "
                         "pack the tar anew") from None  # fmt: skip
    return str(label).strip().encode()
