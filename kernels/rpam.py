"""RPAM in Triton (Fig. 3, Eq. 4, 5): the maps M^c and M^r of a block's attention. Three operators:

    class_row             M^c from row 0 of A alone, differentiable: training
    attention_relation    softmax(q k^T) v and both maps, without A in memory: localisation
    aggregate_attention   both maps from an A in memory: for studies, no script holds A

B images, S heads, T = N+1 tokens (token 0 is the class token), d the width of a head, HEAD_DIM in
the code. i is a row of A, a query; j a column, a key. q, k, v (B, S, T, d) are views of one
projection, whose image, head, token and channel strides are stride_b, stride_s, stride_t and 1.
Maps and sums are float32 whatever the inputs' dtype. No atomics: the same bits on every run.
Offsets inside a head are 32-bit numbers, those of an image or a head 64-bit ones.

Limits: d at most 128; 46,340 tokens where A is in memory. docs/kernels.md says on what they ran.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot_precision, launch, short_offsets

# Tile sizes that compile without spills on all targets (python -m kernels.benchmark --compile).
# Attention's go by the bytes of one head's row of q: up to 128 (d = 64 in 16 bits), 256 or 512.
BLOCKS = {
    "class_row_kernel": dict(num_warps=8),
    "class_row_backward_kernel": dict(BLOCK_J=64, num_warps=4),
    "one_pass_kernel": dict(BLOCK_I=32, num_warps=4, num_stages=1),
    "attention_kernel": {
        128: dict(BLOCK_I=128, BLOCK_J=64, num_warps=8, num_stages=3),
        256: dict(BLOCK_I=64, BLOCK_J=32, num_warps=4, num_stages=2),
        512: dict(BLOCK_I=16, BLOCK_J=32, num_warps=4, num_stages=2),
    },
    "relation_kernel": {
        128: dict(BLOCK_I=32, BLOCK_J=128, num_warps=4, num_stages=3),
        256: dict(BLOCK_I=32, BLOCK_J=64, num_warps=4, num_stages=3),
        512: dict(BLOCK_I=16, BLOCK_J=64, num_warps=4, num_stages=2),
    },
    "aggregate_kernel": dict(BLOCK_I=16, BLOCK_J=64, num_warps=4),
}
# AMD's registers hold less of these.
ON_AMD = {"one_pass_kernel": dict(BLOCK_I=16), "attention_kernel": dict(num_stages=2)}
ONE_PASS_TOKENS = 256  # a program of one_pass_kernel holds whole rows of A, up to this long
PROGRAMS = 256  # enough for one_pass_kernel to fill a GPU: with fewer heads it splits their rows
ROW_TILE = 2**14  # elements of k that a program of class_row_kernel holds at a time


# ----------------------------------------------------------------------- class_row: row 0 of A only
#
#     logits = (q[:, :, :1] * k).sum(-1) / math.sqrt(d)   (B, S, T)
#     rows = logits.softmax(-1)                           row 0 of each head's A (B, S, T)
#     cls_attn = rows.mean(1)                             M^c (B, T)
#
# torch would write the products (B, S, T, d) in float32 and keep them for the gradient: 0.2 GB a
# block for a batch of 128. A program of class_row_kernel owns an image, so that the mean over its
# heads needs no other program. It holds a whole row, for the softmax, and reads k once, a few
# channels at a time where the row is long.
#
# Gradient: with g = dM^c / S, dlogits[j] = rows[j] (g[j] - sum_i rows[i] g[i]),
# dk[j] = dlogits[j] q_0 / sqrt d and dq_0 = sum_j dlogits[j] k[j] / sqrt d. A program owns a head,
# so that dq_0 needs no other program.


@triton.jit
def class_row_kernel(
    q, k, cls_attn, rows,  # row 0 of q (B, S, d), (B, S, T, d), (B, T), (B, S, T)
    stride_qb, stride_qs, stride_qd, stride_b, stride_s, stride_t, S, T, scale,  # log2(e) / sqrt d
    HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T], tl.float32)
    for head in range(S):
        s = tl.cast(head, tl.int64)
        logit = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, HEAD_DIM, BLOCK_HEAD):
            channel = start + tl.arange(0, BLOCK_HEAD)
            cls_q = tl.load(
                q + b * stride_qb + s * stride_qs + channel * stride_qd,
                mask=channel < HEAD_DIM, other=0.0,
            ).to(tl.float32)
            k_tile = tl.load(
                k + b * stride_b + s * stride_s + j[:, None] * stride_t + channel[None, :],
                mask=(j[:, None] < T) & (channel[None, :] < HEAD_DIM), other=0.0,
            ).to(tl.float32)
            logit += tl.sum(k_tile * cls_q[None, :], 1)
        logit = tl.where(j < T, logit * scale, float("-inf"))
        p = tl.exp2(logit - tl.max(logit, 0))
        row = p / tl.sum(p, 0)
        tl.store(rows + (b * S + s) * T + j, row, mask=j < T)
        total += row
    tl.store(cls_attn + b * T + j, total / S, mask=j < T)


@triton.jit
def class_row_backward_kernel(
    grad_cls, rows, q, k,  # (B, T), (B, S, T), row 0 of q (B, S, d), (B, S, T, d)
    grad_q, grad_k,  # (B, S, d), (B, T, S, d) in memory
    stride_qb, stride_qs, stride_qd, stride_b, stride_s, stride_t, S, T, scale,  # 1 / (S sqrt d)
    HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_J: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    channel = tl.arange(0, BLOCK_HEAD)
    q += b * stride_qb + s * stride_qs
    k += b * stride_b + s * stride_s
    rows += (b * S + s) * T
    grad_cls += b * T
    grad_k += b * T * S * HEAD_DIM + s * HEAD_DIM
    cls_q = tl.load(q + channel * stride_qd, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)

    # sum_i rows[i] dM^c[i]
    inner = tl.zeros([BLOCK_J], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        row = tl.load(rows + j, mask=j < T, other=0.0)
        inner += row * tl.load(grad_cls + j, mask=j < T, other=0.0)
    mean = tl.sum(inner, 0)

    total = tl.zeros([BLOCK_J, BLOCK_HEAD], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        row = tl.load(rows + j, mask=j < T, other=0.0)
        g = row * (tl.load(grad_cls + j, mask=j < T, other=0.0) - mean) * scale
        inside = (j[:, None] < T) & (channel[None, :] < HEAD_DIM)
        k_tile = tl.load(k + j[:, None] * stride_t + channel[None, :], mask=inside, other=0.0)
        total += g[:, None] * k_tile.to(tl.float32)
        gradient = (g[:, None] * cls_q[None, :]).to(grad_k.dtype.element_ty)
        tl.store(grad_k + j[:, None] * S * HEAD_DIM + channel[None, :], gradient, mask=inside)
    tl.store(
        grad_q + (b * S + s) * HEAD_DIM + channel,
        tl.sum(total, 0).to(grad_q.dtype.element_ty),
        mask=channel < HEAD_DIM,
    )


def class_row(q: Tensor, k: Tensor) -> Tensor:
    """q, k (B, S, T, d) -> M^c (B, T), float32. Differentiable."""
    _check_width(q)
    return class_rows(q[:, :, 0], k)[0]


@torch.library.custom_op(f"{__package__}::class_rows", mutates_args=())
def class_rows(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Row 0 of q (B, S, d), k (B, S, T, d) -> M^c (B, T), each head's row (B, S, T), float32."""
    q, k = short_offsets("q", q, 2), _channels_together("k", k)
    cls_attn, rows = _class_rows_shapes(q, k)
    B, S, T, d = k.shape
    tokens = triton.next_power_of_2(T)
    channels = min(triton.next_power_of_2(d), max(1, ROW_TILE // tokens))
    # Without fused multiply-adds: a lane that fuses its own product into the sum over lanes would
    # round unlike its neighbours, which store the same sum to the same address.
    launch(class_row_kernel, (B,), q, k, cls_attn, rows, *q.stride(), *k.stride()[:3], S, T,
           math.log2(math.e) / math.sqrt(d), d, channels, tokens, enable_fp_fusion=False,
           **BLOCKS["class_row_kernel"])
    return cls_attn, rows


@torch.library.custom_op(f"{__package__}::class_rows_backward", mutates_args=())
def class_rows_backward(
    grad: Tensor, rows: Tensor, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """dM^c (B, T), rows (B, S, T), row 0 of q (B, S, d), k (B, S, T, d) -> dq_0 as q, dk as k."""
    q, k = short_offsets("q", q, 2), _channels_together("k", k)
    grad = grad.contiguous()
    grad_q, grad_k = _class_gradient_shapes(grad, rows, q, k)
    short_offsets("k's gradient", grad_k, 1)
    B, S, T, d = k.shape
    launch(class_row_backward_kernel, (B * S,), grad, rows, q, k, grad_q, grad_k, *q.stride(),
           *k.stride()[:3], S, T, 1 / (S * math.sqrt(d)), d, _block_head(d),
           **BLOCKS["class_row_backward_kernel"])
    return grad_q, grad_k


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
# owns a head: it loads k and v once and goes down the rows of A, BLOCK_I at a time, each whole and
# in registers: their softmax, their product with v, and the column sums sum_i M^c[i] A_s[i, j].
# torch adds up the heads. Where heads are few, several programs take turns at the rows of one.
#
# Beyond, two passes. A program of attention_kernel owns BLOCK_I rows of a head and goes along them
# with a running maximum and sum (flash attention). It saves their log2-sum-exp2, from which any
# A_s[i, j] = exp2(logit[i, j] - lse[i]) can be computed again. The program of row 0 writes its
# logits: these rows' A, head mean, is M^c. Then a program of relation_kernel owns BLOCK_J columns
# of one head and computes them again, transposed, for their sums.
#
# scale is log2(e) / sqrt(d), so that exp(logit / sqrt d) is exp2(logit * scale).


@triton.jit
def one_pass_kernel(
    q, k, v, cls_attn,  # (B, S, T, d) x 3, (B, T)
    out, columns,  # (B, T, S, d) in memory, (B, S * programs a head, T)
    stride_b, stride_s, stride_t, S, T, scale,
    HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    j = tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_HEAD)
    head = b * stride_b + s * stride_s
    out += b * T * S * HEAD_DIM + s * HEAD_DIM
    inside = (j[:, None] < T) & (channel[None, :] < HEAD_DIM)
    k_tile = tl.load(k + head + j[:, None] * stride_t + channel[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + head + j[:, None] * stride_t + channel[None, :], mask=inside, other=0.0)

    column = tl.zeros([BLOCK_T], tl.float32)  # sum_i M^c[i] A_s[i, j]
    for start in range(tl.program_id(1) * BLOCK_I, T, tl.num_programs(1) * BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        q_inside = (i[:, None] < T) & (channel[None, :] < HEAD_DIM)
        q_tile = tl.load(
            q + head + i[:, None] * stride_t + channel[None, :], mask=q_inside, other=0.0)
        logit = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        logit = tl.where(j[None, :] < T, logit, float("-inf"))
        p = tl.exp2(logit - tl.max(logit, 1)[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        tl.store(
            out + i[:, None] * S * HEAD_DIM + channel[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=q_inside,
        )
        # A_s[i, j] = p[i, j] / total[i]
        cls_weight = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0) / total
        column += tl.sum(p * cls_weight[:, None], 0)
    columns += ((b * S + s) * tl.num_programs(1) + tl.program_id(1)) * T
    tl.store(columns + j, column, mask=j < T)


@triton.jit
def attention_kernel(
    q, k, v, out, lse, cls_logits,  # (B, S, T, d) x 3; (B, T, S, d) in memory; (B, S, T) x 2
    stride_b, stride_s, stride_t, S, T, scale,
    HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    channel = tl.arange(0, BLOCK_HEAD)
    head = b * stride_b + s * stride_s
    q_inside = (i[:, None] < T) & (channel[None, :] < HEAD_DIM)
    q_tile = tl.load(q + head + i[:, None] * stride_t + channel[None, :], mask=q_inside, other=0.0)

    m = tl.full([BLOCK_I], float("-inf"), tl.float32)  # each row's maximum so far
    total = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, BLOCK_HEAD], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (j[:, None] < T) & (channel[None, :] < HEAD_DIM)
        offsets = head + j[:, None] * stride_t + channel[None, :]
        k_tile = tl.load(k + offsets, mask=inside, other=0.0)
        v_tile = tl.load(v + offsets, mask=inside, other=0.0)
        logit = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        logit = tl.where(j[None, :] < T, logit, float("-inf"))
        if tl.program_id(1) == 0:
            cls_logit = tl.sum(tl.where(i[:, None] == 0, logit, 0.0), 0)
            tl.store(cls_logits + (b * S + s) * T + j, cls_logit, mask=j < T)
        m_new = tl.maximum(m, tl.max(logit, 1))
        p = tl.exp2(logit - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    tl.store(lse + (b * S + s) * T + i, m + tl.log2(total), mask=i < T)
    tl.store(
        out + b * T * S * HEAD_DIM + s * HEAD_DIM + i[:, None] * S * HEAD_DIM + channel[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=q_inside,
    )


@triton.jit
def relation_kernel(
    q, k, lse, cls_attn, columns,  # (B, S, T, d) x 2; (B, S, T); (B, T); (B, S, T)
    stride_b, stride_s, stride_t, S, T, scale,
    HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    channel = tl.arange(0, BLOCK_HEAD)
    head = b * stride_b + s * stride_s
    inside = (j[:, None] < T) & (channel[None, :] < HEAD_DIM)
    k_tile = tl.load(k + head + j[:, None] * stride_t + channel[None, :], mask=inside, other=0.0)

    total = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
    for start in range(0, T, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        q_inside = (i[:, None] < T) & (channel[None, :] < HEAD_DIM)
        q_tile = tl.load(
            q + head + i[:, None] * stride_t + channel[None, :], mask=q_inside, other=0.0)
        # Past the last row exp2(logit - inf) is 0.
        row_lse = tl.load(lse + (b * S + s) * T + i, mask=i < T, other=float("inf"))
        cls_weight = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0)
        logit = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        total += cls_weight[None, :] * tl.exp2(logit - row_lse[None, :])
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
    out, _, _ = _attention_shapes(q, k, v)
    short_offsets("the output", out, 1)
    # Whole rows of A fit a program's registers up to d = 64 in 16 bits.
    one_pass = q.itemsize == 2 and _row_bytes(q) == 128 and q.shape[2] <= ONE_PASS_TOKENS
    cls_attn, columns = (_one_pass if one_pass else _two_passes)(q, k, v, out)
    S, T = q.shape[1:3]
    return out, cls_attn, columns.sum(1)[:, 1:] / (S * T)  # M^r (B, T-1)


def _one_pass(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes out. -> M^c (B, T); sum_i M^c[i] A_s[i, j] in parts, that add up over axis 1."""
    B, S, T, _ = q.shape
    cls_attn = class_row(q, k)
    blocks = _blocks("one_pass_kernel")
    programs = min(triton.cdiv(T, blocks["BLOCK_I"]), max(1, PROGRAMS // max(1, B * S)))
    columns = q.new_empty(B, S * programs, T, dtype=torch.float32)
    launch(one_pass_kernel, (B * S, programs), q, k, v, cls_attn, out, columns, *_sizes(q),
           BLOCK_T=max(16, triton.next_power_of_2(T)), **_constants(q), **blocks)
    return cls_attn, columns


def _two_passes(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """As _one_pass."""
    B, S, T, _ = q.shape
    lse, cls_logits, columns = q.new_empty(3, B, S, T, dtype=torch.float32)
    blocks = _blocks("attention_kernel", _row_bytes(q))
    grid = (B * S, triton.cdiv(T, blocks["BLOCK_I"]))
    launch(attention_kernel, grid, q, k, v, out, lse, cls_logits, *_sizes(q), **_constants(q),
           **blocks)
    cls_attn = (cls_logits - lse[:, :, :1]).exp2().mean(1)  # M^c: (B, S, T) -> (B, T)
    blocks = _blocks("relation_kernel", _row_bytes(q))
    grid = (B * S, triton.cdiv(T, blocks["BLOCK_J"]))
    launch(relation_kernel, grid, q, k, lse, cls_attn, columns, *_sizes(q), **_constants(q),
           **blocks)
    return cls_attn, columns


# ----------------------------------------------------------------- aggregate_attention: A in memory
#
# For an A that somebody holds: no script does, and attention="full" in lctr.py runs lctr.rpam.
#
#     mean = attn.mean(1)                               A'  (B, T, T)
#     cls_attn = mean[:, 0]                             M^c (B, T)
#     weighted = cls_attn[:, :, None] * mean[:, :, 1:]  row i times M^c[i] (B, T, T-1)
#     relation = weighted.mean(1)                       M^r (B, T-1)
#
# A program owns BLOCK_J columns of one image and goes down their rows, so that a column's sum needs
# no other program. Row 0 is M^c: each program reads all of it, as the rows' weights, and its own
# columns of it once more: a head costs ceil(T / BLOCK_J) + 1 rows more than the T of A.
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


# ------------------------------------------------------------------- what launches have in common


def _check_width(q: Tensor) -> None:
    if q.shape[3] > 128:
        raise ValueError(f"q: got head dimension {q.shape[3]}, the Triton kernels need at most 128")


def _channels_together(name: str, tensor: Tensor) -> Tensor:
    return short_offsets(name, tensor if tensor.stride(3) == 1 else tensor.contiguous(), 2)


def _blocks(kernel: str, row_bytes: int | None = None) -> dict[str, int]:
    blocks = BLOCKS[kernel] if row_bytes is None else BLOCKS[kernel][row_bytes]
    return blocks | ON_AMD.get(kernel, {}) if torch.version.hip else blocks


def _block_head(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def _row_bytes(q: Tensor) -> int:
    return max(128, _block_head(q.shape[3]) * q.itemsize)


def _sizes(q: Tensor) -> tuple[int | float, ...]:
    """stride_b to scale."""
    _, S, T, d = q.shape
    return *q.stride()[:3], S, T, math.log2(math.e) / math.sqrt(d)


def _constants(q: Tensor) -> dict:
    d = q.shape[3]
    return dict(HEAD_DIM=d, BLOCK_HEAD=_block_head(d), PRECISION=dot_precision())


# ----------------------------------------- what torch must know of the operators: see launch.py


@class_rows.register_fake
def _class_rows_shapes(q, k):
    B, S, T, _ = k.shape
    return k.new_empty(B, T, dtype=torch.float32), k.new_empty(B, S, T, dtype=torch.float32)


@class_rows_backward.register_fake
def _class_gradient_shapes(grad, rows, q, k):
    B, S, T, d = k.shape
    return q.new_empty(B, S, d), k.new_empty(B, T, S, d).transpose(1, 2)


def _save_class_rows(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _class_rows_gradient(ctx, grad_cls, _):
    return class_rows_backward(grad_cls, *ctx.saved_tensors)


class_rows.register_autograd(_class_rows_gradient, setup_context=_save_class_rows)


@attention_relation.register_fake
def _attention_shapes(q, k, v):
    B, S, T, d = q.shape
    out = q.new_empty(B, T, S, d).transpose(1, 2)  # so that joining the heads copies nothing
    maps = dict(dtype=torch.float32)
    return out, q.new_empty(B, T, **maps), q.new_empty(B, T - 1, **maps)


@aggregate_attention.register_fake
def _aggregate_shapes(attn):
    B, _, T, _ = attn.shape
    return attn.new_empty(B, T, dtype=torch.float32), attn.new_empty(B, T - 1, dtype=torch.float32)
