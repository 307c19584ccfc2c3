"""METR: its equations against loops over floats, and what must not matter."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_flags
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou
from waits import count_waits

import metr
from common.batch import Sample, collate
from common.boxes import to_cxcywh
from common.command import parse_args
from common.datasets import load_datasets
from common.deformable import Memory
from common.labels import LabelSpace, Vocabulary
from common.targets import Targets
from common.transformer import CrossAttentionLayer, sine_code

CPU = torch.device("cpu")
SMALL = {"backbone": "resnet18", "channels": 32, "classes_kept": 3, "queries_per_class": 4}
SMALL |= {"ffn": 64, "encoder_layers": 1, "decoder_layers": 2, "amp": "off"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vocabulary(name: str, count: int) -> Vocabulary:
    text = F.normalize(torch.randn(count, 16))
    return Vocabulary(name, tuple(f"{name} {i}" for i in range(count)), text=text)


def model_of(classes: LabelSpace, **settings) -> metr.Model:
    return metr.Model(metr.Args(**SMALL | settings), classes, pretrained=False).eval()


def images(count: int = 2) -> tuple:
    return torch.randint(256, (count, 3, 64, 96), dtype=torch.uint8), [(64, 96)] * count


def sample(count: int, classes: int = 5) -> Sample:
    corner = torch.rand(count, 2) * 40
    boxes = torch.cat([corner, corner + 20], 1)
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    return Sample(image, "a", "boxes", 0, 0, (64, 96), boxes, torch.randint(classes, (count,)))


class Boxed:
    """What `Supervision.of` reads of a dataset."""

    def __init__(self, name: str, count: int, hierarchy=None, federated: bool = False):
        self.name, self.hierarchy, self.federated = name, hierarchy, federated
        self.supervision, self.vocabulary = "boxes", vocabulary(name, count)

    def __len__(self) -> int:
        return 10

    def image_counts(self) -> np.ndarray:
        return np.arange(1, len(self.vocabulary) + 1)


def supervision_of(dataset: Boxed, **settings) -> metr.Supervision:
    return metr.Supervision.of(metr.Args(**settings), dataset, LabelSpace([dataset.vocabulary]))


# -- extraction and queries ------------------------------------------------------------------------


def memory_of(*sizes: tuple[int, int]) -> Memory:
    maps = [torch.randn(len(sizes), 32, 8 >> i, 8 >> i) for i in range(2)]
    return Memory.of(maps, list(sizes), (64, 64))


def test_what_is_extracted_of_a_class_depends_on_it_and_the_image_alone():
    extraction = metr.CategoryExtraction(16, 32, 64, 0.1)
    text, memory = torch.randn(5, 16), memory_of((64, 64), (32, 64))
    presence, vectors = extraction(text, memory.tokens, memory.padding)
    assert presence.shape == (2, 2, 5) and vectors.shape == (2, 5, 32)
    for rows in ([3], [4, 0], [2, 1, 0]):
        some = extraction(text[rows], memory.tokens, memory.padding)
        torch.testing.assert_close(some[0], presence[:, :, rows])
        torch.testing.assert_close(some[1], vectors[:, rows])
    other = memory_of((64, 64), (32, 64))
    other.tokens = memory.tokens.clone()
    other.tokens[1, memory.padding[1]] = 100
    torch.testing.assert_close(extraction(text, other.tokens, other.padding), (presence, vectors))
    other.tokens[1, 0] += 1
    found, _ = extraction(text, other.tokens, other.padding)
    assert not torch.allclose(found[:, 1], presence[:, 1])
    torch.testing.assert_close(found[:, 0], presence[:, 0])


def test_many_classes_are_read_in_parts():
    extraction = metr.CategoryExtraction(16, 32, 64, 0.1)
    text, memory = torch.randn(2100, 16), memory_of((64, 64))
    presence, vectors = extraction(text, memory.tokens, memory.padding)
    assert presence.shape == (2, 1, 2100)
    some = [0, 1500, 2099]
    torch.testing.assert_close(
        extraction(text[some], memory.tokens, memory.padding),
        (presence[:, :, some], vectors[:, some]),
    )


def two_layers(f: torch.nn.Sequential, x: torch.Tensor) -> list[float]:
    hidden = [
        max(0.0, sum(float(w) * float(v) for w, v in zip(row, x)) + float(b))
        for row, b in zip(f[0].weight, f[0].bias)
    ]
    return [
        sum(float(w) * v for w, v in zip(row, hidden)) + float(b)
        for row, b in zip(f[2].weight, f[2].bias)
    ]


def test_the_score_of_a_class_by_a_loop():
    score = metr.ClassScore(8, 0.1)
    x, w = torch.randn(3, 8), torch.randn(3, 8)
    assert score.bias.item() == pytest.approx(math.log(0.1 / 0.9))
    score.bias.data.fill_(0.7)
    for one, row, vector in zip(score(x, w), x, w):
        product = sum(a * float(b) for a, b in zip(two_layers(score.f, row), vector))
        assert float(one) == pytest.approx(product / math.sqrt(8) + 0.7, abs=1e-5)


def test_the_extraction_by_its_formula():
    """Every layer is scored by the same function, for the class before it saw the image."""
    extraction = metr.CategoryExtraction(16, 32, 64, 0.1)
    text, memory = torch.randn(4, 16), memory_of((64, 64))
    linear, norm = extraction.projection
    u = norm(text @ linear.weight.T + linear.bias)[None]
    first = extraction.layers[0](u, memory.tokens, memory.padding)
    second = extraction.layers[1](first, memory.tokens, memory.padding)
    wanted = torch.stack([extraction.score(h, u) for h in (first, second)])
    torch.testing.assert_close(extraction(text, memory.tokens, memory.padding), (wanted, second))


def test_an_extraction_layer_by_loops():
    layer = CrossAttentionLayer(4, 2, 8)
    q, tokens = torch.randn(1, 1, 4), torch.randn(1, 3, 4)
    padding = torch.tensor([[False, True, False]])
    attention = layer.attention
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    heads = []
    for head in (slice(0, 2), slice(2, 4)):
        query = (wq @ q[0, 0])[head]
        weights, values = [], []
        for s in (0, 2):
            key = (wk @ tokens[0, s])[head]
            weights.append(math.exp(float((query * key).sum()) / math.sqrt(2)))
            values.append((wv @ tokens[0, s])[head])
        heads.append(sum(w * v for w, v in zip(weights, values)) / sum(weights))
    attended = attention.out_proj(torch.cat(heads))
    h = F.layer_norm(q[0, 0] + attended, (4,))
    wanted = F.layer_norm(h + layer.ffn(h), (4,))
    torch.testing.assert_close(layer(q, tokens, padding)[0, 0], wanted)


def test_kept_classes():
    model = model_of(LabelSpace([vocabulary("a", 6)]))
    presence = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert model.keep(presence).tolist() == [[0, 1, 2], [5, 4, 3]]
    shown = torch.zeros(2, 6, dtype=torch.bool)
    shown[0, 5] = True
    trained = torch.ones(2, 6, dtype=torch.bool)
    trained[0, 0] = trained[1, 5] = False
    kept = model.keep(presence, metr.Asked(shown, trained))
    assert kept.tolist() == [[5, 1, 2], [4, 3, 2]]
    shown[1, :4] = True  # more than are kept
    kept = model.keep(presence, metr.Asked(shown, trained))
    assert kept.shape == (2, 4) and set(kept[1].tolist()) == {0, 1, 2, 3}
    few = model_of(LabelSpace([vocabulary("a", 6)]), classes_kept=20)
    assert few.keep(presence).shape == (2, 6)


def test_the_order_of_the_classes_does_not_matter():
    classes = LabelSpace([vocabulary("a", 7)])
    model, (pixels, sizes) = model_of(classes), images()
    order = torch.randperm(7)
    one = model(pixels, sizes, classes.text)
    other = model(pixels, sizes, classes.text[order])
    torch.testing.assert_close(one.presence[..., order], other.presence, rtol=1e-4, atol=1e-5)
    assert torch.equal(order[other.kept], one.kept)
    torch.testing.assert_close(one.cell_logits[..., order], other.cell_logits)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    assert one.query_classes().tolist() == [[c for c in row for _ in range(4)] for row in one.kept]


def test_the_selected_cells_are_best_for_any_class_of_the_dataset():
    classes = LabelSpace([vocabulary("a", 250)])
    model = model_of(classes)
    scored, vectors = torch.randn(2, 30, 8), torch.randn(2, 250, 8)
    boxes = torch.rand(2, 30, 4)
    best = [[], []]
    for b in range(2):
        for s in range(30):
            best[b].append(max(float(scored[b, s] @ v) for v in vectors[b]))
    first = best[1].index(max(best[1]))
    boxes[1, first] = 1  # this cell proposes nothing
    best[1][first] = -math.inf
    wanted = [sorted(range(30), key=lambda s: -row[s])[:4] for row in best]
    assert model.select(scored, boxes, vectors).tolist() == wanted


def test_queries_by_the_formula(monkeypatch):
    """Content o_r + h_c; each class begins at the boxes of the same selected cells."""
    classes = LabelSpace([vocabulary("a", 5)])
    model, (pixels, sizes) = model_of(classes), images(2)
    given, vectors = [], []
    decode, extract = model.decoder.forward, model.extraction.forward

    def watched(*args):
        given.append(args)
        return decode(*args)

    def extracted(*args):
        presence, h = extract(*args)
        vectors.append(h)
        return torch.stack([-presence[1], presence[1]]), h  # the last layer decides

    monkeypatch.setattr(model.decoder, "forward", watched)
    monkeypatch.setattr(model.extraction, "forward", extracted)
    output = model(pixels, sizes, classes.text)
    assert not torch.equal(model.keep(output.presence[0]), output.kept)
    assert torch.equal(model.keep(output.presence[1]), output.kept)
    [(content, position, boxes, memory, groups)] = given
    assert groups == 3
    [h] = vectors
    for b, k, r in itertools.product(range(2), range(3), range(4)):
        wanted = model.offsets[r] + h[b, output.kept[b, k]]
        torch.testing.assert_close(content[b, 4 * k + r], wanted)
        torch.testing.assert_close(boxes[b, 4 * k + r], output.cell_boxes[b, r])
        codes = sine_code(output.cell_boxes[b, r], 16).flatten()
        torch.testing.assert_close(position[b, 4 * k + r], model.position(codes))
    hidden, refined = decode(content, position, boxes, memory, groups)
    torch.testing.assert_close(output.boxes, refined)
    for z, b, k, r in itertools.product(range(2), range(2), range(3), range(4)):
        q = 4 * k + r
        wanted = model.score(hidden[z, b, q], h[b, output.kept[b, k]])
        torch.testing.assert_close(output.logits[z, b, q], wanted, rtol=1e-4, atol=1e-5)
    cells, proposals = model.proposals(memory)
    rows = [(proposals[0] == box).all(-1).nonzero()[0, 0] for box in output.cell_boxes[0]]
    for row, logits in zip(rows, output.cell_logits[0]):
        x = model.cell_linear(cells[0, row])
        wanted = h[0] @ x / math.sqrt(32) + model.cell_bias
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_the_boxes_of_the_decoder_do_not_train_those_of_the_cells():
    classes = LabelSpace([vocabulary("a", 5)])
    model, (pixels, sizes) = model_of(classes), images()
    output = model(pixels, sizes, classes.text)
    parts = list(model.proposals.box_head.parameters())
    (output.boxes.sum() + output.logits.sum()).backward(retain_graph=True)
    assert all(part.grad is None for part in parts)
    output.cell_boxes.sum().backward()
    assert parts[-1].grad.abs().sum() > 0


def test_the_queries_of_a_class_do_not_depend_on_the_other_kept_classes():
    classes = LabelSpace([vocabulary("a", 6)])
    model, (pixels, sizes) = model_of(classes), images()
    few = model(pixels, sizes, classes.text)
    model.args = replace(model.args, classes_kept=6)
    all_of_them = model(pixels, sizes, classes.text)
    for b, (k, c) in itertools.product(range(2), enumerate(few.kept[0].tolist())):
        c = few.kept[b, k]
        place = int((all_of_them.kept[b] == c).nonzero())
        one = few.logits[:, b, 4 * k : 4 * k + 4]
        other = all_of_them.logits[:, b, 4 * place : 4 * place + 4]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_small_image_has_fewer_queries():
    classes = LabelSpace([vocabulary("a", 5)])
    model = model_of(classes, queries_per_class=50)
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    cells = 4 * 4 + 2 * 2 + 1 + 1
    assert model(pixels, [(32, 32)], classes.text).logits.shape == (2, 1, 3 * cells)


# -- supervision -----------------------------------------------------------------------------------

# ids 1, 2, 3, 4: class 1 (id 2) is above class 0 (id 1)
TREE = {"Subcategory": [{"LabelName": 2, "Subcategory": [{"LabelName": 1}]}]}


def test_an_object_is_one_of_the_classes_above_it():
    supervision = supervision_of(Boxed("a", 4, TREE))
    one, two = sample(2), sample(1)
    one.labels, two.labels = torch.tensor([0, 3]), torch.tensor([1])
    batch = collate([one, two, sample(0)])
    targets = metr.prepare_targets(batch, supervision)
    assert [t.labels.tolist() for t in targets] == [[0, 1, 3], [1], []]
    assert torch.equal(targets[0].boxes, one.boxes[[0, 0, 1]])
    assert torch.equal(targets[1].boxes, two.boxes)
    asked = metr.presence_targets(batch, targets, supervision)
    assert asked.positive.int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0] * 4]
    assert asked.mask.int().tolist() == [[1] * 4, [0, 1, 1, 1], [1] * 4]


@pytest.mark.parametrize("fed_loss", [True, False])
def test_a_federated_dataset_asks_for_a_sample(fed_loss):
    supervision = supervision_of(Boxed("a", 200, federated=True), fed_loss=fed_loss)
    batch = collate([sample(3, 200), sample(2, 200)])
    targets = metr.prepare_targets(batch, supervision)
    asked = metr.presence_targets(batch, targets, supervision)
    assert (asked.mask >= asked.positive).all() and torch.equal(*asked.mask)
    assert asked.mask[0].sum() == (50 if fed_loss else 200)


def output_of(kept: list[list[int]], queries: int, classes: int, layers: int = 2) -> metr.Output:
    b, k = len(kept), len(kept[0])
    boxes = torch.rand(layers, b, k * queries, 4) * 0.4 + 0.1
    logits = torch.randn(layers, b, k * queries)
    cells = torch.rand(b, 9, 4) * 0.4 + 0.1
    presence = torch.randn(2, b, classes)
    scores = torch.randn(b, 9, classes)
    return metr.Output(logits, boxes, torch.tensor(kept), presence, scores, cells)


def giou(box: torch.Tensor, target: torch.Tensor) -> float:
    corners = [torch.cat([b[:2] - b[2:] / 2, b[:2] + b[2:] / 2])[None] for b in (box, target)]
    return float(generalized_box_iou(*corners))


def cost(logit: float, box: torch.Tensor, target: torch.Tensor) -> float:
    p = 1 / (1 + math.exp(-logit))
    focal = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
    return 2 * focal + 5 * float((box - target).abs().sum()) - 2 * giou(box, target)


def test_matching_is_that_of_each_class_alone():
    """Class 4 has more objects than queries; class 2 has no object; class 0 is not kept."""
    kept, sizes = [[4, 2, 1], [0, 3, 4]], [(64, 96), (48, 96)]
    output = output_of(kept, 2, 5)
    labels = [torch.tensor([4, 1, 4, 4]), torch.tensor([3])]
    targets = [Targets(torch.rand(len(x), 4).sort(1).values * 40, x) for x in labels]
    found, own = metr.match_groups(metr.Args(), output, targets, sizes)
    ours = set()
    for z, image, query, label, box, true in zip(*found, own):
        if true:
            ours.add((int(z), int(image), int(query), int(label), *box.tolist()))
    wanted = set()
    for i, z in itertools.product(range(2), range(2)):
        rows = to_cxcywh(targets[i].boxes, sizes[i])
        for slot, c in enumerate(kept[i]):
            objects = [r for r, label in enumerate(labels[i].tolist()) if label == c]
            table = np.array(
                [
                    [
                        cost(float(output.logits[z, i, q]), output.boxes[z, i, q], rows[r])
                        for r in objects
                    ]
                    for q in (2 * slot, 2 * slot + 1)
                ]
            ).reshape(2, -1)
            for q, r in zip(*linear_sum_assignment(table)):
                wanted.add((z, i, int(2 * slot + q), c, *rows[objects[r]].tolist()))
    assert ours == wanted and len(wanted) == 2 * (2 + 1 + 1)
    assert len(own) == 2 * (4 + 1)


def test_the_control_matches_any_query():
    output = output_of([[4, 2, 1]], 2, 5, layers=1)
    output.boxes[0, 0, 3] = torch.tensor([0.5, 0.5, 0.25, 0.25])
    target = Targets(torch.tensor([[24.0, 24, 40, 40]]), torch.tensor([4]))
    found, own = metr.match_groups(metr.Args(matching="any"), output, [target], [(64, 64)])
    assert found.query.tolist() == [3] and own.tolist() == [True]  # of class 2


def test_class_loss_by_a_loop():
    logits, target = torch.randn(2, 1, 4), torch.randint(2, (2, 1, 4)).float()
    weight = torch.tensor([[1.0, 1, 0, 1]])
    found = metr.loss_class(logits, target, weight, torch.tensor(2.0))
    total = 0.0
    for z, q in itertools.product(range(2), range(4)):
        p = 1 / (1 + math.exp(-float(logits[z, 0, q])))
        positive, negative = -0.25 * (1 - p) ** 2 * math.log(p), -0.75 * p**2 * math.log(1 - p)
        total += float(weight[0, q]) * (positive if target[z, 0, q] else negative)
    assert float(found) == pytest.approx(total / 2, rel=1e-5)


def test_presence_loss_by_a_loop():
    presence = torch.randn(2, 3, 3, requires_grad=True)
    shown = torch.tensor([[True, False, False], [False, True, False], [False] * 3])
    trained = torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    found = metr.loss_presence(presence, shown, trained)
    found.backward()
    total = 0.0
    for e, b, c in itertools.product(range(2), range(3), range(3)):
        p = 1 / (1 + math.exp(-float(presence[e, b, c])))
        loss, slope = -math.log(p), p - 1
        if not shown[b, c]:
            loss, slope = -(p**2) * math.log(1 - p), p**2 * p  # the weight p^2 has no gradient
        total += loss if trained[b, c] else 0
        slope = slope / 3 if trained[b, c] else 0
        assert float(presence.grad[e, b, c]) == pytest.approx(slope, rel=1e-4)
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_first_losses_by_a_loop():
    """A cell is matched by the object's own class. The class above it is positive, too."""
    supervision = supervision_of(Boxed("a", 4, TREE))
    batch = collate([sample(2), sample(0)])
    batch.samples[0].labels = torch.tensor([0, 3])  # class 1 is above class 0
    targets = metr.prepare_targets(batch, supervision)
    asked = metr.presence_targets(batch, targets, supervision)
    asked.mask[1, 3] = False
    output = output_of([[0, 1], [2, 3]], 2, 4)
    rows = to_cxcywh(batch.samples[0].boxes, (64, 96))
    logits, boxes = output.cell_logits[0], output.cell_boxes[0]
    costs = [
        [cost(float(logits[s, c]), boxes[s], row) for c, row in zip((0, 3), rows)] for s in range(9)
    ]
    cells = dict(zip(*linear_sum_assignment(np.array(costs))))
    found = metr.first_losses(output, batch, asked, supervision)
    total = 0.0
    for b, s, c in itertools.product(range(2), range(9), range(4)):
        p = 1 / (1 + math.exp(-float(output.cell_logits[b, s, c])))
        loss = -0.75 * p**2 * math.log(1 - p)
        if b == 0 and s in cells and c in ((0, 1), (3,))[cells[s]]:
            loss = -0.25 * (1 - p) ** 2 * math.log(p)
        total += 0 if (b, c) == (1, 3) else loss
    # by two objects, which have three rows of targets
    assert float(found["loss_class_enc"]) == pytest.approx(2 * total / 2, rel=1e-4)
    distance = sum(float((boxes[s] - rows[i]).abs().sum()) for s, i in cells.items())
    assert float(found["loss_bbox_enc"]) == pytest.approx(5 * distance / 2, rel=1e-4)
    overlap = sum(giou(boxes[s], rows[i]) for s, i in cells.items())
    assert float(found["loss_giou_enc"]) == pytest.approx(2 * (2 - overlap) / 2, rel=1e-4)


