"""UniDet: each equation against loops over floats, and the label space that is learned."""

import itertools
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_flags
from safetensors.torch import load_file
from test_data import labelled
from torch import nn

import unidet
from common import merge_scores
from common.cascade import StageOutput, loss_box_reg
from common.class_ap import CrossAP50, Detections, Truth, match
from common.datasets import evaluation_datasets, training_datasets, validation_datasets
from common.errors import InputError
from common.evaluation import ancestors
from common.labels import LabelSpace, Vocabulary
from common.merges import read_groups, write_groups
from common.shares import BucketBatchSampler, image_weights
from common.targets import RegionTargets

TREE = {  # b is below a; d is below b and c
    "Subcategory": [
        {
            "LabelName": "a",
            "Subcategory": [{"LabelName": "b", "Subcategory": [{"LabelName": "d"}]}],
        },
        {"LabelName": "c", "Subcategory": [{"LabelName": "d"}]},
    ]
}
A = Vocabulary("first", ("a", "b", "c", "d"), ids=("a", "b", "c", "d"))
B = Vocabulary("second", ("x", "B", "z"))
GROUPS = [{"first": "b", "second": "B"}]


class Part:
    """What `Supervision.of` reads of a dataset."""

    def __init__(self, vocabulary: Vocabulary, hierarchy: dict | None = None):
        self.name, self.vocabulary, self.hierarchy = vocabulary.dataset, vocabulary, hierarchy


def supervision(part: Part, groups=()) -> unidet.Supervision:
    space = LabelSpace([A, B], merge=list(groups))
    return unidet.Supervision.of(part, space, torch.device("cpu"))


# -- Losses ----------------------------------------------------------------------------------------


def test_loss_of_a_dataset_without_a_tree():
    """Over the columns of the dataset; the others get no gradient."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = [0, 2, -1, 1, -1]
    loss = unidet.loss_classes(logits, torch.tensor(labels), supervision(Part(B)))
    total = 0.0
    for row, label in enumerate(labels):
        for c in range(3):
            p = 1 / (1 + math.exp(-float(logits[row, 4 + c].detach())))
            total -= math.log(p if c == label else 1 - p)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    loss.backward()
    assert not logits.grad[:, :4].any()
    assert logits.grad[:, 4:].all()


def test_loss_of_a_dataset_with_a_tree():
    """Ancestors are positive, descendants are left out; background is negative for all."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = [1, 3, 0, -1]
    positive = [{0, 1}, {0, 1, 2, 3}, {0}, set()]
    ignored = [{3}, set(), {1, 3}, set()]
    loss = unidet.loss_classes(logits, torch.tensor(labels), supervision(Part(A, TREE)))
    total = 0.0
    for row in range(4):
        for c in set(range(4)) - ignored[row]:
            p = 1 / (1 + math.exp(-float(logits[row, c].detach())))
            total -= math.log(p if c in positive[row] else 1 - p)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    loss.backward()
    for row in range(4):
        assert {c for c in range(7) if logits.grad[row, c] == 0} == ignored[row] | {4, 5, 6}


def test_merged_classes_share_a_column_and_no_other_dataset_trains_the_rest():
    space = LabelSpace([A, B], merge=GROUPS)
    assert len(space) == 6
    assert space.columns("first").tolist() == [0, 1, 2, 3]
    assert space.columns("second").tolist() == [4, 1, 5]
    logits = torch.zeros(2, 6, requires_grad=True)
    unidet.loss_classes(logits, torch.tensor([1, -1]), supervision(Part(B), GROUPS)).backward()
    assert [c for c in range(6) if logits.grad[:, c].any()] == [1, 4, 5]
    assert logits.grad[0, 1] < 0 < logits.grad[1, 1]


def test_no_regions_have_no_loss():
    none = torch.zeros(0, dtype=torch.int64)
    assert unidet.loss_classes(torch.zeros(0, 7), none, supervision(Part(B))) == 0


def test_ancestors_walk_all_parents():
    upward = ancestors(A, TREE)
    assert [set(np.flatnonzero(row)) for row in upward] == [{0}, {0, 1}, {2}, {0, 1, 2, 3}]


