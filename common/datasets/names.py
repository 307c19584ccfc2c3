"""The grammar of --datasets, and the loading of the datasets that it names.

An entry is one of
    NAME or NAME:SPLIT             a known dataset
    NAME=ANNOTATIONS.json:IMAGES/  custom boxes, masks or panoptic segments in COCO format
    NAME=CAPTIONS.tsv:IMAGES/      image-text pairs
    NAME=LIST.txt:IMAGES/          a list of images with VOC's xml files
    NAME=FOLDER/:IMAGES/           xml files, label maps, YOLO's txt files or labelme's json files
    NAME=FOLDER/                   what another tool exported, or a folder of images per class
    NAME:SPLIT=FOLDER/             its split train, val or test
NAME@35000 or NAME@3.5% in place of NAME stands for so many of its images, drawn at random.
"""

import difflib
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from common.batch import Supervision
from common.datasets.dataset import Dataset
from common.datasets.formats import COCO, find_format, has_metric, read_pair, read_place
from common.datasets.known import ALIASES, GROUPS, KNOWN
from common.datasets.readers.folder import read_folder
from common.datasets.splits import SPLITS
from common.datasets.start import check_training
from common.datasets.subset import draw_images
from common.datasets.tiny.generate import generate
from common.errors import InputError
from common.files import cache_dir

log = logging.getLogger("concord")
ROOT = Path(__file__).resolve().parents[2]
Parsed = tuple[str, str, tuple[str, str] | None]


def entries(text: str) -> list[str]:
    """Splits `text` at its commas. Replaces the name of a group by the names of its members."""
    found = []
    for entry in text.split(","):
        entry = entry.strip()
        name = name_of(entry)
        found += [member + entry.removeprefix(name) for member in GROUPS.get(name, [name])]
    return [entry for entry in found if entry]


def name_of(entry: str) -> str:
    """Returns NAME of an entry."""
    return re.match("[^@:=]*", entry)[0]


def without_limit(entry: str) -> tuple[str, str]:
    """Splits NAME@LIMIT:SPLIT=PATHS into NAME:SPLIT=PATHS and LIMIT, which is "" without @.

    Raises InputError for a limit that is neither a number nor a percentage.
    """
    name = name_of(entry)
    rest = entry.removeprefix(name)
    if not rest.startswith("@") or "/" in name:
        return entry, ""
    limit = re.match("@([^:=]*)", rest)[1]
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", limit, re.ASCII):
        raise InputError(
            f"--datasets {entry}: write a number or a percentage of images, {name}@35000 or "
            f"{name}@3.5%, not '{limit}'"
        )
    return name + rest.removeprefix(f"@{limit}"), limit


def parse_datasets(text: str, split: str) -> list[Parsed]:
    """Parses `a,b:val,my=ann.json:images/` into (name, split, paths) of each entry.

    `split` is the split of an entry that names none. Paths are None for a known dataset, otherwise
    (annotations, images). `my=FOLDER/` has FOLDER in both places.
    Raises InputError for an unknown name (and names the nearest ones), an unknown split, a name
    given twice, and a custom name that cannot be part of a file name.
    """
    parsed = []
    for entry in entries(text):
        entry, _ = without_limit(entry)
        parse = _parse_custom if "=" in entry else _parse_known
        parsed.append(parse(entry, split))
    names = [name for name, _, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"dataset '{name}' is named twice; name each once")
    return parsed


def _parse_custom(entry: str, split: str) -> Parsed:
    """Parses NAME=ANNOTATIONS:IMAGES or NAME=FOLDER, and NAME:SPLIT=."""
    name, _, paths = entry.partition("=")
    _refuse_separator(entry)
    name, _, own_split = name.partition(":")
    split = own_split or split
    if split not in SPLITS:
        raise InputError(f"--datasets {entry}: write a split {', '.join(SPLITS)}, not '{split}'")
    annotations, colon, images = _split_paths(paths)
    if not colon:  # a folder holds both; a json file alone lacks its images, but for Roboflow's
        lacks_images = images.endswith(".json") and not images.endswith(COCO)
        annotations = "" if lacks_images else images
    if not annotations:
        raise InputError(
            f"--datasets {entry}: write NAME=ANNOTATIONS.json:IMAGE_FOLDER/, or NAME=FOLDER/ for "
            "what another tool exported or a folder with one folder of images per class; xml files "
            "or label maps are NAME=MAP_FOLDER/:IMAGE_FOLDER/"
        )
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise InputError(
            f"--datasets {entry}: the name '{name}' becomes part of file names; give it letters, "
            "digits and ._- only, and no dot first"
        )
    return name, split, (os.path.expanduser(annotations), os.path.expanduser(images))


