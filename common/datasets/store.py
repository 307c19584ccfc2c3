"""What was made of large annotation files, kept as columns on disk and memory-mapped by every later start."""

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
VERSION = 3  # of the columns and what they mean; other versions are made again
LARGE = 8 << 20  # bytes; smaller files are read as fast as their columns are found
ARRAYS = (
    *("file_names", "sizes", "offsets", "boxes", "labels", "areas", "ignore"),
    *("image_labels", "image_label_offsets", "map_names", "segment_ids"),
)
ROWS = ("image_ids", "segmentations", "negatives", "not_exhaustive", "verified", "captions")

# read(blob) -> (index, facts): what is in the files; json can write the facts. The masks' json is written to `blob`
# instead of to segmentations.text
Read = Callable[[BinaryIO], tuple[Index, dict]]


def cached_index(
    source: Path, options: list, read: Read, files: Sequence[Path] = ()
) -> tuple[Index, dict]:
    """What `read` makes of `source`, the index and the facts beside it; of large files from the cache.

    options: what else decides the result; json can write it
    files:   those that are read, if there are more than `source`
    Files of the same sizes and times are the same; at other times, their hash decides. A damaged folder is made again;
    a cache that cannot be written costs a warning line, never an error. One process reads, while others wait for it.
    """
    files = files or [source]
    try:
        stamps = _stamps(files)
    except (OSError, ValueError):  # `read` says it better
        stamps = []
    if sum(size for size, _ in stamps) >= LARGE:
        folder = _folder(source, options, files)
        if found := _find(source, folder, files, stamps):
            return found
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with waiting(FileLock(folder.with_suffix(".lock")), source):
                return _find(source, folder, files, stamps) or _store(
                    source, folder, files, stamps, read
                )
        except OSError as error:
            log.warning("%s cannot be written, so %s is read as a whole at each start (%s)", folder.parent, source,
                        error)  # fmt: skip
    blob = io.BytesIO()
    arrays, record = _pack(*read(blob))
    return _unpack(source, arrays | {"blob": np.frombuffer(blob.getbuffer(), np.uint8)}, record)


def is_cached(source: Path, options: list) -> bool:
    """Whether `cached_index` with these arguments would not read the file."""
    return (
        _find(source, _folder(source, options, [source]), [source], _stamps([source])) is not None
    )


@contextmanager
def waiting(lock: FileLock, source: Path) -> Iterator[None]:
    """Hold the lock; after a second without it, a line says what is waited for."""
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
    """Write what spares time at the next start; where that is not possible, one warning line says so."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(orjson.dumps(record))
    except OSError as error:
        log.warning("%s cannot be written, so the next start takes longer (%s)", path, error)


def _folder(source: Path, options: list, files: Sequence[Path]) -> Path:
    digest = hashlib.sha256(orjson.dumps([VERSION, *options]))
    for path in (source, *files):
        digest.update(b"\0" + bytes(path.absolute()))
    return cache_dir() / "annotations" / digest.hexdigest()[:32]


def _stamps(files: Sequence[Path]) -> list[list[int]]:
    """Size and time of each."""
    stats = (path.stat() for path in files)
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _find(
    source: Path, folder: Path, files: Sequence[Path], stamps: list[list[int]]
) -> tuple[Index, dict] | None:
    """What the folder holds, if that is whole and of the files as they are now."""
    try:
        record = orjson.loads((folder / "facts.json").read_bytes())
        if [size for size, _ in record["stamps"]] != [size for size, _ in stamps]:
            return None
        if record["stamps"] != stamps:
            if record["hash"] != _hash(files):
                return None
            write_json(folder / "facts.json", record | {"stamps": stamps})
        arrays = _map(folder, record["arrays"])
        return (
            _unpack(source, arrays, record, folder) if _forms(arrays) == record["arrays"] else None
        )
    except (*NO_ARRAY, KeyError, TypeError, AttributeError):
        return None


def _store(
    source: Path, folder: Path, files: Sequence[Path], stamps: list[list[int]], read: Read
) -> tuple[Index, dict]:
    gigabytes = sum(size for size, _ in stamps) / 1e9
    log.info("%s (%.1f GB) is read once; later starts use %s", source, gigabytes, folder)
    digest = _hash(files)  # first: a file that changes after it is found to be another
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
        arrays = _map(
            temporary, names
        )  # before the folder takes its place, where another process may replace it
        record |= {"stamps": stamps, "hash": digest, "arrays": _forms(arrays)}
        (temporary / "facts.json").write_bytes(orjson.dumps(record))
        shutil.rmtree(folder, ignore_errors=True)  # one folder cannot replace another
    return _unpack(source, arrays, record, folder)


def _sync(file: BinaryIO) -> None:
    """To the disk itself, else a power cut can leave a file's size without its content."""
    file.flush()
    os.fsync(file.fileno())


def _pack(index: Index, facts: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays but for the masks' text, and a record of the rest. What samplers want is computed once and for all."""
    arrays = {field: array for field in ARRAYS if (array := getattr(index, field)) is not None}
    for field in ROWS:
        if (values := getattr(index, field)) is not None:
            rows = values if isinstance(values, JsonRows) else JsonRows.of(values)
            arrays |= {f"{field}.starts": rows.starts, f"{field}.ends": rows.ends}
            arrays |= {f"{field}.text": rows.text} if field != "segmentations" else {}
    arrays["by_label.images"], arrays["by_label.counts"] = index.by_label
    return arrays, {"relative": index.relative, "num_outside": index.num_outside, "facts": facts}


def _unpack(
    source: Path, arrays: dict, record: dict, folder: Path | None = None
) -> tuple[Index, dict]:
    rows = {}
    for field in ROWS:
        if f"{field}.starts" in arrays:
            text = arrays["blob" if field == "segmentations" else f"{field}.text"]
            rows[field] = JsonRows(text, arrays[f"{field}.starts"], arrays[f"{field}.ends"])
    fields = {field: arrays[field] for field in ARRAYS if field in arrays}
    index = Index(str(source), relative=record["relative"], folder=folder, **fields, **rows)
    index.by_label, index.num_outside = (
        (arrays["by_label.images"], arrays["by_label.counts"]),
        record["num_outside"],
    )
    return index, record["facts"]


def _map(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    blob = folder / "blob.bin"
    arrays = {
        name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        for name in names
        if name != "blob"
    }
    empty = not blob.stat().st_size  # which cannot be mapped
    return arrays | {
        "blob": np.zeros(0, np.uint8) if empty else np.asarray(np.memmap(blob, np.uint8, "r"))
    }


def _forms(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}
