"""Rules that convert official checkpoints of detectors whose classifier is text.

They are CenterNet2 of facebookresearch/Detic, and the localizer and the classifier of
zhenyuw16/UniDetector. docs/official-weights.md lists the files.
"""

import json
import logging
import re
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from common.checkpoint import TEXT
from common.convert import Tensors, renamed, timm_name
from common.errors import InputError
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")

# facebookresearch/Detic: detic/modeling, with CenterNet2; the first pattern that fits decides
BOX_HEAD = r"roi_heads\.box_head\.(\d)\."
PREDICTOR = r"roi_heads\.box_predictor\.(\d)\."
BOTTOM_UP = r"backbone\.bottom_up\."
CENTERNET2 = {
    BOTTOM_UP + r"base\.fc\..*": None,  # ImageNet-21k's classifier, unused
    r"pixel_(mean|std)": None,  # the same as timm's
    r"text_encoder\..*": None,  # CLIP's, frozen; ours comes from open_clip
    PREDICTOR + "freq_weight": None,  # class frequencies, for training on LVIS
    r"roi_heads\.box_predictor\.[12]\.cls_score\.zs_weight": None,  # the same as that of stage 0
    BOTTOM_UP + r"base\.(.+)": r"backbone.body.\1",
    BOTTOM_UP + r"layers\.\d\.blocks\.\d+\.attn\.relative_position_index": None,  # a constant
    BOTTOM_UP + r"layers\.0\.downsample\.(.+)": r"backbone.body.layers.1.downsample.\1",
    BOTTOM_UP + r"layers\.1\.downsample\.(.+)": r"backbone.body.layers.2.downsample.\1",
    BOTTOM_UP + r"layers\.2\.downsample\.(.+)": r"backbone.body.layers.3.downsample.\1",
    BOTTOM_UP + r"((?:patch_embed|layers|norm\d)\..+)": r"backbone.body.\1",
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

# zhenyuw16/UniDetector, mmdet 2: its first stage, an object localization network
LOCALIZER = {
    r"rpn_head\.rpn_cls\..*": None,  # has no loss there, and no score
    r"backbone\.(.+)": r"localizer.backbone.body.\1",
    r"neck\.lateral_convs\.(\d)\.conv\.(.+)": r"localizer.backbone.fpn.inner_blocks.\1.0.\2",
    r"neck\.fpn_convs\.(\d)\.conv\.(.+)": r"localizer.backbone.fpn.layer_blocks.\1.0.\2",
    r"rpn_head\.(.+)": r"localizer.rpn.\1",
    r"roi_head\.bbox_head\.shared_fcs\.0\.(.+)": r"localizer.box_head.1.\1",
    r"roi_head\.bbox_head\.shared_fcs\.1\.(.+)": r"localizer.box_head.3.\1",
    r"roi_head\.bbox_head\.fc_bbox_score\.(.+)": r"localizer.fc_iou.\1",
    r"roi_head\.bbox_head\.(fc_(?:cls|reg)\..+)": r"localizer.\1",
}
# its second stage, CLIP's ResNet on regions; the end-to-end model has proposals of its own, too
CLASSIFIER = {
    r"rpn_head\..*": None,
    r"backbone\.(.+)": r"classifiers.0.regions.\1",
    r"roi_head\.shared_head\.(layer4\..+)": r"classifiers.0.regions.\1",
    r"roi_head\.bbox_head\.(attnpool\..+)": r"classifiers.0.regions.\1",
    r"roi_head\.bbox_head\.(fc_reg\..+)": r"classifiers.0.\1",
    r"roi_head\.bbox_head\.zs_weights(?:_\d+)?": None,  # `text_of_columns` takes them
}

# a tensor that only another model has, and what that model is
OTHERS = {
    r"detr\.": "Deformable DETR",
    r"roi_heads\.res5\.": "Faster R-CNN with a C4 ResNet",
    BOTTOM_UP + r"base\.stages_0\.": "CenterNet2 with ConvNeXt",
    r"roi_heads\.box_predictor\.(\d\.)?cls_score\.weight": "a detector with fixed classes",
    r"proposal_generator\.centernet_head\.cls_logits\.": "CenterNet with a single stage",
    r"backbone\.attnpool\.": "RegionCLIP (a backbone for classifiers)",
    r"sem_seg_head\.": "a segmenter of Mask2Former",
}
VOCABULARIES = {1203: "lvis", 80: "coco", 365: "o365", 500: "oid500"}  # by the number of classes
LVIS = 1203
IMAGENET21K = 22047  # LVIS's classes come first; the others have no names in the file


def refuse_others(official: Tensors) -> None:
    """Raises InputError, which says what the model is, for a file of an unsupported model."""
    for pattern, model in OTHERS.items():
        if any(re.match(pattern, key) for key in official):
            raise InputError(
                f"they are of {model}, which is not supported; docs/official-weights.md lists the"
                " files that load"
            )


def known_classes(text: Tensor) -> tuple[str, list[str], Tensor]:
    """Returns the dataset, the names and the text (C, D) of the classes with these text rows.

    The dataset is the known one with as many classes. If there is none, it is "official", and the
    names are made up. Of the classes of ImageNet-21k and LVIS, those of LVIS are kept. Warnings
    tell both.
    """
    count = len(text)
    if count == IMAGENET21K:
        message = "the names of %d classes of ImageNet-21k are not in the file: %d of LVIS are kept"
        log.warning(message + "; name any others with --vocabulary", count - LVIS, LVIS)
        text = text[:LVIS]
    if len(text) in VOCABULARIES:
        dataset = VOCABULARIES[len(text)]
        return dataset, list(Vocabulary.known(dataset).names), text
    log.warning("the names of %d classes are not known; name yours with --vocabulary", count)
    return "official", [f"class {i}" for i in range(1, count + 1)], text


def boxed_classes(dataset: str, names: list[str], file: str) -> tuple[str, list[str]]:
    """Returns the name of the training dataset, and its classes that had boxes in training.

    For LVIS the file's name tells, since the tensors do not: "_Lbase" means that rare classes had
    no boxes. The dataset is then "lvis-base". For other datasets, all `names` are returned.

    dataset, names: of the classifier; file: name of the file
    """
    if dataset != "lvis":
        return dataset, names
    if "_Lbase" in file:
        lvis = json.loads((DATA / "vocabularies" / "lvis.json").read_text())
        base = [name for name, group in zip(names, lvis["frequency"]) if group != "r"]
        message = (
            "%s: by its name, %d rare classes of LVIS had no boxes in training: they are novel"
        )
        log.info(message, file, len(names) - len(base))
        return "lvis-base", base
    if "_L" in file:
        log.info("%s: by its name, all classes of LVIS had boxes in training", file)
    else:
        message = (
            "%s: neither its tensors nor its name tell which classes of LVIS had boxes in training;"
            " all count as base (the official names of files without rare ones have '_Lbase')"
        )
        log.warning(message, file)
    return dataset, names


def convert_centernet2(official: Tensors, file: str) -> tuple[Tensors, dict]:
    """Converts a state dict of Detic's CenterNet2. Returns our tensors and the model's metadata.

    The settings are those of the official configuration. The text of the classes becomes the tensor
    "label_space.<dataset>" (C, D), by `known_classes`; `boxed` are those of `boxed_classes`.
    file: the name of the file without its ending
    Raises InputError for another model.
    """
    refuse_others(official)
    tensors = renamed(official, CENTERNET2)
    tensors["backbone.frozen_norm"] = torch.tensor(True)
    blocks = ("inner_blocks", "layer_blocks")
    for block, level, kind in product(blocks, (3, 4, 5), ("weight", "bias")):
        tensor = tensors.pop(f"backbone.fpn.{block}.{level}.0.{kind}")
        tensors[f"backbone.fpn.{block}.{level - 3}.0.{kind}"] = tensor  # ours counts from P3
    columns = tensors.pop("label_space")  # (D, C + 1); the last column is background
    dataset, names, text = known_classes(columns[:, :-1].T)
    tensors[TEXT + dataset] = text
    trained_on, boxed = boxed_classes(dataset, names, file)
    bias = tensors.get("classifiers.0.cls_bias")
    args = {
        "backbone": timm_name(tensors, "backbone.body."),
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
    if dataset != "official":
        args["datasets"] = trained_on
    vocabularies = {dataset: {"names": names, "is_thing": None}}
    return tensors, {"args": args, "vocabularies": vocabularies, "boxed": boxed}


def convert_centernet2_boxes(official: Tensors, file: str) -> tuple[Tensors, dict]:
    """Converts as `convert_centernet2`, without the heads of masks and of WSDDN."""
    tensors, metadata = convert_centernet2(official, file)
    left = {key: t for key, t in tensors.items() if not key.startswith(("mask_head", "prop_score"))}
    if len(left) < len(tensors):
        message = "%s: %d tensors of the heads of masks and image labels are left out"
        log.info(message, file, len(tensors) - len(left))
    args = metadata["args"]
    for name in ("masks", "image_label_loss"):
        del args[name]
    return left, {"args": args, "vocabularies": metadata["vocabularies"]}


def convert_two_stages(official: Tensors, file: str) -> tuple[Tensors, dict]:
    """Converts a state dict of UniDetector: a localizer, or a classifier.

    A localizer is a model. Its classes are said to be COCO's, as the published file's. The metadata
    of a classifier says that it lacks a localizer. The one of an end-to-end model is left out, as
    its proposals are of another kind.
    file: the name of the file without its ending
    Raises InputError for another model.
    """
    if "rpn_head.rpn_obj.weight" in official:
        return convert_localizer(official)
    if "roi_head.bbox_head.attnpool.positional_embedding" not in official:
        refuse_others(official)
    return convert_classifier(official, file)


def convert_localizer(official: Tensors) -> tuple[Tensors, dict]:
    """Converts the first stage of UniDetector, as `convert_two_stages`."""
    tensors = renamed(official, LOCALIZER)
    tensors["localizer.backbone.frozen_norm"] = torch.tensor(True)
    args = {
        "stage": "localizer",
        "backbone": timm_name(tensors, "localizer.backbone.body.") + ".tv_in1k",
        "channels": tensors["localizer.rpn.rpn_conv.weight"].shape[0],
        "fc_dim": tensors["localizer.fc_iou.weight"].shape[1],
        "test_size": 800,
        "rpn_proposals": 2000,
        "datasets": "coco",
    }
    names = list(Vocabulary.known("coco").names)
    return tensors, {"args": args, "vocabularies": {"coco": {"names": names, "is_thing": None}}}


def convert_classifier(official: Tensors, file: str) -> tuple[Tensors, dict]:
    """Converts the second stage of UniDetector, as `convert_two_stages`."""
    tensors = renamed(official, CLASSIFIER)
    tensors["classifiers.0.regions.frozen_norm"] = torch.tensor(True)
    proposals = sum(key.startswith("rpn_head.") for key in official)
    if proposals:
        message = "%s: %d tensors of proposals are left out: the localizer makes them here"
        log.warning(message, file, proposals)
    vocabularies = {}
    for columns in (t for key, t in official.items() if ".zs_weights" in key):  # (D, C + 1)
        dataset, names, text = known_classes(columns[:, :-1].T)
        tensors[TEXT + dataset] = F.normalize(text.float())
        vocabularies[dataset] = {"names": names, "is_thing": None}
    args = {
        "stage": "classifier",
        "classifier_backbone": "RN50/openai",
        "text_encoder": "RN50/openai",
        "prompts": "auto",
        "test_size": 800,
        "tau": 0.01,
        "datasets": ",".join(vocabularies),
    }
    lacks = "the localizer is missing; give its file as well, by a comma: --weights FIRST.pth,"
    return tensors, {"args": args, "vocabularies": vocabularies, "lacks": lacks + file + ".pth"}
