"""UniDet: each equation against loops over floats, and the label space that is learned."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_data import labelled
from torch import nn

import unidet
from common.class_ap import CrossAP50, Detections, Truth
from common.errors import InputError
from common.evaluation import ancestors
from common.labels import LabelSpace, Vocabulary
from common.merges import read_groups, write_groups
from common.sampling import BucketBatchSampler, image_weights

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
    """Sec. 3, over the columns of the dataset; the others get no gradient."""
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


# -- Sampling --------------------------------------------------------------------------------------


def test_datasets_are_sampled_by_ratio_and_images_by_class():
    first = labelled("first", [[0], [0, 1], [], [0]], 3)
    second = labelled("second", [[1]] * 2, 2)
    weights = image_weights([first, second], {"first": 1, "second": 3}, ["first"])
    # of the first: 1/3, 1/3 + 1, 0, 1/3, which is 2 in all
    assert weights == pytest.approx([1 / 6, 4 / 6, 0, 1 / 6, 1.5, 1.5])
    alike = image_weights([first, second], {"first": 1, "second": 1}, [])
    assert alike == pytest.approx([0.25] * 4 + [0.5] * 2)


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


def test_merged_detectors_keep_one_detection_of_an_object():
    labels, scores = np.array([0, 1, 1]), np.array([0.6, 0.9, 0.5])
    found = Detections(np.array([0, 0, 1]), labels, scores, boxes(0, 1, 0))
    assert found.of_classes((0, 1)).scores.tolist() == [0.9, 0.5]
    assert found.of_classes((0,)).scores.tolist() == [0.6]


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


# -- Table of merged classes -----------------------------------------------------------------------


def test_table_of_groups_is_read_back(tmp_path):
    groups = [{"first": "a", "second": "x"}, {"first": "d", "second": "z"}]
    write_groups(tmp_path / "space.csv", ["first", "second"], groups, [0.01, -0.2])
    lines = (tmp_path / "space.csv").read_text().splitlines()
    assert lines == ["first,second,cost", "a,x,0.0100", "d,z,-0.2000"]
    assert read_groups(tmp_path / "space.csv", [A, B]) == groups


def test_official_label_space_is_read(tmp_path):
    space = {"categories": [], "label_map": {"first": [0, 1, 2, 3], "second": [4, 1, 5], "c": [0]}}
    (tmp_path / "space.json").write_text(json.dumps(space))
    assert read_groups(tmp_path / "space.json", [A, B]) == GROUPS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first,second\na,y\n", "'second' has no class 'y'; nearest"),
        ("first,second\na,x\na,z\n", "class 'a' of 'first' is in two groups"),
        ("first,second\nq,x\n", "'first' has no class 'q'"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, words):
    (tmp_path / "space.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_groups(tmp_path / "space.csv", [A, B])


@pytest.mark.parametrize("content", ["{", '{"label_map": {"first": [1]}}', "[]", "null"])
def test_broken_official_spaces_are_refused(tmp_path, content):
    (tmp_path / "space.json").write_text(content)
    with pytest.raises(InputError, match=r"space\.json cannot be read"):
        read_groups(tmp_path / "space.json", [A, B])
