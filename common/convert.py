"""Conversion of official checkpoints. No code in them runs; the cache keeps the result.

A rule renames each official tensor, or drops it and says why. A tensor without a rule is an error.
"""

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import TEXT, load_plain, save_tensors, weights_file
from common.errors import InputError
from common.files import cache_dir
from common.labels import Vocabulary

log = logging.getLogger("concord")

VERSION = 2  # of the rules; older conversions in the cache are not used
Tensors = dict[str, Tensor]
Convert = Callable[[Tensors], tuple[Tensors, dict]]  # official -> ours, and the model's metadata

# -- Rules -----------------------------------------------------------------------------------------

# facebookresearch/Detic (CenterNet2) with a ResNet-50; the first pattern that fits decides
BOX_HEAD = r"roi_heads\.box_head\.(\d)\."
PREDICTOR = r"roi_heads\.box_predictor\.(\d)\."
DETIC = {
    r"backbone\.bottom_up\.base\.fc\..*": None,  # ImageNet-21k's classifier, unused
    r"pixel_(mean|std)": None,  # the same as timm's
    r"text_encoder\..*": None,  # CLIP's, frozen; ours comes from open_clip
    PREDICTOR + "freq_weight": None,  # class frequencies, for training on LVIS
    r"roi_heads\.box_predictor\.[12]\.cls_score\.zs_weight": None,  # the same as that of stage 0
    r"backbone\.bottom_up\.base\.(.+)": r"backbone.body.\1",
    r"backbone\.fpn_lateral(\d)\.(.+)": r"backbone.fpn.inner_blocks.\1.0.\2",
    r"backbone\.fpn_output(\d)\.(.+)": r"backbone.fpn.layer_blocks.\1.0.\2",
    r"backbone\.top_block\.(.+)": r"backbone.fpn.extra_blocks.\1",
    r"proposal_generator\.(.+)": r"centernet.\1",
    BOX_HEAD + r"fc1\.(.+)": r"cascade.stages.\1.box_head.1.\2",
    BOX_HEAD + r"fc2\.(.+)": r"cascade.stages.\1.box_head.3.\2",
    PREDICTOR + r"bbox_pred\.(.+)": r"cascade.stages.\1.bbox_pred.\2",
    PREDICTOR + r"cls_score\.linear\.(.+)": r"classifiers.\1.embedding.\2",
    PREDICTOR + r"cls_score\.cls_bias": r"classifiers.\1.cls_bias",
    PREDICTOR + r"prop_score\.(.+)": r"prop_score.\1.\2",
    r"roi_heads\.box_predictor\.0\.cls_score\.zs_weight": "label_space",
    r"roi_heads\.mask_head\.(.+)": r"mask_head.\1",
}

# facebookresearch/Mask2Former with detectron2's ResNet-50
PIXELS = r"sem_seg_head\.(?:pixel_decoder\.)?"  # older files lack the names in the brackets
QUERIES = r"sem_seg_head\.(?:predictor\.)?"
CROSS = QUERIES + r"transformer_cross_attention_layers\.(\d+)\."
SELF = QUERIES + r"transformer_self_attention_layers\.(\d+)\."
FFN = QUERIES + r"transformer_ffn_layers\.(\d+)\."
MASK2FORMER = {
    r"pixel_(mean|std)": None,  # the same as timm's
    r"criterion\.empty_weight": None,  # the weight of "no object", a constant of the loss
    QUERIES + r"class_embed\.(weight|bias)": None,  # classifies fixed classes, here text does it
    r"backbone\.stem\.conv1\.weight": "backbone.body.conv1.weight",
    r"backbone\.stem\.conv1\.norm\.(.+)": r"backbone.body.bn1.\1",
    PIXELS + r"input_proj\.(.+)": r"pixel_decoder.input_proj.\1",
    PIXELS + r"transformer\.level_embed": "pixel_decoder.level_embed",
    PIXELS + r"transformer\.encoder\.(.+)": r"pixel_decoder.\1",
    PIXELS + r"adapter_1\.weight": "pixel_decoder.lateral.0.weight",
    PIXELS + r"adapter_1\.norm\.(.+)": r"pixel_decoder.lateral.1.\1",
    PIXELS + r"layer_1\.weight": "pixel_decoder.output.0.weight",
    PIXELS + r"layer_1\.norm\.(.+)": r"pixel_decoder.output.1.\1",
    PIXELS + r"mask_features\.(.+)": r"pixel_decoder.mask_features.\1",
    CROSS + r"multihead_attn\.(.+)": r"layers.\1.cross_attn.\2",
    CROSS + r"norm\.(.+)": r"layers.\1.cross_norm.\2",
    SELF + r"self_attn\.(.+)": r"layers.\1.self_attn.\2",
    SELF + r"norm\.(.+)": r"layers.\1.self_norm.\2",
    FFN + r"(linear\d\..+)": r"layers.\1.\2",
    FFN + r"norm\.(.+)": r"layers.\1.ffn_norm.\2",
    QUERIES + r"decoder_norm\.(.+)": r"head.decoder_norm.\1",
    QUERIES + r"(?:query_feat|static_query)\.weight": "query_feat",
    QUERIES + r"(query|level)_embed\.weight": r"\1_embed",
}
for i in range(3):  # of the linear layers; ours also counts the ReLUs between them
    MASK2FORMER[QUERIES + rf"mask_embed\.layers\.{i}\.(.+)"] = rf"head.mask_embed.{2 * i}.\1"
