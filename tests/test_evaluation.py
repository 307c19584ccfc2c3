"""Box AP: equal to pycocotools on COCO, equal to cases worked by hand on LVIS and OpenImages."""

import contextlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import hotcoco
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.datasets.index import Index
from common.errors import InputError
from common.evaluation import METRICS, _match, evaluate_boxes, format_table, to_coco_json
from common.labels import Vocabulary

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "real" / "coco" / "annotations"


def make_dataset(metric, names, annotations, images=1, relative=False, **extra):
    """annotations: (image, label, x1, y1, x2, y2[, ignore]) each."""
    rows = np.array([[*a, 0][:7] for a in annotations], dtype=np.float64).reshape(-1, 7)
    negatives, partly = extra.pop("negatives", {}), extra.pop("not_exhaustive", {})
    areas = (rows[:, 4] - rows[:, 2]) * (rows[:, 5] - rows[:, 3])
    index = Index.build(
        "hand.json",
        [f"{i}.jpg" for i in range(images)],
        extra.pop("image_ids", [f"image{i}" for i in range(images)]),
        np.full((images, 2), 100),
        rows[:, 0],
        rows[:, 2:6],
        rows[:, 1],
        extra.pop("areas", areas),
        rows[:, 6],
        relative=relative,
        negatives=negatives,
        not_exhaustive=partly,
    )
    ids = extra.pop("ids", ())
    fields = {"hierarchy": None, "frequency": None, **extra}
    return SimpleNamespace(name="hand", vocabulary=Vocabulary("hand", names, ids), index=index, metric=metric, **fields)


def predict(*detections, size=(100, 100)):
    """detections: (label, x1, y1, x2, y2, score) each."""
    table = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, 1:5], "labels": table[:, 0].long(), "scores": table[:, 5], "size": size}


def random_dataset(seed, images=24, classes=6):
    """Classes 0..classes-2 have ground truth, the last has none; some images are empty; scores tie."""
    rng = np.random.default_rng(seed)
    annotations, predictions = [], {}
    for image in range(images):
        count = 0 if image % 7 == 3 else rng.integers(1, 9)
        side = rng.choice([20, 70, 300], (count, 1)) * rng.uniform(0.5, 1.2, (count, 2))
        corner = rng.uniform(0, 200, (count, 2))
        labels = rng.integers(0, classes - 1, count)
        crowd = rng.random(count) < 0.15
        boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
        annotations += [(image, c, *b, k) for c, b, k in zip(labels, boxes.tolist(), crowd)]
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 5, (3 * count, 4))
        far = np.sort(rng.uniform(0, 300, (5, 2, 2)), axis=1).reshape(5, 4)
        near = np.concatenate([near, far])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kinds = np.concatenate([np.repeat(labels, 3), rng.integers(0, classes, 5)])
        scores = np.round(rng.random(len(near)), 1)
        predictions[image] = predict(*np.column_stack([kinds, near, scores]).tolist(), size=(500, 500))
    areas = np.array([(a[4] - a[2]) * (a[5] - a[3]) for a in annotations]) * rng.uniform(0.4, 1, len(annotations))
    names = tuple(f"class {c}" for c in range(classes))
    ids = [int(i) for i in rng.permutation(1000)[:images]]
    return make_dataset("coco", names, annotations, images, areas=areas, image_ids=ids), predictions


def pycocotools_numbers(dataset, predictions):
    index, vocabulary = dataset.index, dataset.vocabulary
    image = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    boxes = index.boxes.astype(np.float64)
    gt = COCO()
    gt.dataset = {
        "images": [{"id": i, "height": 500, "width": 500} for i in index.image_ids],
        "categories": [{"id": i, "name": n} for i, n in zip(vocabulary.ids, vocabulary.names)],
        "annotations": [
            {
                "id": a + 1,
                "image_id": index.image_ids[image[a]],
                "category_id": vocabulary.ids[index.labels[a]],
                "bbox": [*boxes[a, :2], *(boxes[a, 2:] - boxes[a, :2])],
                "area": float(index.areas[a]),
                "iscrowd": int(index.ignore[a]),
            }
            for a in range(len(boxes))
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(to_coco_json(dataset, predictions, index.image_ids)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(METRICS["coco"], evaluator.stats[:6].tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_coco_equals_pycocotools(seed):
    dataset, predictions = random_dataset(seed)
    ours, oracle = evaluate_boxes(dataset, predictions), pycocotools_numbers(dataset, predictions)
    assert dataset.index.ignore.any() and 0.05 < oracle["AP"] < 0.95
    assert list(ours) == list(METRICS["coco"])
    assert ours == pytest.approx(oracle, abs=1e-6)


def test_coco_prints_nothing(capfd):
    evaluate_boxes(*random_dataset(0))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_coco_crowd_takes_many_detections():
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0, 0, 20, 20), (0, 0, 40, 40, 100, 100, 1)])
    inside_crowd = [(0, 41 + i, 41, 51 + i, 51, 0.9) for i in range(5)]
    assert evaluate_boxes(dataset, {0: predict((0, 0, 0, 20, 20, 0.5), *inside_crowd)})["AP"] == pytest.approx(1)


def test_absent_size_is_nan():
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0, 0, 20, 20)])
    values = evaluate_boxes(dataset, {0: predict((0, 0, 0, 20, 20, 0.5))})
    assert values["APs"] == pytest.approx(1) and math.isnan(values["APl"])


