"""The CDM's convolution in Triton (Eq. 6): each image has its own kernel, a mixture of G of them.

    Y[b, c, p] = sum_{t, d} K_b[c, t, d] X[b, d, p + t] + bias[c]        K_b = sum_g S[b, g] W_g

    X x (B, D, h, w)    S scores (B, G)    W weight (G, C, D, k, k), k 1 or 3    bias (C)
    Y (B, C, h, w)      p position, t one of the k*k taps around it      X is zero outside h x w

One convolution, and an operator for each use of it, which computes what that use needs:

    window_sums     what the logits need of X: training and classification
    class_products  the maps of K requested classes: localisation
    dynamic_conv2d  all C maps: localize(images, "all") alone

x may have any strides: the token view, whose channels lie together, is read without a copy. Maps
are written channels-last. Sums are float32. No atomics: the same bits on every run. Offsets inside
an image, or a kernel W_g, are 32-bit numbers, those of an image 64-bit ones. torch computes the
gradients of the maps: no path of the model trains through them.

All shapes but the batch and K are compile-time constants (h, w are GRID_H, GRID_W in the code): of
a run-time integer Triton knows only whether 16 divides it, so rows of C = 200 would be loaded 2
bytes at a time, and divisions by w would be real ones. A new shape is compiled once, for a few
seconds. docs/kernels.md says on what the kernels ran.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot_precision, launch, short_offsets

# Tile sizes that compile without spills on all targets (python -m kernels.benchmark --compile),
# some by bytes per element.
BLOCKS = {
    "window_sums_kernel": dict(BLOCK_D=64, BLOCK_P=32, num_warps=4, num_stages=3),
    "window_sums_backward_kernel": dict(BLOCK_D=64, BLOCK_P=32, num_warps=4),
    "class_products_kernel": {
        2: dict(BLOCK_P=128, BLOCK_D=64, num_warps=8, num_stages=2),
        4: dict(BLOCK_P=128, BLOCK_D=32, num_warps=8, num_stages=2),
    },
    "conv_kernel": {
        2: dict(BLOCK_P=128, BLOCK_C=64, BLOCK_D=32, num_warps=8, num_stages=3),
        4: dict(BLOCK_P=64, BLOCK_C=64, BLOCK_D=32, num_warps=8, num_stages=2),
    },
}
MAX_STAGED = 8  # kernels W_g whose tiles conv_kernel loads ahead; with more it loads none ahead


# ------------------------------------------------------------ window_sums: the maps' global average
#
#     for u, v in itertools.product(range(k), range(k)):            r = k // 2, t = (u - r, v - r)
#         shifted = F.pad(x, (r - v, v - r, r - u, u - r))          X[p + t], zeros outside
#         P[:, :, u * k + v] = shifted.mean((2, 3))                 P (B, D, k*k)
#     logits = P.flatten(1) @ mixed.flatten(2).mT                   K_b, as in dynamic_conv2d
#
# The mean over positions commutes with the convolution, which is linear: no map is computed. How
# often position p enters the sum of tap t is a small integer, so P is one matrix product of these
# counts with X, on the tensor cores, and X is read once. A program owns BLOCK_D channels of one
# image, all taps.
#
# Gradient: dX is the counts' transpose times dP. A program owns BLOCK_P positions of BLOCK_D
# channels.


@triton.jit
def window_counts(
    p, tap, GRID_H: tl.constexpr, GRID_W: tl.constexpr, KERNEL: tl.constexpr, PADDED: tl.constexpr
):
    """How often X[p] enters the pool through a tap: 0 or 1, or 0 .. 9 if PADDED.

    Tap t lets output position p - t read it, if there is one. The padded pool averages 3 x 3
    outputs around each position first, so an output counts once for each neighbour that exists.
    """
    row = p // GRID_W - (tap // KERNEL - KERNEL // 2)
    column = p % GRID_W - (tap % KERNEL - KERNEL // 2)
    exists = (p < GRID_H * GRID_W) & (tap < KERNEL * KERNEL)
    inside = exists & (row >= 0) & (row < GRID_H) & (column >= 0) & (column < GRID_W)
    count = inside.to(tl.int32)
    if PADDED:
        count *= 1 + (row > 0).to(tl.int32) + (row < GRID_H - 1).to(tl.int32)
        count *= 1 + (column > 0).to(tl.int32) + (column < GRID_W - 1).to(tl.int32)
    return count


@triton.jit
def window_sums_kernel(
    x, sums,  # (B, D, h, w), (B, D, k*k)
    stride_b: tl.constexpr, stride_d: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    D: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr,
    KERNEL: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAP: tl.constexpr, PRECISION: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tap = tl.arange(0, BLOCK_TAP)
    x += b * stride_b
    sums += b * D * KERNEL * KERNEL
    acc = tl.zeros([BLOCK_TAP, BLOCK_D], tl.float32)
    for start in range(0, GRID_H * GRID_W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x_tile = tl.load(
            x + (p // GRID_W * stride_h + p % GRID_W * stride_w)[:, None] + d[None, :] * stride_d,
            mask=(p[:, None] < GRID_H * GRID_W) & (d[None, :] < D), other=0.0,
        )
        counts = window_counts(p[None, :], tap[:, None], GRID_H, GRID_W, KERNEL, PADDED)
        acc = tl.dot(counts.to(x_tile.dtype), x_tile, acc, input_precision=PRECISION)
    mean = acc / (9 * GRID_H * GRID_W if PADDED else GRID_H * GRID_W)
    tl.store(
        sums + d[None, :] * KERNEL * KERNEL + tap[:, None],
        mean.to(sums.dtype.element_ty),
        mask=(tap[:, None] < KERNEL * KERNEL) & (d[None, :] < D),
    )


@triton.jit
def window_sums_backward_kernel(
    grad_sums, grad_x,  # (B, D, k*k); (B, h, w, D) in memory
    D: tl.constexpr, GRID_H: tl.constexpr, GRID_W: tl.constexpr,
    KERNEL: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAP: tl.constexpr, PRECISION: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    tap = tl.arange(0, BLOCK_TAP)
    grad_sums += b * D * KERNEL * KERNEL
    grad_x += b * GRID_H * GRID_W * D
    gradient = tl.load(
        grad_sums + d[None, :] * KERNEL * KERNEL + tap[:, None],
        mask=(tap[:, None] < KERNEL * KERNEL) & (d[None, :] < D), other=0.0,
    )
    counts = window_counts(p[:, None], tap[None, :], GRID_H, GRID_W, KERNEL, PADDED)
    spread = tl.dot(counts.to(gradient.dtype), gradient, input_precision=PRECISION)
    tl.store(
        grad_x + p[:, None] * D + d[None, :],
        (spread / (9 * GRID_H * GRID_W if PADDED else GRID_H * GRID_W)).to(grad_x.dtype.element_ty),
        mask=(p[:, None] < GRID_H * GRID_W) & (d[None, :] < D),
    )


@torch.library.custom_op(f"{__package__}::window_sums", mutates_args=())
def window_sums(x: Tensor, kernel: int, padded: bool) -> Tensor:
    """x (B, D, h, w) -> its means over the k*k windows (B, D, k*k): all that logits need of x."""
    x = short_offsets("x", x, 1)
    B, D, h, w = x.shape
    sums = _sums_shape(x, kernel, padded)
    blocks = BLOCKS["window_sums_kernel"]
    grid = (B, triton.cdiv(D, blocks["BLOCK_D"]))
    launch(window_sums_kernel, grid, x, sums, *x.stride(), D, h, w, kernel, padded, BLOCK_TAP=16,
           PRECISION=dot_precision(), **blocks)
    return sums


@torch.library.custom_op(f"{__package__}::window_sums_backward", mutates_args=())
def window_sums_backward(grad: Tensor, h: int, w: int, kernel: int, padded: bool) -> Tensor:
    """dP (B, D, k*k) -> dX (B, D, h, w), channels-last."""
    B, D, _ = grad.shape
    grad_x = _spread_shape(grad, h, w, kernel, padded)
    short_offsets("x's gradient", grad_x, 1)
    blocks = BLOCKS["window_sums_backward_kernel"]
    grid = (B, triton.cdiv(D, blocks["BLOCK_D"]), triton.cdiv(h * w, blocks["BLOCK_P"]))
    launch(window_sums_backward_kernel, grid, grad.contiguous(), grad_x, D, h, w, kernel, padded,
           BLOCK_TAP=16, PRECISION=dot_precision(), **blocks)
    return grad_x


# -------------------------------------------------------- class_products: maps of requested classes
#
#     mixed = torch.einsum("bg,gbkduv->bkduv", scores, weight[:, classes])      (B, K, D, k, k)
#     products = torch.einsum("bdp,bkduv->bkuvp", x.flatten(2), mixed.flip(3, 4))
#     maps = F.fold(products.flatten(1, 3), (h, w), k, padding=k // 2)          (B, K, h, w)
#
# Output channels are independent: only the requested kernels are mixed. products[n, p], for pair
# n = (class c, tap t), is what position p adds to Y[p + t]: sum_d K_b[c, -t, d] X[d, p]. A program
# owns BLOCK_P positions of one image for BLOCK_PAIR pairs side by side, so X is not shifted but
# read once for up to 7 classes. torch adds up the k*k products of each class, a small array.
#
# W is read in the parameter's own layout, without a copy: with k = 3 its channels lie 9 elements
# apart, so its few loads move one element a lane. With k = 1 they move 16 bytes, as X's do.


@triton.jit
def class_products_kernel(
    x, scores, weight, classes,  # (B, D, h, w); (B, G); (G, C, D, k*k); (B, K)
    products,  # (B, K*k*k, h*w)
    stride_b: tl.constexpr, stride_d: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    K, GRID_H: tl.constexpr, GRID_W: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PAIR: tl.constexpr, PRECISION: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    pair = tl.program_id(2) * BLOCK_PAIR + tl.arange(0, BLOCK_PAIR)
    x += b * stride_b
    products += b * K * TAPS * GRID_H * GRID_W
    c = tl.load(classes + b * K + pair // TAPS, mask=pair < K * TAPS, other=0)
    known = (c >= 0) & (c < C)
    c = c.to(tl.int32)
    nothing = tl.where(known, 0.0, float("nan"))[None, :]  # an unknown class's kernel
    acc = tl.zeros([BLOCK_P, BLOCK_PAIR], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_tile = tl.load(
            x + (p // GRID_W * stride_h + p % GRID_W * stride_w)[:, None] + d[None, :] * stride_d,
            mask=(p[:, None] < GRID_H * GRID_W) & (d[None, :] < D), other=0.0,
        )
        w_tiles = weight + (c[None, :] * D + d[:, None]) * TAPS + (TAPS - 1 - pair[None, :] % TAPS)
        w_inside = known[None, :] & (pair[None, :] < K * TAPS) & (d[:, None] < D)
        kernel = tl.zeros([BLOCK_D, BLOCK_PAIR], tl.float32) + nothing  # K_b's tile
        for g in range(G):
            w_tile = tl.load(w_tiles, mask=w_inside, other=0.0).to(tl.float32)
            kernel += tl.load(scores + b * G + g) * w_tile
            w_tiles += C * D * TAPS
        acc = tl.dot(x_tile, kernel.to(x_tile.dtype), acc, input_precision=PRECISION)
    tl.store(
        products + pair[None, :] * (GRID_H * GRID_W) + p[:, None],
        acc,
        mask=(p[:, None] < GRID_H * GRID_W) & (pair[None, :] < K * TAPS),
    )


@torch.library.custom_op(f"{__package__}::class_products", mutates_args=())
def class_products(x: Tensor, scores: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """x (B, D, h, w), scores (B, G), weight (G, C, D, k, k), classes (B, K) -> (B, K*k*k, h*w).

    float32. No gradient. An id outside 0 .. C-1 reads nothing and gives NaN.
    """
    x, weight = short_offsets("x", x, 1), short_offsets("weight", weight.contiguous(), 1)
    B, D, h, w = x.shape
    G, C, _, k, _ = weight.shape
    K = classes.shape[1]
    products = _products_shape(x, scores, weight, classes)
    short_offsets("products", products, 1)
    blocks = BLOCKS["class_products_kernel"][x.itemsize]
    columns = min(max(16, triton.next_power_of_2(K * k * k)), 64)
    if columns == 16:  # W's tile is 16 bytes for each thread of four warps
        blocks = blocks | dict(num_warps=4)
    grid = (B, triton.cdiv(h * w, blocks["BLOCK_P"]), triton.cdiv(K * k * k, columns))
    launch(
        class_products_kernel, grid, x, scores.float().contiguous(), weight, classes.contiguous(),
        products, *x.stride(), K, h, w, C, D, G, k * k, BLOCK_PAIR=columns,
        PRECISION=dot_precision(), **blocks,
    )
    return products


# ---------------------------------------------------------------- dynamic_conv2d: Eq. 6, all C maps
#
# For localize(images, classes="all") alone: logits and requested classes cost less, above.
#
#     mixed = torch.einsum("bg,gcduv->bcduv", scores, weight)       K_b (B, C, D, k, k)
#     maps = [F.conv2d(image, kernel, bias, padding=k // 2) for image, kernel in zip(x, mixed)]
#
# torch writes and reads K_b: 177 MB for 128 images, C = 200, D = 384 in 16 bits. Here K_b is mixed
# in registers, tile by tile, and never written. A program of conv_kernel owns BLOCK_P positions of
# BLOCK_C classes of one image: a matrix product over taps and channels. Tap t reads position p + t,
# so each output is summed in registers and written once.
#
# The price: each program mixes its tiles anew, so each block of positions of each image reads W
# again, from L2 (5.5 MB at C = 200). This saves memory, hardly time, over a grouped convolution.


@triton.jit
def conv_kernel(
    x, scores, weight, bias,  # (B, D, h, w); (B, G); (G, C, k*k, D) in memory; (C) or None
    out,  # (B, h, w, C) in memory
    stride_b: tl.constexpr, stride_d: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    KERNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += b * stride_b
    scores += b * G
    out += b * GRID_H * GRID_W * C
    steps: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D

    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(KERNEL * KERNEL * steps):  # one loop, so that loads run ahead across taps
        tap, d = step // steps, step % steps * BLOCK_D + tl.arange(0, BLOCK_D)
        row = p // GRID_W + tap // KERNEL - KERNEL // 2
        column = p % GRID_W + tap % KERNEL - KERNEL // 2
        inside = (row >= 0) & (row < GRID_H) & (column >= 0) & (column < GRID_W)
        x_tile = tl.load(
            x + (row * stride_h + column * stride_w)[:, None] + d[None, :] * stride_d,
            mask=inside[:, None] & (d[None, :] < D), other=0.0,
        )
        w_tiles = weight + (c[None, :] * KERNEL * KERNEL + tap) * D + d[:, None]
        w_inside = (d[:, None] < D) & (c[None, :] < C)
        kernel = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)  # K_b's tile
        for g in tl.static_range(G):
            w_tile = tl.load(
                w_tiles + g * C * KERNEL * KERNEL * D, mask=w_inside, other=0.0).to(tl.float32)
            kernel += tl.load(scores + g) * w_tile
        acc = tl.dot(x_tile, kernel.to(x_tile.dtype), acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + p[:, None] * C + c[None, :],
        acc.to(out.dtype.element_ty),
        mask=(p[:, None] < GRID_H * GRID_W) & (c[None, :] < C),
    )


@torch.library.custom_op(f"{__package__}::dynamic_conv2d", mutates_args=())
def dynamic_conv2d(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, D, h, w), scores (B, G), weight (G, C, D, k, k), bias (C) or None -> (B, C, h, w).

    No gradient.
    """
    # (G, C, k*k, D): one copy, for loads of 16 bytes
    weight = short_offsets("weight", weight.flatten(3).transpose(2, 3).contiguous(), 1)
    x = short_offsets("x", x, 1)
    B, D, h, w = x.shape
    G, C, taps, _ = weight.shape
    out = x.new_empty(B, h, w, C).permute(0, 3, 1, 2)
    short_offsets("maps", out, 1)
    blocks = BLOCKS["conv_kernel"][x.itemsize]
    if G > MAX_STAGED:
        blocks = blocks | dict(num_stages=1)
    grid = (B, triton.cdiv(h * w, blocks["BLOCK_P"]), triton.cdiv(C, blocks["BLOCK_C"]))
    launch(
        conv_kernel, grid, x, scores.float().contiguous(), weight,
        None if bias is None else bias.contiguous(), out, *x.stride(), h, w, C, D, G,
        round(taps**0.5), PRECISION=dot_precision(), **blocks,
    )
    return out


# ----------------------------------------- what torch must know of the operators: see launch.py


@window_sums.register_fake
def _sums_shape(x, kernel, padded):
    return x.new_empty(*x.shape[:2], kernel * kernel)


@window_sums_backward.register_fake
def _spread_shape(grad, h, w, kernel, padded):
    return grad.new_empty(len(grad), h, w, grad.shape[1]).permute(0, 3, 1, 2)


def _save_windows(ctx, inputs, output):
    x, *ctx.window = inputs
    ctx.size = x.shape[2:]


def _windows_gradient(ctx, grad):
    return window_sums_backward(grad, *ctx.size, *ctx.window), None, None


window_sums.register_autograd(_windows_gradient, setup_context=_save_windows)


@class_products.register_fake
def _products_shape(x, scores, weight, classes):
    B, _, h, w = x.shape
    return x.new_empty(B, classes.shape[1] * weight.shape[3] ** 2, h * w, dtype=torch.float32)


@dynamic_conv2d.register_fake
def _maps_shape(x, scores, weight, bias):
    B, _, h, w = x.shape
    return x.new_empty(B, h, w, weight.shape[1]).permute(0, 3, 1, 2)  # channels-last
