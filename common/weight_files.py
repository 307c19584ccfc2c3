"""Weights of an image encoder from a file. No code in the file runs."""

import logging
import os
import re
from collections import Counter
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.checkpoint import load_plain
from common.convert import load_arrays
from common.errors import InputError

log = logging.getLogger("concord")

READERS = {".safetensors": load_file, ".pkl": load_arrays, ".pth": load_plain, ".pt": load_plain}
CLASSIFIERS = ("fc", "head", "classifier")
WRAPPED = ("model.", "body.")  # where a feature extractor may hold the whole timm model
CONSTANTS = ("num_batches_tracked", "relative_position_index", "attn_mask")  # not needed


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file, a torch file or a pickle of numpy arrays.

    Returns them by name, without the prefix "module.". They may be nested in "state_dict" or
    "model". Raises InputError, which starts with `what`, if the file is unreadable, or holds other
    objects than data.
    """
    try:
        content = READERS.get(path.suffix, load_plain)(path)
    except (OSError, ValueError, SafetensorError) as error:
        if "torchscript" in str(error).lower():
            reason = "it is a TorchScript archive, which holds code; save the model's state_dict()"
        elif not os.path.isfile(path):
            reason = "it does not exist; check the path"
        else:
            detail = str(error)[:120]
            reason = f"it is no file of plain tensors ({detail}); save it as .safetensors"
        raise InputError(f"{what}: {path} cannot be read: {reason}") from None
    for key in ("state_dict", "model"):  # checkpoints nest their tensors
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, dict):
        return {}
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key).removeprefix("module.")] = value
    return tensors


def timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of detectron2's ResNets and of the official Swins as timm does.

    Other tensors keep their names.
    Source: facebookresearch/detectron2:tools/convert-torchvision-to-d2.py.
    """
    if any(key.startswith("stem.conv1.") for key in tensors):  # detectron2
        rules = {r"^stem\.": "", r"conv(\d)\.norm\.": r"bn\1."}
        rules |= {r"shortcut\.norm\.": "downsample.1.", r"shortcut\.": "downsample.0."}
        rules |= {rf"^res{i + 1}\.": f"layer{i}." for i in range(1, 5)}
    elif "layers.0.downsample.reduction.weight" in tensors:  # Swin; timm counts from the next stage
        rules = {rf"^layers\.{i}\.downsample": f"layers.{i + 1}.downsample" for i in (2, 1, 0)}
    else:
        return tensors
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, name in rules.items():
            if re.search(pattern, key):
                key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed


def plain(key: str) -> str:
    """Returns a tensor's name as it is compared.

    Some of timm's feature extractors turn "." to "_", others put a name of WRAPPED before it.
    """
    for prefix in WRAPPED:
        key = key.removeprefix(prefix)
    return key.replace("_", ".")


def load_backbone_file(body: nn.Module, name: str, file: str, what: str) -> None:
    """Copies the tensors of a file into `body`, a feature extractor of the timm model `name`.

    A tensor of the model that makes no features, such as its classifier, is not copied; one line
    counts these. A tensor of `body` that the timm model lacks may be missing.
    what: how messages call the weights
    Raises InputError as `read_tensors` does, and for the first tensor that is missing, has another
    shape, is not finite, or is unknown to the model.
    """
    tensors = timm_names(read_tensors(Path(file).expanduser(), what))
    found = {plain(key): tensor for key, tensor in tensors.items()}
    own = {key: t for key, t in body.state_dict().items() if not key.endswith(CONSTANTS)}
    with torch.device("meta"):
        whole = {plain(key) for key in timm.create_model(name).state_dict()}
    loaded = {}
    for key, tensor in own.items():
        stored = found.pop(plain(key), None)
        if stored is None:
            if plain(key) in whole:
                raise InputError(f"{what}: {file} lacks '{key}'; is it a file of {name}?")
            continue
        if stored.shape != tensor.shape:
            raise InputError(
                f"{what}: tensor '{key}' of {file} has the shape {list(stored.shape)}, {name} needs"
                f" {list(tensor.shape)}; name the model of the file"
            )
        if not torch.isfinite(stored).all():
            raise InputError(f"{what}: tensor '{key}' of {file} is not finite; get it again")
        loaded[key] = stored
    unused = [key for key in tensors if plain(key) in found and not key.endswith(CONSTANTS)]
    for key in unused:
        if plain(key) not in whole and key.split(".")[0] not in CLASSIFIERS:
            raise InputError(f"{what}: {name} has no tensor '{key}' of {file}; name its model")
    body.load_state_dict(loaded, strict=False)
    counts = Counter(key.split(".")[0] for key in unused)
    rest = ", ".join(f"{count} of '{part}'" for part, count in counts.items()) or "none"
    log.info("%s: %d tensors of %s, not used: %s", what, len(loaded), file, rest)
