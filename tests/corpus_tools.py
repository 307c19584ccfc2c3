"""Files of other tools: VOC's xml, YOLO, labelme, CVAT, and the folders that hold them."""

import os
from pathlib import Path

from corpus import DROP, HEIGHT, WIDTH, Case, changed, load, nested, photos, write

# -- VOC

CORNERS = "<xmin>3</xmin><ymin>4</ymin><xmax>8</xmax><ymax>9</ymax>"
THING = f"<object><name>cat</name><bndbox>{CORNERS}</bndbox></object>"
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
VOC_SOUND = {"objects": 1, "box": [2, 3, 8, 9], "names": ("cat",)}


def voc(things: str = THING, size: str = SIZE, head: str = ""):
    return voc_text(f"{head}<annotation>{size}{things}</annotation>")


def voc_text(text: str | bytes):
    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        write(folder / "xml/0.xml", text)
        return load(f"mine={folder}/xml:{folder}/im")

    return attempt


def voc_of(old: str, new: str):
    return voc(THING.replace(old, new))


def voc_list(lines: str | bytes, *photographs: str):
    """A list of ids in the folders of VOC."""

    def attempt(folder: Path) -> dict:
        year = folder / "VOC2007"
        photos(year / "JPEGImages", "0.jpg", *photographs)
        photos(folder, "secret.jpg")
        for xml in (year / "Annotations/0.xml", folder / "secret.xml"):
            write(xml, f"<annotation>{SIZE}{THING}</annotation>")
        write(year / "ImageSets/Main/train.txt", lines)
        return load(f"mine={year}/ImageSets/Main/train.txt:{folder}")

    return attempt


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
NO_VOC = "DIR/xml/0.xml is no xml file of Pascal VOC's format"
VOC = [
    ("sound", voc(), VOC_SOUND),
    ("empty", voc_text(""), NO_VOC),
    ("no xml", voc_text("0 1 2 3 4"), NO_VOC),
    ("cut off", voc_text("<annotation><object>"), NO_VOC),
    ("two roots", voc_text("<annotation/><annotation/>"), NO_VOC),
    ("another root", voc_text("<annotations/>"), "it starts with <annotations>"),
    ("NUL", voc_text(b"<annotation>\0</annotation>"), NO_VOC),
    ("ampersand", voc_of("cat", "a & b"), NO_VOC),
    ("billion laughs", voc_text(LAUGHS + "<annotation>&b;</annotation>"), "it has a DOCTYPE"),
    ("external entity", voc_text(OUTSIDE + "<annotation>&a;</annotation>"), "has a DOCTYPE"),
    ("unknown encoding", voc(head='<?xml version="1.0" encoding="klingon"?>'), NO_VOC),
    ("UTF-16", voc_text(f"<annotation>{SIZE}{THING}</annotation>".encode("utf-16")), VOC_SOUND),
    ("UTF-8 BOM", voc_text(f"\ufeff<annotation>{THING}</annotation>"), VOC_SOUND),
    ("bytes of no encoding", voc_text(b"<annotation>\xff\xfe\xfd</annotation>"), NO_VOC),
    ("nested deep", voc("<part>" * 20_000 + "</part>" * 20_000), "has an object"),
    ("no object", voc(""), "none of its 1 xml files has an object"),
    ("no size", voc(size=""), VOC_SOUND),
    ("size empty", voc(size="<size><width/></size>"), VOC_SOUND),
    ("size a text", voc(size="<size><width>wide</width></size>"), NO_VOC),
    ("size NaN", voc(size="<size><width>nan</width></size>"), NO_VOC),
    ("size infinite", voc(size="<size><width>1e999</width></size>"), NO_VOC),
    ("size negative", voc(size="<size><width>-3</width></size>"), "has the size [0.0, -3.0]"),
    ("size 1e30", voc(size="<size><width>1e30</width></size>"), "has the size"),
    ("size of 9999 digits", voc(size=f"<size><width>{'9' * 9999}</width></size>"), NO_VOC),
    ("no name", voc_of("<name>cat</name>", ""), "0.xml: object 1 has no name"),
    ("name of spaces", voc_of("cat", " \n "), "0.xml: object 1 has no name"),
    ("name of two lines", voc_of("cat", "big\n  cat"), {"names": ("big cat",)}),
    ("name numbers", voc_of("cat", "7"), {"names": ("7",)}),
    ("no bndbox", voc_of("bndbox", "polygon"), "object 1 ('cat') needs a bndbox"),
    ("no xmax", voc_of("<xmax>8</xmax>", ""), "object 1 ('cat') needs a bndbox"),
    ("xmax empty", voc_of("<xmax>8</xmax>", "<xmax/>"), "object 1 ('cat') needs a bndbox"),
    ("xmax a text", voc_of("<xmax>8", "<xmax>eight"), "object 1 ('cat') needs a bndbox"),
    ("xmax with a comma", voc_of("<xmax>8", "<xmax>8,5"), "object 1 ('cat') needs a bndbox"),
    ("xmax NaN", voc_of("<xmax>8", "<xmax>nan"), "image '0.png' has the box"),
    ("xmax infinite", voc_of("<xmax>8", "<xmax>inf"), "image '0.png' has the box"),
    ("xmax 1e999", voc_of("<xmax>8", "<xmax>1e999"), "image '0.png' has the box"),
    ("corners swapped", voc_of("<xmax>8", "<xmax>1"), "image '0.png' has the box"),
    (
        "polygon",
        voc_of("</name>", "</name><polygon/>"),
        VOC_SOUND | {"log": "1 objects have a pol"},
    ),
    ("corner from 0", voc_of("<xmin>3", "<xmin>0"), VOC_SOUND | {"box": [0, 3, 8, 9]}),
    ("a point", voc_of("<xmin>3</xmin>", "<xmin>9</xmin>"), "no box to train on"),
    ("difficult", voc_of("<name>", "<difficult>1</difficult><name>"), "no box to train on"),
    ("difficult a text", voc_of("<name>", "<difficult>yes</difficult><name>"), VOC_SOUND),
    ("list", voc_list("0\n"), VOC_SOUND),
    ("list empty", voc_list("\n\n"), "DIR/VOC2007/ImageSets/Main/train.txt"),
    ("list with BOM", voc_list(b"\xef\xbb\xbf0\n"), VOC_SOUND),
    ("list of bytes", voc_list(b"\xff\xfe0"), ("train.txt cannot be read", "save it as UTF-8")),
    ("list of a missing id", voc_list("0\n1\n"), ("Annotations/1.xml", "remove it from the list")),
    ("list with NUL", voc_list("0\0\n"), ("train.txt", "'0\\x00'")),
    ("list that leaves the folder", voc_list("../../secret\n"), ("train.txt", "leaves")),
    ("list of absolute paths", voc_list("/etc/passwd\n"), ("train.txt", "leaves")),
]

