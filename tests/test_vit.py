"""Plain ViTs as backbones: what timm's models become, frozen and tuned, under every method."""

import dataclasses
import importlib
import logging

import pytest
import timm
import torch
from conftest import METHODS, small_runs
from safetensors.torch import save_file
from torch import Tensor, nn

import category_extended
import common.backbone
import domain_attention
from common import vit
from common.backbone import Backbone
from common.errors import InputError
from common.labels import Vocabulary
from common.optim import parameter_groups, set_learning_rate, trained_groups
from common.parts import Parts, in_parts
from common.process import Process
from common.runlog import RunLog

DETECTOR = [8, 16, 32, 64, 128]
STANDARD = "test_vit"  # 6 blocks of 64 channels
ROPE = "vit_tiny_patch16_dinov3_qkvb"  # 12 blocks of 192 channels
REGISTERS = "vit_wee_patch16_reg1_gap_256"


class Holder(nn.Module):
    """A model with a backbone, as a method has it, and a head."""

    def __init__(self, name: str, channels: int = 32):
        super().__init__()
        self.backbone = Backbone(name, channels, pretrained=False)
        self.head = nn.Linear(channels, 2)

    @in_parts
    def extract(self, images, sizes):
        return self.backbone(self.backbone.normalise(images, sizes))


