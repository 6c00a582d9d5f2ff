"""LCTR: Local Continuity Transformer for weakly supervised object localisation (Chen et al., AAAI 2022), in one file.

Reading order is the paper's: tokens (Eq. 1), attention and its two maps (Eq. 4, RPAM, Eq. 5), the cue digging module
(CDM, Eq. 6), classification (Eq. 2), the localisation map (Eq. 3). Then come localize() step by step, which
`python lctr.py` prints, and how weights are loaded. Shapes are written with the paper's symbols:

    B images of H x W    h x w = N patches of P x P (row-major), T = N+1 tokens with the class token first
    D embed_dim    S num_heads    L depth    C classes    G kernels of size k x k    K asked classes

Attention and Eq. 6 run through the package `kernels`: Triton on CUDA, torch elsewhere, the same numbers.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

import kernels

ARCHITECTURES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # DeiT-Ti/S/B: D, L, S
COUPLINGS = ("none", "cls", "relation", "cls-only", "relation-only")


# ---------------------------------------------------------------- the vision transformer


class AttentionMaps(NamedTuple):
    """What RPAM reads off one block's attention, with A'_l (B, N+1, N+1) the head mean of A_l; None: not asked for."""

    cls: Tensor  # M_l^c (B, N+1): A'_l[0], the class token's row
    relation: Tensor | None  # M_l^r (B, N): 1/(N+1) sum_i M_l^c[i] A'_l[i, 1+j] over all N+1 rows i, for patch j
    full: Tensor | None  # A_l (B, S, N+1, N+1)


class PatchEmbed(nn.Module):
    """Cuts images into P x P patches and projects each linearly: F(x_p) of Eq. 1."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, D, h, w) -> (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 4) that returns its maps as data."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, attention: str) -> tuple[Tensor, AttentionMaps]:
        """x (B, N+1, D) -> the same shape, and its maps; attention: see VisionTransformer.forward_features."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)  # (B, N+1, 3, S, D/S)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, S, N+1, D/S)
        if attention == "full":
            attn = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # Eq. 4: A_l (B, S, N+1, N+1)
            out = attn @ v  # (B, S, N+1, D/S)
            maps = AttentionMaps(*kernels.aggregate_attention(attn), attn)  # RPAM from A_l
        else:  # the same from q and k, A_l never held
            out, cls_attn, relation = kernels.attention(q, k, v, relation=attention == "relation")
            maps = AttentionMaps(cls_attn, relation, None)
        return self.proj(out.transpose(1, 2).reshape(B, T, D)), maps  # (B, N+1, S, D/S) -> (B, N+1, D)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, for each token alone: (B, N+1, D) -> (B, N+1, D)."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, x: Tensor, attention: str, keep: Tensor | None) -> tuple[Tensor, AttentionMaps]:
        """x (B, N+1, D); keep (B, 2) scales each image's two residual branches (stochastic depth), None for neither."""
        update, maps = self.attn(self.norm1(x), attention)
        x = x + (update if keep is None else update * keep[:, 0, None, None])  # times (B, 1, 1)
        update = self.mlp(self.norm2(x))
        return x + (update if keep is None else update * keep[:, 1, None, None]), maps