# -- YOLO


def yolo(line: str | bytes = "0 0.5 0.5 0.2 0.5", table: str | bytes = "names: [cat, dog]", **more):
    """images/, labels/ and data.yaml. `more` are further files; "__" stands for "/"."""

    def attempt(folder: Path) -> dict:
        photos(folder / "images", "0.png")
        write(folder / "labels/0.txt", line)
        write(folder / "data.yaml", table)
        for name, content in more.items():
            write(folder / name.replace("__", "/").replace("_txt", ".txt"), content)
        return load(f"mine={folder}")

    return attempt


def class_list(text: str, name: str = "classes.txt"):
    """images/, labels/ of the class 0, and a list of classes."""

    def attempt(folder: Path) -> dict:
        photos(folder / "images", "0.png")
        write(folder / "labels/0.txt", "0 0.5 0.5 0.2 0.5")
        write(folder / name, text)
        return load(f"mine={folder}")

    return attempt


def pair(image: str, label: str, *others: str):
    """images/ and labels/ with one name each, and further images."""

    def attempt(folder: Path) -> dict:
        photos(folder / "images", image, *others)
        write(folder / "labels" / label, "0 0.5 0.5 0.2 0.5")
        write(folder / "classes.txt", "cat\ndog\n")
        return load(f"mine={folder}")

    return attempt


def bomb(place: str) -> str:
    """Returns yaml whose aliases stand for 10 ** 9 texts."""
    lines = ["a0: &a0 lol"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]")
    return "\n".join([*lines, place])


