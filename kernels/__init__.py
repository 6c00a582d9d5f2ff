"""LCTR's operators: attention with its two maps (Eq. 4, RPAM), and Eq. 6's convolution.

Each exists three times: naively in reference.py, straight from the equations; in fast torch in
torch_path.py, for any device; and as fused Triton kernels in rpam.py and cdm.py. Triton runs for
CUDA tensors, torch for all others, unless `backend` or `use_backend` says "triton" or "torch". On
CPU tensors Triton needs TRITON_INTERPRET=1.

    B images    N patches, h x w of them    T = N+1 tokens, the class token first
    D width     S heads of width d = D/S
    C classes   G kernels W_g of k x k      K requested classes

Tensors are float32, float16 or bfloat16 (float64 in torch only); sums accumulate in float32. Under
autocast the operators cast their inputs as torch's own matrix products do. Shapes, dtypes and
devices that do not fit raise ValueError, a backend that cannot run RuntimeError.
"""

import contextlib
import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_path
from .checks import (
    aligned, autocast, autocast_off, check_attention, check_classes, check_conv, check_dtypes,
)

__all__ = [
    "attention", "aggregate_attention", "dynamic_conv2d", "dynamic_conv_logits", "class_maps",
    "use_backend",
]

_backend: str | None = None


@contextlib.contextmanager
def use_backend(name: str | None):
    """Within the with-block every operator runs on `name`: "triton", "torch", None: by device."""
    global _backend
    outer, _backend = _backend, _known_backend(name)
    try:
        yield
    finally:
        _backend = outer


