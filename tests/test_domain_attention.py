"""Domain attention: each equation against loops over floats, and its place in the backbone."""

import inspect
import math
from dataclasses import replace

import pytest
import timm
import torch
from conftest import small_flags
from safetensors.torch import load_file
from test_data import labelled
from test_unidet import TREE, A, B, Part
from timm.layers import SEModule
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

import domain_attention
import unidet
from common.backbone import Backbone
from common.cascade import StageOutput, loss_box_reg
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.targets import RegionTargets
from domain_attention import DomainAttention, has_bank, insert_attention, residual_blocks

SMALL = domain_attention.Args(backbone="resnet10t", channels=32, fc_dim=8)
SPACE = LabelSpace([A, B])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def drawn(channels: int, adapters: int) -> DomainAttention:
    """A module whose weights are large enough to see."""
    module = DomainAttention(channels, adapters)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


# -- Attention -------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    rows, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(rows, bias)]


@pytest.mark.parametrize("adapters", [1, 3])
def test_attention_against_floats(adapters):
    """Each image by itself: pooled, N adapters, their softmax mixture, and a gate per channel."""
    module = drawn(32, adapters)
    x = torch.randn(2, 32, 3, 5)
    ours = module(x)
    for image, result in zip(x, ours):
        pooled = [sum(channel.flatten().tolist()) / 15 for channel in image]
        scores = [math.exp(s) for s in linear(module.assignment, pooled)]
        weights = [s / sum(scores) for s in scores]
        mixed = [0.0] * 32
        for weight, (first, _, last) in zip(weights, module.adapters):
            hidden = [max(h, 0.0) for h in linear(first, pooled)]
            assert len(hidden) == 2  # 32 / 16
            for c, a in enumerate(linear(last, hidden)):
                mixed[c] += weight * a
        gates = torch.tensor([1 / (1 + math.exp(-m)) for m in mixed])
        torch.testing.assert_close(result, image * gates[:, None, None], rtol=1e-4, atol=1e-5)


def test_one_adapter_is_squeeze_and_excitation():
    se = SEModule(64, rd_ratio=1 / 16, rd_divisor=1)
    module = DomainAttention(64, 1, se)
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(module(x), se(x))


def test_weights_of_the_adapters_sum_to_one_and_differ_between_images():
    weights, _ = drawn(32, 5).mixture(3 * torch.randn(4, 32, 3, 3))
    assert weights.shape == (4, 5)
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert weights.std(0).max() > 0.1


def test_order_of_the_adapters_does_not_count():
    module = drawn(32, 4)
    x = torch.randn(2, 32, 3, 3)
    before = module(x)
    order = [2, 0, 3, 1]
    module.adapters = nn.ModuleList(module.adapters[i] for i in order)
    assert not torch.allclose(module(x), before, atol=1e-3)
    module.assignment.weight.data = module.assignment.weight[order]
    module.assignment.bias.data = module.assignment.bias[order]
    torch.testing.assert_close(module(x), before)


def test_gates_start_near_nine_tenths():
    module = DomainAttention(256, 3)
    x = torch.randn(4, 256, 6, 6) + torch.randn(256, 1, 1)
    gate = module(x) / x
    assert gate.min() > 0.85 and gate.max() < 0.95
    assert not torch.equal(module.adapters[0][2].weight, module.adapters[1][2].weight)


def test_the_hidden_layer_has_a_neuron_at_least():
    assert DomainAttention(8, 2).adapters[0][0].out_features == 1


# -- Place in the backbone -------------------------------------------------------------------------


def body(name: str) -> nn.Module:
    return timm.create_model(name, features_only=True)


