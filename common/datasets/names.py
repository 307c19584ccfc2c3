"""The known datasets, their folders, and the grammar of --datasets.

NAME, NAME:SPLIT, NAME=ANNOTATIONS.json:IMAGES/, NAME=CAPTIONS.tsv:IMAGES/, NAME=XML_OR_LABEL_MAPS/:IMAGES/ or, for a
folder or tar file of images per class, NAME=FOLDER/.
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
from common.datasets.tiny.generate import generate
from common.errors import InputError
from common.files import cache_dir

log = logging.getLogger("concord")


def entries(text: str) -> list[str]:
    """The entries between the commas of `text`; a group's name, perhaps with a split, becomes its members'."""
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, colon, rest = entry.partition(":")
        found += [member + colon + rest for member in GROUPS.get(name, [name])]
    return found


def parse_datasets(text: str, split: str) -> list[tuple[str, str, tuple[str, str] | None]]:
    """`a,b:val,my=ann.json:images/` -> [(name, split, (annotations, images) or None)]; `split` where none is named.

    `my=FOLDER/` names a folder of images per class: both are FOLDER.
    Raises InputError for an unknown name (with the nearest ones), an unknown split, a name given twice, a name of one's
    own that cannot be part of a file name.
    """
    parsed = []
    for entry in entries(text):
        name, custom, paths = entry.partition("=")
        if custom:
            annotations, colon, images = paths.rpartition(":")
            if not (annotations if colon else images) or (not colon and images.endswith(".json")):
                raise InputError(f"--datasets {entry}: write NAME=ANNOTATIONS.json:IMAGE_FOLDER/, or NAME=FOLDER/ "
                                 "for a folder with one folder of images per class; xml files or label maps are "
                                 "NAME=MAP_FOLDER/:IMAGE_FOLDER/")  # fmt: skip
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise InputError(f"--datasets {entry}: the name '{name}' names files, too; give it letters, digits and "
                                 "._- only, the first no dot")  # fmt: skip
            parsed.append((name, split, (annotations or images, images)))
            continue
        name, _, own_split = entry.partition(":")
        name = ALIASES.get(name, name)
        if name not in KNOWN:
            near = difflib.get_close_matches(
                name, [*KNOWN, *ALIASES, *GROUPS], n=3, cutoff=0.4
            ) or list(KNOWN)
            raise InputError(
                f"unknown dataset '{name}'; nearest: {', '.join(near)}; your own: NAME=ANN.json:IMAGES/"
            )
        if (own_split or split) not in KNOWN[name].splits:
            raise InputError(
                f"dataset '{name}' has no split '{own_split or split}', only {', '.join(KNOWN[name].splits)}"
            )
        parsed.append((name, own_split or split, None))
    names = [name for name, *_ in parsed]
    if len(set(names)) < len(names):
        raise InputError(
            f"dataset '{next(n for n in names if names.count(n) > 1)}' is named twice; name each once"
        )
    return parsed


def default_eval(text: str, without: Collection[str] = ()) -> str:
    """What to evaluate after training on `text`: the default split of each known dataset, one's own files as given.

    Image labels cannot be evaluated: in21k and the like are left out, one's own image folders, and the names `without`.
    "" if none remains.
    """
    names = []
    for entry in entries(text):
        name, custom, paths = entry.partition("=")
        name = name.partition(":")[0]
        if name in without:
            continue
        if custom and ":" in paths:
            names.append(entry)
        elif not custom and not only_image_labels(name := ALIASES.get(name, name)):
            names.append(name)
    return ",".join(names)


def only_image_labels(name: str) -> bool:
    return name in KNOWN and "val" not in KNOWN[name].splits


def known_supervision(name: str) -> Supervision | None:
    """What a known dataset has, if that is not for its files to tell."""
    if only_image_labels(name):
        return "image_labels"
    return {read_semantic: "semantic", read_panoptic: "panoptic"}.get(KNOWN[name].read)


def warn_of_overlap(trained: list[Dataset], evaluated: list[Dataset]) -> None:
    """One line for each dataset whose metric will be of the images it was trained on."""
    sources = {dataset.index.source for dataset in trained}
    for dataset in evaluated:
        if dataset.index.source in sources:
            log.warning(
                "%s is evaluated on its TRAINING images: %s", dataset.name, dataset.index.source
            )


def load_datasets(
    text: str,
    split: str,
    data_root: str = "",
    tiny: int = 0,
    masks: bool = False,
    accepts: tuple[Supervision, ...] = ("boxes", "instances"),
    check: bool = True,
) -> list[Dataset]:
    """The datasets that `text` names, in its order.

    data_root: where the known datasets lie; else DETECTRON2_DATASETS, else ./data
    tiny:      > 0: the generated stand-ins with images of that side instead of the real datasets
    masks:     the samples carry instance masks, where the annotations have them
    accepts:   the kinds of supervision that the method can learn from
    check:     a missing image is an error

    Raises InputError for bad names, nothing under the data root, broken annotations, missing images, another kind of
    supervision.
    """
    datasets = []
    for name, own_split, paths in parse_datasets(text, split):
        root = data_folder(data_root)
        if not paths and (supervision := known_supervision(name)):
            refuse_unless(supervision, accepts, name, split)  # before files are listed or generated
        if tiny and not paths:
            if data_root:
                log.warning(
                    "--tiny draws a stand-in for '%s'; %s is not read for it", name, data_root
                )
            root = generate(KNOWN[name].whole or name, cache_dir(), tiny)
        dataset = load_dataset(name, own_split, paths, root, check)
        refuse_unless(dataset.supervision, accepts, name, split)
        boxless = dataset.supervision in ("boxes", "instances") and not len(dataset.index.labels)
        if check and split == "train" and boxless and not dataset.novel:
            raise InputError(f"{dataset.index.source} has no box to learn from; add annotations or, for image labels, "
                             "pos_category_ids")  # fmt: skip
        datasets.append(replace(dataset, masks=masks))
    if not datasets:
        raise InputError(
            f"no dataset named; --datasets or --eval-datasets: {', '.join(KNOWN)}, or NAME=ANNOTATIONS.json:IMAGES/"
        )
    return datasets


def data_folder(data_root: str) -> Path:
    return Path(data_root or os.environ.get("DETECTRON2_DATASETS") or "data")


def find_files(name: str, split: str, root: Path) -> tuple[Path, Path] | None:
    """The annotations and images of a known dataset: the first that exist, both if possible."""
    places = [(root / a, root / i) for a, i in KNOWN[name].splits[split]]
    found = [place for place in places if place[0].exists()]
    return next((place for place in found if place[1].is_dir()), found[0] if found else None)


def refuse_unless(
    supervision: Supervision, accepts: tuple[Supervision, ...], name: str, split: str
) -> None:
    words = {
        "image_labels": "image labels",
        "semantic": "semantic label maps",
        "panoptic": "panoptic segments",
    }
    if supervision not in accepts:
        has, *needs = (words.get(kind, kind) for kind in (supervision, *accepts))
        remedy = (
            "leave it out of --datasets" if split == "train" else "name others with --eval-datasets"
        )
        raise InputError(
            f"dataset '{name}' has {has} only; this method needs {' or '.join(needs)}; {remedy}"
        )


def load_dataset(
    name: str, split: str, paths: tuple[str, str] | None, root: Path, check: bool = True
) -> Dataset:
    """Read the annotations of one dataset and check that all its images exist, unless told not to.

    Raises InputError naming the file and the remedy: nothing under `root`, broken annotations, missing images.
    """
    if paths and paths[0] == paths[1]:
        folder = Path(paths[0])
        beside = any(
            folder.glob("*.xml")
        )  # each xml file beside its image, as Roboflow exports them
        return read_voc(name, folder, folder) if beside else read_folder(name, folder)
    if paths:
        annotations, images = map(Path, paths)
        if annotations.is_dir():
            dataset = (read_voc if holds_xml(annotations) else read_semantic)(
                name, annotations, images
            )
        elif annotations.is_file() and annotations.suffix == ".txt":
            dataset = read_voc(name, annotations, images)
        elif annotations.is_file() and annotations.suffix == ".tsv":
            dataset = read_captions(name, annotations, images)
        elif annotations.is_file():
            read, metric = (
                (read_panoptic, "pq") if is_panoptic(annotations) else (read_coco, "coco")
            )
            dataset = read(name, annotations, images, metric)
        else:
            raise InputError(
                f"dataset '{name}': annotations {annotations} do not exist; check the path before the colon"
            )
    else:
        known = KNOWN[name]
        if name == "lineart" and not (root / "lineart").is_dir():
            raise InputError("dataset 'lineart' is generated: add --tiny")
        if not root.is_dir():
            raise InputError(
                f"data root {root} does not exist; give --data-root or set DETECTRON2_DATASETS"
            )
        if not (found := find_files(name, split, root)):
            annotations, images = known.splits[split][0]
            where = "" if images == annotations else f", its images in {root / images}"
            raise InputError(f"dataset '{name}': {root / annotations} does not exist; put {known.title} there{where}, "
                             "as data/README.md shows, or give --data-root")  # fmt: skip
        annotations, images = found
        if known.read is read_coco and annotations.is_dir():
            return read_folder(
                name, annotations
            )  # it lists what exists, so that nothing can be missing
        dataset = known.read(
            known.whole if known.base_split else name, annotations, images, known.metric
        )
        dataset = known.base_split(dataset, split) if known.base_split else dataset
    if len(dataset) == 0:
        raise InputError(f"{dataset.index.source} lists no images; name another file")
    if check:
        dataset.check_images()
    return dataset
