"""Reader of CVAT's xml files for images, "CVAT for images 1.1"."""

import logging
from pathlib import Path
from typing import BinaryIO, NoReturn
from xml.etree import ElementTree

import numpy as np
import torch

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, file_name, listing
from common.datasets.index import Index
from common.datasets.objects import Objects, boxes_or_instances, ellipse, turned
from common.datasets.splits import split_of
from common.datasets.store import cached_index
from common.errors import InputError
from common.files import refuse_pipe
from common.labels import Vocabulary
from common.masks import encode_masks

log = logging.getLogger("concord")
CHUNK = 1 << 20  # bytes
SHAPES = ("box", "polygon", "ellipse", "mask")
NO_AREA = ("polyline", "points", "cuboid", "skeleton", "tag")  # their labels are no classes
BOX = ("xtl", "ytl", "xbr", "ybr")
MASK = ("left", "top", "width", "height")
ELLIPSE = ("cx", "cy", "rx", "ry")
LARGEST = 1 << 28  # pixels of an image with a mask, which is decoded


def find_cvat(path: Path) -> dict[str, tuple[Path, str]]:
    """Returns {split: (xml file, CVAT's subset)} of an xml file or a folder with one.

    The split of a file without subsets of usual names is "". Empty if there is no file of CVAT.
    """
    xmls = [path]
    if path.is_dir():
        xmls = sorted(xml for xml in path.glob("*.xml") if not xml.is_dir())
    # VOC has an xml file for each image
    if len(xmls) != 1:
        return {}
    refuse_pipe(xmls[0], "xml file")
    with xmls[0].open("rb") as file:
        if b"<annotations>" not in file.read(1000):
            return {}
    subsets = parse(xmls[0], Target(xmls[0], meta_only=True)).subsets
    found = {split_of(subset): (xmls[0], subset) for subset in subsets if split_of(subset)}
    return found or {"": (xmls[0], "")}


def read_cvat(name: str, place: tuple[Path, str], images: Path | None = None) -> Dataset:
    """Reads the xml file and subset `place`: boxes, and masks if no object is a box.

    The classes are the labels of the file, in its order, without those of points, lines and tags.
    Points, polylines, cuboids, skeletons and tags are left out and counted in the log. A box that
    is turned becomes the box around it.
    Source: cvat-ai/cvat:cvat/apps/dataset_manager/formats/cvat.py (places of images, rle)

    images: the folder of the images; by default images/ beside the file, or the file's folder
    Raises InputError naming the file, the image and the remedy: no xml of CVAT's, a DOCTYPE,
    tracks of a video, a shape without a label or numbers.
    """
    path, subset = place
    beside = path.parent / "images"
    root = images or (beside if beside.is_dir() else path.parent)

    def read(blob: BinaryIO) -> tuple[Index, dict]:
        target = parse(path, Target(path, subset))
        return read_index(name, target, root, blob)

    index, facts = cached_index(path, ["cvat", subset, str(root)], read)
    if subset:
        index.source = f"{path}, subset {subset}"
    if facts["turned"]:
        message = "%s: %d boxes are turned; the boxes around them are used"
        log.info(message, path, facts["turned"])
    vocabulary = Vocabulary(name, tuple(facts["classes"]), source=str(path))
    return boxes_or_instances(name, vocabulary, index, facts, root)


def read_index(name: str, target: "Target", root: Path, blob: BinaryIO) -> tuple[Index, dict]:
    """Returns the index and the facts that `cached_index` stores with it."""
    path, objects = target.path, target.objects
    if target.tracks and not target.files:
        raise InputError(f"{path} has the tracks of a video; export it as 'CVAT for images 1.1'")
    used = sorted({title for title in objects.classes if title not in target.labels})
    classes = list(dict.fromkeys([*target.labels, *used]))
    if not classes:
        raise InputError(f"{path} has no label and no box; export a task that has some")
    files = target.files
    # a project's images are in a folder for each subset
    in_subsets = [f"{subset}/{file}" for subset, file in zip(target.subset_of, files)]
    if in_subsets and (root / in_subsets[0]).is_file():
        files = in_subsets
    if not all(file.lower().endswith(IMAGES) for file in files):  # frames of a video
        image_of = listing(name, root, IMAGES)
        files = [image_of.get(file, file) for file in files]
    index, facts = objects.index(str(path), files, target.sizes, classes, blob)
    return index, facts | {"classes": classes, "turned": target.turned}


