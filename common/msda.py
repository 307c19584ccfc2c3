"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, Eq. 3), softmax included.

`msda` samples every level of a feature pyramid at a few learned points around each query.
It returns the weighted mean of the samples:

    out[b, q, m] = sum_k softmax_k(logits[b, q, m]) value_m(reference[b, q] + offset[b, q, m, k])

Here the reference is scaled to the pixels of the level of sample k. value_m is interpolated
bilinearly between pixel centres and is zero outside the map. `formula` is this equation in PyTorch.
Triton kernels compute it on CUDA, and sparse products compute it on the CPU. Both keep only their
inputs and the output for the backward pass.

Shapes: B images, S pixels of all levels, Q queries, M heads, d channels of a head, L levels,
P points, K = L P samples.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton

    from common.msda_triton import _backward_kernel, _forward_kernel
except ImportError:
    triton = None


def msda(
    value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, reference: Tensor
) -> Tensor:
    """Computes multi-scale deformable attention without its linear layers.

    value:     (B, S, M, d), level by level, each row by row; float32, float16, bfloat16 or float64
    shapes:    (height, width) of each level
    offsets:   (B, Q, M, L, P, 2) as (x, y) in pixels of the level
    logits:    (B, Q, M, K), attention before the softmax over all K samples, level by level
    reference: (Q, 2), (B, Q, 2) or (B, Q, L, 2) as (x, y) in 0..1 of the map; gets no gradient

    Returns (B, Q, M d). Locations, sums and the result are float32, or float64 if value is. A NaN
    among the offsets or logits of a query and head makes its result NaN.
    Raises ValueError if `shapes` or the shapes of value, offsets and logits do not agree.
    """
    batch, pixels, heads, _ = value.shape
    queries = offsets.shape[1]
    points = offsets.shape[4]
    levels = len(shapes)
    areas = [height * width for height, width in shapes]
    if pixels != sum(areas):
        raise ValueError(f"msda: value has {pixels} pixels, but the levels are {shapes}")
    samples = (batch, queries, heads, levels, points)
    logits_fit = logits.shape == (batch, queries, heads, levels * points)
    offsets_fit = offsets.shape == (*samples, 2)
    if not logits_fit or not offsets_fit:
        found = f"offsets {offsets.shape} and logits {logits.shape}"
        raise ValueError(f"msda: {found} do not fit {samples} (B, Q, M, L, P)")
    double_on_cuda = value.is_cuda and value.dtype == torch.float64
    if value.device.type not in KERNELS or double_on_cuda:
        return formula(value, shapes, offsets, logits, reference)
    reference = _per_level(reference, offsets)
    sizes = [side for shape in shapes for side in shape]
    return _msda(value, offsets, logits, reference, sizes)


def _per_level(reference: Tensor, offsets: Tensor) -> Tensor:
    """Expands (Q, 2), (B, Q, 2) or (B, Q, L, 2) to a detached view (B, Q, L, 2)."""
    batch, queries, _, levels, _, _ = offsets.shape
    if reference.dim() < 4:
        reference = reference.unsqueeze(-2)
    return reference.detach().expand(batch, queries, levels, 2)


@functools.lru_cache(maxsize=256)
def _levels(sizes: tuple, device: torch.device) -> Tensor:
    """Returns (height, width, first pixel) per level: (L, 3) int32. sizes: (h0, w0, h1, ...)."""
    levels = []
    start = 0
    for height, width in zip(sizes[::2], sizes[1::2]):
        levels.append((height, width, start))
        start += height * width
    return torch.tensor(levels, dtype=torch.int32, device=device)


