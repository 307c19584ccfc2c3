"""COCO json files: structure, ids, boxes, categories, masks, encodings, file names."""

import json
from pathlib import Path

from corpus import DROP, HEIGHT, WIDTH, Case, changed, load, nested, photos, write

SQUARE = [2, 2, 8, 2, 8, 8, 2, 8]  # 36 pixels
RLE = {"size": [HEIGHT, WIDTH], "counts": [40, 5, 555]}  # 5 pixels
RECORD = {
    "images": [{"id": 7, "file_name": "0.png", "height": HEIGHT, "width": WIDTH}],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 1, "bbox": [1, 1, 4, 4]},
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [2, 3, 6, 5]},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
SOUND = {"objects": 2, "box": [2, 3, 8, 8], "labels": [0, 1], "names": ("cat", "dog")}
LABELS = {"images.0.pos_category_ids": [2], "annotations": DROP}


def read(folder: Path, content, images: str = "im") -> dict:
    photos(folder / "im", "0.png")
    write(folder / "a.json", content)
    return load(f"mine={folder}/a.json:{folder}/{images}")


def of_changes(changes: dict):
    return lambda folder: read(folder, changed(RECORD, changes))


def of_text(text: str | bytes):
    return lambda folder: read(folder, text)


def of_edit(old: str, new: str):
    """An edit of the file's text, for what json cannot express."""
    return of_text(json.dumps(RECORD).replace(old, new, 1))


