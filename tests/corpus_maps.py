"""Panoptic json files, folders of label maps, and Roboflow's masks."""

import io
import json
from pathlib import Path

import numpy as np
from corpus import DROP, HEIGHT, WIDTH, Case, changed, label_map, load, photos, picture, write
from PIL import Image

# -- panoptic

RECORD = {
    "images": [{"id": 7, "file_name": "0.png", "height": HEIGHT, "width": WIDTH}],
    "annotations": [
        {
            "image_id": 7,
            "file_name": "m.png",
            "segments_info": [
                {"id": 5, "category_id": 1, "bbox": [0, 0, 30, 10], "area": 300, "iscrowd": 0},
                {"id": 300, "category_id": 2, "bbox": [0, 10, 30, 10], "area": 300},
            ],
        }
    ],
    "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
}
SOUND = {"kind": "panoptic", "objects": 2, "pixels": [0, 300, 300], "names": ("cat", "sky")}


def segment_map(first=(5, 0, 0), second=(44, 1, 0)) -> bytes:
    """Returns a PNG of two halves. The colour (R, G, B) is the id R + 256 G + 65536 B."""
    rows = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rows[: HEIGHT // 2], rows[HEIGHT // 2 :] = first, second
    return label_map(rows)


def read(folder: Path, content, png: bytes | None = None, maps: str = "a") -> dict:
    photos(folder / "im", "0.png")
    write(folder / "a.json", content)
    write(folder / maps / "m.png", segment_map() if png is None else png)
    return load(f"mine={folder}/a.json:{folder}/im")


def of_changes(changes: dict, **more):
    return lambda folder: read(folder, changed(RECORD, changes), **more)


def of_png(png: bytes):
    return lambda folder: read(folder, RECORD, png)


SEGMENT = "annotations.0.segments_info.1"


def segment(name: str, value, expected):
    return of_changes({f"{SEGMENT}.{name}": value}), expected


def entry(name: str, value, expected):
    return of_changes({f"annotations.0.{name}": value}), expected


def category(name: str, value, expected):
    return of_changes({f"categories.1.{name}": value}), expected


PANOPTIC = [
    ("sound", of_changes({}), SOUND),
    ("no folder of PNGs", of_changes({}, maps="b"), ("DIR/a", "unpack it there")),
    ("images missing", of_changes({"images": DROP}), "the list 'images' is missing"),
    ("categories missing", of_changes({"categories": DROP}), "list 'categories' is missing"),
    ("image null", of_changes({"images.1": None}), "an element of 'images' is None"),
    ("image without id", of_changes({"images.0.id": DROP}), "image '0.png' has no id"),
    ("image id of 2^70", of_changes({"images.0.id": 2.0**70}), "a number below 2^63 or a text"),
    ("image id a list", of_changes({"images.0.id": [7]}), "image '0.png' has the id [7]"),
    ("image twice", of_changes({"images.1": RECORD["images"][0]}), "an image comes twice"),
    ("width a text", of_changes({"images.0.width": "wide"}), "image 7 has the width 'wide'"),
    ("width null", of_changes({"images.0.width": None}), ("0.png", "DIR/a.json")),
    ("file_name null", of_changes({"images.0.file_name": None}), "image 7 has the file_name None"),
    ("file_name outside", of_changes({"images.0.file_name": "../0.png"}), "leaves the image"),
    ("entry null", of_changes({"annotations.1": None}), "element of 'annotations' is None"),
    ("no image_id", *entry("image_id", DROP, "'annotations' has no image_id")),
    ("image_id a list", *entry("image_id", [7], "'annotations' has the image_id [7]")),
    ("image_id unknown", *entry("image_id", 8, "unknown image_id 8; list it in 'images'")),
    ("no PNG's name", *entry("file_name", DROP, "image 7 has no file_name in 'annotations'")),
    ("PNG's name null", *entry("file_name", None, "image 7 has the file_name None")),
    ("PNG outside", *entry("file_name", "../m.png", "leaves the image folder")),
    ("PNG missing", *entry("file_name", "n.png", "label map DIR/a/n.png is missing")),
    ("segments_info null", *entry("segments_info", None, "image 7 has the segments_info None")),
    ("segments_info empty", *entry("segments_info", [], "has no segment to learn from")),
    ("segment null", of_changes({SEGMENT: None}), "image 7 has the segment None"),
    ("segment id 0", *segment("id", 0, "image 7 has the segment ids [5, 0]")),
    ("segment id twice", *segment("id", 5, "image 7 has the segment ids [5, 5]")),
    ("segment id too large", *segment("id", 1 << 24, "from 1 to 16777215")),
    ("segment id 1e300", *segment("id", 1e300, "image 7 has the segment")),
    ("segment id a text", *segment("id", "300", "image 7 has the segment")),
    ("segment id a list", *segment("id", [300], "image 7 has the segment")),
    ("category_id null", *segment("category_id", None, ("image 7", "category_id None"))),
    ("category_id a list", *segment("category_id", [2], ("image 7", "category_id [2]"))),
    ("category_id unknown", *segment("category_id", 3, "image 7 has the unknown category_id 3")),
    ("iscrowd 2", *segment("iscrowd", 2, "segment 300 has the iscrowd 2")),
    ("iscrowd a list", *segment("iscrowd", [1], "segment 300 has the iscrowd [1]")),
    ("area null", *segment("area", None, "segment 300 has the area None")),
    ("area 1e300", *segment("area", 1e300, ("DIR/a.json", "area 1e+300"))),
    ("bbox null", *segment("bbox", None, "segment 300 has the bbox None")),
    ("bbox of texts", *segment("bbox", ["a", 0, 1, 1], "segment 300 has the bbox ['a'")),
    ("bbox 1e300", *segment("bbox", [0, 0, 1e300, 1], "image '0.png' has the box")),
    ("no bbox", *segment("bbox", DROP, SOUND)),
    ("category null", of_changes({"categories.1": None}), "element of 'categories' is None"),
    ("no isthing", *category("isthing", DROP, "category 2 has no isthing")),
    ("isthing null", *category("isthing", None, "category 2 has the isthing None")),
    ("isthing a text", *category("isthing", "1", "category 2 has the isthing '1'")),
    ("isthing a list", *category("isthing", [1], "category 2 has the isthing [1]")),
    ("isthing true", *category("isthing", True, SOUND)),
    ("category id twice", *category("id", 1, "two categories share an id")),
    ("category id a list", *category("id", [2], "category 'sky' has the id [2]")),
    ("category name null", *category("name", None, "category 2 has the name None")),
    ("category name twice", *category("name", "cat", ("DIR/a.json", "'cat' twice"))),
    ("PNG grey", of_png(label_map([[5]])), "is a picture of mode L; a map has three channels"),
    ("PNG with alpha", of_png(label_map([[[5, 0, 0, 255]]])), "is a picture of mode RGBA"),
    ("PNG of an unknown id", of_png(segment_map((6, 0, 0))), "has the id 6 at x = 0, y = 0"),
    ("PNG with void", of_png(segment_map((0, 0, 0))), {"objects": 1, "pixels": [300, 300]}),
    ("PNG of another size", of_png(picture("png", 9, 9, (5, 0, 0))), "DIR/a/m.png has 9 x 9"),
    ("PNG empty", of_png(b""), "label map DIR/a/m.png cannot be decoded"),
    ("PNG cut off", of_png(segment_map()[:-30]), "label map DIR/a/m.png cannot be decoded"),
    ("cut off", lambda folder: read(folder, json.dumps(RECORD)[:-30]), "is not valid json"),
]

# -- label maps

MAP_SOUND = {"kind": "semantic", "labels": [0, 1], "names": ("sky", "cat")}


def maps(png: bytes | None = None, classes: str | bytes | None = "sky\ncat\n", **files: bytes):
    """Label maps in maps/ and images in im/. `files` are further ones; "__" stands for "/"."""

    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        write(folder / "maps/0.png", label_map([[0, 1]]) if png is None else png)
        if classes is not None:
            write(folder / "maps/classes.txt", classes)
        for name, data in files.items():
            path = folder / name.replace("__", "/").replace("_png", ".png")
            write(path, data) if data is not None else path.unlink()
        return load(f"mine={folder}/maps:{folder}/im")

    return attempt


def palettes(*colours: tuple[int, int, int]):
    """Maps of the value 1, which has another of the `colours` in each."""
    files = {f"im__{row}_png": picture() for row in range(len(colours))}
    for row, colour in enumerate(colours):
        image = Image.new("P", (WIDTH, HEIGHT), 1)
        image.putpalette([0, 0, 0, *colour])
        file = io.BytesIO()
        image.save(file, "png")
        files[f"maps__{row}_png"] = file.getvalue()
    return maps(**files)


def tagged(tag: int, width: int, height: int) -> bytes:
    """Returns a photograph with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = tag
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png", exif=exif)
    return file.getvalue()


def wide(*values: int):
    return label_map(np.array([values], np.uint16))


CLASSES = [f"class {row}" for row in range(300)]
BAD_VALUE = ("label map DIR/maps/0.png has the value", "which is no class")
MAPS = [
    ("sound", maps(), MAP_SOUND),
    ("of 16 bits", maps(wide(0, 1)), MAP_SOUND),
    ("void", maps(label_map([[0, 255]])), {"labels": [0], "pixels": [300, 300]}),
    ("a value too large", maps(label_map([[0, 1], [7, 7]])), (*BAD_VALUE, "value 7 at x = 2")),
    ("65535", maps(wide(0, 65535)), (*BAD_VALUE, "65535")),
    ("void alone", maps(label_map([[255]])), "have void alone"),
    ("colours", maps(label_map([[[0, 0, 0]]])), "is a picture of mode RGB"),
    ("alpha", maps(label_map([[[0, 0, 0, 1]]])), "is a picture of mode RGBA"),
    ("grey and alpha", maps(label_map([[0, 1]], "LA")), "is a picture of mode LA"),
    ("palette", maps(label_map([[0, 1]], "P")), {"kind": "semantic"}),
    ("palettes alike", palettes((9, 0, 0), (9, 0, 0)), {"labels": [1, 1]}),
    ("palettes that differ", palettes((9, 0, 0), (0, 9, 0)), {"log": "value 1 has the colour (9"}),
    (
        "image turned by 180",
        maps(im__0_png=tagged(3, WIDTH, HEIGHT)),
        {"log": "1 of 1 images look"},
    ),
    ("image turned by 90", maps(im__0_png=tagged(6, WIDTH, HEIGHT)), "turn the map with it"),
    ("map of another name", maps(maps__0_mask_png=label_map([[0]])), "name each map as its image"),
    ("numbered classes", maps(classes="0 sky\n1 cat"), {"log": "all class names begin with a n"}),
    ("one bit", maps(label_map([[0, 255]], "1")), MAP_SOUND),
    ("JPEG named .png", maps(picture("jpeg")), "DIR/maps/0.png is a picture of mode RGB"),
    ("empty", maps(b""), "label map DIR/maps/0.png cannot be decoded"),
    ("cut off", maps(label_map([[0, 1]])[:-30]), "DIR/maps/0.png cannot be decoded"),
    ("another size", maps(label_map([[0, 1]]), im__0_png=picture("png", 9, 8)), "has 20 x 30"),
    ("no image", maps(maps__1_png=label_map([[0]])), "label map DIR/maps/1.png has no image"),
    ("no map", maps(maps__0_png=None), "holds no"),
    ("image without map", maps(im__1_png=picture()), MAP_SOUND | {"log": "1 images without"}),
    ("no classes", maps(classes=None), "DIR/maps/classes.txt does not exist"),
    ("classes empty", maps(classes=""), "DIR/maps/classes.txt"),
    ("classes of blank lines", maps(classes="\n\n"), "DIR/maps/classes.txt"),
    ("class twice", maps(classes="sky\nsky"), ("DIR/maps/classes.txt", "'sky' twice")),
    ("blank line between", maps(classes="sky\n\ncat"), ("classes.txt", "an empty class name")),
    ("classes with BOM", maps(classes=b"\xef\xbb\xbfsky\r\ncat\r\n"), MAP_SOUND),
    ("classes UTF-16", maps(classes="sky\ncat".encode("utf-16")), "save it as UTF-8 text"),
    ("classes of bytes", maps(classes=b"sk\xff\ncat"), "save it as UTF-8 text"),
    ("classes with NUL", maps(classes="sky\0\ncat"), {"names": ("sky\0", "cat")}),
    ("hyphens alone", maps(classes="-\n-\n"), "DIR/maps/classes.txt"),
    ("300 classes", maps(wide(0, 299), "\n".join(CLASSES)), {"labels": [0, 299]}),
    ("40000 classes", maps(classes="\n".join(map(str, range(40_000)))), "32767 is the most"),
]

# -- Roboflow's masks


def masks(table: str | bytes = "Pixel Value, Class\n0, sky\n1, cat\n", png: bytes | None = None):
    def attempt(folder: Path) -> dict:
        photos(folder, "0.png")
        write(folder / "0_mask.png", label_map([[0, 1]]) if png is None else png)
        write(folder / "_classes.csv", table)
        return load(f"mine={folder}")

    return attempt


HEAD = "Pixel Value, Class\n"
ROBOFLOW = [
    ("sound", masks(), MAP_SOUND),
    ("no rows", masks(HEAD), "DIR/_classes.csv"),
    ("header alone in capitals", masks("PIXEL VALUE,CLASS\n0,sky\n1,cat"), MAP_SOUND),
    ("another header", masks("filename, cat\n0, sky\n"), "in no known format"),
    ("empty table", masks(""), "in no known format"),
    ("value a text", masks(HEAD + "x, sky"), "_classes.csv: line 2 is 'x, sky'"),
    ("value negative", masks(HEAD + "-1, sky"), "_classes.csv: line 2 is '-1, sky'"),
    ("value 256", masks(HEAD + "256, sky"), "_classes.csv: line 2 is '256, sky'"),
    ("value 1.0", masks(HEAD + "1.0, sky"), "_classes.csv: line 2 is '1.0, sky'"),
    ("value of 5000 digits", masks(HEAD + "1" * 5000 + ", sky"), "_classes.csv: line 2"),
    ("a superscript", masks(HEAD + "²,sky"), "_classes.csv: line 2 is '²,sky'"),
    ("one column", masks(HEAD + "0"), "_classes.csv: line 2 is '0'"),
    ("three columns", masks(HEAD + "0,sky,blue"), "_classes.csv: line 2 is '0,sky,blue'"),
    ("name empty", masks(HEAD + "0,\n1,cat"), ("_classes.csv", "an empty class name")),
    ("value twice", masks(HEAD + "0,sky\n0,cat"), ("_classes.csv", "category id '0' twice")),
    ("name twice", masks(HEAD + "0,cat\n1,cat"), ("_classes.csv", "'cat' twice")),
    ("no UTF-8", masks(HEAD.encode() + b"0,sk\xff"), "DIR/_classes.csv is not a csv file"),
    ("value without row", masks(HEAD + "0,sky"), "DIR/0_mask.png has the value 1"),
    ("mask in colours", masks(png=label_map([[[0, 0, 0]]])), "is a picture of mode RGB"),
    ("mask broken", masks(png=b"x"), "label map DIR/0_mask.png cannot be decoded"),
]
GROUPS = {"panoptic": PANOPTIC, "label maps": MAPS, "Roboflow's masks": ROBOFLOW}
CASES = [
    Case(f"{group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
