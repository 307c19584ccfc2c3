"""The grammar of --datasets, and the loading of the datasets that it names.

An entry is one of
    NAME or NAME:SPLIT             a known dataset
    NAME=ANNOTATIONS.json:IMAGES/  custom boxes, masks or panoptic segments in COCO format
    NAME=CAPTIONS.tsv:IMAGES/      image-text pairs
    NAME=LIST.txt:IMAGES/          a list of images with VOC's xml files
    NAME=FOLDER/:IMAGES/           xml files or label maps
    NAME=FOLDER/                   images and their xml files, or a folder of images per class
"""

import difflib
import logging
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from common.batch import Supervision
from common.datasets.dataset import Dataset
from common.datasets.known import ALIASES, GROUPS, KNOWN
from common.datasets.readers.captions import read_captions
from common.datasets.readers.coco import read_coco
from common.datasets.readers.folder import read_folder
from common.datasets.readers.panoptic import is_panoptic, read_panoptic
from common.datasets.readers.semantic import read_semantic
from common.datasets.readers.voc import holds_xml, read_voc
from common.datasets.start import check_training
from common.datasets.tiny.generate import generate
from common.errors import InputError
from common.files import cache_dir

log = logging.getLogger("concord")
Parsed = tuple[str, str, tuple[str, str] | None]


def entries(text: str) -> list[str]:
    """Splits `text` at its commas. Replaces the name of a group by the names of its members."""
    found = []
    for entry in text.split(","):
        name, colon, split = entry.strip().partition(":")
        found += [member + colon + split for member in GROUPS.get(name, [name])]
    return [entry for entry in found if entry]


def parse_datasets(text: str, split: str) -> list[Parsed]:
    """Parses `a,b:val,my=ann.json:images/` into (name, split, paths) of each entry.

    `split` is the split of an entry that names none. Paths are None for a known dataset, otherwise
    (annotations, images). `my=FOLDER/` has FOLDER in both places.
    Raises InputError for an unknown name (and names the nearest ones), an unknown split, a name
    given twice, and a custom name that cannot be part of a file name.
    """
    parsed = [
        _parse_custom(entry, split) if "=" in entry else _parse_known(entry, split)
        for entry in entries(text)
    ]
    names = [name for name, _, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"dataset '{name}' is named twice; name each once")
    return parsed


def _parse_custom(entry: str, split: str) -> Parsed:
    """Parses NAME=ANNOTATIONS:IMAGES or NAME=FOLDER."""
    name, _, paths = entry.partition("=")
    annotations, colon, images = paths.rpartition(":")
    if not colon:  # a folder holds both; a json file alone lacks its images
        annotations = "" if images.endswith(".json") else images
    if not annotations:
        raise InputError(
            f"--datasets {entry}: write NAME=ANNOTATIONS.json:IMAGE_FOLDER/, or NAME=FOLDER/ for a "
            "folder with one folder of images per class; xml files or label maps are "
            "NAME=MAP_FOLDER/:IMAGE_FOLDER/"
        )
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise InputError(
            f"--datasets {entry}: the name '{name}' becomes part of file names; give it letters, "
            "digits and ._- only, and no dot first"
        )
    return name, split, (annotations, images)


def _parse_known(entry: str, split: str) -> Parsed:
    """Parses NAME or NAME:SPLIT."""
    name, _, own_split = entry.partition(":")
    name = ALIASES.get(name, name)
    split = own_split or split
    if name not in KNOWN:
        near = difflib.get_close_matches(name, [*KNOWN, *ALIASES, *GROUPS], n=3, cutoff=0.4)
        raise InputError(
            f"unknown dataset '{name}'; nearest: {', '.join(near or KNOWN)}; "
            "your own: NAME=ANN.json:IMAGES/"
        )
    splits = KNOWN[name].splits
    if split not in splits:
        raise InputError(f"dataset '{name}' has no split '{split}', only {', '.join(splits)}")
    return name, split, None


def default_eval(text: str, without: Collection[str] = ()) -> str:
    """Returns the default of --eval-datasets for the value `text` of --datasets.

    Both are comma-separated lists. A known dataset contributes its name alone, which stands for its
    default split. A custom dataset contributes its entry unchanged. Left out are datasets with
    image-level labels only (in21k, image folders) and the names in `without`. Returns "" if none is
    left.
    """
    kept = []
    for entry in entries(text):
        name, custom, paths = entry.partition("=")
        name = name.partition(":")[0]
        if name in without:
            continue
        if custom:
            if ":" in paths:
                kept.append(entry)
            continue
        name = ALIASES.get(name, name)
        if name not in KNOWN or KNOWN[name].supervision != "image_labels":
            kept.append(name)
    return ",".join(kept)


def warn_of_overlap(trained: list[Dataset], evaluated: list[Dataset]) -> None:
    """Logs one warning for each evaluated dataset whose annotation file is also trained on."""
    sources = {dataset.index.source for dataset in trained}
    for dataset in evaluated:
        source = dataset.index.source
        if source in sources:
            log.warning("%s is evaluated on its TRAINING images: %s", dataset.name, source)


