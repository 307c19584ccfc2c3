"""RoIAlign of several levels against torchvision's kernel, which is single-threaded on the CPU."""

import math

import pytest
import torch
import torchvision
from torch import Tensor

import common.roi_align
from common.boxes import pool_rois
from common.roi_align import _samples, roi_align

STRIDES = [8, 16, 32]
SHAPES = [(12, 17), (6, 9), (3, 5)]
NAN, INF = math.nan, math.inf


def reference(features, strides, boxes, image, level, resolution) -> Tensor:
    """Pools by torchvision, level by level."""
    rois = torch.cat([image[:, None].to(boxes), boxes], 1)
    out = boxes.new_zeros(len(boxes), features[0].shape[1], resolution, resolution)
    for i, feature in enumerate(features):
        row = (level == i).nonzero().squeeze(1)
        scale = 1 / strides[i]
        pooled = torchvision.ops.roi_align(feature, rois[row], resolution, scale, aligned=True)
        out = out.index_copy(0, row, pooled.to(out))
    return out


def draw_boxes(count: int, dtype: torch.dtype) -> Tensor:
    """Boxes of 1/8 to 400 pixels in and around an image of 136 x 96, with the awkward ones first.

    These lie on borders and centres of cells, are empty in one or both sides, or hold the image.
    """
    centre = torch.rand(count, 2, dtype=dtype) * torch.tensor([220, 160]) - 40
    side = torch.exp(torch.rand(count, 2, dtype=dtype) * 8 - 2)
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
    boxes[:20] = (boxes[:20] / 8).round() * 8
    boxes[20:40] = (boxes[20:40] / 8).round() * 8 + 4
    boxes[40:44, 2] = boxes[40:44, 0]
    boxes[44:48, 2:] = boxes[44:48, :2]
    edges = [-4, -4, 140, 100], [-2000, -1000, 3000, 900], [-8, -8, 8, 8], [128, 88, 144, 104]
    boxes[48:52] = torch.tensor(edges)
    return boxes


def draw(dtype: torch.dtype, shapes=SHAPES, channels: int = 5, count: int = 200) -> tuple:
    """Returns features, strides, boxes, image and level; one level is as likely as another."""
    torch.manual_seed(0)
    features = [torch.randn(2, channels, *shape, dtype=dtype) for shape in shapes]
    features = [feature.requires_grad_() for feature in features]
    image = torch.randint(0, 2, (count,))
    level = torch.randint(0, len(shapes), (count,))
    return features, STRIDES[: len(shapes)], draw_boxes(count, dtype), image, level


