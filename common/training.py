"""The mechanics around a training loop: command line, devices, ranks, run folder, log, schedule, checkpoints."""

import contextlib
import dataclasses
import difflib
import errno
import json
import logging
import math
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from common.errors import InputError
from common.paths import atomic_path

log = logging.getLogger("concord")

POSITIVE = {"batch_size", "base_batch_size", "image_size", "test_size", "lr", "tau", "checkpoint_every"}
POSITIVE |= {"channels", "fc_dim", "rois_per_image"}
NOT_NEGATIVE = {"steps", "workers", "warmup_steps", "lam", "repeat_threshold", "seed", "score_threshold"}

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
        args, _ = parse(with_saved(default, read_metadata(args.weights, method)["args"], model_fields))
    check_numbers(args)
    args.workers = min(args.workers, os.cpu_count() or 1)
    return args


def with_saved(default, saved: dict, names):
    """`default` with the saved values of the fields `names`; json has lists where the dataclass has tuples."""
    values = {name: tuple(v) if isinstance(v := saved[name], list) else v for name in names if name in saved}
    for name, value in values.items():
        kinds = (int, float) if isinstance(getattr(default, name), float) else type(getattr(default, name))
        if not isinstance(value, kinds):
            raise InputError(f"the saved setting {name} is {value!r}, which does not fit; is the file damaged?")
    return dataclasses.replace(default, **values)


def check_numbers(args) -> None:
    """Raises InputError for a number that no run can have."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag} must be a finite number")
        if name in POSITIVE and value <= 0:
            raise InputError(f"{flag} must be greater than 0")
        if name in NOT_NEGATIVE and not 0 <= value < 2**31:
            raise InputError(f"{flag} must be between 0 and 2^31")
    if hasattr(args, "jitter") and not 0 < args.jitter[0] <= args.jitter[1] <= 100:
        raise InputError(f"--jitter {args.jitter[0]} {args.jitter[1]} must be a range above 0, smaller number first")
    if args.batch_size % (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of the {ranks} ranks; make it one")


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


# -- devices and ranks -------------------------------------------------------------------------------------------------


def setup_device(device: str, seed: int) -> torch.device:
    """Join the process group if torchrun started us, pick the device, seed every generator."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device here; use --device cpu")
    if "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        # the other ranks wait while rank 0 scores a large dataset
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    try:
        torch.zeros((), device=device).item()
    except RuntimeError:
        raise InputError(f"--device {device} cannot be used here; use cpu or cuda") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default
    torch.manual_seed(seed + rank())
    if rank() > 0:
        log.setLevel(logging.ERROR)
    return torch.device(device)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The scalar averaged over all ranks; itself in a single process. Not differentiable."""
    value = value.detach()
    if world_size() > 1:
        dist.all_reduce(value := value.clone())
    return value / world_size()


def from_main(value):
    """Rank 0's value, on every rank."""
    if world_size() > 1:
        dist.broadcast_object_list(box := [value])
        return box[0]
    return value


def gather_on_main(value) -> list:
    """The objects of all ranks, in rank order; only rank 0 may use the result."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []


def amp_context(amp: str, device: torch.device):
    """`auto` is bfloat16 on CUDA and float32 elsewhere; `on` forces bfloat16, `off` float32."""
    enabled = amp == "on" or (amp == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def should_compile(choice: str, device: torch.device) -> bool:
    """`auto` compiles on CUDA only: on a CPU compiling takes longer than a short run saves."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


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

    def __init__(self, folder: Path, steps: int, batch_size: int, start: int, every: int = 20):
        self.every, self.batch_size, self.active = every, batch_size, rank() == 0
        if not self.active:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic_path(path) as temporary:  # a resumed run writes the steps after its checkpoint again
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
        self.file = path.open("a")
        self.board = tensorboard_writer(folder)
        self.bar = progress_bar("train", steps * batch_size, start * batch_size)

    def step(self, step: int, losses: dict[str, Tensor], lr: float) -> None:
        """Count one step; every `every` steps write its losses."""
        if not self.active:
            return
        self.bar.update(self.batch_size)
        if step % self.every and step != self.bar.total // self.batch_size:
            return
        values = {name: round(float(value), 6) for name, value in losses.items()}
        self.bar.set_postfix({"loss": f"{values['loss']:.3f}", "lr": f"{lr:.1e}"}, refresh=False)
        shown = self.bar.format_dict
        rate = shown["rate"] or (shown["n"] - shown["initial"]) / max(shown["elapsed"], 1e-9)
        self.write({"step": step, **values, "lr": lr, "img_per_s": round(rate, 2)})

    def write(self, record: dict) -> None:
        if not self.active:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, record.get("step", 0))

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()


