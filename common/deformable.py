"""Deformable DETR (arXiv 2010.04159): encoder, proposals, and a decoder that refines boxes.

Its two-stage form with box refinement. A method file adds the classifiers and the queries. Boxes
have the suffix _cxcywh: centre, width and height in 0..1 of the image without its padding.

Source: fundamentalvision/Deformable-DETR:models/{deformable_detr.py,deformable_transformer.py}.
Note: there is no dropout (officially 0.1), as in the later detectors of this family.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from common.backbone import GroupNorm, with_second_column
from common.boxes import to_pixels
from common.errors import InputError
from common.parts import in_parts
from common.pixel_decoder import EncoderLayer, MSDeformAttn, tokens
from common.transformer import DecoderLayer, sine_code

# Shapes: B images, L levels, S tokens (cells) of all levels, Q queries, C channels, Z decoder
# layers, h w height and width of a level.


# -- encoder ---------------------------------------------------------------------------------------


class Neck(nn.Module):
    """Gives the maps of the backbone C channels, and adds coarser ones by convolutions of stride 2.

    The first coarser map comes from the backbone's last one, each other from the one before it.
    """

    def __init__(self, in_channels: list[int], channels: int, levels: int):
        """Creates the layers. Raises InputError if `channels` is not a multiple of 32 (GroupNorm).

        in_channels: of the maps of the backbone; levels: L, number of maps of the result
        """
        super().__init__()
        if channels % 32:
            wanted = "must be a multiple of 32, for group normalisation"
            raise InputError(f"--channels {channels} {wanted}")
        self.levels = nn.ModuleList()
        for width in in_channels:
            conv = nn.Conv2d(width, channels, 1)
            self.levels.append(nn.Sequential(conv, GroupNorm(32, channels)))
        width = in_channels[-1]
        for _ in range(len(in_channels), levels):
            conv = nn.Conv2d(width, channels, 3, stride=2, padding=1)
            self.levels.append(nn.Sequential(with_second_column(conv), GroupNorm(32, channels)))
            width = channels
        for conv, _ in self.levels:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Returns L maps (B, C, h, w), finest first. features: (B, in_channels[l], h, w)."""
        maps = []
        backbones = [*features, features[-1]]
        for i, level in enumerate(self.levels):
            given = backbones[i] if i < len(backbones) else maps[-1]
            maps.append(level(given))
        return maps


@dataclass
class Memory:
    """Tokens of all levels, and where they lie. `Encoder` updates the tokens."""

    tokens: Tensor  # (B, S, C)
    shapes: tuple[tuple[int, int], ...]  # (h, w) of each of the L levels
    cells: Tensor  # (B, L, 2) columns and rows of each level that begin in the image
    ratios: Tensor  # (B, L, 2) their shares of all columns and rows
    centres: Tensor  # (B, S, 2) x, y of each cell in 0..1 of the image, above 1 in the padding
    padding: Tensor  # (B, S) bool, True in the padding

    @classmethod
    def of(
        cls, maps: list[Tensor], sizes: list[tuple[int, int]], padded: tuple[int, int]
    ) -> "Memory":
        """Returns the memory of L maps (B, C, h, w), whose tokens are not encoded yet.

        sizes: B pairs (height, width) before padding; padded: (height, width) of all images
        """
        shapes = tuple(tuple(m.shape[-2:]) for m in maps)
        inside = [[cells_inside(size, padded, shape) for shape in shapes] for size in sizes]
        whole = [cells_inside(padded, padded, shape) for shape in shapes]
        numbers = torch.tensor([*inside, whole], device=maps[0].device)  # one copy to the device
        cells = numbers[:-1].float()  # (B, L, 2)
        centres = []
        padding = []
        for (height, width), ends in zip(shapes, cells.split(1, 1)):
            x = torch.arange(width, device=cells.device) + 0.5
            y = torch.arange(height, device=cells.device) + 0.5
            grid = torch.meshgrid(x, y, indexing="xy")
            grid = torch.stack(grid, -1).flatten(0, 1)  # (h w, 2) in cells
            centres.append(grid / ends)
            outside = grid > ends  # (B, h w, 2)
            padding.append(outside.any(-1))
        flat = [tokens(m).float() for m in maps]
        ratios = cells / numbers[-1]
        return cls(
            tokens=torch.cat(flat, 1),
            shapes=shapes,
            cells=cells,
            ratios=ratios,
            centres=torch.cat(centres, 1),
            padding=torch.cat(padding, 1),
        )


