"""A loss that is not finite: its step changes nothing, and the host learns of it a step later."""

import copy
import importlib
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from conftest import METHODS, small_runs
from safetensors.torch import load_file
from test_kill import same
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.batch import Batch, Sample
from common.checkpoint import (
    checkpoints,
    last_checkpoint,
    load_checkpoint,
    load_plain,
    load_weights,
    rng_states,
)
from common.command import run_command
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.optim import sgd
from common.process import Process, Stop
from common.rescue import rescue
from common.runlog import RunLog
from common.verdict import Verdict

SETTINGS = {"checkpoint_every": 99, "keep": 2, "eval_every": 0, "replay": 0, "seed": 7}
SETTINGS |= {"ema": 0.0, "accumulate": 1, "track": ""}
SPACE = LabelSpace([Vocabulary("a", ("cat", "dog"))])
KINDS = {"sgd": sgd, "adamw": partial(torch.optim.AdamW, fused=True)}


@pytest.fixture(autouse=True)
def no_training_left():
    yield
    Process.training, Process.asked = None, 0


# -- a training of a few numbers -------------------------------------------------------------------


@dataclass
class Training:
    """A training of 6 steps in `folder`, of a model with statistics and with random numbers.

    It goes on from the last checkpoint in `folder`, if there is one. bad: steps without a finite
    loss; event: what else happens, event(step) is called after each forward pass
    """

    folder: Path
    kind: str = "adamw"
    bad: tuple[int, ...] = ()
    event: Callable = lambda step: None
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        torch.manual_seed(0)
        layers = (nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
        self.model = nn.Sequential(*layers)
        self.model.register_buffer("normaliser", torch.ones(()))
        self.optimizer = KINDS[self.kind](self.model.parameters(), lr=0.1, weight_decay=0.01)
        self.start, self.steps, self.states = 0, 6, {}
        if checkpoint := last_checkpoint(self.folder):
            load_weights(checkpoint, self.model)
            self.start = load_checkpoint(checkpoint, self.optimizer)

    def state(self) -> dict:
        """What a checkpoint holds of this process."""
        held = [self.model.state_dict(), self.optimizer.state_dict(), rng_states()]
        return copy.deepcopy(dict(zip(("weights", "optimizer", "rng"), held)))

    def run(self) -> None:
        parallel = self.model
        if dist.is_initialized():
            parallel = DistributedDataParallel(self.model)
        args = SimpleNamespace(**SETTINGS | self.settings)
        content = (self.model, SPACE, self.optimizer, {"method": "m", "args": {}})
        log = RunLog(args, self.folder, self.steps, self.start, *content)
        log.evaluate, log.evaluated = None, []
        for step in range(self.start + 1, self.steps + 1):
            image = torch.zeros(3, 4, 4, dtype=torch.uint8)
            sample = Sample.unlabelled(image, "a", step, step)
            losses = {"loss_a": parallel(torch.randn(4, 3)).square().mean()}
            self.model.normaliser.mul_(0.5)
            self.event(step)
            losses["loss_b"] = losses["loss_a"] * (math.nan if step in self.bad else 1)
            losses["loss"] = losses["loss_a"] + losses["loss_b"]
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            losses = log.check_finite(losses, step, Batch(image[None], [(4, 4)], [sample]))
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            log.step(step, losses, 0.1, 4)
            self.states[step] = self.state()
        log.finish()

    def kept(self) -> dict:
        """What the last checkpoint holds of the first rank."""
        checkpoint = checkpoints(self.folder)[-1]
        weights = load_file(checkpoint / "weights.safetensors")
        state = load_plain(checkpoint / "state.pt")
        return {"weights": weights, "optimizer": state["optimizer"], "rng": state["rng"][0]}


# -- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_left_out_and_the_step_named_one_step_later(tmp_path, kind):
    forwards = []
    training = Training(tmp_path, kind, bad=(3,), event=forwards.append)
    with pytest.raises(InputError, match=r"^step 3: loss_b is not finite; lower --lr"):
        training.run()
    assert forwards == [1, 2, 3, 4] and list(training.states) == [1, 2, 3]
    before, after = training.states[2], training.state()
    assert same(after["optimizer"], before["optimizer"])
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before["weights"][name])
    record = json.loads((tmp_path / "failed-step-0000003.json").read_text())
    assert record["step"] == 3 and record["seed"] == 7
    assert math.isnan(record["losses"]["loss_b"]) and math.isfinite(record["losses"]["loss_a"])
    assert [sample["index"] for sample in record["samples"]] == [3]
    assert len(list(tmp_path.glob("failed-step-*"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_before_is_kept_and_a_resumed_training_ends_with_the_same_bits(tmp_path, kind):
    """Random states and buffers are kept, too, though two forward passes have changed them."""
    whole = Training(tmp_path / "whole", kind)
    whole.folder.mkdir()
    whole.run()
    failed = Training(tmp_path / "failed", kind, bad=(3,))
    failed.folder.mkdir()
    with pytest.raises(InputError):
        failed.run()
    assert "step 2 is kept" in rescue()
    assert same(failed.kept(), whole.states[2])
    again = Training(failed.folder, kind)
    assert again.start == 2
    again.run()
    assert same(again.states, {step: whole.states[step] for step in range(3, 7)})
    assert same(again.kept(), whole.states[6])


def test_the_first_step_may_fail(tmp_path):
    with pytest.raises(InputError, match="step 1: "):
        Training(tmp_path, "sgd", bad=(1,)).run()
    assert "no step is saved" in rescue() and not checkpoints(tmp_path)


@pytest.mark.parametrize("due", [{"checkpoint_every": 3}, {"eval_every": 3}, {"last": 3}])
def test_before_a_checkpoint_an_evaluation_and_the_end_it_is_known(tmp_path, due):
    forwards = []
    training = Training(tmp_path, bad=(3,), event=forwards.append, settings=due)
    training.steps = due.get("last", 6)
    with pytest.raises(InputError, match="step 3: loss_b"):
        training.run()
    assert forwards == [1, 2, 3]
    assert not checkpoints(tmp_path) and not (tmp_path / "metrics.jsonl").read_text()
    assert "step 2 is kept" in rescue()
    assert same(training.kept(), training.states[2])


def test_a_line_of_metrics_has_no_loss_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("common.runlog.EVERY", 2)
    with pytest.raises(InputError, match="step 4: loss_b"):
        Training(tmp_path, bad=(4,)).run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), Stop(signal.SIGTERM)])
