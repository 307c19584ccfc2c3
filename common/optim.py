"""Learning-rate schedules and the parameter groups of the optimiser."""

import logging
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.backbone import Backbone
from common.fsdp import Sharding

log = logging.getLogger("concord")

# position codes, and tokens of a ViT, by the last part of the parameter's name
POSITIONS = ("relative_position_bias_table", "pos_embed", "cls_token", "reg_token")
UNDECAYED = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.Embedding)


def scaled_lr(lr: float, args: Any) -> float:
    """Scales `lr` linearly from --base-batch-size, for which it is meant, to --batch-size."""
    base = args.base_batch_size
    size = args.batch_size
    scaled = lr * size / base
    log.info("lr %g for %d images per step -> %g for %d", lr, base, scaled, size)
    return scaled


def learning_rate(step: int, base: float, steps: int, warmup: int, warmup_factor: float) -> float:
    """Returns the rate at `step`: base (1 + cos(pi step / steps)) / 2, after a straight warmup.

    The line starts at base * warmup_factor and meets the cosine after `warmup` steps.
    Source: facebookresearch/detectron2:detectron2/solver/lr_scheduler.py (WarmupParamScheduler).
    """
    angle = math.pi * max(step, warmup) / steps
    cosine = 0.5 * (1 + math.cos(angle))
    if step >= warmup:
        return base * cosine
    progress = step / warmup
    return base * (warmup_factor + (cosine - warmup_factor) * progress)


def stepped_learning_rate(
    step: int,
    base: float,
    steps: int,
    warmup: int,
    warmup_factor: float,
    ends: tuple[float, ...] = (8 / 12, 11 / 12),
) -> float:
    """Returns `base`, a tenth of it from ends[0] of the steps on, a hundredth from ends[1] on.

    The result is multiplied by `warmup_ramp`, whose warmup takes at most a tenth of the steps.
    Source: mmdetection's schedule_1x has the default ends.
    """
    decays = 0
    for end in ends:
        if step >= steps * end:
            decays += 1
    warmup = min(warmup, steps // 10)
    ramp = warmup_ramp(step, warmup, warmup_factor)
    return base * ramp * 0.1**decays


def poly_learning_rate(step: int, base: float, steps: int) -> float:
    """Returns base (1 - step / steps)^0.9. Source: facebookresearch/Mask2Former:configs/ade20k."""
    remaining = 1 - step / steps
    return base * remaining**0.9


def warmup_ramp(step: int, warmup: int, factor: float) -> float:
    """Returns a multiplier that grows linearly from `factor` to 1 in `warmup` steps and stays 1."""
    if not warmup:
        return 1.0
    progress = min(1.0, step / warmup)
    return factor + (1 - factor) * progress


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Gives each group of parameters `rate` times its `lr_factor`, which is 1 if it has none."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def sgd(parameters: list[nn.Parameter] | list[dict], lr: float, weight_decay: float) -> Optimizer:
    """Returns SGD with momentum 0.9, with fused=True, so that it heeds `found_inf`.

    PyTorch's own needs the first gradients of all parameters in the same step. Here a parameter,
    such as one of a head that not every batch trains, may get its first one in any step.
    With --fsdp it is not fused, since torch has no such kernel for shards, and the host waits to
    read `found_inf`.
    """
    fused = not Sharding.on
    settings = {"momentum": 0.9, "weight_decay": weight_decay, "fused": fused}
    optimizer = torch.optim.SGD(parameters, lr=lr, **settings)
    if not fused:
        optimizer.register_step_pre_hook(_heed_found_inf)
        optimizer.register_step_post_hook(_return_found_inf)
    optimizer.register_step_pre_hook(_start_momentum)
    return optimizer


def _heed_found_inf(optimizer: Optimizer, *_) -> None:
    """Removes the gradients, so that nothing changes, if `found_inf` says so. Sets it aside."""
    optimizer.aside = optimizer.__dict__.pop("found_inf", None)
    if optimizer.aside is not None and optimizer.aside.item():
        optimizer.zero_grad(set_to_none=True)


def _return_found_inf(optimizer: Optimizer, *_) -> None:
    """Returns what was set aside, as what follows the update needs it (--ema)."""
    optimizer.found_inf = optimizer.__dict__.pop("aside")


def _start_momentum(optimizer: Optimizer, *_) -> None:
    """Starts the momentum of parameters at zero, with which the first step is as without."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state
            if parameter.grad is not None and parameter not in state:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def trained_groups(model: nn.Module) -> list[dict]:
    """Returns an optimizer's parameter groups, dicts of `params` and `lr_factor`.

    `lr_factor` is that of `Backbone.lr_factor` in each backbone of the model, and 1 elsewhere. The
    training multiplies the learning rate by it. Frozen parameters are in no group. A model whose
    factors are all 1 has one group, with its parameters in their order.
    """
    factors = {}
    for module in model.modules():
        if isinstance(module, Backbone):
            for name, parameter in module.named_parameters():
                factors[id(parameter)] = module.lr_factor(name)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = groups.setdefault(factors.get(id(parameter), 1.0), [])
            group.append(parameter)
    return [{"params": params, "lr_factor": factor} for factor, params in groups.items()]


def parameter_groups(
    model: nn.Module, weight_decay: float, decayed: tuple[str, ...] = ()
) -> list[dict]:
    """Returns AdamW's parameter groups, dicts of `params`, `lr_factor` and `weight_decay`.

    `lr_factor` is that of `Backbone.lr_factor` in `model.backbone`, and 1 elsewhere. The training
    multiplies the learning rate by it. Frozen parameters are in no group. `weight_decay` is 0 for
    normalisation layers and embeddings, for POSITIONS, and for the parameters that `model` itself
    owns, such as queries, codes and temperatures, but for those named in `decayed`.

    Source: facebookresearch/Mask2Former:train_net.py (build_optimizer). Its queries are embeddings.
    """
    of_layers = set()
    for module in model.modules():
        if isinstance(module, UNDECAYED):
            own = module.parameters(recurse=False)
            of_layers.update(id(parameter) for parameter in own)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # a parameter of a submodule is called module.parameter
        of_model_itself = "." not in name and name not in decayed
        is_position = name.rpartition(".")[2] in POSITIONS
        undecayed = of_model_itself or is_position or id(parameter) in of_layers
        module, _, rest = name.partition(".")
        factor = model.backbone.lr_factor(rest) if module == "backbone" else 1.0
        decay = 0.0 if undecayed else weight_decay
        group = groups.setdefault((factor, decay), [])
        group.append(parameter)
    listed = []
    for (factor, decay), parameters in groups.items():
        group = {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        listed.append(group)
    return listed
