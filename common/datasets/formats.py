"""Finds out in which format the folder or file of an entry NAME=PATH is."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES
from common.datasets.grammar import COCO, check_places
from common.datasets.readers.captions import read_captions
from common.datasets.readers.coco import read_coco
from common.datasets.readers.cvat import find_cvat, read_cvat
from common.datasets.readers.folder import read_folder
from common.datasets.readers.labelme import find_labelme, read_labelme
from common.datasets.readers.panoptic import is_panoptic, read_panoptic
from common.datasets.readers.roboflow import find_masks, read_masks
from common.datasets.readers.semantic import read_semantic
from common.datasets.readers.voc import holds_xml, read_voc
from common.datasets.readers.yolo import NO_LABELS, find_yolo, pair_of_split, read_yolo
from common.datasets.splits import in_folders, pick, split_of
from common.datasets.tools import find_coco_json, name_folder
from common.errors import InputError

log = logging.getLogger("concord")
SPLIT_LISTS = "ImageSets/Main"
# folders of these names hold images or annotations of all classes; also train_images, valannot, ...
NO_CLASS = re.compile(
    r"(train|val|valid|test)?[_-]?"
    r"(images?|imgs?|jpegimages|data|labels?|annot(ation)?s?|masks?|maps?|segmentation\w*)"
)
SHOWN = 4  # kinds of files and names of folders in a message
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")
NOT_READ = (".csv", ".yaml", ".yml", *ARCHIVES)
KNOWN_FORMATS = (
    "YOLO (images/ and labels/ with data.yaml or classes.txt), COCO by Roboflow "
    f"({COCO}), CVAT (annotations.xml), labelme, Roboflow's masks, xml files of VOC beside their "
    "images, a folder or tar file of images for each class"
)


@dataclass(frozen=True)
class Format:
    """A format of dataset folders.

    title:      its name in the log
    find:       find(path) -> {split: place}. Without splits the key is "". The dict is empty if
                `path` has another format
    read:       read(name, place) -> Dataset; `place` is a value that `find` returned
    has_metric: a dataset in this format is evaluated by default. False for image labels
    """

    title: str
    find: Callable[[Path], dict]
    read: Callable[..., Dataset]
    has_metric: bool = True


def find_coco(path: Path) -> dict[str, Path]:
    """Returns {split: json file} of a folder of Roboflow's, or of such a json file."""
    if path.is_file():
        return {"": path} if path.name == COCO else {}
    folders = in_folders(path, lambda folder: (folder / COCO).is_file())
    return {split: folder / COCO for split, folder in folders.items()}


def read_coco_beside(name: str, file: Path) -> Dataset:
    """Reads a json file whose images are beside it. Raises InputError that names the file."""
    try:
        return read_coco(name, file, file.parent, "coco")
    except InputError as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file}: {error}") from None


def find_voc(path: Path) -> dict[str, tuple[Path, Path]]:
    """Returns {split: (xml files or list, images)} of VOC's folders, or of xml beside images."""
    annotations, images = path / "Annotations", path / "JPEGImages"
    if annotations.is_dir() and images.is_dir():
        lists = sorted((path / SPLIT_LISTS).glob("*.txt"))
        found = {split_of(file.stem): (file, images) for file in lists if split_of(file.stem)}
        return found or {"": (annotations, images)}
    folders = in_folders(path, lambda folder: any(folder.glob("*.xml")))
    return {split: (folder, folder) for split, folder in folders.items()}


def find_classes(path: Path) -> dict[str, Path]:
    """Returns {split: folder} of folders that hold a folder or tar file of images per class.

    One folder of images beside a json file is no class, nor are folders with the files of a tool
    that is not read.
    """
    if not path.is_dir() or name_folder(path):
        return {}
    if any(path.glob("*.json")) and sum(map(holds_image, path.iterdir())) == 1:
        return {}
    return in_folders(path, holds_classes)


def holds_classes(folder: Path) -> bool:
    """Returns whether a folder holds tar files, or folders of images named as classes can be."""
    if not folder.is_dir():
        return False
    names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    if any(name.endswith(".tar") for name in names):
        return True
    for name in names:
        if NO_CLASS.fullmatch(name.lower()) or split_of(name):
            continue
        if holds_image(folder / name):
            return True
    return False


def holds_image(folder: Path) -> bool:
    """Returns whether there is an image in a folder."""
    return folder.is_dir() and any(file.lower().endswith(IMAGES) for file in os.listdir(folder))


FORMATS = (
    Format("YOLO", find_yolo, read_yolo),
    Format("COCO", find_coco, read_coco_beside),
    Format("Roboflow's masks", find_masks, read_masks),
    Format("CVAT", find_cvat, read_cvat),
    Format("VOC", find_voc, lambda name, place: read_voc(name, *place)),
    Format("labelme", find_labelme, read_labelme),
    Format("class folders", find_classes, read_folder, has_metric=False),
)
OF_ENDING = {".yaml": "YOLO", ".yml": "YOLO", ".json": "COCO", ".xml": "CVAT"}


def find_format(path: Path) -> tuple[Format | None, dict]:
    """Returns the format of a folder or file and {split: place}; (None, {}) if it is unknown."""
    for kind in FORMATS:
        if os.path.isdir(path) or kind.title == OF_ENDING.get(path.suffix):
            found = kind.find(path)
            if found:
                return kind, found
    return None, {}


