"""Class names: vocabularies, --classes and --rename, files of text embeddings, files of counts."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from corpus import DROP, Case, changed, describe, nested, photos, write
from corpus_coco import RECORD

from common.class_counts import read_prior
from common.datasets import load_datasets
from common.datasets.subset import edit_classes
from common.labels import LabelSpace, Vocabulary
from common.text import embed

# -- names


def names(text: str, content: str | bytes | None = None) -> Callable[[Path], dict]:
    """A --vocabulary; `content` is that of DIR/v.txt."""

    def attempt(folder: Path) -> dict:
        if content is not None:
            write(folder / "v.txt", content)
        vocabulary = Vocabulary.parse(text.replace("DIR", str(folder)))
        return {"names": vocabulary.names}

    return attempt


def listed(content: str | bytes) -> Callable[[Path], dict]:
    return names("DIR/v.txt", content)


PAIR = {"names": ("cat", "dog")}
LIST = "'--vocabulary DIR/v.txt'"
NAMES = [
    ("two", names("cat, dog"), PAIR),
    ("nothing", names(""), "vocabulary of '--vocabulary' is empty"),
    ("blanks", names(" "), "vocabulary of '--vocabulary' is empty"),
    ("a comma", names(","), "has an empty class name"),
    ("a comma at the end", names("cat,"), "has an empty class name"),
    ("twice", names("cat,cat"), "has the class name 'cat' twice"),
    ("semicolons", names("cat;dog"), "separate the names by commas"),
    ("an emoji", names("cat😀,猫"), {"names": ("cat😀", "猫")}),
    ("two lines", names("a\nb,c"), {"names": ("a\nb", "c")}),
    ("NUL", names("a\0,c"), {"names": ("a\0", "c")}),
    ("escape codes", names("\033[31m,\033[31m"), "'\\x1b[31m' twice"),
    ("a csv", names("DIR/v.csv"), "DIR/v.csv is no list of names; give a .txt file"),
    ("a json", names("names.json"), "names.json is no list of names"),
    ("a path", names("DIR/v", "x"), {}),
    ("a missing file", names("DIR/gone.txt"), "DIR/gone.txt does not exist"),
    ("a folder", names("DIR.txt"), "DIR.txt does not exist"),
    ("a home of nobody", names("~nobody-here/v.txt"), "~nobody-here/v.txt"),
    ("name of 5000 letters", names("x" * 5000), {"names": ("x" * 5000,)}),
    ("5000 letters twice", names(f"{'x' * 5000},{'x' * 5000}"), "twice; keep one"),
    ("missing file of 5000 letters", names("x" * 5000 + ".txt"), "does not exist"),
    ("file", listed("cat\ndog\n"), PAIR),
    ("file with BOM", listed(b"\xef\xbb\xbfcat\r\ndog\r\n"), PAIR),
    ("file of blank lines", listed("\n cat \n\n\tdog\n\n"), PAIR),
    ("file empty", listed(""), f"vocabulary of {LIST} is empty"),
    ("file of one name twice", listed("cat\ncat"), f"vocabulary of {LIST} has the class name"),
    ("file of commas", listed("cat,dog"), {"names": ("cat,dog",)}),
    ("file in UTF-16", listed("cat\ndog".encode("utf-16")), "v.txt cannot be read ('utf-8' codec"),
    ("file of bytes", listed(b"cat\xff"), "DIR/v.txt cannot be read"),
    ("file of zeros", listed(bytes(99)), {}),
    ("file of one line of 1 MB", listed("x" * 10**6), {"names": ("x" * 10**6,)}),
]

# -- --classes and --rename


def edited(classes: str = "", renames: str | bytes | None = None, ending: str = "txt"):
    """A dataset of cat and dog with other classes; `renames` is the content of DIR/r.ENDING."""

    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        write(folder / "a.json", RECORD)
        path = folder / f"r.{ending}"
        if renames is not None:
            write(path, renames)
        datasets = load_datasets(f"mine={folder}/a.json:{folder}/im", "train")
        file = "" if renames is None else str(path)
        (dataset,) = edit_classes(datasets, classes, file, "train")
        return describe(dataset)

    return attempt


def renamed(text: str | bytes, ending: str = "txt"):
    return edited("", text, ending)


BAD_FILE = "--rename DIR/r.txt cannot be read"
BAD_JSON = "--rename DIR/r.json cannot be read"
CLASSES = [
    ("one", edited("dog"), {"names": ("dog",), "labels": [0], "box": [2, 3, 8, 8]}),
    ("capitals", edited("DOG"), {"names": ("dog",)}),
    ("unknown", edited("bird"), "--classes: no training dataset has a class 'bird'"),
    ("a typing error", edited("dgo"), "'dgo'; nearest: dog"),
    ("one unknown", edited("dog,bird"), "no training dataset has a class 'bird'"),
    ("twice", edited("dog,dog"), "'dog' twice"),
    ("a comma", edited(","), "has an empty class name"),
    ("blanks", edited(" "), "vocabulary of '--classes' is empty"),
    ("a missing file", edited("gone.txt"), "--classes: gone.txt does not exist"),
    ("rename", renamed("dog = wolf\n"), {"names": ("cat", "wolf"), "log": "1 of 1 names occur"}),
    ("rename with BOM", renamed("\ufeffdog = wolf\n"), {"names": ("cat", "wolf")}),
    ("rename of none", renamed("bird = wolf"), {"names": ("cat", "dog"), "log": "0 of 1 names"}),
    ("rename empty", renamed(""), {"log": "0 of 0 names occur"}),
    (
        "rename twice",
        renamed("dog = wolf\nDog = fox"),
        "--rename DIR/r.txt: 'Dog' has two new names",
    ),
    ("rename to a name there", renamed("dog = cat"), ("DIR/r.txt", "'cat' twice")),
    ("rename of a swap", renamed("dog = cat\ncat = dog"), {"names": ("dog", "cat")}),
    ("rename without =", renamed("dog wolf"), "--rename DIR/r.txt: 'dog wolf = ' lacks a name"),
    ("rename of two =", renamed("dog = a = b"), {"names": ("cat", "a = b")}),
    ("rename to nothing", renamed("dog ="), "'dog = ' lacks a name; write both"),
    ("rename of nothing", renamed("= wolf"), "' = wolf' lacks a name; write both"),
    ("rename with an arrow", renamed("dog -> wolf"), "lacks a name; write both"),
    ("rename of bytes", renamed(b"dog = w\xff"), BAD_FILE),
    ("rename in UTF-16", renamed("dog = wolf".encode("utf-16")), BAD_FILE),
    ("json", renamed({"dog": "wolf"}, "json"), {"names": ("cat", "wolf")}),
    ("json cut off", renamed('{"dog": ', "json"), BAD_JSON),
    ("json a list", renamed([["dog", "wolf"]], "json"), BAD_JSON),
    ("json of numbers", renamed({"dog": 5}, "json"), BAD_JSON),
    ("json of null", renamed({"dog": None}, "json"), BAD_JSON),
    ("json of lists", renamed({"dog": ["wolf"]}, "json"), BAD_JSON),
    ("json empty name", renamed({"dog": " "}, "json"), "lacks a name; write both"),
    (
        "json field twice",
        renamed('{"dog": "a", "dog": "b"}', "json"),
        "DIR/r.json: 'dog' has two new names",
    ),
    ("json nested deep", renamed(nested(), "json"), BAD_JSON),
    ("40 names", edited(", ".join(f"class {i}" for i in range(40))), "a class 'class 0'"),
    ("rename of 1 MB", renamed("x" * 10**6), ("DIR/r.txt", "lacks a name")),
    ("rename a folder", lambda folder: edited("", "", "d/r.txt")(folder), {"log": "0 of 0"}),
    ("rename missing", lambda folder: edit_classes([], "", f"{folder}/gone", "train"), "DIR/gone"),
]

# -- text embeddings


def rows(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(array), **options)
    return file.getvalue()


def promised(header: str, data: bytes = b"") -> bytes:
    """Returns a .npy file with any header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


