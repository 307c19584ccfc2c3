"""Weights and checkpoints: safetensors beside JSON metadata, written whole or not at all, loaded without unpickling."""

import errno
import json
import logging
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from common.distributed import gather_on_main, rank, world_size
from common.errors import InputError
from common.files import atomic_path
from common.labels import fold

log = logging.getLogger("concord")


def save_weights(path: Path, model: nn.Module, metadata: dict) -> None:
    """Parameters and persistent buffers as safetensors; `metadata` values are kept as JSON strings."""
    save_tensors(path, model.state_dict(), metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(
                tensors,
                temporary,
                metadata={key: json.dumps(value) for key, value in metadata.items()},
            )
            temporary.chmod(0o644)  # safetensors makes files for their owner alone
        except SafetensorError as error:
            raise OSError(errno.ENOSPC, str(error), str(path)) from None


def load_plain(path: Path):
    """The content of a torch file that holds nothing but data; no code in it runs.

    Raises ValueError with the reason in one line for a damaged file and for one that holds more.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files torch raises nearly everything
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from None


def weights_file(path: str | Path) -> Path:
    """The file itself, or weights.safetensors of a run folder. Raises InputError if there is none."""
    if not str(path):
        raise InputError(
            "--predict and --eval-only need --weights: a .safetensors file or a run folder"
        )
    file = Path(path) / "weights.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(
            f"weights {file} do not exist; give a .safetensors file or a run folder that holds one"
        )
    return file


def read_metadata(path: str | Path, method: str) -> dict:
    """What `save_weights` wrote beside the tensors. Raises InputError if it is not there, or of another method."""
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"weights {file} cannot be read ({error}); a .safetensors file is needed"
        ) from None
    if not {"method", "args", "vocabularies"} <= metadata.keys():
        raise InputError(
            f"weights {file} were not saved by this project: their metadata lacks the model's settings"
        )
    if metadata["method"] != method:
        raise InputError(
            f"weights {file} are not of {method}.py but of {metadata['method']}.py; use that"
        )
    lists = metadata["vocabularies"] if isinstance(metadata["vocabularies"], dict) else {"": None}
    known = lists or "base" in metadata  # a base knows no classes
    lists = [*lists.values(), metadata.get("boxed", [])]
    known = known and isinstance(metadata.get("width", 0), int)
    sound = known and all(
        isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists
    )
    if not (sound and isinstance(metadata["args"], dict)):
        raise InputError(
            f"weights {file} have damaged settings or class names; copy or train them again"
        )
    return metadata


def read_text(path: str | Path) -> Tensor:
    """(C, D) text embeddings of the label space that the weights were trained on. Raises InputError if it has none."""
    file = weights_file(path)
    with safe_open(file, framework="pt") as opened:
        if "text" not in opened.keys():  # noqa: SIM118 (not a dict)
            raise InputError(
                f"weights {file} hold no text embeddings of classes: only a training can start from them"
            )
        text = opened.get_tensor("text")
    if text.ndim != 2 or not text.is_floating_point():
        raise InputError(
            f"weights {file}: tensor 'text' is no table of text embeddings; copy or train them again"
        )
    return text.float()


def read_model(path: str | Path, method: str) -> tuple[dict, Tensor]:
    """`read_metadata` and `read_text`: what a model is rebuilt with. Raises InputError if they do not fit."""
    metadata, text = read_metadata(path, method), read_text(path)
    names = [fold(name) for names in metadata["vocabularies"].values() for name in names]
    if (
        not len(set(names)) <= len(text) <= len(names) + 1
    ):  # classes of the same name may be one; background has a row
        rows = f"{len(text)} text embeddings for {len(names)} classes"
        raise InputError(f"weights {path} have {rows}; copy or train them again")
    return metadata, text


def load_weights(path: str | Path, model: nn.Module, fresh: str = "", only: str = "") -> None:
    """Load safetensors into `model`, but for its buffer `text`: a model keeps the label space it was made with.

    Weights whose metadata has a `base` make up those parts of a model; its other parts stay as they were initialised.

    fresh: prefix of tensors that the file may lack; they stay as they were initialised, with a line in the log
    only:  prefix of the tensors to load; the others stay as they were initialised, whether the file has them or not

    Raises InputError if the file is missing or broken, lacks a tensor, has one too many, or one of another shape, or
    if it was trained with text embeddings of another width.
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            base = json.loads((opened.metadata() or {}).get("base", "[]"))
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"weights {file} cannot be read ({error}); a .safetensors file is needed"
        ) from None
    own = model.state_dict()
    if only:
        tensors = {key: t for key, t in tensors.items() if key.startswith(only)}
        tensors |= {key: t for key, t in own.items() if not key.startswith(only)}

    def optional(key: str) -> bool:
        return bool(fresh and key.startswith(fresh)) or bool(
            base and key.partition(".")[0] not in base
        )

    if new := {key: own[key] for key in own.keys() - tensors.keys() if optional(key)}:
        named = ", ".join(sorted({f"'{key[: key.find('.') + 1] or key}'" for key in new}))
        log.info(f"weights {file}: {len(new)} tensors of {named} are not in it and start anew")
        tensors |= new
    width, other = (
        state["text"].shape[-1] if "text" in state else None for state in (own, tensors)
    )
    if width and other and width != other:
        raise InputError(f"weights {file} were trained with text embeddings of {other} dimensions, these have {width}; "
                         "use the --text-encoder they were trained with")  # fmt: skip
    for key in sorted(own.keys() | tensors.keys()):
        if key not in own or key not in tensors:
            side = "unknown to" if key not in own else "missing for"
            raise InputError(
                f"weights {file}: tensor '{key}' is {side} this model; another --backbone or method?"
            )
        if own[key].shape != tensors[key].shape and key != "text":
            raise InputError(f"weights {file}: tensor '{key}' has the shape {list(tensors[key].shape)}, this model "
                             f"needs {list(own[key].shape)}; give the flags and datasets of its training")  # fmt: skip
        if own[key].is_floating_point() and not tensors[key].is_floating_point():
            raise InputError(
                f"weights {file}: tensor '{key}' is {tensors[key].dtype}, this model needs {own[key].dtype}"
            )
        if not torch.isfinite(tensors[key].float()).all():
            raise InputError(
                f"weights {file}: tensor '{key}' holds values that are not finite; train again"
            )
    model.load_state_dict(tensors | {key: own[key] for key in own if key == "text"})


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, metadata: dict
) -> None:
    """Write checkpoint-<step>/ whole or not at all, then drop all but two. Every rank calls it: each has its RNG."""
    states = gather_on_main(rng_states())
    if rank() > 0:
        return
    with atomic_path(folder / f"checkpoint-{step:07d}") as temporary:
        temporary.mkdir()
        save_weights(temporary / "weights.safetensors", model, metadata)
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": states}
        try:
            torch.save(state, temporary / "state.pt")
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.ENOSPC, str(error).splitlines()[0], str(folder)) from None
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def rng_states() -> list[Tensor]:
    return [torch.get_rng_state()] + (
        [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    )


def checkpoints(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder; its weights load with `load_weights`."""
    return checkpoints(folder)[-1] if checkpoints(folder) else None


def load_checkpoint(checkpoint: Path, optimizer: Optimizer) -> int:
    """Restore optimiser and this rank's RNG; returns the step."""
    try:
        state = load_plain(checkpoint / "state.pt")
        step = int(state["step"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            if any(
                isinstance(m, Tensor) and m.dim() and m.shape != parameter.shape
                for m in moments.values()
            ):
                raise ValueError("the optimiser's moments are of another model")
        if len(state["rng"]) == world_size():
            cpu, *cuda = state["rng"][rank()]
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state(cuda[0])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{checkpoint}/state.pt cannot be read ({reason[:99]}); delete {checkpoint} to go on from "
                         "the one before") from None  # fmt: skip
    log.info("resumed from %s", checkpoint)
    return step
