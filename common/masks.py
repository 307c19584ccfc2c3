"""Instance masks: COCO's segmentations to pixels and back, and the square masks of mask heads."""

from typing import TYPE_CHECKING

import hotcoco
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from common.errors import InputError

if TYPE_CHECKING:
    from common.datasets.index import Index


def mask_of(annotation: dict) -> list | dict | None:
    """Returns the `segmentation` of a COCO annotation; None if it has no mask.

    Exports of boxes write no field, null, [] or [[]]. Polygons of fewer than three points have no
    pixel. A list of points [x, y] is no polygon: `to_rle` refuses it.
    """
    segmentation = annotation.get("segmentation") or None
    if not isinstance(segmentation, list):
        return segmentation
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) >= 6:
            return segmentation
        if any(isinstance(point, list) for point in polygon):
            return segmentation
    return None


def have_pixels(masks: Tensor) -> Tensor:
    """Tells which masks (N, H, W) bool have a pixel: (N,) bool."""
    values = masks.flatten(1).view(torch.uint8)
    return values.amax(1).bool()  # torch's any of bool takes 30 times as long on a CPU


def share_inside(masks: Tensor, truth: Tensor, rows: Tensor) -> Tensor:
    """Returns the share of each mask that lies in its ground truth, 0 if it has no pixel: (M,).

    masks: (M, h, w) bool
    truth: (N, h, w) in 0..1, the share of each cell that is in the ground truth
    rows:  (M,), row in `truth` of each mask
    """
    area = truth.flatten(1)  # (N, h * w)
    pixels = masks.flatten(1).float()
    common = pixels @ area.T  # (M, N)
    own = common.gather(1, rows[:, None])
    return own.squeeze(1) / pixels.sum(1).clamp(min=1)


def to_rle(segmentation: list | dict, size: tuple[int, int], relative: bool = False) -> dict:
    """Converts COCO's polygons or RLE to a compressed RLE, {"size": [H, W], "counts": ...}.

    `counts` is str or bytes. The pixels are those of pycocotools. Polygons of fewer than three
    points have no pixels, as in detectron2. A compressed RLE is returned itself.
    segmentation: list of polygons, or an RLE with a list, str or bytes as counts
    size:         (height, width) of the image
    relative:     the polygons are in fractions of the image
    Raises ValueError if `segmentation` is neither of them, if the RLE has another size, or if its
    runs do not fill the image exactly.
    """
    height, width = size
    try:
        if relative:
            corners = [np.reshape(polygon, (-1, 2)) * (width, height) for polygon in segmentation]
            segmentation = [points.ravel().tolist() for points in corners]
        if isinstance(segmentation, list):
            return _polygons_to_rle(segmentation, height, width)
        rle_size = segmentation["size"]
        counts = segmentation["counts"]
        if tuple(rle_size) != (height, width):
            wanted = [height, width]
            raise ValueError(f"an RLE of size {rle_size} for an image of {wanted} (height, width)")
        rle = segmentation
        if isinstance(counts, str) and counts.startswith(("b'", 'b"')):
            raise ValueError("an RLE of counts that Python's str() made; write counts.decode()")
        if not isinstance(counts, str | bytes):
            rle = hotcoco.mask.frPyObjects(segmentation, height, width)
    except (TypeError, KeyError) as error:
        start = str(segmentation)[:40]
        raise ValueError(f"{start} is neither a list of polygons nor an RLE ({error})") from None
    area_of(rle)  # raises ValueError if it cannot be read or its runs exceed the image
    smaller_size = [1, height * width - 1]
    smaller = {"size": smaller_size, "counts": rle["counts"]}
    try:
        area_of(smaller)
    except ValueError:
        return rle  # its runs exceed an image of one pixel less, so they fill this one
    raise ValueError(f"an RLE whose counts sum to less than {height} x {width} pixels")


