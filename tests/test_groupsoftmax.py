"""GroupSoftmax: each equation against loops over floats, and the table of fine classes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_flags
from test_data import labelled
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

import groupsoftmax
from common.boxes import encode_boxes
from common.datasets.coarse import oid_top
from common.datasets.dataset import Dataset
from common.datasets.index import Index
from common.errors import InputError
from common.fine_classes import FineClasses, FineLabelSpace, derive_table, read_table, write_table
from common.labels import LabelSpace, Vocabulary
from common.rpn import RPN, assign_anchors, object_score
from common.targets import Targets

SMALL = groupsoftmax.Args(backbone="resnet10t", channels=32, fc_dim=8)
# the example of the official README: A cannot tell 3 from 4, B lacks 5, C has no classes at all
TABLE = FineClasses(
    ("one", "two", "three", "four", "five", "six"),
    {
        "A": ("a1", "a2", "a3", "a3", "a5", ""),
        "B": ("b1", "b2", "b3", "b4", "", "b6"),
        "C": ("thing", "thing", "thing", "thing", "thing", "thing"),
    },
)
VOCABULARIES = [
    Vocabulary("A", ("a1", "a2", "a3", "a5")),
    Vocabulary("B", ("b4", "b1", "b2", "b3", "b6")),
    Vocabulary("C", ("thing",)),
]
SPACE = FineLabelSpace(VOCABULARIES, TABLE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- Loss ------------------------------------------------------------------------------------------


def naive_loss(logits: Tensor, labels: list[int], groups: Tensor) -> float:
    """L of loss_group by loops over floats."""
    total = 0.0
    for f, label, own in zip(logits.tolist(), labels, groups.tolist()):
        weights = [math.exp(x) for x in f]
        inside = sum(w for w, group in zip(weights, own) if group == own[label])
        total -= math.log(inside / sum(weights))
    return total / len(labels)


def test_loss_against_loops():
    groups = torch.tensor([[1, 2, 2, 0, 0], [1, 2, 2, 0, 0], [1, 2, 2, 0, 0], [1, 2, 3, 4, 0]])
    logits = random(4, 5) * 3
    for labels in ([1, 0, -1, -1], [2, 3, 0, 3]):
        loss = groupsoftmax.loss_group(logits, torch.tensor(labels), groups)
        assert loss.item() == pytest.approx(naive_loss(logits, labels, groups), rel=1e-5)


def test_any_class_of_the_group_is_the_label():
    groups = torch.tensor([[1, 2, 2, 0, 0]])
    logits = random(1, 5)
    losses = [groupsoftmax.loss_group(logits, torch.tensor([c]), groups) for c in (1, 2)]
    assert losses[0] == losses[1]
    unannotated = groupsoftmax.loss_group(logits, torch.tensor([3]), groups)
    assert unannotated == groupsoftmax.loss_group(logits, torch.tensor([-1]), groups)


def test_groups_of_one_are_cross_entropy():
    logits, labels = random(6, 4), torch.tensor([0, 2, -1, 1, -1, 0])
    groups = torch.tensor([1, 2, 3, 0]).expand(6, 4)
    loss = groupsoftmax.loss_group(logits, labels, groups)
    assert torch.allclose(loss, F.cross_entropy(logits, labels % 4))


def test_gradient_is_that_of_the_operator():
    """p outside the group, p (P - 1) / P inside; the sum over classes is 0."""
    logits = random(3, 5).double().requires_grad_()
    groups = torch.tensor([[1, 2, 2, 0, 0]] * 3)
    labels = torch.tensor([1, -1, 0])
    groupsoftmax.loss_group(logits, labels, groups).backward()
    p = logits.detach().softmax(1)
    for row, inside in enumerate(({1, 2}, {3, 4}, {0})):
        mass = sum(float(p[row, c]) for c in inside)
        for c in range(5):
            expected = float(p[row, c]) * ((mass - 1) / mass if c in inside else 1)
            assert float(logits.grad[row, c]) * 3 == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(logits.grad.sum(1), torch.zeros(3).double(), atol=1e-12)
    check = torch.autograd.gradcheck
    assert check(lambda f: groupsoftmax.loss_group(f, labels, groups), (logits,))


def test_background_leaves_unannotated_classes_to_the_network():
    """On background, a class that d lacks rises with it, in proportion to its probability."""
    logits = random(1, 5).requires_grad_()
    groups = torch.tensor([[1, 2, 2, 0, 0]])
    groupsoftmax.loss_group(logits, torch.tensor([-1]), groups).backward()
    gradient = logits.grad[0]
    assert (gradient[:3] > 0).all() and (gradient[3:] < 0).all()
    p = logits.detach().softmax(1)[0]
    assert gradient[3] / gradient[4] == pytest.approx(float(p[3] / p[4]), rel=1e-4)


def test_loss_of_impossible_groups_stays_finite():
    logits = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    loss = groupsoftmax.loss_group(logits, torch.tensor([0]), torch.tensor([[1, 2, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(400)
    assert logits.grad[0].tolist() == pytest.approx([-1, 1, 0])
    none = groupsoftmax.loss_group(torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0, 3))
    assert none == 0


def losses_of(datasets: list[str]) -> dict[str, Tensor]:
    groups = groupsoftmax.Groups.of(SPACE, torch.device("cpu"))
    count = groups.proposals["A"].numel()
    anchors = SimpleNamespace(
        logits=random(5, count), labels=torch.tensor([0, -1, 1, -1, 2]), counts=[2, 3]
    )
    anchors.loss_box = torch.tensor(0.25)
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    stage = SimpleNamespace(
        index=1,
        boxes=[boxes, boxes.repeat(2, 1)],
        labels=torch.tensor([2, -1, 5]),
        deltas=random(3, 4),
        targets=[SimpleNamespace(boxes=boxes), SimpleNamespace(boxes=boxes.repeat(2, 1))],
    )
    return groupsoftmax.compute_losses([stage], [random(3, 7)], anchors, groups, datasets)


def test_each_image_has_the_groups_of_its_dataset():
    losses = losses_of(["A", "B"])
    rows = [groupsoftmax.group_vector(TABLE, d) for d in ("A", "B", "B")]
    expected = naive_loss(random(3, 7), [2, -1, 5], torch.stack(rows))
    assert losses["loss_group_stage0"].item() == pytest.approx(expected, rel=1e-5)
    class_of = groupsoftmax.proposal_classes(TABLE)
    a, b = (
        groupsoftmax.proposal_groups(groupsoftmax.group_vector(TABLE, d), class_of) for d in "AB"
    )
    rows = torch.stack([a, a, b, b, b])
    expected = naive_loss(random(5, len(a)), [0, -1, 1, -1, 2], rows)
    assert losses["loss_rpn_group"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_rpn_box"] == 0.25
    total = sum(value for name, value in losses.items() if name != "loss")
    assert losses["loss"] == pytest.approx(total.item())
    other = losses_of(["B", "A"])
    assert other["loss_group_stage0"] != losses["loss_group_stage0"]


# -- Groups ----------------------------------------------------------------------------------------


def test_groups_of_the_readme():
    """A class that is not annotated has the number of the background, which is the last."""
    assert groupsoftmax.group_vector(TABLE, "A").tolist() == [1, 2, 3, 3, 4, 0, 0]
    assert groupsoftmax.group_vector(TABLE, "B").tolist() == [1, 2, 3, 4, 0, 5, 0]
    assert groupsoftmax.group_vector(TABLE, "C").tolist() == [1, 1, 1, 1, 1, 1, 0]
    class_of = groupsoftmax.proposal_classes(TABLE)
    assert class_of.tolist() == [0, 0, 0, 0, 1, 2]

    def groups(dataset: str) -> list[int]:
        boxes = groupsoftmax.group_vector(TABLE, dataset)
        return groupsoftmax.proposal_groups(boxes, class_of).tolist()

    assert groups("A") == [1, 2, 0, 0]
    assert groups("B") == [1, 0, 3, 0]
    assert groups("C") == [1, 1, 1, 0]


def test_a_class_may_span_some_classes_of_the_proposals():
    cells = {"A": ("a", "a", "b", "c"), "B": ("x", "", "y", ""), "C": ("", "u", "", "")}
    table = FineClasses(("1", "2", "3", "4"), cells)
    class_of = groupsoftmax.proposal_classes(table)
    assert class_of.tolist() == [0, 1, 0, 2]
    boxes = groupsoftmax.group_vector(table, "A")
    assert groupsoftmax.proposal_groups(boxes, class_of).tolist() == [1, 1, 3, 0]


def test_a_class_without_objects_is_a_negative():
    table = FineClasses(("x", "y", "z"), {"A": ("x", "-", "-"), "B": ("", "y", "z")})
    assert groupsoftmax.group_vector(table, "A").tolist() == [1, 2, 3, 0]
    assert groupsoftmax.group_vector(table, "B").tolist() == [0, 1, 2, 0]
    plain = table.all_annotated()
    assert plain.cells["B"] == ("-", "y", "z")
    assert groupsoftmax.proposal_classes(plain).tolist() == [0, 0, 0]


def test_labels_become_a_class_of_their_group():
    groups = groupsoftmax.Groups.of(SPACE, torch.device("cpu"))
    samples = [
        SimpleNamespace(dataset="A", boxes=torch.zeros(4, 4), labels=torch.tensor([3, 2, 0, 1])),
        SimpleNamespace(dataset="B", boxes=torch.zeros(1, 4), labels=torch.tensor([0])),
    ]
    targets = groupsoftmax.prepare_targets(SimpleNamespace(samples=samples), groups)
    assert [t.labels.tolist() for t in targets] == [[4, 2, 0, 1], [3]]
    vector = groups.boxes["A"]
    assert [vector[c].item() for c in targets[0].labels.tolist()] == [4, 3, 1, 2]


# -- Table -----------------------------------------------------------------------------------------

TREE = {"LabelName": "/m/0bl9f", "Subcategory": []}
OID = Vocabulary.known("oid")


def mid(name: str) -> str:
    return OID.ids[OID.names.index(name)]


def node(name: str, *children: dict) -> dict:
    return {"LabelName": mid(name), "Subcategory": list(children)}


TREE["Subcategory"] = [
    node("Animal", node("Carnivore", node("Dog"), node("Cat")), node("Bird", node("Duck"))),
    node("Person", node("Man"), node("Woman")),
]


def of_oid(dataset: str, *names: str) -> Vocabulary:
    return Vocabulary(dataset, names, tuple(map(mid, names)))


def test_table_by_names_alone():
    first, second = Vocabulary("a", ("Dog", "car")), Vocabulary("b", ("dog", "traffic_light"))
    table = derive_table([first, second], {})
    assert table.names == ("Dog", "car", "traffic_light")
    assert table.cells == {"a": ("Dog", "car", ""), "b": ("dog", "", "traffic_light")}


def test_table_by_a_tree():
    """The nearest class of a dataset that is above; any dataset may be the coarse one."""
    oid = of_oid("oid", "Person", "Man", "Woman", "Animal", "Carnivore")
    coco = Vocabulary("coco", ("person", "dog", "duck", "kite"))
    table = derive_table([oid, coco], {"oid": TREE})
    found = {name: (a, b) for name, a, b in zip(table.names, *table.cells.values())}
    assert found == {
        "Person": ("Person", "person"),
        "Man": ("Man", "person"),
        "Woman": ("Woman", "person"),
        "dog": ("Carnivore", "dog"),
        "duck": ("Animal", "duck"),
        "kite": ("", "kite"),
    }
    assert table.rows_of("coco", "person") == [0, 1, 2]


def test_a_coarse_class_that_two_datasets_have_stays():
    one, two = of_oid("one", "Bird"), Vocabulary("two", ("bird", "duck"))
    table = derive_table([one, two], {"one": TREE})
    assert table.names == ("Bird", "duck")
    assert table.cells == {"one": ("Bird", "Bird"), "two": ("bird", "duck")}


def test_a_table_is_read_back(tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    write_table(tmp_path / "t.csv", TABLE)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[:2] == ["class,A,B,C", "one,a1,b1,thing"]
    table = read_table(tmp_path / "t.csv", VOCABULARIES)
    assert table == TABLE
    table.log_counts()
    assert "6 fine classes; A has 4 for 5, 1 coarse; B has 5 for 5, 0 coarse" in caplog.text


def test_classes_in_no_row_keep_their_names_and_other_columns_are_named(tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    (tmp_path / "t.csv").write_text("class,A,D\nsix,a1, d\nA2,,\nb3,-,d\nlone,,d\n")
    table = read_table(tmp_path / "t.csv", [*VOCABULARIES[:1], Vocabulary("E", ("A2", "Six"))])
    assert table.names == ("six", "a2", "a3", "a5")
    assert table.cells == {"A": ("a1", "a2", "a3", "a5"), "E": ("Six", "A2", "", "")}
    assert "3 classes of A are in no row" in caplog.text and "the columns D" in caplog.text
    assert "3 of 4 rows have a class of no dataset here" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"cannot be read \(IndexError"),
        ("name,A\nx,a1\n", "its columns are name, A"),
        ("class,A\nx,a1,a2\n", "cannot be read"),
        ("class,A\nx,a1\nX,a2\n", "row 3: the class 'X' is there twice"),
        ("class,A\n,a1\n", "row 2: the class has no name"),
        ("class,A\nx,a9\n", "row 2: 'A' has no class 'a9'; nearest: a1, a2, a3"),
        ("class,A\nx,a1\na2,a3\n", "the row 'a2' has 'a3' of 'A', whose class 'a2' is in no row"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "t.csv", VOCABULARIES[:1])


def test_a_table_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"t\.csv cannot be read \(FileNotFoundError"):
        read_table(tmp_path / "t.csv", VOCABULARIES)


# -- Label space -----------------------------------------------------------------------------------


def test_vocabularies_are_datasets_or_fine_classes(caplog):
    caplog.set_level("INFO", "concord")
    assert SPACE.swap("").names == TABLE.names
    assert SPACE.swap("A").names == VOCABULARIES[0].names
    assert SPACE.swap("Two, six").names == ("Two", "six")
    assert SPACE.swap(Vocabulary("other", ("two", "x"))).names == ("two", "x")
    assert "other: 1 of 2 classes are no fine classes" in caplog.text
    for wrong in ("two, seven", Vocabulary("other", ("seven",)), Vocabulary("A", ("b1",))):
        with pytest.raises(InputError, match="without text"):
            SPACE.swap(wrong)


@pytest.fixture(scope="module")
def model() -> groupsoftmax.Model:
    torch.manual_seed(0)
    return groupsoftmax.Model(SMALL, SPACE, pretrained=False).eval()


def test_members_of_any_label_space(model):
    columns = {"A": [[0], [1], [2, 3], [4]], "C": [[0, 1, 2, 3, 4, 5]], "Six, two": [[5], [1]]}
    for vocabulary, rows in columns.items():
        members = model.members_of(SPACE.swap(vocabulary))
        assert [column.nonzero().flatten().tolist() for column in members.T] == rows
    assert torch.equal(model.members_of(SPACE.swap("")), torch.eye(6))
    unknown = model.members_of(LabelSpace([Vocabulary("other", ("x", "two"))]))
    assert unknown.sum(0).tolist() == [0, 1]


def test_classes_that_are_told_apart():
    """C has all as one; a3 stands for two, and so is none."""
    two = {dataset: TABLE.cells[dataset] for dataset in "AB"}
    space = FineLabelSpace(VOCABULARIES[:2], FineClasses(TABLE.names, two))
    assert space.told_apart(space.swap("one, three, four"), {}).tolist() == [False, True, True]
    assert SPACE.told_apart(SPACE.swap("one, three"), {}).tolist() == [True, True]
    assert SPACE.told_apart(SPACE.swap("C"), {}).tolist() == [False]
    assert SPACE.told_apart(SPACE.swap("A"), {}).tolist() == [True, True, False, True]


def test_the_control_is_judged_on_the_same_classes():
    vocabularies = [of_oid("top", "Animal", "Person"), Vocabulary("coco", ("dog", "cat", "kite"))]
    derived = derive_table(vocabularies, {"top": TREE})
    for table in (derived, derive_table(vocabularies, {}).all_annotated()):
        space = FineLabelSpace(vocabularies, table)
        for dataset, expected in {"coco": [1, 1, 0], "top": [0, 0]}.items():
            apart = space.told_apart(space.swap(dataset), {"top": TREE, "other": TREE})
            assert apart.tolist() == expected
        assert space.told_apart(space.swap(of_oid("oid", "Dog", "Fish")), {"top": TREE})[0]


def test_score_of_a_class_is_the_sum_over_its_group(model):
    features = model.extract(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [(64, 64)])
    _, fine = model.detect(features, [(64, 64)], model.members_of(SPACE.swap("")))
    boxes, coarse = model.detect(features, [(64, 64)], model.members_of(SPACE.swap("A")))
    assert len(boxes[0]) == len(coarse[0]) > 10
    assert torch.allclose(coarse[0][:, 2], fine[0][:, 2] + fine[0][:, 3])
    assert (fine[0].sum(1) < 1).all() and (fine[0].sum(1) > 0.5).all()
    proposals, _ = model.rpn(features, [(64, 64)])
    stages = model.cascade(features, [proposals[0][0]], [(64, 64)])
    logits = [layer(s.hidden) for layer, s in zip(model.classifiers, stages)]
    mean = sum(x.softmax(1) for x in logits) / 3
    assert torch.allclose(fine[0], mean[:, :6], atol=1e-6)


# -- Proposals -------------------------------------------------------------------------------------


def maps(*sides: int) -> list[Tensor]:
    return [torch.zeros(1, 8, side, side) for side in sides]


def small_rpn() -> RPN:
    torch.manual_seed(0)
    return RPN(8, torch.tensor([0, 0, 1]), (100, 50), (20, 10))


def test_anchors():
    anchors = small_rpn().anchors(maps(2, 1))
    assert [a.shape for a in anchors] == [(12, 4), (3, 4)]
    side = 32 * math.sqrt(2)
    wide = [4 - side / 2, 4 - side / 4, 4 + side / 2, 4 + side / 4]
    assert anchors[0][0].tolist() == pytest.approx(wide)
    assert anchors[0][1].tolist() == [-12, -12, 20, 20]
    assert anchors[0][4].tolist() == [-4, -12, 28, 20]  # the next cell to the right
    assert anchors[1][1].tolist() == [-24, -24, 40, 40]


def naive_assignment(anchors: Tensor, boxes: Tensor) -> list[int]:
    iou = box_iou(anchors, boxes).tolist()
    found = []
    for row in iou:
        best = max(row)
        label = -1 if best < 0.3 else -2
        for n, value in enumerate(row):
            if value == max(other[n] for other in iou):
                label = n
        found.append(row.index(best) if best >= 0.7 else label)
    return found


def test_assignment_of_anchors():
    """The best anchor of one box may be close to another one, which has it then."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 10], [40, 0, 50, 10]])
    anchors = [[0.0, 0, 10, 11], [0, 0, 14, 10], [40, 0, 50, 22], [60, 0, 70, 10], [40, 0, 50, 25]]
    anchors = torch.tensor(anchors)
    matched = assign_anchors(anchors, boxes)
    assert matched.tolist() == naive_assignment(anchors, boxes) == [0, 0, 2, -1, -2]
    close = torch.tensor([[0.0, 0, 10, 10], [0, 0, 11, 10]])
    only = torch.tensor([[0.0, 0, 10, 10.5]])
    assert assign_anchors(only, close).tolist() == naive_assignment(only, close) == [0]
    assert assign_anchors(anchors, boxes[:0]).tolist() == [-1] * 5


