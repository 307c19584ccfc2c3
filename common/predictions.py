"""Writes what --predict finds: drawn pictures, and the predictions in COCO's formats."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from common.batch import Sample
from common.class_colors import assign_colors, color_of
from common.evaluation import to_coco_json
from common.files import atomic_path
from common.fonts import tell_of_squares
from common.labels import LabelSpace
from common.masks import area_of, decode_masks
from common.segments import segment_rows
from common.visualize import best_boxes, draw_boxes, draw_segments, save_image

log = logging.getLogger("concord")

LONGEST = 200  # bytes of the part of an output's name that is the input's; a name has at most 255
DRAWN = 2**24  # pixels of a drawn picture; a larger image is drawn at a fraction of its size


class PredictionWriter:
    """Draws each prediction in `folder` at once, and writes the json files at the end, in `close`.

    Detections go to predictions.json in the COCO format, with scores and masks. Panoptic maps go to
    panoptic/ and panoptic.json, COCO's format. Semantic maps go to semantic/: PNGs with the class
    of each pixel, which are shown in the colours of the classes (with more than 255 classes they
    have 16 bits and are grey), and classes.txt, whose first line is class 0.
    An image of a video has its number in the video as "frame", from 0.

    label_space: the classes that were looked for, with `is_thing`
    min_score:   of the detections that are drawn; all are written
    """

    def __init__(self, folder: Path, label_space: LabelSpace, min_score: float):
        self.folder = folder
        self.label_space = label_space
        self.min_score = min_score
        vocabularies = list(label_space.vocabularies.values())
        self.ids = range(1, len(label_space) + 1)
        if len(vocabularies) == 1:
            self.ids = vocabularies[0].ids
        named = zip(self.ids, label_space.names)
        self.categories = [{"id": id, "name": name} for id, name in named]
        tell_of_squares(label_space.names)
        assign_colors(label_space.names)
        self.kinds = set()  # fields of the predictions
        self.notes = Counter()  # `Decoded.notes` of the images
        self.images = []
        self.annotations = []
        self.segments = []

    def add(self, file: str, frame: int | None, sample: Sample, prediction: dict) -> None:
        """Draws and keeps the prediction of an image, or of a frame of the video `file`.

        sample: its `index` becomes the id, and its `image` is drawn, at any size
        """
        self.kinds |= prediction.keys()
        number = sample.index
        part = "" if frame is None else f"-frame{frame:06d}"
        name = f"{cut_name(Path(file).stem)}{part}-{number}"
        summary = self._draw(sample.image, prediction, self.folder / f"{name}.jpg")
        what = file if frame is None else f"{file} frame {frame}"
        log.info("%s: %s", what, summary)

        height, width = prediction.get("size", sample.original_size)
        image = {"id": number, "file_name": file, "height": height, "width": width}
        if frame is not None:
            image["frame"] = frame
        self.images.append(image)
        if "boxes" in prediction:
            self._add_boxes(number, prediction)
        if "panoptic" in prediction:
            path = self.folder / "panoptic" / f"{name}.png"
            _save_png(id_colors(prediction["panoptic"]), path, ())
            info = segments_info(prediction, self.ids)
            entry = {"image_id": number, "file_name": path.name, "segments_info": info}
            self.segments.append(entry)
        if "semantic" in prediction:
            path = self.folder / "semantic" / f"{name}.png"
            _save_png(prediction["semantic"].cpu().numpy(), path, self.label_space.names)

    def _add_boxes(self, number: int, prediction: dict) -> None:
        """Keeps the detections of an image as COCO's annotations."""
        entries = to_coco_json(self.ids, {0: prediction}, [number])
        for entry in entries:
            *_, width, height = entry["bbox"]
            rle = entry.get("segmentation")
            area = area_of(rle) if rle else width * height
            entry |= {"id": len(self.annotations), "area": area, "iscrowd": 0}
            self.annotations.append(entry)

    def _draw(self, image: Tensor, prediction: dict, path: Path) -> str:
        """Draws segments if they are predicted, and detections otherwise. Returns a summary."""
        full = prediction.get("size", tuple(image.shape[-2:]))
        step, size = drawn_size(full)
        if image.shape[-2:] != size:
            image = resize(image, list(size), antialias=True)
        if "panoptic" in prediction or "semantic" in prediction:
            record = segment_rows(_every(prediction, step))
            names = [self.label_space.names[label] for label in record["labels"].tolist()]
            summary = f"{len(names)} {'segments' if 'panoptic' in prediction else 'classes'}"
            if not names:
                summary += " (no segment is probable enough)"
            picture = draw_segments(image, record["segments"], names, record.get("scores"))
        else:
            picture, summary = self._draw_boxes(image, prediction, step)
        save_image(picture, path)
        at = f" at 1/{step} of its size" if step > 1 else ""
        return f"{summary}, drawn in {path}{at}"

    def _draw_boxes(self, image: Tensor, prediction: dict, step: int) -> tuple[Tensor, str]:
        """Draws the `best_boxes` with a score of min_score or more. Also returns a summary."""
        scores = prediction["scores"]
        passing = int((scores >= self.min_score).sum())
        rows = best_boxes(prediction["boxes"], scores, self.min_score)
        names = [prediction["class_names"][row] for row in rows.tolist()]
        masks = None
        if "segmentations" in prediction:
            rles = [prediction["segmentations"][row] for row in rows.tolist()]
            masks = decode_some(rles, prediction["size"], step)
        summary = f"{passing} objects with a score of {self.min_score:g} or more"
        if len(scores) and not names:
            summary += f" (the highest is {scores.max():.2f})"
        if passing > len(names):
            summary += f" ({len(names)} of them shown)"
        boxes = prediction["boxes"][rows] / step
        return draw_boxes(image, boxes, names, scores[rows], masks=masks), summary

    def close(self) -> None:
        """Writes the json files of all images that were added, and names them in the log."""
        for note, count in self.notes.items():
            log.info("%d of %d images: %s", count, len(self.images), note)
        if "boxes" in self.kinds:
            path = self.folder / "predictions.json"
            self._save_json(self.annotations, path)
            count = len(self.annotations)
            log.info("all %d detections, those of lower score too: %s", count, path)
        if "panoptic" in self.kinds:
            self._close_panoptic()
        if "semantic" in self.kinds:
            with atomic_path(self.folder / "semantic" / "classes.txt") as path:
                path.write_text("\n".join(self.label_space.names) + "\n", encoding="utf-8")
            log.info("the class of each pixel: %s/", self.folder / "semantic")

    def _close_panoptic(self) -> None:
        """Writes panoptic.json, with the images' paths relative to the folder that holds all."""
        for category, is_thing in zip(self.categories, self.label_space.is_thing):
            category["isthing"] = int(is_thing)
        paths = [os.path.abspath(image["file_name"]) for image in self.images]
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        for image in self.images:
            image["file_name"] = os.path.relpath(image["file_name"], root)
        path = self.folder / "panoptic.json"
        self._save_json(self.segments, path)
        log.info("segments as a panoptic dataset: %s, its images are in %s/", path, root)

    def _save_json(self, annotations: list[dict], path: Path) -> None:
        content = {"images": self.images, "categories": self.categories, "annotations": annotations}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def cut_name(stem: str) -> str:
    """Returns the start of a file's name that takes at most LONGEST bytes."""
    while len(os.fsencode(stem)) > LONGEST:
        stem = stem[:-1]
    return stem


