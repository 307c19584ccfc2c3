"""Images inside of tar files: what is read is what was packed, and a damaged tar gets a line."""

import gzip
import io
import json
import logging
import os
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image

from common.datasets import load_datasets, shards
from common.datasets.check import check_names
from common.errors import InputError
from common.files import cache_dir
from common.sampling import Transformed


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))


def picture(red: int) -> bytes:
    """A PNG of 4 x 5 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (red, 0, 0)).save(file, "png")
    return file.getvalue()


def pack(path, members: dict[str, bytes], **change):
    """A tar of such files; `change` are fields of each header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in change.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def load(root):
    return load_datasets(f"mine={root}/", "train", accepts=("image_labels",))[0]


def seen(dataset) -> list[tuple[str, int]]:
    """(class, red) of each image."""
    items = [dataset.load(i) for i in range(len(dataset))]
    return [(dataset.vocabulary.names[s.image_labels.item()], int(s.image[0, 0, 0])) for s in items]


def imagenet(root):
    """ImageNet-21K as it is published: n01440764.tar and so on, images inside."""
    pack(root / "n00000002.tar", {"n00000002_1.JPEG": picture(20), "n00000002_2.JPEG": picture(21)})
    pack(
        root / "n00000001.tar",
        {"n00000001_9.JPEG": picture(10), "notes.md": b"?", "._n00000001_9.JPEG": b"?"},
    )
    pack(root / "n00000003.tar", {})
    (root / "notes.md").touch()
    (root / "words.txt").write_text("n00000001\ttench, Tinca tinca\nn00000002\tcrane\n")


def test_a_tar_for_each_class(tmp_path, caplog):
    root = tmp_path / "imagenet/ImageNet-21K"
    imagenet(root)
    with caplog.at_level(logging.INFO, "concord"):
        (dataset,) = load_datasets("in21k", "train", str(tmp_path), accepts=("image_labels",))
    assert seen(dataset) == [("tench", 10), ("crane", 20), ("crane", 21)]
    assert dataset.vocabulary.ids == (
        "n00000001",
        "n00000002",
    ) and dataset.image_counts().tolist() == [1, 2]
    assert dataset.index.file_name(2) == "n00000002.tar/n00000002_2.JPEG" and dataset.load(
        0
    ).size == (4, 5)
    for line in (
        "n00000001.tar: 1 members that are neither",
        "1 tar files without an image",
        "1 entries beside",
    ):
        assert line in caplog.text


def test_long_names_and_folders(tmp_path):
    long = "ä" * 150  # pax and GNU tars keep such names in blocks of their own
    pack(tmp_path / "a/cat.tar", {f"./below/{long}.png": picture(3), "b.JPG": picture(4)})
    assert seen(load(tmp_path / "a")) == [("cat", 3), ("cat", 4)]
    assert load(tmp_path / "a").index.file_name(0) == f"cat.tar/below/{long}.png"


def mixed(root, labels, ending="cls"):
    """Pairs KEY.png and KEY.`ending`, two in a tar; red is the number of the pair."""
    for i in range(0, len(labels), 2):
        pairs = {}
        for k, label in enumerate(labels[i : i + 2], i):
            pairs |= {f"{k:03d}.png": picture(k)} | (
                {f"{k:03d}.{ending}": label} if label is not None else {}
            )
        pack(root / f"{i:05d}.tar", pairs)
    return root


