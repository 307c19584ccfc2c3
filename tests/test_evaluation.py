"""Box and mask AP, against pycocotools (COCO), lvis (LVIS) and cases by hand (OpenImages)."""

import contextlib
import importlib.util
import io
import json
import logging
import math
import sys
from types import ModuleType, SimpleNamespace

import hotcoco
import numpy as np
import pytest
import torch
from conftest import REAL
from corpus import time_limit
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.datasets.index import BEYOND, Index
from common.errors import InputError
from common.evaluation import (
    MASK_METRICS,
    METRICS,
    _match,
    evaluate_detections,
    recall,
    to_coco_json,
)
from common.labels import Vocabulary
from common.masks import decode_masks, encode_masks
from common.tables import format_table, write_class_tables

PER_IMAGE = ("negatives", "not_exhaustive", "verified")
REAL_COCO = REAL / "coco/annotations/instances_val2017.json"


def make_dataset(metric, names, annotations, images=1, relative=False, **extra):
    """Returns a dataset to evaluate.

    annotations: (image, label, x1, y1, x2, y2[, ignore]) each
    extra: negatives, not_exhaustive and verified as {image: labels}; other columns and fields
    """
    rows = np.array([[*a, 0][:7] for a in annotations], dtype=np.float64).reshape(-1, 7)
    labels = {
        field: [list(extra[field].get(i, ())) for i in range(images)]
        for field in PER_IMAGE
        if field in extra
    }
    extra = {field: value for field, value in extra.items() if field not in PER_IMAGE}
    areas = (rows[:, 4] - rows[:, 2]) * (rows[:, 5] - rows[:, 3])
    index = Index.build(
        "hand.json",
        [f"{i}.jpg" for i in range(images)],
        extra.pop("image_ids", [f"image{i}" for i in range(images)]),
        np.full((images, 2), 100),
        rows[:, 0],
        rows[:, 2:6],
        rows[:, 1],
        areas=extra.pop("areas", areas),
        ignore=rows[:, 6],
        relative=relative,
        segmentations=extra.pop("segmentations", None),
        **labels,
    )
    ids = extra.pop("ids", ())
    fields = {"hierarchy": None, "frequency": None, **extra}
    return SimpleNamespace(
        name="hand", vocabulary=Vocabulary("hand", names, ids), index=index, metric=metric, **fields
    )


def predict(*detections, size=(100, 100)):
    """detections: (label, x1, y1, x2, y2, score) each."""
    table = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    return {
        "boxes": table[:, 1:5],
        "labels": table[:, 0].long(),
        "scores": table[:, 5],
        "size": size,
    }


def random_dataset(seed, images=24, classes=6):
    """Returns a dataset and predictions. The last class and some images have no boxes."""
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
        predictions[image] = predict(
            *np.column_stack([kinds, near, scores]).tolist(), size=(500, 500)
        )
    areas = np.array([(a[4] - a[2]) * (a[5] - a[3]) for a in annotations]) * rng.uniform(
        0.4, 1, len(annotations)
    )
    names = tuple(f"class {c}" for c in range(classes))
    ids = [int(i) for i in rng.permutation(1000)[:images]]
    return make_dataset("coco", names, annotations, images, areas=areas, image_ids=ids), predictions


def pycocotools_evaluator(dataset, results, kind="bbox", **params):
    """Evaluated and accumulated, not yet summarized; results: of COCO's json."""
    index, vocabulary = dataset.index, dataset.vocabulary
    boxes = index.boxes.astype(np.float64)
    gt = COCO()
    gt.dataset = {
        "images": [{"id": i, "height": 500, "width": 500} for i in index.image_ids],
        "categories": [{"id": i, "name": n} for i, n in zip(vocabulary.ids, vocabulary.names)],
        "annotations": [
            {
                "id": a + 1,
                "image_id": index.image_ids[image],
                "category_id": vocabulary.ids[index.labels[a]],
                "bbox": [*boxes[a, :2], *(boxes[a, 2:] - boxes[a, :2])],
                "area": float(index.areas[a]),
                "iscrowd": int(index.ignore[a]),
                "segmentation": index.segmentations[a] if index.segmentations else [],
            }
            for a, image in enumerate(index.image_of)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(results), kind)
        for name, value in params.items():
            setattr(evaluator.params, name, value)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def pycocotools_numbers(dataset, predictions, kind="bbox"):
    evaluator = pycocotools_evaluator(
        dataset, to_coco_json(dataset.vocabulary.ids, predictions, dataset.index.image_ids), kind
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.summarize()
    return dict(zip(METRICS["coco"], evaluator.stats[:6].tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_coco_equals_pycocotools(seed):
    dataset, predictions = random_dataset(seed)
    ours, oracle = (
        evaluate_detections(dataset, predictions),
        pycocotools_numbers(dataset, predictions),
    )
    assert dataset.index.ignore.any() and 0.05 < oracle["AP"] < 0.95
    assert list(ours) == list(METRICS["coco"])
    assert ours == pytest.approx(oracle, abs=1e-6)


def test_coco_prints_nothing(capfd):
    evaluate_detections(*random_dataset(0))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_coco_crowd_takes_many_detections():
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0, 0, 20, 20), (0, 0, 40, 40, 100, 100, 1)])
    inside_crowd = [(0, 41 + i, 41, 51 + i, 51, 0.9) for i in range(5)]
    assert evaluate_detections(dataset, {0: predict((0, 0, 0, 20, 20, 0.5), *inside_crowd)})[
        "AP"
    ] == pytest.approx(1)


def test_what_is_beyond_all_sizes_is_ignored_as_an_object():
    """A difficult object of VOC may be found once. Small boxes inside are errors, in crowds not."""
    boxes = [(0, 0, 0, 0, 20, 20), (0, 0, 40, 40, 80, 80, 1)]
    hit, difficult = (0, 0, 0, 20, 20, 0.5), (0, 40, 40, 80, 78, 0.9)
    inside = [(0, 40 + i, 40, 50 + i, 50, 0.9) for i in range(3)]
    dataset = make_dataset("coco", ("cat",), boxes, areas=[400, BEYOND])
    assert evaluate_detections(dataset, {0: predict(hit, difficult)})["AP"] == pytest.approx(1)
    assert evaluate_detections(dataset, {0: predict(hit, *inside)})["AP50"] == pytest.approx(0.25)
    crowd = make_dataset("coco", ("cat",), boxes, areas=[400, 1600])
    assert evaluate_detections(crowd, {0: predict(hit, *inside)})["AP50"] == pytest.approx(1)


def test_absent_size_is_nan():
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0, 0, 20, 20)])
    values = evaluate_detections(dataset, {0: predict((0, 0, 0, 20, 20, 0.5))})
    assert values["APs"] == pytest.approx(1) and math.isnan(values["APl"])


