"""Steps and predictions of dataseg.py, lmseg.py and Hugging Face's Mask2Former.

All have timm's ResNet-50 with frozen BatchNorm, 6 + 9 layers of 256 channels, 100 queries, 12544
points, the same images and segments, and random weights. A step is forward, matching, losses,
backward, clipping and fused AdamW.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dataseg
import lmseg
from benchmarks.detectors import embed_at_random, optimizer_of, prepare, update
from benchmarks.paired import Setting
from common.batch import Batch, Sample, collate
from common.labels import LabelSpace, Vocabulary

SEGMENTS, NAME = 8, "ade20k"
TASKS = ("forward", "semantic", "panoptic")
CLIP, LR = (nn.utils.clip_grad_norm_, 0.01), 1e-5
MEAN, SCALE = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)


def labelled_batch(setting: Setting) -> Batch:
    """Returns images of noise, each with a grid of SEGMENTS segments of random classes."""
    side, samples = setting.side, []
    cell = torch.arange(side) * 4 // side
    for i in range(setting.batch):
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        sample = Sample.unlabelled(image, NAME, i, i)
        sample.supervision = "semantic"
        sample.labels = torch.randperm(setting.classes)[:SEGMENTS]
        sample.segments = (cell[:, None] // 2 * 4 + cell).short()
        samples.append(sample)
    return collate(samples).to(torch.device(setting.device))


def label_space_of(setting: Setting) -> LabelSpace:
    """Returns a label space of one dataset with random text. Two thirds are things."""
    names = tuple(f"class {i}" for i in range(setting.classes))
    is_thing = tuple(i % 3 > 0 for i in range(setting.classes))
    space = LabelSpace([Vocabulary(NAME, names, is_thing=is_thing)], embed_at_random)
    return space.to(setting.device)


def dataseg_step(setting: Setting) -> Callable[[], float]:
    """Returns a function that takes a training step of dataseg.py and returns the loss.

    A target has one proposal, as in Mask2Former.
    """
    args = dataseg.Args(amp=setting.amp, merge_in_training=False)
    space = label_space_of(setting)
    model = prepare(dataseg.Model(args, space, pretrained=False), setting)
    batch, optimizer = labelled_batch(setting), optimizer_of(model, LR)
    merged = torch.ones(setting.classes, dtype=torch.bool, device=setting.device)

    def step() -> float:
        targets = dataseg.prepare_targets(batch, merged)
        output = model(batch.images, batch.sizes, space.text)
        losses = dataseg.compute_losses(args, output, targets, merged)
        return update(model, optimizer, losses["loss"], *CLIP)

    return step


def lmseg_step(setting: Setting) -> Callable[[], float]:
    """Returns the same of lmseg.py, with fixed text."""
    args = lmseg.Args(amp=setting.amp, context_tokens=0)
    space = label_space_of(setting)
    model = prepare(lmseg.Model(args, space, pretrained=False), setting)
    batch, optimizer = labelled_batch(setting), optimizer_of(model, LR)

    def step() -> float:
        output = model(batch.images, batch.sizes, space)
        targets = lmseg.prepare_targets(batch)
        losses = lmseg.compute_losses(args, output, targets)
        return update(model, optimizer, losses["loss"], *CLIP)

    return step


def build_peer(setting: Setting) -> nn.Module:
    """Returns Hugging Face's Mask2Former. Raises ImportError without transformers."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        TimmBackboneConfig,
    )

    backbone = TimmBackboneConfig(
        backbone="resnet50", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=setting.classes)
    model = Mask2FormerForUniversalSegmentation(config)
    return prepare(model, setting, "model.pixel_level_module")


def normaliser(device: str) -> Callable[[Tensor], Tensor]:
    """Returns what makes inputs of Hugging Face's model of images (B, 3, H, W) uint8."""
    mean, scale = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, SCALE))
    return lambda images: (images - mean) / scale


def transformers_step(setting: Setting) -> Callable[[], float]:
    """Returns the same of Hugging Face's model."""
    model, batch = build_peer(setting), labelled_batch(setting)
    optimizer, normalise = optimizer_of(model, LR), normaliser(setting.device)
    rows = torch.arange(SEGMENTS, device=setting.device)[:, None, None]
    masks = [(sample.segments == rows).float() for sample in batch.samples]
    classes = [sample.labels for sample in batch.samples]

    def step() -> float:
        with setting.autocast():
            inputs = normalise(batch.images)
            loss = model(pixel_values=inputs, mask_labels=masks, class_labels=classes).loss
        return update(model, optimizer, loss.float(), *CLIP)

    return step


def dataseg_predictor(setting: Setting, task: str) -> Callable:
    """Returns a function that predicts with dataseg.py for one of TASKS.

    The threshold of a segment is 0, since random weights are sure of nothing.
    """
    args = dataseg.Args(amp=setting.amp, object_threshold=0.0)
    space = label_space_of(setting)
    model = prepare(dataseg.Model(args, space, pretrained=False), setting).eval()
    batch = labelled_batch(setting)
    if task == "forward":
        return torch.no_grad()(lambda: model(batch.images, batch.sizes, space.text))
    return lambda: dataseg.predict(model, batch, space, task)


def lmseg_predictor(setting: Setting, task: str) -> Callable:
    """Returns the same of lmseg.py."""
    args = lmseg.Args(amp=setting.amp, context_tokens=0, object_threshold=0.0)
    space = label_space_of(setting)
    model = prepare(lmseg.Model(args, space, pretrained=False), setting).eval()
    batch = labelled_batch(setting)
    if task == "forward":
        return torch.no_grad()(lambda: model(batch.images, batch.sizes, space))
    return lambda: lmseg.predict(model, batch, space, task)


def transformers_predictor(setting: Setting, task: str) -> Callable:
    """Returns the same of Hugging Face's model, with its own post-processing."""
    from transformers import Mask2FormerImageProcessor

    model, batch = build_peer(setting).eval(), labelled_batch(setting)
    processor, normalise = Mask2FormerImageProcessor(), normaliser(setting.device)
    sizes = [(setting.side, setting.side)] * setting.batch

    @torch.no_grad()
    def predict():
        with setting.autocast():
            outputs = model(pixel_values=normalise(batch.images))
        if task == "semantic":
            return processor.post_process_semantic_segmentation(outputs, sizes)
        if task == "panoptic":
            return processor.post_process_panoptic_segmentation(outputs, 0, target_sizes=sizes)
        return outputs

    return predict
