"""Pictures for people: boxes, masks and segments on images, grids, and the similarity of labels."""

import colorsys
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage
from torch import Tensor

from common.batch import Batch
from common.files import atomic_path
from common.labels import LabelSpace, Vocabulary
from common.masks import decode_masks

Color = tuple[int, int, int]
BACKGROUND: Color = (32, 32, 32)
WHITE: Color = (255, 255, 255)


def color_of(name: str) -> Color:
    """Returns the RGB colour of a class name, the same in every picture and every run."""
    number = zlib.crc32(name.casefold().encode())  # unlike hash(), the same in every process
    hue = (number % 24) / 24
    lightness = (0.38, 0.5, 0.66)[number // 24 % 3]
    channels = colorsys.hls_to_rgb(hue, lightness, 0.95)
    return tuple(round(255 * channel) for channel in channels)


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    names: list[str],
    scores: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Draws N boxes with their names on an image (3, H, W) uint8 and returns it as (3, h, w) uint8.

    boxes:  (N, 4) xyxy in pixels of `image`, clipped to it
    scores: (N,) in 0..1, written behind the names
    masks:  (N, H, W) bool, blended into the image below the boxes

    Enlarges a short side below about 480 pixels by an integer factor. Raises ValueError if there
    are not as many names as boxes.
    """
    boxes = boxes.detach().float().cpu().reshape(-1, 4)
    if len(names) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(names)} names")
    colors = [color_of(name) for name in names]
    if masks is not None:
        image = _overlay(image, masks, colors, scores)
    picture, factor = _enlarge(image)
    corners = _clip(boxes * factor, *picture.size)
    draw = ImageDraw.Draw(picture)
    width = max(2, min(picture.size) // 200)
    for box, color in zip(corners, colors):
        draw.rectangle(box, outline=color, width=width)
    # after all boxes, so that no line crosses a name
    plates = _Plates(picture)
    high = plates.text_height
    texts = _with_scores(names, scores)
    for (left, top, _, bottom), text, color in zip(corners, texts, colors):
        tops = [top - high, top, bottom - high + 1, bottom + 1, top + high]
        plates.write(text, color, left, tops, cover=True)
    return _to_tensor(picture)


def draw_segments(
    image: Tensor, segments: Tensor, names: Sequence[str], scores: Tensor | None = None
) -> Tensor:
    """Tints the segments of an image (3, H, W) uint8 and returns it as (3, h, w) uint8.

    segments: (H, W) integers, the index in `names` for each pixel, or -1 for no segment
    scores:   (N,) in 0..1, written behind the names

    White lines separate the segments. A name is written at the pixel farthest from the borders of
    its segment, unless the segment is too thin or other names leave no room. Enlarges small images
    as `draw_boxes` does. Raises ValueError for an index without a name.
    """
    image = image.cpu()
    segments = segments.cpu().long()
    if segments.numel() and segments.max() >= len(names):
        raise ValueError(f"row {int(segments.max())} of the segments, but {len(names)} names")
    colors = _shades([color_of(name) for name in names])
    palette = torch.tensor([*colors, BACKGROUND], dtype=torch.uint8)  # -1 is the last row
    tint = palette[segments].permute(2, 0, 1)  # (3, H, W)
    blended = image // 2 + tint // 2
    picture, factor = _enlarge(torch.where(segments < 0, image, blended))
    rows = segments.numpy()
    enlarged = rows.repeat(factor, axis=0).repeat(factor, axis=1)
    width = max(2, min(picture.size) // 300)
    lines = ndimage.maximum_filter(_edges(enlarged), size=width)
    picture.paste("white", mask=Image.fromarray(lines))
    plates = _Plates(picture)
    high = plates.text_height
    texts = _with_scores(names, scores)
    for row, depth, x, y in _deepest(rows):
        if depth * factor > high / 3:
            text = texts[row]
            left = x * factor - plates.text_width(text) // 2
            top = y * factor - high // 2
            tops = [top, top + high, top - high]
            plates.write(text, colors[row], left, tops, cover=False)
    return _to_tensor(picture)


def _shades(colors: list[Color]) -> list[Color]:
    """Mixes each repetition of a colour with ever more white or black, alternately."""
    shades = []
    seen = Counter()
    for color in colors:
        count = seen[color]
        share = 0.7 - 0.7 * 0.6 ** math.ceil(count / 2)
        target = 255 * (count % 2)
        mixed = [round(channel + share * (target - channel)) for channel in color]
        shades.append(tuple(mixed))
        seen[color] += 1
    return shades


def _edges(segments: np.ndarray) -> np.ndarray:
    """Marks the pixels (H, W) bool whose right or lower neighbour is in another segment."""
    edges = np.zeros(segments.shape, dtype=bool)
    edges[:, :-1] = np.diff(segments, axis=1) != 0
    edges[:-1] |= np.diff(segments, axis=0) != 0
    return edges


def _deepest(segments: np.ndarray) -> list[tuple[int, float, int, int]]:
    """Finds the deepest pixel of each segment of (H, W), as (row, distance to border, x, y)."""
    step = max(1, max(segments.shape) // 600)  # a coarse map is enough to place a name
    coarse = segments[::step, ::step]
    inside = np.pad(~_edges(coarse), 1)  # the border of the image is a border of its segments
    depth = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
    rows = np.unique(coarse[coarse >= 0])
    peaks = ndimage.maximum_position(depth, coarse, rows)
    found = []
    for row, (y, x) in zip(rows, peaks):
        found.append((row, depth[y, x] * step, x * step, y * step))
    return sorted(found, key=lambda entry: -entry[1])  # deepest first


def _overlay(image: Tensor, masks: Tensor, colors: list[Color], scores: Tensor | None) -> Tensor:
    """Blends the colour of each mask (N, H, W) into the image at 50 %.

    Masks with higher scores are painted last. Without scores, smaller masks are painted last.
    """
    image = image.cpu().clone()
    masks = masks.cpu()
    halves = torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1) // 2
    priority = -masks.sum((1, 2)) if scores is None else scores
    for row in priority.argsort().tolist():
        mask = masks[row]
        image[:, mask] = image[:, mask] // 2 + halves[row]
    return image


def _to_picture(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy(force=True)
    return Image.fromarray(array)


def _to_tensor(picture: Image.Image) -> Tensor:
    array = np.array(picture)
    return torch.from_numpy(array).permute(2, 0, 1)


def _enlarge(image: Tensor) -> tuple[Image.Image, int]:
    """Enlarges a small image, so that names fit, and returns it with the integer factor."""
    picture = _to_picture(image)
    wanted = round(480 / min(picture.size))
    largest = 2000 // max(picture.size)
    factor = max(1, min(wanted, largest))
    return ImageOps.scale(picture, factor, Image.Resampling.NEAREST), factor


def _with_scores(names: Sequence[str], scores: Tensor | None) -> Sequence[str]:
    if scores is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, scores)]


def _clip(boxes: Tensor, width: int, height: int) -> list[list[int]]:
    """Clips boxes (N, 4) xyxy to the picture. NaN becomes 0, a negative width or height too."""
    corners = boxes.nan_to_num(0).clamp(min=0).view(-1, 2, 2)
    last = torch.tensor([width - 1, height - 1])
    corners = corners.minimum(last)
    corners[:, 1] = corners.amax(1)
    return corners.flatten(1).round().int().tolist()


class _Plates:
    """Writes names on coloured plates into a picture, apart from each other where there is room."""

    def __init__(self, picture: Image.Image):
        self.draw = ImageDraw.Draw(picture)
        self.width, self.height = picture.size
        self.taken = np.zeros((self.height, self.width), dtype=bool)
        self.font = ImageFont.load_default(max(14, min(picture.size) // 34))
        self.text_height = sum(self.font.getmetrics()) + 2

    def text_width(self, text: str) -> int:
        return math.ceil(self.font.getlength(text)) + 6

    def write(self, text: str, color: Color, left: int, tops: list[int], cover: bool) -> None:
        """Writes `text` at the first of `tops` where its plate covers no other.

        If there is none, it covers another at tops[0] or, without `cover`, is not written.
        """
        text = _shorten(text, self.font, self.width - 6)
        width = self.text_width(text)
        height = self.text_height
        x = max(0, min(left, self.width - width))
        tops = [max(0, min(top, self.height - height)) for top in tops]
        free = [y for y in tops if not self.taken[y : y + height, x : x + width].any()]
        if not free and not cover:
            return
        y = free[0] if free else tops[0]
        self.taken[y : y + height, x : x + width] = True
        self.draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
        red, green, blue = color
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        fill = (0, 0, 0) if luminance > 130 else WHITE
        self.draw.text((x + 3, y + 1), text, font=self.font, fill=fill)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cuts off the end of `text` until it fits into `width` pixels with "..."."""
    text = text[:300]  # the loop measures every length
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def grid(images: Sequence[Tensor], columns: int, captions: Sequence[str] | None = None) -> Tensor:
    """Arranges images (3, h, w) uint8 in rows of `columns`, with captions above, as (3, H, W)."""
    if captions is None:
        captions = [""] * len(images)
    pictures = [_to_picture(image) for image in images]
    for picture in pictures:
        picture.thumbnail((1600, 1600))  # a few large ones must not make the sheet huge
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    font = ImageFont.load_default(18)
    strip = 28 if any(captions) else 0
    step_x = width + 4
    step_y = height + 4 + strip
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (step_x * columns, step_y * rows), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(i, columns)
        x = column * step_x
        y = row * step_y
        draw.text((x + 4, y + 3), _shorten(caption, font, width - 8), font=font, fill=WHITE)
        sheet.paste(picture, (x, y + strip))
    return _to_tensor(sheet)


def save_image(image: Tensor, path: Path | str) -> None:
    """Writes (3, H, W) uint8 atomically. Raises ValueError for an unknown suffix."""
    with atomic_path(path) as temporary:
        _to_picture(image).save(temporary, quality=92)


def training_grid(batch: Batch, vocabularies: dict[str, Vocabulary], limit: int = 16) -> Tensor:
    """Draws the first `limit` images of a batch with their ground truth, as (3, h, w) uint8.

    Image-level labels are named in the caption.
    """
    images = []
    captions = []
    for padded, (height, width), sample in zip(batch.images[:limit], batch.sizes, batch.samples):
        names = vocabularies[sample.dataset].names
        image = padded[:, :height, :width]
        images.append(_draw(image, vars(sample), names))
        caption = f"{sample.dataset} {sample.image_id} ({sample.supervision}) "
        if sample.image_labels is not None:
            labels = sample.image_labels.tolist()
            caption += ", ".join(names[label] for label in labels)
        captions.append(caption)
    return grid(images, math.ceil(math.sqrt(len(images))), captions)


def _draw(image: Tensor, record: dict, names: Sequence[str]) -> Tensor:
    """Draws the segments of `record` if it has any, otherwise its boxes and masks."""
    labels = [names[label] for label in record["labels"].tolist()]
    scores = record.get("scores")
    segments = record.get("segments")
    if segments is not None:
        return draw_segments(image, segments, labels, scores)
    return draw_boxes(image, record["boxes"], labels, scores, record.get("masks"))


def prediction_grid(
    images: Sequence[Tensor],
    targets: Sequence[dict],
    predictions: Sequence[dict],
    names: Sequence[str],
    limit: int = 8,
    min_score: float = 0.3,
) -> Tensor:
    """Draws ground truth and prediction of the first `limit` images in pairs, as (3, h, w) uint8.

    images:      (3, H, W) uint8 each
    targets:     for each image `labels` (N,), indices into `names`, and either `boxes` (N, 4) xyxy
                 in pixels with optional `masks` (N, H, W), or `segments` (H, W), indices into
                 `labels` or -1
    predictions: the same with `scores` (N,); masks are RLEs, `segmentations`. The 30 best boxes
                 with a score of at least `min_score` are drawn, and all segments
    """
    pictures = []
    captions = []
    for image, target, found in zip(images[:limit], targets, predictions):
        caption = "prediction"
        if "segments" not in found:
            found = _best_boxes(found, tuple(image.shape[1:]), min_score)
            caption += f", score >= {min_score:g}"
        pictures += [_draw(image, target, names), _draw(image, found, names)]
        captions += ["ground truth", caption]
    return grid(pictures, 2 if len(pictures) <= 6 else 4, captions)


def _best_boxes(found: dict, size: tuple[int, int], min_score: float) -> dict:
    """Selects the 30 best boxes from `min_score` on and decodes their masks to `size`."""
    scores = found["scores"]
    count = int((scores >= min_score).sum())
    best = scores.argsort(descending=True)[: min(30, count)]
    shown = {field: found[field][best] for field in ("boxes", "labels", "scores")}
    if "segmentations" in found:
        rles = [found["segmentations"][row] for row in best.tolist()]
        shown["masks"] = decode_masks(rles, size)
    return shown


def similarity_heatmap(similarity: Tensor, label_space: LabelSpace, path: Path) -> None:
    """Saves a heat map of the label similarity matrix (C, C) to `path`, grouped by dataset.

    Of more than 80 labels it shows about 60, an equal share per dataset: those with the most
    similar labels in other datasets.
    """
    from matplotlib.figure import Figure  # takes half a second; without pyplot it draws with Agg

    shown = list(range(len(label_space)))
    which = f"all {len(shown)} labels"
    if len(label_space) > 80:
        shown = _closest_labels(similarity, label_space, limit=60)
        single = len(label_space.datasets) == 1
        others = "each other" if single else "a label of another dataset"
        which = f"{len(shown)} of {len(label_space)} labels, closest to {others}"
    part = similarity[shown][:, shown].detach().float().cpu()
    side = 4.5 + 0.16 * len(shown)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    cosines = axes.imshow(part.numpy(), cmap="viridis", vmin=float(part.quantile(0.02)), vmax=1)
    figure.colorbar(cosines, ax=axes, label="cosine", shrink=0.6, pad=0.06)
    names = [label_space.names[label] for label in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=7, rotation=90)
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    _mark_datasets(axes, label_space.dataset_of_label[shown], label_space.datasets)
    axes.set_title(f"Similarity of class names: {which}", pad=24)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _mark_datasets(axes, dataset_of_row: Tensor, datasets: list[str]) -> None:
    """Writes the dataset names at the top and right of a heat map, with lines between them."""
    style = {"textcoords": "offset points", "weight": "bold"}
    end = len(dataset_of_row) - 0.5
    start = -0.5
    for position, count in Counter(dataset_of_row.tolist()).items():
        middle = start + count / 2
        axes.annotate(datasets[position], (middle, -0.5), (0, 6), ha="center", **style)
        axes.annotate(datasets[position], (end, middle), (6, 0), va="center", rotation=270, **style)
        if start > 0:
            axes.axhline(start, color="white", linewidth=1.5)
            axes.axvline(start, color="white", linewidth=1.5)
        start += count


def _mask_same_dataset(similarity: Tensor, label_space: LabelSpace) -> Tensor:
    """Sets (C, C) to -inf within each dataset; of a single dataset, only the diagonal."""
    owner = label_space.dataset_of_label
    hidden = owner[:, None] == owner
    if len(label_space.datasets) == 1:
        hidden = torch.eye(len(owner), dtype=torch.bool)
    similarity = similarity.detach().float().cpu()
    return similarity.masked_fill(hidden, -math.inf)


def _closest_labels(similarity: Tensor, label_space: LabelSpace, limit: int) -> list[int]:
    """Selects labels with their most similar label in every other dataset, an equal share each."""
    masked = _mask_same_dataset(similarity, label_space)
    owners = label_space.dataset_of_label.tolist()
    closeness = torch.zeros(len(owners))
    groups = [[label] for label in range(len(owners))]  # each label with its partners
    for part in map(label_space.slice, label_space.datasets):
        values, indices = masked[:, part].max(1)
        closeness += values.masked_fill(values.isinf(), 0)
        for label, (value, index) in enumerate(zip(values.tolist(), indices.tolist())):
            if value > -math.inf:
                groups[label].append(part.start + index)
    share = limit // len(label_space.datasets)
    chosen = []
    for label in closeness.argsort(descending=True, stable=True).tolist():
        taken = Counter(owners[k] for k in chosen)
        new = [k for k in groups[label] if k not in chosen]
        if all(taken[owners[k]] < share for k in new):
            chosen += new
    return sorted(chosen, key=lambda k: owners[k])


def label_report(similarity: Tensor, label_space: LabelSpace, top: int = 3) -> str:
    """Returns Markdown tables of the `top` most similar labels of other datasets for every label.

    The first table counts labels with a duplicate. A single dataset is compared with itself.
    """
    masked = _mask_same_dataset(similarity, label_space)
    names = [name.replace("|", "\\|") for name in label_space.names]
    elsewhere = " in another dataset" if len(label_space.datasets) > 1 else ""
    lines = [f"| dataset | labels | labels with a duplicate{elsewhere} (cosine > 0.99) |"]
    lines += ["|---|---|---|"]
    for dataset in label_space.datasets:
        has_duplicate = (masked[label_space.slice(dataset)] > 0.99).any(1)
        lines += [f"| {dataset} | {len(has_duplicate)} | {int(has_duplicate.sum())} |"]
    lines += ["", f"| dataset | label | closest labels{elsewhere} (cosine) |", "|---|---|---|"]
    owners = [label_space.datasets[i] for i in label_space.dataset_of_label.tolist()]
    best = masked.topk(min(top, len(names)), dim=1)
    values = best.values.tolist()
    indices = best.indices.tolist()
    for owner, name, cosines, labels in zip(owners, names, values, indices):
        close = [
            f"{owners[label]}: {names[label]} ({cosine:.2f})"
            for cosine, label in zip(cosines, labels)
            if cosine > -math.inf
        ]
        lines += [f"| {owner} | {name} | {', '.join(close)} |"]
    return "\n".join(lines) + "\n"


def report_label_space(similarity: Tensor, label_space: LabelSpace, folder: Path) -> None:
    """Writes `label_report` to label_space.md and `similarity_heatmap` to label_space.png."""
    (folder / "label_space.md").write_text(label_report(similarity, label_space))
    similarity_heatmap(similarity, label_space, folder / "label_space.png")
