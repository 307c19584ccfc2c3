"""Converts official checkpoints of Mask2Former with a ResNet or a Swin.

A rule maps a pattern of official names to our name, or to None: such a tensor is dropped.

Source: facebookresearch/Mask2Former:MODEL_ZOO.md, configs, mask2former/modeling.
"""

import logging
import re

import torch

from common.convert import Tensors, renamed, timm_name
from common.labels import Vocabulary

log = logging.getLogger("concord")

# prefixes of official names; older files lack the part in brackets
PIXELS = r"sem_seg_head\.(?:pixel_decoder\.)?"
QUERIES = r"sem_seg_head\.(?:predictor\.)?"
CROSS = QUERIES + r"transformer_cross_attention_layers\.(\d+)\."
SELF = QUERIES + r"transformer_self_attention_layers\.(\d+)\."
FFN = QUERIES + r"transformer_ffn_layers\.(\d+)\."
LAYER = r"layers\.\d+\.cross_norm\.weight"  # ours, one in each layer of the decoder
Rules = dict[str, str | None]
MASK2FORMER = {
    r"pixel_(mean|std)": None,  # the same as timm's
    r"criterion\.empty_weight": None,  # the weight of "no object", a constant of the loss
    QUERIES + r"class_embed\.(weight|bias)": r"heads.layers.0.\1",
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
for i in range(3):  # linear layers; our numbers also count the ReLUs between them
    MASK2FORMER[QUERIES + rf"mask_embed\.layers\.{i}\.(.+)"] = rf"head.mask_embed.{2 * i}.\1"
for i in range(1, 5):
    block = rf"backbone\.res{i + 1}\.(\d+)\."
    ours = rf"backbone.body.layer{i}.\1."
    MASK2FORMER |= {
        block + r"(conv\d)\.weight": ours + r"\2.weight",
        block + r"conv(\d)\.norm\.(.+)": ours + r"bn\2.\3",
        block + r"shortcut\.weight": ours + "downsample.0.weight",
        block + r"shortcut\.norm\.(.+)": ours + r"downsample.1.\2",
    }
MASK2FORMER |= {  # Swin
    r"backbone\.layers\..+\.relative_position_index": None,  # follows from the window
    r"backbone\.((?:patch_embed|norm\d|layers\.\d\.blocks)\..+)": r"backbone.body.\1",
}
for i in range(3):  # official: the end of a stage; in timm: the start of the next one
    MASK2FORMER[rf"backbone\.layers\.{i}\.(downsample\..+)"] = rf"backbone.body.layers.{i + 1}.\1"

# {number of classes: (dataset that names them, datasets that the head can classify)}
# The official order of the classes is that of our vocabularies.
HEADS = {
    133: ("coco-panoptic", ("coco-panoptic",)),
    80: ("coco", ("coco",)),
    150: ("ade20k", ("ade20k", "ade20k-panoptic")),
    100: ("ade20k", ("ade20k-instances",)),  # the things alone
    19: ("cityscapes", ("cityscapes", "cityscapes-panoptic")),
    8: ("cityscapes", ("cityscapes-instances",)),  # the things alone
    65: ("mapillary", ("mapillary", "mapillary-panoptic")),
}


def convert_mask2former(
    official: Tensors, _: str = "", rules: Rules = MASK2FORMER, queries: str = "query_feat"
) -> tuple[Tensors, dict]:
    """Converts a state dict of Mask2Former. Returns our tensors and the model's metadata.

    The number of classes tells the datasets, see HEADS. Each of them gets a copy of the class head.
    For another number the head is left out with a warning. A training can start from the rest.

    The metadata are `args`, the settings of the model; `base`, its modules but the class heads;
    `vocabularies`, the classes of each dataset; and `own_head`, the settings for their inference.
    rules:   of another model that stands on Mask2Former
    queries: our name of a tensor with a row for each query
    Raises InputError for an unknown backbone, and for a tensor without a rule.
    """
    tensors = renamed(official, rules)
    rows, channels = tensors[queries].shape
    class_head = {kind: tensors.pop(f"heads.layers.0.{kind}") for kind in ("weight", "bias")}
    # frozen BatchNorm has no such counter
    trained_norm = any(key.endswith("num_batches_tracked") for key in official)
    tensors["backbone.frozen_norm"] = torch.tensor(not trained_norm)
    args = {
        "backbone": timm_name(tensors, "backbone.body."),
        "queries": rows,
        "channels": channels,
        "encoder_layers": sum(key.endswith(".self_attn.value_proj.bias") for key in tensors),
        "decoder_layers": sum(bool(re.match(LAYER, key)) for key in tensors),
    }
    metadata = {"args": args, "base": sorted({key.partition(".")[0] for key in tensors})}
    classes = len(class_head["bias"]) - 1  # the last column is "no object"
    source, datasets = HEADS.get(classes, ("", ()))
    if not datasets:
        log.warning("%d classes are those of no known dataset: their head is left out", classes)
    vocabularies = {}
    for i, dataset in enumerate(datasets):
        vocabularies[dataset] = classes_of(source, classes)
        for kind, tensor in class_head.items():
            tensors[f"heads.layers.{i}.{kind}"] = tensor.clone()
    own_head = {
        "classifier": "heads",
        "panoptic_rule": "mask2former",
        "object_threshold": 0.0 if source == "mapillary" else 0.8,
    }
    larger = ("swin_base", "swin_large")
    if classes == 150 and rows == 100 and args["backbone"].startswith(larger):
        own_head["image_size"] = 640  # a semantic model: the panoptic Swin-L has 200 queries
    return tensors, metadata | {"vocabularies": vocabularies, "own_head": own_head}


def convert_mask2former_base(official: Tensors, _: str = "") -> tuple[Tensors, dict]:
    """Converts as `convert_mask2former`, but without the class heads: text classifies instead."""
    tensors, metadata = convert_mask2former(official)
    tensors = {key: t for key, t in tensors.items() if not key.startswith("heads.")}
    return tensors, {"args": metadata["args"], "base": metadata["base"], "vocabularies": {}}


def classes_of(dataset: str, count: int) -> dict:
    """Returns `names` and `is_thing` of the classes of a known dataset.

    count: number of classes; if the dataset has more, only its things are returned
    """
    known = Vocabulary.known(dataset)
    if len(known) == count:
        return {"names": known.names, "is_thing": known.is_thing}
    names = [name for name, thing in zip(known.names, known.is_thing) if thing]
    return {"names": names, "is_thing": [True] * count}
