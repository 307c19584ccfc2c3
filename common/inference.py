"""Runs a trained model over a dataset, over images in memory and over image files.

Detections are `boxes` (N, 4), `labels` (N,), `scores` (N,), and `masks` (N, H, W) or
`segmentations` (N RLEs) if the model predicts masks. Segmentations are `semantic` (H, W), the class
of each pixel, and `panoptic` (H, W), whose values are 0 or the `id` of an entry of `segments_info`,
a dictionary with `label`, `isthing` and `score`. All are at the original size of the image, which
is in `size` (height, width).
"""

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from common.batch import Batch, Sample, collate
from common.datasets.dataset import Dataset
from common.datasets.files import read_image
from common.distributed import gather_on_main, rank, world_size
from common.errors import InputError
from common.evaluation import evaluate_detections, to_coco_json
from common.files import atomic_path
from common.labels import LabelSpace
from common.masks import area_of, decode_masks, encode_masks
from common.runlog import progress_bar
from common.sampling import Transformed, shard
from common.segment_metrics import Counts, segment_counts, segment_results, warn_of_absent
from common.segments import segment_rows
from common.visualize import draw_boxes, draw_segments, prediction_grid, save_image

log = logging.getLogger("concord")

Predict = Callable[[Batch], list[dict]]
PICTURED = 8  # images of a dataset that the picture of its predictions shows

# -- a dataset -------------------------------------------------------------------------------------