HUGE = "has the id 1.1805916207174113e+21; "  # json readers make a float of 2^70
ONE_OF_0 = "DIR/a.json: 1 images have the height or width 0, which is taken as unknown"
WHOLE = json.dumps(RECORD)
STRUCTURE = [
    ("sound", of_changes({}), SOUND),
    ("empty file", of_text(""), "DIR/a.json"),
    ("white space", of_text(" \n "), "DIR/a.json"),
    ("null", of_text("null"), "a COCO-format json object is needed"),
    ("a list", of_text("[1, 2]"), "holds a json list"),
    ("a number", of_text("5"), "holds a json int"),
    ("a text", of_text('"images"'), "holds a json str"),
    ("an empty object", of_text("{}"), "the list 'images' is missing"),
    ("cut off", of_text(WHOLE[:-40]), "is not valid json"),
    ("cut off in a text", of_text(WHOLE[: WHOLE.index("cat") + 1]), "is not valid json"),
    ("cut off at the end", of_text(WHOLE[:-1]), "is not valid json"),
    ("text after the end", of_text(WHOLE + "}"), "unexpected content after document"),
    ("two documents", of_text(WHOLE + WHOLE), "unexpected content after document"),
    ("trailing comma", of_edit('"dog"}]', '"dog"},]'), "is not valid json"),
    ("comment", of_text("// boxes\n" + WHOLE), "is not valid json"),
    ("single quotes", of_text(WHOLE.replace('"', "'")), "is not valid json"),
    ("field twice", of_edit('"images":', '"annotations": [], "images":'), "comes twice"),
    ("NUL bytes", of_text(b"\0" * 300), "DIR/a.json"),
    ("a zip file", of_text(b"PK\x03\x04" + bytes(range(256))), "DIR/a.json"),
    ("gzip", of_text(b"\x1f\x8b\x08\0" + bytes(99)), "DIR/a.json"),
    ("an HTML page", of_text("<!DOCTYPE html><html></html>"), "is not valid json"),
    ("a git-lfs pointer", of_text("version https://git-lfs.github.com/spec/v1\n"), "not valid"),
    ("nested 100,000 deep", of_text(nested()), "DIR/a.json"),
    ("a list nested deep", of_text('{"images": ' + nested() + "}"), "is not valid json"),
    ("other field nested deep", of_text('{"info": ' + nested() + "}"), "is not valid json"),
    ("an element nested deep", of_edit("[1, 1, 4, 4]", nested()), "is not valid json"),
    ("an image id of 2^70", of_edit(': 7, "file', f': {2**70}, "file'), f"image '0.png' {HUGE}"),
    ("a category id of 2^70", of_edit('"id": 1, "na', f'"id": {2**70}, "na'), f"'cat' {HUGE}"),
    ("a height of 0", of_changes({"images.0.height": 0}), SOUND | {"log": ONE_OF_0}),
    ("no height", of_changes({"images.0.height": DROP}), SOUND),
    ("images null", of_changes({"images": None}), "the list 'images' is missing"),
    ("images an object", of_changes({"images": {"7": {}}}), "the list 'images' is missing"),
    ("images empty", of_changes({"images": []}), "unknown image_id 7"),
    ("all lists empty", of_text('{"images":[],"annotations":[],"categories":[]}'), "DIR/a.json"),
    ("no annotations", of_changes({"annotations": DROP}), "list 'annotations' is missing"),
    ("annotations empty", of_changes({"annotations": []}), "has no box to learn from"),
    ("annotations text", of_changes({"annotations": "none"}), "list 'annotations' is missing"),
    ("no categories", of_changes({"categories": DROP}), "list 'categories' is missing"),
    ("an image that is null", of_changes({"images.1": None}), "an element of 'images' is None"),
    ("an image that is a list", of_changes({"images.1": [7]}), "an element of 'images' is [7]"),
    ("annotation null", of_changes({"annotations.1": None}), "element of 'annotations' is None"),
    ("annotation number", of_changes({"annotations.1": 3}), "element of 'annotations' is 3"),
    ("category null", of_changes({"categories.1": None}), "element of 'categories' is None"),
    ("unknown fields", of_changes({"info": {"a": [1]}, "licenses": 5, "x": None}), SOUND),
]
IDS = [
    ("image without id", of_changes({"images.0.id": DROP}), "image '0.png' has no id"),
    ("image id null", of_changes({"images.0.id": None}), "image '0.png' has the id None"),
    ("image id a list", of_changes({"images.0.id": [7]}), "image '0.png' has the id [7]"),
    ("image id an object", of_changes({"images.0.id": {"a": 7}}), "image '0.png' has the id {"),
    ("image id twice", of_changes({"images.1": RECORD["images"][0]}), "two images share an id"),
    ("image id 7.0", of_changes({"images.0.id": 7.0}), SOUND),
    ("image id '7'", of_changes({"images.0.id": "7"}), SOUND),
    ("image id huge", of_changes({"images.0.id": 1e300}), "the id 1e+300; give each image"),
    ("image id negative", of_changes({"images.0.id": -7}), "unknown image_id 7"),
    ("no image_id", of_changes({"annotations.1.image_id": DROP}), "annotation 1 has no image_id"),
    ("image_id null", of_changes({"annotations.1.image_id": None}), "annotation 1 has the unknown"),
    ("image_id a list", of_changes({"annotations.1.image_id": [7]}), "annotation 1 has the image"),
    ("image_id unknown", of_changes({"annotations.1.image_id": 8}), "unknown image_id 8"),
    ("image_id ' 7'", of_changes({"annotations.1.image_id": " 7"}), "unknown image_id ' 7'"),
    ("no category_id", of_changes({"annotations.1.category_id": DROP}), "has no category_id"),
    ("category_id null", of_changes({"annotations.1.category_id": None}), "category_id None"),
    ("category_id list", of_changes({"annotations.1.category_id": [2]}), "the category_id [2]"),
    ("category_id 0", of_changes({"annotations.1.category_id": 0}), "unknown category_id 0"),
    ("category_id a name", of_changes({"annotations.1.category_id": "dog"}), "category_id 'dog'"),
    ("category_id '2'", of_changes({"annotations.1.category_id": "2"}), SOUND),
    ("annotation ids equal", of_changes({"annotations.1.id": 0}), SOUND),
    ("no annotation id", of_changes({"annotations.1.id": DROP}), SOUND),
    ("annotation id null", of_changes({"annotations.1.id": None}), SOUND),
    ("annotation id a list", of_changes({"annotations.1.id": [[]]}), SOUND),
]
CATEGORIES = [
    ("no id", of_changes({"categories.1.id": DROP}), "category 'dog' has no id"),
    ("id null", of_changes({"categories.1.id": None}), "category 'dog' has the id None"),
    ("id a list", of_changes({"categories.1.id": [2]}), "category 'dog' has the id [2]"),
    ("id twice", of_changes({"categories.1.id": 1}), "two categories share an id"),
    ("ids of two types", of_changes({"categories.1.id": "b"}), "are texts and numbers"),
    ("no name", of_changes({"categories.1.name": DROP}), "category 2 has no name"),
    ("name null", of_changes({"categories.1.name": None}), "category 2 has the name None"),
    ("name a list", of_changes({"categories.1.name": ["dog"]}), "category 2 has the name ['dog']"),
    ("name empty", of_changes({"categories.1.name": " "}), "has an empty class name"),
    ("name twice", of_changes({"categories.1.name": "cat"}), ("DIR/a.json", "'cat' twice")),
    ("name a number", of_changes({"categories.1.name": 5}), SOUND | {"names": ("cat", "5")}),
    (
        "name of 5000 letters",
        of_changes({"categories.1.name": "x" * 5000}),
        SOUND | {"names": ("cat", "x" * 5000)},
    ),
    (
        "name with a line break",
        of_changes({"categories.1.name": "a\nb"}),
        SOUND | {"names": ("cat", "a\nb")},
    ),
    ("supercategory a list", of_changes({"categories.0.supercategory": ["none"]}), SOUND),
    ("supercategory null", of_changes({"categories.0.supercategory": None}), SOUND),
    ("names as categories", of_changes({"categories": ["cat", "dog"]}), "'categories' is 'cat'"),
    ("an object of names", of_changes({"categories": {"1": "cat"}}), "list 'categories' is"),
    ("order reversed", of_changes({"categories": RECORD["categories"][::-1]}), SOUND),
    (
        "ids with gaps",
        of_changes({"categories.1.id": 900, "annotations.1.category_id": 900}),
        SOUND,
    ),
    ("ids huge", of_changes({"categories.1.id": 2**63, "annotations.1.category_id": 2**63}), SOUND),
]


