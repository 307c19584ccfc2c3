"""lvis+coco: the boxes of COCO in the images of LVIS, by hand and against plain loops."""

import json

import numpy as np
import pytest
from PIL import Image

from common.datasets import load_datasets
from common.datasets.lvis_coco import OTHER_NAMES
from common.datasets.names import eval_entries
from common.errors import InputError
from common.labels import Vocabulary, fold

LVIS, COCO = Vocabulary.known("lvis"), Vocabulary.known("coco")
SIZE = {"width": 100, "height": 80}
URL = "http://images.cocodataset.org/train2017/{:012d}.jpg"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))


def id_of(vocabulary: Vocabulary, name: str) -> int:
    return vocabulary.ids[vocabulary.names.index(name)]


def square(x: float, side: float = 20) -> dict:
    """The box of an annotation, with its mask."""
    polygon = [x, 10, x + side, 10, x + side, 10 + side, x, 10 + side]
    return {"bbox": [x, 10, side, side], "segmentation": [polygon]}


def of_lvis(image: int, name: str, **box) -> dict:
    return {"image_id": image, "category_id": id_of(LVIS, name), "area": 400} | box


def of_coco(image: int, name: str, **box) -> dict:
    """COCO has other image ids, so that the names of the files decide."""
    place = {"image_id": 10 * image, "category_id": id_of(COCO, name)}
    return place | {"area": 300, "iscrowd": 0} | box