def drawn_size(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Returns the step from one drawn pixel of an image to the next, and the drawn (H, W)."""
    height, width = size
    step = max(1, math.ceil(math.sqrt(height * width / DRAWN)))
    return step, (math.ceil(height / step), math.ceil(width / step))


def _every(prediction: dict, step: int) -> dict:
    """Returns the prediction with every step-th row and column of its maps."""
    maps = {name: prediction[name] for name in ("panoptic", "semantic") if name in prediction}
    return prediction | {name: rows[::step, ::step] for name, rows in maps.items()}


def decode_some(rles: list[dict], size: tuple[int, int], step: int) -> Tensor:
    """Decodes every step-th row and column of N masks of `size`: (N, h, w) bool."""
    _, (height, width) = drawn_size(size) if step > 1 else (1, size)
    masks = torch.zeros(len(rles), height, width, dtype=torch.bool)
    for mask, rle in zip(masks, rles):
        (whole,) = decode_masks([rle], size)
        mask.copy_(whole[::step, ::step])
    return masks


def segments_info(prediction: dict, ids: Sequence[int | str]) -> list[dict]:
    """Returns COCO's description of the segments of a panoptic map, with their scores."""
    panoptic = prediction["panoptic"].cpu()
    infos = []
    for segment in prediction["segments_info"]:
        inside = panoptic == segment["id"]
        rows = inside.any(1).nonzero().flatten().tolist()
        columns = inside.any(0).nonzero().flatten().tolist()
        left, top = columns[0], rows[0]
        infos.append(
            {
                "id": segment["id"],
                "category_id": ids[segment["label"]],
                "score": segment["score"],
                "area": int(inside.sum()),
                "bbox": [left, top, columns[-1] + 1 - left, rows[-1] + 1 - top],
                "iscrowd": 0,
            }
        )
    return infos


def id_colors(panoptic: Tensor) -> np.ndarray:
    """Writes ids (H, W) as COCO's colours (H, W, 3) uint8: id = R + 256 G + 65536 B."""
    ids = panoptic.cpu().numpy()
    colors = np.empty((*ids.shape, 3), np.uint8)
    for channel, shift in enumerate((0, 8, 16)):
        colors[..., channel] = ids >> shift & 255
    return colors


def _save_png(pixels: np.ndarray, path: Path, names: Sequence[str]) -> None:
    """Writes colours (H, W, 3) uint8, or the class of each pixel (H, W) in the colours of `names`.

    The palette changes how the file is shown, not its numbers. It has room for 256 colours.
    """
    if names and len(names) <= 255:
        picture = Image.fromarray(pixels.astype(np.uint8)).convert("P")
        picture.putpalette([channel for name in names for channel in color_of(name)])
    else:
        picture = Image.fromarray(pixels.astype(np.uint16) if names else pixels)
    with atomic_path(path) as temporary:
        picture.save(temporary)
