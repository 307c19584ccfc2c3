"""The mechanics around a training loop: command line, run folder, log."""

import contextlib
import dataclasses
import difflib
import fcntl
import json
import logging
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import checkpoints, read_metadata
from common.convert import converted
from common.distributed import from_main, rank, world_size
from common.errors import InputError
from common.paths import atomic_path

log = logging.getLogger("concord")

POSITIVE = {"batch_size", "base_batch_size", "image_size", "test_size", "lr", "tau", "checkpoint_every"}
POSITIVE |= {"classifier_lr", "rpn_proposals", "test_proposals", "fc_dim", "rois_per_image"}
POSITIVE |= {"image_label_proposals"}
NOT_NEGATIVE = {"classifier_steps", "alpha", "beta", "dynamic_classifier", "image_label_weight"}
NOT_NEGATIVE |= {"steps", "workers", "warmup_steps", "lam", "repeat_threshold", "seed", "score_threshold"}
LIMITS = dict.fromkeys(NOT_NEGATIVE, (0, 2**31 - 1)) | dict.fromkeys(("image_size", "test_size"), (16, 16384))
LIMITS |= {"channels": (1, 8192), "queries": (1, 10_000), "points": (1, 1_000_000)}
LIMITS |= dict.fromkeys(("encoder_layers", "decoder_layers"), (1, 100))
LIMITS |= {"gamma": (0, 10), "semantic_size": (16, 16384), "object_threshold": (0, 1), "context_tokens": (0, 64)}
LIMITS |= {"backbone_factor": (0, 100)}

# -- command line ------------------------------------------------------------------------------------------------------


def parse_args(args_class: type, method: str, tiny: dict, model_fields: list[str], argv: list[str] | None = None):
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
        args, _ = parse(with_saved(default, read_args(Path(args.resume) / "args.json", method), repeated))
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
    values = {name: tuple(v) if isinstance(v := saved[name], list) else v for name in names if name in saved}
    hints = get_type_hints(type(default))
    for name, value in values.items():
        kinds = (int, float) if isinstance(getattr(default, name), float) else type(getattr(default, name))
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else [value]
        if not isinstance(value, kinds) or value not in choices:
            raise InputError(f"the saved setting {name} is {value!r}, which does not fit; is the file damaged?")
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
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of the {ranks} ranks; make it one")


def per_dataset(flag: str, text: str, datasets: list, default: int, **special: int) -> dict[str, int]:
    """{dataset: value} of a flag like "coco=1,in21k=4"; what it does not name has the default of its supervision.

    special: the defaults of some kinds of supervision, such as image_labels=4

    Raises InputError for a name that is not among `datasets` and a value that is no number greater than 0.
    """
    values = {d.name: special.get(d.supervision, default) for d in datasets}
    for entry in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in entry.partition("="))
        if name not in values:
            raise InputError(f"{flag} {entry}: no dataset '{name}' is trained on; there are {', '.join(values)}")
        if not (value.isdecimal() and 0 < int(value) <= 16384):
            raise InputError(f"{flag} {entry}: write NAME=NUMBER (1 to 16384), separated by commas")
        values[name] = int(value)
    return values


def read_args(path: Path, method: str) -> dict:
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {path} cannot be read ({error}); name the run folder of a training") from None
    if not isinstance(saved, dict) or saved.get("method") != method:
        raise InputError(f"--resume: {path} is not of a {method} training; name the run folder of one")
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
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every tensor from a data loading process needs a file
    if sys.platform == "linux":  # Python 3.14's default would give every worker a copy of the mapped annotations
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
        fail(f"{place}: {error.strerror}; see to the disk or folder, or choose another --output or CONCORD_CACHE")
    except KeyboardInterrupt:
        close_bars()
        print("interrupted; --resume RUN_FOLDER goes on from its last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# -- run folder and log ------------------------------------------------------------------------------------------------


def make_run_folder(args, method: str) -> Path:
    """`--resume FOLDER`, `--output FOLDER` or runs/<method>-<time>, the same on all ranks; args.json is written to it.

    Raises InputError if the folder cannot be written.
    """
    name = args.resume or args.output or f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(from_main(name))
    if args.resume and not (args.eval_only or args.predict or checkpoints(folder)):
        raise InputError(f"--resume {folder} holds no checkpoint yet; start again with another --output")
    if (folder / "metrics.jsonl").exists() and not (args.resume or args.eval_only or args.predict):
        raise InputError(f"run folder {folder} already holds a training; --resume it or choose another --output")
    record = dataclasses.asdict(args) | {"method": method, "environment": environment()}
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "args.json").exists():  # those of the training stay: --resume repeats them
                with atomic_path(folder / "args.json") as path:
                    path.write_text(json.dumps(record, indent=1))
        except OSError as error:
            raise InputError(
                f"run folder {folder} cannot be written ({error.strerror}); choose another --output"
            ) from None
    return folder


