"""Functions that draw boxes, masks, segments and image grids."""

import colorsys
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from common.batch import Batch
from common.drawing import (
    WHITE,
    Color,
    Plates,
    deepest,
    edges,
    enlarged,
    inside,
    overlay,
    shades,
    shortened,
    to_picture,
    to_tensor,
)
from common.files import atomic_path
from common.fonts import font_for, plain, tell_of_squares
from common.labels import Vocabulary
from common.masks import decode_masks

BACKGROUND = (32, 32, 32)


# -- Boxes and segments of one image ---------------------------------------------------------------


def color_of(name: str) -> Color:
    """Returns the RGB colour of a class name, which is the same in every picture and every run."""
    number = zlib.crc32(name.casefold().encode())  # hash() would differ between processes
    hue = (number % 24) / 24
    level = number // 24 % 3
    lightness = (0.38, 0.5, 0.66)[level]
    channels = colorsys.hls_to_rgb(hue, lightness, 0.95)
    return tuple(round(255 * channel) for channel in channels)


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    names: list[str],
    scores: Tensor | None = None,
    colors: list[Color] | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Draws N boxes with their names on a copy of `image` (3, H, W) uint8, and returns it.

    boxes:  (N, 4) xyxy in pixels of `image`, clipped to the image
    scores: (N,) in 0..1, written after the names
    colors: N RGB triples in 0..255. Default: `color_of(name)`.
    masks:  (N, H, W) bool, blended into the image below the boxes

    Enlarges images with a short side below about 480 pixels by an integer factor. The result is
    (3, factor * H, factor * W). Raises ValueError if there are not as many names as boxes.
    """
    boxes = boxes.detach().float().cpu()
    boxes = boxes.reshape(-1, 4)
    if len(names) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(names)} names")
    if colors is None:
        colors = [color_of(name) for name in names]
    if masks is not None:
        image = overlay(image, masks, colors, scores)
    picture, factor = enlarged(image)
    width, height = picture.size
    corners = inside(boxes * factor, width, height)
    draw = ImageDraw.Draw(picture)
    line_width = max(2, min(width, height) // 200)
    for box, color in zip(corners, colors):
        draw.rectangle(box, outline=color, width=line_width)
    # Names are written after all boxes, so that no line crosses a name.
    plates = Plates(picture)
    texts = _with_scores(names, scores)
    for (left, top, _, bottom), text, color in zip(corners, texts, colors):
        above = top - plates.height
        below = top + plates.height
        at_bottom = bottom + 1 - plates.height
        tops = [above, top, at_bottom, bottom + 1, below]
        plates.write(text, color, left, tops)
    return to_tensor(picture)


def draw_segments(
    image: Tensor, segments: Tensor, names: Sequence[str], scores: Tensor | None = None
) -> Tensor:
    """Tints the segments of `image` (3, H, W) uint8, draws white borders and writes their names.

    segments: (H, W) integers, the index into `names` of each pixel, or -1 for no segment
    scores:   (N,) in 0..1, written after the names

    Writes each name at the pixel of its segment farthest from the border. Leaves out the name if
    the segment is too thin or if other names cover the place. Segments of the same colour get
    different shades. Enlarges small images as `draw_boxes` does. Returns uint8. Raises ValueError
    for an index without a name.
    """
    segments = segments.cpu().long()
    if segments.numel():
        last = int(segments.max())
        if last >= len(names):
            raise ValueError(f"row {last} of the segments, but {len(names)} names")
    image = image.detach().cpu()
    colors = [color_of(name) for name in names]
    colors = shades(colors)
    palette = torch.tensor([*colors, BACKGROUND], dtype=torch.uint8)
    tints = palette[segments]
    tints = tints.permute(2, 0, 1)
    tinted = image // 2 + tints // 2
    image = torch.where(segments < 0, image, tinted)
    picture, factor = enlarged(image)

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
        tops = [top, top + height, top - height]
        plates.write(text, colors[row], left, tops, cover=False)
    return to_tensor(picture)


def _with_scores(names: Sequence[str], scores: Tensor | None) -> Sequence[str]:
    if scores is None:
        return names
    scored = zip(names, scores.tolist())
    return [f"{name} {score:.2f}" for name, score in scored]


# -- Grids of images -------------------------------------------------------------------------------


def grid(images: Sequence[Tensor], columns: int, captions: Sequence[str] | None = None) -> Tensor:
    """Arranges images (3, h, w) uint8 in rows of `columns`, each below its caption.

    Shrinks images to 1600 pixels at most and pads them to one size. Returns (3, H, W) uint8.
    """
    if captions is None:
        captions = [""] * len(images)
    pictures = [to_picture(image) for image in images]
    for picture in pictures:
        picture.thumbnail((1600, 1600))
    strip = 28 if any(captions) else 0
    widths = [picture.width for picture in pictures]
    heights = [picture.height for picture in pictures]
    cell_width = max(widths) + 4
    cell_height = max(heights) + 4 + strip
    rows = math.ceil(len(images) / columns)
    size = (cell_width * columns, cell_height * rows)
    sheet = Image.new("RGB", size, BACKGROUND)
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
        draw.text(position, text, font=font, fill=WHITE)
        sheet.paste(picture, (x, y + strip))
    return to_tensor(sheet)


def save_image(image: Tensor, path: Path | str) -> None:
    """Writes `image` (3, H, W) uint8 to `path` atomically, as jpg or png by the suffix.

    Raises ValueError for an unknown suffix.
    """
    with atomic_path(path) as temporary:
        to_picture(image).save(temporary, quality=92)


def training_grid(batch: Batch, vocabularies: dict[str, Vocabulary], limit: int = 16) -> Tensor:
    """Draws the first `limit` images of a batch with their annotations, (3, h, w) uint8.

    Image-level labels have no boxes and are listed in the caption.
    """
    for vocabulary in vocabularies.values():
        tell_of_squares(vocabulary.names)
    images = []
    captions = []
    shown = zip(batch.images[:limit], batch.sizes, batch.samples)
    for padded, (height, width), sample in shown:
        names = vocabularies[sample.dataset].names
        image = padded[:, :height, :width]
        images.append(_draw(image, vars(sample), names))
        words = []
        if sample.image_labels is not None:
            words = [names[label] for label in sample.image_labels.tolist()]
        source = f"{sample.dataset} {sample.image_id} ({sample.supervision})"
        labels = ", ".join(words)
        captions.append(f"{source} {labels}")
    columns = math.ceil(math.sqrt(len(images)))
    return grid(images, columns, captions)


def _draw(image: Tensor, record: dict, names: Sequence[str]) -> Tensor:
    """Draws the segments of `record` if it has any, else its boxes and masks."""
    labels = [names[label] for label in record["labels"].tolist()]
    scores = record.get("scores")
    segments = record.get("segments")
    if segments is not None:
        return draw_segments(image, segments, labels, scores)
    masks = record.get("masks")
    return draw_boxes(image, record["boxes"], labels, scores, masks=masks)


def prediction_grid(
    images: Sequence[Tensor],
    targets: Sequence[dict],
    predictions: Sequence[dict],
    names: Sequence[str],
    limit: int = 8,
    min_score: float = 0.3,
) -> Tensor:
    """Draws the first `limit` images with ground truth on the left and predictions on the right.

    images:      sequence of (3, H, W) uint8
    targets:     one dict per image: `labels` (N,), index into `names`, and either `segments`
                 (H, W), index into `labels` or -1, or `boxes` (N, 4) xyxy in pixels of the image.
                 `masks` (N, H, W) bool may come with boxes.
    predictions: the same with `scores` (N,), and with `segmentations` (N RLEs) instead of `masks`

    Of an image's boxes, shows the 30 best with a score of `min_score` or more. Shows all segments.
    Returns (3, h, w) uint8.
    """
    pictures = []
    captions = []
    shown = list(zip(images, targets, predictions))
    for image, target, found in shown[:limit]:
        caption = "prediction"
        if "segments" not in found:
            _, height, width = image.shape
            found = _best_boxes(found, min_score, (height, width))
            caption = f"prediction, score >= {min_score:g}"
        pictures.append(_draw(image, target, names))
        pictures.append(_draw(image, found, names))
        captions.append("ground truth")
        captions.append(caption)
    columns = 2 if len(pictures) <= 6 else 4
    return grid(pictures, columns, captions)


def _best_boxes(prediction: dict, min_score: float, size: tuple[int, int]) -> dict:
    """Returns at most 30 boxes with `min_score` or more, best first, with their decoded masks."""
    scores = prediction["scores"]
    passing = scores >= min_score
    count = int(passing.sum())
    count = min(30, count)
    best = scores.argsort(descending=True)[:count]
    shown = {field: prediction[field][best] for field in ("boxes", "labels", "scores")}
    if "segmentations" in prediction:
        rles = [prediction["segmentations"][i] for i in best.tolist()]
        shown["masks"] = decode_masks(rles, size)
    return shown


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