@pytest.mark.parametrize("metric", ["coco", "lvis", "oid"])
@pytest.mark.parametrize("detections", [[], [(0, 0, 0, 20, 20, 0.5)]])
def test_no_ground_truth(metric, detections):
    values = evaluate_detections(
        make_dataset(metric, ("cat", "dog"), []), {0: predict(*detections)}
    )
    assert values and all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("metric", ["coco", "lvis", "oid"])
def test_no_detections_is_zero(metric):
    values = evaluate_detections(
        make_dataset(metric, ("cat",), [(0, 0, 0, 0, 20, 20)]), {0: predict()}
    )
    assert values["AP50"] == 0


def test_missing_image_is_an_error():
    dataset = make_dataset("coco", ("cat",), [], images=3)
    with pytest.raises(
        InputError, match=r"2 of 3 images have no prediction, the first is 'image1'"
    ):
        evaluate_detections(dataset, {0: predict()})


def test_no_images():
    assert all(
        math.isnan(value)
        for value in evaluate_detections(make_dataset("coco", ("cat",), [], images=0), {}).values()
    )


def test_label_of_another_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="2 classes, but label 7"):
        evaluate_detections(
            make_dataset("coco", ("cat", "dog"), []), {0: predict((7, 0, 0, 1, 1, 0.5))}
        )


# -- masks -----------------------------------------------------------------------------------------


def ellipses(boxes, size=500):
    """(N, 4) xyxy -> (N, size, size) bool."""
    pixels = torch.arange(size) + 0.5
    centre, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = (((pixels - centre[:, i, None]) / radius[:, i, None]) ** 2 for i in (0, 1))
    return y[:, :, None] + x[:, None, :] <= 1


def with_masks(dataset, predictions):
    """Adds ellipses for all boxes: polygons in the ground truth, RLE for crowds and predictions."""
    index, angles = dataset.index, np.linspace(0, 2 * np.pi, 24, endpoint=False)
    index.segmentations = encode_masks(ellipses(torch.from_numpy(index.boxes)))
    for row in np.flatnonzero(~index.ignore):
        centre, radius = (
            index.boxes[row].reshape(2, 2).mean(0),
            np.diff(index.boxes[row].reshape(2, 2), axis=0)[0] / 2,
        )
        ring = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        index.segmentations[row] = [ring.ravel().round(2).tolist()]
    for found in predictions.values():
        found["segmentations"] = encode_masks(ellipses(found["boxes"]))
    return dataset, predictions


@pytest.mark.parametrize("seed", range(3))
def test_mask_ap_equals_pycocotools(seed):
    dataset, predictions = random_dataset(seed)
    boxes_only = evaluate_detections(dataset, predictions)
    dataset, predictions = with_masks(dataset, predictions)
    ours, oracle = (
        evaluate_detections(dataset, predictions),
        pycocotools_numbers(dataset, predictions, "segm"),
    )
    assert 0.05 < oracle["AP"] < 0.95 and abs(oracle["AP"] - boxes_only["AP"]) > 1e-3
    assert ours == pytest.approx(
        boxes_only | {f"mask {m}": oracle[m] for m in MASK_METRICS["coco"]}, abs=1e-6
    )


def test_mask_ap_needs_masks_on_both_sides():
    truth, found = [(0, 0, 0, 0, 20, 20)], {0: predict((0, 0, 0, 20, 20, 0.5))}
    square = [[0.0, 0, 20, 0, 20, 20, 0, 20]]
    masks = {0: found[0] | {"segmentations": encode_masks(decode_masks([square], (100, 100)))}}
    assert "mask AP" not in evaluate_detections(make_dataset("coco", ("cat",), truth), masks)
    dataset = make_dataset("coco", ("cat",), truth, segmentations=[square])
    assert "mask AP" not in evaluate_detections(dataset, found)
    assert evaluate_detections(dataset, masks)["mask AP"] == pytest.approx(1)


def test_mask_ap_of_lvis():
    """A half mask is found at IoU 0.5 only. Masks are evaluated as federated, like boxes."""
    names, boxes = ("cat", "dog"), [(0, 0, 0, 0, 20, 20), (0, 1, 40, 40, 80, 80)]
    polygons = [[[x, y, X, y, X, Y, x, Y]] for _, _, x, y, X, Y in boxes]
    dataset = make_dataset("lvis", names, boxes, images=2, frequency="rf", segmentations=polygons)
    found = {
        0: predict((0, 0, 0, 20, 20, 0.5), (1, 40, 40, 80, 80, 0.5)),
        1: predict((0, 5, 5, 9, 9, 0.9)),
    }
    masks = decode_masks(polygons, (100, 100))
    masks[1, 60:] = False
    found[0]["segmentations"] = encode_masks(masks)
    found[1]["segmentations"] = encode_masks(masks[:1])
    values = evaluate_detections(dataset, found)
    expected = {
        "mask AP": 0.55,
        "mask AP50": 1,
        "mask APr": 1,
        "mask APc": math.nan,
        "mask APf": 0.1,
    }
    assert {key: value for key, value in values.items() if "mask" in key} == pytest.approx(
        expected, nan_ok=True
    )
    assert values["APf"] == pytest.approx(1)


