"""Numbers sent to a tracker: stand-ins of the three libraries, and those that are installed."""

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, small_runs
from PIL import Image

from common.errors import InputError
from common.track import tracker

SETTINGS = {"datasets": "coco,o365", "lr": 1e-3, "jitter": (0.8, 1.5), "steps": None}


class FakeRun:
    """What all of wandb's and trackio's runs have."""

    def __init__(self, seen: list):
        self.seen = seen
        self.info = SimpleNamespace(run_id="ml1")

    def define_metric(self, name, step_metric):
        self.seen.append(("define_metric", name, step_metric))

    def log(self, values, step=None):
        self.seen.append(("log", values, step))

    def finish(self):
        self.seen.append(("finish",))


@pytest.fixture
def seen(monkeypatch) -> list:
    """What three stand-ins are called with."""
    seen = []
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)

    def begin(**given) -> FakeRun:
        seen.append(("begin", given))
        return FakeRun(seen)

    def note(name: str):
        return lambda *given, **named: seen.append((name, *given, *named.values()))

    fakes = {
        "wandb": {"init": begin, "Image": lambda path: ("image", path)},
        "trackio": {"init": begin, "Image": lambda path: ("image", path)},
        "mlflow": {"start_run": begin},
    }
    calls = ("set_experiment", "log_params", "log_metrics", "log_artifact", "end_run")
    fakes["mlflow"] |= {name: note(name) for name in calls}
    for name, attributes in fakes.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__="fake.py", **attributes))
    return seen


def test_no_tracker(tmp_path):
    assert tracker("", tmp_path, SETTINGS) is None
    assert not list(tmp_path.iterdir())


def test_wandb(seen, tmp_path, monkeypatch):
    run = tracker("wandb", tmp_path, SETTINGS)
    run.log({"loss": 1.5}, 20)
    run.log_image("coco", tmp_path / "a.jpg", 20)
    run.finish()
    begun, *rest = seen
    id = json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert begun[1] == {
        "project": "concord",
        "dir": str(tmp_path),
        "name": tmp_path.name,
        "id": id,
        "resume": "allow",
        "config": SETTINGS,
    }
    assert rest == [
        ("define_metric", "*", "step"),
        ("log", {"loss": 1.5, "step": 20}, None),
        ("log", {"coco": ("image", str(tmp_path / "a.jpg")), "step": 20}, None),
        ("finish",),
    ]
    seen.clear()
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    tracker("wandb", tmp_path, SETTINGS)  # a resumed run
    assert seen[0][1] | {"id": id, "project": "other", "dir": "elsewhere"} == seen[0][1]


def test_trackio(seen, tmp_path):
    run = tracker("trackio", tmp_path, SETTINGS)
    run.log({"loss": 1.5}, 20)
    run.log_image("coco", tmp_path / "a.jpg", 20)
    run.finish()
    begun, *rest = seen
    name = json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert name.startswith(f"{tmp_path.name}-") and len(name) == len(tmp_path.name) + 9
    begin = {"project": "concord", "name": name, "resume": "allow", "config": SETTINGS}
    assert begun[1] == begin | {"embed": False}
    image = {"coco": ("image", str(tmp_path / "a.jpg"))}
    assert rest == [("log", {"loss": 1.5}, 20), ("log", image, 20), ("finish",)]
    tracker("trackio", tmp_path, SETTINGS)
    assert seen[-1][1] == begun[1]


def test_mlflow(seen, tmp_path, monkeypatch):
    run = tracker("mlflow", tmp_path, SETTINGS | {"vocabulary": "x" * 900})
    run.log({"lineart (shuffled text)/AP50": 0.5, "loss_box": 1.0}, 20)
    run.log_image("coco", tmp_path / "a.jpg", 20)
    run.finish()
    text = {name: str(value) for name, value in SETTINGS.items()} | {"vocabulary": "x" * 500}
    assert seen == [
        ("set_experiment", "concord"),
        ("begin", {"run_id": None, "run_name": tmp_path.name}),
        ("log_params", text),
        ("log_metrics", {"lineart _shuffled text_/AP50": 0.5, "loss_box": 1.0}, 20),
        ("log_artifact", str(tmp_path / "a.jpg"), "coco/step-0000020"),
        ("end_run",),
    ]
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"kind": "mlflow", "id": "ml1"}
    seen.clear()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tracker("mlflow", tmp_path, SETTINGS)
    assert seen == [("begin", {"run_id": "ml1", "run_name": None})]


def test_another_or_a_damaged_run_begins_anew(seen, tmp_path, caplog):
    caplog.set_level(logging.INFO, "concord")
    tracker("mlflow", tmp_path, SETTINGS)
    tracker("wandb", tmp_path, SETTINGS)
    assert "names a run of mlflow: a new run of wandb begins" in caplog.text
    file = tmp_path / "tracker.json"
    first = json.loads(file.read_text())
    assert first["kind"] == "wandb" and first["id"] != "ml1"
    for content in ("{", "[]", '{"kind": "wandb"}', "[" * 100_000):
        file.write_text(content)
        caplog.clear()
        tracker("wandb", tmp_path, SETTINGS)
        assert "tracker.json cannot be read" in caplog.text
        assert json.loads(file.read_text())["id"] != first["id"]


