"""A training as a job: started again, stopped, failing, evaluated on its way, computed again."""

import errno
import importlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAST, METHODS, REPO
from corpus import DROP
from PIL import Image
from safetensors.torch import load_file
from test_cli import small_runs
from torch import distributed as dist
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info

import scaledet
from common.checkpoint import checkpoints
from common.command import run_command
from common.curves import draw_panels
from common.distributed import _join
from common.errors import InputError
from common.process import heed_signals, unlock
from common.replay import FIELDS, read_record
from common.rescue import LOWER, explain
from common.runlog import RunLog
from common.validation import main_metric, record_evaluation, undisturbed

# -- a training that costs seconds -----------------------------------------------------------------


def leave_out(patch) -> None:
    """Leaves out the evaluation, and the picture of the label space, which takes longest."""
    patch.setattr(scaledet, "evaluate", lambda *given: {})
    patch.setattr(scaledet, "report_label_space", lambda *given: None)


def flags_of(root: Path) -> list[str]:
    data = ["--datasets", "coco,o365", "--eval-datasets", "coco", "--data-root", str(root)]
    return [*data, *FAST, "--batch-size", "2", "--steps", "4", "--checkpoint-every", "2"]


@pytest.fixture
def flags(tiny_root, monkeypatch) -> list[str]:
    """The flags of a training of four steps."""
    leave_out(monkeypatch)
    return flags_of(tiny_root)


@pytest.fixture(scope="module")
def whole(tiny_root, tmp_path_factory, call) -> dict:
    """The weights of that training, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        call(*flags_of(tiny_root), "--output", folder)
    return load_file(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def half(tiny_root, tmp_path_factory, call) -> Path:
    """The run folder of its first two steps."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        call(*flags_of(tiny_root), "--steps", 2, "--output", folder)
    unlock()
    return folder


def weights_of(folder: Path) -> dict:
    return load_file(folder / "weights.safetensors")


def same(one: dict, other: dict) -> bool:
    """Whether two sets of weights are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*args): runs scaledet as a command in this process.

    Returns its exit code, or the error that it ends with, and the lines of stderr.
    """

    def start(*args):
        monkeypatch.setattr(sys, "argv", ["scaledet.py", *map(str, args)])
        code = 0
        try:
            run_command(scaledet.main)
        except SystemExit as exit:
            code = exit.code
        except RuntimeError as error:
            code = error
        bars = re.compile(r"step/s|s/step|img/s|s/img")
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, [line for line in lines if line.strip() and not bars.search(line)]

    return start


def at_step(monkeypatch, number: int, event, name: str = "compute_losses", module=scaledet) -> None:
    """Calls `event(losses)` in the forward pass of the `number`-th step of this process, once."""
    original, calls = getattr(module, name), []

    def spy(*given, **more):
        result = original(*given, **more)
        calls.append(1)
        if len(calls) == number:
            result = event(result) or result
        return result

    monkeypatch.setattr(module, name, spy)


def fail_with(error: Exception):
    def event(losses):
        raise error

    return event


# -- the same command starts or goes on ------------------------------------------------------------


@pytest.mark.parametrize("again", ["--output", "--resume"])
def test_the_same_command_goes_on_to_the_same_bits(
    flags, whole, tmp_path, command, monkeypatch, caplog, again
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 4, fail_with(InputError("bad")))
        assert command(*flags, "--output", folder)[0] == 2
    with caplog.at_level(logging.INFO, "concord"):
        given = flags if again == "--output" else []
        assert command(*given, again, folder) == (0, [])
    assert f"resumed from {folder}/checkpoint-0000003" in caplog.text
    assert same(weights_of(folder), whole)
    assert "history" not in json.loads((folder / "args.json").read_text())


@pytest.mark.parametrize("again", ["--output", "--resume"])
def test_before_the_first_checkpoint_the_same_command_starts_from_nothing(
    flags, whole, tmp_path, command, monkeypatch, caplog, again
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 1, fail_with(InputError("bad")))
        assert command(*flags, "--output", folder)[0] == 2
    assert not checkpoints(folder)
    with caplog.at_level(logging.INFO, "concord"):
        given = flags if again == "--output" else []
        assert command(*given, again, folder) == (0, [])
    assert "has no checkpoint yet: the training starts again from nothing" in caplog.text
    assert same(weights_of(folder), whole)


@pytest.fixture
def begun(half, tmp_path) -> Path:
    """A run folder of a training that ended after two of its four steps."""
    return Path(shutil.copytree(half, tmp_path / "run"))


BOTH = pytest.mark.parametrize("again", ["--output", "--resume"])


