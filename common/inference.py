"""Running a trained model over a dataset or over image files; what a prediction is, the method's `predict` says.

Detections are `boxes` (N, 4), `labels` (N,), `scores` (N,) and perhaps `masks` (N, H, W) or `segmentations` (N RLEs).
Segmentations are `semantic` (H, W), the class of each pixel, and `panoptic` (H, W), 0 or the `id` of a dictionary in
`segments_info` with `label`, `isthing` and `score`. All of the original image, whose `size` (height, width) is there.
"""

import copy
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from common.batch import Batch, Sample, collate
from common.datasets.dataset import Dataset
from common.datasets.files import read_image
from common.distributed import gather_on_main, rank, world_size
from common.evaluation import evaluate_detections, to_coco_json
from common.files import atomic_path
from common.labels import Vocabulary
from common.masks import area_of, decode_masks, encode_masks
from common.runlog import progress_bar
from common.sampling import Transformed, shard
from common.segment_metrics import Counts, segment_counts, segment_results
from common.segments import segment_rows
from common.visualize import draw_boxes, draw_segments, prediction_grid, save_image

log = logging.getLogger("concord")

Predict = Callable[[Batch], list[dict]]
PICTURED = 8  # images of a dataset that the picture of its predictions shows


def evaluate_dataset(
    predict: Predict,
    dataset: Dataset,
    transform,
    workers: int,
    title: str,
    folder: Path,
    min_score: float,
) -> dict[str, float]:
    """The metrics of `dataset.metric` and predictions-<title>.jpg, on rank 0; {} elsewhere.

    "miou" needs `semantic` of the predictions, "pq" `panoptic`, with `semantic` it has mIoU too; else detections.
    """
    if dataset.metric in ("miou", "pq"):
        counts, predictions = _predict_segments(predict, dataset, transform, workers, title)
        results = segment_results(counts, dataset.vocabulary.is_thing) if counts else {}
    else:
        predictions = predict_dataset(predict, dataset, transform, workers, title)
        results = evaluate_detections(dataset, predictions) if rank() == 0 else {}
    if results:
        draw_predictions(dataset, predictions, folder, title, min_score)
    return results


class _WithTruth(Transformed):
    """Every image transformed, and as it is, with its crowds."""

    def __getitem__(self, i: int) -> tuple[Sample, Sample]:
        truth = self.dataset.load(self.rows[i], keep_ignored=True)
        return self.transform(truth), truth


def _predict_segments(
    predict: Predict, dataset: Dataset, transform, workers: int, title: str
) -> tuple[Counts, dict]:
    """(the counts of all images, {row: prediction} of the first ones) on rank 0, ({}, {}) elsewhere.

    As `predict_dataset`, but each prediction is compared where it is made and then forgotten: 5000 maps are some GB.
    """
    rows, index = shard(len(dataset), rank(), world_size()), dataset.index
    loader = DataLoader(_WithTruth(dataset, transform, rows), None, num_workers=workers)
    counts, pictured = {}, {}
    with progress_bar(f"evaluate {title}", len(rows)) as bar:
        for row, (sample, truth) in zip(rows, loader):
            found = predict(collate([sample]))[0]
            crowd = index.ignore[index.rows(row)] if dataset.metric == "pq" else None
            _add(counts, segment_counts(found, truth, crowd, len(dataset.vocabulary)))
            if row < PICTURED:
                pictured[row] = with_rles(found)
            bar.update()
    total, predictions = {}, {}
    for part, shown in gather_on_main((counts, pictured)):
        _add(total, part)
        predictions |= shown
    return total, predictions


def _add(total: Counts, counts: Counts) -> None:
    for name, values in counts.items():
        total[name] = total.get(name, 0) + values


def predict_dataset(
    predict: Predict, dataset: Dataset, transform, workers: int, title: str
) -> dict:
    """{row: prediction} of the whole dataset on rank 0, {} elsewhere.

    Each image is predicted once, by one rank, alone in its batch: no result depends on its neighbours or on the ranks.
    Masks (N, H, W) are kept as `segmentations`, N RLEs.
    """
    rows = shard(len(dataset), rank(), world_size())
    loader = DataLoader(
        Transformed(dataset, transform, rows), batch_size=1, collate_fn=collate, num_workers=workers
    )
    predictions = {}
    with progress_bar(f"evaluate {title}", len(rows)) as bar:
        for row, batch in zip(rows, loader):
            predictions[row] = with_rles(predict(batch)[0])
            bar.update()
    return {row: found for part in gather_on_main(predictions) for row, found in part.items()}


def with_rles(found: dict) -> dict:
    """The prediction with its masks, if any, as RLEs: some hundred bytes each instead of the area of the image."""
    rles = {"segmentations": encode_masks(found["masks"])} if "masks" in found else {}
    return {field: value for field, value in found.items() if field != "masks"} | rles


def draw_predictions(
    dataset: Dataset, predictions: dict, folder: Path, title: str, min_score: float
) -> None:
    """predictions-<title>.jpg: ground truth beside predictions of the first images."""
    dataset = copy.copy(dataset)
    dataset.masks = "segmentations" in predictions[0]
    truth = [dataset.load(row) for row in range(min(PICTURED, len(dataset)))]
    found = [predictions[s.index] for s in truth]
    found = [f if s.segments is None else segment_rows(f) for s, f in zip(truth, found)]
    names = dataset.vocabulary.names
    picture = prediction_grid(
        [s.image for s in truth], list(map(vars, truth)), found, names, PICTURED, min_score
    )
    save_image(
        picture, folder / f"predictions-{re.sub(r'[^a-zA-Z0-9_.]+', '-', title).strip('-')}.jpg"
    )