def formula(
    value: Tensor, shapes: tuple, offsets: Tensor, logits: Tensor, reference: Tensor
) -> Tensor:
    """Computes `msda`, with the same arguments and result, as the equation reads.

    Autograd gives the gradients. The tests compare the faster paths with this function.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    weights = logits.to(dtype).softmax(-1)  # (B, Q, M, L P)
    weights = weights.unflatten(-1, offsets.shape[3:5])  # (B, Q, M, L, P)
    reference = _per_level(reference, offsets).to(dtype)  # (B, Q, L, 2)
    areas = [height * width for height, width in shapes]
    levels = value.to(dtype).split(areas, 1)
    out = 0
    for i, (level, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
        level = level.transpose(1, 2)  # (B, M, h w, d)
        size = reference.new_tensor([width, height])
        centre = reference[:, :, i] * size - 0.5
        centre = centre[:, :, None, None]
        offset = offsets[:, :, :, i].to(dtype)
        position = centre + offset
        x, y = position.unbind(-1)  # (B, Q, M, P) in pixels
        left = x.floor().detach()
        top = y.floor().detach()
        to_right = x - left
        to_bottom = y - top
        columns = ((left, 1 - to_right), (left + 1, to_right))
        rows = ((top, 1 - to_bottom), (top + 1, to_bottom))
        for column, across in columns:
            in_x = (column >= 0) & (column < width)
            for row, down in rows:
                in_y = (row >= 0) & (row < height)
                inside = in_x & in_y
                pixel = torch.where(inside, row * width + column, 0).long()
                pixel = pixel.transpose(1, 2)  # (B, M, Q, P)
                index = pixel.flatten(2)[..., None]
                index = index.expand(-1, -1, -1, level.shape[-1])
                found = level.gather(2, index)
                found = found.unflatten(2, pixel.shape[2:])
                found = found.transpose(1, 2)  # (B, Q, M, P, d)
                weight = inside * across * down
                weight = weight * weights[:, :, :, i]
                out = out + torch.einsum("bqmp,bqmpd->bqmd", weight, found)
    return out.flatten(2)


# -- CPU -------------------------------------------------------------------------------------------


def _axis(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the weights of linear interpolation between the pixels `first` and first + 1.

    position: (...) along one axis, in pixels; size: pixels of the axis, broadcast to position

    Returns (first, low, high, interval), each (...).
    first:    floor(position), int32, moved so that first and first + 1 are inside the map; 0 if the
              axis has one pixel
    low:      weight of `first`
    high:     weight of first + 1; 0 if the axis has one pixel
    interval: floor(position) - first; if it is not -1, 0 or 1, both weights are 0
    """
    floor = position.floor()
    last = (size - 2).int()
    first = floor.int().minimum(last).clamp_(min=0)
    ahead = position - first
    low = (1 - ahead.abs()).clamp_(min=0)
    behind = (ahead - 1).abs()
    high = (1 - behind).clamp_(min=0)
    high.mul_(size > 1)
    interval = floor.sub_(first)
    return first, low, high, interval