@BOTH
def test_settings_that_must_not_differ_are_named(flags, begun, command, again):
    saved = (begun / "args.json").read_text()
    given = flags if again == "--output" else []
    code, [line] = command(*given, "--steps", 2, "--seed", 5, "--lam", 2, again, begun)
    assert code == 2 and "--seed 0 is now 5, --lam 1.0 is now 2.0" in line
    assert "--steps" not in line and "choose another --output" in line
    assert (begun / "args.json").read_text() == saved


@pytest.mark.parametrize("again", ["--output", "--resume"])
@pytest.mark.parametrize(
    "names, words",
    [("o365,coco", "on coco, o365, not on o365, coco"), ("coco", "coco, o365, not on coco")],
)
def test_another_label_space_is_refused(flags, begun, command, again, names, words):
    given = flags if again == "--output" else []
    code, [line] = command(*given, "--datasets", names, again, begun)
    assert code == 2 and words in line and "--weights" in line


def test_other_class_names_are_refused(flags, begun, command, tmp_path):
    (tmp_path / "names.txt").write_text("cat = wolf\n")
    code, [line] = command(*flags, "--rename", tmp_path / "names.txt", "--output", begun)
    assert code == 2 and "--rename" in line


def test_what_may_change_is_said_in_a_line_and_recorded(flags, begun, command, caplog):
    """A third start says nothing, since nothing is another than at the second."""
    changes = ["--lr", 5e-4, "--workers", 1, "--batch-size", 4, "--eval-every", 0]
    with caplog.at_level(logging.INFO, "concord"):
        assert command(*flags, *changes, "--output", begun) == (0, [])
    [line] = [line for line in caplog.messages if "goes on with" in line]
    for words in ("--steps 4 instead of 2", "--lr 0.0005 instead of 0.001"):
        assert words in line
    assert "--workers 1 instead of 0" in line and "--batch-size 4 instead of 2" in line
    record = json.loads((begun / "args.json").read_text())
    assert record["lr"] == 5e-4 and record["steps"] == 4 and record["batch_size"] == 4
    [change] = record["history"]
    assert change["after_step"] == 2
    assert change["changes"]["lr"] == [0.001, 0.0005] and change["changes"]["steps"] == [2, 4]
    caplog.clear()
    with caplog.at_level(logging.INFO, "concord"):
        assert command("--resume", begun) == (0, [])
    assert "goes on with" not in caplog.text
    assert json.loads((begun / "args.json").read_text())["history"] == [change]


@pytest.mark.parametrize("other", ["--output", "--weights"])
def test_flags_without_effect_beside_resume_are_refused(begun, command, tmp_path, other):
    code, [line] = command("--resume", begun, other, tmp_path / "other")
    assert code == 2 and f"{other} has no effect beside --resume" in line


def test_a_second_run_in_the_same_folder_is_refused(begun, run, command):
    """The lock is of processes, and this one has none after its command."""
    hold = "import sys, fcntl; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold += "; print('locked', flush=True); sys.stdin.read()"
    holder = [sys.executable, "-c", hold, str(begun / "run.lock")]
    with subprocess.Popen(
        holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        code, [line] = command("--resume", begun)
        other.stdin.close()
    assert code == 2 and "another run is training in" in line


# -- signals and errors ----------------------------------------------------------------------------


HEEDS_SIGNALS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    " signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    " os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def kept(folder: Path, step: int) -> str:
    return f"step {step} is kept in {folder}/checkpoint-{step:07d}; the same command, or --resume"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_last_whole_step(flags, whole, tmp_path, command, monkeypatch, number):
    folder = tmp_path / "run"
    # a job in the background ignores SIGINT, one of nohup SIGHUP, and so do their tests
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, default)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda losses: os.kill(os.getpid(), number))
        code, [line] = command(*flags, "--output", folder, "--checkpoint-every", 99)
    assert code == 128 + number
    assert line == f"stopped by {number.name}; {kept(folder, 3)} {folder}, goes on from it"
    assert command("--resume", folder) == (0, [])
    assert same(weights_of(folder), whole)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("method", METHODS)
