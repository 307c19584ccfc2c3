"""The known datasets, their folders, and the grammar of --datasets.

NAME, NAME:SPLIT, NAME=ANNOTATIONS.json:IMAGES/, NAME=CAPTIONS.tsv:IMAGES/, NAME=XML_OR_LABEL_MAPS/:IMAGES/ or, for a
folder or tar file of images per class, NAME=FOLDER/.
"""

import difflib
import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from common.batch import Supervision
from common.datasets.base import Dataset
from common.datasets.base_split import coco_base, lvis_base
from common.datasets.captions import read_captions
from common.datasets.coco import read_coco, read_o365_instances
from common.datasets.folder import read_folder
from common.datasets.openimages import read_openimages
from common.datasets.panoptic import is_panoptic, read_panoptic
from common.datasets.semantic import read_semantic
from common.datasets.tiny import generate
from common.datasets.visual_genome import read_visual_genome
from common.datasets.voc import holds_xml, read_voc
from common.errors import InputError
from common.paths import cache_dir

log = logging.getLogger("concord")


@dataclass(frozen=True)
class Known:
    """Where a dataset lies under the data root: {split: [(annotations, images), ...]}; the first to exist is read.

    Where `annotations` is a folder, it holds label maps, xml files or, for `read_coco`, a folder of images for each
    class. Image labels have no split "val".
    whole:      the dataset in whose folder these files are
    base_split: what makes an open-vocabulary split of `whole`
    """

    title: str
    splits: dict[str, list[tuple[str, str]]]
    metric: str = "coco"
    read: Callable[..., Dataset] = read_coco
    whole: str = ""
    base_split: Callable[[Dataset, str], Dataset] | None = None


def _openimages(challenge: bool) -> Known:
    """The files of the challenge 2019, if wanted, come before those of Open Images, from which they were taken."""
    splits = {}
    for split, part in (("train", "train"), ("val", "validation")):
        names = [f"challenge-2019-{part}-detection-bbox.csv"] * challenge
        names += [f"{part}-annotations-bbox.csv", f"oidv6-{part}-annotations-bbox.csv", "annotations-bbox.csv"]
        splits[split] = [
            (f"{base}/{folder}{name}", f"{base}/images" if name == names[-1] else f"{base}/images/{part}")
            for base in ("oid", "openimages")
            for name in names
            for folder in ("annotations/", "")
        ]
    return Known("OpenImages (storage.googleapis.com/openimages)", splits, metric="oid", read=read_openimages)


COCO = Known(
    "COCO 2017 (cocodataset.org)",
    {s: [(f"coco/annotations/instances_{s}2017.json", f"coco/{s}2017")] for s in ("train", "val")},
)
LVIS = Known(
    "LVIS v1 (lvisdataset.org; its images may be those in coco/)",
    {s: [(f"lvis/lvis_v1_{s}.json", folder) for folder in ("lvis/images", "coco")] for s in ("train", "val")},
    metric="lvis",
)


def _cityscapes(annotations: str) -> dict[str, list[tuple[str, str]]]:
    folder = "cityscapes/gtFine/" + annotations
    return {split: [(folder.format(split), f"cityscapes/leftImg8bit/{split}")] for split in ("train", "val")}


def _ade20k(*annotations: str) -> dict[str, list[tuple[str, str]]]:
    bases = ("ADEChallengeData2016", "ade20k/ADEChallengeData2016")
    return {
        split: [(f"{b}/{a.format(split=split, part=part)}", f"{b}/images/{part}") for a in annotations for b in bases]
        for split, part in (("train", "training"), ("val", "validation"))
    }


def _voc(*lists: str) -> list[tuple[str, str]]:
    """`lists` such as 2007/test; the years lie in VOCdevkit/ or, as in detectron2's layout, in the data root."""
    return [
        (f"{base}/VOC{year}/ImageSets/Main/{part}.txt", base)
        for base in ("VOCdevkit", ".")
        for year, part in (each.split("/") for each in lists)
    ]