AT = "DIR/labels/0.txt: line 1 "
YOLO_SOUND = {"objects": 1, "box": [12, 5, 18, 15], "names": ("cat", "dog")}
IMAGE = YOLO_SOUND | {"images": 1}
OUTLINE = "0.2 0.2 0.6 0.2 0.6 0.6"
BODY = "0.5 0.5 0.4 0.6"
NAMES = "names: [cat, dog]\n"
YOLO = [
    ("sound", yolo(), YOLO_SOUND),
    ("empty label file", yolo(""), "has no box to learn from"),
    (
        "four corners",
        yolo(f"0 {OUTLINE} 0.2 0.4"),
        {"kind": "instances", "log": "as turned boxes have"},
    ),
    (
        "three corners",
        yolo(f"0 {OUTLINE}"),
        {"kind": "instances", "log": "has 3 corners, as a box"},
    ),
    ("five corners", yolo(f"0 {OUTLINE} 0.2 0.4 0.2 0.3"), {"kind": "instances"}),
    (
        "five corners twice",
        yolo(f"0 {OUTLINE} 0.2 0.4 0.2 0.3\n" * 2),
        {
            "kind": "instances",
            "log": "has 5 corners, as a box has that is followed by 3 key points",
        },
    ),
    (
        "a pose of x y v",
        yolo(f"0 {BODY} 0.4 0.4 2 0.6 0.6 0"),
        AT + "looks like a pose, a box and 2",
    ),
    ("a pose of 0 and 1", yolo(f"0 {BODY} 0.4 0.4 1"), AT + "looks like a pose, a box and 1"),
    (
        "poses of x y v",
        yolo(f"0 {BODY} 0.4 0.4 1 0 0 0\n" * 3),
        "DIR/labels: 3 lines look like poses",
    ),
    ("poses of x y", yolo(f"0 {BODY} 0.4 0.4 0.6 0.3\n" * 3), "write kpt_shape: [2, 2] beside"),
    ("turned boxes", yolo("0 0.5 0.5 0.6 0.5 0.6 0.6 0.5 0.6\n" * 3), {"kind": "instances"}),
    (
        "poses that are outlines",
        yolo(f"0 {BODY} 0.4 0.4 0.6 0.3\n" * 3, "names: [cat, dog]\nkpt_shape: [0, 0]"),
        {"kind": "instances"},
    ),
    ("list with an empty line", class_list("cat\n\ndog"), "DIR/classes.txt: line 2 is empty"),
    ("list with empty lines at its end", class_list("cat\ndog\n \n\n"), YOLO_SOUND),
    (
        "list with numbers",
        class_list("0: cat\n1: dog"),
        {"log": "all class names begin with a num"},
    ),
    ("names that begin with numbers", class_list("2CV\n4 wheels"), {"names": ("2CV", "4 wheels")}),
    ("umlaut in two forms", pair("u\u0308 #1 9%.png", "\u00fc #1 9%.txt"), YOLO_SOUND),
    ("jfif", pair("0.jfif", "0.txt"), YOLO_SOUND),
    ("folder of Jupyter", pair("0.png", "0.txt", ".ipynb_checkpoints/0-checkpoint.png"), IMAGE),
    ("folder of a NAS", pair("0.png", "0.txt", "@eaDir/0.png/THUMB.png"), IMAGE),
    ("HEIC beside", pair("0.png", "0.txt", "1.HEIC"), IMAGE | {"log": "1 photographs .HEIC in"}),
    ("class unknown", yolo("2 0.5 0.5 0.2 0.5"), AT + "has the class 2"),
    ("class negative", yolo("-1 0.5 0.5 0.2 0.5"), AT + "has the class -1"),
    ("class 0.5", yolo("0.5 0.5 0.5 0.2 0.5"), AT + "has the class 0.5"),
    ("class 1.0", yolo("1.0 0.5 0.5 0.2 0.5"), {"labels": [1]}),
    ("class NaN", yolo("nan 0.5 0.5 0.2 0.5"), AT + "has the class nan"),
    ("class infinite", yolo("inf 0.5 0.5 0.2 0.5"), AT + "has the class inf"),
    ("class a name", yolo("cat 0.5 0.5 0.2 0.5"), AT + "is 'cat"),
    ("pixels", yolo("0 15 10 6 10"), AT + "has the coordinate 15, which looks like pixels"),
    ("1e999", yolo("0 0.5 1e999 0.2 0.5"), AT + "has the coordinate inf"),
    ("NaN", yolo("0 0.5 nan 0.2 0.5"), AT + "has the coordinate nan"),
    ("negative width", yolo("0 0.5 0.5 -0.2 0.5"), AT + "has the coordinate -0.2"),
    ("width of -0.005", yolo("0 0.5 0.5 -0.005 0.5"), ("DIR/labels", "negative size")),
    ("width 0", yolo("0 0.5 0.5 0 0.5"), "no box to train on"),
    ("commas", yolo("0,0.5,0.5,0.2,0.5"), AT + "is '0,0.5"),
    ("decimal commas", yolo("0 0,5 0,5 0,2 0,5"), AT + "is '0 0,5"),
    ("four columns", yolo("0 0.5 0.5 0.2"), AT + "has 4 columns"),
    ("six columns", yolo("0 0.5 0.5 0.2 0.5 0.9"), AT + "has 6 columns"),
    ("a class alone", yolo("0"), AT + "has 1 columns"),
    ("no UTF-8", yolo(b"0 0.5 \xff"), "DIR/labels/0.txt cannot be read"),
    ("NUL", yolo(b"0 0.5 0.5 0.2 0.5\0"), AT + "is '0 0.5"),
    ("one line of 1 MB", yolo("0 " * 500_000), AT + "has 500000 columns"),
    ("number of 9999 digits", yolo(f"{'9' * 9999} 0.5 0.5 0.2 0.5"), AT + "has the class inf"),
    ("blank lines and CRLF", yolo("\r\n\r\n0 0.5 0.5 0.2 0.5\r\n"), YOLO_SOUND),
    ("no data.yaml's names", yolo(table="nc: 2\n"), "there is no data.yaml with names:"),
    ("data.yaml empty", yolo(table=""), "DIR/data.yaml holds no fields"),
    ("data.yaml a list", yolo(table="[cat]"), "DIR/data.yaml holds no fields"),
    ("data.yaml no yaml", yolo(table="names: [cat"), "DIR/data.yaml is not valid yaml"),
    ("data.yaml with tabs", yolo(table="names:\n\t- cat"), "DIR/data.yaml is not valid yaml"),
    ("data.yaml no UTF-8", yolo(table=b"names: [c\xff]"), "DIR/data.yaml cannot be read"),
    ("data.yaml nested deep", yolo(table="names: " + nested(5000)), "DIR/data.yaml"),
    ("yaml tag", yolo(table="names: !!python/object/apply:os.system [id]"), {"names": ("id",)}),
    ("yaml key a list", yolo(table="names: {[a]: b}"), "DIR/data.yaml is not valid yaml"),
    ("names a text", yolo(table="names: cat"), "names: is no list of names"),
    ("names of lists", yolo(table="names: [[cat], dog]"), "names: is no list of names"),
    ("names from 1", yolo(table="names: {1: cat, 2: dog}"), "count from 0"),
    ("names with a gap", yolo(table="names: {0: cat, 2: dog}"), "count from 0"),
    ("names empty text", yolo(table="names: ['', dog]"), ("data.yaml", "an empty class name")),
    ("names twice", yolo(table="names: [cat, cat]"), ("data.yaml", "'cat' twice")),
    ("names null", yolo(table="names: [cat, null]"), {"names": ("cat", "null")}),
    ("nc another", yolo(table=NAMES + "nc: 3"), "nc: is 3, but names: has 2"),
    ("nc a list", yolo(table=NAMES + "nc: [2]"), ("data.yaml", "nc: is")),
    ("kpt_shape a number", yolo(table=NAMES + "kpt_shape: 3"), "kpt_shape: is 3"),
    ("kpt_shape texts", yolo(table=NAMES + "kpt_shape: [a, b]"), "kpt_shape: is ['a', 'b']"),
    ("kpt_shape negative", yolo(table=NAMES + "kpt_shape: [-17, 3]"), "kpt_shape: is"),
    ("kpt_shape an object", yolo(table=NAMES + "kpt_shape: {a: b}"), "kpt_shape: is"),
    ("train a number", yolo(table=NAMES + "train: 5"), YOLO_SOUND),
    ("train nested", yolo(table=NAMES + "train: [[images]]"), ("data.yaml", "train:")),
    ("train an object", yolo(table=NAMES + "train: {a: {b: c}}"), ("data.yaml", "train:")),
    ("train a list file", yolo(table=NAMES + "train: t.txt", t_txt="images/0.png"), YOLO_SOUND),
    ("train lists a gap", yolo(table=NAMES + "train: t.txt", t_txt="x/1.png"), "label file"),
    ("path a list", yolo(table=NAMES + "path: [a]"), ("data.yaml", "path:")),
    ("path of another machine", yolo(table=NAMES + "path: /content/data"), YOLO_SOUND),
    ("bomb in names", yolo(table=bomb("names: *a9")), "names: is no list of names"),
    ("bomb in nc", yolo(table=bomb(NAMES + "nc: *a9")), ("data.yaml", "nc:")),
    ("bomb in kpt_shape", yolo(table=bomb(NAMES + "kpt_shape: *a9")), "kpt_shape:"),
    ("bomb in path", yolo(table=bomb(NAMES + "path: *a9")), ("data.yaml", "path:")),
    ("bomb in train", yolo(table=bomb(NAMES + "train: *a9")), ("data.yaml", "train:")),
    ("a list that holds itself", yolo(table=NAMES + "nc: &a [*a]"), ("data.yaml", "nc:")),
]

