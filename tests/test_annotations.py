"""Large annotation files, read in runs and memory-mapped later, give what a plain read gives."""

import json
import logging
import multiprocessing
import os
import random
import sys
import time
from dataclasses import fields, replace
from itertools import islice
from threading import Event, Thread

import numpy as np
import orjson
import pytest
import torch
from conftest import REAL
from filelock import FileLock

from common import files
from common.command import run_command
from common.datasets import load_datasets, store
from common.datasets.files import missing_files
from common.datasets.index import JsonRows
from common.datasets.readers import coco
from common.datasets.readers.coco import read_coco
from common.datasets.stream import read_fields, read_json
from common.errors import InputError
from common.sampling import ClassAwareSampler, repeat_factors

# -- runs of elements

PIECES = [
    "}",
    "},",
    "]",
    "],",
    '"',
    "\\",
    '\\"}, ',
    '{"',
    " ]} ,",
    "é€",
    "\U0001f600",
    "\n",
    "x" * 90,
]


def awkward(rng: random.Random, depth: int = 0):
    kind = rng.random()
    if depth > 2 or kind < 0.2:
        return rng.choice([1, -2.5, True, None, 1e20])
    if kind < 0.5:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 4)))
    if kind < 0.7:
        return [awkward(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {f"{rng.choice(PIECES)}{i}": awkward(rng, depth + 1) for i in range(rng.randint(0, 3))}


def awkward_text(rng: random.Random) -> str:
    names = rng.sample(
        ["images", "annotations", "categories", "info", 'a "name"'], rng.randint(0, 5)
    )
    record = {name: [awkward(rng) for _ in range(rng.randint(0, 8))] for name in names} | {
        "other": awkward(rng)
    }
    layout = rng.choice(
        [{}, {"indent": 2}, {"separators": (",", ":")}, {"separators": (" ,\t", "\n: ")}]
    )
    return (
        rng.choice(["", " \n"])
        + json.dumps(record, ensure_ascii=rng.random() < 0.5, **layout)
        + "\n"
    )


def joined(path, chunk):
    record = {}
    for field, value in read_fields(path, chunk):
        record[field] = [*record.get(field, []), *value] if isinstance(value, list) else value
    return record


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_runs_are_what_the_whole_file_holds(tmp_path, chunk):
    rng = random.Random(chunk)
    for _ in range(60):
        (tmp_path / "a.json").write_text(awkward_text(rng))
        assert joined(tmp_path / "a.json", chunk) == read_json(tmp_path / "a.json")


def test_what_is_broken_is_refused_as_when_read_whole(tmp_path):
    rng, path, refused = random.Random(0), tmp_path / "a.json", 0
    for _ in range(150):
        text = awkward_text(rng).encode()
        at = rng.randrange(len(text))
        noise = rng.choice([b"", b"", b"}", b"]", b",", b'"', b"\xff", b"NaN"])
        path.write_bytes(
            text[:at]
            + noise
            + (text[at + rng.randint(0, 1) :] if noise or rng.random() < 0.5 else b"")
        )
        try:
            expected = read_json(path)
        except InputError:
            refused += 1
            with pytest.raises(InputError, match=r"is (not valid json|no UTF-8 text)"):
                joined(path, 64)
        else:
            assert joined(path, 64) == expected
    assert 50 < refused < 150


def test_lists_come_in_many_runs_and_empty_ones_once(tmp_path):
    record = {"a": [{"id": i} for i in range(100)], "b": [], "c": {"d": []}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    runs = list(read_fields(tmp_path / "a.json", 64))
    assert max(len(run) for field, run in runs if field == "a") < 30
    assert runs[-2:] == [("b", []), ("c", {"d": []})]


def test_elements_that_hold_many_objects(tmp_path):
    record = {
        "a": [[{"id": i} for i in range(500)] for _ in range(5)],
        "b": [{"c": [{"id": i} for i in range(500)]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    for chunk in (64, 4096):
        assert joined(tmp_path / "a.json", chunk) == record


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "holds a json list; a COCO-format json object is needed"),
        ("", "is not valid json"),
        ('{"images": [{"id": 1}', "not valid json .*was it cut off"),
        ('{"images": [{"id": 1},]}', "not valid json .*trailing comma"),
        ('{"images": [], "images": []}', "'images' comes twice"),
        ('{"images": []} x', "unexpected content"),
    ],
)
def test_broken_files(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=words):
        joined(tmp_path / "a.json", 64)


# -- columns in the cache

CATEGORIES = [
    {"id": 9, "name": "dog", "frequency": "c"},
    {"id": 4, "name": "cat", "frequency": "r"},
]


def write(path, order=("info", "images", "annotations", "categories"), seed=0, count=30, **lists):
    """A json with awkward strings, crowds, masks and what LVIS adds; the images are empty files."""
    rng = random.Random(seed)
    (path.parent / "images" / "sub").mkdir(parents=True, exist_ok=True)
    names = [f"sub/{i}.jpg" if i % 3 else f"é{i}.jpg" for i in range(count)]
    record = {
        "info": {"by": '"}], '},
        "images": [
            {
                "id": f"im{i}" if i % 2 else i,
                "file_name": name,
                "height": 50,
                "width": 60 + i,
                "neg_category_ids": [9],
            }
            for i, name in enumerate(names)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": f"im{row}" if (row := rng.randrange(count)) % 2 else row,
                "category_id": rng.choice([9, 4, 4, 4]),
                "bbox": [rng.randint(0, 70), rng.random() * 9, rng.random() * 30, 5],
                "segmentation": rng.choice(
                    [[[1, 2.5, 3, 4, 5, 6]], {"size": [50, 60], "counts": "a}, b]"}]
                ),
                "iscrowd": int(rng.random() < 0.2),
            }
            | ({"area": rng.random()} if i % 2 else {})
            for i in range(200)
        ],
        "categories": CATEGORIES,
    } | lists
    for name in names:
        (path.parent / "images" / name).touch()
    path.write_text(json.dumps({field: record[field] for field in order}))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of columns; files of any size are kept there."""
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LARGE", 0)
    return tmp_path / "cache" / "annotations"


@pytest.fixture
def conversions(monkeypatch):
    """The files that were converted so far."""
    done, read = [], coco.read_index
    monkeypatch.setattr(
        coco, "read_index", lambda name, path, *rest: done.append(path) or read(name, path, *rest)
    )
    return done


def load(path, metric="lvis"):
    return read_coco("my", path, path.parent / "images", metric)


def assert_equal(one, two):
    assert (one.vocabulary, one.frequency, one.supervision) == (
        two.vocabulary,
        two.frequency,
        two.supervision,
    )
    for field in fields(one.index):
        a, b = (getattr(dataset.index, field.name) for dataset in (one, two))
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and np.array_equal(a, b), field.name
        elif isinstance(a, JsonRows):
            assert list(a) == list(b), field.name
        elif field.name != "folder":
            assert a == b, field.name
    assert all(map(np.array_equal, one.index.by_label, two.index.by_label))
    assert (
        one.summary() == two.summary()
        and one.image_counts().tolist() == two.image_counts().tolist()
    )


def test_cached_columns_are_those_read_from_the_file(tmp_path, cache, conversions, monkeypatch):
    path = write(tmp_path / "a.json")
    first, second = load(path), load(path)
    assert (
        len(conversions) == 1
        and first.index.folder == second.index.folder
        and first.index.folder.parent == cache
    )
    boxes = second.index.boxes
    while not isinstance(boxes, np.memmap):
        boxes = boxes.base
    assert not second.index.boxes.flags.writeable
    monkeypatch.setattr(store, "LARGE", 1 << 30)
    plain = load(path)
    assert plain.index.folder is None and len(conversions) == 2
    assert_equal(plain, first)
    assert_equal(plain, second)
    record = orjson.loads(path.read_bytes())
    assert list(second.index.image_ids) == [image["id"] for image in record["images"]]
    for i, image in enumerate(record["images"]):
        entries = [entry for entry in record["annotations"] if entry["image_id"] == image["id"]]
        rows = range(second.index.offsets[i], second.index.offsets[i + 1])
        assert [second.index.segmentations[row] for row in rows] == [
            entry["segmentation"] for entry in entries
        ]
        assert [second.vocabulary.ids[second.index.labels[row]] for row in rows] == [
            e["category_id"] for e in entries
        ]
        assert second.index.ignore[rows].tolist() == [entry["iscrowd"] for entry in entries]
        areas = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in entries]
        assert second.index.areas[rows].tolist() == pytest.approx(areas)
    assert list(second.index.negatives) == [[1]] * 30 and second.vocabulary.names == ("cat", "dog")


@pytest.mark.parametrize(
    "order",
    [("annotations", "categories", "images"), ("categories", "annotations", "info", "images")],
)
def test_the_lists_come_in_any_order(tmp_path, order):
    usual = load(write(tmp_path / "a.json"))
    assert_equal(usual, load(write(tmp_path / "a.json", order)))


def test_tagged_images_are_cached(tmp_path, cache, conversions):
    images = [
        {
            "id": 1,
            "file_name": "1.jpg",
            "pos_category_ids": [9, 4],
            "captions": ["a cat", "and a dog"],
        },
        {"id": 2, "file_name": "2.jpg"},
    ]
    path = write(tmp_path / "a.json", order=("images", "categories"), images=images)
    for _ in range(2):
        index = load(path, "coco").index
        assert index.image_labels.tolist() == [0, 1] and index.image_label_offsets.tolist() == [
            0,
            2,
            2,
        ]
        assert list(index.captions) == [["a cat", "and a dog"], []]
    assert len(conversions) == 1


def test_the_hash_decides_where_only_the_time_changed(tmp_path, cache, conversions, monkeypatch):
    path = write(tmp_path / "a.json")
    load(path)
    hashed = []
    monkeypatch.setattr(
        store, "_hash", lambda path, hash=store._hash: hashed.append(path) or hash(path)
    )
    load(path)
    assert not hashed
    os.utime(path, (1, 1))
    load(path), load(path)
    assert len(conversions) == len(hashed) == 1  # the new time is remembered
    path.write_bytes(path.read_bytes().replace(b'"dog"', b'"cow"'))
    os.utime(path, (2, 2))
    assert load(path).vocabulary.names == ("cat", "cow") and len(conversions) == 2
    hashed.clear()
    write(path, seed=1, count=31)
    assert (
        len(load(path)) == 31 and len(conversions) == 3 and len(hashed) == 1
    )  # another size; for the record alone
    assert sum(entry.is_dir() for entry in cache.iterdir()) == 1


def test_another_version_or_option_is_converted_for_itself(
    tmp_path, cache, conversions, monkeypatch
):
    path = write(tmp_path / "a.json")
    load(path)
    read_coco("my", path, tmp_path, "coco", only_masks=True)
    monkeypatch.setattr(store, "VERSION", -1)
    load(path)
    assert len(conversions) == 3


def damage_cut(folder):
    os.truncate(folder / "boxes.npy", 200)


def damage_empty(folder):
    (folder / "labels.npy").write_bytes(b"")


def damage_other(folder):
    np.save(folder / "boxes.npy", np.zeros((3, 4), np.float32))


def damage_gone(folder):
    (folder / "sizes.npy").unlink()


def damage_header(folder):
    data = (folder / "boxes.npy").read_bytes()
    (folder / "boxes.npy").write_bytes(data.replace(b"(200, 4), }", b"(200, 4(, }"))


def damage_blob(folder):
    os.truncate(folder / "blob.bin", 10)


def damage_facts(folder):
    (folder / "facts.json").write_text("[1, ")


@pytest.mark.parametrize(
    "damage",
    [damage_cut, damage_empty, damage_other, damage_gone, damage_header, damage_blob, damage_facts],
    ids=lambda d: d.__name__,
)
def test_a_damaged_cache_is_made_again(tmp_path, cache, conversions, damage):
    path = write(tmp_path / "a.json")
    first = load(path)
    damage(first.index.folder)
    again = load(path)
    assert len(conversions) == 2 and again.index.folder == first.index.folder
    load(path)
    assert len(conversions) == 2
    assert len(list(again.index.segmentations)) == 200


def test_an_interrupted_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.json")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(path)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    bad = write(tmp_path / "b.json", categories=CATEGORIES[:1])
    with pytest.raises(InputError, match="unknown category_id 4; list it in 'categories'"):
        load(bad)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_what_a_killed_process_left_is_removed(tmp_path, cache):
    path = write(tmp_path / "a.json")
    folder = load(path).index.folder
    left, other = (cache / f".{name}-77-12345678" for name in (folder.name, "another"))
    left.mkdir(), other.mkdir()
    write(path, seed=1)
    assert load(path).index.folder == folder and not left.exists() and other.exists()


def test_who_waits_for_another_process_says_so(tmp_path, cache, caplog):
    path = write(tmp_path / "a.json")
    lock = FileLock(load(path).index.folder.with_suffix(".lock"))
    write(path, seed=1)
    taken = Event()

    def hold():
        with lock:
            taken.set()
            time.sleep(1.5)

    Thread(target=hold).start()
    taken.wait()
    with caplog.at_level(logging.INFO, "concord"):
        assert len(load(path)) == 30
    assert (
        f"another process reads {path}, and this one waits for it ({lock.lock_file})" in caplog.text
    )


def test_images_and_label_maps_in_one_folder_are_looked_for_apart(tmp_path, cache):
    dataset = load(write(tmp_path / "a.json"))
    for folder in (tmp_path / "images", tmp_path / "images/sub"):
        os.utime(folder, (1, 1))
    dataset.check_images()
    index = replace(dataset.index, map_names=np.array([b"lost.png"] * 30))
    with pytest.raises(InputError, match=r"label map .*lost\.png is missing \(30 of 30"):
        replace(dataset, index=index, maps=tmp_path / "images").check_images()


def test_a_cache_that_cannot_be_written_costs_a_line(
    tmp_path, cache, conversions, caplog, monkeypatch
):
    path = write(tmp_path / "a.json")
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    dataset = load(path)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "cannot be written, so" in record.getMessage() and dataset.index.folder is None
    cache.unlink()
    assert_equal(dataset, load(path))


def test_small_files_need_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    load(write(tmp_path / "a.json"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"image_id": 99}, "annotation 7 has the unknown image_id 99; list it in 'images'"),
        ({"category_id": 5}, "annotation 7 has the unknown category_id 5; list it in 'categories'"),
        ({"bbox": [1, 2, 3]}, r"annotation 7 has the bbox \[1, 2, 3\]; four numbers needed"),
        (
            {"bbox": [1, 2, 3, "4"]},
            r"annotation 7 has the bbox \[1, 2, 3, '4'\]; four numbers needed",
        ),
        ({"bbox": [1, 2, 3, None]}, "annotation 7 has the bbox"),
        ({"bbox": [1, 2, -3, 4]}, "image 'é0.jpg' has the box .* NaN or negative size"),
        ({"bbox": None}, "annotation 7 has the bbox None; four numbers needed: x, y, width"),
        ({"iscrowd": 2}, "annotation 7 has the iscrowd 2; write the number 0 or 1"),
        ({"image_id": []}, r"annotation 7 has the image_id \[\]; write one of the ids in 'images'"),
        ({"area": "large"}, "annotation 7 has the area 'large'; write its square pixels"),
        (
            {"area": -3},
            "annotation 7 has the area -3; write its square pixels or leave the field out",
        ),
        ({"area": None}, "annotation 7 has the area None"),
    ],
)
def test_bad_entries(tmp_path, entry, words):
    good = [{"id": i, "image_id": 0, "category_id": 9, "bbox": [1, 2, 3, 4]} for i in range(9)]
    for order in ("images", "annotations", "categories"), ("categories", "annotations", "images"):
        path = write(tmp_path / "a.json", order, annotations=[*good[:7], good[7] | entry, good[8]])
        with pytest.raises(InputError, match=words) as error:
            load(path)
        assert "a.json" in str(error.value)


@pytest.mark.parametrize(
    "images, words",
    [
        ([{"id": 0, "file_name": "a.jpg"}] * 2, "two images share an id"),
        ([{"id": 0, "file_name": "../a.jpg"}], "'../a.jpg' leaves the image folder"),
        ([{"id": 0}], "image 0 has no file_name; write its path"),
        ([7], "an element of 'images' is 7; an object with id and file_name is needed"),
        ([{"file_name": "a.jpg"}], "image 'a.jpg' has no id; give each image a number below"),
        ([{"id": None, "file_name": "a.jpg"}], "image 'a.jpg' has the id None"),
        ([{"id": 3, "file_name": "a.jpg", "width": None}], "image 3 has the width None; write its"),
        ({"id": 0}, "the list 'images' is missing"),
    ],
)
def test_bad_images(tmp_path, images, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / "a.json", images=images, annotations=[]))


def test_base_splits_and_instances_of_a_cached_file(tmp_path, cache):
    whole = load(write(tmp_path / "a.json"))
    kept = whole.index.keep(whole.index.labels == 0)
    assert len(kept.boxes) == len(kept.segmentations) == (whole.index.labels == 0).sum()
    assert kept.by_label[1].tolist() == whole.index.by_label[1][:1].tolist()
    expected = [s for s, label in zip(whole.index.segmentations, whole.index.labels) if label == 0]
    assert (
        list(kept.segmentations) == expected
        and kept.by_label[0].base is not whole.index.by_label[0].base
    )
    entries = [
        {"image_id": 0, "category_id": 4, "bbox": [0, 0, 1, 1], "segmentation": s}
        for s in ([[0] * 6], [], None)
    ]
    path = write(tmp_path / "b.json", annotations=entries)
    for _ in range(2):
        instances = read_coco("my", path, tmp_path / "images", "coco", only_masks=True)
        assert list(instances.index.segmentations) == [[[0] * 6]]
    assert load(path).supervision == "instances" and len(load(path).index.boxes) == 3


# -- samplers and the check of images


def test_samplers_from_the_cache(tmp_path, cache):
    path = write(tmp_path / "a.json")
    load(path)
    dataset = load(path)
    images, labels = dataset.index.positives()
    pairs = sorted(set(zip(labels.tolist(), images.tolist())))  # without crowds
    by_image, counts = dataset.index.by_label
    assert [image for _, image in pairs] == by_image.tolist() and by_image.dtype == np.int32
    assert (
        np.bincount([label for label, _ in pairs]).tolist()
        == counts.tolist()
        == dataset.image_counts().tolist()
    )
    of_class = np.maximum(1, np.sqrt(0.9 / (counts / 30)))
    expected = [
        max([1, *(of_class[label] for label, image in pairs if image == i)]) for i in range(30)
    ]
    assert repeat_factors([dataset], 0.9) == pytest.approx(expected)
    other = load(write(tmp_path / "b.json", seed=3))
    drawn = list(islice(ClassAwareSampler([dataset, other], 0), 6000))
    assert {row for row, _ in drawn} == {image for _, image in pairs} | {
        30 + i for i in other.index.by_label[0]
    }
    rare = by_image[: counts[0]] if counts[0] < counts[1] else by_image[counts[0] :]
    share = np.mean([row in set(rare.tolist()) for row, _ in drawn if row < 30])
    assert share >= 0.45


def test_images_are_listed_again_only_where_a_folder_changed(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.json")
    images = tmp_path / "images"
    listed = []
    monkeypatch.setattr(os, "listdir", lambda at, real=os.listdir: listed.append(at) or real(at))

    def check():
        listed.clear()
        load(path).check_images()
        return sorted(at.name for at in listed)

    for folder in (images / "sub", images):
        os.utime(folder, (1, 1))
    assert check() == ["images", "sub"] and check() == []
    os.utime(images / "sub", (2, 2))
    assert check() == ["sub"] and check() == []
    (images / "sub" / "1.jpg").unlink()
    for _ in range(2):
        with pytest.raises(InputError, match=r"sub/1\.jpg is missing \(1 of 30"):
            check()
    (images / "sub" / "1.jpg").touch()
    assert (
        check() == check() == ["sub"]
    )  # changed just now: the next change could have the same time
    write(path, seed=1)
    assert check() == ["images", "sub"]  # what was present belongs to the annotations


def test_a_list_of_images_that_cannot_be_kept_costs_a_line(tmp_path, caplog):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "file").touch()
    assert missing_files(tmp_path, ["a.jpg"], tmp_path / "file" / "memo.json") == []
    assert "the next start takes longer" in caplog.text
    (tmp_path / "memo.json").write_text("no json")
    assert missing_files(tmp_path, ["a.jpg", "b.jpg"], tmp_path / "memo.json") == ["b.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere forked processes are not safe")
def test_workers_share_the_mapped_pages():
    """Those that do not fork are sent the arrays."""
    started, before = [], multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("spawn", force=True)
        run_command(lambda: started.append(torch.multiprocessing.get_start_method()))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert started == ["fork"]


def test_a_large_file_by_its_name(tmp_path, cache, conversions):
    path = write(tmp_path / "a.json")
    for _ in range(2):
        (dataset,) = load_datasets(f"my={path}:{tmp_path / 'images'}", "train")
    assert len(conversions) == 1 and dataset.supervision == "instances"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")
@pytest.mark.parametrize("name", ["coco", "coco-base"])
def test_real_files_from_the_cache(tmp_path, monkeypatch, name):
    (plain,) = load_datasets(name, "train", str(REAL))
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "LARGE", 0)
    for _ in range(2):
        (cached,) = load_datasets(name, "train", str(REAL))
        assert (
            name == "coco-base" or cached.index.folder.parent == files.cache_dir() / "annotations"
        )
        assert_equal(plain, cached)