def test_losses_of_a_batch():
    """Boxes train matched queries of their class; a class that is not asked for trains nothing."""
    supervision = supervision_of(Boxed("a", 5))
    batch = collate([sample(4), sample(0)])
    batch.samples[0].labels = torch.tensor([4, 4, 4, 1])
    targets = metr.prepare_targets(batch, supervision)
    shown = torch.zeros(2, 5, dtype=torch.bool)
    shown[0, [4, 1]] = True
    trained = torch.ones(2, 5, dtype=torch.bool)
    trained[1, 2] = False
    asked = metr.Asked(shown, trained)
    output = output_of([[4, 1], [2, 3]], 2, 5)
    leaves = [part.requires_grad_() for part in (output.logits, output.boxes, output.presence)]
    losses = metr.compute_losses(metr.Args(), output, batch, targets, asked, supervision)
    losses["loss"].backward()
    of_logits, of_boxes, _ = (leaf.grad for leaf in leaves)
    assert (of_logits[:, 0] != 0).all() and (of_logits[:, 1, 2:] != 0).all()
    assert (of_logits[:, 1, :2] == 0).all()
    moved = (of_boxes != 0).any(-1).sum((1, 2))
    assert moved.tolist() == [3, 3]  # two queries of class 4, one of class 1
    found, own = metr.match_groups(metr.Args(), output, targets, batch.sizes)
    chosen = output.boxes[found.z, found.image, found.query][own]
    l1 = 5 * (chosen - found.boxes[own]).abs().sum() / 4
    torch.testing.assert_close(losses["loss_bbox"], l1)
    pairs = zip(chosen.detach(), found.boxes[own])
    loss = 2 * sum(1 - giou(box, row) for box, row in pairs) / 4
    assert float(losses["loss_giou"]) == pytest.approx(loss, rel=1e-4)
    target = torch.zeros(2, 2, 4)
    target[found.z[own], found.image[own], found.query[own]] = 1
    weight = torch.ones(2, 4)
    weight[1, :2] = 0
    wanted = 2 * metr.loss_class(output.logits, target, weight, torch.tensor(4.0))
    torch.testing.assert_close(losses["loss_class"], wanted)
    total = sum(value for name, value in losses.items() if name != "loss")
    torch.testing.assert_close(losses["loss"], total)
    args = metr.Args(presence_weight=0.3)
    fewer = metr.compute_losses(args, output, batch, targets, asked, supervision)
    torch.testing.assert_close(fewer["loss_presence"], 0.3 * losses["loss_presence"])
    wanted = metr.loss_presence(output.presence, *asked)
    torch.testing.assert_close(losses["loss_presence"], wanted)


