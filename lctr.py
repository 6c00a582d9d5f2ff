"""LCTR: Local Continuity Transformer for weakly supervised object localisation (AAAI 2022).

The whole model. Each part stands before what uses it: RPAM (Fig. 3), attention (Eq. 4), the
transformer (Eq. 1), the class maps (Eq. 6), the cue digging module, the localisation map (Eq. 3),
and LCTR, which puts them together (Eq. 2, Eq. 5). At the end `trace` walks through all of it, one
equation a line; `python lctr.py [IMAGE] [--checkpoint FILE]` prints what it yields.

    symbol        in code          shape             meaning
    B, C, K       num_classes                        images, classes, requested classes
    H x W         img_size                           pixels of an image
    h x w         grid                               its patches; N = h * w, row-major
    N, T                                             patches; T = N+1 tokens, the class token first
    P, D, L       patch_size, embed_dim, depth       side of a patch, width, blocks
    S, d          num_heads                          attention heads, each d = D / S wide
    G, k          num_kernels, kernel_size           convolution kernels of k x k
    X_l           x                (B, N+1, D)       tokens that enter block l
    A_l           attn             (B, S, N+1, N+1)  attention of block l
    M_l^c         cls_attn         (B, N+1)          the class token's row of A_l, mean over heads
    M_l^r         relation         (B, N)            all rows of A_l, weighted by M_l^c
    M~_*^c        cls_map          (B, h, w)         mean of the M_l^c, patches alone
    M_*^r         relation_map     (B, h, w)         mean of the M_l^r (Eq. 5)
    X_L           features         (B, D, h, w)      patches after the last block and the norm
    X~_L          cues             (B, D, h, w)      what is left where M~_*^c is erased
    S_g           scores           (B, G)            weights of the convolution kernels
    W_g^e         weight           (G, C, D, k, k)   the convolution kernels
    X_CDM         class_maps       (B, C, h, w)      Eq. 6, where the paper calls it X_SGR
    M_CDM         class_maps       (B, K, h, w)      X_CDM at the requested classes

`rpam` and `dynamic_conv2d` are the paper's definitions. Training and localisation call their fused
equals in `kernels` (Triton on CUDA, torch elsewhere), which never hold A_l or a kernel per image.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

ARCHITECTURES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # D, L, S
COUPLINGS = ("none", "cls", "relation", "cls-only", "relation-only")
CHOICES = {
    "head": ("cdm", "conv", "token"),
    "kernel_size": (1, 3),
    "scorer": ("separate", "shared", "gap", "gmp"),
    "erase": ("raw", "minmax"),
    "pool": ("gap", "padded"),
}
MODEL_FLAGS = (  # what a checkpoint's config says of its model
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "drop_path", "head", "num_kernels",
    "kernel_size", "scorer", "erase", "pool")


# ---------------------------------------------------------------- RPAM and attention

class AttentionMaps(NamedTuple):
    """What RPAM reads off one block's attention; None where it was not requested."""

    cls: Tensor  # M_l^c (B, N+1)
    relation: Tensor | None  # M_l^r (B, N)
    full: Tensor | None  # A_l (B, S, N+1, N+1)


def rpam(attn: Tensor) -> tuple[Tensor, Tensor]:
    """RPAM (Fig. 3): A_l (B, S, N+1, N+1) -> M_l^c (B, N+1), M_l^r (B, N)."""
    mean = attn.mean(1)  # A'_l (B, N+1, N+1): over the heads
    cls_attn = mean[:, 0]  # M_l^c (B, N+1): how much the class token attends to each token
    patch_attn = mean[:, :, 1:]  # M_l^p (B, N+1, N): how much each token attends to each patch
    weighted = cls_attn[:, :, None] * patch_attn  # M_l^h (B, N+1, N): (B, N+1, 1) times row by row
    return cls_attn, weighted.mean(1)  # M_l^r (B, N): over all N+1 rows


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 4) that returns its maps as data."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, attention: str) -> tuple[Tensor, AttentionMaps]:
        """x (B, N+1, D) -> the same shape, and maps; attention: see forward_features."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N+1, 3, S, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, S, N+1, d)
        if attention == "full":
            logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, S, N+1, N+1)
            attn = logits.softmax(-1)  # Eq. 4: A_l (B, S, N+1, N+1)
            out = attn @ v  # (B, S, N+1, d)
            maps = AttentionMaps(*rpam(attn), attn)
        else:  # the same without holding A_l
            out, cls_attn, relation = kernels.attention(q, k, v, relation=attention == "relation")
            maps = AttentionMaps(cls_attn, relation, None)
        return self.proj(out.transpose(1, 2).flatten(2)), maps  # (B, N+1, S, d) -> (B, N+1, D)


# ---------------------------------------------------------------- the transformer

class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        hidden = int(embed_dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(  # of each token alone; the GELU is exact
            fc1=nn.Linear(embed_dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, embed_dim)))

    def forward(self, x: Tensor, attention: str, scale: Tensor | None) -> tuple:
        """x (B, N+1, D) -> the same shape, and AttentionMaps; scale (B, 2): stochastic_depth's."""
        update, maps = self.attn(self.norm1(x), attention)
        x = x + (update if scale is None else scale[:, 0, None, None] * update)  # (B, 1, 1) times
        update = self.mlp(self.norm2(x))
        x = x + (update if scale is None else scale[:, 1, None, None] * update)
        return x, maps


