"""Official checkpoints of Mask2Former: every model of its zoo loads, trains on, and is evaluated.

The tensors have the official names and shapes and random values.
"""

import json
import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
from parity import listings, without_data
from PIL import Image
from torch import nn
from torch.nn import functional as F

import dataseg
import lmseg
from benchmarks.mask2former_layouts import COUNTERS, ZOO, layout, settings
from common.backbone import Backbone
from common.batch import Sample, collate
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

BASE_KEYS = "mask2former_r50_state_dict_keys.json"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "converted"
    shutil.rmtree(tmp_path, ignore_errors=True)  # pytest would keep these files of 100 MB


class Base(nn.Module):
    """The attributes of a segmenter that its official weights fill, and one that they do not."""

    def __init__(
        self,
        channels: int = 256,
        queries: int = 100,
        layers: int = 9,
        encoder_layers: int = 6,
        backbone: str = "resnet50",
    ):
        super().__init__()
        self.backbone = Backbone(backbone, 0, pretrained=False, strides=[4, 8, 16, 32])
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


@pytest.mark.parametrize("listing", listings(BASE_KEYS))
def test_every_tensor_of_mask2former_has_its_place_and_shape(listing):
    official = without_data(listing)
    dropped = {key for key in official if rename(key, MASK2FORMER) is None}
    constants = {key for key in official if key.endswith(".relative_position_index")}
    assert dropped == {"criterion.empty_weight"} | constants
    assert len({rename(key, MASK2FORMER) for key in official} - {None}) == len(official) - len(
        dropped
    )
    tensors, metadata = convert_mask2former_base(official)
    backbone = metadata["args"].pop("backbone")
    assert backbone in TIMM.values()
    with torch.device("meta"):
        own = Base(backbone=backbone).state_dict()
    assert {key: t.shape for key, t in tensors.items()} == {
        key: t.shape for key, t in own.items() if not key.startswith("text")
    }
    sizes = {"queries": 100, "channels": 256, "encoder_layers": 6, "decoder_layers": 9}
    assert metadata["args"] == sizes


# -- tensors of the official names and shapes ------------------------------------------------------


