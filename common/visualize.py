"""Pictures that people look at: boxes, masks and segments on images, grids of them, the similarity of labels."""

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


def color_of(name: str) -> Color:
    """One RGB colour per class name, the same in every picture and every run."""
    number = zlib.crc32(name.casefold().encode())  # unlike hash(), the same in every process
    hue, lightness = (number % 24) / 24, (0.38, 0.5, 0.66)[number // 24 % 3]
    return tuple(round(255 * channel) for channel in colorsys.hls_to_rgb(hue, lightness, 0.95))


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    names: list[str],
    scores: Tensor | None = None,
    colors: list[Color] | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """(3, H, W) uint8 with N boxes and their names -> (3, h, w) uint8.

    boxes:  (N, 4) xyxy in pixels of `image`; what lies outside is cut off
    scores: (N,) in 0..1, written behind the names; colors: N RGB triples in 0..255 instead of `color_of(name)`
    masks:  (N, H, W) bool, laid half-transparent under the lines

    Images with a short side below about 480 pixels are enlarged by an integer factor, so h and w may be multiples of
    H and W. Raises ValueError if there are not as many names as boxes.
    """
    boxes = boxes.detach().float().cpu().reshape(-1, 4)
    if len(names) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(names)} names")
    colors = [color_of(name) for name in names] if colors is None else colors
    picture, factor = _enlarged(image if masks is None else _overlay(image, masks, colors, scores))
    texts = _with_scores(names, scores)
    corners = _inside(boxes * factor, *picture.size)
    draw = ImageDraw.Draw(picture)
    for box, color in zip(corners, colors):
        draw.rectangle(box, outline=color, width=max(2, min(picture.size) // 200))
    plates = _Plates(picture)
    for (left, top, _, bottom), text, color in zip(
        corners, texts, colors
    ):  # after all boxes: no line crosses a name
        high = plates.height
        plates.write(
            text, color, left, (top - high, top, bottom - high + 1, bottom + 1, top + high)
        )
    return _to_tensor(picture)


def draw_segments(
    image: Tensor, segments: Tensor, names: Sequence[str], scores: Tensor | None = None
) -> Tensor:
    """(3, H, W) uint8 tinted by its segments, with white lines between them -> (3, h, w) uint8.

    segments: (H, W) integers, the row of `names` that each pixel belongs to, -1: none
    scores:   (N,) in 0..1, written behind the names

    A name stands as deep inside its segment as it can, unless the segment is too thin or others' names are in the way.
    Segments of one colour are told apart by shades of it. Small images are enlarged as in `draw_boxes`. Raises
    ValueError for a row without a name.
    """
    segments = segments.cpu().long()
    if segments.numel() and segments.max() >= len(names):
        raise ValueError(f"row {int(segments.max())} of the segments, but {len(names)} names")
    colors = _shades([color_of(name) for name in names])
    halves = torch.tensor([*colors, BACKGROUND], dtype=torch.uint8)[segments].permute(2, 0, 1) // 2
    picture, factor = _enlarged(
        torch.where(segments < 0, image.detach().cpu(), image.detach().cpu() // 2 + halves)
    )
    rows = segments.numpy().repeat(factor, axis=0).repeat(factor, axis=1)
    lines = ndimage.maximum_filter(_edges(rows), size=max(2, min(picture.size) // 300))
    picture.paste("white", mask=Image.fromarray(lines))
    plates, texts = _Plates(picture), _with_scores(names, scores)
    for row, depth, x, y in _deepest(segments.numpy()):  # from the thickest segment to the thinnest
        if depth * factor > plates.height / 3:
            left, top = x * factor - plates.width(texts[row]) // 2, y * factor - plates.height // 2
            plates.write(
                texts[row],
                colors[row],
                left,
                (top, top + plates.height, top - plates.height),
                cover=False,
            )
    return _to_tensor(picture)


def _shades(colors: list[Color]) -> list[Color]:
    """The same colours, but each repetition is mixed with ever more white or black, in turns."""
    seen, shades = Counter(), []
    for color in colors:
        count, seen[color] = seen[color], seen[color] + 1
        share, target = 0.7 - 0.7 * 0.6 ** math.ceil(count / 2), 255 * (count % 2)
        shades.append(tuple(round(channel + share * (target - channel)) for channel in color))
    return shades


def _edges(rows: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels whose right or lower neighbour has another number than they."""
    edges = np.zeros(rows.shape, dtype=bool)
    edges[:, :-1] = rows[:, 1:] != rows[:, :-1]
    edges[:-1] |= rows[1:] != rows[:-1]
    return edges


def _deepest(segments: np.ndarray) -> list[tuple[int, float, int, int]]:
    """(row, distance to the border, x, y) of the pixel deepest inside each row of `segments` (H, W), deepest first."""
    step = max(1, max(segments.shape) // 600)  # a coarse map is enough to place a name
    coarse = segments[::step, ::step]
    depth = ndimage.distance_transform_edt(np.pad(~_edges(coarse), 1))[
        1:-1, 1:-1
    ]  # the border of the image is one too
    rows = np.unique(coarse[coarse >= 0])
    places = ndimage.maximum_position(depth, coarse, rows)
    found = [
        (int(row), float(depth[y, x]) * step, x * step, y * step)
        for row, (y, x) in zip(rows, places)
    ]
    return sorted(found, key=lambda place: -place[1])


def _overlay(image: Tensor, masks: Tensor, colors: list[Color], scores: Tensor | None) -> Tensor:
    """Half the colour and half the image in each mask, the surer over the less sure, else the small over the large."""
    image, masks = image.detach().cpu().clone(), masks.cpu()
    halves = torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1) // 2
    order = masks.sum(dim=(1, 2)).argsort(descending=True) if scores is None else scores.argsort()
    for row in order.tolist():
        image[:, masks[row]] = image[:, masks[row]] // 2 + halves[row]
    return image


def _to_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _enlarged(image: Tensor) -> tuple[Image.Image, int]:
    """The picture and the integer factor by which a small one was enlarged: names need a short side of 480 pixels."""
    picture = _to_picture(image)
    factor = max(1, min(round(480 / min(picture.size)), 2000 // max(picture.size)))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    ), factor


def _with_scores(names: Sequence[str], scores: Tensor | None) -> Sequence[str]:
    return names if scores is None else [f"{n} {s:.2f}" for n, s in zip(names, scores.tolist())]


def _inside(boxes: Tensor, width: int, height: int) -> list[list[int]]:
    """Whole-numbered corners in the picture, the second not before the first; NaN of a diverged model becomes 0."""
    boxes = torch.minimum(
        boxes.nan_to_num(0).clamp(min=0), torch.tensor([width - 1, height - 1] * 2)
    )
    return (
        torch.cat([boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
        .round()
        .int()
        .tolist()
    )


class _Plates:
    """Names on coloured plates within a picture, off each other where there is room."""

    def __init__(self, picture: Image.Image):
        self.draw, self.size, self.taken = ImageDraw.Draw(picture), picture.size, []
        self.font = ImageFont.load_default(max(14, min(picture.size) // 34))
        self.height = sum(self.font.getmetrics()) + 2

    def width(self, text: str) -> int:
        return math.ceil(self.font.getlength(text)) + 6

    def write(
        self, text: str, color: Color, left: int, tops: Sequence[int], cover: bool = True
    ) -> None:
        """At the first of `tops` where the plate covers no other; without one at the first, or nowhere (`cover`)."""
        text = _shortened(text, self.font, self.size[0] - 6)
        width, height = self.width(text), self.height
        x = max(0, min(left, self.size[0] - width))
        tops = [max(0, min(top, self.size[1] - height)) for top in tops]
        plates = [(x, top, x + width - 1, top + height - 1) for top in tops]
        free = (
            p
            for p in plates
            if all(p[0] > t[2] or t[0] > p[2] or p[1] > t[3] or t[1] > p[3] for t in self.taken)
        )
        plate = next(free, plates[0] if cover else None)
        if plate is not None:
            self.draw.rectangle(plate, fill=color)
            luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
            fill = (0, 0, 0) if luminance > 130 else (255, 255, 255)
            self.draw.text((x + 3, plate[1] + 1), text, font=self.font, fill=fill)
            self.taken.append(plate)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = text[:300]  # each letter is measured
    if font.getlength(text) <= width:
        return text
    fitting = (n for n in range(len(text), 0, -1) if font.getlength(text[:n] + "...") <= width)
    return text[: next(fitting, 0)] + "..."


def grid(images: Sequence[Tensor], columns: int, captions: Sequence[str] | None = None) -> Tensor:
    """Pictures (3, h, w) uint8 -> one (3, h', w'): padded to equal size, `columns` a row, each below its caption."""
    captions = [""] * len(images) if captions is None else captions
    pictures = [_to_picture(image) for image in images]
    for picture in pictures:
        picture.thumbnail((1600, 1600))  # a few large ones must not make the sheet huge
    width, height = (max(picture.size[side] for picture in pictures) for side in (0, 1))
    font, strip = ImageFont.load_default(18), 28 * any(map(bool, captions))
    cell = (width + 4, height + 4 + strip)
    sheet = Image.new(
        "RGB", (cell[0] * columns, cell[1] * math.ceil(len(images) / columns)), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * cell[0], i // columns * cell[1]
        draw.text(
            (x + 4, y + 3), _shortened(caption, font, width - 8), font=font, fill=(255, 255, 255)
        )
        sheet.paste(picture, (x, y + strip))
    return _to_tensor(sheet)


def save_image(image: Tensor, path: Path | str) -> None:
    """Write (3, H, W) uint8 as jpg or png by the suffix, whole or not at all. Raises ValueError for an unknown one."""
    with atomic_path(path) as temporary:
        _to_picture(image).save(temporary, quality=92)


def training_grid(batch: Batch, vocabularies: dict[str, Vocabulary], limit: int = 16) -> Tensor:
    """What the model is trained on: the first `limit` images of a batch with all they are labelled with, (3, h, w).

    The names of image labels, which have no boxes, stand in the caption.
    """
    images, captions = [], []
    for padded, (height, width), sample in zip(batch.images[:limit], batch.sizes, batch.samples):
        names = vocabularies[sample.dataset].names
        images.append(_draw(padded[:, :height, :width], vars(sample), names))
        words = (
            []
            if sample.image_labels is None
            else [names[label] for label in sample.image_labels.tolist()]
        )
        captions.append(
            f"{sample.dataset} {sample.image_id} ({sample.supervision}) {', '.join(words)}"
        )
    return grid(images, math.ceil(math.sqrt(len(images))), captions)


def _draw(image: Tensor, record: dict, names: Sequence[str]) -> Tensor:
    """Segments if the record has them, else boxes and masks; its `labels` are rows of `names`."""
    labels, scores = [names[label] for label in record["labels"].tolist()], record.get("scores")
    if record.get("segments") is not None:
        return draw_segments(image, record["segments"], labels, scores)
    return draw_boxes(image, record["boxes"], labels, scores, masks=record.get("masks"))


def prediction_grid(
    images, targets, predictions, names: Sequence[str], limit: int = 8, min_score=0.3
) -> Tensor:
    """Ground truth beside prediction for the first `limit` images, (3, h, w) uint8.

    images:      sequence of (3, H, W) uint8
    targets:     for each image `labels` (N,), index into `names`, and `boxes` (N, 4) xyxy in pixels of the image,
                 perhaps with `masks` (N, H, W), or `segments` (H, W), rows of `labels` or -1
    predictions: the same, boxes with `scores` (N,) and masks as `segmentations` (N RLEs), of which the 30 best of an
                 image are shown, from `min_score` on; segments are all shown
    """
    pictures, captions = [], []
    for image, target, found in list(zip(images, targets, predictions))[:limit]:
        caption = "prediction"
        if "segments" not in found:
            best = found["scores"].argsort(descending=True)[
                : min(30, int((found["scores"] >= min_score).sum()))
            ]
            shown = {field: found[field][best] for field in ("boxes", "labels", "scores")}
            if "segmentations" in found:
                rles = [found["segmentations"][i] for i in best.tolist()]
                shown["masks"] = decode_masks(rles, tuple(image.shape[1:]))
            found, caption = shown, f"prediction, score >= {min_score:g}"
        pictures += [_draw(image, record, names) for record in (target, found)]
        captions += ["ground truth", caption]
    return grid(pictures, 2 if len(pictures) <= 6 else 4, captions)


def similarity_heatmap(
    similarity: Tensor, label_space: LabelSpace, path: Path | str, limit: int = 60
) -> None:
    """Picture of the (C, C) cosines of the labels' text embeddings, grouped by dataset, written to `path`.

    Of more than 80 labels it shows about `limit`: from each dataset those with the closest partners in the others.
    """
    from matplotlib.figure import (
        Figure,  # here: it takes half a second. Without pyplot it draws with Agg
    )

    every = len(label_space) <= 80
    shown = (
        list(range(len(label_space))) if every else _closest_labels(similarity, label_space, limit)
    )
    part = similarity.detach().float().cpu()[shown][:, shown]
    side = 4.5 + 0.16 * len(shown)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    cosines = axes.imshow(part.numpy(), cmap="viridis", vmin=float(part.quantile(0.02)), vmax=1)
    figure.colorbar(cosines, ax=axes, label="cosine", shrink=0.6, pad=0.06)
    ticks = {
        "ticks": range(len(shown)),
        "labels": [label_space.names[label] for label in shown],
        "fontsize": 7,
    }
    axes.set_xticks(**ticks, rotation=90)
    axes.set_yticks(**ticks)
    _mark_datasets(axes, label_space.dataset_of_label[shown], label_space.datasets)
    others = "each other" if len(label_space.datasets) == 1 else "a label of another dataset"
    which = (
        f"all {len(shown)} labels"
        if every
        else f"{len(shown)} of {len(label_space)} labels, closest to {others}"
    )
    axes.set_title(f"Similarity of class names: {which}", pad=24)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _mark_datasets(axes, dataset_of_row: Tensor, datasets: list[str]) -> None:
    end, style = len(dataset_of_row) - 0.5, {"textcoords": "offset points", "weight": "bold"}
    for position in dataset_of_row.unique().tolist():
        rows, name = (dataset_of_row == position).nonzero().flatten().tolist(), datasets[position]
        middle = (rows[0] + rows[-1]) / 2
        axes.annotate(name, (middle, -0.5), (0, 6), ha="center", **style)
        axes.annotate(name, (end, middle), (6, 0), va="center", rotation=270, **style)
        if rows[0] > 0:
            axes.axhline(rows[0] - 0.5, color="white", linewidth=1.5)
            axes.axvline(rows[0] - 0.5, color="white", linewidth=1.5)


def _other_datasets(similarity: Tensor, label_space: LabelSpace) -> Tensor:
    """(C, C) -> (C, C) with -inf within a dataset; with one dataset alone, on the diagonal."""
    owner = label_space.dataset_of_label
    hidden = (
        owner[:, None] == owner
        if len(label_space.datasets) > 1
        else torch.eye(len(owner), dtype=torch.bool)
    )
    return similarity.detach().float().cpu().masked_fill(hidden, -math.inf)


def _closest_labels(similarity: Tensor, label_space: LabelSpace, limit: int) -> list[int]:
    """Labels with their closest partner in every other dataset, best first, an equal share each; by dataset."""
    others, slices = (
        _other_datasets(similarity, label_space),
        [label_space.scope(d) for d in label_space.datasets],
    )
    best = [others[:, part].max(dim=1) for part in slices]
    closeness = sum(found.values.masked_fill(found.values.isinf(), 0) for found in best)
    chosen = [[] for _ in slices]
    for label in closeness.argsort(descending=True, stable=True).tolist():
        close = [
            (d, slices[d].start + int(b.indices[label]))
            for d, b in enumerate(best)
            if b.values[label].isfinite()
        ]
        group = [(int(label_space.dataset_of_label[label]), label), *close]
        if all(k in chosen[d] or len(chosen[d]) < limit // len(slices) for d, k in group):
            for d, k in group:
                chosen[d] += [k] * (k not in chosen[d])
    return [label for home in chosen for label in home]


def label_report(similarity: Tensor, label_space: LabelSpace, top: int = 3) -> str:
    """Markdown: for every label its `top` closest labels of other datasets, with their entries of the (C, C) cosines.

    The header counts labels with a duplicate (cosine > 0.99) elsewhere. With a single dataset both look within it.
    """
    others, names = (
        _other_datasets(similarity, label_space),
        [n.replace("|", "\\|") for n in label_space.names],
    )
    elsewhere = " in another dataset" if len(label_space.datasets) > 1 else ""
    lines = [
        f"| dataset | labels | labels with a duplicate{elsewhere} (cosine > 0.99) |",
        "|---|---|---|",
    ]
    for dataset in label_space.datasets:
        part = (others[label_space.scope(dataset)] > 0.99).any(dim=1)
        lines.append(f"| {dataset} | {len(part)} | {int(part.sum())} |")
    lines += ["", f"| dataset | label | closest labels{elsewhere} (cosine) |", "|---|---|---|"]
    owners = [label_space.datasets[i] for i in label_space.dataset_of_label.tolist()]
    values, indices = others.topk(min(top, len(names)), dim=1)
    for name, owner, cosines, labels in zip(names, owners, values.tolist(), indices.tolist()):
        close = [
            f"{owners[k]}: {names[k]} ({c:.2f})" for c, k in zip(cosines, labels) if c > -math.inf
        ]
        lines.append(f"| {owner} | {name} | {', '.join(close)} |")
    return "\n".join(lines) + "\n"


def report_label_space(similarity: Tensor, label_space: LabelSpace, folder: Path) -> None:
    """Which label of which dataset is close to which: label_space.md and label_space.png in `folder`."""
    (folder / "label_space.md").write_text(label_report(similarity, label_space))
    similarity_heatmap(similarity, label_space, folder / "label_space.png")
