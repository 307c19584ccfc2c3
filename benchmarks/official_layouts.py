"""Names and shapes of the tensors in official checkpoints, made by rules: {name: shape}.

They follow the modules that the official code builds: facebookresearch/Detic:detic/modeling,
xingyizhou/CenterNet2:centernet/modeling, zhenyuw16/UniDetector:mmdet/models (mmdet 2.18),
microsoft/RegionCLIP:detectron2/modeling, openai/CLIP:clip/model.py, and detectron2's ResNet. Of a
model that is refused there are only those tensors that tell what it is.
"""

import torch
from torch import Tensor

Layout = dict[str, tuple[int, ...]]
R18 = (2, 2, 2, 2)  # blocks of the stages
R50 = (3, 4, 6, 3)
R50X4 = (4, 6, 10, 6)  # CLIP's


def tensors(layout: Layout, device: str = "meta") -> dict[str, Tensor]:
    """Returns tensors of these names and shapes: 0 on a real device, without values on "meta"."""
    return {name: torch.zeros(shape, device=device) for name, shape in layout.items()}


def within(prefix: str, layout: Layout) -> Layout:
    """Returns the layout with a prefix before each name."""
    return {prefix + name: shape for name, shape in layout.items()}


# -- Layers ----------------------------------------------------------------------------------------


def layer(name: str, *shape: int, bias: bool = True) -> Layout:
    """Returns a convolution or linear layer whose weight has this shape."""
    layout = {f"{name}.weight": shape}
    if bias:
        layout[f"{name}.bias"] = shape[:1]
    return layout


def norm(name: str, channels: int) -> Layout:
    """Returns the scale and shift of a LayerNorm or GroupNorm."""
    return layer(name, channels)


def batch_norm(name: str, channels: int) -> Layout:
    """Returns a BatchNorm without its counter, as detectron2's frozen one."""
    layout = norm(name, channels)
    for statistic in ("mean", "var"):
        layout[f"{name}.running_{statistic}"] = (channels,)
    return layout


def counted(layout: Layout) -> Layout:
    """Returns the layout with the counters of its BatchNorms."""
    norms = [name for name in layout if name.endswith("running_var")]
    return layout | {name.replace("running_var", "num_batches_tracked"): () for name in norms}


# -- Backbones -------------------------------------------------------------------------------------


def resnet(depths: tuple[int, ...], bottleneck: bool = True) -> Layout:
    """Returns the ResNet of torchvision and timm, without its classifier."""
    layout = layer("conv1", 64, 3, 7, 7, bias=False) | batch_norm("bn1", 64)
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        out = 4 * width if bottleneck else width
        convs = [(width, 1), (width, 3), (out, 1)] if bottleneck else [(width, 3), (width, 3)]
        for block in range(depth):
            name = f"layer{stage + 1}.{block}."
            if block == 0 and channels != out:
                layout |= layer(name + "downsample.0", out, channels, 1, 1, bias=False)
                layout |= batch_norm(name + "downsample.1", out)
            for i, (wide, side) in enumerate(convs, 1):
                layout |= layer(f"{name}conv{i}", wide, channels, side, side, bias=False)
                layout |= batch_norm(f"{name}bn{i}", wide)
                channels = wide
    return layout


def detectron2_resnet() -> Layout:
    """Returns the ResNet-50 of detectron2: torchvision's under other names."""
    layout = {}
    for name, shape in resnet(R50).items():
        stage, _, rest = name.rpartition("layer")[2].partition(".")
        if name.startswith("layer"):
            block, part, leaf = rest.split(".", 2)
            if part == "downsample":
                leaf = leaf.replace("0.", "shortcut.").replace("1.", "shortcut.norm.")
            else:
                leaf = f"{part.replace('bn', 'conv')}.{'norm.' * ('bn' in part)}{leaf}"
            layout[f"res{int(stage) + 1}.{block}.{leaf}"] = shape
        else:
            layout["stem." + name.replace("bn1.", "conv1.norm.")] = shape
    return layout


