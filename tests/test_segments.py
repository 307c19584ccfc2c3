"""Postprocessing of queries, against official results and cases worked by hand; pictures."""

import pytest
import torch
from parity import case, check, report, restore  # noqa: F401
from torch.nn import functional as F

from common import segments
from common.batch import Sample
from common.labels import Vocabulary
from common.masks import decode_masks
from common.segments import (
    FullMasks,
    instances,
    mask_boxes,
    panoptic_map,
    segment_rows,
    semantic_labels,
    semantic_map,
)
from common.visualize import color_of, draw_segments, prediction_grid, sample_grid


@pytest.fixture(scope="module")
def recorded():
    """Returns (probabilities (Q, K + 1), restored masks (Q, H, W)) per image, tensors, record."""
    tensors, record = case("mask2former_loss")
    config = record["config"]
    images = [
        (logits.softmax(dim=1), restore(masks, config["padded_hw"], size, original))
        for logits, masks, size, original in zip(
            tensors["post.pred_logits"],
            tensors["post.pred_masks"],
            config["image_sizes_hw"],
            config["output_sizes_hw"],
        )
    ]
    return images, tensors, record


def things_of(config):
    return [label in config["thing_classes"] for label in range(config["num_classes"])]


def test_semantic_equals_recorded(recorded):
    """Masks are restored before the classes are summed, unlike in the record `semantic_after`."""
    images, tensors, _ = recorded
    for i, (probabilities, masks) in enumerate(images):
        official = tensors[f"post.semantic.image{i}"]
        check("semantic", semantic_map(probabilities[:, :-1], masks), official, 1e-5)
        assert torch.equal(
            semantic_labels(probabilities[:, :-1], masks), official.argmax(0).short()
        )


@pytest.mark.parametrize("variant", ["default", "loose"])
def test_panoptic_equals_recorded(recorded, variant):
    images, tensors, record = recorded
    thresholds = record["config"]["panoptic_thresholds"][variant]
    for i, (probabilities, masks) in enumerate(images):
        panoptic, found = panoptic_map(
            probabilities,
            masks,
            things_of(record["config"]),
            thresholds["object_mask_threshold"],
            thresholds["overlap_threshold"],
            intersect=True,
        )
        assert torch.equal(panoptic, tensors[f"post.{variant}.panoptic.image{i}"])
        ours = [{"id": s["id"], "category_id": s["label"], "isthing": s["isthing"]} for s in found]
        assert ours == record["panoptic_segments"][f"{variant}.image{i}"]


@pytest.mark.parametrize("variant", ["instance_all", "instance"])
def test_instances_equal_recorded(recorded, variant):
    images, tensors, record = recorded
    config = record["config"]
    things = torch.tensor(things_of(config)) if variant == "instance" else None
    for i, (probabilities, masks) in enumerate(images):
        found = instances(probabilities[:, :-1], masks, config["test_topk"], things)
        check(
            f"{variant}: scores", found["scores"], tensors[f"post.{variant}.image{i}.scores"], 1e-5
        )
        assert torch.equal(found["labels"], tensors[f"post.{variant}.image{i}.classes"])
        assert torch.equal(found["masks"], tensors[f"post.{variant}.image{i}.masks"].bool())


# -- by hand ---------------------------------------------------------------------------------------


def test_restore_cuts_the_padding():
    """A ramp remains a ramp after bilinear resizing, except at borders. The padding is cut."""
    ramp = torch.arange(16.0).expand(1, 8, 16).clone()
    full = restore(ramp, (32, 64), (24, 40), (48, 80))
    assert full.shape == (1, 48, 80) and full.dtype == torch.float32
    expected = (torch.arange(80) + 0.5) / 2 / 4 - 0.5  # pixel -> input pixel -> cell
    assert torch.allclose(full[0, 20, 8:72], expected[8:72], atol=1e-5)


SIZES = [((9, 14), (32, 64), (30, 50), (97, 131)), ((8, 8), (32, 32), (21, 32), (11, 40))]


def full_masks(shape, count=7):
    """Masks of one of SIZES: whole, and as they are made in strips."""
    grid, padded, size, original = shape
    logits = 5 * torch.randn(count, *grid, generator=torch.Generator().manual_seed(0))
    return restore(logits, padded, size, original), FullMasks(logits, padded, size, original)


@pytest.fixture
def strips(monkeypatch):
    """Every image is made in strips of one to three rows, and no mask of an instance is kept."""
    monkeypatch.setattr(segments, "IN_CACHE", 1000)
    monkeypatch.setattr(segments, "MASKS", 0)


