"""Mutated sound files: each is refused in one line, or what is read is within its limits.

The short form runs with all tests and is the same each time. The long form takes an hour.
"""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import corpus_coco as coco
import corpus_folders as folders
import corpus_images as images
import corpus_maps as maps
import corpus_runs as runs
import corpus_text as text
import corpus_tools as tools
import numpy as np
import pytest
import torch
from corpus import ALL, HEIGHT, TooSlow, assert_line, time_limit
from fuzz import MUTATIONS, mutated
from hypothesis import HealthCheck, Phase, given, seed, settings

import scaledet
from common import errors
from common.checkpoint import damage, load_checkpoint, load_weights, read_model
from common.class_counts import read_prior
from common.command import saved_args
from common.convert import load_official
from common.datasets import Dataset, load_datasets
from common.datasets.files import decode_image
from common.datasets.subset import read_renames
from common.errors import InputError
from common.labels import Vocabulary
from common.proposals import missing_blocks
from common.saved import read_args
from common.text import embed
from common.validation import step_of

EXAMPLES = 60  # of each file in the short form
SECONDS = 10  # of one example; they take milliseconds
MEMORY = 4 << 30  # bytes that an example may take
HOUR = int(os.environ.get("CONCORD_FUZZ", "3600"))  # seconds of the long form


@dataclass
class Kind:
    """A file that is mutated.

    title:  of the format
    sound:  sound(folder) writes the sound files, and reads them
    target: the file that is mutated, relative to the folder
    read:   read(folder) reads the files and checks what it gets
    """

    title: str
    sound: Callable[[Path], object]
    target: str
    read: Callable[[Path], object]


# -- datasets


def dataset(entry: str, split: str = "train", root: bool = False) -> Callable[[Path], None]:
    """Returns a reader of a dataset. root: the folder is the data root"""

    def read(folder: Path) -> None:
        place = str(folder) if root else ""
        named = entry.replace("DIR", str(folder))
        for each in load_datasets(named, split, place, accepts=ALL, masks=True):
            inspect(each)

    return read


def inspect(dataset: Dataset) -> None:
    """Asserts that all samples of a dataset are within their images and its classes."""
    classes = len(dataset.vocabulary)
    for row in range(len(dataset)):
        sample = dataset.load(row, keep_ignored=bool(row % 2))
        height, width = sample.image.shape[-2:]
        limits = torch.tensor([width, height, width, height])
        assert torch.isfinite(sample.boxes).all()
        assert ((sample.boxes >= 0) & (sample.boxes <= limits)).all()
        assert ((sample.labels >= 0) & (sample.labels < classes)).all()
        assert all(isinstance(caption, str) for caption in sample.captions)
        if sample.image_labels is not None:
            assert ((sample.image_labels >= 0) & (sample.image_labels < classes)).all()
        if sample.masks is not None:
            assert sample.masks.shape == (len(sample.boxes), height, width)
        if sample.segments is not None:
            assert sample.segments.shape == (height, width)
            assert -1 <= int(sample.segments.min()) <= int(sample.segments.max()) < classes + 300
    for field in ("negatives", "not_exhaustive", "verified"):
        for labels in getattr(dataset.index, field) or ():
            assert all(0 <= label < classes for label in labels)