for i in range(1, 5):
    block = rf"backbone\.res{i + 1}\.(\d+)\."
    own = rf"backbone.body.layer{i}.\1."
    MASK2FORMER |= {
        block + r"(conv\d)\.weight": own + r"\2.weight",
        block + r"conv(\d)\.norm\.(.+)": own + r"bn\2.\3",
        block + r"shortcut\.weight": own + "downsample.0.weight",
        block + r"shortcut\.norm\.(.+)": own + r"downsample.1.\2",
    }

VOCABULARIES = {1203: "lvis", 80: "coco", 365: "o365", 500: "oid500"}  # by the number of classes


def rename(key: str, rules: dict[str, str | None]) -> str | None:
    """Returns our name of the official tensor `key`, or None to drop it.

    rules: {regular expression: our name, or None}; the first expression that matches decides
    Raises InputError if none matches.
    """
    for pattern, name in rules.items():
        if match := re.fullmatch(pattern, key):
            return name and match.expand(name)
    raise InputError(
        f"tensor '{key}' is of no known official layout; supported: ResNet-50 models of"
        " facebookresearch/Detic (CenterNet2) and of facebookresearch/Mask2Former"
    )


def renamed(official: Tensors, rules: dict[str, str | None]) -> Tensors:
    """Returns the official tensors under our names, without those whose rule gives None.

    Adds BatchNorm's counters, which older files lack, and `backbone.frozen_norm` = True.
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
    tensors["backbone.frozen_norm"] = torch.tensor(True)
    return tensors


def convert_centernet2_detic(official: Tensors) -> tuple[Tensors, dict]:
    """Converts a state dict of Detic's CenterNet2. Returns our tensors and the model's metadata.

    The text of the C classes becomes the tensor "label_space.<dataset>" (C, D). <dataset> is the
    known vocabulary with C classes. If there is none, <dataset> is "official", the classes get
    made-up names, and a warning is logged.
    """
    tensors = renamed(official, DETIC)
    blocks = ("inner_blocks", "layer_blocks")
    for block, level, kind in product(blocks, (3, 4, 5), ("weight", "bias")):
        tensor = tensors.pop(f"backbone.fpn.{block}.{level}.0.{kind}")
        tensors[f"backbone.fpn.{block}.{level - 3}.0.{kind}"] = tensor  # ours counts from P3
    text = tensors.pop("label_space")[:, :-1].T  # (C, D); the last column is background
    count = len(text)
    dataset = VOCABULARIES.get(count, "official")
    if count in VOCABULARIES:
        names = list(Vocabulary.known(dataset).names)
    else:
        names = [f"class {i}" for i in range(1, count + 1)]
        log.warning("the names of %d classes are not known; name yours with --vocabulary", count)
    tensors[TEXT + dataset] = text
    bias = tensors.get("classifiers.0.cls_bias")
    args = {
        "backbone": "resnet50",
        "text_encoder": "ViT-B-32/openai",
        "prompts": "a",
        "test_size": 800,
        "tau": 0.02,
        "cls_bias": 0.0 if bias is None else float(bias),
        "channels": tensors["backbone.fpn.inner_blocks.0.0.weight"].shape[0],
        "fc_dim": tensors["cascade.stages.0.box_head.1.weight"].shape[0],
        "masks": any(key.startswith("mask_head.") for key in tensors),
        "image_label_loss": "wsddn" if "prop_score.0.0.weight" in tensors else "max_size",
    }
    vocabularies = {dataset: {"names": names, "is_thing": None}}
    return tensors, {"args": args, "vocabularies": vocabularies, "boxed": names}


def convert_mask2former(official: Tensors) -> tuple[Tensors, dict]:
    """Converts a state dict of Mask2Former, without its classifier.

    Returns our tensors and the model's metadata. Its entry `base` lists the modules of a model that
    the tensors fill.
    """
    tensors = renamed(official, MASK2FORMER)
    queries, channels = tensors["query_feat"].shape
    args = {
        "backbone": "resnet50",
        "queries": queries,
        "channels": channels,
        "encoder_layers": sum(key.endswith(".self_attn.value_proj.bias") for key in tensors),
        "decoder_layers": sum(key.endswith(".cross_norm.weight") for key in tensors),
    }
    base = sorted({key.partition(".")[0] for key in tensors})
    return tensors, {"args": args, "vocabularies": {}, "base": base}


def refuse(reason: str) -> Convert:
    """Returns a conversion that raises InputError: the official weights cannot be used."""

    def convert(official: Tensors) -> tuple[Tensors, dict]:
        raise InputError(f"the official model {reason}")

    return convert


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

    def find_class(self, module: str, name: str):
        """Returns the entry of ALLOWED; raises UnpicklingError if there is none."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return ALLOWED[module, name]


