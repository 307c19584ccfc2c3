"""The visual aggregator: a transformer that makes one vector per class of its pictures' features.

Source: prannaykaul/mm-ovod:tools/generate_vision_classifier_agg.py (the network; its published
weights load as they are). Its training is not in that code, and we could not read the paper: the
loss here, InfoNCE, and the settings marked "ours" are our choice.

Shapes: N classes, K features of a class, D their width.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.console import progress_bar
from common.errors import InputError
from common.weight_files import read_tensors

HEADS = 8
LAYERS = 4
TAU = 0.07  # ours
BATCH = 256  # ours: classes of a step


class SelfAttention(nn.Module):
    """Applies multi-head self-attention. Only the output has a bias."""

    def __init__(self, width: int):
        super().__init__()
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (N, T, D) to (N, T, D)."""
        keys, values = self.to_keys_values(x).chunk(2, -1)
        heads = [
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (N, heads, T, D / heads)
            for t in (self.to_queries(x), keys, values)
        ]
        mixed = F.scaled_dot_product_attention(*heads)
        return self.project(mixed.transpose(1, 2).flatten(2))  # (N, T, D)


class FeedForward(nn.Module):
    """Applies two layers with a ReLU between them, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, T, D) to (N, T, D)."""
        return self.fc2(self.fc1(x).relu())


class Layer(nn.Module):
    """Applies self-attention and feed-forward, each with a norm before it and a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, T, D) to (N, T, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Aggregator(nn.Module):
    """Maps the features of a class's pictures to one vector, whatever their number and order.

    A linear layer, then LAYERS transformer layers without positions over the features and one
    learned token, whose last state is the result. The features are not normalised before.
    Raises InputError for a width that HEADS does not divide.
    """

    def __init__(self, width: int, layers: int = LAYERS):
        super().__init__()
        if width % HEADS:
            raise InputError(
                f"features of width {width} cannot be aggregated by {HEADS} heads; take their mean"
            )
        self.linear = nn.Linear(width, width)
        self.cls_token = nn.Parameter(torch.randn(1, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (N, K, D) to (N, D), not normalised."""
        token = self.cls_token.expand(len(features), -1, -1)
        x = torch.cat([self.linear(features), token], 1)  # (N, K + 1, D)
        for layer in self.layers:
            x = layer(x)
        return x[:, -1]


def load_aggregator(file: str, width: int) -> Aggregator:
    """Loads the published aggregator, or one that `train` has made. width: D of the features

    Raises InputError for a file that cannot be read, for a tensor that is missing, unknown, not
    finite or of another shape, and for an aggregator of another width.
    """
    what = "--aggregator"
    tensors = {}
    for key, tensor in read_tensors(Path(file).expanduser(), what).items():
        tensors[re.sub(r"^mapper\.(transformer\.)?", "", key)] = tensor
    layers = {key.split(".")[1] for key in tensors if re.match(r"layers\.\d+\.", key)}
    if "cls_token" not in tensors or not layers:
        raise InputError(f"{what}: {file} holds no visual aggregator; name another file")
    found = tensors["cls_token"].shape[-1]
    if found != width:
        raise InputError(
            f"{what}: {file} aggregates features of width {found}, the encoder's have {width}; "
            "name the encoder that it was trained with, by --encoder"
        )
    model = Aggregator(width, len(layers))
    for key, own in model.state_dict().items():
        stored = tensors.get(key)
        if stored is None or stored.shape != own.shape or not torch.isfinite(stored).all():
            fault = "lacks" if stored is None else "has a damaged"
            raise InputError(f"{what}: {file} {fault} tensor '{key}'; get it again")
    if unknown := tensors.keys() - model.state_dict().keys():
        raise InputError(f"{what}: {file} has the unknown tensor '{min(unknown)}'; get it again")
    model.load_state_dict(tensors)
    return model.eval()


def info_nce(first: Tensor, second: Tensor, tau: float = TAU) -> Tensor:
    """InfoNCE between two vectors of each class: first, second (N, D). Returns a scalar.

    L = 1/2N sum_i [CE(s_i., i) + CE(s_.i, i)], s_ij = cos(first_i, second_j) / tau: the other
    classes of the batch are the negatives.
    """
    logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / tau  # (N, N)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def two_sets(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draws two sets of `count` features of a class that share no picture: (count, D) each.

    features: (P, V, D), V views of each of P >= 2 pictures. Each half of the pictures, drawn at
    random, makes a set. A half with fewer than `count` pictures repeats some; views are random.
    """
    pictures, views, _ = features.shape
    order = torch.randperm(pictures)
    sets = []
    for half in (order[: pictures // 2], order[pictures // 2 :]):
        repeated = half.repeat(-(-count // len(half)))[:count]
        sets.append(features[repeated, torch.randint(views, (count,))])
    return sets[0], sets[1]


def train(features: list[Tensor], count: int, steps: int, lr: float) -> Aggregator:
    """Trains an aggregator to tell classes apart: `info_nce` between `two_sets` of each class.

    features: (P, V, D) of each class, P pictures in V views; count: features of a set
    The order of classes and sets comes from torch's generator. Settings: ours.
    Raises InputError for fewer than two classes with two pictures.
    """
    usable = [f for f in features if len(f) > 1]
    if len(usable) < 2:
        raise InputError("an aggregator needs two classes with two pictures each; add pictures")
    device = usable[0].device
    model = Aggregator(usable[0].shape[-1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with progress_bar("aggregator", steps, unit="step") as bar:
        for _ in range(steps):
            chosen = torch.randperm(len(usable))[:BATCH].tolist()
            pairs = [two_sets(usable[i], count) for i in chosen]
            first, second = (torch.stack(sets) for sets in zip(*pairs))  # (N, count, D)
            loss = info_nce(model(first), model(second))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval()
