"""Pascal VOC's xml files, one for each image: VOC itself, the boxes of ImageNet, and one's own folders."""

import logging
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from common.datasets.dataset import Dataset
from common.datasets.files import IMAGES, listing
from common.datasets.index import BEYOND, Index
from common.datasets.readers.wordnet import class_names
from common.datasets.store import cached_index
from common.errors import InputError
from common.files import refuse_pipe
from common.labels import Vocabulary

log = logging.getLogger("concord")
IMAGENET = "in-boxes"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(name: str, annotations: Path, images: Path, metric: str = "coco") -> Dataset:
    """Read all xml files below the folder `annotations`, or those of a list such as ImageSets/Main/train.txt.

    An image has the name of its xml file; images without one are left out and counted in the log. Corners are pixels
    counted from 1, the last one inside: a box spans xmin - 1 to xmax. Difficult objects are not trained on, and in the
    metric neither wanted nor wrong: their area is beyond all its size ranges.
    Many files are read once and kept as columns in the cache, see `cached_index`.
    Source of the pixels' meaning: facebookresearch/detectron2:detectron2/data/datasets/pascal_voc.py

    voc:      its 20 classes; the list trainval.txt stands for those of all years
    in-boxes: classes are the folders, as some objects are named in words; corners are edges in an image of the size
              that the file gives, which is not the image's, and come in any order.
              Source: tensorflow/models:research/inception/inception/data/process_bounding_boxes.py
    others:   the classes that occur, sorted; WordNet ids are named as by `read_folder`

    Raises InputError naming the xml file and the remedy: not xml or not of this format, a DOCTYPE, an object without a
    name or four corners, a class that is not one of VOC's, no image of its name.
    """
    files = (
        listed(annotations, images) if annotations.is_file() else paired(name, annotations, images)
    )
    xmls, photos = [xml for xml, _ in files.values()], [photo for _, photo in files.values()]
    index, facts = cached_index(
        annotations,
        ["voc", name == IMAGENET, *photos],
        lambda _: read_index(name, annotations, files),
        xmls,
    )
    vocabulary, label_of = read_classes(name, images, facts["classes"])
    for title in facts["classes"]:
        if title not in label_of:
            xml = next(xml for xml in xmls if any(title == each for each, *_ in read_xml(xml)[1]))
            raise InputError(f"{xml}: the class '{title}' is not one of '{name}'; is it another dataset's file? then "
                             "name it: --datasets my=ANNOTATIONS/:IMAGES/")  # fmt: skip
    labels = np.array([label_of[title] for title in facts["classes"]], dtype=np.int32)
    if (labels != np.arange(len(labels))).any():
        index = replace(index, labels=labels[index.labels])
    return Dataset(name, vocabulary, index, images, metric)


def read_index(name: str, source: Path, files: dict[str, tuple[Path, str]]) -> tuple[Index, dict]:
    """With labels that count the classes as they are written, sorted."""
    sizes, objects = [], []
    for row, (xml, _) in enumerate(files.values()):
        size, found = read_xml(xml)
        sizes.append(size)
        objects += [(row, *each) for each in found]
    if not objects:
        raise InputError(
            f"{source}: none of its {len(files)} xml files has an object; name another"
        )
    image_of, titles, boxes, difficult = zip(*objects)
    boxes, sizes, image_of = np.array(boxes), np.array(sizes), np.array(image_of)
    if name == IMAGENET:
        shown = sizes[image_of][:, [1, 0, 1, 0]]
        if not shown.all():
            lost = list(files.values())[image_of[np.argmin(shown.all(axis=1))]][0]
            raise InputError(
                f"{lost} does not tell the size that its corners are of; complete or remove it"
            )
        boxes = np.concatenate(
            [np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1
        )
        boxes, sizes = boxes / shown, np.zeros_like(sizes)
        folders = [key.partition("/")[0] for key in files]
        titles = [folders[i] for i in image_of]
    else:
        boxes -= (1, 1, 0, 0)
    classes, labels = np.unique(titles, return_inverse=True)
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
    return index, {"classes": classes.tolist()}


def holds_xml(folder: Path) -> bool:
    """Whether the folder is one of xml files, and not of label maps."""
    endings = {path.suffix.lower() for path in folder.rglob("*")}
    return ".xml" in endings and ".png" not in endings


def listed(path: Path, images: Path) -> dict[str, tuple[Path, str]]:
    """{id: (xml file, image below `images`)} of a list in YEAR/ImageSets/Main/."""
    all_years = (
        sorted(images.glob("VOC20??/ImageSets/Main/trainval.txt"))
        if path.name == "trainval.txt"
        else []
    )
    files = {}
    for file in all_years or [path]:
        year = file.absolute().parent.parent.parent
        photos = year / "JPEGImages"
        below = (
            photos.relative_to(images.absolute())
            if photos.is_relative_to(images.absolute())
            else Path()
        )
        try:
            ids = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file} cannot be read ({error}); it should name an image on each line"
            ) from None
        files |= {
            id: (year / "Annotations" / f"{id}.xml", (below / f"{id}.jpg").as_posix()) for id in ids
        }
    return files