def test_samples_have_the_classes_of_the_proposals():
    rpn = small_rpn()
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [90, 0, 101, 10]])
    logits, deltas = random(2, 4, 3), random(2, 4, 4)
    targets = [
        Targets(torch.tensor([[0.0, 1, 10, 10], [90, 0, 101, 10]]), torch.tensor([2, 1])),
        Targets(torch.tensor([[20.0, 0, 30, 8]]), torch.tensor([1])),
    ]
    sampled = rpn.sample(anchors, logits, deltas, [(100, 100)] * 2, targets)
    assert sampled.counts == [3, 3]  # the last anchor leaves the image
    found = [sorted(part.tolist()) for part in sampled.labels.split(sampled.counts)]
    assert found == [[-1, -1, 1], [-1, -1, 0]]
    assert torch.equal(sampled.logits[0], logits[0, 0])  # foreground is first
    total = 0.0
    for i, row, box in ((0, 0, targets[0].boxes[:1]), (1, 1, targets[1].boxes)):
        wanted = encode_boxes(anchors[row : row + 1], box, (1.0, 1, 1, 1))[0]
        for difference in (deltas[i, row] - wanted).abs().tolist():
            total += difference - 1 / 18 if difference > 1 / 9 else difference**2 * 4.5
    assert sampled.loss_box.item() == pytest.approx(total / 512, rel=1e-4)
    empty = rpn.sample(anchors, logits, deltas, [(2, 2)] * 2, targets)
    assert empty.counts == [0, 0] and empty.loss_box == 0