@pytest.mark.parametrize("bad", [(), (3,)])
def test_an_error_before_it_is_known_keeps_what_is_whole(tmp_path, error, bad):
    """The step that failed is named and recorded all the same."""

    def event(step):
        if step == 4:
            raise error

    training = Training(tmp_path, bad=bad, event=event)
    with pytest.raises(type(error)):
        training.run()
    line = rescue()
    assert f"step {2 if bad else 3} is kept" in line
    assert line.startswith("step 3: loss_b is not finite; ") == bool(bad)
    assert (tmp_path / "failed-step-0000003.json").exists() == bool(bad)
    assert same(training.kept(), training.states[2 if bad else 3])


def test_a_signal_while_the_host_waits_loses_no_step(tmp_path, monkeypatch):
    """On a GPU the host may wait for the verdict."""
    read = Verdict.read

    def interrupted(verdict):
        if verdict.step == 3:
            monkeypatch.undo()
            raise Stop(signal.SIGTERM)
        return read(verdict)

    training = Training(tmp_path)
    monkeypatch.setattr(Verdict, "read", interrupted)
    with pytest.raises(Stop):
        training.run()
    assert "step 3 is kept" in rescue()
    assert same(training.kept(), training.states[3])


def test_a_verdict_holds_no_pixels():
    batch = Batch(torch.zeros(1, 3, 4, 4), [(4, 4)], [])
    batch.samples = [Sample.unlabelled(batch.images[0], "a", 1, 1)]
    verdict = Verdict(1, {"loss": torch.zeros(())}, batch, 0)
    assert verdict.is_finite() and verdict.found_inf == 0
    assert not any(isinstance(v, torch.Tensor) for row in verdict.samples for v in row.values())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(loss):
    verdict = Verdict(1, {"loss": torch.tensor(loss)}, Batch(torch.zeros(0), [], []), 0)
    assert not verdict.is_finite()
    assert verdict.found_inf == 1 and verdict.found_inf.dtype == torch.float32
    assert str(verdict.error()).startswith("step 1: loss is not finite")


# -- two ranks -------------------------------------------------------------------------------------


