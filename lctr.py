"""LCTR: Local Continuity Transformer for weakly supervised object localisation (Chen et al., AAAI 2022), in one file.

Reading order is the paper's: tokens (Eq. 1), attention and its two maps (Eq. 4, RPAM, Eq. 5), the cue digging module
(Eq. 6), the localisation map (Eq. 3), and last how weights are loaded. Shapes are written with the paper's symbols:

    B images    h x w = N patches (row-major), N+1 tokens with the class token first
    D embed_dim    S num_heads    L depth    C classes    G kernels of size k x k    K asked classes

Whatever costs time goes through `kernels`: Triton on CUDA, torch elsewhere, each beside a naive twin.
"""

import argparse
import json
import math
import operator
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
    """What one block's attention tells; None where it was not asked for."""

    cls: Tensor  # M_l^c (B, N+1): the class token's row of A_l, head mean
    relation: Tensor | None  # M_l^r (B, N): all rows of A_l's patch columns, weighted by M_l^c, head and row mean
    full: Tensor | None  # A_l (B, S, N+1, N+1)


class PatchEmbed(nn.Module):
    """Cuts images into P x P patches and projects each linearly: F(x_p) of Eq. 1."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, D, h, w) -> (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention that returns its maps as data."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, attention: str) -> tuple[Tensor, AttentionMaps]:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, S, N+1, D/S)
        if attention == "full":
            attn = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)  # Eq. 4: A_l (B, S, N+1, N+1)
            out = attn @ v
            maps = AttentionMaps(*kernels.aggregate_attention(attn), attn)
        else:
            out, cls_attn, relation = kernels.attention(q, k, v, relation=attention == "relation")
            maps = AttentionMaps(cls_attn, relation, None)
        return self.proj(out.transpose(1, 2).reshape(B, T, D)), maps


class Mlp(nn.Module):
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
        x = x + (update if keep is None else update * keep[:, 0, None, None])
        update = self.mlp(self.norm2(x))
        return x + (update if keep is None else update * keep[:, 1, None, None]), maps


class VisionTransformer(nn.Module):
    """A ViT / DeiT whose blocks return their attention. Parameter names are timm's.

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

        attention: "cls" gives M^c alone; "relation" M^c and M^r for inference, never holding A; "full" A and both maps.
        depth_noise: uniform numbers (B, L, 2) that decide which residual branches stochastic depth drops in training;
        drawn here where not given. Raises ValueError for images of another size.
        """
        if images.shape[1:] != (3, *self.img_size):
            raise ValueError("images: got shape %s, need (B, 3, %d, %d)" % (tuple(images.shape), *self.img_size))
        if attention not in ("cls", "relation", "full"):
            raise ValueError(f'attention: got {attention!r}, need "cls", "relation" or "full"')
        B = len(images)
        x = torch.cat([self.cls_token.expand(B, -1, -1), self.patch_embed(images)], 1)  # (B, N+1, D)
        x = x + self.pos_embed  # Eq. 1: X_1 (B, N+1, D)
        keep = self.stochastic_depth(B, depth_noise)  # (B, L, 2) or None
        maps = []
        for i, block in enumerate(self.blocks):
            x, block_maps = block(x, attention, None if keep is None else keep[:, i])
            maps.append(block_maps)
        return self.norm(x), maps

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
    """Cue digging module: G kernels mixed by how much each image's un-attended features call for them (Eq. 6).

    scorer (Table 5): which pool of the cues feeds which linear layer. "gap", "gmp": that pool alone; "shared": one
    layer on their sum; "separate", the paper's: a layer for each, added.
    erase: "raw" reverses M~c as it is (about 1/N, so little is erased); "minmax" stretches it to [0, 1] per image.
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

    def forward(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """features X_L (B, D, h, w), cls_map M~c (B, h, w) -> scores S_g (B, G) in (0, 1)."""
        if self.erase == "minmax":
            low, high = cls_map.amin((1, 2), True), cls_map.amax((1, 2), True)  # (B, 1, 1)
            cls_map = (cls_map - low) / (high - low).clamp_min(torch.finfo(cls_map.dtype).tiny)
        cues = self.conv(features * (1 - cls_map)[:, None])  # X~_L (B, D, h, w)
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
    first, as the released code does. num_kernels: Table 6; kernel_size, 1 or 3: Table 7; scorer, erase: see CDM.
    Raises ValueError for a switch that does not exist or sizes that do not divide.
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
        return self.classify(tokens, self.on_grid(mean_over_blocks(maps, "cls")[:, 1:]))[0]

    def classify(self, tokens: Tensor, cls_map: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """X_L (B, N+1, D), M~c (B, h, w) -> logits (B, C) and the operands of Eq. 6, None for a token head."""
        if self.head_type == "token":
            return self.classifier(tokens[:, 0]), None
        features = self.on_grid(tokens[:, 1:])  # (B, D, h, w)
        if self.head_type == "cdm":
            operands = features, self.cdm(features, cls_map), self.cdm.weight, self.cdm.bias
        else:  # a static convolution is Eq. 6 with one kernel, scored 1
            operands = features, features.new_ones(len(features), 1), self.head.weight[None], self.head.bias
        return kernels.dynamic_conv_logits(*operands, self.pool), operands

    @torch.no_grad()
    def localize(self, images: Tensor, classes: Tensor | str | None = None) -> Localization:
        """images (B, 3, H, W) -> logits and the maps that localise (the paper's "During testing").

        classes: (B, K) ids of the classes whose maps are computed, -1 for the predicted class; None for the predicted
        class alone, K = 1; "all" for all C.
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
            classes = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        else:
            classes = torch.where(classes < 0, predicted, classes)
        if operands is None:
            class_maps = None
        elif every_class:
            class_maps = kernels.dynamic_conv2d(*operands)
        else:
            class_maps = kernels.class_maps(*operands, classes)
        return Localization(logits, classes, class_maps, cls_map, relation_map)

    def on_grid(self, patches: Tensor) -> Tensor:
        """(B, N) -> (B, h, w) or (B, N, D) -> (B, D, h, w), as views."""
        return patches.unflatten(1, self.grid) if patches.ndim == 2 else patches.mT.unflatten(2, self.grid)


def mean_over_blocks(maps: list[AttentionMaps], name: str) -> Tensor:
    """(1/L) sum_l M_l of Eq. 5, for M^c ("cls") or M^r ("relation")."""
    return torch.stack([getattr(block, name) for block in maps]).mean(0)


def fuse(localization: Localization, coupling: str = "relation") -> Tensor:
    """Localisation maps (B, K, h, w) of localize()'s K classes, before resizing and thresholds.

    "relation": ReLU(class map) * M^r, LCTR's Eq. 3. "cls": ReLU(class map) * M~c, TS-CAM's. "none": ReLU(class map),
    CAM's. "relation-only", "cls-only": the attention map alone, the same for every class.
    Raises ValueError for another coupling, and where a "token" head has no class maps.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling: got {coupling!r}, need one of {', '.join(COUPLINGS)}")
    B, K = localization.classes.shape
    attention_map = localization.relation_map if coupling.startswith("relation") else localization.cls_map
    if coupling.endswith("-only"):
        return attention_map[:, None].expand(B, K, -1, -1)
    if localization.class_maps is None:
        raise ValueError(f'coupling: got {coupling!r}, a "token" head has no class maps: '
                         'need "cls-only" or "relation-only"')
    class_maps = localization.class_maps.relu()
    return class_maps if coupling == "none" else class_maps * attention_map[:, None]  # Eq. 3: M^fuse


# ---------------------------------------------------------------- weights from files

DEIT_FILES = {  # torch.hub checks the hash that the name carries
    name: f"https://dl.fbaipublicfiles.com/deit/{name}_patch16_224-{digest}.pth"
    for name, digest in (("deit_tiny", "a1311bcf"), ("deit_small", "cd65a155"), ("deit_base", "b5f2ef4d"))
}
AUTHORS_NAMES = {  # the released LCTR code's -> ours
    "conv3x3.": "cdm.conv.",
    "CDM._routing_fn_two.fc.": "cdm.score_avg.",
    "CDM._routing_fn_two.fc2.": "cdm.score_max.",
    "CDM.": "cdm.",
}
HEADS = ("cdm.", "head.", "classifier.")
MODEL_FLAGS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "drop_path", "head", "num_kernels",
               "kernel_size", "scorer", "erase", "pool")


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


def load_pretrained(model: VisionTransformer, path: str) -> LoadReport:
    """Loads a backbone from a file of weights, in any float dtype; heads stay new.

    path: a .safetensors or torch file of a timm ViT or DeiT (distilled ones too), DINOv2, TS-CAM, the released LCTR or
    this project, or deit_tiny, deit_small, deit_base, which torch.hub downloads once. A LayerScale is folded into the
    projections, a distillation token dropped; pos_embed and the patch convolution are resized bicubically.
    Raises ValueError, naming the file, where it cannot be read or downloaded, where a parameter has another shape
    (named) or is not finite, and where nothing of the backbone matches.
    """
    content = read_weights(path)
    state, converted = to_own_names(content.get("model", content.get("state_dict", content)), path)
    config = content.get("config")
    grid = None
    if isinstance(config, dict) and "img_size" in config:  # this project's: the grid need not be square
        grid = tuple(side // config["patch_size"] for side in two_sides(config["img_size"]))
    return load_backbone(model, state, path, converted, grid)


def load_backbone(
    model: VisionTransformer, state: dict[str, Tensor], source: str, converted: Sequence[str] = (),
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """load_pretrained of a state dict in this project's names, which errors call `source`; grid: its (h, w)."""
    own = model.state_dict()
    backbone = [key for key in own if not key.startswith(HEADS)]
    new, ignored = ([key for key in keys if key not in backbone] for keys in (own, state))
    report = LoadReport([], [], [], new, ignored)
    if not set(backbone) & set(state):
        raise ValueError(f"{source}: no parameter of a ViT's backbone (cls_token, blocks.0.attn.qkv.weight, ...) in it: "
                         f"looks like {describe(state)}")
    update = {}
    for key in backbone:
        if key not in state:
            report.new.append(key)
            continue
        value = state[key].float()
        need = own[key].shape
        if key == "pos_embed" and value.shape != need:
            value = resize_pos_embed(value, grid, model.grid)
        elif key == "patch_embed.proj.weight" and value.ndim == 4 and value.shape[:2] == need[:2]:
            value = resize_patches(value, need[-1])
        if value.shape != need:
            raise ValueError(f"{source}: {key}: found shape {tuple(state[key].shape)}, need {tuple(need)}: "
                             f"looks like {describe(state)}")
        if value.shape != state[key].shape:
            report.resized.append(key)
        else:
            (report.converted if key in converted else report.loaded).append(key)
        update[key] = value
    model.load_state_dict(update, strict=False)
    return report


def to_own_names(state: dict, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """A foreign state dict in this project's names and conventions, and which of its parameters that changed."""
    if not isinstance(state, dict):
        raise ValueError(f"{source}: found a {type(state).__name__}, need a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.isfinite().all():
            raise ValueError(f"{source}: {key}: need a tensor of finite numbers")
    own, converted = {}, []
    for key, value in state.items():
        key = key.removeprefix("module.")  # nn.DataParallel's
        for foreign, name in AUTHORS_NAMES.items():
            if key.startswith(foreign):
                key = name + key.removeprefix(foreign)
                converted.append(key)
                break
        own[key] = value
    if "dist_token" in own and own.get("pos_embed", value).ndim == 3:  # its place is after the class token's
        own["pos_embed"] = torch.cat([own["pos_embed"][:, :1], own["pos_embed"][:, 2:]], 1)
        converted.append("pos_embed")
    for key in [key for key in own if key.endswith((".ls1.gamma", ".ls2.gamma"))]:  # x + gamma * (W x + b)
        gamma = own.pop(key).float()
        linear = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        for name, scale in ((f"{linear}.weight", gamma[:, None]), (f"{linear}.bias", gamma)):
            own[name] = own[name].float() * scale
            converted.append(name)
    return own, converted


def resize_pos_embed(pos_embed: Tensor, source: tuple[int, int] | None, grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of the patch part of (1, 1 + h'*w', D) from grid (h', w') to (h, w) -> (1, 1 + h*w, D)."""
    if source is None:
        source = (math.isqrt(pos_embed.shape[1] - 1),) * 2
    if pos_embed.ndim != 3 or source[0] * source[1] != pos_embed.shape[1] - 1:
        return pos_embed
    patches = pos_embed[:, 1:].mT.unflatten(2, source)  # (1, D, h', w')
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False)  # (1, D, h, w)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT], 1)


def resize_patches(weight: Tensor, size: int) -> Tensor:
    """Bicubic resize of the patch convolution (D, 3, P', P') to P x P, scaled: a plain patch keeps its embedding."""
    if weight.shape[-1] == size:
        return weight
    return F.interpolate(weight, (size, size), mode="bicubic", align_corners=False) * (weight.shape[-1] / size) ** 2


def describe(state: dict) -> str:
    """What a state dict looks like, in a few words."""
    for key, name in (("relative_position_bias_table", "a Swin transformer"), ("layer1.0.conv1", "a ResNet"),
                      ("features.0.weight", "a VGG"), ("stages.0", "a ConvNeXt")):
        if any(key in own for own in state):
            return name
    try:
        a = architecture(state)
    except (KeyError, IndexError, AttributeError):
        return f"none of ours ({', '.join(map(str, list(state)[:3])) or 'empty'}{', ...' if len(state) > 3 else ''})"
    known = [name for name, sizes in ARCHITECTURES.items() if sizes == (a["embed_dim"], a["depth"], a["num_heads"])]
    return (f"a ViT of width {a['embed_dim']}, {a['depth']} blocks, patch {a['patch_size']}"
            + "".join(f" (--arch {name})" for name in known))


def architecture(state: dict[str, Tensor]) -> dict:
    """LCTR's sizes, read off the shapes of a ViT's parameters; heads are 64 wide, as in every DeiT."""
    embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
    return dict(
        patch_size=patch_size, embed_dim=embed_dim, num_heads=max(1, embed_dim // 64),
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        img_size=patch_size * math.isqrt(state["pos_embed"].shape[1] - 1),
    )


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
    """The state dict of an official DeiT file, from torch.hub's cache where it lies there."""
    url, folder = DEIT_FILES[name], os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no disk; a wrong hash
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: cannot download {url} ({reason}): put that file into {folder}, "
                         "or give the path of one") from None


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                      "BOOL": torch.bool}


def read_safetensors(path: str) -> dict[str, Tensor]:
    """A .safetensors file: its header's length (8 bytes, little-endian), a JSON header, raw tensors; else ValueError."""
    with open(path, "rb") as file:
        content = bytearray(file.read())
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        raise ValueError(f"its header claims {length} bytes, the file has {len(content)}")
    try:
        header = json.loads(content[8:8 + length])
        header.pop("__metadata__", None)
        entries = [(key, SAFETENSORS_DTYPES[entry["dtype"]], [operator.index(n) for n in entry["shape"]],
                    *(operator.index(n) for n in entry["data_offsets"])) for key, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not a safetensors header ({type(error).__name__}: {error})") from None
    data, tensors = memoryview(content)[8 + length:], {}
    for key, dtype, shape, start, end in entries:
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or not 0 <= start <= end <= len(data) or end - start != size:
            raise ValueError(f"{key}: {dtype} of shape {shape} does not fit bytes {start} to {end} of {len(data)}")
        raw = torch.frombuffer(data[start:end], dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        tensors[key] = raw.clone().view(dtype).view(shape)  # clone: offsets need not be aligned
    return tensors


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
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path}: its weights do not fit its own config: {reason}") from None
    return model.eval(), checkpoint


def load_foreign(content: dict, path: str) -> tuple[LCTR, dict]:
    """load_checkpoint for the authors', TS-CAM's and DeiT's files."""
    state, _ = to_own_names(content.get("model", content.get("state_dict", content)), path)
    try:
        config = architecture(state) | {"drop_path": 0.0, "pool": "gap"}
        if "cdm.weight" in state:
            G, C, _, k, _ = state["cdm.weight"].shape
            scorer = {(True, True): "separate", (True, False): "gap"}.get(
                ("cdm.score_avg.weight" in state, "cdm.score_max.weight" in state), "gmp")
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
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path}: not a checkpoint of train.py, LCTR, TS-CAM or DeiT ({reason}): "
                         f"looks like {describe(state)}") from None
    classes = [f"class {i}" for i in range(C)]
    return model.eval(), {"model": own, "config": config, "classes": classes, "phase": "foreign", "metrics": {}}


# ---------------------------------------------------------------- python lctr.py [IMAGE] | --export FILE CHECKPOINT


def trace(model: LCTR, images: Tensor) -> list[tuple[str, str, Tensor]]:
    """Every intermediate of localize() on images (B, 3, H, W), in the paper's order: (equation, name, value)."""
    steps = [("", "images", images)]
    with torch.no_grad():
        tokens, maps = model.forward_features(images, "full")
        steps += [("Eq. 4", "A_L, last block's attention", maps[-1].full),
                  ("RPAM", "M_L^c, its class row", maps[-1].cls),
                  ("RPAM", "M_L^r, its patch relation", maps[-1].relation), ("", "X_L, tokens", tokens)]
        found = model.localize(images)
        steps += [("CDM", "M~_*^c, class attention map", found.cls_map),
                  ("Eq. 5", "M_*^r, patch relation map", found.relation_map)]
        if model.head_type == "cdm":
            scores = model.cdm(model.on_grid(tokens[:, 1:]), found.cls_map)
            steps += [("CDM", "S_g, scores", scores), ("Eq. 6", "W_g, kernels", model.cdm.weight)]
        steps += [("Eq. 2", "logits", found.logits)]
        if found.class_maps is not None:
            steps += [("Eq. 6", "M_CDM, predicted class's map", found.class_maps), ("Eq. 3", "M^fuse", fuse(found))]
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints every intermediate of LCTR on one image, or exports a checkpoint.")
    parser.add_argument("image", nargs="?", help="picture to localise in (default: random noise)")
    parser.add_argument("--checkpoint", help="model to use (default: a small one with random weights)")
    parser.add_argument("--export", nargs=2, metavar=("FILE", "CHECKPOINT"),
                        help="write CHECKPOINT's backbone (and token head) to FILE as a plain state dict in timm's names")
    flags = parser.parse_args()
    try:
        if flags.export:
            path, source = flags.export
            model, _ = load_checkpoint(source)
            state = {key.replace("classifier.", "head."): value for key, value in model.state_dict().items()
                     if not key.startswith(("cdm.", "head."))}
            torch.save(state, f"{path}.partial")
            os.replace(f"{path}.partial", path)
            print(f"{path}: {len(state)} parameters, {describe(state)}, input {model.img_size[0]} x {model.img_size[1]}")
            return
        torch.manual_seed(0)
        model = load_checkpoint(flags.checkpoint)[0] if flags.checkpoint else LCTR(10, 64, 8, 96, 4, 3).eval()
        images = torch.randn(1, 3, *model.img_size)
        if flags.image:
            with Image.open(flags.image) as picture:
                pixels = ImageOps.exif_transpose(picture).convert("RGB").resize(model.img_size[::-1], Image.BILINEAR)
            images = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
            mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)  # ImageNet's
            images = (images - mean) / std
    except (ValueError, OSError) as error:
        sys.exit(f"lctr.py: error: {error}")
    for equation, name, value in trace(model, images):
        print(f"{equation:6} {name:30} {str(tuple(value.shape)):20} {value.min():10.3g} to {value.max():.3g}")


if __name__ == "__main__":
    main()