class Target:
    """Collects the images and shapes of CVAT's xml file, element by element.

    Refuses a DOCTYPE, which can define entities that grow without bound when expanded.

    subset:    the only one to read; "" for all
    meta_only: leave out the images
    labels:    the names in `meta` whose shapes can be boxes
    subsets:   those that `meta` lists
    files, sizes, subset_of: of each image
    objects:   the shapes that are read
    tracks, turned: the numbers of a video's tracks and of turned boxes
    """

    def __init__(self, path: Path, subset: str = "", meta_only: bool = False):
        self.path, self.subset, self.meta_only = path, subset, meta_only
        self.labels, self.subsets, self.label = [], [], {}
        self.files, self.sizes, self.subset_of = [], [], []
        self.objects = Objects()
        self.tracks = self.turned = 0
        self.tags: list[str] = []  # the open elements
        self.text = ""
        self.wanted = False  # the open image is of the subset
        self.ended = False  # `meta` is read, and no more is wanted

    def doctype(self, *declaration: str | None) -> NoReturn:
        """Raises ValueError."""
        raise ValueError("it has a DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Opens an element. Reads images and shapes, whose content is in their attributes."""
        parent = self.tags[-1] if self.tags else ""
        if not parent and tag != "annotations":
            raise ValueError(f"it starts with <{tag}>, not with <annotations>")
        self.tags.append(tag)
        self.text = ""
        if tag == "image" and parent == "annotations":
            subset = attributes.get("subset", "")
            self.wanted = self.subset in ("", subset)
            if self.wanted:
                self.add_image(attributes, subset)
        elif parent == "image" and self.wanted:
            self.add_shape(tag, attributes)
        elif tag == "track":
            self.tracks += 1

    def data(self, text: str) -> None:
        """Collects the text of the open element."""
        self.text += text

    def end(self, tag: str) -> None:
        """Closes an element. Reads the labels and subsets in `meta`."""
        self.tags.pop()
        parent = self.tags[-1] if self.tags else ""
        if parent == "label" and tag in ("name", "type", "parent"):
            self.label[tag] = " ".join(self.text.split())
        elif tag == "label" and parent == "labels":
            label, self.label = self.label, {}
            if label.get("type") not in NO_AREA and "parent" not in label and label.get("name"):
                self.labels.append(label["name"])
        elif tag == "subsets":
            self.subsets = self.text.split("\n")
        elif tag == "meta":
            self.ended = self.meta_only
        self.text = ""

    def close(self) -> "Target":
        """Returns the target."""
        return self

    def add_image(self, attributes: dict[str, str], subset: str) -> None:
        """Adds an image. Raises InputError for one without a name, or with a size in words."""
        if "name" not in attributes:
            raise InputError(f"{self.path}: an image has no name; write its path or remove it")
        name = file_name(self.path, {"file_name": attributes["name"]})
        size = []
        for side in ("height", "width"):
            pixels = attributes.get(side, "0")
            if not pixels.isdecimal() or len(pixels) > 10:
                raise InputError(
                    f"{self.path}: image '{name}' has the {side} {pixels[:60]!r}; write its pixels"
                )
            size.append(int(pixels))
        self.files.append(name)
        self.sizes.append(tuple(size))
        self.subset_of.append(subset)

    def add_shape(self, tag: str, attributes: dict[str, str]) -> None:
        """Adds a shape of the last image, or counts it. Raises InputError for a broken one."""
        if tag not in SHAPES:
            self.objects.skipped[tag] += 1
            return
        label = " ".join(attributes.get("label", "").split())
        where = f"{self.path}: image '{self.files[-1]}' has a {tag}"
        if not label:
            raise InputError(f"{where} without a label; name its class or remove it")
        try:
            add = {"box": self.add_box, "mask": self.add_mask}.get(tag, self.add_outline)
            add(label, attributes)
        except (KeyError, ValueError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where} of '{label}' with {what}; mend or remove it") from None

    def add_box(self, label: str, attributes: dict[str, str]) -> None:
        """Adds a box, which may be turned about its centre."""
        row = len(self.files) - 1
        x1, y1, x2, y2 = (float(attributes[key]) for key in BOX)
        degrees = float(attributes.get("rotation", 0))
        if degrees:
            corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
            corners = turned(corners, degrees, ((x1 + x2) / 2, (y1 + y2) / 2))
            x1, y1 = corners.min(axis=0)
            x2, y2 = corners.max(axis=0)
            self.turned += 1
        self.objects.add_box(row, label, (x1, y1, x2, y2))

    def add_outline(self, label: str, attributes: dict[str, str]) -> None:
        """Adds a polygon or an ellipse."""
        row = len(self.files) - 1
        if "points" in attributes:
            pairs = [pair.split(",") for pair in attributes["points"].split(";")]
            points = np.array(pairs, dtype=np.float64)
        else:
            degrees = float(attributes.get("rotation", 0))
            points = ellipse(*(float(attributes[key]) for key in ELLIPSE), degrees)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
            raise ValueError("fewer than three corners")
        self.objects.add_polygon(row, label, points)

    def add_mask(self, label: str, attributes: dict[str, str]) -> None:
        """Adds a mask: runs of 0 and 1 in turn, row by row in a box."""
        row = len(self.files) - 1
        left, top, width, height = (int(attributes[key]) for key in MASK)
        runs = np.array(attributes["rle"].split(","), dtype=np.int64)
        if np.prod(self.sizes[-1], dtype=float) > LARGEST:
            raise ValueError(f"an image of more than {LARGEST >> 20} megapixels around it")
        whole = np.zeros(self.sizes[-1], dtype=bool)
        part = whole[top : top + height, left : left + width]
        inside = min(left, top) >= 0 and part.shape == (height, width)
        plain = runs.min() >= 0 and runs.max() <= part.size  # so that their sum cannot overflow
        if not (inside and plain and runs.sum() == part.size):
            raise ValueError("runs that do not fill its box, or a box that leaves the image")
        values = np.arange(len(runs)) % 2 == 1
        part[:] = np.repeat(values, runs).reshape(height, width)
        (rle,) = encode_masks(torch.from_numpy(whole)[None])
        box = (left, top, left + width, top + height)
        self.objects.add(row, label, box, int(whole.sum()), rle)


def parse(path: Path, target: Target) -> Target:
    """Feeds an xml file to `target`, as far as it wants. Raises InputError if it is not CVAT's."""
    refuse_pipe(path, "xml file")
    parser = ElementTree.XMLParser(target=target)
    try:
        with path.open("rb") as file:
            while not target.ended and (chunk := file.read(CHUNK)):
                parser.feed(chunk)
        if not target.ended:
            parser.close()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError) as error:
        raise InputError(
            f"{path} is no xml file of 'CVAT for images 1.1' ({error}); export it again"
        ) from None
    return target