@pytest.mark.parametrize("metric", ["coco", "lvis", "oid"])
@pytest.mark.parametrize("detections", [[], [(0, 0, 0, 20, 20, 0.5)]])
def test_no_ground_truth(metric, detections):
    values = evaluate_boxes(make_dataset(metric, ("cat", "dog"), []), {0: predict(*detections)})
    assert values and all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("metric", ["coco", "lvis", "oid"])
def test_no_detections_is_zero(metric):
    values = evaluate_boxes(make_dataset(metric, ("cat",), [(0, 0, 0, 0, 20, 20)]), {0: predict()})
    assert values["AP50"] == 0


def test_missing_image_is_an_error():
    dataset = make_dataset("coco", ("cat",), [], images=3)
    with pytest.raises(InputError, match=r"2 of 3 images have no prediction, the first is 'image1'"):
        evaluate_boxes(dataset, {0: predict()})


def test_no_images():
    assert all(math.isnan(value) for value in evaluate_boxes(make_dataset("coco", ("cat",), [], images=0), {}).values())


def test_label_of_another_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="2 classes, but label 7"):
        evaluate_boxes(make_dataset("coco", ("cat", "dog"), []), {0: predict((7, 0, 0, 1, 1, 0.5))})


# --------------------------------------------------------------------------------------------------------------- LVIS


def test_lvis_federated():
    """Image 1 has no cat box: a false positive there counts only if cat is verified absent and not else."""
    boxes = [(0, 0, 0, 0, 20, 20)]
    hit, wrong = (0, 0, 0, 20, 20, 0.5), (0, 50, 50, 70, 70, 0.9)
    unknown = make_dataset("lvis", ("cat",), boxes, images=2, frequency="r")
    absent = make_dataset("lvis", ("cat",), boxes, images=2, frequency="r", negatives={1: [0]})
    predictions = {0: predict(hit), 1: predict(wrong)}
    assert evaluate_boxes(unknown, predictions)["APr"] == pytest.approx(1)
    assert evaluate_boxes(absent, predictions)["APr"] == pytest.approx(0.5)
    assert math.isnan(evaluate_boxes(absent, predictions)["APf"])


def test_lvis_not_exhaustive():
    boxes = [(0, 0, 0, 0, 20, 20)]
    predictions = {0: predict((0, 0, 0, 20, 20, 0.5), (0, 50, 50, 70, 70, 0.9))}
    complete = make_dataset("lvis", ("cat",), boxes, frequency="f")
    partly = make_dataset("lvis", ("cat",), boxes, frequency="f", not_exhaustive={0: [0]})
    assert evaluate_boxes(complete, predictions)["AP"] == pytest.approx(0.5)
    assert evaluate_boxes(partly, predictions) == pytest.approx(
        {"AP": 1, "AP50": 1, "AP75": 1, "APs": 1, "APf": 1, "APm": math.nan, "APl": math.nan}
        | {"APr": math.nan, "APc": math.nan},
        nan_ok=True,
    )


def test_lvis_keeps_300_detections():
    boxes = [(0, 0, 0, 0, 20, 20)]
    wrong = [(0, 50, 50, 70, 70, 0.9)]
    for count, expected in ((299, 1 / 300), (300, 0)):
        predictions = {0: predict(*wrong * count, (0, 0, 0, 20, 20, 0.5))}
        assert evaluate_boxes(make_dataset("lvis", ("cat",), boxes), predictions)["AP"] == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- OpenImages

TREE = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/animal", "Subcategory": [{"LabelName": "/m/cat"}, {"LabelName": "/m/dog"}]},
        {"LabelName": "/m/toy", "Subcategory": [{"LabelName": "/m/dog"}], "Part": [{"LabelName": "/m/wheel"}]},
    ],
}
NAMES, IDS = ("Animal", "Cat", "Dog", "Toy", "Wheel"), ("/m/animal", "/m/cat", "/m/dog", "/m/toy", "/m/wheel")
ANIMAL, CAT, DOG, TOY, WHEEL = range(5)