# -- which form a model takes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, plain",
    [
        (STANDARD, True),
        (ROPE, True),
        (REGISTERS, True),
        ("eva02_tiny_patch14_224", True),
        ("deit_tiny_patch16_224", True),
        ("samvit_base_patch16", True),
        ("beit_base_patch16_224", True),
        ("swin_tiny_patch4_window7_224", False),
        ("hiera_tiny_224", False),
        ("mvitv2_tiny", False),
        ("pvt_v2_b0", False),
        ("resnet18", False),
        ("tf_efficientnet_lite0", False),
        ("no_such_model", False),
    ],
)
def test_a_plain_vit_is_known_by_its_strides(name, plain):
    """And no random number is drawn, so that a training at a fixed seed stays the same."""
    vit.is_plain.cache_clear()
    state = torch.get_rng_state()
    assert vit.is_plain(name) == plain
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name, line",
    [
        ("vit_tiny_patch16_224", "a ViTDet, windows of 14 patches, 4 of 12 blocks global"),
        ("vit_small_patch14_dinov2", "a ViTDet, windows of 14 patches, 4 of 12 blocks global"),
        ("vit_base_patch16_siglip_224", "a ViTDet, windows of 14 patches, 4 of 12 blocks global"),
        ("vit_base_patch16_clip_224", "a ViTDet, windows of 14 patches, 4 of 12 blocks global"),
        ("vit_small_patch14_reg4_dinov2", "timm's VisionTransformer, with global attention in all"),
        ("vit_small_patch16_dinov3", "timm's Eva, with global attention in all 12 blocks"),
        ("eva02_tiny_patch14_224", "timm's Eva, with global attention in all 12 blocks"),
        ("vit_small_patch16_rope_mixed_224", "timm's Eva, with global attention in all 12 blocks"),
        ("samvit_base_patch16", "timm's VisionTransformerSAM, with windows in 8 of 12 blocks"),
        ("naflexvit_base_patch16_siglip", "timm's NaFlexVit, with global attention in all 12"),
    ],
)
def test_the_log_says_which_form_was_taken(name, line, caplog):
    with torch.device("meta"), caplog.at_level(logging.INFO, "concord"):
        backbone = Backbone(name, 32, pretrained=False)
    assert f"backbone {name}: {line}" in caplog.text
    with torch.device("meta"):
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(32, -(-64 // s), -(-96 // s)) for s in DETECTOR]


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
@pytest.mark.parametrize("channels", [0, 32])
def test_a_vit_of_one_image_size_is_refused(name, channels):
    with pytest.raises(InputError, match=rf"^--backbone {name} cannot be used for images of any"):
        Backbone(name, channels, pretrained=False)


# -- the maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [STANDARD, ROPE])
@pytest.mark.parametrize(
    "channels, strides, top",
    [
        (48, DETECTOR, ["p6", "p7"]),
        (48, [4, 8, 16, 32, 64], []),
        (48, [8, 16, 32], None),
        (0, [8, 16, 32], None),
    ],
)
def test_a_pyramid_has_its_strides(name, channels, strides, top):
    backbone = Backbone(name, channels, pretrained=False, strides=strides)
    assert backbone.channels == [channels or 256] * len(strides)
    images = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8)
    maps = backbone(backbone.normalise(images, [(96, 160), (70, 150)]))
    width = channels or 256
    assert [x.shape for x in maps] == [(2, width, -(-96 // s), -(-160 // s)) for s in strides]
    if top is not None:
        assert [key for key, _ in backbone.pyramid.top.named_children()] == top
    if top == []:  # P6 is P5 subsampled
        assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])
    sum(x.square().sum() for x in maps).backward()
    idle = [key for key, p in backbone.named_parameters() if p.grad is None]
    assert not idle  # DistributedDataParallel would wait for them


@pytest.mark.parametrize("name", [ROPE, REGISTERS, "eva02_tiny_patch14_224", STANDARD])
def test_an_object_is_where_it_is(name):
    """Maps change most where the image changes, also if patches do not fit the strides."""
    torch.manual_seed(0)
    backbone = Backbone(name, 64, pretrained=False).eval()
    images = torch.full((2, 3, 128, 192), 128, dtype=torch.uint8)
    images[1, :, 64:96, 128:160] = 255
    with torch.no_grad():
        maps = backbone(backbone.normalise(images, [(128, 192)] * 2))
    for stride, feature in zip(DETECTOR[:3], maps):
        change = (feature[1] - feature[0]).abs().sum(0)
        y, x = divmod(int(change.argmax()), change.shape[1])
        assert abs((y + 0.5) * stride - 80) <= 16 + stride / 2
        assert abs((x + 0.5) * stride - 144) <= 16 + stride / 2


def randomised(module: nn.Module) -> nn.Module:
    """Draws norms, biases and tokens too, so that a missing one shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.mark.parametrize("name", [ROPE, REGISTERS, "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("side", [(10, 10), (4, 7)])
def test_the_map_is_timm_s(name, side):
    """Of the last block behind the norm, without class token and registers, to the bit."""
    backbone = randomised(Backbone(name, 32, pretrained=False)).eval()
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    own = {key.removeprefix("model."): x for key, x in backbone.body.state_dict().items()}
    lost = model.load_state_dict(own, strict=False)
    assert not lost.unexpected_keys
    assert all(key.startswith("fc_norm.") for key in lost.missing_keys)
    patch = backbone.pyramid.patch
    images = torch.randn(2, 3, side[0] * patch, side[1] * patch)
    with torch.no_grad():
        [ours] = backbone.body(images)
        _, [*_, last] = model.forward_intermediates(images, norm=True, output_fmt="NCHW")
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    assert torch.equal(ours, last)
    assert torch.equal(ours, tokens.unflatten(1, side).permute(0, 3, 1, 2))


def test_a_patch_of_14_pixels_covers_16_of_the_image():
    backbone = Backbone("eva02_tiny_patch14_224", 32, pretrained=False)
    seen = []
    backbone.body.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    backbone(torch.zeros(1, 3, 96, 160))
    assert seen == [(1, 3, 84, 140)]


# -- learning rates --------------------------------------------------------------------------------


def factors(model: nn.Module, groups: list[dict]) -> dict[str, float]:
    """The `lr_factor` of each parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("groups", [trained_groups, lambda m: parameter_groups(m, 0.05)])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_the_rate_falls_towards_the_image(groups, factor):
    model = Holder(ROPE)
    model.backbone.factor = factor
    found = factors(model, groups(model))
    body = "backbone.body.model."
    one = factor or 1.0
    assert found["head.weight"] == found["backbone.pyramid.levels.0.2.weight"] == 1
    assert found["backbone.pyramid.top.p6.weight"] == 1
    assert found[body + "norm.weight"] == one
    for i in range(12):
        expected = one * 0.7 ** (12 - i)
        assert found[f"{body}blocks.{i}.attn.qkv.weight"] == pytest.approx(expected)
    for name in ("cls_token", "reg_token", "patch_embed.proj.weight"):
        assert found[body + name] == pytest.approx(one * 0.7**13)


@pytest.mark.parametrize(
    "name, blocks, decay, drop_path",
    [
        ("vit_so400m_patch14_siglip_224", 27, 0.8, 0.4),
        ("vit_giant_patch14_reg4_dinov2", 40, 0.9, 0.5),
        ("vit_large_patch16_dinov3", 24, 0.8, 0.4),
        (REGISTERS, 14, 0.7, 0.1),
    ],
)
def test_large_models_have_the_settings_of_large_ones(name, blocks, decay, drop_path):
    with torch.device("meta"):
        backbone = Backbone(name, 32, pretrained=False)
    prefix = "" if isinstance(backbone.body, vit.ViTDet) else "model."
    first = backbone.lr_factor(f"body.{prefix}blocks.0.attn.qkv.weight")
    assert first == pytest.approx(decay**blocks)
    rates = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(drop_path)


def test_tokens_and_positions_do_not_decay():
    model = Holder(ROPE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, 0.05):
        for parameter in group["params"]:
            if names[id(parameter)].endswith("_token"):
                assert group["weight_decay"] == 0


def test_the_optimizer_of_a_cnn_is_as_before():
    """One group with the parameters in their order, which takes the state of a plain list."""
    model = Holder("test_resnet").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    [group] = trained_groups(model)
    assert group["lr_factor"] == 1
    assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
    before = torch.optim.AdamW(parameters, lr=0.1)
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, i)
    before.step()
    after = torch.optim.AdamW([group], lr=0.3)
    after.load_state_dict(before.state_dict())
    for parameter in parameters:
        assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
    set_learning_rate(after, 0.2)
    assert after.param_groups[0]["lr"] == 0.2


# -- frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [STANDARD, ROPE])
def test_a_frozen_vit_is_in_no_graph(name):
    model = Holder(name)
    model.backbone.factor = 0.0
    model.train()
    seen = []
    model.backbone.body.register_forward_hook(lambda _, given, y: seen.extend(y))
    maps = model.extract(torch.zeros(2, 3, 64, 96, dtype=torch.uint8), [(64, 96)] * 2)
    assert maps[0].requires_grad
    assert seen and not any(y.requires_grad for y in seen)
    assert not any(m.training for m in model.backbone.body.modules())  # no drop path
    assert not any("body" in name for name in factors(model, trained_groups(model)))


@pytest.mark.parametrize("factor", [None, 0.0])
def test_the_parts_of_a_batch_have_the_gradients_of_the_whole(factor, monkeypatch):
    model = Holder(STANDARD)
    model.backbone.factor = factor
    model.train()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # a part draws other numbers
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    found = []
    for parts in (1, 2):
        monkeypatch.setattr(Parts, "number", parts)
        model.zero_grad()
        maps = model.extract(images, [(64, 96)] * 3)
        sum(x.square().mean() for x in maps).backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert any("body" in key for key in found[0]) == (factor is None)
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "frozen, given, factor", [("all", None, 0), ("all", 0.5, 0.5), ("stem", None, None)]
)
def test_frozen_all_is_a_factor_of_0(frozen, given, factor):
    """A factor that is given counts more."""
    settings = {"backbone": "test_resnet", "channels": 8}
    args = category_extended.Args(frozen=frozen, backbone_factor=given, **settings)
    space = category_extended.build_label_space(args, [Vocabulary("a", ("cat",))])
    assert category_extended.Model(args, space, pretrained=False).backbone.factor == factor


