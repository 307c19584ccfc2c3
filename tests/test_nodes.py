"""Trainings on two machines, each with a launcher of its own, whose disk the other does not see.

The machines are folders: the same relative path is another one on each.
"""

import importlib
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, WITH_FSDP, small_runs, stand_alone

from common.checkpoint import checkpoints
from common.command import run_command
from common.datasets.dataset import Dataset
from common.datasets.index import Index
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.proposals import with_proposals
from common.pseudo_boxes import FACTS, PseudoBoxes, with_pseudo_boxes
from common.replay import write_record
from common.unreadable import Skips


def on_a_machine(number: int, port: int, flags: list[str], place: Path) -> None:
    """What `torchrun --nnodes 2 --node-rank NUMBER ... scaledet.py FLAGS` does in a folder."""
    import torch.distributed.run as torchrun
    from torch.distributed.launcher.api import elastic_launch

    stand_alone(place / "out", place / "out")
    os.chdir(place)
    os.environ["OMP_NUM_THREADS"] = "1"
    module = importlib.import_module("scaledet")
    module.evaluate = lambda *given: {}
    module.report_label_space = lambda *given: None
    given = f"--nnodes 2 --node-rank {number} --nproc-per-node 1"
    given += f" --master-addr 127.0.0.1 --master-port {port} {REPO}/scaledet.py"
    config, *_ = torchrun.config_from_args(torchrun.parse_args(given.split()))
    config.start_method = "fork"
    sys.argv = ["scaledet.py", *flags]
    elastic_launch(config, run_command)(module.main)


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("machines")
    places = [root / "a", root / "b"]
    for place in places:
        place.mkdir()
    return places


@pytest.fixture(scope="module")
def train(machines, forks, tiny_root):
    """train(*flags): two steps in the folder "run". Returns what each machine has said.

    It also checks that both have the exit code `code`.
    """

    def start(*flags, code: int = 0) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        base = small_runs("scaledet", "run", tiny_root, steps=2)[0]
        processes = []
        for number, place in enumerate(machines):
            (place / "out").unlink(missing_ok=True)
            given = (number, port, [*base, *map(str, flags)], place)
            processes.append(forks.Process(target=on_a_machine, args=given))
            processes[-1].start()
        for process in processes:
            process.join(200)
        said = [(place / "out").read_text() for place in machines]
        assert [process.exitcode for process in processes] == [code, code], said
        return said

    return start


def test_a_training_on_two_machines(machines, train, monkeypatch):
    """The second one needs no run folder, until it has to go on from there."""
    first, second = (place / "run" for place in machines)
    said, _ = train()
    line = "the ranks 1 do not see run: before a later start, copy it to their machines"
    assert line in said and "2 ranks: one that waits" in said
    assert (first / "weights.safetensors").exists() and not second.exists()

    line = "error: the ranks 1 have no run/checkpoint-0000002, from which rank 0 goes on; copy the"
    said = train("--steps", 3, code=1)
    assert all(line in each for each in said)

    shutil.copytree(first, second)
    train("--steps", 3)
    assert [path.name for path in checkpoints(first)][-1] == "checkpoint-0000003"
    assert [path.name for path in checkpoints(second)][-1] == "checkpoint-0000002"


@WITH_FSDP
def test_fsdp_needs_a_shared_run_folder(train):
    line = "error: the ranks 1 do not see shards of rank 0, where with --fsdp each rank writes"
    assert all(line in each for each in train("--fsdp", "--output", "shards", code=1))


# -- what a rank does whose machine lacks the run folder -------------------------------------------


def test_it_lists_skipped_images_in_a_folder_of_its_own(tmp_path):
    skips = Skips(1, tmp_path / "run")
    assert skips.admits("a.jpg", InputError("broken")) and not skips.admits("b", InputError("?"))
    assert (tmp_path / "run/skipped-images.txt").read_text() == "a.jpg\n"


def test_a_record_that_cannot_be_written_does_not_part_the_ranks(tmp_path, caplog):
    (tmp_path / "run").touch()
    write_record(tmp_path / "run", 3, 0, {"loss": torch.tensor(float("nan"))}, [])
    assert "step 3: " in caplog.text and "cannot be written" in caplog.text


def test_it_has_the_pseudo_boxes_of_rank_0(tmp_path, monkeypatch):
    facts = {name: np.array([0.9]) for name in FACTS}
    mined = PseudoBoxes(np.array([0]), np.ones((1, 4), np.float32), np.array([0]), facts)
    monkeypatch.setattr("common.distributed.rank", lambda: 1)
    monkeypatch.setattr("common.distributed.from_main", lambda _: (mined, None))
    vocabulary = Vocabulary("d", ("cat",))
    index = Index.build("json", ["a.jpg"], [1], np.ones((1, 2)))
    dataset = Dataset("d", vocabulary, index, tmp_path)
    space = LabelSpace([vocabulary])
    kept = with_pseudo_boxes(dataset, tmp_path / "none", space, lambda score, **_: score, 0.5)
    assert kept.found.boxes.tolist() == mined.boxes.tolist()


def test_it_cannot_have_proposals(tmp_path, monkeypatch):
    monkeypatch.setattr("common.proposals.ranks_without", lambda path: [1, 3])
    index = Index.build("json", ["a.jpg"], [1], np.ones((1, 2)))
    dataset = Dataset("d", Vocabulary("d", ("cat",)), index, tmp_path)
    with pytest.raises(InputError, match=r"the ranks 1, 3 do not see .*proposals"):
        with_proposals(None, [dataset], None, tmp_path, "key", None)