def official_tensors(device: str = "cpu", **given) -> dict:
    """Random values in the official shapes."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in layout(**given).items():
        kind = name.rpartition(".")[2]
        tensors[name] = torch.zeros(shape, device=device)
        if device == "cpu" and kind == "running_var":
            tensors[name].fill_(1.0)
        elif device == "cpu" and kind not in COUNTERS:
            tensors[name].normal_(std=0.05)
    return tensors


@pytest.mark.parametrize("listing", listings(BASE_KEYS))
def test_the_synthetic_layout_is_the_official_one(listing):
    shapes = {name: tuple(facts["shape"]) for name, facts in listing.items()}
    classes = len(range(shapes["criterion.empty_weight"][0])) - 1
    trained = any(name.endswith(COUNTERS[2]) for name in shapes)
    assert shapes in [layout(backbone, classes, trained=trained) for backbone in TIMM]


# -- the zoo ---------------------------------------------------------------------------------------

MODELS = {}  # {name: settings} of those that differ
OF_IMAGES = {task: models for task, models in ZOO.items() if not task.endswith("video")}
for task, backbones in OF_IMAGES.items():
    for backbone in backbones:
        found = settings(task, backbone)
        if found not in MODELS.values():
            MODELS[f"{task} {backbone}"] = found
TIMM = {"R50": "resnet50", "R101": "resnet101"}
TIMM |= {name: f"swin_{name}_patch4_window7_224" for name in ("tiny", "small")}
TIMM |= {name: f"swin_{name}_patch4_window12_384" for name in ("base", "large")}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_zoo_is_known_by_its_tensors(name):
    """All tensors have their place, and none of the model is missing."""
    backbone, classes, queries, trained = MODELS[name].values()
    tensors, metadata = convert_mask2former(official_tensors("meta", **MODELS[name]))
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
    given = dict(zip(("backbone", "classes", "queries"), model))
    _, metadata = convert_mask2former(official_tensors("meta", **given, small=True))
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
            ["'backbone.cls_token'", "docs/official-weights.md"],
        ),
        (
            {
                "sem_seg_head.predictor.query_feat.weight": torch.ones(3, 8),
                "sem_seg_head.predictor.class_embed.weight": torch.ones(3, 8),
                "sem_seg_head.predictor.class_embed.bias": torch.ones(3),
                "backbone.layers.0.blocks.0.norm1.weight": torch.ones(96),
            },
            ["their backbone is of no known kind or depth", "Swin"],
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


# -- inference with the own class head -------------------------------------------------------------


def saved(folder, name: str, classes: int, **given):
    """The file of a ResNet-50 with small decoders and random weights. Its class head is sure."""
    tensors = official_tensors(backbone="R50", classes=classes, small=True, **given)
    tensors["sem_seg_head.predictor.class_embed.weight"] *= 100
    file = folder / name
    torch.save({"model": tensors}, file)
    return file


def restored(logits, padded, size, original):
    """Masks in the size of the file: to the padded input, cut, to the file."""
    full = F.interpolate(logits[None], padded, mode="bilinear", align_corners=False)
    cut = full[..., : size[0], : size[1]]
    return F.interpolate(cut, original, mode="bilinear", align_corners=False)[0]


def official_panoptic(p, masks, things, object_threshold: float):
    """MaskFormer.panoptic_inference, written from its description: {(class, thing): pixels}."""
    scores, labels = p.max(1)
    kept = (labels < p.shape[1] - 1) & (scores > object_threshold)
    scores, labels, masks = scores[kept], labels[kept], masks[kept].sigmoid()
    winner = (scores[:, None, None] * masks).argmax(0)
    segments, stuff = [], {}
    for query, label in enumerate(labels.tolist()):
        won, inside = winner == query, masks[query] >= 0.5
        both = won & inside
        if not both.any() or won.sum() / inside.sum() < 0.8:
            continue
        if not things[label] and label in stuff:
            stuff[label] |= both
            continue
        segments.append((label, both))
        if not things[label]:
            stuff[label] = both
    return segments


def official_instances(p, masks, top: int = 100) -> list[tuple[int, int, float]]:
    """MaskFormer.instance_inference: (class, pixels, score) of the `top` pairs."""
    scores, pairs = p[:, :-1].flatten().topk(top)
    found = []
    for score, pair in zip(scores.tolist(), pairs.tolist()):
        mask = masks[pair // (p.shape[1] - 1)]
        inside = (mask > 0).float()
        quality = (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
        found.append((pair % (p.shape[1] - 1), int(inside.sum()), score * float(quality)))
    return found


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """{classes: (model, label space)} of official weights, as `lmseg.load` gives them."""
    folder, models = tmp_path_factory.mktemp("heads"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCORD_CACHE", str(folder))
        for classes in (150, 133, 80):
            models[classes] = lmseg.load(saved(folder, f"{classes}.pth", classes))
    shutil.rmtree(folder)
    return models


@pytest.fixture
def predicted(heads, monkeypatch):
    """predicted(classes, dataset, task): lmseg's prediction for an output of sure queries.

    Returns it with the class probabilities, the masks (40, 16, 24), and the label space. The image
    has 60 x 90 pixels, 64 x 96 with its padding, and 75 x 110 in its file.
    """

    def start(classes: int, dataset: str, task: str):
        model, label_space = heads[classes]
        torch.manual_seed(2)
        masks = F.interpolate(8 * torch.randn(1, 40, 4, 6), (16, 24), mode="bilinear")
        for query in range(24):  # a cell of 4 x 4 each; the others overlap with several
            top, left = 4 * (query // 6), 4 * (query % 6)
            masks[0, query] -= 30
            masks[0, query, top : top + 4, left : left + 4] += 40
        logits = torch.randn(1, 1, 40, classes + 1)
        sure = torch.randint(0, 12, (30,)) * (classes // 12)  # some share a class
        logits[0, 0, range(30), sure] += 9 + torch.rand(30)
        output = lmseg.MaskOutput(logits, torch.eye(40)[None, None], masks)
        monkeypatch.setattr(model, "forward", lambda *_: output)
        image = torch.zeros(3, 60, 90, dtype=torch.uint8)
        batch = collate([Sample.unlabelled(image, dataset, 0, 0)])
        batch.samples[0].original_size = (75, 110)
        space = label_space.swap(dataset)
        (found,) = lmseg.predict(model, batch, space, task)
        return found, logits[0, 0].softmax(-1), masks[0], space

    return start


def test_semantic_inference_is_the_official_one(predicted):
    """A model of semantic maps alone resizes the class scores, not the masks."""
    found, p, masks, _ = predicted(150, "ade20k", "semantic")
    full = F.interpolate(masks[None], (64, 96), mode="bilinear", align_corners=False)[0]
    scores = torch.einsum("qc,qhw->chw", p[:, :-1], full.sigmoid())[:, :60, :90]
    scores = F.interpolate(scores[None], (75, 110), mode="bilinear", align_corners=False)[0]
    assert torch.equal(found["semantic"].long(), scores.argmax(0))
    assert len(found["semantic"].unique()) > 3


@pytest.mark.parametrize("classes, dataset", [(150, "ade20k-panoptic"), (133, "coco-panoptic")])
def test_panoptic_inference_is_the_official_one(classes, dataset, predicted):
    found, p, masks, space = predicted(classes, dataset, "panoptic, things")
    masks = restored(masks, (64, 96), (60, 90), (75, 110))
    scores = torch.einsum("qc,qhw->chw", p[:, :-1], masks.sigmoid())
    assert torch.equal(found["semantic"].long(), scores.argmax(0))
    expected = official_panoptic(p, masks, space.is_thing, 0.8)
    assert len(expected) > 2
    assert {space.is_thing[label] for label, _ in expected} == {True, False}
    rows = zip(found["segments_info"], expected, strict=True)
    for info, (label, pixels) in rows:
        assert info["label"] == label and info["isthing"] == space.is_thing[label]
        assert torch.equal(found["panoptic"] == info["id"], pixels)
    things = [row for row in official_instances(p, masks) if space.is_thing[row[0]]]
    assert_same_instances(found["things"], things)


def test_instance_inference_is_the_official_one(predicted):
    found, p, masks, _ = predicted(80, "coco", "instance")
    masks = restored(masks, (64, 96), (60, 90), (75, 110))
    assert_same_instances(found, official_instances(p, masks))
    assert len(found["scores"]) == 100


def assert_same_instances(found: dict, expected: list) -> None:
    areas = found["masks"].flatten(1).sum(1).tolist()
    rows = sorted(zip(found["labels"].tolist(), areas, found["scores"].tolist()))
    for row, other in zip(rows, sorted(expected), strict=True):
        assert row[:2] == other[:2] and row[2] == pytest.approx(other[2], rel=1e-4, abs=1e-7)


def test_a_head_serves_both_datasets_of_its_classes(heads):
    model, label_space = heads[150]
    assert label_space.datasets == ["ade20k", "ade20k-panoptic"]
    one, other = (layer.state_dict() for layer in model.heads.layers)
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(InputError, match="name one of them as --vocabulary: ade20k, ade20k-pan"):
        predicted_all = label_space.swap("")
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [(32, 32)], predicted_all)


# -- the command -----------------------------------------------------------------------------------


def write_panoptic(root) -> None:
    """Two images in COCO's layout, each a thing on stuff, as panoptic segments and instances."""
    known = Vocabulary.known("coco-panoptic")
    thing, stuff = known.ids[known.names.index("cat")], known.ids[known.names.index("grass-merged")]
    rows = zip(known.ids, known.names, known.is_thing)
    categories = [{"id": id, "name": name, "isthing": int(thing)} for id, name, thing in rows]
    folder = root / "coco" / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True)
    (root / "coco" / "val2017").mkdir()
    images, annotations, instances = [], [], []
    for number in (1, 2):
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[..., 0] = 1
        pixels[8:40, 8 : 8 + 30 * number, 0] = 2
        Image.fromarray(pixels).save(folder / f"{number:012}.png")
        Image.fromarray(pixels * 60).save(root / "coco" / "val2017" / f"{number:012}.jpg")
        name = f"{number:012}.jpg"
        images.append({"id": number, "file_name": name, "height": 64, "width": 96})
        box = [8, 8, 30 * number, 32]
        part = {"id": 2, "category_id": thing, "bbox": box, "area": 960 * number, "iscrowd": 0}
        whole = part | {"id": 1, "category_id": stuff}
        entry = {"image_id": number, "file_name": f"{number:012}.png"}
        annotations.append(entry | {"segments_info": [whole, part]})
        x, y, width, height = box
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        instances.append(part | {"id": number, "image_id": number, "segmentation": [corners]})
    record = {"images": images, "annotations": annotations, "categories": categories}
    (folder.parent / "panoptic_val2017.json").write_text(json.dumps(record))
    things = [category for category in categories if category["isthing"]]
    record |= {"annotations": instances, "categories": things}
    (folder.parent / "instances_val2017.json").write_text(json.dumps(record))


