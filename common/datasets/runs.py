"""The datasets that a run trains on and evaluates."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from common.datasets.dataset import Dataset
from common.datasets.grammar import data_folder, entries, name_of
from common.datasets.known import ALIASES, KNOWN, Supervision
from common.datasets.names import eval_entries, load_datasets, with_beside
from common.datasets.subset import edit_classes
from common.errors import InputError
from common.labels import LabelSpace, fold, quoted
from common.saved import read_metadata
from common.text import tables

log = logging.getLogger("concord")


def warn_of_overlap(trained: list[Dataset], evaluated: list[Dataset]) -> None:
    """Marks each evaluated dataset whose annotation file is also trained on; logs a warning."""
    sources = {dataset.index.source for dataset in trained}
    for dataset in evaluated:
        source = dataset.index.source
        dataset.trained_on = source in sources
        if dataset.trained_on:
            log.warning("%s is evaluated on its TRAINING images: %s", dataset.name, source)


def training_datasets(
    args: Any,
    size: int,
    masks: bool = False,
    accepts: tuple[Supervision, ...] = ("boxes", "instances"),
) -> list[Dataset]:
    """Loads the datasets of --datasets, with the classes of --classes and --rename.

    size: side of generated images under --tiny, otherwise 0; masks, accepts: as in `load_datasets`
    Raises InputError as `load_datasets` and `edit_classes`.
    """
    datasets = load_datasets(args.datasets, "train", args.data_root, size, masks, accepts)
    return edit_classes(datasets, args.classes, args.rename, "train")


def evaluation_datasets(
    args: Any,
    label_space: LabelSpace,
    size: int,
    accepts: tuple[Supervision, ...] = ("boxes", "instances", "image_labels"),
    without: Collection[str] = (),
    instead: Mapping[str, str] = {},
    beside: Mapping[str, str] = {},
) -> list[Dataset]:
    """Loads the datasets to evaluate, with the classes of --classes and --rename; [] to predict.

    label_space:      of the training; it must have or make a text for each class name
    size, accepts:    as in `training_datasets`; image labels can be evaluated by any detector
    without, instead: as in `eval_entries`
    beside:           {dataset: a known one that the default has beside it, if its files are there}

    Raises InputError before the training, for example for a class name without an embedding, also
    for one of --vocabulary, and as `check_same_dataset`.
    """
    if args.predict:
        label_space.swap(args.vocabulary)
        return []
    text = eval_entries(args.eval_datasets, args.datasets, without, instead)
    if not args.eval_datasets:
        text = with_beside(text, beside, None if size else data_folder(args.data_root))
        _tell_of_others(without, text)
    datasets = load_datasets(text, "val", args.data_root, size, False, accepts)
    datasets = edit_classes(datasets, args.classes, args.rename, "val")
    if args.eval_only:
        log.info("evaluates %s", ", ".join(f"{d.name} ({len(d)} images)" for d in datasets))
    for i, dataset in enumerate(datasets):
        check_same_dataset(dataset, label_space)
        datasets[i] = with_table(args, dataset, label_space)
        label_space.swap(datasets[i].vocabulary)
    return datasets


def _tell_of_others(without: Collection[str], text: str) -> None:
    """Logs which datasets of image labels are not among the entries `text`, and how they can be."""
    evaluated = [name_of(entry) for entry in entries(text)]
    for name in without:
        if name not in evaluated:
            entry = f"{name}@200:train" if name in KNOWN else f"{name}@200"
            message = (
                "%s is not evaluated, as it has image labels and no split for validation; "
                "--eval-datasets %s gives top-1 and top-5 accuracy on 200 images of the training"
            )
            log.info(message, name, ",".join([*evaluated, entry]))


def with_table(args: Any, dataset: Dataset, label_space: LabelSpace) -> Dataset:
    """Returns the dataset with the text of the .npy file that --eval-only names for it, if any.

    Without it, classes of the training keep the text that they had there. So they do if the
    training had that file. Raises InputError for a file that cannot be read or has other rows.
    """
    encoder = getattr(args, "text_encoder", "")
    if not encoder.endswith(".npy") or not args.eval_only:
        return dataset
    if read_metadata(args.weights)["args"].get("text_encoder") == encoder:
        return dataset
    if {dataset.name, ""}.isdisjoint(tables(encoder)):
        message = "%s: --text-encoder %s has no file for it, so it keeps the text of the training"
        log.info(message, dataset.name, encoder)
        return dataset
    log.info("%s: its classes have the rows of --text-encoder %s", dataset.name, encoder)
    return replace(dataset, vocabulary=dataset.vocabulary.with_text(label_space.embed))


def check_same_dataset(dataset: Dataset, label_space: LabelSpace) -> None:
    """Raises InputError if a dataset only has the name of one of the training, and no class of it.

    Logs a warning if some of its classes are new. A known dataset has them on purpose: novel ones.
    """
    if dataset.name in KNOWN or dataset.name not in label_space.vocabularies:
        return
    trained = label_space.vocabularies[dataset.name].names
    folded = {fold(name) for name in trained}
    new = [name for name in dataset.vocabulary.names if fold(name) not in folded]
    if len(new) == len(dataset.vocabulary.names):
        raise InputError(
            f"{dataset.index.source}: its classes {quoted(new)} are not those that"
            f" '{dataset.name}' had in training ({quoted(trained)}); give it another name"
        )
    if new:
        log.warning("%s: had no such classes in training: %s", dataset.name, quoted(new))


def validation_datasets(
    args: Any, label_space: LabelSpace, size: int, evaluated: list[Dataset]
) -> list[Dataset]:
    """Returns each dataset of `label_space`, as it is `evaluated`, or else by default."""
    by_name = {dataset.name: dataset for dataset in evaluated}
    names = {entry: name_of(entry) for entry in entries(args.datasets)}
    if others := [entry for entry, n in names.items() if ALIASES.get(n, n) not in by_name]:
        args = replace(args, datasets=",".join(others), eval_datasets="")
        default = evaluation_datasets(args, label_space, size)
        by_name |= {dataset.name: dataset for dataset in default}
    return [by_name[name] for name in label_space.datasets]
