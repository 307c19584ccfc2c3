"""Plain-Det: its equations against loops over floats, and what must not matter."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from waits import count_waits

import plaindet
from common.batch import Sample, collate
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.shares import ShareBatchSampler

SMALL = {"backbone": "resnet18", "channels": 32, "queries": 6, "amp": "off"}
SMALL |= {"encoder_layers": 1, "decoder_layers": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vocabulary(name: str, count: int) -> Vocabulary:
    text = F.normalize(torch.randn(count, 16))
    return Vocabulary(name, tuple(f"{name} {i}" for i in range(count)), text=text)


def space(**counts: int) -> LabelSpace:
    return LabelSpace([vocabulary(name, count) for name, count in (counts or {"a": 5}).items()])


def model_of(classes: LabelSpace, **settings) -> plaindet.Model:
    return plaindet.Model(plaindet.Args(**SMALL | settings), classes, pretrained=False).eval()


def images(count: int = 2) -> tuple:
    return torch.randint(256, (count, 3, 64, 96), dtype=torch.uint8), [(64, 96)] * count


# -- text and queries ------------------------------------------------------------------------------


def test_calibration_takes_the_null_text_out(monkeypatch):
    rows = {"cat": [0.6, 0.8, 0.0], "none": [0.0, 1.0, 0.0]}
    monkeypatch.setattr(
        plaindet, "embed", lambda names, *_: torch.tensor([rows[name] for name in names])
    )
    args = plaindet.Args()
    cat, none = plaindet.calibrated_text(["cat", "none"], "a", args).tolist()
    length = math.hypot(0.6, -0.2)
    assert cat == pytest.approx([0.6 / length, -0.2 / length, 0.0])
    assert none == rows["none"]  # it has no direction of its own
    plain = plaindet.calibrated_text(["cat"], "a", plaindet.Args(null=""))
    assert plain.tolist() == [pytest.approx(rows["cat"])]


def test_composed_queries_by_the_formula():
    composer = plaindet.QueryCompositor(6, 32, 16, 2)
    text, coarsest = torch.randn(4, 16), torch.randn(2, 32, 3, 5)
    found = composer(coarsest, text, 1)
    keys = composer.projections[1](text).detach()
    attention = composer.attention
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(x, w, b).view(-1, plaindet.HEADS, 4)
        for x, w, b in zip((composer.initial, keys, keys), weights, biases)
    )
    for image in range(2):
        mean = coarsest[image].mean((1, 2))
        cosine = [float(F.cosine_similarity(mean, k, dim=0)) for k in keys]
        p = torch.tensor([100 * c for c in cosine]).softmax(0)
        heads = []
        for head in range(plaindet.HEADS):
            logits = query[:, head] @ key[:, head].T / 2 + p  # sqrt(4) = 2
            heads.append(logits.softmax(1) @ value[:, head])
        wanted = composer.norm(composer.initial + attention.out_proj(torch.cat(heads, 1)))
        torch.testing.assert_close(found[image], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", ["classes", "text_dataset", "boxes"])
def test_permuted_classes_permute_the_logits_alone(queries):
    classes = space(a=5)
    model, (pixels, sizes) = model_of(classes, queries_from=queries), images()
    order = torch.randperm(5)
    names = tuple(classes.names[i] for i in order)
    permuted = LabelSpace([Vocabulary("a", names, text=classes.text[order])])
    one, other = model(pixels, sizes, 0, classes), model(pixels, sizes, 0, permuted)
    torch.testing.assert_close(one.logits[..., order], other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-4)


def test_adapted_queries_begin_as_those_of_all_datasets():
    model = model_of(space(a=5, b=3), queries_from="text_dataset")
    composer = model.composer
    start = composer.ffn_norm(composer.norm(composer.initial))
    for dataset, count in enumerate((5, 3)):
        found = composer(torch.zeros(2, 32, 1, 1), torch.randn(count, 16), dataset)
        torch.testing.assert_close(found, start.expand(2, -1, -1))


def test_unknown_classes_have_the_nearest_dataset():
    classes = space(a=5, b=3)
    model = model_of(classes)
    assert [model.dataset_of(classes.part(name)) for name in "ab"] == [0, 1]
    for row, name in enumerate("ab"):
        text = classes.part(name).text
        other = LabelSpace([Vocabulary("new", ("x", "y", "z"), text=text[:3] + 0.01)])
        mean = F.normalize(torch.stack([classes.part(n).text.mean(0) for n in "ab"]))
        nearest = int((mean @ other.text.mean(0)).argmax())
        assert model.dataset_of(other) == nearest, row


def test_linear_classifiers_know_their_datasets_alone():
    classes = space(a=5, b=3)
    model, hidden = model_of(classes, classifier="heads"), torch.randn(2, 32)
    whole = model.classify(hidden, classes)
    assert torch.equal(model.classify(hidden, classes.part("b")), whole[:, 5:])
    with pytest.raises(InputError, match="linear classifiers of a, b"):
        model.classify(hidden, space(c=2))


def test_text_is_frozen_and_other_datasets_are_not_trained():
    classes = space(a=5, b=3)
    model, (pixels, sizes) = model_of(classes), images()
    output = model(pixels, sizes, 0, classes.part("a"))
    sum(part.sum() for part in output).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(".projections.1." in name or "object_heads.1." in name for name in trained)
    assert any(".projections.0." in name for name in trained)
    assert not any("text" in name for name in trained)


# -- losses ----------------------------------------------------------------------------------------


def test_class_loss_by_a_loop():
    """A tree of classes: 1 is above 0, and 2 stands alone; 2 is not sampled in the first layer."""
    positive = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    weight = torch.tensor([[1.0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]])
    supervision = plaindet.Supervision(space(a=3), positive, weight, torch.full((3,), -1.0))
    logits, labels = torch.randn(2, 1, 4, 3), torch.randint(4, (2, 1, 4))
    trained = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    found = plaindet.loss_class(logits, labels, supervision, trained, torch.tensor(2.0))
    total = 0.0
    for z, q, c in itertools.product(range(2), range(4), range(3)):
        label = int(labels[z, 0, q])
        p = 1 / (1 + math.exp(-float(logits[z, 0, q, c])))
        shown = c == label or (label == 0 and c == 1)
        skipped = (label == 1 and c == 0) or (z == 0 and c == 2)
        focal = -0.25 * (1 - p) ** 2 * math.log(p) if shown else -0.75 * p**2 * math.log(1 - p)
        total += 0 if skipped else focal
    assert float(found) == pytest.approx(total / 2, rel=1e-5)


class Boxed:
    """What `Supervision.of` reads of a dataset."""

    def __init__(self, name: str, count: int, hierarchy=None, federated: bool = False):
        self.name, self.hierarchy, self.federated = name, hierarchy, federated
        self.supervision, self.vocabulary = "boxes", vocabulary(name, count)

    def image_counts(self) -> np.ndarray:
        return np.arange(1, len(self.vocabulary) + 1)


def test_supervision_with_a_tree():
    tree = {"Subcategory": [{"LabelName": 2, "Subcategory": [{"LabelName": 1}]}]}
    dataset = Boxed("b", 3, tree)  # ids 1, 2, 3: class 1 is above class 0
    joint = LabelSpace([vocabulary("a", 2), dataset.vocabulary])
    found = plaindet.Supervision.of(plaindet.Args(), dataset, joint)
    positive, weight = torch.zeros(6, 5), torch.ones(6, 5)
    positive[:5] = torch.eye(5)
    positive[2, 3] = 1  # the ancestor of the first class of b
    weight[3, 2] = 0  # the descendant of the second
    assert torch.equal(found.positive, positive) and torch.equal(found.weight, weight)
    assert (found.federated == -1).all()


@pytest.mark.parametrize("fed_loss", [True, False])
def test_supervision_of_a_federated_dataset(fed_loss):
    dataset = Boxed("b", 3, federated=True)
    joint = LabelSpace([vocabulary("a", 2), dataset.vocabulary])
    found = plaindet.Supervision.of(plaindet.Args(fed_loss=fed_loss), dataset, joint)
    counts = [1.0, 2.0, 3.0] if fed_loss else [-1.0] * 3
    assert found.federated.tolist() == [-1.0, -1.0, *counts]


def sample(count: int) -> Sample:
    corner = torch.rand(count, 2) * 40
    boxes = torch.cat([corner, corner + 20], 1)
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    return Sample(image, "a", "boxes", 0, 0, (64, 96), boxes, torch.randint(5, (count,)))


def test_a_training_step_waits_six_times():
    """For the places of the cells, labels on the device, and twice for each matching."""
    dataset = Boxed("a", 5)
    classes = LabelSpace([dataset.vocabulary])
    model = model_of(classes).train()
    supervision = plaindet.Supervision.of(model.args, dataset, classes)
    batch = collate([sample(3), sample(0)])
    with count_waits() as found:
        targets = plaindet.prepare_targets(batch, classes)
        output = model(batch.images, batch.sizes, 0, classes)
        losses = plaindet.compute_losses(output, targets, batch.sizes, supervision)
        losses["loss"].backward()
        model.hardness.add(0, losses["loss_bbox"].detach())
    assert sum(found.values()) <= 6
    total = sum(value for name, value in losses.items() if name != "loss")
    torch.testing.assert_close(losses["loss"], total)


# -- sampling --------------------------------------------------------------------------------------


def test_factors_of_datasets():
    sizes = np.array([100, 100])
    assert plaindet.dataset_factors(np.array([2.0, 2.0]), sizes).tolist() == [1, 1]
    assert plaindet.dataset_factors(np.array([4.0, 2.0]), sizes).tolist() == [2, 1]
    small = plaindet.dataset_factors(np.array([2.0, 2.0]), np.array([100, 10]))
    assert small.tolist() == pytest.approx([1, 10**0.7])
    assert plaindet.dataset_factors(np.zeros(2), np.array([100, 10])).tolist() == [1, 10]
    unknown = plaindet.dataset_factors(np.array([6.0, 0.0, 3.0]), np.array([5, 5, 5]))
    assert unknown.tolist() == [2, 1, 1]
    args, losses = plaindet.Args(), np.array([3.0, 1.0])
    assert plaindet.dataset_shares(args, losses, sizes).tolist() == [0.75, 0.25]
    by_size = plaindet.dataset_shares(plaindet.Args(sampling="size"), losses, np.array([30, 10]))
    assert by_size.tolist() == [0.75, 0.25]


def test_hardness_is_the_mean_of_a_period():
    hardness = plaindet.Hardness(3)
    for dataset, loss in ((0, 2.0), (0, 4.0), (1, 5.0)):
        hardness.add(dataset, torch.tensor(loss))
    assert hardness.end_period().tolist() == [3, 5, 0]
    hardness.add(1, torch.tensor(1.0))
    assert hardness.end_period().tolist() == [3, 1, 0]  # the first one keeps its mean
    assert hardness.means.tolist() == [[3, 5, 0], [3, 1, 0]] and not hardness.sums.any()


def batches(start: int, number: int, shares: dict, **place) -> list:
    weights = [np.ones(10), np.array([1.0, 0.0, 3.0])]
    sampler = ShareBatchSampler(weights, 4, 5, 0, start, shares=shares, **place)
    return list(itertools.islice(sampler, number))


def test_a_resumed_run_continues_the_stream():
    shares = {0: np.array([0.5, 0.5]), 2: np.array([0.1, 0.9])}
    assert batches(0, 20, shares)[7:] == batches(7, 13, shares)


def test_batches_follow_the_shares_and_the_weights():
    found = batches(0, 4000, {0: np.array([0.25, 0.75])})
    draws = [draw for batch in found for _, draw in batch]
    assert draws == list(range(16_000))
    first = [batch[0][0] < 10 for batch in found]
    assert all((row < 10) == f for f, batch in zip(first, found) for row, _ in batch)
    assert np.mean(first) == pytest.approx(0.25, abs=0.03)
    rows = [row for batch in found for row, _ in batch]
    assert rows.count(11) == 0  # its weight is 0
    assert rows.count(12) / (rows.count(10) + rows.count(12)) == pytest.approx(0.75, abs=0.03)


def test_ranks_share_the_images_of_a_step():
    one = {0: np.array([1.0, 0.0])}
    [whole] = batches(3, 1, one)
    parts = [batches(3, 1, one, rank=rank, world_size=2)[0] for rank in range(2)]
    assert whole == [*parts[0], *parts[1]]
    with pytest.raises(InputError, match="too small for 8 processes"):
        batches(0, 1, one, world_size=8)
