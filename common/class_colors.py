"""A colour for each class name, the same in every picture of a run."""

import colorsys
import zlib
from collections.abc import Iterable
from functools import cache

import numpy as np

from common.labels import fold

Color = tuple[int, int, int]
COUNT = 256  # colours of the palette; a further class has that of an earlier one
# from linear RGB to the cones' responses, and from their cube roots to OKLab
# (bottosson.github.io/posts/oklab)
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_places: dict[str, int] = {}  # of the classes of this run in the palette


def assign_colors(names: Iterable[str]) -> None:
    """Gives each of the class names that has no colour yet the next one of the palette.

    A run first calls it with the classes of its training, so that all its commands agree.
    """
    for name in names:
        _places.setdefault(fold(name), len(_places))


def color_of(name: str) -> Color:
    """Returns the RGB colour of a class name: its own in the palette, or one of 72 by its letters.

    The second is for names outside a run. It is the same in all processes.
    """
    place = _places.get(fold(name))
    if place is not None:
        return palette()[place % COUNT]
    number = zlib.crc32(name.casefold().encode())  # hash() would differ between processes
    hue = (number % 24) / 24
    level = number // 24 % 3
    lightness = (0.38, 0.5, 0.66)[level]
    channels = colorsys.hls_to_rgb(hue, lightness, 0.95)
    return tuple(round(255 * channel) for channel in channels)


@cache
def palette() -> list[Color]:
    """Returns COUNT colours; each is as far from all before it as can be, in OKLab.

    Black, white, grey and what is nearly so are not among them.
    """
    steps = np.linspace(0, 255, 12).round()
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    lab = to_oklab(colors)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lightness > 0.42) & (lightness < 0.9) & (chroma > 0.12)
    colors, lab = colors[vivid], lab[vivid]
    chosen = [int(np.abs(colors - (230, 25, 25)).sum(axis=1).argmin())]  # begins with a red
    distance = np.full(len(lab), np.inf)
    while len(chosen) < COUNT:
        to_last = np.linalg.norm(lab - lab[chosen[-1]], axis=1)
        distance = np.minimum(distance, to_last)
        chosen.append(int(distance.argmax()))
    return [tuple(color) for color in colors[chosen].astype(int).tolist()]


def to_oklab(colors: np.ndarray) -> np.ndarray:
    """Converts sRGB colours (N, 3) in 0..255 to OKLab (N, 3), whose distances are those we see."""
    scaled = colors / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ CONES.T) @ OKLAB.T