@pytest.mark.parametrize("shape", SIZES)
def test_strips_are_the_rows_of_the_whole(strips, shape):
    whole, masks = full_masks(shape)
    parts = list(masks.strips())
    assert len(parts) > 3 and max(part.shape[1] for part in parts) <= 10
    assert masks.shape == whole.shape
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    chosen = torch.tensor([True, False, True, False, False, True, False])
    some = torch.cat(list(masks[chosen].strips()), 1)
    torch.testing.assert_close(some, whole[chosen], rtol=0, atol=1e-5)


def test_few_masks_are_one_strip():
    whole, masks = full_masks(SIZES[0])
    (strip,) = masks.strips()
    torch.testing.assert_close(strip, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("intersect", [True, False])
def test_maps_of_strips_are_those_of_the_whole(strips, shape, intersect):
    whole, masks = full_masks(shape)
    p = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)).mul(4).softmax(1)
    assert torch.equal(semantic_labels(p[:, :-1], masks), semantic_labels(p[:, :-1], whole))
    things = [True, False, True, False]
    for overlap in (0.0, 0.3, 0.8):
        found = panoptic_map(p, masks, things, 0.1, overlap, intersect)
        expected = panoptic_map(p, whole, things, 0.1, overlap, intersect)
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    assert found[0].dtype == torch.int32


def test_unions_are_the_maxima_of_their_masks(strips):
    whole, masks = full_masks(SIZES[0])
    made = masks.united(torch.tensor([1, 0, 2, 1, 3, 1, 2]))
    members = [[1], [0, 3, 5], [2, 6], [4]]
    expected = torch.stack([whole[rows].amax(0) for rows in members])
    torch.testing.assert_close(torch.cat(list(made.strips()), 1), expected, rtol=0, atol=1e-5)
    some = made[torch.tensor([False, True, False, True])]
    found = torch.cat(list(some.strips()), 1)
    torch.testing.assert_close(found, expected[[1, 3]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SIZES)
def test_best_labels(strips, shape):
    """The last column is no class. A query stands for its best class alone."""
    whole, masks = full_masks(shape)
    p = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    p[2, 4] = 2
    score = p.amax(1)[:, None, None] * whole.sigmoid()
    score[p.argmax(1) == 4] = -1
    assert torch.equal(masks.best_labels(p), p.argmax(1)[score.argmax(0)].short())
    p[:, 4] = 2
    nothing = masks.best_labels(p)
    assert nothing.shape == whole.shape[1:] and not nothing.any()


@pytest.mark.parametrize("shape", SIZES)
def test_large_instances_are_rles(monkeypatch, shape):
    whole, masks = full_masks(shape)
    p = torch.rand(7, 3, generator=torch.Generator().manual_seed(1))
    expected = instances(p, whole, 9)
    assert torch.equal(instances(p, masks, 9)["masks"], expected["masks"])
    monkeypatch.setattr(segments, "IN_CACHE", 1000)
    monkeypatch.setattr(segments, "MASKS", 0)
    found = instances(p, masks, 9)
    assert "masks" not in found and found["labels"].tolist() == expected["labels"].tolist()
    decoded = decode_masks(found["segmentations"], tuple(whole.shape[1:]))
    assert torch.equal(decoded, expected["masks"])
    assert torch.equal(found["boxes"], expected["boxes"])
    torch.testing.assert_close(found["scores"], expected["scores"])
    none = instances(p, masks, 9, things=torch.zeros(3, dtype=torch.bool))
    assert none["masks"].shape == (0, *whole.shape[1:]) and none["boxes"].shape == (0, 4)


def test_semantic_labels():
    probabilities, masks = torch.rand(5, 7), torch.randn(5, 13, 9)
    expected = semantic_map(probabilities, masks)
    assert torch.allclose(expected[3, 4, 5], (probabilities[:, 3] * masks[:, 4, 5].sigmoid()).sum())
    assert torch.equal(semantic_labels(probabilities, masks), expected.argmax(0).short())


def queries(*rows, classes=3):
    """Returns probabilities (Q, K + 1) and logits (Q, 2, 10): 2 inside the columns, -2 outside.

    rows: (label, probability, columns) of each query
    """
    probabilities, logits = (
        torch.zeros(len(rows), classes + 1),
        torch.full((len(rows), 2, 10), -2.0),
    )
    for p, logit, (label, probability, columns) in zip(probabilities, logits, rows):
        p += (1 - probability) / classes
        p[label] = probability
        logit[:, columns] = 2.0
    return probabilities, logits


THINGS = (True, False, False)


def test_panoptic_rules():
    """Stuff is merged, things are not; no object, unsure and mostly covered queries are dropped."""
    inputs = queries(
        (0, 0.9, slice(0, 2)),
        (0, 0.85, slice(2, 4)),
        (1, 0.9, slice(4, 5)),
        (1, 0.95, slice(6, 7)),
        (3, 0.99, slice(8, 10)),  # no object
        (2, 0.5, slice(8, 10)),  # unsure
        (2, 0.82, slice(3, 7)),  # three of its four columns are lost
    )
    panoptic, found = panoptic_map(*inputs, THINGS, 0.8, 0.5, intersect=True)
    assert (
        panoptic.dtype == torch.int32 and panoptic.tolist() == [[1, 1, 2, 2, 3, 0, 3, 0, 0, 0]] * 2
    )
    scores = [s.pop("score") for s in found]
    assert scores == pytest.approx([0.9, 0.85, 0.95])  # of the merged ones the highest
    assert found == [
        {"id": 1, "label": 0, "isthing": True},
        {"id": 2, "label": 0, "isthing": True},
        {"id": 3, "label": 1, "isthing": False},
    ]


def test_panoptic_regions_of_both_papers():
    """With `intersect` a segment ends with its mask. Without, it has all pixels its query wins."""
    inputs = queries((0, 0.95, slice(0, 3)), (2, 0.9, slice(6, 9)))
    assert (
        panoptic_map(*inputs, THINGS, 0.8, 0.8, True)[0].tolist()
        == [[1, 1, 1, 0, 0, 0, 2, 2, 2, 0]] * 2
    )
    assert (
        panoptic_map(*inputs, THINGS, 0.8, 0.8, False)[0].tolist()
        == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 1]] * 2
    )


