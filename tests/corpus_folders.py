"""Folders of classes, tar files, OpenImages, LVIS, captions and Visual Genome."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from corpus import DROP, HEIGHT, WIDTH, Case, changed, load, nested, photos, picture, write

# -- a folder of images for each class

LABELS = {"kind": "image_labels", "names": ("cat", "dog"), "image_labels": [0, 1]}


def folders(make: Callable[[Path], object] = lambda root: None, **files: bytes | str):
    """cat/0.png and dog/0.png. `make` changes the folder; `files`: "__" stands for "/"."""

    def attempt(folder: Path) -> dict:
        root = folder / "data"
        photos(root, "cat/0.png", "dog/0.png")
        for name, content in files.items():
            write(root / name.replace("__", "/").replace("_txt", ".txt"), content)
        make(root)
        return load(f"mine={root}")

    return attempt


def renamed(name: str | bytes):
    """The class dog has another name."""

    def make(root: Path) -> None:
        os.rename(os.fsencode(root / "dog"), os.fsencode(root) + b"/" + os.fsencode(name))

    return folders(make)


def emptied(root: Path) -> None:
    for image in root.rglob("*.png"):
        image.unlink()


WNID = "n01440764"
NO_NAME = f"DIR/data/{WNID} is a WordNet id without a name"


def wordnet(file: str, content: str | bytes):
    """The class dog is a WordNet id, which `file` names."""

    def make(root: Path) -> None:
        (root / "dog").rename(root / WNID)
        write(root / file, content)

    return folders(make)


FOLDERS = [
    ("sound", folders(), LABELS),
    ("no image", folders(emptied), ("DIR/data", "in no known format")),
    ("an empty class", folders(lambda root: (root / "bird").mkdir()), LABELS | {"log": "1 class"}),
    ("a text file in a class", folders(cat__a_txt="x"), LABELS | {"log": "1 files that are no"}),
    ("a text file beside", folders(a_txt="x"), LABELS | {"log": "1 entries beside"}),
    ("a pipe in a class", folders(lambda root: os.mkfifo(root / "dog/1.png")), "device or pipe"),
    ("a pipe beside", folders(lambda root: os.mkfifo(root / "pipe")), LABELS),
    ("a broken image", folders(dog__0_txt="", **{"dog/0.png": "x"}), "DIR/data/dog/0.png cannot"),
    ("a folder that holds itself", folders(lambda root: (root / "dog/x").symlink_to(root)), LABELS),
    ("a link to a folder", folders(lambda root: (root / "pig").symlink_to("dog")), {"images": 3}),
    ("a link to nothing", folders(lambda root: (root / "pig").symlink_to("gone")), LABELS),
    ("a class of blanks", renamed(" "), ("DIR/data", "empty class name")),
    ("a class of two lines", renamed("a\nb"), {"names": ("a\nb", "cat")}),
    ("a class of bytes", renamed(b"\xff\xfe"), ("DIR/data", "no text; rename it")),
    ("a class of accents", renamed("été"), {"names": ("cat", "été")}),
    ("a class of a comma", renamed("a,b"), {"names": ("a,b", "cat")}),
    ("a hidden class", renamed(".dog"), {"names": ("cat",)}),
    ("a class of 255 letters", renamed("x" * 255), {"names": ("cat", "x" * 255)}),
    ("an id without a name", renamed(WNID), NO_NAME),
    ("an id of a csv", wordnet("classes.csv", f"wnid,name\n{WNID},dog\n"), {"images": 2}),
    ("an id of words.txt", wordnet("words.txt", f"{WNID}\tdog, hound\n"), LABELS),
    ("words.txt of bytes", wordnet("words.txt", b"\xff\xff"), ("words.txt", "save it as UTF-8")),
    ("words.txt without tabs", wordnet("words.txt", f"{WNID} dog\n"), NO_NAME),
    ("csv without a header", wordnet("classes.csv", f"{WNID},dog\n"), "column 'wnid' is missing"),
    ("csv of three columns", wordnet("classes.csv", "wnid,name\na,b,c"), "line 2 has 3 of 2"),
    ("csv with an empty name", wordnet("classes.csv", f"wnid,name\n{WNID}, "), NO_NAME),
    ("csv empty", wordnet("classes.csv", ""), "DIR/data/classes.csv: column 'wnid' is missing"),
    ("csv of bytes", wordnet("classes.csv", b"wnid,name\n\xff,a"), "classes.csv is not a csv file"),
    ("two ids of one name", wordnet("words.txt", f"{WNID}\tcat\n"), {"names": ("cat",)}),
]

# -- tar files


def packed(members: dict[str, bytes | str], **fields) -> bytes:
    """Returns a tar file. fields: of all its members, such as type=tarfile.SYMTYPE."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def tars(content: bytes, name: str = "cat.tar", **files: str | bytes):
    """A folder with one tar file. `files`: "_" stands for "."."""

    def attempt(folder: Path) -> dict:
        write(folder / "data" / name, content)
        for other, text in files.items():
            write(folder / "data" / other.replace("_", "."), text)
        return load(f"mine={folder}/data")

    return attempt


