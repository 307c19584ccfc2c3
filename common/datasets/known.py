"""The table of known datasets: where their files are stored and how they are read.

It needs no torch, whose import takes seconds: `common.datasets.names` has the readers.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

Supervision = Literal["boxes", "instances", "semantic", "panoptic", "image_labels"]
Splits = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Known:
    """Tells where the files of a known dataset are and in which format.

    title:         what to download, for messages
    splits:        {split: [(annotations, images), ...]}, paths below the data root. The first pair
                   that exists is read.
    metric:        the protocol that scores it
    format:        of the files; `names.READERS` has its reader
    supervision:   kind of annotations; None if it depends on the files
    class_folders: `annotations` may be a folder that holds, per class, a folder or tar of images
    generated:     True if the dataset exists as generated data only
    federated:     as in `Dataset`
    whole:         name of the dataset in whose folder the files are, if that is another one
    beside:        name of a second dataset whose files are needed
    instances:     for a panoptic dataset, name of the dataset with instances of the same images
    """

    title: str
    splits: Splits
    metric: str = "coco"
    format: str = "coco"
    supervision: Supervision | None = None
    class_folders: bool = False
    generated: bool = False
    federated: bool = False
    whole: str = ""
    beside: str = ""
    instances: str = ""


def _splits(
    *places: tuple[str, str], train: str = "train", val: str = "val", **others: str
) -> Splits:
    """Returns the splits train, val and `others`, each with all `places` (annotations, images).

    In the paths, {split} becomes the split's name. {part} becomes the value of the argument of that
    name, which is the split's name in the dataset's own files.
    """
    splits = {}
    for split, part in {"train": train, "val": val, **others}.items():
        splits[split] = [
            (annotations.format(split=split, part=part), images.format(split=split, part=part))
            for annotations, images in places
        ]
    return splits


def _ade20k(*annotations: str) -> Splits:
    """Returns the splits of ADE20K. `annotations` are paths below its folder."""
    places = [
        (f"{base}/{path}", f"{base}/images/{{part}}")
        for path in annotations
        for base in ("ADEChallengeData2016", "ade20k/ADEChallengeData2016")
    ]
    return _splits(*places, train="training", val="validation")


def _openimages(*files: tuple[str, str]) -> Known:
    """Returns Open Images, read from the first of `files` (csv file, image folder) that exists."""
    places = []
    for base in ("oid", "openimages"):
        for file, images in files:
            for folder in (f"{base}/annotations", base):
                places.append((f"{folder}/{file}", f"{base}/{images}"))
    return Known(
        "OpenImages (storage.googleapis.com/openimages)",
        _splits(*places, val="validation"),
        metric="oid",
        format="openimages",
    )


def _voc(*lists: str) -> list[tuple[str, str]]:
    """Returns (annotations, images) for image `lists` such as 2007/test.

    The folders of the years are in VOCdevkit/ or, as in detectron2's layout, in the data root.
    """
    places = []
    for base in ("VOCdevkit", "."):
        for each in lists:
            year, part = each.split("/")
            places.append((f"{base}/VOC{year}/ImageSets/Main/{part}.txt", base))
    return places


def _odinw(name: str) -> Known:
    """Returns one dataset of ODinW-13. Its annotation file lists its classes.

    Source: microsoft/GLIP:configs/odinw_13.
    """
    folder = f"odinw/{ODINW[name]}"
    file = "annotations_without_background.json"
    place = (f"{folder}/{{part}}/{file}", f"{folder}/{{part}}")
    if name == "pistols":  # all its images are in one folder
        place = (f"{folder}/{{split}}_{file}", folder)
    test = "valid" if name == "PascalVOC" else "test"  # PascalVOC has no test split
    title = f"{name} of ODinW-13 (github.com/microsoft/GLIP)"
    return Known(title, _splits(place, val="valid", test=test))


OID = (
    ("{part}-annotations-bbox.csv", "images/{part}"),
    ("oidv6-{part}-annotations-bbox.csv", "images/{part}"),
    ("annotations-bbox.csv", "images"),
)
CHALLENGE = ("challenge-2019-{part}-detection-bbox.csv", "images/{part}")
O365 = "objects365/annotations/zhiyuan_objv2"
CITYSCAPES = "cityscapes/gtFine/cityscapes"
INSTANCES = "cityscapes/annotations/instancesonly_filtered_gtFine"
IN_L = "imagenet/ImageNet-LVIS"
STUFF = "coco/coco_stuff_10k"
VISTAS = "mapillary_vistas/{part}"
ODINW = {  # the folder of each dataset
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
_semantic = partial(Known, metric="miou", format="semantic", supervision="semantic")
_panoptic = partial(Known, metric="pq", format="panoptic", supervision="panoptic")
_image_labels = partial(Known, supervision="image_labels")
COCO = Known(
    "COCO 2017 (cocodataset.org)",
    _splits(("coco/annotations/instances_{split}2017.json", "coco/{split}2017")),
)
LVIS = Known(
    "LVIS v1 (lvisdataset.org; its images may be those in coco/)",
    _splits(("lvis/lvis_v1_{split}.json", "lvis/images"), ("lvis/lvis_v1_{split}.json", "coco")),
    metric="lvis",
    federated=True,
)
CITYSCAPES_INSTANCES = Known(
    "what mmdetection's tools/dataset_converters/cityscapes.py makes",
    _splits((f"{INSTANCES}_{{split}}.json", "cityscapes/leftImg8bit/{split}")),
    whole="cityscapes",
)
KNOWN = {
    "coco": COCO,
    "coco-base": replace(COCO, whole="coco"),
    "lvis": LVIS,
    "lvis-base": replace(LVIS, whole="lvis"),
    "lvis+coco": replace(LVIS, whole="lvis", beside="coco"),
    "o365": Known(
        "Objects365 v2 (objects365.org)",
        {
            "train": [
                (f"{O365}_train.json", "objects365/train"),
                (f"{O365}_train_fixname_fixmiss.json", "objects365/train"),  # by Detic's tools
                (f"{O365}_train_fixmiss.json", "objects365/train"),
            ],
            "val": [
                (f"{O365}_val.json", "objects365/val"),
                (f"{O365}_val_fixname.json", "objects365/val"),
            ],
        },
    ),
    "o365-instances": Known(
        "o365_instance_seg_val.json "
        "(google-research-datasets/DaTaSeg-Objects365-Instance-Segmentation)",
        {
            "val": [
                ("objects365/annotations/o365_instance_seg_val.json", "objects365/val"),
                ("objects365/o365_instance_seg_val.json", "objects365/val"),
            ]
        },
        format="o365_instances",
        whole="o365",
    ),
    "oid": _openimages(*OID),
    # the reader keeps the challenge's 500 classes, also of the files of Open Images
    "oid500": _openimages(CHALLENGE, *OID),
    "oid-top": replace(_openimages(*OID), whole="oid"),
    "ade20k": _semantic(
        "ADE20K's SceneParsing benchmark (sceneparsing.csail.mit.edu)",
        _ade20k("annotations/{part}", "annotations_detectron2/{part}"),
    ),
    "ade20k-panoptic": _panoptic(
        "what Mask2Former's prepare_ade20k_pan_seg.py makes",
        _ade20k("ade20k_panoptic_{split}.json"),
        whole="ade20k",
        instances="ade20k-instances",
    ),
    "ade20k-instances": Known(
        "what Mask2Former's prepare_ade20k_ins_seg.py makes",
        _ade20k("ade20k_instance_{split}.json"),
    ),
    "cityscapes": _semantic(
        "Cityscapes with fine annotations (cityscapes-dataset.com)",
        _splits(("cityscapes/gtFine/{split}", "cityscapes/leftImg8bit/{split}")),
    ),
    "cityscapes-panoptic": _panoptic(
        "what cityscapesScripts' createPanopticImgs.py makes",
        _splits((f"{CITYSCAPES}_panoptic_{{split}}.json", "cityscapes/leftImg8bit/{split}")),
        whole="cityscapes",
    ),
    "cityscapes-instances": CITYSCAPES_INSTANCES,
    "cityscapes-common": CITYSCAPES_INSTANCES,
    "cityscapes-rare": CITYSCAPES_INSTANCES,
    "coco-panoptic": _panoptic(
        "COCO 2017 panoptic (cocodataset.org)",
        _splits(("coco/annotations/panoptic_{split}2017.json", "coco/{split}2017")),
        whole="coco",
        instances="coco",
    ),
    "coco-stuff": _semantic(
        "COCO-Stuff 10k (github.com/nightrome/cocostuff10k) "
        "as MaskFormer or mmsegmentation prepares it",
        _splits(
            (f"{STUFF}/annotations_detectron2/{{part}}", f"{STUFF}/images_detectron2/{{part}}"),
            ("coco_stuff10k/annotations/{part}2014", "coco_stuff10k/images/{part}2014"),
            val="test",
        ),
    ),
    "mapillary": _semantic(
        "Mapillary Vistas v1.2 (mapillary.com/dataset/vistas)",
        _splits(
            (f"{VISTAS}/labels", f"{VISTAS}/images"),
            (f"{VISTAS}/v1.2/labels", f"{VISTAS}/images"),
            train="training",
            val="validation",
        ),
    ),
    "mapillary-panoptic": _panoptic(
        "Mapillary Vistas v1.2 (mapillary.com/dataset/vistas)",
        _splits(
            (f"{VISTAS}/panoptic/panoptic_2018.json", f"{VISTAS}/images"),
            (f"{VISTAS}/v1.2/panoptic/panoptic_2018.json", f"{VISTAS}/images"),
            train="training",
            val="validation",
        ),
    ),
    "voc": Known(
        "Pascal VOC 2007 and 2012 (host.robots.ox.ac.uk/pascal/VOC)",
        {
            "train": _voc("2007/trainval", "2012/trainval"),
            "val": _voc("2007/test"),
            "train2007": _voc("2007/train"),
            "val2007": _voc("2007/val"),
            "train2012": _voc("2012/train"),
            "val2012": _voc("2012/val"),
        },
        format="voc",
    ),
    "vg": Known(
        "Visual Genome's objects.json and image_data.json (visualgenome.org)",
        _splits(("vg/objects.json", "vg")),
        format="visual_genome",
    ),
    "in-boxes": Known(
        "ImageNet's bounding boxes (image-net.org, bboxes_annotations.tar.gz), unpacked,",
        _splits(("imagenet/Annotation", "imagenet/ImageNet-21K")),
        format="voc",
    ),
    **{f"odinw-{name}": _odinw(name) for name in ODINW},
    "lineart": Known(
        "the generated zero-shot set; it exists with --tiny only",
        {"val": [("lineart/annotations/instances_val.json", "lineart/val")]},
        generated=True,
    ),
    "in21k": _image_labels(
        "ImageNet-21K (image-net.org), a tar for each class,",
        {"train": [("imagenet/ImageNet-21K", "imagenet/ImageNet-21K")]},
        class_folders=True,
    ),
    "in-l": _image_labels(
        "the list of Detic's create_imagenetlvis_json.py "
        "(or class folders in imagenet/ImageNet-LVIS)",
        {"train": [("imagenet/annotations/imagenet_lvis_image_info.json", IN_L), (IN_L, IN_L)]},
        class_folders=True,
    ),
    "cc": _image_labels(
        "the tags of Detic's tools/get_cc_tags.py "
        "(or Conceptual Captions' own Train_GCC-training.tsv)",
        {
            "train": [
                ("cc3m/train_image_info_tags.json", "cc3m/training"),
                ("cc3m/Train_GCC-training.tsv", "cc3m/training"),
                ("cc3m/GCC-training.tsv", "cc3m/training"),
                ("cc3m/training", "cc3m/training"),
            ]
        },
        format="captions",
    ),
}
ALIASES = {
    "objects365": "o365",
    "objects365-instances": "o365-instances",
    "openimages": "oid",
    "ade": "ade20k",
}
GROUPS = {"odinw13": [f"odinw-{name}" for name in ODINW]}
