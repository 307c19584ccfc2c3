"""Deformable DETR: its parts against plain forms, loops over floats and what must not matter."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from waits import count_waits

from common.boxes import to_cxcywh, to_pixels
from common.deformable import (
    BoxQueries,
    Decoder,
    DeformableDecoderLayer,
    Encoder,
    Memory,
    Neck,
    Proposals,
    best_detections,
    cells_inside,
    inverse_sigmoid,
    positions,
    select_boxes,
)
from common.errors import InputError
from common.mask_losses import masks_per_rank
from common.msda import formula
from common.set_losses import loss_focal, loss_giou, loss_l1, match, match_cost
from common.targets import Targets

PADDED = (64, 96)
SIZES = [(64, 96), (40, 60)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_maps(channels: int = 32, images: int = 2) -> list[torch.Tensor]:
    """Maps of strides 8, 16 and 32 of images that are padded to PADDED."""
    return [torch.randn(images, channels, PADDED[0] // s, PADDED[1] // s) for s in (8, 16, 32)]


def stirred(module: nn.Module) -> nn.Module:
    """The module with random weights, as some begin at 0."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


# -- encoder ---------------------------------------------------------------------------------------


def test_neck_adds_coarser_maps():
    neck = Neck([4, 6, 8], 32, 5)
    maps = neck([torch.randn(1, c, 96 // s, 160 // s) for c, s in ((4, 8), (6, 16), (8, 32))])
    assert [tuple(m.shape[1:]) for m in maps] == [
        (32, 12, 20),
        (32, 6, 10),
        (32, 3, 5),
        (32, 2, 3),
        (32, 1, 2),
    ]
    assert neck.levels[3][0].in_channels == 8 and neck.levels[4][0].in_channels == 32
    with pytest.raises(InputError, match="--channels 40"):
        Neck([4], 40, 1)


@pytest.mark.parametrize("padded, cells", [(64, 8), (64, 7), (800, 25), (1344, 42)])
def test_cells_of_the_image_are_those_of_the_nearest_mask(padded, cells):
    for side in range(1, padded + 1, 5):
        mask = (torch.arange(padded) < side).float()[None, None]
        official = int(F.interpolate(mask, cells, mode="nearest").sum())
        assert cells_inside((side, padded), (padded, padded), (cells, cells)) == (cells, official)


def test_places_of_the_cells():
    memory = Memory.of(random_maps(), SIZES, PADDED)
    assert memory.shapes == ((8, 12), (4, 6), (2, 3))
    assert memory.cells.tolist() == [[[12, 8], [6, 4], [3, 2]], [[8, 5], [4, 3], [2, 2]]]
    starts = {0: 0, 1: 96, 2: 120}
    for image, level in itertools.product(range(2), range(3)):
        (height, width), (columns, rows) = memory.shapes[level], memory.cells[image, level].tolist()
        ratio = memory.ratios[image, level].tolist()
        assert ratio == pytest.approx([columns / width, rows / height])
        for row, column in itertools.product(range(height), range(width)):
            token = starts[level] + row * width + column
            centre = memory.centres[image, token].tolist()
            assert centre == pytest.approx([(column + 0.5) / columns, (row + 0.5) / rows])
            outside = column >= columns or row >= rows
            assert bool(memory.padding[image, token]) == outside


def test_position_codes_by_the_formula():
    memory = Memory.of(random_maps(), SIZES, PADDED)
    codes = positions(memory, 16)
    columns, rows = memory.cells[1, 0].tolist()
    for row, column, j in itertools.product(range(int(rows)), range(int(columns)), range(16)):
        part, k = divmod(j, 8)
        place = (column + 0.5) / (columns + 1e-6) if part else (row + 0.5) / (rows + 1e-6)
        angle = place * 2 * math.pi / 10_000 ** (2 * (k // 2) / 8)
        wanted = math.cos(angle) if k % 2 else math.sin(angle)
        assert float(codes[1, row * 12 + column, j]) == pytest.approx(wanted, abs=1e-5)


def detector_parts(levels: int = 3):
    encoder = stirred(Encoder(32, 2, 48, levels, heads=4, points=2))
    proposals, queries = stirred(Proposals(32)), stirred(BoxQueries(32))
    decoder = stirred(Decoder(32, 2, 48, levels, heads=4, points=2))
    return encoder, proposals, queries, decoder


def detect(parts, maps, sizes, padded, number: int = 6):
    encoder, proposals, queries, decoder = parts
    memory = encoder(Memory.of(maps, sizes, padded))
    hidden, boxes = proposals(memory)
    chosen = select_boxes(boxes, hidden[..., 0], number)
    return *decoder(*queries(chosen), chosen, memory), chosen


def test_padding_does_not_matter():
    """The maps of an image, and the same with random cells to the right and below."""
    parts = detector_parts()
    maps = random_maps(images=1)
    wider = [F.pad(m, (0, m.shape[3], 0, m.shape[2]), value=0.0) for m in maps]
    for m, w in zip(maps, wider):
        noise = torch.randn_like(w)
        noise[:, :, : m.shape[2], : m.shape[3]] = m
        w.copy_(noise)
    hidden, boxes, chosen = detect(parts, maps, [PADDED], PADDED)
    others = detect(parts, wider, [PADDED], (2 * PADDED[0], 2 * PADDED[1]))
    for one, other in zip((hidden, boxes, chosen), others):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_images_of_a_batch_do_not_mix():
    parts, maps = detector_parts(), random_maps()
    both = detect(parts, maps, SIZES, PADDED)
    alone = detect(parts, [m[1:] for m in maps], SIZES[1:], PADDED)
    for one, other in zip(both[:2], alone[:2]):
        torch.testing.assert_close(one[:, 1:], other, rtol=1e-4, atol=1e-4)


# -- proposals -------------------------------------------------------------------------------------


def test_proposals_start_as_squares_in_their_cells():
    memory = Memory.of(random_maps(), SIZES, PADDED)
    _, boxes = Proposals(32)(memory)
    start = 0
    for level, (height, width) in enumerate(memory.shapes):
        for row, column in itertools.product(range(height), range(width)):
            columns, rows = memory.cells[1, level].tolist()
            x, y = (column + 0.5) / columns, (row + 0.5) / rows
            side = 0.05 * 2**level
            wanted = [x, y, side, side] if max(x, y) < 0.99 else [1.0] * 4
            box = boxes[1, start + row * width + column].tolist()
            assert box == pytest.approx(wanted, abs=1e-5)
        start += height * width


def test_cells_at_the_edge_propose_nothing():
    maps = [torch.randn(1, 32, 64, 64)]  # the outermost centres are 0.008 from the edge
    proposals = stirred(Proposals(32))
    hidden, boxes = proposals(Memory.of(maps, [(512, 512)], (512, 512)))
    nothing = proposals.norm(proposals.linear(torch.zeros(32)))
    edge = torch.ones(64, 64, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    edge = edge.flatten()
    assert (boxes[0, edge] == 1).all() and (boxes[0, ~edge] != 1).any(1).all()
    torch.testing.assert_close(hidden[0, edge], nothing.expand(int(edge.sum()), -1))


def test_selected_boxes_are_the_best_without_gradient():
    boxes, scores = torch.rand(2, 9, 4, requires_grad=True), torch.rand(2, 9)
    chosen = select_boxes(boxes, scores, 3)
    assert not chosen.requires_grad
    for i in range(2):
        best = sorted(range(9), key=lambda s: -float(scores[i, s]))[:3]
        assert torch.equal(chosen[i], boxes[i, best])
    assert select_boxes(boxes, scores, 20).shape == (2, 9, 4)
    last = torch.cat([torch.ones(2, 1, 4), boxes], 1)  # the first cell proposes nothing
    assert torch.equal(select_boxes(last, F.pad(scores, (1, 0), value=9.0), 3), chosen)


# -- decoder ---------------------------------------------------------------------------------------


def test_inverse_sigmoid():
    x = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]), 1e-3)
    wanted = math.log(1e-3)
    torch.testing.assert_close(ends, torch.tensor([wanted, wanted, -wanted, -wanted]))


def test_queries_look_around_in_their_boxes():
    """Cross-attention by the formula. An offset of P points to the edge of the box."""
    layer = stirred(DeformableDecoderLayer(32, 48, 3, heads=4, points=2))
    memory = Memory.of(random_maps(), SIZES, PADDED)
    q, position, boxes = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.rand(2, 5, 4)
    attention = layer.cross_attn
    value = attention.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0)
    logits = attention.attention_weights(q + position).unflatten(2, (4, -1))
    offsets = attention.sampling_offsets(q + position).unflatten(2, (4, 3, 2, 2))
    reference = torch.zeros(2, 5, 3, 2)
    for image, query, level in itertools.product(range(2), range(5), range(3)):
        height, width = memory.shapes[level]
        x, y, w, h = boxes[image, query].tolist()
        columns, rows = memory.cells[image, level].tolist()
        reference[image, query, level] = torch.tensor([x * columns / width, y * rows / height])
        half = torch.tensor([w * columns / 2, h * rows / 2])  # in cells
        offsets[image, query, :, level] = offsets[image, query, :, level] / 2 * half
    value = value.unflatten(2, (4, 8))
    seen = formula(value, memory.shapes, offsets, logits, reference)
    wanted = layer.cross_norm(q + attention.output_proj(seen))
    torch.testing.assert_close(layer.cross_attend(q, position, boxes, memory), wanted)


def test_position_is_in_queries_and_keys_not_in_values():
    layer = stirred(DeformableDecoderLayer(32, 48, 3, heads=4, points=2))
    q, position = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    torchs = nn.MultiheadAttention(32, 4, batch_first=True)
    torchs.load_state_dict(layer.self_attn.state_dict())
    attended = torchs(q + position, q + position, q)[0]
    torch.testing.assert_close(layer.self_attend(q, position), layer.self_norm(q + attended))
    assert torch.equal(layer.self_attend(q, 0), layer.self_attend(q, torch.zeros_like(q)))


def test_each_layer_refines_the_boxes_of_the_one_before():
    parts = detector_parts()
    decoder = parts[-1]
    memory = parts[0](Memory.of(random_maps(), SIZES, PADDED))
    q, start = torch.randn(2, 5, 32), torch.rand(2, 5, 4)
    hidden, boxes = decoder(q, 0, start, memory)
    for z, before in enumerate((start, boxes[0])):
        moved = decoder.box_heads[z](hidden[z]) + inverse_sigmoid(before)
        torch.testing.assert_close(boxes[z], moved.sigmoid())
    (gradient,) = torch.autograd.grad(
        boxes[1].sum(), decoder.box_heads[0][0].weight, None, True, allow_unused=True
    )
    assert not gradient.any()  # the first layer's boxes reach the second without a gradient


def test_a_new_decoder_leaves_the_boxes():
    decoder = Decoder(32, 2, 48, 3, heads=4, points=2)
    memory = Memory.of(random_maps(), SIZES, PADDED)
    start = 0.1 + 0.8 * torch.rand(2, 5, 4)
    _, boxes = decoder(torch.randn(2, 5, 32), 0, start, memory)
    torch.testing.assert_close(boxes, start.expand(2, -1, -1, -1))


def test_permuted_queries_give_permuted_outputs():
    parts = detector_parts()
    memory = parts[0](Memory.of(random_maps(), SIZES, PADDED))
    q, position, boxes = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.rand(2, 5, 4)
    order = torch.randperm(5)
    one = parts[-1](q, position, boxes, memory)
    other = parts[-1](q[:, order], position[:, order], boxes[:, order], memory)
    for ours, theirs in zip(one, other):
        torch.testing.assert_close(ours[:, :, order], theirs, rtol=1e-4, atol=1e-4)


def test_groups_of_queries_attend_to_themselves_alone():
    parts = detector_parts()
    memory = parts[0](Memory.of(random_maps(), SIZES, PADDED))
    q, position, boxes = torch.randn(2, 6, 32), torch.randn(2, 6, 32), torch.rand(2, 6, 4)
    whole = parts[-1](q, position, boxes, memory, groups=2)
    for rows in (slice(0, 3), slice(3, 6)):
        alone = parts[-1](q[:, rows], position[:, rows], boxes[:, rows], memory)
        for ours, theirs in zip(alone, whole):
            torch.testing.assert_close(ours, theirs[:, :, rows], rtol=1e-4, atol=1e-4)
    together, _ = parts[-1](q, position, boxes, memory)
    assert not torch.allclose(together, whole[0], atol=1e-2)


def test_best_detections():
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.6, 0.2]])
    found, scores, labels = best_detections(logits, boxes, (100, 200), 3)
    assert labels.tolist() == [1, 0, 0]
    torch.testing.assert_close(scores, torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    corners = [[0, 40, 80, 60], [50, 25, 150, 75], [0, 40, 80, 60]]  # the first is clipped
    torch.testing.assert_close(found, torch.tensor(corners).float())


# -- matching and losses ---------------------------------------------------------------------------


def corners_of(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def giou_of(one: list[float], other: list[float]) -> float:
    """GIoU of two boxes_cxcywh."""
    a, b = corners_of(one), corners_of(other)
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum(area) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def cost_of(logit: float, box: list[float], truth: list[float]) -> float:
    p = 1 / (1 + math.exp(-logit))
    focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    distance = sum(abs(x - y) for x, y in zip(box, truth))
    return 2 * focal + 5 * distance - 2 * giou_of(box, truth)


def random_case(depth: int = 2, queries: int = 5, classes: int = 4):
    """Predictions of two images of SIZES with 3 and 0 objects, and these."""
    logits = torch.randn(depth, 2, queries, classes)
    boxes = 0.3 + 0.4 * torch.rand(depth, 2, queries, 4)
    truth = 0.3 + 0.4 * torch.rand(3, 4)
    targets = [
        Targets(to_pixels(truth, SIZES[0]), torch.tensor([2, 0, 2])),
        Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    return logits, boxes, truth, targets


def test_boxes_there_and_back():
    pixels = torch.tensor([[10.0, 4.0, 30.0, 20.0]])
    ours = to_cxcywh(pixels, (40, 100))
    torch.testing.assert_close(ours, torch.tensor([[0.2, 0.3, 0.2, 0.4]]))
    torch.testing.assert_close(to_pixels(ours, (40, 100)), pixels)


def test_cost_by_a_loop():
    logits, boxes, truth, targets = random_case()
    cost = match_cost(logits[:, 0], boxes[:, 0], targets[0].labels, truth)
    for z, q, n in itertools.product(range(2), range(5), range(3)):
        label = int(targets[0].labels[n])
        wanted = cost_of(float(logits[z, 0, q, label]), boxes[z, 0, q].tolist(), truth[n].tolist())
        assert float(cost[z, q, n]) == pytest.approx(wanted, abs=1e-5)


def test_matching_is_the_cheapest_of_all():
    logits, boxes, truth, targets = random_case()
    found = match(logits, boxes, targets, SIZES)
    assert found.image.tolist() == [0] * 6  # the other image has no object
    cost = match_cost(logits[:, 0], boxes[:, 0], targets[0].labels, truth)
    for z in range(2):
        rows = found.z == z
        own = found.query[rows].tolist()  # by object
        cheapest = min(
            itertools.permutations(range(5), 3),
            key=lambda qs: sum(float(cost[z, q, n]) for n, q in enumerate(qs)),
        )
        assert own == list(cheapest)
        assert torch.equal(found.labels[rows], targets[0].labels)
        torch.testing.assert_close(found.boxes[rows], truth)
    classes = found.classes(logits.shape[:-1], 9)
    assert (classes[:, 1] == 9).all() and (classes[:, 0] < 9).sum() == 6
    for z, q, label in zip(found.z, found.query, found.labels):
        assert classes[z, 0, q] == label


def test_losses_by_loops():
    logits, boxes, _, targets = random_case()
    found = match(logits, boxes, targets, SIZES)
    count = masks_per_rank(targets, logits.device)
    assert float(count) == 3
    target = F.one_hot(found.classes(logits.shape[:-1], 4), 5)[..., :4].float()
    weight = torch.rand_like(logits)
    focal = 0.0
    for x, t, w in zip(*(part.flatten().tolist() for part in (logits, target, weight))):
        p = 1 / (1 + math.exp(-x))
        positive = 0.25 * (1 - p) ** 2 * -math.log(p)
        negative = 0.75 * p**2 * -math.log(1 - p)
        focal += w * (positive if t else negative)
    assert float(loss_focal(logits, target, count, weight)) == pytest.approx(focal / 3, rel=1e-5)
    near = boxes[found.z, found.image, found.query]
    l1, giou = loss_l1(near, found.boxes, count), loss_giou(near, found.boxes, count)
    for r, (box, truth) in enumerate(zip(near.tolist(), found.boxes.tolist())):
        distance = sum(abs(x - y) for x, y in zip(box, truth))
        assert float(l1[r]) == pytest.approx(distance / 3, rel=1e-5)
        assert float(giou[r]) == pytest.approx((1 - giou_of(box, truth)) / 3, rel=1e-4)


def test_a_batch_without_objects_has_gradients():
    logits, boxes, _, targets = random_case()
    logits.requires_grad_()
    targets = [replace(t, boxes=t.boxes[:0], labels=t.labels[:0]) for t in targets]
    found = match(logits, boxes.requires_grad_(), targets, SIZES)
    assert len(found.query) == 0
    count = masks_per_rank(targets, logits.device)
    near = boxes[found.z, found.image, found.query]
    total = loss_focal(logits, torch.zeros_like(logits), count)
    total = total + loss_l1(near, found.boxes, count).sum()
    total = total + loss_giou(near, found.boxes, count).sum()
    total.backward()
    assert torch.isfinite(total) and logits.grad.any() and not boxes.grad.any()


def test_predictions_that_are_no_numbers_are_matched():
    logits, boxes, _, targets = random_case()
    logits[0, 0, 1] = torch.nan
    assert len(match(logits, boxes, targets, SIZES).query) == 6


def test_matching_waits_twice_and_the_memory_once():
    logits, boxes, _, targets = random_case()
    with count_waits() as found:
        match(logits, boxes, targets, SIZES)
    assert sum(found.values()) == 2  # there and back
    parts, maps = detector_parts(), random_maps()
    with count_waits() as found:
        detect(parts, maps, SIZES, PADDED)
    assert sum(found.values()) == 1
