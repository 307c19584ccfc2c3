"""Functions that draw boxes, masks, segments and image grids, and that report similar labels."""

import colorsys
import math
import warnings
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
from common.fonts import families, font_for, plain, tell_of_squares
from common.labels import LabelSpace, Vocabulary
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


# -- Similarity of labels --------------------------------------------------------------------------


def similarity_heatmap(
    similarity: Tensor, label_space: LabelSpace, path: Path | str, limit: int = 60
) -> None:
    """Saves a heat map of the label similarity matrix (C, C) to `path`.

    Rows and columns are grouped by dataset. Up to 80 labels are all shown. Of more labels, about
    `limit` are shown, the same number from each dataset: those closest to labels of other datasets.
    If there is only one dataset, they are those closest to its other labels.
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
    names = [plain(label_space.names[label])[:60] for label in shown]
    tell_of_squares(label_space.names)
    style = {"fontsize": 7, "fontfamily": families(names), "parse_math": False}  # $ is a letter
    ticks = range(len(shown))
    axes.set_xticks(ticks, labels=names, rotation=90, **style)
    axes.set_yticks(ticks, labels=names, **style)
    dataset_of_row = label_space.dataset_of_label[shown]
    _mark_datasets(axes, dataset_of_row, label_space.datasets)
    title = f"Similarity of class names: {which}"
    axes.set_title(title, pad=24)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of each square, and of tight places
        figure.savefig(temporary, dpi=130)


def _mark_datasets(axes, dataset_of_row: Tensor, datasets: list[str]) -> None:
    """Writes the names of the datasets at the top and the right, and draws lines between them."""
    end = len(dataset_of_row) - 0.5
    style = {"textcoords": "offset points", "weight": "bold", "parse_math": False}
    for position in dataset_of_row.unique().tolist():
        member = dataset_of_row == position
        rows = member.nonzero().flatten().tolist()
        first = rows[0]
        last = rows[-1]
        middle = (first + last) / 2
        name = datasets[position]
        axes.annotate(name, (middle, -0.5), (0, 6), ha="center", **style)
        axes.annotate(name, (end, middle), (6, 0), va="center", rotation=270, **style)
        if first > 0:
            border = first - 0.5
            axes.axhline(border, color="white", linewidth=1.5)
            axes.axvline(border, color="white", linewidth=1.5)


def _mask_same_dataset(similarity: Tensor, label_space: LabelSpace) -> Tensor:
    """Returns a copy of the similarity (C, C), with -inf for two labels of the same dataset.

    With a single dataset, only the diagonal is -inf.
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
        finite = values.masked_fill(values.isinf(), 0)
        closeness = closeness + finite
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
        new = []  # the labels to add, each with the list that it belongs to
        for member in group:
            labels = chosen[dataset_of[member]]
            if member not in labels:
                new.append((member, labels))
        if all(len(labels) < share for _, labels in new):
            for member, labels in new:
                labels.append(member)
    return [label for labels in chosen for label in labels]


def label_report(similarity: Tensor, label_space: LabelSpace, top: int = 3) -> str:
    """Returns Markdown tables of each label's `top` most similar labels in other datasets.

    similarity: (C, C) cosines of the labels

    The first table counts the labels with a duplicate (cosine > 0.99) in another dataset. With a
    single dataset, both tables compare its labels with each other.
    """
    masked = _mask_same_dataset(similarity, label_space)
    names = [name.replace("|", "\\|") for name in label_space.names]
    elsewhere = ""
    if len(label_space.datasets) > 1:
        elsewhere = " in another dataset"
    lines = [f"| dataset | labels | labels with a duplicate{elsewhere} (cosine > 0.99) |"]
    lines.append("|---|---|---|")
    for dataset in label_space.datasets:
        scope = label_space.scope(dataset)
        similar = masked[scope] > 0.99
        duplicate = similar.any(1)
        count = int(duplicate.sum())
        lines.append(f"| {dataset} | {len(duplicate)} | {count} |")
    lines.append("")
    lines.append(f"| dataset | label | closest labels{elsewhere} (cosine) |")
    lines.append("|---|---|---|")
    dataset_of = label_space.dataset_of_label.tolist()
    owners = [label_space.datasets[i] for i in dataset_of]
    top = min(top, len(names))
    values, indices = masked.topk(top, 1)
    rows = zip(names, owners, values.tolist(), indices.tolist())
    for name, owner, cosines, labels in rows:
        close = []
        for cosine, label in zip(cosines, labels):
            if cosine > -math.inf:
                full_name = f"{owners[label]}: {names[label]}"
                close.append(f"{full_name} ({cosine:.2f})")
        closest = ", ".join(close)
        lines.append(f"| {owner} | {name} | {closest} |")
    return "\n".join(lines) + "\n"


def report_label_space(similarity: Tensor, label_space: LabelSpace, folder: Path) -> None:
    """Writes `label_report` to label_space.md and the heat map to label_space.png in `folder`."""
    report = label_report(similarity, label_space)
    (folder / "label_space.md").write_text(report, encoding="utf-8")
    similarity_heatmap(similarity, label_space, folder / "label_space.png")
