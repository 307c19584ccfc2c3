"""Writes and reads weights, which are safetensors with JSON metadata, and checkpoints.

Files are written whole or not at all, and loaded without unpickling code.
"""

import errno
import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from common.distributed import from_main, on_main, rank, ranks_without, world_size
from common.errors import InputError
from common.files import atomic_path, cache_dir, file_digest, temporary_path
from common.fsdp import join_state, split_state, write_shards
from common.labels import LabelSpace, Vocabulary
from common.saved import read_metadata, weights_file

log = logging.getLogger("concord")

TEXT = "label_space."  # prefix of the tensors that hold the text of a dataset
# what json of another form raises when it is read
BROKEN = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
FULL_DISK = re.compile("inline_container|PytorchStreamWriter")  # what torch makes of it
SUMS = "checksums.json"  # of a checkpoint: its step, and the SHA-256 of its files
PARTS = ("weights.safetensors", "state.pt")  # these files
SHARDS = "optimizer"  # and, with --fsdp, the files of this folder


def save_weights(path: Path, model: nn.Module, label_space: LabelSpace, metadata: dict) -> None:
    """Writes a model and the label space that it was trained on as one safetensors file.

    Only rank 0 writes. The tensors are the model's state dict and "label_space.<dataset>", the text
    embeddings of each dataset. The class names are added to the metadata, as "vocabularies". Its
    values become JSON.
    """
    if rank() > 0:
        return
    vocabularies = label_space.vocabularies.values()
    text = {TEXT + v.dataset: v.text for v in vocabularies if v.text is not None}
    names = {v.dataset: {"names": v.names, "is_thing": v.is_thing} for v in vocabularies}
    save_tensors(path, model.state_dict() | text, metadata | {"vocabularies": names})


def copy_weights(source: Path, target: Path, about: dict) -> None:
    """Copies a weights file, with `about` added to its metadata. Raises OSError."""
    with safe_open(source, framework="pt") as opened:
        metadata = {key: json.loads(value) for key, value in opened.metadata().items()}
    save_tensors(target, load_file(source), metadata | about)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Writes tensors and JSON metadata as safetensors. Raises OSError if the disk is full."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    with atomic_path(path, durable=True) as temporary:
        try:
            save_file(
                tensors,
                temporary,
                metadata={key: json.dumps(value) for key, value in metadata.items()},
            )
            temporary.chmod(0o644)  # safetensors makes files for their owner alone
        except SafetensorError as error:
            raise OSError(errno.ENOSPC, str(error), str(path)) from None


