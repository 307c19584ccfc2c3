"""Plain-Det: its equations against loops over floats, and what must not matter."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_runs
from test_data import labelled
from torch import nn
from torch.nn import functional as F
from waits import count_waits

import plaindet
from common.adapted_queries import AdaptedQueries
from common.batch import Sample, collate
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.process import Process
from common.shares import ShareBatchSampler

CPU = torch.device("cpu")
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


def test_calibration_would_make_the_texts_of_minilm_more_alike():
    """On average: two names come apart only if their cosine with NULL is above 1/2."""
    names, (one, two) = Vocabulary.known("coco").names, torch.triu_indices(80, 80, 1)
    args = plaindet.Args(text_encoder="minilm", prompts="name", null="")
    plain = plaindet.calibrated_text(names, "", args)
    for null in ("background", "wall"):
        with_null = plain @ plaindet.calibrated_text([null], "", args)[0]
        assert with_null.mean() < 0.5
        calibrated = plaindet.calibrated_text(names, "", replace(args, null=null))
        before, after = ((x[one] * x[two]).sum(1).mean() for x in (plain, calibrated))
        assert after > before


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


@pytest.mark.parametrize("queries", ["classes", "text_dataset"])
def test_queries_are_composed_of_the_text_that_the_logits_read(queries):
    """Officially its norm is the scale of the logits, here 1 / tau."""
    classes = space(a=5)
    model, (pixels, sizes) = model_of(classes, queries_from=queries), images()
    given = []
    model.composer.register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
    model(pixels, sizes, 0, classes)
    torch.testing.assert_close(given[0], classes.text / model.args.tau)


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


def test_adapted_queries_by_the_formula():
    composer = AdaptedQueries(6, 32, 16, 2)
    for parameter in composer.parameters():
        nn.init.normal_(parameter, std=0.3)
    text = torch.randn(4, 16)
    found = composer(torch.zeros(2, 32, 1, 1), text, 1)
    keys = torch.cat([composer.projection(text), composer.tokens[1:]])
    attention = composer.attention
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(x, w, b).view(-1, 8, 4)
        for x, w, b in zip((composer.initial, keys, keys), weights, biases)
    )
    heads = [(query[:, head] @ key[:, head].T / 2).softmax(1) @ value[:, head] for head in range(8)]
    q = composer.norm(composer.initial + attention.out_proj(torch.cat(heads, 1)))
    wanted = composer.ffn_norm(q + composer.ffn[2](composer.ffn[0](q).clamp(min=0)))
    torch.testing.assert_close(found, wanted.expand(2, -1, -1), rtol=1e-4, atol=1e-5)


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


def test_linear_classifiers_know_their_classes_alone():
    names = {"a": ("cat", "dog", "bus"), "b": ("Dog", "tree")}
    vocabularies = [Vocabulary(name, classes) for name, classes in names.items()]
    args = plaindet.Args(**SMALL, classifier="heads", queries_from="boxes")
    classes = plaindet.build_label_space(args, vocabularies)
    model, hidden = model_of(classes, classifier="heads", queries_from="boxes"), torch.randn(2, 32)
    whole = model.classify(hidden, classes)
    assert whole.shape == (2, 5)
    for other in (classes.part("b"), classes.swap("b"), classes.swap(vocabularies[1])):
        assert torch.equal(model.classify(hidden, other), whole[:, 3:])
        assert model.dataset_of(other) == 1
    turned = Vocabulary("a", names["a"][::-1])
    for unknown in ("cat, dog", turned, Vocabulary("a", names["a"][:2])):
        with pytest.raises(InputError, match="without text"):
            classes.swap(unknown)


def test_queries_of_text_need_a_classifier_of_text():
    args = plaindet.Args(classifier="joint")
    with pytest.raises(InputError, match="--queries-from boxes"):
        plaindet.build_label_space(args, [Vocabulary("a", ("cat",))])


def test_files_of_text_have_no_null():
    args = plaindet.Args(text_encoder="a=a.npy")
    vocabularies = [vocabulary("a", 2)]
    plaindet.build_label_space(args, vocabularies)  # with their text
    with pytest.raises(InputError, match='--null ""'):
        plaindet.build_label_space(args, [Vocabulary("a", ("cat",))])


def test_the_first_stage_has_the_temperature():
    classes = space(a=5)
    model, (pixels, sizes) = model_of(classes), images()
    for head in model.object_heads:
        nn.init.zeros_(head.bias)
    logits = {}
    for tau in (0.1, 0.2):
        model.args.tau = tau
        logits[tau] = model(pixels, sizes, 0, classes).objectness
    torch.testing.assert_close(logits[0.1], 2 * logits[0.2])


def test_a_small_image_has_fewer_queries():
    classes = space(a=5)
    model = model_of(classes, queries=50)
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    cells = 4 * 4 + 2 * 2 + 1 + 1
    assert model(pixels, [(32, 32)], 0, classes).logits.shape == (2, 1, cells, 5)


def test_settings_of_the_released_code():
    args = plaindet.Args()
    assert (plaindet.HEADS, plaindet.LEVELS, plaindet.POINTS) == (8, 4, 4)
    assert plaindet.DECAYS == (740 / 800, 790 / 800)
    layers = (args.channels, args.encoder_layers, args.decoder_layers, args.queries)
    assert layers == (256, 6, 6, 300)
    schedule = (args.lr, args.backbone_factor, args.batch_size, args.steps, args.period)
    assert schedule == (1e-4, 0.1, 16, 800_000, 2000)
    composer = plaindet.QueryCompositor(2, 8, 512, 1)
    assert composer.projections[0][0].out_features == 1024


def test_detections_are_of_the_last_layer(monkeypatch):
    classes = space(a=60)
    model = model_of(classes)
    logits, boxes = torch.randn(2, 1, 6, 60), torch.rand(2, 1, 6, 4)
    output = plaindet.Output(logits, boxes, torch.zeros(1, 1, 1), torch.zeros(1, 1, 4))
    monkeypatch.setattr(model, "forward", lambda *_: output)
    [found] = plaindet.predict(model, collate([sample(2)]), classes)
    assert len(found["scores"]) == 300
    wanted = logits[-1].sigmoid().flatten().sort(descending=True).values[:300]
    torch.testing.assert_close(found["scores"], wanted)


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

    def __len__(self) -> int:
        return 10

    def image_counts(self) -> np.ndarray:
        return np.arange(1, len(self.vocabulary) + 1)


def test_supervision_with_a_tree():
    tree = {"Subcategory": [{"LabelName": 2, "Subcategory": [{"LabelName": 1}]}]}
    dataset = Boxed("b", 3, tree)  # ids 1, 2, 3: class 1 is above class 0
    joint = LabelSpace([vocabulary("a", 2), dataset.vocabulary])
    found = plaindet.Supervision.of(plaindet.Args(), dataset, joint, CPU)
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
    found = plaindet.Supervision.of(plaindet.Args(fed_loss=fed_loss), dataset, joint, CPU)
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
    supervision = plaindet.Supervision.of(model.args, dataset, classes, CPU)
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
    alike = [labelled(name, [[0]] * 100, 1) for name in "ab"]
    assert plaindet.dataset_shares(args, losses, alike).tolist() == [0.75, 0.25]
    sized = [labelled(name, [[0]] * size, 1) for name, size in (("a", 30), ("b", 10))]
    by_size = plaindet.dataset_shares(plaindet.Args(sampling="size"), losses, sized)
    assert by_size.tolist() == [0.75, 0.25]
    given = plaindet.dataset_shares(plaindet.Args(dataset_ratios="b=4"), losses, sized)
    assert given.tolist() == [0.2, 0.8]


def test_hardness_is_the_mean_of_a_period():
    hardness = plaindet.Hardness(3)
    for dataset, loss in ((0, 2.0), (0, 4.0), (1, 5.0)):
        hardness.add(dataset, torch.tensor(loss))
    assert hardness.end_period().tolist() == [3, 5, 0]
    hardness.add(1, torch.tensor(1.0))
    assert hardness.end_period().tolist() == [3, 1, 0]  # the first one keeps its mean
    assert hardness.means.tolist() == [[3, 5, 0], [3, 1, 0]] and not hardness.sums.any()


class Sized(Boxed):
    """A dataset of ten images for each class."""

    def __len__(self) -> int:
        return 10 * len(self.vocabulary)


def test_a_resumed_run_has_the_shares_of_this_period_and_the_next(monkeypatch):
    monkeypatch.setattr(plaindet, "repeat_factors", lambda d, t: np.full(len(d[0]), 1 + t))
    datasets, hardness = [Sized("a", 4), Sized("b", 1)], plaindet.Hardness(2)
    hardness.means = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    args = plaindet.Args(period=5, workers=0)
    sampler = plaindet.build_sampler(args, datasets, 7, hardness)
    wanted = [plaindet.dataset_shares(args, m, datasets) for m in hardness.means.numpy()]
    assert list(sampler.shares) == [1, 2]
    assert np.array_equal(np.stack(list(sampler.shares.values())), np.stack(wanted))
    assert [w.tolist() for w in sampler.weights] == [[1.001] * 40, [1.001] * 10]
    with pytest.raises(InputError, match="a --period of 5 steps is too short"):
        plaindet.build_sampler(plaindet.Args(period=5, workers=4), datasets, 0, hardness)


def test_losses_of_a_period_decide_the_sampling_two_later(tiny_root, tmp_path, monkeypatch):
    measured = [np.array([1.0, 4.0]), np.array([3.0, 1.0]), np.array([1.0, 1.0])]
    added, logged, left = [], [], iter(measured)
    monkeypatch.setattr(plaindet.Hardness, "add", lambda self, d, loss: added.append((d, loss)))
    monkeypatch.setattr(plaindet.Hardness, "end_period", lambda self: next(left))
    write = plaindet.RunLog.step

    def step(self, number, losses, *rest):
        logged.append(losses)
        return write(self, number, losses, *rest)

    clip, norms = nn.utils.clip_grad_norm_, []

    def clipped(parameters, norm):
        norms.append(norm)
        return clip(parameters, norm)

    monkeypatch.setattr(plaindet.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(plaindet.RunLog, "step", step)
    monkeypatch.setattr(plaindet, "evaluate", lambda *_: {})
    monkeypatch.setattr(plaindet, "evaluation_datasets", lambda *_, **__: [])
    flags = small_runs("plaindet", tmp_path / "run", tiny_root, 6)[-1]
    flags += ["--datasets", "coco,oid", "--period", "2", "--batch-size", "2"]
    monkeypatch.setattr("sys.argv", ["plaindet.py", *flags])
    monkeypatch.setattr(Process, "training", None)
    plaindet.main()
    assert norms == [0.1] * 6
    hardness = [losses["loss_bbox"] for losses in logged]
    assert [float(loss) for _, loss in added] == pytest.approx([float(h) for h in hardness])
    ratio = [losses["share_oid"] / losses["share_coco"] for losses in logged]
    assert ratio[0] == ratio[1] == ratio[2] == ratio[3]
    size = ratio[4] / 4  # of the losses of the first period
    assert size > 0 and ratio[4] == ratio[5]


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