def labelled(label: str | bytes, ending: str = "cls", **files: str | bytes):
    """A tar file with an image and its label."""
    return tars(packed({"0.png": picture(), f"0.{ending}": label}), **files)


def header(place: int, text: bytes) -> bytes:
    """Returns a tar file with other bytes in its first header, whose checksum is right."""
    data = bytearray(packed({"0.png": picture()}))
    data[place : place + len(text)] = text
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def overwritten(place: int, text: bytes) -> bytes:
    data = bytearray(packed({"0.png": picture()}))
    data[place : place + len(text)] = text
    return bytes(data)


WHOLE = packed({"0.png": picture()})
CAT = {"kind": "image_labels", "names": ("cat",), "image_labels": [0]}
NO_TAR = "shard DIR/data/cat.tar is no whole tar file"
NO_LABEL = "shard DIR/data/cat.tar: member '0."
TARS = [
    ("sound", tars(WHOLE), CAT),
    ("empty", tars(b""), NO_TAR),
    ("text", tars(b"text" * 300), NO_TAR),
    ("zeros", tars(bytes(10240)), "hold no images with labels"),
    ("gzip", tars(gzip.compress(WHOLE)), NO_TAR),
    ("cut in a header", tars(WHOLE[:300]), NO_TAR),
    ("cut in an image", tars(WHOLE[:550]), NO_TAR),
    ("cut before the end", tars(WHOLE[:1024]), NO_TAR),
    ("a wrong checksum", tars(overwritten(148, b"123456\0 ")), NO_TAR),
    ("a size of letters", tars(header(124, b"many       \0")), NO_TAR),
    ("a negative size", tars(header(124, b"\xff" * 12)), NO_TAR),
    ("a size of 8 GiB", tars(header(124, b"77777777777\0")), "has 8589934591 bytes"),
    ("a size of 2**80", tars(header(124, b"\x80" + b"\xff" * 11)), NO_LABEL),
    ("a folder in it", tars(packed({"a/0.png": picture()})), CAT),
    ("a member above", tars(packed({"../0.png": b""})), "'../0.png' leaves the folder"),
    ("a member of the root", tars(packed({"/0.png": b""})), "'/0.png' leaves the folder"),
    ("a symbolic link", tars(packed({"0.png": b""}, type=tarfile.SYMTYPE)), "hold no images"),
    ("a hard link", tars(packed({"0.png": b""}, type=tarfile.LNKTYPE)), "hold no images"),
    ("a device", tars(packed({"0.png": b""}, type=tarfile.CHRTYPE)), "hold no images"),
    ("a pipe", tars(packed({"0.png": b""}, type=tarfile.FIFOTYPE)), "hold no images"),
    ("a hidden image", tars(packed({".0.png": picture()})), "hold no images"),
    ("text alone", tars(packed({"a.txt": "x"})), "hold no images"),
    ("an image twice", tars(packed({"0.png": picture(), "./0.png": picture()})), {"images": 2}),
    ("a broken image", tars(packed({"0.png": b"x"})), "DIR/data/cat.tar/0.png cannot be decoded"),
    ("a zipped image", tars(packed({"0.png": gzip.compress(picture())})), CAT),
    ("a broken zipped image", tars(packed({"0.png": b"\x1f\x8b\x08x"})), "DIR/data/cat.tar"),
    ("a name of bytes", tars(header(0, b"\xff.png\0")), CAT),
    ("a name of 300 letters", tars(packed({"x" * 300 + ".png": picture()})), CAT),
    ("a tar of a number", tars(WHOLE, "12.tar"), "12.tar: a number is no class"),
    ("a tar of an id", tars(WHOLE, f"{WNID}.tar"), f"{WNID} is a WordNet id without a name"),
    ("label", labelled("dog"), CAT | {"names": ("dog",)}),
    ("label empty", labelled(""), CAT),
    ("label of bytes", labelled(b"\xff\xff"), NO_LABEL + "cls' holds no label"),
    ("label of two lines", labelled("a\nb"), {"names": ("a\nb",)}),
    ("label of 2 MiB", labelled("x" * 2**21), NO_LABEL + "cls' has 2097152 bytes"),
    ("label a number", labelled("1", classes_txt="cat\ndog\n"), {"image_labels": [1]}),
    ("label a number without names", labelled("1"), "name the classes in DIR/data/classes.txt"),
    ("label too large", labelled("2", classes_txt="cat\ndog\n"), "label 2, but classes.txt has 2"),
    ("label of 20 digits", labelled("9" * 20, classes_txt="cat"), "classes.txt has 1 lines"),
    ("label a superscript", labelled("²"), {"names": ("²",)}),
    ("label negative", labelled("-1"), {"names": ("-1",)}),
    ("names empty", labelled("0", classes_txt=""), "DIR/data/classes.txt"),
    ("names twice", labelled("0", classes_txt="cat\ncat"), ("classes.txt", "'cat' twice")),
    ("names of bytes", labelled("0", classes_txt=b"\xff"), ("classes.txt", "save it as UTF-8")),
    ("json", labelled('{"label": "dog"}', "json"), {"names": ("dog",)}),
    ("json cut off", labelled('{"label": ', "json"), NO_LABEL + "json' holds no label"),
    ("json empty", labelled("", "json"), NO_LABEL + "json' holds no label"),
    ("json of a list", labelled('{"label": ["dog"]}', "json"), NO_LABEL + "json' holds no label"),
    ("json of null", labelled('{"label": null}', "json"), NO_LABEL + "json' holds no label"),
    ("json of true", labelled('{"label": true}', "json"), NO_LABEL + "json' holds no label"),
    ("json of NaN", labelled('{"label": NaN}', "json"), NO_LABEL + "json' holds no label"),
    ("json without label", labelled('{"text": "dog"}', "json"), CAT),
    ("json a list", labelled("[1]", "json"), CAT),
    ("json nested deep", labelled(nested(), "json"), NO_LABEL + "json' holds no label"),
]

