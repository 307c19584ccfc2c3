"""mIoU and PQ equal hotcoco, over ranks too; what predictions leave behind is read back."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL
from hotcoco import panoptic, semantic
from PIL import Image

import common.inference
from common.batch import Sample
from common.datasets.index import Index
from common.datasets.maps import label_table, read_label_map
from common.datasets.readers.panoptic import read_panoptic
from common.inference import evaluate_dataset, predict_files
from common.labels import LabelSpace, Vocabulary
from common.masks import decode_masks, encode_masks
from common.segment_metrics import (
    confusion,
    match_segments,
    panoptic_results,
    segment_counts,
    segment_results,
    semantic_classes,
    semantic_results,
)
from common.segments import instances
from common.tables import format_classes
from common.visualize import color_of, save_image

NAMES = ("cat", "dog", "sky", "sea")
VOCABULARY = Vocabulary("hand", NAMES, (7, 3, 20, 300), is_thing=(True, True, False, False))


# -- mIoU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_miou_equals_hotcoco(seed):
    rng, classes = np.random.default_rng(seed), 6
    oracle, total = semantic.SemanticEval(classes, ignore_index=255), 0
    for _ in range(4):
        truth = rng.integers(-1, classes, (30, 40))
        predicted = np.where(
            rng.random(truth.shape) < 0.5, truth, rng.integers(0, classes, truth.shape)
        ).clip(0)
        oracle.update(np.where(truth < 0, 255, truth), predicted)
        total = total + confusion(truth, predicted, classes)
    assert np.array_equal(total, oracle.confusion())
    names, expected = (
        {"mIoU": "mIoU", "fwIoU": "fwIoU", "mACC": "mAcc", "pACC": "aAcc"},
        oracle.results(),
    )
    assert semantic_results(total) == pytest.approx(
        {ours: expected[name] for ours, name in names.items()}, abs=1e-9
    )
    assert 0.2 < expected["mIoU"] < 0.8


def test_miou_by_hand():
    """Void does not count. Class 2 is predicted but never true: it is in no mean."""
    truth = np.array([[0, 0, 0, 1], [1, 1, -1, -1]])
    predicted = np.array([[0, 0, 2, 1], [1, 0, 1, 2]])
    results = semantic_results(confusion(truth, predicted, 4))
    iou, recall = (2 / 4, 2 / 3), (2 / 3, 2 / 3)
    expected = {"mIoU": sum(iou) / 2, "fwIoU": sum(iou) / 2, "mACC": sum(recall) / 2, "pACC": 4 / 6}
    assert results == pytest.approx(expected)
    assert all(
        math.isnan(value) for value in semantic_results(np.zeros((4, 4), dtype=np.int64)).values()
    )


def test_iou_of_each_class():
    """A class that is never true has none, also if it is predicted, and says so."""
    truth = np.array([[0, 0, 0, 1], [1, 1, -1, -1]])
    predicted = np.array([[0, 0, 2, 1], [1, 0, 1, 2]])
    counts = {"semantic": confusion(truth, predicted, 4)}
    scores = segment_results(counts, VOCABULARY)
    nan = math.nan
    classes = scores.classes
    assert classes["IoU"] == pytest.approx([2 / 4, 2 / 3, nan, nan], nan_ok=True)
    assert classes["recall"] == pytest.approx([2 / 3, 2 / 3, nan, nan], nan_ok=True)
    assert classes["share"].tolist() == [0.5, 0.5, 0, 0]
    assert np.nanmean(classes["IoU"]) == scores["mIoU"]
    assert np.nansum(classes["IoU"] * classes["share"]) == pytest.approx(scores["fwIoU"])
    assert format_classes("hand", classes).splitlines() == [
        "hand: 4 classes by IoU, 2 of them with no pixel",
        "  IoU  recall  share  class",
        "0.667   0.667  0.500  dog",
        "0.500   0.667  0.500  cat",
        "    -       -  0.000  sky  (no pixel)",
        "    -       -  0.000  sea  (no pixel)",
    ]


def test_no_class_has_a_pixel():
    classes = semantic_classes(np.zeros((4, 4), dtype=np.int64))
    assert np.isnan(classes["IoU"]).all() and not classes["share"].any()


def test_pq_of_each_class():
    """A class that is predicted and never true has the PQ 0, and counts."""
    truth = np.array([[0, 0, 1, 1]])
    found = np.array([[0, 0, 1, 1]])
    counts = match_segments(
        truth=truth,
        truth_labels=np.array([0, 1]),
        crowd=np.array([False, False]),
        found=found,
        found_labels=np.array([0, 2]),
        num_classes=4,
    )
    scores = segment_results({"panoptic": counts}, VOCABULARY)
    classes = scores.classes
    expected = [1, 0, 0, math.nan]
    for name in ("PQ", "SQ", "RQ"):
        assert classes[name] == pytest.approx(expected, nan_ok=True)
        assert np.nanmean(classes[name]) == pytest.approx(scores[name]) == pytest.approx(1 / 3)
    assert classes["segments"].tolist() == [1, 1, 0, 0]
    assert scores["PQ things"] == 0.5 and scores["PQ stuff"] == 0
    lines = format_classes("hand", classes).splitlines()
    assert lines[0] == "hand: 4 classes by PQ, 2 of them with no segment"
    assert lines[-2:] == [
        "0.000  0.000  0.000         0  sky  (no segment)",
        "    -      -      -         0  sea  (no segment)",
    ]


# -- PQ --------------------------------------------------------------------------------------------


def blobs(rng, size, count, labels, void):
    """Returns (H, W) rows of random rectangles, -1 for none, and their labels. No row is empty."""
    rows = np.full(size, -1)
    for row in range(count):
        (y, x), (h, w) = rng.integers(0, size), rng.integers(4, 25, 2)
        rows[y : y + h, x : x + w] = row
    rows[rng.random(size) < void] = -1
    kept, inverse = np.unique(rows[rows >= 0], return_inverse=True)
    rows[rows >= 0] = inverse
    return rows, rng.integers(0, labels, len(kept))


def disturbed(rng, rows, labels, classes):
    """A prediction: shifted, some segments lost, some merged, some with another label."""
    rows = np.roll(rows, rng.integers(-1, 2, 2), axis=(0, 1))
    lost = rng.random(len(labels)) < 0.2
    rows = np.where((rows >= 0) & ~np.append(lost, True)[rows], rows, -1)
    kept, inverse = np.unique(rows[rows >= 0], return_inverse=True)
    rows[rows >= 0] = inverse
    labels = np.where(
        rng.random(len(kept)) < 0.2, rng.integers(0, classes, len(kept)), labels[kept]
    )
    extra = np.append(labels, rng.integers(0, classes))
    rows[:5, :5], rows[rng.random(rows.shape) < 0.02] = len(labels), -1
    kept, inverse = np.unique(rows[rows >= 0], return_inverse=True)
    rows[rows >= 0] = inverse
    return rows, extra[kept]


def write_panoptic(folder, name, images, vocabulary):
    """images: (rows, labels, crowd) each, written in COCO's format."""
    (folder / name).mkdir(parents=True)
    record = {"images": [], "annotations": [], "categories": []}
    for label, thing in enumerate(vocabulary.is_thing):
        category = {
            "id": vocabulary.ids[label],
            "name": vocabulary.names[label],
            "isthing": int(thing),
        }
        record["categories"].append(category)
    for i, (rows, labels, crowd) in enumerate(images):
        ids = 256 * np.arange(1, len(labels) + 2)  # of more than one channel
        ids[-1] = 0
        colors = np.stack([ids[rows] >> shift & 255 for shift in (0, 8, 16)], axis=2).astype(
            np.uint8
        )
        Image.fromarray(colors).save(folder / name / f"{i}.png")
        segments = [
            {
                "id": int(id),
                "category_id": vocabulary.ids[label],
                "iscrowd": int(c),
                "area": int((rows == row).sum()),
            }
            for row, (id, label, c) in enumerate(zip(ids, labels, crowd))
        ]
        shape = {"height": rows.shape[0], "width": rows.shape[1]}
        record["images"].append({"id": i, "file_name": f"{i}.jpg", **shape})
        record["annotations"].append(
            {"image_id": i, "file_name": f"{i}.png", "segments_info": segments}
        )
    (folder / f"{name}.json").write_text(json.dumps(record))
    return folder / f"{name}.json"


