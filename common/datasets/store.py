"""What was made of a large annotation file, kept as columns on disk and memory-mapped by every later start."""

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from common.paths import atomic_path, cache_dir

log = logging.getLogger("concord")
VERSION = 1  # of the columns and what they mean; other versions are made again
LARGE = 8 << 20  # bytes; smaller files are read as fast as their columns are found


class JsonRows(Sequence):
    """Values as compact json in one array of bytes; each is parsed when it is asked for.

    text: (T,) uint8; row i is text[starts[i]:ends[i]], both (N,) int64
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.text, self.starts, self.ends = text, starts, ends

    @classmethod
    def of(cls, values: Sequence) -> "JsonRows":
        text, offsets = bytearray(), np.zeros(len(values) + 1, np.int64)
        for row, value in enumerate(values, 1):
            text += orjson.dumps(value)  # copied at once: orjson gives even a number the memory of a kilobyte
            offsets[row] = len(text)
        return cls(np.frombuffer(text, np.uint8), offsets[:-1], offsets[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int):
        return orjson.loads(self.text[self.starts[row] : self.ends[row]].data)

    def take(self, rows: np.ndarray) -> "JsonRows":
        return JsonRows(self.text, self.starts[rows], self.ends[rows])


@dataclass
class Columns:
    """arrays by name, `blob` (T,) uint8 among them; facts, which json can write; their folder, None in memory alone."""

    arrays: dict[str, np.ndarray]
    facts: dict
    folder: Path | None = None


# convert(blob, watch) -> (arrays, facts); it writes what becomes the array `blob`, and shows `watch` the file's bytes
Convert = Callable[[BinaryIO, Callable[[bytes], object]], tuple[dict[str, np.ndarray], dict]]


def columns_of(source: Path, options: list, convert: Convert) -> Columns:
    """The columns of the file `source`: of a large one those in the cache, else what `convert` makes of it.

    options: what else decides the result; json can write it
    A file of the same size and time is the same; of another time, its hash decides. A damaged folder is made again; a
    cache that cannot be written costs a warning line, never an error.
    """
    if source.stat().st_size >= LARGE:
        if found := find_columns(source, options):
            return found
        try:
            return _store(_folder(source, options), source, convert)
        except OSError as error:
            log.warning("%s cannot be written, so %s is read as a whole at each start (%s)", cache_dir(), source, error)
    blob = io.BytesIO()
    arrays, facts = convert(blob, len)
    return Columns(arrays | {"blob": np.frombuffer(blob.getbuffer(), np.uint8)}, facts)


def find_columns(source: Path, options: list) -> Columns | None:
    """What the cache holds of `source` as it is now, if that is whole."""
    folder = _folder(source, options)
    try:
        record, stat = json.loads((folder / "facts.json").read_text()), source.stat()
        if record["size"] != stat.st_size:
            return None
        if record["time"] != stat.st_mtime_ns:
            if record["hash"] != _hash(source):
                return None
            write_json(folder / "facts.json", record | {"time": stat.st_mtime_ns})
        arrays = _map(folder, record["arrays"])
        if _forms(arrays) != record["arrays"]:
            return None
        return Columns(arrays, record["facts"], folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_json(path: Path, record: object) -> None:
    """Write what spares time at the next start; where that is not possible, one warning line says so."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record))
    except OSError as error:
        log.warning("%s cannot be written, so the next start takes longer (%s)", path, error)


def _folder(source: Path, options: list) -> Path:
    key = json.dumps([VERSION, str(source.absolute()), *options])
    return cache_dir() / "annotations" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _store(folder: Path, source: Path, convert: Convert) -> Columns:
    stat, digest = source.stat(), hashlib.sha256()
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        log.info("%s (%.1f GB) is read once; later starts use %s", source, stat.st_size / 1e9, folder)
        with (temporary / "blob.bin").open("wb") as blob:
            arrays, facts = convert(blob, digest.update)
        names = [*arrays, "blob"]
        for name in list(arrays):
            np.save(temporary / f"{name}.npy", arrays.pop(name))
        arrays = _map(temporary, names)  # before the folder takes its place, where another process may replace it
        record = {"size": stat.st_size, "time": stat.st_mtime_ns, "hash": digest.hexdigest()}
        record |= {"arrays": _forms(arrays), "facts": facts}
        (temporary / "facts.json").write_text(json.dumps(record))
        shutil.rmtree(folder, ignore_errors=True)  # one folder cannot replace another
    return Columns(arrays, facts, folder)


def _map(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    blob = folder / "blob.bin"
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names if name != "blob"}
    empty = not blob.stat().st_size  # which cannot be mapped
    return arrays | {"blob": np.zeros(0, np.uint8) if empty else np.asarray(np.memmap(blob, np.uint8, "r"))}


def _forms(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