def assert_same(found: Tensor, expected: Tensor, features: list[Tensor]) -> None:
    """Compares values and the gradients of a random cotangent."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-13
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, features, cotangent)
    truths = torch.autograd.grad(expected, features, cotangent)
    for gradient, truth in zip(gradients, truths, strict=True):
        assert gradient.shape == truth.shape
        scale = max(truth.abs().max().item(), 1)
        assert torch.allclose(gradient, truth, rtol=0, atol=10 * tolerance * scale)


@pytest.mark.parametrize("resolution", [1, 4, 7, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_torchvision(dtype, resolution):
    inputs = draw(dtype)
    assert_same(roi_align(*inputs, resolution), reference(*inputs, resolution), inputs[0])


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 2)], ids=str)
def test_maps_of_few_cells(shape):
    inputs = draw(torch.float64, [shape])
    assert_same(roi_align(*inputs, 7), reference(*inputs, 7), inputs[0])


def test_native_path_as_torchvision():
    """The path of other devices, on the CPU; regions without gradient included."""
    features, strides, boxes, image, level = draw(torch.float64)
    single = [feature.detach().float() for feature in features]  # cast to the boxes' type
    native = common.roi_align._forward_native(single, strides, boxes, image, level, 4)
    expected = reference(features, strides, boxes, image, level, 4)
    assert torch.allclose(native, expected, atol=1e-6)
    cotangent = torch.randn_like(expected)
    cotangent[10:20] = 0
    shapes = [list(feature.shape) for feature in features]
    found = common.roi_align._backward_native(cotangent, shapes, strides, boxes, image, level, 4)
    truths = torch.autograd.grad(expected, features, cotangent)
    for gradient, truth in zip(found, truths, strict=True):
        assert torch.allclose(gradient, truth, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_as_cpu():
    features, strides, *regions = draw(torch.float32)
    on_cuda = [feature.detach().cuda().requires_grad_() for feature in features]
    found = roi_align(on_cuda, strides, *(x.cuda() for x in regions), 7)
    expected = roi_align(features, strides, *regions, 7)
    assert torch.allclose(found.cpu(), expected, atol=1e-5)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, on_cuda, cotangent.cuda())
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, features, cotangent)):
        assert torch.allclose(gradient.cpu(), truth, atol=1e-3)


def test_gradient_by_differences():
    torch.manual_seed(0)
    maps = [torch.randn(2, 1, *shape, dtype=torch.float64) for shape in ((2, 3), (1, 2))]
    maps = [feature.requires_grad_() for feature in maps]
    boxes = torch.tensor([[-3.0, 2, 40, 19], [1, 1, 9, 9], [5, 5, 30, 12]], dtype=torch.float64)
    image, level = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(
        lambda *maps: roi_align(list(maps), [8, 16], boxes, image, level, 3), maps
    )


BROKEN = [
    [NAN, NAN, NAN, NAN],
    [NAN, 0, 40, 40],
    [0, 0, 40, NAN],
    [0, 0, INF, INF],
    [-INF, -INF, INF, INF],
    [INF, 0, INF, 40],
    [60, 60, 20, 20],
    [60, 0, 20, 40],
    [-3e38, 0, 3e38, 40],
]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_broken_box_gives_zero(broken):
    features, strides, *_ = draw(torch.float32, SHAPES[:1])
    boxes = torch.tensor([[0.0, 0, 40, 40], broken, [8, 8, 90, 30]])
    image = torch.zeros(3, dtype=torch.long)
    pooled = roi_align(features, strides, boxes, image, image, 7)
    sound = reference(features, strides, boxes[::2], image[::2], image[::2], 7)
    assert not pooled[1].any()
    assert torch.allclose(pooled[::2], sound, atol=1e-5)
    (gradient,) = torch.autograd.grad(pooled[1].sum(), features)
    assert not gradient.any()


def test_broken_box_keeps_the_order_of_the_others():
    features = [torch.full((1, 1, *shape), float(i + 1)) for i, shape in enumerate(SHAPES)]
    boxes = torch.tensor([[0.0, 0, 135, 95], [NAN, 0, 40, 40], [8, 8, 30, 30]])
    pooled = pool_rois(features, STRIDES, [boxes], 4)
    assert pooled.flatten(1).amax(1).tolist() == pytest.approx([1, 0, 1])


def test_huge_boxes_cost_no_more_than_the_map():
    low = -torch.tensor([1e4, 1e6, 1e9, 1e30])
    number, *_ = _samples(low, -low, torch.full((4,), 17.0), 7)
    assert number.view(4, 7).sum(1).max() < 100
    features, strides, *_ = draw(torch.float32, SHAPES[:1])
    boxes = torch.stack([low, low, -low, -low], 1)
    image = torch.zeros(4, dtype=torch.long)
    pooled = roi_align(features, strides, boxes, image, image, 7)
    assert pooled.isfinite().all()
    outside = pooled.detach()[:2]
    outside[:, :, 3, 3] = 0  # the map lies in the bin in the middle
    assert not outside.any()


def test_parts_give_the_same(monkeypatch):
    features, *others = draw(torch.float64)
    whole = roi_align(features, *others, 7)
    cotangent = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, features, cotangent)
    calls = []
    entries = common.roi_align._entries
    monkeypatch.setattr(common.roi_align, "MOST_ENTRIES", 500)
    monkeypatch.setattr(
        common.roi_align, "_entries", lambda *args: calls.append(entries(*args)) or calls[-1]
    )
    parted = roi_align(features, *others, 7)
    assert torch.equal(parted, whole)
    assert len(calls) > 20
    largest = max(int(number.view(-1, 49).sum(1).max()) for _, _, number in calls)
    assert all(len(cells) < 500 + largest for cells, _, _ in calls)
    for found, truth in zip(torch.autograd.grad(parted, features, cotangent), expected):
        assert torch.allclose(found, truth, atol=1e-12)


def test_no_regions():
    features, strides, boxes, image, level = draw(torch.float32)
    pooled = roi_align(features, strides, boxes[:0], image[:0], level[:0], 7)
    assert pooled.shape == (0, 5, 7, 7)
    for gradient in torch.autograd.grad(pooled.sum(), features):
        assert not gradient.any()


def test_regions_without_gradient_cost_nothing(monkeypatch):
    features, strides, boxes, image, level = draw(torch.float64)
    pooled = roi_align(features, strides, boxes, image, level, 7)
    expected = reference(features, strides, boxes, image, level, 7)
    cotangent = torch.zeros_like(pooled)
    cotangent[60:63, 2] = torch.randn(7, 7, dtype=torch.float64)
    cotangent[63, 0, 0, 0] = -1
    truths = torch.autograd.grad(expected, features, cotangent)
    seen = []
    parts = common.roi_align._parts
    monkeypatch.setattr(common.roi_align, "_parts", lambda *args: seen.append(args) or parts(*args))
    found = torch.autograd.grad(pooled, features, cotangent)
    assert torch.equal(seen[0][2], boxes[60:64])
    for gradient, truth in zip(found, truths):
        assert torch.allclose(gradient, truth, atol=1e-12)


def test_bfloat16_is_computed_in_float32():
    features, *others = draw(torch.float32)
    rounded = [f.detach().bfloat16().requires_grad_() for f in features]
    exact = [f.detach().float().requires_grad_() for f in rounded]
    pooled, expected = roi_align(rounded, *others, 7), roi_align(exact, *others, 7)
    assert torch.equal(pooled, expected.bfloat16())
    cotangent = torch.randn_like(expected).bfloat16()
    truths = torch.autograd.grad(expected, exact, cotangent.float())
    for found, truth in zip(torch.autograd.grad(pooled, rounded, cotangent), truths):
        assert torch.equal(found, truth.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_as_torchvision(dtype):
    features, *others = draw(torch.float32)
    features = [feature.to(dtype) for feature in features]
    with torch.autocast("cpu", torch.bfloat16):
        pooled = roi_align(features, *others, 7)
        expected = reference(features, *others, 7)
    assert pooled.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(pooled.float(), expected, atol=1e-5, rtol=tolerance)


def test_threads_change_no_bit():
    """Maps and regions are large enough for several threads in each operation."""
    features, *others = draw(torch.float32, [(64, 64), (32, 32)], channels=16, count=600)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 4, 4):
            torch.set_num_threads(number)
            pooled = roi_align(features, *others, 7)
            cotangent = pooled.detach().sin()
            results.append([pooled, *torch.autograd.grad(pooled, features, cotangent)])
    finally:
        torch.set_num_threads(threads)
    for tensors in zip(*results):
        assert torch.equal(tensors[0], tensors[1]) and torch.equal(tensors[1], tensors[2])


def test_compiled_without_a_graph_break():
    features, *others = draw(torch.float32)
    compiled = torch.compile(
        lambda maps, *rest: roi_align([2 * m for m in maps], *rest, 7) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    pooled = compiled(features, *others)
    expected = roi_align([2 * m for m in features], *others, 7) + 1
    assert_same(pooled, expected, features)


def test_is_a_sound_operator():
    """Checks the schema, the shapes and strides that tracing sees, and the autograd formula."""
    features, strides, *regions = draw(torch.float32)
    torch.library.opcheck(roi_align, (features, strides, *regions, 4))
    gradient = torch.randn(len(regions[0]), 5, 4, 4, dtype=torch.bfloat16)
    sizes = [side for feature in features for side in feature.shape]
    backward = common.roi_align._roi_align_backward
    torch.library.opcheck(backward, (gradient, sizes, strides, *regions, 4))
    (feature, *_), _, boxes, image, level = draw(torch.float32, [(1, 1)], channels=1)
    torch.library.opcheck(roi_align, ([feature, feature], [8, 16], boxes, image, level, 4))
