"""Completes first_batch.jpg: the first batch of a training may lack some of its datasets."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from common.batch import TENSORS, Batch, Sample
from common.datasets.grammar import entries, name_of
from common.datasets.known import ALIASES
from common.labels import LabelSpace
from common.visualize import sample_grid, save_image

log = logging.getLogger("concord")
STEPS = 100  # in which each dataset is looked for
EACH = 4  # images of a dataset and kind of supervision
MOST = 16  # images of all


class FirstBatch:
    """Keeps images of each dataset and kind of supervision, and draws them when a new one comes.

    The training itself draws the batch of step 1.

    datasets:    as in --datasets
    label_space: has the vocabularies of the datasets, or makes a label space that has them
    """

    def __init__(
        self, datasets: str, folder: Path, label_space: LabelSpace | Callable[[], LabelSpace]
    ):
        names = [name_of(entry) for entry in entries(datasets)]
        self.missing = {ALIASES.get(name, name) for name in names}
        self.path = folder / "first_batch.jpg"
        self.label_space = label_space
        self.kept: list[Sample] = []
        self.kinds = Counter()
        self.done = False

    def note(self, step: int, batch: Batch) -> None:
        """Takes the batch of a step. Does nothing once each dataset was seen, or after STEPS."""
        if self.done:
            return
        known = set(self.kinds)
        for i, sample in enumerate(batch.samples):
            kind = sample.dataset, sample.supervision
            if self.kinds[kind] < EACH:
                self.kinds[kind] += 1
                self.kept.append(on_cpu(batch, i))
        self.missing -= {dataset for dataset, _ in self.kinds}
        if step > 1 and len(self.kinds) > len(known):
            self._draw()
        self.done = not self.missing or step >= STEPS
        if self.missing and self.done:
            message = "first_batch.jpg has no image of %s: none came in the first %d steps"
            log.info(message, ", ".join(sorted(self.missing)), STEPS)

    def _draw(self) -> None:
        space = self.label_space() if callable(self.label_space) else self.label_space
        vocabularies = space.vocabularies
        drawn = [sample for sample in self.kept if sample.dataset in vocabularies]
        each = max(1, MOST // len(self.kinds))
        seen = Counter()
        shown = []
        for sample in drawn:
            kind = sample.dataset, sample.supervision
            seen[kind] += 1
            if seen[kind] <= each:
                shown.append(sample)
        save_image(sample_grid(shown, vocabularies), self.path)


def on_cpu(batch: Batch, i: int) -> Sample:
    """Returns a copy of sample `i` of a batch on the CPU, with its image without the padding."""
    height, width = batch.sizes[i]
    fields: dict[str, Tensor] = {"image": batch.images[i, :, :height, :width].cpu().clone()}
    for name in TENSORS:
        value = getattr(batch.samples[i], name)
        if value is not None:
            fields[name] = value.cpu().clone()
    return replace(batch.samples[i], **fields)