def box(value, expected):
    return of_changes({"annotations.1.bbox": value}), expected


def field(name: str, value, expected):
    return of_changes({f"annotations.1.{name}": value}), expected


BOXES = [
    ("missing", *box(DROP, "annotation 1 has no bbox")),
    ("null", *box(None, "annotation 1 has the bbox None")),
    ("empty", *box([], "annotation 1 has the bbox []")),
    ("three numbers", *box([1, 2, 3], "annotation 1 has the bbox [1, 2, 3]")),
    ("five numbers", *box([1, 2, 3, 4, 0.5], "annotation 1 has the bbox")),
    ("a number", *box(5, "annotation 1 has the bbox 5")),
    ("texts", *box(["2", "3", "6", "5"], "annotation 1 has the bbox ['2'")),
    ("one text", *box("2 3 6 5", "annotation 1 has the bbox '2 3 6 5'")),
    ("an object", *box({"x": 2, "y": 3}, "annotation 1 has the bbox {'x': 2")),
    ("lists", *box([[2], [3], [6], [5]], "annotation 1 has the bbox [[2]")),
    ("two corners", *box([[2, 3], [8, 8]], "annotation 1 has the bbox [[2, 3]")),
    ("with null", *box([2, 3, None, 5], "annotation 1 has the bbox [2, 3, None")),
    ("with true", *box([2, 3, True, 5], {"objects": 2, "box": [2, 3, 3, 8]})),
    ("negative width", *box([2, 3, -6, 5], "image '0.png' has the box [2.0, 3.0, -4.0, 8.0]")),
    ("negative corner", *box([-4, -3, 8, 5], {"objects": 2, "box": [0, 0, 4, 2]})),
    ("width 0", *box([2, 3, 0, 5], {"objects": 1})),
    ("beyond the image", *box([2, 3, 600, 500], {"objects": 2, "box": [2, 3, 30, 20]})),
    ("outside", *box([200, 300, 6, 5], {"objects": 1})),
    ("1e20", *box([2, 3, 1e20, 1e20], {"objects": 2, "box": [2, 3, 30, 20]})),
    ("1e300", *box([2, 3, 1e300, 5], "image '0.png' has the box")),
    ("2**63", *box([2, 3, 2**63, 5], {"objects": 2, "box": [2, 3, 30, 8]})),
    ("2**64", *box([2, 3, 2**64, 5], {"objects": 2, "box": [2, 3, 30, 8]})),
    ("of 1e-30", *box([2, 3, 1e-30, 1e-30], {"objects": 1})),
    ("NaN", of_edit("[2, 3,", "[NaN, 3,"), "is not valid json"),
    ("Infinity", of_edit("[2, 3,", "[Infinity, 3,"), "is not valid json"),
    ("1e999", of_edit("[2, 3,", "[1e999, 3,"), "DIR/a.json"),
    ("number of 5000 digits", of_edit("[2, 3,", f"[{'9' * 5000}, 3,"), "DIR/a.json"),
    ("area null", *field("area", None, "annotation 1 has the area None")),
    ("area a text", *field("area", "big", "annotation 1 has the area 'big'")),
    ("area negative", *field("area", -1, "annotation 1 has the area -1")),
    ("area 1e300", *field("area", 1e300, "annotation 1 has the area 1e+300")),
    ("area a list", *field("area", [1], "annotation 1 has the area [1]")),
    ("area 0", *field("area", 0, SOUND)),
    ("iscrowd null", *field("iscrowd", None, "annotation 1 has the iscrowd None")),
    ("iscrowd 2", *field("iscrowd", 2, "annotation 1 has the iscrowd 2")),
    ("iscrowd '0'", *field("iscrowd", "0", "annotation 1 has the iscrowd '0'")),
    ("iscrowd true", *field("iscrowd", True, {"objects": 1})),
    ("ignore 1", *field("ignore", 1, {"objects": 1, "log": "1 boxes have ignore: 1; as crowds"})),
    ("ignore 0", *field("ignore", 0, SOUND)),
    ("iscrowd a list", *field("iscrowd", [0], "annotation 1 has the iscrowd [0]")),
    ("width null", of_changes({"images.0.width": None}), "image 7 has the width None"),
    ("width a text", of_changes({"images.0.width": "wide"}), "image 7 has the width 'wide'"),
    ("width '30'", of_changes({"images.0.width": "30"}), SOUND),
    ("width a list", of_changes({"images.0.width": [30]}), "image 7 has the width [30]"),
    ("width negative", of_changes({"images.0.width": -30}), "has the size [20.0, -30.0]"),
    ("width 2**40", of_changes({"images.0.width": 2**40}), "image 7 has the width 1099511627776"),
    ("width 1e300", of_changes({"images.0.width": 1e300}), "image 7 has the width 1e+300"),
    ("no width", of_changes({"images.0.width": DROP}), SOUND),
    ("another size", of_changes({"images.0.width": 99}), SOUND | {"log": "20 x 99 in DIR/a.json"}),
]


