"""RPAM in Triton (Fig. 3, Eq. 4, 5): the two maps that LCTR reads off a block's attention A_s, s = 1..S heads.

    A_s = softmax(Q_s K_s^T / sqrt d)                 Eq. 4           i, j: row and column, 0 (class token) .. N
    A'  = (1/S) sum_s A_s
    M^c[j] = A'[0, j]                                 class row
    M^r[j] = (1/(N+1)) sum_i M^c[i] A'[i, j]          j >= 1 only, i over all N+1 rows

Two ways to M^c and M^r:
    aggregate_attention   from A in memory: one read of A, and one more for the gradient
    attention             from Q, K, V: flash attention, which never holds A, then a second pass over its columns

B images, S heads, T = N+1 tokens, d channels a head (D in the code). q, k, v (B, S, T, d) come as strided views of one
projection. A head's stride is stride_s, a token's stride_t, A's row's and column's stride_i and stride_j.
Sums, maps and logarithms are float32 whatever the inputs' type. No atomics: the same bits on every run.

Limits: d at most 128. A's rows start at multiples of N+1 elements; where that is odd, as for N = 196, a load of A moves
one element per lane (the warp still reads whole sectors), and 16 bytes where it is a multiple of 16.
Run on Triton's interpreter and through the compilers for sm_80, sm_90 and gfx942; on no GPU yet.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dot_precision  # how tl.dot multiplies float32: "tf32x3", "tf32" or "ieee"

# Tile sizes: what compiles without spills on sm_80 and sm_90 (benchmark.py --compile). Attention's go by the bytes of a
# head's row of q: up to 256 (d = 128 in 16 bits, 64 in float32) or 512.
BLOCKS = {
    "aggregate_kernel": dict(BLOCK_I=32, BLOCK_J=64, num_warps=4),
    "aggregate_backward_kernel": dict(BLOCK_I=16, BLOCK_J=64, num_warps=4),
    "attention_kernel": {256: dict(BLOCK_I=64, BLOCK_J=32, num_warps=4, num_stages=2),
                         512: dict(BLOCK_I=16, BLOCK_J=32, num_warps=4, num_stages=2)},
    "relation_kernel": {256: dict(BLOCK_I=32, BLOCK_J=64, num_warps=4, num_stages=3),
                        512: dict(BLOCK_I=16, BLOCK_J=64, num_warps=4, num_stages=2)},
}


# ---------------------------------------------------------------------------------------------------- A in memory


@triton.jit
def aggregate_kernel(
    attn, cls_attn, relation,  # (B, S, T, T), (B, T), (B, T-1)
    stride_b, stride_s, stride_i, stride_j, S, T,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """A program owns BLOCK_J columns of one image and goes down their rows: so a column's sum needs no other program.

    Row 0 is M^c: each program reads all of it for the weights of the rows, and its own columns of it once more. So a
    head costs ceil(T / BLOCK_J) + 1 rows more than the T of A.
    """
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    attn += b * stride_b

    cls_row = tl.zeros([BLOCK_J], tl.float32)  # sum_s A_s[0, j]
    for s in range(S):
        cls_row += tl.load(attn + s * stride_s + j * stride_j, mask=j < T, other=0.0).to(tl.float32)
    tl.store(cls_attn + b * T + j, cls_row / S, mask=j < T)

    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for start in range(0, T, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = (i[:, None] < T) & (j[None, :] < T)
        guide = tl.zeros([BLOCK_I], tl.float32)  # sum_s A_s[0, i]
        heads = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)  # sum_s A_s[i, j]
        for s in range(S):
            head = attn + s * stride_s
            guide += tl.load(head + i * stride_j, mask=i < T, other=0.0).to(tl.float32)
            tile = tl.load(head + i[:, None] * stride_i + j[None, :] * stride_j, mask=inside, other=0.0)
            heads += tile.to(tl.float32)
        total += guide[:, None] * heads
    column = tl.sum(total, 0) / (S * S * T)
    tl.store(relation + b * (T - 1) + j - 1, column, mask=(j >= 1) & (j < T))


@triton.jit
def aggregate_backward_kernel(
    attn, cls_attn, grad_relation,  # (B, S, T, T), (B, T), (B, T-1)
    grad_attn, grad_guide,  # (B, T, T), the same for every head; (B, T)
    stride_b, stride_s, stride_i, stride_j, S, T,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """With g[j] = dM^r[j] / T: dA_s[i, j] = M^c[i] g[j] / S in rows i >= 1, and dM^c[i] = sum_j A'[i, j] g[j].

    A program owns BLOCK_I rows of one image. Row 0 of dA needs dM^c of all rows: its host adds it.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    attn += b * stride_b
    guide = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0)

    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (i[:, None] < T) & (j[None, :] < T)
        g = tl.load(grad_relation + b * (T - 1) + j - 1, mask=(j >= 1) & (j < T), other=0.0) / T
        gradient = (guide[:, None] * g[None, :] / S).to(grad_attn.dtype.element_ty)
        tl.store(grad_attn + (b * T + i[:, None]) * T + j[None, :], gradient, mask=inside & (i[:, None] >= 1))
        heads = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
        for s in range(S):
            tile = tl.load(
                attn + s * stride_s + i[:, None] * stride_i + j[None, :] * stride_j, mask=inside, other=0.0
            )
            heads += tile.to(tl.float32)
        total += heads * g[None, :]
    tl.store(grad_guide + b * T + i, tl.sum(total, 1) / S, mask=i < T)


