"""Checkpoints: durable, verified, the newest sound one is taken, old ones and leftovers go."""

import json
import logging
import os
import shutil

import pytest
import torch
from torch import nn

from common.checkpoint import (
    checkpoints,
    damage,
    last_checkpoint,
    load_checkpoint,
    rng_states,
    save_checkpoint,
)
from common.errors import InputError
from common.files import atomic_path, sweep
from common.labels import LabelSpace, Vocabulary

SPACE = LabelSpace([Vocabulary("a", ("cat", "dog"))])


def trained(steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def save(folder, *steps: int, keep: int = 9) -> None:
    """Writes checkpoints of these steps."""
    for step in steps:
        model, optimizer = trained(step)
        about = {"method": "m", "args": {}}
        save_checkpoint(folder, step, [rng_states()], model, SPACE, optimizer, about, keep=keep)


def flip(path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path) -> None:
    path.write_bytes(b"")


FILES = ["weights.safetensors", "state.pt", "checksums.json"]


@pytest.mark.parametrize("harm", [flip, cut, empty, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_taken(
    tmp_path, caplog, name, harm
):
    save(tmp_path, 2, 4)
    harm(tmp_path / "checkpoint-0000004" / name)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-0000002"
    [line] = caplog.messages
    assert name in line or (name, harm) == ("checksums.json", flip)  # it may name a file of its
    assert "renamed to damaged-checkpoint-0000004" in line
    assert "the newest sound one, checkpoint-0000002, is taken" in line
    assert (tmp_path / "damaged-checkpoint-0000004").is_dir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    assert load_checkpoint(tmp_path / "checkpoint-0000002", trained()[1]) == 2


def test_a_sound_checkpoint_is_taken_without_a_word(tmp_path, caplog):
    save(tmp_path, 2, 4)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-0000004" and not caplog.messages
    assert last_checkpoint(tmp_path, 4) == tmp_path / "checkpoint-0000002"
    assert last_checkpoint(tmp_path, 2) is None and last_checkpoint(tmp_path / "none") is None


def test_no_sound_checkpoint_is_an_error_that_names_each(tmp_path):
    save(tmp_path, 2, 4)
    flip(tmp_path / "checkpoint-0000004" / "state.pt")
    os.remove(tmp_path / "checkpoint-0000002" / "weights.safetensors")
    with pytest.raises(InputError) as error:
        last_checkpoint(tmp_path)
    line = str(error.value)
    assert "checkpoint-0000004: state.pt is not as it was written" in line
    assert "checkpoint-0000002: weights.safetensors is missing" in line and "--output" in line
    assert len(checkpoints(tmp_path)) == 2  # nothing is renamed


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_files_of_two_steps_are_no_checkpoint(tmp_path, name):
    save(tmp_path, 2, 4)
    shutil.copy(tmp_path / "checkpoint-0000002" / name, tmp_path / "checkpoint-0000004" / name)
    assert damage(tmp_path / "checkpoint-0000004") == f"{name} is not as it was written"


def test_a_renamed_checkpoint_is_none(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "checkpoint-0000002").rename(tmp_path / "checkpoint-0000004")
    assert damage(tmp_path / "checkpoint-0000004") == "its files are of the steps [2, 4]"


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path):
    save(tmp_path, 2)
    model, optimizer = trained()
    with torch.no_grad():
        model.bias[1] = torch.nan
    about = {"method": "m", "args": {}}
    save_checkpoint(tmp_path, 4, [rng_states()], model, SPACE, optimizer, about, keep=2)
    assert "not finite (bias)" in damage(tmp_path / "checkpoint-0000004")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-0000002"


def test_the_last_ones_are_kept(tmp_path):
    save(tmp_path, 2, 4, 6, 8, keep=3)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == [f"checkpoint-000000{step}" for step in (4, 6, 8)]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut cannot be tried here: all that counts is synchronised, and in this order."""
    events, names = [], {}
    fsync, replace, opened = os.fsync, os.replace, os.open

    def spy_open(path, *given, **more):
        number = opened(path, *given, **more)
        names[number] = os.path.basename(path)
        return number

    def spy_fsync(number):
        events.append(names[number])
        fsync(number)

    def spy_replace(source, target):
        events.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    save(tmp_path, 2)
    renamed = events.index("-> checkpoint-0000002")
    assert set(FILES) <= set(events[:renamed])
    assert events[renamed - 1].startswith(".checkpoint-0000002-")  # the folder with their names
    assert events[renamed + 1 :] == [tmp_path.name]  # the new name


def test_what_is_not_durable_waits_for_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: pytest.fail("waits for the disk"))
    with atomic_path(tmp_path / "a.txt") as path:
        path.write_text("a")


def test_what_killed_writes_left_is_removed(tmp_path, caplog):
    (tmp_path / ".checkpoint-0000004-77-0123abcd").mkdir()
    (tmp_path / ".checkpoint-0000004-77-0123abcd" / "state.pt").touch()
    (tmp_path / ".weights-77-0123abcd.safetensors").touch()
    (tmp_path / ".tmpEQGYub").touch()  # of safetensors
    kept = [".hidden", ".tmp", "checkpoint-0000002", "weights.safetensors"]
    for name in kept:
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO, "concord"):
        sweep(tmp_path)
        sweep(tmp_path)  # says nothing
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    [line] = caplog.messages
    assert "3 half-written files" in line


def test_a_checkpoint_of_other_ranks_starts_the_random_numbers_anew(tmp_path, caplog):
    save(tmp_path, 2)
    path = tmp_path / "checkpoint-0000002"
    state = torch.load(path / "state.pt", weights_only=True)
    torch.save(state | {"ranks": 3}, path / "state.pt")
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "concord"):
        load_checkpoint(path, trained()[1])
    assert "is of 3 ranks, now there are 1: their random numbers start anew" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


def test_checksums_are_of_both_files(tmp_path):
    save(tmp_path, 2)
    record = json.loads((tmp_path / "checkpoint-0000002" / "checksums.json").read_text())
    assert record["step"] == 2 and sorted(record["files"]) == ["state.pt", "weights.safetensors"]