def _polygons_to_rle(polygons: list, height: int, width: int) -> dict:
    """Returns the union of the polygons; raises TypeError if one is not a flat list of numbers."""
    whole = []
    for polygon in polygons:
        if len(polygon) >= 6:
            whole.append(polygon)  # hotcoco checks its numbers
            continue
        for x in polygon:
            if not isinstance(x, int | float):
                raise TypeError("a polygon is a flat list of numbers x, y, x, y, ...")
    if whole:
        parts = hotcoco.mask.frPyObjects(whole, height, width)
        return hotcoco.mask.merge(parts)
    runs = [height * width]  # one run, of background
    empty = {"size": [height, width], "counts": runs}
    return hotcoco.mask.frPyObjects(empty, height, width)


def decode_masks(segmentations: list, size: tuple[int, int], relative: bool = False) -> Tensor:
    """Decodes N COCO segmentations to masks (N, H, W) bool; size is (H, W).

    None, a box without a mask, has no pixel. relative: as in `to_rle`
    Raises ValueError as `to_rle` does.
    """
    masks = np.zeros((len(segmentations), *size), bool)
    for mask, segmentation in zip(masks, segmentations):
        if segmentation is None:
            continue
        rle = to_rle(segmentation, size, relative)
        left, top, width, height = map(int, hotcoco.mask.toBbox(rle))
        # most masks fill a small part of the image
        part = (slice(top, top + height), slice(left, left + width))
        mask[part] = hotcoco.mask.decode(rle)[part]
    return torch.from_numpy(masks)


def annotated_rles(index: "Index", sizes: list[tuple[int, int]]) -> list[dict]:
    """Returns the masks of all boxes of an `Index` as RLEs. Without a mask it is the box.

    sizes: (height, width) of each image
    Raises InputError that names the image whose segmentation is broken.
    """
    rles = []
    for row, image in enumerate(index.image_of.tolist()):
        segmentation = index.segmentations[row]
        if segmentation is None:
            x1, y1, x2, y2 = index.boxes[row].tolist()
            segmentation = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        try:
            rles.append(to_rle(segmentation, sizes[image], index.relative))
        except ValueError as error:
            place = f"{index.source}: image {index.image_ids[image]!r}"
            raise InputError(f"{place} has {error}; mend it") from None
    return rles


def encode_masks(masks: Tensor) -> list[dict]:
    """Encodes masks (N, H, W) bool as N RLEs of COCO's json: {"size": [H, W], "counts": str}."""
    encoded = []
    for mask in masks.cpu():
        pixels = np.asarray(mask)
        rle = hotcoco.mask.encode(pixels)
        size = [int(side) for side in rle["size"]]
        counts = rle["counts"].decode()
        encoded.append({"size": size, "counts": counts})
    return encoded


