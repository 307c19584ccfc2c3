"""UniDet against tensors recorded from the official implementation.

CONCORD_PARITY names the folder. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error.
"""

import numpy as np
import torch
from parity import (
    case,
    check,
    report,  # noqa: F401 (a fixture)
)

from common.class_ap import Detections, Truth


def recorded_boxes(tensors: dict, prefix: str) -> np.ndarray:
    """(N, 4) xyxy of stored x, y, w, h."""
    boxes = tensors[f"{prefix}.boxes_xywh.fp64"].clone()
    boxes[:, 2:] += boxes[:, :2]
    return boxes.numpy()


def test_ap_of_any_class_on_any_other():
    tensors, record = case("unidet_label_space")
    config = record["config"]
    for dataset in config["datasets"]:
        offset = config["global_offset"][dataset]
        fields = ("image", "class", "score.fp64")
        images, labels, scores = (tensors[f"pred.{dataset}.{f}"].numpy() for f in fields)
        boxes = recorded_boxes(tensors, f"pred.{dataset}")
        found = Detections(images, labels, scores, boxes).take(scores > config["score_threshold"])
        recorded = tensors[f"ap.{dataset}"]
        truth_boxes = recorded_boxes(tensors, f"gt.{dataset}")
        ours = torch.zeros_like(recorded)
        for j in range(recorded.shape[1]):
            own = (tensors[f"gt.{dataset}.class"] == j).numpy()
            crowd = tensors[f"gt.{dataset}.iscrowd"].numpy().astype(bool)[own]
            truth = Truth(tensors[f"gt.{dataset}.image"].numpy()[own], truth_boxes[own], crowd)
            for i in range(len(recorded)):
                local = i - offset
                if 0 <= local < recorded.shape[1] and local != j:
                    continue  # the dataset's own other classes are not computed
                ours[i, j] = truth.ap50(found.of_classes((i,)))
        check(f"AP on {dataset}", ours, recorded)
