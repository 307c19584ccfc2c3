"""Annotations of a generated scene: objects, semantic label maps, panoptic PNGs and their json."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from hotcoco import mask as rle
from PIL import Image

from common.datasets.tiny.scene import Job, Thing, tight_box
from common.labels import DATA, Vocabulary


@dataclass(frozen=True)
class Scene:
    """The annotations of one image: `things` (see `describe`) and `segments` (segments_info)."""

    job: Job
    things: list[dict]
    segments: list[dict]


@dataclass(frozen=True)
class Layout:
    """Names the label maps in one dataset's folder. The {} stand for the split and the image's id.

    vocabulary: vocabulary of the panoptic json; the label maps use the one named as the dataset
    panoptic:   folder of the panoptic PNGs; their json is in the same place, with suffix .json
    semantic:   path of a label map; empty for a dataset without
    png:        suffix of a panoptic PNG, after the image's id
    image:      suffix of an image's file_name in the json
    """

    vocabulary: str
    panoptic: str
    semantic: str = ""
    png: str = ".png"
    image: str = ".jpg"


LAYOUTS = {
    "coco": Layout(vocabulary="coco-panoptic", panoptic="annotations/panoptic_{}2017"),
    "ade20k": Layout(
        vocabulary="ade20k-panoptic",
        panoptic="ade20k_panoptic_{}",
        semantic="annotations/{}/{}.png",
    ),
    "cityscapes": Layout(
        vocabulary="cityscapes",
        panoptic="gtFine/cityscapes_panoptic_{}",
        semantic="gtFine/{}/{}_gtFine_labelIds.png",
        png="_gtFine_panoptic.png",
        image="_gtFine_leftImg8bit.png",  # names no file, as in the real json
    ),
}
known = cache(Vocabulary.known)


def describe(thing: Thing) -> dict:
    """Returns an object's label, box [x, y, w, h], area, COCO `rle` and group, for json."""
    code = rle.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
    # COCO's crowds are uncompressed
    counts = run_lengths(thing.mask) if thing.group else code["counts"].decode()
    return {
        "label": thing.label,
        "box": tight_box(thing.mask),  # x, y, w, h
        "area": int(thing.mask.sum()),
        "rle": {"size": list(code["size"]), "counts": counts},
        "group": thing.group,
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """Returns COCO's RLE of a mask (H, W): lengths of the runs of 0, 1, 0, ... down the columns."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *ends, mask.size]).tolist()


def image_id(job: Job) -> str:
    return job.path.stem.removesuffix("_leftImg8bit")


def panoptic_folder(name: str, split: str) -> str:
    split = {"training": "train", "validation": "val"}.get(split, split)
    return LAYOUTS[name].panoptic.format(split)


def maps_of(job: Job) -> list[str]:
    """Lists the files that `write_maps` saves: a panoptic PNG and, for some, a label map."""
    if job.name not in LAYOUTS:
        return []
    layout = LAYOUTS[job.name]
    id = image_id(job)
    files = [f"{panoptic_folder(job.name, job.split)}/{id}{layout.png}"]
    if layout.semantic:
        city = f"{job.path.parent.name}/" if job.name == "cityscapes" else ""
        files.append(layout.semantic.format(job.split, city + id))
    return files


@cache
def stuff(name: str) -> dict[str, str]:
    """Returns {texture: class} of dataset `name`. A texture without a class is unlabelled."""
    text = (DATA / "tiny" / "stuff.csv").read_text(encoding="utf-8")
    return {row["texture"]: row[name] for row in csv.DictReader(text.splitlines()) if row[name]}


def find_segments(
    job: Job, things: list[Thing], ground: list[tuple[str, np.ndarray]]
) -> list[tuple[str, bool, np.ndarray]]:
    """Returns (class, whether it is a crowd, mask (H, W) bool) of each segment.

    Each thing is a segment. All visible pixels of one class of stuff are one segment, too.
    ground: (texture, mask) pairs, as `background` returns them
    """
    vocabulary = known(LAYOUTS[job.name].vocabulary)
    is_thing = dict(zip(vocabulary.names, vocabulary.is_thing))
    free = np.ones((job.size, job.size), bool)
    regions = defaultdict(lambda: np.zeros((job.size, job.size), bool))
    found = []
    for thing in things:
        free &= ~thing.mask
        if is_thing[thing.label]:
            found.append((thing.label, thing.group, thing.mask))
        else:  # painted as an object, but stuff in this vocabulary
            regions[thing.label] |= thing.mask
    classes = stuff(job.name)
    for texture, mask in ground:
        if texture in classes:
            regions[classes[texture]] |= mask & free
    return found + [(label, False, mask) for label, mask in regions.items() if mask.any()]


def write_maps(
    job: Job, folder: Path, things: list[Thing], ground: list[tuple[str, np.ndarray]]
) -> list[dict]:
    """Saves the label maps of one image. Returns its segments_info for the panoptic json."""
    panoptic = known(LAYOUTS[job.name].vocabulary)
    semantic = known(job.name)
    category_ids = dict(zip(panoptic.names, panoptic.ids))
    values = dict(zip(semantic.names, semantic.ids))
    colours = np.zeros((job.size, job.size, 3), np.uint8)
    classes = np.zeros((job.size, job.size), np.uint8)
    infos = []
    for label, crowd, mask in find_segments(job, things, ground):
        # different for each segment, and large enough to use all three channels
        id = 1 + (len(infos) + 1) * 123_457 % 16_777_215
        colours[mask] = id % 256, id // 256 % 256, id // 65536
        classes[mask] = values.get(label, 0)  # coco lacks stuff; its label map is not saved
        info = {
            "id": id,
            "category_id": category_ids[label],
            "iscrowd": int(crowd),
            "bbox": tight_box(mask),
            "area": int(mask.sum()),
        }
        infos.append(info)
    for file, array in zip(maps_of(job), (colours, classes)):
        Image.fromarray(array).save(folder / file)
    return infos


def write_panoptic(split: str, folder: Path, scenes: list[Scene]) -> None:
    """Writes the panoptic json of one split in COCO's format, which all datasets in LAYOUTS use."""
    dataset = scenes[0].job.name
    layout = LAYOUTS[dataset]
    vocabulary = known(layout.vocabulary)
    images, annotations, categories = [], [], []
    for id, label, thing in zip(vocabulary.ids, vocabulary.names, vocabulary.is_thing):
        categories.append({"id": id, "name": label, "isthing": int(thing)})
    for scene in scenes:
        name = image_id(scene.job)
        id = int(name) if dataset == "coco" else name
        size = {"width": scene.job.size, "height": scene.job.size}
        images.append({"id": id, "file_name": name + layout.image} | size)
        annotation = {"image_id": id, "file_name": name + layout.png}
        annotations.append(annotation | {"segments_info": scene.segments})
    record = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / f"{panoptic_folder(dataset, split)}.json"
    path.write_text(json.dumps(record))
