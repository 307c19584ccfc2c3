"""The models of Mask2Former's zoo, and the names and shapes of their tensors: {name: shape}.

They follow the modules that the official code builds: facebookresearch/Mask2Former:MODEL_ZOO.md,
mask2former/modeling/{backbone,pixel_decoder,transformer_decoder}; detectron2's ResNet.
"""

Layout = dict[str, tuple[int, ...]]

# -- The zoo ---------------------------------------------------------------------------------------

# {dataset/task: {backbone: (X of model_final_X.pkl, published PQ, mIoU or mask AP)}}; base-21k is
# the same as base, of other ImageNet weights, as large always is
ZOO = {
    "coco/panoptic": {
        "R50": ("94dc52", 51.9),
        "R101": ("b807bd", 52.6),
        "tiny": ("9fd0ae", 53.2),
        "small": ("a407fd", 54.6),
        "base": ("9d7f02", 55.1),
        "base-21k": ("54b88a", 56.4),
        "large": ("f07440", 57.8),
    },
    "coco/instance": {
        "R50": ("3c8ec9", 43.7),
        "R101": ("eba159", 44.2),
        "tiny": ("86143f", 45.0),
        "small": ("1e7f22", 46.3),
        "base": ("f6e0f6", 46.7),
        "base-21k": ("83d103", 48.1),
        "large": ("e5f453", 50.1),
    },
    "cityscapes/panoptic": {
        "R50": ("4ab90c", 62.1),
        "R101": ("04d286", 62.4),
        "tiny": ("ceba0f", 63.9),
        "small": ("23efb7", 64.8),
        "base-21k": ("fa840f", 66.1),
        "large": ("064788", 66.6),
    },
    "cityscapes/instance": {
        "R50": ("01a8ed", 37.4),
        "R101": ("c2b8c8", 38.5),
        "tiny": ("6a63f8", 39.7),
        "small": ("974824", 41.8),
        "base-21k": ("7a3b6d", 42.0),
        "large": ("dfa862", 43.7),
    },
    "cityscapes/semantic": {
        "R50": ("cc1b1f", 79.4),
        "R101": ("257ce8", 80.1),
        "tiny": ("2d58d4", 82.1),
        "small": ("fa26ae", 82.6),
        "base-21k": ("1c6b65", 83.3),
        "large": ("17c1ee", 83.3),
    },
    "ade20k/panoptic": {"R50": ("5c90d4", 39.7), "large": ("e0c58e", 48.1)},
    "ade20k/instance": {"R50": ("67e945", 26.4), "large": ("92dae9", 34.9)},
    "ade20k/semantic": {
        "R50": ("500878", 47.2),
        "R101": ("0d68be", 47.8),
        "tiny": ("5274a6", 47.7),
        "small": ("011c6d", 51.3),
        "base": ("503e96", 52.4),
        "base-21k": ("7e47bf", 53.9),
        "large": ("6b4a3a", 56.1),
    },
    "mapillary_vistas/panoptic": {"R50": ("4e9874", 36.3), "large": ("132c71", 45.5)},
    "mapillary_vistas/semantic": {"R50": ("6c66d0", 57.4), "large": ("90ee2d", 63.2)},
    "ytvis_2019/video": {
        "R50": ("34112b", 46.4),
        "R101": ("a34dca", 49.2),
        "tiny": ("26fffe", 51.5),
        "small": ("4a5174", 54.3),
        "base-21k": ("221a8a", 59.5),
        "large": ("c5c739", 60.4),
    },
    "ytvis_2021/video": {
        "R50": ("b8aae2", 40.6),
        "R101": ("6efd7a", 42.4),
        "tiny": ("965185", 45.9),
        "small": ("0dec91", 48.6),
        "base-21k": ("a9b925", 52.0),
        "large": ("4da256", 52.6),
    },
}
CLASSES = {
    "coco/panoptic": 133,
    "coco/instance": 80,
    "cityscapes/panoptic": 19,
    "cityscapes/instance": 8,
    "cityscapes/semantic": 19,
    "ade20k/panoptic": 150,
    "ade20k/instance": 100,
    "ade20k/semantic": 150,
    "mapillary_vistas/panoptic": 65,
    "mapillary_vistas/semantic": 65,
    "ytvis_2019/video": 40,
    "ytvis_2021/video": 40,
}


def settings(task: str, backbone: str) -> dict:
    """Returns the arguments of `layout` for a model of the zoo.

    A Swin-L has 200 queries, but for semantic maps. Cityscapes' ResNets, and ADE20K's ResNet-101,
    train their BatchNorm (SyncBN).
    """
    kind = backbone.removesuffix("-21k")
    many = kind == "large" and not task.endswith("semantic")
    trained = task.startswith("cityscapes") or (task, kind) == ("ade20k/semantic", "R101")
    return {
        "backbone": kind,
        "classes": CLASSES[task],
        "queries": 200 if many else 100,
        "trained": trained and kind.startswith("R"),
    }


# -- Tensors ---------------------------------------------------------------------------------------

COUNTERS = ("running_mean", "running_var", "num_batches_tracked")
# channels, blocks of the third stage, side of a window
SWINS = {"tiny": (96, 6, 7), "small": (96, 18, 7), "base": (128, 18, 12), "large": (192, 18, 12)}


def linear(name: str, out: int, *inputs: int) -> Layout:
    """Returns a layer with a bias. inputs: the other sides of its weight"""
    return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Layout:
    """Returns a LayerNorm or GroupNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int, trained: bool) -> Layout:
    """Returns a BatchNorm. detectron2's frozen one has no counter, a trained one has."""
    shapes = norm(name, width) | {f"{name}.{kind}": (width,) for kind in COUNTERS[:2]}
    return shapes | ({f"{name}.{COUNTERS[2]}": ()} if trained else {})


