"""Tests of the positions of boxes, names and masks, of stable colours, and of label reports."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import visualize
from common.batch import Sample
from common.class_colors import to_oklab
from common.drawing import covered
from common.heat_map import FEW, HeatMap, figure_of
from common.label_report import (
    BLOCK,
    _choose,
    closest_labels,
    label_report,
    report_label_space,
    similarity_heatmap,
)
from common.labels import COMPARED, LabelSpace, Vocabulary
from common.masks import encode_masks
from common.visualize import (
    best_boxes,
    cell_size,
    color_of,
    draw_boxes,
    grid,
    prediction_grid,
    sample_grid,
    save_image,
)

ROOT = Path(__file__).resolve().parent.parent


def gray(height=500, width=600):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def where(image, color):
    """(K, 2) rows and columns of the pixels of exactly this colour."""
    return (image == torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)).all(dim=0).nonzero()


def space_of(sizes, text=None):
    """A label space of datasets of these sizes. text: (C, D), random by default"""
    if text is None:
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(sum(sizes), 32, generator=generator)
    parts = torch.nn.functional.normalize(text).split(list(sizes))
    vocabularies = []
    for i, part in enumerate(parts):
        names = tuple(f"d{i} name {k}" for k in range(len(part)))
        vocabularies.append(Vocabulary(f"d{i}", names, text=part))
    return LabelSpace(vocabularies)


def test_box_and_plate_are_where_they_belong():
    image = gray()
    drawn = draw_boxes(image, torch.tensor([[100.0, 200.0, 300.0, 400.0]]), ["cat"])
    assert drawn.shape == image.shape and drawn.dtype == torch.uint8 and (image == 128).all()
    for y, x in ((200, 150), (400, 150), (300, 100), (300, 300)):  # the middles of the four edges
        assert tuple(drawn[:, y, x].tolist()) == color_of("cat")
    assert (drawn[:, 250:350, 150:250] == 128).all()  # nothing inside
    plate = where(drawn[:, :200], color_of("cat"))
    assert 178 <= plate[:, 0].min() < 195 and plate[:, 1].min() == 100 and plate[:, 1].max() < 160


def test_plates_are_legible():
    for name in ("cat", "dog", "person", "traffic light", "Footwear", "boat"):
        drawn = draw_boxes(gray(), torch.tensor([[100.0, 200.0, 300.0, 400.0]]), [name])
        luminance = (torch.tensor(color_of(name)) * torch.tensor([0.299, 0.587, 0.114])).sum()
        text = 0 if luminance > 130 else 255
        assert (
            abs(float(luminance) - text) > 100 and len(where(drawn[:, 175:200], (text,) * 3)) > 10
        )


@pytest.mark.parametrize("scores", [None, torch.zeros(0)])
def test_zero_boxes(scores):
    assert torch.equal(draw_boxes(gray(), torch.zeros(0, 4), [], scores), gray())


def test_names_must_match_boxes():
    with pytest.raises(ValueError, match="1 boxes but 2 names"):
        draw_boxes(gray(), torch.zeros(1, 4), ["cat", "dog"])


def test_small_images_are_enlarged():
    image = torch.randint(0, 255, (3, 32, 40), dtype=torch.uint8)
    drawn = draw_boxes(image, torch.tensor([[8.0, 16.0, 24.0, 30.0]]), ["cat"])
    assert drawn.shape == (3, 480, 600)
    assert tuple(drawn[:, 300, 8 * 15].tolist()) == color_of("cat")
    assert torch.equal(draw_boxes(image, torch.zeros(0, 4), [])[:, ::15, ::15], image)


@pytest.mark.parametrize(
    "box", [[0, 0, 599, 499], [580, 2, 640, 20], [-50, -50, 10, 10], [560, 480, 599, 499]]
)
def test_plates_stay_inside(box):
    drawn = draw_boxes(
        gray(), torch.tensor([box], dtype=torch.float32), ["a name " * 60], torch.tensor([0.5])
    )
    plate = where(drawn, color_of("a name " * 60))
    assert drawn.shape == (3, 500, 600)
    rows = plate[:, 0].bincount(minlength=500)
    assert (rows > 200).sum() >= 10  # a plate nearly as wide as the image


def test_broken_boxes_are_drawn_somewhere():
    boxes = torch.tensor(
        [[float("nan")] * 4, [float("inf"), 0, -float("inf"), 9], [300, 300, 200, 200]]
    )
    assert draw_boxes(gray(), boxes, ["a", "b", "c"]).shape == (3, 500, 600)


def test_given_colors_and_overlapping_plates():
    boxes = torch.tensor([[100.0, 200.0, 300.0, 400.0]]).repeat(2, 1)
    drawn = draw_boxes(gray(), boxes, ["cat", "dog"], colors=[(250, 0, 0), (0, 0, 250)])
    assert (
        len(where(drawn[:, :200], (250, 0, 0))) > 200
    )  # the plate of the first is not covered by the second
    assert len(where(drawn[:, 200:], (0, 0, 250))) > 200


def run_python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return run.stdout


def test_colors_are_stable_across_processes():
    code = "from common.class_colors import *\n"
    shown = "print([color_of(n) for n in ('person', 'Person', 'traffic light', 'Sneakers')])\n"
    assert run_python(code + shown) == run_python(code + shown)  # outside a run, by the letters
    first = run_python(f"{code}assign_colors(['Sneakers', 'person'])\n{shown}")
    again = run_python(f"{code}assign_colors(['sneakers', 'Person', 'traffic light'])\n{shown}")
    assert again == run_python(f"{code}print([palette()[i] for i in (1, 1, 2, 0)])")
    assert again.split("), (")[:2] == first.split("), (")[:2]  # others that follow change nothing


def test_classes_of_a_run_have_colors_that_differ():
    code = "from common.class_colors import *\nimport numpy as np\n"
    code += "assign_colors(map(str, range(40)))\n"
    code += "lab = to_oklab(np.array([color_of(str(i)) for i in range(40)]))\n"
    code += "apart = np.linalg.norm(lab[:, None] - lab, axis=-1)\n"
    code += "print(apart[np.triu_indices(40, 1)].min() > 0.08, len(set(palette())) == COUNT)"
    assert run_python(code).split() == ["True", "True"]


def test_oklab_of_known_colours():
    # white and red as the definition of OKLab gives them
    found = to_oklab(np.array([[255.0, 255, 255], [255, 0, 0]]))
    expected = [[1, 0, 0], [0.627955, 0.224863, 0.125846]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_plates_leave_small_objects_free():
    boxes = torch.tensor([[100.0, 200.0, 300.0, 400.0], [105.0, 180.0, 150.0, 195.0]])
    drawn = draw_boxes(gray(), boxes, ["a large one", "x"], colors=[(250, 0, 0), (0, 0, 250)])
    small = drawn[:, 183:193, 108:148]
    assert (small == 128).all()  # the plate of the large one would be there
    assert len(where(drawn, (250, 0, 0))) > 1000


def test_a_plate_is_not_on_its_own_small_object():
    box = torch.tensor([[20.0, 2.0, 40.0, 12.0]])  # no room above
    drawn = draw_boxes(gray(), box, ["name"], colors=[(250, 0, 0)])
    assert (drawn[:, 5:10, 23:37] == 128).all()


def test_shares_that_plates_cover():
    found = covered([(0, 0, 9, 9), (5, 0, 14, 9)], [(0, 0, 9, 19), (10, 0, 10, 0)])
    np.testing.assert_allclose(found, [[0.5, 0], [0.25, 1]])


def test_few_boxes_of_an_object_are_drawn():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [1, 0, 10, 10], [50, 50, 60, 60]])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.3])
    assert best_boxes(boxes, scores, 0.3).tolist() == [1, 2, 3]  # the third of a place is left out
    assert best_boxes(boxes, scores, 0.4).tolist() == [1, 2]
    apart = torch.arange(30.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    kept = best_boxes(apart, torch.linspace(0, 1, 30), 0.0).tolist()
    assert kept == list(range(29, 9, -1))


@pytest.mark.parametrize(
    "sizes, columns, cell",
    [
        ([(192, 192)] * 3, 4, (480, 480)),  # small ones are enlarged
        ([(3000, 4000), (3000, 4000), (400, 300)], 4, (372, 496)),  # at most 2000 pixels
        ([(480, 640)], 2, (480, 640)),
        ([(100, 2000)], 1, (798, 1996)),  # a panorama leaves room for a name
    ],
)
def test_cells_of_a_grid(sizes, columns, cell):
    found = cell_size(sizes, columns)
    assert found == cell
    drawn = grid([torch.zeros(3, *found, dtype=torch.uint8)] * columns, columns)
    assert drawn.shape[2] <= 2000


def test_small_heat_maps_have_numbers():
    names = ["a", "b"]
    values = np.array([[1.0, 0.25], [-0.5, 0.0]])
    texts = figure_of(HeatMap(values, names, names, "title", "cosine", -0.5)).axes[0].texts
    assert [text.get_text() for text in texts] == ["1.00", ".25", "-.50", ".00"]
    assert [text.get_color() for text in texts] == ["black", "white", "white", "white"]
    sparse = figure_of(HeatMap(values, names, names, "title", "share", blank=True)).axes[0].texts
    assert [text.get_text() for text in sparse] == ["1.00", ".25", "-.50"]
    many = [str(i) for i in range(FEW + 1)]
    heat_map = HeatMap(np.eye(FEW + 1), many, many, "title", "share")
    assert not figure_of(heat_map).axes[0].texts


def test_masks_are_half_transparent():
    masks = torch.zeros(2, 500, 600, dtype=torch.bool)
    masks[0, 210:390, 110:290] = True
    masks[1, 250:300, 150:200] = True  # within the first: drawn over it, whatever the order
    image, boxes = (
        gray(),
        torch.tensor([[100.0, 200.0, 300.0, 400.0], [100.0, 200.0, 300.0, 400.0]]),
    )
    colors = [(200, 0, 0), (0, 0, 200)]
    for order in ([0, 1], [1, 0]):
        drawn = draw_boxes(
            image, boxes, ["cat", "dog"], colors=[colors[i] for i in order], masks=masks[order]
        )
        assert drawn[:, 350, 250].tolist() == [164, 64, 64] and drawn[:, 275, 175].tolist() == [
            82,
            32,
            132,
        ]
        assert drawn[:, 205, 150].tolist() == [128] * 3 and drawn[:, 450, 450].tolist() == [128] * 3
        assert (
            tuple(drawn[:, 300, 100].tolist()) == colors[order[1]]
        )  # the line of the box is not covered
    assert (image == 128).all()
    assert torch.equal(draw_boxes(image, boxes[:0], [], masks=masks[:0]), image)


def test_masks_of_small_images_are_enlarged():
    masks = torch.zeros(1, 32, 40, dtype=torch.bool)
    masks[0, 24:30, 10:20] = True
    drawn = draw_boxes(
        gray(32, 40), torch.tensor([[0.0, 0, 1, 1]]), ["a"], colors=[(0, 0, 0)], masks=masks
    )
    assert drawn.shape == (3, 480, 600)
    assert torch.equal(
        (drawn[0, 15 * 20 :, 15 * 8 :] == 64),
        masks[0, 20:, 8:].repeat_interleave(15, 0).repeat_interleave(15, 1),
    )


def test_masks_are_drawn_fast():
    masks = torch.zeros(30, 2000, 3000, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[40 * i : 40 * i + 300, 60 * i : 60 * i + 400] = True
    start = time.process_time()
    draw_boxes(gray(2000, 3000), torch.zeros(30, 4), ["a"] * 30, masks=masks)
    assert time.process_time() - start < 10  # 1 second alone


def test_grid_pads():
    images = [gray(40, 60), gray(50, 30), gray(20, 20)]
    assert grid(images, 2).shape == (3, 2 * 54, 2 * 64)
    captioned = grid(images, 2, ["first", "second " * 20, ""])
    assert captioned.shape == (3, 2 * 82, 2 * 64)
    assert torch.equal(captioned[:, 28:68, :60], images[0])
    assert len(where(captioned[:, :28, :60], (20, 20, 20))) > 5  # letters
    assert (captioned[:, 82 + 28 + 20 :, :] == 255).all()  # paper, where a cell is not filled


@pytest.mark.parametrize("name", ["a.jpg", "b.png", "new/folder/c.png"])
def test_save_image(tmp_path, name):
    save_image(gray(40, 60), tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (60, 40) and abs(picture.getpixel((5, 5))[0] - 128) < 3
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_save_image_refuses_other_suffixes(tmp_path):
    with pytest.raises(ValueError):
        save_image(gray(), tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())


def test_sample_grid():
    vocabularies = {
        name: Vocabulary(name, (f"{name} cat", f"{name} dog")) for name in ("one", "two")
    }
    box, label = torch.tensor([[20.0, 30.0, 200.0, 300.0]]), torch.tensor([1])
    samples = [
        Sample(gray(480, 640), "one", "boxes", 7, 0, (480, 640), box, label),
        Sample(gray(500, 480), "two", "boxes", 8, 0, (500, 480), box, label),
        Sample(
            gray(480, 480),
            "two",
            "image_labels",
            "x",
            0,
            (480, 480),
            box[:0],
            label[:0],
            image_labels=label,
        ),
    ]
    drawn = sample_grid(samples, vocabularies)
    assert drawn.shape == (3, 2 * (480 + 32), 2 * 484)
    for name, columns in (("one dog", slice(0, 484)), ("two dog", slice(484, None))):
        assert len(where(drawn[:, :512, columns], color_of(name))) > 500
    photo = (drawn[:, 28:388, :480] != 255).any(0)  # 480 x 640 pixels fill the cell's width
    assert photo[:, :8].all() and photo.float().mean() > 0.99  # but for the letters of a plate
    assert (drawn[:, 388:512, :484] == 255).all()  # below it is paper
    assert sample_grid(samples[:1], vocabularies).shape == (3, 480 + 32, 644)


def test_sample_grid_shows_masks():
    masks = torch.zeros(1, 480, 480, dtype=torch.bool)
    masks[0, 100:200, 50:150] = True
    box, label = torch.tensor([[20.0, 30.0, 200.0, 300.0]]), torch.tensor([0])
    sample = Sample(gray(480, 480), "one", "instances", 7, 0, (480, 480), box, label, masks)
    drawn = sample_grid([sample], {"one": Vocabulary("one", ("cat",))})
    expected = [64 + channel // 2 for channel in color_of("cat")]
    assert drawn[:, 32 - 4 + 150, 100].tolist() == expected  # below the caption


def test_prediction_grid_shows_masks():
    masks = torch.zeros(3, 480, 480, dtype=torch.bool)
    masks[0, 300:340, 300:400], masks[1, 350:400, 300:400], masks[2, 410:460, 300:400] = (
        True,
        True,
        True,
    )
    box = torch.tensor([[20.0, 30.0, 200.0, 250.0]])
    target = {"boxes": box, "labels": torch.tensor([0]), "masks": masks[:1]}
    found = {
        "boxes": box.repeat(2, 1),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.1, 0.9]),
    }
    drawn = prediction_grid(
        [gray(480, 480)],
        [target],
        [found | {"segmentations": encode_masks(masks[1:])}],
        "abc",
        [""],
    )
    colors = [[64 + channel // 2 for channel in color_of(name)] for name in "abc"]
    left, right = drawn[:, 28:, :484], drawn[:, 28:, 484:]
    assert left[:, 320, 350].tolist() == colors[0] and right[:, 435, 350].tolist() == colors[2]
    assert (
        right[:, 320, 350].tolist() == right[:, 375, 350].tolist() == [128] * 3
    )  # truth; below the score


def test_prediction_grid():
    images = [gray(480, 480)] * 3
    target = {"boxes": torch.tensor([[20.0, 30.0, 200.0, 300.0]]), "labels": torch.tensor([0])}
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "scores": torch.zeros(0),
    }
    found = {
        "boxes": target["boxes"].repeat(2, 1),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.1]),
    }
    names = ("cat", "dog", "cow")
    drawn = prediction_grid(images, [target] * 3, [found, none, found], names, ["F1 .5", "", ""])
    assert drawn.shape == (3, 3 * (480 + 32), 2 * 484)
    left, right = drawn[:, :512, :484], drawn[:, :512, 484:]
    assert len(where(left, color_of("cat"))) > 500 and not len(where(left, color_of("dog")))
    assert len(where(right, color_of("dog"))) > 500 and not len(
        where(right, color_of("cow"))
    )  # below the score


def test_a_caption_says_that_boxes_are_left_out(monkeypatch):
    captions = []
    monkeypatch.setattr(visualize, "grid", lambda images, columns, words: captions.extend(words))
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1)
    found = {"boxes": boxes, "labels": torch.arange(3), "scores": torch.tensor([0.9, 0.8, 0.4])}
    truth = {"boxes": boxes[:1], "labels": torch.tensor([0])}
    for score in (0.3, 0.5):
        prediction_grid([gray(40, 40)], [truth], [found], ("a", "b", "c"), [""], score)
    assert captions[1::2] == ["prediction, score >= 0.3, 2 of 3 boxes", "prediction, score >= 0.5"]


@pytest.mark.parametrize(
    "sizes", [(12,), (1,), (20, 30), (3, 1, 5, 2), (120,), (80, 365, 500, 1203), (100, 2)]
)
def test_heatmap_is_written(tmp_path, sizes):
    start, path, space = time.process_time(), tmp_path / "map.png", space_of(sizes)
    similarity_heatmap(closest_labels(space), space, path)
    assert time.process_time() - start < 5
    with Image.open(path) as picture:
        assert min(picture.size) > 400


def test_heatmap_shows_partners():
    pairs = torch.eye(300)  # the labels have nothing in common but for these
    for a, b in ((5, 250), (7, 100), (100, 260)):
        pairs[b, a] = 1
    space = space_of((90, 110, 100), pairs)
    shown = _choose(closest_labels(space), space, 60)
    assert {5, 250, 7, 100, 260} <= set(shown) and len(shown) == len(set(shown)) <= 60
    owners = [0 if label < 90 else 1 if label < 200 else 2 for label in shown]
    assert owners == sorted(owners)


@pytest.mark.parametrize("sizes", [(BLOCK - 1, 2, 300), (BLOCK + 5,)])
def test_closest_labels_are_those_of_all_cosines(sizes):
    space = space_of(sizes)
    found = closest_labels(space, 4)
    cosines = (space.text @ space.text.T).fill_diagonal_(-2)
    if len(sizes) > 1:
        owner = space.dataset_of_label
        cosines[owner[:, None] == owner] = -2
    torch.testing.assert_close(found.cosines, cosines.topk(4, 1).values)
    torch.testing.assert_close(cosines.gather(1, found.labels), found.cosines)
    for dataset, (values, labels) in zip(space.datasets, found.partners, strict=True):
        own = space.scope(dataset)
        expected = cosines[:, own].max(1).values
        expected[expected == -2] = -torch.inf
        torch.testing.assert_close(values, expected)
        assert ((labels >= 0) & (labels < len(space.vocabularies[dataset]))).all()


def test_many_labels_are_told_of_in_a_line(tmp_path, caplog):
    caplog.set_level("INFO", "concord")
    space = space_of((COMPARED, 1), torch.randn(COMPARED + 1, 2))
    report_label_space(space, tmp_path)
    assert f"compares the text of {COMPARED + 1} labels with each other" in caplog.text
    assert len((tmp_path / "label_space.md").read_text().splitlines()) == 7 + COMPARED + 1


def test_label_report():
    road = [0.1, 0, 0, 0.995]
    text = torch.tensor(
        [[1.0, 0, 0, 0], [0, 1, 0, 0], [0.8, 0, 0.6, 0], [0, 0.994, 0.109, 0], road]
    )
    names = ("cat", "sofa"), ("kitty|tom", "couch", "road")
    parts = zip(("one", "two"), names, text.split([2, 3]))
    space = LabelSpace([Vocabulary(dataset, own, text=rows) for dataset, own, rows in parts])
    lines = label_report(closest_labels(space, top=2), space).splitlines()
    assert lines[2:4] == ["| one | 2 | 1 |", "| two | 3 | 1 |"]
    assert lines[7:9] == [
        "| one | cat | two: kitty\\|tom (0.80), two: road (0.10) |",
        "| one | sofa | two: couch (0.99), two: kitty\\|tom (0.00) |",
    ]
    assert lines[11] == "| two | road | one: cat (0.10), one: sofa (0.00) |" and len(lines) == 12


def test_label_report_of_one_dataset():
    text = torch.tensor([[1, 0, 0], [0.2, 0.98, 0], [0.994, 0, 0.109]])
    space = LabelSpace([Vocabulary("one", ("cat", "dog", "kitty"), text=text)])
    report = label_report(closest_labels(space), space)
    assert "| one | 3 | 2 |" in report
    assert "| one | cat | one: kitty (0.99), one: dog (0.20) |" in report
    assert "another dataset" not in report
