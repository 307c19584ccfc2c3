"""Parts of the two segmenters, and their whole base, against recordings of Mask2Former.

CONCORD_PARITY names the folder of recorded tensors. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error of each quantity.
"""

import numpy as np
import pytest
import torch
from parity import case, check, check_gradients, report  # noqa: F401 (report is a fixture)
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from common.backbone import Backbone
from common.checkpoint import load_weights
from common.convert import convert_if_official, rename
from common.official_mask2former import MASK2FORMER, convert_mask2former
from common.pixel_decoder import MSDeformAttn, PixelDecoder, pixel_centres, tokens
from common.point_matching import (
    hungarian,
    pairwise_bce,
    pairwise_dice,
    point_sample,
    uncertain_points,
)
from common.segments import instances, panoptic_map, restore, semantic_map
from common.transformer import DecoderLayer, QueryHead, blocked_pixels, sine_position


class Base(nn.Module):
    """What the segmenters share, put together as they do, with a classifier of fixed classes."""

    def __init__(self, queries, channels, heads, layers, ffn, classes, mask_channels):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, ffn) for _ in range(layers))
        self.head = QueryHead(channels)
        self.head.mask_embed[-1] = nn.Linear(channels, mask_channels)
        self.query_feat = nn.Parameter(torch.zeros(queries, channels))
        self.query_embed = nn.Parameter(torch.zeros(queries, channels))
        self.level_embed = nn.Parameter(torch.zeros(3, channels))
        self.class_embed = nn.Linear(channels, classes + 1)

    def forward(self, mask_features, maps):
        """Returns logits and masks before the first and after each layer, and the blocked pixels.

        mask_features: (B, C, h, w); maps: of strides 32, 16, 8
        """
        level_features = [F.interpolate(mask_features, m.shape[-2:], mode="bilinear") for m in maps]
        key_pos = [tokens(sine_position(*m.shape[-2:], m.shape[1])) for m in maps]
        memory = [tokens(m) + embed for m, embed in zip(maps, self.level_embed)]
        q = self.query_feat.expand(len(mask_features), -1, -1)
        z, mask_embed = self.head(q)
        outputs, all_blocked = [(z, mask_embed)], []
        for i, layer in enumerate(self.layers):
            level = i % len(maps)
            blocked = blocked_pixels(mask_embed, level_features[level])
            q = layer.cross_attend(q, self.query_embed, memory[level], key_pos[level], blocked)
            q = layer.self_attend(q, self.query_embed)
            q = layer.feed_forward(q)
            z, mask_embed = self.head(q)
            outputs.append((z, mask_embed))
            all_blocked.append(blocked)
        predictions = [
            (self.class_embed(z), torch.einsum("bqc,bchw->bqhw", m, mask_features))
            for z, m in outputs
        ]
        return predictions, all_blocked


def own_names(prefix: str, official: dict) -> dict:
    """Returns the tensors of a part under our names. Those of the classifier keep theirs."""
    names = {key: rename(f"sem_seg_head.{prefix}.{key}", MASK2FORMER) for key in official}
    names = {key: key if name.startswith("heads.") else name for key, name in names.items()}
    return {names[key].removeprefix("pixel_decoder."): tensor for key, tensor in official.items()}


def stored(tensors: dict, prefix: str) -> dict:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def check_norms(quantity: str, module: nn.Module, prefix: str, official: dict) -> None:
    """Checks the norms of the gradients of all parameters.

    Those that are 0 up to rounding are measured against the largest.
    """
    gradients = {name: p.grad for name, p in module.named_parameters()}
    norms = own_names(prefix, official)
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        check(quantity, gradients[name].norm(), norm, 1e-3, floor=1e-3 * max(norms.values()))


# -- pixel decoder ---------------------------------------------------------------------------------


