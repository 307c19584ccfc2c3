"""Steps and predictions of scaledet.py and detic.py, and of torchvision's detectors.

Weights are random, images are noise, BatchNorm is frozen. A step is forward, matching, losses,
backward, clipping and fused AdamW with a learning rate of 0, so that all steps are the same. In a
prediction, random classifiers would pass all scores or none: on both sides the threshold is such
that CANDIDATES pairs of a region and a class pass in an image.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.models import detection

import detic
import scaledet
from benchmarks.paired import Setting
from common.batch import Batch, Sample, collate
from common.boxes import select_detections
from common.compiling import Compiling
from common.labels import LabelSpace, Vocabulary

BOXES, CANDIDATES, MOST = 8, 2000, 300
NAME = "lvis"
CLIP = (nn.utils.clip_grad_value_, 1.0)


def freeze_norms(model: nn.Module) -> None:
    """Freezes the statistics and the weights of BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def embed_at_random(names: tuple[str, ...], dataset: str) -> Tensor:
    """Returns random text embeddings (C, 512) of unit norm."""
    return nn.functional.normalize(torch.randn(len(names), 512))


def random_boxes(count: int, side: int) -> Tensor:
    """Returns boxes (count, 4) inside an image of side x side pixels.

    Their sides are log-uniform between 16 pixels and the image's.
    """
    logarithm = torch.rand(count, 2) * torch.tensor(side / 16).log()
    half = 8 * logarithm.exp()
    centre = torch.rand(count, 2) * side
    return torch.cat([centre - half, centre + half], 1).clamp(0, side)


def labelled_batch(setting: Setting) -> Batch:
    """Returns images of noise, each with BOXES boxes and masks of random classes.

    A mask is an ellipse in its box.
    """
    side, samples = setting.side, []
    pixels = torch.arange(side) + 0.5
    for i in range(setting.batch):
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        sample = Sample.unlabelled(image, NAME, i, i)
        sample.boxes = random_boxes(BOXES, side)
        sample.labels = torch.randint(setting.classes, (BOXES,))
        x1, y1, x2, y2 = (part[:, None] for part in sample.boxes.T)
        x = (2 * pixels - x1 - x2) / (x2 - x1)  # (N, W), -1 to 1 in the box
        y = (2 * pixels - y1 - y2) / (y2 - y1)
        sample.masks = x[:, None].square() + y[:, :, None].square() <= 1
        samples.append(sample)
    return collate(samples).to(torch.device(setting.device))


def label_space_of(setting: Setting, merge: bool = False) -> LabelSpace:
    """Returns a label space of one dataset with random text."""
    names = tuple(f"class {i}" for i in range(setting.classes))
    space = LabelSpace([Vocabulary(NAME, names)], embed_at_random, merge=merge)
    return space.to(setting.device)


def prepare(model: nn.Module, setting: Setting, *compiled: str) -> nn.Module:
    """Moves a model to the device, freezes BatchNorm, and lets it be compiled if asked.

    compiled: names of the peer's modules that are compiled; ours know their `compilable` parts
    """
    model.to(setting.device).train()
    freeze_norms(model)
    Compiling.on = setting.mode == "compiled"
    Compiling.few_shapes = True
    for name in compiled if setting.mode == "compiled" else ():
        model.get_submodule(name).compile()
    return model


def optimizer_of(model: nn.Module, lr: float = 0.0) -> torch.optim.Optimizer:
    """Returns fused AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, fused=True)


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip: Callable, most: float
) -> float:
    """Takes the second half of a step: backward, clipping to `most` and AdamW. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clip(model.parameters(), most)
    optimizer.step()
    return loss.item()  # waits for the device


def scaledet_step(setting: Setting, fed_loss: bool = False) -> Callable[[], float]:
    """Returns a function that takes a training step of scaledet.py and returns the loss.

    fed_loss: a step trains 50 of the classes, as for LVIS
    """
    args = scaledet.Args(amp=setting.amp, fed_loss=fed_loss)
    space = label_space_of(setting)
    count = 1.0 if fed_loss else -1.0
    federated = torch.full((setting.classes,), count, device=setting.device)
    tables = scaledet.LabelTables.of(args, space.text, federated)
    model = prepare(scaledet.Model(args, space, pretrained=False), setting)
    batch, optimizer = labelled_batch(setting), optimizer_of(model)

    def step() -> float:
        targets = scaledet.prepare_targets(batch, space)
        outputs = model(batch.images, batch.sizes, targets, space.text)
        losses = scaledet.compute_losses(args, *outputs, targets, tables)
        return update(model, optimizer, losses["loss"], *CLIP)

    return step