def stochastic_depth(noise: Tensor, drop_path: float) -> Tensor:
    """What multiplies the two residual branches of each block; noise, result: (B, L, 2).

    A branch of block l is left out (times 0) with probability p_l, which grows linearly from 0 in
    the first block to drop_path in the last. Where it stays, it is multiplied by 1 / (1 - p_l), so
    that its mean is what it is at inference. noise is uniform in [0, 1).
    """
    rates = torch.linspace(0, drop_path, noise.shape[1], dtype=noise.dtype, device=noise.device)
    rates = rates[:, None]  # p_l (L, 1)
    return (noise >= rates) / (1 - rates)


class VisionTransformer(nn.Module):
    """A ViT / DeiT whose blocks return their attention maps. Parameters have timm's names.

    img_size: int or (height, width) in pixels, multiples of patch_size. drop_path: the rate of
    stochastic depth in the last block. Raises ValueError for sizes that do not divide.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int = 16,
                 embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
                 mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if any(side % patch_size or side < 1 for side in self.img_size):
            raise ValueError(f"img_size: got {img_size}, need multiples of patch_size {patch_size}")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, need a divisor of embed_dim {embed_dim}")
        self.grid = tuple(side // patch_size for side in self.img_size)  # (h, w)
        self.num_heads = num_heads
        self.drop_path = drop_path
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: images (B, 3, H, W) -> X_1 = [x_cls; F(x_p^1); ...; F(x_p^N)] + P (B, N+1, D)."""
        patches = self.patch_embed(images)  # F: each P x P patch projected linearly (B, D, h, w)
        patches = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)  # (1, 1, D) -> (B, 1, D)
        return torch.cat([cls_token, patches], 1) + self.pos_embed

    def forward_features(
        self, images: Tensor, attention: str = "cls", depth_noise: Tensor | None = None
    ) -> tuple[Tensor, list[AttentionMaps]]:
        """Normalised images (B, 3, H, W) -> X_L with the class token (B, N+1, D), maps of L blocks.

        The tokens come after the final norm. attention: "cls" gives M_l^c alone; "relation" M_l^c
        and M_l^r, at inference, A_l never held; "full" all three, by the lines above. depth_noise
        (B, L, 2): of stochastic depth in training, drawn here where None. Raises ValueError for
        another size or attention, or for images that are not floating point.
        """
        if images.shape[1:] != (3, *self.img_size):
            need = f"(B, 3, {self.img_size[0]}, {self.img_size[1]})"
            raise ValueError(f"images: got shape {tuple(images.shape)}, need {need}")
        if not images.is_floating_point():
            need = "floating point, normalised: data.normalise(images)"
            raise ValueError(f"images: got {images.dtype}, need {need}")
        if attention not in ("cls", "relation", "full"):
            raise ValueError(f'attention: got {attention!r}, need "cls", "relation" or "full"')

        scales = [None] * len(self.blocks)
        if self.training and self.drop_path > 0:
            if depth_noise is None:
                depth_noise = torch.rand(len(images), len(self.blocks), 2, device=images.device)
            depth_noise = depth_noise.to(self.pos_embed.dtype)
            scales = stochastic_depth(depth_noise, self.drop_path).unbind(1)  # L of (B, 2)

        x = self.embed(images)  # Eq. 1: X_1 (B, N+1, D)
        maps = []
        for block, scale in zip(self.blocks, scales):
            x, block_maps = block(x, attention, scale)
            maps.append(block_maps)
        return self.norm(x), maps


