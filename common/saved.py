"""Reads the settings that a training saved, from its run folder or its weights file.

No module that it imports needs torch, whose import takes seconds.
"""

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import InputError
from common.files import refuse_pipe

# settings of one start alone: the next start neither repeats nor compares them
WEIGHTS = "weights.safetensors"  # in a run folder, and in a repository of the hub
OF_A_START = {"resume", "output", "eval_only", "predict", "replay"}


def read_args(folder: Path, method: str) -> dict:
    """Returns the content of args.json. Raises InputError if it is broken or of another method."""
    path = folder / "args.json"
    refuse_pipe(path, "the settings")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); mend it, or name another run folder"
        ) from None
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise InputError(f"{path} is not of a {method} training; name another run folder")
    for name, kind in (("environment", dict), ("history", list)):
        if not isinstance(saved.get(name, kind()), kind):
            raise InputError(f"{path}: {name} is damaged; remove it from the file")
    return saved


def is_on_hub(path: str | Path) -> bool:
    """Returns whether weights are those of hf://owner/name, on the Hugging Face hub."""
    return str(path).startswith("hf://")


def hub_address(address: str) -> tuple[str, str | None]:
    """Splits hf://owner/name[@revision] into owner/name and revision. Raises InputError."""
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address, re.ASCII)
    if not found:
        raise InputError(f"--weights {address}: write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return found[1], found[2]


def weights_file(path: str | Path) -> Path:
    """Returns `path`, or weights.safetensors in a run folder. Raises InputError without one."""
    if not str(path):
        raise InputError(
            "--predict and --eval-only need --weights: a .safetensors file or a run folder"
        )
    file = Path(path) / WEIGHTS if os.path.isdir(path) else Path(path)
    if not os.path.isfile(file):
        raise InputError(
            f"weights {file} do not exist; give a .safetensors file or a run folder that holds one"
        )
    return file


def weights_files(path: str | Path) -> list[Path]:
    """Returns the `weights_file` of a path, or of each of several official checkpoints, by commas.

    Raises InputError for a file that is missing.
    """
    paths = [path] if os.path.exists(path) else str(path).split(",")
    return [weights_file(Path(part).expanduser() if part else part) for part in paths]


def own_weights(path: str | Path) -> Path | None:
    """Returns the safetensors file of these weights, or None for official checkpoints.

    path: as in `weights_files`, or hf://owner/name[@revision], which is downloaded
    Raises InputError for a file that is missing.
    """
    if is_on_hub(path):
        from common.hub import download

        return download(str(path))
    first, *others = weights_files(path)
    return first if first.suffix == ".safetensors" and not others else None


def read_metadata(path: str | Path, method: str = "") -> dict:
    """Reads the metadata of a weights file: method, args, vocabularies, and the method's own keys.

    "file" is the path of the file. Without a `method`, the weights may be of any. The key "fits"
    lists further methods whose network is the same.
    Raises InputError if the file is missing or cannot be read, or if another method, an older
    version or another program wrote it.
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="np") as opened:
            metadata = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
            old = "text" in opened.keys()  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"weights {file} cannot be read ({error}); a .safetensors file is needed"
        ) from None
    if not {"method", "args", "vocabularies"} <= metadata.keys():
        raise InputError(
            f"weights {file} were not saved by this project: their metadata lacks the settings of"
            " the model"
        )
    if method and method not in (metadata["method"], *metadata.get("fits", ())):
        raise InputError(
            f"weights {file} are not of {method}.py but of {metadata['method']!s:.60}.py; use that"
        )
    if old:
        raise InputError(
            f"weights {file} are of an older version, which kept the label space inside the model;"
            " train them again, or use that version"
        )
    if not isinstance(metadata["args"], dict) or not isinstance(metadata["vocabularies"], dict):
        raise InputError(f"weights {file} have damaged settings; copy or train them again")
    return metadata | {"file": str(file)}