def oid(annotations, images=1, **extra):
    return make_dataset("oid", NAMES, annotations, images, ids=IDS, hierarchy=TREE, **extra)


def test_oid_expands_ground_truth_and_predictions():
    dataset = oid([(0, CAT, 0, 0, 20, 20)])  # Cat and Animal are evaluated
    assert evaluate_boxes(dataset, {0: predict((CAT, 0, 0, 20, 20, 0.5))}) == {"AP50": 1}
    assert evaluate_boxes(dataset, {0: predict((ANIMAL, 0, 0, 20, 20, 0.5))}) == {"AP50": 0.5}
    # Dog is not verified here, but a dog is an animal, and a better scored one: Cat 1, Animal 1/2
    both = predict((CAT, 0, 0, 20, 20, 0.5), (DOG, 50, 50, 70, 70, 0.9))
    assert evaluate_boxes(dataset, {0: both}) == {"AP50": 0.75}


def test_oid_two_parents_and_parts():
    found = {0: predict((DOG, 0, 0, 20, 20, 0.5))}
    assert evaluate_boxes(oid([(0, DOG, 0, 0, 20, 20)]), found) == {"AP50": 1}  # Dog, Animal, Toy
    assert evaluate_boxes(oid([(0, TOY, 0, 0, 20, 20)]), found) == {"AP50": 1}
    assert evaluate_boxes(oid([(0, TOY, 0, 0, 20, 20)]), {0: predict((WHEEL, 0, 0, 20, 20, 0.5))}) == {"AP50": 0}


def test_oid_unverified_class_is_ignored():
    wrong = (WHEEL, 50, 50, 70, 70, 0.9)
    predictions = {0: predict((WHEEL, 0, 0, 20, 20, 0.5)), 1: predict(wrong)}
    boxes = [(0, WHEEL, 0, 0, 20, 20)]
    assert evaluate_boxes(oid(boxes, 2), predictions) == {"AP50": 1}
    assert evaluate_boxes(oid(boxes, 2, negatives={1: [WHEEL]}), predictions) == {"AP50": 0.5}


def test_oid_absent_class_has_no_descendants():
    predictions = {0: predict((CAT, 0, 0, 20, 20, 0.5)), 1: predict((CAT, 50, 50, 70, 70, 0.9))}
    boxes = [(0, CAT, 0, 0, 20, 20)]
    assert evaluate_boxes(oid(boxes, 2, negatives={1: [ANIMAL]}), predictions) == {"AP50": 0.5}
    assert evaluate_boxes(oid(boxes, 2, negatives={1: [DOG]}), predictions) == {"AP50": 1}
    # no cat is not no animal: the false cat counts for Cat alone
    assert evaluate_boxes(oid(boxes, 2, negatives={1: [CAT]}), predictions) == {"AP50": 0.75}


def test_oid_group_of_counts_once():
    group = [(0, WHEEL, 0, 0, 80, 80, 1), (0, WHEEL, 80, 80, 100, 100)]
    inside = [(WHEEL, 10 * i, 10, 10 * i + 8, 20, 0.9 - i / 100) for i in range(4)]
    single = (WHEEL, 80, 80, 100, 100, 0.5)
    assert evaluate_boxes(oid(group), {0: predict(*inside, single)}) == {"AP50": 1}  # 1 hit, 3 ignored, 1 hit
    assert evaluate_boxes(oid(group), {0: predict(single)}) == {"AP50": 0.5}  # the group is missed
    half_out = (WHEEL, 75, 0, 95, 10, 0.9)  # a quarter of it inside: a miss
    assert evaluate_boxes(oid(group), {0: predict(half_out, single)})["AP50"] == pytest.approx(1 / 4)


def test_oid_single_box_goes_before_the_group():
    boxes = [(0, WHEEL, 0, 0, 80, 80, 1), (0, WHEEL, 10, 10, 30, 30)]
    twice = predict((WHEEL, 10, 10, 30, 30, 0.9), (WHEEL, 11, 10, 31, 30, 0.8))
    assert evaluate_boxes(oid(boxes), {0: twice}) == {"AP50": 1}


def test_oid_detection_is_compared_with_one_box():
    """The second detection overlaps most with the box already found: a false positive, though COCO would match it."""
    truth = np.array([[0, 0, 10, 10], [3, 0, 13, 10]], dtype=float)
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10]], dtype=float)
    hit, ignored = _match(boxes, truth, np.zeros(2, dtype=bool))
    assert hit.tolist() == [True, False] and not ignored.any()