def attention_of(block: nn.Module) -> DomainAttention:
    return block.bn3[1] if isinstance(block, InvertedResidual) else block.se


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("resnet10t", [1, 1, 1, 1]),
        ("resnet26", [2, 2, 2, 2]),
        ("seresnet50", [3, 4, 6, 3]),
        ("tf_efficientnet_lite0", [1, 1, 2, 2, 3]),
    ],
)
def test_every_residual_block_has_attention(name, blocks):
    net = body(name)
    stages = residual_blocks(net)
    assert [len(stage) for stage in stages] == blocks
    insert_attention(replace(SMALL, backbone=name), net, 3)
    found = [[len(attention_of(block).adapters) for block in stage] for stage in stages]
    assert found == [[1] * blocks[0], *([3] * n for n in blocks[1:])]
    modules = [m for m in net.modules() if isinstance(m, DomainAttention)]
    assert len(modules) == sum(blocks)
    assert net(torch.zeros(1, 3, 64, 64))[-1].shape[-1] == 2


def test_half_of_the_blocks_have_a_single_adapter():
    less = [[has_bank(stage, index, True) for index in range(4)] for stage in range(4)]
    odd = [False, True, False, True]
    assert less == [[False] * 4, odd, odd, [True, False, True, False]]
    assert all(has_bank(stage, index, False) for stage in (1, 2, 3) for index in range(4))
    net = body("resnet26")
    insert_attention(replace(SMALL, less_blocks=True), net, 3)
    assert [len(layer[1].se.adapters) for layer in (net.layer2, net.layer3, net.layer4)] == [
        3,
        3,
        1,
    ]


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0"])
def test_attention_is_behind_the_last_norm_and_before_the_sum(name):
    net = body(name).eval()
    block = residual_blocks(net)[1][-1]
    insert_attention(replace(SMALL, backbone=name), net, 3)
    attention = attention_of(block)
    norm = block.bn3[0] if isinstance(block, InvertedResidual) else block.bn2
    nn.init.normal_(norm.weight)
    seen = {}
    norm.register_forward_hook(lambda m, given, y: seen.update(norm=y.clone()))
    attention.register_forward_hook(
        lambda m, given, y: seen.update(given=given[0].clone(), y=y.clone())
    )
    block.register_forward_hook(lambda m, given, y: seen.update(block=y.clone()))
    for adapter in attention.adapters:
        nn.init.constant_(adapter[2].bias, -1e4)  # a gate of 0
    net(torch.randn(1, 3, 64, 64))
    assert torch.equal(seen["given"], seen["norm"]) and seen["norm"].abs().max() > 0
    assert not seen["y"].any()
    assert seen["block"].abs().max() > 0  # the shortcut alone


def test_pretrained_weights_stay():
    """All that the plain backbone has is in the other, to the bit; the rest are adapters."""
    plain = Backbone("tf_efficientnet_lite0", 32)
    net = Backbone("tf_efficientnet_lite0", 32)
    assert net.frozen_norm
    insert_attention(SMALL, net.body, 3)
    own = net.body.state_dict()
    for key, tensor in plain.body.state_dict().items():
        kept = key if key in own else key.replace(".bn3.", ".bn3.0.")
        assert torch.equal(own.pop(kept), tensor), key
    assert own and all(".bn3.1." in key for key in own)
    net.train()
    norms = [m for m in net.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    adapters = [m for m in net.modules() if isinstance(m, DomainAttention)]
    assert all(p.requires_grad for module in adapters for p in module.parameters())


def test_features_start_near_those_of_the_pretrained_network():
    plain = Backbone("tf_efficientnet_lite0", 0, strides=[8, 16, 32]).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        before = plain(images)
        insert_attention(SMALL, plain.body, 3)
        for one, other in zip(before, plain(images)):
            cosine = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
            assert 0.97 < cosine < 1


def test_adapters_start_from_the_backbones_own_squeeze_and_excitation():
    net = body("seresnet50").eval()
    for blocks in residual_blocks(net):
        for block in blocks:
            nn.init.ones_(block.bn3.weight)  # timm starts with 0, which hides what follows
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(images)
        insert_attention(replace(SMALL, backbone="seresnet50"), net, 4)
        after = net(images)
    for one, other in zip(before, after):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, SEModule) for m in net.modules())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "ecaresnet50d", "convnext_atto"])