def read_place(name: str, path: Path, split: str) -> Dataset:
    """Reads a folder or file of another tool; logs its format and the split that is read.

    Raises InputError that says what the folder or file holds if its format is unknown, and for a
    split that is not there.
    """
    check_places(name, path, path)
    kind, found = find_format(path)
    if kind is None:
        raise unknown(name, path)
    split, place = pick(name, path, found, split)
    dataset = kind.read(name, place)
    what = f"the split {split} of {path}" if split else str(path)
    log.info("%s: %s, %d images of %s", name, kind.title, len(dataset), what)
    return dataset


def has_validation(path: Path) -> bool:
    """Returns whether a folder has image labels, and a split val or test of them."""
    try:
        kind, found = find_format(path)
    except InputError:
        return False  # reading it raises the error again
    of_labels = kind is not None and not kind.has_metric
    return of_labels and not found.keys().isdisjoint(("val", "test"))


def has_metric(path: Path) -> bool:
    """Returns whether a folder or file has more than image labels: it is evaluated by default."""
    try:
        kind, _ = find_format(path)
    except InputError:
        return True  # reading it raises the error again
    return kind is not None and kind.has_metric


def read_pair(name: str, annotations: Path, images: Path, split: str) -> Dataset:
    """Reads a dataset from its annotations, a file or folder, and its folder of images.

    The ending of the file, or the files in the folder, tell the format.
    split: the split to read of YOLO's folders; the other formats have one split here
    Raises InputError for a path that does not exist, for an unknown format, and for whatever the
    reader of the format refuses.
    """
    check_places(name, annotations, images)
    if os.path.isdir(annotations):
        return _read_folders(name, annotations, images, split)
    ending = annotations.suffix.lower()
    if ending in NOT_READ:
        raise unknown(name, annotations)
    if ending == ".txt":
        return read_voc(name, annotations, images)
    if ending == ".tsv":
        return read_captions(name, annotations, images)
    if ending == ".xml":
        return read_cvat(name, (annotations, ""), images)
    if is_panoptic(annotations):
        return read_panoptic(name, annotations, images, "pq")
    return read_coco(name, annotations, images, "coco")


def _read_folders(name: str, annotations: Path, images: Path, split: str) -> Dataset:
    """Reads a folder of annotations, one file for each image of the other folder.

    Raises InputError for folders that seem to be swapped, and as the readers.
    """
    if holds_xml(annotations):
        return read_voc(name, annotations, images)
    if not any(annotations.glob("*.png")) and (file := find_coco_json(annotations)):
        raise InputError(
            f"dataset '{name}': {annotations} holds json files in COCO's format; name one of them: "
            f"{name}={file}:{images}/"
        )
    endings = count_endings(annotations)
    if not endings["png"] and endings["txt"]:
        return read_yolo(name, pair_of_split(name, annotations, images, split))
    if not endings["png"] and endings["json"]:
        return read_labelme(name, annotations, images)
    if not endings["png"]:
        in_images = count_endings(images)
        for ending in ("xml", "txt", "json", "png"):
            if in_images[ending]:
                raise InputError(
                    f"dataset '{name}': {annotations} holds no {ending} files, but {images} does; "
                    f"are they swapped? write {name}={images}:{annotations}"
                )
    return read_semantic(name, annotations, images)


def unknown(name: str, path: Path) -> InputError:
    """Returns the error for a folder or file of no known format; it says what there is."""
    start = f"dataset '{name}': {path}"
    ending = path.suffix.lower()
    if path.is_dir():
        if told := name_folder(path):
            return InputError(f"{start} {told}")
        jsons = sorted(path.glob("*.json")) + sorted(path.glob("annotations/*.json"))
        file = jsons[0] if jsons else "FILE.json"
        return InputError(
            f"{start} holds {describe(path)}, in no known format; known are {KNOWN_FORMATS}; "
            f"a COCO json is named with its images, {name}={file}:IMAGES/, and so are label maps, "
            f"{name}=MAPS/:IMAGES/"
        )
    if ending in ARCHIVES:
        return InputError(f"{start} is an archive; unpack it and name the folder: {name}=FOLDER/")
    if ending == ".json":
        return InputError(f"{start} needs its images: write {name}={path}:IMAGES/")
    remedy = (
        f"convert it to a COCO json, {name}=FILE.json:IMAGES/, or name a folder, {name}=FOLDER/"
    )
    if ending in (".yaml", ".yml"):
        remedy = f"YOLO's data.yaml with names: and its images is named alone, {name}={path}"
    return InputError(
        f"{start} is a {ending.strip('.')} file, which is not read like this; {remedy}"
    )


def describe(folder: Path) -> str:
    """Returns what a folder holds, such as "3 csv files, 20 images and the folders a, b"."""
    counts, folders = Counter(), []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            folders.append(path.name)
        else:
            is_image = path.name.lower().endswith(IMAGES)
            counts["images" if is_image else f"{path.suffix.lower().strip('.')} files"] += 1
    parts = [f"{count} {what}" for what, count in counts.most_common(SHOWN)]
    if folders:
        more = ", ..." if len(folders) > SHOWN else ""
        parts.append(f"{len(folders)} folders ({', '.join(folders[:SHOWN])}{more})")
    return ", ".join(parts) or "nothing"


def count_endings(folder: Path) -> Counter:
    """Returns {ending: number} of the files below a folder, without lists of classes."""
    paths = (path for path in folder.rglob("*") if path.name not in NO_LABELS)
    return Counter(path.suffix.lower().strip(".") for path in paths)
