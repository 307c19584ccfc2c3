"""Tests of what both segmenters share: pixel decoder, decoder, matching, points, backbones."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common.pixel_decoder
import dataseg
import lmseg
from common.backbone import Backbone
from common.labels import LabelSpace, Vocabulary
from common.msda import formula, msda
from common.pixel_decoder import EncoderLayer, MSDeformAttn, PixelDecoder, pixel_centres
from common.point_matching import (
    assign,
    pairwise_bce,
    pairwise_dice,
    point_sample,
    uncertain_points,
)
from common.transformer import Attention, DecoderLayer, QueryHead, blocked_pixels, sine_position


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- matching --------------------------------------------------------------------------------------


def assigned(cost):
    """Queries and targets of one image and one decoder output."""
    [pairs] = assign([cost[None]])
    assert pairs.z.tolist() == [0] * len(pairs.query)
    return pairs.query, pairs.target


def test_matching_is_the_cheapest_of_all():
    for _ in range(20):
        cost = torch.randn(4, 3)
        rows, columns = assigned(cost)
        assert len(set(rows.tolist())) == 3 and columns.tolist() == [0, 1, 2]
        best = min(
            sum(cost[q, t] for t, q in enumerate(chosen))
            for chosen in itertools.permutations(range(4), 3)
        )
        assert float(cost[rows, columns].sum()) == pytest.approx(float(best), abs=1e-5)


@pytest.mark.parametrize("shape", [(4, 0), (2, 5), (0, 3)])
def test_matching_of_fewer(shape):
    rows, columns = assigned(torch.randn(shape))
    assert len(rows) == len(columns) == min(shape) and rows.dtype == columns.dtype == torch.long


def test_costs_that_are_not_finite_are_avoided():
    cost = torch.tensor([[math.nan, 5.0], [1.0, math.inf], [2.0, -math.inf]])
    assert sorted(zip(*(x.tolist() for x in assigned(cost)))) == [(0, 1), (1, 0)]
    assert len(assigned(torch.full((3, 2), math.nan))[0]) == 2


def test_pairwise_costs_are_those_of_each_pair():
    logits, targets = 3 * torch.randn(4, 7), torch.rand(3, 7).round()
    bce, dice = pairwise_bce(logits, targets), pairwise_dice(logits, targets)
    for q, t in itertools.product(range(4), range(3)):
        pairs = list(zip(logits[q].tolist(), targets[t].tolist()))
        expected = -sum(
            math.log(sigmoid(x)) if y else math.log(1 - sigmoid(x)) for x, y in pairs
        ) / len(pairs)
        assert float(bce[q, t]) == pytest.approx(expected, rel=1e-4)
        both = sum(sigmoid(x) * y for x, y in pairs)
        expected = 1 - (2 * both + 1) / (sum(sigmoid(x) + y for x, y in pairs) + 1)
        assert float(dice[q, t]) == pytest.approx(expected, rel=1e-4)


def test_pairwise_costs_of_large_logits_are_finite():
    logits, targets = torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert pairwise_bce(logits, targets).tolist() == [[1e4, 0.0]]
    assert torch.isfinite(pairwise_dice(logits, targets)).all()


# -- points ----------------------------------------------------------------------------------------


def ramp(height: int, width: int) -> torch.Tensor:
    """Returns (1, H, W) with the value 2x - 3y + 1 at (x, y). Pixel centres are index + 0.5."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return (2 * x - 3 * y + 1)[None]


def test_points_of_a_ramp_are_exact():
    height, width = 6, 9
    inside = 0.5 + torch.rand(1, 50, 2) * torch.tensor(
        [width - 1, height - 1]
    )  # x, y between the outermost centres
    sampled = point_sample(ramp(height, width), inside / torch.tensor([width, height]))
    torch.testing.assert_close(sampled, 2 * inside[..., 0] - 3 * inside[..., 1] + 1)


def test_points_at_the_border_mix_with_zero():
    ones, points = (
        torch.ones(1, 4, 4),
        torch.tensor([[[0.0, 0.5], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [-1.0, 0.5]]]),
    )
    assert point_sample(ones, points).tolist() == [[0.5, 0.25, 0.25, 1.0, 0.0]]


def test_points_shared_by_masks_are_points_of_each():
    maps, points = torch.rand(5, 8, 11) > 0.5, torch.rand(1, 30, 2)
    shared = point_sample(maps, points)
    assert shared.shape == (5, 30) and shared.dtype == torch.float32
    torch.testing.assert_close(shared, point_sample(maps, points.expand(5, -1, -1)))