def test_at_most_half_of_the_samples_are_foreground():
    rpn = small_rpn()
    rpn.sampled = 4
    anchors = torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1)
    anchors = torch.cat([anchors, anchors + 20])
    targets = [Targets(anchors[:1], torch.tensor([0]))]
    sampled = rpn.sample(anchors, random(1, 12, 3), random(1, 12, 4), [(64, 64)], targets)
    assert sampled.labels.tolist() == [0, 0, -1, -1]


def test_proposals_are_ranked_by_objectness():
    rpn = small_rpn().eval()
    torch.nn.init.normal_(rpn.cls_logits.weight, std=1)
    features = [random(1, 8, 8, 8), random(1, 8, 4, 4, seed=1)]
    ((boxes, scores),), sampled = rpn(features, [(64, 60)])
    assert sampled is None and len(boxes) == 10
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert (boxes >= 0).all() and (boxes[:, ::2] <= 60).all() and (boxes[:, 1::2] <= 64).all()
    logits, _ = rpn.head(features)
    best = max(object_score(level).max().item() for level in logits)
    assert scores[0].item() == pytest.approx(best)
    row = torch.tensor([[0.3, -1.0, 2.0]])
    total = sum(math.exp(x) for x in (0.3, -1, 2))
    assert object_score(row).item() == pytest.approx((math.exp(0.3) + math.exp(-1)) / total)