def on_rank(rank: int, folder: Path, event: str, results) -> None:
    """The training, in which rank 1 alone fails or is asked to end in its third step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = rank == 1

    def ask(step):
        if alone and event == "signal" and step == 3:
            Process.asked = signal.SIGTERM

    training = Training(folder / "run", "sgd", (3,) if alone and event == "nan" else (), ask)
    torch.manual_seed(rank)
    try:
        training.run()
        error = ""
    except (InputError, Stop) as raised:
        error = str(raised)
    line = rescue()
    kept = training.kept() if rank == 0 else {}
    found = {"error": error, "line": line, "kept": kept, "now": training.state()}
    results[rank] = found | {"states": training.states}
    dist.destroy_process_group()


def two_ranks(folder: Path, event: str, forks) -> list[dict]:
    (folder / "run").mkdir(parents=True)
    results = mp.Manager().dict()
    given = (folder, event, results)
    mp.start_processes(on_rank, given, nprocs=2, start_method=forks.get_start_method())
    return [results[0], results[1]]


def test_the_nan_of_one_rank_leaves_out_the_update_of_all(tmp_path, forks):
    ranks = two_ranks(tmp_path, "nan", forks)
    assert ranks[0]["error"] == "step 3: the loss of another rank is not finite; it says which"
    assert ranks[1]["error"].startswith("step 3: loss_b is not finite")
    for found in ranks:
        assert list(found["states"]) == [1, 2, 3]
        for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
            assert torch.equal(found["now"]["weights"][name], found["states"][2]["weights"][name])
        assert same(found["now"]["optimizer"], found["states"][2]["optimizer"])
    assert same(ranks[0]["kept"], ranks[0]["states"][2])
    state = load_plain(tmp_path / "run/checkpoint-0000002/state.pt")
    assert same(state["rng"], [found["states"][2]["rng"] for found in ranks])
    names = sorted(path.name for path in (tmp_path / "run").glob("failed-*"))
    assert names == [f"failed-step-0000003-rank{rank}.json" for rank in (0, 1)]


def test_the_signal_of_one_rank_ends_all_after_the_same_step(tmp_path, forks):
    ranks = two_ranks(tmp_path, "signal", forks)
    assert [found["error"] for found in ranks] == ["SIGTERM", "SIGTERM"]
    assert [list(found["states"]) for found in ranks] == [[1, 2, 3]] * 2
    assert "step 3 is kept" in ranks[0]["line"]
    state = load_plain(tmp_path / "run/checkpoint-0000003/state.pt")
    assert same(state["rng"], [found["states"][3]["rng"] for found in ranks])


# -- the methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_step_before(method, tiny_root, tmp_path, monkeypatch, capsys):
    """All that it goes on with is as it was after the step before, to the bit."""
    module, noted, forwards = importlib.import_module(method), {}, []
    step, compute_losses = RunLog.step, module.compute_losses

    def spy_step(log, number, *given):
        step(log, number, *given)
        model, _, optimizer, _ = log.content
        states = (model.state_dict(), optimizer.state_dict(), rng_states())
        noted[number] = copy.deepcopy(states)

    def spy_losses(*given):
        forwards.append(1)
        losses = compute_losses(*given)
        factor = math.nan if len(forwards) == 3 else 1
        return {name: value * factor for name, value in losses.items()}

    monkeypatch.setattr(RunLog, "step", spy_step)
    monkeypatch.setattr(module, "compute_losses", spy_losses)
    flags = small_runs(method, tmp_path / "run", tiny_root, 5)[0]
    monkeypatch.setattr(sys, "argv", [method, *flags, "--checkpoint-every", "99"])
    with pytest.raises(SystemExit, match="2"):
        run_command(module.main)
    assert "error: step 3: loss" in capsys.readouterr().err
    assert len(forwards) == 4
    [checkpoint] = tmp_path.rglob("checkpoint-*")
    assert checkpoint.name == "checkpoint-0000002"
    weights, optimizer, rng = noted[2]
    kept = load_file(checkpoint / "weights.safetensors")
    assert same({name: kept[name] for name in weights}, weights)
    state = load_plain(checkpoint / "state.pt")
    assert same(state["rng"], [rng])
    found, before = state["optimizer"]["state"], optimizer["state"]
    assert same({row: found[row] for row in before}, before)
    # a parameter whose first update was skipped starts from zeros, as one without a state does
    fresh = [found[row] for row in found.keys() - before.keys()]
    assert not any(moment.any() for moments in fresh for moment in moments.values())


# -- the optimizers --------------------------------------------------------------------------------


def test_sgd_is_that_of_pytorch_also_for_parameters_that_start_late():
    weights = []
    for make in (sgd, partial(torch.optim.SGD, momentum=0.9)):
        torch.manual_seed(0)
        heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)])
        optimizer = make(list(heads.parameters()), lr=0.1, weight_decay=0.01)
        for used in ([0], [0, 1], [1], [1, 2], [0]):
            optimizer.zero_grad(set_to_none=True)
            sum(heads[i](torch.randn(4, 3)).square().sum() for i in used).backward()
            optimizer.step()
        weights.append(heads.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_of_an_optimizer_that_is_not_fused_goes_on_fused(tmp_path):
    for kind in (partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW):
        model = nn.Linear(3, 2)
        before = kind(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        before.step()
        state = {"step": 1, "optimizer": before.state_dict(), "rng": [rng_states()], "ranks": 1}
        torch.save(state, tmp_path / "state.pt")
        optimizer = kind(model.parameters(), lr=0.1, fused=True)
        load_checkpoint(tmp_path, optimizer)
        weight = model.weight.clone()
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert torch.equal(model.weight, weight)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        assert not torch.equal(model.weight, weight)
