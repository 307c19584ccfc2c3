"""The Triton kernels of multi-scale deformable attention (`common.msda`).

A program takes a tile of T queries of one head of one image. The P points of a level are one block
(T, P, d), so that many independent rows are in flight. Neighbouring queries find most corners in
the L1 cache. The sizes of the levels come as a tensor, because then images of a new size need no
new kernel. L, P and d are compile-time constants. TP, TK and TD are P, K and d, each rounded up to
a power of two. Pixels of an image are counted in 32 bits, all else in 64.

Shapes: as in `common.msda`. Shapes (T, P, d) stand for blocks (T, TP, TD). Tensor arguments are
pointers to their first number.
"""

import triton
import triton.language as tl


@triton.jit
def _axis_kernel(position, size):
    """Computes the weights of linear interpolation along one axis. The map is zero outside.

    position: (T, P) float32 in pixels; size: pixels of the axis

    Returns five blocks (T, P):
    - first, int32: floor(position), clamped to [0, size - 2]
    - the weight of pixel `first`
    - the weight of pixel first + 1
    - the derivative of the first weight by the position
    - the derivative of the second weight by the position
    Beyond the border the weights sum to less than 1. If size is 1, first is 0, and the weight of
    pixel 1 and its derivative are 0. At a NaN, first is 0 and the weights are NaN.
    """
    floor = tl.floor(position)
    last = tl.maximum(size - 2, 0).to(tl.float32)
    first = tl.minimum(tl.maximum(floor, 0.0), last)
    ahead = position - first
    interval = floor - first
    low = tl.maximum(1 - tl.abs(ahead), 0.0, tl.PropagateNan.ALL)
    high = tl.maximum(1 - tl.abs(ahead - 1), 0.0, tl.PropagateNan.ALL)
    between = (interval == 0).to(tl.float32)
    low_slope = (interval == -1).to(tl.float32) - between
    high_slope = between - (interval == 1).to(tl.float32)
    two = (size > 1).to(tl.float32)
    return first.to(tl.int32), low, high * two, low_slope, high_slope * two


@triton.jit
def _tile_kernel(queries, heads, T):
    """Returns (image, head, query, row, inside) of the program's tile.

    query:  (T,), indices in 0..Q-1
    row:    (T,), row of each query in a tensor (B Q M, ...)
    inside: (T,), False for queries beyond the end
    """
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query = tl.program_id(0) * T + tl.arange(0, T)
    row = (image * queries + query) * heads + head
    return image, head, query, row, query < queries


@triton.jit
def _softmax_kernel(logits, row, inside, K, TK):
    """Returns per query the maximum of its K logits and the sum of exp(logit - maximum), (T,) each.

    row: (T,), row in logits (B Q M, K); inside: (T,), False for queries beyond the end
    """
    k = tl.arange(0, TK)
    valid = inside[:, None] & (k < K)
    scores = tl.load(logits + (row * K)[:, None] + k, valid, other=0.0)
    scores = tl.where(k < K, scores.to(tl.float32), float("-inf"))
    highest = tl.max(scores, 1)
    total = tl.sum(tl.exp(scores - highest[:, None]), 1)
    return highest, total


@triton.jit
def _attention_kernel(logits, sample, valid, highest, total):
    """Returns the attention of the samples of one level, (T, P), after the softmax over all levels.

    sample: (T, P), indices in the flat logits; valid: (T, P), False where no sample exists
    highest, total: (T,), results of `_softmax_kernel`
    """
    scores = tl.load(logits + sample, valid, other=0.0).to(tl.float32)
    attention = tl.exp(scores - highest[:, None]) / total[:, None]
    return tl.where(valid, attention, 0.0)


@triton.jit
def _position_kernel(offsets, sample, valid, reference, ref_xy, inside, level):
    """Returns x and y of the samples of one level, each (T, P), in pixels of the level.

    sample, valid: as in `_attention_kernel`; inside: (T,), False for queries beyond the end
    reference:     (T,), pointers to x of each query's reference point; y is ref_xy numbers further
    level:         pointer to the height of the level; the width follows it
    """
    xy = offsets + 2 * sample[:, :, None] + tl.arange(0, 2)
    x, y = tl.split(tl.load(xy, valid[:, :, None], other=0.0).to(tl.float32))
    ref_x = tl.load(reference, inside, other=0.0)
    ref_y = tl.load(reference + ref_xy, inside, other=0.0)
    x += (ref_x * tl.load(level + 1) - 0.5)[:, None]
    y += (ref_y * tl.load(level) - 0.5)[:, None]
    return x, y


