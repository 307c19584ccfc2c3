"""The known datasets, their folders, and the grammar of --datasets.

NAME, NAME:SPLIT, NAME=ANNOTATIONS.json:IMAGES/, NAME=CAPTIONS.tsv:IMAGES/, NAME=XML_OR_LABEL_MAPS/:IMAGES/ or, for a
folder or tar file of images per class, NAME=FOLDER/.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from common.datasets.base_split import coco_base, lvis_base
from common.datasets.dataset import Dataset
from common.datasets.readers.captions import read_captions
from common.datasets.readers.coco import read_coco, read_o365_instances
from common.datasets.readers.openimages import read_openimages
from common.datasets.readers.panoptic import read_panoptic
from common.datasets.readers.semantic import read_semantic
from common.datasets.readers.visual_genome import read_visual_genome
from common.datasets.readers.voc import read_voc

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
        names += [
            f"{part}-annotations-bbox.csv",
            f"oidv6-{part}-annotations-bbox.csv",
            "annotations-bbox.csv",
        ]
        splits[split] = [
            (
                f"{base}/{folder}{name}",
                f"{base}/images" if name == names[-1] else f"{base}/images/{part}",
            )
            for base in ("oid", "openimages")
            for name in names
            for folder in ("annotations/", "")
        ]
    return Known(
        "OpenImages (storage.googleapis.com/openimages)", splits, metric="oid", read=read_openimages
    )


COCO = Known(
    "COCO 2017 (cocodataset.org)",
    {s: [(f"coco/annotations/instances_{s}2017.json", f"coco/{s}2017")] for s in ("train", "val")},
)
LVIS = Known(
    "LVIS v1 (lvisdataset.org; its images may be those in coco/)",
    {
        s: [(f"lvis/lvis_v1_{s}.json", folder) for folder in ("lvis/images", "coco")]
        for s in ("train", "val")
    },
    metric="lvis",
)


def _cityscapes(annotations: str) -> dict[str, list[tuple[str, str]]]:
    folder = "cityscapes/gtFine/" + annotations
    return {
        split: [(folder.format(split), f"cityscapes/leftImg8bit/{split}")]
        for split in ("train", "val")
    }


def _ade20k(*annotations: str) -> dict[str, list[tuple[str, str]]]:
    bases = ("ADEChallengeData2016", "ade20k/ADEChallengeData2016")
    return {
        split: [
            (f"{b}/{a.format(split=split, part=part)}", f"{b}/images/{part}")
            for a in annotations
            for b in bases
        ]
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
    parts = {
        "train": "train",
        "val": "valid",
        "test": "valid" if name == "PascalVOC" else "test",
    }  # it has no test
    if name == "pistols":  # all its images are in one folder
        splits = {split: [(f"{folder}/{split}_{file}", folder)] for split in parts}
    else:
        splits = {
            split: [(f"{folder}/{part}/{file}", f"{folder}/{part}")]
            for split, part in parts.items()
        }
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
        {
            "val": [
                (f"objects365/{f}o365_instance_seg_val.json", "objects365/val")
                for f in ("annotations/", "")
            ]
        },
        read=read_o365_instances,
        whole="o365",
    ),
    "oid": _openimages(challenge=False),
    "oid500": _openimages(
        challenge=True
    ),  # of whichever files, the reader keeps the challenge's 500 classes
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
        {
            s: [(f"coco/annotations/panoptic_{s}2017.json", f"coco/{s}2017")]
            for s in ("train", "val")
        },
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
            split: [
                (f"{VISTAS}/{part}/{labels}", f"{VISTAS}/{part}/images")
                for labels in ("labels", "v1.2/labels")
            ]
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
            **{
                f"{part}{year}": _voc(f"{year}/{part}")
                for year in (2007, 2012)
                for part in ("train", "val")
            },
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
    "in21k": Known(
        "ImageNet-21K (image-net.org), a tar for each class,",
        {"train": [("imagenet/ImageNet-21K",) * 2]},
    ),
    "in-l": Known(
        "the list of Detic's create_imagenetlvis_json.py (or class folders in imagenet/ImageNet-LVIS)",
        {"train": [("imagenet/annotations/imagenet_lvis_image_info.json", IN_L), (IN_L, IN_L)]},
    ),
    "cc": Known(
        "the tags of Detic's tools/get_cc_tags.py (or Conceptual Captions' own Train_GCC-training.tsv)",
        {
            "train": [
                (f"cc3m/{file}", "cc3m/training")
                for file in (
                    "train_image_info_tags.json",
                    "Train_GCC-training.tsv",
                    "GCC-training.tsv",
                    "training",
                )
            ]
        },
        read=read_captions,
    ),
}
ALIASES = {
    "objects365": "o365",
    "objects365-instances": "o365-instances",
    "openimages": "oid",
    "ade": "ade20k",
}
GROUPS = {"odinw13": [f"odinw-{name}" for name in ODINW]}
