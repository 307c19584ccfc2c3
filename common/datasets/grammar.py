"""The grammar of --datasets, and the files of the known datasets.

An entry is one of
    NAME or NAME:SPLIT             a known dataset
    NAME=ANNOTATIONS.json:IMAGES/  custom boxes, masks or panoptic segments in COCO format
    NAME=CAPTIONS.tsv:IMAGES/      image-text pairs
    NAME=LIST.txt:IMAGES/          a list of images with VOC's xml files
    NAME=FOLDER/:IMAGES/           xml files, label maps, YOLO's txt files or labelme's json files
    NAME=FOLDER/                   what another tool exported, or a folder of images per class
    NAME:SPLIT=FOLDER/             its split train, val or test
NAME@35000 or NAME@3.5% in place of NAME stands for so many of its images, drawn at random. In a
training, NAME@0 stands for its classes alone.

No module that it imports needs torch, whose import takes seconds.
"""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.datasets.known import ALIASES, GROUPS, KNOWN
from common.datasets.splits import SPLITS
from common.errors import InputError

COCO = "_annotations.coco.json"  # the json file of Roboflow's folders
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
    Raises InputError for no entry, an unknown name (and names the nearest ones), an unknown split,
    a name given twice, and a custom name that cannot be part of a file name.
    """
    if not entries(text):
        raise InputError(
            "no dataset named; give --datasets (or --eval-datasets) names of `python -m"
            " common.datasets list`, or NAME=ANNOTATIONS.json:IMAGES/"
        )
    parsed = []
    for entry in entries(text):
        entry, _ = without_limit(entry)
        parse = parse_custom if "=" in entry else _parse_known
        parsed.append(parse(entry, split))
    names = [name for name, _, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"dataset '{name}' is named twice; name each once")
    return parsed


def parse_custom(entry: str, split: str) -> Parsed:
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


def chosen_entries(chosen: str, trained: str) -> str:
    """Returns the entries of --eval-datasets, with the paths that --datasets gives their names."""
    return ",".join(_defined(entry, trained) for entry in entries(chosen))


def _defined(entry: str, trained: str) -> str:
    """Returns NAME or NAME:SPLIT with the paths that `trained` gives NAME, if there are any."""
    for definition in entries(trained):
        _, custom, paths = definition.partition("=")
        if custom and name_of(entry) == name_of(definition):
            return f"{entry}={paths}" if "=" not in entry else entry
    return entry


def check_places(name: str, annotations: Path, images: Path) -> None:
    """Raises InputError if the annotations of a dataset of one's own do not exist.

    annotations, images: both are the folder or file of an entry NAME=PATH
    """
    if annotations == images:
        if not os.path.exists(images):
            raise InputError(f"dataset '{name}': {images} does not exist; check the path")
    elif not os.path.isdir(annotations) and not os.path.isfile(annotations):
        error = f"annotations {annotations} do not exist; check the path before the colon"
        raise InputError(f"dataset '{name}': {error}")


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


def known_files(name: str, split: str, root: Path) -> tuple[Path, Path]:
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


def check_entries(args: Any, accepts: Collection[str]) -> None:
    """Raises InputError for a dataset that is unknown or not there, without reading any file.

    `load_datasets` checks the same again, one dataset after the other.
    args:    those of a method
    accepts: the kinds of supervision that the method can learn from; `load_datasets` refuses others
    """
    trained = [] if args.eval_only else parse_datasets(args.datasets, "train")
    for name, split, paths in trained:
        if paths:
            check_places(name, *map(Path, paths))
        elif not args.tiny and KNOWN[name].supervision in (None, *accepts):
            known_files(name, split, data_folder(args.data_root))
    if args.eval_datasets:
        parse_datasets(chosen_entries(args.eval_datasets, args.datasets), "val")