def test_broken_annotated_mask_is_an_error():
    rle = {"size": [50, 50], "counts": "0"}
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0, 0, 20, 20)], segmentations=[rle])
    found = predict((0, 0, 0, 20, 20, 0.5)) | {
        "segmentations": encode_masks(torch.ones(1, 100, 100).bool())
    }
    with pytest.raises(
        InputError, match=r"hand.json: image 'image0' has an RLE of size \[50, 50\] for"
    ):
        evaluate_detections(dataset, {0: found})


def test_classes_without_ground_truth_cost_nothing():
    """Tables of 20,000 classes would take a minute and 9 GB. The numbers are those of six."""
    dataset, predictions = random_dataset(3)
    groups = {"own": np.arange(6) < 5}
    expected = evaluate_detections(dataset, predictions, groups)
    names = tuple(f"class {c}" for c in range(20_000))
    dataset.vocabulary = Vocabulary("hand", names)
    with time_limit(20):
        found = evaluate_detections(dataset, predictions, {"own": np.arange(20_000) < 5})
    assert found == expected and found["AP"] > 0.1


# -- groups of classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["coco", "lvis"])
def test_groups_are_means_of_classes(metric):
    dataset, predictions = random_dataset(1)
    dataset.metric = metric
    names = dataset.vocabulary.names
    alone = []
    for label in range(len(names)):
        one = {"alone": np.arange(len(names)) == label}
        alone.append(evaluate_detections(dataset, predictions, one)["AP50 alone"])
    assert math.isnan(alone[-1]) and len(set(alone[:-1])) > 3
    novel = np.array([False, True, True, False, False, True])  # the last one has no ground truth
    values = evaluate_detections(
        dataset, predictions, {"base": ~novel, "novel": torch.from_numpy(novel)}
    )
    assert values["AP50 base"] == pytest.approx(np.mean([alone[0], *alone[3:5]]))
    assert values["AP50 novel"] == pytest.approx(np.mean(alone[1:3]))
    assert values["AP50"] == pytest.approx(np.mean(alone[:-1]))
    if metric == "coco":
        results = to_coco_json(dataset.vocabulary.ids, predictions, dataset.index.image_ids)
        precision = (
            pycocotools_evaluator(dataset, results).eval["precision"][0, :, :, 0, -1].mean(0)
        )
        assert (
            alone[:-1] == pytest.approx(precision[:-1].tolist(), abs=1e-6) and precision[-1] == -1
        )


def test_groups_of_oid():
    boxes = [(0, CAT, 0, 0, 20, 20), (0, WHEEL, 40, 40, 60, 60)]
    found = {0: predict((CAT, 0, 0, 20, 20, 0.5))}
    groups = {
        "base": np.arange(5) == WHEEL,
        "novel": np.isin(range(5), (CAT, ANIMAL)),
        "none": np.arange(5) == TOY,
    }
    values = evaluate_detections(oid(boxes), found, groups)
    expected = {"AP50": 2 / 3, "AP50 base": 0, "AP50 novel": 1, "AP50 none": math.nan}
    assert values == pytest.approx(expected, nan_ok=True)


# -- recall ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_pycocotools(seed):
    dataset, predictions = random_dataset(seed)
    results = to_coco_json(dataset.vocabulary.ids, predictions, dataset.index.image_ids)
    results = [
        result | {"category_id": dataset.vocabulary.ids[0]} for result in results
    ]  # it ranks equal scores by class
    limits = [1, 3, 1000]
    oracle = (
        pycocotools_evaluator(dataset, results, useCats=0, maxDets=limits)
        .eval["recall"][:, 0, 0]
        .mean(axis=0)
    )
    proposals = {
        row: {k: found[k] for k in ("boxes", "scores", "size")}
        for row, found in predictions.items()
    }
    assert recall(dataset, proposals, limits) == pytest.approx(
        {f"AR@{k}": r for k, r in zip(limits, oracle)}, abs=1e-6
    )
    assert 0.02 < oracle[0] < oracle[1] < oracle[2]


def test_recall_by_hand():
    boxes = [(0, CAT, 0, 0, 20, 20), (0, DOG, 40, 40, 60, 60), (1, CAT, 0, 0, 50, 50, 1)]
    exact, half, far = (0, 0, 0, 20, 20, 0.1), (0, 40, 40, 60, 51.5, 0.5), (0, 80, 80, 90, 90, 0.9)
    proposals = {0: predict(exact, half, far), 1: predict(far)}
    expected = {"AR@1": 0, "AR@2": 0.1, "AR@10": 0.6}  # half: IoU 0.575, so at 2 of 10 thresholds
    dataset = oid(boxes, 2)
    assert recall(dataset, proposals, (1, 2, 10)) == pytest.approx(expected)
    assert list(recall(dataset, proposals)) == ["AR@10", "AR@100", "AR@1000"]
    assert all(math.isnan(value) for value in recall(oid([]), {0: predict(far)}).values())
    with pytest.raises(InputError, match="1 of 2 images"):
        recall(dataset, {0: predict()})


# -- LVIS ------------------------------------------------------------------------------------------


def test_lvis_federated():
    """Image 1 has no cat box. A false positive there counts only if cat is verified absent."""
    boxes = [(0, 0, 0, 0, 20, 20)]
    hit, wrong = (0, 0, 0, 20, 20, 0.5), (0, 50, 50, 70, 70, 0.9)
    unknown = make_dataset("lvis", ("cat",), boxes, images=2, frequency="r")
    absent = make_dataset("lvis", ("cat",), boxes, images=2, frequency="r", negatives={1: [0]})
    predictions = {0: predict(hit), 1: predict(wrong)}
    assert evaluate_detections(unknown, predictions)["APr"] == pytest.approx(1)
    assert evaluate_detections(absent, predictions)["APr"] == pytest.approx(0.5)
    assert math.isnan(evaluate_detections(absent, predictions)["APf"])


