"""How often a training step would make a GPU wait for the host."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from waits import count_waits

import dataseg
import detic
import lmseg
import oneformer
import scaledet
from common.batch import Sample, collate
from common.labels import LabelSpace, Vocabulary
from common.text_encoder import tokenize_lists

SIDE, IMAGES = 320, 8
SMALL = {"backbone": "resnet18", "channels": 64, "fc_dim": 64, "rois_per_image": 64}


def vocabulary(name: str, count: int) -> Vocabulary:
    text = F.normalize(torch.randn(count, 32))
    return Vocabulary(name, tuple(f"{name} {i}" for i in range(count)), text=text)


def sample(dataset: str, count: int) -> Sample:
    corner = torch.rand(count, 2) * 200
    boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 100], 1)
    image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
    masks = torch.rand(count, SIDE, SIDE) > 0.5
    labels = torch.randint(50, (count,))
    return Sample(image, dataset, "instances", 0, 0, (SIDE, SIDE), boxes, labels, masks)


def waits_of_a_step(method, settings: dict, tables) -> dict:
    """The waits of a training step. tables(args, space): what `compute_losses` takes last."""
    torch.manual_seed(0)
    space = LabelSpace([vocabulary("a", 200), vocabulary("b", 100)])
    model = method.Model(method.Args(**SMALL, **settings), space, pretrained=False).train()
    batch = collate([sample("ab"[i % 2], 3 + i) for i in range(IMAGES)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    captions = [None] if method is detic else []
    last = tables(model.args, space)
    with count_waits() as found:
        targets = method.prepare_targets(batch, space)
        outputs = model(batch.images, batch.sizes, targets, space.text, *captions)
        method.compute_losses(model.args, *outputs, targets, *last)["loss"].backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("fed_loss", [False, True])
def test_scaledet(fed_loss):
    def tables(args, space):
        frequency = torch.full((len(space),), 5.0 if fed_loss else -1.0)
        return [scaledet.LabelTables.of(args, space.text, frequency)]

    found = waits_of_a_step(scaledet, {"fed_loss": fed_loss}, tables)
    # NMS of each image; RoIAlign forward and backward, of each stage; five others
    assert found == {"torchvision.nms.default": IMAGES, "Tensor.tolist": 11 + fed_loss}


def test_detic_with_masks():
    def tables(args, space):
        frequency = torch.full((len(space),), 5.0)
        return frequency, frequency

    found = waits_of_a_step(detic, {}, tables)
    assert found == {"torchvision.nms.default": IMAGES, "Tensor.tolist": 14}


SEGMENTER = {"backbone": "resnet18", "channels": 32, "queries": 20, "points": 64}
SEGMENTER |= {"encoder_layers": 1, "decoder_layers": 2}


def segmented(supervision: str, count: int) -> Sample:
    """A sample with segments, or with masks of which the first has no pixel."""
    whole = sample("a", count)
    if supervision == "boxes":
        return replace(whole, supervision="boxes", masks=None)
    if supervision == "instances":
        whole.masks[0] = False
        return whole
    segments = torch.randint(-1, count, (SIDE, SIDE)).short()
    return replace(whole, supervision=supervision, segments=segments, masks=None)


def segmenter_batch(supervision: str):
    torch.manual_seed(0)
    space = LabelSpace([vocabulary("a", 50)])
    return collate([segmented(supervision, 3 + i) for i in range(IMAGES)]), space


def waits_of_losses(model, compute_losses) -> dict:
    """The waits of a training step. compute_losses(): forward and losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with count_waits() as found:
        compute_losses()["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return found


@pytest.mark.parametrize(
    "supervision, waits", [("semantic", 5), ("panoptic", 5), ("instances", 3), ("boxes", 2)]
)
def test_dataseg(supervision, waits):
    """Merging, matching (there and back) and two for the members, or one to sort by masks."""
    batch, space = segmenter_batch(supervision)
    args = dataseg.Args(**SEGMENTER)
    model = dataseg.Model(args, space, pretrained=False).train()
    merged = torch.arange(50) % 2 == 0

    def compute_losses():
        targets = dataseg.prepare_targets(batch, merged)
        output = model(batch.images, batch.sizes, space.text)
        return dataseg.compute_losses(args, output, targets, merged)

    assert sum(waits_of_losses(model, compute_losses).values()) == waits


@pytest.mark.parametrize("supervision", ["semantic", "panoptic"])
def test_lmseg(supervision):
    """Matching waits for the batch: there and back."""
    batch, space = segmenter_batch(supervision)
    args = lmseg.Args(**SEGMENTER)
    model = lmseg.Model(args, space, pretrained=False).train()

    def compute_losses():
        output = model(batch.images, batch.sizes, space)
        return lmseg.compute_losses(args, output, lmseg.prepare_targets(batch))

    assert sum(waits_of_losses(model, compute_losses).values()) == 2


@pytest.mark.parametrize("supervision", ["semantic", "panoptic"])
def test_oneformer(supervision):
    """Matching waits there and back. Two copies of the texts, before the step, are not counted."""
    batch, space = segmenter_batch(supervision)
    args = oneformer.Args(**SEGMENTER, context=4)
    model = oneformer.Model(args, space, pretrained=False).train()
    tasks = [oneformer.task_of(sample) for sample in batch.samples]
    lists = [oneformer.text_list(args, sample, space.names) for sample in batch.samples]
    texts = tokenize_lists(lists)

    def compute_losses():
        output = model(batch.images, batch.sizes, space, tasks, texts)
        return oneformer.compute_losses(args, output, oneformer.prepare_targets(batch))

    assert sum(waits_of_losses(model, compute_losses).values()) == 2


def test_what_waits_is_counted():
    x = torch.rand(4)
    with count_waits() as found:
        x[x > 2] = torch.zeros(0)
        float(x.sum())
        x.nonzero()
        x.new_tensor([1.0])
        torch.repeat_interleave(torch.ones(3).long())
        x.cpu()
    assert sum(found.values()) == 6