def test_a_signal_amid_the_imports_has_no_traceback(tmp_path, method, number):
    """A shell shows the codes 130, 143 and 129. A module that only imports it has its own way."""
    (tmp_path / "torch.py").write_text(f"import os\nos.kill(os.getpid(), {number:d})")
    (tmp_path / "other.py").write_text(f"import {method}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPO}"}
    for script, quiet in ((REPO / f"{method}.py", True), (tmp_path / "other.py", False)):
        done = subprocess.run(
            [sys.executable, "-c", HEEDS_SIGNALS, script, "--datasets", "coco", "--tiny"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -number and not done.stdout
        assert not done.stderr if quiet or number != signal.SIGINT else "Keyboard" in done.stderr


def test_a_signal_amid_the_update_waits_for_its_end(flags, whole, tmp_path, command, monkeypatch):
    folder, update, calls = tmp_path / "run", torch.optim.AdamW.step, []

    def step(self, *given):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # Python heeds it here, before the update
        return update(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        code, [line] = command(*flags, "--output", folder, "--checkpoint-every", 99)
    assert code == 143 and kept(folder, 3) in line
    assert command("--resume", folder) == (0, [])
    assert same(weights_of(folder), whole)


def test_a_signal_before_the_first_step(flags, tmp_path, command, monkeypatch):
    at_step(monkeypatch, 1, lambda losses: os.kill(os.getpid(), signal.SIGTERM))
    code, [line] = command(*flags, "--output", tmp_path / "run")
    assert code == 143 and "no step is saved; the same command" in line


def test_an_ignored_signal_stays_ignored(flags, tmp_path, command, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 2, lambda losses: os.kill(os.getpid(), signal.SIGHUP))
        assert command(*flags, "--output", tmp_path / "run") == (0, [])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_before_after_a_command(flags, tmp_path, command):
    before = [signal.getsignal(number) for number in SIGNALS]
    command("--resume", tmp_path / "none")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _report_two_errors():
    """What a thread of a data loading process does with its errors."""
    for error in (ConnectionResetError("the trainer is gone"), ValueError("a real error")):
        sys.excepthook(type(error), error, None)


def test_a_loading_process_does_not_report_that_its_trainer_is_gone(capfd):
    before = sys.excepthook
    with heed_signals():
        process = multiprocessing.get_context("fork").Process(target=_report_two_errors)
        process.start()
        process.join()
    errors = capfd.readouterr().err
    assert "a real error" in errors and "the trainer is gone" not in errors
    assert sys.excepthook is before


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_of_a_real_process(tiny_root, tmp_path, command, monkeypatch, workers):
    """With data loading processes, none of which may say a word. It goes on from where it was."""
    folder = tmp_path / "run"
    flags = [*flags_of(tiny_root), "--steps", "5000", "--workers", str(workers)]
    flags += ["--output", str(folder), "--checkpoint-every", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "scaledet.py", *flags],
        cwd=REPO,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not checkpoints(folder) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    lines = [line for line in re.split("[\r\n]", errors) if line.strip() and "train:" not in line]
    assert len(lines) == 1 and lines[0].startswith("stopped by SIGTERM; step "), errors
    step = int(checkpoints(folder)[-1].name[-7:])
    assert kept(folder, step) in lines[0]
    leave_out(monkeypatch)
    assert command("--resume", folder, "--steps", step + 1, "--workers", 0) == (0, [])


ERRORS = [
    (RuntimeError("a bug"), 1, ""),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, LOWER),
    (MemoryError(), 1, LOWER),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, LOWER),
    (OSError(12, "Cannot allocate memory"), 1, LOWER),
    (RuntimeError("unable to allocate shared memory(shm) for file </t>: No space"), 1, LOWER),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, LOWER),
    (RuntimeError("CUDA error: unspecified launch failure"), 1, "see nvidia-smi"),
    (RuntimeError("CUDA error: device-side assert triggered"), 1, ""),  # a bug, not the device
    (OSError(5, "Input/output error", "/data/a.jpg"), 2, "/data/a.jpg: Input/output error"),
    (OSError(28, "No space left on device", "/run"), 2, "choose another --output"),
]


@pytest.mark.parametrize("error, code, words", ERRORS, ids=lambda value: str(value)[:20])
def test_an_error_is_explained_in_a_line(error, code, words):
    """An unknown one has no line, and so its traceback."""
    line, found = explain(error)
    assert found == code and words in line and "\n" not in line and bool(line) == bool(words)


def test_the_line_of_a_data_loading_process_is_its_error():
    try:
        raise RuntimeError("unable to allocate shared memory")
    except RuntimeError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(RuntimeError) as error:
        sent.reraise()
    line, _ = explain(error.value)
    assert "not enough (RuntimeError: unable to allocate shared memory)" in line


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA memory")])
def test_an_error_in_the_loop_saves_the_last_whole_step(
    flags, tmp_path, command, monkeypatch, caplog, error
):
    folder = tmp_path / "run"
    at_step(monkeypatch, 4, fail_with(error))
    with caplog.at_level(logging.INFO, "concord"):
        ended, lines = command(*flags, "--output", folder)
    assert checkpoints(folder)[-1].name == "checkpoint-0000003"
    assert [message for message in caplog.messages if kept(folder, 3) in message]
    if str(error) == "a bug":
        assert ended is error and not lines
    else:
        assert ended == 1 and len(lines) == 1 and LOWER in lines[0]