ODINW = {
    "AerialMaritimeDrone": "AerialMaritimeDrone/large",
    "Aquarium": "Aquarium/Aquarium Combined.v2-raw-1024.coco",
    "CottontailRabbits": "CottontailRabbits",
    "EgoHands": "EgoHands/generic",
    "NorthAmericaMushrooms": "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco",
    "Packages": "Packages/Raw",
    "PascalVOC": "PascalVOC",
    "pistols": "pistols/export",
    "pothole": "pothole",
    "Raccoon": "Raccoon/Raccoon.v2-raw.coco",
    "ShellfishOpenImages": "ShellfishOpenImages/raw",
    "thermalDogsAndPeople": "thermalDogsAndPeople",
    "VehiclesOpenImages": "VehiclesOpenImages/416x416",
}


def _odinw(name: str) -> Known:
    """One of the thirteen, each with the classes of its file. Source: microsoft/GLIP:configs/odinw_13."""
    folder, file = f"odinw/{ODINW[name]}", "annotations_without_background.json"
    parts = {"train": "train", "val": "valid", "test": "valid" if name == "PascalVOC" else "test"}  # it has no test
    if name == "pistols":  # all its images are in one folder
        splits = {split: [(f"{folder}/{split}_{file}", folder)] for split in parts}
    else:
        splits = {split: [(f"{folder}/{part}/{file}", f"{folder}/{part}")] for split, part in parts.items()}
    return Known(f"{name} of ODinW-13 (github.com/microsoft/GLIP)", splits)