# -- OpenImages

HEAD = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"
FIELDS = {"ImageID": "0", "Source": "x", "LabelName": "/m/1", "Confidence": "1"}
FIELDS |= {"XMin": "0.1", "XMax": "0.5", "YMin": "0.2", "YMax": "0.6"}
FIELDS |= {"IsOccluded": "0", "IsGroupOf": "0"}
DESCRIPTIONS = "/m/1,Cat\n/m/2,Dog\n"
OID_SOUND = {"objects": 1, "box": [3, 4, 15, 12], "labels": [0], "names": ("Cat", "Dog")}


def line(**changes: str) -> str:
    return ",".join((FIELDS | changes).values())


def oid(*lines: str, text: str | bytes = "", names: str | bytes = DESCRIPTIONS, head: str = HEAD):
    """The csv of the training images, which is `text`, if given, and the list of classes."""

    def attempt(folder: Path) -> dict:
        photos(folder / "oid/images/train", "0.jpg")
        csv = folder / "oid/annotations/train-annotations-bbox.csv"
        write(csv, text or "\n".join([head, *(lines or [line()])]))
        write(folder / "oid/annotations/class-descriptions-boxable.csv", names)
        return load("oid", root=folder)

    return attempt


def of_row(field: str, value: str):
    return oid(line(**{field: value}))


