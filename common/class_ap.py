"""AP of the detections of any class on the boxes of one class, for example of another dataset."""

from dataclasses import dataclass
from functools import cached_property

import hotcoco
import numpy as np
import torch
from torchvision.ops import batched_nms

from common.datasets.dataset import Dataset
from common.evaluation import ancestors, truth_table, xywh

RECALLS = np.linspace(0, 1, 101)


@dataclass
class Detections:
    """Detections in the images of one dataset, in any order.

    images: (N,) row of the image in the dataset; labels: (N,); scores: (N,)
    boxes:  (N, 4) xyxy in pixels of the original image
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, predictions: dict[int, dict], lowest: float) -> "Detections":
        """Joins the predictions {row: {boxes, labels, scores}} whose score is above `lowest`."""
        counts = [len(p["scores"]) for p in predictions.values()]
        rows = np.array(list(predictions), dtype=np.int64)
        joined = {}
        for field in ("labels", "scores", "boxes"):
            values = [torch.as_tensor(p[field]) for p in predictions.values()]
            joined[field] = torch.cat(values).numpy()
        found = cls(np.repeat(rows, counts), **joined)
        return found.take(found.scores > lowest)

    def take(self, rows: np.ndarray) -> "Detections":
        """Returns the detections `rows`, indices or bools."""
        return Detections(
            images=self.images[rows],
            labels=self.labels[rows],
            scores=self.scores[rows],
            boxes=self.boxes[rows],
        )

    @cached_property
    def _by_label(self) -> dict[int, np.ndarray]:
        order = np.argsort(self.labels, kind="stable")
        labels, starts = np.unique(self.labels[order], return_index=True)
        rows = np.split(order, starts[1:])
        return dict(zip(labels.tolist(), rows))

    def of_classes(self, labels: tuple[int, ...]) -> "Detections":
        """Returns the detections of some classes, as those of one.

        Of several classes, NMS at IoU 0.5 keeps one detection of an object. It measures sides as
        pixels, x2 - x1 + 1.
        Source: xingyizhou/UniDet:tools/UniDet_learn_labelspace_mAP.ipynb
        """
        none = np.zeros(0, np.int64)
        rows = [self._by_label.get(label, none) for label in labels]
        found = self.take(np.concatenate(rows))
        if len(labels) == 1:
            return found
        boxes = torch.from_numpy(found.boxes).double()
        boxes = boxes + torch.tensor([0, 0, 1, 1])
        scores = torch.from_numpy(found.scores).double()
        images = torch.from_numpy(found.images)
        kept = batched_nms(boxes, scores, images, 0.5)
        return found.take(kept.numpy())


class Truth:
    """The annotated boxes of one class of a dataset, which detections are judged on."""

    def __init__(self, images: np.ndarray, boxes: np.ndarray, crowd: np.ndarray):
        """images: (G,) row of the image; boxes: (G, 4) xyxy; crowd: (G,) bool, a region of many"""
        self.count = int((~crowd).sum())
        order = np.argsort(images, kind="stable")
        self.images, starts = np.unique(images[order], return_index=True)
        rows = np.split(order, starts[1:])
        self.rows_of = dict(zip(self.images.tolist(), rows))
        self.boxes = boxes
        self.crowd = crowd

    def ap50(self, found: Detections) -> float:
        """Returns the AP at IoU 0.5 over 101 recalls, in 0..1; 0 without a box that is no crowd.

        Only images with a box of the class count: nothing else is known of the other images of a
        dataset that may not annotate the class.
        Source: xingyizhou/UniDet:tools/UniDet_learn_labelspace_mAP.ipynb
        """
        if self.count == 0:
            return 0.0
        found = found.take(np.isin(found.images, self.images))
        falling = np.argsort(-found.scores, kind="stable")
        found = found.take(falling)
        order = np.argsort(found.images, kind="stable")
        images, starts = np.unique(found.images[order], return_index=True)
        hit = np.zeros(len(found.scores), dtype=bool)
        ignored = np.zeros_like(hit)
        rows_of_images = np.split(order, starts[1:])
        for image, rows in zip(images.tolist(), rows_of_images):
            own = self.rows_of[image]
            hit[rows], ignored[rows] = match(found.boxes[rows], self.boxes[own], self.crowd[own])
        hit = hit[~ignored]
        hits = np.cumsum(hit)
        recall = hits / self.count
        precision = hits / np.arange(1, len(hit) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or above
        places = np.searchsorted(recall, RECALLS)
        reached = np.append(envelope, 0)[places]  # 0 at recalls that are not reached
        return float(reached.mean())


def match(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matches detections to the boxes of one image as COCO does. Returns (hit, ignored), (D,) bool.

    Each detection takes the best box that is still free, with IoU >= 0.5. What takes none is
    ignored if at least half of it is in a crowd.
    boxes: (D, 4) xyxy by falling score; truth: (G, 4) xyxy; crowd: (G,) bool
    """
    hit = np.zeros(len(boxes), dtype=bool)
    both = (xywh(corners).astype(np.float64) for corners in (boxes, truth))
    overlaps = hotcoco.mask.bbox_iou(*both, crowd)  # (D, G)
    free = np.where(crowd, -1, overlaps)
    for row in range(len(boxes)):
        best = free[row].argmax()
        if free[row, best] >= 0.5:
            hit[row] = True
            free[:, best] = -1
    in_crowd = np.where(crowd, overlaps, -1).max(axis=1) >= 0.5
    return hit, in_crowd & ~hit


class CrossAP50:
    """AP50 of any classes, as one detector, on the boxes of any class; `len` is their number.

    Classes are numbered dataset after dataset. found: per dataset the detections of all classes in
    its images; truth: per dataset the boxes of each of its classes
    """

    def __init__(self, found: list[Detections], truth: list[list[Truth]]):
        self.found = found
        self.truth = [boxes for of_dataset in truth for boxes in of_dataset]
        self.dataset_of = [k for k, of_dataset in enumerate(truth) for _ in of_dataset]
        self.known: dict[tuple, float] = {}

    @classmethod
    def of(
        cls, datasets: list[Dataset], predictions: list[dict[int, dict]], lowest: float
    ) -> "CrossAP50":
        """Takes the predictions of all classes on each dataset, with scores above `lowest`.

        With a class tree, the boxes of a class are also those of the classes below it.
        """
        found = [Detections.of(of_dataset, lowest) for of_dataset in predictions]
        truth = []
        for dataset, predicted in zip(datasets, predictions):
            table = truth_table(dataset.index, predicted)
            upward = ancestors(dataset.vocabulary, dataset.hierarchy)
            of_dataset = []
            for label in range(len(dataset.vocabulary)):
                own = upward[table["label"], label]
                columns = (table["image"], table["boxes"], table["ignore"])
                of_dataset.append(Truth(*(column[own] for column in columns)))
            truth.append(of_dataset)
        return cls(found, truth)

    def __len__(self) -> int:
        return len(self.truth)

    def __call__(self, members: tuple[int, ...], label: int) -> float:
        """Returns the AP50 of the detections of all `members` on the boxes of class `label`."""
        if (members, label) not in self.known:
            found = self.found[self.dataset_of[label]].of_classes(members)
            self.known[members, label] = self.truth[label].ap50(found)
        return self.known[members, label]