def test_uncertain_points_are_the_least_certain():
    logits = ramp(16, 16).repeat(3, 1, 1).requires_grad_() - torch.tensor([0.0, 5.0, -9.0]).view(
        3, 1, 1
    )
    candidates, random = torch.rand(3, 120, 2), torch.rand(3, 10, 2)
    points = uncertain_points(logits, 40, candidates, random)
    assert points.shape == (3, 40, 2) and torch.equal(points[:, 30:], random)
    distance = point_sample(logits.detach(), candidates).abs()
    for own, far, given in zip(points[:, :30], distance, candidates):
        assert sorted(own.tolist()) == sorted(given[far.argsort()[:30]].tolist())
    drawn = uncertain_points(logits, 41)
    assert (
        drawn.shape == (3, 41, 2)
        and not drawn.requires_grad
        and drawn.min() >= 0
        and drawn.max() <= 1
    )
    near, anywhere = (
        point_sample(logits, part).abs().mean() for part in (drawn[:, :30], drawn[:, 30:])
    )
    assert near < anywhere / 2


def test_no_segment_no_points():
    logits = torch.zeros(0, 8, 8, requires_grad=True)
    sampled = point_sample(logits, uncertain_points(logits, 12))
    assert sampled.shape == (0, 12)
    sampled.sum().backward()  # still a part of the graph
    for cost in (pairwise_bce, pairwise_dice):
        assert cost(torch.randn(4, 12), torch.zeros(0, 12)).shape == (4, 0)


# -- transformer decoder ---------------------------------------------------------------------------


