"""RPAM in Triton (Fig. 3, Eq. 4, 5): the maps M^c and M^r of a block's attention. Three operators:

    aggregate_attention   both maps from A in memory: one read of A, and one more for the gradient
    class_row             M^c from row 0 alone, differentiable: for training
    attention_relation    softmax(q k^T) v and both maps, without A in memory: for localisation

B images, S heads, T = N+1 tokens (token 0 is the class token), d channels a head (D in the code).
i is a row of A, a query; j a column, a key. q, k, v (B, S, T, d) are views of one projection, whose
image, head, token and channel strides are stride_b, stride_s, stride_t and 1. Maps and sums are
float32 whatever the inputs' dtype. No atomics: the same bits on every run. Offsets inside an image
are 32-bit numbers, offsets of an image or a head 64-bit ones.

Limits: d at most 128; 46,340 tokens. Run on Triton's interpreter and through the compilers for
sm_80, sm_90 and gfx942, on no GPU yet. docs/kernels.md has what the compilers make of it.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot_precision, launch, short_offsets

# Tile sizes that compile without spills on all targets (python -m kernels.benchmark --compile).
# Attention's go by the bytes of one head's row of q: up to 128 (d = 64 in 16 bits), 256 or 512.
BLOCKS = {
    "aggregate_kernel": dict(BLOCK_I=16, BLOCK_J=64, num_warps=4),
    "aggregate_backward_kernel": dict(BLOCK_I=16, BLOCK_J=64, num_warps=4),
    "class_row_kernel": dict(BLOCK_J=64, num_warps=4),
    "class_row_backward_kernel": dict(BLOCK_J=64, num_warps=4),
    "one_pass_kernel": {  # by compute capability: 9 has larger matrix instructions, from 64 rows on
        9: dict(BLOCK_I=64, num_warps=4, num_stages=1),
        0: dict(BLOCK_I=32, num_warps=4, num_stages=1),  # all others
    },
    "attention_kernel": {
        128: dict(BLOCK_I=128, BLOCK_J=64, num_warps=8, num_stages=2),
        256: dict(BLOCK_I=64, BLOCK_J=32, num_warps=4, num_stages=2),
        512: dict(BLOCK_I=16, BLOCK_J=32, num_warps=4, num_stages=2),
    },
    "relation_kernel": {
        128: dict(BLOCK_I=64, BLOCK_J=64, num_warps=4, num_stages=3),
        256: dict(BLOCK_I=32, BLOCK_J=64, num_warps=4, num_stages=3),
        512: dict(BLOCK_I=16, BLOCK_J=64, num_warps=4, num_stages=2),
    },
}
ONE_PASS_TOKENS = 256  # a program of one_pass_kernel holds whole rows of A, up to this long


# ----------------------------------------------------------------- aggregate_attention: A in memory
#
#     mean = attn.mean(1)                               A'  (B, T, T)
#     cls_attn = mean[:, 0]                             M^c (B, T)
#     weighted = cls_attn[:, :, None] * mean[:, :, 1:]  row i times M^c[i] (B, T, T-1)
#     relation = weighted.mean(1)                       M^r (B, T-1)
#
# Forward: a program owns BLOCK_J columns of one image and goes down their rows, so that a column's
# sum needs no other program. Row 0 is M^c: each program reads all of it, as the rows' weights, and
# its own columns of it once more: a head costs ceil(T / BLOCK_J) + 1 rows more than the T of A.
#
# Gradient, with g[j] = dM^r[j] / T: dA_s[i, j] = M^c[i] g[j] / S, the same for every head, and
# dM^c[i] = sum_j A'[i, j] g[j], which row 0 of dA receives. A program owns BLOCK_I rows.
#
# A's rows start at multiples of T elements. Where T is odd, as 197, a load moves one element a lane
# (a warp still reads whole sectors); where it is a multiple of 8 in 16 bits, 16 bytes.


@triton.jit
def aggregate_kernel(
    attn, cls_attn, relation,  # (B, S, T, T), (B, T), (B, T-1)
    stride_b, stride_s, stride_i, stride_j, S, T,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    attn += b * stride_b

    # M^c of the program's own columns
    cls_row = tl.zeros([BLOCK_J], tl.float32)  # sum_s A_s[0, j]
    for s in range(S):
        head = attn + tl.cast(s, tl.int64) * stride_s
        cls_row += tl.load(head + j * stride_j, mask=j < T, other=0.0).to(tl.float32)
    tl.store(cls_attn + b * T + j, cls_row / S, mask=j < T)

    # M^r: down the rows, each weighted by M^c
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for start in range(0, T, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = (i[:, None] < T) & (j[None, :] < T)
        cls_weight = tl.zeros([BLOCK_I], tl.float32)  # sum_s A_s[0, i]
        heads = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)  # sum_s A_s[i, j]
        for s in range(S):
            head = attn + tl.cast(s, tl.int64) * stride_s
            cls_weight += tl.load(head + i * stride_j, mask=i < T, other=0.0).to(tl.float32)
            offsets = i[:, None] * stride_i + j[None, :] * stride_j
            heads += tl.load(head + offsets, mask=inside, other=0.0).to(tl.float32)
        total += cls_weight[:, None] * heads
    column = tl.sum(total, 0) / (S * S * T)
    tl.store(relation + b * (T - 1) + j - 1, column, mask=(j >= 1) & (j < T))


@triton.jit
def aggregate_backward_kernel(
    attn, cls_attn, grad_relation,  # (B, S, T, T), (B, T), (B, T-1)
    grad_attn, grad_cls_weight,  # (B, T, T), the same for every head; (B, T)
    stride_b, stride_s, stride_i, stride_j, S, T,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    attn += b * stride_b
    grad_attn += b * T * T
    cls_weight = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0)

    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (i[:, None] < T) & (j[None, :] < T)
        g = tl.load(grad_relation + b * (T - 1) + j - 1, mask=(j >= 1) & (j < T), other=0.0) / T
        gradient = (cls_weight[:, None] * g[None, :] / S).to(grad_attn.dtype.element_ty)
        below_row_0 = inside & (i[:, None] >= 1)  # row 0 also needs dM^c of all rows: on the host
        tl.store(grad_attn + i[:, None] * T + j[None, :], gradient, mask=below_row_0)
        heads = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)  # sum_s A_s[i, j]
        for s in range(S):
            head = attn + tl.cast(s, tl.int64) * stride_s
            offsets = i[:, None] * stride_i + j[None, :] * stride_j
            heads += tl.load(head + offsets, mask=inside, other=0.0).to(tl.float32)
        total += heads * g[None, :]
    tl.store(grad_cls_weight + b * T + i, tl.sum(total, 1) / S, mask=i < T)


@torch.library.custom_op(f"{__package__}::aggregate_attention", mutates_args=())
def aggregate_attention(attn: Tensor) -> tuple[Tensor, Tensor]:
    """A (B, S, T, T) -> M^c (B, T), M^r (B, T-1), float32."""
    B, S, T, _ = attn.shape
    attn = short_offsets("attn", attn, 2)
    cls_attn, relation = _aggregate_shapes(attn)
    blocks = BLOCKS["aggregate_kernel"]
    grid = (B, triton.cdiv(T, blocks["BLOCK_J"]))
    launch(aggregate_kernel, grid, attn, cls_attn, relation, *attn.stride(), S, T, **blocks)
    return cls_attn, relation


@aggregate_attention.register_fake
def _aggregate_shapes(attn):
    B, _, T, _ = attn.shape
    return attn.new_empty(B, T, dtype=torch.float32), attn.new_empty(B, T - 1, dtype=torch.float32)


@torch.library.custom_op(f"{__package__}::aggregate_attention_backward", mutates_args=())
def _aggregate_attention_backward(
    attn: Tensor, cls_attn: Tensor, grad_cls: Tensor, grad_relation: Tensor
) -> Tensor:
    """A (B, S, T, T), M^c (B, T), dM^c (B, T), dM^r (B, T-1) -> dA (B, T, T), for every head."""
    B, S, T, _ = attn.shape
    attn, grad_relation = short_offsets("attn", attn, 2), grad_relation.contiguous()
    grad_attn = _aggregate_backward_shape(attn, cls_attn, grad_cls, grad_relation)
    grad_cls_weight = torch.empty_like(cls_attn)
    blocks = BLOCKS["aggregate_backward_kernel"]
    grid = (B, triton.cdiv(T, blocks["BLOCK_I"]))
    launch(aggregate_backward_kernel, grid, attn, cls_attn, grad_relation, grad_attn,
           grad_cls_weight, *attn.stride(), S, T, **blocks)
    # Row 0 is a row of A like the others, the source of M^c, and the weight of every row.
    as_row = cls_attn[:, :1] * F.pad(grad_relation / T, (1, 0))  # (B, T)
    grad_attn[:, 0] = (as_row + grad_cls + grad_cls_weight) / S
    return grad_attn


@_aggregate_attention_backward.register_fake
def _aggregate_backward_shape(attn, cls_attn, grad_cls, grad_relation):
    B, _, T, _ = attn.shape
    return attn.new_empty(B, T, T)


def _save_attention(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _aggregate_gradient(ctx, grad_cls, grad_relation):
    attn, cls_attn = ctx.saved_tensors
    grad_attn = _aggregate_attention_backward(attn, cls_attn, grad_cls, grad_relation)
    return grad_attn[:, None].expand_as(attn)  # (B, T, T) -> (B, S, T, T)


aggregate_attention.register_autograd(_aggregate_gradient, setup_context=_save_attention)


# ----------------------------------------------------------------------- class_row: row 0 of A only
#
#     scores = (q[:, :, :1] * k).sum(-1) / math.sqrt(d)   (B, S, T)
#     cls_attn = scores.softmax(-1).mean(1)               M^c (B, T)
#
# torch would write the products (B, S, T, d) in float32 and keep them for the gradient: 0.2 GB a
# block for a batch of 128. The kernel gives the scores; their softmax and mean are torch's, for the
# scores are d times smaller. A program owns BLOCK_J columns of one head.
#
# Gradient: dk[j] = dscores[j] q_0 / sqrt d, and dq_0 = sum_j dscores[j] k[j] / sqrt d. A program
# owns one head, so that dq_0 needs no other program.


@triton.jit
def class_row_kernel(
    q, k, scores,  # row 0 of q (B, S, d), (B, S, T, d), (B, S, T)
    stride_qb, stride_qs, stride_qd, stride_b, stride_s, stride_t, S, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.arange(0, BLOCK_D)
    q += b * stride_qb + s * stride_qs
    k += b * stride_b + s * stride_s
    cls_q = tl.load(q + c * stride_qd, mask=c < D, other=0.0).to(tl.float32)
    inside = (j[:, None] < T) & (c[None, :] < D)
    k_tile = tl.load(k + j[:, None] * stride_t + c[None, :], mask=inside, other=0.0).to(tl.float32)
    score = tl.sum(k_tile * cls_q[None, :], 1) * scale
    tl.store(scores + (b * S + s) * T + j, score, mask=j < T)


@triton.jit
def class_row_backward_kernel(
    grad_scores, q, k, grad_q, grad_k,  # (B, S, T), as above, (B, S, d), (B, T, S, d) in memory
    stride_qb, stride_qs, stride_qd, stride_b, stride_s, stride_t, S, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    q += b * stride_qb + s * stride_qs
    k += b * stride_b + s * stride_s
    grad_k += b * T * S * D + s * D
    cls_q = tl.load(q + c * stride_qd, mask=c < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (j[:, None] < T) & (c[None, :] < D)
        g = tl.load(grad_scores + (b * S + s) * T + j, mask=j < T, other=0.0) * scale
        k_tile = tl.load(k + j[:, None] * stride_t + c[None, :], mask=inside, other=0.0)
        total += g[:, None] * k_tile.to(tl.float32)
        gradient = (g[:, None] * cls_q[None, :]).to(grad_k.dtype.element_ty)
        tl.store(grad_k + j[:, None] * S * D + c[None, :], gradient, mask=inside)
    grad = tl.sum(total, 0).to(grad_q.dtype.element_ty)
    tl.store(grad_q + (b * S + s) * D + c, grad, mask=c < D)


def class_row(q: Tensor, k: Tensor) -> Tensor:
    """q, k (B, S, T, d) -> M^c (B, T), float32. Differentiable."""
    _check_width(q)
    return class_scores(q[:, :, 0], k).softmax(-1).mean(1)


@torch.library.custom_op(f"{__package__}::class_scores", mutates_args=())
def class_scores(q: Tensor, k: Tensor) -> Tensor:
    """Row 0 of q (B, S, d), k (B, S, T, d) -> row 0's scores (B, S, T), float32."""
    k = _channels_together("k", k)
    scores = _scores_shape(q, k)
    blocks = BLOCKS["class_row_kernel"]
    B, S, T, D = k.shape
    grid = (B * S, triton.cdiv(T, blocks["BLOCK_J"]))
    # Without fused multiply-adds: a lane that fuses its own product into the sum over lanes would
    # round unlike its neighbours, which store the same sum to the same address.
    launch(class_row_kernel, grid, q, k, scores, *q.stride(), *k.stride()[:3], S, T,
           1 / math.sqrt(D), D, _block_d(D), enable_fp_fusion=False, **blocks)
    return scores