def test_backbones_without_a_place_for_it_are_refused(name):
    net = nn.Module() if name.startswith("swin") else body(name)
    with pytest.raises(InputError, match=rf"--backbone {name} has no residual blocks.*resnet50"):
        insert_attention(replace(SMALL, backbone=name), net, 2)


@pytest.mark.parametrize("adapters, ratio", [(5, 1.30), (6, 1.36)])
def test_cost_in_parameters(adapters, ratio):
    """Of a ResNet-50 C4 Faster R-CNN of the official code: backbone, RPN, and heads of one set.

    RPN: a 3 x 3 convolution of 1024 to 512 channels, then 36 anchors. Heads: 20 classes of VOC and
    background, with boxes of each class. The paper says 1.3.
    """
    net = body("resnet50")
    plain = sum(p.numel() for p in net.parameters())
    insert_attention(replace(SMALL, backbone="resnet50", less_blocks=True), net, adapters)
    added = sum(p.numel() for p in net.parameters()) - plain
    widths = {256: [1] * 3, 512: [1, adapters] * 2, 1024: [1, adapters] * 3}
    widths[2048] = [adapters, 1, adapters]
    expected = 0
    for c, counts in widths.items():
        for n in counts:
            expected += n * (2 * c * (c // 16) + c + c // 16) + n * (c + 1)
    assert added == expected
    rpn = 9 * 1024 * 512 + 512 + 36 * 6 * (512 + 1)
    heads = 21 * 5 * (2048 + 1)
    detector = plain + rpn + heads
    assert 1 + added / detector == pytest.approx(ratio, abs=0.005)


# -- Model -----------------------------------------------------------------------------------------


def count_adapters(args: domain_attention.Args) -> int:
    model = domain_attention.Model(args, SPACE, pretrained=False)
    counts = [len(m.adapters) for m in model.modules() if isinstance(m, DomainAttention)]
    return max(counts, default=0)


def test_as_many_adapters_as_datasets_unless_said():
    assert count_adapters(SMALL) == 2
    assert count_adapters(replace(SMALL, adapters=5)) == 5
    assert count_adapters(replace(SMALL, attention=False)) == 0


def test_the_control_is_the_partitioned_detector_of_unidet():
    plain = domain_attention.Model(replace(SMALL, attention=False), SPACE, pretrained=False)
    args = unidet.Args(backbone="resnet10t", channels=32, fc_dim=8)
    other = unidet.Model(args, SPACE, pretrained=False)
    shapes, others = ({k: t.shape for k, t in m.state_dict().items()} for m in (plain, other))
    assert shapes == others


def test_no_dataset_is_named_to_the_backbone():
    """The features of an image are the same, whichever datasets are asked for."""
    assert list(inspect.signature(DomainAttention.forward).parameters) == ["self", "x"]
    assert list(inspect.signature(domain_attention.Model.extract).parameters)[1:] == [
        "images",
        "sizes",
    ]
    model = domain_attention.Model(SMALL, SPACE, pretrained=False).eval()
    given = []
    model.backbone.register_forward_hook(lambda m, x, y: given.append((x, y)))
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    for dataset in (A, B):
        domain_attention.predict_images(model, [image], LabelSpace([dataset]))
    (first, maps), (second, others) = given
    assert len(first) == len(second) == 1 and torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(maps, others))


def test_score_is_the_root_of_mean_probability_and_objectness(monkeypatch):
    """Of the columns of one dataset, over three stages, for two images."""
    model = domain_attention.Model(SMALL, SPACE, pretrained=False).eval()
    for classifier in model.classifiers:
        assert classifier.bias.sigmoid().tolist() == pytest.approx([0.01] * 7)
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.5)
        nn.init.normal_(classifier.weight)
    hidden = [torch.randn(3, 8) for _ in range(3)]
    boxes = [torch.tensor([[0.0, 0, 9, 9], [5, 5, 30, 30]]), torch.tensor([[1.0, 2, 30, 40]])]
    objectness = [torch.tensor([0.9, 0.4]), torch.tensor([0.6])]
    stages = [StageOutput(k, boxes, h, torch.zeros(3, 4), []) for k, h in enumerate(hidden)]
    monkeypatch.setattr(model.centernet, "forward", lambda f: (list(zip(boxes, objectness)), {}))
    monkeypatch.setattr(model.cascade, "forward", lambda *given: stages)
    columns = model.columns_of(LabelSpace([B]))
    assert columns.tolist() == [4, 5, 6]
    _, scores = model.detect([torch.zeros(1)], [(64, 64)] * 2, columns)
    rows = [(0, 0, 0.9), (0, 1, 0.4), (1, 0, 0.6)]
    for region, (image, row, o) in enumerate(rows):
        for column, c in enumerate((4, 5, 6)):
            p = 0.0
            for classifier, h in zip(model.classifiers, hidden):
                logit = (h[region] @ classifier.weight[c] + classifier.bias[c]).item()
                p += 1 / (1 + math.exp(-logit)) / 3
            assert scores[image][row, column].item() == pytest.approx(math.sqrt(p * o), rel=1e-4)