def evaluate_dataset(
    predict: Predict,
    dataset: Dataset,
    transform: Callable[[Sample], Sample],
    args,
    folder: Path,
    title: str = "",
    groups: dict[str, np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a dataset by its own metric and writes predictions-<title>.jpg to `folder`.

    "miou" needs predictions with `semantic`; "pq" needs `panoptic`, and gives mIoU too if there is
    `semantic`; all other metrics need detections.

    title:  default: the name of the dataset
    groups: {name: (C,) bool}, groups of classes whose AP50 is reported, too

    Returns {title: {metric: value}} on rank 0 and {} on the other ranks.
    """
    title = title or dataset.name
    of_segments = dataset.metric in ("miou", "pq")
    run = _predict_segments if of_segments else predict_dataset
    with torch.compiler.set_stance("force_eager"):  # test images come in many sizes
        predicted = run(predict, dataset, transform, args.workers, title)
    if rank() > 0:
        return {}
    if of_segments:
        counts, predictions = predicted
        warn_of_absent(title, counts, dataset.vocabulary.names)
        results = segment_results(counts, dataset.vocabulary.is_thing)
    else:
        predictions = predicted
        results = evaluate_detections(dataset, predictions, groups)
    draw_predictions(dataset, predictions, folder, title, args.score_threshold)
    return {title: results}


class _WithTruth(Transformed):
    """Yields each image twice: transformed, and as it is with its crowd annotations."""

    def __getitem__(self, i: int) -> tuple[Sample, Sample]:
        truth = self.dataset.load(self.rows[i], keep_ignored=True)
        return self.transform(truth), truth


def _predict_segments(
    predict: Predict,
    dataset: Dataset,
    transform: Callable[[Sample], Sample],
    workers: int,
    title: str,
) -> tuple[Counts, dict]:
    """Predicts and compares each image at once, since 5000 maps would take some GB.

    Returns the counts of all images and {row: prediction} of the first ones on rank 0, and two
    empty dictionaries on the other ranks.
    """
    index = dataset.index
    rows = shard(len(dataset), rank(), world_size())
    loader = DataLoader(_WithTruth(dataset, transform, rows), None, num_workers=workers)
    counts: Counts = {}
    pictured = {}
    with progress_bar(f"evaluate {title}", len(rows)) as bar:
        for row, (sample, truth) in zip(rows, loader):
            prediction = predict(collate([sample]))[0]
            crowd = index.ignore[index.rows(row)] if dataset.metric == "pq" else None
            _add(counts, segment_counts(prediction, truth, crowd, len(dataset.vocabulary)))
            if row < PICTURED:
                pictured[row] = with_rles(prediction)
            bar.update()
    total: Counts = {}
    predictions = {}
    for part, shown in gather_on_main((counts, pictured)):
        _add(total, part)
        predictions |= shown
    return total, predictions


def _add(total: Counts, counts: Counts) -> None:
    for name, values in counts.items():
        total[name] = total.get(name, 0) + values


def predict_dataset(
    predict: Predict,
    dataset: Dataset,
    transform: Callable[[Sample], Sample],
    workers: int,
    title: str,
) -> dict[int, dict]:
    """Returns {row: prediction} of the whole dataset on rank 0, and {} on the other ranks.

    Each image is predicted once, by one rank, in a batch of its own. So no result depends on other
    images or on the number of ranks. `masks` are replaced by `segmentations`, their RLEs.
    """
    rows = shard(len(dataset), rank(), world_size())
    transformed = Transformed(dataset, transform, rows)
    loader = DataLoader(transformed, batch_size=1, collate_fn=collate, num_workers=workers)
    predictions = {}
    with progress_bar(f"evaluate {title}", len(rows)) as bar:
        for row, batch in zip(rows, loader):
            predictions[row] = with_rles(predict(batch)[0])
            bar.update()
    gathered = {}
    for part in gather_on_main(predictions):
        gathered |= part
    return gathered


def with_rles(prediction: dict) -> dict:
    """Returns the prediction with RLEs in place of masks: some hundred bytes for each."""
    if "masks" not in prediction:
        return prediction
    prediction = dict(prediction)
    prediction["segmentations"] = encode_masks(prediction.pop("masks"))
    return prediction


def draw_predictions(
    dataset: Dataset, predictions: dict[int, dict], folder: Path, title: str, min_score: float
) -> None:
    """Writes predictions-<title>.jpg: the first images with ground truth and predictions."""
    dataset = copy.copy(dataset)
    dataset.masks = "segmentations" in predictions[0]
    truth = [dataset.load(row) for row in range(min(PICTURED, len(dataset)))]
    shown = []
    for sample in truth:
        prediction = predictions[sample.index]
        shown.append(prediction if sample.segments is None else segment_rows(prediction))
    images = [sample.image for sample in truth]
    names = dataset.vocabulary.names
    picture = prediction_grid(images, [*map(vars, truth)], shown, names, PICTURED, min_score)
    name = re.sub(r"[^a-zA-Z0-9_.]+", "-", title).strip("-")
    save_image(picture, folder / f"predictions-{name}.jpg")


def to_detection(
    boxes: Tensor, labels: Tensor, scores: Tensor, label_space: LabelSpace, batch: Batch, i: int
) -> dict:
    """Returns the detections of image `i` of a batch as torchvision's dictionary, on the CPU.

    boxes: (N, 4) in pixels of the network's input; they are scaled to the original size. The
    dictionary also has class_names, N names, and size (height, width).
    """
    height, width = batch.samples[i].original_size
    h, w = batch.sizes[i]
    boxes = boxes * boxes.new_tensor([width / w, height / h] * 2)
    return detection(boxes, labels, scores, label_space, (height, width))


def detection(
    boxes: Tensor, labels: Tensor, scores: Tensor, label_space: LabelSpace, size: tuple[int, int]
) -> dict:
    """Returns the detections of one image as torchvision's dictionary, on the CPU.

    boxes: (N, 4) in pixels of the original image; size: its height and width
    """
    return {
        "boxes": boxes.cpu(),
        "labels": labels.cpu(),
        "scores": scores.cpu(),
        "class_names": [label_space.names[label] for label in labels.tolist()],
        "size": size,
    }


# -- images and image files ------------------------------------------------------------------------


def to_sample(image: str | Path | Image.Image | Tensor, index: int = 0) -> Sample:
    """Wraps a path, a PIL image or a uint8 tensor (3, H, W) as a sample without annotations.

    Raises InputError for a missing or broken file, and for a tensor of another kind.
    """
    image_id = str(image) if isinstance(image, (str, Path)) else index
    if isinstance(image, (str, Path)):
        image = read_image(Path(image))
    elif isinstance(image, Image.Image):
        image = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape[:-2] != (3,):
        kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise InputError(
            f"image {index} is {kind}; give a path, a PIL image or a uint8 tensor (3, H, W)"
        )
    return Sample.unlabelled(image, "", image_id, index)


def predict_each(
    predict: Predict,
    images: Sequence[str | Path | Image.Image | Tensor],
    transform: Callable[[Sample], Sample],
) -> list[dict]:
    """Returns the prediction of each image, each in a batch of its own (`to_sample`)."""
    samples = (to_sample(image, i) for i, image in enumerate(images))
    return [predict(collate([transform(sample)]))[0] for sample in samples]


def predict_files(
    predict: Callable[..., list[dict]],
    args,
    label_space: LabelSpace,
    transform: Callable[[Sample], Sample],
    folder: Path,
) -> None:
    """Predicts the images --predict, draws each prediction and writes all of them to `folder`.

    predict:     called as predict(batch, label_space=...)
    label_space: the classes to look for

    Detections go to predictions.json in the COCO format, with scores and masks. Panoptic maps go to
    panoptic/ and panoptic.json, COCO's format. Semantic maps go to semantic/: PNGs with the class
    of each pixel (16 bits with more than 255 classes) and classes.txt, whose first line is class 0.

    Raises InputError for a missing or broken image.
    """
    label_space = label_space.with_things()
    vocabularies = list(label_space.vocabularies.values())
    ids = vocabularies[0].ids if len(vocabularies) == 1 else range(1, len(label_space) + 1)
    categories = [{"id": id, "name": name} for id, name in zip(ids, label_space.names)]
    files = args.predict
    images, annotations, segments = [], [], []
    for i, file in enumerate(files):
        sample = to_sample(file, i)
        batch = collate([transform(sample)])
        prediction = with_rles(predict(batch, label_space=label_space)[0])
        name = f"{Path(file).stem}-{i}"
        path = folder / f"{name}.jpg"
        picture, summary = _draw(sample.image, prediction, label_space, args.score_threshold)
        save_image(picture, path)
        log.info("%s: %s, drawn in %s", file, summary, path)

        height, width = sample.size
        images.append({"id": i, "file_name": file, "height": height, "width": width})
        if "boxes" in prediction:
            annotations += to_coco_json(ids, {i: prediction}, range(len(files)))
        if "panoptic" in prediction:
            _save_png(_id_colors(prediction["panoptic"]), folder / "panoptic" / f"{name}.png")
            info = _segments_info(prediction, ids)
            segments.append({"image_id": i, "file_name": f"{name}.png", "segments_info": info})
        if "semantic" in prediction:
            dtype = np.uint8 if len(label_space) <= 255 else np.uint16
            semantic = prediction["semantic"].cpu().numpy().astype(dtype)
            _save_png(semantic, folder / "semantic" / f"{name}.png")

    if "boxes" in prediction:
        for i, annotation in enumerate(annotations):
            *_, width, height = annotation["bbox"]
            rle = annotation.get("segmentation")
            area = area_of(rle) if rle else width * height
            annotation |= {"id": i, "area": area, "iscrowd": 0}
        path = folder / "predictions.json"
        _save_json(images, categories, annotations, path)
        log.info("all %d detections, those of lower score too: %s", len(annotations), path)
    if "panoptic" in prediction:
        for category, is_thing in zip(categories, label_space.is_thing):
            category["isthing"] = int(is_thing)
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        for image in images:
            image["file_name"] = os.path.relpath(image["file_name"], root)
        path = folder / "panoptic.json"
        _save_json(images, categories, segments, path)
        log.info("segments as a panoptic dataset: %s, its images are in %s/", path, root)
    if "semantic" in prediction:
        with atomic_path(folder / "semantic" / "classes.txt") as path:
            path.write_text("\n".join(label_space.names) + "\n", encoding="utf-8")
        log.info("the class of each pixel: %s/", folder / "semantic")


def _draw(
    image: Tensor, prediction: dict, label_space: LabelSpace, min_score: float
) -> tuple[Tensor, str]:
    """Draws segments if they are predicted, and detections otherwise. Also returns a summary."""
    if "panoptic" in prediction or "semantic" in prediction:
        record = segment_rows(prediction)
        names = [label_space.names[label] for label in record["labels"].tolist()]
        summary = f"{len(names)} {'segments' if 'panoptic' in prediction else 'classes'}"
        if not names:
            summary += " (no segment is probable enough)"
        return draw_segments(image, record["segments"], names, record.get("scores")), summary
    scores = prediction["scores"]
    rows = (scores >= min_score).nonzero().flatten()
    names = [prediction["class_names"][row] for row in rows.tolist()]
    masks = None
    if "segmentations" in prediction:
        rles = [prediction["segmentations"][row] for row in rows.tolist()]
        masks = decode_masks(rles, prediction["size"])
    summary = f"{len(names)} objects with a score of {min_score:g} or more"
    if len(scores) and not names:
        summary += f" (the highest is {scores.max():.2f})"
    picture = draw_boxes(image, prediction["boxes"][rows], names, scores[rows], masks=masks)
    return picture, summary


def _segments_info(prediction: dict, ids: Sequence[int | str]) -> list[dict]:
    """Returns COCO's description of the segments of a panoptic map, with their scores."""
    panoptic = prediction["panoptic"].cpu().numpy()
    infos = []
    for segment in prediction["segments_info"]:
        y, x = np.nonzero(panoptic == segment["id"])
        left, top = int(x.min()), int(y.min())
        infos.append(
            {
                "id": segment["id"],
                "category_id": ids[segment["label"]],
                "score": segment["score"],
                "area": len(x),
                "bbox": [left, top, int(x.max()) + 1 - left, int(y.max()) + 1 - top],
                "iscrowd": 0,
            }
        )
    return infos


def _id_colors(panoptic: Tensor) -> np.ndarray:
    """Writes ids (H, W) as COCO's colours (H, W, 3) uint8: id = R + 256 G + 65536 B."""
    ids = panoptic.cpu().numpy()
    channels = [ids >> shift & 255 for shift in (0, 8, 16)]
    return np.stack(channels, axis=2).astype(np.uint8)


def _save_png(pixels: np.ndarray, path: Path) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def _save_json(images: list, categories: list, annotations: list, path: Path) -> None:
    content = {"images": images, "categories": categories, "annotations": annotations}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content))