def test_parity_pixel_decoder():
    tensors, record = case("mask2former_pixel_decoder")
    config = record["config"]
    decoder = PixelDecoder(
        list(config["in_channels"].values()),
        config["conv_dim"],
        config["enc_layers"],
        config["dim_feedforward"],
        config["nheads"],
        config["n_points"],
    )
    decoder.mask_features = nn.Conv2d(config["conv_dim"], config["mask_dim"], 1)
    decoder.load_state_dict(own_names("pixel_decoder", stored(tensors, "pixel_decoder.")))
    features = [tensors[f"features.{name}"].requires_grad_() for name in config["in_channels"]]
    mask_features, maps = decoder(features)
    check("pixel decoder: mask features", mask_features, tensors["out.mask_features"])
    total = (mask_features * tensors["cotangent.mask_features"]).sum()
    for i, ours in enumerate(maps):
        check("pixel decoder: memories", ours, tensors[f"out.multi_scale.{i}"])
        total = total + (ours * tensors[f"cotangent.multi_scale.{i}"]).sum()
        position = sine_position(*ours.shape[-2:], ours.shape[1])
        check("pixel decoder: position", position, tensors[f"position_embedding.{i}"])
    # (S, 2), the same for all levels
    centres = torch.cat([pixel_centres(*m.shape[-2:], "cpu") for m in maps])
    centres = centres[None, :, None].expand(-1, -1, len(maps), -1)
    check("pixel decoder: reference points", centres, tensors["reference_points"])
    total.backward()
    official = {key: tensors[f"grad.features.{key}"] for key in config["in_channels"]}
    check_gradients("pixel decoder: gradients", dict(zip(official, features)), official)
    check_norms("pixel decoder: gradient norms", decoder, "pixel_decoder", record["grad_norms"])


def test_parity_deformable_attention():
    """Neither reference boxes nor padding masks: Mask2Former uses none."""
    tensors, record = case("mask2former_pixel_decoder")
    config = record["config"]
    shapes = tuple(map(tuple, tensors["msda.module_in.spatial_shapes"].tolist()))
    attention = MSDeformAttn(config["conv_dim"], config["nheads"], len(shapes), config["n_points"])
    attention.load_state_dict(stored(tensors, "msda.module."))
    given = [
        tensors[f"msda.module_in.{name}"]
        for name in ("query", "input_flatten", "reference_points2")
    ]
    ours = attention(*given[:2], shapes, given[2])
    check("deformable attention", ours, tensors["msda.module_out.ref2"])


# -- transformer decoder ---------------------------------------------------------------------------


def test_parity_transformer_decoder():
    tensors, record = case("mask2former_decoder")
    config = record["config"]
    base = Base(
        config["num_queries"],
        config["hidden_dim"],
        config["nheads"],
        config["dec_layers"],
        config["dim_feedforward"],
        config["num_classes"],
        config["mask_dim"],
    )
    base.load_state_dict(own_names("predictor", stored(tensors, "predictor.")))
    mask_features = tensors["in.mask_features"].requires_grad_()
    maps = [tensors[f"in.multi_scale.{i}"].requires_grad_() for i in range(3)]
    predictions, blocked = base(mask_features, maps)
    total = 0
    for i, prediction in enumerate(predictions):
        for name, ours in zip(("pred_logits", "pred_masks"), prediction):
            check(f"transformer decoder: {name}", ours, tensors[f"out.layer{i}.{name}"])
            total = total + (ours * tensors[f"cotangent.layer{i}.{name}"]).sum()
    assert len(blocked) == config["dec_layers"]
    for i, ours in enumerate(blocked):
        # before the repair of rows that block all: none does
        official = tensors[f"out.attn_mask.{i}"].bool()
        assert torch.equal(ours, official) and not official.all(2).any()
    total.backward()
    official = {f"multi_scale.{i}": tensors[f"grad.multi_scale.{i}"] for i in range(3)}
    check_gradients("transformer decoder: gradients", dict(zip(official, maps)), official)
    check("transformer decoder: gradients", mask_features.grad, tensors["grad.mask_features"], 1e-3)
    check_norms("transformer decoder: gradient norms", base, "predictor", record["grad_norms"])


# -- matching and losses ---------------------------------------------------------------------------

LAYERS = {"final": "", "layer0": "_0", "layer1": "_1"}  # and the ends of their losses' names