IN_IM = "mine=DIR/a.json:DIR/im"
MASKED = {"annotations.0.segmentation": coco.RLE, "annotations.1.segmentation": [coco.SQUARE]}
CROWD = {"annotations.0.iscrowd": 1, "annotations.0.area": 16}
CVAT = tools.CVAT_BOX + tools.CVAT_MASK + tools.CVAT_POLYGON + tools.CVAT_OVAL
OID = "oid/annotations/{}"
CSV = OID.format("{}-annotations-bbox.csv")
VERIFIED = f"{folders.VERIFIED}0,x,/m/2,0\n0,x,/m/1,1"
VALIDATION = folders.validation(VERIFIED, folders.tree({"LabelName": "/m/1"}))
LABELLED = {"0.png": images.picture(), "0.cls": "dog", "1.png": images.picture(), "1.json": "{}"}
PNG = maps.label_map([[0, 1]])
DATASETS = [
    ("COCO", coco.of_changes(CROWD), "a.json", IN_IM),
    ("COCO with masks", coco.of_changes(MASKED), "a.json", IN_IM),
    ("COCO with labels", coco.of_changes(coco.LABELS), "a.json", IN_IM),
    ("panoptic", maps.of_changes({}), "a.json", IN_IM),
    ("segment map", maps.of_changes({}), "a/m.png", IN_IM),
    ("label map", maps.maps(), "maps/0.png", "mine=DIR/maps:DIR/im"),
    ("list of classes", maps.maps(), "maps/classes.txt", "mine=DIR/maps:DIR/im"),
    ("Roboflow's classes", maps.masks(), "_classes.csv", "mine=DIR"),
    ("VOC", tools.voc(), "xml/0.xml", "mine=DIR/xml:DIR/im"),
    ("YOLO", tools.yolo("0 0.5 0.5 0.2 0.5\n1 0 0 1 0 1 1\n"), "labels/0.txt", "mine=DIR"),
    ("data.yaml", tools.yolo(), "data.yaml", "mine=DIR"),
    ("labelme", tools.labelme({}), "1.json", "mine=DIR"),
    ("CVAT", tools.cvat(CVAT), "a.xml", "mine=DIR/a.xml:DIR/im"),
    ("image", folders.folders(), "data/dog/0.png", "mine=DIR/data"),
    ("tar", folders.tars(folders.packed(LABELLED)), "data/cat.tar", "mine=DIR/data"),
    ("captions", folders.captions("a banana\ta.jpg\n"), "a.tsv", "mine=DIR/a.tsv:DIR/im"),
]
ROOTED = [
    ("LVIS", folders.lvis({}), "lvis/lvis_v1_train.json", "lvis"),
    ("OpenImages", folders.oid(), CSV.format("train"), "oid"),
    ("OpenImages' classes", folders.oid(), OID.format("class-descriptions-boxable.csv"), "oid"),
    ("Visual Genome", folders.genome({}), "vg/objects.json", "vg"),
    ("Visual Genome's images", folders.genome({}), "vg/image_data.json", "vg"),
]
LABEL_CSV = OID.format("validation-annotations-human-imagelabels-boxable.csv")
KINDS = [Kind(*row, dataset(entry)) for *row, entry in DATASETS]
KINDS += [Kind(*row, dataset(entry, root=True)) for *row, entry in ROOTED]
KINDS += [
    Kind("OpenImages' labels", VALIDATION, LABEL_CSV, dataset("oid", "val", True)),
    Kind(
        "OpenImages' tree",
        VALIDATION,
        OID.format("bbox_labels_600_hierarchy.json"),
        dataset("oid", "val", True),
    ),
]


# -- other files


def write_one(name: str, content) -> Callable[[Path], object]:
    """Returns a function that writes one sound file."""
    return lambda folder: images.write(folder / name, content)


def read_picture(folder: Path) -> None:
    decoded = decode_image(folder / "0.png")
    assert decoded.image.ndim == 3 and decoded.image.dtype == torch.uint8


def read_names(folder: Path) -> None:
    vocabulary = Vocabulary.parse(str(folder / "v.txt"))
    assert all(name.strip() for name in vocabulary.names)


def read_text_rows(folder: Path) -> None:
    rows = embed(["cat", "dog"], str(folder / "t.npy"))
    assert torch.allclose(rows.norm(dim=1), torch.ones(2))


def read_counts(folder: Path) -> None:
    _, counts = read_prior(str(folder / "p.json"), Vocabulary("mine", ("cat", "dog")))
    assert (counts >= 0).all()


def read_weights(folder: Path) -> None:
    metadata, vocabularies = read_model(folder / "w.safetensors", "scaledet")
    saved_args(scaledet.Args, metadata)
    assert all(vocabulary.names for vocabulary in vocabularies)
    model = runs.Model()
    load_weights(folder / "w.safetensors", model)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def read_settings(folder: Path) -> None:
    """The metadata of weights, which are json texts in the file."""
    try:
        record = json.loads((folder / "m.json").read_bytes())
        texts = {key: json.dumps(value) for key, value in record.items()}
        content = runs.save(runs.TENSORS, texts)
    except (ValueError, AttributeError, RecursionError):  # no weights have such metadata
        return
    (folder / "w.safetensors").write_bytes(content)
    read_weights(folder)


def read_run(folder: Path) -> None:
    """args.json of a run, from which a training goes on."""
    saved = read_args(folder / "run", "mine")
    assert isinstance(saved, dict)
    runs.start(folder)


def read_checkpoint(folder: Path) -> None:
    reason = damage(folder / "run" / runs.NEWEST)
    assert "\n" not in reason.replace("\\n", "")