def load_datasets(
    text: str,
    split: str,
    data_root: str = "",
    tiny: int = 0,
    masks: bool = False,
    accepts: tuple[Supervision, ...] = ("boxes", "instances"),
    check: bool = True,
) -> list[Dataset]:
    """Loads the datasets that `text` names, in its order.

    data_root: folder of the known datasets; by default $DETECTRON2_DATASETS, or ./data
    tiny:      if > 0, generated stand-ins with images of this side replace the real datasets
    masks:     samples have instance masks, where the annotations have them
    accepts:   the kinds of supervision that the method can learn from
    check:     a missing image is an error; a train split is looked at as `check_training` does

    Raises InputError as `parse_datasets` and `load_dataset`, and for other supervision.
    """
    datasets = []
    for name, own_split, paths in parse_datasets(text, split):
        root = data_folder(data_root)
        if not paths:
            known = KNOWN[name]
            if known.supervision:  # refuse before any file is listed or generated
                _refuse_supervision(known.supervision, accepts, name, split)
            if tiny and data_root:
                warning = "--tiny draws a stand-in for '%s'; %s is not read for it"
                log.warning(warning, name, data_root)
            if tiny:
                root = generate(known.whole or name, cache_dir(), tiny)
        dataset = load_dataset(name, own_split, paths, root, check)
        _refuse_supervision(dataset.supervision, accepts, name, split)
        if check and split == "train":
            check_training(dataset)
        datasets.append(replace(dataset, masks=masks))
    if not datasets:
        raise InputError(
            f"no dataset named; --datasets or --eval-datasets: {', '.join(KNOWN)}, or "
            "NAME=ANNOTATIONS.json:IMAGES/"
        )
    return datasets


def data_folder(data_root: str) -> Path:
    """Returns the data root: `data_root`, or $DETECTRON2_DATASETS, or ./data."""
    return Path(data_root or os.environ.get("DETECTRON2_DATASETS") or "data")


def find_files(name: str, split: str, root: Path) -> tuple[Path, Path] | None:
    """Returns the paths of the annotations and the images of a known dataset.

    They are the first that both exist, or the first annotations that exist, or None.
    """
    places = [(root / file, root / folder) for file, folder in KNOWN[name].splits[split]]
    found = [place for place in places if place[0].exists()]
    for annotations, images in found:
        if images.is_dir():
            return annotations, images
    return found[0] if found else None


def load_dataset(
    name: str, split: str, paths: tuple[str, str] | None, root: Path, check: bool = True
) -> Dataset:
    """Reads the dataset that `parse_datasets` describes by `name`, `split` and `paths`.

    root:  the data root, for a known dataset
    check: a missing image is an error
    Raises InputError that names the file and the remedy: nothing under `root`, broken annotations,
    missing images.
    """
    if paths:
        annotations, images = Path(paths[0]), Path(paths[1])
        if paths[0] == paths[1]:
            among_images = any(images.glob("*.xml"))  # as Roboflow exports them
            return read_voc(name, images, images) if among_images else read_folder(name, images)
        dataset = _read_custom(name, annotations, images)
    else:
        known = KNOWN[name]
        annotations, images = _known_files(name, split, root)
        if known.class_folders and annotations.is_dir():
            return read_folder(name, annotations)  # lists files that exist: none can be missing
        read_as = known.whole if known.base_split else name
        dataset = known.read(read_as, annotations, images, known.metric)
        if known.base_split:
            dataset = known.base_split(dataset, split)
    if len(dataset) == 0:
        raise InputError(f"{dataset.index.source} lists no images; name another file")
    if check:
        dataset.check_images()
    return dataset


def _read_custom(name: str, annotations: Path, images: Path) -> Dataset:
    """Reads a custom dataset; the annotations' kind follows from their ending and content."""
    if annotations.is_dir():
        read = read_voc if holds_xml(annotations) else read_semantic
        return read(name, annotations, images)
    if not annotations.is_file():
        error = f"annotations {annotations} do not exist; check the path before the colon"
        raise InputError(f"dataset '{name}': {error}")
    if annotations.suffix == ".txt":
        return read_voc(name, annotations, images)
    if annotations.suffix == ".tsv":
        return read_captions(name, annotations, images)
    if is_panoptic(annotations):
        return read_panoptic(name, annotations, images, "pq")
    return read_coco(name, annotations, images, "coco")


def _known_files(name: str, split: str, root: Path) -> tuple[Path, Path]:
    """Returns the files of `find_files`. Raises InputError that names what to download."""
    known = KNOWN[name]
    if known.generated and not (root / name).is_dir():
        raise InputError(f"dataset '{name}' is generated: add --tiny")
    if not root.is_dir():
        raise InputError(
            f"data root {root} does not exist; give --data-root or set DETECTRON2_DATASETS"
        )
    found = find_files(name, split, root)
    if found:
        return found
    annotations, images = known.splits[split][0]
    where = "" if images == annotations else f", its images in {root / images}"
    raise InputError(
        f"dataset '{name}': {root / annotations} does not exist; put {known.title} there{where}, "
        "as data/README.md shows, or give --data-root"
    )


def _refuse_supervision(
    supervision: Supervision, accepts: tuple[Supervision, ...], name: str, split: str
) -> None:
    """Raises InputError if the method cannot learn from this kind of supervision."""
    words = {
        "image_labels": "image labels",
        "semantic": "semantic label maps",
        "panoptic": "panoptic segments",
    }
    train_remedy, eval_remedy = "leave it out of --datasets", "name others with --eval-datasets"
    remedy = train_remedy if split == "train" else eval_remedy
    if supervision not in accepts:
        has = words.get(supervision, supervision)
        needs = " or ".join(words.get(kind, kind) for kind in accepts)
        raise InputError(f"dataset '{name}' has {has} only; this method needs {needs}; {remedy}")