def clip_resnet(depths: tuple[int, ...], width: int) -> Layout:
    """Returns the four stages of CLIP's ResNet, and its stem of three convolutions."""
    layout = {}
    channels = 3
    for i, out in enumerate((width // 2, width // 2, width), 1):
        layout |= layer(f"conv{i}", out, channels, 3, 3, bias=False) | batch_norm(f"bn{i}", out)
        channels = out
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}."
            if block == 0:
                layout |= layer(name + "downsample.0", 4 * planes, channels, 1, 1, bias=False)
                layout |= batch_norm(name + "downsample.1", 4 * planes)
            convs = [(planes, channels, 1), (planes, planes, 3), (4 * planes, planes, 1)]
            for i, (out, into, side) in enumerate(convs, 1):
                layout |= layer(f"{name}conv{i}", out, into, side, side, bias=False)
                layout |= batch_norm(f"{name}bn{i}", out)
            channels = 4 * planes
    return layout


def attention_pool(side: int, channels: int, out: int) -> Layout:
    """Returns CLIP's attention pool of maps with side x side cells."""
    layout = {"attnpool.positional_embedding": (side**2 + 1, channels)}
    for part in "kqv":
        layout |= layer(f"attnpool.{part}_proj", channels, channels)
    return layout | layer("attnpool.c_proj", out, channels)


def clip_text(width: int, out: int) -> Layout:
    """Returns CLIP's text tower of twelve blocks."""
    layout = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, out),
    }
    for block in range(12):
        name = f"transformer.resblocks.{block}."
        layout |= norm(name + "ln_1", width) | norm(name + "ln_2", width)
        layout |= {name + "attn.in_proj_weight": (3 * width, width)}
        layout |= {name + "attn.in_proj_bias": (3 * width,)}
        layout |= layer(name + "attn.out_proj", width, width)
        layout |= layer(name + "mlp.c_fc", 4 * width, width)
        layout |= layer(name + "mlp.c_proj", width, 4 * width)
    return layout | norm("ln_final", width)


def swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int = 7) -> Layout:
    """Returns the Swin Transformer of Detic, with a norm on the maps of strides 8, 16 and 32."""
    layout = layer("patch_embed.proj", width, 3, 4, 4) | norm("patch_embed.norm", width)
    for stage, depth in enumerate(depths):
        channels = width * 2**stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}."
            layout |= norm(name + "norm1", channels) | norm(name + "norm2", channels)
            table = ((2 * window - 1) ** 2, heads[stage])
            layout[name + "attn.relative_position_bias_table"] = table
            layout[name + "attn.relative_position_index"] = (window**2, window**2)
            layout |= layer(name + "attn.qkv", 3 * channels, channels)
            layout |= layer(name + "attn.proj", channels, channels)
            layout |= layer(name + "mlp.fc1", 4 * channels, channels)
            layout |= layer(name + "mlp.fc2", channels, 4 * channels)
        if stage < 3:
            name = f"layers.{stage}.downsample."
            layout |= norm(name + "norm", 4 * channels)
            layout |= layer(name + "reduction", 2 * channels, 4 * channels, bias=False)
            layout |= norm(f"norm{stage + 1}", 2 * channels)
    return layout


# -- Detic and CenterNet2 --------------------------------------------------------------------------


def fpn(channels: tuple[int, ...], wide: int = 256) -> Layout:
    """Returns detectron2's FPN of maps with these channels: P3 to P7."""
    layout = {}
    for level, into in enumerate(channels, 3):
        layout |= layer(f"fpn_lateral{level}", wide, into, 1, 1)
        layout |= layer(f"fpn_output{level}", wide, wide, 3, 3)
    return (
        layout | layer("top_block.p6", wide, wide, 3, 3) | layer("top_block.p7", wide, wide, 3, 3)
    )


def centernet(wide: int = 256) -> Layout:
    """Returns CenterNet's head that proposes boxes without a class."""
    layout = layer("agn_hm", 1, wide, 3, 3) | layer("bbox_pred", 4, wide, 3, 3)
    for i in range(4):
        layout |= layer(f"bbox_tower.{3 * i}", wide, wide, 3, 3)
        layout |= norm(f"bbox_tower.{3 * i + 1}", wide)
    return layout | {f"scales.{level}.scale": (1,) for level in range(5)}


