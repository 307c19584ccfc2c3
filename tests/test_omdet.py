"""OmDet: its equations against loops over floats, its tasks, and what must not matter."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import small_flags
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou
from waits import count_waits

import omdet
from common.batch import Batch, Sample, collate
from common.command import parse_args
from common.datasets import load_datasets
from common.deformable import Memory, best_detections, inverse_sigmoid
from common.labels import LabelSpace, Vocabulary

SMALL = {"backbone": "resnet18", "channels": 32, "queries": 6, "amp": "off"}
SMALL |= {"encoder_layers": 1, "decoder_layers": 2}
WIDTH = 16  # of the text embeddings


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def text_of(count: int) -> Tensor:
    return F.normalize(torch.randn(count, WIDTH))


def space(count: int, dataset: str = "a") -> LabelSpace:
    names = tuple(f"{dataset} {i}" for i in range(count))
    return LabelSpace([Vocabulary(dataset, names, text=text_of(count))])


def stirred(model: nn.Module) -> nn.Module:
    """Gives random values to all that begins as 0 or 1."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def model_of(**settings) -> omdet.Model:
    return stirred(omdet.Model(omdet.Args(**SMALL | settings), space(5), pretrained=False))


def images(count: int = 2) -> tuple:
    return torch.randint(256, (count, 3, 64, 96), dtype=torch.uint8), [(64, 96)] * count


def batch_of(*counts: int) -> Batch:
    return collate([sample(count) for count in counts])


def sample(count: int) -> Sample:
    corner = torch.rand(count, 2) * 40
    boxes = torch.cat([corner, corner + 20], 1)
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    return Sample(image, "a", "boxes", 0, 0, (64, 96), boxes, torch.randint(5, (count,)))


def test_constants_and_defaults():
    assert (omdet.HEADS, omdet.LEVELS, omdet.POINTS) == (8, 4, 4)
    assert (omdet.NMS, omdet.CANDIDATES) == (0.5, 900)
    args = omdet.Args()
    assert (args.lr, args.batch_size, args.base_batch_size) == (1e-4, 16, 16)
    assert (args.backbone_factor, args.warmup_steps, args.encoder_layers) == (0.1, 1000, 6)
    assert (args.text_encoder, args.image_size, args.test_size) == ("ViT-B-16/openai", 640, 640)
    assert (args.queries, args.channels, args.decoder_layers, args.tau) == (900, 256, 6, 0.07)
    assert (args.fusion, args.task_size, args.cls_bias, args.prompts) == ("merged", 80, 0, "name")
    model = omdet.Model(omdet.Args(**SMALL | {"channels": 64}), space(5), pretrained=False)
    layer, encoder = model.decoder.layers[0], model.encoder.layers[0]
    assert (layer.linear1.out_features, encoder.linear1.out_features) == (512, 256)  # 2048, 1024
    assert model.task_encoder.mlp[0].out_features == 1024
    for classify in (model.proposal_classes, *model.decoder.class_layers):
        assert classify.bias is None and not classify.linear.bias.any()
    hidden, _, last = model.decoder.position
    for layer, fans in ((hidden, 4 + 128), (last, 128 + 64)):  # Xavier's uniform start
        largest = float(layer.weight.detach().abs().max())
        assert largest == pytest.approx(math.sqrt(6 / fans), rel=0.05)


# -- equations -------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    rows = zip(layer.weight.tolist(), layer.bias.tolist())
    return [sum(w * v for w, v in zip(row, x)) + bias for row, bias in rows]


