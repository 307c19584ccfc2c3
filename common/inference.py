"""Runs a trained model over a dataset, over images in memory and over image files.

Detections are `boxes` (N, 4), `labels` (N,), `scores` (N,), and `masks` (N, H, W) or
`segmentations` (N RLEs) if the model predicts masks. Segmentations are `semantic` (H, W), the class
of each pixel, and `panoptic` (H, W), whose values are 0 or the `id` of an entry of `segments_info`,
a dictionary with `label`, `isthing` and `score`. All are at the original size of the image, which
is in `size` (height, width).

In an evaluation, a second thread does for an image what needs no model, while the device predicts
the next one.
"""

import copy
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from common.batch import Batch, Sample, collate
from common.console import progress_bar
from common.datasets.dataset import Dataset
from common.datasets.files import decode_image
from common.datasets.pixels import Decoded, to_rgb
from common.distributed import gather_on_main, rank, world_size
from common.errors import InputError, SomeFailed
from common.evaluation import evaluate_detections
from common.fonts import tell_of_squares
from common.frames import read_file
from common.inputs import find_files
from common.labels import LabelSpace
from common.masks import encode_masks
from common.predictions import PredictionWriter
from common.sampling import Transformed, shard
from common.segment_metrics import (
    Counts,
    image_score,
    segment_counts,
    segment_results,
    warn_of_absent,
)
from common.segments import segment_rows
from common.tables import Evidence
from common.thing_ap import thing_masks, thing_results
from common.unreadable import load_patiently
from common.visualize import prediction_grid, save_image

log = logging.getLogger("concord")

Predict = Callable[[Batch], list[dict]]
Worst = dict[int, tuple[float, dict]]  # row of an image -> its score and its prediction
PICTURED = 8  # images of a dataset that the picture of its predictions shows


@contextmanager
def second_thread() -> Iterator[Callable[..., None]]:
    """Yields hand_over(function, *given), which has a second thread call functions, in their order.

    hand_over waits until the call before has ended. So no more than two predictions are in memory.
    It raises the error of that call, with its own traceback; that of the last call is raised at the
    end of the block. However the block ends, what was handed over is done, and the thread ends.
    """
    before: Future | None = None

    def hand_over(function: Callable, *given: object) -> None:
        nonlocal before
        ended, before = before, pool.submit(function, *given)
        if ended:
            ended.result()

    # its thread begins at the first call: then a loader has forked its processes already
    with ThreadPoolExecutor(1) as pool:
        yield hand_over
        if before:
            before.result()


# -- a dataset -------------------------------------------------------------------------------------