def predict_files(
    predict: Predict,
    files: tuple[str, ...],
    vocabulary: Vocabulary,
    transform,
    folder: Path,
    min_score: float,
) -> None:
    """One drawn image per file, and all that is predicted, under the name of the file and its number.

    Detections: predictions.json, a COCO json whose annotations carry scores, and masks as RLEs. `panoptic`: panoptic/
    and panoptic.json, COCO's format. `semantic`: semantic/ with the class of each pixel (PNG of 8 bits, of 16 with more
    than 255 classes) and classes.txt with their names, the first is class 0.
    Raises InputError for a missing or broken image.
    """
    images, annotations, maps = [], [], []
    for i, file in enumerate(files):
        image, name = read_image(Path(file)), f"{Path(file).stem}-{i}"
        found = with_rles(
            predict(collate([transform(Sample.unlabelled(image, vocabulary.dataset, file, i))]))[0]
        )
        path = folder / f"{name}.jpg"
        picture, what = _draw(image, found, vocabulary, min_score)
        save_image(picture, path)
        log.info(f"{file}: {what}, drawn in {path}")
        images.append(
            {"id": i, "file_name": file, "height": image.shape[1], "width": image.shape[2]}
        )
        if "boxes" in found:
            annotations += to_coco_json(vocabulary, {i: found}, range(len(files)))
        if "panoptic" in found:
            _save_png(_id_colors(found["panoptic"]), folder / "panoptic" / f"{name}.png")
            maps.append(
                {
                    "image_id": i,
                    "file_name": f"{name}.png",
                    "segments_info": _segments_info(found, vocabulary),
                }
            )
        if "semantic" in found:
            dtype = np.uint8 if len(vocabulary) <= 255 else np.uint16
            _save_png(
                found["semantic"].cpu().numpy().astype(dtype), folder / "semantic" / f"{name}.png"
            )
    for i, annotation in enumerate(annotations):
        (*_, width, height), rle = annotation["bbox"], annotation.get("segmentation")
        annotation |= {"id": i, "area": area_of(rle) if rle else width * height, "iscrowd": 0}
    categories = [{"id": id, "name": name} for id, name in zip(vocabulary.ids, vocabulary.names)]
    if "boxes" in found:
        _save_json(images, categories, annotations, folder / "predictions.json")
        log.info(
            f"all {len(annotations)} detections, those of lower score too: {folder / 'predictions.json'}"
        )
    if maps:
        things = vocabulary.is_thing or [False] * len(vocabulary)
        categories = [
            category | {"isthing": int(thing)} for category, thing in zip(categories, things)
        ]
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        images = [
            image | {"file_name": os.path.relpath(image["file_name"], root)} for image in images
        ]
        _save_json(images, categories, maps, folder / "panoptic.json")
        log.info(
            f"segments as a panoptic dataset: {folder / 'panoptic.json'}, its images are in {root}/"
        )
    if "semantic" in found:
        with atomic_path(folder / "semantic" / "classes.txt") as path:
            path.write_text("\n".join(vocabulary.names) + "\n", encoding="utf-8")
        log.info(f"the class of each pixel: {folder / 'semantic'}/")


def _draw(
    image: Tensor, found: dict, vocabulary: Vocabulary, min_score: float
) -> tuple[Tensor, str]:
    """(the picture, what it shows in words): segments if they are predicted, else detections."""
    if "panoptic" in found or "semantic" in found:
        record = segment_rows(found)
        names = [vocabulary.names[label] for label in record["labels"].tolist()]
        what = f"{len(names)} {'segments' if 'panoptic' in found else 'classes'}"
        what += "" if names else " (nothing reaches --object-threshold)"
        return draw_segments(image, record["segments"], names, record.get("scores")), what
    shown = (found["scores"] >= min_score).nonzero().flatten()
    names = [found["class_names"][row] for row in shown.tolist()]
    rles = (
        [found["segmentations"][row] for row in shown.tolist()]
        if "segmentations" in found
        else None
    )
    masks = None if rles is None else decode_masks(rles, found["size"])
    best = (
        f" (the highest is {found['scores'].max():.2f})"
        if len(found["scores"]) and not names
        else ""
    )
    what = f"{len(names)} objects with a score of {min_score:g} or more{best}"
    return draw_boxes(
        image, found["boxes"][shown], names, found["scores"][shown], masks=masks
    ), what


def _segments_info(found: dict, vocabulary: Vocabulary) -> list[dict]:
    """COCO's description of the segments of a panoptic map, with the score of each."""
    panoptic, infos = found["panoptic"].cpu().numpy(), []
    for segment in found["segments_info"]:
        y, x = np.nonzero(panoptic == segment["id"])
        left, top = int(x.min()), int(y.min())
        box = [left, top, int(x.max()) + 1 - left, int(y.max()) + 1 - top]
        info = {
            "id": segment["id"],
            "category_id": vocabulary.ids[segment["label"]],
            "score": segment["score"],
        }
        infos.append(info | {"area": len(x), "bbox": box, "iscrowd": 0})
    return infos


def _id_colors(panoptic: Tensor) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8 of COCO: id = R + 256 G + 65536 B."""
    return np.stack([panoptic.cpu().numpy() >> shift & 255 for shift in (0, 8, 16)], axis=2).astype(
        np.uint8
    )


def _save_png(pixels: np.ndarray, path: Path) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def _save_json(images: list, categories: list, annotations: list, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps({"images": images, "categories": categories, "annotations": annotations})
        )