def load_plain(path: Path) -> Any:
    """Loads a torch file of tensors and plain Python data to the CPU. No code in it runs.

    Raises ValueError, with the reason in one line, for a damaged file and for other objects in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files torch raises nearly everything
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from None


def read_model(path: str | Path, method: str) -> tuple[dict, list[Vocabulary]]:
    """Reads what a model is rebuilt from: (metadata, vocabularies with their text embeddings).

    Raises InputError as `read_metadata` does, for converted weights of a base model (they have no
    vocabularies), and for damaged class names or text.
    """
    file = weights_file(path)
    metadata = read_metadata(file, method)
    if not metadata["vocabularies"]:
        raise InputError(
            f"weights {file} are those of a base model without classes: only a training can start"
            " from them"
        )
    with safe_open(file, framework="pt") as opened:
        keys = [key for key in opened.keys() if key.startswith(TEXT)]  # noqa: SIM118 (not a dict)
        stored = {key: opened.get_tensor(key) for key in keys}

    def embed(names: tuple[str, ...], dataset: str) -> Tensor:
        text = stored[TEXT + dataset]
        if not text.is_floating_point() or not torch.isfinite(text).all():
            raise TypeError(f"the text of '{dataset}' has values that are no finite numbers")
        return text.float()

    vocabularies = []
    try:
        for dataset, record in metadata["vocabularies"].items():
            is_thing = record.get("is_thing")
            vocabulary = Vocabulary(
                dataset,
                tuple(name.strip() for name in record["names"]),
                is_thing=tuple(map(bool, is_thing)) if is_thing else None,
            )
            vocabularies.append(vocabulary.with_text(embed) if stored else vocabulary)
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(
            f"weights {file} have damaged class names or text ({error}); copy or train them again"
        ) from None
    return metadata, vocabularies


def check_datasets(weights: str | Path, method: str, names: list[str]) -> None:
    """Raises InputError unless weights have the layers of these datasets, in this order."""
    _, stored = read_model(weights, method)
    known = [vocabulary.dataset for vocabulary in stored]
    if known != names:
        raise InputError(
            f"weights {weights} have layers of their own for {','.join(known)}, in this order; they"
            f" cannot go on with --datasets {','.join(names)}"
        )


def load_weights(
    path: str | Path,
    model: nn.Module,
    fresh: tuple[str, ...] = (),
    only: str = "",
    base: bool = False,
) -> None:
    """Loads the tensors of a weights file into `model`, in place. Leaves out its label space.

    fresh: prefixes of tensors that the file may lack; the log says that they keep initial values
    only:  prefix of the tensors to load; all others keep their initial values
    base:  of converted weights, only the submodules that their metadata lists as `base` are loaded;
           the log says which others keep their initial values

    Raises InputError if the file is missing or broken, lacks a tensor or has one too many, and for
    a tensor that `check_tensor` refuses.
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            modules = json.loads((opened.metadata() or {}).get("base", "[]")) if base else []
        if not isinstance(modules, list):
            raise ValueError("its base is no list of modules")
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"weights {file} cannot be read ({error}); a .safetensors file is needed"
        ) from None
    tensors = {key: t for key, t in tensors.items() if not key.startswith(TEXT)}
    own = model.state_dict()
    if only:
        tensors = {key: t for key, t in tensors.items() if key.startswith(only)}
        tensors |= {key: t for key, t in own.items() if not key.startswith(only)}
    if modules:
        tensors = {key: t for key, t in tensors.items() if key.partition(".")[0] in modules}

    new = set()
    for key in own.keys() - tensors.keys():
        in_base = not modules or key.partition(".")[0] in modules
        if key.startswith(fresh) or not in_base:
            new.add(key)
            tensors[key] = own[key]
    if new:
        parts = sorted({f"'{key[: key.find('.') + 1] or key}'" for key in new})
        log.info(
            "weights %s: %d tensors of %s are not in it and start anew",
            file,
            len(new),
            ", ".join(parts),
        )
    for key in sorted(own.keys() | tensors.keys()):
        check_tensor(file, key, own.get(key), tensors.get(key))
    model.load_state_dict(tensors)


def check_tensor(file: Path, key: str, own: Tensor | None, stored: Tensor | None) -> None:
    """Raises InputError if tensor `key` of the file does not fit the model or is not finite.

    own, stored: the tensor of the model and of the file; None if there is none
    """
    if own is None or stored is None:
        side = "unknown to" if own is None else "missing for"
        raise InputError(
            f"weights {file}: tensor '{key}' is {side} this model; another --backbone, other"
            " datasets or another method?"
        )
    if own.shape != stored.shape:
        raise InputError(
            f"weights {file}: tensor '{key}' has the shape {list(stored.shape)}, this model needs"
            f" {list(own.shape)}; give the flags (--text-encoder, ...) and datasets of its training"
        )
    lacks_fractions = own.is_floating_point() and not stored.is_floating_point()
    if lacks_fractions or stored.is_complex():
        raise InputError(
            f"weights {file}: tensor '{key}' is {stored.dtype}, this model needs {own.dtype}"
        )
    if not torch.isfinite(stored.float()).all():
        raise InputError(
            f"weights {file}: tensor '{key}' holds values that are not finite; train again"
        )


