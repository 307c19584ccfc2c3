"""Windows and macOS, as far as Linux can stand in for them: what a system lacks is taken away."""

import json
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST, METHODS, REPO
from torch import nn

from common import command, distributed, memory, process, rescue
from common.checkpoint import rng_states, set_rng_states
from common.errors import InputError
from common.validation import undisturbed
from common.verdict import Verdict

# Windows has none of these; a data loading process is started with this text, too
LACKING = """
import os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
del os.sysconf, os.fork
"""
HELP = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
TRAINING = """
import multiprocessing
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # Linux would take fork
    import importlib
    from torch.utils.data._utils import signal_handling
    signal_handling._set_SIGCHLD_handler = lambda: None  # as torch has it on Windows
    from common.command import run_command
    method = sys.argv.pop(1).removesuffix(".py")
    run_command(importlib.import_module(method).main)
"""


def start(text: str, *flags, folder) -> subprocess.CompletedProcess:
    """A command in a Python that lacks what LACKING names."""
    script = folder / "script.py"
    script.write_text(LACKING + text)
    command = [sys.executable, script, *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600
    )


def test_help_needs_no_module_of_unix(tmp_path):
    done = start(HELP, "scaledet.py", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--datasets" in done.stdout and not done.stderr


def test_a_training_with_spawned_loaders_is_that_without(tmp_path, tiny_root, run):
    """Two steps, with what goes to the loaders pickled; and no lock, signal or limit of Unix."""
    flags = ["--datasets", "coco,o365", "--data-root", tiny_root, *FAST, "--steps", "2"]
    flags += ["--amp", "off"]
    done = start(
        TRAINING,
        *("scaledet.py", *flags, "--output", tmp_path / "spawned", "--workers", "1"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "this system does not tell its memory" in done.stdout
    assert "AP50" in done.stdout
    plain = run(*flags, "--output", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    lines = []
    for name in ("spawned", "plain"):
        (line,) = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines.append(json.loads(line))
        del lines[-1]["img_per_s"]
    assert lines[0] == lines[1]
    results = [(tmp_path / name / "results.json").read_text() for name in ("spawned", "plain")]
    assert results[0] == results[1]


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_spawned_loaders(method, tmp_path, tiny_root):
    from conftest import small_runs

    for flags in small_runs(method, tmp_path / "run", tiny_root):
        done = start(TRAINING, f"{method}.py", *flags, "--workers", "1", folder=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_run_folder_is_locked_without_fcntl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(process, "LOCKS", {})
    process.lock(tmp_path)
    process.lock(tmp_path)  # the same process may
    held = process.LOCKS.copy()
    process.LOCKS.clear()
    with pytest.raises(InputError, match="another run is training in"):
        process.lock(tmp_path)
    process.LOCKS |= held
    process.unlock()
    process.lock(tmp_path)
    process.unlock()


def test_the_limit_of_open_files(monkeypatch):
    asked = []
    limits = SimpleNamespace(
        RLIMIT_NOFILE=7,
        getrlimit=lambda kind: (256, 2**63 - 1),
        setrlimit=lambda kind, pair: asked.append((kind, pair)),
    )
    monkeypatch.setitem(sys.modules, "resource", limits)
    monkeypatch.setattr(command, "sys", SimpleNamespace(platform="darwin"))
    command.allow_open_files()
    monkeypatch.setattr(command, "sys", SimpleNamespace(platform="linux"))
    command.allow_open_files()
    assert asked == [(7, (10_240, 2**63 - 1)), (7, (2**63 - 1, 2**63 - 1))]


def test_a_memory_that_is_not_known_is_told(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "concord")
    monkeypatch.delattr(os, "sysconf")
    memory.refuse_huge_batch(2**40, [])
    assert "this system does not tell its memory" in caplog.text


# -- the GPU of a Mac ------------------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch):
    """A Mac, as torch tells of it: no CUDA, an MPS device with a generator of its own."""
    generator = torch.Generator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return generator


def test_auto_is_cuda_then_mps_then_cpu(mac, monkeypatch):
    assert distributed.best_device() == "mps"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert distributed.best_device() == "cpu"  # ranks would share the GPU
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.best_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert distributed.best_device() == "cpu"


def settings(**given) -> SimpleNamespace:
    defaults = {"device": "mps", "seed": 0, "amp": "auto", "compile": "auto", "tiny": False}
    defaults |= {"accumulate": 1, "batch_size": 2, "fsdp": False}
    return SimpleNamespace(**defaults | given)


def test_mps_where_there_is_none_or_for_several_ranks(mac, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="--device mps is for one process; start it without torch"):
        distributed.setup_device(settings())
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("mps", "mps:0"):
        with pytest.raises(InputError, match=f"--device {name}: no GPU of a Mac here; use"):
            distributed.setup_device(settings(device=name))


def test_mps_is_set_up_in_float32_and_not_compiled(mac, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "concord")
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)  # torch 2.6 asks
    args = settings()
    assert distributed.setup_device(args) == torch.device("mps")
    assert args.amp == "off" and not distributed.Compiling.on
    assert "whether this GPU is fast in bfloat16 is not known (try --amp on)" in caplog.text
    with distributed.amp_context(args.amp, torch.device("mps")):
        pass


def test_random_states_of_mps_are_kept(mac):
    mac.manual_seed(1)
    torch.manual_seed(1)
    states = rng_states()
    drawn = torch.rand(3, generator=mac), torch.rand(3)
    with undisturbed(nn.Linear(1, 1)):
        after = torch.rand(3, generator=mac), torch.rand(3)
    assert torch.equal(torch.rand(3, generator=mac), after[0])
    assert torch.equal(torch.rand(3), after[1])
    set_rng_states(states)
    assert torch.equal(torch.rand(3, generator=mac), drawn[0])
    assert torch.equal(torch.rand(3), drawn[1])


def test_a_device_that_ignores_found_inf_gets_no_update(monkeypatch, tmp_path):
    """There the step that failed says so itself, before its update."""
    batch = SimpleNamespace(samples=[])
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    last = rescue.LastStep(tmp_path, 0, model, None, optimizer, {}, keep=1)

    def verdict(loss: float) -> Verdict:
        return Verdict(1, {"loss": torch.tensor(loss)}, batch, 0)

    last.begin_update(verdict(float("nan")))  # heeded: the host learns of it one step later
    last.in_update = False
    monkeypatch.setattr(rescue, "HEEDING", ("cuda",))
    last.begin_update(verdict(1.0))
    last.in_update = False
    with pytest.raises(InputError, match="step 1: loss is not finite"):
        last.begin_update(verdict(float("nan")))
    assert not last.in_update and (tmp_path / "failed-step-0000001.json").exists()
    monkeypatch.setattr(process.Process, "training", None)


def test_signals_are_those_of_the_system():
    assert process.SIGNALS == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
