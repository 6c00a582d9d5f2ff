"""The operators in fast torch, for any device. Three identities make them fast:

  class row          M^c needs only row 0 of A: one query per head, beside torch's fused attention.
  pooled conv        The mean over positions commutes with the convolution, which is linear:
                     mean_p sum_t W_t X[p+t] = sum_t W_t (mean_p X[p+t]). Logits need no class map.
  requested classes  A convolution's output channels are independent: the maps of K classes need the
                     kernels of these K only.

Each function computes what the function of that name in rpam.py or cdm.py does. `kernels` checks
the arguments.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of A, held at a time on a CPU: its caches hold them and their softmax


# --------------------------------------------------------------------------------------------- RPAM


def class_row(q: Tensor, k: Tensor) -> Tensor:
    """M^c (B, T): row 0 of A, head mean."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # A sum of products: matmul would copy the strided k, and keep the copy for the gradient.
    logits = (q[:, :, :1].to(wide) * k).sum(-1) / math.sqrt(q.shape[-1])  # (B, S, T)
    return logits.softmax(-1).mean(1)


def attention_relation(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, S, T, d) -> out (B, S, T, d), M^c (B, T), M^r (B, T-1). No gradient.

    M^r is linear in A, so A is computed head by head, on a CPU a few rows of one image at a time,
    and its weighted columns are added up. A trace that unrolls the loop takes all images together.
    """
    B, S, T, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    cls_attn = class_row(q, k)
    out = q.new_empty(B, T, S, d).transpose(1, 2)  # so that joining the heads copies nothing
    columns = q.new_zeros(B, T, dtype=wide)
    images, rows = [slice(None)], [slice(None)]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if q.device.type == "cpu" and not traced:
        images, rows = range(B), [slice(i, i + ROWS) for i in range(0, T, ROWS)]
    for b, s, i in itertools.product(images, range(S), rows):
        queries = q[b, s, i].to(wide) / math.sqrt(d)
        attn = (queries @ k[b, s].to(wide).transpose(-2, -1)).softmax(-1)  # (rows, T) of each image
        out[b, s, i] = attn.to(v.dtype) @ v[b, s]
        columns[b] += (cls_attn[b, None, i] @ attn)[..., 0, :]  # sum_i M^c[i] A_s[i, j]
    return out, cls_attn, columns[:, 1:] / (S * T)


def aggregate_attention(attn: Tensor) -> tuple[Tensor, Tensor]:
    """A (B, S, T, T) -> M^c (B, T), M^r (B, T-1)."""
    mean = attn.mean(1, dtype=torch.promote_types(attn.dtype, torch.float32))  # A' (B, T, T)
    cls_attn = mean[:, 0]  # (B, T)
    # No matmul: torch.compile would run its gradient in autocast's dtype.
    weighted = cls_attn[:, :, None] * mean[:, :, 1:]  # (B, T, T-1)
    return cls_attn, weighted.mean(1)


# ---------------------------------------------------------------------------------------------- CDM


def dynamic_conv2d(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, D, h, w), scores (B, G), weight (G, C, D, k, k), bias (C) or None -> (B, C, h, w).

    The images become the groups of one convolution, each with its own mixed kernel.
    """
    B, D, h, w = x.shape
    _, C, _, k, _ = weight.shape
    kernels = scores.to(x.dtype) @ weight.flatten(1)  # (B, C*D*k*k)
    if B == 0:  # torch refuses a convolution of no groups
        return F.conv2d(x, kernels.sum(0).view(C, D, k, k), bias, padding=k // 2)
    kernels = kernels.view(B * C, D, k, k)
    maps = F.conv2d(x.reshape(1, B * D, h, w), kernels, padding=k // 2, groups=B).view(B, C, h, w)
    return maps if bias is None else maps + bias[:, None, None]


def window_sums(x: Tensor, k: int, padded: bool) -> Tensor:
    """x (B, D, h, w) -> P (B, D, k*k): the mean of X shifted by each tap, or its padded pool."""
    return x.flatten(2) @ window_weights(*x.shape[2:], k, padded, like=x)


def window_weights(h: int, w: int, k: int, padded: bool, like: Tensor) -> Tensor:
    """(h*w, k*k): how much position p of X counts in the window sum of tap t.

    Output position p - t reads X[p] through tap t. So p counts as much as p - t counts in the pool,
    and not at all where p - t lies outside the map. Rows and columns are independent: the weight is
    a product of one for each.
    """

    def along(size: int) -> Tensor:  # (k, size): for one axis, tap by position
        outputs = like.new_ones(size)
        if padded:  # an output enters the averages around it and its neighbours: two at an edge
            outputs = F.avg_pool1d(outputs[None], 3, stride=1, padding=1)[0]
        outputs = F.pad(outputs / size, (k // 2, k // 2))
        return torch.stack([outputs[k - 1 - u :][:size] for u in range(k)])  # p - t of tap u

    return torch.einsum("uh,vw->hwuv", along(h), along(w)).reshape(h * w, k * k)


def class_products(x: Tensor, scores: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Each position's product with each tap of the requested classes (B, K) -> (B, K*k*k, h*w).

    Only the K requested kernels are mixed, their taps mirrored. An id outside 0 .. C-1 gives NaN.
    """
    B, D, _, _ = x.shape
    G, C, _, _, _ = weight.shape
    known = ((classes >= 0) & (classes < C))[..., None, None, None]  # (B, K, 1, 1, 1)
    classes = classes.clamp(0, C - 1)
    scores = scores.to(x.dtype).view(B, G, 1, 1, 1, 1)
    kernels = sum(scores[:, g] * weight[g, classes] for g in range(G))  # (B, K, D, k, k)
    kernels = kernels.where(known, float("nan")).flip(3, 4)
    pairs = kernels.transpose(1, 2).flatten(2)  # (B, D, K*k*k)
    return (x.flatten(2).transpose(1, 2) @ pairs).transpose(1, 2)  # (B, h*w, D) @ (B, D, K*k*k)
