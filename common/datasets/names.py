"""The loading of the datasets that the entries of `common.datasets.grammar` name."""

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.datasets.base_split import cityscapes_part, coco_base, lvis_base
from common.datasets.coarse import oid_top
from common.datasets.dataset import Dataset
from common.datasets.formats import find_format, has_metric, has_validation, read_pair, read_place
from common.datasets.grammar import (
    chosen_entries,
    data_folder,
    entries,
    find_files,
    known_files,
    name_of,
    parse_custom,
    parse_datasets,
    without_limit,
)
from common.datasets.known import ALIASES, KNOWN, Supervision
from common.datasets.lvis_coco import lvis_with_coco
from common.datasets.readers.captions import read_captions
from common.datasets.readers.coco import read_coco, read_o365_instances
from common.datasets.readers.folder import read_folder
from common.datasets.readers.openimages import read_openimages
from common.datasets.readers.panoptic import read_panoptic
from common.datasets.readers.semantic import read_semantic
from common.datasets.readers.visual_genome import read_visual_genome
from common.datasets.readers.voc import read_voc
from common.datasets.shards import find_tars, images_in_tars
from common.datasets.start import check_training
from common.datasets.subset import draw_images
from common.datasets.tiny.generate import generate
from common.errors import InputError
from common.files import cache_dir

log = logging.getLogger("concord")
ROOT = Path(__file__).resolve().parents[2]
READERS = {  # of `Known.format`: read(name, annotations, images, metric) -> Dataset
    "coco": read_coco,
    "o365_instances": read_o365_instances,
    "openimages": read_openimages,
    "semantic": read_semantic,
    "panoptic": read_panoptic,
    "voc": read_voc,
    "visual_genome": read_visual_genome,
    "captions": read_captions,
}
DERIVE = {  # make(dataset, split) -> Dataset; it makes these datasets from `Known.whole`
    "coco-base": coco_base,
    "lvis-base": lvis_base,
    "lvis+coco": lvis_with_coco,
    "oid-top": oid_top,
    "cityscapes-common": partial(cityscapes_part, name="cityscapes-common"),
    "cityscapes-rare": partial(cityscapes_part, name="cityscapes-rare"),
}


def splits_of_custom(entry: str) -> list[str]:
    """Returns the splits of an entry NAME=PATH: the one it names, else all that its folder has."""
    entry, _ = without_limit(entry)
    name, _, _ = entry.partition("=")
    _, split, (annotations, images) = parse_custom(entry, "train")
    if ":" in name or annotations != images:
        return [split]
    try:
        _, found = find_format(Path(images))
    except InputError:  # reading it raises the error again
        found = {}
    return [key for key in found if key] or [split]


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
    left out, unless their folder has a split for validation. Returns "" if none is left.
    """
    if chosen:
        return chosen_entries(chosen, trained)
    kept = []
    for entry in entries(trained):
        _, custom, paths = entry.partition("=")
        name = name_of(entry)
        place = Path(os.path.expanduser(paths))
        if custom and ":" not in paths and has_validation(place):
            kept.append(f"{name}={paths}")
            continue
        if name in without:
            continue
        if custom:
            if ":" in paths or has_metric(place):
                kept.append(f"{name}={paths}")
            continue
        name = ALIASES.get(name, name)
        if name not in KNOWN or KNOWN[name].supervision != "image_labels":
            kept.append(instead.get(name, name))
    return ",".join(kept)


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
            dataset = draw_images(dataset, limit, split)
        datasets.append(replace(dataset, masks=masks))
    return datasets


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
            if find_tars(images) and annotations.suffix != ".json":
                raise InputError(
                    f"dataset '{name}': images in tar files, {images}, need a COCO json, not"
                    f" {annotations}; unpack them, or write {name}=FILE.json:{images}"
                )
            dataset = read_pair(name, annotations, images, split)
    else:
        known = KNOWN[name]
        annotations, images = known_files(name, split, root)
        if known.class_folders and annotations.is_dir():
            return read_folder(name, annotations)  # lists files that exist: none can be missing
        read_as = known.whole if name in DERIVE else name
        dataset = READERS[known.format](read_as, annotations, images, known.metric)
        if name in DERIVE:
            dataset = DERIVE[name](dataset, split)
        dataset = replace(dataset, federated=known.federated)
    if dataset.shards is None and (tars := find_tars(dataset.images)):
        shards, others = images_in_tars(dataset.index.file_names, tars)
        message = "%s: its images are read from %d tar files, in which %d images are not listed"
        log.info(message, name, len(tars), others)
        dataset = replace(dataset, shards=shards)
    if len(dataset) == 0:
        raise InputError(f"{dataset.index.source} lists no images; name another file")
    if check:
        dataset.check_images()
    return dataset


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
