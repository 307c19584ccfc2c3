"""Small generated data in the real layouts, and the command line run as a user runs it."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
from torch.distributed import checkpoint
from torch.distributed.launcher.api import elastic_launch

from common import distributed
from common.command import run_command
from common.demo import commands
from common.parts import Parts
from common.process import Process

# small tensors: two threads that wait for each other on a busy machine are slower than one
torch.set_num_threads(1)
distributed.CPU_TESTS = {}  # --amp auto is float32, whatever the CPU is built for

REPO = Path(__file__).resolve().parent.parent
WITH_FSDP = pytest.mark.skipif(
    not hasattr(checkpoint, "HuggingFaceStorageWriter"), reason="torch is too old for --fsdp"
)
METHODS = sorted(p.stem for p in REPO.glob("*.py") if "\nclass Args:" in p.read_text())
REAL = Path(os.environ.get("CONCORD_REAL", REPO / "../shared/real"))
# A model and a run of seconds. A pip package has the backbone's weights, so that no test uses the
# network.
FLAGS = """
    --backbone tf_efficientnet_lite0 --text-encoder minilm --channels 64 --fc-dim 32
    --rois-per-image 16 --image-size 96 --test-size 96 --batch-size 4 --base-batch-size 4
    --steps 6 --warmup-steps 2 --lr 1e-3 --workers 0 --device cpu --cls-bias -4.6
"""
FAST = FLAGS.split()

# what a method has of these settings is small
SMALL = {"batch_size": 2, "base_batch_size": 2, "checkpoint_every": 1}
SMALL |= {"image_size": 96, "test_size": 96, "channels": 64, "fc_dim": 32, "rois_per_image": 16}
SMALL |= {"encoder_layers": 1, "decoder_layers": 1, "queries": 10, "points": 64}


def small_flags(method: str, steps: int) -> list[str]:
    """The flags of the method's own TINY settings, but smaller. steps: of each stage"""
    module = importlib.import_module(method)
    fields = {field.name for field in dataclasses.fields(module.Args)}
    settings = module.TINY | {name: SMALL[name] for name in SMALL.keys() & fields}
    for name in settings:
        if name.endswith("steps"):
            settings[name] = steps
        elif name.endswith("_size") and "batch" not in name:
            settings[name] = 96
    flags = ["--device", "cpu"]
    for name, value in settings.items():
        flags.append("--" + name.replace("_", "-"))
        flags += map(str, value if isinstance(value, tuple) else [value])
    return flags


def small_runs(method: str, folder, tiny_root, steps: int = 2) -> list[list[str]]:
    """The runs of the method's demonstration, on few images and with small settings."""
    flags = ["--data-root", str(tiny_root), "--output", str(folder), *small_flags(method, steps)]
    runs = commands(method, flags)
    return [[part for part in run if part != "--tiny"] for run in runs]


@pytest.fixture(autouse=True)
def settings_of_a_process():
    """What a command sets for its process does not reach the next test."""
    yield
    Parts.number, Parts.told = 1, False


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """A CLIP with random weights in a file, as an encoder string."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / "concord-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("concord-small").state_dict(), folder / "weights.pt")
    return f"concord-small/{folder / 'weights.pt'}"


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A data root with 12 images to train on and 4 to evaluate of each generated dataset."""
    return generated(tmp_path_factory.mktemp("tiny"), 12)


def generated(cache: Path, limit: int) -> Path:
    """The data root of all generated datasets, at most `limit` images to train on, 96 pixels."""
    from common.datasets.tiny import generate

    # an evaluation of an untrained model is slow: each image has hundreds of detections
    recipes = {}
    for name, recipe in generate.TINY.items():
        splits = recipe.splits.items()
        fewer = {
            split: (min(n, 4), seed) if "val" in split else (n, seed) for split, (n, seed) in splits
        }
        recipes[name] = dataclasses.replace(recipe, splits=fewer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "TINY", recipes)
        for name in recipes:
            root = generate.generate(name, cache, size=96, limit=limit)
    return root