def cells_inside(
    size: tuple[int, int], padded: tuple[int, int], shape: tuple[int, int]
) -> tuple[int, int]:
    """Returns how many columns and rows of a map begin in the image.

    size, padded, shape: (height, width) of the image, of it with its padding, and of the map
    """
    height, width = size
    h, w = shape
    rows = math.ceil(height * h / padded[0])
    columns = math.ceil(width * w / padded[1])
    return columns, rows


def positions(memory: Memory, channels: int) -> Tensor:
    """Returns the sine codes of the cells, (B, S, C): half of the channels for y, half for x."""
    areas = [height * width for height, width in memory.shapes]
    parts = []
    for centres, ends in zip(memory.centres.split(areas, 1), memory.cells.split(1, 1)):
        # the official code divides by the number of cells + 1e-6
        place = centres * ends / (ends + 1e-6)
        codes = sine_code(place, channels // 2)  # (B, h w, 2, C / 2), x first
        codes = codes.flip(2)
        parts.append(codes.flatten(2))
    return torch.cat(parts, 1)


class Encoder(nn.Module):
    """Layers of deformable self-attention of all tokens (`EncoderLayer`)."""

    def __init__(self, channels: int, layers: int, ffn: int, levels: int, heads: int, points: int):
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(levels, channels))
        self.layers = nn.ModuleList(
            EncoderLayer(channels, ffn, heads, levels, points) for _ in range(layers)
        )

    def forward(self, memory: Memory) -> Memory:
        """Updates the tokens of the memory in place, and returns it."""
        codes = [
            code.expand(height * width, -1)
            for code, (height, width) in zip(self.level_embed, memory.shapes)
        ]
        channels = self.level_embed.shape[1]
        position = positions(memory, channels) + torch.cat(codes)  # (B, S, C)
        reference = memory.centres[:, :, None] * memory.ratios[:, None]  # (B, S, L, 2)
        for layer in self.layers:
            memory.tokens = layer(memory.tokens, position, memory.shapes, reference, memory.padding)
        return memory


@in_parts
def encode(
    model: nn.Module, images: Tensor, sizes: list[tuple[int, int]]
) -> tuple[list[Tensor], Memory]:
    """Returns the maps of the model's neck, L tensors (B, C, h, w), and the encoded memory.

    model:  has a backbone, a neck and an encoder
    images: (B, 3, H, W) uint8; sizes: (height, width) before padding
    """
    maps = model.neck(model.backbone(model.backbone.normalise(images, sizes)))
    return maps, model.encoder(Memory.of(maps, sizes, tuple(images.shape[-2:])))


# -- boxes -----------------------------------------------------------------------------------------


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Returns log(x / (1 - x)), with x and 1 - x at least eps."""
    x = x.clamp(0, 1)
    above = x.clamp(min=eps)
    below = (1 - x).clamp(min=eps)
    return torch.log(above / below)


def box_head(channels: int) -> nn.Sequential:
    """Returns three linear layers, (..., C) -> (..., 4), that give 0 at first."""
    last = nn.Linear(channels, 4)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    hidden = [nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*hidden, last)


class Proposals(nn.Module):
    """The first stage: each cell refines a square box of its own, whose side depends on its level.

    A cell of level l has a side of 0.05 * 2^l of the image. Cells in the padding and those within
    0.01 of the image's edge propose nothing: their tokens are 0 and their boxes (1, 1, 1, 1).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.box_head = box_head(channels)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Returns hidden (B, S, C), which the method scores, and boxes_cxcywh (B, S, 4)."""
        sides = []
        for level, (height, width) in enumerate(memory.shapes):
            side = 0.05 * 2**level
            sides.append(memory.centres.new_full((height * width, 2), side))
        sides = torch.cat(sides).expand_as(memory.centres)
        anchors = torch.cat([memory.centres, sides], -1)  # (B, S, 4)
        within = (anchors > 0.01) & (anchors < 0.99)
        proposing = within.all(-1) & ~memory.padding
        proposing = proposing[..., None]  # (B, S, 1)
        odds = anchors / (1 - anchors)
        start = torch.log(odds).masked_fill(~proposing, torch.inf)
        hidden = self.linear(memory.tokens * proposing)
        hidden = self.norm(hidden)
        moved = self.box_head(hidden).float() + start
        return hidden, moved.sigmoid()


def best_cells(boxes: Tensor, scores: Tensor, number: int) -> Tensor:
    """Returns the rows of the cells with the highest scores (B, S): (B, Q), the best first.

    boxes: (B, S, 4) of the cells
    Q is `number`, or S if that is less. Officially, cells that propose nothing may be among them,
    so that the padding matters; here they come last.
    """
    number = min(number, scores.shape[1])
    nothing = (boxes == 1).all(-1)
    scores = scores.masked_fill(nothing, -torch.inf)
    return scores.topk(number, 1).indices