def test_oid_in_fractions():
    dataset = oid([(0, WHEEL, 0.0, 0.0, 0.5, 0.25)], relative=True)
    assert evaluate_boxes(dataset, {0: predict((WHEEL, 0, 0, 200, 50, 0.5), size=(200, 400))}) == {"AP50": 1}
    assert evaluate_boxes(dataset, {0: predict((WHEEL, 0, 0, 100, 100, 0.5), size=(200, 400))}) == {"AP50": 0}


def test_relative_boxes_with_the_coco_metric():
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0.0, 0.0, 0.5, 0.5)], relative=True)
    values = evaluate_boxes(dataset, {0: predict((0, 0, 0, 200, 100, 0.5), size=(200, 400))})
    assert values["APl"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_oid_equals_hotcoco_where_protocols_agree(seed):
    """Boxes far apart, every class verified, no hierarchy: hotcoco's own OpenImages mode gives the same AP."""
    rng = np.random.default_rng(seed)
    annotations, predictions, rows = [], {}, []
    for image in range(12):
        cells = rng.permutation(16)[: rng.integers(1, 12)]
        for cell in cells:
            x, y = 25.0 * (cell % 4), 25.0 * (cell // 4)
            annotations.append((image, int(rng.integers(5)), x, y, x + 20, y + 20, int(rng.random() < 0.3)))
        mine = [a for a in annotations if a[0] == image]
        found = [
            (a[1], a[2] + d, a[3], a[4] + d, a[5], s)
            for a in mine
            for d, s in zip(rng.uniform(-12, 12, 3), rng.random(3))
        ]
        predictions[image] = predict(*found)
        rows += [[image, d[1], d[2], d[3] - d[1], d[4] - d[2], d[5], d[0]] for d in found]
    dataset = make_dataset("oid", NAMES, annotations, 12, negatives={i: range(5) for i in range(12)})
    gt = hotcoco.COCO(
        {
            "images": [{"id": i, "height": 100, "width": 100} for i in range(12)],
            "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": a[0],
                    "category_id": a[1],
                    "bbox": [a[2], a[3], a[4] - a[2], a[5] - a[3]],
                    "area": 400,
                    "is_group_of": bool(a[6]),
                }
                for i, a in enumerate(annotations)
            ],
        }
    )
    with pytest.warns(UserWarning), contextlib.redirect_stdout(io.StringIO()):
        oracle = hotcoco.COCOeval(gt, gt.load_res(np.array(rows)), "bbox", oid_style=True)
        oracle.run()
    assert evaluate_boxes(dataset, predictions)["AP50"] == pytest.approx(oracle.get_results()["AP"], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- output


def test_table():
    text = format_table({"coco": {"AP": 0.41234, "AP50": 1.0}, "openimages": {"AP50": 0.5, "APr": math.nan}})
    assert text.splitlines() == [
        "dataset        AP   AP50  APr",
        "coco        0.412  1.000    -",
        "openimages      -  0.500    -",
    ]


def test_coco_json():
    vocabulary = Vocabulary("coco", ("cat", "dog"), (17, 18))
    results = to_coco_json(vocabulary, {1: predict((1, 10, 20, 30, 50, 0.5)), 0: predict()}, [5, 139])
    assert results == [{"image_id": 139, "category_id": 18, "bbox": [10, 20, 20, 30], "score": 0.5}]
    json.dumps(results)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data samples are not here")
def test_perfect_predictions_of_real_coco():
    record = json.loads((REAL / "instances_val2017.json").read_text())
    rows = {image["id"]: row for row, image in enumerate(record["images"])}
    ids = tuple(c["id"] for c in record["categories"])
    annotations, predictions = [], {row: [] for row in rows.values()}
    for a in record["annotations"]:
        x, y, w, h = a["bbox"]
        row, label = rows[a["image_id"]], ids.index(a["category_id"])
        annotations.append((row, label, x, y, x + w, y + h, a["iscrowd"]))
        if not a["iscrowd"]:
            predictions[row].append((label, x, y, x + w, y + h, 0.9))
    dataset = make_dataset(
        "coco",
        tuple(c["name"] for c in record["categories"]),
        annotations,
        len(rows),
        ids=ids,
        areas=[a["area"] for a in record["annotations"]],
        image_ids=list(rows),
    )
    values = evaluate_boxes(dataset, {row: predict(*found, size=(640, 640)) for row, found in predictions.items()})
    assert values == pytest.approx(dict.fromkeys(METRICS["coco"], 1.0))
