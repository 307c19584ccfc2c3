"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, Eq. 3), softmax included.

`msda` samples every level of a feature pyramid at a few learned points around each query and averages what it finds:

    out[b, q, m] = sum_k softmax_k(logits[b, q, m]) value_m(reference[b, q] + offset[b, q, m, k])

value_m is bilinear between pixel centres and zero outside. `reference` is that formula; Triton kernels compute it on
CUDA and sparse products on the CPU. Both keep only their inputs and the output for the backward pass.

B images, S pixels of all levels, Q queries, M heads, d channels of a head, L levels, P points, K = L P samples.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def msda(
    value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, reference: Tensor
) -> Tensor:
    """Multi-scale deformable attention without its linear layers.

    value:     (B, S, M, d), the levels one after the other, each row by row; float32, float16, bfloat16 or float64
    shapes:    (height, width) of each level
    offsets:   (B, Q, M, L, P, 2) as (x, y) in pixels of the level
    logits:    (B, Q, M, L P) attention before the softmax, which goes over levels and points together
    reference: (Q, 2), (B, Q, 2) or (B, Q, L, 2) as (x, y) in 0..1 of the whole map; it gets no gradient
    returns    (B, Q, M d) in value's dtype; locations and sums are float32 (float64 where value is)
    """
    batch, pixels, heads, _ = value.shape
    if pixels != sum(height * width for height, width in shapes):
        raise ValueError(
            f"msda: value has {pixels} pixels, which is not the sum of the levels {shapes}"
        )
    samples = (batch, offsets.shape[1], heads, len(shapes), offsets.shape[4])
    if offsets.shape != (*samples, 2) or logits.shape != (*samples[:3], samples[3] * samples[4]):
        raise ValueError(
            f"msda: offsets {offsets.shape} and logits {logits.shape} do not fit {samples} (B, Q, M, L, P)"
        )
    if value.device.type not in KERNELS or (value.is_cuda and value.dtype == torch.float64):
        return _formula(value, shapes, offsets, logits, reference)
    return _msda(
        value,
        offsets,
        logits,
        _per_level(reference, offsets),
        [side for shape in shapes for side in shape],
    )


def _per_level(reference: Tensor, offsets: Tensor) -> Tensor:
    """Any of the three forms -> (B, Q, L, 2) without a copy."""
    batch, queries, _, levels, _, _ = offsets.shape
    reference = reference if reference.dim() == 4 else reference.unsqueeze(-2)
    return reference.detach().expand(batch, queries, levels, 2)


def reference(
    value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, reference: Tensor
) -> Tensor:
    """`msda` as the formula reads, with gradients from autograd; the other paths are tested against it."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    weights = logits.to(dtype).softmax(-1).unflatten(-1, offsets.shape[3:5])  # (B, Q, M, L, P)
    reference = _per_level(reference, offsets).to(dtype)  # (B, Q, L, 2)
    levels = value.to(dtype).split([height * width for height, width in shapes], dim=1)
    out = 0
    for i, (level, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
        size = reference.new_tensor([width, height])
        position = (reference[:, :, i] * size - 0.5)[:, :, None, None] + offsets[:, :, :, i].to(
            dtype
        )
        x, y = position.unbind(-1)  # (B, Q, M, P) pixels
        left, top = x.floor().detach(), y.floor().detach()
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                pixel = (
                    torch.where(inside, row * width + column, 0).long().transpose(1, 2)
                )  # (B, M, Q, P)
                found = level.transpose(1, 2).gather(
                    2, pixel.flatten(2)[..., None].expand(-1, -1, -1, level.shape[-1])
                )
                found = found.unflatten(2, pixel.shape[2:]).transpose(1, 2)  # (B, Q, M, P, d)
                out = out + torch.einsum(
                    "bqmp,bqmpd->bqmd", inside * across * down * weights[:, :, :, i], found
                )
    return out.flatten(2).to(value.dtype)


_formula = reference  # `msda` has an argument of that name


# -- CPU ---------------------------------------------------------------------------------------------------------------


def _axis(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear interpolation along one axis, between pixels `first` and first + 1.

    returns first (int32), its weight, the weight of first + 1, and the unit interval that the position is in: -1 before
    the two pixels, 0 between them, 1 behind them, else outside. `first` is such that both pixels are inside the map.
    """
    floor = position.floor()
    first = floor.int().minimum((size - 2).int()).clamp_(min=0)
    ahead = position - first
    low = (1 - ahead.abs()).clamp_(min=0)
    high = (1 - (ahead - 1).abs()).clamp_(min=0).mul_(size > 1)
    return first, low, high, floor.sub_(first)


