"""Compares the settings of a training with those that its run folder keeps in args.json."""

import json
import logging
import time
from pathlib import Path

from common.checkpoint import checkpoint_step, checkpoints, stored_names
from common.errors import InputError
from common.labels import LabelSpace

log = logging.getLogger("concord")

# settings that say how a training starts, not how it goes on
OF_A_START = {"resume", "output", "eval_only", "predict", "replay"}
# settings that a training may go on with another value of; so may the numbers of steps and the
# learning rates of its stages
CHANGEABLE = {"datasets", "eval_datasets", "data_root", "vocabulary", "score_threshold"}
CHANGEABLE |= {"checkpoint_every", "keep", "eval_every", "skip_bad"}
CHANGEABLE |= {"workers", "amp", "compile", "device"}
CHANGEABLE |= {"batch_size", "image_size", "ranks"}
CHANGEABLE_ENDS = ("steps", "lr")


def read_args(folder: Path, method: str) -> dict:
    """Reads args.json of a run folder. Raises InputError if broken or of another method."""
    path = folder / "args.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--resume: {path} cannot be read ({error}); name the run folder of a training"
        ) from None
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise InputError(
            f"--resume: {path} is not of a {method} training; name the run folder of one"
        )
    for name, kind in (("environment", dict), ("history", list)):
        if not isinstance(saved.get(name, kind()), kind):
            raise InputError(f"--resume: {path}: {name} is damaged; remove it from the file")
    return saved


def go_on(folder: Path, record: dict, method: str, label_space: LabelSpace) -> dict | None:
    """Compares the settings `record` with those in the folder, where a training began.

    Returns the new content of args.json, or None if no setting is another. Raises InputError if
    one may not be another.
    """
    saved = read_args(folder, method)
    others = _differences(saved, record)
    fixed = {
        name: values
        for name, values in others.items()
        if name not in CHANGEABLE and not name.endswith(CHANGEABLE_ENDS)
    }
    if fixed:
        listed = ", ".join(
            f"{_flag(name)} {old} is now {new}" for name, (old, new) in fixed.items()
        )
        raise InputError(
            f"the training in {folder} has other settings: {listed}; give the same, or choose"
            " another --output"
        )
    _check_label_space(folder, label_space)
    done = [checkpoint_step(path) for path in checkpoints(folder)]
    if not done and not record["replay"]:
        log.info("%s has no checkpoint yet: the training starts again from nothing", folder)
    if not others:
        return None
    listed = ", ".join(
        f"{_flag(name)} {new} instead of {old}" for name, (old, new) in others.items()
    )
    if record["replay"]:
        log.info("%s is replayed with %s", folder, listed)
        return None
    log.info("%s goes on with %s; args.json keeps both", folder, listed)
    change = {"after_step": max(done, default=0), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    change["changes"] = others
    return saved | record | {"history": [*saved.get("history", []), change]}


def _differences(saved: dict, record: dict) -> dict[str, list]:
    """Returns {setting: [old, new]} of those that differ. What `saved` lacks has its default."""
    new = json.loads(json.dumps(record))
    names = [name for name in new if name in saved]
    names = [n for n in names if n not in OF_A_START | {"method", "environment"}]
    found = {name: [saved[name], new[name]] for name in names if saved[name] != new[name]}
    ranks = [content.get("environment", {}).get("ranks", 1) for content in (saved, new)]
    return found | ({"ranks": ranks} if ranks[0] != ranks[1] else {})


def _flag(name: str) -> str:
    return name if name == "ranks" else "--" + name.replace("_", "-")


def _check_label_space(folder: Path, label_space: LabelSpace) -> None:
    """Raises InputError if the newest checkpoint was trained on other datasets or class names."""
    own = {v.dataset: list(v.names) for v in label_space.vocabularies.values()}
    for checkpoint in reversed(checkpoints(folder)):
        stored = stored_names(checkpoint / "weights.safetensors")
        if stored is None:  # damaged, as `last_checkpoint` will find
            continue
        if list(stored) != list(own):
            difference = f"was trained on {', '.join(stored)}, not on {', '.join(own)}"
        elif stored != own:
            name = next(name for name in own if own[name] != stored[name])
            difference = f"was trained on other class names of '{name}'"
        else:
            return
        raise InputError(
            f"{checkpoint} {difference}; give the same --datasets, or start another training with"
            f" --weights {folder} and another --output"
        )
