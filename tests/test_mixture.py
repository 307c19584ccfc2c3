"""--dataset-ratios, and what a training tells of its datasets."""

import logging
import re
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import METHODS, small_runs
from test_data import labelled

from common.errors import InputError
from common.preview import items_of_datasets, tell_mixture
from common.sampling import (
    ClassAwareSampler,
    RepeatFactorSampler,
    image_ratios,
    make_sampler,
    repeat_factors,
)

SMALL = labelled("a", [[0], [0, 1], [], [0]], 3)
# where the demonstration begins with one dataset
SEVERAL = {"detic": "coco,o365", "oneformer": "coco-panoptic,ade20k-panoptic"}
LARGE = labelled("b", [[c % 2] for c in range(36)], 2)


def share_of_first(sampler, first: int = 4, count: int = 8000) -> float:
    return np.mean([row < first for row, _ in islice(sampler, count)])


@pytest.mark.parametrize(
    "flag, own, expected",
    [
        ("", None, None),
        ("", {"a": 4, "b": 36}, {"a": 4, "b": 36}),
        ("auto", {"a": 4, "b": 36}, {"a": 2, "b": 6}),
        ("b=5", {"a": 4, "b": 36}, {"a": 1, "b": 5}),
    ],
)
def test_the_flag_replaces_what_the_paper_does(flag, own, expected):
    args = SimpleNamespace(dataset_ratios=flag)
    assert image_ratios(args, [SMALL, LARGE], own) == expected


def test_a_ratio_of_an_unknown_dataset_is_refused():
    args = SimpleNamespace(dataset_ratios="c=5")
    with pytest.raises(InputError, match="--dataset-ratios c=5: no dataset 'c' is trained on"):
        image_ratios(args, [SMALL, LARGE])


def test_factors_follow_the_ratios_and_keep_the_length_of_an_epoch():
    plain = repeat_factors([SMALL, LARGE], 0.5)
    ratios = repeat_factors([SMALL, LARGE], 0.5, {"a": 3, "b": 1})
    assert ratios.sum() == pytest.approx(plain.sum())
    assert ratios[:4].sum() == pytest.approx(0.75 * plain.sum())
    assert ratios[:4] / ratios[0] == pytest.approx(plain[:4] / plain[0])
    assert share_of_first(RepeatFactorSampler(ratios, 0)) == pytest.approx(0.75, abs=0.02)


def test_classes_share_the_ratio_of_their_dataset():
    """Without ratios two of the four classes with images are those of the first dataset."""
    assert share_of_first(ClassAwareSampler([SMALL, LARGE], 0)) == pytest.approx(0.5, abs=0.02)
    sampler = ClassAwareSampler([SMALL, LARGE], 0, ratios={"a": 1, "b": 4})
    assert share_of_first(sampler) == pytest.approx(0.2, abs=0.02)
    rows = np.bincount([row for row, _ in islice(sampler, 8000)], minlength=40)
    assert rows[1] == pytest.approx(8000 * 0.1 * 4 / 3, rel=0.1)  # of both classes
    for kind in ("class-aware", "random"):
        sampler = make_sampler(kind, [SMALL, LARGE], {"a": 1, "b": 4}, 0, 0, 0, 1)
        assert share_of_first(sampler) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_follows_the_ratios_and_says_so(
    method, tiny_root, tmp_path, train_here, caplog
):
    caplog.set_level(logging.INFO, logger="concord")
    flags = small_runs(method, tmp_path / "run", tiny_root, steps=1)[0]
    place = flags.index("--datasets") + 1
    flags[place] = SEVERAL.get(method, flags[place])
    names = flags[place].split(",")
    ratios = ",".join(f"{name}={ratio}" for name, ratio in zip(names, (1, 3, 1)))
    train_here(method, [*flags, "--dataset-ratios", ratios])
    told = [
        re.match(r"(\S+): .*; (\d+)% of all that is seen, each image about once in", line)
        for line in caplog.messages
    ]
    shares = {line[1]: int(line[2]) for line in told if line}
    total = 4 if len(names) == 2 else 5
    assert [shares[name] for name in names] == [
        pytest.approx(100 * ratio / total, abs=6) for ratio in (1, 3, 1)[: len(names)]
    ]
    assert (tmp_path / "run" / "first_batch.jpg").exists() or list(
        tmp_path.glob("*/first_batch.jpg")
    )


def test_items_are_sorted_by_dataset():
    batches = [[(0, 10), (5, 11)], [(4, 12), (3, 13)]]
    items, count = items_of_datasets(batches, np.array([0, 4, 6]))
    assert items == [[(0, 10), (3, 13)], [(5, 11), (4, 12)]] and count == 2


def test_how_often_an_image_is_seen(caplog):
    """Of 4 images 6 are seen in 2 steps of 2 ranks: each once in 2 x 4 / (6 x 2) of a step."""
    caplog.set_level(logging.INFO, logger="concord")
    tell_mixture([SMALL, LARGE], [[(0, 0)] * 6, [(5, 0)] * 2], batches=2, ranks=2)
    first, second = caplog.messages
    assert first.endswith("; 75% of all that is seen, each image about once in 1 steps")
    assert second.endswith("; 25% of all that is seen, each image about once in 18 steps")
    tell_mixture([SMALL], [[]], batches=2, ranks=1)
    assert caplog.messages[-1].endswith("; NONE of it is seen in the first 2 steps")