def _split_paths(paths: str) -> tuple[str, str, str]:
    """Returns (annotations, colon, images), the first two "" for one path.

    A path may have colons, such as those of a time: then the parts must exist.
    """
    if ":" in paths and os.path.exists(os.path.expanduser(paths)):
        return "", "", paths
    for place in re.finditer(":", paths):
        parts = paths[: place.start()], paths[place.end() :]
        if all(os.path.exists(os.path.expanduser(part)) for part in parts):
            return parts[0], ":", parts[1]
    return paths.rpartition(":")


def _refuse_separator(entry: str) -> None:
    """Raises InputError for an entry in which another one follows without a comma."""
    follower = re.search(r"[\s;]+([\w.-]+)(=|:|$)", entry.partition("=")[2] or entry)
    if follower and (";" in entry or follower[2] == "="):
        raise InputError(
            f"--datasets {entry}: a comma is missing before '{follower[1]}'; write A,B to name two"
            " datasets"
        )


def splits_of_custom(entry: str) -> list[str]:
    """Returns the splits of an entry NAME=PATH: the one it names, else all that its folder has."""
    entry, _ = without_limit(entry)
    name, _, _ = entry.partition("=")
    _, split, (annotations, images) = _parse_custom(entry, "train")
    if ":" in name or annotations != images:
        return [split]
    try:
        _, found = find_format(Path(images))
    except InputError:  # reading it raises the error again
        found = {}
    return [key for key in found if key] or [split]


def _parse_known(entry: str, split: str) -> Parsed:
    """Parses NAME or NAME:SPLIT."""
    name, _, own_split = entry.partition(":")
    name = ALIASES.get(name, name)
    split = own_split or split
    _refuse_separator(entry)
    if "/" in entry or Path(name).suffix in (".json", ".txt", ".tsv"):
        raise InputError(
            f"--datasets {entry}: a dataset of your own needs a name: NAME={entry}; its paths must"
            " have no comma"
        )
    if name not in KNOWN:
        near = difflib.get_close_matches(name, [*KNOWN, *ALIASES, *GROUPS], n=3, cutoff=0.4)
        raise InputError(
            f"unknown dataset '{name}'; nearest: {', '.join(near or list(KNOWN)[:8])}; "
            "your own: NAME=ANN.json:IMAGES/; all names: python -m common.datasets list"
        )
    splits = KNOWN[name].splits
    if split not in splits:
        raise InputError(f"dataset '{name}' has no split '{split}', only {', '.join(splits)}")
    return name, split, None


def eval_entries(
    chosen: str, trained: str, without: Collection[str] = (), instead: Mapping[str, str] = {}
) -> str:
    """Returns the datasets to evaluate, from the values of --eval-datasets and --datasets.

    chosen:  may name a dataset that `trained` defines, as in my=ann.json:images/
    without: names that the default leaves out
    instead: {dataset: the one that the default has in its place}

    The default, for an empty `chosen`, is all of `trained`, without limits. A known dataset
    contributes its name alone, which stands for its default split. A custom dataset contributes its
    entry without a split. Datasets with image-level labels only (in21k, folders of classes) are
    left out. Returns "" if none is left.
    """
    if chosen:
        return ",".join(_defined(entry, trained) for entry in entries(chosen))
    kept = []
    for entry in entries(trained):
        _, custom, paths = entry.partition("=")
        name = name_of(entry)
        if name in without:
            continue
        if custom:
            if ":" in paths or has_metric(Path(os.path.expanduser(paths))):
                kept.append(f"{name}={paths}")
            continue
        name = ALIASES.get(name, name)
        if name not in KNOWN or KNOWN[name].supervision != "image_labels":
            kept.append(instead.get(name, name))
    return ",".join(kept)