def test_lvis_not_exhaustive():
    boxes = [(0, 0, 0, 0, 20, 20)]
    predictions = {0: predict((0, 0, 0, 20, 20, 0.5), (0, 50, 50, 70, 70, 0.9))}
    complete = make_dataset("lvis", ("cat",), boxes, frequency="f")
    partly = make_dataset("lvis", ("cat",), boxes, frequency="f", not_exhaustive={0: [0]})
    assert evaluate_detections(complete, predictions)["AP"] == pytest.approx(0.5)
    assert evaluate_detections(partly, predictions) == pytest.approx(
        {"AP": 1, "AP50": 1, "AP75": 1, "APs": 1, "APf": 1, "APm": math.nan, "APl": math.nan}
        | {"APr": math.nan, "APc": math.nan},
        nan_ok=True,
    )


def test_lvis_keeps_300_detections():
    boxes = [(0, 0, 0, 0, 20, 20)]
    wrong = [(0, 50, 50, 70, 70, 0.9)]
    for count, expected in ((299, 1 / 300), (300, 0)):
        predictions = {0: predict(*wrong * count, (0, 0, 0, 20, 20, 0.5))}
        assert evaluate_detections(make_dataset("lvis", ("cat",), boxes), predictions)[
            "AP"
        ] == pytest.approx(expected)


def random_lvis(seed):
    """Returns `random_dataset` as LVIS: three frequencies, images annotated in part, no crowds."""
    coco, predictions = random_dataset(seed)
    rng, index, classes = np.random.default_rng(seed), coco.index, len(coco.vocabulary)
    annotated = [set(index.labels[index.rows(i)].tolist()) for i in range(len(index))]
    columns = zip(index.image_of.tolist(), index.labels.tolist(), *index.boxes.T.tolist())
    negatives = {}
    for i, here in enumerate(annotated):
        negatives[i] = [c for c in range(classes) if c not in here and rng.random() < 0.5]
    not_exhaustive = {}
    for i, here in enumerate(annotated):
        not_exhaustive[i] = [c for c in here if rng.random() < 0.2]
    extra = {
        "areas": index.areas,
        "image_ids": list(index.image_ids),
        "frequency": "rrccff",
        "negatives": negatives,
        "not_exhaustive": not_exhaustive,
    }
    return make_dataset(
        "lvis", coco.vocabulary.names, list(columns), len(index), **extra
    ), predictions


def lvis_numbers(dataset, predictions):
    """Evaluates by the package lvis. It needs the old numpy.float, and OpenCV for pictures."""
    sys.modules.setdefault("cv2", ModuleType("cv2"))
    np.float = float
    from lvis import LVIS, LVISEval, LVISResults

    def ids(labels):
        return [dataset.vocabulary.ids[label] for label in labels]

    index, vocabulary, gt = dataset.index, dataset.vocabulary, LVIS.__new__(LVIS)
    boxes = index.boxes.astype(np.float64)
    gt.logger = logging.getLogger("lvis")
    gt.dataset = {
        "images": [
            {
                "id": id,
                "neg_category_ids": ids(index.negatives[i]),
                "not_exhaustive_category_ids": ids(index.not_exhaustive[i]),
            }
            for i, id in enumerate(index.image_ids)
        ],
        "categories": [
            {"id": id, "name": name, "frequency": f, "image_count": 1}
            for id, name, f in zip(vocabulary.ids, vocabulary.names, dataset.frequency)
        ],
        "annotations": [
            {
                "id": a + 1,
                "image_id": index.image_ids[i],
                "category_id": vocabulary.ids[index.labels[a]],
                "bbox": [*boxes[a, :2], *(boxes[a, 2:] - boxes[a, :2])],
                "area": float(index.areas[a]),
            }
            for a, i in enumerate(index.image_of)
        ],
    }
    gt._create_index()
    evaluator = LVISEval(
        gt,
        LVISResults(gt, to_coco_json(dataset.vocabulary.ids, predictions, index.image_ids), 300),
        "bbox",
    )
    evaluator.run()
    return {name: evaluator.results[name] for name in METRICS["lvis"]}


# of lvis 0.5.3 for `random_lvis`; compared with the package itself where that is installed
LVIS_NUMBERS = {
    0: (
        0.29856598,
        0.48642966,
        0.2630334,
        0.08621886,
        0.47686527,
        0.65106244,
        0.35122659,
        0.32714631,
        0.13608409,
    ),
    1: (
        0.32703396,
        0.53993631,
        0.33944663,
        0.07755302,
        0.46769936,
        0.6478194,
        0.31153243,
        0.2758413,
        0.46042235,
    ),
    2: (
        0.31527501,
        0.53448641,
        0.32667103,
        0.05082951,
        0.45690916,
        0.80637445,
        0.38443764,
        0.25557032,
        0.29635913,
    ),
}


@pytest.mark.parametrize("seed", LVIS_NUMBERS)
def test_lvis_equals_the_official_evaluator(seed):
    dataset, predictions = random_lvis(seed)
    ours = {
        key: -1 if math.isnan(value) else value
        for key, value in evaluate_detections(dataset, predictions).items()
    }
    assert ours == pytest.approx(dict(zip(METRICS["lvis"], LVIS_NUMBERS[seed])), abs=1e-6)
    if importlib.util.find_spec("lvis"):
        assert ours == pytest.approx(lvis_numbers(dataset, predictions), abs=1e-6)


# -- OpenImages ------------------------------------------------------------------------------------