def table(content: bytes | str, encoder: str = "DIR/t.npy") -> Callable[[Path], dict]:
    """The text of cat and dog is in DIR/t.npy."""

    def attempt(folder: Path) -> dict:
        write(folder / "t.npy", content)
        text = embed(["cat", "dog"], encoder.replace("DIR", str(folder)), dataset="mine")
        space = LabelSpace([Vocabulary("mine", ("cat", "dog"), text=text)])
        return {"rows": space.text.shape[0], "norms": space.text.norm(dim=1).round().tolist()}

    return attempt


ARRAY = np.eye(2, 5)
SOUND = {"rows": 2, "norms": [1.0, 1.0]}
NPY = "DIR/t.npy"
TABLES = [
    ("sound", table(rows(ARRAY)), SOUND),
    ("for the dataset", table(rows(ARRAY), "mine=DIR/t.npy,coco=gone.npy"), SOUND),
    ("for another dataset", table(rows(ARRAY), "coco=DIR/t.npy"), "no .npy file for 'mine', only"),
    ("half precision", table(rows(ARRAY.astype(np.float16))), SOUND),
    ("big-endian", table(rows(ARRAY.astype(">f4"))), SOUND),
    ("integers", table(rows(ARRAY.astype(int))), SOUND),
    ("Fortran order", table(rows(np.asfortranarray(ARRAY))), SOUND),
    ("huge values", table(rows(ARRAY * 1e38)), "a row that is zero or not finite"),
    ("values beyond float32", table(rows(ARRAY * 1e300)), "a row that is zero or not finite"),
    ("missing", table("", "DIR/gone.npy"), "DIR/gone.npy: "),
    ("empty", table(""), NPY),
    ("text", table("text"), NPY),
    ("cut off", table(rows(ARRAY)[:-9]), NPY),
    ("a row too many", table(rows(np.eye(3))), f"{NPY} holds 3 rows, but there are 2 class names"),
    ("one dimension", table(rows([1.0, 2.0])), "an array of 1 dimensions"),
    ("no dimension", table(rows(1.0)), "an array of 0 dimensions"),
    ("three dimensions", table(rows(np.ones((2, 2, 2)))), "an array of 3 dimensions"),
    ("no columns", table(rows(np.ones((2, 0)))), NPY),
    ("NaN", table(rows(ARRAY * np.nan)), "a row that is zero or not finite"),
    ("a row of zeros", table(rows(np.zeros((2, 5)))), "a row that is zero or not finite"),
    ("texts", table(rows([["a", "b"], ["c", "d"]])), NPY),
    ("numbers as texts", table(rows([["1", "2"], ["3", "4"]])), {}),
    ("dates", table(rows(np.zeros((2, 2), "datetime64[s]"))), NPY),
    ("complex", table(rows(ARRAY * 1j)), NPY),
    ("records", table(rows(np.zeros(2, "f4,f4"))), NPY),
    ("objects", table(rows([{}, {}], allow_pickle=True)), NPY),
    (
        "1.8 PiB",
        table(promised("{'descr': '<f4', 'fortran_order': False, 'shape': (10**15, 9)}")),
        NPY,
    ),
    (
        "2 PB",
        table(promised("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 512)}")),
        NPY,
    ),
    (
        "negative shape",
        table(promised("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 5)}")),
        NPY,
    ),
    ("code in the header", table(promised("__import__('os').getcwd()")), NPY),
    ("a header nested deep", table(promised("(" * 99)), NPY),
    ("a zip of arrays", table(b"PK\x03\x04" + bytes(99)), NPY),
    ("gzip", table(b"\x1f\x8b\x08" + bytes(99)), NPY),
]