IN_L, STUFF, VISTAS = "imagenet/ImageNet-LVIS", "coco/coco_stuff_10k", "mapillary_vistas"
KNOWN = {
    "coco": COCO,
    "coco-base": replace(COCO, whole="coco", base_split=coco_base),
    "lvis": LVIS,
    "lvis-base": replace(LVIS, whole="lvis", base_split=lvis_base),
    "o365": Known(
        "Objects365 v2 (objects365.org)",
        {
            "train": [
                (f"objects365/annotations/zhiyuan_objv2_train{mended}.json", "objects365/train")
                for mended in ("", "_fixname_fixmiss", "_fixmiss")  # by Detic's tools
            ],
            "val": [
                (f"objects365/annotations/zhiyuan_objv2_val{mended}.json", "objects365/val")
                for mended in ("", "_fixname")
            ],
        },
    ),
    "o365-instances": Known(
        "o365_instance_seg_val.json (google-research-datasets/DaTaSeg-Objects365-Instance-Segmentation)",
        {"val": [(f"objects365/{f}o365_instance_seg_val.json", "objects365/val") for f in ("annotations/", "")]},
        read=read_o365_instances,
        whole="o365",
    ),
    "oid": _openimages(challenge=False),
    "oid500": _openimages(challenge=True),  # of whichever files, the reader keeps the challenge's 500 classes
    "ade20k": Known(
        "ADE20K's SceneParsing benchmark (sceneparsing.csail.mit.edu)",
        _ade20k("annotations/{part}", "annotations_detectron2/{part}"),
        metric="miou",
        read=read_semantic,
    ),
    "ade20k-panoptic": Known(
        "what Mask2Former's prepare_ade20k_pan_seg.py makes",
        _ade20k("ade20k_panoptic_{split}.json"),
        metric="pq",
        read=read_panoptic,
        whole="ade20k",
    ),
    "cityscapes": Known(
        "Cityscapes with fine annotations (cityscapes-dataset.com)",
        _cityscapes("{}"),
        metric="miou",
        read=read_semantic,
    ),
    "cityscapes-panoptic": Known(
        "what cityscapesScripts' createPanopticImgs.py makes",
        _cityscapes("cityscapes_panoptic_{}.json"),
        metric="pq",
        read=read_panoptic,
        whole="cityscapes",
    ),
    "coco-panoptic": Known(
        "COCO 2017 panoptic (cocodataset.org)",
        {s: [(f"coco/annotations/panoptic_{s}2017.json", f"coco/{s}2017")] for s in ("train", "val")},
        metric="pq",
        read=read_panoptic,
        whole="coco",
    ),
    "coco-stuff": Known(
        "COCO-Stuff 10k (github.com/nightrome/cocostuff10k) as MaskFormer or mmsegmentation prepares it",
        {
            split: [
                (f"{STUFF}/annotations_detectron2/{part}", f"{STUFF}/images_detectron2/{part}"),
                (f"coco_stuff10k/annotations/{part}2014", f"coco_stuff10k/images/{part}2014"),
            ]
            for split, part in (("train", "train"), ("val", "test"))
        },
        metric="miou",
        read=read_semantic,
    ),
    "mapillary": Known(
        "Mapillary Vistas v1.2 (mapillary.com/dataset/vistas)",
        {
            split: [(f"{VISTAS}/{part}/{labels}", f"{VISTAS}/{part}/images") for labels in ("labels", "v1.2/labels")]
            for split, part in (("train", "training"), ("val", "validation"))
        },
        metric="miou",
        read=read_semantic,
    ),
    "voc": Known(
        "Pascal VOC 2007 and 2012 (host.robots.ox.ac.uk/pascal/VOC)",
        {
            "train": _voc("2007/trainval", "2012/trainval"),
            "val": _voc("2007/test"),
            **{f"{part}{year}": _voc(f"{year}/{part}") for year in (2007, 2012) for part in ("train", "val")},
        },
        read=read_voc,
    ),
    "vg": Known(
        "Visual Genome's objects.json and image_data.json (visualgenome.org)",
        {split: [("vg/objects.json", "vg")] for split in ("train", "val")},
        read=read_visual_genome,
    ),
    "in-boxes": Known(
        "ImageNet's bounding boxes (image-net.org, bboxes_annotations.tar.gz), unpacked,",
        {split: [("imagenet/Annotation", "imagenet/ImageNet-21K")] for split in ("train", "val")},
        read=read_voc,
    ),
    **{f"odinw-{name}": _odinw(name) for name in ODINW},
    "lineart": Known(
        "the generated zero-shot set; it exists with --tiny only",
        {"val": [("lineart/annotations/instances_val.json", "lineart/val")]},
    ),
    "in21k": Known("ImageNet-21K (image-net.org), a tar for each class,", {"train": [("imagenet/ImageNet-21K",) * 2]}),
    "in-l": Known(
        "the list of Detic's create_imagenetlvis_json.py (or class folders in imagenet/ImageNet-LVIS)",
        {"train": [("imagenet/annotations/imagenet_lvis_image_info.json", IN_L), (IN_L, IN_L)]},
    ),
    "cc": Known(
        "the tags of Detic's tools/get_cc_tags.py (or Conceptual Captions' own Train_GCC-training.tsv)",
        {
            "train": [
                (f"cc3m/{file}", "cc3m/training")
                for file in ("train_image_info_tags.json", "Train_GCC-training.tsv", "GCC-training.tsv", "training")
            ]
        },
        read=read_captions,
    ),
}
ALIASES = {"objects365": "o365", "objects365-instances": "o365-instances", "openimages": "oid", "ade": "ade20k"}
GROUPS = {"odinw13": [f"odinw-{name}" for name in ODINW]}


def entries(text: str) -> list[str]:
    """The entries between the commas of `text`; a group's name, perhaps with a split, becomes its members'."""
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, colon, rest = entry.partition(":")
        found += [member + colon + rest for member in GROUPS.get(name, [name])]
    return found