TREE = {
    "LabelName": "/m/root",
    "Subcategory": [
        {
            "LabelName": "/m/animal",
            "Subcategory": [{"LabelName": "/m/cat"}, {"LabelName": "/m/dog"}],
        },
        {
            "LabelName": "/m/toy",
            "Subcategory": [{"LabelName": "/m/dog"}],
            "Part": [{"LabelName": "/m/wheel"}],
        },
    ],
}
NAMES, IDS = (
    ("Animal", "Cat", "Dog", "Toy", "Wheel"),
    ("/m/animal", "/m/cat", "/m/dog", "/m/toy", "/m/wheel"),
)
ANIMAL, CAT, DOG, TOY, WHEEL = range(5)


def oid(annotations, images=1, **extra):
    return make_dataset("oid", NAMES, annotations, images, ids=IDS, hierarchy=TREE, **extra)


def test_oid_expands_ground_truth_and_predictions():
    dataset = oid([(0, CAT, 0, 0, 20, 20)])  # Cat and Animal are evaluated
    assert evaluate_detections(dataset, {0: predict((CAT, 0, 0, 20, 20, 0.5))}) == {"AP50": 1}
    assert evaluate_detections(dataset, {0: predict((ANIMAL, 0, 0, 20, 20, 0.5))}) == {"AP50": 0.5}
    # Dog is not verified here, but a dog is an animal, and a better scored one: Cat 1, Animal 1/2
    both = predict((CAT, 0, 0, 20, 20, 0.5), (DOG, 50, 50, 70, 70, 0.9))
    assert evaluate_detections(dataset, {0: both}) == {"AP50": 0.75}


def test_oid_two_parents_and_parts():
    found = {0: predict((DOG, 0, 0, 20, 20, 0.5))}
    assert evaluate_detections(oid([(0, DOG, 0, 0, 20, 20)]), found) == {
        "AP50": 1
    }  # Dog, Animal, Toy
    assert evaluate_detections(oid([(0, TOY, 0, 0, 20, 20)]), found) == {"AP50": 1}
    assert evaluate_detections(
        oid([(0, TOY, 0, 0, 20, 20)]), {0: predict((WHEEL, 0, 0, 20, 20, 0.5))}
    ) == {"AP50": 0}


def test_oid_unverified_class_is_ignored():
    wrong = (WHEEL, 50, 50, 70, 70, 0.9)
    predictions = {0: predict((WHEEL, 0, 0, 20, 20, 0.5)), 1: predict(wrong)}
    boxes = [(0, WHEEL, 0, 0, 20, 20)]
    assert evaluate_detections(oid(boxes, 2), predictions) == {"AP50": 1}
    assert evaluate_detections(oid(boxes, 2, negatives={1: [WHEEL]}), predictions) == {"AP50": 0.5}


def test_oid_absent_class_has_no_descendants():
    predictions = {0: predict((CAT, 0, 0, 20, 20, 0.5)), 1: predict((CAT, 50, 50, 70, 70, 0.9))}
    boxes = [(0, CAT, 0, 0, 20, 20)]
    assert evaluate_detections(oid(boxes, 2, negatives={1: [ANIMAL]}), predictions) == {"AP50": 0.5}
    assert evaluate_detections(oid(boxes, 2, negatives={1: [DOG]}), predictions) == {"AP50": 1}
    # no cat is not no animal: the false cat counts for Cat alone
    assert evaluate_detections(oid(boxes, 2, negatives={1: [CAT]}), predictions) == {"AP50": 0.75}


def test_oid_group_of_counts_once():
    group = [(0, WHEEL, 0, 0, 80, 80, 1), (0, WHEEL, 80, 80, 100, 100)]
    inside = [(WHEEL, 10 * i, 10, 10 * i + 8, 20, 0.9 - i / 100) for i in range(4)]
    single = (WHEEL, 80, 80, 100, 100, 0.5)
    assert evaluate_detections(oid(group), {0: predict(*inside, single)}) == {
        "AP50": 1
    }  # 1 hit, 3 ignored, 1 hit
    assert evaluate_detections(oid(group), {0: predict(single)}) == {
        "AP50": 0.5
    }  # the group is missed
    half_out = (WHEEL, 75, 0, 95, 10, 0.9)  # a quarter of it inside: a miss
    assert evaluate_detections(oid(group), {0: predict(half_out, single)})["AP50"] == pytest.approx(
        1 / 4
    )


def test_oid_single_box_goes_before_the_group():
    boxes = [(0, WHEEL, 0, 0, 80, 80, 1), (0, WHEEL, 10, 10, 30, 30)]
    twice = predict((WHEEL, 10, 10, 30, 30, 0.9), (WHEEL, 11, 10, 31, 30, 0.8))
    assert evaluate_detections(oid(boxes), {0: twice}) == {"AP50": 1}


def kinds(label):
    """What a box of the label is, up the tree: a dog is an animal and a toy."""
    return {CAT: (CAT, ANIMAL), DOG: (DOG, ANIMAL, TOY)}.get(label, (label,))


