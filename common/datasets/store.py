"""A cache of large annotation files. Each is read once; later starts memory-map its columns."""

import hashlib
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson
from filelock import FileLock, Timeout

from common.datasets.index import Index, JsonRows
from common.files import NO_ARRAY, atomic_path, cache_dir

log = logging.getLogger("concord")
VERSION = 5  # of the columns and their meaning; folders of other versions are not used
LARGE = 8 << 20  # bytes; a smaller file is read as fast as its columns are found
ARRAYS = (
    *("file_names", "sizes", "offsets", "boxes", "labels", "areas", "ignore"),
    *("image_labels", "image_label_offsets", "map_names", "segment_ids"),
)
COUNTS = ("num_outside", "num_empty", "num_trainable", "doubts")
ROWS = ("image_ids", "segmentations", "negatives", "not_exhaustive", "verified", "captions")

# An index, and the other facts in the files, which json can express.
Content = tuple[Index, dict]
# read(blob) reads the files. It writes the json of the masks to `blob`, not to segmentations.text.
Read = Callable[[BinaryIO], Content]


def cached_index(source: Path, options: list, read: Read, files: Sequence[Path] = ()) -> Content:
    """Returns the index and the facts that `read` makes of `source`, or their copy in the cache.

    options: what the result depends on besides the files; json can express it
    read:    reads the files, see `Read`
    files:   the files that are read, if there are more than `source`

    Files of 8 MiB or more in total are cached. Files of unchanged sizes and times are taken to be
    the same. If only the times differ, the files' hash decides. A damaged cache folder is made
    again. If the cache cannot be written, a warning is logged. One process reads, others wait.
    """
    files = files or [source]
    try:
        stamps = _stamps(files)
    except (OSError, ValueError):  # `read` raises a better error
        stamps = []
    if sum(size for size, _ in stamps) >= LARGE:
        folder = _folder(source, options, files)
        found = _find(source, folder, files, stamps)
        if found:
            return found
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with waiting(FileLock(folder.with_suffix(".lock")), source):
                found = _find(source, folder, files, stamps)
                return found or _store(source, folder, files, stamps, read)
        except OSError as error:
            message = "%s cannot be written, so %s is read as a whole at each start (%s)"
            log.warning(message, folder.parent, source, error)
    blob = io.BytesIO()
    arrays, record = _pack(*read(blob))
    arrays["blob"] = np.frombuffer(blob.getbuffer(), np.uint8)
    return _unpack(source, arrays, record)


def is_cached(source: Path, options: list) -> bool:
    """Returns whether `cached_index` finds `source`, read without other files, in the cache."""
    folder = _folder(source, options, [source])
    return _find(source, folder, [source], _stamps([source])) is not None


@contextmanager
def waiting(lock: FileLock, source: Path) -> Iterator[None]:
    """Context manager that holds `lock`. Logs a line about `source` after a second of waiting."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info("another process reads %s, and this one waits for it (%s)", source, lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, record: object) -> None:
    """Writes a cache file as json. If it cannot be written, a warning is logged."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(orjson.dumps(record))
    except OSError as error:
        log.warning("%s cannot be written, so the next start takes longer (%s)", path, error)


def _folder(source: Path, options: list, files: Sequence[Path]) -> Path:
    """Returns the cache folder of `source`; its name is a hash of all paths and the options."""
    digest = hashlib.sha256(orjson.dumps([VERSION, *options]))
    for path in (source, *files):
        digest.update(b"\0" + bytes(path.absolute()))
    return cache_dir() / "annotations" / digest.hexdigest()[:32]