def test_columns_are_those_of_a_dataset_or_all():
    model = domain_attention.Model(SMALL, SPACE, pretrained=False)
    assert model.columns_of(SPACE).tolist() == list(range(7))
    with pytest.raises(InputError, match="trained on first, second, not on third"):
        model.columns_of(LabelSpace([Vocabulary("third", ("a",))]))


# -- Losses ----------------------------------------------------------------------------------------


def supervision(part: Part) -> domain_attention.Supervision:
    return domain_attention.Supervision.of(part, SPACE, torch.device("cpu"))


@pytest.mark.parametrize(
    "part, labels, positive, ignored",
    [
        (Part(B), [0, 2, -1], [{4}, {6}, set()], [set()] * 3),
        (Part(A, TREE), [1, 0, -1], [{0, 1}, {0}, set()], [{3}, {1, 3}, set()]),
    ],
    ids=["flat", "tree"],
)
def test_loss_of_a_dataset_is_on_its_own_columns(part, labels, positive, ignored):
    """With a tree, ancestors are positive and descendants are left out."""
    logits = torch.randn(3, 7).requires_grad_()
    loss = domain_attention.loss_classes(logits, torch.tensor(labels), supervision(part))
    own = range(4, 7) if part.name == "second" else range(4)
    total = 0.0
    for row in range(3):
        for c in set(own) - ignored[row]:
            p = 1 / (1 + math.exp(-float(logits[row, c].detach())))
            total -= math.log(p if c in positive[row] else 1 - p)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)
    loss.backward()
    for row in range(3):
        trained = {c for c in range(7) if logits.grad[row, c] != 0}
        assert trained == set(own) - ignored[row]
    none = torch.zeros(0, dtype=torch.int64)
    assert domain_attention.loss_classes(torch.zeros(0, 7), none, supervision(part)) == 0


def test_the_sum_of_the_losses_of_three_stages():
    labels = torch.tensor([0, -1])
    stages, predictions = [], []
    for index in range(3):
        targets = [RegionTargets(torch.ones(2, 4), labels, torch.zeros(2))]
        deltas = torch.full((2, 4), index + 1.0)
        stages.append(StageOutput(index, [torch.rand(2, 4)], torch.zeros(2, 8), deltas, targets))
        predictions.append(torch.randn(2, 7))
    table = supervision(Part(B))
    proposals = {"loss_centernet_pos": torch.tensor(0.5)}
    losses = domain_attention.compute_losses(stages, predictions, proposals, table)
    total = 0.5
    for index in range(3):
        expected = domain_attention.loss_classes(predictions[index], labels, table)
        assert losses[f"loss_class_stage{index}"] == expected
        assert losses[f"loss_box_reg_stage{index}"] == loss_box_reg(stages[index]) > 0
        total += float(expected + loss_box_reg(stages[index]))
    assert losses["loss"].item() == pytest.approx(total)


# -- Training --------------------------------------------------------------------------------------