def overlap(a, b):
    """Their intersection, and the areas of both."""
    sides = [max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1)]
    return sides[0] * sides[1], *((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def iou(a, b):
    both, one, other = overlap(a, b)
    return both / (one + other - both)


def oid_class_ap(label, truth, found, absent, present):
    """Computes the AP50 as the challenge's evaluator does, box by box; None without ground truth.

    truth, found: {image: [(label, box, group or score)]}
    """
    scored, wanted = [], 0
    for image, boxes in truth.items():
        boxes = [(box, group) for kind, box, group in boxes if label in kinds(kind)]
        wanted += len(boxes)
        said = {kind for each in present[image] for kind in kinds(each)}
        said |= {
            kind for kind in range(len(NAMES)) for each in absent[image] if each in kinds(kind)
        }
        if not boxes and label not in said:
            continue
        detections = [(score, box) for kind, box, score in found[image] if label in kinds(kind)]
        single, groups = (
            [box for box, group in boxes if group == which] for which in (False, True)
        )
        taken, best_of_group = set(), {}
        for score, box in sorted(detections, key=lambda each: -each[0]):
            overlaps = [iou(box, each) for each in single]
            shares = [overlap(box, each)[0] / overlap(box, each)[1] for each in groups]
            best = max(range(len(single)), key=overlaps.__getitem__, default=None)
            if best is not None and overlaps[best] >= 0.5 and best not in taken:
                taken.add(best)
                scored.append((score, True))
            elif shares and max(shares) >= 0.5:
                best_of_group.setdefault(shares.index(max(shares)), score)
            else:
                scored.append((score, False))
        scored += [(score, True) for score in best_of_group.values()]
    hits = [hit for _, hit in sorted(scored, key=lambda each: -each[0])]
    precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
    return sum(max(precision[n:]) for n, hit in enumerate(hits) if hit) / wanted if wanted else None


@pytest.mark.parametrize("seed", range(5))
def test_oid_equals_the_protocol_box_by_box(seed):
    """Source: tensorflow/models:research/object_detection/utils/per_image_evaluation.py."""
    rng, truth, found, absent, present = np.random.default_rng(seed), {}, {}, {}, {}
    for image in range(20):
        corner, side = rng.uniform(0, 60, (6, 2)), rng.uniform(10, 40, (6, 2))
        boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32).astype(float)
        number = 0 if image % 5 == 4 else 4
        labels, groups = rng.integers(0, len(NAMES), 6).tolist(), rng.random(6) < 0.3
        truth[image] = list(zip(labels, boxes.tolist(), groups.tolist()))[:number]
        near = (
            (np.repeat(boxes, 3, axis=0) + rng.normal(0, 2, (18, 4)))
            .astype(np.float32)
            .astype(float)
        )
        guessed = np.where(
            rng.random(18) < 0.8, np.repeat(labels, 3), rng.integers(0, len(NAMES), 18)
        ).tolist()
        scores = rng.random(18).astype(np.float32).astype(float).tolist()
        found[image] = list(zip(guessed, near.tolist(), scores))
        here = {kind for label, *_ in truth[image] for kind in kinds(label)}
        unseen = [label for label in range(len(NAMES)) if not here & set(kinds(label))]
        absent[image] = [label for label in unseen if rng.random() < 0.3]
        present[image] = [int(rng.integers(len(NAMES)))] if rng.random() < 0.2 else []
    boxes = [
        (image, label, *box, group) for image, each in truth.items() for label, box, group in each
    ]
    dataset = oid(boxes, 20, negatives=absent, verified=present)
    records = {
        image: predict(*[(k, *box, score) for k, box, score in each])
        for image, each in found.items()
    }
    expected = [oid_class_ap(label, truth, found, absent, present) for label in range(len(NAMES))]
    expected = np.mean([value for value in expected if value is not None])
    assert 0.1 < expected < 0.9
    assert evaluate_detections(dataset, records)["AP50"] == pytest.approx(expected, abs=1e-6)


def test_oid_group_gets_what_no_single_box_takes():
    """A detection that overlaps both belongs to the single box, though the group contains it."""
    truth = np.array([[0, 0, 80, 80], [10, 10, 30, 30]], dtype=float)
    boxes = np.array([[10, 10, 30, 25], [50, 50, 60, 60]], dtype=float)
    hit, ignored = _match(boxes, truth, np.array([True, False]))
    assert hit.tolist() == [True, True] and not ignored.any()


def test_oid_equal_overlaps_go_to_the_first_box():
    """One found animal is in a group of dogs and one of cats; a second group of dogs is missed."""
    boxes = [(0, DOG, 0, 0, 60, 60, 1), (0, CAT, 0, 0, 70, 70, 1), (0, DOG, 60, 60, 90, 90, 1)]
    found = predict((ANIMAL, 10, 10, 20, 20, 0.9), (ANIMAL, 62, 10, 69, 20, 0.8))
    by_order = {}
    for order in ((0, 1, 2), (1, 0, 2)):
        by_order[order] = evaluate_detections(oid([boxes[i] for i in order]), {0: found})["AP50"]
    # Animal: the first detection takes the group listed first; the second is in the cats' group
    assert by_order[0, 1, 2] == pytest.approx(2 / 3 / 4) and by_order[1, 0, 2] == pytest.approx(
        1 / 3 / 4
    )


def test_oid_verified_class_without_a_box():
    wrong = predict((CAT, 50, 50, 70, 70, 0.9))
    boxes, found = [(0, CAT, 0, 0, 20, 20)], {0: predict((CAT, 0, 0, 20, 20, 0.5)), 1: wrong}
    assert evaluate_detections(oid(boxes, 2, verified={1: [CAT]}), found) == {
        "AP50": 0.5
    }  # and so is Animal
    assert evaluate_detections(oid(boxes, 2, verified={1: [ANIMAL]}), found) == {"AP50": 0.75}


def test_oid_detection_is_compared_with_one_box():
    """The second detection overlaps the taken box most: a false positive. COCO would match it."""
    truth = np.array([[0, 0, 10, 10], [3, 0, 13, 10]], dtype=float)
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10]], dtype=float)
    hit, ignored = _match(boxes, truth, np.zeros(2, dtype=bool))
    assert hit.tolist() == [True, False] and not ignored.any()


def test_oid_in_fractions():
    dataset = oid([(0, WHEEL, 0.0, 0.0, 0.5, 0.25)], relative=True)
    assert evaluate_detections(
        dataset, {0: predict((WHEEL, 0, 0, 200, 50, 0.5), size=(200, 400))}
    ) == {"AP50": 1}
    assert evaluate_detections(
        dataset, {0: predict((WHEEL, 0, 0, 100, 100, 0.5), size=(200, 400))}
    ) == {"AP50": 0}


