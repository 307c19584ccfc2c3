"""--ema: a running mean of the weights is evaluated and saved, and the training stays the same."""

import json
import shutil

import pytest
import torch
from conftest import small_runs
from safetensors.torch import load_file
from torch import nn

from common.averaging import MEAN, keep_mean, swap
from common.optim import sgd


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


@pytest.mark.parametrize("make", [adamw, lambda p: sgd(p, lr=0.1, weight_decay=0.0)])
def test_the_mean_follows_the_weights(make):
    """A weight's mean begins with its first update, and a weight without one has none."""
    first, late, never = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = make([first, late, never])
    keep_mean(optimizer, decay=0.3)
    expected = None
    for step in range(4):
        optimizer.zero_grad()
        (first.square().sum() + (late.square().sum() if step == 3 else 0)).backward()
        optimizer.step()
        weight = first.detach().clone()
        d = min(0.3, (2 + step) / (11 + step))  # 2/11, 3/12, 0.3, 0.3
        expected = weight if expected is None else d * expected + (1 - d) * weight
    assert torch.allclose(optimizer.state[first][MEAN], expected)
    assert torch.equal(optimizer.state[late][MEAN], late)
    last = first.detach().clone()
    swap(optimizer)
    assert torch.allclose(first, expected) and torch.equal(never, torch.ones(3))
    swap(optimizer)
    assert torch.equal(first, last)


def test_an_update_that_is_left_out_moves_no_mean():
    weight = nn.Parameter(torch.ones(3))
    optimizer = adamw([weight])
    keep_mean(optimizer, decay=0.5)
    for found_inf in (0.0, 0.0, 1.0):
        before = optimizer.state[weight].get(MEAN, torch.zeros(3)).clone()
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert torch.equal(optimizer.state[weight][MEAN], before) == bool(found_inf)


def train(folder, tiny_root, train_here, *flags):
    """Trains four steps. Returns the saved weights, and those of each evaluation."""
    seen = []

    def evaluate(args, model, label_space, datasets, folder):
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
        return {"coco": {"AP": len(seen) / 10}}

    run = small_runs("scaledet", folder, tiny_root, steps=4)[0]
    run += ["--checkpoint-every", "2", "--eval-every", "2", *flags]
    train_here("scaledet", run, evaluate)
    return load_file(folder / "weights.safetensors"), seen


def test_means_are_evaluated_and_saved_and_survive_a_restart(tiny_root, tmp_path, train_here):
    run = tmp_path / "run"
    saved, seen = train(run, tiny_root, train_here, "--ema", "0.5")
    plain, unaveraged = train(tmp_path / "plain", tiny_root, train_here)
    at = "checkpoint-0000004/weights.safetensors"
    raw = load_file(run / at)
    assert all(torch.equal(raw[n], plain[n]) for n in plain)  # the training is the same one
    best = load_file(run / "best.safetensors")
    for means, weights in zip(seen, unaveraged, strict=True):
        assert any(not torch.equal(means[n], weights[n]) for n in means)
    assert all(torch.equal(saved[n], seen[-1][n]) for n in seen[-1])
    assert all(torch.equal(best[n], seen[-1][n]) for n in seen[-1])

    shutil.rmtree((run / at).parent)
    (run / "weights.safetensors").unlink()
    again, _ = train(run, tiny_root, train_here, "--ema", "0.5")
    assert all(torch.equal(again[n], saved[n]) for n in saved)
    steps = [json.loads(x)["step"] for x in (run / "evaluations.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