def save_checkpoint(
    folder: Path,
    step: int,
    rng: list[list[Tensor]],
    model: nn.Module,
    label_space: LabelSpace,
    optimizer: Optimizer,
    metadata: dict,
    keep: int,
) -> None:
    """Writes checkpoint-<step>/ whole or not at all, then removes all but the last `keep`.

    The folder has the weights, the state of the optimizer, `rng` (the random states of the ranks)
    and a checksum of each file. Only rank 0 calls it. With --fsdp every rank does, within `whole`:
    what is sharded of the optimizer's state is written by all, before rank 0 writes the rest.
    Raises OSError if the disk is full.
    """
    path = folder / f"checkpoint-{step:07d}"
    moments, sharded = split_state(optimizer.state_dict())
    if sharded:
        shards = from_main(temporary_path(folder / SHARDS))
        try:
            write_shards(shards, sharded)
        except OSError:
            shutil.rmtree(shards, ignore_errors=True)
            raise
        if rank() > 0:
            return
    with atomic_path(path, durable=True) as temporary:
        temporary.mkdir()
        if sharded:
            shards.rename(temporary / SHARDS)
        weights = temporary / "weights.safetensors"
        save_weights(weights, model, label_space, metadata | {"step": step})
        state = {"step": step, "optimizer": moments, "rng": rng}
        try:
            torch.save(state | {"ranks": world_size()}, temporary / "state.pt")
        except RuntimeError as error:
            if not FULL_DISK.search(str(error)):
                raise
            reason = "a checkpoint cannot be written, as on a full disk"
            raise OSError(errno.ENOSPC, reason, str(folder)) from None
        files = [file for file in temporary.rglob("*") if file.is_file()]
        digests = {str(file.relative_to(temporary)): file_digest(file) for file in files}
        (temporary / SUMS).write_text(json.dumps({"step": step, "files": digests}))
        shutil.rmtree(path, ignore_errors=True)  # a rename does not replace a folder
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def rng_states() -> list[Tensor]:
    """Returns the random states of this process: of the CPU and of the GPU that it uses, if any."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    elif torch.backends.mps.is_available():
        states.append(torch.mps.get_rng_state())
    return states


def set_rng_states(states: list[Tensor]) -> None:
    """Restores `rng_states` as far as this process has the devices that they are of."""
    cpu, *gpu = states
    torch.set_rng_state(cpu)
    if gpu and torch.cuda.is_available():
        torch.cuda.set_rng_state(gpu[0])
    elif gpu and torch.backends.mps.is_available():
        torch.mps.set_rng_state(gpu[0])


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run folder, the oldest first."""
    found = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted(path for path, step in found.items() if step.isascii() and step.isdigit())


def last_checkpoint(folder: Path, before: int = 0, after: int = 0) -> Path | None:
    """Returns the newest sound checkpoint of a run folder; its weights load with `load_weights`.

    Newer ones that are damaged are renamed to damaged-<name>, each with a line. Every rank calls
    it. Raises InputError if there are checkpoints and none is sound.

    before: a step; only checkpoints of earlier ones count. 0: all
    after:  a step; only checkpoints of later ones count
    """
    checkpoint = on_main(_last_sound, folder, before, after)
    if checkpoint and (blind := ranks_without(checkpoint / SUMS)):
        raise InputError(
            f"the ranks {', '.join(map(str, blind))} have no {checkpoint}, from which rank 0 goes"
            " on; copy the run folder to their machines, or share its disk"
        )
    return checkpoint


def _last_sound(folder: Path, before: int, after: int) -> Path | None:
    paths = [path for path in checkpoints(folder) if checkpoint_step(path) > after]
    paths = [path for path in paths if not before or checkpoint_step(path) < before]
    damaged = {}
    for path in reversed(paths):
        damaged[path] = damage(path)
        if not damaged[path]:
            break
    else:
        if not damaged:
            return None
        found = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise InputError(
            f"no checkpoint of {folder} is sound ({found}); delete them to start from nothing, or"
            " choose another --output"
        )
    del damaged[path]
    for other, reason in damaged.items():
        aside = other.with_name(f"damaged-{other.name}")
        message = "%s: %s; it is renamed to %s, and the newest sound one, %s, is taken"
        log.warning(message, other, reason, aside.name, path.name)
        shutil.rmtree(aside, ignore_errors=True)
        other.rename(aside)
    return path


