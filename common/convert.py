"""Official checkpoints -> weights in our layout, read without unpickling code and kept as safetensors in the cache.

Every official key is renamed, or dropped by a rule that says why; anything else is an error that names the key.
"""

import hashlib
import io
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_plain, save_tensors, weights_file
from common.errors import InputError
from common.files import cache_dir
from common.labels import Vocabulary

log = logging.getLogger("concord")
VERSION = 1  # raise it when the rules change, so that old conversions are not taken for new ones

# facebookresearch/Detic with a ResNet-50; the first pattern that fits a whole key decides
DETIC = {
    r"backbone\.bottom_up\.base\.fc\..*": None,  # ImageNet-21k's classifier, unused
    r"pixel_(mean|std)": None,  # the same as timm's
    r"text_encoder\..*": None,  # CLIP's, frozen; ours comes from open_clip
    r"roi_heads\.box_predictor\.\d\.freq_weight": None,  # class frequencies, for training on LVIS
    r"roi_heads\.box_predictor\.[12]\.cls_score\.zs_weight": None,  # the same as that of stage 0
    r"backbone\.bottom_up\.base\.(.+)": r"backbone.body.\1",
    r"backbone\.fpn_lateral(\d)\.(.+)": r"backbone.fpn.inner_blocks.\1.0.\2",
    r"backbone\.fpn_output(\d)\.(.+)": r"backbone.fpn.layer_blocks.\1.0.\2",
    r"backbone\.top_block\.(.+)": r"backbone.fpn.extra_blocks.\1",
    r"proposal_generator\.(.+)": r"centernet.\1",
    r"roi_heads\.box_head\.(\d)\.fc1\.(.+)": r"cascade.stages.\1.box_head.1.\2",
    r"roi_heads\.box_head\.(\d)\.fc2\.(.+)": r"cascade.stages.\1.box_head.3.\2",
    r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.(.+)": r"cascade.stages.\1.bbox_pred.\2",
    r"roi_heads\.box_predictor\.(\d)\.cls_score\.linear\.(.+)": r"classifiers.\1.embedding.\2",
    r"roi_heads\.box_predictor\.(\d)\.cls_score\.cls_bias": r"classifiers.\1.cls_bias",
    r"roi_heads\.box_predictor\.(\d)\.prop_score\.(.+)": r"prop_score.\1.\2",
    r"roi_heads\.box_predictor\.0\.cls_score\.zs_weight": "text",
    r"roi_heads\.mask_head\.(.+)": r"mask_head.\1",
}

# facebookresearch/Mask2Former with detectron2's ResNet-50; older files lack the names pixel_decoder and predictor
PIXELS, QUERIES = r"sem_seg_head\.(?:pixel_decoder\.)?", r"sem_seg_head\.(?:predictor\.)?"
MASK2FORMER = {
    r"pixel_(mean|std)": None,  # the same as timm's
    r"criterion\.empty_weight": None,  # the weight of "no object", a constant of the loss
    QUERIES
    + r"class_embed\.(weight|bias)": None,  # a classifier of fixed classes; here texts stand in its place
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
    QUERIES
    + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)": r"layers.\1.cross_attn.\2",
    QUERIES + r"transformer_cross_attention_layers\.(\d+)\.norm\.(.+)": r"layers.\1.cross_norm.\2",
    QUERIES
    + r"transformer_self_attention_layers\.(\d+)\.self_attn\.(.+)": r"layers.\1.self_attn.\2",
    QUERIES + r"transformer_self_attention_layers\.(\d+)\.norm\.(.+)": r"layers.\1.self_norm.\2",
    QUERIES + r"transformer_ffn_layers\.(\d+)\.(linear\d\..+)": r"layers.\1.\2",
    QUERIES + r"transformer_ffn_layers\.(\d+)\.norm\.(.+)": r"layers.\1.ffn_norm.\2",
    QUERIES + r"decoder_norm\.(.+)": r"head.decoder_norm.\1",
    QUERIES + r"(?:query_feat|static_query)\.weight": "query_feat",
    QUERIES + r"(query|level)_embed\.weight": r"\1_embed",
}
for i in range(3):  # linear layers; ours count the ReLUs in between
    MASK2FORMER[QUERIES + rf"mask_embed\.layers\.{i}\.(.+)"] = rf"head.mask_embed.{2 * i}.\1"
for i in range(1, 5):
    block, own = rf"backbone\.res{i + 1}\.(\d+)\.", rf"backbone.body.layer{i}.\1."
    MASK2FORMER |= {
        block + r"(conv\d)\.weight": own + r"\2.weight",
        block + r"conv(\d)\.norm\.(.+)": own + r"bn\2.\3",
        block + r"shortcut\.weight": own + "downsample.0.weight",
        block + r"shortcut\.norm\.(.+)": own + r"downsample.1.\2",
    }

VOCABULARIES = {1203: "lvis", 80: "coco", 365: "o365", 500: "oid500"}  # by the number of classes


def rename(key: str, rules: dict[str, str | None]) -> str | None:
    """Our name of an official tensor, None for one that is not needed. Raises InputError for an unknown one."""
    for pattern, name in rules.items():
        if match := re.fullmatch(pattern, key):
            return name and match.expand(name)
    raise InputError(f"tensor '{key}' is of no known official layout; supported: ResNet-50 models of Detic (detic.py) "
                     "and of Mask2Former (lmseg.py and dataseg.py)")  # fmt: skip


