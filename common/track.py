"""Sends the numbers of a training to TensorBoard, wandb, trackio or mlflow.

Where a tracker sends its data, and whether it is offline, its own environment variables say.
"""

import importlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import InputError, first_line
from common.files import atomic_path

log = logging.getLogger("concord")

FILE = "tracker.json"  # in a run folder: which run of which tracker it is
PROJECT = "concord"


class Wandb:
    """A run of Weights & Biases. An `id` of before goes on with that run."""

    def __init__(self, wandb: ModuleType, folder: Path, settings: dict, id: str):
        self.wandb = wandb
        self.id = id or uuid.uuid4().hex[:8]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            name=folder.name,
            id=self.id,
            resume="allow",
            config=settings,
        )
        # its own step must grow, but a training that was killed repeats some
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the values of a step."""
        self.run.log(values | {"step": step})

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Sends a picture."""
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def finish(self) -> None:
        """Ends the run."""
        self.run.finish()


class Trackio:
    """A run of trackio, whose id is its name. A name of before goes on with that run."""

    def __init__(self, trackio: ModuleType, folder: Path, settings: dict, id: str):
        self.trackio = trackio
        self.id = id or f"{folder.name}-{uuid.uuid4().hex[:8]}"
        self.run = trackio.init(
            project=PROJECT, name=self.id, resume="allow", config=settings, embed=False
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the values of a step."""
        self.run.log(values, step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Sends a picture."""
        self.run.log({name: self.trackio.Image(str(path))}, step=step)

    def finish(self) -> None:
        """Ends the run."""
        self.run.finish()


class Mlflow:
    """A run of MLflow. An `id` of before goes on with that run."""

    def __init__(self, mlflow: ModuleType, folder: Path, settings: dict, id: str):
        self.mlflow = mlflow
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=id or None, run_name=None if id else folder.name)
        self.id = run.info.run_id
        if not id:
            # it refuses long values, and others of a setting that it has
            mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the values of a step, under names of the letters that MLflow takes."""
        named = {re.sub(r"[^\w./ -]", "_", name): value for name, value in values.items()}
        self.mlflow.log_metrics(named, step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Sends a picture, as the artifact name/step-N/FILE."""
        self.mlflow.log_artifact(str(path), f"{name}/step-{step:07d}")

    def finish(self) -> None:
        """Ends the run."""
        self.mlflow.end_run()


KINDS = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


class Tracker:
    """A run of a tracker that has begun. Only rank 0 has one.

    If the tracker fails, the log says so once, and nothing more is sent: the training goes on.
    """

    def __init__(self, kind: str, run: Wandb | Trackio | Mlflow):
        self.kind = kind
        self.run = run
        self.failed = False

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends numbers of a step."""
        self._send(self.run.log, values, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Sends a picture in a file, such as predictions beside the ground truth."""
        self._send(self.run.log_image, name, path, step)

    def finish(self) -> None:
        """Ends the run."""
        self._send(self.run.finish)

    def _send(self, send: Callable, *given: object) -> None:
        if self.failed:
            return
        try:
            send(*given)
        except Exception as error:  # of the network, a full disk, or the tracker itself
            self.failed = True
            message = "%s failed (%s): nothing more goes there; the run folder has all numbers"
            log.warning(message, self.kind, first_line(error))


def tensorboard_writer(folder: Path) -> Any | None:
    """Returns a TensorBoard writer, or None if TensorBoard is not installed or refuses the path."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info(
            "TensorBoard is not installed (pip install tensorboard); see metrics.jsonl instead"
        )
        return None
    try:
        return SummaryWriter(folder)
    except UnicodeEncodeError:
        log.info("TensorBoard needs a path in UTF-8, which %s is not; see metrics.jsonl", folder)
        return None


def tracker(kind: str, folder: Path, settings: dict) -> Tracker | None:
    """Begins a run of a tracker, or goes on with that of the run folder. "" is none: None.

    kind:     "wandb", "trackio", "mlflow" or ""
    settings: of the training, sent along

    Which run it is, is kept in tracker.json of the run folder. If that cannot be gone on with, the
    log says so, and there is none. Raises InputError for a tracker that
    is unknown, is not installed or cannot begin.
    """
    if not kind:
        return None
    if kind not in KINDS:
        raise InputError(f"tracker '{kind:.60}' is unknown; there are {', '.join(KINDS)}")
    try:
        package = importlib.import_module(kind)
        if getattr(package, "__file__", None) is None:  # a folder of that name, such as ./wandb
            raise ImportError(f"no module named '{kind}'")
    except ImportError as error:
        raise InputError(f"{kind} is not installed ({error}): pip install {kind}") from None
    id = _saved_id(folder / FILE, kind)
    try:
        run = KINDS[kind](package, folder, settings, id)
    except Exception as error:
        if id:  # a training that has begun goes on without it
            log.warning("%s does not go on (%s): nothing more goes there", kind, first_line(error))
            return None
        reason = first_line(error)
        raise InputError(f"{kind} cannot begin a run ({reason}); see its manual") from None
    with atomic_path(folder / FILE) as path:
        path.write_text(json.dumps({"kind": kind, "id": run.id}), encoding="utf-8")
    return Tracker(kind, run)


def _saved_id(file: Path, kind: str) -> str:
    """Returns the id of the run that tracker.json names; "" without one of this kind."""
    try:
        saved: Any = json.loads(file.read_text(encoding="utf-8"))
        saved_kind, id = str(saved["kind"]), str(saved["id"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): a new run of %s begins", file, error, kind)
        return ""
    if saved_kind != kind:
        log.info("%s names a run of %s: a new run of %s begins", file, saved_kind, kind)
        return ""
    return id