def check_against_hotcoco(results, expected):
    assert results["PQ"] == pytest.approx(expected["All"]["pq"], abs=1e-6)
    assert results["SQ"] == pytest.approx(expected["All"]["sq"], abs=1e-6)
    assert results["RQ"] == pytest.approx(expected["All"]["rq"], abs=1e-6)
    assert results["PQ things"] == pytest.approx(expected["Things"]["pq"], abs=1e-6)
    assert results["PQ stuff"] == pytest.approx(expected["Stuff"]["pq"], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_pq_equals_hotcoco(tmp_path, seed):
    rng, classes, truth, found, counts = np.random.default_rng(seed), 4, [], [], 0
    for _ in range(8):
        rows, labels = blobs(rng, (60, 80), 12, classes, 0.05)
        crowd, seen = rng.random(len(labels)) < 0.25, set()
        for row in np.flatnonzero(
            crowd
        ):  # one crowd of each class, as the official code reads them
            crowd[row] = labels[row] not in seen
            seen.add(labels[row])
        truth.append((rows, labels, crowd))
        rows, labels = disturbed(rng, rows, labels, classes)
        found.append((rows, labels, np.zeros(len(labels), dtype=bool)))
        counts = counts + match_segments(*truth[-1], *found[-1][:2], classes)
    paths = [
        write_panoptic(tmp_path, name, images, VOCABULARY)
        for name, images in (("gt", truth), ("dt", found))
    ]
    expected = panoptic.pq_compute(*map(str, paths))
    official = [
        [expected["per_class"][id][key] for id in VOCABULARY.ids]
        for key in ("tp", "fp", "fn", "iou")
    ]
    assert (
        counts == pytest.approx(np.array(official, dtype=float), abs=1e-9)
        and counts[:3].sum(axis=1).min() > 0
    )
    check_against_hotcoco(panoptic_results(counts, VOCABULARY.is_thing), expected)


def strip(*lengths):
    """Returns rows (1, W): lengths[0] pixels of void, lengths[1] pixels of row 0, and so on."""
    return np.repeat(np.arange(-1, len(lengths) - 1), lengths)[None]


def test_pq_by_hand():
    truth, labels = strip(2, 6, 4, 8), np.array([0, 0, 1])  # void, cat, crowd of cats, dog
    crowd = np.array([False, True, False])
    found = np.array([[0] * 6 + [1] * 5 + [2] * 3 + [3] * 3 + [-1] * 3])
    counts = match_segments(truth, labels, crowd, found, np.array([0, 0, 1, 1]), 2)
    # row 0: four of the cat's pixels, two of void; row 1: two of the cat, three of the crowd, so it
    # is not wrong; rows 2 and 3: three of the dog's eight
    assert counts.tolist() == [[1, 0], [0, 2], [0, 1], [pytest.approx(4 / 6), 0]]
    results = panoptic_results(counts, (True, False))
    expected = {"PQ": 1 / 3, "SQ": 1 / 3, "RQ": 0.5, "PQ things": 2 / 3, "PQ stuff": 0}
    assert results == pytest.approx(expected)
    assert "PQ things" not in panoptic_results(counts, None)


def test_pq_without_segments():
    nothing, void = np.zeros(0, dtype=np.int64), np.full((2, 3), -1)
    counts = match_segments(void, nothing, nothing.astype(bool), void, nothing, 3)
    assert counts.shape == (4, 3) and not counts.any()
    assert all(
        math.isnan(value) for value in panoptic_results(counts, (True, True, False)).values()
    )
    one = match_segments(void + 1, np.array([2]), np.array([False]), void, nothing, 3)
    assert one.tolist() == [[0] * 3, [0] * 3, [0, 0, 1], [0] * 3]
    assert panoptic_results(one, (True, True, False))["PQ"] == 0
    half = match_segments(
        strip(0, 4, 2), np.array([0, 0]), np.zeros(2, bool), strip(0, 2, 4), np.array([0, 1]), 3
    )
    assert half[0].tolist() == [0, 0, 0]  # an IoU of exactly 0.5 is none


@pytest.mark.parametrize(
    "found, message",
    [
        (
            {"semantic": torch.zeros(3, 4)},
            r"a map of \(3, 4\) was predicted for an image of \(2, 3\)",
        ),
        ({"semantic": torch.full((2, 3), 9)}, "4 classes, but label 9 was predicted"),
        ({"semantic": torch.full((2, 3), -1)}, "4 classes, but label -1 was predicted"),
        ({"panoptic": torch.zeros(3, 4), "segments_info": []}, r"a map of \(3, 4\) was predicted"),
        (
            {"panoptic": torch.ones(2, 3), "segments_info": [{"id": 1, "label": 4, "score": 1}]},
            "but label 4 was",
        ),
    ],
)
def test_wrong_predictions_are_errors(found, message):
    truth = SimpleNamespace(
        labels=torch.zeros(1, dtype=torch.long), segments=torch.zeros(2, 3, dtype=torch.int16)
    )
    with pytest.raises(ValueError, match=message):
        segment_counts(found, truth, np.zeros(1, dtype=bool) if "panoptic" in found else None, 4)


# -- whole datasets --------------------------------------------------------------------------------


class Hand:
    """Five 40 x 60 images: a dog on sky, a crowd of dogs and the sea below, void at the left."""

    name, vocabulary, masks = "hand", VOCABULARY, False
    frequency = hierarchy = None
    trained_on = False

    def __init__(self, metric):
        self.metric, self.labels = metric, torch.tensor([2, 1, 1, 3])
        self.segments = torch.zeros(40, 60, dtype=torch.int16)
        self.segments[5:15, 20:40], self.segments[20:, :30], self.segments[20:, 30:] = 1, 2, 3
        self.segments[:, :4] = -1
        boxes = np.array([[4, 0, 60, 20], [20, 5, 40, 15], [4, 20, 30, 40], [30, 20, 60, 40]])
        labels, areas, ignore = (
            np.tile(column, 5) for column in (self.labels, [920, 200, 520, 600], [0, 0, 1, 0])
        )
        files = [f"{i}.jpg" for i in range(5)]
        self.index = Index.build(
            "hand",
            files,
            range(5),
            np.tile([40, 60], (5, 1)),
            np.repeat(np.arange(5), 4),
            np.tile(boxes, (5, 1)),
            labels,
            areas=areas,
            ignore=ignore,
            segmentations=encode_masks(self.segments == torch.arange(4)[:, None, None]) * 5,
        )

    def __len__(self):
        return 5

    def load(self, i, keep_ignored=False):
        sample = Sample.unlabelled(torch.full((3, 40, 60), 128, dtype=torch.uint8), "hand", i, i)
        if self.metric == "coco":
            rows = self.index.rows(i)
            sample.boxes, sample.labels = torch.from_numpy(self.index.boxes[rows]), self.labels
            sample.masks = (
                decode_masks(self.index.segmentations[rows], (40, 60)) if self.masks else None
            )
            return sample
        sample.labels, sample.segments = self.labels, self.segments
        if not keep_ignored:
            sample.segments = torch.where(self.segments == 2, -1, self.segments).short()
        return sample


def segmenter(batch):
    """Predicts even images right, but the crowd as one dog. Predicts odd images as sky."""
    found = []
    for sample in batch.samples:
        panoptic = torch.ones(40, 60, dtype=torch.int32)
        info = [{"id": 1, "label": 2, "isthing": False, "score": 0.9}]
        if sample.index % 2 == 0:
            panoptic[5:15, 20:40], panoptic[20:, :30], panoptic[20:, 30:] = 2, 3, 40000
            others = ((2, 1, True), (3, 1, True), (40000, 3, False))
            info += [
                {"id": id, "label": label, "isthing": thing, "score": 0.8}
                for id, label, thing in others
            ]
        semantic = torch.zeros(40, 60, dtype=torch.int16)
        for segment in info:
            semantic[panoptic == segment["id"]] = segment["label"]
        found.append(
            {"panoptic": panoptic, "segments_info": info, "semantic": semantic, "size": (40, 60)}
        )
    return found


def detector(batch):
    """The masks of the ground truth by way of `instances`."""
    masks = torch.where(Hand("pq").segments == torch.tensor([0, 1, 3])[:, None, None], 5.0, -5.0)
    probabilities = torch.zeros(3, 4).scatter_(1, torch.tensor([[2], [1], [3]]), 0.9)
    return [
        instances(probabilities, masks, 3) | {"class_names": NAMES, "size": (40, 60)}
        for _ in batch.samples
    ]


def evaluate(metric, folder, predict):
    args = SimpleNamespace(workers=0, score_threshold=0.5)
    results = evaluate_dataset(predict, Hand(metric), keep, args, folder, "a set")
    return results.get("a set", results)


def keep(sample):
    return sample


def write_predictions(predict, files, vocabulary, folder):
    """Runs predict_files with `predict`, which needs the batch alone."""
    args = SimpleNamespace(predict=tuple(map(str, files)), score_threshold=0.5)
    label_space = LabelSpace([vocabulary])
    predict_files(lambda batch, label_space: predict(batch), args, label_space, keep, folder)


EXPECTED_PQ = {"sky": 3 / (3 + 2 / 2 + 2 / 2), "dog": 3 / (3 + 2 / 2), "sea": 3 / (3 + 2 / 2)}


def test_panoptic_dataset(tmp_path):
    results = evaluate("pq", tmp_path, segmenter)
    assert list(results) == ["PQ", "SQ", "RQ", "PQ things", "PQ stuff", "mIoU"]
    assert results["PQ things"] == pytest.approx(EXPECTED_PQ["dog"])
    assert results["PQ stuff"] == pytest.approx((EXPECTED_PQ["sky"] + EXPECTED_PQ["sea"]) / 2)
    assert results["PQ"] == pytest.approx(sum(EXPECTED_PQ.values()) / 3) and results["SQ"] == 1
    # void does not count; the crowd has a class: 200 + 520 pixels of dogs, 920 of sky, 600 of sea
    assert results["mIoU"] == pytest.approx((5 * 920 / (5 * 920 + 2 * 1320) + 3 / 5 + 3 / 5) / 3)
    assert (tmp_path / "predictions-a-set.jpg").is_file()


def test_semantic_dataset(tmp_path):
    results = evaluate("miou", tmp_path, segmenter)
    assert list(results) == ["mIoU", "fwIoU", "mACC", "pACC"]
    assert results["mIoU"] == pytest.approx((5 * 920 / (5 * 920 + 2 * 1320) + 3 / 5 + 3 / 5) / 3)
    assert (tmp_path / "predictions-a-set.jpg").is_file()


@pytest.mark.parametrize("metric", ["miou", "pq"])
def test_evidence_of_segments(metric, tmp_path):
    args = SimpleNamespace(workers=0, score_threshold=0.5, data_root="")
    evidence = evaluate_dataset(segmenter, Hand(metric), keep, args, tmp_path)["hand"].evidence
    sky = 920 / (920 + 1320)  # of an image that is predicted as sky; 920 pixels are
    assert evidence.scores == {row: pytest.approx(sky / 3 if row % 2 else 1) for row in range(5)}
    assert evidence.predictions.keys() == evidence.scores.keys()
    assert evidence.pixels.sum() == 5 * 2240 and evidence.pixels[1, 2] == 2 * 720
    assert evaluate(metric, tmp_path, segmenter).evidence is None  # of a control


def test_instance_dataset(tmp_path):
    results = evaluate("coco", tmp_path, detector)
    assert results["mask AP"] == results["AP"] == pytest.approx(1)
    assert (tmp_path / "predictions-a-set.jpg").is_file()


def test_results_on_training_images_are_said_to_be_so(tmp_path, monkeypatch, caplog):
    evaluate("coco", tmp_path, detector)
    assert "TRAINING" not in caplog.text
    monkeypatch.setattr(Hand, "trained_on", True)
    evaluate("coco", tmp_path, detector)
    assert "a set: these are results on its TRAINING images" in caplog.text


@pytest.mark.parametrize("metric", ["pq", "miou"])
def test_ranks_share_the_work(tmp_path, monkeypatch, metric):
    """Three ranks count each image once. Sums are those of one rank. Only rank 0 reports."""
    alone, parts = evaluate(metric, tmp_path, segmenter), []
    monkeypatch.setattr(common.inference, "world_size", lambda: 3)
    for rank in (2, 1, 0):
        monkeypatch.setattr(common.inference, "rank", lambda rank=rank: rank)

        def gather(value, rank=rank):
            parts.append(value)
            return [] if rank else parts

        monkeypatch.setattr(common.inference, "gather_on_main", gather)
        results = evaluate(metric, tmp_path / str(rank), segmenter)
        assert results == (alone if rank == 0 else {}) and (tmp_path / str(rank)).exists() == (
            rank == 0
        )
    assert [len(pictured) for *_, pictured in parts] == [1, 2, 2]


def test_real_panoptic_predictions(tmp_path):
    """Real ground truth and a shifted copy are measured here, and by hotcoco from the files."""
    source = REAL / "coco/annotations/panoptic_val2017.json"
    if not source.is_file():
        pytest.skip(f"no {source}; CONCORD_REAL names the folder of real samples")
    record, rng = json.loads(source.read_text()), np.random.default_rng(0)
    crowded = [a for a in record["annotations"] if any(s["iscrowd"] for s in a["segments_info"])]
    record["annotations"] = crowded + [a for a in record["annotations"] if a not in crowded][:7]
    (tmp_path / "gt.json").write_text(json.dumps(record))
    (tmp_path / "gt").symlink_to(source.with_suffix(""))
    dataset = read_panoptic("real", tmp_path / "gt.json", REAL / "coco/val2017")
    wrong = {
        row: rng.random(len(dataset.load(row, keep_ignored=True).labels))
        for row in range(len(dataset))
    }

    def shifted(batch):
        (sample,) = batch.samples
        truth, chance = dataset.load(sample.index, keep_ignored=True), wrong[sample.index]
        panoptic = torch.roll(truth.segments.int() + 1, (3, 5), dims=(0, 1))
        panoptic[torch.isin(panoptic, torch.from_numpy(np.flatnonzero(chance < 0.1)) + 1)] = 0
        labels = np.where(
            chance > 0.9, (truth.labels.numpy() + 1) % len(dataset.vocabulary), truth.labels.numpy()
        )
        info = [
            {
                "id": id,
                "label": int(labels[id - 1]),
                "isthing": dataset.vocabulary.is_thing[labels[id - 1]],
                "score": 1,
            }
            for id in panoptic.unique().tolist()
            if id
        ]
        return [{"panoptic": panoptic, "segments_info": info, "size": truth.original_size}]

    args = SimpleNamespace(workers=0, score_threshold=0.5)
    results = evaluate_dataset(shifted, dataset, keep, args, tmp_path)["real"]
    files = tuple(str(dataset.images / dataset.index.file_name(row)) for row in range(len(dataset)))
    write_predictions(shifted, files, dataset.vocabulary, tmp_path)
    written = json.loads((tmp_path / "panoptic.json").read_text())
    for annotation in written["annotations"]:
        annotation["image_id"] = int(dataset.index.image_ids[annotation["image_id"]])
    (tmp_path / "found.json").write_text(json.dumps(written))
    folders = str(tmp_path / "gt"), str(tmp_path / "panoptic")
    check_against_hotcoco(
        results,
        panoptic.pq_compute(str(tmp_path / "gt.json"), str(tmp_path / "found.json"), *folders),
    )
    assert 0.2 < results["PQ"] < 0.9 and dataset.index.ignore.sum() == 2


# -- files -----------------------------------------------------------------------------------------


def test_files_are_read_back(tmp_path):
    """Panoptic maps are read by `read_panoptic` and hotcoco, label maps by `read_label_map`."""
    hand, out, names = Hand("pq"), tmp_path / "out", ("a b-0", "c-1")
    files = tuple(str(tmp_path / file) for file in ("in/a b.png", "in/below/c.png"))
    for file in files:
        save_image(hand.load(0).image, file)
    write_predictions(segmenter, files, VOCABULARY, out)
    maps = [f"{folder}/{name}.png" for folder in ("panoptic", "semantic") for name in names]
    expected = [*maps, *(f"{name}.jpg" for name in names), "panoptic.json", "semantic/classes.txt"]
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == set(expected)
    found = [segmenter(SimpleNamespace(samples=[hand.load(i)]))[0] for i in range(2)]
    dataset = read_panoptic("own", out / "panoptic.json", tmp_path / "in")
    assert set(dataset.vocabulary.names) == set(NAMES)
    for i, wanted in enumerate(found):
        sample = dataset.load(i)
        ids = torch.tensor([0, *(s["id"] for s in wanted["segments_info"])])
        assert torch.equal(ids[sample.segments.long() + 1], wanted["panoptic"].long())
        labels = [VOCABULARY.names[s["label"]] for s in wanted["segments_info"]]
        assert [dataset.vocabulary.names[label] for label in sample.labels] == labels
        table = label_table(range(4), (255,))
        assert np.array_equal(
            read_label_map(out / "semantic" / f"{names[i]}.png", table), wanted["semantic"]
        )
    annotation = json.loads((out / "panoptic.json").read_text())["annotations"][0]
    assert annotation["segments_info"][1] == {
        "id": 2,
        "category_id": 3,
        "score": 0.8,
        "area": 200,
        "bbox": [20, 5, 20, 10],
        "iscrowd": 0,
    }
    assert (out / "semantic/classes.txt").read_text().split("\n") == [*NAMES, ""]
    path = str(out / "panoptic.json")
    assert panoptic.pq_compute(path, path)["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 3}


def test_few_boxes_of_a_place_are_drawn(tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    save_image(torch.zeros(3, 20, 50, dtype=torch.uint8), tmp_path / "in.png")

    def predict(_):
        found = {"boxes": torch.tensor([[0.0, 0, 9, 9]] * 4), "labels": torch.arange(4)}
        scores = torch.tensor([0.9, 0.8, 0.7, 0.1])
        return [found | {"scores": scores, "class_names": ["a"] * 4, "size": (20, 50)}]

    write_predictions(predict, [tmp_path / "in.png"], Vocabulary("v", tuple("abcd")), tmp_path)
    assert "3 objects with a score of 0.5 or more (2 of them shown), drawn in" in caplog.text
    assert "all 4 detections" in caplog.text


@pytest.mark.parametrize("classes, mode", [(255, "P"), (256, "I;16"), (1000, "I;16")])
def test_label_maps_of_many_classes(tmp_path, classes, mode):
    save_image(torch.zeros(3, 20, 50, dtype=torch.uint8), tmp_path / "in.png")
    labels = (torch.arange(1000) % classes).view(20, 50).short()
    vocabulary = Vocabulary("many", tuple(f"class {i}" for i in range(classes)))

    def predict(_):
        return [{"semantic": labels, "size": (20, 50)}]

    write_predictions(predict, [tmp_path / "in.png"], vocabulary, tmp_path)
    with Image.open(tmp_path / "semantic/in-0.png") as picture:
        assert picture.mode == mode and np.array_equal(np.asarray(picture), labels)
        shown = picture.convert("RGB").getpixel((7, 0))
        assert mode != "P" or shown == color_of("class 7")
    assert (
        not (tmp_path / "predictions.json").exists() and not (tmp_path / "panoptic.json").exists()
    )


def test_files_with_instances(tmp_path):
    save_image(Hand("pq").load(0).image, tmp_path / "in.png")
    write_predictions(detector, [tmp_path / "in.png"], VOCABULARY, tmp_path)
    annotations = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    assert (
        sorted(a["category_id"] for a in annotations) == [3, 20, 300]
        and sum(a["area"] for a in annotations) == 1720
    )
    assert (tmp_path / "in-0.jpg").is_file() and not (tmp_path / "panoptic.json").exists()