def write(path, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = [{"id": k + 1} | entry for k, entry in enumerate(annotations)]
    record = {"images": images, "annotations": numbered, "categories": categories}
    path.write_text(json.dumps(record))


def write_both(root, lvis: list[dict], coco: list[dict], absent: dict[int, list[str]]) -> None:
    """Writes the files of images 1 to 3 in both datasets, and of 4, which LVIS lacks."""
    (root / "coco/train2017").mkdir(parents=True)
    for i in range(1, 5):
        Image.new("RGB", (100, 80)).save(root / f"coco/train2017/{i:012d}.jpg")
    images = [{"id": i, "coco_url": URL.format(i)} | SIZE for i in range(1, 4)]
    for image in images:
        image["neg_category_ids"] = [id_of(LVIS, name) for name in absent.get(image["id"], [])]
        image["not_exhaustive_category_ids"] = []
    named = zip(LVIS.ids, LVIS.names)
    categories = [{"id": id, "name": name, "frequency": "f"} for id, name in named]
    for split in ("train", "val"):
        write(root / f"lvis/lvis_v1_{split}.json", images, lvis, categories)
    images = [{"id": 10 * i, "file_name": f"{i:012d}.jpg"} | SIZE for i in range(1, 5)]
    categories = [{"id": id, "name": name} for id, name in zip(COCO.ids, COCO.names)]
    write(root / "coco/annotations/instances_train2017.json", images, coco, categories)


def load(root, split: str = "train"):
    (dataset,) = load_datasets("lvis+coco", split, str(root), masks=True)
    return dataset


def held(dataset, i: int) -> list[tuple[str, list[float]]]:
    """(class, box) of each object of image i."""
    sample = dataset.load(i)
    names = [dataset.vocabulary.names[label] for label in sample.labels.tolist()]
    return list(zip(names, sample.boxes.tolist()))


def test_boxes_of_coco_join_those_of_lvis(tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    lvis = [
        of_lvis(1, "cat", **square(10)),
        of_lvis(1, "bus_(vehicle)", **square(50)),
        of_lvis(2, "zebra", **square(10)),
    ]
    coco = [
        of_coco(1, "cat", **square(11)),  # IoU .90: the same cat
        of_coco(1, "cat", **square(30)),  # another one
        of_coco(1, "dog", **square(10)),  # another class
        of_coco(1, "bus", **square(50, 24)),  # IoU .69
        of_coco(1, "car", **square(70)),  # LVIS says that there is none
        of_coco(1, "person", **square(5), iscrowd=1),
        of_coco(2, "hot dog", bbox=[40, 10, 20, 20]),  # without a mask
        of_coco(3, "cat", **square(10)),  # LVIS has no box in image 3
        of_coco(4, "cat", **square(10)),  # nor image 4
    ]
    coco[5]["segmentation"] = {"size": [80, 100], "counts": [0, 5, 7995]}
    write_both(tmp_path, lvis, coco, {1: ["car_(automobile)", "dog_collar"]})
    dataset = load(tmp_path)
    assert held(dataset, 0) == [
        ("cat", [10, 10, 30, 30]),
        ("bus_(vehicle)", [50, 10, 70, 30]),
        ("cat", [30, 10, 50, 30]),
        ("dog", [10, 10, 30, 30]),
        ("bus_(vehicle)", [50, 10, 74, 34]),
    ]
    assert held(dataset, 1) == [("zebra", [10, 10, 30, 30]), ("sausage", [40, 10, 60, 30])]
    assert held(dataset, 2) == [] and len(dataset) == 3
    masks = [dataset.load(i).masks for i in range(2)]
    assert masks[0].flatten(1).sum(1).tolist() == [400, 400, 400, 400, 576]
    assert masks[1].flatten(1).sum(1).tolist() == [400, 0]
    assert masks[0][3, 10:30, 10:30].all()  # each object has its own mask
    assert dataset.index.areas.tolist() == [400, 400, 300, 300, 300, 400, 300]
    assert (
        "4 boxes of COCO are added to the 3 of LVIS; left out are 2 of other images or classes, "
        "1 crowds, 1 of classes that LVIS says are absent, 1 that LVIS has (IoU >= 0.7)"
    ) in caplog.text
    assert dataset.name == dataset.vocabulary.dataset == "lvis+coco" and dataset.federated
    assert (dataset.metric, dataset.supervision) == ("lvis", "instances")
    names = [name for i in range(2) for name, _ in held(dataset, i)]
    for name, count in zip(dataset.vocabulary.names, dataset.image_counts().tolist()):
        assert count == (name in names)


def test_the_validation_is_that_of_lvis(tmp_path):
    write_both(tmp_path, [of_lvis(1, "cat", **square(10))], [of_coco(1, "dog", **square(1))], {})
    assert eval_entries("", "lvis+coco") == "lvis+coco"
    assert held(load(tmp_path, "val"), 0) == [("cat", [10, 10, 30, 30])]
    assert held(load(tmp_path), 0)[1:] == [("dog", [1, 10, 21, 30])]
    (tmp_path / "coco/annotations/instances_train2017.json").unlink()
    with pytest.raises(InputError, match=r"'lvis\+coco' also reads .*instances_train2017.json"):
        load(tmp_path)


def test_the_merge_is_that_of_plain_loops(tmp_path):
    rng = np.random.default_rng(0)
    names = ["cat", "dog", "bird"]  # the same in both

    def random(make, count):
        found = []
        for _ in range(count):
            x, y, w, h = rng.integers([0, 0, 6, 6], [12, 12, 16, 16]).tolist()
            name = names[rng.integers(3)]
            found.append(make(int(rng.integers(1, 4)), name, bbox=[x, y, w, h]))
        return found

    lvis, coco = random(of_lvis, 60), random(of_coco, 200)
    absent = {1: ["bird"], 3: ["cat"]}
    write_both(tmp_path, lvis, coco, absent)

    def iou(a, b):
        wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(wide, 0) * max(high, 0)
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    dataset = load(tmp_path)
    added = 0
    for image in (1, 2, 3):
        own = [a for a in lvis if a["image_id"] == image]
        expected = [(LVIS.names[LVIS.ids.index(a["category_id"])], a["bbox"]) for a in own]
        for new in coco:
            name = COCO.names[COCO.ids.index(new["category_id"])]
            if new["image_id"] != 10 * image or name in absent.get(image, ()):
                continue
            twins = [a for a in own if a["category_id"] == id_of(LVIS, name)]
            if not any(iou(new["bbox"], a["bbox"]) >= 0.7 for a in twins):
                expected.append((name, new["bbox"]))
                added += 1
        boxes = [(name, [x, y, x + w, y + h]) for name, (x, y, w, h) in expected]
        assert held(dataset, image - 1) == boxes
    assert 50 < added < 150  # some are doubles
    assert dataset.supervision == "boxes"


def test_every_class_of_coco_is_one_of_lvis():
    lvis = [fold(name) for name in LVIS.names]
    assert OTHER_NAMES.keys() <= set(COCO.names)
    found = [lvis.index(fold(OTHER_NAMES.get(name, name))) for name in COCO.names]
    assert len(set(found)) == 80
    for name, other in OTHER_NAMES.items():
        assert fold(name) not in lvis and other in LVIS.names, name