@pytest.mark.parametrize("intersect", [True, False])
def test_the_overlap_counts_all_pixels_that_a_query_wins(intersect):
    """Also those outside its mask: the first query loses 2 of the 5 pixels of its mask, but has 8.

    Official code divides all that it wins by the area of its mask, 8 / 5.
    """
    probabilities = torch.tensor([[0.9, 0.0, 0.0, 0.1], [0.0, 0.0, 0.85, 0.15]])
    masks = torch.tensor([[[0.9] * 5 + [0.4] * 5], [[0.99] * 2 + [0.1] * 8]])
    panoptic, found = panoptic_map(probabilities, masks.logit(), THINGS, 0.8, 0.8, intersect)
    outside = [0] * 5 if intersect else [1] * 5
    assert panoptic.tolist() == [[2, 2, 1, 1, 1, *outside]]
    assert [segment["label"] for segment in found] == [0, 2]


def test_panoptic_without_segments():
    panoptic, found = panoptic_map(*queries((3, 0.9, slice(0, 5))), THINGS, 0.5, 0.8, True)
    assert not panoptic.any() and panoptic.shape == (2, 10) and found == []
    empty = queries((0, 0.9, slice(0, 0)))  # its mask is empty
    assert all(
        panoptic_map(*empty, THINGS, 0.5, 0.8, intersect)[1] == [] for intersect in (True, False)
    )


def test_instances_by_hand():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    logits = torch.full((2, 4, 6), -1.0)
    logits[0, 1:3, 2:5] = 1.0
    logits[0, 1, 2] = 3.0
    found = instances(probabilities, logits, top_k=3)
    inside = torch.tensor([1.0] * 5 + [3.0]).sigmoid().mean()
    assert found["labels"].tolist() == [0, 1, 2]  # the mask of the best query is empty: 0
    assert torch.allclose(
        found["scores"], torch.stack([0.6 * inside, 0.3 * inside, torch.zeros(())]), atol=1e-6
    )
    assert found["boxes"].tolist() == [[2, 1, 5, 3], [2, 1, 5, 3], [0, 0, 0, 0]]
    assert torch.equal(found["masks"][0], logits[0] > 0) and not found["masks"][2].any()
    chosen = instances(probabilities, logits, top_k=3, things=torch.tensor([True, False, True]))
    assert chosen["labels"].tolist() == [0, 2] and chosen["masks"].shape == (2, 4, 6)
    assert len(instances(probabilities, logits)["scores"]) == 6
    none = instances(probabilities, logits, things=torch.zeros(3, dtype=torch.bool))
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, 4, 6)


def test_boxes_are_tight():
    masks = torch.rand(40, 9, 11, generator=torch.Generator().manual_seed(0)) > 0.97
    for box, mask in zip(mask_boxes(masks).tolist(), masks):
        y, x = mask.nonzero(as_tuple=True)
        expected = (
            [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1] if len(x) else [0] * 4
        )
        assert box == expected


