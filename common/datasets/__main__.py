"""What lies under a data root, and what is wrong with it: python -m common.datasets list, python -m ... check coco."""

import sys
from typing import Annotated

import tyro

from common.command import run_command
from common.datasets.check import check_dataset
from common.datasets.known import ALIASES, KNOWN
from common.datasets.names import data_folder, entries, find_files, load_datasets, parse_datasets
from common.errors import InputError
from common.labels import DATA, Vocabulary

TINY_SIZE = 192  # that of the detectors, so that one set of generated images serves both
KINDS = ("boxes", "instances", "semantic", "panoptic", "image_labels")


def list_datasets(data_root: str = "") -> None:
    """Print a line for each split of the known datasets: its classes, and its annotations or what to download.

    Args:
        data_root: where the datasets lie; else $DETECTRON2_DATASETS, else ./data
    """
    rows = []
    for name, known in KNOWN.items():
        listed = next(
            (
                each
                for each in (name, known.whole)
                if (DATA / f"vocabularies/{each}.json").is_file()
            ),
            None,
        )
        classes = f"{len(Vocabulary.known(listed)):>4} classes" if listed else ""
        for split in known.splits:
            found = find_files(name, split, data_folder(data_root))
            rows.append(
                (name, split, classes, str(found[0]) if found else f"- ({known.title.rstrip(',')})")
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def check_datasets(
    datasets: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASETS")],
    data_root: str = "",
    tiny: bool = False,
    quick: bool = False,
) -> None:
    """Read the annotations and decode every image; count what is wrong, with the first names of each kind.

    The exit code is 0 for clean datasets, 1 if there are problems, 2 if a dataset cannot be read at all.

    Args:
        datasets: as for the methods, coco,lvis:val,my=ann.json:images/; all splits where none is named
        data_root: where the datasets lie; else $DETECTRON2_DATASETS, else ./data
        tiny: check the generated stand-ins
        quick: read the headers of images alone, and no mask or label map
    """
    jobs = []
    for entry in entries(datasets):
        known = KNOWN.get(ALIASES.get(entry, entry))
        # voc has others, which are parts of these
        splits = (
            [split for split in ("train", "val", "test") if split in known.splits]
            if known
            else ["train"]
        )
        jobs += [(entry, split) for split in splits]
    for job in jobs:
        parse_datasets(*job)  # a wrong name is told before anything is read
    unreadable = problems = False
    for entry, split in jobs or [("", "train")]:  # no name at all is an error of load_datasets
        try:
            (dataset,) = load_datasets(
                entry, split, data_root, tiny * TINY_SIZE, not quick, KINDS, check=False
            )
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            unreadable = True
            continue
        problems |= check_dataset(dataset, quick)
    sys.exit(2 if unreadable else int(problems))


def main() -> None:
    commands = {"list": list_datasets, "check": check_datasets}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m common.datasets")


if __name__ == "__main__":
    run_command(main)
