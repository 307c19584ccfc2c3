"""Brightness, contrast, saturation and hue of an image, changed in few passes over its pixels."""

import torch
from torch import Tensor

STRIP = 2**15  # pixels that are changed at once: they stay in the cache of a core
CENTRES = torch.tensor([6.0, 2.0, 4.0]).view(3, 1, 1)  # hues of red, green and blue; 6 is a circle


def change_colors(
    image: Tensor,
    brightness: float = 0.0,
    contrast: float = 1.0,
    contrast_last: bool = False,
    saturation: float = 1.0,
    turn: float = 0.0,
) -> Tensor:
    """Changes the colours of (3, H, W) uint8. All limits are those of 0..255.

    brightness:    is added to each channel
    contrast:      factor of each channel, after brightness or, if `contrast_last`, after all
    saturation:    factor of the distance to the largest channel (of HSV)
    turn:          is added to the hue; 1 is a whole turn; from -1/6 to 1/2
    """
    factor = 1.0 if contrast_last else contrast
    last_factor = contrast if contrast_last else 1.0
    changed = torch.empty(image.shape, dtype=torch.uint8)
    rows = max(1, STRIP // image.shape[2])
    for source, target in zip(image.split(rows, 1), changed.split(rows, 1)):
        strip = torch.empty(source.shape)  # (3, h, W), channel by channel
        strip.copy_(source)
        if brightness or factor != 1:
            strip.mul_(factor).add_(brightness * factor)
            strip.clamp_(0, 255 * min(1, factor))
        if saturation != 1 or turn:
            _change_hsv(strip, saturation, turn)
        strip.mul_(last_factor).clamp_(max=255)
        target.copy_(strip.round_().short())  # from float to uint8 torch converts one by one
    return changed


def _change_hsv(image: Tensor, saturation: float, turn: float) -> None:
    """Changes saturation and hue of (3, h, W) float in place; the largest channel stays as large.

    A channel is least + share * (most - least). The shares depend on the hue alone: with hues of 0
    to 6 and red at 0, that of red falls from 1 to 0 between the distances 1 and 2 from its hue.
    """
    most = image.amax(0)
    least = image.amin(0)
    spread = most - least
    shares = image.sub_(least).div_(spread.clamp(min=1e-3))
    if turn:
        red, green, blue = shares
        from_cyan = (2 + red).sub_(green).sub_(blue)  # distance to the hue 3: 0 to 3
        hue = from_cyan.copysign_(blue - green).add_(3 + 6 * turn)  # -0.6 to 6.6
        distance = torch.sub(hue, CENTRES, out=shares).abs_()
        distance.sub_(3).abs_().sub_(1).clamp_(0, 1)
    spread.mul_(saturation)
    torch.minimum(spread, most, out=spread)
    torch.sub(most, spread, out=least)
    torch.addcmul(least, shares, spread, out=image)