def _stamps(files: Sequence[Path]) -> list[list[int]]:
    """Returns [size in bytes, time of the last change in ns] of each file."""
    stats = (path.stat() for path in files)
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _hash(files: Sequence[Path]) -> str:
    """Returns a hash of the files' content."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _find(
    source: Path, folder: Path, files: Sequence[Path], stamps: list[list[int]]
) -> Content | None:
    """Returns what `folder` holds; None if it is missing or damaged or the files have changed."""
    try:
        record = orjson.loads((folder / "facts.json").read_bytes())
        old_stamps = record["stamps"]
        if [size for size, _ in old_stamps] != [size for size, _ in stamps]:
            return None
        if old_stamps != stamps:
            if record["hash"] != _hash(files):
                return None
            write_json(folder / "facts.json", record | {"stamps": stamps})
        arrays = _map(folder, record["arrays"])
        if _forms(arrays) != record["arrays"]:
            return None
        return _unpack(source, arrays, record, folder)
    except (*NO_ARRAY, KeyError, TypeError, AttributeError):
        return None


def _store(
    source: Path, folder: Path, files: Sequence[Path], stamps: list[list[int]], read: Read
) -> Content:
    """Reads the files, writes their columns to `folder` and returns them memory-mapped."""
    gigabytes = sum(size for size, _ in stamps) / 1e9
    log.info("%s (%.1f GB) is read once; later starts use %s", source, gigabytes, folder)
    digest = _hash(files)  # before reading: a file that changes meanwhile gets another hash
    for old in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(old)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        with (temporary / "blob.bin").open("wb") as blob:
            arrays, record = _pack(*read(blob))
            _sync(blob)
        names = [*arrays, "blob"]
        for name in list(arrays):
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, arrays.pop(name))
                _sync(file)
        # mapped before the folder gets its name, under which another process may replace it
        arrays = _map(temporary, names)
        record |= {"stamps": stamps, "hash": digest, "arrays": _forms(arrays)}
        (temporary / "facts.json").write_bytes(orjson.dumps(record))
        shutil.rmtree(folder, ignore_errors=True)  # a rename does not replace a folder
    return _unpack(source, arrays, record, folder)


def _sync(file: BinaryIO) -> None:
    """Forces a file onto the disk: else a power cut can leave the right size without content."""
    file.flush()
    os.fsync(file.fileno())


def _pack(index: Index, facts: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Returns an index as arrays, without the text of the masks, and a record of all else for json.

    The arrays include `by_label` and the record COUNTS, so that later starts need not compute them.
    """
    columns = {field: getattr(index, field) for field in ARRAYS}
    arrays = {field: column for field, column in columns.items() if column is not None}
    for field in ROWS:
        values = getattr(index, field)
        if values is None:
            continue
        rows = values if isinstance(values, JsonRows) else JsonRows.of(values)
        arrays |= {f"{field}.starts": rows.starts, f"{field}.ends": rows.ends}
        if field != "segmentations":
            arrays[f"{field}.text"] = rows.text
    arrays["by_label.images"], arrays["by_label.counts"] = index.by_label
    counts = {field: getattr(index, field) for field in COUNTS}
    return arrays, {"relative": index.relative, "counts": counts, "facts": facts}


def _unpack(source: Path, arrays: dict, record: dict, folder: Path | None = None) -> Content:
    """Reverses `_pack`; arrays["blob"] is the text of the masks."""
    fields = {field: arrays[field] for field in ARRAYS if field in arrays}
    for field in ROWS:
        if f"{field}.starts" in arrays:
            text = arrays["blob" if field == "segmentations" else f"{field}.text"]
            fields[field] = JsonRows(text, arrays[f"{field}.starts"], arrays[f"{field}.ends"])
    index = Index(str(source), relative=record["relative"], folder=folder, **fields)
    index.by_label = (arrays["by_label.images"], arrays["by_label.counts"])
    for field in COUNTS:
        setattr(index, field, record["counts"][field])
    return index, record["facts"]


def _map(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Memory-maps the arrays `names`, and always the blob, in `folder`, read-only."""
    arrays = {}
    for name in names:
        if name != "blob":
            arrays[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
    blob = folder / "blob.bin"
    arrays["blob"] = np.zeros(0, np.uint8)
    if blob.stat().st_size:  # an empty file cannot be mapped
        arrays["blob"] = np.asarray(np.memmap(blob, np.uint8, "r"))
    return arrays


def _forms(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    """Returns {name: [type, *shape]} of the arrays."""
    return {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}