def mask(value, expected):
    return of_changes({"annotations.1.segmentation": value}), expected


def rle(**fields):
    return RLE | fields


BROKEN = "image '0.png' has"
NEITHER = "is neither a list of polygons nor an RLE"
PLAIN = SOUND | {"kind": "boxes", "pixels": []}
MASKS = [
    ("polygon", *mask([SQUARE], {"kind": "instances", "pixels": [0, 36]})),
    ("two polygons", *mask([SQUARE, [9, 9, 11, 9, 11, 11, 9, 11]], {"pixels": [0, 40]})),
    ("RLE", *mask(RLE, {"pixels": [0, 5]})),
    ("empty list", *mask([], PLAIN)),
    ("list of an empty list", *mask([[]], PLAIN)),
    ("null", *mask(None, PLAIN)),
    ("false", *mask(False, PLAIN)),
    ("0", *mask(0, PLAIN)),
    ("two points", *mask([[1, 1, 5, 5]], PLAIN)),
    ("odd number of numbers", *mask([[*SQUARE, 4]], {"kind": "instances"})),
    ("flat list", *mask(SQUARE, (BROKEN, NEITHER))),
    ("list of points", *mask([[[2, 2], [8, 2], [8, 8]]], (BROKEN, "DIR/a.json"))),
    (
        "six points",
        *mask([[[2, 2], [8, 2], [8, 8], [2, 8], [2, 7], [2, 6]]], (BROKEN, "DIR/a.json")),
    ),
    ("texts", *mask([["2", "2", "8", "2", "8", "8"]], BROKEN)),
    ("with null", *mask([[2, 2, 8, None, 8, 8]], BROKEN)),
    ("1e300", *mask([[2, 2, 1e300, 2, 8, 8]], {})),
    ("-1e18", *mask([[2, 2, -1e18, 2, 8, 8]], {})),
    ("1e9", *mask([[2, 2, 1e9, 2, 1e9, 1e9]], {})),
    ("outside", *mask([[200, 200, 300, 200, 300, 300]], {"pixels": [0, 0]})),
    ("text", *mask("2 2 8 2 8 8", (BROKEN, NEITHER))),
    ("number", *mask(7, (BROKEN, NEITHER))),
    ("true", *mask(True, (BROKEN, NEITHER))),
    ("empty object", *mask({}, PLAIN)),
    ("no counts", *mask({"size": [HEIGHT, WIDTH]}, (BROKEN, NEITHER))),
    ("no size", *mask({"counts": [600]}, (BROKEN, NEITHER))),
    ("size null", *mask(rle(size=None), (BROKEN, NEITHER))),
    ("size turned", *mask(rle(size=[WIDTH, HEIGHT]), "an RLE of size [30, 20]")),
    ("size of texts", *mask(rle(size=["20", "30"]), "an RLE of size ['20', '30']")),
    ("size of floats", *mask(rle(size=[20.0, 30.0]), (BROKEN, NEITHER))),
    ("size of three", *mask(rle(size=[20, 30, 1]), "an RLE of size [20, 30, 1]")),
    ("counts null", *mask(rle(counts=None), BROKEN)),
    ("counts a number", *mask(rle(counts=600), BROKEN)),
    ("counts empty", *mask(rle(counts=[]), BROKEN)),
    ("counts an empty text", *mask(rle(counts=""), BROKEN)),
    ("counts negative", *mask(rle(counts=[-5, 605]), BROKEN)),
    ("counts too few", *mask(rle(counts=[40, 5]), "sum to less than 20 x 30 pixels")),
    ("counts too many", *mask(rle(counts=[40, 5, 999]), BROKEN)),
    ("counts 2**32", *mask(rle(counts=[2**32 + 40, 5, 555]), BROKEN)),
    ("counts 2**40", *mask(rle(counts=[2**40, 5]), BROKEN)),
    ("counts 2**63", *mask(rle(counts=[2**63, 5]), BROKEN)),
    ("counts 1.5", *mask(rle(counts=[1.5, 598.5]), BROKEN)),
    ("counts of texts", *mask(rle(counts=["40", "5", "555"]), BROKEN)),
    ("counts of lists", *mask(rle(counts=[[40], [5]]), BROKEN)),
    ("counts an object", *mask(rle(counts={"a": 1}), BROKEN)),
    ("counts of str(bytes)", *mask(rle(counts="b'Z1'"), "str() made; write counts.decode()")),
    ("counts garbage", *mask(rle(counts="hello world"), BROKEN)),
    ("counts no ASCII", *mask(rle(counts="é猫\u0001"), BROKEN)),
    ("counts never ending", *mask(rle(counts="o" * 3000), BROKEN)),
    ("an RLE in a list", *mask([RLE], (BROKEN, NEITHER))),
    ("polygon and number", *mask([SQUARE, 5], (BROKEN, NEITHER))),
    ("polygon and null", *mask([SQUARE, None], (BROKEN, NEITHER))),
    ("json in a text", *mask(json.dumps(RLE), (BROKEN, NEITHER))),
]


