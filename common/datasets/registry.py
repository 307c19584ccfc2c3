"""The known datasets, their folders, and the grammar of --datasets: NAME, NAME:SPLIT, NAME=ANNOTATIONS.json:IMAGES/."""

import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from common.datasets.base import Dataset
from common.datasets.coco import read_coco
from common.datasets.openimages import read_openimages
from common.datasets.tiny import generate
from common.errors import InputError
from common.paths import cache_dir

log = logging.getLogger("concord")


@dataclass(frozen=True)
class Known:
    """Where a dataset lies under the data root: {split: [(annotations, images), ...]}; the first to exist is read."""

    title: str
    splits: dict[str, list[tuple[str, str]]]
    metric: str = "coco"
    read: object = read_coco


def _openimages(train: str) -> list[tuple[str, str]]:
    names = [f"{train}-annotations-bbox.csv", "annotations-bbox.csv"]
    if train == "train":
        names.insert(1, "oidv6-train-annotations-bbox.csv")
    return [
        (f"{base}/{folder}{name}", f"{base}/images" if name == "annotations-bbox.csv" else f"{base}/images/{train}")
        for base in ("oid", "openimages")
        for name in names
        for folder in ("annotations/", "")
    ]


OPENIMAGES = Known(
    "OpenImages (storage.googleapis.com/openimages)",
    {"train": _openimages("train"), "val": _openimages("validation")},
    metric="oid",
    read=read_openimages,
)
KNOWN = {
    "coco": Known(
        "COCO 2017 (cocodataset.org)",
        {s: [(f"coco/annotations/instances_{s}2017.json", f"coco/{s}2017")] for s in ("train", "val")},
    ),
    "lvis": Known(
        "LVIS v1 (lvisdataset.org) beside the COCO images",
        {s: [(f"lvis/lvis_v1_{s}.json", folder) for folder in ("lvis/images", "coco")] for s in ("train", "val")},
        metric="lvis",
    ),
    "o365": Known(
        "Objects365 v2 (objects365.org)",
        {
            s: [(f"objects365/annotations/{n}_{s}.json", f"objects365/{s}") for n in ("zhiyuan_objv2", "objects365")]
            for s in ("train", "val")
        },
    ),
    "oid": OPENIMAGES,
    "oid500": OPENIMAGES,  # the same files; the reader keeps the 500 classes of the challenge 2019
    "lineart": Known(
        "the generated zero-shot set; it exists with --tiny only",
        {"val": [("lineart/annotations/instances_val.json", "lineart/val")]},
    ),
}
ALIASES = {"objects365": "o365", "openimages": "oid"}


def parse_datasets(text: str, split: str) -> list[tuple[str, str, tuple[str, str] | None]]:
    """`a,b:val,my=ann.json:images/` -> [(name, split, (annotations, images) or None)]; `split` where none is named.

    Raises InputError for an unknown name (with the nearest ones), an unknown split, a name given twice.
    """
    parsed = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, custom, paths = entry.partition("=")
        if custom:
            annotations, colon, images = paths.rpartition(":")
            if not colon:
                raise InputError(f"--datasets {entry}: write NAME=ANNOTATIONS.json:IMAGE_FOLDER/")
            parsed.append((name, split, (annotations, images)))
            continue
        name, _, own_split = entry.partition(":")
        name = ALIASES.get(name, name)
        if name not in KNOWN:
            near = difflib.get_close_matches(name, [*KNOWN, *ALIASES], n=3, cutoff=0.4) or list(KNOWN)
            raise InputError(f"unknown dataset '{name}'; nearest: {', '.join(near)}; your own: NAME=ANN.json:IMAGES/")
        if (own_split or split) not in KNOWN[name].splits:
            raise InputError(
                f"dataset '{name}' has no split '{own_split or split}', only {', '.join(KNOWN[name].splits)}"
            )
        parsed.append((name, own_split or split, None))
    names = [name for name, *_ in parsed]
    if len(set(names)) < len(names):
        raise InputError(f"dataset '{next(n for n in names if names.count(n) > 1)}' is named twice; name each once")
    return parsed


def default_eval(text: str) -> str:
    """What to evaluate after training on `text`: the default split of each known dataset, one's own files as given."""
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    return ",".join(entry if "=" in entry else entry.split(":")[0] for entry in entries)


def warn_of_overlap(trained: list[Dataset], evaluated: list[Dataset]) -> None:
    """One line for each dataset whose metric will be of the images it was trained on."""
    sources = {dataset.index.source for dataset in trained}
    for dataset in evaluated:
        if dataset.index.source in sources:
            log.warning("%s is evaluated on its TRAINING images: %s", dataset.name, dataset.index.source)


def load_datasets(text: str, split: str, data_root: str = "", tiny: int = 0) -> list[Dataset]:
    """The datasets that `text` names, in its order.

    data_root: where the known datasets lie; else DETECTRON2_DATASETS, else ./data
    tiny:      > 0: the generated stand-ins with images of that side instead of the real datasets

    Raises InputError for bad names, nothing under the data root, broken annotations, missing images.
    """
    datasets = []
    for name, own_split, paths in parse_datasets(text, split):
        root = Path(data_root or os.environ.get("DETECTRON2_DATASETS") or "data")
        if tiny and not paths:
            root = generate(name, cache_dir(), tiny)
        datasets.append(load_dataset(name, own_split, paths, root))
    if not datasets:
        raise InputError(
            f"no dataset named; --datasets or --eval-datasets: {', '.join(KNOWN)}, or NAME=ANNOTATIONS.json:IMAGES/"
        )
    return datasets


def load_dataset(name: str, split: str, paths: tuple[str, str] | None, root: Path) -> Dataset:
    """Read the annotations of one dataset and check that all its images exist.

    Raises InputError naming the file and the remedy: nothing under `root`, broken annotations, missing images.
    """
    if paths:
        if not Path(paths[0]).is_file():
            raise InputError(f"dataset '{name}': annotations {paths[0]} do not exist; check the path before the colon")
        dataset = read_coco(name, Path(paths[0]), Path(paths[1]), "coco")
    else:
        known = KNOWN[name]
        if name == "lineart" and not (root / "lineart").is_dir():
            raise InputError("dataset 'lineart' is generated: add --tiny")
        if not root.is_dir():
            raise InputError(f"data root {root} does not exist; give --data-root or set DETECTRON2_DATASETS")
        places = [(root / a, root / i) for a, i in known.splits[split]]
        found = [place for place in places if place[0].is_file()]
        if not found:
            raise InputError(f"dataset '{name}': {places[0][0]} does not exist; put {known.title} there, "
                             "as data/README.md shows, or give --data-root")  # fmt: skip
        annotations, images = next((place for place in found if place[1].is_dir()), found[0])
        dataset = known.read(name, annotations, images, known.metric)
    if len(dataset) == 0:
        raise InputError(f"{dataset.index.source} lists no images; name another file")
    dataset.check_images()
    return dataset
