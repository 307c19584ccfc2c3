"""What the corpus and the fuzz test share: a case, its time limit, and what came of loading files.

A case makes small files in a folder and does with them what a run would do. It ends with an
InputError of one line, or it returns facts about what was read.
"""

import copy
import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.datasets import Dataset, load_datasets
from common.errors import InputError

ALL = ("boxes", "instances", "semantic", "panoptic", "image_labels")
WIDTH, HEIGHT = 30, 20  # of all images
COLOR = (200, 30, 40)
SECONDS = 20  # of one case; they take milliseconds
LONGEST = 450  # letters of a message, in which DIR stands for the folder of the case
DROP = "<this field is removed>"


@dataclass
class Case:
    """One input and what must come of it.

    title:    what is odd about the input
    attempt:  attempt(folder) makes the files and reads them; returns facts, or raises InputError
    expected: words of the message, or a dict of facts, {} for any. The fact "log" is words of the
              log
    """

    title: str
    attempt: Callable[[Path], dict]
    expected: str | tuple[str, ...] | dict


class TooSlow(BaseException):
    """The time of a case is over. No `except Exception` of the code under test catches it."""


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooSlow in its block after some seconds."""

    def stop(*_):
        raise TooSlow(f"more than {seconds} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def check(case: Case, folder: Path, log: pytest.LogCaptureFixture) -> None:
    """Runs a case in `folder` and asserts that the outcome is the expected one."""
    try:
        with time_limit():
            facts = case.attempt(folder)
    except InputError as error:
        line = str(error).replace(str(folder), "DIR")
        assert_line(line)
        assert not isinstance(case.expected, dict), f"refused: {line}"
        words = (case.expected,) if isinstance(case.expected, str) else case.expected
        for word in words:
            assert word in line, line
        return
    assert isinstance(case.expected, dict), f"accepted: {facts}"
    for name, value in case.expected.items():
        if name == "log":
            assert value in log.text.replace(str(folder), "DIR"), log.text
        elif name == "box":
            assert facts[name] == pytest.approx(value), facts
        else:
            assert facts[name] == value, facts


def assert_line(line: str, longest: int = LONGEST) -> None:
    """Asserts that a message is one line of a length that can be read."""
    assert line and "\n" not in line and "\r" not in line, repr(line)
    assert len(line) <= longest, f"{len(line)} letters: {line}"


def load(text: str | Path, split: str = "train", root: str | Path = "") -> dict:
    """Loads a dataset and all its images. Returns what `describe` tells of it.

    root: the data root, for a known dataset
    """
    (dataset,) = load_datasets(str(text), split, str(root), accepts=ALL, masks=True)
    return describe(dataset)


def describe(dataset: Dataset) -> dict:
    """Returns facts about a dataset, whose images are all loaded.

    images, objects: numbers; the objects are boxes or segments
    box:     the last box, xyxy
    labels:  of all objects, in their order; image_labels: of all images
    names:   of the classes
    pixels:  the number of pixels of each mask, or of each segment and of void
    rgb:     the upper left pixel of the last image; size: its height and width
    """
    samples = [dataset.load(i) for i in range(len(dataset))]
    facts = {
        "images": len(samples),
        "objects": sum(len(sample.labels) for sample in samples),
        "labels": [label for sample in samples for label in sample.labels.tolist()],
        "image_labels": [],
        "names": dataset.vocabulary.names,
        "kind": dataset.supervision,
        "files": [dataset.index.file_name(i) for i in range(len(dataset))],
        "pixels": [],
        "captions": [caption for sample in samples for caption in sample.captions],
    }
    for sample in samples:
        facts["rgb"] = tuple(sample.image[:, 0, 0].tolist())
        facts["size"] = sample.size
        if len(sample.boxes):
            facts["box"] = sample.boxes[-1].tolist()
        if sample.image_labels is not None:
            facts["image_labels"] += sample.image_labels.tolist()
        if sample.masks is not None:
            facts["pixels"] += sample.masks.flatten(1).sum(1).tolist()
        if sample.segments is not None:
            counts = np.bincount(sample.segments.numpy().ravel() + 1, minlength=1)
            facts["pixels"] += counts.tolist()
    return facts


# -- files


@cache
def picture(kind: str = "png", width: int = WIDTH, height: int = HEIGHT, color=COLOR) -> bytes:
    """Returns an image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def write(path: Path, content) -> Path:
    """Writes bytes, text or, for anything else, json; creates the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def photos(folder: Path, *names: str) -> None:
    """Writes PNGs of WIDTH x HEIGHT, whatever their ending."""
    for name in names:
        write(folder / name, picture())


def label_map(rows, mode: str | None = None) -> bytes:
    """Returns a PNG of WIDTH x HEIGHT pixels, which repeat the values in `rows`."""
    values = np.array(rows)
    values = values if values.dtype == np.uint16 else values.astype(np.uint8)
    shape = (HEIGHT, WIDTH, *values.shape[2:]) if values.ndim == 3 else (HEIGHT, WIDTH)
    image = Image.fromarray(np.resize(values, shape))
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, "png")
    return file.getvalue()


def changed(record: dict, changes: dict) -> dict:
    """Returns a copy of `record` with other values, as {"images.0.id": 7}; DROP removes one."""
    record = copy.deepcopy(record)
    for path, value in changes.items():
        *parents, key = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = record
        for parent in parents:
            place = place[parent]
        if value is DROP:
            del place[key]
        elif isinstance(place, list) and key == len(place):
            place.append(value)
        else:
            place[key] = value
    return record


def nested(depth: int = 100_000) -> str:
    """Returns the json of lists in lists."""
    return "[" * depth + "]" * depth