def validation(labels: str | bytes, classes: str | bytes = "{}"):
    """The labels verified by people, and the class tree, which the evaluation needs."""

    def attempt(folder: Path) -> dict:
        photos(folder / "oid/images/validation", "0.jpg")
        place = folder / "oid/annotations"
        write(place / "validation-annotations-bbox.csv", f"{HEAD}\n{line()}")
        write(place / "validation-annotations-human-imagelabels-boxable.csv", labels)
        write(place / "class-descriptions-boxable.csv", DESCRIPTIONS)
        write(place / "bbox_labels_600_hierarchy.json", classes)
        return load("oid", "val", folder)

    return attempt


def tree(node) -> str:
    return json.dumps({"LabelName": "/m/0", "Subcategory": [node]})


TREE = "DIR/oid/annotations/bbox_labels_600_hierarchy.json"
CSV = "DIR/oid/annotations/train-annotations-bbox.csv"
LIST = "DIR/oid/annotations/class-descriptions-boxable.csv"
OTHER_ORDER = "LabelName,ImageID,XMin,YMin,XMax,YMax,IsGroupOf\n/m/1,0,0.1,0.2,0.5,0.6,0"
VERIFIED = "ImageID,Source,LabelName,Confidence\n"
OID = [
    ("sound", oid(), OID_SOUND),
    ("BOM and CRLF", oid(text=f"\ufeff{HEAD}\r\n{line()}\r\n"), OID_SOUND),
    ("columns in another order", oid(text=OTHER_ORDER), OID_SOUND),
    ("header alone", oid(text=HEAD), CSV),
    ("white space", oid(text="\n\n"), f"{CSV}: column 'ImageID' is missing"),
    ("no header", oid(text=line()), f"{CSV}: column 'ImageID' is missing"),
    ("a column missing", oid(head=HEAD.replace("XMax", "X")), f"{CSV}: column 'XMax' is missing"),
    ("tabs", oid(text=HEAD.replace(",", "\t")), f"{CSV}: column 'ImageID' is missing"),
    ("a short row", oid("0,x,/m/1"), f"{CSV}: line 2 has 3 of 10 columns"),
    ("a long row", oid(line() + ",1"), f"{CSV}: line 2 has 11 of 10 columns"),
    ("a blank row", oid(line(), "", line()), f"{CSV}: line 3 has 0 of 10 columns"),
    ("cut off", oid(line(), line()[:-9]), f"{CSV}: line 3 has"),
    ("a quote that never closes", oid('"0,x'), CSV),
    ("a field of 200,000 letters", oid("x" * 200_000), f"{CSV} is not a csv file"),
    ("UTF-16", oid(text=f"{HEAD}\n{line()}".encode("utf-16")), f"{CSV} is not a csv file"),
    ("bytes", oid(text=HEAD.encode() + b"\n\xff"), f"{CSV} is not a csv file"),
    ("NUL", oid("\0"), CSV),
    ("gzip", oid(text=gzip.compress(HEAD.encode())), f"{CSV} is not a csv file"),
    ("unknown class", of_row("LabelName", "/m/9"), f"{CSV}: line 2 has unknown LabelName '/m/9'"),
    ("class empty", of_row("LabelName", ""), f"{CSV}: line 2 has unknown LabelName ''"),
    ("corner empty", of_row("XMax", ""), f"{CSV}: line 2 has a box that is no number"),
    ("corner a text", of_row("XMax", "half"), f"{CSV}: line 2 has a box that is no number"),
    ("corner NaN", of_row("XMax", "nan"), f"{CSV}: image '0.jpg' has the box"),
    ("corner 1e999", of_row("XMax", "1e999"), f"{CSV}: image '0.jpg' has the box"),
    (
        "corner in pixels",
        of_row("XMax", "15"),
        f"{CSV}: a box has the corner 15, which looks like pixels",
    ),
    ("corner 1.0001", of_row("XMax", "1.0001"), {"box": [3, 4, 30, 12]}),
    ("corner -0.1", of_row("XMin", "-0.1"), {"box": [0, 4, 15, 12]}),
    ("corners swapped", of_row("XMax", "0.05"), f"{CSV}: image '0.jpg' has the box"),
    ("group", of_row("IsGroupOf", "1"), "1 crowd, group or difficult"),
    ("group a text", of_row("IsGroupOf", "maybe"), (CSV, "line 2", "IsGroupOf 'maybe'")),
    ("image empty", of_row("ImageID", ""), (CSV, "line 2", "ImageID '' (0 letters)")),
    ("image above", of_row("ImageID", "../0"), f"{CSV}: line 2: ImageID '../0' leaves"),
    ("image absolute", of_row("ImageID", "/etc/passwd"), f"{CSV}: line 2: ImageID '/etc/passwd'"),
    ("image of two lines", of_row("ImageID", '"a\nb"'), "a\\nb.jpg is missing"),
    ("image missing", of_row("ImageID", "1"), "DIR/oid/images/train/1.jpg is missing"),
    ("image of 5000 letters", of_row("ImageID", "x" * 5000), (CSV, "line 2", "ImageID 'xxx")),
    ("list empty", oid(names=""), LIST),
    ("list of a header", oid(names=f"LabelName,DisplayName\n{DESCRIPTIONS}"), OID_SOUND),
    ("list of one column", oid(names="/m/1"), f"{LIST}: a line is not ID,NAME"),
    ("list of an id twice", oid(names="/m/1,Cat\n/m/1,Dog"), ("class-desc", "'/m/1' twice")),
    ("list of a name twice", oid(names="/m/1,Cat\n/m/2,Cat"), ("class-desc", "'Cat' twice")),
    ("list of bytes", oid(names=b"/m/1,\xff"), f"{LIST} is not a csv file"),
    ("labels", validation(f"{VERIFIED}0,x,/m/2,0"), OID_SOUND),
    ("labels of an image without box", validation(f"{VERIFIED}1,x,/m/2,0"), "1.jpg is missing"),
    ("labels without a column", validation("ImageID,Source\n"), "column 'LabelName' is missing"),
    ("labels of an image above", validation(f"{VERIFIED}../1,x,/m/2,0"), "leaves the image"),
    ("labels of bytes", validation(b"\xff"), "imagelabels-boxable.csv is not a csv file"),
    ("confidence a text", validation(f"{VERIFIED}0,x,/m/2,sure"), ("line 2", "Confidence 'sure'")),
    ("tree no json", validation(VERIFIED, "{"), "600_hierarchy.json is not valid json"),
    ("tree a list", validation(VERIFIED, "[]"), "bbox_labels_600_hierarchy.json"),
    ("tree", validation(VERIFIED, tree({"LabelName": "/m/1"})), OID_SOUND),
    ("tree of a text", validation(VERIFIED, tree("/m/1")), f"{TREE}: '/m/1' is no node"),
    ("tree of null", validation(VERIFIED, tree(None)), f"{TREE}: None is no node"),
    ("tree of a list", validation(VERIFIED, tree({"LabelName": []})), f"{TREE}: {{'LabelName'"),
    ("tree of an object", validation(VERIFIED, '{"Subcategory": {"a": 1}}'), f"{TREE}: {{'Sub"),
    ("tree too deep", validation(VERIFIED, '{"Subcategory":[' * 400 + "]}" * 400), f"{TREE}: {{'S"),
    ("tree nested deep", validation(VERIFIED, nested()), "bbox_labels_600_hierarchy.json"),
]