def read_state(folder: Path) -> None:
    model = runs.Model()
    load_checkpoint(folder / "run" / runs.NEWEST, torch.optim.AdamW(model.parameters()))


def read_metrics(folder: Path) -> None:
    lines = (folder / "run/metrics.jsonl").read_text(errors="replace").splitlines()
    assert all(step is None or isinstance(step, int) for step in map(step_of, lines))


def official(name: str) -> Callable[[Path], None]:
    return lambda folder: load_official(folder / name) and None


NAMED = "{}/{}".format
STATE = NAMED("run/" + runs.NEWEST, "state.pt")
SUMS = NAMED("run/" + runs.NEWEST, "checksums.json")
ARRAYS = runs.array_pickle({"a": np.ones((2, 3), np.float32)})
OTHERS = [
    ("vocabulary", write_one("v.txt", "cat\ndog\n"), "v.txt", read_names),
    ("text embeddings", write_one("t.npy", text.rows(text.ARRAY)), "t.npy", read_text_rows),
    ("counts", write_one("p.json", text.COUNTS), "p.json", read_counts),
    ("weights", write_one("w.safetensors", runs.GOOD), "w.safetensors", read_weights),
    ("metadata", write_one("m.json", runs.METADATA), "m.json", read_settings),
    ("args.json", runs.run(), "run/args.json", read_run),
    ("checksums", runs.run(), SUMS, read_checkpoint),
    ("state", runs.run(), STATE, read_state),
    ("metrics", runs.run(), "run/metrics.jsonl", read_metrics),
    ("torch file", write_one("o.pth", runs.torch_file(runs.STATE)), "o.pth", official("o.pth")),
    ("pickle", write_one("o.pkl", ARRAYS), "o.pkl", official("o.pkl")),
    (
        "proposals",
        write_one("block-000000.npy", runs.rows(runs.BOXES)),
        "block-000000.npy",
        lambda folder: missing_blocks(folder, 2),
    ),
]
for ending, content in (("txt", "dog = wolf\n"), ("json", {"dog": "wolf"})):
    file = f"r.{ending}"
    read = lambda folder, file=file: read_renames(str(folder / file))  # noqa: E731
    OTHERS.append((f"renames in {ending}", write_one(file, content), file, read))
for kind in (*images.LOSSLESS, *images.LOSSY):
    OTHERS.append((kind, write_one("0.png", images.cut(kind, 1)), "0.png", read_picture))
KINDS += [Kind(*row) for row in OTHERS]


# -- the test


@contextmanager
def bounded() -> Iterator[None]:
    """Limits the time and the memory of its block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    taken = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    try:
        with time_limit(SECONDS):
            yield
    except TooSlow as error:
        raise AssertionError(str(error)) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def property_of(kind: Kind, folder: Path) -> Callable[[], None]:
    """Returns the property that all mutations of a file are refused or read."""
    kind.sound(folder)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    target = folder / kind.target

    @given(MUTATIONS)
    def check(mutations):
        for path, content in files.items():
            if not path.exists() or path.read_bytes() != content:
                images.write(path, content)
        target.write_bytes(mutated(files[target], mutations))
        try:
            with bounded():
                kind.read(folder)
        except InputError as error:
            assert_line(str(error), errors.LONGEST + 10)

    return check


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a busy disk would take most of the time
    return tmp_path / "files"


every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
FREE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
FREE["report_multiple_bugs"] = False


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_mutated_files(kind, folder):
    check = property_of(kind, folder)
    settings(**FREE, max_examples=EXAMPLES, derandomize=True)(check)()


@pytest.mark.long
@every_kind
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_for_an_hour(kind, folder):
    """Other mutations than before, an equal part of the hour for each file."""
    end = time.monotonic() + HOUR / len(KINDS)
    start = time.time_ns()
    for number in count():
        if time.monotonic() > end:
            return
        check = property_of(kind, folder)
        seed(start + number)(settings(**FREE, max_examples=300)(check))()


def test_a_mutation_that_is_not_refused_is_found(folder):
    """The property fails for a reader that takes a box as it is."""
    kind = Kind("json", write_one("a.json", {"box": [1, 2]}), "a.json", read_carelessly)
    check = property_of(kind, folder)
    quick = settings(**FREE, max_examples=200, derandomize=True, phases=[Phase.generate])
    with pytest.raises((ValueError, TypeError, KeyError, AssertionError)):
        quick(check)()


def read_carelessly(folder: Path) -> None:
    left, right = json.loads((folder / "a.json").read_text())["box"]
    assert 0 <= left <= right <= HEIGHT