def run_method(method: str, flags: list[str], ranks: int) -> None:
    """What `python METHOD.py FLAGS` does, or torchrun with as many ranks."""
    sys.argv = [f"{method}.py", *flags]
    main = importlib.import_module(method).main
    if ranks == 1:
        run_command(main)
        return
    arguments = f"--rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node {ranks} {method}"
    config, *_ = torchrun.config_from_args(torchrun.parse_args(arguments.split()))
    config.start_method = "fork"
    elastic_launch(config, run_command)(main)


def stand_alone(stdout: Path, stderr: Path) -> None:
    """Gives this process a group of its own, and then its output to files, or to one file."""
    os.setsid()
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)


def run_into_files(
    method: str, flags: list[str], ranks: int, environment: dict, folder: Path
) -> None:
    """run_method in a process of its own. What it writes is in `folder`: stdout and stderr."""
    stand_alone(folder / "stdout", folder / "stderr")
    os.chdir(REPO)
    os.environ.clear()
    os.environ.update(environment)
    run_method(method, flags, ranks)


@pytest.fixture(scope="session")
def run(forks, tmp_path_factory):
    """run(*args, method="scaledet", ranks=1): `python METHOD.py *args`.

    Its process is forked from one with all imports, since these take longer than most trainings.
    Returns the finished process, with its output as text.
    """

    def start(
        *args, method: str = "scaledet", ranks: int = 1, timeout: float = 240
    ) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("output")
        flags = [str(arg) for arg in args]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        given = (method, flags, ranks, environment, folder)
        process = forks.Process(target=run_into_files, args=given)
        process.start()
        process.join(timeout)
        output = [(folder / name).read_text() for name in ("stdout", "stderr")]
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"it hangs: {output}")
        return subprocess.CompletedProcess(flags, process.exitcode, *output)

    return start


@pytest.fixture(scope="session")
def call():
    """call(*args, method="scaledet"): the command line in this process.

    For what needs no process of its own.
    """

    def start(*args, method: str = "scaledet") -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{method}.py", *map(str, args)])
            importlib.import_module(method).main()

    return start


@pytest.fixture
def train_here(monkeypatch):
    """train_here(method, flags, evaluate): a training in this process.

    evaluate: in place of the method's; None: nothing is evaluated
    """

    def train(method: str, flags: list[str], evaluate=None) -> None:
        module = importlib.import_module(method)
        monkeypatch.setattr(module, "evaluate", evaluate or (lambda *_: {}))
        if evaluate is None:
            monkeypatch.setattr(module, "evaluation_datasets", lambda *_, **__: [])
        monkeypatch.setattr(Process, "training", None)
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *flags])
        module.main()

    return train


@pytest.fixture(scope="session")
def forks():
    """A context of multiprocessing, whose processes start with all imports done."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill", "ranks", "torch.utils.tensorboard", *METHODS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@pytest.fixture
def seen(monkeypatch) -> dict:
    """What a training asks of AdamW ("settings") and of clipping by value ("clip")."""
    seen, adamw, clip = {}, torch.optim.AdamW, torch.nn.utils.clip_grad_value_

    def spy_adamw(parameters, **settings):
        seen["settings"] = settings
        return adamw(parameters, **settings)

    def spy_clip(parameters, value):
        seen["clip"] = value
        return clip(parameters, value)

    monkeypatch.setattr(torch.optim, "AdamW", spy_adamw)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", spy_clip)
    return seen


@pytest.fixture
def fails(monkeypatch, capsys):
    """fails(*args, method="scaledet"): a command that must end with exit code 2.

    Returns its one line on stderr.
    """

    def check(*args, method: str = "scaledet") -> str:
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            run_command(importlib.import_module(method).main)
        assert exit.value.code == 2
        bars = ("img/s", "s/img", "step/s", "s/step")
        lines = [part for part in capsys.readouterr().err.split("\n") if part.strip()]
        line = [part for part in lines if not any(bar in part for bar in bars)]
        assert len(line) == 1 and line[0].startswith("error: "), line
        return line[0]

    return check