def progress_bar(title: str, total: int, initial: int = 0) -> tqdm:
    """A bar of images with img/s and time left; alive in a terminal, a line now and then in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(desc=title, total=total, initial=initial, unit="img", mininterval=interval, disable=rank() > 0)


def tensorboard_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed (pip install tensorboard); metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(folder)


# -- optimisation ------------------------------------------------------------------------------------------------------


def learning_rate(step: int, base: float, steps: int, warmup: int, warmup_factor: float) -> float:
    """Linear warmup from `warmup_factor`, then half a cosine to 0 (facebookresearch/Detic:detic/custom_solver.py)."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    ramp = warmup_factor + (1 - warmup_factor) * min(1.0, step / warmup) if warmup else 1.0
    return base * cosine * ramp


def check_finite(losses: dict[str, Tensor], step: int) -> None:
    """Stop at the first loss that is not finite and name it."""
    if math.isfinite(float(losses["loss"])):
        return
    bad = [name for name, value in losses.items() if name != "loss" and not math.isfinite(float(value))]
    raise InputError(f"step {step}: {', '.join(bad) or 'loss'} is not finite; lower --lr or turn --amp off")


# -- weights and checkpoints -------------------------------------------------------------------------------------------


def save_weights(path: Path, model: nn.Module, metadata: dict) -> None:
    """Parameters and persistent buffers as safetensors; `metadata` values are kept as JSON strings."""
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})
        except SafetensorError as error:
            raise OSError(errno.ENOSPC, str(error), str(path)) from None


def weights_file(path: str | Path) -> Path:
    """The file itself, or weights.safetensors of a run folder. Raises InputError if there is none."""
    if not str(path):
        raise InputError("--predict and --eval-only need --weights: a .safetensors file or a run folder")
    file = Path(path) / "weights.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"weights {file} do not exist; give a .safetensors file or a run folder that holds one")
    return file


def read_metadata(path: str | Path, method: str) -> dict:
    """What `save_weights` wrote beside the tensors. Raises InputError if it is not there, or of another method."""
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"weights {file} cannot be read ({error}); a .safetensors file is needed") from None
    if not {"method", "args", "vocabularies"} <= metadata.keys():
        raise InputError(f"weights {file} were not saved by this project: their metadata lacks the model's settings")
    if metadata["method"] != method or not (isinstance(metadata["args"], dict) and metadata["vocabularies"]):
        raise InputError(f"weights {file} are not of {method}.py but of {metadata['method']}.py, or damaged")
    return metadata


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Load safetensors into `model`.

    Raises InputError if the file is missing or broken, lacks a tensor, has one too many, or one of another shape.
    """
    file = weights_file(path)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {file} cannot be read ({error}); a .safetensors file is needed") from None
    own = model.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        if key not in own or key not in tensors:
            side = "unknown to" if key not in own else "missing for"
            raise InputError(f"weights {file}: tensor '{key}' is {side} this model; another --backbone or method?")
        if own[key].shape != tensors[key].shape:
            raise InputError(f"weights {file}: tensor '{key}' has the shape {list(tensors[key].shape)}, this model "
                             f"needs {list(own[key].shape)}; give the flags they were trained with")  # fmt: skip
        if not torch.isfinite(tensors[key].float()).all():
            raise InputError(f"weights {file}: tensor '{key}' holds values that are not finite; train again")
    model.load_state_dict(tensors)


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, metadata: dict) -> None:
    """Write checkpoint-<step>/ whole or not at all, then drop all but two. Every rank calls it: each has its RNG."""
    states = gather_on_main(rng_states())
    if rank() > 0:
        return
    with atomic_path(folder / f"checkpoint-{step:07d}") as temporary:
        temporary.mkdir()
        save_weights(temporary / "weights.safetensors", model, metadata)
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": states}
        torch.save(state, temporary / "state.pt")
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def rng_states() -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder; its weights load with `load_weights`."""
    return checkpoints(folder)[-1] if checkpoints(folder) else None


def load_checkpoint(checkpoint: Path, optimizer: Optimizer) -> int:
    """Restore optimiser and this rank's RNG; returns the step."""
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if len(state["rng"]) == world_size():
            cpu, *cuda = state["rng"][rank()]
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state(cuda[0])
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{checkpoint}/state.pt cannot be read ({reason[:99]}); delete {checkpoint} to go on from "
                         "the one before") from None  # fmt: skip
    log.info("resumed from %s", checkpoint)
    return state["step"]
