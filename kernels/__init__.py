"""The operators of LCTR: attention with its two maps (Eq. 4, RPAM) and the score-weighted dynamic convolution (Eq. 6).

Each has three implementations: here in fast torch (any device), in rpam.py and cdm.py as fused Triton kernels, and in
reference.py naively, straight from the equations. Triton runs for CUDA tensors, torch for all others, unless `backend`
or `use_backend` says "triton" or "torch"; on CPU tensors Triton needs its interpreter (TRITON_INTERPRET=1).

Tensors are float32, float16 or bfloat16 (float64 in torch only); sums accumulate in float32. Every function raises
ValueError for shapes, dtypes or devices that do not fit, and RuntimeError where the Triton backend cannot run.

Three identities make the torch paths fast:
  class row    M^c needs row 0 of A only, so training runs fused attention and one extra query row.
  pooled conv  the global average pool of a linear convolution is the convolution's kernel times k*k window sums of X:
               mean_p sum_t W_t X[p+t] = sum_t W_t (mean_p X[p+t]). No class map is ever computed for logits.
  asked only   a convolution's output channels are independent: maps of K classes need the kernels of these K alone.
"""

import contextlib
import itertools
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "aggregate_attention", "dynamic_conv2d", "dynamic_conv_logits", "class_maps", "use_backend"]

_backend: str | None = None


@contextlib.contextmanager
def use_backend(name: str | None):
    """Within the with-block every operator runs on `name`: "triton", "torch", or None for the choice by device."""
    global _backend
    outer, _backend = _backend, _known_backend(name)
    try:
        yield
    finally:
        _backend = outer


