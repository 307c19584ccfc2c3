"""Official checkpoints of Mask2Former: every model of its zoo loads, trains on, and is evaluated.

The tensors have the official names and shapes and random values.
"""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from parity import FOLDER
from torch import nn

import dataseg
import lmseg
from common.backbone import Backbone
from common.checkpoint import load_weights, read_metadata, read_model
from common.convert import convert_if_official, rename
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.official_mask2former import (
    HEADS,
    MASK2FORMER,
    convert_mask2former,
    convert_mask2former_base,
)
from common.pixel_decoder import PixelDecoder
from common.transformer import DecoderLayer, QueryHead

BASE_KEYS = FOLDER / "mask2former_r50_state_dict_keys.json"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


class Base(nn.Module):
    """The attributes of a segmenter that its official weights fill, and one that they do not."""

    def __init__(
        self, channels: int = 256, queries: int = 100, layers: int = 9, encoder_layers: int = 6
    ):
        super().__init__()
        self.backbone = Backbone("resnet50", 0, pretrained=False, strides=[4, 8, 16, 32])
        self.pixel_decoder = PixelDecoder(self.backbone.channels, channels, encoder_layers)
        self.layers = nn.ModuleList(DecoderLayer(channels) for _ in range(layers))
        self.head = QueryHead(channels)
        self.query_feat, self.query_embed = (
            nn.Parameter(torch.randn(queries, channels)) for _ in range(2)
        )
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.text_adapter = nn.Linear(7, channels)
        self.register_buffer("text_scale", torch.randn(5, 7))


def mask2former_name(key: str, old: bool) -> str:
    """Written from the official key list: our key -> theirs. old: as in the first version."""
    kind, *rest = key.split(".")
    leaf = ".".join(rest)
    if kind == "backbone":
        if rest[1] in ("conv1", "bn1"):
            return "backbone.stem.conv1." + ("norm." if rest[1] == "bn1" else "") + rest[-1]
        _, layer, block, part, *tail = rest
        stage = f"backbone.res{int(layer.removeprefix('layer')) + 1}.{block}."
        if part == "downsample":
            return f"{stage}shortcut.{'norm.' if tail[0] == '1' else ''}{tail[-1]}"
        return f"{stage}conv{part[-1]}.{'norm.' if part.startswith('bn') else ''}{tail[-1]}"
    if kind == "pixel_decoder":
        for ours, theirs in [("lateral", "adapter_1"), ("output", "layer_1")]:
            if rest[0] == ours:
                leaf = f"{theirs}.{'norm.' if rest[1] == '1' else ''}{rest[-1]}"
        nested = {"layers": f"transformer.encoder.{leaf}", "level_embed": "transformer.level_embed"}
        return f"sem_seg_head.{'' if old else 'pixel_decoder.'}{nested.get(rest[0], leaf)}"
    predictor = "sem_seg_head." + ("" if old else "predictor.")
    if kind == "layers":
        number, part, *tail = rest
        name, _, end = part.partition("_")
        kinds = {"cross": "cross_attention", "self": "self_attention"}
        if end == "attn":
            part = {"cross": "multihead_attn", "self": "self_attn"}[name]
        part = "norm" if end == "norm" else part
        layer = f"{predictor}transformer_{kinds.get(name, 'ffn')}_layers.{number}"
        return ".".join([layer, part, *tail])
    if kind == "head":
        if rest[0] == "mask_embed":
            return f"{predictor}mask_embed.layers.{int(rest[1]) // 2}.{rest[2]}"
        return predictor + leaf
    return predictor + ("static_query" if old and kind == "query_feat" else kind) + ".weight"


def official_base(model: Base, old: bool = False) -> dict[str, torch.Tensor]:
    own = {key: t for key, t in model.state_dict().items() if not key.startswith("text")}
    leave = ("frozen_norm", "num_batches_tracked")
    official = {mask2former_name(key, old): t for key, t in own.items() if not key.endswith(leave)}
    predictor = "sem_seg_head." + ("" if old else "predictor.")
    channels = len(model.query_feat[0])
    official[f"{predictor}class_embed.weight"] = torch.ones(3, channels)
    official[f"{predictor}class_embed.bias"] = torch.ones(3)
    return official | {"criterion.empty_weight": torch.ones(3)}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = Base(channels=32, queries=5, layers=2, encoder_layers=1)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_() if not key.endswith("running_var") else tensor.uniform_(0.9, 1.1)
    return model