@pytest.mark.parametrize("layer", LAYERS)
def test_parity_matching(layer):
    tensors, record = case("mask2former_loss")
    config = record["config"]
    for i in range(config["batch"]):
        logits, masks = (tensors[f"pred.{layer}.{kind}"][i] for kind in ("logits", "masks"))
        prefix = f"match.{layer}.image{i}."
        points = tensors[prefix + "point_coords"]
        labels, truth = tensors[f"target{i}.labels"], tensors[f"target{i}.masks"]
        sampled, target = point_sample(masks, points), point_sample(truth, points)
        cost = -config["cost_class"] * logits.softmax(-1)[:, labels]
        cost = cost + config["cost_mask"] * pairwise_bce(sampled, target)
        cost = cost + config["cost_dice"] * pairwise_dice(sampled, target)
        check("matching: cost", cost, tensors[prefix + "cost"])
        queries, columns = hungarian(cost)
        assert torch.equal(queries, tensors[prefix + "query"]) and torch.equal(
            columns, tensors[prefix + "target"]
        )


@pytest.mark.parametrize("layer, end", LAYERS.items())
def test_parity_losses(layer, end):
    tensors, record = case("mask2former_loss")
    config, official = record["config"], record["losses_unweighted"]
    logits, masks = (
        tensors[f"pred.{layer}.{kind}"].requires_grad_() for kind in ("logits", "masks")
    )
    labels = torch.full(logits.shape[:2], config["num_classes"])
    picked, truth = [], []
    for i in range(config["batch"]):
        queries, columns = (
            tensors[f"match.{layer}.image{i}.{kind}"] for kind in ("query", "target")
        )
        labels[i, queries] = tensors[f"target{i}.labels"][columns]
        picked.append(masks[i, queries])
        truth.append(tensors[f"target{i}.masks"][columns])
    picked, truth = torch.cat(picked), torch.cat(truth)
    candidates, random = (tensors[f"points.{layer}.{kind}"] for kind in ("candidates", "random"))
    points = uncertain_points(picked, config["num_points"], candidates, random)
    wanted = tensors[f"points.{layer}.coords"]
    for ours, theirs in zip(points, wanted, strict=True):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())  # the order is of no importance
    sampled, target = point_sample(picked, points), point_sample(truth, points)
    weight = torch.ones(config["num_classes"] + 1)
    weight[-1] = config["eos_coef"]
    probability = sampled.sigmoid()
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    bce = F.binary_cross_entropy_with_logits(sampled, target, reduction="none").mean(1)
    losses = {
        "loss_ce": F.cross_entropy(logits.transpose(1, 2), labels, weight),
        "loss_mask": bce.sum() / record["num_masks"],
        "loss_dice": dice.sum() / record["num_masks"],
    }
    for name, value in losses.items():
        check(f"losses: {name}", value, official[name + end])
    sum(record["loss_weights"][name + end] * value for name, value in losses.items()).backward()
    check("losses: gradients of logits", logits.grad, tensors[f"grad.{layer}.logits"], 1e-3)
    check("losses: gradients of masks", masks.grad, tensors[f"grad.{layer}.masks"], 1e-3)


# -- whole model -----------------------------------------------------------------------------------