def paired(name: str, annotations: Path, images: Path) -> dict[str, tuple[Path, str]]:
    """{path without its ending: (xml file, image below `images`)} of two folders."""
    xml_of = listing(name, annotations, (".xml",))
    # ImageNet has fourteen times as many images as files with boxes; they are not listed
    image_of = (
        {key: f"{key}.JPEG" for key in xml_of}
        if name == IMAGENET
        else listing(name, images, IMAGES)
    )
    if lost := [key for key in xml_of if key not in image_of]:
        raise InputError(f"{name}: {annotations / xml_of[lost[0]]} has no image in {images} ({len(lost)} of "
                         f"{len(xml_of)} xml files); add the images or remove the files")  # fmt: skip
    if bare := len(image_of) - len(xml_of):
        log.info("%s: %d images without an xml file in %s are left out", name, bare, annotations)
    return {key: (annotations / file, image_of[key]) for key, file in xml_of.items()}


class NoDoctype(ElementTree.TreeBuilder):
    """So that no file can define entities, which grow without bound when they are expanded."""

    def doctype(self, *declaration):
        raise ValueError("it has a DOCTYPE")


def read_xml(path: Path) -> tuple[tuple[int, int], list[tuple[str, list[float], bool]]]:
    """(height, width), 0 where the file does not tell, and each object's class, corners as written, and difficulty."""
    try:
        refuse_pipe(path, "xml file")
        root = ElementTree.parse(path, ElementTree.XMLParser(target=NoDoctype())).getroot()
        if root.tag != "annotation":
            raise ValueError(f"it starts with <{root.tag}>, not with <annotation>")
        height, width = (
            int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width")
        )
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); put it there or take it out of the list"
        ) from None
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError) as error:
        raise InputError(
            f"{path} is no xml file of Pascal VOC's format ({error}); mend it or take it out"
        ) from None
    objects = []
    for number, thing in enumerate(root.findall("object"), 1):
        title = " ".join((thing.findtext("name") or "").split())
        corners = {part.tag: part.text for part in thing.iterfind("bndbox/*")}
        try:
            box = [float(corners[corner]) for corner in CORNERS]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: object {number} ('{title}') needs a bndbox of the numbers {', '.join(CORNERS)}, "
                             f"but has {corners or 'none'}; mend or remove it") from None  # fmt: skip
        if not title:
            raise InputError(f"{path}: object {number} has no name; name its class or remove it")
        objects.append((title, box, (thing.findtext("difficult") or "").strip() == "1"))
    return (height, width), objects


def read_classes(name: str, images: Path, written: list[str]) -> tuple[Vocabulary, dict[str, int]]:
    """The vocabulary, and the label of each class as the xml files write it."""
    if name == "voc":
        vocabulary = Vocabulary.known(name)
        return vocabulary, {title: label for label, title in enumerate(vocabulary.names)}
    names = class_names(images, written)  # what is no WordNet id stands for itself
    ids: dict[str, str] = {}
    for title, word in zip(written, names):
        ids.setdefault(word, title)  # the first of each name
    label_of = {word: label for label, word in enumerate(ids)}
    return Vocabulary(name, tuple(ids), tuple(ids.values())), {
        t: label_of[word] for t, word in zip(written, names)
    }