def test_the_sum_of_the_losses_of_three_stages():
    """Each stage has its own logits; all terms count once."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([0, -1])
    stages, predictions = [], []
    for index in range(3):
        regions = torch.tensor([[0.0, 0, 9, 9], [5, 5, 30, 30]])
        targets = [RegionTargets(regions + 1, labels, torch.zeros(2))]
        deltas = torch.full((2, 4), index + 1.0)
        stages.append(StageOutput(index, [regions], torch.zeros(2, 8), deltas, targets))
        predictions.append(torch.randn(2, 7, generator=generator))
    table = supervision(Part(B))
    proposals = {"loss_centernet_pos": torch.tensor(0.5)}
    losses = unidet.compute_losses(stages, predictions, proposals, table)
    total = 0.5
    for index in range(3):
        expected = unidet.loss_classes(predictions[index], labels, table)
        assert losses[f"loss_class_stage{index}"] == expected
        assert losses[f"loss_box_reg_stage{index}"] == loss_box_reg(stages[index])
        total += float(expected + loss_box_reg(stages[index]))
    assert losses["loss"].item() == pytest.approx(total) and math.isfinite(total)


# -- Model -----------------------------------------------------------------------------------------

SMALL = unidet.Args(backbone="resnet10t", channels=32, fc_dim=8)


def test_classifiers_start_with_low_scores():
    classifiers = unidet.Model(SMALL, LabelSpace([A, B]), pretrained=False).classifiers
    assert len(classifiers) == 3
    for classifier in classifiers:
        assert classifier.bias.sigmoid().tolist() == pytest.approx([0.01] * 7)
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.5)


def test_score_is_the_root_of_mean_probability_and_objectness(monkeypatch):
    """Of the columns of one dataset, over three stages, for two images."""
    model = unidet.Model(SMALL, LabelSpace([A, B], merge=GROUPS), pretrained=False).eval()
    for classifier in model.classifiers:
        nn.init.normal_(classifier.weight)
    hidden = [torch.randn(3, 8) for _ in range(3)]
    sizes = [(64, 64), (64, 64)]
    boxes = [torch.tensor([[0.0, 0, 9, 9], [5, 5, 30, 30]]), torch.tensor([[1.0, 2, 30, 40]])]
    objectness = [torch.tensor([0.9, 0.4]), torch.tensor([0.6])]
    stages = [StageOutput(k, boxes, h, torch.zeros(3, 4), []) for k, h in enumerate(hidden)]
    monkeypatch.setattr(model.centernet, "forward", lambda f: (list(zip(boxes, objectness)), {}))
    monkeypatch.setattr(model.cascade, "forward", lambda *given: stages)
    columns = model.columns_of(LabelSpace([B]))
    assert columns.tolist() == [4, 1, 5]
    _, scores = model.detect([torch.zeros(1)], sizes, columns)
    model.objectness = False
    _, probabilities = model.detect([torch.zeros(1)], sizes, columns)
    rows = [(0, 0, 0.9), (0, 1, 0.4), (1, 0, 0.6)]
    for region, (image, row, o) in enumerate(rows):
        for column, c in enumerate((4, 1, 5)):
            p = 0.0
            for classifier, h in zip(model.classifiers, hidden):
                logit = (h[region] @ classifier.weight[c] + classifier.bias[c]).item()
                p += 1 / (1 + math.exp(-logit)) / 3
            assert scores[image][row, column].item() == pytest.approx(math.sqrt(p * o), rel=1e-4)
            assert probabilities[image][row, column].item() == pytest.approx(p, rel=1e-4)


def test_columns_are_those_of_a_dataset_or_all():
    model = unidet.Model(SMALL, LabelSpace([A, B], merge=GROUPS), pretrained=False)
    assert model.columns_of(LabelSpace([A, B])).tolist() == list(range(6))
    with pytest.raises(InputError, match="trained on first, second, not on third"):
        model.columns_of(LabelSpace([Vocabulary("third", ("a",))]))


# -- Sampling --------------------------------------------------------------------------------------


def test_datasets_are_sampled_by_ratio_and_images_by_class():
    first = labelled("first", [[0], [0, 1], [], [0]], 3)
    second = labelled("second", [[1]] * 2, 2)
    weights = image_weights([first, second], {"first": 1, "second": 3}, ["first"])
    # of the first: 1/3, 1/3 + 1, 0, 1/3, which is 2 in all
    assert weights == pytest.approx([1 / 6, 4 / 6, 0, 1 / 6, 1.5, 1.5])
    alike = image_weights([first, second], {"first": 1, "second": 1}, [])
    assert alike == pytest.approx([0.25] * 4 + [0.5] * 2)


def test_loader_samples_classes_of_some_datasets_and_batches_of_one(tmp_path):
    first, second = labelled("first", [[0], [0, 1], [0]], 2), labelled("o365", [[0], [0, 1]], 2)
    args = unidet.Args(output=str(tmp_path), dataset_ratios="first=3", batch_size=2, workers=0)
    loader = unidet.build_dataloader(args, [first, second], 5)
    sampler = loader.batch_sampler
    assert sampler.weights == pytest.approx([1, 1, 1, 0.25, 0.75])
    assert sampler.buckets.tolist() == [0, 0, 0, 1, 1]
    assert (sampler.batch_size, sampler.start) == (2, 5)


def test_a_batch_is_of_one_bucket_and_a_resumed_stream_goes_on():
    weights, buckets = np.array([1.0, 0, 2, 1, 4]), np.array([0, 0, 0, 1, 1])
    whole = list(itertools.islice(BucketBatchSampler(weights, buckets, 4, seed=3), 200))
    rest = itertools.islice(BucketBatchSampler(weights, buckets, 4, seed=3, start=50), 150)
    assert list(rest) == whole[50:]
    assert all(len({buckets[row] for row, _ in batch}) == 1 for batch in whole)
    rows = [row for batch in whole for row, _ in batch]
    shares = np.bincount(rows, minlength=5) / len(rows)
    assert shares == pytest.approx(weights / 8, abs=0.05)
    assert shares[1] == 0


def test_ranks_share_one_stream():
    weights, buckets = np.ones(6), np.zeros(6, dtype=int)
    samplers = [BucketBatchSampler(weights, buckets, 2, 0, 0, rank, 2) for rank in (0, 1)]
    draws = [[d for batch in itertools.islice(s, 5) for _, d in batch] for s in samplers]
    assert draws == [list(range(0, 20, 2)), list(range(1, 20, 2))]


# -- Label space -----------------------------------------------------------------------------------


def boxes(*corners: float) -> np.ndarray:
    """(N, 4) squares of side 10 whose left edges are given."""
    return np.array([[x, 0, x + 10, 10] for x in corners], dtype=np.float64).reshape(-1, 4)


def test_ap_counts_images_with_the_class_alone():
    truth = Truth(np.array([0, 2]), boxes(0, 0), np.zeros(2, dtype=bool))
    found = Detections(
        images=np.array([0, 1, 2]),
        labels=np.zeros(3, dtype=int),
        scores=np.array([0.5, 0.9, 0.4]),
        boxes=boxes(0, 50, 40),
    )
    # the false one in image 1 is not seen: precision 1 up to recall 1/2, that is 51 of 101 recalls
    assert truth.ap50(found) == pytest.approx(51 / 101)
    assert truth.ap50(found.take(np.zeros(0, dtype=int))) == 0


def test_detections_in_a_crowd_are_no_errors():
    truth = Truth(np.array([0, 0]), boxes(0, 100), np.array([False, True]))
    found = Detections(
        np.zeros(3, int), np.zeros(3, int), np.array([0.9, 0.8, 0.7]), boxes(100, 102, 0)
    )
    assert truth.ap50(found) == pytest.approx(1)


def test_ap_is_the_mean_of_the_best_precision_at_this_recall_or_above():
    """An error, and two hits: precision 0, 1/2, 2/3."""
    truth = Truth(np.array([0, 0]), boxes(0, 100), np.zeros(2, dtype=bool))
    scores = np.array([0.7, 0.8, 0.9])
    found = Detections(np.zeros(3, int), np.zeros(3, int), scores, boxes(100, 0, 50))
    assert truth.ap50(found) == pytest.approx(2 / 3)


def test_a_box_is_found_once_and_by_half_of_its_area():
    hit, ignored = match(boxes(0, 1, 104, 203), boxes(0, 100, 200), np.zeros(3, dtype=bool))
    assert hit.tolist() == [True, False, False, True]  # IoU 1, (taken), 6/14, 7/13
    assert not ignored.any()
    hit, ignored = match(boxes(0, 1, 50), boxes(0), np.ones(1, dtype=bool))
    assert ignored.tolist() == [True, True, False] and not hit.any()  # in a crowd, and outside


def annotated(vocabulary: Vocabulary, labels: list[int], places: list[int], tree=None) -> Part:
    """A dataset with a box of each label at a place; a thousand places are one image."""
    dataset = Part(vocabulary, tree)
    dataset.index = SimpleNamespace(
        image_of=np.array(places) // 1000,
        labels=np.array(labels),
        ignore=np.zeros(len(labels), dtype=bool),
        boxes=boxes(*places),
        areas=np.full(len(labels), 100),
        relative=False,
    )
    return dataset


def detections(*found: tuple[int, int, float]) -> dict:
    """What `predict` returns for an image, of (label, place, score)."""
    labels, places, scores = zip(*found)
    places = torch.from_numpy(boxes(*places)).float()
    return {"boxes": places, "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def test_boxes_of_a_class_are_those_of_its_descendants_too():
    """As in the expanded annotations of OpenImages. Crowds stay crowds, low scores do not count."""
    dataset = annotated(A, [3, 0, 2], [0, 1000, 2000], TREE)
    dataset.index.ignore[1] = True
    predictions = {}
    for row in range(3):
        predictions[row] = detections((0, 1000 * row, 0.9), (1, 1000 * row, 0.1))
    ap50 = CrossAP50.of([dataset], [predictions], lowest=0.1)
    assert [truth.count for truth in ap50.truth] == [1, 1, 2, 1]
    assert [truth.images.tolist() for truth in ap50.truth] == [[0, 1], [0], [0, 2], [0]]
    assert [ap50((0,), label) for label in range(4)] == pytest.approx([1] * 4)
    assert ap50((1,), 0) == 0  # a score of 0.1 is not above 0.1


def test_merged_detectors_keep_one_detection_of_an_object():
    labels, scores = np.array([0, 1, 1]), np.array([0.6, 0.9, 0.5])
    found = Detections(np.array([0, 0, 1]), labels, scores, boxes(0, 1, 0))
    assert found.of_classes((0, 1)).scores.tolist() == [0.9, 0.5]
    assert found.of_classes((0,)).scores.tolist() == [0.6]
    # IoU 6.6 / 13.4 is below a half, but 7.6 / 14.4, with pixels that count at both ends, is not
    near = Detections(np.zeros(2, int), np.array([0, 1]), np.array([0.6, 0.9]), boxes(0, 3.4))
    assert near.of_classes((0, 1)).scores.tolist() == [0.9]


def cross(found_of: dict[int, list[int]], sizes: tuple[int, ...] = (2, 2)) -> CrossAP50:
    """The AP50 of classes, of which class i finds the boxes of the classes found_of[i].

    Every dataset has one image, with a box of each of its classes.
    """
    found, truth = [], []
    classes = iter(range(sum(sizes)))
    for size in sizes:
        own = list(itertools.islice(classes, size))
        pairs = [(i, j) for i, targets in found_of.items() for j in targets if j in own]
        labels = np.array([i for i, _ in pairs])
        places = boxes(*(100 * j for _, j in pairs))
        count = len(pairs)
        found.append(Detections(np.zeros(count, int), labels, np.ones(count), places))
        crowd = np.zeros(1, dtype=bool)
        truth.append([Truth(np.zeros(1, int), boxes(100 * j), crowd) for j in own])
    return CrossAP50(found, truth)


def test_classes_that_find_each_other_are_merged():
    ap50 = cross({0: [0, 2], 1: [1], 2: [0, 2], 3: [3, 1]})
    assert unidet.merge_cost(ap50, (0, 2)) == 0
    assert unidet.find_candidates(ap50, 0.2) == {(0, 2): 0}  # 3 finds 1, but 1 does not find 3
    assert unidet.choose_merges({(0, 2): 0.0}, 0.5) == [(0, 2)]


class Table:
    """AP50 as given, {(members, label): AP50}; 0 otherwise. Each class has its own dataset."""

    def __init__(self, classes: int, values: dict):
        self.dataset_of = list(range(classes))
        self.values = values

    def __len__(self) -> int:
        return len(self.dataset_of)

    def __call__(self, members: tuple[int, ...], label: int) -> float:
        return self.values.get((members, label), 0)


def table(classes: int, own: float, other: float, merged: dict[tuple, float]) -> Table:
    """Classes with AP50 `own` on their boxes and `other` on those of others, and merged ones."""
    values = {((a,), b): own if a == b else other for a in range(classes) for b in range(classes)}
    return Table(classes, values | {(t, i): ap for t, ap in merged.items() for i in t})


def test_cost_is_the_ap_that_is_lost():
    values = {((0,), 0): 0.8, ((1,), 1): 0.6, ((0, 1), 0): 0.7, ((0, 1), 1): 0.62}
    assert unidet.merge_cost(Table(2, values), (0, 1)) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("own", "other", "merged", "found"),
    [
        (0.8, 0.7, 0.776, True),
        (0.8, 0.5, 0.80, False),  # 0.3 less
        (0.8, 0.7, 0.774, False),  # costs 0.052
        (0.8, 0.601, 0.8, True),
        (0.8, 0.599, 0.8, False),  # tau less
        (0.1, 0.0, 0.10, False),  # at most tau, but not found at all
        (0.1, 0.01, 0.10, True),
    ],
)
def test_pairs_find_each_other_and_cost_little(own, other, merged, found):
    candidates = unidet.find_candidates(table(2, own, other, {(0, 1): merged}), 0.2)
    assert (set(candidates) == {(0, 1)}) is found


@pytest.mark.parametrize(("merged", "found"), [(0.734, True), (0.733, False)])
def test_larger_sets_may_cost_tau(merged, found):
    """Three classes lose 0.198, or 0.201."""
    pairs = dict.fromkeys([(0, 1), (0, 2), (1, 2)], 0.8)
    candidates = unidet.find_candidates(table(3, 0.8, 0.8, pairs | {(0, 1, 2): merged}), 0.2)
    assert ((0, 1, 2) in candidates) is found


def test_larger_sets_need_all_their_pairs():
    merged = {(0, 1): 0.8, (1, 2): 0.8, (0, 2): 0.5, (0, 1, 2): 0.8}
    assert set(unidet.find_candidates(table(3, 0.8, 0.8, merged), 0.2)) == {(0, 1), (1, 2)}


def test_no_set_is_chosen_by_half():
    """The relaxed program takes half of each of the three."""
    candidates = dict.fromkeys([(0, 1), (1, 2), (0, 2)], 0.0)
    assert len(unidet.choose_merges(candidates, 0.5)) == 1


def test_classes_of_one_dataset_are_never_merged():
    ap50 = cross({0: [0, 1], 1: [0, 1], 2: [2], 3: [3]})
    assert unidet.find_candidates(ap50, 0.2) == {}


def test_sets_grow_by_pairs_that_may_be_merged():
    every = {i: [0, 1, 2] for i in range(3)}
    candidates = unidet.find_candidates(cross(every, (1, 1, 1)), 0.2)
    assert set(candidates) == {(0, 1), (0, 2), (1, 2), (0, 1, 2)}
    assert unidet.choose_merges(candidates, 0.5) == [(0, 1, 2)]


def test_program_against_all_choices():
    rng = np.random.default_rng(0)
    for lam in (0, 0.1, 0.5):
        sets = [
            t for n in (2, 3) for t in itertools.combinations(range(6), n) if rng.random() < 0.4
        ]
        candidates = {t: float(rng.normal(0, 0.2)) for t in sets}

        def value(chosen, candidates=candidates, lam=lam):
            return sum(len(t) * candidates[t] - lam * (len(t) - 1) for t in chosen)

        best = 0.0
        for n in range(1, 4):
            for chosen in itertools.combinations(sets, n):
                if len(set().union(*chosen)) == sum(map(len, chosen)):
                    best = min(best, value(chosen))
        chosen = unidet.choose_merges(candidates, lam)
        assert len(set().union(*chosen)) == sum(map(len, chosen))
        assert value(chosen) == pytest.approx(best)


def test_heads_are_merged_by_the_mean_of_their_logits():
    args = unidet.Args(backbone="resnet10t", channels=32, fc_dim=8)
    concatenated, merged_space = LabelSpace([A, B]), LabelSpace([A, B], merge=GROUPS)
    model = unidet.Model(args, concatenated, pretrained=False)
    for classifier in model.classifiers:
        nn.init.normal_(classifier.bias)
    merged = unidet.merge_heads(model, merged_space)
    hidden = torch.randn(3, 8)
    for before, after in zip(model.classifiers, merged.classifiers):
        logits = before(hidden)
        mean = (logits[:, 1] + logits[:, 5]) / 2
        expected = torch.cat([logits[:, :5], logits[:, 6:]], 1)
        expected[:, 1] = mean
        assert torch.allclose(after(hidden), expected, atol=1e-6)


# -- Scores of merges ------------------------------------------------------------------------------

TRUE = {  # of tiny coco and oid: more than half of their art is the same
    ("sports ball", "Ball"): True,
    ("cup", "Mug"): False,
    ("car", "Car"): True,
    ("person", "Person"): False,  # half of the people of coco are Man or Woman in oid
    ("bowl", "Bowl"): False,  # exactly half
    ("dog", "Dog"): True,
}


def generated(groups: list[dict] | bool) -> LabelSpace:
    """Six classes of either generated dataset."""
    coco, oid = zip(*TRUE)
    return LabelSpace([Vocabulary("coco", coco), Vocabulary("oid", oid)], merge=groups)


def test_true_merges_are_those_with_the_same_art():
    pairs = {(i, 6 + i) for i, same in enumerate(TRUE.values()) if same}
    assert merge_scores.true_pairs(generated([])) == pairs


def test_merges_are_scored_beside_equal_names_and_text(monkeypatch):
    """Two right merges and a wrong one, of three true ones."""
    text = torch.eye(12)
    text[6] = text[0]  # "Ball" is as "sports ball"
    text[7] = 0.9 * text[1]  # "Mug" nearly as "cup"
    text[8] = 0.8 * text[2]  # "Car" less so as "car"
    monkeypatch.setattr(merge_scores, "embed", lambda names, encoder: text)
    groups = [{"coco": a, "oid": b} for a, b in (("dog", "Dog"), ("car", "Car"), ("cup", "Mug"))]
    scores = merge_scores.merge_scores(generated(groups))
    third = pytest.approx(2 / 3)
    assert scores == {
        "merges": {"precision": third, "recall": third, "F1": third},
        "merges (equal names)": {"precision": 0.5, "recall": third, "F1": pytest.approx(4 / 7)},
        "merges (text, best cosine 0.80)": {"precision": third, "recall": third, "F1": third},
    }
    alone = merge_scores.merge_scores(generated([]))["merges"]
    assert math.isnan(alone["precision"]) and alone["recall"] == alone["F1"] == 0


def test_merges_of_other_datasets_have_no_truth():
    assert merge_scores.merge_scores(LabelSpace([A, B], merge=GROUPS)) == {}


def test_label_space_is_learned_from_all_scores_above_a_tenth(monkeypatch):
    """x finds a, and a finds x; y does not find b with its score of 0.1."""
    first, second = Vocabulary("first", ("a", "b")), Vocabulary("second", ("x", "y"))
    datasets = [annotated(first, [0, 1], [0, 100]), annotated(second, [0, 1], [0, 100])]
    own = {
        "first": detections((0, 0, 0.9), (1, 100, 0.9), (2, 0, 0.9), (3, 100, 0.1)),
        "second": detections((2, 0, 0.9), (3, 100, 0.9), (0, 0, 0.2), (1, 100, 0.9)),
    }

    def predicted(predictor, dataset, *given) -> dict:
        assert predictor.args[0].objectness is False
        return {0: own[dataset.name]}

    monkeypatch.setattr(unidet, "predict_dataset", predicted)
    space = LabelSpace([first, second])
    model = unidet.Model(SMALL, space, pretrained=False)
    groups, costs = unidet.learn_label_space(unidet.Args(), model, space, datasets)
    assert model.objectness
    assert groups == [{"first": "a", "second": "x"}] and costs == [0]


# -- Table of merged classes -----------------------------------------------------------------------


def test_table_of_groups_is_read_back(tmp_path):
    groups = [{"first": "a", "second": "x"}, {"first": "d", "second": "z"}]
    write_groups(tmp_path / "space.csv", ["first", "second"], groups, [0.01, -0.2])
    lines = (tmp_path / "space.csv").read_text().splitlines()
    assert lines == ["first,second,cost", "a,x,0.0100", "d,z,-0.2000"]
    assert read_groups(tmp_path / "space.csv", [A, B]) == groups


OFFICIAL = [  # of xingyizhou/UniDet:datasets/label_spaces
    ["key", "oid_freebase", "oid_name", "objects365_name", "coco_name"],
    ["_cup_cup", "", "", "cup", "cup"],
    ["Mouse2_mouse_mouse", "/m/020lf", "Mouse2", "mouse", "mouse"],
    ["Orange_tangerine_", "/m/0cyhj_", "Orange", "tangerine", ""],
    ["__kite", "", "", "", "kite"],
]


@pytest.mark.parametrize("name", ["space.json", "space.csv"])
def test_official_label_space_is_read_by_names_and_freebase_ids(tmp_path, name, caplog):
    """Objects365 of 2019 has other numbers, and a name that today's lacks."""
    label_map = {"coco": [0, 1, 3], "oid": [1, 2], "objects365": [2, 1, 0]}
    record = {"categories": [], "label_map": label_map, "raw_data": OFFICIAL}
    text = json.dumps(record) if name.endswith("json") else "\n".join(map(",".join, OFFICIAL))
    (tmp_path / name).write_text(text)
    coco = Vocabulary("coco", ("kite", "mouse", "cup"))
    oid = Vocabulary("oid500", ("Computer mouse", "Orange"), ids=("/m/020lf", "/m/0cyhj_"))
    o365 = Vocabulary("o365", ("Cup", "Mouse", "Orange/Tangerine"))
    groups = read_groups(tmp_path / name, [coco, oid, o365])
    mice = {"coco": "mouse", "oid500": "Computer mouse", "o365": "Mouse"}
    assert groups == [{"coco": "cup", "o365": "Cup"}, mice]
    assert "1 classes are not known by this name here" in caplog.text
    assert "'tangerine' of o365" in caplog.text


