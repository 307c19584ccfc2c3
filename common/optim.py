"""Learning-rate schedules and the parameter groups of the optimiser."""

import logging
import math

from torch import nn

log = logging.getLogger("concord")


def scaled_lr(lr: float, args) -> float:
    """Returns `lr`, which is meant for --base-batch-size images, scaled to --batch-size."""
    scaled = lr * args.batch_size / args.base_batch_size
    log.info(
        "lr %g for %d images per step -> %g for %d",
        lr,
        args.base_batch_size,
        scaled,
        args.batch_size,
    )
    return scaled


def learning_rate(step: int, base: float, steps: int, warmup: int, warmup_factor: float) -> float:
    """Linear warmup from `warmup_factor`, then half a cosine to 0 (facebookresearch/Detic:detic/custom_solver.py)."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    ramp = warmup_factor + (1 - warmup_factor) * min(1.0, step / warmup) if warmup else 1.0
    return base * cosine * ramp


def stepped_learning_rate(
    step: int, base: float, steps: int, warmup: int, warmup_factor: float
) -> float:
    """Linear warmup over at most a tenth of the steps; a tenth from 8/12 on, a hundredth from 11/12 (mmdetection)."""
    warmup = min(warmup, steps // 10)
    ramp = warmup_factor + (1 - warmup_factor) * min(1.0, step / warmup) if warmup else 1.0
    return base * ramp * 0.1 ** sum(step >= steps * epoch / 12 for epoch in (8, 11))


def poly_learning_rate(step: int, base: float, steps: int) -> float:
    """base (1 - step / steps)^0.9, without warmup (facebookresearch/Mask2Former:configs/ade20k)."""
    return base * (1 - step / steps) ** 0.9


def parameter_groups(model: nn.Module, weight_decay: float, backbone_factor: float) -> list[dict]:
    """Groups for AdamW: `lr_factor` multiplies the rate of the group, `backbone_factor` in the backbone, else 1.

    A factor of 0 freezes the backbone: no gradient is computed for it.
    Normalisation layers and the model's own tensors (queries, codes, temperatures: names without a dot) do not decay.
    Source: facebookresearch/Mask2Former:train_net.py (build_optimizer), where queries and codes are embeddings.
    """
    if not backbone_factor:
        model.backbone.requires_grad_(False).eval()
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    of_norms = {
        f"{m}.{p}"
        for m, module in model.named_modules()
        if isinstance(module, norms)
        for p in module._parameters
    }
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = backbone_factor if name.startswith("backbone.") else 1.0
            decay = 0.0 if name in of_norms or "." not in name else weight_decay
            group = groups.setdefault(
                (factor, decay), {"params": [], "lr_factor": factor, "weight_decay": decay}
            )
            group["params"].append(parameter)
    return list(groups.values())
