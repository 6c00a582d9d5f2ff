"""What the operators' arguments must be, and what autocast makes of them."""

import contextlib

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast all of them in its dtype, but for float64: as for the operands of matmul."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point()
        return tensor.to(dtype) if eligible and tensor.dtype != torch.float64 else tensor

    return tuple(cast(t) for t in tensors)


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Within it torch rounds no sum or map to autocast's dtype."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def check_dtypes(**tensors: Tensor | None) -> None:
    (name, first), *rest = ((name, t) for name, t in tensors.items() if t is not None)
    if not first.is_floating_point():
        raise ValueError(f"{name}: got {first.dtype}, need a floating point tensor")
    for other, t in rest:
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(f"{other}: got {t.dtype} on {t.device}, "
                             f"{name} is {first.dtype} on {first.device}")


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape[2] < 2:
        raise ValueError(f"q: got shape {tuple(q.shape)}, need (B, S, N+1, d) with N >= 1")
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, need q's {tuple(q.shape)}")
    check_dtypes(q=q, k=k, v=v)


def check_conv(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, need (B, D, h, w)")
    B, D = x.shape[:2]
    if weight.ndim != 5 or weight.shape[2] != D or weight.shape[3:] not in ((1, 1), (3, 3)):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, "
                         f"need (G, C, {D}, k, k) with k 1 or 3")
    G, C = weight.shape[:2]
    if scores.shape != (B, G):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, need ({B}, {G})")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, need ({C},)")
    if not scores.is_floating_point() or scores.device != x.device:
        raise ValueError(f"scores: got {scores.dtype} on {scores.device}, "
                         f"need floating point on {x.device}")
    check_dtypes(x=x, weight=weight, bias=bias)


def check_classes(classes: Tensor, x: Tensor, C: int) -> None:
    fits = classes.ndim == 2 and classes.shape[0] == x.shape[0]
    if not fits or classes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"classes: got {classes.dtype} of shape {tuple(classes.shape)}, "
                         f"need int64 of ({len(x)}, K)")
    if classes.device != x.device:
        raise ValueError(f"classes: got a tensor on {classes.device}, x is on {x.device}")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    known = classes.device.type == "cpu" and not traced
    if known and classes.numel():
        low, high = classes.min().item(), classes.max().item()
        if low < 0 or high >= C:
            raise ValueError(f"classes: got ids from {low} to {high}, need 0 to {C - 1}")


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if need be, so that each row of its last dimension starts at 16 bytes.

    torch's fused attention on CUDA stops at other strides ("no kernel found to launch").
    """
    step = 16 // tensor.itemsize
    start = 0 if torch.compiler.is_compiling() else tensor.storage_offset()  # Dynamo knows none
    starts = (start, *tensor.stride()[:-1])
    fits = tensor.stride(-1) == 1 and not any(s % step for s in starts)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
