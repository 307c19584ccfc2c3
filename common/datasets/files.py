"""Files of a dataset: images, listings, tables."""

import csv
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from common.datasets.store import write_json
from common.errors import InputError
from common.files import refuse_pipe

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def missing_files(root: Path, names: Iterable[str], memo: Path | None = None) -> list[str]:
    """Those of the names that are not below `root`; one directory listing for each folder.

    memo: a json file for the times of the folders when nothing was missing, for the same names; none of these folders
          is listed again before it changes
    """
    known = _read_memo(memo)
    same = {folder: at for folder, at in known.items() if at and at == _time(root / folder)}
    if known and len(same) == len(known):
        return []
    listings: dict[str, set[str]] = {}
    times, missing = dict(same), []
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder in same:
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
    try:
        return dict(json.loads(memo.read_text())) if memo else {}
    except (OSError, ValueError, TypeError):
        return {}


def _time(folder: Path) -> int:
    """When something was last added to or removed from a folder, in ns; 0 if no time can tell the next change apart."""
    changed = folder.stat().st_mtime_ns if os.path.isdir(folder) else 0
    return (
        changed if time.time_ns() - changed > 2e9 else 0
    )  # some file systems count in two seconds


def read_image(path: Path, data: bytes | None = None) -> Tensor:
    """(3, H, W) uint8 RGB, upright according to its EXIF tag, of the file or of the `data` that go by its name.

    Raises InputError for a missing or broken image.
    """
    with open_image(path, data) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels; save it with 8 bits")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return pil_to_tensor(image.convert("RGB"))


def read_size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    """Height and width of what `read_image` gives, from the header alone."""
    with open_image(path, data) as image:
        exif = Image.Image.getexif(image)  # that of PNG files would decode the image
        turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
        return image.size if turned else image.size[::-1]


@contextmanager
def open_image(path: Path, data: bytes | None) -> Iterator[Image.Image]:
    """Raises InputError for a missing file, and for what goes wrong while the image is used."""
    try:
        refuse_pipe(path, "image")
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            yield image
    except IsADirectoryError:
        raise InputError(f"image {path} is a folder; give image files") from None
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist; check the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"image {path} cannot be decoded ({error}); replace it or remove its entry"
        ) from None


def listing(name: str, root: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """{path below `root` without its ending: path below `root`} of all files with such endings, sorted."""
    found: dict[str, str] = {}
    for folder, _, files in os.walk(root):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for file in sorted(files):
            ending = next((e for e in endings if file.lower().endswith(e.lower())), None)
            if ending and not file.startswith("."):
                path = file if below == "." else f"{below}/{file}"
                key = path[: -len(ending)]
                if key in found:
                    raise InputError(
                        f"dataset '{name}': {root / path} and {found[key]} have one name; keep one of them"
                    )
                found[key] = path
    return dict(sorted(found.items()))


def file_name(path: Path, image: dict, as_written: bool = False) -> str:
    """The image's path below its folder: LVIS gives `coco_url`, Objects365 images/v2/patch3/x.jpg for patch3/x.jpg.

    as_written: the images of Objects365 lie where their names say
    Raises InputError for a name that leaves the image folder or can be none.
    """
    name = str(image["file_name"] if "file_name" in image else image["coco_url"])
    if "file_name" not in image or (
        name.startswith(("images/v1/", "images/v2/")) and not as_written
    ):
        name = "/".join(name.split("/")[-2:])
    if "\0" in name or "\n" in name or len(name) > 4096:
        raise InputError(
            f"{path}: file_name {name[:80]!r} ({len(name)} letters) can be no file's; give its path"
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(
            f"{path}: file_name '{name}' leaves the image folder; give a path below it"
        )
    return name


def read_table(path: Path, columns: list[str]):
    """The named columns of a csv file with a header, row by row, after the row's number."""
    rows = read_rows(path)
    header = next(rows, [])
    missing = [c for c in columns if c not in header]
    if missing:
        raise InputError(
            f"{path}: column '{missing[0]}' is missing; the first line must name {', '.join(columns)}"
        )
    at = [header.index(c) for c in columns]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise InputError(
                f"{path}: line {number} has {len(row)} of {len(header)} columns; was the file cut off?"
            )
        yield number, [row[i] for i in at]


def read_rows(path: Path):
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a csv file ({error}); download it again") from None
