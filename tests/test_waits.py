"""How often a training step would make a GPU wait for the host."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
from common.batch import Batch, Sample, collate
from common.labels import LabelSpace, Vocabulary
from common.runlog import RunLog
from common.text_encoder import tokenize_lists
from common.verdict import Verdict

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


def waits_of_a_step(
    model: nn.Module, clip: Callable, batch: Batch, folder: Path, compute_losses: Callable
) -> Counter:
    """The waits of the second training step, as the loops write it, with its run log.

    compute_losses(): targets, forward and losses
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run_log = RunLog(model.args, folder, 9, 0, model, LabelSpace([]), optimizer, {})
    for step in (1, 2):
        with count_waits() as found:
            losses = compute_losses()
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            losses = run_log.check_finite(losses, step, batch)
            clip(model.parameters(), 0.01)
            optimizer.step()
            run_log.step(step, losses, 1e-4, len(batch))
    run_log.close()
    return +found


def waits_of_a_detector(method, settings: dict, tables, folder: Path) -> Counter:
    """tables(args, space): what `compute_losses` takes last."""
    torch.manual_seed(0)
    space = LabelSpace([vocabulary("a", 200), vocabulary("b", 100)])
    model = method.Model(method.Args(**SMALL, **settings), space, pretrained=False).train()
    batch = collate([sample("ab"[i % 2], 3 + i) for i in range(IMAGES)])
    captions = [None] if method is detic else []
    last = tables(model.args, space)

    def compute_losses():
        targets = method.prepare_targets(batch, space)
        outputs = model(batch.images, batch.sizes, targets, space.text, *captions)
        return method.compute_losses(model.args, *outputs, targets, *last)

    return waits_of_a_step(model, nn.utils.clip_grad_value_, batch, folder, compute_losses)


@pytest.mark.parametrize("fed_loss", [False, True])
def test_scaledet(fed_loss, tmp_path):
    def tables(args, space):
        frequency = torch.full((len(space),), 5.0 if fed_loss else -1.0)
        return [scaledet.LabelTables.of(args, space.text, frequency)]

    found = waits_of_a_detector(scaledet, {"fed_loss": fed_loss}, tables, tmp_path)
    # NMS of each image; RoIAlign forward and backward, of each stage; five others
    assert found == {"torchvision.nms.default": IMAGES, "Tensor.tolist": 11 + fed_loss}


def test_detic_with_masks(tmp_path):
    def tables(args, space):
        frequency = torch.full((len(space),), 5.0)
        return frequency, frequency

    found = waits_of_a_detector(detic, {}, tables, tmp_path)
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


@pytest.mark.parametrize(
    "supervision, waits", [("semantic", 5), ("panoptic", 5), ("instances", 3), ("boxes", 2)]
)
def test_dataseg(supervision, waits, tmp_path):
    """Merging, matching (there and back) and two for the members, or one to sort by masks."""
    batch, space = segmenter_batch(supervision)
    args = dataseg.Args(**SEGMENTER)
    model = dataseg.Model(args, space, pretrained=False).train()
    merged = torch.arange(50) % 2 == 0

    def compute_losses():
        targets = dataseg.prepare_targets(batch, merged)
        output = model(batch.images, batch.sizes, space.text)
        return dataseg.compute_losses(args, output, targets, merged)

    found = waits_of_a_step(model, nn.utils.clip_grad_norm_, batch, tmp_path, compute_losses)
    assert found.total() == waits


@pytest.mark.parametrize("supervision", ["semantic", "panoptic"])
def test_lmseg(supervision, tmp_path):
    """Matching waits for the batch: there and back."""
    batch, space = segmenter_batch(supervision)
    args = lmseg.Args(**SEGMENTER)
    model = lmseg.Model(args, space, pretrained=False).train()

    def compute_losses():
        output = model(batch.images, batch.sizes, space)
        return lmseg.compute_losses(args, output, lmseg.prepare_targets(batch))

    found = waits_of_a_step(model, nn.utils.clip_grad_norm_, batch, tmp_path, compute_losses)
    assert found.total() == 2


@pytest.mark.parametrize("supervision", ["semantic", "panoptic"])
def test_oneformer(supervision, tmp_path):
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

    found = waits_of_a_step(model, nn.utils.clip_grad_norm_, batch, tmp_path, compute_losses)
    assert found.total() == 2


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


def test_a_verdict_waits_only_in_its_own_step():
    losses, nothing = {"loss": torch.zeros(())}, Batch(torch.zeros(0), [], [])
    earlier = Verdict(1, losses, nothing, 0)
    with count_waits() as found:
        verdict = Verdict(2, losses, nothing, 0)
        assert earlier.is_finite()
        assert not +found
        assert verdict.is_finite()
    assert +found == {"Verdict.read": 1}