def _defined(entry: str, trained: str) -> str:
    """Returns NAME or NAME:SPLIT with the paths that `trained` gives NAME, if there are any."""
    for definition in entries(trained):
        _, custom, paths = definition.partition("=")
        if custom and name_of(entry) == name_of(definition):
            return f"{entry}={paths}" if "=" not in entry else entry
    return entry


def with_beside(text: str, beside: Mapping[str, str], root: Path | None) -> str:
    """Returns the datasets of `text` and those `beside` them that are there.

    root: the data root, or None for generated data, which is always there
    """
    names = entries(text)
    for name in entries(text):
        other = beside.get(name)
        if other is None or other in names:
            continue
        if root is None or find_files(other, "val", root):
            names.append(other)
        else:
            message = "%s is not evaluated: %s is not in %s"
            log.info(message, other, KNOWN[other].title, root)
    return ",".join(names)


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

    Raises InputError as `parse_datasets`, `load_dataset` and `draw_images`, and for other
    supervision.
    """
    datasets = []
    for entry, (name, own_split, paths) in zip(entries(text), parse_datasets(text, split)):
        root = data_folder(data_root)
        if not paths:
            known = KNOWN[name]
            if known.supervision:  # refuse before any file is listed or generated
                _refuse_supervision(known.supervision, accepts, name, split)
            if tiny and data_root:
                warning = "--tiny draws a stand-in for '%s'; %s is not read for it"
                log.warning(warning, name, data_root)
            for part in (known.beside, known.whole or name):
                if tiny and part:
                    root = generate(part, cache_dir(), tiny)
        dataset = load_dataset(name, own_split, paths, root, check)
        _refuse_supervision(dataset.supervision, accepts, name, split)
        if check and split == "train":
            check_training(dataset)
        _, limit = without_limit(entry)
        if limit:
            dataset = draw_images(dataset, limit)
        datasets.append(replace(dataset, masks=masks))
    if not datasets:
        raise InputError(
            "no dataset named; give --datasets (or --eval-datasets) names of `python -m"
            " common.datasets list`, or NAME=ANNOTATIONS.json:IMAGES/"
        )
    return datasets


def data_folder(data_root: str) -> Path:
    """Returns the data root: `data_root`, or $DETECTRON2_DATASETS, or ./data."""
    folder = data_root or os.environ.get("DETECTRON2_DATASETS") or "data"
    return Path(os.path.expanduser(folder))


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
        if annotations == images:
            dataset = read_place(name, images, split)
            if dataset.supervision == "image_labels":
                return dataset  # it lists files that exist: none can be missing
        else:
            dataset = read_pair(name, annotations, images, split)
    else:
        known = KNOWN[name]
        annotations, images = _known_files(name, split, root)
        if known.class_folders and annotations.is_dir():
            return read_folder(name, annotations)  # lists files that exist: none can be missing
        read_as = known.whole if known.derive else name
        dataset = known.read(read_as, annotations, images, known.metric)
        if known.derive:
            dataset = known.derive(dataset, split)
        dataset = replace(dataset, federated=known.federated)
    if len(dataset) == 0:
        raise InputError(f"{dataset.index.source} lists no images; name another file")
    if check:
        dataset.check_images()
    return dataset


def _known_files(name: str, split: str, root: Path) -> tuple[Path, Path]:
    """Returns the files of `find_files`. Raises InputError that names what to download."""
    known = KNOWN[name]
    if known.generated and not (root / name).is_dir():
        raise InputError(f"dataset '{name}' is generated: add --tiny")
    if not os.path.isdir(root):
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
        able = ", ".join(f"{method}.py" for method in methods_for(supervision))
        raise InputError(
            f"dataset '{name}' has {has} only; this method needs {needs}; {remedy}, or train with"
            f" {able}"
        )


def methods_for(supervision: Supervision) -> list[str]:
    """Returns the methods that can learn from this kind of supervision.

    A method is a file with `class Args` in the root. It lists the kinds in SUPERVISION, otherwise
    it learns from boxes and instances.
    """
    able = []
    for path in sorted(ROOT.glob("*.py")):
        source = path.read_text()
        listed = re.search(r"^SUPERVISION = (\(.*?\))", source, re.MULTILINE)
        kinds = listed[1] if listed else "boxes instances"
        if "\nclass Args" in source and supervision in re.findall(r"\w+", kinds):
            able.append(path.stem)
    return able