def cascade(classes: int, counted_classes: int, wide: int = 256, fc: int = 1024) -> Layout:
    """Returns the three stages of boxes and classes. The classifier is text of 512 dimensions.

    counted_classes: those in the class frequencies of the federated loss; 0 for none
    """
    layout = {}
    for stage in range(3):
        head, predictor = f"box_head.{stage}.", f"box_predictor.{stage}."
        layout |= layer(head + "fc1", fc, wide * 49) | layer(head + "fc2", fc, fc)
        layout |= layer(predictor + "bbox_pred.0", fc, fc) | layer(predictor + "bbox_pred.2", 4, fc)
        layout |= layer(predictor + "cls_score.linear", 512, fc)
        layout[predictor + "cls_score.zs_weight"] = (512, classes + 1)
        if counted_classes:
            layout[predictor + "freq_weight"] = (counted_classes,)
    return layout


def mask_head(wide: int = 256) -> Layout:
    """Returns the head of class-agnostic masks."""
    layout = layer("deconv", wide, wide, 2, 2) | layer("predictor", 1, wide, 1, 1)
    for i in range(1, 5):
        layout |= layer(f"mask_fcn{i}", wide, wide, 3, 3)
    return layout


def detic(
    backbone: str, classes: int = 1203, captions: bool = False, wide: int = 256, fc: int = 1024
) -> Layout:
    """Returns a CenterNet2 of Detic. backbone: R50, R18 or SwinB; captions: with CLIP's text tower.

    wide: channels of FPN and heads; fc: width of the box heads
    """
    if backbone == "SwinB":
        layout = within("backbone.bottom_up.", swin(128, (2, 2, 18, 2), (4, 8, 16, 32)))
        channels = (256, 512, 1024)
    elif backbone == "R18":
        layout = within("backbone.bottom_up.base.", resnet(R18, bottleneck=False))
        channels = (128, 256, 512)
    else:
        layout = within("backbone.bottom_up.base.", resnet(R50) | layer("fc", 11221, 2048))
        channels = (512, 1024, 2048)
    layout |= within("backbone.", fpn(channels, wide))
    layout |= within("proposal_generator.centernet_head.", centernet(wide))
    counted_classes = 0 if classes == 22047 else classes
    layout |= within("roi_heads.", cascade(classes, counted_classes, wide, fc))
    layout |= within("roi_heads.mask_head.", mask_head(wide))
    if captions:
        layout |= within("text_encoder.", clip_text(512, 512))
    return layout


def detic_convnext() -> Layout:
    """Returns the stem and first block of ConvNeXt-T in timm 0.5.4, and the rest of Detic."""
    layout = layer("stem_0", 96, 3, 4, 4) | norm("stem_1", 96)
    layout |= {"stages_0.blocks.0.gamma": (96,)}
    layout |= layer("stages_0.blocks.0.conv_dw", 96, 1, 7, 7)
    rest = {name: t for name, t in detic("R18", 22047).items() if "bottom_up" not in name}
    return within("backbone.bottom_up.base.", layout) | rest


def detic_c4() -> Layout:
    """Returns the Faster R-CNN C4 of Detic's open-vocabulary COCO."""
    layout = {}
    for name, shape in detectron2_resnet().items():
        is_head = name.startswith("res5.")
        layout[("roi_heads." if is_head else "backbone.") + name] = shape
    rpn = layer("conv", 1024, 1024, 3, 3)
    rpn |= layer("objectness_logits", 15, 1024, 1, 1) | layer("anchor_deltas", 60, 1024, 1, 1)
    head = layer("bbox_pred.0", 2048, 2048) | layer("bbox_pred.2", 4, 2048)
    head |= layer("cls_score.linear", 512, 2048)
    head |= {"cls_score.zs_weight": (512, 81), "freq_weight": (80,)}
    layout |= within("proposal_generator.rpn_head.", rpn)
    return layout | within("roi_heads.box_predictor.", head)


def detic_deformable() -> Layout:
    """Returns the backbone and a layer of Detic's Deformable DETR."""
    layout = within("detr.backbone.0.backbone.", detectron2_resnet())
    name = "detr.transformer.encoder.layers.0.self_attn."
    layout |= layer(name + "sampling_offsets", 256, 256)
    layout |= layer(name + "attention_weights", 128, 256)
    return layout | layer("detr.class_embed.0", 1203, 256)