def test_relative_boxes_with_the_coco_metric():
    dataset = make_dataset("coco", ("cat",), [(0, 0, 0.0, 0.0, 0.5, 0.5)], relative=True)
    values = evaluate_detections(dataset, {0: predict((0, 0, 0, 200, 100, 0.5), size=(200, 400))})
    assert values["APl"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_oid_equals_hotcoco_where_protocols_agree(seed):
    """With boxes far apart, all classes verified and no hierarchy, hotcoco gives the same AP."""
    rng = np.random.default_rng(seed)
    annotations, predictions, rows = [], {}, []
    for image in range(12):
        cells = rng.permutation(16)[: rng.integers(1, 12)]
        for cell in cells:
            x, y = 25.0 * (cell % 4), 25.0 * (cell // 4)
            annotations.append(
                (image, int(rng.integers(5)), x, y, x + 20, y + 20, int(rng.random() < 0.3))
            )
        mine = [a for a in annotations if a[0] == image]
        found = [
            (a[1], a[2] + d, a[3], a[4] + d, a[5], s)
            for a in mine
            for d, s in zip(rng.uniform(-12, 12, 3), rng.random(3))
        ]
        predictions[image] = predict(*found)
        rows += [[image, d[1], d[2], d[3] - d[1], d[4] - d[2], d[5], d[0]] for d in found]
    dataset = make_dataset(
        "oid", NAMES, annotations, 12, negatives={i: range(5) for i in range(12)}
    )
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
    assert evaluate_detections(dataset, predictions)["AP50"] == pytest.approx(
        oracle.get_results()["AP"], abs=1e-6
    )


# -- output ----------------------------------------------------------------------------------------


def test_table():
    text = format_table(
        {"coco": {"AP": 0.41234, "AP50": 1.0}, "openimages": {"AP50": 0.5, "APr": math.nan}}
    )
    assert text.splitlines() == [
        "dataset        AP   AP50  APr",
        "coco        0.412  1.000    -",
        "openimages      -  0.500    -",
    ]


def test_wide_table():
    results = {
        "a": {f"metric {i}": i / 10 for i in range(10)},
        "longer name": {"metric 9": math.nan},
    }
    blocks = [block.splitlines() for block in format_table(results, 45).split("\n\n")]
    assert [len(block) for block in blocks] == [3] * 4
    assert blocks[0][0] == "dataset      metric 0  metric 1  metric 2"
    assert blocks[3] == ["dataset      metric 9", "a               0.900", "longer name         -"]
    assert format_table(results, 5).count("dataset") == 10


# -- per class -------------------------------------------------------------------------------------


def mean_of(column) -> float:
    """The mean without NaN."""
    known = column[~np.isnan(column)]
    return known.mean() if len(known) else math.nan


@pytest.mark.parametrize("seed", range(2))
def test_classes_average_to_the_metric(seed):
    """Also those of masks, and the recall, which pycocotools has for each class."""
    dataset, predictions = with_masks(*random_dataset(seed))
    scores = evaluate_detections(dataset, predictions)
    for name in ("AP", "AP50", "mask AP", "mask AP50"):
        assert mean_of(scores.classes[name]) == pytest.approx(scores[name])
    results = to_coco_json(dataset.vocabulary.ids, predictions, dataset.index.image_ids)
    for kind, prefix in (("bbox", ""), ("segm", "mask ")):
        evaluated = pycocotools_evaluator(dataset, results, kind).eval
        precision = evaluated["precision"][:, :, :, 0, -1]
        of_class = {"AP": precision.mean((0, 1)), "AP50": precision[0].mean(0)}
        of_class["AR"] = evaluated["recall"][:, :, 0, -1].mean(0)
        for name, expected in of_class.items():
            ours = scores.classes[prefix + name]
            assert math.isnan(ours[-1]) and expected[-1] == -1
            assert ours[:-1] == pytest.approx(expected[:-1], abs=1e-6)


def test_classes_count_their_images_and_boxes():
    """A crowd is no box, and a class that has crowds alone is absent."""
    boxes = [(0, 0, 0, 0, 20, 20), (0, 0, 40, 40, 60, 60), (2, 0, 0, 0, 20, 20)]
    boxes += [(1, 0, 0, 0, 20, 20, 1), (1, 1, 0, 0, 20, 20, 1), (1, 3, 5, 5, 9, 9)]
    dataset = make_dataset("coco", ("cat", "dog", "cow", "ant"), boxes, images=3)
    found = predict((0, 0, 0, 20, 20, 0.5))
    classes = evaluate_detections(dataset, dict.fromkeys(range(3), found)).classes
    assert list(classes) == ["class", "AP", "AP50", "AR", "images", "boxes"]
    assert classes["class"] == ("cat", "dog", "cow", "ant")
    assert classes["images"].tolist() == [2, 0, 0, 1]
    assert classes["boxes"].tolist() == [3, 0, 0, 1]
    assert classes["AR"] == pytest.approx([2 / 3, math.nan, math.nan, 0], nan_ok=True)
    assert np.isnan(classes["AP"]).tolist() == [False, True, True, False]


def test_classes_of_lvis_average_to_their_frequencies():
    dataset, predictions = random_lvis(0)
    scores = evaluate_detections(dataset, predictions)
    for letter in "rcf":
        own = np.array(list(dataset.frequency)) == letter
        assert mean_of(scores.classes["AP"][own]) == pytest.approx(scores[f"AP{letter}"])
    assert 0 < mean_of(scores.classes["AR"]) < 1


def test_classes_of_open_images():
    """A box counts for the classes above its own, too, and so does a group-of box."""
    dataset = make_dataset("oid", NAMES, [(0, 0, 0, 0, 20, 20, 1), (1, 0, 0, 0, 20, 20)], 2)
    labels = [{"LabelName": id} for id in dataset.vocabulary.ids[:2]]
    dataset.hierarchy = labels[1] | {"Subcategory": [labels[0]]}
    scores = evaluate_detections(dataset, {0: predict((0, 0, 0, 20, 20, 0.9)), 1: predict()})
    classes = scores.classes
    assert list(classes) == ["class", "AP50", "images", "boxes"]
    assert classes["boxes"].tolist()[:3] == classes["images"].tolist()[:3] == [2, 2, 0]
    assert mean_of(classes["AP50"]) == scores["AP50"] == 0.5 and math.isnan(classes["AP50"][2])


def test_class_tables(tmp_path):
    """The best class comes first, and one without a box last, with a note, whatever its name is."""
    names = ("cat", "two\nlines", "größe 汉字", "no crowd")
    boxes = [(0, 0, 0, 0, 20, 20), (0, 0, 30, 30, 50, 50), (0, 2, 50, 50, 70, 70)]
    boxes += [(0, 3, 0, 0, 9, 9, 1)]
    dataset = make_dataset("coco", names, boxes)
    found = predict((0, 0, 0, 20, 20, 0.9), (2, 50, 50, 70, 70, 0.9))
    scores = evaluate_detections(dataset, {0: found})
    write_class_tables({"coco": scores, "coco (proposals)": {"AR@10": 0.5}}, tmp_path)
    assert (tmp_path / "per_class.txt").read_text().splitlines() == [
        "coco: 4 classes by AP, 2 of them with no box",
        "   AP   AP50     AR  images  boxes  class",
        "1.000  1.000  1.000       1      1  größe 汉字",
        "0.505  0.505  0.500       1      2  cat",
        "    -      -      -       0      0  two lines  (no box)",
        "    -      -      -       0      0  no crowd  (no box)",
    ]
    record = json.loads((tmp_path / "per_class.json").read_text())
    assert list(record) == ["coco"] and [row["class"] for row in record["coco"]] == list(names)
    values = {"AP": None, "AP50": None, "AR": None, "images": 0, "boxes": 0}
    assert record["coco"][1] == {"class": "two\nlines"} | values
    best = record["coco"][2]
    assert [best.pop("class"), *best] == ["größe 汉字", *values]
    assert best == pytest.approx(dict.fromkeys(values, 1))


def test_no_class_table_of_results_without_classes(tmp_path):
    write_class_tables({"coco (proposals)": {"AR@10": 0.5}}, tmp_path)
    assert not list(tmp_path.iterdir())


# -- results as json -------------------------------------------------------------------------------


def test_coco_json():
    vocabulary = Vocabulary("coco", ("cat", "dog"), (17, 18))
    results = to_coco_json(
        vocabulary.ids, {1: predict((1, 10, 20, 30, 50, 0.5)), 0: predict()}, [5, 139]
    )
    assert results == [{"image_id": 139, "category_id": 18, "bbox": [10, 20, 20, 30], "score": 0.5}]
    json.dumps(results)


def test_coco_json_with_masks():
    rles = encode_masks(torch.rand(1, 100, 100) < 0.5)
    found = predict((1, 10, 20, 30, 50, 0.5)) | {"segmentations": rles}
    (entry,) = to_coco_json((1, 2), {0: found}, [5])
    assert json.loads(json.dumps(entry))["segmentation"] == rles[0]


def real_coco():
    """(dataset, perfect predictions with masks) of the sample of COCO."""
    record = json.loads(REAL_COCO.read_text())
    rows = {image["id"]: row for row, image in enumerate(record["images"])}
    ids = tuple(c["id"] for c in record["categories"])
    annotations, found, rles = (
        [],
        {row: [] for row in rows.values()},
        {row: [] for row in rows.values()},
    )
    for a in record["annotations"]:
        x, y, w, h = a["bbox"]
        row, label = rows[a["image_id"]], ids.index(a["category_id"])
        annotations.append((row, label, x, y, x + w, y + h, a["iscrowd"]))
        if not a["iscrowd"]:
            found[row].append((label, x, y, x + w, y + h, 0.9))
            rles[row].append(a["segmentation"])
    dataset = make_dataset(
        "coco",
        tuple(c["name"] for c in record["categories"]),
        annotations,
        len(rows),
        ids=ids,
        areas=[a["area"] for a in record["annotations"]],
        image_ids=list(rows),
        segmentations=[a["segmentation"] for a in record["annotations"]],
    )
    sizes = [(image["height"], image["width"]) for image in record["images"]]
    return dataset, {
        r: predict(*found[r], size=sizes[r]) | {"segmentations": rles[r]} for r in rows.values()
    }


@pytest.mark.skipif(not REAL_COCO.is_file(), reason="the real data samples are not here")
def test_perfect_predictions_of_real_coco():
    keys = [*METRICS["coco"], *(f"mask {name}" for name in MASK_METRICS["coco"])]
    assert evaluate_detections(*real_coco()) == pytest.approx(dict.fromkeys(keys, 1.0))


@pytest.mark.skipif(not REAL_COCO.is_file(), reason="the real data samples are not here")
def test_shifted_predictions_of_real_coco():
    dataset, predictions = real_coco()
    generator = torch.Generator().manual_seed(0)
    for found in predictions.values():
        masks = decode_masks(found["segmentations"], found["size"])
        shifts = torch.randint(0, 12, (len(masks), 2), generator=generator).tolist()
        masks = [mask.roll(shift, (0, 1)) for mask, shift in zip(masks, shifts)]
        found["segmentations"] = encode_masks(torch.stack(masks)) if masks else []
        found["scores"] = torch.rand(len(masks), generator=generator)
    ours, oracle = (
        evaluate_detections(dataset, predictions),
        pycocotools_numbers(dataset, predictions, "segm"),
    )
    assert 0.1 < oracle["AP"] < 0.9
    assert [ours["mask AP"], ours["mask AP50"]] == pytest.approx(
        [oracle["AP"], oracle["AP50"]], abs=1e-6
    )