def image_labels(value, expected):
    return of_changes(LABELS | {"images.0.pos_category_ids": value}), expected


def captions(value, expected):
    return of_changes(LABELS | {"images.0.captions": value}), expected


IMAGE_LABELS = [
    ("sound", *image_labels([2], {"kind": "image_labels", "image_labels": [1]})),
    ("twice", *image_labels([2, 2], {"image_labels": [1]})),
    ("as texts", *image_labels(["1", "2"], {"image_labels": [0, 1]})),
    ("unknown", *image_labels([3], "image 7 has the unknown id 3 in pos_category_ids")),
    ("null", *image_labels([None], ("image 7", "pos_category_ids"))),
    ("lists", *image_labels([[1]], ("image 7", "pos_category_ids"))),
    ("a number", *image_labels(2, ("image 7", "pos_category_ids", "list"))),
    ("a text", *image_labels("12", ("image 7", "pos_category_ids", "list"))),
    ("an object", *image_labels({"1": 2}, ("image 7", "pos_category_ids", "list"))),
    ("captions", *captions(["a cat"], {"captions": ["a cat"]})),
    ("captions one text", *captions("a cat", "image 7 has captions that are no list of")),
    ("captions numbers", *captions([5], "image 7 has captions that are no list of")),
    ("captions null", *captions(None, {"captions": []})),
]


def encoded(encoding: str, bom: bytes = b""):
    text = json.dumps(changed(RECORD, {"categories.1.name": "狗"}), ensure_ascii=False)
    return of_text(bom + text.encode(encoding))