class VisionTransformer(nn.Module):
    """A ViT / DeiT whose blocks return their attention maps. Parameter names are timm's.

    img_size: int or (height, width) in pixels, a multiple of patch_size. drop_path: stochastic depth's rate in the last
    block, growing linearly from 0 in the first. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.img_size = two_sides(img_size)
        if any(side % patch_size or side < 1 for side in self.img_size):
            raise ValueError(f"img_size: got {img_size}, need multiples of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, need a divisor of embed_dim {embed_dim}")
        self.grid = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)  # (h, w)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.drop_rates = [drop_path * block / max(1, depth - 1) for block in range(depth)]

        self.apply(init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_features(
        self, images: Tensor, attention: str = "cls", depth_noise: Tensor | None = None
    ) -> tuple[Tensor, list[AttentionMaps]]:
        """images (B, 3, H, W), ImageNet-normalised -> tokens X_L (B, N+1, D) after the final norm, L AttentionMaps.

        attention: "cls" gives M_l^c alone; "relation" M_l^c and M_l^r, for inference, A_l never held; "full" all three.
        depth_noise: uniform numbers (B, L, 2) that decide which residual branches stochastic depth drops in training;
        drawn here where not given. Raises ValueError for images of another size or another word for attention.
        """
        if images.shape[1:] != (3, *self.img_size):
            raise ValueError("images: got shape %s, need (B, 3, %d, %d)" % (tuple(images.shape), *self.img_size))
        if attention not in ("cls", "relation", "full"):
            raise ValueError(f'attention: got {attention!r}, need "cls", "relation" or "full"')
        x = self.embed(images)  # Eq. 1: X_1 (B, N+1, D)
        keep = self.stochastic_depth(len(x), depth_noise)  # (B, L, 2) or None
        maps = []
        for i, block in enumerate(self.blocks):
            x, block_maps = block(x, attention, None if keep is None else keep[:, i])
            maps.append(block_maps)
        return self.norm(x), maps

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: images (B, 3, H, W) -> X_1 = [x_cls; F(x_p^1); ...; F(x_p^N)] + P (B, N+1, D)."""
        cls_token = self.cls_token.expand(len(images), -1, -1)  # (1, 1, D) -> (B, 1, D)
        return torch.cat([cls_token, self.patch_embed(images)], 1) + self.pos_embed

    def stochastic_depth(self, batch: int, noise: Tensor | None) -> Tensor | None:
        """(B, L, 2): 0 where an image's residual branch is dropped, else 1 / P(kept); None where nothing ever is."""
        if not self.training or self.drop_rates[-1] == 0:
            return None
        rates = self.pos_embed.new_tensor(self.drop_rates)[:, None]  # (L, 1)
        if noise is None:
            noise = torch.rand(batch, len(self.blocks), 2, device=rates.device)
        return (noise >= rates) / (1 - rates)


def two_sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