def evaluate(weights, dataset: str, root, output, call, *flags) -> dict:
    """The results of the documented command."""
    given = ["--eval-only", "--weights", weights, "--eval-datasets", dataset, "--data-root", root]
    call(*given, "--output", output, "--device", "cpu", "--workers", 0, *flags, method="lmseg")
    return json.loads((output / "results.json").read_text())[dataset]


def test_the_command_evaluates_a_panoptic_and_an_instance_model(tmp_path, call, caplog):
    write_panoptic(tmp_path)
    panoptic = saved(tmp_path, "panoptic.pkl", 133)
    arrays = {key: t.numpy() for key, t in torch.load(panoptic)["model"].items()}
    panoptic.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"}))
    small = ("--image-size", "64")
    with caplog.at_level(logging.INFO):
        found = evaluate(panoptic, "coco-panoptic", tmp_path, tmp_path / "a", call, *small)
    kinds = {"PQ", "SQ", "RQ", "PQ things", "PQ stuff", "mIoU", "AP things"}
    assert found.keys() == kinds
    assert "AP of things with the 2 masks of" in caplog.text
    assert "instances_val2017.json" in caplog.text
    instance = saved(tmp_path, "instance.pth", 80)
    found = evaluate(instance, "coco", tmp_path, tmp_path / "b", call, *small)
    assert {"AP", "mask AP"} <= found.keys()