# -- labelme

SHAPE = {"label": "cat", "points": [[2, 3], [8, 9]], "shape_type": "rectangle"}
LABELME = {
    "imagePath": "0.png",
    "imageHeight": HEIGHT,
    "imageWidth": WIDTH,
    "shapes": [SHAPE, SHAPE | {"label": "dog"}],
}
LABELME_SOUND = {"objects": 2, "box": [2, 3, 8, 9], "names": ("cat", "dog")}


def labelme(changes: dict):
    return labelme_text(changed(LABELME, changes))


def labelme_text(content):
    def attempt(folder: Path) -> dict:
        photos(folder, "0.png", "1.png")
        write(folder / "0.json", LABELME)
        write(folder / "1.json", content)
        return load(f"mine={folder}/")

    return attempt


def shape(name: str, value, expected):
    return labelme({f"shapes.1.{name}": value}), expected


IN = "DIR/1.json: shape 2"
SQUARES = [[[2, 3], [6, 3], [6, 7], [2, 7]], [[10, 3], [14, 3], [14, 7], [10, 7]]]


def groups(*fields: dict):
    """Two squares in one file; `fields` are further fields of each."""
    shapes = [
        {"label": "cat", "points": points, "shape_type": "polygon"} | more
        for points, more in zip(SQUARES, fields)
    ]

    def attempt(folder: Path) -> dict:
        photos(folder, "0.png")
        write(folder / "0.json", LABELME | {"shapes": shapes})
        return load(f"mine={folder}/")

    return attempt


