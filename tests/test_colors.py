"""Changes of colours: against colorsys, and against the formulas on whole images."""

import colorsys
import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from common import colors
from common.colors import change_colors
from common.transforms import jitter_colors


def image_of(height: int, width: int) -> torch.Tensor:
    """Random colours, and in the first row greys, black, white and pure colours."""
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    image[:, 0, :4] = torch.tensor([0, 1, 128, 255])
    image[:, 0, 4:7] = 255 * torch.eye(3, dtype=torch.long)
    image[:, 0, 7:10] = 255 - image[:, 0, 4:7]
    return image.byte()


def changed_pixel(pixel, brightness, contrast, contrast_last, saturation, turn):
    """The same as `change_colors` for one pixel, with Python's numbers."""
    values = [min(255, max(0, value + brightness)) for value in pixel]
    if not contrast_last:
        values = [min(255, value * contrast) for value in values]
    h, s, v = colorsys.rgb_to_hsv(*values)
    values = colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), v)
    if contrast_last:
        values = [min(255, value * contrast) for value in values]
    return values


CHANGES = list(
    itertools.product((0.0, -20.3, 31.0), (1.0, 0.61, 1.4), (False, True), (1.0, 0.5, 1.5))
)


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.1, 0.03])
def test_each_pixel_is_that_of_colorsys(turn):
    image = image_of(3, 12)
    pixels = image.flatten(1).T.tolist()
    for change in CHANGES:
        found = change_colors(image, *change, turn).flatten(1).T.tolist()
        for pixel, ours in zip(pixels, found):
            assert ours == pytest.approx(changed_pixel(pixel, *change, turn), abs=0.51)


def by_whole_images(image, brightness, contrast, contrast_last, saturation, turn):
    """The formulas in the order in which they are written, with torchvision's hue."""
    image = (image.float() + brightness).clamp(0, 255)
    if not contrast_last:
        image = (image * contrast).clamp(max=255)
    most, least = image.amax(0), image.amin(0)
    limit = most / (most - least).clamp(min=1e-3)
    image = most - (most - image) * limit.clamp(max=saturation)
    if turn:
        image = F.adjust_hue(image / 255, turn) * 255
    if contrast_last:
        image = image * contrast
    return image.clamp(0, 255).round().byte()


@pytest.mark.parametrize("interleaved", [False, True])
def test_strips_are_parts_of_the_whole(monkeypatch, interleaved):
    """In strips of some rows, and for an image whose channels are neighbours in memory."""
    monkeypatch.setattr(colors, "STRIP", 100)
    image = image_of(31, 23)
    if interleaved:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for change in CHANGES[::5]:
        found = change_colors(image, *change, 0.07)
        away = (found.int() - by_whole_images(image, *change, 0.07).int()).abs()
        assert away.max() <= 1 and away.float().mean() < 0.1


def test_the_given_image_stays_and_no_change_is_none():
    image = image_of(4, 12)
    before = image.clone()
    assert torch.equal(change_colors(image), before)
    change_colors(image, 5.0, 1.2, False, 1.2, 0.1)
    assert torch.equal(image, before)


def test_jitter_draws_as_before():
    """The order of the random numbers: runs at a fixed seed stay as they are."""
    image = image_of(5, 12)
    for seed in range(12):
        torch.manual_seed(seed)
        found = jitter_colors(image)
        torch.manual_seed(seed)
        numbers = []
        for low, high, default in ((-32, 32, 0.0), (0.5, 1.5, 1.0)):
            drawn = torch.rand(()) < 0.5
            numbers.append(torch.empty(()).uniform_(low, high).item() if drawn else default)
        numbers.append(bool(torch.rand(()) < 0.5))
        for low, high, default in ((0.5, 1.5, 1.0), (-0.1, 0.1, 0.0)):
            drawn = torch.rand(()) < 0.5
            numbers.append(torch.empty(()).uniform_(low, high).item() if drawn else default)
        away = (found.int() - by_whole_images(image, *numbers).int()).abs()
        assert away.max() <= 1