@class_scores.register_fake
def _scores_shape(q, k):
    return k.new_empty(k.shape[:3], dtype=torch.float32)


@torch.library.custom_op(f"{__package__}::class_scores_backward", mutates_args=())
def class_scores_backward(grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """dscores (B, S, T), row 0 of q (B, S, d), k (B, S, T, d) -> dq_0 as q, dk as k."""
    k, grad = _channels_together("k", k), grad.contiguous()
    grad_q, grad_k = _class_gradient_shapes(grad, q, k)
    B, S, T, D = k.shape
    launch(class_row_backward_kernel, (B * S,), grad, q, k, grad_q, grad_k, *q.stride(),
           *k.stride()[:3], S, T, 1 / math.sqrt(D), D, _block_d(D),
           **BLOCKS["class_row_backward_kernel"])
    return grad_q, grad_k


@class_scores_backward.register_fake
def _class_gradient_shapes(grad, q, k):
    B, S, T, D = k.shape
    return q.new_empty(B, S, D), k.new_empty(B, T, S, D).transpose(1, 2)


def _save_class_row(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _class_row_gradient(ctx, grad):
    return class_scores_backward(grad, *ctx.saved_tensors)


class_scores.register_autograd(_class_row_gradient, setup_context=_save_class_row)


# ------------------------------------------------ attention_relation: both maps without A in memory
#
#     attn = (q @ k.mT / math.sqrt(d)).softmax(-1)        Eq. 4: A (B, S, T, T)
#     out = attn @ v                                      (B, S, T, d)
#     mean = attn.mean(1)                                 A'  (B, T, T)
#     cls_attn = mean[:, 0]                               M^c (B, T)
#     relation = (cls_attn[:, None] @ mean)[:, 0, 1:] / T M^r (B, T-1): sum_i M^c[i] A'[i, j] / T
#
# M^r weights each row by M^c, a mean over heads: M^c must be known before M^r's sum begins.
#
# Up to 256 tokens, one pass. class_row_kernel gives M^c first. Then a program of one_pass_kernel
# owns BLOCK_I rows of one head's A and holds them whole, in registers: their softmax, their product
# with v, and their share of the column sums sum_i M^c[i] A_s[i, j], which torch adds up.
#
# Beyond, two passes. A program of attention_kernel owns BLOCK_I rows too, but goes along them with
# a running maximum and sum (flash attention), and saves their log2-sum-exp2, from which any
# A_s[i, j] = exp2(score[i, j] - lse[i]) can be computed again. The program of row 0 writes its
# scores: these rows' A, head mean, is M^c. Then a program of relation_kernel owns BLOCK_J columns
# of one head and computes them again, transposed, for their sums.
#
# scale is log2(e) / sqrt(d), so that exp(score / sqrt d) is exp2(score * scale).


@triton.jit
def one_pass_kernel(
    q, k, v, cls_attn,  # (B, S, T, d) x 3, (B, T)
    out, partial,  # (B, T, S, d) in memory, (B, S, row blocks, T)
    stride_b, stride_s, stride_t, S, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    block = tl.program_id(1)
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_D)
    head = b * stride_b + s * stride_s
    rows = (i[:, None] < T) & (c[None, :] < D)
    columns = (j[:, None] < T) & (c[None, :] < D)
    q_tile = tl.load(q + head + i[:, None] * stride_t + c[None, :], mask=rows, other=0.0)
    k_tile = tl.load(k + head + j[:, None] * stride_t + c[None, :], mask=columns, other=0.0)
    v_tile = tl.load(v + head + j[:, None] * stride_t + c[None, :], mask=columns, other=0.0)

    # Whole rows: softmax needs no running maximum.
    score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    score = tl.where(j[None, :] < T, score, float("-inf"))
    p = tl.exp2(score - tl.max(score, 1)[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    tl.store(
        out + b * T * S * D + s * D + i[:, None] * S * D + c[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=rows,
    )

    # A_s[i, j] = p[i, j] / total[i]
    cls_weight = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0) / total
    column = tl.sum(p * cls_weight[:, None], 0)
    partial += ((b * S + s) * tl.num_programs(1) + block) * T
    tl.store(partial + j, column, mask=j < T)


@triton.jit
def attention_kernel(
    q, k, v, out, lse, cls_scores,  # (B, S, T, d) x 3; (B, T, S, d) in memory; (B, S, T) x 2
    stride_b, stride_s, stride_t, S, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.arange(0, BLOCK_D)
    head = b * stride_b + s * stride_s
    rows = (i[:, None] < T) & (c[None, :] < D)
    q_tile = tl.load(q + head + i[:, None] * stride_t + c[None, :], mask=rows, other=0.0)

    m = tl.full([BLOCK_I], float("-inf"), tl.float32)  # each row's maximum so far
    total = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (j[:, None] < T) & (c[None, :] < D)
        offsets = head + j[:, None] * stride_t + c[None, :]
        k_tile = tl.load(k + offsets, mask=inside, other=0.0)
        v_tile = tl.load(v + offsets, mask=inside, other=0.0)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        score = tl.where(j[None, :] < T, score, float("-inf"))
        if tl.program_id(1) == 0:
            cls_score = tl.sum(tl.where(i[:, None] == 0, score, 0.0), 0)
            tl.store(cls_scores + (b * S + s) * T + j, cls_score, mask=j < T)
        m_new = tl.maximum(m, tl.max(score, 1))
        p = tl.exp2(score - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    tl.store(lse + (b * S + s) * T + i, m + tl.log2(total), mask=i < T)
    tl.store(
        out + b * T * S * D + s * D + i[:, None] * S * D + c[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=rows,
    )


@triton.jit
def relation_kernel(
    q, k, lse, cls_attn, columns,  # (B, S, T, d) x 2; (B, S, T); (B, T); (B, S, T)
    stride_b, stride_s, stride_t, S, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.arange(0, BLOCK_D)
    head = b * stride_b + s * stride_s
    inside = (j[:, None] < T) & (c[None, :] < D)
    k_tile = tl.load(k + head + j[:, None] * stride_t + c[None, :], mask=inside, other=0.0)

    total = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
    for start in range(0, T, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        rows = (i[:, None] < T) & (c[None, :] < D)
        q_tile = tl.load(q + head + i[:, None] * stride_t + c[None, :], mask=rows, other=0.0)
        # Past the last row exp2(score - inf) is 0.
        row_lse = tl.load(lse + (b * S + s) * T + i, mask=i < T, other=float("inf"))
        cls_weight = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0)
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        total += cls_weight[None, :] * tl.exp2(score - row_lse[None, :])
    tl.store(columns + (b * S + s) * T + j, tl.sum(total, 1), mask=j < T)


@torch.library.custom_op(f"{__package__}::attention_relation", mutates_args=())
def attention_relation(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, S, T, d) -> out (B, S, T, d), M^c (B, T), M^r (B, T-1), float32. No gradient.

    Views of one packed projection are read where they lie; other strides are copied first.
    """
    _check_width(q)
    if not q.stride() == k.stride() == v.stride() or q.stride(3) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q, k, v = short_offsets("q", q, 2), short_offsets("k", k, 2), short_offsets("v", v, 2)
    B, S, T, D = q.shape
    if _one_pass(q):
        return _attention_one_pass(q, k, v)
    out, _, _ = _attention_shapes(q, k, v)
    lse, cls_scores, columns = q.new_empty(3, B, S, T, dtype=torch.float32)
    options = dict(D=D, BLOCK_D=_block_d(D), PRECISION=dot_precision())
    sizes = (*q.stride()[:3], S, T, math.log2(math.e) / math.sqrt(D))

    blocks = BLOCKS["attention_kernel"][_row_bytes(q)]
    grid = (B * S, triton.cdiv(T, blocks["BLOCK_I"]))
    launch(attention_kernel, grid, q, k, v, out, lse, cls_scores, *sizes, **options, **blocks)
    cls_attn = (cls_scores - lse[:, :, :1]).exp2().mean(1)  # M^c: (B, S, T) -> (B, T)

    blocks = BLOCKS["relation_kernel"][_row_bytes(q)]
    grid = (B * S, triton.cdiv(T, blocks["BLOCK_J"]))
    launch(relation_kernel, grid, q, k, lse, cls_attn, columns, *sizes, **options, **blocks)
    return out, cls_attn, columns[:, :, 1:].mean(1) / T  # M^r: (B, S, T-1) -> (B, T-1)


def _attention_one_pass(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, S, T, D = q.shape
    out, _, _ = _attention_shapes(q, k, v)
    cls_attn = class_row(q, k)
    blocks = BLOCKS["one_pass_kernel"][_capability(q)]
    row_blocks = triton.cdiv(T, blocks["BLOCK_I"])
    partial = q.new_empty(B, S, row_blocks, T, dtype=torch.float32)
    launch(one_pass_kernel, (B * S, row_blocks), q, k, v, cls_attn, out, partial,
           *q.stride()[:3], S, T, math.log2(math.e) / math.sqrt(D), D, _block_d(D),
           BLOCK_T=max(16, triton.next_power_of_2(T)), PRECISION=dot_precision(), **blocks)
    return out, cls_attn, partial.sum((1, 2))[:, 1:] / (S * T)


@attention_relation.register_fake
def _attention_shapes(q, k, v):
    B, S, T, D = q.shape
    out = q.new_empty(B, T, S, D).transpose(1, 2)  # so that joining the heads copies nothing
    maps = dict(dtype=torch.float32)
    return out, q.new_empty(B, T, **maps), q.new_empty(B, T - 1, **maps)


def _one_pass(q: Tensor) -> bool:
    """Whether a program's registers hold whole rows of A: d up to 64 in 16 bits, 256 tokens."""
    return q.itemsize == 2 and _row_bytes(q) == 128 and q.shape[2] <= ONE_PASS_TOKENS


def _capability(q: Tensor) -> int:
    if not q.is_cuda or torch.version.hip:
        return 0
    return 9 if torch.cuda.get_device_capability(q.device)[0] == 9 else 0


def _check_width(q: Tensor) -> None:
    if q.shape[3] > 128:
        raise ValueError(f"q: got head dimension {q.shape[3]}, the Triton kernels need at most 128")


def _channels_together(name: str, tensor: Tensor) -> Tensor:
    return short_offsets(name, tensor if tensor.stride(3) == 1 else tensor.contiguous(), 2)


def _block_d(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def _row_bytes(q: Tensor) -> int:
    return max(128, _block_d(q.shape[3]) * q.itemsize)