def load_arrays(path: Path) -> Tensors:
    """Reads a pickle of numpy arrays, like those of Mask2Former's model zoo, as tensors.

    The pickle is {name: array}, alone or under the key "model".
    Raises ValueError with the reason in one line for a damaged file and for other content.
    """
    try:
        content = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        arrays = content.get("model", content)
        return {key: torch.from_numpy(array.values.copy()) for key, array in arrays.items()}
    except Exception as error:  # pickle raises nearly everything for damaged files
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from None


# -- Conversion ------------------------------------------------------------------------------------


def load_official(file: Path) -> Tensors:
    """Reads the state dict of an official checkpoint, alone or under the key "model".

    A .pkl holds numpy arrays, any other file torch's tensors.
    Raises InputError for a file that is damaged, would run code, or holds no state dict.
    """
    try:
        content = load_arrays(file) if file.suffix == ".pkl" else load_plain(file)
    except ValueError as error:
        raise InputError(
            f"weights {file} cannot be read without running code ({error}); give the published file"
        ) from None
    state = content.get("model", content) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else []
    sound = [isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in items]
    if not sound or not all(sound):
        raise InputError(f"weights {file} hold no state dict; give the published file")
    return {key: tensor.clone() for key, tensor in items}


def convert_if_official(path: str | Path, method: str, convert: Convert | None) -> Path:
    """Returns the safetensors file of these weights. Converts an official checkpoint once.

    path:    a .safetensors file, a run folder, or an official checkpoint (.pth, .pkl)
    convert: converts the official weights of `method`; None if there are none

    The converted file is in the cache folder.
    Raises InputError for a file that is missing or cannot be read or converted.
    """
    file = weights_file(path)
    if file.suffix == ".safetensors":
        return file
    if convert is None:
        raise InputError(f"weights {file} are no .safetensors; {method} has no official weights")
    facts = [VERSION, method, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    target = cache_dir() / "converted" / f"{digest}.safetensors"
    if target.is_file():
        return target
    official = load_official(file)
    try:
        tensors, metadata = convert(official)
        save_tensors(target, tensors, {"method": method} | metadata)
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
    log.info("weights %s converted to %s", file, target)
    return target
