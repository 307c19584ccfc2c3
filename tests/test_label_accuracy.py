"""Top-1 and top-5 accuracy on image labels, and which such datasets are evaluated."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import evaluation_datasets, load_datasets
from common.datasets.names import eval_entries
from common.evaluation import evaluate_detections, recall
from common.inference import evaluate_dataset
from common.label_accuracy import best_classes
from common.labels import LabelSpace, Vocabulary
from common.runlog import report

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def predict(*pairs):
    """pairs: (label, score) each"""
    labels, scores = zip(*pairs) if pairs else ((), ())
    return {
        "boxes": torch.tensor([[0.0, 0, 9, 9]]).repeat(len(pairs), 1),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "size": (10, 10),
    }


def class_folders(root, images):
    """images: {folder of a class: number of images}"""
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (10, 10)).save(root / name / f"{i}.png")
    return root


def labelled(tmp_path):
    root = class_folders(tmp_path / "labels", dict.fromkeys(CLASSES, 1) | {"ant": 2})
    (dataset,) = load_datasets(f"mine={root}", "val", accepts=("image_labels",))
    return dataset


def test_a_class_has_the_score_of_its_best_box():
    found = predict((3, 0.2), (1, 0.5), (3, 0.9), (0, 0.5), (1, 0.1))
    assert best_classes(found, 2) == [3, 1]
    assert best_classes(found, 5) == [3, 1, 0]
    assert best_classes(predict(), 5) == []


def test_accuracy_by_hand(tmp_path):
    dataset = labelled(tmp_path)
    every = [(label, 0.5 - label / 100) for label in range(7)]  # ant is the best, then bee, ...
    # images: two of ant, one of each other class
    found = {0: predict(*every), 1: predict()} | {row: predict(*every) for row in range(2, 8)}
    groups = {"early": np.arange(7) < 2, "none": np.zeros(7, dtype=bool)}
    results = evaluate_detections(dataset, found, groups)
    # right: an image of ant; among five: one of ant, bee, cat, dog, eel
    assert results["top1"] == 1 / 8 and results["top5"] == 5 / 8
    assert results["top1 early"] == 1 / 3 and math.isnan(results["top1 none"])
    assert results.classes["top1"].tolist() == [0.5, 0, 0, 0, 0, 0, 0]
    assert results.classes["top5"].tolist() == [0.5, 1, 1, 1, 1, 0, 0]
    assert results.classes["images"].tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert all(map(math.isnan, recall(dataset, found).values()))


def test_files_of_an_evaluation(tmp_path):
    dataset = labelled(tmp_path)
    args = SimpleNamespace(workers=0, score_threshold=0.3, eval_every=0, eval_only=True, track="")

    def detector(batch):
        return [predict((2, 0.5))]

    results = evaluate_dataset(detector, dataset, lambda sample: sample, args, tmp_path)
    report(results, tmp_path, args)
    lines = (tmp_path / "per_class.txt").read_text().splitlines()
    assert lines[0] == "mine: 7 classes by top1"
    assert lines[2].split() == ["1.000", "1.000", "1", "cat"]
    assert (tmp_path / "predictions-mine.jpg").is_file()
    assert not (tmp_path / "errors.json").exists()


def test_folders_with_a_validation_are_evaluated(tmp_path):
    class_folders(tmp_path / "both/train", {"ant": 1})
    class_folders(tmp_path / "both/val", {"ant": 1})
    class_folders(tmp_path / "one", {"ant": 1})
    text = f"one={tmp_path}/one,both={tmp_path}/both,my=a.json:b,in21k"
    assert eval_entries("", text, without=["one", "both", "in21k"]) == (
        f"both={tmp_path}/both,my=a.json:b"
    )


def test_the_log_says_how_others_are_evaluated(tmp_path, caplog):
    caplog.set_level(logging.INFO, "concord")
    class_folders(tmp_path / "one", {"ant": 1, "bee": 1})
    class_folders(tmp_path / "both/train", {"ant": 1})
    class_folders(tmp_path / "both/val", {"ant": 1})
    args = SimpleNamespace(
        datasets=f"one={tmp_path}/one,both={tmp_path}/both",
        **{"eval_datasets": "", "data_root": "", "classes": "", "rename": ""},
        **{"predict": (), "eval_only": False, "text_encoder": ""},
    )
    text = torch.eye(2)
    space = LabelSpace([Vocabulary("one", ("ant", "bee"), text=text)])
    (dataset,) = evaluation_datasets(args, space, 0, without=["one", "both"])
    assert dataset.name == "both" and str(dataset.images).endswith("val")
    assert "one is not evaluated" in caplog.text and "both is not evaluated" not in caplog.text
    assert "--eval-datasets both,one@200 gives" in caplog.text
    args.eval_datasets = "both,one@1"  # as the log says
    found = evaluation_datasets(args, space, 0, without=["one", "both"])
    assert [(dataset.name, len(dataset)) for dataset in found] == [("both", 1), ("one", 1)]


@pytest.mark.parametrize("name, entry", [("in21k", "in21k@200:train"), ("mine", "mine@200")])
def test_entries_that_the_log_names(name, entry, caplog):
    from common.datasets.runs import _tell_of_others

    caplog.set_level(logging.INFO, "concord")
    _tell_of_others([name], "coco")
    assert f"--eval-datasets coco,{entry} gives" in caplog.text