def _slopes(interval: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the two weights of `_axis` by the position, from the right where they jump."""
    before, between, behind = ((interval == i).to(interval) for i in (-1, 0, 1))
    return before - between, between.sub_(behind).mul_(size > 1)


class _Samples:
    """The corners and weights of all samples, made again in the backward pass rather than kept.

    Elements are (B, Q, M K); what depends on the level alone is a row (M K,) that broadcasts, since short inner loops
    cost more than the arithmetic. A pixel of a head is row (b S + pixel) M + m of value as a matrix.
    """

    def __init__(self, value, offsets, logits, reference, sizes):
        batch, pixels, heads, _ = value.shape
        levels, points = offsets.shape[3:5]
        dtype = torch.promote_types(value.dtype, torch.float32)
        height, width = torch.tensor(sizes).view(levels, 2).unbind(-1)
        start = (height * width).cumsum(0) - height * width

        def row(per_level):  # (L,) -> (M K,)
            return per_level.to(torch.int32).repeat_interleave(points).repeat(heads)

        self.width, self.height = row(width).to(dtype), row(height).to(dtype)
        size = torch.stack([width, height], -1).to(dtype)
        centre = (reference.to(dtype) * size - 0.5).repeat_interleave(points, 2)  # (B, Q, K, 2)
        offsets, logits = offsets.to(dtype).contiguous(), logits.to(dtype).contiguous()
        x, y = (centre.unsqueeze(2) + offsets.flatten(3, 4)).flatten(2, 3).unbind(-1)  # (B, Q, M K)
        exp = (
            logits - logits.amax(-1, keepdim=True)
        ).exp_()  # the built-in softmax is slow on rows of K
        self.attention = exp.div_(exp.sum(-1, keepdim=True)).flatten(2)
        column, self.left, self.right, self.in_x = _axis(x, self.width)
        line, self.top, self.bottom, self.in_y = _axis(y, self.height)
        first = torch.arange(batch)[:, None, None] * pixels * heads + row(start * heads)
        first = first.int() + torch.arange(heads, dtype=torch.int32).repeat_interleave(
            levels * points
        )
        self.base = (
            line.mul_(row(width * heads)).add_(column.mul_(heads)).add_(first)
        )  # (B, Q, M K)
        step_x, step_y = row(heads * (width > 1)), row(heads * width * (height > 1))
        steps = torch.stack([torch.zeros_like(step_x), step_x, step_y, step_x + step_y]).unflatten(
            1, (heads, -1)
        )
        self.corners = (
            self.base.view(-1, 1, levels * points) + steps[:, 0]
        )  # (B Q M, 4, K) rows of value

    def weights(self) -> list[Tensor]:
        """4 x (B Q M, K)"""
        top, bottom = self.attention * self.top, self.attention * self.bottom
        corners = top * self.left, top * self.right, bottom * self.left, bottom * self.right
        return [corner.view(-1, self.corners.shape[-1]) for corner in corners]


def _forward_cpu(value, offsets, logits, reference, sizes):
    """One sum of 4 K weighted rows of value for each query and head: a bag of embeddings."""
    samples = _Samples(value, offsets, logits, reference, sizes)
    rows = value.reshape(-1, value.shape[-1]).to(samples.attention.dtype)  # (B S M, d)
    weights = torch.cat(samples.weights(), 1)  # (B Q M, 4 K)
    out = F.embedding_bag(samples.corners.flatten(1), rows, mode="sum", per_sample_weights=weights)
    return out.view(*offsets.shape[:2], out.shape[-1] * offsets.shape[2]).to(value.dtype)


def _backward_cpu(grad, value, offsets, logits, reference, out, sizes):
    """Gradients of value, offsets and logits; `out` is for the kernels."""
    samples = _Samples(value, offsets, logits, reference, sizes)
    dtype, (count, _, k) = samples.attention.dtype, samples.corners.shape
    rows = value.reshape(-1, value.shape[-1]).to(dtype)  # (B S M, d)
    grad = grad.reshape(count, value.shape[-1]).to(dtype)  # (B Q M, d)

    # <grad, value> at each corner: a product of two dense matrices where a sparse one has its entries
    ends, zeros = (
        torch.arange(0, 4 * k * count + 1, 4 * k, dtype=torch.int32),
        torch.zeros(4 * k * count, dtype=dtype),
    )
    rows = F.pad(
        rows, (0, 0, 0, max(4 * k - len(rows), 0))
    )  # torch wants no more entries than places
    size, entries = (count, len(rows)), samples.corners.flatten()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(ends, entries, zeros, size, check_invariants=False)
    torch.sparse.sampled_addmm(pattern, grad, rows.t(), beta=0.0, out=pattern)
    dots = [
        corner.reshape_as(samples.base) for corner in pattern.values().view(count, 4, k).unbind(1)
    ]
    left_slope, right_slope = _slopes(samples.in_x, samples.width)
    top_slope, bottom_slope = _slopes(samples.in_y, samples.height)
    upper, lower = (
        samples.left * dots[0] + samples.right * dots[1],
        samples.left * dots[2] + samples.right * dots[3],
    )
    along_x = left_slope * (samples.top * dots[0] + samples.bottom * dots[2])
    along_x += right_slope * (samples.top * dots[1] + samples.bottom * dots[3])
    along_y = top_slope * upper + bottom_slope * lower
    grad_offsets = (
        torch.stack([along_x, along_y], -1).mul_(samples.attention[..., None]).view(offsets.shape)
    )
    found = samples.top * upper + samples.bottom * lower  # <grad, sample>
    delta = (samples.attention * found).view(-1, k).sum(-1).view(*logits.shape[:3], 1)
    grad_logits = samples.attention.view(logits.shape) * (found.view(logits.shape) - delta)

    # samples sorted by their first corner: each row of value then sums a bag of rows of grad, for each of the corners
    keys, order = samples.base.flatten().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(value.shape[:3].numel(), dtype=torch.int32))
    queries = order // k
    grad_value = torch.zeros(*value.shape[:2], value.shape[2] * value.shape[3], dtype=dtype)
    for corner, weights in enumerate(samples.weights()):
        weights = weights.flatten()[order]
        sums = F.embedding_bag(
            queries, grad, starts, mode="sum", per_sample_weights=weights
        ).view_as(grad_value)
        start = 0
        for height, width in zip(sizes[::2], sizes[1::2]):
            step = corner % 2 + corner // 2 * width  # from the first corner to this one
            pixels = max(
                height * width - step, 0
            )  # the others have no such neighbour: their sums are 0
            grad_value[:, start + step :][:, :pixels] += sums[:, start:][:, :pixels]
            start += height * width
    return (
        grad_value.view(value.shape).to(value.dtype),
        grad_offsets.to(offsets.dtype),
        grad_logits.to(logits.dtype),
    )


# -- CUDA --------------------------------------------------------------------------------------------------------------
#
# A program takes a tile of T queries of one head of one image. The P points of a level are one block (T, P, d), so that
# many independent rows are in flight; neighbouring queries find most corners in L1. Sizes of levels come as a tensor:
# reading them costs nothing, and images of a new size need no new kernel. L, P and d are compile-time constants, TP, TK
# and TD their next powers of two (for K: L P). Pixels of an image are counted in 32 bits, all else in 64.

if triton is not None:

    @triton.jit
    def _axis_kernel(position, size):
        """`_axis` and `_slopes` in one."""
        floor = tl.floor(position)
        first = tl.minimum(tl.maximum(floor, 0.0), tl.maximum(size - 2, 0).to(tl.float32))
        ahead = position - first
        interval = floor - first
        low, high = tl.maximum(1 - tl.abs(ahead), 0.0), tl.maximum(1 - tl.abs(ahead - 1), 0.0)
        between = (interval == 0).to(tl.float32)
        low_slope = (interval == -1).to(tl.float32) - between
        high_slope = between - (interval == 1).to(tl.float32)
        two = (size > 1).to(tl.float32)
        return first.to(tl.int32), low, high * two, low_slope, high_slope * two

    @triton.jit
    def _softmax_kernel(logits, row, inside, K: tl.constexpr, TK: tl.constexpr):
        """Maximum and sum of exponentials of each query. row: (T,) its first sample"""
        k = tl.arange(0, TK)
        scores = tl.load(logits + row[:, None] + k, inside[:, None] & (k < K), other=0.0)
        scores = tl.where(k < K, scores.to(tl.float32), float("-inf"))
        highest = tl.max(scores, 1)
        return highest, tl.sum(tl.exp(scores - highest[:, None]), 1)

    @triton.jit
    def _samples_kernel(
        offsets, logits, reference, levels, level, row, inside, heads, ref_l, ref_xy, highest, total,
        L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, TP: tl.constexpr, TD: tl.constexpr,
    ):  # fmt: skip
        """A level's samples of a tile: where they are in `logits`, attention, both axes (weights, slopes), both rows of
        corners in an image and a head of value, and which of these exist. reference: (T,) pointers"""
        p, d = tl.arange(0, TP), tl.arange(0, TD)
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        sample, valid = (row * (L * P) + level * P)[:, None] + p, inside[:, None] & (p < P)
        attention = tl.exp(
            tl.load(logits + sample, valid, other=0.0).to(tl.float32) - highest[:, None]
        )
        attention = tl.where(valid, attention / total[:, None], 0.0)
        xy = offsets + 2 * sample[:, :, None] + tl.arange(0, 2)
        x, y = tl.split(tl.load(xy, valid[:, :, None], other=0.0).to(tl.float32))
        x += (tl.load(reference + level * ref_l, inside, other=0.0) * width - 0.5)[:, None]
        y += (tl.load(reference + level * ref_l + ref_xy, inside, other=0.0) * height - 0.5)[
            :, None
        ]
        column, left, right, left_slope, right_slope = _axis_kernel(x, width)
        line, upper, lower, upper_slope, lower_slope = _axis_kernel(y, height)
        corner = ((start + line * width + column) * heads * D)[:, :, None] + d  # (T, P, d)
        near = valid & (x >= -1) & (x < width) & (y >= -1) & (y < height)
        near = near[:, :, None] & (d < D)
        near_right, near_below = (
            near & (column + 1 < width)[:, :, None],
            near & (line + 1 < height)[:, :, None],
        )
        x_axis, y_axis = (
            (left, right, left_slope, right_slope),
            (upper, lower, upper_slope, lower_slope),
        )
        below = corner + width * heads * D
        return sample, valid, attention, x_axis, y_axis, corner, below, near, near_right, near_below

    @triton.jit
    def _forward_kernel(
        value, offsets, logits, reference, levels, out, pixels, queries, heads, ref_b, ref_q, ref_l, ref_xy,
        L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
        T: tl.constexpr, TP: tl.constexpr, TK: tl.constexpr, TD: tl.constexpr,
    ):  # fmt: skip
        query = tl.program_id(0) * T + tl.arange(0, T)
        image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
        inside, row, d = query < queries, (image * queries + query) * heads + head, tl.arange(0, TD)
        value += image * pixels * heads * D + head * D
        reference += image * ref_b + query * ref_q
        highest, total = _softmax_kernel(logits, row * (L * P), inside, L * P, TK)
        sums = tl.zeros((T, TP, TD), tl.float32)
        for level in tl.static_range(L):
            _, _, attention, x_axis, y_axis, corner, below, near, near_right, near_below = _samples_kernel(
                offsets, logits, reference, levels, level, row, inside, heads, ref_l, ref_xy, highest, total,
                L, P, D, TP, TD,
            )  # fmt: skip
            left, right, upper, lower = (
                x_axis[0],
                x_axis[1],
                attention * y_axis[0],
                attention * y_axis[1],
            )
            corner, below, step = value + corner, value + below, heads * D
            sums += (upper * left)[:, :, None] * tl.load(corner, near, other=0.0)
            sums += (upper * right)[:, :, None] * tl.load(corner + step, near_right, other=0.0)
            sums += (lower * left)[:, :, None] * tl.load(below, near_below, other=0.0)
            sums += (lower * right)[:, :, None] * tl.load(
                below + step, near_right & near_below, other=0.0
            )
        tl.store(out + (row * D)[:, None] + d, tl.sum(sums, 1), inside[:, None] & (d < D))

    @triton.jit
    def _backward_kernel(
        grad, value, offsets, logits, reference, levels, out, grad_value, grad_offsets, grad_logits,
        pixels, queries, heads, ref_b, ref_q, ref_l, ref_xy,
        L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
        T: tl.constexpr, TP: tl.constexpr, TK: tl.constexpr, TD: tl.constexpr,
    ):  # fmt: skip
        query = tl.program_id(0) * T + tl.arange(0, T)
        image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
        inside, row, d = query < queries, (image * queries + query) * heads + head, tl.arange(0, TD)
        value += image * pixels * heads * D + head * D
        grad_value += image * pixels * heads * D + head * D
        reference += image * ref_b + query * ref_q
        highest, total = _softmax_kernel(logits, row * (L * P), inside, L * P, TK)
        here, inner = (row * D)[:, None] + d, inside[:, None] & (d < D)
        g = tl.load(grad + here, inner, other=0.0).to(tl.float32)
        delta = tl.sum(
            g * tl.load(out + here, inner, other=0.0), 1
        )  # = sum_k attention_k <grad, sample_k>
        g, step = g[:, None, :], heads * D
        for level in tl.static_range(L):
            sample, valid, attention, x_axis, y_axis, corner, below, near, near_right, near_below = _samples_kernel(
                offsets, logits, reference, levels, level, row, inside, heads, ref_l, ref_xy, highest, total,
                L, P, D, TP, TD,
            )  # fmt: skip
            left, right, left_slope, right_slope = x_axis
            upper, lower, upper_slope, lower_slope = y_axis
            # the products with grad at the four corners are all that the gradients of a sample need
            v00 = tl.sum(g * tl.load(value + corner, near, other=0.0), 2)
            v01 = tl.sum(g * tl.load(value + corner + step, near_right, other=0.0), 2)
            v10 = tl.sum(g * tl.load(value + below, near_below, other=0.0), 2)
            v11 = tl.sum(g * tl.load(value + below + step, near_right & near_below, other=0.0), 2)
            along_x = left_slope * (upper * v00 + lower * v10) + right_slope * (
                upper * v01 + lower * v11
            )
            v0, v1 = left * v00 + right * v01, left * v10 + right * v11
            along_y = upper_slope * v0 + lower_slope * v1
            found = upper * v0 + lower * v1
            tl.store(grad_logits + sample, attention * (found - delta[:, None]), valid)
            xy = grad_offsets + 2 * sample[:, :, None] + tl.arange(0, 2)
            tl.store(xy, tl.join(attention * along_x, attention * along_y), valid[:, :, None])
            upper, lower, corner, below = (
                attention * upper,
                attention * lower,
                grad_value + corner,
                grad_value + below,
            )
            tl.atomic_add(corner, (upper * left)[:, :, None] * g, near, sem="relaxed")
            tl.atomic_add(corner + step, (upper * right)[:, :, None] * g, near_right, sem="relaxed")
            tl.atomic_add(below, (lower * left)[:, :, None] * g, near_below, sem="relaxed")
            tl.atomic_add(
                below + step,
                (lower * right)[:, :, None] * g,
                near_right & near_below,
                sem="relaxed",
            )


@functools.lru_cache(maxsize=256)
def _levels(sizes: tuple, device: torch.device) -> Tensor:
    """(L, 3) int32: height, width and first pixel of each level."""
    height, width = torch.tensor(sizes, dtype=torch.int32).view(-1, 2).unbind(1)
    return torch.stack([height, width, (height * width).cumsum(0) - height * width], 1).to(
        device, torch.int32
    )


def _launch(kernel, inputs, outputs, offsets, value, reference):
    (batch, pixels, heads, d), (_, queries, _, levels, points, _) = value.shape, offsets.shape
    padded = [triton.next_power_of_2(n) for n in (points, levels * points, d)]
    # 16 numbers of a block (T, P, d) per thread: fewer repeat index arithmetic, more leave registers for few programs
    tile = min(max(2048 // (padded[0] * padded[2]), 1), 64)
    numbers = pixels, queries, heads, *reference.stride(), levels, points, d, tile, *padded
    if batch * queries * heads:
        kernel[triton.cdiv(queries, tile), batch * heads](*inputs, *outputs, *numbers, num_warps=4)
    return outputs


def _forward_triton(value, offsets, logits, reference, sizes):
    value, offsets, logits, reference = (
        value.contiguous(),
        offsets.contiguous(),
        logits.contiguous(),
        reference.float(),
    )
    out = value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])
    inputs = value, offsets, logits, reference, _levels(tuple(sizes), value.device)
    return _launch(_forward_kernel, inputs, (out,), offsets, value, reference)[0]


def _backward_triton(grad, value, offsets, logits, reference, out, sizes):
    value, offsets, logits, reference = (
        value.contiguous(),
        offsets.contiguous(),
        logits.contiguous(),
        reference.float(),
    )
    # single precision, as many small numbers meet in a pixel; they come in any order: last digits vary between runs
    grads = (
        torch.zeros_like(value, dtype=torch.float32),
        torch.empty_like(offsets),
        torch.empty_like(logits),
    )
    inputs = (
        grad.contiguous(),
        value,
        offsets,
        logits,
        reference,
        _levels(tuple(sizes), value.device),
        out,
    )
    _launch(_backward_kernel, inputs, grads, offsets, value, reference)
    return grads[0].to(value.dtype), *grads[1:]


KERNELS = {"cpu": (_forward_cpu, _backward_cpu)}
if triton is not None:
    KERNELS["cuda"] = _forward_triton, _backward_triton


@torch.library.custom_op("concord::msda", mutates_args=())
def _msda(
    value: Tensor, offsets: Tensor, logits: Tensor, reference: Tensor, sizes: list[int]
) -> Tensor:
    return KERNELS[value.device.type][0](value, offsets, logits, reference, sizes)


@_msda.register_fake
def _(value, offsets, logits, reference, sizes):
    return value.new_empty(offsets.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("concord::msda_backward", mutates_args=())
def _msda_backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference: Tensor,
    out: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return KERNELS[value.device.type][1](grad, value, offsets, logits, reference, out, sizes)


@_msda_backward.register_fake
def _(grad, value, offsets, logits, reference, out, sizes):
    return tuple(x.new_empty(x.shape) for x in (value, offsets, logits))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, grad):
    return *_msda_backward(grad, *ctx.saved_tensors, ctx.sizes), None, None


_msda.register_autograd(_backward, setup_context=_setup_context)