def parse_datasets(text: str, split: str) -> list[tuple[str, str, tuple[str, str] | None]]:
    """`a,b:val,my=ann.json:images/` -> [(name, split, (annotations, images) or None)]; `split` where none is named.

    `my=FOLDER/` names a folder of images per class: both are FOLDER.
    Raises InputError for an unknown name (with the nearest ones), an unknown split, a name given twice, a name of one's
    own that cannot be part of a file name.
    """
    parsed = []
    for entry in entries(text):
        name, custom, paths = entry.partition("=")
        if custom:
            annotations, colon, images = paths.rpartition(":")
            if not (annotations if colon else images) or (not colon and images.endswith(".json")):
                raise InputError(f"--datasets {entry}: write NAME=ANNOTATIONS.json:IMAGE_FOLDER/, or NAME=FOLDER/ "
                                 "for a folder with one folder of images per class; xml files or label maps are "
                                 "NAME=MAP_FOLDER/:IMAGE_FOLDER/")  # fmt: skip
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise InputError(f"--datasets {entry}: the name '{name}' names files, too; give it letters, digits and "
                                 "._- only, the first no dot")  # fmt: skip
            parsed.append((name, split, (annotations or images, images)))
            continue
        name, _, own_split = entry.partition(":")
        name = ALIASES.get(name, name)
        if name not in KNOWN:
            near = difflib.get_close_matches(name, [*KNOWN, *ALIASES, *GROUPS], n=3, cutoff=0.4) or list(KNOWN)
            raise InputError(f"unknown dataset '{name}'; nearest: {', '.join(near)}; your own: NAME=ANN.json:IMAGES/")
        if (own_split or split) not in KNOWN[name].splits:
            raise InputError(
                f"dataset '{name}' has no split '{own_split or split}', only {', '.join(KNOWN[name].splits)}"
            )
        parsed.append((name, own_split or split, None))
    names = [name for name, *_ in parsed]
    if len(set(names)) < len(names):
        raise InputError(f"dataset '{next(n for n in names if names.count(n) > 1)}' is named twice; name each once")
    return parsed


def default_eval(text: str, without: Collection[str] = ()) -> str:
    """What to evaluate after training on `text`: the default split of each known dataset, one's own files as given.

    Image labels cannot be evaluated: in21k and the like are left out, one's own image folders, and the names `without`.
    "" if none remains.
    """
    names = []
    for entry in entries(text):
        name, custom, paths = entry.partition("=")
        name = name.partition(":")[0]
        if name in without:
            continue
        if custom and ":" in paths:
            names.append(entry)
        elif not custom and not only_image_labels(name := ALIASES.get(name, name)):
            names.append(name)
    return ",".join(names)


def only_image_labels(name: str) -> bool:
    return name in KNOWN and "val" not in KNOWN[name].splits


def known_supervision(name: str) -> Supervision | None:
    """What a known dataset has, if that is not for its files to tell."""
    if only_image_labels(name):
        return "image_labels"
    return {read_semantic: "semantic", read_panoptic: "panoptic"}.get(KNOWN[name].read)


def warn_of_overlap(trained: list[Dataset], evaluated: list[Dataset]) -> None:
    """One line for each dataset whose metric will be of the images it was trained on."""
    sources = {dataset.index.source for dataset in trained}
    for dataset in evaluated:
        if dataset.index.source in sources:
            log.warning("%s is evaluated on its TRAINING images: %s", dataset.name, dataset.index.source)


def load_datasets(
    text: str,
    split: str,
    data_root: str = "",
    tiny: int = 0,
    masks: bool = False,
    accepts: tuple[Supervision, ...] = ("boxes", "instances"),
    check: bool = True,
) -> list[Dataset]:
    """The datasets that `text` names, in its order.

    data_root: where the known datasets lie; else DETECTRON2_DATASETS, else ./data
    tiny:      > 0: the generated stand-ins with images of that side instead of the real datasets
    masks:     the samples carry instance masks, where the annotations have them
    accepts:   the kinds of supervision that the method can learn from
    check:     a missing image is an error

    Raises InputError for bad names, nothing under the data root, broken annotations, missing images, another kind of
    supervision.
    """
    datasets = []
    for name, own_split, paths in parse_datasets(text, split):
        root = data_folder(data_root)
        if not paths and (supervision := known_supervision(name)):
            refuse_unless(supervision, accepts, name, split)  # before files are listed or generated
        if tiny and not paths:
            if data_root:
                log.warning("--tiny draws a stand-in for '%s'; %s is not read for it", name, data_root)
            root = generate(KNOWN[name].whole or name, cache_dir(), tiny)
        dataset = load_dataset(name, own_split, paths, root, check)
        refuse_unless(dataset.supervision, accepts, name, split)
        boxless = dataset.supervision in ("boxes", "instances") and not len(dataset.index.labels)
        if check and split == "train" and boxless and not dataset.novel:
            raise InputError(f"{dataset.index.source} has no box to learn from; add annotations or, for image labels, "
                             "pos_category_ids")  # fmt: skip
        datasets.append(replace(dataset, masks=masks))
    if not datasets:
        raise InputError(
            f"no dataset named; --datasets or --eval-datasets: {', '.join(KNOWN)}, or NAME=ANNOTATIONS.json:IMAGES/"
        )
    return datasets


