"""The mechanics around a training loop: command line, run folder, log."""

import dataclasses
import difflib
import json
import logging
import math
import multiprocessing
import os
import resource
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch.distributed as dist
import tyro
from tqdm import tqdm

from common.checkpoint import read_metadata
from common.convert import converted
from common.errors import InputError

log = logging.getLogger("concord")

POSITIVE = {
    "batch_size",
    "base_batch_size",
    "image_size",
    "test_size",
    "lr",
    "tau",
    "checkpoint_every",
}
POSITIVE |= {"classifier_lr", "rpn_proposals", "test_proposals", "fc_dim", "rois_per_image"}
POSITIVE |= {"image_label_proposals"}
NOT_NEGATIVE = {"classifier_steps", "alpha", "beta", "dynamic_classifier", "image_label_weight"}
NOT_NEGATIVE |= {
    "steps",
    "workers",
    "warmup_steps",
    "lam",
    "repeat_threshold",
    "seed",
    "score_threshold",
}
LIMITS = dict.fromkeys(NOT_NEGATIVE, (0, 2**31 - 1)) | dict.fromkeys(
    ("image_size", "test_size"), (16, 16384)
)
LIMITS |= {"channels": (1, 8192), "queries": (1, 10_000), "points": (1, 1_000_000)}
LIMITS |= dict.fromkeys(("encoder_layers", "decoder_layers"), (1, 100))
LIMITS |= {
    "gamma": (0, 10),
    "semantic_size": (16, 16384),
    "object_threshold": (0, 1),
    "context_tokens": (0, 64),
}
LIMITS |= {"backbone_factor": (0, 100)}

# -- command line ------------------------------------------------------------------------------------------------------


def parse_args(
    args_class: type,
    method: str,
    tiny: dict,
    model_fields: list[str],
    argv: list[str] | None = None,
):
    """The dataclass as flags. Flags win over what the run is to repeat, that over --tiny, that over the defaults.

    tiny:         the defaults under --tiny
    model_fields: what --weights brings along, so that a model is rebuilt as it was trained; --resume brings everything

    Raises InputError for a flag that does not exist, with the nearest one; tyro itself reports a value that does not
    fit, also with exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv

    def parse(default):
        return tyro.cli(args_class, args=argv, default=default, return_unknown_args=True)

    default = args_class(tiny=True, **tiny) if "--tiny" in argv else args_class()
    args, unknown = parse(default)
    if unknown:
        flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(args_class)]
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise InputError(f"unknown argument '{unknown[0]}'; {hint}")
    if args.resume:
        repeated = vars(default).keys() - {"resume", "output", "eval_only", "predict"}
        args, _ = parse(
            with_saved(default, read_args(Path(args.resume) / "args.json", method), repeated)
        )
    elif args.weights:
        weights = args.weights
        if Path(weights).is_file() and Path(weights).suffix != ".safetensors":
            weights = str(converted(weights, method))
        args, _ = parse(with_saved(default, read_metadata(weights, method)["args"], model_fields))
        args.weights = weights
    check_numbers(args)
    args.workers = min(args.workers, os.cpu_count() or 1)
    return args


def with_saved(default, saved: dict, names):
    """`default` with the saved values of the fields `names`; json has lists where the dataclass has tuples."""
    values = {
        name: tuple(v) if isinstance(v := saved[name], list) else v
        for name in names
        if name in saved
    }
    hints = get_type_hints(type(default))
    for name, value in values.items():
        kinds = (
            (int, float)
            if isinstance(getattr(default, name), float)
            else type(getattr(default, name))
        )
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else [value]
        if not isinstance(value, kinds) or value not in choices:
            raise InputError(
                f"the saved setting {name} is {value!r}, which does not fit; is the file damaged?"
            )
    return dataclasses.replace(default, **values)


def check_numbers(args) -> None:
    """Raises InputError for a number that no run can have."""
    for name, value in vars(args).items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        flag = f"--{name.replace('_', '-')} {shown}"
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag} must be a finite number")
        if name in POSITIVE and value <= 0:
            raise InputError(f"{flag} must be greater than 0")
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if name in LIMITS and not low <= value <= high:
            raise InputError(f"{flag} must be between {low} and {high}")
        if name.endswith("jitter") and not 0 < value[0] <= value[1] <= 100:
            raise InputError(f"{flag} must be a range above 0, smaller number first")
    if args.batch_size % (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(
            f"--batch-size {args.batch_size} is not a multiple of the {ranks} ranks; make it one"
        )


def per_dataset(
    flag: str, text: str, datasets: list, default: int, **special: int
) -> dict[str, int]:
    """{dataset: value} of a flag like "coco=1,in21k=4"; what it does not name has the default of its supervision.

    special: the defaults of some kinds of supervision, such as image_labels=4

    Raises InputError for a name that is not among `datasets` and a value that is no number greater than 0.
    """
    values = {d.name: special.get(d.supervision, default) for d in datasets}
    for entry in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in entry.partition("="))
        if name not in values:
            raise InputError(
                f"{flag} {entry}: no dataset '{name}' is trained on; there are {', '.join(values)}"
            )
        if not (value.isdecimal() and 0 < int(value) <= 16384):
            raise InputError(f"{flag} {entry}: write NAME=NUMBER (1 to 16384), separated by commas")
        values[name] = int(value)
    return values


def read_args(path: Path, method: str) -> dict:
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--resume: {path} cannot be read ({error}); name the run folder of a training"
        ) from None
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise InputError(
            f"--resume: {path} is not of a {method} training; name the run folder of one"
        )
    return saved


def close_bars() -> None:
    """So that a message does not stand on the line of a living bar."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


def fail(line: str) -> None:
    """Print one line and end with exit code 2."""
    close_bars()
    print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(2)  # other ranks may wait in a collective: do not join them
    sys.exit(2)


def run_command(main) -> None:
    """Call `main()`; bad input ends with one line and exit code 2, an interrupt with 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (hard, hard)
    )  # every tensor from a data loading process needs a file
    if (
        sys.platform == "linux"
    ):  # Python 3.14's default would give every worker a copy of the mapped annotations
        multiprocessing.set_start_method("fork", force=True)
    try:
        main()
    except InputError as error:
        # a DataLoader worker hands its exception over as a whole traceback; the message is its last line
        fail(str(error).strip().splitlines()[-1].removeprefix("common.errors.InputError: "))
    except OSError as error:  # a full disk, a read-only folder, a name that is too long
        if error.errno is None:
            raise
        place = error.filename or "writing"
        fail(
            f"{place}: {error.strerror}; see to the disk or folder, or choose another --output or CONCORD_CACHE"
        )
    except KeyboardInterrupt:
        close_bars()
        print(
            "interrupted; --resume RUN_FOLDER goes on from its last checkpoint, if there is one",
            file=sys.stderr,
        )
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