def test_sine_position_by_the_formula():
    height, width, channels = 3, 5, 16
    code, half = sine_position(height, width, channels), channels // 2
    assert code.shape == (1, channels, height, width)
    for j, y, x in itertools.product(range(channels), range(height), range(width)):
        part, k = divmod(j, half)
        value = ((x + 1) / (width + 1e-6) if part else (y + 1) / (height + 1e-6)) * 2 * math.pi
        angle = value / 10_000 ** (2 * (k // 2) / half)
        expected = math.cos(angle) if k % 2 else math.sin(angle)
        assert float(code[0, j, y, x]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_that_of_torch(masked):
    ours, torchs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    torchs.load_state_dict(ours.state_dict())
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    blocked = torch.rand(2, 5, 9) > 0.5 if masked else None
    blocked_heads = blocked.repeat_interleave(4, 0) if masked else None
    torch.testing.assert_close(ours(q, k, v, blocked), torchs(q, k, v, attn_mask=blocked_heads)[0])


def torchs_attention(own: Attention, *given) -> torch.Tensor:
    """Returns what nn.MultiheadAttention with the weights of `own` makes of query, key, value."""
    torchs = nn.MultiheadAttention(own.out_proj.in_features, own.heads, batch_first=True)
    torchs.load_state_dict(own.state_dict())
    return torchs(*given)[0]


def test_positions_are_in_queries_and_keys_not_in_values():
    layer = DecoderLayer(16, 4, 32)
    q, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    query_pos, key_pos = torch.randn(5, 16), torch.randn(1, 9, 16)
    attended = torchs_attention(layer.cross_attn, q + query_pos, memory + key_pos, memory)
    ours = layer.cross_attend(q, query_pos, memory, key_pos, None)
    torch.testing.assert_close(ours, layer.cross_norm(q + attended))
    attended = torchs_attention(layer.self_attn, q + query_pos, q + query_pos, q)
    torch.testing.assert_close(layer.self_attend(q, query_pos), layer.self_norm(q + attended))


def test_blocked_pixels_are_outside_of_the_resized_masks():
    """Resizing the features is resizing the masks."""
    features, mask_embed = torch.randn(2, 8, 16, 24), torch.randn(2, 5, 8)
    masks = torch.einsum("bqc,bchw->bqhw", mask_embed, features)
    for size in [(4, 6), (8, 12), (8, 6)]:
        resized = F.interpolate(masks, size, mode="bilinear")
        blocked = blocked_pixels(mask_embed, F.interpolate(features, size, mode="bilinear"))
        assert torch.equal(blocked.view_as(resized), resized.sigmoid() < 0.5)


def test_empty_masks_attend_everywhere():
    mask_embed = torch.randn(1, 4, 8).requires_grad_()
    features = -mask_embed[:, 2, :, None, None].expand(1, 8, 3, 5)  # the mask of query 2 is empty
    blocked = blocked_pixels(mask_embed, features)
    assert not blocked[0, 2].any() and not blocked.requires_grad
    layer, memory = DecoderLayer(8, 2, 16), torch.randn(1, 15, 8)
    q = layer.cross_attend(mask_embed, torch.randn(4, 8), memory, torch.zeros(1, 15, 8), blocked)
    q.sum().backward()
    assert torch.isfinite(q).all() and torch.isfinite(mask_embed.grad).all()


def decode(layers, head, q, query_pos, memory, level_features):
    key_pos = sine_position(*level_features.shape[-2:], q.shape[2]).flatten(2).transpose(1, 2)
    for layer in layers:
        blocked = blocked_pixels(head(q)[1], level_features)
        q = layer.feed_forward(
            layer.self_attend(layer.cross_attend(q, query_pos, memory, key_pos, blocked), query_pos)
        )
    return head(q)


def test_permuted_queries_give_permuted_outputs():
    layers, head = [DecoderLayer(16, 4, 32) for _ in range(3)], QueryHead(16)
    q, query_pos, memory, order = (
        torch.randn(1, 6, 16),
        torch.randn(6, 16),
        torch.randn(1, 20, 16),
        torch.randperm(6),
    )
    features = torch.randn(1, 16, 4, 5)
    for one, other in zip(
        decode(layers, head, q, query_pos, memory, features),
        decode(layers, head, q[:, order], query_pos[order], memory, features),
    ):
        torch.testing.assert_close(one[:, order], other)


def test_images_of_a_batch_do_not_mix():
    layers, head = [DecoderLayer(16, 4, 32) for _ in range(2)], QueryHead(16)
    q, memory, features = torch.randn(2, 6, 16), torch.randn(2, 20, 16), torch.randn(2, 16, 4, 5)
    query_pos = torch.randn(6, 16)
    both = decode(layers, head, q, query_pos, memory, features)
    alone = decode(layers, head, q[1:], query_pos, memory[1:], features[1:])
    for one, other in zip(both, alone):
        torch.testing.assert_close(one[1:], other)


# -- pixel decoder ---------------------------------------------------------------------------------


def test_deformable_attention_starts_on_squares():
    attention = MSDeformAttn(32, 8, 3, 4)
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor(directions)[:, None, None] * torch.arange(1, 5).view(1, 1, 4, 1)
    torch.testing.assert_close(offsets, expected.expand(-1, 3, -1, -1).float(), atol=1e-5, rtol=0)
    assert (
        not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
    )


def test_positions_move_the_points_but_are_not_in_what_they_read():
    """A layer put together by hand, with the formula for the attention."""
    layer, shapes = EncoderLayer(16, 24, 2, levels=2, points=3), ((2, 3), (1, 2))
    attention = layer.self_attn
    for linear in (attention.sampling_offsets, attention.attention_weights):
        nn.init.normal_(linear.weight, std=0.3)
    x, position, reference = torch.randn(2, 8, 16), torch.randn(1, 8, 16), torch.rand(8, 2)
    value = attention.value_proj(x).unflatten(2, (2, 8))
    offsets = attention.sampling_offsets(x + position).unflatten(2, (2, 2, 3, 2))
    logits = attention.attention_weights(x + position).unflatten(2, (2, 6))
    attended = attention.output_proj(formula(value, shapes, offsets, logits, reference))
    hidden = layer.norm1(x + attended)
    expected = layer.norm2(hidden + layer.linear2(layer.linear1(hidden).relu()))
    ours = layer(x, position, shapes, reference)
    torch.testing.assert_close(ours, expected)


def test_pixel_centres_are_x_and_y_row_by_row():
    assert pixel_centres(1, 2, "cpu").tolist() == [[0.25, 0.5], [0.75, 0.5]]
    assert pixel_centres(2, 1, "cpu").tolist() == [[0.5, 0.25], [0.5, 0.75]]


def random_features() -> list[torch.Tensor]:
    """Maps of a backbone with 8, 12, 16 and 20 channels for an image of 64 x 96 pixels."""
    maps = zip((8, 12, 16, 20), (4, 8, 16, 32))
    return [torch.randn(1, channels, 64 // stride, 96 // stride) for channels, stride in maps]


@pytest.mark.parametrize("autocast", [True, False])
def test_pixel_decoder_gives_maps_of_four_strides(autocast):
    decoder = PixelDecoder([8, 12, 16, 20], channels=32, layers=2, ffn=48, heads=4)
    assert (
        decoder.layers[1].self_attn.sampling_offsets.bias.abs().max() == 4
    )  # nothing drew it anew
    features = [
        torch.randn(2, c, 96 // s, 160 // s) for c, s in zip((8, 12, 16, 20), (4, 8, 16, 32))
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = [f.bfloat16() for f in features] if autocast else features
        mask_features, maps = decoder(features)
    assert mask_features.shape == (2, 32, 24, 40) and mask_features.dtype == torch.float32
    assert [m.shape for m in maps] == [(2, 32, 3, 5), (2, 32, 6, 10), (2, 32, 12, 20)]
    assert all(m.dtype == torch.float32 for m in maps)
    (mask_features.sum() + sum((m * torch.randn_like(m)).sum() for m in maps)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters())


def spy_on_sampling(monkeypatch) -> list[list[torch.dtype]]:
    """The dtypes of value, offsets, logits and reference points in each call of `msda` to come."""
    given = []

    def spy(value, shapes, offsets, logits, reference):
        given.append([x.dtype for x in (value, offsets, logits, reference)])
        return msda(value, shapes, offsets, logits, reference)

    monkeypatch.setattr(common.pixel_decoder, "msda", spy)
    return given


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_samples_half_precision_values_at_exact_points(autocast, monkeypatch):
    given = spy_on_sampling(monkeypatch)
    decoder = PixelDecoder([8, 12, 16, 20], channels=32, layers=2, ffn=48, heads=4)
    features = random_features()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoder(features)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert given == [[dtype, torch.float32, dtype, torch.float32]] * 2


@pytest.mark.parametrize("amp, dtype", [("on", torch.bfloat16), ("off", torch.float32)])
@pytest.mark.parametrize("method", [dataseg, lmseg], ids=["dataseg", "lmseg"])
def test_autocast_of_a_model_reaches_its_pixel_decoder(method, amp, dtype, monkeypatch):
    given = spy_on_sampling(monkeypatch)
    args = method.Args(
        backbone="resnet18",
        text_encoder="minilm",
        prompts="name",
        channels=32,
        encoder_layers=1,
        decoder_layers=1,
        amp=amp,
    )
    label_space = LabelSpace([Vocabulary("a", ("cat", "sky"), text=torch.eye(2, 384))])
    model = method.Model(args, label_space, pretrained=False)
    model.extract(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [(64, 64)])
    assert given == [[dtype, torch.float32, dtype, torch.float32]]


@pytest.mark.parametrize("autocast", [True, False])
def test_compiled_parts_agree_with_eager(autocast):
    torch._dynamo.reset()
    decoder = PixelDecoder([8, 12, 16, 20], channels=32, layers=1, ffn=48, heads=4)
    features = random_features()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = decoder(features)
        compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)(features)
    torch.testing.assert_close(compiled, eager)


# -- backbones -------------------------------------------------------------------------------------

ALL = [4, 8, 16, 32]


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet18", [64, 128, 256, 512]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
        ("vit_tiny_patch16_224", [256] * 4),
    ],
)
def test_backbones_give_four_maps(name, channels):
    backbone = Backbone(name, 0, pretrained=False, strides=ALL)
    assert backbone.channels == channels
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    features = backbone(backbone.normalise(images, [(64, 96), (50, 90)]))
    assert [f.shape for f in features] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, ALL)]
    sum(f.square().sum() for f in features).backward()
    assert all(
        p.grad is not None for p in backbone.parameters()
    )  # none is idle: DistributedDataParallel would wait


def test_padding_is_the_mean_colour():
    """Zero after the normalisation, whatever the pixels of the padding are."""
    backbone = Backbone("resnet18", 0, pretrained=False, strides=ALL)
    images = torch.randint(1, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = [(64, 70), (33, 96)]
    config, expected = backbone.body.pretrained_cfg, torch.zeros(2, 3, 64, 96)
    for i, (height, width) in enumerate(sizes):
        for c, (mean, std) in enumerate(zip(config["mean"], config["std"])):
            pixels = images[i, c, :height, :width] / 255
            expected[i, c, :height, :width] = (pixels - mean) / std
    found = backbone.normalise(images, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found[0, :, :, 70:].any() and not found[1, :, 33:].any()


def test_channels_of_detectors():
    assert Backbone("resnet18", 32, pretrained=False).channels == [32] * 5


def test_plain_vit_keeps_places():
    """Maps change most where the image changes, also if patches do not fit the strides."""
    backbone = Backbone("vit_small_patch14_dinov2", 0, pretrained=False, strides=ALL).eval()
    images = torch.full((2, 3, 128, 192), 128, dtype=torch.uint8)
    images[1, :, 64:96, 128:160] = 255
    with torch.no_grad():
        for stride, feature in zip(ALL, backbone(backbone.normalise(images, [(128, 192)] * 2))):
            assert feature.shape == (2, 256, 128 // stride, 192 // stride)
            change = (feature[1] - feature[0]).abs().sum(0)
            y, x = divmod(int(change.argmax()), change.shape[1])
            assert (
                abs((y + 0.5) * stride - 80) <= 16 + stride / 2
                and abs((x + 0.5) * stride - 144) <= 16 + stride / 2
            )