ONE = {"objects": 1, "box": [2, 3, 14, 7], "pixels": [32], "log": "1 outlines are parts of others"}
TWO = {"objects": 2, "pixels": [16, 16]}
LABELMES = [
    ("sound", labelme({}), {"objects": 4, "names": ("cat", "dog")}),
    ("empty file", labelme_text(""), "DIR/1.json is not valid json"),
    ("cut off", labelme_text('{"shapes": ['), "DIR/1.json is not valid json"),
    ("a list", labelme_text([]), "DIR/1.json has no list 'shapes'"),
    ("nested deep", labelme_text(nested()), "DIR/1.json is not valid json"),
    ("no shapes", labelme({"shapes": DROP}), "DIR/1.json has no list 'shapes'"),
    ("shapes null", labelme({"shapes": None}), "DIR/1.json has no list 'shapes'"),
    ("shapes empty", labelme({"shapes": []}), {"objects": 2}),
    ("shape null", labelme({"shapes.1": None}), IN + " needs a label and a list of points"),
    ("shape a list", labelme({"shapes.1": [1]}), IN + " needs a label and a list of points"),
    ("no label", *shape("label", DROP, IN + " needs a label")),
    ("label null", *shape("label", None, IN + " needs a label")),
    ("label a list", *shape("label", ["dog"], IN + " needs a label")),
    ("label empty", *shape("label", " ", IN + " has no label")),
    ("label a number", *shape("label", 5, {"names": ("5", "cat", "dog")})),
    ("no points", *shape("points", DROP, IN + " needs a label and a list of points")),
    ("points null", *shape("points", None, IN + " needs a label and a list of points")),
    ("points a text", *shape("points", "2 3", IN + " needs a label and a list of points")),
    ("points with null", *shape("points", [[2, None], [8, 9]], ("DIR/1.json", "shape 2"))),
    ("points of threes", *shape("points", [[1, 2, 3]] * 2, {"objects": 4})),
    ("points uneven", *shape("points", [[1, 2], [3]], IN + " needs")),
    ("points 1e300", *shape("points", [[1, 2], [1e300, 3]], "image '0.png' has the box")),
    ("points of texts", *shape("points", [["x", "y"]], IN + " needs")),
    ("one point", *shape("points", [[1, 2]], {"objects": 3, "log": "1 rectangle of 1 points"})),
    ("no point", *shape("points", [], {"objects": 3, "log": "1 rectangle of 0 points"})),
    ("type unknown", *shape("shape_type", "star", {"objects": 3, "log": "1 star"})),
    ("type a list", *shape("shape_type", ["polygon"], IN)),
    ("type a number", *shape("shape_type", 5, IN)),
    ("type null", *shape("shape_type", None, {"log": "1 polygon of 2 points"})),
    ("height a text", labelme({"imageHeight": "high"}), ("DIR/1.json", "imageHeight", "'high'")),
    ("height a list", labelme({"imageHeight": [20]}), ("DIR/1.json", "imageHeight", "[20]")),
    ("height negative", labelme({"imageHeight": -20}), ("DIR/1.json", "imageHeight", "-20")),
    ("height null", labelme({"imageHeight": None}), {"objects": 4}),
    ("height 1e300", labelme({"imageHeight": 1e300}), ("DIR/1.json", "imageHeight", "1e+300")),
    ("imagePath missing", labelme({"imagePath": DROP}), {"objects": 4}),
    ("imagePath a list", labelme({"imagePath": ["a"]}), {"objects": 4}),
    ("one group", groups({"group_id": 3}, {"group_id": 3}), ONE),
    ("group 0", groups({"group_id": 0}, {"group_id": 0}), ONE),
    ("two groups", groups({"group_id": 3}, {"group_id": 4}), TWO),
    ("no group", groups({"group_id": None}, {"group_id": None}), TWO),
    ("one group of two labels", groups({"group_id": 3}, {"group_id": 3, "label": "dog"}), TWO),
    ("group a list", groups({"group_id": [3]}, {"group_id": [3]}), TWO),
    ("imagePath outside", labelme({"imagePath": "../../../etc/passwd"}), {"objects": 4}),
]

# -- CVAT