def at_cells(values: Tensor, rows: Tensor) -> Tensor:
    """Returns the values (B, S, X) of the cells at `rows` (B, Q): (B, Q, X)."""
    rows = rows[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows)


def select_boxes(boxes: Tensor, scores: Tensor, number: int) -> Tensor:
    """Returns the boxes (B, S, 4) of the `best_cells`, without a gradient: (B, Q, 4)."""
    rows = best_cells(boxes, scores, number)
    return at_cells(boxes.detach(), rows)


class BoxQueries(nn.Module):
    """Makes the content and the position of queries from boxes, as Deformable DETR does."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(2 * channels, 2 * channels)
        self.norm = nn.LayerNorm(2 * channels)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns content and position, (B, Q, C) each, of boxes_cxcywh (B, Q, 4)."""
        half = self.linear.in_features // 4  # of the C channels
        codes = sine_code(boxes, half)  # (B, Q, 4, C / 2)
        both = self.linear(codes.flatten(2))
        position, content = self.norm(both).float().chunk(2, -1)
        return content, position


# -- decoder ---------------------------------------------------------------------------------------


class DeformableDecoderLayer(DecoderLayer):
    """Is a `DecoderLayer` whose cross-attention is deformable.

    position is a tensor (B, Q, C), or 0 for queries without.
    """

    def __init__(self, channels: int, ffn: int, levels: int, heads: int, points: int):
        super().__init__(channels, heads, ffn)
        self.cross_attn = MSDeformAttn(channels, heads, levels, points)

    def cross_attend(
        self, q: Tensor, position: Tensor | float, boxes: Tensor, memory: Memory
    ) -> Tensor:
        """Lets queries q (B, Q, C) look at points in and around boxes_cxcywh (B, Q, 4)."""
        centre, size = boxes.unsqueeze(2).chunk(2, -1)  # (B, Q, 1, 2)
        reference = centre * memory.ratios.unsqueeze(1)  # (B, Q, L, 2)
        spread = size / 2 * memory.cells.unsqueeze(1)
        placed = q + position
        attended = self.cross_attn(
            placed, memory.tokens, memory.shapes, reference, memory.padding, spread
        )
        return self.cross_norm(q + attended)


class Decoder(nn.Module):
    """Layers of `DeformableDecoderLayer`, each of which refines the boxes of the one before.

    The refined boxes reach the next layer without a gradient. eps: of `inverse_sigmoid`
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        ffn: int,
        levels: int,
        heads: int,
        points: int,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.eps = eps
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(channels, ffn, levels, heads, points) for _ in range(layers)
        )
        self.box_heads = nn.ModuleList(box_head(channels) for _ in range(layers))

    def forward(
        self, q: Tensor, position: Tensor | float, boxes: Tensor, memory: Memory, groups: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden (Z, B, Q, C) and boxes_cxcywh (Z, B, Q, 4) after each layer.

        q: (B, Q, C), content of the queries; position: (B, Q, C), or 0 for queries without
        boxes: (B, Q, 4) boxes_cxcywh, where the queries look first
        groups: equal runs of queries of an image. A query attends to its own group alone
        """
        hidden = []
        refined = []
        grouped = (len(q) * groups, -1, q.shape[2])
        placed = position.reshape(grouped) if groups > 1 else position
        for layer, head in zip(self.layers, self.box_heads):
            q = layer.self_attend(q.reshape(grouped), placed).view_as(q)
            q = layer.cross_attend(q, position, boxes, memory)
            q = layer.feed_forward(q)
            start = inverse_sigmoid(boxes, self.eps)
            moved = head(q).float() + start
            refined.append(moved.sigmoid())
            hidden.append(q.float())
            boxes = refined[-1].detach()
        return torch.stack(hidden), torch.stack(refined)


def best_detections(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], limit: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the best of all queries and classes of an image. There is no NMS.

    Returns boxes (N, 4) in pixels, clipped, scores (N,) and labels (N,), by falling score. A query
    may become several detections.
    logits: (Q, C); boxes: (Q, 4) boxes_cxcywh; size: (height, width) of the image
    """
    probabilities = logits.sigmoid().flatten()
    limit = min(limit, len(probabilities))
    scores, best = probabilities.topk(limit)
    classes = logits.shape[1]
    chosen = boxes[best // classes]
    pixels = to_pixels(chosen, size)
    return clip_boxes_to_image(pixels, size), scores, best % classes
