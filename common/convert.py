"""Conversion of official checkpoints. No code in them runs; the cache keeps the result.

A rule renames each official tensor, or drops it and says why. A tensor without a rule is an error.
"""

import hashlib
import io
import logging
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_plain, save_tensors
from common.errors import InputError
from common.files import cache_dir
from common.saved import own_weights, weights_files

log = logging.getLogger("concord")

VERSION = 3  # of the rules; older conversions in the cache are not used
NESTS = ("model", "state_dict")  # under one of them a checkpoint may keep its state dict
Tensors = dict[str, Tensor]
# official tensors, name of their file -> our tensors, and the model's metadata
Convert = Callable[[Tensors, str], tuple[Tensors, dict]]

# -- Rules -----------------------------------------------------------------------------------------


def rename(key: str, rules: dict[str, str | None]) -> str | None:
    """Returns our name of the official tensor `key`, or None to drop it.

    rules: {regular expression: our name, or None}; the first expression that matches decides
    Raises InputError if none matches.
    """
    for pattern, name in rules.items():
        if match := re.fullmatch(pattern, key):
            return name and match.expand(name)
    raise InputError(
        f"tensor '{key:.60}' is of no known official layout; docs/official-weights.md lists the"
        " files that load"
    )


def renamed(official: Tensors, rules: dict[str, str | None]) -> Tensors:
    """Returns the official tensors under our names, without those whose rule gives None.

    Adds BatchNorm's counters, which older files lack.
    rules: as in `rename`
    Raises InputError for a tensor that no rule matches.
    """
    tensors = {}
    for key, tensor in official.items():
        if name := rename(key, rules):
            tensors[name] = tensor
    log.info("%d of %d official tensors taken; the rest is not needed", len(tensors), len(official))
    for key in list(tensors):
        if key.endswith("running_var"):
            counter = key.replace("running_var", "num_batches_tracked")
            tensors.setdefault(counter, torch.tensor(0))
    return tensors


def refuse(reason: str) -> Convert:
    """Returns a conversion that raises InputError: the official weights cannot be used."""

    def convert(official: Tensors, name: str) -> tuple[Tensors, dict]:
        raise InputError(f"the official model {reason}")

    return convert


# -- Backbones -------------------------------------------------------------------------------------

RESNETS = {  # by the blocks of the stages, and whether these are bottlenecks
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}
SWINS = {  # by the blocks of the stages, and the channels of the first
    ((2, 2, 6, 2), 96): "tiny",
    ((2, 2, 18, 2), 96): "small",
    ((2, 2, 18, 2), 128): "base",
    ((2, 2, 18, 2), 192): "large",
}
WINDOWS = {169: "window7_224", 529: "window12_384"}  # by the rows of a bias table


def timm_name(tensors: Tensors, body: str) -> str:
    """Returns the timm model, a ResNet or Swin, that has these tensors under the prefix `body`.

    Raises InputError for another depth or kind.
    """
    own = {key.removeprefix(body): t for key, t in tensors.items() if key.startswith(body)}
    rows = {key: len(t) for key, t in own.items() if t.ndim}
    keys = "\n".join(rows)
    blocks = re.findall(r"^layers\.(\d)\.blocks\.\d+\.norm1\.weight$", keys, re.M)
    depths = tuple(blocks.count(stage) for stage in "0123")
    size = SWINS.get((depths, rows.get("patch_embed.proj.weight")))
    window = WINDOWS.get(rows.get("layers.0.blocks.0.attn.relative_position_bias_table"))
    if size and window:
        return f"swin_{size}_patch4_{window}"
    convs = re.findall(r"^layer(\d)\.\d+\.conv(\d)\.weight$", keys, re.M)
    depths = tuple(convs.count((stage, "1")) for stage in "1234")
    bottleneck = ("1", "3") in convs
    if (depths, bottleneck) not in RESNETS:
        known = ", ".join(RESNETS.values())
        raise InputError(f"their backbone is of no known kind or depth; supported: {known}, Swin")
    return RESNETS[depths, bottleneck]


# -- Pickles of numpy arrays -----------------------------------------------------------------------


class DType:
    """Stands in for numpy.dtype while a pickle is read.

    The pickle creates it with a name without byte order, such as "f4", and then sets its state.
    That puts the byte order in front: `name` becomes "<f4".
    """

    def __init__(self, name: str, *_):
        self.name = name

    def __setstate__(self, state: tuple):
        self.name = state[1] + self.name


class Array:
    """Stands in for numpy.ndarray, which a pickle could make of pointers to any address.

    values: the array, or None until the pickle has set it
    """

    def __init__(self, *_):
        self.values = None

    def __setstate__(self, state: tuple):
        *_, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        order = "F" if fortran else "C"
        self.values = np.frombuffer(data, dtype.name).reshape(shape, order=order)


def make_array(data: bytes, dtype: DType, shape: tuple = (), order: str = "C", *_) -> Array:
    """Returns an Array of the values in `data`; `order` is "C" or "F"."""
    array = Array()
    array.__setstate__((shape, dtype, order == "F", data))
    return array