def centernet2(classes: int) -> Layout:
    """Returns the CenterNet2 of the first paper with a ResNet-50 and linear classifiers."""
    layout = within("backbone.bottom_up.", detectron2_resnet())
    layout |= within("backbone.", fpn((512, 1024, 2048)))
    layout |= within("proposal_generator.centernet_head.", centernet())
    for stage in range(3):
        predictor = f"roi_heads.box_predictor.{stage}."
        layout |= layer(predictor + "cls_score", classes + 1, 1024)
        layout |= layer(predictor + "bbox_pred", 4, 1024)
    return layout


def centernet2_faster() -> Layout:
    """Returns the predictor of a CenterNet2 with a single second stage."""
    head = layer("cls_score", 81, 1024) | layer("bbox_pred", 320, 1024)
    return within("roi_heads.box_predictor.", head)


def centernet_one_stage() -> Layout:
    """Returns the head of a CenterNet without a second stage."""
    head = layer("cls_logits", 80, 256, 3, 3) | layer("bbox_pred", 4, 256, 3, 3)
    return within("proposal_generator.centernet_head.", head)


# -- UniDet ----------------------------------------------------------------------------------------


def unidet() -> Layout:
    """Returns a classifier of a UniDet. Nothing of its detector fits ours."""
    return {"roi_heads.box_predictor.0.cls_score.0.weight": (81, 1024)}


# -- UniDetector and RegionCLIP --------------------------------------------------------------------


def localizer(fc: int = 1024) -> Layout:
    """Returns the first stage of UniDetector: ResNet-50, FPN, RPN and a box head."""
    layout = within("backbone.", resnet(R50))
    for level, channels in enumerate((256, 512, 1024, 2048)):
        layout |= layer(f"neck.lateral_convs.{level}.conv", 256, channels, 1, 1)
        layout |= layer(f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
    layout |= layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    for name, out in [("cls", 1), ("reg", 4), ("obj", 1)]:
        layout |= layer(f"rpn_head.rpn_{name}", out, 256, 1, 1)
    head = layer("shared_fcs.0", fc, 256 * 49) | layer("shared_fcs.1", fc, fc)
    for name, out in [("fc_cls", 2), ("fc_reg", 4), ("fc_bbox_score", 1)]:
        head |= layer(name, out, fc)
    return counted(layout | within("roi_head.bbox_head.", head))


def classifier(classes: int = 80) -> Layout:
    """Returns the second stage of UniDetector: CLIP's RN50 on regions."""
    layout = {}
    for name, shape in clip_resnet(R50, 64).items():
        is_head = name.startswith("layer4.")
        layout[("roi_head.shared_head." if is_head else "backbone.") + name] = shape
    head = attention_pool(7, 2048, 1024) | layer("fc_reg", 4, 1024)
    head |= {"zs_weights": (1024, classes + 1)}
    return counted(layout | within("roi_head.bbox_head.", head))


def end_to_end() -> Layout:
    """Returns UniDetector's end-to-end baseline: its second stage with a plain RPN."""
    rpn = layer("rpn_conv", 1024, 1024, 3, 3)
    rpn |= layer("rpn_cls", 15, 1024, 1, 1) | layer("rpn_reg", 60, 1024, 1, 1)
    return classifier() | within("rpn_head.", rpn)


def regionclip(model: str = "RN50", part: str = "lang_encoder.") -> Layout:
    """Returns a RegionCLIP: CLIP's ResNet, and other parts, of which `part` selects some.

    model: RN50 or RN50x4
    """
    depths, width, side, out = {"RN50": (R50, 64, 7, 1024), "RN50x4": (R50X4, 80, 9, 640)}[model]
    visual = clip_resnet(depths, width) | attention_pool(side, 32 * width, out)
    others = {
        "lang_encoder.": clip_text(512 if model == "RN50" else 640, out),
        "teacher_backbone.": visual,
        "roi_heads.box_predictor.": layer("cls_score", 48, out) | layer("bbox_pred", 4, out),
    }
    return within("backbone.", visual) | within(part, others[part])


def regionclip_rpn() -> Layout:
    """Returns the backbone and a layer of the RPN that RegionCLIP takes its regions from."""
    layout = within("backbone.", detectron2_resnet())
    return layout | layer("proposal_generator.rpn_head.conv", 1024, 1024, 3, 3)
