"""The models of OneFormer's zoo, and the names and shapes of their tensors: {name: shape}.

They follow the modules that the official code builds: SHI-Labs/OneFormer:README.md,
oneformer/modeling/transformer_decoder/{oneformer_transformer_decoder,transformer,
text_transformer}.py.
"""

from benchmarks import mask2former_layouts
from benchmarks.mask2former_layouts import CLASSES, Layout, linear, norm

# {dataset: {backbone: {file: published PQ}}}
ZOO = {
    "ade20k": {
        "large": {
            "250_16_swin_l_oneformer_ade20k_160k": 49.8,
            "896x896_250_16_swin_l_oneformer_ade20k_160k": 51.1,
            "1280x1280_250_16_swin_l_oneformer_ade20k_160k": 51.4,
        }
    },
    "cityscapes": {"large": {"250_16_swin_l_oneformer_cityscapes_90k": 67.2}},
    "coco": {"large": {"150_16_swin_l_oneformer_coco_100ep": 57.9}},
    "mapillary_vistas": {"large": {"250_16_swin_l_oneformer_mapillary_300k": 46.7}},
}


def settings(dataset: str, file: str) -> dict:
    """Returns the arguments of `layout` for a file of the zoo. Its name begins with the queries."""
    *_, queries, context = file.partition("_swin")[0].split("_")
    counts = {"queries": int(queries), "context": int(context)}
    return counts | {"classes": CLASSES[f"{dataset}/panoptic"]}


def attention(name: str, c: int) -> Layout:
    """Returns nn.MultiheadAttention."""
    inside = {f"{name}.in_proj_weight": (3 * c, c), f"{name}.in_proj_bias": (3 * c,)}
    return inside | linear(f"{name}.out_proj", c, c)


def class_transformer(c: int) -> Layout:
    """Returns DETR's decoder, of two layers, and the convolution that makes its keys."""
    shapes = linear("class_input_proj", c, c, 1, 1) | norm("class_transformer.decoder.norm", c)
    for i in range(2):
        name = f"class_transformer.decoder.layers.{i}"
        shapes |= attention(f"{name}.self_attn", c) | attention(f"{name}.multihead_attn", c)
        shapes |= linear(f"{name}.linear1", 8 * c, c) | linear(f"{name}.linear2", c, 8 * c)
        for number in (1, 2, 3):
            shapes |= norm(f"{name}.norm{number}", c)
    return shapes


def text_side(c: int, context: int) -> Layout:
    """Returns what is compared with the queries in training."""
    encoder = {"token_embedding.weight": (49_408, c), "positional_embedding": (77, c)}
    encoder |= norm("ln_final", c)
    for i in range(6):
        name = f"transformer.resblocks.{i}"
        encoder |= attention(f"{name}.attn", c)
        encoder |= norm(f"{name}.ln_1", c) | norm(f"{name}.ln_2", c)
        encoder |= linear(f"{name}.mlp.c_fc", 4 * c, c) | linear(f"{name}.mlp.c_proj", c, 4 * c)
    shapes = {f"text_encoder.{name}": shape for name, shape in encoder.items()}
    for i in range(2):
        shapes |= linear(f"text_projector.layers.{i}", c, c)
    return shapes | {"prompt_ctx.weight": (context, c)}


def layout(
    backbone: str,
    classes: int,
    queries: int = 150,
    context: int = 16,
    text: bool = True,
    small: bool = False,
) -> Layout:
    """Returns a whole model. small: as in Mask2Former's; text: with the parts for training alone"""
    shapes = mask2former_layouts.layout(backbone, classes, queries, small=small)
    predictor = "sem_seg_head.predictor."
    _, c = shapes.pop(f"{predictor}query_feat.weight")
    shapes |= {f"{predictor}{name}": shape for name, shape in class_transformer(c).items()}
    shapes |= linear("task_mlp.layers.0", c, 77) | linear("task_mlp.layers.1", c, c)
    shapes |= text_side(c, context) if text else {}
    return shapes | {"criterion.logit_scale": ()}