CVAT_LABELS = "<meta><job><labels><label><name>cat</name></label></labels></job></meta>"
CVAT_BOX = '<box label="cat" xtl="2" ytl="3" xbr="8" ybr="9"/>'
CVAT_IMAGE = f'name="0.png" width="{WIDTH}" height="{HEIGHT}"'
CVAT_MASK = '<mask label="cat" rle="1, 2, 3" left="3" top="4" width="3" height="2"/>'
CVAT_POLYGON = '<polygon label="cat" points="2,3;8,3;8,9;2,9"/>'
CVAT_OVAL = '<ellipse label="cat" cx="10" cy="10" rx="4" ry="2"/>'
CVAT_SOUND = {"objects": 1, "box": [2, 3, 8, 9], "names": ("cat",)}


def cvat(shapes: str = CVAT_BOX, image: str = CVAT_IMAGE, meta: str = CVAT_LABELS, head: str = ""):
    body = f"<image {image}>{shapes}</image>"
    return cvat_text(f"{head}<annotations>{meta}{body}</annotations>")


def cvat_text(text: str | bytes):
    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        write(folder / "a.xml", text)
        return load(f"mine={folder}/a.xml:{folder}/im")

    return attempt


def box_of(old: str, new: str):
    return cvat(CVAT_BOX.replace(old, new))


def mask_of(old: str, new: str):
    return cvat(CVAT_MASK.replace(old, new))


def polygon(points: str):
    return cvat(f'<polygon label="cat" points="{points}"/>')


def image_of(old: str, new: str):
    return cvat(image=CVAT_IMAGE.replace(old, new))


NO_CVAT = "DIR/a.xml is no xml file of 'CVAT for images 1.1'"
ON = "DIR/a.xml: image '0.png' has a"
CVAT = [
    ("sound", cvat(), CVAT_SOUND),
    ("empty", cvat_text(""), NO_CVAT),
    ("cut off", cvat_text("<annotations><image"), NO_CVAT),
    ("another root", cvat_text("<annotation/>"), "it starts with <annotation>"),
    ("no image", cvat_text("<annotations></annotations>"), "has no label and no box"),
    ("DOCTYPE", cvat(head=LAUGHS), "it has a DOCTYPE"),
    ("unknown encoding", cvat(head='<?xml version="1.0" encoding="klingon"?>'), NO_CVAT),
    ("nested deep", cvat("<a>" * 20_000 + "</a>" * 20_000), "has no box to learn from"),
    ("image without name", image_of('name="0.png"', ""), ("DIR/a.xml", "image", "name")),
    ("image name empty", image_of("0.png", ""), "file_name '' (0 letters)"),
    ("image outside", image_of("0.png", "../0.png"), "leaves the image folder"),
    ("image missing", image_of("0.png", "1.png"), "DIR/im/1.png is missing"),
    ("no width", image_of(f'width="{WIDTH}"', ""), CVAT_SOUND),
    ("width a text", image_of(f'"{WIDTH}"', '"wide"'), ("DIR/a.xml", "'0.png'", "width 'wide'")),
    ("width 30.0", image_of(f'"{WIDTH}"', '"30.0"'), ("DIR/a.xml", "'0.png'", "width '30.0'")),
    ("width negative", image_of(f'"{WIDTH}"', '"-5"'), ("DIR/a.xml", "'0.png'", "-5")),
    ("width of 9999 digits", image_of(f'"{WIDTH}"', f'"{"9" * 9999}"'), ("'0.png'", "width '999")),
    ("no label", box_of('label="cat"', ""), ON + " box without a label"),
    ("label empty", box_of("cat", " "), ON + " box without a label"),
    ("label not listed", box_of("cat", "dog"), {"names": ("cat", "dog")}),
    ("no corner", box_of('xbr="8"', ""), ON + " box of 'cat' with no 'xbr'"),
    ("corner a text", box_of('"8"', '"eight"'), ON + " box of 'cat' with could not convert"),
    ("corner NaN", box_of('"8"', '"nan"'), "image '0.png' has the box"),
    ("corners swapped", box_of('"8"', '"1"'), "image '0.png' has the box"),
    ("corner 1e999", box_of('"8"', '"1e999"'), "image '0.png' has the box"),
    ("rotation a text", box_of("/>", ' rotation="x"/>'), ON + " box of 'cat' with could not"),
    ("rotation NaN", box_of("/>", ' rotation="nan"/>'), "image '0.png' has the box"),
    ("rotation infinite", box_of("/>", ' rotation="inf"/>'), "image '0.png' has the box"),
    ("polygon", cvat(CVAT_POLYGON), {"pixels": [36]}),
    ("polygon empty", polygon(""), ON + " polygon of 'cat' with"),
    ("polygon of two points", polygon("1,1;2,2"), "fewer than three corners"),
    ("polygon of texts", polygon("a,b;c,d;e,f"), ON + " polygon of 'cat' with"),
    ("polygon uneven", polygon("1,1;2;3,3"), ON + " polygon of 'cat' with"),
    ("polygon NaN", polygon("1,1;nan,2;3,3"), "image '0.png' has the box"),
    ("ellipse", cvat(CVAT_OVAL), {"objects": 1, "box": [6, 8, 14, 12]}),
    ("ellipse without rx", cvat(CVAT_OVAL.replace("rx", "r")), "ellipse of 'cat' with no 'rx'"),
    ("mask", cvat(CVAT_MASK), {"pixels": [2]}),
    ("mask without rle", mask_of("rle", "runs"), ON + " mask of 'cat' with no 'rle'"),
    ("mask rle empty", mask_of("1, 2, 3", ""), ON + " mask of 'cat' with"),
    ("mask rle of texts", mask_of("1, 2, 3", "a, b"), ON + " mask of 'cat' with"),
    ("mask rle too short", mask_of("1, 2, 3", "1, 2"), "runs that do not fill its box"),
    ("mask rle negative", mask_of("1, 2, 3", "-1, 4, 3"), ON + " mask of 'cat' with"),
    ("mask rle wraps", mask_of("1, 2, 3", f"{2**63 - 1}, {2**63 - 1}, 8"), ON + " mask of 'cat'"),
    ("mask rle of 2**70", mask_of("1, 2, 3", str(2**70)), ON + " mask of 'cat' with"),
    ("mask outside", mask_of('left="3"', 'left="29"'), "a box that leaves the image"),
    ("mask left negative", mask_of('left="3"', 'left="-3"'), "a box that leaves the image"),
    ("mask width negative", mask_of('width="3"', 'width="-3"'), ON + " mask of 'cat' with"),
    ("mask left 3.5", mask_of('left="3"', 'left="3.5"'), ON + " mask of 'cat' with"),
    ("mask and no size", cvat(CVAT_MASK, 'name="0.png"'), "a box that leaves the image"),
    (
        "mask and a huge size",
        cvat(CVAT_MASK, 'name="0.png" width="2000000000" height="2000000000"'),
        ("DIR/a.xml", "'0.png'"),
    ),
]


