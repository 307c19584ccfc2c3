"""The way of an image to the model: decoding, large-scale jitter, workers; colour jitter.

The photographs are drawn by code: noise that is smooth at several scales. The peer decodes with
torchvision and does the same with its v2 transforms.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import decode_image, encode_jpeg, read_file, write_file
from torchvision.transforms import v2

import scaledet
from benchmarks.detectors import random_boxes
from benchmarks.paired import Options, Row, fill
from common.datasets import load_datasets
from common.sampling import Mixture, make_loader
from common.transforms import LargeScaleJitter, jitter_colors

WIDTH, HEIGHT, BOXES = 584, 472, 7
OCTAVES, FINEST, QUALITY = 7, 12.0, 93  # of about 160 kB a photograph
BATCH = 16
SCALE = (0.1, 2.0)


def photo() -> Tensor:
    """Returns a photograph (3, HEIGHT, WIDTH) uint8: noise that is the stronger, the coarser."""
    image = torch.randn(1, 3, HEIGHT, WIDTH) * FINEST
    for octave in range(1, OCTAVES):
        factor = 2**octave
        noise = torch.randn(1, 3, HEIGHT // factor + 2, WIDTH // factor + 2)
        noise = noise * FINEST * 1.5**octave
        image += interpolate(noise, (HEIGHT, WIDTH), mode="bilinear")
    return (image[0] + 128).clamp(0, 255).byte()


def write_photos(folder: Path, count: int) -> tuple[list[Path], list[Tensor]]:
    """Writes `count` photographs and their json of boxes in COCO's format to a folder.

    Returns the paths, and the boxes (BOXES, 4) of each.
    """
    (folder / "images").mkdir()
    paths, all_boxes, images, annotations = [], [], [], []
    for i in range(count):
        path = folder / f"images/{i}.jpg"
        write_file(str(path), encode_jpeg(photo(), QUALITY))
        images.append({"id": i, "file_name": path.name, "width": WIDTH, "height": HEIGHT})
        boxes = random_boxes(BOXES, HEIGHT)
        for x1, y1, x2, y2 in boxes.tolist():
            size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
            annotations.append(entry | size)
        paths.append(path)
        all_boxes.append(boxes)
    categories = [{"id": 1, "name": "thing"}]
    record = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "photos.json").write_text(json.dumps(record))
    return paths, all_boxes


class Peer(Dataset):
    """The photographs by torchvision: decoding, ScaleJitter, padding, a random crop, a flip."""

    def __init__(self, paths: list[Path], boxes: list[Tensor], side: int):
        self.paths, self.boxes, self.side = paths, boxes, side
        self.resize = v2.ScaleJitter((side, side), SCALE, antialias=True)
        rest = [v2.RandomCrop(side), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()]
        self.rest = v2.Compose(rest)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> dict:
        image = decode_image(read_file(str(self.paths[row])), mode="RGB")
        boxes = tv_tensors.BoundingBoxes(
            self.boxes[row], format="XYXY", canvas_size=image.shape[-2:]
        )
        labels = torch.zeros(len(boxes), dtype=torch.long)
        sample = {"image": tv_tensors.Image(image), "boxes": boxes, "labels": labels}
        sample = self.resize(sample)
        height, width = sample["image"].shape[-2:]
        margins = [0, 0, max(0, self.side - width), max(0, self.side - height)]
        for name in ("image", "boxes"):
            sample[name] = v2.functional.pad(sample[name], margins)
        return self.rest(sample)


def stack(samples: list[dict]) -> tuple[Tensor, list[dict]]:
    """Returns the images as one tensor, and the samples."""
    return torch.stack([sample["image"] for sample in samples]), samples


def loaders(folder: Path, side: int, workers: int, photos: tuple, draws: int) -> dict:
    """Returns {name: function that reads `draws` images once} of Concord and torchvision."""
    paths, boxes = photos
    text = f"photos={folder / 'photos.json'}:{folder / 'images'}/"
    with patch.dict(os.environ, CONCORD_CACHE=str(folder / "cache")):
        [dataset] = load_datasets(text, "train")
    mixture = Mixture([dataset], {"photos": LargeScaleJitter(side, SCALE)}, seed=0)
    rows = [draw % len(paths) for draw in range(draws)]
    args = scaledet.Args(workers=workers, output=str(folder))
    order = [(row, draw) for draw, row in enumerate(rows)]
    ours = make_loader(mixture, args, {"photos": side}, sampler=order, batch_size=BATCH)
    settings = {"num_workers": workers, "collate_fn": stack, "batch_size": BATCH}
    peer = DataLoader(Peer(paths, boxes, side), sampler=rows, **settings)
    return {"concord": lambda: list(ours), "torchvision": lambda: list(peer)}


def colours(side: int, draws: int) -> dict[str, Callable]:
    """Returns {name: function that changes the colours of `draws` images}.

    On both sides each of the four changes is made half of the time.
    """
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    changes = [
        v2.ColorJitter(brightness=32 / 255),
        v2.ColorJitter(contrast=0.5),
        v2.ColorJitter(saturation=0.5),
        v2.ColorJitter(hue=0.1),
    ]
    peer = v2.Compose([v2.RandomApply([change], p=0.5) for change in changes])
    return {
        "jitter_colors": lambda: [jitter_colors(image) for _ in range(draws)],
        "v2.ColorJitter": lambda: [peer(image) for _ in range(draws)],
    }


def rows(options: Options) -> Iterator[Row]:
    """Yields a row for each size and number of workers, in ms an image, and one of colours."""
    sides, workers, count, draws = (640, 1024), (0, 1, 2), 64, 256
    if options.quick:
        sides, workers, count, draws = (96,), (0, 1), 4, 32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photos(folder, count)
        for side in sides:
            for number in workers:
                what = f"loader, large-scale jitter to {side} px, {number} workers"
                row = Row("data", what, "concord", "torchvision", unit="ms", goal=1)
                functions = loaders(folder, side, number, photos, draws)
                yield from fill([row], functions, options, draws)
    functions = colours(sides[0], draws // 8)
    row = Row("data", f"colour jitter, {sides[0]} px", *functions, unit="ms", goal=1)
    yield from fill([row], functions, options, draws // 8)