def attention(
    q: Tensor, k: Tensor, v: Tensor, relation: bool = False, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """softmax(q k^T / sqrt d) v and the maps that LCTR takes from A, without holding A (Eq. 4, 5).

    q, k, v: (B, S, N+1, d), any strides.
    Returns out (B, S, N+1, d), cls_attn M^c (B, N+1) and, if `relation` is set, M^r (B, N), else
    None. The maps are float32 (float64 for float64). relation=False is differentiable in both
    outputs; relation=True is for inference, and raises RuntimeError where it needs a gradient.
    """
    q, k, v = autocast(q, k, v)
    check_attention(q, k, v)
    if relation and _needs_grad(q, k, v):
        raise RuntimeError(
            "attention: relation=True has no gradient, but q, k or v requires one: call it under "
            "torch.no_grad(), or give a materialised A to aggregate_attention"
        )
    path = _path("q", q, backend)
    with autocast_off(q):
        if relation:
            return path.attention_relation(q, k, v)
        if q.is_cuda:
            q, k, v = aligned(q), aligned(k), aligned(v)
        return F.scaled_dot_product_attention(q, k, v), path.class_row(q, k), None


def aggregate_attention(attn: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """RPAM on a materialised attention (Fig. 3): both maps from A (B, S, N+1, N+1), read once.

    Returns cls_attn M^c (B, N+1) and M^r (B, N) = (1/(N+1)) sum_i M^c[i] A'[i, 1+j], where A' is
    the head mean and i runs over all N+1 rows: float32 (float64 for float64). Differentiable: where
    a gradient is needed torch computes it on every backend, as in dynamic_conv2d.
    """
    if attn.ndim != 4 or attn.shape[2] != attn.shape[3] or attn.shape[2] < 2:
        raise ValueError(f"attn: got shape {tuple(attn.shape)}, need (B, S, N+1, N+1), N >= 1")
    check_dtypes(attn=attn)
    path = _path("attn", attn, backend)
    if _needs_grad(attn):
        path = torch_path
    with autocast_off(attn):
        return path.aggregate_attention(attn)


def dynamic_conv2d(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """Eq. 6: image b of x is convolved with sum_g scores[b, g] weight[g] -> (B, C, h, w).

    x: (B, D, h, w), any strides. scores: (B, G). weight: (G, C, D, k, k), k 1 or 3, zero padding
    k // 2. bias: (C) or None, not multiplied by the scores. Differentiable in all four: where a
    gradient is needed torch computes it on every backend, for no path of the model trains through
    all maps.
    """
    x, weight, bias = autocast(x, weight, bias)
    check_conv(x, scores, weight, bias)
    path = _path("x", x, backend)
    if _needs_grad(x, scores, weight, bias):
        path = torch_path
    with autocast_off(x):
        return path.dynamic_conv2d(x, scores, weight, bias)


def dynamic_conv_logits(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, pool: str = "gap", *,
    backend: str | None = None,
) -> Tensor:
    """The global average pool of dynamic_conv2d -> logits (B, C), without its maps.

    GAP(conv(X, W))[c] = sum_{d,u,v} W[c,d,u,v] P[d,u,v], where P[d,u,v] is the mean over the h*w
    positions of the zero-padded X[d], shifted by (u, v). pool="padded" averages the maps over
    3 x 3 positions (zero-padded) before the pool, as the authors' code does. Arguments and
    gradients as in dynamic_conv2d.
    """
    x, weight, bias = autocast(x, weight, bias)
    check_conv(x, scores, weight, bias)
    if pool not in ("gap", "padded"):
        raise ValueError(f'pool: got {pool!r}, need "gap" or "padded"')
    padded, (h, w) = pool == "padded", x.shape[2:]
    G, C, _, k, _ = weight.shape
    path = _path("x", x, backend)
    with autocast_off(x):
        sums = path.window_sums(x, k, padded)  # P (B, D, k*k)
        logits = (sums.flatten(1) @ weight.reshape(G * C, -1).T).view(-1, G, C)
        logits = (scores.to(x.dtype)[:, :, None] * logits).sum(1)  # (B, C)
        if bias is None:
            return logits
        # The padded pool's mean of ones: along each axis the two edges count 2/3.
        return logits + bias * ((1 - 2 / (3 * h)) * (1 - 2 / (3 * w)) if padded else 1)


def class_maps(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, *,
    backend: str | None = None,
) -> Tensor:
    """dynamic_conv2d at the requested classes only: classes (B, K) of ids -> (B, K, h, w).

    The rest as there. An id outside 0 .. C-1 raises ValueError if `classes` is in CPU
    memory; on a GPU, where reading it would wait for the device, its map is NaN.
    """
    x, weight, bias = autocast(x, weight, bias)
    check_conv(x, scores, weight, bias)
    C, k = weight.shape[1], weight.shape[3]
    check_classes(classes, x, C)
    path = _path("x", x, backend)
    if _needs_grad(x, scores, weight, bias):
        path = torch_path
    taps, r = range(k), k // 2
    with autocast_off(x):
        products = path.class_products(x, scores, weight, classes)  # (B, K*k*k, h*w)
        products = products.unflatten(1, (-1, k, k)).unflatten(-1, x.shape[2:])
        # A position's product with the mirrored tap (u, v) belongs where that tap points: shift it
        # there, zeros outside, and add up.
        shifted = [F.pad(products[:, :, u, v], (v - r, r - v, u - r, r - u))
                   for u in taps for v in taps]  # k*k times (B, K, h, w)
        maps = functools.reduce(torch.add, shifted).to(x.dtype)
        return maps if bias is None else maps + bias[classes.clamp(0, C - 1)][:, :, None, None]


# ------------------------------------------------------------------------------------ dispatch


def _known_backend(name: str | None) -> str | None:
    if name not in (None, "triton", "torch"):
        raise ValueError(f'backend: got {name!r}, need "triton", "torch" or None')
    return name


def _runs_triton(backend: str | None, name: str, tensor: Tensor) -> bool:
    chosen = _known_backend(backend) or _backend or ("triton" if tensor.is_cuda else "torch")
    if chosen != "triton":
        return False
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: got {tensor.dtype}, the Triton kernels need float32, float16 or "
                         'bfloat16: convert it, or use backend="torch"')
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{name}: got a CPU tensor, the Triton backend needs CUDA tensors, or "
                           "TRITON_INTERPRET=1 set before python starts")
    return True


def _path(name: str, tensor: Tensor, backend: str | None):
    """The module that computes. `name` and `tensor`: the argument that an error is about."""
    if not _runs_triton(backend, name, tensor):
        return torch_path
    from . import triton_path  # here, so that a CPU needs no triton
    return triton_path


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