@triton.jit
def _corner_kernel(x, y, valid, level, heads, D, TD):
    """Finds the four nearest pixels (corners) of the samples of one level.

    x, y:  (T, P), in pixels; valid: (T, P), False where no sample exists
    level: pointer to the level's height; its width and its first pixel follow

    Returns (x_axis, y_axis, corner, below, near, near_right, near_below).
    x_axis, y_axis:               four blocks (T, P) each: both weights, then both derivatives
    corner, below:                (T, P, d), indices of the top left and the bottom left corner in
                                  the value of one image and head
    near, near_right, near_below: (T, P, d), True if the top left, the top right or the bottom left
                                  corner exists
    """
    d = tl.arange(0, TD)
    height = tl.load(level)
    width = tl.load(level + 1)
    start = tl.load(level + 2)
    column, left, right, left_slope, right_slope = _axis_kernel(x, width)
    line, upper, lower, upper_slope, lower_slope = _axis_kernel(y, height)
    pixel = start + line * width + column
    corner = (pixel * heads * D)[:, :, None] + d
    below = corner + width * heads * D
    in_x = (x >= -1) & (x < width)
    in_y = (y >= -1) & (y < height)
    near = (valid & in_x & in_y)[:, :, None] & (d < D)
    near_right = near & (column + 1 < width)[:, :, None]
    near_below = near & (line + 1 < height)[:, :, None]
    x_axis = (left, right, left_slope, right_slope)
    y_axis = (upper, lower, upper_slope, lower_slope)
    return x_axis, y_axis, corner, below, near, near_right, near_below


@triton.jit
def _read(pointer, weight, mask):
    """Returns the vectors at `pointer` (T, P, d), each times its weight (T, P); 0 outside mask."""
    return weight[:, :, None] * tl.load(pointer, mask, other=0.0)


@triton.jit
def _dot(g, pointer, mask):
    """Returns the dot products (T, P) of g (T, 1, d) and the vectors at `pointer` (T, P, d)."""
    return tl.sum(g * tl.load(pointer, mask, other=0.0), 2)


@triton.jit
def _add(pointer, weight, g, mask):
    """Adds g (T, 1, d) times the weight (T, P) to the vectors at `pointer` (T, P, d), in place."""
    tl.atomic_add(pointer, weight[:, :, None] * g, mask, sem="relaxed")


@triton.jit
def _forward_kernel(
    reference,
    levels,
    value,
    offsets,
    logits,
    out,
    pixels,
    queries,
    heads,
    ref_b,
    ref_q,
    ref_l,
    ref_xy,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    TK: tl.constexpr,
    TD: tl.constexpr,
):
    """Writes `out` (B, Q, M d) for one tile.

    reference: (B, Q, L, 2) in 0..1, with the strides ref_b, ref_q, ref_l and ref_xy
    levels:    (L, 3): height, width and first pixel of each level
    value:     (B, S, M, d); offsets: (B, Q, M, L, P, 2) in pixels; logits: (B, Q, M, K)
    out:       float32 also if value is not: the backward pass takes differences from it
    pixels:    S; queries: Q; heads: M; D: d
    """
    image, head, query, row, inside = _tile_kernel(queries, heads, T)
    p = tl.arange(0, TP)
    valid = inside[:, None] & (p < P)
    d = tl.arange(0, TD)
    exists = inside[:, None] & (d < D)
    value += (image * pixels * heads + head) * D
    reference += image * ref_b + query * ref_q
    highest, total = _softmax_kernel(logits, row, inside, L * P, TK)
    step = heads * D  # from a pixel to the next
    sums = tl.zeros((T, TP, TD), tl.float32)
    for i in tl.static_range(L):
        level = levels + 3 * i
        point = reference + i * ref_l
        sample = (row * (L * P) + i * P)[:, None] + p
        attention = _attention_kernel(logits, sample, valid, highest, total)
        x, y = _position_kernel(offsets, sample, valid, point, ref_xy, inside, level)
        x_axis, y_axis, corner, below, near, near_right, near_below = _corner_kernel(
            x, y, valid, level, heads, D, TD
        )
        left = x_axis[0]
        right = x_axis[1]
        upper = attention * y_axis[0]
        lower = attention * y_axis[1]
        corner = value + corner
        below = value + below
        sums += _read(corner, upper * left, near)
        sums += _read(corner + step, upper * right, near_right)
        sums += _read(below, lower * left, near_below)
        sums += _read(below + step, lower * right, near_right & near_below)
    here = (row * D)[:, None] + d
    tl.store(out + here, tl.sum(sums, 1), exists)


