"""Names in pictures and plots: accents, other scripts, what no font has, signs of TeX."""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import REPO
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from common import fonts
from common.label_report import closest_labels, similarity_heatmap
from common.labels import LabelSpace, Vocabulary
from common.visualize import draw_boxes, grid


@pytest.fixture(autouse=True)
def fresh():
    """Each test finds the fonts again, and warns again."""
    caches = (fonts.font_for, fonts.best_font, fonts.installed_fonts)
    for cached in caches:
        cached.cache_clear()
    fonts._told.clear()
    yield
    for cached in caches:
        cached.cache_clear()


def drawn(name):
    box = torch.tensor([[20.0, 60, 280, 180]])
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    return draw_boxes(image, box, [name], colors=[(0, 200, 0)])


def test_accents_are_drawn():
    pictures = [drawn(letter * 4) for letter in "ÉÜñßЖΩ"]
    square = drawn("猫" * 4)
    for i, picture in enumerate(pictures):
        assert not torch.equal(picture, square)
        assert all(not torch.equal(picture, other) for other in pictures[:i])


def test_accents_do_not_leave_the_plate():
    gray = torch.full((3, 200, 300), 100, dtype=torch.uint8)
    picture = draw_boxes(gray, torch.tensor([[20.0, 60, 280, 180]]), ["ẤÉ"], colors=[(0, 200, 0)])
    drawn_rows = (picture != 100).any(0).any(1).nonzero()
    plate_rows = (picture == torch.tensor([0, 200, 0]).view(3, 1, 1)).all(0).any(1).nonzero()
    assert drawn_rows.min() == plate_rows.min()


def test_composed_and_decomposed_letters_are_one_picture():
    assert torch.equal(drawn("Caf\u00e9"), drawn("Cafe\u0301"))
    assert fonts.plain("a\nb\tc\u200d\ufe0f") == "a b c"


@pytest.fixture
def cats(tmp_path):
    """A font with the one letter 猫, as a machine may have it, a filled square of 800 units."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", "cat"]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({0x732B: "cat"})
    empty = TTGlyphPen(None).glyph()
    builder.setupGlyf({".notdef": empty, "cat": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "cats.ttf")
    fonts.installed_fonts.cache_clear()
    yield "Cats"
    fontManager.ttflist[:] = before


def test_other_letters_come_from_a_font_of_the_machine(cats, caplog):
    picture = drawn("猫猫")
    plate = picture[:, 100:119, 44:60]
    white = (plate > 200).all(0)
    assert white.sum() > 80  # the filled squares of the font
    fonts.tell_of_squares(["猫", "É"])
    assert not caplog.records
    assert fonts.families(["É", "猫"]) == ["DejaVu Sans", "Cats"]


def test_names_without_a_font_are_told_in_one_line(caplog):
    names = ["cat", "猫", *("犬" * n for n in range(1, 15))]
    fonts.tell_of_squares(names)
    fonts.tell_of_squares(names)
    (line,) = caplog.messages
    assert "'猫', '犬'" in line and "and 5 more" in line and "of 15 names" in line
    assert "cat'" not in line.replace("'猫'", "")


def space(*names):
    vocabularies = [Vocabulary("a", names[:2]), Vocabulary("$b$ \\frac{", names[2:])]
    return LabelSpace(vocabularies, lambda names, dataset: torch.eye(len(names), 4))


ODD = ("US$ 5 \\frac{a}$ coin", "猫", "x" * 600, "$x^2$")


def test_plots_take_every_name_as_it_is(tmp_path):
    """No mathtext, which would raise, and no warning of each letter or place."""
    odd = space(*ODD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        similarity_heatmap(closest_labels(odd), odd, tmp_path / "a.png")
        grid([drawn(ODD[0]), drawn(ODD[3])], 2, ["$\\frac{$ a", "$x$"])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_dollars_are_drawn():
    assert not torch.equal(drawn("$x^2$"), drawn("x^2"))


def test_the_report_is_utf8_in_any_locale(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from common.labels import *;"
        "from common.label_report import report_label_space;"
        "space = LabelSpace([Vocabulary('a', ['\\u732b', '\\u00c9'], text=torch.eye(2))]);"
        "report_label_space(space, Path(sys.argv[1]))"
    )
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "猫" in (tmp_path / "label_space.md").read_text(encoding="utf-8")