@pytest.mark.skipif(
    not BASE_KEYS.is_file(), reason=f"no {BASE_KEYS.name}; CONCORD_PARITY names its folder"
)
@pytest.mark.parametrize("number", [0, 1])
def test_every_tensor_of_mask2former_has_its_place_and_shape(number):
    listing = list(json.loads(BASE_KEYS.read_text()).values())[number]
    official = {key: torch.empty(facts["shape"], device="meta") for key, facts in listing.items()}
    dropped = {key for key in official if rename(key, MASK2FORMER) is None}
    assert dropped == {"criterion.empty_weight"}
    assert len({rename(key, MASK2FORMER) for key in official} - {None}) == len(official) - len(
        dropped
    )
    tensors, metadata = convert_mask2former_base(official)
    with torch.device("meta"):
        own = Base().state_dict()
    assert {key: t.shape for key, t in tensors.items()} == {
        key: t.shape for key, t in own.items() if not key.startswith("text")
    }
    sizes = {"queries": 100, "channels": 256, "encoder_layers": 6, "decoder_layers": 9}
    assert metadata["args"] == {"backbone": "resnet50", **sizes}


# -- the official layout, from the definitions of its modules --------------------------------------

COUNTED = ("running_mean", "running_var", "num_batches_tracked")
SWINS = {"tiny": (96, 6, 7), "small": (96, 18, 7), "base": (128, 18, 12), "large": (192, 18, 12)}


def linear(name: str, out: int, *inputs: int) -> dict:
    """Shapes of a layer with a bias; inputs: the other sides of its weight."""
    return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int, trained: bool) -> dict:
    """FrozenBatchNorm2d has no counter, SyncBatchNorm has one."""
    shapes = norm(name, width) | {f"{name}.{kind}": (width,) for kind in COUNTED[:2]}
    return shapes | ({f"{name}.{COUNTED[2]}": ()} if trained else {})


def resnet(blocks: int, trained: bool) -> dict:
    """detectron2's ResNet with `blocks` in res4: 6 in ResNet-50, 23 in ResNet-101."""
    shapes = {"stem.conv1.weight": (64, 3, 7, 7)} | batch_norm("stem.conv1.norm", 64, trained)
    entering = 64
    for stage, count in zip(range(2, 6), (3, 4, blocks, 3)):
        width = 2 ** (stage + 4)
        for block in range(count):
            name = f"res{stage}.{block}"
            sides = {"conv1": (width, entering, 1, 1), "conv2": (width, width, 3, 3)}
            sides["conv3"] = (4 * width, width, 1, 1)
            if not block:
                sides["shortcut"] = (4 * width, entering, 1, 1)
            for conv, shape in sides.items():
                shapes[f"{name}.{conv}.weight"] = shape
                shapes |= batch_norm(f"{name}.{conv}.norm", shape[0], trained)
            entering = 4 * width
    return shapes


def swin(size: str) -> dict:
    """D2SwinTransformer; the third stage has 6 or 18 blocks."""
    dim, third, window = SWINS[size]
    shapes = linear("patch_embed.proj", dim, 3, 4, 4) | norm("patch_embed.norm", dim)
    for stage, count in enumerate((2, 2, third, 2)):
        width = dim * 2**stage
        for block in range(count):
            name = f"layers.{stage}.blocks.{block}"
            heads = width // 32
            shapes |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            shapes |= linear(f"{name}.attn.qkv", 3 * width, width)
            shapes |= linear(f"{name}.attn.proj", width, width)
            shapes |= linear(f"{name}.mlp.fc1", 4 * width, width)
            shapes |= linear(f"{name}.mlp.fc2", width, 4 * width)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
        if stage < 3:
            shapes |= norm(f"layers.{stage}.downsample.norm", 4 * width)
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
        shapes |= norm(f"norm{stage}", width)
    return shapes