def test_an_error_amid_the_update_saves_nothing_half_done(
    flags, tmp_path, command, monkeypatch, caplog
):
    folder = tmp_path / "run"
    at_step(monkeypatch, 4, fail_with(MemoryError()), "clip_grad_value_", torch.nn.utils)
    with caplog.at_level(logging.INFO, "concord"):
        assert command(*flags, "--output", folder)[0] == 1
    assert "step 4 was half done, so no more can be saved; step 2 is kept" in caplog.text
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0000002"]


def test_a_full_disk_on_the_way_out_keeps_the_older_checkpoint(
    flags, tmp_path, command, monkeypatch, caplog
):
    folder, save = tmp_path / "run", torch.save

    def full(state, path, *given):
        if state["step"] == 3:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")
        save(state, path, *given)

    monkeypatch.setattr(torch, "save", full)
    at_step(monkeypatch, 4, fail_with(InputError("bad")))
    with caplog.at_level(logging.INFO, "concord"):
        assert command(*flags, "--output", folder) == (2, ["error: bad"])
    assert "step 3 cannot be saved" in caplog.text and "as on a full disk" in caplog.text
    assert kept(folder, 2) in caplog.text
    assert not list(folder.glob(".checkpoint*"))


def test_a_disk_that_fills_later_keeps_a_sound_checkpoint(
    flags, whole, tmp_path, command, monkeypatch, caplog
):
    """The line of a step whose metrics find no place says that this step is whole."""
    folder, write = tmp_path / "run", RunLog._write

    def full(self, step, *given):
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "metrics.jsonl"))
        write(self, step, *given)

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "concord"):
        patch.setattr(RunLog, "_write", full)
        code, [line] = command(*flags, "--output", folder)
    assert code == 2 and "metrics.jsonl: No space left on device; see to the disk" in line
    assert kept(folder, 3) in caplog.text and "half done" not in caplog.text
    assert command("--resume", folder) == (0, [])
    assert same(weights_of(folder), whole)


def test_a_killed_data_loading_process_is_one_line(flags, tmp_path, command, monkeypatch, caplog):
    folder, getitem = tmp_path / "run", scaledet.Mixture.__getitem__

    def dies(self, item):
        if get_worker_info() and item[1] >= 6:  # in the fourth batch, asked for after a step
            os.kill(os.getpid(), signal.SIGKILL)
        return getitem(self, item)

    monkeypatch.setattr(scaledet.Mixture, "__getitem__", dies)
    with caplog.at_level(logging.INFO, "concord"):
        code, [line] = command(*flags, "--output", folder, "--workers", 1)
    assert code == 1 and "a data loading process was killed" in line and LOWER in line
    assert re.search("step [123] is kept in", caplog.text)  # as soon as it dies


def test_explain_tells_a_lost_rank_from_a_bug(monkeypatch):
    lost = RuntimeError("[../third_party/gloo/tcp/pair.cc:534] Connection closed by peer")
    assert explain(lost) == ("", 1)
    monkeypatch.setattr("common.rescue.world_size", lambda: 2)
    line, code = explain(lost)
    assert code == 1 and "another rank ended or does not answer" in line
    assert explain(RuntimeError("a bug")) == ("", 1)


# -- several ranks ---------------------------------------------------------------------------------

SCRIPT = """
import datetime, os, sys, time
import common.distributed, scaledet
from common.command import run_command
from common.curves import draw_panels

scaledet.METHOD = "scaledet"
scaledet.evaluate = lambda *given: {{}}
scaledet.report_label_space = lambda *given: None
losses, calls = scaledet.compute_losses, []

def spy(*given):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1" and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        {event}
    return losses(*given)

scaledet.compute_losses = spy
{more}
run_command(scaledet.main)
"""


