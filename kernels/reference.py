"""The naive twins of the kernels: the paper's equations in plain torch, written to be read, nothing
fused or saved.

    B images    N patches, h x w of them    T = N+1 tokens, the class token first
    D width     S heads of width d = D/S
    C classes   G kernels W_g of k x k      K requested classes

Same names and signatures as the public functions of `kernels`, so that a test is one line. Each
computes in the dtype of its arguments (the tests give float64) and torch differentiates it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, relation: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eq. 4: q, k, v (B, S, N+1, d) -> out (B, S, N+1, d), M_l^c (B, N+1), M_l^r (B, N) or None."""
    attn = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # Eq. 4: A_l (B, S, N+1, N+1)
    cls_attn, patch_relation = aggregate_attention(attn)
    return attn @ v, cls_attn, patch_relation if relation else None


def aggregate_attention(attn: Tensor) -> tuple[Tensor, Tensor]:
    """RPAM (Fig. 3): A_l (B, S, N+1, N+1) -> M_l^c (B, N+1), M_l^r (B, N), the summand of Eq. 5."""
    mean = attn.mean(1)  # A'_l (B, N+1, N+1)
    cls_attn = mean[:, 0]  # M_l^c (B, N+1)
    patch_attn = mean[:, :, 1:]  # M_l^p (B, N+1, N)
    # M_l^h (B, N+1, N): row i of all N+1 rows, times M_l^c[i]
    weighted = cls_attn[:, :, None] * patch_attn
    return cls_attn, weighted.mean(1)  # M_l^r (B, N): 1/(N+1) sum_i


def dynamic_conv2d(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 6: x (B, D, h, w), image b convolved with its own kernel, zeros outside -> (B, C, h, w).

    scores S_g (B, G), weight W_g^e (G, C, D, k, k), bias (C) or None, not multiplied by the scores.
    """
    mixed = torch.einsum("bg,gcduv->bcduv", scores, weight)  # sum_g S_g W_g^e (B, C, D, k, k)
    maps = [F.conv2d(image, kernel, bias, padding="same") for image, kernel in zip(x, mixed)]
    return torch.stack(maps)


def dynamic_conv_logits(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, pool: str = "gap"
) -> Tensor:
    """The global average pool of Eq. 6 -> (B, C), after a zero-padded 3 x 3 average if "padded"."""
    maps = dynamic_conv2d(x, scores, weight, bias)  # (B, C, h, w)
    if pool == "padded":
        maps = F.avg_pool2d(maps, 3, stride=1, padding=1)
    return maps.mean((2, 3))


def class_maps(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor
) -> Tensor:
    """Eq. 6 at the requested classes (B, K) of each image -> (B, K, h, w)."""
    maps = dynamic_conv2d(x, scores, weight, bias)  # (B, C, h, w)
    return torch.stack([image[requested] for image, requested in zip(maps, classes)])
