"""Running a trained model over a dataset or over image files; what a detection is, the method's `predict` says."""

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader

from common.batch import Batch, Sample, collate
from common.datasets.base import Dataset, read_image
from common.distributed import gather_on_main, rank, world_size
from common.evaluation import to_coco_json
from common.labels import Vocabulary
from common.masks import area_of, decode_masks, encode_masks
from common.paths import atomic_path
from common.sampling import Transformed, shard
from common.training import progress_bar
from common.visualize import draw_boxes, prediction_grid, save_image

log = logging.getLogger("concord")

Predict = Callable[[Batch], list[dict]]  # the dictionaries of torchvision's detectors, plus class_names and size


def predict_dataset(predict: Predict, dataset: Dataset, transform, workers: int, title: str) -> dict:
    """{row: prediction} of the whole dataset on rank 0, {} elsewhere.

    Each image is predicted once, by one rank, alone in its batch: no result depends on its neighbours or on the ranks.
    Masks (N, H, W) are kept as `segmentations`, N RLEs.
    """
    rows = shard(len(dataset), rank(), world_size())
    loader = DataLoader(Transformed(dataset, transform, rows), batch_size=1, collate_fn=collate, num_workers=workers)
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
    dataset: Dataset, predictions: dict, folder: Path, title: str, min_score: float, limit: int = 8
) -> None:
    """predictions-<title>.jpg: ground truth beside predictions of the first images."""
    dataset = copy.copy(dataset)
    dataset.masks = "segmentations" in predictions[0]
    truth = [dataset.load(row) for row in range(min(limit, len(dataset)))]
    targets = [{"boxes": s.boxes, "labels": s.labels, "masks": s.masks} for s in truth]
    found = [predictions[s.index] for s in truth]
    names = dataset.vocabulary.names
    picture = prediction_grid([s.image for s in truth], targets, found, names, min_score=min_score)
    save_image(picture, folder / f"predictions-{re.sub(r'[^a-zA-Z0-9_.]+', '-', title).strip('-')}.jpg")


def predict_files(
    predict: Predict, files: tuple[str, ...], vocabulary: Vocabulary, transform, folder: Path, min_score: float
) -> None:
    """One drawn image per file, and predictions.json: a COCO json whose annotations carry scores, and masks as RLEs.

    Raises InputError for a missing or broken image.
    """
    images, annotations = [], []
    for i, file in enumerate(files):
        image = read_image(Path(file))
        found = with_rles(predict(collate([transform(Sample.unlabelled(image, vocabulary.dataset, file, i))]))[0])
        shown = (found["scores"] >= min_score).nonzero().flatten()
        names = [found["class_names"][row] for row in shown.tolist()]
        rles = [found["segmentations"][row] for row in shown.tolist()] if "segmentations" in found else None
        masks = None if rles is None else decode_masks(rles, found["size"])
        path = folder / f"{Path(file).stem}-{i}.jpg"
        save_image(draw_boxes(image, found["boxes"][shown], names, found["scores"][shown], masks=masks), path)
        images.append({"id": i, "file_name": file, "height": image.shape[1], "width": image.shape[2]})
        annotations += to_coco_json(vocabulary, {i: found}, range(len(files)))
        best = f"; the highest score is {found['scores'].max():.2f}" if len(found["scores"]) and not names else ""
        log.info(f"{file}: {len(names)} objects with a score of {min_score:g} or more, drawn in {path}{best}")
    for i, annotation in enumerate(annotations):
        (*_, width, height), rle = annotation["bbox"], annotation.get("segmentation")
        annotation |= {"id": i, "area": area_of(rle) if rle else width * height, "iscrowd": 0}
    categories = [{"id": id, "name": name} for id, name in zip(vocabulary.ids, vocabulary.names)]
    with atomic_path(folder / "predictions.json") as path:
        path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    log.info(f"all {len(annotations)} detections, those of lower score too: {folder / 'predictions.json'}")