ENCODINGS = [
    ("UTF-8", encoded("utf-8"), {"names": ("cat", "狗")}),
    ("UTF-8 with BOM", encoded("utf-8-sig"), {"names": ("cat", "狗")}),
    ("UTF-16", encoded("utf-16"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
    ("UTF-16 without BOM", encoded("utf-16-le"), "is UTF-16 or UTF-32 text"),
    ("UTF-32", encoded("utf-32"), "is UTF-16 or UTF-32 text"),
    ("GBK", encoded("gbk"), "is no UTF-8 text (byte 0x"),
    ("Shift JIS", encoded("shift_jis", b'{"a": "\x8b\xc7"}'), "is no UTF-8 text (byte 0x8b"),
    ("lone surrogate", of_edit("dog", "\\ud83d"), "DIR/a.json"),
    ("escaped NUL", of_edit("dog", "\\u0000"), {"names": ("cat", "\0")}),
    ("bad escape", of_edit("dog", "\\x"), "is not valid json"),
    ("line break in a text", of_edit("dog", "d\nog"), "is not valid json"),
]


def name(value, expected):
    return of_changes({"images.0.file_name": value}), expected


def linked(target: str):
    """The image is a symbolic link."""

    def attempt(folder: Path) -> dict:
        write(folder / "im/1.png", b"").unlink()
        (folder / "im/1.png").symlink_to(target)
        return read(folder, changed(RECORD, {"images.0.file_name": "1.png"}))

    return attempt


def without(*files: str):
    """The folder of the images lacks some, or is missing."""

    def attempt(folder: Path) -> dict:
        write(folder / "a.json", RECORD)
        for file in files:
            write(folder / "im" / file, b"x")
        return load(f"mine={folder}/a.json:{folder}/im")

    return attempt


def as_folder(folder: Path) -> dict:
    (folder / "im/sub").mkdir(parents=True)
    return read(folder, changed(RECORD, {"images.0.file_name": "sub"}))


GONE = "is missing (1 of 1 that DIR/a.json lists"
FILE_NAMES = [
    ("missing field", *name(DROP, "image 7 has no file_name")),
    ("null", *name(None, ("image 7", "file_name None"))),
    ("a number", *name(0, GONE)),
    ("a list", *name(["0.png"], ("image 7", "file_name ['0.png']"))),
    ("an object", *name({"a": "0.png"}, ("image 7", "file_name {"))),
    ("empty", *name("", "file_name '' (0 letters) can be no file's")),
    ("a dot", *name(".", "DIR/a.json")),
    ("a slash at the end", *name("sub/", GONE)),
    ("a folder", as_folder, "DIR/im/sub is a folder; give image files"),
    ("of another folder", *name("../0.png", "file_name '../0.png' leaves the image folder")),
    ("of another folder inside", *name("a/../../0.png", "leaves the image folder")),
    ("absolute", *name("/etc/hostname", GONE)),
    ("absolute of another machine", *name("/home/me/im/0.png", {"objects": 2})),
    ("with NUL", *name("0.png\0", "can be no file's")),
    ("with a line break", *name("0\n.png", "can be no file's")),
    ("of 5000 letters", *name("x" * 5000, "(5000 letters) can be no file's")),
    ("of 256 letters", *name("x" * 256, "DIR/a.json")),
    ("backslashes", *name("im\\0.png", {"objects": 2})),
    ("capitals", *name("0.PNG", {"objects": 2})),
    ("doubled slash", *name("./0.png", {"objects": 2})),
    ("a URL", *name("https://example.com/0.png", {"objects": 2})),
    ("a link to a device", linked("/dev/zero"), "no regular file, but a device or pipe"),
    ("a link to itself", linked("1.png"), "DIR/im/1.png"),
    ("a link to nothing", linked("nothing.png"), "DIR/im/1.png"),
    ("a link to text", linked("/etc/passwd"), "DIR/im/1.png cannot be decoded"),
    ("no image folder", without(), "DIR/im/0.png is missing"),
    ("another image", without("zebra.png"), "DIR/im/0.png is missing"),
    ("a broken image", without("0.png"), "DIR/im/0.png cannot be decoded"),
]
GROUPS = {
    "structure": STRUCTURE,
    "ids": IDS,
    "categories": CATEGORIES,
    "box": BOXES,
    "mask": MASKS,
    "image labels": IMAGE_LABELS,
    "encoding": ENCODINGS,
    "file name": FILE_NAMES,
}
CASES = [
    Case(f"coco, {group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