def pixel_decoder(widths: list[int], c: int, layers: int) -> dict:
    """MSDeformAttnPixelDecoder. widths: of res2 to res5"""
    shapes = {"transformer.level_embed": (3, c)}
    for i, width in enumerate(reversed(widths[1:])):
        shapes |= linear(f"input_proj.{i}.0", c, width, 1, 1) | norm(f"input_proj.{i}.1", c)
    for i in range(layers):
        name = f"transformer.encoder.layers.{i}"
        shapes |= linear(f"{name}.self_attn.sampling_offsets", 192, c)
        shapes |= linear(f"{name}.self_attn.attention_weights", 96, c)
        shapes |= linear(f"{name}.self_attn.value_proj", c, c)
        shapes |= linear(f"{name}.self_attn.output_proj", c, c)
        shapes |= norm(f"{name}.norm1", c) | norm(f"{name}.norm2", c)
        shapes |= linear(f"{name}.linear1", 4 * c, c) | linear(f"{name}.linear2", c, 4 * c)
    shapes |= linear("mask_features", c, c, 1, 1)
    shapes |= {"adapter_1.weight": (c, widths[0], 1, 1), "layer_1.weight": (c, c, 3, 3)}
    return shapes | norm("adapter_1.norm", c) | norm("layer_1.norm", c)


def predictor(classes: int, queries: int, c: int, layers: int) -> dict:
    """MultiScaleMaskedTransformerDecoder."""
    shapes = norm("decoder_norm", c) | linear("class_embed", classes + 1, c)
    for table, rows in (("query_feat", queries), ("query_embed", queries), ("level_embed", 3)):
        shapes[f"{table}.weight"] = (rows, c)
    for i in range(3):
        shapes |= linear(f"mask_embed.layers.{i}", c, c)
    for i in range(layers):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"transformer_{kind}_attention_layers.{i}"
            inside = {"in_proj_weight": (3 * c, c), "in_proj_bias": (3 * c,)}
            shapes |= {f"{name}.{attention}.{key}": shape for key, shape in inside.items()}
            shapes |= linear(f"{name}.{attention}.out_proj", c, c) | norm(f"{name}.norm", c)
        name = f"transformer_ffn_layers.{i}"
        shapes |= linear(f"{name}.linear1", 8 * c, c) | linear(f"{name}.linear2", c, 8 * c)
        shapes |= norm(f"{name}.norm", c)
    return shapes


def official_shapes(
    backbone: str, classes: int, queries: int = 100, trained: bool = False, small: bool = False
) -> dict:
    """{official name: shape} of a model of the zoo. small: with decoders of 32 channels."""
    c, encoder_layers, layers = (32, 1, 2) if small else (256, 6, 9)
    if backbone in SWINS:
        body = swin(backbone)
        widths = [SWINS[backbone][0] * 2**stage for stage in range(4)]
    else:
        body = resnet({"R50": 6, "R101": 23}[backbone], trained)
        widths = [256, 512, 1024, 2048]
    head = "sem_seg_head."
    shapes = {f"backbone.{name}": shape for name, shape in body.items()}
    decoder = pixel_decoder(widths, c, encoder_layers)
    shapes |= {f"{head}pixel_decoder.{name}": shape for name, shape in decoder.items()}
    queried = predictor(classes, queries, c, layers)
    shapes |= {f"{head}predictor.{name}": shape for name, shape in queried.items()}
    return shapes | {"criterion.empty_weight": (classes + 1,)}