def test_a_training_step_waits_eight_times():
    """For cells, rows of targets (2), kept classes, and twice for each matching."""
    dataset = Boxed("a", 5, TREE)
    classes = LabelSpace([dataset.vocabulary])
    model = model_of(classes).train()
    supervision = metr.Supervision.of(model.args, dataset, classes)
    batch = collate([sample(3), sample(0)])
    with count_waits() as found:
        targets = metr.prepare_targets(batch, supervision)
        asked = metr.presence_targets(batch, targets, supervision)
        output = model(batch.images, batch.sizes, supervision.text, asked)
        losses = metr.compute_losses(model.args, output, batch, targets, asked, supervision)
        losses["loss"].backward()
    assert sum(found.values()) <= 8
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# -- inference -------------------------------------------------------------------------------------


def test_detections_are_of_the_last_layer(monkeypatch):
    classes = LabelSpace([vocabulary("a", 300)])
    model = model_of(classes)
    kept = [torch.randperm(300)[:200].tolist()]
    output = output_of(kept, 2, 300)
    monkeypatch.setattr(model, "forward", lambda *_: output)
    [found] = metr.predict(model, collate([sample(2)]), classes)
    assert len(found["scores"]) == 300
    wanted, rows = output.logits[-1, 0].sigmoid().sort(descending=True)
    torch.testing.assert_close(found["scores"], wanted[:300])
    assert found["labels"].tolist() == [kept[0][row // 2] for row in rows[:300].tolist()]
    boxes = to_cxcywh(found["boxes"], (64, 96))
    inside = output.boxes[-1, 0, rows[:300]]
    whole = ((inside[:, :2] > inside[:, 2:] / 2) & (inside[:, :2] + inside[:, 2:] / 2 < 1)).all(1)
    torch.testing.assert_close(boxes[whole], inside[whole], rtol=1e-4, atol=1e-5)


def test_any_vocabulary():
    classes = LabelSpace([vocabulary("a", 5)])
    model = model_of(classes)
    other = LabelSpace([vocabulary("new", 22_000)])
    [found] = metr.predict(model, collate([sample(2)]), other)
    assert len(found["scores"]) == 12 and len(set(found["labels"].tolist())) == 3


def test_weights_begin_as_in_the_code_of_the_authors():
    """All matrices by Xavier, the offsets of the queries among them."""
    torch.manual_seed(0)
    model = model_of(LabelSpace([vocabulary("a", 5)]), channels=64, queries_per_class=100)
    layer = model.extraction.layers[0]
    matrices = [model.offsets, model.cell_linear.weight, model.position[0].weight]
    matrices += [model.extraction.projection[0].weight, layer.attention.in_proj_weight]
    matrices += [layer.ffn[0].weight, model.score.f[0].weight, model.extraction.score.f[2].weight]
    for matrix in matrices:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert float(matrix.detach().abs().max()) == pytest.approx(bound, rel=0.02)


class Enough(Exception):
    """The test has seen what it wants."""


def test_recipe(tiny_root, tmp_path, monkeypatch):
    """A step keeps what its images show, and clips the norm of the gradients at 0.1."""
    seen = {}
    keep, adamw = metr.Model.keep, torch.optim.AdamW

    def spy_keep(model, presence, asked=None):
        assert model.training and presence.shape == asked.positive.shape == asked.mask.shape
        seen["shown"] = asked.positive.any(1).tolist()
        return keep(model, presence, asked)

    def spy_adamw(groups, **settings):
        factors = {(group["lr_factor"], group["weight_decay"]) for group in groups}
        seen.update(settings, factors=factors)
        return adamw(groups, **settings)

    def spy_clip(parameters, norm):
        seen["clip"] = norm
        raise Enough

    monkeypatch.setattr(metr.Model, "keep", spy_keep)
    monkeypatch.setattr(torch.optim, "AdamW", spy_adamw)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    flags = small_flags("metr", 9)
    args = parse_args(metr.Args, metr.METHOD, metr.TINY, metr.MODEL_FIELDS, argv=flags)
    args = replace(args, batch_size=2, base_batch_size=4, lr=2e-3, backbone_factor=0.1)
    datasets = load_datasets("coco,o365", "train", str(tiny_root))
    label_space = metr.build_label_space(args, [d.vocabulary for d in datasets])
    with pytest.raises(Enough):
        metr.train(args, datasets, label_space, tmp_path, CPU)
    assert seen == {
        "shown": [True, True],
        "lr": 1e-3,
        "fused": True,
        "factors": {(1, 1e-4), (1, 0), (0.1, 1e-4)},  # the backbone's norms are frozen
        "clip": 0.1,
    }


def test_stem_and_first_stage_are_frozen_as_in_the_code_of_the_authors():
    model = model_of(LabelSpace([vocabulary("a", 5)]))
    model.backbone.frozen_norm.fill_(True)  # as after loading published weights
    model.train()
    trained = {name for name, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trained and {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}


def test_settings():
    """Those of the authors' code."""
    args = metr.Args()
    assert (metr.HEADS, metr.LEVELS, metr.POINTS, metr.EXTRACTION_LAYERS) == (8, 4, 4, 2)
    assert (args.classes_kept, args.queries_per_class, args.prior) == (20, 100, 0.1)
    assert (args.channels, args.encoder_layers, args.decoder_layers) == (256, 6, 6)
    assert (args.ffn, metr.FIRST_PRIOR, metr.CLASS) == (2048, 0.01, 2.0)
    assert args.presence_weight == 1
    assert (args.batch_size, args.base_batch_size) == (8, 8)  # ours
    assert metr.DECAYS == (11 / 12,) and (args.lr, args.backbone_factor) == (1e-4, 0.1)