@pytest.fixture
def on_two_ranks(tiny_root, tmp_path):
    """on_two_ranks(event, *flags, more="", every=1, output="run"): the training on two ranks.

    Rank 1 runs the Python code `event` in its third step, in the first training of a test. every:
    --checkpoint-every. Returns the finished process.
    """

    def start(
        event: str, *torchrun: str, more: str = "", every: int = 1, output: str = "run"
    ) -> subprocess.CompletedProcess:
        script, marker = tmp_path / "job.py", str(tmp_path / "marker")
        script.write_text(SCRIPT.format(marker=marker, event=event, more=more))
        flags = [*flags_of(tiny_root), "--checkpoint-every", every, "--output", tmp_path / output]
        flags += ["--batch-size", 4]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *torchrun]
        return subprocess.run(
            [sys.executable, *map(str, [*launcher, script, *flags])],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def test_torchrun_restarts_a_killed_rank(on_two_ranks, tmp_path):
    """The same command starts again in the folder of the first start, and goes on."""
    done = on_two_ranks("os.kill(os.getpid(), 9)", "--max-restarts", 1)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert f"resumed from {folder}/checkpoint-000000" in done.stdout
    assert checkpoints(folder)[-1].name == "checkpoint-0000004"
    assert (folder / "weights.safetensors").exists()


def test_the_nan_of_one_rank_ends_all_and_the_same_command_goes_on(on_two_ranks, tmp_path):
    """With the same bits as without it."""
    event = "return {name: value * float('nan') for name, value in losses(*given).items()}"
    done = on_two_ranks(event, every=99)
    assert done.returncode == 1
    assert re.search("error: step 3: loss_.* is not finite; lower --lr", done.stderr)
    assert "error: step 3: the loss of another rank is not finite" in done.stderr
    folder = tmp_path / "run"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0000002"]
    records = sorted(path.name for path in folder.glob("failed-step-*"))
    assert records == [f"failed-step-0000003-rank{rank}.json" for rank in (0, 1)]
    for output in ("run", "whole"):
        done = on_two_ranks("", every=99, output=output)
        assert done.returncode == 0, done.stderr
    assert same(weights_of(folder), weights_of(tmp_path / "whole"))


@pytest.mark.long  # tracing takes half a minute
def test_a_compiled_training_on_two_ranks_has_the_same_losses(on_two_ranks, tmp_path):
    """The graphs are traced, and run without a compiler."""
    traced = (
        "import functools, torch; torch.compile = functools.partial(torch.compile, backend='eager')"
    )
    losses = []
    for choice in ("on", "off"):
        flags = f"sys.argv += ['--compile', '{choice}', '--amp', 'off']"
        done = on_two_ranks("", every=99, output=choice, more=f"{traced}\n{flags}")
        assert done.returncode == 0 and "uncompiled" not in done.stdout, done.stderr
        [line] = (tmp_path / choice / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(line)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_restart_does_not_read_the_addresses_of_the_ranks_before(monkeypatch):
    """The store of torchrun outlives a restart."""
    store, joined = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda *given, **more: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **more: joined.append(more))
    for attempt in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        _join("gloo")
        assert not joined[-1]["store"].check(["rank0"])
        joined[-1]["store"].set("rank0", "address")
    assert joined[1]["rank"] == 1 and joined[1]["world_size"] == 2


@pytest.mark.long  # it waits for a minute
def test_a_rank_that_hangs_ends_the_run_after_the_time_that_was_said(on_two_ranks, tmp_path):
    more = "common.distributed.WAIT = datetime.timedelta(seconds=8)"
    begun = time.time()
    done = on_two_ranks("time.sleep(200)", more=more)
    assert done.returncode == 1 and time.time() - begun < 150
    assert "2 ranks: one that waits more than 0.00222222 hours for another ends" in done.stdout
    assert "another rank ended or does not answer" in done.stderr
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-0000002"


# -- a loss that is not finite, and its replay -----------------------------------------------------


def not_finite(losses: dict) -> dict:
    term = next(iter(losses))
    return losses | {term: losses[term] * math.nan, "loss": losses["loss"] * math.nan}


def failed_flags(method: str, folder: Path, tiny_root) -> list[str]:
    """The flags of a training of the method in `folder`."""
    return small_runs(method, folder, tiny_root)[0]


def batches_seen(monkeypatch, module) -> list[torch.Tensor]:
    """A list to which the images of each batch are added when its targets are prepared."""
    seen, original = [], module.prepare_targets

    def spy(batch, *given):
        seen.append(batch.images.clone())
        return original(batch, *given)

    monkeypatch.setattr(module, "prepare_targets", spy)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_every_method_replays_a_failed_step(method, tiny_root, tmp_path, call, monkeypatch, caplog):
    """The same images, and the same losses to eight digits, but for those that were not finite."""
    module = importlib.import_module(method)
    seen = batches_seen(monkeypatch, module)
    with monkeypatch.context() as patch:
        at_step(patch, 2, not_finite, module=module)
        with pytest.raises(InputError, match=r"step 2: loss_.* is not finite"):
            call(*failed_flags(method, tmp_path / "run", tiny_root), method=method)
    [folder] = [path for path in tmp_path.iterdir() if (path / "failed-step-0000002.json").exists()]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    caplog.clear()
    with caplog.at_level(logging.INFO, "concord"), pytest.raises(SystemExit) as exit:
        call("--resume", folder, "--replay", 2, method=method)
    assert exit.value.code == 0
    assert "computed with the weights of step 1, as it was" in caplog.text
    assert len(seen) == 3 and torch.equal(seen[1], seen[2])
    rows = [line.split() for line in caplog.messages if len(line.split()) == 3]
    rows = {term: cells for term, *cells in rows if term.startswith("loss")}
    assert len(rows) > 2 and not [cells for cells in rows.values() if "nan" in cells[1]]
    other = {term for term, cells in rows.items() if cells[0] != cells[1]}
    assert other == {term for term, cells in rows.items() if cells[0] == "nan"} and len(other) == 2
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name for name in before if before[name] != after[name]} <= {"label_space.png"}