def test_logits_belong_to_their_anchors():
    """A map that is 0 but for one cell changes the three anchors of this cell alone."""
    rpn = small_rpn()
    torch.nn.init.zeros_(rpn.conv.weight)
    rpn.conv.weight.data[:, :, 1, 1] = 1
    feature = torch.zeros(1, 8, 3, 4)
    feature[0, :, 1, 2] = 1
    logits, deltas = rpn.head([feature])
    assert logits[0].shape == (1, 36, 3) and deltas[0].shape == (1, 36, 4)
    changed = (logits[0][0] - rpn.cls_logits.bias.view(3, 3).repeat(12, 1)).abs().sum(1) > 0
    assert changed.nonzero().flatten().tolist() == [18, 19, 20]  # cell 1 * 4 + 2


# -- Data, and a whole run -------------------------------------------------------------------------


def test_top_classes_of_open_images():
    vocabulary = of_oid("oid", "Dog", "Animal", "Person", "Man", "Car")
    index = Index.build(
        "source",
        file_names=["0.jpg", "1.jpg"],
        image_ids=range(2),
        sizes=np.zeros((2, 2)),
        image_of=[0, 0, 1, 1],
        boxes=np.ones((4, 4)),
        labels=[0, 3, 4, 1],
        verified=[[0, 1], [4]],
        negatives=[[2], [0, 3]],
    )
    dataset = Dataset("oid", vocabulary, index, Path(), hierarchy=TREE)
    top = oid_top(dataset, "val")
    assert top.vocabulary.names == ("Animal", "Person", "Car")
    assert top.vocabulary.ids == tuple(map(mid, top.vocabulary.names))
    assert top.index.labels.tolist() == [0, 1, 2, 0]
    assert top.index.verified == [[0], [2]]
    assert top.index.negatives == [[1], []]  # that there is no dog says nothing of animals
    with pytest.raises(InputError, match="needs the class tree"):
        oid_top(replace(dataset, hierarchy=None), "train")


