"""The naive twins of the kernels: the paper's equations in plain torch, written to be read, nothing fused or saved.

Same names and signatures as the public functions of `kernels`, so that a test is one line. Each computes in the dtype
of its arguments (the tests give float64) and torch differentiates it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, relation: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eq. 4 with its two maps: q, k, v (B, S, N+1, d) -> out (B, S, N+1, d), M^c (B, N+1), M^r (B, N) or None."""
    attn = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)  # Eq. 4: A_l (B, S, N+1, N+1)
    cls_attn, patch_relation = aggregate_attention(attn)
    return attn @ v, cls_attn, patch_relation if relation else None


def aggregate_attention(attn: Tensor) -> tuple[Tensor, Tensor]:
    """RPAM (Fig. 3): A_l (B, S, N+1, N+1) -> M^c (B, N+1), M^r (B, N), the summand of Eq. 5."""
    mean = attn.mean(1)  # A'_l (B, N+1, N+1)
    cls_attn = mean[:, 0]  # M^c (B, N+1)
    patch_attn = mean[:, :, 1:]  # M^p (B, N+1, N)
    weighted = cls_attn[:, :, None] * patch_attn  # M^h (B, N+1, N)
    return cls_attn, weighted.mean(1)  # M^r (B, N)


def dynamic_conv2d(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 6: each image of x (B, D, h, w) convolved with its own kernel sum_g S_g W_g -> (B, C, h, w)."""
    kernels = torch.einsum("bg,gcduv->bcduv", scores, weight)  # (B, C, D, k, k)
    padding = weight.shape[-1] // 2
    return torch.stack([F.conv2d(image, kernel, bias, padding=padding) for image, kernel in zip(x, kernels)])


def dynamic_conv_logits(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, pool: str = "gap") -> Tensor:
    """The global average pool of Eq. 6 -> (B, C); "padded" puts a zero-padded 3 x 3 average before it."""
    maps = dynamic_conv2d(x, scores, weight, bias)  # (B, C, h, w)
    if pool == "padded":
        maps = F.avg_pool2d(maps, 3, stride=1, padding=1)
    return maps.mean((2, 3))


def class_maps(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """Eq. 6 at the asked classes (B, K) of each image -> (B, K, h, w)."""
    maps = dynamic_conv2d(x, scores, weight, bias)  # (B, C, h, w)
    return torch.stack([image[asked] for image, asked in zip(maps, classes)])