def test_after_a_loss_that_was_not_finite_it_goes_on_to_the_same_bits(
    flags, whole, tmp_path, command, monkeypatch, caplog
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "concord"):
        at_step(patch, 3, not_finite)
        code, [*_, line] = command(*flags, "--output", folder, "--checkpoint-every", 99)
    assert code == 2 and "step 3: loss_" in line and kept(folder, 2) in caplog.text
    assert command("--resume", folder) == (0, [])
    assert same(weights_of(folder), whole)


@pytest.fixture(scope="module")
def explosion(tiny_root, tmp_path_factory) -> Path:
    """The run folder of a training whose loss was not finite by itself, in its second step."""
    folder = tmp_path_factory.mktemp("explosion") / "run"
    flags = [*flags_of(tiny_root), "--lr", "1e12", "--warmup-steps", "0", "--workers", "2"]
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        patch.setattr(sys, "argv", ["scaledet.py", *flags, "--output", str(folder)])
        with pytest.raises(SystemExit, match="2"):
            run_command(scaledet.main)
    return folder


@pytest.fixture
def exploded(explosion, tmp_path) -> Path:
    return Path(shutil.copytree(explosion, tmp_path / "run"))


def test_a_replay_shows_what_is_not_finite(exploded, command, caplog):
    """With other settings of the loader, and another lr: the batch is that of the record."""
    record = json.loads((exploded / "failed-step-0000002.json").read_text())
    assert len(record["samples"]) == 2 and record["seed"] == 0
    changed = ["--batch-size", 4, "--workers", 0, "--lr", 1e-3]
    with caplog.at_level(logging.INFO, "concord"):
        code, [line] = command("--resume", exploded, "--replay", 2, *changed)
    assert code == 2 and "step 2: loss" in line and "is not finite; lower --lr" in line
    for sample in record["samples"]:
        assert f"{sample['dataset']}: {sample['file_name']}, draw {sample['draw']}" in caplog.text
    assert "is replayed with" in caplog.text and "goes on" not in caplog.text
    assert "history" not in json.loads((exploded / "args.json").read_text())


def test_weights_that_are_not_finite_are_not_kept_on_the_way_out(
    flags, tmp_path, command, monkeypatch, caplog
):
    """Gradients that are not finite poison the weights in a step whose loss is finite."""

    def poison(losses):
        losses["loss"] = losses["loss"] + (0 * losses["loss"]).sqrt()  # its gradient is nan

    folder = tmp_path / "run"
    at_step(monkeypatch, 3, poison)
    with caplog.at_level(logging.INFO, "concord"):
        code, [*_, line] = command(*flags, "--output", folder)
    assert code == 2 and "step 4: " in line and "is not finite" in line
    assert "the weights of step 3 are not finite, so they are not saved" in caplog.text
    assert kept(folder, 2) in caplog.text
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0000002"]


def other(**values):
    """Other values in a record and in its first sample. DROP removes the field."""

    def harm(path: Path) -> None:
        record = json.loads(path.read_text())
        for name, value in values.items():
            place = record["samples"][0] if name in FIELDS else record
            place[name] = value
            if value is DROP:
                del place[name]
        path.write_text(json.dumps(record))

    return harm


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path: path.unlink(), "has no record of this step"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_text("[" * 100_000), "cannot be read"),
        (lambda path: path.write_text("[]"), "[] is no object"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is a folder, a pipe or a device"),
        (
            lambda path: path.write_text(path.read_text().replace(".jpg", ".png")),
            "give the same datasets",
        ),
        (other(index=-100), "in sample 0 the index -100 is out of range"),
        (other(index=10**6), "give the same datasets"),
        (other(index=1.0), "in sample 0 the field index is missing or wrong (1.0)"),
        (other(draw=-5), "in sample 0 the draw -5 is out of range"),
        (other(draw=10**20), "in sample 0 the draw 100000000000000000000 is out of range"),
        (other(draw=1e20), "in sample 0 the field draw is missing or wrong (1e+20)"),
        (other(draw=True), "in sample 0 the field draw is missing or wrong (True)"),
        (other(draw=DROP), "in sample 0 the field draw is missing or wrong (None)"),
        (other(dataset=["coco"]), "in sample 0 the field dataset is missing or wrong (['coco'])"),
        (other(seed=math.inf), "the field seed is missing or wrong (inf)"),
        (other(seed=DROP), "the field seed is missing or wrong (None)"),
        (other(samples=DROP), "the field samples is missing or wrong (None)"),
        (other(samples=[]), "samples is empty"),
        (other(samples=["coco"]), "in sample 0 'coco' is no object"),
        (other(losses={}), "in losses the field loss is missing or wrong (None)"),
        (other(losses={"loss": 10**400}), "in losses the field loss is missing or wrong (1000"),
    ],
)
def test_a_replay_without_a_sound_record_is_one_line(exploded, command, harm, words):
    harm(exploded / "failed-step-0000002.json")
    code, [line] = command("--resume", exploded, "--replay", 2)
    assert code == 2 and words in line


