"""Reports which labels of a label space are similar, as tables and as a picture.

The cosines of all labels are computed a block of rows at a time: all of 20,000 labels at once would
take gigabytes.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.fonts import tell_of_squares
from common.heat_map import HeatMap, draw_heat_map
from common.labels import COMPARED, EQUAL, LabelSpace

log = logging.getLogger("concord")
BLOCK = 1024  # rows of cosines that are held at once


@dataclass
class Closest:
    """The labels that are most similar to each label, in other datasets than its own.

    With a single dataset, they are its own other labels. A cosine is -inf where there is none.
    """

    cosines: Tensor  # (C, K) the highest ones, in descending order
    labels: Tensor  # (C, K) their labels
    # of each dataset: the highest cosine (C,), and its label (C,), counted from its first
    partners: list[tuple[Tensor, Tensor]]


def cosine_rows(text: Tensor) -> Iterator[Tensor]:
    """Yields the cosines (BLOCK, C) of unit rows text (C, D), block by block."""
    for rows in text.split(BLOCK):
        yield rows @ text.T


def closest_labels(label_space: LabelSpace, top: int = 3) -> Closest:
    """Finds the `top` most similar labels of each label, and the most similar one of each dataset.

    Logs a line if there are so many labels that it takes seconds.
    """
    count = len(label_space)
    if count > COMPARED:
        log.info("compares the text of %d labels with each other, for label_space.md", count)
    labels = torch.arange(count)
    scopes = [label_space.scope(dataset) for dataset in label_space.datasets]
    owner = labels if len(scopes) == 1 else label_space.dataset_of_label
    best, partners = [], [[] for _ in scopes]
    for owners, cosines in zip(owner.split(BLOCK), cosine_rows(label_space.text)):
        cosines = cosines.float().cpu()
        cosines.masked_fill_(owners[:, None] == owner, -math.inf)
        best.append(cosines.topk(min(top, count), 1))
        for found, scope in zip(partners, scopes):
            found.append(cosines[:, scope].max(1))
    cosines, closest = map(torch.cat, zip(*best))
    return Closest(cosines, closest, [tuple(map(torch.cat, zip(*found))) for found in partners])


def similarity_heatmap(
    closest: Closest, label_space: LabelSpace, path: Path | str, limit: int = 60
) -> None:
    """Saves a heat map of the cosines of labels to `path`.

    Rows and columns are grouped by dataset. Up to 80 labels are all shown. Of more labels, about
    `limit` are shown, the same number from each dataset: those closest to labels of other datasets.
    If there is only one dataset, they are those closest to its other labels.
    Each cell of few labels has its number.
    """
    count = len(label_space)
    if count <= 80:
        shown = list(range(count))
        which = f"all {count} labels"
    else:
        shown = _choose(closest, label_space, limit)
        single = len(label_space.datasets) == 1
        others = "each other" if single else "a label of another dataset"
        which = f"{len(shown)} of {count} labels, closest to {others}"
    text = label_space.text[shown]
    part = (text @ text.T).float().cpu()
    names = [label_space.names[label] for label in shown]
    tell_of_squares(label_space.names)
    owners = [label_space.datasets[i] for i in label_space.dataset_of_label[shown].tolist()]
    low = float(part.quantile(0.02))
    title = f"Similarity of class names: {which}"
    heat_map = HeatMap(part.numpy(), names, names, title, "cosine", low, owners, owners)
    draw_heat_map(heat_map, path)


def _choose(closest: Closest, label_space: LabelSpace, limit: int) -> list[int]:
    """Selects about `limit` labels that are most similar to labels of other datasets.

    Adds labels by descending similarity, each together with the closest label of every other
    dataset, until each dataset has its equal share. Returns the labels grouped by dataset.
    """
    scopes = [label_space.scope(dataset) for dataset in label_space.datasets]
    closeness = 0
    for values, _ in closest.partners:
        finite = values.masked_fill(values.isinf(), 0)
        closeness = closeness + finite
    order = closeness.argsort(descending=True, stable=True)
    dataset_of = label_space.dataset_of_label.tolist()
    share = limit // len(scopes)
    chosen = [[] for _ in scopes]
    for label in order.tolist():
        group = [label]
        for scope, (values, partners) in zip(scopes, closest.partners):
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


def label_report(closest: Closest, label_space: LabelSpace) -> str:
    """Returns Markdown tables of each label's most similar labels in other datasets.

    The first table counts the labels with a duplicate (cosine > 0.99) in another dataset. With a
    single dataset, both tables compare its labels with each other.
    """
    names = [name.replace("|", "\\|") for name in label_space.names]
    elsewhere = ""
    if len(label_space.datasets) > 1:
        elsewhere = " in another dataset"
    lines = [f"| dataset | labels | labels with a duplicate{elsewhere} (cosine > 0.99) |"]
    lines.append("|---|---|---|")
    for dataset in label_space.datasets:
        scope = label_space.scope(dataset)
        duplicate = closest.cosines[scope, 0] > EQUAL
        count = int(duplicate.sum())
        lines.append(f"| {dataset} | {len(duplicate)} | {count} |")
    lines.append("")
    lines.append(f"| dataset | label | closest labels{elsewhere} (cosine) |")
    lines.append("|---|---|---|")
    dataset_of = label_space.dataset_of_label.tolist()
    owners = [label_space.datasets[i] for i in dataset_of]
    rows = zip(names, owners, closest.cosines.tolist(), closest.labels.tolist())
    for name, owner, cosines, labels in rows:
        close = []
        for cosine, label in zip(cosines, labels):
            if cosine > -math.inf:
                full_name = f"{owners[label]}: {names[label]}"
                close.append(f"{full_name} ({cosine:.2f})")
        lines.append(f"| {owner} | {name} | {', '.join(close)} |")
    return "\n".join(lines) + "\n"


def report_label_space(label_space: LabelSpace, folder: Path) -> None:
    """Writes `label_report` to label_space.md and the heat map to label_space.png in `folder`."""
    closest = closest_labels(label_space)
    report = label_report(closest, label_space)
    (folder / "label_space.md").write_text(report, encoding="utf-8")
    similarity_heatmap(closest, label_space, folder / "label_space.png")
