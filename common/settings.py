"""Compares the settings of this start with args.json, which keeps those of the training so far."""

import json
import logging
import time
from pathlib import Path

from common.checkpoint import checkpoint_step, checkpoints, stored_names
from common.effects import flag
from common.errors import InputError
from common.labels import LabelSpace
from common.saved import OF_A_START, read_args

log = logging.getLogger("concord")

# settings that may change from one start to the next; so may the settings that end with
# CHANGEABLE_ENDS, the numbers of steps and the learning rates
CHANGEABLE = {"datasets", "eval_datasets", "data_root", "vocabulary", "score_threshold"}
CHANGEABLE |= {"checkpoint_every", "keep", "eval_every", "skip_bad"}
CHANGEABLE |= {"workers", "amp", "compile", "device", "fsdp", "accumulate", "track"}
CHANGEABLE |= {"batch_size", "image_size", "ranks", "dataset_ratios"}
CHANGEABLE_ENDS = ("steps", "lr")


def go_on(folder: Path, given: dict, method: str, label_space: LabelSpace) -> dict | None:
    """Compares the settings `given` at this start with those saved in a run folder.

    Returns the new content of args.json, or None if the file stays as it is: no setting has
    changed, or a step is replayed. Raises InputError if a setting that is not CHANGEABLE has
    changed, or the names of the datasets or classes that were trained on.
    """
    saved = read_args(folder, method)
    changes = _differences(saved, given)
    refused = {
        name: values
        for name, values in changes.items()
        if name not in CHANGEABLE and not name.endswith(CHANGEABLE_ENDS)
    }
    if refused:
        listed = ", ".join(
            f"{_flag(name)} {old} is now {new}" for name, (old, new) in refused.items()
        )
        raise InputError(
            f"the training in {folder} has other settings: {listed}; give the same, or choose"
            " another --output"
        )
    _check_label_space(folder, label_space)
    steps = [checkpoint_step(path) for path in checkpoints(folder)]
    if not steps and not given["replay"]:
        log.info("%s has no checkpoint yet: the training starts again from nothing", folder)
    if not changes:
        return None
    listed = ", ".join(
        f"{_flag(name)} {new} instead of {old}" for name, (old, new) in changes.items()
    )
    if given["replay"]:
        log.info("%s is replayed with %s", folder, listed)
        return None
    log.info("%s goes on with %s; args.json keeps both", folder, listed)
    entry = {"after_step": max(steps, default=0), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    entry["changes"] = changes
    return saved | given | {"history": [*saved.get("history", []), entry]}


def _differences(saved: dict, given: dict) -> dict[str, list]:
    """Returns {setting: [old, new]} of the settings that differ, and of the number of ranks.

    A setting that `saved` lacks, since it was written before that flag existed, is not compared.
    """
    given = json.loads(json.dumps(given))  # tuples become lists, as they are in `saved`
    names = [name for name in given if name in saved]
    names = [n for n in names if n not in OF_A_START | {"method", "environment"}]
    found = {name: [saved[name], given[name]] for name in names if saved[name] != given[name]}
    ranks = [settings.get("environment", {}).get("ranks", 1) for settings in (saved, given)]
    return found | ({"ranks": ranks} if ranks[0] != ranks[1] else {})


def _flag(name: str) -> str:
    return name if name == "ranks" else flag(name)


def _check_label_space(folder: Path, label_space: LabelSpace) -> None:
    """Raises InputError if the newest sound checkpoint has other datasets or class names."""
    current = {v.dataset: list(v.names) for v in label_space.vocabularies.values()}
    for checkpoint in reversed(checkpoints(folder)):
        stored = stored_names(checkpoint / "weights.safetensors")
        if stored is None:  # damaged; `last_checkpoint` will log it
            continue
        if list(stored) != list(current):
            difference = f"was trained on {', '.join(stored)}, not on {', '.join(current)}"
        elif stored != current:
            name = next(name for name in current if current[name] != stored[name])
            difference = f"was trained on other class names of '{name}'"
        else:
            return
        raise InputError(
            f"{checkpoint} {difference}; give the same --datasets, or start another training with"
            f" --weights {folder} and another --output"
        )
