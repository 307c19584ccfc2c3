"""Domain attention against tensors recorded from the official implementation.

CONCORD_PARITY names the folder. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error.
"""

from collections import OrderedDict

import pytest
import timm
import torch
from parity import (
    case,
    check,
    check_gradients,
    report,  # noqa: F401 (a fixture)
)
from timm.models.resnet import Bottleneck
from torch import nn

import domain_attention
from domain_attention import DomainAttention, insert_attention, residual_blocks

ARGS = domain_attention.Args(backbone="resnet50")


def own_name(key: str) -> str:
    """SE_Layers.2.fc.0.bias -> adapters.2.0.bias, fc_1.weight -> assignment.weight"""
    key = key.replace("SE_Layers.", "adapters.").replace(".fc.", ".")
    return key.replace("fc_1.", "assignment.").replace("domain_attention.", "se.")


def weights(tensors: dict, prefix: str) -> dict:
    """The recorded weights of a module, by our names."""
    prefix += ".weights."
    keys = [key for key in tensors if key.startswith(prefix)]
    return {own_name(key.removeprefix(prefix)): tensors[key] for key in keys}


def recorded_names(tensors: dict, name: str) -> list[str]:
    """The recorded names of the weights of a module."""
    prefix = f"{name}.weights."
    return [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]


@pytest.mark.parametrize("name", ["module", "module_n1", "module_fixed"])
def test_adapters_and_what_mixes_them(name):
    tensors, record = case("domain_attention")
    channels, reduction = (record["config"][key] for key in ("channels", "reduction"))
    module = DomainAttention(channels, record["results"][name]["num_se_layers"])
    state = weights(tensors, name)
    if name == "module_fixed":  # what would mix is not used, and has the shape of a bank
        state = {key: t for key, t in state.items() if not key.startswith("assignment.")}
        state |= {f"assignment.{k}": t for k, t in module.assignment.state_dict().items()}
    module.load_state_dict(state)
    assert module.adapters[0][0].out_features == channels // reduction
    x = tensors[f"{name}.input"].requires_grad_()
    mixture, adapters = module.mixture(x)
    check(f"{name}: adapters", adapters, tensors[f"{name}.adapters"])
    if name != "module_fixed":
        check(f"{name}: assignment", mixture, tensors[f"{name}.assignment"])
    output = module(x)
    check(f"{name}: output", output, tensors[f"{name}.output"])
    output.backward(tensors[f"{name}.cotangent"])
    check(f"{name}: gradient of the input", x.grad, tensors[f"{name}.grad_input"], 1e-3)
    prefix = f"{name}.grad."
    official = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    own = dict(module.named_parameters())
    ours = {key: own[own_name(key)] for key in official}
    check_gradients(f"{name}: gradients", ours, official)
    unused = set(record["results"][name]["unused_parameters"])
    assert official.keys() | unused == set(recorded_names(tensors, name))


@pytest.mark.parametrize("name, stride", [("bottleneck", 1), ("bottleneck_down", 2)])
def test_place_of_attention_in_a_bottleneck_of_timm(name, stride):
    tensors, record = case("domain_attention")
    state = weights(tensors, name)
    planes = record["config"]["bottleneck_planes"]
    channels = tensors[f"{name}.input"].shape[1]
    downsample = None
    if any(key.startswith("downsample.") for key in state):
        conv = nn.Conv2d(channels, 4 * planes, 1, stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))
    block = Bottleneck(channels, planes, stride, downsample)
    first = nn.Sequential(Bottleneck(4 * planes, planes))  # a stage without a bank
    body = nn.Sequential(OrderedDict(layer1=first, layer2=nn.Sequential(block)))
    insert_attention(ARGS, body, record["config"]["num_adapters"])
    missing, surplus = block.load_state_dict(state, strict=False)
    assert not surplus and all(key.endswith("num_batches_tracked") for key in missing)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = record["config"]["bn_eps"]
    seen = {}
    block.se.register_forward_hook(lambda m, given, y: seen.update(given=given[0], y=y.clone()))
    block.bn3.register_forward_hook(lambda m, given, y: seen.update(normed=y.clone()))
    x = tensors[f"{name}.input"].requires_grad_()
    output = block.eval()(x)
    check(f"{name}: into the attention", seen["given"], tensors[f"{name}.attention_input"])
    check(f"{name}: out of the last norm", seen["normed"], tensors[f"{name}.attention_input"])
    check(f"{name}: out of the attention", seen["y"], tensors[f"{name}.attention_output"])
    check(f"{name}: output", output, tensors[f"{name}.output"])
    output.backward(tensors[f"{name}.cotangent"])
    check(f"{name}: gradient of the input", x.grad, tensors[f"{name}.grad_input"], 1e-3)


@pytest.mark.parametrize("less_blocks", [False, True])
@pytest.mark.parametrize("depth", [50, 101])
def test_blocks_with_a_bank(depth, less_blocks):
    """As the official constructor has them with its default, which fixes one stage."""
    _, record = case("domain_attention")
    name = f"depth{depth}.fixed_blocks1.less_blocks_{less_blocks}"
    official = record["attention_blocks"][name]
    with torch.device("meta"):
        body = timm.create_model(f"resnet{depth}", features_only=True)
        stages = residual_blocks(body)
        args = domain_attention.Args(backbone=f"resnet{depth}", less_blocks=less_blocks)
        insert_attention(args, body, 3)
    ours = [[int(len(block.se.adapters) == 3) for block in stage] for stage in stages]
    assert ours == [official[f"layer{i}"] for i in range(1, 5)]


def test_as_many_adapters_as_datasets():
    _, record = case("domain_attention")
    recorded = record["results"]["num_adapters_0"]
    sizes = recorded["num_classes"]
    vocabularies = [
        domain_attention.Vocabulary(str(k), tuple(map(str, range(n)))) for k, n in enumerate(sizes)
    ]
    args = domain_attention.Args(backbone="resnet10t", channels=32, fc_dim=8)
    space = domain_attention.build_label_space(args, vocabularies)
    model = domain_attention.Model(args, space, pretrained=False)
    assert len(model.backbone.body.layer2[0].se.adapters) == recorded["num_se_layers"]
