"""Functions that draw boxes, masks, segments and image grids, and that report similar labels."""

import colorsys
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from common.batch import Batch
from common.files import atomic_path
from common.labels import LabelSpace, Vocabulary
from common.masks import decode_masks

Color = tuple[int, int, int]
BACKGROUND: Color = (32, 32, 32)
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)


# -- Boxes and segments of one image ---------------------------------------------------------------


def color_of(name: str) -> Color:
    """Returns the RGB colour of a class name, which is the same in every picture and every run."""
    number = zlib.crc32(name.casefold().encode())  # hash() would differ between processes
    hue = (number % 24) / 24
    lightness = (0.38, 0.5, 0.66)[number // 24 % 3]
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
    boxes = boxes.detach().float().cpu().reshape(-1, 4)
    if len(names) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(names)} names")
    if colors is None:
        colors = [color_of(name) for name in names]
    if masks is not None:
        image = _overlay(image, masks, colors, scores)
    picture, factor = _enlarged(image)
    corners = _inside(boxes * factor, *picture.size)
    draw = ImageDraw.Draw(picture)
    line_width = max(2, min(picture.size) // 200)
    for box, color in zip(corners, colors):
        draw.rectangle(box, outline=color, width=line_width)
    # Names are written after all boxes, so that no line crosses a name.
    plates = _Plates(picture)
    height = plates.height
    texts = _with_scores(names, scores)
    for (left, top, _, bottom), text, color in zip(corners, texts, colors):
        tops = [top - height, top, bottom - height + 1, bottom + 1, top + height]
        plates.write(text, color, left, tops)
    return _to_tensor(picture)


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
    if segments.numel() and segments.max() >= len(names):
        raise ValueError(f"row {int(segments.max())} of the segments, but {len(names)} names")
    image = image.detach().cpu()
    colors = _shades([color_of(name) for name in names])
    palette = torch.tensor([*colors, BACKGROUND], dtype=torch.uint8)
    tints = palette[segments].permute(2, 0, 1)
    tinted = image // 2 + tints // 2
    image = torch.where(segments < 0, image, tinted)
    picture, factor = _enlarged(image)

    rows = segments.numpy().repeat(factor, axis=0)
    rows = rows.repeat(factor, axis=1)
    line_width = max(2, min(picture.size) // 300)
    edges = _edges(rows)
    lines = ndimage.maximum_filter(edges, size=line_width)
    picture.paste("white", mask=Image.fromarray(lines))

    plates = _Plates(picture)
    height = plates.height
    texts = _with_scores(names, scores)
    for row, depth, x, y in _deepest(segments.numpy()):
        if depth * factor <= height / 3:
            continue
        text = texts[row]
        width = plates.width(text)
        left = x * factor - width // 2
        top = y * factor - height // 2
        tops = [top, top + height, top - height]
        plates.write(text, colors[row], left, tops, cover=False)
    return _to_tensor(picture)


def _shades(colors: list[Color]) -> list[Color]:
    """Mixes repeated colours with white and black in turns, more with each repetition."""
    seen = Counter()
    shades = []
    for color in colors:
        count = seen[color]
        seen[color] += 1
        share = 0.7 - 0.7 * 0.6 ** math.ceil(count / 2)
        target = 255 * (count % 2)
        shade = [round(channel + share * (target - channel)) for channel in color]
        shades.append(tuple(shade))
    return shades


def _edges(rows: np.ndarray) -> np.ndarray:
    """Returns (H, W) bool: the pixels that differ from their right or lower neighbour."""
    vertical = np.diff(rows, axis=0) != 0
    horizontal = np.diff(rows, axis=1) != 0
    below = np.pad(vertical, ((0, 1), (0, 0)))
    right = np.pad(horizontal, ((0, 0), (0, 1)))
    return below | right


def _deepest(segments: np.ndarray) -> list[tuple[int, float, int, int]]:
    """Finds the pixel of each segment of `segments` (H, W) that is farthest from the border.

    Returns (row, distance to the border, x, y) of each, sorted by descending distance.
    """
    step = max(1, max(segments.shape) // 600)  # a coarse map suffices to place a name
    coarse = segments[::step, ::step]
    inside = ~_edges(coarse)
    padded = np.pad(inside, 1)  # the image border also counts as a border
    depth = ndimage.distance_transform_edt(padded)
    depth = depth[1:-1, 1:-1]
    rows = np.unique(coarse[coarse >= 0])
    positions = ndimage.maximum_position(depth, coarse, rows)
    found = []
    for row, (y, x) in zip(rows, positions):
        distance = float(depth[y, x]) * step
        found.append((int(row), distance, x * step, y * step))
    return sorted(found, key=lambda place: -place[1])


def _overlay(image: Tensor, masks: Tensor, colors: list[Color], scores: Tensor | None) -> Tensor:
    """Blends each mask's colour into the image at 50 %.

    Masks with higher scores are painted last. Without scores, smaller masks are painted last.
    """
    image = image.detach().cpu().clone()
    masks = masks.cpu()
    halves = torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1) // 2
    order = masks.sum((1, 2)).argsort(descending=True)
    if scores is not None:
        order = scores.argsort()
    for row in order.tolist():
        mask = masks[row]
        image[:, mask] = image[:, mask] // 2 + halves[row]
    return image


def _to_picture(image: Tensor) -> Image.Image:
    """Converts an image (3, H, W) uint8 to a PIL picture."""
    image = image.detach().cpu()
    channels_last = image.permute(1, 2, 0).contiguous()
    return Image.fromarray(channels_last.numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    """Converts a PIL picture to a tensor (3, H, W) uint8."""
    pixels = np.array(picture)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _enlarged(image: Tensor) -> tuple[Image.Image, int]:
    """Enlarges a small image to a short side of about 480 pixels, and returns the factor too."""
    picture = _to_picture(image)
    wanted = round(480 / min(picture.size))
    largest = 2000 // max(picture.size)
    factor = max(1, min(wanted, largest))
    size = (picture.width * factor, picture.height * factor)
    enlarged = picture.resize(size, Image.Resampling.NEAREST)
    return enlarged, factor


def _with_scores(names: Sequence[str], scores: Tensor | None) -> Sequence[str]:
    if scores is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist())]


def _inside(boxes: Tensor, width: int, height: int) -> list[list[int]]:
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


class _Plates:
    """Names on coloured rectangles in a picture, placed without overlap where there is room."""

    def __init__(self, picture: Image.Image):
        self.draw = ImageDraw.Draw(picture)
        self.size = picture.size
        self.taken = []
        self.font = ImageFont.load_default(max(14, min(picture.size) // 34))
        self.height = sum(self.font.getmetrics()) + 2

    def width(self, text: str) -> int:
        """Returns the width in pixels of the plate of `text`."""
        return math.ceil(self.font.getlength(text)) + 6

    def write(
        self, text: str, color: Color, left: int, tops: Sequence[int], cover: bool = True
    ) -> None:
        """Writes `text` at the first of `tops` where its plate overlaps no other plate.

        If there is none, writes it at the first of `tops`, or nowhere if `cover` is False.
        """
        text = _shortened(text, self.font, self.size[0] - 6)
        width = self.width(text)
        rightmost = self.size[0] - width
        lowest = self.size[1] - self.height
        x = max(0, min(left, rightmost))
        plates = []
        for top in tops:
            y = max(0, min(top, lowest))
            plates.append((x, y, x + width - 1, y + self.height - 1))
        free = [plate for plate in plates if not self._overlaps(plate)]
        if not free and not cover:
            return
        plate = free[0] if free else plates[0]
        self.taken.append(plate)
        self.draw.rectangle(plate, fill=color)
        red, green, blue = color
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        fill = BLACK if luminance > 130 else WHITE
        position = (x + 3, plate[1] + 1)
        self.draw.text(position, text, font=self.font, fill=fill)

    def _overlaps(self, plate: tuple[int, int, int, int]) -> bool:
        left, top, right, bottom = plate
        for x0, y0, x1, y1 in self.taken:
            if left <= x1 and x0 <= right and top <= y1 and y0 <= bottom:
                return True
        return False


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cuts `text` to `width` pixels, with "..." at the end of a cut text."""
    text = text[:300]  # bounds the time, since each length is measured
    if font.getlength(text) <= width:
        return text
    for length in range(len(text), 0, -1):
        if font.getlength(text[:length] + "...") <= width:
            return text[:length] + "..."
    return "..."


# -- Grids of images -------------------------------------------------------------------------------


def grid(images: Sequence[Tensor], columns: int, captions: Sequence[str] | None = None) -> Tensor:
    """Arranges images (3, h, w) uint8 in rows of `columns`, each below its caption.

    Shrinks images to 1600 pixels at most and pads them to one size. Returns (3, H, W) uint8.
    """
    if captions is None:
        captions = [""] * len(images)
    pictures = [_to_picture(image) for image in images]
    for picture in pictures:
        picture.thumbnail((1600, 1600))
    font = ImageFont.load_default(18)
    strip = 28 if any(captions) else 0
    cell_width = max(picture.width for picture in pictures) + 4
    cell_height = max(picture.height for picture in pictures) + 4 + strip
    rows = math.ceil(len(images) / columns)
    size = (cell_width * columns, cell_height * rows)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    cells = zip(pictures, captions, strict=True)
    for i, (picture, caption) in enumerate(cells):
        row, column = divmod(i, columns)
        x = column * cell_width
        y = row * cell_height
        text = _shortened(caption, font, cell_width - 12)
        draw.text((x + 4, y + 3), text, font=font, fill=WHITE)
        sheet.paste(picture, (x, y + strip))
    return _to_tensor(sheet)


def save_image(image: Tensor, path: Path | str) -> None:
    """Writes `image` (3, H, W) uint8 to `path` atomically, as jpg or png by the suffix.

    Raises ValueError for an unknown suffix.
    """
    with atomic_path(path) as temporary:
        _to_picture(image).save(temporary, quality=92)


def training_grid(batch: Batch, vocabularies: dict[str, Vocabulary], limit: int = 16) -> Tensor:
    """Draws the first `limit` images of a batch with their annotations, (3, h, w) uint8.

    Image-level labels have no boxes and are listed in the caption.
    """
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
    images, targets, predictions, names: Sequence[str], limit: int = 8, min_score=0.3
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
    for image, target, found in list(zip(images, targets, predictions))[:limit]:
        caption = "prediction"
        if "segments" not in found:
            found = _best_boxes(found, min_score, tuple(image.shape[1:]))
            caption = f"prediction, score >= {min_score:g}"
        pictures.append(_draw(image, target, names))
        pictures.append(_draw(image, found, names))
        captions += ["ground truth", caption]
    columns = 2 if len(pictures) <= 6 else 4
    return grid(pictures, columns, captions)


def _best_boxes(prediction: dict, min_score: float, size: tuple[int, int]) -> dict:
    """Returns at most 30 boxes with `min_score` or more, best first, with their decoded masks."""
    scores = prediction["scores"]
    passing = scores >= min_score
    count = min(30, int(passing.sum()))
    best = scores.argsort(descending=True)[:count]
    shown = {field: prediction[field][best] for field in ("boxes", "labels", "scores")}
    if "segmentations" in prediction:
        rles = [prediction["segmentations"][i] for i in best.tolist()]
        shown["masks"] = decode_masks(rles, size)
    return shown


# -- Similarity of labels --------------------------------------------------------------------------


def similarity_heatmap(
    similarity: Tensor, label_space: LabelSpace, path: Path | str, limit: int = 60
) -> None:
    """Saves a heat map of the label similarity matrix (C, C) to `path`, grouped by dataset.

    With at most 80 labels it shows all. With more, it shows about `limit`: the labels with the
    most similar label in another dataset, the same number per dataset.
    """
    # Imported here because it takes half a second. Without pyplot, matplotlib draws with Agg.
    from matplotlib.figure import Figure

    count = len(label_space)
    if count <= 80:
        shown = list(range(count))
        which = f"all {count} labels"
    else:
        shown = _closest_labels(similarity, label_space, limit)
        single = len(label_space.datasets) == 1
        others = "each other" if single else "a label of another dataset"
        which = f"{len(shown)} of {count} labels, closest to {others}"
    part = similarity.detach().float().cpu()
    part = part[shown][:, shown]
    side = 4.5 + 0.16 * len(shown)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    darkest = float(part.quantile(0.02))
    cosines = axes.imshow(part.numpy(), cmap="viridis", vmin=darkest, vmax=1)
    figure.colorbar(cosines, ax=axes, label="cosine", shrink=0.6, pad=0.06)
    names = [label_space.names[label] for label in shown]
    axes.set_xticks(range(len(shown)), labels=names, fontsize=7, rotation=90)
    axes.set_yticks(range(len(shown)), labels=names, fontsize=7)
    _mark_datasets(axes, label_space.dataset_of_label[shown], label_space.datasets)
    axes.set_title(f"Similarity of class names: {which}", pad=24)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _mark_datasets(axes, dataset_of_row: Tensor, datasets: list[str]) -> None:
    """Writes the names of the datasets at the top and the right, and draws lines between them."""
    end = len(dataset_of_row) - 0.5
    style = {"textcoords": "offset points", "weight": "bold"}
    for position in dataset_of_row.unique().tolist():
        member = dataset_of_row == position
        rows = member.nonzero().flatten().tolist()
        first, last = rows[0], rows[-1]
        middle = (first + last) / 2
        name = datasets[position]
        axes.annotate(name, (middle, -0.5), (0, 6), ha="center", **style)
        axes.annotate(name, (end, middle), (6, 0), va="center", rotation=270, **style)
        if first > 0:
            axes.axhline(first - 0.5, color="white", linewidth=1.5)
            axes.axvline(first - 0.5, color="white", linewidth=1.5)


def _mask_same_dataset(similarity: Tensor, label_space: LabelSpace) -> Tensor:
    """Sets the similarity (C, C) of two labels of the same dataset to -inf.

    With a single dataset, only the diagonal is set to -inf.
    """
    dataset = label_space.dataset_of_label
    hidden = dataset[:, None] == dataset
    if len(label_space.datasets) == 1:
        hidden = torch.eye(len(dataset), dtype=torch.bool)
    similarity = similarity.detach().float().cpu()
    return similarity.masked_fill(hidden, -math.inf)


def _closest_labels(similarity: Tensor, label_space: LabelSpace, limit: int) -> list[int]:
    """Selects about `limit` labels that are most similar to labels of other datasets.

    Adds labels by descending similarity, each together with the closest label of every other
    dataset, until each dataset has its equal share. Returns the labels grouped by dataset.
    """
    masked = _mask_same_dataset(similarity, label_space)
    scopes = [label_space.scope(dataset) for dataset in label_space.datasets]
    best = [masked[:, scope].max(1) for scope in scopes]
    closeness = 0
    for values, _ in best:
        closeness = closeness + values.masked_fill(values.isinf(), 0)
    order = closeness.argsort(descending=True, stable=True)
    dataset_of = label_space.dataset_of_label.tolist()
    share = limit // len(scopes)
    chosen = [[] for _ in scopes]
    for label in order.tolist():
        group = [label]
        for scope, (values, partners) in zip(scopes, best):
            if values[label].isfinite():
                partner = int(partners[label])
                group.append(scope.start + partner)
        new = [k for k in group if k not in chosen[dataset_of[k]]]
        lists = [chosen[dataset_of[k]] for k in new]
        if all(len(labels) < share for labels in lists):
            for k, labels in zip(new, lists):
                labels.append(k)
    return [label for labels in chosen for label in labels]


def label_report(similarity: Tensor, label_space: LabelSpace, top: int = 3) -> str:
    """Returns Markdown tables of each label's `top` most similar labels in other datasets.

    similarity: (C, C) cosines of the labels

    The first table counts the labels with a duplicate (cosine > 0.99) in another dataset. With a
    single dataset, both tables compare its labels with each other.
    """
    masked = _mask_same_dataset(similarity, label_space)
    names = [name.replace("|", "\\|") for name in label_space.names]
    elsewhere = " in another dataset" if len(label_space.datasets) > 1 else ""
    lines = [f"| dataset | labels | labels with a duplicate{elsewhere} (cosine > 0.99) |"]
    lines.append("|---|---|---|")
    for dataset in label_space.datasets:
        scope = label_space.scope(dataset)
        duplicate = (masked[scope] > 0.99).any(1)
        count = int(duplicate.sum())
        lines.append(f"| {dataset} | {len(duplicate)} | {count} |")
    lines.append("")
    lines.append(f"| dataset | label | closest labels{elsewhere} (cosine) |")
    lines.append("|---|---|---|")
    dataset_of = label_space.dataset_of_label.tolist()
    owners = [label_space.datasets[i] for i in dataset_of]
    values, indices = masked.topk(min(top, len(names)), 1)
    rows = zip(names, owners, values.tolist(), indices.tolist())
    for name, owner, cosines, labels in rows:
        close = []
        for cosine, label in zip(cosines, labels):
            if cosine > -math.inf:
                close.append(f"{owners[label]}: {names[label]} ({cosine:.2f})")
        closest = ", ".join(close)
        lines.append(f"| {owner} | {name} | {closest} |")
    return "\n".join(lines) + "\n"


def report_label_space(similarity: Tensor, label_space: LabelSpace, folder: Path) -> None:
    """Writes `label_report` to label_space.md and the heat map to label_space.png in `folder`."""
    report = label_report(similarity, label_space)
    (folder / "label_space.md").write_text(report)
    similarity_heatmap(similarity, label_space, folder / "label_space.png")
