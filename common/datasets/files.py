"""What the readers share: images, listings of folders, csv tables."""

import csv
import io
import json
import logging
import os
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from common.datasets.pixels import Decoded, decode_jpeg, halve_large, readable_formats, to_rgb
from common.datasets.store import write_json
from common.errors import InputError
from common.files import IMAGES, refuse_pipe

log = logging.getLogger("concord")
PHOTOS = (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw")  # of phones and cameras; not decoded
COPIES = ("@eaDir", "__MACOSX")  # folders of thumbnails and the like, beside hidden ones
HEIC = "HEIC, as iPhones write it; convert it to JPEG"
SIGNS = {  # what a file that is not decoded is, by the bytes that it has at its start
    b"ftyphei": HEIC,
    b"ftypmif1": HEIC,
    b"<!doctype": "a web page, which a failed download leaves",
    b"<html": "a web page, which a failed download leaves",
    b"version https://git-lfs": "a pointer of git-lfs; run git lfs pull",
    b"II*\0": "a TIFF of a kind that Pillow does not decode; save it as RGB of 8 bits",
    b"MM\0*": "a TIFF of a kind that Pillow does not decode; save it as RGB of 8 bits",
}


def missing_files(root: Path, names: Iterable[str], memo: Path | None = None) -> list[str]:
    """Returns those of the paths `names` below `root` that do not exist; lists each folder once.

    memo: a json file that keeps the times of the folders if nothing is missing. A later call with
          the same names does not list a folder again before it changes.
    """
    known = _read_memo(memo)
    times = {folder: at for folder, at in known.items() if at and at == _time(root / folder)}
    if known and len(times) == len(known):
        return []
    unchanged = set(times)
    listings: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder in unchanged:
            continue
        if folder not in listings:
            path = root / folder
            times[folder] = _time(path)
            listings[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        if base not in listings[folder]:
            missing.append(name)
    if memo and not missing:
        write_json(memo, times)
    return missing


def _read_memo(memo: Path | None) -> dict[str, int]:
    """Returns {folder: time}, {} if there is no memo or it is damaged."""
    try:
        return dict(json.loads(memo.read_text())) if memo else {}
    except (OSError, ValueError, TypeError):
        return {}


def _time(folder: Path) -> int:
    """Returns when a folder last changed, in ns; 0 if a further change could have the same time."""
    changed = folder.stat().st_mtime_ns if os.path.isdir(folder) else 0
    is_old = time.time_ns() - changed > 2e9  # some file systems count in two seconds
    return changed if is_old else 0


def read_image(path: Path, data: bytes | None = None) -> Tensor:
    """Reads an image as (3, H, W) uint8 RGB. `decode_image` says how, and what it raises."""
    return decode_image(path, data).image


def decode_image(path: Path, data: bytes | None = None, reduce: bool = False) -> Decoded:
    """Reads an image as 8-bit RGB, turned upright according to its EXIF tag, see `to_rgb`.

    data:   the image file, if it is not at `path`; `path` is then its name in messages
    reduce: decode a very large JPEG at half its size
    Raises InputError for a missing or broken image, and for one of more than 179 megapixels.
    """
    with open_image(path, data) as image:
        size = _upright_size(image)
        decoded = decode_jpeg(image)
        if decoded:
            return decoded
        if reduce:
            halve_large(image)
        return replace(to_rgb(image), size=size)


def read_size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    """Returns the height and width of `read_image`'s result; reads only the header."""
    with open_image(path, data) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) of an opened image after `to_rgb`."""
    exif = Image.Image.getexif(image)  # the getexif of PNG images would decode the image
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90 or 270 degrees
    return image.size if turned else image.size[::-1]


@contextmanager
def open_image(path: Path, data: bytes | None = None, kind: str = "image") -> Iterator[Image.Image]:
    """Opens an image and yields it as a PIL image, for a `with` block.

    data: the bytes of the image file; then `path` is used in messages only
    kind: what messages call the file, such as "label map"
    Only the formats in FORMATS are decoded. Pillow's warning of large images is not shown, its
    limit holds.
    Raises InputError if the image is missing or cannot be decoded, also for an error of Pillow
    inside the `with` block.
    """
    try:
        refuse_pipe(path, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            source = path if data is None else io.BytesIO(data)
            with Image.open(source, formats=readable_formats()) as image:
                yield image
    except IsADirectoryError:
        raise InputError(f"{kind} {path} is a folder; give image files") from None
    except FileNotFoundError:
        raise InputError(f"{kind} {path} does not exist; check the path") from None
    except UnidentifiedImageError:
        raise _undecodable(path, kind, f"it is {_kind(path, data)}") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise InputError(
            f"{kind} {path} has more than {limit} megapixels; make it smaller or cut it into tiles"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        why = getattr(error, "strerror", None) or str(error)  # without the path again
        raise _undecodable(path, kind, why) from None


def _kind(path: Path, data: bytes | None) -> str:
    """Tells by its first bytes what a file is that cannot be decoded. data: as `open_image`"""
    if data is None:
        with path.open("rb") as file:
            data = file.read(32)
    start = data[:32].lower()
    other = f"none of {', '.join(readable_formats())}"
    return next((kind for sign, kind in SIGNS.items() if sign.lower() in start), other)


def _undecodable(path: Path, kind: str, why: str) -> InputError:
    return InputError(f"{kind} {path} cannot be decoded ({why}); replace it or remove its entry")


def listing(name: str, root: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Lists all files below `root` with one of the `endings`.

    Returns {path without its ending: path}, relative to `root` and sorted. Hidden files and
    folders, such as .ipynb_checkpoints, and those in COPIES are left out. So are photographs that
    are not decoded; the log counts them. The keys have one Unicode form, so that an image of macOS
    is paired with its label of another system.
    Raises InputError, which names the dataset `name`, if two files differ in their ending only.
    """
    found: dict[str, str] = {}
    photos = []
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if not each.startswith(".") and each not in COPIES]
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for file in sorted(files):
            path = file if below == "." else f"{below}/{file}"
            if endings == IMAGES and file.lower().endswith(PHOTOS):
                photos.append(path)
            ending = next((e for e in endings if file.lower().endswith(e.lower())), None)
            if not ending or file.startswith("."):
                continue
            key = unicodedata.normalize("NFC", path[: -len(ending)])
            if key in found:
                both = f"{root / path} and {found[key]}"
                raise InputError(f"dataset '{name}': {both} have one name; keep one of them")
            found[key] = path
    if photos:
        message = "%s: %d photographs %s in %s are not read; convert them to JPEG (first: %s)"
        kinds = ", ".join(sorted({Path(photo).suffix for photo in photos}))
        log.warning(message, name, len(photos), kinds, root, photos[0])
    return dict(sorted(found.items()))


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file. Raises InputError if it cannot be read or is no UTF-8."""
    refuse_pipe(path, "text file")
    try:
        return path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None


def file_name(path: Path, image: dict, as_written: bool = False, looked_up: bool = False) -> str:
    """Returns the path of an image, relative to the image folder, from its record in a json file.

    LVIS has no `file_name`: the last two parts of `coco_url` are used. Objects365 writes
    images/v2/patch3/x.jpg but ships patch3/x.jpg: the last two parts are used, too.
    path:       the json file, for messages
    as_written: return the names of Objects365 unchanged
    looked_up:  an absolute path, of the machine that wrote it, loses its first slash, so that
                `look_up` finds the file below the folder
    Raises TypeError if it is no text, and InputError if it leaves the image folder or cannot be a
    file's.
    """
    name = image["file_name"] if "file_name" in image else image["coco_url"]
    if not isinstance(name, str | int):
        raise TypeError("a file_name that is no text")
    name = str(name)
    is_objects365 = name.startswith(("images/v1/", "images/v2/"))
    if "file_name" not in image or (is_objects365 and not as_written):
        name = "/".join(name.split("/")[-2:])
    if looked_up:
        name = name.lstrip("/")
    if not name or "\0" in name or "\n" in name or len(name) > 4096:
        raise InputError(
            f"{path}: file_name {name[:80]!r} ({len(name)} letters) can be no file's; give its path"
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(
            f"{path}: file_name '{name}' leaves the image folder; give a path below it"
        )
    return name


def read_table(path: Path, columns: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, values of `columns`) of each row of a csv file with a header.

    Raises InputError for a missing column, a row of another length, a file that is not csv.
    """
    rows = read_rows(path)
    header = next(rows, [])
    names = ", ".join(columns)
    for column in columns:
        if column not in header:
            raise InputError(
                f"{path}: column '{column}' is missing; the first line must name {names}"
            )
    places = [header.index(column) for column in columns]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            count = f"{len(row)} of {len(header)} columns"
            raise InputError(f"{path}: line {number} has {count}; was the file cut off?")
        yield number, [row[place] for place in places]


def read_rows(path: Path) -> Iterator[list[str]]:
    """Yields the rows of a csv file. Raises InputError if it is not csv."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a csv file ({error}); download it again") from None