def drop_unseen(segments: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the labels (N,) without a pixel in segments (H, W), and renumbers the segments.

    Returns (segments, labels): the arguments themselves if no label is dropped, otherwise copies.
    """
    rows = segments.numpy()
    shifted = rows.ravel() + 1  # from 0
    pixels = np.bincount(shifted, minlength=len(labels) + 1)
    seen = pixels[1:] > 0  # (N,)
    if seen.all():
        return segments, labels
    new_row = np.cumsum(seen) - 1
    new_row = np.append(new_row, -1)  # the last entry is that of row -1
    new_row = new_row.astype(np.int16)
    rows = new_row[rows]
    segments = torch.from_numpy(rows)
    seen = torch.from_numpy(seen)
    return segments, labels[seen]


def area_of(rle: dict) -> int:
    """Returns the number of pixels in a compressed RLE; raises ValueError if it is malformed."""
    return int(hotcoco.mask.area(rle))


def crop_masks(masks: Tensor, boxes: Tensor, size: int, rows: Tensor | None = None) -> Tensor:
    """Crops masks to boxes and resizes them by RoIAlign: (R, size, size) bool.

    A pixel is True if the resized mask is at least 0.5.
    masks: (N, H, W) bool; boxes: (R, 4) xyxy
    rows:  (R,), row in `masks` of each box; without it, box i has mask i
    Source: facebookresearch/detectron2:detectron2/structures/masks.py (BitMasks.crop_and_resize).
    """
    if rows is None:
        rows = torch.arange(len(masks), device=boxes.device)
    rows = rows[:, None].to(boxes)  # (R, 1)
    rois = torch.cat([rows, boxes], 1)  # (R, 5)
    masks = masks[:, None].to(boxes)  # (N, 1, H, W)
    crops = roi_align(masks, rois, size, sampling_ratio=0, aligned=True)
    crops = crops.squeeze(1)
    return crops >= 0.5


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Pastes the square masks of a mask head into the image: (N, H, W) bool.

    A pixel is True if the mask, sampled bilinearly at the pixel's centre, is at least `threshold`.
    Pixels outside the box are False. Each box is sampled alone and within its own window, so that
    only the result is as large as the image.
    probabilities: (N, s, s); boxes: (N, 4) xyxy; size: (H, W) of the image
    Source: facebookresearch/detectron2:detectron2/layers/mask_ops.py (paste_masks_in_image).
    """
    height, width = size
    device = probabilities.device
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=device)
    probabilities = probabilities.float()
    boxes = boxes.detach().float()
    boxes = boxes.nan_to_num(0)
    lows, highs = boxes.chunk(2, 1)
    limits = torch.tensor([width, height, width, height])
    first = lows.floor()
    last = highs.ceil()
    windows = torch.cat([first, last], 1).cpu()
    windows = windows.clamp(min=0)
    windows = windows.minimum(limits)
    windows = windows.int()  # (N, 4) pixels that the box touches
    for i, (x1, y1, x2, y2) in enumerate(windows.tolist()):
        if x1 >= x2 or y1 >= y2:
            continue
        left, top = lows[i]
        extent = highs[i] - lows[i]
        extent = extent.clamp(min=1e-6)
        box_width, box_height = extent
        x = _pixel_centres(x1, x2, left, box_width)  # (w,)
        y = _pixel_centres(y1, y2, top, box_height)  # (h,)
        points = torch.meshgrid(x, y, indexing="xy")
        points = torch.stack(points, -1)  # (h, w, 2)
        points = points[None]
        probability = probabilities[i, None, None]
        values = F.grid_sample(probability, points, align_corners=False)
        inside = values[0, 0] >= threshold
        pasted[i, y1:y2, x1:x2] = inside
    return pasted


def _pixel_centres(start: int, end: int, low: Tensor, extent: Tensor) -> Tensor:
    """Returns the centres of pixels start to end - 1, scaled so that the box spans -1 to 1."""
    pixels = torch.arange(start, end, device=low.device)
    centres = pixels + 0.5
    fraction = (centres - low) / extent
    return fraction * 2 - 1


def paste_rles(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict]:
    """Returns the masks of `paste_masks` as N RLEs, with one full-size mask in memory at a time."""
    rles = []
    for probability, box in zip(probabilities, boxes):
        masks = paste_masks(probability[None], box[None], size)
        rles += encode_masks(masks)
    return rles


def rasterise(boxes: Tensor, size: tuple[int, int], stride: int = 4) -> tuple[Tensor, Tensor]:
    """Returns (rows, columns) that boxes cover: (N, h) and (N, w) float, 1 if covered, else 0.

    A cell of the grid is covered if the pixel at its centre is in the box, whose edges are rounded
    outwards. A box without such a cell covers the cell of its centre.
    boxes: (N, 4) in pixels; size: (h, w) of the grid; stride: side of a cell in pixels
    Source: aim-uofa/AdelaiDet:adet/modeling/condinst/condinst.py (add_bitmasks_from_boxes).
    """
    height, width = size
    left, top, right, bottom = boxes.split(1, 1)  # (N, 1)
    rows = _covered(top, bottom, height, stride)
    columns = _covered(left, right, width, stride)
    return rows, columns


def _covered(low: Tensor, high: Tensor, length: int, stride: int) -> Tensor:
    """Returns 1 for cells that low (N, 1) to high (N, 1) covers, 0 for others: (N, length)."""
    cell = torch.arange(length, device=low.device)
    pixel = cell * stride + stride // 2
    start = low.floor()
    end = high + 1
    end = end.floor()
    after_start = pixel >= start  # (N, length)
    before_end = pixel < end
    inside = after_start & before_end
    covers_any = inside.any(1, keepdim=True)
    middle = (low + high) / 2
    middle = middle // stride
    middle = middle.long()
    middle = middle.clamp(0, length - 1)
    at_middle = cell == middle
    inside |= at_middle & ~covers_any
    return inside.float()