@torch.library.custom_op(f"{__package__}::aggregate_attention", mutates_args=())
def aggregate_attention(attn: Tensor) -> tuple[Tensor, Tensor]:
    """A (B, S, T, T) -> M^c (B, T), M^r (B, T-1), float32."""
    B, S, T, _ = attn.shape
    cls_attn, relation = _aggregate_shapes(attn)
    blocks = BLOCKS["aggregate_kernel"]
    grid = (B, triton.cdiv(T, blocks["BLOCK_J"]))
    aggregate_kernel[grid](attn, cls_attn, relation, *attn.stride(), S, T, **blocks)
    return cls_attn, relation


@aggregate_attention.register_fake
def _aggregate_shapes(attn):
    B, _, T, _ = attn.shape
    return attn.new_empty(B, T, dtype=torch.float32), attn.new_empty(B, T - 1, dtype=torch.float32)


@torch.library.custom_op(f"{__package__}::aggregate_attention_backward", mutates_args=())
def _aggregate_attention_backward(attn: Tensor, cls_attn: Tensor, grad_cls: Tensor, grad_relation: Tensor) -> Tensor:
    """A (B, S, T, T), M^c (B, T), dM^c (B, T), dM^r (B, T-1) -> dA (B, T, T), the same for every head."""
    B, S, T, _ = attn.shape
    grad_attn = _aggregate_backward_shape(attn, cls_attn, grad_cls, grad_relation)
    grad_guide = torch.empty_like(cls_attn)
    grad_relation = grad_relation.contiguous()
    blocks = BLOCKS["aggregate_backward_kernel"]
    grid = (B, triton.cdiv(T, blocks["BLOCK_I"]))
    aggregate_backward_kernel[grid](
        attn, cls_attn, grad_relation, grad_attn, grad_guide, *attn.stride(), S, T, **blocks
    )
    # Row 0 is a row of A like the others, the source of M^c, and the weight of every row.
    row = cls_attn[:, :1] * torch.nn.functional.pad(grad_relation / T, (1, 0)) + grad_cls + grad_guide  # (B, T)
    grad_attn[:, 0] = row / S
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


# -------------------------------------------------------------------------------------------------- A never held