def test_a_table_goes_with_the_weights(tiny_root, tmp_path, call, fails):
    """A run writes its table and loads it; it does not go on with another one."""
    table = tmp_path / "mine.csv"
    table.write_text("class,coco,o365\nperson,person,Person\nrow boat,boat,\nbig ship,boat,Ship\n")
    flags = ["--datasets", "coco@4,o365@4", "--eval-datasets", "o365", "--groups", table]
    flags += ["--data-root", tiny_root, *small_flags("groupsoftmax", 1)]
    call(*flags, "--output", tmp_path / "run", method="groupsoftmax")
    model, space = groupsoftmax.load(tmp_path / "run")
    assert space.table.names[:3] == ("person", "row boat", "big ship")
    assert space.table.rows_of("coco", "boat") == [1, 2]
    written = read_table(
        tmp_path / "run" / "groups.csv", [space.vocabularies[d] for d in ("coco", "o365")]
    )
    assert written == space.table == model.table
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "AP50 fine" in results["o365"]  # of the ship
    table.write_text("class,coco,o365\nperson,person,Person\nrow boat,boat,\nbig ship,,Ship\n")
    line = fails(*flags, "--output", tmp_path / "run", method="groupsoftmax")
    assert "was trained with other groups" in line


def test_a_training_on_some_classes_is_evaluated_on_these(tiny_root, tmp_path, call):
    """A model without text refuses its own dataset with other classes than it was trained on."""
    (tmp_path / "names.txt").write_text("car = automobile")
    data = ["--data-root", tiny_root, "--device", "cpu", "--workers", 0]
    classes = ["--classes", "automobile, bicycle, dog", "--rename", tmp_path / "names.txt"]
    flags = [*small_flags("groupsoftmax", 1), "--datasets", "coco", *classes]
    call(*data, *flags, "--output", tmp_path / "run", method="groupsoftmax")
    again = ["--eval-only", "--weights", tmp_path / "run", "--eval-datasets", "coco"]
    call(*data, *again, "--output", tmp_path / "again", method="groupsoftmax")
    results = [(tmp_path / name / "results.json").read_text() for name in ("run", "again")]
    assert results[0] == results[1]


@pytest.mark.parametrize("groups", ["", "plain"])
def test_the_control_has_no_groups(groups):
    coarse = labelled("oid-top", [[0]], 2)
    coarse.vocabulary, coarse.hierarchy = of_oid("oid-top", "Animal", "Person"), TREE
    fine = labelled("coco", [[0]], 3)
    fine.vocabulary = Vocabulary("coco", ("dog", "cat", "person"))
    args = groupsoftmax.Args(groups=groups)
    table = groupsoftmax.choose_label_space(args, [fine, coarse]).table
    vectors = {d: groupsoftmax.group_vector(table, d).tolist() for d in ("coco", "oid-top")}
    if groups:
        assert table.names == ("dog", "cat", "person", "Animal")
        assert vectors == {"coco": [1, 2, 3, 4, 0], "oid-top": [1, 2, 3, 4, 0]}
    else:
        assert table.names == ("dog", "cat", "person")
        assert vectors == {"coco": [1, 2, 3, 0], "oid-top": [1, 1, 2, 0]}
