"""Parts of `common.visualize`: colours, placement of names, conversion between tensors and PIL."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from common.class_colors import Color
from common.fonts import font_for, plain

BLACK = (0, 0, 0)
WHITE = (255, 255, 255)
PLATE_COST = 10  # of a covered plate, in covered objects


def edges(rows: np.ndarray) -> np.ndarray:
    """Returns (H, W) bool: the pixels that differ from their right or lower neighbour."""
    vertical = np.diff(rows, axis=0) != 0
    horizontal = np.diff(rows, axis=1) != 0
    below = np.pad(vertical, ((0, 1), (0, 0)))
    right = np.pad(horizontal, ((0, 0), (0, 1)))
    return below | right


def deepest(segments: np.ndarray) -> list[tuple[int, float, int, int]]:
    """Finds the pixel of each segment of `segments` (H, W) that is farthest from the border.

    Returns (row, distance to the border, x, y) of each, sorted by descending distance.
    """
    longest = max(segments.shape)
    step = max(1, longest // 600)  # a coarse map suffices to place a name
    coarse = segments[::step, ::step]
    padded = np.pad(~edges(coarse), 1)  # the image border also counts as a border
    depth = ndimage.distance_transform_edt(padded)
    depth = depth[1:-1, 1:-1]
    foreground = coarse >= 0
    rows = np.unique(coarse[foreground])
    positions = ndimage.maximum_position(depth, coarse, rows)
    found = []
    for row, (y, x) in zip(rows, positions):
        distance = float(depth[y, x]) * step
        found.append((int(row), distance, x * step, y * step))
    return sorted(found, key=lambda place: -place[1])


def overlay(image: Tensor, masks: Tensor, colors: list[Color], scores: Tensor | None) -> Tensor:
    """Returns a copy of the image (3, H, W) uint8 with the colours of the masks blended in, 50 %.

    masks: (N, H, W) bool; scores: (N,). Masks with higher scores are painted last. Without scores,
    smaller masks are painted last.
    """
    image = image.detach().cpu().clone()
    masks = masks.cpu()
    halves = torch.tensor(colors, dtype=torch.uint8) // 2
    halves = halves.view(-1, 3, 1)
    areas = masks.sum((1, 2))
    order = areas.argsort(descending=True)
    if scores is not None:
        order = scores.argsort()
    for row in order.tolist():
        mask = masks[row]
        image[:, mask] = image[:, mask] // 2 + halves[row]
    return image


def to_picture(image: Tensor) -> Image.Image:
    """Converts an image (3, H, W) uint8 to a PIL picture."""
    image = image.detach().cpu()
    channels_last = image.permute(1, 2, 0).contiguous()
    pixels = channels_last.numpy()
    return Image.fromarray(pixels)


def to_tensor(picture: Image.Image) -> Tensor:
    """Converts a PIL picture to a tensor (3, H, W) uint8."""
    pixels = np.array(picture)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def enlarged(image: Tensor, wanted: bool = True) -> tuple[Image.Image, int]:
    """Enlarges a small image to a short side of about 480 pixels, and returns the factor too.

    If it is not `wanted`, the factor is 1.
    """
    picture = to_picture(image)
    if not wanted:
        return picture, 1
    short_side = min(picture.size)
    long_side = max(picture.size)
    needed = round(480 / short_side)
    largest = 2000 // long_side
    factor = max(1, min(needed, largest))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST), factor


def inside(boxes: Tensor, width: int, height: int) -> list[list[int]]:
    """Clips boxes (N, 4) to the picture and rounds them to integers.

    Moves the second corner if it is left of or above the first. Replaces NaN by 0.
    """
    last_pixel = torch.tensor([width - 1, height - 1] * 2)
    boxes = boxes.nan_to_num(0)
    boxes = boxes.clamp(min=0)
    boxes = torch.minimum(boxes, last_pixel)
    first, second = boxes.split(2, 1)
    second = torch.maximum(first, second)
    corners = torch.cat([first, second], 1)
    return corners.round().int().tolist()


class Plates:
    """Names on coloured rectangles in a picture, placed without overlap where there is room."""

    def __init__(self, picture: Image.Image):
        self.draw = ImageDraw.Draw(picture)
        self.size = picture.size
        self.taken = []
        self.font_size = max(14, min(picture.size) // 34)
        ascent, descent = self.font("").getmetrics()
        _, accent_top, _, _ = self.font("Ấ").getbbox("Ấ", anchor="ls")  # may be above the ascent
        self.ascent = max(ascent, -accent_top)
        self.height = self.ascent + descent + 2

    def font(self, text: str) -> ImageFont.FreeTypeFont:
        """Returns the font of a `plain` text."""
        return font_for(text, self.font_size)

    def width(self, text: str) -> int:
        """Returns the width in pixels of the plate of `text`."""
        text = plain(text)
        return math.ceil(self.font(text).getlength(text)) + 6

    def write(
        self,
        text: str,
        color: Color,
        spots: Sequence[tuple[int, int]],
        boxes: np.ndarray | None = None,
        cover: bool = True,
    ) -> None:
        """Writes `text` at the first of `spots` where its plate covers least.

        spots: left and top of a plate of the width of `text`, moved into the picture
        boxes: (N, 4) xyxy, objects that it should not cover; a small one is soon covered as a whole
        cover: if False, nothing is written where each spot overlaps another plate
        """
        text = plain(text)
        font = self.font(text)
        text = shortened(text, font, self.size[0] - 6)
        width = self.width(text)
        rightmost = self.size[0] - width
        lowest = self.size[1] - self.height
        plates = []
        for left, top in spots:
            x = max(0, min(left, rightmost))
            y = max(0, min(top, lowest))
            plates.append((x, y, x + width - 1, y + self.height - 1))
        on_plates = covered(plates, self.taken).sum(axis=1)
        if not cover and on_plates.min() > 0:
            return
        costs = PLATE_COST * on_plates
        if boxes is not None:
            costs = costs + covered(plates, boxes).sum(axis=1)
        plate = plates[int(costs.argmin())]
        self.taken.append(plate)
        self.draw.rectangle(plate, fill=color)
        red, green, blue = color
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        fill = BLACK if luminance > 130 else WHITE
        baseline = (plate[0] + 3, plate[1] + 1 + self.ascent)
        self.draw.text(baseline, text, font=font, fill=fill, anchor="ls")


def covered(plates: Sequence, boxes: Sequence) -> np.ndarray:
    """Returns (P, N): the share of each box that each plate covers. Both are xyxy, ends count."""
    plates = np.asarray(plates).reshape(-1, 1, 4)
    boxes = np.asarray(boxes).reshape(1, -1, 4)
    first = np.maximum(plates[..., :2], boxes[..., :2])
    last = np.minimum(plates[..., 2:], boxes[..., 2:])
    common = (last - first + 1).clip(min=0).prod(axis=-1)
    return common / (boxes[..., 2:] - boxes[..., :2] + 1).prod(axis=-1)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cuts `text` to `width` pixels, with "..." at the end of a cut text."""
    text = text[:300]  # bounds the time, since each length is measured
    if font.getlength(text) <= width:
        return text
    for length in range(len(text), 0, -1):
        if font.getlength(text[:length] + "...") <= width:
            return text[:length] + "..."
    return "..."