def test_rows_of_predictions():
    info = [
        {"id": 7, "label": 4, "score": 0.5, "isthing": True},
        {"id": 2, "label": 4, "score": 1, "isthing": True},
    ]
    found = {"panoptic": torch.tensor([[0, 7], [2, 2]], dtype=torch.int32), "segments_info": info}
    rows = segment_rows(found | {"semantic": torch.zeros(2, 2)})
    assert rows["segments"].tolist() == [[-1, 0], [1, 1]]
    assert rows["labels"].tolist() == [4, 4] and rows["scores"].tolist() == [0.5, 1]
    rows = segment_rows({"semantic": torch.tensor([[9, 3], [3, 3]], dtype=torch.int16)})
    assert rows["segments"].tolist() == [[1, 0], [0, 0]] and rows["labels"].tolist() == [3, 9]
    nothing = segment_rows({"panoptic": torch.zeros(2, 2, dtype=torch.int32), "segments_info": []})
    assert (nothing["segments"] == -1).all() and len(nothing["labels"]) == len(
        nothing["scores"]
    ) == 0
    with pytest.raises(ValueError, match="segment 5 of the map is not in segments_info"):
        segment_rows({"panoptic": torch.tensor([[0, 5]]), "segments_info": info})


# -- pictures --------------------------------------------------------------------------------------


def gray(height=500, width=600):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def halves(name):
    return [64 + channel // 2 for channel in color_of(name)]


def test_segments_are_tinted_and_named():
    rows = torch.full((500, 600), -1)
    rows[:, :200], rows[:, 200:400] = 0, 1
    image = gray()
    drawn = draw_segments(image, rows, ["cat", "dog"], torch.tensor([0.5, 0.25]))
    assert drawn.shape == (3, 500, 600) and (image == 128).all()
    assert drawn[:, 100, 100].tolist() == halves("cat") and drawn[:, 100, 300].tolist() == halves(
        "dog"
    )
    assert drawn[:, 100, 500].tolist() == [128] * 3  # no segment
    assert (drawn[:, :, 199:201] == 255).all(dim=0).any(dim=1).all()  # a white line all along
    for name, columns in (("cat", slice(0, 200)), ("dog", slice(200, 400))):
        plate = (
            drawn[:, :, columns] == torch.tensor(color_of(name), dtype=torch.uint8)[:, None, None]
        ).all(dim=0)
        y, x = plate.nonzero(as_tuple=True)
        assert (
            len(y) > 500 and y.min() > 50 and y.max() < 450 and x.min() > 40 and x.max() < 160
        )  # well inside


def test_segments_of_one_class_have_one_color():
    rows = torch.arange(6).repeat_interleave(100).expand(500, 600)
    drawn = draw_segments(gray(), rows, ["cat"] * 6)
    for i in range(6):
        assert drawn[:, 20, 50 + 100 * i].tolist() == halves("cat")
    assert (drawn[:, :, 99:101] == 255).all(dim=0).any(dim=1).all()  # a line is between them


def test_thin_segments_have_no_name():
    rows = torch.zeros(500, 600, dtype=torch.int16)
    rows[250:254] = 1
    drawn = draw_segments(gray(), rows, ["cat", "dog"])
    assert (
        not (drawn == torch.tensor(color_of("dog"), dtype=torch.uint8)[:, None, None])
        .all(dim=0)
        .any()
    )


def test_segments_of_small_and_empty_images():
    rows = torch.zeros(32, 40, dtype=torch.int16)
    assert draw_segments(gray(32, 40), rows, ["cat"]).shape == (3, 480, 600)
    assert torch.equal(draw_segments(gray(), torch.full((500, 600), -1), []), gray())
    with pytest.raises(ValueError, match="row 0 of the segments, but 0 names"):
        draw_segments(gray(32, 40), rows, [])


def test_grids_show_segments():
    rows = torch.zeros(480, 480, dtype=torch.int16)
    rows[:, 240:] = -1
    sample = Sample.unlabelled(gray(480, 480), "one", 7, 0)
    sample.labels, sample.segments, sample.supervision = torch.tensor([1]), rows, "panoptic"
    drawn = sample_grid([sample], {"one": Vocabulary("one", ("cat", "dog"))})
    assert (
        drawn[:, 28 + 100, 100].tolist() == halves("dog")
        and drawn[:, 28 + 100, 400].tolist() == [128] * 3
    )
    found = segment_rows({"semantic": F.pad(torch.ones(480, 240), (240, 0)).long()})
    drawn = prediction_grid([gray(480, 480)], [vars(sample)], [found], ("cat", "dog"), [""])
    left, right = drawn[:, 28:, :484], drawn[:, 28:, 484:]
    assert left[:, 100, 100].tolist() == halves("dog") and left[:, 100, 400].tolist() == [128] * 3
    assert right[:, 100, 100].tolist() == halves("cat") and right[:, 100, 400].tolist() == halves(
        "dog"
    )
