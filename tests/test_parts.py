"""--accumulate: a batch in parts trains as the undivided batch does."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from conftest import METHODS, small_runs
from torch import nn

from common.parts import Parts, in_parts, join
from common.runlog import RunLog


def gradients(method, folder, tiny_root, monkeypatch, train_here, parts: int) -> list[dict]:
    """The gradients of the first step of each stage of a training, by parameter, and the loss."""
    flags = small_runs(method, folder, tiny_root, steps=1)[0]
    flags += ["--accumulate", str(parts), "--batch-size", "4", "--amp", "off", "--lr", "1e-9"]
    flags += ["--seed", "1"]  # with 0, a METR box has a side on one of an object: a kink of GIoU
    found = []
    check_finite = RunLog.check_finite

    def spy(run_log, losses, step, batch):
        named = run_log.content[0].named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        found[-1]["loss"] = losses["loss"].detach()
        return check_finite(run_log, losses, step, batch)

    monkeypatch.setattr(RunLog, "check_finite", spy)
    train_here(method, flags)
    monkeypatch.setattr(RunLog, "check_finite", check_finite)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_are_those_of_the_undivided_batch(
    method, tiny_root, tmp_path, monkeypatch, train_here
):
    """In parts of two and one images, with all counts of the losses."""
    whole, parted = (
        gradients(method, tmp_path / str(parts), tiny_root, monkeypatch, train_here, parts)
        for parts in (1, 3)
    )
    assert len(whole) == len(parted) > 0
    for one, other in zip(whole, parted):
        assert one.keys() == other.keys()
        largest = max(float(g.abs().max()) for g in one.values())
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5 * largest)


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.calls = []

    @in_parts
    def extract(self, images, sizes):
        self.calls.append((len(images), sizes))
        return [(images * self.factor).exp()]


@pytest.fixture
def three_parts(monkeypatch):
    monkeypatch.setattr(Parts, "number", 3)


def test_a_part_is_computed_again_for_its_gradient(three_parts):
    model = Doubling()
    images = torch.arange(4.0)
    [result] = model.extract(images, [1, 2, 3, 4])
    assert model.calls == [(2, [1, 2]), (1, [3]), (1, [4])]
    result.sum().backward()
    assert model.calls[3:] == [(1, [4]), (1, [3]), (2, [1, 2])]
    assert float(model.factor.grad) == pytest.approx(float((images * (2 * images).exp()).sum()))


def test_a_prediction_and_a_single_image_are_not_divided(three_parts):
    model = Doubling()
    with torch.no_grad():
        model.extract(torch.ones(4), [1, 2, 3, 4])
    model.extract(torch.ones(1), [1])
    assert model.calls == [(4, [1, 2, 3, 4]), (1, [1])]


@dataclass
class Box:
    rows: torch.Tensor
    shape: tuple[int, int]


def test_join_keeps_the_structure():
    pair = namedtuple("pair", "first second")
    parts = [
        [pair(torch.full((n, 2), n), (torch.zeros(n), Box(torch.ones(n), (3, 4))))] for n in (1, 2)
    ]
    [joined] = join(parts)
    assert joined.first.tolist() == [[1, 1], [2, 2], [2, 2]]
    zeros, box = joined.second
    assert len(zeros) == len(box.rows) == 3
    assert box.shape == (3, 4)