def data_folder(data_root: str) -> Path:
    return Path(data_root or os.environ.get("DETECTRON2_DATASETS") or "data")


def find_files(name: str, split: str, root: Path) -> tuple[Path, Path] | None:
    """The annotations and images of a known dataset: the first that exist, both if possible."""
    places = [(root / a, root / i) for a, i in KNOWN[name].splits[split]]
    found = [place for place in places if place[0].exists()]
    return next((place for place in found if place[1].is_dir()), found[0] if found else None)


def refuse_unless(supervision: Supervision, accepts: tuple[Supervision, ...], name: str, split: str) -> None:
    words = {"image_labels": "image labels", "semantic": "semantic label maps", "panoptic": "panoptic segments"}
    if supervision not in accepts:
        has, *needs = (words.get(kind, kind) for kind in (supervision, *accepts))
        remedy = "leave it out of --datasets" if split == "train" else "name others with --eval-datasets"
        raise InputError(f"dataset '{name}' has {has} only; this method needs {' or '.join(needs)}; {remedy}")


def load_dataset(name: str, split: str, paths: tuple[str, str] | None, root: Path, check: bool = True) -> Dataset:
    """Read the annotations of one dataset and check that all its images exist, unless told not to.

    Raises InputError naming the file and the remedy: nothing under `root`, broken annotations, missing images.
    """
    if paths and paths[0] == paths[1]:
        folder = Path(paths[0])
        beside = any(folder.glob("*.xml"))  # each xml file beside its image, as Roboflow exports them
        return read_voc(name, folder, folder) if beside else read_folder(name, folder)
    if paths:
        annotations, images = map(Path, paths)
        if annotations.is_dir():
            dataset = (read_voc if holds_xml(annotations) else read_semantic)(name, annotations, images)
        elif annotations.is_file() and annotations.suffix == ".txt":
            dataset = read_voc(name, annotations, images)
        elif annotations.is_file() and annotations.suffix == ".tsv":
            dataset = read_captions(name, annotations, images)
        elif annotations.is_file():
            read, metric = (read_panoptic, "pq") if is_panoptic(annotations) else (read_coco, "coco")
            dataset = read(name, annotations, images, metric)
        else:
            raise InputError(
                f"dataset '{name}': annotations {annotations} do not exist; check the path before the colon"
            )
    else:
        known = KNOWN[name]
        if name == "lineart" and not (root / "lineart").is_dir():
            raise InputError("dataset 'lineart' is generated: add --tiny")
        if not root.is_dir():
            raise InputError(f"data root {root} does not exist; give --data-root or set DETECTRON2_DATASETS")
        if not (found := find_files(name, split, root)):
            annotations, images = known.splits[split][0]
            where = "" if images == annotations else f", its images in {root / images}"
            raise InputError(f"dataset '{name}': {root / annotations} does not exist; put {known.title} there{where}, "
                             "as data/README.md shows, or give --data-root")  # fmt: skip
        annotations, images = found
        if known.read is read_coco and annotations.is_dir():
            return read_folder(name, annotations)  # it lists what exists, so that nothing can be missing
        dataset = known.read(known.whole if known.base_split else name, annotations, images, known.metric)
        dataset = known.base_split(dataset, split) if known.base_split else dataset
    if len(dataset) == 0:
        raise InputError(f"{dataset.index.source} lists no images; name another file")
    if check:
        dataset.check_images()
    return dataset