# -- which format


def folder_of(*files: str, pipe: str = ""):
    """A folder with files, and a pipe, whose reading never ends."""

    def attempt(folder: Path) -> dict:
        for file in files:
            write(folder / "data" / file, "")
        (folder / "data").mkdir(exist_ok=True)
        if pipe:
            os.mkfifo(folder / "data" / pipe)
        return load(f"mine={folder}/data")

    return attempt


def brush():
    """A mask of Label Studio in maps/, with a list of classes, and a folder of images."""

    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        photos(folder / "maps", BRUSH)
        write(folder / "maps/classes.txt", "background\ncat")
        return load(f"mine={folder}/maps:{folder}/im")

    return attempt


UNKNOWN = "in no known format"
BRUSH = "task-3-annotation-12-by-1-tag-traffic light-0.png"
FORMATS = [
    ("nothing", folder_of(), ("DIR/data holds nothing", UNKNOWN)),
    ("a text file", folder_of("a.txt"), ("DIR/data holds 1 txt files", UNKNOWN)),
    ("brush masks", folder_of(BRUSH), (f"DIR/data has {BRUSH}, a mask of Lab", "labels to COCO'")),
    ("brush arrays", folder_of("a.png", "m/" + BRUSH.replace("png", "npy")), "labels to NumPy'"),
    ("brush masks as maps", brush(), (f"DIR/maps has {BRUSH}, a mask", "does not tell its image")),
    ("an image", folder_of("a.png"), ("DIR/data holds 1 images", UNKNOWN)),
    ("a json file", folder_of("a.json"), "DIR/data/a.json:IMAGES/"),
    ("an xml file", folder_of("a.xml"), ("DIR/data", "a.xml")),
    ("folders without images", folder_of("cat/a.txt", "dog/b.txt"), UNKNOWN),
    ("a pipe .xml", folder_of(pipe="a.xml"), ("DIR/data", "pipe")),
    ("a pipe .yaml", folder_of("images/0.png", "labels/0.txt", pipe="a.yaml"), ("DIR", "yaml")),
    ("a pipe data.yaml", folder_of("images/0.png", "labels/0.txt", pipe="data.yaml"), "pipe"),
    ("a pipe .json", folder_of(pipe="a.json"), UNKNOWN),
    ("a pipe .txt", folder_of("images/0.png", "labels/1.txt", pipe="classes.txt"), "DIR/data"),
]

# -- json files of tools that are not read