# -- LVIS

LVIS = {
    "images": [
        {
            "id": 7,
            "coco_url": "http://images.cocodataset.org/train2017/0.png",
            "height": HEIGHT,
            "width": WIDTH,
            "neg_category_ids": [2],
            "not_exhaustive_category_ids": [1],
        }
    ],
    "annotations": [{"id": 0, "image_id": 7, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16}],
    "categories": [
        {"id": 1, "name": "aerosol_can", "synset": "aerosol.n.02", "frequency": "c"},
        {"id": 2, "name": "air_conditioner", "synset": "air_conditioner.n.01", "frequency": "f"},
    ],
}
LVIS_SOUND = {"objects": 1, "labels": [0], "names": ("aerosol_can", "air_conditioner")}


def lvis(changes: dict):
    def attempt(folder: Path) -> dict:
        photos(folder / "lvis/images/train2017", "0.png")
        write(folder / "lvis/lvis_v1_train.json", changed(LVIS, changes))
        return load("lvis", root=folder)

    return attempt


def of_image(field: str, value, expected):
    return lvis({f"images.0.{field}": value}), expected


def of_category(field: str, value, expected):
    return lvis({f"categories.1.{field}": value}), expected


JSON = "DIR/lvis/lvis_v1_train.json"
NEGATIVE, EXHAUSTED = "neg_category_ids", "not_exhaustive_category_ids"
LVIS_ROWS = [
    ("sound", lvis({}), LVIS_SOUND),
    ("no negatives", *of_image(NEGATIVE, DROP, LVIS_SOUND)),
    ("negatives unknown", *of_image(NEGATIVE, [9], f"{JSON}: image 7 has the unknown id 9 in neg")),
    ("negatives a number", *of_image(NEGATIVE, 2, (JSON, "image 7", NEGATIVE))),
    ("negatives a text", *of_image(NEGATIVE, "2", (JSON, "image 7", NEGATIVE))),
    ("negatives of lists", *of_image(NEGATIVE, [[2]], (JSON, "image 7", NEGATIVE))),
    ("negatives null", *of_image(NEGATIVE, None, LVIS_SOUND)),
    ("not exhaustive unknown", *of_image(EXHAUSTED, [9], f"{JSON}: image 7 has the unknown id 9")),
    ("not exhaustive null", *of_image(EXHAUSTED, [None], (JSON, "image 7", EXHAUSTED))),
    ("no address", *of_image("coco_url", DROP, (JSON, "image 7"))),
    ("address null", *of_image("coco_url", None, (JSON, "image 7"))),
    ("address a list", *of_image("coco_url", [1], (JSON, "image 7"))),
    ("address empty", *of_image("coco_url", "", JSON)),
    ("address above", *of_image("coco_url", "http://x/../0.png", "leaves the image folder")),
    ("frequency missing", *of_category("frequency", DROP, (JSON, "frequency"))),
    ("frequency 5", *of_category("frequency", 5, f"{JSON}: category 2 has the frequency 5")),
    ("frequency a list", *of_category("frequency", ["r"], "has the frequency ['r']; write r, c")),
    ("id of another file", *of_category("id", 99_999, f"{JSON}: id 99999 ('air_conditioner')")),
    ("other names", lvis({"categories.0.name": "a", "categories.1.name": "b"}), "in 'lvis'"),
]