def test_a_replay_takes_the_weights_before_the_step(flags, exploded, command, caplog):
    """Or earlier ones, and says so."""
    with caplog.at_level(logging.INFO, "concord"):
        assert command("--resume", exploded, "--replay", 2)[0] == 2
    assert "step 2 is computed with the weights of step 1, as it was" in caplog.text
    for path in checkpoints(exploded):
        shutil.rmtree(path)
    with caplog.at_level(logging.INFO, "concord"):
        assert command("--resume", exploded, "--replay", 2) == (0, [])
    assert "with the weights of step 0, though step 1 was before" in caplog.text
    assert "step 2: all losses are finite this time" in caplog.text


def test_one_process_replays_the_rank_that_failed(tmp_path):
    """As many ranks replay each its own batch; other numbers of ranks are refused."""
    sample = {"dataset": "a", "index": 3, "image_id": 7, "file_name": "3.jpg", "draw": 0}
    for own, loss in enumerate((0.5, math.nan)):
        record = {"seed": 0, "losses": {"loss": loss}, "samples": [sample | {"draw": own}]}
        (tmp_path / f"failed-step-0000004-rank{own}.json").write_text(json.dumps(record))
    assert read_record(tmp_path, 4)["samples"][0]["draw"] == 1
    for own, ranks in ((0, 2), (1, 2), (2, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.replay.rank", lambda own=own: own)
            patch.setattr("common.replay.world_size", lambda ranks=ranks: ranks)
            if ranks == 2:
                assert read_record(tmp_path, 4)["samples"][0]["draw"] == own
                continue
            with pytest.raises(InputError, match="failed-step-0000004-rank0"):
                read_record(tmp_path, 4)


def test_replay_needs_a_run_folder(command, tmp_path):
    code, [line] = command("--replay", 3, "--output", tmp_path)
    assert code == 2 and "--replay 3 needs --resume" in line


# -- evaluations on the way ------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch) -> list[float]:
    """What the evaluations of a training find, one after the other. Each disturbs what it can."""
    values = []

    def evaluate(args, model, label_space, datasets, folder):
        assert [dataset.name for dataset in datasets] == ["coco"]
        model.eval()
        torch.rand(5)
        return {"coco": {"AP": values.pop(0), "AP50": 1.0}, "coco (control)": {"AP": 1.0}}

    monkeypatch.setattr(scaledet, "evaluate", evaluate)
    return values


def test_the_best_weights_are_kept(flags, whole, tmp_path, command, scores, caplog, monkeypatch):
    """The best of three evaluations; the last one is that of the end. Their curves are drawn."""
    drawn = []

    def draw(panels):
        drawn.append(panels)
        return draw_panels(panels)

    monkeypatch.setattr("common.curves.draw_panels", draw)
    monkeypatch.setattr("common.runlog.EVERY", 2)
    folder = tmp_path / "run"
    scores += [0.25, 0.5, 0.375, 0.125]
    with caplog.at_level(logging.INFO, "concord"):
        assert command(*flags, "--eval-every", 1, "--output", folder) == (0, [])
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["main"], line["of"]) for line in lines] == [
        (1, 0.25, "coco AP"),
        (2, 0.5, "coco AP"),
        (3, 0.375, "coco AP"),
        (4, 0.125, "coco AP"),
    ]
    assert lines[1]["results"]["coco (control)"] == {"AP": 1.0}
    best = load_file(folder / "best.safetensors")
    assert same(best, load_file(folder / "checkpoint-0000002" / "weights.safetensors"))
    said = [line for line in caplog.messages if "the best so far is" in line]
    assert len(said) == 4
    assert said[2] == (
        "step 3: coco AP 0.375; the best so far is 0.500 of step 2, kept in "
        f"{folder}/best.safetensors"
    )
    assert same(weights_of(folder), whole)
    model, _ = scaledet.load(folder / "best.safetensors")
    assert all(torch.equal(best[key], tensor) for key, tensor in model.state_dict().items())
    # once at the end of the training, and once more with its evaluation
    assert [list(panels) for panels in drawn] == [["losses", "learning rate", "metrics"]] * 2
    [[before, *_], [main, *_]] = [panels["metrics"] for panels in drawn]
    assert main.label == "coco AP" and main.steps.tolist() == [1, 2, 3, 4]
    assert main.values.tolist() == [0.25, 0.5, 0.375, 0.125] and len(before.values) == 3
    assert drawn[0]["losses"][0].steps.tolist() == [2, 4]
    with Image.open(folder / "curves.png") as picture:
        assert picture.size == (1200, 950)