def attention(
    q: Tensor, k: Tensor, v: Tensor, relation: bool = False, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """softmax(q k^T / sqrt d) v, with the maps that LCTR reads off the attention A without holding it (Eq. 4, 5).

    q, k, v: (B, S, N+1, d), any strides, the class token first.
    Returns out (B, S, N+1, d), cls_attn M^c (B, N+1) and, where `relation` is set, M^r (B, N), else None.
    The maps are float32 at least. relation=False is differentiable in both outputs, and torch on every backend;
    relation=True is for inference.
    Raises ValueError for shapes, dtypes or devices that do not fit; RuntimeError where relation=True needs a gradient.
    """
    _check_attention(q, k, v)
    on_triton = _runs_triton(backend, "q", q)
    if relation and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise RuntimeError("attention: relation=True has no gradient, but q, k or v requires one: "
                           "call it under torch.no_grad(), or give a materialised A to aggregate_attention")
    if relation and on_triton:
        from . import rpam
        return rpam.attention_relation(q, k, v)
    map_dtype = torch.promote_types(q.dtype, torch.float32)
    if not relation:
        return F.scaled_dot_product_attention(q, k, v), _class_row(q, k, map_dtype), None

    # M^r is linear in A, so A is taken piece by piece, what the cores' caches hold: for each core one head, several if
    # they are small, or some rows of a large one. A piece is of heads of one image, or of all heads of several.
    B, S, T, d = q.shape
    cores = 1 if torch.compiler.is_compiling() else torch.get_num_threads()  # which Dynamo cannot trace
    heads = cores * max(1, _CACHED_ELEMENTS // T**2)
    images, heads = max(1, min(B, heads // S)), min(S, heads)
    rows = math.ceil(T / math.ceil(T**2 / _CACHED_ELEMENTS))
    scratch = q.new_empty(images * heads * rows, T)  # fresh memory for each piece would cost more than its products
    out = q.new_empty(B, T, S, d).transpose(1, 2)  # so that joining the heads, the next step, copies nothing
    columns = q.new_zeros(B, S, T, dtype=map_dtype)
    cls_attn = torch.cat([_class_row(*group, map_dtype) for group in zip(q.split(images), k.split(images))])  # (B, T)
    for image, head in itertools.product(range(0, B, images), range(0, S, heads)):
        image, head = slice(image, image + images), slice(head, head + heads)
        k_, v_ = k[image, head].flatten(0, 1).mT, v[image, head].flatten(0, 1)  # (images * heads, d, T) and (.., T, d)
        for row in range(0, T, rows):
            row = slice(row, row + rows)
            q_ = q[image, head, row].flatten(0, 1)  # (images * heads, rows, d)
            attn = scratch[: q_[..., 0].numel()].view(len(q_), -1, T)  # (images * heads, rows, T)
            torch.baddbmm(attn, q_, k_, beta=0, alpha=1 / math.sqrt(d), out=attn)
            torch.softmax(attn, -1, out=attn)
            piece = out[image, head, row]  # (images, heads, rows, d)
            if images == 1 and not torch.compiler.is_compiling():  # Dynamo refuses an out that is strided
                torch.bmm(attn, v_, out=piece[0])  # straight into its place
            else:
                piece.copy_((attn @ v_).view_as(piece))
            guide = cls_attn[image, None, None, row].to(q.dtype).expand(-1, piece.shape[1], -1, -1)
            column = columns[image, head]  # (images, heads, T)
            column.add_((guide.flatten(0, 1) @ attn).view_as(column))
    # in one piece, allocated last: small tensors kept between large ones that are freed would keep the heap in shreds
    maps = torch.cat([cls_attn, columns.sum(1)[:, 1:] / (S * T)], 1)  # (B, T + N)
    return out, maps[:, :T], maps[:, T:]


def aggregate_attention(attn: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """RPAM on a materialised attention (Fig. 3): both maps of attention() from A (B, S, N+1, N+1), read once.

    Returns cls_attn M^c (B, N+1) and M^r (B, N) = (1/(N+1)) sum_i M^c[i] A'[i, 1+j], float32 at least, where A' is the
    head mean and i runs over all N+1 rows. Differentiable. Raises ValueError for another shape or dtype.
    """
    if attn.ndim != 4 or attn.shape[2] != attn.shape[3] or attn.shape[2] < 2:
        raise ValueError(f"attn: got shape {tuple(attn.shape)}, need (B, S, N+1, N+1) with N >= 1")
    _check_dtypes(attn=attn)
    if _runs_triton(backend, "attn", attn):
        from . import rpam
        return rpam.aggregate_attention(attn)
    mean = attn.mean(1, dtype=torch.promote_types(attn.dtype, torch.float32))  # A' (B, N+1, N+1)
    cls_attn = mean[:, 0]  # (B, N+1)
    return cls_attn, (cls_attn[:, None] @ mean)[:, 0, 1:] / attn.shape[-1]


def dynamic_conv2d(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """Eq. 6: image b of x is convolved with sum_g scores[b, g] weight[g], zero padding k // 2 -> (B, C, h, w).

    x: (B, D, h, w), any strides. scores: (B, G). weight: (G, C, D, k, k), k 1 or 3. bias: (C) or None, not weighted.
    Differentiable in all four. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check_conv(x, scores, weight, bias)
    if _runs_triton(backend, "x", x):
        from . import cdm
        return cdm.dynamic_conv2d(x, scores, weight, bias)
    B, D, h, w = x.shape
    _, C, _, k, _ = weight.shape
    kernels = scores.to(x.dtype) @ weight.flatten(1)  # (B, C*D*k*k)
    maps = F.conv2d(x.reshape(1, B * D, h, w), kernels.view(B * C, D, k, k), padding=k // 2, groups=B).view(B, C, h, w)
    return maps if bias is None else maps + bias[:, None, None]


def dynamic_conv_logits(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, pool: str = "gap", *, backend: str | None = None
) -> Tensor:
    """The global average pool of dynamic_conv2d -> logits (B, C), without computing it: arguments as there.

    GAP(conv(x, W))[c] = sum_{d,u,v} W[c,d,u,v] P[d,u,v], where P[d,u,v] is the mean over the h*w places of the
    zero-padded x[d] shifted by (u, v). pool="padded" averages the maps over 3 x 3 places (zero-padded) before the pool,
    as the released code does. Differentiable in all four. Raises ValueError as dynamic_conv2d does.
    """
    _check_conv(x, scores, weight, bias)
    if pool not in ("gap", "padded"):
        raise ValueError(f'pool: got {pool!r}, need "gap" or "padded"')
    h, w = x.shape[2:]
    G, C, _, k, _ = weight.shape
    if _runs_triton(backend, "x", x):
        from . import cdm
        sums = cdm.window_sums(x, k, pool == "padded")  # P (B, D, k*k)
    else:
        sums = x.flatten(2) @ window_weights(h, w, k, pool, x)
    logits = (sums.flatten(1) @ weight.view(G * C, -1).T).view(-1, G, C)
    logits = (scores.to(x.dtype)[:, :, None] * logits).sum(1)  # (B, C)
    if bias is None:
        return logits
    return logits + bias * ((1 - 2 / (3 * h)) * (1 - 2 / (3 * w)) if pool == "padded" else 1)


def window_weights(h: int, w: int, k: int, pool: str, like: Tensor) -> Tensor:
    """(h*w, k*k): how much x at a place counts in each window sum P[d, u, v]; zero where the window misses it."""

    def axis(size: int) -> Tensor:  # (k, size): the pool's weight of the output place that tap u reads x[r] for
        places = like.new_ones(size)
        if pool == "padded":  # in how many of the three-wide averages an output place counts: 2/3 at an edge
            places = F.avg_pool1d(places[None], 3, stride=1, padding=1)[0]
        return F.pad(places / size, (k // 2, k // 2)).unfold(0, size, 1).flip(0)

    return torch.einsum("uh,vw->hwuv", axis(h), axis(w)).reshape(h * w, k * k)


def class_maps(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, *, backend: str | None = None
) -> Tensor:
    """dynamic_conv2d at the asked classes only: classes (B, K) of class ids -> (B, K, h, w). Other arguments as there.

    Differentiable, but where a gradient is needed torch computes it on every backend: the kernel is for localisation.
    Raises ValueError as dynamic_conv2d does, and where classes is not an integer tensor of shape (B, K).
    """
    _check_conv(x, scores, weight, bias)
    if classes.ndim != 2 or len(classes) != len(x) or classes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"classes: got {classes.dtype} of shape {tuple(classes.shape)}, need int64 of ({len(x)}, K)")
    B, D, h, w = x.shape
    G, _, _, k, _ = weight.shape
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scores, weight, bias))
    # Each place gives its product with every tap; fold adds them up where the taps, mirrored, point.
    if _runs_triton(backend, "x", x) and not needs_grad:
        from . import cdm
        products = cdm.class_products(x, scores, weight, classes)  # (B, K*k*k, h*w)
    else:
        scores = scores.to(x.dtype).view(B, G, 1, 1, 1, 1)
        kernels = sum(scores[:, g] * weight[g, classes] for g in range(G))  # (B, K, D, k, k)
        kernels = kernels.flip(3, 4).transpose(2, 1).reshape(B, D, -1)  # (B, D, K*k*k)
        products = (x.flatten(2).transpose(1, 2) @ kernels).transpose(1, 2)
    maps = F.fold(products, (h, w), k, padding=k // 2).to(x.dtype)  # (B, K, h, w)
    return maps if bias is None else maps + bias[classes][:, :, None, None]


_CACHED_ELEMENTS = 5 * 2**17  # attention held at a time by a CPU core: 2.5 MiB of float32, its share of L2 and L3


def _class_row(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """M^c (B, N+1): row 0 of A, head mean."""
    row = (q[:, :, :1].to(dtype) * k).sum(-1) / math.sqrt(q.shape[-1])  # (B, S, N+1): matmul would copy k and save it
    return row.softmax(-1).mean(1)


def _known_backend(name: str | None) -> str | None:
    if name not in (None, "triton", "torch"):
        raise ValueError(f'backend: got {name!r}, need "triton", "torch" or None')
    return name


def _runs_triton(backend: str | None, name: str, tensor: Tensor) -> bool:
    if (_known_backend(backend) or _backend or ("triton" if tensor.is_cuda else "torch")) != "triton":
        return False
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'{name}: got {tensor.dtype}, the Triton kernels need float32, float16 or bfloat16: '
                         'convert it, or use backend="torch"')
    if tensor.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"{name}: got a CPU tensor, the Triton backend needs CUDA tensors, or "
                               "TRITON_INTERPRET=1 set before python starts")
        from . import meter  # corrects the interpreter's bfloat16
    return True


def dot_precision() -> str:
    """How Triton multiplies float32 tiles: "tf32x3", as exact as float32, unless torch too may use plain TF32."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _check_dtypes(**tensors: Tensor | None) -> None:
    (first_name, first), *rest = ((name, t) for name, t in tensors.items() if t is not None)
    if not first.is_floating_point():
        raise ValueError(f"{first_name}: got {first.dtype}, need a floating point tensor")
    for name, t in rest:
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(f"{name}: got {t.dtype} on {t.device}, {first_name} is {first.dtype} on {first.device}")


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape[2] < 2:
        raise ValueError(f"q: got shape {tuple(q.shape)}, need (B, S, N+1, d) with N >= 1")
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, need q's {tuple(q.shape)}")
    _check_dtypes(q=q, k=k, v=v)


def _check_conv(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, need (B, D, h, w)")
    B, D = x.shape[:2]
    if weight.ndim != 5 or weight.shape[2] != D or weight.shape[3:] not in ((1, 1), (3, 3)):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, need (G, C, {D}, k, k) with k 1 or 3")
    G, C = weight.shape[:2]
    if scores.shape != (B, G):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, need ({B}, {G})")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, need ({C},)")
    if not scores.is_floating_point() or scores.device != x.device:
        raise ValueError(f"scores: got {scores.dtype} on {scores.device}, need floating point on {x.device}")
    _check_dtypes(x=x, weight=weight, bias=bias)