# -- captions


def captions(text: str | bytes):
    def attempt(folder: Path) -> dict:
        photos(folder / "im", "1.jpg", "a.jpg")
        write(folder / "a.tsv", text)
        return load(f"mine={folder}/a.tsv:{folder}/im")

    return attempt


CAPTIONS = [
    ("a path", captions("a banana\ta.jpg\n"), {"captions": ["a banana"], "files": ["a.jpg"]}),
    ("an address", captions("a banana\thttp://x/y.jpg\n"), {"files": ["1.jpg"]}),
    ("empty", captions(""), ("dataset 'mine': no image of DIR/a.tsv", "download them")),
    ("no tab", captions("a banana a.jpg\n"), "DIR/a.tsv: line 1 has 1 columns"),
    ("three columns", captions("a banana\ta.jpg\tx\n"), "DIR/a.tsv: line 1 has 3 columns"),
    ("a blank line", captions("a banana\ta.jpg\n\n"), "DIR/a.tsv: line 2 has 1 columns"),
    ("no class", captions("nothing\ta.jpg\n"), "none of the 1 captions of DIR/a.tsv names a class"),
    ("no image", captions("a banana\tb.jpg\n"), "no image of DIR/a.tsv is in DIR/im"),
    ("above", captions("a banana\t../a.jpg\n"), "leaves the image folder"),
    ("absolute", captions("a banana\t/etc/passwd\n"), "leaves the image folder"),
    ("no path", captions("a banana\t\n"), "DIR/a.tsv: file_name ''"),
    ("bytes", captions(b"a banana\xff\ta.jpg\n"), "DIR/a.tsv cannot be read"),
    ("UTF-16", captions("a banana\ta.jpg".encode("utf-16")), "DIR/a.tsv cannot be read"),
    ("BOM", captions("\ufeffa banana\ta.jpg\n"), {"captions": ["a banana"]}),
    ("NUL", captions("a banana\ta\0.jpg\n"), ("DIR/a.tsv", "can be no file's")),
    ("a caption of 1 MB", captions("a banana " * 99_999 + "\ta.jpg"), {"files": ["a.jpg"]}),
]

