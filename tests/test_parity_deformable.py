"""common/deformable.py and common/set_losses.py against recordings of Deformable DETR.

`two_stage` is compared from the backbone's maps to detections and gradients. The official model
without proposals (`refine`) has another first decoder layer; it is compared from there on.
CONCORD_PARITY names the folder of recorded tensors. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error of each quantity.
"""

import re

import pytest
import torch
from parity import case, check, check_gradients, report  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from common.boxes import to_pixels
from common.deformable import (
    BoxQueries,
    Decoder,
    Encoder,
    Memory,
    Neck,
    Proposals,
    best_detections,
    positions,
    select_boxes,
)
from common.mask_losses import masks_per_rank
from common.pixel_decoder import MSDeformAttn
from common.set_losses import loss_focal, loss_giou, loss_l1, match
from common.targets import Targets

RULES = [  # official name -> ours
    (r"^input_proj\.", "neck.levels."),
    (r"^transformer\.level_embed", "encoder.level_embed"),
    (r"^transformer\.encoder\.", "encoder."),
    (r"^transformer\.decoder\.(.*)\.norm1\.", r"decoder.\1.cross_norm."),
    (r"^transformer\.decoder\.(.*)\.norm2\.", r"decoder.\1.self_norm."),
    (r"^transformer\.decoder\.(.*)\.norm3\.", r"decoder.\1.ffn_norm."),
    (r"^transformer\.decoder\.", "decoder."),
    (r"^transformer\.enc_output_norm\.", "proposals.norm."),
    (r"^transformer\.enc_output\.", "proposals.linear."),
    (r"^transformer\.pos_trans_norm\.", "queries.norm."),
    (r"^transformer\.pos_trans\.", "queries.linear."),
    (r"^class_embed\.", "classifiers."),
]


class Detector(nn.Module):
    """Deformable DETR of the recorded sizes with the recorded weights."""

    def __init__(self, variant: str):
        super().__init__()
        self.variant = variant
        self.tensors, self.record = case("deformable_decoder")
        config = self.config = self.record["config"]
        width, levels = config["d_model"], config["feature_levels"]
        ffn, heads = config["ffn"], config["heads"]
        depth = config["decoder_layers"]
        points = config["encoder_points"], config["decoder_points"]
        self.neck = Neck(config["backbone_channels"], width, levels)
        self.encoder = Encoder(width, config["encoder_layers"], ffn, levels, heads, points[0])
        self.proposals = Proposals(width)
        self.queries = BoxQueries(width)
        eps = config["inverse_sigmoid_eps"]
        self.decoder = Decoder(width, depth, ffn, levels, heads, points[1], eps)
        self.classifiers = nn.ModuleList(
            nn.Linear(width, config["num_classes"]) for _ in range(depth + 1)
        )
        prefix = f"{variant}.weights."
        official = {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }
        missing, unexpected = self.load_state_dict(
            {self.own_name(key): tensor for key, tensor in official.items()}, strict=False
        )
        if variant == "two_stage":
            assert not missing and not unexpected
        self.features = [
            self.tensors[f"features.{i}"].clone().requires_grad_()
            for i in range(len(config["backbone_channels"]))
        ]
        self.sizes = [tuple(size) for size in config["image_sizes_hw"]]
        self.targets = []
        for i, size in enumerate(self.sizes):
            boxes = to_pixels(self.tensors[f"target{i}.boxes"], size)
            self.targets.append(Targets(boxes, self.tensors[f"target{i}.labels"]))

    def own_name(self, key: str) -> str:
        for pattern, name in RULES:
            key = re.sub(pattern, name, key)
        if found := re.match(r"bbox_embed\.(\d+)\.layers\.(\d)\.(.*)", key):
            head, layer, rest = int(found[1]), 2 * int(found[2]), found[3]
            last = head == len(self.decoder.layers)
            of = "proposals.box_head" if last else f"decoder.box_heads.{head}"
            return f"{of}.{layer}.{rest}"
        return key

    def recorded(self, name: str) -> torch.Tensor:
        return self.tensors[f"{self.variant}.{name}"]

    def encode(self) -> Memory:
        padded = tuple(self.config["padded_hw"])
        return self.encoder(Memory.of(self.neck(self.features), self.sizes, padded))