@pytest.mark.parametrize("dataset", ["oid", "oid500"])
def test_known_names_are_found_in_an_official_label_space(tmp_path, dataset, caplog):
    """OpenImages by its ids, with 500 or 601 classes; a column of no dataset here is left out."""
    (tmp_path / "space.json").write_text(json.dumps({"raw_data": OFFICIAL}))
    vocabularies = [Vocabulary.known(name) for name in ("coco", dataset)]
    assert read_groups(tmp_path / "space.json", vocabularies) == [
        {"coco": "mouse", dataset: "Computer mouse"}
    ]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_columns_of_other_datasets_are_left_out(tmp_path, caplog):
    (tmp_path / "space.csv").write_text("first,other,second,cost\na,q,x,0.1\nb,q,,\n")
    assert read_groups(tmp_path / "space.csv", [A, B]) == [{"first": "a", "second": "x"}]
    assert "the columns other are of no dataset here" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first,second\na,y\n", "'second' has no class 'y'; nearest"),
        ("first,second\na,x\na,z\n", "class 'a' of 'first' is in two groups"),
        ("first,second\nq,x\n", "'first' has no class 'q'"),
        ("first,second\na\n", r"space\.csv cannot be read"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, words):
    (tmp_path / "space.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_groups(tmp_path / "space.csv", [A, B])


@pytest.mark.parametrize(
    "content", ["{", '{"label_map": {"first": [1]}}', "[]", "null", '{"raw_data": 5}']
)
def test_broken_official_spaces_are_refused(tmp_path, content):
    (tmp_path / "space.json").write_text(content)
    with pytest.raises(InputError, match=r"space\.json cannot be read"):
        read_groups(tmp_path / "space.json", [A, B])


# -- Stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--stage learn", "--stage learn needs --weights"),
        ("--stage unified", "--stage unified and --label-space belong together"),
        ("--label-space names", "--stage unified and --label-space belong together"),
    ],
)
def test_stages_need_what_they_start_from(flags, words, fails):
    assert words in fails("--datasets", "coco,oid", "--tiny", *flags.split(), method="unidet")