def resnet(blocks: int, trained: bool) -> Layout:
    """Returns detectron2's ResNet with `blocks` in res4: 6 in ResNet-50, 23 in ResNet-101."""
    shapes = {"stem.conv1.weight": (64, 3, 7, 7)} | batch_norm("stem.conv1.norm", 64, trained)
    entering = 64
    for stage, count in zip(range(2, 6), (3, 4, blocks, 3)):
        width = 2 ** (stage + 4)
        for block in range(count):
            name = f"res{stage}.{block}"
            sides = {"conv1": (width, entering, 1, 1), "conv2": (width, width, 3, 3)}
            sides["conv3"] = (4 * width, width, 1, 1)
            if not block:
                sides["shortcut"] = (4 * width, entering, 1, 1)
            for conv, shape in sides.items():
                shapes[f"{name}.{conv}.weight"] = shape
                shapes |= batch_norm(f"{name}.{conv}.norm", shape[0], trained)
            entering = 4 * width
    return shapes


def swin(size: str) -> Layout:
    """Returns D2SwinTransformer. size: a key of SWINS"""
    dim, third, window = SWINS[size]
    shapes = linear("patch_embed.proj", dim, 3, 4, 4) | norm("patch_embed.norm", dim)
    for stage, count in enumerate((2, 2, third, 2)):
        width = dim * 2**stage
        for block in range(count):
            name = f"layers.{stage}.blocks.{block}"
            heads = width // 32
            shapes |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            shapes |= linear(f"{name}.attn.qkv", 3 * width, width)
            shapes |= linear(f"{name}.attn.proj", width, width)
            shapes |= linear(f"{name}.mlp.fc1", 4 * width, width)
            shapes |= linear(f"{name}.mlp.fc2", width, 4 * width)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
        if stage < 3:
            shapes |= norm(f"layers.{stage}.downsample.norm", 4 * width)
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
        shapes |= norm(f"norm{stage}", width)
    return shapes


def pixel_decoder(widths: list[int], c: int, layers: int) -> Layout:
    """Returns MSDeformAttnPixelDecoder. widths: of res2 to res5; c: its channels"""
    shapes = {"transformer.level_embed": (3, c)}
    for i, width in enumerate(reversed(widths[1:])):
        shapes |= linear(f"input_proj.{i}.0", c, width, 1, 1) | norm(f"input_proj.{i}.1", c)
    for i in range(layers):
        name = f"transformer.encoder.layers.{i}"
        shapes |= linear(f"{name}.self_attn.sampling_offsets", 192, c)
        shapes |= linear(f"{name}.self_attn.attention_weights", 96, c)
        shapes |= linear(f"{name}.self_attn.value_proj", c, c)
        shapes |= linear(f"{name}.self_attn.output_proj", c, c)
        shapes |= norm(f"{name}.norm1", c) | norm(f"{name}.norm2", c)
        shapes |= linear(f"{name}.linear1", 4 * c, c) | linear(f"{name}.linear2", c, 4 * c)
    shapes |= linear("mask_features", c, c, 1, 1)
    shapes |= {"adapter_1.weight": (c, widths[0], 1, 1), "layer_1.weight": (c, c, 3, 3)}
    return shapes | norm("adapter_1.norm", c) | norm("layer_1.norm", c)


def predictor(classes: int, queries: int, c: int, layers: int) -> Layout:
    """Returns MultiScaleMaskedTransformerDecoder. c: its channels"""
    shapes = norm("decoder_norm", c) | linear("class_embed", classes + 1, c)
    for table, rows in (("query_feat", queries), ("query_embed", queries), ("level_embed", 3)):
        shapes[f"{table}.weight"] = (rows, c)
    for i in range(3):
        shapes |= linear(f"mask_embed.layers.{i}", c, c)
    for i in range(layers):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"transformer_{kind}_attention_layers.{i}"
            inside = {"in_proj_weight": (3 * c, c), "in_proj_bias": (3 * c,)}
            shapes |= {f"{name}.{attention}.{key}": shape for key, shape in inside.items()}
            shapes |= linear(f"{name}.{attention}.out_proj", c, c) | norm(f"{name}.norm", c)
        name = f"transformer_ffn_layers.{i}"
        shapes |= linear(f"{name}.linear1", 8 * c, c) | linear(f"{name}.linear2", c, 8 * c)
        shapes |= norm(f"{name}.norm", c)
    return shapes


def layout(
    backbone: str, classes: int, queries: int = 100, trained: bool = False, small: bool = False
) -> Layout:
    """Returns a whole model. small: its decoders have 32 channels and few layers"""
    c, encoder_layers, layers = (32, 1, 2) if small else (256, 6, 9)
    if backbone in SWINS:
        body = swin(backbone)
        widths = [SWINS[backbone][0] * 2**stage for stage in range(4)]
    else:
        body = resnet({"R50": 6, "R101": 23}[backbone], trained)
        widths = [256, 512, 1024, 2048]
    head = "sem_seg_head."
    shapes = {f"backbone.{name}": shape for name, shape in body.items()}
    decoder = pixel_decoder(widths, c, encoder_layers)
    shapes |= {f"{head}pixel_decoder.{name}": shape for name, shape in decoder.items()}
    queried = predictor(classes, queries, c, layers)
    shapes |= {f"{head}predictor.{name}": shape for name, shape in queried.items()}
    return shapes | {"criterion.empty_weight": (classes + 1,)}