@triton.jit
def attention_kernel(
    q, k, v, out, lse, cls_rows,  # (B, S, T, d) x 3; out (B, T, S, d) in memory; (B, S, T); (B, S, T)
    stride_b, stride_s, stride_t, S, T, scale,  # scale: log2(e) / sqrt(d), so that exp is exp2
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):
    """A program owns BLOCK_I rows of one head's A: softmax runs along them, so they never leave the registers.

    It keeps the running maximum and sum of each row (flash attention) and saves their log2-sum-exp2, from which any
    A_s[i, j] = exp2(scale q_i k_j - lse_i) comes back (Eq. 4). The program of row 0 at once writes A_s[0, j] so: over
    the heads these rows' mean is M^c.
    """
    b, s = (tl.program_id(1) // S).to(tl.int64), tl.program_id(1) % S
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.arange(0, BLOCK_D)
    head = b * stride_b + s * stride_s
    q_tile = tl.load(q + head + i[:, None] * stride_t + c[None, :], mask=(i[:, None] < T) & (c[None, :] < D), other=0.0)

    highest = tl.full([BLOCK_I], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (j[:, None] < T) & (c[None, :] < D)
        k_tile = tl.load(k + head + j[:, None] * stride_t + c[None, :], mask=inside, other=0.0)
        v_tile = tl.load(v + head + j[:, None] * stride_t + c[None, :], mask=inside, other=0.0)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        score = tl.where(j[None, :] < T, score, float("-inf"))
        rise = tl.maximum(highest, tl.max(score, 1))
        p = tl.exp2(score - rise[:, None])
        decay = tl.exp2(highest - rise)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        highest = rise
    row_lse = highest + tl.log2(total)
    tl.store(lse + (b * S + s) * T + i, row_lse, mask=i < T)
    tl.store(
        out + ((b * T + i[:, None]) * S + s) * D + c[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=(i[:, None] < T) & (c[None, :] < D),
    )

    if tl.program_id(0) == 0:
        cls_lse = tl.sum(tl.where(i == 0, row_lse, 0.0), 0)
        cls_q = tl.load(q + head + c, mask=c < D, other=0.0).to(tl.float32)
        for start in range(0, T, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            inside = (j[:, None] < T) & (c[None, :] < D)
            k_tile = tl.load(k + head + j[:, None] * stride_t + c[None, :], mask=inside, other=0.0).to(tl.float32)
            score = tl.sum(k_tile * cls_q[None, :], 1) * scale
            tl.store(cls_rows + (b * S + s) * T + j, tl.exp2(score - cls_lse), mask=j < T)


@triton.jit
def relation_kernel(
    q, k, lse, cls_attn, columns,  # (B, S, T, d) x 2; (B, S, T); (B, T); (B, S, T)
    stride_b, stride_s, stride_t, S, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):
    """columns[j] = sum_i M^c[i] A_s[i, j]. A program owns BLOCK_J columns of one head's A, computed transposed.

    M^c is a mean over heads and a row's softmax runs along all columns, so both must be known first: hence two passes.
    """
    b, s = (tl.program_id(1) // S).to(tl.int64), tl.program_id(1) % S
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.arange(0, BLOCK_D)
    head = b * stride_b + s * stride_s
    k_tile = tl.load(k + head + j[:, None] * stride_t + c[None, :], mask=(j[:, None] < T) & (c[None, :] < D), other=0.0)

    total = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
    for start in range(0, T, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = (i[:, None] < T) & (c[None, :] < D)
        q_tile = tl.load(q + head + i[:, None] * stride_t + c[None, :], mask=inside, other=0.0)
        row_lse = tl.load(lse + (b * S + s) * T + i, mask=i < T, other=float("inf"))  # exp2(-inf): no such row
        guide = tl.load(cls_attn + b * T + i, mask=i < T, other=0.0)
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        total += guide[None, :] * tl.exp2(score - row_lse[None, :])
    tl.store(columns + (b * S + s) * T + j, tl.sum(total, 1), mask=j < T)


@torch.library.custom_op(f"{__package__}::attention_relation", mutates_args=())
def attention_relation(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, S, T, d) -> out (B, S, T, d), M^c (B, T), M^r (B, T-1), float32. No gradient.

    Views of one packed projection are read where they lie; other strides are copied first.
    """
    B, S, T, D = q.shape
    if D > 128:
        raise ValueError(f"q: got head dimension {D}, the Triton kernel needs at most 128")
    if not q.stride() == k.stride() == v.stride() or q.stride(3) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, _, _ = _attention_shapes(q, k, v)
    lse, cls_rows, columns = q.new_empty(3, B, S, T, dtype=torch.float32)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    row_bytes = 256 if BLOCK_D * q.itemsize <= 256 else 512
    sizes = (*q.stride()[:3], S, T, math.log2(math.e) / math.sqrt(D), D, BLOCK_D)

    blocks = BLOCKS["attention_kernel"][row_bytes]
    grid = (triton.cdiv(T, blocks["BLOCK_I"]), B * S)
    attention_kernel[grid](q, k, v, out, lse, cls_rows, *sizes, PRECISION=dot_precision(), **blocks)
    cls_attn = cls_rows.mean(1)  # M^c: (B, S, T) -> (B, T)

    blocks = BLOCKS["relation_kernel"][row_bytes]
    grid = (triton.cdiv(T, blocks["BLOCK_J"]), B * S)
    relation_kernel[grid](q, k, lse, cls_attn, columns, *sizes, PRECISION=dot_precision(), **blocks)
    return out, cls_attn, columns[:, :, 1:].mean(1) / T  # M^r: (B, S, T-1) -> (B, T-1)


@attention_relation.register_fake
def _attention_shapes(q, k, v):
    B, S, T, D = q.shape
    out = q.new_empty(B, T, S, D).transpose(1, 2)  # so that joining the heads, the next step, copies nothing
    return out, q.new_empty(B, T, dtype=torch.float32), q.new_empty(B, T - 1, dtype=torch.float32)