# ---------------------------------------------------------------- class maps: Eq. 6

def dynamic_conv2d(features: Tensor, scores: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6: X_SGR = X_L * sum_g S_g W_g^e, each image convolved with a kernel of its own.

    X_L (B, D, h, w), S_g (B, G), W_g^e (G, C, D, k, k), bias (C) -> (B, C, h, w). No score weights
    the bias. Zero padding keeps the size.
    """
    mixed = torch.einsum("bg,gcduv->bcduv", scores, weight)  # sum_g S_g W_g^e (B, C, D, k, k)
    padding = weight.shape[-1] // 2
    maps = [F.conv2d(image, kernel, bias, padding=padding)  # (D, h, w) -> (C, h, w)
            for image, kernel in zip(features, mixed)]
    return torch.stack(maps)


class ConvHead(nn.Module):
    """What the CDM and the static head share: Eq. 6 and the average that Eq. 2 needs of it."""

    def logits(self, features: Tensor, scores: Tensor) -> Tensor:
        """The average of X_CDM over its positions (B, C), without X_CDM: both are linear."""
        return kernels.dynamic_conv_logits(
            features, scores, self.conv_kernels(), self.bias, self.pool)

    def class_maps(self, features: Tensor, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """X_CDM (B, C, h, w), or M_CDM (B, K, h, w) at the requested classes (B, K) alone."""
        if classes is None:  # dynamic_conv2d, fused
            return kernels.dynamic_conv2d(features, scores, self.conv_kernels(), self.bias)
        return kernels.class_maps(features, scores, self.conv_kernels(), self.bias, classes)


class StaticHead(ConvHead):
    """TS-CAM's head, one convolution for all images: Eq. 6 with G = 1 and S_1 = 1."""

    def __init__(self, embed_dim: int, num_classes: int, kernel_size: int, pool: str):
        super().__init__()
        self.pool = pool
        k = kernel_size
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim, k, k))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def conv_kernels(self) -> Tensor:
        return self.weight[None]  # (1, C, D, k, k)

    def scores(self, features: Tensor, cls_map: Tensor) -> Tensor:
        return features.new_ones(features.shape[0], 1)  # (B, 1)