def test_batches_are_of_one_dataset_and_datasets_are_sampled_by_ratio(monkeypatch):
    datasets = [labelled("first", [[0]] * 3, 1), labelled("second", [[0]] * 5, 1)]
    seen = {}
    monkeypatch.setattr(domain_attention, "Mixture", lambda *given: None)
    monkeypatch.setattr(domain_attention, "make_loader", lambda *given, **named: named)
    sampler = domain_attention.BucketBatchSampler

    def spy(weights, buckets, *place):
        seen.update(weights=weights, buckets=buckets)
        return sampler(weights, buckets, *place)

    monkeypatch.setattr(domain_attention, "BucketBatchSampler", spy)
    for ratios, share in (("", 1), ("second=3", 3)):
        args = replace(SMALL, dataset_ratios=ratios, batch_size=2, compile="off")
        domain_attention.build_dataloader(args, datasets, 0)
        assert seen["weights"] == pytest.approx([1 / 3] * 3 + [share / 5] * 5)
        assert seen["buckets"].tolist() == [0] * 3 + [1] * 5


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory, call):
    """The run folder of a training on three datasets with four adapters, and its flags."""
    folder = tmp_path_factory.mktemp("domain") / "run"
    flags = ["--data-root", tiny_root, *small_flags("domain_attention", 3), "--batch-size", 2]
    flags += ["--datasets", "coco,o365,oid", "--eval-datasets", "oid", "--adapters", 4]
    call(*flags, "--output", folder, method="domain_attention")
    return folder, flags


def test_the_shape_of_the_attention_is_in_the_weights(trained):
    """`load` and --eval-only rebuild it, without the flags of the training."""
    folder, _ = trained
    model, _ = domain_attention.load(folder)
    stages = residual_blocks(model.backbone.body)
    assert len(stages) == 5
    keys = load_file(folder / "weights.safetensors").keys()
    assert any(".adapters.3.2.weight" in key for key in keys)
    assert not any(".adapters.4." in key for key in keys)
    module = domain_attention
    argv = ["--eval-only", "--weights", str(folder)]
    settings = (module.Args, module.METHOD, module.TINY, module.MODEL_FIELDS)
    args = module.parse_args(*settings, argv=argv)
    assert (args.adapters, args.attention, args.less_blocks) == (4, True, False)
    assert args.backbone == "tf_efficientnet_lite0"


def test_weights_with_attention_do_not_fit_the_control(trained, fails, tmp_path):
    folder, flags = trained
    flags = [*flags, "--no-attention", "--output", tmp_path / "run"]
    line = fails(*flags, "--weights", folder, method="domain_attention")
    assert "adapters" in line or "bn3" in line


def test_each_training_step_moves_the_columns_of_its_dataset_and_the_adapters(monkeypatch):
    """A step on the second dataset: the first one's columns keep no gradient."""
    model = domain_attention.Model(SMALL, SPACE, pretrained=False)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 5, 40, 40]])
    targets = [domain_attention.Targets(boxes, torch.tensor([1]))] * 2
    outputs = model(images, [(64, 64)] * 2, targets)
    domain_attention.compute_losses(*outputs, supervision(Part(B)))["loss"].backward()
    for classifier in model.classifiers:
        rows = classifier.weight.grad.abs().sum(1)
        assert not rows[:4].any() and rows[4:].all()
    block = model.backbone.body.layer3[0]
    assert isinstance(block.se, DomainAttention)
    assert all(p.grad is not None for p in block.se.parameters())


def test_official_weights_are_refused_in_one_line(tmp_path, fails):
    tensors = {"RCNN_base.4.0.domain_attention.SE_Layers.0.fc.0.weight": torch.zeros(16, 256)}
    torch.save({"model": tensors, "epoch": 14}, tmp_path / "model.pth")
    flags = ["--predict", "a.jpg", "--weights", tmp_path / "model.pth"]
    line = fails(*flags, method="domain_attention")
    assert "Faster R-CNN with anchors and does not fit" in line and "model.pth" in line