def test_merges_are_learned_on_the_validation_split_unless_another_is_evaluated(tiny_root):
    args = unidet.Args(data_root=str(tiny_root), datasets="coco,oid", eval_datasets="coco:train")
    space = LabelSpace([d.vocabulary for d in training_datasets(args, 0)])
    evaluated = evaluation_datasets(args, space, 0)
    coco, oid = validation_datasets(args, space, 0, evaluated)
    assert coco is evaluated[0] and oid.name == "oid"
    assert "train2017" in str(coco.index.source)
    assert "validation" in str(oid.index.source)


@pytest.fixture(scope="module")
def partitioned(tiny_root, tmp_path_factory, call):
    """The run folder of a partitioned detector, and the flags of its training."""
    folder = tmp_path_factory.mktemp("unidet") / "run"
    flags = ["--datasets", "coco,oid", "--data-root", tiny_root, *small_flags("unidet", 2)]
    flags += ["--eval-datasets", "coco"]
    call(*flags, "--stage", "partitioned", "--output", folder, method="unidet")
    return folder, flags


def test_merges_of_a_trained_detector_are_learned_again(partitioned, tmp_path, call):
    """The same command goes on, without a training."""
    folder, flags = partitioned
    assert not (folder / "label_space.csv").exists()
    learn = [*flags, "--stage", "learn", "--weights", folder, "--output", tmp_path / "o"]
    for _ in range(2):
        call(*learn, method="unidet")
        assert (tmp_path / "o/label_space.csv").read_text().startswith("coco,oid,cost")
        before = load_file(folder / "weights.safetensors")
        after = load_file(tmp_path / "o/weights.safetensors")
        trunk = [key for key in before if not key.startswith("classifiers.")]
        assert len(trunk) > 100
        assert all(torch.equal(before[key], after[key]) for key in trunk)
        assert not list((tmp_path / "o").glob("checkpoint-*"))


def test_classes_of_equal_names_are_merged_on_demand(partitioned, tmp_path, call):
    _, flags = partitioned
    table = ["--stage", "unified", "--label-space", "names", "--output", tmp_path / "o"]
    call(*flags, *table, method="unidet")
    _, space = unidet.load(tmp_path / "o")
    names = [
        space.names[int(space.columns(d)[space.vocabularies[d].names.index(n)])]
        for d, n in (("coco", "dog"), ("oid", "Dog"))
    ]
    assert names == ["dog", "dog"]
    assert json.loads((tmp_path / "o/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_official_weights_are_refused_in_one_line(tmp_path, fails, name):
    tensors = {"roi_heads.box_predictor.0.cls_score.0.weight": torch.zeros(81, 4)}
    if name.endswith("pth"):
        torch.save({"model": tensors, "iteration": 179999}, tmp_path / name)
    else:
        arrays = {key: value.numpy() for key, value in tensors.items()}
        (tmp_path / name).write_bytes(pickle.dumps({"model": arrays}, protocol=2))
    line = fails("--predict", "a.jpg", "--weights", tmp_path / name, method="unidet")
    assert "Cascade R-CNN, which does not fit" in line and name in line
