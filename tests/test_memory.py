"""What a step's memory is, and --batch-size auto."""

import json
import sys

import pytest
import torch
from conftest import METHODS, small_runs

import scaledet
from common import memory
from common.errors import InputError

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    """A machine of 10 GB, where a training takes 1 GB and 0.5 GB an image, as does its log."""
    tried = []

    def measured(size):
        tried.append(size)
        peak = (1 + 0.5 * size) * GB
        return peak if peak <= 10 * GB else None

    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(memory, "total_memory", lambda device: 10 * GB)
    return tried


def arguments(**settings):
    return scaledet.Args(batch_size="auto", **settings)


def test_the_batch_fills_a_share_of_the_memory(machine):
    size = memory.find_batch_size(arguments(), CPU, ranks=3)
    assert size == 3 * 14  # 1 + 14 / 2 = 0.8 of 10 GB
    assert machine == [2, 8, 14]


def test_a_batch_that_does_not_fit_after_all_becomes_smaller(machine, monkeypatch):
    linear = memory.measured
    monkeypatch.setattr(memory, "measured", lambda size: None if size > 10 else linear(size))
    assert memory.find_batch_size(arguments(), CPU, ranks=1) == 8  # 14, 11, 8
    monkeypatch.setattr(memory, "measured", lambda size: None if size > 2 else linear(size))
    assert memory.find_batch_size(arguments(), CPU, ranks=1) == 2
    monkeypatch.setattr(memory, "measured", lambda size: None)
    with pytest.raises(InputError, match="not even 2 images fit; lower --image-size"):
        memory.find_batch_size(arguments(), CPU, ranks=1)


def test_a_run_that_goes_on_keeps_its_batch(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaledet.py"])
    saved = {"method": "scaledet", "batch_size": 6}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    assert memory.find_batch_size(arguments(output=str(tmp_path)), CPU, ranks=1) == 6
    assert not machine


def flags_of(method, folder, tiny_root):
    flags = small_runs(method, folder, tiny_root, steps=9)[0]
    place = flags.index("--batch-size")
    return [*flags[:place], *flags[place + 2 :]]


def test_a_measured_training_ends_after_its_first_steps(tiny_root, tmp_path, monkeypatch):
    """As a process of its own, whose folder is removed."""
    method = str(memory.Path(scaledet.__file__))
    monkeypatch.setattr(sys, "argv", [method, *flags_of("scaledet", tmp_path / "run", tiny_root)])
    peak = memory.measured(2)
    assert 0.2 * GB < peak < 5 * GB
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr", "nan"])
    with pytest.raises(InputError, match=r"a training of 2 images failed: .*--lr nan must be"):
        memory.measured(2)


@pytest.mark.parametrize("method", ["scaledet", "unidetector"])
def test_the_log_says_what_a_step_takes(method, tiny_root, tmp_path, train_here, caplog):
    caplog.set_level("INFO", logger="concord")
    flags = flags_of(method, tmp_path / "run", tiny_root)
    train_here(method, [*flags, "--batch-size", "4", "--accumulate", "8"])
    told = [line for line in caplog.messages if line.startswith("a step of 4 images in 4 parts")]
    assert told and told[0].endswith("GB")


def test_all_methods_take_auto():
    for method in METHODS:
        assert "auto" in str(__import__(method).Args.__annotations__["batch_size"])
