"""Command line that lists the known datasets and checks the files of datasets.

python -m common.datasets list
python -m common.datasets check coco
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from common.command import run_command
from common.datasets.grammar import Parsed, data_folder, entries, find_files, parse_datasets
from common.datasets.known import ALIASES, KNOWN
from common.errors import InputError
from common.files import DATA

TINY_SIZE = 192  # that of the detectors, so that one set of generated images serves both
KINDS = ("boxes", "instances", "semantic", "panoptic", "image_labels")


def list_datasets(data_root: str = "") -> None:
    """Prints one line for each split of the known datasets.

    The line shows the number of classes, and the annotations or, if they are missing, what to
    download.

    Args:
        data_root: where the datasets are stored; by default $DETECTRON2_DATASETS, or ./data
    """
    rows = []
    for name, known in KNOWN.items():
        classes = ""
        for listed in (known.whole, name):
            file = DATA / f"vocabularies/{listed}.json"
            if file.is_file():
                classes = f"{len(json.loads(file.read_text())['names']):>4} classes"
        for split in known.splits:
            found = find_files(name, split, data_folder(data_root))
            place = str(found[0]) if found else f"missing ({known.title.rstrip(',')})"
            rows.append((name, split, classes, place))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def check_datasets(
    datasets: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASETS")],
    data_root: str = "",
    tiny: bool = False,
    quick: bool = False,
) -> None:
    """Reads the annotations and decodes every image; prints the problems of each kind.

    The exit code is 0 for clean datasets, 1 if there are problems, 2 if a dataset cannot be read.

    Args:
        datasets: as for the methods, coco,lvis:val,my=ann.json:images/; all splits if none is named
        data_root: where the datasets are stored; by default $DETECTRON2_DATASETS, or ./data
        tiny: check the generated stand-ins
        quick: read only the headers of images, and no mask or label map
    """
    from common.datasets.check import check_dataset  # here, since it needs torch
    from common.datasets.names import load_datasets, splits_of_custom

    jobs = []
    for entry in entries(datasets):
        known = KNOWN.get(ALIASES.get(entry, entry))
        splits = ["train"]
        if known:  # VOC has further splits, which are parts of these
            splits = [split for split in ("train", "val", "test") if split in known.splits]
        elif "=" in entry:
            splits = splits_of_custom(entry)
        jobs += [(entry, split) for split in splits]
    for job in jobs:
        parse_datasets(*job)  # raises for a wrong name before anything is read
    unreadable = problems = False
    for entry, split in jobs or [("", "train")]:  # load_datasets raises for no name
        size = TINY_SIZE if tiny else 0
        try:
            (dataset,) = load_datasets(
                entry, split, data_root, size, masks=not quick, accepts=KINDS, check=False
            )
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            for parsed in parse_datasets(entry, split):
                print_faults(parsed, data_root)
            unreadable = True
            continue
        ((_, own_split, _),) = parse_datasets(entry, split)
        problems |= check_dataset(dataset, quick, own_split == "train")
    sys.exit(2 if unreadable else int(problems))


def print_faults(parsed: Parsed, data_root: str) -> None:
    """Prints all faulty entries of a json file that cannot be read as COCO's, if there are any."""
    from common.datasets.check import print_problems
    from common.datasets.readers.coco_faults import list_faults
    from common.datasets.readers.panoptic import is_panoptic

    name, split, paths = parsed
    found = paths or find_files(name, split, data_folder(data_root))
    path = Path(found[0]) if found else Path()
    if path.suffix != ".json" or not path.is_file():
        return
    try:
        if is_panoptic(path):
            return
        faults = list(list_faults(path))
    except InputError:  # it is no json, which the error above says
        return
    if faults:
        print(f"{name}: {path}")
        print_problems({"faulty entries": faults})


def main() -> None:
    """Runs the subcommand that the command line names."""
    commands = {"list": list_datasets, "check": check_datasets}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m common.datasets")


if __name__ == "__main__":
    run_command(main)
