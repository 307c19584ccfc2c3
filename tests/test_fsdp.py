"""FSDP2 (--fsdp) on gloo ranks: the steps of DDP, checkpoints of shards, what is left of errors."""

import dataclasses
import importlib
import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import REPO, WITH_FSDP, run_method, small_runs, stand_alone
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

import scaledet
from common import runlog
from common.averaging import MEAN, keep_mean, swap
from common.checkpoint import checkpoints, damage, load_checkpoint, save_checkpoint
from common.distributed import in_parallel
from common.errors import InputError
from common.fsdp import Sharding, blocks, leave_out_unused, make_whole, set_sharding, whole
from common.labels import LabelSpace, Vocabulary
from common.optim import sgd
from common.rescue import LastStep, rescue

pytestmark = WITH_FSDP

# -- a small model on ranks of its own -------------------------------------------------------------


@dataclasses.dataclass
class Output:
    """Where FSDP2 alone finds no tensor."""

    rows: list[Tensor]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Toy(nn.Module):
    """It has blocks, statistics, a frozen layer, a scalar, a layer used twice, a head per task."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = nn.Sequential(nn.Linear(3, 3), Block(), Block())
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.layer = nn.Linear(3, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor, task: int) -> Output:
        x = self.frozen(self.norm(self.backbone.body(x)))
        x = self.layer(self.layer(x).relu())
        return Output([self.scale * self.heads[task](x)])


def adamw(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)


def momentum(parameters: list) -> torch.optim.Optimizer:
    return sgd(parameters, 0.1, 0.1)


def trained(kind, sharding: bool, model=None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A toy after four steps. Its tasks differ between the ranks; no step has the third one.

    The update of the third step is left out. Parameters, buffers and means change in the others.
    """
    own = distributed.get_rank()
    Sharding.on = sharding
    torch.manual_seed(own)  # the ranks begin with the weights of rank 0
    model = model or Toy()
    parallel = in_parallel(model, unused=True)
    optimizer = kind([p for p in model.parameters() if p.requires_grad])
    assert all(isinstance(p, DTensor) == sharding for p in model.parameters())
    keep_mean(optimizer, 0.5)
    for step in range(4):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + own))
        [rows] = parallel(inputs, (step // 2 + own) % 2 if step else 0).rows
        optimizer.zero_grad(set_to_none=True)
        rows.square().sum().backward()
        leave_out_unused(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
    return model, optimizer


def close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.shape == other[key].shape, key
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6, msg=key)


def compare_with_ddp(folder: Path) -> None:
    for kind in (adamw, momentum):
        expected, other = trained(kind, False)
        model, optimizer = trained(kind, True)
        state = {key: tensor.clone() for key, tensor in expected.state_dict().items()}
        with whole(model):
            assert not isinstance(model.scale, DTensor)
            close(model.state_dict(), state)
        assert isinstance(model.scale, DTensor)
        means = [value[MEAN] for value in other.state.values()]
        for value, mean in zip(optimizer.state.values(), means, strict=True):
            full = value[MEAN].full_tensor().view(mean.shape)
            torch.testing.assert_close(full, mean, rtol=1e-5, atol=1e-6)
        assert len(optimizer.state) == 17 - 2  # two parameters of the head that no step has used
        swap(optimizer)
        swap(other)
        make_whole(model)
        close(model.state_dict(), expected.state_dict())
        assert not Sharding.models
        trained(kind, True, model)  # the next stage of its training
        make_whole(model)


def write_checkpoint(folder: Path) -> None:
    model, optimizer = trained(adamw, True)
    label_space = LabelSpace([Vocabulary("d", ("a",))])
    with whole(model):
        content = ([[torch.get_rng_state()]] * 2, model, label_space, optimizer, {"method": "toy"})
        save_checkpoint(folder, 4, *content, keep=1)
    values = {}
    for index, state in enumerate(optimizer.state_dict()["state"].values()):
        for name, value in state.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            values[f"{index}.{name}"] = value
    if distributed.get_rank() == 0:
        torch.save(values, folder / "expected.pt")


def read_checkpoint(folder: Path) -> None:
    """With other ranks, with --fsdp and without."""
    expected = torch.load(folder / "expected.pt")
    alone = not distributed.is_initialized()
    for sharding in (False,) if alone else (False, True):
        Sharding.on = sharding
        model = Toy()
        in_parallel(model, unused=True)
        optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        assert load_checkpoint(folder / "checkpoint-0000004", optimizer) == 4
        values = {}
        for index, state in enumerate(optimizer.state_dict()["state"].values()):
            for name, value in state.items():
                assert isinstance(value, DTensor) == (sharding and name != "step")
                value = value.full_tensor() if isinstance(value, DTensor) else value
                values[f"{index}.{name}"] = value.view(expected[f"{index}.{name}"].shape)
        assert values.keys() == expected.keys() and len(values) == 4 * 15
        assert all(torch.equal(value, expected[key]) for key, value in values.items())
    if not alone:  # a checkpoint without --fsdp goes on with it
        Sharding.on = False
        model = Toy()
        optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        load_checkpoint(folder / "checkpoint-0000004", optimizer)
        if distributed.get_rank() == 0:
            states = [[torch.get_rng_state()]] * distributed.get_world_size()
            content = (states, model, LabelSpace([Vocabulary("d", ("a",))]))
            save_checkpoint(folder / "plain", 4, *content, optimizer, {}, keep=1)
        distributed.barrier()
        Sharding.on = True
        in_parallel(model)
        again = adamw([p for p in model.parameters() if p.requires_grad])
        load_checkpoint(folder / "plain" / "checkpoint-0000004", again)
        moment = again.state[model.scale]["exp_avg"]
        assert moment.full_tensor().item() == expected["0.exp_avg"].item()


def as_rank(own: int, ranks: int, function, folder: Path, store: Path) -> None:
    stand_alone(folder / "out", folder / "out")
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=own, world_size=ranks
    )
    function(folder)
    distributed.barrier()
    distributed.destroy_process_group()


def on_ranks(forks, ranks: int, function, folder: Path) -> None:
    store = folder / f"store-{function.__name__}-{ranks}"
    given = [(own, ranks, function, folder, store) for own in range(ranks)]
    processes = [forks.Process(target=as_rank, args=each) for each in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0] * ranks, (folder / "out").read_text()


def test_steps_are_those_of_ddp(forks, tmp_path):
    """Weights, statistics, means of --ema, also of parameters that not all ranks use, or none."""
    on_ranks(forks, 2, compare_with_ddp, tmp_path)


def test_a_checkpoint_goes_on_with_other_ranks(forks, tmp_path, caplog):
    """Written by two ranks, and read by three and by one, with --fsdp and without."""
    on_ranks(forks, 2, write_checkpoint, tmp_path)
    checkpoint = tmp_path / "checkpoint-0000004"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    shards = sorted(files - {"checksums.json", "state.pt", "weights.safetensors"})
    assert len(shards) == 2 and all(name.endswith(".safetensors") for name in shards)
    assert json.loads((checkpoint / "checksums.json").read_text())["files"].keys() == files - {
        "checksums.json"
    }
    assert not list(tmp_path.glob(".*"))
    model = Toy()
    model.load_state_dict(load_file(checkpoint / "weights.safetensors"))  # of the usual shapes
    on_ranks(forks, 3, read_checkpoint, tmp_path)
    read_checkpoint(tmp_path)
    assert damage(checkpoint) == ""
    shard = checkpoint / shards[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "optimizer/" in damage(checkpoint) and "not as it was written" in damage(checkpoint)
    shard.unlink()
    assert "cannot be read" in damage(checkpoint)
    optimizer = adamw(list(model.parameters()))
    with pytest.raises(InputError, match=r"state.pt cannot be read"):
        load_checkpoint(checkpoint, optimizer)


def test_blocks_are_the_innermost_ones():
    model = Toy()
    assert blocks(model) == [model.backbone.body[1], model.backbone.body[2]]


@pytest.mark.parametrize(
    "name, count",
    [("resnet50", 16), ("swin_tiny_patch4_window7_224", 12), ("tf_efficientnet_lite0", 16)],
)
def test_blocks_of_backbones(name, count):
    from common.backbone import Backbone

    model = nn.Module()
    model.backbone = Backbone(name, 16, pretrained=False)
    found = blocks(model)
    parameters = {id(p) for block in found for p in block.parameters()}
    sizes = [sum(p.numel() for p in block.parameters()) for block in found]
    assert len(found) == count
    assert sum(sizes) > 0.8 * sum(p.numel() for p in model.backbone.body.parameters())
    assert len(parameters) == sum(len(list(block.parameters())) for block in found)


# -- trainings -------------------------------------------------------------------------------------


def in_a_process(method, flags, ranks, event, folder) -> None:
    """A training without an evaluation, with the losses of each step. `event` as in `Trainings`."""
    stand_alone(folder / "out", folder / "out")
    os.chdir(REPO)
    os.environ["OMP_NUM_THREADS"] = "1"
    module = importlib.import_module(method)
    runlog.EVERY = 1
    module.evaluate = lambda *given: {}
    module.report_label_space = lambda *given: None
    compute, calls = module.compute_losses, []

    def spy(*given):
        calls.append(1)
        losses = compute(*given)
        if event and len(calls) == event[0] and os.environ["RANK"] == "1":
            if event[1] is None:
                return {name: value * float("nan") for name, value in losses.items()}
            os.kill(os.getpid(), event[1])
        return losses

    module.compute_losses = spy
    run_method(method, flags, ranks)


@pytest.fixture(scope="module")
def train(forks, tiny_root, tmp_path_factory):
    """train(method, *flags, event=None, ranks=2): three steps. Returns the run folder and output.

    event: (step, signal that rank 1 sends itself in this step; None: its losses are NaN)
    """

    def start(method: str, *flags, event=None, ranks: int = 2, output=None, code=0):
        folder = tmp_path_factory.mktemp("training")
        output = output or folder / "run"
        base = small_runs(method, output, tiny_root, steps=3)[0]
        base += ["--batch-size", "4", "--base-batch-size", "4", "--checkpoint-every", "2"]
        given = (method, [*base, *map(str, flags)], ranks, event, folder)
        process = forks.Process(target=in_a_process, args=given)
        process.start()
        process.join(120)
        out = (folder / "out").read_text()
        assert process.exitcode == code, out
        return output, out

    return start


def losses(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key.startswith("loss")} for line in lines]


@pytest.fixture(scope="module")
def sharded(train):
    """The run folder of three steps with --fsdp, and what the training has said."""
    return train("scaledet", "--fsdp", "--ema", 0.9)


@pytest.mark.parametrize("method", ["scaledet", pytest.param("dataseg", marks=pytest.mark.long)])
def test_losses_and_weights_are_those_of_ddp(method, train, request):
    ema = ["--ema", 0.9] if method == "scaledet" else []
    expected, _ = train(method, *ema)
    if method == "scaledet":
        folder, said = request.getfixturevalue("sharded")
    else:
        folder, said = train(method, "--fsdp")
    assert "--fsdp: weights, gradients and moments are shared out over 2 ranks" in said
    assert len(losses(folder)) == 3
    for step, other in zip(losses(folder), losses(expected), strict=True):
        assert step == pytest.approx(other, rel=1e-4)
    close(load_file(folder / "weights.safetensors"), load_file(expected / "weights.safetensors"))
    if method == "scaledet":  # a model and a training without --fsdp start from it
        model, _ = scaledet.load(folder)
        close(model.state_dict(), scaledet.load(expected)[0].state_dict())


@pytest.mark.long
def test_a_signal_saves_and_the_training_goes_on_to_the_same_bits(train, sharded, tmp_path):
    whole_run, _ = sharded
    flags = ["--fsdp", "--ema", 0.9]
    once = [*flags, "--checkpoint-every", 99]
    folder, said = train(
        "scaledet", *once, event=(2, signal.SIGTERM), output=tmp_path / "a", code=1
    )
    assert f"step 2 is kept in {folder}/checkpoint-0000002" in said
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0000002"]
    _, said = train("scaledet", *flags, output=folder)
    assert f"resumed from {folder}/checkpoint-0000002" in said
    one, other = (load_file(each / "weights.safetensors") for each in (folder, whole_run))
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.long  # the signal's test has the same way out
def test_a_loss_that_is_not_finite_saves_the_step_before(train, tmp_path):
    flags = ["--fsdp", "--checkpoint-every", 99]
    folder, said = train("scaledet", *flags, event=(3, None), output=tmp_path / "a", code=1)
    assert "error: step 3: the loss of another rank is not finite" in said
    assert f"step 2 is kept in {folder}/checkpoint-0000002" in said
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0000002"]


@pytest.mark.long  # half a minute
@pytest.mark.parametrize("flags", [["--accumulate", 2], ["--amp", "on"], ["--eval-every", 1]])
def test_other_flags_do_not_differ(train, flags):
    (one, _), (other, _) = (train("scaledet", *more, *flags) for more in ([], ["--fsdp"]))
    for step, expected in zip(losses(one), losses(other), strict=True):
        assert step == pytest.approx(expected, rel=1e-4)


@pytest.mark.long  # a minute
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_training_goes_on_with_other_ranks(train, sharded, tmp_path, ranks):
    folder = Path(shutil.copytree(sharded[0], tmp_path / "run"))
    flags = ["--fsdp", "--ema", 0.9, "--steps", 5, "--batch-size", 6]
    _, said = train("scaledet", *flags, ranks=ranks, output=folder)
    assert f"is of 2 ranks, now there are {ranks}: their random numbers start anew" in said
    assert ("--fsdp has no effect on one rank" in said) == (ranks == 1)
    assert losses(folder)[-1]["loss"] < losses(folder)[0]["loss"]


# -- what is left of errors ------------------------------------------------------------------------


def test_a_rank_that_fails_alone_saves_nothing_and_says_so(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    last = LastStep(tmp_path, 2, model, None, adamw(list(model.parameters())), {}, keep=1)
    last.whole = last.made = last.whole._replace(number=3)
    monkeypatch.setattr(Sharding, "on", True)
    monkeypatch.setattr("common.rescue.LastStep.save", None)
    line = rescue()
    assert "with --fsdp one rank cannot save step 3 alone; step 2 is kept in" in line


def test_it_has_no_effect_on_one_rank(monkeypatch, caplog):
    monkeypatch.setattr(Sharding, "on", True)
    with caplog.at_level(logging.INFO, "concord"):
        set_sharding(True, 1)
    assert not Sharding.on and caplog.messages == ["--fsdp has no effect on one rank"]


def test_an_older_torch_is_one_line(monkeypatch):
    monkeypatch.setattr(Sharding, "on", False)
    monkeypatch.delattr("torch.distributed.checkpoint.HuggingFaceStorageWriter")
    with pytest.raises(InputError, match=re.escape("pip install -U torch torchvision")):
        set_sharding(True, 2)
