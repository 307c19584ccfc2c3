"""Confusion matrix, TIDE's errors and the worst images, against cases by hand."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import make_dataset, predict

from common import class_colors, mistakes
from common.datasets import load_datasets
from common.evaluation import evaluate_detections
from common.labels import LabelSpace, Vocabulary
from common.mistakes import BACKGROUND, Mistakes, box_mistakes, most_confused, shares
from common.runlog import make_run_folder, report
from common.tables import Evidence

NAMES = ("cat", "dog", "cow")


@dataclass
class Flags:
    output: str
    resume: str = ""
    eval_only: bool = True
    predict: tuple = ()


# image, label, x1, y1, x2, y2, is a crowd
TRUTH = [
    (0, 0, 0, 0, 20, 20),
    (0, 1, 40, 0, 60, 20),
    (0, 0, 60, 60, 100, 100, 1),
    (1, 2, 0, 0, 30, 30),
    (2, 0, 10, 10, 50, 50),
]
FOUND = {
    0: predict(
        (1, 0, 0, 20, 20, 0.9),  # a cat is called a dog
        (1, 40, 0, 60, 20, 0.8),  # right
        (2, 0, 60, 20, 80, 0.7),  # nothing is there
        (0, 65, 65, 95, 95, 0.6),  # within the crowd
        (0, 80, 0, 99, 20, 0.2),  # nothing is there, of low score
    ),
    1: predict(),  # the cow is missed
    2: predict((0, 10, 10, 50, 50, 0.5)),  # right
}


def mistakes_by_hand(min_score=0.3):
    dataset = make_dataset("coco", NAMES, TRUTH, images=3)
    return box_mistakes(evaluate_detections(dataset, FOUND).evidence, min_score)


def test_confusion_of_boxes():
    found = mistakes_by_hand()
    assert found.names == [*NAMES, BACKGROUND]
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert found.counts.tolist() == expected
    assert "score of 0.3 or more, at IoU 0.5" in found.of
    low = mistakes_by_hand(0.1)
    assert low.counts[3].tolist() == [1, 0, 1, 0]  # the cat of low score, too; none in the crowd


def test_tide_of_boxes():
    # AP50: of two cats one at once, to half of 101 recalls; a dog after a wrong one; no cow
    cat, dog, cow = 51 / 101, 1 / 2, 0
    tide = mistakes_by_hand().tide
    assert tide["AP50"] == pytest.approx((cat + dog + cow) / 3)
    # with the wrong label put right both cats and the dog are found at once
    assert tide["Cls"] == pytest.approx((1 + 1 + 0) / 3 - tide["AP50"])
    assert tide["Loc"] == tide["Both"] == tide["Dupe"] == 0
    assert list(tide) == ["AP50", *mistakes.KINDS]


def test_worst_images_by_boxes():
    worst = mistakes_by_hand().worst
    assert list(worst) == [1, 0]  # image 2 has no mistake
    assert worst[1] == (0, "F1 0.00")
    # one right, two wrong, one missed
    assert worst[0] == (pytest.approx(2 / (2 + 2 + 1)), "F1 0.40")


def test_of_equal_scores_the_image_with_more_mistakes_is_worse():
    truth = [(0, 0, 0, 0, 9, 9), (1, 0, 0, 0, 9, 9), (1, 0, 20, 20, 29, 29)]
    dataset = make_dataset("coco", NAMES, truth, images=2)
    evidence = evaluate_detections(dataset, {0: predict(), 1: predict()}).evidence
    assert list(box_mistakes(evidence, 0.3).worst) == [1, 0]


@pytest.mark.parametrize("metric", ["oid", "lvis"])
def test_classes_that_an_image_does_not_tell_of(metric):
    truth = [(0, 1, 0, 0, 20, 20)]
    extra = {"frequency": "fff"} if metric == "lvis" else {}
    negatives = {0: [0]}
    dataset = make_dataset(metric, NAMES, truth, negatives=negatives, **extra)
    found = predict(
        (2, 0, 0, 20, 20, 0.9),  # a cow on the dog: wrong, whatever the image tells of cows
        (2, 50, 50, 70, 70, 0.8),  # a cow elsewhere: nobody knows
        (0, 50, 0, 70, 20, 0.7),  # a cat: there is none
        (1, 0, 0, 20, 20, 0.6),
    )
    evidence = evaluate_detections(dataset, {0: found}).evidence
    result = box_mistakes(evidence, 0.3)
    assert result.names == ["cat", "dog", "cow", BACKGROUND]
    assert result.counts.tolist() == [[0] * 4, [0, 0, 1, 0], [0] * 4, [0] * 4]
    assert "does not annotate" in result.of
    # the dog is right and the cat is wrong; cows do not count
    assert result.worst == {0: (pytest.approx(2 / 3), "F1 0.67")}


def test_nothing_to_find():
    crowd = make_dataset("coco", NAMES, [(0, 0, 0, 0, 9, 9, 1)])
    assert box_mistakes(evaluate_detections(crowd, {0: predict()}).evidence, 0.3) is None


def test_evidence_is_of_its_own_predictions():
    """UniDetector fills one dictionary again for each evaluation."""
    dataset = make_dataset("coco", NAMES, TRUTH, images=3)
    predictions = dict(FOUND)
    results = evaluate_detections(dataset, predictions)
    predictions[2] = predict()
    assert len(results.evidence.predictions[2]["scores"]) == 1
    assert evaluate_detections(dataset, predictions, control=True).evidence is None


def many(counts) -> Mistakes:
    counts = np.array(counts)
    names = [f"c{i}" for i in range(len(counts) - 1)]
    return Mistakes([*names, BACKGROUND], counts, "boxes", {}, {})


def test_the_most_confused_classes_are_shown(monkeypatch, tmp_path):
    counts = [[9, 0, 0, 8, 0], [0, 1, 3, 0, 0], [0, 0, 5, 0, 0], [0, 0, 0, 4, 1], [7, 0, 0, 0, 0]]
    monkeypatch.setattr(mistakes, "SHOWN", 3)
    assert most_confused(many(counts)) == [0, 1, 3]
    counts[0][3] = 0  # c0 is mixed up with the background alone, but more often than c3
    assert most_confused(many(counts)) == [0, 1, 2]
    monkeypatch.setattr(mistakes, "SHOWN", 2)
    assert most_confused(many(counts)) == [1, 2]
    monkeypatch.setattr(mistakes, "SHOWN", 3)
    drawn = []
    monkeypatch.setattr(mistakes, "draw_heat_map", lambda heat_map, path: drawn.append(heat_map))
    mistakes.draw_confusion("a set", many(counts), tmp_path)
    assert list(drawn[0].rows) == ["c0", "c1", "c2", "(no object): 7 boxes"]
    assert list(drawn[0].columns) == ["c0", "c1", "c2", "(no box)"]
    assert drawn[0].title.endswith("the 3 most confused classes, 1 others left out")
    # shares of the whole row, though a column is left out
    np.testing.assert_allclose(drawn[0].values[1], [0, 0.25, 0.75, 0])
    np.testing.assert_allclose(shares(np.array([[0, 0], [1, 3]])), [[0, 0], [0.25, 0.75]])


def load_mine(folder):
    """The truth above as a dataset of files, without the crowd."""
    (folder / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (100, 100), (90, 140, 90)).save(folder / "images" / f"{i}.jpg")
    boxes = []
    for image, label, x1, y1, x2, y2, *_ in TRUTH[:2] + TRUTH[3:]:
        box = {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        boxes.append(box | {"id": len(boxes), "area": 1, "iscrowd": 0})
    record = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(3)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
        "annotations": boxes,
    }
    (folder / "mine.json").write_text(json.dumps(record))
    return load_datasets(f"mine={folder}/mine.json:{folder}/images", "val")[0]


def test_files_of_a_report(tmp_path):
    dataset = load_mine(tmp_path)
    results = {"mine": evaluate_detections(dataset, FOUND), "mine (shuffled text)": {"AP": 0.0}}
    folder = tmp_path / "run"
    args = SimpleNamespace(score_threshold=0.3, eval_every=0, eval_only=True, track="")
    report(results, folder, args)
    written = {path.name for path in folder.iterdir()}
    assert {"confusion_mine.png", "worst_mine.jpg", "errors.json", "errors.txt"} <= written
    text = (folder / "errors.txt").read_text()
    assert "         1  0.500  cat -> dog\n" in text and "Cls" in text and "-> cow" not in text
    assert "of 4 objects" in text
    record = json.loads((folder / "errors.json").read_text())
    assert list(record) == ["mine"]
    assert {"true": "cat", "predicted": "dog", "count": 1} in record["mine"]["confusion"]
    assert record["mine"]["worst"][0] == {"file": "1.jpg", "score": 0.0}
    with Image.open(folder / "worst_mine.jpg") as picture:
        assert picture.size == (2 * 484, 2 * (484 + 28))  # two images, beside their truth


def test_a_run_gives_its_classes_colors(tmp_path, monkeypatch):
    monkeypatch.setattr(class_colors, "_places", {})
    parts = [Vocabulary("a", ("Cat", "dog")), Vocabulary("b", ("cat", "cow"))]
    args = Flags(output=str(tmp_path / "run"))
    make_run_folder(args, "a_method", LabelSpace(parts, merge=True))
    assert class_colors._places == {"cat": 0, "dog": 1, "cow": 2}
    assert class_colors.color_of("cow") == class_colors.palette()[2]


def test_pixels_and_worst_maps():
    counts = np.array([[6, 2], [0, 2]])
    dataset = make_dataset("miou", ("sky", "sea"), [], images=4)
    evidence = Evidence(dataset, {3: {}, 1: {}, 2: {}}, {3: 0.5, 1: 0.25, 2: 1.0}, counts)
    found = mistakes._of_segments(evidence)
    assert found.names == ["sky", "sea"] and (found.counts == counts).all() and not found.tide
    assert found.worst == {1: (0.25, "mIoU 0.25"), 3: (0.5, "mIoU 0.50")}  # the other is right
    of_segments = Evidence(dataset, {}, {3: 0.5})
    assert mistakes._of_segments(of_segments).worst == {3: (0.5, "PQ 0.50")}


def test_low_scores_stay_of_many_maps():
    from common.inference import PICTURED, _keep_worst

    worst = {}
    scores = torch.linspace(0, 1, 20)[torch.randperm(20)].tolist()
    for row, score in enumerate(scores):
        _keep_worst(worst, row, score, {"size": (1, 1)})
    assert sorted(score for score, _ in worst.values()) == sorted(scores)[:PICTURED]
    _keep_worst(worst, 99, float("nan"), {})
    assert 99 not in worst