def init_linear(module: nn.Module) -> None:
    """ViT's initialisation of linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- the cue digging module


class CDM(nn.Module):
    """Cue digging module: holds G kernels W_g^e and scores them, image by image, by what the class token leaves over.

    LCTR convolves X_L with their mixture sum_g S_g W_g^e (Eq. 6).
    scorer (Table 5): which pool of the cues feeds which linear layer. "gap", "gmp": that pool alone; "shared": one
    layer on their sum; "separate", the paper's: a layer for each, added.
    erase: "raw" reverses M~_*^c as it is (about 1/N, so little is erased); "minmax" stretches it to [0, 1] per image.
    """

    def __init__(self, embed_dim: int, num_classes: int, num_kernels: int, kernel_size: int, scorer: str, erase: str):
        super().__init__()
        self.scorer, self.erase = scorer, erase
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        if scorer != "gmp":
            self.score_avg = nn.Linear(embed_dim, num_kernels)
        if scorer in ("gmp", "separate"):
            self.score_max = nn.Linear(embed_dim, num_kernels)
        self.weight = nn.Parameter(torch.empty(num_kernels, num_classes, embed_dim, kernel_size, kernel_size))  # W_g^e
        self.bias = nn.Parameter(torch.zeros(num_classes))

        self.apply(init_linear)
        nn.init.zeros_(self.conv.bias)
        for kernel in self.weight:  # one by one: each convolution's own fan-in is D * k * k
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    def reverse(self, cls_map: Tensor) -> Tensor:
        """M~_*^c (B, h, w) -> 1 - M~_*^c (B, h, w), which erases what is attended."""
        if self.erase == "minmax":
            low, high = cls_map.amin((1, 2), True), cls_map.amax((1, 2), True)  # (B, 1, 1)
            cls_map = (cls_map - low) / (high - low).clamp_min(torch.finfo(cls_map.dtype).tiny)
        return 1 - cls_map

    def cues(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> X~_L (B, D, h, w)."""
        return self.conv(features * self.reverse(cls_map)[:, None])  # times (B, 1, h, w)

    def forward(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> scores S_g (B, G) in (0, 1)."""
        cues = self.cues(features, cls_map)  # X~_L (B, D, h, w)
        gap, gmp = cues.mean((2, 3)), cues.amax((2, 3))  # (B, D)
        if self.scorer == "gap":
            return self.score_avg(gap).sigmoid()
        if self.scorer == "gmp":
            return self.score_max(gmp).sigmoid()
        if self.scorer == "shared":
            return self.score_avg(gap + gmp).sigmoid()
        return (self.score_avg(gap) + self.score_max(gmp)).sigmoid()


# ---------------------------------------------------------------- LCTR


class Localization(NamedTuple):
    """What LCTR.localize returns; fuse() makes the localisation map of it."""

    logits: Tensor  # (B, C)
    classes: Tensor  # (B, K): the class ids that the maps belong to
    class_maps: Tensor | None  # M_CDM (B, K, h, w), as convolved: before any ReLU; None on a "token" head
    cls_map: Tensor  # M~_*^c (B, h, w): mean class-token attention of the L blocks
    relation_map: Tensor  # M_*^r (B, h, w): mean patch relation of the L blocks


class LCTR(VisionTransformer):
    """A vision transformer with one of three heads on its final tokens; trained with image labels, it localises.

    head: "cdm" is LCTR; "conv" is the TS-CAM baseline, one static convolution; "token" is plain DeiT, a linear layer
    on the class token, without class maps. pool: "gap" is the paper's; "padded" averages class maps over 3 x 3 places
    (zeros outside) first, as the released code does. num_kernels: Table 6; kernel_size, 1 or 3: Table 7; scorer,
    erase: see CDM. Raises ValueError for a switch that does not exist or sizes that do not divide.
    """

    def __init__(
        self,
        num_classes: int,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        head: str = "cdm",
        num_kernels: int = 4,
        kernel_size: int = 3,
        scorer: str = "separate",
        erase: str = "raw",
        pool: str = "gap",
    ):
        for name, value, allowed in (
            ("head", head, ("cdm", "conv", "token")),
            ("kernel_size", kernel_size, (1, 3)),
            ("scorer", scorer, ("separate", "shared", "gap", "gmp")),
            ("erase", erase, ("raw", "minmax")),
            ("pool", pool, ("gap", "padded")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}, need one of {', '.join(map(str, allowed))}")
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, drop_path)
        self.head_type, self.pool = head, pool
        if head == "cdm":
            self.cdm = CDM(embed_dim, num_classes, num_kernels, kernel_size, scorer, erase)
        elif head == "conv":
            self.head = nn.Conv2d(embed_dim, num_classes, kernel_size, padding=kernel_size // 2)
            nn.init.zeros_(self.head.bias)
        else:
            self.classifier = nn.Linear(embed_dim, num_classes)
            init_linear(self.classifier)

    def forward(self, images: Tensor, depth_noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) -> logits (B, C), whose cross-entropy is Eq. 2. depth_noise: see forward_features."""
        tokens, maps = self.forward_features(images, "cls", depth_noise)
        cls_map = self.on_grid(mean_over_blocks(maps, "cls")[:, 1:])  # M~_*^c (B, h, w)
        return self.classify(tokens, cls_map)[0]

    def classify(self, tokens: Tensor, cls_map: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """X_L (B, N+1, D), M~_*^c (B, h, w) -> logits (B, C) and what Eq. 6 convolves; None on a "token" head.

        That is X_L (B, D, h, w), scores S_g (B, G), kernels W_g^e (G, C, D, k, k), and a bias (C) that no score weighs.
        """
        if self.head_type == "token":
            return self.classifier(tokens[:, 0]), None  # (B, D) -> (B, C)
        features = self.on_grid(tokens[:, 1:])  # X_L (B, D, h, w)
        if self.head_type == "cdm":
            operands = features, self.cdm(features, cls_map), self.cdm.weight, self.cdm.bias
        else:  # a static convolution is Eq. 6 with one kernel (1, C, D, k, k), scored 1
            operands = features, features.new_ones(len(features), 1), self.head.weight[None], self.head.bias
        return kernels.dynamic_conv_logits(*operands, self.pool), operands  # GAP of Eq. 6, X_CDM never computed

    @torch.no_grad()
    def localize(self, images: Tensor, classes: Tensor | str | None = None) -> Localization:
        """images (B, 3, H, W) -> logits and the maps that localise (the paper's "During testing").

        classes: (B, K) ids of the classes whose maps are computed, -1 for the predicted class; None for the predicted
        class alone, K = 1; "all" for all C. Raises ValueError for another word.
        """
        if isinstance(classes, str) and classes != "all":
            raise ValueError(f'classes: got {classes!r}, need class ids (B, K), None or "all"')
        tokens, maps = self.forward_features(images, "relation")
        cls_map = self.on_grid(mean_over_blocks(maps, "cls")[:, 1:])  # M~_*^c (B, h, w)
        relation_map = self.on_grid(mean_over_blocks(maps, "relation"))  # Eq. 5: M_*^r (B, h, w)
        logits, operands = self.classify(tokens, cls_map)
        every_class = isinstance(classes, str)
        predicted = logits.argmax(1, keepdim=True)  # (B, 1)
        if classes is None:
            classes = predicted
        elif every_class:
            classes = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)  # (C) -> (B, C)
        else:
            classes = torch.where(classes < 0, predicted, classes)  # (B, K)
        if operands is None:
            class_maps = None
        elif every_class:
            class_maps = kernels.dynamic_conv2d(*operands)  # Eq. 6: X_CDM (B, C, h, w)
        else:
            class_maps = kernels.class_maps(*operands, classes)  # Eq. 6 at the asked classes: M_CDM (B, K, h, w)
        return Localization(logits, classes, class_maps, cls_map, relation_map)

    def on_grid(self, patches: Tensor) -> Tensor:
        """(B, N) -> (B, h, w) or (B, N, D) -> (B, D, h, w), as views."""
        return patches.unflatten(1, self.grid) if patches.ndim == 2 else patches.mT.unflatten(2, self.grid)


def mean_over_blocks(maps: list[AttentionMaps], name: str) -> Tensor:
    """(1/L) sum_l M_l of Eq. 5: of M_l^c (B, N+1) for "cls", of M_l^r (B, N) for "relation"."""
    return torch.stack([getattr(block, name) for block in maps]).mean(0)


def fuse(localization: Localization, coupling: str = "relation") -> Tensor:
    """Localisation maps (B, K, h, w) of localize()'s K classes, before resizing and thresholds.

    "relation": ReLU(M_CDM) * M_*^r, Eq. 3 with the released code's ReLU. "cls": ReLU(M_CDM) * M~_*^c.
    "none": ReLU(M_CDM). On a "cdm" head these are LCTR, CDM and its class map; on "conv" TS-CAM + RPAM, TS-CAM and CAM.
    "relation-only", "cls-only": the attention map alone, the same for every class.
    Raises ValueError for another coupling, and where a "token" head has no class maps.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling: got {coupling!r}, need one of {', '.join(COUPLINGS)}")
    B, K = localization.classes.shape
    attention_map = localization.relation_map if coupling.startswith("relation") else localization.cls_map
    if coupling.endswith("-only"):
        return attention_map[:, None].expand(B, K, -1, -1)  # (B, 1, h, w) -> (B, K, h, w)
    if localization.class_maps is None:
        raise ValueError(f'coupling: got {coupling!r}, a "token" head has no class maps: '
                         'need "cls-only" or "relation-only"')
    class_maps = localization.class_maps.relu()  # (B, K, h, w)
    return class_maps if coupling == "none" else class_maps * attention_map[:, None]  # Eq. 3: M^fuse


# ---------------------------------------------------------------- localize, step by step


@torch.no_grad()
def trace(model: LCTR, images: Tensor) -> list[tuple[str, str, str, Tensor]]:
    """What localize() computes for images (B, 3, H, W), step by step: (equation, the paper's name, shape, value)."""
    tokens, maps = model.forward_features(images, "full")
    found = model.localize(images)
    _, operands = model.classify(tokens, found.cls_map)
    steps = [
        ("", "images", "(B, 3, H, W)", images),
        ("Eq. 1", "X_1: class token, patches, positions", "(B, N+1, D)", model.embed(images)),
        ("Eq. 4", "A_L: the last block's attention", "(B, S, N+1, N+1)", maps[-1].full),
        ("RPAM", "M_L^c: its class row, head mean", "(B, N+1)", maps[-1].cls),
        ("RPAM", "M_L^r: its rows, weighted by M_L^c", "(B, N)", maps[-1].relation),
        ("Eq. 5", "M_*^r: patch relation map", "(B, h, w)", found.relation_map),
        ("CDM", "M~_*^c: class-token attention map", "(B, h, w)", found.cls_map),
        ("", "X_L: tokens after the final norm", "(B, N+1, D)", tokens),
    ]
    if operands is not None:
        features, scores, weight, _ = operands
        if model.head_type == "cdm":
            steps += [("CDM", "1 - M~_*^c: reversed", "(B, h, w)", model.cdm.reverse(found.cls_map)),
                      ("CDM", "X~_L: cues", "(B, D, h, w)", model.cdm.cues(features, found.cls_map)),
                      ("CDM", "S_g: scores", "(B, G)", scores)]
        mixed = torch.einsum("bg,gcduv->bcduv", scores, weight)
        steps += [("Eq. 6", "W_g^e: kernels", "(G, C, D, k, k)", weight),
                  ("Eq. 6", "sum_g S_g W_g^e: the image's kernel", "(B, C, D, k, k)", mixed),
                  ("Eq. 6", "X_CDM: class maps", "(B, C, h, w)", kernels.dynamic_conv2d(*operands))]
    steps += [("Eq. 2", "logits", "(B, C)", found.logits),
              ("Eq. 2", "p: their softmax", "(B, C)", found.logits.softmax(1))]
    if operands is not None:
        steps += [("Eq. 3", "M_CDM: the predicted class's map", "(B, 1, h, w)", found.class_maps),
                  ("Eq. 3", "M^fuse: ReLU(M_CDM) * M_*^r", "(B, 1, h, w)", fuse(found))]
    return steps


# ---------------------------------------------------------------- weights: reading files

DEIT_FILES = {  # torch.hub checks the hash that the name carries
    name: f"https://dl.fbaipublicfiles.com/deit/{name}_patch16_224-{digest}.pth"
    for name, digest in (("deit_tiny", "a1311bcf"), ("deit_small", "cd65a155"), ("deit_base", "b5f2ef4d"))
}
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # alien content's errors


def read_weights(path: str) -> dict:
    """The dict in a file of weights, read without running anything in it. Raises ValueError naming the file."""
    path = str(path)
    if path in DEIT_FILES:
        return download(path)
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged file fails in many ways inside torch; all mean the same to its owner
        reason = error if path.endswith(".safetensors") else type(error).__name__
        raise ValueError(f"{path}: not a file of weights that can be read without running code ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, need a state dict or a checkpoint")
    return content


def download(name: str) -> dict:
    """The state dict of an official DeiT file, from torch.hub's cache where it lies there. Raises ValueError."""
    url, folder = DEIT_FILES[name], os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no disk; a wrong hash
        raise ValueError(f"{name}: cannot download {url} ({last_line(error)}): put that file into {folder}, "
                         "or give the path of one") from None


def read_safetensors(path: str) -> dict[str, Tensor]:
    """A .safetensors file: its header's length (8 bytes, little-endian), a JSON header, raw tensors; or ValueError."""
    content = np.fromfile(path, np.uint8)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if not 2 <= length <= len(content) - 8:
        raise ValueError(f"its header claims {length} bytes, the file has {len(content)}")
    data, tensors = torch.from_numpy(content[8 + length:]), {}
    try:
        header = json.loads(content[8:8 + length].tobytes())
        header.pop("__metadata__", None)
        for key, entry in header.items():
            dtype, shape, (start, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{key}: {dtype} of shape {shape} does not fit bytes {start} to {end} of {len(data)}")
            tensors[key] = data[start:end].clone().view(dtype).view(shape)  # clone: offsets need not be aligned
    except MISFITS as error:
        raise ValueError(f"not a safetensors header ({type(error).__name__}: {last_line(error)})") from None
    return tensors


def last_line(error: Exception) -> str:
    """The last line of an error's message, where torch says what was wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


# ---------------------------------------------------------------- weights: a foreign backbone

AUTHORS_NAMES = {  # the released LCTR code's -> ours
    "conv3x3.": "cdm.conv.",
    "CDM._routing_fn_two.fc.": "cdm.score_avg.",
    "CDM._routing_fn_two.fc2.": "cdm.score_max.",
    "CDM.": "cdm.",
}
HEADS = ("cdm.", "head.", "classifier.")


class LoadReport(NamedTuple):
    """What load_pretrained did: parameters taken as they are, resized, converted from another convention, left new; and
    what it ignored in the file."""

    loaded: list[str]
    resized: list[str]
    converted: list[str]
    new: list[str]
    ignored: list[str]

    def __str__(self) -> str:
        return "\n".join(f"  {name:9} {len(keys):3}  {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
                         for name, keys in self._asdict().items() if keys)


def to_own_names(content: dict, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a file's content, under this project's names, and the names of those it had to convert.

    Raises ValueError, naming the source, for what is no state dict of finite tensors that fit each other.
    """
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise ValueError(f"{source}: found a {type(state).__name__}, need a state dict")
    own, converted = {}, []
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.isfinite().all():
            raise ValueError(f"{source}: {key}: need a tensor of finite numbers")
        key = key.removeprefix("module.")  # nn.DataParallel's
        for foreign, name in AUTHORS_NAMES.items():
            if key.startswith(foreign):
                key = name + key.removeprefix(foreign)
                break
        own[key] = value
    try:
        if "dist_token" in own:  # a distilled DeiT's: its position comes after the class token's
            own["pos_embed"] = torch.cat([own["pos_embed"][:, :1], own["pos_embed"][:, 2:]], 1)  # (1, 1 + h'*w', D)
            converted.append("pos_embed")
        for key in [key for key in own if key.endswith((".ls1.gamma", ".ls2.gamma"))]:
            gamma = own.pop(key).float()  # (D), LayerScale's: x + gamma * (W x + b)
            linear = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
            for name, scale in ((f"{linear}.weight", gamma[:, None]), (f"{linear}.bias", gamma)):
                own[name] = own[name].float() * scale
                converted.append(name)
    except MISFITS as error:
        raise ValueError(f"{source}: its distillation token or LayerScale does not fit its other parameters "
                         f"({last_line(error)})") from None
    return own, converted


def architecture(state: dict[str, Tensor]) -> dict:
    """LCTR's sizes, read off the shapes of a ViT's parameters; heads are 64 wide, as in every DeiT."""
    embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
    return dict(
        patch_size=patch_size, embed_dim=embed_dim, num_heads=max(1, embed_dim // 64),
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        img_size=patch_size * math.isqrt(state["pos_embed"].shape[1] - 1),
    )


def describe(state: dict[str, Tensor]) -> str:
    """What a state dict looks like, in a few words."""
    for key, name in (("relative_position_bias_table", "a Swin transformer"), ("layer1.0.conv1", "a ResNet"),
                      ("features.0.weight", "a VGG"), ("stages.0", "a ConvNeXt")):
        if any(key in own for own in state):
            return name
    try:
        a = architecture(state)
    except MISFITS:
        return f"none of ours ({', '.join(list(state)[:3]) or 'empty'}{', ...' if len(state) > 3 else ''})"
    known = [name for name, sizes in ARCHITECTURES.items() if sizes == (a["embed_dim"], a["depth"], a["num_heads"])]
    return (f"a ViT of width {a['embed_dim']}, {a['depth']} blocks, patch {a['patch_size']}"
            + "".join(f" (--arch {name})" for name in known))


def resize_pos_embed(pos_embed: Tensor, source: tuple[int, int] | None, grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of the patch part of (1, 1 + h'*w', D) from grid (h', w') to (h, w) -> (1, 1 + h*w, D).

    source: (h', w'); None for the same grid where the number of patches is the same, else a square one.
    """
    patches = pos_embed[:, 1:].mT  # (1, D, h'*w')
    N = patches.shape[2]
    source = source or (grid if N == math.prod(grid) else (math.isqrt(N),) * 2)
    if source == grid:
        return pos_embed
    patches = patches.unflatten(2, source)  # (1, D, h', w')
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False)  # (1, D, h, w)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT], 1)  # (1, 1 + h*w, D)


def resize_patches(weight: Tensor, size: int) -> Tensor:
    """Bicubic resize of the patch convolution (D, 3, P', P') to P x P, scaled: a plain patch keeps its embedding."""
    if weight.shape[-1] == size:
        return weight
    return F.interpolate(weight, (size, size), mode="bicubic", align_corners=False) * (weight.shape[-1] / size) ** 2


def load_backbone(
    model: VisionTransformer, state: dict[str, Tensor], source: str, converted: Sequence[str] = (),
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """load_pretrained of a state dict in this project's names, which errors call `source`; grid: its (h', w')."""
    own = model.state_dict()
    backbone = [key for key in own if not key.startswith(HEADS)]
    if not set(backbone) & set(state):
        raise ValueError(f"{source}: no parameter of a ViT's backbone (cls_token, blocks.0.attn.qkv.weight, ...): "
                         f"looks like {describe(state)}")
    update, report = {}, LoadReport([], [], [], [], [key for key in state if key not in backbone])
    for key, before in own.items():
        if key not in backbone or key not in state:
            report.new.append(key)
            continue
        found = value = state[key].float()
        with contextlib.suppress(*MISFITS):  # no grid, no patches: its shape is named below
            if key == "pos_embed":
                value = resize_pos_embed(found, grid, model.grid)
            elif key == "patch_embed.proj.weight":
                value = resize_patches(found, before.shape[-1])
        if value.shape != before.shape:
            raise ValueError(f"{source}: {key}: found shape {tuple(found.shape)}, need {tuple(before.shape)}: "
                             f"looks like {describe(state)}")
        kind = report.resized if value is not found else report.converted if key in converted else report.loaded
        kind.append(key)
        update[key] = value
    model.load_state_dict(update, strict=False)
    return report


def load_pretrained(model: VisionTransformer, path: str) -> LoadReport:
    """Loads a backbone from a file of weights, in any float dtype; heads stay new.

    path: a .safetensors or torch file of a timm ViT or DeiT (distilled ones too), DINOv2, TS-CAM, the released LCTR or
    this project, or deit_tiny, deit_small, deit_base, which torch.hub downloads once. A LayerScale is folded into the
    projections, a distillation token dropped; pos_embed and the patch convolution are resized bicubically.
    Raises ValueError, naming the file, where it cannot be read or downloaded, where a parameter has another shape
    (named) or is not finite, and where nothing of the backbone matches.
    """
    content = read_weights(path)
    state, converted = to_own_names(content, path)
    grid = None
    with contextlib.suppress(*MISFITS):  # a checkpoint of this project says its grid, which need not be square
        height, width = two_sides(content["config"]["img_size"])
        grid = height // content["config"]["patch_size"], width // content["config"]["patch_size"]
    return load_backbone(model, state, path, converted, grid)


# ---------------------------------------------------------------- weights: whole models

MODEL_FLAGS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "drop_path", "head", "num_kernels",
               "kernel_size", "scorer", "erase", "pool")


def load_checkpoint(path: str) -> tuple[LCTR, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint's dict. Raises ValueError naming the file.

    Besides train.py's own, it takes the state dicts of the released LCTR, TS-CAM and DeiT: their sizes are read off the
    shapes, classes are numbered, phase is "foreign", and the released LCTR pools as its code does ("padded").
    """
    checkpoint = read_weights(path)
    if "config" not in checkpoint:
        return load_foreign(checkpoint, str(path))
    missing = [key for key in ("model", "classes", "phase") if key not in checkpoint]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)} in it: need a checkpoint that train.py wrote")
    if checkpoint["phase"] != "main":
        raise ValueError(f"{path}: still in its pretraining phase: let train.py --resume finish it")
    try:
        config = checkpoint["config"]
        model = LCTR(len(checkpoint["classes"]), **{flag: config[flag] for flag in MODEL_FLAGS})
        model.load_state_dict(checkpoint["model"])
    except MISFITS as error:
        raise ValueError(f"{path}: its weights do not fit its own config: {last_line(error)}") from None
    return model.eval(), checkpoint


def load_foreign(content: dict, path: str) -> tuple[LCTR, dict]:
    """load_checkpoint for the authors', TS-CAM's and DeiT's files."""
    state, _ = to_own_names(content, path)
    try:
        config = architecture(state) | {"drop_path": 0.0, "pool": "gap"}
        if "cdm.weight" in state:
            G, C, _, k, _ = state["cdm.weight"].shape
            average, maximum = "cdm.score_avg.weight" in state, "cdm.score_max.weight" in state
            scorer = "separate" if average and maximum else "gap" if average else "gmp"
            config |= {"head": "cdm", "num_kernels": G, "kernel_size": k, "scorer": scorer, "pool": "padded"}
        elif state["head.weight"].ndim == 4:
            C, _, k, _ = state["head.weight"].shape
            config |= {"head": "conv", "kernel_size": k}
        else:
            C = len(state["head.weight"])
            config |= {"head": "token"}
            state |= {"classifier.weight": state["head.weight"], "classifier.bias": state["head.bias"]}
        model = LCTR(C, **config)
        own = model.state_dict()
        model.load_state_dict({key: state[key] for key in own})
    except MISFITS as error:
        raise ValueError(f"{path}: not a checkpoint of train.py, LCTR, TS-CAM or DeiT ({last_line(error)}): "
                         f"looks like {describe(state)}") from None
    classes = [f"class {i}" for i in range(C)]
    return model.eval(), {"model": own, "config": config, "classes": classes, "phase": "foreign", "metrics": {}}


# ---------------------------------------------------------------- python lctr.py [IMAGE] | --export FILE CHECKPOINT


def read_image(path: str, size: tuple[int, int]) -> Tensor:
    """A picture, upright and resized to (H, W) -> (1, 3, H, W), ImageNet-normalised. Raises ValueError naming it."""
    try:
        with Image.open(path) as picture:
            pixels = ImageOps.exif_transpose(picture).convert("RGB").resize(size[::-1], Image.BILINEAR)
    except Exception as error:  # a broken file's errors are of many kinds
        raise ValueError(f"{path}: not a picture that can be read ({last_line(error)})") from None
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255  # (H, W, 3) -> (3, H, W)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)  # ImageNet's
    return ((image - mean) / std)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints each step of LCTR on one image, or exports a checkpoint.")
    parser.add_argument("image", nargs="?", help="picture to localise in (default: random noise)")
    parser.add_argument("--checkpoint", help="model to use (default: a small one with random weights)")
    parser.add_argument("--export", nargs=2, metavar=("FILE", "CHECKPOINT"),
                        help="write CHECKPOINT's backbone (and token head) to FILE as a state dict in timm's names")
    flags = parser.parse_args()
    try:
        if flags.export:
            path, source = flags.export
            model, _ = load_checkpoint(source)
            state = {key.replace("classifier.", "head."): value for key, value in model.state_dict().items()
                     if not key.startswith(("cdm.", "head."))}
            torch.save(state, f"{path}.partial")
            os.replace(f"{path}.partial", path)
            height, width = model.img_size
            print(f"{path}: {len(state)} parameters, {describe(state)}, input {height} x {width}")
            return
        torch.manual_seed(0)
        model = load_checkpoint(flags.checkpoint)[0] if flags.checkpoint else LCTR(10, 64, 8, 96, 4, 3).eval()
        images = read_image(flags.image, model.img_size) if flags.image else torch.randn(1, 3, *model.img_size)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"lctr.py: error: {last_line(error)}")
    for equation, name, symbols, value in trace(model, images):
        shape = str(tuple(value.shape))
        print(f"{equation:6} {name:37} {symbols:17} {shape:19} {value.min():9.3g} to {value.max():.3g}")


if __name__ == "__main__":
    main()