def official_checkpoint(record: dict) -> dict:
    """The state dict that the recipe describes."""
    state = {}
    for key, recipe in record["weights"].items():
        if recipe.get("ignored"):
            state[key] = torch.tensor(0)
            continue
        draws = np.random.RandomState(recipe["seed"]).standard_normal(int(np.prod(recipe["shape"])))
        values = (recipe["offset"] + recipe["scale"] * draws).astype(np.float32)
        state[key] = torch.from_numpy(values.reshape(recipe["shape"]))
    for key, first in record["first_values_check"].items():
        assert state[key].flatten()[: len(first)].tolist() == first
    return state


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    """Returns the base's outputs for the recorded image, with converted official weights.

    Also returns the recorded tensors and the record.
    """
    tensors, record = case("mask2former_whole_model")
    config, file = record["config"], tmp_path_factory.mktemp("official") / "official.pth"
    official = official_checkpoint(record)
    torch.save({"model": official}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCORD_CACHE", str(file.parent))
        twin = convert_if_official(file, "lmseg", convert_mask2former)
    with safe_open(twin, framework="pt") as opened:
        queries, channels = opened.get_slice("query_feat").get_shape()
        ffn = opened.get_slice("layers.0.linear1.weight").get_shape()[0]
        layers = sum(key.endswith("cross_norm.weight") for key in opened.keys())  # noqa: SIM118 (not a dict)
    classes, mask_channels = len(official["sem_seg_head.predictor.class_embed.bias"]) - 1, channels
    base = Base(queries, channels, 8, layers, ffn, classes, mask_channels)
    base.backbone = Backbone("resnet50", 0, pretrained=False, strides=[4, 8, 16, 32])
    base.pixel_decoder = PixelDecoder(base.backbone.channels, channels)
    load_weights(twin, base.eval(), base=True)  # all but the classifier
    for kind in ("weight", "bias"):
        getattr(base.class_embed, kind).data.copy_(
            official[f"sem_seg_head.predictor.class_embed.{kind}"]
        )
    size = tuple(config["image_sizes_hw"][0])
    with torch.no_grad():
        features = base.backbone(base.backbone.normalise(tensors["image0"][None], [size]))
        mask_features, maps = base.pixel_decoder(features)
        predictions, _ = base(mask_features, maps)
    return features, mask_features, maps, predictions, tensors, record


def test_parity_whole_model_from_official_checkpoint(whole_model):
    features, mask_features, maps, predictions, tensors, record = whole_model
    strides = record["config"]["channel_strides"]
    for name, feature in zip(("res2", "res3", "res4", "res5"), features, strict=True):
        step = strides.get(f"backbone.{name}", 1)
        check(f"whole model: {name}", feature[:, ::step], tensors[f"backbone.{name}"])
    check(
        "whole model: mask features",
        mask_features[:, :: strides["mask_features"]],
        tensors["mask_features"],
    )
    for i, ours in enumerate(maps):
        check("whole model: memories", ours, tensors[f"multi_scale.{i}"])
    *auxiliary, (logits, masks) = predictions
    assert len(auxiliary) == sum(
        key.startswith("aux") and key.endswith("pred_logits") for key in tensors
    )
    for i, (aux_logits, aux_masks) in enumerate(auxiliary):
        check("whole model: auxiliary logits", aux_logits, tensors[f"aux{i}.pred_logits"])
        if f"aux{i}.pred_masks" in tensors:
            step = record["config"]["query_stride_aux_masks"]
            check(
                "whole model: auxiliary masks", aux_masks[:, ::step], tensors[f"aux{i}.pred_masks"]
            )
    check("whole model: logits", logits, tensors["pred_logits"])
    check("whole model: masks", masks, tensors["pred_masks"])


def test_parity_whole_model_predictions(whole_model):
    *_, predictions, tensors, record = whole_model
    config, (logits, masks) = record["config"], (part[0] for part in predictions[-1])
    (size,), (original,) = config["image_sizes_hw"], config["output_sizes_hw"]
    padded = tuple(4 * side for side in masks.shape[-2:])
    masks = restore(masks, padded, tuple(size), tuple(original))
    probabilities = logits.softmax(-1)
    classes = probabilities[:, :-1]
    semantic = semantic_map(classes, masks)
    check("whole model: semantic map", semantic[:10], tensors["post0.semantic_first10"])
    best = tensors["post0.semantic_argmax"]
    check(
        "whole model: labels, pixels that differ",
        (semantic.argmax(0) != best).float().mean(),
        0.0,
        1e-4,
        floor=1,
    )
    is_thing = torch.zeros(classes.shape[1], dtype=torch.bool)
    is_thing[config["thing_class_ids"]] = True
    thresholds = dict(zip(*[iter(config["overrides"])] * 2))
    object_threshold, overlap = (
        thresholds[f"MODEL.MASK_FORMER.TEST.{kind}_THRESHOLD"]
        for kind in ("OBJECT_MASK", "OVERLAP")
    )
    panoptic, segments = panoptic_map(
        probabilities, masks, is_thing.tolist(), object_threshold, overlap, True
    )
    wrong = (panoptic != tensors["post0.panoptic"]).float().mean()
    check("whole model: panoptic map, pixels that differ", wrong, 0.0, 1e-4, floor=1)
    official = [(s["id"], s["category_id"], s["isthing"]) for s in record["post0.segments"]]
    assert [(s["id"], s["label"], s["isthing"]) for s in segments] == official
    found = instances(classes, masks, config["test_topk_per_image"], is_thing)
    check("whole model: scores of instances", found["scores"], tensors["post0.instance.scores"])
    assert torch.equal(found["labels"], tensors["post0.instance.classes"])
