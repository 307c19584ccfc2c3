"""Official checkpoints -> weights in our layout, read without unpickling code and kept as safetensors in the cache.

Every official key is renamed, or dropped by a rule that says why; anything else is an error that names the key.
"""

import hashlib
import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import load_plain, save_tensors, weights_file
from common.errors import InputError
from common.labels import Vocabulary
from common.paths import cache_dir

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
VOCABULARIES = {1203: "lvis", 80: "coco", 365: "o365", 500: "oid500"}  # by the number of classes


def rename(key: str, rules: dict[str, str | None]) -> str | None:
    """Our name of an official tensor, None for one that is not needed. Raises InputError for an unknown one."""
    for pattern, name in rules.items():
        if match := re.fullmatch(pattern, key):
            return name and match.expand(name)
    raise InputError(f"tensor '{key}' is of no known official layout; supported: Detic with a ResNet-50 backbone")


def convert_detic(official: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """An official Detic state dict -> tensors in the layout of detic.py, and the metadata that rebuilds the model."""
    tensors = {name: tensor for key, tensor in official.items() if (name := rename(key, DETIC))}
    for part in ("inner_blocks", "layer_blocks"):  # P3, P4, P5 are numbers 0, 1, 2
        for level in (3, 4, 5):
            for kind in ("weight", "bias"):
                old = f"backbone.fpn.{part}.{level}.0.{kind}"
                tensors[old.replace(f".{level}.", f".{level - 3}.", 1)] = tensors.pop(old)
    for key in [key for key in tensors if key.endswith("running_var")]:  # older files lack this counter
        tensors.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    tensors["text"] = tensors["text"][:, :-1].T  # (C, D); the last column is background
    tensors["backbone.frozen_norm"] = torch.tensor(True)
    classes, bias = len(tensors["text"]), tensors.get("classifiers.0.cls_bias")
    if classes in VOCABULARIES:
        name, names = VOCABULARIES[classes], Vocabulary.known(VOCABULARIES[classes]).names
    else:
        name, names = "official", [f"class {i}" for i in range(1, classes + 1)]
        log.warning("the names of the checkpoint's %d classes are not known; name yours with --vocabulary", classes)
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


CONVERTERS = {"detic": convert_detic}


def converted(path: str | Path, method: str) -> Path:
    """The safetensors twin of an official checkpoint (.pth), made once in the cache folder.

    Raises InputError for a method without an official layout, a file that cannot be read without running code, and
    tensors of another layout.
    """
    file = weights_file(path)
    if method not in CONVERTERS:
        raise InputError(f"weights {file} are no .safetensors of {method}.py, whose official weights do not exist")
    facts = [VERSION, method, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    twin = cache_dir() / "converted" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.safetensors"
    if not twin.is_file():
        try:
            official = load_plain(file)
        except ValueError as error:
            raise InputError(f"weights {file} cannot be read without running code ({error}); give the published .pth "
                             "file") from None  # fmt: skip
        official = official.get("model", official) if isinstance(official, dict) else {}
        official = official if isinstance(official, dict) else {}
        if not official or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in official.items()):
            raise InputError(f"weights {file} hold no state dict; give the published .pth file")
        try:
            tensors, metadata = CONVERTERS[method]({key: tensor.clone() for key, tensor in official.items()})
            save_tensors(twin, tensors, {"method": method} | metadata)
        except InputError as error:
            raise InputError(f"weights {file}: {error}") from None
        except KeyError as error:
            raise InputError(f"weights {file}: tensor {error} is missing; give the published .pth file") from None
        except (IndexError, ValueError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"weights {file} hold tensors of odd shapes or kinds ({str(error).splitlines()[0][:99]}); "
                             "give the published .pth file") from None  # fmt: skip
        log.info("weights %s: %d of %d official tensors taken", file, len(tensors), len(official))
    return twin
