"""The CDM's convolution in Triton (Eq. 6): every image is convolved with its own mixture of G kernels.

    Y[b, c, p] = sum_{t, d} K_b[c, t, d] X[b, d, p + t] + bias[c]        K_b = sum_g S[b, g] W_g

    X x (B, D, h, w)    S scores (B, G)    W weight (G, C, D, k, k), k 1 or 3    bias (C)    Y (B, C, h, w)

t runs over the k*k taps of the window around place p = (row, column), X is zero outside h x w (H x W in the code). One
operator, and for each use of it only what that use needs:
    dynamic_conv2d        all C maps. K_b is mixed in registers, tile by tile: it never exists in memory.
    dynamic_conv_logits   the maps' mean over places. It commutes with the convolution: X is summed over the k*k shifted
                          windows (one read of X), and one GEMM with W, torch's, remains. No map is computed.
    class_maps            the maps of K asked classes: only these kernels are mixed, and X is read once for 7 of them.

x (B, D, h, w) may have any strides: the token view, whose channels lie together, is read without a copy. Maps and dX
are written channels-last, as conv_kernel wants to read them. Sums are float32. No atomics: the same bits on every run.
Shapes other than the batch and K are compile-time constants. Of a run-time integer Triton knows only whether 16 divides
it: rows of C = 200 would be loaded 2 bytes at a time, and divisions by w would be real ones.

Limits: conv_kernel reads W again for every block of places of every image, from L2. So it saves the memory of the
per-image kernels (177 MB at B = 128, C = 200, D = 384 in 16 bits), but no time over a grouped convolution with them.
Run on Triton's interpreter and through the compilers for sm_80, sm_90 and gfx942; on no GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dot_precision  # how tl.dot multiplies float32: "tf32x3", "tf32" or "ieee"

# Tile sizes, some by bytes per element: what compiles without spills on sm_80 and sm_90 (benchmark.py --compile).
BLOCKS = {
    "conv_kernel": {2: dict(BLOCK_P=128, BLOCK_OUT=64, BLOCK_IN=32, num_warps=8, num_stages=3),
                    4: dict(BLOCK_P=64, BLOCK_OUT=64, BLOCK_IN=32, num_warps=8, num_stages=2)},
    "conv_weight_kernel": {2: dict(BLOCK_C=64, BLOCK_D=64, BLOCK_P=32, num_warps=8, num_stages=3),
                           4: dict(BLOCK_C=32, BLOCK_D=64, BLOCK_P=32, num_warps=8, num_stages=1)},
    "window_sums_kernel": dict(BLOCK_D=64, BLOCK_P=32, num_warps=4, num_stages=3),
    "window_sums_backward_kernel": dict(BLOCK_D=64, BLOCK_P=32, num_warps=4),
    "class_products_kernel": {2: dict(BLOCK_P=128, BLOCK_D=64, num_warps=8, num_stages=2),
                              4: dict(BLOCK_P=128, BLOCK_D=32, num_warps=8, num_stages=2)},
}
MAX_STAGED = 8  # kernels whose tiles conv_kernel loads ahead into shared memory; with more of them it loads none ahead
MAX_GROUP = 4  # kernels whose gradient tiles one program of conv_weight_kernel holds at a time


# -------------------------------------------------------------------------------------------------------- all maps


@triton.jit
def conv_kernel(
    x, scores, weight, bias, out,  # (B, IN, H, W); (B, G); (G, C, k*k, D) in memory; (C) or None; (B, H, W, OUT)
    stride_b: tl.constexpr, stride_c: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,  # x's
    stride_out: tl.constexpr, stride_in: tl.constexpr, stride_tap: tl.constexpr, stride_g: tl.constexpr,  # weight's
    H: tl.constexpr, W: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, G: tl.constexpr, KERNEL: tl.constexpr,
    DIRECTION: tl.constexpr,  # 1: the convolution, D channels to C. -1: its transpose, dX of dY, C channels to D.
    BLOCK_P: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):
    """A program owns BLOCK_P places x BLOCK_OUT channels of one image's output: a GEMM over taps and channels in.

    Tap t of the window reads place p + t (its transpose p - t) and multiplies it by the tile of K_b that it mixes. So
    each output is summed in registers and written once, and K_b is never written.
    """
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    x += b * stride_b
    scores += b * G
    weight += c_out[None, :] * stride_out
    steps: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN

    acc = tl.zeros([BLOCK_P, BLOCK_OUT], tl.float32)
    for step in range(KERNEL * KERNEL * steps):  # one loop, not two: so that loads run ahead across taps
        tap, c_in = step // steps, step % steps * BLOCK_IN + tl.arange(0, BLOCK_IN)
        row = p // W + DIRECTION * (tap // KERNEL - KERNEL // 2)
        column = p % W + DIRECTION * (tap % KERNEL - KERNEL // 2)
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        x_tile = tl.load(
            x + (row * stride_h + column * stride_w)[:, None] + c_in[None, :] * stride_c,
            mask=inside[:, None] & (c_in[None, :] < IN), other=0.0,
        )
        w_tiles = weight + tap * stride_tap + c_in[:, None] * stride_in
        w_inside = (c_in[:, None] < IN) & (c_out[None, :] < OUT)
        kernel = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
        for g in tl.static_range(G):
            w_tile = tl.load(w_tiles + g * stride_g, mask=w_inside, other=0.0).to(tl.float32)
            kernel += tl.load(scores + g) * w_tile
        acc = tl.dot(x_tile, kernel.to(x_tile.dtype), acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + c_out, mask=c_out < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + (b * H * W + p[:, None]) * OUT + c_out[None, :],
        acc.to(out.dtype.element_ty),
        mask=(p[:, None] < H * W) & (c_out[None, :] < OUT),
    )


@triton.jit
def conv_weight_kernel(
    x, grad, scores, weight,  # (B, D, H, W); dY (B, C, H, W); (B, G); (G, C, k*k, D) in memory
    grad_weight, grad_scores,  # as weight; (C blocks, D blocks, k*k, B, G): partial sums
    stride_xb: tl.constexpr, stride_xc: tl.constexpr, stride_xh: tl.constexpr, stride_xw: tl.constexpr,
    stride_yb: tl.constexpr, stride_yc: tl.constexpr, stride_yh: tl.constexpr, stride_yw: tl.constexpr,
    B, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_g = sum_b S[b, g] dK_b and dS[b, g] = <W_g, dK_b>, with dK_b[c, t, d] = sum_p dY[b, c, p] X[b, d, p + t].

    A program owns BLOCK_C x BLOCK_D of one tap, in BLOCK_G of the kernels: so it forms each image's dK_b tile once and
    uses it for both, in all of them. Its share of dS is a partial sum.
    """
    tap = tl.program_id(2) % (KERNEL * KERNEL)
    g = tl.program_id(2) // (KERNEL * KERNEL) * BLOCK_G + tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * KERNEL * KERNEL + tap
    w_offsets = ((g[:, None, None] * C + c[None, :, None]) * KERNEL * KERNEL + tap) * D + d[None, None, :]
    w_inside = (g[:, None, None] < G) & (c[None, :, None] < C) & (d[None, None, :] < D)

    acc = tl.zeros([BLOCK_G, BLOCK_C, BLOCK_D], tl.float32)
    for b in range(B):
        grad_kernel = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for start in range(0, H * W, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            row, column = p // W + tap // KERNEL - KERNEL // 2, p % W + tap % KERNEL - KERNEL // 2
            inside = (p < H * W) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            x_tile = tl.load(
                x + (row * stride_xh + column * stride_xw)[:, None] + d[None, :] * stride_xc,
                mask=inside[:, None] & (d[None, :] < D), other=0.0,
            )
            y_tile = tl.load(
                grad + (p // W * stride_yh + p % W * stride_yw)[:, None] + c[None, :] * stride_yc,
                mask=(p[:, None] < H * W) & (c[None, :] < C), other=0.0,
            )
            grad_kernel = tl.dot(tl.trans(y_tile), x_tile, grad_kernel, input_precision=PRECISION)
        score = tl.load(scores + b * G + g, mask=g < G, other=0.0)
        acc += score[:, None, None] * grad_kernel[None, :, :]
        w_tile = tl.load(weight + w_offsets, mask=w_inside, other=0.0).to(tl.float32)
        share = tl.sum(tl.sum(w_tile * grad_kernel[None, :, :], 2), 1)
        tl.store(grad_scores + (tile * B + b) * G + g, share, mask=g < G)
        x += stride_xb  # the next image
        grad += stride_yb
    tl.store(grad_weight + w_offsets, acc.to(grad_weight.dtype.element_ty), mask=w_inside)


def dynamic_conv2d(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, D, h, w), scores (B, G), weight (G, C, D, k, k), bias (C) or None -> (B, C, h, w), channels-last."""
    weight = weight.flatten(3).transpose(2, 3).contiguous()  # (G, C, k*k, D): one copy, for loads of 16 bytes
    return dynamic_conv2d_op(x, scores.float().contiguous(), weight, bias)


def _launch_conv(out: Tensor, x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, direction: int) -> None:
    """x (B, IN, h, w), scores (B, G), weight (G, C, k*k, D) -> out (B, OUT, h, w), channels-last."""
    B, IN, H, W = x.shape
    G, C, taps, D = weight.shape
    OUT, stride_out, stride_in = (C, taps * D, 1) if direction == 1 else (D, 1, taps * D)
    blocks = BLOCKS["conv_kernel"][x.itemsize]
    if G > MAX_STAGED:
        blocks = blocks | dict(num_stages=1)
    grid = (triton.cdiv(H * W, blocks["BLOCK_P"]), triton.cdiv(OUT, blocks["BLOCK_OUT"]), B)
    conv_kernel[grid](
        x, scores, weight, bias, out, *x.stride(), stride_out, stride_in, D, C * taps * D,
        H, W, OUT, IN, G, round(taps**0.5), direction, PRECISION=dot_precision(), **blocks,
    )


@torch.library.custom_op(f"{__package__}::dynamic_conv2d", mutates_args=())
def dynamic_conv2d_op(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As dynamic_conv2d, with weight (G, C, k*k, D) contiguous and scores contiguous float32."""
    out = _maps_shape(x, scores, weight, bias)
    _launch_conv(out, x, scores, weight, bias, direction=1)
    return out


@dynamic_conv2d_op.register_fake
def _maps_shape(x, scores, weight, bias):
    B, _, H, W = x.shape
    return x.new_empty(B, H, W, weight.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{__package__}::dynamic_conv2d_grad_x", mutates_args=())
def dynamic_conv2d_grad_x(grad: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
    """dY (B, C, h, w) -> dX (B, D, h, w), channels-last."""
    out = _grad_x_shape(grad, scores, weight)
    _launch_conv(out, grad, scores, weight, None, direction=-1)
    return out


@dynamic_conv2d_grad_x.register_fake
def _grad_x_shape(grad, scores, weight):
    B, _, H, W = grad.shape
    return grad.new_empty(B, H, W, weight.shape[3]).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{__package__}::dynamic_conv2d_grad_weight", mutates_args=())
def dynamic_conv2d_grad_weight(grad: Tensor, x: Tensor, scores: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dY, X, S, W -> dW (G, C, k*k, D), dS (B, G)."""
    B, D, H, W = x.shape
    G, C, taps, _ = weight.shape
    blocks = BLOCKS["conv_weight_kernel"][x.itemsize]
    group = min(triton.next_power_of_2(G), MAX_GROUP)
    tiles = (triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(D, blocks["BLOCK_D"]))
    grad_weight = torch.empty_like(weight)
    partial = scores.new_empty(*tiles, taps, B, G)
    conv_weight_kernel[(*tiles, taps * triton.cdiv(G, group))](
        x, grad, scores, weight, grad_weight, partial, *x.stride(), *grad.stride(),
        B, H, W, C, D, G, round(taps**0.5), group, PRECISION=dot_precision(), **blocks,
    )
    return grad_weight, partial.sum((0, 1, 2))  # (C blocks, D blocks, k*k, B, G) -> (B, G)


@dynamic_conv2d_grad_weight.register_fake
def _grad_weight_shapes(grad, x, scores, weight):
    return torch.empty_like(weight), torch.empty_like(scores)


def _save_convolution(ctx, inputs, output):
    x, scores, weight, bias = inputs
    ctx.save_for_backward(x, scores, weight)


def _convolution_gradients(ctx, grad):
    x, scores, weight = ctx.saved_tensors
    grad_x = grad_scores = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = dynamic_conv2d_grad_x(grad, scores, weight)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_scores = dynamic_conv2d_grad_weight(grad, x, scores, weight)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_scores, grad_weight, grad_bias


dynamic_conv2d_op.register_autograd(_convolution_gradients, setup_context=_save_convolution)


# ------------------------------------------------------------------------------------------- their mean over places


@triton.jit
def window_counts(p, tap, H: tl.constexpr, W: tl.constexpr, KERNEL: tl.constexpr, PADDED: tl.constexpr):
    """How often place p of X enters the pooled map through a tap: exact small integers, 0 .. 1, or 0 .. 9 if PADDED.

    Through tap t it reaches output place p - t, if that exists. The padded pool averages 3 x 3 outputs around each
    place first, and so counts an output once for each of its 3 x 3 neighbours that exist.
    """
    row = p // W - (tap // KERNEL - KERNEL // 2)
    column = p % W - (tap % KERNEL - KERNEL // 2)
    inside = (p < H * W) & (tap < KERNEL * KERNEL) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    count = inside.to(tl.int32)
    if PADDED:
        count *= 1 + (row > 0).to(tl.int32) + (row < H - 1).to(tl.int32)
        count *= 1 + (column > 0).to(tl.int32) + (column < W - 1).to(tl.int32)
    return count


@triton.jit
def window_sums_kernel(
    x, sums,  # (B, D, H, W), (B, D, k*k)
    stride_b: tl.constexpr, stride_c: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, KERNEL: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):
    """sums[d, t] = the mean over p of X[d, p + t], or its padded pool. A program owns BLOCK_D channels, all k*k taps.

    As a product of the (tap, place) counts with X it reads X once, on the tensor cores.
    """
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tap = tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, H * W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x_tile = tl.load(
            x + b * stride_b + (p // W * stride_h + p % W * stride_w)[:, None] + d[None, :] * stride_c,
            mask=(p[:, None] < H * W) & (d[None, :] < D), other=0.0,
        )
        counts = window_counts(p[None, :], tap[:, None], H, W, KERNEL, PADDED)
        acc = tl.dot(counts.to(x_tile.dtype), x_tile, acc, input_precision=PRECISION)
    mean = acc / (9 * H * W if PADDED else H * W)
    tl.store(
        sums + (b * D + d[None, :]) * KERNEL * KERNEL + tap[:, None],
        mean.to(sums.dtype.element_ty),
        mask=(tap[:, None] < KERNEL * KERNEL) & (d[None, :] < D),
    )


@triton.jit
def window_sums_backward_kernel(
    grad_sums, grad_x,  # (B, D, k*k); (B, H, W, D) in memory
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, KERNEL: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):
    """The transpose of window_sums_kernel. A program owns BLOCK_P places x BLOCK_D channels of one image's dX."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    tap = tl.arange(0, BLOCK_T)
    gradient = tl.load(
        grad_sums + (b * D + d[None, :]) * KERNEL * KERNEL + tap[:, None],
        mask=(tap[:, None] < KERNEL * KERNEL) & (d[None, :] < D), other=0.0,
    )
    counts = window_counts(p[:, None], tap[None, :], H, W, KERNEL, PADDED)
    spread = tl.dot(counts.to(gradient.dtype), gradient, input_precision=PRECISION)
    tl.store(
        grad_x + (b * H * W + p[:, None]) * D + d[None, :],
        (spread / (9 * H * W if PADDED else H * W)).to(grad_x.dtype.element_ty),
        mask=(p[:, None] < H * W) & (d[None, :] < D),
    )


@torch.library.custom_op(f"{__package__}::window_sums", mutates_args=())
def window_sums(x: Tensor, kernel: int, padded: bool) -> Tensor:
    """x (B, D, h, w) -> its means over the k*k windows (B, D, k*k): all that the logits need of x."""
    B, D, H, W = x.shape
    sums = _sums_shape(x, kernel, padded)
    blocks = BLOCKS["window_sums_kernel"]
    window_sums_kernel[(B, triton.cdiv(D, blocks["BLOCK_D"]))](
        x, sums, *x.stride(), D, H, W, kernel, padded, BLOCK_T=16, PRECISION=dot_precision(), **blocks
    )
    return sums


@window_sums.register_fake
def _sums_shape(x, kernel, padded):
    return x.new_empty(*x.shape[:2], kernel * kernel)


@torch.library.custom_op(f"{__package__}::window_sums_backward", mutates_args=())
def window_sums_backward(grad: Tensor, h: int, w: int, kernel: int, padded: bool) -> Tensor:
    """dP (B, D, k*k) -> dX (B, D, h, w), channels-last."""
    B, D, _ = grad.shape
    grad_x = _spread_shape(grad, h, w, kernel, padded)
    blocks = BLOCKS["window_sums_backward_kernel"]
    grid = (B, triton.cdiv(D, blocks["BLOCK_D"]), triton.cdiv(h * w, blocks["BLOCK_P"]))
    window_sums_backward_kernel[grid](
        grad.contiguous(), grad_x, D, h, w, kernel, padded, BLOCK_T=16, PRECISION=dot_precision(), **blocks
    )
    return grad_x


@window_sums_backward.register_fake
def _spread_shape(grad, h, w, kernel, padded):
    return grad.new_empty(len(grad), h, w, grad.shape[1]).permute(0, 3, 1, 2)


def _save_windows(ctx, inputs, output):
    x, *ctx.window = inputs
    ctx.size = x.shape[2:]


def _windows_gradient(ctx, grad):
    return window_sums_backward(grad, *ctx.size, *ctx.window), None, None


window_sums.register_autograd(_windows_gradient, setup_context=_save_windows)


# --------------------------------------------------------------------------------------------- maps of asked classes


@triton.jit
def class_products_kernel(
    x, scores, weight, classes, products,  # (B, D, P); (B, G); (G, C, D, k*k); (B, K); (B, K*k*k, P)
    stride_b: tl.constexpr, stride_c: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr, K,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """products[n, p] = sum_d K_b[c, -t, d] X[d, p] at pair n = (class c, tap t): what place p gives to Y's place p + t.

    A program owns BLOCK_P places of one image, for BLOCK_K pairs side by side: X is not shifted but read once, and
    torch's fold adds up the k*k products of each class where their taps point, on the (small) output.
    """
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.load(classes + b * K + n // TAPS, mask=n < K * TAPS, other=0).to(tl.int32)
    acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_tile = tl.load(
            x + b * stride_b + (p // W * stride_h + p % W * stride_w)[:, None] + d[None, :] * stride_c,
            mask=(p[:, None] < H * W) & (d[None, :] < D), other=0.0,
        )
        w_tiles = weight + (c[None, :] * D + d[:, None]) * TAPS + (TAPS - 1 - n[None, :] % TAPS)
        w_inside = (n[None, :] < K * TAPS) & (d[:, None] < D)
        kernel = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
        for g in range(G):
            w_tile = tl.load(w_tiles + g * C * D * TAPS, mask=w_inside, other=0.0).to(tl.float32)
            kernel += tl.load(scores + b * G + g) * w_tile
        acc = tl.dot(x_tile, kernel.to(x_tile.dtype), acc, input_precision=PRECISION)
    tl.store(
        products + (b * K * TAPS + n[None, :]) * (H * W) + p[:, None],
        acc.to(products.dtype.element_ty),
        mask=(p[:, None] < H * W) & (n[None, :] < K * TAPS),
    )


@torch.library.custom_op(f"{__package__}::class_products", mutates_args=())
def class_products(x: Tensor, scores: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """x (B, D, h, w), scores (B, G), weight (G, C, D, k, k), classes (B, K) -> (B, K*k*k, h*w) float32. No gradient."""
    B, D, H, W = x.shape
    G, C, _, k, _ = weight.shape
    K = classes.shape[1]
    products = _products_shape(x, scores, weight, classes)
    blocks = BLOCKS["class_products_kernel"][x.itemsize]
    columns = min(max(16, triton.next_power_of_2(K * k * k)), 64)
    grid = (B, triton.cdiv(H * W, blocks["BLOCK_P"]), triton.cdiv(K * k * k, columns))
    class_products_kernel[grid](
        x, scores.float().contiguous(), weight.contiguous(), classes.contiguous(), products, *x.stride(), K,
        H, W, C, D, G, k * k, BLOCK_K=columns, PRECISION=dot_precision(), **blocks,
    )
    return products


@class_products.register_fake
def _products_shape(x, scores, weight, classes):
    B, _, H, W = x.shape
    return x.new_empty(B, classes.shape[1] * weight.shape[3] * weight.shape[4], H * W, dtype=torch.float32)