def test_frozen_adapters_are_refused():
    """They are in the backbone."""
    args = domain_attention.Args(backbone="test_resnet", backbone_factor=0.0, channels=32)
    space = domain_attention.build_label_space(args, [])
    with pytest.raises(InputError, match="add --no-attention"):
        domain_attention.Model(args, space, pretrained=False)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ROPE, REGISTERS, "mvitv2_tiny"])
def test_a_model_that_timm_wraps_starts_from_a_file(name, tmp_path, caplog):
    torch.manual_seed(3)
    source = randomised(timm.create_model(name)).state_dict()
    save_file(source, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "concord"):
        body = Backbone(f"{name}/{tmp_path / 'a.safetensors'}", 32).body
    for key, tensor in body.state_dict().items():
        assert torch.equal(tensor, source[key.removeprefix("model.")]), key
    assert f"{len(body.state_dict())} tensors of" in caplog.text


# -- under the methods -----------------------------------------------------------------------------


def bodies(model: nn.Module) -> list[nn.Module]:
    """The timm models in a method's model."""
    return [module.body for module in model.modules() if isinstance(module, Backbone)]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for body in bodies(model) for p in body.parameters()]


@pytest.mark.parametrize("name, factor", [(STANDARD, 0.5), (ROPE, 0.0)])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_and_a_prediction(method, name, factor, tiny_root, tmp_path, monkeypatch):
    """A tuned ViT moves, a frozen one does not."""
    module = importlib.import_module(method)
    flags = small_runs(method, tmp_path / "run", tiny_root, steps=1)[0]
    flags += ["--backbone", name, "--backbone-factor", str(factor)]
    fields = {field.name for field in dataclasses.fields(module.Args)}
    if "classifier_backbone" in fields:
        flags += ["--classifier-backbone", name]
    if "warmup_steps" in fields:
        flags += ["--warmup-steps", "0"]
    seen = []
    check_finite = RunLog.check_finite

    def spy(run_log, losses, step, batch):
        model = run_log.content[0]
        learns = [p for body in bodies(model) for p in body.parameters() if p.grad is not None]
        seen.append((weights(model), bool(learns)))
        return check_finite(run_log, losses, step, batch)

    monkeypatch.setattr(RunLog, "check_finite", spy)
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: False)  # needs the hub
    monkeypatch.setattr(module, "evaluate", lambda *_: {})
    monkeypatch.setattr(module, "evaluation_datasets", lambda *_, **__: [])
    monkeypatch.setattr("sys.argv", [f"{method}.py", *flags])
    monkeypatch.setattr(Process, "training", None)
    module.main()

    model, label_space = module.load(flags[len(flags) - 1 - flags[::-1].index("--output") + 1])
    before, learns = seen[0]
    assert learns == (factor > 0)
    assert all(map(torch.equal, before, weights(model))) == (factor == 0)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    [result] = module.predict_images(model, [image], label_space)
    assert result["size"] == (96, 128)