def detic_step(setting: Setting, fed_loss: bool = False) -> Callable[[], float]:
    """Returns the same of detic.py, with masks."""
    args = detic.Args(amp=setting.amp)
    space = label_space_of(setting, merge=True)
    frequency = torch.ones(setting.classes, device=setting.device)
    federated = frequency if fed_loss else -frequency
    model = prepare(detic.Model(args, space, pretrained=False), setting)
    batch, optimizer = labelled_batch(setting), optimizer_of(model)

    def step() -> float:
        targets = detic.prepare_targets(batch, space)
        outputs = model(batch.images, batch.sizes, targets, space.text)
        losses = detic.compute_losses(args, *outputs, targets, frequency, federated)
        return update(model, optimizer, losses["loss"], *CLIP)

    return step


federated_scaledet_step = partial(scaledet_step, fed_loss=True)
federated_detic_step = partial(detic_step, fed_loss=True)


def build_peer(name: str, setting: Setting) -> nn.Module:
    """Returns a detector of torchvision with random weights that does not resize the images."""
    sizes = {"min_size": setting.side, "max_size": setting.side}
    build = getattr(detection, name)
    classes = setting.classes + 1  # and background
    model = build(weights=None, weights_backbone=None, num_classes=classes, **sizes)
    return prepare(model, setting, "backbone", "rpn.head", "roi_heads.box_head")


def peer_step(name: str, setting: Setting) -> Callable[[], float]:
    """Returns the same of torchvision's detector `name`."""
    model, batch = build_peer(name, setting), labelled_batch(setting)
    optimizer = optimizer_of(model)
    targets = []
    for sample in batch.samples:
        target = {"boxes": sample.boxes, "labels": sample.labels + 1, "masks": sample.masks.byte()}
        targets.append(target)

    def step() -> float:
        with setting.autocast():
            losses = model(list(batch.images / 255), targets)
        return update(model, optimizer, sum(losses.values()).float(), *CLIP)

    return step


fasterrcnn_step = partial(peer_step, "fasterrcnn_resnet50_fpn_v2")
maskrcnn_step = partial(peer_step, "maskrcnn_resnet50_fpn_v2")


def predictor(method: ModuleType, setting: Setting, limit: int = MOST) -> Callable[[], list]:
    """Returns a function that predicts with scaledet.py or detic.py, at most `limit` detections."""
    args = method.Args(amp=setting.amp)
    space = label_space_of(setting, merge=method is detic)
    model = prepare(method.Model(args, space, pretrained=False), setting).eval()
    batch = labelled_batch(setting)
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        _, scores = model.detect(features, batch.sizes, space.text)
    threshold = lowest_of_best(torch.cat(scores), CANDIDATES * len(batch))
    select = partial(select_detections, threshold=threshold, limit=limit)

    def predict() -> list[dict]:
        with patch.object(method, "select_detections", select):
            return method.predict(model, batch, space)

    return predict


def lowest_of_best(scores: Tensor, count: int) -> float:
    """Returns the lowest of the `count` highest scores (R, C)."""
    return scores.flatten().topk(min(count, scores.numel())).values[-1].item()


def peer_predictor(name: str, setting: Setting) -> Callable[[], list]:
    """Returns a function that predicts with torchvision's detector `name`, at most 100."""
    model, batch = build_peer(name, setting).eval(), labelled_batch(setting)
    logits = []

    @torch.no_grad()
    def predict() -> list[dict]:
        with setting.autocast():
            return model(list(batch.images / 255))

    model.roi_heads.score_thresh = 1.0
    hook = model.roi_heads.box_predictor.register_forward_hook(
        lambda module, inputs, outputs: logits.append(outputs[0])
    )
    predict()
    hook.remove()
    scores = logits[0].float().softmax(1)[:, 1:]
    model.roi_heads.score_thresh = lowest_of_best(scores, CANDIDATES * len(batch))
    return predict