def renamed(official: dict[str, Tensor], rules: dict[str, str | None]) -> dict[str, Tensor]:
    """The tensors under our names, with BatchNorm's counters, which older files lack."""
    tensors = {name: tensor for key, tensor in official.items() if (name := rename(key, rules))}
    log.info(
        "%d of %d official tensors taken; the others have no use here", len(tensors), len(official)
    )
    for key in [key for key in tensors if key.endswith("running_var")]:
        tensors.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return tensors | {"backbone.frozen_norm": torch.tensor(True)}


def convert_detic(official: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """An official Detic state dict -> tensors in the layout of detic.py, and the metadata that rebuilds the model."""
    tensors = renamed(official, DETIC)
    for part in ("inner_blocks", "layer_blocks"):  # P3, P4, P5 are numbers 0, 1, 2
        for level in (3, 4, 5):
            for kind in ("weight", "bias"):
                old = f"backbone.fpn.{part}.{level}.0.{kind}"
                tensors[old.replace(f".{level}.", f".{level - 3}.", 1)] = tensors.pop(old)
    tensors["text"] = tensors["text"][:, :-1].T  # (C, D); the last column is background
    classes, bias = len(tensors["text"]), tensors.get("classifiers.0.cls_bias")
    if classes in VOCABULARIES:
        name, names = VOCABULARIES[classes], Vocabulary.known(VOCABULARIES[classes]).names
    else:
        name, names = "official", [f"class {i}" for i in range(1, classes + 1)]
        log.warning(
            "the names of the checkpoint's %d classes are not known; name yours with --vocabulary",
            classes,
        )
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
    return tensors, {"args": args, "vocabularies": {name: names}, "boxed": list(names)}


def convert_mask2former(official: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """An official Mask2Former state dict -> the base that lmseg.py and dataseg.py share: all but what concerns text.

    The metadata's `base` names the model's parts that the tensors make up.
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


CONVERTERS = {"detic": convert_detic, "lmseg": convert_mask2former, "dataseg": convert_mask2former}


# -- pickles of numpy arrays -------------------------------------------------------------------------------------------


class Kind:
    """In the place of numpy.dtype: a type of numbers, which a pickle makes of its name and its byte order."""

    def __init__(self, name: str, *_):
        self.name = name

    def __setstate__(self, state: tuple):
        self.name = state[1] + self.name


class Array:
    """In the place of numpy.ndarray, which a pickle could make of pointers to anywhere."""

    def __init__(self, *_):
        self.values = None

    def __setstate__(self, state: tuple):
        *_, shape, kind, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.values = np.frombuffer(data, kind.name).reshape(shape, order="F" if fortran else "C")


def array_of(data: bytes, kind: Kind, shape: tuple = (), order: str = "C", *_) -> Array:
    array = Array()
    array.__setstate__((shape, kind, order == "F", data))
    return array


ARRAYS = {  # all that a pickle of arrays calls
    ("collections", "OrderedDict"): dict,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Kind,
    ("_codecs", "encode"): lambda text, _: text.encode(
        "latin1"
    ),  # bytes, as older protocols write them
}
for package in ("numpy.core", "numpy._core"):
    ARRAYS[f"{package}.multiarray", "_reconstruct"] = Array
    ARRAYS[f"{package}.multiarray", "scalar"] = lambda kind, data: array_of(data, kind)
    ARRAYS[f"{package}.numeric", "_frombuffer"] = array_of


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays in dicts and lists; a pickle can call only what `find_class` returns."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return ARRAYS[module, name]


def load_arrays(path: Path):
    """The content of a pickle of numpy arrays, as Mask2Former's model zoo has them: tensors, by name, under "model".

    Raises ValueError with the reason in one line for a damaged file and for one that holds more.
    """
    try:
        content = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        arrays = content.get("model", content)
        return {key: torch.from_numpy(array.values.copy()) for key, array in arrays.items()}
    except Exception as error:  # on damaged files pickle raises nearly everything
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from None


# ----------------------------------------------------------------------------------------------------------------------


def converted(path: str | Path, method: str, convert=None) -> Path:
    """The safetensors twin of an official checkpoint (.pth, or a .pkl of arrays), made once in the cache folder.

    Raises InputError for a method without an official layout, a file that cannot be read without running code, and
    tensors of another layout.
    """
    file = weights_file(path)
    if file.suffix == ".safetensors":
        return file
    if method not in CONVERTERS:
        raise InputError(
            f"weights {file} are no .safetensors of {method}.py, whose official weights do not exist"
        )
    facts = [VERSION, method, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    twin = (
        cache_dir()
        / "converted"
        / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.safetensors"
    )
    if not twin.is_file():
        try:
            official = load_arrays(file) if file.suffix == ".pkl" else load_plain(file)
        except ValueError as error:
            raise InputError(f"weights {file} cannot be read without running code ({error}); give the published "
                             "file") from None  # fmt: skip
        official = official.get("model", official) if isinstance(official, dict) else {}
        official = official if isinstance(official, dict) else {}
        if not official or not all(
            isinstance(k, str) and isinstance(t, Tensor) for k, t in official.items()
        ):
            raise InputError(f"weights {file} hold no state dict; give the published file")
        try:
            tensors, metadata = CONVERTERS[method](
                {key: tensor.clone() for key, tensor in official.items()}
            )
            save_tensors(twin, tensors, {"method": method} | metadata)
        except InputError as error:
            raise InputError(f"weights {file}: {error}") from None
        except KeyError as error:
            raise InputError(
                f"weights {file}: tensor {error} is missing; give the published file"
            ) from None
        except (IndexError, ValueError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"weights {file} hold tensors of odd shapes or kinds ({str(error).splitlines()[0][:99]}); "
                             "give the published file") from None  # fmt: skip
        log.info("weights %s converted to %s", file, twin)
    return twin