def environment() -> dict[str, str | int]:
    """Versions and revision of this run, so that it can be repeated."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "revision": revision or "unknown",
        "ranks": world_size(),
    }


class RunLog:
    """metrics.jsonl, TensorBoard (if installed) and a progress bar with loss, img/s and time left; rank 0 only."""

    def __init__(self, folder: Path, steps: int, start: int, every: int = 20):
        self.every, self.active = every, rank() == 0
        if not self.active:
            return
        self.lock = (folder / "args.json").open("a")  # held until the training ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is training in {folder}; choose another --output") from None
        path = folder / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        written = [step_of(line) for line in lines]
        if damaged := written.count(None):
            log.warning("%s: %d damaged lines are dropped", path, damaged)
        kept = [line for line, step in zip(lines, written) if step is not None and step <= start]
        with atomic_path(path) as temporary:  # a resumed run writes the steps after its checkpoint again
            temporary.write_text("".join(kept))
        self.file = path.open("a")
        self.board = tensorboard_writer(folder)
        self.bar = progress_bar("train", steps, start, "step")
        self.images, self.since = 0, time.perf_counter()

    def step(self, step: int, losses: dict[str, Tensor], lr: float, images: int, dataset: str = "") -> None:
        """Count one step of so many images; every `every` steps write its losses and the images per second.

        dataset: of a step that is of one alone; losses of different datasets are not comparable and get own curves
        """
        if not self.active:
            return
        self.bar.update()
        self.images += images
        if step % self.every and step != self.bar.total:
            return
        now = time.perf_counter()
        rate, self.images, self.since = self.images / (now - self.since), 0, now
        values = {name: round(float(value), 6) for name, value in losses.items()}
        shown = {"loss": f"{values['loss']:.3f}", "lr": f"{lr:.1e}", "img/s": f"{rate:.1f}"}
        self.bar.set_postfix(shown, refresh=False)
        of = {"dataset": dataset} if dataset else {}
        self.write({"step": step, **of, **values, "lr": lr, "img_per_s": round(rate, 2)})

    def write(self, record: dict) -> None:
        if not self.active:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            folder = f"{record['dataset']}/" if "dataset" in record else ""
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(folder + name, value, record.get("step", 0))

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self.lock.close()
            if self.board:
                self.board.close()


def step_of(line: str) -> int | None:
    """The step of a line of metrics.jsonl; None if it is damaged, as a killed run may leave its last."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def progress_bar(title: str, total: int, initial: int = 0, unit: str = "img") -> tqdm:
    """A bar with rate and time left; alive in a terminal, a line now and then in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(desc=title, total=total, initial=initial, unit=unit, mininterval=interval, disable=rank() > 0)


def tensorboard_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed (pip install tensorboard); metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(folder)


def check_finite(losses: dict[str, Tensor], step: int) -> None:
    """Stop at the first loss that is not finite and name it."""
    if math.isfinite(float(losses["loss"])):
        return
    bad = [name for name, value in losses.items() if name != "loss" and not math.isfinite(float(value))]
    raise InputError(f"step {step}: {', '.join(bad) or 'loss'} is not finite; lower --lr or turn --amp off")