def evaluate_dataset(
    predict: Predict,
    dataset: Dataset,
    transform: Callable[[Sample], Sample],
    args: Any,
    folder: Path,
    title: str = "",
    groups: dict[str, np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a dataset by its own metric and writes predictions-<title>.jpg to `folder`.

    "miou" needs predictions with `semantic`; "pq" needs `panoptic`, and gives mIoU too if there is
    `semantic`, and the AP of things if there are `things`; all other metrics need detections.

    title:  default: the name of the dataset
    groups: {name: (C,) bool}, groups of classes whose AP50 is reported, too

    Returns {title: {metric: value}} on rank 0 and {} on the other ranks.
    """
    title = title or dataset.name
    control = title != dataset.name
    of_segments = dataset.metric in ("miou", "pq")
    run = _predict_segments if of_segments else predict_dataset
    predicted = run(predict, dataset, transform, args.workers, title)
    if rank() > 0:
        return {}
    if of_segments:
        counts, things, predictions, worst = predicted
        warn_of_absent(title, counts, dataset.vocabulary.names)
        results = segment_results(counts, dataset.vocabulary)
        scores = {row: score for row, (score, _) in worst.items()}
        shown = {row: prediction for row, (_, prediction) in worst.items()}
        if not control:
            results.evidence = Evidence(dataset, shown, scores, counts.get("semantic"))
        if things:
            of_things = thing_results(dataset, things, args.data_root)
            results |= of_things
            results.classes |= of_things.classes
    else:
        predictions = predicted
        results = evaluate_detections(dataset, predictions, groups, control)
    if dataset.trained_on:
        log.warning("%s: these are results on its TRAINING images", title)
    draw_predictions(dataset, predictions, folder, title, args.score_threshold)
    return {title: results}


class _WithTruth(Transformed):
    """Yields each image twice: transformed, and as it is with its crowd annotations."""

    def __getitem__(self, i: int) -> tuple[Sample, Sample]:
        truth = load_patiently(self.dataset, self.rows[i], keep_ignored=True)
        return self.transform(truth), truth


def _predict_segments(
    predict: Predict,
    dataset: Dataset,
    transform: Callable[[Sample], Sample],
    workers: int,
    title: str,
) -> tuple[Counts, dict, dict, Worst]:
    """Predicts each image and compares it before the next but one: 5000 maps would take some GB.

    Returns the counts of all images, {row: (instances of things, true masks)} if they are
    predicted, {row: prediction} of the first images, and the worst images; four empty ones on ranks
    other than 0.
    """
    index = dataset.index
    rows = shard(len(dataset), rank(), world_size())
    loader = DataLoader(_WithTruth(dataset, transform, rows), None, num_workers=workers)
    counts: Counts = {}
    things = {}
    pictured = {}
    worst: Worst = {}

    def compare(row: int, truth: Sample, prediction: dict) -> None:
        crowd = index.ignore[index.rows(row)] if dataset.metric == "pq" else None
        of_image = segment_counts(prediction, truth, crowd, len(dataset.vocabulary))
        _add(counts, of_image)
        if found := prediction.pop("things", None):
            found = with_rles(found) | {"size": prediction["size"]}
            things[row] = found, thing_masks(truth, dataset.vocabulary.is_thing)
        if row < PICTURED:
            pictured[row] = with_rles(prediction)
        _keep_worst(worst, row, image_score(of_image), prediction)

    with progress_bar(f"evaluate {title}", len(rows)) as bar, second_thread() as hand_over:
        for row, (sample, truth) in zip(rows, loader):
            hand_over(compare, row, truth, predict(collate([sample]))[0])
            bar.update()
    total: Counts = {}
    predictions = {}
    every = {}
    worst_of_all: Worst = {}
    for part, of_things, shown, lowest in gather_on_main((counts, things, pictured, worst)):
        _add(total, part)
        every |= of_things
        predictions |= shown
        for row, (score, prediction) in lowest.items():
            _keep_worst(worst_of_all, row, score, prediction)
    return total, every, predictions, worst_of_all


def _keep_worst(worst: Worst, row: int, score: float, prediction: dict) -> None:
    """Adds an image, and drops the best one of more than PICTURED; of equal ones the last row."""
    if math.isnan(score):  # nothing to find in it
        return
    worst[row] = score, with_rles(prediction)
    if len(worst) > PICTURED:
        del worst[max(worst, key=lambda row: (worst[row][0], row))]


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

    def keep(row: int, prediction: dict) -> None:
        predictions[row] = with_rles(prediction)

    with progress_bar(f"evaluate {title}", len(rows)) as bar, second_thread() as hand_over:
        for row, batch in zip(rows, loader):
            hand_over(keep, row, predict(batch)[0])
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
    rows = range(min(PICTURED, len(dataset)))
    name = re.sub(r"[^a-zA-Z0-9_.]+", "-", title).strip("-")
    captions = [""] * len(rows)
    path = folder / f"predictions-{name}.jpg"
    save_image(picture_rows(dataset, predictions, rows, captions, min_score), path)


def picture_rows(
    dataset: Dataset,
    predictions: dict[int, dict],
    rows: Sequence[int],
    captions: Sequence[str],
    min_score: float,
) -> Tensor:
    """Draws images of a dataset, rows of its index, with ground truth and prediction.

    captions: of the ground truth of each image; its image-level labels follow
    Returns (3, h, w) uint8.
    """
    dataset = copy.copy(dataset)
    dataset.masks = "segmentations" in predictions[rows[0]]
    truth = [dataset.load(row) for row in rows]
    shown = []
    titles = list(captions)
    names = dataset.vocabulary.names
    for i, sample in enumerate(truth):
        if sample.image_labels is not None:
            labels = ", ".join(names[label] for label in sample.image_labels.tolist())
            titles[i] = f"{titles[i]} {labels}".strip()
        prediction = predictions[sample.index]
        shown.append(prediction if sample.segments is None else segment_rows(prediction))
    images = [sample.image for sample in truth]
    tell_of_squares(names)
    return prediction_grid(images, [*map(vars, truth)], shown, names, titles, min_score)


def to_detection(
    boxes: Tensor, labels: Tensor, scores: Tensor, label_space: LabelSpace, batch: Batch, i: int
) -> dict:
    """Returns the detections of image `i` of a batch as torchvision's dictionary, on the CPU.

    boxes: (N, 4) in pixels of the network's input; they are scaled to the original size. The
    dictionary also has class_names, N names, and size (height, width).
    """
    boxes = to_original(boxes, batch, i)
    return detection(boxes, labels, scores, label_space, batch.samples[i].original_size)


def to_original(boxes: Tensor, batch: Batch, i: int) -> Tensor:
    """Scales boxes (N, 4) of image `i` from pixels of the network's input to its original size."""
    height, width = batch.samples[i].original_size
    h, w = batch.sizes[i]
    return boxes * boxes.new_tensor([width / w, height / h] * 2)


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

    Its `image` has half the original size if it is a very large JPEG, see `decode_image`.
    Raises InputError for a missing or broken file, and for a tensor of another kind.
    """
    if isinstance(image, (str, Path)):
        path = os.path.expanduser(image)
        decoded = decode_image(Path(path), reduce=True)
        return decoded_sample(decoded, str(image), index)
    if isinstance(image, Image.Image):
        try:
            upright = ImageOps.exif_transpose(image)  # a copy
            return decoded_sample(to_rgb(upright), index, index)
        except ValueError as error:
            raise InputError(f"image {index} cannot be used ({error})") from None
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape[:-2] != (3,):
        kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise InputError(
            f"image {index} is {kind}; give a path, a PIL image or a uint8 tensor (3, H, W)"
        )
    return Sample.unlabelled(image, "", index, index)


def decoded_sample(decoded: Decoded, image_id: int | str, index: int) -> Sample:
    """Wraps a decoded image file as a sample without annotations."""
    sample = Sample.unlabelled(decoded.image, "", image_id, index)
    return replace(sample, original_size=decoded.size)


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
    args: Any,
    label_space: LabelSpace,
    transform: Callable[[Sample], Sample],
    folder: Path,
) -> None:
    """Predicts what --predict names (`find_files`) and writes it to `folder` (`PredictionWriter`).

    predict:     called as predict(batch, label_space=...)
    label_space: the classes to look for

    A file that cannot be read, or that does not fit into memory, is named in the log, and all
    others are predicted. Raises SomeFailed at the end if there was such a file, but InputError if
    no other was named.
    """
    label_space = label_space.with_things()
    files, problems = find_files(args.predict)
    num_files = len(files) + sum(problems.values())
    if num_files > 1:
        for line in problems:
            log.error("%s", line)
    writer = PredictionWriter(folder, label_space, args.score_threshold)

    def predict_one(sample: Sample) -> dict:
        batch = collate([transform(sample)])
        return with_rles(predict(batch, label_space=label_space)[0])

    try:
        for file in files:
            if line := _predict_file(predict_one, file, writer):
                problems[line] += 1
                log.error("%s", line)
    finally:  # what is predicted is kept, also after an interrupt
        writer.close()
    if problems and num_files == 1:
        raise InputError(*problems)
    if problems:
        failed = sum(problems.values())
        raise SomeFailed(
            f"{failed} of {num_files} files could not be predicted, see above; {folder}/ has the "
            "others"
        )
    log.info("results and pictures: %s/", folder)


def _predict_file(
    predict_one: Callable[[Sample], dict], file: str, writer: PredictionWriter
) -> str:
    """Predicts and writes an image, or each frame of a video. Returns what went wrong, or ""."""
    try:
        for frame, decoded in read_file(file):
            sample = decoded_sample(decoded, file, len(writer.images))
            writer.add(file, frame, sample, predict_one(sample))
            writer.notes.update(filter(None, decoded.notes))
    except InputError as error:
        return str(error)
    except (MemoryError, torch.OutOfMemoryError):
        return f"image {file} does not fit into memory; make it smaller or cut it into tiles"
    return ""