@pytest.mark.parametrize("variant", ["two_stage", "refine"])
def test_parity_encoder(variant):
    detector = Detector(variant)
    memory = Memory.of(
        detector.neck(detector.features), detector.sizes, tuple(detector.config["padded_hw"])
    )
    shapes = detector.recorded("spatial_shapes").tolist()
    assert list(map(list, memory.shapes)) == shapes
    assert torch.equal(memory.padding, detector.recorded("memory_mask").bool())
    inside = ~memory.padding
    assert inside.any() and memory.padding.any()
    check("encoder: input", memory.tokens, detector.recorded("encoder_input"))
    embed = [e.expand(h * w, -1) for e, (h, w) in zip(detector.encoder.level_embed, shapes)]
    position = positions(memory, detector.config["d_model"]) + torch.cat(embed)
    check("encoder: position", position[inside], detector.recorded("encoder_pos")[inside])
    check("encoder: valid ratios", memory.ratios, detector.recorded("valid_ratios"))
    found = detector.encoder(memory).tokens[inside]
    check("encoder: memory", found, detector.recorded("memory")[inside])


def test_parity_proposals_and_decoder():
    detector = Detector("two_stage")
    memory = detector.encode()
    hidden, boxes = detector.proposals(memory)
    logits = detector.classifiers[-1](hidden)
    inside = detector.recorded("output_proposals").isfinite().all(-1)
    assert inside.any() and not inside.all()
    check("proposals: hidden", hidden, detector.recorded("output_memory"))
    check("proposals: boxes", boxes, detector.recorded("enc.pred_boxes"))
    check("proposals: logits", logits, detector.recorded("enc.pred_logits"))
    best = logits[..., 0].topk(detector.config["num_queries"], 1).indices
    assert torch.equal(best, detector.recorded("topk"))
    chosen = select_boxes(boxes, logits[..., 0], detector.config["num_queries"])
    assert not chosen.requires_grad
    check("decoder: first boxes", chosen, detector.recorded("init_reference"))
    content, position = detector.queries(chosen)
    check("decoder: content", content, detector.recorded("query_content"))
    check("decoder: position", position, detector.recorded("query_pos"))
    hidden, boxes = detector.decoder(content, position, chosen, memory)
    check("decoder: hidden", hidden, detector.recorded("hidden"))
    check("decoder: references", boxes, detector.recorded("references"))
    for z, (states, refined) in enumerate(zip(hidden, boxes, strict=True)):
        logits = detector.classifiers[z](states)
        check("decoder: boxes", refined, detector.recorded(f"layer{z}.pred_boxes"))
        check("decoder: logits", logits, detector.recorded(f"layer{z}.pred_logits"))


def test_parity_decoder_behind_the_first_layer():
    detector = Detector("refine")
    memory = detector.encode()
    depth = len(detector.decoder.layers)
    assert depth > 1
    detector.decoder.layers = detector.decoder.layers[1:]
    detector.decoder.box_heads = detector.decoder.box_heads[1:]
    first, references = detector.recorded("hidden")[0], detector.recorded("references")[0]
    position = detector.recorded("query_pos")
    hidden, boxes = detector.decoder(first, position, references, memory)
    check("decoder, one stage: hidden", hidden, detector.recorded("hidden")[1:])
    for z in range(1, depth):
        wanted = detector.recorded(f"layer{z}.pred_boxes")
        check("decoder, one stage: boxes", boxes[z - 1], wanted)


# -- losses ----------------------------------------------------------------------------------------


def check_match(detector: Detector, layers: list[str], found) -> None:
    """The pairs of each layer and image."""
    for z, layer in enumerate(layers):
        for i, target in enumerate(detector.targets):
            rows = (found.z == z) & (found.image == i)
            ends = (detector.recorded(f"match.{layer}.image{i}.{e}") for e in ("query", "target"))
            official = dict(zip(*(end.tolist() for end in ends)))
            assert found.query[rows].tolist() == [
                query for query, _ in sorted(official.items(), key=lambda pair: pair[1])
            ]
            assert len(target.labels) == len(official)


def losses_of(detector: Detector, layers: list[str], logits, boxes, targets) -> dict:
    """Returns {official name: loss, not weighted} of predictions (Z, B, Q, .)."""
    found = match(logits, boxes, targets, detector.sizes)
    check_match(detector, layers, found)
    count = masks_per_rank(targets, logits.device)
    classes = found.classes(logits.shape[:-1], logits.shape[-1])
    target = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].float()
    near = boxes[found.z, found.image, found.query]
    losses = {}
    for z, layer in enumerate(layers):
        ending = layer.replace("layer", "_") if layer != "enc" else "_enc"
        if ending == f"_{len(detector.decoder.layers) - 1}":
            ending = ""  # the last one
        own = found.z == z
        losses[f"loss_ce{ending}"] = loss_focal(logits[z], target[z], count)
        losses[f"loss_bbox{ending}"] = loss_l1(near, found.boxes, count)[own].sum()
        losses[f"loss_giou{ending}"] = loss_giou(near, found.boxes, count)[own].sum()
    return losses