def test_pairs_of_image_and_label(tmp_path, caplog):
    root = mixed(tmp_path / "a", [b"dog\n", b"cat", None, b"dog"])
    with caplog.at_level(logging.INFO, "concord"):
        dataset = load(root)
    assert seen(dataset) == [("dog", 0), ("cat", 1), ("dog", 3)] and dataset.vocabulary.names == (
        "cat",
        "dog",
    )
    assert "1 images without a label are left out" in caplog.text
    root = mixed(
        tmp_path / "b", [json.dumps({"label": label}).encode() for label in (2, 10, 2)], "json"
    )
    (root / "classes.txt").write_text("\n".join(f"c{i}" for i in range(11)))
    dataset = load(root)
    assert seen(dataset) == [("c2", 0), ("c10", 1), ("c2", 2)] and len(dataset.vocabulary) == 11
    pack(
        tmp_path / "c/0.tar",
        {"1.json": b'{"label": "no"}', "1.cls": b"cat", "1.png": picture(1), "1.json5": b""},
    )
    pack(tmp_path / "c/1.tar", {"1.png": picture(2), "1.cls": b"dog", "1.json": b"[]"})
    assert seen(load(tmp_path / "c")) == [("cat", 1), ("dog", 2)]
    pack(
        tmp_path / "d/0.tar", {"k1.jpg": picture(1), "k1.seg.png": picture(2), "k1.cls": b"cat"}
    )  # a key ends at a dot
    pack(tmp_path / "d/1.tar", {"k.2.png": picture(3), "k.cls": b"dog", "k.png": picture(4)})
    with caplog.at_level(logging.INFO, "concord"):
        assert seen(load(tmp_path / "d")) == [("cat", 1), ("dog", 4)]
    assert "0.tar: 1 members that are neither images nor labels" in caplog.text
    pack(tmp_path / "e/cat.tar", {"a.b.png": picture(5)})  # no pairs, so names may have dots
    assert seen(load(tmp_path / "e")) == [("cat", 5)]
    for label in ("9" * 30, "9" * 5000):
        pack(tmp_path / "f/0.tar", {"1.png": picture(1), "1.cls": label.encode()})
        (tmp_path / "f/classes.txt").write_text("cat\n")
        with pytest.raises(
            InputError, match=r"have the label 99999999999999999999, but classes.txt has 1 lines"
        ):
            load(tmp_path / "f")


def test_zipped_images(tmp_path):
    pack(tmp_path / "a/cat.tar", {"1.JPEG": gzip.compress(picture(7))})
    assert seen(load(tmp_path / "a")) == [("cat", 7)]
    pack(tmp_path / "a/cat.tar", {"1.JPEG": gzip.compress(picture(7))[:40]})
    with pytest.raises(InputError, match=r"cat\.tar cannot be read"):
        load(tmp_path / "a").load(0)


def test_workers_read_in_any_order(tmp_path):
    for name in ("a", "b", "c"):
        pack(tmp_path / f"x/{name}.tar", {f"{i}.png": picture(i) for i in range(20)})
    rows = np.random.default_rng(0).permutation(60).tolist()
    items = Transformed(load(tmp_path / "x"), lambda sample: sample.image[0, 0, 0].item(), rows)
    loader = torch.utils.data.DataLoader(items, None, num_workers=2)
    assert list(loader) == [row % 20 for row in rows]


