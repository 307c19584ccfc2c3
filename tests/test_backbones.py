"""Backbones against small implementations of their papers, and the weights that they start from."""

import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import FAST
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import category_extended
import common.backbone
import dataseg
import detic
import domain_attention
import lmseg
import scaledet
import unidet
import unidetector
from common.backbone import Backbone
from common.clip_resnet import CLIPResNetC4
from common.command import parse_args
from common.datasets import load_datasets
from common.deformable import Neck
from common.errors import InputError
from common.labels import Vocabulary
from common.optim import parameter_groups

ALL = [4, 8, 16, 32]
SWIN = "swin_tiny_patch4_window7_224"

# -- Swin, from the formulas of arXiv 2103.14030 ---------------------------------------------------


def linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[name + ".weight"], tensors.get(name + ".bias"))


def norm(tensors: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    unit = (x - mean) / (variance + eps).sqrt()
    return unit * tensors[name + ".weight"] + tensors[name + ".bias"]


def visible(side: Tensor, length: int, window: int, shift: int) -> Tensor:
    """Whether two positions of one axis see each other: a window's, and not across the border."""
    moved = (side - shift) % length  # where the cyclic shift puts a position
    place = moved // window
    wrapped = moved >= length - shift
    last = place == length // window - 1
    return (place[:, None] == place) & (~last | (wrapped[:, None] == wrapped))


def window_attention(
    tensors: dict[str, Tensor], name: str, x: Tensor, heads: int, shift: int
) -> Tensor:
    """Attends within windows of 7 x 7 cells; every pair of cells of the map x (h, w, C) is scored.

    The map is padded by zeros to whole windows.
    """
    h, w, channels = x.shape
    x = F.pad(x, (0, 0, 0, -w % 7, 0, -h % 7))
    high, wide = x.shape[:2]
    y, column = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    y, column = y.flatten(), column.flatten()
    seen = visible(y, high, 7, shift) & visible(column, wide, 7, shift)
    dy = (y - shift) % high % 7
    dx = (column - shift) % wide % 7
    row = (dy[:, None] - dy + 6) * 13 + dx[:, None] - dx + 6  # of the table
    bias = tensors[name + ".relative_position_bias_table"][row.clamp(0, 168)]  # (N, N, heads)
    q, k, v = linear(tensors, name + ".qkv", x.flatten(0, 1)).view(-1, 3, heads, 32).unbind(1)
    scores = torch.einsum("ihc,jhc->ijh", q, k) / 32**0.5 + bias
    weights = scores.masked_fill(~seen[..., None], -torch.inf).softmax(1)
    mixed = torch.einsum("ijh,jhc->ihc", weights, v).flatten(1)
    return linear(tensors, name + ".proj", mixed).view(high, wide, channels)[:h, :w]


def swin_stage(tensors: dict[str, Tensor], stage: int, depth: int, x: Tensor) -> Tensor:
    """The blocks of a stage: W-MSA and SW-MSA by turns, each before an MLP."""
    for block in range(depth):
        name = f"layers.{stage}.blocks.{block}"
        shift = 3 * (block % 2)
        attended = norm(tensors, name + ".norm1", x)
        x = x + window_attention(tensors, name + ".attn", attended, 3 * 2**stage, shift)
        hidden = linear(tensors, name + ".mlp.fc1", norm(tensors, name + ".norm2", x))
        x = x + linear(tensors, name + ".mlp.fc2", F.gelu(hidden))
    return x


def swin(tensors: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """The four maps of Swin-T for one image (3, H, W); `tensors` have the official names."""
    weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    x = F.conv2d(image[None], weight, bias, stride=4)[0].permute(1, 2, 0)
    x = norm(tensors, "patch_embed.norm", x)
    maps = []
    for stage, depth in enumerate([2, 2, 6, 2]):
        x = swin_stage(tensors, stage, depth, x)
        maps.append(norm(tensors, f"norm{stage}", x).permute(2, 0, 1))
        if stage < 3:
            corners = [x[i::2, j::2] for j in (0, 1) for i in (0, 1)]
            name = f"layers.{stage}.downsample"
            joined = norm(tensors, name + ".norm", torch.cat(corners, -1))
            x = linear(tensors, name + ".reduction", joined)
    return maps


def randomised(backbone: Backbone) -> Backbone:
    """Draws norms, biases and tables too, so that a missing one shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return backbone


def official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of Detic and Mask2Former."""
    renamed = {}
    for key, tensor in tensors.items():
        first, *rest = key.split(".")
        if "downsample" in rest:
            rest[0] = str(int(rest[0]) - 1)
        renamed[".".join([first, *rest])] = tensor
    return renamed


def test_swin_is_the_paper_s_with_a_norm_on_every_map():
    """No map of 64 x 288 pixels has whole windows. The last has one and a part of another."""
    backbone = randomised(Backbone(SWIN, 0, pretrained=False, strides=ALL)).eval()
    image = torch.randn(1, 3, 64, 288, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = backbone(image)
        expected = swin(official(backbone.body.state_dict()), image[0])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one[0], other, rtol=1e-4, atol=1e-4)


def test_swin_has_the_norms_of_the_maps_that_are_used():
    names = {key for key in Backbone(SWIN, 64, pretrained=False).body.state_dict() if "." in key}
    norms = {key.partition(".")[0] for key in names if key.startswith("norm")}
    assert norms == {"norm1", "norm2", "norm3"}  # as Detic's files


@pytest.mark.parametrize(
    "name, rates, expected",
    [
        (SWIN, (0.2, 0.3), 0.2),
        (SWIN, (0.3, 0.3), 0.3),
        ("swin_base_patch4_window12_384", (0.2, 0.3), 0.3),
        ("convnext_tiny", (0.2, 0.3), 0.2),
    ],
)
def test_drop_path_grows_linearly_to_its_rate(name, rates, expected):
    with torch.device("meta"):
        body = Backbone(name, 64, pretrained=False, drop_path=rates).body
    found = [m.drop_prob for m in body.modules() if type(m).__name__ == "DropPath"]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(expected)
    steps = sorted(set(found))
    assert steps[0] == pytest.approx(expected / len(steps))


def decayed(model: nn.Module) -> set[str]:
    """The names of the parameters with weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05)
    decaying = [group["params"] for group in groups if group["weight_decay"]]
    return {names[id(parameter)] for parameters in decaying for parameter in parameters}


class Holder(nn.Module):
    """A model with a backbone, as a method has it."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone


def test_positions_and_norms_of_swin_do_not_decay():
    with torch.device("meta"):
        model = Holder(Backbone(SWIN, 0, pretrained=False, strides=ALL))
    kinds = {name.rpartition("body.")[2].rpartition(".")[0] for name in decayed(model)}
    last = {kind.rpartition(".")[2] for kind in kinds}
    assert last == {"proj", "qkv", "fc1", "fc2", "reduction"}
    table = "backbone.body.layers.0.blocks.0.attn.relative_position_bias_table"
    assert table not in decayed(model)


# -- Plain ViT, from the formulas of arXiv 2203.16527 and 2112.01526 (relative positions) ----------

VIT = "vit_tiny_patch16_224"  # 12 blocks of 3 heads with 64 channels


def relative(table: Tensor, size: int) -> Tensor:
    """R (size, size, c), R[i, j] that of the distance i - j; the table is resized to 2 size - 1."""
    rows = 2 * size - 1
    places = (np.arange(rows) + 0.5) * len(table) / rows - 0.5
    known = np.arange(len(table))
    columns = [np.interp(places, known, column) for column in table.T.numpy()]
    resized = torch.tensor(np.stack(columns, 1), dtype=torch.float32)
    i = torch.arange(size)
    return resized[i[:, None] - i + size - 1]


def map_attention(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """softmax(q k / sqrt(c) + q R_h + q R_w) v over a map or window x (h, w, C)."""
    h, w, _ = x.shape
    q, k, v = linear(tensors, name + ".qkv", x).view(h, w, 3, 3, 64).unbind(2)
    scores = torch.einsum("ijnc,klnc->nijkl", q, k) / 8
    rows = relative(tensors[name + ".rel_pos_h"], h)
    columns = relative(tensors[name + ".rel_pos_w"], w)
    scores += torch.einsum("ijnc,ikc->nijk", q, rows)[..., None]
    scores += torch.einsum("ijnc,jlc->nijl", q, columns)[..., None, :]
    weights = scores.flatten(3).softmax(-1).view_as(scores)
    mixed = torch.einsum("nijkl,klnc->ijnc", weights, v).flatten(2)
    return linear(tensors, name + ".proj", mixed)


def vit_block(tensors: dict[str, Tensor], i: int, x: Tensor) -> Tensor:
    """Block i of 12 of a ViTDet: windows of 14 x 14, the whole map in blocks 2, 5, 8 and 11."""
    name = f"blocks.{i}"
    h, w, _ = x.shape
    side = max(h, w) if i in (2, 5, 8, 11) else 14
    y = norm(tensors, name + ".norm1", x, 1e-6)
    if side == 14:
        y = F.pad(y, (0, 0, 0, -w % 14, 0, -h % 14))
    attended = torch.zeros_like(y)
    for top in range(0, h, side):
        for left in range(0, w, side):
            place = (slice(top, top + side), slice(left, left + side))
            attended[place] = map_attention(tensors, name + ".attn", y[place])
    x = x + attended[:h, :w]
    hidden = linear(tensors, name + ".mlp.fc1", norm(tensors, name + ".norm2", x, 1e-6))
    return x + linear(tensors, name + ".mlp.fc2", F.gelu(hidden))


def test_vit_is_vitdet():
    """The map of 6 x 18 cells has windows that are cut, and positions of another size than 64."""
    backbone = randomised(Backbone(VIT, 0, pretrained=False, strides=ALL)).eval()
    tensors = backbone.body.state_dict()
    image = torch.randn(1, 3, 96, 288, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        [ours] = backbone.body(image)
        weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
        x = F.conv2d(image, weight, bias, stride=16)
        codes = tensors["pos_embed"][:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        x = x + F.interpolate(codes, (6, 18), mode="bicubic")
        x = x[0].permute(1, 2, 0)
        for i in range(12):
            x = vit_block(tensors, i, x)
    torch.testing.assert_close(ours[0], x.permute(2, 0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, depth, drop_path, decay",
    [
        (VIT, 12, 0.1, 0.7),
        ("vit_base_patch16_224", 12, 0.1, 0.7),
        ("vit_large_patch16_224", 24, 0.4, 0.8),
        ("vit_huge_patch14_224", 32, 0.5, 0.9),
    ],
)
def test_vit_settings_are_vitdet_s(name, depth, drop_path, decay):
    """Official: decay^(depth + 1 - layer); patches and positions are layer 0, block i is i + 1."""
    with torch.device("meta"):
        model = Holder(Backbone(name, 0, pretrained=False, strides=ALL))
    body = model.backbone.body
    rates = [m.drop_prob for m in body.modules() if type(m).__name__ == "DropPath"]
    assert rates[-1] == pytest.approx(drop_path)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for group in parameter_groups(model, 0.05):
        for parameter in group["params"]:
            layer = depth + 1
            parts = names[id(parameter)].split(".")
            if parts[1] == "body":
                layer = int(parts[3]) + 1 if parts[2] == "blocks" else 0
            assert group["lr_factor"] == pytest.approx(decay ** (depth + 1 - layer))
    windows = [block.attn.window for block in body.blocks]
    assert [i for i, window in enumerate(windows) if not window] == [
        depth // 4 * n - 1 for n in (1, 2, 3, 4)
    ]


def test_positions_and_norms_of_a_vit_do_not_decay():
    with torch.device("meta"):
        model = Holder(Backbone(VIT, 0, pretrained=False, strides=ALL))
    kinds = {tuple(name.split(".")[-2:]) for name in decayed(model)}
    assert ("attn", "rel_pos_h") in kinds  # as in detectron2
    assert ("body", "pos_embed") not in kinds
    assert not any(kind.startswith("norm") for kind, _ in kinds)


def test_the_backbone_learns_at_a_tenth():
    with torch.device("meta"):
        model = Holder(Backbone("resnet18", 0, pretrained=False, strides=ALL))
    assert {group["lr_factor"] for group in parameter_groups(model, 0.05)} == {0.1}
    model.backbone.factor = 0.3
    assert {group["lr_factor"] for group in parameter_groups(model, 0.05)} == {0.3}


# -- CLIP's ResNet, with which the released LMSeg starts -------------------------------------------


def clip_names(key: str) -> str:
    """The name in CLIP's ResNet of a tensor of timm's."""
    key = re.sub(r"stem_conv(\d)\.conv", r"conv\1", key)
    key = re.sub(r"stem_conv(\d)\.bn", r"bn\1", key)
    key = re.sub(r"stages_(\d)", lambda match: f"layer{int(match[1]) + 1}", key)
    key = re.sub(r"conv(\d)_\w+\.conv", r"conv\1", key)
    key = re.sub(r"conv(\d)_\w+\.bn", r"bn\1", key)
    key = key.replace("shortcut.conv.conv", "downsample.0")
    return key.replace("shortcut.conv.bn", "downsample.1")


def test_clip_s_resnet_gives_the_maps_of_clip_with_frozen_norms(monkeypatch):
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: True)
    backbone = randomised(Backbone("resnet50_clip.openai", 0, strides=ALL)).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for module in norms:
        assert not module.training
        assert not module.weight.requires_grad
    clip = CLIPResNetC4("RN50/openai", pretrained=False).eval()
    tensors = {clip_names(key): tensor for key, tensor in backbone.body.state_dict().items()}
    missing, unexpected = clip.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} == {"attnpool", "frozen_norm"}
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        x = backbone.normalise(images, [(64, 96)])
        torch.testing.assert_close(x, clip.normalise(images, [(64, 96)]))
        maps = backbone(x)
        trunk = clip.trunk(x)
        torch.testing.assert_close(maps[2], trunk, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps[3], clip.layer4(trunk), rtol=1e-4, atol=1e-4)
    assert backbone.channels == [256, 512, 1024, 2048]


# -- starting weights ------------------------------------------------------------------------------


METHODS = [
    category_extended,
    dataseg,
    detic,
    domain_attention,
    lmseg,
    scaledet,
    unidet,
    unidetector,
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.METHOD)
def test_the_default_backbone_is_pinned_by_its_tag(method):
    """Torchvision's first weights, with which detectron2 and mmdetection train a ResNet-50."""
    name = method.Args().backbone
    assert name == "resnet50.tv_in1k"
    tag = timm.create_model(name).pretrained_cfg
    assert tag["tag"] == "tv_in1k"
    assert "resnet50-0676ba61" in tag["url"]


@pytest.mark.parametrize(
    "method, rate", [(detic, 0.2), (scaledet, 0.2), (lmseg, 0.3), (dataseg, 0.3)]
)
def test_the_drop_path_of_a_small_swin_is_the_paper_s(method, rate, monkeypatch):
    """Detic 0.2, Mask2Former 0.3."""
    made = []

    def spy(*settings, **named):
        made.append(Backbone(*settings, **named))
        return made[-1]

    monkeypatch.setattr(method, "Backbone", spy)
    args = method.Args(backbone=SWIN, text_encoder="minilm", prompts="name", channels=32)
    if method is lmseg:
        args = replace(args, context_tokens=0)
    space = method.build_label_space(args, [Vocabulary("coco", ("cat", "dog"))])
    method.Model(args, space, pretrained=False)
    assert made[0].body.layers[3].blocks[1].drop_path1.drop_prob == pytest.approx(rate)


def detectron2_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm ResNet's tensors as detectron2's converter of torchvision's files names them."""
    renamed = {}
    for key, tensor in tensors.items():
        if not key.startswith("layer"):
            key = "stem." + key
        key = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        key = re.sub(r"bn(\d)", r"conv\1.norm", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        if not key.endswith("num_batches_tracked"):
            renamed[key] = tensor
    return renamed


def trained(name: str, **settings) -> dict[str, Tensor]:
    """The state dict of a timm classifier with numbers that no other model has."""
    torch.manual_seed(5)
    return timm.create_model(name, **settings).state_dict()


def write(path: Path, tensors: dict[str, Tensor], key: str = "") -> Path:
    """Writes tensors as the suffix of `path` says, under `key` if there is one."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    elif path.suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        record = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(record))
    else:
        torch.save({key: tensors, "epoch": 3} if key else tensors, path)
    return path


@pytest.mark.parametrize(
    "file, key, rename",
    [
        ("a.pth", "", dict),  # MIIL's resnet50_miil_21k.pth
        ("a.pth", "state_dict", dict),
        ("a.pt", "model", dict),
        ("a.safetensors", "", dict),
        ("a.pkl", "", detectron2_names),  # detectron2's R-50.pkl
    ],
)
def test_a_resnet_starts_from_a_file(tmp_path, caplog, file, key, rename):
    tensors = trained("resnet18", num_classes=11)
    path = write(tmp_path / file, rename(tensors), key)
    with caplog.at_level("INFO", "concord"):
        backbone = Backbone(f"resnet18/{path}", 32)
    body = backbone.body.state_dict()
    for name, tensor in body.items():
        assert torch.equal(tensor, tensors[name]), name
    assert backbone.frozen_norm
    assert "100 tensors of" in caplog.text
    assert "not used: 2 of 'fc'" in caplog.text


def test_a_swin_starts_from_microsoft_s_file(tmp_path):
    """The names are the official ones, the norms are new, and every table is taken."""
    source = trained(SWIN)
    tensors = official({key.replace("head.fc", "head"): t for key, t in source.items()})
    index = torch.zeros(49, 49, dtype=torch.long)
    tensors["layers.0.blocks.0.attn.relative_position_index"] = index
    backbone = Backbone(f"{SWIN}/{write(tmp_path / 'a.pth', tensors, 'model')}", 0, strides=ALL)
    for name, tensor in backbone.body.state_dict().items():
        if name.startswith("norm"):
            assert torch.equal(tensor, torch.full_like(tensor, name.endswith("weight")))
        else:
            assert torch.equal(tensor, source[name]), name


def test_a_swin_starts_from_the_backbone_of_a_trained_detector(tmp_path):
    """Norms of its maps are in the file, and are taken."""
    source = randomised(Backbone(SWIN, 0, pretrained=False, strides=ALL)).body.state_dict()
    path = write(tmp_path / "a.safetensors", official(source))
    body = Backbone(f"{SWIN}/{path}", 0, strides=ALL).body.state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in body.items())


def test_a_vit_starts_from_a_file_of_mae(tmp_path, caplog):
    source = trained(VIT, num_classes=0)
    with caplog.at_level("INFO", "concord"):
        path = write(tmp_path / "a.pth", source, "model")
        body = Backbone(f"{VIT}/{path}", 0, strides=ALL).body.state_dict()
    for name, tensor in body.items():
        if "rel_pos" in name:
            assert not tensor.any()
        else:
            assert torch.equal(tensor, source[name]), name
    assert "not used: 1 of 'cls_token', 2 of 'norm'" in caplog.text


@pytest.mark.parametrize("name, is_told", [("resnet18", False), (SWIN, True)])
def test_a_stem_that_cannot_be_frozen_is_told(name, is_told, monkeypatch, caplog):
    """Only a ResNet has what the setting freezes."""
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: True)
    with caplog.at_level("INFO", "concord"):
        body = Backbone(name, 0, strides=ALL, freeze_stem=True).train().body
    assert any(not parameter.requires_grad for parameter in body.parameters()) != is_told
    assert ("no stem is frozen, since it is no ResNet" in caplog.text) == is_told


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bn1.weight": None}, "lacks 'bn1.weight'; is it a file of resnet18"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"'conv1.weight' .* has the shape \[64, 3, 3"),
        ({"layer1.0.conv1.weight": torch.full((64, 64, 3, 3), torch.nan)}, "is not finite"),
        ({"layer4.2.conv1.weight": torch.zeros(1)}, "has no tensor 'layer4.2.conv1.weight' of"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(tmp_path, change, words):
    tensors = {**trained("resnet18"), **change}
    path = tmp_path / "a.pth"
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(InputError, match=words) as caught:
        Backbone(f"resnet18/{path}", 32)
    assert str(path) in str(caught.value)


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_no_code_of_a_file_runs(tmp_path, capsys, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"conv1.weight": Code()}}))
    else:
        torch.save({"conv1.weight": Code()}, path)
    with pytest.raises(InputError, match="cannot be read: it is no file of plain tensors"):
        Backbone(f"resnet18/{path}", 32)
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"b\.pth cannot be read: it does not exist"):
        Backbone(f"resnet18/{tmp_path / 'b.pth'}", 32)


def test_the_file_is_not_needed_again(tiny_root, tmp_path):
    """Neither to go on with the training nor for the trained model."""
    path = write(tmp_path / "a.pth", trained("test_resnet"))
    args = parse_args(scaledet.Args, "scaledet", {}, [], argv=[*FAST, "--steps", "1"])
    args.backbone = f"test_resnet/{path}"
    args.image_size = 64
    datasets = load_datasets("coco", "train", str(tiny_root))
    space = scaledet.build_label_space(args, [d.vocabulary for d in datasets])
    folder = tmp_path / "run"
    folder.mkdir()
    place = (space, folder, torch.device("cpu"))
    scaledet.train(replace(args, checkpoint_every=1), datasets, *place)
    path.unlink()
    scaledet.train(replace(args, steps=2), datasets, *place)
    model, _ = scaledet.load(folder)
    assert model.args.backbone == args.backbone
    assert model.backbone.frozen_norm


# -- maps of one column ----------------------------------------------------------------------------


def bfloat16_gradients(convolution: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a convolution in bfloat16 and the gradient of its weights.

    Memory that was freed is full of NaN.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = convolution(x)
    junk = [torch.full((size,), math.nan) for size in range(16, 30000, 173)]
    del junk
    [gradient] = torch.autograd.grad(result.float().sum(), [convolution.weight])
    return result, gradient


@pytest.mark.parametrize("top", ["p6", "p7", "neck"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (4, 2)])
def test_the_gradients_of_coarse_maps_come_from_the_map_alone(top, shape):
    """A CPU with AVX512_BF16 has them from memory that nothing was written to otherwise."""
    if top == "neck":
        convolution = Neck([64], 64, 2).levels[1][0]
    else:
        extra = Backbone(common.backbone.LITE0, 64, pretrained=False).fpn.extra_blocks
        convolution = getattr(extra, top)
    x = torch.randn(2, 64, *shape)
    expected = F.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
    [gradient] = torch.autograd.grad(expected.sum(), [convolution.weight])
    got = bfloat16_gradients(convolution, x)
    torch.testing.assert_close(got[0].float(), expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(got[1], gradient, rtol=0.02, atol=0.1)
