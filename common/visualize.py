"""Functions that draw boxes, masks, segments and image grids."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

from common.batch import Sample
from common.class_colors import Color, assign_colors, color_of
from common.drawing import (
    Plates,
    deepest,
    edges,
    enlarged,
    inside,
    overlay,
    shortened,
    to_picture,
    to_tensor,
)
from common.files import atomic_path
from common.fonts import font_for, plain, tell_of_squares
from common.labels import Vocabulary
from common.masks import decode_masks

VOID = (32, 32, 32)  # of pixels without a segment; it is not drawn
PAPER = (255, 255, 255)
INK = (20, 20, 20)
WIDEST = 2000  # pixels of a grid
CELL = 480  # pixels of the sides that smaller images are enlarged to
GAP = 4  # pixels between cells
MOST_BOXES = 20  # of an image
PER_OBJECT = 2  # boxes that share a place, such as the two best labels of an object


# -- Boxes and segments of one image ---------------------------------------------------------------


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    names: list[str],
    scores: Tensor | None = None,
    colors: list[Color] | None = None,
    masks: Tensor | None = None,
    enlarge: bool = True,
) -> Tensor:
    """Draws N boxes with their names on a copy of `image` (3, H, W) uint8, and returns it.

    boxes:  (N, 4) xyxy in pixels of `image`, clipped to the image
    scores: (N,) in 0..1, written after the names
    colors: N RGB triples in 0..255. Default: `color_of(name)`.
    masks:  (N, H, W) bool, blended into the image below the boxes

    With `enlarge`, images with a short side below about 480 pixels are enlarged by an integer
    factor. The result is (3, factor * H, factor * W).
    Raises ValueError if there are not as many names as boxes.
    """
    boxes = boxes.detach().float().cpu()
    boxes = boxes.reshape(-1, 4)
    if len(names) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(names)} names")
    if colors is None:
        colors = [color_of(name) for name in names]
    if masks is not None:
        image = overlay(image, masks, colors, scores)
    picture, factor = enlarged(image, enlarge)
    width, height = picture.size
    corners = inside(boxes * factor, width, height)
    draw = ImageDraw.Draw(picture)
    line_width = max(2, min(width, height) // 200)
    for box, color in zip(corners, colors):
        draw.rectangle(box, outline=color, width=line_width)
    # Names are written after all boxes, so that no line crosses a name.
    plates = Plates(picture)
    texts = _with_scores(names, scores)
    objects = np.array(corners)
    for box, text, color in zip(corners, texts, colors):
        spots = spots_around(box, plates.width(text), plates.height)
        plates.write(text, color, spots, objects)
    return to_tensor(picture)


def spots_around(box: list[int], width: int, height: int) -> list[tuple[int, int]]:
    """Returns the left and top of a plate (width, height) above, below, beside and in a box."""
    left, top, right, bottom = box
    end = right + 1 - width
    above, below, at_bottom = top - height, bottom + 1, bottom + 1 - height
    outside = [(left, above), (end, above), (left, below), (end, below)]
    beside = [(right + 1, top), (left - width, top), (right + 1, at_bottom)]
    return outside + beside + [(left, top), (left, at_bottom), (left, top + height)]


def draw_segments(
    image: Tensor,
    segments: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    enlarge: bool = True,
) -> Tensor:
    """Tints the segments of `image` (3, H, W) uint8, draws white borders and writes their names.

    segments: (H, W) integers, the index into `names` of each pixel, or -1 for no segment
    scores:   (N,) in 0..1, written after the names

    Writes each name at the pixel of its segment farthest from the border. Leaves out the name if
    the segment is too thin or if other names cover the place. Enlarges small images as `draw_boxes`
    does. Returns uint8. Raises ValueError for an index without a name.
    """
    segments = segments.cpu().long()
    if segments.numel():
        last = int(segments.max())
        if last >= len(names):
            raise ValueError(f"row {last} of the segments, but {len(names)} names")
    image = image.detach().cpu()
    colors = [color_of(name) for name in names]
    palette = torch.tensor([*colors, VOID], dtype=torch.uint8)
    tints = palette[segments]
    tints = tints.permute(2, 0, 1)
    tinted = image // 2 + tints // 2
    image = torch.where(segments < 0, image, tinted)
    picture, factor = enlarged(image, enlarge)

    rows = segments.numpy().repeat(factor, axis=0)
    rows = rows.repeat(factor, axis=1)
    line_width = max(2, min(picture.size) // 300)
    lines = edges(rows)
    lines = ndimage.maximum_filter(lines, size=line_width)
    lines = Image.fromarray(lines)
    picture.paste("white", mask=lines)

    plates = Plates(picture)
    height = plates.height
    texts = _with_scores(names, scores)
    for row, depth, x, y in deepest(segments.numpy()):
        if depth * factor <= height / 3:
            continue
        text = texts[row]
        width = plates.width(text)
        left = x * factor - width // 2
        top = y * factor - height // 2
        spots = [(left, top), (left, top + height), (left, top - height)]
        plates.write(text, colors[row], spots, cover=False)
    return to_tensor(picture)


def _with_scores(names: Sequence[str], scores: Tensor | None) -> Sequence[str]:
    if scores is None:
        return names
    scored = zip(names, scores.tolist())
    return [f"{name} {score:.2f}" for name, score in scored]


# -- Grids of images -------------------------------------------------------------------------------


def cell_size(sizes: Sequence[tuple[int, int]], columns: int) -> tuple[int, int]:
    """Returns the (height, width) of a grid's cells for images of these sizes (height, width).

    Their shape is that of the median image. Their width is that of the median image, but at least
    CELL, and at most what makes the grid WIDEST.
    """
    heights, widths = np.array(sizes).T
    ratio = float(np.median(heights / widths).clip(0.4, 2.5))
    width = min(WIDEST // columns - GAP, max(CELL, int(np.median(widths))))
    return round(width * ratio), width


def grid(images: Sequence[Tensor], columns: int, captions: Sequence[str] | None = None) -> Tensor:
    """Arranges images (3, h, w) uint8 in rows of `columns`, each below its caption, on white.

    The cells have the size of the largest image. Returns (3, H, W) uint8.
    """
    if captions is None:
        captions = [""] * len(images)
    pictures = [to_picture(image) for image in images]
    strip = 28 if any(captions) else 0
    widths = [picture.width for picture in pictures]
    heights = [picture.height for picture in pictures]
    cell_width = max(widths) + GAP
    cell_height = max(heights) + GAP + strip
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    size = (cell_width * columns, cell_height * rows)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    cells = zip(pictures, captions, strict=True)
    for i, (picture, caption) in enumerate(cells):
        row, column = divmod(i, columns)
        x = column * cell_width
        y = row * cell_height
        text = plain(caption)
        font = font_for(text, 18)
        text = shortened(text, font, cell_width - 12)
        position = (x + 4, y + 3)
        draw.text(position, text, font=font, fill=INK)
        sheet.paste(picture, (x, y + strip))
    return to_tensor(sheet)


def save_image(image: Tensor, path: Path | str) -> None:
    """Writes `image` (3, H, W) uint8 to `path` atomically, as jpg or png by the suffix.

    Raises ValueError for an unknown suffix.
    """
    with atomic_path(path) as temporary:
        to_picture(image).save(temporary, quality=92)


def sample_grid(samples: Sequence[Sample], vocabularies: dict[str, Vocabulary]) -> Tensor:
    """Draws samples with their annotations, (3, h, w) uint8, h and w at most about WIDEST.

    Image-level labels have no boxes and are listed in the caption.
    """
    for vocabulary in vocabularies.values():
        tell_of_squares(vocabulary.names)
        assign_colors(vocabulary.names)
    columns = min(4, math.ceil(math.sqrt(len(samples))))
    cell = cell_size([sample.size for sample in samples], columns)
    images = []
    captions = []
    for sample in samples:
        names = vocabularies[sample.dataset].names
        images.append(_draw(sample.image, vars(sample), names, cell))
        words = []
        if sample.image_labels is not None:
            words = [names[label] for label in sample.image_labels.tolist()]
        source = f"{sample.dataset} {sample.image_id} ({sample.supervision})"
        labels = ", ".join(words)
        captions.append(f"{source} {labels}")
    return grid(images, columns, captions)


def _draw(image: Tensor, record: dict, names: Sequence[str], cell: tuple[int, int]) -> Tensor:
    """Draws the segments of `record` if it has any, else its boxes and masks, to fit a cell.

    The image is scaled before, so that lines and letters are as large in each cell.
    """
    labels = [names[label] for label in record["labels"].tolist()]
    scores = record.get("scores")
    height, width = image.shape[-2:]
    scale = min(cell[0] / height, cell[1] / width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    picture = to_picture(image).resize(size[::-1], Image.Resampling.BICUBIC)
    image = to_tensor(picture)
    segments = record.get("segments")
    if segments is not None:
        return draw_segments(image, nearest(segments, size), labels, scores, enlarge=False)
    masks = record.get("masks")
    if masks is not None:
        masks = nearest(masks, size)
    boxes = record["boxes"] * scale
    return draw_boxes(image, boxes, labels, scores, masks=masks, enlarge=False)


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes maps (..., H, W) of any type to `size` by the nearest pixel."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, maps.shape[-2:])
    )
    return maps.cpu()[..., rows[:, None], columns]


def prediction_grid(
    images: Sequence[Tensor],
    targets: Sequence[dict],
    predictions: Sequence[dict],
    names: Sequence[str],
    titles: Sequence[str],
    min_score: float = 0.3,
) -> Tensor:
    """Draws images with the ground truth on the left and the prediction on the right.

    images:      sequence of (3, H, W) uint8
    targets:     one dict per image: `labels` (N,), index into `names`, and either `segments`
                 (H, W), index into `labels` or -1, or `boxes` (N, 4) xyxy in pixels of the image.
                 `masks` (N, H, W) bool may come with boxes.
    predictions: the same with `scores` (N,), and with `segmentations` (N RLEs) instead of `masks`
    titles:      the caption of each image's ground truth, or ""

    Of an image's boxes, shows the `best_boxes`, and says how many there are. Shows all segments.
    Returns (3, h, w) uint8.
    """
    pictures = []
    captions = []
    assign_colors(names)
    columns = 2 if len(images) <= 3 else 4
    cell = cell_size([image.shape[-2:] for image in images], columns)
    for image, target, found, title in zip(images, targets, predictions, titles, strict=True):
        caption = "prediction"
        if "segments" not in found:
            _, height, width = image.shape
            likely = int((found["scores"] >= min_score).sum())
            found = _shown_boxes(found, min_score, (height, width))
            caption = f"prediction, score >= {min_score:g}"
            if len(found["boxes"]) < likely:
                caption += f", {len(found['boxes'])} of {likely} boxes"
        pictures.append(_draw(image, target, names, cell))
        pictures.append(_draw(image, found, names, cell))
        captions.append(title or "ground truth")
        captions.append(caption)
    return grid(pictures, columns, captions)


def _shown_boxes(prediction: dict, min_score: float, size: tuple[int, int]) -> dict:
    """Returns the `best_boxes` with their masks decoded."""
    best = best_boxes(prediction["boxes"], prediction["scores"], min_score)
    shown = {field: prediction[field][best] for field in ("boxes", "labels", "scores")}
    if "segmentations" in prediction:
        rles = [prediction["segmentations"][i] for i in best.tolist()]
        shown["masks"] = decode_masks(rles, size)
    return shown


def best_boxes(boxes: Tensor, scores: Tensor, min_score: float) -> Tensor:
    """Returns the rows of the boxes that are drawn, best first: more would hide the image.

    These are at most MOST_BOXES with a score of `min_score` or more. A box that overlaps PER_OBJECT
    better ones, of any class, with an IoU of 0.4 or more is left out.
    boxes: (N, 4) xyxy; scores: (N,)
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= min_score]
    kept: list[int] = []
    for row in order.tolist():
        if len(kept) == MOST_BOXES:
            break
        overlaps = box_iou(boxes[row : row + 1], boxes[kept])
        if int((overlaps >= 0.4).sum()) < PER_OBJECT:
            kept.append(row)
    return torch.tensor(kept, dtype=torch.long)


def draw_curves(metrics: Path, keys: dict[str, str], ylabel: str, path: Path) -> None:
    """Draws metrics over the steps of a training to `path`.

    metrics: metrics.jsonl of a run folder
    keys:    {metric: its name in the legend}
    """
    from matplotlib.figure import Figure  # here, since it takes half a second

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    for key, name in keys.items():
        values = [record[key] for record in records]
        axes.plot(steps, values, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