def layer_norm(layer: nn.LayerNorm, x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    scales = zip(x, layer.weight.tolist(), layer.bias.tolist())
    return [(v - mean) / deviation * weight + bias for v, weight, bias in scales]


def test_task_tokens_by_a_loop():
    encoder, text = stirred(omdet.TaskEncoder(4, 3, hidden=5)), torch.randn(2, 4)
    found = encoder(text)
    for row, t in zip(found.tolist(), text.tolist()):
        hidden = [max(v, 0) for v in linear(encoder.mlp[0], t)]
        mixed = [a + b for a, b in zip(t, linear(encoder.mlp[2], hidden))]
        wanted = linear(encoder.project, layer_norm(encoder.norm, mixed))
        assert row == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("bias", [0.0, -4.6])
def test_logits_by_a_loop(bias):
    args = omdet.Args(channels=3, cls_bias=bias)
    layer = omdet.ClassLayer(4, args)
    assert not layer.linear.bias.any() and (layer.bias is None) == (bias == 0)
    nn.init.normal_(layer.linear.bias)
    hidden, text = torch.randn(2, 3), torch.randn(5, 4)
    found = layer(hidden, text).tolist()
    for q, c in itertools.product(range(2), range(5)):
        row, query = linear(layer.linear, text[c].tolist()), hidden[q].tolist()
        product = sum(a * b for a, b in zip(row, query))
        cosine = product / math.hypot(*row) / math.hypot(*query)
        assert found[q][c] == pytest.approx(cosine / 0.07 + bias, abs=1e-4)


def attend(attention: nn.Module, placed: Tensor, values: Tensor) -> Tensor:
    """Multi-head self-attention of rows (N, d), a pair of rows and a head at a time."""
    width = placed.shape[1] // attention.heads
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (x @ w.T + b for x, w, b in zip((placed, placed, values), weights, biases))
    mixed = torch.zeros_like(values)
    for row, head in itertools.product(range(len(placed)), range(attention.heads)):
        part = slice(head * width, (head + 1) * width)
        logits = [float(query[row, part] @ k) / math.sqrt(width) for k in key[:, part]]
        shares = [math.exp(x - max(logits)) for x in logits]
        for share, v in zip(shares, value[:, part]):
            mixed[row, part] += share / sum(shares) * v
    return mixed @ attention.out_proj.weight.T + attention.out_proj.bias


def decoder_inputs(decoder: omdet.TaskDecoder, tokens: int, queries: int = 3) -> tuple:
    """Contents, boxes, memory of one image, text and task tokens."""
    maps = [torch.randn(1, 32, 8 >> level, 12 >> level) for level in range(omdet.LEVELS)]
    memory = Memory.of(maps, [(64, 96)], (64, 96))
    q, boxes = torch.randn(1, queries, 32), torch.rand(1, queries, 4)
    return q, boxes, memory, text_of(5), torch.randn(tokens, 32)


@pytest.mark.parametrize("tokens", [0, 4])
@torch.no_grad()
def test_merged_attention_by_a_loop(tokens, monkeypatch):
    """In two layers, the second of which has the tokens of the first. No token has a position."""
    decoder = model_of().decoder
    for layer in decoder.layers:
        monkeypatch.setattr(layer, "cross_attend", lambda q, *_: q)
        monkeypatch.setattr(layer, "feed_forward", lambda q: q)
    q, boxes, memory, text, task = decoder_inputs(decoder, tokens)
    logits, refined = decoder(q, boxes, memory, text, task)
    both, box = torch.cat([q[0], task]), boxes[0]
    for z, layer in enumerate(decoder.layers):
        placed = both.clone()
        for row in range(3):
            placed[row] += decoder.position(box[row])
        mixed = both + attend(layer.self_attn, placed, both)
        both = torch.stack([layer.self_norm(row) for row in mixed])
        torch.testing.assert_close(
            logits[z, 0], decoder.class_layers[z](both[:3], text), rtol=1e-3, atol=1e-4
        )
        box = (decoder.box_heads[z](both[:3]) + inverse_sigmoid(box)).sigmoid()
        torch.testing.assert_close(refined[z, 0], box, rtol=1e-4, atol=1e-5)


def test_boxes_look_forward_twice():
    """A box trains the heads of its layer and of the one before, where a layer looks none."""
    decoder = model_of(decoder_layers=3).decoder
    inputs = decoder_inputs(decoder, 4)
    first = decoder.box_heads[0][-1].bias
    logits, boxes = decoder(*inputs)
    (trained,) = torch.autograd.grad(boxes[1].sum(), first, retain_graph=True)
    others = (logits[1].sum(), logits[2].sum(), boxes[2].sum())
    for value in others:
        (none,) = torch.autograd.grad(value, first, retain_graph=True, materialize_grads=True)
        assert not none.any()
    assert trained.abs().min() > 0
    own = [head[-1].bias for head in decoder.box_heads]
    for z, box in enumerate(boxes):
        assert torch.autograd.grad(box.sum(), own[z], retain_graph=True)[0].abs().min() > 0
    # the gradient is that of the sum of two changes of a logit: b (1 - b) of the second box
    with torch.no_grad():
        wanted = (boxes[1] * (1 - boxes[1])).sum((0, 1))
    torch.testing.assert_close(trained, wanted, rtol=1e-3, atol=1e-4)


def test_queries_are_the_best_cells_of_any_class():
    model, (pixels, sizes) = model_of(), images()
    encoded, text = model.encode(pixels, sizes), text_of(4)
    given = []
    decode = model.decoder.forward
    model.decoder.forward = lambda *inputs: given.append(inputs) or decode(*inputs)
    output = model.detect(encoded, text)
    q, boxes, *_, tokens = given[0]
    assert not q.requires_grad and not boxes.requires_grad
    torch.testing.assert_close(tokens, model.task_encoder(text))
    logits = model.proposal_classes(encoded.hidden, text)
    for i in range(2):
        best = [max(row) for row in logits[i].tolist()]
        no_proposal = (encoded.proposals[i] == 1).all(-1).tolist()
        order = sorted(range(len(best)), key=lambda s: (no_proposal[s], -best[s]))[:6]
        assert torch.equal(q[i], encoded.hidden[i, order])
        assert torch.equal(boxes[i], encoded.proposals[i, order])
        torch.testing.assert_close(output.logits[0, i], logits[i, order])
        assert torch.equal(output.boxes[0, i], encoded.proposals[i, order])
    assert output.logits.shape == (3, 2, 6, 4) and output.boxes.shape == (3, 2, 6, 4)
    # a better class selects other cells: the queries depend on the task
    other = model.detect(encoded, text_of(4))
    assert not torch.equal(given[1][1], boxes) and not torch.equal(other.boxes, output.boxes)


@pytest.mark.parametrize("fusion", ["merged", "none"])
def test_permuted_classes_permute_the_logits_alone(fusion):
    model, (pixels, sizes), text = model_of(fusion=fusion), images(), text_of(5)
    order = torch.randperm(5)
    one, other = model(pixels, sizes, text), model(pixels, sizes, text[order])
    torch.testing.assert_close(one.logits[..., order], other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["merged", "none"])
def test_the_task_reaches_the_boxes_through_its_tokens_alone(fusion, monkeypatch):
    """Of the same queries. Without fusion the decoder is that of an open-vocabulary DETR."""
    model, (pixels, sizes) = model_of(fusion=fusion), images()
    assert (model.task_encoder is None) == (fusion == "none")
    memory, hidden, proposals = model.encode(pixels, sizes)
    monkeypatch.setattr(omdet, "best_cells", lambda *_: torch.arange(6).expand(2, -1))
    encoded = omdet.Encoded(memory, hidden, proposals)
    one, other = (model.detect(encoded, text_of(4)).boxes for _ in range(2))
    assert torch.equal(one, other) == (fusion == "none")


def padded_images() -> tuple:
    """Two images of 96 x 96 pixels. The second ends after 64 rows and 80 columns."""
    pixels = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    pixels[1, :, 64:] = pixels[1, :, :, 80:] = 0
    return pixels, [(96, 96), (64, 80)]


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model, text, (pixels, sizes) = model_of(), text_of(5), padded_images()
    both, alone = model(pixels, sizes, text), model(pixels[1:], sizes[1:], text)
    torch.testing.assert_close(both.logits[:, 1:], alone.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.boxes[:, 1:], alone.boxes, rtol=1e-3, atol=1e-4)


def test_the_padding_does_not_matter(monkeypatch):
    """In the encoder, the selection and the decoder, noise in it has no effect."""
    model, text, (pixels, sizes) = model_of(), text_of(5), padded_images()
    memory = model.encode(pixels, sizes).memory
    assert memory.padding[1].any() and not memory.padding[0].any()
    clean, neck = model(pixels, sizes, text), model.neck.forward
    outside = memory.padding.split([height * width for height, width in memory.shapes], 1)

    def noisy(maps):
        for m, cells in zip(neck(maps), outside):
            noise = 9 * torch.randn_like(m) * cells.view(2, 1, *m.shape[-2:])
            yield m + noise

    monkeypatch.setattr(model.neck, "forward", lambda maps: list(noisy(maps)))
    found = model(pixels, sizes, text)
    torch.testing.assert_close(found.logits, clean.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, clean.boxes, rtol=1e-4, atol=1e-5)


def test_all_parameters_are_trained():
    model, (pixels, sizes) = model_of(cls_bias=-4.6), images()
    output = model(pixels, sizes, text_of(5))
    (output.logits.sum() + output.boxes.sum()).backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    assert not untrained


# -- tasks -----------------------------------------------------------------------------------------


def draw(labels: list[int], count: int, size: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    labels = torch.tensor(labels, dtype=torch.long)
    return omdet.sample_task(labels, count, size, rng).tolist()


def test_a_task_has_the_classes_that_the_batch_shows():
    assert draw([3, 3], 5, 5) == [0, 1, 2, 3, 4]
    assert draw([7, 2, 7, 5], 9, 2) == [2, 5, 7]  # all that are shown, however many
    assert draw([7, 2], 9, 2) == [2, 7] and len(draw([], 9, 2)) == 2
    drawn = np.zeros(9)
    for seed in range(3000):
        task = draw([7, 2], 9, 4, seed)
        assert len(task) == 4 == len(set(task)) and task == sorted(task) and {2, 7} <= {*task}
        drawn[task] += 1 / 3000
    assert drawn[[2, 7]] == pytest.approx(1)
    assert np.delete(drawn, [2, 7]) == pytest.approx(2 / 7, abs=0.04)  # two of the seven others


@pytest.mark.parametrize("count, size", [(1, 80), (80, 80), (81, 80), (289, 80), (22_000, 80)])
def test_groups_have_each_class_once(count, size):
    groups = omdet.task_groups(count, size)
    columns = [c for group in groups for c in range(count)[group]]
    assert columns == list(range(count))
    lengths = [group.stop - group.start for group in groups]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert len(groups) == -(-count // size)


def test_a_task_with_a_tree_by_a_loop():
    """0 is below 1, which is below 2; 3 stands alone, 4 is not asked for."""
    above = {0: {1, 2}, 1: {2}}
    upward = torch.eye(5, dtype=torch.bool)
    for label, others in above.items():
        upward[label, list(others)] = True
    columns, text = torch.tensor([0, 2, 3]), text_of(5)
    task = omdet.Task.of(columns, text, upward)
    assert torch.equal(task.text, text[columns])
    assert task.index.tolist() == [0, -1, 1, 2, -1]
    for (i, label), (j, other) in itertools.product(enumerate([0, 2, 3]), enumerate([0, 2, 3])):
        is_above = other in above.get(label, ())
        assert task.positive[i, j] == (label == other or is_above)
        assert task.weight[i, j] == (label not in above.get(other, ()))
    assert not task.positive[3].any() and (task.weight[3] == 1).all()


def test_targets_are_indices_in_the_task():
    batch = batch_of(6, 0)
    batch.samples[0].labels = torch.tensor([4, 1, 1, 4, 3, 1])
    task = omdet.Task.of(torch.tensor([1, 3, 4]), text_of(5), torch.eye(5, dtype=torch.bool))
    one, none = omdet.prepare_targets(batch, task)
    assert one.labels.tolist() == [2, 0, 0, 2, 1, 0] and len(none.labels) == 0
    assert torch.equal(one.boxes, batch.samples[0].boxes)


# -- losses ----------------------------------------------------------------------------------------


def test_class_loss_by_a_loop():
    """Class 1 is above class 0."""
    positive = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    weight = torch.tensor([[1.0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]])
    logits, labels = torch.randn(2, 1, 4, 3), torch.randint(4, (2, 1, 4))
    labels[0, 0] = torch.arange(4)
    found = omdet.loss_class(logits, labels, positive, weight, torch.tensor(2.0))
    total = 0.0
    for z, q, c in itertools.product(range(2), range(4), range(3)):
        label = int(labels[z, 0, q])
        p = 1 / (1 + math.exp(-float(logits[z, 0, q, c])))
        shown = c == label or (label == 0 and c == 1)
        skipped = label == 1 and c == 0
        focal = -0.25 * (1 - p) ** 2 * math.log(p) if shown else -0.75 * p**2 * math.log(1 - p)
        total += 0 if skipped else focal
    assert float(found) == pytest.approx(total / 2, rel=1e-5)


def test_losses_are_those_of_each_prediction():
    """First stage and layers apart, each matched for itself."""
    model, batch = model_of(decoder_layers=3), batch_of(3, 1)
    task = omdet.Task.of(torch.arange(5), text_of(5), torch.eye(5, dtype=torch.bool))
    targets = omdet.prepare_targets(batch, task)
    output = model(batch.images, batch.sizes, task.text)
    whole = omdet.compute_losses(output, targets, batch.sizes, task)
    total = sum(value for name, value in whole.items() if name != "loss")
    torch.testing.assert_close(whole["loss"], total)
    each = []
    for z in range(4):
        one = omdet.Output(output.logits[z : z + 1], output.boxes[z : z + 1])
        each.append(omdet.compute_losses(one, targets, batch.sizes, task))  # as a first stage
    for term in ("loss_class", "loss_bbox", "loss_giou"):
        first, *layers = (losses[f"{term}_enc"] for losses in each)
        torch.testing.assert_close(whole[f"{term}_enc"], first)
        torch.testing.assert_close(whole[term], sum(layers))
        assert (torch.stack([first, *layers]) > 0).all()


def test_losses_by_a_loop():
    """2 focal loss, 5 |b - g|_1 and 2 (1 - IoU), over the two objects of two queries.

    All boxes are squares around the same point, of which the larger ones are a pair.
    """
    near, far = 0.25, 0.6  # sides of the objects, of 96 pixels
    sides = [[0.2, 0.7], [0.3, 0.55]]  # of the queries, in the first stage and in the layer
    boxes = torch.tensor([[[[0.5, 0.5, s, s] for s in row]] for row in sides])
    logits = torch.tensor([[[[0.3], [-0.4]]], [[[-0.2], [0.6]]]])
    corners = [[48 - 48 * s] * 2 + [48 + 48 * s] * 2 for s in (far, near)]
    truth = omdet.Targets(torch.tensor(corners), torch.tensor([0, 0]))
    task = omdet.Task.of(torch.arange(1), text_of(1), torch.ones(1, 1, dtype=torch.bool))
    losses = omdet.compute_losses(omdet.Output(logits, boxes), [truth], [(96, 96)], task)
    for z, ending in enumerate(("_enc", "")):
        pairs = list(zip(sides[z], (near, far)))
        l1 = sum(5 * 2 * abs(s - g) for s, g in pairs) / 2
        assert float(losses[f"loss_bbox{ending}"]) == pytest.approx(l1, rel=1e-4)
        giou = sum(2 * (1 - min(s, g) ** 2 / max(s, g) ** 2) for s, g in pairs) / 2
        assert float(losses[f"loss_giou{ending}"]) == pytest.approx(giou, rel=1e-4)
        shown = [1 / (1 + math.exp(-x)) for x in logits[z].flatten().tolist()]
        focal = sum(2 * -0.25 * (1 - p) ** 2 * math.log(p) for p in shown) / 2
        assert float(losses[f"loss_class{ending}"]) == pytest.approx(focal, rel=1e-4)


def test_images_without_objects_train_the_classes():
    model, batch = model_of(), batch_of(0, 0)
    task = omdet.Task.of(torch.arange(5), text_of(5), torch.eye(5, dtype=torch.bool))
    output = model(batch.images, batch.sizes, task.text)
    targets = omdet.prepare_targets(batch, task)
    losses = omdet.compute_losses(output, targets, batch.sizes, task)
    p = output.logits.sigmoid()
    focal = -0.75 * p**2 * (1 - p).log()
    torch.testing.assert_close(losses["loss_class_enc"], 2 * focal[0].sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["loss_class"], 2 * focal[1:].sum(), rtol=1e-4, atol=0)
    assert losses["loss_bbox"] == losses["loss_giou_enc"] == 0
    losses["loss"].backward()


@pytest.mark.parametrize("asked", [5, 3])
def test_a_training_step_waits_four_times(asked):
    """For the places of the cells, the number of boxes, and twice for the matching."""
    model, batch = model_of().train(), batch_of(3, 0)
    batch.samples[0].labels = torch.tensor([4, 1, 1])
    text, upward = text_of(5), torch.eye(5, dtype=torch.bool)
    columns = omdet.sample_task(batch.samples[0].labels, 5, asked, np.random.default_rng(0))
    with count_waits() as found:
        task = omdet.Task.of(columns, text, upward)
        targets = omdet.prepare_targets(batch, task)
        output = model(batch.images, batch.sizes, task.text)
        losses = omdet.compute_losses(output, targets, batch.sizes, task)
        losses["loss"].backward()
    assert sum(found.values()) <= 4


# -- inference -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, Tensor) and not value._is_view():
                self.elements = max(self.elements, value.numel())
        return made


def test_22_000_names_are_asked_for_in_bounded_memory(monkeypatch):
    model, batch = model_of(task_size=80), batch_of(0, 0)
    names, text = [f"thing {i}" for i in range(22_000)], text_of(22_000)
    row = {name: i for i, name in enumerate(names)}
    known = space(5)
    known.embed = lambda given, dataset: text[[row[name] for name in given]]
    classes = known.swap(", ".join(names))
    asked, detect = [], model.detect

    def detecting(encoded, text):
        asked.append(len(text))
        return detect(encoded, text)

    monkeypatch.setattr(model, "detect", detecting)
    with Largest() as few:
        omdet.predict(
            model, batch, LabelSpace([Vocabulary("b", tuple(names[:80]), text=text[:80])])
        )
    asked.clear()
    with Largest() as many:
        found = omdet.predict(model, batch, classes)
    assert len(asked) == 275 and set(asked) == {80} and len(batch.sizes) == 2
    kept = 275 * 900 * 4  # boxes of all tasks of an image
    assert many.elements <= max(few.elements, kept)
    for one in found:
        assert 100 < len(one["labels"]) <= 300
        assert one["class_names"] == [names[label] for label in one["labels"].tolist()]
        assert (one["scores"].diff() <= 0).all()
    # the best name of all is the best one of its own group, and has its own column
    best = int(found[0]["labels"][0])
    group = slice(best // 80 * 80, best // 80 * 80 + 80)
    own = Vocabulary("b", tuple(names[group]), text=text[group])
    (again, _) = omdet.predict(model, batch, LabelSpace([own]))
    assert again["class_names"][0] == names[best]
    torch.testing.assert_close(again["scores"][0], found[0]["scores"][0])


def test_predictions_are_those_of_the_last_layer():
    model, batch, classes = model_of(), batch_of(0), space(5)
    output = model(batch.images, batch.sizes, classes.text)
    (found,) = omdet.predict(model, batch, classes)
    parts = best_detections(output.logits[-1, 0], output.boxes[-1, 0], batch.sizes[0], 900)
    boxes, scores, labels = omdet.join_tasks([parts])
    torch.testing.assert_close(found["boxes"], boxes)
    torch.testing.assert_close(found["scores"], scores)
    assert torch.equal(found["labels"], labels)


@pytest.mark.parametrize("candidates, limit", [(900, 300), (15, 300), (900, 7)])
def test_tasks_are_joined_by_a_loop(candidates, limit, monkeypatch):
    monkeypatch.setattr(omdet, "CANDIDATES", candidates)
    parts = []
    for task in range(3):
        corner = torch.rand(8, 2) * 20
        boxes = torch.cat([corner, corner + 30], 1)
        parts.append((boxes, torch.rand(8), torch.randint(2, (8,)) + 2 * (task // 2)))
    boxes, scores, labels = (torch.cat(values) for values in zip(*parts))
    kept = []
    for row in sorted(range(24), key=lambda r: -float(scores[r]))[:candidates]:
        same = [k for k in kept if labels[k] == labels[row]]
        overlaps = [float(box_iou(boxes[k : k + 1], boxes[row : row + 1])) for k in same]
        if not any(overlap > 0.5 for overlap in overlaps):
            kept.append(row)
    found = omdet.join_tasks(parts, limit)
    assert len(kept) < min(candidates, 24) and (len(kept) > limit) == (limit == 7)
    kept = kept[:limit]
    assert torch.equal(found[0], boxes[kept])
    assert torch.equal(found[1], scores[kept]) and torch.equal(found[2], labels[kept])


def test_a_small_image_has_fewer_queries():
    model = model_of(queries=50)
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    output = model(pixels, [(32, 32)], text_of(3))
    assert output.logits.shape[2] == 16 + 4 + 1 + 1
    assert output.logits.isfinite().all() and output.boxes.isfinite().all()


# -- training --------------------------------------------------------------------------------------


class Enough(Exception):
    """The test has seen what it wants."""


def trained_args(**changes) -> omdet.Args:
    settings = (omdet.Args, omdet.METHOD, omdet.TINY, omdet.MODEL_FIELDS)
    args = parse_args(*settings, argv=small_flags("omdet", 4))
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_recipe(tiny_root, tmp_path, monkeypatch):
    """AdamW with weight decay 1e-4 but on norms, the norm of the gradients at most 0.1."""
    seen = {}
    adamw = torch.optim.AdamW

    def spy_adamw(groups, **settings):
        factors = {(group["lr_factor"], group["weight_decay"]) for group in groups}
        seen.update(settings, factors=factors)
        return adamw(groups, **settings)

    def spy_clip(parameters, norm):
        seen["clip"] = norm
        raise Enough

    def spy_schedule(*settings):
        seen["schedule"] = settings
        return 1e-3

    monkeypatch.setattr(torch.optim, "AdamW", spy_adamw)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(omdet, "learning_rate", spy_schedule)
    changes = {"batch_size": 2, "base_batch_size": 4, "lr": 2e-3, "steps": 900}
    args = trained_args(**changes, warmup_steps=1000, backbone_factor=0.1)
    datasets = load_datasets("coco,o365", "train", str(tiny_root))
    label_space = omdet.build_label_space(args, [d.vocabulary for d in datasets])
    with pytest.raises(Enough):
        omdet.train(args, datasets, label_space, tmp_path, torch.device("cpu"))
    assert seen == {
        "lr": 1e-3,
        "fused": True,
        "factors": {(1, 1e-4), (1, 0), (0.1, 1e-4)},  # the backbone's norms are frozen
        "clip": 0.1,
        "schedule": (0, 1e-3, 900, 100, 1e-2),
    }


def test_a_large_vocabulary_is_trained_in_tasks(tiny_root, tmp_path, monkeypatch):
    """Each step asks for at most 20 of 289 classes, or for all that it shows.

    The others are drawn anew in each step. The same step of a resumed run has the same task.
    """
    tasks, compute = [], omdet.compute_losses

    def computing(output, targets, sizes, task):
        assert output.logits.shape[-1] == len(task.text)
        asked = task.index[task.index >= 0]
        assert torch.equal(asked, torch.arange(len(task.text)))
        assert all((t.labels >= 0).all() and (t.labels < len(asked)).all() for t in targets)
        shown = {label for t in targets for label in t.labels.tolist()}
        assert len(task.text) == max(20, len(shown))
        columns = (task.index >= 0).nonzero().flatten().tolist()
        tasks.append({column for i, column in enumerate(columns) if i not in shown})
        return compute(output, targets, sizes, task)

    monkeypatch.setattr(omdet, "compute_losses", computing)
    datasets = load_datasets("lvis", "train", str(tiny_root))
    for folder in ("one", "two"):
        args = trained_args(task_size=20)
        label_space = omdet.build_label_space(args, [d.vocabulary for d in datasets])
        (tmp_path / folder).mkdir()
        torch.manual_seed(len(tasks))
        omdet.train(args, datasets, label_space, tmp_path / folder, torch.device("cpu"))
    assert len(tasks) == 8 and tasks[:4] == tasks[4:]
    assert len(tasks[0] & tasks[1]) < min(len(tasks[0]), len(tasks[1])) / 2