# -- Visual Genome

OBJECT = {"x": 1, "y": 2, "w": 5, "h": 4, "synsets": ["clock.n.01"]}
GENOME = {
    "data": [{"image_id": 1, "url": "https://x/VG_100K/1.jpg", "height": HEIGHT, "width": WIDTH}],
    "objects": [{"image_id": 1, "objects": [OBJECT]}],
}


def genome(changes: dict):
    def attempt(folder: Path) -> dict:
        record = changed(GENOME, changes)
        photos(folder / "vg/VG_100K", "1.jpg")
        write(folder / "vg/image_data.json", record["data"])
        write(folder / "vg/objects.json", record["objects"])
        return load("vg", root=folder)

    return attempt


def thing(field: str, value):
    return genome({f"objects.0.objects.0.{field}": value})


OBJECTS, DATA = "DIR/vg/objects.json", "DIR/vg/image_data.json"
VG = [
    ("sound", genome({}), {"objects": 1, "box": [1, 2, 6, 6], "names": ("clock",)}),
    ("no synset", thing("synsets", []), OBJECTS),
    ("synset a number", thing("synsets", [5]), OBJECTS),
    ("synset empty", thing("synsets", [""]), OBJECTS),
    ("synsets null", thing("synsets", None), OBJECTS),
    ("no width", thing("w", DROP), f"{OBJECTS}: field 'w' is missing"),
    ("width a text", thing("w", "wide"), OBJECTS),
    ("width null", thing("w", None), OBJECTS),
    ("width negative", thing("w", -5), f"{OBJECTS}: image 'VG_100K/1.jpg' has the box"),
    ("width 1e300", thing("w", 1e300), f"{OBJECTS}: image 'VG_100K/1.jpg' has the box"),
    ("objects null", genome({"objects.0.objects": None}), OBJECTS),
    ("an image of null", genome({"objects.1": None}), OBJECTS),
    ("image unknown", genome({"objects.0.image_id": 2}), f"{OBJECTS}: image_id 2 is not in"),
    ("image a list", genome({"objects.0.image_id": [1]}), OBJECTS),
    ("image twice", genome({"data.1": GENOME["data"][0]}), f"{DATA}: an image_id comes twice"),
    ("no address", genome({"data.0.url": DROP}), (DATA, "url")),
    ("address null", genome({"data.0.url": None}), DATA),
    ("height a text", genome({"data.0.height": "high"}), DATA),
    ("height null", genome({"data.0.height": None}), DATA),
    ("data an object", genome({"data": {}}), f"{DATA} holds a json object; a list is needed"),
    ("objects a number", genome({"objects": 5}), OBJECTS),
]
GROUPS = {
    "class folders": FOLDERS,
    "tar": TARS,
    "OpenImages": OID,
    "LVIS": LVIS_ROWS,
    "captions": CAPTIONS,
    "Visual Genome": VG,
}
CASES = [
    Case(f"{group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