def test_the_index_is_made_once_and_again_for_a_tar_that_changed(tmp_path, monkeypatch):
    root = tmp_path / "x"
    for name in ("a", "b"):
        pack(root / f"{name}.tar", {"1.png": picture(1)})
    read, calls = shards.read_members, []
    monkeypatch.setattr(shards, "read_members", lambda path: calls.append(path.name) or read(path))
    assert seen(load(root)) == seen(load(root)) == [("a", 1), ("b", 1)] and calls == [
        "a.tar",
        "b.tar",
    ]
    pack(root / "b.tar", {"0.png": picture(5), "1.png": picture(1)})
    assert seen(load(root)) == [("a", 1), ("b", 5), ("b", 1)] and calls == [
        "a.tar",
        "b.tar",
        "b.tar",
    ]
    for file in (cache_dir() / "shards").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert len(load(root)) == 3 and calls[3:] == ["a.tar", "b.tar"]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "file"))
    pack(tmp_path / "x/a.tar", {"1.png": picture(1)})
    assert seen(load(tmp_path / "x")) == [("a", 1)] and "cannot be written" in caplog.text


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: pack(p, {"../1.png": b""}), "member '../1.png' leaves the folder; pack it anew"),
        (lambda p: pack(p, {"/1.png": b""}), "member '/1.png' leaves the folder"),
        (lambda p: pack(p, {"notes.txt": b""}), "hold no images with labels"),
        (lambda p: pack(p, {"1.png": b"", "1.cls": b"\xff\xfe"}), "member '1.cls' holds no label"),
        (lambda p: pack(p, {"1.png": b"", "1.json": b"{"}), "member '1.json' holds no label"),
        (
            lambda p: pack(p, {"1.png": b"", "1.json": b'{"label": [1]}'}),
            r"holds no label, .*\(\[1\]\)",
        ),
        (
            lambda p: pack(p, {"1.png": b"", "1.cls": b"7"}),
            "numbers for labels; name the classes in .*classes.txt",
        ),
        (
            lambda p: pack(p.with_name("00012.tar"), {"1.png": b""}),
            "00012.tar: a number is no class",
        ),
        (
            lambda p: pack(p.with_name("n00000001.tar"), {"1.png": b""}),
            "n00000001 is a WordNet id without a name",
        ),
        (lambda p: pack(p, {"1.png": b""}, type=tarfile.SYMTYPE), "hold no images"),
        (lambda p: p.write_bytes(b""), "is no whole tar file"),
        (lambda p: p.write_bytes(b"x" * 2000), "is no whole tar file"),
        (
            lambda p: p.write_bytes(gzip.compress(pack(p, {"1.png": b""}).read_bytes())),
            "or a compressed one",
        ),
        (lambda p: cut(pack(p, {"1.png": bytes(3000)}), 2000), "is no whole tar file"),
        (lambda p: cut(pack(p, {"1.png": b""}), 512), "neither a header nor the end at byte 512"),
        (
            lambda p: os.truncate(pack(p, {"1.png": bytes(600), "2.png": bytes(600)}), 1536),
            "at byte 1536",
        ),
    ],
)
def test_bad_tars(tmp_path, make, words):
    (tmp_path / "x").mkdir()
    make(tmp_path / "x/cat.tar")
    with pytest.raises(InputError, match=words) as error:
        load(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


def sparse(path, name, size):
    """A tar file with one GNU sparse member: 512 bytes that stand for `size`."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    member.size = 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512  # one piece: its place and its length
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(512 + 1024))
    return path


@pytest.mark.parametrize("name", ["1.cls", "1.json", "1.jpg"])
def test_a_sparse_member_is_not_expanded(tmp_path, name):
    (tmp_path / "x").mkdir()
    sparse(tmp_path / "x/cat.tar", name, 2**40)
    with pytest.raises(InputError, match=f"'{name}' is sparse; pack it without --sparse"):
        load(tmp_path / "x")


def test_a_label_or_image_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST_LABEL", 100)
    monkeypatch.setattr(shards, "LARGEST_IMAGE", 1000)
    pack(tmp_path / "x/cat.tar", {"1.png": picture(1), "1.cls": b"c" * 101})
    with pytest.raises(InputError, match=r"'1\.cls' has 101 bytes, and 100 are the most"):
        load(tmp_path / "x")
    pack(tmp_path / "y/cat.tar", {"1.png": bytes(1001)})
    with pytest.raises(InputError, match=r"'1\.png' has 1001 bytes, and 1000 are the most"):
        load(tmp_path / "y")


def test_a_header_that_promises_a_terabyte_is_one_line(tmp_path):
    member = tarfile.TarInfo("a")
    member.type = tarfile.XHDTYPE
    member.size = 2**40
    (tmp_path / "x").mkdir()
    (tmp_path / "x/cat.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match="is no whole tar file"):
        load(tmp_path / "x")


def test_a_gzip_bomb_is_not_unzipped(tmp_path, monkeypatch):
    """4 MB of zeros from 4 KB; the memory that is taken is that of the limit."""
    monkeypatch.setattr(shards, "LARGEST_IMAGE", 50_000)
    pack(tmp_path / "x/cat.tar", {"1.jpg": gzip.compress(bytes(4_000_000))})
    dataset = load(tmp_path / "x")
    tracemalloc.start()
    with pytest.raises(InputError, match=r"cat\.tar cannot be read at byte 512 \(an image of more"):
        dataset.load(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_headers_overwritten_in_the_middle(tmp_path):
    path = pack(tmp_path / "x/cat.tar", {f"{i}.png": picture(i) for i in range(4)})
    data = bytearray(path.read_bytes())
    data[2048:2560] = b"x" * 512  # tarfile itself would end there in silence
    path.write_bytes(data)
    with pytest.raises(InputError, match="neither a header nor the end at byte 2048"):
        load(tmp_path / "x")


def test_a_label_beyond_the_list_of_classes(tmp_path):
    (mixed(tmp_path / "x", [b"0", b"3"]) / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"the label 3, but classes\.txt has 2 lines"):
        load(tmp_path / "x")


def test_what_is_broken_or_gone_later(tmp_path):
    path = pack(tmp_path / "x/cat.tar", {"1.png": b"no image", "2.png": picture(1)})
    dataset = load(tmp_path / "x")
    with pytest.raises(InputError, match=r"image .*x/cat\.tar/1\.png cannot be decoded"):
        dataset.load(0)
    path.unlink()
    with pytest.raises(InputError, match=r"shard .*cat\.tar cannot be read at byte"):
        dataset.load(1)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")
def test_real_images_are_the_same_in_folders_and_tars(tmp_path):
    source, root = REAL / "imagenet_folder", tmp_path / "x"
    root.mkdir()
    shutil.copy(source / "classes.csv", root)
    for folder in filter(os.path.isdir, source.iterdir()):
        with tarfile.open(root / f"{folder.name}.tar", "w") as tar:
            tar.add(folder, "")
    folders, tars = load(source), load(root)
    assert len(tars) == 200 and tars.vocabulary == folders.vocabulary
    assert np.array_equal(tars.index.image_labels, folders.index.image_labels)
    assert all(torch.equal(tars.load(i).image, folders.load(i).image) for i in range(0, 200, 20))


# -- images of datasets with boxes -----------------------------------------------------------------


def boxed(tmp_path, names=("a.png", "b.png", "sub/c.png")):
    """A COCO json of images with these names, a box each. Their red is 10, 11, 12."""
    images = [{"id": i, "file_name": n, "height": 4, "width": 5} for i, n in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 2, 2]} for i in range(3)]
    record = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    return {name: picture(10 + i) for i, name in enumerate(names)}


def reds(folder, place) -> list[int]:
    """The red of each image of that COCO json, with its images at `place`."""
    [dataset] = load_datasets(f"mine={folder}/boxes.json:{folder}/{place}", "val")
    loaded = [dataset.load(i) for i in range(len(dataset))]
    assert all(sample.boxes.tolist() == [[0, 0, 2, 2]] for sample in loaded)
    return [int(sample.image[0, 0, 0]) for sample in loaded]


def test_images_of_boxes_in_one_tar_in_a_folder_and_in_braces(tmp_path, caplog):
    """The tars of a dataset with boxes may have numbers for names, and all kinds of members."""
    images = boxed(tmp_path)
    first = {"other.png": picture(1), "a.json": b'{"label": [3]}', "a.png": images["a.png"]}
    rest = {"sub/c.png": images["sub/c.png"], "b.png": images["b.png"]}
    pack(tmp_path / "whole.tar", first | rest)
    pack(tmp_path / "parts/007.tar", first)
    pack(tmp_path / "parts/008.tar", rest)
    (tmp_path / "parts/notes.txt").touch()
    for place in ("whole.tar", "parts", "parts/{007..008}.tar"):
        with caplog.at_level(logging.INFO, "concord"):
            assert reds(tmp_path, place) == [10, 11, 12]
        tars = 1 if place == "whole.tar" else 2
        line = f"mine: its images are read from {tars} tar files, in which 1 images are not listed"
        assert line in caplog.messages
        caplog.clear()


def test_members_are_found_by_their_last_part_if_it_is_clear(tmp_path):
    images = boxed(tmp_path, ("train/a.png", "b.png", "val/c.png"))
    images = {"a.png": images["train/a.png"], "x/b.png": images["b.png"], **images}
    del images["train/a.png"], images["b.png"]
    pack(tmp_path / "whole.tar", images)
    assert reds(tmp_path, "whole.tar") == [10, 11, 12]
    pack(tmp_path / "twice.tar", images | {"y/b.png": picture(1)})
    with pytest.raises(InputError, match=r"b.png is missing \(1 of 3"):
        reds(tmp_path, "twice.tar")
    boxed(tmp_path, ("train/a.png", "test/a.png", "val/c.png"))
    with pytest.raises(InputError, match=r"train/a.png is missing \(2 of 3"):
        reds(tmp_path, "whole.tar")


def test_no_image_is_read_but_those_asked_for(tmp_path, monkeypatch):
    """The headers are read once; then one image at a time, by its place."""
    pack(tmp_path / "whole.tar", boxed(tmp_path))
    assert reds(tmp_path, "whole.tar") == [10, 11, 12]
    text = f"mine={tmp_path}/boxes.json:{tmp_path}/whole.tar"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_read_headers", None)
        [dataset] = load_datasets(text, "val")
    spans, size = [], (tmp_path / "whole.tar").stat().st_size
    read = shards.Shards.read

    def spy(self, i):
        spans.append(self.sizes[i])
        return read(self, i)

    monkeypatch.setattr(shards.Shards, "read", spy)
    part = dataset.select(np.array([False, True, False]))
    assert int(part.load(0).image[0, 0, 0]) == 11
    assert spans == [len(picture(11))] and spans[0] < size / 10


def test_tars_that_do_not_fit_are_one_line(tmp_path):
    images = boxed(tmp_path)
    pack(tmp_path / "none.tar", {"notes.txt": b"?"})
    pack(tmp_path / "a/0.tar", images)
    pack(tmp_path / "a/1.tar", {"a.png": picture(1)})
    for place, words in [
        ("none.tar", "none.tar/a.png is missing .3 of 3"),
        ("gone.tar", "gone.tar does not exist"),
        ("a/{0..2}.tar", "2.tar does not exist"),
        ("a", "two members are 'a.png'"),
    ]:
        with pytest.raises(InputError, match=words):
            reds(tmp_path, place)
    (tmp_path / "maps").mkdir()
    with pytest.raises(InputError, match="need a COCO json"):
        load_datasets(f"mine={tmp_path}/maps:{tmp_path}/none.tar", "val")


def test_images_beside_a_tar_are_the_images(tmp_path):
    pack(tmp_path / "images/0.tar", {"a.png": picture(1)})
    for name, data in boxed(tmp_path, ("a.png", "b.png", "c.png")).items():
        (tmp_path / "images" / name).write_bytes(data)
    assert reds(tmp_path, "images") == [10, 11, 12]


def test_a_check_lists_the_images_that_no_tar_has(tmp_path, capsys):
    pack(tmp_path / "whole.tar", {"a.png": boxed(tmp_path)["a.png"]})
    [dataset] = load_datasets(
        f"mine={tmp_path}/boxes.json:{tmp_path}/whole.tar", "val", check=False
    )
    assert check_names(dataset)["missing images"] == ["b.png", "sub/c.png"]