def stored_names(weights: Path) -> dict[str, list[str]] | None:
    """Returns {dataset: class names} of the label space in a weights file; None if damaged."""
    if not weights.is_file():  # a pipe would wait for ever
        return None
    try:
        with safe_open(weights, framework="pt") as opened:
            records = json.loads(opened.metadata()["vocabularies"])
        return {dataset: record["names"] for dataset, record in records.items()}
    except (*BROKEN, OSError, SafetensorError):
        return None


def damage(checkpoint: Path) -> str:
    """Returns what is wrong with the files of a checkpoint, "" if they are as they were written."""
    for name in (SUMS, *PARTS):
        if not (checkpoint / name).is_file():
            return f"{name} is missing, or no file"
    try:
        record = json.loads((checkpoint / SUMS).read_text())
        steps = {int(record["step"]), checkpoint_step(checkpoint)}
        for name in {*PARTS, *record["files"]}:
            if file_digest(checkpoint / name) != record["files"][name]:
                return f"{name} is not as it was written"
        with safe_open(checkpoint / "weights.safetensors", framework="pt") as opened:
            steps.add(int(opened.metadata()["step"]))
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                if not opened.get_tensor(key).isfinite().all():
                    return f"its weights are not finite ({key}): the training had failed before"
    except (*BROKEN, OSError, SafetensorError) as error:
        return f"{SUMS} or a file that it names cannot be read ({type(error).__name__}: {error})"
    return "" if len(steps) == 1 else f"its files are of the steps {sorted(steps)}"


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def load_checkpoint(checkpoint: Path, optimizer: Optimizer) -> int:
    """Restores the optimizer and the random state of this rank, in place. Returns the step.

    The random state stays as it is if the checkpoint is of another number of ranks. A line says so.
    The model is not loaded. Raises InputError for a damaged checkpoint, and for one of another
    model.
    """
    try:
        state = load_plain(checkpoint / "state.pt")
        step = int(state["step"])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults.get("fused")  # an older checkpoint may have another
        optimizer.load_state_dict(join_state(state["optimizer"], checkpoint / SHARDS, optimizer))
        for parameter, moments in optimizer.state.items():
            if any(
                isinstance(m, Tensor) and m.dim() and m.shape != parameter.shape
                for m in moments.values()
            ):
                raise ValueError("the optimiser's moments are of another model")
        _restore_rng(checkpoint, state)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{checkpoint}/state.pt cannot be read ({reason[:99]}); delete {checkpoint} to go on"
            " from the one before"
        ) from None
    log.info("resumed from %s", checkpoint)
    return step


def _restore_rng(checkpoint: Path, state: dict) -> None:
    """Restores the random state of this rank, of a loaded state.pt."""
    if state["ranks"] != world_size():
        message = "%s is of %d ranks, now there are %d: their random numbers start anew"
        log.info(message, checkpoint, state["ranks"], world_size())
        return
    set_rng_states(state["rng"][rank()])


def cached_rows(folder: str, key: list, count: int, compute: Callable[[], Tensor]) -> Tensor:
    """Returns the tensor (count, ...) that `compute` returns, from the cache if it is there.

    folder: where to store it, below the cache folder
    key:    all that determines the result, as values that JSON can hold

    A file that is damaged or has another number of rows is computed again. If the cache folder
    cannot be written, a warning is logged.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = cache_dir() / folder / f"{digest}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            rows = file.get_tensor("rows")
        if len(rows) == count:
            return rows
    except (OSError, SafetensorError):
        pass
    rows = compute()
    try:
        with atomic_path(path) as temporary:
            save_file({"rows": rows.contiguous()}, temporary)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written, so nothing is cached there (%s)", path.parent, error)
    return rows