def official_tensors(device: str = "cpu", **settings) -> dict:
    """Random values in the official shapes."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in official_shapes(**settings).items():
        kind = name.rpartition(".")[2]
        tensors[name] = torch.zeros(shape, device=device)
        if device == "cpu" and kind == "running_var":
            tensors[name].fill_(1.0)
        elif device == "cpu" and kind not in COUNTED:
            tensors[name].normal_(std=0.05)
    return tensors


@pytest.mark.skipif(
    not BASE_KEYS.is_file(), reason=f"no {BASE_KEYS.name}; CONCORD_PARITY names its folder"
)
@pytest.mark.parametrize("number", [0, 1])
def test_the_synthetic_layout_is_the_official_one(number):
    listing = list(json.loads(BASE_KEYS.read_text()).values())[number]
    shapes = {name: tuple(facts["shape"]) for name, facts in listing.items()}
    classes = len(range(shapes["criterion.empty_weight"][0])) - 1
    trained = any(name.endswith(COUNTED[2]) for name in shapes)
    assert official_shapes("R50", classes, trained=trained) == shapes


# -- the zoo ---------------------------------------------------------------------------------------

# backbone, classes, queries, whether BatchNorm is trained (SyncBN); MODEL_ZOO.md
ZOO = [("R50", 133, 100, False), ("R101", 133, 100, False), ("R50", 80, 100, False)]
ZOO += [("R101", 80, 100, False), ("R50", 150, 100, False), ("R101", 150, 100, True)]
ZOO += [("R50", 100, 100, False), ("R50", 65, 100, False)]
ZOO += [(name, classes, 100, True) for name in ("R50", "R101") for classes in (8, 19)]
ZOO += [("tiny", 133, 100, False), ("small", 80, 100, False), ("base", 133, 100, False)]
ZOO += [("large", 133, 200, False), ("large", 150, 100, False), ("large", 150, 200, False)]
ZOO += [("base", 150, 100, False), ("tiny", 150, 100, False), ("large", 65, 200, False)]
TIMM = {"R50": "resnet50", "R101": "resnet101"}
TIMM |= {name: f"swin_{name}_patch4_window7_224" for name in ("tiny", "small")}
TIMM |= {name: f"swin_{name}_patch4_window12_384" for name in ("base", "large")}


@pytest.mark.parametrize("backbone, classes, queries, trained", ZOO)
def test_every_model_of_the_zoo_is_known_by_its_tensors(backbone, classes, queries, trained):
    """All tensors have their place, and none of the model is missing."""
    settings = {"backbone": backbone, "classes": classes, "queries": queries, "trained": trained}
    tensors, metadata = convert_mask2former(official_tensors("meta", **settings))
    assert tensors.pop("backbone.frozen_norm") == (not trained)
    sizes = {"queries": queries, "channels": 256, "encoder_layers": 6, "decoder_layers": 9}
    assert metadata["args"] == {"backbone": TIMM[backbone], **sizes}
    _, datasets = HEADS[classes]
    assert tuple(metadata["vocabularies"]) == datasets
    assert {len(record["names"]) for record in metadata["vocabularies"].values()} == {classes}
    args = lmseg.Args(**metadata["args"] | metadata["own_head"])
    vocabularies = [
        Vocabulary(name, tuple(record["names"]))
        for name, record in metadata["vocabularies"].items()
    ]
    with torch.device("meta"):
        model = lmseg.Model(args, LabelSpace(vocabularies), pretrained=False)
    own = {key: t.shape for key, t in model.state_dict().items()}
    del own["backbone.frozen_norm"]
    assert {key: t.shape for key, t in tensors.items()} == own
    assert metadata["own_head"]["object_threshold"] == (0.0 if classes == 65 else 0.8)


SIZES = [  # of the official configurations: short and long side of test images
    (("R50", 133, 100), {"coco-panoptic": (800, 1333)}),
    (("R50", 80, 100), {"coco": (800, 1333)}),
    (("R50", 150, 100), {"ade20k": (512, 2048), "ade20k-panoptic": (640, 2560)}),
    (("tiny", 150, 100), {"ade20k": (512, 2048)}),
    (("base", 150, 100), {"ade20k": (640, 2560)}),
    (("large", 150, 100), {"ade20k": (640, 2560)}),
    (("large", 150, 200), {"ade20k-panoptic": (640, 2560)}),
    (("R50", 100, 100), {"ade20k-instances": (640, 2560)}),
    (("R50", 19, 100), {"cityscapes": (1024, 2048), "cityscapes-panoptic": (1024, 2048)}),
    (("R50", 8, 100), {"cityscapes-instances": (1024, 2048)}),
    (("R50", 65, 100), {"mapillary": (2048, 2048), "mapillary-panoptic": (2048, 2048)}),
]


@pytest.mark.parametrize("model, sizes", SIZES)
def test_test_sizes_are_the_official_ones(model, sizes):
    backbone, classes, queries = model
    settings = {"backbone": backbone, "classes": classes, "queries": queries}
    _, metadata = convert_mask2former(official_tensors("meta", **settings, small=True))
    args = lmseg.Args(**metadata["args"] | metadata["own_head"])
    for dataset, (short, longest) in sizes.items():
        transform = lmseg.test_transform(args, dataset)
        assert (transform.size, transform.longest) == (short, longest), dataset


# -- files -----------------------------------------------------------------------------------------


def pickled(protocol: int):
    def save(official: dict, path) -> None:
        arrays = {key: tensor.numpy() for key, tensor in official.items()}
        arrays["criterion.empty_weight"] = np.float32(0.1)  # a scalar
        first = "backbone.stem.conv1.weight"
        arrays[first] = np.asfortranarray(arrays[first])
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"}, protocol))

    return save


@pytest.mark.parametrize(
    "name, old, save",
    [
        (
            "new.pth",
            False,
            lambda official, path: torch.save({"model": official, "iteration": 3}, path),
        ),
        ("old.pth", True, torch.save),
        *((f"{protocol}.pkl", False, pickled(protocol)) for protocol in (2, 4, 5)),
    ],
)
def test_official_weights_are_the_base(name, old, save, tmp_path, base, caplog):
    save(official_base(base, old), tmp_path / name)
    twin = convert_if_official(tmp_path / name, "dataseg", convert_mask2former)
    metadata = read_metadata(twin, "dataseg")
    sizes = {"queries": 5, "channels": 32, "encoder_layers": 1, "decoder_layers": 2}
    assert metadata["args"] == {"backbone": "resnet50", **sizes}
    model = Base(channels=32, queries=5, layers=2, encoder_layers=1)
    before = {key: t.clone() for key, t in model.state_dict().items() if key.startswith("text")}
    with caplog.at_level(logging.INFO):
        load_weights(twin, model, base=True)
    assert (
        f"weights {twin}: 3 tensors of 'text_adapter.', 'text_scale' are not in it and start anew"
        in caplog.text
    )
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    for key, tensor in model.state_dict().items():
        expected = before.get(key, base.state_dict()[key])
        assert torch.equal(tensor, expected) or key in counters or key == "backbone.frozen_norm", (
            key
        )
    assert model.backbone.frozen_norm and not any(model.state_dict()[key] for key in counters)


@pytest.mark.parametrize("method", [dataseg, lmseg])
def test_base_alone_detects_nothing(method, tmp_path, base, caplog):
    """DaTaSeg has no use for a class head, LMSeg none for that of unknown classes."""
    torch.save(official_base(base), tmp_path / "official.pth")
    twin = convert_if_official(tmp_path / "official.pth", method.METHOD, method.OFFICIAL)
    with pytest.raises(
        InputError, match="a base model without classes: only a training can start from them"
    ):
        read_model(twin, method.METHOD)
    assert "2 classes are those of no known dataset: their head is left out" in caplog.text


def test_lost_tensor_of_the_base_is_named(tmp_path, base):
    official = official_base(base)
    del official["sem_seg_head.predictor.transformer_ffn_layers.1.linear2.bias"]
    torch.save(official, tmp_path / "official.pth")
    with pytest.raises(
        InputError, match=r"tensor 'layers\.1\.linear2\.bias' is missing for this model"
    ):
        load_weights(
            convert_if_official(tmp_path / "official.pth", "lmseg", convert_mask2former),
            Base(32, 5, 2, 1),
            base=True,
        )


@pytest.mark.parametrize(
    "content, words",
    [
        (
            {"backbone.cls_token": torch.ones(1)},
            ["'backbone.cls_token'", "Mask2Former (ResNet, Swin)"],
        ),
        (
            {
                "sem_seg_head.predictor.query_feat.weight": torch.ones(3, 8),
                "sem_seg_head.predictor.class_embed.weight": torch.ones(3, 8),
                "sem_seg_head.predictor.class_embed.bias": torch.ones(3),
                "backbone.layers.0.blocks.0.norm1.weight": torch.ones(96),
            },
            ["the depth of the backbone is that of no official model", "Swin-T"],
        ),
        (
            {"sem_seg_head.predictor.input_proj.0.weight": torch.ones(1)},
            ["'sem_seg_head.predictor.input_proj.0"],
        ),
        ({"criterion.empty_weight": torch.ones(1)}, ["'query_feat' is missing"]),
        ({"sem_seg_head.predictor.query_feat.weight": torch.ones(1)}, ["odd shapes"]),
    ],
)
def test_other_segmenters_are_refused(content, words, tmp_path, cache):
    torch.save(content, tmp_path / "official.pth")
    with pytest.raises(InputError) as error:
        convert_if_official(tmp_path / "official.pth", "lmseg", convert_mask2former)
    line = str(error.value)
    assert (
        "\n" not in line
        and all(word in line for word in ["official.pth", *words])
        and not cache.exists()
    ), line