# -- counts of detections

COUNTS = {"names": ["cat", "dog"], "counts": [3, 5]}


def prior(changes: dict) -> Callable[[Path], dict]:
    return prior_text(changed(COUNTS, changes))


def prior_text(content, file: str = "p.json") -> Callable[[Path], dict]:
    def attempt(folder: Path) -> dict:
        write(folder / "p.json", content)
        vocabulary, counts = read_prior(str(folder / file), Vocabulary("mine", ("dog", "cat")))
        return {"names": vocabulary.names, "counts": counts.tolist()}

    return attempt


NO_PRIOR = "prior DIR/p.json cannot be read"
PRIORS = [
    ("sound", prior({}), {"names": ("dog", "cat"), "counts": [5.0, 3.0]}),
    ("missing", prior_text("", "gone.json"), "prior DIR/gone.json cannot be read"),
    ("empty", prior_text(""), NO_PRIOR),
    ("a list", prior_text([1]), NO_PRIOR),
    ("a number", prior_text("5"), NO_PRIOR),
    ("nested deep", prior_text(nested()), NO_PRIOR),
    ("bytes", prior_text(b"\xff"), NO_PRIOR),
    ("no counts", prior({"counts": DROP}), NO_PRIOR),
    ("counts null", prior({"counts": None}), NO_PRIOR),
    ("a count too few", prior({"counts": [3]}), NO_PRIOR),
    ("a count of NaN", prior_text('{"names": ["cat", "dog"], "counts": [NaN, 5]}'), NO_PRIOR),
    ("a count of 1e999", prior_text('{"names": ["cat", "dog"], "counts": [1e999, 5]}'), NO_PRIOR),
    ("a negative count", prior({"counts.0": -1}), NO_PRIOR),
    ("a count of 400 digits", prior({"counts.0": 10**400}), NO_PRIOR),
    ("a count a text", prior({"counts.0": "many"}), NO_PRIOR),
    ("a count a list", prior({"counts.0": [3]}), NO_PRIOR),
    ("a count null", prior({"counts.0": None}), NO_PRIOR),
    ("names a text", prior({"names": "ab"}), "it lacks 'dog'"),
    ("a name a number", prior({"names.0": 5}), NO_PRIOR),
    ("a name null", prior({"names.0": None}), NO_PRIOR),
    ("a name twice", prior({"names.0": "dog"}), ("DIR/p.json", "lacks 'cat'")),
    ("other names", prior({"names.0": "bird"}), "of another vocabulary: it lacks 'cat'"),
]
GROUPS = {"--vocabulary": NAMES, "--classes": CLASSES, "text file": TABLES, "prior": PRIORS}
CASES = [
    Case(f"{group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