class CDM(ConvHead):
    """Cue digging module: the image's kernel is a mixture of G, weighted by scores of its cues.

    The cues are what is left of X_L where the class token attends little. scorer (Table 5): which
    pool of the cues feeds which linear layer. "gap", "gmp": that pool alone; "shared": one layer on
    their sum; "separate", the paper's: a layer for each, added. erase: "raw" reverses M~_*^c as it
    is (about 1/N, so little is erased); "minmax" normalises it to [0, 1] first. pool: see LCTR.
    """

    def __init__(self, embed_dim: int, num_classes: int, num_kernels: int, kernel_size: int,
                 scorer: str, erase: str, pool: str):
        super().__init__()
        self.scorer, self.erase, self.pool = scorer, erase, pool
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        if scorer != "gmp":
            self.score_avg = nn.Linear(embed_dim, num_kernels)
        if scorer in ("gmp", "separate"):
            self.score_max = nn.Linear(embed_dim, num_kernels)
        k = kernel_size
        self.weight = nn.Parameter(torch.empty(num_kernels, num_classes, embed_dim, k, k))  # W_g^e
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.last_scores = None  # S_g (B, G) of the last batch in training, for its log
        # Scores start at .5 and learn slowly (train.py's GATE_RATE). AdamW moves every weight of a
        # score layer alike, and GMP is positive in all D channels: at the full rate all kernels
        # are turned off within ten steps, and a sigmoid at 0 passes no gradient back.
        for name, parameter in self.named_parameters():
            if name.startswith("score_") or name == "conv.bias":
                nn.init.zeros_(parameter)
        rows = self.weight.flatten(0, 1)  # (G*C, D, k, k), whose fan-in is D * k * k
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))

    def _apply(self, fn, recurse=True):
        """What .to() calls: torch.channels_last is of 4-D weights, so W_g^e is shown as one."""
        def of_rows(t: Tensor) -> Tensor:
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.ndim == 5 else fn(t)
        return super()._apply(of_rows, recurse)

    def conv_kernels(self) -> Tensor:
        return self.weight

    def reverse(self, cls_map: Tensor) -> Tensor:
        """M~_*^c (B, h, w) -> 1 - M~_*^c (B, h, w), which erases what is attended to."""
        if self.erase == "minmax":
            low, high = cls_map.amin((1, 2), True), cls_map.amax((1, 2), True)  # (B, 1, 1)
            cls_map = (cls_map - low) / torch.where(high > low, high - low, 1)
        return 1 - cls_map

    def cues(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> X~_L (B, D, h, w)."""
        erased = features * self.reverse(cls_map)[:, None]  # times (B, 1, h, w)
        return self.conv(erased.to(features.dtype))

    def scores(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> S_g (B, G) in (0, 1)."""
        cues = self.cues(features, cls_map)  # X~_L (B, D, h, w)
        gap, gmp = cues.mean((2, 3)), cues.amax((2, 3))  # (B, D)
        if self.scorer == "gap":
            logits = self.score_avg(gap)
        elif self.scorer == "gmp":
            logits = self.score_max(gmp)
        elif self.scorer == "shared":
            logits = self.score_avg(gap + gmp)
        else:
            logits = self.score_avg(gap) + self.score_max(gmp)
        scores = logits.sigmoid()
        if self.training:
            self.last_scores = scores.detach()
        return scores


# ---------------------------------------------------------------- the localisation map: Eq. 3

class Localization(NamedTuple):
    """What LCTR.localize returns; fuse() makes the localisation map of it."""

    logits: Tensor  # (B, C)
    classes: Tensor  # (B, K): the class ids that the maps belong to
    class_maps: Tensor | None  # M_CDM (B, K, h, w), before any ReLU; None on a "token" head
    cls_map: Tensor  # M~_*^c (B, h, w)
    relation_map: Tensor  # M_*^r (B, h, w)


def fuse(localization: Localization, coupling: str = "relation", relu: bool = True) -> Tensor:
    """Localisation maps (B, K, h, w) of the K classes, before resizing and thresholds.

    coupling says which maps are multiplied: "relation" is ReLU(M_CDM) * M_*^r, Eq. 3; "cls"
    ReLU(M_CDM) * M~_*^c; "none" ReLU(M_CDM) alone. On a "cdm" head these are LCTR, CDM and its
    class map; on a "conv" head TS-CAM + RPAM, TS-CAM and CAM. "relation-only", "cls-only": that
    attention map alone, the same for every class. relu=False leaves the class map signed, as
    TS-CAM's own code does. Raises ValueError for another coupling, or where a "token" head has no
    class maps.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling: got {coupling!r}, need one of {', '.join(COUPLINGS)}")
    attention_map = localization.cls_map if "cls" in coupling else localization.relation_map
    attention_map = attention_map[:, None]  # (B, 1, h, w)
    if coupling.endswith("-only"):
        return attention_map.expand(-1, localization.classes.shape[1], -1, -1)  # (B, K, h, w)
    if localization.class_maps is None:
        need = 'a "token" head has no class maps: need "cls-only" or "relation-only"'
        raise ValueError(f"coupling: got {coupling!r}, {need}")
    class_maps = localization.class_maps.relu() if relu else localization.class_maps  # (B, K, h, w)
    return class_maps if coupling == "none" else class_maps * attention_map  # Eq. 3: M^fuse


# ---------------------------------------------------------------- LCTR

def mean_over_blocks(maps: list[AttentionMaps], name: str) -> Tensor:
    """(1/L) sum_l M_l of Eq. 5: of M_l^c (B, N+1) for "cls", of M_l^r (B, N) for "relation"."""
    return torch.stack([getattr(block, name) for block in maps]).mean(0)


class LCTR(VisionTransformer):
    """A vision transformer with one of three heads; trained with image labels, it localises.

    head: "cdm" is LCTR; "conv" is the TS-CAM baseline, one static convolution; "token" is plain
    DeiT, a linear layer on the class token, without class maps. pool: "gap" is the paper's;
    "padded" averages class maps over 3 x 3 positions (zeros outside) first, as the authors' code
    does. num_kernels: Table 6; kernel_size, 1 or 3: Table 7; scorer, erase: see CDM.
    Raises ValueError for a choice that does not exist or sizes that do not divide.
    """

    def __init__(self, num_classes: int, img_size: int | tuple[int, int] = 224,
                 patch_size: int = 16, embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
                 mlp_ratio: float = 4.0, drop_path: float = 0.0, head: str = "cdm",
                 num_kernels: int = 4, kernel_size: int = 3, scorer: str = "separate",
                 erase: str = "raw", pool: str = "gap"):
        chosen = dict(head=head, kernel_size=kernel_size, scorer=scorer, erase=erase, pool=pool)
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                need = ", ".join(map(str, CHOICES[name]))
                raise ValueError(f"{name}: got {value!r}, need one of {need}")
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, drop_path)
        self.head_type = head
        if head == "cdm":
            self.cdm = CDM(embed_dim, num_classes, num_kernels, kernel_size, scorer, erase, pool)
        elif head == "conv":
            self.head = StaticHead(embed_dim, num_classes, kernel_size, pool)
        else:
            self.classifier = nn.Linear(embed_dim, num_classes)
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    @property
    def conv_head(self) -> ConvHead | None:
        """The head that has class maps: None for "token"."""
        return getattr(self, "cdm", getattr(self, "head", None))

    def on_grid(self, patches: Tensor) -> Tensor:
        """(B, N) -> (B, h, w), the paper's Gamma; (B, N, D) -> (B, D, h, w). Both are views."""
        patches = patches if patches.ndim == 2 else patches.transpose(1, 2)
        return patches.unflatten(-1, self.grid)

    def classify(self, tokens: Tensor, cls_map: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N+1, D), M~_*^c (B, h, w) -> logits (B, C), S_g (B, G)."""
        if self.conv_head is None:
            return self.classifier(tokens[:, 0]), None  # (B, D) -> (B, C)
        features = self.on_grid(tokens[:, 1:])  # X_L (B, D, h, w)
        scores = self.conv_head.scores(features, cls_map)  # S_g (B, G)
        return self.conv_head.logits(features, scores), scores

    def forward(self, images: Tensor, depth_noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C), Eq. 2's. depth_noise: see forward_features."""
        tokens, maps = self.forward_features(images, "cls", depth_noise)
        cls_map = self.on_grid(mean_over_blocks(maps, "cls")[:, 1:])  # M~_*^c (B, h, w)
        return self.classify(tokens, cls_map)[0]

    def class_maps(
        self, tokens: Tensor, scores: Tensor | None, classes: Tensor | None = None
    ) -> Tensor | None:
        """The head's maps at the requested classes (B, K) -> (B, K, h, w), or at all C."""
        if self.conv_head is None:
            return None
        return self.conv_head.class_maps(self.on_grid(tokens[:, 1:]), scores, classes)

    @torch.no_grad()
    def localize(self, images: Tensor, classes: Tensor | str | None = None) -> Localization:
        """Images (B, 3, H, W) -> logits and the maps that localise (the paper's "During testing").

        classes: (B, K) ids of the classes whose maps are computed, -1 for the predicted class;
        None for the predicted class alone, K = 1; "all" for all C. Raises ValueError for others.
        """
        if isinstance(classes, Tensor):
            if classes.shape[:-1] != images.shape[:1]:
                need = f"({images.shape[0]}, K)"
                raise ValueError(f"classes: got shape {tuple(classes.shape)}, need {need}")
        elif classes not in (None, "all"):
            raise ValueError(f'classes: got {classes!r}, need class ids (B, K), None or "all"')

        tokens, maps = self.forward_features(images, "relation")
        cls_map = self.on_grid(mean_over_blocks(maps, "cls")[:, 1:])  # M~_*^c (B, h, w)
        relation_map = self.on_grid(mean_over_blocks(maps, "relation"))  # Eq. 5: M_*^r (B, h, w)
        logits, scores = self.classify(tokens, cls_map)

        predicted = logits.argmax(1, keepdim=True)  # (B, 1)
        if isinstance(classes, str):
            class_maps = self.class_maps(tokens, scores)  # X_CDM (B, C, h, w)
            classes = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        else:
            if classes is None:
                classes = predicted
            classes = torch.where(classes == -1, predicted, classes)
            class_maps = self.class_maps(tokens, scores, classes)  # M_CDM (B, K, h, w)
        return Localization(logits, classes, class_maps, cls_map, relation_map)


# ---------------------------------------------------------------- weights: support/weights.py

def load_pretrained(model: VisionTransformer, path: str):
    """Loads a backbone from a file of weights; heads stay new. Returns a report to print.

    path: a .safetensors or torch file of a timm ViT, DeiT, DINOv2, TS-CAM, the authors' LCTR or
    this project, or deit_tiny, deit_small, deit_base, which torch.hub downloads once. Raises
    ValueError naming the file.
    """
    from support import weights

    update, report = weights.fit_backbone(
        weights.read_weights(path), model.state_dict(), model.grid, model.num_heads, path)
    model.load_state_dict(update, strict=False)
    return report


def load_checkpoint(path: str) -> tuple[LCTR, dict]:
    """The model of a checkpoint, in eval mode, and its dict. Raises ValueError naming the file.

    Besides train.py's it takes the state dicts of the authors' LCTR, TS-CAM and DeiT.
    """
    from support import weights

    checkpoint = weights.read_checkpoint(path, MODEL_FLAGS)
    return weights.assemble(LCTR, checkpoint, MODEL_FLAGS, path).eval(), checkpoint


# ---------------------------------------------------------------- every step, spelt out

@torch.no_grad()
def trace(model: LCTR, images: Tensor):
    """What localize computes for images (B, 3, H, W), by the definitions above.

    Yields (equation, name, symbolic shape, value) for each step, the predicted class's map last.
    """
    yield "", "images", "(B, 3, H, W)", images
    yield "Eq. 1", "X_1: class token, patches, positions", "(B, N+1, D)", model.embed(images)
    tokens, maps = model.forward_features(images, "full")
    yield "Eq. 4", "A_L: the last block's attention", "(B, S, N+1, N+1)", maps[-1].full
    yield "RPAM", "M_L^c: its class row, head mean", "(B, N+1)", maps[-1].cls
    yield "RPAM", "M_L^r: its rows, weighted by M_L^c", "(B, N)", maps[-1].relation
    relation_map = model.on_grid(mean_over_blocks(maps, "relation"))
    yield "Eq. 5", "M_*^r: patch relation map", "(B, h, w)", relation_map
    cls_map = model.on_grid(mean_over_blocks(maps, "cls")[:, 1:])
    yield "CDM", "M~_*^c: class-token attention map", "(B, h, w)", cls_map
    features = model.on_grid(tokens[:, 1:])
    yield "", "X_L: patches after the final norm", "(B, D, h, w)", features
    head = model.conv_head
    if head is None:
        logits = model.classifier(tokens[:, 0])
    else:
        if isinstance(head, CDM):
            yield "CDM", "1 - M~_*^c: reversed", "(B, h, w)", head.reverse(cls_map)
            yield "CDM", "X~_L: cues", "(B, D, h, w)", head.cues(features, cls_map)
        scores = head.scores(features, cls_map)
        yield "CDM" if isinstance(head, CDM) else "", "S_g: scores", "(B, G)", scores
        yield "Eq. 6", "W_g^e: kernels", "(G, C, D, k, k)", head.conv_kernels()
        class_maps = dynamic_conv2d(features, scores, head.conv_kernels(), head.bias)
        yield "Eq. 6", "X_CDM (X_SGR): class maps", "(B, C, h, w)", class_maps
        pooled = F.avg_pool2d(class_maps, 3, 1, 1) if head.pool == "padded" else class_maps
        logits = pooled.mean((2, 3))
    yield "Eq. 2", "logits", "(B, C)", logits
    yield "Eq. 2", "p: their softmax", "(B, C)", logits.softmax(1)
    if head is not None:
        predicted = logits.argmax(1)
        object_map = class_maps[torch.arange(len(images)), predicted][:, None]
        yield "Eq. 3", "M_CDM: the predicted class's map", "(B, 1, h, w)", object_map
        fused = object_map.relu() * relation_map[:, None]
        yield "Eq. 3", "M^fuse: ReLU(M_CDM) * M_*^r", "(B, 1, h, w)", fused


if __name__ == "__main__":
    from support import walkthrough

    walkthrough.main(LCTR, load_checkpoint, trace)
