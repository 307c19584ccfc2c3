"""Reader of Pascal VOC's xml files, one for each image: VOC, ImageNet's boxes, custom folders."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, file_name, listing, read_lines
from common.datasets.index import BEYOND, Index
from common.datasets.readers.wordnet import folder_vocabulary
from common.datasets.store import cached_index
from common.errors import InputError
from common.files import refuse_pipe
from common.labels import Vocabulary

log = logging.getLogger("concord")
IMAGENET = "in-boxes"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(name: str, annotations: Path, images: Path, metric: str = "coco") -> Dataset:
    """Reads VOC xml files: those below a folder, or those of a list in YEAR/ImageSets/Main/.

    An image and its xml file have the same name. In a folder, images without an xml file are left
    out and their number is logged. A list trainval.txt stands for those of all years
    (`find_listed`). Corners are pixels, counted from 1. Both belong to the box: it spans xmin - 1
    to xmax. Difficult objects are not trained on. The metric ignores them, since their area is
    beyond its size ranges.
    Source: facebookresearch/detectron2:detectron2/data/datasets/pascal_voc.py (pixel convention)

    `name` decides what the classes are:
    voc:      the 20 classes of VOC
    in-boxes: The first folder of each file is the class. Opposite corners may come in any order,
              and nothing is subtracted from xmin. Boxes are divided by the size in the xml file,
              which may differ from the image's.
              Source: tensorflow/models:research/inception/inception/data/process_bounding_boxes.py
    others:   the classes that occur, sorted; WordNet ids get their names as in `read_folder`

    Raises InputError naming the xml file and the remedy: another format, a DOCTYPE, an object
    without a name or four corners, a class that VOC does not have, a missing image.
    """
    if annotations.is_file():
        files = find_listed(annotations, images)
    else:
        files = find_pairs(name, annotations, images)
    xmls = [xml for xml, _ in files.values()]
    image_files = [image for _, image in files.values()]
    options = ["voc", name == IMAGENET, *image_files]
    index, facts = cached_index(
        annotations, options, lambda _: read_xmls(name, annotations, files), xmls
    )
    classes = facts["classes"]  # as written; the labels in the index are their rows
    if facts["polygons"]:
        message = "%s: %d objects have a polygon, which is not read; for masks export COCO"
        log.info(message, annotations, facts["polygons"])
    if name == "voc":
        vocabulary = Vocabulary.known(name)
        other = [title for title in classes if title not in vocabulary.names]
        if other:
            xml = next(xml for xml in xmls if other[0] in [title for title, *_ in read_xml(xml)[1]])
            raise InputError(
                f"{xml}: the class '{other[0]}' is not one of 'voc'; is it another dataset's file? "
                "then name it: --datasets my=ANNOTATIONS/:IMAGES/"
            )
        labels = np.array([vocabulary.names.index(title) for title in classes], dtype=np.int32)
    else:
        vocabulary, labels = folder_vocabulary(name, images, classes)
    if (labels != np.arange(len(labels))).any():
        index = replace(index, labels=labels[index.labels])
    return Dataset(name, vocabulary, index, images, metric)


def read_xmls(name: str, source: Path, files: dict[str, tuple[Path, str]]) -> tuple[Index, dict]:
    """Reads xml files. Returns the index and the facts that `cached_index` stores with it.

    "classes" has the names as written, sorted; the labels of the index are its rows. "polygons" is
    the number of objects with a polygon, as Roboflow and supervision write.
    files: {image id: (xml file, image file name)}; source: for messages
    """
    sizes, objects = [], []
    for row, (xml, _) in enumerate(files.values()):
        size, found = read_xml(xml)
        sizes.append(size)
        objects += [(row, *each) for each in found]
    if not objects:
        raise InputError(f"{source}: none of its {len(files)} xml files has an object; use another")
    image_of, classes, corners, difficult, with_polygon = zip(*objects)
    boxes, sizes = np.array(corners), np.array(sizes)
    if name == IMAGENET:
        scale = sizes[list(image_of)][:, [1, 0, 1, 0]]
        if not scale.all():
            lost = image_of[int(np.argmin(scale.all(axis=1)))]
            xml = list(files.values())[lost][0]
            raise InputError(f"{xml} does not tell the size of its image; add it")
        points = boxes.reshape(-1, 2, 2)
        boxes = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1) / scale
        sizes = np.zeros_like(sizes)  # only the images tell
        folders = [key.partition("/")[0] for key in files]
        classes = [folders[row] for row in image_of]
    else:
        boxes -= (1, 1, 0, 0)  # corners are counted from 1 and belong to the box
    unique, labels = np.unique(classes, return_inverse=True)
    index = Index.build(
        source=str(source),
        file_names=[image for _, image in files.values()],
        image_ids=list(files),
        sizes=sizes,
        image_of=image_of,
        boxes=boxes,
        labels=labels,
        areas=np.where(difficult, BEYOND, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)),
        ignore=difficult,
        relative=name == IMAGENET,
    )
    return index, {"classes": unique.tolist(), "polygons": sum(with_polygon)}


def holds_xml(folder: Path) -> bool:
    """Returns whether the folder has xml files, and no PNGs, which would be label maps."""
    endings = {path.suffix.lower() for path in folder.rglob("*")}
    return ".xml" in endings and ".png" not in endings


def find_listed(path: Path, images: Path) -> dict[str, tuple[Path, str]]:
    """Returns {id: (xml file, image file)} of the ids of a list YEAR/ImageSets/Main/*.txt.

    The files are YEAR/Annotations/ID.xml and, relative to `images`, YEAR/JPEGImages/ID.jpg. If the
    list is named trainval.txt, those of all folders VOC20?? in `images` are read, if there are any.
    Raises InputError for a list that cannot be read.
    """
    lists = []
    if path.name == "trainval.txt":
        lists = sorted(images.glob("VOC20??/ImageSets/Main/trainval.txt"))
    files = {}
    for file in lists or [path]:
        year = file.absolute().parent.parent.parent
        image_folder = year / "JPEGImages"
        below = Path()
        if image_folder.is_relative_to(images.absolute()):
            below = image_folder.relative_to(images.absolute())
        for id in [line.split()[0] for line in read_lines(file) if line.strip()]:
            file_name(file, {"file_name": id})  # it stays below the folders
            files[id] = year / "Annotations" / f"{id}.xml", (below / f"{id}.jpg").as_posix()
    return files


def find_pairs(name: str, annotations: Path, images: Path) -> dict[str, tuple[Path, str]]:
    """Returns {path without its ending: (xml file, image below `images`)} for two folders."""
    xml_of = listing(name, annotations, (".xml",))
    if name == IMAGENET:  # only one in fourteen images has an xml file: do not list the images
        image_of = {key: f"{key}.JPEG" for key in xml_of}
    else:
        image_of = listing(name, images, IMAGES)
    lost = [key for key in xml_of if key not in image_of]
    if lost:
        raise InputError(
            f"{name}: {annotations / xml_of[lost[0]]} has no image in {images} ({len(lost)} of "
            f"{len(xml_of)} xml files); add the images or remove the files"
        )
    bare = len(image_of) - len(xml_of)
    if bare:
        log.info("%s: %d images without an xml file in %s are left out", name, bare, annotations)
    return {key: (annotations / file, image_of[key]) for key, file in xml_of.items()}


class NoDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, which can define entities that grow without bound when expanded."""

    def doctype(self, *declaration: str | None) -> NoReturn:
        """Raises ValueError."""
        raise ValueError("it has a DOCTYPE")


def read_xml(path: Path) -> tuple[tuple[int, int], list[tuple[str, list[float], bool, bool]]]:
    """Returns (height, width), and of each object its class and corners, all as written.

    They are followed by two flags: is it difficult, has it a polygon? A size that the file does not
    give is 0. Raises InputError for a bad file or object.
    """
    try:
        refuse_pipe(path, "xml file")
        root = ElementTree.parse(path, ElementTree.XMLParser(target=NoDoctype())).getroot()
        if root.tag != "annotation":
            raise ValueError(f"it starts with <{root.tag}>, not with <annotation>")
        height = int(float(root.findtext("size/height") or 0))
        width = int(float(root.findtext("size/width") or 0))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); add it or remove it from the list"
        ) from None
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError) as error:
        raise InputError(
            f"{path} is no xml file of Pascal VOC's format ({error}); mend it"
        ) from None
    objects = []
    for number, thing in enumerate(root.findall("object"), 1):
        name = " ".join((thing.findtext("name") or "").split())
        corners = {part.tag: part.text for part in thing.iterfind("bndbox/*")}
        try:
            box = [float(corners[corner]) for corner in CORNERS]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}: object {number} ('{name}') needs a bndbox of the numbers "
                f"{', '.join(CORNERS)}, but has {corners or 'none'}; mend or remove it"
            ) from None
        if not name:
            raise InputError(f"{path}: object {number} has no name; name its class or remove it")
        difficult = (thing.findtext("difficult") or "").strip() == "1"
        with_polygon = thing.find("polygon") is not None
        objects.append((name, box, difficult, with_polygon))
    return (height, width), objects