RECT = {"shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}}
VIA = {"0.png12": {"filename": "0.png", "size": 12, "regions": [RECT], "file_attributes": {}}}
RESULT = {"type": "rectanglelabels", "value": {"rectanglelabels": ["cat"], "x": 1, "y": 2}}
STUDIO = [{"data": {"image": "/data/upload/0.png"}, "annotations": [{"result": [RESULT]}]}]
SUPERVISELY = {"size": {"height": HEIGHT, "width": WIDTH}, "objects": [{"classTitle": "cat"}]}
DARWIN = {"version": "2.0", "item": {"name": "0.png", "slots": []}, "annotations": []}
DATUMARO = {"info": {}, "categories": {"label": {"labels": []}}, "items": []}
CREATE_ML = [{"image": "0.png", "annotations": [{"label": "cat", "coordinates": {"x": 1}}]}]
FIFTY_ONE = {"classes": ["cat"], "labels": {"0": [{"label": 0, "bounding_box": [0, 0, 1, 1]}]}}
SCORES = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]


def tool(content, kind: str = "file"):
    """A json file with a folder of images; as a file, as a folder of such files, or the whole."""
    names = {"file": "ann/0.json:DIR/im", "folder": "ann:DIR/im", "whole": ""}

    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        write(folder / "ann/0.json", content)
        return load(f"mine={folder}/{names[kind].replace('DIR', str(folder))}")

    return attempt


FILE = "DIR/ann/0.json is a json file of "
TOOLS = [
    (
        "VIA",
        tool(VIA),
        f"{FILE}VIA (the VGG Image Annotator), which is not read; export it as COCO",
    ),
    ("a project of VIA", tool({"_via_settings": {}, "_via_img_metadata": VIA}), f"{FILE}VIA"),
    ("Label Studio", tool(STUDIO), f"{FILE}Label Studio, which is not read; export it as COCO"),
    ("Label Studio's folder", tool(STUDIO, "whole"), "DIR has ann/0.json, which is a json file"),
    ("Supervisely", tool(SUPERVISELY), f"{FILE}Supervisely"),
    ("Supervisely's folders", tool(SUPERVISELY, "folder"), f"{FILE}Supervisely"),
    ("Darwin's folders", tool(DARWIN, "folder"), f"{FILE}Darwin (V7)"),
    ("Darwin's folder", tool(DARWIN, "whole"), "json file of Darwin (V7), which is not read"),
    ("Datumaro", tool(DATUMARO), f"{FILE}Datumaro, which is not read; convert it: datum convert"),
    ("CreateML", tool(CREATE_ML), f"{FILE}CreateML"),
    (
        "FiftyOne",
        tool(FIFTY_ONE),
        f"{FILE}FiftyOne, which is not read; export it as fiftyone.types",
    ),
    ("predictions", tool(SCORES), f"{FILE}a detector's predictions"),
    ("one file of labelme", tool(LABELME), f"{FILE}labelme, which is not read; name the folder"),
    ("no tool", tool({"a": 1}), "DIR/ann/0.json: the list 'images' is missing"),
]


def beside(name: str, content, *images: str):
    """A folder of images and a file beside them."""

    def attempt(folder: Path) -> dict:
        photos(folder, *images)
        write(folder / name, content)
        return load(f"mine={folder}")

    return attempt


def in_folder(name: str, whole: bool):
    """VOC's files in a folder of that name, which is given once, or as annotations and images."""

    def attempt(folder: Path) -> dict:
        place = folder / name
        photos(place, "0.png")
        write(
            place / ("0.xml" if whole else "xml/0.xml"), f"<annotation>{SIZE}{THING}</annotation>"
        )
        return load(f"mine={place}" if whole else f"mine={place}/xml:{place}")

    return attempt


COLOURS = "DIR has label maps in the colours of label"
FORMATS += [
    ("a time", in_folder("12:30", True), VOC_SOUND),
    ("a time for each path", in_folder("a 12:30 50% #1", False), VOC_SOUND),
    ("images and a json", beside("a.json", {"images": []}, "photos/0.png"), "mine=DIR/a.json:IMAG"),
    (
        "classes and a json",
        beside("a.json", {}, "cat/0.png", "dog/0.png"),
        {"names": ("cat", "dog")},
    ),
    (
        "CVAT's CamVid",
        beside("label_colors.txt", "", "default/0.png", "defaultannot/0.png"),
        COLOURS,
    ),
    ("CVAT's masks", beside("labelmap.txt", "", "SegmentationClass/0.png"), COLOURS),
    (
        "classes",
        beside("a.txt", "", "a/0.png", "b/0.png"),
        {"log": "names of its folders, 'a', 'b'"},
    ),
]
GROUPS = {
    "VOC": VOC,
    "YOLO": YOLO,
    "labelme": LABELMES,
    "CVAT": CVAT,
    "a folder of": FORMATS,
    "another tool": TOOLS,
}
CASES = [
    Case(f"{group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
