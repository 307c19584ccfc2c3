"""Where computed things are cached, files written whole or not at all, and the hub that may be out of reach."""

import hashlib
import json
import logging
import os
import shutil
import tokenize
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import InputError

log = logging.getLogger("concord")
# what np.load raises for a file that is damaged or not there; it parses the header as Python
NO_ARRAY = (OSError, EOFError, ValueError, SyntaxError, tokenize.TokenError)


def cache_dir() -> Path:
    """The cache folder: CONCORD_CACHE, else XDG_CACHE_HOME/concord, else ~/.cache/concord. It may not exist yet."""
    if folder := os.environ.get("CONCORD_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "concord"


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write a file or folder to; on success it becomes `path` in one step.

    A reader sees the old file or the new one, never half of one, and two processes that write at once do not mix:
    the temporary name is unique. The folder is made if it is missing. If the block raises, the temporary file is
    removed and `path` stays as it was. Raises OSError where the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, for writers that look at it (np.save, PIL)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def refuse_pipe(path: Path, what: str) -> None:
    """Raises InputError for a device or pipe, which a reader would wait for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{what} {path} is no regular file, but a device or pipe; give another")


def cached_rows(folder: str, key: list, count: int, compute: Callable[[], Tensor]) -> Tensor:
    """The (count, ...) tensor stored in cache_dir()/folder under `key`, else `compute()`, which is then stored.

    key: anything json can write that determines the result. A broken file is computed again; a cache folder that
    cannot be written costs a warning line, never an error.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = cache_dir() / folder / f"{digest}.safetensors"
    rows = _read(path)
    if rows is None or len(rows) != count:
        rows = compute()
        _store(path, rows)
    return rows


def _read(path: Path) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("rows")
    except (OSError, SafetensorError):
        return None


def _store(path: Path, rows: Tensor) -> None:
    try:
        with atomic_path(path) as temporary:
            save_file({"rows": rows.contiguous()}, temporary)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written, so nothing is cached there (%s)", path.parent, error)
