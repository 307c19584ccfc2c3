"""Fonts for names in any language: DejaVu Sans, and what this machine has for other letters."""

import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

log = logging.getLogger("concord")

SHOWN = 10  # names in a warning
PLACEHOLDERS = ("Last Resort", "Adobe Blank")  # they have a mere box for every letter


@dataclass(frozen=True, eq=False)
class Font:
    """A font file, the family by which matplotlib knows it, and its letters (N,) in order."""

    path: str
    family: str
    letters: np.ndarray

    def missing(self, text: str) -> set[str]:
        """Returns the letters of `text` that the font does not have."""
        wanted = np.array(sorted(map(ord, set(text))), np.int64)
        places = np.searchsorted(self.letters, wanted)  # a tenth of the time of np.isin
        has = np.append(self.letters, -1)[places] == wanted
        absent = wanted[~has]
        return set(map(chr, absent.tolist()))


def plain(text: str) -> str:
    """Returns a text as it is drawn: composed letters, one line, nothing invisible."""
    letters = []
    for letter in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(letter)
        if kind == "Cf" or "\ufe00" <= letter <= "\ufe0f":  # joiners; variants of emoji
            continue
        letters.append(" " if kind == "Cc" or letter.isspace() else letter)
    return "".join(letters)


@cache
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns a font of `size` pixels that has most letters of a `plain` text."""
    return _sized(best_font(text).path, size)


@cache
def _sized(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def best_font(text: str) -> Font:
    """Returns DejaVu Sans if it has all letters of a text, else the font that misses fewest."""
    best = default_font()
    fewest = len(best.missing(text))
    if not fewest:
        return best
    for font in installed_fonts():
        count = len(font.missing(text))
        if count < fewest:
            best = font
            fewest = count
    return best


def families(names: Iterable[str]) -> list[str]:
    """Returns matplotlib's families of the fonts of all names, DejaVu Sans first."""
    found = [default_font().family]
    for name in names:
        family = best_font(plain(name)).family
        if family not in found:
            found.append(family)
    return found


@cache
def default_font() -> Font:
    """Returns DejaVu Sans, which matplotlib ships, in bold: its strokes are wider than a pixel."""
    import matplotlib  # here, since it takes a fifth of a second

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return _read_font(str(path), "DejaVu Sans")


@cache
def installed_fonts() -> list[Font]:
    """Returns the upright fonts of this machine, those of normal weight first."""
    from matplotlib.font_manager import fontManager

    entries = [entry for entry in fontManager.ttflist if entry.style == "normal"]
    entries.sort(key=lambda entry: (entry.weight != 400, entry.fname))
    fonts = []
    for entry in entries:
        if entry.name.startswith(PLACEHOLDERS):
            continue
        try:
            _sized(entry.fname, 20)  # fonts of coloured bitmaps have one size only
            fonts.append(_read_font(entry.fname, entry.name))
        except (OSError, RuntimeError):
            continue
    return fonts


def _read_font(path: str, family: str) -> Font:
    """Reads which letters a font has. Raises OSError or RuntimeError if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    letters = np.array(sorted(FT2Font(path).get_charmap()), np.int64)
    return Font(path, family, letters)


_told: set[str] = set()  # names that a warning has named, or counted


def tell_of_squares(names: Iterable[str]) -> None:
    """Warns of names with letters that no font has, in one line; of each name once in a run."""
    squares = []
    for name in dict.fromkeys(names):
        if name in _told:
            continue
        text = plain(name)
        if best_font(text).missing(text):
            squares.append(name)
    _told.update(squares)
    if squares:
        shown = ", ".join(f"'{name[:40]}'" for name in squares[:SHOWN])
        more = f" and {len(squares) - SHOWN} more" if len(squares) > SHOWN else ""
        log.warning(
            "pictures show squares in place of letters that no font here has, of %d names: %s%s; "
            "install a font that has them, such as Noto Sans CJK",
            len(squares),
            shown,
            more,
        )
