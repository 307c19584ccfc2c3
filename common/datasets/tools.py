"""Names the tool that wrote a file which is not read, and how to convert the file."""

import re
from dataclasses import dataclass
from pathlib import Path

FEW = 20  # folders that are looked into
START = 1 << 16  # bytes of a file in which its fields are looked for
LABEL_MAPS = ("labelmap.txt", "label_colors.txt")  # of CVAT, beside maps in colours
AS_COCO = "export it as COCO"
BRUSH = re.compile(r"task-\d+-annotation-\d+-by-.*\.(png|npy)")  # of Label Studio


@dataclass(frozen=True)
class Tool:
    """A tool whose json files are not read.

    name:   what its files are called
    fields: those that a file of it has, all of them
    remedy: how to get one that is read
    """

    name: str
    fields: tuple[str, ...]
    remedy: str = AS_COCO


TOOLS = (
    Tool("VIA (the VGG Image Annotator)", ("shape_attributes",)),
    Tool("VIA (the VGG Image Annotator)", ("_via_settings",)),
    Tool("Supervisely", ("classTitle",)),
    Tool("Supervisely", ("projectType",)),
    Tool("Darwin (V7)", ("item", "slots")),
    Tool(
        "Datumaro",
        ("items", "categories"),
        "convert it: datum convert -if datumaro -i FOLDER -f coco",
    ),
    Tool("CreateML", ("image", "coordinates")),
    Tool("Label Studio", ("data", "annotations", "result")),
    Tool("Label Studio", ("rectanglelabels",)),
    Tool("Label Studio", ("polygonlabels",)),
    Tool("Label Studio", ("brushlabels",)),
    Tool(
        "FiftyOne",
        ("classes", "labels", "bounding_box"),
        "export it as fiftyone.types.COCODetectionDataset",
    ),
    Tool("Labelbox", ("data_row",)),
    Tool("Scalabel or BDD100K", ("labels", "box2d")),
    Tool(
        "a detector's predictions in COCO's result format",
        ("image_id", "score"),
        "give the json of the annotations",
    ),
    Tool(
        "labelme",
        ("shapes", "imagePath"),
        "name the folder of such files instead: NAME=JSONS/:IMAGES/",
    ),
)


def name_tool(path: Path) -> str:
    """Returns whose json file it is and what to do, such as "is a json file of VIA; export ...".

    "" if it is COCO's, or of no tool that is known here. Only the start of the file is read.
    """
    start = _start(path)
    if _holds_coco(start):
        return ""
    for tool in TOOLS:
        if all(_has(start, field) for field in tool.fields):
            return f"is a json file of {tool.name}, which is not read; {tool.remedy}"
    return ""


def find_coco_json(folder: Path) -> Path | None:
    """Returns the first of a folder's json files in COCO's format; None if there is none."""
    files = sorted(folder.glob("*.json"))[:FEW]
    return next((file for file in files if _holds_coco(_start(file))), None)


def _start(path: Path) -> bytes:
    """Returns the first bytes of a file, none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(START)
    except OSError:
        return b""


def _holds_coco(start: bytes) -> bool:
    """Returns whether a json file that starts so is in COCO's format."""
    return _has(start, "images") and (_has(start, "annotations") or _has(start, "categories"))


def _has(start: bytes, field: str) -> bool:
    """Returns whether the start of a json file has a text that is equal to `field`."""
    return f'"{field}"'.encode() in start


def name_folder(folder: Path) -> str:
    """Returns whose files a folder holds and what to do; "" if it is of no tool known here.

    Looks at the first json file in the folder, below annotations/ or one or two folders deeper,
    for CVAT's list of the colours of label maps, and for masks of Label Studio.
    """
    for name in LABEL_MAPS:
        if (folder / name).is_file():
            return (
                f"has label maps in the colours of {name}; write the number of the class in each "
                "pixel and the names in classes.txt, or export COCO from CVAT"
            )
    if sum(entry.is_dir() for entry in folder.iterdir()) > FEW:  # folders of classes
        return ""
    if told := name_masks(folder):
        return told
    for pattern in ("*.json", "annotations/*.json", "*/*.json", "*/ann/*.json"):
        file = next((file for file in sorted(folder.glob(pattern)) if file.is_file()), None)
        if file and (told := name_tool(file)):
            return f"has {file.relative_to(folder)}, which {told}"
    return ""


def name_masks(folder: Path) -> str:
    """Returns whose masks a folder holds and what to do, if Label Studio wrote one for each brush.

    They may be one folder deeper. "" for other files.
    """
    for pattern in ("task-*", "*/task-*"):
        for file in folder.glob(pattern):
            if BRUSH.fullmatch(file.name):
                return (
                    f"has {file.relative_to(folder)}, a mask of Label Studio's export 'Brush labels"
                    f" to {'PNG' if file.suffix == '.png' else 'NumPy'}', whose name does not tell "
                    "its image; export 'Brush labels to COCO'"
                )
    return ""
