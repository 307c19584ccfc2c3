"""The segments of an embedded scene in the real file formats: semantic label maps, panoptic PNGs and their json."""

import csv
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from common.datasets.tiny.scene import Job, Thing, tight_box
from common.labels import DATA, Vocabulary


@dataclass(frozen=True)
class Layout:
    """Where the files of one dataset lie in its folder; {}: the split and the image's id.

    vocabulary: of the panoptic json; that of the label maps bears the name of the dataset
    panoptic:   folder of the PNGs, beside which their json lies; png: what is added to an id for the name of its PNG
    semantic:   label map, or none
    image:      what is added to an id for the file_name in the json
    """

    vocabulary: str
    panoptic: str
    semantic: str = ""
    png: str = ".png"
    image: str = ".jpg"


LAYOUTS = {
    "coco": Layout("coco-panoptic", "annotations/panoptic_{}2017"),
    "ade20k": Layout("ade20k-panoptic", "ade20k_panoptic_{}", "annotations/{}/{}.png"),
    "cityscapes": Layout(
        *("cityscapes", "gtFine/cityscapes_panoptic_{}", "gtFine/{}/{}_gtFine_labelIds.png"),
        *(
            "_gtFine_panoptic.png",
            "_gtFine_leftImg8bit.png",
        ),  # the latter names no file, as in the real json
    ),
}
known = cache(Vocabulary.known)


def image_id(job: Job) -> str:
    return job.path.stem.removesuffix("_leftImg8bit")


def panoptic_folder(name: str, split: str) -> str:
    return LAYOUTS[name].panoptic.format(
        {"training": "train", "validation": "val"}.get(split, split)
    )


def maps_of(job: Job) -> list[str]:
    """The files of `write_maps` below the dataset's folder: the panoptic PNG and perhaps a semantic one."""
    if job.name not in LAYOUTS:
        return []
    layout, id = LAYOUTS[job.name], image_id(job)
    city = f"{job.path.parent.name}/" if job.name == "cityscapes" else ""
    semantic = [layout.semantic.format(job.split, city + id)] if layout.semantic else []
    return [f"{panoptic_folder(job.name, job.split)}/{id}{layout.png}", *semantic]


@cache
def stuff(name: str) -> dict[str, str]:
    """{texture: class} of dataset `name`; textures that are of no class are void."""
    rows = csv.DictReader((DATA / "tiny" / "stuff.csv").read_text(encoding="utf-8").splitlines())
    return {row["texture"]: row[name] for row in rows if row[name]}


def find_segments(
    job: Job, things: list[Thing], ground: dict[str, np.ndarray]
) -> list[tuple[str, bool, np.ndarray]]:
    """(class, whether it is a crowd, mask (H, W) bool): each thing, and all that is seen of each class of stuff."""
    vocabulary = known(LAYOUTS[job.name].vocabulary)
    is_thing = dict(zip(vocabulary.names, vocabulary.is_thing))
    free = ~np.any([thing.mask for thing in things], axis=0) if things else True
    parts = [(thing.label, thing.mask) for thing in things if not is_thing[thing.label]]
    parts += [
        (stuff(job.name)[name], mask & free)
        for name, mask in ground.items()
        if name in stuff(job.name)
    ]
    regions = {
        label: np.any([mask for other, mask in parts if other == label], axis=0)
        for label, _ in parts
    }
    found = [(thing.label, thing.group, thing.mask) for thing in things if is_thing[thing.label]]
    return found + [(label, False, mask) for label, mask in regions.items() if mask.any()]


def write_maps(
    job: Job, folder: Path, things: list[Thing], ground: dict[str, np.ndarray]
) -> list[dict]:
    """Save the maps of one image; returns its segments_info."""
    layout, info = LAYOUTS[job.name], []
    ids, values = (dict(zip(v.names, v.ids)) for v in (known(layout.vocabulary), known(job.name)))
    colours = np.zeros((job.size, job.size, 3), np.uint8)
    classes = np.zeros((job.size, job.size), np.uint8)
    for label, crowd, mask in find_segments(job, things, ground):
        number = 1 + (len(info) + 1) * 123_457 % 16_777_215  # each another, of all three channels
        colours[mask] = number % 256, number // 256 % 256, number // 65536
        classes[mask] = values.get(
            label, 0
        )  # the label map of coco, which lacks stuff, is not saved
        segment = {"id": number, "category_id": ids[label], "iscrowd": int(crowd)}
        info.append(segment | {"bbox": tight_box(mask), "area": int(mask.sum())})
    panoptic, *semantic = maps_of(job)
    Image.fromarray(colours).save(folder / panoptic)
    for file in semantic:
        Image.fromarray(classes).save(folder / file)
    return info


def write_panoptic(
    name: str, split: str, folder: Path, scenes: list[tuple[Job, list[dict]]]
) -> None:
    """The json of panoptic COCO, which ADE20K's and Cityscapes' tools write, too; it names all classes."""
    layout, vocabulary = LAYOUTS[name], known(LAYOUTS[name].vocabulary)
    categories = zip(vocabulary.ids, vocabulary.names, vocabulary.is_thing)
    record = {"images": [], "annotations": []}
    record["categories"] = [
        {"id": id, "name": label, "isthing": int(thing)} for id, label, thing in categories
    ]
    for job, segments in scenes:
        name = image_id(job)
        id = int(name) if job.name == "coco" else name
        image = {"id": id, "file_name": name + layout.image, "width": job.size, "height": job.size}
        record["images"].append(image)
        record["annotations"].append(
            {"image_id": id, "file_name": name + layout.png, "segments_info": segments}
        )
    (folder / f"{panoptic_folder(scenes[0][0].name, split)}.json").write_text(json.dumps(record))