def _slopes(interval: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (low, high): the derivatives of the two weights of `_axis` by the position.

    interval: as `_axis` returns it. At a pixel centre, where the weights have a kink, the result is
    the derivative on the right.
    """
    before = (interval == -1).to(interval)
    between = (interval == 0).to(interval)
    behind = (interval == 1).to(interval)
    low = before - between
    high = between.sub_(behind).mul_(size > 1)
    return low, high


class _Samples:
    """Holds the four nearest pixels (corners) and the weights of all samples.

    The backward pass computes them again instead of keeping them. An attribute without a shape is
    (B, Q, M K). Values that depend on the level alone are rows (M K,) that broadcast, because short
    inner loops cost more than the arithmetic.

    levels:                   (L, 3) of `_levels`
    width, height:            (M K,) size of the level
    attention:                softmax of the logits
    left, right, top, bottom: weights of the two columns and of the two lines of pixels
    in_x, in_y:               intervals of `_axis`
    base:                     row of the top left corner, (b S + pixel) M + m, in value (B S M, d)
    corners:                  (B Q M, 4, K) rows of the corners: top left, top right, bottom left,
                              bottom right
    """

    def __init__(self, value, offsets, logits, reference, sizes):
        batch, pixels, heads, _ = value.shape
        levels, points = offsets.shape[3:5]
        dtype = torch.promote_types(value.dtype, torch.float32)
        self.levels = _levels(tuple(sizes), value.device)
        height, width, start = self.levels.unbind(1)

        def row(per_level):  # (L,) -> (M K,)
            per_sample = per_level.to(torch.int32).repeat_interleave(points)
            return per_sample.repeat(heads)

        self.width = row(width).to(dtype)
        self.height = row(height).to(dtype)

        # locations and attention
        size = torch.stack([width, height], -1)
        centre = reference.to(dtype) * size - 0.5
        centre = centre.repeat_interleave(points, 2)  # (B, Q, K, 2)
        offsets = offsets.to(dtype).contiguous()
        offsets = offsets.flatten(3, 4)  # (B, Q, M, K, 2)
        position = centre.unsqueeze(2) + offsets
        position = position.flatten(2, 3)  # (B, Q, M K, 2)
        x, y = position.unbind(-1)
        logits = logits.to(dtype).contiguous()
        logits = logits - logits.amax(-1, True)
        exp = logits.exp_()  # F.softmax is slow on rows of K
        exp.div_(exp.sum(-1, True))
        self.attention = exp.flatten(2)
        column, self.left, self.right, self.in_x = _axis(x, self.width)
        line, self.top, self.bottom, self.in_y = _axis(y, self.height)

        # indices of the corners
        image = torch.arange(batch).view(-1, 1, 1)
        image_start = image * pixels * heads
        head = torch.arange(heads, dtype=torch.int32)
        head = head.repeat_interleave(levels * points)
        first = (image_start + row(start * heads)).int()
        first = first + head
        line.mul_(row(width * heads))
        column.mul_(heads)
        self.base = line.add_(column).add_(first)
        right = heads * (width > 1)
        below = heads * width * (height > 1)
        steps = torch.stack([0 * right, right, below, right + below]).int()  # (4, L)
        steps = steps.repeat_interleave(points, 1)  # (4, K)
        top_left = self.base.view(-1, 1, levels * points)
        self.corners = top_left + steps

    def weights(self) -> list[Tensor]:
        """Returns attention times bilinear weight of the four corners: 4 tensors (B Q M, K)."""
        top = self.attention * self.top
        bottom = self.attention * self.bottom
        samples = self.corners.shape[-1]
        top_left = top * self.left
        top_right = top * self.right
        bottom_left = bottom * self.left
        bottom_right = bottom * self.right
        corners = (top_left, top_right, bottom_left, bottom_right)
        return [corner.view(-1, samples) for corner in corners]


def _forward_cpu(value, offsets, logits, reference, sizes):
    """Returns `out` (B, Q, M d): sums the 4 K weighted corners of each query and head."""
    samples = _Samples(value, offsets, logits, reference, sizes)
    _, queries, heads = offsets.shape[:3]
    rows = value.reshape(-1, value.shape[-1])  # (B S M, d)
    rows = rows.to(samples.attention.dtype)
    weights = torch.cat(samples.weights(), 1)  # (B Q M, 4 K)
    corners = samples.corners.flatten(1)
    out = F.embedding_bag(corners, rows, mode="sum", per_sample_weights=weights)
    return out.view(len(offsets), queries, heads * out.shape[-1])


def _backward_cpu(grad, value, offsets, logits, reference, out, sizes):
    """Returns the gradients of value, offsets and logits. `out` is unused; only Triton needs it."""
    samples = _Samples(value, offsets, logits, reference, sizes)
    dtype = samples.attention.dtype
    rows = value.reshape(-1, value.shape[-1]).to(dtype)  # (B S M, d)
    grad = grad.reshape(-1, value.shape[-1]).to(dtype)  # (B Q M, d)
    dots = _corner_products(samples, grad, rows)
    left_slope, right_slope = _slopes(samples.in_x, samples.width)
    top_slope, bottom_slope = _slopes(samples.in_y, samples.height)
    upper = samples.left * dots[0] + samples.right * dots[1]
    lower = samples.left * dots[2] + samples.right * dots[3]
    on_left = samples.top * dots[0] + samples.bottom * dots[2]
    on_right = samples.top * dots[1] + samples.bottom * dots[3]
    along_x = left_slope * on_left
    along_x += right_slope * on_right
    along_y = top_slope * upper + bottom_slope * lower
    grad_offsets = torch.stack([along_x, along_y], -1)
    grad_offsets.mul_(samples.attention[..., None])
    found = samples.top * upper + samples.bottom * lower  # <grad, sample>
    found = found.view(logits.shape)
    attention = samples.attention.view(logits.shape)
    delta = (attention * found).sum(-1, True)
    grad_logits = attention * (found - delta)
    grad_value = _value_gradient(samples, grad, value.shape)
    return (
        grad_value.to(value.dtype),
        grad_offsets.view(offsets.shape).to(offsets.dtype),
        grad_logits.to(logits.dtype),
    )


def _corner_products(samples: _Samples, grad: Tensor, rows: Tensor) -> list[Tensor]:
    """Returns the dot products <grad, value> at each corner: 4 tensors (B, Q, M K).

    grad: (B Q M, d); rows: (B S M, d), the value. Of the product grad @ rows.T, only the entries of
    the corners are computed.
    """
    count, _, k = samples.corners.shape
    entries = 4 * k * count
    ends = torch.arange(0, entries + 1, 4 * k, dtype=torch.int32)
    zeros = torch.zeros(entries, dtype=grad.dtype)
    # torch wants at least as many columns as entries in a line
    lacking = max(4 * k - len(rows), 0)
    rows = F.pad(rows, (0, 0, 0, lacking))
    size = (count, len(rows))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            ends, samples.corners.flatten(), zeros, size, check_invariants=False
        )
    torch.sparse.sampled_addmm(pattern, grad, rows.t(), beta=0.0, out=pattern)
    products = pattern.values().view(count, 4, k)
    return [product.reshape_as(samples.base) for product in products.unbind(1)]


def _value_gradient(samples: _Samples, grad: Tensor, shape: torch.Size) -> Tensor:
    """Returns the gradient of value, of `shape` (B, S, M, d), from the gradient of out (B Q M, d).

    The samples are sorted by their top left corner. For each of the four corners, each row of the
    result then sums a bag of rows of `grad`.
    """
    batch, pixels, heads, d = shape
    keys, order = samples.base.flatten().sort(stable=True)
    all_rows = torch.arange(batch * pixels * heads, dtype=torch.int32)
    starts = torch.searchsorted(keys, all_rows)
    queries = order // samples.corners.shape[-1]
    grad_value = torch.zeros(batch, pixels, heads * d, dtype=grad.dtype)
    for corner, weights in enumerate(samples.weights()):
        weights = weights.flatten()[order]
        sums = F.embedding_bag(queries, grad, starts, mode="sum", per_sample_weights=weights)
        sums = sums.view_as(grad_value)
        for height, width, start in samples.levels.tolist():
            step = corner % 2 + corner // 2 * width  # pixels from the top left corner to this one
            # the last `step` pixels of a level have no such neighbour: their sums are 0
            kept = max(height * width - step, 0)
            neighbour = start + step
            part = sums[:, start : start + kept]
            grad_value[:, neighbour : neighbour + kept] += part
    return grad_value.view(shape)


# -- CUDA ------------------------------------------------------------------------------------------


def _launch(kernel, reference, sizes, value, offsets, logits, *others):
    """Runs the Triton `kernel` on all tiles. others: its tensors that come after `logits`."""
    batch, pixels, heads, d = value.shape
    _, queries, _, levels, points, _ = offsets.shape
    padded = [triton.next_power_of_2(n) for n in (points, levels * points, d)]
    block = padded[0] * padded[2]
    # 16 numbers of a block (T, P, d) per thread: with fewer, index arithmetic repeats; with more,
    # the registers suffice for few programs only
    tile = max(2048 // block, 1)
    tile = min(tile, 64)
    reference = reference.float()
    tensors = [x.contiguous() for x in (value, offsets, logits)]
    numbers = (pixels, queries, heads, *reference.stride(), levels, points, d, tile, *padded)
    if batch * queries * heads:
        grid = (triton.cdiv(queries, tile), batch * heads)
        table = _levels(tuple(sizes), value.device)
        kernel[grid](reference, table, *tensors, *others, *numbers, num_warps=4)


def _forward_triton(value, offsets, logits, reference, sizes):
    """Returns `out` (B, Q, M d), computed by `_forward_kernel`."""
    _, _, heads, d = value.shape
    batch, queries = offsets.shape[:2]
    out = value.new_empty(batch, queries, heads * d, dtype=torch.float32)
    _launch(_forward_kernel, reference, sizes, value, offsets, logits, out)
    return out


def _backward_triton(grad, value, offsets, logits, reference, out, sizes):
    """Returns the gradients of value, offsets and logits, computed by `_backward_kernel`."""
    # single precision, as many small numbers meet in a pixel; they come in any order, so the last
    # digits vary between runs
    grad_value = value.new_zeros(value.shape, dtype=torch.float32)
    grad_offsets = offsets.new_empty(offsets.shape)
    grad_logits = logits.new_empty(logits.shape)
    others = (out, grad.contiguous(), grad_value, grad_offsets, grad_logits)
    _launch(_backward_kernel, reference, sizes, value, offsets, logits, *others)
    return grad_value.to(value.dtype), grad_offsets, grad_logits


KERNELS = {"cpu": (_forward_cpu, _backward_cpu)}
if triton is not None:
    KERNELS["cuda"] = (_forward_triton, _backward_triton)


# The schemas are written out: torch 2.6 does not read them from list[int] and tuple[Tensor, ...].
@torch.library.custom_op(
    "concord::msda",
    mutates_args=(),
    schema="(Tensor value, Tensor offsets, Tensor logits, Tensor reference, int[] sizes) -> Tensor",
)
def _msda(
    value: Tensor, offsets: Tensor, logits: Tensor, reference: Tensor, sizes: list[int]
) -> Tensor:
    forward, _ = KERNELS[value.device.type]
    return forward(value, offsets, logits, reference, sizes)


@_msda.register_fake
def _(value, offsets, logits, reference, sizes):
    batch, _, heads, d = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    return value.new_empty(batch, offsets.shape[1], heads * d, dtype=dtype)


@torch.library.custom_op(
    "concord::msda_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor value, Tensor offsets, Tensor logits, Tensor reference,"
    " Tensor out, int[] sizes) -> (Tensor, Tensor, Tensor)",
)
def _msda_backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference: Tensor,
    out: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    _, backward = KERNELS[value.device.type]
    return backward(grad, value, offsets, logits, reference, out, sizes)


@_msda_backward.register_fake
def _(grad, value, offsets, logits, reference, out, sizes):
    return tuple(x.new_empty(x.shape) for x in (value, offsets, logits))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, grad):
    grads = _msda_backward(grad, *ctx.saved_tensors, ctx.sizes)
    return *grads, None, None  # none of reference and sizes


_msda.register_autograd(_backward, setup_context=_setup_context)