@triton.jit
def _backward_kernel(
    reference,
    levels,
    value,
    offsets,
    logits,
    out,
    grad,
    grad_value,
    grad_offsets,
    grad_logits,
    pixels,
    queries,
    heads,
    ref_b,
    ref_q,
    ref_l,
    ref_xy,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    TK: tl.constexpr,
    TD: tl.constexpr,
):
    """Writes grad_offsets and grad_logits for one tile, and adds the tile's part to grad_value.

    out:  the forward result; grad: its gradient
    grad_value, grad_offsets, grad_logits: shaped as value, offsets and logits
    The other parameters are those of `_forward_kernel`.
    """
    image, head, query, row, inside = _tile_kernel(queries, heads, T)
    p = tl.arange(0, TP)
    valid = inside[:, None] & (p < P)
    d = tl.arange(0, TD)
    exists = inside[:, None] & (d < D)
    start = (image * pixels * heads + head) * D
    value += start
    grad_value += start
    reference += image * ref_b + query * ref_q
    highest, total = _softmax_kernel(logits, row, inside, L * P, TK)
    step = heads * D  # from a pixel to the next
    here = (row * D)[:, None] + d
    g = tl.load(grad + here, exists, other=0.0).to(tl.float32)
    # delta = sum_k attention_k <grad, sample_k>
    delta = tl.sum(g * tl.load(out + here, exists, other=0.0), 1)
    g = g[:, None, :]
    for i in tl.static_range(L):
        level = levels + 3 * i
        point = reference + i * ref_l
        sample = (row * (L * P) + i * P)[:, None] + p
        attention = _attention_kernel(logits, sample, valid, highest, total)
        x, y = _position_kernel(offsets, sample, valid, point, ref_xy, inside, level)
        x_axis, y_axis, corner, below, near, near_right, near_below = _corner_kernel(
            x, y, valid, level, heads, D, TD
        )
        left, right, left_slope, right_slope = x_axis
        upper, lower, upper_slope, lower_slope = y_axis
        near_both = near_right & near_below
        # the products with grad at the four corners are all that the gradients of a sample need
        v00 = _dot(g, value + corner, near)
        v01 = _dot(g, value + corner + step, near_right)
        v10 = _dot(g, value + below, near_below)
        v11 = _dot(g, value + below + step, near_both)
        along_left = upper * v00 + lower * v10
        along_right = upper * v01 + lower * v11
        along_x = left_slope * along_left + right_slope * along_right
        v0 = left * v00 + right * v01
        v1 = left * v10 + right * v11
        along_y = upper_slope * v0 + lower_slope * v1
        found = upper * v0 + lower * v1
        tl.store(grad_logits + sample, attention * (found - delta[:, None]), valid)
        xy = grad_offsets + 2 * sample[:, :, None] + tl.arange(0, 2)
        slopes = tl.join(attention * along_x, attention * along_y)
        tl.store(xy, slopes, valid[:, :, None])
        upper = attention * upper
        lower = attention * lower
        corner = grad_value + corner
        below = grad_value + below
        _add(corner, upper * left, g, near)
        _add(corner + step, upper * right, g, near_right)
        _add(below, lower * left, g, near_below)
        _add(below + step, lower * right, g, near_both)