@pytest.mark.parametrize("variant", ["two_stage", "refine"])
def test_parity_matching_and_losses(variant):
    detector = Detector(variant)
    layers = [f"layer{z}" for z in range(len(detector.decoder.layers))]
    logits, boxes = (
        torch.stack([detector.recorded(f"{layer}.pred_{kind}") for layer in layers])
        for kind in ("logits", "boxes")
    )
    losses = losses_of(detector, layers, logits, boxes, detector.targets)
    if variant == "two_stage":
        logits, boxes = (
            detector.recorded(f"enc.pred_{kind}")[None] for kind in ("logits", "boxes")
        )
        objects = [Targets(t.boxes, torch.zeros_like(t.labels)) for t in detector.targets]
        losses |= losses_of(detector, ["enc"], logits, boxes, objects)
    record = detector.record["results"][variant]
    official = {key: loss for key, loss in record["losses"].items() if key.startswith("loss_")}
    assert losses.keys() == official.keys()
    for name, loss in official.items():
        check("losses", losses[name], loss)
    weights = detector.config["loss_weights"]
    total = sum(weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items())
    check("losses: total", total, record["total_weighted"])


def test_parity_gradients():
    detector = Detector("two_stage")
    memory = detector.encode()
    hidden, proposed = detector.proposals(memory)
    scored = detector.classifiers[-1](hidden)
    chosen = select_boxes(proposed, scored[..., 0], detector.config["num_queries"])
    content, position = detector.queries(chosen)
    hidden, boxes = detector.decoder(content, position, chosen, memory)
    logits = torch.stack([linear(x) for linear, x in zip(detector.classifiers, hidden)])
    layers = [f"layer{z}" for z in range(len(hidden))]
    losses = losses_of(detector, layers, logits, boxes, detector.targets)
    objects = [Targets(t.boxes, torch.zeros_like(t.labels)) for t in detector.targets]
    losses |= losses_of(detector, ["enc"], scored[None], proposed[None], objects)
    weights = detector.config["loss_weights"]
    total = sum(weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items())
    check("gradients: total", total, detector.record["results"]["two_stage"]["total_weighted"])
    total.backward()
    ours = dict(detector.named_parameters())
    ours |= {f"features.{i}": feature for i, feature in enumerate(detector.features)}
    prefix = "two_stage.grad."
    official = {
        detector.own_name(key.removeprefix(prefix)): gradient
        for key, gradient in detector.tensors.items()
        if key.startswith(prefix)
    }
    check_gradients("gradients", ours, official)


@pytest.mark.parametrize("variant", ["two_stage", "refine"])
def test_parity_detections(variant):
    detector = Detector(variant)
    last = f"layer{len(detector.decoder.layers) - 1}"
    logits, boxes = (detector.recorded(f"{last}.pred_{kind}") for kind in ("logits", "boxes"))
    sizes = detector.record["results"][variant]["post_target_sizes_hw"]
    for i, (height, width) in enumerate(sizes):
        limit = detector.config["post_topk"]
        found, scores, labels = best_detections(logits[i], boxes[i], (height, width), limit)
        end = torch.tensor([width, height] * 2)
        official = detector.recorded(f"post{i}.boxes").clamp(min=0).minimum(end)
        check("detections: boxes", found, official)
        check("detections: scores", scores, detector.recorded(f"post{i}.scores"))
        assert torch.equal(labels, detector.recorded(f"post{i}.classes"))


# -- attention -------------------------------------------------------------------------------------


def attention_case():
    tensors, record = case("mask2former_pixel_decoder")
    config = record["config"]
    shapes = tuple(map(tuple, tensors["msda.module_in.spatial_shapes"].tolist()))
    attention = MSDeformAttn(config["conv_dim"], config["nheads"], len(shapes), config["n_points"])
    prefix = "msda.module."
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    attention.load_state_dict(own)
    prefix = "msda.module_in."
    given = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return attention, given, shapes, tensors


def test_parity_attention_in_boxes():
    attention, given, shapes, tensors = attention_case()
    boxes = given["reference_points4"]  # (B, Q, L, 4)
    centre, size = boxes.chunk(2, -1)
    pixels = torch.tensor([(width, height) for height, width in shapes])
    ours = attention(
        given["query"], given["input_flatten"], shapes, centre, spread=size / 2 * pixels
    )
    check("attention in boxes", ours, tensors["msda.module_out.ref4"])


def test_parity_attention_with_padding():
    attention, given, shapes, tensors = attention_case()
    padding = given["padding_mask"].bool()
    assert padding.any()
    points = given["reference_points2"]
    ours = attention(given["query"], given["input_flatten"], shapes, points, padding)
    check("attention with padding", ours, tensors["msda.module_out.ref2_padded"])


def test_boxes_and_pixels():
    boxes = torch.rand(5, 4)
    there = to_pixels(boxes, (30, 50))
    wanted = box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([50, 30, 50, 30])
    torch.testing.assert_close(there, wanted)
