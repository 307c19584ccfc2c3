"""Converts official checkpoints of OneFormer with a ResNet or a Swin. Its base is Mask2Former.

Source: SHI-Labs/OneFormer:README.md, configs, oneformer/modeling.
"""

import re

from common.convert import Tensors
from common.official_mask2former import MASK2FORMER, QUERIES, convert_mask2former

CLASS = QUERIES + r"class_transformer\.decoder\."
CLASS_LAYER = CLASS + r"layers\.(\d+)\."
TEXT_LAYER = r"text_encoder\.transformer\.resblocks\.(\d+)\."
ONEFORMER = MASK2FORMER | {
    QUERIES + r"class_input_proj\.(.+)": r"class_input_proj.\1",
    CLASS + r"norm\.(.+)": r"class_norm.\1",
    CLASS_LAYER + r"self_attn\.(.+)": r"class_layers.\1.self_attn.\2",
    CLASS_LAYER + r"multihead_attn\.(.+)": r"class_layers.\1.cross_attn.\2",
    CLASS_LAYER + r"norm1\.(.+)": r"class_layers.\1.self_norm.\2",
    CLASS_LAYER + r"norm2\.(.+)": r"class_layers.\1.cross_norm.\2",
    CLASS_LAYER + r"norm3\.(.+)": r"class_layers.\1.ffn_norm.\2",
    CLASS_LAYER + r"(linear\d\..+)": r"class_layers.\1.\2",
    TEXT_LAYER + r"(attn\..+|ln_\d\..+)": r"text_encoder.blocks.\1.\2",
    TEXT_LAYER + r"mlp\.(c_.+)": r"text_encoder.blocks.\1.\2",
    r"(text_encoder\.(?:ln_final|token_embedding)\..+)": r"\1",
    r"(text_encoder\.positional_embedding)": r"\1",
    r"prompt_ctx\.weight": "context",
    r"criterion\.(logit_scale)": r"\1",
}
for module in ("task_mlp", "text_projector"):  # our numbers also count the ReLU between the layers
    for i in range(2):
        ONEFORMER[rf"{module}\.layers\.{i}\.(.+)"] = rf"{module}.{2 * i}.\1"

# {dataset: (short side of test images, long side, threshold of segments)}
TESTS = {
    "coco-panoptic": (800, 1333, 0.8),
    "ade20k": (512, 2048, 0.5),
    "cityscapes": (1024, 2048, 0.8),
    "mapillary": (2048, 2048, 0.8),
}


def convert_oneformer(official: Tensors, name: str = "") -> tuple[Tensors, dict]:
    """Converts a state dict of OneFormer. Returns our tensors and the model's metadata.

    They are as those of `convert_mask2former`. A file for inference has no text encoder, and so has
    its model. Test sizes and thresholds are those of the official configurations.
    name: of the file; a size in it, as in "896x896_250_16_swin_l_...", is that of test images

    Raises InputError as `convert_mask2former`.
    """
    tensors, metadata = convert_mask2former(official, rules=ONEFORMER, queries="query_embed")
    contrastive = "context" in tensors
    if not contrastive:  # the loss's temperature may be there all the same
        tensors = {key: t for key, t in tensors.items() if key != "logit_scale"}
    metadata["base"] = sorted({key.partition(".")[0] for key in tensors} - {"heads"})
    metadata["args"]["contrastive"] = contrastive
    if contrastive:
        metadata["args"]["context"] = len(tensors["context"])
    dataset = next(iter(metadata["vocabularies"]), "")
    if dataset in TESTS:
        short, longest, threshold = TESTS[dataset]
        side = re.match(r"(?:.*_)?(\d+)x\1_", name)
        if dataset == "ade20k" and side:
            short = int(side[1])
        elif dataset == "ade20k" and "swin" in metadata["args"]["backbone"]:
            short = 640
        longest = 4 * short if dataset == "ade20k" else longest
        own = {"test_size": short, "test_longest": longest, "object_threshold": threshold}
        metadata["own_head"] = own
    return tensors, metadata
