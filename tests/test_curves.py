"""The curves of a training: what each panel shows, and that odd files are drawn as well."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from common.curves import MOST, draw_panels, draw_training, is_wide, read_steps, training_panels
from common.validation import EVALUATIONS


def line(step: int, loss: float, **others) -> dict:
    """A line of metrics.jsonl with one term, which is half of the loss."""
    return {"step": step, "loss_a": loss / 2, "loss": loss, "lr": 0.1, "img_per_s": 9.0} | others


def evaluation(step: int, results: dict, main: float = 0.5, of: str = "a AP") -> dict:
    return {"step": step, "main": main, "of": of, "results": results}


def write(path, lines: list) -> None:
    """Writes dictionaries as JSON lines, and texts as they are."""
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))


def labels(curves) -> list[str]:
    return [curve.label for curve in curves]


def test_panels_of_a_plain_training():
    panels = training_panels([line(20, 4.0), line(40, 2.0)], [])
    assert {title: labels(curves) for title, curves in panels.items()} == {
        "losses": ["loss", "loss_a"],
        "learning rate": ["lr"],
    }
    total, term = panels["losses"]
    assert total.bold and not term.bold
    assert total.steps.tolist() == [20, 40] and total.values.tolist() == [4, 2]
    assert term.values.tolist() == [2, 1]
    assert panels["learning rate"][0].values.tolist() == [0.1, 0.1]


def test_datasets_that_alternate():
    """A term is the mean of the last value of each dataset, and each has a loss of its own."""
    records = [line(1, 4.0, dataset="a"), line(2, 8.0, dataset="b"), line(3, 2.0, dataset="a")]
    records[1]["loss_b"] = 3.0
    panels = training_panels(records, [])
    curves = {curve.label: curve.values for curve in panels["losses"]}
    assert curves["loss"].tolist() == [4, 6, 5] and curves["loss_a"].tolist() == [2, 3, 2.5]
    assert np.isnan(curves["loss_b"][0]) and curves["loss_b"][1:].tolist() == [3, 3]
    first, second = panels["loss of each dataset"]
    assert (first.label, first.steps.tolist()) == ("loss of a", [1, 3])
    assert (second.values.tolist(), second.steps.tolist()) == ([8], [2])


def test_a_legend_has_few_entries():
    """The lowest terms are one sum, and so are the last datasets; a term that is 0 is left out."""
    terms = {f"loss_{i}": float(20 - i) for i in range(20)} | {"loss_a": 0.0}
    records = [line(i, 9.0, **terms, dataset=f"d{i:02}") for i in range(20)]
    titles = {f"t{i:02}": {"AP": 0.1, "AP50": 0.2} for i in range(20)}
    panels = training_panels(records, [evaluation(5, titles)])
    assert all(len(curves) <= MOST for curves in panels.values())
    assert labels(panels["metrics"]) == ["a AP", *(f"t{i:02} AP" for i in range(11))]
    curves = panels["losses"]
    assert labels(curves)[1:] == [f"loss_{i}" for i in range(10)] + ["10 lower terms"]
    assert curves[-1].values.tolist() == [sum(range(1, 11))] * 20
    last = panels["loss of each dataset"][-1]
    assert last.label == "loss of 9 others" and last.steps.tolist() == list(range(11, 20))
    few = {name: terms[name] for name in list(terms)[:11]} | {"loss_a": 0.0}
    assert labels(training_panels([line(1, 1.0) | few], [])["losses"])[-1] == "loss_10"


@pytest.mark.parametrize("count, metrics", [(1, 3), (4, 2), (6, 1)])
def test_metrics_of_few_datasets_are_shown_in_detail(count, metrics):
    """The main metric is the bold one. It is shown once, and what is never known is left out."""
    values = {"AP": 0.5, "AP50": 0.75, "AP75": 0.25, "APl": None}
    results = dict.fromkeys("abcdefg"[:count], values)
    evaluations = [evaluation(10, results), evaluation(20, results, 0.75)]
    main, *curves = training_panels([line(1, 1.0)], evaluations)["metrics"]
    assert main.label == "a AP" and main.bold and main.values.tolist() == [0.5, 0.75]
    assert len(curves) == count * metrics - 1 and "a AP" not in labels(curves)
    if count == 1:
        assert labels(curves) == ["a AP50", "a AP75"] and curves[0].values.tolist() == [0.75] * 2


def test_what_is_not_finite_is_a_gap():
    records = [line(1, 4.0), line(2, math.nan), line(3, math.inf), line(4, 2.0)]
    values = training_panels(records, [])["losses"][0].values
    assert np.isnan(values).tolist() == [False, True, True, False]
    nothing = [line(1, math.nan, lr=None)] * 2
    assert not training_panels(nothing, [])


def test_steps_that_repeat(tmp_path):
    """The later line counts, as after a resume; damaged lines are left out."""
    path = tmp_path / "metrics.jsonl"
    write(path, [line(20, 4.0), line(60, 2.5), line(40, 3.0), "{damaged\n", line(40, 2.0), "{"])
    assert [(record["step"], record["loss"]) for record in read_steps(path)] == [
        (20, 4.0),
        (40, 2.0),
        (60, 2.5),
    ]
    assert read_steps(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize(
    "values, wide",
    [([1, 99], False), ([1, 100], True), ([0, 1, 99], False), ([-1, 1, 1e4], False), ([0], False)],
)
def test_wide_ranges(values, wide):
    assert is_wide(np.array(values, float)) == wide


@pytest.mark.parametrize("last, scale", [(50, "linear"), (0.1, "log")])
def test_losses_of_a_wide_range_have_a_logarithmic_axis(last, scale):
    panels = training_panels([line(1, 100.0), line(2, last, lr=1e-9)], [])
    axes = draw_panels(panels).axes
    assert [one.get_yscale() for one in axes] == [scale, "linear"]
    assert axes[1].get_ylim()[0] == 0 and axes[0].get_ylim()[0] >= 0


def test_the_figure_shows_each_panel():
    """Names are drawn as they are, and few points are dots, since one has no line."""
    results = {"$größe_": {"AP": 0.5, "AP50": 0.7}}
    records = [line(1, 1.0, dataset="_a"), line(2, 3.0, dataset="$b$")]
    panels = training_panels(records, [evaluation(2, results, of="$größe_ AP")])
    figure = draw_panels(panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(panels)
    assert figure.get_figwidth() * figure.dpi == 1200
    for axes, curves in zip(figure.axes, panels.values(), strict=True):
        assert [drawn.get_ydata().tolist() for drawn in axes.lines] == [
            curve.values.tolist() for curve in curves
        ]
        assert {drawn.get_marker() for drawn in axes.lines} == {"o"}
        legend = axes.get_legend()
        shown = [text.get_text() for text in legend.get_texts()] if legend else ["lr"]
        assert shown == labels(curves)
    assert [drawn.get_linewidth() > 2 for drawn in figure.axes[0].lines] == [True, False]


@pytest.mark.parametrize(
    "lines, drawn",
    [([], False), ([line(20, 4.0)], False), ([line(20, 4.0), line(40, math.nan)], True)],
)
def test_two_steps_make_a_picture(tmp_path, lines, drawn):
    write(tmp_path / "metrics.jsonl", lines)
    write(tmp_path / EVALUATIONS, [evaluation(40, {"a": {"AP": None}}, None, "")])
    draw_training(tmp_path)
    assert (tmp_path / "curves.png").exists() == drawn
    assert not list(tmp_path.glob(".*"))
    if drawn:
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.size == (1200, 650)