ALLOWED = {  # all that a pickle of arrays calls
    ("collections", "OrderedDict"): dict,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
    # older protocols write bytes as text
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}
for package in ("numpy.core", "numpy._core"):
    ALLOWED[f"{package}.multiarray", "_reconstruct"] = Array
    ALLOWED[f"{package}.multiarray", "scalar"] = lambda dtype, data: make_array(data, dtype)
    ALLOWED[f"{package}.numeric", "_frombuffer"] = make_array


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts and lists of arrays. The pickle can call nothing but what is in ALLOWED."""

    def find_class(self, module: str, name: str) -> Callable:
        """Returns the entry of ALLOWED; raises UnpicklingError if there is none."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return ALLOWED[module, name]


def refuse_gaps(data: bytes) -> None:
    """Raises ValueError for a pickle whose numbered objects have gaps.

    The unpickler allocates all numbers below the largest one: a few bytes would take 64 GB.
    """
    used = 0
    for operation, number, _ in pickletools.genops(data):
        if operation.name not in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            continue
        used += 1
        if number is not None and number > used:
            raise ValueError(f"its object {used} has the number {number}")


def load_arrays(path: Path) -> Tensors:
    """Reads a pickle of numpy arrays, like those of Mask2Former's model zoo, as tensors.

    The pickle is {name: array}, alone or under the key "model".
    Raises ValueError with the reason in one line for a damaged file and for other content.
    """
    try:
        data = path.read_bytes()
        refuse_gaps(data)
        content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
        arrays = content.get("model", content)
        return {key: torch.from_numpy(array.values.copy()) for key, array in arrays.items()}
    except Exception as error:  # pickle raises nearly everything for damaged files
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from None


# -- Conversion ------------------------------------------------------------------------------------


def load_official(file: Path) -> Tensors:
    """Reads the state dict of an official checkpoint, alone or under a key of NESTS.

    A .pkl holds numpy arrays, any other file torch's tensors.
    Raises InputError for a file that is damaged, would run code, or holds no state dict.
    """
    try:
        content = load_arrays(file) if file.suffix == ".pkl" else load_plain(file)
    except ValueError as error:
        raise InputError(
            f"weights {file} cannot be read without running code ({error}); give the published file"
        ) from None
    nests = [key for key in NESTS if isinstance(content, dict) and key in content]
    state = content[nests[0]] if nests else content
    items = state.items() if isinstance(state, dict) else []
    sound = [isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in items]
    if not sound or not all(sound):
        raise InputError(f"weights {file} hold no state dict; give the published file")
    return {key: tensor.clone() for key, tensor in items}


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Turns what a conversion raises in its block into InputErrors that name the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"weights {file}: {error}") from None
    except KeyError as error:
        raise InputError(
            f"weights {file}: tensor {error} is missing; give the published file"
        ) from None
    except (IndexError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:99]
        raise InputError(
            f"weights {file} hold tensors of odd shapes or kinds ({reason}); give the published"
            " file"
        ) from None


def join(parts: list[tuple[Tensors, dict]]) -> tuple[Tensors, dict]:
    """Makes one model of the parts that several official files hold: (tensors, metadata).

    Settings (`args`) and vocabularies are joined. A setting on which the files do not agree is left
    out, and so has its default; so is any other metadata that not all of them have alike.
    Raises InputError for a tensor that two files have.
    """
    tensors = {}
    vocabularies = {}
    args = {}
    for part, metadata in parts:
        if twice := tensors.keys() & part.keys():
            raise InputError(f"two of the files hold '{min(twice)}'; give one file for each part")
        tensors |= part
        vocabularies |= metadata["vocabularies"]
        args |= metadata["args"]
    records = [metadata for _, metadata in parts]
    for key, value in list(args.items()):
        if any(record["args"].get(key, value) != value for record in records):
            del args[key]
    alike = {}
    for key, value in records[0].items():
        if all(record.get(key) == value for record in records):
            alike[key] = value
    return tensors, alike | {"args": args, "vocabularies": vocabularies}


def convert_if_official(path: str | Path, method: str, convert: Convert | None) -> Path:
    """Returns the safetensors file of these weights. Converts official checkpoints once.

    path:    a .safetensors file, a run folder, or an official checkpoint (.pth, .pkl); or several
             checkpoints, by commas, that hold the parts of one model
    convert: converts the official weights of `method`; None if there are none

    The converted file is in the cache folder.
    Raises InputError for a file that is missing or cannot be read or converted, and for parts that
    are no whole model.
    """
    if own := own_weights(path):
        return own
    files = weights_files(path)
    named = ",".join(map(str, files))
    if convert is None:
        raise InputError(f"weights {named} are no .safetensors; {method} has no official weights")
    facts = [VERSION, method]
    for file in files:
        facts += [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    target = cache_dir() / "converted" / f"{digest}.safetensors"
    if target.is_file():
        return target
    parts = []
    for file in files:
        official = load_official(file)
        with naming(file):
            parts.append(convert(official, file.stem))
    with naming(named):
        tensors, metadata = join(parts)
        if lacks := metadata.pop("lacks", ""):
            raise InputError(lacks)
        save_tensors(target, tensors, {"method": method} | metadata)
    log.info("weights %s converted to %s", named, target)
    return target