def test_the_command_says_what_is_missing(tmp_path, fails, tiny_root):
    file = saved(tmp_path, "a.pth", 133)
    given = ["--eval-only", "--weights", file, "--output", tmp_path / "run", "--device", "cpu"]
    given += ["--data-root", tiny_root]
    line = fails(*given, "--eval-datasets", "ade20k", method="lmseg")
    assert "knows no dataset 'ade20k'; it was trained on coco-panoptic" in line
    assert "no dataset named" in fails(*given, method="lmseg")
    given += ["--eval-datasets", "coco-panoptic", "--classifier", "text"]
    given += ["--text-encoder", "minilm", "--prompts", "name"]
    line = fails(*given, method="lmseg")
    assert "tensor 'adapter.0.bias' is missing for this model" in line


def test_trained_norm_is_that_of_all_gpus(monkeypatch):
    class Flag:
        is_cuda = True

        def __bool__(self):
            return self.frozen

    backbone = Backbone("resnet18", 0, pretrained=False, strides=[4, 8, 16, 32])
    del backbone.frozen_norm
    backbone.frozen_norm = Flag()
    kinds = []
    for ranks, backbone.frozen_norm.frozen in ((1, False), (2, True), (2, False)):
        monkeypatch.setattr("common.backbone.world_size", lambda ranks=ranks: ranks)
        kinds.append(type(backbone.train().body.bn1).__name__)
    assert kinds == ["BatchNorm2d", "BatchNorm2d", "SyncBatchNorm"]


@pytest.mark.parametrize("method, trained", [(lmseg, False), (dataseg, True)])
def test_a_training_starts_from_the_base(method, trained, tmp_path, call, tiny_root, caplog):
    """With text as the classifier; BatchNorm stays frozen unless it was trained (SyncBN)."""
    file = saved(tmp_path, "a.pth", 133, trained=trained)
    given = ["--datasets", "coco-panoptic", "--data-root", tiny_root, "--weights", file]
    given += ["--output", tmp_path / "run", "--device", "cpu", "--workers", 0, "--steps", 0]
    given += ["--text-encoder", "minilm", "--prompts", "name", "--image-size", 32]
    given += ["--eval-datasets", "coco-panoptic"]
    given += ["--context-tokens", 0] if method is lmseg else ["--test-size", 32]
    with caplog.at_level(logging.INFO):
        call(*given, method=method.METHOD)
    assert "are not in it and start anew" in caplog.text
    model, _ = method.load(tmp_path / "run")
    assert (model.args.backbone, model.args.queries, model.args.channels) == ("resnet50", 100, 32)
    assert bool(model.backbone.frozen_norm) == (not trained)
    official = torch.load(file)["model"]["backbone.res4.5.conv2.weight"]
    assert torch.equal(model.backbone.body.layer3[5].conv2.weight, official)
    if method is lmseg:
        assert model.args.classifier == "text" and model.args.panoptic_rule == "maskformer"