def test_a_failure_in_the_middle_is_told_once(seen, tmp_path, caplog):
    run = tracker("trackio", tmp_path, SETTINGS)

    def fail(*given, **named):
        raise RuntimeError("no network\nat all")

    run.run.run.log = fail
    run.log({"loss": 1.5}, 20)
    run.log({"loss": 1.5}, 40)
    run.log_image("coco", tmp_path / "a.jpg", 40)
    run.finish()
    assert caplog.messages == [
        "trackio failed (no network): nothing more goes there; the run folder has all numbers"
    ]
    assert ("finish",) not in seen


def test_what_cannot_begin(seen, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="tracker 'neptune' is unknown; there are wandb, trackio"):
        tracker("neptune", tmp_path, SETTINGS)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb is not installed \(.+\): pip install wandb"):
        tracker("wandb", tmp_path, SETTINGS)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # a folder ./wandb
    with pytest.raises(InputError, match=r"wandb is not installed \(.+\): pip install wandb"):
        tracker("wandb", tmp_path, SETTINGS)

    def refuse(**given):
        raise ValueError("no API key\nlog in")

    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    with pytest.raises(InputError, match=r"trackio cannot begin a run \(no API key\); see its"):
        tracker("trackio", tmp_path, SETTINGS)
    assert not (tmp_path / "tracker.json").exists()


TRAINING = """
import sys
from pathlib import Path
from common.track import tracker

kind, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
run = tracker(kind, folder, {"lr": 1e-3, "jitter": (0.8, 1.5), "steps": None})
run.log({"loss": 1.5, "lineart (shuffled text)/AP50": 0.5}, step)
run.log_image("coco", folder / "a.jpg", step)
run.finish()
print("failed:", run.failed)
"""


def start(kind: str, folder: Path, step: int, **variables) -> str:
    """A process that logs a step. Returns its output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])} | variables
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, kind, str(folder), str(step)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "failed: False" in done.stdout, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    return folder


def read(text: str, **variables) -> str:
    """Returns the last line that a program prints. No tracker is imported in this process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def is_installed(*names: str):
    """Skips a test without these packages. They are not imported, since that takes seconds."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} missing")


@is_installed("trackio")
def test_the_real_trackio(folder, tmp_path):
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    start("trackio", folder, 20, **variables)
    start("trackio", folder, 40, **variables)
    name = json.loads((folder / "tracker.json").read_text())["id"]
    text = "from trackio.sqlite_storage import SQLiteStorage as S; "
    text += (
        f"print([(r['step'], r['loss']) for r in S.get_logs('concord', '{name}') if 'loss' in r])"
    )
    assert read(text, **variables) == "[(20, 1.5), (40, 1.5)]"


@is_installed("wandb")
def test_the_real_wandb_offline(folder):
    for step in (20, 40):
        start("wandb", folder, step, WANDB_MODE="offline")
        time.sleep(1.1)  # the name of its folder has the second
    id = json.loads((folder / "tracker.json").read_text())["id"]
    assert len(list((folder / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))) == 2


@is_installed("mlflow", "sqlalchemy", "alembic")
def test_the_real_mlflow(folder, tmp_path):
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    start("mlflow", folder, 20, **variables)
    start("mlflow", folder, 40, **variables)
    id = json.loads((folder / "tracker.json").read_text())["id"]
    text = f"import mlflow; m = mlflow.MlflowClient().get_metric_history('{id}', 'loss'); "
    text += "print([(x.step, x.value) for x in m])"
    assert read(text, **variables) == "[(20, 1.5), (40, 1.5)]"


def test_a_training_sends_its_numbers(seen, tiny_root, tmp_path, train_here):
    """Losses, evaluations on the way and the last one, to one run, whose id is kept."""
    run = small_runs("scaledet", tmp_path / "run", tiny_root, steps=2)[0]
    run += ["--track", "wandb", "--eval-every", "1"]
    results = {"coco": {"AP": 0.5, "APl": math.nan}, "o365": {"AP": 0}}
    train_here("scaledet", run, lambda *_: results)
    begun = [given for what, *rest in seen if what == "begin" for given in rest]
    assert len(begun) == 2 and begun[0]["id"] == begun[1]["id"]
    assert begun[0]["config"]["datasets"] == "coco,o365"
    sent = [rest[0] for what, *rest in seen if what == "log"]
    evaluated = {"coco/AP": 0.5, "o365/AP": 0}
    assert sent[0] == evaluated | {"step": 1} and sent[-1] == evaluated | {"step": 2}
    assert {"loss", "lr", "img_per_s"} < sent[1].keys() and sent[1]["step"] == 2
    assert [what for what, *_ in seen][-1] == "finish"