def test_the_last_weights_may_be_the_best(flags, tmp_path, command, scores):
    folder = tmp_path / "run"
    scores += [0.25, 0.5]
    assert command(*flags, "--eval-every", 2, "--output", folder) == (0, [])
    assert same(load_file(folder / "best.safetensors"), weights_of(folder))
    scores += [0.5]
    assert command("--resume", folder) == (0, [])  # evaluates again: nothing is said twice
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("evaluation", [1, 2])
def test_the_best_weights_survive_a_resume(flags, whole, tmp_path, command, scores, evaluation):
    """The training is stopped amid an evaluation, which the next start makes at once."""
    folder, evaluate = tmp_path / "run", scaledet.evaluate

    def stopped(*given):
        found = evaluate(*given)
        if len(scores) == 4 - evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    scores += [0.5, 0.25, 0.125, 0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaledet, "evaluate", stopped)
        code, [line] = command(*flags, "--eval-every", 1, "--output", folder)
    assert code == 143 and kept(folder, evaluation) in line
    scores[:] = [0.5, 0.25, 0.125, 0.0][evaluation - 1 :]
    assert command("--resume", folder) == (0, [])
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["main"]) for line in lines] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
        (4, 0.0),
    ]
    assert same(weights_of(folder), whole)
    metadata = json.loads((folder / "args.json").read_text())
    assert metadata["eval_every"] == 1
    best = load_file(folder / "best.safetensors")
    assert not same(best, whole) and len(best) == len(whole)


def test_another_main_metric_starts_anew(tmp_path, caplog):
    saved = []

    def save(path, about):
        saved.append(about)

    def record(step, results):
        with caplog.at_level(logging.INFO, "concord"):
            record_evaluation(tmp_path, step, results, ["a"], save)

    record(1, {"a": {"AP": math.nan}})
    assert not saved and json.loads((tmp_path / "evaluations.jsonl").read_text())["main"] is None
    record(2, {"a": {"AP": 0.5}})
    assert saved == [{"step": 2, "best": {"value": 0.5, "of": "a AP", "step": 2}}]


@pytest.mark.parametrize(
    "results, trained, value, name",
    [
        ({"a": {"AP": 0.5, "AP50": 0.9}}, ["a"], 0.5, "a AP"),
        (
            {"a": {"AP": 0.5}, "b": {"mIoU": 0.1}, "c": {"AP": 0.9}},
            "ab",
            0.3,
            "mean of a AP, b mIoU",
        ),
        ({"a (control)": {"AP": 0.9}, "c": {"AP": 0.2}}, ["a"], 0.2, "c AP"),
        ({"a": {"AP": math.nan}, "b": {"AP": 0.2}}, "ab", 0.2, "b AP"),
        ({"a (proposals)": {"AR": 0.2}}, "ab", math.nan, ""),
    ],
)
def test_main_metric(results, trained, value, name):
    found = main_metric(results, trained)
    assert found[0] == pytest.approx(value, nan_ok=True) and found[1] == name


def test_undisturbed_restores_modes_one_by_one():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[1].eval()
    state = torch.get_rng_state()
    with pytest.raises(ValueError), undisturbed(model):
        torch.rand(3)
        model.eval()
        raise ValueError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_same_with_evaluations(method, tiny_root, tmp_path, call):
    """With all that its real evaluation does. Every weight and every loss is the same."""
    for name, every in (("without", 0), ("with", 1)):
        for flags in small_runs(method, tmp_path / name, tiny_root):
            call(*flags, "--eval-every", every, method=method)
    assert same(weights_of(tmp_path / "with"), weights_of(tmp_path / "without"))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("with", "without")]
    lines = [re.sub(r'"img_per_s": [\d.]+', "", text) for text in lines]
    assert lines[0] == lines[1]
    assert not (tmp_path / "without" / "evaluations.jsonl").exists()
    lines = (tmp_path / "with" / "evaluations.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    last = json.loads((tmp_path / "with" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    first = 3 if method == "unidetector" else 1  # after the two steps of the localizer
    assert steps == list(range(first, last + 1))
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("with", "without")]
    assert results[0] == results[1] == json.loads(lines[-1])["results"]


def test_two_ranks_train_the_same_with_evaluations(tiny_root, tmp_path, run):
    for name, every in (("without", 0), ("with", 1)):
        flags = [*flags_of(tiny_root), "--steps", 2, "--eval-every", every]
        flags += ["--output", tmp_path / name]
        done = run(*flags, ranks=2)
        assert done.returncode == 0, done.stderr
    assert same(weights_of(tmp_path / "with"), weights_of(tmp_path / "without"))
    lines = (tmp_path / "with" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
