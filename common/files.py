"""The cache folder, and files that are written whole or not at all."""

import hashlib
import logging
import os
import re
import shutil
import tokenize
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError

log = logging.getLogger("concord")
DATA = Path(__file__).resolve().parent.parent / "data"
JPEGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")  # browsers write .jfif, phones .mpo
IMAGES = (*JPEGS, ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif")

# what np.load raises for a missing or damaged file; it parses the header as Python, and allocates
# what it promises
NO_ARRAY = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    tokenize.TokenError,
    MemoryError,
    RecursionError,
    OverflowError,
    zipfile.BadZipFile,
)


# the names that `temporary_path` makes, and those of safetensors, which writes to such a file first
TEMPORARY = re.compile(r"\..+-\d+-[0-9a-f]{8}(\.\w+)?|\.tmp\w{6}")


def cache_dir() -> Path:
    """Returns the cache folder, which may not exist yet.

    It is $CONCORD_CACHE, else $XDG_CACHE_HOME/concord, else ~/.cache/concord.
    """
    if folder := os.environ.get("CONCORD_CACHE"):
        return Path(os.path.expanduser(folder))
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.path.expanduser(base)) / "concord"


@contextmanager
def atomic_path(path: Path | str, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path. What the block writes there replaces `path` in one step at the end.

    It may be a file or a folder. A reader sees the old content or the new, never half of it. The
    temporary name is unique, so two processes can write at once. The folder of `path` is created.
    If the block raises, what it wrote is removed and `path` stays as it was. Raises OSError if
    `path` cannot be written.

    durable: waits until all of it is on the disk itself. Otherwise a power cut can leave the new
             name with an empty file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        if durable:
            for file in [*temporary.rglob("*"), temporary]:
                _sync(file)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)  # the new name
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Returns a new name beside `path`. `sweep` finds what it names."""
    # The suffix stays last, for writers that look at it (np.save, PIL). The stem is cut, since a
    # name has at most 255 bytes.
    start = f".{path.stem[:40]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(start + path.suffix)


def _sync(path: Path) -> None:
    """Writes a file, or the list of names of a folder, to the disk itself."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders
    number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows wants to write, too
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sweep(folder: Path) -> None:
    """Removes what killed writes of `atomic_path` left in `folder`, and logs how many.

    No other process may write there meanwhile.
    """
    left = [path for path in folder.glob(".*") if TEMPORARY.fullmatch(path.name)]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if left:
        log.info("%s: %d half-written files of an earlier run are removed", folder, len(left))


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex digits. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def refuse_pipe(path: Path, what: str) -> None:
    """Raises InputError if `path` (called `what`) is a device or pipe: reading might never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{what} {path} is no regular file, but a device or pipe; give another")
